//! `ecso eval run`.

use std::{path::Path, sync::Arc, time::Instant};

use anyhow::Context;
use ecso::Mllm;
use ecso_eval::{
    benchmarks,
    cache::Cached,
    journal::{Choice, Header, Journal},
    run::{self, Options, Progress, Unusable},
};
use indicatif::{ProgressBar, ProgressStyle};

use super::args::RunArgs;
use crate::{UsageError, cli::ProfileArgs, config, open};

pub(super) fn run(args: &RunArgs, file: Option<&Path>) -> anyhow::Result<()> {
    let benchmark = benchmarks::named(&args.benchmark).ok_or_else(|| {
        let names: Vec<&str> = benchmarks::ALL.iter().map(|benchmark| benchmark.about().name).collect();
        UsageError(format!("no benchmark is called {}; there are {}", args.benchmark, names.join(", ")))
    })?;
    let about = benchmark.about();
    let variant = args.variant.clone().or_else(|| about.variants.first().map(|variant| (*variant).to_owned()));
    let data = match &args.data {
        Some(data) => data.clone(),
        None if about.source == "ecso" => "-".into(),
        None => {
            return Err(UsageError(format!(
                "{}: --data is missing: {} (from {})",
                about.name, about.layout, about.source
            ))
            .into());
        }
    };
    let wanted = if args.profile.is_empty() { vec!["paper".to_owned()] } else { args.profile.clone() };
    let mut settings = None;
    let mut profiles = Vec::new();
    for name in wanted {
        let choice = ProfileArgs { profile: Some(name), set: args.set.clone() };
        let loaded = config::load(file, &args.model, &choice)?;
        profiles.push(config::profile(&loaded)?);
        settings = Some(loaded);
    }
    let settings = settings.context("no profile")?;
    let mut names: Vec<&str> = profiles.iter().map(|profile| profile.name.as_str()).collect();
    names.sort_unstable();
    if names.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(UsageError("two profiles have the same name".into()).into());
    }
    let profiles = run::capped(profiles, args.max_new_tokens);
    // Before the model is loaded, and before there is a folder.
    let items = benchmark.items(&data, variant.as_deref()).map_err(|error| UsageError(error.to_string()))?;

    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let model = open::model(&settings).await?;
        let digest = open::identity(&settings)?;
        let header = Header {
            ecso: env!("CARGO_PKG_VERSION").into(),
            benchmark: about.name.into(),
            variant,
            data,
            model: model.name().to_owned(),
            model_digest: digest.clone(),
            profiles: profiles.iter().map(|profile| (profile.name.clone(), profile.to_toml())).collect(),
            max_new_tokens: args.max_new_tokens,
            choice: Choice {
                scenarios: scenarios(&args.scenario, about.scenarios),
                sample: args.sample,
                seed: args.seed,
                limit: args.limit,
            },
        };
        let mut journal = Journal::open(&args.out, &header)?;
        if journal.was_cut() {
            eprintln!("{}: its last line was cut off by a crash; that item is run again", args.out.display());
        }
        let model = Arc::new(Cached::new(model, digest, args.cache.clone()));
        let options = Options {
            concurrency: args.concurrency.unwrap_or(if open::is_server(&settings) { 8 } else { 1 }),
            retry_failed: args.retry_failed,
            skip_missing: args.skip_missing,
            limits: settings.images,
        };
        let bar = Bar::new(journal.len());
        let begun = Instant::now();
        let asked = Arc::clone(&model) as Arc<dyn Mllm>;
        let work =
            run::run(items, &header.choice, &profiles, asked, &mut journal, options, |progress| bar.show(progress));
        let unusable = tokio::select! {
            done = work => done?,
            _ = tokio::signal::ctrl_c() => {
                bar.end();
                anyhow::bail!("stopped; what is recorded stays, and the same command goes on from there");
            }
        };
        bar.end();
        let (work, wall) = (model.work(), begun.elapsed());
        eprintln!(
            "{} items recorded, {} failed; {} calls, {} from the cache; {:.1} s, the model was busy {:.1}% of it",
            journal.len(),
            journal.failed(),
            work.calls,
            work.replayed,
            wall.as_secs_f64(),
            100.0 * work.busy.as_secs_f64() / wall.as_secs_f64().max(1e-9)
        );
        told(args, &unusable);
        enough(args, &journal)?;
        eprintln!("next: ecso eval judge {}", args.out.display());
        Ok(())
    })
}

/// Tells what of the data could not be used.
fn told(args: &RunArgs, unusable: &Unusable) {
    let Unusable { missing, first_missing, unreadable, first_unreadable } = unusable;
    if let Some(first) = first_missing {
        let now = if args.skip_missing { "left out" } else { "recorded as failed; --skip-missing leaves such out" };
        eprintln!("{missing} items miss an image and are {now}; the first: {first}");
    }
    if let Some(first) = first_unreadable {
        eprintln!("{unreadable} items can't be read and are recorded as failed; the first: {first}");
    }
}

/// An error where too few items were answered for the run to be a success.
fn enough(args: &RunArgs, journal: &Journal) -> anyhow::Result<()> {
    let answered = journal.len() - journal.failed();
    anyhow::ensure!(answered > 0, "no item was answered; the journal says why: {}", args.out.display());
    #[expect(clippy::cast_precision_loss, reason = "counts of items")]
    let coverage = answered as f64 / journal.len() as f64;
    anyhow::ensure!(
        coverage >= args.min_coverage,
        "coverage {coverage:.3} is below {}; --retry-failed tries the failed items again",
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

/// Progress with rate and time left: a bar on a terminal, a line now and then elsewhere.
struct Bar {
    drawn: ProgressBar,
    at_start: usize,
    begun: Instant,
    last_line: std::cell::Cell<Instant>,
}

impl Bar {
    fn new(at_start: usize) -> Self {
        let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} items, {per_sec}, {eta} left {msg}");
        let bar = ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        let now = Instant::now();
        Self { drawn: bar, at_start, begun: now, last_line: now.into() }
    }

    fn show(&self, Progress { total, recorded, failed }: Progress) {
        self.drawn.set_length(total.unwrap_or(recorded) as u64);
        self.drawn.set_position(recorded as u64);
        if failed > 0 {
            self.drawn.set_message(format!("({failed} failed)"));
        }
        if self.drawn.is_hidden() && self.last_line.get().elapsed().as_secs() >= 30 {
            self.last_line.set(Instant::now());
            #[expect(clippy::cast_precision_loss, reason = "counts of items")]
            let rate = (recorded - self.at_start) as f64 / self.begun.elapsed().as_secs_f64() * 60.0;
            let total = total.map_or_else(String::new, |total| format!(" of {total}"));
            eprintln!("{recorded}{total} items, {failed} failed, {rate:.1} a minute");
        }
    }

    fn end(&self) {
        self.drawn.finish_and_clear();
    }
}
