//! The images of a chat request.

use base64::{Engine, prelude::BASE64_STANDARD};
use ecso::{Image, decode_data_url, is_data_url};
use serde_json::{Map, Value};

use crate::error::ApiError;

/// Merges the two places for the `detail` of an image. If they differ, servers disagree about which
/// one holds.
pub(super) fn merge_detail(part: &mut Map<String, Value>, path: &str) -> Result<(), ApiError> {
    let Some(outer) = part.get("detail").filter(|detail| !detail.is_null()).cloned() else {
        return Ok(());
    };
    let Some(Value::Object(image)) = part.get_mut("image_url") else { return Ok(()) };
    if image.get("detail").is_some_and(|inner| !inner.is_null() && *inner != outer) {
        return Err(ApiError::bad_request(
            "invalid_request",
            format!("`{path}` has two different `detail`s"),
        ));
    }
    image.insert("detail".to_owned(), outer);
    part.remove("detail");
    Ok(())
}

/// Refuses an image that is written out in a text. Some servers find images in Markdown or HTML, so
/// such a text is more than a text.
pub(super) fn reject_inline_image(text: &str, path: &str) -> Result<(), ApiError> {
    const LONGEST_HEAD: usize = 100;
    let bytes = text.as_bytes();
    let is_image = memchr::memchr_iter(b':', bytes).any(|colon| {
        let is_data = colon >= 4 && bytes[colon - 4..colon].eq_ignore_ascii_case(b"data");
        let head = &bytes[colon..bytes.len().min(colon + LONGEST_HEAD)];
        // Only a media type may stand between, and no words.
        let is_base64 = || {
            let end = head.windows(8).position(|part| part.eq_ignore_ascii_case(b";base64,"));
            let is_type = |byte: &u8| byte.is_ascii_alphanumeric() || b"/.+;=-".contains(byte);
            end.is_some_and(|end| head[1..end.max(1)].trim_ascii().iter().all(is_type))
        };
        let before = || bytes[..colon - 4].trim_ascii_end();
        let is_shown = || {
            let before = before()
                .strip_suffix(b"\"")
                .or_else(|| before().strip_suffix(b"'"))
                .unwrap_or_else(before);
            let start = before.len().saturating_sub(8);
            let before = bytes[start..before.len()].trim_ascii_end().to_ascii_lowercase();
            [b"](".as_slice(), b"src=", b"<img>"].iter().any(|mark| before.ends_with(mark))
        };
        is_data && is_base64() && is_shown()
    });
    if is_image {
        let message = format!(
            "`{path}` has an image in its text, which some servers would read: send the image as \
             a part of its own"
        );
        return Err(ApiError::bad_request("image_in_text", message));
    }
    Ok(())
}

/// The URL of an image part.
pub(super) fn url_of(part: &mut Value) -> Option<&mut String> {
    match part.get_mut("image_url")? {
        Value::String(url) => Some(url),
        image => match image.get_mut("url") {
            Some(Value::String(url)) => Some(url),
            _ => None,
        },
    }
}

/// The images at a URL: one image, or the pages of a document.
pub(super) fn images(
    url: &str,
    limits: ecso::Limits,
    allow_urls: bool,
) -> Result<Vec<Image>, ApiError> {
    let invalid = |message: String| ApiError::bad_request("invalid_image", message);
    if is_data_url(url) {
        let images =
            decode_data_url(url, limits.bytes).and_then(|bytes| Image::pages(bytes, limits));
        return images.map_err(|error| invalid(error.to_string()));
    }
    if is_remote(url) && allow_urls {
        return Ok(vec![Image::from_url(url.trim())]);
    }
    let message = "an image must be an http, https or data URL; send the bytes of a file, or plain \
                   base64, as data:image/png;base64,…";
    Err(invalid(message.into()))
}

/// The URL that the upstream gets for an image with this `original` URL. A data URL is written from
/// the bytes that were read here, because servers read unusual ones in different ways.
pub(super) fn canonical_url(image: &Image, original: &mut String) -> String {
    let Some((bytes, kind)) = image.encoded() else { return std::mem::take(original) };
    let head = format!("data:{kind};base64,");
    let is_plain = original.strip_prefix(&head).is_some_and(is_plain_base64);
    if is_plain && !image.is_converted() {
        std::mem::take(original)
    } else {
        head + &BASE64_STANDARD.encode(bytes)
    }
}

/// Bytes of an image that was converted here. 0 for other images.
pub(crate) fn converted_bytes(image: &Image) -> usize {
    image.encoded().filter(|_| image.is_converted()).map_or(0, |(bytes, _)| bytes.len())
}

/// Whether a text is an http or https URL.
pub(crate) fn is_remote(url: &str) -> bool {
    let start: String = url.trim_start().chars().take(8).collect::<String>().to_ascii_lowercase();
    start.starts_with("http://") || start.starts_with("https://")
}

fn is_plain_base64(data: &str) -> bool {
    let body = data.trim_end_matches('=');
    data.len().is_multiple_of(4)
        && data.len() - body.len() <= 2
        // Without an early exit, the compiler checks 64 bytes at a time.
        && body.bytes().fold(true, |plain, byte| {
            plain & (byte.is_ascii_alphanumeric() | matches!(byte, b'+' | b'/'))
        })
}
