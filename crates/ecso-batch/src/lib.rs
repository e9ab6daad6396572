//! Long work over many rows, as measuring and making data have it in common.
//!
//! - [`run`] takes rows through a [`Batch`], several at once, within [`Bounds`]; [`entries`] does
//!   it without a journal.
//! - A [`journal`] records what became of each, so that a crash costs the rows under way and no
//!   other.
//! - [`Cached`] keeps every reply of a model on disk, and [`Paced`] asks it no faster than it can.

mod cache;
pub mod journal;
mod pace;
mod runner;

pub use cache::{Cached, Work, check_cache};
pub use pace::{Paced, Patience, Stays};
pub use runner::{Batch, Bounds, Sifted, entries, run};
