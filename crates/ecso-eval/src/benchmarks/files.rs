//! Files, found where people have them; image files under another ending, in other case, in another
//! Unicode form, with the separators of Windows.

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
    item::{Picture, Trouble},
    text::{cut, told},
};

/// Endings of image files.
const ENDINGS: [&str; 7] = ["jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp"];
/// Longest image inside a text, in bytes; what a run allows is held later.
const LONGEST: usize = 64 << 20;
/// A text longer than this is no file's name.
const LONGEST_NAME: usize = 4096;
/// A text shorter than this is no image in base64.
const SHORTEST: usize = 64;

/// The first of `candidates` that exists below `data`; or `data` itself, if it is a file.
pub(super) fn locate(data: &Path, candidates: &[&str]) -> Result<PathBuf, DataError> {
    if data.is_file() {
        return Ok(data.to_owned());
    }
    if !data.exists() {
        return Err(DataError::new(data, "there is no such file or folder"));
    }
    let found = candidates.iter().map(|candidate| data.join(candidate)).find(|path| path.exists());
    found.ok_or_else(|| DataError::new(data, format!("there is none of {}", candidates.join(", "))))
}

/// Finds image files below a folder. Folders that had to be searched are remembered.
pub(super) struct Finder {
    root: PathBuf,
    folders: HashMap<PathBuf, HashMap<String, Vec<PathBuf>>>,
}

impl Finder {
    pub(super) fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), folders: HashMap::new() }
    }

    /// The file called `name`: as it is written; else the one file that is called so but for its
    /// Unicode form, then its case, then its ending.
    pub(super) fn find(&mut self, name: &str) -> Result<PathBuf, Trouble> {
        let name = local(name);
        let exact = self.root.join(&*name);
        if exact.is_file() {
            return Ok(exact);
        }
        let missing =
            format!("{} is missing, under any ending", self.root.join(cut(&name)).display());
        let missing = || Trouble::MissingImage(missing.as_str().into());
        let plain = name.trim().replace('\\', "/");
        let mut at = if plain.starts_with('/') { PathBuf::from("/") } else { self.root.clone() };
        let mut parts = plain.split('/').filter(|part| !part.is_empty() && *part != ".").peekable();
        if parts.peek().is_none() {
            return Err(missing());
        }
        while let Some(part) = parts.next() {
            let is_last = parts.peek().is_none();
            let exact = at.join(part);
            at = if if is_last { exact.is_file() } else { exact.is_dir() } {
                exact
            } else {
                self.alike(&at, part, is_last)?.ok_or_else(missing)?
            };
        }
        if at.is_file() { Ok(at) } else { Err(missing()) }
    }

    /// The first of these names that there is; what is wrong is said about the first of them.
    pub(super) fn first(&mut self, names: &[String]) -> Result<PathBuf, Trouble> {
        let mut trouble = None;
        for name in names {
            match self.find(name) {
                Ok(path) => return Ok(path),
                Err(error) => trouble.get_or_insert(error),
            };
        }
        Err(trouble.unwrap_or_else(|| Trouble::MissingImage("no image is named".into())))
    }

    /// What a cell or field says an image is: a file's name, a data URL, or base64.
    pub(super) fn picture(&mut self, text: &str) -> Result<Picture, Trouble> {
        if is_data_url(text) {
            let bytes =
                decode_data_url(text, LONGEST).map_err(|error| Trouble::Unreadable(told(error)))?;
            return Ok(Picture::Bytes(bytes.into()));
        }
        let start: String = text.trim_start().chars().take(8).collect::<String>().to_lowercase();
        if start.starts_with("http://") || start.starts_with("https://") {
            let reason =
                format!("images are read from files, nothing is fetched: {}", cut(text.trim()));
            return Err(Trouble::Unreadable(reason.into()));
        }
        match (self.find(text), base64(text)) {
            (Ok(path), _) => Ok(Picture::File(path)),
            (Err(_), Some(bytes)) => Ok(Picture::Bytes(bytes)),
            (Err(trouble), None) => Err(trouble),
        }
    }

    /// The one entry of `folder` that is called `name` by the rules of [`Finder::find`].
    fn alike(
        &mut self,
        folder: &Path,
        name: &str,
        is_file: bool,
    ) -> Result<Option<PathBuf>, Trouble> {
        let entries = self.folders.entry(folder.to_owned()).or_insert_with(|| listing(folder));
        let key = if is_file { fold(stem(name)) } else { fold(name) };
        let found = entries.get(&key).into_iter().flatten();
        let found: Vec<&PathBuf> =
            found.filter(|path| if is_file { path.is_file() } else { path.is_dir() }).collect();
        let rules: [&dyn Fn(&str) -> bool; 4] = [
            &|other| form(other) == form(name),
            &|other| fold(other) == fold(name),
            &|other| is_file && form(stem(other)) == form(stem(name)),
            &|_| is_file,
        ];
        for rule in rules {
            let fits = |path: &&&PathBuf| {
                path.file_name().is_some_and(|name| rule(&name.to_string_lossy()))
            };
            match found.iter().filter(fits).collect::<Vec<_>>().as_slice() {
                [] => {}
                [only] => return Ok(Some((**only).clone())),
                [one, another, ..] => {
                    let missing = format!(
                        "{} is missing, and {} and {} could both be meant",
                        folder.join(cut(name)).display(),
                        one.display(),
                        another.display()
                    );
                    return Err(Trouble::MissingImage(missing.into()));
                }
            }
        }
        Ok(None)
    }
}

/// A name without `file://`.
fn local(name: &str) -> Cow<'_, str> {
    let is_url = name.get(..7).is_some_and(|scheme| scheme.eq_ignore_ascii_case("file://"));
    let path =
        url::Url::parse(name).ok().filter(|_| is_url).and_then(|url| url.to_file_path().ok());
    path.map_or(Cow::Borrowed(name), |path| path.to_string_lossy().into_owned().into())
}

/// The entries of a folder, by their folded names without an image's ending, and whole.
fn listing(folder: &Path) -> HashMap<String, Vec<PathBuf>> {
    let mut entries: HashMap<String, Vec<PathBuf>> = HashMap::new();
    for path in std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path())
    {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let (short, whole) = (fold(stem(&name)), fold(&name));
        if short != whole {
            entries.entry(whole).or_default().push(path.clone());
        }
        entries.entry(short).or_default().push(path);
    }
    entries
}

/// A name without an image's ending.
fn stem(name: &str) -> &str {
    match name.rsplit_once('.') {
        Some((stem, ending)) if ENDINGS.contains(&ending.to_lowercase().as_str()) => stem,
        _ => name,
    }
}

/// Whether a text says where an image is, or is one.
#[must_use]
pub fn is_image(text: &str) -> bool {
    let text = text.trim();
    let is_file = text.len() <= LONGEST_NAME && !text.contains('\n') && stem(text) != text;
    is_file || is_data_url(text) || base64(text).is_some()
}

/// One Unicode form of a name.
fn form(name: &str) -> String {
    name.nfc().collect()
}

/// One Unicode form and case of a name.
fn fold(name: &str) -> String {
    form(&name.to_lowercase())
}

/// An image in bare base64; none if the text is something else.
pub(super) fn base64(text: &str) -> Option<Arc<[u8]>> {
    let bytes = Some(text.trim()).filter(|text| text.len() >= SHORTEST)?;
    let bytes = decode_base64(bytes, LONGEST).ok()?;
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
    fn files_are_found_as_people_have_them() {
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
            let found = finder.find(name).unwrap_or_else(|trouble| panic!("{name}: {trouble}"));
            assert_eq!(std::fs::read_to_string(found).unwrap(), file, "{name}");
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
            let trouble = finder.find(name).unwrap_err();
            assert!(
                matches!(trouble, Trouble::MissingImage(_)) && trouble.to_string().len() < 500,
                "{trouble}"
            );
        }
    }

    #[test]
    fn no_file_is_taken_where_two_could_be_meant() {
        let folder = folder(&["1.png", "1.webp", "2.png", "2.PNG", "3.jpg", "3.png"]);
        let mut finder = Finder::new(folder.path());
        for name in ["1.jpg", "2.Png", "2.jpg"] {
            let trouble = finder.find(name).unwrap_err().to_string();
            assert!(trouble.contains("could both be meant"), "{trouble}");
        }
        assert!(
            ["2.png", "2.PNG", "3.jpg", "3.JPG"].into_iter().all(|name| finder.find(name).is_ok())
        );
    }

    #[test]
    fn a_text_that_says_where_an_image_is_is_known() {
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
    fn images_may_stand_in_the_text_itself() {
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
            let trouble = finder.picture(text).unwrap_err();
            assert!(trouble.to_string().len() < 500, "{trouble}");
        }
        assert!(matches!(finder.picture("1.jpg"), Ok(Picture::File(_))));
    }
}
