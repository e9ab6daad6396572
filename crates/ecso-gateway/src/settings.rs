//! The settings that an operator makes.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Settings of the server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[expect(clippy::struct_excessive_bools, reason = "independent switches")]
pub struct Settings {
    /// What happens to requests in scope.
    pub mode: Mode,
    /// The mode of single models, by model name.
    pub modes: BTreeMap<String, Mode>,
    /// Profiles of single models, by model name. All other models use the program's profile.
    pub profiles: BTreeMap<String, String>,
    /// The share of observed requests that are judged, 0 to 1. The others are only forwarded.
    pub observe_share: f64,
    /// Whether clients may choose with the headers `x-ecso-mode` and `x-ecso-stream`. A client may
    /// always choose to have its stream held.
    pub mode_header: bool,
    /// What happens when the guard itself fails.
    pub on_failure: OnFailure,
    /// Client keys, by name. Without any, no key is needed.
    pub keys: BTreeMap<String, Key>,
    /// How much of the steps a client sees with the header `x-ecso-trace: true`.
    pub trace: TraceLevel,
    /// Seconds between keep-alive comments on a stream that is held.
    pub keep_alive: u64,
    /// How streams of guarded chats go out.
    pub stream: Streams,
    /// The windows of `windowed` streams, and of drafts that are judged for `early_stop`.
    pub windows: Windows,
    /// Whether a held stream is judged while the model writes it, so that the model is stopped at
    /// the first harm.
    pub early_stop: bool,
    /// What is done about images that a request only names by their URL.
    pub image_urls: ImageUrls,
    /// Hosts, by name or address, from which images are fetched even though they are not on the
    /// public internet.
    pub image_hosts: Vec<String>,
    /// Request fields that are passed on in addition to those that the guard knows. Their texts are
    /// judged.
    pub allow_fields: Vec<String>,
    /// Client headers that are passed on in enforce mode in addition to the known ones, and also
    /// with the guard's own calls.
    pub pass_headers: Vec<String>,
    /// Routes that are passed on unguarded in addition to those known to be harmless, for example
    /// `POST /v1/audio/transcriptions` or `GET /v1/files/*`.
    pub allow_routes: Vec<String>,
    /// What happens to an answer from a gateway that did not send its request first (LiteLLM, for
    /// requests with images and no text).
    pub unseen: Unseen,
    /// Whether images are decoded completely before they are passed on. Otherwise only their
    /// headers are read.
    pub decode_images: bool,
    /// Whether the guard answers `POST /v1/moderations`. Otherwise the upstream does.
    pub moderations: bool,
    /// The audit log.
    pub audit: AuditSettings,
    /// Whether `GET /metrics` is served. It needs no key.
    pub metrics: bool,
    /// Limits.
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
    /// Whether this observed request is in the share that is judged.
    pub(crate) fn is_sampled(&self) -> bool {
        // 32 random bits.
        let random = f64::from(uuid::Uuid::new_v4().as_fields().0) / f64::from(u32::MAX);
        random < self.observe_share || self.observe_share >= 1.0
    }

    /// The names of all profiles of single models and clients.
    pub fn profile_names(&self) -> impl Iterator<Item = &str> {
        let of_keys = self.keys.values().filter_map(|key| key.profile.as_deref());
        self.profiles.values().map(String::as_str).chain(of_keys)
    }
}

/// What happens to a request in scope. The order is from least to most strict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// It is forwarded.
    Off,
    /// It is forwarded unchanged. The answer is judged afterwards, and what the guard would have
    /// done is recorded.
    Observe,
    /// Its answer is judged, and replaced by a safe one if it is unsafe.
    Enforce,
}

/// How the stream of a guarded chat goes out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Streams {
    /// Once the whole answer is judged.
    Hold,
    /// Window by window, each once it was judged together with everything before it. If only later
    /// words reveal harm, the earlier words are out already. Answers that can't be judged this way
    /// are held.
    Windowed,
}

/// The windows in which an answer is judged while it is written. Tokens are estimated: four ASCII
/// characters count as one token, and so does any other character.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Windows {
    /// New tokens before the first check.
    pub first: usize,
    /// Each window has twice the tokens of the one before it, up to this number, or an eighth of
    /// what was judged if that is more.
    pub most: usize,
    /// The last tokens of a judged window, which wait for the next check.
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
    /// This server fetches them once, and every step gets the bytes.
    Fetch,
    /// Such requests are refused.
    Refuse,
    /// The URLs are passed on. The owner of the host can then show the judge another picture than
    /// the model.
    Pass,
}

/// What happens to an answer whose request was not seen here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unseen {
    /// It is blocked.
    Block,
    /// It is judged by its own text, without question and image.
    Judge,
}

/// What the audit log contains.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuditSettings {
    /// The file. An empty path turns the log off.
    pub path: PathBuf,
    /// Whether conversations, images, drafts and answers are logged too.
    pub content: bool,
    /// Size in bytes at which the file is renamed to `.1` and a new one is started.
    pub bytes: usize,
    /// How many renamed files are kept.
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
    /// The client gets the unjudged answer.
    #[serde(rename = "fail-open")]
    Open,
}

/// How much of the steps a client may see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TraceLevel {
    /// Only the verdict.
    None,
    /// Steps with times, tokens, verdicts and scores.
    Figures,
    /// Prompts and replies too, including the unsafe draft.
    Full,
}

/// A client key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    /// SHA-256 of the key, in hexadecimal.
    pub sha256: String,
    /// The mode of this client's requests. Overrides `mode` and `modes`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
    /// Requests per minute. Overrides `limits.per_minute`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_minute: Option<u32>,
    /// The profile for this client's requests. Overrides the model's profile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<String>,
}

impl Key {
    /// Creates a key. Returns the key for the client, and the entry for the settings.
    #[must_use]
    pub fn generate() -> (String, Self) {
        // Two random UUIDs: 244 random bits.
        let key =
            format!("ecso-{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple());
        let sha256 = hash(&key);
        (key, Self { sha256, mode: None, per_minute: None, profile: None })
    }
}

/// The hash of a key, as the settings contain it.
pub(crate) fn hash(key: &str) -> String {
    hex::encode(Sha256::digest(key))
}

/// Limits on what clients send. The limits on the bytes and pixels of an image are in
/// [`ecso::Limits`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Bytes of a chat request.
    pub body: usize,
    /// Bytes of all bodies that are read or guarded at the same time. Above that, a request gets
    /// 503 and may retry. A request takes about five times the bytes of its body in memory.
    pub bodies: usize,
    /// Connections at the same time, as far as the system has file descriptors. More wait.
    pub connections: usize,
    /// Seconds to wait for the head of a request, and for each chunk of its body.
    pub patience: u64,
    /// Bytes of an answer.
    pub answer: usize,
    /// Images of a chat.
    pub images: usize,
    /// Bytes of all texts of a guarded chat.
    pub text: usize,
    /// Choices that a client may request (`n`).
    pub choices: u32,
    /// Texts of a moderation request.
    pub inputs: usize,
    /// Guarded requests that run at the same time.
    pub at_once: usize,
    /// Guarded requests that wait in the queue. One more gets 429.
    pub queue: usize,
    /// Seconds for a guarded request, including the time in the queue.
    pub deadline: u64,
    /// Requests per minute for each client key, and for the playground. 0 means no limit.
    pub per_minute: u32,
    /// Findings about requests that are kept in memory, so that what repeats from call to call (an
    /// agent's system message, its tools) is judged once. About 100 bytes each; 0 keeps none.
    pub remembered: usize,
    /// Bytes of conversations that are kept for requests with `previous_response_id`. 0 keeps none,
    /// and the field is refused.
    pub stored: usize,
    /// Seconds for which a conversation is kept after its last use. 0 keeps none.
    pub stored_for: u64,
    /// Bytes of requests that are kept until a gateway sends their answers (LiteLLM). Above that,
    /// the oldest are dropped, and their answers are treated as if the request had not been seen. 0
    /// keeps none.
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
