//! What is sent in steps 2, 3 and 4: a profile's templates, filled from the guarded turn.

use std::collections::HashSet;

use crate::{
    chat::{BlindChat, Chat, Part, Role, Turn},
    image::Image,
    profile::{Eyes, ImageOrder, Profile, Question, Turns},
    template::Template,
};

/// The turn that is guarded: the last one of the user.
pub(crate) struct Query<'a> {
    turn: &'a Turn,
    index: usize,
    /// Its text, the paper's x.
    pub(crate) text: String,
    /// What the questions and the caption's template call x.
    asked: String,
    /// The images that the questions show.
    shown: Vec<&'a Image>,
    /// How many images stand in earlier turns.
    earlier_images: usize,
}

impl<'a> Query<'a> {
    /// `None` if the user says nothing in this conversation.
    pub(crate) fn of(chat: &'a Chat, turns: Turns) -> Option<Self> {
        let index = chat.turns.iter().rposition(|turn| turn.role == Role::User)?;
        let turn = &chat.turns[index];
        let text = turn.query();
        let earlier = chat.turns[..index].iter().filter(|turn| turn.role != Role::System);
        let (asked, shown) = match turns {
            Turns::Last => (text.clone(), turn.images().collect()),
            Turns::All => {
                let said = earlier.map(|turn| format!("[earlier, {}] {}", turn.role.as_str(), turn.query()));
                let asked: Vec<String> = said.chain([text.clone()]).collect();
                (asked.join("\n"), chat.images().collect())
            }
        };
        let earlier_images = chat.turns[..index].iter().flat_map(Turn::images).count();
        Some(Self { turn, index, text, asked, shown, earlier_images })
    }

    /// Whether the guarded turn's images left no hint: there is none, or their captions (one for each image of the conversation)
    /// are blank.
    pub(crate) fn has_no_hints(&self, captions: &[String], or_blank: bool) -> bool {
        let own = captions.iter().skip(self.earlier_images).take(self.turn.images().count());
        let mut own = own.peekable();
        own.peek().is_none() || (or_blank && own.all(|caption| caption.trim().is_empty()))
    }

    /// Step 4 with eyes open, as the published utility scripts do it: the images of the guarded turn stand in it again.
    pub(crate) fn shown_again(&self, blind: BlindChat) -> Chat {
        let mut chat = Chat::from(blind);
        let images = self.turn.images().cloned().map(Part::Image);
        chat.turns[self.index].parts.splice(0..0, images);
        chat
    }
}

/// Step 2, and what is asked around the steps: a fresh conversation of one turn for each wording that says something of its own.
pub(crate) fn question<'q>(
    profile: &Profile,
    question: &'q Question,
    query: &Query<'_>,
    answer: &str,
    captions: &[String],
) -> Vec<(Chat, &'q Template)> {
    let judged = match question.cut {
        0 => answer,
        cut => answer.char_indices().nth(cut).map_or(answer, |(end, _)| &answer[..end]),
    };
    let captions = captions.join("\n\n");
    let read = without_empty_entries(&captions);
    let resolved = if read.is_empty() { &query.asked } else { &read };
    let [asked, judged, captions, resolved] =
        [&query.asked, judged, &captions, resolved].map(|text| quoted(text, &profile.quote));
    let mut said = HashSet::new();
    let mut chats = Vec::new();
    for template in question.wordings() {
        let text = template.fill(&[("x", &asked), ("y", &judged), ("c", &captions), ("r", &resolved)]);
        if said.insert(text.clone()) {
            let images = query.shown.iter().filter(|_| question.image == Eyes::Kept);
            let mut chat = one_turn(profile, images.map(|image| (*image).clone()), text);
            chat.turns.splice(0..0, examples(question));
            chats.push((chat, template));
        }
    }
    chats
}

/// The numbers and bullets of a list's empty entries ask for nothing, and a small model takes them for harmless text.
fn without_empty_entries(text: &str) -> String {
    let is_mark = |word: &str| match word.strip_suffix(['.', ')']) {
        Some(number) => !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()),
        None => matches!(word, "-" | "*" | "•"),
    };
    let lines = text.lines().map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let says_something =
            |place: &usize| !is_mark(words[*place]) || words.get(place + 1).is_some_and(|next| !is_mark(next));
        let kept: Vec<&str> = (0..words.len()).filter(says_something).map(|place| words[place]).collect();
        kept.join(" ")
    });
    let lines: Vec<String> = lines.filter(|line| !line.is_empty()).collect();
    lines.join("\n")
}

/// What stands before a question: its system message, and its examples with their answers, no and yes in turn.
fn examples(question: &Question) -> Vec<Turn> {
    let mut turns = Vec::new();
    if !question.system.is_empty() {
        turns.push(Turn::text(Role::System, question.system.clone()));
    }
    for place in 0..question.no.len().max(question.yes.len()) {
        for (examples, answer) in [(&question.no, "no"), (&question.yes, "yes")] {
            if let Some(example) = examples.get(place) {
                turns.extend([Turn::text(Role::User, example.clone()), Turn::text(Role::Assistant, answer)]);
            }
        }
    }
    turns
}

/// Step 3: a fresh conversation of one turn, with one image.
pub(crate) fn caption(profile: &Profile, image: &Image, query: &Query<'_>) -> Chat {
    let text = profile.caption.chosen().fill(&[("x", &quoted(&query.asked, &profile.quote))]);
    one_turn(profile, [image.clone()], text)
}

/// `mark` before every line.
fn quoted(text: &str, mark: &str) -> String {
    if mark.is_empty() {
        return text.to_owned();
    }
    let lines: Vec<String> = text.lines().map(|line| format!("{mark}{line}")).collect();
    lines.join("\n")
}

/// Step 4: the whole conversation as text. `captions` holds one for each image of `chat`, in order: those of the
/// guarded turn become its hints {c}; an image of another turn becomes `[Image: caption]` where it stood.
pub(crate) fn safe(
    profile: &Profile,
    chat: &Chat,
    query: &Query<'_>,
    captions: &[String],
    template: &Template,
) -> BlindChat {
    let mut turns = Vec::with_capacity(chat.turns.len());
    let mut captions = captions.iter();
    for (index, turn) in chat.turns.iter().enumerate() {
        let seen: Vec<&str> = captions.by_ref().take(turn.images().count()).map(String::as_str).collect();
        let text = if index == query.index {
            let hints = quoted(&seen.join("\n\n"), &profile.quote);
            template.fill(&[("c", &hints), ("x", &query.text)])
        } else {
            described(turn, &seen)
        };
        turns.push((turn.role, text));
    }
    BlindChat { turns }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_entries_of_a_list_are_left_out() {
        for (text, left) in [
            ("Ways to bake bread 1. 2. 3.", "Ways to bake bread"),
            ("Ways to bake bread\n1.\n2.\n3.", "Ways to bake bread"),
            ("1. 2. 3. and to cut it", "3. and to cut it"),
            ("1. Flour\n2. Water\n3.", "1. Flour\n2. Water"),
            ("- milk\n-\n* * eggs", "- milk\n* eggs"),
            ("Room 3. Open at 9.30", "Room 3. Open at 9.30"),
            ("1.\n\n2)", ""),
        ] {
            assert_eq!(without_empty_entries(text), left, "{text}");
        }
    }
}
