//! `POST /v1/moderations` in OpenAI's format: would the guard release the model's answer to this?
//!
//! The model is asked as in a chat, up to the verdict, and the answer is discarded. OpenAI's
//! categories of harm are not distinguished: they are null, and an additional category `harm` has
//! the result.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use axum::{
    extract::State,
    http::{HeaderValue, header},
    response::Response,
};
use bytes::Bytes;
use ecso::{
    Outcome, Verdict,
    profile::{Gate, Rewrite, Scope},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use crate::{
    access::Admission,
    chat,
    context::RequestContext,
    error::{ApiError, ApiErrors},
    openapi::Part,
    passthrough::passthrough,
    request::Body,
    server::Gateway,
};

/// OpenAI's categories.
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

/// Judges whether a request leads to harm. Takes texts or images.
#[utoipa::path(
    post, path = "/v1/moderations", request_body = ModerationRequest,
    responses((status = 200, body = ModerationFinding), ApiErrors),
)]
pub(crate) async fn moderations(
    State(gateway): State<Arc<Gateway>>,
    request: axum::extract::Request,
) -> Response {
    if !gateway.state().settings.moderations {
        return passthrough(State(gateway), request).await;
    }
    let admission = Arc::clone(&gateway.admission);
    gateway
        .judge_on_demand("moderations", request, async |context, body| {
            handle(context, body, &admission).await
        })
        .await
}

/// The request body.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct ModerationRequest {
    input: Input,
    /// The model to ask. The name of an OpenAI moderation model, or none, means the only model
    /// behind the guard.
    model: Option<String>,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
enum Input {
    Text(String),
    /// Each is judged separately.
    Texts(Vec<String>),
    /// Text and images of one request.
    Parts(Parts),
}

#[derive(Debug, Deserialize, ToSchema)]
#[schema(value_type = Vec<Part>)]
struct Parts(Vec<Value>);

/// The response, with one result for each input.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModerationFinding<'a> {
    id: &'a str,
    model: &'a str,
    results: Vec<ModerationResult>,
}

#[derive(Debug, Serialize, ToSchema)]
struct ModerationResult {
    flagged: bool,
    /// `harm`. OpenAI's own categories are null, because they are not distinguished.
    categories: BTreeMap<&'static str, Option<bool>>,
    /// Probability of harm, if the model reports one.
    category_scores: BTreeMap<&'static str, Option<f64>>,
    /// `text`, `image`.
    category_applied_input_types: BTreeMap<&'static str, Vec<&'static str>>,
}

impl ModerationResult {
    fn of(outcome: &Outcome, kinds: &BTreeSet<&'static str>) -> Self {
        let flagged = outcome.verdict == Verdict::Unsafe;
        Self {
            flagged,
            categories: CATEGORIES
                .map(|name| (name, None))
                .into_iter()
                .chain([("harm", Some(flagged))])
                .collect(),
            category_scores: CATEGORIES
                .map(|name| (name, None))
                .into_iter()
                .chain([("harm", outcome.score)])
                .collect(),
            category_applied_input_types: BTreeMap::from([(
                "harm",
                kinds.iter().copied().collect(),
            )]),
        }
    }
}

impl ModerationRequest {
    fn read(body: &[u8], most: usize) -> Result<Self, ApiError> {
        let invalid = |message: String| ApiError::bad_request("invalid_request", message);
        let question: Self = crate::json::parse_as(body)?;
        let contents = question.contents();
        let is_empty = |content: &Value| {
            content.as_str().is_some_and(|text| text.trim().is_empty())
                || content.as_array().is_some_and(Vec::is_empty)
        };
        if contents.is_empty() || contents.iter().any(is_empty) {
            return Err(invalid("`input` or one of its texts is empty".into()));
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

    /// The message content of each input.
    fn contents(&self) -> Vec<Value> {
        match &self.input {
            Input::Text(text) => vec![json!(text)],
            Input::Texts(texts) => texts.iter().map(|text| json!(text)).collect(),
            Input::Parts(Parts(parts)) => vec![json!(parts)],
        }
    }

    /// The model to ask, if the client names one of the upstream's.
    fn model(&self) -> Option<&str> {
        let is_ours = |name: &&str| {
            !name.is_empty()
                && !["omni-moderation", "text-moderation"]
                    .iter()
                    .any(|other| name.starts_with(other))
        };
        self.model.as_deref().filter(is_ours)
    }
}

async fn handle(
    context: &mut RequestContext,
    body: Bytes,
    admission: &Admission,
) -> Result<Response, ApiError> {
    let question = ModerationRequest::read(&body, context.state.settings.limits.inputs)?;
    drop(body);
    let _turn = context.in_time(admission.enter()).await?;
    let model = match question.model() {
        Some(name) => name.to_owned(),
        None => context.in_time(context.state.upstream.model_name(&context.headers)).await?,
    };
    let mut results = Vec::new();
    for content in question.contents() {
        results.push(judge_input(context, &model, content).await?);
    }
    let finding = json!(ModerationFinding { id: &context.id, model: &model, results });
    let mut response = Response::new(axum::body::Body::from(finding.to_string()));
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

/// Judges one input.
async fn judge_input(
    context: &mut RequestContext,
    model: &str,
    input: Value,
) -> Result<ModerationResult, ApiError> {
    let body = json!({"model": model, "messages": [{"role": "user", "content": input}]});
    let body = Body::parse(body, &context.state.settings.allow_fields)?;
    let request = context.prepare(body).await?;
    let context = &*context;
    let RequestContext { state, headers, .. } = context;
    let mut profile = state.profile(&context.caller, Some(model)).clone();
    // Everything sent here is judged, and the answer is not needed.
    (profile.scope, profile.gate, profile.rewrite) = (Scope::All, Gate::Detected, Rewrite::Refuse);
    let sampling = profile.direct.sampling();
    let guard = state.guard_under(&request, headers, profile).build();
    let work = async {
        let draft = state.draft(&request, headers, &sampling).await?;
        let record = context.record(&request, BTreeMap::from([(0, draft.clone())]));
        let outcome = chat::judge(&guard, &request, 0, &draft, &record).await?;
        record.finish();
        Ok(outcome)
    };
    let outcome = context.in_time(work).await?;
    let kinds = request.chat.turns.iter().flat_map(|turn| &turn.parts).map(|part| match part {
        ecso::Part::Text(_) => "text",
        ecso::Part::Image(_) => "image",
    });
    Ok(ModerationResult::of(&outcome, &kinds.collect()))
}
