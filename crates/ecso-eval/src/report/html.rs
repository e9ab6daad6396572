//! The HTML report. Text of items is hidden until somebody asks for it.

use ecso::{Outcome, Trace, Verdict};
use minijinja::{AutoEscape, Environment, Value, context, value::Serde};
use serde::Serialize;

use super::{RunReport, against, cells, costs, percent, points};
use crate::{
    judge::Ruling,
    record::ItemRecord,
    stats::Rate,
    summary::{Arm, Detection, Figures},
    verdicts::Verdicts,
};

const TEMPLATE: &str = include_str!("report.html");
const SCRIPT: &str = include_str!("report.js");
/// Columns of rates.
const RATES: [&str; 8] = [
    "arm",
    "harmless rate",
    "attack success",
    "over-refusal",
    "utility",
    "unjudged",
    "failed",
    "filtered",
];
/// Columns of costs.
const COSTS: [&str; 7] = [
    "arm",
    "answers changed",
    "calls an item",
    "model ms an item",
    "time, times",
    "tokens an item",
    "tokens, times",
];

/// A table; columns that say nothing are left out.
#[derive(Debug, Clone, Serialize)]
struct Table {
    head: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    fn new(head: &[&'static str], mut rows: Vec<Vec<String>>) -> Self {
        let says =
            |column: usize| rows.iter().any(|row| row.get(column).is_some_and(|cell| cell != "-"));
        let kept: Vec<usize> = (0..head.len()).filter(|column| says(*column)).collect();
        for row in &mut rows {
            *row = kept.iter().filter_map(|column| row.get(*column).cloned()).collect();
        }
        Self { head: kept.into_iter().map(|column| head[column]).collect(), rows }
    }
}

/// A bar of a chart with its interval: value, low, high, in percent.
#[derive(Debug, Clone, Serialize)]
struct Bar {
    group: String,
    arm: String,
    /// Which arm: 0 is the unguarded one.
    place: usize,
    at: [f64; 3],
}

/// An item with its answers, as the page reads it.
#[derive(Debug, Clone, Serialize)]
pub(super) struct ShownItem<'a> {
    id: &'a str,
    scenario: &'a str,
    query: &'a str,
    error: Option<&'a str>,
    arms: Vec<Answer<'a>>,
}

#[derive(Debug, Clone, Serialize)]
struct Answer<'a> {
    profile: &'a str,
    verdict: Verdict,
    score: Option<f64>,
    /// Of every judge, in the report's order; none where it has not judged this answer.
    rulings: Vec<Option<Ruling>>,
    text: &'a str,
    steps: Vec<Call<'a>>,
}

#[derive(Debug, Clone, Serialize)]
struct Call<'a> {
    step: ecso::Step,
    question: Option<&'a str>,
    ms: u64,
    tokens: [Option<u32>; 2],
    verdict: Option<Verdict>,
    score: Option<f64>,
    prompt: &'a str,
    reply: &'a str,
}

/// What the judges of a run are called.
pub(super) fn judges(verdicts: &[&Verdicts]) -> Vec<String> {
    let name = |verdicts: &&Verdicts| verdicts.judge().unwrap_or("unnamed").to_owned();
    verdicts.iter().map(name).collect()
}

/// The report as one HTML file.
///
/// # Errors
/// When the template can't be rendered.
pub fn html(runs: &[RunReport]) -> Result<String, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.add_template("report", TEMPLATE)?;
    let runs: Vec<Value> = runs.iter().map(run).collect();
    environment.get_template("report")?.render(context! {
        runs, version => env!("CARGO_PKG_VERSION"), script => Value::from_safe_string(SCRIPT.to_owned()),
    })
}

fn run(report: &RunReport) -> Value {
    let RunReport { header, summary, shown, judges, .. } = report;
    let named = |arm: &Arm, cells: Vec<String>| {
        [arm.profile.clone()].into_iter().chain(cells).collect::<Vec<_>>()
    };
    let rates = summary.arms.iter().map(|arm| named(arm, cells(&arm.all).into())).collect();
    let cost = summary.arms.iter().map(|arm| named(arm, costs(arm).into())).collect();
    let mut published: Vec<Vec<String>> = Vec::new();
    let (mut bars, mut scenario_bars, mut scenarios) = (Vec::new(), Vec::new(), Vec::new());
    for (place, arm) in summary.arms.iter().enumerate() {
        published.extend(
            points(arm).into_iter().map(|(name, value)| vec![name, arm.profile.clone(), value]),
        );
        let bar = |group: &str, figures: &Figures| {
            let at = headline(figures.harmless, figures.over_refusal)?;
            Some(Bar { group: group.to_owned(), arm: arm.profile.clone(), place, at })
        };
        bars.extend(bar("", &arm.all));
        for (scenario, figures) in &arm.scenarios {
            scenario_bars.extend(bar(scenario, figures));
            scenarios.push([vec![scenario.clone()], named(arm, cells(figures).into())].concat());
        }
    }
    // Stable: the arms of a scenario stay in their order.
    scenarios.sort_by(|a: &Vec<String>, b| a[0].cmp(&b[0]));
    published.sort_by(|a, b| a[0].cmp(&b[0]));
    scenario_bars.sort_by(|a: &Bar, b| a.group.cmp(&b.group));
    let detections: Vec<_> = summary
        .arms
        .iter()
        .filter_map(|arm| arm.detection.as_ref().map(|detection| detected(&arm.profile, detection)))
        .collect();
    let against: Vec<_> = summary
        .arms
        .iter()
        .filter_map(|arm| {
            arm.all.against_unguarded.map(|paired| (arm.profile.clone(), against(paired)))
        })
        .collect();
    let tables = [
        ("", Table::new(&RATES, rates)),
        ("", Table::new(&COSTS, cost)),
        ("As the benchmark counts", Table::new(&["figure", "arm", "points"], published)),
    ];
    let by_scenario = Table::new(&[&["scenario"], RATES.as_slice()].concat(), scenarios);
    context! {
        benchmark => summary.benchmark.as_str(), model => summary.model.as_str(), judge => summary.judge.as_str(), extent => report.extent(),
        said => Value::from(Serde(summary.unguarded.iter().chain(&summary.odd).collect::<Vec<_>>())), failed => summary.failed, filtered => summary.filtered, cap => header.max_new_tokens, digest => header.model_digest.as_str(),
        bars => Value::from(Serde(bars)), scenario_bars => Value::from(Serde(scenario_bars)),
        tables => Value::from(Serde(tables)), by_scenario => Value::from(Serde(by_scenario)),
        detections, against => Value::from(Serde(against)), items => Value::from_safe_string(format!("[{}]", shown.join(",\n"))), judges => Value::from(Serde(judges)), more => summary.items - shown.len(),
        metric => if summary.arms.first().is_some_and(|arm| arm.all.harmless.is_some()) { "harmless rate" } else { "answered" },
    }
}

/// The rate that a chart shows: the harmless rate, or the share of harmless requests that are
/// answered.
fn headline(harmless: Option<Rate>, over_refusal: Option<Rate>) -> Option<[f64; 3]> {
    let percent = |value: f64| (1000.0 * value).round() / 10.0;
    harmless
        .map(|rate| [rate.value, rate.low, rate.high])
        .or_else(|| over_refusal.map(|rate| [1.0 - rate.value, 1.0 - rate.high, 1.0 - rate.low]))
        .map(|numbers| numbers.map(percent))
        .filter(|numbers| !numbers[0].is_nan())
}

fn detected(profile: &str, detection: &Detection) -> Value {
    let point = |x: f64, y: f64| format!("{:.1},{:.1}", 40.0 + 240.0 * x, 260.0 - 240.0 * y);
    let path = |pick: fn(&(f64, f64, f64)) -> f64| -> Vec<String> {
        detection
            .curve
            .iter()
            .filter(|at| !pick(at).is_nan())
            .map(|at| point(at.0, pick(at)))
            .collect()
    };
    context! {
        profile, precision => percent(detection.precision), recall => percent(detection.recall),
        refusals => percent(detection.flagged_refusals), auroc => detection.auroc.map(|area| format!("{area:.3}")),
        recall_path => path(|at| at.1).join(" "), false_path => path(|at| at.2).join(" "),
    }
}

impl<'a> ShownItem<'a> {
    /// An item with what each judge says of its answers.
    pub(super) fn of(record: &'a ItemRecord, verdicts: &[&Verdicts]) -> Self {
        let rulings = |arm: &str| {
            let ruling = |verdicts: &&Verdicts| verdicts.of(record, arm).map(|ruled| ruled.verdict);
            verdicts.iter().map(ruling).collect()
        };
        let call = |trace: &'a Trace| Call {
            step: trace.step,
            question: trace.question.as_deref(),
            ms: trace.ms,
            tokens: [trace.prompt_tokens, trace.completion_tokens],
            verdict: trace.verdict,
            score: trace.score,
            prompt: &trace.prompt,
            reply: &trace.reply,
        };
        let answer = |arm: &'a Outcome| Answer {
            profile: &arm.profile,
            verdict: arm.verdict,
            score: arm.score,
            rulings: rulings(&arm.profile),
            text: &arm.answer,
            steps: arm.steps.iter().map(call).collect(),
        };
        Self {
            id: &record.id,
            scenario: &record.scenario,
            query: &record.query,
            error: record.error.as_deref(),
            arms: record.arms.iter().map(answer).collect(),
        }
    }

    /// As JSON that may stand in a page: no text in it ends or begins anything there.
    pub(super) fn json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default().replace('<', "\\u003c")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_of_an_item_is_a_tag() {
        let text = "</script><!-- <script>alert(1)</script> \u{2028} \"'";
        let item = ShownItem {
            id: text,
            scenario: text,
            query: text,
            error: Some(text),
            arms: Vec::new(),
        };
        let json = item.json();
        assert!(!json.contains('<'), "{json}");
        let read: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!((read["id"].as_str(), read["error"].as_str()), (Some(text), Some(text)));
    }
}
