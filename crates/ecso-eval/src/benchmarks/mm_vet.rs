//! MM-Vet (arXiv 2308.02490): free answers, graded against the truth.

use std::path::Path;

use ecso::Cause;
use serde::Deserialize;

use super::{
    benchmark::{About, Benchmark, DataError, Items},
    files::{Finder, locate},
    location::RowLocation,
    tables::{OrderedObject, json},
    validation::validated,
};
use crate::{
    item::{Item, Picture, Task},
    text::{cut, shortened},
};

pub(super) struct MmVet;

#[derive(Deserialize)]
struct GradedQuestion {
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
            scoring: "a judge grades 0.0 to 1.0 against the truth; mean x100, in all and per \
                      capability",
            layout: "mm-vet.json and images/",
            variants: &[],
            scenarios: &[],
        }
    }

    fn items(&self, data: &Path, _: Option<&str>) -> Result<Items, DataError> {
        let table = locate(data, &["mm-vet.json"])?;
        let mut finder = Finder::new(&table.parent().unwrap_or(data).join("images"));
        let OrderedObject(mut questions) = json(&table)?;
        questions.sort_by(|(a, _), (b, _)| a.cmp(b));
        let items = questions.into_iter().map(|(id, question)| {
            let location = RowLocation::new(&table, format!("record {}", cut(&id)));
            let question: Result<GradedQuestion, Cause> =
                serde_json::from_value(question).map_err(shortened);
            let item = question.map(|question| {
                let image = finder.find(&question.imagename).map(Picture::File);
                location.with_image(item(id, question), image)
            });
            location.item_or_error(
                "",
                Task::Graded { truth: String::new(), capabilities: Vec::new() },
                item,
            )
        });
        validated(data, items)
    }
}

fn item(id: String, question: GradedQuestion) -> Item {
    let scenario = question.capability.join("+");
    let task = Task::Graded { truth: question.answer, capabilities: question.capability };
    Item { scenario, ..Item::new(id, question.question, task) }
}
