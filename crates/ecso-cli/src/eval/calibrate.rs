//! `ecso eval calibrate`.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::{Path, PathBuf},
};

use anyhow::bail;
use ecso::{Profile, profile::Method};
use ecso_batch::journal::JournalReader;
use ecso_eval::{
    calibrate::{Half, Scores, calibrate},
    record::{ItemRecord, RunHeader},
    run_set::RunSet,
};

use crate::{
    UsageError,
    calibration::{self, Stored},
    cli::{ModelArgs, ProfileArgs},
    config,
};

/// The profile that has a threshold to be found.
const PROFILE: &str = "hardened";

pub(super) fn run(
    runs: &[PathBuf],
    false_alarms: f64,
    dry_run: bool,
    json: bool,
    file: Option<&Path>,
) -> anyhow::Result<()> {
    if !(0.0..1.0).contains(&false_alarms) {
        bail!(UsageError("--false-alarms is a share, at least 0 and below 1".into()));
    }
    let headers = runs
        .iter()
        .map(|run| JournalReader::in_folder(run).header())
        .collect::<Result<Vec<RunHeader>, _>>();
    let headers = headers.map_err(UsageError::of)?;
    let (mut all, mut run_set) = (Scores::default(), RunSet::default());
    for (run, header) in runs.iter().zip(&headers) {
        if !header.profiles.iter().any(|(name, _)| name == PROFILE) {
            bail!(UsageError(format!(
                "{}: it has no arm {PROFILE}; run it with --profile {PROFILE}",
                run.display()
            )));
        }
        run_set.add_run(run, header).map_err(UsageError::of)?;
        let before = all.without;
        for record in
            JournalReader::in_folder(run).latest::<ItemRecord>().map_err(UsageError::of)?
        {
            let record = record.map_err(UsageError::of)?;
            run_set.add_item(&record).map_err(UsageError::of)?;
            all.add(&header.benchmark, &record, PROFILE);
        }
        let without = all.without - before;
        if without > 0 {
            say!(
                "{}: {without} items have no score: the model tells no probabilities, or they failed",
                run.display()
            );
        }
    }
    let Some(header) = headers.into_iter().next() else { bail!(UsageError("name a run".into())) };
    if all.scored.is_empty() && all.without > 0 {
        bail!(UsageError(
            "the model tells no probabilities: there is no threshold to be found".into()
        ));
    }
    let found = calibrate(&all.scored, false_alarms).map_err(UsageError::of)?;
    let stored = Stored {
        ecso: env!("CARGO_PKG_VERSION").into(),
        model: header.model,
        model_digest: header.model_digest,
        profile: PROFILE.into(),
        profile_hash: calibration::hash(&Profile::named(PROFILE)?),
        items: all.scored.len(),
        biases: biases(&header.profiles)?,
        found,
    };
    if json {
        println!("{}", serde_json::to_string_pretty(&stored)?);
    } else {
        print!("{}", told(&stored));
    }
    if let Some(fault) = stored.fault() {
        say!("{fault}");
        return Ok(());
    }
    if !dry_run {
        let settings = config::load(file, &ModelArgs::default(), &ProfileArgs::default())?;
        let path = calibration::store(&settings, &stored)?;
        say!(
            "kept in {}, in place of an earlier fit: `{PROFILE}` takes it for {} from now on",
            path.display(),
            stored.model
        );
    }
    Ok(())
}

/// The biases of the profile that was run, where they are not the built-in ones: the threshold was
/// found with them.
fn biases(profiles: &[(String, String)]) -> anyhow::Result<BTreeMap<String, f64>> {
    let ways = |profile: Profile| match profile.method {
        Method::Hardened(method) => {
            method.detectors.into_iter().map(|way| (way.name, way.bias)).collect()
        }
        Method::Paper(_) => BTreeMap::new(),
    };
    let built_in = ways(Profile::named(PROFILE)?);
    let text = profiles.iter().find(|(name, _)| name == PROFILE).map_or("", |(_, text)| text);
    let run = ways(Profile::from_toml(text).map_err(UsageError::of)?);
    Ok(if run == built_in { BTreeMap::new() } else { run })
}

fn told(stored: &Stored) -> String {
    let found = &stored.found;
    let half = |name: &str, half: &Half| {
        let share = |rate: &ecso_eval::stats::Rate| {
            format!(
                "{:>5.1}% ({:.1} to {:.1}), {} of {}",
                100.0 * rate.value,
                100.0 * rate.low,
                100.0 * rate.high,
                rate.count,
                rate.total
            )
        };
        let auroc = half.auroc.map_or_else(String::new, |area| format!(", AUROC {area:.3}"));
        format!(
            "{name}: flags {} of the harmful, {} of the harmless{auroc}\n",
            share(&half.recall),
            share(&half.false_alarms)
        )
    };
    let mut text =
        format!("threshold {:.4} for {} ({} items)\n", found.threshold, stored.model, stored.items);
    text += &half("chosen on", &found.chosen);
    text += &half("reported on", &found.reported);
    text += "threshold  harmful flagged  harmless flagged\n";
    for (at, recall, false_alarms) in &found.curve {
        let _ =
            writeln!(text, "{at:>9.2}  {:>14.1}%  {:>15.1}%", 100.0 * recall, 100.0 * false_alarms);
    }
    text
}
