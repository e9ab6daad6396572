//! A journal: JSON lines, one an entry, each flushed; before them, where the work is to go on only under the same settings, a header.
//! A crash leaves a file that can be read, and work that can go on.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write},
    marker::PhantomData,
    path::{Path, PathBuf},
};

use serde::{
    Deserialize, Serialize,
    de::{DeserializeOwned, IgnoredAny},
};

/// The first line of a journal: what the work is. It goes on only under the same.
pub trait Head: Serialize + DeserializeOwned {
    /// What is not as it was when the work was begun.
    fn differs(&self, begun: &Self) -> Option<&'static str>;
}

/// A line of a journal. As JSON it has a field `id`, may have `arm`, and has an `error` if it failed; but what a content filter
/// refused has `filtered` beside it, and is no failure.
pub trait Entry: Serialize + DeserializeOwned {
    /// Unique in the journal together with [`Entry::arm`], but for later tries.
    fn id(&self) -> &str;

    /// Which of several entries of one id it is; empty where there is one.
    #[expect(clippy::unnecessary_literal_bound, reason = "others have a text of their own")]
    fn arm(&self) -> &str {
        ""
    }

    /// Whether it is to be tried again when somebody asks for that.
    fn failed(&self) -> bool;
}

/// What can go wrong with a journal.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// It can't be read or written.
    #[error("{}", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A line of it can't be understood.
    #[error("{}: line {line}", path.display())]
    Line {
        /// Which file.
        path: PathBuf,
        /// Which line, from 1.
        line: usize,
        /// Why.
        source: serde_json::Error,
    },
    /// Another process writes it.
    #[error("{}: another process writes it; wait for its end, or name another --out", path.display())]
    InUse {
        /// Which file.
        path: PathBuf,
    },
    /// It has not even a header.
    #[error("{} is empty", path.display())]
    Empty {
        /// Which file.
        path: PathBuf,
    },
    /// An entry can't be written as JSON.
    #[error("an entry can't be written")]
    Entry(#[source] serde_json::Error),
    /// It was begun under other settings.
    #[error("{} was begun with another {what}; name another --out, or delete it", path.display())]
    OtherSettings {
        /// Which file.
        path: PathBuf,
        /// What differs.
        what: &'static str,
    },
}

/// What tells entries apart: a hash of id and arm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key(u64);

impl Key {
    /// The key of an entry.
    #[must_use]
    pub fn of(id: &str, arm: &str) -> Self {
        let mut hash = blake3::Hasher::new();
        hash.update(&(id.len() as u64).to_le_bytes()).update(id.as_bytes()).update(arm.as_bytes());
        let mut bytes = [0; 8];
        hash.finalize_xof().fill(&mut bytes);
        Self(u64::from_le_bytes(bytes))
    }
}

/// As much of an entry as is needed to go on.
#[derive(Deserialize)]
struct Known {
    id: String,
    #[serde(default)]
    arm: String,
    #[serde(default)]
    error: Option<IgnoredAny>,
    #[serde(default)]
    filtered: bool,
}

impl Known {
    fn key(&self) -> Key {
        Key::of(&self.id, &self.arm)
    }

    fn failed(&self) -> bool {
        self.error.is_some() && !self.filtered
    }
}

fn failed(path: &Path, source: io::Error) -> JournalError {
    JournalError::File { path: path.to_owned(), source }
}

/// The lines of a journal, in order. A last one that a crash cut off is left out.
struct Lines<R> {
    path: PathBuf,
    reader: BufReader<R>,
    text: Vec<u8>,
    /// How many were read.
    number: usize,
    /// Where the last of them ends.
    end: u64,
    was_cut: bool,
}

impl<R: Read> Lines<R> {
    fn of(path: &Path, file: R) -> Self {
        let reader = BufReader::with_capacity(1 << 18, file);
        Self { path: path.to_owned(), reader, text: Vec::new(), number: 0, end: 0, was_cut: false }
    }

    fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, JournalError> {
        self.text.clear();
        let read = self.reader.read_until(b'\n', &mut self.text).map_err(|source| failed(&self.path, source))?;
        if self.text.last() != Some(&b'\n') {
            self.was_cut = read > 0;
            return Ok(None);
        }
        self.number += 1;
        self.end += read as u64;
        let unclear = |source| JournalError::Line { path: self.path.clone(), line: self.number, source };
        serde_json::from_slice(&self.text).map(Some).map_err(unclear)
    }
}

/// What is recorded: each entry, and whether it failed.
#[derive(Default)]
struct Recorded {
    entries: HashMap<Key, bool>,
    failed: usize,
}

impl Recorded {
    fn note(&mut self, key: Key, failed: bool) {
        let earlier = self.entries.insert(key, failed);
        self.failed += usize::from(failed);
        self.failed -= usize::from(earlier == Some(true));
    }
}

/// The journal's file in a folder of work.
#[must_use]
pub fn path(out: &Path) -> PathBuf {
    out.join("journal.jsonl")
}

/// A journal that is written.
pub struct Journal {
    path: PathBuf,
    file: File,
    was_cut: bool,
    recorded: Recorded,
}

impl Journal {
    /// Begins the work in the folder `out`, or goes on with it.
    ///
    /// # Errors
    /// [`JournalError`]; [`JournalError::OtherSettings`] if it was begun under another header.
    pub fn open<H: Head>(out: &Path, header: &H) -> Result<Self, JournalError> {
        fs::create_dir_all(out).map_err(|source| failed(out, source))?;
        let path = path(out);
        let file = writable(&path)?;
        let mut lines = Lines::of(&path, file.try_clone().map_err(|source| failed(&path, source))?);
        let begun: Option<H> = lines.next()?;
        if let Some(what) = begun.as_ref().and_then(|begun| header.differs(begun)) {
            return Err(JournalError::OtherSettings { path, what });
        }
        let mut journal = Self::behind(lines, file)?;
        if begun.is_none() {
            journal.add(&line(header)?)?;
        }
        Ok(journal)
    }

    /// Begins a file of entries without a header, or goes on with it.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn open_file(path: &Path) -> Result<Self, JournalError> {
        let file = writable(path)?;
        let lines = Lines::of(path, file.try_clone().map_err(|source| failed(path, source))?);
        Self::behind(lines, file)
    }

    /// The journal behind its last entry. A line that a crash cut off is cut off for good.
    fn behind(mut lines: Lines<File>, mut file: File) -> Result<Self, JournalError> {
        let mut recorded = Recorded::default();
        while let Some(known) = lines.next::<Known>()? {
            recorded.note(known.key(), known.failed());
        }
        let Lines { path, end, was_cut, .. } = lines;
        file.set_len(end).and_then(|()| file.seek(SeekFrom::End(0))).map_err(|source| failed(&path, source))?;
        Ok(Self { path, file, was_cut, recorded })
    }

    /// Whether a crash had cut off the last line.
    #[must_use]
    pub fn was_cut(&self) -> bool {
        self.was_cut
    }

    /// Whether an entry need not be made: it is recorded, and did not fail or is not to be tried again.
    #[must_use]
    pub fn has(&self, key: Key, retry_failed: bool) -> bool {
        self.recorded.entries.get(&key).is_some_and(|failed| !(*failed && retry_failed))
    }

    /// How many entries are recorded, each id and arm once.
    #[must_use]
    pub fn len(&self) -> usize {
        self.recorded.entries.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.recorded.entries.is_empty()
    }

    /// How many of them failed.
    #[must_use]
    pub fn failed(&self) -> usize {
        self.recorded.failed
    }

    /// Records an entry; of two of one id and arm the later counts.
    ///
    /// # Errors
    /// [`JournalError::File`], [`JournalError::Entry`].
    pub fn record(&mut self, entry: &impl Entry) -> Result<(), JournalError> {
        self.write(&Line::of(entry)?)
    }

    pub(crate) fn write(&mut self, line: &Line) -> Result<(), JournalError> {
        self.add(&line.text)?;
        self.recorded.note(line.key, line.failed);
        Ok(())
    }

    fn add(&mut self, line: &[u8]) -> Result<(), JournalError> {
        self.file.write_all(line).and_then(|()| self.file.flush()).map_err(|source| failed(&self.path, source))
    }
}

/// The file, for this process alone to write.
fn writable(path: &Path) -> Result<File, JournalError> {
    let open = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path);
    let file = open.map_err(|source| failed(path, source))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(JournalError::InUse { path: path.to_owned() }),
        Err(TryLockError::Error(source)) => Err(failed(path, source)),
    }
}

/// An entry as it is written.
pub(crate) struct Line {
    text: Vec<u8>,
    key: Key,
    failed: bool,
}

impl Line {
    pub(crate) fn of(entry: &impl Entry) -> Result<Self, JournalError> {
        let key = Key::of(entry.id(), entry.arm());
        Ok(Self { text: line(entry)?, key, failed: entry.failed() })
    }
}

fn line(value: &impl Serialize) -> Result<Vec<u8>, JournalError> {
    let mut line = serde_json::to_vec(value).map_err(JournalError::Entry)?;
    line.push(b'\n');
    Ok(line)
}

/// A journal that is read. A last line that a crash cut off is left out.
#[derive(Debug, Clone)]
pub struct Saved {
    path: PathBuf,
    has_header: bool,
}

impl Saved {
    /// That of a folder of work.
    #[must_use]
    pub fn folder(out: &Path) -> Self {
        Self { path: path(out), has_header: true }
    }

    /// A file of entries without a header.
    #[must_use]
    pub fn file(path: &Path) -> Self {
        Self { path: path.to_owned(), has_header: false }
    }

    fn lines(&self) -> Result<Lines<File>, JournalError> {
        Ok(Lines::of(&self.path, File::open(&self.path).map_err(|source| failed(&self.path, source))?))
    }

    /// The lines behind the header.
    fn body(&self) -> Result<Lines<File>, JournalError> {
        let mut lines = self.lines()?;
        if self.has_header {
            lines.next::<IgnoredAny>()?;
        }
        Ok(lines)
    }

    /// Its header.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn header<H: Head>(&self) -> Result<H, JournalError> {
        self.lines()?.next()?.ok_or_else(|| JournalError::Empty { path: self.path.clone() })
    }

    /// The entries as they lie, one by one, each with the byte where it begins.
    ///
    /// # Errors
    /// [`JournalError`], also of every entry.
    pub fn entries<E: Entry>(&self) -> Result<Entries<E>, JournalError> {
        Ok(Entries { lines: self.body()?, of: PhantomData })
    }

    /// Each entry once, the later one of those that have the same id and arm, one by one in the order in which they lie.
    ///
    /// # Errors
    /// [`JournalError`], also of every entry.
    pub fn latest<E: Entry>(&self) -> Result<Latest<E>, JournalError> {
        let mut lines = self.body()?;
        let (mut last, mut begin) = (HashMap::new(), lines.end);
        while let Some(known) = lines.next::<Known>()? {
            last.insert(known.key(), begin);
            begin = lines.end;
        }
        Ok(Latest { last, was_cut: lines.was_cut, entries: self.entries()? })
    }
}

/// See [`Saved::entries`].
pub struct Entries<E> {
    lines: Lines<File>,
    of: PhantomData<E>,
}

impl<E: Entry> Iterator for Entries<E> {
    type Item = Result<(u64, E), JournalError>;

    fn next(&mut self) -> Option<Self::Item> {
        let begin = self.lines.end;
        self.lines.next().map(|entry| entry.map(|entry| (begin, entry))).transpose()
    }
}

/// See [`Saved::latest`]. It takes about 40 bytes of memory an entry.
pub struct Latest<E> {
    /// Where the entry that counts begins.
    last: HashMap<Key, u64>,
    was_cut: bool,
    entries: Entries<E>,
}

impl<E> Latest<E> {
    /// How many there are.
    #[must_use]
    pub fn total(&self) -> usize {
        self.last.len()
    }

    /// Whether a crash had cut off the last line.
    #[must_use]
    pub fn was_cut(&self) -> bool {
        self.was_cut
    }
}

impl<E: Entry> Iterator for Latest<E> {
    type Item = Result<E, JournalError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.entries.next()? {
                Ok((begin, entry)) if self.last.get(&Key::of(entry.id(), entry.arm())) != Some(&begin) => {}
                other => return Some(other.map(|(_, entry)| entry)),
            }
        }
    }
}
