//! LiteLLM's generic guardrail API: a call with the request, and later one with the answer. Both
//! carry the proxy's own call id; an id that a client chose could stand for two requests.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

use axum::{extract::State, http::StatusCode, response::Response};
use bytes::Bytes;
use ecso::is_data_url;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::{
    Decision, JudgedAnswer, ProvidedAnswer, decide, handle_call, judge_answer,
    pending::PendingCall, with_fetched_images,
};
use crate::{
    context::RequestContext,
    error::{ApiError, ApiErrors},
    json::collect_texts,
    request::is_remote,
    server::Gateway,
    settings::{Mode, Unseen},
};

/// A call from LiteLLM. Its provider parameters are not read, because a client can set them.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct LiteLlmCall {
    input_type: LiteLlmKind,
    /// The proxy's id for the call, the same for request and answer.
    #[serde(default)]
    litellm_call_id: Option<String>,
    /// The conversation; only with the request.
    #[serde(default)]
    #[schema(value_type = Option<Vec<Object>>)]
    structured_messages: Option<Vec<Value>>,
    /// The texts of the conversation, or of the answer.
    #[serde(default)]
    texts: Option<Vec<String>>,
    /// URLs, data URLs, or plain base64.
    #[serde(default)]
    images: Option<Vec<String>>,
    #[serde(default)]
    #[schema(value_type = Option<Vec<Object>>)]
    tools: Option<Vec<Value>>,
    #[serde(default)]
    #[schema(value_type = Option<Vec<Object>>)]
    tool_calls: Option<Vec<Value>>,
    #[serde(default)]
    model: Option<String>,
    /// Whose request it is.
    #[serde(default)]
    request_data: Option<LiteLlmCaller>,
    /// The client's headers, as far as the proxy sends them.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    request_headers: Option<BTreeMap<String, Value>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum LiteLlmKind {
    Request,
    Response,
}

#[derive(Debug, Default, Deserialize, ToSchema)]
pub(crate) struct LiteLlmCaller {
    #[serde(default)]
    user_api_key_hash: Option<String>,
}

/// What LiteLLM is to do.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct LiteLlmVerdict {
    action: LiteLlmAction,
    /// For the client.
    #[serde(skip_serializing_if = "Option::is_none")]
    blocked_reason: Option<String>,
    /// The texts of the answer, as many as were sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    texts: Option<Vec<String>>,
    /// The conversation, with its fetched images in place of their URLs.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Object>>)]
    structured_messages: Option<Vec<Value>>,
}

#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum LiteLlmAction {
    None,
    Blocked,
    GuardrailIntervened,
}

impl LiteLlmVerdict {
    fn of(action: LiteLlmAction) -> Self {
        Self { action, blocked_reason: None, texts: None, structured_messages: None }
    }

    fn pass() -> Self {
        Self::of(LiteLlmAction::None)
    }

    fn blocked(reason: String) -> Self {
        Self { blocked_reason: Some(reason), ..Self::of(LiteLlmAction::Blocked) }
    }
}

/// Keeps a request, or judges the answer to one.
#[utoipa::path(post, path = "/beta/litellm_basic_guardrail_api", request_body = LiteLlmCall, responses(
    (status = 200, body = LiteLlmVerdict), (status = 500, description = "The guard failed", body = crate::error::ErrorBody), ApiErrors
))]
pub(crate) async fn litellm(
    State(gateway): State<Arc<Gateway>>,
    request: axum::extract::Request,
) -> Response {
    let work = async |context, call: LiteLlmCall| match call.input_type {
        LiteLlmKind::Request => on_request(context, call).await,
        LiteLlmKind::Response => Box::pin(on_response(&gateway, context, call)).await,
    };
    handle_call(&gateway, "litellm", request, failed, work).await
}

/// What can't be guarded is blocked, so that the client sees the reason. A failure of the guard is
/// a 500: the proxy may be configured to ignore other statuses.
fn failed(error: ApiError) -> Result<LiteLlmVerdict, ApiError> {
    match error.status {
        StatusCode::BAD_REQUEST
        | StatusCode::PAYLOAD_TOO_LARGE
        | StatusCode::UNSUPPORTED_MEDIA_TYPE => Ok(LiteLlmVerdict::blocked(error.message)),
        status if status.is_server_error() => {
            Err(ApiError { status: StatusCode::INTERNAL_SERVER_ERROR, ..error })
        }
        _ => Err(error),
    }
}

/// Reads a request, and keeps it until its answer arrives.
async fn on_request(
    mut context: RequestContext,
    call: LiteLlmCall,
) -> Result<LiteLlmVerdict, ApiError> {
    let chat = call.chat();
    let whole = call.check_complete().map(|()| chat.clone());
    let (known, seen) = match decide(&mut context, call.model.as_deref(), whole).await? {
        Decision::Pass => (PendingCall::Unguarded, None),
        Decision::Observe => (PendingCall::Waiting(chat.to_string().into_bytes().into()), None),
        Decision::Guard(read) => {
            let messages = chat["messages"].as_array().map(Vec::as_slice).unwrap_or_default();
            let seen = with_fetched_images(messages, &read);
            if seen.is_some() && call.structured_messages.as_deref() != Some(messages) {
                let message = "an image is named by its URL in a place where it can't be \
                               replaced: send it as a data URL";
                return Err(ApiError::bad_request("image_url_refused", message));
            }
            // From here on it contains all images.
            (PendingCall::Waiting(read.body()?.into()), seen)
        }
    };
    match call.remember(&context, &known) {
        Err(error) if context.mode == Mode::Enforce => return Err(error),
        Err(error) => error.log(&context.id),
        Ok(()) => {}
    }
    Ok(match seen {
        None => LiteLlmVerdict::pass(),
        seen => LiteLlmVerdict {
            structured_messages: seen,
            ..LiteLlmVerdict::of(LiteLlmAction::GuardrailIntervened)
        },
    })
}

/// Judges the answer to a request that was kept.
async fn on_response(
    gateway: &Gateway,
    mut context: RequestContext,
    call: LiteLlmCall,
) -> Result<LiteLlmVerdict, ApiError> {
    let state = Arc::clone(&context.state);
    context.mode = context.caller.mode(&state.settings, None, &context.headers)?;
    if context.mode == Mode::Off {
        return Ok(LiteLlmVerdict::pass());
    }
    let finding = call.key(&context).and_then(|(tenant, id)| {
        let block = |code, message| Err(ApiError::bad_request(code, message));
        match state.pending.take((&tenant, id)) {
            Some(PendingCall::Unguarded) => Ok(None),
            Some(PendingCall::Waiting(chat)) => serde_json::from_slice(&chat)
                .map(Some)
                .map_err(|_| ApiError::upstream("a stored request can't be read")),
            Some(PendingCall::Answered) => block(
                "answered_twice",
                "this answer arrives in parts, which can't be held back: set \
                 streaming_transform_mode: incremental_diff and streaming_end_of_stream_only: \
                 true, and don't stream answers that call tools",
            ),
            Some(PendingCall::Ambiguous) => {
                block("call_id_taken", "two requests have the same litellm_call_id")
            }
            None if state.settings.unseen == Unseen::Judge => Ok(Some(call.placeholder_chat())),
            None => block(
                "request_unseen",
                "the guard has not seen this request: LiteLLM does not send requests with an image \
                 and no text",
            ),
        }
    });
    let chat = match finding {
        Ok(Some(chat)) => chat,
        Ok(None) => return Ok(LiteLlmVerdict::pass()),
        Err(error) if context.mode == Mode::Observe => {
            error.log(&context.id);
            context.record_failure(&error);
            return Ok(LiteLlmVerdict::pass());
        }
        Err(error) => return Err(error),
    };
    let model = chat["model"].as_str().filter(|name| !name.is_empty());
    context.mode = context.caller.mode(&state.settings, model, &context.headers)?;
    if call.images.as_ref().is_some_and(|images| !images.is_empty())
        && context.mode == Mode::Enforce
    {
        return Err(ApiError::bad_request(
            "unsupported_content",
            "an answer with images can't be guarded",
        ));
    }
    // A waiting request is in scope, or could not be read.
    context.is_in_scope = true;
    let most = state.settings.limits.choices as usize;
    if call.texts.as_ref().is_some_and(|texts| texts.len() > most) && context.mode == Mode::Enforce
    {
        return Err(ApiError::bad_request(
            "too_many_answers",
            format!("at most {most} answers are judged at a time"),
        ));
    }
    let answer = call.chat_answer();
    let judged = judge_answer(
        gateway,
        context,
        None,
        &chat,
        ProvidedAnswer { door: "litellm", chat: Bytes::clone(&answer), own: answer },
    )
    .await?;
    Ok(call.verdict(&judged))
}

impl LiteLlmCall {
    /// The tenant of the call, and its id, which must be the proxy's own.
    fn key(&self, context: &RequestContext) -> Result<(String, &str), ApiError> {
        let id = self.litellm_call_id.as_deref().filter(|id| !id.is_empty());
        let id = id.ok_or_else(|| {
            ApiError::bad_request("call_id_missing", "litellm_call_id is missing")
        })?;
        let headers = self.request_headers.as_ref().ok_or_else(|| {
            let message =
                "request_headers are missing: they show whether the client chose litellm_call_id";
            ApiError::bad_request("call_id_unknown", message)
        })?;
        if headers.keys().any(|name| name.eq_ignore_ascii_case("x-litellm-call-id")) {
            let message =
                "the header x-litellm-call-id is not accepted: two requests could have the same id";
            return Err(ApiError::bad_request("call_id_chosen", message));
        }
        let key = self.request_data.as_ref().and_then(|caller| caller.user_api_key_hash.as_deref());
        Ok((format!("{} {}", context.tenant(), key.unwrap_or_default()), id))
    }

    /// Keeps what is known about the request until its answer arrives.
    fn remember(&self, context: &RequestContext, known: &PendingCall) -> Result<(), ApiError> {
        let (tenant, id) = self.key(context)?;
        if context.state.pending.insert((&tenant, id), known) {
            return Ok(());
        }
        let message = "the request is longer than `gateway.limits.pending`, so it can't be kept \
                       until its answer arrives";
        Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message))
    }

    /// Returns an error if LiteLLM visibly left something out of the messages, or if an image is
    /// sent as text.
    fn check_complete(&self) -> Result<(), ApiError> {
        for (index, message) in self.structured_messages.iter().flatten().enumerate() {
            let mut texts = HashSet::new();
            collect_texts(message, &mut texts);
            let is_image = |text: &&str| !is_data_url(text) && text.contains("data:image/");
            let is_screenshot = message["role"] == "tool"
                && texts.iter().any(|text| text.contains("computer_screenshot"));
            if is_screenshot || texts.iter().any(is_image) {
                let message = format!("`structured_messages.{index}` has an image in its text");
                return Err(ApiError::bad_request("image_in_text", message));
            }
            if message["content"].as_array().is_some_and(Vec::is_empty) {
                let message =
                    format!("LiteLLM did not send the content of `structured_messages.{index}`");
                return Err(ApiError::bad_request("unsupported_content", message));
            }
        }
        Ok(())
    }

    /// The request as a chat: its messages, and whatever was sent in addition.
    fn chat(&self) -> Value {
        let messages = self.structured_messages.clone().unwrap_or_default();
        let (mut known, mut extra_parts) = (HashSet::new(), Vec::new());
        for message in &messages {
            collect_texts(message, &mut known);
        }
        let written: HashSet<&str> = known
            .iter()
            .filter(|text| is_data_url(text))
            .filter_map(|url| url.split_once("base64,").map(|(_, written)| written))
            .collect();
        for image in self.images.iter().flatten().filter(|image| !known.contains(image.as_str())) {
            let is_url = is_data_url(image) || is_remote(image);
            let url = if is_url { image.clone() } else { format!("data:;base64,{image}") };
            // The same image is in the messages, with its media type.
            if !written.contains(image.as_str()) {
                extra_parts.push(json!({"type": "image_url", "image_url": {"url": url}}));
            }
        }
        let calls = self.tool_calls.iter().flatten().filter(|call| !is_known(call, &known));
        let texts = self.texts.iter().flatten().filter(|text| !known.contains(text.as_str()));
        let texts = texts.cloned().chain(calls.map(Value::to_string));
        extra_parts.extend(texts.map(|text| json!({"type": "text", "text": text})));
        let mut chat = json!({"model": self.model, "messages": add_parts(messages, extra_parts)});
        if let Some(tools) = self.tools.as_ref().filter(|tools| !tools.is_empty()) {
            chat["tools"] = json!(tools);
        }
        chat
    }

    /// The chat that stands in for an unknown request.
    fn placeholder_chat(&self) -> Value {
        json!({"model": self.model, "messages": [{"role": "user", "content": "(a request that is not known)"}]})
    }

    fn has_calls(&self) -> bool {
        self.tool_calls.as_ref().is_some_and(|calls| !calls.is_empty())
    }

    /// The answer as the answer to a chat. Texts may be several answers, or parts of one: each
    /// becomes a choice, and so does all of it with its tool calls. The calls are also a choice of
    /// their own, because a profile may only read the beginning of an answer.
    fn chat_answer(&self) -> Bytes {
        let texts = self.texts.as_deref().unwrap_or_default();
        let mut messages: Vec<Value> = texts.iter().map(|text| json!({"content": text})).collect();
        let calls: Value = self.tool_calls.iter().flatten().map(tool_call).collect();
        if texts.len() != 1 || self.has_calls() {
            let mut all = json!({"content": texts.join("\n")});
            if self.has_calls() {
                all["tool_calls"] = calls.clone();
            }
            messages.push(all);
        }
        if self.has_calls() && !texts.is_empty() {
            messages.push(json!({"content": null, "tool_calls": calls}));
        }
        let choices = messages.into_iter().enumerate();
        let choices = choices.map(
            |(index, message)| json!({"index": index, "message": message, "finish_reason": "stop"}),
        );
        json!({"model": self.model, "choices": choices.collect::<Vec<_>>()}).to_string().into()
    }

    /// What the proxy is to do about a judged answer.
    fn verdict(&self, judged: &JudgedAnswer) -> LiteLlmVerdict {
        if !judged.is_unsafe() {
            return LiteLlmVerdict::pass();
        }
        let texts = self.texts.as_deref().unwrap_or_default();
        let text_of = |index: usize| {
            let message = &judged.answer["choices"][index]["message"];
            message["content"].as_str().or_else(|| message["refusal"].as_str())
        };
        let replacements: Option<Vec<String>> =
            (0..texts.len()).map(|index| text_of(index).map(str::to_owned)).collect();
        // Tool calls can't be removed from an answer here, and neither can a part of a whole.
        match replacements.filter(|replacements| {
            !self.has_calls() && !replacements.is_empty() && replacements != texts
        }) {
            Some(replacements) => LiteLlmVerdict {
                texts: Some(replacements),
                ..LiteLlmVerdict::of(LiteLlmAction::GuardrailIntervened)
            },
            None => LiteLlmVerdict::blocked(
                "the guard blocked this answer: it was judged harmful".to_owned(),
            ),
        }
    }
}

/// Whether all texts of a value are known.
fn is_known(value: &Value, known: &HashSet<&str>) -> bool {
    let mut texts = HashSet::new();
    collect_texts(value, &mut texts);
    texts.is_subset(known)
}

/// A tool call with all its fields.
fn tool_call(call: &Value) -> Value {
    let name = call["function"]["name"].as_str().unwrap_or_default();
    json!({"type": "function", "function": {"name": name, "arguments": call.to_string()}})
}

/// Adds parts to the last user message.
fn add_parts(mut messages: Vec<Value>, parts: Vec<Value>) -> Vec<Value> {
    if parts.is_empty() && !messages.is_empty() {
        return messages;
    }
    let Some(last) = messages.iter_mut().rfind(|message| message["role"] == "user") else {
        messages.push(json!({"role": "user", "content": parts}));
        return messages;
    };
    let before = match last["content"].take() {
        Value::Array(before) => before,
        Value::Null => Vec::new(),
        text => vec![json!({"type": "text", "text": text})],
    };
    last["content"] = before.into_iter().chain(parts).collect();
    messages
}
