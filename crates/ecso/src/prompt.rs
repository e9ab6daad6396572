//! The prompts of steps 2, 3 and 4: a profile's templates, filled in from the guarded turn.

use std::{borrow::Cow, collections::HashSet};

use crate::{
    chat::{BlindChat, Chat, Part, Role, Turn},
    image::Image,
    mllm::ImageText,
    profile::{Author, EmptyCaption, ImageOrder, Images, Layout, Method, Profile, Question, Turns},
    template::Template,
};

/// A prompt, and the template that made it.
pub(crate) type Prompt<'q> = (Chat, &'q Template);

/// A question's prompt, with the prior of its wording.
pub(crate) type Asked<'q> = (Prompt<'q>, f64);

/// The guarded turn, which is the user's last one, in its conversation.
pub(crate) struct Query<'a> {
    profile: &'a Profile,
    /// The whole conversation.
    pub(crate) chat: &'a Chat,
    index: usize,
    /// The turn's text: the paper's x.
    text: String,
    /// {x} in templates.
    request: String,
    /// {t} in templates: all text that the model is shown, except that of trusted authors.
    transcript: String,
    /// The text of the assistant's turns at the end of the conversation, if any. The model
    /// continues it, so the answer begins with it.
    prefill: String,
    /// The index of the first of these turns; the number of turns if there are none.
    prefill_start: usize,
}

/// An answer to be judged.
#[derive(Clone, Copy)]
pub(crate) struct Answer<'y> {
    /// The beginning that the client wrote.
    prefill: &'y str,
    /// The model's own text.
    text: &'y str,
}

impl<'y> Answer<'y> {
    /// An answer without a prefill.
    pub(crate) fn new(text: &'y str) -> Self {
        Self { prefill: "", text }
    }

    /// Whether the model has written nothing.
    pub(crate) fn is_empty(self) -> bool {
        self.text.trim().is_empty()
    }

    /// The answer as the client will read it, with at most `limit` characters of the model's own
    /// text; 0 means no limit.
    fn whole(self, limit: usize) -> Cow<'y, str> {
        let Self { prefill, text } = self;
        let text = text
            .char_indices()
            .nth(limit)
            .filter(|_| limit > 0)
            .map_or(text, |(end, _)| &text[..end]);
        if prefill.is_empty() { text.into() } else { format!("{prefill}{text}").into() }
    }
}

impl<'a> Query<'a> {
    /// `None` if the conversation has no user turn.
    pub(crate) fn of(chat: &'a Chat, profile: &'a Profile) -> Option<Self> {
        let index = chat.turns.iter().rposition(|turn| turn.role == Role::User)?;
        let text = chat.turns[index].joined_text();
        let earlier = chat.turns[..index].iter().filter(|turn| turn.role != Role::System);
        let request = match profile.turns {
            Turns::Last => text.clone(),
            Turns::All => {
                let earlier = earlier.map(|turn| {
                    format!("[earlier, {}] {}", turn.role.as_str(), turn.joined_text())
                });
                earlier.chain([text.clone()]).collect::<Vec<_>>().join("\n")
            }
        };
        // Turns of the assistant that another turn follows are earlier answers.
        let prefill_start = chat
            .turns
            .iter()
            .rposition(|turn| turn.role != Role::Assistant)
            .map_or(0, |last| last + 1);
        let prefill = chat.turns[prefill_start..].iter().map(Turn::joined_text).collect();
        let mut guarded = Self {
            profile,
            chat,
            index,
            text,
            request,
            transcript: String::new(),
            prefill,
            prefill_start,
        };
        guarded.transcript = guarded.transcript();
        Some(guarded)
    }

    /// The conversation as text. Text that repeats from call to call comes first, so that its
    /// windows repeat too.
    fn transcript(&self) -> String {
        let is_judged = |author: Author| match &self.profile.method {
            Method::Paper(_) => true,
            Method::Hardened(hardened) => !hardened.trusted.contains(&author),
        };
        let mut lines = Vec::new();
        if is_judged(Author::Tools) {
            lines.extend(self.chat.definitions.iter().map(|text| format!("[definition] {text}")));
        }
        for (index, turn) in self.chat.turns.iter().enumerate() {
            let label = match turn.role {
                Role::System if is_judged(Author::System) => "[system] ",
                Role::System => continue,
                _ if index == self.index => "",
                Role::User => "[earlier, user] ",
                Role::Assistant if index < self.prefill_start => "[earlier, assistant] ",
                Role::Assistant => "[the answer begins] ",
            };
            lines.push(format!("{label}{}", turn.joined_text()));
        }
        lines.join("\n")
    }

    fn turn(&self) -> &'a Turn {
        &self.chat.turns[self.index]
    }

    /// The images that the questions are about.
    fn shown(&self) -> Box<dyn Iterator<Item = &'a Image> + '_> {
        match self.profile.turns {
            Turns::Last => Box::new(self.turn().images()),
            Turns::All => Box::new(self.chat.images()),
        }
    }

    /// A draft, after the client's prefill, if there is one.
    pub(crate) fn draft<'y>(&'y self, y: &'y str) -> Answer<'y> {
        Answer { prefill: &self.prefill, text: y }
    }

    /// The prompts of a question about the request, or about the reply `y` if its template has {y}:
    /// a new conversation of one turn for each wording and window, without repetitions. Empty if
    /// the question does not apply.
    pub(crate) fn question<'q>(
        &self,
        question: &'q Question,
        y: Answer<'_>,
        images: &[ImageText],
    ) -> Vec<Asked<'q>> {
        let judged = y.whole(question.cut);
        if question.layout == Layout::Conversation {
            return self.continued(question, &judged);
        }
        let words = without_empty_items(&joined(images.iter().map(|image| image.words.clone())));
        let description = joined(images.iter().map(|image| image.description.clone()));
        let both = joined(hints(images));
        let picture_line = if both.is_empty() {
            String::new()
        } else {
            format!("The user sent a picture of: {both}\n")
        };
        let shows_more = self.transcript != self.request;
        let values = [
            ("x", self.request.as_str()),
            ("y", &judged),
            ("t", &self.transcript),
            ("p", &picture_line),
            ("w", &words),
            ("s", &description),
            ("c", &both),
        ];
        let mut texts = HashSet::new();
        let mut prompts = Vec::new();
        for (template, prior) in question.wordings() {
            let adds_nothing = template.has("t") && !shows_more && !template.has("y");
            if adds_nothing
                || values[4..].iter().any(|(name, text)| template.has(name) && text.is_empty())
            {
                continue;
            }
            for values in windows(&values, template, question.window) {
                let quoted: Vec<(&str, String)> = values
                    .iter()
                    .map(|(name, text)| (*name, quoted(text, &self.profile.quote)))
                    .collect();
                let quoted: Vec<(&str, &str)> =
                    quoted.iter().map(|(name, text)| (*name, text.as_str())).collect();
                let text = template.fill(&quoted);
                if texts.insert(text.clone()) {
                    let images = self.shown().filter(|_| question.image == Images::Include);
                    let mut chat = one_turn(self.profile, images.cloned(), text);
                    let examples = examples(question);
                    chat.shared_turns = examples.len();
                    chat.turns.splice(0..0, examples);
                    prompts.push(((chat, template), prior));
                }
            }
        }
        prompts
    }

    /// The conversation with the reply `y`, and each wording of a question as its next turn.
    fn continued<'q>(&self, question: &'q Question, y: &str) -> Vec<Asked<'q>> {
        let asked = |(template, prior): (&'q Template, f64)| {
            let quoted = [&self.request, y].map(|text| quoted(text, &self.profile.quote));
            let text = template.fill(&[("x", &quoted[0]), ("y", &quoted[1])]);
            let mut chat = self.chat.clone();
            chat.turns.truncate(self.prefill_start);
            chat.turns.extend([Turn::text(Role::Assistant, y), Turn::text(Role::User, text)]);
            ((chat, template), prior)
        };
        question.wordings().map(asked).collect()
    }

    /// Step 3: each image, and a new conversation of one turn about it.
    pub(crate) fn captions(&self) -> impl Iterator<Item = (&'a Image, Prompt<'a>)> {
        let template = self.profile.caption.chosen();
        self.chat.images().map(move |image| {
            let text = template.fill(&[("x", &quoted(&self.request, &self.profile.quote))]);
            (image, (one_turn(self.profile, [image.clone()], text), template))
        })
    }

    /// Whether the captions, one for each image of the conversation, contain a hint about the
    /// guarded turn: it has an image, and (with `empty_caption = "plain"`) not all of its captions
    /// are blank.
    pub(crate) fn has_hints(&self, captions: &[String]) -> bool {
        let earlier: usize =
            self.chat.turns[..self.index].iter().map(|turn| turn.images().count()).sum();
        let mut own = captions.iter().skip(earlier).take(self.turn().images().count()).peekable();
        let is_plain = self.profile.empty_caption == EmptyCaption::Plain;
        own.peek().is_some() && !(is_plain && own.all(|caption| caption.trim().is_empty()))
    }

    /// Step 4: the whole conversation as text. `captions` has one for each image, in order. Those
    /// of the guarded turn become its hints {c}; an image of another turn is replaced by `[Image:
    /// caption]`. The client's prefill is left out, so the answer starts from scratch. If the
    /// profile includes images in step 4, as the published utility scripts do, those of the guarded
    /// turn are put back.
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
            let own: Vec<&str> =
                captions.by_ref().take(turn.images().count()).map(String::as_str).collect();
            let text = match index == self.index {
                true => {
                    let hints = quoted(&own.join("\n\n"), &self.profile.quote);
                    template.fill(&[("c", &hints), ("x", &self.text)])
                }
                false if index >= self.prefill_start => continue,
                false => with_captions(turn, &own),
            };
            turns.push((turn.role, text));
        }
        BlindChat { turns }
    }
}

/// Each image as a phrase; empty if nothing is known about it.
pub(crate) fn hints(images: &[ImageText]) -> impl Iterator<Item = String> + '_ {
    images.iter().map(|ImageText { words, description }| {
        match (description.is_empty(), words.is_empty()) {
            (true, true) => String::new(),
            (true, false) => format!("a page with the printed text \"{words}\""),
            (false, true) => description.clone(),
            (false, false) => format!("{description}, with the printed text \"{words}\""),
        }
    })
}

/// Texts with an empty line between them. Empty texts are left out.
fn joined(texts: impl Iterator<Item = String>) -> String {
    texts.filter(|text| !text.is_empty()).collect::<Vec<_>>().join("\n\n")
}

/// The values of a template for each window of the judged text: {y}, if the template has it, else
/// every value that is longer than a window, one after the other. Windows overlap by a fifth. Other
/// values longer than a window lose their middle.
fn windows<'h>(
    values: &[(&'h str, &'h str)],
    template: &Template,
    window: usize,
) -> Vec<Vec<(&'h str, Cow<'h, str>)>> {
    let used: Vec<(&str, &str)> =
        values.iter().copied().filter(|(name, _)| template.has(name)).collect();
    let is_long = |text: &str| window > 0 && text.chars().nth(window).is_some();
    let reply = used.iter().filter(|(name, _)| *name == "y");
    let judged: Vec<(&str, &str)> = if reply.clone().next().is_some() {
        reply.copied().filter(|(_, text)| is_long(text)).collect()
    } else {
        used.iter().copied().filter(|(_, text)| is_long(text)).collect()
    };
    let shortened = |text| if window > 0 { without_middle(text, window) } else { text.into() };
    if judged.is_empty() {
        return vec![used.into_iter().map(|(name, text)| (name, shortened(text))).collect()];
    }
    let with = |judged: &str, part: &'h str| {
        let of = |(name, text)| (name, if name == judged { part.into() } else { shortened(text) });
        used.iter().copied().map(of).collect()
    };
    let parts = judged
        .iter()
        .flat_map(|(name, text)| slices(text, window).into_iter().map(move |part| (*name, part)));
    parts.map(|(name, part)| with(name, part)).collect()
}

/// A text in slices of `window` characters, each of which overlaps the last by a fifth.
fn slices(text: &str, window: usize) -> Vec<&str> {
    let starts: Vec<usize> =
        text.char_indices().map(|(start, _)| start).chain([text.len()]).collect();
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

fn without_middle(text: &str, limit: usize) -> Cow<'_, str> {
    let count = text.chars().count();
    if count <= limit {
        return text.into();
    }
    let half = limit / 2;
    let start: String = text.chars().take(half).collect();
    let end: String = text.chars().skip(count - half).collect();
    format!("{start} … {end}").into()
}

/// A text without the numbers and bullets of empty list items. They ask for nothing, and a small
/// model takes them for harmless text.
fn without_empty_items(text: &str) -> String {
    let is_mark = |word: &str| match word.strip_suffix(['.', ')']) {
        Some(number) => !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()),
        None => matches!(word, "-" | "*" | "•"),
    };
    let lines = text.lines().map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let is_kept = |index: &usize| {
            !is_mark(words[*index]) || words.get(index + 1).is_some_and(|next| !is_mark(next))
        };
        let kept: Vec<&str> = (0..words.len()).filter(is_kept).map(|index| words[index]).collect();
        kept.join(" ")
    });
    let lines: Vec<String> = lines.filter(|line| !line.is_empty()).collect();
    lines.join("\n")
}

/// The turns before a question: its system message, and its examples with their answers, no and yes
/// in turn.
fn examples(question: &Question) -> Vec<Turn> {
    let mut turns = Vec::new();
    if !question.system.is_empty() {
        turns.push(Turn::text(Role::System, question.system.clone()));
    }
    for index in 0..question.no.len().max(question.yes.len()) {
        for (examples, answer) in [(&question.no, "no"), (&question.yes, "yes")] {
            if let Some(example) = examples.get(index) {
                turns.extend([
                    Turn::text(Role::User, example.clone()),
                    Turn::text(Role::Assistant, answer),
                ]);
            }
        }
    }
    turns
}

/// The text with `mark` before every line.
fn quoted(text: &str, mark: &str) -> String {
    if mark.is_empty() {
        return text.to_owned();
    }
    let lines: Vec<String> = text.lines().map(|line| format!("{mark}{line}")).collect();
    lines.join("\n")
}

/// The text of a turn, with its captions in place of its images.
fn with_captions(turn: &Turn, captions: &[&str]) -> String {
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
    fn empty_list_items_are_left_out() {
        for (text, left) in [
            ("Ways to bake bread 1. 2. 3.", "Ways to bake bread"),
            ("Ways to bake bread\n1.\n2.\n3.", "Ways to bake bread"),
            ("1. 2. 3. and to cut it", "3. and to cut it"),
            ("1. Flour\n2. Water\n3.", "1. Flour\n2. Water"),
            ("- milk\n-\n* * eggs", "- milk\n* eggs"),
            ("Room 3. Open at 9.30", "Room 3. Open at 9.30"),
            ("1.\n\n2)", ""),
        ] {
            assert_eq!(without_empty_items(text), left, "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn slices_overlap_and_cover_the_text(text in ".{0,60}", window in 1..20_usize) {
            let slices = slices(&text, window);
            proptest::prop_assert!(slices.iter().all(|slice| slice.chars().count() <= window));
            // Any part no longer than the overlap is whole in one of the slices.
            let chars: Vec<char> = text.chars().collect();
            for part in chars.windows((window / 5).max(1)) {
                let part: String = part.iter().collect();
                proptest::prop_assert!(slices.iter().any(|slice| slice.contains(&part)), "{part:?}");
            }
        }
    }
}
