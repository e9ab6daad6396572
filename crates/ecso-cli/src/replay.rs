//! `ecso replay`: what would another profile have done with recorded traffic?

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead, BufReader, BufWriter, Write},
    num::NonZero,
    path::{Path, PathBuf},
};

use ecso::{Guard, GuardError};
use ecso_gateway::replay::Recorded;
use futures::{StreamExt, stream};
use serde_json::json;

use crate::{UsageError, cli::ReplayArgs, config, open};

/// Why a line could not be judged.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Unreadable(String),
    #[error("line {0}: {1}")]
    Model(usize, GuardError),
}

pub(crate) fn run(args: &ReplayArgs, file: Option<&Path>) -> anyhow::Result<()> {
    let settings = config::load(file, &args.model, &args.profile)?;
    let profile = config::profile(&settings)?;
    let shown = args.audit.display();
    let log = File::open(&args.audit).map_err(|error| UsageError(format!("{shown}: {error}")))?;
    let create =
        |path: &PathBuf| File::create(path).map_err(|error| UsageError(format!("--out {}: {error}", path.display())));
    let mut out = args.out.as_ref().map(create).transpose()?.map(BufWriter::new);
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
                let recorded = recorded.map_err(|reason| Failure::Unreadable(format!("line {number}: {reason}")))?;
                let outcome = recorded.again(guard).await.map_err(|error| Failure::Model(number, error))?;
                Ok((recorded, outcome))
            })
            .buffered(at_once.max(1));
        let mut counts: BTreeMap<(&str, &str), u64> = BTreeMap::new();
        let (mut failed, mut first_failure) = (0_u64, None::<Failure>);
        let mut changed = Vec::new();
        while let Some(judged) = judged.next().await {
            let (recorded, outcome) = match judged {
                Ok(judged) => judged,
                Err(failure) => {
                    failed += 1;
                    first_failure.get_or_insert(failure);
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
        let Some(failure) = first_failure else { return Ok(()) };
        eprintln!("{failed} lines could not be judged; the first: {failure}");
        match failure {
            #[expect(clippy::cast_precision_loss, reason = "counts of lines")]
            _ if total > 0 => {
                let coverage = total as f64 / (total + failed) as f64;
                let least = args.min_coverage;
                anyhow::ensure!(coverage >= least, "coverage {coverage:.3} is below {least}");
                Ok(())
            }
            Failure::Model(_, error) => Err(error.into()),
            Failure::Unreadable(_) => Err(UsageError(format!("{shown}: no line of it could be judged")).into()),
        }
    })
}
