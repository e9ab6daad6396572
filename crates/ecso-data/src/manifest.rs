//! The manifest of a dataset: its contents and how it was generated.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{generate::Reason, input::Unread, record::RunHeader};

/// How the dataset is packed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Packing {
    /// Number of utility samples (safe rows with their own answer) per safety sample.
    pub utility: f64,
    /// Share of images in the validation split.
    pub validation: f64,
    /// Random seed for drawing utility samples and the validation split.
    pub seed: u64,
    /// Target size of a Parquet file, in bytes.
    pub shard_bytes: usize,
    /// SPDX identifier of the dataset's licence, or `other`.
    pub licence: String,
    /// Limits on images.
    pub limits: ecso::Limits,
}

/// The contents of a dataset.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// The run.
    pub run: RunHeader,
    /// How it was packed.
    pub packing: Packing,
    /// Recorded rows that are in the input.
    pub rows: u64,
    /// Rows of the input that were never processed, because the run ended before; unknown if the
    /// run was one of several shards.
    pub unseen: Option<u64>,
    /// Rows whose draft is safe.
    pub safe: u64,
    /// Rows that are left out, by reason.
    pub dropped: BTreeMap<Reason, u64>,
    /// Rows that failed.
    pub failed: u64,
    /// Failed rows where a file of the input is truncated; an unknown number of rows is missing
    /// after each.
    #[serde(default)]
    pub cut_short: u64,
    /// Recorded rows that are no longer in the input. No other count includes them.
    pub gone: u64,
    /// Files in the input's folder that are not read.
    pub unread: Unread,
    /// Safety samples whose answer is a bare refusal.
    pub refusals: u64,
    /// Samples by split and kind (`safety`, `utility`).
    pub samples: BTreeMap<String, BTreeMap<String, u64>>,
    /// Samples by category and kind.
    pub categories: BTreeMap<String, BTreeMap<String, u64>>,
    /// The files, with size in bytes and SHA-256.
    pub files: BTreeMap<String, (u64, String)>,
}
