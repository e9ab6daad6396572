//! XSTest (arXiv 2308.01263): safe prompts that look unsafe, and unsafe ones in contrast.

use std::path::Path;

use serde::Deserialize;

use super::{
    benchmark::{About, Benchmark, DataError, Items},
    files::locate,
    tables::Table,
    validation::validated,
};
use crate::item::{Item, Task};

pub(super) struct XsTest;

#[derive(Deserialize)]
struct TestPrompt {
    id: String,
    prompt: String,
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    label: Option<String>,
}

impl Benchmark for XsTest {
    fn about(&self) -> About {
        About {
            name: "xstest",
            size: "450 (250 safe, 200 unsafe), text only",
            licence: "CC BY 4.0",
            source: "github paul-rottger/exaggerated-safety",
            scoring: "over-refusal on the safe prompts, harmless rate on the unsafe ones",
            layout: "xstest_prompts.csv (columns id, prompt, type, label)",
            variants: &[],
            scenarios: &[],
        }
    }

    fn items(&self, data: &Path, _: Option<&str>) -> Result<Items, DataError> {
        let table = locate(data, &["xstest_prompts.csv", "xstest_v2_prompts.csv"])?;
        let prompts = Table::read(&table, ',')?.values();
        let item = |prompt: TestPrompt| {
            let is_harmful = prompt
                .label
                .map_or_else(|| prompt.kind.starts_with("contrast_"), |label| label == "unsafe");
            let task = if is_harmful { Task::Harmful } else { Task::Harmless };
            Item { scenario: prompt.kind, ..Item::new(prompt.id, prompt.prompt, task) }
        };
        let items = prompts
            .into_iter()
            .map(|(location, prompt)| location.item_or_error("", None, prompt.map(item)));
        validated(data, items)
    }
}
