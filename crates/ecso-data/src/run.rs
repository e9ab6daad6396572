//! Running the engine over all rows of an input. What is recorded in the journal is never done again.

use std::{
    collections::BTreeMap,
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

use ecso::{Image, Limits, chain};
use ecso_batch::{
    Batch, Bounds, Sifted,
    journal::{Journal, JournalError, Key, Saved},
};
use ecso_openai::Fetcher;

use crate::{
    dedupe::{Marker, Seen},
    input::{Input, InputError, RowError},
    make::{Made, Maker, Reason},
    record::{RowRecord, RunHeader, Shard},
    row::{Picture, Row},
};

/// How far a run is, earlier sessions included.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// Rows that are recorded.
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
    fn add(&mut self, record: &RowRecord, journal: &Journal) {
        (self.recorded, self.failed) = (journal.len(), journal.failed());
        self.tokens += record.cost.tokens;
        match &record.made {
            Some(Made::Kept(_)) => self.kept += 1,
            Some(Made::Safe(_)) => self.safe += 1,
            Some(Made::Dropped { reason, .. }) => *self.dropped.entry(*reason).or_default() += 1,
            None => {}
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

/// Runs all rows of `input` that the journal doesn't have. Dropping the future at any point loses the rows under way, no other.
/// Gives whether the input came to its end: if not, the bounds did.
///
/// # Errors
/// [`RunError`]. A row that fails is recorded with its reason, and the run goes on.
pub async fn run(
    input: &Input,
    header: &RunHeader,
    making: &Arc<Making>,
    bounds: Bounds,
    mut progress: impl FnMut(&Progress),
) -> Result<bool, RunError> {
    let mut journal = Journal::open(&making.out, header)?;
    let (mut seen, mut done) = (Seen::new(header.near_duplicates), Progress::default());
    for record in Saved::folder(&making.out).latest::<RowRecord>()? {
        let record = record?;
        done.add(&record, &journal);
        if !record.key.is_empty() && !matches!(record.made, Some(Made::Dropped { of: Some(_), .. })) {
            seen.remember(record.number(), &record.key, &record.query, &record.marks);
        }
    }
    progress(&done);
    let sift = |read| sift(read, &mut seen, header.shard);
    let told = |record: RowRecord, journal: &Journal| {
        done.fresh += 1;
        done.add(&record, journal);
        progress(&done);
    };
    ecso_batch::run(input.rows()?, making, &mut journal, bounds, sift, told).await
}

/// A row that was read.
pub struct Job {
    row: Row,
    images: Vec<Image>,
    key: String,
    marks: Vec<String>,
}

impl Batch for Making {
    type Row = Result<Row, RowError>;
    /// A row with its images; or its record, if they can't be had.
    type Ready = Result<Job, RowRecord>;
    type Entry = RowRecord;
    type Error = RunError;

    fn key(&self, row: &Self::Row) -> Key {
        let number = row.as_ref().map_or_else(|error| error.number, |row| row.number);
        Key::of(&number.to_string(), "")
    }

    async fn read(&self, row: Self::Row) -> Self::Ready {
        let row = row.map_err(|error| RowRecord::unreadable(error.number, None, error.reason.to_string()))?;
        match row.pictures(&self.fetcher, self.limits).await {
            Ok(images) => {
                let (row, images) = row.with_pages(images);
                let marks = self.marker.as_ref().map_or_else(Vec::new, |marker| marker.marks(&images));
                Ok(Job { key: row.key(&images), row, images, marks })
            }
            Err(error) => Err(RowRecord::unreadable(row.number, Some(row.id), chain(&error))),
        }
    }

    fn bytes(&self, ready: &Self::Ready) -> usize {
        let images = ready.iter().flat_map(|job| &job.images);
        images.filter_map(|image| image.encoded().map(|(bytes, _)| bytes.len())).sum()
    }

    async fn make(&self, ready: Self::Ready) -> Result<RowRecord, RunError> {
        let Job { row, images, key, marks } = match ready {
            Ok(job) => job,
            Err(record) => return Ok(record),
        };
        let made = self.maker.make(&row, &images).await;
        let record = RowRecord { marks, ..RowRecord::of(&row, key, &images) };
        Ok(match made {
            Ok((made, cost)) => {
                if matches!(made, Made::Kept(_) | Made::Safe(_)) {
                    keep_fetched(&self.out, &row, &images)?;
                }
                RowRecord { made: Some(made), cost, ..record }
            }
            Err(error) => RowRecord { error: Some(chain(&error)), ..record },
        })
    }

    fn tokens(&self, record: &RowRecord) -> u64 {
        record.cost.tokens
    }
}

/// What is to be done about a row: to make it, or to record what is known of it already. Another shard's is left out.
fn sift(read: Result<Job, RowRecord>, seen: &mut Seen, shard: Shard) -> Sifted<Making> {
    match read {
        // What can't be read has no key; its place decides.
        Err(record) if shard.has(&format!("{:08x}", record.number())) => Sifted::Known(record),
        Ok(job) if shard.has(&job.key) => match seen.first(job.row.number, &job.key, &job.row.query, &job.marks) {
            Ok(()) => Sifted::Make(Ok(job)),
            Err((reason, of)) => {
                let made = Some(Made::Dropped { reason, of: Some(of) });
                Sifted::Known(RowRecord { made, ..RowRecord::of(&job.row, job.key, &job.images) })
            }
        },
        _ => Sifted::Skip,
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
