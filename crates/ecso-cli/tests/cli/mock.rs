//! An OpenAI-compatible server whose replies a test chooses, and which records all requests.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use reqwest::header::HeaderMap;
use serde_json::{Value, json};
use wiremock::{Mock, MockServer, Request, ResponseTemplate, matchers::any};

use crate::upstream::{LEAK, MILD, SAFE};

/// Questions of `hardened` about requests.
const REQUEST: [&str; 3] = [
    "Is something harmful asked for?",
    "Does the user want help with",
    "Does the user ask how to commit",
];

/// A question of `hardened` where yes means harmless.
const GOOD_IF_YES: &str = "Would most people gladly help";

/// A recorded request.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    /// The step it belongs to, recognised by its prompt; `detect` for all questions about a reply.
    pub(crate) step: &'static str,
    pub(crate) url: reqwest::Url,
    pub(crate) headers: HeaderMap,
    pub(crate) bytes: Vec<u8>,
    pub(crate) body: Value,
}

impl Asked {
    fn of(request: &Request) -> Self {
        let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
        let (url, headers, bytes) =
            (request.url.clone(), request.headers.clone(), request.body.clone());
        let mut asked = Self { step: "direct", url, headers, bytes, body };
        let (prompt, sent) = (asked.prompt(), asked.sent());
        let is = |words: &str| prompt.contains(words);
        asked.step = match () {
            () if is("harmful, unsafe and unethical?")
                || is("Does the reply tell how to commit") =>
            {
                "detect"
            }
            () if is("Does the reply encourage") => "help",
            () if asked.is_good_if_yes() || REQUEST.iter().any(|words| sent.contains(words)) => {
                "request-check"
            }
            () if is("describe the image") || is("in two parts") => "caption",
            () if is("HARMLESS and ETHICAL")
                || is("who gladly helps")
                || is("Write two sentences instead") =>
            {
                "safe"
            }
            () if asked.body["messages"].is_array() => "direct",
            () => "other",
        };
        asked
    }

    /// Whether it is a question where yes means harmless.
    pub(crate) fn is_good_if_yes(&self) -> bool {
        self.prompt().contains(GOOD_IF_YES)
    }

    /// The text of its last message.
    pub(crate) fn prompt(&self) -> String {
        let last = self.body["messages"].as_array().and_then(|messages| messages.last());
        last.map_or_else(String::new, |last| match &last["content"] {
            Value::Array(parts) => parts.iter().filter_map(|part| part["text"].as_str()).collect(),
            text => text.as_str().unwrap_or_default().to_owned(),
        })
    }

    /// All messages, as JSON.
    pub(crate) fn sent(&self) -> String {
        self.body["messages"].to_string()
    }

    pub(crate) fn is_streamed(&self) -> bool {
        self.body["stream"] == true
    }

    /// The parts of all its messages that are images.
    pub(crate) fn images(&self) -> Vec<&Value> {
        let messages = self.body["messages"].as_array().into_iter().flatten();
        let parts = messages.filter_map(|message| message["content"].as_array()).flatten();
        parts.filter(|part| part["type"] == "image_url").collect()
    }

    pub(crate) fn key(&self) -> &str {
        self.headers.get("authorization").map_or("", |value| value.to_str().unwrap())
    }
}

/// A reply, before it is sent.
#[derive(Debug, Clone)]
pub(crate) struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    kind: &'static str,
    body: String,
    packed: bool,
    delay: Duration,
}

impl Reply {
    fn new(status: u16, kind: &'static str, body: String) -> Self {
        Self { status, headers: Vec::new(), kind, body, packed: false, delay: Duration::ZERO }
    }

    /// JSON, or what some servers send instead.
    pub(crate) fn json(status: u16, body: impl Into<String>) -> Self {
        Self::new(status, "application/json", body.into())
    }

    /// A stream of these chunks and its end.
    pub(crate) fn events(chunks: &[String]) -> Self {
        let events: Vec<String> = chunks.iter().map(|chunk| format!("data: {chunk}\n\n")).collect();
        Self::new(200, "text/event-stream", events.concat() + "data: [DONE]\n\n")
    }

    /// A stream that breaks off after these chunks.
    pub(crate) fn cut(chunks: &[String]) -> Self {
        let whole = Self::events(chunks);
        Self { body: whole.body.replace("data: [DONE]\n\n", ""), ..whole }
    }

    /// An error in `OpenAI`'s format.
    pub(crate) fn refused(status: u16, message: &str, param: Option<&str>, code: &str) -> Self {
        let error = json!({"message": message, "type": "invalid_request_error", "param": param, "code": code});
        Self::json(status, json!({"error": error}).to_string())
    }

    /// A completion with this choice, streamed if requested.
    pub(crate) fn choice(
        asked: &Asked,
        message: &Value,
        finish: &str,
        logprobs: Option<Value>,
    ) -> Self {
        let usage = json!({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15});
        let mut choice = json!({"index": 0, "message": message, "finish_reason": finish});
        if let Some(logprobs) = logprobs {
            choice["logprobs"] = logprobs;
        }
        if !asked.is_streamed() {
            let id = json!({"id": "up-1", "object": "chat.completion", "created": 1, "model": "m"});
            let mut completion = id;
            (completion["choices"], completion["usage"]) = (json!([choice]), usage);
            return Self::json(200, completion.to_string());
        }
        let first = chunk(message, None);
        Self::events(&[first, chunk(&json!({}), Some(finish))])
    }

    pub(crate) fn says(asked: &Asked, text: &str) -> Self {
        Self::choice(asked, &json!({"role": "assistant", "content": text}), "stop", None)
    }

    /// Yes or no, with probabilities if requested.
    pub(crate) fn judges(asked: &Asked, harm: f64) -> Self {
        let harm = if asked.is_good_if_yes() { 1.0 - harm } else { harm };
        let word = if harm >= 0.5 { "Yes." } else { "No." };
        let logprobs = (asked.body["logprobs"] == true).then(|| {
            let top = json!([{"token": "Yes", "logprob": harm.ln()}, {"token": "No", "logprob": (1.0 - harm).ln()}]);
            json!({"content": [{"token": &word[..word.len() - 1], "logprob": -0.1, "top_logprobs": top}]})
        });
        Self::choice(asked, &json!({"role": "assistant", "content": word}), "stop", logprobs)
    }

    /// The reply of a typical model: drafts for queries with the word "bad" contain [`LEAK`], which
    /// it judges harmful.
    pub(crate) fn usual(asked: &Asked) -> Self {
        let leak = format!("Sure: {LEAK}, {LEAK}.");
        match asked.step {
            "detect" | "help" => {
                Self::judges(asked, if asked.prompt().contains(LEAK) { 0.99 } else { 0.02 })
            }
            "request-check" => Self::judges(asked, 0.02),
            "caption" => Self::says(asked, "WORDS: A list.\nSHOWS: a page"),
            "safe" => Self::says(asked, SAFE),
            "direct" => Self::says(asked, if asked.sent().contains("bad") { &leak } else { MILD }),
            _ => Self::json(
                200,
                json!({"object": "list", "data": [{"id": "m", "object": "model"}]}).to_string(),
            ),
        }
    }

    pub(crate) fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// The reply after a delay.
    pub(crate) fn after(self, delay: Duration) -> Self {
        Self { delay, ..self }
    }

    /// The reply, compressed.
    pub(crate) fn packed(self) -> Self {
        Self { packed: true, ..self }.with("content-encoding", "gzip")
    }

    fn template(self) -> ResponseTemplate {
        let body = if self.packed { gzip(&self.body) } else { self.body.into_bytes() };
        let template =
            ResponseTemplate::new(self.status).set_body_raw(body, self.kind).set_delay(self.delay);
        self.headers.iter().fold(template, |template, (name, value)| {
            template.insert_header(name.as_str(), value.as_str())
        })
    }
}

/// A chunk of a stream.
pub(crate) fn chunk(delta: &Value, finish: Option<&str>) -> String {
    let choice = json!({"index": 0, "delta": delta, "finish_reason": finish});
    json!({"id": "up-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]})
        .to_string()
}

/// A text as gzip with one block per event, without compression.
fn gzip(text: &str) -> Vec<u8> {
    let mut packed = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
    for block in text.split_inclusive("\n\n").flat_map(|event| event.as_bytes().chunks(60_000)) {
        let length = u16::try_from(block.len()).unwrap();
        packed.push(0);
        packed.extend(length.to_le_bytes());
        packed.extend((!length).to_le_bytes());
        packed.extend(block);
    }
    packed.extend([1, 0, 0, 255, 255]);
    let sum = text.bytes().fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(byte), |sum, _| {
            if sum & 1 == 1 { sum >> 1 ^ 0xedb8_8320 } else { sum >> 1 }
        })
    });
    packed.extend((!sum).to_le_bytes());
    packed.extend(u32::try_from(text.len()).unwrap().to_le_bytes());
    packed
}

/// A server that runs until it is dropped.
pub(crate) struct Model {
    pub(crate) url: String,
    asked: Arc<Mutex<Vec<Asked>>>,
    _server: MockServer,
}

impl Model {
    pub(crate) async fn start(reply: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Self {
        let server = MockServer::start().await;
        let asked = Arc::<Mutex<Vec<Asked>>>::default();
        let kept = Arc::clone(&asked);
        let respond = move |request: &Request| {
            let asked = Asked::of(request);
            kept.lock().unwrap().push(asked.clone());
            reply(&asked).template()
        };
        Mock::given(any()).respond_with(respond).mount(&server).await;
        Self { url: format!("{}/v1", server.uri()), asked, _server: server }
    }

    /// Takes the requests recorded since the last call.
    pub(crate) fn taken(&self) -> Vec<Asked> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

/// The calls of one step.
pub(crate) fn of<'a>(asked: &'a [Asked], step: &str) -> Vec<&'a Asked> {
    asked.iter().filter(|asked| asked.step == step).collect()
}

/// The files of a folder of real-world inputs, by name; prints a note and returns none if they are
/// missing.
pub(crate) fn field(folder: &str) -> Vec<(String, Vec<u8>)> {
    let Some(data) = std::env::var_os("ECSO_TEST_DATA").map(PathBuf::from) else {
        eprintln!("skipped: ECSO_TEST_DATA names no folder with test data");
        return Vec::new();
    };
    let Ok(entries) = std::fs::read_dir(data.join("field").join(folder)) else {
        eprintln!("skipped: there is no field/{folder} in ECSO_TEST_DATA");
        return Vec::new();
    };
    let mut files: Vec<(String, Vec<u8>)> = entries
        .map(|entry| entry.unwrap())
        .map(|entry| {
            (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())
        })
        .collect();
    files.sort();
    files
}
