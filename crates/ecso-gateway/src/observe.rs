//! Observing: the client gets what the model says, untouched; the guard judges beside it and
//! records what it would have done.

use std::sync::Arc;

use axum::{body::Body, http::header, response::Response};
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
    request::Body as Read,
    upstream::{Key, Way, passed},
    wire::Format,
};

/// A request that is observed.
pub(crate) struct Observed {
    pub(crate) context: RequestContext,
    pub(crate) admission: Arc<Admission>,
    /// What can be read of the request; what can't is recorded too.
    pub(crate) read: Result<Read, ApiError>,
    /// The format of request and answer, where that is not chat completions'.
    pub(crate) format: Option<Format>,
}

impl Observed {
    /// Forwards the request; when the answer is complete it is judged.
    pub(crate) async fn forward(
        self,
        way: &Way,
        path: &str,
        body: Bytes,
    ) -> Result<Response, ApiError> {
        let headers = &self.context.headers;
        let sent = way.forward(
            Key::Own,
            axum::http::Method::POST,
            path,
            headers,
            body.into(),
            Bodies::Unpacked,
        );
        let silence = self.context.state.settings.limits.deadline();
        let response = passed(self.context.in_time(sent).await?, silence);
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
        let streamed = kind.starts_with("text/event-stream");
        let span = Span::current();
        let mut copy = Copy {
            seen: Vec::new(),
            length,
            ended: false,
            is_cut: false,
            streamed,
            observed: Some(self),
            span,
        };
        let mut pieces = body.into_data_stream();
        let copied = async_stream::stream! {
            while let Some(piece) = pieces.next().await {
                if let Ok(piece) = &piece {
                    copy.add(piece);
                }
                yield piece;
            }
            copy.end();
        };
        Ok(Response::from_parts(head, Body::from_stream(copied)))
    }

    /// Judges an answer that the client has already.
    async fn judge(
        self,
        answer: impl Future<Output = Result<Completion, ApiError>> + Send + 'static,
    ) {
        let Self { mut context, admission, read, .. } = self;
        // What the client's own request went with is not for questions about its answer.
        context.guarded();
        context.unhurried();
        let judged = async {
            let _turn = admission.enter().await?;
            // It may be long.
            let heard =
                tokio::task::spawn_blocking(|| tokio::runtime::Handle::current().block_on(answer));
            let answer = heard
                .await
                .map_err(|_| ApiError::upstream("the upstream's answer can't be read"))??;
            let request = context.prepare(read?).await?;
            chat::observe(&context, &request, &answer).await
        };
        if let Err(error) = judged.await {
            error.log(&context.id);
            context.unjudged(&error);
        }
    }
}

/// A copy of an answer while it goes to the client. When that is over, and the answer is whole, it
/// is judged: the client is gone by then, so this happens where the copy is dropped.
struct Copy {
    seen: Vec<u8>,
    length: Option<usize>,
    ended: bool,
    /// It is longer than what is read.
    is_cut: bool,
    streamed: bool,
    observed: Option<Observed>,
    span: Span,
}

impl Copy {
    fn end(&mut self) {
        self.ended = true;
    }

    fn add(&mut self, piece: &[u8]) {
        let longest = self
            .observed
            .as_ref()
            .map_or(0, |observed| observed.context.state.settings.limits.answer);
        self.is_cut |= self.seen.len() + piece.len() > longest;
        if self.is_cut {
            // Of a part nothing could be said.
            self.seen = Vec::new();
        } else {
            self.seen.extend_from_slice(piece);
        }
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let whole = self.ended || self.length == Some(self.seen.len());
        let Some(observed) = self.observed.take() else { return };
        let (seen, streamed) = (std::mem::take(&mut self.seen), self.streamed);
        let (is_cut, format) = (self.is_cut, observed.format);
        let answer = async move {
            // Whoever leaves before the end has all of the answer where its last word was there.
            match format {
                _ if is_cut => {
                    let message = "the answer has more than `limits.answer` bytes";
                    Err(ApiError { code: "answer_too_long", ..ApiError::upstream(message) })
                }
                _ if !streamed && !whole => {
                    Err(ApiError::upstream("the client left before the answer was whole"))
                }
                Some(format) => format.heard(seen, streamed).await,
                None if streamed => {
                    Completion::chunks(futures::stream::iter([Ok::<_, std::io::Error>(
                        Bytes::from(seen),
                    )]))
                    .await
                }
                None => Completion::whole(&seen),
            }
        };
        tokio::spawn(observed.judge(answer).instrument(self.span.clone()));
    }
}
