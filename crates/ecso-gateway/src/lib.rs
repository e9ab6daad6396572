//! The guard as a server: what `ecso serve` runs.
//!
//! It stands in front of an OpenAI-compatible server (or of a model in this process) and speaks the same language. A
//! chat with an image is answered by the model, judged, and answered anew with eyes closed if need be; **no text of an
//! answer reaches the client before its verdict**. Everything else passes through.
//!
//! The way of a request: [`server`] routes it; `access` says who calls; `probe` looks whether it is to be guarded;
//! `request` reads it; `upstream` gets the draft; `draft` says what a model said, wherever it said it; `chat` judges
//! and writes the answer; `failure` is everything that can go wrong, as the client sees it. `door` and `moderation`
//! judge on demand.

mod access;
pub mod audit;
mod chat;
mod cors;
mod door;
mod draft;
mod failure;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod live;
mod metrics;
mod moderation;
mod observe;
mod openapi;
mod probe;
pub mod replay;
mod request;
pub mod server;
pub mod settings;
mod telemetry;
mod upstream;
mod visit;

pub use server::{Gateway, serve};
pub use settings::Settings;
pub use upstream::{Checks, Upstream};
