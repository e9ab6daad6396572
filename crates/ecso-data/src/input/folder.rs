//! A folder of images; the query of `a.png` stands in `a.txt`, or is the same for all. What else a
//! folder may be is found out here as well.

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
    record::WORDS,
    text,
};
use crate::{
    regular,
    row::{Picture, Row},
};

/// Endings of tables.
pub(super) const TABLES: [&str; 6] = ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"];

/// Endings of images. What can't be read of these is an error of its row.
const IMAGES: [&str; 14] = [
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "heic", "heif",
    "avif", "pdf",
];

/// Files of Hugging Face that are about tables.
const ABOUT: [&str; 4] =
    ["dataset_infos.json", "dataset_info.json", "state.json", "dataset_dict.json"];

/// Files that lie beside those that are read, by kind: their usual ending, such as `.xz`, or words.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unread(BTreeMap<String, u64>);

impl Unread {
    pub(super) fn of<'a>(files: impl IntoIterator<Item = &'a PathBuf>) -> Self {
        let mut kinds = BTreeMap::new();
        for file in files {
            let ending = ending(file);
            let is_usual = ending.len() <= 8 && ending.contains(char::is_alphabetic);
            let kind = match () {
                () if !file.is_file() => "folders or links".into(),
                () if is_usual => format!(".{ending}"),
                () => "without a usual ending".into(),
            };
            *kinds.entry(kind).or_default() += 1;
        }
        Self(kinds)
    }

    /// Whether there are none.
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

/// What is in a folder and the folders below it, in order.
#[derive(Debug, Default)]
struct Held {
    images: Vec<PathBuf>,
    tables: Vec<PathBuf>,
    others: Vec<PathBuf>,
}

/// What a folder is.
pub(super) enum Folder {
    Images(Vec<PathBuf>),
    Tables(Vec<PathBuf>),
}

/// The files that are read, and what lies beside them.
pub(super) struct Files {
    pub(super) read: Folder,
    pub(super) unread: Unread,
}

pub(super) fn look(folder: &Path, has_query: bool) -> Result<Files, InputError> {
    let mut held = Held::default();
    collect(folder, &mut held)?;
    held.images.sort();
    held.tables.sort();
    // A folder that says what is in it, as Hugging Face's `imagefolder` does.
    let said = ["metadata.jsonl", "metadata.csv", "metadata.parquet"].map(|name| folder.join(name));
    if let Some(said) = said.into_iter().find(|file| file.is_file()) {
        held.tables.retain(|table| *table != said);
        let unread = Unread::of(held.tables.iter().chain(&held.others));
        return Ok(Files { read: Folder::Tables(vec![said]), unread });
    }
    let kinds: BTreeSet<String> = held.tables.iter().map(|file| format(file)).collect();
    let texts: HashSet<PathBuf> =
        held.images.iter().map(|image| image.with_extension("txt")).collect();
    let has_texts = || has_query || held.others.iter().any(|file| texts.contains(file));
    match (held.images.is_empty(), kinds.len()) {
        (true, 0) => {
            let nothing = "no image (.jpg, .jpeg, .png, .webp, .gif), no metadata.jsonl and no table (.parquet, .jsonl, .json, .csv) in it";
            let unread = Unread::of(&held.others);
            let but = if unread.is_empty() { String::new() } else { format!(", but {unread}") };
            Err(InputError::new(folder, format!("{nothing}{but}")))
        }
        (true, 1) => {
            Ok(Files { read: Folder::Tables(held.tables), unread: Unread::of(&held.others) })
        }
        (false, tables) if tables == 0 || has_texts() => {
            let others = held.others.iter().filter(|file| !texts.contains(*file));
            let unread = Unread::of(held.tables.iter().chain(others));
            Ok(Files { read: Folder::Images(held.images), unread })
        }
        _ => {
            let first = held.tables[0]
                .strip_prefix(folder)
                .unwrap_or(&held.tables[0])
                .display()
                .to_string();
            let reason = format!(
                "it holds {} images and {} tables (.{}), such as {first}; name one file, or several as '{}/*.{}'",
                held.images.len(),
                held.tables.len(),
                kinds.into_iter().collect::<Vec<_>>().join(", ."),
                held.tables[0].parent().unwrap_or(folder).display(),
                ending(&held.tables[0]),
            );
            Err(InputError::new(folder, reason))
        }
    }
}

pub(super) fn rows(folder: &Path, files: Vec<PathBuf>, query: Option<String>) -> Rows {
    let folder = folder.to_owned();
    Box::new((0..).zip(files).map(move |(number, path)| {
        let mut images = vec![Picture::File(path.clone())];
        let asked = asked(&path, query.as_deref()).and_then(|asked| {
            let mut pieces = Vec::new();
            marks::pieces(&asked, &|path| Ok(Picture::File(path.into())), &mut pieces)?;
            marks::alone(Turn { role: Role::User, pieces }, &mut images, 0)
        });
        let query = asked.map_err(|reason| RowError { number, reason })?;
        let below = path.strip_prefix(&folder).unwrap_or(&path);
        let category =
            below.parent().map(|parent| parent.display().to_string()).unwrap_or_default();
        Ok(Row {
            number,
            id: below.display().to_string(),
            before: Vec::new(),
            query,
            images,
            category,
            draft: None,
        })
    }))
}

/// The query of an image.
fn asked(image: &Path, query: Option<&str>) -> Result<String, Cause> {
    let path = image.with_extension("txt");
    let failed = |cause: Cause| {
        let told = format!(
            "{}: {cause}; write the query there, or give one for all with --query",
            path.display()
        );
        Cause::new(told, cause)
    };
    let written = match regular::read(&path, WORDS) {
        Ok(bytes) if bytes.len() > WORDS => {
            return Err(failed(format!("it has more than {WORDS} bytes").into()));
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
        _ if !written.is_empty() => Ok(written),
        Some(query) => Ok(query.to_owned()),
        None => Err(failed("it is empty".into())),
    }
}

fn collect(folder: &Path, held: &mut Held) -> Result<(), InputError> {
    let entries = std::fs::read_dir(folder).map_err(|error| InputError::of(folder, error))?;
    for entry in entries {
        let entry = entry.map_err(|error| InputError::of(folder, error))?;
        let kind = entry.file_type().map_err(|error| InputError::of(folder, error))?;
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        // What systems keep for themselves, as `._a.png` and `.cache`.
        if name.starts_with('.') || name == "__MACOSX" {
            continue;
        }
        // Links to folders are not followed: they could lead round in circles.
        if kind.is_dir() {
            collect(&path, held)?;
        } else if !path.is_file() {
            held.others.push(path);
        } else if is_image(&path) {
            held.images.push(path);
        } else if !TABLES.contains(&format(&path).as_str()) {
            held.others.push(path);
        } else if !ABOUT.contains(&name.as_str()) {
            held.tables.push(path);
        }
    }
    Ok(())
}

fn ending(path: &Path) -> String {
    path.extension().unwrap_or_default().to_string_lossy().to_lowercase()
}

/// The ending that says what a table is; of a text that is compressed the one before.
pub(super) fn format(path: &Path) -> String {
    match ending(path).as_str() {
        "gz" | "gzip" | "zst" | "zstd" => {
            match ending(Path::new(path.file_stem().unwrap_or_default())).as_str() {
                "parquet" | "" => ending(path),
                inner => inner.to_owned(),
            }
        }
        ending => ending.to_owned(),
    }
}

/// Whether a file's name ends as those of images do.
pub(super) fn is_image(path: &Path) -> bool {
    IMAGES.contains(&ending(path).as_str())
}
