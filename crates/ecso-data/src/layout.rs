//! Layouts of samples: how each trainer expects turns, images and answers.

use std::{borrow::Cow, sync::LazyLock};

use ecso::{Role, final_answer};
use regex_lite::Regex;
use serde_json::{Value, json};

use crate::{
    generate::{RowOutcome, Sample},
    record::{RowRecord, RunHeader},
    row::Row,
};

/// The placeholder of an image in a text.
const PLACEHOLDER: &str = "<image>";

/// What LLaVA, LLaMA-Factory, ms-swift and the models' own processors take for an image, a video or
/// a sound anywhere in a text.
static PLACEHOLDERS: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"<(\|?(?:image|img|video|audio)(?:_pad)?\|?>|/image>)").ok());

/// Escapes placeholders that a text happens to contain, with a space.
fn escape(text: &str) -> Cow<'_, str> {
    let placeholders = PLACEHOLDERS.as_ref();
    placeholders.map_or(Cow::Borrowed(text), |regex| regex.replace_all(text, "< $1"))
}

/// A turn; its images precede its text.
#[derive(Debug, Clone, PartialEq)]
struct Turn {
    role: Role,
    images: usize,
    text: String,
}

impl Turn {
    fn new(role: Role, images: usize, text: &str) -> Self {
        Self { role, images, text: escape(text).into_owned() }
    }

    /// An answer without the model's thoughts.
    fn answer(text: &str) -> Self {
        Self::new(Role::Assistant, 0, final_answer(text).unwrap_or_default())
    }

    /// The text after a placeholder and `separator` for each image.
    fn text_with_images(&self, separator: &str) -> String {
        format!("{}{}", format!("{PLACEHOLDER}{separator}").repeat(self.images), self.text)
    }

    /// For `datasets` and TRL. The part of an image has no text; images have a column of their own.
    fn to_parts(&self) -> Value {
        let mut parts = vec![json!({"type": "image", "text": null}); self.images];
        if parts.is_empty() || !self.text.is_empty() {
            parts.push(json!({"type": "text", "text": self.text}));
        }
        json!({"role": self.role.as_str(), "content": parts})
    }

    /// For LLaMA-Factory and ms-swift.
    fn to_message(&self) -> Value {
        json!({"role": self.role.as_str(), "content": self.text_with_images("")})
    }

    /// For LLaVA, with each placeholder on its own line.
    fn to_llava(&self) -> Value {
        let from = if self.role == Role::Assistant { "gpt" } else { "human" };
        json!({"from": from, "value": self.text_with_images("\n")})
    }
}

/// Merges consecutive turns of the same role.
fn merge(turns: impl Iterator<Item = Turn>) -> Vec<Turn> {
    let mut merged: Vec<Turn> = Vec::new();
    for turn in turns {
        match merged.last_mut().filter(|last| last.role == turn.role) {
            Some(last) => {
                let is_blank = last.text.is_empty() || turn.text.is_empty();
                let separator = if is_blank { "" } else { "\n" };
                last.text = format!("{}{separator}{}", last.text, turn.text);
                last.images += turn.images;
            }
            None => merged.push(turn),
        }
    }
    merged
}

/// Turns a system message into a user's turn.
fn system_to_user(turn: Turn) -> Turn {
    Turn { role: if turn.role == Role::System { Role::User } else { turn.role }, ..turn }
}

/// A sample, from which all layouts are built.
pub(crate) struct Example<'a> {
    /// `safety` or `utility`.
    pub(crate) kind: &'static str,
    category: &'a str,
    source: &'a str,
    /// The conversation up to and including the query.
    prompt: Vec<Turn>,
    /// The answer to learn.
    chosen: Turn,
    /// The answer to unlearn, of a safety sample.
    rejected: Option<Turn>,
    images: Vec<&'a str>,
    provenance: Value,
}

impl<'a> Example<'a> {
    /// The sample that a row became, with the names of its images; none if it did not become one.
    pub(crate) fn new(
        row: &Row,
        record: &'a RowRecord,
        images: Vec<&'a str>,
        run: &RunHeader,
    ) -> Option<Self> {
        let (kind, sample): (_, &Sample) = match record.outcome.as_ref()? {
            RowOutcome::Kept(sample) => ("safety", sample),
            RowOutcome::Safe(sample) => ("utility", sample),
            RowOutcome::Dropped { .. } => return None,
        };
        let mut prompt: Vec<Turn> =
            row.earlier.iter().map(|turn| Turn::new(turn.role, turn.images, &turn.text)).collect();
        prompt.push(Turn::new(Role::User, row.query_images(), &row.query));
        Some(Self {
            kind,
            category: &record.category,
            source: &record.source,
            prompt,
            chosen: Turn::answer(&sample.answer),
            rejected: (kind == "safety").then(|| Turn::answer(&sample.draft)),
            images,
            provenance: json!({
                "row": row.number + 1,
                "source": record.source,
                "model": run.model,
                "model_digest": run.model_digest,
                "profile": run.profile.0,
                "profile_hash": run.profile_hash(),
                "templates": sample.templates,
                "score": sample.score,
                "second_score": sample.second,
                "made_at": record.at,
            }),
        })
    }

    /// For `datasets` and TRL's SFT trainer, without the column of images.
    pub(crate) fn sft(&self) -> Value {
        let messages: Value =
            self.prompt.iter().chain([&self.chosen]).map(Turn::to_parts).collect();
        self.with_metadata(json!({"messages": messages}), self.provenance.clone())
    }

    /// For `datasets` and TRL's DPO trainer, without the column of images.
    pub(crate) fn dpo(&self) -> Option<Value> {
        let rejected = self.rejected.as_ref()?;
        let prompt: Value = self.prompt.iter().map(Turn::to_parts).collect();
        let (chosen, rejected) = ([self.chosen.to_parts()], [rejected.to_parts()]);
        let columns = json!({"prompt": prompt, "chosen": chosen, "rejected": rejected});
        Some(self.with_metadata(columns, self.provenance.clone()))
    }

    /// For LLaMA-Factory and ms-swift.
    pub(crate) fn messages(&self) -> Value {
        let messages: Value =
            self.alternating_prompt().iter().chain([&self.chosen]).map(Turn::to_message).collect();
        self.with_metadata(
            json!({"messages": messages, "images": self.images}),
            self.provenance_json(),
        )
    }

    /// A preference pair: ms-swift reads `messages` and `rejected_response`, LLaMA-Factory
    /// `prompt`, `chosen` and `rejected`.
    pub(crate) fn pair(&self) -> Option<Value> {
        let rejected = self.rejected.as_ref()?;
        let turns = self.alternating_prompt();
        let prompt: Value = turns.iter().map(Turn::to_message).collect();
        let messages: Value = turns.iter().chain([&self.chosen]).map(Turn::to_message).collect();
        let columns = json!({
            "messages": messages,
            "rejected_response": rejected.text,
            "prompt": prompt,
            "chosen": self.chosen.to_message(),
            "rejected": rejected.to_message(),
            "images": self.images,
        });
        Some(self.with_metadata(columns, self.provenance_json()))
    }

    /// For LLaVA's own trainer, which has no system turns. Several images are a list, as in
    /// LLaVA-NeXT.
    pub(crate) fn llava(&self) -> Value {
        let turns = merge(self.prompt.iter().cloned().map(system_to_user));
        let conversations: Value = turns.iter().chain([&self.chosen]).map(Turn::to_llava).collect();
        let mut line = json!({
            "id": self.source,
            "conversations": conversations,
            "provenance": self.provenance,
        });
        match &self.images[..] {
            [] => {}
            [one] => line["image"] = (*one).into(),
            several => line["image"] = several.iter().copied().collect::<Value>(),
        }
        line
    }

    /// The prompt as text trainers expect it: at most one system turn, then user and assistant
    /// alternate, beginning with the user.
    fn alternating_prompt(&self) -> Vec<Turn> {
        let count = self.prompt.iter().take_while(|turn| turn.role == Role::System).count();
        let (system, turns) = self.prompt.split_at(count);
        let assistant_first = turns.first().filter(|turn| turn.role == Role::Assistant);
        let empty_user = assistant_first.map(|_| Turn::new(Role::User, 0, ""));
        let turns = empty_user.into_iter().chain(turns.iter().cloned().map(system_to_user));
        merge(system.iter().cloned().chain(turns))
    }

    /// The provenance as a string of JSON. If the first rows of a file had no score, `datasets`
    /// would infer that no row has one.
    fn provenance_json(&self) -> Value {
        self.provenance.to_string().into()
    }

    fn with_metadata(&self, mut columns: Value, provenance: Value) -> Value {
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
    fn placeholders_in_texts_are_escaped() {
        for (text, escaped) in [
            ("the <image> tag", "the < image> tag"),
            ("<video><audio>", "< video>< audio>"),
            ("<|image_pad|> <|video|>", "< |image_pad|> < |video|>"),
            ("<img>a.png</img>, </image>", "< img>a.png</img>, < /image>"),
            (
                "<img src=\"a.png\"> 图 <imagine> &lt;image&gt;",
                "<img src=\"a.png\"> 图 <imagine> &lt;image&gt;",
            ),
        ] {
            assert_eq!(escape(text), escaped);
            assert_eq!(escape(escaped), escaped);
        }
    }

    #[test]
    fn answers_are_packed_without_thoughts() {
        assert_eq!(Turn::answer("<think>Is it an <image>?</think>\nMix it.").text, "Mix it.");
    }

    #[test]
    fn each_layout_has_the_turns_that_its_trainer_expects() {
        let turn = |role, images, text| Turn { role, images, text: String::from(text) };
        let example = Example {
            kind: "safety",
            category: "",
            source: "row",
            prompt: vec![
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
        let message = |role: &str, text: &str| json!({"role": role, "content": text});
        let prompt = [
            message("system", "Be kind."),
            message("user", ""),
            message("assistant", "Hello!"),
            message("user", "<image><image>A list.\nBe short.\nAnd this?"),
        ];
        let chosen = message("assistant", "Bread.");
        let messages = example.messages();
        assert_eq!(
            messages["messages"],
            Value::Array([&prompt[..], std::slice::from_ref(&chosen)].concat())
        );
        assert_eq!(messages["images"], json!(["images/a.png", "images/b.png"]));
        let pair = example.pair().unwrap();
        assert_eq!((&pair["prompt"], &pair["chosen"]), (&json!(prompt), &chosen));
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
        // Parquet has the turns as they were.
        let roles = |turns: &Value| {
            turns.as_array().unwrap().iter().map(|turn| turn["role"].clone()).collect::<Value>()
        };
        let unchanged = json!(["system", "assistant", "user", "system", "user", "assistant"]);
        assert_eq!(roles(&example.sft()["messages"]), unchanged);
    }
}
