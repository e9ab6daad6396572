//! Rows that say what an earlier row has said: to the byte, or nearly.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, DefaultHasher},
    sync::Arc,
};

use bytes::Bytes;
use ecso::Image;
use gaoya::minhash::{MinHashIndex, MinHasher, MinHasher32};
use image::{ImageBuffer, Rgb};
use image_hasher::{HashAlg, Hasher, HasherConfig, ImageHash};
use tokio::sync::SetOnce;

use crate::make::Reason;

/// Sides of the grid that a perceptual hash looks at: fine enough to tell pages of text apart.
const GRID: u32 = 32;
/// Of its bits, how many may differ, in per mille.
const DIFFERENT: usize = 10;
/// How alike the words of two queries must be: the Jaccard index of their runs of three characters.
const ALIKE: f64 = 0.8;
/// Hashes of a text, in bands.
const BANDS: (usize, usize) = (32, 4);

/// What becomes of a row that was seen. It is told once; until then, who asks waits.
#[derive(Debug, Clone)]
pub struct Fate {
    number: u64,
    is_made: Arc<SetOnce<bool>>,
}

impl Fate {
    /// That of a row with this number; nobody knows it yet.
    #[must_use]
    pub fn of(number: u64) -> Self {
        Self { number, is_made: Arc::default() }
    }

    /// The row's number.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Tells whether something was made of the row. Of one that failed, or that repeats another,
    /// nothing was.
    pub fn tell(&self, is_made: bool) {
        let _ = self.is_made.set(is_made);
    }

    /// Waits for it.
    pub async fn is_made(&self) -> bool {
        *self.is_made.wait().await
    }

    fn known(&self) -> Option<bool> {
        self.is_made.get().copied()
    }
}

/// An earlier row, and how it is repeated.
pub type Repeated = (Reason, Fate);

/// What was seen so far. Takes about 150 bytes a row; with near duplicates, about 350 and the words
/// of every different query.
pub struct Seen {
    exact: HashMap<String, Vec<Fate>>,
    near: Option<Near>,
}

impl Seen {
    /// Nothing yet; `near` looks for near duplicates as well.
    #[must_use]
    pub fn new(near: bool) -> Self {
        Self { exact: HashMap::new(), near: near.then(Near::new) }
    }

    /// Remembers a row: its fate, its key, its query, and the [`Marker`]'s marks of its images.
    /// Gives the earlier rows under way that it repeats: it is one too many if something is made of
    /// any of them.
    ///
    /// # Errors
    /// The earlier row that it repeats, if something was made of that.
    pub fn see(
        &mut self,
        fate: &Fate,
        key: &str,
        query: &str,
        marks: &[String],
    ) -> Result<Vec<Repeated>, Repeated> {
        let exact = self
            .exact
            .get(key)
            .into_iter()
            .flatten()
            .map(|earlier| (Reason::Duplicate, earlier.clone()));
        let near = self.near.iter().flat_map(|near| near.find(query, marks));
        let repeated = exact.chain(near.map(|earlier| (Reason::NearDuplicate, earlier)));
        let mut under_way = Vec::new();
        for (reason, earlier) in repeated.filter(|(_, earlier)| earlier.number != fate.number) {
            match earlier.known() {
                Some(true) => return Err((reason, earlier)),
                Some(false) => {}
                None => under_way.push((reason, earlier)),
            }
        }
        self.remember(fate.clone(), key, query, marks);
        Ok(under_way)
    }

    /// Remembers a row, whatever it repeats.
    pub fn remember(&mut self, fate: Fate, key: &str, query: &str, marks: &[String]) {
        if let Some(near) = &mut self.near {
            near.insert(query, marks, fate.clone());
        }
        self.exact.entry(key.to_owned()).or_default().push(fate);
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
        let pixels = pixels.filter_map(|pixels| {
            let (width, height) = pixels.dimensions();
            ImageBuffer::<Rgb<u8>, Bytes>::from_raw(width, height, pixels.as_bytes().clone())
        });
        pixels.map(|pixels| self.0.hash_image(&pixels).to_base64()).collect()
    }
}

/// Rows by what they nearly are: queries that are alike, and below each the images that were asked
/// about with it.
struct Near {
    words: MinHasher32<BuildHasherDefault<DefaultHasher>>,
    queries: MinHashIndex<u32, usize>,
    places: HashMap<String, usize>,
    rows: Vec<Vec<(Vec<ImageHash>, Fate)>>,
}

impl Near {
    fn new() -> Self {
        let words = MinHasher32::new_with_hasher(BANDS.0 * BANDS.1, BuildHasherDefault::default());
        let queries = MinHashIndex::new(BANDS.0, BANDS.1, ALIKE);
        Self { words, queries, places: HashMap::new(), rows: Vec::new() }
    }

    /// Rows that are nearly this one, in order.
    fn find(&self, query: &str, marks: &[String]) -> Vec<Fate> {
        let marks = read(marks);
        let mut alike: Vec<usize> = match self.places.get(query) {
            Some(place) => vec![*place],
            None => self.queries.query(&self.signature(query)).into_iter().copied().collect(),
        };
        alike.sort_unstable();
        let rows = alike.into_iter().flat_map(|place| &self.rows[place]);
        let mut found: Vec<Fate> =
            rows.filter(|(others, _)| same(&marks, others)).map(|(_, fate)| fate.clone()).collect();
        found.sort_unstable_by_key(Fate::number);
        found
    }

    fn insert(&mut self, query: &str, marks: &[String], fate: Fate) {
        let place = self.places.get(query).copied().unwrap_or(self.rows.len());
        if place == self.rows.len() {
            self.rows.push(Vec::new());
            self.queries.insert(place, self.signature(query));
            self.places.insert(query.to_owned(), place);
        }
        self.rows[place].push((read(marks), fate));
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
        Row {
            number,
            id,
            before: vec![],
            query,
            images: vec![],
            category: String::new(),
            draft: None,
        }
    }

    fn see(seen: &mut Seen, row: &Row, image: Image) -> (Fate, Result<Vec<Repeated>, Repeated>) {
        let (fate, images) = (Fate::of(row.number), [image]);
        let marks = Marker::default().marks(&images);
        let seen = seen.see(&fate, &row.key(&images), &row.query, &marks);
        (fate, seen)
    }

    fn numbers(repeated: impl IntoIterator<Item = Repeated>) -> Vec<(Reason, u64)> {
        repeated.into_iter().map(|(reason, earlier)| (reason, earlier.number())).collect()
    }

    const QUERY: &str = "What stands on the list that hangs beside the door of the kitchen?";

    #[test]
    fn the_same_is_a_duplicate_and_nearly_the_same_if_asked_for() {
        for near in [false, true] {
            let mut seen = Seen::new(near);
            let mut repeated = |row: &Row, image| {
                let (fate, seen) = see(&mut seen, row, image);
                fate.tell(seen.is_ok());
                numbers(seen.err()).pop()
            };
            assert_eq!(repeated(&row(0, QUERY), image(1, ImageFormat::Png)), None);
            assert_eq!(
                repeated(&row(0, QUERY), image(1, ImageFormat::Png)),
                None,
                "itself, after a crash"
            );
            assert_eq!(
                repeated(&row(1, QUERY), image(1, ImageFormat::Png)),
                Some((Reason::Duplicate, 0))
            );
            // The same picture in another file format, asked about in nearly the same words.
            let other = QUERY.replace("that hangs", "which hangs");
            let nearly = repeated(&row(2, &other), image(1, ImageFormat::Gif));
            assert_eq!(nearly, near.then_some((Reason::NearDuplicate, 0)));
            assert_eq!(
                repeated(&row(3, QUERY), image(40, ImageFormat::Png)),
                None,
                "another picture"
            );
            assert_eq!(
                repeated(&row(4, "Who wrote this?"), image(1, ImageFormat::Png)),
                None,
                "another question"
            );
        }
    }

    #[test]
    fn a_row_of_which_nothing_was_made_is_not_repeated() {
        let mut seen = Seen::new(true);
        let (png, gif) = (image(1, ImageFormat::Png), image(1, ImageFormat::Gif));
        let (first, _) = see(&mut seen, &row(0, QUERY), png.clone());
        let (second, under_way) = see(&mut seen, &row(1, QUERY), gif.clone());
        assert_eq!(numbers(under_way.unwrap()), [(Reason::NearDuplicate, 0)]);
        first.tell(false);
        let (_, under_way) = see(&mut seen, &row(2, QUERY), png);
        assert_eq!(numbers(under_way.unwrap()), [(Reason::NearDuplicate, 1)]);
        second.tell(true);
        let (_, made) = see(&mut seen, &row(3, QUERY), gif);
        assert_eq!(numbers(made.err()), [(Reason::Duplicate, 1)]);
    }
}
