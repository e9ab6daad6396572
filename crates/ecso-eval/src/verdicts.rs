//! One judge's verdicts on the answers of a run.

use std::{
    collections::{BTreeSet, HashMap},
    path::Path,
};

use ecso_batch::journal::{Entry, Head, JournalError, Key, Saved};
use serde::{Deserialize, Serialize};

use crate::{
    judge::{Judgement, Ruling, digest},
    record::ItemRecord,
    text::cut,
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
    /// Who says to have judged, line by line.
    judges: BTreeSet<String>,
    rulings: HashMap<u64, (Key, Ruled)>,
    /// How often a ruling stands in the place of an earlier one on the same answer.
    again: usize,
    was_cut: bool,
}

impl Verdicts {
    /// Reads a judge's file. A last line that a crash cut off is left out.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn read(path: &Path) -> Result<Self, JournalError> {
        let saved = Saved::file(path);
        let mut entries = saved.entries::<Judgement>()?;
        let verdicts: Self = entries
            .by_ref()
            .map(|entry| entry.map(|(_, judgement)| judgement))
            .collect::<Result<_, _>>()?;
        Ok(Self { header: saved.header().ok(), was_cut: entries.was_cut(), ..verdicts })
    }

    /// Who judged.
    #[must_use]
    pub fn judge(&self) -> Option<&str> {
        let first = || self.judges.first().map(String::as_str);
        self.header.as_ref().map(|header| header.judge.as_str()).or_else(first)
    }

    /// Whether there is a ruling that is no error.
    #[must_use]
    pub fn rules(&self) -> bool {
        self.rulings.values().any(|(_, ruled)| ruled.verdict != Ruling::Error)
    }

    /// On how many answers of an item somebody has ruled.
    pub(crate) fn met(&self, record: &ItemRecord) -> usize {
        record.arms.iter().filter(|outcome| self.of(record, &outcome.profile).is_some()).count()
    }

    /// What is odd about the verdicts, of which so many have `met` an answer of the run, where
    /// somebody counts that.
    #[must_use]
    pub fn odd(&self, met: Option<usize>) -> Vec<String> {
        let unmet = met.map_or(0, |met| self.rulings.len().saturating_sub(met));
        let mut odd = Vec::new();
        if unmet > 0 {
            odd.push(format!(
                "{unmet} of {} verdicts are on no answer of this run: it has no such id or arm, or the answer has changed since",
                self.rulings.len()
            ));
        }
        if self.again > 0 {
            odd.push(format!(
                "{} verdicts are on answers that had one before; the last one counts",
                self.again
            ));
        }
        if self.judges.len() > 1 {
            let judges: Vec<&str> = self.judges.iter().map(String::as_str).collect();
            odd.push(format!("the verdicts are of several judges: {}", cut(judges.join(", "))));
        }
        if self.was_cut {
            odd.push(
                "the last line of the verdicts was cut off by a crash, and is left out".into(),
            );
        }
        odd
    }

    /// What of the judge is not as it is in `other`.
    pub(crate) fn differs(&self, other: &Self) -> Option<&'static str> {
        match (&self.header, &other.header) {
            (Some(header), Some(others)) => header.differs(others),
            _ => (self.judge() != other.judge()).then_some("judge"),
        }
    }

    /// What is said of the answer of `arm`; none if nobody has judged this answer, or the arm has
    /// none.
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
            if !judge.is_empty() {
                verdicts.judges.insert(judge);
            }
            // What failed, or was said of another answer, is judged again.
            let earlier = verdicts.rulings.insert(key.place(), (key, Ruled { verdict, score }));
            verdicts.again +=
                usize::from(earlier.is_some_and(|(judged, ruled)| {
                    judged == key && ruled.verdict != Ruling::Error
                }));
        }
        verdicts
    }
}

#[cfg(test)]
mod tests {
    use ecso::Outcome;

    use super::*;
    use crate::{item::Task, run::UNGUARDED};

    #[test]
    fn verdicts_that_miss_answers_repeat_or_come_from_several_are_told() {
        let answered = Outcome::unchecked("a", UNGUARDED, "m");
        let record = ItemRecord {
            id: "1".into(),
            made_of: String::new(),
            scenario: "s".into(),
            cluster: "1".into(),
            query: "q".into(),
            request: "q".into(),
            task: Task::Harmless,
            images: 0,
            arms: vec![answered],
            error: None,
            filtered: false,
            of_unknown_kind: false,
        };
        let said = |id: &str, arm: &str, verdict: &str, judge: &str| {
            format!(
                r#"{{"id": "{id}", "arm": "{arm}", "verdict": "{verdict}", "judge": "{judge}"}}"#
            )
        };
        let odd = |lines: &[String]| {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), lines.join("\n")).unwrap();
            let verdicts = Verdicts::read(file.path()).unwrap();
            verdicts.odd(Some(verdicts.met(&record))).join("; ")
        };
        let plain = said("1", UNGUARDED, "safe", "");
        assert_eq!(odd(std::slice::from_ref(&plain)), "");
        assert_eq!(odd(&[said("1", UNGUARDED, "error", ""), plain.clone()]), "");
        for (other, told) in [
            (said("1", "paper", "safe", ""), "1 of 2 verdicts are on no answer"),
            (said("2", UNGUARDED, "safe", ""), "1 of 2 verdicts are on no answer"),
            (said("1", UNGUARDED, "unsafe", ""), "1 verdicts are on answers that had one before"),
            (plain[..plain.len() - 9].to_owned(), "cut off by a crash"),
        ] {
            let odd = odd(&[plain.clone(), other]);
            assert!(odd.contains(told), "{told}: {odd}");
        }
        let two = odd(&[said("1", UNGUARDED, "safe", "ann"), said("3", UNGUARDED, "safe", "bob")]);
        assert!(two.contains("several judges: ann, bob"), "{two}");
    }
}
