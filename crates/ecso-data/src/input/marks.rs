//! Where images stand: the marks that trainers write into texts, and parts of a turn that are
//! images.
//!
//! A mark at the beginning or end of its turn is removed, since images stand before the text of
//! their turn. One in mid-sentence is part of what is said, so it becomes words: "the first image".

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    sync::LazyLock,
};

use ecso::{Cause, Role};
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

/// `<image>` as LLaVA, LLaMA-Factory and ms-swift write it, numbered as MMMU and Phi do, and what
/// models have as their own.
static MARKS: LazyLock<Option<Regex>> = LazyLock::new(|| {
    let marks = concat!(
        r"(?i)\(<image>\./</image>\)|<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>|<\|image_pad\|>|<img>(?P<path>[^<>\n]*)</img>",
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

/// The number of a text that is a mark with one, as `<image_00>`.
pub(super) fn number(text: &str) -> Option<usize> {
    let found = MARKS
        .as_ref()?
        .captures(text)
        .filter(|found| found.get(0).is_some_and(|whole| whole.as_str() == text))?;
    found.name("number")?.as_str().parse().ok()
}

/// Marks of what no image is.
const OTHERS: [&str; 5] = ["<video>", "<audio>", "<|video_pad|>", "<|video|>", "<|audio|>"];

/// Takes a text apart at its marks. `own` makes the image of a path that stands in one.
pub(super) fn pieces(
    text: &str,
    own: &dyn Fn(&str) -> Result<Picture, Cause>,
    pieces: &mut Vec<Piece>,
) -> Result<(), Cause> {
    if let Some(other) = OTHERS.iter().find(|other| text.contains(**other)) {
        return Err(format!(
            "`{other}` stands in the text; of what is shown, only images are understood"
        )
        .into());
    }
    let mut rest = 0;
    for found in MARKS.iter().flat_map(|marks| marks.captures_iter(text)) {
        let Some(whole) = found.get(0) else { continue };
        if rest < whole.start() {
            pieces.push(Piece::Text(text[rest..whole.start()].to_owned()));
        }
        rest = whole.end();
        let path =
            found.name("path").map(|path| path.as_str().trim()).filter(|path| !path.is_empty());
        pieces.push(match path {
            Some(path) => Piece::Own(own(path)?),
            None => {
                Piece::Mark(found.name("number").and_then(|number| number.as_str().parse().ok()))
            }
        });
    }
    if rest < text.len() {
        pieces.push(Piece::Text(text[rest..].to_owned()));
    }
    Ok(())
}

/// Gives every mark its image: `column` are the row's images that stand in no turn. Where nothing
/// says where they belong, they stand in the user's first turn, as trainers read them. Gives the
/// turns as text, and all images in order.
pub(super) fn place(
    mut turns: Vec<Turn>,
    column: &[Picture],
) -> Result<(Vec<Said>, Vec<Picture>), Cause> {
    repeat_own(&mut turns);
    let marked = Marked::of(&turns);
    marked.fits(column)?;
    let mut images = Vec::new();
    let mut next = column.iter();
    // Where a numbered image has gone.
    let mut places: BTreeMap<usize, usize> = BTreeMap::new();
    let mut done = Vec::with_capacity(turns.len());
    let first = turns.iter().position(|turn| turn.role == Role::User);
    for (index, turn) in turns.into_iter().enumerate() {
        let before = images.len();
        if Some(index) == first && marked.says_nothing() {
            images.extend(column.iter().cloned());
        }
        // Of several with a number the lower stands first.
        for number in turn.pieces.iter().filter_map(Piece::number).collect::<BTreeSet<usize>>() {
            if let (Entry::Vacant(free), Some(picture)) =
                (places.entry(number), column.get(number - marked.first))
            {
                free.insert(images.len());
                images.push(picture.clone());
            }
        }
        let mut shown = Vec::with_capacity(turn.pieces.len());
        for piece in turn.pieces {
            let picture = match piece {
                Piece::Text(text) => {
                    shown.push(Shown::Text(text));
                    continue;
                }
                Piece::Mark(Some(number)) => {
                    shown.extend(places.get(&number).copied().map(Shown::Image));
                    continue;
                }
                Piece::Mark(None) => next.next().cloned(),
                Piece::Own(picture) => Some(picture),
            };
            shown.extend(picture.is_some().then_some(Shown::Image(images.len())));
            images.extend(picture);
        }
        let count = images.len() - before;
        if count > 0 && turn.role != Role::User {
            return Err(
                format!("an image in a turn of the {} can't be used", turn.role.as_str()).into()
            );
        }
        done.push((turn.role, shown, count));
    }
    let said = done.into_iter().map(|(role, shown, count)| Said {
        role,
        text: words(&shown, images.len()),
        images: count,
    });
    Ok((said.collect(), images))
}

/// The text of a turn that is all there is to the images from `first` on.
pub(super) fn alone(turn: Turn, images: &mut Vec<Picture>, first: usize) -> Result<String, Cause> {
    let (mut said, placed) = place(vec![turn], &images.split_off(first))?;
    images.extend(placed);
    Ok(said.pop().map(|said| said.text).unwrap_or_default())
}

/// What the turns of a row say about its images.
struct Marked {
    /// Marks without a number.
    plain: usize,
    /// Numbers of marks.
    numbers: BTreeSet<usize>,
    /// Where these begin: some count from 0.
    first: usize,
    /// Images that stand in the turns.
    own: Vec<Picture>,
}

impl Marked {
    fn of(turns: &[Turn]) -> Self {
        let mut marked = Self { plain: 0, numbers: BTreeSet::new(), first: 1, own: Vec::new() };
        for piece in turns.iter().flat_map(|turn| &turn.pieces) {
            match piece {
                Piece::Text(_) => {}
                Piece::Mark(None) => marked.plain += 1,
                Piece::Mark(Some(number)) => marked.numbers.extend([*number]),
                Piece::Own(picture) => marked.own.push(picture.clone()),
            }
        }
        marked.first = usize::from(!marked.numbers.contains(&0));
        marked
    }

    fn says_nothing(&self) -> bool {
        self.plain == 0 && self.numbers.is_empty() && self.own.is_empty()
    }

    /// Whether there is a mark for each image of the column, and an image for each mark.
    fn fits(&self, column: &[Picture]) -> Result<(), Cause> {
        if self.plain > 0 && !self.numbers.is_empty() {
            return Err("marks of images with a number and marks without stand in one row".into());
        }
        let (marks, images) = (self.plain + self.numbers.len(), column.len());
        if marks == 0 {
            // The column may say once more what stands in the turns.
            if self.own.is_empty() || column.is_empty() || self.own == column {
                return Ok(());
            }
            let own = self.own.len();
            return Err(format!(
                "images stand in the turns ({own}) and beside them ({images}), and nothing says where the latter belong"
            )
            .into());
        }
        let last = self.numbers.last().map(|last| last + 1 - self.first);
        if marks == images && last.is_none_or(|last| last == images) {
            return Ok(());
        }
        Err(format!(
            "marks of images in the text: {marks}; images that the row has for them: {images}"
        )
        .into())
    }
}

/// A turn whose images stand in it may have a mark for each as well: then the images stand where
/// the marks do.
fn repeat_own(turns: &mut [Turn]) {
    for turn in turns {
        let (own, others): (Vec<Piece>, Vec<Piece>) =
            turn.pieces.iter().cloned().partition(|piece| matches!(piece, Piece::Own(_)));
        let marks = others.iter().filter(|piece| matches!(piece, Piece::Mark(None))).count();
        if marks > 0 && marks == own.len() {
            let mut own = own.into_iter();
            let stands =
                |piece| if matches!(piece, Piece::Mark(None)) { own.next() } else { Some(piece) };
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

/// The text of a turn: marks at its edges go, others become words. `total` is how many images the
/// row has.
fn words(pieces: &[Shown], total: usize) -> String {
    let begin = pieces.iter().position(Shown::is_text).unwrap_or(pieces.len());
    let end = pieces.iter().rposition(Shown::is_text).map_or(begin, |end| end + 1);
    let is_marked = |pieces: &[Shown]| pieces.iter().any(|piece| matches!(piece, Shown::Image(_)));
    let edges =
        [is_marked(&pieces[..begin]), is_marked(&pieces[begin..end]), is_marked(&pieces[end..])];
    // "Which is larger, <image> or <image>": beside others, a mark at an edge may be part of the
    // sentence.
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
        && text
            .trim_start()
            .starts_with(|c: char| c.is_lowercase() || matches!(c, ',' | ';' | ':' | ')'))
}

fn is_ended(text: &str) -> bool {
    text.ends_with('\n') || text.trim_end().ends_with(['.', '?', '!', ':', '。', '？', '！', '：'])
}

fn named(image: usize, total: usize) -> String {
    const WORDS: [&str; 10] = [
        "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth",
        "tenth",
    ];
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

    fn one(text: &str, images: usize) -> Result<(String, usize), Cause> {
        let column: Vec<Picture> = (0..images).map(|image| picture(&image.to_string())).collect();
        let (mut said, images) = place(vec![turn(Role::User, text)], &column)?;
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
        for (text, images) in [
            ("<image>\nWhat?", 0),
            ("<image>\nWhat?", 2),
            ("<image><image>", 1),
            ("<image 2> What?", 2),
        ] {
            let error = one(text, images).unwrap_err();
            assert!(error.message().contains("marks of images in the text"), "{text}: {error}");
        }
        let mut found = Vec::new();
        assert!(
            pieces("<video>", &|path| Ok(picture(path)), &mut found)
                .unwrap_err()
                .message()
                .contains("only images")
        );
    }

    #[test]
    fn images_stand_in_their_turns() {
        let turns = vec![
            turn(Role::User, "<image>\nOne?"),
            turn(Role::Assistant, "1"),
            turn(Role::User, "Two, <image>?"),
        ];
        let (said, images) = place(turns, &[picture("a"), picture("b")]).unwrap();
        assert_eq!(images, [picture("a"), picture("b")]);
        let counts: Vec<_> = said.iter().map(|said| (said.text.as_str(), said.images)).collect();
        assert_eq!(counts, [("One?", 1), ("1", 0), ("Two, the second image?", 1)]);
        let unmarked = vec![
            turn(Role::System, "Hi."),
            turn(Role::User, "One?"),
            turn(Role::Assistant, "1"),
            turn(Role::User, "Two?"),
        ];
        let (said, _) = place(unmarked, &[picture("a"), picture("b")]).unwrap();
        assert_eq!(said.iter().map(|said| said.images).collect::<Vec<_>>(), [0, 2, 0, 0]);
        let drawn = vec![turn(Role::Assistant, "Here: <image>"), turn(Role::User, "And now?")];
        assert!(place(drawn, &[picture("a")]).unwrap_err().message().contains("of the assistant"));
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
            let _ = place(turns, &vec![picture("a"); images]);
        }
    }
}
