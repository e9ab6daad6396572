//! Reads answers that an upstream gave in another format than chat completions, so that they can be
//! observed as the answer to a chat.

use std::collections::{BTreeMap, HashSet};

use bytes::Bytes;
use ecso_openai::lenient;
use futures::StreamExt;
use serde_json::{Map, Value, json};
use sse_stream::SseStream;

use super::Format;
use crate::{
    completion::Completion,
    error::ApiError,
    json::{collect_texts, has_no_prose, is_field_name},
};

impl Format {
    /// Parses an answer of this format, whole or as a stream.
    pub(crate) async fn parse_answer(
        self,
        bytes: Vec<u8>,
        is_stream: bool,
    ) -> Result<Completion, ApiError> {
        let broken =
            |why: &str| ApiError::upstream("the upstream's answer can't be read").because(why);
        let answer = if is_stream {
            let whole = match self {
                Self::Messages => message_of_events(&events(bytes).await?),
                Self::Responses => response_of_events(&events(bytes).await?),
            };
            whole.ok_or_else(|| broken("it ended before the answer did"))?
        } else {
            let text = String::from_utf8(bytes).map_err(|error| broken(&error.to_string()))?;
            lenient::parse(&text).map_err(|error| broken(&error.to_string()))?
        };
        Completion::parse(self.to_chat(&answer)?.to_string().as_bytes())
    }

    /// Everything that an answer of this format says, as the answer to a chat.
    pub(crate) fn to_chat(self, answer: &Value) -> Result<Value, ApiError> {
        let texts = match self {
            Self::Messages => AnswerTexts::of_message(answer),
            Self::Responses => AnswerTexts::of_response(answer),
        };
        let unreadable = || {
            ApiError::upstream("the upstream's answer can't be read")
                .because("it is not an answer of this format, or not a complete one")
        };
        Ok(texts.ok_or_else(unreadable)?.into_chat())
    }
}

/// The data of the events of a stream.
async fn events(bytes: Vec<u8>) -> Result<Vec<Value>, ApiError> {
    let broken = |why: String| ApiError::upstream("the upstream's stream broke").because(why);
    let mut stream =
        SseStream::from_bytes_stream(futures::stream::iter([Ok::<_, std::io::Error>(
            Bytes::from(bytes),
        )]));
    let mut events = Vec::new();
    while let Some(event) = stream.next().await {
        let event = event.map_err(|error| broken(error.to_string()))?;
        let Some(data) = event.data.filter(|data| data.trim() != "[DONE]") else { continue };
        let event: Value = lenient::parse(&data).map_err(|error| broken(error.to_string()))?;
        if event["type"] == "error" || event["type"] == "response.failed" {
            return Err(broken("it reports a failure".into()));
        }
        events.push(event);
    }
    Ok(events)
}

/// The response of a stream: the final one, with whatever the earlier events said differently.
fn response_of_events(events: &[Value]) -> Option<Value> {
    let is_last = |event: &&Value| {
        event["type"] == "response.completed" || event["type"] == "response.incomplete"
    };
    let mut whole = events.iter().rfind(is_last)?["response"].as_object()?.clone();
    let mut output = whole.get("output").and_then(Value::as_array).cloned().unwrap_or_default();
    let done = events.iter().filter(|event| event["type"] == "response.output_item.done");
    let at = |event: &Value| output.get(usize::try_from(event["output_index"].as_u64()?).ok()?);
    let changed: Vec<Value> = done
        .filter(|event| at(event) != Some(&event["item"]))
        .map(|event| event["item"].clone())
        .collect();
    output.extend(changed);
    let mut chunks: BTreeMap<String, String> = BTreeMap::new();
    for event in events {
        if let Some(chunk) = event["delta"].as_str() {
            let key = [
                &event["type"],
                &event["item_id"],
                &event["output_index"],
                &event["content_index"],
            ];
            chunks.entry(json!(key).to_string()).or_default().push_str(chunk);
        }
    }
    let mut known = HashSet::new();
    for item in &output {
        collect_texts(item, &mut known);
    }
    let unknown = chunks.values().filter(|text| !known.contains(text.as_str()));
    let parts: Vec<Value> =
        unknown.map(|text| json!({"type": "output_text", "text": text})).collect();
    output.push(json!({"type": "message", "content": parts}));
    whole.insert("output".to_owned(), output.into());
    whole.insert("status".to_owned(), "completed".into());
    Some(whole.into())
}

/// The message that the events of a stream build.
fn message_of_events(events: &[Value]) -> Option<Value> {
    let mut blocks: BTreeMap<u64, Value> = BTreeMap::new();
    let (mut is_whole, mut details) = (false, Value::Null);
    for event in events {
        let index = event["index"].as_u64().unwrap_or_default();
        match event["type"].as_str() {
            Some("content_block_start") if event["content_block"].is_object() => {
                blocks.insert(index, event["content_block"].clone());
            }
            Some("content_block_delta") => {
                let block = blocks.entry(index).or_insert_with(|| json!({}));
                for (name, chunk) in event["delta"].as_object().into_iter().flatten() {
                    let name = if name == "partial_json" { "pieces" } else { name };
                    match (name, block.get_mut(name), chunk) {
                        ("type" | "signature", _, _) => {}
                        (_, Some(Value::String(text)), Value::String(chunk)) => {
                            text.push_str(chunk);
                        }
                        // There may be more than one of these values.
                        (_, Some(Value::Array(list)), chunk) => list.push(chunk.clone()),
                        (_, _, Value::String(chunk)) => block[name] = chunk.as_str().into(),
                        (_, _, chunk) => block[name] = json!([chunk]),
                    }
                }
            }
            Some("message_delta") => {
                is_whole |= event["delta"]["stop_reason"].is_string();
                details = event["delta"]["stop_details"].clone();
            }
            Some("message_stop") => is_whole = true,
            _ => {}
        }
    }
    let content: Vec<Value> = blocks.into_values().collect();
    is_whole.then(|| json!({"type": "message", "content": content, "stop_details": details}))
}

/// The texts of an answer.
#[derive(Default)]
struct AnswerTexts {
    texts: Vec<String>,
    thoughts: Vec<String>,
    calls: Vec<Value>,
}

impl AnswerTexts {
    /// From a message; `None` if it isn't one.
    fn of_message(message: &Value) -> Option<Self> {
        let mut texts = Self::default();
        let blocks = message["content"].as_array().filter(|_| message["type"] == "message")?;
        for block in blocks {
            match (block["type"].as_str(), &block["text"], &block["thinking"]) {
                (Some("text"), Value::String(text), _) => {
                    texts.texts.push(text.clone());
                    texts.extra_fields(block, &["type", "text"]);
                }
                (Some("thinking"), _, Value::String(thought)) => {
                    texts.thoughts.push(thought.clone());
                    texts.extra_fields(block, &["type", "thinking", "signature"]);
                }
                (Some("tool_use"), ..) => {
                    // In a stream, the input comes in chunks.
                    let input = block["input"].to_string();
                    let (name, arguments) =
                        block["pieces"].as_str().map_or(("input", &*input), |all| ("pieces", all));
                    texts.call(&block["name"], arguments);
                    texts.extra_fields(block, &["type", "id", "name", name]);
                }
                _ => texts.unknown(block),
            }
        }
        let mut rest = message.as_object().cloned().unwrap_or_default();
        rest.retain(|name, value| {
            name != "content" && !(is_field_name(name) && has_no_prose(value))
        });
        texts.extra_fields(&rest.into(), &[]);
        Some(texts)
    }

    /// From a response; `None` if it isn't one, or isn't complete.
    fn of_response(response: &Value) -> Option<Self> {
        let mut texts = Self::default();
        let is_done = response["status"] == "completed" || response["status"] == "incomplete";
        for item in response["output"].as_array().filter(|_| is_done)? {
            match (item["type"].as_str(), &item["arguments"]) {
                (Some("message"), _) => {
                    let parts = texts.parts(&item["content"]);
                    texts.texts.extend(parts);
                    texts.extra_fields(item, &["type", "id", "role", "status", "phase", "content"]);
                }
                (Some("reasoning"), _) => {
                    let thoughts = [&item["content"], &item["summary"]]
                        .map(|parts| texts.parts(parts))
                        .concat();
                    texts.thoughts.extend(thoughts);
                    texts.extra_fields(
                        item,
                        &["type", "id", "status", "content", "summary", "encrypted_content"],
                    );
                }
                (Some("function_call"), Value::String(arguments)) => {
                    texts.call(&item["name"], arguments);
                }
                (Some("custom_tool_call"), _) => {
                    texts.call(&item["name"], &item["input"].to_string());
                }
                _ => texts.unknown(item),
            }
        }
        texts.extra_fields(&json!({"output_text": response["output_text"]}), &[]);
        Some(texts)
    }

    /// The texts of parts.
    fn parts(&mut self, parts: &Value) -> Vec<String> {
        let Value::Array(parts) = parts else {
            self.extra_fields(&json!({"content": parts}), &[]);
            return Vec::new();
        };
        let mut texts = Vec::new();
        for part in parts {
            texts.extend(
                ["text", "refusal"]
                    .into_iter()
                    .filter_map(|name| part[name].as_str())
                    .map(str::to_owned),
            );
            self.extra_fields(part, &["type", "text", "refusal", "logprobs"]);
        }
        texts
    }

    /// Adds the fields of a block, item or part that are not `known`.
    fn extra_fields(&mut self, value: &Value, known: &[&str]) {
        let Value::Object(fields) = value else { return self.unknown(value) };
        let says_nothing = |value: &Value| match value {
            Value::Null => true,
            Value::Array(list) => list.is_empty(),
            Value::Object(fields) => fields.is_empty(),
            _ => false,
        };
        let mut rest = fields.clone();
        rest.retain(|name, value| !known.contains(&name.as_str()) && !says_nothing(value));
        if !rest.is_empty() {
            self.unknown(&rest.into());
        }
    }

    fn call(&mut self, name: &Value, arguments: &str) {
        self.calls
            .push(json!({"type": "function", "function": {"name": name, "arguments": arguments}}));
    }

    /// What has no place in a chat is judged as JSON.
    fn unknown(&mut self, item: &Value) {
        self.call(&item["type"], &item.to_string());
    }

    fn into_chat(self) -> Value {
        let mut message = Map::from_iter([("content".to_owned(), self.texts.join("\n").into())]);
        if !self.thoughts.is_empty() {
            message.insert("reasoning_content".to_owned(), self.thoughts.join("\n").into());
        }
        if !self.calls.is_empty() {
            message.insert("tool_calls".to_owned(), self.calls.into());
        }
        json!({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn text_of(format: Format, streamed: bool, text: &str) -> Option<String> {
        let answer = format.parse_answer(text.as_bytes().to_vec(), streamed).await.ok()?;
        answer.texts().remove(&0)
    }

    #[tokio::test]
    async fn every_answer_is_read_completely_or_an_error() {
        // What has no place in a chat is judged as JSON.
        for content in [
            json!([{"type": "server_tool_use", "input": {"query": "flour"}}]),
            json!([{"type": "tool_use", "name": "bake", "input": {"query": "flour"}}]),
            json!([{"type": "text", "text": "Rye.", "citations": [{"cited_text": "flour"}]}]),
            json!(["flour"]),
        ] {
            let whole = json!({"type": "message", "content": content}).to_string();
            assert!(
                text_of(Format::Messages, false, &whole).await.unwrap().contains("flour"),
                "{whole}"
            );
        }
        for extra in [
            json!({"stop_details": {"explanation": "more flour"}}),
            json!({"usage": {"note": "more flour"}}),
            json!({"note": ["more flour"]}),
            json!({"more flour": 1}),
        ] {
            let mut message = json!({"type": "message", "content": [], "id": "msg_1", "usage": {"input_tokens": 1}});
            message.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            let whole = message.to_string();
            assert!(
                text_of(Format::Messages, false, &whole).await.unwrap().contains("flour"),
                "{whole}"
            );
        }
        let plain = json!({"type": "message", "content": [{"type": "text", "text": "Rye."}], "id": "msg_1", "usage": {"input_tokens": 1}});
        assert_eq!(
            text_of(Format::Messages, false, &plain.to_string()).await.as_deref(),
            Some("Rye.")
        );
        for item in [
            json!({"type": "mcp_call", "output": "flour"}),
            json!({"type": "message", "content": "flour"}),
            json!({"type": "message", "content": [{"type": "output_audio", "transcript": "flour"}]}),
            json!({"type": "message", "content": [{"type": "output_text", "text": "Rye.", "annotations": [{"title": "flour"}]}]}),
            json!({"type": "function_call", "name": "bake", "arguments": {"query": "flour"}}),
            json!("flour"),
        ] {
            let whole = json!({"status": "completed", "output": [item]}).to_string();
            assert!(
                text_of(Format::Responses, false, &whole).await.unwrap().contains("flour"),
                "{whole}"
            );
        }
        let extra =
            json!({"status": "completed", "output": [], "output_text": "flour"}).to_string();
        assert!(text_of(Format::Responses, false, &extra).await.unwrap().contains("flour"));
        // Other objects are errors, whatever they say.
        for whole in [
            json!({"type": "error", "error": {"message": "flour"}}),
            json!({"type": "message", "content": "flour"}),
            json!({"status": "failed", "output": [], "error": {"message": "flour"}}),
            json!({"status": "completed", "output": "flour"}),
            json!([{"output_text": "flour"}]),
            json!("flour"),
        ] {
            for format in [Format::Messages, Format::Responses] {
                assert_eq!(text_of(format, false, &whole.to_string()).await, None, "{whole}");
            }
        }
    }

    #[tokio::test]
    async fn every_stream_is_read_completely_or_an_error() {
        let stream = |events: &[Value]| {
            events.iter().map(|event| format!("data: {event}\n\n")).collect::<Vec<_>>().concat()
        };
        // Clients show the chunks, whatever the final response says.
        let message = |text: &str| json!({"type": "message", "content": [{"type": "output_text", "text": text}]});
        let chunk = |text: &str| json!({"type": "response.output_text.delta", "item_id": "i", "delta": text});
        let ended =
            |output: Value| json!({"type": "response.completed", "response": {"output": output}});
        for (events, text) in [
            (vec![chunk("flo"), chunk("ur"), ended(json!([]))], "flour"),
            (vec![chunk("flo"), chunk("ur"), ended(json!([message("rye")]))], "rye\nflour"),
            (vec![chunk("r"), chunk("ye"), ended(json!([message("rye")]))], "rye"),
            (
                vec![
                    json!({"type": "response.output_item.done", "item": message("flour")}),
                    ended(json!([message("rye")])),
                ],
                "rye\nflour",
            ),
        ] {
            assert_eq!(
                text_of(Format::Responses, true, &stream(&events)).await.as_deref(),
                Some(text),
                "{events:?}"
            );
        }
        let cited = stream(&[
            json!({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}),
            json!({"type": "content_block_delta", "index": 0, "delta": {"type": "citations_delta", "citation": {"cited_text": "flour"}}}),
            json!({"type": "message_stop"}),
        ]);
        assert!(text_of(Format::Messages, true, &cited).await.unwrap().contains("flour"));
        for format in [Format::Messages, Format::Responses] {
            for whole in ["", "rye", "{", "\u{0}"] {
                assert_eq!(text_of(format, false, whole).await, None, "{whole:?}");
            }
            let broken = [
                stream(&[]),
                stream(&[json!({"type": "error", "error": {"message": "no"}})]),
                stream(&[json!({"type": "response.failed", "response": {}})]),
                stream(&[
                    json!({"type": "content_block_start", "index": 0, "content_block": "rye"}),
                ]),
                stream(&[
                    json!({"type": "content_block_delta", "index": 0, "delta": {"text": "rye"}}),
                ]),
                "data: rye\n\n".to_owned(),
            ];
            for text in broken {
                assert_eq!(text_of(format, true, &text).await, None, "{text}");
            }
        }
        // Values of the wrong type say nothing, and break nothing.
        let unusual = stream(&[
            json!({"type": "content_block_start", "index": 0, "content_block": "rye"}),
            json!({"type": "content_block_delta", "index": 0, "delta": {"text": "Flour."}}),
            json!({"type": "message_stop"}),
        ]);
        assert!(text_of(Format::Messages, true, &unusual).await.is_some());
        let unusual = stream(&[json!({"type": "response.completed", "response": "rye"})]);
        assert_eq!(text_of(Format::Responses, true, &unusual).await, None);
    }
}
