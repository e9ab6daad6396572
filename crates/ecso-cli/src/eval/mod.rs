//! `ecso eval`.

mod args;
mod calibrate;
mod judge;
mod run;
mod table;

use std::path::{Path, PathBuf};

use anyhow::Context;
use ecso_eval::{
    advice, benchmarks, journal, prepare,
    report::{self, Judged},
    summary::summarise,
    typographic::Typesetter,
};

pub(crate) use args::EvalCommand;
use args::PrepareCommand;

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
        EvalCommand::Agreement { verdicts, labels, map, json } => judge::agreement(verdicts, labels, map, *json),
        EvalCommand::Compare { a, b, judge } => {
            print!("{}", advice::compare(&judged(a, judge.as_deref())?, &judged(b, judge.as_deref())?));
            Ok(())
        }
        EvalCommand::Advise { runs, judge } => {
            let runs: anyhow::Result<Vec<Judged>> = runs.iter().map(|run| judged(run, judge.as_deref())).collect();
            print!("{}", advice::advise(&runs?));
            Ok(())
        }
        EvalCommand::Report { runs, out, judge } => write_report(runs, out.as_deref(), judge.as_deref()),
    }
}

fn list(json: bool) -> anyhow::Result<()> {
    let all: Vec<benchmarks::About> = benchmarks::ALL.iter().map(|benchmark| benchmark.about()).collect();
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
        PrepareCommand::Figstep { questions, out, font } => {
            let typesetter = typesetter(font.as_deref(), false)?;
            (prepare::figstep(questions, &typesetter, out)?, typesetter.font_name, out)
        }
        PrepareCommand::Evasions { questions, per_family, out, font } => {
            let typesetter = typesetter(font.as_deref(), false)?;
            (prepare::evasions(questions, *per_family, &typesetter, out)?, typesetter.font_name, out)
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

/// The judges' files in a run's folder.
fn verdict_files(run: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(run).map_err(|error| UsageError(format!("{}: {error}", run.display())))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.retain(|path| {
        let is_lines = path.extension().is_some_and(|extension| extension == "jsonl");
        is_lines && path.file_stem().is_some_and(|stem| stem.to_string_lossy().starts_with("verdicts-"))
    });
    files.sort();
    Ok(files)
}

/// Whether a file of verdicts is of the judge `wanted`: by its whole name, or the beginning that tells it from others.
fn is_of_judge(path: &Path, wanted: &str) -> bool {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let name = stem.strip_prefix("verdicts-").unwrap_or_default();
    let wanted = wanted.trim_end_matches(".jsonl");
    name.starts_with(&judge::file_name(wanted.strip_prefix("verdicts-").unwrap_or(wanted)))
}

/// The journal of a run.
fn read_run(run: &Path) -> anyhow::Result<(journal::Header, Vec<journal::Record>)> {
    journal::read(run).map_err(|error| UsageError(error.to_string()).into())
}

fn judged(run: &Path, wanted: Option<&str>) -> anyhow::Result<Judged> {
    let (header, records) = read_run(run)?;
    let mut files = verdict_files(run)?;
    // A judge is known by its name, as it stands in its verdicts and, in other letters, in the file's name.
    files.retain(|path| wanted.is_none_or(|wanted| is_of_judge(path, wanted)));
    let path = match files.as_slice() {
        [one] => one,
        [] => return Err(UsageError(format!("{}: nobody has judged it; ecso eval judge {0}", run.display())).into()),
        several => {
            let names: Vec<_> =
                several.iter().filter_map(|path| path.file_name()).map(|name| name.to_string_lossy()).collect();
            return Err(
                UsageError(format!("{}: name one judge with --judge: {}", run.display(), names.join(", "))).into()
            );
        }
    };
    let judgements: Vec<_> = judge::latest(judge::verdicts(path)?).into_values().collect();
    let summary = summarise(&header, &records, &judgements);
    Ok(Judged { header, records, judgements, summary })
}

fn write_report(runs: &[PathBuf], out: Option<&Path>, judge: Option<&str>) -> anyhow::Result<()> {
    let judged: anyhow::Result<Vec<Judged>> = runs.iter().map(|run| judged(run, judge)).collect();
    let judged = judged?;
    let out = out.unwrap_or(&runs[0]);
    std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    let summaries: Vec<_> = judged.iter().map(|judged| &judged.summary).collect();
    let markdown = report::markdown(&judged);
    for (name, text) in [
        ("report.html", report::html(&judged)?),
        ("report.md", markdown.clone()),
        ("report.csv", report::csv(&judged)),
        ("report.json", serde_json::to_string_pretty(&summaries)?),
    ] {
        let path = out.join(name);
        std::fs::write(&path, text).with_context(|| path.display().to_string())?;
    }
    println!("{markdown}\n{}", out.join("report.html").display());
    Ok(())
}
