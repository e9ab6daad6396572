//! `ecso eval`: measures what the guard gains and costs.

mod agreement;
mod answers;
mod calibrate;
mod judge;
mod run;
mod table;

use std::path::{Path, PathBuf};

use anyhow::Context;
use ecso_eval::{
    advise, benchmarks, compare,
    judged_run::{JudgedRun, JudgedRunError},
    prepare,
    report::{self, RunReport},
    summary::{Arm, Summary},
    typographic::Typesetter,
};

use crate::{
    cli::{EvalCommand, PrepareArgs, PrepareCommand},
    error::UsageError,
    files,
};

pub(crate) fn run(command: &EvalCommand, file: Option<&Path>) -> anyhow::Result<()> {
    match command {
        EvalCommand::List { json } => list(*json),
        EvalCommand::Prepare(command) => prepare(command),
        EvalCommand::Run(args) => run::run(args, file),
        EvalCommand::Judge(args) => judge::run(args, file),
        EvalCommand::Calibrate(args) => calibrate::run(args, file),
        EvalCommand::Agreement(args) => agreement::run(args),
        EvalCommand::Compare { a, b, verdicts } => {
            let [a, b] = [judged(a, verdicts.judge())?, judged(b, verdicts.judge())?];
            print!("{}", compare::compare(&a, &b).map_err(UsageError::from_error)?);
            check_judged([&a, &b])
        }
        EvalCommand::Advise { runs, verdicts } => {
            let runs: anyhow::Result<Vec<JudgedRun>> =
                runs.iter().map(|run| judged(run, verdicts.judge())).collect();
            let runs = runs?;
            print!("{}", advise::advise(&runs).map_err(UsageError::from_error)?);
            check_judged(&runs)
        }
        EvalCommand::Report { runs, out, verdicts } => {
            write_report(runs, out.as_deref(), verdicts.judge())
        }
    }
}

fn list(json: bool) -> anyhow::Result<()> {
    let all: Vec<benchmarks::About> =
        benchmarks::ALL.iter().map(|benchmark| benchmark.about()).collect();
    if json {
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    for about in all {
        println!(
            "{}\n  size     {}\n  licence  {}\n  from     {}",
            about.name, about.size, about.licence, about.source
        );
        println!("  scoring  {}\n  --data   {}", about.scoring, about.layout);
        if !about.variants.is_empty() {
            println!("  variants {}", about.variants.join(", "));
        }
        if !about.scenarios.is_empty() {
            println!("  default  scenarios {}", about.scenarios.join(", "));
        }
    }
    Ok(())
}

fn prepare(command: &PrepareCommand) -> anyhow::Result<()> {
    let PrepareArgs { out, font } = command.target();
    let typesetter = match (font, command) {
        (Some(file), _) => {
            Typesetter::from_file(file).map_err(|error| UsageError(error.to_string()))?
        }
        (None, PrepareCommand::Pages { .. } | PrepareCommand::MmSafetybench { .. }) => {
            Typesetter::sans()?
        }
        (None, _) => Typesetter::system()?,
    };
    let count = match command {
        PrepareCommand::Typographic { prompts, .. } => {
            let requests = requests(prompts)?;
            prepare::typographic(&requests, &typesetter, out)?;
            requests.len()
        }
        PrepareCommand::Pages { items, .. } => prepare::pages(items, &typesetter, out)?,
        PrepareCommand::Figstep { questions, .. } => prepare::figstep(questions, &typesetter, out)?,
        PrepareCommand::Evasions { questions, per_family, .. } => {
            prepare::evasions(questions, *per_family, &typesetter, out)?
        }
        PrepareCommand::MmSafetybench { questions, .. } => {
            prepare::mm_safetybench(questions, &typesetter, out)?
        }
    };
    println!("{count} requests set as images in {}: {}", typesetter.font_name, out.display());
    Ok(())
}

/// Reads requests: one per line, or from the column `prompt` or `instruction` of a CSV file.
fn requests(path: &Path) -> anyhow::Result<Vec<prepare::PlainRequest>> {
    let requests = prepare::requests(path).map_err(|error| UsageError::at(path, error))?;
    if requests.is_empty() {
        return Err(UsageError::at(path, "the file has no requests").into());
    }
    Ok(requests)
}

fn judged(run: &Path, judge: Option<&str>) -> anyhow::Result<JudgedRun> {
    JudgedRun::open(run, judge)
        .map_err(|error: JudgedRunError| UsageError::from_error(error).into())
}

/// Checks that at least one answer was judged, or was blocked by a content filter.
fn check_judged<'a>(runs: impl IntoIterator<Item = &'a JudgedRun>) -> anyhow::Result<()> {
    for run in runs {
        if run.verdicts.has_rulings()
            || run.records()?.any(|record| record.is_ok_and(|record| record.filtered))
        {
            return Ok(());
        }
    }
    anyhow::bail!("no answer is judged yet; run `ecso eval judge RUN` first")
}

fn write_report(runs: &[PathBuf], out: Option<&Path>, judge: Option<&str>) -> anyhow::Result<()> {
    let out = out.unwrap_or(&runs[0]);
    if out.is_file() {
        return Err(UsageError(format!("--out {} is a file; name a folder", out.display())).into());
    }
    let reports = runs.iter().map(|run| Ok(RunReport::read(judged(run, judge)?)?));
    let reports: Vec<RunReport> = reports.collect::<anyhow::Result<_>>()?;
    std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    let summaries: Vec<_> = reports.iter().map(|report| &report.summary).collect();
    let markdown = report::markdown(&reports);
    for (name, text) in [
        ("report.html", report::html(&reports)?),
        ("report.md", markdown.clone()),
        ("report.csv", report::csv(&reports)?),
        ("report.json", serde_json::to_string_pretty(&summaries)?),
    ] {
        let path = out.join(name);
        files::write(&path, &text).with_context(|| path.display().to_string())?;
    }
    println!("{markdown}\n{}", out.join("report.html").display());
    let is_judged = |summary: &Summary, arm: &Arm| {
        arm.all.unjudged + arm.all.missing + arm.all.failed < summary.items
    };
    anyhow::ensure!(
        summaries.iter().any(|summary| summary.arms.iter().any(|arm| is_judged(summary, arm))),
        "no answer is judged, so the report has no rates; run `ecso eval judge RUN` for each run"
    );
    Ok(())
}
