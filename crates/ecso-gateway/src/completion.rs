//! The answer of a model: its known fields, whole or in chunks. Everything that goes to a client is
//! built from these, and every text in them is judged.

use std::{collections::BTreeMap, sync::Arc};

use async_stream::try_stream;
use bytes::Bytes;
use ecso::{Chat, Delta, FinishReason, Mllm, Reply, Sampling, Usage};
use ecso_openai::{lenient, surrogates};
use futures::{Stream, StreamExt, TryStreamExt, stream::BoxStream};
use serde_json::{Map, Value, json};
use sse_stream::SseStream;

use crate::{
    error::ApiError,
    fields::{FUNCTION_CALL, SIGNATURES, THINKING_BLOCK, TOOL_CALL},
    forms::{FieldError, FieldVisitor, Form, known_fields, without_seal},
};

/// The message of a choice, or a chunk of it.
const MESSAGE: &[(&str, Form)] = &[
    ("role", Form::OneOf(&["assistant"])),
    ("content", Form::AnyOf(&[Form::Text, Form::List(&PART)])),
    ("refusal", Form::Text),
    ("reasoning", Form::Text),
    ("reasoning_content", Form::Text),
    ("reasoning_details", Form::List(&THINKING_BLOCK)),
    ("thinking_blocks", Form::List(&THINKING_BLOCK)),
    ("tool_calls", Form::List(&TOOL_CALL)),
    ("function_call", FUNCTION_CALL),
    ("annotations", Form::List(&ANNOTATION)),
    ("thought_signature", Form::Opaque),
    ("extra_content", SIGNATURES),
    ("provider_specific_fields", SIGNATURES),
];

const PART: Form = Form::Object(&[
    ("type", Form::OneOf(&["text", "output_text", "refusal", "thinking", "reasoning"])),
    ("text", Form::Text),
    ("refusal", Form::Text),
    ("thinking", Form::AnyOf(&[Form::Text, Form::List(&TEXT)])),
    ("signature", Form::Opaque),
    ("closed", Form::Scalar),
]);

const TEXT: Form = Form::Object(&[("type", Form::OneOf(&["text"])), ("text", Form::Text)]);

const ANNOTATION: Form = Form::Object(&[
    ("type", Form::OneOf(&["url_citation"])),
    (
        "url_citation",
        Form::Object(&[
            ("url", Form::Text),
            ("title", Form::Text),
            ("content", Form::Text),
            ("start_index", Form::Scalar),
            ("end_index", Form::Scalar),
        ]),
    ),
]);

/// What goes out in addition to the choices: numbers, and words of a fixed list.
const FRAME: &[(&str, Form)] = &[
    ("created", Form::Scalar),
    ("usage", USAGE),
    ("timings", TIMINGS),
    (
        "service_tier",
        Form::OneOf(&["auto", "default", "flex", "scale", "priority", "standard", "on_demand"]),
    ),
];

const USAGE: Form = Form::Object(&[
    ("prompt_tokens", Form::Scalar),
    ("completion_tokens", Form::Scalar),
    ("total_tokens", Form::Scalar),
    ("prompt_tokens_details", DETAILS),
    ("completion_tokens_details", DETAILS),
    ("prompt_cache_hit_tokens", Form::Scalar),
    ("prompt_cache_miss_tokens", Form::Scalar),
    ("cache_creation_input_tokens", Form::Scalar),
    ("cache_read_input_tokens", Form::Scalar),
    ("queue_time", Form::Scalar),
    ("prompt_time", Form::Scalar),
    ("completion_time", Form::Scalar),
    ("total_time", Form::Scalar),
    ("cost", Form::Scalar),
]);

const DETAILS: Form = Form::Object(&[
    ("cached_tokens", Form::Scalar),
    ("cache_write_tokens", Form::Scalar),
    ("audio_tokens", Form::Scalar),
    ("image_tokens", Form::Scalar),
    ("video_tokens", Form::Scalar),
    ("text_tokens", Form::Scalar),
    ("reasoning_tokens", Form::Scalar),
    ("accepted_prediction_tokens", Form::Scalar),
    ("rejected_prediction_tokens", Form::Scalar),
]);

const TIMINGS: Form = Form::Object(&[
    ("cache_n", Form::Scalar),
    ("prompt_n", Form::Scalar),
    ("prompt_ms", Form::Scalar),
    ("prompt_per_token_ms", Form::Scalar),
    ("prompt_per_second", Form::Scalar),
    ("predicted_n", Form::Scalar),
    ("predicted_ms", Form::Scalar),
    ("predicted_per_token_ms", Form::Scalar),
    ("predicted_per_second", Form::Scalar),
    ("draft_n", Form::Scalar),
    ("draft_n_accepted", Form::Scalar),
]);

/// The tokens of an answer with their log-probabilities.
const TOKEN: &[(&str, Form)] = &[("token", Form::Text), ("logprob", Form::Scalar)];

/// The known fields of an answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Completion {
    frame: Map<String, Value>,
    choices: BTreeMap<u64, Choice>,
}

/// One choice of an answer.
#[derive(Debug, Clone, Default, PartialEq)]
struct Choice {
    /// Its message, in the chunks in which it arrived. An answer that is not a stream has one.
    chunks: Vec<Chunk>,
    texts: ChoiceTexts,
}

/// A chunk of a choice, or the whole.
#[derive(Debug, Clone, PartialEq)]
struct Chunk {
    message: Map<String, Value>,
    finish: Option<&'static str>,
    /// For each token of its content. Null if the client did not ask.
    logprobs: Value,
}

/// The texts of a choice, joined across chunks, by path.
#[derive(Debug, Clone, Default, PartialEq)]
struct ChoiceTexts {
    texts: BTreeMap<String, String>,
    names: BTreeMap<String, String>,
    joiners: BTreeMap<String, surrogates::Joiner>,
    /// The length of all texts, in quarters of a token.
    length: usize,
}

impl FieldVisitor for ChoiceTexts {
    fn text(&mut self, path: &str, text: String) -> String {
        // Half a surrogate pair waits for the other half, at the same path in a later chunk.
        let text = self.joiners.entry(path.to_owned()).or_default().push(&text);
        self.length += text.chars().map(quarter_tokens).sum::<usize>();
        self.texts.entry(path.to_owned()).or_default().push_str(&text);
        text
    }

    fn name(&mut self, path: &str, name: &str) {
        let name = without_seal(name);
        if self.names.get(path).is_none_or(|known| known != name) {
            self.names.insert(path.to_owned(), name.to_owned());
            self.texts.entry(path.to_owned()).or_default().push_str(name);
        }
    }

    fn unknown(&mut self, _: &str, _: &str) -> Result<bool, FieldError> {
        Ok(false)
    }

    fn invalid(&mut self, _: &str) -> Result<(), FieldError> {
        Ok(())
    }
}

impl Choice {
    /// Adds a choice of an answer, or of one event.
    fn add(&mut self, mut choice: Map<String, Value>) {
        let message = ["message", "delta"].into_iter().find_map(|name| choice.remove(name));
        let Some(Value::Object(message)) = message.or_else(|| Some(Map::new().into())) else {
            return;
        };
        let message = known_fields(MESSAGE, message, "", &mut self.texts).unwrap_or_default();
        let content = message.get("content").and_then(Value::as_str).unwrap_or_default();
        let logprobs = content_logprobs(choice.remove("logprobs"), content);
        let finish =
            choice.get("finish_reason").and_then(Value::as_str).filter(|reason| !reason.is_empty());
        self.chunks.push(Chunk { logprobs, finish: finish.map(known_finish_reason), message });
    }

    /// Ends the choice. A half surrogate pair that still waits becomes U+FFFD.
    fn flush(&mut self) {
        for (path, joiner) in &mut self.texts.joiners {
            let rest = joiner.finish();
            if !rest.is_empty() && path == "content" {
                self.texts.texts.entry(path.clone()).or_default().push_str(rest);
                let message = Map::from_iter([("content".to_owned(), rest.into())]);
                let index = self
                    .chunks
                    .iter()
                    .position(|chunk| chunk.finish.is_some())
                    .unwrap_or(self.chunks.len());
                self.chunks.insert(index, Chunk { message, finish: None, logprobs: Value::Null });
            }
        }
    }

    /// All texts, the content first.
    fn full_text(&self) -> String {
        let mut texts = self.texts.texts.clone();
        let content = texts.remove("content").unwrap_or_default();
        let rest = texts.into_iter().flat_map(|(path, text)| {
            let is_json = path.ends_with("arguments") || path.ends_with("input");
            let once = is_json.then(|| unescaped(&text)).flatten();
            let twice = once.as_deref().and_then(unescaped);
            [Some(text), once, twice].into_iter().flatten()
        });
        let mut all: Vec<String> =
            [content].into_iter().chain(rest).filter(|text| !text.trim().is_empty()).collect();
        // Clients read the parts of a content as one text.
        let lists = self.chunks.iter().filter_map(|chunk| chunk.message.get("content")?.as_array());
        let parts: String = lists.flatten().filter_map(|part| part["text"].as_str()).collect();
        if !all.iter().any(|text| text.contains(&parts)) {
            all.push(parts);
        }
        all.join("\n")
    }

    fn is_finished(&self) -> bool {
        self.chunks.iter().any(|chunk| chunk.finish.is_some())
    }
}

impl Completion {
    /// Parses a whole answer.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let unreadable =
            |why: String| ApiError::upstream("the upstream's answer can't be read").because(why);
        let text = std::str::from_utf8(body).map_err(|error| unreadable(error.to_string()))?;
        let value: Value = lenient::parse(text).map_err(|error| unreadable(error.to_string()))?;
        let mut completion = Self::default();
        completion.add(value);
        // A whole answer has one chunk for each choice.
        completion.validated()
    }

    /// Reads a stream to its end.
    pub(crate) async fn from_stream<E>(
        body: impl Stream<Item = Result<Bytes, E>> + Send + Unpin + 'static,
    ) -> Result<Self, ApiError>
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        let (mut events, mut completion) = (Events::new(body), Self::default());
        while let Some(event) = events.next().await? {
            completion.add(event);
        }
        completion.finish(&events)
    }

    /// Ends a stream. An answer that breaks off before its end is an error.
    pub(crate) fn finish(self, events: &Events) -> Result<Self, ApiError> {
        if !events.is_done && !self.choices.values().all(Choice::is_finished) {
            return Err(stream_error("it ended before the answer did".into()));
        }
        self.validated()
    }

    /// Replaces an answer that was stopped: the text is judged, and no chunk can go out. Its usage
    /// is not known.
    pub(crate) fn truncated(mut self, index: u64, text: &str) -> Self {
        self.frame.retain(|name, _| name == "created");
        let texts = ChoiceTexts {
            texts: BTreeMap::from([("content".to_owned(), text.to_owned())]),
            ..ChoiceTexts::default()
        };
        self.choices = BTreeMap::from([(index, Choice { chunks: Vec::new(), texts })]);
        self
    }

    /// The answers of a model in this process, in the form of a server's answer.
    pub(crate) fn from_replies(replies: &[Reply], created: u64) -> Self {
        let usages: Vec<Usage> = replies.iter().filter_map(|reply| reply.usage).collect();
        let choices: Vec<Value> = (0_u64..)
            .zip(replies)
            .map(|(index, reply)| {
                let message = json!({"role": "assistant", "content": reply.text});
                json!({"index": index, "message": message, "finish_reason": finish_reason(reply.finish)})
            })
            .collect();
        let mut completion = Self::default();
        let usage = usage_object(&usages);
        completion.add(json!({"created": created, "choices": choices, "usage": usage}));
        completion
    }

    /// Adds the known fields of an answer, or of one event.
    pub(crate) fn add(&mut self, value: Value) {
        let Value::Object(mut fields) = value else { return };
        let choices = fields.remove("choices");
        // The frame has no field for texts, so they aren't collected.
        if let Ok(frame) = known_fields(FRAME, fields, "", &mut ChoiceTexts::default()) {
            // All events of a stream carry the time of the first.
            let is_new = |name: &str, known: &Map<String, Value>| {
                name != "created" || !known.contains_key(name)
            };
            let frame = frame
                .into_iter()
                .filter(|(name, value)| !value.is_null() && is_new(name, &self.frame));
            let frame: Vec<_> = frame.collect();
            self.frame.extend(frame);
        }
        for choice in choices.as_ref().and_then(Value::as_array).into_iter().flatten() {
            let Value::Object(choice) = choice else { continue };
            let index = choice.get("index").and_then(Value::as_u64).unwrap_or(0);
            self.choices.entry(index).or_default().add(choice.clone());
        }
    }

    /// An answer without choices has nothing that could be judged, or passed on.
    fn validated(mut self) -> Result<Self, ApiError> {
        self.choices.values_mut().for_each(Choice::flush);
        if self.choices.is_empty() {
            Err(ApiError::upstream("the upstream's answer has no choices"))
        } else {
            Ok(self)
        }
    }

    /// All texts of each choice, the content first. This is what is judged.
    pub(crate) fn texts(&self) -> BTreeMap<u64, String> {
        self.choices.iter().map(|(index, choice)| (*index, choice.full_text())).collect()
    }

    /// The estimated length of a choice, in quarters of a token.
    pub(crate) fn length(&self, index: u64) -> usize {
        self.choices.get(&index).map_or(0, |choice| choice.texts.length)
    }

    /// The usage that the upstream reported.
    pub(crate) fn usage(&self) -> Option<&Value> {
        self.frame.get("usage")
    }

    /// A choice unchanged, for an answer that is not a stream.
    pub(crate) fn choice(&self, index: u64) -> Value {
        let mut choice = json!({"index": index, "message": {"role": "assistant", "content": null},
            "finish_reason": "stop", "logprobs": null});
        for chunk in self.choices.get(&index).into_iter().flat_map(|choice| &choice.chunks) {
            if let Value::Object(message) = &mut choice["message"] {
                merge(message, &chunk.message);
            }
            if let Some(finish) = chunk.finish {
                choice["finish_reason"] = finish.into();
            }
            if !chunk.logprobs.is_null() {
                choice["logprobs"] = chunk.logprobs.clone();
            }
        }
        choice
    }

    /// The chunks of a choice unchanged, for a stream.
    pub(crate) fn chunks(&self, index: u64) -> impl Iterator<Item = Value> {
        self.chunks_after(index, 0)
    }

    /// The chunks after the first `taken`.
    pub(crate) fn chunks_after(&self, index: u64, taken: usize) -> impl Iterator<Item = Value> {
        let chunks = self
            .choices
            .get(&index)
            .and_then(|choice| choice.chunks.get(taken..))
            .unwrap_or_default();
        chunks.iter().map(move |chunk| {
            let mut choice =
                json!({"index": index, "delta": chunk.message, "finish_reason": chunk.finish});
            if !chunk.logprobs.is_null() {
                choice["logprobs"] = chunk.logprobs.clone();
            }
            choice
        })
    }

    /// The fields that every answer, and every event of a stream, begins with. The id is our own,
    /// so that it can't be used to fetch anything elsewhere.
    pub(crate) fn envelope(&self, id: &str, model: &str, object: &str) -> Value {
        let created = self.frame.get("created").cloned().unwrap_or_else(|| 0.into());
        json!({"id": format!("chatcmpl-{id}"), "object": object, "created": created, "model": model})
    }

    /// The fields next to the choices.
    pub(crate) fn metadata(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.frame.iter().filter(|(name, _)| *name != "created")
    }
}

/// Estimates the size of a character, in quarters of a token.
pub(crate) fn quarter_tokens(letter: char) -> usize {
    if letter.is_ascii() { 1 } else { 4 }
}

/// The events of a draft while it is written.
pub(crate) struct Events {
    /// `None` is the upstream's end marker.
    events: BoxStream<'static, Result<Option<Value>, ApiError>>,
    is_done: bool,
}

impl Events {
    /// The events of an upstream's stream.
    pub(crate) fn new<E>(
        body: impl Stream<Item = Result<Bytes, E>> + Send + Unpin + 'static,
    ) -> Self
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        let events = SseStream::from_bytes_stream(body).filter_map(async |event| match event {
            Ok(event) => event.data.as_deref().map(read_event),
            Err(error) => Some(Err(stream_error(error.to_string()))),
        });
        Self { events: events.boxed(), is_done: false }
    }

    /// The draft of a model in this process, in the form of a server's events. The model is asked
    /// when the first event is.
    pub(crate) fn of_model(
        model: Arc<dyn Mllm>,
        chat: Chat,
        sampling: Sampling,
        created: u64,
    ) -> Self {
        let asking = |error| ApiError::asking("invalid_request", error);
        let event = move |delta: Value, finish: Option<&str>, usage: Value| {
            let choice = json!({"index": 0, "delta": delta, "finish_reason": finish});
            Some(json!({"created": created, "choices": [choice], "usage": usage}))
        };
        let events = try_stream! {
            let mut deltas = model.stream(&chat, &sampling).await.map_err(asking)?;
            yield event(json!({"role": "assistant", "content": ""}), None, Value::Null);
            while let Some(delta) = deltas.try_next().await.map_err(asking)? {
                match delta {
                    Delta::Text(text) => yield event(json!({"content": text}), None, Value::Null),
                    Delta::End { finish, usage, .. } => {
                        let usage = usage_object(usage.as_slice());
                        yield event(json!({}), Some(finish_reason(finish)), usage);
                        break;
                    }
                    // As in a whole reply of such a model, reasoning is left out.
                    _ => {}
                }
            }
        };
        Self { events: events.boxed(), is_done: false }
    }

    /// The next event, or `None` at the end. Cancel safe.
    pub(crate) async fn next(&mut self) -> Result<Option<Value>, ApiError> {
        if self.is_done {
            return Ok(None);
        }
        let event = self.events.try_next().await?;
        self.is_done = event == Some(None);
        Ok(event.flatten())
    }
}

/// Reads an event of an upstream's stream; its end marker is `None`.
fn read_event(data: &str) -> Result<Option<Value>, ApiError> {
    if data.trim() == "[DONE]" {
        return Ok(None);
    }
    let event: Value = lenient::parse(data).map_err(|error| stream_error(error.to_string()))?;
    match event.get("error").filter(|error| !error.is_null()) {
        Some(error) => {
            let reason = error["message"].as_str().unwrap_or("it gives no reason");
            Err(stream_error(reason.to_owned()))
        }
        None => Ok(Some(event)),
    }
}

/// A stream that can't be read any further.
fn stream_error(why: String) -> ApiError {
    ApiError::upstream("the upstream's stream broke").because(why)
}

/// The sum of token counts, in the words of chat completions.
fn usage_object(usages: &[Usage]) -> Value {
    let sum = |count: fn(&Usage) -> u32| usages.iter().map(count).map(u64::from).sum::<u64>();
    let (prompt, reply) = (sum(|usage| usage.prompt_tokens), sum(|usage| usage.completion_tokens));
    json!({"prompt_tokens": prompt, "completion_tokens": reply, "total_tokens": prompt + reply})
}

/// Merges a chunk into a message: texts and lists are appended, and so is each tool call, by its
/// index.
fn merge(message: &mut Map<String, Value>, chunk: &Map<String, Value>) {
    for (name, more) in chunk {
        match (message.get_mut(name), more) {
            (Some(known), Value::Null) if !known.is_null() => {}
            (Some(Value::String(text)), Value::String(more))
                if !matches!(name.as_str(), "role" | "id" | "type" | "name") =>
            {
                text.push_str(more);
            }
            (Some(Value::Array(calls)), Value::Array(more)) if name == "tool_calls" => {
                for call in more {
                    let known = calls
                        .iter_mut()
                        .find(|known| !call["index"].is_null() && known["index"] == call["index"]);
                    match (known.and_then(Value::as_object_mut), call) {
                        (Some(known), Value::Object(call)) => merge(known, call),
                        _ => calls.push(call.clone()),
                    }
                }
            }
            (Some(Value::Array(list)), Value::Array(more)) => list.extend(more.iter().cloned()),
            (Some(Value::Object(known)), Value::Object(more)) => merge(known, more),
            // Some servers send an empty id in all chunks but the first.
            (Some(Value::String(known)), Value::String(more))
                if more.is_empty() && !known.is_empty() => {}
            _ => {
                message.insert(name.clone(), more.clone());
            }
        }
    }
}

/// The log-probabilities of a content's tokens, if these tokens spell the content and nothing else.
/// Alternative tokens are dropped: what they say was not judged.
fn content_logprobs(value: Option<Value>, content: &str) -> Value {
    let Some(Value::Object(mut value)) = value else { return Value::Null };
    let Some(Value::Array(tokens)) = value.remove("content") else { return Value::Null };
    let mut collected = ChoiceTexts::default();
    let token = |token: Value| {
        let Value::Object(fields) = token else { return None };
        let mut kept = known_fields(TOKEN, fields, "", &mut collected).ok()?;
        kept.insert("bytes".to_owned(), Value::Null);
        kept.insert("top_logprobs".to_owned(), Value::Array(Vec::new()));
        Some(Value::from(kept))
    };
    let tokens: Vec<Value> = tokens.into_iter().filter_map(token).collect();
    let spell_content = collected.texts.get("token").is_some_and(|text| text == content);
    if spell_content { json!({"content": tokens, "refusal": null}) } else { Value::Null }
}

/// The arguments of a tool as its reader will see them, if that differs: JSON may spell every
/// character as an escape, and the escape as another.
pub(crate) fn unescaped(text: &str) -> Option<String> {
    let mut units = Vec::new();
    let mut rest = text;
    let mut is_escaped = false;
    while let Some(at) = rest.find("\\u") {
        let (before, after) = rest.split_at(at);
        let code = after.get(2..6).and_then(|digits| u16::from_str_radix(digits, 16).ok());
        let before = if code.is_some() { before.trim_end_matches('\\') } else { before };
        units.extend(before.encode_utf16());
        match code {
            Some(code) => units.push(code),
            None => units.extend("\\u".encode_utf16()),
        }
        is_escaped |= code.is_some();
        rest = &after[if code.is_some() { 6 } else { 2 }..];
    }
    units.extend(rest.encode_utf16());
    is_escaped.then(|| String::from_utf16_lossy(&units))
}

/// The finish reason in the words of chat completions.
fn known_finish_reason(reason: &str) -> &'static str {
    match reason {
        "length" | "max_tokens" | "model_length" | "MAX_TOKENS" => "length",
        "tool_calls" => "tool_calls",
        "function_call" => "function_call",
        "content_filter" | "SAFETY" => "content_filter",
        _ => "stop",
    }
}

pub(crate) fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::ContentFilter => "content_filter",
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    fn whole(value: &Value) -> Completion {
        Completion::parse(value.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn every_text_that_goes_out_is_judged() {
        let answer = whole(
            &json!({"id": "upstream's", "system_fingerprint": "x", "citations": ["unknown"],
            "__verbose": {"content": "unknown"}, "choices": [
                {"index": 0, "message": {"role": "assistant", "content": "one", "reasoning_content": "because",
                    "refusal": null, "tool_calls": [{"id": "x", "type": "function", "odd": "unknown",
                        "function": {"name": "f", "arguments": "{\"a\": \"b\"}"}}]},
                    "finish_reason": "stop", "logprobs": {"content": [{"token": "o", "logprob": -0.5, "bytes": [1],
                        "top_logprobs": [{"token": "unknown"}]}, {"token": "ne", "logprob": -1}]}},
                {"index": 1, "message": {"content": [{"type": "text", "text": "two"}]}, "thoughts": "unknown",
                    "finish_reason": "odd", "logprobs": {"content": [{"token": "other", "logprob": -1}]}},
                {"index": 2, "message": {"content": null}, "finish_reason": "stop"},
                "unknown",
            ], "usage": {"total_tokens": 3, "unknown": 4, "prompt_tokens": "unknown"}}),
        );
        let texts = answer.texts();
        assert_eq!(texts[&0], "one\nbecause\n{\"a\": \"b\"}\nf\nx");
        assert_eq!((texts[&1].as_str(), texts[&2].as_str()), ("two", ""));
        assert_eq!(answer.usage(), Some(&json!({"total_tokens": 3})));
        assert_eq!(
            answer.choice(0),
            json!({"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "one",
                "reasoning_content": "because", "refusal": null, "tool_calls": [{"id": "x", "type": "function",
                    "function": {"name": "f", "arguments": "{\"a\": \"b\"}"}}]},
                "logprobs": {"refusal": null, "content": [
                    {"token": "o", "logprob": -0.5, "bytes": null, "top_logprobs": []},
                    {"token": "ne", "logprob": -1, "bytes": null, "top_logprobs": []}]}})
        );
        let second = answer.choice(1);
        assert_eq!((&second["finish_reason"], &second["logprobs"]), (&json!("stop"), &Value::Null));
        let parts = json!([{"type": "text", "text": "Bre"}, {"type": "text", "text": "ad"}]);
        assert_eq!(
            whole(&json!({"choices": [{"message": {"content": parts}}]})).texts()[&0],
            "Bre\nad\nBread"
        );
        let all = [0, 1, 2].map(|index| answer.choice(index).to_string()).concat();
        assert!(!all.contains("unknown"), "{all}");
    }

    fn read(text: &[u8], size: usize) -> Result<Completion, ApiError> {
        let parts: Vec<_> = text
            .chunks(size)
            .map(|part| Ok::<_, std::io::Error>(Bytes::copy_from_slice(part)))
            .collect();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(Completion::from_stream(futures::stream::iter(parts)))
    }

    fn stream() -> String {
        let chunk = |value: Value| format!("data: {value}\n\n");
        let call = |call: Value| json!({"index": 1, "delta": {"tool_calls": [call]}});
        let ended = |index: u8| json!({"index": index, "delta": {}, "finish_reason": "stop"});
        [
            ": hello\n\n".to_owned(),
            chunk(json!({"id": "c", "choices": [{"index": 0, "delta": {"role": "assistant", "content": "Äp"}}]})),
            chunk(json!({"choices": [
                {"index": 1, "delta": {"reasoning": "hm"}}, {"index": 0, "delta": {"content": "fel"}},
            ]})),
            chunk(
                json!({"choices": [call(json!({"index": 0, "id": "i", "function": {"name": "f", "arguments": "{"}}))]}),
            ),
            chunk(json!({"choices": [call(json!({"index": 0, "id": "i", "function": {"arguments": "}"}}))]})),
            chunk(json!({"choices": [ended(0), ended(1)]})),
            chunk(json!({"choices": [], "usage": {"total_tokens": 9}})),
            "data: [DONE]\n\n".to_owned(),
        ]
        .concat()
    }

    #[test]
    fn a_stream_reads_the_same_wherever_it_is_split() {
        let whole = read(stream().as_bytes(), 1_000_000).unwrap();
        assert_eq!(
            whole.texts(),
            BTreeMap::from([(0, "Äpfel".into()), (1, "hm\n{}\nf\ni".into())])
        );
        assert_eq!(whole.usage(), Some(&json!({"total_tokens": 9})));
        for size in 1..40 {
            assert_eq!(read(stream().as_bytes(), size).unwrap(), whole);
        }
    }

    #[test]
    fn a_split_surrogate_pair_is_joined_in_each_choice() {
        let chunk = |index: u8, text: &str| {
            format!(
                "data: {{\"choices\": [{{\"index\": {index}, \"delta\": {{\"content\": \"{text}\"}}}}]}}\n\n"
            )
        };
        let stream = [
            chunk(0, "a\\ud83d"),
            chunk(1, "\\ud83d"),
            chunk(0, "\\ude00b"),
            chunk(1, "\\ude01"),
            chunk(1, "\\ud83d"),
            "data: [DONE]\n\n".to_owned(),
        ]
        .concat();
        let answer = read(stream.as_bytes(), 7).unwrap();
        assert_eq!(answer.texts(), BTreeMap::from([(0, "a😀b".into()), (1, "😁\u{FFFD}".into())]));
        let sent: Vec<Value> =
            answer.chunks(1).map(|chunk| chunk["delta"]["content"].clone()).collect();
        assert_eq!(sent, ["", "😁", "", "\u{FFFD}"]);
    }

    #[test]
    fn a_broken_answer_is_an_error() {
        let stream = stream();
        let end = stream.find("\"finish_reason\":\"stop\"").unwrap();
        for text in [
            &stream[..end],
            "",
            "data: nonsense\n\n",
            "data: {\"error\": {\"message\": \"no memory\"}}\n\n",
            "data: [DONE]\n\n",
        ] {
            let error = read(text.as_bytes(), 7).unwrap_err();
            assert_eq!(error.code, "upstream_failed", "{text}");
            assert!(!error.message.contains("no memory"));
        }
        for body in ["", "[]", "{\"choices\": []}", "{\"error\": {\"message\": \"x\"}}"] {
            assert!(Completion::parse(body.as_bytes()).is_err(), "{body}");
        }
    }

    /// JSON in which every text is a marker of its own, under names that answers have and others.
    pub(crate) fn answers() -> impl Strategy<Value = Value> {
        let marker = "[A-Z]{9}";
        let name = prop_oneof![
            Just("content".to_owned()),
            Just("tool_calls".to_owned()),
            Just("function".to_owned()),
            Just("arguments".to_owned()),
            Just("name".to_owned()),
            Just("id".to_owned()),
            Just("type".to_owned()),
            Just("text".to_owned()),
            Just("reasoning_details".to_owned()),
            Just("annotations".to_owned()),
            Just("url_citation".to_owned()),
            Just("logprobs".to_owned()),
            Just("token".to_owned()),
            Just("usage".to_owned()),
            Just("message".to_owned()),
            Just("delta".to_owned()),
            Just("role".to_owned()),
            Just("finish_reason".to_owned()),
            marker.prop_map(String::from),
        ];
        let leaf =
            prop_oneof![marker.prop_map(Value::from), Just(Value::from(1)), Just(Value::Null)];
        let value = leaf.prop_recursive(5, 40, 5, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(name.clone(), inner, 0..5)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        });
        let choices = prop::collection::vec((value.clone(), value.clone(), value.clone()), 1..3);
        (choices, value.clone(), value).prop_map(|(choices, usage, other)| {
            let choices: Vec<Value> = (0_u64..)
                .zip(choices)
                .map(|(index, (message, logprobs, finish))| {
                    json!({"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish})
                })
                .collect();
            json!({"id": "UPSTREAMS", "choices": choices, "usage": usage, "timings": other, "created": other})
        })
    }

    pub(crate) fn markers(text: &str) -> impl Iterator<Item = &str> {
        text.split(|c: char| !c.is_ascii_uppercase()).filter(|run| run.len() >= 9)
    }

    proptest! {
        #[test]
        fn no_stream_panics(bytes: Vec<u8>) {
            let _ = read(&bytes, 5);
            let _ = read(&[b"data: ", &bytes[..], b"\n\n"].concat(), 3);
        }

        #[test]
        fn no_text_goes_out_that_is_not_judged(answer in answers()) {
            let Ok(answer) = Completion::parse(answer.to_string().as_bytes()) else { return Ok(()) };
            for (index, text) in answer.texts() {
                let sent = answer.choice(index).to_string()
                    + &answer.chunks(index).map(|chunk| chunk.to_string()).collect::<String>();
                for marker in markers(&sent) {
                    prop_assert!(text.contains(marker), "{marker} in {sent} is not in {text}");
                }
            }
            let metadata: Map<String, Value> = answer.metadata().map(|(name, value)| (name.clone(), value.clone())).collect();
            let frame = Value::from(metadata).to_string() + &answer.envelope("id", "model", "object").to_string();
            prop_assert_eq!(markers(&frame).count(), 0);
        }
    }
}
