//! The pages of a PDF file, as images.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use bytes::Bytes;
use hayro::{
    PixmapSettings, RenderCache, RenderSettings,
    hayro_interpret::InterpreterSettings,
    hayro_syntax::{DecryptionError, LoadPdfError, Pdf, page::Page},
    render,
    vello_cpu::color::palette::css::WHITE,
};
use image::RgbImage;

use super::{Limits, foreign::Pictures};

/// Pixels per point (1/72 inch): 150 pixels per inch, enough to read print easily.
const DEFAULT_SCALE: f64 = 150.0 / 72.0;
/// Longest side of a page, in pixels.
const MAX_SIDE: f64 = 16_384.0;

/// The pages of a file, all at [`DEFAULT_SCALE`], or at the largest scale that the limit on pixels
/// allows for all together.
pub(super) fn decode(bytes: &Bytes, limits: Limits) -> Result<Pictures, String> {
    let pdf = Pdf::new(Arc::new(bytes.clone())).map_err(|error| match error {
        LoadPdfError::Decryption(DecryptionError::PasswordProtected) => "it is password-protected",
        LoadPdfError::Decryption(_) => "its encryption is not supported",
        LoadPdfError::Invalid => "it is broken",
    })?;
    let pages = pdf.pages().len();
    if pages == 0 {
        return Err("it has no page".into());
    }
    if pages > limits.pages {
        return Err(format!(
            "it has {pages} pages; at most {} are allowed (images.pages)",
            limits.pages
        ));
    }
    let scale = scale(&pdf, limits);
    Ok(Box::new((0..pages).map(move |number| page(&pdf, number, scale))))
}

/// Pixels per point.
fn scale(pdf: &Pdf, limits: Limits) -> f64 {
    let sizes = pdf.pages().iter().map(Page::render_dimensions);
    let (area, longest) = sizes.fold((0.0, 0.0_f64), |(area, longest), (width, height)| {
        let (width, height) = (f64::from(width), f64::from(height));
        (area + width * height, longest.max(width).max(height))
    });
    #[expect(clippy::cast_precision_loss, reason = "a count of pixels")]
    let pixels = limits.pixels as f64;
    DEFAULT_SCALE.min((pixels / area).sqrt()).min(MAX_SIDE / longest)
}

/// A page on white, and whether a font, a picture or a note on it could not be shown.
fn page(pdf: &Pdf, number: usize, scale: f64) -> (RgbImage, bool) {
    let is_incomplete = Arc::new(AtomicBool::new(false));
    let warned = Arc::clone(&is_incomplete);
    let settings = InterpreterSettings {
        warning_sink: Arc::new(move |_| warned.store(true, Ordering::Relaxed)),
        ..InterpreterSettings::default()
    };
    let page = &pdf.pages()[number];
    let (width, height) = page.render_dimensions();
    // A page that is only a line still gets one pixel.
    #[expect(clippy::cast_possible_truncation, reason = "a factor")]
    let (x_scale, y_scale) = ((scale as f32).max(1.5 / width), (scale as f32).max(1.5 / height));
    let paper = PixmapSettings { x_scale, y_scale, bg_color: WHITE };
    let pixels = render(page, &RenderCache::new(), &settings, &RenderSettings::default(), &paper);
    let colours = pixels.data().iter().flat_map(|pixel| [pixel.r, pixel.g, pixel.b]).collect();
    let image = RgbImage::from_raw(pixels.width().into(), pixels.height().into(), colours);
    (image.unwrap_or_default(), is_incomplete.load(Ordering::Relaxed))
}
