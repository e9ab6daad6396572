//! One judge's verdicts on the answers of a run.

use std::{collections::HashMap, path::Path};

use ecso_batch::journal::{Entry, Head, JournalError, Key, Saved};
use serde::{Deserialize, Serialize};

use crate::{
    judge::{Judgement, Ruling, digest},
    record::ItemRecord,
};

/// Who judges, and how: the first line of a file of verdicts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VerdictsHeader {
    /// Version of ecso.
    pub ecso: String,
    /// The judge's name.
    pub judge: String,
    /// The model that judges, to the bit where that can be known.
    pub model: Option<String>,
    /// From which probability on a yes is a yes.
    pub threshold: Option<f64>,
    /// Digest of the published judge file.
    pub judge_file: Option<String>,
}

impl Head for VerdictsHeader {
    fn differs(&self, begun: &Self) -> Option<&'static str> {
        let differ = [
            ("version of ecso", begun.ecso != self.ecso),
            ("judge", begun.judge != self.judge),
            ("model as the judge", begun.model != self.model),
            ("--threshold", begun.threshold != self.threshold),
            ("--judge-file", begun.judge_file != self.judge_file),
        ];
        differ.into_iter().find(|(_, differs)| *differs).map(|(what, _)| what)
    }
}

impl Entry for Judgement {
    fn id(&self) -> &str {
        &self.id
    }

    fn arm(&self) -> &str {
        &self.arm
    }

    fn made_of(&self) -> &str {
        &self.made_of
    }

    fn failed(&self) -> bool {
        self.verdict == Ruling::Error
    }
}

/// What a judge says of an answer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ruled {
    /// The ruling.
    pub verdict: Ruling,
    /// [`Judgement::score`].
    pub score: Option<f64>,
}

/// The latest verdict on each answer, by item and arm. Takes about 70 bytes an answer.
#[derive(Debug, Clone, Default)]
pub struct Verdicts {
    /// What the file says of its judge; files of others don't.
    header: Option<VerdictsHeader>,
    judge: Option<String>,
    rulings: HashMap<u64, (Key, Ruled)>,
}

impl Verdicts {
    /// Reads a judge's file. A last line that a crash cut off is left out.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn read(path: &Path) -> Result<Self, JournalError> {
        let saved = Saved::file(path);
        let entries = saved.entries::<Judgement>()?.map(|entry| entry.map(|(_, judgement)| judgement));
        Ok(Self { header: saved.header().ok(), ..entries.collect::<Result<_, _>>()? })
    }

    /// Who judged.
    #[must_use]
    pub fn judge(&self) -> Option<&str> {
        self.header.as_ref().map(|header| header.judge.as_str()).or(self.judge.as_deref())
    }

    /// What of the judge is not as it is in `other`.
    pub(crate) fn differs(&self, other: &Self) -> Option<&'static str> {
        match (&self.header, &other.header) {
            (Some(header), Some(others)) => header.differs(others),
            _ => (self.judge() != other.judge()).then_some("judge"),
        }
    }

    /// What is said of the answer of `arm`; none if nobody has judged this answer, or the arm has none.
    #[must_use]
    pub fn of(&self, record: &ItemRecord, arm: &str) -> Option<Ruled> {
        let answer = record.arms.iter().find(|outcome| outcome.profile == arm)?;
        let of = digest(&record.scenario, &record.request, &record.task, &answer.answer);
        self.under(Key::of(&record.id, arm).made_of(&of))
    }

    /// What is said under a judgement's key.
    #[must_use]
    pub fn under(&self, key: Key) -> Option<Ruled> {
        self.rulings.get(&key.place()).filter(|(judged, _)| judged.is(key)).map(|(_, ruled)| *ruled)
    }
}

impl FromIterator<Judgement> for Verdicts {
    fn from_iter<I: IntoIterator<Item = Judgement>>(judgements: I) -> Self {
        let mut verdicts = Self::default();
        for judgement in judgements {
            let (key, Judgement { verdict, score, judge, .. }) = (judgement.key(), judgement);
            verdicts.judge.get_or_insert(judge);
            verdicts.rulings.insert(key.place(), (key, Ruled { verdict, score }));
        }
        verdicts
    }
}
