//! MM-Vet (arXiv 2308.02490): free answers, graded against the truth.

use std::{collections::BTreeMap, path::Path};

use serde::Deserialize;

use super::{About, Benchmark, DataError, Items, json, locate};
use crate::item::{Item, Picture, Task};

pub(super) struct MmVet;

#[derive(Deserialize)]
struct Row {
    imagename: String,
    question: String,
    answer: String,
    capability: Vec<String>,
}

impl Benchmark for MmVet {
    fn about(&self) -> About {
        About {
            name: "mm-vet",
            size: "218",
            licence: "Apache-2.0; images of their owners",
            source: "github yuweihao/MM-Vet",
            scoring: "a judge grades 0.0 to 1.0 against the truth; mean x100, in all and per capability",
            layout: "mm-vet.json and images/",
            variants: &[],
            scenarios: &[],
        }
    }

    fn items(&self, data: &Path, _: Option<&str>) -> Result<Items, DataError> {
        let table = locate(data, &["mm-vet.json"])?;
        let images = table.parent().unwrap_or(data).join("images");
        let rows: BTreeMap<String, Row> = json(&table)?;
        let item = |(id, row): (String, Row)| Item {
            cluster: id.clone(),
            id,
            scenario: row.capability.join("+"),
            request: row.question.clone(),
            query: row.question,
            images: vec![Picture::File(images.join(row.imagename))],
            earlier: Vec::new(),
            draft: None,
            task: Task::Graded { truth: row.answer, capabilities: row.capability },
        };
        let items: Vec<Item> = rows.into_iter().map(item).collect();
        Items::checked(data, items)
    }
}
