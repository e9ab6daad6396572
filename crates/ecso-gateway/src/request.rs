//! A chat request, read: as a conversation that can be guarded, with the client's own wishes about the answer.

use base64::{Engine, prelude::BASE64_STANDARD};
use ecso::{Chat, Image, Part, Role, Sampling, Turn, is_data_url};
use serde_json::{Map, Value};

use crate::{failure::Failure, settings::Limits};

/// Fields that step 4 does not get: they are about this one request, or about things that an answer from hints has not.
const NOT_FOR_THE_SAFE_ANSWER: [&str; 19] = [
    "model",
    "messages",
    "stream",
    "stream_options",
    "n",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "functions",
    "function_call",
    "logprobs",
    "top_logprobs",
    "modalities",
    "audio",
    "prediction",
    "continue_final_message",
    "add_generation_prompt",
    "echo",
    "ecso",
];

/// Fields that change how a model sees or thinks, so that the guard's own calls carry them too.
const FOR_EVERY_CALL: [&str; 2] = ["chat_template_kwargs", "mm_processor_kwargs"];

/// A chat request.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    fields: Map<String, Value>,
    /// The conversation.
    pub(crate) chat: Chat,
    /// The model that is asked for.
    pub(crate) model: String,
    /// Whether the answer is to be streamed.
    pub(crate) stream: bool,
    /// The request's bytes with its data URLs as they were read here, where a server might read them otherwise.
    pub(crate) rewritten: Option<Vec<u8>>,
    /// How many answers.
    pub(crate) choices: u32,
}

impl Request {
    /// Reads a request whose images stand in it or are URLs.
    pub(crate) fn read(body: &[u8], limits: &Limits, images: ecso::Limits) -> Result<Self, Failure> {
        let invalid = |message: String| Failure::bad_request("invalid_request", message);
        let mut fields: Map<String, Value> =
            serde_json::from_slice(body).map_err(|error| invalid(format!("the body can't be read: {error}")))?;
        let rewritten = plain_data_urls(&mut fields, images).then(|| serde_json::to_vec(&fields)).transpose();
        let rewritten = rewritten.map_err(|error| invalid(error.to_string()))?;
        let messages = match fields.remove("messages") {
            Some(Value::Array(messages)) if !messages.is_empty() => messages,
            _ => return Err(invalid("`messages` must be a list of messages".into())),
        };
        let chat = Chat { turns: turns(&messages, limits, images)?, definitions: definitions(&fields, &messages) };
        if !chat.turns.iter().any(|turn| turn.role == Role::User) {
            return Err(invalid("`messages` has no message of the user".into()));
        }
        let choices = fields.get("n").and_then(Value::as_u64).unwrap_or(1);
        let choices = u32::try_from(choices).ok().filter(|n| (1..=limits.choices).contains(n));
        let choices = choices.ok_or_else(|| invalid(format!("`n` must be 1 to {}", limits.choices)))?;
        let model = fields.get("model").and_then(Value::as_str).unwrap_or_default().to_owned();
        let stream = fields.get("stream").and_then(Value::as_bool).unwrap_or(false);
        Ok(Self { fields, chat, model, stream, rewritten, choices })
    }

    /// Whether a streamed answer ends with its usage.
    pub(crate) fn wants_usage(&self) -> bool {
        self.fields.get("stream_options").is_some_and(|options| options["include_usage"] == true)
    }

    /// The client's own sampling and format, for the safe answer of a server: every field as it came.
    pub(crate) fn sampling(&self) -> Sampling {
        let mut extra = self.fields.clone();
        extra.retain(|field, _| !NOT_FOR_THE_SAFE_ANSWER.contains(&field.as_str()));
        Sampling { extra, ..Sampling::default() }
    }

    /// What the guard's own calls carry of the request: fields that change how the model sees or thinks, as far as they are switches and
    /// numbers. A text could be a template, or a word to the judge.
    pub(crate) fn extra(&self) -> Map<String, Value> {
        let is_effort = |name: &str, value: &Value| {
            name == "reasoning_effort"
                && value.as_str().is_some_and(|effort| ["low", "medium", "high"].contains(&effort))
        };
        let is_kept = |name: &str, value: &Value| {
            let is_framing = matches!(name, "add_generation_prompt" | "continue_final_message" | "tokenize");
            !is_framing && (value.is_boolean() || value.is_number() || is_effort(name, value))
        };
        let mut extra = Map::new();
        for name in FOR_EVERY_CALL {
            let Some(Value::Object(fields)) = self.fields.get(name) else { continue };
            let kept = fields.iter().filter(|(name, value)| is_kept(name, value));
            let kept: Map<String, Value> = kept.map(|(name, value)| (name.clone(), value.clone())).collect();
            if !kept.is_empty() {
                extra.insert(name.to_owned(), kept.into());
            }
        }
        extra
    }

    /// Whether the answer is to be JSON, which a plain refusal is not.
    pub(crate) fn wants_json(&self) -> bool {
        self.fields
            .get("response_format")
            .and_then(|format| format["type"].as_str())
            .is_some_and(|kind| kind.starts_with("json"))
    }

    /// The client's own sampling, for a model in this process.
    pub(crate) fn own_sampling(&self) -> Result<Sampling, Failure> {
        for field in ["tools", "functions"] {
            if self.fields.get(field).is_some_and(|value| value.as_array().is_none_or(|list| !list.is_empty())) {
                return Err(Failure::bad_request("unsupported", format!("this model has no `{field}`")));
            }
        }
        if self.fields.get("response_format").is_some_and(|format| format["type"] != "text") {
            return Err(Failure::bad_request("unsupported", "this model answers in text only (`response_format`)"));
        }
        #[expect(clippy::cast_possible_truncation, reason = "a temperature")]
        let float = |name: &str| self.fields.get(name).and_then(Value::as_f64).map(|value| value as f32);
        let whole =
            |name: &str| self.fields.get(name).and_then(Value::as_u64).and_then(|value| u32::try_from(value).ok());
        Ok(Sampling {
            temperature: float("temperature"),
            top_p: float("top_p"),
            seed: whole("seed"),
            max_tokens: whole("max_completion_tokens").or_else(|| whole("max_tokens")),
            ..Sampling::default()
        })
    }
}

/// Writes each data URL that is read here more kindly than by every server (another alphabet, spaces, percent signs) as it was read.
/// Whether there was one.
fn plain_data_urls(fields: &mut Map<String, Value>, images: ecso::Limits) -> bool {
    let messages = fields.get_mut("messages").and_then(Value::as_array_mut).into_iter().flatten();
    let parts = messages.filter_map(|message| message.get_mut("content")?.as_array_mut()).flatten();
    let mut is_changed = false;
    for part in parts {
        let Some(image) = part.get_mut("image_url") else { continue };
        let url = if image.is_object() { image.get_mut("url") } else { Some(image) };
        let Some(Value::String(url)) = url else { continue };
        let is_plain = |data: &str| {
            let body = data.trim_end_matches('=');
            data.len().is_multiple_of(4)
                && body.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/'))
        };
        let is_odd = is_data_url(url) && !url.split_once(";base64,").is_some_and(|(_, data)| is_plain(data));
        let read = is_odd.then(|| Image::from_data_url(url, images).ok()).flatten();
        if let Some((bytes, kind)) = read.as_ref().and_then(Image::encoded) {
            *url = format!("data:{kind};base64,{}", BASE64_STANDARD.encode(bytes));
            is_changed = true;
        }
    }
    is_changed
}

/// Fields of a request that a model may be shown beside the messages.
const SHOWN: [&str; 10] = [
    "documents",
    "json_schema",
    "guided_json",
    "guided_choice",
    "guided_regex",
    "guided_grammar",
    "structured_outputs",
    "structural_tag",
    "grammar",
    "function_call",
];

/// What the model is shown beside the texts of the messages, each as JSON text: tools, the form of its answer, documents, and what a
/// message holds beside its content (thoughts, names, calls that are no functions').
fn definitions(fields: &Map<String, Value>, messages: &[Value]) -> Vec<String> {
    let lists = ["tools", "functions"].into_iter().filter_map(|name| fields.get(name));
    let tools = lists.flat_map(|tools| tools.as_array().map_or(std::slice::from_ref(tools), Vec::as_slice));
    // Of a plain function tool the frame says nothing.
    let is_plain = |tool: &Value| tool["function"].is_object() && tool.as_object().is_some_and(|tool| tool.len() <= 2);
    let tools = tools.map(|tool| if is_plain(tool) { &tool["function"] } else { tool });
    let format = fields.get("response_format").filter(|format| format["type"] != "text");
    let shown = SHOWN.into_iter().filter_map(|name| fields.get(name));
    let known = ["role", "content", "tool_call_id", "tool_calls"];
    let beside = messages.iter().filter_map(Value::as_object).flatten();
    let beside = beside.filter(|(name, value)| !known.contains(&name.as_str()) && is_said(value));
    let odd_calls = messages.iter().flat_map(|message| message["tool_calls"].as_array().into_iter().flatten());
    let odd_calls =
        odd_calls.filter(|call| !call["function"].is_object() || call.as_object().is_some_and(|call| call.len() > 4));
    let rest = beside.map(|(_, value)| value).chain(odd_calls);
    tools.chain(format).chain(shown).chain(rest).map(Value::to_string).collect()
}

/// Whether a field holds anything that could be read.
fn is_said(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
        Value::String(text) => !text.trim().is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
    }
}

fn turns(messages: &[Value], limits: &Limits, images: ecso::Limits) -> Result<Vec<Turn>, Failure> {
    let mut turns: Vec<Turn> = Vec::new();
    let mut count = 0;
    for message in messages {
        let (mut parts, called) = (parts(&message["content"], images)?, calls(message));
        count += parts.iter().filter(|part| matches!(part, Part::Image(_))).count();
        if count > limits.images {
            return Err(Failure::bad_request(
                "too_many_images",
                format!("at most {} images are allowed", limits.images),
            ));
        }
        let role = match message["role"].as_str() {
            Some("system" | "developer") => Role::System,
            Some("user") => Role::User,
            Some("assistant") if called.is_empty() => Role::Assistant,
            // What tools were asked and said belongs to the question that they serve.
            Some("assistant" | "tool" | "function") => {
                parts.extend(called.into_iter().map(Part::Text));
                if message["role"] != "assistant" {
                    parts.insert(0, Part::Text("[A tool's result:]".into()));
                }
                match turns.iter_mut().rev().find(|turn| turn.role == Role::User) {
                    Some(question) => question.parts.extend(parts),
                    None => turns.push(Turn { role: Role::User, parts }),
                }
                continue;
            }
            _ => return Err(Failure::bad_request("invalid_request", "a message has no role that is known here")),
        };
        turns.push(Turn { role, parts });
    }
    Ok(turns)
}

/// The tools that a message calls, in words.
fn calls(message: &Value) -> Vec<String> {
    let functions = message["tool_calls"].as_array().into_iter().flatten().map(|call| &call["function"]);
    functions
        .chain(message.get("function_call").filter(|call| !call.is_null()))
        .map(|function| format!("[Called the tool {} with {}]", function["name"], function["arguments"]))
        .collect()
}

fn parts(content: &Value, images: ecso::Limits) -> Result<Vec<Part>, Failure> {
    let unreadable =
        || Failure::bad_request("invalid_request", "a message's `content` must be a text or a list of parts");
    match content {
        Value::Null => Ok(Vec::new()),
        Value::String(text) => Ok(vec![Part::Text(text.clone())]),
        Value::Array(parts) => parts.iter().map(|found| part(found, images)).collect(),
        _ => Err(unreadable()),
    }
}

fn part(part: &Value, images: ecso::Limits) -> Result<Part, Failure> {
    let text = |name: &str| match part[name].as_str() {
        Some(text) => Ok(Part::Text(text.to_owned())),
        None => Err(Failure::bad_request("invalid_request", format!("a part's `{name}` must be a text"))),
    };
    let only = |name: &str| part.as_object().is_some_and(|fields| fields.len() == 1 && fields.contains_key(name));
    let kind = match part {
        Value::String(said) => return Ok(Part::Text(said.clone())),
        // Servers tell by its field what a part without a type is.
        _ if only("text") => Some("text"),
        _ if only("image_url") => Some("image_url"),
        _ => part["type"].as_str(),
    };
    match kind {
        Some("text" | "input_text" | "output_text") => text("text"),
        Some(name @ ("refusal" | "thinking")) => text(name),
        Some("image_url" | "input_image") => {
            let url = part["image_url"]["url"].as_str().or_else(|| part["image_url"].as_str());
            let url = url.ok_or_else(|| Failure::bad_request("invalid_image", "an image part has no URL"))?;
            Ok(Part::Image(image(url, images)?.with_view(view(part))))
        }
        other => {
            let kind = other.unwrap_or("(none)");
            Err(Failure::bad_request("unsupported_content", format!("parts of type `{kind}` can't be guarded")))
        }
    }
}

/// How the model is to look at an image: numbers and switches of its part (`min_pixels`, …), and `detail`.
fn view(part: &Value) -> Map<String, Value> {
    let fields = [&part["image_url"], part].into_iter().filter_map(Value::as_object).flatten();
    let is_detail = |name: &str, value: &Value| {
        name == "detail" && value.as_str().is_some_and(|detail| ["low", "high", "auto", "original"].contains(&detail))
    };
    let kept = fields.filter(|(name, value)| value.is_number() || value.is_boolean() || is_detail(name, value));
    kept.map(|(name, value)| (name.clone(), value.clone())).collect()
}

fn image(url: &str, limits: ecso::Limits) -> Result<Image, Failure> {
    let invalid = |message: String| Failure::bad_request("invalid_image", message);
    let url = url.trim();
    let lower: String = url.chars().take(8).collect::<String>().to_ascii_lowercase();
    if lower.starts_with("http://") || lower.starts_with("https://") {
        return Ok(Image::from_url(url));
    }
    if is_data_url(url) {
        return Image::from_data_url(url, limits).map_err(|error| invalid(error.to_string()));
    }
    let message = "an image is given by a http, https or data URL; a file's bytes, or bare base64, are sent as \
                   data:image/png;base64,…";
    Err(invalid(message.into()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn png() -> String {
        let picture = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg";
        format!("data:image/png;base64,{picture}")
    }

    fn read(body: &Value) -> Result<Request, Failure> {
        Request::read(body.to_string().as_bytes(), &Limits::default(), ecso::Limits::default())
    }

    #[test]
    fn a_conversation_with_everything_in_it() {
        let request = read(&json!({
            "model": "m", "stream": true, "n": 2, "temperature": 0.3, "seed": 4, "max_completion_tokens": 9,
            "response_format": {"type": "json_object"}, "tools": [{"type": "function"}], "user": "u",
            "stream_options": {"include_usage": true},
            "messages": [
                {"role": "developer", "content": "Be kind."},
                {"role": "user", "content": [
                    {"type": "text", "text": "What is this?"},
                    {"type": "image_url", "image_url": {"url": png(), "detail": "low"}},
                    {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
                ]},
                {"role": "assistant", "content": null, "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{\"at\": 1}"}},
                ]},
                {"role": "tool", "tool_call_id": "1", "content": "a cat"},
            ],
        }))
        .unwrap();
        assert_eq!((request.chat.turns.len(), request.chat.image_count(), request.choices), (2, 2, 2));
        assert!(request.stream && request.wants_usage());
        let query = request.chat.turns[1].query();
        assert!(query.starts_with("What is this?") && query.contains("look") && query.ends_with("a cat"), "{query}");
        let fields: Vec<String> = request.sampling().extra.into_iter().map(|(name, _)| name).collect();
        assert_eq!(fields, ["temperature", "seed", "max_completion_tokens", "response_format", "user"]);
        assert_eq!(request.own_sampling().unwrap_err().code, "unsupported");
    }

    #[test]
    fn a_part_without_a_type_is_what_its_only_field_says() {
        let content = json!(["one", {"text": "two"}, {"image_url": {"url": png()}}, {"type": "text", "text": "three"}]);
        let request = read(&json!({"messages": [{"role": "user", "content": content}]})).unwrap();
        assert_eq!((request.chat.turns[0].query().as_str(), request.chat.image_count()), ("one\ntwo\nthree", 1));
    }

    #[test]
    fn what_cannot_be_guarded_is_said() {
        let ask = |content: Value| json!({"messages": [{"role": "user", "content": content}]});
        let picture = |url: &str| ask(json!([{"type": "image_url", "image_url": {"url": url}}]));
        let many: Vec<Value> =
            (0..17).map(|_| json!({"type": "image_url", "image_url": "http://example.org"})).collect();
        for (body, code) in [
            (json!({}), "invalid_request"),
            (json!({"messages": []}), "invalid_request"),
            (json!({"messages": [{"role": "system", "content": "s"}]}), "invalid_request"),
            (json!({"messages": [{"role": "oracle", "content": "s"}]}), "invalid_request"),
            (json!({"n": 0, "messages": [{"role": "user", "content": "s"}]}), "invalid_request"),
            (json!({"n": 1000, "messages": [{"role": "user", "content": "s"}]}), "invalid_request"),
            (ask(json!(3)), "invalid_request"),
            (ask(json!([{"type": "video_url"}])), "unsupported_content"),
            (ask(json!([{"type": "text"}])), "invalid_request"),
            (ask(json!([{"text": "a", "image_url": "http://example.org"}])), "unsupported_content"),
            (ask(json!([{"text": "a", "image": "http://example.org"}])), "unsupported_content"),
            (ask(json!([3])), "unsupported_content"),
            (ask(json!([{"type": "text", "text": {"a": "b"}}])), "invalid_request"),
            (ask(json!([{"type": "image_url"}])), "invalid_image"),
            (picture("file:///etc/hosts"), "invalid_image"),
            (picture("data:image/png,abc"), "invalid_image"),
            (picture("data:image/png;base64,@@@"), "invalid_image"),
            (picture("data:image/png;base64,AAAA"), "invalid_image"),
            (ask(many.into()), "too_many_images"),
        ] {
            assert_eq!(read(&body).unwrap_err().code, code, "{body}");
        }
    }
}
