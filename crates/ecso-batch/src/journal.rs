//! A journal: a file of JSON lines, one per entry, each flushed after it is written. A header line
//! precedes the entries if the work may be resumed only under the same settings. After a crash, the
//! file can still be read and the work can be resumed.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File, Metadata, OpenOptions, TryLockError},
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write},
    marker::PhantomData,
    path::{Path, PathBuf},
};

use serde::{
    Deserialize, Serialize,
    de::{DeserializeOwned, IgnoredAny},
};

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

/// Errors of reading and writing journals.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// The file can't be read or written.
    #[error("{}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A line can't be parsed.
    #[error("{}: line {line} can't be parsed", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line number, from 1.
        line: usize,
        /// The cause.
        source: serde_json::Error,
    },
    /// Another process is writing the file.
    #[error(
        "{}: another process is writing this file; wait until it ends, or use another --out",
        path.display()
    )]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The path is a device, a pipe or a folder.
    #[error("{} is not a regular file; use another path", path.display())]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// The file has no lines, not even a header.
    #[error("{} is empty", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The file does not begin with a header of this kind.
    #[error("{} has no header, so it can't be resumed; use another --out", path.display())]
    NoHeader {
        /// The file.
        path: PathBuf,
    },
    /// An entry can't be serialized as JSON.
    #[error("an entry can't be serialized as JSON")]
    Entry(#[source] serde_json::Error),
    /// The work was started under other settings.
    #[error("{} was started with another {what}; use another --out, or delete it", path.display())]
    OtherSettings {
        /// The file.
        path: PathBuf,
        /// The setting that differs.
        what: &'static str,
    },
}

impl JournalError {
    /// Whether the user can fix the error by choosing another file or by waiting.
    #[must_use]
    pub fn is_misuse(&self) -> bool {
        match self {
            Self::Line { .. }
            | Self::InUse { .. }
            | Self::NotAFile { .. }
            | Self::Empty { .. }
            | Self::NoHeader { .. }
            | Self::OtherSettings { .. } => true,
            Self::File { .. } | Self::Entry(_) => false,
        }
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

/// The fields of an entry that are needed to resume the work.
#[derive(Deserialize)]
struct EntryFields {
    id: String,
    #[serde(default)]
    arm: String,
    #[serde(default)]
    made_of: String,
    #[serde(default)]
    error: Option<IgnoredAny>,
    #[serde(default)]
    filtered: bool,
    /// Whether this line deletes the entries before it in the same slot.
    #[serde(default, rename = "gone")]
    deleted: bool,
}

impl EntryFields {
    fn key(&self) -> Key {
        Key::new(&self.id, &self.arm).with_source(&self.made_of)
    }

    fn failed(&self) -> bool {
        self.error.is_some() && !self.filtered
    }
}

fn file_error(path: &Path, source: io::Error) -> JournalError {
    JournalError::File { path: path.to_owned(), source }
}

/// The lines of a journal, in order. A last line that was cut off by a crash is skipped; a complete
/// last line counts even without its line break.
struct Lines<R> {
    path: PathBuf,
    reader: BufReader<R>,
    text: Vec<u8>,
    /// How many lines were read.
    number: usize,
    /// The byte position after the last line that was read.
    end: u64,
    was_truncated: bool,
    /// Whether the last line has no line break.
    lacks_line_break: bool,
}

impl<R: Read> Lines<R> {
    fn new(path: &Path, file: R) -> Self {
        let reader = BufReader::with_capacity(1 << 18, file);
        Self {
            path: path.to_owned(),
            reader,
            text: Vec::new(),
            number: 0,
            end: 0,
            was_truncated: false,
            lacks_line_break: false,
        }
    }

    fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, JournalError> {
        self.text.clear();
        let read = self
            .reader
            .read_until(b'\n', &mut self.text)
            .map_err(|source| file_error(&self.path, source))?;
        if read == 0 {
            return Ok(None);
        }
        let lacks_line_break = self.text.last() != Some(&b'\n');
        match serde_json::from_slice(&self.text) {
            Err(error) if lacks_line_break && !error.is_data() => {
                self.was_truncated = true;
                Ok(None)
            }
            Err(source) => {
                Err(JournalError::Line { path: self.path.clone(), line: self.number + 1, source })
            }
            Ok(entry) => {
                self.number += 1;
                self.end += read as u64;
                self.lacks_line_break = lacks_line_break;
                Ok(Some(entry))
            }
        }
    }
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
    /// header; otherwise the file belongs to somebody else.
    ///
    /// # Errors
    /// As [`Journal::open`].
    pub fn open_file<H: JournalHeader>(path: &Path, header: &H) -> Result<Self, JournalError> {
        let file_error = |source| file_error(path, source);
        let mut file = open_locked(path)?;
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
        file.set_len(end).and_then(|()| file.seek(SeekFrom::End(0))).map_err(file_error)?;
        let mut journal = Self { path: path.to_owned(), file, was_truncated, index };
        if lacks_line_break {
            journal.add(b"\n")?;
        }
        if existing.is_none() {
            journal.add(&written)?;
        }
        Ok(journal)
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

    fn add(&mut self, line: &[u8]) -> Result<(), JournalError> {
        self.file
            .write_all(line)
            .and_then(|()| self.file.flush())
            .map_err(|source| file_error(&self.path, source))
    }
}

/// Opens the file for writing, and locks it for this process.
fn open_locked(path: &Path) -> Result<File, JournalError> {
    let open = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path);
    let file = open.map_err(|source| file_error(path, source))?;
    check_is_regular(path, file.metadata())?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(JournalError::InUse { path: path.to_owned() }),
        Err(TryLockError::Error(source)) => Err(file_error(path, source)),
    }
}

/// Checks that the file is a regular one: reading from others may never end.
fn check_is_regular(path: &Path, file: io::Result<Metadata>) -> Result<(), JournalError> {
    let is_file = file.map_err(|source| file_error(path, source))?.is_file();
    if is_file { Ok(()) } else { Err(JournalError::NotAFile { path: path.to_owned() }) }
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

/// Reads a journal, with or without a header. A last line that was cut off by a crash is skipped.
#[derive(Debug, Clone)]
pub struct JournalReader {
    path: PathBuf,
}

/// The first line: an entry has an id, a header does not.
#[derive(Deserialize)]
struct FirstLine {
    id: Option<IgnoredAny>,
}

impl JournalReader {
    /// A reader of the journal in an output folder.
    #[must_use]
    pub fn in_folder(out: &Path) -> Self {
        Self { path: path(out) }
    }

    /// A reader of a journal file.
    #[must_use]
    pub fn at(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    fn lines(&self) -> Result<Lines<File>, JournalError> {
        check_is_regular(&self.path, fs::metadata(&self.path))?;
        Ok(Lines::new(
            &self.path,
            File::open(&self.path).map_err(|source| file_error(&self.path, source))?,
        ))
    }

    /// The lines after the header, if there is one.
    fn entry_lines(&self) -> Result<Lines<File>, JournalError> {
        let mut lines = self.lines()?;
        match lines.next::<FirstLine>()? {
            Some(FirstLine { id: Some(_) }) => self.lines(),
            _ => Ok(lines),
        }
    }

    /// The header.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn header<H: JournalHeader>(&self) -> Result<H, JournalError> {
        self.lines()?.next()?.ok_or_else(|| JournalError::Empty { path: self.path.clone() })
    }

    /// All entries in file order, one by one, each with the byte position where it positions.
    ///
    /// # Errors
    /// [`JournalError`], also as an item of the iterator.
    pub fn entries<E: Entry>(&self) -> Result<Entries<E>, JournalError> {
        Ok(Entries { lines: self.entry_lines()?, entry: PhantomData })
    }

    /// The entries from the byte position `begin` on, which must be the beginning of an entry. This
    /// is used to read what was added since the last read, or to look up one entry. 0 is the first
    /// entry.
    ///
    /// # Errors
    /// As [`JournalReader::entries`].
    pub fn entries_from<E: Entry>(&self, begin: u64) -> Result<Entries<E>, JournalError> {
        if begin == 0 {
            return self.entries();
        }
        let mut lines = self.lines()?;
        lines
            .reader
            .seek(SeekFrom::Start(begin))
            .map_err(|source| file_error(&self.path, source))?;
        lines.end = begin;
        Ok(Entries { lines, entry: PhantomData })
    }

    /// The last entry of each slot, one by one in file order.
    ///
    /// # Errors
    /// [`JournalError`], also as an item of the iterator.
    pub fn latest<E: Entry>(&self) -> Result<LatestEntries<E>, JournalError> {
        let mut lines = self.entry_lines()?;
        let (mut last, mut begin) = (HashMap::new(), lines.end);
        while let Some(fields) = lines.next::<EntryFields>()? {
            if fields.deleted {
                last.remove(&fields.key().slot);
            } else {
                last.insert(fields.key().slot, begin);
            }
            begin = lines.end;
        }
        Ok(LatestEntries {
            positions: last.into_values().collect(),
            was_truncated: lines.was_truncated,
            lines: self.entry_lines()?,
            entry: PhantomData,
        })
    }
}

/// See [`JournalReader::entries`].
pub struct Entries<E> {
    lines: Lines<File>,
    entry: PhantomData<E>,
}

impl<E> Entries<E> {
    /// Whether a crash had cut off the last line; fields at the end.
    #[must_use]
    pub fn was_truncated(&self) -> bool {
        self.lines.was_truncated
    }

    /// The byte position after the last entry that was read.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.lines.end
    }
}

impl<E: Entry> Iterator for Entries<E> {
    type Item = Result<(u64, E), JournalError>;

    fn next(&mut self) -> Option<Self::Item> {
        let begin = self.lines.end;
        self.lines.next().map(|entry| entry.map(|entry| (begin, entry))).transpose()
    }
}

/// See [`JournalReader::latest`]. Takes about 40 bytes of memory per entry.
pub struct LatestEntries<E> {
    /// The byte positions of the last entry of each slot.
    positions: HashSet<u64>,
    was_truncated: bool,
    lines: Lines<File>,
    entry: PhantomData<E>,
}

impl<E> LatestEntries<E> {
    /// How many entries there are.
    #[must_use]
    pub fn total(&self) -> usize {
        self.positions.len()
    }

    /// Whether the last line had been cut off by a crash.
    #[must_use]
    pub fn was_truncated(&self) -> bool {
        self.was_truncated
    }
}

impl<E: Entry> Iterator for LatestEntries<E> {
    type Item = Result<E, JournalError>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.positions.contains(&self.lines.end) {
            match self.lines.next::<IgnoredAny>() {
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(error) => return Some(Err(error)),
            }
        }
        self.lines.next().transpose()
    }
}
