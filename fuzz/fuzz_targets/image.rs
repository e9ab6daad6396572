//! Image files: no panic, and the limits hold.
#![no_main]

use ecso::{Image, Limits, Truncated};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let limits = Limits { pixels: 1 << 16, truncated: Truncated::Accept, ..Limits::default() };
    if let Ok(image) = Image::from_bytes(bytes.to_vec(), limits)
        && let Ok(pixels) = image.pixels()
    {
        assert!(u64::from(pixels.width()) * u64::from(pixels.height()) <= 1 << 16);
    }
});
