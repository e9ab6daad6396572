//! Photos in HEIC.

use bytes::Bytes;
use heifer::{Error, Options};

use super::{
    Limits,
    foreign::Pictures,
    heif::{open, single_picture},
};

/// Threads for the tiles of a photo.
const THREADS: usize = 4;

/// The picture of a file, upright, in sRGB.
pub(super) fn decode(bytes: &Bytes, limits: Limits) -> Result<Pictures, String> {
    open(bytes, limits)?;
    let options = Options { max_threads: THREADS, max_pixels: limits.pixels.max(1) };
    let image = match heifer::decode_srgb_rgba8(bytes, &options) {
        // A colour space that can't be converted: the colours are taken as they are.
        Err(Error::Unsupported(_)) => heifer::decode_rgba8(bytes, &options),
        decoded => decoded,
    };
    single_picture(image.map_err(|error| error.to_string())?)
}
