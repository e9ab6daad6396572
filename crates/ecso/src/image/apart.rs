//! Decoding of what models don't read in a process of its own. A small file may ask its decoder for
//! all memory and all time there is; what must be bounded by force is bounded there. Without it
//! files are decoded in this process, which is for files that one trusts.

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
const PATIENCE: Duration = Duration::from_secs(30);
/// Most memory for a file, in GiB.
const MEMORY: u64 = 2;
/// How the process ends when its time is over.
const LATE: i32 = 124;

/// The program that decodes, with its first argument.
static PROGRAM: OnceLock<(PathBuf, &'static str)> = OnceLock::new();

/// From now on files that must be made into images are decoded by `program`, which is called with
/// `argument` and one more, and calls [`main`] with that. Only the first call counts.
pub fn decode_in(program: PathBuf, argument: &'static str) {
    let _ = PROGRAM.set((program, argument));
}

/// What the process says.
#[derive(Serialize, Deserialize)]
enum Said {
    Converted { images: Vec<String>, incomplete: Vec<usize> },
    Failed(String),
}

/// The images of a file, or why there are none, from a process of its own; `None` where nobody
/// named a program.
pub(super) fn converted(bytes: &[u8], limits: Limits) -> Option<Result<Converted, String>> {
    let (program, argument) = PROGRAM.get()?;
    let mut command = Command::new(program);
    command.arg(argument).arg(serde_json::to_string(&limits).unwrap_or_default());
    Some(ask(command, bytes, limits))
}

fn ask(mut command: Command, bytes: &[u8], limits: Limits) -> Result<Converted, String> {
    let failed = |error: io::Error| format!("no process decodes it: {error}");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut process = command.spawn().map_err(failed)?;
    // All is read there before anything is written. A process that is gone leaves a word, or its
    // status.
    let _ = process.stdin.take().map(|mut input| input.write_all(bytes));
    let longest = u64::try_from(limits.bytes).unwrap_or(u64::MAX).saturating_mul(2);
    let mut said = Vec::new();
    let read = process.stdout.take().map(|output| output.take(longest).read_to_end(&mut said));
    let status = process.wait().map_err(failed)?;
    read.transpose().map_err(failed)?;
    match serde_json::from_slice(&said) {
        Ok(Said::Converted { images, incomplete }) => {
            let images: Result<_, _> =
                images.iter().map(|image| BASE64_STANDARD.decode(image)).collect();
            Ok(Converted {
                images: images.map_err(|error| format!("no process decodes it: {error}"))?,
                incomplete,
            })
        }
        Ok(Said::Failed(reason)) => Err(reason),
        Err(_) if status.code() == Some(LATE) => {
            Err(format!("it takes longer than {} seconds", PATIENCE.as_secs()))
        }
        Err(_) => Err(format!("its decoder failed, or takes more than {MEMORY} GiB of memory")),
    }
}

/// All that the process does: it takes `limits` as [`decode_in`]'s caller wrote them, and a file on
/// standard input, and writes what was made of it to standard output.
///
/// # Errors
/// Where input or output can't be had; what is wrong with the file is part of the output.
pub fn main(limits: &str) -> Result<(), Box<dyn Error>> {
    let limits: Limits = serde_json::from_str(limits)?;
    thread::spawn(|| {
        thread::sleep(PATIENCE);
        std::process::exit(LATE)
    });
    // Not every system holds to it, or knows it.
    let _ = Resource::AS.set(MEMORY << 30, MEMORY << 30);
    let mut bytes = Vec::new();
    io::stdin().take(u64::try_from(limits.bytes)?).read_to_end(&mut bytes)?;
    let bytes = Bytes::from(bytes);
    let foreign = Foreign::of(&bytes).ok_or("it needs no decoding")?;
    let said = match foreign.convert(&bytes, limits) {
        Ok(Converted { images, incomplete }) => Said::Converted {
            images: images.iter().map(|image| BASE64_STANDARD.encode(image)).collect(),
            incomplete,
        },
        Err(reason) => Said::Failed(reason),
    };
    let mut output = io::stdout().lock();
    serde_json::to_writer(&mut output, &said)?;
    Ok(output.flush()?)
}
