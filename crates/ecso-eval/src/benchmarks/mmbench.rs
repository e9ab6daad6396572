//! `MMBench` (arXiv 2307.06281): multiple choice, each question asked in every rotation of its options.

use std::{path::Path, sync::Arc};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde::Deserialize;

use super::{About, Benchmark, DataError, Items, csv_rows, locate};
use crate::item::{Item, Picture, Task};

pub(super) struct MmBench;

/// Rotations of a question share the index below this.
const CIRCLE: u64 = 1_000_000;

#[derive(Deserialize)]
struct Row {
    index: u64,
    question: String,
    #[serde(default)]
    hint: Option<String>,
    #[serde(rename = "A", default)]
    a: Option<String>,
    #[serde(rename = "B", default)]
    b: Option<String>,
    #[serde(rename = "C", default)]
    c: Option<String>,
    #[serde(rename = "D", default)]
    d: Option<String>,
    #[serde(default)]
    answer: Option<String>,
    #[serde(default)]
    category: Option<String>,
    image: String,
}

impl Benchmark for MmBench {
    fn about(&self) -> About {
        About {
            name: "mmbench",
            size: "about 3,000 questions, four rotations each",
            licence: "Apache-2.0",
            source: "github open-compass/MMBench",
            scoring: "exact, circular: a question counts if every rotation is right",
            layout: "a .tsv with index, question, hint, A-D, answer, category, image (base64)",
            variants: &[],
            scenarios: &[],
        }
    }

    fn items(&self, data: &Path, _: Option<&str>) -> Result<Items, DataError> {
        let table =
            locate(data, &["MMBench_DEV_EN.tsv", "mmbench_dev_en.tsv", "mmbench_dev_20230712.tsv", "mmbench.tsv"])?;
        let rows: Vec<Row> = csv_rows(&table, b'\t')?;
        // A rotation may name the row that has the image instead of holding it once more.
        let images: std::collections::HashMap<u64, Arc<[u8]>> = rows
            .iter()
            .filter(|row| row.image.len() > 64)
            .map(|row| {
                let bytes = BASE64_STANDARD.decode(row.image.trim());
                let bytes =
                    bytes.map_err(|error| DataError::new(&table, format!("index {}: image: {error}", row.index)))?;
                Ok((row.index, Arc::from(bytes)))
            })
            .collect::<Result<_, DataError>>()?;
        let items: Result<Vec<Item>, DataError> = rows.into_iter().map(|row| item(&table, row, &images)).collect();
        Items::checked(data, items?)
    }
}

fn item(table: &Path, row: Row, images: &std::collections::HashMap<u64, Arc<[u8]>>) -> Result<Item, DataError> {
    let named = row.image.trim().parse().unwrap_or(row.index);
    let image = images.get(&row.index).or_else(|| images.get(&named)).or_else(|| images.get(&(row.index % CIRCLE)));
    let image = image.ok_or_else(|| DataError::new(table, format!("index {}: no image", row.index)))?;
    let options: Vec<(char, String)> = [('A', row.a), ('B', row.b), ('C', row.c), ('D', row.d)]
        .into_iter()
        .filter_map(|(letter, text)| Some((letter, text.filter(|text| !text.is_empty() && text != "nan")?)))
        .collect();
    let answer = row.answer.and_then(|answer| answer.trim().chars().next());
    let answer = answer.ok_or_else(|| {
        DataError::new(table, format!("index {}: no answer (the test split is scored by its authors only)", row.index))
    })?;
    let lettered: Vec<String> = options.iter().map(|(letter, text)| format!("{letter}. {text}")).collect();
    let hint =
        row.hint.filter(|hint| !hint.is_empty() && hint != "nan").map_or_else(String::new, |hint| format!("{hint}\n"));
    let query = format!(
        "{hint}{}\n{}\nAnswer with the option's letter from the given choices directly.",
        row.question,
        lettered.join("\n")
    );
    Ok(Item {
        id: row.index.to_string(),
        scenario: row.category.unwrap_or_else(|| "all".into()),
        cluster: (row.index % CIRCLE).to_string(),
        request: row.question,
        query,
        images: vec![Picture::Bytes(Arc::clone(image))],
        earlier: Vec::new(),
        draft: None,
        task: Task::Choice { answer, options },
    })
}
