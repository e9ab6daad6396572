//! Finds the columns of fields: those that the user named, or those with common names.

use std::collections::BTreeMap;

use ecso::Cause;
use serde::{Deserialize, Serialize};

use super::{
    cell::{Cell, Fields},
    turns,
};
use crate::row::shorten;

/// Names of columns by field (`id`, `query`, `image`, `category`, `draft`, `messages`,
/// `conversations`). Other fields are found by common names. A dot selects a field of an object, as
/// in `body.messages`; an empty name means that no column has the field.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping(BTreeMap<String, String>);

/// Common column names, by field.
const COMMON_NAMES: [(&str, &[&str]); 7] = [
    ("id", &["id", "request_id", "question_id", "index"]),
    ("query", &["query", "question", "prompt", "instruction", "text"]),
    (
        "image",
        &[
            "image",
            "images",
            "image_path",
            "image_paths",
            "file_name",
            "image_file",
            "image_url",
            "image_urls",
            "image_bytes",
            "image_base64",
            "image_base64_str",
            "img",
            "img_path",
            "jpg",
            "jpeg",
            "png",
            "webp",
        ],
    ),
    ("category", &["category", "scenario", "topic", "type"]),
    ("draft", &["draft"]),
    ("messages", &["messages"]),
    ("conversations", &["conversations", "conversation", "texts"]),
];

/// Other columns that matter: more turns, as in rows of LLaMA-Factory and ms-swift, and unsupported
/// media.
const OTHER_COLUMNS: [&str; 8] =
    ["system", "history", "input", "inputs", "video", "videos", "audio", "audios"];

/// Fields that may have the query, in order of precedence.
const QUERY_FIELDS: [&str; 3] = ["messages", "conversations", "query"];

impl Mapping {
    /// Creates a mapping from pairs of field and column.
    ///
    /// # Errors
    /// A field is unknown or occurs twice.
    pub fn new(pairs: impl IntoIterator<Item = (String, String)>) -> Result<Self, Cause> {
        let mut mapping = BTreeMap::new();
        for (field, column) in pairs {
            if let Some(first) = mapping.insert(field.clone(), column) {
                return Err(format!("--map names `{field}` twice, first as `{first}`").into());
            }
        }
        match mapping.keys().find(|field| !COMMON_NAMES.iter().any(|(known, _)| known == field)) {
            None => Ok(Self(mapping)),
            Some(unknown) => {
                let known: Vec<&str> = COMMON_NAMES.iter().map(|(field, _)| *field).collect();
                let known = known.join(", ");
                Err(format!("--map: unknown field `{unknown}`, expected one of {known}").into())
            }
        }
    }

    /// The column that the user named for a field; empty if no column has it.
    pub(super) fn named(&self, field: &str) -> Option<&str> {
        self.0.get(field).map(String::as_str)
    }

    /// The candidate columns for a field, the likeliest first. Common names match in any case.
    pub(super) fn columns(
        &self,
        field: &str,
        fields: &Fields,
        is_candidate: impl Fn(&Cell) -> bool,
    ) -> Vec<String> {
        let candidate =
            |name: &str| fields.get(name).is_some_and(&is_candidate).then(|| name.to_owned());
        if let Some(named) = self.named(field) {
            return candidate(named).filter(|name| !name.is_empty()).into_iter().collect();
        }
        let common = common_names(field);
        let in_other_case = common.iter().flat_map(|name| {
            fields.keys().filter(move |other| other.eq_ignore_ascii_case(name) && other != name)
        });
        let exact = common.iter().filter_map(|name| candidate(name));
        exact.chain(in_other_case.filter_map(|name| candidate(name))).collect()
    }

    /// The likeliest of [`Mapping::columns`].
    pub(super) fn column(
        &self,
        field: &str,
        fields: &Fields,
        is_candidate: impl Fn(&Cell) -> bool,
    ) -> Option<String> {
        self.columns(field, fields, is_candidate).into_iter().next()
    }

    /// Whether a column may have a field.
    pub(super) fn is_known(&self, name: &str) -> bool {
        let lowercase = name.to_ascii_lowercase();
        self.0.values().any(|named| is_or_contains(name, named))
            || COMMON_NAMES.iter().any(|(_, names)| names.contains(&lowercase.as_str()))
            || OTHER_COLUMNS.contains(&name)
            || numbered_image(name).is_some()
    }

    /// Adds the nested fields that the user named, such as `body.messages`, as columns.
    pub(super) fn add_nested(&self, fields: &mut Fields) {
        for named in self.0.values() {
            if !fields.contains_key(named)
                && let Some(cell) = nested(fields, named)
            {
                fields.insert(named.clone(), cell);
            }
        }
    }

    /// Checks that a table has all named columns, and one for the query unless that is given
    /// (`has_query`).
    ///
    /// # Errors
    /// A column is missing. The error lists the columns.
    pub(super) fn check_table(&self, columns: &[String], has_query: bool) -> Result<(), Cause> {
        self.check(columns.iter(), |_, named| {
            columns.iter().any(|column| is_or_contains(column, named))
        })?;
        let can_be_query = |column: &String| {
            QUERY_FIELDS.iter().any(|field| match self.named(field) {
                Some(named) => is_or_contains(column, named),
                None => common_names(field).iter().any(|name| name.eq_ignore_ascii_case(column)),
            })
        };
        if has_query || columns.iter().any(can_be_query) {
            return Ok(());
        }
        Err(format!(
            "no column has a common name for the query: name its column with --map query=COLUMN, \
             or pass --query; the columns are {}",
            shorten(&columns.join(", "))
        )
        .into())
    }

    /// Checks that a row has all named columns, except those for id and category, which rows of
    /// JSON may omit.
    ///
    /// # Errors
    /// As [`Mapping::check_table`].
    pub(super) fn check_row(&self, fields: &Fields) -> Result<(), Cause> {
        self.check(fields.keys(), |field, named| {
            matches!(field, "id" | "category") || fields.contains_key(named)
        })
    }

    fn check<'a>(
        &self,
        columns: impl Iterator<Item = &'a String>,
        has: impl Fn(&str, &str) -> bool,
    ) -> Result<(), Cause> {
        let Some((field, named)) =
            self.0.iter().find(|(field, named)| !named.is_empty() && !has(field, named))
        else {
            return Ok(());
        };
        let columns: Vec<&str> = columns.map(String::as_str).collect();
        let columns = columns.join(", ");
        let columns = shorten(&columns);
        Err(format!("--map {field}={named}: no such column; the columns are {columns}").into())
    }

    /// The fields that may have the query, in order: those that the user named, or else all.
    pub(super) fn query_fields(&self) -> impl Iterator<Item = &'static str> {
        let is_named = |field: &str| self.named(field).is_some_and(|named| !named.is_empty());
        let any_named = QUERY_FIELDS.into_iter().any(is_named);
        QUERY_FIELDS.into_iter().filter(move |field| !any_named || is_named(field))
    }
}

fn common_names(field: &str) -> &'static [&'static str] {
    COMMON_NAMES.iter().find(|(known, _)| *known == field).map_or(&[], |(_, names)| names)
}

/// Whether a column is the named one, or an object that contains it.
fn is_or_contains(column: &str, named: &str) -> bool {
    !column.is_empty()
        && named.strip_prefix(column).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// The value at a path of names separated by dots.
fn nested(fields: &Fields, path: &str) -> Option<Cell> {
    if let Some(cell) = fields.get(path) {
        return Some(cell.clone());
    }
    path.match_indices('.').find_map(|(dot, _)| match fields.get(&path[..dot])?.clone().parsed() {
        Cell::Fields(inner) => nested(&inner, &path[dot + 1..]),
        _ => None,
    })
}

/// The number of a column such as `image_2`, as in benchmarks with several columns of images.
pub(super) fn numbered_image(name: &str) -> Option<usize> {
    let rest = name.strip_prefix("image")?;
    let digits = rest.strip_prefix('_').unwrap_or(rest);
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
}

/// Whether a column has a common name for images.
pub(super) fn has_common_image_name(name: &str) -> bool {
    numbered_image(name).is_some()
        || common_names("image").iter().any(|common| common.eq_ignore_ascii_case(name))
}

/// Whether a column's name suggests that it is about an image.
pub(super) fn is_about_image(name: &str) -> bool {
    let lowercase = name.to_ascii_lowercase();
    ["image", "img", "photo", "picture"].iter().any(|word| lowercase.contains(word))
}

/// The field and column with the query of an object, by common names.
pub(super) fn query_of(fields: &Fields) -> Option<(&'static str, String)> {
    let is_candidate = |field: &str, cell: &Cell| match cell {
        Cell::Text(_) => field == "query" && !cell.is_empty(),
        cell => turns::is_conversation(cell),
    };
    QUERY_FIELDS.into_iter().find_map(|field| {
        Some((field, Mapping::default().column(field, fields, |cell| is_candidate(field, cell))?))
    })
}

/// Advice about columns of which none is a query.
pub(super) fn advice(fields: &Fields, has_image: bool) -> Option<String> {
    let is_row = |cell: &Cell| matches!(cell, Cell::Fields(inner) if query_of(inner).is_some());
    if fields.len() > 1 && fields.values().all(is_row) {
        return Some("each column is a row: write these as JSON lines or an array".into());
    }
    let is_list_of_objects = |cell: &Cell| match cell {
        Cell::List(list) => matches!(list.first(), Some(Cell::Fields(_))),
        _ => false,
    };
    let list = || fields.iter().find(|(_, cell)| !has_image && is_list_of_objects(cell));
    fields
        .iter()
        .find_map(|(name, cell)| advice_on(name, cell, has_image))
        .or_else(|| list().map(|(name, _)| advice_to_extract(name)))
}

fn advice_to_extract(list: &str) -> String {
    format!(
        "the rows are in the list `{}`: write that list as JSON lines or an array",
        shorten(list)
    )
}

/// Advice to name the query inside a column.
pub(super) fn advice_to_map(path: &str, (field, column): &(&str, String)) -> String {
    format!("select its query with --map {field}={}.{}", shorten(path), shorten(column))
}

/// [`advice`] for the value of a column.
pub(super) fn advice_on(path: &str, cell: &Cell, has_image: bool) -> Option<String> {
    let shown = shorten(path);
    match cell {
        _ if turns::is_conversation(cell) => {
            Some(format!("select its conversation with --map messages={shown}"))
        }
        Cell::Fields(inner) => match query_of(inner) {
            Some(query) => Some(advice_to_map(path, &query)),
            None => inner
                .iter()
                .find_map(|(name, cell)| advice_on(&format!("{path}.{name}"), cell, has_image)),
        },
        Cell::List(list) => match list.first() {
            Some(Cell::Fields(first)) if query_of(first).is_some() && has_image => Some(format!(
                "if the list `{shown}` is a conversation, pass --map conversations={shown}"
            )),
            Some(Cell::Fields(first)) if query_of(first).is_some() => Some(advice_to_extract(path)),
            _ => None,
        },
        Cell::Text(text) if text.trim_start().starts_with(['[', '{']) => {
            match cell.clone().parsed() {
                Cell::Text(_) => None,
                parsed => advice_on(path, &parsed, has_image),
            }
        }
        _ => None,
    }
}
