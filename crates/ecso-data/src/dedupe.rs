//! Finds rows that repeat an earlier row, exactly or nearly.

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

use crate::generate::Reason;

/// Width and height of the grid of a perceptual hash: fine enough to tell pages of text apart.
const GRID: u32 = 32;
/// Maximum share of differing bits between near-duplicate images, per mille.
const MAX_DIFFERENT: usize = 10;
/// Minimum similarity of near-duplicate queries: the Jaccard index of their character trigrams.
const MIN_SIMILARITY: f64 = 0.8;
/// Number of bands and of hashes per band of a query's `MinHash`.
const BANDS: (usize, usize) = (32, 4);

/// Whether a row gets an outcome. It is set once; readers wait until then.
#[derive(Debug, Clone)]
pub struct RowState {
    number: u64,
    has_outcome: Arc<SetOnce<bool>>,
}

impl RowState {
    /// The unresolved state of the row with this number.
    #[must_use]
    pub fn new(number: u64) -> Self {
        Self { number, has_outcome: Arc::default() }
    }

    /// The row's number.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Sets whether the row has an outcome of its own. Rows that fail or repeat another have none.
    pub fn resolve(&self, has_outcome: bool) {
        let _ = self.has_outcome.set(has_outcome);
    }

    /// Waits until the state is resolved.
    pub async fn has_outcome(&self) -> bool {
        *self.has_outcome.wait().await
    }

    fn resolved(&self) -> Option<bool> {
        self.has_outcome.get().copied()
    }
}

/// How a row repeats an earlier one, and that row.
pub type Repeat = (Reason, RowState);

/// The rows so far. Takes about 150 bytes per row; with near duplicates about 350, plus the text of
/// every distinct query.
pub struct SeenRows {
    exact: HashMap<String, Vec<RowState>>,
    near: Option<NearIndex>,
}

impl SeenRows {
    /// Creates an empty index; with `near` it also finds near duplicates.
    #[must_use]
    pub fn new(near: bool) -> Self {
        Self { exact: HashMap::new(), near: near.then(NearIndex::new) }
    }

    /// Adds a row with its key, its query and the [`PerceptualHasher`]'s hashes of its images.
    /// Returns the unresolved earlier rows that it repeats: it is a duplicate if any of these gets
    /// an outcome.
    ///
    /// # Errors
    /// The earlier row that it repeats, if that has an outcome.
    pub fn check(
        &mut self,
        state: &RowState,
        key: &str,
        query: &str,
        image_hashes: &[String],
    ) -> Result<Vec<Repeat>, Repeat> {
        let exact = self
            .exact
            .get(key)
            .into_iter()
            .flatten()
            .map(|earlier| (Reason::Duplicate, earlier.clone()));
        let near = self.near.iter().flat_map(|near| near.find(query, image_hashes));
        let repeats = exact.chain(near.map(|earlier| (Reason::NearDuplicate, earlier)));
        let mut unresolved = Vec::new();
        for (reason, earlier) in repeats.filter(|(_, earlier)| earlier.number != state.number) {
            match earlier.resolved() {
                Some(true) => return Err((reason, earlier)),
                Some(false) => {}
                None => unresolved.push((reason, earlier)),
            }
        }
        self.add(state.clone(), key, query, image_hashes);
        Ok(unresolved)
    }

    /// Adds a row, whether it repeats another or not.
    pub fn add(&mut self, state: RowState, key: &str, query: &str, image_hashes: &[String]) {
        if let Some(near) = &mut self.near {
            near.insert(query, image_hashes, state.clone());
        }
        self.exact.entry(key.to_owned()).or_default().push(state);
    }
}

/// Hashes images so that nearly equal ones have nearly equal hashes.
pub struct PerceptualHasher(Hasher);

impl Default for PerceptualHasher {
    fn default() -> Self {
        Self(HasherConfig::new().hash_alg(HashAlg::Gradient).hash_size(GRID, GRID).to_hasher())
    }
}

impl PerceptualHasher {
    /// Returns a hash for each image. A broken image has none, and its row fails later.
    #[must_use]
    pub fn hash_all(&self, images: &[Image]) -> Vec<String> {
        let pixels = images.iter().filter_map(|image| image.pixels().ok());
        let pixels = pixels.filter_map(|pixels| {
            let (width, height) = pixels.dimensions();
            ImageBuffer::<Rgb<u8>, Bytes>::from_raw(width, height, pixels.as_bytes().clone())
        });
        pixels.map(|pixels| self.0.hash_image(&pixels).to_base64()).collect()
    }
}

/// Finds near duplicates: similar queries, and below each query the image hashes of its rows.
struct NearIndex {
    hasher: MinHasher32<BuildHasherDefault<DefaultHasher>>,
    queries: MinHashIndex<u32, usize>,
    /// Indices into `rows`, by query.
    places: HashMap<String, usize>,
    rows: Vec<Vec<(Vec<ImageHash>, RowState)>>,
}

impl NearIndex {
    fn new() -> Self {
        let hasher = MinHasher32::new_with_hasher(BANDS.0 * BANDS.1, BuildHasherDefault::default());
        let queries = MinHashIndex::new(BANDS.0, BANDS.1, MIN_SIMILARITY);
        Self { hasher, queries, places: HashMap::new(), rows: Vec::new() }
    }

    /// The rows that nearly equal this one, in order.
    fn find(&self, query: &str, image_hashes: &[String]) -> Vec<RowState> {
        let hashes = parse_hashes(image_hashes);
        let mut similar: Vec<usize> = match self.places.get(query) {
            Some(place) => vec![*place],
            None => self.queries.query(&self.signature(query)).into_iter().copied().collect(),
        };
        similar.sort_unstable();
        let rows = similar.into_iter().flat_map(|place| &self.rows[place]);
        let mut found: Vec<RowState> = rows
            .filter(|(others, _)| are_near(&hashes, others))
            .map(|(_, row)| row.clone())
            .collect();
        found.sort_unstable_by_key(RowState::number);
        found
    }

    fn insert(&mut self, query: &str, image_hashes: &[String], row: RowState) {
        let place = self.places.get(query).copied().unwrap_or(self.rows.len());
        if place == self.rows.len() {
            self.rows.push(Vec::new());
            self.queries.insert(place, self.signature(query));
            self.places.insert(query.to_owned(), place);
        }
        self.rows[place].push((parse_hashes(image_hashes), row));
    }

    fn signature(&self, query: &str) -> Vec<u32> {
        let query: Vec<char> = query.to_lowercase().chars().collect();
        let trigrams: Vec<String> = if query.len() < 3 {
            vec![query.iter().collect()]
        } else {
            query.windows(3).map(|trigram| trigram.iter().collect()).collect()
        };
        self.hasher.create_signature(trigrams.iter())
    }
}

fn parse_hashes(hashes: &[String]) -> Vec<ImageHash> {
    hashes.iter().filter_map(|hash| ImageHash::from_base64(hash).ok()).collect()
}

fn are_near(hashes: &[ImageHash], others: &[ImageHash]) -> bool {
    let is_near = |(hash, other): (&ImageHash, &ImageHash)| {
        hash.dist(other) as usize * 1000 <= hash.as_bytes().len() * 8 * MAX_DIFFERENT
    };
    hashes.len() == others.len() && hashes.iter().zip(others).all(is_near)
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
            earlier: vec![],
            query,
            images: vec![],
            category: String::new(),
            draft: None,
        }
    }

    fn check(
        seen: &mut SeenRows,
        row: &Row,
        image: Image,
    ) -> (RowState, Result<Vec<Repeat>, Repeat>) {
        let (state, images) = (RowState::new(row.number), [image]);
        let hashes = PerceptualHasher::default().hash_all(&images);
        let repeats = seen.check(&state, &row.key(&images), &row.query, &hashes);
        (state, repeats)
    }

    fn numbers(repeats: impl IntoIterator<Item = Repeat>) -> Vec<(Reason, u64)> {
        repeats.into_iter().map(|(reason, earlier)| (reason, earlier.number())).collect()
    }

    const QUERY: &str = "What stands on the list that hangs beside the door of the kitchen?";

    #[test]
    fn near_duplicates_are_found_if_asked_for() {
        for near in [false, true] {
            let mut seen = SeenRows::new(near);
            let mut repeated = |row: &Row, image| {
                let (state, repeats) = check(&mut seen, row, image);
                state.resolve(repeats.is_ok());
                numbers(repeats.err()).pop()
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
                repeated(&row(4, "Speaker wrote this?"), image(1, ImageFormat::Png)),
                None,
                "another question"
            );
        }
    }

    #[test]
    fn rows_without_an_outcome_are_not_repeated() {
        let mut seen = SeenRows::new(true);
        let (png, gif) = (image(1, ImageFormat::Png), image(1, ImageFormat::Gif));
        let (first, _) = check(&mut seen, &row(0, QUERY), png.clone());
        let (second, unresolved) = check(&mut seen, &row(1, QUERY), gif.clone());
        assert_eq!(numbers(unresolved.unwrap()), [(Reason::NearDuplicate, 0)]);
        first.resolve(false);
        let (_, unresolved) = check(&mut seen, &row(2, QUERY), png);
        assert_eq!(numbers(unresolved.unwrap()), [(Reason::NearDuplicate, 1)]);
        second.resolve(true);
        let (_, repeats) = check(&mut seen, &row(3, QUERY), gif);
        assert_eq!(numbers(repeats.err()), [(Reason::Duplicate, 1)]);
    }
}
