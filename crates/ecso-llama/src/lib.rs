//! llama.cpp in this process as an [`ecso::Mllm`]: any GGUF text model, and any vision model with
//! its projector (mmproj).
//!
//! The engine runs on a thread of its own, behind a channel. Several requests run at the same time
//! ([`Options::slots`]): their prompts are computed in turn, their replies together. Dropping a
//! reply stream stops its work at the next block of tokens.
//!
//! A prefix that a new prompt shares with an earlier one, including its images, is not computed
//! again. That never changes a reply: prompts are always computed in the same blocks (see
//! `layout.rs`), so a shared prefix gives bit-identical logits, whatever else runs. The first token
//! of a reply, from which verdicts are read, depends on nothing but its prompt; later tokens are
//! computed together with those of other replies, which can change a close choice. The prefixes
//! that all of a guard's questions begin with can also be kept on disk
//! ([`Options::prefix_folder`]).
//!
//! ```ignore
//! let model = ecso_llama::Llama::load("model.gguf", ecso_llama::Options::default()).await?;
//! let guard = ecso::Guard::new(model, ecso::Profile::hardened());
//! ```
//!
//! # Features
//!
//! None is on by default: the engine runs on the CPU. `cuda` runs it on NVIDIA GPUs (needs the CUDA
//! toolkit), `metal` on Apple GPUs, `vulkan` on any GPU with Vulkan (needs its SDK).

mod cache;
mod engine;
mod layout;
mod llama;
mod prefixes;
mod reply;
mod schedule;
mod template;
pub mod testing;

pub use llama::{Llama, Options};
