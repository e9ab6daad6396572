//! The HTML report. The texts of items are hidden until the reader asks for them.

use ecso::{Outcome, Trace, Verdict};
use minijinja::{AutoEscape, Environment, Value, context, value::Serde};
use serde::Serialize;

use super::{RunReport, cost_cells, paired_text, percent, published_cells, rate_cells};
use crate::{
    judge::Ruling,
    record::ItemRecord,
    stats::Rate,
    summary::{Arm, Detection, Figures},
    verdicts::Verdicts,
};

const TEMPLATE: &str = include_str!("report.html");
const SCRIPT: &str = include_str!("report.js");
/// The columns of rates.
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
/// The columns of costs.
const COSTS: [&str; 7] = [
    "arm",
    "answers changed",
    "calls per item",
    "model ms per item",
    "time, times",
    "tokens per item",
    "tokens, times",
];

/// A table without its empty columns.
#[derive(Debug, Clone, Serialize)]
struct Table {
    head: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    fn new(head: &[&'static str], mut rows: Vec<Vec<String>>) -> Self {
        let has_content =
            |column: usize| rows.iter().any(|row| row.get(column).is_some_and(|cell| cell != "-"));
        let kept: Vec<usize> = (0..head.len()).filter(|column| has_content(*column)).collect();
        for row in &mut rows {
            *row = kept.iter().filter_map(|column| row.get(*column).cloned()).collect();
        }
        Self { head: kept.into_iter().map(|column| head[column]).collect(), rows }
    }
}

/// A bar of a chart with its interval: value, low and high, in percent.
#[derive(Debug, Clone, Serialize)]
struct Bar {
    group: String,
    arm: String,
    /// The index of the arm; 0 is the unguarded one.
    index: usize,
    values: [f64; 3],
}

/// An item with its answers, as the script of the page reads it.
#[derive(Debug, Clone, Serialize)]
pub(super) struct ShownItem<'a> {
    id: &'a str,
    scenario: &'a str,
    query: &'a str,
    images: usize,
    image_sources: &'a [String],
    error: Option<&'a str>,
    arms: Vec<Answer<'a>>,
}

#[derive(Debug, Clone, Serialize)]
struct Answer<'a> {
    profile: &'a str,
    verdict: Verdict,
    score: Option<f64>,
    /// The ruling of every judge, in the report's order; `None` if a judge has not judged this
    /// answer.
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

/// The names of the judges.
pub(super) fn judge_names(verdicts: &[&Verdicts]) -> Vec<String> {
    let name = |verdicts: &&Verdicts| verdicts.judge().unwrap_or("unnamed").to_owned();
    verdicts.iter().map(name).collect()
}

/// The report as one HTML file.
///
/// # Errors
/// If the template can't be rendered.
pub fn html(runs: &[RunReport]) -> Result<String, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.add_template("report", TEMPLATE)?;
    let runs: Vec<Value> = runs.iter().map(run_context).collect();
    environment.get_template("report")?.render(context! {
        runs,
        version => env!("CARGO_PKG_VERSION"),
        script => Value::from_safe_string(SCRIPT.to_owned()),
    })
}

/// The values of one run for the template.
fn run_context(report: &RunReport) -> Value {
    let RunReport { header, summary, shown_items, judges, .. } = report;
    let arms = &summary.arms;
    let row = |arm: &Arm, cells: &[String]| [std::slice::from_ref(&arm.profile), cells].concat();
    let rates = arms.iter().map(|arm| row(arm, &rate_cells(&arm.all))).collect();
    let costs = arms.iter().map(|arm| row(arm, &cost_cells(arm))).collect();
    let mut published: Vec<Vec<String>> = Vec::new();
    let (mut bars, mut scenario_bars, mut scenarios) = (Vec::new(), Vec::new(), Vec::new());
    for (index, arm) in arms.iter().enumerate() {
        let cells = published_cells(arm).into_iter();
        published.extend(cells.map(|(name, value)| vec![name, arm.profile.clone(), value]));
        let bar = |group: &str, figures: &Figures| {
            let values = headline(figures.harmless, figures.over_refusal)?;
            Some(Bar { group: group.to_owned(), arm: arm.profile.clone(), index, values })
        };
        bars.extend(bar("", &arm.all));
        for (scenario, figures) in &arm.scenarios {
            scenario_bars.extend(bar(scenario, figures));
            scenarios.push([vec![scenario.clone()], row(arm, &rate_cells(figures))].concat());
        }
    }
    // A stable sort keeps the arms of a scenario in order.
    scenarios.sort_by(|a: &Vec<String>, b| a[0].cmp(&b[0]));
    published.sort_by(|a, b| a[0].cmp(&b[0]));
    scenario_bars.sort_by(|a: &Bar, b| a.group.cmp(&b.group));
    let detection = |arm: &Arm| Some(detection_context(&arm.profile, arm.detection.as_ref()?));
    let comparison =
        |arm: &Arm| Some((arm.profile.clone(), paired_text(arm.all.against_unguarded?)));
    let detections: Vec<Value> = arms.iter().filter_map(detection).collect();
    let comparisons: Vec<_> = arms.iter().filter_map(comparison).collect();
    let notices: Vec<_> = summary.unguarded_notice.iter().chain(&summary.warnings).collect();
    let tables = [
        ("", Table::new(&RATES, rates)),
        ("", Table::new(&COSTS, costs)),
        ("As the benchmark counts", Table::new(&["figure", "arm", "points"], published)),
    ];
    let by_scenario = Table::new(&[&["scenario"], RATES.as_slice()].concat(), scenarios);
    let has_harmful = arms.first().is_some_and(|arm| arm.all.harmless.is_some());
    context! {
        benchmark => summary.benchmark.as_str(),
        model => summary.model.as_str(),
        digest => header.model_digest.as_str(),
        judge => summary.judge.as_str(),
        extent => report.extent(),
        failed => summary.failed,
        filtered => summary.filtered,
        cap => header.max_new_tokens,
        notices => Value::from(Serde(notices)),
        metric => if has_harmful { "harmless rate" } else { "answered" },
        bars => Value::from(Serde(bars)),
        tables => Value::from(Serde(tables)),
        comparisons => Value::from(Serde(comparisons)),
        detections,
        scenario_bars => Value::from(Serde(scenario_bars)),
        by_scenario => Value::from(Serde(by_scenario)),
        judges => serde_json::to_string(judges).unwrap_or_default(),
        items => Value::from_safe_string(format!("[{}]", shown_items.join(",\n"))),
        more => summary.items - shown_items.len(),
    }
}

/// The rate that a chart shows: the harmless rate, or the share of harmless requests that were
/// answered.
fn headline(harmless: Option<Rate>, over_refusal: Option<Rate>) -> Option<[f64; 3]> {
    let percent = |value: f64| (1000.0 * value).round() / 10.0;
    harmless
        .map(|rate| [rate.value, rate.low, rate.high])
        .or_else(|| over_refusal.map(|rate| [1.0 - rate.value, 1.0 - rate.high, 1.0 - rate.low]))
        .map(|numbers| numbers.map(percent))
        .filter(|numbers| !numbers[0].is_nan())
}

/// The values of step 2 of an arm for the template.
fn detection_context(profile: &str, detection: &Detection) -> Value {
    let point = |x: f64, y: f64| format!("{:.1},{:.1}", 40.0 + 240.0 * x, 260.0 - 240.0 * y);
    let path = |pick: fn(&(f64, f64, f64)) -> f64| -> Vec<String> {
        detection
            .curve
            .iter()
            .filter(|values| !pick(values).is_nan())
            .map(|values| point(values.0, pick(values)))
            .collect()
    };
    context! {
        profile,
        precision => percent(detection.precision),
        recall => percent(detection.recall),
        refusals => percent(detection.flagged_refusals),
        auroc => detection.auroc.map(|area| format!("{area:.3}")),
        recall_path => path(|point| point.1).join(" "),
        false_path => path(|point| point.2).join(" "),
    }
}

impl<'a> ShownItem<'a> {
    /// An item with the rulings of each judge on its answers.
    pub(super) fn new(record: &'a ItemRecord, verdicts: &[&Verdicts]) -> Self {
        let rulings = |arm: &str| {
            let ruling = |verdicts: &&Verdicts| {
                verdicts.for_answer(record, arm).map(|ruling| ruling.verdict)
            };
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
            images: record.images,
            image_sources: &record.image_sources,
            error: record.error.as_deref(),
            arms: record.arms.iter().map(answer).collect(),
        }
    }

    /// The item as JSON that can be embedded in a page: no text in it can begin or end a tag.
    pub(super) fn json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default().replace('<', "\\u003c")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_items_cannot_contain_tags() {
        let text = "</script><!-- <script>alert(1)</script> \u{2028} \"'";
        let item = ShownItem {
            id: text,
            scenario: text,
            query: text,
            images: 1,
            image_sources: &[text.to_owned()],
            error: Some(text),
            arms: Vec::new(),
        };
        let json = item.json();
        assert!(!json.contains('<'), "{json}");
        let read: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!((read["id"].as_str(), read["error"].as_str()), (Some(text), Some(text)));
    }
}
