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

/// One segment of a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Segment {
    /// Text: at most [`BLOCK`] tokens.
    Text(Vec<LlamaToken>),
    /// An image, by its number in the conversation and its digest, with the text before it.
    Image { before: String, number: usize, digest: Digest },
}

impl Segment {
    /// The number of its text tokens.
    pub(crate) fn tokens(&self) -> i32 {
        match self {
            Self::Text(tokens) => i32::try_from(tokens.len()).unwrap_or(i32::MAX),
            Self::Image { .. } => 0,
        }
    }

    /// About the work that computing it takes, in tokens.
    pub(crate) fn size(&self) -> usize {
        match self {
            Self::Text(tokens) => tokens.len(),
            Self::Image { before, .. } => IMAGE_TOKENS + before.len() / 4,
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
/// `tokenize` turns the text after the last image (or all of it) into tokens; its flag says whether
/// this is the start of the prompt.
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
        .map(|(number, (digest, before))| Segment::Image {
            before: before.replace(CUT, ""),
            number,
            digest: *digest,
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
                Segment::Image { before, number, .. } => (before.clone(), *number),
                Segment::Text(tokens) => (String::new(), tokens.len()),
            })
            .collect();
        assert_eq!(
            shapes,
            [
                ("one".into(), 0),
                ("two".into(), 1),
                (String::new(), 4),
                (String::new(), BLOCK),
                (String::new(), 1)
            ]
        );
    }
}
