//! Observing: the client gets the model's answer unchanged. The guard judges it afterwards, and
//! records what it would have done.

use std::sync::Arc;

use axum::{
    body::Body,
    http::{Method, header},
    response::Response,
};
use bytes::Bytes;
use ecso_openai::Bodies;
use futures::StreamExt;
use tracing::{Instrument, Span};

use crate::{
    access::Admission,
    chat,
    completion::Completion,
    context::RequestContext,
    error::ApiError,
    request::Body as ParsedBody,
    upstream::{Credentials, Outgoing, Transport, relay},
    wire::Format,
};

/// A request that is observed.
pub(crate) struct ObservedRequest {
    pub(crate) context: RequestContext,
    pub(crate) admission: Arc<Admission>,
    /// The request, as far as it can be read. Unreadable requests are recorded too.
    pub(crate) parsed: Result<ParsedBody, ApiError>,
    /// The format of request and answer, if not chat completions.
    pub(crate) format: Option<Format>,
}

impl ObservedRequest {
    /// Forwards the request. The answer is judged once it is complete.
    pub(crate) async fn forward(
        self,
        transport: &Transport,
        path: &str,
        body: Bytes,
    ) -> Result<Response, ApiError> {
        let sent = transport.forward(Outgoing {
            credentials: Credentials::Operator,
            method: Method::POST,
            path_and_query: path,
            headers: &self.context.headers,
            body: body.into(),
            bodies: Bodies::Unpacked,
        });
        let idle_timeout = self.context.state.settings.limits.deadline();
        let response = relay(self.context.in_time(sent).await?, idle_timeout);
        if !response.status().is_success() {
            return Ok(response);
        }
        let (head, body) = response.into_parts();
        let length = head
            .headers
            .get(header::CONTENT_LENGTH)
            .and_then(|value| value.to_str().ok()?.parse().ok());
        let kind = head
            .headers
            .get(header::CONTENT_TYPE)
            .and_then(|kind| kind.to_str().ok())
            .unwrap_or_default();
        let is_stream = kind.starts_with("text/event-stream");
        let span = Span::current();
        let mut copy = AnswerCopy {
            bytes: Vec::new(),
            length,
            is_ended: false,
            is_too_long: false,
            is_stream,
            observed: Some(self),
            span,
        };
        let mut chunks = body.into_data_stream();
        let copied = async_stream::stream! {
            while let Some(chunk) = chunks.next().await {
                if let Ok(chunk) = &chunk {
                    copy.push(chunk);
                }
                yield chunk;
            }
            copy.end();
        };
        Ok(Response::from_parts(head, Body::from_stream(copied)))
    }

    /// Judges an answer that the client already has.
    async fn judge(
        self,
        answer: impl Future<Output = Result<Completion, ApiError>> + Send + 'static,
    ) {
        let Self { mut context, admission, parsed, .. } = self;
        // The guard's questions don't carry all headers of the client's request.
        context.keep_known_headers();
        context.restart_deadline();
        let judged = async {
            let _turn = admission.enter().await?;
            // Parsing a long answer takes time.
            let answer =
                tokio::task::spawn_blocking(|| tokio::runtime::Handle::current().block_on(answer));
            let answer = answer
                .await
                .map_err(|_| ApiError::upstream("the upstream's answer can't be read"))??;
            let request = context.prepare(parsed?).await?;
            chat::observe(&context, &request, &answer).await
        };
        if let Err(error) = judged.await {
            error.log(&context.id);
            context.record_failure(&error);
        }
    }
}

/// A copy of an answer while it goes to the client. It is judged when the copy is dropped, because
/// the client may be gone by then.
struct AnswerCopy {
    bytes: Vec<u8>,
    length: Option<usize>,
    is_ended: bool,
    /// It is longer than what may be read.
    is_too_long: bool,
    is_stream: bool,
    observed: Option<ObservedRequest>,
    span: Span,
}

impl AnswerCopy {
    fn end(&mut self) {
        self.is_ended = true;
    }

    fn push(&mut self, chunk: &[u8]) {
        let longest = self
            .observed
            .as_ref()
            .map_or(0, |observed| observed.context.state.settings.limits.answer);
        self.is_too_long |= self.bytes.len() + chunk.len() > longest;
        if self.is_too_long {
            // A part of an answer can't be judged.
            self.bytes = Vec::new();
        } else {
            self.bytes.extend_from_slice(chunk);
        }
    }
}

impl Drop for AnswerCopy {
    fn drop(&mut self) {
        let whole = self.is_ended || self.length == Some(self.bytes.len());
        let Some(observed) = self.observed.take() else { return };
        let (bytes, is_stream) = (std::mem::take(&mut self.bytes), self.is_stream);
        let (is_too_long, format) = (self.is_too_long, observed.format);
        let answer = async move {
            // A client that leaves early has the whole answer if its last event had arrived.
            match format {
                _ if is_too_long => {
                    let message = "the answer has more than `limits.answer` bytes";
                    Err(ApiError { code: "answer_too_long", ..ApiError::upstream(message) })
                }
                _ if !is_stream && !whole => {
                    Err(ApiError::upstream("the client left before the answer was whole"))
                }
                Some(format) => format.parse_answer(bytes, is_stream).await,
                None if is_stream => {
                    Completion::from_stream(futures::stream::iter([Ok::<_, std::io::Error>(
                        Bytes::from(bytes),
                    )]))
                    .await
                }
                None => Completion::parse(&bytes),
            }
        };
        tokio::spawn(observed.judge(answer).instrument(self.span.clone()));
    }
}
