//! What a model said, wherever it said it: content, reasoning, refusals, tool calls; whole or in chunks.

use std::collections::BTreeMap;

use bytes::Bytes;
use ecso::{FinishReason, Reply};
use ecso_openai::{lenient, surrogates};
use futures::{Stream, StreamExt};
use serde_json::{Value, json};
use sse_stream::SseStream;

use crate::failure::Failure;

/// An answer as it came, all of it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Draft {
    /// A completion object.
    Whole(Value),
    /// The chunks of a stream.
    Chunks(Vec<Chunk>),
}

/// A chunk of a stream: as it came, and read.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Chunk {
    pub(crate) raw: String,
    pub(crate) value: Value,
}

impl Chunk {
    fn new(value: Value) -> Self {
        Self { raw: value.to_string(), value }
    }
}

/// Where in a choice something is said.
type Path = String;

impl Draft {
    /// Reads a completion.
    pub(crate) fn whole(body: &[u8]) -> Result<Self, Failure> {
        let unreadable = |why: String| Failure::upstream(format!("the upstream's answer can't be read: {why}"));
        let text = std::str::from_utf8(body).map_err(|error| unreadable(error.to_string()))?;
        let mut value: Value = lenient::parse(text).map_err(|error| unreadable(error.to_string()))?;
        heal(&mut value);
        Self::Whole(value).checked()
    }

    /// Reads a stream to its end.
    pub(crate) async fn chunks<E>(body: impl Stream<Item = Result<Bytes, E>> + Send + Unpin) -> Result<Self, Failure>
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        let broken = |error: &dyn std::fmt::Display| Failure::upstream(format!("the upstream's stream broke: {error}"));
        let mut events = SseStream::from_bytes_stream(body);
        let (mut chunks, mut ended) = (Vec::new(), false);
        while let Some(event) = events.next().await {
            let Some(raw) = event.map_err(|error| broken(&error))?.data else { continue };
            if raw.trim() == "[DONE]" {
                ended = true;
                break;
            }
            let value: Value = lenient::parse(&raw).map_err(|error| broken(&error))?;
            if let Some(error) = value.get("error").filter(|error| !error.is_null()) {
                return Err(broken(&error["message"].as_str().unwrap_or("it says no reason")));
            }
            chunks.push(Chunk { raw, value });
        }
        let draft = Self::Chunks(chunks).checked()?;
        if !ended && !draft.is_finished() {
            return Err(broken(&"it ended before the answer did"));
        }
        Ok(draft)
    }

    /// The answers of a model in this process, in the form in which the client wants them.
    pub(crate) fn replies(replies: &[Reply], id: &str, created: u64, model: &str, stream: bool) -> Self {
        let usage = replies.iter().filter_map(|reply| reply.usage).fold((0, 0), |sum, usage| {
            (sum.0 + u64::from(usage.prompt_tokens), sum.1 + u64::from(usage.completion_tokens))
        });
        let usage = json!({"prompt_tokens": usage.0, "completion_tokens": usage.1, "total_tokens": usage.0 + usage.1});
        let numbered = || replies.iter().enumerate();
        if !stream {
            let choices: Vec<Value> = numbered()
                .map(|(index, reply)| {
                    let message = json!({"role": "assistant", "content": reply.text});
                    json!({"index": index, "message": message, "finish_reason": finish(reply.finish)})
                })
                .collect();
            return Self::Whole(json!({"id": id, "object": "chat.completion", "created": created, "model": model,
                "choices": choices, "usage": usage}));
        }
        let head = || json!({"id": id, "object": "chat.completion.chunk", "created": created, "model": model});
        let chunk = |choices: Value| {
            let mut chunk = head();
            chunk["choices"] = choices;
            Chunk::new(chunk)
        };
        let mut chunks: Vec<Chunk> = numbered()
            .flat_map(|(index, reply)| {
                let delta = json!({"role": "assistant", "content": reply.text});
                [
                    json!([{"index": index, "delta": delta, "finish_reason": null}]),
                    json!([{"index": index, "delta": {}, "finish_reason": finish(reply.finish)}]),
                ]
            })
            .map(chunk)
            .collect();
        let mut last = head();
        (last["choices"], last["usage"]) = (json!([]), usage);
        chunks.push(Chunk::new(last));
        Self::Chunks(chunks)
    }

    /// An answer without a choice says nothing that could be judged, or passed on.
    fn checked(self) -> Result<Self, Failure> {
        if self.said().is_empty() { Err(Failure::upstream("the upstream's answer has no choices")) } else { Ok(self) }
    }

    fn values(&self) -> Box<dyn Iterator<Item = &Value> + '_> {
        match self {
            Self::Whole(value) => Box::new(std::iter::once(value)),
            Self::Chunks(chunks) => Box::new(chunks.iter().map(|chunk| &chunk.value)),
        }
    }

    fn is_finished(&self) -> bool {
        let mut finished: BTreeMap<u64, bool> = BTreeMap::new();
        for choice in self.values().flat_map(choices) {
            *finished.entry(index(choice)).or_default() |=
                choice["finish_reason"].as_str().is_some_and(|reason| !reason.is_empty());
        }
        finished.into_values().all(|finished| finished)
    }

    /// All that each choice says, its content first: what is judged.
    pub(crate) fn said(&self) -> BTreeMap<u64, String> {
        let mut said: BTreeMap<u64, BTreeMap<Path, String>> = BTreeMap::new();
        for choice in self.values().flat_map(choices) {
            let texts = said.entry(index(choice)).or_default();
            for (name, value) in choice.as_object().into_iter().flatten() {
                match name.as_str() {
                    "logprobs" | "finish_reason" | "stop_reason" | "index" => {}
                    "message" | "delta" => collect(value, "", texts),
                    _ => collect(value, name, texts),
                }
            }
        }
        said.into_iter()
            .map(|(index, mut texts)| {
                let content = texts.remove("content").unwrap_or_default();
                let all: Vec<String> = [content]
                    .into_iter()
                    .chain(texts.into_iter().map(|(path, text)| unescaped(&path, text)))
                    .filter(|text| !text.trim().is_empty())
                    .collect();
                // What stood on both sides of a cut is whole again.
                (index, surrogates::join(&all.join("\n")))
            })
            .collect()
    }

    /// The usage that the upstream tells.
    pub(crate) fn usage(&self) -> Option<Value> {
        self.values().filter_map(|value| value.get("usage")).filter(|usage| !usage.is_null()).last().cloned()
    }

    /// What every chunk or completion begins with: id, time, model.
    pub(crate) fn head(&self) -> Value {
        let first = self.values().next();
        let kept = ["id", "object", "created", "model"].map(|name| (name.to_owned(), first.map(|first| &first[name])));
        kept.into_iter().map(|(name, value)| (name, value.cloned().unwrap_or(Value::Null))).collect()
    }
}

/// Characters that were cut in two are whole again; what has no other half is told as such.
fn heal(value: &mut Value) {
    match value {
        Value::String(text) => *text = surrogates::join(text),
        Value::Array(list) => list.iter_mut().for_each(heal),
        Value::Object(fields) => fields.values_mut().for_each(heal),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// Arguments of a tool as they will be read: JSON text may spell every character as an escape.
fn unescaped(path: &str, text: String) -> String {
    if !path.ends_with("arguments") || !text.contains("\\u") {
        return text;
    }
    lenient::parse::<Value>(&text).map_or(text, |arguments| arguments.to_string())
}

/// The choices of a completion or chunk.
pub(crate) fn choices(value: &Value) -> impl Iterator<Item = &Value> {
    value["choices"].as_array().into_iter().flatten()
}

/// Which choice it is.
pub(crate) fn index(choice: &Value) -> u64 {
    choice["index"].as_u64().unwrap_or(0)
}

/// Adds every text in `value` under its path; names and ids of things are not said by the model.
fn collect(value: &Value, path: &str, texts: &mut BTreeMap<Path, String>) {
    match value {
        Value::String(text) => texts.entry(path.to_owned()).or_default().push_str(text),
        Value::Array(list) => {
            for (place, value) in list.iter().enumerate() {
                // A piece of a tool call says which call it belongs to.
                let place = value["index"].as_u64().unwrap_or(place as u64);
                collect(value, &format!("{path}.{place:04}"), texts);
            }
        }
        Value::Object(fields) => {
            for (name, value) in fields.iter().filter(|(name, _)| !matches!(name.as_str(), "role" | "id" | "type")) {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                collect(value, &path, texts);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

pub(crate) fn finish(finish: FinishReason) -> &'static str {
    match finish {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::ContentFilter => "content_filter",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_said_is_found() {
        let draft = Draft::whole(
            json!({"choices": [
                {"index": 0, "message": {"role": "assistant", "content": "one", "reasoning_content": "because",
                    "refusal": null, "tool_calls": [{"id": "x", "type": "function",
                        "function": {"name": "f", "arguments": "{\"a\": \"b\"}"}}]},
                    "finish_reason": "stop", "logprobs": {"content": [{"token": "one"}]}},
                {"index": 1, "message": {"content": [{"type": "text", "text": "two"}]}, "thoughts": "hm",
                    "finish_reason": "stop"},
                {"index": 2, "message": {"content": null}, "finish_reason": "stop"},
            ], "usage": {"total_tokens": 3}})
            .to_string()
            .as_bytes(),
        )
        .unwrap();
        let said = draft.said();
        assert_eq!(said[&0], "one\nbecause\n{\"a\": \"b\"}\nf");
        assert_eq!((said[&1].as_str(), said[&2].as_str()), ("two\nhm", ""));
        assert_eq!(draft.usage(), Some(json!({"total_tokens": 3})));
    }

    fn read(text: &[u8], size: usize) -> Result<Draft, Failure> {
        let parts: Vec<_> =
            text.chunks(size).map(|part| Ok::<_, std::io::Error>(Bytes::copy_from_slice(part))).collect();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(Draft::chunks(futures::stream::iter(parts)))
    }

    fn stream() -> String {
        let chunk = |value: Value| format!("data: {value}\n\n");
        let call = |function: Value| json!({"index": 1, "delta": {"tool_calls": [{"index": 0, "function": function}]}});
        let ended = |index: u8| json!({"index": index, "delta": {}, "finish_reason": "stop"});
        [
            ": hello\n\n".to_owned(),
            chunk(json!({"id": "c", "choices": [{"index": 0, "delta": {"role": "assistant", "content": "Äp"}}]})),
            chunk(json!({"choices": [
                {"index": 1, "delta": {"reasoning": "hm"}}, {"index": 0, "delta": {"content": "fel"}},
            ]})),
            chunk(json!({"choices": [call(json!({"name": "f", "arguments": "{"}))]})),
            chunk(json!({"choices": [call(json!({"arguments": "}"}))]})),
            chunk(json!({"choices": [ended(0), ended(1)]})),
            chunk(json!({"choices": [], "usage": {"total_tokens": 9}})),
            "data: [DONE]\n\n".to_owned(),
        ]
        .concat()
    }

    #[test]
    fn a_stream_split_anywhere_says_the_same() {
        let whole = read(stream().as_bytes(), 1_000_000).unwrap();
        assert_eq!(whole.said(), BTreeMap::from([(0, "Äpfel".into()), (1, "hm\n{}\nf".into())]));
        assert_eq!(whole.usage(), Some(json!({"total_tokens": 9})));
        for size in 1..40 {
            assert_eq!(read(stream().as_bytes(), size).unwrap(), whole);
        }
    }

    #[test]
    fn what_breaks_off_is_a_failure() {
        let stream = stream();
        let end = stream
            .find("data: {\"choices\":[{\"delta\":{},\"finish")
            .or_else(|| stream.find("\"finish_reason\":\"stop\""))
            .unwrap();
        for text in [
            &stream[..end],
            "",
            "data: nonsense\n\n",
            "data: {\"error\": {\"message\": \"no memory\"}}\n\n",
            "data: [DONE]\n\n",
        ] {
            assert_eq!(read(text.as_bytes(), 7).unwrap_err().code, "upstream_failed", "{text}");
        }
        for body in ["", "[]", "{\"choices\": []}", "{\"error\": {\"message\": \"x\"}}"] {
            assert!(Draft::whole(body.as_bytes()).is_err(), "{body}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_stream_panics(bytes: Vec<u8>) {
            let _ = read(&bytes, 5);
            let _ = read(&[b"data: ", &bytes[..], b"\n\n"].concat(), 3);
        }
    }
}
