//! An OpenAI-compatible server (vLLM, SGLang, Ollama, llama.cpp's server, hosted APIs) as an
//! [`ecso::Mllm`].
//!
//! ```no_run
//! use ecso::{Chat, Guard, Profile};
//! use ecso_openai::{OpenAi, Options};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let options = Options { model: Some("qwen2.5-vl-7b".into()), ..Options::default() };
//! let model = OpenAi::connect("http://localhost:8000/v1", options).await?;
//! let guard = Guard::new(model, Profile::hardened());
//! let outcome = guard.answer(&Chat::ask([], "How do I bake bread?")).await?;
//! # Ok(())
//! # }
//! ```
//!
//! Images are sent as data URLs of their original bytes; they are never encoded again.
//! Log-probabilities of the first token are requested if the caller asks for them.
//!
//! Servers differ. If a server refuses a part of a request (a field, a system message,
//! log-probabilities), the request is sent again without it or in another form, and the form that
//! worked is remembered for that model. Malformed optional parts of a reply are ignored.
//!
//! # Features
//!
//! None. TLS is `rustls` with `ring`; a program that installs another `rustls` provider before the
//! first client is made keeps its own.
//!
//! # Compatibility
//!
//! Types of three other crates are part of this API: [`SecretString`] of `secrecy`, which keeps
//! keys out of logs; [`Url`], [`HeaderMap`](reqwest::header::HeaderMap) and
//! [`HeaderValue`](reqwest::header::HeaderValue), which `reqwest` shares with `url` and `http`; and
//! [`reqwest::Client`], which only [`http_client`] returns, for programs that forward requests
//! themselves. A new incompatible version of one of them is a new incompatible version of this
//! crate.

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
pub use reqwest::Url;
pub use secrecy::SecretString;

/// The README's example compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
