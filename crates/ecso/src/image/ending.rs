//! Whether a file is complete or was cut off, found out without decoding it. Decoders fill a
//! missing part with grey.

use image::ImageFormat;
use memchr::{memchr, memmem};

/// Whether `bytes` reach the end that their format defines. Bytes after it are ignored (motion
/// photos have a video there). Damage of other kinds is left to the decoder.
pub(super) fn is_complete(bytes: &[u8], format: ImageFormat) -> bool {
    let end = match format {
        ImageFormat::Jpeg => jpeg(bytes),
        ImageFormat::Png => png(bytes),
        ImageFormat::Gif => gif(bytes),
        ImageFormat::WebP => webp(bytes),
        _ => Some(()),
    };
    end.is_some()
}

/// Whether a PDF has its end mark where readers look for it. Without it, decoders show the pages
/// that they find.
pub(super) fn is_complete_pdf(bytes: &[u8]) -> bool {
    const TAIL: usize = 1024;
    memmem::find(&bytes[bytes.len().saturating_sub(TAIL)..], b"%%EOF").is_some()
}

/// Goes from marker to marker. A picture within a segment, such as a thumbnail, is skipped with it.
/// In the data of a scan, 0xFF comes only before a zero or a marker.
fn jpeg(bytes: &[u8]) -> Option<()> {
    let mut at = 2;
    loop {
        at += memchr(0xff, bytes.get(at..)?)? + 1;
        match bytes.get(at)? {
            0xd9 => return Some(()),
            // A fill byte; the marker follows.
            0xff => {}
            // Data, or a marker without a segment.
            0x00 | 0x01 | 0xd0..=0xd8 => at += 1,
            _ => at += 1 + usize::from(u16::from_be_bytes(*bytes.get(at + 1..)?.first_chunk()?)),
        }
    }
}

fn png(bytes: &[u8]) -> Option<()> {
    const AROUND: usize = 12;
    let mut rest = bytes.get(8..)?;
    loop {
        let length = usize::try_from(u32::from_be_bytes(*rest.first_chunk()?)).ok()?;
        let kind = rest.get(4..8)?;
        if !kind.iter().all(u8::is_ascii_alphabetic) {
            return Some(());
        }
        rest = rest.get(length.checked_add(AROUND)?..)?;
        if kind == b"IEND" {
            return Some(());
        }
    }
}

/// Goes from block to block. Many encoders leave out the last byte, so a file may end with a
/// picture.
fn gif(bytes: &[u8]) -> Option<()> {
    fn colours(flags: u8) -> usize {
        if flags & 0x80 == 0 { 0 } else { 6 << (flags & 7) }
    }
    let mut rest = bytes.get(13 + colours(*bytes.get(10)?)..)?;
    let mut is_picture = false;
    loop {
        let head = match rest.first() {
            Some(b',') => 11 + colours(*rest.get(9)?),
            Some(b'!') => 2,
            Some(_) => return Some(()),
            None => return is_picture.then_some(()),
        };
        is_picture = head > 2;
        rest = rest.get(head..)?;
        while let length @ 1.. = *rest.first()? {
            rest = rest.get(1 + usize::from(length)..)?;
        }
        rest = rest.get(1..)?;
    }
}

/// By the length in its header. If the last chunk has an odd length, its padding byte may be
/// missing.
fn webp(bytes: &[u8]) -> Option<()> {
    let length = usize::try_from(u32::from_le_bytes(*bytes.get(4..)?.first_chunk()?)).ok()?;
    (length.checked_add(8)? <= bytes.len() + 1).then_some(())
}

#[cfg(test)]
mod tests {
    use std::{io::Cursor, time::Instant};

    use image::{DynamicImage, Frame, Rgb, RgbImage, codecs::gif::GifEncoder};

    use super::*;

    const FORMATS: [ImageFormat; 4] =
        [ImageFormat::Jpeg, ImageFormat::Png, ImageFormat::WebP, ImageFormat::Gif];

    /// A picture with much detail, so that its data are long.
    fn picture(side: u32) -> DynamicImage {
        let mix = |x: u32, y: u32| x.wrapping_mul(0x9e37_79b9) ^ y.wrapping_mul(0x85eb_ca6b);
        let colour = |x, y| Rgb(<[u8; 3]>::try_from(&mix(x, y).to_be_bytes()[..3]).unwrap());
        RgbImage::from_fn(side, side, colour).into()
    }

    fn encode(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        image.write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    /// Whether the file counts as complete, also with bytes after its end, and as cut off at every
    /// earlier place.
    fn is_recognised(bytes: &[u8], format: ImageFormat) -> bool {
        let is_cut = |length| !is_complete(&bytes[..length], format);
        let behind = [bytes, b"\0\0\0\x18ftypmp42 a film"].concat();
        is_complete(bytes, format)
            && is_complete(&behind, format)
            && (0..bytes.len() - 2).all(is_cut)
    }

    #[test]
    fn complete_images_and_those_cut_anywhere_are_recognised() {
        for format in FORMATS {
            assert!(is_recognised(&encode(&picture(40), format), format), "{format:?}");
        }
        let deep = encode(&DynamicImage::new_rgb16(9, 9), ImageFormat::Png);
        assert!(is_recognised(&deep, ImageFormat::Png));
    }

    #[test]
    fn a_jpeg_may_have_pictures_within_and_behind() {
        let jpeg = encode(&picture(40), ImageFormat::Jpeg);
        let small = encode(&picture(8), ImageFormat::Jpeg);
        let mut segment = vec![0xff, 0xe1];
        segment.extend(u16::try_from(small.len() + 2).unwrap().to_be_bytes());
        let with_thumbnail = [&jpeg[..2], &segment, &small, &jpeg[2..]].concat();
        assert!(is_recognised(&with_thumbnail, ImageFormat::Jpeg));
        // MPO, as stereo cameras write it: one JPEG after another. The first one counts.
        assert!(is_complete(&[&jpeg[..], &jpeg[..jpeg.len() / 2]].concat(), ImageFormat::Jpeg));
        // Markers with fill bytes.
        let filled = [&jpeg[..2], &[0xff, 0xff, 0xff], &jpeg[2..]].concat();
        assert!(is_recognised(&filled, ImageFormat::Jpeg));
    }

    #[test]
    fn a_progressive_jpeg_has_many_scans() {
        // A frame in three scans; their content does not matter here.
        let scan = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00 data \xff\x00 data \xff\xd0 data";
        let table = b"\xff\xc4\x00\x05abc";
        let frame = b"\xff\xd8\xff\xc2\x00\x0b\x08\x00\x08\x00\x08\x01\x01\x11\x00";
        let progressive = [&frame[..], table, scan, table, scan, scan, b"\xff\xd9"].concat();
        assert!(is_recognised(&progressive, ImageFormat::Jpeg));
    }

    #[test]
    fn a_gif_may_end_with_its_last_picture() {
        let mut animated = Vec::new();
        let frames = [picture(8), picture(9)].map(|frame| Frame::new(frame.into_rgba8()));
        GifEncoder::new(&mut animated).encode_frames(frames).unwrap();
        assert_eq!(animated.pop(), Some(b';'));
        assert!(is_complete(&animated, ImageFormat::Gif));
        let whole: Vec<usize> = (0..animated.len())
            .filter(|end| is_complete(&animated[..*end], ImageFormat::Gif))
            .collect();
        assert_eq!(whole.len(), 1, "behind the first picture, and nowhere else: {whole:?}");
    }

    #[test]
    fn an_animated_png_ends_with_its_last_frame() {
        let png = encode(&picture(8), ImageFormat::Png);
        let (head, end) = png.split_at(png.len() - 12);
        let frame = b"\0\0\0\x08fdATAAAAdatacrc.";
        assert!(is_recognised(&[head, frame, frame, end].concat(), ImageFormat::Png));
    }

    #[test]
    fn no_image_takes_long() {
        for format in FORMATS {
            let mut bytes = encode(&picture(8), format);
            // Only markers, chunks and blocks of no length, which keep a reader busy.
            bytes.truncate(bytes.len() - if format == ImageFormat::Gif { 1 } else { 12 });
            let busy: &[u8] = match format {
                ImageFormat::Jpeg => b"\xff\xd0",
                ImageFormat::Png => b"\0\0\0\0aaaacrc.",
                _ => b"!\x01\x01a\0",
            };
            bytes.extend(busy.repeat((20 << 20) / busy.len()));
            let begun = Instant::now();
            assert!(!is_complete(&bytes, format) || format == ImageFormat::WebP);
            assert!(begun.elapsed().as_secs() < 10, "{format:?}: {:?}", begun.elapsed());
        }
    }
}
