//! A text reader (`PP-OCRv6` through `RTen`, pure Rust), a tagger of photographs
//! (`EfficientNet-Lite0`), and [`Composed`], which puts them in front of any text model.
//!
//! A composed model (Socratic Models, arXiv 2204.00598) knows of an image what its reader reads:
//! the text in it. It can judge harm that is written in an image. Of pixels it knows at most a few
//! words for what a photograph shows, out of 1,000 classes; there are no people among them.

mod boxes;
mod composed;
mod picture;
mod reader;
mod tagger;

pub use boxes::Line;
pub use composed::Composed;
pub use reader::{Page, Reader, ReaderError};
pub use tagger::{Tag, Tagger, TaggerError};
