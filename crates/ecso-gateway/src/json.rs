//! JSON that all servers read the same way. If a key appears twice, some servers take the first
//! value and some the last, so such a body is refused. The memory that a body takes is limited.

use std::{cell::Cell, collections::HashSet, fmt};

use ecso_openai::surrogates;
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor,
};
use serde_json::{Map, Value};

use crate::error::ApiError;

/// The maximum number of values of a body. Each takes about a hundred bytes.
pub(crate) const MAX_VALUES: usize = 100_000;

/// Parses a body. Surrogate pairs are joined; a half without its other half becomes U+FFFD.
///
/// # Errors
/// A message for the client: it is not JSON, a key appears twice, or it has too many values.
pub(crate) fn parse(body: &[u8]) -> Result<Value, String> {
    let text = std::str::from_utf8(body).map_err(|error| error.to_string())?;
    surrogates::parse_seed(text, Strict { remaining: &Cell::new(MAX_VALUES) })
        .map_err(|error| error.to_string())
}

/// Parses a body into a type of its own.
///
/// # Errors
/// If [`parse`] fails, or the body does not have this type.
pub(crate) fn parse_as<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let value = parse(body).map_err(ApiError::unreadable_body)?;
    serde_json::from_value(value).map_err(ApiError::unreadable_body)
}

/// The number of values in a value, including itself.
pub(crate) fn count_values(value: &Value) -> usize {
    match value {
        Value::Array(list) => 1 + list.iter().map(count_values).sum::<usize>(),
        Value::Object(fields) => 1 + fields.values().map(count_values).sum::<usize>(),
        _ => 1,
    }
}

/// Whether a value holds only numbers and names, and so no sentence.
pub(crate) fn has_no_prose(value: &Value) -> bool {
    match value {
        Value::String(name) => name.len() <= 128 && !name.contains(char::is_whitespace),
        Value::Array(list) => list.iter().all(has_no_prose),
        Value::Object(fields) => {
            fields.iter().all(|(name, value)| is_field_name(name) && has_no_prose(value))
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => true,
    }
}

/// Whether a text looks like a field name of a server.
pub(crate) fn is_field_name(name: &str) -> bool {
    name.len() <= 64
        && name
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
}

#[derive(Clone, Copy)]
struct Strict<'a> {
    /// How many more values are allowed.
    remaining: &'a Cell<usize>,
}

impl Strict<'_> {
    fn count<E: Error>(self) -> Result<(), E> {
        let remaining =
            self.remaining.get().checked_sub(1).ok_or_else(|| E::custom("too many values"))?;
        self.remaining.set(remaining);
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.count()?;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(surrogates::join(text).into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = list.next_element_seed(self)? {
            values.push(value);
        }
        Ok(values.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut fields = Map::new();
        while let Some(name) = map.next_key::<String>()? {
            let (name, value) = (surrogates::join(&name), map.next_value_seed(self)?);
            if fields.contains_key(&name) {
                return Err(A::Error::custom(format_args!("`{}` appears twice", printable(&name))));
            }
            fields.insert(name, value);
        }
        Ok(fields.into())
    }
}

/// A name chosen by a stranger, shortened and on one line.
pub(crate) fn printable(name: &str) -> String {
    name.chars().take(64).map(|c| if c.is_control() { '\u{FFFD}' } else { c }).collect()
}

/// Collects all texts in a value.
pub(crate) fn collect_texts<'v>(value: &'v Value, texts: &mut HashSet<&'v str>) {
    match value {
        Value::String(text) => {
            texts.insert(text);
        }
        Value::Array(list) => list.iter().for_each(|value| collect_texts(value, texts)),
        Value::Object(fields) => fields.values().for_each(|value| collect_texts(value, texts)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_kind_of_value_is_parsed() {
        let text = r#" {"a": [1, -2, 0.5, true, null, "x\ud83d\ude00"], "b": {"a": {}}, "half": "\ud83d!"} "#;
        let value =
            json!({"a": [1, -2, 0.5, true, null, "x😀"], "b": {"a": {}}, "half": "\u{FFFD}!"});
        assert_eq!((count_values(&value), parse(text.as_bytes())), (11, Ok(value)));
    }

    #[test]
    fn ambiguous_json_is_an_error() {
        for (text, why) in [
            (r#"{"a": 1, "a": 1}"#, "`a` appears twice"),
            (r#"{"a": [{"b": {"c": 1, "\u0063": 2}}]}"#, "`c` appears twice"),
            (r#"{"a": 1} {"a": 2}"#, "trailing"),
            ("", "EOF"),
            ("{\"a\": \"\u{1}\"}", "control character"),
        ] {
            let error = parse(text.as_bytes()).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
        assert!(parse(b"{\"a\": \"\xff\"}").is_err());
        assert!(parse("[".repeat(1000).as_bytes()).is_err());
        let zeros = format!("[{}0]", "0,".repeat(MAX_VALUES));
        assert!(parse(zeros.as_bytes()).unwrap_err().contains("too many values"));
    }
}
