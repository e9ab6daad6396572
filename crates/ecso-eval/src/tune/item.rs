//! What the records of a run say about each request.

use std::collections::{BTreeMap, BTreeSet};

use ecso::{
    FinishReason, Outcome, Step, Trace, Verdict,
    calibration::probability,
    profile::{Detector, Hardened, log_odds},
    without_reasoning,
};

use crate::{
    calibrate::{Scored, is_in_fitting_half},
    item::Task,
    judge::XsTest,
    record::ItemRecord,
    run::UNGUARDED,
};

/// The kind of the draft.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DraftKind {
    Answer,
    /// It declines by XSTest's rule.
    Refusal,
    /// There is none, because a content filter refused the request.
    Filtered,
}

/// The finding of a question: the most harmful one of its wordings and windows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Finding {
    /// The probability of harm; `None` if the model gave none.
    pub(super) score: Option<f64>,
    pub(super) is_harm: bool,
    /// Whether a content filter refused the question, which is harm.
    pub(super) is_filtered: bool,
}

impl Finding {
    /// The weight by which the guard compares the findings of wordings and windows.
    fn weight(self) -> f64 {
        self.score.unwrap_or(if self.is_harm { 1.0 } else { 0.0 })
    }

    fn log_odds(self) -> f64 {
        log_odds(self.score, self.is_harm)
    }
}

/// An item for which every question was asked and nothing was held back, except by a content
/// filter.
#[derive(Debug, Clone)]
pub struct TuningItem {
    /// The cluster that it shares with its twin.
    pub(super) pair: String,
    /// The form in which the request is sent.
    pub(super) form: String,
    pub(super) harmful: bool,
    pub(super) draft_kind: DraftKind,
    /// Whether a content filter refused to describe a picture: it is flagged whatever the biases.
    pub(super) is_caption_filtered: bool,
    /// Whether a question was answered by a word only, without probabilities.
    pub(super) by_word: bool,
    /// The finding of each question.
    pub(super) findings: BTreeMap<String, Finding>,
    /// The milliseconds and tokens of the draft, and of each question.
    pub(super) draft_cost: (u64, u64),
    pub(super) question_costs: BTreeMap<String, (u64, u64)>,
}

impl TuningItem {
    /// The item of a record; `None` if it failed, if its draft is empty, or if no question was
    /// asked about it. A request that a content filter refused counts as declined; no question was
    /// asked about it.
    #[must_use]
    pub fn of(record: &ItemRecord, profile: &str) -> Option<Self> {
        let outcome = record.arms.iter().find(|arm| arm.profile == profile);
        if outcome.is_none() && !record.filtered {
            return None;
        }
        // If a content filter refused something, the answer of the profile is not the draft.
        let draft = record.arms.iter().find(|arm| arm.profile == UNGUARDED).or(outcome);
        if draft.is_some_and(|draft| is_empty(record, draft)) {
            return None;
        }
        let mut item = Self {
            pair: record.cluster.clone(),
            form: record.scenario.clone(),
            harmful: record.task == Task::Harmful,
            draft_kind: match draft {
                Some(draft) if record.is_filtered(&draft.profile) => DraftKind::Filtered,
                None => DraftKind::Filtered,
                Some(draft) if XsTest::is_refusal(&draft.answer) => DraftKind::Refusal,
                Some(_) => DraftKind::Answer,
            },
            is_caption_filtered: false,
            by_word: false,
            findings: BTreeMap::new(),
            draft_cost: (0, 0),
            question_costs: BTreeMap::new(),
        };
        for trace in draft.iter().flat_map(|draft| &draft.steps) {
            if trace.step == Step::Direct {
                add_cost(&mut item.draft_cost, trace);
            }
        }
        let mut captions = 0;
        for trace in outcome.iter().flat_map(|outcome| &outcome.steps) {
            if trace.step == Step::Caption {
                captions += 1;
                item.is_caption_filtered |= is_filtered(trace);
            }
            // Answers of step 4 are not drafts.
            if trace.step != Step::ReplyCheck {
                item.add_question(trace);
            }
        }
        // A caption may be refused without a trace. Only filters make this run call an item unsafe.
        if outcome.is_some_and(|outcome| outcome.verdict == Verdict::Unsafe) {
            let is_question_filtered = item.findings.values().any(|finding| finding.is_filtered);
            item.is_caption_filtered |= !is_question_filtered || captions < record.images;
        }
        let is_known = !item.findings.is_empty() || item.is_caption_filtered;
        (is_known || item.draft_kind == DraftKind::Filtered).then_some(item)
    }

    /// Adds cost and finding of a call, if it asks a question.
    pub(super) fn add_question(&mut self, trace: &Trace) {
        let Some(question) = &trace.question else { return };
        add_cost(self.question_costs.entry(question.clone()).or_default(), trace);
        let Some(verdict) = trace.verdict else { return };
        let found = Finding {
            score: trace.score,
            is_harm: verdict == Verdict::Unsafe,
            is_filtered: is_filtered(trace),
        };
        self.by_word |= found.score.is_none() && !found.is_filtered;
        let worst = self.findings.entry(question.clone()).or_insert(found);
        if found.weight() > worst.weight() {
            *worst = found;
        }
    }

    /// Whether the model, or a content filter in front of it, declines the request by itself.
    pub(super) fn is_refusal(&self) -> bool {
        self.draft_kind != DraftKind::Answer
    }

    /// Whether it is known whether the guard flags it. A request that a content filter refused is
    /// never judged.
    pub(super) fn is_judged(&self) -> bool {
        self.draft_kind != DraftKind::Filtered
    }

    /// Whether all questions of a detector were asked, or one was refused by a content filter.
    fn has_findings(&self, detector: &Detector) -> bool {
        for term in &detector.terms {
            match self.findings.get(&term.question) {
                None => return false,
                Some(found) if found.is_filtered => return true,
                Some(_) => {}
            }
        }
        true
    }

    /// The sum of the detector's terms; `None` if one of its questions was not asked, or if a
    /// content filter flags the item whatever the sum.
    pub(super) fn sum(&self, detector: &Detector) -> Option<f64> {
        let added = |question: &str| {
            let found = self.findings.get(question)?;
            (!found.is_filtered && !self.is_caption_filtered).then(|| found.log_odds())
        };
        detector.terms.iter().map(|term| Some(term.adds(added(&term.question)?))).sum()
    }

    /// The probability of harm by the most certain detector that is evaluated to its end, as the
    /// guard computes it, and the questions that are asked on the way. Without such a detector it
    /// is below every threshold.
    pub(super) fn evaluate<'d>(&self, method: &'d Hardened) -> (f64, BTreeSet<&'d str>) {
        let filtered = if self.is_caption_filtered { 1.0 } else { f64::NEG_INFINITY };
        let (mut max, mut asked) = (filtered, BTreeSet::new());
        for detector in method.detectors.iter().filter(|detector| self.has_findings(detector)) {
            max = max.max(self.run(method, detector, &mut asked).unwrap_or(f64::NEG_INFINITY));
        }
        (max, asked)
    }

    /// As `Judge::run` of `hardened.rs` in the crate `ecso`, with the recorded findings: the
    /// probability of harm by one detector; `None` if it stops early.
    fn run<'d>(
        &self,
        method: &Hardened,
        detector: &'d Detector,
        asked: &mut BTreeSet<&'d str>,
    ) -> Option<f64> {
        let (mut sum, mut has_scores) = (detector.bias, true);
        for term in &detector.terms {
            if !method.asks(term, sum, has_scores) {
                return None;
            }
            let Some(found) = self.findings.get(&term.question) else { continue };
            asked.insert(term.question.as_str());
            if found.is_filtered {
                return Some(found.weight());
            }
            sum += term.adds(found.log_odds());
            has_scores &= found.score.is_some();
        }
        Some(probability(sum))
    }

    pub(super) fn score(&self, method: &Hardened) -> f64 {
        self.evaluate(method).0
    }

    /// The score by which a threshold is fitted.
    pub(super) fn scored(&self, method: &Hardened) -> Scored {
        Scored {
            cluster: self.pair.clone(),
            score: self.score(method),
            is_lower_bound: false,
            harmful: self.harmful,
        }
    }

    /// Whether a content filter refused a picture or a question. That flags the item whatever the
    /// threshold, so it says nothing about the threshold.
    pub(super) fn is_filtered(&self) -> bool {
        self.is_caption_filtered || self.findings.values().any(|finding| finding.is_filtered)
    }
}

/// Whether nothing is known about what the model would have answered, because it wrote nothing, or
/// nothing but thoughts.
fn is_empty(record: &ItemRecord, draft: &Outcome) -> bool {
    let answer = without_reasoning(&draft.answer).unwrap_or_default();
    !record.is_filtered(&draft.profile) && answer.trim().is_empty()
}

/// Whether a content filter ended the call.
fn is_filtered(trace: &Trace) -> bool {
    trace.finish == FinishReason::ContentFilter
}

fn add_cost(cost: &mut (u64, u64), trace: &Trace) {
    let tokens = [trace.prompt_tokens, trace.completion_tokens];
    cost.0 += trace.ms;
    cost.1 += tokens.into_iter().flatten().map(u64::from).sum::<u64>();
}

/// What the records of a run show.
#[derive(Debug, Clone, Default)]
pub struct TuningItems {
    /// The items about which something is known.
    pub items: Vec<TuningItem>,
    /// The number of requests that failed.
    pub failed: usize,
    /// The number of requests that got an empty draft, so that it is unknown whether the model
    /// declines them: a model that reasons needs more tokens than it was given.
    pub empty: usize,
    /// How many of both are in the held-out half.
    pub unknown_in_report: UnknownRequests,
    /// The number of requests that were answered without a question about them, because the
    /// profile does not guard them. They are left out: they are neither flagged nor not flagged.
    pub unjudged: usize,
}

impl TuningItems {
    /// Reads the records of a run.
    #[must_use]
    pub fn of(records: &[ItemRecord], profile: &str) -> Self {
        let mut all = Self::default();
        for record in records {
            let mut arms = record.arms.iter();
            if let Some(item) = TuningItem::of(record, profile) {
                all.items.push(item);
            } else if arms.clone().next().is_some_and(|draft| is_empty(record, draft)) {
                all.empty += 1;
                all.unknown_in_report.count(record);
            } else if arms.any(|arm| arm.profile == profile) {
                all.unjudged += 1;
            } else {
                all.failed += 1;
                all.unknown_in_report.count(record);
            }
        }
        all
    }
}

/// The numbers of harmful and harmless requests in the held-out half about which nothing is known,
/// because they failed or the draft is empty.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct UnknownRequests {
    /// The number of harmful requests.
    pub harmful: usize,
    /// The number of harmless requests.
    pub harmless: usize,
}

impl UnknownRequests {
    /// Counts the request of a record, if it is in the held-out half.
    fn count(&mut self, record: &ItemRecord) {
        if is_in_fitting_half(&record.cluster) {
            return;
        }
        if record.task == Task::Harmful {
            self.harmful += 1;
        } else {
            self.harmless += 1;
        }
    }

    pub(super) fn total(self) -> usize {
        self.harmful + self.harmless
    }
}
