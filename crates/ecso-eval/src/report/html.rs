//! The HTML report. Text of items is hidden until somebody asks for it.

use minijinja::{AutoEscape, Environment, Value, context, value::Serde};
use serde::Serialize;

use super::{Judged, cells, costs, percent, points};
use crate::{
    journal::Record,
    stats::{Rate, p_value},
    summary::{Arm, Detection, Rulings, rulings},
};

const TEMPLATE: &str = include_str!("report.html");
/// Items that are shown one by one, each run; the journal has all.
const SHOWN: usize = 500;

#[derive(Debug, Clone, Serialize)]
struct Line {
    name: String,
    cells: Vec<String>,
    /// The interval of the headline rate as a bar: value, low, high, in percent of the chart.
    bar: Option<[f64; 3]>,
}

#[derive(Debug, Clone, Serialize)]
struct Item {
    id: String,
    scenario: String,
    query: String,
    error: Option<String>,
    arms: Vec<Answer>,
}

#[derive(Debug, Clone, Serialize)]
struct Answer {
    profile: String,
    verdict: String,
    score: Option<String>,
    ruling: String,
    text: String,
    steps: Vec<(String, u64, String, String)>,
}

/// The report as one HTML file.
///
/// # Errors
/// When the template can't be rendered.
pub fn html(runs: &[Judged]) -> Result<String, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.add_template("report", TEMPLATE)?;
    let runs: Vec<Value> = runs.iter().map(run).collect();
    environment.get_template("report")?.render(context! { runs, version => env!("CARGO_PKG_VERSION") })
}

fn run(judged: &Judged) -> Value {
    let Judged { header, records, judgements, summary } = judged;
    let arms: Vec<Line> = summary.arms.iter().map(arm_line).collect();
    let mut scenarios = Vec::new();
    for arm in &summary.arms {
        for (scenario, figures) in &arm.scenarios {
            scenarios.push(Line {
                name: scenario.clone(),
                cells: [arm.profile.clone()].into_iter().chain(cells(figures)).collect(),
                bar: headline(figures.harmless, figures.over_refusal),
            });
        }
    }
    scenarios.sort_by(|a, b| a.name.cmp(&b.name));
    let detections: Vec<_> = summary
        .arms
        .iter()
        .filter_map(|arm| arm.detection.as_ref().map(|detection| detected(&arm.profile, detection)))
        .collect();
    let against: Vec<_> = summary
        .arms
        .iter()
        .filter_map(|arm| {
            arm.all.against_unguarded.map(|(better, worse, p)| (arm.profile.clone(), better, worse, p_value(p)))
        })
        .collect();
    let rulings = rulings(judgements);
    let items: Vec<Item> = records.iter().take(SHOWN).map(|record| item(record, &rulings)).collect();
    let published: Vec<_> = summary.arms.iter().map(|arm| (arm.profile.clone(), points(arm))).collect();
    context! {
        benchmark => summary.benchmark.as_str(), model => summary.model.as_str(), judge => summary.judge.as_str(), items => summary.items,
        failed => summary.failed, cap => header.max_new_tokens, digest => header.model_digest.as_str(),
        arms => Value::from(Serde(arms)), scenarios => Value::from(Serde(scenarios)),
        published, detections, against => Value::from(Serde(against)), shown => Value::from(Serde(items)), more => records.len().saturating_sub(SHOWN),
        metric => if summary.arms.first().is_some_and(|arm| arm.all.harmless.is_some()) { "harmless rate" } else { "answered" },
    }
}

/// The rate that a chart shows: the harmless rate, or the share of harmless requests that are answered.
fn headline(harmless: Option<Rate>, over_refusal: Option<Rate>) -> Option<[f64; 3]> {
    let percent = |value: f64| (1000.0 * value).round() / 10.0;
    harmless
        .map(|rate| [rate.value, rate.low, rate.high])
        .or_else(|| over_refusal.map(|rate| [1.0 - rate.value, 1.0 - rate.high, 1.0 - rate.low]))
        .map(|numbers| numbers.map(percent))
        .filter(|numbers| !numbers[0].is_nan())
}

fn arm_line(arm: &Arm) -> Line {
    Line {
        name: arm.profile.clone(),
        cells: cells(&arm.all).into_iter().chain(costs(arm)).collect(),
        bar: headline(arm.all.harmless, arm.all.over_refusal),
    }
}

fn detected(profile: &str, detection: &Detection) -> Value {
    let point = |x: f64, y: f64| format!("{:.1},{:.1}", 40.0 + 240.0 * x, 260.0 - 240.0 * y);
    let path = |pick: fn(&(f64, f64, f64)) -> f64| -> Vec<String> {
        detection.curve.iter().filter(|at| !pick(at).is_nan()).map(|at| point(at.0, pick(at))).collect()
    };
    context! {
        profile, precision => percent(detection.precision), recall => percent(detection.recall),
        refusals => percent(detection.flagged_refusals), auroc => detection.auroc.map(|area| format!("{area:.3}")),
        recall_path => path(|at| at.1).join(" "), false_path => path(|at| at.2).join(" "),
    }
}

fn item(record: &Record, rulings: &Rulings<'_>) -> Item {
    let ruling = |arm: &str| {
        let found = rulings.get(&(record.id.as_str(), arm));
        found.map_or_else(|| "not judged".into(), |judgement| format!("{:?}", judgement.verdict).to_lowercase())
    };
    let answer = |arm: &ecso::Outcome| Answer {
        profile: arm.profile.clone(),
        verdict: format!("{:?}", arm.verdict).to_lowercase(),
        score: arm.score.map(|score| format!("{score:.2}")),
        ruling: ruling(&arm.profile),
        text: arm.answer.clone(),
        steps: arm
            .steps
            .iter()
            .map(|step| (step.step.to_string(), step.ms, step.prompt.clone(), step.reply.clone()))
            .collect(),
    };
    Item {
        id: record.id.clone(),
        scenario: record.scenario.clone(),
        query: record.query.clone(),
        error: record.error.clone(),
        arms: record.arms.iter().map(answer).collect(),
    }
}
