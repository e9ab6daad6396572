//! Where calibrations of `hardened` are kept: next to the settings, each in a file named by its
//! model's digest. `ecso tune` and `ecso eval calibrate` make them. The profile's own threshold and
//! biases were fitted to `mini`. A server's model is known by its address and name.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::Once,
};

use anyhow::Context;
use ecso::{Calibration, Profile, calibration::Fit};
use serde::Serialize;

use crate::{backend, files, settings::Settings};

/// Shown for a profile that uses a calibration for its model.
pub(crate) const FITTED: &str = "fitted to this model";

/// Shown if a calibration for a model of the server is stored, but the settings name no model.
pub(crate) const UNNAMED: &str =
    "a calibration for a model of this server is stored; --model-name NAME selects it";

/// Shown for the built-in profile on the model for which it was made.
pub(crate) const BUILT_IN: &str = "fitted to mini";

/// A calibration is stored only with at least this many requests; half of them are for fitting.
const ENOUGH: usize = 60;

/// Why a calibration is not worth storing, if it isn't.
pub(crate) fn fault(calibration: &Calibration) -> Option<String> {
    let Calibration { items, found, .. } = calibration;
    if *items < ENOUGH {
        Some(format!("at least {ENOUGH} requests are needed, and there are {items}"))
    } else if !found.flags_anything() {
        let allowed = 100.0 * found.false_alarms;
        Some(format!(
            "only a threshold that flags nothing keeps to {allowed:.1}% of the harmless requests \
             (--false-alarms)"
        ))
    } else if !found.separates() {
        Some(
            "it does not flag clearly more harmful than harmless requests in the held-out half"
                .into(),
        )
    } else {
        None
    }
}

fn folder(settings: &Settings) -> PathBuf {
    settings.calibrations_dir.clone()
}

fn path(settings: &Settings, model_digest: &str) -> PathBuf {
    folder(settings).join(format!("{}.toml", &blake3::hash(model_digest.as_bytes()).to_hex()[..16]))
}

/// The text of a calibration's file; `None` if there is none.
fn read(path: &Path) -> anyhow::Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        text => text.map(Some).with_context(|| path.display().to_string()),
    }
}

/// Whether a calibration of one of the server's models is stored.
fn is_of_server(settings: &Settings) -> bool {
    let files = std::fs::read_dir(folder(settings)).into_iter().flatten().flatten();
    let texts = files
        .map(|file| file.path())
        .filter(|path| path.is_file())
        .filter_map(|path| std::fs::read_to_string(path).ok());
    let server = format!("{} ", backend::address(settings));
    texts
        .filter_map(|text| Calibration::from_toml(&text).ok())
        .any(|calibration| calibration.model_digest.starts_with(&server))
}

/// A calibration and what became of it, as `--json` shows it.
#[derive(Debug, Serialize)]
pub(crate) struct Kept<'a> {
    #[serde(flatten)]
    calibration: &'a Calibration,
    #[serde(flatten)]
    fate: Fate,
    /// The file of an earlier calibration for the model, which is used if this one is not stored.
    earlier: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum Fate {
    /// It is stored in this file.
    Stored(PathBuf),
    /// It is not stored, for this reason.
    NotStored(String),
}

/// Stores a calibration, replacing an earlier one for the model; or not, for the reason that is
/// given.
pub(crate) fn keep<'a>(
    settings: &Settings,
    calibration: &'a Calibration,
    not_stored: Option<String>,
) -> anyhow::Result<Kept<'a>> {
    let path = path(settings, &calibration.model_digest);
    let earlier = path.exists().then(|| path.clone());
    let fate = if let Some(reason) = not_stored {
        Fate::NotStored(reason)
    } else {
        let folder = folder(settings);
        std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        files::write(&path, &calibration.to_toml()?).with_context(|| path.display().to_string())?;
        Fate::Stored(path)
    };
    Ok(Kept { calibration, fate, earlier })
}

impl fmt::Display for Kept<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let model = &self.calibration.model;
        match (&self.fate, &self.earlier) {
            (Fate::Stored(path), earlier) => {
                let path = path.display();
                let replaces = if earlier.is_some() { " (it replaces an earlier one)" } else { "" };
                let is_of_server = self.calibration.model_digest.contains("://");
                let flag =
                    if is_of_server { format!(" (--model-name {model})") } else { String::new() };
                write!(
                    f,
                    "the calibration is stored in {path}{replaces}: from now on, `hardened` uses \
                     it for {model}{flag}"
                )
            }
            (Fate::NotStored(reason), None) => write!(f, "no calibration is stored: {reason}"),
            (Fate::NotStored(reason), Some(earlier)) => write!(
                f,
                "no calibration is stored: {reason}; an earlier one stays in use: remove {} to go \
                 back to the profile's own threshold and biases",
                earlier.display()
            ),
        }
    }
}

/// The curve of the calibration that is stored for the settings' model.
pub(crate) fn curve(settings: &Settings) -> anyhow::Result<ecso_gateway::Calibration> {
    let path = path(settings, &backend::identity(settings)?);
    let text = read(&path)?.with_context(|| format!("{} is gone", path.display()))?;
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
    let own = read(&path(settings, &digest))?;
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
            static WARNED: Once = Once::new();
            WARNED.call_once(|| {
                say!(
                    "ecso: warning: the calibration of `{}` for {} is of another version of that \
                     profile, so it is not used; make a new one with `ecso tune`",
                    own.profile,
                    settings.model
                );
            });
            Ok((profile, "its calibration is for another version and is not used"))
        }
    }
}
