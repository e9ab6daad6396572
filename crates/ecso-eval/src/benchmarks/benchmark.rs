//! The trait of all benchmarks, and the items that they return.

use std::path::{Path, PathBuf};

use ecso::Cause;

use crate::item::Item;

/// A benchmark.
pub trait Benchmark: Sync {
    /// Describes the benchmark.
    fn about(&self) -> About;

    /// Reads and validates `data`. Items are returned one by one. An item whose row can't be read,
    /// or whose image is missing, has an error.
    ///
    /// # Errors
    /// [`DataError`] if no item can be run; it says what is missing and where it was expected.
    fn items(&self, data: &Path, variant: Option<&str>) -> Result<Items, DataError>;
}

/// The description of a benchmark, for `ecso eval list`.
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
    /// What `--data` should contain.
    pub layout: &'static str,
    /// Its variants, the default one first; empty if there is only one.
    pub variants: &'static [&'static str],
    /// The scenarios that are run by default (how each begins); empty means all.
    pub scenarios: &'static [&'static str],
}

/// An iterator over items.
pub struct Items {
    /// The number of items, if it is known beforehand.
    pub total: Option<usize>,
    /// The items.
    pub iter: Box<dyn Iterator<Item = Item> + Send>,
}

impl Items {
    /// Items that are all in memory.
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
