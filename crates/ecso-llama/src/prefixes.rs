//! Prefixes on disk: the beginnings that many prompts share, computed once for a model instead of once
//! in every process.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use llama_cpp_2::token::LlamaToken;

use crate::layout::{BLOCK, Segment};

/// Most bytes of all prefixes. The least recently used ones are removed.
const MAX_BYTES: u64 = 512 << 20;
/// Prefixes with fewer tokens are faster to compute than to read.
const MIN_TOKENS: usize = 64;
/// The extension of the files.
const EXTENSION: &str = "prefix";
/// The extension of files that are being written.
const UNFINISHED: &str = "unfinished";
/// A file that has been unfinished for so long was left by a process that was killed.
const ABANDONED: Duration = Duration::from_mins(10);

/// A folder of prefixes, for one model.
pub(crate) struct Prefixes {
    folder: PathBuf,
    /// A digest of everything that a prefix's bytes depend on, except its tokens.
    model: blake3::Hash,
}

impl Prefixes {
    /// The prefixes in `folder` for a model file. `how` names the settings that change the
    /// computation.
    pub(crate) fn new(folder: PathBuf, model: &Path, how: &str) -> io::Result<Self> {
        // Another build may compute other numbers.
        let build = (env!("CARGO_PKG_VERSION"), version(&std::env::current_exe()?)?, BLOCK);
        let about = format!("{build:?} {} {how}", version(&model.canonicalize()?)?);
        Ok(Self { folder, model: blake3::hash(about.as_bytes()) })
    }

    /// The tokens of a prefix; `None` if it is not worth keeping.
    pub(crate) fn tokens(segments: &[Segment]) -> Option<Vec<LlamaToken>> {
        let mut tokens = Vec::new();
        for segment in segments {
            let Segment::Text(text) = segment else { return None };
            tokens.extend_from_slice(text);
        }
        (tokens.len() >= MIN_TOKENS).then_some(tokens)
    }

    /// The file of a prefix, if it exists and is intact.
    pub(crate) fn find(&self, tokens: &[LlamaToken]) -> Option<PathBuf> {
        let name = self.name(tokens);
        let found = files(&self.folder, EXTENSION).ok()?.into_iter().find(|(path, _)| {
            path.file_name()
                .and_then(|file| file.to_str())
                .is_some_and(|file| file.starts_with(&name))
        });
        let (path, _) = found?;
        let digest = digest(&path).ok()?;
        if path.to_str().is_some_and(|path| path.ends_with(&format!("-{digest}.{EXTENSION}"))) {
            // Marks it as recently used.
            let _ = File::open(&path).and_then(|file| file.set_modified(SystemTime::now()));
            return Some(path);
        }
        tracing::debug!(?path, "a damaged prefix is removed");
        let _ = fs::remove_file(&path);
        None
    }

    /// Keeps a prefix. `write` writes it to a file, and returns the number of bytes.
    pub(crate) fn keep(
        &self,
        tokens: &[LlamaToken],
        write: impl FnOnce(&Path) -> io::Result<usize>,
    ) -> io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        self.remove_abandoned()?;
        let suffix = format!(".{UNFINISHED}");
        let mut file = tempfile::Builder::new();
        let file = file.prefix(".").suffix(&suffix).tempfile_in(&self.folder)?.into_temp_path();
        let written = write(&file)?;
        // llama.cpp does not notice a disk that is full at the end, and aborts when it reads less.
        if file.metadata()?.len() != written as u64 {
            return Err(io::Error::other("the file was cut; is the disk full?"));
        }
        let name = format!("{}-{}.{EXTENSION}", self.name(tokens), digest(&file)?);
        file.persist(self.folder.join(name))?;
        self.remove_old()
    }

    fn remove_abandoned(&self) -> io::Result<()> {
        for (path, file) in files(&self.folder, UNFINISHED)? {
            if file.modified()?.elapsed().is_ok_and(|age| age > ABANDONED) {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }

    fn remove_old(&self) -> io::Result<()> {
        let mut all = files(&self.folder, EXTENSION)?;
        all.sort_by_key(|(_, file)| file.modified().ok());
        let mut bytes: u64 = all.iter().map(|(_, file)| file.len()).sum();
        for (path, file) in all {
            if bytes <= MAX_BYTES {
                break;
            }
            fs::remove_file(path)?;
            bytes -= file.len();
        }
        Ok(())
    }

    fn name(&self, tokens: &[LlamaToken]) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.model.as_bytes());
        for token in tokens {
            hasher.update(&token.0.to_le_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }
}

/// A text that changes when the file does. A program can restore the modification time, but not the
/// change time (ctime).
fn version(path: &Path) -> io::Result<String> {
    let file = path.metadata()?;
    #[cfg(unix)]
    let changed = {
        use std::os::unix::fs::MetadataExt;
        (file.dev(), file.ino(), file.ctime(), file.ctime_nsec())
    };
    #[cfg(not(unix))]
    let changed = ();
    Ok(format!("{} {} {:?} {changed:?}", path.display(), file.len(), file.modified()?))
}

/// The files of a folder with an extension.
fn files(folder: &Path, wanted: &str) -> io::Result<Vec<(PathBuf, fs::Metadata)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let path = entry.path();
        let metadata = entry.metadata()?;
        if metadata.is_file() && path.extension().is_some_and(|extension| extension == wanted) {
            found.push((path, metadata));
        }
    }
    Ok(found)
}

fn digest(path: &Path) -> io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path)?)?;
    Ok(hasher.finalize().to_hex().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefixes(folder: &Path, how: &str) -> Prefixes {
        let model = folder.join("model.gguf");
        if !model.exists() {
            fs::write(&model, "GGUF").unwrap();
        }
        Prefixes::new(folder.join("prefixes"), &model, how).unwrap()
    }

    #[test]
    fn a_prefix_is_found_by_its_model_and_its_tokens() {
        let folder = tempfile::tempdir().unwrap();
        let tokens = [LlamaToken(1), LlamaToken(2)];
        let kept = prefixes(folder.path(), "");
        kept.keep(&tokens, write("rye")).unwrap();
        assert_eq!(fs::read(kept.find(&tokens).unwrap()).unwrap(), b"rye");
        assert_eq!(kept.find(&tokens[..1]), None);
        assert_eq!(prefixes(folder.path(), "on another processor").find(&tokens), None);
        fs::write(folder.path().join("model.gguf"), "GGUF and more").unwrap();
        assert_eq!(prefixes(folder.path(), "").find(&tokens), None);
    }

    /// Writes a file as llama.cpp does, which returns the number of bytes.
    fn write(text: &str) -> impl Fn(&Path) -> io::Result<usize> {
        move |path| fs::write(path, text).map(|()| text.len())
    }

    #[test]
    fn a_cut_prefix_is_not_kept() {
        let folder = tempfile::tempdir().unwrap();
        let kept = prefixes(folder.path(), "");
        let tokens = [LlamaToken(1)];
        kept.keep(&tokens, |path| write("rye")(path).map(|bytes| bytes + 1)).unwrap_err();
        assert_eq!(kept.find(&tokens), None);
        assert_eq!(fs::read_dir(folder.path().join("prefixes")).unwrap().count(), 0);
    }

    #[test]
    fn what_a_killed_process_left_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let kept = prefixes(folder.path(), "");
        let unfinished = |age| {
            let seen = std::cell::RefCell::default();
            kept.keep(&[LlamaToken(age)], |path| {
                let copy = path.with_extension(format!("{age}.{UNFINISHED}"));
                let file = File::create(&copy)?;
                let age = Duration::from_mins(age.unsigned_abs().into());
                file.set_modified(SystemTime::now() - age)?;
                seen.replace(copy);
                write("rye")(path)
            })
            .unwrap();
            seen.into_inner()
        };
        let (young, old) = (unfinished(1), unfinished(20));
        assert!(old.exists());
        kept.keep(&[LlamaToken(0)], write("rye")).unwrap();
        assert!(young.exists() && !old.exists());
    }

    #[test]
    fn a_damaged_prefix_is_removed_and_none_is_left_half() {
        let folder = tempfile::tempdir().unwrap();
        let tokens = [LlamaToken(1)];
        let kept = prefixes(folder.path(), "");
        kept.keep(&tokens, write("rye")).unwrap();
        fs::write(kept.find(&tokens).unwrap(), "flour").unwrap();
        assert_eq!(kept.find(&tokens), None);
        kept.keep(&tokens, |_| Err(io::Error::other("full"))).unwrap_err();
        assert_eq!(fs::read_dir(folder.path().join("prefixes")).unwrap().count(), 0);
    }
}
