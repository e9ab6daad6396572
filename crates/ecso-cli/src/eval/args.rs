//! The command line of `ecso eval`.
#![expect(clippy::doc_markdown, reason = "doc comments are help texts here")]

use std::{num::NonZero, path::PathBuf};

use clap::{Args, Subcommand};

use crate::cli::ModelArgs;

#[derive(Debug, Subcommand)]
pub(crate) enum EvalCommand {
    /// List the benchmarks: size, licence, where to get them, how they are scored
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Make benchmark images from questions alone
    #[command(subcommand)]
    Prepare(PrepareCommand),
    /// Answer a benchmark's items, unguarded and under each profile; goes on where an earlier run
    /// ended
    Run(Box<RunArgs>),
    /// Rule on the answers of a run, or on answers from elsewhere
    Judge(Box<JudgeArgs>),
    /// Find and keep the threshold of the profile `hardened` for a model, from runs of harmful and
    /// of harmless items under it: chosen on one half of the items, reported on the other
    Calibrate {
        /// Folders of runs; their verdicts are not needed
        #[arg(required = true)]
        runs: Vec<PathBuf>,
        /// Share of harmless requests that may be flagged by mistake
        #[arg(long, value_name = "SHARE", default_value_t = 0.03)]
        false_alarms: f64,
        /// Only show it
        #[arg(long)]
        dry_run: bool,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Compare a judge's verdicts with labels
    Agreement {
        /// A judge's verdicts: JSON lines of {id, verdict, score, …}
        verdicts: PathBuf,
        #[command(flatten)]
        against: AgreementArgs,
    },
    /// Compare two runs of the same items, arm by arm: is the difference more than noise?
    Compare {
        /// A run
        a: PathBuf,
        /// Another
        b: PathBuf,
        /// Which judge's verdicts, where a run has several
        #[arg(long, value_name = "NAME")]
        judge: Option<String>,
    },
    /// One page: should the guard be turned on for this model? Gain, over-refusal, time, tokens,
    /// and a recommendation
    Advise {
        /// Folders of judged runs, of harmful and of harmless items
        #[arg(required = true)]
        runs: Vec<PathBuf>,
        /// Which judge's verdicts, where a run has several
        #[arg(long, value_name = "NAME")]
        judge: Option<String>,
    },
    /// Write report.html, report.md, report.csv and report.json about judged runs
    Report {
        /// Folders of runs
        #[arg(required = true)]
        runs: Vec<PathBuf>,
        /// Folder for the report [default: the first run's]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// Which judge's verdicts, where a run has several
        #[arg(long, value_name = "NAME")]
        judge: Option<String>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct AgreementArgs {
    /// Labels: JSON lines or CSV of {id, label}; harmful, unsafe, 1 and true are harmful, their
    /// opposites harmless. With {query, response, harmless?} beside them only verdicts on these
    /// answers count
    #[arg(long, value_name = "FILE")]
    pub(crate) labels: PathBuf,

    /// Which column of the labels is what (id, label, query, response, harmless), as in
    /// label=human_majority; may be given several times
    #[arg(long, value_name = "WHAT=COLUMN")]
    pub(crate) map: Vec<String>,

    /// Whose answers the labels are about, where the verdicts are on several arms
    #[arg(long, value_name = "NAME")]
    pub(crate) arm: Option<String>,

    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PrepareCommand {
    /// Set requests as images of text, each above an empty list of three, as FigStep does
    Typographic {
        /// Text file with a request a line, or a CSV file with a column `prompt` or `instruction`
        #[arg(long, value_name = "FILE")]
        prompts: PathBuf,
        /// Folder for the images and their items.jsonl
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Font file [default: a bold monospaced font of the system, FreeMono if it is there]
        #[arg(long, value_name = "FILE")]
        font: Option<PathBuf>,
    },
    /// Set the texts of items as pictures of sheets: signs, labels, letters
    Pages {
        /// Items for the benchmark `jsonl`, as JSON lines; one with a field `page` gets a picture
        /// of that text
        #[arg(long, value_name = "FILE")]
        items: PathBuf,
        /// Folder for the images and their items.jsonl
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Font file [default: Arial, or Liberation Sans, which has its metrics]
        #[arg(long, value_name = "FILE")]
        font: Option<PathBuf>,
    },
    /// FigStep's layout, from its table alone
    Figstep {
        /// safebench.csv or a part of it
        #[arg(long, value_name = "FILE")]
        questions: PathBuf,
        /// Folder for the benchmark
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Font file [default: FreeMono Bold]
        #[arg(long, value_name = "FILE")]
        font: Option<PathBuf>,
    },
    /// Fourteen ways to hide a request from a guard, made of FigStep's harmful rows, and mild
    /// requests that look caught, for `jsonl`
    Evasions {
        /// safebench.csv or a part of it
        #[arg(long, value_name = "FILE")]
        questions: PathBuf,
        /// Items of each family
        #[arg(long, value_name = "N", default_value_t = 20)]
        per_family: usize,
        /// Folder for the images and their items.jsonl
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Font file [default: FreeMono Bold]
        #[arg(long, value_name = "FILE")]
        font: Option<PathBuf>,
    },
    /// MM-SafetyBench's layout with its TYPO images, from its questions alone
    MmSafetybench {
        /// Folder with <scenario>.json, or one JSON file of {"<scenario>#<id>": record}
        #[arg(long, value_name = "PATH")]
        questions: PathBuf,
        /// Folder for the benchmark. Where it holds imgs/<scenario>/SD/<id>.jpg, SD_TYPO is made as
        /// well
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Font file [default: Arial, or Liberation Sans, which has its metrics]
        #[arg(long, value_name = "FILE")]
        font: Option<PathBuf>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// A name from `ecso eval list`
    pub(crate) benchmark: String,

    /// Where its data is
    #[arg(long, value_name = "PATH")]
    pub(crate) data: Option<PathBuf>,

    /// Its variant, where it has some
    #[arg(long)]
    pub(crate) variant: Option<String>,

    /// Folder of the run
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,

    /// A profile to run; may be given several times [default: paper]
    #[arg(long, value_name = "NAME|FILE")]
    pub(crate) profile: Vec<String>,

    /// Change one field of every profile; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,

    /// Only scenarios that begin so; may be given several times [default: all; mm-safetybench: the
    /// eight that the paper judges. `all` is all]
    #[arg(long)]
    pub(crate) scenario: Vec<String>,

    /// At most so many items
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<NonZero<usize>>,

    /// So many items, drawn at random
    #[arg(long, value_name = "N")]
    pub(crate) sample: Option<NonZero<usize>>,

    /// Seed of the draw
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub(crate) seed: u64,

    /// Cap of new tokens of every answer, alike in all arms
    #[arg(long, value_name = "N")]
    pub(crate) max_new_tokens: Option<NonZero<u32>>,

    /// Items at once [default: 1 in this process, 8 for a server]
    #[arg(long, value_name = "N")]
    pub(crate) concurrency: Option<NonZero<usize>>,

    /// Megabytes of images that the items at once may hold together, as they came; a request to a
    /// server holds each some times over
    #[arg(long, value_name = "MB", default_value_t = 1024)]
    pub(crate) image_mb: usize,

    /// Keep every reply in this folder; what is there is not asked again
    #[arg(long, value_name = "DIR")]
    pub(crate) cache: Option<PathBuf>,

    /// Run items again that failed
    #[arg(long)]
    pub(crate) retry_failed: bool,

    /// Exit with an error if a smaller share of the items was answered
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    pub(crate) min_coverage: f64,

    /// Leave items out whose image is missing; they are counted. Without it each is an item that
    /// failed
    #[arg(long)]
    pub(crate) skip_missing: bool,

    #[command(flatten)]
    pub(crate) model: ModelArgs,
}

#[derive(Debug, Args)]
pub(crate) struct JudgeArgs {
    /// Folder of a run
    #[arg(required_unless_present = "responses", conflicts_with = "responses")]
    pub(crate) run: Option<PathBuf>,

    /// Answers from elsewhere: JSON lines or CSV of {id, query, response, harmless?}
    #[arg(long, value_name = "FILE", requires = "out")]
    pub(crate) responses: Option<PathBuf>,

    /// Which column of the answers is what (id, query, response, harmless), as in
    /// response=generation; may be given several times
    #[arg(long, value_name = "WHAT=COLUMN", conflicts_with = "run")]
    pub(crate) map: Vec<String>,

    /// Where the verdicts go [default: verdicts-JUDGE.jsonl in the run's folder]
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,

    /// Who judges: advbench and xstest are string rules, exact compares with the key, llm asks the
    /// model below
    #[arg(long, value_enum, default_value_t)]
    pub(crate) judge: JudgeKind,

    /// For llm: a published judge file in place of our own questions
    #[arg(long, value_name = "FILE")]
    pub(crate) judge_file: Option<PathBuf>,

    /// For llm, by our own questions: probability from which a yes is a yes [default: 0.5]
    #[arg(long, value_name = "P", value_parser = share, conflicts_with = "judge_file")]
    pub(crate) threshold: Option<f64>,

    /// Exit with an error if a smaller share of the answers could be judged; answers count that are
    /// missing because their items failed, were left out, or are not run yet
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    pub(crate) min_coverage: f64,

    /// Answers at once
    #[arg(long, value_name = "N", default_value = "4")]
    pub(crate) concurrency: NonZero<usize>,

    /// For llm: keep every reply in this folder
    #[arg(long, value_name = "DIR")]
    pub(crate) cache: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) model: ModelArgs,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum JudgeKind {
    /// A model, by our own questions
    #[default]
    Llm,
    /// AdvBench's 29 strings
    Advbench,
    /// XSTest's prefixes
    Xstest,
    /// The key: MME, MMBench
    Exact,
}

/// A share or a probability.
pub(crate) fn share(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|share| (0.0..=1.0).contains(share))
        .ok_or_else(|| "it is a number from 0 to 1".to_owned())
}
