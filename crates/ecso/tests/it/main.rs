//! The method from outside: what is sent, in which order, with which images.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod beginnings;
mod doors;
mod foreign;
mod hardened;
mod method;
mod paper;
