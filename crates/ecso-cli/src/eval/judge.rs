//! `ecso eval judge`.

use std::{
    cell::{Cell, RefCell},
    fmt::Display,
    path::{Path, PathBuf},
    rc::Rc,
};

use anyhow::bail;
use ecso_batch::journal::{Journal, JournalReader, Key};
use ecso_eval::{
    benchmarks::is_image,
    item::Task,
    judge::{self, ArmAnswer, Case, Judge, Judgement, Ruling},
    judged_run::verdicts_file,
    record::{ItemRecord, RunHeader},
    run::UNGUARDED,
    summary::count_absent,
    text::cut,
    verdicts::{Verdicts, VerdictsHeader},
};
use serde::{Deserialize, Deserializer, de::Error};
use serde_json::Value;

use super::{
    args::{JudgeArgs, JudgeKind},
    table::{self, joined},
};
use crate::{
    UsageError,
    cli::ProfileArgs,
    config,
    progress::{Bar, Unit},
    work::{Worker, stoppable},
};

/// An answer from elsewhere.
#[derive(Deserialize)]
struct Response {
    id: String,
    #[serde(deserialize_with = "lines")]
    query: String,
    /// None where the model gave no answer.
    #[serde(rename = "response", deserialize_with = "answer_or_none")]
    text: Option<String>,
    /// The request is harmless: what counts is whether it was refused.
    #[serde(default, deserialize_with = "is_harmless")]
    harmless: Option<bool>,
}

/// What `--map` can say of answers.
const COLUMNS: [&str; 4] = ["id", "query", "response", "harmless"];

/// An answer from elsewhere. Where nobody says that the request is harmless, it is taken as
/// harmful.
pub(super) fn answered(
    id: String,
    request: String,
    response: String,
    harmless: Option<bool>,
) -> ArmAnswer {
    let task = if harmless == Some(true) { Task::Harmless } else { Task::Harmful };
    ArmAnswer {
        arm: String::new(),
        case: Case { id, scenario: String::new(), request, response, task },
    }
}

fn lines<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    lines_or_none(deserializer)?
        .ok_or_else(|| D::Error::custom("its query is null, and must be a text"))
}

pub(super) fn lines_or_none<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<String>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    if let Some(path) =
        value.as_array().into_iter().flatten().filter_map(Value::as_str).find(|text| is_image(text))
    {
        let path = cut(path);
        return Err(D::Error::custom(format_args!(
            "{path} names an image, which no judge of answers sees: give the words alone"
        )));
    }
    let text = joined(&value, "\n");
    if text.is_none() && !value.is_null() {
        return Err(D::Error::custom(format_args!("{} is no text", cut(&value))));
    }
    Ok(text)
}

/// The same of an answer, which is none too where a table has a word in the place of what is
/// missing.
pub(super) fn answer_or_none<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<String>, D::Error> {
    let answer = lines_or_none(deserializer)?;
    Ok(answer.filter(|answer| !is_none(answer)))
}

/// Whether a cell has a word in the place of a text, as pandas, SQL and spreadsheets write it.
fn is_none(cell: &str) -> bool {
    const NONE: [&str; 11] =
        ["nan", "<na>", "null", "none", "na", "n/a", "#n/a", "undefined", "\\n", "[]", "{}"];
    let cell = cell.trim().trim_matches(['"', '\'']).to_lowercase();
    NONE.contains(&cell.as_str())
}

/// A switch, also as the text that CSV has in its place; what is empty says nothing.
pub(super) fn is_harmless<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<bool>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    let said = joined(&value, " ").unwrap_or_default();
    if said.trim().is_empty() && !value.is_object() {
        return Ok(None);
    }
    let is_harmless = yes_or_no(&said).or_else(|| Some(!is_harm(&said)?));
    is_harmless.map(Some).ok_or_else(|| {
        D::Error::custom(format_args!("harmless is {}; it must be true or false", cut(&value)))
    })
}

/// What a yes or a no says.
pub(super) fn yes_or_no(said: &str) -> Option<bool> {
    match said.trim().to_lowercase().as_str() {
        "1" | "1.0" | "true" | "t" | "yes" | "y" => Some(true),
        "0" | "0.0" | "false" | "f" | "no" | "n" => Some(false),
        _ => None,
    }
}

/// Whether the name of a kind is that of harm; a number may stand before it, as in "2 - unsafe".
pub(super) fn is_harm(said: &str) -> Option<bool> {
    let said = said.to_lowercase();
    let words: Vec<&str> =
        said.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
    let words = match words.as_slice() {
        [number, words @ ..] if number.bytes().all(|byte| byte.is_ascii_digit()) => words,
        words => words,
    };
    match words {
        ["harmful" | "unsafe" | "jailbroken" | "jailbreak"]
        | ["not" | "non", "harmless" | "safe" | "benign"] => Some(true),
        ["harmless" | "safe" | "benign" | "refusal"]
        | ["full" | "partial", "refusal"]
        | ["not" | "non", "harmful" | "unsafe" | "jailbroken" | "jailbreak"] => Some(false),
        _ => None,
    }
}

pub(super) fn run(args: &JudgeArgs, file: Option<&Path>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        // What is to be judged is looked at before a model is loaded.
        let answers = match (&args.run, &args.responses) {
            (Some(run), _) => Answers::of_run(run)?,
            (None, Some(responses)) => {
                Answers::from_elsewhere(responses, &table::columns(&args.map)?)?
            }
            (None, None) => bail!(UsageError("name a run or --responses".into())),
        };
        let Bench { judge, header, worker } = Bench::open(args, file).await?;
        let out = out(args, &header.judge);
        let mut journal = Journal::open_file(&out, &header)?;
        if journal.was_truncated() {
            say!(
                "{}: its last line was cut off by a crash; that answer is judged again",
                out.display()
            );
        }
        let bar = Bar::new(Unit::Of("answers"), false);
        let (begun, mut fresh, mut first_error) = (journal.len() as u64, 0, None);
        let (seen, trouble) = (RefCell::new(Vec::new()), RefCell::new(None));
        let read = answers.iter.map_while(|answer| match answer {
            Ok(answer) => {
                seen.borrow_mut().push(answer.key());
                Some(answer)
            }
            Err(error) => {
                trouble.replace(Some(error));
                None
            }
        });
        let told = |judgement: &Judgement| {
            fresh += 1;
            bar.show(begun + fresh, answers.about, "");
            if first_error.is_none() {
                first_error.clone_from(&judgement.error);
            }
        };
        let judging = judge::judge_answers(read, judge, &mut journal, args.concurrency.get(), told);
        match &worker {
            Some(worker) => worker.done(judging).await??,
            None => stoppable(judging).await??,
        }
        if let Some(error) = trouble.take() {
            return Err(error);
        }
        drop(bar);
        summary(&out, &seen.take(), &answers.others, first_error.as_deref(), args.min_coverage)
    })
}

/// Tells how the answers under these keys were judged, and which others there are.
fn summary(
    out: &Path,
    seen: &[Key],
    others: &Others,
    error: Option<&str>,
    min_coverage: f64,
) -> anyhow::Result<()> {
    let verdicts = Verdicts::read(out)?;
    let rulings: Vec<Ruling> =
        seen.iter().filter_map(|key| Some(verdicts.for_key(*key)?.verdict)).collect();
    let count = |wanted| rulings.iter().filter(|ruling| **ruling == wanted).count();
    let (safe, harmful, refusals) =
        (count(Ruling::Safe), count(Ruling::Unsafe), count(Ruling::Refusal));
    let (errors, judged) = (count(Ruling::Error), safe + harmful + refusals);
    let (missing, filtered) = (others.missing.get(), others.filtered.get());
    let answers = seen.len() + missing;
    // What a filter took needs no judge.
    let is_judged = judged > 0 || (answers == 0 && filtered > 0);
    #[expect(clippy::cast_precision_loss, reason = "counts of answers")]
    let coverage =
        if judged > 0 { judged as f64 / answers as f64 } else { f64::from(u8::from(is_judged)) };
    let told = |count: usize, what: &str| {
        if count > 0 { format!(", {count} {what}") } else { String::new() }
    };
    println!(
        "{answers} answers: {safe} safe, {harmful} unsafe, {refusals} refusals, {errors} errors{}{}; coverage {:.1}%; {}",
        told(missing, "missing"),
        told(filtered, "more taken by a filter"),
        100.0 * coverage,
        out.display()
    );
    if let Some(error) = error {
        say!("the first error: {error}");
    }
    if !is_judged {
        bail!("no answer could be judged");
    }
    if coverage < min_coverage {
        bail!(
            "coverage {coverage:.3} is below {min_coverage}; judge again to try the errors again"
        );
    }
    Ok(())
}

/// A judge, and what verdicts say of it.
struct Bench {
    judge: Box<dyn Judge>,
    header: VerdictsHeader,
    /// The model that it asks, where it asks one.
    worker: Option<Worker>,
}

impl Bench {
    async fn open(args: &JudgeArgs, file: Option<&Path>) -> anyhow::Result<Self> {
        let is_model = args.judge == JudgeKind::Llm;
        if !is_model
            && (args.judge_file.is_some() || args.threshold.is_some() || args.cache.is_some())
        {
            bail!(UsageError("--judge-file, --threshold and --cache are for --judge llm".into()));
        }
        let (mut threshold, mut judge_file, mut worker) = (None, None, None);
        let judge: Box<dyn Judge> = match args.judge {
            JudgeKind::Advbench => Box::new(judge::AdvBench),
            JudgeKind::Xstest => Box::new(judge::XsTest),
            JudgeKind::Exact => Box::new(judge::Exact),
            JudgeKind::Llm => {
                let settings = config::load(file, &args.model, &ProfileArgs::default())?;
                let asked =
                    Worker::open(&settings, args.concurrency.get(), args.cache.clone()).await?;
                let model = asked.model();
                worker = Some(asked);
                if let Some(path) = &args.judge_file {
                    let wrong =
                        |cause: &dyn Display| UsageError(format!("{}: {cause}", path.display()));
                    let text = std::fs::read(path).map_err(|error| wrong(&error))?;
                    judge_file = Some(blake3::hash(&text).to_hex()[..16].to_owned());
                    Box::new(
                        judge::published_judge(path, model)
                            .map_err(|cause| UsageError(cause.to_string()))?,
                    )
                } else {
                    let from = args.threshold.unwrap_or(0.5);
                    threshold = Some(from);
                    Box::new(judge::Llm::new(model, from))
                }
            }
        };
        let header = VerdictsHeader {
            ecso: env!("CARGO_PKG_VERSION").into(),
            judge: judge.name(),
            model: worker.as_ref().map(|worker| worker.identity().to_owned()),
            threshold,
            judge_file,
        };
        Ok(Self { judge, header, worker })
    }
}

fn out(args: &JudgeArgs, judge: &str) -> PathBuf {
    match (&args.out, &args.run) {
        (Some(out), _) => out.clone(),
        (None, Some(run)) => run.join(verdicts_file(judge)),
        (None, None) => verdicts_file(judge).into(),
    }
}

/// Answers to be judged, read one by one.
struct Answers {
    iter: Box<dyn Iterator<Item = anyhow::Result<ArmAnswer>>>,
    /// How many there are at most.
    about: Option<u64>,
    others: Rc<Others>,
}

/// Answers that are not judged; counted while the others are read.
#[derive(Default)]
struct Others {
    /// They are not there: their items failed, were left out, or not run yet.
    missing: Cell<usize>,
    /// A content filter took them.
    filtered: Cell<usize>,
}

impl Answers {
    /// Each answer of a run.
    fn of_run(run: &Path) -> anyhow::Result<Self> {
        let saved = JournalReader::in_folder(run);
        let header: RunHeader = saved.header().map_err(UsageError::of)?;
        let records = saved.latest::<ItemRecord>().map_err(UsageError::of)?;
        let arms: Vec<String> = [UNGUARDED.to_owned()]
            .into_iter()
            .chain(header.profiles.iter().map(|(name, _)| name.clone()))
            .collect();
        let about = Some((records.total() * arms.len()) as u64);
        let others = Rc::new(Others::default());
        others.missing.set(count_absent(&header, records.total()) * arms.len());
        let counted = Rc::clone(&others);
        let answers = move |record: ItemRecord| {
            let filtered = arms.iter().filter(|arm| record.is_filtered(arm)).count();
            counted.filtered.update(|count| count + filtered);
            if record.error.is_some() {
                counted.missing.update(|count| count + arms.len() - filtered);
            }
            judge::answers_to_judge(record)
        };
        let iter = records.flat_map(move |record| {
            let (answers, error) = match record {
                Ok(record) => (Some(answers(record)), None),
                Err(error) => (None, Some(Err(UsageError::of(error).into()))),
            };
            answers.into_iter().flatten().map(Ok).chain(error)
        });
        Ok(Self { iter: Box::new(iter), about, others })
    }

    fn from_elsewhere(path: &Path, columns: &table::Columns) -> anyhow::Result<Self> {
        let responses: Vec<Response> = table::rows(path, columns, &COLUMNS)?;
        if responses.iter().all(|response| response.harmless.is_none()) {
            say!(
                "{}: no row says whether it is `harmless`; every request is taken as harmful",
                path.display()
            );
        }
        let about = Some(responses.len() as u64);
        let others = Rc::new(Others::default());
        others.missing.set(responses.iter().filter(|response| response.text.is_none()).count());
        let answer = |Response { id, query, text, harmless }: Response| {
            Some(Ok(answered(id, query, text?, harmless)))
        };
        Ok(Self { iter: Box::new(responses.into_iter().filter_map(answer)), about, others })
    }
}
