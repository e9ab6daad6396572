//! `ecso eval agreement`: compares a judge's verdicts with labels.

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
    answers::{
        answer, optional_answer, optional_harmless, optional_query, parse_bool, parse_harm_label,
    },
    table::{self, joined},
};
use crate::{cli::AgreementArgs, error::UsageError};

#[derive(Deserialize)]
struct Label {
    id: String,
    /// None for a tie.
    #[serde(rename = "label", deserialize_with = "majority_label")]
    harmful: Option<bool>,
    /// The request and answer that the label is about, if the table has them.
    #[serde(default, deserialize_with = "optional_query")]
    query: Option<String>,
    #[serde(default, deserialize_with = "optional_answer")]
    response: Option<String>,
    #[serde(default, deserialize_with = "optional_harmless")]
    harmless: Option<bool>,
}

/// The fields that `--map` can name.
const FIELDS: [&str; 5] = ["id", "label", "query", "response", "harmless"];

impl Label {
    /// The key of a verdict on the answer.
    fn key(&self) -> Option<Key> {
        self.key_if(self.harmless)
    }

    /// [`Label::key`], if the request were harmless instead of harmful or the other way round.
    fn opposite_key(&self) -> Option<Key> {
        self.key_if(Some(self.harmless != Some(true)))
    }

    fn key_if(&self, harmless: Option<bool>) -> Option<Key> {
        let (query, response) = self.query.clone().zip(self.response.clone())?;
        Some(answer(self.id.clone(), query, response, harmless).key())
    }
}

/// Deserializes whether a label, or the majority of several labels, means harmful.
fn majority_label<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<bool>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    let unknown = |label: &Value| {
        D::Error::custom(format_args!(
            "a label is {}; it must be harmful or harmless, 1 or 0",
            cut(label)
        ))
    };
    let all = value.as_array().map_or(std::slice::from_ref(&value), Vec::as_slice);
    // Some of several annotators may have given no label.
    let is_blank = |label: &&Value| {
        all.len() > 1
            && (label.is_null() || label.as_str().is_some_and(|label| label.trim().is_empty()))
    };
    let labels: Vec<&Value> = all.iter().filter(|label| !is_blank(label)).collect();
    if labels.is_empty() {
        return Err(unknown(&value));
    }
    let mut harmful = 0;
    for label in &labels {
        let is_harmful = joined(label, " ")
            .and_then(|label| parse_bool(&label).or_else(|| parse_harm_label(&label)));
        harmful += usize::from(is_harmful.ok_or_else(|| unknown(label))?);
    }
    let harmless = labels.len() - harmful;
    Ok((harmful != harmless).then_some(harmful > harmless))
}

/// The verdicts that count: those on the answers that exist now.
struct CurrentAnswers {
    keys: HashMap<u64, Key>,
    /// Whether `keys` are all answers.
    is_complete: bool,
}

impl CurrentAnswers {
    /// The answers of the run that the file of verdicts is in, or else those of the labels.
    fn new(verdicts: &Path, labels: &[Label]) -> Result<Self, JournalError> {
        let of_run = keys_of_run(verdicts)?;
        let is_complete = of_run.is_some();
        let keys = of_run.unwrap_or_else(|| labels.iter().filter_map(Label::key).collect());
        Ok(Self { keys: by_place(keys), is_complete })
    }

    fn contains(&self, verdict: Key) -> bool {
        self.keys.get(&verdict.slot()).map_or(!self.is_complete, |answer| verdict.matches(*answer))
    }
}

/// The keys of the answers of the run that a file of verdicts is in; none if it is in no run.
fn keys_of_run(verdicts: &Path) -> Result<Option<Vec<Key>>, JournalError> {
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

fn by_place(keys: impl IntoIterator<Item = Key>) -> HashMap<u64, Key> {
    keys.into_iter().map(|key| (key.slot(), key)).collect()
}

/// Verdicts matched with labels.
#[derive(Default)]
struct Matched {
    /// Verdict (none if the judge failed) and label, both as whether the answer is harmful.
    pairs: Vec<(Option<bool>, bool)>,
    /// Score and label.
    scores: Vec<(f64, bool)>,
    arms: BTreeSet<String>,
    errors: usize,
    /// Verdicts without a label.
    unlabelled: usize,
    /// Verdicts on answers that have changed.
    outdated: usize,
    /// Outdated verdicts that would count if the request were harmless instead of harmful, or the
    /// other way round.
    opposite: usize,
    /// Labels without a verdict.
    unjudged: usize,
    /// Labels with a tie, which are left out.
    ties: usize,
}

impl Matched {
    fn new(args: &AgreementArgs) -> anyhow::Result<Self> {
        let path = &args.verdicts;
        let columns = table::columns_by_field(&args.map);
        let rows: Vec<Label> = table::rows(&args.labels, &columns, &FIELDS)?;
        let current = CurrentAnswers::new(path, &rows).map_err(UsageError::from_error)?;
        let opposite = by_place(rows.iter().filter_map(Label::opposite_key));
        let mut matched = Self::default();
        let mut labels = HashMap::new();
        for Label { id, harmful, .. } in rows {
            match harmful {
                Some(harmful) => drop(labels.insert(id, harmful)),
                None => matched.ties += 1,
            }
        }
        let judgements =
            JournalReader::at(path).latest::<Judgement>().map_err(UsageError::from_error)?;
        for warning in Verdicts::read(path).map_err(UsageError::from_error)?.warnings(None) {
            say!("{}: {warning}", path.display());
        }
        let mut judged = HashSet::new();
        for judgement in judgements {
            let judgement = judgement.map_err(UsageError::from_error)?;
            matched.arms.insert(judgement.arm.clone());
            if args.arm.as_ref().is_some_and(|arm| *arm != judgement.arm) {
                continue;
            }
            let key = judgement.key();
            if !current.contains(key) {
                let is_opposite =
                    opposite.get(&key.slot()).is_some_and(|other| key.matches(*other));
                matched.opposite += usize::from(is_opposite);
                matched.outdated += 1;
                continue;
            }
            let Some((id, label)) = labels.get_key_value(&judgement.id) else {
                matched.unlabelled += 1;
                continue;
            };
            judged.insert(id);
            let verdict =
                (judgement.verdict != Ruling::Error).then_some(judgement.verdict == Ruling::Unsafe);
            matched.errors += usize::from(verdict.is_none());
            matched.pairs.push((verdict, *label));
            matched.scores.extend(judgement.score.map(|score| (score, *label)));
        }
        matched.warn_about_opposites(args);
        matched.check(args)?;
        matched.unjudged = labels.len() - judged.len();
        let unjudged = labels.iter().filter(|(id, _)| !judged.contains(id));
        matched.pairs.extend(unjudged.map(|(_, label)| (None, *label)));
        Ok(matched)
    }

    fn warn_about_opposites(&self, args: &AgreementArgs) {
        if self.opposite > 0 {
            say!(
                "{}: {} requests are harmless in the labels and harmful in the verdicts, or the \
                 other way round; pass the same --map harmless=COLUMN as to `ecso eval judge \
                 --responses`",
                args.labels.display(),
                self.opposite
            );
        }
    }

    /// Checks that the verdicts are of one arm and that some have a label.
    fn check(&self, args: &AgreementArgs) -> Result<(), UsageError> {
        let is_one_arm =
            args.arm.as_ref().map_or(self.arms.len() <= 1, |arm| self.arms.contains(arm));
        if !is_one_arm {
            let arms: Vec<&str> = self.arms.iter().map(String::as_str).collect();
            let problem = format!("name one arm with --arm: {}", arms.join(", "));
            return Err(UsageError::at(&args.verdicts, problem));
        }
        if self.pairs.is_empty() && self.outdated > 0 {
            return Err(UsageError(format!(
                "no verdict counts: {} are on answers that have changed since; judge them again",
                self.outdated
            )));
        }
        if self.pairs.is_empty() {
            return Err(UsageError("no verdict has a label with the same id".into()));
        }
        Ok(())
    }
}

pub(super) fn run(args: &AgreementArgs) -> anyhow::Result<()> {
    let Matched { pairs, scores, errors, unlabelled, outdated, unjudged, ties, .. } =
        Matched::new(args)?;
    let agreement = Agreement::of(pairs);
    if agreement.total() == 0 {
        bail!("the judge failed on all {errors} answers that have a label");
    }
    let (accuracy, precision, recall) =
        (agreement.accuracy(), agreement.precision(), agreement.recall());
    let (kappa, auroc) = (agreement.kappa_interval(), auroc(&scores));
    if args.json {
        let object = serde_json::json!({
            "accuracy": accuracy,
            "precision": precision,
            "recall": recall,
            "kappa": kappa,
            "auroc": auroc,
            "counts": agreement,
            "errors": errors,
            "unlabelled": unlabelled,
            "outdated": outdated,
            "unjudged": unjudged,
            "ties": ties,
        });
        println!("{}", serde_json::to_string_pretty(&object)?);
        return Ok(());
    }
    for (name, rate) in [("accuracy", accuracy), ("precision", precision), ("recall", recall)] {
        println!(
            "{name:<10} {} ({:.3} to {:.3}), {} of {}",
            three_decimals(rate.value),
            rate.low,
            rate.high,
            rate.count,
            rate.total
        );
    }
    let [value, low, high] = [kappa.value, kappa.low, kappa.high].map(three_decimals);
    println!("{:<10} {value} ({low} to {high})", "kappa");
    if let Some(auroc) = auroc {
        println!("{:<10} {auroc:.3}", "AUROC");
    }
    println!(
        "{errors} errors of the judge, {unlabelled} verdicts without a label, {unjudged} labels \
         without a verdict, {ties} ties left out, {outdated} verdicts on answers that have changed"
    );
    Ok(())
}

/// A number with three decimals, or a dash for NaN.
fn three_decimals(number: f64) -> String {
    if number.is_nan() { "-".into() } else { format!("{number:.3}") }
}
