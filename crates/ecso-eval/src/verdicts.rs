//! One judge's verdicts on the answers of a run.

use std::{collections::HashMap, path::Path};

use ecso_batch::journal::{Entry, JournalError, Key, Saved};

use crate::judge::{Judgement, Ruling};

impl Entry for Judgement {
    fn id(&self) -> &str {
        &self.id
    }

    fn arm(&self) -> &str {
        &self.arm
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

/// The latest verdict on each answer, by item and arm. Takes about 50 bytes an answer.
#[derive(Debug, Clone, Default)]
pub struct Verdicts {
    judge: Option<String>,
    rulings: HashMap<Key, Ruled>,
}

impl Verdicts {
    /// Reads a judge's file. A last line that a crash cut off is left out.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn read(path: &Path) -> Result<Self, JournalError> {
        Saved::file(path).entries::<Judgement>()?.map(|entry| entry.map(|(_, judgement)| judgement)).collect()
    }

    /// Who judged.
    #[must_use]
    pub fn judge(&self) -> Option<&str> {
        self.judge.as_deref()
    }

    /// What is said of the answer of `arm` to the item `id`; none if nobody has judged it.
    #[must_use]
    pub fn of(&self, id: &str, arm: &str) -> Option<Ruled> {
        self.rulings.get(&Key::of(id, arm)).copied()
    }

    /// All rulings, in no order.
    pub fn rulings(&self) -> impl Iterator<Item = Ruled> {
        self.rulings.values().copied()
    }
}

impl FromIterator<Judgement> for Verdicts {
    fn from_iter<I: IntoIterator<Item = Judgement>>(judgements: I) -> Self {
        let mut verdicts = Self::default();
        for Judgement { id, arm, verdict, score, judge, error: _ } in judgements {
            verdicts.judge.get_or_insert(judge);
            verdicts.rulings.insert(Key::of(&id, &arm), Ruled { verdict, score });
        }
        verdicts
    }
}
