//! Conversations: [`Chat`], which may hold images, and [`BlindChat`], which cannot.

use crate::image::Image;

/// Who speaks in a turn. Exhaustive, so that a backend sends every turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The operator's instructions.
    System,
    /// The person (or program) that asks.
    User,
    /// The MLLM.
    Assistant,
}

impl Role {
    /// The word that chat protocols and chat templates use.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// One piece of a turn. Exhaustive, so that a backend can't silently leave out a kind of content.
#[derive(Debug, Clone, PartialEq)]
pub enum Part {
    /// Text, sent as it is.
    Text(String),
    /// An image.
    Image(Image),
}

/// One turn of a [`Chat`]. The model sees its parts in this order.
#[derive(Debug, Clone, PartialEq)]
pub struct Turn {
    /// Who speaks.
    pub role: Role,
    /// The content, in order.
    pub parts: Vec<Part>,
}

impl Turn {
    /// A turn of one text.
    pub fn text(role: Role, text: impl Into<String>) -> Self {
        Self { role, parts: vec![Part::Text(text.into())] }
    }

    /// The turn's text: its text parts, joined by line breaks.
    #[must_use]
    pub fn joined_text(&self) -> String {
        let texts: Vec<&str> = self
            .parts
            .iter()
            .filter_map(|part| match part {
                Part::Text(text) => Some(text.as_str()),
                Part::Image(_) => None,
            })
            .collect();
        texts.join("\n")
    }

    /// The turn's images, in order.
    pub fn images(&self) -> impl Iterator<Item = &Image> {
        self.parts.iter().filter_map(|part| match part {
            Part::Image(image) => Some(image),
            Part::Text(_) => None,
        })
    }
}

/// A conversation that may hold images: the input of an MLLM, `F(v, x)`.
///
/// ```
/// use ecso::{Chat, Image, Role, Turn};
///
/// let image = Image::from_url("https://example.org/bread.png");
/// let mut chat = Chat::ask([image], "What is this?").with_system("Be brief.");
/// chat.turns.push(Turn::text(Role::Assistant, "A loaf of bread."));
/// chat.turns.push(Turn::text(Role::User, "How do I bake it?"));
/// assert_eq!((chat.turns.len(), chat.image_count()), (4, 1));
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Chat {
    /// The turns, oldest first. If the last one is the assistant's, the model continues it (a
    /// prefill).
    pub turns: Vec<Turn>,
    /// Further text that the model is shown: tool descriptions, JSON schemas. Backends do not send
    /// it (the caller's request fields hold it); the guard judges it.
    pub definitions: Vec<String>,
    /// The number of leading turns that all chats of this kind share: a question's examples. A
    /// backend may cache its work on them, since they hold no part of a user's conversation.
    pub shared_turns: usize,
}

impl Chat {
    /// A new conversation of one user turn: `images`, then `text`.
    pub fn ask(images: impl IntoIterator<Item = Image>, text: impl Into<String>) -> Self {
        let mut parts: Vec<Part> = images.into_iter().map(Part::Image).collect();
        parts.push(Part::Text(text.into()));
        Self { turns: vec![Turn { role: Role::User, parts }], ..Self::default() }
    }

    /// The same conversation with `text` as its system message.
    #[must_use]
    pub fn with_system(mut self, text: impl Into<String>) -> Self {
        self.turns.insert(0, Turn::text(Role::System, text));
        self
    }

    /// The conversation with each system message moved before the text of the next user turn,
    /// after its images. For models without a system role.
    #[must_use]
    pub fn without_system(&self) -> Self {
        let mut turns: Vec<Turn> = Vec::new();
        let mut pending: Vec<String> = Vec::new();
        for turn in &self.turns {
            match turn.role {
                Role::System => pending.push(turn.joined_text()),
                Role::User if !pending.is_empty() => {
                    turns.push(with_texts_before(turn, std::mem::take(&mut pending)));
                }
                _ => turns.push(turn.clone()),
            }
        }
        if !pending.is_empty() {
            turns.push(Turn::text(Role::User, pending.join("\n\n")));
        }
        Self { turns, definitions: self.definitions.clone(), shared_turns: 0 }
    }

    /// The images of all turns, in order.
    pub fn images(&self) -> impl Iterator<Item = &Image> {
        self.turns.iter().flat_map(Turn::images)
    }

    /// The number of images in all turns.
    #[must_use]
    pub fn image_count(&self) -> usize {
        self.images().count()
    }
}

/// A turn with `texts` before its own text. Its images stay where they are.
fn with_texts_before(turn: &Turn, mut texts: Vec<String>) -> Turn {
    let mut turn = turn.clone();
    let own = turn.parts.iter_mut().find_map(|part| match part {
        Part::Text(text) => Some(text),
        Part::Image(_) => None,
    });
    match own {
        Some(text) => {
            texts.push(std::mem::take(text));
            *text = texts.join("\n\n");
        }
        None => turn.parts.push(Part::Text(texts.join("\n\n"))),
    }
    turn
}

/// A conversation of text alone. It has no place for an image, so the compiler makes sure that the
/// model answers it with eyes closed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlindChat {
    /// The turns, oldest first: the speaker and the text.
    pub turns: Vec<(Role, String)>,
}

impl From<BlindChat> for Chat {
    fn from(blind: BlindChat) -> Self {
        let turns = blind.turns.into_iter().map(|(role, text)| Turn::text(role, text)).collect();
        Self { turns, ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_system_moves_system_messages_before_the_next_user_text() {
        let image = Image::from_url("http://localhost/a.png");
        let chat = Chat::ask([image.clone()], "What is this?").with_system("Be brief.");
        let folded = chat.without_system();
        assert_eq!(folded, Chat::ask([image.clone()], "Be brief.\n\nWhat is this?"));
        let mut without_text = Chat::ask([image.clone()], "");
        without_text.turns[0].parts.pop();
        assert_eq!(
            without_text.with_system("Be brief.").without_system(),
            Chat::ask([image.clone()], "Be brief.")
        );
        let late = Chat {
            turns: vec![Turn::text(Role::System, "a"), Turn::text(Role::System, "b")],
            ..Chat::default()
        };
        assert_eq!(late.without_system().turns, [Turn::text(Role::User, "a\n\nb")]);
    }
}
