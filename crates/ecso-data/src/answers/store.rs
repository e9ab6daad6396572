//! Answers on disk, in a folder that any number of processes share. Each process writes its own
//! journal and reads those of all.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use ecso_batch::journal::{Entry, Journal, JournalError, JournalHeader, JournalReader};
use serde::{Deserialize, Serialize};

use super::Answer;

/// The first line of each journal, for people. Answers are found by key alone.
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

/// Where an answer is: the index of the file, and the offset in it.
type Location = (usize, u64);

/// The journals in a folder.
pub(super) struct Store {
    folder: PathBuf,
    own: Journal,
    /// The files, each with the offset up to which it was read.
    files: Vec<(PathBuf, u64)>,
    known: HashMap<String, Location>,
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

    /// Reads what this and other processes wrote since the last time.
    pub(super) fn refresh(&mut self) -> Result<(), JournalError> {
        let failed = |source| JournalError::File { path: self.folder.clone(), source };
        for file in fs::read_dir(&self.folder).map_err(failed)? {
            let path = file.map_err(failed)?.path();
            let is_new = path.extension().is_some_and(|extension| extension == "jsonl")
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
                // Ignores lines that are not complete answers.
                if !answer.failed() && answer.answer.is_some() && answer.verdict.is_some() {
                    self.known.insert(answer.id, (number, begin));
                }
            }
            *end = entries.end();
        }
        Ok(())
    }

    /// Looks up the answer with this key; none if it is not there or the row failed.
    pub(super) fn find(&mut self, key: &str) -> Result<Option<Answer>, JournalError> {
        let Some((file, begin)) = self.known.get(key) else { return Ok(None) };
        let mut entries = JournalReader::at(&self.files[*file].0).entries_from::<Answer>(*begin)?;
        let answer = entries.next().transpose()?.map(|(_, answer)| answer);
        Ok(answer.filter(|answer| answer.id == key))
    }

    /// Adds an answer, unless it is known.
    pub(super) fn add(&mut self, answer: &Answer) -> Result<(), JournalError> {
        if self.known.contains_key(&answer.id) { Ok(()) } else { self.own.record(answer) }
    }
}
