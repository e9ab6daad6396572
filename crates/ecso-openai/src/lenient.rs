//! Lenient parsing of the JSON that servers send.

use ecso::{TopLogprob, Usage};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

use crate::surrogates;

/// Parses JSON that may begin with a byte order mark, contain halves of characters ([`surrogates`]:
/// join each text), or have Python's bare `NaN` and `Infinity`, which become `null`.
///
/// ```
/// let value: serde_json::Value = ecso_openai::lenient::parse("[1, NaN, -Infinity]")?;
/// assert_eq!(value, serde_json::json!([1, null, null]));
/// # Ok::<(), serde_json::Error>(())
/// ```
///
/// # Errors
/// Those of `serde_json`, if it is not even such JSON.
pub fn parse<T: DeserializeOwned>(json: &str) -> serde_json::Result<T> {
    let json = json.trim_start_matches('\u{FEFF}');
    surrogates::parse(json).or_else(|error| {
        let finite = finite(json);
        if finite == json { Err(error) } else { surrogates::parse(&finite) }
    })
}

/// The JSON with `null` for `NaN` and `Infinity` outside its strings.
fn finite(json: &str) -> String {
    let mut finite = String::with_capacity(json.len());
    let mut rest = json;
    while !rest.is_empty() {
        let (outside, text) = rest.split_at(rest.find('"').unwrap_or(rest.len()));
        finite += &outside
            .replace("-Infinity", "null")
            .replace("Infinity", "null")
            .replace("NaN", "null");
        let (text, behind) = text.split_at(string_length(text));
        finite += text;
        rest = behind;
    }
    finite
}

/// The length in bytes of the string at the start of a text, with its quotes.
fn string_length(text: &str) -> usize {
    let mut is_escaped = false;
    let end = text.bytes().skip(1).position(|byte| {
        let ends = byte == b'"' && !is_escaped;
        is_escaped = byte == b'\\' && !is_escaped;
        ends
    });
    end.map_or(text.len(), |end| end + 2)
}

/// Token counts. They are optional: what can't be read counts as missing.
pub(crate) fn usage(value: &Value) -> Option<Usage> {
    let (prompt, completion) = (count(&value["prompt_tokens"]), count(&value["completion_tokens"]));
    (prompt.is_some() || completion.is_some()).then(|| Usage {
        prompt_tokens: prompt.unwrap_or_default(),
        completion_tokens: completion.unwrap_or_default(),
    })
}

/// A count, also as `10.0` or `"10"`.
fn count(value: &Value) -> Option<u32> {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    text.strip_suffix(".0").unwrap_or(&text).parse().ok()
}

/// The likeliest tokens at one position, likeliest first. They are optional: what can't be read is
/// left out, and so are impossible tokens (minus infinity).
pub(crate) fn top_logprobs(position: &Value) -> Vec<TopLogprob> {
    let listed = position["top_logprobs"].as_array().map(Vec::as_slice).unwrap_or_default();
    let mut tokens: Vec<TopLogprob> = listed
        .iter()
        .filter_map(|entry| {
            let token = surrogates::join(entry["token"].as_str()?);
            Some(TopLogprob { token, logprob: logprob(&entry["logprob"])? })
        })
        .collect();
    tokens.sort_by(|a, b| b.logprob.total_cmp(&a.logprob));
    tokens
}

fn logprob(value: &Value) -> Option<f32> {
    let number =
        value.as_str().map_or_else(|| f32::deserialize(value).ok(), |text| text.parse().ok());
    number.filter(|number| number.is_finite())
}

/// A text: a string, or a list of parts with strings. Reasoning is left out.
pub(crate) fn text(value: &Value) -> String {
    parts(value, |kind| !is_reasoning(kind))
}

/// The reasoning among the parts of a text.
pub(crate) fn reasoning(value: &Value) -> String {
    if value.is_array() { parts(value, is_reasoning) } else { String::new() }
}

fn parts(value: &Value, is_meant: impl Fn(&str) -> bool + Copy) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts
            .iter()
            .map(|part| match part {
                Value::String(text) if is_meant("text") => text.clone(),
                _ if is_meant(part["type"].as_str().unwrap_or("text")) => {
                    let inner = ["text", "refusal", "thinking"].iter().map(|key| text(&part[*key]));
                    inner.collect()
                }
                _ => String::new(),
            })
            .collect(),
        _ => String::new(),
    }
}

fn is_reasoning(kind: &str) -> bool {
    matches!(kind, "thinking" | "reasoning")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn python_numbers_are_read_outside_strings_only() {
        let read: Value = parse(
            "\u{FEFF}{\"a\": [-Infinity, NaN,Infinity, 1], \"NaN\": \"\\\" -Infinity \\\\\"}",
        )
        .unwrap();
        assert_eq!(read, json!({"a": [null, null, null, 1], "NaN": "\" -Infinity \\"}));
        assert!(parse::<Value>("{\"a\": nan").is_err());
        assert!(parse::<Value>("NaN \"").is_err());
    }

    #[test]
    fn counts_are_read_as_servers_send_them() {
        for (sent, read) in [
            (json!({"prompt_tokens": 10, "completion_tokens": 3}), Some((10, 3))),
            (json!({"prompt_tokens": 10.0, "completion_tokens": "3"}), Some((10, 3))),
            (json!({"prompt_tokens": 10, "completion_tokens": -1}), Some((10, 0))),
            (json!({"prompt_tokens": "none", "completion_tokens": null}), None),
            (json!({"prompt_tokens": 0.5}), None),
            (json!({}), None),
            (json!("none"), None),
            (json!(null), None),
        ] {
            let found = usage(&sent).map(|usage| (usage.prompt_tokens, usage.completion_tokens));
            assert_eq!(found, read, "{sent}");
        }
    }

    #[test]
    fn log_probabilities_that_can_not_be_read_are_left_out() {
        let position = json!({"top_logprobs": [
            {"token": "a", "logprob": -2.5}, {"token": "b", "logprob": null}, {"token": "c", "logprob": "-inf"},
            {"token": "d", "logprob": "-Infinity"}, {"token": "e"}, {"token": 7, "logprob": -1}, null,
            {"token": "f", "logprob": -1},
        ]});
        let read: Vec<(String, f32)> =
            top_logprobs(&position).into_iter().map(|top| (top.token, top.logprob)).collect();
        assert_eq!(read, [("f".to_owned(), -1.0), ("a".to_owned(), -2.5)]);
        for nothing in [
            json!({"top_logprobs": null}),
            json!({"top_logprobs": {}}),
            json!({}),
            json!(null),
            json!(1),
        ] {
            assert_eq!(top_logprobs(&nothing), [], "{nothing}");
        }
    }

    #[test]
    fn a_text_may_be_a_list_of_parts() {
        let parts = json!([
            {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
            {"type": "text", "text": "A "}, "pe", {"type": "output_text", "text": "ar"}, {"type": "image"}, null,
        ]);
        assert_eq!((text(&parts), reasoning(&parts)), ("A pear".to_owned(), "Hm.".to_owned()));
        assert_eq!((text(&json!("x")), reasoning(&json!("x"))), ("x".to_owned(), String::new()));
        assert_eq!(text(&json!(null)), "");
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text in r#"["\\NaInfity\-:,😀]{0,30}"#) {
            let _ = parse::<Value>(&text);
        }
    }
}
