//! Running the engine over all rows of an input. What is recorded in the journal is never done
//! again.

use std::{
    collections::{BTreeMap, HashSet},
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

use ecso::{Image, Limits, chain};
use ecso_batch::{
    Batch, Bounds, RowDecision,
    journal::{Entry, Journal, JournalError, JournalReader, Key},
};
use ecso_openai::Fetcher;

use crate::{
    dedupe::{Fate, Marker, Repeated, Seen},
    input::{Input, InputError, RowError},
    make::{Made, Maker, Reason},
    record::{self, Present, RowRecord, RunHeader, Shard},
    row::{Picture, Row, cut},
};

/// How far a run is, earlier sessions included.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// Rows that are recorded and need not be made again.
    pub recorded: usize,
    /// Of these, made in this session.
    pub fresh: u64,
    /// Kept for alignment.
    pub kept: u64,
    /// Safe as they were.
    pub safe: u64,
    /// Left out, by reason.
    pub dropped: BTreeMap<Reason, u64>,
    /// Failed.
    pub failed: usize,
    /// Tokens, in all.
    pub tokens: u64,
}

impl Progress {
    fn add(&mut self, record: &RowRecord) {
        self.recorded += 1;
        self.tokens += record.cost.tokens;
        match &record.made {
            Some(Made::Kept(_)) => self.kept += 1,
            Some(Made::Safe(_)) => self.safe += 1,
            Some(Made::Dropped { reason, .. }) => *self.dropped.entry(*reason).or_default() += 1,
            None => self.failed += 1,
        }
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
    #[error("{}", path.display())]
    Image {
        /// Where it should go.
        path: PathBuf,
        /// Why it doesn't.
        source: std::io::Error,
    },
}

/// Where fetched images are kept.
#[must_use]
pub fn fetched(out: &Path, digest: &str) -> PathBuf {
    out.join("fetched").join(digest)
}

/// What rows are made with.
pub struct Making {
    /// Takes a row through the guard.
    pub maker: Maker,
    /// Gets images that are behind URLs.
    pub fetcher: Fetcher,
    /// Bounds of images.
    pub limits: Limits,
    /// The run's folder.
    pub out: PathBuf,
    /// Tells nearly equal images, where these are looked for.
    pub marker: Option<Marker>,
}

/// How a run ended.
pub struct Ended {
    /// Whether the input came to its end: if not, the bounds did.
    pub whole: bool,
    /// The journal. Who holds it keeps other processes from the run's folder, also while the
    /// dataset is packed.
    pub journal: Journal,
}

/// Runs all rows of `input` that the journal doesn't have, or has as other rows. Dropping the
/// future at any point loses the rows under way, no other.
///
/// # Errors
/// [`RunError`]. A row that fails is recorded with its reason, and the run goes on.
pub async fn run(
    input: &Input,
    header: &RunHeader,
    making: &Arc<Making>,
    bounds: Bounds,
    mut progress: impl FnMut(&Progress),
) -> Result<Ended, RunError> {
    let mut journal = Journal::open(&making.out, header)?;
    let Begun { mut seen, mut done, present, anew } =
        Begun::of(&journal, input, header, making, bounds)?;
    progress(&done);
    let sift = |read| sift(read, &mut seen, header.shard);
    let told = |record: RowRecord, _: &Journal| {
        done.fresh += 1;
        done.add(&record);
        progress(&done);
    };
    let rows = input.rows()?.map(|row| {
        let place = record::place(&row);
        // Without a digest nothing that is recorded is the row.
        (if anew.contains(&place.slot()) { place } else { present.key(place) }, row)
    });
    let whole = ecso_batch::run(rows, making, &mut journal, bounds, sift, told).await?;
    Ok(Ended { whole, journal })
}

/// What earlier sessions have done for the rows that the input has now.
struct Begun {
    seen: Seen,
    done: Progress,
    /// The rows, where some are recorded.
    present: Present,
    /// Places of rows that were left out because they repeat one, of which nothing stands any more.
    anew: HashSet<u64>,
}

impl Begun {
    fn of(
        journal: &Journal,
        input: &Input,
        header: &RunHeader,
        making: &Making,
        bounds: Bounds,
    ) -> Result<Self, RunError> {
        let mut begun = Self {
            seen: Seen::new(header.near_duplicates),
            done: Progress::default(),
            present: Present::default(),
            anew: HashSet::new(),
        };
        if journal.is_empty() {
            return Ok(begun);
        }
        begun.present = Present::of(input)?;
        let (mut made, mut repeats) = (HashSet::new(), Vec::new());
        for record in JournalReader::in_folder(&making.out).latest::<RowRecord>()? {
            let record = record?;
            if !begun.present.has(&record) || bounds.retry_failed && record.failed() {
                continue;
            }
            if let Some(Made::Dropped { reason, of: Some(of) }) = record.made {
                repeats.push((record.key(), reason, of));
                continue;
            }
            begun.done.add(&record);
            if record.made.is_some() {
                let fate = Fate::of(record.number());
                fate.tell(true);
                made.insert(fate.number());
                begun.seen.remember(fate, &record.key, &record.query, &record.marks);
            }
        }
        for (key, reason, of) in repeats {
            if made.contains(&of) {
                begun.done.recorded += 1;
                *begun.done.dropped.entry(reason).or_default() += 1;
            } else {
                begun.anew.insert(key.slot());
            }
        }
        Ok(begun)
    }
}

/// A row that was read.
pub struct Job {
    row: Row,
    images: Vec<Image>,
    record: RowRecord,
    fate: Fate,
    /// Earlier rows under way that it repeats.
    repeated: Vec<Repeated>,
}

impl Job {
    /// The record of a row that repeats `earlier`.
    fn left_out(self, (reason, earlier): &Repeated) -> RowRecord {
        self.fate.tell(false);
        RowRecord {
            made: Some(Made::Dropped { reason: *reason, of: Some(earlier.number()) }),
            ..self.record
        }
    }
}

impl Batch for Making {
    /// A row, and where the journal has it.
    type Row = (Key, Result<Row, RowError>);
    /// A row with its images; or its record, if they can't be had.
    type Ready = Result<Job, RowRecord>;
    type Entry = RowRecord;
    type Error = RunError;

    fn slot(&self, (key, _): &Self::Row) -> Key {
        *key
    }

    async fn read(&self, (_, row): Self::Row) -> Self::Ready {
        let row = row.map_err(|error| RowRecord::unreadable(&error))?;
        let record = RowRecord::of(&row);
        match row.pictures(&self.fetcher, self.limits).await {
            Ok(images) => {
                let (row, images) = row.with_pages(images);
                let marks =
                    self.marker.as_ref().map_or_else(Vec::new, |marker| marker.marks(&images));
                let record = RowRecord { marks, ..record.with(row.key(&images), &images) };
                Ok(Job { fate: Fate::of(row.number), row, images, record, repeated: Vec::new() })
            }
            Err(error) => Err(RowRecord { error: Some(chain(&error)), ..record }),
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
        for repeated in std::mem::take(&mut job.repeated) {
            if repeated.1.is_made().await {
                return Ok(job.left_out(&repeated));
            }
        }
        let made = self.maker.make(&job.row, &job.images).await;
        job.fate.tell(made.is_ok());
        let record = RowRecord { at: record::now(), ..job.record };
        Ok(match made {
            Ok((made, cost)) => {
                if matches!(made, Made::Kept(_) | Made::Safe(_)) {
                    keep_fetched(&self.out, &job.row, &job.images)?;
                }
                RowRecord { made: Some(made), cost, ..record }
            }
            Err(error) => RowRecord { error: Some(cut(&chain(&error)).into_owned()), ..record },
        })
    }

    fn tokens(&self, record: &RowRecord) -> u64 {
        record.cost.tokens
    }
}

/// What is to be done about a row: to make it, or to record what is known of it already. Another
/// shard's is left out.
fn sift(read: Result<Job, RowRecord>, seen: &mut Seen, shard: Shard) -> RowDecision<Making> {
    match read {
        // What can't be read has no key; its place decides.
        Err(record) if shard.has(&format!("{:08x}", record.number())) => RowDecision::Known(record),
        Ok(job) if shard.has(&job.record.key) => {
            let RowRecord { key, query, marks, .. } = &job.record;
            match seen.see(&job.fate, key, query, marks) {
                Ok(repeated) => RowDecision::Make(Ok(Job { repeated, ..job })),
                Err(earlier) => RowDecision::Known(job.left_out(&earlier)),
            }
        }
        _ => RowDecision::Skip,
    }
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
        keep().map_err(|source: std::io::Error| RunError::Image { path: path.clone(), source })?;
    }
    Ok(())
}
