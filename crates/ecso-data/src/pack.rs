//! Packing: from the journal to a dataset that `datasets`, TRL and LLaVA's own trainer read.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::{self, File},
    io::{BufWriter, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use ecso::Image;
use ecso_eval::journal::{self, JournalError};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{
    card,
    input::{Input, InputError},
    make::{Made, Reason, Sample},
    row::{Picture, Row},
    run::{Header, Record, fetched},
    table::{Line, Message, Table},
};

/// How the dataset is made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Packing {
    /// Utility samples (safe rows with their own answer) for each sample of alignment.
    pub utility: f64,
    /// Share of the images that are for validation.
    pub validation: f64,
    /// Seed of these two draws.
    pub seed: u64,
    /// Bytes after which a Parquet file is closed.
    pub shard_bytes: usize,
    /// SPDX name of the dataset's licence, or `other`.
    pub licence: String,
    /// Bounds of images.
    pub limits: ecso::Limits,
}

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
    /// A row is not what it was when it was made.
    #[error("row {0} of the input has changed since it was made; put it back, or begin anew with another --out")]
    Changed(u64),
    /// A file can't be written.
    #[error("{path}: {reason}")]
    File {
        /// Which.
        path: String,
        /// Why.
        reason: String,
    },
}

fn failed(path: &Path, error: &dyn std::fmt::Display) -> PackError {
    PackError::File { path: path.display().to_string(), reason: error.to_string() }
}

/// What a dataset holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// What the run was.
    pub run: Header,
    /// How it was packed.
    pub packing: Packing,
    /// Rows that were recorded.
    pub rows: u64,
    /// Rows whose draft was safe.
    pub safe: u64,
    /// Rows left out, by reason.
    pub dropped: BTreeMap<Reason, u64>,
    /// Rows that failed.
    pub failed: u64,
    /// Of the kept answers, bare refusals.
    pub refusals: u64,
    /// Samples by split and kind (`safety`, `utility`).
    pub samples: BTreeMap<String, BTreeMap<String, u64>>,
    /// Samples by category and kind.
    pub categories: BTreeMap<String, BTreeMap<String, u64>>,
    /// The files, with bytes and SHA-256.
    pub files: BTreeMap<String, (u64, String)>,
}

/// A place in the journal: where a row's record begins.
type Places = HashMap<u64, u64>;

/// Makes the dataset of the run in `out`, in the folder `dataset` there. It takes the place of an earlier one in one move.
///
/// # Errors
/// [`PackError`].
pub fn pack(out: &Path, input: &Input, packing: &Packing) -> Result<Manifest, PackError> {
    let header: Header = journal::header(out)?;
    let mut manifest = Manifest {
        run: header,
        packing: packing.clone(),
        rows: 0,
        safe: 0,
        dropped: BTreeMap::new(),
        failed: 0,
        refusals: 0,
        samples: BTreeMap::new(),
        categories: BTreeMap::new(),
        files: BTreeMap::new(),
    };
    let (places, groups) = choose(out, packing, &mut manifest)?;
    let work = tempfile::Builder::new().prefix(".dataset-").tempdir_in(out).map_err(|error| failed(out, &error))?;
    let mut files = Files::open(work.path(), packing.shard_bytes)?;
    let journal_path = journal::path(out);
    let mut journal = File::open(&journal_path).map_err(|error| failed(&journal_path, &error))?;
    for row in input.rows()? {
        let Ok(row) = row else { continue };
        let Some(place) = places.get(&row.number) else { continue };
        let record = record_at(&mut journal, *place).map_err(|error| failed(&journal_path, &error))?;
        let (row, images) = pictures(row, &record, out, packing.limits)?;
        let (kind, sample) = match &record.made {
            Some(Made::Kept(sample)) => ("safety", sample),
            Some(Made::Safe(sample)) => ("utility", sample),
            _ => continue,
        };
        let split = split(&record, &groups, packing);
        *manifest.samples.entry(split.to_owned()).or_default().entry(kind.to_owned()).or_default() += 1;
        let category = if record.category.is_empty() { "none" } else { &record.category };
        *manifest.categories.entry(category.to_owned()).or_default().entry(kind.to_owned()).or_default() += 1;
        files.write(split, kind, &row, &record, sample, &images, &manifest.run)?;
    }
    files.finish()?;
    failures(out, work.path())?;
    let path = work.path().join("README.md");
    fs::write(&path, card::card(&manifest)).map_err(|error| failed(&path, &error))?;
    digests(work.path(), work.path(), &mut manifest.files)?;
    let path = work.path().join("manifest.json");
    let text = serde_json::to_string_pretty(&manifest).map_err(|error| failed(&path, &error))?;
    fs::write(&path, text).map_err(|error| failed(&path, &error))?;
    put(work, &out.join("dataset"))?;
    Ok(manifest)
}

/// Counts the journal and chooses: all rows that were kept, and of the safe ones those with the lowest lots. Gives where their
/// records are, and which images belong together.
fn choose(out: &Path, packing: &Packing, manifest: &mut Manifest) -> Result<(Places, Groups), PackError> {
    let mut kept = Places::new();
    let mut safe: Vec<(u64, u64, u64)> = Vec::new();
    let mut groups = Groups::default();
    let mut outcomes: HashMap<u64, Outcome> = HashMap::new();
    for record in journal::records::<Record>(out)? {
        let (place, record) = record?;
        let number: u64 = record.id.parse().unwrap_or_default();
        let outcome = match &record.made {
            Some(Made::Kept(sample)) => {
                kept.insert(number, place);
                if sample.refusal { Outcome::Refusal } else { Outcome::Kept }
            }
            Some(Made::Safe(_)) => {
                safe.push((lot(packing.seed, "utility", &record.key), number, place));
                Outcome::Safe
            }
            Some(Made::Dropped { reason, .. }) => Outcome::Dropped(*reason),
            None => Outcome::Failed,
        };
        groups.join(&record.images);
        // Of two records of one row the later counts; only rows that failed have two.
        outcomes.insert(number, outcome);
    }
    manifest.rows = outcomes.len() as u64;
    for outcome in outcomes.values() {
        match outcome {
            Outcome::Kept => {}
            Outcome::Refusal => manifest.refusals += 1,
            Outcome::Safe => manifest.safe += 1,
            Outcome::Failed => manifest.failed += 1,
            Outcome::Dropped(reason) => *manifest.dropped.entry(*reason).or_default() += 1,
        }
    }
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count")]
    let wanted = (packing.utility.max(0.0) * kept.len() as f64).round() as usize;
    safe.sort_unstable();
    kept.extend(safe.into_iter().take(wanted).map(|(_, number, place)| (number, place)));
    Ok((kept, groups))
}

#[derive(Clone, Copy)]
enum Outcome {
    Kept,
    Refusal,
    Safe,
    Failed,
    Dropped(Reason),
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

fn split(record: &Record, groups: &Groups, packing: &Packing) -> &'static str {
    // Without an image the words decide.
    let what = record.images.first().map_or_else(|| record.key.clone(), |image| groups.of(image));
    #[expect(clippy::cast_precision_loss, reason = "a draw")]
    let share = lot(packing.seed, "validation", &what) as f64 / u64::MAX as f64;
    if share < packing.validation { "validation" } else { "train" }
}

fn record_at(journal: &mut File, place: u64) -> std::io::Result<Record> {
    journal.seek(SeekFrom::Start(place))?;
    let mut line = serde_json::Deserializer::from_reader(std::io::BufReader::new(journal));
    Ok(Record::deserialize(&mut line)?)
}

/// A sample's images: names and bytes.
type Pictures = Vec<(String, Bytes)>;

fn pictures(row: Row, record: &Record, out: &Path, limits: ecso::Limits) -> Result<(Row, Pictures), PackError> {
    let number = row.number;
    let changed = || PackError::Changed(number);
    let mut digests = record.images.iter();
    let mut images = Vec::with_capacity(row.images.len());
    for picture in &row.images {
        let read = |path: &Path| fs::read(path).map(Bytes::from).map_err(|error| failed(path, &error));
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
        if !found.iter().all(|image| digests.next().is_some_and(|digest| image.digest().to_hex().as_str() == digest)) {
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

/// A JSON array that is written element by element.
struct Array {
    path: PathBuf,
    file: BufWriter<File>,
    empty: bool,
}

impl Array {
    fn open(path: PathBuf) -> Result<Self, PackError> {
        let file = File::create(&path).map_err(|error| failed(&path, &error))?;
        Ok(Self { path, file: BufWriter::new(file), empty: true })
    }

    fn push(&mut self, value: &Value) -> Result<(), PackError> {
        let before = if std::mem::take(&mut self.empty) { "[\n" } else { ",\n" };
        write!(self.file, "{before}{value}").map_err(|error| failed(&self.path, &error))
    }

    fn finish(mut self) -> Result<(), PackError> {
        let end = if self.empty { "[]\n" } else { "\n]\n" };
        let ended = self.file.write_all(end.as_bytes()).and_then(|()| self.file.flush());
        ended.map_err(|error| failed(&self.path, &error))
    }
}

/// The files of one split.
struct Split {
    llava: Array,
    messages: BufWriter<File>,
    sft: Table,
    dpo: Table,
}

/// All files of a dataset.
struct Files {
    root: PathBuf,
    splits: HashMap<&'static str, Split>,
    images: HashSet<String>,
    shard_bytes: usize,
}

impl Files {
    fn open(root: &Path, shard_bytes: usize) -> Result<Self, PackError> {
        for folder in ["images", "llava", "messages"] {
            let folder = root.join(folder);
            fs::create_dir_all(&folder).map_err(|error| failed(&folder, &error))?;
        }
        Ok(Self { root: root.to_owned(), splits: HashMap::new(), images: HashSet::new(), shard_bytes })
    }

    fn split(&mut self, name: &'static str) -> Result<&mut Split, PackError> {
        match self.splits.entry(name) {
            std::collections::hash_map::Entry::Occupied(open) => Ok(open.into_mut()),
            std::collections::hash_map::Entry::Vacant(free) => {
                let path = self.root.join(format!("messages/{name}.jsonl"));
                let messages = File::create(&path).map_err(|error| failed(&path, &error))?;
                Ok(free.insert(Split {
                    llava: Array::open(self.root.join(format!("llava/{name}.json")))?,
                    messages: BufWriter::new(messages),
                    sft: Table::new(&self.root.join("sft"), name, &["messages"], self.shard_bytes),
                    dpo: Table::new(&self.root.join("dpo"), name, &["prompt", "chosen", "rejected"], self.shard_bytes),
                }))
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "one row of each file is made of all of these")]
    fn write(
        &mut self,
        split: &'static str,
        kind: &str,
        row: &Row,
        record: &Record,
        sample: &Sample,
        images: &Pictures,
        run: &Header,
    ) -> Result<(), PackError> {
        for (name, bytes) in images {
            if self.images.insert(name.clone()) {
                let path = self.root.join(name);
                fs::write(&path, bytes).map_err(|error| failed(&path, &error))?;
            }
        }
        let root = self.root.clone();
        let provenance = json!({
            "row": row.number, "source": record.source, "model": run.model, "model_digest": run.model_digest,
            "profile": run.profile.0, "profile_hash": run.profile_hash(), "templates": sample.templates,
            "score": sample.score, "second_score": sample.second, "made_at": record.at,
        });
        let mut prompt: Vec<Message> =
            row.before.iter().map(|said| Message::new(said.role.as_str(), said.images, &said.text)).collect();
        prompt.push(Message::new("user", row.query_images(), &row.query));
        let said = |text: &str| Message::new("assistant", 0, text);
        let mut messages = prompt.clone();
        messages.push(said(&sample.answer));
        let names: Vec<&str> = images.iter().map(|(name, _)| name.as_str()).collect();
        let line = |columns: Value| Line { images, columns };
        let common = |mut columns: Value| {
            columns["kind"] = kind.into();
            columns["category"] = record.category.as_str().into();
            columns["provenance"] = provenance.clone();
            columns
        };
        let files = self.split(split)?;
        files.llava.push(&llava(row, record, sample, &names, &provenance))?;
        let text = json!({"images": names, "messages": messages, "kind": kind, "category": record.category, "provenance": provenance});
        writeln!(files.messages, "{text}").map_err(|error| failed(&root.join("messages"), &error))?;
        let table = |error: parquet::errors::ParquetError| failed(&root, &error);
        files.sft.push(line(common(json!({"messages": messages})))).map_err(table)?;
        if kind == "safety" {
            let pair = json!({"prompt": prompt, "chosen": [said(&sample.answer)], "rejected": [said(&sample.draft)]});
            files.dpo.push(line(common(pair))).map_err(table)?;
        }
        Ok(())
    }

    fn finish(self) -> Result<(), PackError> {
        for split in self.splits.into_values() {
            let table = |error: parquet::errors::ParquetError| failed(&self.root, &error);
            let mut messages = split.messages;
            messages.flush().map_err(|error| failed(&self.root.join("messages"), &error))?;
            split.llava.finish()?;
            split.sft.finish().map_err(table)?;
            split.dpo.finish().map_err(table)?;
        }
        Ok(())
    }
}

/// LLaVA's own layout, one mark an image; one image as `image`, several as a list.
fn llava(row: &Row, record: &Record, sample: &Sample, names: &[&str], provenance: &Value) -> Value {
    let said = |from: &str, images: usize, text: &str| {
        // LLaVA counts marks: one that a text spells must be none.
        json!({"from": from, "value": format!("{}{}", "<image>\n".repeat(images), text.replace("<image>", "< image>"))})
    };
    let mut conversations: Vec<Value> = Vec::new();
    for turn in &row.before {
        let from = match turn.role {
            ecso::Role::System => "system",
            ecso::Role::User => "human",
            ecso::Role::Assistant => "gpt",
        };
        conversations.push(said(from, turn.images, &turn.text));
    }
    conversations.push(said("human", row.query_images(), &row.query));
    conversations.push(said("gpt", 0, &sample.answer));
    let mut sample = json!({"id": record.source, "conversations": conversations, "provenance": provenance});
    match names {
        [] => {}
        [one] => sample["image"] = (*one).into(),
        several => sample["image"] = several.iter().copied().collect::<Value>(),
    }
    sample
}

/// The rows that failed, with the reason of their last try.
fn failures(out: &Path, folder: &Path) -> Result<(), PackError> {
    let mut failures: BTreeMap<u64, Value> = BTreeMap::new();
    for record in journal::records::<Record>(out)? {
        let (_, record) = record?;
        let number = record.id.parse().unwrap_or_default();
        match &record.error {
            Some(error) => {
                failures
                    .insert(number, json!({"row": number, "source": record.source, "error": error, "at": record.at}));
            }
            None => {
                failures.remove(&number);
            }
        }
    }
    let path = folder.join("failed.jsonl");
    let lines: Vec<String> = failures.values().map(Value::to_string).collect();
    let text = if lines.is_empty() { String::new() } else { lines.join("\n") + "\n" };
    fs::write(&path, text).map_err(|error| failed(&path, &error))
}

/// Bytes and SHA-256 of every file but the images, whose names are the digests of what came in.
fn digests(root: &Path, folder: &Path, files: &mut BTreeMap<String, (u64, String)>) -> Result<(), PackError> {
    for entry in fs::read_dir(folder).map_err(|error| failed(folder, &error))? {
        let path = entry.map_err(|error| failed(folder, &error))?.path();
        if path.is_dir() {
            if !path.ends_with("images") {
                digests(root, &path, files)?;
            }
            continue;
        }
        let mut file = File::open(&path).map_err(|error| failed(&path, &error))?;
        let (mut digest, mut bytes, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 16]);
        loop {
            let read = file.read(&mut buffer).map_err(|error| failed(&path, &error))?;
            if read == 0 {
                break;
            }
            digest.update(&buffer[..read]);
            bytes += read as u64;
        }
        let name = path.strip_prefix(root).unwrap_or(&path).display().to_string();
        let digest = digest.finalize().iter().fold(String::new(), |digits, byte| digits + &format!("{byte:02x}"));
        files.insert(name, (bytes, digest));
    }
    Ok(())
}

/// Puts the finished folder in its place.
fn put(work: tempfile::TempDir, place: &Path) -> Result<(), PackError> {
    let old = place.with_extension("old");
    let _ = fs::remove_dir_all(&old);
    if place.exists() {
        fs::rename(place, &old).map_err(|error| failed(place, &error))?;
    }
    let work = work.keep();
    fs::rename(&work, place).map_err(|error| failed(place, &error))?;
    let _ = fs::remove_dir_all(&old);
    // A temporary folder is its owner's alone; a dataset is like any other folder.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let _ = fs::set_permissions(place, fs::Permissions::from_mode(0o755));
    }
    Ok(())
}
