//! The program `ecso`, as a library so that its parts can be tested: `main.rs` only calls [`main`].
#![expect(clippy::print_stdout, reason = "this is the program that speaks to people")]

/// Tells the user something, on standard error. Where nobody reads that any more, the work goes on.
macro_rules! say {
    ($($told:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($told)*);
    }};
}

mod ask;
mod bench;
mod calibration;
mod cli;
mod config;
mod doctor;
mod eval;
pub mod library;
mod models;
mod open;
mod progress;
mod replay;
mod serve;
mod synth;
mod telemetry;
mod tune;
mod work;

use std::{ffi::OsString, io::Write as _, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::{CommandFactory, Parser};
use cli::{Cli, Command, ConfigCommand};
use ecso_batch::journal::JournalError;
use ecso_data::run::RunError;

/// Runs the program; its exit code is documented in `ecso --help`.
#[must_use]
pub fn main() -> ExitCode {
    main_as(std::env::current_exe().ok(), std::env::args_os()).into()
}

/// The same for `program`, the file that is called for it, and its arguments, of which the first is its name. Gives the exit code.
pub fn main_as(program: Option<PathBuf>, arguments: impl IntoIterator<Item = OsString>) -> u8 {
    ends_with_its_reader();
    let code = run_as(program, arguments);
    match std::io::stdout().flush() {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            say!("ecso: standard output: {error}");
            1
        }
        _ => code,
    }
}

/// Who reads no further (`ecso eval list | head`) has what they want: no panic, and no error. A full disk is an error.
fn ends_with_its_reader() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let said = panic.payload().downcast_ref::<String>().map_or("", String::as_str);
        match said.strip_prefix("failed printing to stdout: ") {
            Some(cause) if cause.starts_with("Broken pipe") => std::process::exit(0),
            Some(cause) => {
                say!("ecso: standard output: {cause}");
                std::process::exit(1);
            }
            None => usual(panic),
        }
    }));
}

fn run_as(program: Option<PathBuf>, arguments: impl IntoIterator<Item = OsString>) -> u8 {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(told) => {
            let _ = told.print();
            return u8::try_from(told.exit_code()).unwrap_or(2);
        }
    };
    if let Some(program) = program {
        ecso::apart::decode_in(program, "decode-image");
    }
    let is_helper = matches!(cli.command, Command::DecodeImage { .. });
    let _telemetry = (!is_helper).then(telemetry::start);
    match run(cli) {
        Ok(()) => 0,
        Err(error) => {
            say!("ecso: {}", ecso::chain(error.as_ref()));
            exit_code(&error)
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    let file = cli.config.as_deref();
    match cli.command {
        Command::Ask(args) => ask::run(&args, file),
        Command::Eval(command) => eval::run(&command, file),
        Command::Models(command) => models::run(command, file),
        Command::Synth(args) => synth::run(&args, file),
        Command::Bench(args) => bench::run(&args, file),
        Command::Tune(args) => tune::run(&args, file),
        Command::Serve(args) => serve::run(&args, file, false),
        Command::Playground(args) => {
            let (opens, args) = args.serve();
            serve::run(&args, file, opens)
        }
        Command::Replay(args) => replay::run(&args, file),
        Command::Key { name } => {
            serve::key(&name);
            Ok(())
        }
        Command::DecodeImage { limits } => {
            ecso::apart::main(&limits).map_err(|error| anyhow::anyhow!("decode-image: {error}"))
        }
        Command::Doctor { json } => doctor::run(json, file),
        Command::Config(ConfigCommand::Show { model, profile }) => config::show(file, &model, &profile),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "ecso", &mut std::io::stdout());
            Ok(())
        }
        Command::Manual { folder } => std::fs::create_dir_all(&folder)
            .and_then(|()| clap_mangen::generate_to(Cli::command(), &folder))
            .with_context(|| format!("{}: the manual can't be written", folder.display())),
    }
}

/// What was asked for can't be done as it was asked: a wrong flag, setting, profile or input file.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct UsageError(String);

impl UsageError {
    /// That of an error, told with its causes.
    fn of(error: impl std::error::Error + 'static) -> Self {
        Self(ecso::chain(&error))
    }
}

fn exit_code(error: &anyhow::Error) -> u8 {
    let of_a_journal = match error.downcast_ref() {
        Some(RunError::Journal(error)) => Some(error),
        _ => error.downcast_ref::<JournalError>(),
    };
    let is_misuse = error.is::<UsageError>()
        || error.is::<ecso::ProfileError>()
        || error.is::<ecso::ImageError>()
        || of_a_journal.is_some_and(JournalError::is_misuse);
    match () {
        () if error.is::<ecso::GuardError>() || error.is::<ecso::ModelError>() => 3,
        () if error.is::<work::Stopped>() => 130,
        () if is_misuse => 2,
        () => 1,
    }
}
