//! Model files on disk. A file gets its name only after its digest was checked.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use sha2::{Digest, Sha256};

use super::catalogue::{Catalogue, Model, ModelFile};
use crate::{
    error::UsageError,
    progress::{ProgressLine, Unit},
};

/// A folder of model files.
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

    /// Where the engine caches common prompt prefixes.
    pub(crate) fn prefix_folder(&self) -> PathBuf {
        self.path("prefixes")
    }

    /// Bytes of the cached prompt prefixes.
    pub(super) fn prefixes_size(&self) -> anyhow::Result<u64> {
        let folder = self.prefix_folder();
        let sizes = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            entries => entries.and_then(|entries| {
                entries.map(|entry| Ok(entry?.metadata()?.len())).sum::<io::Result<u64>>()
            }),
        };
        sizes.with_context(|| folder.display().to_string())
    }

    /// Removes the cached prompt prefixes and returns how many bytes that frees.
    pub(super) fn remove_prefixes(&self) -> anyhow::Result<u64> {
        let bytes = self.prefixes_size()?;
        remove_folder(&self.prefix_folder())?;
        Ok(bytes)
    }

    /// A path for the unfinished download of a file.
    pub(super) fn partial_path(&self, file: &ModelFile, suffix: &str) -> PathBuf {
        self.folder.join(format!("{}.{suffix}", file.name))
    }

    /// The files of a model, with its tagger if that is installed.
    ///
    /// # Errors
    /// A file without which the model doesn't run is missing.
    pub(crate) fn installed_files<'a>(
        &self,
        catalogue: &'a Catalogue,
        model: &'a Model,
    ) -> anyhow::Result<Vec<&'a ModelFile>> {
        let mut files = catalogue.required_files(model)?;
        if !files.iter().all(|file| self.has(file)) {
            let name = &model.name;
            return Err(UsageError(format!(
                "{name} is not installed; run `ecso models pull {name}`"
            ))
            .into());
        }
        files.extend(self.installed_tagger(catalogue, model)?);
        Ok(files)
    }

    /// The file of a model's tagger, if the model has one and it is installed.
    pub(crate) fn installed_tagger<'a>(
        &self,
        catalogue: &'a Catalogue,
        model: &Model,
    ) -> anyhow::Result<Option<&'a ModelFile>> {
        let file = model.tagger.as_ref().map(|name| catalogue.file(name)).transpose()?;
        Ok(file.filter(|file| self.has(file)))
    }

    /// Whether a file is installed. Checks its size, not its digest.
    pub(crate) fn has(&self, file: &ModelFile) -> bool {
        fs::metadata(self.path(&file.name)).is_ok_and(|metadata| {
            metadata.is_file() && file.bytes.is_none_or(|bytes| metadata.len() == bytes)
        })
    }

    /// Locks the folder; waits for other processes that change it.
    pub(super) fn lock(&self) -> anyhow::Result<File> {
        fs::create_dir_all(&self.folder).with_context(|| self.folder.display().to_string())?;
        let path = self.folder.join(".lock");
        let open = File::options().append(true).create(true).open(&path);
        let lock = open.with_context(|| path.display().to_string())?;
        lock.lock().with_context(|| path.display().to_string())?;
        Ok(lock)
    }

    /// Checks the bytes at `from` and renames them to the file's name.
    pub(super) fn install(&self, file: &ModelFile, from: &Path) -> anyhow::Result<()> {
        check(&file.name, from, file.bytes, &file.sha256)?;
        File::open(from)
            .and_then(|bytes| bytes.sync_all())
            .with_context(|| from.display().to_string())?;
        let path = self.path(&file.name);
        fs::rename(from, &path).with_context(|| path.display().to_string())
    }

    /// Checks an installed file.
    pub(super) fn verify(&self, file: &ModelFile) -> anyhow::Result<()> {
        check(&file.name, &self.path(&file.name), file.bytes, &file.sha256)
    }

    /// Deletes a file and its unfinished downloads; returns the size of the file.
    pub(super) fn remove(&self, file: &ModelFile) -> anyhow::Result<u64> {
        let path = self.path(&file.name);
        let freed = fs::metadata(&path).map_or(0, |metadata| metadata.len());
        for path in [path, self.partial_path(file, "partial"), self.partial_path(file, "converted")]
        {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    bail!("{}: {error}", path.display())
                }
                _ => {}
            }
        }
        remove_folder(&self.partial_path(file, "hub"))?;
        Ok(freed)
    }
}

/// Removes a folder, if it exists.
pub(super) fn remove_folder(folder: &Path) -> anyhow::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            bail!("{}: {error}", folder.display())
        }
        _ => Ok(()),
    }
}

/// Checks the size, if it is known, and the digest of the bytes at `path`. `name` is shown.
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
        bail!("{}: wrong size: {length} bytes, should be {expected}", at());
    }
    let progress = ProgressLine::new(Unit::Bytes(format!("checking {name}")), false);
    let mut checked = 0;
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut buffer).with_context(at)?;
        if count == 0 {
            break;
        }
        digest.update(&buffer[..count]);
        checked += count as u64;
        progress.show(checked, Some(length), "");
    }
    let actual = hex::encode(digest.finalize());
    if actual != sha256 {
        bail!("{}: wrong digest: sha256 is {actual}, should be {sha256}", at());
    }
    Ok(())
}
