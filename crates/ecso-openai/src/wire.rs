//! OpenAI's chat-completions format: what is sent, and the parts that are read of what comes back.

use base64::{Engine, prelude::BASE64_STANDARD};
use ecso::{Alternative, Chat, Finish, ModelError, Part, Piece, Reply, Sampling, Turn, Usage};
use serde::Deserialize;
use serde_json::{Map, Value, json};

/// The request; and whether it holds wishes that a server may not know (only if `full`).
pub(crate) fn request(model: &str, chat: &Chat, sampling: &Sampling, stream: bool, full: bool) -> (Value, bool) {
    let messages: Vec<Value> =
        chat.turns.iter().map(|turn| json!({"role": turn.role.as_str(), "content": content(turn)})).collect();
    let mut body = Map::new();
    body.insert("model".into(), model.into());
    body.insert("messages".into(), messages.into());
    if let Some(temperature) = sampling.temperature {
        body.insert("temperature".into(), short(temperature));
    }
    if let Some(top_p) = sampling.top_p {
        body.insert("top_p".into(), short(top_p));
    }
    if let Some(seed) = sampling.seed {
        body.insert("seed".into(), seed.into());
    }
    if let Some(max_tokens) = sampling.max_tokens {
        body.insert("max_tokens".into(), max_tokens.into());
    }
    let mut wishes = false;
    if full && sampling.alternatives > 0 {
        wishes = true;
        body.insert("logprobs".into(), true.into());
        body.insert("top_logprobs".into(), sampling.alternatives.min(20).into());
    }
    if stream {
        body.insert("stream".into(), true.into());
        if full {
            wishes = true;
            body.insert("stream_options".into(), json!({"include_usage": true}));
        }
    }
    body.extend(sampling.extra.clone());
    (body.into(), wishes)
}

/// A turn without images is plain text, which every server reads.
fn content(turn: &Turn) -> Value {
    if turn.images().next().is_none() {
        return turn.query().into();
    }
    let parts = turn.parts.iter().map(|part| match part {
        Part::Text(text) => json!({"type": "text", "text": text}),
        Part::Image(image) => {
            let url = match (image.encoded(), image.url()) {
                (Some((bytes, mime)), _) => format!("data:{mime};base64,{}", BASE64_STANDARD.encode(bytes)),
                (None, url) => url.unwrap_or_default().to_owned(),
            };
            json!({"type": "image_url", "image_url": {"url": url}})
        }
    });
    parts.collect::<Vec<_>>().into()
}

/// 0.2 as `0.2`, not as the nearest double of the nearest float.
fn short(number: f32) -> Value {
    number.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

#[derive(Deserialize)]
struct Completion {
    choices: Vec<Choice>,
    usage: Option<Tokens>,
}

/// One event of a streamed reply.
#[derive(Deserialize)]
pub(crate) struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Tokens>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(alias = "delta")]
    message: Option<Message>,
    logprobs: Option<Logprobs>,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Message {
    content: Option<String>,
    refusal: Option<String>,
}

#[derive(Deserialize)]
struct Logprobs {
    content: Option<Vec<Position>>,
}

#[derive(Deserialize)]
struct Position {
    #[serde(default)]
    top_logprobs: Vec<Alternative>,
}

#[derive(Deserialize)]
struct Tokens {
    #[serde(default)]
    prompt_tokens: u32,
    #[serde(default)]
    completion_tokens: u32,
}

impl From<Tokens> for Usage {
    fn from(tokens: Tokens) -> Self {
        Self { prompt_tokens: tokens.prompt_tokens, completion_tokens: tokens.completion_tokens }
    }
}

impl Message {
    /// What the model says: its content, or the refusal that stands in its place.
    fn text(self) -> Option<String> {
        self.content.filter(|text| !text.is_empty()).or(self.refusal)
    }
}

impl Choice {
    fn alternatives(&self) -> Option<Vec<Alternative>> {
        let position = self.logprobs.as_ref()?.content.as_ref()?.first()?;
        (!position.top_logprobs.is_empty()).then(|| position.top_logprobs.clone())
    }
}

/// Reads a whole reply.
pub(crate) fn reply(body: &[u8]) -> Result<Reply, ModelError> {
    let Completion { choices, usage } =
        serde_json::from_slice(body).map_err(|error| ModelError::Protocol(format!("{error} in {}", reason(body))))?;
    let choice = choices.into_iter().next();
    let choice = choice.ok_or_else(|| ModelError::Protocol("there is no choice in it".into()))?;
    Ok(Reply {
        first_token: choice.alternatives().unwrap_or_default(),
        finish: finish(choice.finish_reason.as_deref()),
        text: choice.message.and_then(Message::text).unwrap_or_default(),
        usage: usage.map(Usage::from),
        took: None,
    })
}

/// Reads one event of a streamed reply.
pub(crate) fn chunk(data: &str) -> Result<Chunk, ModelError> {
    let chunk: Chunk =
        serde_json::from_str(data).map_err(|error| ModelError::Protocol(format!("{error} in a stream event")))?;
    match &chunk.error {
        Some(error) if !error.is_null() => Err(ModelError::Transport(format!(
            "the server broke off: {}",
            error["message"].as_str().unwrap_or("no reason given")
        ))),
        _ => Ok(chunk),
    }
}

/// What is known of a streamed reply's end, while it is read.
#[derive(Default)]
pub(crate) struct End {
    told: bool,
    finish: Option<Finish>,
    usage: Option<Usage>,
}

impl End {
    pub(crate) fn first_token(&mut self, chunk: &Chunk) -> Option<Vec<Alternative>> {
        if self.told {
            return None;
        }
        let alternatives = chunk.choices.first()?.alternatives();
        self.told = alternatives.is_some();
        alternatives
    }

    pub(crate) fn text(&mut self, chunk: Chunk) -> Option<String> {
        self.usage = chunk.usage.map(Usage::from).or(self.usage);
        let choice = chunk.choices.into_iter().next()?;
        if let Some(reason) = &choice.finish_reason {
            self.finish = Some(finish(Some(reason)));
        }
        choice.message?.text()
    }

    /// A stream that never said why it ended was cut off.
    pub(crate) fn piece(self) -> Result<Piece, ModelError> {
        let cut_off = || ModelError::Protocol("the stream broke off before its end".into());
        let finish = self.finish.ok_or_else(cut_off)?;
        Ok(Piece::End { finish, usage: self.usage, took: None })
    }
}

fn finish(reason: Option<&str>) -> Finish {
    match reason {
        Some("length") => Finish::Length,
        Some("content_filter") => Finish::ContentFilter,
        _ => Finish::Stop,
    }
}

/// The names in a model list.
pub(crate) fn model_names(body: &[u8]) -> Result<Vec<String>, ModelError> {
    #[derive(Deserialize)]
    struct List {
        data: Vec<Named>,
    }
    #[derive(Deserialize)]
    struct Named {
        id: String,
    }
    let list: List = serde_json::from_slice(body).map_err(|error| ModelError::Protocol(error.to_string()))?;
    Ok(list.data.into_iter().map(|model| model.id).collect())
}

/// What a server says is wrong: the message of its error object, or the start of whatever it sent.
pub(crate) fn reason(body: &[u8]) -> String {
    let object: Option<Value> = serde_json::from_slice(body).ok();
    let message = object.as_ref().and_then(|object| {
        let error = object.get("error").unwrap_or(object);
        error.get("message").unwrap_or(error).as_str()
    });
    match message {
        Some(message) => message.to_owned(),
        None => String::from_utf8_lossy(body).chars().take(300).collect(),
    }
}
