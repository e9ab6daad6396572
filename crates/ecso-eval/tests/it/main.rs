//! Benchmarks from their files to their figures.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may")]

mod layouts;
mod runs;
mod scores;

use std::path::{Path, PathBuf};

use ecso_batch::journal::JournalReader;
use ecso_eval::record::{ItemRecord, RunHeader, Selection};

/// A folder of benchmark data; `None` says loudly that there is none.
fn data(folder: &str) -> Option<PathBuf> {
    let Some(data) = std::env::var_os("ECSO_TEST_DATA").map(PathBuf::from) else {
        eprintln!("skipped: ECSO_TEST_DATA names no folder with benchmark data");
        return None;
    };
    Some(data.join(folder))
}

/// The header of a run of a scripted model over all items, under no profile.
fn header(benchmark: &str, data: &Path) -> RunHeader {
    RunHeader {
        ecso: "0".into(),
        benchmark: benchmark.into(),
        variant: None,
        data: data.to_owned(),
        model: "scripted".into(),
        model_digest: "d".into(),
        server: None,
        profiles: Vec::new(),
        max_new_tokens: None,
        choice: Selection::default(),
        items: None,
    }
}

/// The records of a run, the last of each item.
fn records(run: &Path) -> Vec<ItemRecord> {
    JournalReader::in_folder(run).latest().unwrap().map(Result::unwrap).collect()
}
