//! What comes back, whole or in pieces. What is only wished for (log-probabilities, counts) never
//! fails a reply.

use std::sync::Once;

use ecso::{Cause, Delta, FinishReason, ModelError, Reply, TopLogprob, Usage};
use reqwest::StatusCode;
use serde_json::Value;

use crate::{
    complaint::{Complaint, start},
    lenient,
    surrogates::{Joiner, join},
};

/// Reads a whole reply.
pub(crate) fn whole(body: &[u8]) -> Result<Reply, ModelError> {
    let text = String::from_utf8_lossy(body);
    let body: Value = lenient::parse(&text).map_err(|error| {
        ModelError::Protocol(Cause::new(format!("{error} in {}", start(&text)), error))
    })?;
    let choice = &body["choices"][0];
    if !choice.is_object() {
        failure(&body)?;
        return Err(ModelError::Protocol("there is no choice in it".into()));
    }
    let said = Said::of(choice);
    let model = body["model"]
        .as_str()
        .filter(|name| !name.is_empty())
        .map(|name| name.chars().take(200).collect());
    Ok(Reply {
        first_token: said.first_token(choice, !said.reasoning.is_empty()),
        text: join(&said.text),
        reasoning: join(&said.reasoning),
        usage: lenient::usage(&body["usage"]),
        finish: finish(choice)?.unwrap_or_default(),
        model,
        took: None,
    })
}

/// A streamed reply, while it is read.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    reasoning: Joiner,
    text: Joiner,
    has_reasoned: bool,
    has_begun: bool,
    /// Log-probabilities that came before any text.
    held: Vec<TopLogprob>,
    finish: Option<FinishReason>,
    usage: Option<Usage>,
}

impl Progress {
    /// Reads one event.
    pub(crate) fn read(&mut self, event: &str) -> Result<Vec<Delta>, ModelError> {
        let chunk: Value = lenient::parse(event).map_err(|error| {
            ModelError::Protocol(Cause::new(format!("{error} in a stream event"), error))
        })?;
        failure(&chunk)?;
        self.usage = lenient::usage(&chunk["usage"]).or(self.usage);
        let choice = &chunk["choices"][0];
        self.finish = finish(choice)?.or(self.finish);
        let said = Said::of(choice);
        let mut deltas = Vec::new();
        if !said.reasoning.is_empty() {
            self.has_reasoned = true;
            self.held.clear();
            deltas.push(Delta::Reasoning(self.reasoning.push(&said.reasoning)));
        }
        if !self.has_begun {
            deltas.extend(self.first_token(choice, &said));
        }
        if !said.text.is_empty() {
            deltas.push(Delta::Reasoning(self.reasoning.finish().to_owned()));
            deltas.push(Delta::Text(self.text.push(&said.text)));
        }
        deltas.retain(says_something);
        Ok(deltas)
    }

    /// The log-probabilities of the text's first token, once the text begins. A token may come
    /// before its text (half a character, say); it is the text's unless thoughts come between.
    fn first_token(&mut self, choice: &Value, said: &Said) -> Option<Delta> {
        let listed = said.first_token(choice, self.has_reasoned);
        if self.held.is_empty() {
            self.held = listed;
        }
        self.has_begun = !said.text.is_empty();
        self.has_begun.then(|| Delta::FirstToken(std::mem::take(&mut self.held)))
    }

    /// The end. A stream that never said why it ended was cut off.
    pub(crate) fn end(mut self) -> Result<Vec<Delta>, ModelError> {
        let cut_off = || ModelError::Protocol("the stream broke off before its end".into());
        let finish = self.finish.ok_or_else(cut_off)?;
        let mut deltas = vec![
            Delta::FirstToken(self.held),
            Delta::Reasoning(self.reasoning.finish().to_owned()),
            Delta::Text(self.text.finish().to_owned()),
            Delta::End { finish, usage: self.usage, took: None },
        ];
        deltas.retain(says_something);
        Ok(deltas)
    }
}

fn says_something(delta: &Delta) -> bool {
    match delta {
        Delta::FirstToken(tokens) => !tokens.is_empty(),
        Delta::Reasoning(text) | Delta::Text(text) => !text.is_empty(),
        _ => true,
    }
}

/// What a choice says, whole or in part; halves of characters are not joined yet.
struct Said {
    reasoning: String,
    text: String,
}

impl Said {
    fn of(choice: &Value) -> Self {
        let delta = Some(&choice["delta"])
            .filter(|delta| delta.as_object().is_some_and(|fields| !fields.is_empty()));
        let message = delta.unwrap_or(&choice["message"]);
        let first = |mut texts: Vec<String>| {
            let at = texts.iter().position(|text| !text.is_empty());
            at.map(|at| texts.swap_remove(at)).unwrap_or_default()
        };
        let content = &message["content"];
        Self {
            reasoning: first(vec![
                lenient::text(&message["reasoning_content"]),
                lenient::text(&message["reasoning"]),
                lenient::thoughts(content),
            ]),
            // A refusal stands in the place of a content.
            text: first(vec![lenient::text(content), lenient::text(&message["refusal"])]),
        }
    }

    /// The log-probabilities of the text's first token. Some servers list the tokens of thoughts as
    /// well: where there are `thoughts`, the first token that is listed must be the text's.
    fn first_token(&self, choice: &Value, thoughts: bool) -> Vec<TopLogprob> {
        let Some(listed) = choice["logprobs"]["content"].as_array() else { return Vec::new() };
        let Some(first) = listed.first() else { return Vec::new() };
        if thoughts && !self.begins_with(listed) {
            return Vec::new();
        }
        lenient::top_logprobs(first)
    }

    /// Whether the tokens are those of the text. Where thoughts begin with the same token, all of
    /// them must be.
    fn begins_with(&self, listed: &[Value]) -> bool {
        let tokens: Vec<&str> =
            listed.iter().filter_map(|position| position["token"].as_str()).collect();
        let first = tokens.first().copied().unwrap_or_default();
        !first.is_empty()
            && self.text.starts_with(first)
            && (!self.reasoning.starts_with(first) || tokens.concat().starts_with(&self.text))
    }
}

/// How hosts begin the word for a model that was done.
const DONE: [&str; 7] = ["stop", "eos", "end", "complete", "done", "tool", "function"];

/// Why a choice ended; `None` if it has not. A server that gave up on it has made no reply. A reply
/// that ended for a reason that nobody knows counts as one that is not whole.
fn finish(choice: &Value) -> Result<Option<FinishReason>, ModelError> {
    let reason = choice["finish_reason"].as_str().unwrap_or_default().to_ascii_lowercase();
    Ok(match reason.as_str() {
        "" => None,
        "error" | "abort" | "aborted" | "cancelled" | "canceled" => {
            return Err(ModelError::Transport(format!("the server broke off: {reason}").into()));
        }
        // Hosts name their filters in many ways: SAFETY, sensitive, content_filter: …
        _ if ["filter", "safety", "sensitive", "prohibited", "blocklist", "refusal"]
            .iter()
            .any(|word| reason.contains(word)) =>
        {
            Some(FinishReason::ContentFilter)
        }
        _ if DONE.iter().any(|word| reason.starts_with(word)) => Some(FinishReason::Stop),
        _ => {
            if !["length", "max_tokens", "context"].iter().any(|word| reason.contains(word)) {
                TELL_ONCE.call_once(|| {
                    let reason: String = reason.chars().take(200).collect();
                    tracing::warn!(
                        reason,
                        "replies end for a reason that is not known; they count as cut"
                    );
                });
            }
            Some(FinishReason::Length)
        }
    })
}

/// Whoever asks a server a thousand times is told once.
static TELL_ONCE: Once = Once::new();

/// An error in the place of a reply.
fn failure(body: &Value) -> Result<(), ModelError> {
    let is_error = match &body["error"] {
        Value::Object(fields) => !fields.is_empty(),
        Value::String(text) => !text.is_empty(),
        _ => body["object"] == "error",
    };
    if is_error { Err(Complaint::of(StatusCode::OK, body).midway()) } else { Ok(()) }
}

/// A server's list of models: their names, and what it says of each.
pub(crate) fn models(body: &[u8]) -> Result<Vec<(String, Value)>, ModelError> {
    let mut list: Value = lenient::parse(&String::from_utf8_lossy(body))
        .map_err(|error| ModelError::Protocol(Cause::from_error(error)))?;
    let models = match list.get_mut("data") {
        Some(models) => models.take(),
        None => list,
    };
    let named = |model: Value| Some((model["id"].as_str()?.to_owned(), model));
    match models {
        Value::Array(models) => Ok(models.into_iter().filter_map(named).collect()),
        Value::Null => Ok(Vec::new()),
        _ => Err(ModelError::Protocol("it is no list of models".into())),
    }
}

/// What of a list's entry tells one model from another of the same name, as one line of JSON: its
/// files, its size, its context. When the server was started, and what it is doing, is none of
/// that.
pub(crate) fn tells(model: &Value) -> Option<String> {
    const TELLING: [&str; 8] = [
        "root",
        "parent",
        "owned_by",
        "max_model_len",
        "context_length",
        "meta",
        "digest",
        "quantization",
    ];
    let told =
        TELLING.into_iter().filter_map(|name| Some((name.to_owned(), model.get(name)?.clone())));
    let told: serde_json::Map<String, Value> = told.filter(|(_, value)| !value.is_null()).collect();
    (!told.is_empty()).then(|| Value::Object(told).to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn position(token: &str) -> Value {
        json!({"token": token, "logprob": -0.5, "top_logprobs": [{"token": token, "logprob": -0.5}]})
    }

    fn first(message: &Value, tokens: &[&str]) -> Option<String> {
        let tokens: Vec<Value> = tokens.iter().map(|token| position(token)).collect();
        let body =
            json!({"choices": [{"message": message, "logprobs": {"content": tokens}}]}).to_string();
        whole(body.as_bytes()).unwrap().first_token.into_iter().next().map(|top| top.token)
    }

    fn streamed(events: &[Value]) -> Vec<Delta> {
        let mut progress = Progress::default();
        let mut deltas: Vec<Delta> =
            events.iter().flat_map(|event| progress.read(&event.to_string()).unwrap()).collect();
        deltas.extend(progress.end().unwrap());
        deltas
    }

    fn told(deltas: &[Delta]) -> Vec<&str> {
        let told = deltas.iter().map(|delta| match delta {
            Delta::FirstToken(tokens) => tokens[0].token.as_str(),
            Delta::Reasoning(text) | Delta::Text(text) => text,
            _ => "end",
        });
        told.collect()
    }

    #[test]
    fn log_probabilities_are_those_of_the_text_and_never_of_thoughts() {
        let plain = json!({"content": "Yes."});
        assert_eq!(first(&plain, &["Yes", "."]).as_deref(), Some("Yes"));
        let thinking = json!({"reasoning_content": "Is it? It is.", "content": "Yes."});
        assert_eq!(first(&thinking, &["Yes", "."]).as_deref(), Some("Yes"));
        assert_eq!(first(&thinking, &["Is", " it", "?"]), None);
        assert_eq!(first(&thinking, &[""]), None);
        let alike = json!({"reasoning": "Yes, I think.", "content": "Yes."});
        assert_eq!(first(&alike, &["Yes", ",", " I", " think", "."]), None);
        assert_eq!(first(&alike, &["Yes", ".", "<end>"]).as_deref(), Some("Yes"));
    }

    #[test]
    fn a_stream_of_thoughts_and_text_tells_them_apart() {
        let chunk = |delta: Value, token: &str| {
            let logprobs = json!({"content": [position(token)]});
            json!({"choices": [{"delta": delta, "logprobs": logprobs}]})
        };
        let end = json!({"choices": [{"delta": {}, "finish_reason": "stop"}]});
        let deltas = streamed(&[
            chunk(json!({}), "<think>"),
            chunk(json!({"reasoning_content": "Is it?", "reasoning": "Is it?"}), "Is it?"),
            chunk(json!({"content": ""}), "</think>"),
            chunk(json!({"content": "Yes"}), "Yes"),
            chunk(json!({"content": "."}), "."),
            end.clone(),
        ]);
        assert!(
            matches!(&deltas[1], Delta::FirstToken(_)) && matches!(&deltas[0], Delta::Reasoning(_)),
            "{deltas:?}"
        );
        assert_eq!(told(&deltas), ["Is it?", "Yes", "Yes", ".", "end"]);
        // Half a character shows no text, and is its first token all the same.
        let deltas = streamed(&[
            chunk(json!({"content": ""}), "\u{FFFD}"),
            chunk(json!({"content": "ä"}), "x"),
            end.clone(),
        ]);
        assert_eq!(told(&deltas), ["\u{FFFD}", "ä", "end"]);
        // What comes with later text is not the first token's.
        let deltas = streamed(&[
            json!({"choices": [{"delta": {"content": "Ye"}}]}),
            chunk(json!({"content": "s"}), "s"),
            end,
        ]);
        assert_eq!(told(&deltas), ["Ye", "s", "end"]);
    }

    #[test]
    fn what_is_only_wished_for_never_fails_a_reply() {
        for logprobs in [
            "null",
            "1",
            "[]",
            "{}",
            r#"{"content": null}"#,
            r#"{"content": [null]}"#,
            r#"{"content": [{}]}"#,
            r#"{"content": [{"token": "a", "logprob": null, "top_logprobs": null}]}"#,
            r#"{"content": [{"token": "a", "top_logprobs": [{"token": "a", "logprob": "-inf"}]}]}"#,
            r#"{"content": [{"token": "a", "top_logprobs": [{"token": "a", "logprob": -Infinity}]}]}"#,
        ] {
            for usage in
                ["null", "\"none\"", "{}", r#"{"prompt_tokens": -1}"#, r#"{"prompt_tokens": NaN}"#]
            {
                let body = format!(
                    r#"{{"choices": [{{"message": {{"content": ["hi"]}}, "logprobs": {logprobs}}}], "usage": {usage}}}"#
                );
                let reply = whole(body.as_bytes()).unwrap();
                assert_eq!(reply, Reply { text: "hi".into(), ..Reply::default() }, "{body}");
                let event = body.replace("message", "delta");
                let deltas = Progress::default().read(&event).unwrap();
                assert_eq!(deltas, [Delta::Text("hi".into())], "{event}");
            }
        }
        let usage =
            json!({"choices": null, "usage": {"prompt_tokens": 10.0, "completion_tokens": 2}});
        let deltas =
            streamed(&[json!({"choices": [{"delta": {}, "finish_reason": "stop"}]}), usage]);
        let usage = Some(Usage { prompt_tokens: 10, completion_tokens: 2 });
        assert_eq!(deltas, [Delta::End { finish: FinishReason::Stop, usage, took: None }]);
    }

    #[test]
    fn what_a_server_gave_up_on_is_no_reply() {
        for reason in ["error", "abort", "Cancelled"] {
            let body = json!({"choices": [{"message": {"content": "a"}, "finish_reason": reason}]})
                .to_string();
            for error in [whole(body.as_bytes()).err(), Progress::default().read(&body).err()] {
                assert!(matches!(error, Some(ModelError::Transport(_))), "{reason}: {error:?}");
            }
        }
    }

    #[test]
    fn a_reply_is_whole_where_its_end_is_known() {
        let (stop, length, filter) =
            (FinishReason::Stop, FinishReason::Length, FinishReason::ContentFilter);
        for (reason, expected) in [
            ("stop", stop),
            ("STOP", stop),
            ("eos_token", stop),
            ("end_turn", stop),
            ("COMPLETE", stop),
            ("tool_calls", stop),
            ("length", length),
            ("model_length", length),
            ("MAX_TOKENS", length),
            ("content_filter: bread", filter),
            ("insufficient_system_resource", length),
            ("incomplete", length),
        ] {
            let body =
                json!({"choices": [{"message": {"content": "Mix"}, "finish_reason": reason}]})
                    .to_string();
            assert_eq!(whole(body.as_bytes()).unwrap().finish, expected, "{reason}");
        }
    }

    #[test]
    fn an_empty_finish_reason_is_no_end() {
        let mut progress = Progress::default();
        progress
            .read(r#"{"choices": [{"delta": {"content": "a"}, "finish_reason": ""}]}"#)
            .unwrap();
        assert!(
            matches!(progress.end(), Err(ModelError::Protocol(cause)) if cause.message().contains("broke off"))
        );
    }

    #[test]
    fn a_character_in_two_events_is_read() {
        let event = |key: &str, half: &str| {
            format!(r#"{{"choices": [{{"delta": {{"{key}": "{half}"}}}}]}}"#)
        };
        let mut progress = Progress::default();
        let mut deltas = Vec::new();
        for (key, half) in [
            ("reasoning", r"\ud83d"),
            ("reasoning", r"\ude00"),
            ("reasoning", r"\ud83d"),
            ("content", r"a\ud83d"),
            ("content", r"\ude00b"),
            ("content", r"\ud83d"),
        ] {
            deltas.extend(progress.read(&event(key, half)).unwrap());
        }
        deltas.extend(progress.read(r#"{"choices": [{"finish_reason": "stop"}]}"#).unwrap());
        deltas.extend(progress.end().unwrap());
        assert_eq!(told(&deltas), ["😀", "\u{FFFD}", "a", "😀b", "\u{FFFD}", "end"]);
        let body = r#"{"choices": [{"message": {"content": "a\ud83d\ude00\ud83d", "reasoning": "\ude00"}}]}"#;
        let reply = whole(body.as_bytes()).unwrap();
        assert_eq!((reply.text.as_str(), reply.reasoning.as_str()), ("a😀\u{FFFD}", "\u{FFFD}"));
    }

    #[test]
    fn an_error_in_the_place_of_a_reply_is_told() {
        for (body, filtered) in [
            (json!({"error": {"message": "out of memory", "code": 500}}), false),
            (json!({"object": "error", "message": "out of memory"}), false),
            (json!({"error": {"message": "out of memory", "code": "content_filter"}}), true),
        ] {
            for error in
                [whole(body.to_string().as_bytes()).unwrap_err(), failure(&body).unwrap_err()]
            {
                assert!(error.to_string().ends_with("out of memory"), "{error}");
                assert_eq!(matches!(error, ModelError::Filtered(_)), filtered, "{error}");
            }
        }
        let fine = json!({"choices": [{"message": {"content": "a"}}], "error": null});
        assert_eq!(whole(fine.to_string().as_bytes()).unwrap().text, "a");
    }

    #[test]
    fn model_lists_are_read_in_all_their_forms() {
        for (body, names) in [
            (r#"{"data": [{"id": "a"}, {"id": "b"}, {}]}"#, Some(vec!["a", "b"])),
            (r#"[{"id": "a"}]"#, Some(vec!["a"])),
            (r#"{"data": null}"#, Some(vec![])),
            (r#"{"models": 1}"#, None),
            ("<html>", None),
        ] {
            let read = models(body.as_bytes()).ok();
            let read: Option<Vec<String>> =
                read.map(|models| models.into_iter().map(|(name, _)| name).collect());
            assert_eq!(read, names.map(|names| names.into_iter().map(str::to_owned).collect()));
        }
    }

    #[test]
    fn a_model_is_told_by_its_files_and_not_by_when_it_was_started() {
        let vllm = |root: &str, created: u64| {
            let permission = json!([{"id": format!("modelperm-{created}")}]);
            json!({"id": "m", "object": "model", "created": created, "root": root, "max_model_len": 4096, "permission": permission})
        };
        assert_eq!(tells(&vllm("a/b", 1)), tells(&vllm("a/b", 2)));
        assert_ne!(tells(&vllm("a/b", 1)), tells(&vllm("a/c", 1)));
        assert_eq!(tells(&json!({"id": "m", "created": 3, "root": null})), None);
    }
}
