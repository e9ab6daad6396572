//! One row of the input: an unlabelled pair of image and query.

use std::path::PathBuf;

use bytes::Bytes;
use ecso::{Chat, Image, ImageError, Limits, Part, Role, Turn};
use ecso_openai::{FetchError, Fetcher};

/// A row.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Its place in the input, from 0: its name in the journal.
    pub number: u64,
    /// What the input calls it; its place, if it says nothing.
    pub id: String,
    /// The turns before the query, as text.
    pub before: Vec<(Role, String)>,
    /// What is asked.
    pub query: String,
    /// The images of the query, in order.
    pub images: Vec<Picture>,
    /// Its category, for counts; may be empty.
    pub category: String,
    /// The direct answer, where somebody has it already (traffic).
    pub draft: Option<String>,
}

/// Where an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Picture {
    /// In a file.
    File(PathBuf),
    /// Here, encoded.
    Bytes(Bytes),
    /// Behind a URL; fetched from public addresses only.
    Url(String),
}

/// Why a row's images can't be had.
#[derive(Debug, thiserror::Error)]
pub enum PictureError {
    /// Its file can't be read, or it is broken or too large.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// It can't be fetched.
    #[error(transparent)]
    Fetch(#[from] FetchError),
}

impl Picture {
    /// The image.
    ///
    /// # Errors
    /// [`PictureError`].
    pub async fn read(&self, fetcher: &Fetcher, limits: Limits) -> Result<Image, PictureError> {
        Ok(match self {
            Self::Bytes(bytes) => Image::from_bytes(bytes.clone(), limits)?,
            Self::Url(url) => fetcher.image(url, limits).await?,
            Self::File(path) => Image::open(path, limits)?,
        })
    }
}

impl Row {
    /// The row's images, read.
    ///
    /// # Errors
    /// [`PictureError`] of the first that can't be had.
    pub async fn pictures(&self, fetcher: &Fetcher, limits: Limits) -> Result<Vec<Image>, PictureError> {
        let mut images = Vec::with_capacity(self.images.len());
        for picture in &self.images {
            images.push(picture.read(fetcher, limits).await?);
        }
        Ok(images)
    }

    /// The conversation that the model is asked, with `images` in the query's turn.
    #[must_use]
    pub fn chat(&self, images: &[Image]) -> Chat {
        let mut turns: Vec<Turn> = self.before.iter().map(|(role, text)| Turn::text(*role, text.clone())).collect();
        let mut parts: Vec<Part> = images.iter().cloned().map(Part::Image).collect();
        parts.push(Part::Text(self.query.clone()));
        turns.push(Turn { role: Role::User, parts });
        Chat { turns, ..Chat::default() }
    }

    /// What makes two rows the same: images and words, to the byte. Hexadecimal digits of a BLAKE3 hash.
    #[must_use]
    pub fn key(&self, images: &[Image]) -> String {
        let mut key = blake3::Hasher::new();
        let mut part = |bytes: &[u8]| {
            key.update(&(bytes.len() as u64).to_le_bytes());
            key.update(bytes);
        };
        for (role, text) in &self.before {
            part(role.as_str().as_bytes());
            part(text.as_bytes());
        }
        part(self.query.as_bytes());
        for image in images {
            part(image.digest().as_bytes());
        }
        key.finalize().to_hex()[..32].to_owned()
    }
}
