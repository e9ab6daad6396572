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

/// The response that a stream ends with; its items, where it says them only one by one.
fn response(events: &[Value]) -> Option<Value> {
    let is_last = |event: &&Value| event["type"] == "response.completed" || event["type"] == "response.incomplete";
    let mut response = events.iter().rfind(is_last)?["response"].clone();
    if response["output"].as_array().is_none_or(Vec::is_empty) {
        let done = events.iter().filter(|event| event["type"] == "response.output_item.done");
        response["output"] = done.map(|event| event["item"].clone()).collect();
    }
    Some(response)
}

/// The message that the pieces of a stream make.
fn message(events: &[Value]) -> Option<Value> {
    let mut blocks: BTreeMap<u64, Value> = BTreeMap::new();
    let mut is_whole = false;
    for event in events {
        let index = event["index"].as_u64().unwrap_or_default();
        match event["type"].as_str() {
            Some("content_block_start") => {
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
