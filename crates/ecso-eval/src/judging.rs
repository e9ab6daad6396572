//! Judging the answers of a run, or answers from elsewhere.

use std::sync::Arc;

use ecso_batch::{
    Batch, Bounds, Sifted,
    journal::{Journal, JournalError, Key},
};

use crate::{
    judge::{Case, Judge, Judgement},
    record::{ItemRecord, is_cut},
};

/// An answer that is to be judged.
#[derive(Debug, Clone, PartialEq)]
pub struct Answered {
    /// The arm that answered; empty for answers from elsewhere.
    pub arm: String,
    /// The answer, and what it answers.
    pub case: Case,
}

impl Answered {
    /// The key of its judgement.
    #[must_use]
    pub fn key(&self) -> Key {
        Key::of(&self.case.id, &self.arm).made_of(&self.case.digest())
    }
}

/// The answers of an item. What a content filter took needs no judge.
pub fn answers(mut record: ItemRecord) -> impl Iterator<Item = Answered> {
    let arms = std::mem::take(&mut record.arms);
    arms.into_iter().filter(|arm| !is_cut(arm)).map(move |arm| Answered {
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

/// Has those of `answers` judged of which `verdicts` has no ruling yet; answers on which the judge
/// failed are judged again. Each judgement is recorded, and told to `told`. Dropping the future
/// loses the answers under way, no other.
///
/// # Errors
/// [`JournalError`]. A judge that fails is a judgement too.
pub async fn judge(
    answers: impl Iterator<Item = Answered>,
    judge: Box<dyn Judge>,
    verdicts: &mut Journal,
    at_once: usize,
    mut told: impl FnMut(&Judgement),
) -> Result<(), JournalError> {
    let bounds = Bounds { retry_failed: true, ..Bounds::at_once(at_once) };
    let judging = Arc::new(Judging(judge));
    ecso_batch::run(answers, &judging, verdicts, bounds, Sifted::Make, |judgement, _| {
        told(&judgement)
    })
    .await?;
    Ok(())
}

struct Judging(Box<dyn Judge>);

impl Batch for Judging {
    type Row = Answered;
    type Ready = Answered;
    type Entry = Judgement;
    type Error = JournalError;

    fn place(&self, answer: &Answered) -> Key {
        answer.key()
    }

    async fn read(&self, answer: Answered) -> Answered {
        answer
    }

    async fn make(&self, answer: Answered) -> Result<Judgement, JournalError> {
        Ok(self.0.judge(&answer.case, &answer.arm).await)
    }
}
