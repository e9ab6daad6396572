//! Answers on disk, in a folder that any number of processes share: each writes a journal of its
//! own there, and reads them all.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use ecso_batch::journal::{Entry, Journal, JournalError, JournalHeader, JournalReader};
use serde::{Deserialize, Serialize};

use super::Answer;

/// The first line of each journal: for people. What belongs to what, the keys say.
#[derive(Serialize, Deserialize)]
struct Header {
    /// Version of ecso, the model, and the profile as TOML.
    made_by: String,
}

impl JournalHeader for Header {
    fn difference(&self, _: &Self) -> Option<&'static str> {
        None
    }
}

/// Where an answer lies: which file, and the byte where it begins.
type Lies = (usize, u64);

/// The journals in a folder.
pub(super) struct Store {
    folder: PathBuf,
    own: Journal,
    /// The files, each with the byte behind what was read of it.
    files: Vec<(PathBuf, u64)>,
    known: HashMap<String, Lies>,
}

impl Store {
    pub(super) fn open(folder: &Path, made_by: &str) -> Result<Self, JournalError> {
        let failed = |source| JournalError::File { path: folder.to_owned(), source };
        fs::create_dir_all(folder).map_err(failed)?;
        let own = tempfile::Builder::new()
            .prefix("answers-")
            .suffix(".jsonl")
            .tempfile_in(folder)
            .map_err(failed)?;
        let (_, own) = own.keep().map_err(|error| failed(error.error))?;
        let own = Journal::open_file(&own, &Header { made_by: made_by.to_owned() })?;
        Ok(Self { folder: folder.to_owned(), own, files: Vec::new(), known: HashMap::new() })
    }

    /// Reads what was written since the last time, by this process and by others.
    pub(super) fn refresh(&mut self) -> Result<(), JournalError> {
        let failed = |source| JournalError::File { path: self.folder.clone(), source };
        for file in fs::read_dir(&self.folder).map_err(failed)? {
            let path = file.map_err(failed)?.path();
            let is_new = path.extension().is_some_and(|ending| ending == "jsonl")
                && !self.files.iter().any(|(known, _)| *known == path);
            if is_new {
                self.files.push((path, 0));
            }
        }
        for (number, (path, end)) in self.files.iter_mut().enumerate() {
            if fs::metadata(&*path).is_ok_and(|file| file.len() <= *end) {
                continue;
            }
            let mut entries = JournalReader::at(path).entries_from::<Answer>(*end)?;
            for entry in entries.by_ref() {
                let (begin, answer) = entry?;
                // A line that says nothing of an answer is none.
                if !answer.failed() && answer.answer.is_some() && answer.verdict.is_some() {
                    self.known.insert(answer.id, (number, begin));
                }
            }
            *end = entries.end();
        }
        Ok(())
    }

    /// The answer of that key; none where there is none, or it failed.
    pub(super) fn find(&mut self, key: &str) -> Result<Option<Answer>, JournalError> {
        let Some((file, begin)) = self.known.get(key) else { return Ok(None) };
        let mut found = JournalReader::at(&self.files[*file].0).entries_from::<Answer>(*begin)?;
        let found = found.next().transpose()?.map(|(_, answer)| answer);
        Ok(found.filter(|answer| answer.id == key))
    }

    /// Keeps an answer that is new.
    pub(super) fn keep(&mut self, answer: &Answer) -> Result<(), JournalError> {
        if self.known.contains_key(&answer.id) { Ok(()) } else { self.own.record(answer) }
    }
}
