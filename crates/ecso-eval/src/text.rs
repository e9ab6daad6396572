//! Text of others: in several encodings, and no more of it in an error than fits there.

use std::{error::Error, fmt::Display};

use ecso::Cause;

/// Text from its bytes: UTF-8 or UTF-16, with a byte order mark or without.
///
/// # Errors
/// A [`Cause`] that says what to do; of a single byte that is neither, with its line.
pub fn decode(mut bytes: Vec<u8>) -> Result<String, Cause> {
    match *bytes.as_slice() {
        [0xFF, 0xFE, 0, 0, ..] | [0, 0, 0xFE, 0xFF, ..] => Err("it is UTF-32; save it as UTF-8".into()),
        [0xFF, 0xFE, ..] => utf16(&bytes[2..], u16::from_le_bytes),
        [0xFE, 0xFF, ..] => utf16(&bytes[2..], u16::from_be_bytes),
        [a, 0, b, 0, ..] if a != 0 && b != 0 => utf16(&bytes, u16::from_le_bytes),
        [0, a, 0, b, ..] if a != 0 && b != 0 => utf16(&bytes, u16::from_be_bytes),
        _ => {
            if bytes.starts_with("\u{feff}".as_bytes()) {
                bytes.drain(..3);
            }
            String::from_utf8(bytes).map_err(|error| {
                let valid = error.utf8_error().valid_up_to();
                let line = error.as_bytes().iter().take(valid).filter(|byte| **byte == b'\n').count() + 1;
                let reason = format!("line {line} is neither UTF-8 nor UTF-16; save the file as UTF-8");
                Cause::new(reason, error.utf8_error())
            })
        }
    }
}

fn utf16(bytes: &[u8], unit: fn([u8; 2]) -> u16) -> Result<String, Cause> {
    let broken = "it is UTF-16 that is broken; save it as UTF-8";
    let (pairs, rest) = bytes.as_chunks::<2>();
    if !rest.is_empty() {
        return Err(broken.into());
    }
    let units: Vec<u16> = pairs.iter().map(|pair| unit(*pair)).collect();
    String::from_utf16(&units).map_err(|error| Cause::new(broken, error))
}

/// At most the first 200 characters of what somebody else wrote.
pub(crate) fn cut(text: impl Display) -> String {
    let text = text.to_string();
    match text.char_indices().nth(200) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// An error that may quote what somebody else wrote, cut. Of one that had to be cut the source is left out: it says it all.
pub(crate) fn told(error: impl Error + Send + Sync + 'static) -> Cause {
    let whole = error.to_string();
    let shown = cut(&whole);
    if shown == whole { Cause::new(shown, error) } else { shown.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_wrote_is_cut() {
        assert_eq!(cut("\u{e4}".repeat(200)), "\u{e4}".repeat(200));
        assert_eq!(cut("\u{e4}".repeat(201)), format!("{}…", "\u{e4}".repeat(200)));
    }

    #[test]
    fn an_error_keeps_what_it_came_from_unless_that_says_too_much() {
        let told = |text: String| told(std::io::Error::other(text));
        assert!(told("short".into()).source().is_some());
        let long = told("x".repeat(5000));
        assert!(long.source().is_none() && ecso::chain(&long).chars().count() == 201);
    }

    #[test]
    fn what_is_no_text_says_what_to_do() {
        for bytes in [b"a\nb\xe4".as_slice(), b"\xff\xfea", b"\xff\xfe\x00\xd8", b"\xff\xfe\0\0a\0\0\0"] {
            assert!(decode(bytes.to_vec()).unwrap_err().message().contains("save"), "{bytes:?}");
        }
    }
}
