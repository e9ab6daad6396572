//! What happened: [`Event`]s while the pipeline runs, a [`Trace`] of every call, and the
//! [`Outcome`].

use serde::{Deserialize, Serialize};

use crate::{
    mllm::{FinishReason, ModelError},
    verdict::Verdict,
};

/// The steps of the method, by the names that traces and results use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Step {
    /// Before step 1, with the method `hardened`: is harm asked for?
    #[serde(alias = "look")]
    RequestCheck,
    /// Step 1: the answer with the image.
    Direct,
    /// Step 2: is that answer harmful?
    Detect,
    /// Step 3: the image as text (one call an image).
    Caption,
    /// Step 4: the answer without the image.
    Safe,
    /// After step 4, with the method `hardened`: is that answer harmful?
    #[serde(alias = "check")]
    ReplyCheck,
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::RequestCheck => "request-check",
            Self::Direct => "direct",
            Self::Detect => "detect",
            Self::Caption => "caption",
            Self::Safe => "safe",
            Self::ReplyCheck => "reply-check",
        })
    }
}

/// One call of the model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Trace {
    /// Which step it was.
    pub step: Step,
    /// How many images the model saw, over all turns.
    pub images: usize,
    /// The text of the guarded turn as it was sent.
    pub prompt: String,
    /// The reply, white space and all.
    pub reply: String,
    /// What a question read from the reply.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub verdict: Option<Verdict>,
    /// Probability of harm in 0..=1 (of questions, where the model tells).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub score: Option<f64>,
    /// The name of the question, of the method `hardened`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub question: Option<String>,
    /// [`crate::Template::hash`] of the template that made the prompt.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub template: Option<String>,
    /// Why the reply ended.
    pub finish: FinishReason,
    /// Wall-clock time, in milliseconds.
    pub ms: u64,
    /// Tokens of the prompt, where the model tells.
    pub prompt_tokens: Option<u32>,
    /// Tokens of the reply, where the model tells.
    pub completion_tokens: Option<u32>,
}

/// The end of a guarded answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Outcome {
    /// What may go out.
    pub answer: String,
    /// What was found about the direct answer, or the request for it.
    pub verdict: Verdict,
    /// Probability that the direct answer is harmful, in 0..=1; `None` where the model doesn't
    /// tell.
    pub score: Option<f64>,
    /// Whether the answer is another than the direct one.
    #[serde(default)]
    pub rewritten: bool,
    /// Whether it is the profile's fixed refusal.
    #[serde(default)]
    pub refused: bool,
    /// The profile's name.
    pub profile: String,
    /// The model's name.
    pub model: String,
    /// Every call, in order.
    pub steps: Vec<Trace>,
}

impl Outcome {
    /// The outcome for an answer that was not judged.
    pub fn unchecked(
        answer: impl Into<String>,
        profile: impl Into<String>,
        model: impl Into<String>,
    ) -> Self {
        Self {
            answer: answer.into(),
            verdict: Verdict::Unchecked,
            score: None,
            rewritten: false,
            refused: false,
            profile: profile.into(),
            model: model.into(),
            steps: Vec::new(),
        }
    }
}

/// What a caller sees of the pipeline while it runs.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// A call begins.
    Started {
        /// Which step.
        step: Step,
        /// How many images the model sees.
        images: usize,
    },
    /// A call is over.
    Finished(Trace),
    /// It is decided whether the draft goes out (the next events bring it) or another answer takes
    /// its place.
    Decided {
        /// What step 2 said.
        verdict: Verdict,
        /// Whether another answer takes its place.
        rewritten: bool,
    },
    /// Text of the final answer; after the verdict, never before. The pieces joined are
    /// [`Outcome::answer`].
    Answer(String),
    /// The end; comes exactly once, last.
    Done(Outcome),
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GuardError {
    /// There is nothing to guard.
    #[error("the conversation has no user turn, so there is no query to answer")]
    NoQuery,
    /// The model failed. A step that fails is never taken for a verdict.
    #[error("step `{step}` failed: {source}")]
    Model {
        /// Which step.
        step: Step,
        /// What went wrong.
        source: ModelError,
    },
    /// A question got neither yes nor no: a refusal to judge, nothing at all, a thought without an
    /// end.
    #[error("step `{step}` failed: this model does not answer yes or no")]
    NoVerdict {
        /// Which step.
        step: Step,
    },
}
