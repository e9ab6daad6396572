//! One row of the input: an unlabelled pair of image and query.

use std::{
    borrow::Cow,
    io::Read,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use ecso::{Cause, Chat, Image, ImageError, Limits, Part, Role, Turn};
use ecso_openai::{FetchError, Fetcher};

use crate::regular;

/// A row.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The row's index in the input, which identifies it in the journal. Users see it plus one.
    pub number: u64,
    /// The row's id in the input; if it has none, its number plus one.
    pub id: String,
    /// The turns before the query.
    pub earlier: Vec<EarlierTurn>,
    /// The query.
    pub query: String,
    /// All images in order: those of earlier turns, then those of the query.
    pub images: Vec<ImageSource>,
    /// The category, for counts; may be empty.
    pub category: String,
    /// The direct answer, if the input has it (recorded traffic).
    pub draft: Option<String>,
}

/// A turn before the query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EarlierTurn {
    /// Whose turn it is.
    pub role: Role,
    /// The text.
    pub text: String,
    /// How many of the row's images belong to it; they always precede its text.
    pub images: usize,
}

/// Where an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageSource {
    /// A file.
    File(PathBuf),
    /// The encoded image itself.
    Bytes(Bytes),
    /// A URL; fetched from public addresses only.
    Url(String),
}

/// Why a row's images can't be read.
#[derive(Debug, thiserror::Error)]
pub enum ImageSourceError {
    /// The file can't be read, or the image is broken or too large.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The image can't be fetched.
    #[error(transparent)]
    Fetch(#[from] FetchError),
}

impl ImageSource {
    /// Reads the image, or the pages of a document. A URL yields one image.
    ///
    /// # Errors
    /// [`ImageSourceError`].
    pub async fn read(
        &self,
        fetcher: &Fetcher,
        limits: Limits,
    ) -> Result<Vec<Image>, ImageSourceError> {
        match self {
            Self::Url(url) => Ok(vec![fetcher.image(url, limits).await?]),
            local => Ok(local.read_local(limits)?),
        }
    }

    /// [`ImageSource::read`] without the network.
    ///
    /// # Errors
    /// [`ImageError`]; always for a URL.
    pub fn read_local(&self, limits: Limits) -> Result<Vec<Image>, ImageError> {
        match self {
            Self::Url(_) => Err(ImageError::NotFetched),
            Self::Bytes(bytes) => Image::pages(bytes.clone(), limits),
            Self::File(path) => {
                let failed = |cause| ImageError::File {
                    path: PathBuf::from(&*shorten(&path.to_string_lossy())),
                    cause,
                };
                let bytes = regular::read(path, limits.bytes)
                    .map_err(|error| failed(Cause::new(error.to_string(), error)))?;
                Image::pages(bytes, limits)
                    .map_err(|error| failed(Cause::new(error.to_string(), error)))
            }
        }
    }
}

/// Maximum number of characters of a row's own text in an error.
const MAX_SHOWN: usize = 200;

/// Shortens a text of a row for an error message. A row may have 100 MB, and its error is written
/// to the journal.
pub(crate) fn shorten(text: &str) -> Cow<'_, str> {
    shorten_to(MAX_SHOWN, text)
}

/// [`shorten`] to `most` characters.
pub(crate) fn shorten_to(most: usize, text: &str) -> Cow<'_, str> {
    match text.char_indices().nth(most) {
        Some((end, _)) => Cow::Owned(format!("{}… ({} bytes)", &text[..end], text.len())),
        None => Cow::Borrowed(text),
    }
}

impl Row {
    /// Reads the images of each of the row's sources.
    ///
    /// # Errors
    /// [`ImageSourceError`] of the first source that can't be read.
    pub async fn read_images(
        &self,
        fetcher: &Fetcher,
        limits: Limits,
    ) -> Result<Vec<Vec<Image>>, ImageSourceError> {
        let mut images = Vec::with_capacity(self.images.len());
        for source in &self.images {
            images.push(source.read(fetcher, limits).await?);
        }
        Ok(images)
    }

    /// The row with the images of its sources: the source of a document is repeated for each page.
    #[must_use]
    pub fn with_pages(mut self, images: Vec<Vec<Image>>) -> (Self, Vec<Image>) {
        let mut pages = images.iter().map(Vec::len);
        for turn in &mut self.earlier {
            turn.images = pages.by_ref().take(turn.images).sum();
        }
        let sources = self.images.into_iter().zip(&images);
        self.images =
            sources.flat_map(|(source, pages)| std::iter::repeat_n(source, pages.len())).collect();
        (self, images.into_iter().flatten().collect())
    }

    /// The number of images of the query itself; those of earlier turns precede them.
    #[must_use]
    pub fn query_images(&self) -> usize {
        self.images.len()
            - self.earlier.iter().map(|turn| turn.images).sum::<usize>().min(self.images.len())
    }

    /// The conversation for the model, with each of `images` in its turn.
    #[must_use]
    pub fn chat(&self, images: &[Image]) -> Chat {
        let mut images = images.iter().cloned().map(Part::Image);
        let mut turns = Vec::with_capacity(self.earlier.len() + 1);
        for turn in &self.earlier {
            let mut parts: Vec<Part> = images.by_ref().take(turn.images).collect();
            parts.push(Part::Text(turn.text.clone()));
            turns.push(Turn { role: turn.role, parts });
        }
        let mut parts: Vec<Part> = images.collect();
        parts.push(Part::Text(self.query.clone()));
        turns.push(Turn { role: Role::User, parts });
        Chat { turns, ..Chat::default() }
    }

    /// Identifies the content of the row: equal keys mean equal images and texts, to the byte.
    /// Hexadecimal digits of a BLAKE3 hash.
    #[must_use]
    pub fn key(&self, images: &[Image]) -> String {
        let mut key = PartsHasher::default();
        for turn in &self.earlier {
            key.add(turn.role.as_str());
            key.add(&turn.text);
            if turn.images > 0 {
                key.add(turn.images.to_le_bytes());
            }
        }
        key.add(&self.query);
        for image in images {
            key.add(image.digest().as_bytes());
        }
        key.hex()
    }

    /// Identifies the row among rows with its number, by everything that it holds: images by their
    /// bytes, or by their URL. Reads image files. Hexadecimal digits of a BLAKE3 hash.
    #[must_use]
    pub fn digest(&self) -> String {
        let mut digest = PartsHasher::default();
        for text in [&self.id, &self.category, &self.query] {
            digest.add(text);
        }
        digest.add([u8::from(self.draft.is_some())]);
        digest.add(self.draft.as_deref().unwrap_or_default());
        digest.add(self.earlier.len().to_le_bytes());
        for turn in &self.earlier {
            digest.add(turn.role.as_str());
            digest.add(&turn.text);
            digest.add(turn.images.to_le_bytes());
        }
        for source in &self.images {
            match source {
                ImageSource::Bytes(bytes) => digest.add(blake3::hash(bytes).as_bytes()),
                ImageSource::File(path) => match hash_file(path) {
                    Ok(hash) => digest.add(hash.as_bytes()),
                    Err(_) => digest.add(path.as_os_str().as_encoded_bytes()),
                },
                ImageSource::Url(url) => digest.add(url),
            }
        }
        digest.hex()
    }
}

/// Maximum number of bytes of a file that are hashed. No image has more.
const MAX_HASHED: u64 = 1 << 30;

fn hash_file(path: &Path) -> std::io::Result<blake3::Hash> {
    Ok(blake3::Hasher::new().update_reader(regular::open(path)?.take(MAX_HASHED))?.finalize())
}

/// Hashes parts, each with its length, so that different parts have different hashes.
#[derive(Default)]
pub(crate) struct PartsHasher(blake3::Hasher);

impl PartsHasher {
    pub(crate) fn add(&mut self, part: impl AsRef<[u8]>) {
        let part = part.as_ref();
        self.0.update(&(part.len() as u64).to_le_bytes()).update(part);
    }

    pub(crate) fn hex(&self) -> String {
        self.0.finalize().to_hex()[..32].to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_becomes_the_pages_of_its_turn() {
        let image = |number: u8| Image::from_url(format!("http://localhost/{number}"));
        let turn = |images| EarlierTurn { role: Role::User, text: "What?".into(), images };
        let row = Row {
            number: 0,
            id: String::new(),
            earlier: vec![turn(1), turn(0), turn(2)],
            query: "And this?".into(),
            images: ["a", "b", "c", "d"].map(|name| ImageSource::File(name.into())).into(),
            category: String::new(),
            draft: None,
        };
        let pages = vec![
            vec![image(0), image(1)],
            vec![image(2)],
            vec![image(3), image(4), image(5)],
            vec![image(6)],
        ];
        let (row, images) = row.with_pages(pages);
        assert_eq!(images, (0..7).map(image).collect::<Vec<_>>());
        let counts: Vec<usize> = row.earlier.iter().map(|turn| turn.images).collect();
        assert_eq!((counts, row.query_images()), (vec![2, 0, 4], 1));
        let files: Vec<_> =
            ["a", "a", "b", "c", "c", "c", "d"].map(|name| ImageSource::File(name.into())).into();
        assert_eq!(row.images, files);
    }

    #[test]
    fn long_texts_are_shortened_between_characters() {
        assert_eq!(shorten("short"), "short");
        let long = shorten(&"é".repeat(1000)).into_owned();
        assert!(
            long.starts_with("éé")
                && long.ends_with("… (2000 bytes)")
                && long.chars().count() < 220,
            "{long}"
        );
    }

    #[tokio::test]
    async fn errors_shorten_long_file_names() {
        let fetcher = Fetcher::new().unwrap();
        let missing = ImageSource::File("x/".repeat(500).into());
        let error = missing.read(&fetcher, Limits::DEFAULT).await.unwrap_err().to_string();
        assert!(
            error.len() < 300 && error.starts_with("x/x/") && error.contains("(1000 bytes): "),
            "{error}"
        );
    }
}
