//! Reads rows one by one: from JSON lines, JSON, CSV, Parquet, or a folder of images. Only the
//! current row is in memory.

mod arrow;
mod cell;
mod folder;
mod images;
mod json;
mod mapping;
mod marks;
mod parquet;
mod paths;
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

/// An iterator over rows. A row that can't be read is an error; the iterator continues with the
/// next.
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

    fn from_error(path: &Path, error: impl Error + Send + Sync + 'static) -> Self {
        Self::new(path, Cause::from_error(error))
    }
}

impl fmt::Display for InputError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.reason)
    }
}

// Not derived, because the message includes that of the cause.
impl Error for InputError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.reason.source()
    }
}

/// Why a row can't be read.
#[derive(Debug, Clone, PartialEq)]
pub struct RowError {
    /// The row's number, from 0. Users see it plus one.
    pub number: u64,
    /// The cause.
    pub reason: Cause,
}

impl RowError {
    /// Whether the input is truncated here, so that an unknown number of rows is missing.
    #[must_use]
    pub fn is_cut_short(&self) -> bool {
        let mut causes = std::iter::successors(self.reason.source(), |cause| (*cause).source());
        causes.any(<dyn Error>::is::<CutShort>)
    }

    /// Identifies the error among those with its number, as [`Row::digest`] does for rows.
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

/// An error after which a file can't be read any further.
#[derive(Debug)]
struct CutShort(Cause);

impl fmt::Display for CutShort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

// Not derived, because the message is that of the cause.
impl Error for CutShort {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.0.source()
    }
}

/// Marks a cause as one after which all rows are lost.
fn cut_short(cause: impl Into<Cause>) -> Cause {
    let cause = cause.into();
    Cause::new(cause.message().to_owned(), CutShort(cause))
}

/// Prefixes a cause with where it occurred.
fn at(place: &str, cause: Cause) -> Cause {
    Cause::new(format!("{place}: {cause}"), cause)
}

/// What to read, and how.
#[derive(Debug, Clone, Default)]
pub struct Input {
    /// A file (.jsonl, .json, .csv, .tsv, each also as .gz or .zst; .parquet), a folder of such
    /// files or of images, or a glob pattern (`*`, `?`).
    pub path: PathBuf,
    /// Which columns hold which fields.
    pub mapping: Mapping,
    /// The query for rows without one.
    pub query: Option<String>,
    /// The folder that relative image paths start from; by default the input's folder.
    pub image_root: Option<PathBuf>,
}

impl Input {
    /// Reads the input from its beginning.
    ///
    /// # Errors
    /// [`InputError`] if the input does not exist or its format is unknown.
    pub fn rows(&self) -> Result<Rows, InputError> {
        let files = match self.files()?.read {
            Folder::Images(files) => {
                return Ok(folder::rows(&self.path, files, self.query.clone()));
            }
            Folder::Tables(files) => files,
        };
        // Reports problems with any file before the first row is read. The last file stays open.
        let mut open = None;
        for file in &files {
            open = Some(self.table(file)?);
        }
        let (input, single) = (self.clone(), files.len() == 1);
        let tables = files.into_iter().map(move |file| match open.take().filter(|_| single) {
            Some(table) => table,
            None => input.table(&file).unwrap_or_else(|error| {
                Box::new(std::iter::once(
                    Box::new(move |_| Err(cut_short(Cause::from_error(error)))) as RowBuilder,
                ))
            }),
        });
        Ok(Box::new(
            (0..)
                .zip(tables.flatten())
                .map(|(number, build)| build(number).map_err(|reason| RowError { number, reason })),
        ))
    }

    /// The number of rows, if counting is cheap.
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

    /// Whether files that are written to `folder` would become part of the input.
    ///
    /// # Errors
    /// A path can't be resolved.
    pub fn reads_from(&self, folder: &Path) -> io::Result<bool> {
        let (input, folder) = (resolve(&self.path)?, resolve(folder)?);
        if self.pattern().is_some() {
            return Ok(may_match_below(&input, &folder));
        }
        let is_output =
            input.starts_with(folder.join("dataset")) || input == folder.join("journal.jsonl");
        Ok(is_output || self.path.is_dir() && folder.starts_with(input))
    }

    /// The files in the folder, or matched by the pattern, that are not read.
    ///
    /// # Errors
    /// As [`Input::rows`].
    pub fn unread(&self) -> Result<Unread, InputError> {
        Ok(self.files()?.unread)
    }

    /// The glob pattern, if the path is one.
    fn pattern(&self) -> Option<&str> {
        self.path.to_str().filter(|pattern| pattern.contains(['*', '?']) && !self.path.exists())
    }

    /// The files that are read, in order, and those that are not.
    fn files(&self) -> Result<Files, InputError> {
        let path = &self.path;
        if path.is_dir() {
            return folder::inspect(path, self.query.is_some());
        }
        let Some(pattern) = self.pattern() else {
            return Ok(Files {
                read: Folder::Tables(vec![path.clone()]),
                unread: Unread::default(),
            });
        };
        let paths = glob::glob_with(pattern, MATCH_OPTIONS)
            .map_err(|error| InputError::from_error(path, error))?;
        let files: Result<Vec<PathBuf>, _> = paths.collect();
        let files = files.map_err(|error| InputError::from_error(path, error))?;
        let (mut files, others): (Vec<PathBuf>, Vec<PathBuf>) =
            files.into_iter().partition(|file| file.is_file());
        if files.is_empty() {
            return Err(InputError::new(path, "no file matches this pattern"));
        }
        files.sort();
        Ok(Files { read: Folder::Tables(files), unread: Unread::count(&others) })
    }

    /// The rows of one file.
    fn table(&self, file: &Path) -> Result<Table, InputError> {
        let folder = file.parent().unwrap_or(Path::new("")).to_owned();
        let roots = match &self.image_root {
            Some(root) => vec![root.clone()],
            // Datasets often have tables and images in sibling folders, as those packed here.
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
                let records;
                (records, types) = parquet::records(file, &self.mapping, has_query)?;
                records
            }
            "zip" | "tar" | "tgz" | "7z" | "rar" => {
                return Err(InputError::new(
                    file,
                    "this is an archive; unpack it and name the file or folder in it",
                ));
            }
            _ => {
                return Err(InputError::new(
                    file,
                    "unknown format; use .jsonl, .json, .csv or .tsv (also .gz or .zst), \
                     .parquet, or a folder of images",
                ));
            }
        };
        let (mapping, query, paths) = (self.mapping.clone(), self.query.clone(), Paths::new(roots));
        let reader =
            Arc::new(Reader { mapping, query, paths, types, forbids_paths_in_text: false });
        Ok(Box::new(records.map(move |record| {
            let reader = Arc::clone(&reader);
            Box::new(move |number| reader.row(number, record?)) as RowBuilder
        })))
    }
}

/// Whether a pattern can match a path below a folder.
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

const MATCH_OPTIONS: glob::MatchOptions = glob::MatchOptions {
    case_sensitive: true,
    require_literal_separator: false,
    require_literal_leading_dot: true,
};

/// Resolves links in a path, as far as it exists.
fn resolve(path: &Path) -> io::Result<PathBuf> {
    let path = std::path::absolute(path)?;
    let known =
        |above: &Path| Some(above.canonicalize().ok()?.join(path.strip_prefix(above).ok()?));
    Ok(path.ancestors().find_map(known).unwrap_or_else(|| path.clone()))
}

/// The records of a file.
type Records = Box<dyn Iterator<Item = Result<Cell, Cause>> + Send>;
/// Builds a row from its number.
type RowBuilder = Box<dyn FnOnce(u64) -> Result<Row, Cause> + Send>;
/// The rows of a file.
type Table = Box<dyn Iterator<Item = RowBuilder> + Send>;
