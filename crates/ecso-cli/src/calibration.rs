//! Where calibrations of `hardened` are kept: next to the settings, each in a file named by its
//! model's digest. `ecso tune` and `ecso eval calibrate` make them. The profile's own threshold and
//! biases were fitted to `mini`. A server's model is known by its address and name.

use std::path::PathBuf;

use anyhow::Context;
use ecso::{Calibration, Profile, calibration::Fit};

use crate::{backend, settings::Settings};

/// Shown for a profile that uses a calibration for its model.
pub(crate) const FITTED: &str = "fitted to this model";

/// Shown if a calibration for a model of the server is stored, but the settings name no model.
pub(crate) const UNNAMED: &str =
    "a calibration for a model of this server is stored; --model-name NAME selects it";

/// Shown for the built-in profile on the model for which it was made.
pub(crate) const BUILT_IN: &str = "fitted to mini";

/// A calibration is stored only with at least this many requests; half of them are for fitting.
const ENOUGH: usize = 60;

/// Why a calibration is not worth keeping, if it isn't.
pub(crate) fn fault(calibration: &Calibration) -> Option<String> {
    if calibration.items < ENOUGH {
        return Some(format!(
            "with {} requests, no calibration is stored: at least {ENOUGH} are needed",
            calibration.items
        ));
    }
    let told = "no calibration is stored: on the held-out half, it does not flag clearly more harmful than harmless requests";
    (!calibration.found.separates()).then(|| told.to_owned())
}

fn folder(settings: &Settings) -> PathBuf {
    settings.calibrations_dir.clone()
}

fn path(settings: &Settings, model_digest: &str) -> PathBuf {
    folder(settings).join(format!("{}.toml", &blake3::hash(model_digest.as_bytes()).to_hex()[..16]))
}

/// Whether a calibration of one of the server's models is stored.
fn is_of_server(settings: &Settings) -> bool {
    let files = std::fs::read_dir(folder(settings)).into_iter().flatten().flatten();
    let texts = files.filter_map(|file| std::fs::read_to_string(file.path()).ok());
    let server = format!("{} ", backend::address(settings));
    texts
        .filter_map(|text| Calibration::from_toml(&text).ok())
        .any(|calibration| calibration.model_digest.starts_with(&server))
}

/// Stores a calibration, replacing an earlier one for the model.
pub(crate) fn store(settings: &Settings, calibration: &Calibration) -> anyhow::Result<PathBuf> {
    let path = path(settings, &calibration.model_digest);
    let folder = folder(settings);
    std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let mut file = tempfile::NamedTempFile::new_in(&folder)?;
    std::io::Write::write_all(&mut file, calibration.to_toml()?.as_bytes())?;
    file.persist(&path).with_context(|| path.display().to_string())?;
    Ok(path)
}

/// Says for which model a stored calibration is used from now on.
pub(crate) fn usage(calibration: &Calibration) -> String {
    let flag =
        if calibration.model_digest.contains("://") { ", named by --model-name" } else { "" };
    format!("`hardened` uses it for {}{flag}, from now on", calibration.model)
}

/// The curve of the calibration that is stored for the settings' model.
pub(crate) fn curve(settings: &Settings) -> anyhow::Result<ecso_gateway::Calibration> {
    let path = path(settings, &backend::identity(settings)?);
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let Fit { threshold, reported, curve, .. } = Calibration::from_toml(&text)?.found;
    let requests = reported.recall.total + reported.false_alarms.total;
    Ok(ecso_gateway::Calibration { threshold, requests, curve })
}

/// The profile if none was chosen: `hardened`, with the threshold of a calibration of its current
/// text if there is one; and why that threshold is used.
pub(crate) fn profile(settings: &Settings) -> anyhow::Result<(Profile, &'static str)> {
    let profile = Profile::hardened();
    let unfitted = if settings.model == "mini" { BUILT_IN } else { "not fitted to this model" };
    // Hashing a file takes time, so it is done only if there are calibrations.
    let any_own = std::fs::read_dir(folder(settings)).is_ok_and(|mut files| files.next().is_some());
    if !any_own {
        return Ok((profile, unfitted));
    }
    // The server may have another model by now.
    if settings.is_server() && settings.model_name.is_empty() {
        let reason = if is_of_server(settings) { UNNAMED } else { unfitted };
        return Ok((profile, reason));
    }
    if settings.is_server()
        && (settings.checks.url.as_str(), settings.checks.model_name.as_str()) != ("", "")
    {
        return Ok((profile, "there is no calibration for the model that `checks` names"));
    }
    let Ok(digest) = backend::identity(settings) else {
        return Ok((profile, "this model is not known"));
    };
    let own = std::fs::read_to_string(path(settings, &digest)).ok();
    let own = own.map(|text| Calibration::from_toml(&text)).transpose().with_context(|| {
        format!("{}: delete it, or calibrate again", path(settings, &digest).display())
    })?;
    match own {
        None => Ok((profile, unfitted)),
        Some(own) if own.model_digest != digest => {
            let path = path(settings, &digest);
            anyhow::bail!(
                "{}: made for another model: delete it, or calibrate again",
                path.display()
            )
        }
        Some(own) if own.is_for(&profile) => Ok((profile.calibrated(&own)?, FITTED)),
        Some(own) => {
            say!(
                "ecso: warning: the calibration of `{}` for {} is of another version of that profile, so it is not used; make a new \
                 one with `ecso tune`",
                own.profile,
                settings.model
            );
            Ok((profile, "its calibration is for another version and is not used"))
        }
    }
}
