//! Conversations: [`Chat`], which may hold images, and [`BlindChat`], which cannot.

use crate::image::Image;

/// Who speaks in a turn.
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

/// One piece of a turn.
#[derive(Debug, Clone, PartialEq)]
pub enum Part {
    /// Text, sent as it is.
    Text(String),
    /// An image.
    Image(Image),
}

/// One turn of a [`Chat`]: its parts stand in the order in which the model sees them.
#[derive(Debug, Clone, PartialEq)]
pub struct Turn {
    /// Who speaks.
    pub role: Role,
    /// What is said, in order.
    pub parts: Vec<Part>,
}

impl Turn {
    /// A turn of text alone.
    pub fn text(role: Role, text: impl Into<String>) -> Self {
        Self { role, parts: vec![Part::Text(text.into())] }
    }

    /// The turn's text: its text parts, joined by line breaks.
    #[must_use]
    pub fn query(&self) -> String {
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

/// A conversation that may hold images: what an MLLM `F(v, x)` is given.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Chat {
    /// The turns, oldest first.
    pub turns: Vec<Turn>,
}

impl Chat {
    /// A fresh conversation of one user turn: `images`, then `text`.
    pub fn ask(images: impl IntoIterator<Item = Image>, text: impl Into<String>) -> Self {
        let mut parts: Vec<Part> = images.into_iter().map(Part::Image).collect();
        parts.push(Part::Text(text.into()));
        Self { turns: vec![Turn { role: Role::User, parts }] }
    }

    /// The same conversation with `text` as its system message.
    #[must_use]
    pub fn with_system(mut self, text: impl Into<String>) -> Self {
        self.turns.insert(0, Turn::text(Role::System, text));
        self
    }

    /// The images of all turns, in order.
    pub fn images(&self) -> impl Iterator<Item = &Image> {
        self.turns.iter().flat_map(Turn::images)
    }

    /// How many images the conversation holds, over all turns.
    #[must_use]
    pub fn image_count(&self) -> usize {
        self.images().count()
    }
}

/// A conversation of text alone. It has no place for an image: what is asked through it is asked with eyes closed,
/// and the compiler sees to it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlindChat {
    /// The turns, oldest first: who speaks, and the text.
    pub turns: Vec<(Role, String)>,
}

impl From<BlindChat> for Chat {
    fn from(blind: BlindChat) -> Self {
        let turns = blind.turns.into_iter().map(|(role, text)| Turn::text(role, text)).collect();
        Self { turns }
    }
}
