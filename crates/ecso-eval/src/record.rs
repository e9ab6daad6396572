//! The header and the records of a run.

use std::path::{Path, PathBuf};

use ecso::{FinishReason, Outcome, Profile, Step, profile::Scope};
use ecso_batch::journal::{Entry, JournalHeader};
use serde::{Deserialize, Serialize};

use crate::item::Task;

/// The settings of a run: the first line of its journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunHeader {
    /// The version of ecso.
    pub ecso: String,
    /// The benchmark's name.
    pub benchmark: String,
    /// The benchmark's variant.
    pub variant: Option<String>,
    /// The path of the benchmark's data.
    pub data: PathBuf,
    /// The model's name.
    pub model: String,
    /// The digest of the model, as exact as it can be determined.
    pub model_digest: String,
    /// What the server reports about the model besides its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<String>,
    /// The profiles: name and TOML.
    pub profiles: Vec<(String, String)>,
    /// The limit on new tokens of every answer.
    pub max_new_tokens: Option<u32>,
    /// Which items are run.
    pub choice: Selection,
    /// How many items that is; `None` if the data is streamed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub items: Option<usize>,
}

impl RunHeader {
    /// A notice that `without_image` of `answered` items were not guarded, because they have no
    /// image; `None` if all were.
    #[must_use]
    pub fn unguarded_notice(&self, without_image: usize, answered: usize) -> Option<String> {
        let guards_only_images = |text: &str| {
            Profile::from_toml(text).is_ok_and(|profile| profile.scope == Scope::Images)
        };
        let profiles = self.profiles.iter().filter(|(_, text)| guards_only_images(text));
        let profiles: Vec<&str> = profiles.map(|(name, _)| name.as_str()).collect();
        (without_image > 0 && !profiles.is_empty()).then(|| {
            let profiles = profiles.join(", ");
            format!(
                "{without_image} of {answered} items were not guarded by {profiles} because they \
                 have no image; `--set scope=all` guards texts too"
            )
        })
    }
}

/// Which items of a benchmark are run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Selection {
    /// Only scenarios that begin with one of these texts; empty selects all.
    pub scenarios: Vec<String>,
    /// The size of a random sample.
    pub sample: Option<usize>,
    /// The seed of the sample.
    pub seed: u64,
    /// At most this many items from the beginning.
    pub limit: Option<usize>,
}

/// The record of one item: a line of the run's journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ItemRecord {
    /// The item's id.
    pub id: String,
    /// A digest of the request and the task, so that an item is run again after it changed. Empty
    /// in journals of older versions.
    #[serde(default, rename = "made_of", skip_serializing_if = "String::is_empty")]
    pub source_digest: String,
    /// The item's scenario.
    pub scenario: String,
    /// The cluster that the item shares with related items.
    pub cluster: String,
    /// The text that was sent.
    pub query: String,
    /// The request in words.
    pub request: String,
    /// The task, which defines what a good answer is.
    pub task: Task,
    /// The number of images.
    pub images: usize,
    /// Where the images come from, in order: files, rows of tables, or descriptions. Empty in
    /// journals of older versions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub image_sources: Vec<String>,
    /// The answers: the unguarded one first (profile `unguarded`), then one per profile. Empty if
    /// the item failed.
    pub arms: Vec<Outcome>,
    /// Why the item failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Whether the item failed because a content filter in front of the model refused it. This is
    /// an outcome of its own, and such an item is not retried.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub filtered: bool,
    /// Whether the kind of the item is unknown because its row can't be read. Its `task` is then
    /// meaningless.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub of_unknown_kind: bool,
}

impl ItemRecord {
    /// Whether the item was answered and has no image.
    pub(crate) fn is_text_only(&self) -> bool {
        self.images == 0 && self.error.is_none()
    }

    /// Whether a content filter took the place of an arm's answer: it refused the item, or cut the
    /// answer off before its first word.
    #[must_use]
    pub fn is_filtered(&self, arm: &str) -> bool {
        let is_cut = |outcome: &Outcome| outcome.profile == arm && is_cut_by_filter(outcome);
        self.filtered || self.arms.iter().any(is_cut)
    }
}

/// Whether a content filter cut an answer off before its first word.
#[must_use]
pub fn is_cut_by_filter(outcome: &Outcome) -> bool {
    let last = outcome.steps.iter().rfind(|step| matches!(step.step, Step::Direct | Step::Safe));
    outcome.answer.trim().is_empty()
        && last.is_some_and(|step| step.finish == FinishReason::ContentFilter)
}

/// Whether two paths lead to the same file or folder.
fn is_same_path(a: &Path, b: &Path) -> bool {
    a == b || a.canonicalize().is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b))
}

impl JournalHeader for RunHeader {
    fn difference(&self, started: &Self) -> Option<&'static str> {
        let settings = [
            ("version of ecso", started.ecso != self.ecso),
            ("benchmark", started.benchmark != self.benchmark),
            ("--variant", started.variant != self.variant),
            ("--data", !is_same_path(&started.data, &self.data)),
            ("model", started.model != self.model || started.model_digest != self.model_digest),
            ("model under the same name on the server", started.server != self.server),
            // The limit is also part of the recorded profiles, so it must be compared before them.
            ("--max-new-tokens", started.max_new_tokens != self.max_new_tokens),
            ("profile, or fit of it by `ecso tune`", started.profiles != self.profiles),
            ("--scenario", started.choice.scenarios != self.choice.scenarios),
            ("--sample", started.choice.sample != self.choice.sample),
            ("--seed", started.choice.seed != self.choice.seed),
            ("--limit", started.choice.limit != self.choice.limit),
            ("number of items in its data", started.items.is_some() && started.items != self.items),
        ];
        settings.into_iter().find(|(_, differs)| *differs).map(|(name, _)| name)
    }
}

impl Entry for ItemRecord {
    fn id(&self) -> &str {
        &self.id
    }

    fn source_digest(&self) -> &str {
        &self.source_digest
    }

    fn failed(&self) -> bool {
        self.error.is_some() && !self.filtered
    }
}
