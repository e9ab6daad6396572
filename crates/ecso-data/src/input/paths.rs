//! Finds the file that a row names, even if the name has Windows separators, percent-encoding or
//! another Unicode normalization form.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use ecso::Cause;
use percent_encoding::percent_decode_str;
use unicode_normalization::UnicodeNormalization;

use crate::row::shorten;

/// Maximum bytes of a path.
const MAX_PATH: usize = 4096;

/// Finds files in several root folders.
#[derive(Debug, Clone, Default)]
pub(super) struct Paths {
    roots: Vec<PathBuf>,
    /// The last folder that was listed.
    listing: Arc<Mutex<Listing>>,
}

/// The names in a folder, by [`fold`].
#[derive(Debug, Default)]
struct Listing {
    folder: PathBuf,
    names: HashMap<String, Vec<String>>,
}

impl Paths {
    /// Looks in these folders, in order.
    pub(super) fn new(roots: Vec<PathBuf>) -> Self {
        Self { roots, listing: Arc::default() }
    }

    /// Finds the file with this name. A missing file is not an error here but when it is opened.
    pub(super) fn find(&self, name: &str) -> Result<PathBuf, Cause> {
        if name.len() > MAX_PATH || name.contains('\0') {
            return Err(
                format!("not a path, a URL or an image in base64: {}", shorten(name)).into()
            );
        }
        let mut names = vec![name.to_owned()];
        if let Some(local) = file_url_path(name) {
            names =
                vec![percent_decode_str(local).decode_utf8_lossy().into_owned(), local.to_owned()];
        } else if let Some((scheme, _)) = name.split_once("://") {
            return Err(format!(
                "images can't be fetched from `{}://`; use paths, http or https",
                shorten(scheme)
            )
            .into());
        }
        if name.contains('%') {
            names.push(percent_decode_str(name).decode_utf8_lossy().into_owned());
        }
        if name.contains('\\') {
            names.extend(names.clone().iter().map(|name| name.replace('\\', "/")));
        }
        let mut hint = None;
        for root in &self.roots {
            for name in &names {
                match self.find_in(root, name) {
                    Ok(path) => return Ok(path),
                    Err(other) => hint = hint.or(other),
                }
            }
        }
        if let Some(other) = hint {
            return Err(format!(
                "{}: no such file, but there is `{}`; upper and lower case matter",
                shorten(name),
                shorten(&other)
            )
            .into());
        }
        // The error of opening it should show the decoded name.
        let name = names.last().map_or(name, String::as_str);
        let home = name.strip_prefix("~/").and_then(|rest| Some(std::env::home_dir()?.join(rest)));
        Ok(home.unwrap_or_else(|| {
            self.roots.first().map_or_else(|| name.into(), |root| root.join(name))
        }))
    }

    /// Finds the file below `root`, component by component. The error is a name there that differs
    /// only in case, if there is one.
    fn find_in(&self, root: &Path, name: &str) -> Result<PathBuf, Option<String>> {
        let path = root.join(name);
        if path.exists() {
            return Ok(path);
        }
        let mut path = if name.starts_with('/') { PathBuf::from("/") } else { root.to_owned() };
        for part in name.split('/').filter(|part| !matches!(*part, "" | ".")) {
            let forms = [part.to_owned(), part.nfc().collect(), part.nfd().collect()];
            path = match forms.iter().map(|form| path.join(form)).find(|path| path.exists()) {
                Some(found) => found,
                None => self.find_in_listing(&path, part)?,
            };
        }
        Ok(path)
    }

    /// [`Paths::find_in`] for one component, by comparing all names in the folder.
    fn find_in_listing(&self, folder: &Path, part: &str) -> Result<PathBuf, Option<String>> {
        // The listing is kept, so that a folder is not listed for every row.
        let Ok(mut listing) = self.listing.lock() else { return Err(None) };
        if listing.folder != folder {
            *listing = Listing { folder: folder.to_owned(), names: HashMap::new() };
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                if let Ok(name) = entry.file_name().into_string() {
                    listing.names.entry(fold(&name)).or_default().push(name);
                }
            }
        }
        let Some(similar) = listing.names.get(&fold(part)) else { return Err(None) };
        let normalized: String = part.nfc().collect();
        match similar.iter().find(|name| name.nfc().eq(normalized.chars())) {
            Some(name) => Ok(folder.join(name)),
            None => Err(similar.first().cloned()),
        }
    }
}

/// The path of a `file:` URL.
fn file_url_path(name: &str) -> Option<&str> {
    let rest =
        name.get(..5).filter(|scheme| scheme.eq_ignore_ascii_case("file:")).map(|_| &name[5..])?;
    let Some(authority) = rest.strip_prefix("//") else { return Some(rest) };
    Some(authority.find('/').map_or(authority, |path| &authority[path..]))
}

/// The name without differences of case and normalization.
fn fold(name: &str) -> String {
    name.nfc().collect::<String>().to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_as_other_systems_write_them() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("b\u{e4}r");
        std::fs::create_dir_all(root.join("o\u{308}l und")).unwrap();
        let file = root.join("o\u{308}l und/A e\u{301}.png");
        std::fs::write(&file, "").unwrap();
        let paths = Paths::new(vec![root.clone(), folder.path().to_owned()]);
        let url = format!("file://localhost{}/%C3%B6l%20und/A%20%C3%A9.png", root.display());
        for name in [
            "o\u{308}l und/A e\u{301}.png",
            "\u{f6}l und/A \u{e9}.png",
            "./\u{f6}l und\\A e\u{301}.png",
            "\u{f6}l%20und/A \u{e9}.png",
            "ba\u{308}r/\u{f6}l und/A \u{e9}.png",
            &url,
        ] {
            assert_eq!(paths.find(name), Ok(file.clone()), "{name}");
        }
        let error = paths.find("\u{f6}l und/a \u{e9}.PNG").unwrap_err();
        assert!(error.message().contains("upper and lower case"), "{error}");
        assert_eq!(paths.find("no/such.png"), Ok(root.join("no/such.png")));
        assert!(paths.find("s3://bucket/a.png").unwrap_err().message().contains("s3://"));
        assert!(paths.find(&"x".repeat(5000)).unwrap_err().message().len() < 400);
    }

    proptest::proptest! {
        #[test]
        fn no_name_panics(name: String) {
            let _ = Paths::new(vec!["nowhere".into()]).find(&name);
        }
    }
}
