//! Rows that say what an earlier row has said: to the byte, or nearly.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, DefaultHasher},
};

use ecso::Image;
use gaoya::minhash::{MinHashIndex, MinHasher, MinHasher32};
use image_hasher::{HashAlg, Hasher, HasherConfig, ImageHash};

use crate::make::Reason;

/// Sides of the grid that a perceptual hash looks at: fine enough to tell pages of text apart.
const GRID: u32 = 32;
/// Of its bits, how many may differ, in per mille.
const DIFFERENT: usize = 10;
/// How alike the words of two queries must be: the Jaccard index of their runs of three characters.
const ALIKE: f64 = 0.8;
/// Hashes of a text, in bands.
const BANDS: (usize, usize) = (32, 4);

/// What was seen so far. Takes about 40 bytes a row; with near duplicates, about 250 and the words of every different query.
pub struct Seen {
    exact: HashMap<String, u64>,
    near: Option<Near>,
}

impl Seen {
    /// Nothing yet; `near` looks for near duplicates as well.
    #[must_use]
    pub fn new(near: bool) -> Self {
        Self { exact: HashMap::new(), near: near.then(Near::new) }
    }

    /// Remembers a row that repeats no earlier one: its number, its key, its query, and the [`Marker`]'s marks of its images.
    ///
    /// # Errors
    /// Why it is one row too many, and which row it repeats.
    pub fn first(&mut self, number: u64, key: &str, query: &str, marks: &[String]) -> Result<(), (Reason, u64)> {
        if let Some(first) = self.exact.get(key).filter(|first| **first != number) {
            return Err((Reason::Duplicate, *first));
        }
        let nearly = self.near.as_ref().and_then(|near| near.find(query, marks));
        if let Some(first) = nearly.filter(|first| *first != number) {
            return Err((Reason::NearDuplicate, first));
        }
        self.remember(number, key, query, marks);
        Ok(())
    }

    /// Remembers a row, whatever it repeats.
    pub fn remember(&mut self, number: u64, key: &str, query: &str, marks: &[String]) {
        self.exact.entry(key.to_owned()).or_insert(number);
        if let Some(near) = &mut self.near {
            near.insert(query, marks, number);
        }
    }
}

/// Marks images, so that nearly equal ones have nearly equal marks: perceptual hashes.
pub struct Marker(Hasher);

impl Default for Marker {
    fn default() -> Self {
        Self(HasherConfig::new().hash_alg(HashAlg::Gradient).hash_size(GRID, GRID).to_hasher())
    }
}

impl Marker {
    /// One an image; a broken one has none, and its row fails later.
    #[must_use]
    pub fn marks(&self, images: &[Image]) -> Vec<String> {
        let pixels = images.iter().filter_map(|image| image.pixels().ok());
        pixels.map(|pixels| self.0.hash_image(pixels).to_base64()).collect()
    }
}

/// Rows by what they nearly are: queries that are alike, and below each the images that were asked about with it.
struct Near {
    words: MinHasher32<BuildHasherDefault<DefaultHasher>>,
    queries: MinHashIndex<u32, usize>,
    places: HashMap<String, usize>,
    rows: Vec<Vec<(Vec<ImageHash>, u64)>>,
}

impl Near {
    fn new() -> Self {
        let words = MinHasher32::new_with_hasher(BANDS.0 * BANDS.1, BuildHasherDefault::default());
        let queries = MinHashIndex::new(BANDS.0, BANDS.1, ALIKE);
        Self { words, queries, places: HashMap::new(), rows: Vec::new() }
    }

    fn find(&self, query: &str, marks: &[String]) -> Option<u64> {
        let marks = read(marks);
        let mut alike: Vec<usize> = match self.places.get(query) {
            Some(place) => vec![*place],
            None => self.queries.query(&self.signature(query)).into_iter().copied().collect(),
        };
        alike.sort_unstable();
        let rows = alike.into_iter().flat_map(|place| &self.rows[place]);
        rows.filter(|(others, _)| same(&marks, others)).map(|(_, number)| *number).min()
    }

    fn insert(&mut self, query: &str, marks: &[String], number: u64) {
        let place = self.places.get(query).copied().unwrap_or(self.rows.len());
        if place == self.rows.len() {
            self.rows.push(Vec::new());
            self.queries.insert(place, self.signature(query));
            self.places.insert(query.to_owned(), place);
        }
        self.rows[place].push((read(marks), number));
    }

    fn signature(&self, query: &str) -> Vec<u32> {
        let query: Vec<char> = query.to_lowercase().chars().collect();
        let runs: Vec<String> = if query.len() < 3 {
            vec![query.iter().collect()]
        } else {
            query.windows(3).map(|run| run.iter().collect()).collect()
        };
        self.words.create_signature(runs.iter())
    }
}

fn read(marks: &[String]) -> Vec<ImageHash> {
    marks.iter().filter_map(|mark| ImageHash::from_base64(mark).ok()).collect()
}

fn same(marks: &[ImageHash], others: &[ImageHash]) -> bool {
    let close = |(mark, other): (&ImageHash, &ImageHash)| {
        mark.dist(other) as usize * 1000 <= mark.as_bytes().len() * 8 * DIFFERENT
    };
    marks.len() == others.len() && marks.iter().zip(others).all(close)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use ecso::Limits;
    use image::{ImageFormat, Rgb, RgbImage};

    use super::*;
    use crate::row::Row;

    fn image(turn: u8, format: ImageFormat) -> Image {
        let pixels = RgbImage::from_fn(64, 64, |x, y| {
            let value = u8::try_from((x * u32::from(turn) + y * 3) % 256).unwrap();
            Rgb([value, value.wrapping_mul(turn), 128])
        });
        let mut bytes = Cursor::new(Vec::new());
        pixels.write_to(&mut bytes, format).unwrap();
        Image::from_bytes(bytes.into_inner(), Limits::default()).unwrap()
    }

    fn row(number: u64, query: &str) -> Row {
        let (id, query) = (number.to_string(), query.to_owned());
        Row { number, id, before: vec![], query, images: vec![], category: String::new(), draft: None }
    }

    fn repeats(seen: &mut Seen, row: &Row, image: Image) -> Option<(Reason, u64)> {
        let images = [image];
        let marks = Marker::default().marks(&images);
        seen.first(row.number, &row.key(&images), &row.query, &marks).err()
    }

    #[test]
    fn the_same_is_a_duplicate_and_nearly_the_same_if_asked_for() {
        let query = "What stands on the list that hangs beside the door of the kitchen?";
        for near in [false, true] {
            let mut seen = Seen::new(near);
            let mut see = |row: &Row, image| repeats(&mut seen, row, image);
            assert_eq!(see(&row(0, query), image(1, ImageFormat::Png)), None);
            assert_eq!(see(&row(0, query), image(1, ImageFormat::Png)), None, "itself, after a crash");
            assert_eq!(see(&row(1, query), image(1, ImageFormat::Png)), Some((Reason::Duplicate, 0)));
            // The same picture in another file format, asked about in nearly the same words.
            let other = query.replace("that hangs", "which hangs");
            let nearly = see(&row(2, &other), image(1, ImageFormat::Gif));
            assert_eq!(nearly, near.then_some((Reason::NearDuplicate, 0)));
            assert_eq!(see(&row(3, query), image(40, ImageFormat::Png)), None, "another picture");
            assert_eq!(see(&row(4, "Who wrote this?"), image(1, ImageFormat::Png)), None, "another question");
        }
    }
}
