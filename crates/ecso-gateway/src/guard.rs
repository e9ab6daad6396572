//! `POST /v1/guard`, for people who serve their model themselves. Takes images, a query and an
//! answer; returns a verdict, captions and a safe answer.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    extract::State,
    http::{HeaderValue, header},
    response::Response,
};
use bytes::Bytes;
use ecso::{Outcome, Step, Verdict};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use crate::{
    access::Admission,
    chat,
    context::RequestContext,
    error::{ApiError, ApiErrors},
    request::Body,
    server::Gateway,
    settings::Mode,
};

/// Judges an answer that you have, and returns a safe one if needed.
#[utoipa::path(post, path = "/v1/guard", request_body = GuardRequest, responses((status = 200, body = GuardFinding), ApiErrors))]
pub(crate) async fn guard(
    State(gateway): State<Arc<Gateway>>,
    request: axum::extract::Request,
) -> Response {
    let admission = Arc::clone(&gateway.admission);
    gateway
        .judge_on_demand("guard", request, async |context, body| {
            handle(context, body, &admission).await
        })
        .await
}

async fn handle(
    context: &mut RequestContext,
    body: Bytes,
    admission: &Admission,
) -> Result<Response, ApiError> {
    let question = GuardRequest::read(&body)?;
    drop(body);
    let _turn = context.in_time(admission.enter()).await?;
    let body = Body::parse(question.chat()?, &context.state.settings.allow_fields)?;
    let mut request = context.prepare(body).await?;
    // The caller wants a verdict even for texts, and receives what may go out.
    (context.is_in_scope, context.mode) = (true, Mode::Enforce);
    let context = &*context;
    let RequestContext { state, headers, .. } = context;
    let work = async {
        if request.model.is_empty() {
            request.model = state.upstream.model_name(headers).await?;
        }
        let guard = state.guard(&request, context, Mode::Enforce);
        let draft = match &question.answer {
            Some(answer) => answer.clone(),
            None => state.draft(&request, headers, &state.sampling(&request)).await?,
        };
        let record = context.record(&request, BTreeMap::from([(0, draft.clone())]));
        let outcome = chat::judge(&guard, &request, 0, &draft, &record).await?;
        Ok((outcome, record.finish()))
    };
    let (outcome, report) = context.in_time(work).await?;
    let mut response = Response::new(axum::body::Body::from(
        json!(GuardFinding::new(&context.id, &outcome)).to_string(),
    ));
    report.headers(response.headers_mut());
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

/// The request body.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct GuardRequest {
    /// The model that judges and answers, if the server behind the guard has several.
    #[serde(default)]
    model: String,
    /// A conversation as in chat completions. Alternatively, use `query` and `images`.
    #[serde(default)]
    #[schema(value_type = Vec<crate::openapi::Message>)]
    messages: Vec<Value>,
    /// The question about the images.
    #[serde(default)]
    query: Option<String>,
    /// URLs, including data URLs.
    #[serde(default)]
    images: Vec<String>,
    /// The tools that the model was given, as in chat completions.
    #[serde(default)]
    #[schema(value_type = Vec<Object>)]
    tools: Vec<Value>,
    /// The requested format of the answer, as in chat completions.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    response_format: Option<Value>,
    /// The answer to judge. Without one, the model is asked for it.
    #[serde(default)]
    pub(crate) answer: Option<String>,
}

impl GuardRequest {
    pub(crate) fn read(body: &[u8]) -> Result<Self, ApiError> {
        crate::json::parse_as(body)
    }

    /// The request as a chat.
    pub(crate) fn chat(&self) -> Result<Value, ApiError> {
        let messages = match (&self.query, self.messages.is_empty()) {
            (None, false) => json!(self.messages),
            (Some(query), true) => {
                let images = self
                    .images
                    .iter()
                    .map(|url| json!({"type": "image_url", "image_url": {"url": url}}));
                let parts: Vec<Value> =
                    images.chain([json!({"type": "text", "text": query})]).collect();
                json!([{"role": "user", "content": parts}])
            }
            _ => {
                return Err(ApiError::bad_request(
                    "invalid_request",
                    "send either `messages`, or `query` with `images`",
                ));
            }
        };
        let mut chat = json!({"model": self.model, "messages": messages});
        if !self.tools.is_empty() {
            chat["tools"] = json!(self.tools);
        }
        if let Some(format) = &self.response_format {
            chat["response_format"] = format.clone();
        }
        Ok(chat)
    }
}

/// The response.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct GuardFinding<'a> {
    pub(crate) request_id: &'a str,
    #[schema(value_type = crate::openapi::Verdict)]
    pub(crate) verdict: Verdict,
    /// Probability of harm, if the model reports one.
    pub(crate) score: Option<f64>,
    /// What may go out: the judged answer, or the safe one.
    pub(crate) answer: &'a str,
    /// The safe answer, if one was needed.
    pub(crate) safe_answer: Option<&'a str>,
    /// One for each image, if they were needed.
    pub(crate) captions: Vec<&'a str>,
    pub(crate) profile: &'a str,
    pub(crate) model: &'a str,
}

impl<'a> GuardFinding<'a> {
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
