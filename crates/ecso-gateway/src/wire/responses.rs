//! OpenAI's Responses: `POST /v1/responses`. A request brings its whole conversation, or continues
//! from an answer that is stored here.

use std::collections::BTreeSet;

use ecso::Verdict;
use serde_json::{Map, Value, json};

use super::{
    Answer, Fields, LoadConversation, PREVIOUS_RESPONSE_ID, StoredPart, TOOL_IMAGES_LABEL, Wire,
    content_text, external_conversation, invalid,
    tools::{self, Tools, is_server_tool},
    unsupported,
};
use crate::error::ApiError;

/// Request fields that an answer repeats.
const ECHOED: [&str; 10] = [
    "instructions",
    "max_output_tokens",
    "metadata",
    "parallel_tool_calls",
    "reasoning",
    "temperature",
    "text",
    "tool_choice",
    "tools",
    "top_p",
];

/// The maximum length of a repeated field, in bytes of JSON.
const LONGEST_ECHO: usize = 4096;

/// Fields that make a server load a conversation that the guard never sees.
const EXTERNAL: [&str; 2] = ["conversation", "prompt"];

/// How answers to a request are written.
pub(super) struct Responses {
    echoed: Map<String, Value>,
    tools: Tools,
    /// Whether the client asks for the verdict as a moderation result.
    moderation: bool,
    /// The id of the answer that it continues from, as the client wrote it.
    previous: Option<String>,
    /// The index of its first message that is neither an instruction nor from earlier answers.
    from: usize,
    /// Whether the answer may be stored.
    store: bool,
}

/// The prefix of the id of an answer; the request id follows.
const ID: &str = "resp_";

/// Translates a request into a chat.
pub(super) fn parse(
    body: Value,
    load: LoadConversation<'_>,
) -> Result<(Value, Responses), ApiError> {
    let mut fields = Fields::new(body, "")?;
    // Each stream repeats them three times, so only short ones are repeated.
    let is_short = |value: &&Value| value.to_string().len() <= LONGEST_ECHO;
    let echoed = |name: &&str| {
        Some(((*name).to_owned(), fields.remaining.get(*name).filter(is_short)?.clone()))
    };
    let mut echoed: Map<String, Value> = ECHOED.iter().filter_map(echoed).collect();
    for name in EXTERNAL {
        if fields.take(name).is_some() {
            return Err(external_conversation(name));
        }
    }
    if fields.take("background").is_some_and(|background| background != false) {
        return Err(unsupported("background", "true"));
    }
    let (mut chat, mut messages) = (Map::new(), Vec::new());
    for (name, to) in [
        ("model", "model"),
        ("max_output_tokens", "max_completion_tokens"),
        ("temperature", "temperature"),
        ("top_p", "top_p"),
        ("top_k", "top_k"),
        ("seed", "seed"),
        ("stream", "stream"),
        ("parallel_tool_calls", "parallel_tool_calls"),
    ] {
        fields.move_to(name, &mut chat, to);
    }
    if let Some(instructions) = fields.text("instructions")? {
        messages.push(json!({"role": "system", "content": instructions}));
    }
    let previous = fields.text(PREVIOUS_RESPONSE_ID)?;
    if let Some(id) = &previous {
        messages.extend(load(id.strip_prefix(ID).unwrap_or_default())?);
    }
    let from = messages.len();
    messages.extend(input(fields.take("input"))?);
    if messages.len() == from {
        return Err(invalid("input", "must contain a message, a tool call or a tool result"));
    }
    let store = match fields.take("store") {
        None => true,
        Some(Value::Bool(store)) => store,
        Some(_) => return Err(invalid("store", "must be true or false")),
    };
    chat.insert("messages".to_owned(), messages.into());
    let tools = Tools::parse(fields.list("tools")?)?;
    tools.add_to_chat(fields.take("tool_choice"), &mut chat)?;
    if let Some(Value::Array(echoed)) = echoed.get_mut("tools") {
        echoed.retain(|tool| !is_server_tool(tool));
    }
    if let Some(text) = fields.take("text") {
        self::text(Fields::new(text, "text")?, &mut chat)?;
    }
    if let Some(reasoning) = fields.take("reasoning") {
        let mut reasoning = Fields::new(reasoning, "reasoning")?;
        reasoning.move_to("effort", &mut chat, "reasoning_effort");
        reasoning.ignore(&["summary", "generate_summary", "context"]);
        reasoning.finish()?;
    }
    let moderation = fields.take("moderation").map(self::moderation).transpose()?.is_some();
    // Who asks, at what price, and what is stored where: the model sees none of this.
    fields.ignore(&[
        "metadata",
        "user",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "service_tier",
        "stream_options",
        "truncation",
        "include",
        "max_tool_calls",
        "top_logprobs",
        "prompt_cache_options",
        "context_management",
        "client_metadata",
        "background",
    ]);
    fields.finish()?;
    Ok((chat.into(), Responses { echoed, tools, moderation, previous, from, store }))
}

/// Checks who is asked for a moderation: only `ecso` is possible.
fn moderation(moderation: Value) -> Result<(), ApiError> {
    let mut moderation = Fields::new(moderation, "moderation")?;
    let model = moderation.required_text("model")?;
    if model != "ecso" {
        return Err(unsupported("moderation.model", &model));
    }
    // The client can't ask for more than is done anyway, and only the operator can allow less.
    moderation.ignore(&["policy"]);
    moderation.finish()
}

/// The input of a request as messages of a chat.
fn input(input: Option<Value>) -> Result<Vec<Value>, ApiError> {
    match input {
        Some(Value::Array(items)) => {
            let (mut messages, mut images) = (Vec::new(), Vec::new());
            for (index, item) in items.into_iter().enumerate() {
                self::item(
                    Fields::new(item, format!("input.{index}"))?,
                    &mut messages,
                    &mut images,
                )?;
            }
            messages.extend(take_tool_images(&mut images));
            Ok(messages)
        }
        Some(text @ Value::String(_)) => Ok(vec![json!({"role": "user", "content": text})]),
        _ => Err(invalid("input", "must be a text or a list of items")),
    }
}

/// Adds an item. In a chat, tool results are messages of their own, and their images are the
/// user's.
fn item(
    mut item: Fields,
    messages: &mut Vec<Value>,
    images: &mut Vec<Value>,
) -> Result<(), ApiError> {
    let kind = item.text("type")?.unwrap_or_else(|| "message".into());
    // The result of a shell call names its call this way.
    let own = item.text("id")?.filter(|_| kind == "local_shell_call_output");
    item.ignore(&["status", "phase", "end_turn"]);
    // The results of calls that were made together stay together.
    if !kind.ends_with("_output") {
        messages.extend(take_tool_images(images));
    }
    if let Some(call) = tools::parse_call(&kind, &mut item)? {
        // Calls that were made together belong to one turn.
        match messages.last_mut().filter(|last| last["role"] == "assistant") {
            Some(last) => match &mut last["tool_calls"] {
                Value::Array(calls) => calls.push(call),
                calls => *calls = json!([call]),
            },
            None => {
                messages.push(json!({"role": "assistant", "content": null, "tool_calls": [call]}));
            }
        }
        return item.finish();
    }
    match kind.as_str() {
        "message" => {
            let role = item.required_text("role")?;
            if !matches!(role.as_str(), "user" | "assistant" | "system" | "developer") {
                return Err(invalid(
                    &item.path_of("role"),
                    "must be user, assistant, system or developer",
                ));
            }
            let content = item
                .take("content")
                .ok_or_else(|| invalid(&item.path_of("content"), "is missing"))?;
            let content = parts(content, &item.path_of("content"))?;
            let has_image = |part: &Value| part["type"] == "image_url";
            if role != "user" && content.as_array().is_some_and(|parts| parts.iter().any(has_image))
            {
                return Err(unsupported(&item.path_of("content"), "input_image"));
            }
            let role = if role == "developer" { "system" } else { &role };
            messages.push(json!({"role": role, "content": content}));
        }
        "function_call_output" | "custom_tool_call_output" | "local_shell_call_output" => {
            let id = item
                .text("call_id")?
                .or(own)
                .ok_or_else(|| invalid(&item.path_of("call_id"), "is missing"))?;
            let output = item.take("output").unwrap_or_else(|| "".into());
            let (texts, result_images): (Vec<Value>, Vec<Value>) =
                match parts(output, &item.path_of("output"))? {
                    Value::Array(parts) => {
                        parts.into_iter().partition(|part| part["type"] != "image_url")
                    }
                    text => (vec![json!({"type": "text", "text": text})], Vec::new()),
                };
            let texts =
                if texts.is_empty() { vec![json!({"type": "text", "text": ""})] } else { texts };
            messages.push(json!({"role": "tool", "tool_call_id": id, "content": texts}));
            images.extend(result_images);
        }
        // Chats don't return reasoning to the model.
        "reasoning" => return Ok(()),
        "item_reference" => return Err(external_conversation(&item.path)),
        other => return Err(unsupported(&item.path, other)),
    }
    item.finish()
}

/// The images of tool results, as a user message.
fn take_tool_images(images: &mut Vec<Value>) -> Option<Value> {
    let label = json!({"type": "text", "text": TOOL_IMAGES_LABEL});
    let content: Vec<Value> = [label].into_iter().chain(images.drain(..)).collect();
    (content.len() > 1).then(|| json!({"role": "user", "content": content}))
}

fn parts(content: Value, path: &str) -> Result<Value, ApiError> {
    let Value::Array(parts) = content else { return Ok(content) };
    let part = |(index, part)| {
        let mut part = Fields::new(part, format!("{path}.{index}"))?;
        let kind = part.required_text("type")?;
        part.ignore(&["annotations", "logprobs", "prompt_cache_breakpoint"]);
        let chats = match kind.as_str() {
            "input_text" | "output_text" | "text" => {
                json!({"type": "text", "text": part.required_text("text")?})
            }
            "refusal" => json!({"type": "text", "text": part.required_text("refusal")?}),
            "input_image" => {
                if part.take("file_id").is_some() {
                    return Err(unsupported(&part.path, "file_id"));
                }
                let mut image = json!({"url": part.required_text("image_url")?});
                if let Some(detail) = part.take("detail") {
                    image["detail"] = detail;
                }
                json!({"type": "image_url", "image_url": image})
            }
            other => return Err(unsupported(&part.path, other)),
        };
        part.finish()?;
        Ok(chats)
    };
    Ok(Value::Array(parts.into_iter().enumerate().map(part).collect::<Result<_, ApiError>>()?))
}

/// The format of an answer.
fn text(mut text: Fields, chat: &mut Map<String, Value>) -> Result<(), ApiError> {
    text.move_to("verbosity", chat, "verbosity");
    if let Some(format) = text.take("format") {
        let mut format = Fields::new(format, "text.format")?;
        let wanted = match format.required_text("type")?.as_str() {
            "text" => None,
            "json_object" => Some(json!({"type": "json_object"})),
            "json_schema" => {
                let mut schema = Map::new();
                for name in ["name", "description", "schema", "strict"] {
                    format.move_to(name, &mut schema, name);
                }
                Some(json!({"type": "json_schema", "json_schema": schema}))
            }
            other => return Err(unsupported(&format.path, other)),
        };
        format.finish()?;
        chat.extend(wanted.map(|wanted| ("response_format".to_owned(), wanted)));
    }
    text.finish()
}

impl Responses {
    /// The items of the answer.
    fn output(&self, answer: &Answer<'_>) -> Vec<Value> {
        let mut output = Vec::new();
        if !answer.thoughts().is_empty() {
            let content = json!([{"type": "reasoning_text", "text": answer.thoughts()}]);
            output.push(
                json!({"type": "reasoning", "id": format!("rs_{}", answer.id), "summary": [], "content": content,
                "status": "completed"}),
            );
        }
        let text = answer.text();
        let written = |text: &str| json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []});
        let refusal = |text: &str| json!({"type": "refusal", "refusal": text});
        let parts = match answer.closing_refusal() {
            _ if text.is_empty() => Vec::new(),
            _ if answer.refused => vec![refusal(&text)],
            Some(closing) => vec![
                written(&answer.message.get("content").map(content_text).unwrap_or_default()),
                refusal(closing),
            ],
            None => vec![written(&text)],
        };
        if !parts.is_empty() {
            output.push(json!({"type": "message", "id": format!("msg_{}", answer.id), "role": "assistant", "status": "completed",
                "content": parts}));
        }
        let calls = answer.calls().into_iter().enumerate();
        output.extend(
            calls.map(|(index, call)| {
                self.tools.call_item(&format!("fc_{}_{index}", answer.id), call)
            }),
        );
        output
    }

    fn frame(
        &self,
        (id, model, created): (&str, &str, u64),
        is_stored: bool,
        status: &str,
    ) -> Value {
        let mut frame = json!({
            "id": format!("{ID}{id}"), "object": "response", "created_at": created, "status": status, "model": model, "output": [],
            "error": null, "incomplete_details": null, "store": is_stored,
            "parallel_tool_calls": true, "tool_choice": "auto", "tools": [], "metadata": {}, "instructions": null,
            "temperature": null, "top_p": null, PREVIOUS_RESPONSE_ID: self.previous,
        });
        for (name, value) in self.echoed.iter().filter(|(_, value)| !value.is_null()) {
            frame[name] = value.clone();
        }
        frame
    }

    fn final_response(&self, answer: &Answer<'_>) -> Value {
        let reason = match answer.finish {
            "length" => Some("max_output_tokens"),
            "content_filter" => Some("content_filter"),
            _ => None,
        };
        let status = if reason.is_some() { "incomplete" } else { "completed" };
        let mut response =
            self.frame((answer.id, answer.model, answer.created), answer.is_stored, status);
        response["incomplete_details"] =
            reason.map_or(Value::Null, |reason| json!({"reason": reason}));
        response["output"] = self.output(answer).into();
        let [prompt, reply, cached] = answer.tokens();
        response["usage"] = json!({
            "input_tokens": prompt, "output_tokens": reply, "total_tokens": prompt.saturating_add(reply),
            "input_tokens_details": {"cached_tokens": cached}, "output_tokens_details": {"reasoning_tokens": 0},
        });
        if self.moderation {
            let error = |code: &str, message: &str| json!({"type": "error", "code": code, "message": message});
            let output = match answer.verdict {
                (Verdict::Unchecked, _) => error("unchecked", "this answer was not judged"),
                (verdict, score) => {
                    let is_harm = verdict == Verdict::Unsafe;
                    let score = score.unwrap_or(if is_harm { 1.0 } else { 0.0 });
                    json!({
                        "type": "moderation_result", "model": "ecso", "flagged": is_harm, "categories": {"harmful": is_harm},
                        "category_scores": {"harmful": score}, "category_applied_input_types": {"harmful": ["text", "image"]},
                    })
                }
            };
            let input = error("not_apart", "request and answer are judged together: see output");
            response["moderation"] = json!({"input": input, "output": output});
        }
        if let Some(report) = &answer.report {
            response["ecso"] = report.clone();
        }
        response
    }
}

impl Wire for Responses {
    fn omitted_tools(&self) -> &BTreeSet<String> {
        self.tools.omitted_tools()
    }

    fn to_store(&self) -> Option<StoredPart<'_>> {
        let previous = self.previous.as_deref().and_then(|id| id.strip_prefix(ID));
        self.store.then_some(StoredPart { previous, from: self.from })
    }

    fn body(&self, answer: &Answer<'_>) -> Value {
        self.final_response(answer)
    }

    fn events(&self, answer: &Answer<'_>) -> Vec<Value> {
        let started =
            self.frame((answer.id, answer.model, answer.created), answer.is_stored, "in_progress");
        let mut events = vec![
            json!({"type": "response.created", "response": started}),
            json!({"type": "response.in_progress", "response": started}),
        ];
        let ended = self.final_response(answer);
        for (index, item) in ended["output"].as_array().into_iter().flatten().enumerate() {
            push_item_events(index, item, &mut events);
        }
        let status = ended["status"].as_str().unwrap_or_default();
        events.push(json!({"type": format!("response.{status}"), "response": ended}));
        for (number, event) in events.iter_mut().enumerate() {
            event["sequence_number"] = number.into();
        }
        events
    }

    fn added_text<'a>(&self, event: &'a mut Value) -> Option<&'a mut Value> {
        (event["type"] == "response.output_text.delta").then(|| &mut event["delta"])
    }

    fn failure_events(&self, (id, model): (&str, &str), error: &ApiError) -> Vec<Value> {
        let started = self.frame((id, model, 0), false, "in_progress");
        let mut failed = self.frame((id, model, 0), false, "failed");
        failed["error"] = json!({"code": "server_error", "message": format!("{} ({})", error.message, error.code)});
        vec![
            json!({"type": "response.created", "response": started, "sequence_number": 0}),
            json!({"type": "response.failed", "response": failed, "sequence_number": 1}),
        ]
    }
}

/// Adds the events of one item.
fn push_item_events(index: usize, item: &Value, events: &mut Vec<Value>) {
    let id = &item["id"];
    let mut started = item.clone();
    started["status"] = "in_progress".into();
    // The name of its text field, in the item and in events.
    let text_field = match item["type"].as_str() {
        Some("function_call") => Some(("arguments", "function_call_arguments")),
        Some("custom_tool_call") => Some(("input", "custom_tool_call_input")),
        _ => None,
    };
    match text_field {
        Some((field, _)) => started[field] = "".into(),
        None if started["content"].is_array() => started["content"] = json!([]),
        None => {}
    }
    events.push(
        json!({"type": "response.output_item.added", "output_index": index, "item": started}),
    );
    if let Some((field, name)) = text_field {
        let text = &item[field];
        events.push(
            json!({"type": format!("response.{name}.delta"), "item_id": id, "output_index": index, "delta": text}),
        );
        let mut done = json!({"type": format!("response.{name}.done"), "item_id": id, "output_index": index, field: text});
        if field == "arguments" {
            done["name"] = item["name"].clone();
        }
        events.push(done);
    }
    for (content_index, part) in item["content"].as_array().into_iter().flatten().enumerate() {
        let (field, name) = match part["type"].as_str() {
            Some("refusal") => ("refusal", "refusal"),
            Some("reasoning_text") => ("text", "reasoning_text"),
            _ => ("text", "output_text"),
        };
        let event = |kind: &str, more: Value| {
            let mut event = json!({"type": kind, "item_id": id, "output_index": index, "content_index": content_index});
            for (name, value) in more.as_object().into_iter().flatten() {
                event[name] = value.clone();
            }
            event
        };
        let mut empty = part.clone();
        empty[field] = "".into();
        let logprobs = if name == "output_text" { json!({"logprobs": []}) } else { json!({}) };
        let with = |field: &str, text: &Value| {
            let mut more = logprobs.clone();
            more[field] = text.clone();
            more
        };
        events.push(event("response.content_part.added", json!({"part": empty})));
        events.push(event(&format!("response.{name}.delta"), with("delta", &part[field])));
        events.push(event(&format!("response.{name}.done"), with(field, &part[field])));
        events.push(event("response.content_part.done", json!({"part": part})));
    }
    events.push(json!({"type": "response.output_item.done", "output_index": index, "item": item}));
}
