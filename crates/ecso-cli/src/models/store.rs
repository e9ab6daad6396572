//! Model files on disk. A file has its name only if its digest was right.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use sha2::{Digest, Sha256};

use super::catalogue::ModelFile;
use crate::progress::{Bar, Unit};

pub(crate) struct Store {
    folder: PathBuf,
}

impl Store {
    pub(crate) fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    pub(crate) fn path(&self, file: &str) -> PathBuf {
        self.folder.join(file)
    }

    /// Where the engine keeps what many prompts begin with.
    pub(crate) fn heads_folder(&self) -> PathBuf {
        self.path("heads")
    }

    /// Bytes of what is kept there.
    pub(super) fn heads(&self) -> anyhow::Result<u64> {
        let folder = self.heads_folder();
        let sizes = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            entries => entries.and_then(|entries| {
                entries.map(|entry| Ok(entry?.metadata()?.len())).sum::<io::Result<u64>>()
            }),
        };
        sizes.with_context(|| folder.display().to_string())
    }

    /// Removes them, and tells how many bytes that were.
    pub(super) fn remove_heads(&self) -> anyhow::Result<u64> {
        let (bytes, folder) = (self.heads()?, self.heads_folder());
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| folder.display().to_string())
            }
            _ => Ok(bytes),
        }
    }

    /// Where what belongs to an unfinished download lies.
    pub(super) fn beside(&self, file: &ModelFile, what: &str) -> PathBuf {
        self.folder.join(format!("{}.{what}", file.name))
    }

    /// Whether the file is here; its size is looked at, its digest is not.
    pub(crate) fn has(&self, file: &ModelFile) -> bool {
        fs::metadata(self.path(&file.name)).is_ok_and(|found| {
            found.is_file() && file.bytes.is_none_or(|bytes| found.len() == bytes)
        })
    }

    /// Waits until no other process pulls or removes models here.
    pub(super) fn lock(&self) -> anyhow::Result<File> {
        fs::create_dir_all(&self.folder).with_context(|| self.folder.display().to_string())?;
        let path = self.folder.join(".lock");
        let lock = File::create(&path).with_context(|| path.display().to_string())?;
        lock.lock().with_context(|| path.display().to_string())?;
        Ok(lock)
    }

    /// Checks the bytes at `from` and gives them the file's name, in one move.
    pub(super) fn admit(&self, file: &ModelFile, from: &Path) -> anyhow::Result<()> {
        check(&file.name, from, file.bytes, &file.sha256)?;
        File::open(from)
            .and_then(|bytes| bytes.sync_all())
            .with_context(|| from.display().to_string())?;
        let path = self.path(&file.name);
        fs::rename(from, &path).with_context(|| path.display().to_string())
    }

    /// Checks a file that is here.
    pub(super) fn verify(&self, file: &ModelFile) -> anyhow::Result<()> {
        check(&file.name, &self.path(&file.name), file.bytes, &file.sha256)
    }

    /// Deletes a file and what is left of its download; how many bytes that frees.
    pub(super) fn remove(&self, file: &ModelFile) -> anyhow::Result<u64> {
        let path = self.path(&file.name);
        let freed = fs::metadata(&path).map_or(0, |found| found.len());
        for path in [path, self.beside(file, "partial"), self.beside(file, "converted")] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    bail!("{}: {error}", path.display())
                }
                _ => {}
            }
        }
        remove_folder(&self.beside(file, "hub"))?;
        Ok(freed)
    }
}

pub(super) fn remove_folder(folder: &Path) -> anyhow::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            bail!("{}: {error}", folder.display())
        }
        _ => Ok(()),
    }
}

/// Checks size, where it is known, and digest of the bytes at `path`, which are to be `name`.
pub(super) fn check(
    name: &str,
    path: &Path,
    bytes: Option<u64>,
    sha256: &str,
) -> anyhow::Result<()> {
    let at = || path.display().to_string();
    let mut file = File::open(path).with_context(at)?;
    let length = file.metadata().with_context(at)?.len();
    if let Some(expected) = bytes.filter(|expected| *expected != length) {
        bail!("{}: {length} bytes, where there should be {expected}", at());
    }
    let bar = Bar::new(Unit::Bytes(format!("checking {name}")), false);
    let mut checked = 0;
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut buffer).with_context(at)?;
        if read == 0 {
            break;
        }
        digest.update(&buffer[..read]);
        checked += read as u64;
        bar.show(checked, Some(length), "");
    }
    let found = hex::encode(digest.finalize());
    if found != sha256 {
        bail!("{}: wrong digest: sha256 is {found}, should be {sha256}", at());
    }
    Ok(())
}
