//! What an operator decides.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Settings of the server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "switches that have nothing to do with each other"
)]
pub struct Settings {
    /// What is done with requests in scope.
    pub mode: Mode,
    /// The same for single models, by name.
    pub modes: BTreeMap<String, Mode>,
    /// Profiles of single models, by the model's name; all others have the one that the program
    /// runs under.
    pub profiles: BTreeMap<String, String>,
    /// The share of observed requests that are judged, 0 to 1; the others are forwarded alone.
    pub observe_share: f64,
    /// Whether a client may choose by the headers `x-ecso-mode` and `x-ecso-stream`; a held stream
    /// it may always choose.
    pub mode_header: bool,
    /// What happens when the guard itself fails.
    pub on_failure: OnFailure,
    /// Who may call, by name; nobody named is everybody.
    pub keys: BTreeMap<String, Key>,
    /// How much of the steps a client may see by asking with the header `x-ecso-trace: true`.
    pub trace: TraceLevel,
    /// Seconds between signs of life on a stream that is held.
    pub keep_alive: u64,
    /// How the streams of guarded chats go out.
    pub stream: Streams,
    /// The windows of streams that are `windowed`, and those by which a draft is judged for
    /// `early_stop`.
    pub windows: Windows,
    /// Whether a held stream is judged while the model writes it, so that the model is stopped as
    /// soon as there is harm in it.
    pub early_stop: bool,
    /// What is done about images that a request only names by their URL.
    pub image_urls: ImageUrls,
    /// Hosts, by name or address, from which images are fetched though they are not of the open
    /// internet.
    pub image_hosts: Vec<String>,
    /// Fields of requests that are let through, beside those that the guard knows; their texts are
    /// judged.
    pub allow_fields: Vec<String>,
    /// Headers of clients that go on in enforce mode, beside those that are known; with the guard's
    /// own calls too.
    pub pass_headers: Vec<String>,
    /// Routes that are passed on unguarded, beside those that are known to be harmless: `POST
    /// /v1/audio/transcriptions`, `GET /v1/files/*`.
    pub allow_routes: Vec<String>,
    /// What is done about an answer that a gateway shows without having shown the request (LiteLLM
    /// does so where a request has images and no text).
    pub unseen: Unseen,
    /// Whether images are decoded whole before they are passed on; else their headers are looked
    /// at.
    pub decode_images: bool,
    /// Whether `POST /v1/moderations` is answered by the guard; else it is the upstream's.
    pub moderations: bool,
    /// The audit log.
    pub audit: AuditSettings,
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
            profiles: BTreeMap::new(),
            observe_share: 1.0,
            mode_header: false,
            on_failure: OnFailure::Closed,
            keys: BTreeMap::new(),
            trace: TraceLevel::Figures,
            keep_alive: 10,
            stream: Streams::Hold,
            windows: Windows::default(),
            early_stop: false,
            image_urls: ImageUrls::Fetch,
            image_hosts: Vec::new(),
            allow_fields: Vec::new(),
            pass_headers: Vec::new(),
            allow_routes: Vec::new(),
            unseen: Unseen::Block,
            decode_images: false,
            moderations: true,
            audit: AuditSettings::default(),
            metrics: false,
            limits: Limits::default(),
        }
    }
}

impl Settings {
    /// Whether this observed request is one of the share that is judged.
    pub(crate) fn draws(&self) -> bool {
        // 32 random bits.
        let drawn = f64::from(uuid::Uuid::new_v4().as_fields().0) / f64::from(u32::MAX);
        drawn < self.observe_share || self.observe_share >= 1.0
    }

    /// The names of all profiles that single models and clients have.
    pub fn profile_names(&self) -> impl Iterator<Item = &str> {
        let of_keys = self.keys.values().filter_map(|key| key.profile.as_deref());
        self.profiles.values().map(String::as_str).chain(of_keys)
    }
}

/// What is done with a request in scope; the last is the strictest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// It is forwarded.
    Off,
    /// It is forwarded untouched; the answer is judged beside it, and what would have been done is
    /// recorded.
    Observe,
    /// Its answer is judged, and answered anew if it is unsafe.
    Enforce,
}

/// How the stream of a guarded chat goes out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Streams {
    /// When all of the answer is judged.
    Hold,
    /// Window by window, each when it was judged with all that came before it: harm that only later
    /// words show finds the earlier words gone out. What can't be judged so is held.
    Windowed,
}

/// The windows in which an answer is judged while it is written. Tokens are counted roughly: four
/// letters of ASCII, or one other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Windows {
    /// New tokens before the first judgement.
    pub first: usize,
    /// Each window has twice the tokens of the one before it, up to this many; or an eighth of what
    /// was judged, where that is more.
    pub most: usize,
    /// The last tokens of what was judged, which wait for the next judgement.
    pub held: usize,
}

impl Default for Windows {
    fn default() -> Self {
        Self { first: 32, most: 256, held: 8 }
    }
}

/// What is done about images that a request only names by their URL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImageUrls {
    /// They are fetched, once and by this server, and every step gets the bytes.
    Fetch,
    /// Such requests are refused.
    Refuse,
    /// The URLs are passed on: whoever owns the host can show the judge another picture than the
    /// model.
    Pass,
}

/// What is done about an answer whose request was not shown here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unseen {
    /// It is held back.
    Block,
    /// It is judged by its own words, without question and image.
    Judge,
}

/// The audit log: what is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuditSettings {
    /// The file; empty is none.
    pub path: PathBuf,
    /// Whether conversation, images, draft and answer are written too.
    pub content: bool,
    /// Bytes after which the file is set aside as `.1` and a new one is begun.
    pub bytes: usize,
    /// How many files that were set aside are kept.
    pub keep: usize,
}

impl Default for AuditSettings {
    fn default() -> Self {
        Self { path: PathBuf::new(), content: false, bytes: 256 << 20, keep: 8 }
    }
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
    /// The profile that this client's requests are judged under, whatever their model's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<String>,
}

impl Key {
    /// A fresh key: what the client gets, and what the settings keep.
    #[must_use]
    pub fn generate() -> (String, Self) {
        // Two random UUIDs: 244 random bits.
        let key =
            format!("ecso-{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple());
        let sha256 = hash(&key);
        (key, Self { sha256, mode: None, per_minute: None, profile: None })
    }
}

/// A key as it stands in settings.
pub(crate) fn hash(key: &str) -> String {
    hex::encode(Sha256::digest(key))
}

/// Bounds on what strangers send. Bytes and pixels of an image have theirs in [`ecso::Limits`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Bytes of a chat request.
    pub body: usize,
    /// Bytes of all bodies that are read or guarded at one time; beyond, a request gets 503 and may
    /// come again. What is held of a body is about five times its bytes.
    pub bodies: usize,
    /// Connections at one time, as far as the system has descriptors; more wait.
    pub connections: usize,
    /// Seconds for the head of a request, and for each piece of its body.
    pub patience: u64,
    /// Bytes of an answer.
    pub answer: usize,
    /// Images of a chat.
    pub images: usize,
    /// Bytes of all texts of a guarded chat.
    pub text: usize,
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
    /// Findings about requests that are remembered, so that what repeats from call to call (an
    /// agent's system message, its tools) is judged once; 0 remembers none. About 100 bytes each.
    pub remembered: usize,
    /// Bytes of conversations that are kept for requests with `previous_response_id`; 0 keeps none,
    /// and the field is refused.
    pub stored: usize,
    /// Seconds for which a conversation is kept after it was last used; 0 keeps none.
    pub stored_for: u64,
    /// Bytes of requests that are kept until a gateway shows their answers (LiteLLM); beyond, the
    /// oldest are forgotten, and their answers are as if nobody had seen the request. 0 keeps none.
    pub pending: usize,
    /// Seconds for which such a request is kept.
    pub pending_for: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body: 32 << 20,
            bodies: 48 << 20,
            connections: 4096,
            patience: 20,
            answer: 16 << 20,
            images: 16,
            text: 4 << 20,
            choices: 8,
            inputs: 32,
            at_once: 256,
            queue: 1024,
            deadline: 600,
            per_minute: 0,
            remembered: 16_384,
            stored: 128 << 20,
            stored_for: 3600,
            pending: 128 << 20,
            pending_for: 900,
        }
    }
}

impl Limits {
    pub(crate) fn deadline(&self) -> Duration {
        Duration::from_secs(self.deadline)
    }

    pub(crate) fn patience(&self) -> Duration {
        Duration::from_secs(self.patience.max(1))
    }
}
