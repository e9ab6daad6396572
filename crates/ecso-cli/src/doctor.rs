//! `ecso doctor`: checks whether this machine can run ecso.

use std::{path::Path, process::Command};

use anyhow::bail;
use ecso::{Chat, Role, Sampling, Turn};
use serde_json::json;

use crate::{
    backend,
    cli::{DoctorArgs, ProfileArgs},
    profiles,
    settings::{self, Settings},
};

/// The result of one check.
struct Check {
    name: &'static str,
    state: State,
    message: String,
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    Good,
    /// Limited, but ecso runs.
    Note,
    Bad,
}

impl State {
    fn word(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Note => "note",
            Self::Bad => "BAD",
        }
    }
}

pub(crate) fn run(args: &DoctorArgs, file: Option<&Path>) -> anyhow::Result<()> {
    let settings = settings::load(file, &args.model, &ProfileArgs::default())?;
    let checks = [
        check_processor(),
        check_memory(),
        check_engine(),
        check_models_folder(&settings),
        check_profile(&settings),
        check_pip(),
        check_model(&settings)?,
    ];
    if args.json {
        print_json(&checks)?;
    } else {
        println!("ecso {}", env!("CARGO_PKG_VERSION"));
        for check in &checks {
            println!("{:<4} {:<10} {}", check.state.word(), check.name, check.message);
        }
    }
    let failed = checks.iter().filter(|check| check.state == State::Bad).count();
    if failed > 0 {
        bail!("{failed} of {} checks failed", checks.len());
    }
    Ok(())
}

fn print_json(checks: &[Check]) -> anyhow::Result<()> {
    let row = |check: &Check| {
        json!({
            "check": check.name,
            "state": check.state.word(),
            "says": check.message,
        })
    };
    let rows: Vec<_> = checks.iter().map(row).collect();
    let report = json!({ "version": env!("CARGO_PKG_VERSION"), "checks": rows });
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(())
}

fn check_processor() -> Check {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let message = format!("{}, {cores} cores", std::env::consts::ARCH);
    Check { name: "processor", state: State::Good, message }
}

/// Checks the free memory, on Linux only.
fn check_memory() -> Check {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: Option<u64> = line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok());
    let (state, message) = match kib.map(|kib| kib / 1024) {
        Some(mib) if mib < 2560 => (State::Note, format!("{mib} MiB free; mini needs 2,560")),
        Some(mib) => (State::Good, format!("{mib} MiB free")),
        None => (State::Note, "unknown on this system".into()),
    };
    Check { name: "memory", state, message }
}

fn check_engine() -> Check {
    let (state, message) = if cfg!(feature = "engine") {
        (State::Good, "llama.cpp in this process")
    } else {
        (State::Note, "not in this build; models are reached by URL only")
    };
    Check { name: "engine", state, message: message.into() }
}

fn check_models_folder(settings: &Settings) -> Check {
    let folder = &settings.models_dir;
    let shown = folder.display();
    let probe = std::fs::create_dir_all(folder).and_then(|()| tempfile::tempfile_in(folder));
    let (state, message) = match probe {
        Ok(_) => (State::Good, format!("{shown} is writable")),
        Err(error) => (State::Bad, format!("{shown}: {error}; set models_dir in the settings")),
    };
    Check { name: "models", state, message }
}

fn check_profile(settings: &Settings) -> Check {
    let (state, message) = match profiles::load_with_reason(settings) {
        Ok((profile, Some(reason))) => (State::Good, format!("{}: {reason}", profile.name)),
        Ok((profile, None)) => (State::Good, profile.name),
        Err(error) => (State::Bad, format!("{error:#}")),
    };
    Check { name: "profile", state, message }
}

fn check_pip() -> Check {
    let pip = Command::new("python3").args(["-m", "pip", "--version"]).output();
    let (state, message) = match pip {
        Ok(output) if output.status.success() => {
            let version = String::from_utf8_lossy(&output.stdout);
            (State::Good, version.split(" from").next().unwrap_or("pip").to_owned())
        }
        _ => (State::Note, "no pip; models can be downloaded from the hub only".into()),
    };
    Check { name: "pip", state, message }
}

/// Opens the model, asks it one question, and closes it again.
fn check_model(settings: &Settings) -> anyhow::Result<Check> {
    let runtime = tokio::runtime::Runtime::new()?;
    let start = std::time::Instant::now();
    let asked = runtime.block_on(async {
        let model = backend::open(settings).await?;
        let turns = vec![Turn::text(Role::User, "Is the sky blue? Answer yes or no:")];
        let sampling = Sampling { max_tokens: Some(8), top_logprobs: 5, ..Sampling::default() };
        let reply = model.generate(&Chat { turns, ..Chat::default() }, &sampling).await?;
        anyhow::Ok((model.name().to_owned(), reply.first_token.is_empty()))
    });
    let ms = start.elapsed().as_millis();
    let (state, message) = match asked {
        Ok((name, false)) => {
            (State::Good, format!("{name} answers in {ms} ms, with log-probabilities"))
        }
        Ok((name, true)) => (
            State::Note,
            format!(
                "{name} answers in {ms} ms, without log-probabilities; `hardened` flags less \
                 without them"
            ),
        ),
        Err(error) => (State::Bad, format!("{}: {error:#}", settings.model)),
    };
    Ok(Check { name: "model", state, message })
}
