//! Reads journals.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File, Metadata},
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom},
    marker::PhantomData,
    path::{Path, PathBuf},
};

use serde::{
    Deserialize,
    de::{DeserializeOwned, IgnoredAny},
};

use super::{
    Entry, JournalHeader, Key,
    error::{JournalError, file_error},
    path,
};

/// Reads a journal, with or without a header. A last line that was cut off by a crash is skipped.
#[derive(Debug, Clone)]
pub struct JournalReader {
    path: PathBuf,
}

/// The first line: an entry has an id, a header does not.
#[derive(Deserialize)]
pub(super) struct FirstLine {
    pub(super) id: Option<IgnoredAny>,
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

    pub(super) fn lines(&self) -> Result<Lines<File>, JournalError> {
        check_is_regular(&self.path, fs::metadata(&self.path))?;
        Ok(Lines::new(
            &self.path,
            File::open(&self.path).map_err(|source| file_error(&self.path, source))?,
        ))
    }

    /// The lines after the header, if there is one.
    fn entry_lines(&self) -> Result<Lines<File>, JournalError> {
        let mut lines = self.lines()?;
        match lines.next::<FirstLine>() {
            Ok(None | Some(FirstLine { id: None })) => Ok(lines),
            // A line that can't be parsed is an error when the entries are read.
            Ok(Some(FirstLine { id: Some(_) })) | Err(JournalError::Line { .. }) => self.lines(),
            Err(error) => Err(error),
        }
    }

    /// The header.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn header<H: JournalHeader>(&self) -> Result<H, JournalError> {
        self.lines()?.next()?.ok_or_else(|| JournalError::Empty { path: self.path.clone() })
    }

    /// All entries in file order, one by one, each with the byte position where it begins.
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
        (lines.begin, lines.end) = (begin, begin);
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

/// See [`JournalReader::entries`]. After a line that can't be parsed, the next item is the next line.
pub struct Entries<E> {
    lines: Lines<File>,
    entry: PhantomData<E>,
}

impl<E> Entries<E> {
    /// Whether the last line had been cut off by a crash; known after the last entry.
    #[must_use]
    pub fn was_truncated(&self) -> bool {
        self.lines.was_truncated
    }

    /// The byte position after the last complete line that was read. A line without its line break
    /// may still be in the making.
    #[must_use]
    pub fn end(&self) -> u64 {
        if self.lines.lacks_line_break { self.lines.begin } else { self.lines.end }
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

/// The fields of an entry that are needed to resume the work.
#[derive(Deserialize)]
pub(super) struct EntryFields {
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
    pub(super) deleted: bool,
}

impl EntryFields {
    pub(super) fn key(&self) -> Key {
        Key::new(&self.id, &self.arm).with_source(&self.made_of)
    }

    pub(super) fn failed(&self) -> bool {
        self.error.is_some() && !self.filtered
    }
}

/// The lines of a journal, in order. A last line that was cut off by a crash is skipped; a complete
/// last line counts even without its line break.
pub(super) struct Lines<R> {
    path: PathBuf,
    reader: BufReader<R>,
    pub(super) text: Vec<u8>,
    /// How many lines were read.
    number: usize,
    /// The byte positions before and after the last line that was read.
    begin: u64,
    pub(super) end: u64,
    pub(super) was_truncated: bool,
    /// Whether the last line has no line break.
    pub(super) lacks_line_break: bool,
}

impl<R: Read> Lines<R> {
    pub(super) fn new(path: &Path, file: R) -> Self {
        let reader = BufReader::with_capacity(1 << 18, file);
        Self {
            path: path.to_owned(),
            reader,
            text: Vec::new(),
            number: 0,
            begin: 0,
            end: 0,
            was_truncated: false,
            lacks_line_break: false,
        }
    }

    pub(super) fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, JournalError> {
        self.text.clear();
        let read = self
            .reader
            .read_until(b'\n', &mut self.text)
            .map_err(|source| file_error(&self.path, source))?;
        if read == 0 {
            return Ok(None);
        }
        let lacks_line_break = self.text.last() != Some(&b'\n');
        let parsed = serde_json::from_slice(&self.text);
        if lacks_line_break && parsed.as_ref().is_err_and(|error| !error.is_data()) {
            self.was_truncated = true;
            return Ok(None);
        }
        self.number += 1;
        (self.begin, self.end) = (self.end, self.end + read as u64);
        self.lacks_line_break = lacks_line_break;
        parsed.map(Some).map_err(|source| JournalError::Line {
            path: self.path.clone(),
            line: self.number,
            source,
        })
    }
}

/// Checks that the file is a regular one: reading from others may never end.
pub(super) fn check_is_regular(
    path: &Path,
    file: io::Result<Metadata>,
) -> Result<(), JournalError> {
    let is_file = file.map_err(|source| file_error(path, source))?.is_file();
    if is_file { Ok(()) } else { Err(JournalError::NotAFile { path: path.to_owned() }) }
}
