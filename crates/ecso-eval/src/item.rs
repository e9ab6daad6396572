//! One item of a benchmark: what is asked, and what a good answer is.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use ecso::{Cause, Chat, Image, ImageError, Limits, Part, Role, Turn};
use serde::{Deserialize, Serialize};

use crate::parquet;

/// An item as a benchmark gives it.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// Unique within its benchmark.
    pub id: String,
    /// Scenario, topic, subtask or category.
    pub scenario: String,
    /// Items that share a question share a cluster; intervals are by cluster.
    pub cluster: String,
    /// What was said before, with the images of those turns.
    pub earlier: Vec<(Role, String, Vec<Picture>)>,
    /// The text that is sent.
    pub query: String,
    /// What is asked for, in words, for a judge that can't see: the query, or what the image asks.
    pub request: String,
    /// The images, in order.
    pub images: Vec<Picture>,
    /// The direct answer, where somebody has it already: then the model is not asked for one.
    pub draft: Option<String>,
    /// How the answer begins, where the client writes that.
    pub begun: Option<String>,
    /// What a good answer is.
    pub task: Task,
    /// Why it can't be run, if it can't: it is recorded as failed.
    pub trouble: Option<Trouble>,
}

/// Why an item can't be run. The message names the file, and the row in it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error(transparent)]
pub enum Trouble {
    /// An image isn't there.
    MissingImage(Cause),
    /// Its row, or a file of it, can't be understood.
    Unreadable(Cause),
    /// The same, so that nobody knows what a good answer is; the item's task is none.
    UnknownKind(Cause),
}

/// Where an image comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum Picture {
    /// A file, read when its item's turn comes.
    File(PathBuf),
    /// Encoded bytes.
    Bytes(Arc<[u8]>),
    /// The image of a row (from 0) of a Parquet file, read when its item's turn comes.
    InParquet(Arc<Path>, usize),
    /// A description in its place.
    Described(String),
}

/// What a good answer is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Task {
    /// Harm is asked for: a good answer doesn't give it.
    Harmful,
    /// Nothing harmful is asked for: a good answer isn't a refusal.
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
        /// The right option's letter.
        answer: char,
        /// Letters and texts.
        options: Vec<(char, String)>,
    },
    /// A free answer that is graded against the truth (MM-Vet).
    Graded {
        /// The truth, with `<AND>` and `<OR>`.
        truth: String,
        /// What it takes: rec, ocr, know, gen, spat, math.
        capabilities: Vec<String>,
    },
}

impl Item {
    /// The conversation that is sent. A picture that is a document stands in it page by page.
    ///
    /// # Errors
    /// [`ImageError`] if an image can't be read.
    pub fn chat(&self, limits: Limits) -> Result<Chat, ImageError> {
        let read = |picture: &Picture| match picture {
            Picture::Bytes(bytes) => Image::several(bytes.to_vec(), limits),
            Picture::File(path) => Image::open_several(path, limits),
            Picture::Described(text) => Ok(vec![Image::described(text.as_str())]),
            Picture::InParquet(table, row) => {
                let failed = |cause: Cause| {
                    let cause = Cause::new(format!("row {}: {cause}", row + 1), cause);
                    ImageError::File { path: table.to_path_buf(), cause }
                };
                let bytes = parquet::image(table, *row).map_err(failed)?;
                Image::several(bytes, limits).map_err(|error| failed(Cause::from_error(error)))
            }
        };
        let last = (Role::User, &self.query, &self.images);
        let turns =
            self.earlier.iter().map(|(role, text, images)| (*role, text, images)).chain([last]);
        let turns = turns.map(|(role, text, images)| {
            let mut parts = Vec::new();
            for picture in images {
                parts.extend(read(picture)?.into_iter().map(Part::Image));
            }
            parts.push(Part::Text(text.clone()));
            Ok(Turn { role, parts })
        });
        let begun = self.begun.iter().map(|begun| Ok(Turn::text(Role::Assistant, begun.as_str())));
        Ok(Chat { turns: turns.chain(begun).collect::<Result<_, _>>()?, ..Chat::default() })
    }
}
