//! The verdicts of one judge on the answers of a run.

use std::{
    collections::{BTreeSet, HashMap},
    path::Path,
};

use ecso_batch::journal::{Entry, JournalError, JournalHeader, JournalReader, Key};
use serde::{Deserialize, Serialize};

use crate::{
    judge::{Judgement, Ruling, digest},
    record::ItemRecord,
    text::cut,
};

/// The judge and its settings: the first line of a file of verdicts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VerdictsHeader {
    /// Version of ecso.
    pub ecso: String,
    /// The judge's name.
    pub judge: String,
    /// The digest of the model that judges, as exact as it can be determined.
    pub model: Option<String>,
    /// The probability from which an answer of yes counts as yes.
    pub threshold: Option<f64>,
    /// The digest of the published judge file.
    pub judge_file: Option<String>,
}

impl JournalHeader for VerdictsHeader {
    fn difference(&self, started: &Self) -> Option<&'static str> {
        let settings = [
            ("version of ecso", started.ecso != self.ecso),
            ("judge", started.judge != self.judge),
            ("model as the judge", started.model != self.model),
            ("--threshold", started.threshold != self.threshold),
            ("--judge-file", started.judge_file != self.judge_file),
        ];
        settings.into_iter().find(|(_, differs)| *differs).map(|(name, _)| name)
    }
}

impl Entry for Judgement {
    fn id(&self) -> &str {
        &self.id
    }

    fn arm(&self) -> &str {
        &self.arm
    }

    fn source_digest(&self) -> &str {
        &self.source_digest
    }

    fn failed(&self) -> bool {
        self.verdict == Ruling::Error
    }
}

/// A judge's ruling on an answer, with its score.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScoredRuling {
    /// The ruling.
    pub verdict: Ruling,
    /// [`Judgement::score`].
    pub score: Option<f64>,
}

/// The latest verdict on each answer, by item and arm. Takes about 70 bytes of memory per answer.
#[derive(Debug, Clone, Default)]
pub struct Verdicts {
    /// The header of the file; files that others wrote have none.
    header: Option<VerdictsHeader>,
    /// The judges that the lines name.
    judges: BTreeSet<String>,
    rulings: HashMap<u64, (Key, ScoredRuling)>,
    /// How many rulings replaced an earlier one on the same answer.
    replaced: usize,
    was_truncated: bool,
}

impl Verdicts {
    /// Reads a file of verdicts. A last line that was cut off by a crash is skipped.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn read(path: &Path) -> Result<Self, JournalError> {
        let saved = JournalReader::at(path);
        let mut entries = saved.entries::<Judgement>()?;
        let verdicts: Self = entries
            .by_ref()
            .map(|entry| entry.map(|(_, judgement)| judgement))
            .collect::<Result<_, _>>()?;
        Ok(Self { header: saved.header().ok(), was_truncated: entries.was_truncated(), ..verdicts })
    }

    /// The name of the judge.
    #[must_use]
    pub fn judge(&self) -> Option<&str> {
        let first_named = || self.judges.first().map(String::as_str);
        self.header.as_ref().map(|header| header.judge.as_str()).or_else(first_named)
    }

    /// Whether there is at least one ruling that is not an error.
    #[must_use]
    pub fn has_rulings(&self) -> bool {
        self.rulings.values().any(|(_, ruling)| ruling.verdict != Ruling::Error)
    }

    /// How many answers of an item have a ruling.
    pub(crate) fn count_matching(&self, record: &ItemRecord) -> usize {
        record
            .arms
            .iter()
            .filter(|outcome| self.for_answer(record, &outcome.profile).is_some())
            .count()
    }

    /// What the user should know about the verdicts. `matching` is the number of verdicts that are
    /// on an answer of the run, if these were counted.
    #[must_use]
    pub fn warnings(&self, matching: Option<usize>) -> Vec<String> {
        let total = self.rulings.len();
        let unmatched = matching.map_or(0, |matching| total.saturating_sub(matching));
        let mut warnings = Vec::new();
        if unmatched > 0 {
            warnings.push(format!(
                "{unmatched} of {total} verdicts match no answer of this run: it has no such id or \
                 arm, or the answer has changed since"
            ));
        }
        if self.replaced > 0 {
            warnings.push(format!(
                "{} verdicts replace an earlier one on the same answer; the last one counts",
                self.replaced
            ));
        }
        if self.judges.len() > 1 {
            let judges: Vec<&str> = self.judges.iter().map(String::as_str).collect();
            warnings
                .push(format!("the verdicts are of several judges: {}", cut(judges.join(", "))));
        }
        if self.was_truncated {
            warnings
                .push("the last line of the verdicts was cut off by a crash and is ignored".into());
        }
        warnings
    }

    /// The first setting of the judge that differs from `other`.
    pub(crate) fn difference(&self, other: &Self) -> Option<&'static str> {
        match (&self.header, &other.header) {
            (Some(header), Some(other)) => header.difference(other),
            _ => (self.judge() != other.judge()).then_some("judge"),
        }
    }

    /// The ruling on the answer of `arm`; `None` if this answer has not been judged, or the arm has
    /// none.
    #[must_use]
    pub fn for_answer(&self, record: &ItemRecord, arm: &str) -> Option<ScoredRuling> {
        let answer = record.arms.iter().find(|outcome| outcome.profile == arm)?;
        let digest = digest(&record.scenario, &record.request, &record.task, &answer.answer);
        self.for_key(Key::new(&record.id, arm).with_source(&digest))
    }

    /// The ruling for the key of a judgement.
    #[must_use]
    pub fn for_key(&self, key: Key) -> Option<ScoredRuling> {
        let entry = self.rulings.get(&key.slot()).filter(|(judged, _)| judged.matches(key));
        entry.map(|(_, ruling)| *ruling)
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
            // If the earlier judge failed, or its ruling was on another answer, this is a normal
            // retry.
            let earlier =
                verdicts.rulings.insert(key.slot(), (key, ScoredRuling { verdict, score }));
            let is_replaced = earlier
                .is_some_and(|(judged, ruling)| judged == key && ruling.verdict != Ruling::Error);
            verdicts.replaced += usize::from(is_replaced);
        }
        verdicts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{item::Task, run::UNGUARDED, testing};

    #[test]
    fn verdicts_that_match_nothing_are_repeated_or_of_several_judges_give_a_warning() {
        let record = testing::record("1", Task::Harmless);
        let line = |id: &str, arm: &str, verdict: &str, judge: &str| {
            format!(
                r#"{{"id": "{id}", "arm": "{arm}", "verdict": "{verdict}", "judge": "{judge}"}}"#
            )
        };
        let warnings = |lines: &[String]| {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), lines.join("\n")).unwrap();
            let verdicts = Verdicts::read(file.path()).unwrap();
            verdicts.warnings(Some(verdicts.count_matching(&record))).join("; ")
        };
        let plain = line("1", UNGUARDED, "safe", "");
        assert_eq!(warnings(std::slice::from_ref(&plain)), "");
        assert_eq!(warnings(&[line("1", UNGUARDED, "error", ""), plain.clone()]), "");
        for (other, expected) in [
            (line("1", "paper", "safe", ""), "1 of 2 verdicts match no answer"),
            (line("2", UNGUARDED, "safe", ""), "1 of 2 verdicts match no answer"),
            (line("1", UNGUARDED, "unsafe", ""), "1 verdicts replace an earlier one"),
            (plain[..plain.len() - 9].to_owned(), "cut off by a crash"),
        ] {
            let warnings = warnings(&[plain.clone(), other]);
            assert!(warnings.contains(expected), "{expected}: {warnings}");
        }
        let two_judges = [line("1", UNGUARDED, "safe", "ann"), line("3", UNGUARDED, "safe", "bob")];
        assert!(warnings(&two_judges).contains("several judges: ann, bob"));
    }
}
