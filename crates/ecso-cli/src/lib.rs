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

use clap::{CommandFactory, Parser};
use cli::{Cli, Command, ConfigCommand};
use ecso_batch::journal::JournalError;
use ecso_data::run::RunError;

/// Runs the program; its exit code is documented in `ecso --help`.
#[must_use]
pub fn main() -> ExitCode {
    #[cfg(all(unix, feature = "engine"))]
    share_processors();
    main_as(std::env::current_exe().ok(), std::env::args_os()).into()
}

/// Lets the engine share its processors. OpenMP's threads spin while they wait for each other, by
/// default for so long that two processes with the engine on one machine are ten times slower each
/// (measured in bench/README.md). The limit is read from the environment when a program is loaded,
/// so the program starts itself once more, as the same process. Whoever sets one of these variables
/// decides.
#[cfg(all(unix, feature = "engine"))]
fn share_processors() {
    use std::{env, os::unix::process::CommandExt as _, process::Command};

    let is_decided =
        ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"].iter().any(|name| env::var_os(name).is_some());
    let mut arguments = env::args_os();
    if let (false, Ok(program), Some(name)) = (is_decided, env::current_exe(), arguments.next()) {
        // This returns only if it fails. Then everything works as well, but for the sharing.
        let _ =
            Command::new(program).arg0(name).args(arguments).env("GOMP_SPINCOUNT", "2000").exec();
    }
}

/// The same for `program`, the file that is called for it, and its arguments, of which the first is
/// its name. Gives the exit code.
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

/// Who reads no further (`ecso eval list | head`) has what they want: no panic, and no error. A
/// full disk is an error.
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
        ecso::decoder_process::decode_in(program, "decode-image");
    }
    let is_helper = matches!(cli.command, Command::DecodeImage { .. });
    let _telemetry = (!is_helper).then(telemetry::start);
    match run(cli) {
        Ok(()) => 0,
        Err(error) => {
            say!("ecso: {}", ecso::error_chain(error.as_ref()));
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
        Command::DecodeImage { limits } => ecso::decoder_process::main(&limits)
            .map_err(|error| anyhow::anyhow!("decode-image: {error}")),
        Command::Doctor { json } => doctor::run(json, file),
        Command::Config(ConfigCommand::Show { model, profile }) => {
            config::show(file, &model, &profile)
        }
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "ecso", &mut std::io::stdout());
            Ok(())
        }
    }
}

/// What was asked for can't be done as it was asked: a wrong flag, setting, profile or input file.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct UsageError(String);

impl UsageError {
    /// That of an error, told with its causes.
    fn of(error: impl std::error::Error + 'static) -> Self {
        Self(ecso::error_chain(&error))
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
