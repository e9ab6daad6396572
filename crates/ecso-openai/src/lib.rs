//! An OpenAI-compatible server (vLLM, SGLang, Ollama, llama.cpp's server, hosted APIs) as an
//! [`ecso::Mllm`].
//!
//! Images go out as data URLs of the bytes that came in, never encoded again. Log-probabilities of
//! the first token are asked for where a caller wants them.
//!
//! Servers differ. What one refuses (a field, a system message, log-probabilities) is done
//! otherwise in the same step, and remembered for that model; what it sends amiss in a reply is
//! passed over where it was only wished for.

mod base;
mod client;
mod complaint;
mod connect;
mod fetch;
pub mod lenient;
mod options;
mod quirks;
mod reply;
mod request;
mod search;
mod stream;
pub mod surrogates;

pub use client::OpenAi;
pub use connect::{Bodies, http_client, install_provider};
pub use fetch::{FetchError, Fetcher};
pub use options::{MaxTokensField, Options};
