//! What a run is, and what it records.

use std::{collections::HashMap, path::PathBuf};

use ecso::Image;
use ecso_batch::journal::{Entry, JournalHeader, Key};
use serde::{Deserialize, Serialize};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    input::{Input, InputError, Mapping, RowError},
    make::{Cost, Filters, Made},
    row::Row,
};

/// What a run is: it goes on only under the same.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunHeader {
    /// Version of ecso.
    pub ecso: String,
    /// Where the rows are.
    pub input: PathBuf,
    /// Which of their columns are what.
    #[serde(default)]
    pub mapping: Mapping,
    /// The query of rows that have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub query: Option<String>,
    /// Where relative image paths begin, if somebody said it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_root: Option<PathBuf>,
    /// The model's name.
    pub model: String,
    /// What the model is, to the bit where that can be known.
    pub model_digest: String,
    /// What its server says of it beside its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<String>,
    /// The profile's name, and the profile as TOML.
    pub profile: (String, String),
    /// What is asked of answers.
    pub filters: Filters,
    /// Whether near duplicates are dropped.
    pub near_duplicates: bool,
    /// Which part of the rows.
    pub shard: Shard,
}

impl RunHeader {
    /// The profile's name in provenance: the first 16 hexadecimal digits of the BLAKE3 of its text.
    #[must_use]
    pub fn profile_hash(&self) -> String {
        blake3::hash(self.profile.1.as_bytes()).to_hex()[..16].to_owned()
    }
}

impl JournalHeader for RunHeader {
    fn difference(&self, begun: &Self) -> Option<&'static str> {
        let differ = [
            ("version of ecso", begun.ecso != self.ecso),
            ("input", begun.input != self.input),
            ("--map", begun.mapping != self.mapping),
            ("--query", begun.query != self.query),
            ("--image-root", begun.image_root != self.image_root),
            ("model", begun.model != self.model || begun.model_digest != self.model_digest),
            ("model under the same name on the server", begun.server != self.server),
            ("profile, or fit of it that `ecso tune` kept,", begun.profile != self.profile),
            (
                "filter",
                begun.filters != self.filters || begun.near_duplicates != self.near_duplicates,
            ),
            ("--shard", begun.shard != self.shard),
        ];
        differ.into_iter().find(|(_, differs)| *differs).map(|(what, _)| what)
    }
}

/// One of several parts of an input, by what a row shows and asks: equal rows are in the same part,
/// so no part needs to know another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// Which, from 1.
    pub part: u32,
    /// Of how many.
    pub of: u32,
}

impl Shard {
    /// All rows.
    pub const ALL: Self = Self { part: 1, of: 1 };

    pub(crate) fn has(self, key: &str) -> bool {
        let lot = u32::from_str_radix(key.get(..8).unwrap_or_default(), 16).unwrap_or_default();
        lot % self.of.max(1) == self.part.saturating_sub(1)
    }
}

/// One row: a line of the journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RowRecord {
    /// The row's place in the input, from 0.
    pub id: String,
    /// What tells the row from another at that place: [`Row::digest`] or [`RowError::digest`].
    #[serde(default)]
    pub made_of: String,
    /// What the input calls it.
    pub source: String,
    /// [`Row::key`]; empty where the row or its images can't be read.
    #[serde(default)]
    pub key: String,
    /// BLAKE3 digests of its images.
    #[serde(default)]
    pub images: Vec<String>,
    /// Their perceptual hashes, where near duplicates are looked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub marks: Vec<String>,
    /// What is asked.
    #[serde(default)]
    pub query: String,
    /// Its category.
    #[serde(default)]
    pub category: String,
    /// What became of it; none if it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made: Option<Made>,
    /// What it took.
    #[serde(default)]
    pub cost: Cost,
    /// When, in RFC 3339.
    pub at: String,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// [`RowError::is_cut_short`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cut_short: bool,
}

impl Entry for RowRecord {
    fn id(&self) -> &str {
        &self.id
    }

    fn source_digest(&self) -> &str {
        &self.made_of
    }

    fn failed(&self) -> bool {
        self.error.is_some()
    }
}

impl RowRecord {
    /// That of a row as the input gives it, before its images are read.
    pub(crate) fn of(row: &Row) -> Self {
        Self {
            made_of: row.digest(),
            source: row.id.clone(),
            query: row.query.clone(),
            category: row.category.clone(),
            ..Self::blank(row.number)
        }
    }

    /// That of a row which can't be read.
    pub(crate) fn unreadable(error: &RowError) -> Self {
        let blank = Self::blank(error.number);
        Self {
            made_of: error.digest(),
            source: (error.number + 1).to_string(),
            error: Some(error.reason.to_string()),
            cut_short: error.is_cut_short(),
            ..blank
        }
    }

    fn blank(number: u64) -> Self {
        Self {
            id: number.to_string(),
            made_of: String::new(),
            source: String::new(),
            key: String::new(),
            images: Vec::new(),
            marks: Vec::new(),
            query: String::new(),
            category: String::new(),
            made: None,
            cost: Cost::default(),
            at: now(),
            error: None,
            cut_short: false,
        }
    }

    /// With the row's images, and its key.
    pub(crate) fn with(self, key: String, images: &[Image]) -> Self {
        let images = images.iter().map(|image| image.digest().to_hex().to_string()).collect();
        Self { key, images, ..self }
    }

    /// The row's number in the input.
    pub(crate) fn number(&self) -> u64 {
        self.id.parse().unwrap_or_default()
    }
}

/// This moment, in RFC 3339.
pub(crate) fn now() -> String {
    OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default()
}

/// Where the journal has a row, whatever is recorded there.
pub(crate) fn place(row: &Result<Row, RowError>) -> Key {
    let number = row.as_ref().map_or_else(|error| error.number, |row| row.number);
    Key::new(&number.to_string(), "")
}

/// The rows that an input has now. What is recorded of others counts no more.
#[derive(Default)]
pub(crate) struct Present(HashMap<u64, Key>);

impl Present {
    /// Reads the input, its images too.
    pub(crate) fn of(input: &Input) -> Result<Self, InputError> {
        let key = |row| {
            place(&row).with_source(&row.map_or_else(|error| error.digest(), |row| row.digest()))
        };
        Ok(Self(input.rows()?.map(key).map(|key| (key.slot(), key)).collect()))
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// The key of the row at a place.
    pub(crate) fn key(&self, place: Key) -> Key {
        self.0.get(&place.slot()).copied().unwrap_or(place)
    }

    /// Whether a record is about a row that the input has.
    pub(crate) fn has(&self, record: &RowRecord) -> bool {
        let key = record.key();
        self.0.get(&key.slot()).is_some_and(|row| key.matches(*row))
    }
}
