//! Reads conversations in many formats: chat completions, Messages and Responses, LLaVA (`from`,
//! `value`), pairs of `user` and `assistant`, and pairs of question and answer.

use ecso::{Cause, Role};

use super::{
    at,
    cell::{Cell, Fields},
    marks::{self, Piece, Turn},
};
use crate::row::{ImageSource, shorten};

/// Turns a cell into an image.
pub(super) type ToImageSource<'a> = &'a dyn Fn(&Cell) -> Result<ImageSource, Cause>;

/// Fields of a part that may have its image.
pub(super) const IMAGE_FIELDS: [&str; 12] = [
    "image_url",
    "image",
    "bytes",
    "url",
    "path",
    "base64",
    "data",
    "source",
    "file_name",
    "src",
    "inline_data",
    "inlineData",
];

/// Fields of a turn that may have its images.
const TURN_IMAGE_FIELDS: [&str; 7] =
    ["image", "images", "image_path", "image_paths", "image_url", "image_urls", "img"];

/// Names of the question and the answer in a pair, in any case.
const QUESTIONS: [&str; 7] =
    ["user", "human", "question", "query", "prompt", "instruction", "input"];
const ANSWERS: [&str; 5] = ["assistant", "gpt", "answer", "response", "output"];

/// A conversation up to its last query, and the model's answer to that.
#[derive(Debug, Default)]
pub(super) struct Conversation {
    pub(super) turns: Vec<Turn>,
    pub(super) answer: Option<String>,
}

/// Whether a cell is a list of turns with roles.
pub(super) fn is_conversation(cell: &Cell) -> bool {
    matches!(cell, Cell::List(turns) if !turns.is_empty() && turns.iter().all(is_turn))
}

/// Whether a cell is a turn with a role.
pub(super) fn is_turn(cell: &Cell) -> bool {
    ["role", "from"].iter().any(|name| cell.get(name).is_some())
}

/// The pieces of the content of a turn.
pub(super) fn content(content: &Cell, to_image: ToImageSource<'_>) -> Result<Vec<Piece>, Cause> {
    let mut pieces = Vec::new();
    read_content(content, to_image, &mut pieces)?;
    Ok(pieces)
}

/// Reads a conversation up to the last turn of the user.
pub(super) fn read(turns: &Cell, to_image: ToImageSource<'_>) -> Result<Conversation, Cause> {
    let Cell::List(cells) = turns else {
        return Err(format!("expected a list of turns, got {}", turns.kind()).into());
    };
    let mut turns = Vec::new();
    for (index, cell) in cells.iter().enumerate() {
        read_turn(cell, to_image, &mut turns)
            .map_err(|cause| at(&format!("turn {}", index + 1), cause))?;
    }
    let last = turns
        .iter()
        .rposition(|(speaker, _)| *speaker == Speaker::User)
        .ok_or("the conversation has no turn of the user")?;
    let after = turns.split_off(last + 1);
    if after.iter().any(|(speaker, _)| *speaker != Speaker::Assistant) {
        return Err(
            "a turn of a tool or the system follows the user's last turn; such rows are not \
                    supported"
                .into(),
        );
    }
    let answers: Vec<String> = after
        .into_iter()
        .map(|(_, pieces)| plain_text(pieces))
        .filter(|text| !text.is_empty())
        .collect();
    let answer = (!answers.is_empty()).then(|| answers.join("\n"));
    let turns = turns.into_iter();
    let turns = turns.map(|(speaker, pieces)| Turn { role: speaker.role(), pieces }).collect();
    Ok(Conversation { turns, answer })
}

/// Reads the model's answer from a list of turns, as in columns of preference data.
pub(super) fn answers(turns: &Cell) -> Result<String, Cause> {
    let Cell::List(cells) = turns else {
        return Err(format!("expected text, got {}", turns.kind()).into());
    };
    let mut turns = Vec::new();
    let reject_image = |_: &Cell| Err("the answer has an image".into());
    for cell in cells {
        read_turn(cell, &reject_image, &mut turns)?;
    }
    let is_user = |(speaker, _): &(Speaker, _)| *speaker == Speaker::User;
    let first = turns.iter().rposition(is_user).map_or(0, |last| last + 1);
    let answers = turns.into_iter().skip(first);
    let answers = answers.filter(|(speaker, _)| *speaker == Speaker::Assistant);
    Ok(answers.map(|(_, pieces)| plain_text(pieces)).collect::<Vec<_>>().join("\n"))
}

fn plain_text(pieces: Vec<Piece>) -> String {
    let text = |piece| if let Piece::Text(text) = piece { Some(text) } else { None };
    pieces.into_iter().filter_map(text).collect::<String>().trim().to_owned()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Speaker {
    System,
    User,
    Assistant,
    Tool,
}

impl Speaker {
    fn parse(role: &str) -> Option<Self> {
        Some(match role.trim().to_ascii_lowercase().as_str() {
            "system" | "developer" => Self::System,
            "user" | "human" | "prompter" => Self::User,
            "assistant" | "gpt" | "model" | "bot" | "chatgpt" | "ai" | "function_call"
            | "tool_call" => Self::Assistant,
            "tool" | "function" | "observation" | "tool_response" | "tool_result" | "ipython" => {
                Self::Tool
            }
            _ => return None,
        })
    }

    /// The role for the model. Turns of tools become turns of the user.
    fn role(self) -> Role {
        match self {
            Self::System => Role::System,
            Self::User | Self::Tool => Role::User,
            Self::Assistant => Role::Assistant,
        }
    }
}

type Turns = Vec<(Speaker, Vec<Piece>)>;

fn read_turn(cell: &Cell, to_image: ToImageSource<'_>, turns: &mut Turns) -> Result<(), Cause> {
    let role = ["role", "from"].iter().find_map(|name| cell.get(name));
    let Some(role) = role else { return read_pair(cell, to_image, turns) };
    let known = "known roles are system, developer, user, human, assistant, gpt, tool and function";
    let role = role.text().ok_or_else(|| format!("its role is {}; {known}", role.kind()))?;
    let speaker =
        Speaker::parse(role).ok_or_else(|| format!("unknown role `{}`; {known}", shorten(role)))?;
    let mut pieces = Vec::new();
    for name in ["reasoning_content", "reasoning", "thinking"] {
        if let Some(thought) =
            cell.get(name).and_then(Cell::text).filter(|text| !text.trim().is_empty())
        {
            join(&mut pieces, vec![Piece::Text(format!("Thought: {}", thought.trim()))], "\n");
        }
    }
    let contents =
        || ["content", "value", "text", "parts"].into_iter().filter_map(|name| cell.get(name));
    let content = contents().find(|content| !content.is_empty()).or_else(|| contents().next());
    if let Some(content) = content {
        let mut content_pieces = Vec::new();
        read_content(content, to_image, &mut content_pieces)?;
        join(&mut pieces, content_pieces, "\n");
    }
    for name in ["tool_calls", "function_call"] {
        if let Some(calls) = cell.get(name).filter(|calls| !calls.is_empty()) {
            join(&mut pieces, vec![Piece::Text(format!("Tool call: {}", json(calls)))], "\n");
        }
    }
    pieces.splice(0..0, turn_images(cell, to_image)?);
    if pieces.is_empty() && content.is_none() && speaker == Speaker::User {
        return Err("the turn has neither `content` nor `value`".into());
    }
    if speaker == Speaker::Tool {
        let name = cell
            .get("name")
            .and_then(Cell::text)
            .map(|name| format!(" ({})", shorten(name)))
            .unwrap_or_default();
        let label = vec![Piece::Text(format!("Tool result{name}: "))];
        pieces.splice(0..0, label);
    }
    turns.push((speaker, pieces));
    Ok(())
}

/// Reads a question and its answer: `{user, assistant}`, or a list of two.
fn read_pair(cell: &Cell, to_image: ToImageSource<'_>, turns: &mut Turns) -> Result<(), Cause> {
    let (system, question, answer) = match cell {
        Cell::Fields(fields) => (
            field_named(fields, &["system"])?,
            field_named(fields, &QUESTIONS)?,
            field_named(fields, &ANSWERS)?,
        ),
        // Nested lists of turns, as in Arena's data.
        Cell::List(cells) if is_conversation(cell) => {
            return cells.iter().try_for_each(|cell| read_turn(cell, to_image, turns));
        }
        Cell::List(pair) if pair.len() == 2 => (None, pair.first(), pair.get(1)),
        other => return Err(format!("expected a turn, got {}", other.kind()).into()),
    };
    if question.is_none() {
        let names: Vec<&str> = match cell {
            Cell::Fields(fields) => fields.keys().map(String::as_str).collect(),
            _ => Vec::new(),
        };
        return Err(format!(
            "the turn has neither `role` nor `from`, but {}",
            shorten(&names.join(", "))
        )
        .into());
    }
    let mut images = turn_images(cell, to_image)?;
    for (speaker, content) in
        [(Speaker::System, system), (Speaker::User, question), (Speaker::Assistant, answer)]
    {
        let is_user = speaker == Speaker::User;
        let mut pieces = if is_user { std::mem::take(&mut images) } else { Vec::new() };
        content.map_or(Ok(()), |content| read_content(content, to_image, &mut pieces))?;
        if is_user || !pieces.is_empty() {
            turns.push((speaker, pieces));
        }
    }
    Ok(())
}

/// The field with one of these names. Two that are not empty are an error.
fn field_named<'a>(fields: &'a Fields, names: &[&str]) -> Result<Option<&'a Cell>, Cause> {
    let matches = |name: &str| names.iter().any(|wanted| name.eq_ignore_ascii_case(wanted));
    let candidates: Vec<(&String, &Cell)> =
        fields.iter().filter(|(name, cell)| matches(name) && **cell != Cell::Null).collect();
    let non_empty: Vec<_> = candidates.iter().filter(|(_, cell)| !cell.is_empty()).collect();
    match non_empty[..] {
        [(name, _), (other, _), ..] => {
            Err(format!("the turn is ambiguous: it has both `{name}` and `{other}`").into())
        }
        [(_, cell)] => Ok(Some(cell)),
        [] => Ok(candidates.first().map(|(_, cell)| *cell)),
    }
}

/// The images in the fields of a turn, outside its content.
fn turn_images(turn: &Cell, to_image: ToImageSource<'_>) -> Result<Vec<Piece>, Cause> {
    if let Some(name) = ["video", "videos", "audio", "audios"]
        .iter()
        .find(|name| turn.get(name).is_some_and(|cell| !cell.is_empty()))
    {
        return Err(format!("`{name}` is not supported; of media, only images are").into());
    }
    let mut images = Vec::new();
    let cells = TURN_IMAGE_FIELDS.iter().filter_map(|name| turn.get(name));
    for cell in cells.filter(|cell| !cell.is_empty()) {
        match cell {
            Cell::List(list) if !list.iter().all(|cell| matches!(cell, Cell::Number(_))) => {
                for cell in list {
                    images.push(Piece::Inline(to_image(cell)?));
                }
            }
            cell => images.push(Piece::Inline(to_image(cell)?)),
        }
    }
    Ok(images)
}

/// Appends pieces after a separator.
fn join(pieces: &mut Vec<Piece>, more: Vec<Piece>, separator: &str) {
    if !pieces.is_empty() && !more.is_empty() {
        pieces.push(Piece::Text(separator.to_owned()));
    }
    pieces.extend(more);
}

/// Reads the content of a turn: a text, a part, or a list of these.
fn read_content(
    content: &Cell,
    to_image: ToImageSource<'_>,
    pieces: &mut Vec<Piece>,
) -> Result<(), Cause> {
    let path_to_image = |path: &str| to_image(&Cell::Text(path.to_owned()));
    match content {
        Cell::Null => Ok(()),
        Cell::Text(text) => marks::split(text, &path_to_image, pieces),
        Cell::Number(number) => {
            pieces.push(Piece::Text(number.to_string()));
            Ok(())
        }
        Cell::List(list) => {
            for content in list {
                let mut more = Vec::new();
                read_content(content, to_image, &mut more)?;
                let separator = separator(pieces, &more);
                join(pieces, more, separator);
            }
            Ok(())
        }
        Cell::Fields(_) => read_part(content, to_image, pieces),
        other => Err(format!("its content is {}, expected text or parts", other.kind()).into()),
    }
}

/// The separator of two parts: parts of text are lines, but an image within a sentence stays there.
fn separator(before: &[Piece], after: &[Piece]) -> &'static str {
    match (before.last(), after.first()) {
        (Some(Piece::Text(_)), Some(Piece::Text(_))) => "\n",
        (Some(Piece::Text(text)), _) if !text.ends_with(['.', '?', '!', ':', '\n']) => " ",
        (Some(Piece::Text(_)), _) => "\n",
        (_, Some(Piece::Text(text)))
            if text.starts_with(|c: char| c.is_lowercase() || c.is_whitespace()) =>
        {
            " "
        }
        (_, Some(Piece::Text(text))) if text.starts_with(|c: char| c.is_ascii_punctuation()) => "",
        (_, Some(Piece::Text(_))) => "\n",
        _ => " ",
    }
}

fn read_part(
    part: &Cell,
    to_image: ToImageSource<'_>,
    pieces: &mut Vec<Piece>,
) -> Result<(), Cause> {
    let kind = part.get("type").and_then(Cell::text);
    let has_image = || IMAGE_FIELDS.iter().any(|name| part.get(name).is_some());
    let text = ["text", "content", "value"].iter().find_map(|name| part.get(name));
    let mut push_thought = |name: &str| {
        let thought =
            part.get(name).map(|cell| cell.text().map_or_else(|| json(cell), str::to_owned));
        pieces.extend(thought.map(|thought| Piece::Text(format!("Thought: {thought}"))));
        Ok(())
    };
    match (kind, text) {
        (None | Some("text" | "input_text" | "output_text"), Some(text)) => {
            pieces.extend(turn_images(part, to_image)?);
            read_text(text, to_image, pieces)
        }
        // In formats where all parts have the same fields, unused ones are null.
        (Some("text" | "input_text" | "output_text"), None) => match part {
            Cell::Fields(fields) if fields.contains_key("text") => Ok(()),
            _ => Err("a part of type `text` has no `text`".into()),
        },
        (Some("refusal"), _) => {
            part.get("refusal").map_or(Ok(()), |text| read_text(text, to_image, pieces))
        }
        (Some("thinking"), _) => push_thought("thinking"),
        (Some("reasoning"), _) => {
            let name = ["text", "reasoning", "summary", "content"]
                .into_iter()
                .find(|name| part.get(name).is_some());
            push_thought(name.unwrap_or("text"))
        }
        // It is encrypted.
        (Some("redacted_thinking"), _) => Ok(()),
        (Some("tool_use" | "function_call" | "tool_call"), _) => {
            pieces.push(Piece::Text(format!("Tool call: {}", json(part))));
            Ok(())
        }
        (Some("tool_result" | "function_call_output"), _) => {
            let result = ["content", "output"].iter().find_map(|name| part.get(name));
            pieces.push(Piece::Text("Tool result: ".into()));
            pieces.extend(result.map_or(Ok(Vec::new()), |result| content(result, to_image))?);
            Ok(())
        }
        (None | Some("image" | "image_url" | "input_image"), text) if has_image() => {
            pieces.push(Piece::Inline(to_image(part)?));
            let text = text.filter(|text| !text.is_empty());
            text.map_or(Ok(()), |text| read_text(text, to_image, pieces))
        }
        (Some("image_url" | "input_image"), _) => {
            Err("an image part has neither a URL nor an image".into())
        }
        // Its image is in the image column, at `index`.
        (Some("image"), _) => {
            let index =
                part.get("index").and_then(Cell::number).and_then(serde_json::Number::as_u64);
            pieces.push(Piece::Mark(index.and_then(|index| usize::try_from(index).ok())));
            Ok(())
        }
        (Some(other), _) => Err(format!(
            "parts of type `{}` are not supported; text and images are",
            shorten(other)
        )
        .into()),
        (None, None) => Err("a part has no type, text or image".into()),
    }
}

/// Reads the text of a part: a text, or `{value}`, as the Assistants API writes it.
fn read_text(
    text: &Cell,
    to_image: ToImageSource<'_>,
    pieces: &mut Vec<Piece>,
) -> Result<(), Cause> {
    match text.get("value").unwrap_or(text) {
        text @ (Cell::Text(_) | Cell::Number(_)) => read_content(text, to_image, pieces),
        other => Err(format!("the text of a part is {}, expected text", other.kind()).into()),
    }
}

/// A cell as JSON, without null fields.
fn json(cell: &Cell) -> String {
    fn value(cell: &Cell) -> serde_json::Value {
        match cell {
            Cell::Null => serde_json::Value::Null,
            Cell::Bool(value) => (*value).into(),
            Cell::Number(number) => number.clone().into(),
            Cell::Text(text) | Cell::Other(text) => text.as_str().into(),
            Cell::Bytes(bytes) => format!("{} bytes", bytes.len()).into(),
            Cell::List(list) => list.iter().map(value).collect(),
            Cell::Fields(fields) => {
                let non_null = fields.iter().filter(|(_, cell)| **cell != Cell::Null);
                non_null
                    .map(|(name, cell)| (name.clone(), value(cell)))
                    .collect::<serde_json::Map<_, _>>()
                    .into()
            }
        }
    }
    value(cell).to_string()
}
