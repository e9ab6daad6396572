//! Runs that are taken together: of one model, under the same profiles, judged alike, and each item
//! once.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use ecso_batch::journal::{JournalError, Key};

use crate::{
    judge::digest,
    record::{ItemRecord, RunHeader},
    text::cut,
};

/// Why runs can't be taken together.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TogetherError {
    /// One of them can't be read.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// They are no measurements of the same thing.
    #[error("{}: its {what} is not that of {}", run.display(), other.display())]
    Differs {
        /// The run.
        run: PathBuf,
        /// What is not alike.
        what: String,
        /// The run before it.
        other: PathBuf,
    },
    /// An item would be counted twice.
    #[error("{}: the item {} is in {} too; name each run once", run.display(), cut(id), other.display())]
    Twice {
        /// The run.
        run: PathBuf,
        /// The item's id.
        id: String,
        /// The run that has it already.
        other: PathBuf,
    },
    /// There is nothing to compare.
    #[error("{} and {} have no item in common: none has the same id, request and right answer", a.display(), b.display())]
    NothingInCommon {
        /// A run.
        a: PathBuf,
        /// Another.
        b: PathBuf,
    },
}

/// The runs so far, and their items. Takes about 40 bytes an item.
#[derive(Debug, Default)]
pub struct Together<'a> {
    runs: Vec<(&'a Path, &'a RunHeader)>,
    items: HashMap<Key, &'a Path>,
}

impl<'a> Together<'a> {
    /// Takes a run in, before its items.
    ///
    /// # Errors
    /// [`TogetherError::Differs`] if it is of another model than one before it, or has another
    /// profile under the same name.
    pub fn run(&mut self, run: &'a Path, header: &'a RunHeader) -> Result<(), TogetherError> {
        for (other, earlier) in &self.runs {
            if let Some(what) = difference(earlier, header) {
                return Err(TogetherError::Differs {
                    run: run.into(),
                    what,
                    other: (*other).into(),
                });
            }
        }
        self.runs.push((run, header));
        Ok(())
    }

    /// Takes in an item of the last run.
    ///
    /// # Errors
    /// [`TogetherError::Twice`] if it is there already: of the same benchmark, with the same id,
    /// request and right answer.
    pub fn item(&mut self, record: &ItemRecord) -> Result<(), TogetherError> {
        let Some((run, header)) = self.runs.last() else { return Ok(()) };
        let benchmark =
            format!("{} {}", header.benchmark, header.variant.as_deref().unwrap_or_default());
        match self.items.insert(asked(record, &benchmark), run) {
            None => Ok(()),
            Some(other) => Err(TogetherError::Twice {
                run: run.into(),
                id: record.id.clone(),
                other: other.into(),
            }),
        }
    }
}

/// What tells an item from others of a benchmark: its id, what is asked, and what a good answer is.
pub(crate) fn asked(record: &ItemRecord, benchmark: &str) -> Key {
    Key::of(&record.id, benchmark).made_of(&digest("", &record.request, &record.task, ""))
}

fn difference(earlier: &RunHeader, header: &RunHeader) -> Option<String> {
    let model = |header: &RunHeader| {
        (header.model.clone(), header.model_digest.clone(), header.server.clone())
    };
    if model(earlier) != model(header) {
        return Some("model".into());
    }
    let is_other = |(name, text): &&(String, String)| {
        earlier.profiles.iter().any(|(known, other)| known == name && other != text)
    };
    header.profiles.iter().find(is_other).map(|(name, _)| format!("profile {}", cut(name)))
}
