//! The dataset card: a README with the header that dataset hubs read.

use std::fmt::Write as _;

use crate::{generate::Reason, manifest::Manifest};

fn size_category(samples: u64) -> &'static str {
    match samples {
        0..1_000 => "n<1K",
        1_000..10_000 => "1K<n<10K",
        10_000..100_000 => "10K<n<100K",
        100_000..1_000_000 => "100K<n<1M",
        _ => "n>1M",
    }
}

/// A digest of a configuration's files.
fn config_digest(manifest: &Manifest, config: &str) -> String {
    let mut hash = blake3::Hasher::new();
    for (name, (bytes, sha256)) in
        manifest.files.iter().filter(|(name, _)| name.starts_with(config))
    {
        hash.update(format!("{name} {bytes} {sha256}\n").as_bytes());
    }
    hash.finalize().to_hex()[..16].to_owned()
}

fn count(manifest: &Manifest, split: &str, kind: &str) -> u64 {
    manifest.samples.get(split).and_then(|kinds| kinds.get(kind)).copied().unwrap_or(0)
}

/// Writes the card.
pub(crate) fn card(manifest: &Manifest) -> String {
    let kinds = ["safety", "utility"];
    let splits = ["train", "validation"];
    let all = |kind: &str| -> u64 { splits.iter().map(|split| count(manifest, split, kind)).sum() };
    let (safety, utility) = (all("safety"), all("utility"));
    let mut text = String::new();
    let mut line = |arguments: std::fmt::Arguments<'_>| {
        let _ = writeln!(text, "{arguments}");
    };
    line(format_args!("---\nlicense: {}", manifest.packing.licence));
    line(format_args!("size_categories:\n- {}", size_category(safety + utility)));
    line(format_args!(
        "task_categories:\n- image-text-to-text\ntags:\n- safety\n- alignment\n- synthetic\n- ecso"
    ));
    let non_empty_splits = |kinds: &[&str]| -> Vec<&str> {
        let has_samples = |split: &&&str| kinds.iter().any(|kind| count(manifest, split, kind) > 0);
        splits.iter().filter(has_samples).copied().collect()
    };
    let configs = [("sft", non_empty_splits(&kinds)), ("dpo", non_empty_splits(&kinds[..1]))];
    if configs.iter().any(|(_, splits)| !splits.is_empty()) {
        line(format_args!("configs:"));
    }
    for (name, splits) in configs.iter().filter(|(_, splits)| !splits.is_empty()) {
        let default = if *name == "sft" { "\n  default: true" } else { "" };
        // Loaders with a cache compare only this description. The digest in it makes them reload
        // another dataset, or this one after it was packed again.
        line(format_args!(
            "- config_name: {name}{default}\n  description: made {}\n  data_files:",
            config_digest(manifest, name)
        ));
        for split in splits {
            line(format_args!("  - split: {split}\n    path: {name}/{split}-*.parquet"));
        }
    }
    line(format_args!("---\n\n# Safety data made by ECSO\n"));
    line(format_args!(
        "Generated from unlabelled pairs of image and query with *Eyes Closed, Safety On* (arXiv \
         2403.09572): if the model called its own direct answer harmful, the image was turned into \
         text and the query was answered again from that text alone. No human reviewed the \
         rows.\n\n**The dataset contains harmful requests, and harmful answers in the columns \
         `rejected` and `rejected_response`.** Use it to make models safer.\n"
    ));
    line(format_args!("| split | safety | utility |\n| --- | --- | --- |"));
    for split in splits {
        let [safety, utility] = kinds.map(|kind| count(manifest, split, kind));
        line(format_args!("| {split} | {safety} | {utility} |"));
    }
    line(format_args!("\nNo image is in both splits.\n"));
    line(format_args!("## Files\n"));
    line(format_args!(
        "- `sft/*.parquet`: `images`, `messages` (for `datasets` and TRL's SFT trainer)"
    ));
    line(format_args!(
        "- `dpo/*.parquet`: `images`, `prompt`, `chosen` (the safe answer), `rejected` (the direct \
         answer)"
    ));
    line(format_args!(
        "- `messages/*.jsonl`, `pairs/*.jsonl`: the same data for LLaMA-Factory (set `dataset_dir` \
         to this folder; the datasets are `ecso_sft` and `ecso_dpo`) and ms-swift (set \
         `ROOT_IMAGE_DIR` to this folder), with one placeholder `<image>` for each of `images`"
    ));
    line(format_args!(
        "- `llava/*.json`: for LLaVA's own trainer; samples with several images are in \
         `*-several.json`, for LLaVA-NeXT"
    ));
    line(format_args!(
        "- `failed.jsonl`: rows that failed, counted from 1, with the reason; `manifest.json`: all \
         details of the run, and the SHA-256 of each file\n"
    ));
    line(format_args!("## By category\n\n| category | safety | utility |\n| --- | --- | --- |"));
    for (category, counts) in &manifest.categories {
        let [safety, utility] = kinds.map(|kind| counts.get(kind).copied().unwrap_or(0));
        line(format_args!("| {} | {safety} | {utility} |", category.replace('|', "\\|")));
    }
    let run = &manifest.run;
    line(format_args!("\n## How it was generated\n"));
    line(format_args!("- model: {} ({})", run.model, run.model_digest));
    line(format_args!(
        "- profile: {} (hash {}), in full in `manifest.json`",
        run.profile.0,
        run.profile_hash()
    ));
    line(format_args!("- program: ecso {}", run.ecso));
    line(format_args!(
        "- rows: {}; safety samples: {safety}, of which {} are bare refusals; safe rows: {}, of \
         which {utility} are utility samples; failed: {}",
        manifest.rows, manifest.refusals, manifest.safe, manifest.failed
    ));
    if let Some(unseen) = manifest.unseen.filter(|unseen| *unseen > 0) {
        line(format_args!(
            "- rows that were never processed, because the run ended before: {unseen}"
        ));
    }
    if manifest.cut_short > 0 {
        line(format_args!(
            "- places where the input is truncated, so that rows are missing: {}",
            manifest.cut_short
        ));
    }
    for (reason, rows) in &manifest.dropped {
        line(format_args!("- left out, {}: {rows}", describe(*reason)));
    }
    line(format_args!("\n## Limits\n"));
    line(format_args!(
        "The model judged itself: harm that it did not recognise is missing, and harmless rows \
         that it called harmful are safety samples. The scores and the second check of an answer come \
         from the same model. Answers have the style and the mistakes of that model; no facts were \
         checked. Images and queries come from the input, under its licence."
    ));
    text
}

fn describe(reason: Reason) -> &'static str {
    match reason {
        Reason::Duplicate => "the same images and text as an earlier row",
        Reason::NearDuplicate => "nearly the same images and text as an earlier row",
        Reason::OutOfScope => "out of the profile's scope",
        Reason::Cut => "an incomplete answer: it hit the token limit, or a content filter cut it",
        Reason::Empty => "an empty answer",
        Reason::Repetition => "an answer that repeats itself, the draft or the query",
        Reason::StillHarmful => "the answer failed the second check",
        Reason::Refusal => "a bare refusal",
    }
}
