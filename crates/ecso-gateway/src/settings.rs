//! What an operator decides.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use crate::audit;

/// Settings of the server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[expect(clippy::struct_excessive_bools, reason = "switches that have nothing to do with each other")]
pub struct Settings {
    /// What is done with requests in scope.
    pub mode: Mode,
    /// The same for single models, by name.
    pub modes: BTreeMap<String, Mode>,
    /// Whether a client may choose by the header `x-ecso-mode`.
    pub mode_header: bool,
    /// What happens when the guard itself fails.
    pub on_failure: OnFailure,
    /// Who may call, by name; nobody named is everybody.
    pub keys: BTreeMap<String, Key>,
    /// How much of the steps a client may see by asking with the header `x-ecso-trace: true`.
    pub trace: TraceLevel,
    /// Seconds between signs of life on a stream that is held.
    pub keep_alive: u64,
    /// Whether remote images are fetched by this server (never from private addresses). Else their URLs are passed on.
    pub fetch_images: bool,
    /// Whether images are decoded whole before they are passed on; else their headers are looked at.
    pub decode_images: bool,
    /// Whether `POST /v1/moderations` is answered by the guard; else it is the upstream's.
    pub moderations: bool,
    /// The audit log.
    pub audit: audit::Settings,
    /// Whether `GET /metrics` tells figures to whoever asks.
    pub metrics: bool,
    /// Bounds.
    pub limits: Limits,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            mode: Mode::Enforce,
            modes: BTreeMap::new(),
            mode_header: false,
            on_failure: OnFailure::Closed,
            keys: BTreeMap::new(),
            trace: TraceLevel::Figures,
            keep_alive: 10,
            fetch_images: false,
            decode_images: false,
            moderations: true,
            audit: audit::Settings::default(),
            metrics: false,
            limits: Limits::default(),
        }
    }
}

/// What is done with a request in scope.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Its answer is judged, and answered anew if it is unsafe.
    Enforce,
    /// It is forwarded untouched; the answer is judged beside it, and what would have been done is recorded.
    Observe,
    /// It is forwarded.
    Off,
}

/// What happens when the guard itself fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnFailure {
    /// The client gets an error.
    #[serde(rename = "fail-closed")]
    Closed,
    /// The client gets the answer that could not be judged.
    #[serde(rename = "fail-open")]
    Open,
}

/// How much of the steps a client may see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TraceLevel {
    /// Nothing but the verdict.
    None,
    /// Steps with their times, tokens, verdicts and scores.
    Figures,
    /// Prompts and replies too: the unsafe draft among them.
    Full,
}

/// A client key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    /// SHA-256 of the key, in hexadecimal digits.
    pub sha256: String,
    /// What is done with this client's requests, if not what `mode` says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
    /// Requests in a minute, if not what `limits.per_minute` says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_minute: Option<u32>,
}

impl Key {
    /// A fresh key: what the client gets, and what the settings keep.
    #[must_use]
    pub fn generate() -> (String, Self) {
        // Two random UUIDs: 244 random bits.
        let key = format!("ecso-{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple());
        let sha256 = crate::access::hash(&key);
        (key, Self { sha256, mode: None, per_minute: None })
    }
}

/// Bounds on what strangers send. Bytes and pixels of an image have theirs in [`ecso::Limits`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Bytes of a chat request.
    pub body: usize,
    /// Bytes of an answer.
    pub answer: usize,
    /// Images of a chat.
    pub images: usize,
    /// Choices that a client may ask for (`n`).
    pub choices: u32,
    /// Texts of one moderation request.
    pub inputs: usize,
    /// Guarded requests at once.
    pub at_once: usize,
    /// Guarded requests that wait for their turn; one more gets 429.
    pub queue: usize,
    /// Seconds for a guarded request, waiting included.
    pub deadline: u64,
    /// Requests in a minute, for each client key; 0 is no bound.
    pub per_minute: u32,
    /// Findings about requests that are remembered, so that what repeats from call to call (an agent's system message,
    /// its tools) is judged once; 0 remembers none. About 100 bytes each.
    pub remembered: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body: 32 << 20,
            answer: 16 << 20,
            images: 16,
            choices: 8,
            inputs: 32,
            at_once: 256,
            queue: 1024,
            deadline: 600,
            per_minute: 0,
            remembered: 16_384,
        }
    }
}

impl Limits {
    pub(crate) fn deadline(&self) -> Duration {
        Duration::from_secs(self.deadline)
    }
}
