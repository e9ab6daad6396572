//! `ecso replay`: what would another profile have done with recorded traffic?

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead, BufReader, BufWriter, Write},
    num::NonZero,
    path::Path,
};

use anyhow::Context;
use ecso::Guard;
use ecso_gateway::replay::Recorded;
use futures::{StreamExt, stream};
use serde_json::json;

use crate::{UsageError, cli::ReplayArgs, config, open};

pub(crate) fn run(args: &ReplayArgs, file: Option<&Path>) -> anyhow::Result<()> {
    let settings = config::load(file, &args.model, &args.profile)?;
    let profile = config::profile(&settings)?;
    let shown = args.audit.display();
    let log = File::open(&args.audit).map_err(|error| UsageError(format!("{shown}: {error}")))?;
    let mut out = match &args.out {
        Some(path) => Some(BufWriter::new(File::create(path).with_context(|| path.display().to_string())?)),
        None => None,
    };
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let guard = Guard::new(open::model(&settings).await?, profile);
        let guard = &guard;
        let lines = (1_usize..).zip(BufReader::new(log).lines()).take(args.limit.unwrap_or(usize::MAX));
        let at_once = args.concurrency.map_or_else(|| open::at_once(&settings), NonZero::get);
        let mut judged = stream::iter(lines)
            .map(|(number, line)| async move {
                let line = line.map_err(|error| error.to_string());
                let recorded = line.and_then(|line| Recorded::read(&line, settings.images));
                match recorded {
                    Ok(recorded) => match recorded.again(guard).await {
                        Ok(outcome) => Ok((recorded, outcome)),
                        Err(error) => Err(format!("line {number}: {error}")),
                    },
                    Err(reason) => Err(format!("line {number}: {reason}")),
                }
            })
            .buffered(at_once.max(1));
        let mut counts: BTreeMap<(&str, &str), u64> = BTreeMap::new();
        let (mut failed, mut first_failure) = (0_u64, None);
        let mut changed = Vec::new();
        while let Some(judged) = judged.next().await {
            let (recorded, outcome) = match judged {
                Ok(judged) => judged,
                Err(reason) => {
                    failed += 1;
                    first_failure.get_or_insert(reason);
                    continue;
                }
            };
            *counts.entry((recorded.verdict.as_str(), outcome.verdict.as_str())).or_default() += 1;
            if recorded.verdict != outcome.verdict {
                changed.push(recorded.id.clone());
            }
            if let Some(out) = &mut out {
                let line = json!({
                    "request_id": recorded.id, "model": recorded.model, "recorded": {"profile": recorded.profile, "verdict": recorded.verdict},
                    "now": {"profile": outcome.profile, "verdict": outcome.verdict, "score": outcome.score, "rewritten": outcome.rewritten},
                });
                writeln!(out, "{line}")?;
            }
        }
        if let Some(out) = &mut out {
            out.flush()?;
        }
        let total: u64 = counts.values().sum();
        if args.json {
            let rows: Vec<_> =
                counts.iter().map(|((then, now), count)| json!({"recorded": then, "now": now, "count": count})).collect();
            println!("{}", json!({"profile": guard.profile().name, "judged": total, "failed": failed, "counts": rows, "changed": changed}));
        } else {
            println!("{total} answers judged again under {}; {} verdicts change", guard.profile().name, changed.len());
            for ((then, now), count) in &counts {
                println!("  recorded {then:<9} now {now:<9} {count}");
            }
            for id in &changed {
                println!("  changed: {id}");
            }
        }
        if let Some(reason) = first_failure {
            eprintln!("{failed} lines could not be judged; the first: {reason}");
            if total == 0 {
                return Err(UsageError(format!("{shown}: no line of it could be judged")).into());
            }
        }
        Ok(())
    })
}
