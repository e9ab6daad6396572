//! A journal: JSON lines, a header first, then one an entry, each flushed. A crash leaves a file that can be read, and work that
//! can go on. A run of a benchmark is one; who does other long work (the data engine) brings a header and entries of its own.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io::{BufRead, BufReader, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use ecso::{FinishReason, Outcome, Step};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::item::Task;

/// The first line of a journal: what the work is. It goes on only under the same.
pub trait Head: Serialize + DeserializeOwned {
    /// What is not as it was when the work was begun.
    fn differs(&self, begun: &Self) -> Option<&'static str>;
}

/// A line of a journal. As JSON it has the fields `id` and, if it failed, `error`.
pub trait Entry: Serialize + DeserializeOwned {
    /// Unique in the journal, but for later tries.
    fn id(&self) -> &str;

    /// Whether it is to be tried again when somebody asks for that.
    fn failed(&self) -> bool;
}

/// What a run is.
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
    /// Whether it failed because a content filter in front of the model refused it: an outcome of its own, and no failure to
    /// be tried again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub filtered: bool,
}

impl Record {
    /// Whether a content filter stands in the place of an arm's answer: it refused the item, or cut the answer before its
    /// first word.
    #[must_use]
    pub fn is_filtered(&self, arm: &str) -> bool {
        self.filtered || self.arms.iter().any(|outcome| outcome.profile == arm && is_cut(outcome))
    }
}

/// Whether a content filter cut an answer before its first word.
#[must_use]
pub fn is_cut(outcome: &Outcome) -> bool {
    let last = outcome.steps.iter().rfind(|step| matches!(step.step, Step::Direct | Step::Safe));
    outcome.answer.trim().is_empty() && last.is_some_and(|step| step.finish == FinishReason::ContentFilter)
}

impl Head for Header {
    fn differs(&self, begun: &Self) -> Option<&'static str> {
        let differ = [
            ("version of ecso", begun.ecso != self.ecso),
            (
                "benchmark",
                begun.benchmark != self.benchmark || begun.variant != self.variant || begun.data != self.data,
            ),
            ("model", begun.model != self.model || begun.model_digest != self.model_digest),
            ("profile", begun.profiles != self.profiles),
            ("--max-new-tokens", begun.max_new_tokens != self.max_new_tokens),
            ("choice of items", begun.choice != self.choice),
        ];
        differ.into_iter().find(|(_, differs)| *differs).map(|(what, _)| what)
    }
}

impl Entry for Record {
    fn id(&self) -> &str {
        &self.id
    }

    fn failed(&self) -> bool {
        self.error.is_some() && !self.filtered
    }
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

/// A file of JSON lines that is added to, each flushed.
pub struct Lines {
    path: PathBuf,
    file: File,
    was_cut: bool,
}

impl Lines {
    /// Opens the file, or begins it, and gives each of its lines to `each`. A last line that a crash cut off is cut off for
    /// good.
    ///
    /// # Errors
    /// [`JournalError::File`], and what `each` says.
    pub fn open(
        path: &Path,
        mut each: impl FnMut(usize, &[u8]) -> Result<(), JournalError>,
    ) -> Result<Self, JournalError> {
        let told = |error: std::io::Error| failed(path, &error);
        let mut file =
            OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path).map_err(told)?;
        let mut reader = BufReader::new(&mut file);
        let (mut line, mut good, mut number) = (Vec::new(), 0, 0);
        let was_cut = loop {
            line.clear();
            let read = reader.read_until(b'\n', &mut line).map_err(told)?;
            if read == 0 || line.last() != Some(&b'\n') {
                break read > 0;
            }
            each(number, &line)?;
            number += 1;
            good += read as u64;
        };
        file.set_len(good).and_then(|()| file.seek(SeekFrom::End(0))).map_err(told)?;
        Ok(Self { path: path.to_owned(), file, was_cut })
    }

    /// Whether a crash had cut off the last line.
    #[must_use]
    pub fn was_cut(&self) -> bool {
        self.was_cut
    }

    /// Adds a line.
    ///
    /// # Errors
    /// [`JournalError::File`].
    pub fn add(&mut self, value: &impl Serialize) -> Result<(), JournalError> {
        let mut line = serde_json::to_vec(value).map_err(|error| failed(&self.path, &error))?;
        line.push(b'\n');
        self.file.write_all(&line).and_then(|()| self.file.flush()).map_err(|error| failed(&self.path, &error))
    }
}

/// Reads a line of a file, number `number` counted from 0.
///
/// # Errors
/// [`JournalError::File`], with the line.
pub fn line<T: DeserializeOwned>(path: &Path, number: usize, line: &[u8]) -> Result<T, JournalError> {
    serde_json::from_slice(line).map_err(|error| failed(path, &format_args!("line {}: {error}", number + 1)))
}

/// A journal that is written.
pub struct Journal {
    lines: Lines,
    /// What is recorded so far: a hash of the id, and whether the item failed.
    done: HashMap<u64, bool>,
}

/// The journal's file in a run's folder.
#[must_use]
pub fn path(out: &Path) -> PathBuf {
    out.join("journal.jsonl")
}

impl Journal {
    /// Begins the run in `out`, or goes on with it.
    ///
    /// # Errors
    /// [`JournalError::OtherSettings`] if it was begun under another header.
    pub fn open<H: Head>(out: &Path, header: &H) -> Result<Self, JournalError> {
        fs::create_dir_all(out).map_err(|error| failed(out, &error))?;
        let path = path(out);
        let (mut done, mut is_begun) = (HashMap::new(), false);
        let mut lines = Lines::open(&path, |number, text| {
            is_begun = true;
            if number == 0 {
                let begun: H = line(&path, number, text)?;
                return header.differs(&begun).map_or(Ok(()), |what| {
                    Err(JournalError::OtherSettings { path: path.display().to_string(), what: what.into() })
                });
            }
            let entry: Known = line(&path, number, text)?;
            done.insert(hash(&entry.id), entry.error.is_some() && !entry.filtered);
            Ok(())
        })?;
        if !is_begun {
            lines.add(header)?;
        }
        Ok(Self { lines, done })
    }

    /// Whether a crash had cut off the last line.
    #[must_use]
    pub fn was_cut(&self) -> bool {
        self.lines.was_cut()
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

    /// Records an entry; of two entries of one id the later counts.
    ///
    /// # Errors
    /// [`JournalError::File`].
    pub fn record(&mut self, entry: &impl Entry) -> Result<(), JournalError> {
        self.lines.add(entry)?;
        self.done.insert(hash(entry.id()), entry.failed());
        Ok(())
    }
}

/// As much of an entry as is needed to go on.
#[derive(Deserialize)]
struct Known {
    id: String,
    #[serde(default)]
    error: Option<String>,
    #[serde(default)]
    filtered: bool,
}

pub(crate) fn hash(id: &str) -> u64 {
    let bytes = *blake3::hash(id.as_bytes()).as_bytes();
    u64::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7]])
}

/// The header of the journal in `out`.
///
/// # Errors
/// [`JournalError::File`].
pub fn header<H: Head>(out: &Path) -> Result<H, JournalError> {
    let path = path(out);
    let file = File::open(&path).map_err(|error| failed(&path, &error))?;
    let first = BufReader::new(file).split(b'\n').next().transpose().map_err(|error| failed(&path, &error))?;
    serde_json::from_slice(&first.unwrap_or_default()).map_err(|error| failed(&path, &error))
}

/// The entries of the journal in `out` as they lie, one by one, each with the byte where it begins. A line that a crash cut off
/// is left out.
///
/// # Errors
/// [`JournalError::File`].
pub fn records<E: Entry>(
    out: &Path,
) -> Result<impl Iterator<Item = Result<(u64, E), JournalError>> + use<E>, JournalError> {
    let path = path(out);
    let mut reader = BufReader::new(File::open(&path).map_err(|error| failed(&path, &error))?);
    let (mut line, mut place, mut is_header) = (Vec::new(), 0, true);
    Ok(std::iter::from_fn(move || {
        loop {
            line.clear();
            let begin = place;
            match reader.read_until(b'\n', &mut line) {
                Err(error) => return Some(Err(failed(&path, &error))),
                Ok(_) if line.last() != Some(&b'\n') => return None,
                Ok(read) => place += read as u64,
            }
            if !std::mem::take(&mut is_header) {
                let entry = serde_json::from_slice(&line).map_err(|error| failed(&path, &error));
                return Some(entry.map(|entry| (begin, entry)));
            }
        }
    }))
}

/// Reads a run: its header and its records, each item once (the later record counts), in the order in which items were
/// first recorded. A line that a crash cut off is left out.
///
/// # Errors
/// [`JournalError::File`].
pub fn read(out: &Path) -> Result<(Header, Vec<Record>), JournalError> {
    let mut known: Vec<Record> = Vec::new();
    let mut places: HashMap<u64, usize> = HashMap::new();
    for record in records::<Record>(out)? {
        let (_, record) = record?;
        match places.entry(hash(&record.id)) {
            std::collections::hash_map::Entry::Occupied(place) => known[*place.get()] = record,
            std::collections::hash_map::Entry::Vacant(place) => {
                place.insert(known.len());
                known.push(record);
            }
        }
    }
    Ok((header(out)?, known))
}
