//! The pixels of an image, as the `image` crate's operations take them.

use bytes::Bytes;
use ecso::Pixels;
use image::{ImageBuffer, Rgb};

/// An RGB image that shares its bytes with a [`Pixels`].
pub(crate) type Picture = ImageBuffer<Rgb<u8>, Bytes>;

#[expect(clippy::expect_used, reason = "`Pixels` holds as many bytes as its size says")]
pub(crate) fn picture(pixels: &Pixels) -> Picture {
    let (width, height) = pixels.dimensions();
    ImageBuffer::from_raw(width, height, pixels.as_bytes().clone()).expect("enough bytes")
}

#[cfg(test)]
pub(crate) fn pixels(image: image::RgbImage) -> Pixels {
    let (width, height) = image.dimensions();
    Pixels::new(width, height, image.into_raw()).unwrap()
}
