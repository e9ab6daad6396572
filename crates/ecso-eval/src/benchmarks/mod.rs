//! The benchmarks: one file each, behind one small trait. Each reads the official layout, as users download it.

pub(crate) mod figstep;
mod files;
mod jsonl;
pub(crate) mod mm_safetybench;
mod mm_vet;
mod mmbench;
pub(crate) mod mme;
mod mossbench;
pub(crate) mod parquet;
mod tables;
mod twins;
mod vlsafe;
mod xstest;

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use ecso::Cause;
use serde::de::DeserializeOwned;

pub(crate) use tables::Place;

use crate::{
    item::{Item, Picture, Trouble},
    journal,
    text::cut,
};

/// A benchmark.
pub trait Benchmark: Sync {
    /// What it is.
    fn about(&self) -> About;

    /// Reads and checks `data`. Items come one by one. One with a row that can't be read, or an image that is missing, comes with
    /// its trouble.
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

/// All benchmarks.
pub const ALL: [&dyn Benchmark; 10] = [
    &figstep::FigStep,
    &mm_safetybench::MmSafetyBench,
    &vlsafe::VlSafe,
    &twins::Twins,
    &xstest::XsTest,
    &mossbench::MossBench,
    &mme::Mme,
    &mmbench::MmBench,
    &mm_vet::MmVet,
    &jsonl::Jsonl,
];

/// The benchmark called `name`.
#[must_use]
pub fn named(name: &str) -> Option<&'static dyn Benchmark> {
    ALL.into_iter().find(|benchmark| benchmark.about().name == name)
}

/// The first of `candidates` that exists below `data`; or `data` itself, if it is a file.
fn locate(data: &Path, candidates: &[&str]) -> Result<PathBuf, DataError> {
    if data.is_file() {
        return Ok(data.to_owned());
    }
    if !data.exists() {
        return Err(DataError::new(data, "there is no such file or folder"));
    }
    let found = candidates.iter().map(|candidate| data.join(candidate)).find(|path| path.exists());
    found.ok_or_else(|| DataError::new(data, format!("there is none of {}", candidates.join(", "))))
}

/// The rows of a CSV file with a header line.
pub(crate) fn csv_rows<T: DeserializeOwned>(path: &Path, delimiter: char) -> Result<Vec<T>, DataError> {
    let rows = tables::Table::read(path, delimiter)?.values().into_iter();
    let failed =
        |place: &Place, reason: Cause| DataError::new(path, Cause::new(format!("{}: {reason}", place.row), reason));
    rows.map(|(place, row)| row.map_err(|reason| failed(&place, reason))).collect()
}

/// An id as it is written: text or a number.
fn id(value: &serde_json::Value) -> Option<String> {
    match value {
        serde_json::Value::String(text) => Some(text.clone()),
        serde_json::Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

/// An item, or the one that tells why there is none.
fn settled(place: Place, scenario: &str, item: Result<Item, Cause>) -> (Place, Item) {
    let item = item.unwrap_or_else(|reason| place.unreadable(scenario, reason));
    (place, item)
}

/// An item with its image, or the trouble with that.
fn shown(mut item: Item, place: &Place, image: Result<Picture, Trouble>) -> Item {
    match image {
        Ok(image) => item.images.push(image),
        Err(trouble) => item.trouble = Some(place.trouble(trouble)),
    }
    item
}

/// Looks over items: an id that was there before makes an item one that failed, as a missing query does.
#[derive(Default)]
struct Check {
    ids: HashSet<u64>,
    items: usize,
    missing: usize,
    unreadable: usize,
    first: Option<String>,
}

impl Check {
    fn item(&mut self, (place, mut item): (Place, Item)) -> Item {
        if !self.ids.insert(journal::hash(&item.id)) {
            let (again, scenario) = (format!("{} ({})", item.id, place.row), item.scenario);
            item = place.unreadable(&scenario, format!("the id {} occurs twice", cut(&item.id)));
            item.id = again;
            self.ids.insert(journal::hash(&item.id));
        } else if item.trouble.is_none() && item.images.is_empty() && item.query.trim().is_empty() {
            item.trouble = Some(place.trouble(Trouble::Unreadable("there is neither a query nor an image".into())));
        }
        self.items += 1;
        match &item.trouble {
            None => {}
            Some(Trouble::MissingImage(_)) => self.missing += 1,
            Some(Trouble::Unreadable(_)) => self.unreadable += 1,
        }
        if self.first.is_none() {
            self.first = item.trouble.as_ref().map(ToString::to_string);
        }
        item
    }

    /// Tells what is wrong with items, with counts.
    ///
    /// # Errors
    /// [`DataError`] if there is no item that can be run.
    fn done(self, data: &Path) -> Result<(), DataError> {
        let Self { items, missing, unreadable, first, .. } = self;
        let first = first.unwrap_or_else(|| "there is nothing in it".into());
        if missing + unreadable == items {
            return Err(DataError::new(data, format!("none of {items} items can be run; the first: {first}")));
        }
        if missing + unreadable > 0 {
            tracing::warn!(
                "{}: of {items} items {missing} miss an image, {unreadable} can't be read; the first: {first}",
                data.display()
            );
        }
        Ok(())
    }
}

impl Items {
    /// Items that are all here, looked over.
    fn checked(data: &Path, items: impl IntoIterator<Item = (Place, Item)>) -> Result<Self, DataError> {
        let mut check = Check::default();
        let items = items.into_iter().map(|item| check.item(item)).collect();
        check.done(data)?;
        Ok(Self::all(items))
    }
}
