//! Allow-lists for requests and answers, as tables of what each field may hold.
//!
//! [`filter`] takes a value apart and returns the part of it that its [`Form`] knows. Every text in
//! that part is either passed to the [`FieldVisitor`], which has it judged, or is limited to
//! characters that can't spell a sentence.

use serde_json::{Map, Value};

use crate::json::printable;

/// What a field may hold. Null fits every form.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Form {
    /// A number, a boolean or null.
    Scalar,
    /// Scalars, in lists or in objects at any depth.
    Scalars,
    /// One of these words.
    OneOf(&'static [&'static str]),
    /// A name or an id: one word of ASCII letters, digits and punctuation. Passed to the visitor
    /// once.
    Name,
    /// A text. Passed to the visitor.
    Text,
    /// An encrypted or signed value in base64. Passed to the visitor as a text unless it is a
    /// [seal](is_seal).
    Opaque,
    /// A short text about the request that no model sees: who asks, and for what purpose. Not
    /// passed to the visitor; requests only.
    Label,
    /// Labels, in lists or in objects at any depth.
    Labels,
    /// A text that the model does not see as text, or that the reader of the request handles
    /// itself: the URL of an image, stop sequences. Not passed to the visitor; requests only.
    Raw,
    /// Any value. Passed to the visitor as JSON text.
    Any,
    /// A list, each entry of this form.
    List(&'static Form),
    /// An object with these fields.
    Object(&'static [(&'static str, Form)]),
    /// The first of these forms that fits.
    AnyOf(&'static [Form]),
    /// A known field that is dropped.
    Dropped,
}

/// Receives the texts of a value while it is filtered.
pub(crate) trait FieldVisitor {
    /// A text at `path`, or more of it. The returned text goes out in its place.
    fn text(&mut self, path: &str, text: String) -> String;

    /// A name at `path`. In a stream, servers repeat it in each chunk.
    fn name(&mut self, path: &str, name: &str);

    /// A field that no form knows. Returns whether it is kept all the same, as [`Form::Any`].
    fn unknown(&mut self, path: &str, name: &str) -> Result<bool, FieldError>;

    /// A value that does not have its form. It is dropped unless this returns an error.
    fn invalid(&mut self, path: &str) -> Result<(), FieldError>;
}

/// The path of something that can't be kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum FieldError {
    /// A field that no form knows.
    Unknown(String),
    /// A value that a known field can't have.
    Invalid(String),
}

/// Longest name, in bytes.
const MAX_NAME: usize = 16 << 10;
/// Longest label, in bytes.
const MAX_LABEL: usize = 1024;

/// Returns what `form` knows of a value, or `None` if the value does not fit and the visitor
/// accepts that.
pub(crate) fn filter(
    form: &Form,
    value: Value,
    path: &str,
    visitor: &mut impl FieldVisitor,
) -> Result<Option<Value>, FieldError> {
    if !form.accepts(&value) {
        visitor.invalid(path)?;
        return Ok(None);
    }
    Ok(match (form, value) {
        (Form::Dropped, _) => None,
        (Form::AnyOf(forms), value) => match forms.iter().find(|form| form.accepts(&value)) {
            Some(form) => filter(form, value, path, visitor)?,
            None => None,
        },
        (Form::Text, Value::String(text)) => Some(visitor.text(path, text).into()),
        (Form::Opaque, Value::String(text)) if !is_seal(&text) => {
            Some(visitor.text(path, text).into())
        }
        (Form::Name, Value::String(name)) => {
            visitor.name(path, &name);
            Some(name.into())
        }
        (Form::Any, value) => {
            let text = match &value {
                Value::Null | Value::Bool(_) | Value::Number(_) => None,
                Value::String(text) => Some(text.clone()),
                Value::Array(_) | Value::Object(_) => Some(value.to_string()),
            };
            if let Some(text) =
                text.filter(|text| !text.trim().is_empty() && text != "[]" && text != "{}")
            {
                visitor.text(path, text);
            }
            Some(value)
        }
        (Form::List(form), Value::Array(list)) => {
            let mut kept = Vec::with_capacity(list.len());
            for (index, value) in list.into_iter().enumerate() {
                // A chunk of a tool call names the call that it belongs to.
                let index = value["index"].as_u64().unwrap_or(index as u64);
                kept.extend(filter(form, value, &format!("{path}.{index:04}"), visitor)?);
            }
            Some(kept.into())
        }
        (Form::Object(known), Value::Object(fields)) => {
            Some(known_fields(known, fields, path, visitor)?.into())
        }
        (_, value) => Some(value),
    })
}

/// The known fields of an object.
pub(crate) fn known_fields(
    known: &[(&str, Form)],
    fields: Map<String, Value>,
    path: &str,
    visitor: &mut impl FieldVisitor,
) -> Result<Map<String, Value>, FieldError> {
    let mut kept = Map::new();
    for (name, value) in fields {
        let path =
            if path.is_empty() { printable(&name) } else { format!("{path}.{}", printable(&name)) };
        let form = match known.iter().find(|(known, _)| *known == name) {
            Some((_, form)) => form,
            // Null has no meaning.
            None if value.is_null() => continue,
            None if visitor.unknown(&path, &name)? => &Form::Any,
            None => continue,
        };
        if let Some(value) = filter(form, value, &path, visitor)? {
            kept.insert(name, value);
        }
    }
    Ok(kept)
}

impl Form {
    /// Whether a value has this form. Entries of lists and fields of objects are not looked at;
    /// [`filter`] does that.
    pub(crate) fn accepts(&self, value: &Value) -> bool {
        match (self, value) {
            (_, Value::Null)
            | (Self::Any | Self::Dropped, _)
            | (Self::Text | Self::Raw, Value::String(_))
            | (Self::List(_), Value::Array(_))
            | (Self::Object(_), Value::Object(_)) => true,
            (Self::Scalar, value) => is_scalar(value),
            (Self::Scalars, value) => is_scalars(value),
            (Self::OneOf(words), Value::String(word)) => words.contains(&word.as_str()),
            (Self::Name, Value::String(name)) => is_name(name),
            (Self::Opaque, Value::String(text)) => is_base64(text),
            (Self::Label, value) => is_label(value),
            (Self::Labels, value) => is_labels(value),
            (Self::AnyOf(forms), value) => forms.iter().any(|form| form.accepts(value)),
            _ => false,
        }
    }
}

fn is_scalar(value: &Value) -> bool {
    matches!(value, Value::Null | Value::Bool(_) | Value::Number(_))
}

fn is_scalars(value: &Value) -> bool {
    match value {
        Value::Array(list) => list.iter().all(is_scalars),
        Value::Object(fields) => {
            fields.iter().all(|(name, value)| is_name(name) && is_scalars(value))
        }
        value => is_scalar(value),
    }
}

fn is_label(value: &Value) -> bool {
    // An address in a label might be one that the answer is sent to.
    value
        .as_str()
        .map_or_else(|| is_scalar(value), |text| text.len() <= MAX_LABEL && !text.contains("://"))
}

fn is_labels(value: &Value) -> bool {
    match value {
        Value::Array(list) => list.iter().all(is_labels),
        Value::Object(fields) => {
            fields.iter().all(|(name, value)| name.len() <= MAX_LABEL && is_labels(value))
        }
        value => is_label(value),
    }
}

/// Whether a text is one word, as names and ids are.
fn is_name(text: &str) -> bool {
    text.len() <= MAX_NAME
        && text.bytes().all(|byte| byte.is_ascii_graphic() && !b"\"'`<>\\".contains(&byte))
}

/// Whether a text has only the characters of base64, standard or URL-safe, and its padding only at
/// the end. In a stream it may be a part.
fn is_base64(text: &str) -> bool {
    let digits = text.trim_end_matches('=');
    let has_only =
        |more: &[u8]| digits.bytes().all(|b| b.is_ascii_alphanumeric() || more.contains(&b));
    text.len() - digits.len() <= 2 && (has_only(b"+/") || has_only(b"-_"))
}

/// Shortest seal, in characters.
const MIN_SEAL: usize = 64;

/// Whether a text can be a signature or an encrypted value rather than words: long base64, every
/// part of which mixes upper case, lower case and digits. All other text is judged.
pub(crate) fn is_seal(text: &str) -> bool {
    let digits = text.trim_end_matches('=').as_bytes();
    if digits.len() < MIN_SEAL || !is_base64(text) {
        return false;
    }
    // By chance, less than one part in ten thousand is not mixed.
    let is_mixed = |part: &[u8]| {
        let count = |is_kind: fn(&u8) -> bool| part.iter().filter(|byte| is_kind(byte)).count();
        count(u8::is_ascii_uppercase).min(count(u8::is_ascii_lowercase)) >= MIN_SEAL / 8
            && count(u8::is_ascii_digit) > 0
    };
    let last = &digits[digits.len() - MIN_SEAL..];
    digits.chunks_exact(MIN_SEAL).chain([last]).all(is_mixed)
}

/// An id without the signature that some servers put after this mark.
pub(crate) fn without_seal(id: &str) -> &str {
    match id.split_once("__thought__") {
        Some((start, seal)) if is_seal(seal) => start,
        _ => id,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use base64::{Engine, prelude::BASE64_STANDARD};
    use serde_json::json;
    use sha2::Digest;

    use super::*;

    #[derive(Default)]
    struct Recorder {
        texts: Vec<String>,
        rejected: Vec<String>,
    }

    impl FieldVisitor for Recorder {
        fn text(&mut self, path: &str, text: String) -> String {
            self.texts.push(format!("{path}={text}"));
            text
        }

        fn name(&mut self, path: &str, name: &str) {
            self.texts.push(format!("{path}={name}"));
        }

        fn unknown(&mut self, path: &str, name: &str) -> Result<bool, FieldError> {
            self.rejected.push(path.into());
            Ok(name == "allowed")
        }

        fn invalid(&mut self, path: &str) -> Result<(), FieldError> {
            self.rejected.push(path.into());
            Ok(())
        }
    }

    const FORM: Form = Form::Object(&[
        ("text", Form::AnyOf(&[Form::Text, Form::List(&Form::Object(&[("text", Form::Text)]))])),
        ("kind", Form::OneOf(&["a", "b"])),
        ("id", Form::Name),
        ("seal", Form::Opaque),
        ("schema", Form::Any),
        ("bias", Form::Scalars),
        ("n", Form::Scalar),
        ("store", Form::Dropped),
    ]);

    #[test]
    fn known_fields_are_kept_and_their_texts_are_visited() {
        let value = json!({"text": [{"text": "one", "x": "two"}, "three"], "kind": "a", "id": "i-1", "seal": "QUJD",
            "schema": {"k": ["v"]}, "bias": {"12": -1}, "n": 3, "store": true});
        let mut recorder = Recorder::default();
        let kept = filter(&FORM, value, "", &mut recorder).unwrap().unwrap();
        assert_eq!(
            kept,
            json!({"text": [{"text": "one"}], "kind": "a", "id": "i-1", "seal": "QUJD", "schema": {"k": ["v"]},
                "bias": {"12": -1}, "n": 3})
        );
        assert_eq!(
            recorder.texts,
            ["text.0000.text=one", "id=i-1", "seal=QUJD", r#"schema={"k":["v"]}"#]
        );
        assert_eq!(recorder.rejected, ["text.0000.x", "text.0001"]);
    }

    /// Text in base64 as long as a short signature.
    pub(crate) fn seal() -> String {
        BASE64_STANDARD.encode(sha2::Sha512::digest("a signature"))
    }

    #[test]
    fn seals_are_base64_that_does_not_read_as_words() {
        let url_safe = seal().replace('+', "-").replace('/', "_");
        let long: String = (0..200)
            .map(|n: u16| BASE64_STANDARD.encode(sha2::Sha384::digest(n.to_be_bytes())))
            .collect();
        for text in [seal().as_str(), seal().trim_end_matches('='), &url_safe, &long] {
            assert!(is_seal(text), "{text}");
            assert_eq!(without_seal(&format!("call_1__thought__{text}")), "call_1");
        }
        for text in [
            "",
            "QUJD",
            &seal()[..60],
            &format!("{}.x", seal()),
            &format!("{}:x", seal()),
            &format!("=={}", seal()),
            &format!("{}====", seal().trim_end_matches('=')),
            &format!("+-{}", seal()),
            "First-stir-the-flour-into-the-water-and-then-wait-for-an-hour-in-the-dark-room",
            "First-stir-the-flour-into-the-water-and-then-wait-for-1-hour-in-the-dark-room",
            "FirstStirTheFlourIntoTheWaterAndThenWaitForAnHourInTheDarkRoomAndAddTheSaltToIt",
            &format!(
                "{long}First-stir-the-flour-into-the-water-and-then-wait-for-an-hour-or-two{long}"
            ),
        ] {
            assert!(!is_seal(text), "{text}");
            let id = format!("call_1__thought__{text}");
            assert_eq!(without_seal(&id), id);
        }
    }

    #[test]
    fn only_seals_are_not_visited() {
        let mut recorder = Recorder::default();
        let value = json!({"seal": seal()});
        assert_eq!(filter(&FORM, value.clone(), "", &mut recorder).unwrap(), Some(value));
        assert!(recorder.texts.is_empty(), "{:?}", recorder.texts);
    }

    #[test]
    fn values_without_their_form_are_rejected() {
        for (value, path) in [
            (json!({"kind": "c"}), "kind"),
            (json!({"Kind": "a"}), "Kind"),
            (json!({"id": "two words"}), "id"),
            (json!({"seal": "two words"}), "seal"),
            (json!({"seal": "two.words"}), "seal"),
            (json!({"seal": "two:words"}), "seal"),
            (json!({"text": 3}), "text"),
            (json!({"bias": {"two words": 1}}), "bias"),
            (json!({"bias": ["1"]}), "bias"),
            (json!({"n": "1"}), "n"),
            (json!("text"), ""),
        ] {
            let mut recorder = Recorder::default();
            let kept = filter(&FORM, value.clone(), "", &mut recorder).unwrap();
            assert!(kept.is_none_or(|kept| kept == json!({})), "{value}");
            assert_eq!(recorder.rejected, [path], "{value}");
        }
    }
}
