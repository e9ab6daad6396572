//! Images that the user names.

use std::path::Path;

use ecso::{Image, Limits};

use crate::error::UsageError;

/// Reads the images in a file and decodes them, so that a broken one is reported before a model is
/// loaded.
pub(crate) fn open(path: &Path, limits: Limits) -> anyhow::Result<Vec<Image>> {
    let images = Image::open_pages(path, limits)?;
    for image in &images {
        image.pixels().map_err(|error| UsageError::at(path, error))?;
    }
    Ok(images)
}
