//! Packing: from the journal to a dataset.

use std::{
    collections::{BTreeMap, HashMap},
    error::Error,
    fs::{self, File},
    io::BufReader,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use ecso::Image;
use ecso_batch::journal::{self, JournalError, JournalReader};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{
    card,
    files::{Files, Pictures},
    input::{Input, InputError},
    layout::Example,
    make::{Made, Reason},
    manifest::{Manifest, Packing},
    record::{Present, RowRecord, RunHeader, Shard},
    regular,
    row::{Picture, Row},
    run::fetched,
};

/// Why nothing was packed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PackError {
    /// The input.
    #[error(transparent)]
    Input(#[from] InputError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A row, from 0, is not what it was when it was made.
    #[error("row {} of the input (from 1) has changed since it was made; put it back, or begin anew with another --out", .0 + 1)]
    Changed(u64),
    /// The dataset's place holds something that is no dataset of ours.
    #[error("{} is there and was not made here; move it away, or name another --out", path.display())]
    Taken {
        /// Which.
        path: PathBuf,
    },
    /// A file can't be written.
    #[error("{}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: Box<dyn Error + Send + Sync>,
    },
}

pub(crate) fn failed(path: &Path, source: impl Into<Box<dyn Error + Send + Sync>>) -> PackError {
    PackError::File { path: path.to_owned(), source: source.into() }
}

/// A place in the journal: where a row's record begins.
type Places = HashMap<u64, u64>;

/// Makes the dataset of the run in `out`, in the folder `dataset` there. It takes the place of an
/// earlier one in one move. What is recorded of rows that the input has no more is left out, and
/// counted. No other process may pack there at the same time: the run's
/// [`journal`](crate::run::Ended::journal) is held until this has ended.
///
/// # Errors
/// [`PackError`].
pub fn pack(out: &Path, input: &Input, packing: &Packing) -> Result<Manifest, PackError> {
    let header: RunHeader = JournalReader::in_folder(out).header()?;
    let mut manifest = Manifest {
        run: header,
        packing: packing.clone(),
        rows: 0,
        unseen: None,
        safe: 0,
        dropped: BTreeMap::new(),
        failed: 0,
        cut_short: 0,
        gone: 0,
        unread: input.unread()?,
        refusals: 0,
        samples: BTreeMap::new(),
        categories: BTreeMap::new(),
        files: BTreeMap::new(),
    };
    let present = Present::of(input)?;
    let (mut places, groups) = choose(out, &present, packing, &mut manifest)?;
    let of_all = manifest.run.shard == Shard::ALL;
    manifest.unseen = of_all.then(|| (present.len() as u64).saturating_sub(manifest.rows));
    clear(out).map_err(|error| failed(out, error))?;
    let work = tempfile::Builder::new()
        .prefix(WORK)
        .tempdir_in(out)
        .map_err(|error| failed(out, error))?;
    let mut files = Files::new(work.path(), packing.shard_bytes);
    let journal_path = journal::path(out);
    let mut journal = File::open(&journal_path).map_err(|error| failed(&journal_path, error))?;
    for row in input.rows()? {
        let Ok(row) = row else { continue };
        let Some(place) = places.remove(&row.number) else { continue };
        let record =
            record_at(&mut journal, place).map_err(|error| failed(&journal_path, error))?;
        let (row, images) = pictures(row, &record, out, packing.limits)?;
        let names = images.iter().map(|(name, _)| name.as_str()).collect();
        let Some(example) = Example::new(&row, &record, names, &manifest.run) else { continue };
        let split = split(&record, &groups, packing);
        files.write(split, &example, &images)?;
        let count = |counts: &mut BTreeMap<String, BTreeMap<String, u64>>, of: &str| {
            *counts
                .entry(of.to_owned())
                .or_default()
                .entry(example.kind.to_owned())
                .or_default() += 1;
        };
        count(&mut manifest.samples, split);
        count(
            &mut manifest.categories,
            if record.category.is_empty() { "none" } else { &record.category },
        );
    }
    if let Some(number) = places.into_keys().min() {
        return Err(PackError::Changed(number));
    }
    files.finish()?;
    failures(out, &present, work.path())?;
    digests(work.path(), work.path(), &mut manifest.files)?;
    // The card tells of the files by their digests.
    let path = work.path().join("README.md");
    fs::write(&path, card::card(&manifest)).map_err(|error| failed(&path, error))?;
    manifest.files.insert("README.md".into(), digest(&path)?);
    let path = work.path().join("manifest.json");
    let text = serde_json::to_string_pretty(&manifest).map_err(|error| failed(&path, error))?;
    fs::write(&path, text).map_err(|error| failed(&path, error))?;
    put(work, &out.join("dataset"))?;
    Ok(manifest)
}

/// Counts the journal and chooses: all rows that were kept, and of the safe ones those with the
/// lowest lots. Gives where their records are, and which images belong together.
fn choose(
    out: &Path,
    present: &Present,
    packing: &Packing,
    manifest: &mut Manifest,
) -> Result<(Places, Groups), PackError> {
    let mut groups = Groups::default();
    let mut outcomes: HashMap<u64, (u64, Outcome)> = HashMap::new();
    for record in JournalReader::in_folder(out).entries::<RowRecord>()? {
        let (place, record) = record?;
        let outcome = match &record.made {
            _ if !present.has(&record) => Outcome::Gone,
            Some(Made::Kept(sample)) => Outcome::Kept { is_refusal: sample.refusal },
            Some(Made::Safe(_)) => Outcome::Safe { lot: lot(packing.seed, "utility", &record.key) },
            Some(Made::Dropped { reason, .. }) => Outcome::Dropped(*reason),
            None => Outcome::Failed { cut_short: record.cut_short },
        };
        if !matches!(outcome, Outcome::Gone) {
            groups.join(&record.images);
        }
        // Of two records at one place the later counts.
        outcomes.insert(record.number(), (place, outcome));
    }
    let (mut kept, mut safe) = (Places::new(), Vec::new());
    manifest.rows = outcomes.len() as u64;
    for (number, (place, outcome)) in outcomes {
        match outcome {
            Outcome::Kept { is_refusal } => {
                manifest.refusals += u64::from(is_refusal);
                kept.insert(number, place);
            }
            Outcome::Safe { lot } => safe.push((lot, number, place)),
            Outcome::Failed { cut_short } => {
                manifest.failed += 1;
                manifest.cut_short += u64::from(cut_short);
            }
            Outcome::Dropped(reason) => *manifest.dropped.entry(reason).or_default() += 1,
            Outcome::Gone => manifest.gone += 1,
        }
    }
    manifest.rows -= manifest.gone;
    manifest.safe = safe.len() as u64;
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a count"
    )]
    let wanted = (packing.utility.max(0.0) * kept.len() as f64).round() as usize;
    safe.sort_unstable();
    kept.extend(safe.into_iter().take(wanted).map(|(_, number, place)| (number, place)));
    Ok((kept, groups))
}

enum Outcome {
    Kept {
        is_refusal: bool,
    },
    Safe {
        lot: u64,
    },
    Failed {
        cut_short: bool,
    },
    Dropped(Reason),
    /// The input has the row no more.
    Gone,
}

/// A draw that depends on nothing but seed, purpose and what is drawn.
fn lot(seed: u64, purpose: &str, what: &str) -> u64 {
    let hash = *blake3::hash(format!("{seed}:{purpose}:{what}").as_bytes()).as_bytes();
    u64::from_le_bytes([hash[0], hash[1], hash[2], hash[3], hash[4], hash[5], hash[6], hash[7]])
}

/// Images that stand in one row together, directly or by way of others, belong to the same split.
#[derive(Default)]
struct Groups(HashMap<String, String>);

impl Groups {
    fn join(&mut self, images: &[String]) {
        let [first, others @ ..] = images else { return };
        for other in others {
            let (a, b) = (self.of(first), self.of(other));
            if a != b {
                let (low, high) = if a < b { (a, b) } else { (b, a) };
                self.0.insert(high, low);
            }
        }
    }

    /// The image that stands for all that belong together with this one.
    fn of(&self, image: &str) -> String {
        let mut image = image;
        while let Some(next) = self.0.get(image) {
            image = next;
        }
        image.to_owned()
    }
}

fn split(record: &RowRecord, groups: &Groups, packing: &Packing) -> &'static str {
    // Without an image the words decide.
    let what = record.images.first().map_or_else(|| record.key.clone(), |image| groups.of(image));
    #[expect(clippy::cast_precision_loss, reason = "a draw")]
    let share = lot(packing.seed, "validation", &what) as f64 / u64::MAX as f64;
    if share < packing.validation { "validation" } else { "train" }
}

fn record_at(journal: &mut File, place: u64) -> std::io::Result<RowRecord> {
    journal.seek(SeekFrom::Start(place))?;
    let mut line = serde_json::Deserializer::from_reader(BufReader::new(journal));
    Ok(RowRecord::deserialize(&mut line)?)
}

fn pictures(
    row: Row,
    record: &RowRecord,
    out: &Path,
    limits: ecso::Limits,
) -> Result<(Row, Pictures), PackError> {
    let number = row.number;
    let changed = || PackError::Changed(number);
    let mut digests = record.images.iter();
    let mut images = Vec::with_capacity(row.images.len());
    for picture in &row.images {
        let read = |path: &Path| {
            regular::read(path, limits.bytes).map(Bytes::from).map_err(|error| failed(path, error))
        };
        let found = match picture {
            Picture::Bytes(bytes) => Image::several(bytes.clone(), limits),
            Picture::File(path) => Image::several(read(path)?, limits),
            Picture::Url(_) => {
                let kept = read(&fetched(out, digests.next().ok_or_else(changed)?))?;
                images.push(vec![Image::from_bytes(kept, limits).map_err(|_| changed())?]);
                continue;
            }
        };
        let found = found.map_err(|_| changed())?;
        if !found.iter().all(|image| {
            digests.next().is_some_and(|digest| image.digest().to_hex().as_str() == digest)
        }) {
            return Err(changed());
        }
        images.push(found);
    }
    let (row, images) = row.with_pages(images);
    if images.len() != record.images.len() || row.query != record.query {
        return Err(changed());
    }
    let named = images.iter().zip(&record.images).filter_map(|(image, digest)| {
        let (bytes, kind) = image.encoded()?;
        let ending = kind.rsplit('/').next().unwrap_or("png").replace("jpeg", "jpg");
        Some((format!("images/{}.{ending}", &digest[..32]), bytes.clone()))
    });
    let pictures = named.collect();
    Ok((row, pictures))
}

/// The rows that failed, counted from 1, with the reason of their last try.
fn failures(out: &Path, present: &Present, folder: &Path) -> Result<(), PackError> {
    let mut failures: BTreeMap<u64, Value> = BTreeMap::new();
    for record in JournalReader::in_folder(out).entries::<RowRecord>()? {
        let (_, record) = record?;
        let number = record.number();
        match &record.error {
            Some(error) if present.has(&record) => {
                failures.insert(
                    number,
                    json!({"row": number + 1, "source": record.source, "error": error, "at": record.at}),
                );
            }
            _ => {
                failures.remove(&number);
            }
        }
    }
    let path = folder.join("failed.jsonl");
    let lines: Vec<String> = failures.values().map(Value::to_string).collect();
    let text = if lines.is_empty() { String::new() } else { lines.join("\n") + "\n" };
    fs::write(&path, text).map_err(|error| failed(&path, error))
}

/// Bytes and SHA-256 of every file but the images, whose names are the digests of what came in.
fn digests(
    root: &Path,
    folder: &Path,
    files: &mut BTreeMap<String, (u64, String)>,
) -> Result<(), PackError> {
    for entry in fs::read_dir(folder).map_err(|error| failed(folder, error))? {
        let path = entry.map_err(|error| failed(folder, error))?.path();
        if path.is_dir() {
            if !path.ends_with("images") {
                digests(root, &path, files)?;
            }
            continue;
        }
        let name = path.strip_prefix(root).unwrap_or(&path).display().to_string();
        files.insert(name, digest(&path)?);
    }
    Ok(())
}

/// A file's bytes, and its SHA-256.
fn digest(path: &Path) -> Result<(u64, String), PackError> {
    let mut file = File::open(path).map_err(|error| failed(path, error))?;
    let (mut digest, mut bytes, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 16]);
    loop {
        let read = file.read(&mut buffer).map_err(|error| failed(path, error))?;
        if read == 0 {
            return Ok((bytes, hex::encode(digest.finalize())));
        }
        digest.update(&buffer[..read]);
        bytes += read as u64;
    }
}

/// How the name of a dataset begins that is not finished.
const WORK: &str = ".dataset-";

/// Removes what a run left that was stopped while it packed.
fn clear(out: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(out)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(WORK) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// Whether the place of a run's dataset holds what is no dataset of ours, and so must not be
/// replaced.
///
/// # Errors
/// It can't be looked at.
pub fn is_taken(out: &Path) -> std::io::Result<bool> {
    let place = out.join("dataset");
    match fs::read_dir(&place) {
        Ok(mut entries) => Ok(entries.next().is_some() && !is_ours(&place)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => Ok(true),
        Err(error) => Err(error),
    }
}

/// Whether a folder was packed here.
fn is_ours(place: &Path) -> bool {
    let manifest = regular::open(&place.join("manifest.json"));
    let read = manifest
        .ok()
        .and_then(|file| serde_json::from_reader::<_, Value>(BufReader::new(file)).ok());
    read.is_some_and(|manifest| {
        manifest["run"]["ecso"].is_string() && manifest["packing"].is_object()
    })
}

/// Puts the finished folder in its place.
fn put(work: tempfile::TempDir, place: &Path) -> Result<(), PackError> {
    let is_filled = fs::read_dir(place).is_ok_and(|mut entries| entries.next().is_some());
    if is_filled && !is_ours(place) {
        return Err(PackError::Taken { path: place.to_owned() });
    }
    let work = work.keep();
    if place.exists() {
        // What was there goes with the temporary folder that it is put into.
        let old = tempfile::tempdir_in(place.parent().unwrap_or(Path::new(".")))
            .map_err(|error| failed(place, error))?;
        fs::rename(place, old.path().join("dataset")).map_err(|error| failed(place, error))?;
        fs::rename(&work, place).map_err(|error| failed(place, error))?;
    } else {
        fs::rename(&work, place).map_err(|error| failed(place, error))?;
    }
    // A temporary folder is its owner's alone; a dataset is like any other folder.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let _ = fs::set_permissions(place, fs::Permissions::from_mode(0o755));
    }
    Ok(())
}
