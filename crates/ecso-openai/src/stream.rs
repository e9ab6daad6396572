//! Bodies of replies: limited in size, and read as server-sent events if they are streams.

use std::error::Error;

use async_stream::try_stream;
use bytes::Bytes;
use ecso::{Cause, Delta, ModelError};
use futures::{Stream, StreamExt};
use sse_stream::SseByteStream;

use crate::reply::Progress;

/// Most bytes of a reply, decompressed. A server that sends more has failed.
const MAX_REPLY: usize = 16 << 20;

/// The deltas in a body of server-sent events, which may be split at any byte.
pub(crate) fn deltas(
    body: impl Stream<Item = Result<Bytes, ModelError>> + Send + 'static,
) -> impl Stream<Item = Result<Delta, ModelError>> + Send {
    try_stream! {
        let mut events = SseByteStream::new(limited(body).boxed());
        let mut progress = Progress::default();
        while let Some(event) = events.next().await {
            let Some(data) = event.map_err(unreadable)?.data else { continue };
            if data.trim() == "[DONE]" {
                break;
            }
            for delta in progress.read(&data)? {
                yield delta;
            }
        }
        for delta in progress.end()? {
            yield delta;
        }
    }
}

/// The complete body.
pub(crate) async fn read(
    body: impl Stream<Item = Result<Bytes, ModelError>> + Send,
) -> Result<Vec<u8>, ModelError> {
    let body = limited(body);
    futures::pin_mut!(body);
    let mut whole = Vec::new();
    while let Some(bytes) = body.next().await {
        whole.extend_from_slice(&bytes?);
    }
    Ok(whole)
}

fn limited(
    body: impl Stream<Item = Result<Bytes, ModelError>> + Send,
) -> impl Stream<Item = Result<Bytes, ModelError>> + Send {
    body.scan(0, |read, bytes| {
        *read += bytes.as_ref().map_or(0, Bytes::len);
        let is_too_long = *read > MAX_REPLY;
        let bytes = if is_too_long {
            Err(ModelError::Protocol("the reply is too long".into()))
        } else {
            bytes
        };
        std::future::ready(Some(bytes))
    })
}

/// The error of a body, or of its format.
fn unreadable(error: sse_stream::Error) -> ModelError {
    match error {
        sse_stream::Error::Body(error) => match error.downcast::<ModelError>() {
            Ok(error) => *error,
            Err(error) => {
                ModelError::Transport(ecso::error_chain(&*error as &(dyn Error + 'static)).into())
            }
        },
        other => ModelError::Protocol(Cause::from_error(other)),
    }
}

#[cfg(test)]
mod tests {
    use ecso::Reply;

    use super::*;

    const BODY: &str = concat!(
        ": keep-alive\r\n\r\n",
        "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\r\n\r\n",
        "data: {\"choices\":[{\"delta\":{\"content\":\"Äp\"},\"logprobs\":{\"content\":[{\"token\":\"Äp\",\"logprob\":-0.5,",
        "\"top_logprobs\":[{\"token\":\"Äp\",\"logprob\":-0.5}]}]}}]}\n\n",
        "data: {\"choices\":[{\"delta\":{\"content\":\"fel \\ud83c\"}}]}\n\n",
        "data: {\"choices\":[{\"delta\":{\"content\":\"\\udf4f\"},\"finish_reason\":\"length\"}]}\n\n",
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":3}}\n\n",
        "data: [DONE]\n\n",
    );

    fn reply(parts: Vec<&[u8]>) -> Result<Reply, ModelError> {
        let parts: Vec<_> =
            parts.into_iter().map(|part| Ok(Bytes::copy_from_slice(part))).collect();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(ecso::collect(deltas(futures::stream::iter(parts)).boxed()))
    }

    proptest::proptest! {
        #[test]
        fn a_stream_split_at_any_byte_reads_the_same(cuts in proptest::collection::btree_set(0..BODY.len(), 0..40)) {
            let mut parts = Vec::new();
            let mut start = 0;
            for cut in cuts {
                parts.push(&BODY.as_bytes()[start..cut]);
                start = cut;
            }
            parts.push(&BODY.as_bytes()[start..]);
            let split = reply(parts).unwrap();
            proptest::prop_assert_eq!(&split.text, "Äpfel 🍏");
            proptest::prop_assert_eq!(&split, &reply(vec![BODY.as_bytes()]).unwrap());
            proptest::prop_assert_eq!(split.first_token.len(), 1);
            proptest::prop_assert_eq!(split.usage.unwrap().prompt_tokens, 7);
        }

        #[test]
        fn no_stream_panics(bytes: Vec<u8>) {
            let _ = reply(vec![&b"data: "[..], &bytes[..], &b"\n\n"[..]]);
        }
    }

    #[test]
    fn a_stream_that_is_cut_off_is_an_error() {
        let half = BODY.split_once("data: {\"choices\":[{\"delta\":{\"content\":\"fel").unwrap().0;
        assert!(matches!(reply(vec![half.as_bytes()]), Err(ModelError::Protocol(_))));
        assert!(matches!(reply(vec![b"data: {\"error\":{\"message\":\"out of memory\"}}\n\n"]),
            Err(ModelError::Transport(cause)) if cause.message().contains("out of memory")));
    }

    #[test]
    fn errors_of_the_body_are_kept() {
        let lost = ModelError::Timeout(std::time::Duration::from_secs(1));
        let body = futures::stream::iter([Ok(Bytes::from_static(b"data: ")), Err(lost.clone())]);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        assert_eq!(runtime.block_on(ecso::collect(deltas(body).boxed())), Err(lost));
    }

    #[test]
    fn an_endless_reply_is_an_error() {
        let line =
            b"data: {\"choices\":[{\"delta\":{\"content\":\"again and again and again\"}}]}\n\n"
                .repeat(1000);
        let parts = vec![&line[..]; MAX_REPLY / line.len() + 1];
        assert!(
            matches!(reply(parts), Err(ModelError::Protocol(cause)) if cause.message().contains("too long"))
        );
    }
}
