//! Records of a guarded answer: [`Event`]s while the pipeline runs, a [`Trace`] of every call, and
//! the [`Outcome`].

use serde::{Deserialize, Serialize};

use crate::{
    mllm::{FinishReason, ModelError},
    verdict::Verdict,
};

/// The steps of the method. Traces and results use these names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Step {
    /// Before step 1, with the method `hardened`: is the request harmful?
    #[serde(alias = "look")]
    RequestCheck,
    /// Step 1: the answer with the image.
    Direct,
    /// Step 2: is that answer harmful?
    Detect,
    /// Step 3: the image as text (one call for each image).
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
    /// The step.
    pub step: Step,
    /// The number of images that the model saw, in all turns.
    pub images: usize,
    /// The text of the last user turn that was sent.
    pub prompt: String,
    /// The reply, with its white space.
    pub reply: String,
    /// The verdict that a question read from the reply.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub verdict: Option<Verdict>,
    /// Probability of harm in 0..=1, for questions to a model that reports probabilities.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub score: Option<f64>,
    /// The name of the question, with the method `hardened`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub question: Option<String>,
    /// [`crate::Template::hash`] of the template that made the prompt.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub template: Option<String>,
    /// Why the reply ended.
    pub finish: FinishReason,
    /// Wall-clock time, in milliseconds.
    pub ms: u64,
    /// Tokens of the prompt, if the model reports them.
    pub prompt_tokens: Option<u32>,
    /// Tokens of the reply, if the model reports them.
    pub completion_tokens: Option<u32>,
}

/// A guarded answer, and how it came about.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Outcome {
    /// The text that may be shown.
    pub answer: String,
    /// The verdict on the direct answer, or on the request for it.
    pub verdict: Verdict,
    /// Probability in 0..=1 that the direct answer, or the request for it, is harmful; `None` if the
    /// model reports no probabilities. With `hardened`, that of the detector with the highest one.
    pub score: Option<f64>,
    /// Whether another answer replaced the direct one.
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

/// What happens while the pipeline runs, in order.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// A call of the model begins.
    Started {
        /// The step.
        step: Step,
        /// The number of images that the model sees.
        images: usize,
    },
    /// A call of the model has ended.
    Finished(Trace),
    /// It is decided whether the draft is released (in the next events) or replaced.
    Decided {
        /// The verdict of step 2.
        verdict: Verdict,
        /// Whether another answer replaces the draft.
        rewritten: bool,
    },
    /// Text of the final answer; always after the verdict. Joined, these texts are
    /// [`Outcome::answer`].
    Answer(String),
    /// The end: exactly once, and last.
    Done(Outcome),
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GuardError {
    /// The chat has no user turn.
    #[error("the conversation has no user turn, so there is no query to answer")]
    NoQuery,
    /// The model failed. A failure is never a verdict.
    #[error("step `{step}` failed: {source}")]
    Model {
        /// The step.
        step: Step,
        /// The model's error.
        source: ModelError,
    },
    /// The reply to a question is neither yes nor no: the model declined to judge, said nothing, or
    /// never ended its reasoning.
    #[error("step `{step}` failed: this model does not answer yes or no")]
    NoVerdict {
        /// The step.
        step: Step,
    },
}
