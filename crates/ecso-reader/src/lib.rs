//! A text reader (`PP-OCRv6` through `RTen`, pure Rust) and [`Composed`], which puts it in front of any text model.
//!
//! A composed model (Socratic Models, arXiv 2204.00598) knows of an image what its reader reads: the text in it. It
//! can judge harm that is written in an image; of pixels without text it knows nothing, and says so.

mod boxes;
mod composed;
mod reader;

pub use boxes::Line;
pub use composed::Composed;
pub use reader::{Page, Reader, ReaderError};
