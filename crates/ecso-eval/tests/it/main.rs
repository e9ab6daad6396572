//! Benchmarks from their files to their figures.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may")]

mod layouts;
mod runs;
mod scores;

use std::path::PathBuf;

/// A folder of benchmark data; `None` says loudly that there is none.
fn data(folder: &str) -> Option<PathBuf> {
    let Some(data) = std::env::var_os("ECSO_TEST_DATA").map(PathBuf::from) else {
        eprintln!("skipped: ECSO_TEST_DATA names no folder with benchmark data");
        return None;
    };
    Some(data.join(folder))
}
