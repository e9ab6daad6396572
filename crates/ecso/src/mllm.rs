//! [`Mllm`], the trait of everything that answers a chat: what is asked, what comes back, and how
//! it fails.

use std::{error::Error, fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::{Stream, StreamExt, stream::BoxStream};

use crate::{chat::Chat, image::Image};

/// How a reply is sampled, and what is reported with it.
///
/// ```
/// use ecso::Sampling;
///
/// let greedy = Sampling { temperature: Some(0.0), max_tokens: Some(256), ..Sampling::default() };
/// ```
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sampling {
    /// 0 is greedy; `None` leaves it to the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// Nucleus sampling: the share of probability that is sampled from, in 0..=1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// Makes sampling at a temperature above 0 repeatable, if the model supports it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u32>,
    /// Most new tokens; `None` leaves it to the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// How many of the likeliest first tokens to report, with their log-probabilities. 0 requests
    /// none; a model that can't report them leaves [`Reply::first_token`] empty.
    pub top_logprobs: u8,
    /// Further request fields. Backends with an HTTP request (an OpenAI-compatible server) send
    /// them as they are.
    #[serde(skip_serializing_if = "serde_json::Map::is_empty")]
    pub extra: serde_json::Map<String, serde_json::Value>,
}

/// A candidate for a token of a reply, and how likely it was.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct TopLogprob {
    /// The token's text, with its white space.
    pub token: String,
    /// Its natural log-probability.
    pub logprob: f32,
}

/// Why a reply ended. Exhaustive, so that a server translates every reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended it.
    #[default]
    Stop,
    /// The token limit or the context was reached.
    Length,
    /// A content filter of the server ended it.
    ContentFilter,
}

/// Token counts of a call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Usage {
    /// Tokens of the prompt, including its images.
    pub prompt_tokens: u32,
    /// Tokens of the reply.
    pub completion_tokens: u32,
}

/// A complete reply.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Reply {
    /// The text, with its white space.
    pub text: String,
    /// The model's reasoning before it, if the server reports that separately.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reasoning: String,
    /// The likeliest first tokens of the text, likeliest first; empty if the model does not report
    /// them.
    pub first_token: Vec<TopLogprob>,
    /// Token counts, if the model reports them.
    pub usage: Option<Usage>,
    /// Why it ended.
    pub finish: FinishReason,
    /// The model that the server names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// How long the model took, if that differs from how long the caller waited, as for a replayed
    /// reply.
    #[serde(default)]
    pub took: Option<Duration>,
}

/// A part of a streamed reply. Backends end each stream with [`Delta::End`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Delta {
    /// The likeliest first tokens; at most once.
    FirstToken(Vec<TopLogprob>),
    /// More of [`Reply::reasoning`].
    Reasoning(String),
    /// More text.
    Text(String),
    /// The end: exactly once, and last.
    End {
        /// Why it ended.
        finish: FinishReason,
        /// Token counts, if the model reports them.
        usage: Option<Usage>,
        /// [`Reply::took`].
        took: Option<Duration>,
    },
}

/// A reply while it is written. Dropping it cancels the work.
pub type ReplyStream = BoxStream<'static, Result<Delta, ModelError>>;

/// Why there is no reply. The text says all that is known; the error of another library that it
/// came from, if any, is its source.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum ModelError {
    /// The request itself is wrong; trying again does not help.
    Rejected(Cause),
    /// A content filter in front of the model refused the request.
    Filtered(Cause),
    /// Too much work at once; try again later.
    Overloaded {
        /// How long the model asks to wait, if it does.
        retry_after: Option<Duration>,
    },
    /// No reply within this time.
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

// By hand: the cause's text is part of the error's own, so the source is what the cause came from.
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
        let text = error.to_string().trim().to_owned();
        if !texts.iter().any(|earlier| earlier.contains(&text)) {
            texts.push(text);
        }
        next = error.source();
    }
    texts.join(": ")
}

/// An image as text.
///
/// ```
/// let text = ecso::ImageText::parse("WORDS: Bread, 2 euros\nSHOWS: A sign in a bakery.");
/// assert_eq!(text.words, "Bread, 2 euros");
/// assert_eq!(text.description, "A sign in a bakery.");
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageText {
    /// The words printed in it, verbatim; empty if there are none.
    pub words: String,
    /// What it shows; empty if that is not known.
    pub description: String,
}

impl ImageText {
    /// Parses a reply in two parts: `WORDS:`, and on a later line `SHOWS:`. The words may contain
    /// such a mark, so the last one counts. A reply in any other form counts as words, which are
    /// judged more strictly than a description.
    #[must_use]
    pub fn parse(reply: &str) -> Self {
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
    /// The description, then the words.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let between = if self.description.is_empty() || self.words.is_empty() { "" } else { "\n" };
        write!(f, "{}{between}{}", self.description, self.words)
    }
}

/// A multimodal LLM: the `F` of the paper. It is stateless: every call has its whole conversation.
/// A backend may reuse the work on a common prefix of calls, if that does not change the reply.
///
/// Only [`Mllm::name`] and [`Mllm::stream`] must be written; the example `own_backend` shows how.
#[async_trait]
pub trait Mllm: Send + Sync {
    /// The model's name in traces and results.
    fn name(&self) -> &str;

    /// Whether the model could answer now, found out without spending tokens. The default, for
    /// backends in this process: always.
    async fn health(&self) -> Result<(), ModelError> {
        Ok(())
    }

    /// The text of an image, from a model that turns images into text before its language model
    /// reads them. The default, for models that see images: `None`.
    async fn image_text(&self, _: &Image) -> Result<Option<ImageText>, ModelError> {
        Ok(None)
    }

    /// Whether it answers concurrent calls as fast as a single one, as servers do. The guard then
    /// checks the request while the draft is written. The default is `false`.
    fn is_concurrent(&self) -> bool {
        false
    }

    /// Starts a reply. Dropping the stream cancels the work.
    async fn stream(&self, chat: &Chat, sampling: &Sampling) -> Result<ReplyStream, ModelError>;

    /// A complete reply. The default [collects](collect) [`Mllm::stream`].
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

/// Collects a stream into a complete reply.
///
/// # Errors
/// Those of the stream, and [`ModelError::Protocol`] if it ends without [`Delta::End`]: it was cut
/// off.
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
