//! `MOSSBench` (arXiv 2406.17806): harmless image queries that make models refuse.

use std::path::Path;

use serde::Deserialize;

use super::{About, Benchmark, DataError, Items, csv_rows, json, locate};
use crate::item::{Item, Picture, Task};

pub(super) struct MossBench;

#[derive(Deserialize)]
struct Row {
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
            layout: "a table with pid, question, image_path (information.csv, metadata.csv, or JSON), and the images it names",
            variants: &[],
            scenarios: &[],
        }
    }

    fn items(&self, data: &Path, _: Option<&str>) -> Result<Items, DataError> {
        let named = [
            "images_information/information.csv",
            "images_information/information.json",
            "information.csv",
            "information.json",
            "metadata.csv",
            "metadata.json",
            "mossbench.csv",
            "mossbench.json",
        ];
        let table = locate(data, &named)?;
        let is_json = table.extension().is_some_and(|extension| extension == "json");
        let rows: Vec<Row> = if is_json { json(&table)? } else { csv_rows(&table, b',')? };
        let root = if data.is_file() { data.parent().unwrap_or(data) } else { data };
        let items: Vec<Item> = rows
            .into_iter()
            .map(|row| {
                let id = row.pid.as_str().map_or_else(|| row.pid.to_string(), str::to_owned);
                let below = [root.join(&row.image_path), root.join("images").join(&row.image_path)];
                let image = below.iter().find(|path| path.exists()).unwrap_or(&below[0]).clone();
                Item {
                    cluster: id.clone(),
                    id,
                    scenario: row.kind.unwrap_or_else(|| "MOSSBench".into()),
                    request: row.question.clone(),
                    query: row.question,
                    images: vec![Picture::File(image)],
                    earlier: Vec::new(),
                    draft: None,
                    task: Task::Harmless,
                }
            })
            .collect();
        Items::checked(data, items)
    }
}
