//! The program `ecso`, as a library so that its parts can be tested; `main.rs` only calls [`main`].
//!
//! Modules import in one direction: `cli` describes the command line, `settings` loads the
//! settings, `backend` opens the model, `calibration` and `profiles` find the profile, and the
//! commands use these.
#![expect(clippy::print_stdout, reason = "the program prints its results")]

/// Prints a line to standard error. If that fails, the work continues.
macro_rules! say {
    ($($argument:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($argument)*);
    }};
}

mod ask;
mod backend;
mod bench;
mod calibration;
mod cli;
mod config;
mod doctor;
mod error;
mod eval;
mod files;
mod images;
pub mod library;
mod models;
mod profiles;
mod progress;
mod replay;
mod serve;
mod settings;
mod synth;
mod telemetry;
mod tune;
mod worker;

use std::{ffi::OsString, io::Write as _, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::{CommandFactory, Parser};
use cli::{Cli, Command, ConfigCommand};

/// Runs the program. Its exit codes are documented in `ecso --help`.
#[must_use]
pub fn main() -> ExitCode {
    #[cfg(all(unix, feature = "engine"))]
    limit_spinning();
    main_as(std::env::current_exe().ok(), std::env::args_os()).into()
}

/// Limits how long the engine's threads spin, so that processes can share the processors. OpenMP's
/// threads spin while they wait for each other, by default for so long that two processes with the
/// engine on one machine are ten times slower each (measured in bench/README.md). The limit is read
/// from the environment when a program is loaded, so the program starts itself once more, as the
/// same process. Does nothing if the user has set one of these variables.
#[cfg(all(unix, feature = "engine"))]
fn limit_spinning() {
    use std::{env, os::unix::process::CommandExt as _, process::Command};

    let is_set =
        ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"].iter().any(|name| env::var_os(name).is_some());
    let mut arguments = env::args_os();
    if let (false, Ok(program), Some(name)) = (is_set, env::current_exe(), arguments.next()) {
        // This returns only if it fails. Then the program runs without the limit.
        let _ =
            Command::new(program).arg0(name).args(arguments).env("GOMP_SPINCOUNT", "2000").exec();
    }
}

/// Runs the program with these arguments, of which the first is its name. `program` is the
/// executable to call for work in a separate process. Returns the exit code.
pub fn main_as(program: Option<PathBuf>, arguments: impl IntoIterator<Item = OsString>) -> u8 {
    exit_on_closed_stdout();
    let code = run_as(program, arguments);
    match std::io::stdout().flush() {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            say!("ecso: standard output: {error}");
            1
        }
        _ => code,
    }
}

/// Makes the program exit quietly when the reader of its output closes the pipe, as in
/// `ecso eval list | head`. Other errors of standard output, such as a full disk, stay errors.
fn exit_on_closed_stdout() {
    let default_hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let message = panic.payload().downcast_ref::<String>().map_or("", String::as_str);
        match message.strip_prefix("failed printing to stdout: ") {
            Some(cause) if cause.starts_with("Broken pipe") => std::process::exit(0),
            Some(cause) => {
                say!("ecso: standard output: {cause}");
                std::process::exit(1);
            }
            None => default_hook(panic),
        }
    }));
}

fn run_as(program: Option<PathBuf>, arguments: impl IntoIterator<Item = OsString>) -> u8 {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return u8::try_from(error.exit_code()).unwrap_or(2);
        }
    };
    if let Some(program) = program {
        ecso::decoder_process::decode_in(program, "decode-image");
    }
    let is_helper_process = matches!(cli.command, Command::DecodeImage { .. });
    let _telemetry = (!is_helper_process).then(telemetry::start);
    match run(cli) {
        Ok(()) => 0,
        Err(error) => {
            say!("ecso: {}", ecso::error_chain(error.as_ref()));
            error::exit_code(&error)
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
            let opens_browser = !args.no_open;
            serve::run(&args.into(), file, opens_browser)
        }
        Command::Replay(args) => replay::run(&args, file),
        Command::Key { name } => {
            serve::print_key(&name);
            Ok(())
        }
        Command::DecodeImage { limits } => ecso::decoder_process::main(&limits)
            .map_err(|error| anyhow::anyhow!("decode-image: {error}")),
        Command::Doctor(args) => doctor::run(&args, file),
        Command::Config(ConfigCommand::Show { model, profile }) => {
            config::show(file, &model, &profile)
        }
        Command::Completions { shell } => {
            // It panics if it can't write.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "ecso", &mut script);
            print!("{}", String::from_utf8_lossy(&script));
            Ok(())
        }
        Command::Manual { folder } => std::fs::create_dir_all(&folder)
            .and_then(|()| clap_mangen::generate_to(Cli::command(), &folder))
            .with_context(|| format!("{}: the manual can't be written", folder.display())),
    }
}
