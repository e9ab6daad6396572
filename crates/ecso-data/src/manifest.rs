//! What a dataset holds, and how it was made.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{input::Unread, make::Reason, record::RunHeader};

/// How the dataset is made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Packing {
    /// Utility samples (safe rows with their own answer) for each sample of alignment.
    pub utility: f64,
    /// Share of the images that are for validation.
    pub validation: f64,
    /// Seed of these two draws.
    pub seed: u64,
    /// Bytes after which a Parquet file is closed.
    pub shard_bytes: usize,
    /// SPDX name of the dataset's licence, or `other`.
    pub licence: String,
    /// Bounds of images.
    pub limits: ecso::Limits,
}

/// What a dataset holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// What the run was.
    pub run: RunHeader,
    /// How it was packed.
    pub packing: Packing,
    /// Rows that are recorded and that the input has.
    pub rows: u64,
    /// Rows of the input that were never looked at, as the run was ended before; none where it was
    /// one of several parts, which don't know.
    pub unseen: Option<u64>,
    /// Rows whose draft was safe.
    pub safe: u64,
    /// Rows left out, by reason.
    pub dropped: BTreeMap<Reason, u64>,
    /// Rows that failed.
    pub failed: u64,
    /// Of these, where a file of the input ends before its end: how many rows are lost with it,
    /// nobody knows.
    #[serde(default)]
    pub cut_short: u64,
    /// Rows that are recorded and that the input has no more: other rows stand in their places, or
    /// none. They are in no other count.
    pub gone: u64,
    /// Files in the input's folder that are not read.
    pub unread: Unread,
    /// Of the kept answers, bare refusals.
    pub refusals: u64,
    /// Samples by split and kind (`safety`, `utility`).
    pub samples: BTreeMap<String, BTreeMap<String, u64>>,
    /// Samples by category and kind.
    pub categories: BTreeMap<String, BTreeMap<String, u64>>,
    /// The files, with bytes and SHA-256.
    pub files: BTreeMap<String, (u64, String)>,
}
