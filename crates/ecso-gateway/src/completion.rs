//! What a model answered: the fields that are known, whole or in pieces. All that goes to a client
//! is made of these, and every text in them is judged.

use std::collections::BTreeMap;

use bytes::Bytes;
use ecso::{FinishReason, Reply};
use ecso_openai::{lenient, surrogates};
use futures::{Stream, StreamExt, stream::BoxStream};
use serde_json::{Map, Value, json};
use sse_stream::SseStream;

use crate::{
    error::ApiError,
    fields::{BLOCK, CALL, FUNCTION_CALL, SEALS},
    forms::{Form, Odd, Reader, fields_of},
};

/// What a choice says, whole or a piece of it.
const MESSAGE: &[(&str, Form)] = &[
    ("role", Form::Word(&["assistant"])),
    ("content", Form::Either(&[Form::Text, Form::List(&PART)])),
    ("refusal", Form::Text),
    ("reasoning", Form::Text),
    ("reasoning_content", Form::Text),
    ("reasoning_details", Form::List(&BLOCK)),
    ("thinking_blocks", Form::List(&BLOCK)),
    ("tool_calls", Form::List(&CALL)),
    ("function_call", FUNCTION_CALL),
    ("annotations", Form::List(&ANNOTATION)),
    ("thought_signature", Form::Sealed),
    ("extra_content", SEALS),
    ("provider_specific_fields", SEALS),
];

const PART: Form = Form::Fields(&[
    ("type", Form::Word(&["text", "output_text", "refusal", "thinking", "reasoning"])),
    ("text", Form::Text),
    ("refusal", Form::Text),
    ("thinking", Form::Either(&[Form::Text, Form::List(&TEXT)])),
    ("signature", Form::Sealed),
    ("closed", Form::Plain),
]);

const TEXT: Form = Form::Fields(&[("type", Form::Word(&["text"])), ("text", Form::Text)]);

const ANNOTATION: Form = Form::Fields(&[
    ("type", Form::Word(&["url_citation"])),
    (
        "url_citation",
        Form::Fields(&[
            ("url", Form::Text),
            ("title", Form::Text),
            ("content", Form::Text),
            ("start_index", Form::Plain),
            ("end_index", Form::Plain),
        ]),
    ),
]);

/// What goes out beside the choices: figures, and words of a fixed list.
const FRAME: &[(&str, Form)] = &[
    ("created", Form::Plain),
    ("usage", USAGE),
    ("timings", TIMINGS),
    (
        "service_tier",
        Form::Word(&["auto", "default", "flex", "scale", "priority", "standard", "on_demand"]),
    ),
];

const USAGE: Form = Form::Fields(&[
    ("prompt_tokens", Form::Plain),
    ("completion_tokens", Form::Plain),
    ("total_tokens", Form::Plain),
    ("prompt_tokens_details", DETAILS),
    ("completion_tokens_details", DETAILS),
    ("prompt_cache_hit_tokens", Form::Plain),
    ("prompt_cache_miss_tokens", Form::Plain),
    ("cache_creation_input_tokens", Form::Plain),
    ("cache_read_input_tokens", Form::Plain),
    ("queue_time", Form::Plain),
    ("prompt_time", Form::Plain),
    ("completion_time", Form::Plain),
    ("total_time", Form::Plain),
    ("cost", Form::Plain),
]);

const DETAILS: Form = Form::Fields(&[
    ("cached_tokens", Form::Plain),
    ("cache_write_tokens", Form::Plain),
    ("audio_tokens", Form::Plain),
    ("image_tokens", Form::Plain),
    ("video_tokens", Form::Plain),
    ("text_tokens", Form::Plain),
    ("reasoning_tokens", Form::Plain),
    ("accepted_prediction_tokens", Form::Plain),
    ("rejected_prediction_tokens", Form::Plain),
]);

const TIMINGS: Form = Form::Fields(&[
    ("cache_n", Form::Plain),
    ("prompt_n", Form::Plain),
    ("prompt_ms", Form::Plain),
    ("prompt_per_token_ms", Form::Plain),
    ("prompt_per_second", Form::Plain),
    ("predicted_n", Form::Plain),
    ("predicted_ms", Form::Plain),
    ("predicted_per_token_ms", Form::Plain),
    ("predicted_per_second", Form::Plain),
    ("draft_n", Form::Plain),
    ("draft_n_accepted", Form::Plain),
]);

/// Tokens, where they say no more than the content.
const TOKEN: &[(&str, Form)] = &[("token", Form::Text), ("logprob", Form::Plain)];

/// An answer as it came: what is known of it.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Completion {
    frame: Map<String, Value>,
    choices: BTreeMap<u64, Choice>,
}

/// One choice of an answer.
#[derive(Debug, Clone, Default, PartialEq)]
struct Choice {
    /// What it says, in the pieces in which it came; an answer that is no stream has one.
    pieces: Vec<Piece>,
    heard: Heard,
}

/// A piece of a choice, or the whole.
#[derive(Debug, Clone, PartialEq)]
struct Piece {
    message: Map<String, Value>,
    finish: Option<&'static str>,
    /// Of each token of its content; null if nobody asked.
    logprobs: Value,
}

/// Hears a choice: puts its texts together, by where they stand.
#[derive(Debug, Clone, Default, PartialEq)]
struct Heard {
    texts: BTreeMap<String, String>,
    names: BTreeMap<String, String>,
    joiners: BTreeMap<String, surrogates::Joiner>,
    /// How long all of it is, in quarters of a token.
    length: usize,
}

impl Reader for Heard {
    fn text(&mut self, path: &str, text: String) -> String {
        // Half a character waits for its other half, in the same place of a later piece.
        let text = self.joiners.entry(path.to_owned()).or_default().push(&text);
        self.length += text.chars().map(quarters).sum::<usize>();
        self.texts.entry(path.to_owned()).or_default().push_str(&text);
        text
    }

    fn name(&mut self, path: &str, name: &str) {
        // Behind this mark a seal follows.
        let name = name.split("__thought__").next().unwrap_or_default();
        if self.names.get(path).is_none_or(|known| known != name) {
            self.names.insert(path.to_owned(), name.to_owned());
            self.texts.entry(path.to_owned()).or_default().push_str(name);
        }
    }

    fn unknown(&mut self, _: &str, _: &str) -> Result<bool, Odd> {
        Ok(false)
    }

    fn misfit(&mut self, _: &str) -> Result<(), Odd> {
        Ok(())
    }
}

impl Choice {
    /// Adds a piece: a choice of an answer or of one event.
    fn add(&mut self, mut choice: Map<String, Value>) {
        let message = ["message", "delta"].into_iter().find_map(|name| choice.remove(name));
        let Some(Value::Object(said)) = message.or_else(|| Some(Map::new().into())) else { return };
        let message = fields_of(MESSAGE, said, "", &mut self.heard).unwrap_or_default();
        let content = message.get("content").and_then(Value::as_str).unwrap_or_default();
        let logprobs = logprobs(choice.remove("logprobs"), content);
        let finish =
            choice.get("finish_reason").and_then(Value::as_str).filter(|reason| !reason.is_empty());
        self.pieces.push(Piece { logprobs, finish: finish.map(reason), message });
    }

    /// Ends it: half a character that waits for another stands for itself.
    fn end(&mut self) {
        for (path, joiner) in &mut self.heard.joiners {
            let rest = joiner.finish();
            if !rest.is_empty() && path == "content" {
                self.heard.texts.entry(path.clone()).or_default().push_str(rest);
                let message = Map::from_iter([("content".to_owned(), rest.into())]);
                let place = self
                    .pieces
                    .iter()
                    .position(|piece| piece.finish.is_some())
                    .unwrap_or(self.pieces.len());
                self.pieces.insert(place, Piece { message, finish: None, logprobs: Value::Null });
            }
        }
    }

    /// All that it says, its content first.
    fn said(&self) -> String {
        let mut texts = self.heard.texts.clone();
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
        let lists = self.pieces.iter().filter_map(|piece| piece.message.get("content")?.as_array());
        let parts: String = lists.flatten().filter_map(|part| part["text"].as_str()).collect();
        if !all.iter().any(|text| text.contains(&parts)) {
            all.push(parts);
        }
        all.join("\n")
    }

    fn is_finished(&self) -> bool {
        self.pieces.iter().any(|piece| piece.finish.is_some())
    }
}

impl Completion {
    /// Reads an answer.
    pub(crate) fn whole(body: &[u8]) -> Result<Self, ApiError> {
        let unreadable =
            |why: String| ApiError::upstream("the upstream's answer can't be read").because(why);
        let text = std::str::from_utf8(body).map_err(|error| unreadable(error.to_string()))?;
        let value: Value = lenient::parse(text).map_err(|error| unreadable(error.to_string()))?;
        let mut completion = Self::default();
        completion.add(value);
        // An answer that is whole has one piece of each choice.
        completion.checked()
    }

    /// Reads a stream to its end.
    pub(crate) async fn chunks<E>(
        body: impl Stream<Item = Result<Bytes, E>> + Send + Unpin + 'static,
    ) -> Result<Self, ApiError>
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        let (mut events, mut completion) = (Events::of(body), Self::default());
        while let Some(event) = events.next().await? {
            completion.add(event);
        }
        completion.ended(&events)
    }

    /// The end of a stream: an answer that breaks off before its own is none.
    pub(crate) fn ended(self, events: &Events) -> Result<Self, ApiError> {
        if !events.is_told && !self.choices.values().all(Choice::is_finished) {
            return Err(broken("it ended before the answer did".into()));
        }
        self.checked()
    }

    /// What is left of an answer that was stopped: a text to be judged, and not one piece that
    /// could go out. What it took nobody has told.
    pub(crate) fn stopped(mut self, index: u64, said: &str) -> Self {
        self.frame.retain(|name, _| name == "created");
        let heard = Heard {
            texts: BTreeMap::from([("content".to_owned(), said.to_owned())]),
            ..Heard::default()
        };
        self.choices = BTreeMap::from([(index, Choice { pieces: Vec::new(), heard })]);
        self
    }

    /// The answers of a model in this process, in pieces as a stream has them.
    pub(crate) fn replies(replies: &[Reply], created: u64) -> Self {
        let usage = replies.iter().filter_map(|reply| reply.usage).fold((0, 0), |sum, usage| {
            (sum.0 + u64::from(usage.prompt_tokens), sum.1 + u64::from(usage.completion_tokens))
        });
        let choices: Vec<Value> = (0_u64..)
            .zip(replies)
            .map(|(index, reply)| {
                let message = json!({"role": "assistant", "content": reply.text});
                json!({"index": index, "message": message, "finish_reason": finish(reply.finish)})
            })
            .collect();
        let mut completion = Self::default();
        completion.add(json!({"created": created, "choices": choices, "usage": {
            "prompt_tokens": usage.0, "completion_tokens": usage.1, "total_tokens": usage.0 + usage.1}}));
        completion
    }

    /// Takes what is known of an answer, or of one event.
    pub(crate) fn add(&mut self, value: Value) {
        let Value::Object(mut fields) = value else { return };
        let choices = fields.remove("choices");
        // Texts have no place here, so that nobody is told of any.
        if let Ok(frame) = fields_of(FRAME, fields, "", &mut Heard::default()) {
            // A stream has one beginning.
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

    /// An answer without a choice says nothing that could be judged, or passed on.
    fn checked(mut self) -> Result<Self, ApiError> {
        self.choices.values_mut().for_each(Choice::end);
        if self.choices.is_empty() {
            Err(ApiError::upstream("the upstream's answer has no choices"))
        } else {
            Ok(self)
        }
    }

    /// All that each choice says, its content first: what is judged.
    pub(crate) fn said(&self) -> BTreeMap<u64, String> {
        self.choices.iter().map(|(index, choice)| (*index, choice.said())).collect()
    }

    /// About how long what a choice says is, in quarters of a token.
    pub(crate) fn length(&self, index: u64) -> usize {
        self.choices.get(&index).map_or(0, |choice| choice.heard.length)
    }

    /// The usage that the upstream tells.
    pub(crate) fn usage(&self) -> Option<&Value> {
        self.frame.get("usage")
    }

    /// A choice as it came, for an answer that is no stream.
    pub(crate) fn choice(&self, index: u64) -> Value {
        let mut choice = json!({"index": index, "message": {"role": "assistant", "content": null},
            "finish_reason": "stop", "logprobs": null});
        for piece in self.choices.get(&index).into_iter().flat_map(|choice| &choice.pieces) {
            if let Value::Object(message) = &mut choice["message"] {
                grow(message, &piece.message);
            }
            if let Some(finish) = piece.finish {
                choice["finish_reason"] = finish.into();
            }
            if !piece.logprobs.is_null() {
                choice["logprobs"] = piece.logprobs.clone();
            }
        }
        choice
    }

    /// The pieces of a choice as they came, for a stream.
    pub(crate) fn pieces(&self, index: u64) -> impl Iterator<Item = Value> {
        self.pieces_behind(index, 0)
    }

    /// The same without the first `taken`.
    pub(crate) fn pieces_behind(&self, index: u64, taken: usize) -> impl Iterator<Item = Value> {
        let pieces = self
            .choices
            .get(&index)
            .and_then(|choice| choice.pieces.get(taken..))
            .unwrap_or_default();
        pieces.iter().map(move |piece| {
            let mut choice =
                json!({"index": index, "delta": piece.message, "finish_reason": piece.finish});
            if !piece.logprobs.is_null() {
                choice["logprobs"] = piece.logprobs.clone();
            }
            choice
        })
    }

    /// What every answer or event of a stream begins with. The name is our own, so that nothing can
    /// be got by it elsewhere.
    pub(crate) fn head(&self, id: &str, model: &str, object: &str) -> Value {
        let created = self.frame.get("created").cloned().unwrap_or_else(|| 0.into());
        json!({"id": format!("chatcmpl-{id}"), "object": object, "created": created, "model": model})
    }

    /// Figures that stand beside the choices.
    pub(crate) fn figures(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.frame.iter().filter(|(name, _)| *name != "created")
    }
}

/// About how much a letter takes, in quarters of a token.
pub(crate) fn quarters(letter: char) -> usize {
    if letter.is_ascii() { 1 } else { 4 }
}

/// The events of an upstream's stream, as they come.
pub(crate) struct Events {
    events: BoxStream<'static, Result<sse_stream::Sse, sse_stream::Error>>,
    /// Whether the upstream has told the end.
    is_told: bool,
}

impl Events {
    pub(crate) fn of<E>(body: impl Stream<Item = Result<Bytes, E>> + Send + Unpin + 'static) -> Self
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        Self { events: SseStream::from_bytes_stream(body).boxed(), is_told: false }
    }

    /// The next event; none behind the last. Dropping the future loses nothing.
    pub(crate) async fn next(&mut self) -> Result<Option<Value>, ApiError> {
        while !self.is_told {
            let Some(event) = self.events.next().await else { return Ok(None) };
            let Some(data) = event.map_err(|error| broken(error.to_string()))?.data else {
                continue;
            };
            if data.trim() == "[DONE]" {
                self.is_told = true;
                break;
            }
            let value: Value = lenient::parse(&data).map_err(|error| broken(error.to_string()))?;
            if let Some(error) = value.get("error").filter(|error| !error.is_null()) {
                return Err(broken(
                    error["message"].as_str().unwrap_or("it says no reason").to_owned(),
                ));
            }
            return Ok(Some(value));
        }
        Ok(None)
    }
}

/// A stream of which nothing more can be read.
fn broken(why: String) -> ApiError {
    ApiError::upstream("the upstream's stream broke").because(why)
}

/// Puts a piece of a message behind what came before it: texts and lists go on, and so does each
/// tool call, by its index.
fn grow(message: &mut Map<String, Value>, piece: &Map<String, Value>) {
    for (name, more) in piece {
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
                        (Some(known), Value::Object(call)) => grow(known, call),
                        _ => calls.push(call.clone()),
                    }
                }
            }
            (Some(Value::Array(list)), Value::Array(more)) => list.extend(more.iter().cloned()),
            (Some(Value::Object(known)), Value::Object(more)) => grow(known, more),
            // Some servers send an empty id with all pieces but the first.
            (Some(Value::String(known)), Value::String(more))
                if more.is_empty() && !known.is_empty() => {}
            _ => {
                message.insert(name.clone(), more.clone());
            }
        }
    }
}

/// Log-probabilities of a content's tokens, where these say the content and nothing else; of the
/// tokens that were not taken nobody has judged what they say.
fn logprobs(value: Option<Value>, content: &str) -> Value {
    let Some(Value::Object(mut value)) = value else { return Value::Null };
    let Some(Value::Array(tokens)) = value.remove("content") else { return Value::Null };
    let mut heard = Heard::default();
    let token = |token: Value| {
        let Value::Object(fields) = token else { return None };
        let mut kept = fields_of(TOKEN, fields, "", &mut heard).ok()?;
        kept.insert("bytes".to_owned(), Value::Null);
        kept.insert("top_logprobs".to_owned(), Value::Array(Vec::new()));
        Some(Value::from(kept))
    };
    let tokens: Vec<Value> = tokens.into_iter().filter_map(token).collect();
    let is_the_content = heard.texts.get("token").is_some_and(|said| said == content);
    if is_the_content { json!({"content": tokens, "refusal": null}) } else { Value::Null }
}

/// Arguments of a tool as they will be read, if that differs: JSON text may spell every character
/// as an escape, and the escape as one.
fn unescaped(text: &str) -> Option<String> {
    let mut units = Vec::new();
    let mut rest = text;
    let mut is_escaped = false;
    while let Some(at) = rest.find("\\u") {
        let (before, behind) = rest.split_at(at);
        let code = behind.get(2..6).and_then(|digits| u16::from_str_radix(digits, 16).ok());
        let before = if code.is_some() { before.trim_end_matches('\\') } else { before };
        units.extend(before.encode_utf16());
        match code {
            Some(code) => units.push(code),
            None => units.extend("\\u".encode_utf16()),
        }
        is_escaped |= code.is_some();
        rest = &behind[if code.is_some() { 6 } else { 2 }..];
    }
    units.extend(rest.encode_utf16());
    is_escaped.then(|| String::from_utf16_lossy(&units))
}

/// The protocol's word for why an answer ended.
fn reason(said: &str) -> &'static str {
    match said {
        "length" | "max_tokens" | "model_length" | "MAX_TOKENS" => "length",
        "tool_calls" => "tool_calls",
        "function_call" => "function_call",
        "content_filter" | "SAFETY" => "content_filter",
        _ => "stop",
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
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    fn whole(value: &Value) -> Completion {
        Completion::whole(value.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn everything_that_goes_out_is_said() {
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
        let said = answer.said();
        assert_eq!(said[&0], "one\nbecause\n{\"a\": \"b\"}\nf\nx");
        assert_eq!((said[&1].as_str(), said[&2].as_str()), ("two", ""));
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
            whole(&json!({"choices": [{"message": {"content": parts}}]})).said()[&0],
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
        runtime.block_on(Completion::chunks(futures::stream::iter(parts)))
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
    fn a_stream_split_anywhere_says_the_same() {
        let whole = read(stream().as_bytes(), 1_000_000).unwrap();
        assert_eq!(whole.said(), BTreeMap::from([(0, "Äpfel".into()), (1, "hm\n{}\nf\ni".into())]));
        assert_eq!(whole.usage(), Some(&json!({"total_tokens": 9})));
        for size in 1..40 {
            assert_eq!(read(stream().as_bytes(), size).unwrap(), whole);
        }
    }

    #[test]
    fn a_character_cut_in_two_is_whole_again_in_each_choice() {
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
        assert_eq!(answer.said(), BTreeMap::from([(0, "a😀b".into()), (1, "😁\u{FFFD}".into())]));
        let sent: Vec<Value> =
            answer.pieces(1).map(|piece| piece["delta"]["content"].clone()).collect();
        assert_eq!(sent, ["", "😁", "", "\u{FFFD}"]);
    }

    #[test]
    fn what_breaks_off_is_a_failure() {
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
            assert!(Completion::whole(body.as_bytes()).is_err(), "{body}");
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
        (choices, value.clone(), value).prop_map(|(choices, usage, beside)| {
            let choices: Vec<Value> = (0_u64..)
                .zip(choices)
                .map(|(index, (message, logprobs, finish))| {
                    json!({"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish})
                })
                .collect();
            json!({"id": "UPSTREAMS", "choices": choices, "usage": usage, "timings": beside, "created": beside})
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
        fn no_text_goes_out_that_is_not_said(answer in answers()) {
            let Ok(answer) = Completion::whole(answer.to_string().as_bytes()) else { return Ok(()) };
            for (index, said) in answer.said() {
                let sent = answer.choice(index).to_string()
                    + &answer.pieces(index).map(|piece| piece.to_string()).collect::<String>();
                for marker in markers(&sent) {
                    prop_assert!(said.contains(marker), "{marker} in {sent} is not in {said}");
                }
            }
            let figures: serde_json::Map<String, Value> = answer.figures().map(|(name, value)| (name.clone(), value.clone())).collect();
            let frame = Value::from(figures).to_string() + &answer.head("id", "model", "object").to_string();
            prop_assert_eq!(markers(&frame).count(), 0);
        }
    }
}
