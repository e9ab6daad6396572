//! Calibrations: which threshold, and which biases, the profile `hardened` takes for a model, as
//! `ecso tune` or `ecso eval calibrate` found them; kept beside the settings, by the model's
//! digest. The profile's own were fitted to `mini`.

use std::{collections::BTreeMap, path::PathBuf};

use anyhow::Context;
use ecso::{Profile, profile::Method};
use ecso_eval::calibrate::Calibration;
use serde::{Deserialize, Serialize};

use crate::{
    config::{self, Settings},
    open,
};

/// Said of a profile that takes a calibration of its model.
pub(crate) const FITTED: &str = "fitted to this model";

/// A calibration and what it is about.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Stored {
    /// Version of ecso.
    pub(crate) ecso: String,
    pub(crate) model: String,
    pub(crate) model_digest: String,
    pub(crate) profile: String,
    /// Of the profile's text: under another text the threshold means nothing.
    pub(crate) profile_hash: String,
    /// How many items had a score.
    pub(crate) items: usize,
    /// The biases of the detectors, by name, where they were fitted too.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) biases: BTreeMap<String, f64>,
    pub(crate) found: Calibration,
}

/// Requests from which on a fit is kept: half of them to fit on.
const ENOUGH: usize = 60;

impl Stored {
    /// Why it is not worth keeping, if it isn't.
    pub(crate) fn fault(&self) -> Option<String> {
        if self.items < ENOUGH {
            return Some(format!("of {} requests no fit is kept: it takes {ENOUGH}", self.items));
        }
        let told = "no fit is kept: on the half that it was not fitted on it does not surely flag more of the harmful than of the harmless";
        (!self.found.tells_apart()).then(|| told.to_owned())
    }
}

/// The name of a profile's text: 16 hexadecimal digits of its BLAKE3.
pub(crate) fn hash(profile: &Profile) -> String {
    blake3::hash(profile.to_toml().as_bytes()).to_hex()[..16].to_owned()
}

fn folder(settings: &Settings) -> PathBuf {
    settings.calibrations_dir.clone()
}

fn path(settings: &Settings, model_digest: &str) -> PathBuf {
    folder(settings).join(format!("{}.toml", &blake3::hash(model_digest.as_bytes()).to_hex()[..16]))
}

/// Keeps a calibration, in place of an earlier one for the model.
pub(crate) fn store(settings: &Settings, stored: &Stored) -> anyhow::Result<PathBuf> {
    let path = path(settings, &stored.model_digest);
    let folder = folder(settings);
    std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let mut file = tempfile::NamedTempFile::new_in(&folder)?;
    std::io::Write::write_all(&mut file, toml::to_string(stored)?.as_bytes())?;
    file.persist(&path).with_context(|| path.display().to_string())?;
    Ok(path)
}

/// What the threshold does that the settings' profile takes, where it is fitted to the model and
/// nothing else of it is changed.
pub(crate) fn curve(settings: &Settings) -> anyhow::Result<Option<ecso_gateway::Calibration>> {
    let (_, why) = config::chosen_profile(settings)?;
    if why != Some(FITTED) || settings.set.keys().any(|key| key != "threshold") {
        return Ok(None);
    }
    let text = std::fs::read_to_string(path(settings, &open::identity(settings)?))?;
    let Calibration { threshold, reported, curve, .. } = toml::from_str::<Stored>(&text)?.found;
    let requests = reported.recall.total + reported.false_alarms.total;
    Ok(Some(ecso_gateway::Calibration { threshold, requests, curve }))
}

/// The profile for a model that nobody chose one for: `hardened`, with the threshold of a
/// calibration of its present text where there is one; and why that threshold.
pub(crate) fn profile(settings: &Settings) -> anyhow::Result<(Profile, &'static str)> {
    let mut profile = Profile::named("hardened")?;
    // A file's digest takes time: only where it could be known.
    let any_own = std::fs::read_dir(folder(settings)).is_ok_and(|mut files| files.next().is_some());
    if !any_own {
        return Ok((profile, "not fitted to this model"));
    }
    let Ok(digest) = open::identity(settings) else {
        return Ok((profile, "this model is not known"));
    };
    let own = std::fs::read_to_string(path(settings, &digest)).ok();
    let own = own.map(|text| toml::from_str::<Stored>(&text)).transpose().with_context(|| {
        format!("{}: delete it, or calibrate again", path(settings, &digest).display())
    })?;
    match own {
        None => Ok((profile, "not fitted to this model")),
        Some(stored) if stored.profile == profile.name && stored.profile_hash == hash(&profile) => {
            if let Method::Hardened(method) = &mut profile.method {
                method.threshold = stored.found.threshold;
                for detector in &mut method.detectors {
                    detector.bias =
                        stored.biases.get(&detector.name).copied().unwrap_or(detector.bias);
                }
            }
            Ok((profile, FITTED))
        }
        Some(stored) => {
            say!(
                "ecso: warning: the calibration of `{}` for {} is of another version of that profile, so it is not used; make a new \
                 one with `ecso tune`",
                stored.profile,
                settings.model
            );
            Ok((profile, "fitted in another version, which is not used"))
        }
    }
}

#[cfg(test)]
mod tests {
    use ecso_eval::{calibrate::Half, stats::Rate};

    use super::*;
    use crate::cli::{ModelArgs, ProfileArgs};

    #[test]
    fn the_curve_is_that_of_the_profile_in_use() {
        let folder = tempfile::tempdir().unwrap();
        let mut settings =
            config::load(None, &ModelArgs::default(), &ProfileArgs::default()).unwrap();
        (settings.model, settings.calibrations_dir) = ("mini".into(), folder.path().to_owned());
        assert_eq!(curve(&settings).unwrap(), None);
        let half =
            Half { recall: Rate::wilson(40, 50), false_alarms: Rate::wilson(2, 50), auroc: None };
        let found = Calibration {
            threshold: 0.625,
            false_alarms: 0.03,
            chosen: half.clone(),
            reported: half,
            curve: vec![(0.5, 0.9, 0.1), (0.625, 0.8, 0.04)],
        };
        let profile = Profile::named("hardened").unwrap();
        let stored = Stored {
            ecso: String::new(),
            model: "mini".into(),
            model_digest: open::identity(&settings).unwrap(),
            profile: profile.name.clone(),
            profile_hash: hash(&profile),
            items: 200,
            biases: BTreeMap::new(),
            found: found.clone(),
        };
        store(&settings, &stored).unwrap();
        let shown =
            ecso_gateway::Calibration { threshold: 0.625, requests: 100, curve: found.curve };
        assert_eq!(curve(&settings).unwrap(), Some(shown.clone()));
        settings.set.insert("threshold".into(), "0.7".into());
        assert_eq!(curve(&settings).unwrap(), Some(shown));
        settings.set.insert("early_exit".into(), "false".into());
        assert_eq!(curve(&settings).unwrap(), None, "scores may be others");
        settings.set.clear();
        settings.profile = "paper".into();
        assert_eq!(curve(&settings).unwrap(), None);
    }
}
