//! What the guard found about the choices of an answer.

use std::collections::BTreeMap;

use axum::http::{HeaderMap, HeaderValue};
use ecso::{Outcome, Verdict};
use serde::Serialize;
use serde_json::{Value, json};

use crate::{settings::TraceLevel, windowed::CHOICE};

/// The failure of an answer that broke off.
pub(crate) const UNFINISHED: &str = "unfinished";

/// What the guard found about the choices of an answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Report {
    findings: BTreeMap<u64, Finding>,
    /// Why the guard failed, or did not finish.
    pub(crate) failure: Option<&'static str>,
    /// What went out before the last verdict, if the answer was judged while it was written.
    pub(crate) early: Option<Early>,
}

/// What went out of an answer before the verdict on the whole, because it was judged while it was
/// written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Early {
    pub(crate) words: usize,
    pub(crate) characters: usize,
    /// Whether the model was stopped before its end.
    pub(crate) stopped: bool,
}

/// What is known about one choice.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Finding {
    /// The verdict is known; its consequences are not yet.
    Decided(Verdict),
    /// Everything is known.
    Done(Outcome),
    /// The guard failed.
    Failed,
}

impl Finding {
    /// The verdict on the draft.
    pub(crate) fn verdict(&self) -> Verdict {
        match self {
            Self::Decided(verdict) => *verdict,
            Self::Done(outcome) => outcome.verdict,
            Self::Failed => Verdict::Unchecked,
        }
    }

    /// Everything that was found, if the steps finished.
    pub(crate) fn outcome(&self) -> Option<&Outcome> {
        if let Self::Done(outcome) = self { Some(outcome) } else { None }
    }
}

impl Report {
    /// A report that the guard failed on all of these choices.
    pub(crate) fn failed(choices: impl IntoIterator<Item = u64>, why: &'static str) -> Self {
        let findings = choices.into_iter().map(|choice| (choice, Finding::Failed)).collect();
        Self { findings, failure: Some(why), early: None }
    }

    /// Adds a finding about a choice.
    pub(crate) fn add(&mut self, choice: u64, finding: Finding) {
        self.findings.insert(choice, finding);
    }

    /// The findings, by choice.
    pub(crate) fn findings(&self) -> impl Iterator<Item = (u64, &Finding)> {
        self.findings.iter().map(|(choice, finding)| (*choice, finding))
    }

    /// What went out early of a choice.
    pub(crate) fn early_of(&self, choice: u64) -> Option<Early> {
        self.early.filter(|_| choice == CHOICE)
    }

    /// Whether a verdict holds an answer back.
    pub(crate) fn is_unsafe(&self) -> bool {
        self.findings.values().any(|finding| finding.verdict() == Verdict::Unsafe)
    }

    /// The overall verdict: unsafe if one choice is, unchecked if one could not be judged.
    pub(crate) fn verdict(&self) -> Verdict {
        let mut verdicts = self.findings.values().map(Finding::verdict);
        if self.is_unsafe() {
            Verdict::Unsafe
        } else if !self.findings.is_empty() && verdicts.all(|verdict| verdict == Verdict::Safe) {
            Verdict::Safe
        } else {
            Verdict::Unchecked
        }
    }

    /// The highest score.
    pub(crate) fn score(&self) -> Option<f64> {
        self.outcomes().filter_map(|outcome| outcome.score).reduce(f64::max)
    }

    fn outcomes(&self) -> impl Iterator<Item = &Outcome> {
        self.findings.values().filter_map(Finding::outcome)
    }

    /// The object `ecso` of an answer.
    pub(crate) fn object(&self, id: &str, trace: TraceLevel) -> Value {
        let mut object = json!({"request_id": id, "verdict": self.verdict(), "score": self.score(), "usage": self.usage()});
        if let Some(failure) = self.failure {
            object["failure"] = failure.into();
        }
        if let Some(early) = self.early {
            object["early"] = json!(early);
        }
        let choices: Vec<Value> =
            self.findings().map(|(index, finding)| choice(index, finding, trace)).collect();
        if trace != TraceLevel::None || choices.len() > 1 {
            object["choices"] = choices.into();
        }
        object
    }

    /// The tokens of the guard's own calls, as far as the models report them.
    pub(crate) fn usage(&self) -> Value {
        let steps = || self.outcomes().flat_map(|outcome| &outcome.steps);
        let prompt: u64 = steps().filter_map(|step| step.prompt_tokens).map(u64::from).sum();
        let completion: u64 =
            steps().filter_map(|step| step.completion_tokens).map(u64::from).sum();
        json!({"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion})
    }

    /// Adds the verdict to headers.
    pub(crate) fn headers(&self, headers: &mut HeaderMap) {
        headers.insert("x-ecso-verdict", HeaderValue::from_static(self.verdict().as_str()));
        if let Some(score) =
            self.score().and_then(|score| HeaderValue::try_from(format!("{score:.4}")).ok())
        {
            headers.insert("x-ecso-score", score);
        }
        if let Some(failure) = self.failure {
            headers.insert("x-ecso-failure", HeaderValue::from_static(failure));
        }
    }
}

fn choice(index: u64, finding: &Finding, trace: TraceLevel) -> Value {
    let Some(outcome) = finding.outcome() else {
        return json!({"index": index, "verdict": finding.verdict()});
    };
    let mut object = json!({"index": index, "verdict": outcome.verdict, "score": outcome.score, "rewritten": outcome.rewritten});
    if trace != TraceLevel::None {
        object["profile"] = outcome.profile.as_str().into();
        let steps = outcome.steps.iter().map(|step| {
            let mut step = serde_json::to_value(step).unwrap_or_default();
            if let Some(fields) = step.as_object_mut().filter(|_| trace == TraceLevel::Figures) {
                fields.retain(|name, _| !matches!(name.as_str(), "prompt" | "reply"));
            }
            step
        });
        object["steps"] = steps.collect();
    }
    object
}
