//! The one seam: [`Mllm`], a multimodal LLM that answers a chat. Everything that can answer is
//! behind it.

use std::{error::Error, fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::{Stream, StreamExt, stream::BoxStream};

use crate::{chat::Chat, image::Image};

/// How a reply is drawn.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sampling {
    /// 0 is greedy; `None` leaves it to the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// Nucleus sampling: the share of probability that is drawn from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// Makes a draw at a temperature above 0 repeatable, where the model can do it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u32>,
    /// Most new tokens; `None` leaves it to the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// How many of the likeliest first tokens to tell, with their log-probabilities. 0 asks for
    /// none; a model that can't tell leaves [`Reply::first_token`] empty.
    pub top_logprobs: u8,
    /// Further request fields, sent as they are by backends that have a request (an
    /// OpenAI-compatible server).
    #[serde(skip_serializing_if = "serde_json::Map::is_empty")]
    pub extra: serde_json::Map<String, serde_json::Value>,
}

/// A token that could have stood at a place, and how likely it was.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct TopLogprob {
    /// The token's text, white space included.
    pub token: String,
    /// Its natural log-probability.
    pub logprob: f32,
}

/// Why a reply ended. Exhaustive, so that a server translates every reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model was done.
    #[default]
    Stop,
    /// The token limit or the context was full.
    Length,
    /// The server's own filter stepped in.
    ContentFilter,
}

/// What a call cost, where the model tells.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Usage {
    /// Tokens of the prompt, images included.
    pub prompt_tokens: u32,
    /// Tokens of the reply.
    pub completion_tokens: u32,
}

/// A whole reply.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Reply {
    /// The text, white space and all.
    pub text: String,
    /// What the model thought before it, where its server tells that apart from the text.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reasoning: String,
    /// The likeliest first tokens of the text, likeliest first; empty where the model doesn't tell.
    pub first_token: Vec<TopLogprob>,
    /// Token counts, where the model tells.
    pub usage: Option<Usage>,
    /// Why it ended.
    pub finish: FinishReason,
    /// The model that a server says it comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// How long the model took, where that is not how long the caller waited: a replayed reply.
    #[serde(default)]
    pub took: Option<Duration>,
}

/// What a reply under way brings next.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Delta {
    /// The likeliest first tokens; comes at most once.
    FirstToken(Vec<TopLogprob>),
    /// More of [`Reply::reasoning`].
    Reasoning(String),
    /// More text.
    Text(String),
    /// The end; comes exactly once, last.
    End {
        /// Why it ended.
        finish: FinishReason,
        /// Token counts, where the model tells.
        usage: Option<Usage>,
        /// [`Reply::took`].
        took: Option<Duration>,
    },
}

/// A reply as it is written.
pub type ReplyStream = BoxStream<'static, Result<Delta, ModelError>>;

/// Why a model gave no reply. Its text says all that is known; what it came from, where that is an
/// error of another library, is its source.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum ModelError {
    /// The request itself is at fault; trying again won't help.
    Rejected(Cause),
    /// A content filter in front of the model refused the request.
    Filtered(Cause),
    /// Too much work at once; try again later.
    Overloaded {
        /// How long the model asks to wait, if it does.
        retry_after: Option<Duration>,
    },
    /// No reply in time.
    Timeout(Duration),
    /// The reply can't be read.
    Protocol(Cause),
    /// The connection, the engine or the file behind the model failed.
    Transport(Cause),
}

impl fmt::Display for ModelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rejected(cause) => write!(f, "the model rejected the request: {cause}"),
            Self::Filtered(cause) => write!(f, "a content filter refused the request: {cause}"),
            Self::Overloaded { retry_after: None } => f.write_str("the model is overloaded"),
            Self::Overloaded { retry_after: Some(wait) } => {
                write!(f, "the model is overloaded; it asks to wait {wait:?}")
            }
            Self::Timeout(waited) => write!(f, "the model did not answer within {waited:?}"),
            Self::Protocol(cause) => write!(f, "the model's reply can't be read: {cause}"),
            Self::Transport(cause) => write!(f, "the model can't be reached: {cause}"),
        }
    }
}

// By hand: the cause's text is part of the error's own, so what comes next is what the cause came
// from.
impl Error for ModelError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Rejected(cause)
            | Self::Filtered(cause)
            | Self::Protocol(cause)
            | Self::Transport(cause) => cause.source(),
            Self::Overloaded { .. } | Self::Timeout(_) => None,
        }
    }
}

/// A message that says what went wrong, and the error that it came from, if there is one. Errors of
/// this crate and its backends hold one, so that no type of another library is part of them.
#[derive(Debug, Clone)]
pub struct Cause {
    message: String,
    source: Option<Arc<dyn Error + Send + Sync>>,
}

impl Cause {
    /// A cause whose message is the [`error_chain`] of `error`.
    pub fn from_error(error: impl Error + Send + Sync + 'static) -> Self {
        Self::new(error_chain(&error), error)
    }

    /// A cause with a message of its own, and `error` as its source.
    pub fn new(message: impl Into<String>, error: impl Error + Send + Sync + 'static) -> Self {
        Self { message: message.into(), source: Some(Arc::new(error)) }
    }

    /// The message.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for Cause {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

impl PartialEq for Cause {
    /// Causes with the same message are equal.
    fn eq(&self, other: &Self) -> bool {
        self.message == other.message
    }
}

impl Eq for Cause {}

impl<T: Into<String>> From<T> for Cause {
    fn from(message: T) -> Self {
        Self { message: message.into(), source: None }
    }
}

/// An error and its sources as one line, joined by `: `. A text that an earlier one contains is
/// left out.
///
/// ```
/// use ecso::{Cause, ModelError, error_chain};
///
/// let cause = Cause::new("connection failed", std::io::Error::other("no route to host"));
/// let error = ModelError::Transport(cause);
/// let line = "the model can't be reached: connection failed: no route to host";
/// assert_eq!(error_chain(&error), line);
/// ```
#[must_use]
pub fn error_chain(error: &(dyn Error + 'static)) -> String {
    let mut texts: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        if !texts.iter().any(|earlier| earlier.contains(&text)) {
            texts.push(text);
        }
        next = error.source();
    }
    texts.join(": ")
}

/// An image as text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageText {
    /// The words that are printed in it, as they are; empty if there are none.
    pub words: String,
    /// What it shows; empty if nobody can tell.
    pub description: String,
}

impl ImageText {
    /// Reads a reply in two parts, `WORDS:` and behind it, on a line of its own, `SHOWS:`. Words
    /// may hold such a mark, so the last one counts. In any other form all of it are words: what is
    /// judged more strictly.
    #[must_use]
    pub fn read(reply: &str) -> Self {
        let part = |text: &str| {
            let text = text.trim().trim_matches('*').trim();
            if text.trim_end_matches('.').eq_ignore_ascii_case("none") {
                String::new()
            } else {
                text.to_owned()
            }
        };
        let lower = reply.to_ascii_lowercase();
        let begin = lower.trim_start_matches(|c: char| !c.is_alphabetic());
        let begin = begin.starts_with("words:").then(|| lower.len() - begin.len() + "words:".len());
        let marks = ["\nshows:", "\n**shows:"];
        let middle = marks.iter().filter_map(|mark| Some((lower.rfind(mark)?, mark.len()))).max();
        match begin.zip(middle) {
            Some((begin, (middle, mark))) if begin <= middle => Self {
                words: part(&reply[begin..middle]),
                description: part(&reply[middle + mark..]),
            },
            _ => Self { words: part(reply), description: String::new() },
        }
    }
}

impl fmt::Display for ImageText {
    /// What it shows, then its words.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let between = if self.description.is_empty() || self.words.is_empty() { "" } else { "\n" };
        write!(f, "{}{between}{}", self.description, self.words)
    }
}

/// A multimodal LLM: the `F` of the paper. Stateless: every call brings its whole conversation, and
/// a backend that can reuse a prefix of an earlier one does so by itself, without changing a reply.
#[async_trait]
pub trait Mllm: Send + Sync {
    /// What the model is called in traces and results.
    fn name(&self) -> &str;

    /// Whether the model could answer now, without asking it anything that costs tokens. Backends
    /// in this process always can.
    async fn health(&self) -> Result<(), ModelError> {
        Ok(())
    }

    /// What the model makes of an image without being asked, where it turns pictures into text
    /// before its language model sees them. `None` of one that sees.
    async fn image_text(&self, _: &Image) -> Result<Option<ImageText>, ModelError> {
        Ok(None)
    }

    /// Whether it answers several calls as fast as one, as servers do. What doesn't depend on the
    /// draft is then asked beside it.
    fn is_concurrent(&self) -> bool {
        false
    }

    /// Starts a reply. Dropping the stream cancels the work.
    async fn stream(&self, chat: &Chat, sampling: &Sampling) -> Result<ReplyStream, ModelError>;

    /// A whole reply; the fold over [`Mllm::stream`] unless a backend has a better way.
    async fn generate(&self, chat: &Chat, sampling: &Sampling) -> Result<Reply, ModelError> {
        collect(self.stream(chat, sampling).await?).await
    }
}

#[async_trait]
impl<M: Mllm + ?Sized> Mllm for Arc<M> {
    fn name(&self) -> &str {
        (**self).name()
    }

    async fn health(&self) -> Result<(), ModelError> {
        (**self).health().await
    }

    async fn image_text(&self, image: &Image) -> Result<Option<ImageText>, ModelError> {
        (**self).image_text(image).await
    }

    fn is_concurrent(&self) -> bool {
        (**self).is_concurrent()
    }

    async fn stream(&self, chat: &Chat, sampling: &Sampling) -> Result<ReplyStream, ModelError> {
        (**self).stream(chat, sampling).await
    }

    async fn generate(&self, chat: &Chat, sampling: &Sampling) -> Result<Reply, ModelError> {
        (**self).generate(chat, sampling).await
    }
}

/// Folds a stream into the whole reply. A stream that ends without [`Delta::End`] was cut off, and
/// that is an error.
pub async fn collect(
    mut deltas: impl Stream<Item = Result<Delta, ModelError>> + Unpin + Send,
) -> Result<Reply, ModelError> {
    let mut reply = Reply::default();
    while let Some(delta) = deltas.next().await {
        match delta? {
            Delta::FirstToken(tokens) => reply.first_token = tokens,
            Delta::Reasoning(text) => reply.reasoning.push_str(&text),
            Delta::Text(text) => reply.text.push_str(&text),
            Delta::End { finish, usage, took } => {
                return Ok(Reply { usage, finish, took, ..reply });
            }
        }
    }
    Err(ModelError::Protocol("the stream broke off before its end".into()))
}
