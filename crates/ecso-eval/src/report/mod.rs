//! Reports: a self-contained HTML file, and the same figures as Markdown, CSV and JSON.

mod html;

use std::fmt::Write as _;

use ecso_batch::journal::JournalError;

pub use html::html;
use html::{ShownItem, judge_names};

use crate::{
    judged_run::JudgedRun,
    record::RunHeader,
    stats::{Mean, Paired, Rate},
    summary::{Arm, Detection, Figures, Summary, Sums},
    text::{in_csv, in_markdown},
    verdicts::Verdicts,
};

/// The maximum number of items per run that the HTML report shows; the journal has all.
const MAX_SHOWN_ITEMS: usize = 10_000;
/// The maximum size of the shown items per run, in bytes.
const MAX_SHOWN_BYTES: usize = 48 << 20;

/// The contents of a report on one run.
pub struct RunReport {
    /// The header of the run.
    pub header: RunHeader,
    /// The figures.
    pub summary: Summary,
    /// The first items, each as JSON.
    shown_items: Vec<String>,
    /// The names of the judges. The figures are from the first one.
    judges: Vec<String>,
    /// Whether the last line of the journal had been cut off by a crash.
    was_truncated: bool,
}

impl RunReport {
    /// Reads a judged run, record by record.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn read(run: JudgedRun) -> Result<Self, JournalError> {
        let (mut sums, mut shown_items, mut bytes) = (Sums::new(&run.header), Vec::new(), 0);
        let other_verdicts = run.other_verdicts()?;
        let verdicts: Vec<&Verdicts> =
            std::iter::once(&run.verdicts).chain(&other_verdicts).collect();
        let records = run.records()?;
        let was_truncated = records.was_truncated();
        for record in records {
            let record = record?;
            sums.add(&record, &run.verdicts);
            if shown_items.len() < MAX_SHOWN_ITEMS && bytes < MAX_SHOWN_BYTES {
                let item = ShownItem::new(&record, &verdicts).json();
                bytes += item.len();
                shown_items.push(item);
            }
        }
        let summary = sums.summary(&run.header, &run.verdicts);
        let judges = judge_names(&verdicts);
        Ok(Self { header: run.header, summary, shown_items, judges, was_truncated })
    }

    /// How many items of the run are recorded, as text.
    fn extent(&self) -> String {
        let Summary { items, absent, .. } = self.summary;
        let of_all = if absent > 0 {
            format!(" of {}; the others were left out, or not run yet", items + absent)
        } else {
            String::new()
        };
        let cut_off = if self.was_truncated { "; a crash cut off the last one" } else { "" };
        format!("{items} items{of_all}{cut_off}")
    }
}

/// A rate as text: `93.1% (88.0 to 96.2)`, or `- (12.4 to 96.2)` if too few are known for a value.
#[must_use]
pub fn percent(rate: Rate) -> String {
    let value = match rate {
        Rate { total: 0, .. } => return "-".into(),
        Rate { value, .. } if value.is_nan() => "-".to_owned(),
        Rate { value, .. } => format!("{:.1}%", 100.0 * value),
    };
    format!("{value} ({:.1} to {:.1})", 100.0 * rate.low, 100.0 * rate.high)
}

fn number(mean: Mean) -> String {
    let Mean { value, low, high, .. } = mean;
    let places = if value.abs() < 20.0 || high < 20.0 { 2 } else { 0 };
    match (value.is_nan(), low.is_nan()) {
        (true, true) => "-".into(),
        (true, false) => format!("- ({low:.places$} to {high:.places$})"),
        (false, true) => format!("{value:.places$} (no interval: only one question)"),
        (false, false) => format!("{value:.places$} ({low:.places$} to {high:.places$})"),
    }
}

/// A comparison of an arm with another one on the same items, as text.
fn paired_text(paired: Paired) -> String {
    let Paired { only_first, only_second, .. } = paired;
    format!("{only_first} better, {only_second} worse ({})", paired.p_text())
}

/// The figures of an arm that the benchmark itself publishes.
fn published_cells(arm: &Arm) -> Vec<(String, String)> {
    arm.published.iter().map(|(name, mean)| (name.clone(), number(*mean))).collect()
}

/// The cells of a row of figures: harmless rate, attack success, over-refusal, utility, unjudged,
/// failed, filtered.
fn rate_cells(figures: &Figures) -> [String; 7] {
    let rate = |rate: Option<Rate>| rate.map_or_else(|| "-".into(), percent);
    [
        rate(figures.harmless),
        rate(figures.attack_success),
        rate(figures.over_refusal),
        figures.utility.map_or_else(|| "-".into(), number),
        (figures.unjudged + figures.missing).to_string(),
        figures.failed.to_string(),
        figures.filtered.to_string(),
    ]
}

/// The cells of an arm's costs: answers changed, calls, time and tokens per item, and time and
/// tokens as multiples of the unguarded answer's.
fn cost_cells(arm: &Arm) -> [String; 6] {
    let optional = |mean: Option<Mean>| mean.map_or_else(|| "-".into(), number);
    [
        percent(arm.changed),
        number(arm.calls),
        number(arm.ms),
        number(arm.times),
        optional(arm.tokens),
        optional(arm.token_times),
    ]
}

/// The figures as Markdown.
#[must_use]
pub fn markdown(runs: &[RunReport]) -> String {
    let mut out = String::from("# Report\n");
    for report in runs {
        report.write_markdown(&mut out);
    }
    out
}

impl RunReport {
    fn write_markdown(&self, out: &mut String) {
        let Self { summary, header, .. } = self;
        let cap = header
            .max_new_tokens
            .map_or_else(String::new, |cap| format!("at most {cap} new tokens; "));
        let _ = write!(
            out,
            "\n## {} on {}\n\n{}; {} failed, {} refused by a filter; judge {}; {cap}rates with 95% \
             intervals\n\n| arm | harmless rate | attack success | over-refusal | utility | \
             unjudged | failed | filtered | changed | calls | ms | time, times | tokens | tokens, \
             times |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | \
             --- | --- |\n",
            in_markdown(&summary.benchmark),
            in_markdown(&summary.model),
            self.extent(),
            summary.failed,
            summary.filtered,
            in_markdown(&summary.judge)
        );
        for arm in &summary.arms {
            let (rates, costs) = (rate_cells(&arm.all).join(" | "), cost_cells(arm).join(" | "));
            let _ = writeln!(out, "| {} | {rates} | {costs} |", in_markdown(&arm.profile));
        }
        for notice in summary.unguarded_notice.iter().chain(&summary.warnings) {
            let _ = writeln!(out, "\n**{}.**", in_markdown(notice));
        }
        if summary.arms.iter().any(|arm| !arm.published.is_empty()) {
            let _ =
                write!(out, "\n| arm | as the benchmark counts | points |\n| --- | --- | --- |\n");
        }
        for arm in &summary.arms {
            for (name, points) in published_cells(arm) {
                let (profile, name) = (in_markdown(&arm.profile), in_markdown(&name));
                let _ = writeln!(out, "| {profile} | {name} | {points} |");
            }
        }
        for arm in &summary.arms {
            let profile = in_markdown(&arm.profile);
            if let Some(paired) = arm.all.against_unguarded {
                let text = paired_text(paired);
                let _ = writeln!(out, "\n{profile} against unguarded: {text}.");
            }
            if let Some(detection) = &arm.detection {
                let area = detection.auroc.map_or_else(|| "-".into(), |area| format!("{area:.3}"));
                let _ = writeln!(
                    out,
                    "Step 2 of {profile}: precision {}, recall {}, AUROC {area}; flags {} of the \
                     refusals.",
                    percent(detection.precision),
                    percent(detection.recall),
                    percent(detection.flagged_refusals)
                );
            }
        }
    }
}

/// The figures as CSV: one line per run, arm, scenario (`all` first) and metric, with rates as
/// numbers.
///
/// # Errors
/// [`csv::Error`], which writing to memory does not cause.
pub fn csv(runs: &[RunReport]) -> Result<String, csv::Error> {
    let mut table = csv::Writer::from_writer(Vec::new());
    table.write_record([
        "benchmark",
        "model",
        "judge",
        "arm",
        "scenario",
        "metric",
        "value",
        "low",
        "high",
        "count",
        "total",
    ])?;
    for RunReport { summary, .. } in runs {
        for arm in &summary.arms {
            let all = [("all", &arm.all)];
            let scenarios =
                arm.scenarios.iter().map(|(scenario, figures)| (scenario.as_str(), figures));
            for (scenario, figures) in all.into_iter().chain(scenarios) {
                let labels: [&str; 5] =
                    [&summary.benchmark, &summary.model, &summary.judge, &arm.profile, scenario];
                let labels = labels.map(in_csv);
                let overall = if scenario == "all" { overall_metrics(arm) } else { Vec::new() };
                for (metric, numbers) in metrics(figures).into_iter().chain(overall) {
                    let numbers = numbers.iter().map(String::as_str);
                    let labels = labels.iter().map(|label| &**label);
                    table.write_record(labels.chain([&*in_csv(metric)]).chain(numbers))?;
                }
            }
        }
    }
    let bytes = table.into_inner().map_err(csv::IntoInnerError::into_error)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The value of a metric, its lower and upper end, count and total; empty if it has none.
type Numbers = [String; 5];

fn rate_numbers(rate: Rate) -> Numbers {
    [
        number_or_empty(rate.value),
        number_or_empty(rate.low),
        number_or_empty(rate.high),
        rate.count.to_string(),
        rate.total.to_string(),
    ]
}

fn mean_numbers(mean: Mean) -> Numbers {
    [
        number_or_empty(mean.value),
        number_or_empty(mean.low),
        number_or_empty(mean.high),
        String::new(),
        mean.total.to_string(),
    ]
}

/// A number; empty if it is NaN.
fn number_or_empty(number: f64) -> String {
    if number.is_nan() { String::new() } else { number.to_string() }
}

fn count_numbers(count: usize) -> Numbers {
    [String::new(), String::new(), String::new(), count.to_string(), String::new()]
}

/// The metrics of a set of items.
fn metrics(figures: &Figures) -> Vec<(&str, Numbers)> {
    let rates = [
        ("harmless_rate", figures.harmless),
        ("attack_success_rate", figures.attack_success),
        ("over_refusal", figures.over_refusal),
    ];
    let counts = [
        ("unjudged", figures.unjudged + figures.missing),
        ("failed", figures.failed),
        ("filtered", figures.filtered),
    ];
    let rates = rates.into_iter().filter_map(|(metric, rate)| Some((metric, rate_numbers(rate?))));
    let counts = counts.map(|(metric, count)| (metric, count_numbers(count)));
    let comparison = figures.against_unguarded.into_iter().flat_map(|paired| {
        let (least, most) = paired.p();
        let value = if paired.unknown == 0 { number_or_empty(most) } else { String::new() };
        [
            ("better_than_unguarded", count_numbers(paired.only_first)),
            ("worse_than_unguarded", count_numbers(paired.only_second)),
            (
                "mcnemar_p",
                [
                    value,
                    number_or_empty(least),
                    number_or_empty(most),
                    String::new(),
                    paired.known().to_string(),
                ],
            ),
        ]
    });
    rates
        .chain(counts)
        .chain(figures.utility.map(|mean| ("utility", mean_numbers(mean))))
        .chain(comparison)
        .collect()
}

/// The metrics that exist only for all items of an arm.
fn overall_metrics(arm: &Arm) -> Vec<(&str, Numbers)> {
    let costs = [("calls", arm.calls), ("ms", arm.ms), ("times", arm.times)];
    let tokens = [("tokens", arm.tokens), ("token_times", arm.token_times)];
    let tokens = tokens.into_iter().filter_map(|(metric, mean)| Some((metric, mean?)));
    let published = arm.published.iter().map(|(metric, mean)| (metric.as_str(), *mean));
    let means =
        published.chain(costs).chain(tokens).map(|(metric, mean)| (metric, mean_numbers(mean)));
    let detected = arm.detection.iter().flat_map(
        |Detection { precision, recall, flagged_refusals, auroc, .. }| {
            let area = [
                auroc.map_or_else(String::new, number_or_empty),
                String::new(),
                String::new(),
                String::new(),
                String::new(),
            ];
            [
                ("detection_precision", rate_numbers(*precision)),
                ("detection_recall", rate_numbers(*recall)),
                ("refusals_flagged", rate_numbers(*flagged_refusals)),
                ("detection_auroc", area),
            ]
        },
    );
    means.chain([("changed", rate_numbers(arm.changed))]).chain(detected).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_interval_is_reported_if_too_few_are_known() {
        let rate = |are_enough| percent(Rate::with_unknown(2, 2, 8).with_value_if(are_enough));
        assert_eq!([rate(true), rate(false)], ["100.0% (5.7 to 100.0)", "- (5.7 to 100.0)"]);
        let mean = Mean { total: 2, value: 1.0, low: 0.5, high: 1.0 };
        assert_eq!(number(mean.with_value_if(false)), "- (0.50 to 1.00)");
        assert_eq!(
            [percent(Rate::wilson(0, 0)), number_or_empty(Rate::wilson(0, 0).value)],
            ["-", ""]
        );
    }
}
