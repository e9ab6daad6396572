//! Decoding in a process of its own, for formats that models don't read (HEIC, AVIF, PDF). A small
//! file may make its decoder use all memory and all time there is; the process has limits on both.
//! Without such a process, files are decoded in this one, which is for trusted files only.

use std::{
    error::Error,
    io::{self, Read, Write},
    path::PathBuf,
    process::{Command, Stdio},
    sync::OnceLock,
    thread,
    time::Duration,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use rlimit::Resource;
use serde::{Deserialize, Serialize};

use super::{
    Limits,
    foreign::{Converted, Foreign},
};

/// Longest time for a file.
const TIME_LIMIT: Duration = Duration::from_secs(30);
/// Most memory for a file, in GiB.
const MEMORY_GIB: u64 = 2;
/// The exit status of a process that reached its time limit.
const TIMED_OUT: i32 = 124;

/// The program that decodes, and its first argument.
static PROGRAM: OnceLock<(PathBuf, &'static str)> = OnceLock::new();

/// From now on, decodes with `program`. It is called with `argument` and one more argument, which
/// it must pass to [`main`]. Only the first call counts.
///
/// ```no_run
/// use ecso::decoder_process;
///
/// let mut arguments = std::env::args().skip(1);
/// if arguments.next().as_deref() == Some("decode-image") {
///     decoder_process::main(&arguments.next().unwrap_or_default())?;
/// } else {
///     decoder_process::decode_in(std::env::current_exe()?, "decode-image");
///     // …
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn decode_in(program: PathBuf, argument: &'static str) {
    let _ = PROGRAM.set((program, argument));
}

/// The output of the process.
#[derive(Serialize, Deserialize)]
enum Output {
    Converted { images: Vec<String>, incomplete: Vec<usize> },
    Failed(String),
}

/// Converts a file in the process; `None` if no program was named.
pub(super) fn convert(bytes: &[u8], limits: Limits) -> Option<Result<Converted, String>> {
    let (program, argument) = PROGRAM.get()?;
    let mut command = Command::new(program);
    command.arg(argument).arg(serde_json::to_string(&limits).unwrap_or_default());
    Some(run(command, bytes, limits))
}

fn run(mut command: Command, bytes: &[u8], limits: Limits) -> Result<Converted, String> {
    let failed = |error: io::Error| format!("its decoder process failed: {error}");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut process = command.spawn().map_err(failed)?;
    // The process reads all of its input before it writes. If it has ended early, its output or its
    // status says why.
    let _ = process.stdin.take().map(|mut input| input.write_all(bytes));
    let longest = u64::try_from(limits.bytes).unwrap_or(u64::MAX).saturating_mul(2);
    let mut written = Vec::new();
    let read = process.stdout.take().map(|output| output.take(longest).read_to_end(&mut written));
    let status = process.wait().map_err(failed)?;
    read.transpose().map_err(failed)?;
    match serde_json::from_slice(&written) {
        Ok(Output::Converted { images, incomplete }) => {
            let images: Result<_, _> =
                images.iter().map(|image| BASE64_STANDARD.decode(image)).collect();
            Ok(Converted {
                images: images.map_err(|error| format!("its decoder process failed: {error}"))?,
                incomplete,
            })
        }
        Ok(Output::Failed(reason)) => Err(reason),
        Err(_) if status.code() == Some(TIMED_OUT) => {
            Err(format!("it takes longer than {} seconds", TIME_LIMIT.as_secs()))
        }
        Err(_) => Err(format!("its decoder failed, or takes more than {MEMORY_GIB} GiB of memory")),
    }
}

/// The work of the process: reads a file from standard input and writes its images to standard
/// output. `limits` is the last argument of the program.
///
/// # Errors
/// If the arguments, the input or the output fail. Errors of the file are part of the output.
pub fn main(limits: &str) -> Result<(), Box<dyn Error>> {
    let limits: Limits = serde_json::from_str(limits)?;
    thread::spawn(|| {
        thread::sleep(TIME_LIMIT);
        std::process::exit(TIMED_OUT)
    });
    // Not every system has this limit, or enforces it.
    let _ = Resource::AS.set(MEMORY_GIB << 30, MEMORY_GIB << 30);
    let mut bytes = Vec::new();
    io::stdin().take(u64::try_from(limits.bytes)?).read_to_end(&mut bytes)?;
    let bytes = Bytes::from(bytes);
    let foreign = Foreign::of(&bytes).ok_or("it needs no decoding")?;
    let output = match foreign.convert(&bytes, limits) {
        Ok(Converted { images, incomplete }) => Output::Converted {
            images: images.iter().map(|image| BASE64_STANDARD.encode(image)).collect(),
            incomplete,
        },
        Err(reason) => Output::Failed(reason),
    };
    let mut stdout = io::stdout().lock();
    serde_json::to_writer(&mut stdout, &output)?;
    Ok(stdout.flush()?)
}
