//! The one seam: [`Mllm`], a multimodal LLM that answers a chat. Everything that can answer is behind it.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::{Stream, StreamExt, stream::BoxStream};

use crate::chat::Chat;

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
    /// How many alternatives of the reply's first token to tell, with their log-probabilities. 0 asks for none; a
    /// model that can't tell leaves [`Reply::first_token`] empty.
    pub alternatives: u8,
    /// Further request fields, sent as they are by backends that have a request (an OpenAI-compatible server).
    #[serde(skip_serializing_if = "serde_json::Map::is_empty")]
    pub extra: serde_json::Map<String, serde_json::Value>,
}

/// One alternative of a token.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Alternative {
    /// The token's text, white space included.
    pub token: String,
    /// Its natural log-probability.
    pub logprob: f32,
}

/// Why a reply ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
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
    /// Alternatives of the first token, likeliest first; empty where the model doesn't tell.
    pub first_token: Vec<Alternative>,
    /// Token counts, where the model tells.
    pub usage: Option<Usage>,
    /// Why it ended.
    pub finish: Finish,
    /// How long the model took, where that is not how long the caller waited: a replayed reply.
    #[serde(default)]
    pub took: Option<Duration>,
}

/// A piece of a reply under way.
#[derive(Debug, Clone, PartialEq)]
pub enum Piece {
    /// Alternatives of the first token; comes at most once.
    FirstToken(Vec<Alternative>),
    /// More text.
    Text(String),
    /// The end; comes exactly once, last.
    End {
        /// Why it ended.
        finish: Finish,
        /// Token counts, where the model tells.
        usage: Option<Usage>,
        /// [`Reply::took`].
        took: Option<Duration>,
    },
}

/// A reply as it is written.
pub type ReplyStream = BoxStream<'static, Result<Piece, ModelError>>;

/// Why a model gave no reply.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The request itself is at fault; trying again won't help.
    #[error("the model rejected the request: {0}")]
    Rejected(String),
    /// Too much work at once; try again later.
    #[error("the model is overloaded{}", retry_hint(.retry_after.as_ref()))]
    Overloaded {
        /// How long the model asks to wait, if it does.
        retry_after: Option<Duration>,
    },
    /// No reply in time.
    #[error("the model did not answer within {0:?}")]
    Timeout(Duration),
    /// The reply can't be read.
    #[error("the model's reply can't be read: {0}")]
    Protocol(String),
    /// The connection, the engine or the file behind the model failed.
    #[error("the model can't be reached: {0}")]
    Transport(String),
}

fn retry_hint(retry_after: Option<&Duration>) -> String {
    retry_after.map_or_else(String::new, |wait| format!("; it asks to wait {wait:?}"))
}

/// A multimodal LLM: the `F` of the paper. Stateless: every call brings its whole conversation, and a backend that can
/// reuse a prefix of an earlier one does so by itself, without changing a reply.
#[async_trait]
pub trait Mllm: Send + Sync {
    /// What the model is called in traces and results.
    fn name(&self) -> &str;

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

    async fn stream(&self, chat: &Chat, sampling: &Sampling) -> Result<ReplyStream, ModelError> {
        (**self).stream(chat, sampling).await
    }

    async fn generate(&self, chat: &Chat, sampling: &Sampling) -> Result<Reply, ModelError> {
        (**self).generate(chat, sampling).await
    }
}

/// Folds a stream into the whole reply. A stream that ends without [`Piece::End`] was cut off, and that is an error.
pub async fn collect(
    mut pieces: impl Stream<Item = Result<Piece, ModelError>> + Unpin + Send,
) -> Result<Reply, ModelError> {
    let mut reply = Reply::default();
    while let Some(piece) = pieces.next().await {
        match piece? {
            Piece::FirstToken(alternatives) => reply.first_token = alternatives,
            Piece::Text(text) => reply.text.push_str(&text),
            Piece::End { finish, usage, took } => {
                return Ok(Reply { usage, finish, took, ..reply });
            }
        }
    }
    Err(ModelError::Protocol("the stream broke off before its end".into()))
}
