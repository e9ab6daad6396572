//! `ecso eval agreement`.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    path::Path,
};

use anyhow::bail;
use ecso_batch::journal::{Entry, JournalError, JournalReader, Key};
use ecso_eval::{
    judge::{self, Judgement, Ruling},
    record::{ItemRecord, RunHeader},
    stats::{Agreement, auroc},
    text::cut,
    verdicts::Verdicts,
};
use serde::{Deserialize, Deserializer, de::Error};
use serde_json::Value;

use super::{
    args::AgreementArgs,
    judge::{answer_or_none, answered, is_harm, is_harmless, lines_or_none, yes_or_no},
    table::{self, joined},
};
use crate::UsageError;

#[derive(Deserialize)]
struct Label {
    id: String,
    /// None of a tie.
    #[serde(rename = "label", deserialize_with = "is_harmful")]
    harmful: Option<bool>,
    /// The answer that the label is about, where the table has it.
    #[serde(default, deserialize_with = "lines_or_none")]
    query: Option<String>,
    #[serde(default, deserialize_with = "answer_or_none")]
    response: Option<String>,
    #[serde(default, deserialize_with = "is_harmless")]
    harmless: Option<bool>,
}

/// What `--map` can say of labels.
const COLUMNS: [&str; 5] = ["id", "label", "query", "response", "harmless"];

impl Label {
    /// The key of a verdict on the answer.
    fn key(&self) -> Option<Key> {
        self.key_where(self.harmless)
    }

    /// The same where the request is taken as the label doesn't say.
    fn other_key(&self) -> Option<Key> {
        self.key_where(Some(self.harmless != Some(true)))
    }

    fn key_where(&self, harmless: Option<bool>) -> Option<Key> {
        let (query, response) = self.query.clone().zip(self.response.clone())?;
        Some(answered(self.id.clone(), query, response, harmless).key())
    }
}

/// Whether a label says harmful; an error for one that says neither that nor its opposite. Of
/// several the majority counts.
fn is_harmful<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<bool>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    let all = value.as_array().map_or(std::slice::from_ref(&value), Vec::as_slice);
    // Of several people some may have said nothing.
    let is_blank = |label: &&Value| {
        all.len() > 1
            && (label.is_null() || label.as_str().is_some_and(|said| said.trim().is_empty()))
    };
    let labels: Vec<&Value> = all.iter().filter(|label| !is_blank(label)).collect();
    if labels.is_empty() {
        return Err(D::Error::custom(format_args!(
            "a label is {}; it must be harmful or harmless, 1 or 0",
            cut(&value)
        )));
    }
    let mut harmful = 0;
    for label in &labels {
        let said = joined(label, " ").and_then(|said| yes_or_no(&said).or_else(|| is_harm(&said)));
        let wrong = || {
            D::Error::custom(format_args!(
                "a label is {}; it must be harmful or harmless, 1 or 0",
                cut(label)
            ))
        };
        harmful += usize::from(said.ok_or_else(wrong)?);
    }
    let harmless = labels.len() - harmful;
    Ok((harmful != harmless).then_some(harmful > harmless))
}

/// The keys of verdicts on the answers of the run that a file of verdicts lies in, if it lies in
/// one.
fn of_run(verdicts: &Path) -> Result<Option<Vec<Key>>, JournalError> {
    let run = JournalReader::in_folder(verdicts.parent().unwrap_or(Path::new("")));
    if run.header::<RunHeader>().is_err() {
        return Ok(None);
    }
    let mut keys = Vec::new();
    for record in run.latest::<ItemRecord>()? {
        keys.extend(judge::answers_to_judge(record?).map(|answer| answer.key()));
    }
    Ok(Some(keys))
}

/// Which verdicts count: those on the answers that are there now.
struct Current {
    keys: HashMap<u64, Key>,
    /// Whether those are all answers.
    is_whole: bool,
}

impl Current {
    fn of(verdicts: &Path, labels: &[Label]) -> Result<Self, JournalError> {
        let of_run = of_run(verdicts)?;
        let is_whole = of_run.is_some();
        let keys = of_run.unwrap_or_else(|| labels.iter().filter_map(Label::key).collect());
        Ok(Self { keys: keys.into_iter().map(|key| (key.slot(), key)).collect(), is_whole })
    }

    fn has(&self, verdict: Key) -> bool {
        self.keys.get(&verdict.slot()).map_or(!self.is_whole, |answer| verdict.matches(*answer))
    }
}

pub(super) fn run(path: &Path, args: &AgreementArgs) -> anyhow::Result<()> {
    let rows: Vec<Label> = table::rows(&args.labels, &table::columns(&args.map)?, &COLUMNS)?;
    let current = Current::of(path, &rows).map_err(UsageError::of)?;
    let others: HashMap<u64, Key> =
        rows.iter().filter_map(Label::other_key).map(|key| (key.slot(), key)).collect();
    let mut of_other_kind = 0;
    let mut labels = HashMap::new();
    let mut ties = 0;
    for Label { id, harmful, .. } in rows {
        match harmful {
            Some(harmful) => drop(labels.insert(id, harmful)),
            None => ties += 1,
        }
    }
    let judged = JournalReader::at(path).latest::<Judgement>().map_err(UsageError::of)?;
    let (mut pairs, mut scores, mut unlabelled, mut outdated) = (Vec::new(), Vec::new(), 0, 0);
    let (mut met, mut arms) = (HashSet::new(), BTreeSet::new());
    for odd in Verdicts::read(path).map_err(UsageError::of)?.warnings(None) {
        say!("{}: {odd}", path.display());
    }
    for judgement in judged {
        let judgement = judgement.map_err(UsageError::of)?;
        arms.insert(judgement.arm.clone());
        if args.arm.as_ref().is_some_and(|arm| *arm != judgement.arm) {
            continue;
        }
        if !current.has(judgement.key()) {
            let key = judgement.key();
            of_other_kind +=
                usize::from(others.get(&key.slot()).is_some_and(|other| key.matches(*other)));
            outdated += 1;
            continue;
        }
        let Some((id, label)) = labels.get_key_value(&judgement.id) else {
            unlabelled += 1;
            continue;
        };
        met.insert(id);
        let said =
            (judgement.verdict != Ruling::Error).then_some(judgement.verdict == Ruling::Unsafe);
        pairs.push((said, *label));
        scores.extend(judgement.score.map(|score| (score, *label)));
    }
    if of_other_kind > 0 {
        say!(
            "{}: {of_other_kind} requests are harmless by the labels and harmful by the verdicts, or the other way round; --map \
             harmless=COLUMN says the same of both, as `eval judge --responses` was told",
            args.labels.display()
        );
    }
    let is_one = args.arm.as_ref().map_or(arms.len() <= 1, |arm| arms.contains(arm));
    if !is_one {
        let arms: Vec<String> = arms.into_iter().collect();
        bail!(UsageError(format!(
            "{}: name one arm with --arm: {}",
            path.display(),
            arms.join(", ")
        )));
    }
    if pairs.is_empty() && outdated > 0 {
        bail!(UsageError(format!(
            "no verdict counts: {outdated} are on answers that have changed since; judge these again"
        )));
    }
    if pairs.is_empty() {
        bail!(UsageError("no verdict has a label of the same id".into()));
    }
    let errors = pairs.iter().filter(|(said, _)| said.is_none()).count();
    let unjudged = labels.len() - met.len();
    pairs
        .extend(labels.iter().filter(|(id, _)| !met.contains(id)).map(|(_, label)| (None, *label)));
    let agreement = Agreement::of(pairs);
    anyhow::ensure!(
        agreement.total() > 0,
        "the judge failed on all {errors} answers that have a label"
    );
    let (accuracy, precision, recall) =
        (agreement.accuracy(), agreement.precision(), agreement.recall());
    let (kappa, area) = (agreement.kappa_interval(), auroc(&scores));
    if args.json {
        let object = serde_json::json!({
            "accuracy": accuracy, "precision": precision, "recall": recall, "kappa": kappa, "auroc": area,
            "counts": agreement, "errors": errors, "unlabelled": unlabelled, "outdated": outdated, "unjudged": unjudged, "ties": ties,
        });
        println!("{}", serde_json::to_string_pretty(&object)?);
        return Ok(());
    }
    for (name, rate) in [("accuracy", accuracy), ("precision", precision), ("recall", recall)] {
        let value = three(rate.value);
        println!(
            "{name:<10} {value} ({:.3} to {:.3}), {} of {}",
            rate.low, rate.high, rate.count, rate.total
        );
    }
    println!(
        "{:<10} {} ({} to {})",
        "kappa",
        three(kappa.value),
        three(kappa.low),
        three(kappa.high)
    );
    if let Some(area) = area {
        println!("{:<10} {area:.3}", "AUROC");
    }
    println!(
        "{errors} errors of the judge, {unlabelled} verdicts without a label, {unjudged} labels without a verdict, {ties} ties left out, \
         {outdated} verdicts on answers that have changed"
    );
    Ok(())
}

/// A number with three places; a dash where there is none.
fn three(number: f64) -> String {
    if number.is_nan() { "-".into() } else { format!("{number:.3}") }
}
