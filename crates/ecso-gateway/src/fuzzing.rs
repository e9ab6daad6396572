//! What fuzz targets call (`fuzz/`).

use bytes::Bytes;
use futures::FutureExt;

use crate::{door::Question, draft::Draft, probe::Probe, request::Request, settings::Limits};

/// Reads a request body in every way in which the server does.
///
/// # Panics
/// When the quick look and the whole reading differ in whether there is an image: then an image could pass unguarded.
pub fn body(body: &[u8]) {
    let _ = Question::read(body).and_then(|question| question.chat());
    let (probe, request) = (Probe::read(body), Request::read(body, &Limits::default(), ecso::Limits::default()));
    if let (Ok(probe), Ok(request)) = (probe, request) {
        assert!(probe.has_images() || request.chat.image_count() == 0, "an image was overlooked");
    }
}

/// Reads an upstream's stream, whole and in small pieces.
///
/// # Panics
/// When the two differ.
pub fn stream(stream: &[u8]) {
    let read = |size: usize| {
        let pieces = stream.chunks(size).map(|piece| Ok::<_, std::io::Error>(Bytes::copy_from_slice(piece)));
        // Every piece is there, so the reading never waits.
        Draft::chunks(futures::stream::iter(pieces)).now_or_never()
    };
    let (whole, cut) = (read(usize::MAX), read(3));
    match (whole, cut) {
        (Some(Ok(whole)), Some(Ok(cut))) => assert_eq!(whole.said(), cut.said()),
        (whole, cut) => assert_eq!(whole.map(|read| read.is_ok()), cut.map(|read| read.is_ok())),
    }
}
