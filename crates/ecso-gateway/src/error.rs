//! Everything that can go wrong, as the client sees it: OpenAI's error object, with types of our
//! own.

use std::{collections::BTreeMap, time::Duration};

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
    /// A short name that programs can tell apart; also the label in metrics.
    pub(crate) code: &'static str,
    /// In words of our own: what a server says may quote what nobody has judged.
    pub(crate) message: String,
    /// The field of the request that it is about.
    pub(crate) param: Option<String>,
    /// What is behind it, for an operator who asks (level `debug`).
    pub(crate) reason: Option<String>,
    /// Whether the answer may go out unjudged where the operator wants that: the guard failed by
    /// itself. What a request can bring about (a judge that refuses it, or says neither yes nor no)
    /// is no such failure.
    pub(crate) may_open: bool,
    pub(crate) retry_after: Option<Duration>,
    /// Headers of the upstream's answer that hold for this one too.
    pub(crate) head: Box<HeaderMap>,
    /// The format in which the client is told, where that is not chat completions'.
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

    /// The same with what is behind it, for the operator alone.
    pub(crate) fn because(self, reason: impl Into<String>) -> Self {
        Self { reason: Some(reason.into()), ..self }
    }

    /// The same behind an answer of the upstream with this head.
    pub(crate) fn with_head(self, head: &HeaderMap) -> Self {
        Self { head: Box::new(head.clone()), ..self }
    }

    /// The client's request can't be read or not be guarded.
    pub(crate) fn bad_request(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }

    pub(crate) fn busy() -> Self {
        let retry_after = Some(Duration::from_secs(1));
        Self {
            retry_after,
            ..Self::new(
                StatusCode::TOO_MANY_REQUESTS,
                "guard_busy",
                "too many requests are waiting",
            )
        }
    }

    /// There is no room for another body.
    pub(crate) fn full() -> Self {
        let full = Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "guard_full",
            "too many bytes of requests are held",
        );
        Self { retry_after: Some(Duration::from_secs(1)), ..full }
    }

    pub(crate) fn deadline(seconds: u64) -> Self {
        let message = format!("the guard did not finish within {seconds} s");
        // Who asks for a long answer leaves no time to judge it: no reason to let it out.
        Self::new(StatusCode::GATEWAY_TIMEOUT, "guard_deadline", message)
    }

    /// A model that can't be asked so: the client's mistake, unless the model failed.
    pub(crate) fn asking(code: &'static str, error: ModelError) -> Self {
        match error {
            ModelError::Rejected(reason) => {
                Self::bad_request(code, "the model refuses the request").because(reason.message())
            }
            other => other.into(),
        }
    }

    /// The upstream can't be reached, or what it says can't be read.
    pub(crate) fn upstream(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_GATEWAY, "upstream_failed", message)
    }

    /// Tells the operator.
    pub(crate) fn log(&self, id: &str) {
        // As a value it is escaped: a stranger's words may be in it.
        tracing::warn!(
            id,
            code = self.code,
            status = self.status.as_u16(),
            error = self.message,
            "failed"
        );
        if let Some(reason) = &self.reason {
            tracing::debug!(id, reason, "why it failed");
        }
    }

    /// Whether it is the guard that failed, and not the client who asked for something wrong.
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

    /// The failure as the last event of a stream.
    pub(crate) fn event(&self) -> String {
        format!("event: error\ndata: {}\n\n", self.object())
    }
}

/// An error as OpenAI's clients know it.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ErrorBody<'a> {
    error: ErrorObject<'a>,
}

#[derive(Debug, Serialize, ToSchema)]
struct ErrorObject<'a> {
    message: &'a str,
    /// `invalid_request_error`: the request's; `ecso_guard_error`: the guard's, or that of what
    /// stands behind it.
    #[serde(rename = "type")]
    kind: &'a str,
    param: Option<&'a str>,
    /// A short name of the error.
    code: &'a str,
}

/// The statuses of failures, for the API's description.
pub(crate) struct ApiErrors;

impl utoipa::IntoResponses for ApiErrors {
    fn responses() -> BTreeMap<String, RefOr<openapi::Response>> {
        const ALL: [(u16, &str); 10] = [
            (400, "The request can't be read, or not be guarded"),
            (401, "A client key is needed, or this one is not known"),
            (404, "There is no such thing here"),
            (408, "The body did not come in time"),
            (413, "The body is too long"),
            (415, "The body is compressed"),
            (
                429,
                "Too many requests wait, or this key asks too often; `Retry-After` says when to come back",
            ),
            (502, "What stands behind the guard failed"),
            (503, "What stands behind the guard is overloaded"),
            (504, "The guard's deadline has passed"),
        ];
        let described = ALL.map(|(status, why)| {
            let body = openapi::Content::new(Some(openapi::Ref::from_schema_name("ErrorBody")));
            let response = openapi::ResponseBuilder::new()
                .description(why)
                .content("application/json", body)
                .build();
            (status.to_string(), response.into())
        });
        described.into()
    }
}

impl From<ModelError> for ApiError {
    fn from(error: ModelError) -> Self {
        let failed = |what: &str| {
            let message = format!("{what}; the guard's log says why at level debug");
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
            ModelError::Timeout(_) => {
                let late =
                    Self::new(StatusCode::GATEWAY_TIMEOUT, "guard_timeout", error.to_string());
                Self { may_open: true, ..late }
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
