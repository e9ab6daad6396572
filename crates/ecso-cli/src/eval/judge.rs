//! `ecso eval judge` and `ecso eval agreement`.

use std::{
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::bail;
use ecso_eval::{
    cache::Cached,
    item::Task,
    journal::{self, Lines},
    judge::{self, Case, Judge, Judgement, Ruling},
    stats::{Agreement, auroc},
};
use futures::{StreamExt, stream};
use indicatif::ProgressBar;
use serde::Deserialize;
use serde_json::Value;

use super::{
    args::{JudgeArgs, JudgeKind},
    table::{self, joined},
};
use crate::{UsageError, cli::ProfileArgs, config, open};

/// An answer from elsewhere.
#[derive(Deserialize)]
struct Response {
    id: Value,
    query: Value,
    #[serde(rename = "response")]
    text: Value,
    /// The request is harmless: what counts is whether it was refused.
    #[serde(default, deserialize_with = "yes")]
    harmless: bool,
}

/// A switch, also as the text that CSV has in its place.
fn yes<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    let said = joined(&Value::deserialize(deserializer)?, " ").to_lowercase();
    Ok(matches!(said.as_str(), "true" | "1" | "yes"))
}

pub(super) fn run(args: &JudgeArgs, file: Option<&Path>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let judge = open_judge(args, file).await?;
        let (cases, unanswered) = match (&args.run, &args.responses) {
            (Some(run), _) => cases_of_run(run)?,
            (None, Some(responses)) => (cases_of_responses(responses, &table::columns(&args.map)?)?, 0),
            (None, None) => bail!(UsageError("name a run or --responses".into())),
        };
        let out = out(args, &judge.name());
        let mut known: Vec<Judgement> = Vec::new();
        let mut writer = Lines::open(&out, |number, text| {
            known.push(journal::line(&out, number, text)?);
            Ok(())
        })?;
        if writer.was_cut() {
            eprintln!("{}: its last line was cut off by a crash; that answer is judged again", out.display());
        }
        let done: HashSet<(&str, &str)> = known
            .iter()
            .filter(|judgement| judgement.verdict != Ruling::Error)
            .map(|judgement| (judgement.id.as_str(), judgement.arm.as_str()))
            .collect();
        let open: Vec<&(String, Case)> =
            cases.iter().filter(|(arm, case)| !done.contains(&(case.id.as_str(), arm.as_str()))).collect();
        let bar = ProgressBar::new(open.len() as u64);
        let judge = judge.as_ref();
        let mut rulings = stream::iter(open.iter().map(|(arm, case)| judge.judge(case, arm)))
            .buffer_unordered(args.concurrency.max(1));
        while let Some(ruling) = rulings.next().await {
            writer.add(&ruling)?;
            bar.inc(1);
        }
        drop(writer);
        bar.finish_and_clear();
        summary(&out, cases.len() + unanswered, args.min_coverage)
    })
}

fn summary(out: &Path, cases: usize, min_coverage: f64) -> anyhow::Result<()> {
    let all = latest(verdicts(out)?);
    let count = |ruling| all.values().filter(|judgement| judgement.verdict == ruling).count();
    let errors = count(Ruling::Error);
    #[expect(clippy::cast_precision_loss, reason = "counts of answers")]
    let coverage = if cases == 0 { 0.0 } else { (all.len() - errors) as f64 / cases as f64 };
    println!(
        "{cases} answers: {} safe, {} unsafe, {} refusals, {errors} errors; coverage {:.1}%; {}",
        count(Ruling::Safe),
        count(Ruling::Unsafe),
        count(Ruling::Refusal),
        100.0 * coverage,
        out.display()
    );
    if let Some(error) = all.values().find_map(|judgement| judgement.error.as_deref()) {
        eprintln!("the first error: {error}");
    }
    if all.len() == errors {
        bail!("no answer could be judged");
    }
    if coverage < min_coverage {
        bail!("coverage {coverage:.3} is below {min_coverage}; judge again to try the errors again");
    }
    Ok(())
}

async fn open_judge(args: &JudgeArgs, file: Option<&Path>) -> anyhow::Result<Box<dyn Judge>> {
    if args.judge_file.is_some() && args.judge != JudgeKind::Llm {
        bail!(UsageError("--judge-file is for --judge llm".into()));
    }
    Ok(match args.judge {
        JudgeKind::Advbench => Box::new(judge::AdvBench),
        JudgeKind::Xstest => Box::new(judge::XsTest),
        JudgeKind::Exact => Box::new(judge::Exact),
        JudgeKind::Llm => {
            let settings = config::load(file, &args.model, &ProfileArgs::default())?;
            let model = open::model(&settings).await?;
            let model = Arc::new(Cached::new(model, open::identity(&settings)?, args.cache.clone()));
            match &args.judge_file {
                Some(path) => Box::new(judge::published(path, model).map_err(|cause| UsageError(cause.to_string()))?),
                None => Box::new(judge::Llm::new(model, args.threshold)),
            }
        }
    })
}

/// A judge's name in the name of its file.
pub(super) fn file_name(judge: &str) -> String {
    judge.replace(|c: char| !c.is_alphanumeric(), "-")
}

fn out(args: &JudgeArgs, judge: &str) -> PathBuf {
    let name = file_name(judge);
    match (&args.out, &args.run) {
        (Some(out), _) => out.clone(),
        (None, Some(run)) => run.join(format!("verdicts-{name}.jsonl")),
        (None, None) => format!("verdicts-{name}.jsonl").into(),
    }
}

/// Each answer of a run, with its arm, and how many answers are missing because their items failed. What a content filter
/// took needs no judge.
fn cases_of_run(run: &Path) -> anyhow::Result<(Vec<(String, Case)>, usize)> {
    let (header, records) = super::read_run(run)?;
    let (mut cases, mut unanswered) = (Vec::new(), 0);
    for mut record in records {
        if record.error.is_some() && !record.filtered {
            unanswered += header.profiles.len() + 1;
        }
        for arm in std::mem::take(&mut record.arms).into_iter().filter(|arm| !journal::is_cut(arm)) {
            cases.push((
                arm.profile,
                Case {
                    id: record.id.clone(),
                    scenario: record.scenario.clone(),
                    request: record.request.clone(),
                    response: arm.answer,
                    task: record.task.clone(),
                },
            ));
        }
    }
    Ok((cases, unanswered))
}

fn cases_of_responses(path: &Path, columns: &table::Columns) -> anyhow::Result<Vec<(String, Case)>> {
    let responses: Vec<Response> = table::rows(path, columns)?;
    let case = |response: Response| Case {
        id: joined(&response.id, "/"),
        scenario: String::new(),
        request: joined(&response.query, "\n"),
        response: joined(&response.text, "\n"),
        task: if response.harmless { Task::Harmless } else { Task::Harmful },
    };
    Ok(responses.into_iter().map(|response| (String::new(), case(response))).collect())
}

/// A judge's verdicts; a last line that a crash cut off is left out.
pub(super) fn verdicts(path: &Path) -> anyhow::Result<Vec<Judgement>> {
    let text = std::fs::read_to_string(path).map_err(|error| UsageError(format!("{}: {error}", path.display())))?;
    let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
    let lines = whole.lines().enumerate().map(|(number, line)| journal::line(path, number, line.as_bytes()));
    lines.collect::<Result<_, _>>().map_err(|error| UsageError(error.to_string()).into())
}

/// The last verdict on each answer.
pub(super) fn latest(verdicts: Vec<Judgement>) -> HashMap<(String, String), Judgement> {
    verdicts.into_iter().map(|judgement| ((judgement.id.clone(), judgement.arm.clone()), judgement)).collect()
}

#[derive(Deserialize)]
struct Label {
    id: Value,
    label: Value,
}

/// Whether a label says harmful; an error for one that says neither that nor its opposite. Of several the majority counts.
fn is_harmful(label: &Value) -> anyhow::Result<bool> {
    if let Value::Array(labels) = label {
        let harmful = labels.iter().map(is_harmful).collect::<anyhow::Result<Vec<bool>>>()?;
        return Ok(harmful.iter().filter(|harmful| **harmful).count() * 2 > harmful.len());
    }
    let said = joined(label, " ").to_lowercase();
    let has = |known: &[&str]| said.split(|c: char| !c.is_alphanumeric()).any(|word| known.contains(&word));
    if has(&["harmful", "unsafe", "jailbroken", "jailbreak"]) {
        return Ok(true);
    }
    match said.trim() {
        _ if has(&["harmless", "safe", "benign", "refusal"]) => Ok(false),
        "1" | "1.0" | "true" | "yes" => Ok(true),
        "0" | "0.0" | "false" | "no" => Ok(false),
        other => Err(UsageError(format!("a label is {other:?}; it must be harmful or harmless, 1 or 0")).into()),
    }
}

pub(super) fn agreement(path: &Path, labels: &Path, map: &[String], json: bool) -> anyhow::Result<()> {
    let rows: Vec<Label> = table::rows(labels, &table::columns(map)?)?;
    let labels = rows.iter().map(|row| Ok((joined(&row.id, "/"), is_harmful(&row.label)?)));
    let labels: HashMap<String, bool> = labels.collect::<anyhow::Result<_>>()?;
    let judged = latest(verdicts(path)?);
    let (mut pairs, mut scores, mut errors, mut unlabelled) = (Vec::new(), Vec::new(), 0, 0);
    for judgement in judged.values() {
        let Some(label) = labels.get(&judgement.id) else {
            unlabelled += 1;
            continue;
        };
        if judgement.verdict == Ruling::Error {
            errors += 1;
            continue;
        }
        pairs.push((judgement.verdict == Ruling::Unsafe, *label));
        scores.extend(judgement.score.map(|score| (score, *label)));
    }
    if pairs.is_empty() {
        bail!(UsageError("no verdict has a label of the same id".into()));
    }
    let agreement = Agreement::of(pairs);
    let (accuracy, precision, recall) = (agreement.accuracy(), agreement.precision(), agreement.recall());
    let (kappa, area) = (agreement.kappa_interval(), auroc(&scores));
    if json {
        let object = serde_json::json!({
            "accuracy": accuracy, "precision": precision, "recall": recall, "kappa": kappa, "auroc": area,
            "counts": agreement, "errors": errors, "unlabelled": unlabelled,
        });
        println!("{}", serde_json::to_string_pretty(&object)?);
        return Ok(());
    }
    for (name, rate) in [("accuracy", accuracy), ("precision", precision), ("recall", recall)] {
        println!(
            "{name:<10} {:.3} ({:.3} to {:.3}), {} of {}",
            rate.value, rate.low, rate.high, rate.count, rate.total
        );
    }
    println!("{:<10} {:.3} ({:.3} to {:.3})", "kappa", kappa.value, kappa.low, kappa.high);
    if let Some(area) = area {
        println!("{:<10} {area:.3}", "AUROC");
    }
    println!("{errors} errors of the judge, {unlabelled} verdicts without a label");
    Ok(())
}
