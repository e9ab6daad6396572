//! A set of runs that are evaluated together: with the same model, the same profiles and the same
//! judge, and each item only once.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use ecso_batch::journal::{JournalError, Key};

use crate::{
    judge::digest,
    judged_run::JudgedRun,
    record::{ItemRecord, RunHeader},
    text::cut,
};

/// Why runs can't be evaluated together.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunSetError {
    /// A run can't be read.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The runs don't measure the same thing.
    #[error("{} and {} differ in {what}", run.display(), other.display())]
    Differs {
        /// The run.
        run: PathBuf,
        /// What differs.
        what: String,
        /// The earlier run.
        other: PathBuf,
    },
    /// An item would be counted twice.
    #[error(
        "{}: the item {} is also in {}; name each run once",
        run.display(),
        cut(id),
        other.display()
    )]
    Duplicate {
        /// The run.
        run: PathBuf,
        /// The item's id.
        id: String,
        /// The run that has the item already.
        other: PathBuf,
    },
    /// There is nothing to compare.
    #[error(
        "{} and {} have no item in common: no id, request and task are the same in both",
        a.display(),
        b.display()
    )]
    NothingInCommon {
        /// A run.
        a: PathBuf,
        /// The other run.
        b: PathBuf,
    },
}

/// The runs so far, and their items. Takes about 40 bytes of memory per item.
#[derive(Debug, Default)]
pub struct RunSet<'a> {
    runs: Vec<(&'a Path, &'a RunHeader)>,
    items: HashMap<Key, &'a Path>,
}

impl<'a> RunSet<'a> {
    /// Adds a run. Its items are added afterwards.
    ///
    /// # Errors
    /// [`RunSetError::Differs`] if an earlier run has another model, or another profile under the
    /// same name.
    pub fn add_run(&mut self, run: &'a Path, header: &'a RunHeader) -> Result<(), RunSetError> {
        for (other, earlier) in &self.runs {
            if let Some(what) = difference(earlier, header) {
                return Err(RunSetError::Differs { run: run.into(), what, other: (*other).into() });
            }
        }
        self.runs.push((run, header));
        Ok(())
    }

    /// Adds an item of the last run.
    ///
    /// # Errors
    /// [`RunSetError::Duplicate`] if the set has the item already: of the same benchmark, with the
    /// same id, request and task.
    pub fn add_item(&mut self, record: &ItemRecord) -> Result<(), RunSetError> {
        let Some((run, header)) = self.runs.last() else { return Ok(()) };
        let benchmark =
            format!("{} {}", header.benchmark, header.variant.as_deref().unwrap_or_default());
        match self.items.insert(item_key(record, &benchmark), run) {
            None => Ok(()),
            Some(other) => Err(RunSetError::Duplicate {
                run: run.into(),
                id: record.id.clone(),
                other: other.into(),
            }),
        }
    }
}

/// Identifies an item of a benchmark by its id, request and task.
pub(crate) fn item_key(record: &ItemRecord, benchmark: &str) -> Key {
    Key::new(&record.id, benchmark).with_source(&digest("", &record.request, &record.task, ""))
}

/// Checks that two runs have the same judge.
pub(crate) fn check_same_judge(a: &JudgedRun, b: &JudgedRun) -> Result<(), RunSetError> {
    match a.verdicts.difference(&b.verdicts) {
        None => Ok(()),
        Some(what) => Err(RunSetError::Differs {
            run: b.path.clone(),
            what: format!("the {what} of their verdicts"),
            other: a.path.clone(),
        }),
    }
}

/// What differs between a run and an earlier one.
fn difference(earlier: &RunHeader, header: &RunHeader) -> Option<String> {
    let model = |header: &RunHeader| {
        (header.model.clone(), header.model_digest.clone(), header.server.clone())
    };
    if model(earlier) != model(header) {
        return Some("the model".into());
    }
    let is_changed = |(name, text): &&(String, String)| {
        earlier.profiles.iter().any(|(known, other)| known == name && other != text)
    };
    header.profiles.iter().find(is_changed).map(|(name, _)| format!("the profile {}", cut(name)))
}
