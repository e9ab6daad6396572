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

use super::{Limits, foreign::Shown};

/// Pixels for a point of 1/72 inch: 150 an inch, at which print is read easily.
const USUAL: f64 = 150.0 / 72.0;
/// Longest side of a page, in pixels.
const LONGEST: f64 = 16_384.0;

/// Its pages, all as fine as [`USUAL`], or as the pixels for all together allow.
pub(super) fn shown(bytes: &Bytes, limits: Limits) -> Result<Shown, String> {
    let pdf = Pdf::new(Arc::new(bytes.clone())).map_err(|error| match error {
        LoadPdfError::Decryption(DecryptionError::PasswordProtected) => "it takes a password",
        LoadPdfError::Decryption(_) => "it is encrypted in a way that is not read",
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

/// Pixels for a point.
fn scale(pdf: &Pdf, limits: Limits) -> f64 {
    let sizes = pdf.pages().iter().map(Page::render_dimensions);
    let (area, longest) = sizes.fold((0.0, 0.0_f64), |(area, longest), (width, height)| {
        let (width, height) = (f64::from(width), f64::from(height));
        (area + width * height, longest.max(width).max(height))
    });
    #[expect(clippy::cast_precision_loss, reason = "a count of pixels")]
    let pixels = limits.pixels as f64;
    USUAL.min((pixels / area).sqrt()).min(LONGEST / longest)
}

/// A page on white paper, and whether a font, a picture or a note on it could not be shown.
fn page(pdf: &Pdf, number: usize, scale: f64) -> (RgbImage, bool) {
    let is_incomplete = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&is_incomplete);
    let settings = InterpreterSettings {
        warning_sink: Arc::new(move |_| told.store(true, Ordering::Relaxed)),
        ..InterpreterSettings::default()
    };
    let page = &pdf.pages()[number];
    let (width, height) = page.render_dimensions();
    // Of a page that is no more than a line a pixel is left.
    #[expect(clippy::cast_possible_truncation, reason = "a factor")]
    let (x_scale, y_scale) = ((scale as f32).max(1.5 / width), (scale as f32).max(1.5 / height));
    let paper = PixmapSettings { x_scale, y_scale, bg_color: WHITE };
    let pixels = render(page, &RenderCache::new(), &settings, &RenderSettings::default(), &paper);
    let colours = pixels.data().iter().flat_map(|pixel| [pixel.r, pixel.g, pixel.b]).collect();
    let image = RgbImage::from_raw(pixels.width().into(), pixels.height().into(), colours);
    (image.unwrap_or_default(), is_incomplete.load(Ordering::Relaxed))
}
