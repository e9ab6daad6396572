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
    /// An encrypted or signed value: one long word of base64 characters. Not passed to the visitor.
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
            (Self::Opaque, Value::String(text)) => {
                text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+/=-_.:".contains(&byte))
            }
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

#[cfg(test)]
mod tests {
    use serde_json::json;

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
        assert_eq!(recorder.texts, ["text.0000.text=one", "id=i-1", r#"schema={"k":["v"]}"#]);
        assert_eq!(recorder.rejected, ["text.0000.x", "text.0001"]);
    }

    #[test]
    fn values_without_their_form_are_rejected() {
        for (value, path) in [
            (json!({"kind": "c"}), "kind"),
            (json!({"Kind": "a"}), "Kind"),
            (json!({"id": "two words"}), "id"),
            (json!({"seal": "two words"}), "seal"),
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
