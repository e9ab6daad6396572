//! Formats that models don't read: photos in HEIC and AVIF, documents in PDF. They are converted to
//! PNG or JPEG.

use std::{
    io::Cursor,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Mutex, PoisonError},
};

use bytes::Bytes;
use image::{ImageFormat, RgbImage, codecs::jpeg::JpegEncoder};
use memchr::memmem;

use super::{ImageError, Limits, decoder_process, ending};

/// Quality of converted photos as JPEG, in 1..=100.
const QUALITY: u8 = 90;
/// The header of a PDF may begin anywhere in this many bytes, since programs write things of their
/// own before it.
const HEAD: usize = 1024;

/// A format that models don't read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Foreign {
    Heic,
    Avif,
    Pdf,
}

/// The pictures of a file, each with whether something on it could not be shown.
pub(super) type Pictures = Box<dyn Iterator<Item = (RgbImage, bool)>>;
/// Opens a file; the error says what is wrong with it. It may panic.
type Decoder = fn(&Bytes, Limits) -> Result<Pictures, String>;

/// The result of a conversion.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Converted {
    /// The encoded images.
    pub(super) images: Vec<Vec<u8>>,
    /// The numbers of those on which something is missing, from 1.
    pub(super) incomplete: Vec<usize>,
}

impl Foreign {
    /// The format of a file, by its first bytes; `None` for pictures that models read, and for
    /// unknown formats.
    pub(super) fn of(bytes: &[u8]) -> Option<Self> {
        let is_read = image::guess_format(bytes).is_ok_and(|format| super::name(format).is_ok());
        if is_read {
            return None;
        }
        let brands = brands(bytes);
        let has = |known: &[&[u8; 4]]| brands.iter().any(|brand| known.contains(&brand));
        if has(&[b"avif", b"avis"]) {
            Some(Self::Avif)
        } else if has(&[b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1"]) {
            Some(Self::Heic)
        } else {
            memmem::find(&bytes[..bytes.len().min(HEAD)], b"%PDF-").map(|_| Self::Pdf)
        }
    }

    /// Its name, with the article.
    fn name(self) -> &'static str {
        match self {
            Self::Heic => "a HEIC image",
            Self::Avif => "an AVIF image",
            Self::Pdf => "a PDF",
        }
    }

    /// The feature that reads it, and the decoder, if it is built in.
    fn decoder(self) -> (&'static str, Option<Decoder>) {
        match self {
            #[cfg(feature = "heic")]
            Self::Heic => ("heic", Some(super::heic::decode)),
            #[cfg(not(feature = "heic"))]
            Self::Heic => ("heic", None),
            #[cfg(feature = "avif")]
            Self::Avif => ("avif", Some(super::avif::decode)),
            #[cfg(not(feature = "avif"))]
            Self::Avif => ("avif", None),
            #[cfg(feature = "pdf")]
            Self::Pdf => ("pdf", Some(super::pdf::decode)),
            #[cfg(not(feature = "pdf"))]
            Self::Pdf => ("pdf", None),
        }
    }

    /// The digest of an image in a file, from the file's own.
    pub(super) fn digest(self, file: blake3::Hash, page: u64) -> blake3::Hash {
        match self {
            Self::Heic | Self::Avif => file,
            Self::Pdf => {
                blake3::Hasher::new().update(file.as_bytes()).update(&page.to_le_bytes()).finalize()
            }
        }
    }

    /// The images in a file, in formats that models read. One file at a time in the whole process:
    /// each may take much memory.
    pub(super) fn converted(
        self,
        bytes: &Bytes,
        limits: Limits,
    ) -> Result<Vec<Vec<u8>>, ImageError> {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let what = self.name();
        if let (feature, None) = self.decoder() {
            return Err(ImageError::FeatureDisabled { what, feature });
        }
        if self == Self::Pdf && !ending::is_complete_pdf(bytes) {
            super::check_truncated("PDF", bytes.len(), limits)?;
        }
        let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let converted =
            decoder_process::convert(bytes, limits).unwrap_or_else(|| self.convert(bytes, limits));
        let converted = converted.map_err(|reason| ImageError::Unconverted { what, reason })?;
        if !converted.incomplete.is_empty() {
            let images = converted.incomplete;
            tracing::warn!(what, ?images, "a font, picture or note could not be shown");
        }
        Ok(converted.images)
    }

    /// As [`Foreign::converted`], in this process.
    pub(super) fn convert(self, bytes: &Bytes, limits: Limits) -> Result<Converted, String> {
        let convert = || {
            let (_, decoder) = self.decoder();
            let mut converted = Converted::default();
            let mut bytes_left = limits.bytes;
            for ((pixels, is_incomplete), number) in
                decoder.ok_or("nothing reads it")?(bytes, limits)?.zip(1..)
            {
                let image = encode(&pixels).map_err(|error| error.to_string())?;
                bytes_left = bytes_left.checked_sub(image.len()).ok_or_else(|| {
                    format!("what it shows takes more than {} bytes (images.bytes)", limits.bytes)
                })?;
                converted.images.push(image);
                converted.incomplete.extend(is_incomplete.then_some(number));
            }
            Ok(converted)
        };
        catch_unwind(AssertUnwindSafe(convert)).unwrap_or_else(|_| Err("its decoder failed".into()))
    }
}

/// The brands in the header of a file in ISO's base media format.
fn brands(bytes: &[u8]) -> &[[u8; 4]] {
    let length = bytes
        .first_chunk()
        .map(|length| u32::from_be_bytes(*length))
        .and_then(|length| usize::try_from(length).ok());
    match (bytes.get(4..8), length) {
        (Some(b"ftyp"), Some(length)) => bytes[8..length.clamp(8, bytes.len())].as_chunks().0,
        _ => &[],
    }
}

/// A PNG, or a JPEG for photos, whose PNG takes more than one byte per pixel.
fn encode(pixels: &RgbImage) -> image::ImageResult<Vec<u8>> {
    let mut png = Cursor::new(Vec::new());
    pixels.write_to(&mut png, ImageFormat::Png)?;
    let png = png.into_inner();
    if png.len() <= pixels.len() / 3 {
        return Ok(png);
    }
    let mut jpeg = Vec::new();
    JpegEncoder::new_with_quality(&mut jpeg, QUALITY).encode_image(pixels)?;
    Ok(jpeg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_known_by_their_first_bytes() {
        for (bytes, kind) in [
            (&b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"[..], Some(Foreign::Heic)),
            (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", Some(Foreign::Heic)),
            (b"\0\0\0\x18ftypmif1\0\0\0\0avifmif1", Some(Foreign::Avif)),
            (b"\0\0\0\x14ftypavif\0\0\0\0", Some(Foreign::Avif)),
            (b"\xff\xff\xff\xffftypisom\0\0\0\0mp41", None),
            (b"\0\0\0\0ftyp", None),
            (b"%PDF-1.7\n", Some(Foreign::Pdf)),
            (b"\n\xef\xbb\xbf %PDF-1.7\n", Some(Foreign::Pdf)),
            (b"GIF89a %PDF-1.7\n", None),
            (b"text", None),
        ] {
            assert_eq!(Foreign::of(bytes), kind, "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn a_missing_feature_is_named() {
        for (bytes, kind) in [
            (&b"%PDF-1.7\n%%EOF"[..], Foreign::Pdf),
            (b"\0\0\0\x14ftypavif\0\0\0\0", Foreign::Avif),
        ] {
            let error = crate::Image::from_bytes(bytes, Limits::default()).unwrap_err();
            let (what, (feature, decoder)) = (kind.name(), kind.decoder());
            match decoder {
                None => assert_eq!(error, ImageError::FeatureDisabled { what, feature }),
                Some(_) => assert!(matches!(error, ImageError::Unconverted { .. }), "{error}"),
            }
        }
    }

    #[test]
    fn drawings_become_png_and_photos_jpeg() {
        let drawing = RgbImage::new(64, 64);
        let photo = RgbImage::from_fn(64, 64, |x, y| {
            image::Rgb([(x * 31 * y % 251) as u8, (x * y * 7 % 253) as u8, 9])
        });
        assert_eq!(image::guess_format(&encode(&drawing).unwrap()).unwrap(), ImageFormat::Png);
        assert_eq!(image::guess_format(&encode(&photo).unwrap()).unwrap(), ImageFormat::Jpeg);
    }
}
