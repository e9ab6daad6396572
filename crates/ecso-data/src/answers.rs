//! Guarded answers for in-memory tables, for data engines such as Ray, Spark and Daft. The result
//! has the same rows in the same order; a row that fails has an error instead of an answer.

mod columns;
mod store;

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use arrow_array::RecordBatch;
use arrow_schema::{ArrowError, SchemaRef};
use ecso::{
    Cause, Guard, GuardError, Image, Limits, Mllm, ModelError, Outcome, Profile, Step, Verdict,
    error_chain,
};
use ecso_batch::{
    Batch, Bounds, RowDecision, entries,
    journal::{Entry, JournalError, Key},
};
use ecso_openai::Fetcher;
use futures::{StreamExt, pin_mut};
use serde::{Deserialize, Serialize};

use crate::{
    input::{Columns, Mapping, RowError},
    row::{ImageSource, PartsHasher, Row, shorten_to},
};
pub use columns::{NAMES, schema};
use store::Store;

/// The kind of error of a row that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// The row can't be read, or it has no query.
    Input,
    /// An image can't be read or used.
    Image,
    /// The model rejected the request.
    Rejected,
    /// A content filter blocked the request.
    Filtered,
    /// The model is overloaded.
    RateLimited,
    /// The model did not answer in time.
    Timeout,
    /// The model's reply is invalid.
    BadReply,
    /// The model is unreachable.
    Unreachable,
    /// The model answered a question neither with yes nor with no.
    NoVerdict,
}

impl ErrorKind {
    /// The name in tables.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Input => "input",
            Self::Image => "image",
            Self::Rejected => "rejected",
            Self::Filtered => "filtered",
            Self::RateLimited => "rate_limited",
            Self::Timeout => "timeout",
            Self::BadReply => "bad_reply",
            Self::Unreachable => "unreachable",
            Self::NoVerdict => "no_verdict",
        }
    }

    /// The kind of a guard's error.
    #[must_use]
    pub fn from_guard(error: &GuardError) -> Self {
        match error {
            GuardError::NoQuery => Self::Input,
            GuardError::NoVerdict { .. } => Self::NoVerdict,
            GuardError::Model { source, .. } => Self::from_model(source),
            _ => Self::BadReply,
        }
    }

    /// The kind of a model's error.
    #[must_use]
    pub fn from_model(error: &ModelError) -> Self {
        match error {
            ModelError::Rejected(_) => Self::Rejected,
            ModelError::Filtered(_) => Self::Filtered,
            ModelError::Overloaded { .. } => Self::RateLimited,
            ModelError::Timeout(_) => Self::Timeout,
            ModelError::Transport(_) => Self::Unreachable,
            _ => Self::BadReply,
        }
    }
}

/// The answer to a row: a line of the journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// The row's key: a hash of everything that determines its answer, including model and profile.
    /// Empty if the row can't be read.
    pub id: String,
    /// The guarded answer; none if the row failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    /// The verdict on the direct answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Verdict>,
    /// Probability in 0..=1 that the direct answer, or the request for it, is harmful, if the model
    /// returns probabilities.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score: Option<f64>,
    /// The images as text, if step 3 ran; several are separated by an empty line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub caption: Option<String>,
    /// Prompt and reply tokens of all calls, if the model reports usage.
    #[serde(default)]
    pub tokens: u64,
    /// Time of all calls, in milliseconds.
    #[serde(default)]
    pub ms: u64,
    /// Why the row failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The kind of that error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_kind: Option<ErrorKind>,
    /// The row's index in the table.
    #[serde(skip)]
    index: usize,
}

impl Entry for Answer {
    fn id(&self) -> &str {
        &self.id
    }

    fn failed(&self) -> bool {
        self.error.is_some()
    }
}

impl Answer {
    /// Whether it answers the row. Its journal may have been edited.
    fn is_complete(&self) -> bool {
        self.error.is_none() && self.answer.is_some() && self.verdict.is_some()
    }

    fn new(id: String, outcome: Outcome, index: usize) -> Self {
        let captions: Vec<&str> = outcome
            .steps
            .iter()
            .filter(|trace| trace.step == Step::Caption)
            .map(|trace| trace.reply.as_str())
            .collect();
        let tokens = |tokens: Option<u32>| u64::from(tokens.unwrap_or(0));
        Self {
            id,
            verdict: Some(outcome.verdict),
            score: outcome.score,
            caption: (!captions.is_empty()).then(|| captions.join("\n\n")),
            tokens: outcome
                .steps
                .iter()
                .map(|trace| tokens(trace.prompt_tokens) + tokens(trace.completion_tokens))
                .sum(),
            ms: outcome.steps.iter().map(|trace| trace.ms).sum(),
            answer: Some(outcome.answer),
            error: None,
            error_kind: None,
            index,
        }
    }

    fn failure(id: String, kind: ErrorKind, error: &str, index: usize) -> Self {
        Self {
            id,
            answer: None,
            verdict: None,
            score: None,
            caption: None,
            tokens: 0,
            ms: 0,
            error: Some(shorten_to(MAX_ERROR, error).into_owned()),
            error_kind: Some(kind),
            index,
        }
    }
}

/// Longest error of a row, in characters. The texts in it are shortened further.
const MAX_ERROR: usize = 1000;

/// Why a table could not be answered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AnswersError {
    /// The table has no column for the query, or one is ambiguous or missing.
    #[error("{0}")]
    Columns(Cause),
    /// The table already has a column with the name of a new one.
    #[error("the table already has a column `{0}`; set a prefix to rename the new columns")]
    NameConflict(String),
    /// More rows failed than allowed.
    #[error("{failed} of {rows} rows failed; the first error: {first}")]
    TooManyFailures {
        /// Rows that failed so far.
        failed: usize,
        /// Rows of the table.
        rows: usize,
        /// The first error.
        first: String,
    },
    /// The journal can't be read or written.
    #[error("the journal can't be used")]
    Journal(#[from] JournalError),
    /// The new columns don't fit the table.
    #[error("the answers don't fit the table")]
    Arrow(#[from] ArrowError),
}

/// The error of a row with an image behind a URL.
const NOT_FETCHED: &str = "images behind URLs are not fetched here (gateway.image_urls)";

/// How a table is answered.
#[derive(Debug, Clone)]
pub struct TableOptions {
    /// Which columns hold which fields.
    pub mapping: Mapping,
    /// The query for rows without one.
    pub query: Option<String>,
    /// Prefix of the names of the new columns.
    pub prefix: String,
    /// Maximum number of rows in flight.
    pub concurrency: usize,
    /// Maximum number of bytes of images in flight.
    pub image_bytes: usize,
    /// Share of rows that may fail before the table is given up.
    pub max_failed: f64,
}

/// Answers tables with one model under one profile.
pub struct TableAnswerer {
    guard: Guard<Arc<dyn Mllm>>,
    /// Fetches images behind URLs, if that is allowed.
    fetcher: Option<Fetcher>,
    limits: Limits,
    identity: String,
    store: Option<Mutex<Store>>,
}

impl TableAnswerer {
    /// Creates an answerer with `model`, which `identity` identifies, under `profile`. Without a
    /// fetcher, rows with images behind URLs fail. `journal` is a folder where answers are stored
    /// for reuse; any number of processes may share it.
    ///
    /// # Errors
    /// The journal can't be opened.
    pub fn new(
        model: Arc<dyn Mllm>,
        identity: &str,
        profile: Profile,
        fetcher: Option<Fetcher>,
        limits: Limits,
        journal: Option<&Path>,
    ) -> Result<Self, JournalError> {
        let identity = format!("{} {identity} {}", env!("CARGO_PKG_VERSION"), profile.to_toml());
        let store =
            journal.map(|folder| Store::open(folder, &identity)).transpose()?.map(Mutex::new);
        Ok(Self { guard: Guard::new(model, profile), fetcher, limits, identity, store })
    }

    /// Answers all rows. Returns the tables with eight new columns ([`schema`]).
    ///
    /// # Errors
    /// [`AnswersError`]; the error of a single row is in its columns.
    pub async fn answer(
        self: &Arc<Self>,
        schema: &SchemaRef,
        tables: Vec<RecordBatch>,
        options: &TableOptions,
    ) -> Result<Vec<RecordBatch>, AnswersError> {
        let new_schema = columns::with_answers(schema, &options.prefix)?;
        let reader = Columns::new(schema, options.mapping.clone(), options.query.clone());
        let reader = reader.map_err(AnswersError::Columns)?;
        let count: usize = tables.iter().map(RecordBatch::num_rows).sum();
        self.store().map_or(Ok(()), |mut store| store.refresh())?;
        let rows = Rows::new(tables.clone(), reader);
        // Of rows with the same key only the first is answered.
        let mut first_of = HashMap::new();
        let mut repeats = Vec::new();
        let sift = |job: Job| {
            if job.key.is_empty() {
                return RowDecision::Make(job);
            }
            if let Some(first) = first_of.get(&job.key) {
                repeats.push((job.index, *first));
                return RowDecision::Skip;
            }
            first_of.insert(job.key.clone(), job.index);
            match self.store().and_then(|mut store| store.find(&job.key)) {
                Some(stored) => RowDecision::Known(Answer { index: job.index, ..stored }),
                None => RowDecision::Make(job),
            }
        };
        let bounds = Bounds { bytes: options.image_bytes, ..Bounds::at_once(options.concurrency) };
        let mut answers: Vec<Option<Answer>> = vec![None; count];
        let mut failed = 0;
        {
            let entries = entries(rows, self, bounds, sift);
            pin_mut!(entries);
            while let Some(answer) = entries.next().await {
                let answer = answer?;
                if !answer.id.is_empty()
                    && let Some(mut store) = self.store()
                {
                    store.add(&answer)?;
                }
                failed += usize::from(answer.failed());
                if let Some(error) = &answer.error {
                    check_failures(failed, count, options, error)?;
                }
                let index = answer.index;
                answers[index] = Some(answer);
            }
        }
        for (index, first) in repeats {
            let answer = answers[first].clone();
            failed += usize::from(answer.as_ref().is_some_and(Answer::failed));
            answers[index] = answer;
        }
        if let Some(first) = answers.iter().flatten().find_map(|answer| answer.error.as_ref()) {
            check_failures(failed, count, options, first)?;
        }
        columns::append(&new_schema, &tables, &answers)
    }

    fn store(&self) -> Option<MutexGuard<'_, Store>> {
        self.store.as_ref().map(|store| store.lock().unwrap_or_else(PoisonError::into_inner))
    }

    async fn read_images(&self, row: &Row) -> Result<Vec<Vec<Image>>, String> {
        let mut images = Vec::with_capacity(row.images.len());
        for (index, source) in row.images.iter().enumerate() {
            let read = match (&self.fetcher, source) {
                (None, ImageSource::Url(_)) => Err(NOT_FETCHED.to_owned()),
                (Some(fetcher), source) => {
                    source.read(fetcher, self.limits).await.map_err(|error| error_chain(&error))
                }
                (None, source) => {
                    source.read_local(self.limits).map_err(|error| error_chain(&error))
                }
            };
            images.push(read.map_err(|error| match row.images.len() {
                1 => error,
                count => format!("image {} of {count}: {error}", index + 1),
            })?);
        }
        Ok(images)
    }

    fn key(&self, row: &Row, images: &[Image]) -> String {
        let mut key = PartsHasher::default();
        key.add(&self.identity);
        key.add(row.earlier.len().to_le_bytes());
        key.add(row.key(images));
        key.add([u8::from(row.draft.is_some())]);
        key.add(row.draft.as_deref().unwrap_or_default());
        key.hex()
    }
}

/// Checks that no more rows failed than allowed; `first` is the error of one.
#[expect(clippy::cast_precision_loss, reason = "counts of rows")]
fn check_failures(
    failed: usize,
    rows: usize,
    options: &TableOptions,
    first: &str,
) -> Result<(), AnswersError> {
    if failed as f64 > options.max_failed * rows as f64 {
        return Err(AnswersError::TooManyFailures { failed, rows, first: first.to_owned() });
    }
    Ok(())
}

/// The rows of several tables, each with its index among all rows.
struct Rows {
    tables: std::vec::IntoIter<RecordBatch>,
    reader: Columns,
    /// The current table, and the index of its next row.
    table: Option<RecordBatch>,
    index_in_table: usize,
    /// The index of the next row among all rows.
    index: usize,
}

impl Rows {
    fn new(tables: Vec<RecordBatch>, reader: Columns) -> Self {
        Self { tables: tables.into_iter(), reader, table: None, index_in_table: 0, index: 0 }
    }
}

impl Iterator for Rows {
    type Item = (usize, Result<Row, RowError>);

    fn next(&mut self) -> Option<Self::Item> {
        while self.table.as_ref().is_none_or(|table| self.index_in_table >= table.num_rows()) {
            (self.table, self.index_in_table) = (Some(self.tables.next()?), 0);
        }
        let row = self.reader.row(self.table.as_ref()?, self.index_in_table, self.index as u64);
        self.index_in_table += 1;
        self.index += 1;
        Some((self.index - 1, row))
    }
}

/// A row whose images are read.
pub struct Job {
    index: usize,
    key: String,
    /// The row with its images, or why it can't be read.
    read: Result<(Row, Vec<Image>), (ErrorKind, String)>,
}

impl Batch for TableAnswerer {
    type Row = (usize, Result<Row, RowError>);
    type Ready = Job;
    type Entry = Answer;
    type Error = AnswersError;

    fn slot(&self, (index, _): &Self::Row) -> Key {
        Key::new(&index.to_string(), "")
    }

    async fn read(&self, (index, row): Self::Row) -> Job {
        let failed = |kind, error| Job { index, key: String::new(), read: Err((kind, error)) };
        let row = match row {
            Ok(row) => row,
            Err(error) => return failed(ErrorKind::Input, error.reason.to_string()),
        };
        match self.read_images(&row).await {
            Ok(images) => {
                let (row, images) = row.with_pages(images);
                Job { index, key: self.key(&row, &images), read: Ok((row, images)) }
            }
            Err(error) => failed(ErrorKind::Image, error),
        }
    }

    fn bytes(&self, job: &Job) -> usize {
        let images = job.read.iter().flat_map(|(_, images)| images);
        images.filter_map(|image| image.encoded().map(|(bytes, _)| bytes.len())).sum()
    }

    async fn make(&self, Job { index, key, read }: Job) -> Result<Answer, AnswersError> {
        let (row, images) = match read {
            Ok(read) => read,
            Err((kind, error)) => return Ok(Answer::failure(key, kind, &error, index)),
        };
        let chat = row.chat(&images);
        let outcome = match &row.draft {
            Some(draft) => self.guard.review(&chat, draft).await,
            None => self.guard.answer(&chat).await,
        };
        Ok(match outcome {
            Ok(outcome) => Answer::new(key, outcome, index),
            Err(error) => {
                Answer::failure(key, ErrorKind::from_guard(&error), &error_chain(&error), index)
            }
        })
    }
}
