//! Layouts of samples: how each trainer wants turns, images and answers written down.

use std::{borrow::Cow, sync::LazyLock};

use ecso::{Role, final_answer};
use regex_lite::Regex;
use serde_json::{Value, json};

use crate::{
    make::{Made, Sample},
    record::{RowRecord, RunHeader},
    row::Row,
};

/// What stands for an image in a text.
const MARK: &str = "<image>";

/// What LLaVA, LLaMA-Factory, ms-swift and the models' own processors take for an image, a video or
/// a sound, wherever it stands.
static MARKS: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"<(\|?(?:image|img|video|audio)(?:_pad)?\|?>|/image>)").ok());

/// A text in which nothing stands for an image: where it spells a mark, a space breaks it.
fn unmarked(text: &str) -> Cow<'_, str> {
    MARKS.as_ref().map_or(Cow::Borrowed(text), |marks| marks.replace_all(text, "< $1"))
}

/// A turn; its images stand before its text.
#[derive(Debug, Clone, PartialEq)]
struct Turn {
    role: Role,
    images: usize,
    text: String,
}

impl Turn {
    fn new(role: Role, images: usize, text: &str) -> Self {
        Self { role, images, text: unmarked(text).into_owned() }
    }

    /// An answer, without the thoughts before it.
    fn answer(text: &str) -> Self {
        Self::new(Role::Assistant, 0, final_answer(text).unwrap_or_default())
    }

    /// With a mark for each image, and `between` behind it.
    fn marked(&self, between: &str) -> String {
        format!("{}{}", format!("{MARK}{between}").repeat(self.images), self.text)
    }

    /// As `datasets` and TRL have it: a part of an image has no text, as the images stand in a
    /// column of their own.
    fn in_parts(&self) -> Value {
        let mut parts = vec![json!({"type": "image", "text": null}); self.images];
        if parts.is_empty() || !self.text.is_empty() {
            parts.push(json!({"type": "text", "text": self.text}));
        }
        json!({"role": self.role.as_str(), "content": parts})
    }

    /// As LLaMA-Factory and ms-swift have it.
    fn in_text(&self) -> Value {
        json!({"role": self.role.as_str(), "content": self.marked("")})
    }

    /// As LLaVA has it, with the mark on a line of its own.
    fn in_llava(&self) -> Value {
        json!({"from": if self.role == Role::Assistant { "gpt" } else { "human" }, "value": self.marked("\n")})
    }
}

/// Turns of which no two in a row are of one role: these are one.
fn joined(turns: impl Iterator<Item = Turn>) -> Vec<Turn> {
    let mut joined: Vec<Turn> = Vec::new();
    for turn in turns {
        match joined.last_mut().filter(|last| last.role == turn.role) {
            Some(last) => {
                let between = if last.text.is_empty() || turn.text.is_empty() { "" } else { "\n" };
                last.text = format!("{}{between}{}", last.text, turn.text);
                last.images += turn.images;
            }
            None => joined.push(turn),
        }
    }
    joined
}

/// A turn in which the user says what the system said.
fn by_the_user(turn: Turn) -> Turn {
    Turn { role: if turn.role == Role::System { Role::User } else { turn.role }, ..turn }
}

/// What all layouts of one sample are made of.
pub(crate) struct Example<'a> {
    /// `safety` or `utility`.
    pub(crate) kind: &'static str,
    category: &'a str,
    source: &'a str,
    /// The conversation up to the query.
    asked: Vec<Turn>,
    /// The answer to learn.
    chosen: Turn,
    /// The answer to unlearn, where there is one.
    rejected: Option<Turn>,
    images: Vec<&'a str>,
    provenance: Value,
}

impl<'a> Example<'a> {
    /// The sample that was made of a row, with the names of its images; none where no sample was
    /// made.
    pub(crate) fn new(
        row: &Row,
        record: &'a RowRecord,
        images: Vec<&'a str>,
        run: &RunHeader,
    ) -> Option<Self> {
        let (kind, sample): (_, &Sample) = match record.made.as_ref()? {
            Made::Kept(sample) => ("safety", sample),
            Made::Safe(sample) => ("utility", sample),
            Made::Dropped { .. } => return None,
        };
        let mut asked: Vec<Turn> =
            row.before.iter().map(|said| Turn::new(said.role, said.images, &said.text)).collect();
        asked.push(Turn::new(Role::User, row.query_images(), &row.query));
        Some(Self {
            kind,
            category: &record.category,
            source: &record.source,
            asked,
            chosen: Turn::answer(&sample.answer),
            rejected: (kind == "safety").then(|| Turn::answer(&sample.draft)),
            images,
            provenance: json!({
                "row": row.number + 1, "source": record.source, "model": run.model, "model_digest": run.model_digest,
                "profile": run.profile.0, "profile_hash": run.profile_hash(), "templates": sample.templates,
                "score": sample.score, "second_score": sample.second, "made_at": record.at,
            }),
        })
    }

    /// For `datasets` and TRL's SFT trainer; the images stand beside it.
    pub(crate) fn sft(&self) -> Value {
        let messages: Value = self.asked.iter().chain([&self.chosen]).map(Turn::in_parts).collect();
        self.described(json!({"messages": messages}), self.provenance.clone())
    }

    /// For `datasets` and TRL's DPO trainer; the images stand beside it.
    pub(crate) fn dpo(&self) -> Option<Value> {
        let rejected = self.rejected.as_ref()?;
        let prompt: Value = self.asked.iter().map(Turn::in_parts).collect();
        let (chosen, rejected) = ([self.chosen.in_parts()], [rejected.in_parts()]);
        let columns = json!({"prompt": prompt, "chosen": chosen, "rejected": rejected});
        Some(self.described(columns, self.provenance.clone()))
    }

    /// For LLaMA-Factory and ms-swift.
    pub(crate) fn messages(&self) -> Value {
        let messages: Value =
            self.in_alternation().iter().chain([&self.chosen]).map(Turn::in_text).collect();
        self.described(
            json!({"messages": messages, "images": self.images}),
            self.provenance_in_text(),
        )
    }

    /// The same for preferences: ms-swift reads `messages` and `rejected_response`, LLaMA-Factory
    /// `prompt`, `chosen` and `rejected`.
    pub(crate) fn pair(&self) -> Option<Value> {
        let rejected = self.rejected.as_ref()?;
        let asked = self.in_alternation();
        let prompt: Value = asked.iter().map(Turn::in_text).collect();
        let messages: Value = asked.iter().chain([&self.chosen]).map(Turn::in_text).collect();
        let columns = json!({
            "messages": messages, "rejected_response": rejected.text, "prompt": prompt, "chosen": self.chosen.in_text(),
            "rejected": rejected.in_text(), "images": self.images,
        });
        Some(self.described(columns, self.provenance_in_text()))
    }

    /// For LLaVA's own trainer, which knows no turn of the system; several images are a list, as
    /// LLaVA-NeXT has them.
    pub(crate) fn llava(&self) -> Value {
        let turns = joined(self.asked.iter().cloned().map(by_the_user));
        let conversations: Value = turns.iter().chain([&self.chosen]).map(Turn::in_llava).collect();
        let mut line = json!({"id": self.source, "conversations": conversations, "provenance": self.provenance});
        match &self.images[..] {
            [] => {}
            [one] => line["image"] = (*one).into(),
            several => line["image"] = several.iter().copied().collect::<Value>(),
        }
        line
    }

    /// What is asked as trainers of text want it: one turn of the system at most, then the user and
    /// the model by turns.
    fn in_alternation(&self) -> Vec<Turn> {
        let begins = self.asked.iter().take_while(|turn| turn.role == Role::System).count();
        let (system, talk) = self.asked.split_at(begins);
        let first = talk.first().filter(|turn| turn.role == Role::Assistant);
        let nothing = first.map(|_| Turn::new(Role::User, 0, ""));
        let talk = nothing.into_iter().chain(talk.iter().cloned().map(by_the_user));
        joined(system.iter().cloned().chain(talk))
    }

    /// JSON in a text: `datasets` would take a score that rows at the beginning of a file don't
    /// have for one that none has.
    fn provenance_in_text(&self) -> Value {
        self.provenance.to_string().into()
    }

    fn described(&self, mut columns: Value, provenance: Value) -> Value {
        columns["kind"] = self.kind.into();
        columns["category"] = self.category.into();
        columns["provenance"] = provenance;
        columns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_text_spells_stands_for_an_image() {
        for (text, written) in [
            ("the <image> tag", "the < image> tag"),
            ("<video><audio>", "< video>< audio>"),
            ("<|image_pad|> <|video|>", "< |image_pad|> < |video|>"),
            ("<img>a.png</img>, </image>", "< img>a.png</img>, < /image>"),
            (
                "<img src=\"a.png\"> 图 <imagine> &lt;image&gt;",
                "<img src=\"a.png\"> 图 <imagine> &lt;image&gt;",
            ),
        ] {
            assert_eq!(unmarked(text), written);
            assert_eq!(unmarked(written), written);
        }
    }

    #[test]
    fn an_answer_is_packed_without_its_thoughts() {
        assert_eq!(Turn::answer("<think>Is it an <image>?</think>\nMix it.").text, "Mix it.");
    }

    #[test]
    fn each_layout_has_the_turns_that_its_trainer_wants() {
        let turn = |role, images, text| Turn { role, images, text: String::from(text) };
        let example = Example {
            kind: "safety",
            category: "",
            source: "row",
            asked: vec![
                turn(Role::System, 0, "Be kind."),
                turn(Role::Assistant, 0, "Hello!"),
                turn(Role::User, 1, "A list."),
                turn(Role::System, 0, "Be short."),
                turn(Role::User, 1, "And this?"),
            ],
            chosen: turn(Role::Assistant, 0, "Bread."),
            rejected: Some(turn(Role::Assistant, 0, "No bread.")),
            images: vec!["images/a.png", "images/b.png"],
            provenance: json!({"row": 0}),
        };
        let said = |role: &str, text: &str| json!({"role": role, "content": text});
        let asked = [
            said("system", "Be kind."),
            said("user", ""),
            said("assistant", "Hello!"),
            said("user", "<image><image>A list.\nBe short.\nAnd this?"),
        ];
        let chosen = said("assistant", "Bread.");
        let messages = example.messages();
        assert_eq!(
            messages["messages"],
            Value::Array([&asked[..], std::slice::from_ref(&chosen)].concat())
        );
        assert_eq!(messages["images"], json!(["images/a.png", "images/b.png"]));
        let pair = example.pair().unwrap();
        assert_eq!((&pair["prompt"], &pair["chosen"]), (&json!(asked), &chosen));
        assert_eq!(
            (&pair["rejected"]["role"], &pair["rejected_response"]),
            (&json!("assistant"), &json!("No bread."))
        );
        let llava = example.llava();
        let turns = [
            ("human", "Be kind."),
            ("gpt", "Hello!"),
            ("human", "<image>\n<image>\nA list.\nBe short.\nAnd this?"),
        ];
        let turns = turns
            .into_iter()
            .chain([("gpt", "Bread.")])
            .map(|(from, value)| json!({"from": from, "value": value}));
        assert_eq!(llava["conversations"], turns.collect::<Value>());
        // Parquet has what was said as it was.
        let roles = |turns: &Value| {
            turns.as_array().unwrap().iter().map(|turn| turn["role"].clone()).collect::<Value>()
        };
        let as_it_was = json!(["system", "assistant", "user", "system", "user", "assistant"]);
        assert_eq!(roles(&example.sft()["messages"]), as_it_was);
    }
}
