//! The cells of a record, whatever the input format.

use std::{collections::BTreeMap, fmt};

use bytes::Bytes;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::Number;

/// Named cells.
pub(super) type Fields = BTreeMap<String, Cell>;

/// A value of JSON, or bytes.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Cell {
    Null,
    Bool(bool),
    Number(Number),
    Text(String),
    Bytes(Bytes),
    List(Vec<Cell>),
    Fields(Fields),
    /// A value of another type, such as a date or a decimal, as text.
    Other(String),
}

impl Cell {
    /// Describes the type of the cell.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Text(_) if self.is_python() => {
                "a list or an object in Python's notation (write it as JSON)"
            }
            Self::Null => "null",
            Self::Bool(_) => "true or false",
            Self::Number(_) => "a number",
            Self::Text(_) => "text",
            Self::Bytes(_) => "bytes",
            Self::List(_) => "a list",
            Self::Fields(_) => "an object",
            Self::Other(_) => "neither text nor number",
        }
    }

    /// Whether the cell is null, blank, or contains only such cells.
    pub(super) fn is_empty(&self) -> bool {
        match self {
            Self::Null => true,
            Self::Text(text) => text.trim().is_empty(),
            Self::List(list) => list.iter().all(Self::is_empty),
            Self::Fields(fields) => fields.values().all(Self::is_empty),
            _ => false,
        }
    }

    /// Whether a text is a list or an object in Python's notation, as in tables written by Python.
    pub(super) fn is_python(&self) -> bool {
        self.text().is_some_and(|text| {
            ["['", "[{'", "{'"].iter().any(|begin| text.trim_start().starts_with(begin))
        })
    }

    pub(super) fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(super) fn number(&self) -> Option<&Number> {
        match self {
            Self::Number(number) => Some(number),
            _ => None,
        }
    }

    /// The field with this name, if it is not null.
    pub(super) fn get(&self, name: &str) -> Option<&Self> {
        match self {
            Self::Fields(fields) => fields.get(name).filter(|cell| **cell != Self::Null),
            _ => None,
        }
    }

    /// Parses a text that is JSON of a list or an object, as in CSV. Leaves other cells as they
    /// are.
    pub(super) fn parsed(self) -> Self {
        let Self::Text(text) = &self else { return self };
        let is_json =
            text.trim_start().starts_with(['[', '{']) && !has_too_many_values(text.as_bytes());
        is_json.then(|| serde_json::from_str(text).ok()).flatten().unwrap_or(self)
    }
}

/// Maximum number of values in a row, including each byte of an image that is a list of numbers. A
/// value takes 40 bytes of memory.
pub(super) const MAX_VALUES: usize = 16 << 20;

/// Whether JSON may have more than [`MAX_VALUES`] values.
pub(super) fn has_too_many_values(json: &[u8]) -> bool {
    json.len() > MAX_VALUES
        && json.iter().filter(|byte| matches!(byte, b',' | b'[' | b'{')).count() > MAX_VALUES
}

impl<'de> Deserialize<'de> for Cell {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(CellVisitor)
    }
}

struct CellVisitor;

impl<'de> Visitor<'de> for CellVisitor {
    type Value = Cell;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Cell, E> {
        Ok(Cell::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Cell, E> {
        Ok(Cell::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Cell, E> {
        Ok(Cell::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Cell, E> {
        Ok(Cell::Number(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Cell, E> {
        Ok(number(value))
    }

    fn visit_str<E>(self, text: &str) -> Result<Cell, E> {
        Ok(Cell::Text(text.to_owned()))
    }

    fn visit_string<E>(self, text: String) -> Result<Cell, E> {
        Ok(Cell::Text(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Cell, A::Error> {
        let mut list = Vec::new();
        while let Some(element) = elements.next_element()? {
            list.push(element);
        }
        Ok(Cell::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Cell, A::Error> {
        let mut fields = Fields::new();
        while let Some((name, cell)) = entries.next_entry::<String, Cell>()? {
            // Parsers differ in which one they use.
            if fields.contains_key(&name) {
                return Err(A::Error::custom(format!(
                    "the name `{}` occurs twice",
                    crate::row::shorten(&name)
                )));
            }
            fields.insert(name, cell);
        }
        Ok(Cell::Fields(fields))
    }
}

/// A number, or NaN or infinity as text.
pub(super) fn number(value: f64) -> Cell {
    Number::from_f64(value).map_or_else(|| Cell::Other(value.to_string()), Cell::Number)
}
