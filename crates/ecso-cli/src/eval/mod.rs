//! `ecso eval`.

mod agreement;
mod args;
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

use args::PrepareCommand;
pub(crate) use args::{EvalCommand, share};

use crate::UsageError;

pub(crate) fn run(command: &EvalCommand, file: Option<&Path>) -> anyhow::Result<()> {
    match command {
        EvalCommand::List { json } => list(*json),
        EvalCommand::Prepare(command) => prepare_images(command),
        EvalCommand::Run(args) => run::run(args, file),
        EvalCommand::Judge(args) => judge::run(args, file),
        EvalCommand::Calibrate { runs, false_alarms, dry_run, json } => {
            calibrate::run(runs, *false_alarms, *dry_run, *json, file)
        }
        EvalCommand::Agreement { verdicts, against } => agreement::run(verdicts, against),
        EvalCommand::Compare { a, b, judge } => {
            let [a, b] = [judged(a, judge.as_deref())?, judged(b, judge.as_deref())?];
            print!("{}", compare::compare(&a, &b).map_err(UsageError::of)?);
            hold_judged([&a, &b])
        }
        EvalCommand::Advise { runs, judge } => {
            let runs: anyhow::Result<Vec<JudgedRun>> =
                runs.iter().map(|run| judged(run, judge.as_deref())).collect();
            let runs = runs?;
            print!("{}", advise::advise(&runs).map_err(UsageError::of)?);
            hold_judged(&runs)
        }
        EvalCommand::Report { runs, out, judge } => {
            write_report(runs, out.as_deref(), judge.as_deref())
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

fn typesetter(font: Option<&Path>, sans: bool) -> anyhow::Result<Typesetter> {
    Ok(match font {
        Some(file) => Typesetter::from_file(file).map_err(|error| UsageError(error.to_string()))?,
        None if sans => Typesetter::sans()?,
        None => Typesetter::system()?,
    })
}

fn prepare_images(command: &PrepareCommand) -> anyhow::Result<()> {
    let (count, font, out) = match command {
        PrepareCommand::Typographic { prompts, out, font } => {
            let typesetter = typesetter(font.as_deref(), false)?;
            let requests = requests(prompts)?;
            prepare::typographic(&requests, &typesetter, out)?;
            (requests.len(), typesetter.font_name, out)
        }
        PrepareCommand::Pages { items, out, font } => {
            let typesetter = typesetter(font.as_deref(), true)?;
            (prepare::pages(items, &typesetter, out)?, typesetter.font_name, out)
        }
        PrepareCommand::Figstep { questions, out, font } => {
            let typesetter = typesetter(font.as_deref(), false)?;
            (prepare::figstep(questions, &typesetter, out)?, typesetter.font_name, out)
        }
        PrepareCommand::Evasions { questions, per_family, out, font } => {
            let typesetter = typesetter(font.as_deref(), false)?;
            (
                prepare::evasions(questions, *per_family, &typesetter, out)?,
                typesetter.font_name,
                out,
            )
        }
        PrepareCommand::MmSafetybench { questions, out, font } => {
            let typesetter = typesetter(font.as_deref(), true)?;
            (prepare::mm_safetybench(questions, &typesetter, out)?, typesetter.font_name, out)
        }
    };
    println!("{count} requests set as images in {font}; {}", out.display());
    Ok(())
}

/// A request a line; or the column `prompt` or `instruction` of a CSV file.
fn requests(path: &Path) -> anyhow::Result<Vec<prepare::PlainRequest>> {
    let wrong = |error: &dyn std::fmt::Display| UsageError(format!("{}: {error}", path.display()));
    let requests = prepare::requests(path).map_err(|error| wrong(&error))?;
    if requests.is_empty() {
        return Err(wrong(&"no request in it").into());
    }
    Ok(requests)
}

fn judged(run: &Path, judge: Option<&str>) -> anyhow::Result<JudgedRun> {
    JudgedRun::open(run, judge).map_err(|error: JudgedRunError| UsageError::of(error).into())
}

/// Holds that somebody has ruled on something, or that a filter did in their place.
fn hold_judged<'a>(runs: impl IntoIterator<Item = &'a JudgedRun>) -> anyhow::Result<()> {
    for run in runs {
        if run.verdicts.has_rulings()
            || run.records()?.any(|record| record.is_ok_and(|record| record.filtered))
        {
            return Ok(());
        }
    }
    anyhow::bail!(
        "no answer is judged, so that there is no figure; ecso eval judge RUN rules on them"
    )
}

fn write_report(runs: &[PathBuf], out: Option<&Path>, judge: Option<&str>) -> anyhow::Result<()> {
    let out = out.unwrap_or(&runs[0]);
    if out.is_file() {
        return Err(UsageError(format!("--out {} is a file; name a folder", out.display())).into());
    }
    let report = |run: &PathBuf| Ok(RunReport::read(judged(run, judge)?)?);
    let reports: Vec<RunReport> = runs.iter().map(report).collect::<anyhow::Result<_>>()?;
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
        write_whole(&path, &text).with_context(|| path.display().to_string())?;
    }
    println!("{markdown}\n{}", out.join("report.html").display());
    let is_judged = |summary: &Summary, arm: &Arm| {
        arm.all.unjudged + arm.all.missing + arm.all.failed < summary.items
    };
    anyhow::ensure!(
        summaries.iter().any(|summary| summary.arms.iter().any(|arm| is_judged(summary, arm))),
        "no answer is judged: the report has no rate; ecso eval judge tells of one run after the other"
    );
    Ok(())
}

/// Writes a file in one move: who reads it sees the old text or the new one.
pub(crate) fn write_whole(path: &Path, text: &str) -> std::io::Result<()> {
    // Others may write the same report.
    let new = path.with_extension(format!("{}.new", std::process::id()));
    std::fs::write(&new, text)
        .and_then(|()| std::fs::rename(&new, path))
        .inspect_err(|_| drop(std::fs::remove_file(&new)))
}
