//! VLSafe (DRESS, arXiv 2311.10081): harmful queries about COCO photographs.

use std::path::Path;

use ecso::Cause;
use serde::Deserialize;

use super::{
    benchmark::{About, Benchmark, DataError, Items},
    files::{Finder, locate},
    location::RowLocation,
    tables::{json_line, read},
    validation::validated,
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
        let file_names =
            ["VLSafe_harmlessness_examine.jsonl", "vlsafe.jsonl", "harmlessness.jsonl"];
        let table = locate(data, &file_names).or_else(|error| {
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
            let location = RowLocation::line(&table, line);
            let query: Result<HarmfulQuery, Cause> = json_line(text);
            let item = query.map(|query| {
                let stem = query.image_id.trim().trim_end_matches(".jpg");
                let spellings = ["", "COCO_train2014_", "COCO_train2017_"]
                    .map(|prefix| format!("{prefix}{stem}.jpg"));
                let image = finder.first(&spellings).map(Picture::File);
                location.with_image(item(number, query), image)
            });
            location.item_or_error("", Task::Harmful, item)
        });
        validated(data, items)
    }
}

fn item(number: usize, query: HarmfulQuery) -> Item {
    let item = Item::new(number.to_string(), query.query, Task::Harmful);
    Item { scenario: "VLSafe".into(), ..item }
}
