//! `ecso eval judge` and `ecso eval agreement`.

use std::{
    collections::{HashMap, HashSet},
    fs::OpenOptions,
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, bail};
use ecso_eval::{
    cache::Cached,
    item::Task,
    journal,
    judge::{self, Case, Judge, Judgement, Ruling},
    stats::{Agreement, auroc},
};
use futures::{StreamExt, stream};
use indicatif::ProgressBar;
use serde::Deserialize;

use super::args::{JudgeArgs, JudgeKind};
use crate::{UsageError, cli::ProfileArgs, config, open};

/// An answer from elsewhere.
#[derive(Deserialize)]
struct Response {
    id: serde_json::Value,
    query: String,
    #[serde(rename = "response")]
    text: String,
    /// The request is harmless: what counts is whether it was refused.
    #[serde(default)]
    harmless: bool,
}

pub(super) fn run(args: &JudgeArgs, file: Option<&Path>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let judge = open_judge(args, file).await?;
        let cases = match (&args.run, &args.responses) {
            (Some(run), _) => cases_of_run(run)?,
            (None, Some(responses)) => cases_of_responses(responses)?,
            (None, None) => bail!(UsageError("name a run or --responses".into())),
        };
        let out = out(args, &judge.name());
        let known = verdicts(&out).unwrap_or_default();
        let done: HashSet<(&str, &str)> = known
            .iter()
            .filter(|judgement| judgement.verdict != Ruling::Error)
            .map(|judgement| (judgement.id.as_str(), judgement.arm.as_str()))
            .collect();
        let open: Vec<&(String, Case)> =
            cases.iter().filter(|(arm, case)| !done.contains(&(case.id.as_str(), arm.as_str()))).collect();
        let mut writer =
            OpenOptions::new().create(true).append(true).open(&out).with_context(|| out.display().to_string())?;
        let bar = ProgressBar::new(open.len() as u64);
        let judge = judge.as_ref();
        let mut rulings = stream::iter(open.iter().map(|(arm, case)| judge.judge(case, arm)))
            .buffer_unordered(args.concurrency.max(1));
        while let Some(ruling) = rulings.next().await {
            let mut line = serde_json::to_vec(&ruling)?;
            line.push(b'\n');
            writer.write_all(&line).with_context(|| out.display().to_string())?;
            bar.inc(1);
        }
        drop(writer);
        bar.finish_and_clear();
        summary(&out, cases.len(), args.min_coverage)
    })
}

fn summary(out: &Path, cases: usize, min_coverage: f64) -> anyhow::Result<()> {
    let all = latest(verdicts(out)?);
    let count = |ruling| all.values().filter(|judgement| judgement.verdict == ruling).count();
    let errors = count(Ruling::Error);
    #[expect(clippy::cast_precision_loss, reason = "counts of answers")]
    let coverage = if cases == 0 { 1.0 } else { (all.len() - errors) as f64 / cases as f64 };
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
                Some(path) => Box::new(judge::published(path, model).map_err(UsageError)?),
                None => Box::new(judge::Llm::new(model, args.threshold)),
            }
        }
    })
}

fn out(args: &JudgeArgs, judge: &str) -> PathBuf {
    let name = judge.replace(|c: char| !c.is_alphanumeric(), "-");
    match (&args.out, &args.run) {
        (Some(out), _) => out.clone(),
        (None, Some(run)) => run.join(format!("verdicts-{name}.jsonl")),
        (None, None) => format!("verdicts-{name}.jsonl").into(),
    }
}

/// Each answer of a run, with its arm.
fn cases_of_run(run: &Path) -> anyhow::Result<Vec<(String, Case)>> {
    let (_, records) = journal::read(run)?;
    let mut cases = Vec::new();
    for record in records {
        for arm in record.arms {
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
    Ok(cases)
}

fn cases_of_responses(path: &Path) -> anyhow::Result<Vec<(String, Case)>> {
    let responses: Vec<Response> = lines(path)?;
    let case = |response: Response| Case {
        id: plain(&response.id),
        scenario: String::new(),
        request: response.query,
        response: response.text,
        task: if response.harmless { Task::Harmless } else { Task::Harmful },
    };
    Ok(responses.into_iter().map(|response| (String::new(), case(response))).collect())
}

/// A text as it is, a number as it is written.
fn plain(value: &serde_json::Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn lines<T: serde::de::DeserializeOwned>(path: &Path) -> anyhow::Result<Vec<T>> {
    let text = std::fs::read_to_string(path).map_err(|error| UsageError(format!("{}: {error}", path.display())))?;
    let mut rows = Vec::new();
    for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
        let row = serde_json::from_str(line)
            .map_err(|error| UsageError(format!("{}: line {number}: {error}", path.display())))?;
        rows.push(row);
    }
    Ok(rows)
}

/// A judge's verdicts; a last line that a crash cut off is left out.
pub(super) fn verdicts(path: &Path) -> anyhow::Result<Vec<Judgement>> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
    whole.lines().map(|line| serde_json::from_str(line).with_context(|| path.display().to_string())).collect()
}

/// The last verdict on each answer.
pub(super) fn latest(verdicts: Vec<Judgement>) -> HashMap<(String, String), Judgement> {
    verdicts.into_iter().map(|judgement| ((judgement.id.clone(), judgement.arm.clone()), judgement)).collect()
}

#[derive(Deserialize)]
struct Label {
    id: serde_json::Value,
    label: serde_json::Value,
}

pub(super) fn agreement(path: &Path, labels: &Path, json: bool) -> anyhow::Result<()> {
    let rows: Vec<Label> = lines(labels)?;
    let harmful = |label: &serde_json::Value| {
        matches!(plain(label).to_lowercase().as_str(), "harmful" | "unsafe" | "1" | "true" | "yes" | "jailbroken")
    };
    let labels: HashMap<String, bool> = rows.iter().map(|row| (plain(&row.id), harmful(&row.label))).collect();
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
