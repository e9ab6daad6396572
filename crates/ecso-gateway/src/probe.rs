//! A quick look at a chat request: which model, and is there an image? Nothing is kept that needn't be.

use std::{borrow::Cow, collections::BTreeSet, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{Error, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

/// What a request is, as far as routing needs to know. A key that is there twice is an error: readers differ in which
/// of the two they take, and what is guarded must be what is answered.
#[derive(Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Probe<'a> {
    #[serde(borrow, default)]
    pub(crate) model: Cow<'a, str>,
    #[serde(default)]
    messages: Vec<Message>,
}

impl<'a> Probe<'a> {
    pub(crate) fn read(body: &'a [u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(body)
    }

    /// Whether anything but text stands in it, in any turn.
    pub(crate) fn has_images(&self) -> bool {
        self.messages.iter().any(|message| message.content.0)
    }
}

#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
struct Message {
    #[serde(default)]
    content: Content,
}

/// Whether a message holds anything but text.
#[derive(Debug, Default, PartialEq, Eq)]
struct Content(bool);

/// Whether a part of a message is surely a text.
struct IsText(bool);

#[derive(PartialEq, Eq, PartialOrd, Ord, Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Deserialize<'de> for IsText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Look;

        impl<'de> Visitor<'de> for Look {
            type Value = IsText;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a part of a message")
            }

            fn visit_str<E>(self, _: &str) -> Result<IsText, E> {
                Ok(IsText(true))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<IsText, A::Error> {
                let (mut kind, mut names, mut holds_more) = (None, BTreeSet::new(), false);
                while let Some(name) = map.next_key::<Name<'de>>()? {
                    match &*name.0 {
                        "type" => kind = Some(map.next_value::<Name<'de>>()?),
                        "text" => holds_more = map.next_value::<Content>()?.0,
                        _ => drop(map.next_value::<IgnoredAny>()?),
                    }
                    if let Some(twice) = names.replace(name) {
                        return Err(A::Error::custom(format_args!("duplicate field `{}`", twice.0)));
                    }
                }
                let is_text = match kind {
                    Some(kind) => matches!(
                        &*kind.0,
                        "text" | "input_text" | "output_text" | "thinking" | "refusal" | "input_audio"
                    ),
                    // Servers tell by its field what a part without a type is.
                    None => names.len() == 1 && names.contains(&Name("text".into())),
                };
                Ok(IsText(is_text && !holds_more))
            }
        }

        deserializer.deserialize_any(Look)
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Look;

        impl<'de> Visitor<'de> for Look {
            type Value = Content;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text or a list of parts")
            }

            fn visit_str<E>(self, _: &str) -> Result<Content, E> {
                Ok(Content(false))
            }

            fn visit_unit<E>(self) -> Result<Content, E> {
                Ok(Content(false))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<Content, A::Error> {
                let mut other = false;
                // What is not known to be text may be an image by another name.
                while let Some(IsText(is_text)) = parts.next_element()? {
                    other |= !is_text;
                }
                Ok(Content(other))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Content, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Content(true))
            }
        }

        deserializer.deserialize_any(Look)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_seen_wherever_they_stand() {
        for (body, images) in [
            (r#"{"model": "m", "messages": [{"role": "user", "content": "hi"}]}"#, false),
            (r#"{"model": "m", "messages": [{"role": "assistant", "content": null, "tool_calls": []}]}"#, false),
            (r#"{"messages": [{"content": [{"type": "text", "text": "image_url"}]}], "model": "a\"b"}"#, false),
            (
                r#"{"messages": [{"content": [{"type": "image_url", "image_url": {"url": "u"}}]}, {"content": "t"}]}"#,
                true,
            ),
            (r#"{"messages": [{"content": [{"type": "text", "text": ""}, {"type": "image\u005furl"}]}]}"#, true),
            (r#"{"messages": [{"content": [{"image_url": {"url": "u"}}]}]}"#, true),
            (r#"{"messages": [{"content": {"type": "image_url"}}]}"#, true),
            (r#"{"messages": [{"content": [{"type": "video_url"}]}]}"#, true),
            (r#"{"messages": [{"content": ["a", {"text": "b"}, {"type": "thinking", "thinking": "c"}]}]}"#, false),
            (r#"{"messages": [{"content": [{"text": "a", "image": "u"}]}]}"#, true),
            (r#"{"messages": [{"content": [{"text": "a", "image_url": "u"}]}]}"#, true),
            (r#"{"messages": [{"content": [{"type": "text", "text": {"image_url": "u"}}]}]}"#, true),
            (r#"{"messages": [{"content": [{}]}]}"#, true),
            ("{}", false),
        ] {
            assert_eq!(Probe::read(body.as_bytes()).unwrap().has_images(), images, "{body}");
        }
    }

    #[test]
    fn what_readers_could_read_differently_is_an_error() {
        for body in [
            r#"{"messages": [{"content": "a", "content": [{"type": "image_url"}]}]}"#,
            r#"{"messages": [], "messages": [{"content": [{"type": "image_url"}]}]}"#,
            r#"{"messages": [{"content": [{"type": "text", "type": "image_url"}]}]}"#,
            r#"{"messages": [{"content": [{"type": "text", "text": "a", "text": "b"}]}]}"#,
            r#"{"messages": [{"content": [{"text": "a", "text": "b"}]}]}"#,
            r#"{"messages": [{"content": [{"type": "image_url", "image_url": "u", "image_url": "v"}]}]}"#,
            r#"{"messages": [{"content": [3]}]}"#,
            r#"{"messages": [{"content": 3}]}"#,
            r#"{"messages": "no"}"#,
            "",
        ] {
            assert!(Probe::read(body.as_bytes()).is_err(), "{body}");
        }
    }
}
