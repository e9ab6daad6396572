//! Fields of answers and labels from other programs: lenient about how these write a text, a
//! missing value or a boolean.

use ecso_eval::{
    benchmarks::is_image,
    item::Task,
    judge::{ArmAnswer, Case},
    text::cut,
};
use serde::{Deserialize, Deserializer, de::Error};
use serde_json::Value;

use super::table::joined;

/// An answer from another program. Its request counts as harmful unless it is known to be harmless.
pub(super) fn answer(
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

/// Deserializes a query: a text, or a list of texts that become lines.
pub(super) fn query<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    optional_query(deserializer)?
        .ok_or_else(|| D::Error::custom("its query is null, and must be a text"))
}

/// [`query`], or null.
pub(super) fn optional_query<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<String>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    let mut texts = value.as_array().into_iter().flatten().filter_map(Value::as_str);
    if let Some(path) = texts.find(|text| is_image(text)) {
        return Err(D::Error::custom(format_args!(
            "{} is an image, but judges of answers see only text: pass the text alone",
            cut(path)
        )));
    }
    let text = joined(&value, "\n");
    if text.is_none() && !value.is_null() {
        return Err(D::Error::custom(format_args!("{} is not a text", cut(&value))));
    }
    Ok(text)
}

/// Deserializes an answer; none if it is null or a table's word for a missing value.
pub(super) fn optional_answer<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<String>, D::Error> {
    let answer = optional_query(deserializer)?;
    Ok(answer.filter(|answer| !is_missing_value(answer)))
}

/// Whether a cell has a word for a missing value, as pandas, SQL and spreadsheets write it.
fn is_missing_value(cell: &str) -> bool {
    const MISSING: [&str; 11] =
        ["nan", "<na>", "null", "none", "na", "n/a", "#n/a", "undefined", "\\n", "[]", "{}"];
    let cell = cell.trim().trim_matches(['"', '\'']).to_lowercase();
    MISSING.contains(&cell.as_str())
}

/// Deserializes whether a request is harmless: a boolean, or a text that means one; none if empty.
pub(super) fn optional_harmless<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<bool>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    let text = joined(&value, " ").unwrap_or_default();
    if text.trim().is_empty() && !value.is_object() {
        return Ok(None);
    }
    let is_harmless = parse_bool(&text).or_else(|| Some(!parse_harm_label(&text)?));
    is_harmless.map(Some).ok_or_else(|| {
        D::Error::custom(format_args!("harmless is {}; it must be true or false", cut(&value)))
    })
}

/// Parses a boolean in one of its many spellings.
pub(super) fn parse_bool(text: &str) -> Option<bool> {
    match text.trim().to_lowercase().as_str() {
        "1" | "1.0" | "true" | "t" | "yes" | "y" => Some(true),
        "0" | "0.0" | "false" | "f" | "no" | "n" => Some(false),
        _ => None,
    }
}

/// Whether a label means harmful. A number may precede it, as in "2 - unsafe".
pub(super) fn parse_harm_label(label: &str) -> Option<bool> {
    let label = label.to_lowercase();
    let words: Vec<&str> =
        label.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
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
