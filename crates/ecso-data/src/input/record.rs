//! Turns records of the input into [`Row`]s.

use std::collections::BTreeMap;

use ecso::{Cause, Role};

use super::{
    at,
    cell::{Cell, Fields},
    mapping::{self, Mapping},
    marks::{self, Piece, Turn},
    paths::Paths,
    turns,
};
use crate::row::{EarlierTurn, Row, shorten};

/// Maximum bytes of text in a row. No model reads more.
pub(super) const MAX_TEXT: usize = 4 << 20;

/// Builds rows from records.
#[derive(Debug, Clone, Default)]
pub(super) struct Reader {
    pub(super) mapping: Mapping,
    pub(super) query: Option<String>,
    pub(super) paths: Paths,
    /// The types of columns, if the format has types.
    pub(super) types: BTreeMap<String, String>,
    /// Whether texts and conversations, which strangers may have written, must not name files.
    /// Columns of images always can.
    pub(super) forbids_paths_in_text: bool,
}

impl Reader {
    /// Builds the row with this number.
    pub(super) fn row(&self, number: u64, record: Cell) -> Result<Row, Cause> {
        let Cell::Fields(mut fields) = record else {
            return Err(
                format!("expected a record with named fields, got {}", record.kind()).into()
            );
        };
        self.mapping.add_nested(&mut fields);
        self.mapping.check_row(&fields)?;
        if let Some(name) =
            ["video", "videos", "audio", "audios"].into_iter().find(|name| has(&fields, name))
        {
            return Err(format!(
                "{} is not supported; of media, only images are",
                self.column(name)
            )
            .into());
        }
        let mut row = Row {
            number,
            id: self.label("id", &mut fields)?.unwrap_or_else(|| (number + 1).to_string()),
            earlier: Vec::new(),
            query: String::new(),
            images: Vec::new(),
            category: self.label("category", &mut fields)?.unwrap_or_default(),
            draft: None,
        };
        let (turns, answer) = self.turns(&mut fields)?;
        let column = self.images(&mut fields)?;
        if let Some((name, draft)) = self.take("draft", &mut fields, is_set)? {
            let draft = match parse_conversation(draft) {
                Cell::Text(text) => Ok(text),
                Cell::Number(number) => Ok(number.to_string()),
                other => turns::answers(&other),
            };
            let draft = draft.map_err(|cause| at(&self.column(&name), cause))?;
            if draft.trim().is_empty() {
                return Err(format!(
                    "{} is empty, expected the model's answer",
                    self.column(&name)
                )
                .into());
            }
            row.draft = Some(draft);
        } else if answer.is_some() {
            row.draft = answer;
        }
        let (mut turns, images) = marks::place(turns, &column)?;
        row.query = turns.pop().map(|last| last.text).unwrap_or_default();
        remove_empty_openings(&mut turns);
        if let Some(empty) = turns.iter().find(|turn| is_empty(turn)) {
            return Err(format!("a turn of the {} is empty", empty.role.as_str()).into());
        }
        (row.earlier, row.images) = (turns, images);
        if row.query.is_empty() {
            let query = self.turn(Role::User, self.query_for(&row, &fields)?)?;
            let first = row.images.len() - row.query_images();
            row.query = marks::place_in_turn(query, &mut row.images, first)
                .map_err(|cause| at("--query", cause))?;
        }
        let earlier_text = row.earlier.iter().map(|turn| turn.text.len()).sum::<usize>();
        let text = earlier_text + row.query.len() + row.draft.as_ref().map_or(0, String::len);
        if text > MAX_TEXT {
            return Err(format!(
                "the row has {text} bytes of text; at most {MAX_TEXT} are allowed"
            )
            .into());
        }
        if row.images.is_empty() {
            self.check_no_image_is_left(&fields)?;
        } else {
            self.check_no_other_image(&fields)?;
        }
        Ok(row)
    }

    /// The query for a row without one. A row without query and image is an error.
    fn query_for(&self, row: &Row, fields: &Fields) -> Result<&str, Cause> {
        let has_image = !row.images.is_empty();
        match &self.query {
            Some(query) if has_image => return Ok(query),
            Some(_) => self.check_no_image_is_left(fields)?,
            None => {}
        }
        let names: Vec<&str> = fields
            .iter()
            .filter(|(_, cell)| !cell.is_empty())
            .map(|(name, _)| name.as_str())
            .collect();
        let others = if names.is_empty() {
            String::new()
        } else {
            format!(" (other columns: {})", shorten(&names.join(", ")))
        };
        let problem = if self.query.is_some() { "neither query nor image" } else { "no query" };
        let advice = mapping::advice(fields, has_image)
            .unwrap_or_else(|| "name its column with --map query=COLUMN, or pass --query".into());
        Err(format!("{problem}: {advice}{others}").into())
    }

    /// Describes a column for an error message, with its type.
    pub(super) fn column(&self, name: &str) -> String {
        let shown = shorten(name);
        match self.types.get(name) {
            Some(kind) => format!("column `{shown}` (of type {})", shorten(kind)),
            None => format!("column `{shown}`"),
        }
    }

    /// Takes the column of a field. Several candidates with different values are an error.
    fn take(
        &self,
        field: &str,
        fields: &mut Fields,
        is_candidate: fn(&Cell) -> bool,
    ) -> Result<Option<(String, Cell)>, Cause> {
        let columns = self.mapping.columns(field, fields, is_candidate);
        let Some((name, others)) = columns.split_first() else { return Ok(None) };
        match others.iter().find(|other| fields.get(*other) != fields.get(name)) {
            Some(other) => Err(self.ambiguous(field, name, other)),
            None => Ok(fields.remove_entry(name)),
        }
    }

    /// The error that two columns may both be a field.
    pub(super) fn ambiguous(&self, field: &str, name: &str, other: &str) -> Cause {
        let (column, other) = (self.column(name), self.column(other));
        format!(
            "{column} and {other} differ, and either may be the {field}: --map {field}={} selects \
             the first",
            shorten(name)
        )
        .into()
    }

    /// Takes an id or category, of any type that can be shown as text.
    fn label(&self, field: &str, fields: &mut Fields) -> Result<Option<String>, Cause> {
        // Several candidates are not an error: a row may have a number besides its id.
        let Some(name) = self.mapping.column(field, fields, is_set) else { return Ok(None) };
        let Some(cell) = fields.remove(&name) else { return Ok(None) };
        let label = match cell {
            Cell::Text(text) | Cell::Other(text) => text,
            Cell::Number(number) => number.to_string(),
            Cell::Bool(value) => value.to_string(),
            // Columns with other contents may be named `type` or `id` too.
            _ if self.mapping.named(field).is_none() => return Ok(None),
            other => {
                return Err(
                    format!("{} is {}, expected a name", self.column(&name), other.kind()).into()
                );
            }
        };
        Ok(Some(shorten(&label).into_owned()))
    }

    /// Takes the turns up to the query, which is the last; and the model's answer to it, if the
    /// mapping says that it is the draft.
    fn turns(&self, fields: &mut Fields) -> Result<(Vec<Turn>, Option<String>), Cause> {
        let to_image = |cell: &Cell| self.image_in_text(cell);
        let mut query = None;
        for field in self.mapping.query_fields() {
            if let Some((name, cell)) = self.take(field, fields, |cell| !cell.is_empty())? {
                let is_query = field == "query";
                let cell = if is_query { parse_conversation(cell) } else { cell.parsed() };
                query = Some((field, name, cell));
                break;
            }
        }
        let mut answer = None;
        let mut turns = match query {
            Some((field, name, cell)) if field != "query" || turns::is_conversation(&cell) => {
                let conversation = turns::read(&cell, &to_image)
                    .map_err(|cause| at(&self.column(&name), cause))?;
                answer = conversation.answer.filter(|_| self.mapping.named("draft") == Some(&name));
                conversation.turns
            }
            Some((_, name, cell)) => {
                self.check_query(&name, &cell)?;
                let mut text = self.text(&name, cell)?;
                // In Alpaca's layout the context of the instruction has its own column; M3IT names
                // it `inputs`.
                for column in ["input", "inputs"].into_iter().filter(|_| name == "instruction") {
                    if let Some(input) = fields.remove(column).filter(|input| !input.is_empty()) {
                        text = format!("{text}\n{}", self.text(column, input)?);
                    }
                }
                vec![self.turn(Role::User, &text)?]
            }
            None => vec![Turn { role: Role::User, pieces: Vec::new() }],
        };
        turns.splice(0..0, self.history(fields)?);
        turns.splice(0..0, self.system(fields)?);
        Ok((turns, answer))
    }

    /// Takes the turns of the column `history`.
    fn history(&self, fields: &mut Fields) -> Result<Vec<Turn>, Cause> {
        let Some(history) =
            fields.remove("history").map(Cell::parsed).filter(|history| !history.is_empty())
        else {
            return Ok(Vec::new());
        };
        let column = self.column("history");
        let Cell::List(mut pairs) = history else {
            return Err(format!("{column} is not a list of turns").into());
        };
        // Conversations are read up to the last query, so an empty one is added at the end.
        pairs.push(Cell::List(vec![Cell::Null, Cell::Null]));
        let conversation = turns::read(&Cell::List(pairs), &|cell| self.image_in_text(cell))
            .map_err(|cause| at(&column, cause))?;
        let mut turns = conversation.turns;
        turns.pop();
        Ok(turns)
    }

    /// The turn of the column `system`, if there is one.
    fn system(&self, fields: &Fields) -> Result<Option<Turn>, Cause> {
        let Some(system) = fields.get("system").filter(|system| !system.is_empty()) else {
            return Ok(None);
        };
        let pieces = match system {
            Cell::List(_) => turns::content(system, &|cell| self.image_in_text(cell))
                .map_err(|cause| at(&self.column("system"), cause))?,
            system => vec![Piece::Text(self.text("system", system.clone())?)],
        };
        Ok(Some(Turn { role: Role::System, pieces }))
    }

    /// Checks that a cell is a text, and not an object or a list of queries.
    fn check_query(&self, name: &str, cell: &Cell) -> Result<(), Cause> {
        let is_numbered = |fields: &Fields| {
            fields.keys().all(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
        };
        let advice = match cell {
            Cell::List(list) if list.iter().all(|cell| matches!(cell, Cell::Text(_))) => {
                Some(COLUMN_ORIENTED.to_owned())
            }
            Cell::Fields(fields) if is_numbered(fields) => Some(COLUMN_ORIENTED.to_owned()),
            // The mapping says that JSON is the query as it is.
            Cell::Text(_) if self.mapping.named("query") == Some(name) => None,
            Cell::Text(_) => match cell.clone().parsed() {
                Cell::Fields(inner) => {
                    mapping::query_of(&inner).map(|query| mapping::advice_to_map(name, &query))
                }
                _ => None,
            },
            cell => mapping::advice_on(name, cell, true),
        };
        let Some(advice) = advice else { return Ok(()) };
        let column = self.column(name);
        Err(match cell {
            Cell::Text(_) => {
                format!(
                    "{column} is JSON: {advice}; --map query={} uses it as it is",
                    shorten(name)
                )
            }
            cell => format!("{column} is {}, expected text: {advice}", cell.kind()),
        }
        .into())
    }

    fn turn(&self, role: Role, text: &str) -> Result<Turn, Cause> {
        let mut pieces = Vec::new();
        let to_image = |path: &str| self.image_in_text(&Cell::Text(path.to_owned()));
        marks::split(text, &to_image, &mut pieces)?;
        Ok(Turn { role, pieces })
    }

    /// The text of a cell.
    fn text(&self, name: &str, cell: Cell) -> Result<String, Cause> {
        match cell {
            Cell::Null => Ok(String::new()),
            Cell::Text(text) => Ok(text),
            Cell::Number(number) => Ok(number.to_string()),
            // Older Parquet writers don't mark strings as such.
            Cell::Bytes(bytes) if std::str::from_utf8(&bytes).is_ok() => {
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            other => {
                Err(format!("{} is {}, expected text", self.column(name), other.kind()).into())
            }
        }
    }
}

/// Removes the empty turns that trainers put first: the system's, and the user's if the assistant
/// begins.
fn remove_empty_openings(turns: &mut Vec<EarlierTurn>) {
    turns.retain(|turn| turn.role != Role::System || !is_empty(turn));
    let first = turns.iter().position(|turn| turn.role != Role::System).unwrap_or(turns.len());
    if let [user, model, ..] = &turns[first..]
        && (user.role, model.role) == (Role::User, Role::Assistant)
        && is_empty(user)
    {
        turns.remove(first);
    }
}

fn is_empty(turn: &EarlierTurn) -> bool {
    turn.text.is_empty() && turn.images == 0
}

/// Advice about a table that is stored column by column.
const COLUMN_ORIENTED: &str = "write the table row by row, not column by column";

/// Parses a text that is JSON of a conversation or of a single turn. Leaves other cells as they
/// are.
fn parse_conversation(cell: Cell) -> Cell {
    match cell.clone().parsed() {
        parsed if turns::is_conversation(&parsed) => parsed,
        parsed if turns::is_turn(&parsed) => Cell::List(vec![parsed]),
        _ => cell,
    }
}

fn is_set(cell: &Cell) -> bool {
    *cell != Cell::Null
}

fn has(fields: &Fields, name: &str) -> bool {
    fields.get(name).is_some_and(|cell| !cell.is_empty())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::row::ImageSource;

    fn row(record: Value) -> Result<Row, Cause> {
        let paths = Paths::new(vec!["root".into()]);
        let record = serde_json::from_value(record).unwrap();
        Reader { paths, ..Reader::default() }.row(7, record)
    }

    #[test]
    fn columns_are_found_by_common_names() {
        let found = row(json!({"Question": "What?", "image": "a.png", "topic": "t"})).unwrap();
        assert_eq!(
            (found.id.as_str(), found.query.as_str(), found.category.as_str()),
            ("8", "What?", "t")
        );
        assert_eq!(found.images, [ImageSource::File("root/a.png".into())]);
        let found = row(json!({
            "id": 3,
            "conversations": [{"from": "human", "value": "<image>\nWhat?"}],
            "image": "a.png",
        }));
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
        assert_eq!(found.earlier.len(), 3);
        assert_eq!(found.query, "What is this?");
        assert_eq!(found.images, [ImageSource::Bytes(vec![0, 0, 0].into())]);
    }

    #[test]
    fn tool_results_and_thoughts_are_kept_as_text() {
        let found = row(json!({"messages": [
            {"role": "user", "content": "<image>\nWeather?"},
            {
                "role": "assistant",
                "reasoning_content": "A map.",
                "tool_calls": [{"function": {"name": "look"}}],
            },
            {"role": "tool", "name": "look", "content": [{"type": "text", "text": "sunny"}]},
            {"role": "user", "content": [
                {"type": "tool_result", "content": "22"},
                {"type": "text", "text": "So?"},
            ]},
        ], "images": ["a.png"]}))
        .unwrap();
        let texts: Vec<&str> = found.earlier.iter().map(|turn| turn.text.as_str()).collect();
        let call = "Thought: A map.\nTool call: [{\"function\":{\"name\":\"look\"}}]";
        assert_eq!(texts, ["Weather?", call, "Tool result (look): sunny"]);
        assert_eq!(
            (found.query.as_str(), found.earlier[0].images, found.query_images()),
            ("Tool result: 22\nSo?", 1, 0)
        );
        let tool_last = json!({"messages": [
            {"role": "user", "content": "q"},
            {"role": "tool", "content": "r"},
        ]});
        let error = row(tool_last).unwrap_err();
        assert!(error.message().contains("follows the user's last turn"), "{error}");
    }

    #[test]
    fn an_answer_is_the_draft_if_the_mapping_says_so() {
        let record = json!({"conversations": [
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "a"},
        ]});
        assert_eq!(row(record.clone()).unwrap().draft, None);
        let mapping = Mapping::new([("draft".into(), "conversations".into())]).unwrap();
        let reader = Reader { mapping, ..Reader::default() };
        let found = reader.row(0, serde_json::from_value(record).unwrap()).unwrap();
        assert_eq!((found.query.as_str(), found.draft.as_deref()), ("q", Some("a")));
    }

    #[test]
    fn layouts_of_trainers_are_read() {
        for (record, query, before, images) in [
            (
                json!({"instruction": "Read", "input": "this <image>", "images": ["a.png"]}),
                "Read\nthis",
                0,
                1,
            ),
            (
                json!({
                    "query": "<image>B?",
                    "images": ["a", "b"],
                    "history": [["<image>A?", "a"]],
                    "system": "S",
                }),
                "B?",
                3,
                2,
            ),
            (
                json!({"texts": [{"user": "A?", "assistant": "a"}, {"user": "B?", "assistant": "b"}]}),
                "B?",
                2,
                0,
            ),
            (
                json!({
                    "prompt": [{"role": "user", "content": [
                        {"type": "image"},
                        {"type": "text", "text": "A?"},
                    ]}],
                    "images": ["a"],
                }),
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
                    {"type": "text", "text": "like"},
                    {"type": "image", "source": {"type": "base64", "data": "AAAA"}},
                    {"type": "text", "text": "?"},
                ]}]}),
                "Is the first image like the second image?",
                0,
                2,
            ),
        ] {
            let found =
                row(record.clone()).map(|row| (row.query, row.earlier.len(), row.images.len()));
            assert_eq!(found, Ok((query.to_owned(), before, images)), "{record}");
        }
    }

    fn talk(first: &str, answer: &str, second: &str) -> Value {
        let turn = |(role, content): (&str, &str)| json!({"role": role, "content": content});
        let turns = [("system", ""), ("user", first), ("assistant", answer), ("user", second)];
        json!({"messages": turns.map(turn)})
    }

    #[test]
    fn what_trainers_put_in_front_of_a_conversation_may_be_empty() {
        for (first, turns) in [("q", 2), ("", 1)] {
            assert_eq!(row(talk(first, "a", "r")).unwrap().earlier.len(), turns, "{first:?}");
        }
    }

    #[test]
    fn equal_columns_are_not_ambiguous() {
        for record in [
            json!({"query": "q", "question": "q", "Query": "q", "text": " "}),
            json!({"query": "q", "image": "a.png", "Image": "b/a.png", "image_url": "http://a/b"}),
            json!({"query": "q", "id": "a", "index": 3, "category": "c", "type": "t"}),
        ] {
            assert!(
                row(record.clone()).is_ok_and(|row| row.query == "q" && row.images.len() < 2),
                "{record}"
            );
        }
        let twice = [("query".into(), "a".into()), ("query".into(), "b".into())];
        assert!(Mapping::new(twice).unwrap_err().message().contains("`query` twice"));
    }

    #[test]
    fn errors_describe_the_problem() {
        for (record, says) in [
            (json!([]), "named fields"),
            (json!({"image": "a.png"}), "no query"),
            (json!({"query": "q", "image": 3}), "an image must be"),
            (json!({"query": "q", "image": {"x": 1}}), "no bytes, url or path"),
            (json!({"query": ["q"]}), "column `query` is a list"),
            (json!({"query": "q", "videos": ["a.mp4"]}), "only images"),
            (
                json!({"query": "q", "photo": {"bytes": [0x89, 0x50, 0x4e, 0x47, 13]}}),
                "--map image=photo",
            ),
            (json!({"query": "q", "image": "data:image/png;base64,@"}), "base64 is broken"),
            (json!({"messages": [{"role": "assistant", "content": "a"}]}), "no turn of the user"),
            (talk("q", "", "r"), "a turn of the assistant is empty"),
            (talk("q", " \n", "r"), "a turn of the assistant is empty"),
            (
                json!({"query": "r", "history": [["q", "a"], ["", "a"]]}),
                "a turn of the user is empty",
            ),
            (json!({"query": "q", "draft": " "}), "column `draft` is empty"),
            (json!({"query": "q", "question": "r"}), "column `query` and column `question` differ"),
            (json!({"Query": "q", "QUERY": "r"}), "either may be the query"),
            (json!({"query": "q", "Query": "r"}), "--map query=query selects the first"),
            (json!({"query": "q", "draft": "a", "Draft": "b"}), "either may be the draft"),
            (json!({"query": "q", "image": "a.png", "Image": "b.png"}), "either may be the image"),
            (
                json!({"query": "q", "image": "a.png", "image_path": "b.png"}),
                "either may be the image",
            ),
            (
                json!({"query": "q", "image": ["a.png", "b.png"], "image_path": "c.png"}),
                "either may be the image",
            ),
            (
                json!({"query": "q", "image_url": "http://a/b", "image_urls": ["http://a/c"]}),
                "either may be the image",
            ),
        ] {
            let error = row(record.clone()).unwrap_err();
            assert!(error.message().contains(says), "{record}: {error}");
        }
    }
}
