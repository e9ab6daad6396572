//! Reports: one HTML file that needs nothing else, and the same figures as Markdown, CSV and JSON.

mod html;

use std::fmt::Write as _;

pub use html::html;

use crate::{
    journal::{Header, Record},
    judge::Judgement,
    stats::{Mean, Rate, p_value},
    summary::{Arm, Figures, Summary},
};

/// A run with what a judge says of it.
pub struct Judged {
    /// The run's header.
    pub header: Header,
    /// Its records.
    pub records: Vec<Record>,
    /// The latest verdict on each answer.
    pub judgements: Vec<Judgement>,
    /// The figures.
    pub summary: Summary,
}

/// A rate as people read it: `93.1% (88.0 to 96.2)`.
#[must_use]
pub fn percent(rate: Rate) -> String {
    if rate.value.is_nan() {
        return "-".into();
    }
    format!("{:.1}% ({:.1} to {:.1})", 100.0 * rate.value, 100.0 * rate.low, 100.0 * rate.high)
}

fn number(mean: Mean) -> String {
    if mean.value.is_nan() {
        return "-".into();
    }
    let places = if mean.value.abs() < 20.0 { 2 } else { 0 };
    format!("{:.places$} ({:.places$} to {:.places$})", mean.value, mean.low, mean.high)
}

/// What the benchmark itself publishes of an arm.
fn points(arm: &Arm) -> Vec<(String, String)> {
    arm.published.iter().map(|(name, mean)| (name.clone(), number(*mean))).collect()
}

/// The cells of a line of figures: harmless rate, attack success, over-refusal, utility, unjudged, failed, filtered.
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

/// The cells of what an arm costs: answers changed, calls, time and tokens an item, both also as multiples of the unguarded
/// answer's.
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
pub fn markdown(runs: &[Judged]) -> String {
    let mut out = String::from("# Report\n");
    for Judged { summary, header, .. } in runs {
        let cap = header.max_new_tokens.map_or_else(String::new, |cap| format!("at most {cap} new tokens; "));
        let _ = write!(
            out,
            "\n## {} on {}\n\n{} items, {} failed, {} refused by a filter; judge {}; {cap}rates with 95% intervals\n\n\
             | arm | harmless rate | attack success | over-refusal | utility | unjudged | failed | filtered | changed | calls | ms | time, times | tokens | tokens, times |\n\
             | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
            summary.benchmark, summary.model, summary.items, summary.failed, summary.filtered, summary.judge
        );
        for arm in &summary.arms {
            let _ = writeln!(out, "| {} | {} | {} |", arm.profile, cells(&arm.all).join(" | "), costs(arm).join(" | "));
        }
        if summary.arms.iter().any(|arm| !arm.published.is_empty()) {
            let _ = write!(out, "\n| arm | as the benchmark counts | points |\n| --- | --- | --- |\n");
        }
        for arm in &summary.arms {
            for (name, points) in points(arm) {
                let _ = writeln!(out, "| {} | {name} | {points} |", arm.profile);
            }
        }
        for arm in &summary.arms {
            if let Some((only_this, only_that, p)) = arm.all.against_unguarded {
                let _ = write!(
                    out,
                    "\n{} against unguarded: {only_this} answers better, {only_that} worse (exact McNemar p = {}).\n",
                    arm.profile,
                    p_value(p)
                );
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

/// The figures as CSV: one line a run, arm and scenario (`all` first), rates as numbers.
#[must_use]
pub fn csv(runs: &[Judged]) -> String {
    let mut out = String::from("benchmark,model,judge,arm,scenario,metric,value,low,high,count,total\n");
    for Judged { summary, .. } in runs {
        for arm in &summary.arms {
            let all = [("all", &arm.all)];
            let scenarios = arm.scenarios.iter().map(|(scenario, figures)| (scenario.as_str(), figures));
            for (scenario, figures) in all.into_iter().chain(scenarios) {
                let rates = [
                    ("harmless_rate", figures.harmless),
                    ("attack_success_rate", figures.attack_success),
                    ("over_refusal", figures.over_refusal),
                ];
                let fields =
                    [&summary.benchmark, &summary.model, &summary.judge, &arm.profile, scenario].map(quoted).join(",");
                for (metric, rate) in rates.into_iter().filter_map(|(metric, rate)| Some((metric, rate?))) {
                    let _ = writeln!(
                        out,
                        "{fields},{metric},{},{},{},{},{}",
                        rate.value, rate.low, rate.high, rate.count, rate.total
                    );
                }
                for (metric, count) in [
                    ("unjudged", figures.unjudged + figures.missing),
                    ("failed", figures.failed),
                    ("filtered", figures.filtered),
                ] {
                    let _ = writeln!(out, "{fields},{metric},,,,{count},");
                }
                if scenario == "all" {
                    for (name, mean) in &arm.published {
                        let Mean { value, low, high, total } = mean;
                        let _ = writeln!(out, "{fields},{},{value},{low},{high},,{total}", quoted(name));
                    }
                }
                if let Some(mean) = figures.utility {
                    let _ = writeln!(out, "{fields},utility,{},{},{},,{}", mean.value, mean.low, mean.high, mean.total);
                }
                if scenario == "all" {
                    let told = [("tokens", arm.tokens), ("token_times", arm.token_times)];
                    let costs = [("calls", arm.calls), ("ms", arm.ms), ("times", arm.times)];
                    let means =
                        costs.into_iter().chain(told.into_iter().filter_map(|(name, mean)| Some((name, mean?))));
                    for (name, Mean { value, low, high, total }) in means {
                        let _ = writeln!(out, "{fields},{name},{value},{low},{high},,{total}");
                    }
                }
            }
        }
    }
    out
}

fn quoted(field: impl AsRef<str>) -> String {
    let field = field.as_ref();
    if field.contains([',', '"', '\n']) { format!("\"{}\"", field.replace('"', "\"\"")) } else { field.to_owned() }
}
