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
    profile::{Hardened, Method},
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
    let (header, biases, scores) = read_runs(&args.runs)?;
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
        biases,
        found,
    );
    let settings = settings::load_file(file)?;
    let fault = calibration::fault(&calibration);
    let not_stored = fault.clone().or_else(|| args.dry_run.then(|| "--dry-run".to_owned()));
    // Stored before anything is printed: a reader that has enough of the output ends the program.
    let kept = calibration::keep(&settings, &calibration, not_stored)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&kept)?);
    } else {
        print!("{}", summary(&calibration));
    }
    let bounds = scores.scored.iter().filter(|scored| scored.is_lower_bound).count();
    if bounds > 0 {
        say!(
            "{bounds} items reached their run's own threshold, so they may not have been asked \
             everything: the harmless ones count as flagged at every threshold. To fit a higher \
             one, run again with `--set threshold=1`"
        );
    }
    anyhow::ensure!(fault.is_none(), "{kept}");
    say!("{kept}");
    Ok(())
}

/// The header of the first run, the biases that it has instead of the built-in ones, and the scores
/// of all runs.
fn read_runs(runs: &[PathBuf]) -> anyhow::Result<(RunHeader, BTreeMap<String, f64>, Scores)> {
    let headers = runs
        .iter()
        .map(|run| JournalReader::in_folder(run).header())
        .collect::<Result<Vec<RunHeader>, _>>();
    let headers = headers.map_err(UsageError::from_error)?;
    let (mut scores, mut run_set) = (Scores::default(), RunSet::default());
    let mut first_biases = None;
    for (run, header) in runs.iter().zip(&headers) {
        // With a `+` if `--set` changed it.
        let is_arm = |(name, _): &&(String, String)| name.trim_end_matches('+') == PROFILE;
        let Some((arm, text)) = header.profiles.iter().find(is_arm) else {
            let problem = format!("no arm {PROFILE}; run it with --profile {PROFILE}");
            bail!(UsageError::at(run, problem));
        };
        let (biases, threshold) =
            changed_biases(text).map_err(|problem| UsageError::at(run, problem))?;
        first_biases.get_or_insert(biases);
        run_set.add_run(run, header).map_err(UsageError::from_error)?;
        let before = scores.without;
        for record in
            JournalReader::in_folder(run).latest::<ItemRecord>().map_err(UsageError::from_error)?
        {
            let record = record.map_err(UsageError::from_error)?;
            run_set.add_item(&record).map_err(UsageError::from_error)?;
            scores.add(&header.benchmark, &record, arm, threshold);
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
    match headers.into_iter().next().zip(first_biases) {
        Some((header, biases)) => Ok((header, biases, scores)),
        None => bail!(UsageError("name a run".into())),
    }
}

/// The biases of the profile that was run, if they are not the built-in ones, since the threshold
/// is fitted with them; and its threshold.
///
/// # Errors
/// What is wrong if the profile differs from the built-in one in anything else, except its name,
/// its threshold, the `ask_from` that move with the biases, and the limits of answers: its scores
/// say nothing about those of the built-in one.
fn changed_biases(text: &str) -> Result<(BTreeMap<String, f64>, f64), String> {
    let again = format!(
        "run it again with the `{PROFILE}` of this version and default settings, or use `ecso tune`"
    );
    let used = Profile::from_toml(text)
        .map_err(|error| format!("its `{PROFILE}` can't be read ({error}): {again}"))?;
    let mut expected = Profile::hardened();
    expected.name.clone_from(&used.name);
    expected.direct.max_tokens = used.direct.max_tokens;
    expected.caption.max_tokens = used.caption.max_tokens;
    expected.safe.max_tokens = used.safe.max_tokens;
    let (mut biases, mut threshold) = (BTreeMap::new(), 1.0);
    if let (Method::Hardened(expected), Method::Hardened(used)) =
        (&mut expected.method, &used.method)
    {
        threshold = used.threshold;
        expected.threshold = threshold;
        if biases_of(expected) != biases_of(used) {
            biases = biases_of(used);
        }
        expected.set_biases(&biases);
    }
    // The texts, not what is read from them: a key that an older text lacks is read as today's.
    if expected.to_toml() == text {
        Ok((biases, threshold))
    } else {
        Err(format!(
            "its `{PROFILE}` is not the one of this version with default settings: its questions, \
             detectors or steps differ, so that a threshold for its scores means nothing for the \
             other: {again}"
        ))
    }
}

fn biases_of(method: &Hardened) -> BTreeMap<String, f64> {
    method.detectors.iter().map(|detector| (detector.name.clone(), detector.bias)).collect()
}

/// Summarizes a calibration as text.
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

#[cfg(test)]
mod tests {
    use ecso_eval::run::capped;

    use super::*;

    /// The text of the built-in profile with other values, under its own name.
    fn text_with(changes: &[(&str, &str)]) -> String {
        let mut profile = Profile::hardened();
        for (key, value) in changes.iter().chain(&[("name", PROFILE)]) {
            profile = profile.with(key, value).unwrap();
        }
        profile.to_toml()
    }

    #[test]
    fn runs_with_other_biases_thresholds_and_limits_can_be_calibrated() {
        assert!(changed_biases(&text_with(&[])).unwrap().0.is_empty());
        let mut fitted = capped(vec![Profile::hardened()], Some(64)).remove(0);
        let Method::Hardened(method) = &mut fitted.method else { panic!("another method") };
        method.threshold = 0.7;
        let other_threshold = changed_biases(&text_with(&[("threshold", "0.7")]));
        assert_eq!(other_threshold, Ok((BTreeMap::new(), 0.7)));
        let biases: BTreeMap<String, f64> =
            biases_of(method).into_iter().map(|(name, bias)| (name, bias - 1.3)).collect();
        method.set_biases(&biases);
        assert_eq!(changed_biases(&fitted.to_toml()), Ok((biases, 0.7)));
    }

    #[test]
    fn runs_with_another_text_of_the_profile_cannot_be_calibrated() {
        let mut texts: Vec<String> = [
            // The journal of `ecso tune`.
            &[("threshold", "1"), ("early_exit", "false")] as &[(&str, &str)],
            &[("scope", "all")],
            &[("questions.gladly.template", "Is this fine? {x}")],
            &[("questions.words.system", "Is it harmful?")],
        ]
        .map(text_with)
        .into();
        // Another bias, but terms that are asked as before.
        let mut profile = Profile::hardened();
        let Method::Hardened(method) = &mut profile.method else { panic!("another method") };
        for detector in &mut method.detectors {
            detector.bias -= 1.0;
        }
        texts.push(profile.to_toml());
        // A key that is missing would be read as the one of today.
        let text = Profile::hardened().to_toml();
        let system = text.lines().find(|line| line.starts_with("system = ")).unwrap();
        texts.push(text.replacen(&format!("{system}\n"), "", 1));
        texts.push("questions = 3".into());
        for text in texts {
            let error = changed_biases(&text).unwrap_err();
            assert!(error.contains("run it again") && error.contains("`ecso tune`"), "{error}");
        }
    }
}
