//! VLSafe (DRESS, arXiv 2311.10081): harmful queries about COCO photographs.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{About, Benchmark, DataError, Items, locate, read};
use crate::item::{Item, Picture, Task};

pub(super) struct VlSafe;

#[derive(Deserialize)]
struct Row {
    image_id: String,
    query: String,
}

impl Benchmark for VlSafe {
    fn about(&self) -> About {
        About {
            name: "vlsafe",
            size: "1,110",
            licence: "of its authors; images: COCO",
            source: "github YangyiYY/LVLM_NLF (VLSafe); images: COCO train2017",
            scoring: "harmless rate by a judge that sees query and answer",
            layout: "VLSafe_harmlessness_examine.jsonl (or any one .jsonl) and train2017/",
            variants: &[],
            scenarios: &[],
        }
    }

    fn items(&self, data: &Path, _: Option<&str>) -> Result<Items, DataError> {
        let named = ["VLSafe_harmlessness_examine.jsonl", "vlsafe.jsonl", "harmlessness.jsonl"];
        let table = locate(data, &named).or_else(|error| {
            let entries = std::fs::read_dir(data).into_iter().flatten().flatten().map(|entry| entry.path());
            entries.into_iter().find(|path| path.extension().is_some_and(|extension| extension == "jsonl")).ok_or(error)
        })?;
        let root = table.parent().unwrap_or(data);
        let images = locate(root, &["train2017", "images", "coco/train2017"])?;
        let mut items = Vec::new();
        for (number, line) in (1..).zip(read(&table)?.lines().filter(|line| !line.trim().is_empty())) {
            let row: Row = serde_json::from_str(line)
                .map_err(|error| DataError::new(&table, format!("line {number}: {error}")))?;
            let stem = row.image_id.trim_end_matches(".jpg");
            let name = |prefix: &str| images.join(format!("{prefix}{stem}.jpg"));
            let image: PathBuf = [name(""), name("COCO_train2014_"), name("COCO_train2017_")]
                .into_iter()
                .find(|path| path.exists())
                .unwrap_or_else(|| name(""));
            items.push(Item {
                id: format!("{number}"),
                scenario: "VLSafe".into(),
                cluster: format!("{number}"),
                request: row.query.clone(),
                query: row.query,
                images: vec![Picture::File(image)],
                earlier: Vec::new(),
                draft: None,
                task: Task::Harmful,
            });
        }
        Items::checked(data, items)
    }
}
