//! Reading rows, one by one: JSON lines, JSON, CSV, Parquet, or a folder of images. Nothing is held
//! but the row at hand.

mod arrow;
mod cell;
mod folder;
mod json;
mod mapping;
mod marks;
mod parquet;
mod paths;
mod pictures;
mod record;
mod sheet;
mod text;
mod turns;

use std::{
    collections::BTreeMap,
    error::Error,
    fmt, io,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

pub use arrow::Columns;
use cell::Cell;
use ecso::Cause;
pub use folder::Unread;
use folder::{Files, Folder};
pub use mapping::Mapping;
use paths::Paths;
use record::Reader;

use crate::row::Row;

/// Rows as they are read. One that can't be read is an error of its own; the next is read all the
/// same.
pub type Rows = Box<dyn Iterator<Item = Result<Row, RowError>> + Send>;

/// Why the input can't be read.
#[derive(Debug)]
pub struct InputError {
    path: PathBuf,
    reason: Cause,
}

impl InputError {
    fn new(path: &Path, reason: impl Into<Cause>) -> Self {
        Self { path: path.to_owned(), reason: reason.into() }
    }

    fn of(path: &Path, error: impl Error + Send + Sync + 'static) -> Self {
        Self::new(path, Cause::from_error(error))
    }
}

impl fmt::Display for InputError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.reason)
    }
}

// By hand, as the cause's words are part of the error's own.
impl Error for InputError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.reason.source()
    }
}

/// Why one row can't be read.
#[derive(Debug, Clone, PartialEq)]
pub struct RowError {
    /// Its place, from 0; people are told the one from 1.
    pub number: u64,
    /// What is wrong.
    pub reason: Cause,
}

impl RowError {
    /// Whether the input ends here before its end: how many rows stand behind this one, nobody
    /// knows.
    #[must_use]
    pub fn is_cut_short(&self) -> bool {
        let mut causes = std::iter::successors(self.reason.source(), |cause| (*cause).source());
        causes.any(<dyn Error>::is::<CutShort>)
    }

    /// What tells it from another with its number, as [`Row::digest`] does for rows.
    #[must_use]
    pub fn digest(&self) -> String {
        blake3::hash(self.reason.to_string().as_bytes()).to_hex()[..32].to_owned()
    }
}

impl fmt::Display for RowError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "row {}: {}", self.number + 1, self.reason)
    }
}

impl Error for RowError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.reason.source()
    }
}

/// What makes it useless to read on in a file.
#[derive(Debug)]
struct CutShort(Cause);

impl fmt::Display for CutShort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

// By hand, as the cause's words are the error's own.
impl Error for CutShort {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.0.source()
    }
}

/// A cause by which all rows behind it are lost.
fn cut_short(cause: impl Into<Cause>) -> Cause {
    let cause = cause.into();
    Cause::new(cause.message().to_owned(), CutShort(cause))
}

/// A cause with the place where it was found before it.
fn at(place: &str, cause: Cause) -> Cause {
    Cause::new(format!("{place}: {cause}"), cause)
}

/// What is read, and how.
#[derive(Debug, Clone, Default)]
pub struct Input {
    /// A file (.jsonl, .json, .csv, .tsv, each also as .gz or .zst; .parquet), a folder of such
    /// files or of images, or files by a pattern (`*`, `?`).
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
        let files = match self.files()?.read {
            Folder::Images(files) => {
                return Ok(folder::rows(&self.path, files, self.query.clone()));
            }
            Folder::Tables(files) => files,
        };
        // What is wrong with a file is said before the first row is read. The last stays open.
        let mut open = None;
        for file in &files {
            open = Some(self.table(file)?);
        }
        let (input, single) = (self.clone(), files.len() == 1);
        let tables = files.into_iter().map(move |file| match open.take().filter(|_| single) {
            Some(table) => table,
            None => input.table(&file).unwrap_or_else(|error| {
                Box::new(std::iter::once(
                    Box::new(move |_| Err(cut_short(Cause::from_error(error)))) as Made,
                ))
            }),
        });
        Ok(Box::new(
            (0..)
                .zip(tables.flatten())
                .map(|(number, made)| made(number).map_err(|reason| RowError { number, reason })),
        ))
    }

    /// How many rows there are, where that is cheap to know.
    #[must_use]
    pub fn count(&self) -> Option<u64> {
        let count = |file: &Path| match folder::format(file).as_str() {
            "parquet" => parquet::count(file),
            "jsonl" | "ndjson" => json::count(file),
            "csv" => sheet::count(file, b','),
            "tsv" => sheet::count(file, b'\t'),
            _ => None,
        };
        match self.files().ok()?.read {
            Folder::Images(files) => Some(files.len() as u64),
            Folder::Tables(files) => files.iter().map(|file| count(file)).sum(),
        }
    }

    /// Whether it reads, or would read as soon as it is there, what is written into `folder`: rows
    /// must not be made of what is made of them.
    ///
    /// # Errors
    /// A path can't be looked at.
    pub fn reads_from(&self, folder: &Path) -> io::Result<bool> {
        let (read, folder) = (real(&self.path)?, real(folder)?);
        if self.pattern().is_some() {
            return Ok(may_match_below(&read, &folder));
        }
        let is_output =
            read.starts_with(folder.join("dataset")) || read == folder.join("journal.jsonl");
        Ok(is_output || self.path.is_dir() && folder.starts_with(read))
    }

    /// What is beside the files that are read, in a folder or behind a pattern.
    ///
    /// # Errors
    /// As [`Input::rows`].
    pub fn unread(&self) -> Result<Unread, InputError> {
        Ok(self.files()?.unread)
    }

    /// The pattern of several files, where the path is one.
    fn pattern(&self) -> Option<&str> {
        self.path.to_str().filter(|pattern| pattern.contains(['*', '?']) && !self.path.exists())
    }

    /// The files that are read, in order, and those that aren't.
    fn files(&self) -> Result<Files, InputError> {
        let path = &self.path;
        if path.is_dir() {
            return folder::look(path, self.query.is_some());
        }
        let Some(pattern) = self.pattern() else {
            return Ok(Files {
                read: Folder::Tables(vec![path.clone()]),
                unread: Unread::default(),
            });
        };
        let found =
            glob::glob_with(pattern, PATTERNS).map_err(|error| InputError::of(path, error))?;
        let files: Result<Vec<PathBuf>, _> = found.collect();
        let files = files.map_err(|error| InputError::of(path, error))?;
        let (mut files, others): (Vec<PathBuf>, Vec<PathBuf>) =
            files.into_iter().partition(|file| file.is_file());
        if files.is_empty() {
            return Err(InputError::new(path, "no file has such a name"));
        }
        files.sort();
        Ok(Files { read: Folder::Tables(files), unread: Unread::of(&others) })
    }

    /// The rows of one file.
    fn table(&self, file: &Path) -> Result<Table, InputError> {
        let folder = file.parent().unwrap_or(Path::new("")).to_owned();
        let roots = match &self.image_root {
            Some(root) => vec![root.clone()],
            // Datasets keep tables and images in folders beside each other, as what is packed here
            // does.
            None => {
                [folder.clone()].into_iter().chain(folder.parent().map(Path::to_owned)).collect()
            }
        };
        let (mut types, has_query) = (BTreeMap::new(), self.query.is_some());
        let records = match folder::format(file).as_str() {
            "jsonl" | "ndjson" | "json" => json::records(file)?,
            "csv" => sheet::records(file, b',', &self.mapping, has_query)?,
            "tsv" => sheet::records(file, b'\t', &self.mapping, has_query)?,
            "parquet" => {
                let (records, found) = parquet::records(file, &self.mapping, has_query)?;
                types = found;
                records
            }
            "zip" | "tar" | "tgz" | "7z" | "rar" => {
                return Err(InputError::new(
                    file,
                    "an archive; unpack it, and name the file or the folder that was in it",
                ));
            }
            _ => {
                let known = "not .jsonl, .json, .csv, .tsv (or one of these as .gz or .zst), .parquet or a folder of images";
                return Err(InputError::new(file, known));
            }
        };
        let (mapping, query, paths) = (self.mapping.clone(), self.query.clone(), Paths::new(roots));
        let reader = Arc::new(Reader { mapping, query, paths, types, is_careful: false });
        Ok(Box::new(records.map(move |record| {
            let reader = Arc::clone(&reader);
            Box::new(move |number| reader.row(number, record?)) as Made
        })))
    }
}

/// Whether a pattern can match something below a folder.
fn may_match_below(pattern: &Path, folder: &Path) -> bool {
    let text = |part: Component<'_>| part.as_os_str().to_string_lossy().into_owned();
    let mut parts = pattern.components().map(text);
    for name in folder.components().map(text) {
        match parts.next() {
            Some(part) if part == "**" => return true,
            Some(part)
                if part == name
                    || glob::Pattern::new(&part).is_ok_and(|part| part.matches(&name)) => {}
            _ => return false,
        }
    }
    parts.next().is_some()
}

/// How patterns are read.
const PATTERNS: glob::MatchOptions = glob::MatchOptions {
    case_sensitive: true,
    require_literal_separator: false,
    require_literal_leading_dot: true,
};

/// A path without links, as far as it is there.
fn real(path: &Path) -> io::Result<PathBuf> {
    let path = std::path::absolute(path)?;
    let known =
        |above: &Path| Some(above.canonicalize().ok()?.join(path.strip_prefix(above).ok()?));
    Ok(path.ancestors().find_map(known).unwrap_or_else(|| path.clone()))
}

/// Records of a file.
type Records = Box<dyn Iterator<Item = Result<Cell, Cause>> + Send>;
/// A row, but for its number.
type Made = Box<dyn FnOnce(u64) -> Result<Row, Cause> + Send>;
/// The rows of a file.
type Table = Box<dyn Iterator<Item = Made> + Send>;
