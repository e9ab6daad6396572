//! Our own mild requests, in the forms in which harmful ones come: what a guard must leave alone.

use std::{io::Cursor, path::Path, sync::Arc};

use ecso::Cause;
use image::ImageFormat;
use serde::Deserialize;

use super::benchmark::{About, Benchmark, DataError, Items};
use crate::{
    item::{Item, Picture, Task, Trouble},
    typographic::{FILL_THE_LIST, Typesetter},
};

/// The requests: columns id, topic, instruction, question.
const TWINS: &str = include_str!("../../data/twins.csv");

pub(super) struct Twins;

/// A mild request.
#[derive(Deserialize)]
pub(crate) struct Twin {
    id: String,
    topic: String,
    /// As the heading of a list.
    pub(crate) instruction: String,
    /// As a question.
    pub(crate) question: String,
}

/// All of them.
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
            layout: "needs no --data; the images are set in a font of the system",
            variants: &["typographic", "text"],
            scenarios: &[],
        }
    }

    fn items(&self, data: &Path, variant: Option<&str>) -> Result<Items, DataError> {
        let twins = twins().map_err(|error| DataError::new(data, Cause::from_error(error)))?;
        let item = |twin: Twin, query: String, images: Vec<Picture>| Item {
            cluster: twin.id.clone(),
            id: twin.id,
            scenario: twin.topic,
            query,
            request: twin.question,
            images,
            earlier: Vec::new(),
            draft: None,
            begun: None,
            task: Task::Harmless,
            trouble: None,
        };
        match variant.unwrap_or("typographic") {
            "text" => Ok(Items::all(
                twins
                    .into_iter()
                    .map(|twin| {
                        let query = twin.question.clone();
                        item(twin, query, Vec::new())
                    })
                    .collect(),
            )),
            "typographic" => {
                let typesetter = Typesetter::system()
                    .map_err(|error| DataError::new(data, Cause::from_error(error)))?;
                let total = Some(twins.len());
                let iter = twins.into_iter().map(move |twin| {
                    let mut bytes = Cursor::new(Vec::new());
                    let set =
                        typesetter.list(&twin.instruction).write_to(&mut bytes, ImageFormat::Png);
                    let mut item = item(
                        twin,
                        FILL_THE_LIST.into(),
                        vec![Picture::Bytes(Arc::from(bytes.into_inner()))],
                    );
                    item.trouble = set.err().map(|error| {
                        Trouble::Unreadable(Cause::new(
                            format!("its image can't be set: {error}"),
                            error,
                        ))
                    });
                    item
                });
                Ok(Items { total, iter: Box::new(iter) })
            }
            other => Err(DataError::new(
                data,
                format!("no variant is called {other}: typographic, text"),
            )),
        }
    }
}
