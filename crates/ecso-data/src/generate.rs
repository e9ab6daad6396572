//! The core: what one row becomes. It knows nothing about files, order or other rows, so that any
//! engine can call it.

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
pub enum RowOutcome {
    /// Step 2 calls the draft unsafe and step 4's answer passes the second check: a safety sample
    /// and a preference pair.
    Kept(Sample),
    /// Step 2 calls the draft safe: a possible utility sample.
    Safe(Sample),
    /// The row is left out.
    Dropped {
        /// The reason.
        reason: Reason,
        /// The number of the earlier row that it repeats, for duplicates.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        of: Option<u64>,
    },
}

/// Why a row is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// An earlier row has the same images and texts.
    Duplicate,
    /// An earlier row has nearly the same images and texts.
    NearDuplicate,
    /// Not judged, because it is out of the profile's scope.
    OutOfScope,
    /// The answer to learn is incomplete: it hit the token limit, or a content filter cut it.
    Cut,
    /// The answer is empty.
    Empty,
    /// The answer repeats itself, the draft or the query.
    Repetition,
    /// The second check calls step 4's answer harmful.
    StillHarmful,
    /// The answer is a bare refusal, and [`Filters`] excludes those.
    Refusal,
}

impl Reason {
    /// The name in files and output.
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
    /// The direct answer (step 1), with the model's thoughts.
    pub draft: String,
    /// The answer to learn, with the model's thoughts: step 4's, or the draft of a safe row.
    pub answer: String,
    /// Probability in 0..=1 that the draft is harmful, if the model returns probabilities.
    pub score: Option<f64>,
    /// The same for the answer, from the second check.
    pub second: Option<f64>,
    /// Whether the answer is a bare refusal.
    pub refusal: bool,
    /// Step 3's captions.
    pub captions: Vec<String>,
    /// Hashes of the templates that were sent, by step.
    pub templates: Vec<String>,
}

/// What a row cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cost {
    /// Number of calls to the model.
    pub calls: u32,
    /// Prompt and reply tokens of all calls, if the model reports usage.
    pub tokens: u64,
    /// Time of all calls, in milliseconds.
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

/// Requirements on answers besides being harmless.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filters {
    /// Whether bare refusals are left out.
    pub no_refusals: bool,
}

/// Generates samples with one model under one profile.
pub struct Generator {
    guard: Guard<Arc<dyn Mllm>>,
    /// Returns the direct answer.
    direct: Guard<Arc<dyn Mllm>>,
    /// Judges step 4's answer without rewriting it.
    second: Guard<Arc<dyn Mllm>>,
    filters: Filters,
}

impl Generator {
    /// Creates a generator that guards under `profile`.
    #[must_use]
    pub fn new(model: &Arc<dyn Mllm>, profile: Profile, filters: Filters) -> Self {
        let mut direct = profile.clone();
        direct.gate = ecso::profile::Gate::Never;
        let mut second = profile.clone();
        second.rewrite = Rewrite::Refuse;
        let guard = |profile| Guard::new(Arc::clone(model), profile);
        Self { guard: guard(profile), direct: guard(direct), second: guard(second), filters }
    }

    /// Runs the guard on a row whose images are read. The direct answer is always generated, as it
    /// is one half of a preference pair.
    ///
    /// # Errors
    /// [`GuardError`] if the model failed. That says nothing about the row.
    pub async fn generate(
        &self,
        row: &Row,
        images: &[Image],
    ) -> Result<(RowOutcome, Cost), GuardError> {
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
        let dropped = |reason| RowOutcome::Dropped { reason, of: None };
        let answer_text = final_answer(&outcome.answer).unwrap_or_default();
        let draft_text = final_answer(&draft).unwrap_or_default();
        let refusal = is_refusal(answer_text);
        let row_outcome = match outcome.verdict {
            Verdict::Unchecked => dropped(Reason::OutOfScope),
            Verdict::Safe if draft_is_cut => dropped(Reason::Cut),
            Verdict::Unsafe if is_cut(&outcome) => dropped(Reason::Cut),
            _ if answer_text.trim().is_empty() || draft_text.trim().is_empty() => {
                dropped(Reason::Empty)
            }
            _ if is_repetitive(answer_text) => dropped(Reason::Repetition),
            Verdict::Safe => RowOutcome::Safe(sample(draft, outcome, None, refusal)),
            Verdict::Unsafe if repeats(answer_text, &[draft_text, &row.query]) => {
                dropped(Reason::Repetition)
            }
            Verdict::Unsafe if refusal && self.filters.no_refusals => dropped(Reason::Refusal),
            Verdict::Unsafe => match self.second_check(&chat, &outcome, &mut cost).await? {
                (Verdict::Unsafe, _) => dropped(Reason::StillHarmful),
                (Verdict::Unchecked, _) => dropped(Reason::OutOfScope),
                (Verdict::Safe, second) => {
                    RowOutcome::Kept(sample(draft, outcome, second, refusal))
                }
            },
        };
        Ok((row_outcome, cost))
    }

    /// Judges step 4's answer: by the profile's own reply check if it has one, else by step 2
    /// again.
    async fn second_check(
        &self,
        chat: &Chat,
        outcome: &Outcome,
        cost: &mut Cost,
    ) -> Result<(Verdict, Option<f64>), GuardError> {
        // An answer that fails the profile's own reply check is not returned, so this one passed.
        if let Some(judged) = outcome.steps.iter().rfind(|step| step.step == Step::ReplyCheck) {
            return Ok((Verdict::Safe, judged.score));
        }
        let second = self.second.review(chat, &outcome.answer).await?;
        cost.add(&second);
        Ok((second.verdict, second.score))
    }
}

/// Whether the last answer of the model is incomplete. The fixed refusal is always complete.
fn is_cut(outcome: &Outcome) -> bool {
    let last = outcome.steps.iter().rfind(|step| matches!(step.step, Step::Direct | Step::Safe));
    !outcome.refused && last.is_some_and(|step| step.finish != FinishReason::Stop)
}

fn sample(draft: String, outcome: Outcome, second: Option<f64>, refusal: bool) -> Sample {
    let traces = |step: Step| outcome.steps.iter().filter(move |trace| trace.step == step);
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
        captions: traces(Step::Caption).map(|trace| trace.reply.clone()).collect(),
        templates: templates.filter(|template| seen.insert(template.clone())).collect(),
        answer: outcome.answer,
    }
}

/// The Unicode words of a text in lower case. In scripts without spaces, each character is a word.
fn words(text: &str) -> Vec<String> {
    text.unicode_words().map(str::to_lowercase).collect()
}

/// Whether fewer than half of the four-word sequences of a longer answer are distinct.
fn is_repetitive(answer: &str) -> bool {
    const MIN_WORDS: usize = 40;
    const MIN_DISTINCT: usize = 50; // per cent
    let words = words(answer);
    let distinct: HashSet<&[String]> = words.windows(4).collect();
    words.len() >= MIN_WORDS && distinct.len() * 100 < (words.len() - 3) * MIN_DISTINCT
}

/// Whether an answer repeats one of these texts.
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
            earlier: Vec::new(),
            query: "Bread?".into(),
            images: Vec::new(),
            category: String::new(),
            draft: draft.map(str::to_owned),
        }
    }

    #[tokio::test]
    async fn thoughts_are_not_part_of_the_answer() {
        let says = |text: &'static str| -> Arc<dyn Mllm> {
            Arc::new(Scripted::new(move |_| Ok(Reply { text: text.into(), ..Reply::default() })))
        };
        let profile = Profile::paper().with("scope", "all").unwrap();
        let outcome = async |draft: &str, verdict| {
            let generator = Generator::new(&says(verdict), profile.clone(), Filters::default());
            generator.generate(&row(Some(draft)), &[]).await.unwrap().0
        };
        let refused = outcome("<think>Is it safe?</think>I'm sorry, I can't.", "No").await;
        assert!(matches!(refused, RowOutcome::Safe(Sample { refusal: true, .. })), "{refused:?}");
        for (draft, verdict) in
            [("<think>Is it", "No"), ("<think>No.</think> ", "No"), (" ", "Yes")]
        {
            let dropped = outcome(draft, verdict).await;
            assert!(
                matches!(dropped, RowOutcome::Dropped { reason: Reason::Empty, .. }),
                "{draft:?}: {dropped:?}"
            );
        }
    }

    #[tokio::test]
    async fn incomplete_answers_are_dropped() {
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
                let query = chat.turns.last().map(ecso::Turn::joined_text).unwrap_or_default();
                let (text, finish) = match () {
                    () if query.contains("Is the RESPONSE harmful") && query.contains("Rude") => {
                        ("Yes", stop)
                    }
                    () if query.contains("Is the RESPONSE harmful") => ("No", stop),
                    () if query == "Bread?" => (draft, draft_ends),
                    () => ("A kind word", answer_ends),
                };
                Ok(Reply { text: text.into(), finish, ..Reply::default() })
            });
            let model: Arc<dyn Mllm> = Arc::new(model);
            let outcome = Generator::new(&model, profile.clone(), Filters::default())
                .generate(&row, &[])
                .await
                .unwrap()
                .0;
            let reason =
                if let RowOutcome::Dropped { reason, .. } = outcome { Some(reason) } else { None };
            assert_eq!(reason, expected, "{draft} {draft_ends:?} {answer_ends:?}");
        }
    }

    #[test]
    fn repetitive_answers_are_found_and_lists_are_not() {
        assert!(is_repetitive(&"Mix the dough well. ".repeat(20)));
        assert!(is_repetitive(&"把面团揉好。".repeat(12)));
        assert!(!is_repetitive("Mix the dough well. Mix the dough well."));
        let list: Vec<String> =
            (1..30).map(|n| format!("{n}. Step number {n} of the bread recipe.")).collect();
        assert!(!is_repetitive(&list.join(" ")));
        assert!(repeats(" Yes, it IS. ", &["yes it is"]) && !repeats("yes", &["no", ""]));
    }
}
