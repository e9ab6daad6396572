//! A quick look at a chat request: which model, and is there an image? Nothing is kept that needn't be.

use std::{borrow::Cow, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, SeqAccess, Visitor},
};

/// What a request is, as far as routing needs to know. A key that is there twice is an error: readers differ in which of
/// the two they take, and what is guarded must be what is answered.
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

#[derive(Deserialize)]
struct Part<'a> {
    #[serde(rename = "type", borrow, default)]
    kind: Cow<'a, str>,
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
                while let Some(part) = parts.next_element::<Part<'de>>()? {
                    // What is not known to be text may be an image by another name.
                    other |= !matches!(
                        &*part.kind,
                        "text" | "input_text" | "output_text" | "thinking" | "refusal" | "input_audio"
                    );
                }
                Ok(Content(other))
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Content, A::Error> {
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
            r#"{"messages": [{"content": 3}]}"#,
            r#"{"messages": "no"}"#,
            "",
        ] {
            assert!(Probe::read(body.as_bytes()).is_err(), "{body}");
        }
    }
}
