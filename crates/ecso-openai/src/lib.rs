//! An OpenAI-compatible server (vLLM, SGLang, Ollama, llama.cpp's server, hosted APIs) as an [`ecso::Mllm`].
//!
//! Images go out as data URLs of the bytes that came in, never encoded again. Log-probabilities of the first token are
//! asked for where a caller wants them; a server that answers 400 to that is asked once more without, and remembered.

mod client;
mod fetch;
mod wire;

pub use client::{OpenAi, Options, install_provider};
pub use fetch::{FetchError, Fetcher};
