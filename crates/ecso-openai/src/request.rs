//! Requests in OpenAI's chat-completions format.

use std::borrow::Cow;

use base64::{Engine, prelude::BASE64_STANDARD};
use ecso::{Chat, Image, Part, Sampling, Turn};
use serde_json::{Map, Value, json};

use crate::{
    options::{MaxTokensField, Options},
    quirks::{Quirk, Quirks},
};

/// Most tokens that servers list for one position.
const MAX_TOP_LOGPROBS: u8 = 20;

/// The request for a reply of `model`, with its quirks applied.
pub(crate) fn body(
    model: &str,
    chat: &Chat,
    sampling: &Sampling,
    stream: bool,
    quirks: &Quirks,
    options: &Options,
) -> Map<String, Value> {
    let chat = if quirks.contains(&Quirk::NoSystem) {
        Cow::Owned(chat.without_system())
    } else {
        Cow::Borrowed(chat)
    };
    let messages: Vec<Value> = chat
        .turns
        .iter()
        .map(|turn| json!({"role": turn.role.as_str(), "content": content(turn)}))
        .collect();
    let mut body = Map::new();
    body.insert("model".into(), model.into());
    body.insert("messages".into(), messages.into());
    if let Some(temperature) = sampling.temperature {
        body.insert("temperature".into(), shortest(temperature));
    }
    if let Some(top_p) = sampling.top_p {
        body.insert("top_p".into(), shortest(top_p));
    }
    if let Some(seed) = sampling.seed {
        body.insert("seed".into(), seed.into());
    }
    if let Some(limit) = sampling.max_tokens
        && !sampling.extra.contains_key("max_completion_tokens")
    {
        body.insert("max_tokens".into(), limit.into());
    }
    if sampling.top_logprobs > 0 {
        body.insert("logprobs".into(), true.into());
        body.insert("top_logprobs".into(), sampling.top_logprobs.min(MAX_TOP_LOGPROBS).into());
    }
    if stream {
        body.insert("stream".into(), true.into());
        body.insert("stream_options".into(), json!({"include_usage": true}));
    }
    body.extend(sampling.extra.clone());
    if options.max_tokens_field == MaxTokensField::MaxCompletionTokens {
        Quirk::CompletionTokens.apply(&mut body);
    }
    for quirk in quirks {
        quirk.apply(&mut body);
    }
    for field in &options.omit {
        body.remove(field);
    }
    body
}

/// The content of a turn. Without images it is plain text, which every server reads.
fn content(turn: &Turn) -> Value {
    if turn.images().next().is_none() {
        return turn.joined_text().into();
    }
    let parts = turn.parts.iter().map(|part| match part {
        Part::Text(text) => json!({"type": "text", "text": text}),
        Part::Image(image) => image_part(image),
    });
    parts.collect::<Vec<_>>().into()
}

/// An image with its view fields: `detail` and the fields of `image_url` go next to the URL, others
/// (Qwen's `min_pixels`) next to the type.
fn image_part(image: &Image) -> Value {
    let url = match (image.encoded(), image.url()) {
        (Some((bytes, mime)), _) => format!("data:{mime};base64,{}", BASE64_STANDARD.encode(bytes)),
        (None, url) => url.unwrap_or_default().to_owned(),
    };
    let mut part = json!({"type": "image_url", "image_url": {"url": url}});
    for (name, value) in image.view() {
        match name.as_str() {
            "detail" => part["image_url"]["detail"] = value.clone(),
            "image_url" => {
                for (name, value) in
                    value.as_object().into_iter().flatten().filter(|(name, _)| *name != "url")
                {
                    part["image_url"][name] = value.clone();
                }
            }
            "type" => {}
            _ => part[name] = value.clone(),
        }
    }
    part
}

/// The number in its shortest form: 0.2, not the double nearest to the float.
fn shortest(number: f32) -> Value {
    number.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture() -> Image {
        Image::from_url("https://example.org/a.png")
    }

    #[test]
    fn an_image_is_sent_with_its_view_fields() {
        let view = json!({"detail": "low", "min_pixels": 784, "max_pixels": 50176, "type": "x", "image_url": "y"});
        let view = view.as_object().unwrap().clone();
        assert_eq!(
            image_part(&picture().with_view(view)),
            json!({
                "type": "image_url",
                "image_url": {"url": "https://example.org/a.png", "detail": "low"},
                "min_pixels": 784,
                "max_pixels": 50176,
            })
        );
    }

    #[test]
    fn options_name_and_omit_fields() {
        let sampling = Sampling {
            max_tokens: Some(5),
            seed: Some(1),
            temperature: Some(0.5),
            ..Sampling::default()
        };
        let chat = Chat::ask([], "q");
        let keys = |sampling: &Sampling, options: &Options| -> Vec<String> {
            body("m", &chat, sampling, false, &Quirks::new(), options)
                .keys()
                .skip(2)
                .cloned()
                .collect()
        };
        let named =
            Options { max_tokens_field: MaxTokensField::MaxCompletionTokens, ..Options::default() };
        let mut found = keys(&sampling, &named);
        found.sort();
        assert_eq!(found, ["max_completion_tokens", "seed", "temperature"]);
        let omitting =
            Options { omit: vec!["seed".into(), "temperature".into()], ..Options::default() };
        assert_eq!(keys(&sampling, &omitting), ["max_tokens"]);
        let mut extra = sampling.clone();
        extra.extra.insert("max_completion_tokens".into(), 7.into());
        assert_eq!(keys(&extra, &omitting), ["max_completion_tokens"]);
    }
}
