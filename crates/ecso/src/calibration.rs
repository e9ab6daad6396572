//! Calibrations: the threshold and biases of `hardened`, fitted to one model.

use std::{collections::BTreeMap, error::Error, fmt};

use serde::{Deserialize, Serialize};

use crate::{
    mllm::Cause,
    profile::{Hardened, Method, Profile, Term},
};

/// A threshold and biases that were fitted to one model, and how well they did.
/// [`Profile::calibrated`] applies them. `ecso tune` and `ecso eval calibrate` make them; the
/// program keeps each as a TOML file.
///
/// ```no_run
/// use ecso::{Calibration, Profile};
///
/// # fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let calibration = Calibration::from_toml(&std::fs::read_to_string("calibration.toml")?)?;
/// let profile = Profile::hardened().calibrated(&calibration)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Calibration {
    /// The version of ecso that made it.
    pub ecso: String,
    /// The model's name.
    pub model: String,
    /// What tells the model from others of that name, such as a digest of its files.
    pub model_digest: String,
    /// The profile's name.
    pub profile: String,
    /// [`Profile::hash`]. With another text of the profile, the threshold means nothing.
    pub profile_hash: String,
    /// The number of requests that had a score.
    pub items: usize,
    /// The biases of the detectors, by name; empty if they were not fitted.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub biases: BTreeMap<String, f64>,
    /// The threshold, and what it does.
    pub found: Fit,
}

/// A threshold, chosen on one half of the requests and measured on the other.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fit {
    /// The verdict is unsafe from this probability of harm on; 0..=1.
    pub threshold: f64,
    /// The share of harmless requests that may be flagged by mistake; 0..=1.
    pub false_alarms: f64,
    /// On the half on which the threshold was chosen.
    pub chosen: Half,
    /// On the other half.
    pub reported: Half,
    /// (threshold, share of harmful requests flagged, share of harmless ones flagged), all in
    /// 0..=1, on the other half.
    pub curve: Vec<(f64, f64, f64)>,
}

/// What a threshold does on one half of the requests.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Half {
    /// Harmful requests that are flagged.
    pub recall: Share,
    /// Harmless requests that are flagged.
    pub false_alarms: Share,
    /// The area under the ROC curve of the scores; `None` without requests of both kinds.
    pub auroc: Option<f64>,
}

/// A share with its 95% interval, all in 0..=1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Share {
    /// How many.
    pub count: usize,
    /// Of how many.
    pub total: usize,
    /// The share; NaN if `total` is 0.
    pub value: f64,
    /// The lower end of the interval.
    pub low: f64,
    /// The upper end.
    pub high: f64,
}

impl Share {
    /// Whether the difference to another share is more than chance: its 95% interval (Newcombe,
    /// 1998, method 10) lies above 0. Shares of which too little is known are never clearly apart.
    #[must_use]
    pub fn is_clearly_above(self, other: Self) -> bool {
        self.value - other.value > (self.value - self.low).hypot(other.high - other.value)
    }
}

impl Fit {
    /// Whether the threshold is better than chance on the half on which it was not chosen: clearly
    /// more harmful requests are flagged than harmless ones.
    #[must_use]
    pub fn separates(&self) -> bool {
        self.reported.recall.is_clearly_above(self.reported.false_alarms)
    }

    /// Whether some probability of harm reaches the threshold. 1 flags nothing but what a content
    /// filter refuses.
    #[must_use]
    pub fn flags_anything(&self) -> bool {
        self.threshold < 1.0
    }
}

impl Calibration {
    /// A calibration of `profile` for a model, fitted on `items` requests.
    #[must_use]
    pub fn new(
        profile: &Profile,
        model: impl Into<String>,
        model_digest: impl Into<String>,
        items: usize,
        biases: BTreeMap<String, f64>,
        found: Fit,
    ) -> Self {
        Self {
            ecso: env!("CARGO_PKG_VERSION").into(),
            model: model.into(),
            model_digest: model_digest.into(),
            profile: profile.name.clone(),
            profile_hash: profile.hash(),
            items,
            biases,
            found,
        }
    }

    /// Reads a calibration from TOML.
    ///
    /// # Errors
    /// [`CalibrationError::Invalid`], also if the threshold is not in 0..1 or a bias is not a number.
    pub fn from_toml(text: &str) -> Result<Self, CalibrationError> {
        let read: Self = toml::from_str(text).map_err(|error| {
            CalibrationError::Invalid(Cause::new(error.to_string().trim_end(), error))
        })?;
        read.checked()
    }

    /// The calibration, if its numbers can be used.
    fn checked(self) -> Result<Self, CalibrationError> {
        if !(0.0..1.0).contains(&self.found.threshold) {
            let message = "the threshold must be at least 0 and less than 1, from which on \
                           nothing is flagged";
            return Err(CalibrationError::Invalid(message.into()));
        }
        let is_share = |share: f64| (0.0..=1.0).contains(&share);
        let curve = &self.found.curve;
        let is_curve = !curve.is_empty()
            && curve.is_sorted_by(|before, after| before.0 < after.0)
            && curve.iter().all(|(at, harmful, harmless)| {
                [*at, *harmful, *harmless].into_iter().all(is_share)
            });
        if !is_curve {
            let message = "the curve must have points in the order of their thresholds, each of \
                           three numbers between 0 and 1";
            return Err(CalibrationError::Invalid(message.into()));
        }
        match self.biases.iter().find(|(_, bias)| !bias.is_finite()) {
            Some((name, _)) => {
                let message = format!("the bias of `{name}` must be a finite number");
                Err(CalibrationError::Invalid(message.into()))
            }
            None => Ok(self),
        }
    }

    /// The calibration as TOML.
    ///
    /// # Errors
    /// [`CalibrationError::Invalid`] if a number is too large for TOML.
    pub fn to_toml(&self) -> Result<String, CalibrationError> {
        toml::to_string(self).map_err(|error| CalibrationError::Invalid(Cause::from_error(error)))
    }

    /// Whether it was made for exactly this profile.
    #[must_use]
    pub fn is_for(&self, profile: &Profile) -> bool {
        self.profile == profile.name && self.profile_hash == profile.hash()
    }
}

impl Hardened {
    /// Gives the detectors with these names other biases. The [`Term::ask_from`] of their terms
    /// move by the same difference, so that a detector still stops at the same findings.
    pub fn set_biases(&mut self, biases: &BTreeMap<String, f64>) {
        for detector in &mut self.detectors {
            let Some(bias) = biases.get(&detector.name) else { continue };
            let difference = *bias - detector.bias;
            detector.bias = *bias;
            for ask_from in detector.terms.iter_mut().filter_map(|term| term.ask_from.as_mut()) {
                *ask_from += difference;
            }
        }
    }

    /// Whether a detector asks its next term if bias and earlier terms sum to `log_odds`.
    /// Otherwise it stops and finds no harm. After an answer without a probability it asks
    /// everything; `has_scores` is false then.
    #[must_use]
    pub fn asks(&self, term: &Term, log_odds: f64, has_scores: bool) -> bool {
        let is_hopeless = term.ask_from.is_some_and(|least| log_odds < least);
        !(self.early_exit && has_scores && is_hopeless)
    }
}

/// The probability of harm of a detector that was asked to its end, from the sum of its bias and
/// terms. It is harm if this is at least [`Hardened::threshold`].
#[must_use]
pub fn probability(log_odds: f64) -> f64 {
    1.0 / (1.0 + (-log_odds).exp())
}

impl Profile {
    /// The same profile with the threshold and the biases of a calibration
    /// ([`Hardened::set_biases`]). The name stays.
    ///
    /// # Errors
    /// [`CalibrationError::OtherProfile`] if the calibration was made for another profile, or for
    /// another version of this one; [`CalibrationError::Invalid`] if its numbers can't be used.
    pub fn calibrated(mut self, calibration: &Calibration) -> Result<Self, CalibrationError> {
        let calibration = &calibration.clone().checked()?;
        let is_made_for_this = calibration.is_for(&self);
        match &mut self.method {
            Method::Hardened(method) if is_made_for_this => {
                method.threshold = calibration.found.threshold;
                method.set_biases(&calibration.biases);
                Ok(self)
            }
            _ => Err(CalibrationError::OtherProfile {
                calibrated: calibration.profile.clone(),
                profile: self.name,
            }),
        }
    }
}

/// Why a calibration can't be used.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum CalibrationError {
    /// Not TOML, or not a calibration.
    Invalid(Cause),
    /// It was made for another profile, or for another version of the profile.
    OtherProfile {
        /// The profile that it was made for.
        calibrated: String,
        /// The profile that it was applied to.
        profile: String,
    },
}

impl fmt::Display for CalibrationError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(cause) => write!(f, "the calibration can't be read: {cause}"),
            Self::OtherProfile { calibrated, profile } => write!(
                f,
                "the calibration was made for another version of `{calibrated}` and can't be used \
                 with `{profile}`; make a new one with `ecso tune`"
            ),
        }
    }
}

// By hand: the cause's text is part of the error's own.
impl Error for CalibrationError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Invalid(cause) => cause.source(),
            Self::OtherProfile { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::Detector;

    fn calibration(profile: &Profile) -> Calibration {
        let share = Share { count: 40, total: 50, value: 0.8, low: 0.67, high: 0.89 };
        let half = Half {
            recall: share,
            false_alarms: Share { count: 2, value: 0.04, low: 0.01, high: 0.13, ..share },
            auroc: Some(0.95),
        };
        let found = Fit {
            threshold: 0.625,
            false_alarms: 0.03,
            chosen: half.clone(),
            reported: half,
            curve: vec![(0.5, 0.9, 0.1), (0.625, 0.8, 0.04)],
        };
        let Method::Hardened(method) = &profile.method else { panic!("another method") };
        let biases = BTreeMap::from([(method.detectors[0].name.clone(), -1.5)]);
        Calibration::new(profile, "mini", "sha256:0", 200, biases, found)
    }

    #[test]
    fn a_calibration_sets_threshold_and_biases_and_nothing_else() {
        let profile = Profile::hardened();
        let calibration = calibration(&profile);
        let read = Calibration::from_toml(&calibration.to_toml().unwrap()).unwrap();
        assert_eq!(read, calibration);
        assert!(read.found.separates());
        let mut fitted = profile.clone().calibrated(&read).unwrap();
        let Method::Hardened(method) = &mut fitted.method else { panic!("another method") };
        assert!((method.threshold - 0.625).abs() < f64::EPSILON);
        assert!((method.detectors[0].bias + 1.5).abs() < f64::EPSILON);
        let Method::Hardened(before) = &profile.method else { panic!("another method") };
        (method.threshold, method.detectors[0].bias) = (before.threshold, before.detectors[0].bias);
        assert_eq!(fitted, profile);
    }

    #[test]
    fn a_curve_has_shares_in_the_order_of_thresholds() {
        let calibration = calibration(&Profile::hardened());
        let orders = vec![(0.6, 0.9, 0.1), (0.5, 0.8, 0.04)];
        for curve in [vec![], orders, vec![(0.5, f64::NAN, 0.1)], vec![(0.5, 1.5, 0.1)]] {
            let found = Fit { curve, ..calibration.found.clone() };
            let text = Calibration { found, ..calibration.clone() }.to_toml().unwrap();
            let error = Calibration::from_toml(&text).unwrap_err();
            assert!(error.to_string().contains("curve"), "{error}: {text}");
        }
    }

    #[test]
    fn a_fitted_detector_stops_at_the_same_findings_as_before() {
        let profile = Profile::hardened();
        let Method::Hardened(before) = &profile.method else { panic!("another method") };
        for moved in [-3.0, -0.7, 0.0, 3.0] {
            let mut calibration = calibration(&profile);
            let biases = before.detectors.iter();
            calibration.biases =
                biases.map(|detector| (detector.name.clone(), detector.bias + moved)).collect();
            let fitted = profile.clone().calibrated(&calibration).unwrap();
            let Method::Hardened(after) = &fitted.method else { panic!("another method") };
            for (old, new) in before.detectors.iter().zip(&after.detectors) {
                for finding in [4.0, 1.7, 0.13, -0.13, -1.7, -4.0] {
                    let asked = |method: &Hardened, detector: &Detector| {
                        let mut sum = detector.bias;
                        let is_asked = |term: &&Term| {
                            let is_asked = method.asks(term, sum, true);
                            sum += term.adds(finding);
                            is_asked
                        };
                        detector.terms.iter().take_while(is_asked).count()
                    };
                    assert_eq!(asked(before, old), asked(after, new), "{}: {finding}", old.name);
                    if finding > 3.0 {
                        assert_eq!(asked(after, new), new.terms.len(), "{}", new.name);
                    }
                }
            }
        }
    }

    #[test]
    fn without_probabilities_every_term_is_asked() {
        let Method::Hardened(mut method) = Profile::hardened().method else {
            panic!("another method")
        };
        let mut terms = method.detectors.iter().flat_map(|detector| &detector.terms);
        let term = terms.find(|term| term.ask_from.is_some()).cloned().unwrap();
        assert!(!method.asks(&term, -20.0, true));
        assert!(method.asks(&term, -20.0, false));
        method.early_exit = false;
        assert!(method.asks(&term, -20.0, true));
    }

    #[test]
    fn a_calibration_of_another_profile_is_an_error() {
        let calibration = calibration(&Profile::hardened());
        for other in [
            Profile::paper(),
            Profile::hardened().with("refusal", "No.").unwrap(),
            Profile::hardened().with("early_exit", "false").unwrap(),
        ] {
            let error = other.calibrated(&calibration).unwrap_err();
            assert!(matches!(error, CalibrationError::OtherProfile { .. }), "{error}");
        }
        let error = Calibration::from_toml("model = 3").unwrap_err();
        assert!(std::error::Error::source(&error).is_some(), "{error}");
    }
}
