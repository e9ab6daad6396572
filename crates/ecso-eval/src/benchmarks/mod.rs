//! The benchmarks: one file each, behind one small trait. Each reads the official layout, as users download it.

pub(crate) mod figstep;
mod jsonl;
pub(crate) mod mm_safetybench;
mod mm_vet;
mod mmbench;
pub(crate) mod mme;
mod mossbench;
mod twins;
mod vlsafe;
mod xstest;

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use crate::{
    item::{Item, Picture},
    journal,
};

/// A benchmark.
pub trait Benchmark: Sync {
    /// What it is.
    fn about(&self) -> About;

    /// Reads and checks `data`. Items come one by one; what is wrong with the data as a whole is said at once.
    ///
    /// # Errors
    /// [`DataError`] says what is missing and where it was looked for.
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
    pub iter: Box<dyn Iterator<Item = Result<Item, DataError>> + Send>,
}

impl Items {
    /// Items that are all here.
    #[must_use]
    pub fn all(items: Vec<Item>) -> Self {
        Self { total: Some(items.len()), iter: Box::new(items.into_iter().map(Ok)) }
    }
}

/// What is wrong with a benchmark's data.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {reason}")]
pub struct DataError {
    path: String,
    reason: String,
}

impl DataError {
    pub(crate) fn new(path: &Path, reason: impl std::fmt::Display) -> Self {
        Self { path: path.display().to_string(), reason: reason.to_string() }
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

fn read(path: &Path) -> Result<String, DataError> {
    std::fs::read_to_string(path).map_err(|error| DataError::new(path, error))
}

fn json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, DataError> {
    serde_json::from_str(&read(path)?).map_err(|error| DataError::new(path, error))
}

/// The rows of a CSV file with a header line.
pub(crate) fn csv_rows<T: serde::de::DeserializeOwned>(path: &Path, delimiter: u8) -> Result<Vec<T>, DataError> {
    let reader = csv::ReaderBuilder::new().delimiter(delimiter).from_path(path);
    let rows: Result<Vec<T>, csv::Error> =
        reader.map_err(|error| DataError::new(path, error))?.into_deserialize().collect();
    let rows = rows.map_err(|error| DataError::new(path, error))?;
    if rows.is_empty() { Err(DataError::new(path, "no rows")) } else { Ok(rows) }
}

/// Looks over items before a run begins.
#[derive(Default)]
struct Check {
    images: usize,
    missing: usize,
    first_missing: Option<PathBuf>,
    ids: HashSet<u64>,
    twice: Option<String>,
}

impl Check {
    fn item(&mut self, item: &Item) {
        let earlier = item.earlier.iter().flat_map(|(_, _, images)| images);
        for picture in item.images.iter().chain(earlier) {
            self.images += 1;
            if let Picture::File(path) = picture
                && !path.exists()
            {
                self.missing += 1;
                self.first_missing.get_or_insert_with(|| path.clone());
            }
        }
        if !self.ids.insert(journal::hash(&item.id)) {
            self.twice.get_or_insert_with(|| item.id.clone());
        }
    }

    /// Says which images are missing, with counts, and whether an id occurs twice.
    fn done(self, data: &Path) -> Result<(), DataError> {
        if let Some(first) = self.first_missing {
            let reason =
                format!("{} of {} images are missing, the first is {}", self.missing, self.images, first.display());
            return Err(DataError::new(data, reason));
        }
        match self.twice {
            Some(id) => Err(DataError::new(data, format!("the id {id} occurs twice"))),
            None => Ok(()),
        }
    }
}

impl Items {
    /// Items that are all here, looked over.
    fn checked(data: &Path, items: Vec<Item>) -> Result<Self, DataError> {
        let mut check = Check::default();
        for item in &items {
            check.item(item);
        }
        check.done(data)?;
        Ok(Self::all(items))
    }
}
