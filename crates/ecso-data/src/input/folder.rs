//! Folders: of images, where the query of `a.png` is in `a.txt` or the same for all, or of tables.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fmt,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use ecso::{Cause, Role};
use serde::{Deserialize, Serialize};

use super::{
    InputError, RowError, Rows,
    marks::{self, Turn},
    record::MAX_TEXT,
    text,
};
use crate::{
    regular,
    row::{ImageSource, Row},
};

/// Extensions of tables.
pub(super) const TABLES: [&str; 6] = ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"];

/// Extensions of images. An image that can't be read is an error of its row.
const IMAGES: [&str; 14] = [
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "heic", "heif",
    "avif", "pdf",
];

/// Metadata files of Hugging Face datasets.
const METADATA: [&str; 4] =
    ["dataset_infos.json", "dataset_info.json", "state.json", "dataset_dict.json"];

/// Counts of files that are not read, by kind: their extension, such as `.xz`, or a description.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unread(BTreeMap<String, u64>);

impl Unread {
    pub(super) fn count<'a>(files: impl IntoIterator<Item = &'a PathBuf>) -> Self {
        let mut kinds = BTreeMap::new();
        for file in files {
            let extension = extension(file);
            let is_usual = extension.len() <= 8 && extension.contains(char::is_alphabetic);
            let kind = match () {
                () if !file.is_file() => "folders or links".into(),
                () if is_usual => format!(".{extension}"),
                () => "without a usual ending".into(),
            };
            *kinds.entry(kind).or_default() += 1;
        }
        Self(kinds)
    }

    /// Whether all files are read.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for Unread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts: Vec<String> =
            self.0.iter().map(|(kind, files)| format!("{files} {kind}")).collect();
        f.write_str(&counts.join(", "))
    }
}

/// The files in a folder and its subfolders.
#[derive(Debug, Default)]
struct Listing {
    images: Vec<PathBuf>,
    tables: Vec<PathBuf>,
    others: Vec<PathBuf>,
}

/// How a folder is read.
pub(super) enum Folder {
    Images(Vec<PathBuf>),
    Tables(Vec<PathBuf>),
}

/// The files that are read, and counts of those that are not.
pub(super) struct Files {
    pub(super) read: Folder,
    pub(super) unread: Unread,
}

/// Decides how a folder is read.
pub(super) fn inspect(folder: &Path, has_query: bool) -> Result<Files, InputError> {
    let mut listing = Listing::default();
    collect(folder, &mut listing)?;
    listing.images.sort();
    listing.tables.sort();
    // A folder with a table of its images, as Hugging Face's `imagefolder` has it.
    let mut metadata =
        ["metadata.jsonl", "metadata.csv", "metadata.parquet"].map(|name| folder.join(name));
    if let Some(metadata) = metadata.iter_mut().find(|file| file.is_file()).map(std::mem::take) {
        listing.tables.retain(|table| *table != metadata);
        let unread = Unread::count(listing.tables.iter().chain(&listing.others));
        return Ok(Files { read: Folder::Tables(vec![metadata]), unread });
    }
    let kinds: BTreeSet<String> = listing.tables.iter().map(|file| format(file)).collect();
    let texts: HashSet<PathBuf> =
        listing.images.iter().map(|image| image.with_extension("txt")).collect();
    let has_texts = || has_query || listing.others.iter().any(|file| texts.contains(file));
    match (listing.images.is_empty(), kinds.len()) {
        (true, 0) => {
            let nothing = "no image (.jpg, .jpeg, .png, .webp, .gif), no metadata.jsonl and no \
                           table (.parquet, .jsonl, .json, .csv) in it";
            let unread = Unread::count(&listing.others);
            let but = if unread.is_empty() { String::new() } else { format!(", but {unread}") };
            Err(InputError::new(folder, format!("{nothing}{but}")))
        }
        (true, 1) => Ok(Files {
            read: Folder::Tables(listing.tables),
            unread: Unread::count(&listing.others),
        }),
        (false, tables) if tables == 0 || has_texts() => {
            let others = listing.others.iter().filter(|file| !texts.contains(*file));
            let unread = Unread::count(listing.tables.iter().chain(others));
            Ok(Files { read: Folder::Images(listing.images), unread })
        }
        _ => {
            let first = listing.tables[0]
                .strip_prefix(folder)
                .unwrap_or(&listing.tables[0])
                .display()
                .to_string();
            let reason = format!(
                "the folder has {} images and {} tables (.{}), such as {first}; name one file, or \
                 several as '{}/*.{}'",
                listing.images.len(),
                listing.tables.len(),
                kinds.into_iter().collect::<Vec<_>>().join(", ."),
                listing.tables[0].parent().unwrap_or(folder).display(),
                extension(&listing.tables[0]),
            );
            Err(InputError::new(folder, reason))
        }
    }
}

/// The rows of a folder of images.
pub(super) fn rows(folder: &Path, files: Vec<PathBuf>, query: Option<String>) -> Rows {
    let folder = folder.to_owned();
    Box::new((0..).zip(files).map(move |(number, path)| {
        let mut images = vec![ImageSource::File(path.clone())];
        let text = read_query(&path, query.as_deref()).and_then(|query| {
            let mut pieces = Vec::new();
            marks::split(&query, &|path| Ok(ImageSource::File(path.into())), &mut pieces)?;
            marks::place_in_turn(Turn { role: Role::User, pieces }, &mut images, 0)
        });
        let query = text.map_err(|reason| RowError { number, reason })?;
        let relative = path.strip_prefix(&folder).unwrap_or(&path);
        let category =
            relative.parent().map(|parent| parent.display().to_string()).unwrap_or_default();
        Ok(Row {
            number,
            id: relative.display().to_string(),
            earlier: Vec::new(),
            query,
            images,
            category,
            draft: None,
        })
    }))
}

/// Reads the query of an image.
fn read_query(image: &Path, query: Option<&str>) -> Result<String, Cause> {
    let path = image.with_extension("txt");
    let failed = |cause: Cause| {
        let message = format!(
            "{}: {cause}; write the query there, or pass one for all with --query",
            path.display()
        );
        Cause::new(message, cause)
    };
    let text = match regular::read(&path, MAX_TEXT) {
        Ok(bytes) if bytes.len() > MAX_TEXT => {
            return Err(failed(format!("the file has more than {MAX_TEXT} bytes").into()));
        }
        Ok(bytes) => {
            let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
            let text = std::str::from_utf8(bytes).map_err(|error| failed(text::not_utf8(error)))?;
            text.trim().to_owned()
        }
        Err(error) if error.kind() == ErrorKind::NotFound && query.is_some() => String::new(),
        Err(error) => return Err(failed(Cause::from_error(error))),
    };
    match query {
        _ if !text.is_empty() => Ok(text),
        Some(query) => Ok(query.to_owned()),
        None => Err(failed("the file is empty".into())),
    }
}

/// Lists a folder and its subfolders.
fn collect(folder: &Path, listing: &mut Listing) -> Result<(), InputError> {
    let entries =
        std::fs::read_dir(folder).map_err(|error| InputError::from_error(folder, error))?;
    for entry in entries {
        let entry = entry.map_err(|error| InputError::from_error(folder, error))?;
        let kind = entry.file_type().map_err(|error| InputError::from_error(folder, error))?;
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        // Hidden files of operating systems and tools, such as `._a.png` and `.cache`.
        if name.starts_with('.') || name == "__MACOSX" {
            continue;
        }
        // Links to folders are not followed: they may form cycles.
        if kind.is_dir() {
            collect(&path, listing)?;
        } else if !path.is_file() {
            listing.others.push(path);
        } else if is_image(&path) {
            listing.images.push(path);
        } else if !TABLES.contains(&format(&path).as_str()) {
            listing.others.push(path);
        } else if !METADATA.contains(&name.as_str()) {
            listing.tables.push(path);
        }
    }
    Ok(())
}

/// The extension in lower case.
fn extension(path: &Path) -> String {
    path.extension().unwrap_or_default().to_string_lossy().to_lowercase()
}

/// The extension that tells the format of a table; of a compressed file, the one before.
pub(super) fn format(path: &Path) -> String {
    match extension(path).as_str() {
        "gz" | "gzip" | "zst" | "zstd" => {
            match extension(Path::new(path.file_stem().unwrap_or_default())).as_str() {
                "parquet" | "" => extension(path),
                inner => inner.to_owned(),
            }
        }
        extension => extension.to_owned(),
    }
}

/// Whether a file has the extension of an image.
pub(super) fn is_image(path: &Path) -> bool {
    IMAGES.contains(&extension(path).as_str())
}
