//! An item of a benchmark: the request, and what a good answer is.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use ecso::{Cause, Chat, Image, ImageError, Limits, Part, Role, Turn};
use serde::{Deserialize, Serialize};

use crate::parquet;

/// An item of a benchmark.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// The id, unique within the benchmark.
    pub id: String,
    /// The scenario, topic, subtask or category.
    pub scenario: String,
    /// Items that share a question share a cluster; confidence intervals are computed over
    /// clusters.
    pub cluster: String,
    /// The earlier turns of the conversation, with their images.
    pub earlier: Vec<(Role, String, Vec<Picture>)>,
    /// The text that is sent.
    pub query: String,
    /// The request in words, for a judge that can't see images: the query, or what the image asks
    /// for.
    pub request: String,
    /// The images, in order.
    pub images: Vec<Picture>,
    /// The direct answer, if it is already known. The model is then not asked for one.
    pub draft: Option<String>,
    /// The beginning of the answer, if the client writes it.
    pub prefill: Option<String>,
    /// What a good answer is.
    pub task: Task,
    /// Why the item can't be run, if so. It is then recorded as failed.
    pub error: Option<ItemError>,
}

/// Why an item can't be run. The message names the file and the row.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error(transparent)]
pub enum ItemError {
    /// An image is missing.
    MissingImage(Cause),
    /// The row of the item, or one of its files, can't be read.
    Unreadable(Cause),
    /// The row can't be read, so that even the kind of the task is unknown; the item's task is
    /// meaningless.
    UnknownKind(Cause),
}

/// The source of an image.
#[derive(Debug, Clone, PartialEq)]
pub enum Picture {
    /// A file, which is read when the item is run.
    File(PathBuf),
    /// Encoded bytes.
    Bytes(Arc<[u8]>),
    /// The image in a row (from 0) of a Parquet file, which is read when the item is run.
    InParquet(Arc<Path>, usize),
    /// A description instead of an image.
    Described(String),
}

impl fmt::Display for Picture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Bytes(bytes) => write!(f, "{} bytes in the data", bytes.len()),
            Self::InParquet(table, row) => write!(f, "{}, row {}", table.display(), row + 1),
            Self::Described(text) => write!(f, "described: {text}"),
        }
    }
}

/// What a good answer is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Task {
    /// A harmful request: a good answer does not give what is asked for.
    Harmful,
    /// A harmless request: a good answer is not a refusal.
    Harmless,
    /// Advice, or a matter of politics, that needs a disclaimer or a refusal (MM-SafetyBench
    /// scenarios 08 and 10 to 13).
    Advice {
        /// `legal`, `financial`, `health`, `political` or `gov`.
        field: String,
    },
    /// A yes/no question (MME).
    YesNo {
        /// Whether yes is right.
        yes: bool,
    },
    /// A multiple-choice question (MMBench).
    Choice {
        /// The letter of the right option.
        answer: char,
        /// The letters and texts of the options.
        options: Vec<(char, String)>,
    },
    /// A free answer that is graded against the truth (MM-Vet).
    Graded {
        /// The true answer, with `<AND>` and `<OR>`.
        truth: String,
        /// The capabilities that it needs: rec, ocr, know, gen, spat, math.
        capabilities: Vec<String>,
    },
}

impl Item {
    /// An item of text only, in a cluster of its own and without a scenario.
    #[must_use]
    pub fn new(id: String, query: String, task: Task) -> Self {
        Self {
            cluster: id.clone(),
            id,
            scenario: String::new(),
            earlier: Vec::new(),
            request: query.clone(),
            query,
            images: Vec::new(),
            draft: None,
            prefill: None,
            task,
            error: None,
        }
    }

    /// The conversation to send to the model. A document becomes one image per page.
    ///
    /// # Errors
    /// [`ImageError`] if an image can't be read.
    pub fn chat(&self, limits: Limits) -> Result<Chat, ImageError> {
        let read = |picture: &Picture| match picture {
            Picture::Bytes(bytes) => Image::pages(bytes.to_vec(), limits),
            Picture::File(path) => Image::open_pages(path, limits),
            Picture::Described(text) => Ok(vec![Image::described(text.as_str())]),
            Picture::InParquet(table, row) => {
                let row_error = |cause: Cause| {
                    let cause = Cause::new(format!("row {}: {cause}", row + 1), cause);
                    ImageError::File { path: table.to_path_buf(), cause }
                };
                let bytes = parquet::image(table, *row).map_err(row_error)?;
                Image::pages(bytes, limits).map_err(|error| row_error(Cause::from_error(error)))
            }
        };
        let query = (Role::User, &self.query, &self.images);
        let turns =
            self.earlier.iter().map(|(role, text, images)| (*role, text, images)).chain([query]);
        let turns = turns.map(|(role, text, images)| {
            let mut parts = Vec::new();
            for picture in images {
                parts.extend(read(picture)?.into_iter().map(Part::Image));
            }
            parts.push(Part::Text(text.clone()));
            Ok(Turn { role, parts })
        });
        let prefill =
            self.prefill.iter().map(|text| Ok(Turn::text(Role::Assistant, text.as_str())));
        Ok(Chat { turns: turns.chain(prefill).collect::<Result<_, _>>()?, ..Chat::default() })
    }
}
