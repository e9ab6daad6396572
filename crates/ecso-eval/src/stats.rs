//! Rates with intervals, paired tests and rankings.

use ecso::calibration::Share;
use serde::{Deserialize, Serialize};

/// The 97.5% quantile of the normal distribution.
const Z: f64 = 1.959_963_984_540_054;
/// The number of bootstrap resamples.
const RESAMPLES: usize = 2000;
/// From this many clusters on, intervals are computed without a bootstrap.
const MANY_CLUSTERS: usize = 20_000;

/// A share with its 95% interval, all in 0..=1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// The number of items that count.
    pub count: usize,
    /// The number of all items.
    pub total: usize,
    /// The share; NaN if there are no items or too few are known.
    pub value: f64,
    /// The lower end of the interval.
    pub low: f64,
    /// The upper end of the interval.
    pub high: f64,
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn float(count: usize) -> f64 {
    count as f64
}

impl Rate {
    /// A share of independent items with Wilson's score interval.
    #[must_use]
    pub fn wilson(count: usize, total: usize) -> Self {
        if total == 0 {
            return Self { count, total, value: f64::NAN, low: 0.0, high: 1.0 };
        }
        let (n, p) = (float(total), float(count) / float(total));
        let scale = 1.0 + Z * Z / n;
        let middle = (p + Z * Z / (2.0 * n)) / scale;
        let half = Z * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt() / scale;
        Self {
            count,
            total,
            value: p,
            low: (middle - half).clamp(0.0, p),
            high: (middle + half).clamp(p, 1.0),
        }
    }

    /// A share with `unknown` additional items. The interval covers every possibility, from none of
    /// them counting to all.
    #[must_use]
    pub fn with_unknown(count: usize, total: usize, unknown: usize) -> Self {
        let known = Self::wilson(count, total);
        if unknown == 0 {
            return known;
        }
        let low = Self::wilson(count, total + unknown).low;
        let high = Self::wilson(count + unknown, total + unknown).high;
        Self { low, high, ..known }
    }

    /// Drops the value and keeps the interval if too few items are known.
    #[must_use]
    pub fn with_value_if(self, are_enough: bool) -> Self {
        Self { value: if are_enough { self.value } else { f64::NAN }, ..self }
    }
}

impl From<Rate> for Share {
    fn from(Rate { count, total, value, low, high }: Rate) -> Self {
        Self { count, total, value, low, high }
    }
}

/// A mean with its 95% interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Mean {
    /// The number of values.
    pub total: usize,
    /// The mean; NaN if there are no values or too few are known.
    pub value: f64,
    /// The lower end of the interval.
    pub low: f64,
    /// The upper end of the interval.
    pub high: f64,
}

impl Mean {
    /// `value` with the middle 95% of the `resampled` values as its interval.
    fn bootstrapped(total: usize, value: f64, mut resampled: Vec<f64>) -> Self {
        resampled.sort_by(f64::total_cmp);
        let tail = resampled.len() / 40;
        Self { total, value, low: resampled[tail], high: resampled[resampled.len() - 1 - tail] }
    }

    /// A mean of values in 0..=`max` with `unknown` additional values. The interval covers every
    /// possibility, from all of them being 0 to all being `max`.
    #[must_use]
    pub fn with_unknown(self, unknown: usize, max: f64) -> Self {
        let (known, all) = (float(self.total), float(self.total + unknown));
        if unknown == 0 || self.total == 0 {
            return self;
        }
        Self {
            low: self.low * known / all,
            high: (self.high * known + max * float(unknown)) / all,
            ..self
        }
    }

    /// Drops the value and keeps the interval if too few values are known.
    #[must_use]
    pub fn with_value_if(self, are_enough: bool) -> Self {
        Self { value: if are_enough { self.value } else { f64::NAN }, ..self }
    }
}

/// Deterministic random numbers (SplitMix64).
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((u128::from(z ^ (z >> 31)) * end as u128) >> 64).unwrap_or_default()
    }
}

/// The ratio of two sums, over the pairs of sums of each cluster, which cover `total` items. The
/// interval is over clusters: a percentile bootstrap, or, for very many clusters, the linearised
/// variance, which then agrees with it.
#[must_use]
pub fn clustered_ratio(clusters: &[(f64, f64)], total: usize) -> Mean {
    let ratio = |sums: &mut dyn Iterator<Item = (f64, f64)>| {
        let (above, below) =
            sums.fold((0.0, 0.0), |(above, below), pair| (above + pair.0, below + pair.1));
        above / below
    };
    let value = ratio(&mut clusters.iter().copied());
    if clusters.len() < 2 {
        return Mean { total, value, low: f64::NAN, high: f64::NAN };
    }
    if clusters.len() > MANY_CLUSTERS {
        let below: f64 = clusters.iter().map(|pair| pair.1).sum();
        let squares: f64 = clusters.iter().map(|pair| (pair.0 - value * pair.1).powi(2)).sum();
        let half = Z * squares.sqrt() / below;
        return Mean { total, value, low: value - half, high: value + half };
    }
    let mut random = Random(0x2403_0957);
    let drawn = |random: &mut Random| {
        ratio(&mut (0..clusters.len()).map(|_| clusters[random.below(clusters.len())]))
    };
    let ratios = (0..RESAMPLES).map(|_| drawn(&mut random)).collect();
    Mean::bootstrapped(total, value, ratios)
}

/// The mean of values in clusters, with an interval over clusters as in [`clustered_ratio`].
#[must_use]
pub fn clustered_mean(clusters: &[Vec<f64>]) -> Mean {
    let sums: Vec<(f64, f64)> =
        clusters.iter().map(|values| (values.iter().sum(), float(values.len()))).collect();
    clustered_ratio(&sums, clusters.iter().map(Vec::len).sum())
}

/// The sum of the means of several strata, with a percentile bootstrap within each. A stratum
/// consists of its values, in 0..=`max`, and the number of unknown values: the interval covers
/// every possibility for these.
#[must_use]
pub fn stratified_sum(strata: &[(Vec<f64>, usize)], max: f64) -> Mean {
    let mean = |sum: f64, count: usize| if count == 0 { f64::NAN } else { sum / float(count) };
    let mean_of = |values: &[f64]| mean(values.iter().sum(), values.len());
    let value = strata.iter().map(|(values, _)| mean_of(values)).sum();
    let total = strata.iter().map(|(values, _)| values.len()).sum();
    let mut random = Random(0x2403_0957);
    let drawn = |random: &mut Random, values: &[f64]| {
        mean((0..values.len()).map(|_| values[random.below(values.len())]).sum(), values.len())
    };
    let sums = (0..RESAMPLES)
        .map(|_| strata.iter().map(|(values, _)| drawn(&mut random, values)).sum())
        .collect();
    let mut sum = Mean::bootstrapped(total, value, sums);
    for (values, unknown) in strata {
        let share = float(*unknown) / float(values.len() + unknown).max(1.0);
        sum.low -= share * mean_of(values);
        sum.high += share * (max - mean_of(values));
    }
    sum
}

/// `McNemar`'s exact test for pairs that differ: the two-sided p value.
#[must_use]
pub fn mcnemar(only_first: usize, only_second: usize) -> f64 {
    let n = only_first + only_second;
    let few = only_first.min(only_second);
    // The logarithm of the binomial coefficients, computed incrementally.
    let (mut log_choose, mut sum) = (0.0, 0.0);
    for k in 0..=few {
        sum += (log_choose - float(n) * std::f64::consts::LN_2).exp();
        log_choose += (float(n - k) / float(k + 1)).ln();
    }
    (2.0 * sum).min(1.0)
}

/// A p value as text.
fn p_value(p: f64) -> String {
    if p < 0.001 { format!("{p:.0e}") } else { format!("{p:.3}") }
}

/// Two arms on the same items.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Paired {
    /// Items that both arms get right, or both wrong.
    pub alike: usize,
    /// Items that only the first arm gets right.
    pub only_first: usize,
    /// Items that only the second arm gets right.
    pub only_second: usize,
    /// Items for which this is unknown for at least one arm.
    pub unknown: usize,
}

impl Paired {
    /// Counts an item: whether each arm gets it right, if that is known.
    pub fn add(&mut self, first: Option<bool>, second: Option<bool>) {
        *match (first, second) {
            (Some(true), Some(false)) => &mut self.only_first,
            (Some(false), Some(true)) => &mut self.only_second,
            (Some(_), Some(_)) => &mut self.alike,
            _ => &mut self.unknown,
        } += 1;
    }

    /// Adds absent items, if there are any items at all.
    pub(crate) fn add_missing(&mut self, absent: usize) {
        if self.known() + self.unknown > 0 {
            self.unknown += absent;
        }
    }

    pub(crate) fn merge(&mut self, other: Self) {
        self.alike += other.alike;
        self.only_first += other.only_first;
        self.only_second += other.only_second;
        self.unknown += other.unknown;
    }

    /// Items for which the result of both arms is known.
    #[must_use]
    pub fn known(self) -> usize {
        self.alike + self.only_first + self.only_second
    }

    /// The range of the exact `McNemar` p value, depending on the unknown items.
    #[must_use]
    pub fn p(self) -> (f64, f64) {
        let fewer = self.only_first.min(self.only_second);
        let more = self.only_first.max(self.only_second);
        let most_equal = (fewer + self.unknown).min(more);
        (mcnemar(fewer, more + self.unknown), mcnemar(most_equal, more))
    }

    /// The p value as text; a range if some items are unknown.
    #[must_use]
    pub fn p_text(self) -> String {
        let (least, most) = self.p();
        if self.unknown == 0 {
            return format!("exact McNemar p = {}", p_value(most));
        }
        format!(
            "exact McNemar p from {} to {}, since {} items are unknown",
            p_value(least),
            p_value(most),
            self.unknown
        )
    }
}

/// The area under the ROC curve of labelled scores: the probability that a positive scores above a
/// negative, with ties counting half. `None` unless there are both positives and negatives.
#[must_use]
pub fn auroc(scores: &[(f64, bool)]) -> Option<f64> {
    let mut sorted = scores.to_vec();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
    let positives = sorted.iter().filter(|(_, positive)| *positive).count();
    let negatives = sorted.len() - positives;
    if positives == 0 || negatives == 0 {
        return None;
    }
    let (mut below, mut wins) = (0.0, 0.0);
    for tied in sorted.chunk_by(|a, b| a.0.total_cmp(&b.0).is_eq()) {
        let high = float(tied.iter().filter(|(_, positive)| *positive).count());
        let low = float(tied.len()) - high;
        wins += high * (below + low / 2.0);
        below += low;
    }
    Some(wins / (float(positives) * float(negatives)))
}

/// How well a judge agrees with labels.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Agreement {
    /// Both say harmful.
    pub both: usize,
    /// Only the judge says harmful.
    pub only_judge: usize,
    /// Only the label says harmful.
    pub only_label: usize,
    /// Neither says harmful.
    pub neither: usize,
    /// The label says harmful, and the judge failed or was not asked.
    pub harmful_unknown: usize,
    /// The label says harmless, and the judge failed or was not asked.
    pub harmless_unknown: usize,
}

impl Agreement {
    /// Counts pairs of (judge, label). The judge's part is `None` if it failed or was not asked.
    pub fn of(pairs: impl IntoIterator<Item = (Option<bool>, bool)>) -> Self {
        let mut counts = Self::default();
        for pair in pairs {
            *match pair {
                (Some(true), true) => &mut counts.both,
                (Some(true), false) => &mut counts.only_judge,
                (Some(false), true) => &mut counts.only_label,
                (Some(false), false) => &mut counts.neither,
                (None, true) => &mut counts.harmful_unknown,
                (None, false) => &mut counts.harmless_unknown,
            } += 1;
        }
        counts
    }

    /// How many have no ruling of the judge.
    #[must_use]
    pub fn unknown(self) -> usize {
        self.harmful_unknown + self.harmless_unknown
    }

    /// How many have both a ruling and a label.
    #[must_use]
    pub fn total(self) -> usize {
        self.both + self.only_judge + self.only_label + self.neither
    }

    /// Whether at least half have a ruling.
    fn is_known(self) -> bool {
        self.total() >= self.unknown()
    }

    /// The share of pairs that agree.
    #[must_use]
    pub fn accuracy(self) -> Rate {
        Rate::with_unknown(self.both + self.neither, self.total(), self.unknown())
            .with_value_if(self.is_known())
    }

    /// The share of the judge's harmful rulings that are right.
    #[must_use]
    pub fn precision(self) -> Rate {
        Rate::with_unknown(self.both, self.both + self.only_judge, self.unknown())
            .with_value_if(self.is_known())
    }

    /// The share of the harmful answers that the judge finds.
    #[must_use]
    pub fn recall(self) -> Rate {
        Rate::with_unknown(self.both, self.both + self.only_label, self.harmful_unknown)
            .with_value_if(self.is_known())
    }

    /// Cohen's kappa: the agreement beyond chance.
    #[must_use]
    pub fn kappa(self) -> f64 {
        let n = float(self.total());
        let judge = float(self.both + self.only_judge) / n;
        let label = float(self.both + self.only_label) / n;
        let chance = judge * label + (1.0 - judge) * (1.0 - label);
        (self.accuracy().value - chance) / (1.0 - chance)
    }

    /// Kappa with a 95% interval, by a bootstrap over the pairs with a ruling. If some have none,
    /// the interval covers every possibility from none of them agreeing to all.
    #[must_use]
    pub fn kappa_interval(self) -> Mean {
        if self.unknown() > 0 {
            let Self { harmful_unknown: harmful, harmless_unknown: harmless, .. } = self;
            let known = Self { harmful_unknown: 0, harmless_unknown: 0, ..self };
            let worst = Self {
                only_label: self.only_label + harmful,
                only_judge: self.only_judge + harmless,
                ..known
            };
            let best =
                Self { both: self.both + harmful, neither: self.neither + harmless, ..known };
            let (low, high) = (worst.kappa_interval().low, best.kappa_interval().high);
            let value = if self.is_known() { known.kappa() } else { f64::NAN };
            return Mean { total: self.total(), value, low, high };
        }
        let total = self.total();
        let ends =
            [self.both, self.both + self.only_judge, self.both + self.only_judge + self.only_label];
        let mut random = Random(0x5eed);
        let mut kappas: Vec<f64> = (0..RESAMPLES)
            .map(|_| {
                let drawn = (0..total).map(|_| match random.below(total) {
                    n if n < ends[0] => (Some(true), true),
                    n if n < ends[1] => (Some(true), false),
                    n if n < ends[2] => (Some(false), true),
                    _ => (Some(false), false),
                });
                Self::of(drawn).kappa()
            })
            .collect();
        kappas.sort_by(f64::total_cmp);
        Mean {
            total,
            value: self.kappa(),
            low: kappas[RESAMPLES / 40],
            high: kappas[RESAMPLES - 1 - RESAMPLES / 40],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_close(a: f64, b: f64) {
        assert!((a - b).abs() < 5e-4, "{a} is not {b}");
    }

    #[test]
    fn intervals_match_the_textbook() {
        // Newcombe 1998, table I: 81 of 263, Wilson: 0.2553 to 0.3662; 0 of 20: 0 to 0.1611.
        let rate = Rate::wilson(81, 263);
        assert_close(rate.low, 0.2553);
        assert_close(rate.high, 0.3662);
        assert_close(Rate::wilson(0, 20).high, 0.1611);
        assert!(Rate::wilson(0, 0).value.is_nan());
        let range = Rate::with_unknown(5, 10, 10);
        assert!(range.low < Rate::wilson(5, 10).low && range.high > Rate::wilson(5, 10).high);
    }

    #[test]
    fn paired_tests_are_exact() {
        assert_close(mcnemar(0, 5), 0.0625);
        assert_close(mcnemar(1, 9), 0.021_48);
        assert_close(mcnemar(4, 4), 1.0);
        assert_close(mcnemar(0, 0), 1.0);
        assert!(mcnemar(400, 700) < 1e-15);
        let paired = Paired { only_first: 1, only_second: 4, unknown: 5, alike: 3 };
        assert_eq!(paired.p(), (mcnemar(1, 9), mcnemar(4, 4)));
        let paired = Paired { unknown: 0, ..paired };
        assert_eq!(paired.p(), (mcnemar(1, 4), mcnemar(1, 4)));
    }

    #[test]
    fn rankings_count_ties_half() {
        assert_eq!(auroc(&[(0.1, false), (0.9, true)]), Some(1.0));
        assert_eq!(auroc(&[(0.5, false), (0.5, true)]), Some(0.5));
        assert_eq!(auroc(&[(0.1, true), (0.5, false), (0.9, true), (0.9, false)]), Some(0.375));
        assert_eq!(auroc(&[(0.5, true)]), None);
    }

    #[test]
    fn kappa_is_agreement_beyond_chance() {
        // Cohen's textbook table: 20, 5, 10, 15.
        let agreement = Agreement {
            both: 20,
            only_judge: 5,
            only_label: 10,
            neither: 15,
            ..Agreement::default()
        };
        assert_close(agreement.kappa(), 0.4);
        let interval = agreement.kappa_interval();
        assert!(
            interval.low < 0.4 && interval.high > 0.4 && interval.low > 0.1 && interval.high < 0.7,
            "{interval:?}"
        );
    }

    #[test]
    fn clusters_widen_an_interval() {
        let values: Vec<Vec<f64>> = (0..40).map(|n| vec![f64::from(n % 2)]).collect();
        let clusters: Vec<Vec<f64>> = (0..10).map(|n| vec![f64::from(n % 2); 4]).collect();
        let (independent, clustered) = (clustered_mean(&values), clustered_mean(&clusters));
        assert_close(independent.value, 0.5);
        assert_close(clustered.value, 0.5);
        assert!(clustered.high - clustered.low > 1.5 * (independent.high - independent.low));
    }

    #[test]
    fn very_many_clusters_need_no_bootstrap() {
        let mut random = Random(7);
        let pairs: Vec<(f64, f64)> = (0..MANY_CLUSTERS)
            .map(|_| (float(random.below(100)), float(1 + random.below(3))))
            .collect();
        let drawn = clustered_ratio(&pairs, MANY_CLUSTERS);
        let twice = clustered_ratio(&[pairs.clone(), pairs].concat(), 2 * MANY_CLUSTERS);
        assert_close(drawn.value, twice.value);
        let (narrow, wide) = (twice.high - twice.low, drawn.high - drawn.low);
        assert!((wide / narrow / 2.0_f64.sqrt() - 1.0).abs() < 0.05, "{drawn:?} {twice:?}");
    }
}
