//! Turns the messages from Python into a conversation.

use std::path::PathBuf;

use ecso::{Chat, Image, Limits, Part, Role, Turn, is_data_url};
use ecso_gateway::settings::ImageUrls;
use ecso_openai::Fetcher;
use pyo3::{prelude::*, types::PyBytes};

use crate::failure::Failure;

/// A part of a turn: its kind (`text`, `bytes`, `path` or `url`) and value.
#[derive(Debug)]
enum Piece {
    Text(String),
    Bytes(Vec<u8>),
    Path(PathBuf),
    Url(String),
}

impl<'a, 'py> FromPyObject<'a, 'py> for Piece {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let (kind, value): (String, Bound<'py, PyAny>) = object.extract()?;
        Ok(match kind.as_str() {
            "text" => Self::Text(value.extract()?),
            "bytes" => Self::Bytes(value.cast::<PyBytes>()?.as_bytes().to_vec()),
            "path" => Self::Path(value.extract()?),
            _ => Self::Url(value.extract()?),
        })
    }
}

/// A conversation from Python: roles with the pieces of their turns.
#[derive(Debug, FromPyObject)]
#[pyo3(transparent)]
pub(crate) struct Messages(Vec<(String, Vec<Piece>)>);

/// Reads images.
pub(crate) struct ImageReader {
    pub(crate) limits: Limits,
    pub(crate) urls: ImageUrls,
    pub(crate) fetcher: Fetcher,
}

impl ImageReader {
    async fn read(&self, piece: Piece) -> Result<Vec<Image>, Failure> {
        Ok(match piece {
            Piece::Bytes(bytes) => Image::pages(bytes, self.limits)?,
            Piece::Path(path) => {
                if path.metadata().is_ok_and(|metadata| !metadata.is_file()) {
                    return Err(Failure::image(format!(
                        "{} is not a regular file",
                        path.display()
                    )));
                }
                Image::open_pages(path, self.limits)?
            }
            Piece::Url(url) if is_data_url(&url) => vec![Image::from_data_url(&url, self.limits)?],
            Piece::Url(url) => match self.urls {
                ImageUrls::Pass => vec![Image::from_url(url)],
                ImageUrls::Refuse => {
                    return Err(Failure::image(
                        "images behind URLs are refused (gateway.image_urls); pass their bytes",
                    ));
                }
                ImageUrls::Fetch => {
                    let fetched = self.fetcher.image(&url, self.limits).await;
                    vec![fetched.map_err(|error| Failure::image(error.to_string()))?]
                }
            },
            Piece::Text(_) => Vec::new(),
        })
    }

    /// Builds the conversation and reads its images.
    pub(crate) async fn chat(&self, messages: Messages) -> Result<Chat, Failure> {
        let pieces = messages.0.iter().flat_map(|(_, pieces)| pieces);
        let count = pieces.filter(|piece| !matches!(piece, Piece::Text(_))).count();
        let mut number = 0;
        let mut turns = Vec::with_capacity(messages.0.len());
        for (role, pieces) in messages.0 {
            let role = match role.as_str() {
                "system" | "developer" => Role::System,
                "user" => Role::User,
                "assistant" => Role::Assistant,
                other => {
                    return Err(Failure::input(format!("unknown role `{other}`")));
                }
            };
            let mut parts = Vec::with_capacity(pieces.len());
            for piece in pieces {
                match piece {
                    Piece::Text(text) => parts.push(Part::Text(text)),
                    image => {
                        number += 1;
                        let pages = self.read(image).await;
                        let pages = pages.map_err(|failure| failure.in_image(number, count))?;
                        parts.extend(pages.into_iter().map(Part::Image));
                    }
                }
            }
            turns.push(Turn { role, parts });
        }
        Ok(Chat { turns, ..Chat::default() })
    }
}
