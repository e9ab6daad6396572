//! `POST /v1/moderations` in OpenAI's shape: would the guard let the model's answer to this out?
//!
//! The model is asked as in a chat, up to the verdict; no answer is given. OpenAI's categories of harm are not told
//! apart here: they are null, and a category of our own, `harm`, says what was found.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use axum::{
    body::Body,
    extract::State,
    http::{HeaderValue, header},
    response::Response,
};
use ecso::{
    Outcome, Verdict,
    profile::{Gate, Rewrite, Scope},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use crate::{
    access::Admission,
    audit::Case,
    chat::Report,
    failure::{Failure, Failures},
    openapi::Part,
    request::Request,
    server::{Gateway, others},
    settings::Mode,
    visit::Visit,
};

/// OpenAI's names.
const CATEGORIES: [&str; 13] = [
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
];

/// Tells whether a request, texts or images, leads to harm.
#[utoipa::path(
    post, path = "/v1/moderations", request_body = Question,
    responses((status = 200, body = Finding), Failures),
)]
pub(crate) async fn moderations(State(gateway): State<Arc<Gateway>>, request: axum::extract::Request) -> Response {
    if !gateway.live().settings.moderations {
        return others(State(gateway), request).await;
    }
    gateway.visit("moderations", request, moderated).await
}

/// What is to be judged.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = Moderation)]
pub(crate) struct Question {
    input: Input,
    /// The model that is asked; a name of OpenAI's moderation models, or none, is the only one behind the guard.
    model: Option<String>,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
enum Input {
    Text(String),
    /// Each is judged by itself.
    Texts(Vec<String>),
    /// Text and images of one request.
    Parts(Parts),
}

#[derive(Debug, Deserialize, ToSchema)]
#[schema(value_type = Vec<Part>)]
struct Parts(Vec<Value>);

/// What was found, one result for each input.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ModerationFinding)]
pub(crate) struct Finding<'a> {
    id: &'a str,
    model: &'a str,
    results: Vec<Found>,
}

#[derive(Debug, Serialize, ToSchema)]
struct Found {
    flagged: bool,
    /// `harm`; OpenAI's own are null: they are not told apart.
    categories: BTreeMap<&'static str, Option<bool>>,
    /// Probability of harm, where the model tells.
    category_scores: BTreeMap<&'static str, Option<f64>>,
    /// `text`, `image`.
    category_applied_input_types: BTreeMap<&'static str, Vec<&'static str>>,
}

impl Found {
    fn of(outcome: &Outcome, kinds: &BTreeSet<&'static str>) -> Self {
        let flagged = outcome.verdict == Verdict::Unsafe;
        Self {
            flagged,
            categories: CATEGORIES.map(|name| (name, None)).into_iter().chain([("harm", Some(flagged))]).collect(),
            category_scores: CATEGORIES.map(|name| (name, None)).into_iter().chain([("harm", outcome.score)]).collect(),
            category_applied_input_types: BTreeMap::from([("harm", kinds.iter().copied().collect())]),
        }
    }
}

impl Question {
    fn read(body: &[u8], most: usize) -> Result<Self, Failure> {
        let invalid = |message: String| Failure::bad_request("invalid_request", message);
        let question: Self =
            serde_json::from_slice(body).map_err(|error| invalid(format!("the body can't be read: {error}")))?;
        let contents = question.contents();
        let is_empty = |content: &Value| {
            content.as_str().is_some_and(|text| text.trim().is_empty()) || content.as_array().is_some_and(Vec::is_empty)
        };
        if contents.is_empty() || contents.iter().any(is_empty) {
            return Err(invalid("`input` is empty, or a text of it is".into()));
        }
        if let Input::Parts(Parts(parts)) = &question.input
            && parts.iter().any(|part| !part["type"].is_string())
        {
            return Err(invalid("a part of `input` has no `type`".into()));
        }
        let count = contents.len();
        if count > most {
            return Err(invalid(format!("`input` has {count} texts; at most {most} are allowed")));
        }
        Ok(question)
    }

    /// The content of a message for each input.
    fn contents(&self) -> Vec<Value> {
        match &self.input {
            Input::Text(text) => vec![json!(text)],
            Input::Texts(texts) => texts.iter().map(|text| json!(text)).collect(),
            Input::Parts(Parts(parts)) => vec![json!(parts)],
        }
    }

    /// The model to ask, where the client means one of ours.
    fn model(&self) -> Option<&str> {
        let is_ours = |name: &&str| {
            !name.is_empty() && !["omni-moderation", "text-moderation"].iter().any(|other| name.starts_with(other))
        };
        self.model.as_deref().filter(is_ours)
    }
}

async fn moderated(visit: Visit, admission: Arc<Admission>) -> Result<Response, Failure> {
    let Visit { live, headers, body, .. } = &visit;
    let question = Question::read(body, live.settings.limits.inputs)?;
    let work = async {
        let _turn = admission.enter().await?;
        let model = match question.model() {
            Some(name) => name.to_owned(),
            None => live.upstream.model_name(headers).await?,
        };
        let mut results = Vec::new();
        for content in question.contents() {
            results.push(found(&visit, &model, content).await?);
        }
        Ok(json!(Finding { id: &visit.id, model: &model, results }))
    };
    let finding = visit.live.in_time(visit.begun, work).await?;
    let mut response = Response::new(Body::from(finding.to_string()));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

/// Judges one input.
async fn found(visit: &Visit, model: &str, content: Value) -> Result<Found, Failure> {
    let Visit { live, id, begun, caller, headers, .. } = visit;
    let body = json!({"model": model, "messages": [{"role": "user", "content": content}]}).to_string().into_bytes();
    let mut request = Request::read(&body, &live.settings.limits, live.images)?;
    live.prepare(&mut request).await?;
    let mut profile = live.profile.clone();
    // Whatever is sent here is to be judged, and no answer to it is wanted.
    (profile.scope, profile.gate, profile.rewrite) = (Scope::All, Gate::Detected, Rewrite::Refuse);
    let sampling = profile.direct.sampling();
    let guard = live.guarding(&request, headers, profile);
    let (outcome, draft) = live.answer(&guard, &request, headers, &sampling).await?;

    let kinds = request.chat.turns.iter().flat_map(|turn| &turn.parts).map(|part| match part {
        ecso::Part::Text(_) => "text",
        ecso::Part::Image(_) => "image",
    });
    let found = Found::of(&outcome, &kinds.collect());
    let drafts = BTreeMap::from([(0, draft)]);
    let (key, mode, begun) = (&caller.name, Mode::Observe, *begun);
    let (request, report) = (&request, &Report::of(outcome));
    live.record(&Case { id, key, mode, begun, body: &body, request, report, drafts });
    Ok(found)
}
