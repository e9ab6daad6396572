//! `POST /v1/guard`: for people who serve their model themselves. Images, query and an answer in; verdict, captions and
//! a safe answer out.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    body::Body,
    extract::State,
    http::{HeaderValue, header},
    response::Response,
};
use ecso::{Outcome, Step, Verdict};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use crate::{
    access::Admission,
    audit::Case,
    chat::{Report, verdict_headers},
    failure::{Failure, Failures},
    request::Request,
    server::Gateway,
    settings::Mode,
    visit::Visit,
};

/// Judges an answer that you have, and gives a safe one where it is needed.
#[utoipa::path(post, path = "/v1/guard", request_body = Question, responses((status = 200, body = Finding), Failures))]
pub(crate) async fn guard(State(gateway): State<Arc<Gateway>>, request: axum::extract::Request) -> Response {
    gateway.visit("guard", request, judged).await
}

async fn judged(visit: Visit, admission: Arc<Admission>) -> Result<Response, Failure> {
    let Visit { live, id, begun, caller, headers, body } = &visit;
    let question = Question::read(body)?;
    let work = async {
        let _turn = admission.enter().await?;
        let body = question.chat()?;
        let mut request = Request::read(&body, &live.settings.limits, live.images)?;
        if request.model.is_empty() {
            request.model = live.upstream.model_name(headers).await?;
        }
        live.prepare(&mut request).await?;
        let guard = live.guard(&request, headers, Mode::Enforce)?;
        let (outcome, draft) = match &question.answer {
            Some(answer) => (guard.review(&request.chat, answer).await?, answer.clone()),
            None => live.answer(&guard, &request, headers, &request.sampling()).await?,
        };
        let drafts = BTreeMap::from([(0, draft)]);
        let (request, report) = (&request, &Report::of(outcome.clone()));
        let (key, mode, begun) = (&caller.name, Mode::Enforce, *begun);
        live.record(&Case { id, key, mode, begun, body: &body, request, report, drafts });
        Ok(outcome)
    };
    let outcome = visit.live.in_time(visit.begun, work).await?;
    let mut response = Response::new(Body::from(json!(Finding::new(id, &outcome)).to_string()));
    verdict_headers(response.headers_mut(), &Report::of(outcome));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

/// What is asked.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Question {
    /// Which model judges and answers, where a server behind the guard has several.
    #[serde(default)]
    model: String,
    /// A conversation as in chat completions; or `query` and `images`.
    #[serde(default)]
    #[schema(value_type = Vec<crate::openapi::Message>)]
    messages: Vec<Value>,
    /// What is asked about the images.
    #[serde(default)]
    query: Option<String>,
    /// URLs; data URLs too.
    #[serde(default)]
    images: Vec<String>,
    /// The answer that is judged; without one, the model gives it.
    #[serde(default)]
    pub(crate) answer: Option<String>,
}

impl Question {
    pub(crate) fn read(body: &[u8]) -> Result<Self, Failure> {
        serde_json::from_slice(body)
            .map_err(|error| Failure::bad_request("invalid_request", format!("the body can't be read: {error}")))
    }

    /// The question as a chat request.
    pub(crate) fn chat(&self) -> Result<Vec<u8>, Failure> {
        let messages = match (&self.query, self.messages.is_empty()) {
            (None, false) => json!(self.messages),
            (Some(query), true) => {
                let images = self.images.iter().map(|url| json!({"type": "image_url", "image_url": {"url": url}}));
                let parts: Vec<Value> = images.chain([json!({"type": "text", "text": query})]).collect();
                json!([{"role": "user", "content": parts}])
            }
            _ => {
                return Err(Failure::bad_request(
                    "invalid_request",
                    "give either `messages`, or `query` with `images`",
                ));
            }
        };
        Ok(json!({"model": self.model, "messages": messages}).to_string().into_bytes())
    }
}

/// What is found.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Finding<'a> {
    pub(crate) request_id: &'a str,
    #[schema(value_type = crate::openapi::Verdict)]
    pub(crate) verdict: Verdict,
    /// Probability of harm, where the model tells.
    pub(crate) score: Option<f64>,
    /// What may go out: the answer that was judged, or the safe one.
    pub(crate) answer: &'a str,
    /// The safe answer, if one was needed.
    pub(crate) safe_answer: Option<&'a str>,
    /// One for each image, if they were needed.
    pub(crate) captions: Vec<&'a str>,
    pub(crate) profile: &'a str,
    pub(crate) model: &'a str,
}

impl<'a> Finding<'a> {
    pub(crate) fn new(request_id: &'a str, outcome: &'a Outcome) -> Self {
        let captions = outcome.steps.iter().filter(|step| step.step == Step::Caption);
        Self {
            request_id,
            verdict: outcome.verdict,
            score: outcome.score,
            answer: &outcome.answer,
            safe_answer: outcome.rewritten.then_some(outcome.answer.as_str()),
            captions: captions.map(|step| step.reply.as_str()).collect(),
            profile: &outcome.profile,
            model: &outcome.model,
        }
    }
}
