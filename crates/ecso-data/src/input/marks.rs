//! Places images: the placeholders (marks) that trainers write into texts, and parts of a turn that
//! are images.
//!
//! A mark at the beginning or end of its turn is removed, since images precede the text of their
//! turn. A mark within a sentence is part of it, and becomes words: "the first image".

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    sync::LazyLock,
};

use ecso::{Cause, Role};
use regex_lite::Regex;

use crate::row::{EarlierTurn, ImageSource};

/// A turn before its images are placed.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Turn {
    pub(super) role: Role,
    pub(super) pieces: Vec<Piece>,
}

/// A piece of a turn.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Piece {
    Text(String),
    /// The next image of the row's column, or the one with this number.
    Mark(Option<usize>),
    /// An image in the turn itself.
    Inline(ImageSource),
}

/// `<image>` as LLaVA, LLaMA-Factory and ms-swift write it, numbered marks of MMMU and Phi, and the
/// marks of models.
static MARKS: LazyLock<Option<Regex>> = LazyLock::new(|| {
    let marks = concat!(
        r"(?i)\(<image>\./</image>\)|<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>",
        r"|<\|image_pad\|>|<img>(?P<path>[^<>\n]*)</img>",
        r"|<image>(?:\./)?</image>|<image>|<\|?image[ _]?(?P<number>\d{1,3})\|?>|<\|image\|>",
        r"|<start_of_image>|<image_placeholder>|(?:<img>)?<ImageHere>(?:</img>)?",
    );
    Regex::new(marks).ok()
});

impl Piece {
    fn number(&self) -> Option<usize> {
        if let Self::Mark(number) = self { *number } else { None }
    }
}

/// The number of a text that is a numbered mark, such as `<image_00>`.
pub(super) fn number(text: &str) -> Option<usize> {
    let captures = MARKS
        .as_ref()?
        .captures(text)
        .filter(|captures| captures.get(0).is_some_and(|whole| whole.as_str() == text))?;
    captures.name("number")?.as_str().parse().ok()
}

/// Marks of other media.
const OTHER_MEDIA: [&str; 5] = ["<video>", "<audio>", "<|video_pad|>", "<|video|>", "<|audio|>"];

/// Splits a text at its marks. `to_image` turns the path in a mark into an image.
pub(super) fn split(
    text: &str,
    to_image: &dyn Fn(&str) -> Result<ImageSource, Cause>,
    pieces: &mut Vec<Piece>,
) -> Result<(), Cause> {
    if let Some(other) = OTHER_MEDIA.iter().find(|other| text.contains(**other)) {
        return Err(format!(
            "the text has `{other}`, which is not supported; of media, only images are"
        )
        .into());
    }
    let mut rest = 0;
    for captures in MARKS.iter().flat_map(|marks| marks.captures_iter(text)) {
        let Some(whole) = captures.get(0) else { continue };
        if rest < whole.start() {
            pieces.push(Piece::Text(text[rest..whole.start()].to_owned()));
        }
        rest = whole.end();
        let path =
            captures.name("path").map(|path| path.as_str().trim()).filter(|path| !path.is_empty());
        let number = || captures.name("number").and_then(|number| number.as_str().parse().ok());
        pieces.push(match path {
            Some(path) => Piece::Inline(to_image(path)?),
            None => Piece::Mark(number()),
        });
    }
    if rest < text.len() {
        pieces.push(Piece::Text(text[rest..].to_owned()));
    }
    Ok(())
}

/// Assigns images to marks. `column` has the row's images that are in no turn. Without any marks
/// they belong to the user's first turn, as for trainers. Returns the turns as text, and all images
/// in order.
pub(super) fn place(
    mut turns: Vec<Turn>,
    column: &[ImageSource],
) -> Result<(Vec<EarlierTurn>, Vec<ImageSource>), Cause> {
    move_inline_to_marks(&mut turns);
    let marks = Marks::collect(&turns);
    marks.check(column)?;
    let mut images = Vec::new();
    let mut next = column.iter();
    // Indices of numbered images.
    let mut indices: BTreeMap<usize, usize> = BTreeMap::new();
    let mut placed = Vec::with_capacity(turns.len());
    let first = turns.iter().position(|turn| turn.role == Role::User);
    for (index, turn) in turns.into_iter().enumerate() {
        let before = images.len();
        if Some(index) == first && marks.are_none() {
            images.extend(column.iter().cloned());
        }
        // Numbered images are in the order of their numbers.
        for number in turn.pieces.iter().filter_map(Piece::number).collect::<BTreeSet<usize>>() {
            if let (Entry::Vacant(free), Some(image)) =
                (indices.entry(number), column.get(number - marks.first_number))
            {
                free.insert(images.len());
                images.push(image.clone());
            }
        }
        let mut pieces = Vec::with_capacity(turn.pieces.len());
        for piece in turn.pieces {
            let image = match piece {
                Piece::Text(text) => {
                    pieces.push(Placed::Text(text));
                    continue;
                }
                Piece::Mark(Some(number)) => {
                    pieces.extend(indices.get(&number).copied().map(Placed::Image));
                    continue;
                }
                Piece::Mark(None) => next.next().cloned(),
                Piece::Inline(image) => Some(image),
            };
            pieces.extend(image.is_some().then_some(Placed::Image(images.len())));
            images.extend(image);
        }
        let count = images.len() - before;
        if count > 0 && turn.role != Role::User {
            return Err(format!(
                "images in a turn of the {} are not supported",
                turn.role.as_str()
            )
            .into());
        }
        placed.push((turn.role, pieces, count));
    }
    let turns = placed.into_iter().map(|(role, pieces, count)| EarlierTurn {
        role,
        text: text(&pieces, images.len()),
        images: count,
    });
    Ok((turns.collect(), images))
}

/// Assigns the images from `first` on to the marks of a single turn, and returns its text.
pub(super) fn place_in_turn(
    turn: Turn,
    images: &mut Vec<ImageSource>,
    first: usize,
) -> Result<String, Cause> {
    let (mut turns, placed) = place(vec![turn], &images.split_off(first))?;
    images.extend(placed);
    Ok(turns.pop().map(|turn| turn.text).unwrap_or_default())
}

/// The marks and inline images of a row.
struct Marks {
    /// Number of marks without a number.
    plain: usize,
    /// Numbers of the other marks.
    numbers: BTreeSet<usize>,
    /// The number of the first image: 0 or 1.
    first_number: usize,
    /// Images in the turns.
    inline: Vec<ImageSource>,
}

impl Marks {
    fn collect(turns: &[Turn]) -> Self {
        let mut marks =
            Self { plain: 0, numbers: BTreeSet::new(), first_number: 1, inline: Vec::new() };
        for piece in turns.iter().flat_map(|turn| &turn.pieces) {
            match piece {
                Piece::Text(_) => {}
                Piece::Mark(None) => marks.plain += 1,
                Piece::Mark(Some(number)) => marks.numbers.extend([*number]),
                Piece::Inline(image) => marks.inline.push(image.clone()),
            }
        }
        marks.first_number = usize::from(!marks.numbers.contains(&0));
        marks
    }

    fn are_none(&self) -> bool {
        self.plain == 0 && self.numbers.is_empty() && self.inline.is_empty()
    }

    /// Checks that each image of the column has a mark, and each mark an image.
    fn check(&self, column: &[ImageSource]) -> Result<(), Cause> {
        if self.plain > 0 && !self.numbers.is_empty() {
            return Err(
                "the row has numbered and unnumbered image placeholders; use one kind".into()
            );
        }
        let (marks, images) = (self.plain + self.numbers.len(), column.len());
        if marks == 0 {
            // The column may repeat the images in the turns.
            if self.inline.is_empty() || column.is_empty() || self.inline == column {
                return Ok(());
            }
            let inline = self.inline.len();
            return Err(format!(
                "the row has images in its turns ({inline}) and in a column ({images}), but no \
                 placeholders for the latter"
            )
            .into());
        }
        let last = self.numbers.last().map(|last| last + 1 - self.first_number);
        if marks == images && last.is_none_or(|last| last == images) {
            return Ok(());
        }
        Err(format!(
            "the text has {marks} image placeholders, but the row has {images} images for them"
        )
        .into())
    }
}

/// Moves the inline images of a turn to its marks, if it has a mark for each.
fn move_inline_to_marks(turns: &mut [Turn]) {
    for turn in turns {
        let (inline, others): (Vec<Piece>, Vec<Piece>) =
            turn.pieces.iter().cloned().partition(|piece| matches!(piece, Piece::Inline(_)));
        let marks = others.iter().filter(|piece| matches!(piece, Piece::Mark(None))).count();
        if marks > 0 && marks == inline.len() {
            let mut inline = inline.into_iter();
            let replace = |piece| {
                if matches!(piece, Piece::Mark(None)) { inline.next() } else { Some(piece) }
            };
            turn.pieces = others.into_iter().filter_map(replace).collect();
        }
    }
}

/// A piece of a turn whose images are indices.
enum Placed {
    Text(String),
    Image(usize),
}

impl Placed {
    fn is_text(&self) -> bool {
        matches!(self, Self::Text(text) if !text.trim().is_empty())
    }
}

/// The text of a turn: marks at its edges are removed, others become words. `total` is the row's
/// number of images.
fn text(pieces: &[Placed], total: usize) -> String {
    let begin = pieces.iter().position(Placed::is_text).unwrap_or(pieces.len());
    let end = pieces.iter().rposition(Placed::is_text).map_or(begin, |end| end + 1);
    let has_image =
        |pieces: &[Placed]| pieces.iter().any(|piece| matches!(piece, Placed::Image(_)));
    let parts =
        [has_image(&pieces[..begin]), has_image(&pieces[begin..end]), has_image(&pieces[end..])];
    // "Which is larger, <image> or <image>": if there are other marks, one at an edge may be part
    // of the sentence.
    let are_several = parts.iter().filter(|has_image| **has_image).count() > 1;
    let text_at = |index: usize| match pieces.get(index) {
        Some(Placed::Text(text)) => text.as_str(),
        _ => "",
    };
    let keeps_first = are_several && continues_sentence(text_at(begin));
    let keeps_last = are_several && !ends_sentence(text_at(end.saturating_sub(1)));
    let mut text = String::new();
    let mut follows_image = false;
    for (index, piece) in pieces.iter().enumerate() {
        match piece {
            Placed::Text(piece) => {
                if follows_image && piece.starts_with(char::is_alphanumeric) {
                    text.push(' ');
                }
                text.push_str(piece);
                follows_image = false;
            }
            Placed::Image(image) => {
                if (index < begin && !keeps_first) || (index >= end && !keeps_last) {
                    continue;
                }
                if text.ends_with(char::is_alphanumeric) {
                    text.push(' ');
                }
                text.push_str(&image_name(*image, total));
                follows_image = true;
            }
        }
    }
    text.trim().to_owned()
}

/// Whether a text continues a sentence.
fn continues_sentence(text: &str) -> bool {
    !text.starts_with('\n')
        && text
            .trim_start()
            .starts_with(|c: char| c.is_lowercase() || matches!(c, ',' | ';' | ':' | ')'))
}

fn ends_sentence(text: &str) -> bool {
    text.ends_with('\n') || text.trim_end().ends_with(['.', '?', '!', ':', '。', '？', '！', '：'])
}

/// "the image", "the first image", …
fn image_name(image: usize, total: usize) -> String {
    const ORDINALS: [&str; 10] = [
        "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth",
        "tenth",
    ];
    match ORDINALS.get(image) {
        _ if total == 1 => "the image".into(),
        Some(ordinal) => format!("the {ordinal} image"),
        None => format!("image {}", image + 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(name: &str) -> ImageSource {
        ImageSource::File(name.into())
    }

    fn turn(role: Role, text: &str) -> Turn {
        let mut pieces = Vec::new();
        split(text, &|path| Ok(image(path)), &mut pieces).unwrap();
        Turn { role, pieces }
    }

    fn place_one(text: &str, images: usize) -> Result<(String, usize), Cause> {
        let column: Vec<ImageSource> =
            (0..images).map(|number| image(&number.to_string())).collect();
        let (mut turns, images) = place(vec![turn(Role::User, text)], &column)?;
        Ok((turns.remove(0).text, images.len()))
    }

    #[test]
    fn marks_at_edges_are_removed_and_others_become_words() {
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
            (
                "Which is red, <image> or <image>",
                2,
                "Which is red, the first image or the second image",
            ),
            ("<image>\nCompare with <image>, please.", 2, "Compare with the second image, please."),
            (
                "<image 1> Is <image 2> like <image 1>?",
                2,
                "Is the second image like the first image?",
            ),
            ("<image_0>\n<image_1>\nWhat?", 2, "What?"),
            ("ImageSource 1: <img>a.png</img>\nWhat?", 0, "ImageSource 1: the image\nWhat?"),
            ("<image>", 1, ""),
            ("What?", 2, "What?"),
        ] {
            let images = if text.contains("<img>") { (0, 1) } else { (images, images) };
            assert_eq!(place_one(text, images.0), Ok((expected.to_owned(), images.1)), "{text}");
        }
    }

    #[test]
    fn every_mark_needs_an_image() {
        for (text, images) in [
            ("<image>\nWhat?", 0),
            ("<image>\nWhat?", 2),
            ("<image><image>", 1),
            ("<image 2> What?", 2),
        ] {
            let error = place_one(text, images).unwrap_err();
            assert!(error.message().contains("image placeholders, but"), "{text}: {error}");
        }
        let error = split("<video>", &|path| Ok(image(path)), &mut Vec::new()).unwrap_err();
        assert!(error.message().contains("only images"), "{error}");
    }

    #[test]
    fn images_belong_to_the_turns_of_their_marks() {
        let turns = vec![
            turn(Role::User, "<image>\nOne?"),
            turn(Role::Assistant, "1"),
            turn(Role::User, "Two, <image>?"),
        ];
        let (placed, images) = place(turns, &[image("a"), image("b")]).unwrap();
        assert_eq!(images, [image("a"), image("b")]);
        let counts: Vec<_> = placed.iter().map(|turn| (turn.text.as_str(), turn.images)).collect();
        assert_eq!(counts, [("One?", 1), ("1", 0), ("Two, the second image?", 1)]);
        let unmarked = vec![
            turn(Role::System, "Hi."),
            turn(Role::User, "One?"),
            turn(Role::Assistant, "1"),
            turn(Role::User, "Two?"),
        ];
        let (placed, _) = place(unmarked, &[image("a"), image("b")]).unwrap();
        let counts: Vec<_> = placed.iter().map(|turn| turn.images).collect();
        assert_eq!(counts, [0, 2, 0, 0]);
        let drawn = vec![turn(Role::Assistant, "Here: <image>"), turn(Role::User, "And now?")];
        assert!(place(drawn, &[image("a")]).unwrap_err().message().contains("of the assistant"));
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(
            texts: Vec<String>,
            images in 0..4_usize,
            marked in "(<image>|<image [0-9]>|<img>|</img>|a|\n| ){0,8}",
        ) {
            let to_image = |path: &str| Ok(image(path));
            let mut turns = Vec::new();
            for text in texts.iter().chain([&marked]) {
                let mut pieces = Vec::new();
                let _ = split(text, &to_image, &mut pieces);
                turns.push(Turn { role: Role::User, pieces });
            }
            let _ = place(turns, &vec![image("a"); images]);
        }
    }
}
