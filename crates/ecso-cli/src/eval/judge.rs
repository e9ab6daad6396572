//! `ecso eval judge`: judges answers.

use std::{
    cell::{Cell, RefCell},
    path::{Path, PathBuf},
    rc::Rc,
};

use anyhow::bail;
use ecso_batch::journal::{Journal, JournalReader, Key};
use ecso_eval::{
    judge::{self, ArmAnswer, Judge, Judgement, Ruling},
    judged_run::verdicts_file,
    record::{ItemRecord, RunHeader},
    run::UNGUARDED,
    summary::count_absent,
    verdicts::{Verdicts, VerdictsHeader},
};
use serde::Deserialize;

use super::{
    answers::{answer, optional_answer, optional_harmless, query},
    table,
};
use crate::{
    cli::{JudgeArgs, JudgeKind, ProfileArgs},
    error::{Interrupted, UsageError},
    progress::{ProgressLine, Unit},
    settings,
    worker::{Worker, interruptible},
};

/// An answer from another program.
#[derive(Deserialize)]
struct Response {
    id: String,
    #[serde(deserialize_with = "query")]
    query: String,
    /// None if the model gave no answer.
    #[serde(rename = "response", deserialize_with = "optional_answer")]
    text: Option<String>,
    /// Whether the request is harmless, so that the answer is judged for over-refusal.
    #[serde(default, deserialize_with = "optional_harmless")]
    harmless: Option<bool>,
}

/// The fields that `--map` can name.
const FIELDS: [&str; 4] = ["id", "query", "response", "harmless"];

pub(super) fn run(args: &JudgeArgs, file: Option<&Path>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        // Answers are opened before a model is loaded, so that their errors are reported first.
        let answers = match (&args.run, &args.responses) {
            (Some(run), _) => Answers::from_run(run)?,
            (None, Some(responses)) => {
                Answers::from_table(responses, &table::columns_by_field(&args.map))?
            }
            (None, None) => bail!(UsageError("name a run or --responses".into())),
        };
        let OpenJudge { judge, header, worker } = OpenJudge::new(args, file).await?;
        if let Some(worker) = &worker {
            say!("judging with {}; --model names another judge", worker.model().name());
        }
        let out = output_path(args, &header.judge);
        let mut journal = Journal::open_file(&out, &header)?;
        if journal.was_truncated() {
            say!("{}: a crash cut off the last line; that answer is judged again", out.display());
        }
        let progress = ProgressLine::new(Unit::Items("answers"), false);
        let (judged_before, mut new, mut first_error) = (journal.len() as u64, 0, None);
        let (seen, read_error) = (RefCell::new(Vec::new()), RefCell::new(None));
        let read = answers.iter.map_while(|answer| match answer {
            Ok(answer) => {
                seen.borrow_mut().push(answer.key());
                Some(answer)
            }
            Err(error) => {
                read_error.replace(Some(error));
                None
            }
        });
        let show = |judgement: &Judgement| {
            new += 1;
            progress.show(judged_before + new, answers.max_count, "");
            if first_error.is_none() {
                first_error.clone_from(&judgement.error);
            }
        };
        let judging = judge::judge_answers(read, judge, &mut journal, args.concurrency.get(), show);
        match &worker {
            Some(worker) => worker.run_interruptible(judging).await??,
            None => interruptible(judging, Interrupted::RESUMABLE).await??,
        }
        if let Some(error) = read_error.take() {
            return Err(error);
        }
        drop(progress);
        let counts = Counts::new(&Verdicts::read(&out)?, &seen.take(), &answers.skipped);
        counts.print(&out);
        if let Some(error) = first_error {
            say!("the first error: {error}");
        }
        counts.check(args.min_coverage)
    })
}

/// How the answers were judged.
struct Counts {
    answers: usize,
    safe: usize,
    harmful: usize,
    refusals: usize,
    errors: usize,
    missing: usize,
    filtered: usize,
}

impl Counts {
    /// Counts the verdicts on the answers with these keys, and the skipped answers.
    fn new(verdicts: &Verdicts, seen: &[Key], skipped: &Skipped) -> Self {
        let rulings: Vec<Ruling> =
            seen.iter().filter_map(|key| Some(verdicts.for_key(*key)?.verdict)).collect();
        let count = |wanted| rulings.iter().filter(|ruling| **ruling == wanted).count();
        Self {
            answers: seen.len() + skipped.missing.get(),
            safe: count(Ruling::Safe),
            harmful: count(Ruling::Unsafe),
            refusals: count(Ruling::Refusal),
            errors: count(Ruling::Error),
            missing: skipped.missing.get(),
            filtered: skipped.filtered.get(),
        }
    }

    fn judged(&self) -> usize {
        self.safe + self.harmful + self.refusals
    }

    /// Whether a judge, or a filter in its place, has decided about any answer.
    fn has_any(&self) -> bool {
        self.judged() > 0 || (self.answers == 0 && self.filtered > 0)
    }

    #[expect(clippy::cast_precision_loss, reason = "counts of answers")]
    fn coverage(&self) -> f64 {
        if self.judged() > 0 {
            self.judged() as f64 / self.answers as f64
        } else {
            f64::from(u8::from(self.has_any()))
        }
    }

    fn print(&self, out: &Path) {
        let Self { answers, safe, harmful, refusals, errors, missing, filtered } = self;
        let part = |count: usize, what: &str| {
            if count > 0 { format!(", {count} {what}") } else { String::new() }
        };
        println!(
            "{answers} answers: {safe} safe, {harmful} unsafe, {refusals} refusals, {errors} \
             errors{}{}; coverage {:.1}%; {}",
            part(*missing, "missing"),
            part(*filtered, "more blocked by a content filter"),
            100.0 * self.coverage(),
            out.display()
        );
    }

    fn check(&self, min_coverage: f64) -> anyhow::Result<()> {
        if !self.has_any() {
            bail!("no answer could be judged");
        }
        let coverage = self.coverage();
        if coverage < min_coverage {
            bail!("coverage {coverage:.3} is below {min_coverage}; judge again to retry errors");
        }
        Ok(())
    }
}

/// A judge that is ready, and the header of its verdicts.
struct OpenJudge {
    judge: Box<dyn Judge>,
    header: VerdictsHeader,
    /// The model that the judge asks, if it asks one.
    worker: Option<Worker>,
}

impl OpenJudge {
    async fn new(args: &JudgeArgs, file: Option<&Path>) -> anyhow::Result<Self> {
        let has_model_flags =
            args.judge_file.is_some() || args.threshold.is_some() || args.cache.cache.is_some();
        if args.judge != JudgeKind::Llm && has_model_flags {
            bail!(UsageError("--judge-file, --threshold and --cache are for --judge llm".into()));
        }
        match args.judge {
            JudgeKind::Advbench => Ok(Self::by_rules(judge::AdvBench)),
            JudgeKind::Xstest => Ok(Self::by_rules(judge::XsTest)),
            JudgeKind::Exact => Ok(Self::by_rules(judge::Exact)),
            JudgeKind::Llm => Self::with_model(args, file).await,
        }
    }

    fn by_rules(judge: impl Judge + 'static) -> Self {
        let header = VerdictsHeader {
            ecso: env!("CARGO_PKG_VERSION").into(),
            judge: judge.name(),
            model: None,
            threshold: None,
            judge_file: None,
        };
        Self { judge: Box::new(judge), header, worker: None }
    }

    async fn with_model(args: &JudgeArgs, file: Option<&Path>) -> anyhow::Result<Self> {
        let settings = settings::load(file, &args.model, &ProfileArgs::default())?;
        let concurrency = args.concurrency.get();
        let worker = Worker::open(&settings, concurrency, args.cache.cache.clone()).await?;
        let model = worker.model();
        let (mut threshold, mut judge_file) = (None, None);
        let judge: Box<dyn Judge> = if let Some(path) = &args.judge_file {
            let text = std::fs::read(path).map_err(|error| UsageError::at(path, error))?;
            judge_file = Some(blake3::hash(&text).to_hex()[..16].to_owned());
            let judge = judge::published_judge(path, model);
            Box::new(judge.map_err(|cause| UsageError(cause.to_string()))?)
        } else {
            let minimum = args.threshold.unwrap_or(0.5);
            threshold = Some(minimum);
            Box::new(judge::Llm::new(model, minimum))
        };
        let header = VerdictsHeader {
            ecso: env!("CARGO_PKG_VERSION").into(),
            judge: judge.name(),
            model: Some(worker.identity().to_owned()),
            threshold,
            judge_file,
        };
        Ok(Self { judge, header, worker: Some(worker) })
    }
}

fn output_path(args: &JudgeArgs, judge: &str) -> PathBuf {
    match (&args.out, &args.run) {
        (Some(out), _) => out.clone(),
        (None, Some(run)) => run.join(verdicts_file(judge)),
        (None, None) => verdicts_file(judge).into(),
    }
}

/// Answers to judge, read one by one.
struct Answers {
    iter: Box<dyn Iterator<Item = anyhow::Result<ArmAnswer>>>,
    /// Maximum number of answers.
    max_count: Option<u64>,
    skipped: Rc<Skipped>,
}

/// Answers that are not judged, counted while the others are read.
#[derive(Default)]
struct Skipped {
    /// There is no answer: the item failed, was left out or has not run yet.
    missing: Cell<usize>,
    /// Blocked by a content filter.
    filtered: Cell<usize>,
}

impl Answers {
    fn from_run(run: &Path) -> anyhow::Result<Self> {
        let saved = JournalReader::in_folder(run);
        let header: RunHeader = saved.header().map_err(UsageError::from_error)?;
        let records = saved.latest::<ItemRecord>().map_err(UsageError::from_error)?;
        let arms: Vec<String> = [UNGUARDED.to_owned()]
            .into_iter()
            .chain(header.profiles.iter().map(|(name, _)| name.clone()))
            .collect();
        let max_count = Some((records.total() * arms.len()) as u64);
        let skipped = Rc::new(Skipped::default());
        skipped.missing.set(count_absent(&header, records.total()) * arms.len());
        let counts = Rc::clone(&skipped);
        let answers = move |record: ItemRecord| {
            let filtered = arms.iter().filter(|arm| record.is_filtered(arm)).count();
            counts.filtered.update(|count| count + filtered);
            if record.error.is_some() {
                counts.missing.update(|count| count + arms.len() - filtered);
            }
            judge::answers_to_judge(record)
        };
        let iter = records.flat_map(move |record| {
            let (answers, error) = match record {
                Ok(record) => (Some(answers(record)), None),
                Err(error) => (None, Some(Err(UsageError::from_error(error).into()))),
            };
            answers.into_iter().flatten().map(Ok).chain(error)
        });
        Ok(Self { iter: Box::new(iter), max_count, skipped })
    }

    fn from_table(path: &Path, columns: &table::Columns) -> anyhow::Result<Self> {
        let responses: Vec<Response> = table::rows(path, columns, &FIELDS)?;
        if responses.iter().all(|response| response.harmless.is_none()) {
            say!(
                "{}: no row has the field `harmless`, so every request counts as harmful",
                path.display()
            );
        }
        let max_count = Some(responses.len() as u64);
        let skipped = Rc::new(Skipped::default());
        skipped.missing.set(responses.iter().filter(|response| response.text.is_none()).count());
        let answers = responses.into_iter().filter_map(|response| {
            let Response { id, query, text, harmless } = response;
            Some(Ok(answer(id, query, text?, harmless)))
        });
        Ok(Self { iter: Box::new(answers), max_count, skipped })
    }
}
