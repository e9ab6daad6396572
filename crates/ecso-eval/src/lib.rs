//! The evaluation harness: measures what the protection of an MLLM gains and what it costs.
//!
//! 1. A [`benchmarks::Benchmark`] reads its official layout and returns [`item::Item`]s.
//! 2. [`run::run`] answers each item without the guard and under every profile (the draft is
//!    generated once), and records the answers in a journal of [`record`]s.
//! 3. A [`judge::Judge`] rules on the answers, independently of running.
//! 4. [`summary`] turns both into rates with intervals, using the statistics in [`stats`];
//!    [`report`] presents them.

pub mod advise;
mod assessment;
mod benchmark_scores;
pub mod benchmarks;
pub mod calibrate;
pub mod compare;
pub mod evasions;
pub mod item;
pub mod judge;
pub mod judged_run;
mod parquet;
pub mod prepare;
pub mod record;
pub mod report;
pub mod run;
pub mod run_set;
pub mod stats;
pub mod summary;
#[cfg(test)]
mod testing;
pub mod text;
pub mod tune;
pub mod typographic;
pub mod verdicts;
