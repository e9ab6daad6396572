//! `MOSSBench` (arXiv 2406.17806): harmless image queries that make models refuse.

use std::path::Path;

use ecso::Cause;
use serde::Deserialize;

use super::{
    benchmark::{About, Benchmark, DataError, Items},
    files::{Finder, locate},
    location::RowLocation,
    tables::{Table, id, json},
    validation::validated,
};
use crate::{
    item::{Item, Picture, Task},
    text::shortened,
};

pub(super) struct MossBench;

#[derive(Deserialize)]
struct ImageQuery {
    pid: serde_json::Value,
    question: String,
    #[serde(alias = "image")]
    image_path: String,
    #[serde(default, rename = "over", alias = "type", alias = "category")]
    kind: Option<String>,
}

impl Benchmark for MossBench {
    fn about(&self) -> About {
        About {
            name: "mossbench",
            size: "300",
            licence: "CC BY-SA 4.0",
            source: "the hub's dataset AIcell/MOSSBench",
            scoring: "over-refusal",
            layout: "a table with pid, question, image_path (information.csv, metadata.csv, or \
                     JSON), and the images it names",
            variants: &[],
            scenarios: &[],
        }
    }

    fn items(&self, data: &Path, _: Option<&str>) -> Result<Items, DataError> {
        let file_names = [
            "images_information/information.csv",
            "images_information/information.json",
            "information.csv",
            "information.json",
            "metadata.csv",
            "metadata.json",
            "mossbench.csv",
            "mossbench.json",
        ];
        let table = locate(data, &file_names)?;
        let is_json = table.extension().is_some_and(|extension| extension == "json");
        let queries: Vec<(RowLocation, Result<ImageQuery, Cause>)> = if is_json {
            let queries: Vec<serde_json::Value> = json(&table)?;
            let query = |value| serde_json::from_value(value).map_err(shortened);
            (1..)
                .zip(queries)
                .map(|(number, value)| {
                    (RowLocation::new(&table, format!("row {number}")), query(value))
                })
                .collect()
        } else {
            Table::read(&table, ',')?.values()
        };
        let root = if data.is_file() { data.parent().unwrap_or(data) } else { data };
        let mut finder = Finder::new(root);
        let items = queries.into_iter().map(|(location, query)| {
            let item = query.and_then(|query| {
                let image = finder
                    .first(&[query.image_path.clone(), format!("images/{}", query.image_path)]);
                Ok(location.with_image(item(query)?, image.map(Picture::File)))
            });
            location.item_or_error("", Task::Harmless, item)
        });
        validated(data, items)
    }
}

fn item(query: ImageQuery) -> Result<Item, Cause> {
    let id = id(&query.pid).ok_or("`pid` is neither a text nor a number")?;
    Ok(Item {
        scenario: query.kind.unwrap_or_else(|| "MOSSBench".into()),
        ..Item::new(id, query.question, Task::Harmless)
    })
}
