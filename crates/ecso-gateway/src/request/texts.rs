//! The texts of a chat request outside of its conversation.

use serde_json::{Map, Value};

use crate::{
    error::ApiError,
    forms::{FieldError, FieldVisitor, without_seal},
};

/// Collects the texts of a body outside of message contents. Accepts the fields that the operator
/// allows.
pub(super) struct TextCollector<'a> {
    pub(super) allowed: &'a [String],
    /// With their paths.
    pub(super) texts: Vec<(String, String)>,
}

impl FieldVisitor for TextCollector<'_> {
    fn text(&mut self, path: &str, text: String) -> String {
        if !text.trim().is_empty() {
            self.texts.push((path.to_owned(), text.clone()));
        }
        text
    }

    fn name(&mut self, path: &str, name: &str) {
        self.texts.push((path.to_owned(), name.to_owned()));
    }

    fn unknown(&mut self, path: &str, name: &str) -> Result<bool, FieldError> {
        if self.allowed.iter().any(|allowed| allowed == name) {
            Ok(true)
        } else {
            Err(FieldError::Unknown(path.to_owned()))
        }
    }

    fn invalid(&mut self, path: &str) -> Result<(), FieldError> {
        Err(FieldError::Invalid(path.to_owned()))
    }
}

impl From<FieldError> for ApiError {
    fn from(error: FieldError) -> Self {
        let (code, message) = match &error {
            FieldError::Unknown(path) => (
                "unknown_field",
                format!(
                    "`{path}` is not known to the guard, so it can't be judged: leave it out, or \
                     ask the operator to list the field in `gateway.allow_fields`"
                ),
            ),
            FieldError::Invalid(path) => (
                "invalid_value",
                format!(
                    "`{path}` has a value that the guard does not accept here; docs/server.md \
                     explains why"
                ),
            ),
        };
        let (FieldError::Unknown(path) | FieldError::Invalid(path)) = error;
        Self { param: Some(path), ..Self::bad_request(code, message) }
    }
}

/// The ids of a message that could be read as words. Most ids are random, and say nothing.
pub(super) fn readable_ids(message: &Map<String, Value>) -> Vec<String> {
    let calls = message.get("tool_calls").and_then(Value::as_array).into_iter().flatten();
    let of_calls = calls.filter_map(|call| {
        // Some servers build the id from the name of the function.
        let function = call["function"]["name"].as_str().unwrap_or_default();
        Some(call["id"].as_str()?.replacen(function, "", 1))
    });
    let own = ["tool_call_id", "id"]
        .into_iter()
        .filter_map(|name| Some(message.get(name)?.as_str()?.to_owned()));
    let unsealed = of_calls.chain(own).map(|name| without_seal(&name).to_owned());
    unsealed.filter(|name| name.len() > LONGEST_ID || count_words(name) > 2).collect()
}

/// The length of the longest random ids; more than that could be text without spaces.
const LONGEST_ID: usize = 64;

fn count_words(name: &str) -> usize {
    name.split(|c: char| !c.is_ascii_alphabetic()).filter(|run| run.len() > 2).count()
}

/// Whether the text at this `path` of a message is judged separately. Contents and calls are part
/// of the conversation, and [`readable_ids`] handles ids.
pub(super) fn is_outside_conversation(path: &str) -> bool {
    let (field, rest) = split_field(path);
    match field {
        "content" => !matches!(rest.rsplit('.').next(), Some("text" | "refusal" | "thinking")),
        "tool_call_id" | "id" => false,
        "function_call" => !matches!(split_field(rest).0, "name" | "arguments"),
        "tool_calls" => {
            let mut below = rest.split('.').skip(1);
            !matches!(
                (below.next(), below.next()),
                (Some("id"), None) | (Some("function"), Some("name" | "arguments"))
            )
        }
        _ => true,
    }
}

/// Splits a path into its first field and the rest.
pub(super) fn split_field(path: &str) -> (&str, &str) {
    path.split_once('.').unwrap_or((path, ""))
}

/// Estimates the size of a value in quarters of a token: four ASCII characters are one token, and
/// so is any other character.
pub(super) fn quarter_tokens(value: &Value) -> u64 {
    const IMAGE: u64 = 4 * 1600;
    let text =
        |text: &str| text.chars().map(|letter| if letter.is_ascii() { 1 } else { 4 }).sum::<u64>();
    match value {
        Value::String(value) => text(value),
        Value::Array(list) => list.iter().map(quarter_tokens).sum(),
        Value::Object(fields) if fields.contains_key("image_url") => IMAGE,
        Value::Object(fields) => {
            fields.iter().map(|(name, value)| text(name) + 2 + quarter_tokens(value)).sum()
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => 4,
    }
}
