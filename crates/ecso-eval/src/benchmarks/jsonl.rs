//! Your own items: JSON lines of {id, image, query, label}.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::Path,
};

use ecso::Role;
use serde::Deserialize;

use super::{About, Benchmark, Check, DataError, Items, locate};
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
    /// Turns before the query.
    #[serde(default)]
    earlier: Vec<Earlier>,
    /// The direct answer, where it is known.
    #[serde(default)]
    draft: Option<String>,
    /// What the image and the query ask for together; the query, if missing.
    #[serde(default)]
    request: Option<String>,
    #[serde(default)]
    label: Option<String>,
    #[serde(default)]
    scenario: Option<String>,
}

#[derive(Deserialize)]
struct Earlier {
    role: Role,
    text: String,
    #[serde(default)]
    images: Vec<String>,
}

impl Benchmark for Jsonl {
    fn about(&self) -> About {
        About {
            name: "jsonl",
            size: "yours",
            licence: "yours",
            source: "yours",
            scoring: "label `harmful`: harmless rate; `harmless` (or none): over-refusal",
            layout: "a .jsonl file, or items.jsonl in a folder: {id, query, image?, images?, earlier?: [{role, text, images?}], \
                draft?, request?, scenario?, label?}",
            variants: &[],
            scenarios: &[],
        }
    }

    fn items(&self, data: &Path, _: Option<&str>) -> Result<Items, DataError> {
        let path = locate(data, &["items.jsonl"])?;
        // What is wrong is said before the first item is run; then the file is read again, item by item.
        let mut check = Check::default();
        let mut bad: Vec<DataError> = Vec::new();
        let mut lines = 0;
        for item in items(&path)? {
            lines += 1;
            match item {
                Ok(item) => check.item(&item),
                Err(error) => bad.push(error),
            }
        }
        if let [first, ..] = bad.as_slice() {
            return Err(DataError::new(
                &path,
                format!("{} of {lines} items can't be read: {}", bad.len(), first.reason),
            ));
        }
        check.done(&path)?;
        Ok(Items { total: Some(lines), iter: Box::new(items(&path)?) })
    }
}

fn items(path: &Path) -> Result<impl Iterator<Item = Result<Item, DataError>> + Send + use<>, DataError> {
    let path = path.to_owned();
    let file = File::open(&path).map_err(|error| DataError::new(&path, error))?;
    let numbered = (1_usize..).zip(BufReader::new(file).lines());
    let filled = numbered.filter(|(_, line)| !line.as_ref().is_ok_and(|line| line.trim().is_empty()));
    Ok(filled.map(move |(number, line)| {
        let wrong = |error: &dyn std::fmt::Display| DataError::new(&path, format!("line {number}: {error}"));
        let row: Row = serde_json::from_str(&line.map_err(|error| wrong(&error))?).map_err(|error| wrong(&error))?;
        item(row, path.parent().unwrap_or(Path::new(""))).map_err(|error| wrong(&error))
    }))
}

fn item(row: Row, root: &Path) -> Result<Item, String> {
    let task = match row.label.as_deref() {
        Some("harmful" | "unsafe") => Task::Harmful,
        None | Some("harmless" | "safe") => Task::Harmless,
        Some(other) => return Err(format!("label `{other}` is neither harmful nor harmless")),
    };
    let pictures = |images: Vec<String>| images.into_iter().map(|image| Picture::File(root.join(image))).collect();
    let id = row.id.as_str().map_or_else(|| row.id.to_string(), str::to_owned);
    Ok(Item {
        cluster: id.clone(),
        id,
        scenario: row.scenario.unwrap_or_else(|| "all".into()),
        request: row.request.unwrap_or_else(|| row.query.clone()),
        query: row.query,
        images: pictures(row.image.into_iter().chain(row.images).collect()),
        earlier: row.earlier.into_iter().map(|turn| (turn.role, turn.text, pictures(turn.images))).collect(),
        draft: row.draft,
        task,
    })
}
