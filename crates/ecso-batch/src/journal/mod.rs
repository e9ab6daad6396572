//! A journal: a file of JSON lines, one per entry, each flushed after it is written. A header line
//! precedes the entries if the work may be resumed only under the same settings. After a crash, the
//! file can still be read and the work can be resumed.

mod error;
mod reader;

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions, TryLockError},
    io::Write,
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};

pub use error::JournalError;
use error::file_error;
pub use reader::{Entries, JournalReader, LatestEntries};
use reader::{EntryFields, FirstLine, Lines, check_is_regular};

/// The first line of a journal: the settings of the work. It can be resumed only under the same
/// ones.
pub trait JournalHeader: Serialize + DeserializeOwned {
    /// The name of the first setting that differs from those the work was started with.
    fn difference(&self, started: &Self) -> Option<&'static str>;
}

/// A line of a journal. As JSON it has a field `id` and may have `arm` and `made_of`. It has
/// `error` if it failed; what a content filter refused also has `filtered`, and does not count as a
/// failure.
pub trait Entry: Serialize + DeserializeOwned {
    /// Unique in the journal together with [`Entry::arm`], except for retries.
    fn id(&self) -> &str;

    /// Which of several entries with the same id this is; empty if there is only one.
    #[expect(
        clippy::unnecessary_literal_bound,
        reason = "implementations return text of their own"
    )]
    fn arm(&self) -> &str {
        ""
    }

    /// A digest of the source that the entry was made from (`made_of` in JSON): if the source
    /// changes, the entry is made again. Empty if the source is not checked.
    #[expect(
        clippy::unnecessary_literal_bound,
        reason = "implementations return text of their own"
    )]
    fn source_digest(&self) -> &str {
        ""
    }

    /// Whether the entry is retried when the user asks for that.
    fn failed(&self) -> bool;

    /// The entry's key.
    fn key(&self) -> Key {
        Key::new(self.id(), self.arm()).with_source(self.source_digest())
    }
}

/// Identifies an entry: a hash of id and arm (the slot that the entry takes in the journal), and a
/// hash of the digest of its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    slot: u64,
    /// 0 stands for any source.
    source: u64,
}

impl Key {
    /// The key of an entry, whatever its source is.
    #[must_use]
    pub fn new(id: &str, arm: &str) -> Self {
        Self { slot: hash([id, arm]), source: 0 }
    }

    /// This key, restricted to entries whose source has this digest.
    #[must_use]
    pub fn with_source(self, digest: &str) -> Self {
        Self { source: if digest.is_empty() { 0 } else { hash([digest]) }, ..self }
    }

    /// The entry's slot: of several entries in the same slot, the last one counts.
    #[must_use]
    pub fn slot(self) -> u64 {
        self.slot
    }

    /// Whether an entry recorded under `self` is the wanted one: it has the same slot, and
    /// the same source or an unspecified one.
    #[must_use]
    pub fn matches(self, wanted: Self) -> bool {
        self.slot == wanted.slot && (self.source == 0 || self.source == wanted.source)
    }
}

fn hash<const N: usize>(texts: [&str; N]) -> u64 {
    let mut hash = blake3::Hasher::new();
    for text in texts {
        hash.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
    }
    let mut bytes = [0; 8];
    hash.finalize_xof().fill(&mut bytes);
    u64::from_le_bytes(bytes)
}

/// The recorded entries by slot: each with its key and whether it failed.
#[derive(Default)]
struct Index {
    entries: HashMap<u64, (Key, bool)>,
    failed: usize,
}

impl Index {
    fn insert(&mut self, key: Key, failed: bool) {
        let earlier = self.entries.insert(key.slot, (key, failed));
        self.failed += usize::from(failed);
        self.failed -= usize::from(earlier.is_some_and(|(_, failed)| failed));
    }

    fn remove(&mut self, key: Key) {
        let earlier = self.entries.remove(&key.slot);
        self.failed -= usize::from(earlier.is_some_and(|(_, failed)| failed));
    }
}

/// The path of the journal in an output folder.
#[must_use]
pub fn path(out: &Path) -> PathBuf {
    out.join("journal.jsonl")
}

/// A journal that is open for writing.
pub struct Journal {
    path: PathBuf,
    file: File,
    /// Length of the file up to its last complete line.
    end: u64,
    /// Whether something incomplete may follow `end`, because a write failed.
    is_torn: bool,
    was_truncated: bool,
    index: Index,
}

impl Journal {
    /// Opens the journal in the folder `out`, and creates both if they do not exist.
    ///
    /// # Errors
    /// [`JournalError`]; [`JournalError::OtherSettings`] if the journal has another header.
    pub fn open(out: &Path, header: &impl JournalHeader) -> Result<Self, JournalError> {
        fs::create_dir_all(out).map_err(|source| file_error(out, source))?;
        Self::open_file(&path(out), header)
    }

    /// Opens a journal file, and creates it if it does not exist. A last entry that was cut off by
    /// a crash is removed. A header that was cut off is removed only if it is the beginning of this
    /// header; otherwise the file is not ours.
    ///
    /// # Errors
    /// As [`Journal::open`].
    pub fn open_file<H: JournalHeader>(path: &Path, header: &H) -> Result<Self, JournalError> {
        let file_error = |source| file_error(path, source);
        let file = open_locked(path)?;
        if let Some(FirstLine { id: Some(_) }) = JournalReader::at(path).lines()?.next()? {
            return Err(JournalError::NoHeader { path: path.to_owned() });
        }
        let mut lines = Lines::new(path, file.try_clone().map_err(file_error)?);
        let (existing, written) = (lines.next::<H>()?, line(header)?);
        if existing.is_none() && !written.starts_with(&lines.text) {
            return Err(JournalError::NoHeader { path: path.to_owned() });
        }
        if let Some(what) = existing.as_ref().and_then(|existing| header.difference(existing)) {
            return Err(JournalError::OtherSettings { path: path.to_owned(), what });
        }
        let mut index = Index::default();
        while let Some(fields) = lines.next::<EntryFields>()? {
            if fields.deleted {
                index.remove(fields.key());
            } else {
                index.insert(fields.key(), fields.failed());
            }
        }
        let Lines { end, was_truncated, lacks_line_break, .. } = lines;
        let path = path.to_owned();
        let mut journal = Self { path, file, end, is_torn: true, was_truncated, index };
        journal.repair()?;
        if lacks_line_break {
            journal.add(b"\n")?;
        }
        if existing.is_none() {
            journal.add(&written)?;
        }
        Ok(journal)
    }

    /// The journal's file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the last line had been cut off by a crash.
    #[must_use]
    pub fn was_truncated(&self) -> bool {
        self.was_truncated
    }

    /// Whether the entry need not be made: it is recorded, and did not fail or is not to be
    /// retried.
    #[must_use]
    pub fn has(&self, key: Key, retry_failed: bool) -> bool {
        let entry = self.index.entries.get(&key.slot);
        entry.is_some_and(|(recorded, failed)| recorded.matches(key) && !(*failed && retry_failed))
    }

    /// Whether there is an entry in the slot of `key`, whatever its source.
    #[must_use]
    pub fn has_slot(&self, key: Key) -> bool {
        self.index.entries.contains_key(&key.slot)
    }

    /// Whether the entry in the slot of `key` failed.
    #[must_use]
    pub fn has_failed(&self, key: Key) -> bool {
        self.index.entries.get(&key.slot).is_some_and(|(_, failed)| *failed)
    }

    /// How many entries are recorded, counting each slot once.
    #[must_use]
    pub fn len(&self) -> usize {
        self.index.entries.len()
    }

    /// Whether no entry is recorded.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.index.entries.is_empty()
    }

    /// How many of the recorded entries failed.
    #[must_use]
    pub fn failed(&self) -> usize {
        self.index.failed
    }

    /// Records an entry. Of several entries in the same slot, the last one counts.
    ///
    /// # Errors
    /// [`JournalError::File`], [`JournalError::Entry`].
    pub fn record(&mut self, entry: &impl Entry) -> Result<(), JournalError> {
        self.write(&EncodedEntry::of(entry)?)
    }

    /// Deletes the entry with this `id` and without an arm.
    ///
    /// # Errors
    /// [`JournalError::File`], [`JournalError::Entry`].
    pub fn remove(&mut self, id: &str) -> Result<(), JournalError> {
        self.add(&line(&Deletion { id, deleted: true })?)?;
        self.index.remove(Key::new(id, ""));
        Ok(())
    }

    pub(crate) fn write(&mut self, line: &EncodedEntry) -> Result<(), JournalError> {
        self.add(&line.text)?;
        self.index.insert(line.key, line.failed);
        Ok(())
    }

    /// Adds a complete line. If that fails, the next call first removes what was written of it.
    fn add(&mut self, line: &[u8]) -> Result<(), JournalError> {
        self.repair()?;
        self.is_torn = true;
        self.file
            .write_all(line)
            .and_then(|()| self.file.flush())
            .map_err(|source| file_error(&self.path, source))?;
        (self.end, self.is_torn) = (self.end + line.len() as u64, false);
        Ok(())
    }

    /// Removes what follows the last complete line.
    fn repair(&mut self) -> Result<(), JournalError> {
        if self.is_torn {
            let length = self.file.metadata().map(|file| file.len());
            length
                .and_then(|length| self.file.set_len(length.min(self.end)))
                .map_err(|source| file_error(&self.path, source))?;
            self.is_torn = false;
        }
        Ok(())
    }
}

/// Opens the file for writing, and locks it for this process.
fn open_locked(path: &Path) -> Result<File, JournalError> {
    let open = OpenOptions::new().create(true).read(true).append(true).open(path);
    let file = open.map_err(|source| file_error(path, source))?;
    check_is_regular(path, file.metadata())?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(JournalError::InUse { path: path.to_owned() }),
        Err(TryLockError::Error(source)) => Err(file_error(path, source)),
    }
}

/// The line that [`Journal::remove`] writes.
#[derive(Serialize)]
struct Deletion<'a> {
    id: &'a str,
    #[serde(rename = "gone")]
    deleted: bool,
}

/// An entry serialized as a line.
pub(crate) struct EncodedEntry {
    text: Vec<u8>,
    key: Key,
    failed: bool,
}

impl EncodedEntry {
    pub(crate) fn of(entry: &impl Entry) -> Result<Self, JournalError> {
        Ok(Self { text: line(entry)?, key: entry.key(), failed: entry.failed() })
    }
}

fn line(value: &impl Serialize) -> Result<Vec<u8>, JournalError> {
    let mut line = serde_json::to_vec(value).map_err(JournalError::Entry)?;
    line.push(b'\n');
    Ok(line)
}
