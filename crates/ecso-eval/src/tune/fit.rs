//! Fits biases and threshold on one half of the requests.

use std::collections::BTreeMap;

use ecso::{
    calibration::Fit,
    profile::{Detector, Hardened},
};

use super::item::TuningItem;
use crate::calibrate::{Scored, TooFew, choose, fit_at, half, is_in_fitting_half, share_of};

/// How far a fitted bias may be from the profile's own one.
const MAX_BIAS_CHANGE: f64 = 3.0;
/// With fewer harmless items than this, the bias of a detector is not fitted but stays the
/// profile's own.
const MIN_HARMLESS_ITEMS: usize = 10;
/// The threshold for which the biases are fitted.
const EVEN: f64 = 0.5;

/// The parameters fitted to a model.
#[derive(Debug, Clone)]
pub struct Fitted {
    /// The bias of each detector, by name.
    pub biases: BTreeMap<String, f64>,
    /// The threshold, and its results on both halves.
    pub fit: Fit,
    /// Whether biases and threshold are still the profile's own.
    pub is_own: bool,
    /// The number of items in both halves.
    pub items: usize,
}

/// The profile's own biases and threshold, and what they do.
///
/// # Errors
/// [`TooFew`].
pub fn own(method: &Hardened, items: &[TuningItem], false_alarms: f64) -> Result<Fitted, TooFew> {
    let scores: Vec<Scored> =
        items.iter().filter(|item| item.is_judged()).map(|item| item.scored(method)).collect();
    Ok(Fitted {
        biases: method.detectors.iter().map(|one| (one.name.clone(), one.bias)).collect(),
        fit: fit_at(method.threshold, &scores, false_alarms)?,
        is_own: true,
        items: scores.len(),
    })
}

/// Fits the biases so that every detector has the same share of false alarms on one half of the
/// items, and all together at most `false_alarms`; then fits the threshold. The profile's own ones
/// are kept if they stay within `false_alarms` on this half and the fit does not flag clearly more
/// harmful requests: they were fitted to many more items, though for another model. What a content
/// filter refused is flagged at every threshold, so nothing is fitted on it; the results have it.
///
/// # Errors
/// [`TooFew`].
pub fn fit(method: &Hardened, items: &[TuningItem], false_alarms: f64) -> Result<Fitted, TooFew> {
    let own = own(method, items, false_alarms)?;
    let judged: Vec<&TuningItem> = items.iter().filter(|item| item.is_judged()).collect();
    let fitting: Vec<&TuningItem> = judged
        .iter()
        .copied()
        .filter(|item| !item.is_filtered() && is_in_fitting_half(&item.pair))
        .collect();
    let harmless: Vec<&TuningItem> = fitting.iter().copied().filter(|item| !item.harmful).collect();
    if harmless.is_empty() {
        return Ok(own);
    }
    let max_flagged = share_of(false_alarms, harmless.len());
    let fitted = (0..=max_flagged)
        .rev()
        .map(|per_detector| fit_biases(method, &harmless, per_detector))
        .find(|biases| {
            let method = with_biases(method, biases);
            let flagged = harmless.iter().filter(|item| item.score(&method) >= EVEN).count();
            flagged <= max_flagged
        });
    let scores = |items: &[&TuningItem], method: &Hardened| -> Vec<Scored> {
        items.iter().map(|item| item.scored(method)).collect()
    };
    let biases = fitted.unwrap_or_else(|| own.biases.clone());
    let fitted_method = with_biases(method, &biases);
    let [before, after] = [method, &fitted_method].map(|method| scores(&fitting, method));
    let [before, after] = [&before, &after].map(|scores| scores.iter().collect::<Vec<_>>());
    let threshold = choose(&after, false_alarms);
    let (before, after) = (half(&before, method.threshold), half(&after, threshold));
    if before.false_alarms.value <= false_alarms && before.recall.high >= after.recall.value {
        return Ok(own);
    }
    let fit = fit_at(threshold, &scores(&judged, &fitted_method), false_alarms)?;
    Ok(Fitted { biases, fit, is_own: false, ..own })
}

/// The method as a calibration with these biases makes it.
pub(super) fn with_biases(method: &Hardened, biases: &BTreeMap<String, f64>) -> Hardened {
    let mut method = method.clone();
    method.set_biases(biases);
    method
}

/// Biases by detector, such that each flags at most `per_detector` of the harmless items.
fn fit_biases(
    method: &Hardened,
    harmless: &[&TuningItem],
    per_detector: usize,
) -> BTreeMap<String, f64> {
    let bias = |detector: &Detector| {
        let mut sums: Vec<f64> = harmless.iter().filter_map(|item| item.sum(detector)).collect();
        if sums.len() < MIN_HARMLESS_ITEMS {
            return detector.bias;
        }
        sums.sort_unstable_by(|a, b| b.total_cmp(a));
        // Halfway between the lowest sum that may be flagged and the highest that may not.
        let below = sums.get(per_detector).copied().unwrap_or(f64::NEG_INFINITY);
        let last_flagged = per_detector.checked_sub(1).and_then(|last| sums.get(last));
        let above = last_flagged.copied().unwrap_or(below + 1.0);
        (-f64::midpoint(below, above))
            .clamp(detector.bias - MAX_BIAS_CHANGE, detector.bias + MAX_BIAS_CHANGE)
    };
    method.detectors.iter().map(|detector| (detector.name.clone(), bias(detector))).collect()
}
