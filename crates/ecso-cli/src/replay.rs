//! `ecso replay`: judges recorded traffic again under another profile.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead, BufReader, BufWriter, Write},
    num::NonZero,
    path::Path,
};

use anyhow::Context;
use ecso::{Guard, GuardError, Outcome, Verdict};
use ecso_gateway::replay::Recorded;
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use tempfile::NamedTempFile;

use crate::{backend, cli::ReplayArgs, error::UsageError, files, profiles, settings};

/// Why a line could not be judged.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("line {0}: {1}")]
    Unreadable(usize, String),
    #[error("line {0}: {1}")]
    Model(usize, GuardError),
}

/// The file of `--out`, which appears once it is complete.
struct OutputFile<'a> {
    path: &'a Path,
    file: BufWriter<NamedTempFile>,
}

impl<'a> OutputFile<'a> {
    /// Creates a file for `path`, which must not be the audit log itself.
    fn new(path: &'a Path, audit: &Path) -> anyhow::Result<Self> {
        if same_file::is_same_file(path, audit).unwrap_or(false) {
            return Err(UsageError(format!(
                "--out {}: this is the audit log; name another file",
                path.display()
            ))
            .into());
        }
        let file = files::create_for(path)
            .map_err(|error| UsageError(format!("--out {}: {error}", path.display())))?;
        Ok(Self { path, file })
    }

    fn write(&mut self, line: &Value) -> std::io::Result<()> {
        writeln!(self.file, "{line}")
    }

    fn finish(self) -> anyhow::Result<()> {
        files::persist(self.file, self.path).with_context(|| self.path.display().to_string())
    }
}

/// Recorded verdicts compared with new ones.
#[derive(Debug, Default)]
struct Comparison<'a> {
    judge: &'a str,
    profile: &'a str,
    /// Number of answers by recorded and new verdict.
    counts: BTreeMap<(&'static str, &'static str), u64>,
    /// Requests whose verdict changes.
    changed: Vec<String>,
    /// Answers that the profile does not guard.
    unguarded: u64,
    failed: u64,
    /// Whether the user was warned that another model judges.
    has_warned: bool,
}

impl Comparison<'_> {
    /// Adds an answer that was judged again. Returns the line of `--out`, or none if the profile
    /// does not guard the answer.
    fn add(&mut self, recorded: &Recorded, outcome: &Outcome) -> Option<Value> {
        let Recorded { id, model, profile, verdict, .. } = recorded;
        if model != self.judge
            && !model.is_empty()
            && !std::mem::replace(&mut self.has_warned, true)
        {
            say!(
                "warning: the log is of the model {model}, and {} judges it; choose a model with \
                 --model and --model-name",
                self.judge
            );
        }
        if outcome.verdict == Verdict::Unchecked {
            self.unguarded += 1;
            return None;
        }
        *self.counts.entry((verdict.as_str(), outcome.verdict.as_str())).or_default() += 1;
        if *verdict != outcome.verdict {
            self.changed.push(id.clone());
        }
        Some(json!({
            "request_id": id,
            "model": model,
            "recorded": {"profile": profile, "verdict": verdict},
            "now": {
                "profile": outcome.profile,
                "verdict": outcome.verdict,
                "score": outcome.score,
                "rewritten": outcome.rewritten,
            },
        }))
    }

    fn total(&self) -> u64 {
        self.counts.values().sum()
    }

    fn print(&self) {
        let Self { judge, profile, counts, changed, unguarded, .. } = self;
        let total = self.total();
        if total + unguarded == 0 {
            return;
        }
        println!(
            "{total} answers judged again by {judge} under {profile}; {} verdicts change",
            changed.len()
        );
        for ((then, now), count) in counts {
            println!("  recorded {then:<9} now {now:<9} {count}");
        }
        for id in changed {
            println!("  changed: {id}");
        }
        if *unguarded > 0 {
            println!("  {unguarded} more are not guarded by this profile: they have no image");
        }
    }

    fn print_json(&self) {
        let row = |((then, now), count): (&(&str, &str), &u64)| {
            json!({
                "recorded": then,
                "now": now,
                "count": count,
            })
        };
        let object = json!({
            "profile": self.profile,
            "model": self.judge,
            "judged": self.total(),
            "failed": self.failed,
            "unguarded": self.unguarded,
            "counts": self.counts.iter().map(row).collect::<Vec<_>>(),
            "changed": self.changed,
        });
        println!("{object}");
    }
}

pub(crate) fn run(args: &ReplayArgs, file: Option<&Path>) -> anyhow::Result<()> {
    let settings = settings::load(file, &args.model, &args.profile)?;
    let profile = profiles::load(&settings)?;
    let log = File::open(&args.audit).map_err(|error| UsageError::at(&args.audit, error))?;
    if log.metadata().is_ok_and(|log| log.is_dir()) {
        let problem = "this is a folder; name the audit log in it";
        return Err(UsageError::at(&args.audit, problem).into());
    }
    let mut out = args.out.as_deref().map(|path| OutputFile::new(path, &args.audit)).transpose()?;
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let guard = Guard::new(backend::open(&settings).await?, profile);
        let guard = &guard;
        let mut judged = stream::iter(lines(log, args.limit))
            .map(|(number, line)| async move {
                let recorded = line
                    .map_err(|error| error.to_string())
                    .and_then(|line| Recorded::parse(&line, settings.images))
                    .map_err(|reason| Failure::Unreadable(number, reason))?;
                let outcome =
                    recorded.review(guard).await.map_err(|error| Failure::Model(number, error))?;
                Ok((recorded, outcome))
            })
            .buffered(args.concurrency.or(settings.default_concurrency()));
        let mut comparison = Comparison {
            judge: guard.model().name(),
            profile: &guard.profile().name,
            ..Comparison::default()
        };
        let mut first_failure = None;
        while let Some(judged) = judged.next().await {
            match judged {
                Ok((recorded, outcome)) => {
                    let line = comparison.add(&recorded, &outcome);
                    if let (Some(line), Some(out)) = (line, &mut out) {
                        out.write(&line)?;
                    }
                }
                Err(failure) => {
                    comparison.failed += 1;
                    first_failure.get_or_insert(failure);
                }
            }
        }
        if args.json {
            comparison.print_json();
        } else {
            comparison.print();
        }
        if comparison.total() > 0
            && let Some(out) = out
        {
            out.finish()?;
        }
        check_coverage(args, &comparison, first_failure)
    })
}

/// The lines of a log that are not blank, with their numbers from 1. Ends after a read error.
fn lines(
    log: File,
    limit: Option<NonZero<usize>>,
) -> impl Iterator<Item = (usize, std::io::Result<String>)> {
    let mut has_failed = false;
    let lines = BufReader::new(log)
        .lines()
        .take_while(move |line| !std::mem::replace(&mut has_failed, line.is_err()));
    (1..)
        .zip(lines)
        .filter(|(_, line)| !line.as_ref().is_ok_and(|line| line.trim().is_empty()))
        .take(limit.map_or(usize::MAX, NonZero::get))
}

/// Reports failed lines; an error if too few lines could be judged.
fn check_coverage(
    args: &ReplayArgs,
    comparison: &Comparison<'_>,
    first_failure: Option<Failure>,
) -> anyhow::Result<()> {
    let (total, failed) = (comparison.total(), comparison.failed);
    let Some(failure) = first_failure else {
        anyhow::ensure!(
            total > 0,
            "nothing to judge: {} has no line that this profile guards",
            args.audit.display()
        );
        return Ok(());
    };
    say!("{failed} lines could not be judged; the first: {failure}");
    match failure {
        #[expect(clippy::cast_precision_loss, reason = "counts of lines")]
        _ if total > 0 => {
            let coverage = total as f64 / (total + failed) as f64;
            let minimum = args.min_coverage;
            anyhow::ensure!(coverage >= minimum, "coverage {coverage:.3} is below {minimum}");
            Ok(())
        }
        Failure::Model(_, error) => Err(error.into()),
        Failure::Unreadable(..) => {
            Err(UsageError::at(&args.audit, "no line could be judged").into())
        }
    }
}
