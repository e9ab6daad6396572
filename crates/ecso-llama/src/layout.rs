//! A prompt as the segments in which it is computed.
//!
//! Floating-point sums depend on how many tokens are computed together. So the segments depend on
//! the prompt alone, never on the cache: an image with the text before it is one segment; other
//! text is cut at the end of each part of a turn, and into blocks of [`BLOCK`] tokens. A cached
//! prefix of whole segments is then exact.

use ecso::Digest;
use llama_cpp_2::token::LlamaToken;

use crate::template::CUT;

/// Tokens of text that are computed together.
pub(crate) const BLOCK: usize = 128;
/// About the tokens of an image, which vary with the model.
const IMAGE_TOKENS: usize = 256;

/// How far the content of a sequence reaches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct End {
    /// The position of what comes next.
    pub(crate) position: i32,
    /// The cells of the sequence's memory that are taken. Each patch of an image takes one, but
    /// some models (M-RoPE) give them fewer positions.
    pub(crate) cells: usize,
}

impl End {
    /// The end after more tokens of text.
    pub(crate) fn after_text(self, tokens: usize) -> Self {
        let positions = i32::try_from(tokens).unwrap_or(i32::MAX);
        Self { position: self.position.saturating_add(positions), cells: self.cells + tokens }
    }

    /// The end after an image that takes `cells` and ends at `position`.
    pub(crate) fn after_image(self, cells: usize, position: i32) -> Self {
        Self { position, cells: self.cells + cells }
    }
}

/// One segment of a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Segment {
    /// Text: at most [`BLOCK`] tokens.
    Text(Vec<LlamaToken>),
    /// An image, by its number in the conversation and its digest, with the text before it, which
    /// has about so many tokens.
    Image { before: String, tokens: usize, number: usize, digest: Digest },
}

impl Segment {
    /// The number of its text tokens.
    pub(crate) fn tokens(&self) -> usize {
        match self {
            Self::Text(tokens) => tokens.len(),
            Self::Image { tokens, .. } => *tokens,
        }
    }

    /// Whether it is an image, whose size is not known before it is decoded.
    pub(crate) fn is_image(&self) -> bool {
        matches!(self, Self::Image { .. })
    }

    /// About the work that computing it takes, in tokens.
    pub(crate) fn size(&self) -> usize {
        match self {
            Self::Text(tokens) => tokens.len(),
            Self::Image { tokens, .. } => IMAGE_TOKENS + tokens,
        }
    }

    /// Whether computing one gives the same result as computing the other.
    pub(crate) fn same_as(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Text(tokens), Self::Text(others)) => tokens == others,
            (
                Self::Image { before, digest, .. },
                Self::Image { before: text, digest: other, .. },
            ) => before == text && digest == other,
            _ => false,
        }
    }
}

/// Lays out a rendered prompt: the text pieces between its images, and the images' digests.
/// `tokenize` turns text into tokens; its flag says whether this is the start of the prompt.
pub(crate) fn lay_out(
    rendered: &str,
    marker: &str,
    digests: &[Digest],
    tokenize: impl Fn(&str, bool) -> Vec<LlamaToken>,
) -> Vec<Segment> {
    let mut pieces = rendered.split(marker);
    let mut segments: Vec<Segment> = digests
        .iter()
        .zip(pieces.by_ref())
        .enumerate()
        .map(|(number, (digest, before))| {
            let before = before.replace(CUT, "");
            let tokens = tokenize(&before, number == 0).len();
            Segment::Image { before, tokens, number, digest: *digest }
        })
        .collect();
    for part in pieces.next().unwrap_or_default().split(CUT) {
        let tokens = tokenize(part, segments.is_empty());
        segments.extend(tokens.chunks(BLOCK).map(|block| Segment::Text(block.to_vec())));
    }
    segments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_patches_of_an_image_take_more_cells_than_positions() {
        let end = End::default().after_text(10).after_image(32 * 24, 10 + 32).after_text(5);
        assert_eq!(end, End { position: 47, cells: 783 });
    }

    #[test]
    fn images_come_with_the_text_before_them_and_parts_in_blocks() {
        let digests = ["a", "b"].map(|url| ecso::Image::from_url(url).digest());
        let tokenize = |text: &str, _| -> Vec<LlamaToken> {
            text.bytes().map(|b| LlamaToken(i32::from(b))).collect()
        };
        let tail = "t".repeat(BLOCK + 1);
        let segments =
            lay_out(&format!("one<i>{CUT}two<i>part{CUT}{tail}"), "<i>", &digests, tokenize);
        let shapes: Vec<(String, usize)> = segments
            .iter()
            .map(|segment| match segment {
                Segment::Image { before, tokens, .. } => (before.clone(), *tokens),
                Segment::Text(tokens) => (String::new(), tokens.len()),
            })
            .collect();
        assert_eq!(
            shapes,
            [
                ("one".into(), 3),
                ("two".into(), 3),
                (String::new(), 4),
                (String::new(), BLOCK),
                (String::new(), 1)
            ]
        );
    }
}
