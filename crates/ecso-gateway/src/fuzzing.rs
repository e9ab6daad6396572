//! Entry points for the fuzz targets in `fuzz/`.

use bytes::Bytes;
use futures::FutureExt;

use crate::{
    completion::Completion, guard::GuardRequest, json, request::Body, settings::Limits,
    wire::Format,
};

/// Reads a request body in every way in which the server does.
///
/// # Panics
/// If a lenient parser finds images in a body that the strict one calls out of scope, or if the
/// body that goes to the upstream differs from what was judged.
pub fn body(body: &[u8]) {
    let _ = GuardRequest::read(body).and_then(|question| question.chat());
    let Ok(value) = json::parse(body) else { return };
    for format in [Format::Messages, Format::Responses] {
        let _ = format
            .parse(value.clone(), &mut |_| Ok(Vec::new()))
            .and_then(|(chat, _)| Body::parse(chat, &[]));
    }
    let Ok(read) = Body::parse(value, &[]) else { return };
    if !read.has_images() {
        let lenient: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
        assert!(!names_an_image(&lenient["messages"]), "an image was overlooked");
    }
    let Ok(request) = read.request(&Limits::default(), ecso::Limits::default(), false) else {
        return;
    };
    let again = request
        .body()
        .ok()
        .and_then(|sent| json::parse(&sent).ok())
        .and_then(|value| Body::parse(value, &[]).ok());
    let again = again
        .and_then(|read| read.request(&Limits::default(), ecso::Limits::default(), false).ok());
    assert!(
        again.is_some_and(|again| again.chat == request.chat),
        "what is sent is not what was judged"
    );
}

/// Whether any server could take something in the messages for an image.
fn names_an_image(value: &serde_json::Value) -> bool {
    match value {
        serde_json::Value::Array(list) => list.iter().any(names_an_image),
        serde_json::Value::Object(fields) => ["content"].iter().any(|name| {
            fields.get(*name).and_then(serde_json::Value::as_array).into_iter().flatten().any(
                |part| {
                    part.get("type").is_some_and(|kind| {
                        kind.as_str().is_some_and(|kind| kind.contains("image"))
                    }) || part.get("image_url").is_some()
                        || part.get("image").is_some()
                },
            )
        }),
        _ => false,
    }
}

/// Reads an upstream's stream, whole and in small chunks.
///
/// # Panics
/// If the results differ.
pub fn stream(stream: &[u8]) {
    let read = |size: usize| {
        let chunks =
            stream.chunks(size).map(|chunk| Ok::<_, std::io::Error>(Bytes::copy_from_slice(chunk)));
        let chunks: Vec<_> = chunks.collect();
        // All chunks are there, so reading never waits.
        Completion::from_stream(futures::stream::iter(chunks)).now_or_never()
    };
    let (whole, cut) = (read(usize::MAX), read(3));
    match (whole, cut) {
        (Some(Ok(whole)), Some(Ok(cut))) => assert_eq!(whole.texts(), cut.texts()),
        (whole, cut) => assert_eq!(whole.map(|read| read.is_ok()), cut.map(|read| read.is_ok())),
    }
}
