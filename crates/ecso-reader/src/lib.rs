//! A text reader (`PP-OCRv6`, run by `RTen` in pure Rust), a tagger of photographs
//! (`EfficientNet-Lite0`), and [`Composed`], which puts both in front of any text model.
//!
//! A composed model (Socratic Models, arXiv 2204.00598) knows only the text in an image, as the
//! reader reads it. So it can judge harm that is written in an image. About photographs it knows at
//! most a few words, out of 1,000 classes, none of which are people.
//!
//! ```no_run
//! use std::path::Path;
//!
//! use ecso::Mllm;
//! use ecso_reader::{Composed, Reader, Tagger};
//!
//! # fn example(text_model: impl Mllm) -> Result<(), Box<dyn std::error::Error>> {
//! let reader = Reader::load(
//!     Path::new("detector.rten"),
//!     Path::new("recogniser.rten"),
//!     Path::new("dictionary.txt"),
//! )?;
//! let tagger = Tagger::load(Path::new("efficientnet-lite0.f32"))?;
//! let model = Composed::new(reader, text_model, "reader+text").with_tagger(tagger);
//! # Ok(())
//! # }
//! ```
//!
//! There are no Cargo features.

mod boxes;
mod composed;
mod picture;
mod reader;
mod tagger;

pub use boxes::Line;
pub use composed::Composed;
pub use reader::{Page, Reader, ReaderError};
pub use tagger::{Tag, Tagger, TaggerError};
