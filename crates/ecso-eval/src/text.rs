//! Text that others wrote: decodes several encodings, and shortens what error messages quote.

use std::{borrow::Cow, error::Error, fmt::Display, path::Path};

use ecso::Cause;

/// Reads a text file in UTF-8 or UTF-16, with or without a byte order mark.
///
/// # Errors
/// A [`Cause`] that says what to do, with the line if a byte is invalid. It does not name the file.
pub fn read(path: &Path) -> Result<String, Cause> {
    decode(std::fs::read(path).map_err(Cause::from_error)?)
}

/// Decodes text as [`read`] does.
///
/// # Errors
/// As [`read`].
pub fn decode(mut bytes: Vec<u8>) -> Result<String, Cause> {
    if bytes.starts_with(&[0xFF, 0xFE, 0, 0]) || bytes.starts_with(&[0, 0, 0xFE, 0xFF]) {
        return Err("it is UTF-32; save it as UTF-8".into());
    }
    if let Some((mark, unit)) = utf16_form(&bytes) {
        return utf16(&bytes[mark..], unit);
    }
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

/// Whether a file that begins like this is UTF-16: it has a byte order mark, or every second byte
/// is zero.
#[must_use]
pub fn is_utf16(start: &[u8]) -> bool {
    utf16_form(start).is_some()
}

/// Reads a unit of two bytes.
type Unit = fn([u8; 2]) -> u16;

/// The length of the byte order mark of UTF-16, and how its units are read.
fn utf16_form(start: &[u8]) -> Option<(usize, Unit)> {
    match *start {
        [0xFF, 0xFE, ..] => Some((2, u16::from_le_bytes)),
        [0xFE, 0xFF, ..] => Some((2, u16::from_be_bytes)),
        [a, 0, b, 0, ..] if a != 0 && b != 0 => Some((0, u16::from_le_bytes)),
        [0, a, 0, b, ..] if a != 0 && b != 0 => Some((0, u16::from_be_bytes)),
        _ => None,
    }
}

fn utf16(bytes: &[u8], unit: Unit) -> Result<String, Cause> {
    let broken = "it is broken UTF-16; save it as UTF-8";
    let (pairs, rest) = bytes.as_chunks::<2>();
    if !rest.is_empty() {
        return Err(broken.into());
    }
    let units: Vec<u16> = pairs.iter().map(|pair| unit(*pair)).collect();
    String::from_utf16(&units).map_err(|error| Cause::new(broken, error))
}

/// At most the first 200 characters of text that others wrote.
#[must_use]
pub fn cut(text: impl Display) -> String {
    let text = text.to_string();
    match text.char_indices().nth(200) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Text that others wrote, for a place in Markdown: on one line, and without marks that make HTML,
/// links or cells of a table. Backquotes stay.
pub(crate) fn in_markdown(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '\\' | '|' | '[' | ']' | '*' => out.extend(['\\', character]),
            '\u{2028}' | '\u{2029}' => out.push(' '),
            _ if character.is_control() => out.push(' '),
            _ => out.push(character),
        }
    }
    out
}

/// Text that others wrote, for a cell of CSV, so that spreadsheets don't take it for a formula.
pub(crate) fn in_csv(text: &str) -> Cow<'_, str> {
    if text.starts_with(['=', '+', '-', '@', '\t', '\r', '\n']) {
        format!("'{text}").into()
    } else {
        text.into()
    }
}

/// An error that may quote text that others wrote, shortened. If it had to be shortened, its source
/// is dropped, since that would show the full text.
pub(crate) fn shortened(error: impl Error + Send + Sync + 'static) -> Cause {
    let full = error.to_string();
    let short = cut(&full);
    if short == full { Cause::new(short, error) } else { short.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_others_is_only_text_in_markdown_and_csv() {
        let text = "a\n|b| <img src=x> [c](d) `e` f_g \\ & *h*\u{1b}\u{2028}";
        let shown = "a \\|b\\| &lt;img src=x&gt; \\[c\\](d) `e` f_g \\\\ &amp; \\*h\\*  ";
        assert_eq!(in_markdown(text), shown);
        assert_eq!(in_csv("=1+1"), "'=1+1");
        assert_eq!(in_csv("paper+"), "paper+");
    }

    #[test]
    fn long_text_is_cut() {
        assert_eq!(cut("\u{e4}".repeat(200)), "\u{e4}".repeat(200));
        assert_eq!(cut("\u{e4}".repeat(201)), format!("{}…", "\u{e4}".repeat(200)));
    }

    #[test]
    fn an_error_keeps_its_source_unless_that_is_too_long() {
        let shortened = |text: String| shortened(std::io::Error::other(text));
        assert!(shortened("short".into()).source().is_some());
        let long = shortened("x".repeat(5000));
        assert!(long.source().is_none() && ecso::error_chain(&long).chars().count() == 201);
    }

    #[test]
    fn undecodable_text_gives_an_error_that_says_what_to_do() {
        for bytes in
            [b"a\nb\xe4".as_slice(), b"\xff\xfea", b"\xff\xfe\x00\xd8", b"\xff\xfe\0\0a\0\0\0"]
        {
            assert!(decode(bytes.to_vec()).unwrap_err().message().contains("save"), "{bytes:?}");
        }
    }
}
