//! `ecso eval run`.

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

use super::args::RunArgs;
use crate::{
    UsageError,
    cli::ProfileArgs,
    config::{self, Settings},
    open,
    progress::{Bar, Unit},
    work::Worker,
};

/// What is run, as the command says.
struct Wanted {
    benchmark: &'static dyn Benchmark,
    about: About,
    variant: Option<String>,
    data: PathBuf,
    choice: Selection,
}

impl Wanted {
    fn of(args: &RunArgs) -> anyhow::Result<Self> {
        let benchmark = benchmarks::named(&args.benchmark).ok_or_else(|| {
            let names: Vec<&str> =
                benchmarks::ALL.iter().map(|benchmark| benchmark.about().name).collect();
            UsageError(format!(
                "no benchmark is called {}; there are {}",
                args.benchmark,
                names.join(", ")
            ))
        })?;
        let about = benchmark.about();
        if let Some(variant) =
            args.variant.as_deref().filter(|variant| !about.variants.contains(variant))
        {
            let known = if about.variants.is_empty() {
                "none".to_owned()
            } else {
                about.variants.join(", ")
            };
            return Err(UsageError(format!(
                "--variant {variant}: of {} there are {known}",
                about.name
            ))
            .into());
        }
        let variant = args
            .variant
            .clone()
            .or_else(|| about.variants.first().map(|variant| (*variant).to_owned()));
        let data = match &args.data {
            Some(data) => data.clone(),
            None if about.source == "ecso" => "-".into(),
            None => {
                let told = format!(
                    "{}: --data is missing: {} (from {})",
                    about.name, about.layout, about.source
                );
                return Err(UsageError(told).into());
            }
        };
        let choice = Selection {
            scenarios: scenarios(&args.scenario, about.scenarios),
            sample: args.sample.map(NonZero::get),
            seed: args.seed,
            limit: args.limit.map(NonZero::get),
        };
        let wanted = Self { benchmark, about, variant, data, choice };
        if !args.scenario.is_empty() {
            run::check_scenarios(wanted.all()?, &wanted.choice.scenarios)
                .map_err(|cause| UsageError(format!("--scenario: {cause}")))?;
        }
        Ok(wanted)
    }

    fn all(&self) -> anyhow::Result<Items> {
        let items = self.benchmark.items(&self.data, self.variant.as_deref());
        Ok(items.map_err(|error| UsageError(error.to_string()))?)
    }

    /// The items, read anew.
    fn items(&self) -> anyhow::Result<Items> {
        Ok(run::select(self.all()?, &self.choice))
    }
}

pub(super) fn run(args: &RunArgs, file: Option<&Path>) -> anyhow::Result<()> {
    // Before the model is loaded, and before there is a folder.
    let wanted = Wanted::of(args)?;
    let (settings, profiles) = profiles(args, file)?;
    let items = wanted.items()?;
    anyhow::ensure!(
        items.total != Some(0),
        UsageError("no item is chosen; --scenario all takes all".into())
    );

    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let at_once = args.concurrency.map_or_else(|| open::at_once(&settings), NonZero::get);
        let worker = Worker::open(&settings, at_once, args.cache.clone()).await?;
        let model = worker.model();
        let header = RunHeader {
            ecso: env!("CARGO_PKG_VERSION").into(),
            benchmark: wanted.about.name.into(),
            variant: wanted.variant.clone(),
            data: wanted.data.canonicalize().unwrap_or_else(|_| wanted.data.clone()),
            model: model.name().to_owned(),
            model_digest: worker.digest.clone(),
            server: worker.server.clone(),
            profiles: profiles.iter().map(|profile| (profile.name.clone(), profile.to_toml())).collect(),
            max_new_tokens: args.max_new_tokens.map(NonZero::get),
            choice: wanted.choice.clone(),
            items: items.total,
        };
        let mut journal = Journal::open(&args.out, &header)?;
        if journal.was_truncated() {
            say!("{}: its last line was cut off by a crash; that item is run again", args.out.display());
        }
        if !journal.is_empty() {
            let missing = run::count_removed(wanted.items()?, &args.out, &mut journal)?;
            let out = args.out.display();
            let told = format!("{missing} items of {out} are no longer in the data; name another --out, or delete it");
            anyhow::ensure!(missing == 0, UsageError(told));
        }
        let options = Options {
            bounds: Bounds {
                bytes: args.image_mb.saturating_mul(1 << 20),
                retry_failed: args.retry_failed,
                ..Bounds::at_once(at_once)
            },
            skip_missing: args.skip_missing,
            limits: settings.images,
        };
        let bar = Bar::new(Unit::Of("items"), false);
        let begun = Instant::now();
        let show = |Progress { total, recorded, failed }| {
            let note = if failed > 0 { format!("{failed} failed") } else { String::new() };
            bar.show(recorded as u64, total.map(|total| total as u64), &note);
        };
        let run = run::run(items, &profiles, model, &mut journal, options, show);
        let unusable = worker.done(run).await??;
        drop(bar);
        let (work, wall) = (worker.work(), begun.elapsed());
        say!(
            "{} items recorded, {} failed; {} calls, {} from the cache; {:.1} s, the model was busy {:.1}% of it",
            journal.len(),
            journal.failed(),
            work.calls,
            work.replayed,
            wall.as_secs_f64(),
            100.0 * work.busy.as_secs_f64() / wall.as_secs_f64().max(1e-9)
        );
        told(args, &unusable);
        if let Some(unguarded) = run::unguarded_notice(&args.out)? {
            say!("{unguarded}");
        }
        is_unchanged(wanted.items()?, &header, &journal, args.skip_missing)?;
        // Items that were left out count too.
        enough(args, &journal, header.items.unwrap_or(journal.len()))?;
        say!("next: ecso eval judge {}{}", args.out.display(), open::flags(&settings));
        Ok(())
    })
}

/// The profiles that are run, and the settings of the model.
fn profiles(args: &RunArgs, file: Option<&Path>) -> anyhow::Result<(Settings, Vec<Profile>)> {
    let wanted =
        if args.profile.is_empty() { vec!["paper".to_owned()] } else { args.profile.clone() };
    let mut settings = None;
    let mut profiles = Vec::new();
    for name in wanted {
        let choice = ProfileArgs { profile: Some(name), set: args.set.clone() };
        let loaded = config::load(file, &args.model, &choice)?;
        profiles.push(config::profile(&loaded)?);
        config::tell_fit(&loaded)?;
        settings = Some(loaded);
    }
    let mut names: Vec<&str> = [UNGUARDED]
        .into_iter()
        .chain(profiles.iter().map(|profile| profile.name.as_str()))
        .collect();
    names.sort_unstable();
    let twice = names.windows(2).find(|pair| pair[0] == pair[1]).and_then(|pair| pair.first());
    if let Some(name) = twice {
        return Err(UsageError(format!(
            "two arms would be called {name:?}; give the profile another name"
        ))
        .into());
    }
    Ok((
        settings.context("no profile")?,
        run::capped(profiles, args.max_new_tokens.map(NonZero::get)),
    ))
}

/// Tells what of the data could not be used.
fn told(args: &RunArgs, unusable: &UnusableItems) {
    let UnusableItems { missing, first_missing, unreadable, first_unreadable } = unusable;
    if let Some(first) = first_missing {
        let now = if args.skip_missing {
            "left out"
        } else {
            "recorded as failed; --skip-missing leaves such out"
        };
        say!("{missing} items miss an image and are {now}; the first: {first}");
    }
    if let Some(first) = first_unreadable {
        say!("{unreadable} items can't be read and are recorded as failed; the first: {first}");
    }
}

/// Holds that the data is what was run: as many items as at first, and none that is recorded
/// otherwise than it is now.
fn is_unchanged(
    items: Items,
    header: &RunHeader,
    journal: &Journal,
    skip_missing: bool,
) -> anyhow::Result<()> {
    let total = items.total;
    let changed = run::count_changed(items, journal, skip_missing);
    let what = match total == header.items {
        false => "it has another number of items now".to_owned(),
        true if changed > 0 => format!("{changed} items of it are not recorded as they are now"),
        true => return Ok(()),
    };
    anyhow::bail!(
        "the data changed while it was read: {what}; put it back and give the same command again, or run it as it is now into another \
         --out"
    );
}

/// Tells of items that failed; an error where too few of `all` were answered for the run to be a
/// success.
fn enough(args: &RunArgs, journal: &Journal, all: usize) -> anyhow::Result<()> {
    if journal.failed() > 0 {
        say!(
            "{} items failed; the same command with --retry-failed tries them again",
            journal.failed()
        );
    }
    let answered = journal.len() - journal.failed();
    anyhow::ensure!(
        answered > 0,
        "no item was answered; the journal says why: {}",
        args.out.display()
    );
    #[expect(clippy::cast_precision_loss, reason = "counts of items")]
    let coverage = answered as f64 / all as f64;
    anyhow::ensure!(
        coverage >= args.min_coverage,
        "coverage {coverage:.3} is below {}: {answered} of {all} items were answered; --retry-failed tries those that failed \
         again",
        args.min_coverage
    );
    Ok(())
}

/// The scenarios that are run: those named, else the benchmark's own choice.
fn scenarios(named: &[String], default: &[&str]) -> Vec<String> {
    match named {
        [] => default.iter().map(|scenario| (*scenario).to_owned()).collect(),
        [all] if all == "all" => Vec::new(),
        some => some.to_vec(),
    }
}
