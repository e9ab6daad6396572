//! Packs the journal of a run into a dataset.

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
    files::{Files, NamedImages},
    generate::{Reason, RowOutcome},
    input::{Input, InputError},
    layout::Example,
    manifest::{Manifest, Packing},
    record::{CurrentRows, RowRecord, RunHeader, Shard},
    regular,
    row::{ImageSource, Row},
    run::fetched_path,
};

/// Why packing failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PackError {
    /// The input can't be read.
    #[error(transparent)]
    Input(#[from] InputError),
    /// The journal can't be read.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The row with this number, from 0, changed after it was processed.
    #[error(
        "row {} of the input (from 1) changed after it was processed; restore it, or start over \
         with another --out",
        .0 + 1
    )]
    Changed(u64),
    /// The dataset's folder has other contents.
    #[error(
        "{} exists and was not created by ecso; move it away, or name another --out",
        path.display()
    )]
    Occupied {
        /// The folder.
        path: PathBuf,
    },
    /// A file can't be read or written.
    #[error("{}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: Box<dyn Error + Send + Sync>,
    },
}

pub(crate) fn failed(path: &Path, source: impl Into<Box<dyn Error + Send + Sync>>) -> PackError {
    PackError::File { path: path.to_owned(), source: source.into() }
}

/// Offsets of records in the journal, by row number.
type Offsets = HashMap<u64, u64>;

/// Packs the run in the folder `out` into the folder `dataset` in it, replacing an earlier dataset
/// in one step. Records of rows that are no longer in the input are left out and counted. No other
/// process may pack there at the same time: keep the run's [`journal`](crate::run::RunEnd::journal)
/// open until this returns.
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
    let current = CurrentRows::read(input)?;
    let (mut offsets, groups) = select(out, &current, packing, &mut manifest)?;
    let has_all = manifest.run.shard == Shard::ALL;
    manifest.unseen = has_all.then(|| (current.len() as u64).saturating_sub(manifest.rows));
    remove_unfinished(out).map_err(|error| failed(out, error))?;
    let work = tempfile::Builder::new()
        .prefix(UNFINISHED)
        .tempdir_in(out)
        .map_err(|error| failed(out, error))?;
    let mut files = Files::new(work.path(), packing.shard_bytes);
    let journal_path = journal::path(out);
    let mut journal = File::open(&journal_path).map_err(|error| failed(&journal_path, error))?;
    for row in input.rows()? {
        let Ok(row) = row else { continue };
        let Some(offset) = offsets.remove(&row.number) else { continue };
        let record =
            record_at(&mut journal, offset).map_err(|error| failed(&journal_path, error))?;
        let (row, images) = read_images(row, &record, out, packing.limits)?;
        let names = images.iter().map(|(name, _)| name.as_str()).collect();
        let Some(example) = Example::new(&row, &record, names, &manifest.run) else { continue };
        let split = split(&record, &groups, packing);
        files.write(split, &example, &images)?;
        let count = |counts: &mut BTreeMap<String, BTreeMap<String, u64>>, group: &str| {
            let kinds = counts.entry(group.to_owned()).or_default();
            *kinds.entry(example.kind.to_owned()).or_default() += 1;
        };
        count(&mut manifest.samples, split);
        let category = if record.category.is_empty() { "none" } else { &record.category };
        count(&mut manifest.categories, category);
    }
    if let Some(number) = offsets.into_keys().min() {
        return Err(PackError::Changed(number));
    }
    files.finish()?;
    write_failures(out, &current, work.path())?;
    add_digests(work.path(), work.path(), &mut manifest.files)?;
    // The card contains the files' digests.
    let path = work.path().join("README.md");
    fs::write(&path, card::card(&manifest)).map_err(|error| failed(&path, error))?;
    manifest.files.insert("README.md".into(), digest(&path)?);
    let path = work.path().join("manifest.json");
    let text = serde_json::to_string_pretty(&manifest).map_err(|error| failed(&path, error))?;
    fs::write(&path, text).map_err(|error| failed(&path, error))?;
    replace_dataset(work, &out.join("dataset"))?;
    Ok(manifest)
}

/// Counts the records and selects the samples: all kept rows, and a random draw of the safe ones.
/// Returns the offsets of their records, and the groups of images.
fn select(
    out: &Path,
    current: &CurrentRows,
    packing: &Packing,
    manifest: &mut Manifest,
) -> Result<(Offsets, ImageGroups), PackError> {
    let mut groups = ImageGroups::default();
    let mut summaries: HashMap<u64, (u64, Summary)> = HashMap::new();
    for record in JournalReader::in_folder(out).entries::<RowRecord>()? {
        let (offset, record) = record?;
        let summary = match &record.outcome {
            _ if !current.contains(&record) => Summary::Gone,
            Some(RowOutcome::Kept(sample)) => Summary::Kept { is_refusal: sample.refusal },
            Some(RowOutcome::Safe(_)) => {
                Summary::Safe { draw: draw(packing.seed, "utility", &record.key) }
            }
            Some(RowOutcome::Dropped { reason, .. }) => Summary::Dropped(*reason),
            None => Summary::Failed { cut_short: record.cut_short },
        };
        if !matches!(summary, Summary::Gone) {
            groups.join(&record.images);
        }
        // Of two records of one row the later counts.
        summaries.insert(record.number(), (offset, summary));
    }
    let (mut kept, mut safe) = (Offsets::new(), Vec::new());
    manifest.rows = summaries.len() as u64;
    for (number, (offset, summary)) in summaries {
        match summary {
            Summary::Kept { is_refusal } => {
                manifest.refusals += u64::from(is_refusal);
                kept.insert(number, offset);
            }
            Summary::Safe { draw } => safe.push((draw, number, offset)),
            Summary::Failed { cut_short } => {
                manifest.failed += 1;
                manifest.cut_short += u64::from(cut_short);
            }
            Summary::Dropped(reason) => *manifest.dropped.entry(reason).or_default() += 1,
            Summary::Gone => manifest.gone += 1,
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
    kept.extend(safe.into_iter().take(wanted).map(|(_, number, offset)| (number, offset)));
    Ok((kept, groups))
}

/// What matters about a record for the selection.
enum Summary {
    Kept {
        is_refusal: bool,
    },
    Safe {
        draw: u64,
    },
    Failed {
        cut_short: bool,
    },
    Dropped(Reason),
    /// The row is no longer in the input.
    Gone,
}

/// A pseudorandom number that depends only on the seed, the purpose and the subject.
fn draw(seed: u64, purpose: &str, subject: &str) -> u64 {
    let hash = *blake3::hash(format!("{seed}:{purpose}:{subject}").as_bytes()).as_bytes();
    u64::from_le_bytes([hash[0], hash[1], hash[2], hash[3], hash[4], hash[5], hash[6], hash[7]])
}

/// Groups of images that occur together in a row, directly or through other images. A group belongs
/// to one split. Maps an image to another one of its group, up to the group's representative.
#[derive(Default)]
struct ImageGroups(HashMap<String, String>);

impl ImageGroups {
    fn join(&mut self, images: &[String]) {
        let [first, others @ ..] = images else { return };
        for other in others {
            let (a, b) = (self.representative(first), self.representative(other));
            if a != b {
                let (low, high) = if a < b { (a, b) } else { (b, a) };
                self.0.insert(high, low);
            }
        }
    }

    /// The image that represents the group of this one.
    fn representative(&self, image: &str) -> String {
        let mut image = image;
        while let Some(next) = self.0.get(image) {
            image = next;
        }
        image.to_owned()
    }
}

fn split(record: &RowRecord, groups: &ImageGroups, packing: &Packing) -> &'static str {
    // Without an image the text decides.
    let image = record.images.first();
    let subject = image.map_or_else(|| record.key.clone(), |image| groups.representative(image));
    #[expect(clippy::cast_precision_loss, reason = "a random number")]
    let share = draw(packing.seed, "validation", &subject) as f64 / u64::MAX as f64;
    if share < packing.validation { "validation" } else { "train" }
}

fn record_at(journal: &mut File, offset: u64) -> std::io::Result<RowRecord> {
    journal.seek(SeekFrom::Start(offset))?;
    let mut line = serde_json::Deserializer::from_reader(BufReader::new(journal));
    Ok(RowRecord::deserialize(&mut line)?)
}

/// Reads the images of a row again, and checks that they are those of its record.
fn read_images(
    row: Row,
    record: &RowRecord,
    out: &Path,
    limits: ecso::Limits,
) -> Result<(Row, NamedImages), PackError> {
    let number = row.number;
    let changed = || PackError::Changed(number);
    let mut digests = record.images.iter();
    let mut images = Vec::with_capacity(row.images.len());
    for source in &row.images {
        let read = |path: &Path| {
            regular::read(path, limits.bytes).map(Bytes::from).map_err(|error| failed(path, error))
        };
        let pages = match source {
            ImageSource::Bytes(bytes) => Image::pages(bytes.clone(), limits),
            ImageSource::File(path) => Image::pages(read(path)?, limits),
            ImageSource::Url(_) => {
                let digest = digests.next().ok_or_else(changed)?;
                let stored = read(&fetched_path(out, digest))?;
                images.push(vec![Image::from_bytes(stored, limits).map_err(|_| changed())?]);
                continue;
            }
        };
        let pages = pages.map_err(|_| changed())?;
        let mut is_next = |image: &Image| {
            digests.next().is_some_and(|digest| *image.digest().to_hex() == **digest)
        };
        if !pages.iter().all(&mut is_next) {
            return Err(changed());
        }
        images.push(pages);
    }
    let (row, images) = row.with_pages(images);
    if images.len() != record.images.len() || row.query != record.query {
        return Err(changed());
    }
    let named = images.iter().zip(&record.images).filter_map(|(image, digest)| {
        let (bytes, kind) = image.encoded()?;
        let extension = kind.rsplit('/').next().unwrap_or("png").replace("jpeg", "jpg");
        Some((format!("images/{}.{extension}", &digest[..32]), bytes.clone()))
    });
    let named = named.collect();
    Ok((row, named))
}

/// Writes the rows that failed, counted from 1, with the reason of their last attempt.
fn write_failures(out: &Path, current: &CurrentRows, folder: &Path) -> Result<(), PackError> {
    let mut failures: BTreeMap<u64, Value> = BTreeMap::new();
    for record in JournalReader::in_folder(out).entries::<RowRecord>()? {
        let (_, record) = record?;
        let number = record.number();
        match &record.error {
            Some(error) if current.contains(&record) => {
                let failure = json!({
                    "row": number + 1,
                    "source": record.source,
                    "error": error,
                    "at": record.at,
                });
                failures.insert(number, failure);
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

/// Adds size and SHA-256 of every file except the images, whose names are digests.
fn add_digests(
    root: &Path,
    folder: &Path,
    files: &mut BTreeMap<String, (u64, String)>,
) -> Result<(), PackError> {
    for entry in fs::read_dir(folder).map_err(|error| failed(folder, error))? {
        let path = entry.map_err(|error| failed(folder, error))?.path();
        if path.is_dir() {
            if !path.ends_with("images") {
                add_digests(root, &path, files)?;
            }
            continue;
        }
        let name = path.strip_prefix(root).unwrap_or(&path).display().to_string();
        files.insert(name, digest(&path)?);
    }
    Ok(())
}

/// A file's size in bytes and its SHA-256.
fn digest(path: &Path) -> Result<(u64, String), PackError> {
    let mut file = File::open(path).map_err(|error| failed(path, error))?;
    let (mut digest, mut bytes, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 16]);
    loop {
        let count = file.read(&mut buffer).map_err(|error| failed(path, error))?;
        if count == 0 {
            return Ok((bytes, hex::encode(digest.finalize())));
        }
        digest.update(&buffer[..count]);
        bytes += count as u64;
    }
}

/// Prefix of the folder of an unfinished dataset.
const UNFINISHED: &str = ".dataset-";

/// Removes unfinished datasets of interrupted runs.
fn remove_unfinished(out: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(out)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// Whether the folder of a run's dataset has other contents, which must not be replaced.
///
/// # Errors
/// The folder can't be read.
pub fn is_occupied(out: &Path) -> std::io::Result<bool> {
    let folder = out.join("dataset");
    match fs::read_dir(&folder) {
        Ok(mut entries) => Ok(entries.next().is_some() && !is_dataset(&folder)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => Ok(true),
        Err(error) => Err(error),
    }
}

/// Whether a folder is a dataset that was packed here.
fn is_dataset(folder: &Path) -> bool {
    let file = regular::open(&folder.join("manifest.json")).ok();
    let manifest =
        file.and_then(|file| serde_json::from_reader::<_, Value>(BufReader::new(file)).ok());
    manifest.is_some_and(|manifest| {
        manifest["run"]["ecso"].is_string() && manifest["packing"].is_object()
    })
}

/// Moves the finished dataset to `place`, replacing an earlier one.
fn replace_dataset(work: tempfile::TempDir, place: &Path) -> Result<(), PackError> {
    let has_entries = fs::read_dir(place).is_ok_and(|mut entries| entries.next().is_some());
    if has_entries && !is_dataset(place) {
        return Err(PackError::Occupied { path: place.to_owned() });
    }
    let work = work.keep();
    // The temporary folder is removed at the end, with the old dataset in it.
    let old = tempfile::tempdir_in(place.parent().unwrap_or(Path::new(".")))
        .map_err(|error| failed(place, error))?;
    if place.exists() {
        fs::rename(place, old.path().join("dataset")).map_err(|error| failed(place, error))?;
    }
    fs::rename(&work, place).map_err(|error| failed(place, error))?;
    // Temporary folders are private; a dataset gets the permissions of an ordinary folder.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let _ = fs::set_permissions(place, fs::Permissions::from_mode(0o755));
    }
    Ok(())
}
