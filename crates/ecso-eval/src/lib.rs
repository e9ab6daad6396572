//! The evaluation harness: what the protection of an MLLM gains and what it costs.
//!
//! 1. A [`benchmarks::Benchmark`] reads its official layout and gives [`item::Item`]s.
//! 2. [`run::run`] answers each item unguarded and under every profile (the draft is made once),
//!    and records it in a journal of [`record`]s.
//! 3. A [`judge::Judge`] rules on the answers, apart from running.
//! 4. [`summary`] makes rates with intervals of both, [`stats`] has the arithmetic, [`report`]
//!    shows them.

pub mod advice;
pub mod benchmarks;
pub mod calibrate;
pub mod evasions;
pub mod item;
pub mod judge;
pub mod judged;
pub mod judging;
mod parquet;
pub mod prepare;
pub mod record;
pub mod report;
pub mod run;
mod scores;
mod standing;
pub mod stats;
pub mod summary;
pub mod text;
pub mod together;
pub mod tune;
pub mod typographic;
pub mod verdicts;
