//! Running the engine over all rows of an input. What is recorded in the journal is never done again.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashSet},
    io::Write,
    path::{Path, PathBuf},
    pin::pin,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use ecso::{Image, Limits};
use ecso_eval::journal::{self, Head, Journal, JournalError};
use ecso_openai::Fetcher;
use futures::{StreamExt, future, stream};
use serde::{Deserialize, Serialize};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    dedupe::Seen,
    input::{Input, InputError, RowError},
    make::{Cost, Filters, Made, Maker, Reason},
    row::{Picture, Row},
};

/// What a run is: it goes on only under the same.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// Version of ecso.
    pub ecso: String,
    /// Where the rows are.
    pub input: PathBuf,
    /// The model's name.
    pub model: String,
    /// What the model is, to the bit where that can be known.
    pub model_digest: String,
    /// The profile's name, and the profile as TOML.
    pub profile: (String, String),
    /// What is asked of answers.
    pub filters: Filters,
    /// Whether near duplicates are dropped.
    pub near_duplicates: bool,
    /// Which part of the rows.
    pub shard: Shard,
}

impl Header {
    /// The profile's name in provenance: the first 16 hexadecimal digits of the BLAKE3 of its text.
    #[must_use]
    pub fn profile_hash(&self) -> String {
        blake3::hash(self.profile.1.as_bytes()).to_hex()[..16].to_owned()
    }
}

impl Head for Header {
    fn differs(&self, begun: &Self) -> Option<&'static str> {
        let differ = [
            ("version of ecso", begun.ecso != self.ecso),
            ("input", begun.input != self.input),
            ("model", begun.model != self.model || begun.model_digest != self.model_digest),
            ("profile", begun.profile != self.profile),
            ("filter", begun.filters != self.filters || begun.near_duplicates != self.near_duplicates),
            ("--shard", begun.shard != self.shard),
        ];
        differ.into_iter().find(|(_, differs)| *differs).map(|(what, _)| what)
    }
}

/// One of several parts of an input, by what a row shows and asks: equal rows are in the same part, so no part needs to know
/// another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// Which, from 1.
    pub part: u32,
    /// Of how many.
    pub of: u32,
}

impl Shard {
    /// All rows.
    pub const ALL: Self = Self { part: 1, of: 1 };

    fn has(self, key: &str) -> bool {
        let lot = u32::from_str_radix(key.get(..8).unwrap_or_default(), 16).unwrap_or_default();
        lot % self.of.max(1) == self.part.saturating_sub(1)
    }
}

/// One row in the journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The row's place in the input.
    pub id: String,
    /// What the input calls it.
    pub source: String,
    /// [`Row::key`]; empty where the row or its images can't be read.
    #[serde(default)]
    pub key: String,
    /// BLAKE3 digests of its images.
    #[serde(default)]
    pub images: Vec<String>,
    /// Their perceptual hashes, where near duplicates are looked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub marks: Vec<String>,
    /// What is asked.
    #[serde(default)]
    pub query: String,
    /// Its category.
    #[serde(default)]
    pub category: String,
    /// What became of it; none if it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made: Option<Made>,
    /// What it took.
    #[serde(default)]
    pub cost: Cost,
    /// When, in RFC 3339.
    pub at: String,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl journal::Entry for Record {
    fn id(&self) -> &str {
        &self.id
    }

    fn failed(&self) -> bool {
        self.error.is_some()
    }
}

/// How a run goes; beside it, a run is what its [`Header`] says.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Rows at once.
    pub concurrency: usize,
    /// Rows again that failed.
    pub retry_failed: bool,
    /// Bounds of images.
    pub limits: Limits,
    /// No new row from so many tokens on.
    pub max_tokens: Option<u64>,
    /// No new row after so long.
    pub max_time: Option<Duration>,
}

/// How far a run is, earlier sessions included.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// Rows that are recorded.
    pub recorded: u64,
    /// Of these, made in this session.
    pub fresh: u64,
    /// Kept for alignment.
    pub kept: u64,
    /// Safe as they were.
    pub safe: u64,
    /// Left out, by reason.
    pub dropped: BTreeMap<Reason, u64>,
    /// Failed.
    pub failed: u64,
    /// Tokens, in all.
    pub tokens: u64,
}

impl Progress {
    /// Counts a record.
    pub fn add(&mut self, record: &Record) {
        self.recorded += 1;
        self.tokens += record.cost.tokens;
        match &record.made {
            Some(Made::Kept(_)) => self.kept += 1,
            Some(Made::Safe(_)) => self.safe += 1,
            Some(Made::Dropped { reason, .. }) => *self.dropped.entry(*reason).or_default() += 1,
            None => self.failed += 1,
        }
    }

    fn remove_failed(&mut self) {
        self.recorded -= 1;
        self.failed -= 1;
    }
}

/// Why a run ended before its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The input.
    #[error(transparent)]
    Input(#[from] InputError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A fetched image can't be kept.
    #[error("{path}: {reason}")]
    Image {
        /// Where it should go.
        path: String,
        /// Why it doesn't.
        reason: String,
    },
}

/// Where fetched images are kept.
#[must_use]
pub fn fetched(out: &Path, digest: &str) -> PathBuf {
    out.join("fetched").join(digest)
}

/// Runs all rows of `input` that the journal in `out` doesn't have. Dropping the future at any point loses the rows under way,
/// no other. Gives whether the input came to its end: if not, the budget did.
///
/// # Errors
/// [`RunError`]. A row that fails is recorded with its reason, and the run goes on.
pub async fn run(
    input: &Input,
    header: &Header,
    maker: &Maker,
    fetcher: &Fetcher,
    out: &Path,
    options: Options,
    mut progress: impl FnMut(&Progress),
) -> Result<bool, RunError> {
    let journal = Journal::open(out, header)?;
    let (mut seen, mut done) = (Seen::new(header.near_duplicates), Progress::default());
    let mut failed = HashSet::new();
    for record in journal::records::<Record>(out)? {
        let (_, record) = record?;
        if failed.remove(&record.id) {
            done.remove_failed();
        }
        if record.error.is_some() {
            failed.insert(record.id.clone());
        }
        done.add(&record);
        if !record.key.is_empty() && !matches!(record.made, Some(Made::Dropped { of: Some(_), .. })) {
            let number = record.id.parse().unwrap_or_default();
            seen.remember(number, &record.key, &record.query, &record.marks);
        }
    }
    progress(&done);
    let begun = Instant::now();
    let tokens = AtomicU64::new(0);
    let spent = || {
        options.max_tokens.is_some_and(|most| tokens.load(Ordering::Relaxed) >= most)
            || options.max_time.is_some_and(|most| begun.elapsed() >= most)
    };
    let (journal, unread) = (RefCell::new(journal), Cell::new(false));
    let open = input.rows()?.filter(|row| {
        let number = row.as_ref().map_or_else(|error| error.number, |row| row.number);
        !journal.borrow().has(&number.to_string(), options.retry_failed)
    });
    let open = open.take_while(|_| {
        unread.set(spent());
        !unread.get()
    });
    let at_once = options.concurrency.max(1);
    // Rows are read ahead and looked at in their order, so that of equal rows the first is made, however fast the others are.
    let mut records = pin!(
        stream::iter(open)
            .map(|row| read(row, fetcher, options.limits))
            .buffered(at_once)
            .filter_map(|read| future::ready(first(read, &mut seen, header.shard)))
            .map(|first| record(first, maker, out))
            .buffer_unordered(at_once)
    );
    while let Some(record) = records.next().await {
        let record = record?;
        tokens.fetch_add(record.cost.tokens, Ordering::Relaxed);
        journal.borrow_mut().record(&record)?;
        if failed.remove(&record.id) {
            done.remove_failed();
        }
        done.fresh += 1;
        done.add(&record);
        progress(&done);
    }
    Ok(!unread.get())
}

/// A row with its images; or its record, if they can't be had.
type Read = Result<(Row, Vec<Image>), Record>;

async fn read(row: Result<Row, RowError>, fetcher: &Fetcher, limits: Limits) -> Read {
    let row = row.map_err(|error| failure(error.number, error.number.to_string(), &error.reason))?;
    match row.pictures(fetcher, limits).await {
        Ok(images) => Ok(row.with_pages(images)),
        Err(error) => Err(failure(row.number, row.id, &error)),
    }
}

/// What is to be done about a row: to make it, or to record what is known of it already. `None` is another shard's.
enum First {
    Make { row: Row, images: Vec<Image>, key: String, marks: Vec<String> },
    Known(Record),
}

fn first(read: Read, seen: &mut Seen, shard: Shard) -> Option<First> {
    let (row, images) = match read {
        Ok(read) => read,
        // What can't be read has no key; its place decides.
        Err(record) => {
            let key = format!("{:08x}", record.id.parse::<u32>().unwrap_or_default());
            return shard.has(&key).then_some(First::Known(record));
        }
    };
    let key = row.key(&images);
    if !shard.has(&key) {
        return None;
    }
    Some(match seen.first(&row, &key, &images) {
        Ok(marks) => First::Make { row, images, key, marks },
        Err((reason, of)) => {
            let made = Some(Made::Dropped { reason, of: Some(of) });
            First::Known(Record { made, ..blank(&row, key, &images) })
        }
    })
}

async fn record(first: First, maker: &Maker, out: &Path) -> Result<Record, RunError> {
    let (row, images, key, marks) = match first {
        First::Known(record) => return Ok(record),
        First::Make { row, images, key, marks } => (row, images, key, marks),
    };
    let blank = Record { marks, ..blank(&row, key, &images) };
    Ok(match maker.make(&row, &images).await {
        Ok((made, cost)) => {
            if matches!(made, Made::Kept(_) | Made::Safe(_)) {
                keep_fetched(out, &row, &images)?;
            }
            Record { made: Some(made), cost, at: now(), ..blank }
        }
        Err(error) => Record { error: Some(error.to_string()), at: now(), ..blank },
    })
}

fn blank(row: &Row, key: String, images: &[Image]) -> Record {
    Record {
        id: row.number.to_string(),
        source: row.id.clone(),
        key,
        images: images.iter().map(|image| image.digest().to_hex().to_string()).collect(),
        marks: Vec::new(),
        query: row.query.clone(),
        category: row.category.clone(),
        made: None,
        cost: Cost::default(),
        at: now(),
        error: None,
    }
}

fn failure(number: u64, source: String, error: &dyn std::fmt::Display) -> Record {
    Record {
        id: number.to_string(),
        source,
        key: String::new(),
        images: Vec::new(),
        marks: Vec::new(),
        query: String::new(),
        category: String::new(),
        made: None,
        cost: Cost::default(),
        at: now(),
        error: Some(error.to_string()),
    }
}

fn now() -> String {
    OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default()
}

/// What was fetched is kept: who packs the dataset can't rely on the network.
fn keep_fetched(out: &Path, row: &Row, images: &[Image]) -> Result<(), RunError> {
    for (picture, image) in row.images.iter().zip(images) {
        let (Picture::Url(_), Some((bytes, _))) = (picture, image.encoded()) else { continue };
        let path = fetched(out, &image.digest().to_hex());
        let keep = || {
            let folder = path.parent().unwrap_or(out);
            std::fs::create_dir_all(folder)?;
            let mut file = tempfile::NamedTempFile::new_in(folder)?;
            file.write_all(bytes)?;
            file.persist(&path)?;
            Ok(())
        };
        keep().map_err(|error: std::io::Error| RunError::Image {
            path: path.display().to_string(),
            reason: error.to_string(),
        })?;
    }
    Ok(())
}
