//! Flags that several commands have in common, and parsers of their values.
#![expect(clippy::doc_markdown, reason = "doc comments are help texts here")]

use std::{num::NonZero, path::PathBuf};

use clap::Args;

/// Which model answers.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Model")]
pub(crate) struct ModelArgs {
    /// Model to use: a name from `ecso models list`, a .gguf file, or the URL of an
    /// OpenAI-compatible server [default: mini]
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: Option<String>,

    /// Multimodal projector of a .gguf model
    #[arg(long, value_name = "FILE")]
    pub(crate) mmproj: Option<PathBuf>,

    /// Replace each image with the text that the text reader finds in it
    #[arg(long)]
    pub(crate) reader: bool,

    /// Name of the model on the server [default: the only one the server lists]
    #[arg(long, value_name = "NAME")]
    pub(crate) model_name: Option<String>,

    /// Environment variable that holds the server's API key [default: OPENAI_API_KEY]
    #[arg(long, value_name = "VAR")]
    pub(crate) api_key_env: Option<String>,
}

/// How answers are guarded.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Profile")]
pub(crate) struct ProfileArgs {
    /// Built-in profile (paper, hardened) or TOML file [default: hardened, with the thresholds
    /// that `ecso tune` stored for the model]
    #[arg(long, value_name = "NAME|FILE")]
    pub(crate) profile: Option<String>,

    /// Override a field of the profile, e.g. safe.max_tokens=256 (repeatable)
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    pub(crate) set: Vec<(String, String)>,
}

/// How results are shown.
#[derive(Debug, Args)]
pub(crate) struct OutputArgs {
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,

    /// Don't show progress on standard error
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ConcurrencyArgs {
    /// Maximum number of items in flight [default: 1 for a model in this process, 8 for a server]
    #[arg(long, value_name = "N")]
    concurrency: Option<NonZero<usize>>,
}

impl ConcurrencyArgs {
    pub(crate) fn or(&self, default: usize) -> usize {
        self.concurrency.map_or(default, NonZero::get)
    }
}

#[derive(Debug, Args)]
pub(crate) struct CacheArgs {
    /// Cache the model's replies in this folder and reuse them
    #[arg(long, value_name = "DIR")]
    pub(crate) cache: Option<PathBuf>,
}

/// Long-running work over many rows or items.
#[derive(Debug, Args)]
pub(crate) struct BatchArgs {
    /// Maximum number of new tokens per answer
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<NonZero<u32>>,

    #[command(flatten)]
    pub(crate) concurrency: ConcurrencyArgs,

    /// Memory for the encoded images of items in flight, in megabytes; a request to a server
    /// copies each image several times
    #[arg(long, value_name = "MB", default_value_t = 1024)]
    image_mb: usize,

    #[command(flatten)]
    pub(crate) cache: CacheArgs,

    /// Retry items that failed
    #[arg(long)]
    pub(crate) retry_failed: bool,

    /// Fail if less than this share of the items succeeds
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    pub(crate) min_coverage: f64,
}

impl BatchArgs {
    pub(crate) fn max_new_tokens(&self) -> Option<u32> {
        self.max_new_tokens.map(NonZero::get)
    }

    pub(crate) fn image_bytes(&self) -> usize {
        megabytes(self.image_mb)
    }
}

/// Cap on answers whose default is short.
#[derive(Debug, Args)]
pub(crate) struct ShortAnswerArgs {
    /// Maximum number of new tokens per answer
    #[arg(long, value_name = "N", default_value = "64")]
    max_new_tokens: NonZero<u32>,
}

impl ShortAnswerArgs {
    pub(crate) fn max_new_tokens(&self) -> u32 {
        self.max_new_tokens.get()
    }
}

#[derive(Debug, Args)]
pub(crate) struct FalseAlarmArgs {
    /// Target false alarm rate: the share of harmless requests that may be flagged
    #[arg(long, value_name = "SHARE", default_value_t = 0.03, value_parser = share_below_one)]
    pub(crate) false_alarms: f64,
}

/// This many megabytes in bytes.
pub(crate) fn megabytes(count: usize) -> usize {
    count.saturating_mul(1 << 20)
}

/// `KEY=VALUE`.
pub(crate) fn key_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE")?;
    Ok((key.trim().to_owned(), value.to_owned()))
}

/// `FIELD=COLUMN`.
pub(crate) fn field_column(text: &str) -> Result<(String, String), String> {
    let (field, column) = text.split_once('=').ok_or("write FIELD=COLUMN")?;
    Ok((field.trim().to_owned(), column.trim().to_owned()))
}

/// A share or probability.
pub(crate) fn share(text: &str) -> Result<f64, String> {
    number(text, |share| (0.0..=1.0).contains(share), "a number from 0 to 1")
}

/// A share of which something must be left.
pub(crate) fn share_below_one(text: &str) -> Result<f64, String> {
    number(text, |share| (0.0..1.0).contains(share), "a number from 0 to below 1")
}

/// How many of one thing come with each of another.
pub(crate) fn ratio(text: &str) -> Result<f64, String> {
    number(text, |ratio| ratio.is_finite() && *ratio >= 0.0, "a number from 0 up")
}

fn number(text: &str, accepts: impl Fn(&f64) -> bool, what: &str) -> Result<f64, String> {
    text.parse().ok().filter(accepts).ok_or_else(|| format!("expected {what}"))
}
