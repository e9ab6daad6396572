//! Observing: the client gets what the model says, untouched; the guard judges beside it and records what it would have
//! done.

use std::{sync::Arc, time::Instant};

use axum::{
    body::Body,
    http::{HeaderMap, header},
    response::Response,
};
use bytes::Bytes;
use ecso_openai::Bodies;
use futures::StreamExt;
use tracing::{Instrument, Span};

use crate::{
    access::Admission,
    audit::Case,
    chat::review,
    draft::Draft,
    failure::Failure,
    live::Live,
    request::Request,
    settings::Mode,
    upstream::{CHAT, Server, passed},
};

/// A request that is observed.
pub(crate) struct Observed {
    pub(crate) live: Arc<Live>,
    pub(crate) admission: Arc<Admission>,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    pub(crate) id: String,
    pub(crate) begun: Instant,
    /// The name of the client's key.
    pub(crate) key: String,
}

impl Observed {
    /// Forwards the request; when the answer is complete it is judged.
    pub(crate) async fn forward(self, server: &Server) -> Result<Response, Failure> {
        let sent =
            server.forward(axum::http::Method::POST, CHAT, &self.headers, self.body.clone().into(), Bodies::Unpacked);
        let response = passed(sent.await?);
        if !response.status().is_success() {
            return Ok(response);
        }
        let (head, body) = response.into_parts();
        let length = head.headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        let kind = head.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        let streamed = kind.starts_with("text/event-stream");
        let span = Span::current();
        let mut copy = Copy { seen: Vec::new(), length, ended: false, streamed, observed: Some(self), span };
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
    pub(crate) async fn judge(self, draft: Result<Draft, Failure>) {
        let judged = async {
            let draft = draft?;
            let _turn = self.admission.enter().await?;
            let mut request = Request::read(&self.body, &self.live.settings.limits, self.live.images)?;
            self.live.prepare(&mut request).await?;
            let guard = self.live.guard(&request, &self.headers, Mode::Observe)?;
            let report = review(&guard, &request, &draft);
            let report = tokio::time::timeout(self.live.settings.limits.deadline(), report).await;
            let report = report.unwrap_or_else(|_| Err(Failure::deadline(self.live.settings.limits.deadline)))?;
            let Self { id, key, body, begun, .. } = &self;
            let (begun, drafts) = (*begun, draft.said());
            let (request, report) = (&request, &report);
            self.live.record(&Case { id, key, mode: Mode::Observe, begun, body, request, report, drafts });
            Ok::<_, Failure>(())
        };
        if let Err(failure) = judged.await {
            failure.log(&self.id);
        }
    }
}

/// A copy of an answer while it goes to the client. When that is over, and the answer is whole, it is judged: the
/// client is gone by then, so this happens where the copy is dropped.
struct Copy {
    seen: Vec<u8>,
    length: Option<usize>,
    ended: bool,
    streamed: bool,
    observed: Option<Observed>,
    span: Span,
}

impl Copy {
    fn end(&mut self) {
        self.ended = true;
    }

    fn add(&mut self, piece: &[u8]) {
        let longest = self.observed.as_ref().map_or(0, |observed| observed.live.settings.limits.answer);
        if self.seen.len() + piece.len() <= longest {
            self.seen.extend_from_slice(piece);
        }
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let whole = self.ended || self.length == Some(self.seen.len());
        let Some(observed) = self.observed.take().filter(|_| whole) else { return };
        let (seen, streamed) = (std::mem::take(&mut self.seen), self.streamed);
        let judged = async move {
            let draft = if streamed {
                Draft::chunks(futures::stream::iter([Ok::<_, std::io::Error>(Bytes::from(seen))])).await
            } else {
                Draft::whole(&seen)
            };
            observed.judge(draft).await;
        };
        tokio::spawn(judged.instrument(self.span.clone()));
    }
}
