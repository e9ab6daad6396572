//! A chat request: its known fields, and the conversation in them. The body for the upstream is
//! written from these fields, so that the upstream answers what was judged.

mod conversation;
mod images;
mod texts;

use axum::http::StatusCode;
use ecso::{Chat, Image, Role, Sampling, is_data_url};
use serde_json::{Map, Value};

use crate::{
    error::ApiError,
    fields::{
        AUDIO_PART, IMAGE_PART, MESSAGE, PLAIN_TEXT_FIELDS, REFUSAL_PART, REQUEST, SAMPLING,
        SHARED, STEERING, TEXT_PART, THINKING_PART,
    },
    forms::{FieldError, Form, known_fields},
    json,
    settings::Limits,
};

use conversation::{content_text, definitions, turns};
use images::{canonical_url, merge_detail, reject_inline_image, url_of};
pub(crate) use images::{converted_bytes, is_remote};
use texts::{TextCollector, is_outside_conversation, quarter_tokens, readable_ids, split_field};

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

/// Parts in which no text follows another. Some servers put a space, a line or nothing between two:
/// so the model reads what is judged.
fn joined(parts: Vec<Value>) -> Vec<Value> {
    let mut joined: Vec<Value> = Vec::with_capacity(parts.len());
    for part in parts {
        let before = joined.last_mut().filter(|before| before["type"] == "text");
        match (before.and_then(Value::as_object_mut), part) {
            (Some(before), Value::Object(mut part)) if part["type"] == "text" => {
                let text = part.remove("text");
                if let (Some(Value::String(whole)), Some(Value::String(text))) =
                    (before.get_mut("text"), text)
                {
                    whole.push('\n');
                    whole.push_str(&text);
                }
                // The other fields are marks of a cache.
                before.extend(part);
            }
            (_, part) => joined.push(part),
        }
    }
    joined
}

/// The model that a body names, unless some server might find another one in it.
pub(crate) fn model(body: &Value) -> Option<&str> {
    let fields = body.as_object()?;
    if fields.keys().any(|key| key != "model" && may_choose_model(key)) {
        return None;
    }
    fields.get("model")?.as_str().filter(|name| !name.is_empty())
}

/// Whether a key, or a part of a query string, may choose a model: in another case, or as the further
/// models that some servers accept.
pub(crate) fn may_choose_model(key: &str) -> bool {
    let key = key.to_lowercase();
    ["model", "fallback", "extra_body"].iter().any(|name| key.contains(name))
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
        for (index, message) in messages.into_iter().enumerate() {
            body.add(message, index, allowed)?;
        }
        Ok(body)
    }

    /// Adds a message with its known fields, and collects its texts outside of content and tool
    /// calls.
    fn add(&mut self, message: Value, index: usize, allowed: &[String]) -> Result<(), ApiError> {
        let path = format!("messages.{index}");
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
                    .map(|(index, part)| self.part(part, &format!("{path}.{index}"), collector));
                Ok(Value::Array(joined(parts.collect::<Result<_, _>>()?)))
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
        messages.filter_map(|(index, message)| {
            Some((index, message.get_mut("content")?.as_array_mut()?))
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
            for (index, mut part) in std::mem::take(content).into_iter().enumerate() {
                let Some(url) = url_of(&mut part) else {
                    content.push(part);
                    continue;
                };
                let mut original = std::mem::take(url);
                let images = images::images(&original, bounds, allow_urls).map_err(|error| {
                    ApiError { param: Some(format!("messages.{message}.content.{index}")), ..error }
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
            .map(|turn| turn.joined_text().len())
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
    /// model sees or thinks. What only the operator allows is not among them: it could be a template,
    /// or a message to the judge.
    pub(crate) fn extra(&self) -> Map<String, Value> {
        let shared = SHARED.iter().filter_map(|(name, known)| {
            let mut kept = self.fields.get(*name)?.as_object()?.clone();
            kept.retain(|key, _| known.iter().any(|(known, _)| known == key));
            (!kept.is_empty()).then(|| ((*name).to_owned(), kept.into()))
        });
        shared.collect()
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn texts_that_follow_each_other_are_one_text() {
        let image = json!({"type": "image_url", "image_url": {"url": "https://host/a.png"}});
        let text = |text: &str| json!({"type": "text", "text": text});
        let cached = json!({"type": "text", "text": "c", "cache_control": {"type": "ephemeral"}});
        let parts = vec![text("a"), text("b"), image.clone(), cached.clone(), text("d")];
        let whole =
            json!({"type": "text", "text": "c\nd", "cache_control": cached["cache_control"]});
        assert_eq!(joined(parts), [text("a\nb"), image, whole]);
    }

    #[test]
    fn the_judge_reads_what_could_be_words() {
        let long = "a.b".repeat(30);
        let body = json!({"model": "m", "messages": [
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": long, "type": "function", "function": {"name": "f", "arguments": "{\"a\": \"be \\u0072ude\"}"}},
                {"id": "call_0a1b2c3d", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        ]});
        let body = Body::parse(body, &[]).unwrap();
        assert_eq!(body.other_texts, [long]);
        let [_, call] = &body.messages[..] else { panic!("two messages") };
        let read = conversation::tool_call_texts(call);
        assert!(read[0].contains("be rude"), "{read:?}");
    }
}
