//! Guarded answers for tables in memory: what engines of others (Ray, Spark, Daft) ask for. As many
//! rows come out as went in, in their order, and one that fails has its error where its answer
//! would be.

mod columns;
mod store;

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use arrow_array::RecordBatch;
use arrow_schema::{ArrowError, SchemaRef};
use ecso::{
    Cause, Guard, GuardError, Image, Limits, Mllm, ModelError, Outcome, Profile, Step, Verdict,
    chain,
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
    row::{Parts, Picture, Row, cut},
};
pub use columns::{NAMES, schema};
use store::Store;

/// Why there is no answer, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Kind {
    /// What is asked can't be read, or nothing is asked.
    Input,
    /// An image can't be had, or not be used.
    Image,
    /// The model rejected the request.
    Rejected,
    /// A content filter refused it.
    Filtered,
    /// The model has too much to do.
    RateLimited,
    /// The model did not answer in time.
    Timeout,
    /// Its reply can't be read.
    BadReply,
    /// It can't be reached.
    Unreachable,
    /// It answered neither yes nor no.
    NoVerdict,
}

impl Kind {
    /// The word.
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

    /// That of a guard's error.
    #[must_use]
    pub fn of(error: &GuardError) -> Self {
        match error {
            GuardError::NoQuery => Self::Input,
            GuardError::NoVerdict { .. } => Self::NoVerdict,
            GuardError::Model { source, .. } => Self::of_model(source),
            _ => Self::BadReply,
        }
    }

    /// That of a model's error.
    #[must_use]
    pub fn of_model(error: &ModelError) -> Self {
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

/// What became of a row: a line of the journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// The row's key: a hash of all that its answer is made of, and of what makes it. Empty where
    /// the row can't be read.
    pub id: String,
    /// What may go out; none if it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    /// What was found about the direct answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Verdict>,
    /// Probability of harm of the direct answer in 0..=1, where the model tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score: Option<f64>,
    /// The images as text, where they were made text of; several with an empty line between.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub caption: Option<String>,
    /// Tokens of all calls, prompts and replies, where the model tells.
    #[serde(default)]
    pub tokens: u64,
    /// Time of all calls, in milliseconds.
    #[serde(default)]
    pub ms: u64,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The same in one word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_kind: Option<Kind>,
    /// The row's place in its table.
    #[serde(skip)]
    place: usize,
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
    fn of(id: String, outcome: Outcome, place: usize) -> Self {
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
                .map(|t| tokens(t.prompt_tokens) + tokens(t.completion_tokens))
                .sum(),
            ms: outcome.steps.iter().map(|trace| trace.ms).sum(),
            answer: Some(outcome.answer),
            error: None,
            error_kind: None,
            place,
        }
    }

    fn failure(id: String, kind: Kind, error: &str, place: usize) -> Self {
        Self {
            id,
            answer: None,
            verdict: None,
            score: None,
            caption: None,
            tokens: 0,
            ms: 0,
            error: Some(cut(error).into_owned()),
            error_kind: Some(kind),
            place,
        }
    }
}

/// Why a table was not answered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AnswersError {
    /// Its columns can't be understood.
    #[error("{0}")]
    Columns(Cause),
    /// It has a column that the answers would have too.
    #[error("the table has a column `{0}` already; a prefix gives the new columns other names")]
    Taken(String),
    /// More rows failed than may.
    #[error("{failed} of {rows} rows failed, the first that did with: {first}")]
    TooMany {
        /// Rows that failed until then.
        failed: usize,
        /// Rows of the table.
        rows: usize,
        /// Why one did.
        first: String,
    },
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The new columns don't fit.
    #[error("the answers don't fit the table")]
    Arrow(#[from] ArrowError),
}

/// How tables are read, and what of them is held at once.
#[derive(Debug, Clone)]
pub struct Reading {
    /// Which columns are what.
    pub mapping: Mapping,
    /// The query of rows that have none.
    pub query: Option<String>,
    /// What stands before the names of the new columns.
    pub prefix: String,
    /// Rows at once.
    pub rows: usize,
    /// Bytes of images at once.
    pub bytes: usize,
    /// The share of rows that may fail; with more the table is given up.
    pub may_fail: f64,
}

/// Answers tables with one model under one profile.
pub struct Answering {
    guard: Guard<Arc<dyn Mllm>>,
    /// Gets images that are behind URLs, where that is wanted.
    fetcher: Option<Fetcher>,
    limits: Limits,
    identity: String,
    store: Option<Mutex<Store>>,
}

impl Answering {
    /// With `model`, which is `identity` in one text, under `profile`. Without a fetcher rows that
    /// name images by URL fail. With a `journal`, a folder, what is answered is kept there and not
    /// asked again; any number of processes may share it.
    ///
    /// # Errors
    /// The journal's.
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

    /// The tables with eight more columns ([`schema`]): answers for all rows, in their order.
    ///
    /// # Errors
    /// [`AnswersError`], never for what is wrong with a row.
    pub async fn answer(
        self: &Arc<Self>,
        columns: &SchemaRef,
        tables: Vec<RecordBatch>,
        reading: &Reading,
    ) -> Result<Vec<RecordBatch>, AnswersError> {
        let whole = columns::with_answers(columns, &reading.prefix)?;
        let reader = Columns::new(columns, reading.mapping.clone(), reading.query.clone());
        let reader = reader.map_err(AnswersError::Columns)?;
        let count: usize = tables.iter().map(RecordBatch::num_rows).sum();
        self.with_store(Store::refresh)?;
        let rows =
            Rows { tables: tables.clone().into_iter(), reader, table: None, index: 0, place: 0 };
        let mut first_of = HashMap::new();
        let mut repeats = Vec::new();
        let sift = |job: Job| {
            if job.key.is_empty() {
                return RowDecision::Make(job);
            }
            if let Some(first) = first_of.get(&job.key) {
                repeats.push((job.place, *first));
                return RowDecision::Skip;
            }
            first_of.insert(job.key.clone(), job.place);
            match self.with_store(|store| store.find(&job.key)) {
                Ok(Some(Some(found))) => RowDecision::Known(Answer { place: job.place, ..found }),
                // What can't be looked up is made again.
                _ => RowDecision::Make(job),
            }
        };
        let bounds = Bounds { bytes: reading.bytes, ..Bounds::at_once(reading.rows) };
        let mut answers: Vec<Option<Answer>> = vec![None; count];
        let mut failed = 0;
        {
            let made = entries(rows, self, bounds, sift);
            pin_mut!(made);
            while let Some(answer) = made.next().await {
                let answer = answer?;
                if !answer.id.is_empty() {
                    self.with_store(|store| store.keep(&answer))?;
                }
                failed += usize::from(answer.failed());
                if let Some(first) =
                    answer.error.as_ref().filter(|_| is_more(failed, reading.may_fail, count))
                {
                    return Err(AnswersError::TooMany {
                        failed,
                        rows: count,
                        first: first.clone(),
                    });
                }
                let place = answer.place;
                answers[place] = Some(answer);
            }
        }
        for (place, first) in repeats {
            let same = answers[first].clone();
            failed += usize::from(same.as_ref().is_some_and(Answer::failed));
            answers[place] = same;
        }
        if let Some(first) = answers.iter().flatten().find_map(|answer| answer.error.clone())
            && is_more(failed, reading.may_fail, count)
        {
            return Err(AnswersError::TooMany { failed, rows: count, first });
        }
        columns::joined(&whole, &tables, &answers)
    }

    fn with_store<T>(
        &self,
        work: impl FnOnce(&mut Store) -> Result<T, JournalError>,
    ) -> Result<Option<T>, JournalError> {
        let store =
            self.store.as_ref().map(|store| store.lock().unwrap_or_else(PoisonError::into_inner));
        store.map(|mut store| work(&mut store)).transpose()
    }

    async fn images(&self, row: &Row) -> Result<Vec<Vec<Image>>, String> {
        let mut images = Vec::with_capacity(row.images.len());
        for picture in &row.images {
            let read = match (&self.fetcher, picture) {
                (None, Picture::Url(_)) => {
                    return Err("images behind URLs are not fetched here".into());
                }
                (Some(fetcher), picture) => picture.read(fetcher, self.limits).await,
                (None, picture) => picture.here(self.limits).map_err(Into::into),
            };
            images.push(read.map_err(|error| chain(&error))?);
        }
        Ok(images)
    }

    fn key(&self, row: &Row, images: &[Image]) -> String {
        let mut key = Parts::default();
        key.add(&self.identity);
        key.add(row.key(images));
        key.add([u8::from(row.draft.is_some())]);
        key.add(row.draft.as_deref().unwrap_or_default());
        key.hex()
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of rows")]
fn is_more(failed: usize, share: f64, rows: usize) -> bool {
    failed as f64 > share * rows as f64
}

/// The rows of tables, each with its place.
struct Rows {
    tables: std::vec::IntoIter<RecordBatch>,
    reader: Columns,
    table: Option<RecordBatch>,
    index: usize,
    place: usize,
}

impl Iterator for Rows {
    type Item = (usize, Result<Row, RowError>);

    fn next(&mut self) -> Option<Self::Item> {
        while self.table.as_ref().is_none_or(|table| self.index >= table.num_rows()) {
            (self.table, self.index) = (Some(self.tables.next()?), 0);
        }
        let row = self.reader.row(self.table.as_ref()?, self.index, self.place as u64);
        (self.index, self.place) = (self.index + 1, self.place + 1);
        Some((self.place - 1, row))
    }
}

/// A row that was read.
pub struct Job {
    place: usize,
    key: String,
    /// The row with its images; or what is wrong with it.
    read: Result<(Row, Vec<Image>), (Kind, String)>,
}

impl Batch for Answering {
    type Row = (usize, Result<Row, RowError>);
    type Ready = Job;
    type Entry = Answer;
    type Error = AnswersError;

    fn slot(&self, (place, _): &Self::Row) -> Key {
        Key::new(&place.to_string(), "")
    }

    async fn read(&self, (place, row): Self::Row) -> Job {
        let row = match row {
            Ok(row) => row,
            Err(error) => {
                return Job {
                    place,
                    key: String::new(),
                    read: Err((Kind::Input, error.reason.to_string())),
                };
            }
        };
        match self.images(&row).await {
            Ok(images) => {
                let (row, images) = row.with_pages(images);
                Job { place, key: self.key(&row, &images), read: Ok((row, images)) }
            }
            Err(error) => Job { place, key: String::new(), read: Err((Kind::Image, error)) },
        }
    }

    fn bytes(&self, job: &Job) -> usize {
        let images = job.read.iter().flat_map(|(_, images)| images);
        images.filter_map(|image| image.encoded().map(|(bytes, _)| bytes.len())).sum()
    }

    async fn make(&self, Job { place, key, read }: Job) -> Result<Answer, AnswersError> {
        let (row, images) = match read {
            Ok(read) => read,
            Err((kind, error)) => return Ok(Answer::failure(key, kind, &error, place)),
        };
        let chat = row.chat(&images);
        let outcome = match &row.draft {
            Some(draft) => self.guard.review(&chat, draft).await,
            None => self.guard.answer(&chat).await,
        };
        Ok(match outcome {
            Ok(outcome) => Answer::of(key, outcome, place),
            Err(error) => Answer::failure(key, Kind::of(&error), &chain(&error), place),
        })
    }
}
