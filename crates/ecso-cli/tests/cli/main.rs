//! Tests that run the program as users do.
#![allow(clippy::unwrap_used, clippy::print_stderr, clippy::too_many_lines, reason = "a test may")]

mod ask;
mod bench;
mod eval;
mod eval_run;
#[cfg(feature = "pdf")]
mod foreign;
mod mock;
mod models;
mod operations;
mod playground;
mod serve;
mod servers;
mod settings;
mod siege;
mod synth;
mod upstream;

use std::path::Path;

use assert_cmd::Command;

/// The program with its own home folder, without the settings and models of this machine.
fn ecso(home: &Path) -> Command {
    let mut command = Command::cargo_bin("ecso").unwrap();
    command.env_clear().env("HOME", home).env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}
