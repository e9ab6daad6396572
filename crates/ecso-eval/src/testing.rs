//! Judged runs for tests.

use std::path::Path;

use ecso::Outcome;
use ecso_batch::journal::Journal;

use crate::{
    item::Task,
    judge::{Judgement, Ruling},
    judged_run::JudgedRun,
    record::{ItemRecord, RunHeader, Selection},
    run::UNGUARDED,
    verdicts::VerdictsHeader,
};

pub(crate) fn run_header(model: &str, profile: &str) -> RunHeader {
    RunHeader {
        ecso: "0".into(),
        benchmark: "jsonl".into(),
        variant: None,
        data: "-".into(),
        model: model.into(),
        model_digest: "d".into(),
        server: None,
        profiles: vec![("paper".into(), profile.into())],
        max_new_tokens: None,
        choice: Selection::default(),
        items: None,
    }
}

/// An answer of the arm with this name.
pub(crate) fn outcome(arm: &str) -> Outcome {
    Outcome::unchecked("a", arm, "m")
}

/// A record with an unguarded answer.
pub(crate) fn record(id: &str, task: Task) -> ItemRecord {
    ItemRecord {
        id: id.into(),
        source_digest: String::new(),
        scenario: "s".into(),
        cluster: id.into(),
        query: "q".into(),
        request: "q".into(),
        task,
        images: 0,
        image_sources: Vec::new(),
        arms: vec![outcome(UNGUARDED)],
        error: None,
        filtered: false,
        of_unknown_kind: false,
    }
}

pub(crate) fn judgement(id: &str, arm: &str, verdict: Ruling) -> Judgement {
    Judgement {
        id: id.into(),
        arm: arm.into(),
        source_digest: String::new(),
        verdict,
        score: None,
        judge: "j".into(),
        error: None,
    }
}

/// An item with the rulings on its unguarded and its guarded answer.
pub(crate) fn item(
    id: usize,
    request: &str,
    task: Task,
    rulings: [Ruling; 2],
) -> (ItemRecord, [Ruling; 2]) {
    let record = ItemRecord {
        query: request.into(),
        request: request.into(),
        arms: [UNGUARDED, "paper"].map(outcome).into(),
        ..record(&id.to_string(), task)
    };
    (record, rulings)
}

/// Writes a run and its verdicts to `folder`, and opens it.
pub(crate) fn judged_run(
    folder: &Path,
    header: &RunHeader,
    threshold: f64,
    items: &[(ItemRecord, [Ruling; 2])],
) -> JudgedRun {
    let by = VerdictsHeader {
        ecso: "0".into(),
        judge: "j".into(),
        model: None,
        threshold: Some(threshold),
        judge_file: None,
    };
    let mut journal = Journal::open(folder, header).unwrap();
    let mut verdicts = Journal::open_file(&folder.join("verdicts-j.jsonl"), &by).unwrap();
    for (record, rulings) in items {
        journal.record(record).unwrap();
        for (outcome, verdict) in record.arms.iter().zip(*rulings) {
            verdicts.record(&judgement(&record.id, &outcome.profile, verdict)).unwrap();
        }
    }
    JudgedRun::open(folder, None).unwrap()
}
