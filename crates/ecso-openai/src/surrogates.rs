//! JSON that contains halves of characters.
//!
//! A character above U+FFFF is two `\u` escapes in JSON: a high and a low surrogate. Servers that
//! cut a text anywhere send one half in one event and the other in the next, but a Rust string
//! can't contain a half. [`parse`] replaces it by a sentinel, a private-use character, and
//! [`Joiner`] joins two neighbouring sentinels to the character.
//!
//! ```
//! use ecso_openai::surrogates::{Joiner, parse};
//!
//! let mut joiner = Joiner::default();
//! let (first, second): (String, String) = (parse(r#""\ud83c""#)?, parse(r#""\udf4f""#)?);
//! assert_eq!(joiner.push(&first), "");
//! assert_eq!(joiner.push(&second), "🍏");
//! # Ok::<(), serde_json::Error>(())
//! ```
//!
//! The sentinels are U+10F000 to U+10F7FF, in the last private-use plane. If the JSON really
//! contains such a character, [`parse`] writes it as two sentinels, which a [`Joiner`] joins again.
//! Therefore every text from [`parse`] must be joined before it is shown, and no other text may be:
//! its private characters of that range would be lost. All other characters are never changed.

use std::{borrow::Cow, ops::RangeInclusive};

use serde::de::{DeserializeOwned, DeserializeSeed};

const SENTINELS: RangeInclusive<char> = '\u{10F000}'..='\u{10F7FF}';
const FIRST_SENTINEL: u32 = 0x10_F000;
/// The first byte of each sentinel in UTF-8, and of few other characters.
const LEAD: u8 = 0xF4;
const HIGH: RangeInclusive<u16> = 0xD800..=0xDBFF;
const LOW: RangeInclusive<u16> = 0xDC00..=0xDFFF;

/// Parses JSON that may contain halves of characters. Each becomes a sentinel, for a [`Joiner`].
///
/// # Errors
/// Those of `serde_json`. Their positions count sentinels instead of escapes.
pub fn parse<T: DeserializeOwned>(json: &str) -> serde_json::Result<T> {
    serde_json::from_str(&marked(json))
}

/// As [`parse`], with a deserializer seed.
///
/// # Errors
/// As [`parse`].
pub fn parse_seed<T>(
    json: &str,
    seed: impl for<'de> DeserializeSeed<'de, Value = T>,
) -> serde_json::Result<T> {
    let json = marked(json);
    let mut reader = serde_json::Deserializer::from_str(&json);
    let value = seed.deserialize(&mut reader)?;
    reader.end()?;
    Ok(value)
}

/// A complete text from [`parse`], with its sentinels joined, and U+FFFD for a single half.
#[must_use]
pub fn join(text: &str) -> String {
    if memchr::memchr(LEAD, text.as_bytes()).is_none() {
        return text.to_owned();
    }
    let mut joiner = Joiner::default();
    let begun = joiner.push(text);
    begun + joiner.finish()
}

/// Joins a text from [`parse`] that comes in pieces.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Joiner {
    /// A first half, held back until the next piece.
    high: Option<u16>,
}

impl Joiner {
    /// The joined text, except for a first half at its end, which is held back.
    pub fn push(&mut self, text: &str) -> String {
        let mut joined = String::with_capacity(text.len());
        for c in text.chars() {
            let unit = unit(c);
            let pair = match (self.high.take(), unit) {
                (Some(high), Some(low)) if LOW.contains(&low) => whole(high, low),
                (Some(_), _) => {
                    joined.push(char::REPLACEMENT_CHARACTER);
                    None
                }
                (None, _) => None,
            };
            match (pair, unit) {
                (Some(pair), _) => joined.push(pair),
                (None, Some(high)) if HIGH.contains(&high) => self.high = Some(high),
                (None, Some(_)) => joined.push(char::REPLACEMENT_CHARACTER),
                (None, None) => joined.push(c),
            }
        }
        joined
    }

    /// Ends the text: U+FFFD if a first half was held back, else nothing.
    pub fn finish(&mut self) -> &'static str {
        if self.high.take().is_some() { "\u{FFFD}" } else { "" }
    }
}

/// The JSON with a sentinel for each single half, and two for each character that looks like one.
fn marked(json: &str) -> Cow<'_, str> {
    let mut marked = String::new();
    let mut rest = json;
    // The start of the unchanged part before `rest`.
    let mut kept = json;
    while let Some(at) = memchr::memchr2(b'\\', LEAD, rest.as_bytes()) {
        let here = &rest[at..];
        let (length, instead) = replacement(here);
        rest = &here[length..];
        if let Some(instead) = instead {
            marked.push_str(&kept[..kept.len() - here.len()]);
            marked.extend(instead);
            kept = rest;
        }
    }
    if kept.len() == json.len() {
        return Cow::Borrowed(json);
    }
    marked.push_str(kept);
    Cow::Owned(marked)
}

/// The length in bytes of the escape (or sentinel) at the start of `here`, and its replacement.
fn replacement(here: &str) -> (usize, Option<Vec<char>>) {
    let Some(unit) = escaped(here) else {
        let mut chars = here.chars();
        let first = chars.next().unwrap_or_default();
        if first == '\\' {
            return (1 + chars.next().map_or(0, char::len_utf8), None);
        }
        return (first.len_utf8(), SENTINELS.contains(&first).then(|| split(first)));
    };
    let next = here.get(6..).and_then(escaped);
    match next.and_then(|next| whole(unit, next)) {
        Some(c) if SENTINELS.contains(&c) => (12, Some(split(c))),
        Some(_) => (12, None),
        None => (6, Some(sentinel(unit).into_iter().collect())),
    }
}

/// The surrogate that is escaped at the start of a text.
fn escaped(text: &str) -> Option<u16> {
    let digits = text.strip_prefix("\\u")?.get(..4)?;
    let unit = u16::from_str_radix(digits, 16).ok().filter(|_| !digits.starts_with('+'))?;
    (HIGH.contains(&unit) || LOW.contains(&unit)).then_some(unit)
}

/// The character of two surrogates, if they are a high one and a low one.
fn whole(high: u16, low: u16) -> Option<char> {
    let is_pair = HIGH.contains(&high) && LOW.contains(&low);
    char::decode_utf16([high, low]).next().filter(|_| is_pair)?.ok()
}

/// A character as the sentinels of its two surrogates.
fn split(c: char) -> Vec<char> {
    c.encode_utf16(&mut [0; 2]).iter().filter_map(|unit| sentinel(*unit)).collect()
}

fn sentinel(unit: u16) -> Option<char> {
    char::from_u32(FIRST_SENTINEL + u32::from(unit.checked_sub(*HIGH.start())?))
}

/// The surrogate that a sentinel stands for.
fn unit(c: char) -> Option<u16> {
    let offset = u16::try_from(u32::from(c).checked_sub(FIRST_SENTINEL)?).ok()?;
    SENTINELS.contains(&c).then_some(HIGH.start() + offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> String {
        join(&parse::<String>(json).unwrap())
    }

    fn escape(units: impl IntoIterator<Item = u16>) -> String {
        units.into_iter().map(|unit| format!("\\u{unit:04x}")).collect::<Vec<_>>().concat()
    }

    #[test]
    fn halves_are_read_and_joined() {
        let (first, second): (String, String) =
            (parse(r#""a\ud83d""#).unwrap(), parse(r#""\uDE00b""#).unwrap());
        let mut joiner = Joiner::default();
        assert_eq!(joiner.push(&first), "a");
        assert_eq!(joiner.push(""), "");
        assert_eq!(joiner.push(&second), "😀b");
        assert_eq!(joiner.finish(), "");
    }

    #[test]
    fn a_half_that_stays_alone_is_a_replacement_character() {
        assert_eq!(read(r#""\ud83dx""#), "\u{FFFD}x");
        assert_eq!(read(r#""\ude00\ud83d""#), "\u{FFFD}\u{FFFD}");
        assert_eq!(read(r#""\ud83d\ud83d\ude00""#), "\u{FFFD}😀");
        assert_eq!(read(r#""\ud83d😀""#), "\u{FFFD}😀");
    }

    #[test]
    fn what_is_no_half_stays_as_it_is() {
        assert_eq!(read(r#""\\ud83d \\\\ \" \u00e4 \ud83d\ude00 ä""#), "\\ud83d \\\\ \" ä 😀 ä");
        assert!(matches!(marked(r#"{"a": "\ud83d\ude00\\ud83d"}"#), Cow::Borrowed(_)));
        assert!(parse::<String>(r#""\ud8"#).is_err());
        assert!(parse::<String>(r#""\"#).is_err());
        assert!(parse::<String>(r"\ud83d").is_err());
    }

    #[test]
    fn private_characters_come_back_whole() {
        let text = "\u{10F000}\u{10F7FF}\u{10F03D}\u{10F600}\u{10EFFF}\u{10F800}\u{E000}";
        assert_eq!(read(&serde_json::to_string(text).unwrap()), text);
        let escaped = escape(text.encode_utf16());
        assert_eq!(read(&format!("\"{escaped}\"")), text);
        assert_eq!(read("\"\\ud83d\u{10F000}\""), "\u{FFFD}\u{10F000}");
    }

    /// Any text, with more than its share of characters of two surrogates and of private ones.
    fn text() -> impl proptest::strategy::Strategy<Value = String> {
        use proptest::prelude::*;
        let odd = prop_oneof![
            any::<char>(),
            Just('😀'),
            Just('"'),
            Just('\\'),
            proptest::char::range('\u{10EFF0}', '\u{10F810}')
        ];
        proptest::collection::vec(odd, 0..40).prop_map(|chars| chars.into_iter().collect())
    }

    proptest::proptest! {
        #[test]
        fn any_text_escaped_and_cut_anywhere_comes_back(text in text(), every in 1..9_usize) {
            let units: Vec<u16> = text.encode_utf16().collect();
            let mut joiner = Joiner::default();
            let mut read = String::new();
            for piece in units.chunks(every) {
                let escaped = escape(piece.iter().copied());
                read += &joiner.push(&parse::<String>(&format!("\"{escaped}\"")).unwrap());
            }
            read += joiner.finish();
            proptest::prop_assert_eq!(read, text);
        }

        #[test]
        fn any_text_as_serde_writes_it_comes_back(text in text()) {
            proptest::prop_assert_eq!(read(&serde_json::to_string(&text).unwrap()), text);
        }

        #[test]
        fn no_json_panics(json in r#"["\\ud83DE0a😀\u{10F000}]{0,30}"#) {
            let _ = parse::<serde_json::Value>(&json);
        }
    }
}
