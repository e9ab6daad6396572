//! What may stand where in requests and answers: allow-lists, as tables.
//!
//! [`keep`] takes a value apart and gives back what its [`Form`] knows of it. Every text that it
//! gives back has been told to the [`Reader`], who judges it, or is of an alphabet in which nothing
//! can be said.

use serde_json::{Map, Value};

use crate::json::shown;

/// What a field may hold.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Form {
    /// A number, a switch or nothing.
    Plain,
    /// Plain values, in lists or by names.
    Plains,
    /// One of these words.
    Word(&'static [&'static str]),
    /// A name or an id: one word of ASCII's letters, digits and marks. Told to the reader, once.
    Name,
    /// A text. Told to the reader.
    Text,
    /// What only its maker can read: one long word of base64's letters. Told to nobody.
    Sealed,
    /// A line about the request, which no model is shown: who asks, what for. Told to nobody;
    /// requests only.
    Label,
    /// Labels, in lists or by names.
    Labels,
    /// A text that is not for the model, or that whoever reads the request takes from there: where
    /// an image is, words at which to stop. Told to nobody; requests only.
    Raw,
    /// Anything. Told to the reader as JSON text.
    Any,
    /// A list, each entry of this form.
    List(&'static Form),
    /// Named fields.
    Fields(&'static [(&'static str, Form)]),
    /// The first of these that fits.
    Either(&'static [Form]),
    /// Known, and left out.
    Gone,
}

/// Who is told of texts.
pub(crate) trait Reader {
    /// A text at `path`, or more of it. What comes back goes out in its place.
    fn text(&mut self, path: &str, text: String) -> String;

    /// A name at `path`; servers repeat it in each piece of a stream.
    fn name(&mut self, path: &str, name: &str);

    /// A field that no form knows: whether it is kept all the same, as [`Form::Any`].
    fn unknown(&mut self, path: &str, name: &str) -> Result<bool, Odd>;

    /// A value that is not of its form. It is left out, unless this is an error.
    fn misfit(&mut self, path: &str) -> Result<(), Odd>;
}

/// Where something stands that can't be kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Odd {
    /// A field that no form knows.
    Unknown(String),
    /// A value that a known field can't have.
    Misfit(String),
}

/// Longest word that is a name.
const NAME: usize = 16 << 10;
/// Longest label.
const LABEL: usize = 1024;

/// What `form` knows of a value; nothing where it does not fit and the reader passes over it.
pub(crate) fn keep(
    form: &Form,
    value: Value,
    path: &str,
    reader: &mut impl Reader,
) -> Result<Option<Value>, Odd> {
    if !fits(form, &value) {
        reader.misfit(path)?;
        return Ok(None);
    }
    Ok(match (form, value) {
        (Form::Gone, _) => None,
        (Form::Either(forms), value) => match forms.iter().find(|form| fits(form, &value)) {
            Some(form) => keep(form, value, path, reader)?,
            None => None,
        },
        (Form::Text, Value::String(text)) => Some(reader.text(path, text).into()),
        (Form::Name, Value::String(name)) => {
            reader.name(path, &name);
            Some(name.into())
        }
        (Form::Any, value) => {
            let told = match &value {
                Value::Null | Value::Bool(_) | Value::Number(_) => None,
                Value::String(text) => Some(text.clone()),
                Value::Array(_) | Value::Object(_) => Some(value.to_string()),
            };
            if let Some(text) =
                told.filter(|text| !text.trim().is_empty() && text != "[]" && text != "{}")
            {
                reader.text(path, text);
            }
            Some(value)
        }
        (Form::List(form), Value::Array(list)) => {
            let mut kept = Vec::with_capacity(list.len());
            for (place, value) in list.into_iter().enumerate() {
                // A piece of a tool call says which call it belongs to.
                let place = value["index"].as_u64().unwrap_or(place as u64);
                kept.extend(keep(form, value, &format!("{path}.{place:04}"), reader)?);
            }
            Some(kept.into())
        }
        (Form::Fields(known), Value::Object(fields)) => {
            Some(fields_of(known, fields, path, reader)?.into())
        }
        (_, value) => Some(value),
    })
}

/// The known fields of an object.
pub(crate) fn fields_of(
    known: &[(&str, Form)],
    fields: Map<String, Value>,
    path: &str,
    reader: &mut impl Reader,
) -> Result<Map<String, Value>, Odd> {
    let mut kept = Map::new();
    for (name, value) in fields {
        let at = if path.is_empty() { shown(&name) } else { format!("{path}.{}", shown(&name)) };
        let form = match known.iter().find(|(known, _)| *known == name) {
            Some((_, form)) => form,
            // Nothing is said by it.
            None if value.is_null() => continue,
            None if reader.unknown(&at, &name)? => &Form::Any,
            None => continue,
        };
        if let Some(value) = keep(form, value, &at, reader)? {
            kept.insert(name, value);
        }
    }
    Ok(kept)
}

impl Form {
    /// Whether a value has this form, as far as one sees without looking into lists and fields.
    /// Null has every form.
    pub(crate) fn fits(&self, value: &Value) -> bool {
        fits(self, value)
    }
}

fn fits(form: &Form, value: &Value) -> bool {
    match (form, value) {
        (_, Value::Null)
        | (Form::Any | Form::Gone, _)
        | (Form::Text | Form::Raw, Value::String(_))
        | (Form::List(_), Value::Array(_))
        | (Form::Fields(_), Value::Object(_)) => true,
        (Form::Plain, value) => is_plain(value),
        (Form::Plains, value) => is_plains(value),
        (Form::Word(words), Value::String(word)) => words.contains(&word.as_str()),
        (Form::Name, Value::String(name)) => is_name(name),
        (Form::Sealed, Value::String(text)) => {
            text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+/=-_.:".contains(&byte))
        }
        (Form::Label, value) => is_label(value),
        (Form::Labels, value) => is_labels(value),
        (Form::Either(forms), value) => forms.iter().any(|form| fits(form, value)),
        _ => false,
    }
}

fn is_plain(value: &Value) -> bool {
    matches!(value, Value::Null | Value::Bool(_) | Value::Number(_))
}

fn is_plains(value: &Value) -> bool {
    match value {
        Value::Array(list) => list.iter().all(is_plains),
        Value::Object(fields) => {
            fields.iter().all(|(name, value)| is_name(name) && is_plains(value))
        }
        value => is_plain(value),
    }
}

fn is_label(value: &Value) -> bool {
    // An address in a label may be one to which an answer is sent.
    value
        .as_str()
        .map_or_else(|| is_plain(value), |text| text.len() <= LABEL && !text.contains("://"))
}

fn is_labels(value: &Value) -> bool {
    match value {
        Value::Array(list) => list.iter().all(is_labels),
        Value::Object(fields) => {
            fields.iter().all(|(name, value)| name.len() <= LABEL && is_labels(value))
        }
        value => is_label(value),
    }
}

/// Whether a text is one word, as names and ids are.
fn is_name(text: &str) -> bool {
    text.len() <= NAME
        && text.bytes().all(|byte| byte.is_ascii_graphic() && !b"\"'`<>\\".contains(&byte))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[derive(Default)]
    struct Told(Vec<String>, Vec<String>);

    impl Reader for Told {
        fn text(&mut self, path: &str, text: String) -> String {
            self.0.push(format!("{path}={text}"));
            text
        }

        fn name(&mut self, path: &str, name: &str) {
            self.0.push(format!("{path}={name}"));
        }

        fn unknown(&mut self, path: &str, name: &str) -> Result<bool, Odd> {
            self.1.push(path.into());
            Ok(name == "allowed")
        }

        fn misfit(&mut self, path: &str) -> Result<(), Odd> {
            self.1.push(path.into());
            Ok(())
        }
    }

    const FORM: Form = Form::Fields(&[
        ("text", Form::Either(&[Form::Text, Form::List(&Form::Fields(&[("text", Form::Text)]))])),
        ("kind", Form::Word(&["a", "b"])),
        ("id", Form::Name),
        ("seal", Form::Sealed),
        ("schema", Form::Any),
        ("bias", Form::Plains),
        ("n", Form::Plain),
        ("store", Form::Gone),
    ]);

    #[test]
    fn what_is_known_is_kept_and_every_text_of_it_is_told() {
        let value = json!({"text": [{"text": "one", "x": "two"}, "three"], "kind": "a", "id": "i-1", "seal": "QUJD",
            "schema": {"k": ["v"]}, "bias": {"12": -1}, "n": 3, "store": true});
        let mut told = Told::default();
        let kept = keep(&FORM, value, "", &mut told).unwrap().unwrap();
        assert_eq!(
            kept,
            json!({"text": [{"text": "one"}], "kind": "a", "id": "i-1", "seal": "QUJD", "schema": {"k": ["v"]},
                "bias": {"12": -1}, "n": 3})
        );
        assert_eq!(told.0, ["text.0000.text=one", "id=i-1", r#"schema={"k":["v"]}"#]);
        assert_eq!(told.1, ["text.0000.x", "text.0001"]);
    }

    #[test]
    fn what_does_not_fit_is_odd() {
        for (value, odd) in [
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
            let mut told = Told::default();
            let kept = keep(&FORM, value.clone(), "", &mut told).unwrap();
            assert!(kept.is_none_or(|kept| kept == json!({})), "{value}");
            assert_eq!(told.1, [odd], "{value}");
        }
    }
}
