//! Processes all rows of an input. Rows that the journal has are not processed again.

use std::{
    collections::{BTreeMap, HashSet},
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

use ecso::{Image, Limits, error_chain};
use ecso_batch::{
    Batch, Bounds, RowDecision,
    journal::{Entry, Journal, JournalError, JournalReader, Key},
};
use ecso_openai::Fetcher;

use crate::{
    dedupe::{PerceptualHasher, Repeat, RowState, SeenRows},
    generate::{Generator, Reason, RowOutcome},
    input::{Input, InputError, RowError},
    record::{self, CurrentRows, RowRecord, RunHeader, Shard},
    row::{ImageSource, Row, shorten},
};

/// Progress of a run, including earlier sessions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// Rows that are recorded.
    pub recorded: usize,
    /// Those of them recorded in this session.
    pub fresh: u64,
    /// Rows that became safety samples.
    pub kept: u64,
    /// Rows whose draft is safe.
    pub safe: u64,
    /// Rows that are left out, by reason.
    pub dropped: BTreeMap<Reason, u64>,
    /// Rows that failed.
    pub failed: usize,
    /// Tokens of all calls.
    pub tokens: u64,
}

impl Progress {
    fn add(&mut self, record: &RowRecord) {
        self.recorded += 1;
        self.tokens += record.cost.tokens;
        match &record.outcome {
            Some(RowOutcome::Kept(_)) => self.kept += 1,
            Some(RowOutcome::Safe(_)) => self.safe += 1,
            Some(RowOutcome::Dropped { reason, .. }) => {
                *self.dropped.entry(*reason).or_default() += 1;
            }
            None => self.failed += 1,
        }
    }
}

/// Why a run failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The input can't be read.
    #[error(transparent)]
    Input(#[from] InputError),
    /// The journal can't be read or written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A fetched image can't be stored.
    #[error("{}", path.display())]
    Image {
        /// Where it was to be stored.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
}

/// The path where a fetched image is stored.
#[must_use]
pub fn fetched_path(out: &Path, digest: &str) -> PathBuf {
    out.join("fetched").join(digest)
}

/// What rows are processed with.
pub struct RunContext {
    /// Runs the guard on a row.
    pub generator: Generator,
    /// Fetches images behind URLs.
    pub fetcher: Fetcher,
    /// Limits on images.
    pub limits: Limits,
    /// The run's folder.
    pub out: PathBuf,
    /// Hashes images, if near duplicates are dropped.
    pub hasher: Option<PerceptualHasher>,
}

/// How a run ended.
pub struct RunEnd {
    /// Whether all rows were processed; if not, a bound was reached.
    pub complete: bool,
    /// The journal. While it is open, no other process can use the run's folder. Keep it open
    /// until the dataset is packed.
    pub journal: Journal,
}

/// Processes all rows of `input` that the journal does not have as they are now. Dropping the
/// future loses only the rows in flight.
///
/// # Errors
/// [`RunError`]. A row that fails is recorded with its reason, and the run continues.
pub async fn run(
    input: &Input,
    header: &RunHeader,
    context: &Arc<RunContext>,
    bounds: Bounds,
    mut progress: impl FnMut(&Progress),
) -> Result<RunEnd, RunError> {
    let mut journal = Journal::open(&context.out, header)?;
    let EarlierWork { mut seen, mut done, current, outdated } =
        EarlierWork::read(&journal, input, header, context, bounds)?;
    progress(&done);
    let sift = |read| sift(read, &mut seen, header.shard);
    let count = |record: RowRecord, _: &Journal| {
        done.fresh += 1;
        done.add(&record);
        progress(&done);
    };
    let rows = input.rows()?.map(|row| {
        let key = record::number_key(&row);
        // A key without the row's digest matches no record, so the row is processed again.
        (if outdated.contains(&key.slot()) { key } else { current.key(key) }, row)
    });
    let complete = ecso_batch::run(rows, context, &mut journal, bounds, sift, count).await?;
    Ok(RunEnd { complete, journal })
}

/// What earlier sessions recorded about the current rows of the input.
struct EarlierWork {
    seen: SeenRows,
    done: Progress,
    /// The current rows, if any row is recorded.
    current: CurrentRows,
    /// Journal places of rows that were dropped as duplicates of a row that is no longer recorded.
    outdated: HashSet<u64>,
}

impl EarlierWork {
    fn read(
        journal: &Journal,
        input: &Input,
        header: &RunHeader,
        context: &RunContext,
        bounds: Bounds,
    ) -> Result<Self, RunError> {
        let mut work = Self {
            seen: SeenRows::new(header.near_duplicates),
            done: Progress::default(),
            current: CurrentRows::default(),
            outdated: HashSet::new(),
        };
        if journal.is_empty() {
            return Ok(work);
        }
        work.current = CurrentRows::read(input)?;
        let (mut processed, mut repeats) = (HashSet::new(), Vec::new());
        for record in JournalReader::in_folder(&context.out).latest::<RowRecord>()? {
            let record = record?;
            if !work.current.contains(&record) || bounds.retry_failed && record.failed() {
                continue;
            }
            if let Some(RowOutcome::Dropped { reason, of: Some(of) }) = record.outcome {
                repeats.push((record.key(), reason, of));
                continue;
            }
            work.done.add(&record);
            if record.outcome.is_some() {
                let state = RowState::new(record.number());
                state.resolve(true);
                processed.insert(state.number());
                work.seen.add(state, &record.key, &record.query, &record.image_hashes);
            }
        }
        for (key, reason, of) in repeats {
            if processed.contains(&of) {
                work.done.recorded += 1;
                *work.done.dropped.entry(reason).or_default() += 1;
            } else {
                work.outdated.insert(key.slot());
            }
        }
        Ok(work)
    }
}

/// A row whose images are read.
pub struct Job {
    row: Row,
    images: Vec<Image>,
    record: RowRecord,
    state: RowState,
    /// Earlier rows in flight that it repeats.
    repeats: Vec<Repeat>,
}

impl Job {
    /// The record of a row that repeats `earlier`.
    fn into_duplicate(self, (reason, earlier): &Repeat) -> RowRecord {
        self.state.resolve(false);
        RowRecord {
            outcome: Some(RowOutcome::Dropped { reason: *reason, of: Some(earlier.number()) }),
            ..self.record
        }
    }
}

impl Batch for RunContext {
    /// A row and its key in the journal.
    type Row = (Key, Result<Row, RowError>);
    /// A row with its images, or its record if these can't be read.
    type Ready = Result<Job, RowRecord>;
    type Entry = RowRecord;
    type Error = RunError;

    fn slot(&self, (key, _): &Self::Row) -> Key {
        *key
    }

    async fn read(&self, (_, row): Self::Row) -> Self::Ready {
        let row = row.map_err(|error| RowRecord::unreadable(&error))?;
        let record = RowRecord::new(&row);
        match row.read_images(&self.fetcher, self.limits).await {
            Ok(images) => {
                let (row, images) = row.with_pages(images);
                let image_hashes =
                    self.hasher.as_ref().map_or_else(Vec::new, |hasher| hasher.hash_all(&images));
                let record =
                    RowRecord { image_hashes, ..record.with_images(row.key(&images), &images) };
                let state = RowState::new(row.number);
                Ok(Job { row, images, record, state, repeats: Vec::new() })
            }
            Err(error) => Err(RowRecord { error: Some(error_chain(&error)), ..record }),
        }
    }

    fn bytes(&self, ready: &Self::Ready) -> usize {
        let images = ready.iter().flat_map(|job| &job.images);
        images.filter_map(|image| image.encoded().map(|(bytes, _)| bytes.len())).sum()
    }

    async fn make(&self, ready: Self::Ready) -> Result<RowRecord, RunError> {
        let mut job = match ready {
            Ok(job) => job,
            Err(record) => return Ok(record),
        };
        for repeat in std::mem::take(&mut job.repeats) {
            if repeat.1.has_outcome().await {
                return Ok(job.into_duplicate(&repeat));
            }
        }
        let generated = self.generator.generate(&job.row, &job.images).await;
        job.state.resolve(generated.is_ok());
        let record = RowRecord { at: record::now(), ..job.record };
        Ok(match generated {
            Ok((outcome, cost)) => {
                if matches!(outcome, RowOutcome::Kept(_) | RowOutcome::Safe(_)) {
                    store_fetched(&self.out, &job.row, &job.images)?;
                }
                RowRecord { outcome: Some(outcome), cost, ..record }
            }
            Err(error) => {
                RowRecord { error: Some(shorten(&error_chain(&error)).into_owned()), ..record }
            }
        })
    }

    fn tokens(&self, record: &RowRecord) -> u64 {
        record.cost.tokens
    }
}

/// Decides what to do with a row: process it, record what is already known about it, or skip it
/// because it belongs to another shard.
fn sift(
    read: Result<Job, RowRecord>,
    seen: &mut SeenRows,
    shard: Shard,
) -> RowDecision<RunContext> {
    match read {
        // An unreadable row has no key; its number decides.
        Err(record) if shard.contains(&format!("{:08x}", record.number())) => {
            RowDecision::Known(record)
        }
        Ok(job) if shard.contains(&job.record.key) => {
            let RowRecord { key, query, image_hashes, .. } = &job.record;
            match seen.check(&job.state, key, query, image_hashes) {
                Ok(repeats) => RowDecision::Make(Ok(Job { repeats, ..job })),
                Err(repeat) => RowDecision::Known(job.into_duplicate(&repeat)),
            }
        }
        _ => RowDecision::Skip,
    }
}

/// Stores fetched images, so that packing does not depend on the network.
fn store_fetched(out: &Path, row: &Row, images: &[Image]) -> Result<(), RunError> {
    for (source, image) in row.images.iter().zip(images) {
        let (ImageSource::Url(_), Some((bytes, _))) = (source, image.encoded()) else { continue };
        let path = fetched_path(out, &image.digest().to_hex());
        let store = || {
            let folder = path.parent().unwrap_or(out);
            std::fs::create_dir_all(folder)?;
            let mut file = tempfile::NamedTempFile::new_in(folder)?;
            file.write_all(bytes)?;
            file.persist(&path)?;
            Ok(())
        };
        store().map_err(|source: std::io::Error| RunError::Image { path: path.clone(), source })?;
    }
    Ok(())
}
