//! How large the prompts of a question become. A profile that was edited in the page may repeat the
//! question, put a long mark before each of its lines, or cut it into many windows.

use std::collections::HashSet;

use axum::http::StatusCode;
use ecso::{Chat, Profile};
use serde_json::{Value, json};

use crate::{error::ApiError, json::collect_texts};

/// The prompts may gain this many times `limits.text` by the question.
const MAX_TIMES: usize = 16;

/// Returns an error if the prompts of a question would be too large.
pub(super) fn check(profile: &Profile, chat: &Chat, text_limit: usize) -> Result<(), ApiError> {
    let most = text_limit.saturating_mul(MAX_TIMES);
    if gain(profile, chat) <= most {
        return Ok(());
    }
    let message = format!(
        "under this profile, the question would take more than {most} bytes in all prompts: \
         shorten it, or repeat it less often in the templates"
    );
    Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "too_much_text", message))
}

/// At most how many bytes the prompts gain by the text of the question.
fn gain(profile: &Profile, chat: &Chat) -> usize {
    let text: String = chat.turns.iter().map(|turn| turn.joined_text() + "\n").collect();
    let part = |(name, part): (&String, &Value)| {
        // Each image is described by itself.
        let times = if name == "caption" { chat.image_count() } else { 1 };
        gain_of(part, &text, &profile.quote).saturating_mul(times)
    };
    let fields = json!(profile);
    fields.as_object().into_iter().flatten().map(part).fold(0, usize::saturating_add)
}

/// The gain of a part of a profile. Steps and questions are the objects with a template.
fn gain_of(part: &Value, text: &str, quote: &str) -> usize {
    let Value::Object(fields) = part else { return 0 };
    if !fields.contains_key("template") {
        return fields
            .values()
            .map(|part| gain_of(part, text, quote))
            .fold(0, usize::saturating_add);
    }
    let mut own = HashSet::new();
    collect_texts(part, &mut own);
    let holes: usize = own.iter().map(|text| text.matches('{').count()).sum();
    let templates = own.iter().filter(|text| text.contains('{')).count();
    let window = part["window"].as_u64().and_then(|window| usize::try_from(window).ok());
    let (count, filled) = windows(text, quote, window.unwrap_or(0));
    // Examples and system message come with every window.
    let repeated = (count - 1) * templates * own.iter().map(|text| text.len()).sum::<usize>();
    repeated.saturating_add(count.saturating_mul(holes).saturating_mul(filled))
}

/// The number of windows of a text, and at most how many bytes a placeholder takes in one of them.
fn windows(text: &str, quote: &str, window: usize) -> (usize, usize) {
    let (characters, lines) = (text.chars().count(), text.lines().count());
    if window == 0 || characters <= window {
        return (1, text.len() + lines * quote.len());
    }
    let width = if text.is_ascii() { 1 } else { 4 };
    let filled = text.len().min(window * width) + lines.min(window) * quote.len();
    (characters.div_ceil(window - window / 5), filled)
}
