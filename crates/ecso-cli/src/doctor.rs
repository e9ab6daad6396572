//! `ecso doctor`: whether this machine has what ecso needs.

use std::{path::Path, process::Command};

use anyhow::bail;
use serde_json::json;

use crate::{
    cli::{ModelArgs, ProfileArgs},
    config::{self, Settings},
    open,
};

/// One thing that was looked at.
struct Check {
    name: &'static str,
    state: State,
    says: String,
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    Good,
    /// Works without it.
    Note,
    Bad,
}

pub(crate) fn run(as_json: bool, file: Option<&Path>) -> anyhow::Result<()> {
    let settings = config::load(file, &ModelArgs::default(), &ProfileArgs::default())?;
    let checks = [
        processor(),
        memory(),
        engine(),
        folder(&settings),
        profile(&settings),
        python(),
        model(&settings)?,
    ];
    if as_json {
        let rows: Vec<_> = checks
            .iter()
            .map(|check| json!({ "check": check.name, "state": word(check.state), "says": check.says }))
            .collect();
        println!(
            "{}",
            serde_json::to_string_pretty(
                &json!({ "version": env!("CARGO_PKG_VERSION"), "checks": rows })
            )?
        );
    } else {
        println!("ecso {}", env!("CARGO_PKG_VERSION"));
        for check in &checks {
            println!("{:<4} {:<10} {}", word(check.state), check.name, check.says);
        }
    }
    let bad = checks.iter().filter(|check| check.state == State::Bad).count();
    if bad > 0 {
        bail!("{bad} of {} checks failed", checks.len());
    }
    Ok(())
}

fn word(state: State) -> &'static str {
    match state {
        State::Good => "good",
        State::Note => "note",
        State::Bad => "BAD",
    }
}

fn processor() -> Check {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let says = format!("{}, {cores} cores", std::env::consts::ARCH);
    Check { name: "processor", state: State::Good, says }
}

/// Linux tells; elsewhere it is not looked at.
fn memory() -> Check {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: Option<u64> = line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok());
    let (state, says) = match kib.map(|kib| kib / 1024) {
        Some(mib) if mib < 2560 => (State::Note, format!("{mib} MiB free; mini wants 2,560")),
        Some(mib) => (State::Good, format!("{mib} MiB free")),
        None => (State::Note, "not known on this system".into()),
    };
    Check { name: "memory", state, says }
}

fn engine() -> Check {
    let (state, says) = if cfg!(feature = "engine") {
        (State::Good, "llama.cpp in this process")
    } else {
        (State::Note, "built without; models are reached by URL only")
    };
    Check { name: "engine", state, says: says.into() }
}

fn folder(settings: &Settings) -> Check {
    let folder = &settings.models_dir;
    let shown = folder.display();
    let probe = std::fs::create_dir_all(folder).and_then(|()| tempfile::tempfile_in(folder));
    let (state, says) = match probe {
        Ok(_) => (State::Good, format!("{shown} can be written")),
        Err(error) => (State::Bad, format!("{shown}: {error}; set models_dir in the settings")),
    };
    Check { name: "models", state, says }
}

fn profile(settings: &Settings) -> Check {
    let (state, says) = match config::profile(settings) {
        Ok(profile) => (State::Good, profile.name),
        Err(error) => (State::Bad, format!("{error:#}")),
    };
    Check { name: "profile", state, says }
}

fn python() -> Check {
    let pip = Command::new("python3").args(["-m", "pip", "--version"]).output();
    let (state, says) = match pip {
        Ok(output) if output.status.success() => (
            State::Good,
            String::from_utf8_lossy(&output.stdout)
                .split(" from")
                .next()
                .unwrap_or("pip")
                .to_owned(),
        ),
        _ => (State::Note, "no pip; models come from the hub only".into()),
    };
    Check { name: "pip", state, says }
}

/// Opens the model and closes it again.
fn model(settings: &Settings) -> anyhow::Result<Check> {
    let runtime = tokio::runtime::Runtime::new()?;
    let begun = std::time::Instant::now();
    let (state, says) = match runtime.block_on(open::model(settings)) {
        Ok(model) => {
            (State::Good, format!("{} opens in {} ms", model.name(), begun.elapsed().as_millis()))
        }
        Err(error) => (State::Bad, format!("{}: {error:#}", settings.model)),
    };
    Ok(Check { name: "model", state, says })
}
