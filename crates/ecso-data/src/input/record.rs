//! From a record of the input to a [`Row`]: which column is what.

use std::{collections::BTreeMap, path::PathBuf};

use ecso::{Role, decode_base64, decode_data_url, is_data_url};
use serde_json::Value;

use crate::row::{Picture, Row};

/// Which columns are what: a column's name by what it is (`id`, `query`, `image`, `category`, `draft`, `messages`,
/// `conversations`). What is not said is found by the names that people use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mapping(BTreeMap<String, String>);

/// Names that are tried, by what a column is.
const USUAL: [(&str, &[&str]); 7] = [
    ("id", &["id", "request_id", "question_id", "index"]),
    ("query", &["query", "question", "prompt", "instruction", "text"]),
    ("image", &["image", "images", "image_path", "file_name", "image_url"]),
    ("category", &["category", "scenario", "topic", "type"]),
    ("draft", &["draft"]),
    ("messages", &["messages"]),
    ("conversations", &["conversations"]),
];

impl Mapping {
    /// From pairs of what a column is and its name.
    ///
    /// # Errors
    /// When somebody names what no column can be.
    pub fn new(pairs: impl IntoIterator<Item = (String, String)>) -> Result<Self, String> {
        let mapping: BTreeMap<String, String> = pairs.into_iter().collect();
        match mapping.keys().find(|what| !USUAL.iter().any(|(known, _)| known == what)) {
            None => Ok(Self(mapping)),
            Some(unknown) => {
                let known: Vec<&str> = USUAL.iter().map(|(what, _)| *what).collect();
                Err(format!("no column can be `{unknown}`; there are {}", known.join(", ")))
            }
        }
    }

    /// The column that is `what`, of those that are there.
    pub(super) fn column<'a>(&'a self, what: &str, is_there: impl Fn(&str) -> bool) -> Option<&'a str> {
        if let Some(named) = self.0.get(what) {
            return is_there(named).then_some(named);
        }
        let (_, usual) = USUAL.iter().find(|(known, _)| *known == what)?;
        usual.iter().copied().find(|name| is_there(name))
    }
}

/// Bytes that an image in a cell may have here; how many an image may have at all is checked where it is read.
const LONGEST: usize = 1 << 30;

/// Makes rows of records.
#[derive(Debug, Clone)]
pub(super) struct Reader {
    pub(super) mapping: Mapping,
    pub(super) query: Option<String>,
    pub(super) root: PathBuf,
}

impl Reader {
    pub(super) fn row(&self, number: u64, record: Value) -> Result<Row, String> {
        let Value::Object(mut fields) = record else { return Err("not a record with named fields".into()) };
        let mut take = |what: &str| {
            let name = self.mapping.column(what, |name| fields.get(name).is_some_and(|value| !value.is_null()))?;
            fields.remove(name)
        };
        let mut row = Row {
            number,
            id: take("id").map_or_else(|| number.to_string(), plain),
            before: Vec::new(),
            query: String::new(),
            images: Vec::new(),
            category: take("category").map_or_else(String::new, plain),
            draft: take("draft").map(plain),
        };
        if let Some(image) = take("image") {
            self.pictures(image, &mut row.images)?;
        }
        if let Some(messages) = take("messages") {
            self.chat(messages, &mut row)?;
        } else if let Some(conversations) = take("conversations") {
            row.query = llava(&conversations)?;
        } else if let Some(query) = take("query") {
            row.query = plain(query);
        }
        if row.query.trim().is_empty() {
            row.query =
                self.query.clone().ok_or("no query: name its column with --map query=COLUMN, or give --query")?;
        }
        Ok(row)
    }

    /// A path, a URL, a data URL, base64, `{bytes, path}`, or a list of these.
    fn pictures(&self, image: Value, images: &mut Vec<Picture>) -> Result<(), String> {
        match image {
            Value::Array(several) => several.into_iter().try_for_each(|image| self.pictures(image, images)),
            Value::String(text) => {
                images.push(self.picture(&text)?);
                Ok(())
            }
            Value::Object(fields) => {
                let said = ["bytes", "url", "path"].iter().find_map(|name| fields.get(*name)?.as_str());
                let said = said.ok_or("an image has neither bytes, url nor path")?;
                images.push(if fields.get("bytes").is_some_and(Value::is_string) {
                    base64(said)?
                } else {
                    self.picture(said)?
                });
                Ok(())
            }
            _ => Err("an image must be a path, a URL, a data URL or {bytes, path}".into()),
        }
    }

    fn picture(&self, text: &str) -> Result<Picture, String> {
        let start: String = text.chars().take(8).collect::<String>().to_ascii_lowercase();
        if start.starts_with("http://") || start.starts_with("https://") {
            return Ok(Picture::Url(text.to_owned()));
        }
        if is_data_url(text) {
            let bytes = decode_data_url(text, LONGEST).map_err(|error| error.to_string())?;
            return Ok(Picture::Bytes(bytes.into()));
        }
        Ok(Picture::File(self.root.join(text)))
    }

    /// A conversation as in chat completions: the last user turn is the query, what stands before it is kept as text.
    fn chat(&self, messages: Value, row: &mut Row) -> Result<(), String> {
        let Value::Array(mut messages) = messages else { return Err("`messages` must be a list".into()) };
        let last = messages.iter().rposition(|message| message["role"] == "user").ok_or("no message of the user")?;
        messages.truncate(last + 1);
        for (place, message) in messages.into_iter().enumerate() {
            let mut texts = Vec::new();
            let parts = match &message["content"] {
                Value::Array(parts) => parts.clone(),
                Value::String(text) => vec![serde_json::json!({"type": "text", "text": text})],
                _ => Vec::new(),
            };
            for part in parts {
                match part["type"].as_str() {
                    Some("image_url" | "input_image") if place == last => {
                        let url = part["image_url"]["url"].as_str().or_else(|| part["image_url"].as_str());
                        row.images.push(self.picture(url.ok_or("an image part has no URL")?)?);
                    }
                    Some("image_url" | "input_image" | "image") if place < last => {
                        return Err("images in earlier turns can't be used".into());
                    }
                    // Its image stands in the image column.
                    Some("image") => {}
                    _ => texts.extend(part["text"].as_str().map(str::to_owned)),
                }
            }
            let text = texts.join("\n");
            match message["role"].as_str() {
                _ if place == last => row.query = text,
                Some("system" | "developer") => row.before.push((Role::System, text)),
                Some("assistant") => row.before.push((Role::Assistant, text)),
                _ => row.before.push((Role::User, text)),
            }
        }
        Ok(())
    }
}

/// A text as it is, a number as it is written.
fn plain(value: Value) -> String {
    match value {
        Value::String(text) => text,
        other => other.to_string(),
    }
}

fn base64(text: &str) -> Result<Picture, String> {
    let bytes = decode_base64(text, LONGEST).map_err(|error| error.to_string())?;
    Ok(Picture::Bytes(bytes.into()))
}

/// The first thing that the person says, without the mark of the image.
fn llava(conversations: &Value) -> Result<String, String> {
    let turns = conversations.as_array().ok_or("`conversations` must be a list")?;
    let first = turns.iter().find(|turn| turn["from"] == "human").ok_or("no turn of a human")?;
    let said = first["value"].as_str().ok_or("a turn has no value")?;
    Ok(said.replace("<image>", "").trim().to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn row(record: Value) -> Result<Row, String> {
        let reader = Reader { mapping: Mapping::default(), query: None, root: "root".into() };
        reader.row(7, record)
    }

    #[test]
    fn columns_are_found_by_their_usual_names() {
        let found = row(json!({"question": "What?", "image": "a.png", "topic": "t"})).unwrap();
        assert_eq!((found.id.as_str(), found.query.as_str(), found.category.as_str()), ("7", "What?", "t"));
        assert_eq!(found.images, [Picture::File("root/a.png".into())]);
        let found =
            row(json!({"id": 3, "conversations": [{"from": "human", "value": "<image>\nWhat?"}], "image": "a.png"}));
        assert_eq!(found.map(|row| (row.id, row.query)), Ok(("3".into(), "What?".into())));
        let mapping = Mapping::new([("query".into(), "q".into())]).unwrap();
        let reader = Reader { mapping, query: None, root: PathBuf::new() };
        assert_eq!(reader.row(0, json!({"q": "Q", "question": "other"})).unwrap().query, "Q");
        assert!(Mapping::new([("colour".into(), "q".into())]).is_err());
    }

    #[test]
    fn a_conversation_is_read_up_to_its_last_question() {
        let found = row(json!({"messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
            ]},
            {"role": "assistant", "content": "An answer that is not used."},
        ]}))
        .unwrap();
        assert_eq!(found.before.len(), 3);
        assert_eq!(found.query, "What is this?");
        assert_eq!(found.images, [Picture::Bytes(vec![0, 0, 0].into())]);
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (record, says) in [
            (json!([]), "named fields"),
            (json!({"image": "a.png"}), "no query"),
            (json!({"query": "q", "image": 3}), "an image must be"),
            (json!({"query": "q", "image": {"x": 1}}), "neither bytes"),
            (json!({"query": "q", "image": "data:image/png;base64,@"}), "base64 is broken"),
            (json!({"messages": [{"role": "assistant", "content": "a"}]}), "no message of the user"),
        ] {
            let error = row(record.clone()).unwrap_err();
            assert!(error.contains(says), "{record}: {error}");
        }
    }
}
