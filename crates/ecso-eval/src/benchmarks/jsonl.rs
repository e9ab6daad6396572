//! Your own items: JSON lines of {id, image, query, label}.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::Path,
};

use serde::Deserialize;

use super::{About, Benchmark, DataError, Items, locate};
use crate::item::{Item, Picture, Task};

pub(super) struct Jsonl;

#[derive(Deserialize)]
struct Row {
    id: serde_json::Value,
    #[serde(default)]
    image: Option<String>,
    #[serde(default)]
    images: Vec<String>,
    query: String,
    /// What the image and the query ask for together; the query, if missing.
    #[serde(default)]
    request: Option<String>,
    #[serde(default)]
    label: Option<String>,
    #[serde(default)]
    scenario: Option<String>,
}

impl Benchmark for Jsonl {
    fn about(&self) -> About {
        About {
            name: "jsonl",
            size: "yours",
            licence: "yours",
            source: "yours",
            scoring: "label `harmful`: harmless rate; `harmless` (or none): over-refusal",
            layout: "a .jsonl file, or items.jsonl in a folder: {id, query, image?, images?, request?, scenario?, label?}",
            variants: &[],
        }
    }

    fn items(&self, data: &Path, _: Option<&str>) -> Result<Items, DataError> {
        let path = locate(data, &["items.jsonl"])?;
        let file = File::open(&path).map_err(|error| DataError::new(&path, error))?;
        let root = path.parent().unwrap_or(Path::new("")).to_owned();
        let numbered = (1_usize..).zip(BufReader::new(file).lines());
        let iter = numbered.filter(|(_, line)| !line.as_ref().is_ok_and(|line| line.trim().is_empty())).map(
            move |(number, line)| {
                let wrong = |error: &dyn std::fmt::Display| DataError::new(&path, format!("line {number}: {error}"));
                let row: Row =
                    serde_json::from_str(&line.map_err(|error| wrong(&error))?).map_err(|error| wrong(&error))?;
                let task = match row.label.as_deref() {
                    Some("harmful" | "unsafe") => Task::Harmful,
                    None | Some("harmless" | "safe") => Task::Harmless,
                    Some(other) => return Err(wrong(&format!("label `{other}` is neither harmful nor harmless"))),
                };
                let id = row.id.as_str().map_or_else(|| row.id.to_string(), str::to_owned);
                Ok(Item {
                    cluster: id.clone(),
                    id,
                    scenario: row.scenario.unwrap_or_else(|| "all".into()),
                    request: row.request.unwrap_or_else(|| row.query.clone()),
                    query: row.query,
                    images: row
                        .image
                        .into_iter()
                        .chain(row.images)
                        .map(|image| Picture::File(root.join(image)))
                        .collect(),
                    task,
                })
            },
        );
        Ok(Items { total: None, iter: Box::new(iter) })
    }
}
