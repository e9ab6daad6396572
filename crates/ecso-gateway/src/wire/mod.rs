//! Wire formats other than chat completions. A request in such a format is translated into a chat,
//! which is read, sent on, judged and recorded like any other; the answer is translated back. Only
//! the files here know these formats, and whatever they don't know in a request is refused.

mod begun;
mod messages;
mod observed;
mod responses;
mod tools;

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

pub(crate) use begun::Begun;

use crate::{error::ApiError, forms::without_seal, json as strict};

/// The text before the images of a tool result. In a chat these images are the user's, right after
/// the result.
const TOOL_IMAGES_LABEL: &str = "What the tool shows:";

/// A format of requests and answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// Anthropic's `POST /v1/messages`.
    Messages,
    /// OpenAI's `POST /v1/responses`.
    Responses,
}

impl Format {
    /// The route of its requests.
    pub(crate) fn path(self) -> &'static str {
        match self {
            Self::Messages => "/v1/messages",
            Self::Responses => "/v1/responses",
        }
    }

    /// Translates a request into the body of a chat request. Also returns how its answer is
    /// written. `load` returns the messages of a stored conversation up to an answer.
    pub(crate) fn parse(
        self,
        body: Value,
        load: LoadConversation<'_>,
    ) -> Result<(Value, Box<dyn Wire>), ApiError> {
        let (mut chat, wire): (Value, Box<dyn Wire>) = match self {
            Self::Messages => {
                messages::parse(body).map(|(chat, wire)| (chat, Box::new(wire) as _))?
            }
            Self::Responses => {
                responses::parse(body, load).map(|(chat, wire)| (chat, Box::new(wire) as _))?
            }
        };
        // These formats always include the usage.
        match &chat["stream"] {
            Value::Bool(true) => chat["stream_options"] = json!({"include_usage": true}),
            Value::Bool(false) | Value::Null => {}
            _ => return Err(invalid("stream", "must be true or false")),
        }
        Ok((chat, wire))
    }

    /// An error as clients of the format expect it.
    pub(crate) fn failure(self, error: &ApiError) -> Value {
        match self {
            Self::Messages => messages::failure(error),
            Self::Responses => error.object(),
        }
    }
}

/// Returns the messages of a stored conversation up to an answer.
pub(crate) type LoadConversation<'a> = &'a mut dyn FnMut(&str) -> Result<Vec<Value>, ApiError>;

/// The part of a conversation that a request adds.
pub(crate) struct StoredPart<'a> {
    /// The answer that it continues from.
    pub(crate) previous: Option<&'a str>,
    /// The index of its first message in the chat.
    pub(crate) from: usize,
}

/// How an answer is written.
pub(crate) trait Wire: Send + Sync {
    /// What is to be stored with the answer, so that a later request can continue from it. `None`
    /// if the client does not want that.
    fn to_store(&self) -> Option<StoredPart<'_>> {
        None
    }

    /// The kinds of tools that were left out of the request, because a server would run them.
    fn omitted_tools(&self) -> &BTreeSet<String>;

    /// The whole answer.
    fn body(&self, answer: &Answer<'_>) -> Value;

    /// The same answer as the events of a stream: everything that clients of the format expect,
    /// whatever the upstream sent.
    fn events(&self, answer: &Answer<'_>) -> Vec<Value>;

    /// The text of an event that adds to the answer's text; `None` for other events.
    fn added_text<'a>(&self, event: &'a mut Value) -> Option<&'a mut Value>;

    /// The events of a stream that failed before it sent any text. The last one is the failure.
    fn failure_events(&self, request: (&str, &str), error: &ApiError) -> Vec<Value>;
}

/// A judged answer to a chat, ready to go out.
pub(crate) struct Answer<'a> {
    /// The request id.
    pub(crate) id: &'a str,
    /// The requested model.
    pub(crate) model: &'a str,
    /// When it was created, in seconds since 1970.
    pub(crate) created: u64,
    /// The message in the format of chat completions.
    pub(crate) message: &'a Map<String, Value>,
    /// The finish reason in the format of chat completions.
    pub(crate) finish: &'a str,
    /// Whether it is the fixed refusal.
    pub(crate) refused: bool,
    /// The usage that the upstream reported, in the format of chat completions.
    pub(crate) usage: Option<&'a Value>,
    /// What the guard found, for the client.
    pub(crate) report: Option<Value>,
    /// Whether a later request can continue from it.
    pub(crate) is_stored: bool,
    /// The verdict on the model's own answer, and the probability of harm.
    pub(crate) verdict: (ecso::Verdict, Option<f64>),
}

/// A tool call.
pub(crate) struct Call {
    id: String,
    name: String,
    /// JSON text; for a tool that takes any text, that text.
    arguments: String,
}

impl Answer<'_> {
    /// The answer as a message of a chat.
    pub(crate) fn chat_message(&self) -> Value {
        let calls = self.calls().into_iter().map(|Call { id, name, arguments }| {
            json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}})
        });
        let (text, calls) = (self.text(), calls.collect::<Vec<_>>());
        let mut message = json!({"role": "assistant", "content": text});
        if !calls.is_empty() {
            message["tool_calls"] = calls.into();
        }
        message
    }

    /// Its text; a refusal counts as text.
    fn text(&self) -> String {
        let texts = ["content", "refusal"].into_iter().filter_map(|name| self.message.get(name));
        texts.map(content_text).filter(|text| !text.is_empty()).collect::<Vec<_>>().join("\n")
    }

    /// The refusal with which an answer ends that had begun otherwise.
    fn closing_refusal(&self) -> Option<&str> {
        let content = self.message.get("content").map(content_text).unwrap_or_default();
        let refusal = self.message.get("refusal")?.as_str();
        refusal.filter(|refusal| !content.is_empty() && !refusal.is_empty())
    }

    /// The reasoning before it.
    fn thoughts(&self) -> &str {
        let mut names = ["reasoning_content", "reasoning"].into_iter();
        names.find_map(|name| self.message.get(name)?.as_str()).unwrap_or_default()
    }

    /// Its tool calls.
    fn calls(&self) -> Vec<Call> {
        let calls = self.message.get("tool_calls").and_then(Value::as_array).into_iter().flatten();
        let old = self.message.get("function_call").filter(|call| call.is_object());
        let framed = calls.map(|call| {
            let called =
                if call["custom"].is_object() { &call["custom"] } else { &call["function"] };
            (call["id"].as_str().unwrap_or_default(), called)
        });
        let all = framed.chain(old.map(|call| ("", call))).enumerate();
        let call = |(index, (id, called)): (usize, (&str, &Value))| {
            let arguments = match called.get("arguments").or_else(|| called.get("input")) {
                Some(Value::String(text)) if text.trim().is_empty() => "{}".to_owned(),
                Some(Value::String(text)) => text.clone(),
                None | Some(Value::Null) => "{}".to_owned(),
                Some(arguments) => arguments.to_string(),
            };
            // These formats have no place for a signature.
            let id = without_seal(id);
            let id =
                if id.is_empty() { format!("call_{}_{index}", self.id) } else { id.to_owned() };
            Some(Call { id, name: called["name"].as_str()?.to_owned(), arguments })
        };
        all.filter_map(call).collect()
    }

    /// Tokens of the prompt, of the reply, and how many of the prompt were cached. 0 if not
    /// reported.
    fn tokens(&self) -> [u64; 3] {
        let usage = self.usage.unwrap_or(&Value::Null);
        [
            &usage["prompt_tokens"],
            &usage["completion_tokens"],
            &usage["prompt_tokens_details"]["cached_tokens"],
        ]
        .map(|count| count.as_u64().unwrap_or(0))
    }
}

/// The text of a content.
fn content_text(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts.iter().map(|part| content_text(&part["text"])).collect(),
        _ => String::new(),
    }
}

/// An object of a request that is taken apart field by field. Whatever is left at the end is
/// unknown.
struct Fields {
    path: String,
    remaining: Map<String, Value>,
}

impl Fields {
    fn new(value: Value, path: impl Into<String>) -> Result<Self, ApiError> {
        let path = path.into();
        match value {
            Value::Object(remaining) => Ok(Self { path, remaining }),
            _ => Err(invalid(&path, "must be an object")),
        }
    }

    /// The path of a field in the request.
    fn path_of(&self, name: &str) -> String {
        if self.path.is_empty() {
            strict::printable(name)
        } else {
            format!("{}.{}", self.path, strict::printable(name))
        }
    }

    /// Takes a field. Null counts as missing.
    fn take(&mut self, name: &str) -> Option<Value> {
        self.remaining.remove(name).filter(|value| !value.is_null())
    }

    fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(invalid(&self.path_of(name), "must be a text")),
        }
    }

    fn required_text(&mut self, name: &str) -> Result<String, ApiError> {
        self.text(name)?.ok_or_else(|| invalid(&self.path_of(name), "is missing"))
    }

    fn list(&mut self, name: &str) -> Result<Vec<Value>, ApiError> {
        match self.take(name) {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) => Ok(list),
            Some(_) => Err(invalid(&self.path_of(name), "must be a list")),
        }
    }

    /// Moves a field into the body of a chat, under another name.
    fn move_to(&mut self, name: &str, chat: &mut Map<String, Value>, to: &str) {
        if let Some(value) = self.take(name) {
            chat.insert(to.to_owned(), value);
        }
    }

    /// Drops fields that change neither the question nor the answer.
    fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.remaining.remove(*name);
        }
    }

    /// Returns an error if any field is left.
    fn finish(self) -> Result<(), ApiError> {
        match self.remaining.iter().find(|(_, value)| !value.is_null()) {
            None => Ok(()),
            Some((name, _)) => {
                let path = self.path_of(name);
                let message = format!(
                    "`{path}` is not known to the guard, so it can't be judged: leave it out"
                );
                Err(ApiError {
                    param: Some(path),
                    ..ApiError::bad_request("unknown_field", message)
                })
            }
        }
    }
}

fn invalid(path: &str, why: &str) -> ApiError {
    ApiError {
        param: Some(path.to_owned()),
        ..ApiError::bad_request("invalid_request", format!("`{path}` {why}"))
    }
}

/// The field that names an earlier answer.
pub(crate) const PREVIOUS_RESPONSE_ID: &str = "previous_response_id";

/// The error for a conversation that is stored elsewhere, where it can't be judged.
pub(crate) fn external_conversation(name: &str) -> ApiError {
    let message = format!(
        "`{name}` names a conversation that is stored elsewhere, where it can't be judged: send \
         the whole conversation as `input`"
    );
    ApiError {
        param: Some(name.to_owned()),
        ..ApiError::bad_request("unsupported_content", message)
    }
}

/// The error for content that the guard can't see into.
fn unsupported(path: &str, kind: &str) -> ApiError {
    let message = format!("`{path}`: `{}` can't be guarded", strict::printable(kind));
    ApiError {
        param: Some(path.to_owned()),
        ..ApiError::bad_request("unsupported_content", message)
    }
}
