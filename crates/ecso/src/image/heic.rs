//! Photos in HEIC.

use bytes::Bytes;
use heifer::{Error, Options};

use super::{
    Limits,
    foreign::Shown,
    heif::{open, shown as one},
};

/// Threads for the tiles of a photo.
const THREADS: usize = 4;

/// Its picture, in the colours of a screen, as it is to be held.
pub(super) fn shown(bytes: &Bytes, limits: Limits) -> Result<Shown, String> {
    open(bytes, limits)?;
    let options = Options { max_threads: THREADS, max_pixels: limits.pixels.max(1) };
    let image = match heifer::decode_srgb_rgba8(bytes, &options) {
        // Colours for screens of another kind: then as they are.
        Err(Error::Unsupported(_)) => heifer::decode_rgba8(bytes, &options),
        decoded => decoded,
    };
    one(image.map_err(|error| error.to_string())?)
}
