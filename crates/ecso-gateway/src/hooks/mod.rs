//! Hooks for other gateways: a gateway in front of the model calls the model itself, and sends
//! request and answer here.
//!
//! A hook is a chat whose answer came with it. It is handled like every chat, and wherever the
//! model would be asked, it gets the [`ProvidedAnswer`]. The hook reports the result in its
//! gateway's format. So the same guard applies, whoever calls the model.

pub(crate) mod litellm;
pub(crate) mod pending;
pub(crate) mod portkey;
pub(crate) mod truefoundry;

use std::{future::ready, sync::Arc};

use axum::{
    body::{Body, to_bytes},
    http::{HeaderMap, Request, Response, header},
    response::IntoResponse,
};
use bytes::Bytes;
use ecso::profile::Scope;
use futures::future::BoxFuture;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};
use tracing::Instrument;
use utoipa::ToSchema;

use crate::{
    context::{RequestContext, check_content_headers},
    error::ApiError,
    handlers,
    json::{self as strict, has_no_prose, is_field_name},
    request::{self, is_remote},
    server::{Gateway, finish_response, request_id},
    settings::Mode,
    telemetry,
    upstream::{CHAT, Carrier, HTTP},
    wire::{Format, PREVIOUS_RESPONSE_ID, external_conversation},
};

/// Handles a call of a hook: admits it, reads it, and answers it with `work`, or with `failed` if
/// that is not possible.
async fn handle_call<Call: DeserializeOwned, Reply: Serialize>(
    gateway: &Gateway,
    route: &'static str,
    request: axum::extract::Request,
    failed: impl FnOnce(ApiError) -> Result<Reply, ApiError>,
    work: impl AsyncFnOnce(RequestContext, Call) -> Result<Reply, ApiError>,
) -> axum::response::Response {
    let (id, state) = (request_id(), gateway.state());
    let (head, body) = request.into_parts();
    let span = telemetry::request_span(route, &id, &head.headers);
    let response = async {
        let result = async {
            let mut context = gateway.admit(&state, &id, head)?;
            check_content_headers(&context.headers)?;
            context.keep_known_headers();
            // The gateway's key is for the guard; no model server may see it.
            context.remove_credentials();
            let body = context.read(body).await?;
            let call = strict::parse_as(&body)?;
            drop(body);
            Box::pin(work(context, call)).await
        };
        let reply = match result.await {
            Ok(reply) => reply,
            Err(error) => {
                let (code, logged) = (error.code, error.clone());
                let reply = failed(error)?;
                logged.log(&id);
                state.metrics.failure(code);
                reply
            }
        };
        Ok(([(header::CONTENT_TYPE, "application/json")], json!(reply).to_string()).into_response())
    };
    finish_response(&id, (HTTP, route), &state.metrics, response.instrument(span)).await
}

/// How the answer to a request is handled.
enum Decision {
    /// It is not judged: turned off, or out of scope.
    Pass,
    /// It is judged, but not held back.
    Observe,
    /// It is judged before it goes out. Holds the request.
    Guard(Box<request::Request>),
}

/// Decides how the answer to a chat is handled, by reading the chat as the guard would.
async fn decide(
    context: &mut RequestContext,
    model: Option<&str>,
    chat: Result<Value, ApiError>,
) -> Result<Decision, ApiError> {
    let state = Arc::clone(&context.state);
    let model = model.filter(|name| !name.is_empty());
    context.mode = context.caller.mode(&state.settings, model, &context.headers)?;
    let scope = context.scope(model);
    match (
        context.mode,
        chat.and_then(|chat| request::Body::parse(chat, &state.settings.allow_fields)),
    ) {
        (Mode::Off, _) => Ok(Decision::Pass),
        (_, Ok(read)) if scope != Scope::All && !read.has_images() => Ok(Decision::Pass),
        (Mode::Observe, _) => Ok(Decision::Observe),
        (Mode::Enforce, read) => Ok(Decision::Guard(Box::new(context.prepare(read?).await?))),
    }
}

/// Checks that a request is an object.
fn require_object(request: &Value) -> Result<(), ApiError> {
    if request.is_object() {
        Ok(())
    } else {
        Err(ApiError::bad_request("invalid_request", "the request must be a JSON object"))
    }
}

/// Whether a request asks for a stream, as the most lenient server would read it.
fn asks_for_stream(request: &Value) -> bool {
    !matches!(&request["stream"], Value::Null | Value::Bool(false)) && request["stream"] != 0
}

/// The error for a stream that would be guarded. These gateways send streams before they call the
/// hook, or whatever it replies.
fn stream_refused() -> ApiError {
    let message = "a stream can't be held back by a hook: ask without `stream`, or make this \
                   server the gateway's upstream";
    ApiError::bad_request("stream_not_guarded", message)
}

/// The chat that a request of any format asks for.
fn chat_of(format: Option<Format>, request: Value) -> Result<Value, ApiError> {
    match format {
        None => Ok(request),
        Some(format) => format
            .parse(request, &mut |_| Err(external_conversation(PREVIOUS_RESPONSE_ID)))
            .map(|(chat, _)| chat),
    }
}

/// The messages of a chat with its fetched images in place of their URLs, so that the model sees
/// what is judged. `None` if there were no URLs.
fn with_fetched_images(messages: &[Value], read: &request::Request) -> Option<Vec<Value>> {
    let has_remote_image = |message: &Value| {
        let parts = message["content"].as_array().into_iter().flatten();
        let mut urls = parts.filter_map(|part| {
            part["image_url"]["url"].as_str().or_else(|| part["image_url"].as_str())
        });
        urls.any(is_remote)
    };
    let is_known = |read: &Map<String, Value>| !has_remote_image(&Value::Object(read.clone()));
    let messages = messages.iter().zip(read.messages()).map(|(message, read)| {
        let is_changed = has_remote_image(message) && is_known(read);
        if is_changed { (true, Value::Object(read.clone())) } else { (false, message.clone()) }
    });
    let (changed, messages): (Vec<bool>, Vec<Value>) = messages.unzip();
    changed.contains(&true).then_some(messages)
}

/// An answer that came with its request.
struct ProvidedAnswer {
    /// The door of its hook.
    door: &'static str,
    /// As the answer to a chat.
    chat: Bytes,
    /// Unchanged, for the route of its own format.
    own: Bytes,
}

impl Carrier for ProvidedAnswer {
    fn door(&self) -> &'static str {
        self.door
    }

    fn carry(
        &self,
        request: Request<reqwest::Body>,
    ) -> BoxFuture<'_, Result<reqwest::Response, ApiError>> {
        let answer = if request.uri().path() == CHAT { &self.chat } else { &self.own };
        let mut response = Response::new(answer.clone());
        let json = header::HeaderValue::from_static("application/json");
        response.headers_mut().insert(header::CONTENT_TYPE, json);
        Box::pin(ready(Ok(response.into())))
    }
}

/// A judged answer.
struct JudgedAnswer {
    /// `safe`, `unsafe` or `unchecked`; `None` if it was not judged.
    verdict: Option<String>,
    finding: HookFinding,
    /// What may go out.
    answer: Value,
}

/// What was found, for the gateway's log.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct HookFinding {
    /// The id of this call in the guard's log.
    #[serde(skip_serializing_if = "String::is_empty")]
    request_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    verdict: Option<String>,
    /// Probability of harm, if the model reports one.
    #[serde(skip_serializing_if = "Option::is_none")]
    score: Option<f64>,
    /// A short name of the error.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<String>,
}

impl HookFinding {
    fn failed(error: ApiError) -> Self {
        Self { error: Some(error.code), message: Some(error.message), ..Self::default() }
    }
}

impl JudgedAnswer {
    fn is_unsafe(&self) -> bool {
        self.verdict.as_deref() == Some("unsafe")
    }

    fn is_safe(&self) -> bool {
        self.verdict.as_deref() == Some("safe")
    }
}

/// Judges the answer to a request, and replaces it if needed.
async fn judge_answer(
    gateway: &Gateway,
    context: RequestContext,
    format: Option<Format>,
    request: &Value,
    provided: ProvidedAnswer,
) -> Result<JudgedAnswer, ApiError> {
    let (id, longest) =
        (context.id.clone(), context.state.settings.limits.answer.saturating_mul(2));
    let context = context.with_answer(Arc::new(provided));
    let body = Body::from(request.to_string());
    let path = format.map_or(CHAT, Format::path);
    let response = handlers::answer(gateway, context, format, path, body).await?;
    let (head, body) = response.into_parts();
    let unreadable = || ApiError::upstream("the judged answer can't be read");
    // Read to its end: an observed answer is judged once all of it was read.
    let body = to_bytes(body, longest).await.map_err(|_| unreadable())?;
    let answer = serde_json::from_slice(&body).map_err(|_| unreadable())?;
    let text = |name| header_text(&head.headers, name);
    let verdict = text("x-ecso-verdict");
    let score = text("x-ecso-score").and_then(|score| score.parse().ok());
    let error = None;
    let finding =
        HookFinding { request_id: id, verdict: verdict.clone(), score, error, message: None };
    Ok(JudgedAnswer { verdict, finding, answer })
}

fn header_text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

/// Whether an answer contains more than what was judged of it, apart from ids and names.
fn says_more(original: &Value, judged: &Value) -> bool {
    const NAMES: [&str; 5] = ["id", "object", "created", "model", "system_fingerprint"];
    let mut original = original.clone();
    if let Value::Object(fields) = &mut original {
        let is_name = |value: &Value| value.is_string() || value.is_number() || value.is_null();
        fields.retain(|name, value| {
            !(NAMES.contains(&name.as_str()) && is_name(value) && has_no_prose(value))
        });
    }
    !is_contained(&original, judged)
}

/// Whether an id, name or signature in a Messages answer is more than one word, so that it could be
/// a text.
fn has_prose_in_names(answer: &Value) -> bool {
    const NAMES: [&str; 5] = ["id", "tool_use_id", "signature", "model", "type"];
    match answer {
        Value::Object(fields) => fields.iter().any(|(name, value)| {
            let has_spaces = |text: &str| text.contains(char::is_whitespace);
            NAMES.contains(&name.as_str()) && value.as_str().is_some_and(has_spaces)
                || has_prose_in_names(value)
        }),
        Value::Array(list) => list.iter().any(has_prose_in_names),
        _ => false,
    }
}

/// Whether everything that a value says is also in the other. A number in a known field says
/// nothing, and neither does an empty field.
fn is_contained(value: &Value, other: &Value) -> bool {
    match (value, other) {
        (Value::Object(fields), other) => {
            fields.iter().all(|(name, value)| match other.get(name) {
                Some(other) => is_contained(value, other),
                None => is_empty(value) && is_field_name(name),
            })
        }
        (Value::Array(list), Value::Array(others)) => {
            list.len() == others.len()
                && list.iter().zip(others).all(|(value, other)| is_contained(value, other))
        }
        (Value::Null | Value::Bool(_) | Value::Number(_), _) => true,
        (value, other) => value == other,
    }
}

fn is_empty(value: &Value) -> bool {
    value.is_null() || value.as_array().is_some_and(Vec::is_empty)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unjudged_content_is_noticed() {
        let judged = json!({"id": "ours", "choices": [{"index": 0, "message": {"content": "rye"}, "logprobs": null}]});
        for (original, more) in [
            (json!({"choices": [{"index": 0, "message": {"content": "rye"}}]}), false),
            (
                json!({"id": "c1", "model": "m", "created": 3, "choices": [{"message": {"content": "rye", "refusal": null, "annotations": []}}]}),
                false,
            ),
            (json!({"id": "two words", "choices": [{"message": {"content": "rye"}}]}), true),
            (json!({"choices": [{"message": {"content": "rye", "notes": "flour"}}]}), true),
            (json!({"choices": [{"message": {"content": "rye"}}], "notes": ["flour"]}), true),
            (
                json!({"choices": [{"message": {"content": "rye"}, "logprobs": {"content": [{"token": "flour"}]}}]}),
                true,
            ),
            (json!({"choices": [{"message": {"content": "rye"}, "stop_reason": null}]}), false),
            (
                json!({"choices": [{"message": {"content": "rye"}}, {"message": {"content": "flour"}}]}),
                true,
            ),
            (json!({"choices": [{"message": {"content": "rye"}, "stop_reason": 7}]}), true),
            (json!({"choices": [{"message": {"content": "rye"}, "Flour!": null}]}), true),
            (json!("flour"), true),
        ] {
            assert_eq!(says_more(&original, &judged), more, "{original}");
        }
    }
}
