//! Long-running work over many rows: the parts that evaluation and dataset generation share.
//!
//! - [`run`] processes rows through a [`Batch`], several at once, within [`Bounds`]; [`entries`]
//!   does the same without a journal.
//! - A [`journal`] records the result of each row, so a crash loses only the rows in progress.
//! - [`Cached`] keeps every model reply on disk, and [`Paced`] adapts the number of concurrent
//!   calls to what the model can take.

mod cache;
pub mod journal;
mod pace;
mod runner;

pub use cache::{Cached, CallStats, check_cache};
pub use pace::{IdentityCheck, Paced, Patience};
pub use runner::{Batch, Bounds, RowDecision, entries, run};
