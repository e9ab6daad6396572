//! llama.cpp in this process as an [`ecso::Mllm`]: any GGUF text model, and any vision model with
//! its projector (mmproj).
//!
//! The engine runs on a thread of its own, behind a channel, one request after the other; dropping
//! a reply stream stops its work at the next block of tokens. What a new prompt shares with an
//! earlier one, images included, is not computed again. That never changes a reply: prompts are
//! always computed in the same blocks (see `layout.rs`), so a shared prefix gives the same logits
//! to the last bit. The heads of prompts that a guard always sends are kept on disk too, where a
//! folder is given for them.
//!
//! # Features
//!
//! None is on by default: the engine runs on the CPU. `cuda` runs it on NVIDIA GPUs (needs the CUDA
//! toolkit), `metal` on Apple GPUs, `vulkan` on any GPU with Vulkan (needs its SDK).

mod cache;
mod engine;
mod heads;
mod layout;
mod template;
pub mod testing;

pub use engine::{Llama, Options};
