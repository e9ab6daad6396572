//! Bodies that arrive as messages of a gateway.

use std::io;

use bytes::Bytes;
use futures::Stream;
use tokio::sync::{mpsc, watch};

use super::messages::{HttpBody, HttpTrailers};

/// How a body ended.
#[derive(Debug, Clone)]
pub(super) enum BodyEnd {
    /// With its last chunk.
    Whole,
    /// With trailers of these names.
    Trailers(Vec<String>),
}

impl BodyEnd {
    pub(super) fn with(trailers: HttpTrailers) -> Self {
        Self::Trailers(
            trailers
                .trailers
                .unwrap_or_default()
                .headers
                .into_iter()
                .map(|trailer| trailer.key)
                .collect(),
        )
    }
}

/// What has arrived of a body. The gateway accepts no chunk of our version of a body before the
/// first chunk of the original.
#[derive(Debug, Clone, Default)]
struct BodyState {
    has_begun: bool,
    end: Option<BodyEnd>,
}

/// Follows the progress of a body.
#[derive(Clone)]
pub(super) struct BodyProgress(watch::Receiver<BodyState>);

impl BodyProgress {
    /// Waits until a chunk or the end arrives, and returns whether it was a chunk. Never returns if
    /// the body breaks off before: the gateway knows that.
    pub(super) async fn has_begun(&mut self) -> bool {
        let has_begun = self
            .0
            .wait_for(|state| state.has_begun || state.end.is_some())
            .await
            .map(|state| state.has_begun);
        match has_begun {
            Ok(has_begun) => has_begun,
            Err(_) => std::future::pending().await,
        }
    }

    /// Waits for the end of the body.
    pub(super) async fn wait_for_end(mut self) -> BodyEnd {
        let end = self
            .0
            .wait_for(|state| state.end.is_some())
            .await
            .ok()
            .and_then(|state| state.end.clone());
        match end {
            Some(end) => end,
            None => std::future::pending().await,
        }
    }

    pub(super) fn end(&self) -> Option<BodyEnd> {
        self.0.borrow().end.clone()
    }
}

/// The sending side of a body.
pub(super) struct BodySender {
    pub(super) chunks: Option<mpsc::Sender<Bytes>>,
    state: watch::Sender<BodyState>,
}

/// The receiving side of a body.
pub(super) struct BodyReceiver {
    chunks: mpsc::Receiver<Bytes>,
    pub(super) progress: BodyProgress,
}

pub(super) fn body_channel() -> (BodySender, BodyReceiver) {
    let (sender, chunks) = mpsc::channel(QUEUED_CHUNKS);
    let (state, seen) = watch::channel(BodyState::default());
    (
        BodySender { chunks: Some(sender), state },
        BodyReceiver { chunks, progress: BodyProgress(seen) },
    )
}

impl BodySender {
    pub(super) async fn chunk(&mut self, chunk: HttpBody) {
        self.state.send_modify(|state| state.has_begun = true);
        if let Some(chunks) = self.chunks.as_ref().filter(|_| !chunk.body.is_empty()) {
            // The receiver may be gone if it needs no more.
            let _ = chunks.send(chunk.body).await;
        }
        if chunk.end_of_stream || chunk.end_of_stream_without_message {
            self.end(BodyEnd::Whole);
        }
    }

    pub(super) fn end(&mut self, end: BodyEnd) {
        self.state.send_modify(|state| _ = state.end.get_or_insert(end));
        self.chunks = None;
    }
}

impl BodyReceiver {
    /// The chunks of the body. A body that breaks off ends with an error.
    pub(super) fn chunks(self) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
        let Self { mut chunks, progress } = self;
        async_stream::stream! {
            while let Some(chunk) = chunks.recv().await {
                yield Ok(chunk);
            }
            if progress.end().is_none() {
                yield Err(io::Error::other("the gateway broke off"));
            }
        }
    }
}

/// Chunks of a body that are queued.
const QUEUED_CHUNKS: usize = 4;
