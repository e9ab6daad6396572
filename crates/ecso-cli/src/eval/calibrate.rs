//! `ecso eval calibrate`: fits the threshold of `hardened` to a model.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::{Path, PathBuf},
};

use anyhow::bail;
use ecso::{
    Calibration, Profile,
    calibration::{Half, Share},
    profile::Method,
};
use ecso_batch::journal::JournalReader;
use ecso_eval::{
    calibrate::{Scores, calibrate},
    record::{ItemRecord, RunHeader},
    run_set::RunSet,
};

use crate::{calibration, cli::CalibrateArgs, error::UsageError, settings};

/// The profile that has a threshold to fit.
const PROFILE: &str = "hardened";

pub(super) fn run(args: &CalibrateArgs, file: Option<&Path>) -> anyhow::Result<()> {
    let (header, scores) = read_runs(&args.runs)?;
    if scores.scored.is_empty() && scores.without > 0 {
        bail!(UsageError(
            "no item has a score, so no threshold can be fitted: use a model that returns \
             probabilities"
                .into()
        ));
    }
    let found =
        calibrate(&scores.scored, args.target.false_alarms).map_err(UsageError::from_error)?;
    let calibration = Calibration::new(
        &Profile::named(PROFILE)?,
        header.model,
        header.model_digest,
        scores.scored.len(),
        changed_biases(&header.profiles)?,
        found,
    );
    if args.json {
        println!("{}", serde_json::to_string_pretty(&calibration)?);
    } else {
        print!("{}", summary(&calibration));
    }
    if let Some(fault) = calibration::fault(&calibration) {
        say!("{fault}");
        return Ok(());
    }
    if !args.dry_run {
        let path = calibration::store(&settings::load_file(file)?, &calibration)?;
        say!(
            "stored in {}, replacing any earlier fit: {}",
            path.display(),
            calibration::usage(&calibration)
        );
    }
    Ok(())
}

/// The scores of all runs, and the header of the first.
fn read_runs(runs: &[PathBuf]) -> anyhow::Result<(RunHeader, Scores)> {
    let headers = runs
        .iter()
        .map(|run| JournalReader::in_folder(run).header())
        .collect::<Result<Vec<RunHeader>, _>>();
    let headers = headers.map_err(UsageError::from_error)?;
    let (mut scores, mut run_set) = (Scores::default(), RunSet::default());
    for (run, header) in runs.iter().zip(&headers) {
        if !header.profiles.iter().any(|(name, _)| name == PROFILE) {
            let problem = format!("no arm {PROFILE}; run it with --profile {PROFILE}");
            bail!(UsageError::at(run, problem));
        }
        run_set.add_run(run, header).map_err(UsageError::from_error)?;
        let before = scores.without;
        for record in
            JournalReader::in_folder(run).latest::<ItemRecord>().map_err(UsageError::from_error)?
        {
            let record = record.map_err(UsageError::from_error)?;
            run_set.add_item(&record).map_err(UsageError::from_error)?;
            scores.add(&header.benchmark, &record, PROFILE);
        }
        let without = scores.without - before;
        if without > 0 {
            say!(
                "{}: {without} items have no score: the model returned no probabilities, or the \
                 items failed",
                run.display()
            );
        }
    }
    match headers.into_iter().next() {
        Some(header) => Ok((header, scores)),
        None => bail!(UsageError("name a run".into())),
    }
}

/// The biases of the profile that was run, if they are not the built-in ones: the threshold was
/// fitted with them.
fn changed_biases(profiles: &[(String, String)]) -> anyhow::Result<BTreeMap<String, f64>> {
    let biases = |profile: Profile| match profile.method {
        Method::Hardened(method) => {
            method.detectors.into_iter().map(|detector| (detector.name, detector.bias)).collect()
        }
        _ => BTreeMap::new(),
    };
    let built_in = biases(Profile::named(PROFILE)?);
    let text = profiles.iter().find(|(name, _)| name == PROFILE).map_or("", |(_, text)| text);
    let used = biases(Profile::from_toml(text).map_err(UsageError::from_error)?);
    Ok(if used == built_in { BTreeMap::new() } else { used })
}

/// Summarizes a calibration for people.
fn summary(calibration: &Calibration) -> String {
    let found = &calibration.found;
    let mut text = format!(
        "threshold {:.4} for {} ({} items)\n",
        found.threshold, calibration.model, calibration.items
    );
    text += &half("chosen on", &found.chosen);
    text += &half("reported on", &found.reported);
    text += "threshold  harmful flagged  harmless flagged\n";
    for (threshold, recall, false_alarms) in &found.curve {
        let (recall, false_alarms) = (100.0 * recall, 100.0 * false_alarms);
        let _ = writeln!(text, "{threshold:>9.2}  {recall:>14.1}%  {false_alarms:>15.1}%");
    }
    text
}

fn half(name: &str, half: &Half) -> String {
    let share = |rate: &Share| {
        let [value, low, high] = [rate.value, rate.low, rate.high].map(|share| 100.0 * share);
        format!("{value:>5.1}% ({low:.1} to {high:.1}), {} of {}", rate.count, rate.total)
    };
    let auroc = half.auroc.map_or_else(String::new, |auroc| format!(", AUROC {auroc:.3}"));
    format!(
        "{name}: flags {} of the harmful, {} of the harmless{auroc}\n",
        share(&half.recall),
        share(&half.false_alarms)
    )
}
