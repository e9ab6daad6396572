//! A journal: JSON lines, one an entry, each flushed; before them, where the work is to go on only
//! under the same settings, a header. A crash leaves a file that can be read, and work that can go
//! on.

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

/// The first line of a journal: what the work is. It goes on only under the same.
pub trait Head: Serialize + DeserializeOwned {
    /// What is not as it was when the work was begun.
    fn differs(&self, begun: &Self) -> Option<&'static str>;
}

/// A line of a journal. As JSON it has a field `id`, may have `arm` and `made_of`, and has an
/// `error` if it failed; but what a content filter refused has `filtered` beside it, and is no
/// failure.
pub trait Entry: Serialize + DeserializeOwned {
    /// Unique in the journal together with [`Entry::arm`], but for later tries.
    fn id(&self) -> &str;

    /// Which of several entries of one id it is; empty where there is one.
    #[expect(clippy::unnecessary_literal_bound, reason = "others have a text of their own")]
    fn arm(&self) -> &str {
        ""
    }

    /// A digest of what it was made of: of something else it is made anew. Empty where nobody looks
    /// at that.
    #[expect(clippy::unnecessary_literal_bound, reason = "others have a text of their own")]
    fn made_of(&self) -> &str {
        ""
    }

    /// Whether it is to be tried again when somebody asks for that.
    fn failed(&self) -> bool;

    /// What tells it from others.
    fn key(&self) -> Key {
        Key::of(self.id(), self.arm()).made_of(self.made_of())
    }
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
    #[error("{}: line {line} can't be understood", path.display())]
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
    /// It is a device, a pipe or a folder.
    #[error("{} is no regular file; name another", path.display())]
    NoFile {
        /// Which file.
        path: PathBuf,
    },
    /// It has not even a header.
    #[error("{} is empty", path.display())]
    Empty {
        /// Which file.
        path: PathBuf,
    },
    /// It has something else before its entries than a header.
    #[error("{} has no header, so it can't be gone on with; name another --out", path.display())]
    NoHeader {
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

impl JournalError {
    /// Whether the file is not the one that was meant, or not to be used now: the user names
    /// another, and all is well.
    #[must_use]
    pub fn is_misuse(&self) -> bool {
        match self {
            Self::Line { .. }
            | Self::InUse { .. }
            | Self::NoFile { .. }
            | Self::Empty { .. }
            | Self::NoHeader { .. }
            | Self::OtherSettings { .. } => true,
            Self::File { .. } | Self::Entry(_) => false,
        }
    }
}

/// What tells entries apart: a hash of id and arm, which is the entry's place, and one of what it
/// was made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    place: u64,
    /// 0 is anything.
    of: u64,
}

impl Key {
    /// The key of an entry, whatever it was made of.
    #[must_use]
    pub fn of(id: &str, arm: &str) -> Self {
        Self { place: hash([id, arm]), of: 0 }
    }

    /// The key with the digest of what the entry was made of.
    #[must_use]
    pub fn made_of(self, digest: &str) -> Self {
        Self { of: if digest.is_empty() { 0 } else { hash([digest]) }, ..self }
    }

    /// The entry's place: of two entries there, the later counts.
    #[must_use]
    pub fn place(self) -> u64 {
        self.place
    }

    /// Whether an entry that is recorded under `self` is the wanted one: it has its place, and was
    /// made of the same, or doesn't tell.
    #[must_use]
    pub fn is(self, wanted: Self) -> bool {
        self.place == wanted.place && (self.of == 0 || self.of == wanted.of)
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

/// As much of an entry as is needed to go on.
#[derive(Deserialize)]
struct Known {
    id: String,
    #[serde(default)]
    arm: String,
    #[serde(default)]
    made_of: String,
    #[serde(default)]
    error: Option<IgnoredAny>,
    #[serde(default)]
    filtered: bool,
    /// Nothing counts that stands at this place before.
    #[serde(default)]
    gone: bool,
}

impl Known {
    fn key(&self) -> Key {
        Key::of(&self.id, &self.arm).made_of(&self.made_of)
    }

    fn failed(&self) -> bool {
        self.error.is_some() && !self.filtered
    }
}

fn failed(path: &Path, source: io::Error) -> JournalError {
    JournalError::File { path: path.to_owned(), source }
}

/// The lines of a journal, in order. A last one that a crash cut off is left out; a whole one
/// counts without its line end.
struct Lines<R> {
    path: PathBuf,
    reader: BufReader<R>,
    text: Vec<u8>,
    /// How many were read.
    number: usize,
    /// Where the last of them ends.
    end: u64,
    was_cut: bool,
    /// Whether the last one has no line end.
    is_open: bool,
}

impl<R: Read> Lines<R> {
    fn of(path: &Path, file: R) -> Self {
        let reader = BufReader::with_capacity(1 << 18, file);
        Self {
            path: path.to_owned(),
            reader,
            text: Vec::new(),
            number: 0,
            end: 0,
            was_cut: false,
            is_open: false,
        }
    }

    fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, JournalError> {
        self.text.clear();
        let read = self
            .reader
            .read_until(b'\n', &mut self.text)
            .map_err(|source| failed(&self.path, source))?;
        if read == 0 {
            return Ok(None);
        }
        let is_open = self.text.last() != Some(&b'\n');
        match serde_json::from_slice(&self.text) {
            Err(error) if is_open && !error.is_data() => {
                self.was_cut = true;
                Ok(None)
            }
            Err(source) => {
                Err(JournalError::Line { path: self.path.clone(), line: self.number + 1, source })
            }
            Ok(entry) => {
                self.number += 1;
                self.end += read as u64;
                self.is_open = is_open;
                Ok(Some(entry))
            }
        }
    }
}

/// What is recorded, by place: each entry, and whether it failed.
#[derive(Default)]
struct Recorded {
    entries: HashMap<u64, (Key, bool)>,
    failed: usize,
}

impl Recorded {
    fn note(&mut self, key: Key, failed: bool) {
        let earlier = self.entries.insert(key.place, (key, failed));
        self.failed += usize::from(failed);
        self.failed -= usize::from(earlier.is_some_and(|(_, failed)| failed));
    }

    fn forget(&mut self, key: Key) {
        let earlier = self.entries.remove(&key.place);
        self.failed -= usize::from(earlier.is_some_and(|(_, failed)| failed));
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
    pub fn open(out: &Path, header: &impl Head) -> Result<Self, JournalError> {
        fs::create_dir_all(out).map_err(|source| failed(out, source))?;
        Self::open_file(&path(out), header)
    }

    /// Begins the file of a journal, or goes on with it. A line that a crash cut off is cut off for
    /// good; a header only where it was to be this one, for else the file is somebody's own.
    ///
    /// # Errors
    /// As [`Journal::open`].
    pub fn open_file<H: Head>(path: &Path, header: &H) -> Result<Self, JournalError> {
        let unreadable = |source| failed(path, source);
        let mut file = writable(path)?;
        if let Some(First { id: Some(_) }) = Saved::file(path).lines()?.next()? {
            return Err(JournalError::NoHeader { path: path.to_owned() });
        }
        let mut lines = Lines::of(path, file.try_clone().map_err(unreadable)?);
        let (begun, written) = (lines.next::<H>()?, line(header)?);
        if begun.is_none() && !written.starts_with(&lines.text) {
            return Err(JournalError::NoHeader { path: path.to_owned() });
        }
        if let Some(what) = begun.as_ref().and_then(|begun| header.differs(begun)) {
            return Err(JournalError::OtherSettings { path: path.to_owned(), what });
        }
        let mut recorded = Recorded::default();
        while let Some(known) = lines.next::<Known>()? {
            if known.gone {
                recorded.forget(known.key());
            } else {
                recorded.note(known.key(), known.failed());
            }
        }
        let Lines { end, was_cut, is_open, .. } = lines;
        file.set_len(end).and_then(|()| file.seek(SeekFrom::End(0))).map_err(unreadable)?;
        let mut journal = Self { path: path.to_owned(), file, was_cut, recorded };
        if is_open {
            journal.add(b"\n")?;
        }
        if begun.is_none() {
            journal.add(&written)?;
        }
        Ok(journal)
    }

    /// Whether a crash had cut off the last line.
    #[must_use]
    pub fn was_cut(&self) -> bool {
        self.was_cut
    }

    /// Whether an entry need not be made: it is recorded, and did not fail or is not to be tried
    /// again.
    #[must_use]
    pub fn has(&self, key: Key, retry_failed: bool) -> bool {
        let recorded = self.recorded.entries.get(&key.place);
        recorded.is_some_and(|(recorded, failed)| recorded.is(key) && !(*failed && retry_failed))
    }

    /// Whether there is an entry at the place of `key`, whatever it was made of.
    #[must_use]
    pub fn has_place(&self, key: Key) -> bool {
        self.recorded.entries.contains_key(&key.place)
    }

    /// Whether that entry failed.
    #[must_use]
    pub fn has_failed(&self, key: Key) -> bool {
        self.recorded.entries.get(&key.place).is_some_and(|(_, failed)| *failed)
    }

    /// How many entries are recorded, each place once.
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

    /// Records an entry; of two at one place the later counts.
    ///
    /// # Errors
    /// [`JournalError::File`], [`JournalError::Entry`].
    pub fn record(&mut self, entry: &impl Entry) -> Result<(), JournalError> {
        self.write(&Line::of(entry)?)
    }

    /// Takes the entry with this `id`, and no arm, out: nobody reads it any more.
    ///
    /// # Errors
    /// [`JournalError::File`], [`JournalError::Entry`].
    pub fn forget(&mut self, id: &str) -> Result<(), JournalError> {
        self.add(&line(&Gone { id, gone: true })?)?;
        self.recorded.forget(Key::of(id, ""));
        Ok(())
    }

    pub(crate) fn write(&mut self, line: &Line) -> Result<(), JournalError> {
        self.add(&line.text)?;
        self.recorded.note(line.key, line.failed);
        Ok(())
    }

    fn add(&mut self, line: &[u8]) -> Result<(), JournalError> {
        self.file
            .write_all(line)
            .and_then(|()| self.file.flush())
            .map_err(|source| failed(&self.path, source))
    }
}

/// The file, for this process alone to write.
fn writable(path: &Path) -> Result<File, JournalError> {
    let open = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path);
    let file = open.map_err(|source| failed(path, source))?;
    is_regular(path, file.metadata())?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(JournalError::InUse { path: path.to_owned() }),
        Err(TryLockError::Error(source)) => Err(failed(path, source)),
    }
}

/// Holds that a file is one: of others a read may have no end.
fn is_regular(path: &Path, file: io::Result<Metadata>) -> Result<(), JournalError> {
    let is_file = file.map_err(|source| failed(path, source))?.is_file();
    if is_file { Ok(()) } else { Err(JournalError::NoFile { path: path.to_owned() }) }
}

/// What [`Journal::forget`] writes.
#[derive(Serialize)]
struct Gone<'a> {
    id: &'a str,
    gone: bool,
}

/// An entry as it is written.
pub(crate) struct Line {
    text: Vec<u8>,
    key: Key,
    failed: bool,
}

impl Line {
    pub(crate) fn of(entry: &impl Entry) -> Result<Self, JournalError> {
        Ok(Self { text: line(entry)?, key: entry.key(), failed: entry.failed() })
    }
}

fn line(value: &impl Serialize) -> Result<Vec<u8>, JournalError> {
    let mut line = serde_json::to_vec(value).map_err(JournalError::Entry)?;
    line.push(b'\n');
    Ok(line)
}

/// A journal that is read, with its header or without one. A last line that a crash cut off is left
/// out.
#[derive(Debug, Clone)]
pub struct Saved {
    path: PathBuf,
}

/// Entries have an id, and headers have none.
#[derive(Deserialize)]
struct First {
    id: Option<IgnoredAny>,
}

impl Saved {
    /// That of a folder of work.
    #[must_use]
    pub fn folder(out: &Path) -> Self {
        Self { path: path(out) }
    }

    /// That of a file.
    #[must_use]
    pub fn file(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    fn lines(&self) -> Result<Lines<File>, JournalError> {
        is_regular(&self.path, fs::metadata(&self.path))?;
        Ok(Lines::of(
            &self.path,
            File::open(&self.path).map_err(|source| failed(&self.path, source))?,
        ))
    }

    /// The lines of entries.
    fn body(&self) -> Result<Lines<File>, JournalError> {
        let mut lines = self.lines()?;
        match lines.next::<First>()? {
            Some(First { id: Some(_) }) => self.lines(),
            _ => Ok(lines),
        }
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

    /// The entries from the byte `begin` on, at which one begins: what was written since somebody
    /// came so far, or one that is looked up. 0 is the first entry.
    ///
    /// # Errors
    /// As [`Saved::entries`].
    pub fn entries_from<E: Entry>(&self, begin: u64) -> Result<Entries<E>, JournalError> {
        if begin == 0 {
            return self.entries();
        }
        let mut lines = self.lines()?;
        lines.reader.seek(SeekFrom::Start(begin)).map_err(|source| failed(&self.path, source))?;
        lines.end = begin;
        Ok(Entries { lines, of: PhantomData })
    }

    /// Each entry once, the later one of those at the same place, one by one in the order in which
    /// they lie.
    ///
    /// # Errors
    /// [`JournalError`], also of every entry.
    pub fn latest<E: Entry>(&self) -> Result<Latest<E>, JournalError> {
        let mut lines = self.body()?;
        let (mut last, mut begin) = (HashMap::new(), lines.end);
        while let Some(known) = lines.next::<Known>()? {
            if known.gone {
                last.remove(&known.key().place);
            } else {
                last.insert(known.key().place, begin);
            }
            begin = lines.end;
        }
        Ok(Latest {
            begins: last.into_values().collect(),
            was_cut: lines.was_cut,
            lines: self.body()?,
            of: PhantomData,
        })
    }
}

/// See [`Saved::entries`].
pub struct Entries<E> {
    lines: Lines<File>,
    of: PhantomData<E>,
}

impl<E> Entries<E> {
    /// Whether a crash had cut off the last line; known at the end.
    #[must_use]
    pub fn was_cut(&self) -> bool {
        self.lines.was_cut
    }

    /// The byte behind the last entry that was read.
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

/// See [`Saved::latest`]. It takes about 40 bytes of memory an entry.
pub struct Latest<E> {
    /// Where the entries that count begin.
    begins: HashSet<u64>,
    was_cut: bool,
    lines: Lines<File>,
    of: PhantomData<E>,
}

impl<E> Latest<E> {
    /// How many there are.
    #[must_use]
    pub fn total(&self) -> usize {
        self.begins.len()
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
        while !self.begins.contains(&self.lines.end) {
            match self.lines.next::<IgnoredAny>() {
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(error) => return Some(Err(error)),
            }
        }
        self.lines.next().transpose()
    }
}
