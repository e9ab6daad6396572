//! Our own mild requests in the forms that harmful ones take, which a guard must not hold back.

use std::{io::Cursor, path::Path, sync::Arc};

use ecso::Cause;
use image::ImageFormat;
use serde::Deserialize;

use super::benchmark::{About, Benchmark, DataError, Items};
use crate::{
    item::{Item, ItemError, Picture, Task},
    typographic::{FILL_THE_LIST, Typesetter},
};

/// The requests, with the columns id, topic, instruction and question.
const TWINS: &str = include_str!("../../data/twins.csv");

pub(super) struct Twins;

/// A mild request.
#[derive(Deserialize)]
pub(crate) struct Twin {
    id: String,
    topic: String,
    /// The request as the heading of a list.
    pub(crate) instruction: String,
    /// The request as a question.
    pub(crate) question: String,
}

/// All twins.
pub(crate) fn twins() -> Result<Vec<Twin>, csv::Error> {
    csv::Reader::from_reader(TWINS.as_bytes()).into_deserialize().collect()
}

impl Benchmark for Twins {
    fn about(&self) -> About {
        About {
            name: "twins",
            size: "420 typographic images, 420 plain questions; ships with ecso",
            licence: "MIT OR Apache-2.0",
            source: "ecso",
            scoring: "over-refusal, share of answers changed",
            layout: "needs no --data; the images are rendered with a system font",
            variants: &["typographic", "text"],
            scenarios: &[],
        }
    }

    fn items(&self, data: &Path, variant: Option<&str>) -> Result<Items, DataError> {
        let twins = twins().map_err(|error| DataError::new(data, Cause::from_error(error)))?;
        match variant.unwrap_or("typographic") {
            "text" => Ok(Items::all(twins.into_iter().map(Twin::into_text_item).collect())),
            "typographic" => {
                let typesetter = Typesetter::system()
                    .map_err(|error| DataError::new(data, Cause::from_error(error)))?;
                let total = Some(twins.len());
                let iter = twins.into_iter().map(move |twin| twin.into_image_item(&typesetter));
                Ok(Items { total, iter: Box::new(iter) })
            }
            other => Err(DataError::new(
                data,
                format!("there is no variant {other}, only typographic and text"),
            )),
        }
    }
}

impl Twin {
    fn into_text_item(self) -> Item {
        Item { scenario: self.topic, ..Item::new(self.id, self.question, Task::Harmless) }
    }

    fn into_image_item(self, typesetter: &Typesetter) -> Item {
        let mut bytes = Cursor::new(Vec::new());
        let written = typesetter.list(&self.instruction).write_to(&mut bytes, ImageFormat::Png);
        let error = written.err().map(|error| {
            let reason = format!("its image can't be rendered: {error}");
            ItemError::Unreadable(Cause::new(reason, error))
        });
        Item {
            query: FILL_THE_LIST.into(),
            images: vec![Picture::Bytes(Arc::from(bytes.into_inner()))],
            error,
            ..self.into_text_item()
        }
    }
}
