//! `ecso synth`: the data engine.

use std::{
    fmt::Write as _,
    io::Write as _,
    num::NonZero,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use anyhow::Context;
use ecso_batch::Bounds;
use ecso_data::{
    dedupe::Marker,
    input::{Input, Mapping},
    make::{Filters, Maker},
    manifest::{Manifest, Packing},
    pack,
    record::{RunHeader, Shard},
    run::{self, Ended, Making, Progress},
};
use ecso_openai::Fetcher;
use tokio::runtime::Handle;

use crate::{
    UsageError,
    cli::SynthArgs,
    config, open,
    progress::{Bar, Unit},
    work::{Worker, heard_in_time},
};

pub(crate) fn run(args: &SynthArgs, file: Option<&Path>) -> anyhow::Result<()> {
    let settings = config::load(file, &args.model, &args.profile)?;
    let mut profile = config::profile(&settings)?;
    config::tell_fit(&settings)?;
    if let Some(most) = args.max_new_tokens {
        profile = ecso_eval::run::capped(vec![profile], Some(most.get())).remove(0);
    }
    let input = Input {
        path: input_path(args)?,
        mapping: mapping(&args.map)?,
        query: args.query.clone(),
        image_root: args.image_root.clone(),
    };
    let shard = shard(&args.shard)?;
    let (utility, validation) = (args.utility, args.validation);
    if !(utility.is_finite() && utility >= 0.0 && (0.0..1.0).contains(&validation)) {
        return Err(UsageError(
            "--utility is 0 or more, --validation at least 0 and below 1".into(),
        )
        .into());
    }
    let packing = Packing {
        utility,
        validation,
        seed: args.seed,
        shard_bytes: args.shard_mb.saturating_mul(1 << 20),
        licence: args.license.clone(),
        limits: settings.images,
    };
    if input.reads_from(&args.out).with_context(|| args.out.display().to_string())? {
        let out = args.out.display();
        return Err(UsageError(format!(
            "--out {out} lies where the input is read from; name a folder beside it"
        ))
        .into());
    }
    if pack::is_taken(&args.out).with_context(|| args.out.display().to_string())? {
        let place = args.out.join("dataset");
        return Err(UsageError(format!(
            "{} is there and was not made by ecso synth, which puts its dataset in that place; name another --out",
            place.display()
        ))
        .into());
    }
    // What is wrong with the input as a whole is said before a model is loaded.
    drop(input.rows().map_err(UsageError::of)?);
    let unread = input.unread().map_err(UsageError::of)?;
    if !unread.is_empty() {
        say!("{}: not read: {unread}", input.path.display());
    }

    let runtime = tokio::runtime::Runtime::new()?;
    let made = runtime.block_on(async {
        let at_once = args.concurrency.map_or_else(|| open::at_once(&settings), NonZero::get);
        let worker = Worker::open(&settings, at_once, args.cache.clone()).await?;
        let model = worker.model();
        let header = RunHeader {
            ecso: env!("CARGO_PKG_VERSION").into(),
            input: input.path.clone(),
            mapping: input.mapping.clone(),
            query: input.query.clone(),
            image_root: input.image_root.clone(),
            model: model.name().to_owned(),
            model_digest: worker.digest.clone(),
            server: worker.server.clone(),
            profile: (profile.name.clone(), profile.to_toml()),
            filters: Filters { no_refusals: args.no_refusals },
            near_duplicates: args.near_duplicates,
            shard,
        };
        let making = Arc::new(Making {
            maker: Maker::new(&model, profile, header.filters),
            fetcher: Fetcher::new()?,
            limits: settings.images,
            out: args.out.clone(),
            marker: args.near_duplicates.then(Marker::default),
        });
        let bounds = Bounds {
            bytes: args.image_mb.saturating_mul(1 << 20),
            tokens: args.max_tokens,
            time: args.max_time.map(Into::into),
            retry_failed: args.retry_failed,
            ..Bounds::at_once(at_once)
        };
        let (input, quiet) = (input.clone(), args.quiet);
        heard_in_time(move || {
            let ended = make(&input, &header, &making, bounds, quiet, &worker)?;
            let manifest = pack::pack(&making.out, &input, &packing)?;
            anyhow::Ok((ended, manifest))
        })
        .await
    });
    // What still waits for a file is left behind.
    runtime.shutdown_background();
    // The journal is held until the end: no other process packs at the same time.
    let (ended, manifest) = made?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&manifest)?);
    } else {
        print!("{}", told(&manifest, &args.out.join("dataset")));
    }
    if !ended.whole {
        say!("the budget is spent; the same command with a larger one goes on from here");
    }
    enough(args, &input, &manifest, ended.whole)
}

/// Makes all rows, and tells what it took.
fn make(
    input: &Input,
    header: &RunHeader,
    making: &Arc<Making>,
    bounds: Bounds,
    quiet: bool,
    worker: &Worker,
) -> anyhow::Result<Ended> {
    let total = (header.shard == Shard::ALL).then(|| input.count()).flatten();
    let bar = Bar::new(Unit::Of("rows"), quiet);
    let begun = Instant::now();
    let show = |progress: &Progress| bar.show(progress.recorded as u64, total, &counts(progress));
    let ended = Handle::current()
        .block_on(worker.done(run::run(input, header, making, bounds, show)))??;
    drop(bar);
    let (work, wall) = (worker.work(), begun.elapsed().as_secs_f64());
    if quiet {
        return Ok(ended);
    }
    say!(
        "{} calls in {wall:.1} s, {} from the cache; the model was busy {:.1}% of it",
        work.calls,
        work.replayed,
        100.0 * work.busy.as_secs_f64() / wall.max(1e-9)
    );
    Ok(ended)
}

/// Tells of a dataset without samples; an error where too few rows were made for the run to be a
/// success, or where rows of the input are missing though the run is `whole`.
fn enough(args: &SynthArgs, input: &Input, manifest: &Manifest, whole: bool) -> anyhow::Result<()> {
    let failures = args.out.join("dataset").join("failed.jsonl");
    let input = input.path.display();
    match manifest.unseen {
        Some(unseen) if whole && unseen > 0 => anyhow::bail!(
            "{input} changed while its rows were made: {unseen} rows that it has now were never looked at; the same command makes them"
        ),
        _ if manifest.rows > manifest.failed => {}
        _ if manifest.failed > 0 => {
            anyhow::bail!("no row could be made; {} says why", failures.display())
        }
        Some(0) => anyhow::bail!(UsageError(format!("{input}: there is no row in it"))),
        Some(unseen) => {
            anyhow::bail!("no row was made: the budget was spent before the first of {unseen}")
        }
        None => {
            anyhow::bail!("no row was made: none is in this part, or the budget was spent before")
        }
    }
    anyhow::ensure!(
        manifest.cut_short == 0,
        "{input} ends before its end, and how many rows are lost nobody knows; {} says where",
        failures.display()
    );
    if manifest.samples.is_empty() {
        say!(
            "the dataset is empty: no row was kept for safety, and utility samples are taken in proportion to these"
        );
    }
    if manifest.packing.validation > 0.0
        && !manifest.samples.is_empty()
        && !manifest.samples.contains_key("validation")
    {
        say!(
            "no sample is for validation: no image was drawn for it at {}; --validation takes another share",
            manifest.packing.validation
        );
    }
    #[expect(clippy::cast_precision_loss, reason = "counts of rows")]
    let coverage = (manifest.rows - manifest.failed) as f64 / manifest.rows as f64;
    anyhow::ensure!(
        coverage >= args.min_coverage,
        "coverage {coverage:.3} is below {}; --retry-failed tries the failed rows again",
        args.min_coverage
    );
    Ok(())
}

/// Standard input is kept beside the journal: a run that goes on, and the packing, read it again.
fn input_path(args: &SynthArgs) -> anyhow::Result<PathBuf> {
    if args.input != Path::new("-") {
        return Ok(args.input.clone());
    }
    let path = args.out.join("input.jsonl");
    std::fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let mut file = tempfile::NamedTempFile::new_in(&args.out)?;
    std::io::copy(&mut std::io::stdin().lock(), &mut file).context("standard input")?;
    file.flush()?;
    if !path.exists() {
        file.persist(&path).with_context(|| path.display().to_string())?;
    } else if digest(file.path())? != digest(&path)? {
        let kept = path.display();
        return Err(UsageError(format!(
            "standard input is not what this run was begun with; name another --out, or go on with the rows in {kept} by \
             --input {kept}"
        ))
        .into());
    }
    Ok(path)
}

fn digest(path: &Path) -> anyhow::Result<blake3::Hash> {
    let file = std::fs::File::open(path);
    let digest = file.and_then(|file| Ok(blake3::Hasher::new().update_reader(file)?.finalize()));
    digest.with_context(|| path.display().to_string())
}

fn mapping(pairs: &[String]) -> anyhow::Result<Mapping> {
    let split = |pair: &String| {
        let (what, column) = pair.split_once('=')?;
        Some((what.trim().to_owned(), column.trim().to_owned()))
    };
    let pairs: Option<Vec<(String, String)>> = pairs.iter().map(split).collect();
    let pairs =
        pairs.ok_or_else(|| UsageError("--map takes WHAT=COLUMN, as in query=question".into()))?;
    Ok(Mapping::new(pairs).map_err(|cause| UsageError(cause.to_string()))?)
}

/// `2/8` is the second of eight parts.
fn shard(text: &str) -> anyhow::Result<Shard> {
    let read = text
        .split_once('/')
        .and_then(|(part, of)| Some(Shard { part: part.parse().ok()?, of: of.parse().ok()? }));
    let read = read.filter(|shard| shard.part >= 1 && shard.part <= shard.of);
    Ok(read.ok_or_else(|| UsageError(format!("--shard {text}: write I/N, from 1/N to N/N")))?)
}

/// What the dataset holds, for people.
fn told(manifest: &Manifest, dataset: &Path) -> String {
    let mut text = String::new();
    let all =
        |kind: &str| manifest.samples.values().filter_map(|kinds| kinds.get(kind)).sum::<u64>();
    let dropped: u64 = manifest.dropped.values().sum();
    let _ = writeln!(
        text,
        "{} rows: {} kept for safety ({} bare refusals), {} safe ({} of them as utility samples), {dropped} left out, {} failed",
        manifest.rows,
        all("safety"),
        manifest.refusals,
        manifest.safe,
        all("utility"),
        manifest.failed
    );
    for (reason, count) in &manifest.dropped {
        let _ = writeln!(text, "  left out, {}: {count}", reason.word());
    }
    if let Some(unseen) = manifest.unseen.filter(|unseen| *unseen > 0) {
        let _ = writeln!(text, "  never looked at: {unseen}");
    }
    if manifest.gone > 0 {
        let _ = writeln!(
            text,
            "  recorded of rows that the input has no more: {}; not in the dataset, until the input has them again",
            manifest.gone
        );
    }
    if manifest.cut_short > 0 {
        let _ = writeln!(
            text,
            "  places where the input ends before its end, so that rows are missing: {}",
            manifest.cut_short
        );
    }
    if manifest.failed > 0 {
        let _ = writeln!(
            text,
            "  why rows failed: {}; try them again with --retry-failed",
            dataset.join("failed.jsonl").display()
        );
    }
    let _ = writeln!(text, "{}", dataset.join("README.md").display());
    text
}

fn counts(progress: &Progress) -> String {
    let mut text = format!("{} kept, {} safe", progress.kept, progress.safe);
    for (reason, count) in &progress.dropped {
        let _ = write!(text, ", {count} {}", reason.word());
    }
    if progress.failed > 0 {
        let _ = write!(text, ", {} failed", progress.failed);
    }
    let _ = write!(text, ", {} tokens", progress.tokens);
    text
}
