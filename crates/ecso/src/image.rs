//! Images: checked by their header when they are created, decoded once, and only if pixels are
//! read.

use std::{
    error::Error,
    fmt,
    fs::File,
    io::{self, Cursor, Read as _},
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use bytes::Bytes;
use image::{ImageDecoder, ImageFormat, ImageReader, RgbImage, RgbaImage};
use serde_json::{Map, Value};

use crate::{data_url::decode_data_url, mllm::Cause};
use foreign::Foreign;

#[cfg(feature = "avif")]
mod avif;
pub mod decoder_process;
mod ending;
mod foreign;
#[cfg(feature = "heic")]
mod heic;
#[cfg(any(feature = "heic", feature = "avif"))]
mod heif;
#[cfg(feature = "pdf")]
mod pdf;

/// Limits on images. They are checked *before* anything is decoded.
///
/// ```
/// use ecso::Limits;
///
/// let small = Limits { bytes: 1 << 20, pixels: 1_000_000, ..Limits::default() };
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Largest encoded size, in bytes.
    pub bytes: usize,
    /// Largest width times height, in pixels. A decoder may use at most 16 bytes of memory for each
    /// pixel.
    pub pixels: u64,
    /// What to do with an image whose end is missing.
    pub truncated: Truncated,
    /// Most pages of a document. Together they may have as many bytes and pixels as one image.
    pub pages: usize,
}

impl Limits {
    /// 20 MiB and 40 megapixels; images whose end is missing are refused; 20 pages.
    pub const DEFAULT: Self =
        Self { bytes: 20 << 20, pixels: 40_000_000, truncated: Truncated::Refuse, pages: 20 };
}

impl Default for Limits {
    /// [`Limits::DEFAULT`].
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// What to do with an image whose end is missing, as after a broken download.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Truncated {
    /// Refuse it with [`ImageError::Truncated`].
    Refuse,
    /// Take it as it is, with a warning in the log. The missing part of a JPEG is then grey; other
    /// decoders mostly fail.
    Accept,
}

/// What is wrong with an image.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ImageError {
    /// The file can't be read, or is not an image that can be used.
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        cause: Cause,
    },
    /// A data URL, or base64, that can't be read.
    DataUrl(Cause),
    /// No bytes at all.
    Empty,
    /// More encoded bytes than [`Limits::bytes`].
    TooManyBytes {
        /// The image's bytes.
        actual: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// More pixels than [`Limits::pixels`].
    TooManyPixels {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// Pixels allowed.
        limit: u64,
    },
    /// The bytes are in none of the formats that are read.
    NotAnImage,
    /// The end is missing, and [`Limits::truncated`] refuses that.
    Truncated {
        /// The format that the first bytes claim.
        format: &'static str,
    },
    /// A known format that this build does not read.
    FeatureDisabled {
        /// The format, with its article.
        what: &'static str,
        /// The Cargo feature of this crate, and of the program, that reads it.
        feature: &'static str,
    },
    /// Models don't read the format, and it could not be converted.
    Unconverted {
        /// The format, with its article.
        what: &'static str,
        /// Why. A text alone: it comes from another process (see [`decoder_process`]).
        reason: String,
    },
    /// A document with this many pages, where a single image is expected.
    SeveralPages(usize),
    /// The format is known, but the content is damaged.
    Broken {
        /// The format that the first bytes claim.
        format: &'static str,
        /// The decoder's error.
        cause: Cause,
    },
    /// The image is known by its URL only, so it has no pixels.
    NotFetched,
    /// The image is known by a description only, so it has no pixels.
    OnlyDescribed,
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, cause } => write!(f, "{}: {cause}", path.display()),
            Self::DataUrl(cause) => write!(f, "the image's data URL can't be read: {cause}"),
            Self::Empty => f.write_str("the image is empty (0 bytes)"),
            Self::TooManyBytes { actual, limit } => {
                write!(f, "the image has {actual} bytes; at most {limit} are allowed")
            }
            Self::TooManyPixels { width, height, limit } => write!(
                f,
                "the image has {width} x {height} pixels; at most {limit} in all are allowed"
            ),
            Self::NotAnImage => {
                f.write_str("this is not an image in a supported format (JPEG, PNG, WebP, GIF)")
            }
            Self::Truncated { format } => write!(
                f,
                "the {format} is broken: its end is missing (images.truncated = \"accept\" \
                 takes it as it is)"
            ),
            Self::FeatureDisabled { what, feature } => {
                write!(f, "this is {what}; ecso built with --features {feature} reads it")
            }
            Self::Unconverted { what, reason } => {
                write!(f, "this is {what} that can't be shown as images: {reason}")
            }
            Self::SeveralPages(pages) => {
                write!(f, "it has {pages} pages, but a single image is expected")
            }
            Self::Broken { format, cause } => write!(f, "the {format} image is broken: {cause}"),
            Self::NotFetched => f.write_str(
                "the image is a URL and was not fetched; only a server that fetches it itself can \
                 be shown it",
            ),
            Self::OnlyDescribed => f.write_str(
                "there is only a description of this image; only a model that reads images as text, \
                 as mini does, can use it",
            ),
        }
    }
}

// By hand: the cause's text is part of the error's own, so the source is what the cause came from.
impl Error for ImageError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::File { cause, .. } | Self::DataUrl(cause) | Self::Broken { cause, .. } => {
                cause.source()
            }
            _ => None,
        }
    }
}

/// An image. Its original bytes are kept and sent; they are never encoded again. Only formats that
/// models don't read (HEIC, AVIF, the pages of PDF files, each with the Cargo feature of its name)
/// are converted to PNG or JPEG. A clone is cheap.
///
/// ```
/// use ecso::{Image, Limits};
///
/// let gif = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7";
/// let image = Image::from_data_url(gif, Limits::default())?;
/// assert_eq!(image.pixels()?.dimensions(), (1, 1));
/// # Ok::<(), ecso::ImageError>(())
/// ```
#[derive(Debug, Clone)]
pub struct Image {
    source: Arc<Source>,
    view: Arc<Map<String, Value>>,
}

#[derive(Debug)]
enum Source {
    Bytes {
        bytes: Bytes,
        format: ImageFormat,
        limits: Limits,
        digest: blake3::Hash,
        is_converted: bool,
        pixels: OnceLock<Result<Pixels, ImageError>>,
    },
    Url(String),
    Described(String),
}

impl PartialEq for Image {
    /// Images are equal if their [digests](Image::digest) are.
    fn eq(&self, other: &Self) -> bool {
        self.digest() == other.digest()
    }
}

impl Image {
    /// Reads a file as [`Image::from_bytes`] does, with no more bytes than `limits` allow. Every
    /// error names the file.
    pub fn open(path: impl AsRef<Path>, limits: Limits) -> Result<Self, ImageError> {
        Self::read(path.as_ref(), limits, Self::from_bytes)
    }

    /// Reads a file as [`Image::pages`] does. Every error names the file.
    pub fn open_pages(path: impl AsRef<Path>, limits: Limits) -> Result<Vec<Self>, ImageError> {
        Self::read(path.as_ref(), limits, Self::pages)
    }

    fn read<T>(
        path: &Path,
        limits: Limits,
        take: impl Fn(Vec<u8>, Limits) -> Result<T, ImageError>,
    ) -> Result<T, ImageError> {
        let failed = |cause| ImageError::File { path: path.into(), cause };
        let io_failed = |error: io::Error| failed(Cause::new(error.to_string(), error));
        let file = File::open(path).map_err(io_failed)?;
        let mut bytes = Vec::new();
        // One byte more than allowed is enough to see that there are too many.
        let longest = u64::try_from(limits.bytes).unwrap_or(u64::MAX).saturating_add(1);
        file.take(longest).read_to_end(&mut bytes).map_err(io_failed)?;
        take(bytes, limits).map_err(|error| failed(Cause::new(error.to_string(), error)))
    }

    /// An image from encoded bytes. Size, header and end are checked against `limits`. Nothing is
    /// decoded yet, except for formats that are converted.
    ///
    /// # Errors
    /// [`ImageError::SeveralPages`] for a document of several pages: see [`Image::pages`].
    pub fn from_bytes(bytes: impl Into<Bytes>, limits: Limits) -> Result<Self, ImageError> {
        let mut images = Self::pages(bytes, limits)?;
        match images.pop() {
            Some(image) if images.is_empty() => Ok(image),
            _ => Err(ImageError::SeveralPages(images.len() + 1)),
        }
    }

    /// The images in a file's bytes, each checked as [`Image::from_bytes`] does: the one of a
    /// picture, or the pages of a document, in order. Formats that models don't read are converted
    /// here, one file at a time in the whole process: see [`decoder_process`].
    pub fn pages(bytes: impl Into<Bytes>, limits: Limits) -> Result<Vec<Self>, ImageError> {
        let bytes = bytes.into();
        if bytes.is_empty() {
            return Err(ImageError::Empty);
        }
        if bytes.len() > limits.bytes {
            return Err(ImageError::TooManyBytes { actual: bytes.len(), limit: limits.bytes });
        }
        let digest = blake3::hash(&bytes);
        let Some(foreign) = Foreign::of(&bytes) else {
            return Ok(vec![Self::checked(bytes, digest, limits, false)?]);
        };
        let images = foreign.converted(&bytes, limits)?.into_iter().zip(0..);
        images
            .map(|(image, page)| {
                Self::checked(image.into(), foreign.digest(digest, page), limits, true)
            })
            .collect()
    }

    fn checked(
        bytes: Bytes,
        digest: blake3::Hash,
        limits: Limits,
        is_converted: bool,
    ) -> Result<Self, ImageError> {
        let format = image::guess_format(&bytes).map_err(|_| ImageError::NotAnImage)?;
        if !format.reading_enabled() {
            return Err(ImageError::NotAnImage);
        }
        if !ending::is_complete(&bytes, format) {
            check_truncated(name(format)?, bytes.len(), limits)?;
        }
        let (width, height) = ImageReader::with_format(Cursor::new(&bytes), format)
            .into_decoder()
            .map(|decoder| decoder.dimensions())
            .map_err(|error| broken(format, error))?;
        if u64::from(width) * u64::from(height) > limits.pixels {
            return Err(ImageError::TooManyPixels { width, height, limit: limits.pixels });
        }
        Ok(Self::from_source(Source::Bytes {
            bytes,
            format,
            limits,
            digest,
            is_converted,
            pixels: OnceLock::new(),
        }))
    }

    /// An image from a data URL ([`decode_data_url`]), checked as [`Image::from_bytes`] does.
    pub fn from_data_url(url: &str, limits: Limits) -> Result<Self, ImageError> {
        Self::from_bytes(decode_data_url(url, limits.bytes)?, limits)
    }

    /// An image known by its URL, for backends that pass the URL on. This crate never fetches it.
    pub fn from_url(url: impl Into<String>) -> Self {
        Self::from_source(Source::Url(url.into()))
    }

    /// An image known by a description only. Only a model that reads images as text
    /// ([`Mllm::image_text`](crate::Mllm::image_text)) can use it; it reads the description.
    pub fn described(description: impl Into<String>) -> Self {
        Self::from_source(Source::Described(description.into()))
    }

    /// The description, if the image is known by one.
    #[must_use]
    pub fn description(&self) -> Option<&str> {
        match &*self.source {
            Source::Bytes { .. } | Source::Url(_) => None,
            Source::Described(description) => Some(description),
        }
    }

    fn from_source(source: Source) -> Self {
        Self { source: Arc::new(source), view: Arc::default() }
    }

    /// The same image with fields that say how a model should look at it (`detail`, `min_pixels`,
    /// …). Backends with an HTTP request send them with the image.
    #[must_use]
    pub fn with_view(self, view: Map<String, Value>) -> Self {
        Self { view: Arc::new(view), ..self }
    }

    /// The fields of [`Image::with_view`].
    #[must_use]
    pub fn view(&self) -> &Map<String, Value> {
        &self.view
    }

    /// The encoded bytes, original or converted, with their MIME type; `None` for an image known by
    /// its URL or a description.
    #[must_use]
    pub fn encoded(&self) -> Option<(&Bytes, &'static str)> {
        match &*self.source {
            Source::Bytes { bytes, format, .. } => Some((bytes, format.to_mime_type())),
            Source::Url(_) | Source::Described(_) => None,
        }
    }

    /// Whether its bytes were converted from a format that models don't read.
    #[must_use]
    pub fn is_converted(&self) -> bool {
        matches!(&*self.source, Source::Bytes { is_converted: true, .. })
    }

    /// The URL, if the image is known by one.
    #[must_use]
    pub fn url(&self) -> Option<&str> {
        match &*self.source {
            Source::Bytes { .. } | Source::Described(_) => None,
            Source::Url(url) => Some(url),
        }
    }

    /// The BLAKE3 of the bytes as they came in, of the URL, or of `described:` and the description.
    /// For a page of a document, that of the document's digest and the page's number.
    #[must_use]
    pub fn digest(&self) -> Digest {
        let hash = match &*self.source {
            Source::Bytes { digest, .. } => *digest,
            Source::Url(url) => blake3::hash(url.as_bytes()),
            Source::Described(text) => {
                blake3::Hasher::new().update(b"described:").update(text.as_bytes()).finalize()
            }
        };
        Digest(*hash.as_bytes())
    }

    /// The pixels: 8-bit RGB, upright (EXIF orientation applied), over white where transparent, the
    /// first frame of an animation. They are decoded on first use and then kept.
    pub fn pixels(&self) -> Result<&Pixels, ImageError> {
        match &*self.source {
            Source::Url(_) => Err(ImageError::NotFetched),
            Source::Described(_) => Err(ImageError::OnlyDescribed),
            Source::Bytes { bytes, format, limits, pixels, .. } => pixels
                .get_or_init(|| decode(bytes, *format, *limits).map(Pixels::of))
                .as_ref()
                .map_err(Clone::clone),
        }
    }

    /// Decodes the image to find out whether it can be, and keeps no pixels.
    pub fn try_decoding(&self) -> Result<(), ImageError> {
        match &*self.source {
            Source::Url(_) => Err(ImageError::NotFetched),
            Source::Described(_) => Err(ImageError::OnlyDescribed),
            Source::Bytes { bytes, format, limits, .. } => {
                decode(bytes, *format, *limits).map(drop)
            }
        }
    }
}

/// A BLAKE3 digest of 32 bytes. [`Image::digest`] makes it; equal images have equal digests.
///
/// ```
/// let digest = ecso::Image::from_url("https://example.org/bread.png").digest();
/// assert_eq!(digest.to_hex().len(), 64);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The 32 bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// 64 lower-case hexadecimal digits.
    #[must_use]
    pub fn to_hex(&self) -> String {
        blake3::Hash::from(self.0).to_hex().to_string()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

/// Decoded pixels: 8-bit RGB, row by row from the top left, without padding.
///
/// ```
/// let pixels = ecso::Pixels::new(2, 1, vec![255, 0, 0, 0, 0, 255]).unwrap();
/// assert_eq!((pixels.width(), pixels.height()), (2, 1));
/// assert!(ecso::Pixels::new(2, 2, vec![0; 6]).is_none());
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Pixels {
    width: u32,
    height: u32,
    rgb: Bytes,
}

impl Pixels {
    /// Pixels from their bytes; `None` if there are not `3 * width * height` of them.
    #[must_use]
    pub fn new(width: u32, height: u32, rgb: impl Into<Bytes>) -> Option<Self> {
        let rgb = rgb.into();
        let expected = (u64::from(width) * u64::from(height)).checked_mul(3);
        (u64::try_from(rgb.len()).ok() == expected).then_some(Self { width, height, rgb })
    }

    fn of(image: RgbImage) -> Self {
        Self { width: image.width(), height: image.height(), rgb: image.into_raw().into() }
    }

    /// Width in pixels.
    #[must_use]
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Height in pixels.
    #[must_use]
    pub fn height(&self) -> u32 {
        self.height
    }

    /// Width and height in pixels.
    #[must_use]
    pub fn dimensions(&self) -> (u32, u32) {
        (self.width, self.height)
    }

    /// The bytes: red, green, blue of each pixel. A clone shares them.
    #[must_use]
    pub fn as_bytes(&self) -> &Bytes {
        &self.rgb
    }
}

impl fmt::Debug for Pixels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pixels({} x {})", self.width, self.height)
    }
}

/// Refuses an image or a document whose end is missing, or warns of it, as `limits` say.
fn check_truncated(format: &'static str, bytes: usize, limits: Limits) -> Result<(), ImageError> {
    match limits.truncated {
        Truncated::Refuse => return Err(ImageError::Truncated { format }),
        Truncated::Accept => {
            tracing::warn!(format, bytes, "an image was accepted although its end is missing");
        }
    }
    Ok(())
}

fn decode(bytes: &[u8], format: ImageFormat, limits: Limits) -> Result<RgbImage, ImageError> {
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut bounds = image::Limits::default();
    bounds.max_alloc = Some(limits.pixels.saturating_mul(16));
    reader.limits(bounds);
    let mut decoder = reader.into_decoder().map_err(|error| broken(format, error))?;
    // If the EXIF block is damaged, the image is not turned.
    let orientation = decoder.orientation().unwrap_or(image::metadata::Orientation::NoTransforms);
    let mut image =
        image::DynamicImage::from_decoder(decoder).map_err(|error| broken(format, error))?;
    image.apply_orientation(orientation);
    if !image.color().has_alpha() {
        return Ok(image.into_rgb8());
    }
    Ok(over_white(&image.into_rgba8()))
}

fn over_white(pixels: &RgbaImage) -> RgbImage {
    RgbImage::from_fn(pixels.width(), pixels.height(), |x, y| {
        let [r, g, b, alpha] = pixels.get_pixel(x, y).0.map(u32::from);
        let over = |channel| {
            u8::try_from((channel * alpha + 255 * (255 - alpha) + 127) / 255).unwrap_or(u8::MAX)
        };
        image::Rgb([over(r), over(g), over(b)])
    })
}

fn broken(format: ImageFormat, error: image::ImageError) -> ImageError {
    match name(format) {
        Ok(format) => ImageError::Broken { format, cause: Cause::new(error.to_string(), error) },
        Err(error) => error,
    }
}

/// The usual name of a format that is read.
fn name(format: ImageFormat) -> Result<&'static str, ImageError> {
    match format {
        ImageFormat::Jpeg => Ok("JPEG"),
        ImageFormat::Png => Ok("PNG"),
        ImageFormat::WebP => Ok("WebP"),
        ImageFormat::Gif => Ok("GIF"),
        _ => Err(ImageError::NotAnImage),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encode(image: &image::DynamicImage, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        image.write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    #[test]
    fn every_format_is_read_and_its_bytes_are_kept() {
        let picture = image::DynamicImage::new_rgb8(7, 5);
        for format in [ImageFormat::Jpeg, ImageFormat::Png, ImageFormat::WebP, ImageFormat::Gif] {
            let bytes = encode(&picture, format);
            let image = Image::from_bytes(bytes.clone(), Limits::default()).unwrap();
            assert_eq!(image.pixels().unwrap().dimensions(), (7, 5));
            assert_eq!(image.encoded().unwrap(), (&bytes.into(), format.to_mime_type()));
        }
    }

    #[test]
    fn transparent_pixels_become_white() {
        let clear = image::DynamicImage::new_rgba8(1, 1);
        let image = Image::from_bytes(encode(&clear, ImageFormat::Png), Limits::default()).unwrap();
        assert_eq!(image.pixels().unwrap().as_bytes()[..], [255; 3]);
    }

    #[test]
    fn exif_orientation_turns_the_picture() {
        // An EXIF block with "rotate by 90 degrees", inserted after the start marker of a JPEG.
        let tiff = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0";
        let mut app1 = vec![0xff, 0xe1];
        app1.extend(u16::try_from(2 + 6 + tiff.len()).unwrap().to_be_bytes());
        app1.extend(b"Exif\0\0");
        app1.extend(tiff);
        let mut jpeg = encode(&image::DynamicImage::new_rgb8(8, 16), ImageFormat::Jpeg);
        jpeg.splice(2..2, app1);
        let image = Image::from_bytes(jpeg, Limits::default()).unwrap();
        assert_eq!(image.pixels().unwrap().dimensions(), (16, 8));
    }

    #[test]
    fn errors_say_what_is_wrong() {
        let limits = Limits { bytes: 4000, pixels: 64, ..Limits::default() };
        assert_eq!(Image::from_bytes(Vec::new(), limits).unwrap_err(), ImageError::Empty);
        let missing = Image::open("no/such.png", limits).unwrap_err().to_string();
        assert!(missing.starts_with("no/such.png: "), "{missing}");
        let file = Image::open(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"), limits)
            .unwrap_err()
            .to_string();
        assert!(file.contains("Cargo.toml: this is not an image"), "{file}");
        assert_eq!(
            Image::from_bytes(vec![0; 4001], limits).unwrap_err(),
            ImageError::TooManyBytes { actual: 4001, limit: 4000 }
        );
        assert_eq!(
            Image::from_bytes(&b"plain text"[..], limits).unwrap_err(),
            ImageError::NotAnImage
        );
        let wide = encode(&image::DynamicImage::new_luma8(65, 1), ImageFormat::Png);
        assert!(matches!(
            Image::from_bytes(wide, limits).unwrap_err(),
            ImageError::TooManyPixels { width: 65, height: 1, limit: 64 }
        ));
        let mut cut = encode(&image::DynamicImage::new_rgb8(8, 8), ImageFormat::Png);
        cut.truncate(cut.len() - 20);
        assert_eq!(
            Image::from_bytes(cut.clone(), limits).unwrap_err(),
            ImageError::Truncated { format: "PNG" }
        );
        let image =
            Image::from_bytes(cut, Limits { truncated: Truncated::Accept, ..limits }).unwrap();
        assert!(matches!(image.pixels().unwrap_err(), ImageError::Broken { format: "PNG", .. }));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(mut bytes: Vec<u8>, kind in 0..4_usize) {
            let head: &[u8] = [&b"\x89PNG\r\n\x1a\n"[..], b"\xff\xd8\xff", b"GIF89a", b"RIFF\0\0\0\0WEBP"][kind];
            bytes.splice(0..0, head.iter().copied());
            let limits = Limits { truncated: Truncated::Accept, ..Limits::default() };
            if let Ok(image) = Image::from_bytes(bytes, limits) {
                let _ = image.pixels();
            }
        }
    }
}
