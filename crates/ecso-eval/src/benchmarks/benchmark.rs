//! What a benchmark is, and what it gives.

use std::path::{Path, PathBuf};

use ecso::Cause;

use crate::item::Item;

/// A benchmark.
pub trait Benchmark: Sync {
    /// What it is.
    fn about(&self) -> About;

    /// Reads and checks `data`. Items come one by one. One with a row that can't be read, or an
    /// image that is missing, comes with its trouble.
    ///
    /// # Errors
    /// [`DataError`] if no item can be run: says what is missing and where it was looked for.
    fn items(&self, data: &Path, variant: Option<&str>) -> Result<Items, DataError>;
}

/// What a benchmark is, for `ecso eval list`.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct About {
    /// The name on the command line.
    pub name: &'static str,
    /// How many items the whole benchmark has.
    pub size: &'static str,
    /// Its licence.
    pub licence: &'static str,
    /// Where to get it.
    pub source: &'static str,
    /// How it is scored.
    pub scoring: &'static str,
    /// What `--data` should hold.
    pub layout: &'static str,
    /// Its variants, the default one first; none is one.
    pub variants: &'static [&'static str],
    /// The scenarios that are run unless others are named (how each begins); none is all.
    pub scenarios: &'static [&'static str],
}

/// Items, one by one.
pub struct Items {
    /// How many, where that is known beforehand.
    pub total: Option<usize>,
    /// The items.
    pub iter: Box<dyn Iterator<Item = Item> + Send>,
}

impl Items {
    /// Items that are all here.
    #[must_use]
    pub fn all(items: Vec<Item>) -> Self {
        Self { total: Some(items.len()), iter: Box::new(items.into_iter()) }
    }
}

/// What is wrong with a benchmark's data: the file or folder, and why.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct DataError {
    pub(crate) path: PathBuf,
    #[source]
    pub(crate) reason: Cause,
}

impl DataError {
    pub(crate) fn new(path: &Path, reason: impl Into<Cause>) -> Self {
        Self { path: path.to_owned(), reason: reason.into() }
    }
}
