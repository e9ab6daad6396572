//! Judges the answers of a run, or answers from elsewhere.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use ecso_batch::{
    Batch, Bounds, RowDecision,
    journal::{Journal, JournalError, Key},
};
use tokio::sync::OnceCell;

use super::judgement::{Case, Judge, Judgement};
use crate::record::{ItemRecord, is_cut_by_filter};

/// An answer to be judged.
#[derive(Debug, Clone, PartialEq)]
pub struct ArmAnswer {
    /// The arm that answered; empty for answers from elsewhere.
    pub arm: String,
    /// The answer, and the request that it answers.
    pub case: Case,
}

impl ArmAnswer {
    /// The key of the judgement on this answer.
    #[must_use]
    pub fn key(&self) -> Key {
        Key::new(&self.case.id, &self.arm).with_source(&self.case.digest())
    }
}

/// The answers of an item, without those that a content filter removed: these need no judge.
pub fn answers_to_judge(mut record: ItemRecord) -> impl Iterator<Item = ArmAnswer> {
    let arms = std::mem::take(&mut record.arms);
    arms.into_iter().filter(|arm| !is_cut_by_filter(arm)).map(move |arm| ArmAnswer {
        arm: arm.profile,
        case: Case {
            id: record.id.clone(),
            scenario: record.scenario.clone(),
            request: record.request.clone(),
            response: arm.answer,
            task: record.task.clone(),
        },
    })
}

/// Judges those of `answers` that have no ruling in `verdicts` yet, and again those on which the
/// judge failed. Equal answers to equal requests that are judged at the same time are judged once.
/// Each judgement is recorded, then passed to `on_judgement`. Dropping the future loses only the
/// answers in progress.
///
/// # Errors
/// [`JournalError`]. If the judge fails on an answer, that is recorded as a judgement too.
pub async fn judge_answers(
    answers: impl Iterator<Item = ArmAnswer>,
    judge: Box<dyn Judge>,
    verdicts: &mut Journal,
    at_once: usize,
    mut on_judgement: impl FnMut(&Judgement),
) -> Result<(), JournalError> {
    let bounds = Bounds { retry_failed: true, ..Bounds::at_once(at_once) };
    let judging = Arc::new(Judging { judge, in_progress: Mutex::default() });
    ecso_batch::run(answers, &judging, verdicts, bounds, RowDecision::Make, |judgement, _| {
        on_judgement(&judgement);
    })
    .await?;
    Ok(())
}

struct Judging {
    judge: Box<dyn Judge>,
    /// The judgements in progress, by [`Case::digest`].
    in_progress: Mutex<HashMap<String, Weak<OnceCell<Judgement>>>>,
}

impl Judging {
    /// The judgement on a case with this digest, shared by all that wait for it.
    fn shared(&self, digest: String) -> Arc<OnceCell<Judgement>> {
        let mut in_progress = self.in_progress.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shared) = in_progress.get(&digest).and_then(Weak::upgrade) {
            return shared;
        }
        in_progress.retain(|_, other| other.strong_count() > 0);
        let shared = Arc::new(OnceCell::new());
        in_progress.insert(digest, Arc::downgrade(&shared));
        shared
    }
}

impl Batch for Judging {
    type Row = ArmAnswer;
    type Ready = ArmAnswer;
    type Entry = Judgement;
    type Error = JournalError;

    fn slot(&self, answer: &ArmAnswer) -> Key {
        answer.key()
    }

    async fn read(&self, answer: ArmAnswer) -> ArmAnswer {
        answer
    }

    async fn make(&self, ArmAnswer { arm, case }: ArmAnswer) -> Result<Judgement, JournalError> {
        let shared = self.shared(case.digest());
        let judgement = shared.get_or_init(|| self.judge.judge(&case, &arm)).await.clone();
        Ok(Judgement { id: case.id, arm, ..judgement })
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        time::Duration,
    };

    use async_trait::async_trait;
    use ecso::Cause;

    use super::*;
    use crate::{item::Task, judge::Ruling, verdicts::VerdictsHeader};

    /// Counts the answers that it is asked about.
    struct SlowJudge(Arc<AtomicUsize>);

    #[async_trait]
    impl Judge for SlowJudge {
        fn name(&self) -> String {
            "slow".into()
        }

        async fn rule(&self, _: &Case) -> Result<(Ruling, Option<f64>), Cause> {
            self.0.fetch_add(1, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(50)).await;
            Ok((Ruling::Safe, None))
        }
    }

    #[tokio::test]
    async fn equal_answers_in_progress_are_judged_once() {
        let folder = tempfile::tempdir().unwrap();
        let header = VerdictsHeader {
            ecso: "0".into(),
            judge: "slow".into(),
            model: None,
            threshold: None,
            judge_file: None,
        };
        let mut verdicts =
            Journal::open_file(&folder.path().join("verdicts-slow.jsonl"), &header).unwrap();
        let answer = |arm: &str, response: &str| ArmAnswer {
            arm: arm.into(),
            case: Case {
                id: "1".into(),
                scenario: "s".into(),
                request: "How is bread baked?".into(),
                response: response.into(),
                task: Task::Harmless,
            },
        };
        let answers =
            [answer("unguarded", "Knead."), answer("paper", "Knead."), answer("hardened", "Wait.")];
        let calls = Arc::new(AtomicUsize::new(0));
        let mut judged = Vec::new();
        let judge = Box::new(SlowJudge(Arc::clone(&calls)));
        let expected: Vec<Key> = answers.iter().map(ArmAnswer::key).collect();
        judge_answers(answers.into_iter(), judge, &mut verdicts, 4, |judgement| {
            judged.push(ecso_batch::journal::Entry::key(judgement));
        })
        .await
        .unwrap();
        assert_eq!(calls.load(Ordering::SeqCst), 2);
        assert!(judged.len() == 3 && expected.iter().all(|key| judged.contains(key)), "{judged:?}");
    }
}
