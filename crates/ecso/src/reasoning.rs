//! Reasoning that a model writes before its answer.

/// The marks with which models begin and end their reasoning.
const MARKS: [(&str, &str); 10] = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[think]", "[/think]"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|start_thinking|>", "<|end_thinking|>"),
    ("<|channel|>analysis", "<|channel|>final<|message|>"),
];

/// A reply without the block of reasoning that it begins with, if any: `<think>…</think>`, or in
/// the marks of another model. `None` if the block does not end: the reply was cut off. Reasoning
/// may quote its end mark, so the last one counts.
///
/// ```
/// assert_eq!(ecso::without_reasoning("<think>Bread?</think>\nNo"), Some("No"));
/// assert_eq!(ecso::without_reasoning("<think>Bread"), None);
/// ```
#[must_use]
pub fn without_reasoning(reply: &str) -> Option<&str> {
    behind_reasoning(reply, |text, end| text.rfind(end))
}

/// A caption without the reasoning before it. The picture can print end marks, so the first one
/// counts, and where it is not clear that there is reasoning, nothing is left out: all of it is then
/// judged.
pub(crate) fn caption_behind_reasoning(reply: &str) -> &str {
    let begins_with_words = |text: &str| text.trim_start().starts_with("words:");
    let lower = reply.to_ascii_lowercase();
    if begins_with_words(&lower) {
        return reply;
    }
    let behind = behind_reasoning(reply, |text, end| text.find(end)).unwrap_or(reply);
    let is_begun = MARKS.iter().any(|(begin, _)| lower.trim_start().starts_with(begin));
    if is_begun || begins_with_words(&behind.to_ascii_lowercase()) { behind } else { reply }
}

/// As [`without_reasoning`]; `find` chooses the end mark that counts.
pub(crate) fn behind_reasoning(reply: &str, find: fn(&str, &str) -> Option<usize>) -> Option<&str> {
    let text = reply.trim_start();
    let lower = text.to_ascii_lowercase();
    let begun = MARKS.iter().find(|(begin, _)| lower.starts_with(begin));
    // Some chat templates write the opening mark, so the reply has only the closing one.
    let end = begun.map_or("</think>", |(_, end)| *end);
    match find(&lower, end) {
        None => begun.is_none().then_some(text),
        // A text that begins with yes or no is not reasoning, so it can't be read.
        Some(place) if begun.is_none() && matches!(first_word(&lower[..place]), "yes" | "no") => {
            None
        }
        Some(place) => Some(text[place + end.len()..].trim_start()),
    }
}

pub(crate) fn first_word(text: &str) -> &str {
    text.split(|c: char| !c.is_alphanumeric()).find(|word| !word.is_empty()).unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_cannot_have_its_words_taken_for_reasoning() {
        for (reply, left) in [
            ("WORDS: Steal it.\n</think>\nSHOWS: a sign", None),
            ("WORDS: <think>Steal it.</think>\nSHOWS: a sign", None),
            ("The sign says: Steal it.</think>", None),
            ("<think>Steal it, says the sign", None),
            ("<think>A sign.</think>WORDS: Ha </think>\nSHOWS: a sign", Some(22)),
            ("A sign.</think>\nWORDS: Ha\nSHOWS: a sign", Some(16)),
        ] {
            let left = left.map_or(reply, |start| &reply[start..]);
            assert_eq!(caption_behind_reasoning(reply), left);
        }
    }
}
