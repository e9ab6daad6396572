//! Which column of a record is what: what somebody named, or the names that people use.

use std::collections::BTreeMap;

use ecso::Cause;
use serde::{Deserialize, Serialize};

use super::{
    cell::{Cell, Fields},
    turns,
};
use crate::row::cut;

/// Which columns are what: a column's name by what it is (`id`, `query`, `image`, `category`,
/// `draft`, `messages`, `conversations`). What is not said is found by the names that people use. A
/// dot goes into an object, as in `body.messages`; an empty name says that no column is it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping(BTreeMap<String, String>);

/// Names that are tried, by what a column is.
const USUAL: [(&str, &[&str]); 7] = [
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

/// What else a row may have: more that was said (as LLaMA-Factory's and ms-swift's rows do), and
/// what can't be shown.
const BESIDE: [&str; 8] =
    ["system", "history", "input", "inputs", "video", "videos", "audio", "audios"];

/// Where a query may stand, in the order in which it is looked for.
const QUERIES: [&str; 3] = ["messages", "conversations", "query"];

impl Mapping {
    /// From pairs of what a column is and its name.
    ///
    /// # Errors
    /// When somebody names what no column can be, or one thing twice.
    pub fn new(pairs: impl IntoIterator<Item = (String, String)>) -> Result<Self, Cause> {
        let mut mapping = BTreeMap::new();
        for (what, name) in pairs {
            if let Some(before) = mapping.insert(what.clone(), name) {
                return Err(format!("`{what}` is named twice, first as `{before}`").into());
            }
        }
        match mapping.keys().find(|what| !USUAL.iter().any(|(known, _)| known == what)) {
            None => Ok(Self(mapping)),
            Some(unknown) => {
                let known: Vec<&str> = USUAL.iter().map(|(what, _)| *what).collect();
                Err(format!("no column can be `{unknown}`; there are {}", known.join(", ")).into())
            }
        }
    }

    /// The name that somebody gave for `what`; empty if they said that there is none.
    pub(super) fn named(&self, what: &str) -> Option<&str> {
        self.0.get(what).map(String::as_str)
    }

    /// The columns that are `what`, of those that `hold` something, the likeliest first. Upper and
    /// lower case don't count where nobody named it.
    pub(super) fn columns(
        &self,
        what: &str,
        fields: &Fields,
        holds: impl Fn(&Cell) -> bool,
    ) -> Vec<String> {
        let held = |name: &str| fields.get(name).is_some_and(&holds).then(|| name.to_owned());
        if let Some(named) = self.named(what) {
            return held(named).filter(|name| !name.is_empty()).into_iter().collect();
        }
        let usual = usual(what);
        let in_other_case = usual.iter().flat_map(|name| {
            fields.keys().filter(move |other| other.eq_ignore_ascii_case(name) && other != name)
        });
        let exact = usual.iter().filter_map(|name| held(name));
        exact.chain(in_other_case.filter_map(|name| held(name))).collect()
    }

    /// The likeliest of [`Mapping::columns`].
    pub(super) fn column(
        &self,
        what: &str,
        fields: &Fields,
        holds: impl Fn(&Cell) -> bool,
    ) -> Option<String> {
        self.columns(what, fields, holds).into_iter().next()
    }

    /// Whether a row is read from this column.
    pub(super) fn knows(&self, name: &str) -> bool {
        let small = name.to_ascii_lowercase();
        self.0.values().any(|named| begins(named, name))
            || USUAL.iter().any(|(_, names)| names.contains(&small.as_str()))
            || BESIDE.contains(&name)
            || numbered_image(name).is_some()
    }

    /// Puts what was named inside of an object, as in `body.messages`, among the columns.
    pub(super) fn open(&self, fields: &mut Fields) {
        for named in self.0.values() {
            if !fields.contains_key(named)
                && let Some(cell) = inside(fields, named)
            {
                fields.insert(named.clone(), cell);
            }
        }
    }

    /// Holds that every column that was named is in a table, and that one can be the query, unless
    /// somebody gives that (`has_query`).
    ///
    /// # Errors
    /// Says which columns there are.
    pub(super) fn fits_table(&self, columns: &[String], has_query: bool) -> Result<(), Cause> {
        self.fits(columns.iter(), |_, named| columns.iter().any(|column| begins(named, column)))?;
        let can_be = |column: &String| {
            QUERIES.iter().any(|what| match self.named(what) {
                Some(named) => begins(named, column),
                None => usual(what).iter().any(|usual| usual.eq_ignore_ascii_case(column)),
            })
        };
        if has_query || columns.iter().any(can_be) {
            return Ok(());
        }
        let there = cut(&columns.join(", ")).into_owned();
        Err(format!("no column is known to be the query: name it by --map query=COLUMN, or give one by --query; there are {there}").into())
    }

    /// Holds that every column that was named is in a row, if only as null. A row of JSON need not
    /// have what only names it.
    ///
    /// # Errors
    /// As [`Mapping::fits_table`].
    pub(super) fn fits_row(&self, fields: &Fields) -> Result<(), Cause> {
        self.fits(fields.keys(), |what, named| {
            matches!(what, "id" | "category") || fields.contains_key(named)
        })
    }

    fn fits<'a>(
        &self,
        columns: impl Iterator<Item = &'a String>,
        has: impl Fn(&str, &str) -> bool,
    ) -> Result<(), Cause> {
        let Some((what, named)) =
            self.0.iter().find(|(what, named)| !named.is_empty() && !has(what, named))
        else {
            return Ok(());
        };
        let columns: Vec<&str> = columns.map(String::as_str).collect();
        let there = cut(&columns.join(", ")).into_owned();
        Err(format!("--map {what}={named}: there is no such column; there are {there}").into())
    }

    /// Where the query may stand, in order: what was named, or all of the usual.
    pub(super) fn queries(&self) -> impl Iterator<Item = &'static str> {
        let is_named = |what: &str| self.named(what).is_some_and(|named| !named.is_empty());
        let are_named = QUERIES.into_iter().any(is_named);
        QUERIES.into_iter().filter(move |what| !are_named || is_named(what))
    }
}

fn usual(what: &str) -> &'static [&'static str] {
    USUAL.iter().find(|(known, _)| *known == what).map_or(&[], |(_, names)| names)
}

/// Whether a column may be the one that was named, or what it is inside of.
fn begins(named: &str, column: &str) -> bool {
    !column.is_empty()
        && named.strip_prefix(column).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// What stands at a path of names.
fn inside(fields: &Fields, path: &str) -> Option<Cell> {
    if let Some(cell) = fields.get(path) {
        return Some(cell.clone());
    }
    path.match_indices('.').find_map(|(dot, _)| match fields.get(&path[..dot])?.clone().opened() {
        Cell::Fields(inner) => inside(&inner, &path[dot + 1..]),
        _ => None,
    })
}

/// `image_2`, as benchmarks with several columns have it.
pub(super) fn numbered_image(name: &str) -> Option<usize> {
    let rest = name.strip_prefix("image")?;
    let digits = rest.strip_prefix('_').unwrap_or(rest);
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
}

/// Whether a column is called as images are.
pub(super) fn is_usual_image(name: &str) -> bool {
    numbered_image(name).is_some()
        || usual("image").iter().any(|usual| usual.eq_ignore_ascii_case(name))
}

/// Whether a column's name says that it is about an image.
pub(super) fn is_about_image(name: &str) -> bool {
    let small = name.to_ascii_lowercase();
    ["image", "img", "photo", "picture"].iter().any(|word| small.contains(word))
}

/// What the query of an object would be called, by the usual names.
pub(super) fn query_of(fields: &Fields) -> Option<(&'static str, String)> {
    let holds = |what: &str, cell: &Cell| match cell {
        Cell::Text(_) => what == "query" && !cell.is_empty(),
        cell => turns::is_talk(cell),
    };
    QUERIES.into_iter().find_map(|what| {
        Some((what, Mapping::default().column(what, fields, |cell| holds(what, cell))?))
    })
}

/// What to do about columns of which none is a query.
pub(super) fn advice(fields: &Fields, has_image: bool) -> Option<String> {
    let is_row = |cell: &Cell| matches!(cell, Cell::Fields(inner) if query_of(inner).is_some());
    if fields.len() > 1 && fields.values().all(is_row) {
        return Some("each of its columns is a row: write these as JSON lines or an array".into());
    }
    let is_list = |cell: &Cell| matches!(cell, Cell::List(list) if matches!(list.first(), Some(Cell::Fields(_))));
    let list = || {
        fields.iter().find(|(_, cell)| !has_image && is_list(cell)).map(|(name, _)| rows_in(name))
    };
    fields.iter().find_map(|(name, cell)| advice_on(name, cell, has_image)).or_else(list)
}

fn rows_in(list: &str) -> String {
    format!(
        "its rows stand in the list `{}`: write that list alone, as JSON lines or an array",
        cut(list)
    )
}

/// How the query inside of a column is named.
pub(super) fn named_in(path: &str, (what, column): &(&str, String)) -> String {
    format!("its query is named by --map {what}={}.{}", cut(path), cut(column))
}

/// As [`advice`], for what stands in a column.
pub(super) fn advice_on(path: &str, cell: &Cell, has_image: bool) -> Option<String> {
    let shown = cut(path);
    match cell {
        _ if turns::is_talk(cell) => {
            Some(format!("its conversation is named by --map messages={shown}"))
        }
        Cell::Fields(inner) => match query_of(inner) {
            Some(query) => Some(named_in(path, &query)),
            None => inner
                .iter()
                .find_map(|(name, cell)| advice_on(&format!("{path}.{name}"), cell, has_image)),
        },
        Cell::List(list) => match list.first() {
            Some(Cell::Fields(first)) if query_of(first).is_some() && has_image => Some(format!(
                "if the list `{shown}` is a conversation, --map conversations={shown} says so"
            )),
            Some(Cell::Fields(first)) if query_of(first).is_some() => Some(rows_in(path)),
            _ => None,
        },
        Cell::Text(text) if text.trim_start().starts_with(['[', '{']) => {
            match cell.clone().opened() {
                Cell::Text(_) => None,
                opened => advice_on(path, &opened, has_image),
            }
        }
        _ => None,
    }
}
