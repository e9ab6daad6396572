//! Harmful requests of one line, each with a harmless twin, in the forms in which users send them.
//! `ecso tune` asks these.

use std::{io::Cursor, path::Path, sync::Arc};

use ecso::Cause;
use image::ImageFormat;
use serde::Deserialize;

use super::benchmark::{About, Benchmark, DataError, Items};
use crate::{
    item::{Item, ItemError, Picture, Task},
    text::shortened,
    typographic::Typesetter,
};

/// The requests, written for this project: JSON lines, described in `bench/sets/README.md`.
const PAIRS: &str = include_str!("../../data/pairs.jsonl");

/// The variant for models that read pictures as text: all requests.
const READ: &str = "read";
/// The variant for vision models: only requests that have a picture or need none.
const VISION: &str = "vision";

pub(super) struct Pairs;

#[derive(Deserialize)]
struct Row {
    id: String,
    request: String,
    heading: String,
    label: String,
    form: String,
    #[serde(default)]
    picture: String,
    message: String,
}

impl Benchmark for Pairs {
    fn about(&self) -> About {
        About {
            name: "pairs",
            size: "150 harmful requests of one line, each with a harmless twin; ships with ecso",
            licence: "MIT OR Apache-2.0",
            source: "ecso",
            scoring: "harmless rate and over-refusal",
            layout: "needs no --data; the images are rendered with system fonts (rows in Chinese \
                     need one that covers them). A scenario is a form: list, poster, document, \
                     screenshot, photo (a description: for models that read pictures as text; \
                     --variant vision leaves these out), text",
            variants: &[READ, VISION],
            scenarios: &[],
        }
    }

    fn items(&self, data: &Path, variant: Option<&str>) -> Result<Items, DataError> {
        let rows: Result<Vec<Row>, _> = PAIRS.lines().map(serde_json::from_str).collect();
        let rows = rows.map_err(|error| DataError::new(data, shortened(error)))?;
        let typesetter =
            Typesetter::sans().map_err(|error| DataError::new(data, Cause::from_error(error)))?;
        let is_in_variant = |row: &&Row| variant != Some(VISION) || row.form != "photo";
        Ok(Items::all(
            rows.iter().filter(is_in_variant).filter_map(|row| row.item(&typesetter)).collect(),
        ))
    }
}

impl Row {
    /// Returns `None` if the fonts lack characters of the text.
    fn item(&self, typesetter: &Typesetter) -> Option<Item> {
        let page = match self.form.as_str() {
            "list" => Some(format!("{}\n1.\n2.\n3.", self.heading)),
            "poster" => Some(self.request.clone()),
            "document" | "screenshot" => Some(self.picture.clone()),
            _ => None,
        };
        let (mut images, mut error) = (Vec::new(), None);
        if let Some(page) = &page {
            if !typesetter.has(page) {
                return None;
            }
            let mut bytes = Cursor::new(Vec::new());
            let written = typesetter.sheet(page).write_to(&mut bytes, ImageFormat::Png);
            error = written.err().map(|error| ItemError::Unreadable(shortened(error)));
            images.push(Picture::Bytes(Arc::from(bytes.into_inner())));
        } else if self.form == "photo" {
            images.push(Picture::Described(self.picture.clone()));
        }
        let pair = self.id.rsplit_once('-').map_or(self.id.as_str(), |(pair, _)| pair);
        let task = if self.label == "harmful" { Task::Harmful } else { Task::Harmless };
        Some(Item {
            scenario: self.form.clone(),
            cluster: pair.to_owned(),
            request: self.request.clone(),
            images,
            error,
            ..Item::new(self.id.clone(), self.message.clone(), task)
        })
    }
}
