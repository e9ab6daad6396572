//! A run's journal: JSON lines, the header first, then one an item, each flushed. A crash leaves a file that can be read, and
//! a run that can go on.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io::{BufRead, BufReader, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use ecso::Outcome;
use serde::{Deserialize, Serialize};

use crate::item::Task;

/// What a run is: it goes on only under the same.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// Version of ecso.
    pub ecso: String,
    /// The benchmark's name.
    pub benchmark: String,
    /// Its variant.
    pub variant: Option<String>,
    /// Where its data was.
    pub data: PathBuf,
    /// The model's name.
    pub model: String,
    /// What the model is, to the bit where that can be known.
    pub model_digest: String,
    /// The profiles, as TOML, by name.
    pub profiles: Vec<(String, String)>,
    /// Cap of new tokens of every answer.
    pub max_new_tokens: Option<u32>,
    /// Which items.
    pub choice: Choice,
}

/// Which items of a benchmark are run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// Only these scenarios (those that begin with one of these texts); none is all.
    pub scenarios: Vec<String>,
    /// So many, drawn by `seed`.
    pub sample: Option<usize>,
    /// Seed of the draw.
    pub seed: u64,
    /// At most the first so many.
    pub limit: Option<usize>,
}

/// One item of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The item.
    pub id: String,
    /// Its scenario.
    pub scenario: String,
    /// What it shares with related items.
    pub cluster: String,
    /// What was sent.
    pub query: String,
    /// What is asked for, in words.
    pub request: String,
    /// What a good answer is.
    pub task: Task,
    /// How many images it has.
    pub images: usize,
    /// The answers: the unguarded one first (profile `unguarded`), then one a profile. Empty if the item failed.
    pub arms: Vec<Outcome>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What can go wrong with a journal.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// It can't be read or written.
    #[error("{path}: {reason}")]
    File {
        /// Which file.
        path: String,
        /// Why.
        reason: String,
    },
    /// It was begun under other settings.
    #[error("{path} was begun with another {what}; name another --out, or delete it")]
    OtherSettings {
        /// Which file.
        path: String,
        /// What differs.
        what: String,
    },
}

fn failed(path: &Path, error: &dyn std::fmt::Display) -> JournalError {
    JournalError::File { path: path.display().to_string(), reason: error.to_string() }
}

/// A journal that is written.
pub struct Journal {
    path: PathBuf,
    file: File,
    /// What is recorded so far: a hash of the id, and whether the item failed.
    done: HashMap<u64, bool>,
}

/// The journal's file in a run's folder.
#[must_use]
pub fn path(out: &Path) -> PathBuf {
    out.join("journal.jsonl")
}

impl Journal {
    /// Begins the run in `out`, or goes on with it. A line that a crash cut off is cut off for good.
    ///
    /// # Errors
    /// [`JournalError::OtherSettings`] if it was begun under another header.
    pub fn open(out: &Path, header: &Header) -> Result<Self, JournalError> {
        fs::create_dir_all(out).map_err(|error| failed(out, &error))?;
        let path = path(out);
        let mut file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&path);
        let file_ref = file.as_mut().map_err(|error| failed(&path, error))?;
        let mut done = HashMap::new();
        let mut good = 0;
        let mut reader = BufReader::new(&mut *file_ref);
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = reader.read_until(b'\n', &mut line).map_err(|error| failed(&path, &error))?;
            if read == 0 || line.last() != Some(&b'\n') {
                break;
            }
            if good == 0 {
                let begun: Header = serde_json::from_slice(&line).map_err(|error| failed(&path, &error))?;
                same(&path, &begun, header)?;
            } else {
                let entry: Entry = serde_json::from_slice(&line).map_err(|error| failed(&path, &error))?;
                done.insert(hash(&entry.id), entry.error.is_some());
            }
            good += read as u64;
        }
        let mut file = file.map_err(|error| failed(&path, &error))?;
        file.set_len(good).and_then(|()| file.seek(SeekFrom::End(0))).map_err(|error| failed(&path, &error))?;
        let mut journal = Self { path, file, done };
        if good == 0 {
            journal.write(header)?;
        }
        Ok(journal)
    }

    /// Whether an item needs no run: it is recorded, and did not fail or is not to be tried again.
    #[must_use]
    pub fn has(&self, id: &str, retry_failed: bool) -> bool {
        self.done.get(&hash(id)).is_some_and(|failed| !(*failed && retry_failed))
    }

    /// How many items are recorded.
    #[must_use]
    pub fn len(&self) -> usize {
        self.done.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.done.is_empty()
    }

    /// How many of them failed.
    #[must_use]
    pub fn failed(&self) -> usize {
        self.done.values().filter(|failed| **failed).count()
    }

    /// Records an item; of two records of one item the later counts.
    ///
    /// # Errors
    /// [`JournalError::File`].
    pub fn record(&mut self, record: &Record) -> Result<(), JournalError> {
        self.write(record)?;
        self.done.insert(hash(&record.id), record.error.is_some());
        Ok(())
    }

    fn write(&mut self, value: &impl Serialize) -> Result<(), JournalError> {
        let mut line = serde_json::to_vec(value).map_err(|error| failed(&self.path, &error))?;
        line.push(b'\n');
        self.file.write_all(&line).and_then(|()| self.file.flush()).map_err(|error| failed(&self.path, &error))
    }
}

/// As much of a record as a run needs to know to go on.
#[derive(Deserialize)]
struct Entry {
    id: String,
    #[serde(default)]
    error: Option<String>,
}

pub(crate) fn hash(id: &str) -> u64 {
    let bytes = *blake3::hash(id.as_bytes()).as_bytes();
    u64::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7]])
}

fn same(path: &Path, begun: &Header, header: &Header) -> Result<(), JournalError> {
    let differ = [
        ("version of ecso", begun.ecso != header.ecso),
        (
            "benchmark",
            begun.benchmark != header.benchmark || begun.variant != header.variant || begun.data != header.data,
        ),
        ("model", begun.model != header.model || begun.model_digest != header.model_digest),
        ("profile", begun.profiles != header.profiles),
        ("--max-new-tokens", begun.max_new_tokens != header.max_new_tokens),
        ("choice of items", begun.choice != header.choice),
    ];
    match differ.into_iter().find(|(_, differs)| *differs) {
        None => Ok(()),
        Some((what, _)) => Err(JournalError::OtherSettings { path: path.display().to_string(), what: what.into() }),
    }
}

/// Reads a run: its header and its records, each item once (the later record counts), in the order in which items were
/// first recorded. A line that a crash cut off is left out.
///
/// # Errors
/// [`JournalError::File`].
pub fn read(out: &Path) -> Result<(Header, Vec<Record>), JournalError> {
    let path = path(out);
    let file = File::open(&path).map_err(|error| failed(&path, &error))?;
    let mut lines = BufReader::new(file).split(b'\n');
    let first = lines.next().transpose().map_err(|error| failed(&path, &error))?.unwrap_or_default();
    let header = serde_json::from_slice(&first).map_err(|error| failed(&path, &error))?;
    let mut records: Vec<Record> = Vec::new();
    let mut places: HashMap<u64, usize> = HashMap::new();
    let mut torn: Option<serde_json::Error> = None;
    for line in lines {
        let line = line.map_err(|error| failed(&path, &error))?;
        if let Some(error) = torn.take() {
            return Err(failed(&path, &error));
        }
        match serde_json::from_slice::<Record>(&line) {
            Ok(record) => match places.entry(hash(&record.id)) {
                std::collections::hash_map::Entry::Occupied(place) => records[*place.get()] = record,
                std::collections::hash_map::Entry::Vacant(place) => {
                    place.insert(records.len());
                    records.push(record);
                }
            },
            Err(error) => torn = Some(error),
        }
    }
    Ok((header, records))
}
