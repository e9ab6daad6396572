//! What is sent in steps 2, 3 and 4: a profile's templates, filled from the guarded turn.

use crate::{
    chat::{BlindChat, Chat, Part, Role, Turn},
    image::Image,
    profile::{EmptyCaption, ImageOrder, Profile},
    template::Template,
};

/// The turn that is guarded: the last one of the user.
pub(crate) struct Query<'a> {
    turn: &'a Turn,
    index: usize,
    /// Its text, the paper's x.
    pub(crate) text: String,
}

impl<'a> Query<'a> {
    /// `None` if the user says nothing in this conversation.
    pub(crate) fn of(chat: &'a Chat) -> Option<Self> {
        let index = chat.turns.iter().rposition(|turn| turn.role == Role::User)?;
        let turn = &chat.turns[index];
        Some(Self { turn, index, text: turn.query() })
    }

    /// Step 4 with eyes open, as the published utility scripts do it: the images of the guarded turn stand in it again.
    pub(crate) fn shown_again(&self, blind: BlindChat) -> Chat {
        let mut chat = Chat::from(blind);
        let images = self.turn.images().cloned().map(Part::Image);
        chat.turns[self.index].parts.splice(0..0, images);
        chat
    }
}

/// Step 2: a fresh conversation of one turn, with the images of the guarded turn.
pub(crate) fn detect(profile: &Profile, query: &Query<'_>, draft: &str) -> Chat {
    let detect = &profile.detect;
    let judged = match detect.cut {
        0 => draft,
        cut => draft.char_indices().nth(cut).map_or(draft, |(end, _)| &draft[..end]),
    };
    let text = detect.template.fill(&[("x", &query.text), ("y", judged)]);
    one_turn(profile, query.turn.images().cloned(), text)
}

/// Step 3: a fresh conversation of one turn, with one image.
pub(crate) fn caption(profile: &Profile, image: &Image, query: &Query<'_>) -> Chat {
    let text = profile.caption.chosen().fill(&[("x", &query.text)]);
    one_turn(profile, [image.clone()], text)
}

/// Step 4: the whole conversation as text. `captions` holds one for each image of `chat`, in order: those of the
/// guarded turn become its hints {c}; an image of another turn becomes `[Image: caption]` where it stood.
pub(crate) fn safe<'p>(
    profile: &'p Profile,
    chat: &Chat,
    query: &Query<'_>,
    captions: &[String],
) -> (BlindChat, &'p Template) {
    let mut captions = captions.iter();
    let mut hints: Vec<&str> = Vec::new();
    let mut turns = Vec::with_capacity(chat.turns.len());
    for (index, turn) in chat.turns.iter().enumerate() {
        let seen: Vec<&str> = captions.by_ref().take(turn.images().count()).map(String::as_str).collect();
        if index == query.index {
            hints = seen;
            turns.push((turn.role, String::new()));
        } else {
            turns.push((turn.role, described(turn, &seen)));
        }
    }
    let hint = hints.join("\n\n");
    let plain = hints.is_empty() || (hint.trim().is_empty() && profile.empty_caption == EmptyCaption::Plain);
    let template = if plain { &profile.safe.plain } else { &profile.safe.template };
    turns[query.index].1 = template.fill(&[("c", &hint), ("x", &query.text)]);
    (BlindChat { turns }, template)
}

fn described(turn: &Turn, captions: &[&str]) -> String {
    let mut captions = captions.iter();
    let parts: Vec<String> = turn
        .parts
        .iter()
        .map(|part| match part {
            Part::Text(text) => text.clone(),
            Part::Image(_) => format!("[Image: {}]", captions.next().unwrap_or(&"")),
        })
        .collect();
    parts.join("\n")
}

fn one_turn(profile: &Profile, images: impl IntoIterator<Item = Image>, text: String) -> Chat {
    let mut chat = Chat::ask(images, text);
    if profile.image_order == ImageOrder::After {
        chat.turns[0].parts.rotate_right(1);
    }
    chat
}
