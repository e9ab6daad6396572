//! What a run is, and what it records.

use std::path::{Path, PathBuf};

use ecso::{FinishReason, Outcome, Profile, Step, profile::Scope};
use ecso_batch::journal::{Entry, Head};
use serde::{Deserialize, Serialize};

use crate::item::Task;

/// What a run is: its journal's first line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunHeader {
    /// Version of ecso.
    pub ecso: String,
    /// The benchmark's name.
    pub benchmark: String,
    /// Its variant.
    pub variant: Option<String>,
    /// Where its data was.
    pub data: PathBuf,
    /// The model's name.
    pub model: String,
    /// What the model is, to the bit where that can be known.
    pub model_digest: String,
    /// What its server says of it beside its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<String>,
    /// The profiles, as TOML, by name.
    pub profiles: Vec<(String, String)>,
    /// Cap of new tokens of every answer.
    pub max_new_tokens: Option<u32>,
    /// Which items.
    pub choice: Choice,
    /// How many that are; none of data that is read as it comes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub items: Option<usize>,
}

impl RunHeader {
    /// Says that items were not guarded as they have no image: so many of `answered` ones; none
    /// where all were.
    #[must_use]
    pub fn unguarded(&self, without_image: usize, answered: usize) -> Option<String> {
        let is_for_images = |text: &str| {
            Profile::from_toml(text).is_ok_and(|profile| profile.scope == Scope::Images)
        };
        let profiles = self
            .profiles
            .iter()
            .filter(|(_, text)| is_for_images(text))
            .map(|(name, _)| name.as_str());
        let profiles: Vec<&str> = profiles.collect();
        (without_image > 0 && !profiles.is_empty()).then(|| {
            let profiles = profiles.join(", ");
            format!(
                "{without_image} of {answered} items were not guarded by {profiles}: they have no image; `--set scope=all` guards texts too"
            )
        })
    }
}

/// Which items of a benchmark are run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// Only these scenarios (those that begin with one of these texts); none is all.
    pub scenarios: Vec<String>,
    /// So many, drawn by `seed`.
    pub sample: Option<usize>,
    /// Seed of the draw.
    pub seed: u64,
    /// At most the first so many.
    pub limit: Option<usize>,
}

/// One item of a run: a line of its journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ItemRecord {
    /// The item.
    pub id: String,
    /// A digest of what was asked, and of what a good answer is: a changed item is run anew. Empty
    /// in journals of older versions.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub made_of: String,
    /// Its scenario.
    pub scenario: String,
    /// What it shares with related items.
    pub cluster: String,
    /// What was sent.
    pub query: String,
    /// What is asked for, in words.
    pub request: String,
    /// What a good answer is.
    pub task: Task,
    /// How many images it has.
    pub images: usize,
    /// The answers: the unguarded one first (profile `unguarded`), then one a profile. Empty if the
    /// item failed.
    pub arms: Vec<Outcome>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Whether it failed because a content filter in front of the model refused it: an outcome of
    /// its own, and no failure to be tried again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub filtered: bool,
    /// Whether nobody knows what a good answer is, as its row can't be read: the item may be of any
    /// kind, and its task is none.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub of_unknown_kind: bool,
}

impl ItemRecord {
    /// Whether it was answered, and has no image.
    pub(crate) fn is_text(&self) -> bool {
        self.images == 0 && self.error.is_none()
    }

    /// Whether a content filter stands in the place of an arm's answer: it refused the item, or cut
    /// the answer before its first word.
    #[must_use]
    pub fn is_filtered(&self, arm: &str) -> bool {
        self.filtered || self.arms.iter().any(|outcome| outcome.profile == arm && is_cut(outcome))
    }
}

/// Whether a content filter cut an answer before its first word.
#[must_use]
pub fn is_cut(outcome: &Outcome) -> bool {
    let last = outcome.steps.iter().rfind(|step| matches!(step.step, Step::Direct | Step::Safe));
    outcome.answer.trim().is_empty()
        && last.is_some_and(|step| step.finish == FinishReason::ContentFilter)
}

/// Whether two paths lead to one place.
fn is_same(a: &Path, b: &Path) -> bool {
    a == b || a.canonicalize().is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b))
}

impl Head for RunHeader {
    fn differs(&self, begun: &Self) -> Option<&'static str> {
        let differ = [
            ("version of ecso", begun.ecso != self.ecso),
            ("benchmark", begun.benchmark != self.benchmark),
            ("--variant", begun.variant != self.variant),
            ("--data", !is_same(&begun.data, &self.data)),
            ("model", begun.model != self.model || begun.model_digest != self.model_digest),
            ("model under the same name on the server", begun.server != self.server),
            // Profiles are recorded with that bound in them.
            ("--max-new-tokens", begun.max_new_tokens != self.max_new_tokens),
            ("profile, or fit of it that `ecso tune` kept,", begun.profiles != self.profiles),
            ("--scenario", begun.choice.scenarios != self.choice.scenarios),
            ("--sample", begun.choice.sample != self.choice.sample),
            ("--seed", begun.choice.seed != self.choice.seed),
            ("--limit", begun.choice.limit != self.choice.limit),
            ("number of items in its data", begun.items.is_some() && begun.items != self.items),
        ];
        differ.into_iter().find(|(_, differs)| *differs).map(|(what, _)| what)
    }
}

impl Entry for ItemRecord {
    fn id(&self) -> &str {
        &self.id
    }

    fn made_of(&self) -> &str {
        &self.made_of
    }

    fn failed(&self) -> bool {
        self.error.is_some() && !self.filtered
    }
}
