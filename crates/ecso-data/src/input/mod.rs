//! Reading rows, one by one: JSON lines, JSON, CSV, Parquet, or a folder of images. Nothing is held but the row at hand.

mod folder;
mod json;
mod parquet;
mod record;

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
};

pub use record::Mapping;
use record::Reader;

use crate::row::Row;

/// Rows as they are read. One that can't be read is an error of its own; the next is read all the same.
pub type Rows = Box<dyn Iterator<Item = Result<Row, RowError>> + Send>;

/// Why the input can't be read.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {reason}")]
pub struct InputError {
    path: String,
    reason: String,
}

impl InputError {
    fn new(path: &Path, reason: impl std::fmt::Display) -> Self {
        Self { path: path.display().to_string(), reason: reason.to_string() }
    }
}

/// Why one row can't be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("row {number}: {reason}")]
pub struct RowError {
    /// Its place, from 0.
    pub number: u64,
    /// What is wrong.
    pub reason: String,
}

/// What is read, and how.
#[derive(Debug, Clone, Default)]
pub struct Input {
    /// A file (.jsonl, .json, .csv, .tsv, .parquet) or a folder.
    pub path: PathBuf,
    /// Which columns are what.
    pub mapping: Mapping,
    /// The query of rows that have none.
    pub query: Option<String>,
    /// Where relative image paths begin; the input's folder, if not said.
    pub image_root: Option<PathBuf>,
}

impl Input {
    /// Reads the input from its beginning.
    ///
    /// # Errors
    /// [`InputError`]: it is not there, or of no known kind.
    pub fn rows(&self) -> Result<Rows, InputError> {
        let path = &self.path;
        let is_folder = path.is_dir();
        // A folder that says what is in it, as Hugging Face's `imagefolder` does.
        let table =
            ["metadata.jsonl", "metadata.csv"].map(|name| path.join(name)).into_iter().find(|file| file.is_file());
        let file = if is_folder { table.as_deref() } else { Some(path.as_path()) };
        let Some(file) = file else { return folder::rows(path, self.query.clone()) };
        let root = self.image_root.clone().unwrap_or_else(|| file.parent().unwrap_or(Path::new("")).to_owned());
        let reader = Reader { mapping: self.mapping.clone(), query: self.query.clone(), root };
        let ending = file.extension().unwrap_or_default().to_string_lossy().to_lowercase();
        match ending.as_str() {
            "jsonl" | "ndjson" => Ok(numbered(json::lines(file)?, reader)),
            "json" => Ok(numbered(json::array(file)?, reader)),
            "csv" => Ok(numbered(table_rows(file, b',')?, reader)),
            "tsv" => Ok(numbered(table_rows(file, b'\t')?, reader)),
            "parquet" => parquet::rows(file, reader),
            _ => Err(InputError::new(file, "not .jsonl, .json, .csv, .tsv, .parquet or a folder of images")),
        }
    }

    /// How many rows there are, where that is cheap to know.
    #[must_use]
    pub fn count(&self) -> Option<u64> {
        let ending = self.path.extension()?.to_string_lossy().to_lowercase();
        match ending.as_str() {
            "parquet" => parquet::count(&self.path),
            "jsonl" | "ndjson" => {
                let lines = BufReader::new(File::open(&self.path).ok()?).split(b'\n');
                Some(lines.map_while(Result::ok).filter(|line| !line.trim_ascii().is_empty()).count() as u64)
            }
            "csv" | "tsv" => {
                let mut records = csv::ReaderBuilder::new().flexible(true).from_path(&self.path).ok()?;
                Some(records.byte_records().count() as u64)
            }
            _ => None,
        }
    }
}

type Records = Box<dyn Iterator<Item = Result<serde_json::Value, String>> + Send>;

fn numbered(records: Records, reader: Reader) -> Rows {
    Box::new((0..).zip(records).map(move |(number, record)| {
        record.and_then(|record| reader.row(number, record)).map_err(|reason| RowError { number, reason })
    }))
}

fn table_rows(path: &Path, delimiter: u8) -> Result<Records, InputError> {
    let mut reader =
        csv::ReaderBuilder::new().delimiter(delimiter).from_path(path).map_err(|error| InputError::new(path, error))?;
    let names = reader.headers().map_err(|error| InputError::new(path, error))?.clone();
    Ok(Box::new(reader.into_records().map(move |record| {
        let record = record.map_err(|error| error.to_string())?;
        let fields = names.iter().zip(record.iter()).filter(|(_, field)| !field.is_empty());
        Ok(fields.map(|(name, field)| (name.to_owned(), field.into())).collect::<serde_json::Map<_, _>>().into())
    })))
}
