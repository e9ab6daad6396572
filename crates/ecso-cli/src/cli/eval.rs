//! The command line of `ecso eval`.
#![expect(clippy::doc_markdown, reason = "doc comments are help texts here")]

use std::{num::NonZero, path::PathBuf};

use clap::{Args, Subcommand};

use super::groups::{
    BatchArgs, CacheArgs, FalseAlarmArgs, ModelArgs, field_column, key_value, share,
};

#[derive(Debug, Subcommand)]
pub(crate) enum EvalCommand {
    /// List the benchmarks with their size, licence, source and scoring
    List {
        /// Print the result as JSON
        #[arg(long)]
        json: bool,
    },
    /// Generate a benchmark's images from its questions
    #[command(subcommand)]
    Prepare(PrepareCommand),
    /// Answer the items of a benchmark, unguarded and under each profile
    ///
    /// The same command resumes an earlier run.
    Run(Box<RunArgs>),
    /// Judge the answers of a run, or answers from another program
    Judge(Box<JudgeArgs>),
    /// Fit the threshold of the profile `hardened` to a model and store it
    ///
    /// Takes runs of harmful and of harmless items under that profile. The threshold is chosen on
    /// half of the items and reported on the other half.
    Calibrate(CalibrateArgs),
    /// Compare a judge's verdicts with labels
    Agreement(AgreementArgs),
    /// Compare two runs of the same items arm by arm and test the difference for significance
    Compare {
        /// Folder of the first run
        a: PathBuf,
        /// Folder of the second run
        b: PathBuf,
        #[command(flatten)]
        verdicts: VerdictArgs,
    },
    /// Advise on one page whether to enable the guard for a model
    ///
    /// Weighs harm prevented, over-refusal, time and tokens.
    Advise {
        /// Folders of judged runs, of harmful and of harmless items
        #[arg(required = true)]
        runs: Vec<PathBuf>,
        #[command(flatten)]
        verdicts: VerdictArgs,
    },
    /// Write report.html, report.md, report.csv and report.json on judged runs
    Report {
        /// Folders of judged runs
        #[arg(required = true)]
        runs: Vec<PathBuf>,
        /// Folder for the report [default: the first run's]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        #[command(flatten)]
        verdicts: VerdictArgs,
    },
}

/// Which verdicts on a run are used.
#[derive(Debug, Args)]
pub(crate) struct VerdictArgs {
    /// Judge whose verdicts to use, if a run has several
    #[arg(long, value_name = "NAME")]
    judge: Option<String>,
}

impl VerdictArgs {
    pub(crate) fn judge(&self) -> Option<&str> {
        self.judge.as_deref()
    }
}

#[derive(Debug, Args)]
pub(crate) struct CalibrateArgs {
    /// Folders of runs; they need no verdicts
    #[arg(required = true)]
    pub(crate) runs: Vec<PathBuf>,

    #[command(flatten)]
    pub(crate) target: FalseAlarmArgs,

    /// Print the calibration without storing it
    #[arg(long)]
    pub(crate) dry_run: bool,

    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct AgreementArgs {
    /// Verdicts of a judge: JSON lines of {id, verdict, score, …}
    pub(crate) verdicts: PathBuf,

    /// Labels: JSON lines or CSV of {id, label}
    ///
    /// `harmful`, `unsafe`, 1 and true mean harmful, their opposites harmless. If rows also have
    /// {query, response, harmless?}, only verdicts on these answers count.
    #[arg(long, value_name = "FILE")]
    pub(crate) labels: PathBuf,

    /// Column that holds a field, e.g. label=human_majority. Fields are id, label, query, response
    /// and harmless (repeatable)
    #[arg(long, value_name = "FIELD=COLUMN", value_parser = field_column)]
    pub(crate) map: Vec<(String, String)>,

    /// Arm that the labels are about, if the verdicts cover several
    #[arg(long, value_name = "NAME")]
    pub(crate) arm: Option<String>,

    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PrepareCommand {
    /// Typeset requests as images, each above an empty numbered list, as FigStep does
    Typographic {
        /// Text file with one request per line, or CSV file with a column `prompt` or `instruction`
        #[arg(long, value_name = "FILE")]
        prompts: PathBuf,
        #[command(flatten)]
        target: PrepareArgs,
    },
    /// Typeset the texts of items as pictures of pages: signs, labels, letters
    Pages {
        /// Items for the benchmark `jsonl`; those with a field `page` get a picture of its text
        #[arg(long, value_name = "FILE")]
        items: PathBuf,
        #[command(flatten)]
        target: PrepareArgs,
    },
    /// Generate FigStep from its table of questions
    Figstep {
        /// safebench.csv, or part of it
        #[arg(long, value_name = "FILE")]
        questions: PathBuf,
        #[command(flatten)]
        target: PrepareArgs,
    },
    /// Generate evasion attempts and harmless lookalikes for the benchmark `jsonl`
    ///
    /// Hides FigStep's harmful requests from a guard in fourteen ways, and adds mild requests that
    /// look similar.
    Evasions {
        /// safebench.csv, or part of it
        #[arg(long, value_name = "FILE")]
        questions: PathBuf,
        /// Number of items per family
        #[arg(long, value_name = "N", default_value_t = 20)]
        per_family: usize,
        #[command(flatten)]
        target: PrepareArgs,
    },
    /// Generate MM-SafetyBench's TYPO images from its questions
    ///
    /// If the output folder has imgs/<scenario>/SD/<id>.jpg, SD_TYPO is generated too.
    MmSafetybench {
        /// Folder with <scenario>.json, or one JSON file of {"<scenario>#<id>": record}
        #[arg(long, value_name = "PATH")]
        questions: PathBuf,
        #[command(flatten)]
        target: PrepareArgs,
    },
}

impl PrepareCommand {
    /// What all benchmarks have in common.
    pub(crate) fn target(&self) -> &PrepareArgs {
        match self {
            Self::Typographic { target, .. }
            | Self::Pages { target, .. }
            | Self::Figstep { target, .. }
            | Self::Evasions { target, .. }
            | Self::MmSafetybench { target, .. } => target,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct PrepareArgs {
    /// Folder for the images and their items
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,

    /// Font file [default: Arial or Liberation Sans for pages and mm-safetybench, otherwise
    /// FreeMono Bold or another bold monospaced font]
    #[arg(long, value_name = "FILE")]
    pub(crate) font: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Benchmark to run, from `ecso eval list`
    pub(crate) benchmark: String,

    /// File or folder with the benchmark's data
    #[arg(long, value_name = "PATH")]
    pub(crate) data: Option<PathBuf>,

    /// Variant of the benchmark
    #[arg(long)]
    pub(crate) variant: Option<String>,

    /// Folder for the run
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,

    /// Profile to run: a built-in one or a TOML file (repeatable) [default:
    /// hardened]
    #[arg(long, value_name = "NAME|FILE")]
    pub(crate) profile: Vec<String>,

    /// Override a field of every profile (repeatable)
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    pub(crate) set: Vec<(String, String)>,

    /// Run only scenarios that start with this text, or `all` (repeatable) [default: all;
    /// mm-safetybench: the eight that the paper judges]
    #[arg(long)]
    pub(crate) scenario: Vec<String>,

    /// Maximum number of items
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<NonZero<usize>>,

    /// Run a random sample of this many items
    #[arg(long, value_name = "N")]
    pub(crate) sample: Option<NonZero<usize>>,

    /// Random seed of the sample
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub(crate) seed: u64,

    #[command(flatten)]
    pub(crate) batch: BatchArgs,

    /// Skip and count items whose image is missing, instead of recording them as failed
    #[arg(long)]
    pub(crate) skip_missing: bool,

    #[command(flatten)]
    pub(crate) model: ModelArgs,
}

#[derive(Debug, Args)]
pub(crate) struct JudgeArgs {
    /// Folder of the run to judge
    #[arg(required_unless_present = "responses", conflicts_with = "responses")]
    pub(crate) run: Option<PathBuf>,

    /// Answers from another program: JSON lines or CSV of {id, query, response, harmless?}
    #[arg(long, value_name = "FILE", requires = "out")]
    pub(crate) responses: Option<PathBuf>,

    /// Column that holds a field, e.g. response=generation. Fields are id, query, response and
    /// harmless (repeatable)
    #[arg(long, value_name = "FIELD=COLUMN", conflicts_with = "run", value_parser = field_column)]
    pub(crate) map: Vec<(String, String)>,

    /// File for the verdicts [default: verdicts-JUDGE.jsonl in the run's folder]
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,

    /// Judge to use
    #[arg(long, value_enum, default_value_t)]
    pub(crate) judge: JudgeKind,

    /// Judge file with published prompts, for --judge llm, instead of the built-in questions
    #[arg(long, value_name = "FILE")]
    pub(crate) judge_file: Option<PathBuf>,

    /// Probability from which an answer counts as yes, for --judge llm with the built-in questions
    /// [default: 0.5]
    #[arg(long, value_name = "P", value_parser = share, conflicts_with = "judge_file")]
    pub(crate) threshold: Option<f64>,

    /// Fail if less than this share of the answers can be judged; answers of items that failed,
    /// were left out or have not run yet count as missing
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    pub(crate) min_coverage: f64,

    /// Maximum number of answers in flight
    #[arg(long, value_name = "N", default_value = "4")]
    pub(crate) concurrency: NonZero<usize>,

    #[command(flatten)]
    pub(crate) cache: CacheArgs,

    #[command(flatten)]
    pub(crate) model: ModelArgs,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum JudgeKind {
    /// A model that answers the built-in questions, or those of --judge-file.
    #[default]
    Llm,
    /// AdvBench's 29 refusal strings.
    Advbench,
    /// XSTest's refusal prefixes.
    Xstest,
    /// Comparison with the answer key (MME, MMBench).
    Exact,
}
