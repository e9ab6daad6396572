//! Integration tests of the data engine.
#![allow(clippy::unwrap_used, reason = "a test may")]

mod answers;
mod data;
mod inputs;
mod packed;
