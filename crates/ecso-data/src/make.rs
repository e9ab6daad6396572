//! The core: from one row to what becomes of it. A plain function that knows nothing of files,
//! order or other rows, so that any engine can call it.

use std::{collections::HashSet, sync::Arc};

use ecso::{
    Chat, FinishReason, Guard, GuardError, Image, Mllm, Outcome, Profile, Step, Verdict,
    final_answer, is_refusal, profile::Rewrite,
};
use serde::{Deserialize, Serialize};
use unicode_segmentation::UnicodeSegmentation;

use crate::row::Row;

/// What becomes of a row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum Made {
    /// Step 2 calls the draft unsafe and step 4's answer passes: a sample for alignment, and a
    /// preference pair.
    Kept(Sample),
    /// Step 2 calls the draft safe: it can serve as a utility sample.
    Safe(Sample),
    /// It is left out.
    Dropped {
        /// Why.
        reason: Reason,
        /// The row that it repeats, if that is why.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        of: Option<u64>,
    },
}

/// Why a row is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// The same images and words stood in an earlier row.
    Duplicate,
    /// Nearly the same did.
    NearDuplicate,
    /// Nobody judged it: it is out of the profile's scope.
    OutOfScope,
    /// The answer to learn is not whole: it came to the limit of tokens, or a content filter cut
    /// it.
    Cut,
    /// The answer has no words.
    Empty,
    /// The answer goes round in circles, or is the draft or the query once more.
    Repetition,
    /// The second check calls step 4's answer harmful.
    StillHarmful,
    /// The answer is a bare refusal, and those are not wanted.
    Refusal,
}

impl Reason {
    /// The word that files and screens use.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Duplicate => "duplicate",
            Self::NearDuplicate => "near-duplicate",
            Self::OutOfScope => "out-of-scope",
            Self::Cut => "cut",
            Self::Empty => "empty",
            Self::Repetition => "repetition",
            Self::StillHarmful => "still-harmful",
            Self::Refusal => "refusal",
        }
    }
}

/// A row with its answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The direct answer (step 1), thoughts and all.
    pub draft: String,
    /// The answer to learn, thoughts and all: step 4's; of a safe row the draft.
    pub answer: String,
    /// Probability of harm of the draft, in 0..=1, where the model tells.
    pub score: Option<f64>,
    /// Probability of harm of the answer, as the second check gives it.
    pub second: Option<f64>,
    /// Whether the answer is a bare refusal.
    pub refusal: bool,
    /// Step 3's captions.
    pub captions: Vec<String>,
    /// Hashes of the templates that were sent, by step.
    pub templates: Vec<String>,
}

/// What a row took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cost {
    /// Calls of the model.
    pub calls: u32,
    /// Their tokens, prompts and replies, where the model tells.
    pub tokens: u64,
    /// Their time, in milliseconds.
    pub ms: u64,
}

impl Cost {
    fn add(&mut self, outcome: &Outcome) {
        for step in &outcome.steps {
            self.calls += 1;
            self.ms += step.ms;
            self.tokens += u64::from(step.prompt_tokens.unwrap_or(0))
                + u64::from(step.completion_tokens.unwrap_or(0));
        }
    }
}

/// What is asked of an answer beyond being harmless.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filters {
    /// Leave out bare refusals.
    pub no_refusals: bool,
}

/// Makes samples with one model under one profile.
pub struct Maker {
    guard: Guard<Arc<dyn Mllm>>,
    /// Gives the direct answer.
    direct: Guard<Arc<dyn Mllm>>,
    /// Judges step 4's answer, and asks for no other.
    second: Guard<Arc<dyn Mllm>>,
    filters: Filters,
}

impl Maker {
    /// A maker; `profile` is how the guard runs.
    #[must_use]
    pub fn new(model: &Arc<dyn Mllm>, profile: Profile, filters: Filters) -> Self {
        let mut direct = profile.clone();
        direct.gate = ecso::profile::Gate::Never;
        let mut second = profile.clone();
        second.rewrite = Rewrite::Refuse;
        let guard = |profile| Guard::new(Arc::clone(model), profile);
        Self { guard: guard(profile), direct: guard(direct), second: guard(second), filters }
    }

    /// Takes a row, with its images read, through the guard. The direct answer is always made, as
    /// it is one half of a preference pair.
    ///
    /// # Errors
    /// [`GuardError`]: the model failed. That says nothing about the row.
    pub async fn make(&self, row: &Row, images: &[Image]) -> Result<(Made, Cost), GuardError> {
        let chat = row.chat(images);
        let mut cost = Cost::default();
        let (draft, draft_is_cut) = if let Some(draft) = &row.draft {
            (draft.clone(), false)
        } else {
            let direct = self.direct.answer(&chat).await?;
            cost.add(&direct);
            (direct.answer.clone(), is_cut(&direct))
        };
        let outcome = self.guard.review(&chat, &draft).await?;
        cost.add(&outcome);
        let dropped = |reason| Made::Dropped { reason, of: None };
        let said = final_answer(&outcome.answer).unwrap_or_default();
        let drafted = final_answer(&draft).unwrap_or_default();
        let refusal = is_refusal(said);
        let made = match outcome.verdict {
            Verdict::Unchecked => dropped(Reason::OutOfScope),
            Verdict::Safe if draft_is_cut => dropped(Reason::Cut),
            Verdict::Unsafe if is_cut(&outcome) => dropped(Reason::Cut),
            _ if said.trim().is_empty() || drafted.trim().is_empty() => dropped(Reason::Empty),
            _ if goes_in_circles(said) => dropped(Reason::Repetition),
            Verdict::Safe => Made::Safe(sample(draft, outcome, None, refusal)),
            Verdict::Unsafe if repeats(said, &[drafted, &row.query]) => dropped(Reason::Repetition),
            Verdict::Unsafe if refusal && self.filters.no_refusals => dropped(Reason::Refusal),
            Verdict::Unsafe => match self.second_check(&chat, &outcome, &mut cost).await? {
                (Verdict::Unsafe, _) => dropped(Reason::StillHarmful),
                (Verdict::Unchecked, _) => dropped(Reason::OutOfScope),
                (Verdict::Safe, second) => Made::Kept(sample(draft, outcome, second, refusal)),
            },
        };
        Ok((made, cost))
    }

    /// Whether step 4's answer is harmful: by the profile's own check if it has one (an answer that
    /// failed it did not go out), else by step 2 once more.
    async fn second_check(
        &self,
        chat: &Chat,
        outcome: &Outcome,
        cost: &mut Cost,
    ) -> Result<(Verdict, Option<f64>), GuardError> {
        // An answer that was judged and went out all the same is harmless, by the profile's own
        // rule.
        if let Some(judged) = outcome.steps.iter().rfind(|step| step.step == Step::ReplyCheck) {
            return Ok((Verdict::Safe, judged.score));
        }
        let again = self.second.review(chat, &outcome.answer).await?;
        cost.add(&again);
        Ok((again.verdict, again.score))
    }
}

/// Whether the answer that the model wrote last is not whole. The fixed refusal always is.
fn is_cut(outcome: &Outcome) -> bool {
    let last = outcome.steps.iter().rfind(|step| matches!(step.step, Step::Direct | Step::Safe));
    !outcome.refused && last.is_some_and(|step| step.finish != FinishReason::Stop)
}

fn sample(draft: String, outcome: Outcome, second: Option<f64>, refusal: bool) -> Sample {
    let of = |step: Step| outcome.steps.iter().filter(move |trace| trace.step == step);
    let templates = outcome
        .steps
        .iter()
        .filter_map(|trace| Some(format!("{}:{}", trace.step, trace.template.as_ref()?)));
    let mut seen = HashSet::new();
    Sample {
        draft,
        score: outcome.score,
        second,
        refusal,
        captions: of(Step::Caption).map(|trace| trace.reply.clone()).collect(),
        templates: templates.filter(|template| seen.insert(template.clone())).collect(),
        answer: outcome.answer,
    }
}

/// Words, as Unicode divides them, in small letters; a character of a script without spaces is one.
fn words(text: &str) -> Vec<String> {
    text.unicode_words().map(str::to_lowercase).collect()
}

/// Longer answers whose runs of four words are mostly the same few say nothing new.
fn goes_in_circles(answer: &str) -> bool {
    const LONG: usize = 40;
    const FRESH: usize = 50; // per cent
    let words = words(answer);
    let runs: HashSet<&[String]> = words.windows(4).collect();
    words.len() >= LONG && runs.len() * 100 < (words.len() - 3) * FRESH
}

/// Whether an answer is one of these texts once more.
fn repeats(answer: &str, others: &[&str]) -> bool {
    let answer = words(answer);
    others.iter().any(|other| words(other) == answer)
}

#[cfg(test)]
mod tests {
    use ecso::{Reply, testing::Scripted};

    use super::*;

    fn row(draft: Option<&str>) -> Row {
        Row {
            number: 0,
            id: String::new(),
            before: Vec::new(),
            query: "Bread?".into(),
            images: Vec::new(),
            category: String::new(),
            draft: draft.map(str::to_owned),
        }
    }

    #[tokio::test]
    async fn an_answer_is_what_stands_behind_its_thoughts() {
        let says = |text: &'static str| -> Arc<dyn Mllm> {
            Arc::new(Scripted::new(move |_| Ok(Reply { text: text.into(), ..Reply::default() })))
        };
        let profile = Profile::paper().with("scope", "all").unwrap();
        let made = async |draft: &str, verdict| {
            let maker = Maker::new(&says(verdict), profile.clone(), Filters::default());
            maker.make(&row(Some(draft)), &[]).await.unwrap().0
        };
        let refused = made("<think>Is it safe?</think>I'm sorry, I can't.", "No").await;
        assert!(matches!(refused, Made::Safe(Sample { refusal: true, .. })), "{refused:?}");
        for (draft, verdict) in
            [("<think>Is it", "No"), ("<think>No.</think> ", "No"), (" ", "Yes")]
        {
            let dropped = made(draft, verdict).await;
            assert!(
                matches!(dropped, Made::Dropped { reason: Reason::Empty, .. }),
                "{draft:?}: {dropped:?}"
            );
        }
    }

    #[tokio::test]
    async fn an_answer_that_is_not_whole_is_none_to_learn() {
        let row = row(None);
        let profile = Profile::paper().with("scope", "all").unwrap();
        let (stop, length, filter) =
            (FinishReason::Stop, FinishReason::Length, FinishReason::ContentFilter);
        for (draft, draft_ends, answer_ends, expected) in [
            ("Mix the flour", stop, length, None),
            ("Mix the flour", length, stop, Some(Reason::Cut)),
            ("Mix the flour", filter, stop, Some(Reason::Cut)),
            ("", filter, stop, Some(Reason::Cut)),
            ("Rude words", stop, stop, None),
            ("Rude words", length, stop, None),
            ("Rude words", stop, length, Some(Reason::Cut)),
            ("Rude words", stop, filter, Some(Reason::Cut)),
        ] {
            let model = Scripted::new(move |chat| {
                let said = chat.turns.last().map(ecso::Turn::query).unwrap_or_default();
                let (text, finish) = match () {
                    () if said.contains("Is the RESPONSE harmful") && said.contains("Rude") => {
                        ("Yes", stop)
                    }
                    () if said.contains("Is the RESPONSE harmful") => ("No", stop),
                    () if said == "Bread?" => (draft, draft_ends),
                    () => ("A kind word", answer_ends),
                };
                Ok(Reply { text: text.into(), finish, ..Reply::default() })
            });
            let model: Arc<dyn Mllm> = Arc::new(model);
            let made = Maker::new(&model, profile.clone(), Filters::default())
                .make(&row, &[])
                .await
                .unwrap()
                .0;
            let reason = if let Made::Dropped { reason, .. } = made { Some(reason) } else { None };
            assert_eq!(reason, expected, "{draft} {draft_ends:?} {answer_ends:?}");
        }
    }

    #[test]
    fn circles_are_seen_and_lists_are_not() {
        assert!(goes_in_circles(&"Mix the dough well. ".repeat(20)));
        assert!(goes_in_circles(&"把面团揉好。".repeat(12)));
        assert!(!goes_in_circles("Mix the dough well. Mix the dough well."));
        let list: Vec<String> =
            (1..30).map(|n| format!("{n}. Step number {n} of the bread recipe.")).collect();
        assert!(!goes_in_circles(&list.join(" ")));
        assert!(repeats(" Yes, it IS. ", &["yes it is"]) && !repeats("yes", &["no", ""]));
    }
}
