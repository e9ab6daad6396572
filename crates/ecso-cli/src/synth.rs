//! `ecso synth`: generates alignment data.

use std::{
    fmt::Write as _,
    fs,
    io::{BufRead, BufReader, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use anyhow::Context;
use ecso_batch::Bounds;
use ecso_data::{
    dedupe::PerceptualHasher,
    generate::{Filters, Generator},
    input::{Input, Mapping},
    manifest::{Manifest, Packing},
    pack,
    record::{RunHeader, Shard},
    run::{self, Progress, RunContext, RunEnd},
};
use ecso_openai::Fetcher;
use tokio::runtime::Handle;

use crate::{
    cli::{SynthArgs, megabytes},
    error::UsageError,
    profiles,
    progress::{ProgressLine, Unit},
    settings,
    worker::{Worker, spawn_abandonable},
};

pub(crate) fn run(args: &SynthArgs, file: Option<&Path>) -> anyhow::Result<()> {
    let settings = settings::load(file, &args.model, &args.profile)?;
    let mut profile = profiles::load(&settings)?;
    profiles::report_fit(&settings)?;
    if let Some(limit) = args.batch.max_new_tokens() {
        profile = ecso_eval::run::capped(vec![profile], Some(limit)).remove(0);
    }
    let input = Input {
        path: input_path(args)?,
        mapping: Mapping::new(args.map.clone()).map_err(|cause| UsageError(cause.to_string()))?,
        query: args.query.clone(),
        image_root: args.image_root.clone(),
    };
    let packing = Packing {
        utility: args.utility,
        validation: args.validation,
        seed: args.seed,
        shard_bytes: megabytes(args.shard_mb),
        licence: args.license.clone(),
        limits: settings.images,
    };
    check_folders(args, &input)?;
    // Reports problems with the whole input before a model is loaded.
    drop(input.rows().map_err(UsageError::from_error)?);
    let unread = input.unread().map_err(UsageError::from_error)?;
    if !unread.is_empty() {
        say!("{}: not read: {unread}", input.path.display());
    }

    let runtime = tokio::runtime::Runtime::new()?;
    let result = runtime.block_on(async {
        let concurrency = args.batch.concurrency.or(settings.default_concurrency());
        let worker = Worker::open(&settings, concurrency, args.batch.cache.cache.clone()).await?;
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
            shard: args.shard,
        };
        let context = Arc::new(RunContext {
            generator: Generator::new(&model, profile, header.filters),
            fetcher: Fetcher::new()?,
            limits: settings.images,
            out: args.out.clone(),
            hasher: args.near_duplicates.then(PerceptualHasher::default),
        });
        let bounds = Bounds {
            bytes: args.batch.image_bytes(),
            tokens: args.max_tokens,
            time: args.max_time.map(Into::into),
            retry_failed: args.batch.retry_failed,
            ..Bounds::at_once(concurrency)
        };
        let (input, quiet) = (input.clone(), args.output.quiet);
        spawn_abandonable(move || {
            let end = generate(&input, &header, &context, bounds, quiet, &worker)?;
            let manifest = pack::pack(&context.out, &input, &packing)?;
            anyhow::Ok((end, manifest))
        })
        .await
    });
    // Threads that still wait for a file are abandoned.
    runtime.shutdown_background();
    // The journal stays locked until the end, so that no other process packs at the same time.
    let (end, manifest) = result?;
    if args.output.json {
        println!("{}", serde_json::to_string_pretty(&manifest)?);
    } else {
        print!("{}", summary(&manifest, &args.out.join("dataset")));
    }
    if !end.complete {
        say!("the budget is spent; run the same command with a larger one to continue");
    }
    check_outcome(args, &input, &manifest, end.complete)
}

/// Checks that the output folder is neither part of the input nor used by something else.
fn check_folders(args: &SynthArgs, input: &Input) -> anyhow::Result<()> {
    let shown = || args.out.display().to_string();
    if input.reads_from(&args.out).with_context(shown)? {
        return Err(UsageError(format!(
            "--out {} is part of the input; name a folder outside of it",
            args.out.display()
        ))
        .into());
    }
    if pack::is_occupied(&args.out).with_context(shown)? {
        let problem = "this exists and was not created by `ecso synth`, which would put its \
                       dataset there; name another --out";
        return Err(UsageError::at(&args.out.join("dataset"), problem).into());
    }
    Ok(())
}

/// Processes all rows and reports what that took.
fn generate(
    input: &Input,
    header: &RunHeader,
    context: &Arc<RunContext>,
    bounds: Bounds,
    quiet: bool,
    worker: &Worker,
) -> anyhow::Result<RunEnd> {
    let total = (header.shard == Shard::ALL).then(|| input.count()).flatten();
    let line = ProgressLine::new(Unit::Items("rows"), quiet);
    let start = Instant::now();
    let show = |progress: &Progress| line.show(progress.recorded as u64, total, &counts(progress));
    let run = run::run(input, header, context, bounds, show);
    let end = Handle::current().block_on(worker.run_interruptible(run))??;
    drop(line);
    let (work, wall) = (worker.work(), start.elapsed().as_secs_f64());
    if quiet {
        return Ok(end);
    }
    say!(
        "{} calls in {wall:.1} s, {} from the cache; the model was busy {:.1}% of the time",
        work.calls,
        work.replayed,
        100.0 * work.busy.as_secs_f64() / wall.max(1e-9)
    );
    Ok(end)
}

/// The error of the first row in a file of rows that failed.
fn first_failure(path: &Path) -> Option<String> {
    let line = BufReader::new(fs::File::open(path).ok()?).lines().next()?.ok()?;
    let row: serde_json::Value = serde_json::from_str(&line).ok()?;
    row.get("error")?.as_str().map(str::to_owned)
}

/// Warns about an empty dataset or validation split. Fails if too few rows were processed, or if
/// rows of the input are missing although the run is `complete`.
fn check_outcome(
    args: &SynthArgs,
    input: &Input,
    manifest: &Manifest,
    complete: bool,
) -> anyhow::Result<()> {
    let failures = args.out.join("dataset").join("failed.jsonl");
    let input = input.path.display();
    match manifest.unseen {
        Some(unseen) if complete && unseen > 0 => anyhow::bail!(
            "{input} changed during the run: {unseen} of its rows were never processed; run the \
             same command again to process them"
        ),
        _ if manifest.rows > manifest.failed => {}
        _ if manifest.failed > 0 => {
            let first = first_failure(&failures);
            let first = first.map_or_else(String::new, |error| format!("; the first: {error}"));
            anyhow::bail!("every row failed; see {}{first}", failures.display())
        }
        Some(0) => anyhow::bail!(UsageError(format!("{input} has no rows"))),
        Some(unseen) => anyhow::bail!(
            "no row was processed: the budget was spent before the first of {unseen} rows"
        ),
        None => anyhow::bail!(
            "no row was processed: this shard has none, or the budget was spent before the first"
        ),
    }
    anyhow::ensure!(
        manifest.cut_short == 0,
        "{input} is truncated, and an unknown number of rows is missing; {} shows where",
        failures.display()
    );
    if manifest.samples.is_empty() {
        say!(
            "the dataset is empty: no row became a safety sample, and the number of utility \
             samples depends on that of safety samples"
        );
    }
    if manifest.packing.validation > 0.0
        && !manifest.samples.is_empty()
        && !manifest.samples.contains_key("validation")
    {
        say!(
            "the validation split is empty: at a share of {} no image was drawn for it; choose \
             another --validation",
            manifest.packing.validation
        );
    }
    #[expect(clippy::cast_precision_loss, reason = "counts of rows")]
    let coverage = (manifest.rows - manifest.failed) as f64 / manifest.rows as f64;
    anyhow::ensure!(
        coverage >= args.batch.min_coverage,
        "coverage {coverage:.3} is below {}; --retry-failed retries the failed rows",
        args.batch.min_coverage
    );
    Ok(())
}

/// The path of the input. Standard input is stored next to the journal, because resuming and
/// packing read the input again.
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
        let stored = path.display();
        return Err(UsageError(format!(
            "standard input differs from what this run started with; name another --out, or \
             resume with the stored rows by --input {stored}"
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

/// Summarizes the dataset as text.
fn summary(manifest: &Manifest, dataset: &Path) -> String {
    let mut text = String::new();
    let count =
        |kind: &str| manifest.samples.values().filter_map(|kinds| kinds.get(kind)).sum::<u64>();
    let dropped: u64 = manifest.dropped.values().sum();
    let _ = writeln!(
        text,
        "{} rows: {} safety samples ({} bare refusals), {} safe rows ({} of them utility samples), \
         {dropped} left out, {} failed",
        manifest.rows,
        count("safety"),
        manifest.refusals,
        manifest.safe,
        count("utility"),
        manifest.failed
    );
    for (reason, count) in &manifest.dropped {
        let _ = writeln!(text, "  left out, {}: {count}", reason.word());
    }
    if let Some(unseen) = manifest.unseen.filter(|unseen| *unseen > 0) {
        let _ = writeln!(text, "  never processed: {unseen}");
    }
    if manifest.gone > 0 {
        let _ = writeln!(
            text,
            "  recorded rows that are no longer in the input: {}; they are not in the dataset",
            manifest.gone
        );
    }
    if manifest.cut_short > 0 {
        let _ = writeln!(
            text,
            "  places where the input is truncated, so that rows are missing: {}",
            manifest.cut_short
        );
    }
    if manifest.failed > 0 {
        let _ = writeln!(
            text,
            "  reasons of failures: {}; --retry-failed retries these rows",
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
