//! `ecso eval run`: answers the items of a benchmark.

use std::{
    num::NonZero,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::Context;
use ecso::Profile;
use ecso_batch::{Bounds, journal::Journal};
use ecso_eval::{
    benchmarks::{self, About, Benchmark, Items},
    record::{RunHeader, Selection},
    run::{self, Options, Progress, UNGUARDED, UnusableItems},
};

use crate::{
    backend,
    cli::{ProfileArgs, RunArgs},
    error::UsageError,
    profiles,
    progress::{ProgressLine, Unit},
    settings::{self, Settings},
    worker::Worker,
};

/// A benchmark and which of its items to run.
struct BenchmarkSelection {
    benchmark: &'static dyn Benchmark,
    about: About,
    variant: Option<String>,
    data: PathBuf,
    choice: Selection,
}

impl BenchmarkSelection {
    fn new(args: &RunArgs) -> anyhow::Result<Self> {
        let benchmark = benchmarks::named(&args.benchmark).ok_or_else(|| {
            let names: Vec<&str> =
                benchmarks::ALL.iter().map(|benchmark| benchmark.about().name).collect();
            UsageError(format!(
                "unknown benchmark {}; choose one of {}",
                args.benchmark,
                names.join(", ")
            ))
        })?;
        let about = benchmark.about();
        let variant = variant(args, &about)?;
        let data = match &args.data {
            Some(data) => data.clone(),
            None if about.source == "ecso" => "-".into(),
            None => {
                let (name, layout, source) = (about.name, about.layout, about.source);
                let message = format!("{name}: --data is missing: {layout} (from {source})");
                return Err(UsageError(message).into());
            }
        };
        let choice = Selection {
            scenarios: scenarios(&args.scenario, about.scenarios),
            sample: args.sample.map(NonZero::get),
            seed: args.seed,
            limit: args.limit.map(NonZero::get),
        };
        let selection = Self { benchmark, about, variant, data, choice };
        if !args.scenario.is_empty() {
            run::check_scenarios(selection.all_items()?, &selection.choice.scenarios)
                .map_err(|cause| UsageError(format!("--scenario: {cause}")))?;
        }
        Ok(selection)
    }

    fn all_items(&self) -> anyhow::Result<Items> {
        let items = self.benchmark.items(&self.data, self.variant.as_deref());
        Ok(items.map_err(|error| UsageError(error.to_string()))?)
    }

    /// The selected items, read anew.
    fn items(&self) -> anyhow::Result<Items> {
        Ok(run::select(self.all_items()?, &self.choice))
    }
}

/// The variant to run: the one named, or else the benchmark's first.
fn variant(args: &RunArgs, about: &About) -> Result<Option<String>, UsageError> {
    match &args.variant {
        Some(variant) if about.variants.contains(&variant.as_str()) => Ok(Some(variant.clone())),
        Some(variant) => {
            let known = if about.variants.is_empty() {
                format!("{} has no variants", about.name)
            } else {
                format!("{} has the variants {}", about.name, about.variants.join(", "))
            };
            Err(UsageError(format!("--variant {variant}: {known}")))
        }
        None => Ok(about.variants.first().map(|variant| (*variant).to_owned())),
    }
}

/// The scenarios to run: those named, or else the benchmark's default.
fn scenarios(named: &[String], default: &[&str]) -> Vec<String> {
    match named {
        [] => default.iter().map(|scenario| (*scenario).to_owned()).collect(),
        [all] if all == "all" => Vec::new(),
        some => some.to_vec(),
    }
}

pub(super) fn run(args: &RunArgs, file: Option<&Path>) -> anyhow::Result<()> {
    // Checked before the model is loaded and the folder is created.
    let selection = BenchmarkSelection::new(args)?;
    let (settings, profiles) = load_profiles(args, file)?;
    let items = selection.items()?;
    anyhow::ensure!(
        items.total != Some(0),
        UsageError("no item is selected; use --scenario all to select all".into())
    );

    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let concurrency = args.batch.concurrency.or(settings.default_concurrency());
        let worker = Worker::open(&settings, concurrency, args.batch.cache.cache.clone()).await?;
        let model = worker.model();
        let header = RunHeader {
            ecso: env!("CARGO_PKG_VERSION").into(),
            benchmark: selection.about.name.into(),
            variant: selection.variant.clone(),
            data: selection.data.canonicalize().unwrap_or_else(|_| selection.data.clone()),
            model: model.name().to_owned(),
            model_digest: worker.digest.clone(),
            server: worker.server.clone(),
            profiles: profiles
                .iter()
                .map(|profile| (profile.name.clone(), profile.to_toml()))
                .collect(),
            max_new_tokens: args.batch.max_new_tokens(),
            choice: selection.choice.clone(),
            items: items.total,
        };
        let mut journal = open_journal(args, &header, &selection)?;
        let options = Options {
            bounds: Bounds {
                bytes: args.batch.image_bytes(),
                retry_failed: args.batch.retry_failed,
                ..Bounds::at_once(concurrency)
            },
            skip_missing: args.skip_missing,
            limits: settings.images,
        };
        let progress = ProgressLine::new(Unit::Items("items"), false);
        let start = Instant::now();
        let show = |Progress { total, recorded, failed }| {
            let note = if failed > 0 { format!("{failed} failed") } else { String::new() };
            progress.show(recorded as u64, total.map(|total| total as u64), &note);
        };
        let run = run::run(items, &profiles, model, &mut journal, options, show);
        let unusable = worker.run_interruptible(run).await??;
        drop(progress);
        print_summary(&journal, &worker, start);
        warn_about_unusable(args, &unusable);
        if let Some(warning) = run::unguarded_notice(&args.out)? {
            say!("{warning}");
        }
        check_unchanged(selection.items()?, &header, &journal, args.skip_missing)?;
        // Items that were left out count as not answered.
        check_coverage(args, &journal, header.items.unwrap_or(journal.len()))?;
        say!("next: ecso eval judge {}{}", args.out.display(), backend::flags(&settings));
        Ok(())
    })
}

/// Opens the journal; one that exists must be of the same items.
fn open_journal(
    args: &RunArgs,
    header: &RunHeader,
    selection: &BenchmarkSelection,
) -> anyhow::Result<Journal> {
    let out = args.out.display();
    let mut journal = Journal::open(&args.out, header)?;
    if journal.was_truncated() {
        say!("{out}: a crash cut off the last line; that item is run again");
    }
    if !journal.is_empty() {
        let missing = run::count_removed(selection.items()?, &args.out, &mut journal)?;
        let message = format!(
            "{missing} items of {out} are no longer in the data; name another --out, or delete it"
        );
        anyhow::ensure!(missing == 0, UsageError(message));
    }
    Ok(journal)
}

/// The profiles to run, and the settings of the model.
fn load_profiles(args: &RunArgs, file: Option<&Path>) -> anyhow::Result<(Settings, Vec<Profile>)> {
    let names =
        if args.profile.is_empty() { vec!["hardened".to_owned()] } else { args.profile.clone() };
    let mut settings = None;
    let mut profiles = Vec::new();
    for name in names {
        let choice = ProfileArgs { profile: Some(name), set: args.set.clone() };
        let loaded = settings::load(file, &args.model, &choice)?;
        profiles.push(profiles::load(&loaded)?);
        profiles::report_fit(&loaded)?;
        settings = Some(loaded);
    }
    let mut arms: Vec<&str> = [UNGUARDED]
        .into_iter()
        .chain(profiles.iter().map(|profile| profile.name.as_str()))
        .collect();
    arms.sort_unstable();
    if let Some([name, _]) = arms.array_windows().find(|[a, b]| a == b) {
        return Err(UsageError(format!(
            "two arms would be named {name:?}; rename one of the profiles"
        ))
        .into());
    }
    let profiles = run::capped(profiles, args.batch.max_new_tokens());
    Ok((settings.context("no profile")?, profiles))
}

fn print_summary(journal: &Journal, worker: &Worker, start: Instant) {
    let (work, wall) = (worker.work(), start.elapsed().as_secs_f64());
    say!(
        "{} items recorded, {} failed; {} calls, {} from the cache; {wall:.1} s, the model was \
         busy {:.1}% of the time",
        journal.len(),
        journal.failed(),
        work.calls,
        work.replayed,
        100.0 * work.busy.as_secs_f64() / wall.max(1e-9)
    );
}

/// Warns about items that can't be used.
fn warn_about_unusable(args: &RunArgs, unusable: &UnusableItems) {
    let UnusableItems { missing, first_missing, unreadable, first_unreadable } = unusable;
    if let Some(first) = first_missing {
        let consequence = if args.skip_missing {
            "are left out"
        } else {
            "are recorded as failed (--skip-missing leaves them out)"
        };
        say!("{missing} items lack an image and {consequence}; the first: {first}");
    }
    if let Some(first) = first_unreadable {
        say!("{unreadable} items are unreadable and are recorded as failed; the first: {first}");
    }
}

/// Checks that the data did not change during the run: the number of items is the same, and all
/// are recorded as they are now.
fn check_unchanged(
    items: Items,
    header: &RunHeader,
    journal: &Journal,
    skip_missing: bool,
) -> anyhow::Result<()> {
    let total = items.total;
    let changed = run::count_changed(items, journal, skip_missing);
    let problem = if total != header.items {
        "the number of items is different now".to_owned()
    } else if changed > 0 {
        format!("{changed} items are not recorded as they are now")
    } else {
        return Ok(());
    };
    anyhow::bail!(
        "the data changed during the run: {problem}; restore the data and run the same command \
         again, or run the changed data with another --out"
    );
}

/// Reports failed items; an error if too few of `total` items were answered.
fn check_coverage(args: &RunArgs, journal: &Journal, total: usize) -> anyhow::Result<()> {
    let failed = journal.failed();
    if failed > 0 {
        say!("{failed} items failed; run the same command with --retry-failed to retry them");
    }
    let answered = journal.len() - failed;
    anyhow::ensure!(
        answered > 0,
        "no item was answered; the journal in {} has the reasons",
        args.out.display()
    );
    #[expect(clippy::cast_precision_loss, reason = "counts of items")]
    let coverage = answered as f64 / total as f64;
    let minimum = args.batch.min_coverage;
    anyhow::ensure!(
        coverage >= minimum,
        "coverage {coverage:.3} is below {minimum}: {answered} of {total} items were answered; \
         --retry-failed retries those that failed"
    );
    Ok(())
}
