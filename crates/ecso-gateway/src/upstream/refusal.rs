//! Refusals of an upstream, as the client sees them.

use ecso_openai::lenient;
use futures::StreamExt;
use serde_json::Value;

use super::{answer_head, limited_body};
use crate::{error::ApiError, fields};

/// What the client may know of an upstream's refusal: its status, and a description in our own
/// words. The upstream's message may quote text that was not judged.
pub(super) async fn refusal(response: reqwest::Response) -> ApiError {
    const LONGEST: usize = 64 << 10;
    let (status, head) = (response.status(), answer_head(response.headers()));
    // Other statuses redirect, or have no body.
    if status.as_u16() < 400 {
        return ApiError::upstream(format!(
            "the upstream's answer has the status {}",
            status.as_u16()
        ))
        .with_head(&head);
    }
    let mut body = limited_body(response, LONGEST);
    let mut bytes = Vec::new();
    while let Some(Ok(chunk)) = body.next().await {
        bytes.extend_from_slice(&chunk);
    }
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let error: Value = lenient::parse(&text).unwrap_or_default();
    let error = if error["error"].is_object() { &error["error"] } else { &error };
    let codes = [&error["code"], &error["type"]].into_iter().filter_map(Value::as_str);
    let by_code = codes
        .flat_map(|code| KNOWN_REFUSALS.iter().filter(move |(known, _)| *known == code))
        .next();
    let lower = text.to_lowercase();
    let is_too_long =
        ["context length", "maximum context", "context size", "context window", "too many tokens"];
    let by_words =
        KNOWN_REFUSALS.first().filter(|_| is_too_long.iter().any(|words| lower.contains(words)));
    let (code, about) = by_code
        .or(by_words)
        .copied()
        .unwrap_or(("upstream_refused", "the guard's log has its message at level debug"));
    let param =
        error["param"].as_str().filter(|param| fields::is_request_field(param)).map(str::to_owned);
    let message = format!("the upstream refused the request ({}): {about}", status.as_u16());
    ApiError { param, ..ApiError::new(status, code, message).because(text).with_head(&head) }
}

/// Error codes that clients know, with our descriptions.
const KNOWN_REFUSALS: [(&str, &str); 14] = [
    ("context_length_exceeded", "it is longer than the model's maximum context length"),
    ("exceed_context_size_error", "it is longer than the model's maximum context length"),
    ("model_not_found", "it does not have this model"),
    ("invalid_api_key", "it does not know this key"),
    ("insufficient_quota", "the quota is used up"),
    ("rate_limit_exceeded", "too many requests, or too many tokens"),
    ("content_filter", "a content filter refuses it"),
    ("content_policy_violation", "a content filter refuses it"),
    ("unsupported_parameter", "a field is not supported by this model"),
    ("unsupported_value", "the value of a field is not supported by this model"),
    ("invalid_image", "an image can't be read"),
    ("invalid_image_format", "an image can't be read"),
    ("image_parse_error", "an image can't be read"),
    ("server_overloaded", "it is overloaded"),
];
