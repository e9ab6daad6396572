//! The header of a run and its records.

use std::{collections::HashMap, fmt, path::PathBuf, str::FromStr};

use ecso::Image;
use ecso_batch::journal::{Entry, JournalHeader, Key};
use serde::{Deserialize, Serialize};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    generate::{Cost, Filters, RowOutcome},
    input::{Input, InputError, Mapping, RowError},
    row::Row,
};

/// What identifies a run: only the same run can be resumed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunHeader {
    /// Version of ecso.
    pub ecso: String,
    /// Where the rows are.
    pub input: PathBuf,
    /// Which columns hold which fields.
    #[serde(default)]
    pub mapping: Mapping,
    /// The query for rows without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub query: Option<String>,
    /// The folder that relative image paths start from, if set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_root: Option<PathBuf>,
    /// The model's name.
    pub model: String,
    /// Identifies the model, by the digests of its files if these are known.
    pub model_digest: String,
    /// What its server says about it besides its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<String>,
    /// The profile's name, and the profile as TOML.
    pub profile: (String, String),
    /// Requirements on answers.
    pub filters: Filters,
    /// Whether near duplicates are dropped.
    pub near_duplicates: bool,
    /// The part of the rows that is processed.
    pub shard: Shard,
}

impl RunHeader {
    /// Identifies the profile in provenance: 16 hexadecimal digits of the BLAKE3 hash of its text.
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
            ("profile, --max-new-tokens or fit by `ecso tune`", begun.profile != self.profile),
            (
                "filter",
                begun.filters != self.filters || begun.near_duplicates != self.near_duplicates,
            ),
            ("--shard", begun.shard != self.shard),
        ];
        differ.into_iter().find(|(_, differs)| *differs).map(|(what, _)| what)
    }
}

/// One of several disjoint parts of an input. Rows are assigned by content, so equal rows are in
/// the same part and no part needs to know the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// The number of the part, from 1.
    pub part: u32,
    /// The number of parts.
    pub of: u32,
}

impl Shard {
    /// All rows.
    pub const ALL: Self = Self { part: 1, of: 1 };

    /// Whether the row with this [`Row::key`] belongs to the shard.
    pub(crate) fn contains(self, key: &str) -> bool {
        let prefix = u32::from_str_radix(key.get(..8).unwrap_or_default(), 16).unwrap_or_default();
        prefix % self.of.max(1) == self.part.saturating_sub(1)
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.part, self.of)
    }
}

/// A text is not a [`Shard`].
#[derive(Debug, thiserror::Error)]
#[error("write I/N, from 1/N to N/N")]
pub struct ShardError;

impl FromStr for Shard {
    type Err = ShardError;

    fn from_str(text: &str) -> Result<Self, ShardError> {
        let (part, of) = text.split_once('/').ok_or(ShardError)?;
        let number = |text: &str| text.parse().map_err(|_| ShardError);
        let shard = Self { part: number(part)?, of: number(of)? };
        if (1..=shard.of).contains(&shard.part) { Ok(shard) } else { Err(ShardError) }
    }
}

/// The record of one row: a line of the journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RowRecord {
    /// The row's number in the input, from 0.
    pub id: String,
    /// Identifies the row among rows with its number: [`Row::digest`] or [`RowError::digest`].
    #[serde(default)]
    pub made_of: String,
    /// The row's id in the input.
    pub source: String,
    /// [`Row::key`]; empty if the row or its images can't be read.
    #[serde(default)]
    pub key: String,
    /// BLAKE3 digests of its images.
    #[serde(default)]
    pub images: Vec<String>,
    /// Their perceptual hashes, if near duplicates are dropped.
    #[serde(default, rename = "marks", skip_serializing_if = "Vec::is_empty")]
    pub image_hashes: Vec<String>,
    /// The query.
    #[serde(default)]
    pub query: String,
    /// The category.
    #[serde(default)]
    pub category: String,
    /// What the row became; none if it failed.
    #[serde(default, rename = "made", skip_serializing_if = "Option::is_none")]
    pub outcome: Option<RowOutcome>,
    /// What it cost.
    #[serde(default)]
    pub cost: Cost,
    /// When it was processed, in RFC 3339.
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
    /// The record of a row before its images are read.
    pub(crate) fn new(row: &Row) -> Self {
        Self {
            made_of: row.digest(),
            source: row.id.clone(),
            query: row.query.clone(),
            category: row.category.clone(),
            ..Self::blank(row.number)
        }
    }

    /// The record of a row that can't be read.
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
            image_hashes: Vec::new(),
            query: String::new(),
            category: String::new(),
            outcome: None,
            cost: Cost::default(),
            at: now(),
            error: None,
            cut_short: false,
        }
    }

    /// Adds the row's key and the digests of its images.
    pub(crate) fn with_images(self, key: String, images: &[Image]) -> Self {
        let images = images.iter().map(|image| image.digest().to_hex()).collect();
        Self { key, images, ..self }
    }

    /// The row's number in the input.
    pub(crate) fn number(&self) -> u64 {
        self.id.parse().unwrap_or_default()
    }
}

/// The current time, in RFC 3339.
pub(crate) fn now() -> String {
    OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default()
}

/// The key of a row's number in the journal, whatever is recorded under it.
pub(crate) fn number_key(row: &Result<Row, RowError>) -> Key {
    let number = row.as_ref().map_or_else(|error| error.number, |row| row.number);
    Key::new(&number.to_string(), "")
}

/// The rows that an input has now. Records of other rows no longer count.
#[derive(Default)]
pub(crate) struct CurrentRows(HashMap<u64, Key>);

impl CurrentRows {
    /// Reads the input, including its images.
    pub(crate) fn read(input: &Input) -> Result<Self, InputError> {
        let key = |row| {
            number_key(&row)
                .with_source(&row.map_or_else(|error| error.digest(), |row| row.digest()))
        };
        Ok(Self(input.rows()?.map(key).map(|key| (key.slot(), key)).collect()))
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// The key of the row with this [`number_key`].
    pub(crate) fn key(&self, number: Key) -> Key {
        self.0.get(&number.slot()).copied().unwrap_or(number)
    }

    /// Whether a record is of a current row.
    pub(crate) fn contains(&self, record: &RowRecord) -> bool {
        let key = record.key();
        self.0.get(&key.slot()).is_some_and(|row| key.matches(*row))
    }
}
