//! The text reader: `PP-OCRv6`'s detector and recogniser, run by `RTen`.

use std::{
    error::Error,
    fmt,
    path::{Path, PathBuf},
};

use ecso::{Cause, Pixels};
use image::{RgbImage, imageops};
use rten::Model;
use rten_tensor::{NdTensor, NdTensorView, prelude::*};

use crate::{
    boxes::{self, Line},
    picture::{Picture, picture},
};

/// The longer side of the detector's input, at most, in pixels: enough to keep small print on a
/// large page legible.
const LONGEST_SIDE: u32 = 1280;
/// Height of the recogniser's input, in pixels.
const LINE_HEIGHT: u32 = 48;
/// Width of the recogniser's input, at most, in pixels. Longer lines are squeezed.
const LINE_WIDTH: u32 = 3200;
/// Text that is read with less confidence is dropped.
const MIN_CONFIDENCE: f32 = 0.5;

/// What can go wrong with a reader.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReaderError {
    /// A file of the reader is missing or damaged.
    Load {
        /// Which file.
        file: PathBuf,
        /// Why.
        cause: Cause,
    },
    /// A network failed on this image.
    Run(Cause),
}

impl fmt::Display for ReaderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Load { file, cause } => {
                write!(f, "the text reader's {} can't be used: {cause}", file.display())
            }
            Self::Run(cause) => write!(f, "the text reader failed: {cause}"),
        }
    }
}

// By hand: the cause's text is part of the error's own, so the source is what the cause came from.
impl Error for ReaderError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Load { cause, .. } | Self::Run(cause) => cause.source(),
        }
    }
}

/// Reads text in images.
pub struct Reader {
    detector: Model,
    recogniser: Model,
    /// The text of each class of the recogniser; class 0 is the blank.
    characters: Vec<String>,
}

/// The text of one image.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct Page {
    /// Its lines, row by row. The lines of a row are next to each other.
    pub rows: Vec<Vec<Line>>,
}

impl Page {
    /// The text in reading order: a line break after each row, a space between lines of one row.
    #[must_use]
    pub fn text(&self) -> String {
        let rows: Vec<String> = self
            .rows
            .iter()
            .map(|row| row.iter().map(|line| line.text.as_str()).collect::<Vec<_>>().join(" "))
            .collect();
        rows.join("\n")
    }

    /// The share of the image that the lines cover, 0 to about 1.
    pub(crate) fn share_of(&self, pixels: &Pixels) -> f32 {
        let covered: f32 = self.rows.iter().flatten().map(|line| line.size.0 * line.size.1).sum();
        #[expect(clippy::cast_precision_loss, reason = "a share")]
        let area = pixels.width() as f32 * pixels.height() as f32;
        covered / area
    }
}

impl Reader {
    /// Loads the detector and the recogniser (`RTen` files) and the recogniser's dictionary (one
    /// character a line).
    pub fn load(
        detector: &Path,
        recogniser: &Path,
        dictionary: &Path,
    ) -> Result<Self, ReaderError> {
        let model = |path: &Path| Model::load_file(path).map_err(|error| unusable(path, error));
        let dictionary_text =
            std::fs::read_to_string(dictionary).map_err(|error| unusable(dictionary, error))?;
        let mut characters = vec![String::new()];
        characters.extend(dictionary_text.lines().map(str::to_owned));
        characters.push(" ".into());
        Ok(Self { detector: model(detector)?, recogniser: model(recogniser)?, characters })
    }

    /// Reads an image. An image without text is an empty page.
    pub fn read(&self, pixels: &Pixels) -> Result<Page, ReaderError> {
        if pixels.width() == 0 || pixels.height() == 0 {
            return Ok(Page::default());
        }
        let image = &picture(pixels);
        let mut lines = Vec::new();
        for found in self.detect(image)? {
            let (text, confidence) = self.recognise(&found.cut(image))?;
            if confidence >= MIN_CONFIDENCE && !text.trim().is_empty() {
                let text = text.trim().to_owned();
                lines.push(Line {
                    text,
                    confidence,
                    center: found.center,
                    size: (found.width, found.height),
                });
            }
        }
        Ok(Page { rows: boxes::reading_order(lines) })
    }

    fn detect(&self, image: &Picture) -> Result<Vec<boxes::TextBox>, ReaderError> {
        let (width, height) = image.dimensions();
        let longest = width.max(height);
        // The network takes sides that are multiples of 32.
        let side = |length: u32| {
            let fitted =
                u64::from(length) * u64::from(longest.min(LONGEST_SIDE)) / u64::from(longest);
            u32::try_from(fitted.div_ceil(32).max(1) * 32).unwrap_or(LONGEST_SIDE)
        };
        let (w, h) = (side(width), side(height));
        let small = imageops::resize(image, w, h, imageops::FilterType::Triangle);
        let input = tensor(&small, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
        let output = self.detector.run_one(input.view().into(), None).map_err(failed)?;
        let map: NdTensor<f32, 4> = output.try_into().map_err(failed)?;
        let [.., rows, columns] = map.shape();
        if rows == 0 || columns == 0 {
            return Err(ReaderError::Run("the detector returned an empty map".into()));
        }
        #[expect(clippy::cast_precision_loss, reason = "pixel counts are far below 2^23")]
        let scale = (width as f32 / columns as f32, height as f32 / rows as f32);
        Ok(boxes::find(map.slice((0, 0)), scale))
    }

    fn recognise(&self, strip: &RgbImage) -> Result<(String, f32), ReaderError> {
        let width =
            u64::from(strip.width()) * u64::from(LINE_HEIGHT) / u64::from(strip.height().max(1));
        let width = u32::try_from(width).unwrap_or(LINE_WIDTH).clamp(8, LINE_WIDTH);
        let line = imageops::resize(strip, width, LINE_HEIGHT, imageops::FilterType::Triangle);
        let input = tensor(&line, [0.5; 3], [0.5; 3]);
        let output = self.recogniser.run_one(input.view().into(), None).map_err(failed)?;
        let steps: NdTensor<f32, 3> = output.try_into().map_err(failed)?;
        Ok(self.decode(steps.slice(0)))
    }

    /// Greedy CTC decoding: the likeliest class of each step, without repeats and blanks; and the
    /// mean probability.
    fn decode(&self, steps: NdTensorView<'_, f32, 2>) -> (String, f32) {
        let (mut text, mut sum, mut count) = (String::new(), 0.0, 0.0_f32);
        let mut last = 0;
        for step in steps.axis_iter(0) {
            let ranked = step.iter().copied().enumerate().max_by(|a, b| a.1.total_cmp(&b.1));
            let (class, probability) = ranked.unwrap_or_default();
            if class != last && class != 0 {
                text.push_str(self.characters.get(class).map_or("", String::as_str));
                sum += probability;
                count += 1.0;
            }
            last = class;
        }
        (text, if count > 0.0 { sum / count } else { 0.0 })
    }
}

/// Pixels as the networks take them: shape [1, 3, height, width], blue first, normalised.
fn tensor(image: &RgbImage, mean: [f32; 3], deviation: [f32; 3]) -> NdTensor<f32, 4> {
    let (width, height) = (image.width() as usize, image.height() as usize);
    let raw = image.as_raw();
    NdTensor::from_fn([1, 3, height, width], |[_, channel, y, x]| {
        let value = f32::from(raw[(y * width + x) * 3 + (2 - channel)]) / 255.0;
        (value - mean[channel]) / deviation[channel]
    })
}

fn unusable(path: &Path, error: impl Error + Send + Sync + 'static) -> ReaderError {
    ReaderError::Load { file: path.to_owned(), cause: Cause::new(error.to_string(), error) }
}

fn failed(error: impl Error + Send + Sync + 'static) -> ReaderError {
    ReaderError::Run(Cause::new(error.to_string(), error))
}
