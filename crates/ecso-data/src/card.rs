//! The dataset's card: a README with the header that dataset hubs read.

use std::fmt::Write as _;

use crate::{make::Reason, manifest::Manifest};

fn size(samples: u64) -> &'static str {
    match samples {
        0..1_000 => "n<1K",
        1_000..10_000 => "1K<n<10K",
        10_000..100_000 => "10K<n<100K",
        100_000..1_000_000 => "100K<n<1M",
        _ => "n>1M",
    }
}

/// A digest of a configuration's files.
fn made_of(manifest: &Manifest, config: &str) -> String {
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

pub(crate) fn card(manifest: &Manifest) -> String {
    let kinds = ["safety", "utility"];
    let splits = ["train", "validation"];
    let all = |kind: &str| -> u64 { splits.iter().map(|split| count(manifest, split, kind)).sum() };
    let (safety, utility) = (all("safety"), all("utility"));
    let mut text = String::new();
    let mut line = |words: std::fmt::Arguments<'_>| {
        let _ = writeln!(text, "{words}");
    };
    line(format_args!("---\nlicense: {}", manifest.packing.licence));
    line(format_args!("size_categories:\n- {}", size(safety + utility)));
    line(format_args!(
        "task_categories:\n- image-text-to-text\ntags:\n- safety\n- alignment\n- synthetic\n- ecso"
    ));
    let filled = |kinds: &[&str]| -> Vec<&str> {
        let is_there = |split: &&&str| kinds.iter().any(|kind| count(manifest, split, kind) > 0);
        splits.iter().filter(is_there).copied().collect()
    };
    let configs = [("sft", filled(&kinds)), ("dpo", filled(&kinds[..1]))];
    if configs.iter().any(|(_, splits)| !splits.is_empty()) {
        line(format_args!("configs:"));
    }
    for (name, splits) in configs.iter().filter(|(_, splits)| !splits.is_empty()) {
        let default = if *name == "sft" { "\n  default: true" } else { "" };
        // By this loaders that keep what they loaded know another dataset, and this one when it is
        // packed anew: they look at nothing else.
        line(format_args!(
            "- config_name: {name}{default}\n  description: made {}\n  data_files:",
            made_of(manifest, name)
        ));
        for split in splits {
            line(format_args!("  - split: {split}\n    path: {name}/{split}-*.parquet"));
        }
    }
    line(format_args!("---\n\n# Safety data made by ECSO\n"));
    line(format_args!(
        "Unlabelled pairs of image and query went through *Eyes Closed, Safety On* (arXiv 2403.09572): where the model called its own \
         direct answer harmful, the image was turned into text and the query answered again from that text alone. No human looked \
         at a row.\n\n**It holds harmful requests, and in the columns `rejected` and `rejected_response` harmful answers.** Use it to make \
         models safer.\n"
    ));
    line(format_args!("| split | safety | utility |\n| --- | --- | --- |"));
    for split in splits {
        let [safety, utility] = kinds.map(|kind| count(manifest, split, kind));
        line(format_args!("| {split} | {safety} | {utility} |"));
    }
    line(format_args!("\nNo image stands in both splits.\n"));
    line(format_args!("## Files\n"));
    line(format_args!(
        "- `sft/*.parquet`: `images`, `messages` (for `datasets` and TRL's SFT trainer)"
    ));
    line(format_args!(
        "- `dpo/*.parquet`: `images`, `prompt`, `chosen` (the safe answer), `rejected` (the direct answer)"
    ));
    line(format_args!(
        "- `messages/*.jsonl`, `pairs/*.jsonl`: the same two for LLaMA-Factory (`dataset_dir` is this folder, `ecso_sft` and `ecso_dpo` \
         are the datasets) and ms-swift (`ROOT_IMAGE_DIR` is this folder), with one mark `<image>` for each of `images`"
    ));
    line(format_args!(
        "- `llava/*.json`: for LLaVA's own trainer; several images stand in `*-several.json`, for LLaVA-NeXT"
    ));
    line(format_args!(
        "- `failed.jsonl`: rows that failed, counted from 1, with the reason; `manifest.json`: everything about the run, SHA-256 of files\n"
    ));
    line(format_args!("## By category\n\n| category | safety | utility |\n| --- | --- | --- |"));
    for (category, found) in &manifest.categories {
        let [safety, utility] = kinds.map(|kind| found.get(kind).copied().unwrap_or(0));
        line(format_args!("| {} | {safety} | {utility} |", category.replace('|', "\\|")));
    }
    let run = &manifest.run;
    line(format_args!("\n## How it was made\n"));
    line(format_args!("- model: {} ({})", run.model, run.model_digest));
    line(format_args!(
        "- profile: {} (hash {}), in full in `manifest.json`",
        run.profile.0,
        run.profile_hash()
    ));
    line(format_args!("- program: ecso {}", run.ecso));
    line(format_args!(
        "- rows: {}; kept {safety}, of these {} bare refusals; safe as they were {}, of these {utility} as utility samples; failed {}",
        manifest.rows, manifest.refusals, manifest.safe, manifest.failed
    ));
    if let Some(unseen) = manifest.unseen.filter(|unseen| *unseen > 0) {
        line(format_args!(
            "- rows that were never looked at, as the run was ended before: {unseen}"
        ));
    }
    if manifest.cut_short > 0 {
        line(format_args!(
            "- places where the input ends before its end, so that rows are missing: {}",
            manifest.cut_short
        ));
    }
    for (reason, rows) in &manifest.dropped {
        line(format_args!("- left out, {}: {rows}", says(*reason)));
    }
    line(format_args!("\n## Limits\n"));
    line(format_args!(
        "The model judged itself: what it does not hear as harmful is missing, and what it wrongly hears as harmful is there as \
         safety. Scores are its own. The second check of an answer is made by the same model. Answers carry the style and the \
         mistakes of that model; nobody checked facts. Images and queries are those of the input, under its licence."
    ));
    text
}

fn says(reason: Reason) -> &'static str {
    match reason {
        Reason::Duplicate => "the same images and words as an earlier row",
        Reason::NearDuplicate => "nearly the same images and words as an earlier row",
        Reason::OutOfScope => "out of the profile's scope",
        Reason::Cut => {
            "an answer that is not whole: it came to the limit of tokens, or a filter cut it"
        }
        Reason::Empty => "an empty answer",
        Reason::Repetition => "an answer that repeats itself, the draft or the query",
        Reason::StillHarmful => "the answer failed the second check",
        Reason::Refusal => "a bare refusal",
    }
}
