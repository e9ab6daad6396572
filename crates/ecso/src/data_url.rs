//! Images inside text: data URLs (RFC 2397) and plain base64, read as leniently as clients write
//! them. Everything that takes images as text uses this module.

use std::borrow::Cow;

use base64::{
    Engine,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};

use crate::{image::ImageError, mllm::Cause};

/// Padding is optional, and bits after the last byte are ignored.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// Whether a text begins as a data URL does. The rest may be invalid.
///
/// ```
/// assert!(ecso::is_data_url("data:image/png;base64,iVBORw0KGgo="));
/// assert!(!ecso::is_data_url("https://example.org/bread.png"));
/// ```
#[must_use]
pub fn is_data_url(text: &str) -> bool {
    text.trim_start().get(..5).is_some_and(|scheme| scheme.eq_ignore_ascii_case("data:"))
}

/// The bytes of a data URL in base64, `limit` at most. Media type and parameters are ignored: the
/// bytes themselves tell the format of an image.
///
/// ```
/// let bytes = ecso::decode_data_url("data:text/plain;base64,YnJlYWQ=", 100)?;
/// assert_eq!(bytes, b"bread");
/// # Ok::<(), ecso::ImageError>(())
/// ```
///
/// # Errors
/// [`ImageError::DataUrl`] says what is wrong. [`ImageError::TooManyBytes`] is returned before
/// anything is decoded.
pub fn decode_data_url(url: &str, limit: usize) -> Result<Vec<u8>, ImageError> {
    let invalid = |why: &str| ImageError::DataUrl(why.into());
    let rest = url
        .trim()
        .get(5..)
        .filter(|_| is_data_url(url))
        .ok_or_else(|| invalid("it does not begin with data:"))?;
    let (head, data) =
        rest.split_once(',').ok_or_else(|| invalid("there is no comma before the data"))?;
    let is_base64 =
        head.rsplit(';').next().is_some_and(|last| last.trim().eq_ignore_ascii_case("base64"));
    if !is_base64 {
        return Err(invalid("it must be in base64, as in data:image/png;base64,iVBORw0…"));
    }
    decode_base64(data, limit)
}

/// The bytes of a text in base64, `limit` at most. Both alphabets are read (RFC 4648, sections 4
/// and 5), with padding or without. The text may be percent-encoded, broken into lines, or have a
/// space for each `+`, as forms send it.
///
/// ```
/// assert_eq!(ecso::decode_base64("YnJl\nYWQ", 100)?, b"bread");
/// # Ok::<(), ecso::ImageError>(())
/// ```
///
/// # Errors
/// As [`decode_data_url`].
pub fn decode_base64(text: &str, limit: usize) -> Result<Vec<u8>, ImageError> {
    // Refused before it is decoded. White space and escapes may make the text a little longer.
    let actual = text.len() / 4 * 3;
    if actual > limit.saturating_add(limit / 16 + 3) {
        return Err(ImageError::TooManyBytes { actual, limit });
    }
    let text = text.trim();
    // Without an early exit the compiler can check many bytes at a time.
    let is_plain = text.bytes().fold(true, |plain, byte| {
        plain & (byte.is_ascii_alphanumeric() | matches!(byte, b'+' | b'/' | b'='))
    });
    let text = if is_plain { Cow::Borrowed(text) } else { Cow::Owned(normalized(text)) };
    BASE64.decode(text.as_ref()).map_err(|error| {
        ImageError::DataUrl(Cause::new(format!("its base64 is broken: {error}"), error))
    })
}

/// The text in the standard alphabet, without escapes and line breaks.
fn normalized(text: &str) -> String {
    let text: String = text.chars().filter(|c| !matches!(c, '\r' | '\n' | '\t')).collect();
    let text = text.replace("%2B", "+").replace("%2b", "+").replace("%2F", "/").replace("%2f", "/");
    let text = text
        .replace("%3D", "=")
        .replace("%3d", "=")
        .replace("%0A", "")
        .replace("%0D", "")
        .replace("%20", " ");
    text.trim()
        .chars()
        .map(|c| match c {
            ' ' | '-' => '+',
            '_' => '/',
            other => other,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_urls_are_read_in_all_common_forms() {
        let bytes = [0xfb, 0xef, 0xff, 0x00, 0x10];
        for url in [
            "data:image/png;base64,++//ABA=",
            "data:image/png;base64,++//ABA",
            "data:image/png;base64,--__ABA",
            "data:image/png;base64,%2B%2B%2F%2FABA%3D",
            "data:image/png;base64, ++//ABA=\n",
            " DATA:image/png;charset=utf-8;BASE64,++//\r\nABA=",
            "data:;base64,++//ABA=",
            "data:application/octet-stream;name=a.png;base64,++\n//AB\nA=",
        ] {
            let found = decode_data_url(url, 100).map_err(|error| error.to_string());
            assert_eq!(found.as_deref(), Ok(&bytes[..]), "{url}");
        }
        assert_eq!(decode_base64("A  /", 100).unwrap(), decode_base64("A++/", 100).unwrap());
    }

    #[test]
    fn errors_say_what_is_wrong() {
        for (url, says) in [
            ("iVBORw0KGgo", "does not begin with data:"),
            ("data:image/png;base64", "no comma"),
            ("data:image/png,abc", "must be in base64"),
            ("data:image/png;base64,@@@", "base64 is broken"),
        ] {
            let error = decode_data_url(url, 100).unwrap_err().to_string();
            assert!(error.contains(says), "{url}: {error}");
        }
        let long = format!("data:;base64,{}", "A".repeat(1000));
        assert!(matches!(
            decode_data_url(&long, 100),
            Err(ImageError::TooManyBytes { limit: 100, .. })
        ));
    }

    proptest::proptest! {
        #[test]
        fn encoded_bytes_are_decoded(bytes: Vec<u8>, every in 1..80_usize) {
            let encoded = base64::prelude::BASE64_STANDARD.encode(&bytes);
            let lines: Vec<&str> = encoded.as_bytes().chunks(every).map(|line| std::str::from_utf8(line).unwrap()).collect();
            proptest::prop_assert_eq!(&decode_base64(&lines.join("\r\n"), 10_000).unwrap(), &bytes);
            let url_safe = base64::prelude::BASE64_URL_SAFE_NO_PAD.encode(&bytes);
            proptest::prop_assert_eq!(&decode_base64(&url_safe, 10_000).unwrap(), &bytes);
        }

        #[test]
        fn no_text_panics(text: String) {
            let _ = decode_data_url(&text, 100);
            let _ = decode_data_url(&format!("data:;base64,{text}"), 100);
        }
    }
}
