//! Text boxes from the detector's probability map, and lines of text in reading order.

use geo::{MinimumRotatedRect, MultiPoint};
use image::{Rgb, RgbImage};
use rten_imageproc::{PointF, RetrievalMode, find_contours};
use rten_tensor::{NdTensor, NdTensorView, prelude::*};

use crate::picture::Picture;

/// The least probability of a text pixel (PaddleOCR's `thresh`).
const PIXEL_THRESHOLD: f32 = 0.3;
/// The least mean probability of a text box (`box_thresh`).
const BOX_THRESHOLD: f32 = 0.6;
/// The detector's boxes are too small; they grow by this times area divided by perimeter
/// (`unclip_ratio`).
const UNCLIP: f32 = 1.5;
/// Boxes with a shorter side, in pixels, are noise (`min_size`).
const MIN_SIDE: f32 = 3.0;

/// One line of text.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Line {
    /// The text.
    pub text: String,
    /// The recogniser's mean confidence, in 0..=1.
    pub confidence: f32,
    /// The centre of the line in pixels, x and y, from the image's top left.
    pub center: (f32, f32),
    /// Width along the text and height across it, in pixels.
    pub size: (f32, f32),
}

/// A box around a line, rotated as the text is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct TextBox {
    pub(crate) center: (f32, f32),
    /// Unit vector towards the top of the letters (y grows downwards).
    up: (f32, f32),
    pub(crate) width: f32,
    pub(crate) height: f32,
}

/// Finds boxes on a map of text probabilities. `scale` is image pixels per map pixel, in x and y.
pub(crate) fn find(map: NdTensorView<'_, f32, 2>, scale: (f32, f32)) -> Vec<TextBox> {
    let mask: NdTensor<bool, 2> = map.map(|p| *p > PIXEL_THRESHOLD);
    let mut found = Vec::new();
    for contour in find_contours(mask.view(), RetrievalMode::External).iter() {
        let points: Vec<PointF> = contour.iter().map(|point| point.to_f32()).collect();
        let Some(rect) = smallest_rectangle(&points) else { continue };
        if rect.width.min(rect.height) < MIN_SIDE
            || mean_inside(&map, &mask, &points) < BOX_THRESHOLD
        {
            continue;
        }
        let grow = UNCLIP * rect.width * rect.height / (rect.width + rect.height);
        let center = (rect.center.0 * scale.0, rect.center.1 * scale.1);
        found.push(upright(center, rect.up, rect.width + grow, rect.height + grow, scale));
    }
    found
}

/// The smallest rectangle around a contour, at any angle; `None` for a point or a line.
fn smallest_rectangle(points: &[PointF]) -> Option<TextBox> {
    let points: MultiPoint<f32> = points.iter().map(|point| (point.x, point.y)).collect();
    let rectangle = points.minimum_rotated_rect()?;
    let corners = &rectangle.exterior().0;
    let (a, b, c) = (corners.first()?, corners.get(1)?, corners.get(2)?);
    let (across, along) = (*a - *b, *c - *b);
    let (height, width) = (across.x.hypot(across.y), along.x.hypot(along.y));
    let center = (f32::midpoint(a.x, c.x), f32::midpoint(a.y, c.y));
    // Contours run through the centres of pixels, so half a pixel is missing on each side.
    (height > 0.0 && width > 0.0).then(|| TextBox {
        center,
        up: (across.x / height, across.y / height),
        width: width + 1.0,
        height: height + 1.0,
    })
}

/// The rectangle in that of its four orientations whose top points most upwards.
fn upright(
    center: (f32, f32),
    up: (f32, f32),
    width: f32,
    height: f32,
    scale: (f32, f32),
) -> TextBox {
    let (x, y) = up;
    let orientations = [
        ((x, y), width, height),
        ((-x, -y), width, height),
        ((-y, x), height, width),
        ((y, -x), height, width),
    ];
    let (up, width, height) =
        orientations.into_iter().min_by(|a, b| a.0.1.total_cmp(&b.0.1)).unwrap_or(orientations[0]);
    TextBox { center, up, width: width * scale.0, height: height * scale.1 }
}

fn mean_inside(map: &NdTensorView<'_, f32, 2>, mask: &NdTensor<bool, 2>, points: &[PointF]) -> f32 {
    let [rows, columns] = map.shape();
    let bounds = |pick: fn(&PointF) -> f32, end: usize| {
        let low = points.iter().map(pick).fold(f32::INFINITY, f32::min).max(0.0);
        let high = points.iter().map(pick).fold(0.0, f32::max);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "indices of the map"
        )]
        let range = low as usize..(high as usize + 1).min(end);
        range
    };
    let (ys, xs) = (bounds(|point| point.y, rows), bounds(|point| point.x, columns));
    let inside = ys.flat_map(|y| xs.clone().map(move |x| [y, x])).filter(|at| mask[*at]);
    let (count, sum) = inside.fold((0.0, 0.0), |(count, sum), at| (count + 1.0_f32, sum + map[at]));
    if count > 0.0 { sum / count } else { 0.0 }
}

impl TextBox {
    /// The box cut out of the image and rotated level. A tall box is laid on its side, to read
    /// vertical text.
    pub(crate) fn cut(&self, image: &Picture) -> RgbImage {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "at least one pixel"
        )]
        let (width, height) =
            (self.width.round().max(1.0) as u32, self.height.round().max(1.0) as u32);
        #[expect(clippy::cast_precision_loss, reason = "pixel counts are far below 2^23")]
        let strip = RgbImage::from_fn(width, height, |x, y| {
            let along = x as f32 + 0.5 - self.width / 2.0;
            let towards_top = self.height / 2.0 - (y as f32 + 0.5);
            let (up_x, up_y) = self.up;
            sample(
                image,
                self.center.0 - up_y * along + up_x * towards_top,
                self.center.1 + up_x * along + up_y * towards_top,
            )
        });
        if self.height > 1.5 * self.width { image::imageops::rotate270(&strip) } else { strip }
    }
}

/// The interpolated colour at a point. Outside the image, that of its border.
fn sample(image: &Picture, x: f32, y: f32) -> Rgb<u8> {
    #[expect(clippy::cast_precision_loss, reason = "pixel counts are far below 2^23")]
    let last = ((image.width() - 1) as f32, (image.height() - 1) as f32);
    let (x, y) = ((x - 0.5).clamp(0.0, last.0), (y - 0.5).clamp(0.0, last.1));
    image::imageops::interpolate_bilinear(image, x, y).unwrap_or(Rgb([255; 3]))
}

/// Sorts lines into reading order: rows from top to bottom, each from left to right. Lines are in
/// one row if the centre of one lies within the height of the other.
pub(crate) fn reading_order(mut lines: Vec<Line>) -> Vec<Vec<Line>> {
    lines.sort_by(|a, b| a.center.1.total_cmp(&b.center.1));
    let mut rows: Vec<Vec<Line>> = Vec::new();
    for line in lines {
        let same = rows.last().and_then(|row| row.first()).is_some_and(|first| {
            (line.center.1 - first.center.1).abs() < 0.5 * first.size.1.min(line.size.1)
        });
        match rows.last_mut() {
            Some(row) if same => row.push(line),
            _ => rows.push(vec![line]),
        }
    }
    for row in &mut rows {
        row.sort_by(|a, b| a.center.0.total_cmp(&b.center.0));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::picture::{picture, pixels};

    fn line(text: &str, x: f32, y: f32) -> Line {
        Line { text: text.into(), confidence: 1.0, center: (x, y), size: (50.0, 20.0) }
    }

    #[test]
    fn lines_are_read_row_by_row() {
        let rows = reading_order(vec![
            line("d", 10.0, 100.0),
            line("b", 90.0, 14.0),
            line("a", 10.0, 20.0),
            line("c", 50.0, 60.0),
        ]);
        let texts: Vec<Vec<&str>> =
            rows.iter().map(|row| row.iter().map(|line| line.text.as_str()).collect()).collect();
        assert_eq!(texts, [vec!["a", "b"], vec!["c"], vec!["d"]]);
    }

    #[test]
    fn a_bar_of_text_is_one_box_and_a_dot_is_none() {
        let mut map = NdTensor::<f32, 2>::zeros([64, 128]);
        for y in 20..32 {
            for x in 10..110 {
                map[[y, x]] = 0.9;
            }
        }
        map[[50, 50]] = 0.9;
        let boxes = find(map.view(), (2.0, 2.0));
        assert_eq!(boxes.len(), 1);
        let found = boxes[0];
        assert!(
            (found.center.0 - 119.0).abs() < 2.0 && (found.center.1 - 51.0).abs() < 2.0,
            "{found:?}"
        );
        assert!(
            found.width > 200.0 && found.height > 24.0 && found.width > found.height,
            "{found:?}"
        );
    }

    #[test]
    fn a_turned_box_is_cut_level() {
        // A black bar with a white left half, turned by 30 degrees.
        let (sin, cos) = 30_f32.to_radians().sin_cos();
        let image = RgbImage::from_fn(100, 100, |x, y| {
            #[expect(clippy::cast_precision_loss)]
            let (dx, dy) = (x as f32 + 0.5 - 50.0, y as f32 + 0.5 - 50.0);
            let (along, across) = (dx * cos + dy * sin, dy * cos - dx * sin);
            if across.abs() < 10.0 && along > 0.0 { Rgb([0; 3]) } else { Rgb([255; 3]) }
        });
        let turned = TextBox { center: (50.0, 50.0), up: (sin, -cos), width: 60.0, height: 16.0 };
        let strip = turned.cut(&picture(&pixels(image)));
        assert_eq!(strip.dimensions(), (60, 16));
        assert_eq!(strip.get_pixel(10, 8).0, [255; 3]);
        assert_eq!(strip.get_pixel(50, 8).0, [0; 3]);
    }
}
