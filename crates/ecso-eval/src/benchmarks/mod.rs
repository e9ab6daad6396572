//! The benchmarks: one file each, behind one small trait. Each reads the official layout, as users download it.

pub(crate) mod figstep;
mod jsonl;
pub(crate) mod mm_safetybench;
mod mm_vet;
mod mmbench;
mod mme;
mod mossbench;
mod twins;
mod vlsafe;
mod xstest;

use std::path::{Path, PathBuf};

use crate::item::{Item, Picture};

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

/// Says which images are missing, with counts, before a run begins.
fn must_exist(data: &Path, items: &[Item]) -> Result<(), DataError> {
    let images = items.iter().flat_map(|item| &item.images).filter_map(|picture| match picture {
        Picture::File(path) => Some(path),
        Picture::Bytes(_) => None,
    });
    let (mut count, mut missing) = (0, Vec::new());
    for image in images {
        count += 1;
        if !image.exists() {
            missing.push(image);
        }
    }
    match missing.first() {
        None => Ok(()),
        Some(first) => Err(DataError::new(
            data,
            format!("{} of {count} images are missing, the first is {}", missing.len(), first.display()),
        )),
    }
}
