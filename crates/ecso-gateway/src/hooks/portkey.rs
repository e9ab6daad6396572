//! Portkey's webhook (`default.webhook`): one call before the model is asked, and one with request
//! and answer.

use std::sync::Arc;

use axum::{extract::State, response::Response};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::{
    Decision, HookFinding, ProvidedAnswer, asks_for_stream, chat_of, decide, handle_call,
    has_prose_in_names, judge_answer, require_object, says_more, stream_refused,
    with_fetched_images,
};
use crate::{
    context::RequestContext,
    error::{ApiError, ApiErrors},
    json::{has_no_prose, is_field_name, printable},
    request,
    server::Gateway,
    wire::Format,
};

/// A call from Portkey. Its `text` fields repeat what is in `json`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PortkeyCall {
    event_type: PortkeyEvent,
    #[serde(default)]
    request_type: PortkeyKind,
    request: PortkeySide,
    #[serde(default)]
    response: PortkeySide,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
enum PortkeyEvent {
    BeforeRequestHook,
    AfterRequestHook,
}

/// The kind of request.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
enum PortkeyKind {
    #[default]
    ChatComplete,
    /// Anthropic's Messages.
    Messages,
    /// Legacy completions, with one text.
    Complete,
    /// Embeddings, which answer no question.
    Embed,
}

/// A request, or an answer.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PortkeySide {
    /// The body. Null if Portkey has not read it because it is a stream.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    json: Value,
    /// Whether a stream is requested.
    #[serde(default)]
    is_streaming_request: bool,
}

/// What Portkey is to do.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PortkeyVerdict {
    /// Whether it may continue.
    verdict: bool,
    data: HookFinding,
    #[serde(skip_serializing_if = "Option::is_none")]
    transformed_data: Option<PortkeyTransformed>,
}

/// What replaces the request or the answer.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct PortkeyTransformed {
    #[serde(skip_serializing_if = "Option::is_none")]
    request: Option<PortkeyBody>,
    #[serde(skip_serializing_if = "Option::is_none")]
    response: Option<PortkeyBody>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct PortkeyBody {
    #[schema(value_type = Object)]
    json: Value,
}

impl PortkeyVerdict {
    fn of(verdict: bool, data: HookFinding) -> Self {
        Self { verdict, data, transformed_data: None }
    }

    /// It may continue with this request.
    fn with_request(json: Value) -> Self {
        let request = Some(PortkeyBody { json });
        let transformed_data = Some(PortkeyTransformed { request, response: None });
        Self { transformed_data, ..Self::of(true, HookFinding::default()) }
    }

    /// It may continue with this answer.
    fn with_response(json: Value, data: HookFinding) -> Self {
        let response = Some(PortkeyBody { json });
        let transformed_data = Some(PortkeyTransformed { request: None, response });
        Self { transformed_data, ..Self::of(true, data) }
    }
}

/// Judges an answer that Portkey's gateway received, or reads the request before it is sent. Errors
/// are verdicts too.
#[utoipa::path(post, path = "/hooks/portkey", request_body = PortkeyCall, responses(
    (status = 200, body = PortkeyVerdict), ApiErrors
))]
pub(crate) async fn portkey(
    State(gateway): State<Arc<Gateway>>,
    request: axum::extract::Request,
) -> Response {
    // Portkey lets the request pass on any status but 2xx.
    let failed = |error| Ok(PortkeyVerdict::of(false, HookFinding::failed(error)));
    let work = async |context, call: PortkeyCall| match call.event_type {
        PortkeyEvent::BeforeRequestHook => before(context, call).await,
        PortkeyEvent::AfterRequestHook => Box::pin(after(&gateway, context, call)).await,
    };
    handle_call(&gateway, "portkey", request, failed, work).await
}

/// Reads a request before the model is asked.
async fn before(
    mut context: RequestContext,
    call: PortkeyCall,
) -> Result<PortkeyVerdict, ApiError> {
    let PortkeyCall {
        request_type, request: PortkeySide { mut json, is_streaming_request }, ..
    } = call;
    require_object(&json)?;
    let asked = request_type.chat(&json);
    let is_streamed = is_streaming_request || asks_for_stream(&json);
    let read = match asked {
        None => return Ok(PortkeyVerdict::of(true, HookFinding::default())),
        Some(asked) => match decide(&mut context, request::model(&json), asked).await? {
            Decision::Guard(read) => read,
            Decision::Pass | Decision::Observe => {
                return Ok(PortkeyVerdict::of(true, HookFinding::default()));
            }
        },
    };
    if is_streamed {
        return Err(stream_refused());
    }
    // Other formats are refused afterwards if they name an image by URL.
    let messages =
        json["messages"].as_array().filter(|_| request_type == PortkeyKind::ChatComplete);
    match messages.and_then(|messages| with_fetched_images(messages, &read)) {
        Some(messages) => {
            json["messages"] = messages.into();
            Ok(PortkeyVerdict::with_request(json))
        }
        None => Ok(PortkeyVerdict::of(true, HookFinding::default())),
    }
}

/// Judges an answer.
async fn after(
    gateway: &Gateway,
    mut context: RequestContext,
    call: PortkeyCall,
) -> Result<PortkeyVerdict, ApiError> {
    let PortkeyCall {
        request_type, request: PortkeySide { json: mut request, .. }, response, ..
    } = call;
    require_object(&request)?;
    let answer = response.json;
    if !answer.is_object() {
        let Some(asked) = request_type.chat(&request) else {
            return Ok(PortkeyVerdict::of(true, HookFinding::default()));
        };
        return match decide(&mut context, request::model(&request), asked).await? {
            Decision::Guard(_) => Err(stream_refused()),
            Decision::Pass | Decision::Observe => {
                Ok(PortkeyVerdict::of(true, HookFinding::default()))
            }
        };
    }
    // The whole answer is here.
    request["stream"] = false.into();
    let own: Bytes = answer.to_string().into();
    let judged = match request_type {
        PortkeyKind::Messages => {
            let chat = Format::Messages.to_chat(&answer)?.to_string().into();
            judge_answer(
                gateway,
                context,
                Some(Format::Messages),
                &request,
                ProvidedAnswer { door: "portkey", chat, own },
            )
            .await?
        }
        PortkeyKind::Complete => {
            let chat = chat_answer(&answer).to_string().into();
            judge_answer(
                gateway,
                context,
                None,
                &chat_of_prompt(&request)?,
                ProvidedAnswer { door: "portkey", chat, own },
            )
            .await?
        }
        PortkeyKind::ChatComplete => {
            judge_answer(
                gateway,
                context,
                None,
                &request,
                ProvidedAnswer { door: "portkey", chat: Bytes::clone(&own), own },
            )
            .await?
        }
        PortkeyKind::Embed => return Ok(PortkeyVerdict::of(true, HookFinding::default())),
    };
    let says_more = || match request_type {
        PortkeyKind::ChatComplete => says_more(&answer, &judged.answer),
        PortkeyKind::Messages => has_prose_in_names(&answer),
        PortkeyKind::Complete | PortkeyKind::Embed => false,
    };
    Ok(match request_type {
        // There is no format for another answer.
        PortkeyKind::Complete => PortkeyVerdict::of(!judged.is_unsafe(), judged.finding),
        _ if judged.is_unsafe() || (judged.is_safe() && says_more()) => {
            PortkeyVerdict::with_response(judged.answer, judged.finding)
        }
        _ => PortkeyVerdict::of(true, judged.finding),
    })
}

impl PortkeyKind {
    /// The chat that a request asks for; `None` if it has no answer.
    fn chat(self, request: &Value) -> Option<Result<Value, ApiError>> {
        match self {
            Self::ChatComplete => Some(Ok(request.clone())),
            Self::Messages => Some(chat_of(Some(Format::Messages), request.clone())),
            Self::Complete => Some(chat_of_prompt(request)),
            Self::Embed => None,
        }
    }
}

/// Fields of legacy completions. In other fields, some servers accept images.
const PROMPT_FIELDS: [&str; 18] = [
    "model",
    "prompt",
    "suffix",
    "max_tokens",
    "temperature",
    "top_p",
    "n",
    "stream",
    "stream_options",
    "logprobs",
    "echo",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "best_of",
    "logit_bias",
    "user",
    "seed",
];

/// The chat for a request of legacy completions.
fn chat_of_prompt(request: &Value) -> Result<Value, ApiError> {
    let is_plain = |prompt: &Value| prompt.is_string() || prompt.is_number() || prompt.is_null();
    let is_list = |prompt: &Value| prompt.as_array().is_some_and(|list| list.iter().all(is_plain));
    let prompt = &request["prompt"];
    let is_text = is_plain(prompt)
        || is_list(prompt)
        || prompt.as_array().is_some_and(|list| list.iter().all(is_list));
    if !is_text {
        let message = "`prompt` must be a text, or a list of texts or tokens";
        return Err(ApiError::bad_request("unsupported_content", message));
    }
    if let Some(unknown) = request
        .as_object()
        .into_iter()
        .flat_map(Map::keys)
        .find(|name| !PROMPT_FIELDS.contains(&name.as_str()))
    {
        let message = format!(
            "`{}` is not known to the guard, so it can't be judged: leave it out",
            printable(unknown)
        );
        return Err(ApiError::bad_request("unknown_field", message));
    }
    let prompt =
        request["prompt"].as_str().map_or_else(|| request["prompt"].to_string(), str::to_owned);
    let suffix = request["suffix"].as_str().unwrap_or_default();
    Ok(
        json!({"model": request["model"], "messages": [{"role": "user", "content": prompt + suffix}]}),
    )
}

/// An answer of legacy completions, as the answer to a chat.
fn chat_answer(answer: &Value) -> Value {
    let mut answer_fields = answer.as_object().cloned().unwrap_or_default();
    answer_fields
        .retain(|name, value| name != "choices" && !(is_field_name(name) && has_no_prose(value)));
    let choices = answer["choices"].as_array().into_iter().flatten().enumerate();
    let choices = choices.map(|(index, choice)| {
        let mut extra_fields = choice.clone();
        if let Value::Object(fields) = &mut extra_fields {
            fields.extend(answer_fields.clone());
            fields.retain(|name, value| {
                !(value.is_null() || ["text", "index", "finish_reason"].contains(&name.as_str()))
            });
        }
        let mut message = json!({"content": choice["text"]});
        if !extra_fields.as_object().is_some_and(serde_json::Map::is_empty) {
            let call = json!({"name": "choice", "arguments": extra_fields.to_string()});
            message["tool_calls"] = json!([{"type": "function", "function": call}]);
        }
        json!({"index": index, "message": message, "finish_reason": "stop"})
    });
    json!({"choices": choices.collect::<Vec<_>>()})
}
