//! Where images stand: the marks that trainers write into texts, and parts of a turn that are images.
//!
//! A mark at the beginning or end of its turn is removed, since images stand before the text of their turn. One in mid-sentence is
//! part of what is said, so it becomes words: "the first image".

use std::{collections::BTreeSet, sync::LazyLock};

use ecso::Role;
use regex_lite::Regex;

use crate::row::{Picture, Said};

/// A turn before its images are placed.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Turn {
    pub(super) role: Role,
    pub(super) pieces: Vec<Piece>,
}

/// What a turn is made of.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Piece {
    Text(String),
    /// The next image of the row's column; with a number, that one.
    Mark(Option<usize>),
    /// An image that stands here.
    Own(Picture),
}

/// Marks of LLaVA, LLaMA-Factory, ms-swift (`<image>`), MiniCPM (`<image>./</image>`), MMMU (`<image 1>`), Phi (`<|image_1|>`), Llama and
/// others (`<|image|>`), Qwen (`<|vision_start|><|image_pad|><|vision_end|>`, `<img>path</img>`), Gemma, DeepSeek, InternLM.
static MARKS: LazyLock<Option<Regex>> = LazyLock::new(|| {
    let marks = concat!(
        r"<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>|<\|image_pad\|>|<img>(?P<path>[^<>\n]*)</img>",
        r"|<image>(?:\./)?</image>|<image>|<\|?image[ _]?(?P<number>\d{1,3})\|?>|<\|image\|>",
        r"|<start_of_image>|<image_placeholder>|<ImageHere>",
    );
    Regex::new(marks).ok()
});

/// Marks of what no image is.
const OTHERS: [&str; 5] = ["<video>", "<audio>", "<|video_pad|>", "<|video|>", "<|audio|>"];

/// Takes a text apart at its marks. `own` makes the image of a path that stands in one.
pub(super) fn pieces(
    text: &str,
    own: &dyn Fn(&str) -> Result<Picture, String>,
    pieces: &mut Vec<Piece>,
) -> Result<(), String> {
    if let Some(other) = OTHERS.iter().find(|other| text.contains(**other)) {
        return Err(format!("`{other}` stands in the text; of what is shown, only images are understood"));
    }
    let mut rest = 0;
    for found in MARKS.iter().flat_map(|marks| marks.captures_iter(text)) {
        let Some(whole) = found.get(0) else { continue };
        if rest < whole.start() {
            pieces.push(Piece::Text(text[rest..whole.start()].to_owned()));
        }
        rest = whole.end();
        let path = found.name("path").map(|path| path.as_str().trim()).filter(|path| !path.is_empty());
        pieces.push(match path {
            Some(path) => Piece::Own(own(path)?),
            None => Piece::Mark(found.name("number").and_then(|number| number.as_str().parse().ok())),
        });
    }
    if rest < text.len() {
        pieces.push(Piece::Text(text[rest..].to_owned()));
    }
    Ok(())
}

/// Gives every mark its image: `column` are the row's images that stand in no turn. Where nothing says where they belong, they stand in
/// the last turn, the query. Gives the turns as text, and all images in order.
pub(super) fn place(mut turns: Vec<Turn>, column: Vec<Picture>) -> Result<(Vec<Said>, Vec<Picture>), String> {
    repeat_own(&mut turns);
    let all = || turns.iter().flat_map(|turn| &turn.pieces);
    let marks = all().filter(|piece| matches!(piece, Piece::Mark(None))).count();
    let own: Vec<&Picture> =
        all().filter_map(|piece| if let Piece::Own(own) = piece { Some(own) } else { None }).collect();
    let numbers: BTreeSet<usize> =
        all().filter_map(|piece| if let Piece::Mark(number) = piece { *number } else { None }).collect();
    // Some count from 0.
    let first = usize::from(!numbers.contains(&0));
    let numbered = numbers.last().map_or(0, |last| last + 1 - first);
    let is_right = match (marks, numbered) {
        (0, 0) => own.is_empty() || column.is_empty() || own.iter().copied().eq(&column),
        (0, _) => numbered == column.len() && numbers.len() == numbered,
        (_, 0) => marks == column.len(),
        _ => return Err("marks with a number and marks without stand in one row".into()),
    };
    if !is_right && marks + numbered == 0 {
        let (own, column) = (own.len(), column.len());
        return Err(format!(
            "{own} images stand in the turns and {column} others beside them: where these belong isn't said"
        ));
    }
    if !is_right {
        let marks = if marks > 0 { marks } else { numbers.len() };
        let (number, images) = (column.len(), if column.len() == 1 { "image" } else { "images" });
        return Err(format!("{marks} marks of images stand in the text, but the row has {number} {images} for them"));
    }
    let is_unmarked = marks + numbered == 0 && own.is_empty();
    let of_column = if is_unmarked || marks + numbered > 0 { column.len() } else { 0 };
    let total = of_column + own.len();
    let mut images = Vec::with_capacity(total);
    let mut next = 0;
    // Where a numbered image has gone.
    let mut places: Vec<Option<usize>> = vec![None; column.len()];
    let mut said = Vec::with_capacity(turns.len());
    let last = turns.len().saturating_sub(1);
    for (index, turn) in turns.into_iter().enumerate() {
        let before = images.len();
        if index == last && is_unmarked {
            images.extend(column.iter().cloned());
        }
        let mut mentioned: Vec<usize> = turn
            .pieces
            .iter()
            .filter_map(|piece| if let Piece::Mark(number) = piece { *number } else { None })
            .collect();
        mentioned.sort_unstable();
        for number in mentioned {
            let index = number - first;
            if places[index].is_none() {
                places[index] = Some(images.len());
                images.push(column[index].clone());
            }
        }
        let mut shown = Vec::with_capacity(turn.pieces.len());
        for piece in turn.pieces {
            shown.push(match piece {
                Piece::Text(text) => Shown::Text(text),
                Piece::Own(picture) => {
                    images.push(picture);
                    Shown::Image(images.len() - 1)
                }
                Piece::Mark(Some(number)) => Shown::Image(places[number - first].unwrap_or_default()),
                Piece::Mark(None) => {
                    images.push(column[next].clone());
                    next += 1;
                    Shown::Image(images.len() - 1)
                }
            });
        }
        let count = images.len() - before;
        if count > 0 && turn.role != Role::User {
            return Err(format!("an image in a turn of the {} can't be used", turn.role.as_str()));
        }
        let text = words(&shown, total);
        said.push(Said { role: turn.role, text, images: count });
    }
    Ok((said, images))
}

/// A turn whose images stand in it may have a mark for each as well: then the images stand where the marks do.
fn repeat_own(turns: &mut [Turn]) {
    for turn in turns {
        let (own, others): (Vec<Piece>, Vec<Piece>) =
            turn.pieces.iter().cloned().partition(|piece| matches!(piece, Piece::Own(_)));
        let marks = others.iter().filter(|piece| matches!(piece, Piece::Mark(None))).count();
        if marks > 0 && marks == own.len() {
            let mut own = own.into_iter();
            let stands = |piece| if matches!(piece, Piece::Mark(None)) { own.next() } else { Some(piece) };
            turn.pieces = others.into_iter().filter_map(stands).collect();
        }
    }
}

/// A piece whose image is known by its place.
enum Shown {
    Text(String),
    Image(usize),
}

impl Shown {
    fn is_text(&self) -> bool {
        matches!(self, Self::Text(text) if !text.trim().is_empty())
    }
}

/// The text of a turn: marks at its edges go, others become words. `total` is how many images the row has.
fn words(pieces: &[Shown], total: usize) -> String {
    let begin = pieces.iter().position(Shown::is_text).unwrap_or(pieces.len());
    let end = pieces.iter().rposition(Shown::is_text).map_or(begin, |end| end + 1);
    let is_marked = |pieces: &[Shown]| pieces.iter().any(|piece| matches!(piece, Shown::Image(_)));
    let edges = [is_marked(&pieces[..begin]), is_marked(&pieces[begin..end]), is_marked(&pieces[end..])];
    // "Which is larger, <image> or <image>": beside others, a mark at an edge may be part of the sentence.
    let are_several = edges.iter().filter(|edge| **edge).count() > 1;
    let text_at = |index: usize| match pieces.get(index) {
        Some(Shown::Text(text)) => text.as_str(),
        _ => "",
    };
    let joins_begin = are_several && goes_on(text_at(begin));
    let joins_end = are_several && !is_ended(text_at(end.saturating_sub(1)));
    let mut text = String::new();
    let mut after_words = false;
    for (index, piece) in pieces.iter().enumerate() {
        match piece {
            Shown::Text(piece) => {
                if after_words && piece.starts_with(char::is_alphanumeric) {
                    text.push(' ');
                }
                text.push_str(piece);
                after_words = false;
            }
            Shown::Image(image) => {
                if (index < begin && !joins_begin) || (index >= end && !joins_end) {
                    continue;
                }
                if text.ends_with(char::is_alphanumeric) {
                    text.push(' ');
                }
                text.push_str(&named(*image, total));
                after_words = true;
            }
        }
    }
    text.trim().to_owned()
}

/// Whether a text can't begin a sentence of its own.
fn goes_on(text: &str) -> bool {
    !text.starts_with('\n')
        && text.trim_start().starts_with(|c: char| c.is_lowercase() || matches!(c, ',' | ';' | ':' | ')'))
}

fn is_ended(text: &str) -> bool {
    text.ends_with('\n') || text.trim_end().ends_with(['.', '?', '!', ':', '。', '？', '！', '：'])
}

fn named(image: usize, total: usize) -> String {
    const WORDS: [&str; 10] =
        ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"];
    match WORDS.get(image) {
        _ if total == 1 => "the image".into(),
        Some(word) => format!("the {word} image"),
        None => format!("image {}", image + 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(name: &str) -> Picture {
        Picture::File(name.into())
    }

    fn turn(role: Role, text: &str) -> Turn {
        let mut found = Vec::new();
        pieces(text, &|path| Ok(picture(path)), &mut found).unwrap();
        Turn { role, pieces: found }
    }

    fn one(text: &str, images: usize) -> Result<(String, usize), String> {
        let column = (0..images).map(|image| picture(&image.to_string())).collect();
        let (mut said, images) = place(vec![turn(Role::User, text)], column)?;
        Ok((said.remove(0).text, images.len()))
    }

    #[test]
    fn marks_at_edges_go_and_others_become_words() {
        for (text, images, expected) in [
            ("<image>\nWhat is it?", 1, "What is it?"),
            ("<image>What is it?", 1, "What is it?"),
            ("What is it?\n<image>", 1, "What is it?"),
            ("<|image_1|>\nWhat is it?", 1, "What is it?"),
            ("<|vision_start|><|image_pad|><|image_pad|><|vision_end|>What?", 1, "What?"),
            ("<image>./</image>\nWhat?", 1, "What?"),
            ("<image><image>\nWhich is red?", 2, "Which is red?"),
            ("Read <image>.", 1, "Read the image."),
            ("看<image>吧", 1, "看 the image 吧"),
            (
                "First <image> then <image>: which is red?",
                2,
                "First the first image then the second image: which is red?",
            ),
            ("<image> or <image>", 2, "the first image or the second image"),
            ("Which is red, <image> or <image>", 2, "Which is red, the first image or the second image"),
            ("<image>\nCompare with <image>, please.", 2, "Compare with the second image, please."),
            ("<image 1> Is <image 2> like <image 1>?", 2, "Is the second image like the first image?"),
            ("<image_0>\n<image_1>\nWhat?", 2, "What?"),
            ("Picture 1: <img>a.png</img>\nWhat?", 0, "Picture 1: the image\nWhat?"),
            ("<image>", 1, ""),
            ("What?", 2, "What?"),
        ] {
            let images = if text.contains("<img>") { (0, 1) } else { (images, images) };
            assert_eq!(one(text, images.0), Ok((expected.to_owned(), images.1)), "{text}");
        }
    }

    #[test]
    fn marks_and_images_must_be_as_many() {
        for (text, images) in
            [("<image>\nWhat?", 0), ("<image>\nWhat?", 2), ("<image><image>", 1), ("<image 2> What?", 2)]
        {
            let error = one(text, images).unwrap_err();
            assert!(error.contains("marks of images stand"), "{text}: {error}");
        }
        let mut found = Vec::new();
        assert!(pieces("<video>", &|path| Ok(picture(path)), &mut found).unwrap_err().contains("only images"));
    }

    #[test]
    fn images_stand_in_their_turns() {
        let turns =
            vec![turn(Role::User, "<image>\nOne?"), turn(Role::Assistant, "1"), turn(Role::User, "Two, <image>?")];
        let (said, images) = place(turns, vec![picture("a"), picture("b")]).unwrap();
        assert_eq!(images, [picture("a"), picture("b")]);
        let counts: Vec<_> = said.iter().map(|said| (said.text.as_str(), said.images)).collect();
        assert_eq!(counts, [("One?", 1), ("1", 0), ("Two, the second image?", 1)]);
        let drawn = vec![turn(Role::Assistant, "Here: <image>"), turn(Role::User, "And now?")];
        assert!(place(drawn, vec![picture("a")]).unwrap_err().contains("of the assistant"));
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(texts: Vec<String>, images in 0..4_usize, marked in "(<image>|<image [0-9]>|<img>|</img>|a|\n| ){0,8}") {
            let own = |path: &str| Ok(picture(path));
            let mut turns = Vec::new();
            for text in texts.iter().chain([&marked]) {
                let mut found = Vec::new();
                let _ = pieces(text, &own, &mut found);
                turns.push(Turn { role: Role::User, pieces: found });
            }
            let _ = place(turns, vec![picture("a"); images]);
        }
    }
}
