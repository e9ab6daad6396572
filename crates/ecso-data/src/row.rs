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
    /// Its place in the input, from 0: its name in the journal. People are told the one from 1.
    pub number: u64,
    /// What the input calls it; its place from 1, if it says nothing.
    pub id: String,
    /// The turns before the query.
    pub before: Vec<Said>,
    /// What is asked.
    pub query: String,
    /// All images, in order: those of earlier turns, then those of the query.
    pub images: Vec<Picture>,
    /// Its category, for counts; may be empty.
    pub category: String,
    /// The direct answer, where somebody has it already (traffic).
    pub draft: Option<String>,
}

/// An earlier turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    /// Who said it.
    pub role: Role,
    /// What.
    pub text: String,
    /// How many of the row's images stand in it; always before its text.
    pub images: usize,
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
    /// The image, or the pages of a document. Behind a URL there can be one.
    ///
    /// # Errors
    /// [`PictureError`].
    pub async fn read(
        &self,
        fetcher: &Fetcher,
        limits: Limits,
    ) -> Result<Vec<Image>, PictureError> {
        match self {
            Self::Url(url) => Ok(vec![fetcher.image(url, limits).await?]),
            picture => Ok(picture.here(limits)?),
        }
    }

    /// The same of one that needs no network.
    ///
    /// # Errors
    /// [`ImageError`]; behind a URL there is none.
    pub fn here(&self, limits: Limits) -> Result<Vec<Image>, ImageError> {
        match self {
            Self::Url(_) => Err(ImageError::NotFetched),
            Self::Bytes(bytes) => Image::several(bytes.clone(), limits),
            Self::File(path) => {
                let failed = |cause| ImageError::File {
                    path: PathBuf::from(&*cut(&path.to_string_lossy())),
                    cause,
                };
                let bytes = regular::read(path, limits.bytes)
                    .map_err(|error| failed(Cause::new(error.to_string(), error)))?;
                Image::several(bytes, limits)
                    .map_err(|error| failed(Cause::new(error.to_string(), error)))
            }
        }
    }
}

/// Characters of a row's own text that an error shows.
const SHOWN: usize = 200;

/// A text of a row as errors show it: its beginning, where it is long. A row may have 100 MB, and
/// its error goes to the journal.
pub(crate) fn cut(text: &str) -> Cow<'_, str> {
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => Cow::Owned(format!("{}… ({} bytes)", &text[..end], text.len())),
        None => Cow::Borrowed(text),
    }
}

impl Row {
    /// The images of each of the row's pictures, read.
    ///
    /// # Errors
    /// [`PictureError`] of the first that can't be had.
    pub async fn pictures(
        &self,
        fetcher: &Fetcher,
        limits: Limits,
    ) -> Result<Vec<Vec<Image>>, PictureError> {
        let mut images = Vec::with_capacity(self.images.len());
        for picture in &self.images {
            images.push(picture.read(fetcher, limits).await?);
        }
        Ok(images)
    }

    /// The row with its images, where `images` are those of each picture: a document stands in it
    /// as often as it has pages.
    #[must_use]
    pub fn with_pages(mut self, images: Vec<Vec<Image>>) -> (Self, Vec<Image>) {
        let mut pages = images.iter().map(Vec::len);
        for said in &mut self.before {
            said.images = pages.by_ref().take(said.images).sum();
        }
        let pictures = self.images.into_iter().zip(&images);
        self.images = pictures
            .flat_map(|(picture, pages)| std::iter::repeat_n(picture, pages.len()))
            .collect();
        (self, images.into_iter().flatten().collect())
    }

    /// The images of the query alone; those of earlier turns stand before them.
    #[must_use]
    pub fn query_images(&self) -> usize {
        self.images.len()
            - self.before.iter().map(|said| said.images).sum::<usize>().min(self.images.len())
    }

    /// The conversation that the model is asked, with each of `images` in its turn.
    #[must_use]
    pub fn chat(&self, images: &[Image]) -> Chat {
        let mut images = images.iter().cloned().map(Part::Image);
        let mut turns = Vec::with_capacity(self.before.len() + 1);
        for said in &self.before {
            let mut parts: Vec<Part> = images.by_ref().take(said.images).collect();
            parts.push(Part::Text(said.text.clone()));
            turns.push(Turn { role: said.role, parts });
        }
        let mut parts: Vec<Part> = images.collect();
        parts.push(Part::Text(self.query.clone()));
        turns.push(Turn { role: Role::User, parts });
        Chat { turns, ..Chat::default() }
    }

    /// What makes two rows the same: images and words, to the byte. Hexadecimal digits of a BLAKE3
    /// hash.
    #[must_use]
    pub fn key(&self, images: &[Image]) -> String {
        let mut key = Parts::default();
        for said in &self.before {
            key.add(said.role.as_str());
            key.add(&said.text);
            if said.images > 0 {
                key.add(said.images.to_le_bytes());
            }
        }
        key.add(&self.query);
        for image in images {
            key.add(image.digest().as_bytes());
        }
        key.hex()
    }

    /// What tells the row from another with its number: all that it holds, images to the byte, but
    /// those behind a URL by that. It reads files. Hexadecimal digits of a BLAKE3 hash.
    #[must_use]
    pub fn digest(&self) -> String {
        let mut digest = Parts::default();
        for text in [&self.id, &self.category, &self.query] {
            digest.add(text);
        }
        digest.add([u8::from(self.draft.is_some())]);
        digest.add(self.draft.as_deref().unwrap_or_default());
        digest.add(self.before.len().to_le_bytes());
        for said in &self.before {
            digest.add(said.role.as_str());
            digest.add(&said.text);
            digest.add(said.images.to_le_bytes());
        }
        for picture in &self.images {
            match picture {
                Picture::Bytes(bytes) => digest.add(blake3::hash(bytes).as_bytes()),
                Picture::File(path) => match file(path) {
                    Ok(hash) => digest.add(hash.as_bytes()),
                    Err(_) => digest.add(path.as_os_str().as_encoded_bytes()),
                },
                Picture::Url(url) => digest.add(url),
            }
        }
        digest.hex()
    }
}

/// Bytes of a file by which it is told from another. No image has more.
const TELLING: u64 = 1 << 30;

fn file(path: &Path) -> std::io::Result<blake3::Hash> {
    Ok(blake3::Hasher::new().update_reader(regular::open(path)?.take(TELLING))?.finalize())
}

/// A hash of parts, each with its length, so that other parts have another hash.
#[derive(Default)]
pub(crate) struct Parts(blake3::Hasher);

impl Parts {
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
    fn a_document_stands_in_its_turn_page_by_page() {
        let image = |number: u8| Image::from_url(format!("http://localhost/{number}"));
        let said = |images| Said { role: Role::User, text: "What?".into(), images };
        let row = Row {
            number: 0,
            id: String::new(),
            before: vec![said(1), said(0), said(2)],
            query: "And this?".into(),
            images: ["a", "b", "c", "d"].map(|name| Picture::File(name.into())).into(),
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
        let counts: Vec<usize> = row.before.iter().map(|said| said.images).collect();
        assert_eq!((counts, row.query_images()), (vec![2, 0, 4], 1));
        let files: Vec<_> =
            ["a", "a", "b", "c", "c", "c", "d"].map(|name| Picture::File(name.into())).into();
        assert_eq!(row.images, files);
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        assert_eq!(cut("short"), "short");
        let long = cut(&"é".repeat(1000)).into_owned();
        assert!(
            long.starts_with("éé")
                && long.ends_with("… (2000 bytes)")
                && long.chars().count() < 220,
            "{long}"
        );
    }

    #[tokio::test]
    async fn an_error_shows_no_more_of_a_files_name() {
        let fetcher = Fetcher::new().unwrap();
        let missing = Picture::File("x/".repeat(500).into());
        let error = missing.read(&fetcher, Limits::USUAL).await.unwrap_err().to_string();
        assert!(
            error.len() < 300 && error.starts_with("x/x/") && error.contains("(1000 bytes): "),
            "{error}"
        );
    }
}
