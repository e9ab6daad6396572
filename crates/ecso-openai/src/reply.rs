//! Replies, complete or streamed. Malformed optional parts (log-probabilities, counts) never fail a
//! reply.

use std::sync::Once;

use ecso::{Cause, Delta, FinishReason, ModelError, Reply, TopLogprob, Usage};
use reqwest::StatusCode;
use serde_json::Value;

use crate::{
    complaint::{Complaint, beginning},
    lenient,
    surrogates::{Joiner, join},
};

/// Reads a complete reply.
pub(crate) fn complete(body: &[u8]) -> Result<Reply, ModelError> {
    let text = String::from_utf8_lossy(body);
    let body: Value = lenient::parse(&text).map_err(|error| {
        ModelError::Protocol(Cause::new(format!("{error} in {}", beginning(&text)), error))
    })?;
    let choice = &body["choices"][0];
    if !choice.is_object() {
        failure(&body)?;
        return Err(ModelError::Protocol("it has no choices".into()));
    }
    let content = Content::of(choice);
    let model = body["model"]
        .as_str()
        .filter(|name| !name.is_empty())
        .map(|name| name.chars().take(200).collect());
    Ok(Reply {
        first_token: content.first_token(choice, !content.reasoning.is_empty()),
        text: join(&content.text),
        reasoning: join(&content.reasoning),
        usage: lenient::usage(&body["usage"]),
        finish: finish(choice)?.unwrap_or_default(),
        model,
        took: None,
    })
}

/// The state of a streamed reply.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    reasoning: Joiner,
    text: Joiner,
    has_reasoned: bool,
    has_text: bool,
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
        let content = Content::of(choice);
        let mut deltas = Vec::new();
        if !content.reasoning.is_empty() {
            self.has_reasoned = true;
            self.held.clear();
            deltas.push(Delta::Reasoning(self.reasoning.push(&content.reasoning)));
        }
        if !self.has_text {
            deltas.extend(self.first_token(choice, &content));
        }
        if !content.text.is_empty() {
            deltas.push(Delta::Reasoning(self.reasoning.finish().to_owned()));
            deltas.push(Delta::Text(self.text.push(&content.text)));
        }
        deltas.retain(is_not_empty);
        Ok(deltas)
    }

    /// The log-probabilities of the text's first token, once the text begins. A token may come
    /// before its text (half a character, for example); it belongs to the text unless reasoning
    /// follows.
    fn first_token(&mut self, choice: &Value, content: &Content) -> Option<Delta> {
        let listed = content.first_token(choice, self.has_reasoned);
        if self.held.is_empty() {
            self.held = listed;
        }
        self.has_text = !content.text.is_empty();
        self.has_text.then(|| Delta::FirstToken(std::mem::take(&mut self.held)))
    }

    /// Ends the reply. A stream without a finish reason was cut off.
    pub(crate) fn end(mut self) -> Result<Vec<Delta>, ModelError> {
        let cut_off = || ModelError::Protocol("the stream broke off before its end".into());
        let finish = self.finish.ok_or_else(cut_off)?;
        let mut deltas = vec![
            Delta::FirstToken(self.held),
            Delta::Reasoning(self.reasoning.finish().to_owned()),
            Delta::Text(self.text.finish().to_owned()),
            Delta::End { finish, usage: self.usage, took: None },
        ];
        deltas.retain(is_not_empty);
        Ok(deltas)
    }
}

fn is_not_empty(delta: &Delta) -> bool {
    match delta {
        Delta::FirstToken(tokens) => !tokens.is_empty(),
        Delta::Reasoning(text) | Delta::Text(text) => !text.is_empty(),
        _ => true,
    }
}

/// The content of a choice or of a part of it. Halves of characters are not joined yet.
struct Content {
    reasoning: String,
    text: String,
}

impl Content {
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
                lenient::reasoning(content),
            ]),
            // A refusal comes in place of the content.
            text: first(vec![lenient::text(content), lenient::text(&message["refusal"])]),
        }
    }

    /// The log-probabilities of the text's first token. Some servers also list the tokens of the
    /// reasoning; if there is any, the first listed token must be the text's.
    fn first_token(&self, choice: &Value, has_reasoning: bool) -> Vec<TopLogprob> {
        let Some(listed) = choice["logprobs"]["content"].as_array() else { return Vec::new() };
        let Some(first) = listed.first() else { return Vec::new() };
        if has_reasoning && !self.begins_with(listed) {
            return Vec::new();
        }
        lenient::top_logprobs(first)
    }

    /// Whether the tokens are those of the text. If the reasoning begins with the same token, all
    /// tokens must match.
    fn begins_with(&self, listed: &[Value]) -> bool {
        let tokens: Vec<&str> =
            listed.iter().filter_map(|position| position["token"].as_str()).collect();
        let first = tokens.first().copied().unwrap_or_default();
        !first.is_empty()
            && self.text.starts_with(first)
            && (!self.reasoning.starts_with(first) || tokens.concat().starts_with(&self.text))
    }
}

/// Beginnings of finish reasons for a reply that the model ended.
const STOPPED: [&str; 7] = ["stop", "eos", "end", "complete", "done", "tool", "function"];

/// Why a choice ended; `None` if it has not. If the server aborted it, there is no reply. Unknown
/// reasons count as [`FinishReason::Length`], since the reply may be incomplete.
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
        _ if STOPPED.iter().any(|word| reason.starts_with(word)) => Some(FinishReason::Stop),
        _ => {
            if !["length", "max_tokens", "context"].iter().any(|word| reason.contains(word)) {
                WARN_ONCE.call_once(|| {
                    let reason: String = reason.chars().take(200).collect();
                    tracing::warn!(
                        reason,
                        "replies end for an unknown reason; they count as cut off"
                    );
                });
            }
            Some(FinishReason::Length)
        }
    })
}

/// One warning for a process.
static WARN_ONCE: Once = Once::new();

/// The error in a body that is not a reply, if it is one.
fn failure(body: &Value) -> Result<(), ModelError> {
    let is_error = match &body["error"] {
        Value::Object(fields) => !fields.is_empty(),
        Value::String(text) => !text.is_empty(),
        _ => body["object"] == "error",
    };
    if is_error { Err(Complaint::of(StatusCode::OK, body).midway_error()) } else { Ok(()) }
}

/// A server's list of models: the name of each, and its entry.
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
        _ => Err(ModelError::Protocol("it is not a list of models".into())),
    }
}

/// The fields of an entry that distinguish models of the same name, as one line of JSON: files,
/// size, context. Fields that change while the server runs are left out.
pub(crate) fn description(model: &Value) -> Option<String> {
    const FIELDS: [&str; 8] = [
        "root",
        "parent",
        "owned_by",
        "max_model_len",
        "context_length",
        "meta",
        "digest",
        "quantization",
    ];
    let fields =
        FIELDS.into_iter().filter_map(|name| Some((name.to_owned(), model.get(name)?.clone())));
    let fields: serde_json::Map<String, Value> =
        fields.filter(|(_, value)| !value.is_null()).collect();
    (!fields.is_empty()).then(|| Value::Object(fields).to_string())
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
        complete(body.as_bytes()).unwrap().first_token.into_iter().next().map(|top| top.token)
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
    fn malformed_optional_parts_never_fail_a_reply() {
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
                let reply = complete(body.as_bytes()).unwrap();
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
            for error in [complete(body.as_bytes()).err(), Progress::default().read(&body).err()] {
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
            assert_eq!(complete(body.as_bytes()).unwrap().finish, expected, "{reason}");
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
        let reply = complete(body.as_bytes()).unwrap();
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
                [complete(body.to_string().as_bytes()).unwrap_err(), failure(&body).unwrap_err()]
            {
                assert!(error.to_string().ends_with("out of memory"), "{error}");
                assert_eq!(matches!(error, ModelError::Filtered(_)), filtered, "{error}");
            }
        }
        let fine = json!({"choices": [{"message": {"content": "a"}}], "error": null});
        assert_eq!(complete(fine.to_string().as_bytes()).unwrap().text, "a");
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
        assert_eq!(description(&vllm("a/b", 1)), description(&vllm("a/b", 2)));
        assert_ne!(description(&vllm("a/b", 1)), description(&vllm("a/c", 1)));
        assert_eq!(description(&json!({"id": "m", "created": 3, "root": null})), None);
    }
}
