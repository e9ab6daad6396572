//! From settings to the profile that guards.

use std::{
    fs,
    io::{self, Read},
    path::Path,
};

use ecso::{Profile, ProfileError};
use ecso_gateway::{Fitted, Profiles};

use crate::{
    calibration::{self, FITTED, UNNAMED},
    error::UsageError,
    settings::Settings,
};

/// Loads the profile that the settings name, with their overrides.
pub(crate) fn load(settings: &Settings) -> anyhow::Result<Profile> {
    Ok(load_with_reason(settings)?.0)
}

/// [`load`], with the reason for the thresholds of `hardened`, if that profile was not chosen
/// explicitly or is fitted to the model.
pub(crate) fn load_with_reason(
    settings: &Settings,
) -> anyhow::Result<(Profile, Option<&'static str>)> {
    let (mut profile, reason) = match settings.profile.as_str() {
        "auto" | "hardened" => {
            let (profile, reason) = calibration::profile(settings)?;
            let is_shown = settings.profile == "auto" || [FITTED, UNNAMED].contains(&reason);
            (profile, is_shown.then_some(reason))
        }
        name => (by_name(name)?, None),
    };
    for (key, value) in &settings.set {
        profile = profile.with(key, value).map_err(|error| of_settings(key, error))?;
    }
    Ok((profile, reason))
}

/// The error of `--set`, which says so if the key is one of the settings, and not of the profile.
fn of_settings(key: &str, error: ProfileError) -> anyhow::Error {
    let section = key.split('.').next().unwrap_or_default();
    if !["checks", "engine", "gateway", "images", "server"].contains(&section) {
        return error.into();
    }
    let variable = key.to_uppercase().replace('.', "__");
    let problem = format!(
        "--set {key}: this is a setting, not a field of the profile; write it in the settings file \
         or set ECSO__{variable}"
    );
    UsageError(problem).into()
}

/// Reports that the profile is fitted to the model, since its name doesn't tell, or could be.
pub(crate) fn report_fit(settings: &Settings) -> anyhow::Result<()> {
    match load_with_reason(settings)? {
        (profile, Some(FITTED)) => say!(
            "profile {}: {FITTED}, as stored by `ecso tune` or `ecso eval calibrate`",
            profile.name
        ),
        (_, Some(UNNAMED)) => say!("{UNNAMED}"),
        _ => {}
    }
    Ok(())
}

/// Loads the default profile of a gateway, and those of single models and clients. A fit to one
/// model of a server is for requests to that model only.
pub(crate) fn load_all(settings: &Settings) -> anyhow::Result<Profiles> {
    let mut for_all = settings.clone();
    if settings.is_server() {
        for_all.model_name.clear();
    }
    let named = |settings: &Settings, name: &str| match name {
        "auto" | "hardened" => Ok(calibration::profile(settings)?.0),
        name => by_name(name),
    };
    let chosen = settings.gateway.profile_names();
    let chosen = chosen.map(|name| Ok((name.to_owned(), named(&for_all, name)?)));
    let is_fitted = settings.is_server() && calibration::profile(settings)?.1 == FITTED;
    let fitted = is_fitted.then(|| {
        let is_default = matches!(settings.profile.as_str(), "auto" | "hardened");
        anyhow::Ok(Fitted {
            model: settings.model_name.clone(),
            default: is_default.then(|| load(settings)).transpose()?,
            hardened: named(settings, "hardened")?,
        })
    });
    Ok(Profiles {
        default: load(&for_all)?,
        named: chosen.collect::<anyhow::Result<_>>()?,
        fitted: fitted.transpose()?,
    })
}

/// The calibration curve of the profile in use, if that is fitted to the model and only its
/// threshold is overridden.
pub(crate) fn calibration_curve(
    settings: &Settings,
) -> anyhow::Result<Option<ecso_gateway::Calibration>> {
    let (_, reason) = load_with_reason(settings)?;
    if reason != Some(FITTED) || settings.set.keys().any(|key| key != "threshold") {
        return Ok(None);
    }
    calibration::curve(settings).map(Some)
}

/// The text of a file, which may be a pipe but not endless.
fn read(path: &Path) -> io::Result<String> {
    const MAX: u64 = 16 << 20;
    let mut text = String::new();
    if fs::File::open(path)?.take(MAX).read_to_string(&mut text)? as u64 == MAX {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(text)
}

fn by_name(name: &str) -> anyhow::Result<Profile> {
    let path = Path::new(name);
    let is_file =
        path.extension().is_some_and(|extension| extension == "toml") || name.contains('/');
    if !is_file {
        return Ok(Profile::named(name)?);
    }
    let text = read(path).map_err(|error| UsageError(format!("profile {name}: {error}")))?;
    let profile = Profile::from_toml(&text);
    let mut profile = profile.map_err(|error| UsageError(format!("profile {name}: {error}")))?;
    // Only a built-in profile has its name.
    if Profile::named(&profile.name).is_ok_and(|built_in| built_in != profile) {
        profile.name.push('+');
    }
    Ok(profile)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ecso::{
        Calibration,
        calibration::{Fit, Half},
    };
    use ecso_eval::stats::Rate;

    use super::*;
    use crate::{backend, settings};

    /// Stores a calibration for the settings' model.
    fn store_calibration(settings: &Settings) -> Fit {
        let half = Half {
            recall: Rate::wilson(40, 50).into(),
            false_alarms: Rate::wilson(2, 50).into(),
            auroc: None,
        };
        let found = Fit {
            threshold: 0.625,
            false_alarms: 0.03,
            chosen: half.clone(),
            reported: half,
            curve: vec![(0.5, 0.9, 0.1), (0.625, 0.8, 0.04)],
        };
        let digest = backend::identity(settings).unwrap();
        let (profile, biases) = (Profile::hardened(), BTreeMap::new());
        let calibration = Calibration::new(&profile, "m", digest, 200, biases, found.clone());
        calibration::keep(settings, &calibration, None).unwrap();
        found
    }

    #[test]
    fn a_calibration_of_a_server_is_used_for_the_named_model_only() {
        let folder = tempfile::tempdir().unwrap();
        let mut settings = settings::load_file(None).unwrap();
        settings.calibrations_dir = folder.path().to_owned();
        settings.model = "http://localhost:1/v1".into();
        for (name, is_fitted) in [("m", true), ("other", false), ("", false)] {
            settings.model_name = "m".into();
            store_calibration(&settings);
            settings.model_name = name.into();
            let (_, reason) = load_with_reason(&settings).unwrap();
            assert_eq!(reason == Some(FITTED), is_fitted, "{name}: {reason:?}");
        }
    }

    #[test]
    fn a_gateway_uses_the_fit_for_requests_to_its_model_only() {
        let folder = tempfile::tempdir().unwrap();
        let mut settings = settings::load_file(None).unwrap();
        settings.calibrations_dir = folder.path().to_owned();
        (settings.model, settings.model_name) = ("http://localhost:1".into(), "m".into());
        settings.gateway.profiles.insert("other".into(), "hardened".into());
        store_calibration(&settings);
        // Another spelling of the address.
        settings.model = "http://localhost:1/v1/".into();
        let threshold = |profile: &Profile| match &profile.method {
            ecso::profile::Method::Hardened(method) => method.threshold,
            _ => panic!("another method"),
        };
        let profiles = load_all(&settings).unwrap();
        let fitted = profiles.fitted.unwrap();
        assert_eq!(fitted.model, "m");
        for profile in [&profiles.default, &profiles.named["hardened"]] {
            assert!((threshold(profile) - 0.5).abs() < 1e-9);
        }
        for profile in [&fitted.default.unwrap(), &fitted.hardened] {
            assert!((threshold(profile) - 0.625).abs() < 1e-9);
        }
        settings.checks.model_name = "judge".into();
        assert!(load_all(&settings).unwrap().fitted.is_none());
    }

    #[test]
    fn only_a_fitted_profile_has_a_calibration_curve() {
        let folder = tempfile::tempdir().unwrap();
        let mut settings = settings::load_file(None).unwrap();
        (settings.model, settings.calibrations_dir) = ("mini".into(), folder.path().to_owned());
        assert_eq!(calibration_curve(&settings).unwrap(), None);
        let found = store_calibration(&settings);
        let shown =
            ecso_gateway::Calibration { threshold: 0.625, requests: 100, curve: found.curve };
        assert_eq!(calibration_curve(&settings).unwrap(), Some(shown.clone()));
        settings.set.insert("threshold".into(), "0.7".into());
        assert_eq!(calibration_curve(&settings).unwrap(), Some(shown));
        settings.set.insert("early_exit".into(), "false".into());
        assert_eq!(calibration_curve(&settings).unwrap(), None, "scores may differ");
        settings.set.clear();
        settings.profile = "paper".into();
        assert_eq!(calibration_curve(&settings).unwrap(), None);
    }
}
