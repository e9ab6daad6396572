//! Streams of events that a task of their own writes, so that a client that reads slowly, or not at
//! all, holds its turn no longer than allowed.

use std::{convert::Infallible, time::Duration};

use axum::{
    body::Body,
    http::{HeaderName, HeaderValue, header},
    response::Response,
};
use bytes::Bytes;
use tokio::sync::{
    OwnedSemaphorePermit,
    mpsc::{self, error::SendError},
};
use tracing::{Instrument, Span};

/// Takes the events of a stream. It fails once the client has left.
pub(crate) type Sender = mpsc::Sender<Bytes>;

/// Events that wait for a slow client.
const WAITING: usize = 16;

/// A response with the events that `write` sends. `permit` is held until they are written, the client
/// leaves, or `longest` is over.
pub(crate) fn event_stream<W>(
    permit: OwnedSemaphorePermit,
    longest: Duration,
    write: impl FnOnce(Sender) -> W,
) -> Response
where
    W: Future<Output = Result<(), SendError<Bytes>>> + Send + 'static,
{
    let (sender, mut receiver) = mpsc::channel(WAITING);
    let client = sender.clone();
    let written = write(sender);
    let task = async move {
        let _permit = permit;
        tokio::select! {
            _ = tokio::time::timeout(longest, written) => {}
            () = client.closed() => {}
        }
    };
    tokio::spawn(task.instrument(Span::current()));
    let body = async_stream::stream! {
        while let Some(text) = receiver.recv().await {
            yield Ok::<Bytes, Infallible>(text);
        }
    };
    let mut response = Response::new(Body::from_stream(body));
    response.headers_mut().extend([
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        // Keeps proxies from buffering the stream.
        (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ]);
    response
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::Semaphore;

    use super::*;

    #[tokio::test]
    async fn a_client_that_does_not_read_holds_its_turn_no_longer_than_allowed() {
        let turns = Arc::new(Semaphore::new(1));
        let stream = async |longest| {
            let permit = Arc::clone(&turns).try_acquire_owned().unwrap();
            event_stream(permit, longest, |sender| async move {
                loop {
                    sender.send(Bytes::from_static(b":\n\n")).await?;
                }
            })
        };
        let unread = stream(Duration::from_millis(50)).await;
        assert_eq!(turns.available_permits(), 0);
        let freed = tokio::time::timeout(Duration::from_secs(5), turns.acquire()).await;
        drop(freed.unwrap().unwrap());
        drop(unread);
        // One that leaves frees it at once.
        drop(stream(Duration::from_mins(1)).await);
        assert!(tokio::time::timeout(Duration::from_secs(5), turns.acquire()).await.is_ok());
    }
}
