//! The container of HEIC and AVIF: a file of boxes with pictures, their parts and their layout.

use std::iter;

use heifer::{Image, heifer_isobmff::HeifFile};
use image::RgbaImage;

use super::{Limits, foreign::Pictures, over_white};

/// Opens a file whose header claims no more pixels than `limits` allow.
pub(super) fn open(bytes: &[u8], limits: Limits) -> Result<HeifFile<'_>, String> {
    let file = HeifFile::parse(bytes).map_err(|error| error.to_string())?;
    let size = file.image_size(file.primary_id).map_err(|error| error.to_string())?;
    if let Some((width, height)) =
        size.filter(|(w, h)| u64::from(*w) * u64::from(*h) > limits.pixels)
    {
        let limit = limits.pixels;
        return Err(format!(
            "it has {width} x {height} pixels; at most {limit} in all are allowed (images.pixels)"
        ));
    }
    Ok(file)
}

/// The only picture of a file, over white.
pub(super) fn single_picture(image: Image<u8>) -> Result<Pictures, String> {
    let pixels = RgbaImage::from_raw(image.width, image.height, image.data)
        .ok_or("its picture has no size")?;
    Ok(Box::new(iter::once((over_white(&pixels), false))))
}
