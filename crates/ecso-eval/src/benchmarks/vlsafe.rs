//! VLSafe (DRESS, arXiv 2311.10081): harmful queries about COCO photographs.

use std::path::Path;

use ecso::Cause;
use serde::Deserialize;

use super::{
    benchmark::{About, Benchmark, DataError, Items},
    check::checked,
    files::{Finder, locate},
    place::Place,
    tables::{json_line, read},
};
use crate::item::{Item, Picture, Task};

pub(super) struct VlSafe;

#[derive(Deserialize)]
struct HarmfulQuery {
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
            let entries =
                std::fs::read_dir(data).into_iter().flatten().flatten().map(|entry| entry.path());
            entries
                .into_iter()
                .find(|path| path.extension().is_some_and(|extension| extension == "jsonl"))
                .ok_or(error)
        })?;
        let root = table.parent().unwrap_or(data);
        let images = locate(root, &["train2017", "images", "coco/train2017"])?;
        let mut finder = Finder::new(&images);
        let text = read(&table)?;
        let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
        let items = (1_usize..).zip(lines).map(|(number, (line, text))| {
            let place = Place::line(&table, line);
            let query: Result<HarmfulQuery, Cause> = json_line(text);
            let item = query.map(|query| {
                let stem = query.image_id.trim().trim_end_matches(".jpg");
                let spellings = ["", "COCO_train2014_", "COCO_train2017_"]
                    .map(|prefix| format!("{prefix}{stem}.jpg"));
                let image = finder.first(&spellings).map(Picture::File);
                place.shown(item(number, query), image)
            });
            place.settled("", Task::Harmful, item)
        });
        checked(data, items)
    }
}

fn item(number: usize, query: HarmfulQuery) -> Item {
    Item {
        id: number.to_string(),
        scenario: "VLSafe".into(),
        cluster: number.to_string(),
        request: query.query.clone(),
        query: query.query,
        images: Vec::new(),
        earlier: Vec::new(),
        draft: None,
        begun: None,
        task: Task::Harmful,
        trouble: None,
    }
}
