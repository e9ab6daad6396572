//! Anthropic's Messages: `POST /v1/messages`.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::{Answer, Call, Fields, TOOL_IMAGES_LABEL, Wire, invalid, unsupported};
use crate::error::ApiError;

/// How answers to a request are written.
pub(super) struct Messages {
    /// Whether the client wants to see the reasoning.
    thinks: bool,
    omitted_tools: BTreeSet<String>,
}

/// Tools that a server would run; most of their names end with a date. They would bring in content
/// that the guard never sees.
const SERVER_TOOLS: [&str; 6] = [
    "web_search",
    "web_fetch",
    "code_execution",
    "tool_search_tool_regex",
    "tool_search_tool_bm25",
    "mcp_toolset",
];

/// Translates a request into a chat.
pub(super) fn parse(body: Value) -> Result<(Value, Messages), ApiError> {
    let mut fields = Fields::new(body, "")?;
    let (mut chat, mut messages) = (Map::new(), Vec::new());
    for (name, to) in [
        ("model", "model"),
        ("max_tokens", "max_tokens"),
        ("temperature", "temperature"),
        ("top_p", "top_p"),
        ("top_k", "top_k"),
        ("stop_sequences", "stop"),
        ("stream", "stream"),
    ] {
        fields.move_to(name, &mut chat, to);
    }
    if let Some(system) = fields.take("system") {
        let content = texts(system, "system")?;
        messages.push(json!({"role": "system", "content": content}));
    }
    for (index, message) in fields.list("messages")?.into_iter().enumerate() {
        push_turn(Fields::new(message, format!("messages.{index}"))?, &mut messages)?;
    }
    chat.insert("messages".to_owned(), messages.into());
    let (mut tools, mut omitted_tools) = (Vec::new(), BTreeSet::new());
    for (index, tool) in fields.list("tools")?.into_iter().enumerate() {
        match server_tool_kind(&tool) {
            Some(kind) => {
                omitted_tools.insert(kind);
            }
            None => tools.push(self::tool(Fields::new(tool, format!("tools.{index}"))?)?),
        }
    }
    match omitted_tools.first().filter(|_| tools.is_empty()) {
        // The request needs tools that are not available here.
        Some(kind) => return Err(unsupported("tools", kind)),
        None if tools.is_empty() => {}
        None => {
            chat.insert("tools".to_owned(), tools.into());
        }
    }
    if let Some(choice) = fields.take("tool_choice") {
        tool_choice(Fields::new(choice, "tool_choice")?, &mut chat)?;
    }
    if let Some(config) = fields.take("output_config") {
        output(Fields::new(config, "output_config")?, &mut chat)?;
    }
    if let Some(format) = fields.take("output_format") {
        chat.insert("response_format".to_owned(), schema(Fields::new(format, "output_format")?)?);
    }
    let thinking = fields.take("thinking");
    let thinks = thinking
        .is_some_and(|thinking| thinking["type"] == "enabled" || thinking["type"] == "adaptive");
    // Who asks, at what price, and what the server may forget: the model sees none of this.
    fields.ignore(&[
        "metadata",
        "service_tier",
        "cache_control",
        "speed",
        "inference_geo",
        "context_management",
        "diagnostics",
    ]);
    fields.finish()?;
    Ok((chat.into(), Messages { thinks, omitted_tools }))
}

/// A text, or blocks of text.
fn texts(content: Value, path: &str) -> Result<Value, ApiError> {
    let Value::Array(blocks) = content else { return Ok(content) };
    let texts = blocks.into_iter().enumerate().map(|(index, block)| {
        let mut block = Fields::new(block, format!("{path}.{index}"))?;
        match block.required_text("type")?.as_str() {
            "text" => text(block),
            other => Err(unsupported(&block.path, other)),
        }
    });
    Ok(Value::Array(texts.collect::<Result<_, _>>()?))
}

fn text(mut block: Fields) -> Result<Value, ApiError> {
    let text = block.required_text("text")?;
    block.ignore(&["cache_control", "citations"]);
    block.finish()?;
    Ok(json!({"type": "text", "text": text}))
}

/// Adds a turn. In a chat, tool results are messages of their own, and their images are the user's.
fn push_turn(mut turn: Fields, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    let role = turn.required_text("role")?;
    if !matches!(role.as_str(), "user" | "assistant" | "system") {
        return Err(invalid(&turn.path_of("role"), "must be user, assistant or system"));
    }
    let content =
        turn.take("content").ok_or_else(|| invalid(&turn.path_of("content"), "is missing"))?;
    let path = turn.path_of("content");
    turn.finish()?;
    let Value::Array(blocks) = content else {
        messages.push(json!({"role": role, "content": content}));
        return Ok(());
    };
    let mut turn_parts = TurnParts::default();
    for (index, block) in blocks.into_iter().enumerate() {
        turn_parts.add(Fields::new(block, format!("{path}.{index}"))?, &role)?;
    }
    messages.append(&mut turn_parts.results);
    if !turn_parts.images.is_empty() {
        let label = json!({"type": "text", "text": TOOL_IMAGES_LABEL});
        turn_parts.parts.splice(0..0, [label].into_iter().chain(turn_parts.images));
    }
    if !turn_parts.parts.is_empty() || !turn_parts.calls.is_empty() {
        let mut message = json!({"role": role, "content": turn_parts.parts});
        if turn_parts.parts.is_empty() {
            message["content"] = Value::Null;
        }
        if !turn_parts.calls.is_empty() {
            message["tool_calls"] = turn_parts.calls.into();
        }
        messages.push(message);
    }
    Ok(())
}

/// The parts of a turn.
#[derive(Default)]
struct TurnParts {
    parts: Vec<Value>,
    calls: Vec<Value>,
    /// Messages with the results of tools.
    results: Vec<Value>,
    /// Images in the results of tools.
    images: Vec<Value>,
}

impl TurnParts {
    fn add(&mut self, mut block: Fields, role: &str) -> Result<(), ApiError> {
        let kind = block.required_text("type")?;
        match (kind.as_str(), role) {
            ("text", _) => self.parts.push(text(block)?),
            ("image", "user") => self.parts.push(image(block)?),
            ("document", "user") => document(block, &mut self.parts)?,
            ("search_result", "user") => search_result(block, &mut self.parts)?,
            ("tool_result", "user") => self.result(block)?,
            ("tool_use", "assistant") => self.calls.push(call(block)?),
            // Chats don't return reasoning to the model.
            ("thinking" | "redacted_thinking", "assistant") => {}
            (other, _) => return Err(unsupported(&block.path, other)),
        }
        Ok(())
    }

    fn result(&mut self, mut block: Fields) -> Result<(), ApiError> {
        let id = block.required_text("tool_use_id")?;
        let failed = block.take("is_error").is_some_and(|failed| failed == true);
        let (content, path) = (block.take("content"), block.path_of("content"));
        block.ignore(&["cache_control"]);
        block.finish()?;
        let (mut texts, mut images) = (Vec::new(), Vec::new());
        match content {
            None => {}
            Some(Value::Array(blocks)) => {
                let mut inner = TurnParts::default();
                for (index, block) in blocks.into_iter().enumerate() {
                    let mut block = Fields::new(block, format!("{path}.{index}"))?;
                    let kind = block.required_text("type")?;
                    match kind.as_str() {
                        "text" => inner.parts.push(text(block)?),
                        "image" => inner.parts.push(image(block)?),
                        "document" => document(block, &mut inner.parts)?,
                        "search_result" => search_result(block, &mut inner.parts)?,
                        // A tool that was found. All tools are shown anyway.
                        "tool_reference" => {
                            let text = format!(
                                "The tool {} can be used.",
                                block.required_text("tool_name")?
                            );
                            inner.parts.push(json!({"type": "text", "text": text}));
                            block.ignore(&["cache_control"]);
                            block.finish()?;
                        }
                        other => return Err(unsupported(&block.path, other)),
                    }
                }
                (texts, images) = inner.parts.into_iter().partition(|part| part["type"] == "text");
            }
            Some(text) => texts.push(json!({"type": "text", "text": text})),
        }
        if failed {
            texts.insert(0, json!({"type": "text", "text": "The tool failed."}));
        }
        if texts.is_empty() {
            texts.push(json!({"type": "text", "text": ""}));
        }
        self.results.push(json!({"role": "tool", "tool_call_id": id, "content": texts}));
        self.images.append(&mut images);
        Ok(())
    }
}

fn image(mut block: Fields) -> Result<Value, ApiError> {
    let path = block.path_of("source");
    let source = block.take("source").ok_or_else(|| invalid(&path, "is missing"))?;
    block.ignore(&["cache_control"]);
    block.finish()?;
    let mut source = Fields::new(source, path)?;
    let url = match source.required_text("type")?.as_str() {
        "base64" => {
            format!(
                "data:{};base64,{}",
                source.required_text("media_type")?,
                source.required_text("data")?
            )
        }
        "url" => source.required_text("url")?,
        other => return Err(unsupported(&source.path, other)),
    };
    source.finish()?;
    Ok(json!({"type": "image_url", "image_url": {"url": url}}))
}

/// A document of texts and images. The guard can't see into others (a PDF, a stored file).
fn document(mut block: Fields, parts: &mut Vec<Value>) -> Result<(), ApiError> {
    let path = block.path_of("source");
    let source = block.take("source").ok_or_else(|| invalid(&path, "is missing"))?;
    for name in ["title", "context"] {
        let text = block.text(name)?.filter(|text| !text.is_empty());
        parts.extend(text.map(|text| json!({"type": "text", "text": text})));
    }
    block.ignore(&["cache_control", "citations"]);
    block.finish()?;
    let mut source = Fields::new(source, path)?;
    match source.required_text("type")?.as_str() {
        "text" => {
            parts.push(json!({"type": "text", "text": source.required_text("data")?}));
            source.ignore(&["media_type"]);
        }
        "content" => {
            let (content, path) =
                (source.take("content").unwrap_or_default(), source.path_of("content"));
            let Value::Array(blocks) = content else {
                parts.push(json!({"type": "text", "text": content}));
                return source.finish();
            };
            for (index, block) in blocks.into_iter().enumerate() {
                let mut block = Fields::new(block, format!("{path}.{index}"))?;
                match block.required_text("type")?.as_str() {
                    "text" => parts.push(text(block)?),
                    "image" => parts.push(image(block)?),
                    other => return Err(unsupported(&block.path, other)),
                }
            }
        }
        other => return Err(unsupported(&source.path, other)),
    }
    source.finish()
}

fn search_result(mut block: Fields, parts: &mut Vec<Value>) -> Result<(), ApiError> {
    for name in ["title", "source"] {
        parts.push(json!({"type": "text", "text": block.required_text(name)?}));
    }
    let path = block.path_of("content");
    if let Value::Array(texts) = texts(block.list("content")?.into(), &path)? {
        parts.extend(texts);
    }
    block.ignore(&["cache_control", "citations"]);
    block.finish()
}

fn call(mut block: Fields) -> Result<Value, ApiError> {
    let (id, name) = (block.required_text("id")?, block.required_text("name")?);
    let input = block.take("input").unwrap_or_else(|| json!({}));
    block.ignore(&["cache_control", "caller"]);
    block.finish()?;
    Ok(
        json!({"id": id, "type": "function", "function": {"name": name, "arguments": input.to_string()}}),
    )
}

/// The kind of a tool that a server would run.
fn server_tool_kind(tool: &Value) -> Option<String> {
    let kind = tool["type"].as_str()?;
    let is_date = |end: &str| end.len() == 8 && end.bytes().all(|byte| byte.is_ascii_digit());
    let undated =
        kind.rsplit_once('_').filter(|(_, end)| is_date(end)).map_or(kind, |(start, _)| start);
    SERVER_TOOLS.contains(&undated).then(|| kind.to_owned())
}

/// A tool that the client runs.
fn tool(mut tool: Fields) -> Result<Value, ApiError> {
    if let Some(kind) = tool.text("type")?.filter(|kind| kind != "custom") {
        return Err(unsupported(&tool.path, &kind));
    }
    let mut function = Map::new();
    for (name, to) in [
        ("name", "name"),
        ("description", "description"),
        ("input_schema", "parameters"),
        ("strict", "strict"),
    ] {
        tool.move_to(name, &mut function, to);
    }
    tool.ignore(&[
        "cache_control",
        "eager_input_streaming",
        "defer_loading",
        "allowed_callers",
        "input_examples",
    ]);
    tool.finish()?;
    Ok(json!({"type": "function", "function": function}))
}

fn tool_choice(mut choice: Fields, chat: &mut Map<String, Value>) -> Result<(), ApiError> {
    let wanted = match choice.required_text("type")?.as_str() {
        "auto" => "auto".into(),
        "any" => "required".into(),
        "none" => "none".into(),
        "tool" => {
            let name = choice.required_text("name")?;
            let mut tools = chat.get("tools").and_then(Value::as_array).into_iter().flatten();
            if !tools.any(|tool| tool["function"]["name"] == *name) {
                return Err(invalid(
                    &choice.path_of("name"),
                    "names no tool in `tools` that the client runs",
                ));
            }
            json!({"type": "function", "function": {"name": name}})
        }
        other => return Err(unsupported(&choice.path, other)),
    };
    chat.insert("tool_choice".to_owned(), wanted);
    if choice.take("disable_parallel_tool_use").is_some_and(|disabled| disabled == true) {
        chat.insert("parallel_tool_calls".to_owned(), false.into());
    }
    choice.finish()
}

fn output(mut config: Fields, chat: &mut Map<String, Value>) -> Result<(), ApiError> {
    config.move_to("effort", chat, "reasoning_effort");
    if let Some(format) = config.take("format") {
        chat.insert(
            "response_format".to_owned(),
            schema(Fields::new(format, "output_config.format")?)?,
        );
    }
    config.finish()
}

/// The format of an answer.
fn schema(mut format: Fields) -> Result<Value, ApiError> {
    let kind = format.required_text("type")?;
    if kind != "json_schema" {
        return Err(unsupported(&format.path, &kind));
    }
    let schema = format.take("schema").unwrap_or_else(|| json!({}));
    format.finish()?;
    Ok(
        json!({"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": true}}),
    )
}

/// An error, by its status.
pub(super) fn failure(error: &ApiError) -> Value {
    let kind = match error.status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 => "overloaded_error",
        504 => "timeout_error",
        400..500 => "invalid_request_error",
        _ => "api_error",
    };
    json!({"type": "error", "error": {"type": kind, "message": error.message, "code": error.code}})
}

impl Messages {
    fn content(&self, answer: &Answer<'_>) -> Vec<Value> {
        let mut content = Vec::new();
        if self.thinks && !answer.thoughts().is_empty() {
            content
                .push(json!({"type": "thinking", "thinking": answer.thoughts(), "signature": ""}));
        }
        let text = answer.text();
        if !text.is_empty() {
            content.push(json!({"type": "text", "text": text, "citations": null}));
        }
        content.extend(answer.calls().into_iter().map(|Call { id, name, arguments }| {
            let input = serde_json::from_str(&arguments).ok().filter(Value::is_object);
            let input = input.unwrap_or_else(|| json!({"arguments": arguments}));
            json!({"type": "tool_use", "id": id, "name": name, "input": input})
        }));
        content
    }

    /// The stop reason, and the details of a refusal.
    fn stop(answer: &Answer<'_>) -> (&'static str, Value) {
        let reason = match answer.finish {
            _ if answer.refused => "refusal",
            "length" => "max_tokens",
            "content_filter" => "refusal",
            // Servers end a call with `stop` if the tool was required by name.
            _ if !answer.calls().is_empty() => "tool_use",
            _ => "end_turn",
        };
        let details = match reason {
            "refusal" => {
                let closing = answer.closing_refusal().map(str::to_owned);
                let explanation = closing.unwrap_or_else(|| answer.text());
                json!({"type": "refusal", "category": null, "explanation": explanation})
            }
            _ => Value::Null,
        };
        (reason, details)
    }

    fn frame(answer: &Answer<'_>, content: &[Value]) -> Value {
        let [prompt, reply, cached] = answer.tokens();
        json!({
            "id": format!("msg_{}", answer.id), "type": "message", "role": "assistant", "model": answer.model, "content": content,
            "stop_reason": null, "stop_sequence": null,
            "usage": {"input_tokens": prompt.saturating_sub(cached), "output_tokens": reply,
                "cache_read_input_tokens": cached, "cache_creation_input_tokens": 0},
        })
    }
}

impl Wire for Messages {
    fn omitted_tools(&self) -> &BTreeSet<String> {
        &self.omitted_tools
    }

    fn body(&self, answer: &Answer<'_>) -> Value {
        let mut message = Self::frame(answer, &self.content(answer));
        let (reason, details) = Self::stop(answer);
        message["stop_reason"] = reason.into();
        message["stop_details"] = details;
        if let Some(report) = &answer.report {
            message["ecso"] = report.clone();
        }
        message
    }

    fn events(&self, answer: &Answer<'_>) -> Vec<Value> {
        let mut started = Self::frame(answer, &[]);
        started["usage"]["output_tokens"] = 0.into();
        let mut events = vec![json!({"type": "message_start", "message": started})];
        for (index, mut block) in self.content(answer).into_iter().enumerate() {
            let (field, delta) = match block["type"].as_str() {
                Some("thinking") => ("thinking", "thinking_delta"),
                Some("tool_use") => ("input", "input_json_delta"),
                _ => ("text", "text_delta"),
            };
            let (empty, delta_field, text) = match block[field].take() {
                Value::String(text) => ("".into(), field, text),
                input => (json!({}), "partial_json", input.to_string()),
            };
            block[field] = empty;
            events.push(
                json!({"type": "content_block_start", "index": index, "content_block": block}),
            );
            events.push(json!({"type": "content_block_delta", "index": index, "delta": {"type": delta, delta_field: text}}));
            events.push(json!({"type": "content_block_stop", "index": index}));
        }
        let (reason, details) = Self::stop(answer);
        events.push(json!({
            "type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": null, "stop_details": details},
            "usage": {"output_tokens": answer.tokens()[1]},
        }));
        events.push(json!({"type": "message_stop", "ecso": answer.report}));
        events
    }

    fn added_text<'a>(&self, event: &'a mut Value) -> Option<&'a mut Value> {
        event.get_mut("delta").filter(|delta| delta["type"] == "text_delta")?.get_mut("text")
    }

    fn failure_events(&self, _: (&str, &str), error: &ApiError) -> Vec<Value> {
        vec![failure(error)]
    }
}
