//! Wire formats beside chat completions. A request of such a format becomes a chat, which is read,
//! sent on, judged and recorded as every chat is; the answer to that chat becomes an answer of the
//! format. So nobody but the files here knows what it looks like, and what a file here doesn't know
//! of a request is refused.

mod messages;
mod observed;
mod responses;
mod tools;

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use crate::{error::ApiError, json as strict};

/// What stands before images that a tool gave back: in a chat they are the user's, right behind the
/// tool's result.
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

    /// The chat that a request asks for, as the body of a chat request; and how its answer is
    /// written. `earlier` gives the messages of the conversation up to an answer of ours.
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
        // These formats always tell it.
        match &chat["stream"] {
            Value::Bool(true) => chat["stream_options"] = json!({"include_usage": true}),
            Value::Bool(false) | Value::Null => {}
            _ => return Err(invalid("stream", "it is true or false")),
        }
        Ok((chat, wire))
    }

    /// A failure, as clients of the format know it.
    pub(crate) fn failure(self, error: &ApiError) -> Value {
        match self {
            Self::Messages => messages::failure(error),
            Self::Responses => error.object(),
        }
    }
}

/// Gives the messages of the conversation up to an answer.
pub(crate) type LoadConversation<'a> = &'a mut dyn FnMut(&str) -> Result<Vec<Value>, ApiError>;

/// The part of a conversation that a request brings.
pub(crate) struct StoredPart<'a> {
    /// The answer that it goes on from.
    pub(crate) previous: Option<&'a str>,
    /// Its first message in the chat.
    pub(crate) from: usize,
}

/// How an answer is written.
pub(crate) trait Wire: Send + Sync {
    /// What is to be kept beside the answer, so that a later request can go on from it; none if
    /// that is not wanted.
    fn to_store(&self) -> Option<StoredPart<'_>> {
        None
    }

    /// Kinds of tools of the request that are left out: a server would run them.
    fn omitted_tools(&self) -> &BTreeSet<String>;

    /// The whole answer.
    fn body(&self, answer: &Answer<'_>) -> Value;

    /// The same as the events of a stream: all that clients of the format wait for, whatever the
    /// upstream sent.
    fn events(&self, answer: &Answer<'_>) -> Vec<Value>;

    /// A failure of a stream that has said nothing yet: what its clients wait for in this place.
    fn failure_events(&self, request: (&str, &str), error: &ApiError) -> Vec<Value>;
}

/// A judged answer to a chat, as it is to go out.
pub(crate) struct Answer<'a> {
    /// The request's name.
    pub(crate) id: &'a str,
    /// The model that was asked for.
    pub(crate) model: &'a str,
    /// When it was made, in seconds since 1970.
    pub(crate) created: u64,
    /// The message, as chat completions have it.
    pub(crate) message: &'a Map<String, Value>,
    /// Why it ended, as chat completions have it.
    pub(crate) finish: &'a str,
    /// Whether it is the guard's fixed refusal.
    pub(crate) refused: bool,
    /// The usage that the upstream tells, as chat completions have it.
    pub(crate) usage: Option<&'a Value>,
    /// What was found, for the client.
    pub(crate) report: Option<Value>,
    /// Whether a later request can go on from it.
    pub(crate) is_stored: bool,
    /// Whether the guard calls the model's own answer harmful, and how likely that is.
    pub(crate) verdict: (ecso::Verdict, Option<f64>),
}

/// A tool that is called.
pub(crate) struct Call {
    id: String,
    name: String,
    /// As JSON text; of a tool that takes any text that text.
    arguments: String,
}

impl Answer<'_> {
    /// What the client gets, as a message of a chat.
    pub(crate) fn chat_message(&self) -> Value {
        let calls = self.calls().into_iter().map(|Call { id, name, arguments }| {
            json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}})
        });
        let (text, calls) = (self.text(), calls.collect::<Vec<_>>());
        let mut said = json!({"role": "assistant", "content": text});
        if !calls.is_empty() {
            said["tool_calls"] = calls.into();
        }
        said
    }

    /// Its text; a refusal is one too.
    fn text(&self) -> String {
        let texts = ["content", "refusal"].into_iter().filter_map(|name| self.message.get(name));
        texts.map(content_text).filter(|text| !text.is_empty()).collect::<Vec<_>>().join("\n")
    }

    /// What the model thought before it.
    fn thoughts(&self) -> &str {
        let mut places = ["reasoning_content", "reasoning"].into_iter();
        places.find_map(|name| self.message.get(name)?.as_str()).unwrap_or_default()
    }

    /// The tools that it calls.
    fn calls(&self) -> Vec<Call> {
        let calls = self.message.get("tool_calls").and_then(Value::as_array).into_iter().flatten();
        let old = self.message.get("function_call").filter(|call| call.is_object());
        let framed = calls.map(|call| {
            let called =
                if call["custom"].is_object() { &call["custom"] } else { &call["function"] };
            (call["id"].as_str().unwrap_or_default(), called)
        });
        let all = framed.chain(old.map(|call| ("", call))).enumerate();
        let call = |(place, (id, called)): (usize, (&str, &Value))| {
            let arguments = match called.get("arguments").or_else(|| called.get("input")) {
                Some(Value::String(text)) if text.trim().is_empty() => "{}".to_owned(),
                Some(Value::String(text)) => text.clone(),
                None | Some(Value::Null) => "{}".to_owned(),
                Some(arguments) => arguments.to_string(),
            };
            // Behind the mark a seal follows, which these formats have no place for.
            let id = id.split("__thought__").next().unwrap_or_default();
            let id =
                if id.is_empty() { format!("call_{}_{place}", self.id) } else { id.to_owned() };
            Some(Call { id, name: called["name"].as_str()?.to_owned(), arguments })
        };
        all.filter_map(call).collect()
    }

    /// Tokens of the prompt and of the reply, and how many of the former lay in a cache; 0 where
    /// nobody tells.
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

/// An object of a request, taken apart field by field: what is left at its end is not known.
struct Fields {
    path: String,
    remaining: Map<String, Value>,
}

impl Fields {
    fn new(value: Value, path: impl Into<String>) -> Result<Self, ApiError> {
        let path = path.into();
        match value {
            Value::Object(remaining) => Ok(Self { path, remaining }),
            _ => Err(invalid(&path, "it must be an object")),
        }
    }

    /// A field's place in the request.
    fn path_of(&self, name: &str) -> String {
        if self.path.is_empty() {
            strict::printable(name)
        } else {
            format!("{}.{}", self.path, strict::printable(name))
        }
    }

    /// Takes a field; null is none.
    fn take(&mut self, name: &str) -> Option<Value> {
        self.remaining.remove(name).filter(|value| !value.is_null())
    }

    fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(invalid(&self.path_of(name), "it must be a text")),
        }
    }

    fn required_text(&mut self, name: &str) -> Result<String, ApiError> {
        self.text(name)?.ok_or_else(|| invalid(&self.path_of(name), "it is missing"))
    }

    fn list(&mut self, name: &str) -> Result<Vec<Value>, ApiError> {
        match self.take(name) {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) => Ok(list),
            Some(_) => Err(invalid(&self.path_of(name), "it must be a list")),
        }
    }

    /// Puts a field into a chat's body, under another name.
    fn move_to(&mut self, name: &str, chat: &mut Map<String, Value>, to: &str) {
        if let Some(value) = self.take(name) {
            chat.insert(to.to_owned(), value);
        }
    }

    /// Leaves fields out that change nothing about what is asked and answered.
    fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.remaining.remove(*name);
        }
    }

    /// Holds that all was known.
    fn finish(self) -> Result<(), ApiError> {
        match self.remaining.iter().find(|(_, value)| !value.is_null()) {
            None => Ok(()),
            Some((name, _)) => {
                let path = self.path_of(name);
                let message = format!(
                    "`{path}` is not known to the guard, so that it can't be judged: leave it out"
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
        ..ApiError::bad_request("invalid_request", format!("`{path}`: {why}"))
    }
}

/// The field that names an earlier answer.
pub(crate) const PREVIOUS_RESPONSE_ID: &str = "previous_response_id";

/// Something that lies where nobody here can judge it.
pub(crate) fn external_conversation(name: &str) -> ApiError {
    let message = format!(
        "`{name}` names a conversation that lies elsewhere, where nobody here can judge it: send it whole, as `input`"
    );
    ApiError {
        param: Some(name.to_owned()),
        ..ApiError::bad_request("unsupported_content", message)
    }
}

/// Something that can't be guarded: nobody here sees what is in it.
fn unsupported(path: &str, kind: &str) -> ApiError {
    let message = format!("`{path}`: `{}` can't be guarded", strict::printable(kind));
    ApiError {
        param: Some(path.to_owned()),
        ..ApiError::bad_request("unsupported_content", message)
    }
}
