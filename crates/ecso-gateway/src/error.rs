//! Everything that can go wrong, as the client sees it: OpenAI's error object, with types of our
//! own.

use std::{collections::BTreeMap, fmt::Display, time::Duration};

use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use ecso::{GuardError, ModelError};
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::{
    ToSchema,
    openapi::{self, RefOr},
};

use crate::wire::Format;

/// A request that gets no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    /// A short name for programs; also the label in metrics.
    pub(crate) code: &'static str,
    /// In our own words: a message of the upstream may quote text that was not judged.
    pub(crate) message: String,
    /// The field of the request that the error is about.
    pub(crate) param: Option<String>,
    /// The cause, for the operator's log at level `debug`.
    pub(crate) reason: Option<String>,
    /// Whether the answer may go out unjudged if the operator allows that: only if the guard itself
    /// failed. A failure that a request can cause (a judge that refuses it, says neither yes nor no,
    /// or runs out of time) does not count.
    pub(crate) may_open: bool,
    pub(crate) retry_after: Option<Duration>,
    /// Headers of the upstream's answer that also hold for this one.
    pub(crate) head: Box<HeaderMap>,
    /// The format of the error, if not that of chat completions.
    pub(crate) format: Option<Format>,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
            param: None,
            reason: None,
            may_open: false,
            retry_after: None,
            head: Box::default(),
            format: None,
        }
    }

    /// Adds the cause, for the operator only.
    pub(crate) fn because(self, reason: impl Into<String>) -> Self {
        Self { reason: Some(reason.into()), ..self }
    }

    /// Adds the headers of the upstream's answer.
    pub(crate) fn with_head(self, head: &HeaderMap) -> Self {
        Self { head: Box::new(head.clone()), ..self }
    }

    /// The client's request can't be read, or can't be guarded.
    pub(crate) fn bad_request(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }

    /// The body can't be read, for this reason.
    pub(crate) fn unreadable_body(why: impl Display) -> Self {
        Self::bad_request("invalid_request", format!("the body can't be read: {why}"))
    }

    /// The queue is full.
    pub(crate) fn busy() -> Self {
        let retry_after = Some(Duration::from_secs(1));
        Self {
            retry_after,
            ..Self::new(
                StatusCode::TOO_MANY_REQUESTS,
                "guard_busy",
                "too many requests are waiting: try again in a moment",
            )
        }
    }

    /// There is no memory left for another body.
    pub(crate) fn full() -> Self {
        let full = Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "guard_full",
            "the server has no memory left for another request: try again in a moment",
        );
        Self { retry_after: Some(Duration::from_secs(1)), ..full }
    }

    pub(crate) fn deadline(seconds: u64) -> Self {
        let message = format!("the guard did not finish within {seconds} s");
        // A client that asks for a long answer leaves no time to judge it. That is not a reason to
        // release it.
        Self::new(StatusCode::GATEWAY_TIMEOUT, "guard_deadline", message)
    }

    /// A failed call of the model. If the model refused the request, that is the client's mistake.
    pub(crate) fn asking(code: &'static str, error: ModelError) -> Self {
        match error {
            ModelError::Rejected(reason) => {
                Self::bad_request(code, "the model refuses the request").because(reason.message())
            }
            other => other.into(),
        }
    }

    /// The upstream can't be reached, or its answer can't be read.
    pub(crate) fn upstream(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_GATEWAY, "upstream_failed", message)
    }

    /// Logs the error.
    pub(crate) fn log(&self, id: &str) {
        // As a field value it is escaped: it may contain a stranger's words.
        tracing::warn!(
            id,
            code = self.code,
            status = self.status.as_u16(),
            error = self.message,
            "failed"
        );
        if let Some(reason) = &self.reason {
            tracing::debug!(id, reason, "cause of the failure");
        }
    }

    /// Whether the guard failed, and not the client.
    pub(crate) fn is_ours(&self) -> bool {
        self.status.is_server_error()
    }

    pub(crate) fn object(&self) -> Value {
        let kind = if self.is_ours() { "ecso_guard_error" } else { "invalid_request_error" };
        let param = self.param.as_deref();
        json!(ErrorBody {
            error: ErrorObject { message: &self.message, kind, param, code: self.code }
        })
    }

    /// The error as the last event of a stream.
    pub(crate) fn event(&self) -> String {
        format!("event: error\ndata: {}\n\n", self.object())
    }
}

/// An error in OpenAI's format.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ErrorBody<'a> {
    error: ErrorObject<'a>,
}

#[derive(Debug, Serialize, ToSchema)]
struct ErrorObject<'a> {
    message: &'a str,
    /// `invalid_request_error`: the request is wrong. `ecso_guard_error`: the guard failed, or the
    /// server behind it.
    #[serde(rename = "type")]
    kind: &'a str,
    param: Option<&'a str>,
    /// A short name of the error.
    code: &'a str,
}

/// The error statuses, for the API's description.
pub(crate) struct ApiErrors;

impl utoipa::IntoResponses for ApiErrors {
    fn responses() -> BTreeMap<String, RefOr<openapi::Response>> {
        const ALL: [(u16, &str); 10] = [
            (400, "The request can't be read, or can't be guarded"),
            (401, "A client key is missing or unknown"),
            (404, "Not found"),
            (408, "The body did not arrive in time"),
            (413, "The body is too long"),
            (415, "The body is compressed"),
            (
                429,
                "Too many requests are waiting, or this key is over its rate limit; `Retry-After` \
                 says when to try again",
            ),
            (502, "The server behind the guard failed"),
            (503, "The server behind the guard is overloaded"),
            (504, "The guard's deadline has passed"),
        ];
        let responses = ALL.map(|(status, why)| {
            let body = openapi::Content::new(Some(openapi::Ref::from_schema_name("ErrorBody")));
            let response = openapi::ResponseBuilder::new()
                .description(why)
                .content("application/json", body)
                .build();
            (status.to_string(), response.into())
        });
        responses.into()
    }
}

impl From<ModelError> for ApiError {
    fn from(error: ModelError) -> Self {
        let failed = |what: &str| {
            let message = format!("{what}; the guard's log has the cause at level debug");
            Self::new(StatusCode::BAD_GATEWAY, "guard_failed", message).because(error.to_string())
        };
        match &error {
            ModelError::Overloaded { retry_after } => {
                let busy = Self::new(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "guard_overloaded",
                    error.to_string(),
                );
                Self { retry_after: *retry_after, may_open: true, ..busy }
            }
            // As for the deadline: a long answer takes long to judge. A server that can't even be
            // connected to in time looks the same.
            ModelError::Timeout(_) => {
                Self::new(StatusCode::GATEWAY_TIMEOUT, "guard_timeout", error.to_string())
            }
            ModelError::Rejected(_) => failed("the model rejected a request of the guard"),
            ModelError::Filtered(_) => failed("a content filter refused a request of the guard"),
            ModelError::Protocol(_) => failed("the model's reply can't be read"),
            _ => Self { may_open: true, ..failed("the model can't be reached, or it failed") },
        }
    }
}

impl From<GuardError> for ApiError {
    fn from(error: GuardError) -> Self {
        match error {
            GuardError::Model { step, source } => {
                let failure = Self::from(source);
                Self { message: format!("step `{step}` failed: {}", failure.message), ..failure }
            }
            GuardError::NoQuery => Self::bad_request("nothing_to_guard", error.to_string()),
            _ => Self::new(StatusCode::BAD_GATEWAY, "guard_no_verdict", error.to_string()),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(
            self.format.map_or_else(|| self.object(), |format| format.failure(&self)).to_string(),
        ));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.extend(*self.head);
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(wait) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(wait.as_secs().max(1)));
        }
        response
    }
}
