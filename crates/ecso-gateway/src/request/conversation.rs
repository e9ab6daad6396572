//! The conversation of a chat request, as the judge reads it.

use ecso::{Image, Part, Role, Turn};
use serde_json::{Map, Value};

use crate::{completion::unescaped, error::ApiError};

/// What the model sees in addition to the messages, each as JSON text: tools, and the format of the
/// answer.
pub(super) fn definitions(fields: &Map<String, Value>) -> impl Iterator<Item = String> {
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
pub(super) fn turns(
    messages: &[Map<String, Value>],
    images: Vec<Image>,
) -> Result<Vec<Turn>, ApiError> {
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
    let index = open.map_or(turns.len(), |index| behind_answer + index);
    if open.is_none() {
        turns.push(Turn { role: Role::User, parts: Vec::new() });
    }
    &mut turns[index]
}

/// The tool calls of a message, as texts.
pub(super) fn tool_call_texts(message: &Map<String, Value>) -> Vec<String> {
    let functions = message.get("tool_calls").and_then(Value::as_array).into_iter().flatten();
    let functions = functions.map(|call| &call["function"]).filter(|function| function.is_object());
    functions
        .chain(message.get("function_call").filter(|call| !call.is_null()))
        .map(|function| {
            let arguments = &function["arguments"];
            // As the model reads them: JSON may spell every character as an escape.
            let read =
                arguments.as_str().and_then(unescaped).map_or(arguments.clone(), Value::from);
            format!("[Called the tool {} with {read}]", function["name"])
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
pub(super) fn content_text(content: &Value) -> String {
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
