//! Finding the file that a row names: separators of Windows, percent-encoding, and names in other
//! Unicode normal forms are understood.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use ecso::Cause;
use percent_encoding::percent_decode_str;
use unicode_normalization::UnicodeNormalization;

use crate::row::cut;

/// Characters that a path may have.
const LONGEST: usize = 4096;

/// Where files are looked for.
#[derive(Debug, Clone, Default)]
pub(super) struct Paths {
    roots: Vec<PathBuf>,
    listed: Arc<Mutex<Listing>>,
}

/// The names in one folder, by [`folded`].
#[derive(Debug, Default)]
struct Listing {
    folder: PathBuf,
    names: HashMap<String, Vec<String>>,
}

impl Paths {
    /// Below the first of these where it is.
    pub(super) fn new(roots: Vec<PathBuf>) -> Self {
        Self { roots, listed: Arc::default() }
    }

    /// The file of that name. One that isn't there is no error here: whoever opens it says so.
    pub(super) fn find(&self, name: &str) -> Result<PathBuf, Cause> {
        if name.len() > LONGEST || name.contains('\0') {
            return Err(
                format!("this is no path, no URL and no image in base64: {}", cut(name)).into()
            );
        }
        let mut names = vec![name.to_owned()];
        if let Some(local) = local(name) {
            names =
                vec![percent_decode_str(local).decode_utf8_lossy().into_owned(), local.to_owned()];
        } else if let Some((scheme, _)) = name.split_once("://") {
            return Err(format!(
                "images of `{}://` can't be fetched; paths, http and https can",
                cut(scheme)
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
                match self.below(root, name) {
                    Ok(found) => return Ok(found),
                    Err(other) => hint = hint.or(other),
                }
            }
        }
        if let Some(other) = hint {
            return Err(format!(
                "{}: there is no such file, but there is `{}`; upper and lower case count",
                cut(name),
                cut(&other)
            )
            .into());
        }
        // The name as it would be right here is what its error should show.
        let name = names.last().map_or(name, String::as_str);
        let home = name.strip_prefix("~/").and_then(|rest| Some(std::env::home_dir()?.join(rest)));
        Ok(home.unwrap_or_else(|| {
            self.roots.first().map_or_else(|| name.into(), |root| root.join(name))
        }))
    }

    /// The file below `root`, component by component; else a name there that differs in upper and
    /// lower case alone.
    fn below(&self, root: &Path, name: &str) -> Result<PathBuf, Option<String>> {
        let whole = root.join(name);
        if whole.exists() {
            return Ok(whole);
        }
        let mut place = if name.starts_with('/') { PathBuf::from("/") } else { root.to_owned() };
        for part in name.split('/').filter(|part| !matches!(*part, "" | ".")) {
            let forms = [part.to_owned(), part.nfc().collect(), part.nfd().collect()];
            place = match forms.iter().map(|form| place.join(form)).find(|path| path.exists()) {
                Some(found) => found,
                None => self.listed(&place, part)?,
            };
        }
        Ok(place)
    }

    /// As [`Paths::below`], by all names in the folder.
    fn listed(&self, folder: &Path, part: &str) -> Result<PathBuf, Option<String>> {
        // A folder that isn't there isn't listed for every row.
        let Ok(mut listing) = self.listed.lock() else { return Err(None) };
        if listing.folder != folder {
            *listing = Listing { folder: folder.to_owned(), names: HashMap::new() };
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                if let Ok(name) = entry.file_name().into_string() {
                    listing.names.entry(folded(&name)).or_default().push(name);
                }
            }
        }
        let Some(alike) = listing.names.get(&folded(part)) else { return Err(None) };
        let same: String = part.nfc().collect();
        match alike.iter().find(|name| name.nfc().eq(same.chars())) {
            Some(name) => Ok(folder.join(name)),
            None => Err(alike.first().cloned()),
        }
    }
}

/// Of a `file:` URL the path.
fn local(name: &str) -> Option<&str> {
    let rest =
        name.get(..5).filter(|scheme| scheme.eq_ignore_ascii_case("file:")).map(|_| &name[5..])?;
    let Some(authority) = rest.strip_prefix("//") else { return Some(rest) };
    Some(authority.find('/').map_or(authority, |path| &authority[path..]))
}

fn folded(name: &str) -> String {
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
        let there = root.join("o\u{308}l und/A e\u{301}.png");
        std::fs::write(&there, "").unwrap();
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
            assert_eq!(paths.find(name), Ok(there.clone()), "{name}");
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
