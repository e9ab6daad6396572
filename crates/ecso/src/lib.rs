//! ECSO, "Eyes Closed, Safety On" (arXiv 2403.09572): protection of multimodal LLMs at inference
//! time, with no training and no second model.
//!
//! A multimodal LLM (MLLM) answers a query about an image. Image features let harmful requests slip
//! past the safety alignment of the language model inside it; yet it still recognises that its own
//! answer is harmful, and still refuses when the same request reaches it as text. ECSO uses both:
//! the file `paper.rs` shows how.
//!
//! - [`Guard`] is what you call; [`Mllm`] is what you bring (or take from `ecso-openai`,
//!   `ecso-llama`, `ecso-reader`).
//! - [`Profile`] holds everything in which the paper, its published code and others differ.
//! - [`Outcome`] is the answer with its [`Verdict`] and a [`Trace`] of every call.
//!
//! Nothing here speaks HTTP or runs a model.

mod chat;
mod concurrent;
mod data_url;
mod guard;
mod hardened;
mod image;
mod memory;
mod mllm;
mod paper;
mod pipeline;
pub mod profile;
mod prompt;
mod refusal;
mod template;
pub mod testing;
mod trace;
mod verdict;

pub use chat::{BlindChat, Chat, Part, Role, Turn};
pub use concurrent::with_background;
pub use data_url::{decode_base64, decode_data_url, is_data_url};
pub use guard::{CheckedDraft, Guard};
pub use image::{Image, ImageError, Limits, Truncated, apart};
pub use memory::Memory;
pub use mllm::{
    Cause, Delta, FinishReason, ImageText, Mllm, ModelError, Reply, ReplyStream, Sampling,
    TopLogprob, Usage, chain, collect,
};
pub use pipeline::RequestCheck;
pub use profile::{Profile, ProfileError};
pub use refusal::declines;
pub use template::Template;
pub use trace::{Event, GuardError, Outcome, Step, Trace};
pub use verdict::{
    Asks, Parser, Verdict, bare, broke_off, harm_score, spoken, without_reasoning, yes_or_no,
};
