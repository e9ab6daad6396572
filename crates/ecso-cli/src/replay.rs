//! `ecso replay`: what would another profile have done with recorded traffic?

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

use crate::{UsageError, cli::ReplayArgs, config, open};

/// Why a line could not be judged.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Unreadable(String),
    #[error("line {0}: {1}")]
    Model(usize, GuardError),
}

/// A file that is there when it is whole.
struct Out<'a> {
    path: &'a Path,
    file: BufWriter<NamedTempFile>,
}

impl<'a> Out<'a> {
    /// A file at `path`, which is not the `audit` log itself.
    fn new(path: &'a Path, audit: &Path) -> anyhow::Result<Self> {
        let wrong = |error: &dyn std::fmt::Display| {
            UsageError(format!("--out {}: {error}", path.display()))
        };
        if same_file::is_same_file(path, audit).unwrap_or(false) {
            return Err(wrong(&"that is the audit log; name another file").into());
        }
        let folder =
            path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let file = BufWriter::new(NamedTempFile::new_in(folder).map_err(|error| wrong(&error))?);
        Ok(Self { path, file })
    }

    fn write(&mut self, line: &Value) -> std::io::Result<()> {
        writeln!(self.file, "{line}")
    }

    fn done(self) -> anyhow::Result<()> {
        let file = self.file.into_inner().map_err(std::io::IntoInnerError::into_error)?;
        file.persist(self.path).with_context(|| self.path.display().to_string())?;
        Ok(())
    }
}

/// What was found.
#[derive(Debug, Default)]
struct Found<'a> {
    judge: &'a str,
    profile: &'a str,
    /// Answers by their recorded verdict and their verdict now.
    counts: BTreeMap<(&'static str, &'static str), u64>,
    /// Requests whose verdict is another one.
    changed: Vec<String>,
    /// Answers that the profile does not guard.
    unguarded: u64,
    failed: u64,
    /// Whether it was told that another model judges.
    is_told: bool,
}

impl Found<'_> {
    /// Adds an answer that was judged again, and gives what is to be written about it: nothing of
    /// one that is not guarded.
    fn add(&mut self, recorded: &Recorded, outcome: &Outcome) -> Option<Value> {
        let Recorded { id, model, profile, verdict, .. } = recorded;
        if model != self.judge && !model.is_empty() && !std::mem::replace(&mut self.is_told, true) {
            let judge = self.judge;
            say!(
                "the log is of the model {model}, and {judge} judges it again; --model and --model-name say which one is asked"
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
        let now = json!({"profile": outcome.profile, "verdict": outcome.verdict, "score": outcome.score, "rewritten": outcome.rewritten});
        Some(
            json!({"request_id": id, "model": model, "recorded": {"profile": profile, "verdict": verdict}, "now": now}),
        )
    }

    fn total(&self) -> u64 {
        self.counts.values().sum()
    }

    fn tell(&self, as_json: bool) {
        let Self { judge, profile, counts, changed, unguarded, failed, .. } = self;
        let total = self.total();
        if as_json {
            let rows: Vec<_> = counts
                .iter()
                .map(|((then, now), count)| json!({"recorded": then, "now": now, "count": count}))
                .collect();
            println!(
                "{}",
                json!({"profile": profile, "model": judge, "judged": total, "failed": failed, "unguarded": unguarded, "counts": rows, "changed": changed})
            );
            return;
        }
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
            println!("  {unguarded} more are not guarded under this profile: they have no image");
        }
    }
}

pub(crate) fn run(args: &ReplayArgs, file: Option<&Path>) -> anyhow::Result<()> {
    let settings = config::load(file, &args.model, &args.profile)?;
    let profile = config::profile(&settings)?;
    let shown = args.audit.display();
    let log = File::open(&args.audit).map_err(|error| UsageError(format!("{shown}: {error}")))?;
    if log.metadata().is_ok_and(|log| log.is_dir()) {
        return Err(UsageError(format!("{shown} is a folder; name the audit log in it")).into());
    }
    let mut out = args.out.as_deref().map(|path| Out::new(path, &args.audit)).transpose()?;
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let guard = Guard::new(open::model(&settings).await?, profile);
        let guard = &guard;
        let mut is_broken = false;
        // Behind an error of the file there is nothing more to read.
        let read = BufReader::new(log)
            .lines()
            .take_while(move |line| !std::mem::replace(&mut is_broken, line.is_err()));
        let lines = (1_usize..)
            .zip(read)
            .filter(|(_, line)| !line.as_ref().is_ok_and(|line| line.trim().is_empty()));
        let lines = lines.take(args.limit.map_or(usize::MAX, NonZero::get));
        let at_once = args.concurrency.map_or_else(|| open::at_once(&settings), NonZero::get);
        let mut judged = stream::iter(lines)
            .map(|(number, line)| async move {
                let line = line.map_err(|error| error.to_string());
                let recorded = line.and_then(|line| Recorded::parse(&line, settings.images));
                let recorded = recorded
                    .map_err(|reason| Failure::Unreadable(format!("line {number}: {reason}")))?;
                let outcome =
                    recorded.review(guard).await.map_err(|error| Failure::Model(number, error))?;
                Ok((recorded, outcome))
            })
            .buffered(at_once.max(1));
        let mut found = Found {
            judge: guard.model().name(),
            profile: &guard.profile().name,
            ..Found::default()
        };
        let mut first_failure = None;
        while let Some(judged) = judged.next().await {
            match judged {
                Ok((recorded, outcome)) => {
                    if let Some(line) = found.add(&recorded, &outcome)
                        && let Some(out) = &mut out
                    {
                        out.write(&line)?;
                    }
                }
                Err(failure) => {
                    found.failed += 1;
                    first_failure.get_or_insert(failure);
                }
            }
        }
        found.tell(args.json);
        let Found { failed, .. } = found;
        let total = found.total();
        if total > 0
            && let Some(out) = out
        {
            out.done()?;
        }
        let Some(failure) = first_failure else {
            anyhow::ensure!(
                total > 0,
                "nothing was judged again: {shown} has no line that this profile guards"
            );
            return Ok(());
        };
        say!("{failed} lines could not be judged; the first: {failure}");
        match failure {
            #[expect(clippy::cast_precision_loss, reason = "counts of lines")]
            _ if total > 0 => {
                let coverage = total as f64 / (total + failed) as f64;
                let least = args.min_coverage;
                anyhow::ensure!(coverage >= least, "coverage {coverage:.3} is below {least}");
                Ok(())
            }
            Failure::Model(_, error) => Err(error.into()),
            Failure::Unreadable(_) => {
                Err(UsageError(format!("{shown}: no line of it could be judged")).into())
            }
        }
    })
}
