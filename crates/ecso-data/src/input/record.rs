//! From a record of the input to a [`Row`]: which column is what.

use std::collections::BTreeMap;

use ecso::{Cause, Role, decode_base64, decode_data_url, is_data_url};

use super::{
    at,
    cell::{Cell, Fields},
    marks::{self, Piece, Turn},
    paths::Paths,
    text::LONGEST,
    turns::{self, IMAGES},
};
use crate::row::{Picture, Row, cut};

/// Which columns are what: a column's name by what it is (`id`, `query`, `image`, `category`, `draft`, `messages`,
/// `conversations`). What is not said is found by the names that people use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mapping(BTreeMap<String, String>);

/// Names that are tried, by what a column is.
const USUAL: [(&str, &[&str]); 7] = [
    ("id", &["id", "request_id", "question_id", "index"]),
    ("query", &["query", "question", "prompt", "instruction", "text"]),
    (
        "image",
        &[
            "image",
            "images",
            "image_path",
            "image_paths",
            "file_name",
            "image_file",
            "image_url",
            "image_urls",
            "img",
            "jpg",
            "jpeg",
            "png",
            "webp",
        ],
    ),
    ("category", &["category", "scenario", "topic", "type"]),
    ("draft", &["draft"]),
    ("messages", &["messages"]),
    ("conversations", &["conversations", "conversation", "texts"]),
];

/// What else a row may have: more that was said (as LLaMA-Factory's and ms-swift's rows do), and what can't be shown.
const BESIDE: [&str; 7] = ["system", "history", "input", "video", "videos", "audio", "audios"];

/// Bytes of words that a row may have, images not counted. No model reads more.
const WORDS: usize = 4 << 20;

/// Characters of a URL.
const LONGEST_URL: usize = 16 << 10;

impl Mapping {
    /// From pairs of what a column is and its name.
    ///
    /// # Errors
    /// When somebody names what no column can be.
    pub fn new(pairs: impl IntoIterator<Item = (String, String)>) -> Result<Self, Cause> {
        let mapping: BTreeMap<String, String> = pairs.into_iter().collect();
        match mapping.keys().find(|what| !USUAL.iter().any(|(known, _)| known == what)) {
            None => Ok(Self(mapping)),
            Some(unknown) => {
                let known: Vec<&str> = USUAL.iter().map(|(what, _)| *what).collect();
                Err(format!("no column can be `{unknown}`; there are {}", known.join(", ")).into())
            }
        }
    }

    /// The column that is `what`, of those that `hold` something. Upper and lower case don't count where nobody named it.
    fn column(&self, what: &str, fields: &Fields, holds: impl Fn(&Cell) -> bool) -> Option<String> {
        let held = |name: &str| fields.get(name).is_some_and(&holds).then(|| name.to_owned());
        if let Some(named) = self.0.get(what) {
            return held(named);
        }
        let (_, usual) = USUAL.iter().find(|(known, _)| *known == what)?;
        let other = |name: &str| {
            let alike = fields.iter().find(|(other, cell)| other.eq_ignore_ascii_case(name) && holds(cell));
            alike.map(|(other, _)| other.clone())
        };
        usual.iter().find_map(|name| held(name)).or_else(|| usual.iter().find_map(|name| other(name)))
    }

    /// Whether a row is read from this column.
    pub(super) fn knows(&self, name: &str) -> bool {
        let small = name.to_ascii_lowercase();
        self.0.values().any(|named| named == name)
            || USUAL.iter().any(|(_, names)| names.contains(&small.as_str()))
            || BESIDE.contains(&name)
            || numbered_image(name).is_some()
    }

    /// Holds that every column that was named is among `columns`, but for what may be `left_out`. One that is there and empty fits.
    ///
    /// # Errors
    /// Says which columns there are.
    pub(super) fn fits<'a>(
        &self,
        columns: impl Iterator<Item = &'a str> + Clone,
        left_out: &[&str],
    ) -> Result<(), Cause> {
        let is_missing =
            |what: &str, named: &str| !left_out.contains(&what) && !columns.clone().any(|name| name == named);
        match self.0.iter().find(|(what, named)| is_missing(what, named)) {
            None => Ok(()),
            Some((what, named)) => Err(format!(
                "--map {what}={named}: there is no such column; there are {}",
                cut(&columns.collect::<Vec<_>>().join(", "))
            )
            .into()),
        }
    }

    /// Where the query may stand, in order: what was named, or all of the usual.
    fn queries(&self) -> impl Iterator<Item = &'static str> {
        let all = ["messages", "conversations", "query"];
        let is_named = all.iter().any(|what| self.0.contains_key(*what));
        all.into_iter().filter(move |what| !is_named || self.0.contains_key(*what))
    }
}

/// `image_2`, as benchmarks with several columns have it.
fn numbered_image(name: &str) -> Option<usize> {
    let rest = name.strip_prefix("image")?;
    let digits = rest.strip_prefix('_').unwrap_or(rest);
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
}

/// Makes rows of records.
#[derive(Debug, Clone, Default)]
pub(super) struct Reader {
    pub(super) mapping: Mapping,
    pub(super) query: Option<String>,
    pub(super) paths: Paths,
    /// The types of columns, where a format has such.
    pub(super) types: BTreeMap<String, String>,
}

impl Reader {
    pub(super) fn row(&self, number: u64, record: Cell) -> Result<Row, Cause> {
        let Cell::Fields(mut fields) = record else {
            return Err(format!("{}, and not a record with named fields", record.kind()).into());
        };
        // A row of JSON need not have what only names it.
        self.mapping.fits(fields.keys().map(String::as_str), &["id", "category"])?;
        if let Some(name) = ["video", "videos", "audio", "audios"].into_iter().find(|name| has(&fields, name)) {
            return Err(format!(
                "{} holds what can't be shown; of what is shown, only images are understood",
                self.column(name)
            )
            .into());
        }
        let mut row = Row {
            number,
            id: self.label("id", &mut fields)?.unwrap_or_else(|| number.to_string()),
            before: Vec::new(),
            query: String::new(),
            images: Vec::new(),
            category: self.label("category", &mut fields)?.unwrap_or_default(),
            draft: None,
        };
        let column = self.images(&mut fields)?;
        let (turns, answer) = self.said(&mut fields)?;
        if let Some((name, draft)) = self.take("draft", &mut fields) {
            let draft = match opened_talk(draft) {
                Cell::Text(text) => Ok(text),
                Cell::Number(number) => Ok(number.to_string()),
                other => turns::answers(&other),
            };
            row.draft = Some(draft.map_err(|cause| at(&self.column(&name), cause))?);
        } else if answer.is_some() {
            row.draft = answer;
        }
        let (mut said, images) = marks::place(turns, &column)?;
        row.query = said.pop().map(|last| last.text).unwrap_or_default();
        said.retain(|turn| !turn.text.is_empty() || turn.images > 0);
        (row.before, row.images) = (said, images);
        if row.query.is_empty() {
            let names: Vec<&str> = fields.keys().map(String::as_str).collect();
            let others =
                if names.is_empty() { String::new() } else { format!(" (other columns: {})", cut(&names.join(", "))) };
            let none = || format!("no query: name its column with --map query=COLUMN, or give --query{others}");
            let query = self.turn(Role::User, self.query.as_ref().ok_or_else(none)?)?;
            let first = row.images.len() - row.query_images();
            row.query = marks::alone(query, &mut row.images, first).map_err(|cause| at("--query", cause))?;
        }
        let words = row.before.iter().map(|said| said.text.len()).sum::<usize>() + row.query.len();
        let words = words + row.draft.as_ref().map_or(0, String::len);
        if words > WORDS {
            return Err(format!("the row has {words} bytes of text; at most {WORDS} are allowed").into());
        }
        if row.images.is_empty() {
            self.no_image_is_left(&fields)?;
        }
        Ok(row)
    }

    /// A column in an error, with its type.
    fn column(&self, name: &str) -> String {
        let name_shown = cut(name);
        match self.types.get(name) {
            Some(kind) => format!("column `{name_shown}` (of type {})", cut(kind)),
            None => format!("column `{name_shown}`"),
        }
    }

    fn take(&self, what: &str, fields: &mut Fields) -> Option<(String, Cell)> {
        let name = self.mapping.column(what, fields, |cell| *cell != Cell::Null)?;
        fields.remove_entry(&name)
    }

    /// A name: of any type that is shown as a text.
    fn label(&self, what: &str, fields: &mut Fields) -> Result<Option<String>, Cause> {
        let Some((name, cell)) = self.take(what, fields) else { return Ok(None) };
        let label = match cell {
            Cell::Text(text) | Cell::Other(text) => text,
            Cell::Number(number) => number.to_string(),
            Cell::Bool(value) => value.to_string(),
            // Parts of what is asked may be called `type` or `topic` as well.
            _ if what == "category" && !self.mapping.0.contains_key(what) => return Ok(None),
            other => return Err(format!("{} is {}, where a name should be", self.column(&name), other.kind()).into()),
        };
        Ok(Some(cut(&label).into_owned()))
    }

    /// What was said up to the query, which is the last turn; and what the model said to it, if the mapping calls that the draft.
    fn said(&self, fields: &mut Fields) -> Result<(Vec<Turn>, Option<String>), Cause> {
        let picture = |cell: &Cell| self.one(cell);
        let wants_draft = self.mapping.0.get("draft").cloned();
        let found = self.mapping.queries().find_map(|what| {
            let (name, cell) = self.take(what, fields)?;
            Some((what, name, if what == "query" { opened_talk(cell) } else { cell.opened() }))
        });
        let mut answer = None;
        let mut turns = match found {
            Some((what, name, cell)) if what != "query" || turns::is_talk(&cell) => {
                let talk = turns::talk(&cell, &picture).map_err(|cause| at(&self.column(&name), cause))?;
                answer = talk.answer.filter(|_| wants_draft.as_ref() == Some(&name));
                talk.turns
            }
            Some((_, name, cell)) => {
                let mut text = self.words(&name, cell)?;
                // Alpaca's layout has what the instruction is about in a column of its own.
                if name == "instruction"
                    && let Some(input) = fields.remove("input").filter(|input| !input.is_empty())
                {
                    text = format!("{text}\n{}", self.words("input", input)?);
                }
                vec![self.turn(Role::User, &text)?]
            }
            None => vec![Turn { role: Role::User, pieces: Vec::new() }],
        };
        if let Some(history) = fields.remove("history").map(Cell::opened).filter(|history| !history.is_empty()) {
            let Cell::List(mut pairs) = history else {
                return Err(format!("{} is no list of turns", self.column("history")).into());
            };
            // A question at the end, for `talk` to read up to.
            pairs.push(Cell::List(vec![Cell::Null, Cell::Null]));
            let mut earlier =
                turns::talk(&Cell::List(pairs), &picture).map_err(|cause| at(&self.column("history"), cause))?.turns;
            earlier.pop();
            turns.splice(0..0, earlier);
        }
        if let Some(system) = fields.get("system").filter(|system| !system.is_empty()).cloned() {
            let system = Turn { role: Role::System, pieces: vec![Piece::Text(self.words("system", system)?)] };
            turns.insert(0, system);
        }
        Ok((turns, answer))
    }

    fn turn(&self, role: Role, text: &str) -> Result<Turn, Cause> {
        let mut pieces = Vec::new();
        marks::pieces(text, &|path| self.picture(path), &mut pieces)?;
        Ok(Turn { role, pieces })
    }

    /// The text of a cell.
    fn words(&self, name: &str, cell: Cell) -> Result<String, Cause> {
        match cell {
            Cell::Null => Ok(String::new()),
            Cell::Text(text) => Ok(text),
            Cell::Number(number) => Ok(number.to_string()),
            // Older writers of Parquet don't say that a text is one.
            Cell::Bytes(bytes) if std::str::from_utf8(&bytes).is_ok() => {
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            other => Err(format!("{} is {}, where text should be", self.column(name), other.kind()).into()),
        }
    }

    /// The images of a row that stand in a column of their own, or in several: `image_1`, `image_2`, …
    fn images(&self, fields: &mut Fields) -> Result<Vec<Picture>, Cause> {
        let mut names: Vec<String> = match self.mapping.column("image", fields, |cell| !cell.is_empty()) {
            Some(name) => vec![name],
            None if self.mapping.0.contains_key("image") => Vec::new(),
            None => fields.keys().filter(|name| numbered_image(name).is_some()).cloned().collect(),
        };
        names.sort_by_key(|name| numbered_image(name));
        let mut images = Vec::new();
        for name in names {
            let Some(cell) = fields.remove(&name) else { continue };
            self.several(cell, &mut images).map_err(|cause| at(&self.column(&name), cause))?;
        }
        Ok(images)
    }

    /// An image, or a list of images.
    fn several(&self, cell: Cell, images: &mut Vec<Picture>) -> Result<(), Cause> {
        match cell.opened() {
            empty if empty.is_empty() => {}
            Cell::List(several) if !is_bytes(&several) => {
                for one in several {
                    self.several(one, images)?;
                }
            }
            one => images.push(self.one(&one)?),
        }
        Ok(())
    }

    /// An image: bytes, `{bytes, path}`, or a text that is a path, a URL, a data URL or base64.
    fn one(&self, cell: &Cell) -> Result<Picture, Cause> {
        match cell {
            Cell::Bytes(bytes) => Ok(Picture::Bytes(bytes.clone())),
            Cell::Text(text) => self.picture(text),
            Cell::List(list) if is_bytes(list) => {
                Ok(Picture::Bytes(list.iter().filter_map(byte).collect::<Vec<u8>>().into()))
            }
            Cell::Fields(fields) => {
                let held = ["bytes"].into_iter().chain(IMAGES).find_map(|name| cell.get(name).map(|held| (name, held)));
                match held {
                    Some(("bytes" | "base64" | "data", Cell::Text(text))) if !is_data_url(text) => base64(text),
                    Some((_, held)) => self.one(held),
                    None => {
                        let names: Vec<&str> = fields.keys().map(String::as_str).collect();
                        Err(format!("an image has neither bytes, url nor path, but {}", cut(&names.join(", "))).into())
                    }
                }
            }
            other => Err(format!(
                "an image must be a path, a URL, a data URL, base64, bytes or {{bytes, path}}, and this is {}",
                other.kind()
            )
            .into()),
        }
    }

    fn picture(&self, text: &str) -> Result<Picture, Cause> {
        let trimmed = text.trim();
        if trimmed.is_empty() {
            return Err("an image is an empty text".into());
        }
        let starts = |scheme: &str| trimmed.get(..scheme.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(scheme));
        if starts("http://") || starts("https://") {
            if trimmed.len() > LONGEST_URL {
                return Err(format!("a URL is too long: {}", cut(trimmed)).into());
            }
            return Ok(Picture::Url(trimmed.to_owned()));
        }
        if is_data_url(trimmed) {
            let bytes = decode_data_url(trimmed, LONGEST).map_err(Cause::of)?;
            return Ok(Picture::Bytes(bytes.into()));
        }
        if is_base64(trimmed) {
            return base64(trimmed);
        }
        self.paths.find(trimmed).map(Picture::File)
    }

    /// A row without images whose record has one in a column that nobody named would be read as mere text.
    fn no_image_is_left(&self, fields: &Fields) -> Result<(), Cause> {
        match fields.iter().find(|(_, cell)| holds_image(cell)) {
            Some((name, _)) => Err(format!(
                "{} holds an image, but nothing says that it is one: --map image={}",
                self.column(name),
                cut(name)
            )
            .into()),
            None => Ok(()),
        }
    }
}

/// The conversation in a text that is JSON of one; any other text is as it is.
fn opened_talk(cell: Cell) -> Cell {
    match cell {
        Cell::Text(text) => {
            let opened = Cell::Text(text.clone()).opened();
            if turns::is_talk(&opened) { opened } else { Cell::Text(text) }
        }
        other => other,
    }
}

fn has(fields: &Fields, name: &str) -> bool {
    fields.get(name).is_some_and(|cell| !cell.is_empty())
}

fn holds_image(cell: &Cell) -> bool {
    match cell {
        Cell::Bytes(bytes) => BEGINNINGS.iter().any(|(begin, _)| bytes.starts_with(begin)),
        Cell::Text(text) => text.get(..11).is_some_and(|begin| begin.eq_ignore_ascii_case("data:image/")),
        Cell::List(list) if is_bytes(list) => {
            let begin: Vec<u8> = list.iter().take(8).filter_map(byte).collect();
            BEGINNINGS.iter().any(|(begins, _)| begin.starts_with(begins))
        }
        Cell::List(list) => list.iter().any(holds_image),
        Cell::Fields(_) => match cell.get("bytes") {
            Some(Cell::Text(text)) => BEGINNINGS.iter().any(|(_, begin)| text.starts_with(begin)),
            held => held.is_some_and(holds_image),
        },
        _ => false,
    }
}

/// How images begin, and how they do in base64.
const BEGINNINGS: [(&[u8], &str); 4] =
    [(b"\x89PNG", "iVBORw0KGgo"), (b"\xff\xd8\xff", "/9j/"), (b"GIF8", "R0lGOD"), (b"RIFF", "UklGR")];

/// Whether a text is base64 and no path: it is long and has nothing else, or begins as an image does.
fn is_base64(text: &str) -> bool {
    const SHORT: usize = 40;
    const LONG: usize = 300;
    let begins = BEGINNINGS.iter().any(|(_, begin)| text.starts_with(begin));
    let is_it =
        |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'=' | b'-' | b'_' | b'\r' | b'\n');
    (text.len() >= LONG || (begins && text.len() >= SHORT)) && text.bytes().all(is_it)
}

/// Bytes as a list of numbers: how JSON shows them.
fn is_bytes(list: &[Cell]) -> bool {
    !list.is_empty() && list.iter().all(|cell| byte(cell).is_some())
}

fn byte(cell: &Cell) -> Option<u8> {
    let Cell::Number(number) = cell else { return None };
    number.as_u64().and_then(|number| u8::try_from(number).ok())
}

fn base64(text: &str) -> Result<Picture, Cause> {
    let bytes = decode_base64(text, LONGEST).map_err(Cause::of)?;
    Ok(Picture::Bytes(bytes.into()))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn row(record: Value) -> Result<Row, Cause> {
        let paths = Paths::new(vec!["root".into()]);
        let record = serde_json::from_value(record).unwrap();
        Reader { paths, ..Reader::default() }.row(7, record)
    }

    #[test]
    fn columns_are_found_by_their_usual_names() {
        let found = row(json!({"Question": "What?", "image": "a.png", "topic": "t"})).unwrap();
        assert_eq!((found.id.as_str(), found.query.as_str(), found.category.as_str()), ("7", "What?", "t"));
        assert_eq!(found.images, [Picture::File("root/a.png".into())]);
        let found =
            row(json!({"id": 3, "conversations": [{"from": "human", "value": "<image>\nWhat?"}], "image": "a.png"}));
        assert_eq!(found.map(|row| (row.id, row.query)), Ok(("3".into(), "What?".into())));
        let mapping = Mapping::new([("query".into(), "q".into())]).unwrap();
        let reader = Reader { mapping, ..Reader::default() };
        let record = serde_json::from_value(json!({"q": "Q", "question": "other"})).unwrap();
        assert_eq!(reader.row(0, record).unwrap().query, "Q");
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
    fn what_tools_said_and_what_was_thought_is_kept_as_text() {
        let found = row(json!({"messages": [
            {"role": "user", "content": "<image>\nWeather?"},
            {"role": "assistant", "reasoning_content": "A map.", "tool_calls": [{"function": {"name": "look"}}]},
            {"role": "tool", "name": "look", "content": [{"type": "text", "text": "sunny"}]},
            {"role": "user", "content": [{"type": "tool_result", "content": "22"}, {"type": "text", "text": "So?"}]},
        ], "images": ["a.png"]}))
        .unwrap();
        let texts: Vec<&str> = found.before.iter().map(|said| said.text.as_str()).collect();
        let call = "Thought: A map.\nTool call: [{\"function\":{\"name\":\"look\"}}]";
        assert_eq!(texts, ["Weather?", call, "Tool result (look): sunny"]);
        assert_eq!(
            (found.query.as_str(), found.before[0].images, found.query_images()),
            ("Tool result: 22\nSo?", 1, 0)
        );
        let behind = json!({"messages": [{"role": "user", "content": "q"}, {"role": "tool", "content": "r"}]});
        assert!(row(behind).unwrap_err().message().contains("behind the user's last turn"));
    }

    #[test]
    fn an_answer_is_the_draft_if_the_mapping_says_so() {
        let record = json!({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]});
        assert_eq!(row(record.clone()).unwrap().draft, None);
        let mapping = Mapping::new([("draft".into(), "conversations".into())]).unwrap();
        let reader = Reader { mapping, ..Reader::default() };
        let found = reader.row(0, serde_json::from_value(record).unwrap()).unwrap();
        assert_eq!((found.query.as_str(), found.draft.as_deref()), ("q", Some("a")));
    }

    #[test]
    fn layouts_of_trainers_are_read() {
        for (record, query, before, images) in [
            (json!({"instruction": "Read", "input": "this <image>", "images": ["a.png"]}), "Read\nthis", 0, 1),
            (
                json!({"query": "<image>B?", "images": ["a", "b"], "history": [["<image>A?", "a"]], "system": "S"}),
                "B?",
                3,
                2,
            ),
            (json!({"texts": [{"user": "A?", "assistant": "a"}, {"user": "B?", "assistant": "b"}]}), "B?", 2, 0),
            (
                json!({"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A?"}]}], "images": ["a"]}),
                "A?",
                0,
                1,
            ),
            (json!({"prompt": "[{\"role\": \"user\", \"content\": \"A?\"}]"}), "A?", 0, 0),
            (json!({"prompt": "{\"a\": 1}"}), "{\"a\": 1}", 0, 0),
            (json!({"question": "<image 1> B?", "image_1": "a", "image_2": null}), "B?", 0, 1),
            (
                json!({"messages": [{"role": "user", "content": [
                    {"type": "text", "text": "Is"}, {"type": "image", "image": "a"},
                    {"type": "text", "text": "like"}, {"type": "image", "source": {"type": "base64", "data": "AAAA"}},
                    {"type": "text", "text": "?"},
                ]}]}),
                "Is the first image like the second image?",
                0,
                2,
            ),
        ] {
            let found = row(record.clone()).map(|row| (row.query, row.before.len(), row.images.len()));
            assert_eq!(found, Ok((query.to_owned(), before, images)), "{record}");
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (record, says) in [
            (json!([]), "named fields"),
            (json!({"image": "a.png"}), "no query"),
            (json!({"query": "q", "image": 3}), "an image must be"),
            (json!({"query": "q", "image": {"x": 1}}), "neither bytes"),
            (json!({"query": ["q"]}), "column `query` is a list"),
            (json!({"query": "q", "videos": ["a.mp4"]}), "only images"),
            (json!({"query": "q", "photo": {"bytes": [0x89, 0x50, 0x4e, 0x47, 13]}}), "--map image=photo"),
            (json!({"query": "q", "image": "data:image/png;base64,@"}), "base64 is broken"),
            (json!({"messages": [{"role": "assistant", "content": "a"}]}), "no turn of the user"),
        ] {
            let error = row(record.clone()).unwrap_err();
            assert!(error.message().contains(says), "{record}: {error}");
        }
    }
}
