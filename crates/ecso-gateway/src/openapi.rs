//! The description of the API, made from the routes (`server`) and the types behind them. Types
//! here describe bodies that are read field by field, or that belong to another server.
#![expect(dead_code, reason = "these types only exist for the description")]

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{OpenApi, ToSchema};

#[derive(OpenApi)]
#[openapi(info(
    title = "ecso",
    description = "A guard in front of a multimodal LLM, with OpenAI's API. No text of an answer \
                   in scope goes out before its verdict. Other routes are passed on if they are \
                   known to be harmless.",
    license(name = "MIT OR Apache-2.0")
))]
struct Document;

/// The description without routes.
pub(crate) fn document() -> utoipa::openapi::OpenApi {
    Document::openapi()
}

/// The verdict.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verdict {
    /// The answer may go out.
    Safe,
    /// The answer is harmful.
    Unsafe,
    /// The answer was not judged.
    Unchecked,
}

/// A chat. Other known fields are passed to the server behind the guard; unknown fields are refused
/// (`unknown_field`).
#[derive(Deserialize, ToSchema)]
pub(crate) struct ChatRequest {
    model: String,
    #[schema(min_items = 1)]
    messages: Vec<Message>,
    /// Whether the answer is a stream of server-sent events.
    stream: Option<bool>,
    /// The number of choices.
    #[schema(minimum = 1)]
    n: Option<u32>,
    #[serde(flatten)]
    more: BTreeMap<String, Value>,
}

/// A turn of a chat.
#[derive(Deserialize, ToSchema)]
pub(crate) struct Message {
    role: Role,
    content: Option<Content>,
}

#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Role {
    System,
    Developer,
    User,
    Assistant,
    Tool,
}

#[derive(Deserialize, ToSchema)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

/// A part of a turn.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(crate) enum Part {
    Text { text: String },
    ImageUrl { image_url: ImageUrl },
}

/// An image, by its http, https or data URL.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct ImageUrl {
    url: String,
}

/// An answer. Other known fields come from the server behind the guard.
#[derive(Serialize, ToSchema)]
pub(crate) struct ChatAnswer {
    choices: Vec<Value>,
    #[serde(flatten)]
    more: BTreeMap<String, Value>,
}

/// A list of models.
#[derive(Serialize, ToSchema)]
pub(crate) struct Models {
    data: Vec<Value>,
    #[serde(flatten)]
    more: BTreeMap<String, Value>,
}
