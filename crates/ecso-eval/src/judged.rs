//! A run with what one judge says of it.

use std::path::{Path, PathBuf};

use ecso_batch::journal::{JournalError, Latest, Saved};

use crate::{
    record::{ItemRecord, RunHeader},
    verdicts::Verdicts,
};

/// A judged run. Its records stay on disk, and are read one by one.
pub struct JudgedRun {
    /// Its folder.
    pub path: PathBuf,
    /// What the run is.
    pub header: RunHeader,
    /// The verdicts.
    pub verdicts: Verdicts,
    saved: Saved,
}

/// Why a run's verdicts can't be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JudgedError {
    /// Its folder can't be read.
    #[error("{}", path.display())]
    Folder {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Its journal, or its verdicts.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// There are no verdicts (of the judge that was asked for).
    #[error("{}: nobody{} has judged it; ecso eval judge {}", path.display(), called(judge.as_deref()), path.display())]
    NotJudged {
        /// The run.
        path: PathBuf,
        /// The judge that was asked for.
        judge: Option<String>,
    },
    /// Several judges have, and one must be named.
    #[error("{}: name one judge with --judge: {}", path.display(), judges.join(", "))]
    SeveralJudges {
        /// The run.
        path: PathBuf,
        /// Their files.
        judges: Vec<String>,
    },
}

fn called(judge: Option<&str>) -> String {
    judge.map_or_else(String::new, |judge| format!(" called {judge}"))
}

impl JudgedRun {
    /// The run in the folder `path`, with the verdicts of `judge`: its name, or the beginning that tells it from others. None is
    /// the only one.
    ///
    /// # Errors
    /// [`JudgedError`].
    pub fn open(path: &Path, judge: Option<&str>) -> Result<Self, JudgedError> {
        let saved = Saved::folder(path);
        let header = saved.header()?;
        let folder = |source| JudgedError::Folder { path: path.to_owned(), source };
        let entries: Vec<PathBuf> = std::fs::read_dir(path)
            .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect())
            .map_err(folder)?;
        let mut files: Vec<PathBuf> = entries.into_iter().filter(|file| is_by(file, judge)).collect();
        files.sort();
        if let Some(named) = judge.map(verdicts_file) {
            let is_named = |file: &PathBuf| file.file_name().is_some_and(|name| name == named.as_str());
            files = files.iter().find(|file| is_named(file)).map_or_else(|| files.clone(), |file| vec![file.clone()]);
        }
        match files.as_slice() {
            [one] => Ok(Self { path: path.to_owned(), header, verdicts: Verdicts::read(one)?, saved }),
            [] => Err(JudgedError::NotJudged { path: path.to_owned(), judge: judge.map(str::to_owned) }),
            several => {
                let name = |file: &PathBuf| file.file_name().unwrap_or_default().to_string_lossy().into_owned();
                Err(JudgedError::SeveralJudges { path: path.to_owned(), judges: several.iter().map(name).collect() })
            }
        }
    }

    /// The run's records, one by one.
    ///
    /// # Errors
    /// [`JournalError`], also of every record.
    pub fn records(&self) -> Result<Latest<ItemRecord>, JournalError> {
        self.saved.latest()
    }
}

/// The file of a judge's verdicts in the folder of a run.
#[must_use]
pub fn verdicts_file(judge: &str) -> String {
    format!("verdicts-{}.jsonl", judge.replace(|c: char| !c.is_alphanumeric(), "-"))
}

/// Whether a file holds verdicts, of the judge that is wanted: by its name as it stands in the verdicts, in the file's name, or a
/// beginning of these.
fn is_by(file: &Path, wanted: Option<&str>) -> bool {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let wanted = wanted.unwrap_or_default().trim_end_matches(".jsonl");
    let wanted = verdicts_file(wanted.strip_prefix("verdicts-").unwrap_or(wanted));
    name.starts_with(wanted.trim_end_matches(".jsonl")) && name.ends_with(".jsonl")
}
