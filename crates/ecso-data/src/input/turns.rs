//! Conversations as people write them: chat completions, Messages and Responses, LLaVA's (`from`,
//! `value`), pairs `user` and `assistant`, pairs of question and answer.

use ecso::{Cause, Role};

use super::{
    at,
    cell::{Cell, Fields},
    marks::{self, Piece, Turn},
};
use crate::row::{Picture, cut};

/// Makes a picture of a cell.
pub(super) type Picturing<'a> = &'a dyn Fn(&Cell) -> Result<Picture, Cause>;

/// Where the image of a part may stand.
pub(super) const IMAGES: [&str; 12] = [
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

/// Where the images of a turn may stand, beside what it says.
const BESIDE: [&str; 7] =
    ["image", "images", "image_path", "image_paths", "image_url", "image_urls", "img"];

/// What a pair of question and answer calls these, but for upper and lower case.
const ASKED: [&str; 7] = ["user", "human", "question", "query", "prompt", "instruction", "input"];
const ANSWERED: [&str; 5] = ["assistant", "gpt", "answer", "response", "output"];

/// A conversation up to its last question, and what the model said after it.
#[derive(Debug, Default)]
pub(super) struct Talk {
    pub(super) turns: Vec<Turn>,
    pub(super) answer: Option<String>,
}

/// Whether a list is a conversation.
pub(super) fn is_talk(cell: &Cell) -> bool {
    matches!(cell, Cell::List(turns) if !turns.is_empty() && turns.iter().all(is_turn))
}

/// Whether something says who says it.
pub(super) fn is_turn(cell: &Cell) -> bool {
    ["role", "from"].iter().any(|name| cell.get(name).is_some())
}

/// What a turn says, taken apart.
pub(super) fn content(content: &Cell, picture: Picturing<'_>) -> Result<Vec<Piece>, Cause> {
    let mut pieces = Vec::new();
    parts(content, picture, &mut pieces)?;
    Ok(pieces)
}

/// Reads a conversation. The last turn of the user is its last turn here.
pub(super) fn talk(turns: &Cell, picture: Picturing<'_>) -> Result<Talk, Cause> {
    let Cell::List(said) = turns else {
        return Err(format!("{}, where a list of turns should be", turns.kind()).into());
    };
    let mut spoken = Vec::new();
    for (index, said) in said.iter().enumerate() {
        turn(said, picture, &mut spoken)
            .map_err(|cause| at(&format!("turn {}", index + 1), cause))?;
    }
    let last = spoken
        .iter()
        .rposition(|(who, _)| *who == Who::User)
        .ok_or("there is no turn of the user")?;
    let after = spoken.split_off(last + 1);
    if after.iter().any(|(who, _)| *who != Who::Assistant) {
        return Err("what a tool or the system says stands behind the user's last turn; such rows can't be used".into());
    }
    let answers: Vec<String> = after
        .into_iter()
        .map(|(_, pieces)| plain(pieces))
        .filter(|text| !text.is_empty())
        .collect();
    let answer = (!answers.is_empty()).then(|| answers.join("\n"));
    let said = |(who, pieces): (Who, Vec<Piece>)| Turn { role: who.role(), pieces };
    Ok(Talk { turns: spoken.into_iter().map(said).collect(), answer })
}

/// What the model says in a conversation that has its turns alone, as columns of preferences do.
pub(super) fn answers(turns: &Cell) -> Result<String, Cause> {
    let Cell::List(said) = turns else {
        return Err(format!("{}, where text should be", turns.kind()).into());
    };
    let mut spoken = Vec::new();
    let unread = |_: &Cell| Err("an image stands in the answer".into());
    for said in said {
        turn(said, &unread, &mut spoken)?;
    }
    let last = spoken.iter().rposition(|(who, _)| *who == Who::User).map_or(0, |last| last + 1);
    let answers = spoken.into_iter().skip(last).filter(|(who, _)| *who == Who::Assistant);
    Ok(answers.map(|(_, pieces)| plain(pieces)).collect::<Vec<_>>().join("\n"))
}

fn plain(pieces: Vec<Piece>) -> String {
    let text = |piece| if let Piece::Text(text) = piece { Some(text) } else { None };
    pieces.into_iter().filter_map(text).collect::<String>().trim().to_owned()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    System,
    User,
    Assistant,
    Tool,
}

impl Who {
    fn of(word: &str) -> Option<Self> {
        Some(match word.trim().to_ascii_lowercase().as_str() {
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

    /// There is no role of tools here: what one says goes to the model as the user's.
    fn role(self) -> Role {
        match self {
            Self::System => Role::System,
            Self::User | Self::Tool => Role::User,
            Self::Assistant => Role::Assistant,
        }
    }
}

type Spoken = Vec<(Who, Vec<Piece>)>;

fn turn(said: &Cell, picture: Picturing<'_>, spoken: &mut Spoken) -> Result<(), Cause> {
    let word = ["role", "from"].iter().find_map(|name| said.get(name));
    let Some(word) = word else { return pair(said, picture, spoken) };
    let known = "system, developer, user, human, assistant, gpt, tool and function are known";
    let word = word.text().ok_or_else(|| format!("its role is {}; {known}", word.kind()))?;
    let who = Who::of(word).ok_or_else(|| format!("its role is `{}`; {known}", cut(word)))?;
    let mut pieces = Vec::new();
    for name in ["reasoning_content", "reasoning", "thinking"] {
        if let Some(thought) =
            said.get(name).and_then(Cell::text).filter(|text| !text.trim().is_empty())
        {
            join(&mut pieces, vec![Piece::Text(format!("Thought: {}", thought.trim()))], "\n");
        }
    }
    let contents =
        || ["content", "value", "text", "parts"].into_iter().filter_map(|name| said.get(name));
    let content = contents().find(|content| !content.is_empty()).or_else(|| contents().next());
    if let Some(content) = content {
        let mut found = Vec::new();
        parts(content, picture, &mut found)?;
        join(&mut pieces, found, "\n");
    }
    for (name, label) in [("tool_calls", "Tool call"), ("function_call", "Tool call")] {
        if let Some(calls) = said.get(name).filter(|calls| !calls.is_empty()) {
            join(&mut pieces, vec![Piece::Text(format!("{label}: {}", json(calls)))], "\n");
        }
    }
    pieces.splice(0..0, beside(said, picture)?);
    if pieces.is_empty() && content.is_none() && who == Who::User {
        return Err("it has neither `content` nor `value`".into());
    }
    if who == Who::Tool {
        let name = said
            .get("name")
            .and_then(Cell::text)
            .map(|name| format!(" ({})", cut(name)))
            .unwrap_or_default();
        let label = vec![Piece::Text(format!("Tool result{name}: "))];
        pieces.splice(0..0, label);
    }
    spoken.push((who, pieces));
    Ok(())
}

/// A question and its answer: `{user, assistant}`, or a list of two.
fn pair(said: &Cell, picture: Picturing<'_>, spoken: &mut Spoken) -> Result<(), Cause> {
    let (system, asked, answered) = match said {
        Cell::Fields(fields) => {
            (one_of(fields, &["system"])?, one_of(fields, &ASKED)?, one_of(fields, &ANSWERED)?)
        }
        // Turns in lists of their own, as Arena's are.
        Cell::List(turns) if is_talk(said) => {
            return turns.iter().try_for_each(|said| turn(said, picture, spoken));
        }
        Cell::List(pair) if pair.len() == 2 => (None, pair.first(), pair.get(1)),
        other => return Err(format!("{}, where a turn should be", other.kind()).into()),
    };
    if asked.is_none() {
        let names: Vec<&str> = match said {
            Cell::Fields(fields) => fields.keys().map(String::as_str).collect(),
            _ => Vec::new(),
        };
        return Err(
            format!("it has neither `role` nor `from`, but {}", cut(&names.join(", "))).into()
        );
    }
    let mut shown = beside(said, picture)?;
    for (who, said) in [(Who::System, system), (Who::User, asked), (Who::Assistant, answered)] {
        let mut pieces = if who == Who::User { std::mem::take(&mut shown) } else { Vec::new() };
        said.map_or(Ok(()), |said| parts(said, picture, &mut pieces))?;
        if who == Who::User || !pieces.is_empty() {
            spoken.push((who, pieces));
        }
    }
    Ok(())
}

/// The cell of an object that has one of these names. Of two that say something nothing says which
/// is meant.
fn one_of<'a>(fields: &'a Fields, names: &[&str]) -> Result<Option<&'a Cell>, Cause> {
    let is_one = |name: &str| names.iter().any(|one| name.eq_ignore_ascii_case(one));
    let there: Vec<(&String, &Cell)> =
        fields.iter().filter(|(name, cell)| is_one(name) && **cell != Cell::Null).collect();
    let saying: Vec<_> = there.iter().filter(|(_, cell)| !cell.is_empty()).collect();
    match saying[..] {
        [(one, _), (other, _), ..] => {
            Err(format!("it has `{one}` and `{other}`, and nothing says which of these is said")
                .into())
        }
        [(_, cell)] => Ok(Some(cell)),
        [] => Ok(there.first().map(|(_, cell)| *cell)),
    }
}

/// The images of a turn that stand beside what it says.
fn beside(said: &Cell, picture: Picturing<'_>) -> Result<Vec<Piece>, Cause> {
    if let Some(name) = ["video", "videos", "audio", "audios"]
        .iter()
        .find(|name| said.get(name).is_some_and(|cell| !cell.is_empty()))
    {
        return Err(format!(
            "`{name}` holds what can't be shown; of what is shown, only images are understood"
        )
        .into());
    }
    let mut shown = Vec::new();
    for cell in BESIDE.iter().filter_map(|name| said.get(name)).filter(|cell| !cell.is_empty()) {
        match cell {
            Cell::List(list) if !list.iter().all(|cell| matches!(cell, Cell::Number(_))) => {
                for one in list {
                    shown.push(Piece::Own(picture(one)?));
                }
            }
            one => shown.push(Piece::Own(picture(one)?)),
        }
    }
    Ok(shown)
}

/// Puts pieces behind others.
fn join(pieces: &mut Vec<Piece>, found: Vec<Piece>, between: &str) {
    if !pieces.is_empty() && !found.is_empty() {
        pieces.push(Piece::Text(between.to_owned()));
    }
    pieces.extend(found);
}

/// What a turn says: a text, a part, or a list of these.
fn parts(content: &Cell, picture: Picturing<'_>, pieces: &mut Vec<Piece>) -> Result<(), Cause> {
    let own = |path: &str| picture(&Cell::Text(path.to_owned()));
    match content {
        Cell::Null => Ok(()),
        Cell::Text(text) => marks::pieces(text, &own, pieces),
        Cell::Number(number) => {
            pieces.push(Piece::Text(number.to_string()));
            Ok(())
        }
        Cell::List(list) => {
            for content in list {
                let mut found = Vec::new();
                parts(content, picture, &mut found)?;
                let between = between(pieces, &found);
                join(pieces, found, between);
            }
            Ok(())
        }
        Cell::Fields(_) => part(content, picture, pieces),
        other => {
            Err(format!("its content is {}, where text or parts should be", other.kind()).into())
        }
    }
}

/// Parts of text are lines; an image that stands in the midst of a sentence stays there.
fn between(before: &[Piece], found: &[Piece]) -> &'static str {
    match (before.last(), found.first()) {
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

fn part(part: &Cell, picture: Picturing<'_>, pieces: &mut Vec<Piece>) -> Result<(), Cause> {
    let kind = part.get("type").and_then(Cell::text);
    let has_image = || IMAGES.iter().any(|name| part.get(name).is_some());
    let text = ["text", "content", "value"].iter().find_map(|name| part.get(name));
    let mut labelled = |label: &str, name: &str| {
        let said = part.get(name).map(|said| said.text().map_or_else(|| json(said), str::to_owned));
        pieces.extend(said.map(|said| Piece::Text(format!("{label}: {said}"))));
        Ok(())
    };
    match (kind, text) {
        (None | Some("text" | "input_text" | "output_text"), Some(text)) => {
            pieces.extend(beside(part, picture)?);
            words(text, picture, pieces)
        }
        // Where all parts have the same fields, those that have nothing are null.
        (Some("text" | "input_text" | "output_text"), None) => match part {
            Cell::Fields(fields) if fields.contains_key("text") => Ok(()),
            _ => Err("a part of type `text` has no `text`".into()),
        },
        (Some("refusal"), _) => {
            part.get("refusal").map_or(Ok(()), |text| words(text, picture, pieces))
        }
        (Some("thinking"), _) => labelled("Thought", "thinking"),
        (Some("reasoning"), _) => {
            let name = ["text", "reasoning", "summary", "content"]
                .into_iter()
                .find(|name| part.get(name).is_some());
            labelled("Thought", name.unwrap_or("text"))
        }
        // Nobody but its author can read it.
        (Some("redacted_thinking"), _) => Ok(()),
        (Some("tool_use" | "function_call" | "tool_call"), _) => {
            pieces.push(Piece::Text(format!("Tool call: {}", json(part))));
            Ok(())
        }
        (Some("tool_result" | "function_call_output"), _) => {
            let result = ["content", "output"].iter().find_map(|name| part.get(name));
            pieces.push(Piece::Text("Tool result: ".into()));
            pieces.extend(result.map_or(Ok(Vec::new()), |result| content(result, picture))?);
            Ok(())
        }
        (None | Some("image" | "image_url" | "input_image"), text) if has_image() => {
            pieces.push(Piece::Own(picture(part)?));
            text.filter(|text| !text.is_empty()).map_or(Ok(()), |text| words(text, picture, pieces))
        }
        (Some("image_url" | "input_image"), _) => {
            Err("an image part has neither a URL nor an image".into())
        }
        // Its image stands in the image column; `index` says where.
        (Some("image"), _) => {
            let index =
                part.get("index").and_then(Cell::number).and_then(serde_json::Number::as_u64);
            pieces.push(Piece::Mark(index.and_then(|index| usize::try_from(index).ok())));
            Ok(())
        }
        (Some(other), _) => {
            Err(format!("a part of type `{}` isn't understood; text and images are", cut(other))
                .into())
        }
        (None, None) => Err("a part has neither type, text nor image".into()),
    }
}

/// The words of a part: a text, or `{value}`, as the Assistants API writes it.
fn words(text: &Cell, picture: Picturing<'_>, pieces: &mut Vec<Piece>) -> Result<(), Cause> {
    match text.get("value").unwrap_or(text) {
        text @ (Cell::Text(_) | Cell::Number(_)) => parts(text, picture, pieces),
        other => {
            Err(format!("the text of a part is {}, where words should be", other.kind()).into())
        }
    }
}

/// A cell as JSON, without what is null.
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
                let filled = fields.iter().filter(|(_, cell)| **cell != Cell::Null);
                filled
                    .map(|(name, cell)| (name.clone(), value(cell)))
                    .collect::<serde_json::Map<_, _>>()
                    .into()
            }
        }
    }
    value(cell).to_string()
}
