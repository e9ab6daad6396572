//! Finds files in the places where people have them. Image files may have another extension, case
//! or Unicode form, or Windows path separators.

use std::{
    borrow::Cow,
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use ecso::{decode_base64, decode_data_url, is_data_url};
use unicode_normalization::UnicodeNormalization;

use super::benchmark::DataError;
use crate::{
    item::{ItemError, Picture},
    text::{cut, shortened},
};

/// The extensions of image files.
const EXTENSIONS: [&str; 7] = ["jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp"];
/// The maximum size in bytes of an image that is embedded in text. The limit of the run is checked
/// later.
const MAX_EMBEDDED_BYTES: usize = 64 << 20;
/// A text longer than this is not a file name.
const MAX_NAME_LENGTH: usize = 4096;
/// A text shorter than this is not an image in base64.
const MIN_BASE64_LENGTH: usize = 64;

/// The first of `candidates` that exists in the folder `data`, or `data` itself if it is a file.
pub(super) fn locate(data: &Path, candidates: &[&str]) -> Result<PathBuf, DataError> {
    if data.is_file() {
        return Ok(data.to_owned());
    }
    if !data.exists() {
        return Err(DataError::new(data, "there is no such file or folder"));
    }
    let existing = candidates.iter().map(|name| data.join(name)).find(|path| path.exists());
    existing.ok_or_else(|| {
        DataError::new(data, format!("it contains none of {}", candidates.join(", ")))
    })
}

/// Finds image files below a folder. Listings of folders are remembered.
pub(super) struct Finder {
    root: PathBuf,
    folders: HashMap<PathBuf, HashMap<String, Vec<PathBuf>>>,
}

impl Finder {
    pub(super) fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), folders: HashMap::new() }
    }

    /// Finds the file called `name`: exactly this one; otherwise the only file whose name differs
    /// just in its Unicode form, then in its case, then in its extension.
    pub(super) fn find(&mut self, name: &str) -> Result<PathBuf, ItemError> {
        let name = strip_file_scheme(name);
        let exact = self.root.join(&*name);
        if exact.is_file() {
            return Ok(exact);
        }
        let missing =
            format!("{} is missing, with any extension", self.root.join(cut(&name)).display());
        let missing = || ItemError::MissingImage(missing.as_str().into());
        let name = name.trim().replace('\\', "/");
        let mut path = if name.starts_with('/') { PathBuf::from("/") } else { self.root.clone() };
        let mut parts = name.split('/').filter(|part| !part.is_empty() && *part != ".").peekable();
        if parts.peek().is_none() {
            return Err(missing());
        }
        while let Some(part) = parts.next() {
            let is_last = parts.peek().is_none();
            let exact = path.join(part);
            path = if if is_last { exact.is_file() } else { exact.is_dir() } {
                exact
            } else {
                self.find_similar(&path, part, is_last)?.ok_or_else(missing)?
            };
        }
        if path.is_file() { Ok(path) } else { Err(missing()) }
    }

    /// Finds the first of these names that exists. If none does, the error is that of the first
    /// name.
    pub(super) fn first(&mut self, names: &[String]) -> Result<PathBuf, ItemError> {
        let mut first_error = None;
        for name in names {
            match self.find(name) {
                Ok(path) => return Ok(path),
                Err(error) => first_error.get_or_insert(error),
            };
        }
        Err(first_error.unwrap_or_else(|| ItemError::MissingImage("no image is named".into())))
    }

    /// The image that a cell or field describes: a file name, a data URL, or base64.
    pub(super) fn picture(&mut self, text: &str) -> Result<Picture, ItemError> {
        if is_data_url(text) {
            let bytes = decode_data_url(text, MAX_EMBEDDED_BYTES)
                .map_err(|error| ItemError::Unreadable(shortened(error)))?;
            return Ok(Picture::Bytes(bytes.into()));
        }
        let start: String = text.trim_start().chars().take(8).collect::<String>().to_lowercase();
        if start.starts_with("http://") || start.starts_with("https://") {
            let reason =
                format!("images are read from files; nothing is fetched: {}", cut(text.trim()));
            return Err(ItemError::Unreadable(reason.into()));
        }
        match (self.find(text), base64(text)) {
            (Ok(path), _) => Ok(Picture::File(path)),
            (Err(_), Some(bytes)) => Ok(Picture::Bytes(bytes)),
            (Err(error), None) => Err(error),
        }
    }

    /// The only entry of `folder` that matches `name` by the rules of [`Finder::find`].
    fn find_similar(
        &mut self,
        folder: &Path,
        name: &str,
        is_file: bool,
    ) -> Result<Option<PathBuf>, ItemError> {
        let entries = self.folders.entry(folder.to_owned()).or_insert_with(|| listing(folder));
        let key = if is_file { fold(stem(name)) } else { fold(name) };
        let candidates = entries.get(&key).into_iter().flatten();
        let candidates: Vec<&PathBuf> = candidates
            .filter(|path| if is_file { path.is_file() } else { path.is_dir() })
            .collect();
        let rules: [&dyn Fn(&str) -> bool; 4] = [
            &|other| normalize(other) == normalize(name),
            &|other| fold(other) == fold(name),
            &|other| is_file && normalize(stem(other)) == normalize(stem(name)),
            &|_| is_file,
        ];
        for rule in rules {
            let fits = |path: &&&PathBuf| {
                path.file_name().is_some_and(|name| rule(&name.to_string_lossy()))
            };
            match candidates.iter().filter(fits).collect::<Vec<_>>().as_slice() {
                [] => {}
                [only] => return Ok(Some((**only).clone())),
                [one, another, ..] => {
                    let missing = format!(
                        "{} is missing, and both {} and {} could be meant",
                        folder.join(cut(name)).display(),
                        one.display(),
                        another.display()
                    );
                    return Err(ItemError::MissingImage(missing.into()));
                }
            }
        }
        Ok(None)
    }
}

/// A file name without `file://`.
fn strip_file_scheme(name: &str) -> Cow<'_, str> {
    let is_url = name.get(..7).is_some_and(|scheme| scheme.eq_ignore_ascii_case("file://"));
    let path =
        url::Url::parse(name).ok().filter(|_| is_url).and_then(|url| url.to_file_path().ok());
    path.map_or(Cow::Borrowed(name), |path| path.to_string_lossy().into_owned().into())
}

/// The entries of a folder, by their folded names with and without an image extension.
fn listing(folder: &Path) -> HashMap<String, Vec<PathBuf>> {
    let mut entries: HashMap<String, Vec<PathBuf>> = HashMap::new();
    for path in std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path())
    {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let (folded_stem, folded_name) = (fold(stem(&name)), fold(&name));
        if folded_stem != folded_name {
            entries.entry(folded_name).or_default().push(path.clone());
        }
        entries.entry(folded_stem).or_default().push(path);
    }
    entries
}

/// A name without an image extension.
fn stem(name: &str) -> &str {
    match name.rsplit_once('.') {
        Some((stem, extension)) if EXTENSIONS.contains(&extension.to_lowercase().as_str()) => stem,
        _ => name,
    }
}

/// Whether a text names an image file, or is an image.
#[must_use]
pub fn is_image(text: &str) -> bool {
    let text = text.trim();
    let is_file = text.len() <= MAX_NAME_LENGTH && !text.contains('\n') && stem(text) != text;
    is_file || is_data_url(text) || base64(text).is_some()
}

/// A name in Unicode normalization form C.
fn normalize(name: &str) -> String {
    name.nfc().collect()
}

/// A name in lower case and Unicode normalization form C.
fn fold(name: &str) -> String {
    normalize(&name.to_lowercase())
}

/// An image in bare base64; `None` if the text is anything else.
pub(super) fn base64(text: &str) -> Option<Arc<[u8]>> {
    let bytes = Some(text.trim()).filter(|text| text.len() >= MIN_BASE64_LENGTH)?;
    let bytes = decode_base64(bytes, MAX_EMBEDDED_BYTES).ok()?;
    image::guess_format(&bytes).ok()?;
    Some(bytes.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for file in files {
            let path = folder.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, file).unwrap();
        }
        folder
    }

    #[test]
    fn files_are_found_under_similar_names() {
        let files = [
            "a/1.png",
            "a/2.JPG",
            "a/3.webp",
            "Ordner \u{fc}/Bild \u{e4}.png",
            "b/c\u{327}.jpeg",
            "a/v1.0.gif",
        ];
        let folder = folder(&files);
        let mut finder = Finder::new(folder.path());
        for (name, file) in [
            ("a/1.jpg", "a/1.png"),
            ("a\\1.JPEG", "a/1.png"),
            ("./a/2.jpg", "a/2.JPG"),
            ("A/3.jpg", "a/3.webp"),
            ("a//3", "a/3.webp"),
            ("a/../a/v1.0.jpg", "a/v1.0.gif"),
            (" a/1.png\n", "a/1.png"),
            ("Ordner u\u{308}/Bild a\u{308}.png", "Ordner \u{fc}/Bild \u{e4}.png"),
            ("ordner \u{dc}\\BILD \u{c4}.jpg", "Ordner \u{fc}/Bild \u{e4}.png"),
            ("b/\u{e7}.jpg", "b/c\u{327}.jpeg"),
        ] {
            let candidates = finder.find(name).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(std::fs::read_to_string(candidates).unwrap(), file, "{name}");
        }
        let url = url::Url::from_file_path(folder.path().join(files[3])).unwrap();
        assert!(finder.find(url.as_str()).is_ok(), "{url}");
        for name in [
            "a/4.jpg",
            "a",
            "",
            ".",
            "..",
            "a/1.png/1.png",
            "C:\\a\\1.png",
            "~/1.png",
            "\0",
            &"x".repeat(5000),
        ] {
            let error = finder.find(name).unwrap_err();
            assert!(
                matches!(error, ItemError::MissingImage(_)) && error.to_string().len() < 500,
                "{error}"
            );
        }
    }

    #[test]
    fn an_ambiguous_name_finds_no_file() {
        let folder = folder(&["1.png", "1.webp", "2.png", "2.PNG", "3.jpg", "3.png"]);
        let mut finder = Finder::new(folder.path());
        for name in ["1.jpg", "2.Png", "2.jpg"] {
            let error = finder.find(name).unwrap_err().to_string();
            assert!(error.contains("could be meant"), "{error}");
        }
        assert!(
            ["2.png", "2.PNG", "3.jpg", "3.JPG"].into_iter().all(|name| finder.find(name).is_ok())
        );
    }

    #[test]
    fn texts_that_name_an_image_are_recognised() {
        for text in
            ["a.png", "photos/1.JPG", " https://example.com/a.webp", "data:image/png;base64,AAAA"]
        {
            assert!(is_image(text), "{text}");
        }
        for text in ["", "bread", "a.txt", "Look at\na.png", "Where is the .png of it?"] {
            assert!(!is_image(text), "{text}");
        }
    }

    #[test]
    fn images_may_be_embedded_in_the_text() {
        let folder = folder(&["1.png"]);
        let mut finder = Finder::new(folder.path());
        let png = base64::Engine::encode(
            &base64::prelude::BASE64_STANDARD,
            [b"\x89PNG\r\n\x1a\n".repeat(9)].concat(),
        );
        for text in [png.clone(), format!("data:image/png;base64,{png}")] {
            assert!(matches!(finder.picture(&text), Ok(Picture::Bytes(_))), "{text}");
        }
        for text in ["data:image/png;base64,@", "https://example.com/1.png", &"QUJD".repeat(99)] {
            let error = finder.picture(text).unwrap_err();
            assert!(error.to_string().len() < 500, "{error}");
        }
        assert!(matches!(finder.picture("1.jpg"), Ok(Picture::File(_))));
    }
}
