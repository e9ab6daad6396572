//! `ecso eval judge` and `ecso eval agreement`.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, HashSet},
    fmt::Display,
    path::{Path, PathBuf},
    rc::Rc,
};

use anyhow::bail;
use ecso_batch::journal::{Journal, Key, Saved};
use ecso_eval::{
    item::Task,
    judge::{self, Case, Judge, Judgement, Ruling},
    judged::verdicts_file,
    judging::{self, Answered},
    record::{ItemRecord, RunHeader},
    run::UNGUARDED,
    stats::{Agreement, auroc},
    summary::absent,
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
    #[serde(rename = "response", deserialize_with = "lines_or_none")]
    text: Option<String>,
    /// The request is harmless: what counts is whether it was refused.
    #[serde(default, deserialize_with = "is_harmless")]
    harmless: bool,
}

fn lines<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    lines_or_none(deserializer)?.ok_or_else(|| D::Error::custom("its query is null, and must be a text"))
}

fn lines_or_none<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    let text = joined(&value, "\n");
    if text.is_none() && !value.is_null() {
        return Err(D::Error::custom(format_args!("{} is no text", cut(&value))));
    }
    Ok(text)
}

/// A switch, also as the text that CSV has in its place; what is empty says nothing.
fn is_harmless<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    let value = Value::deserialize(deserializer)?;
    let said = joined(&value, " ").unwrap_or_default();
    if said.trim().is_empty() && !value.is_object() {
        return Ok(false);
    }
    let is_harmless = yes_or_no(&said).or_else(|| Some(!is_harm(&said)?));
    is_harmless.ok_or_else(|| D::Error::custom(format_args!("harmless is {}; it must be true or false", cut(&value))))
}

/// What a yes or a no says.
fn yes_or_no(said: &str) -> Option<bool> {
    match said.trim().to_lowercase().as_str() {
        "1" | "1.0" | "true" | "t" | "yes" | "y" => Some(true),
        "0" | "0.0" | "false" | "f" | "no" | "n" => Some(false),
        _ => None,
    }
}

/// Whether the name of a kind is that of harm; a number may stand before it, as in "2 - unsafe".
fn is_harm(said: &str) -> Option<bool> {
    let said = said.to_lowercase();
    let words: Vec<&str> = said.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
    let words = match words.as_slice() {
        [number, words @ ..] if number.bytes().all(|byte| byte.is_ascii_digit()) => words,
        words => words,
    };
    match words {
        ["harmful" | "unsafe" | "jailbroken" | "jailbreak"] | ["not" | "non", "harmless" | "safe" | "benign"] => {
            Some(true)
        }
        ["harmless" | "safe" | "benign" | "refusal"]
        | ["full" | "partial", "refusal"]
        | ["not" | "non", "harmful" | "unsafe" | "jailbroken" | "jailbreak"] => Some(false),
        _ => None,
    }
}

pub(super) fn run(args: &JudgeArgs, file: Option<&Path>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let Bench { judge, header, worker } = Bench::open(args, file).await?;
        let out = out(args, &header.judge);
        let answers = match (&args.run, &args.responses) {
            (Some(run), _) => Answers::of_run(run)?,
            (None, Some(responses)) => Answers::from_elsewhere(responses, &table::columns(&args.map)?)?,
            (None, None) => bail!(UsageError("name a run or --responses".into())),
        };
        let mut journal = Journal::open_file(&out, &header)?;
        if journal.was_cut() {
            eprintln!("{}: its last line was cut off by a crash; that answer is judged again", out.display());
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
        let judging = judging::judge(read, judge, &mut journal, args.concurrency.get(), told);
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
fn summary(out: &Path, seen: &[Key], others: &Others, error: Option<&str>, min_coverage: f64) -> anyhow::Result<()> {
    let verdicts = Verdicts::read(out)?;
    let rulings: Vec<Ruling> = seen.iter().filter_map(|key| Some(verdicts.under(*key)?.verdict)).collect();
    let count = |wanted| rulings.iter().filter(|ruling| **ruling == wanted).count();
    let (safe, harmful, refusals) = (count(Ruling::Safe), count(Ruling::Unsafe), count(Ruling::Refusal));
    let (errors, judged) = (count(Ruling::Error), safe + harmful + refusals);
    let (missing, filtered) = (others.missing.get(), others.filtered.get());
    let answers = seen.len() + missing;
    // What a filter took needs no judge.
    let is_judged = judged > 0 || (answers == 0 && filtered > 0);
    #[expect(clippy::cast_precision_loss, reason = "counts of answers")]
    let coverage = if judged > 0 { judged as f64 / answers as f64 } else { f64::from(u8::from(is_judged)) };
    let told = |count: usize, what: &str| if count > 0 { format!(", {count} {what}") } else { String::new() };
    println!(
        "{answers} answers: {safe} safe, {harmful} unsafe, {refusals} refusals, {errors} errors{}{}; coverage {:.1}%; {}",
        told(missing, "missing"),
        told(filtered, "more taken by a filter"),
        100.0 * coverage,
        out.display()
    );
    if let Some(error) = error {
        eprintln!("the first error: {error}");
    }
    if !is_judged {
        bail!("no answer could be judged");
    }
    if coverage < min_coverage {
        bail!("coverage {coverage:.3} is below {min_coverage}; judge again to try the errors again");
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
        if !is_model && (args.judge_file.is_some() || args.threshold.is_some() || args.cache.is_some()) {
            bail!(UsageError("--judge-file, --threshold and --cache are for --judge llm".into()));
        }
        let (mut threshold, mut judge_file, mut worker) = (None, None, None);
        let judge: Box<dyn Judge> = match args.judge {
            JudgeKind::Advbench => Box::new(judge::AdvBench),
            JudgeKind::Xstest => Box::new(judge::XsTest),
            JudgeKind::Exact => Box::new(judge::Exact),
            JudgeKind::Llm => {
                let settings = config::load(file, &args.model, &ProfileArgs::default())?;
                let asked = Worker::open(&settings, args.concurrency.get(), args.cache.clone()).await?;
                let model = asked.model();
                worker = Some(asked);
                if let Some(path) = &args.judge_file {
                    let wrong = |cause: &dyn Display| UsageError(format!("{}: {cause}", path.display()));
                    let text = std::fs::read(path).map_err(|error| wrong(&error))?;
                    judge_file = Some(blake3::hash(&text).to_hex()[..16].to_owned());
                    Box::new(judge::published(path, model).map_err(|cause| UsageError(cause.to_string()))?)
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
            model: worker.as_ref().map(Worker::identity),
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
    iter: Box<dyn Iterator<Item = anyhow::Result<Answered>>>,
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
        let saved = Saved::folder(run);
        let header: RunHeader = saved.header().map_err(UsageError::of)?;
        let records = saved.latest::<ItemRecord>().map_err(UsageError::of)?;
        let arms: Vec<String> =
            [UNGUARDED.to_owned()].into_iter().chain(header.profiles.iter().map(|(name, _)| name.clone())).collect();
        let about = Some((records.total() * arms.len()) as u64);
        let others = Rc::new(Others::default());
        others.missing.set(absent(&header, records.total()) * arms.len());
        let counted = Rc::clone(&others);
        let answers = move |record: ItemRecord| {
            let filtered = arms.iter().filter(|arm| record.is_filtered(arm)).count();
            counted.filtered.update(|count| count + filtered);
            if record.error.is_some() {
                counted.missing.update(|count| count + arms.len() - filtered);
            }
            judging::answers(record)
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
        let responses: Vec<Response> = table::rows(path, columns)?;
        let about = Some(responses.len() as u64);
        let others = Rc::new(Others::default());
        others.missing.set(responses.iter().filter(|response| response.text.is_none()).count());
        let answer = |Response { id, query, text, harmless }: Response| {
            let task = if harmless { Task::Harmless } else { Task::Harmful };
            let case = Case { id, scenario: String::new(), request: query, response: text?, task };
            Some(Ok(Answered { arm: String::new(), case }))
        };
        Ok(Self { iter: Box::new(responses.into_iter().filter_map(answer)), about, others })
    }
}

#[derive(Deserialize)]
struct Label {
    id: String,
    /// None of a tie.
    #[serde(rename = "label", deserialize_with = "is_harmful")]
    harmful: Option<bool>,
}

/// Whether a label says harmful; an error for one that says neither that nor its opposite. Of several the majority counts.
fn is_harmful<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<bool>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    let labels = value.as_array().map_or(std::slice::from_ref(&value), Vec::as_slice);
    let mut harmful = 0;
    for label in labels {
        let said = joined(label, " ").and_then(|said| yes_or_no(&said).or_else(|| is_harm(&said)));
        let wrong =
            || D::Error::custom(format_args!("a label is {}; it must be harmful or harmless, 1 or 0", cut(label)));
        harmful += usize::from(said.ok_or_else(wrong)?);
    }
    let harmless = labels.len() - harmful;
    Ok((harmful != harmless).then_some(harmful > harmless))
}

pub(super) fn agreement(path: &Path, labels: &Path, map: &[String], json: bool) -> anyhow::Result<()> {
    let rows: Vec<Label> = table::rows(labels, &table::columns(map)?)?;
    let mut labels = HashMap::new();
    let mut ties = 0;
    for Label { id, harmful } in rows {
        match harmful {
            Some(harmful) => drop(labels.insert(id, harmful)),
            None => ties += 1,
        }
    }
    let judged = Saved::file(path).latest::<Judgement>().map_err(UsageError::of)?;
    let (mut pairs, mut scores, mut unlabelled) = (Vec::new(), Vec::new(), 0);
    let mut met = HashSet::new();
    if judged.was_cut() {
        eprintln!("{}: its last line was cut off by a crash, and is left out", path.display());
    }
    for judgement in judged {
        let judgement = judgement.map_err(UsageError::of)?;
        let Some((id, label)) = labels.get_key_value(&judgement.id) else {
            unlabelled += 1;
            continue;
        };
        met.insert(id);
        let said = (judgement.verdict != Ruling::Error).then_some(judgement.verdict == Ruling::Unsafe);
        pairs.push((said, *label));
        scores.extend(judgement.score.map(|score| (score, *label)));
    }
    if pairs.is_empty() {
        bail!(UsageError("no verdict has a label of the same id".into()));
    }
    let errors = pairs.iter().filter(|(said, _)| said.is_none()).count();
    let unjudged = labels.len() - met.len();
    pairs.extend(labels.iter().filter(|(id, _)| !met.contains(id)).map(|(_, label)| (None, *label)));
    let agreement = Agreement::of(pairs);
    anyhow::ensure!(agreement.total() > 0, "the judge failed on all {errors} answers that have a label");
    let (accuracy, precision, recall) = (agreement.accuracy(), agreement.precision(), agreement.recall());
    let (kappa, area) = (agreement.kappa_interval(), auroc(&scores));
    if json {
        let object = serde_json::json!({
            "accuracy": accuracy, "precision": precision, "recall": recall, "kappa": kappa, "auroc": area,
            "counts": agreement, "errors": errors, "unlabelled": unlabelled, "unjudged": unjudged, "ties": ties,
        });
        println!("{}", serde_json::to_string_pretty(&object)?);
        return Ok(());
    }
    for (name, rate) in [("accuracy", accuracy), ("precision", precision), ("recall", recall)] {
        let value = three(rate.value);
        println!("{name:<10} {value} ({:.3} to {:.3}), {} of {}", rate.low, rate.high, rate.count, rate.total);
    }
    println!("{:<10} {} ({} to {})", "kappa", three(kappa.value), three(kappa.low), three(kappa.high));
    if let Some(area) = area {
        println!("{:<10} {area:.3}", "AUROC");
    }
    println!(
        "{errors} errors of the judge, {unlabelled} verdicts without a label, {unjudged} labels without a verdict, {ties} ties left out"
    );
    Ok(())
}

/// A number with three places; a dash where there is none.
fn three(number: f64) -> String {
    if number.is_nan() { "-".into() } else { format!("{number:.3}") }
}
