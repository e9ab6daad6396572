//! Calibrations: which threshold the profile `hardened` takes for a model, as `ecso eval calibrate` found it. One for `mini` comes
//! with the program; others are kept beside the settings, by the model's digest.

use std::path::PathBuf;

use anyhow::Context;
use ecso::{Profile, profile::Method};
use ecso_eval::calibrate::Calibration;
use serde::{Deserialize, Serialize};

use crate::{config::Settings, open};

/// What comes with the program.
const OURS: &str = include_str!("calibrations.toml");

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
    pub(crate) found: Calibration,
}

#[derive(Deserialize)]
struct Ours {
    #[serde(default)]
    calibration: Vec<Stored>,
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

/// The profile for a model that nobody chose one for, and why it is that one: the calibrated one, where there is a calibration of its
/// present text, else the paper's.
pub(crate) fn profile(settings: &Settings) -> anyhow::Result<(Profile, &'static str)> {
    let ours: Ours = toml::from_str(OURS).context("the calibrations of this build")?;
    // A file's digest takes time: only where it could be known.
    let any_own = std::fs::read_dir(folder(settings)).is_ok_and(|mut files| files.next().is_some());
    if !any_own && open::is_file(&settings.model) {
        return Ok((Profile::paper(), "no calibration of `hardened` for this model"));
    }
    let Ok(digest) = open::identity(settings) else {
        return Ok((Profile::paper(), "this model is not known"));
    };
    let own = std::fs::read_to_string(path(settings, &digest)).ok();
    let own = own
        .map(|text| toml::from_str::<Stored>(&text))
        .transpose()
        .with_context(|| format!("{}: delete it, or calibrate again", path(settings, &digest).display()))?;
    let known = ours.calibration.into_iter().find(|stored| stored.model_digest == digest);
    let Some(stored) = own.or(known) else {
        return Ok((Profile::paper(), "no calibration of `hardened` for this model"));
    };
    let mut profile = Profile::named(&stored.profile)?;
    if hash(&profile) != stored.profile_hash {
        eprintln!(
            "ecso: warning: the calibration of `{}` for {} is of another version of that profile, so it is not used; make a new one with \
             `ecso eval calibrate`, or name the profile",
            stored.profile, settings.model
        );
        return Ok((Profile::paper(), "the calibration for this model is of another version of `hardened`"));
    }
    let Method::Hardened(method) = &mut profile.method else {
        return Ok((Profile::paper(), "the calibration for this model is of a profile that has no threshold"));
    };
    method.threshold = stored.found.threshold;
    Ok((profile, "calibrated for this model"))
}
