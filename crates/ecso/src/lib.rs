//! ECSO, "Eyes Closed, Safety On" (arXiv 2403.09572): protection of multimodal LLMs at inference
//! time, with no training and no second model.
//!
//! A multimodal LLM (MLLM) answers a query about an image. Image features let harmful requests slip
//! past the safety alignment of the language model inside it; yet it still recognises that its own
//! answer is harmful, and still refuses when the same request reaches it as text. ECSO uses both:
//! the file `paper.rs` shows how.
//!
//! ```
//! use ecso::{Chat, Guard, Image, Profile, Verdict, testing::Scripted};
//!
//! # futures::executor::block_on(async {
//! // A scripted model stands in for a real one: it answers, judges its answer, describes the
//! // image, and answers from the description.
//! let model = Scripted::texts(["Use raw eggs.", "Yes.", "A bowl of eggs.", "Boil the eggs."]);
//! let guard = Guard::new(model, Profile::paper());
//! let image = Image::from_url("https://example.org/eggs.png");
//! let outcome = guard.answer(&Chat::ask([image], "How do I eat these?")).await?;
//! assert_eq!((outcome.verdict, outcome.answer.as_str()), (Verdict::Unsafe, "Boil the eggs."));
//! # Ok::<(), ecso::GuardError>(())
//! # }).unwrap();
//! ```
//!
//! - [`Guard`] answers chats, or reviews existing answers. [`Guard::builder`] sets it up.
//! - [`Mllm`] is the model behind it: bring your own, or take one from `ecso-openai`, `ecso-llama`
//!   or `ecso-reader`.
//! - [`Profile`] holds every choice on which the paper, its published code and other
//!   implementations differ: [`Profile::paper`] is the published method, as above;
//!   [`Profile::hardened`] finds more. [`Calibration`] fits one to a model.
//! - [`Outcome`] is the answer with its [`Verdict`] and a [`Trace`] of every call.
//!
//! Nothing here speaks HTTP or runs a model. The folder `examples/` has a backend, a detector,
//! streaming and a batch.
//!
//! # Features
//!
//! None is on by default. Each adds a format that [`Image`] reads, with decoders in Rust alone:
//!
//! - `heic`: photos in HEIC, as telephones take them. HEVC, the codec within, is covered by patents
//!   in some countries.
//! - `avif`: pictures in AVIF.
//! - `pdf`: the pages of PDF files, as images.
//!
//! Programs that read such files from strangers should decode them in a separate process:
//! [`decoder_process`].
//!
//! # Errors
//!
//! A failure is never a verdict: a step that fails ends the answer with a [`GuardError`]. Every
//! error says all that is known in its own text, and keeps the error that it came from as its
//! source; [`error_chain`] writes both on one line.
//!
//! # Compatibility
//!
//! Types that may grow are `#[non_exhaustive]`. The structs that callers fill in ([`Chat`],
//! [`Turn`], [`Sampling`], [`Reply`], [`Usage`], [`TopLogprob`], [`Limits`], [`ImageText`], and
//! those of [`calibration`]) are not, so that they can be written in full, most of them with
//! `..Default::default()`; a new field there comes with a new 0.x version.
//!
//! Few types of other crates are part of this API: [`bytes::Bytes`] (encoded images and pixels,
//! shared without a copy), [`futures::Stream`] (replies and events), `async_trait` (the trait
//! [`Mllm`]), and `serde_json`'s maps (request fields that are sent as they are). A new
//! incompatible version of one of them is a new incompatible version of this crate.

pub mod calibration;
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
mod reasoning;
mod refusal;
mod template;
pub mod testing;
mod trace;
mod verdict;
mod yes_or_no;

pub use calibration::{Calibration, CalibrationError};
pub use chat::{BlindChat, Chat, Part, Role, Turn};
// For the other crates here; no part of the promised API.
#[doc(hidden)]
pub use concurrent::with_background;
pub use data_url::{decode_base64, decode_data_url, is_data_url};
pub use guard::{CheckedDraft, Guard, GuardBuilder};
pub use image::{Digest, Image, ImageError, Limits, Pixels, Truncated, decoder_process};
pub use memory::Memory;
pub use mllm::{
    Cause, Delta, FinishReason, ImageText, Mllm, ModelError, Reply, ReplyStream, Sampling,
    TopLogprob, Usage, collect, error_chain,
};
pub use pipeline::RequestCheck;
pub use profile::{Profile, ProfileError};
pub use reasoning::without_reasoning;
pub use refusal::is_refusal;
pub use template::Template;
pub use trace::{Event, GuardError, Outcome, Step, Trace};
pub use verdict::{Parser, Verdict, yes_probability};
pub use yes_or_no::{Subject, ended_before_answer, final_answer, verdict_text, yes_or_no};

/// The README's example compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
