//! Reports: one HTML file that needs nothing else, and the same figures as Markdown, CSV and JSON.

mod html;

use std::fmt::Write as _;

use ecso_batch::journal::JournalError;

pub use html::html;
use html::{ShownItem, judges};

use crate::{
    judged::JudgedRun,
    record::RunHeader,
    stats::{Mean, Paired, Rate},
    summary::{Arm, Detection, Figures, Summary, Sums},
    verdicts::Verdicts,
};

/// Items that the HTML report shows one by one, each run; the journal has all.
const SHOWN: usize = 10_000;
/// Bytes of what it shows of them, each run.
const SHOWN_BYTES: usize = 48 << 20;

/// All that is reported of a run.
pub struct RunReport {
    /// What the run is.
    pub header: RunHeader,
    /// The figures.
    pub summary: Summary,
    /// Its first items, each as JSON.
    shown: Vec<String>,
    /// Who judged: first the judge whose figures these are.
    judges: Vec<String>,
    /// Whether a crash had cut off the last line of its journal.
    was_cut: bool,
}

impl RunReport {
    /// Reads a judged run, record by record.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn of(run: JudgedRun) -> Result<Self, JournalError> {
        let (mut sums, mut shown, mut bytes) = (Sums::new(&run.header), Vec::new(), 0);
        let others = run.others()?;
        let verdicts: Vec<&Verdicts> = std::iter::once(&run.verdicts).chain(&others).collect();
        let records = run.records()?;
        let was_cut = records.was_cut();
        for record in records {
            let record = record?;
            sums.add(&record, &run.verdicts);
            if shown.len() < SHOWN && bytes < SHOWN_BYTES {
                let item = ShownItem::of(&record, &verdicts).json();
                bytes += item.len();
                shown.push(item);
            }
        }
        let summary = sums.summary(&run.header, &run.verdicts);
        let judges = judges(&verdicts);
        Ok(Self { header: run.header, summary, shown, judges, was_cut })
    }

    /// How much of the run is there, as people read it.
    fn extent(&self) -> String {
        let Summary { items, absent, .. } = self.summary;
        let all = items + absent;
        let of = if absent > 0 {
            format!(" of {all}; the others were left out, or not run yet")
        } else {
            String::new()
        };
        let cut = if self.was_cut { "; a crash cut off the last one" } else { "" };
        format!("{items} items{of}{cut}")
    }
}

/// A rate as people read it: `93.1% (88.0 to 96.2)`; `- (12.4 to 96.2)` where too few are known for
/// more than a range.
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
        (false, true) => format!("{value:.places$} (no interval of one)"),
        (false, false) => format!("{value:.places$} ({low:.places$} to {high:.places$})"),
    }
}

/// How an arm does beside another on the same items, as people read it.
fn against(paired: Paired) -> String {
    format!(
        "{} answers better, {} worse ({})",
        paired.only_first,
        paired.only_second,
        paired.told()
    )
}

/// What the benchmark itself publishes of an arm.
fn points(arm: &Arm) -> Vec<(String, String)> {
    arm.published.iter().map(|(name, mean)| (name.clone(), number(*mean))).collect()
}

/// The cells of a line of figures: harmless rate, attack success, over-refusal, utility, unjudged,
/// failed, filtered.
fn cells(figures: &Figures) -> [String; 7] {
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

/// The cells of what an arm costs: answers changed, calls, time and tokens an item, both also as
/// multiples of the unguarded answer's.
fn costs(arm: &Arm) -> [String; 6] {
    let told = |mean: Option<Mean>| mean.map_or_else(|| "-".into(), number);
    [
        percent(arm.changed),
        number(arm.calls),
        number(arm.ms),
        number(arm.times),
        told(arm.tokens),
        told(arm.token_times),
    ]
}

/// The figures as Markdown.
#[must_use]
pub fn markdown(runs: &[RunReport]) -> String {
    let mut out = String::from("# Report\n");
    for report in runs {
        let RunReport { summary, header, .. } = report;
        let cap = header
            .max_new_tokens
            .map_or_else(String::new, |cap| format!("at most {cap} new tokens; "));
        let _ = write!(
            out,
            "\n## {} on {}\n\n{}; {} failed, {} refused by a filter; judge {}; {cap}rates with 95% intervals\n\n\
             | arm | harmless rate | attack success | over-refusal | utility | unjudged | failed | filtered | changed | calls | ms | time, times | tokens | tokens, times |\n\
             | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
            summary.benchmark,
            summary.model,
            report.extent(),
            summary.failed,
            summary.filtered,
            summary.judge
        );
        for arm in &summary.arms {
            let _ = writeln!(
                out,
                "| {} | {} | {} |",
                arm.profile,
                cells(&arm.all).join(" | "),
                costs(arm).join(" | ")
            );
        }
        for said in summary.unguarded.iter().chain(&summary.odd) {
            let _ = writeln!(out, "\n**{said}.**");
        }
        if summary.arms.iter().any(|arm| !arm.published.is_empty()) {
            let _ =
                write!(out, "\n| arm | as the benchmark counts | points |\n| --- | --- | --- |\n");
        }
        for arm in &summary.arms {
            for (name, points) in points(arm) {
                let _ = writeln!(out, "| {} | {name} | {points} |", arm.profile);
            }
        }
        for arm in &summary.arms {
            if let Some(paired) = arm.all.against_unguarded {
                let _ = writeln!(out, "\n{} against unguarded: {}.", arm.profile, against(paired));
            }
            if let Some(detection) = &arm.detection {
                let area = detection.auroc.map_or_else(|| "-".into(), |area| format!("{area:.3}"));
                let _ = writeln!(
                    out,
                    "Step 2 of {}: precision {}, recall {}, AUROC {area}; flags {} of the refusals.",
                    arm.profile,
                    percent(detection.precision),
                    percent(detection.recall),
                    percent(detection.flagged_refusals)
                );
            }
        }
    }
    out
}

/// The figures as CSV: one line a run, arm, scenario (`all` first) and metric, rates as numbers.
///
/// # Errors
/// [`csv::Error`], which a text in memory gives no cause for.
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
                let place =
                    [&summary.benchmark, &summary.model, &summary.judge, &arm.profile, scenario];
                let of_all = if scenario == "all" { overall(arm) } else { Vec::new() };
                for (metric, numbers) in metrics(figures).into_iter().chain(of_all) {
                    table.write_record(
                        place.into_iter().chain([metric]).chain(numbers.iter().map(String::as_str)),
                    )?;
                }
            }
        }
    }
    let bytes = table.into_inner().map_err(csv::IntoInnerError::into_error)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A metric's value, lower and upper end, count and total; empty where it has none.
type Numbers = [String; 5];

fn of_rate(rate: Rate) -> Numbers {
    [
        told(rate.value),
        told(rate.low),
        told(rate.high),
        rate.count.to_string(),
        rate.total.to_string(),
    ]
}

fn of_mean(mean: Mean) -> Numbers {
    [told(mean.value), told(mean.low), told(mean.high), String::new(), mean.total.to_string()]
}

/// A number; empty where there is none.
fn told(number: f64) -> String {
    if number.is_nan() { String::new() } else { number.to_string() }
}

fn of_count(count: usize) -> Numbers {
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
    let rates = rates.into_iter().filter_map(|(metric, rate)| Some((metric, of_rate(rate?))));
    let counts = counts.map(|(metric, count)| (metric, of_count(count)));
    let beside = figures.against_unguarded.into_iter().flat_map(|paired| {
        let (least, most) = paired.p();
        let value = if paired.unknown == 0 { told(most) } else { String::new() };
        [
            ("better_than_unguarded", of_count(paired.only_first)),
            ("worse_than_unguarded", of_count(paired.only_second)),
            (
                "mcnemar_p",
                [value, told(least), told(most), String::new(), paired.known().to_string()],
            ),
        ]
    });
    rates
        .chain(counts)
        .chain(figures.utility.map(|mean| ("utility", of_mean(mean))))
        .chain(beside)
        .collect()
}

/// The metrics that only all items of an arm have.
fn overall(arm: &Arm) -> Vec<(&str, Numbers)> {
    let costs = [("calls", arm.calls), ("ms", arm.ms), ("times", arm.times)];
    let tokens = [("tokens", arm.tokens), ("token_times", arm.token_times)];
    let tokens = tokens.into_iter().filter_map(|(metric, mean)| Some((metric, mean?)));
    let published = arm.published.iter().map(|(metric, mean)| (metric.as_str(), *mean));
    let means = published.chain(costs).chain(tokens).map(|(metric, mean)| (metric, of_mean(mean)));
    let detected = arm.detection.iter().flat_map(
        |Detection { precision, recall, flagged_refusals, auroc, .. }| {
            let area = [
                auroc.map_or_else(String::new, told),
                String::new(),
                String::new(),
                String::new(),
                String::new(),
            ];
            [
                ("detection_precision", of_rate(*precision)),
                ("detection_recall", of_rate(*recall)),
                ("refusals_flagged", of_rate(*flagged_refusals)),
                ("detection_auroc", area),
            ]
        },
    );
    means.chain([("changed", of_rate(arm.changed))]).chain(detected).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_too_few_are_known_the_range_alone_is_told() {
        let rate = |are_enough| percent(Rate::with_unknown(2, 2, 8).with_value_if(are_enough));
        assert_eq!([rate(true), rate(false)], ["100.0% (5.7 to 100.0)", "- (5.7 to 100.0)"]);
        let mean = Mean { total: 2, value: 1.0, low: 0.5, high: 1.0 };
        assert_eq!(number(mean.with_value_if(false)), "- (0.50 to 1.00)");
        assert_eq!([percent(Rate::wilson(0, 0)), told(Rate::wilson(0, 0).value)], ["-", ""]);
    }
}
