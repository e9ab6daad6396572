//! What is sent in steps 2, 3 and 4: a profile's templates, filled from the guarded turn.

use std::{borrow::Cow, collections::HashSet};

use crate::{
    chat::{BlindChat, Chat, Part, Role, Turn},
    image::Image,
    mllm::ImageText,
    profile::{Author, EmptyCaption, ImageOrder, Images, Method, Profile, Question, Turns},
    template::Template,
};

/// A prompt, and the template that made it.
pub(crate) type Prompt<'q> = (Chat, &'q Template);

/// A question's prompt, with the prior of its wording.
pub(crate) type Asked<'q> = (Prompt<'q>, f64);

/// The turn that is guarded: the last one of the user, in its conversation.
pub(crate) struct Query<'a> {
    profile: &'a Profile,
    /// The whole conversation.
    pub(crate) chat: &'a Chat,
    index: usize,
    /// Its text: the paper's x.
    text: String,
    /// What templates call {x}.
    asked: String,
    /// What templates call {t}: all that the model is shown, but for what its author is trusted
    /// with.
    transcript: String,
    /// Where the conversation ends with turns of the assistant, the model goes on from these: the
    /// answer begins with them.
    prefill: String,
    /// The first of these turns, or behind the last turn.
    begun: usize,
}

/// An answer that is judged.
#[derive(Clone, Copy)]
pub(crate) struct Answer<'y> {
    /// How the client began it.
    begun: &'y str,
    /// What the model made of it.
    text: &'y str,
}

impl<'y> Answer<'y> {
    /// An answer that nobody began.
    pub(crate) fn new(text: &'y str) -> Self {
        Self { begun: "", text }
    }

    /// Whether the model says nothing.
    pub(crate) fn is_empty(self) -> bool {
        self.text.trim().is_empty()
    }

    /// As the client will read it, up to `longest` characters of the model's own; 0 is no bound. A
    /// beginning takes nothing from that bound.
    fn whole(self, longest: usize) -> Cow<'y, str> {
        let Self { begun, text } = self;
        let text = text
            .char_indices()
            .nth(longest)
            .filter(|_| longest > 0)
            .map_or(text, |(end, _)| &text[..end]);
        if begun.is_empty() { text.into() } else { format!("{begun}{text}").into() }
    }
}

impl<'a> Query<'a> {
    /// `None` if the user says nothing in this conversation.
    pub(crate) fn of(chat: &'a Chat, profile: &'a Profile) -> Option<Self> {
        let index = chat.turns.iter().rposition(|turn| turn.role == Role::User)?;
        let text = chat.turns[index].query();
        let earlier = chat.turns[..index].iter().filter(|turn| turn.role != Role::System);
        let asked = match profile.turns {
            Turns::Last => text.clone(),
            Turns::All => {
                let said = earlier
                    .map(|turn| format!("[earlier, {}] {}", turn.role.as_str(), turn.query()));
                said.chain([text.clone()]).collect::<Vec<_>>().join("\n")
            }
        };
        // What another turn stands behind is an earlier answer.
        let begun = chat
            .turns
            .iter()
            .rposition(|turn| turn.role != Role::Assistant)
            .map_or(0, |last| last + 1);
        let prefill = chat.turns[begun..].iter().map(Turn::query).collect();
        let mut query =
            Self { profile, chat, index, text, asked, transcript: String::new(), prefill, begun };
        query.transcript = query.transcript();
        Some(query)
    }

    /// The conversation as text. What stays the same from call to call stands first, so that its
    /// windows do too.
    fn transcript(&self) -> String {
        let is_judged = |author: Author| match &self.profile.method {
            Method::Paper(_) => true,
            Method::Hardened(hardened) => !hardened.trusted.contains(&author),
        };
        let mut said = Vec::new();
        if is_judged(Author::Tools) {
            said.extend(self.chat.definitions.iter().map(|text| format!("[definition] {text}")));
        }
        for (place, turn) in self.chat.turns.iter().enumerate() {
            let who = match turn.role {
                Role::System if is_judged(Author::System) => "[system] ",
                Role::System => continue,
                _ if place == self.index => "",
                Role::User => "[earlier, user] ",
                Role::Assistant if place < self.begun => "[earlier, assistant] ",
                Role::Assistant => "[the answer begins] ",
            };
            said.push(format!("{who}{}", turn.query()));
        }
        said.join("\n")
    }

    fn turn(&self) -> &'a Turn {
        &self.chat.turns[self.index]
    }

    /// The images that the questions show.
    fn shown(&self) -> Box<dyn Iterator<Item = &'a Image> + '_> {
        match self.profile.turns {
            Turns::Last => Box::new(self.turn().images()),
            Turns::All => Box::new(self.chat.images()),
        }
    }

    /// A draft, behind the beginning that the client wrote, where it did.
    pub(crate) fn draft<'y>(&'y self, y: &'y str) -> Answer<'y> {
        Answer { begun: &self.prefill, text: y }
    }

    /// A question about the request, or about the reply `y` where its template has {y}: a fresh
    /// conversation of one turn for each wording, and each window, that says something of its own.
    /// None where it does not apply.
    pub(crate) fn question<'q>(
        &self,
        question: &'q Question,
        y: Answer<'_>,
        seen: &[ImageText],
    ) -> Vec<Asked<'q>> {
        let judged = y.whole(question.cut);
        let words = without_empty_entries(&joined(seen.iter().map(|seen| seen.words.clone())));
        let description = joined(seen.iter().map(|seen| seen.description.clone()));
        let both = joined(hints(seen));
        let sent = if both.is_empty() {
            String::new()
        } else {
            format!("The user sent a picture of: {both}\n")
        };
        let shows_more = self.transcript != self.asked;
        let holes = [
            ("x", self.asked.as_str()),
            ("y", &judged),
            ("t", &self.transcript),
            ("p", &sent),
            ("w", &words),
            ("s", &description),
            ("c", &both),
        ];
        let mut said = HashSet::new();
        let mut prompts = Vec::new();
        for (template, prior) in question.wordings() {
            let adds_nothing = template.has("t") && !shows_more && !template.has("y");
            if adds_nothing
                || holes[4..].iter().any(|(hole, text)| template.has(hole) && text.is_empty())
            {
                continue;
            }
            for holes in windows(&holes, template, question.window) {
                let filled: Vec<(&str, String)> = holes
                    .iter()
                    .map(|(name, text)| (*name, quoted(text, &self.profile.quote)))
                    .collect();
                let filled: Vec<(&str, &str)> =
                    filled.iter().map(|(name, text)| (*name, text.as_str())).collect();
                let text = template.fill(&filled);
                if said.insert(text.clone()) {
                    let images = self.shown().filter(|_| question.image == Images::Include);
                    let mut chat = one_turn(self.profile, images.cloned(), text);
                    let examples = examples(question);
                    chat.head = examples.len();
                    chat.turns.splice(0..0, examples);
                    prompts.push(((chat, template), prior));
                }
            }
        }
        prompts
    }

    /// Step 3: each image, and a fresh conversation of one turn about it.
    pub(crate) fn captions(&self) -> impl Iterator<Item = (&'a Image, Prompt<'a>)> {
        let template = self.profile.caption.chosen();
        self.chat.images().map(move |image| {
            let text = template.fill(&[("x", &quoted(&self.asked, &self.profile.quote))]);
            (image, (one_turn(self.profile, [image.clone()], text), template))
        })
    }

    /// Whether the captions, one for each image of the conversation, leave a hint about the guarded
    /// turn: it has an image, and not all of its captions are blank.
    pub(crate) fn has_hints(&self, captions: &[String]) -> bool {
        let earlier: usize =
            self.chat.turns[..self.index].iter().map(|turn| turn.images().count()).sum();
        let mut own = captions.iter().skip(earlier).take(self.turn().images().count()).peekable();
        let is_plain = self.profile.empty_caption == EmptyCaption::Plain;
        own.peek().is_some() && !(is_plain && own.all(|caption| caption.trim().is_empty()))
    }

    /// Step 4: the whole conversation, as text. `captions` holds one for each image, in order:
    /// those of the guarded turn become its hints {c}; an image of another turn becomes `[Image:
    /// caption]` where it stood. The answer begins anew: a beginning that the client wrote is left
    /// out. Where the profile keeps the eyes open, as the published utility scripts do, the images
    /// of the guarded turn stand in it again.
    pub(crate) fn safe<'t>(&self, captions: &[String], template: &'t Template) -> Prompt<'t> {
        let blind = self.blind(captions, template);
        let mut chat = Chat::from(blind);
        if self.profile.safe.image == Images::Include {
            let images = self.turn().images().cloned().map(Part::Image);
            chat.turns[self.index].parts.splice(0..0, images);
        }
        (chat, template)
    }

    fn blind(&self, captions: &[String], template: &Template) -> BlindChat {
        let mut turns = Vec::with_capacity(self.chat.turns.len());
        let mut captions = captions.iter();
        for (index, turn) in self.chat.turns.iter().enumerate() {
            let seen: Vec<&str> =
                captions.by_ref().take(turn.images().count()).map(String::as_str).collect();
            let text = match index == self.index {
                true => {
                    let hints = quoted(&seen.join("\n\n"), &self.profile.quote);
                    template.fill(&[("c", &hints), ("x", &self.text)])
                }
                false if index >= self.begun => continue,
                false => described(turn, &seen),
            };
            turns.push((turn.role, text));
        }
        BlindChat { turns }
    }
}

/// Each image as a phrase; empty of one of which nothing is known.
pub(crate) fn hints(seen: &[ImageText]) -> impl Iterator<Item = String> + '_ {
    seen.iter().map(|ImageText { words, description }| {
        match (description.is_empty(), words.is_empty()) {
            (true, true) => String::new(),
            (true, false) => format!("a page with the printed text \"{words}\""),
            (false, true) => description.clone(),
            (false, false) => format!("{description}, with the printed text \"{words}\""),
        }
    })
}

/// Texts with an empty line between them; those that say nothing are left out.
fn joined(texts: impl Iterator<Item = String>) -> String {
    texts.filter(|text| !text.is_empty()).collect::<Vec<_>>().join("\n\n")
}

/// What is filled in where the judged text is longer than a window: the judged text in windows that
/// overlap by a fifth, everything else cut to one window, its middle left out. Judged is {y}, where
/// the template has it, else the longest text that it has.
fn windows<'h>(
    holes: &[(&'h str, &'h str)],
    template: &Template,
    window: usize,
) -> Vec<Vec<(&'h str, Cow<'h, str>)>> {
    let used: Vec<(&str, &str)> =
        holes.iter().copied().filter(|(name, _)| template.has(name)).collect();
    let judged = used
        .iter()
        .find(|(name, _)| *name == "y")
        .or_else(|| used.iter().max_by_key(|(_, text)| text.len()));
    let Some((judged, text)) = judged.filter(|_| window > 0).copied() else {
        return vec![used.into_iter().map(|(name, text)| (name, Cow::Borrowed(text))).collect()];
    };
    let with = |part: &'h str| {
        let rest = used.iter().filter(|(name, _)| *name != judged);
        rest.map(|(name, text)| (*name, middle_left_out(text, window)))
            .chain([(judged, Cow::Borrowed(part))])
            .collect()
    };
    slices(text, window).into_iter().map(with).collect()
}

/// A text in slices of `window` characters, each a fifth of that further back than the end of the
/// last.
fn slices(text: &str, window: usize) -> Vec<&str> {
    let starts: Vec<usize> =
        text.char_indices().map(|(place, _)| place).chain([text.len()]).collect();
    let count = starts.len() - 1;
    let step = (window - window / 5).max(1);
    let mut slices = Vec::new();
    let mut start = 0;
    loop {
        let end = (start + window).min(count);
        slices.push(&text[starts[start]..starts[end]]);
        if end == count {
            return slices;
        }
        start += step;
    }
}

fn middle_left_out(text: &str, longest: usize) -> Cow<'_, str> {
    let count = text.chars().count();
    if count <= longest {
        return text.into();
    }
    let half = longest / 2;
    let start: String = text.chars().take(half).collect();
    let end: String = text.chars().skip(count - half).collect();
    format!("{start} … {end}").into()
}

/// The numbers and bullets of a list's empty entries ask for nothing, and a small model takes them
/// for harmless text.
fn without_empty_entries(text: &str) -> String {
    let is_mark = |word: &str| match word.strip_suffix(['.', ')']) {
        Some(number) => !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()),
        None => matches!(word, "-" | "*" | "•"),
    };
    let lines = text.lines().map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let says_something = |place: &usize| {
            !is_mark(words[*place]) || words.get(place + 1).is_some_and(|next| !is_mark(next))
        };
        let kept: Vec<&str> =
            (0..words.len()).filter(says_something).map(|place| words[place]).collect();
        kept.join(" ")
    });
    let lines: Vec<String> = lines.filter(|line| !line.is_empty()).collect();
    lines.join("\n")
}

/// What stands before a question: its system message, and its examples with their answers, no and
/// yes in turn.
fn examples(question: &Question) -> Vec<Turn> {
    let mut turns = Vec::new();
    if !question.system.is_empty() {
        turns.push(Turn::text(Role::System, question.system.clone()));
    }
    for place in 0..question.no.len().max(question.yes.len()) {
        for (examples, answer) in [(&question.no, "no"), (&question.yes, "yes")] {
            if let Some(example) = examples.get(place) {
                turns.extend([
                    Turn::text(Role::User, example.clone()),
                    Turn::text(Role::Assistant, answer),
                ]);
            }
        }
    }
    turns
}

/// `mark` before every line.
fn quoted(text: &str, mark: &str) -> String {
    if mark.is_empty() {
        return text.to_owned();
    }
    let lines: Vec<String> = text.lines().map(|line| format!("{mark}{line}")).collect();
    lines.join("\n")
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

    proptest::proptest! {
        #[test]
        fn slices_overlap_and_leave_nothing_out(text in ".{0,60}", window in 1..20_usize) {
            let slices = slices(&text, window);
            proptest::prop_assert!(slices.iter().all(|slice| slice.chars().count() <= window));
            // Whatever is no longer than the overlap stands whole in one of them.
            let chars: Vec<char> = text.chars().collect();
            for part in chars.windows((window / 5).max(1)) {
                let part: String = part.iter().collect();
                proptest::prop_assert!(slices.iter().any(|slice| slice.contains(&part)), "{part:?}");
            }
        }
    }
}
