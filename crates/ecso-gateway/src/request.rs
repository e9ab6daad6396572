//! A chat request: its known fields, and the conversation in them. The body for the upstream is
//! written from these fields, so that the upstream answers what was judged.

use axum::http::StatusCode;
use base64::{Engine, prelude::BASE64_STANDARD};
use ecso::{Chat, Image, Part, Role, Sampling, Turn, decode_data_url, is_data_url};
use serde_json::{Map, Value};

use crate::{
    error::ApiError,
    fields::{
        AUDIO_PART, IMAGE_PART, MESSAGE, PLAIN_TEXT_FIELDS, REFUSAL_PART, REQUEST,
        RESERVED_TEMPLATE_KEYS, SAMPLING, STEERING, TEXT_PART, THINKING_PART,
    },
    forms::{FieldError, FieldVisitor, Form, known_fields},
    json,
    settings::Limits,
};

/// A body whose fields are all known. Its images may still have to be fetched.
#[derive(Debug)]
pub(crate) struct Body {
    fields: Map<String, Value>,
    messages: Vec<Map<String, Value>>,
    /// Texts that the model sees in addition to the conversation.
    other_texts: Vec<String>,
    images: usize,
    has_audio: bool,
    /// A field that no guarded chat may have.
    steering: Option<String>,
}

/// The model that a body names, if it can be read.
pub(crate) fn model(body: &Result<Value, String>) -> Option<&str> {
    body.as_ref().ok()?.get("model")?.as_str().filter(|name| !name.is_empty())
}

impl Body {
    /// Reads a body. `allowed` are additional fields that the operator lists.
    pub(crate) fn parse(body: Value, allowed: &[String]) -> Result<Self, ApiError> {
        let invalid = |message: &str| ApiError::bad_request("invalid_request", message);
        let Value::Object(mut fields) = body else {
            return Err(invalid("the body must be a JSON object"));
        };
        let messages = match fields.remove("messages") {
            Some(Value::Array(messages)) if !messages.is_empty() => messages,
            _ => return Err(invalid("`messages` must be a list of messages")),
        };
        let mut collector = TextCollector { allowed, texts: Vec::new() };
        let known: Vec<(&str, Form)> = SAMPLING.iter().chain(REQUEST).copied().collect();
        let is_steering =
            |name: &str| STEERING.contains(&name) && !allowed.iter().any(|allowed| allowed == name);
        let is_accepted = |name: &str, value: &Value| {
            known.iter().any(|(known, form)| *known == name && form.accepts(value))
        };
        let steering = fields.iter().find(|(name, value)| {
            is_steering(name) && !value.is_null() && !is_accepted(name, value)
        });
        let steering = steering.map(|(name, _)| name.clone());
        fields.retain(|name, value| !is_steering(name) || is_accepted(name, value));
        let kwargs =
            fields.get("chat_template_kwargs").and_then(Value::as_object).into_iter().flatten();
        if let Some((name, _)) =
            kwargs.into_iter().find(|(name, _)| RESERVED_TEMPLATE_KEYS.contains(&name.as_str()))
        {
            return Err(FieldError::Unknown(format!("chat_template_kwargs.{name}")).into());
        }
        let fields = known_fields(&known, fields, "", &mut collector)?;
        collector.texts.iter().try_for_each(|(path, text)| reject_inline_image(text, path))?;
        let described = ["model", "tools", "functions", "response_format"];
        let other_texts = collector
            .texts
            .into_iter()
            .filter(|(path, _)| !described.contains(&split_field(path).0));
        let other_texts = other_texts.map(|(_, text)| text).collect();
        let mut body = Self {
            fields,
            messages: Vec::new(),
            other_texts,
            images: 0,
            has_audio: false,
            steering,
        };
        for (place, message) in messages.into_iter().enumerate() {
            body.add(message, place, allowed)?;
        }
        Ok(body)
    }

    /// Adds a message with its known fields, and collects its texts outside of content and tool
    /// calls.
    fn add(&mut self, message: Value, place: usize, allowed: &[String]) -> Result<(), ApiError> {
        let path = format!("messages.{place}");
        let Value::Object(mut fields) = message else {
            return Err(ApiError::bad_request(
                "invalid_request",
                format!("`{path}` must be an object"),
            ));
        };
        let content = fields.remove("content");
        let mut collector = TextCollector { allowed, texts: Vec::new() };
        let mut kept = known_fields(MESSAGE, fields, &path, &mut collector)?;
        if !kept.contains_key("role") {
            return Err(ApiError::bad_request("invalid_request", format!("`{path}` has no role")));
        }
        if let Some(content) = content {
            kept.insert(
                "content".to_owned(),
                self.content(content, &format!("{path}.content"), &mut collector)?,
            );
        }
        // Servers join a message's texts before they look for images in them.
        let content = kept.get("content").map(content_text).unwrap_or_default();
        reject_inline_image(&content, &format!("{path}.content"))?;
        collector.texts.iter().try_for_each(|(path, text)| reject_inline_image(text, path))?;
        let other_texts = collector.texts.into_iter().filter(|(at, _)| {
            is_outside_conversation(at.get(path.len() + 1..).unwrap_or_default())
        });
        self.other_texts.extend(other_texts.map(|(_, text)| text));
        self.other_texts.extend(readable_ids(&kept));
        self.messages.push(kept);
        Ok(())
    }

    fn content(
        &mut self,
        content: Value,
        path: &str,
        collector: &mut TextCollector<'_>,
    ) -> Result<Value, ApiError> {
        match content {
            Value::Null | Value::String(_) => Ok(content),
            Value::Array(parts) => {
                let parts = parts.into_iter().enumerate();
                let parts = parts
                    .map(|(place, part)| self.part(part, &format!("{path}.{place}"), collector));
                Ok(Value::Array(parts.collect::<Result<_, _>>()?))
            }
            _ => Err(ApiError::bad_request(
                "invalid_request",
                format!("`{path}` must be a text or a list of parts"),
            )),
        }
    }

    fn part(
        &mut self,
        part: Value,
        path: &str,
        collector: &mut TextCollector<'_>,
    ) -> Result<Value, ApiError> {
        let unsupported = |kind: &str| {
            let message =
                format!("`{path}`: parts of type `{}` can't be guarded", json::printable(kind));
            Err(ApiError::bad_request("unsupported_content", message))
        };
        if part.is_string() {
            return Ok(part);
        }
        let Value::Object(mut fields) = part else { return unsupported("(none)") };
        // Servers infer the type of a part without one from its field.
        if !fields.contains_key("type") && fields.len() == 1 {
            let kind = ["text", "image_url"].into_iter().find(|kind| fields.contains_key(*kind));
            fields.extend(kind.map(|kind| ("type".to_owned(), kind.into())));
        }
        let kind = fields.get("type").and_then(Value::as_str).unwrap_or("(none)").to_owned();
        let (known, needs) = match kind.as_str() {
            "text" | "input_text" | "output_text" => (TEXT_PART, "text"),
            "refusal" => (REFUSAL_PART, "refusal"),
            "thinking" | "redacted_thinking" | "reasoning" => (THINKING_PART, "type"),
            "image_url" | "input_image" => (IMAGE_PART, "image_url"),
            "input_audio" => (AUDIO_PART, "input_audio"),
            other => return unsupported(other),
        };
        let mut kept = known_fields(known, fields, path, collector)?;
        if kept.get(needs).is_none_or(Value::is_null) {
            let code = if needs == "image_url" { "invalid_image" } else { "invalid_request" };
            return Err(ApiError::bad_request(code, format!("`{path}` has no `{needs}`")));
        }
        self.has_audio |= needs == "input_audio";
        if needs == "image_url" {
            self.images += 1;
            merge_detail(&mut kept, path)?;
        }
        Ok(kept.into())
    }

    /// Estimates how many tokens the model sees. The tokens of an image differ between models.
    pub(crate) fn tokens(&self) -> u64 {
        let messages = self
            .messages
            .iter()
            .map(|message| 16 + message.values().map(quarter_tokens).sum::<u64>());
        let definitions = ["tools", "response_format"]
            .into_iter()
            .filter_map(|name| self.fields.get(name))
            .map(quarter_tokens);
        messages.chain(definitions).sum::<u64>().div_ceil(4)
    }

    /// Whether any turn has an image.
    pub(crate) fn has_images(&self) -> bool {
        self.images > 0
    }

    /// The URLs of images that are not data URLs.
    pub(crate) fn remote_images(&mut self) -> Vec<&mut String> {
        self.urls().filter(|url| !is_data_url(url)).collect()
    }

    fn urls(&mut self) -> impl Iterator<Item = &mut String> {
        self.contents().flat_map(|(_, content)| content).filter_map(url_of)
    }

    /// The message contents that are lists of parts, with the index of their message.
    fn contents(&mut self) -> impl Iterator<Item = (usize, &mut Vec<Value>)> {
        let messages = self.messages.iter_mut().enumerate();
        messages.filter_map(|(place, message)| {
            Some((place, message.get_mut("content")?.as_array_mut()?))
        })
    }

    /// Reads the images. Afterwards a document is one part for each of its pages, and every URL is
    /// written as it was read.
    fn images(
        &mut self,
        limits: &Limits,
        bounds: ecso::Limits,
        allow_urls: bool,
    ) -> Result<Vec<Image>, ApiError> {
        let (mut read, mut total_converted) = (Vec::new(), 0);
        for (message, content) in self.contents() {
            for (place, mut part) in std::mem::take(content).into_iter().enumerate() {
                let Some(url) = url_of(&mut part) else {
                    content.push(part);
                    continue;
                };
                let mut original = std::mem::take(url);
                let images = images(&original, bounds, allow_urls).map_err(|error| ApiError {
                    param: Some(format!("messages.{message}.content.{place}")),
                    ..error
                })?;
                for image in images {
                    let mut part = part.clone();
                    if let Some(url) = url_of(&mut part) {
                        *url = canonical_url(&image, &mut original);
                    }
                    total_converted += converted_bytes(&image);
                    content.push(part);
                    read.push(image);
                }
                if read.len() > limits.images {
                    let message = format!("at most {} images are allowed", limits.images);
                    return Err(ApiError::bad_request("too_many_images", message));
                }
                if total_converted > limits.body {
                    let message = format!(
                        "the pages of documents may have at most {} bytes in total",
                        limits.body
                    );
                    return Err(ApiError::new(
                        StatusCode::PAYLOAD_TOO_LARGE,
                        "body_too_large",
                        message,
                    ));
                }
            }
        }
        Ok(read)
    }

    /// Turns the body into a request and reads its images. `allow_urls` keeps images that are named
    /// by a URL.
    pub(crate) fn request(
        mut self,
        limits: &Limits,
        images: ecso::Limits,
        allow_urls: bool,
    ) -> Result<Request, ApiError> {
        let invalid = |message: String| ApiError::bad_request("invalid_request", message);
        if let Some(name) = self.steering {
            return Err(FieldError::Unknown(name).into());
        }
        let format = self.fields.get("response_format").filter(|format| !format.is_null());
        if format.is_some_and(|format| {
            !matches!(format["type"].as_str(), Some("text" | "json_object" | "json_schema"))
        }) {
            return Err(FieldError::Invalid("response_format.type".into()).into());
        }
        if self.has_audio {
            let message = "parts of type `input_audio` can't be guarded";
            return Err(ApiError::bad_request("unsupported_content", message));
        }
        if self.images > limits.images {
            let message = format!("at most {} images are allowed", limits.images);
            return Err(ApiError::bad_request("too_many_images", message));
        }
        let choices = match self.fields.get("n") {
            None | Some(Value::Null) => Some(1),
            // Some clients send integers as floating-point numbers.
            Some(n) => (1..=limits.choices).find(|count| n.as_f64() == Some(f64::from(*count))),
        };
        let choices =
            choices.ok_or_else(|| invalid(format!("`n` must be 1 to {}", limits.choices)))?;
        let read = self.images(limits, images, allow_urls)?;
        let turns = turns(&self.messages, read)?;
        if !turns.iter().any(|turn| turn.role == Role::User) {
            return Err(invalid("`messages` has no user message".into()));
        }
        let definitions = definitions(&self.fields).chain(self.other_texts).collect();
        let chat = Chat { turns, definitions, ..Chat::default() };
        let texts = chat
            .turns
            .iter()
            .map(|turn| turn.query().len())
            .chain(chat.definitions.iter().map(String::len));
        if texts.sum::<usize>() > limits.text {
            let message = format!(
                "the texts of a guarded chat may have at most {} bytes in total",
                limits.text
            );
            return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "too_much_text", message));
        }
        let model = self.fields.get("model").and_then(Value::as_str).unwrap_or_default().to_owned();
        let stream = self.fields.get("stream").and_then(Value::as_bool).unwrap_or(false);
        Ok(Request { fields: self.fields, messages: self.messages, chat, model, stream, choices })
    }
}

/// A chat request that can be guarded.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    fields: Map<String, Value>,
    messages: Vec<Map<String, Value>>,
    /// The conversation.
    pub(crate) chat: Chat,
    /// The requested model.
    pub(crate) model: String,
    /// Whether the answer is streamed.
    pub(crate) stream: bool,
    /// The number of choices.
    pub(crate) choices: u32,
}

impl Request {
    /// The body for the upstream: the known fields, and the images as they were read.
    pub(crate) fn body(&self) -> Result<Vec<u8>, ApiError> {
        #[derive(serde::Serialize)]
        struct Sent<'a> {
            #[serde(flatten)]
            fields: &'a Map<String, Value>,
            messages: &'a [Map<String, Value>],
        }
        let sent = Sent { fields: &self.fields, messages: &self.messages };
        serde_json::to_vec(&sent)
            .map_err(|error| ApiError::bad_request("invalid_request", error.to_string()))
    }

    /// The messages, for the audit log and for stored conversations.
    pub(crate) fn messages(&self) -> &[Map<String, Value>] {
        &self.messages
    }

    /// Whether a streamed answer ends with its usage.
    pub(crate) fn wants_usage(&self) -> bool {
        self.fields.get("stream_options").is_some_and(|options| options["include_usage"] == true)
    }

    /// The client's sampling and response format, for the safe answer from a server. Every field is
    /// unchanged.
    pub(crate) fn sampling(&self) -> Sampling {
        let mut extra = self.fields.clone();
        extra.retain(|field, _| SAMPLING.iter().any(|(known, _)| known == field));
        Sampling { extra, ..Sampling::default() }
    }

    /// The fields that the guard's own calls take over from the request: those that change how the
    /// model sees or thinks, limited to booleans and numbers. A text could be a template, or a
    /// message to the judge.
    pub(crate) fn extra(&self) -> Map<String, Value> {
        let mut extra = Map::new();
        for name in ["chat_template_kwargs", "mm_processor_kwargs"] {
            let kept = self.fields.get(name).and_then(|value| only_switches(name, value));
            extra.extend(kept.map(|kept| (name.to_owned(), kept)));
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

    /// Whether it asks for one plain text, and nothing else.
    pub(crate) fn wants_plain_text(&self) -> bool {
        let is_known = |name: &str| {
            PLAIN_TEXT_FIELDS.contains(&name) || (name == "response_format" && !self.wants_json())
        };
        let is_none = |value: &Value| matches!(value, Value::Null | Value::Bool(false));
        self.choices == 1
            && self.fields.iter().all(|(name, value)| is_none(value) || is_known(name))
    }

    /// Returns an error if a model in this process can't answer it.
    pub(crate) fn check_local_support(&self) -> Result<(), ApiError> {
        for field in ["tools", "functions"] {
            let is_asked =
                |value: &Value| value.as_array().map_or(!value.is_null(), |list| !list.is_empty());
            if self.fields.get(field).is_some_and(is_asked) {
                return Err(ApiError::bad_request(
                    "unsupported",
                    format!("this model does not support `{field}`"),
                ));
            }
        }
        if self
            .fields
            .get("response_format")
            .is_some_and(|format| !format.is_null() && format["type"] != "text")
        {
            return Err(ApiError::bad_request(
                "unsupported",
                "this model answers in text only (`response_format`)",
            ));
        }
        Ok(())
    }

    /// The client's sampling, for a model in this process.
    pub(crate) fn local_sampling(&self) -> Sampling {
        #[expect(clippy::cast_possible_truncation, reason = "a temperature")]
        let float =
            |name: &str| self.fields.get(name).and_then(Value::as_f64).map(|value| value as f32);
        let whole = |name: &str| {
            self.fields
                .get(name)
                .and_then(Value::as_u64)
                .and_then(|value| u32::try_from(value).ok())
        };
        Sampling {
            temperature: float("temperature"),
            top_p: float("top_p"),
            seed: whole("seed"),
            max_tokens: whole("max_completion_tokens").or_else(|| whole("max_tokens")),
            ..Sampling::default()
        }
    }
}

/// Estimates the size of a value in quarters of a token: four ASCII characters are one token, and
/// so is any other character.
fn quarter_tokens(value: &Value) -> u64 {
    const IMAGE: u64 = 4 * 1600;
    let text =
        |text: &str| text.chars().map(|letter| if letter.is_ascii() { 1 } else { 4 }).sum::<u64>();
    match value {
        Value::String(value) => text(value),
        Value::Array(list) => list.iter().map(quarter_tokens).sum(),
        Value::Object(fields) if fields.contains_key("image_url") => IMAGE,
        Value::Object(fields) => {
            fields.iter().map(|(name, value)| text(name) + 2 + quarter_tokens(value)).sum()
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => 4,
    }
}

/// Splits a path into its first field and the rest.
fn split_field(path: &str) -> (&str, &str) {
    path.split_once('.').unwrap_or((path, ""))
}

/// Whether the text at this `path` of a message is judged separately. Contents and calls are part
/// of the conversation, and [`readable_ids`] handles ids.
fn is_outside_conversation(path: &str) -> bool {
    let (field, rest) = split_field(path);
    match field {
        "content" => rest.contains("annotations"),
        "tool_call_id" | "id" => false,
        "function_call" => !matches!(split_field(rest).0, "name" | "arguments"),
        "tool_calls" => {
            let mut below = rest.split('.').skip(1);
            !matches!(
                (below.next(), below.next()),
                (Some("id"), None) | (Some("function"), Some("name" | "arguments"))
            )
        }
        _ => true,
    }
}

/// The booleans, numbers and effort levels in a field, at any depth.
fn only_switches(name: &str, value: &Value) -> Option<Value> {
    const EFFORTS: [&str; 3] = ["low", "medium", "high"];
    match value {
        Value::Bool(_) | Value::Number(_) => Some(value.clone()),
        Value::String(effort) => (name == "reasoning_effort" && EFFORTS.contains(&effort.as_str()))
            .then(|| value.clone()),
        Value::Array(list) => list
            .iter()
            .map(|value| only_switches("", value))
            .collect::<Option<Vec<_>>>()
            .map(Value::from),
        Value::Object(fields) => {
            let kept = fields
                .iter()
                .filter_map(|(name, value)| Some((name.clone(), only_switches(name, value)?)));
            let kept: Map<String, Value> = kept.collect();
            (!kept.is_empty()).then(|| kept.into())
        }
        Value::Null => None,
    }
}

/// Merges the two places for the `detail` of an image. If they differ, servers disagree about which
/// one holds.
fn merge_detail(part: &mut Map<String, Value>, path: &str) -> Result<(), ApiError> {
    let Some(outer) = part.get("detail").filter(|detail| !detail.is_null()).cloned() else {
        return Ok(());
    };
    let Some(Value::Object(image)) = part.get_mut("image_url") else { return Ok(()) };
    if image.get("detail").is_some_and(|inner| !inner.is_null() && *inner != outer) {
        return Err(ApiError::bad_request(
            "invalid_request",
            format!("`{path}` has two different `detail`s"),
        ));
    }
    image.insert("detail".to_owned(), outer);
    part.remove("detail");
    Ok(())
}

/// Refuses an image that is written out in a text. Some servers find images in Markdown or HTML, so
/// such a text is more than a text.
fn reject_inline_image(text: &str, path: &str) -> Result<(), ApiError> {
    const LONGEST_HEAD: usize = 100;
    let bytes = text.as_bytes();
    let is_image = memchr::memchr_iter(b':', bytes).any(|colon| {
        let is_data = colon >= 4 && bytes[colon - 4..colon].eq_ignore_ascii_case(b"data");
        let head = &bytes[colon..bytes.len().min(colon + LONGEST_HEAD)];
        // Only a media type may stand between, and no words.
        let is_base64 = || {
            let end = head.windows(8).position(|part| part.eq_ignore_ascii_case(b";base64,"));
            let is_type = |byte: &u8| byte.is_ascii_alphanumeric() || b"/.+;=-".contains(byte);
            end.is_some_and(|end| head[1..end.max(1)].trim_ascii().iter().all(is_type))
        };
        let before = || bytes[..colon - 4].trim_ascii_end();
        let is_shown = || {
            let before = before()
                .strip_suffix(b"\"")
                .or_else(|| before().strip_suffix(b"'"))
                .unwrap_or_else(before);
            let start = before.len().saturating_sub(8);
            let before = bytes[start..before.len()].trim_ascii_end().to_ascii_lowercase();
            [b"](".as_slice(), b"src=", b"<img>"].iter().any(|mark| before.ends_with(mark))
        };
        is_data && is_base64() && is_shown()
    });
    if is_image {
        let message = format!(
            "`{path}` has an image in its text, which some servers would read: send the image as \
             a part of its own"
        );
        return Err(ApiError::bad_request("image_in_text", message));
    }
    Ok(())
}

/// Collects the texts of a body outside of message contents. Accepts the fields that the operator
/// allows.
struct TextCollector<'a> {
    allowed: &'a [String],
    /// With their paths.
    texts: Vec<(String, String)>,
}

impl FieldVisitor for TextCollector<'_> {
    fn text(&mut self, path: &str, text: String) -> String {
        if !text.trim().is_empty() {
            self.texts.push((path.to_owned(), text.clone()));
        }
        text
    }

    fn name(&mut self, path: &str, name: &str) {
        self.texts.push((path.to_owned(), name.to_owned()));
    }

    fn unknown(&mut self, path: &str, name: &str) -> Result<bool, FieldError> {
        if self.allowed.iter().any(|allowed| allowed == name) {
            Ok(true)
        } else {
            Err(FieldError::Unknown(path.to_owned()))
        }
    }

    fn invalid(&mut self, path: &str) -> Result<(), FieldError> {
        Err(FieldError::Invalid(path.to_owned()))
    }
}

impl From<FieldError> for ApiError {
    fn from(error: FieldError) -> Self {
        let (code, message) = match &error {
            FieldError::Unknown(path) => (
                "unknown_field",
                format!(
                    "`{path}` is not known to the guard, so it can't be judged: leave it out, or ask the \
                     operator to list the field in `gateway.allow_fields`"
                ),
            ),
            FieldError::Invalid(path) => (
                "invalid_value",
                format!(
                    "`{path}` has a value that the guard does not accept here; docs/server.md explains why"
                ),
            ),
        };
        let (FieldError::Unknown(path) | FieldError::Invalid(path)) = error;
        Self { param: Some(path), ..Self::bad_request(code, message) }
    }
}

/// The ids of a message that could be read as words. Most ids are random, and say nothing.
fn readable_ids(message: &Map<String, Value>) -> Vec<String> {
    let calls = message.get("tool_calls").and_then(Value::as_array).into_iter().flatten();
    let of_calls = calls.filter_map(|call| {
        // Some servers build the id from the name of the function.
        let function = call["function"]["name"].as_str().unwrap_or_default();
        Some(call["id"].as_str()?.replacen(function, "", 1))
    });
    let own = ["tool_call_id", "id"]
        .into_iter()
        .filter_map(|name| Some(message.get(name)?.as_str()?.to_owned()));
    // A signature follows this mark.
    let unsealed = of_calls
        .chain(own)
        .map(|name| name.split("__thought__").next().unwrap_or_default().to_owned());
    unsealed.filter(|name| count_words(name) > 2).collect()
}

fn count_words(name: &str) -> usize {
    name.split(|c: char| !c.is_ascii_alphabetic()).filter(|run| run.len() > 2).count()
}

/// What the model sees in addition to the messages, each as JSON text: tools, and the format of the
/// answer.
fn definitions(fields: &Map<String, Value>) -> impl Iterator<Item = String> {
    fn list(field: Option<&Value>) -> &[Value] {
        field
            .map(|field| field.as_array().map_or(std::slice::from_ref(field), Vec::as_slice))
            .unwrap_or_default()
    }
    // The wrapper of a plain function tool says nothing.
    let is_framed = |tool: &Value| {
        tool.as_object()
            .is_some_and(|tool| tool.keys().all(|name| name == "type" || name == "function"))
    };
    let tools = list(fields.get("tools")).iter();
    let tools = tools.map(move |tool| {
        if is_framed(tool) && tool["function"].is_object() { &tool["function"] } else { tool }
    });
    let says_nothing = |format: &Value| {
        format["type"] == "text" && format.as_object().is_some_and(|format| format.len() == 1)
    };
    let format = fields.get("response_format").filter(|format| !says_nothing(format));
    let all = tools.chain(list(fields.get("functions"))).chain(format);
    all.filter(|tool| !tool.is_null()).map(Value::to_string)
}

/// The turns of a conversation, in order; `images` are the images of all parts. Calls and results
/// of tools belong to the question that they serve.
fn turns(messages: &[Map<String, Value>], images: Vec<Image>) -> Result<Vec<Turn>, ApiError> {
    let mut turns: Vec<Turn> = Vec::new();
    let mut images = images.into_iter();
    let mut behind_tool = false;
    for message in messages {
        let (mut parts, called) =
            (parts(message.get("content"), &mut images)?, tool_call_texts(message));
        let role = message.get("role").and_then(Value::as_str);
        // In a chat, the images of a tool are in a user message right after its result.
        let has_image = parts.iter().any(|part| matches!(part, Part::Image(_)));
        let is_shown = std::mem::replace(&mut behind_tool, role == Some("tool")) && has_image;
        let role = match role {
            Some("user") if is_shown => {
                open_user_turn(&mut turns).parts.extend(parts);
                continue;
            }
            Some(role @ ("system" | "developer" | "user")) => {
                // Only assistants call tools, but a template may show calls in any message.
                parts.extend(called.into_iter().map(Part::Text));
                if role == "user" { Role::User } else { Role::System }
            }
            Some("assistant") if called.is_empty() => Role::Assistant,
            Some(role @ ("assistant" | "tool" | "function")) => {
                parts.extend(called.into_iter().map(Part::Text));
                if role != "assistant" {
                    parts.insert(0, Part::Text("[A tool's result:]".into()));
                }
                open_user_turn(&mut turns).parts.extend(parts);
                continue;
            }
            _ => {
                return Err(ApiError::bad_request(
                    "invalid_request",
                    "a message has no known role",
                ));
            }
        };
        turns.push(Turn { role, parts });
    }
    Ok(turns)
}

/// The last user turn that is not answered yet, or a new one.
fn open_user_turn(turns: &mut Vec<Turn>) -> &mut Turn {
    let behind_answer =
        turns.iter().rposition(|turn| turn.role == Role::Assistant).map_or(0, |answer| answer + 1);
    let open = turns[behind_answer..].iter().rposition(|turn| turn.role == Role::User);
    let place = open.map_or(turns.len(), |place| behind_answer + place);
    if open.is_none() {
        turns.push(Turn { role: Role::User, parts: Vec::new() });
    }
    &mut turns[place]
}

/// The tool calls of a message, as texts.
fn tool_call_texts(message: &Map<String, Value>) -> Vec<String> {
    let functions = message.get("tool_calls").and_then(Value::as_array).into_iter().flatten();
    let functions = functions.map(|call| &call["function"]).filter(|function| function.is_object());
    functions
        .chain(message.get("function_call").filter(|call| !call.is_null()))
        .map(|function| {
            format!("[Called the tool {} with {}]", function["name"], function["arguments"])
        })
        .collect()
}

fn parts(
    content: Option<&Value>,
    images: &mut impl Iterator<Item = Image>,
) -> Result<Vec<Part>, ApiError> {
    let part = |part: &Value| {
        let view = view(part);
        match part["type"].as_str() {
            Some("image_url" | "input_image") => images
                .next()
                .map(|image| Part::Image(image.with_view(view)))
                .ok_or_else(|| ApiError::bad_request("invalid_image", "an image part has no URL")),
            _ => Ok(Part::Text(part_text(part))),
        }
    };
    match content {
        Some(Value::String(text)) => Ok(vec![Part::Text(text.clone())]),
        Some(Value::Array(parts)) => parts.iter().map(part).collect(),
        _ => Ok(Vec::new()),
    }
}

/// The text of a part.
fn part_text(part: &Value) -> String {
    match part {
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts.iter().map(part_text).collect::<Vec<_>>().join("\n"),
        Value::Object(fields) => {
            let texts = ["text", "refusal", "thinking"]
                .into_iter()
                .filter_map(|name| fields.get(name))
                .map(part_text);
            texts.filter(|text| !text.is_empty()).collect::<Vec<_>>().join("\n")
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => String::new(),
    }
}

/// All texts of a content, joined.
fn content_text(content: &Value) -> String {
    match content {
        Value::Array(parts) => parts.iter().map(part_text).collect(),
        content => part_text(content),
    }
}

/// The fields of an image part that say how the model is to look at the image.
fn view(part: &Value) -> Map<String, Value> {
    let fields = part.as_object().into_iter().flatten();
    let is_word = |name: &str| ["detail", "modalities", "format"].contains(&name);
    let is_view =
        |name: &str, value: &Value| value.is_number() || value.is_boolean() || is_word(name);
    let mut view: Map<String, Value> = fields
        .filter(|(name, value)| is_view(name, value))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    if let Some(Value::Object(image)) = part.get("image_url") {
        let within = image.iter().filter(|(name, value)| is_view(name, value) && !value.is_null());
        let within: Map<String, Value> =
            within.map(|(name, value)| (name.clone(), value.clone())).collect();
        if !within.is_empty() {
            view.insert("image_url".to_owned(), within.into());
        }
    }
    view
}

/// The URL of an image part.
fn url_of(part: &mut Value) -> Option<&mut String> {
    match part.get_mut("image_url")? {
        Value::String(url) => Some(url),
        image => match image.get_mut("url") {
            Some(Value::String(url)) => Some(url),
            _ => None,
        },
    }
}

/// The images at a URL: one image, or the pages of a document.
fn images(url: &str, limits: ecso::Limits, allow_urls: bool) -> Result<Vec<Image>, ApiError> {
    let invalid = |message: String| ApiError::bad_request("invalid_image", message);
    if is_data_url(url) {
        let images =
            decode_data_url(url, limits.bytes).and_then(|bytes| Image::several(bytes, limits));
        return images.map_err(|error| invalid(error.to_string()));
    }
    if is_remote(url) && allow_urls {
        return Ok(vec![Image::from_url(url.trim())]);
    }
    let message = "an image must be an http, https or data URL; send the bytes of a file, or plain \
                   base64, as data:image/png;base64,…";
    Err(invalid(message.into()))
}

/// The URL that the upstream gets for an image with this `original` URL. A data URL is written from
/// the bytes that were read here, because servers read unusual ones in different ways.
fn canonical_url(image: &Image, original: &mut String) -> String {
    let Some((bytes, kind)) = image.encoded() else { return std::mem::take(original) };
    let head = format!("data:{kind};base64,");
    let is_plain = original.strip_prefix(&head).is_some_and(is_plain_base64);
    if is_plain && !image.is_converted() {
        std::mem::take(original)
    } else {
        head + &BASE64_STANDARD.encode(bytes)
    }
}

/// Bytes of an image that was converted here. 0 for other images.
pub(crate) fn converted_bytes(image: &Image) -> usize {
    image.encoded().filter(|_| image.is_converted()).map_or(0, |(bytes, _)| bytes.len())
}

/// Whether a text is an http or https URL.
pub(crate) fn is_remote(url: &str) -> bool {
    let start: String = url.trim_start().chars().take(8).collect::<String>().to_ascii_lowercase();
    start.starts_with("http://") || start.starts_with("https://")
}

fn is_plain_base64(data: &str) -> bool {
    let body = data.trim_end_matches('=');
    data.len().is_multiple_of(4)
        && data.len() - body.len() <= 2
        // Without an early exit, the compiler checks 64 bytes at a time.
        && body.bytes().fold(true, |plain, byte| {
            plain & (byte.is_ascii_alphanumeric() | matches!(byte, b'+' | b'/'))
        })
}
