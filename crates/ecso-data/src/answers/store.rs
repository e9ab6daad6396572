//! Answers on disk, in a folder that any number of processes share. Each process writes its own
//! journal and reads those of all.

#[cfg(unix)]
use std::os::unix::fs::PermissionsExt;
use std::{
    collections::HashMap,
    ffi::OsStr,
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use ecso_batch::{
    check_cache,
    journal::{Journal, JournalError, JournalHeader, JournalReader},
};
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
    header: Header,
    /// The journal of this process, once it has an answer.
    own: Option<Journal>,
    /// The files, each with the offset up to which it was read.
    files: Vec<(PathBuf, u64)>,
    known: HashMap<String, Location>,
}

impl Store {
    pub(super) fn open(folder: &Path, made_by: &str) -> Result<Self, JournalError> {
        check_cache(folder)
            .map_err(|source| JournalError::File { path: folder.to_owned(), source })?;
        Ok(Self {
            folder: folder.to_owned(),
            header: Header { made_by: made_by.to_owned() },
            own: None,
            files: Vec::new(),
            known: HashMap::new(),
        })
    }

    /// Reads what this and other processes wrote since the last time. Other files, files that can't
    /// be read (any more), and lines that are not complete answers are ignored: what can't be found
    /// is asked again.
    pub(super) fn refresh(&mut self) -> Result<(), JournalError> {
        let failed = |source| JournalError::File { path: self.folder.clone(), source };
        let files = match fs::read_dir(&self.folder) {
            // It is created again with the next answer.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            files => files.map_err(failed)?,
        };
        for file in files {
            let path = file.map_err(failed)?.path();
            if is_ours(&path) && !self.files.iter().any(|(known, _)| *known == path) {
                self.files.push((path, 0));
            }
        }
        for (number, (path, end)) in self.files.iter_mut().enumerate() {
            let is_read = |file: fs::Metadata| !file.is_file() || file.len() <= *end;
            if fs::metadata(&*path).map_or(true, is_read) {
                continue;
            }
            let Ok(mut entries) = JournalReader::at(path).entries_from::<Answer>(*end) else {
                continue;
            };
            for entry in entries.by_ref() {
                match entry {
                    Ok((begin, answer)) if answer.is_complete() => {
                        self.known.insert(answer.id, (number, begin));
                    }
                    Ok(_) | Err(JournalError::Line { .. }) => {}
                    Err(_) => break,
                }
            }
            *end = entries.end();
        }
        Ok(())
    }

    /// Looks up the answer with this key; none if it is not there or the row failed.
    pub(super) fn find(&mut self, key: &str) -> Option<Answer> {
        let (file, begin) = *self.known.get(key)?;
        let entries = JournalReader::at(&self.files[file].0).entries_from::<Answer>(begin);
        let entry = entries.ok().and_then(|mut entries| entries.next()?.ok());
        let answer = entry.map(|(_, answer)| answer).filter(|answer| answer.id == key);
        if answer.is_none() {
            self.known.remove(key);
        }
        answer
    }

    /// Adds an answer, unless it is known.
    pub(super) fn add(&mut self, answer: &Answer) -> Result<(), JournalError> {
        if self.known.contains_key(&answer.id) {
            return Ok(());
        }
        match &mut self.own {
            // A journal that was deleted would lose what is written to it.
            Some(own) if own.path().exists() => own.record(answer),
            _ => self.own.insert(self.create()?).record(answer),
        }
    }

    fn create(&self) -> Result<Journal, JournalError> {
        let failed = |source| JournalError::File { path: self.folder.clone(), source };
        fs::create_dir_all(&self.folder).map_err(failed)?;
        let mut file = tempfile::Builder::new();
        file.prefix(PREFIX).suffix(SUFFIX);
        // Who may read it is decided by the umask, as for other files.
        #[cfg(unix)]
        file.permissions(fs::Permissions::from_mode(0o666));
        let file = file.tempfile_in(&self.folder).map_err(failed)?;
        let (_, path) = file.keep().map_err(|error| failed(error.error))?;
        Journal::open_file(&path, &self.header)
    }
}

/// The beginning and the end of the names of journals.
const PREFIX: &str = "answers-";
const SUFFIX: &str = ".jsonl";

fn is_ours(path: &Path) -> bool {
    let name = path.file_name().and_then(OsStr::to_str);
    name.is_some_and(|name| name.starts_with(PREFIX) && name.ends_with(SUFFIX))
}
