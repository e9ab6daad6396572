//! Answers that an upstream gives in another format than chat completions, for whoever observes it: the same as a chat's answer.

use std::collections::BTreeMap;

use bytes::Bytes;
use ecso_openai::lenient;
use futures::StreamExt;
use serde_json::{Map, Value, json};
use sse_stream::SseStream;

use super::Format;
use crate::{completion::Completion, error::ApiError};

impl Format {
    /// Reads an answer of the format, whole or as its stream.
    pub(crate) async fn heard(self, seen: Vec<u8>, streamed: bool) -> Result<Completion, ApiError> {
        let broken = |why: &str| ApiError::upstream("the upstream's answer can't be read").because(why);
        let answer = if streamed {
            let whole = match self {
                Self::Messages => message(&events(seen).await?),
                Self::Responses => response(&events(seen).await?),
            };
            whole.ok_or_else(|| broken("it ended before the answer did"))?
        } else {
            let text = String::from_utf8(seen).map_err(|error| broken(&error.to_string()))?;
            lenient::parse(&text).map_err(|error| broken(&error.to_string()))?
        };
        let said = match self {
            Self::Messages => Said::of_blocks(&answer["content"]),
            Self::Responses => Said::of_items(&answer["output"]),
        };
        Completion::whole(said.chat().to_string().as_bytes())
    }
}

/// The data of a stream's events.
async fn events(seen: Vec<u8>) -> Result<Vec<Value>, ApiError> {
    let broken = |why: String| ApiError::upstream("the upstream's stream broke").because(why);
    let mut stream = SseStream::from_bytes_stream(futures::stream::iter([Ok::<_, std::io::Error>(Bytes::from(seen))]));
    let mut events = Vec::new();
    while let Some(event) = stream.next().await {
        let event = event.map_err(|error| broken(error.to_string()))?;
        let Some(data) = event.data.filter(|data| data.trim() != "[DONE]") else { continue };
        let event: Value = lenient::parse(&data).map_err(|error| broken(error.to_string()))?;
        if event["type"] == "error" || event["type"] == "response.failed" {
            return Err(broken("it says that it failed".into()));
        }
        events.push(event);
    }
    Ok(events)
}

/// What a stream's response says: at its end, or where that says nothing, item by item.
fn response(events: &[Value]) -> Option<Value> {
    let is_last = |event: &&Value| event["type"] == "response.completed" || event["type"] == "response.incomplete";
    let output = &events.iter().rfind(is_last)?["response"]["output"];
    if output.as_array().is_some_and(|items| !items.is_empty()) {
        return Some(json!({"output": output}));
    }
    let done = events.iter().filter(|event| event["type"] == "response.output_item.done");
    Some(json!({"output": done.map(|event| event["item"].clone()).collect::<Vec<_>>()}))
}

/// The message that the pieces of a stream make.
fn message(events: &[Value]) -> Option<Value> {
    let mut blocks: BTreeMap<u64, Value> = BTreeMap::new();
    let mut is_whole = false;
    for event in events {
        let index = event["index"].as_u64().unwrap_or_default();
        match event["type"].as_str() {
            Some("content_block_start") if event["content_block"].is_object() => {
                blocks.insert(index, event["content_block"].clone());
            }
            Some("content_block_delta") => {
                let block = blocks.entry(index).or_insert_with(|| json!({}));
                for (name, piece) in [("text", "text"), ("thinking", "thinking"), ("pieces", "partial_json")] {
                    if let Some(piece) = event["delta"][piece].as_str() {
                        let before = block[name].as_str().unwrap_or_default();
                        block[name] = format!("{before}{piece}").into();
                    }
                }
            }
            Some("message_delta") => is_whole |= event["delta"]["stop_reason"].is_string(),
            Some("message_stop") => is_whole = true,
            _ => {}
        }
    }
    is_whole.then(|| json!({"content": blocks.into_values().collect::<Vec<_>>()}))
}

/// What an answer says.
#[derive(Default)]
struct Said {
    texts: Vec<String>,
    thoughts: Vec<String>,
    calls: Vec<Value>,
}

impl Said {
    fn of_blocks(blocks: &Value) -> Self {
        let mut said = Self::default();
        for block in blocks.as_array().into_iter().flatten() {
            match block["type"].as_str() {
                Some("text") => said.texts.extend(text(&block["text"])),
                Some("thinking") => said.thoughts.extend(text(&block["thinking"])),
                Some("tool_use") => {
                    let pieces = text(&block["pieces"]).unwrap_or_else(|| block["input"].to_string());
                    said.call(&block["name"], &pieces);
                }
                _ => said.other(block),
            }
        }
        said
    }

    fn of_items(items: &Value) -> Self {
        let mut said = Self::default();
        for item in items.as_array().into_iter().flatten() {
            let parts = || [&item["content"], &item["summary"]].into_iter().filter_map(Value::as_array).flatten();
            let texts = || parts().flat_map(|part| [&part["text"], &part["refusal"]]).filter_map(text);
            match item["type"].as_str() {
                Some("message") => said.texts.extend(texts()),
                Some("reasoning") => said.thoughts.extend(texts()),
                Some("function_call") => said.call(&item["name"], item["arguments"].as_str().unwrap_or_default()),
                Some("custom_tool_call") => said.call(&item["name"], &item["input"].to_string()),
                _ => said.other(item),
            }
        }
        said
    }

    fn call(&mut self, name: &Value, arguments: &str) {
        self.calls.push(json!({"type": "function", "function": {"name": name, "arguments": arguments}}));
    }

    /// What has no place in a chat is judged as it stands.
    fn other(&mut self, item: &Value) {
        self.call(&item["type"], &item.to_string());
    }

    fn chat(self) -> Value {
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

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn said(format: Format, streamed: bool, text: &str) -> Option<String> {
        let heard = format.heard(text.as_bytes().to_vec(), streamed).await.ok()?;
        heard.said().remove(&0)
    }

    #[tokio::test]
    async fn whatever_an_upstream_sends_is_heard_or_an_error() {
        let stream =
            |events: &[Value]| events.iter().map(|event| format!("data: {event}\n\n")).collect::<Vec<_>>().concat();
        // What has no place in a chat is heard as it stands.
        let odd = r#"{"content": [{"type": "text", "text": "Rye."}, {"type": "server_tool_use", "input": {"query": "flour"}}]}"#;
        let heard = said(Format::Messages, false, odd).await.unwrap();
        assert!(heard.contains("Rye.") && heard.contains("flour"), "{heard}");
        let odd = r#"{"output": [{"type": "mcp_call", "output": "flour"}, "rye"]}"#;
        assert!(said(Format::Responses, false, odd).await.unwrap().contains("flour"));
        for format in [Format::Messages, Format::Responses] {
            for whole in ["", "rye", "{", "\u{0}"] {
                assert_eq!(said(format, false, whole).await, None, "{whole:?}");
            }
            let broken = [
                stream(&[]),
                stream(&[json!({"type": "error", "error": {"message": "no"}})]),
                stream(&[json!({"type": "response.failed", "response": {}})]),
                stream(&[json!({"type": "content_block_start", "index": 0, "content_block": "rye"})]),
                stream(&[json!({"type": "content_block_delta", "index": 0, "delta": {"text": "rye"}})]),
                "data: rye\n\n".to_owned(),
            ];
            for text in broken {
                assert_eq!(said(format, true, &text).await, None, "{text}");
            }
        }
        // Values of the wrong kind say nothing, and break nothing.
        let odd = stream(&[
            json!({"type": "content_block_start", "index": 0, "content_block": "rye"}),
            json!({"type": "content_block_delta", "index": 0, "delta": {"text": "Flour."}}),
            json!({"type": "message_stop"}),
        ]);
        assert!(said(Format::Messages, true, &odd).await.is_some());
        let odd = stream(&[json!({"type": "response.completed", "response": "rye"})]);
        assert_eq!(said(Format::Responses, true, &odd).await.as_deref(), Some(""));
    }
}
