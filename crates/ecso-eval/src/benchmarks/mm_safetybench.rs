//! MM-SafetyBench (arXiv 2311.17600): 13 scenarios, as photographs, as typography, as both, and as
//! text.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use super::{
    benchmark::{About, Benchmark, DataError, Items},
    files::Finder,
    location::RowLocation,
    tables::{OrderedObject, json},
    validation::validated,
};
use crate::{
    item::{Item, ItemError, Picture, Task},
    parquet::{self, ExportedImage, ExportedQuestion},
    text::{cut, shortened},
};

pub(super) struct MmSafetyBench;

/// The maximum depth at which the hub's export is searched for.
const MAX_DEPTH: usize = 5;

/// The scenarios as their files spell them, each with the field of advice; empty for harmful ones.
pub(crate) const SCENARIOS: [(&str, &str); 13] = [
    ("01-Illegal_Activitiy", ""),
    ("02-HateSpeech", ""),
    ("03-Malware_Generation", ""),
    ("04-Physical_Harm", ""),
    ("05-EconomicHarm", ""),
    ("06-Fraud", ""),
    ("07-Sex", ""),
    ("08-Political_Lobbying", "political"),
    ("09-Privacy_Violence", ""),
    ("10-Legal_Opinion", "legal"),
    ("11-Financial_Advice", "financial"),
    ("12-Health_Consultation", "health"),
    ("13-Gov_Decision", "gov"),
];

/// A record of `processed_questions/<scenario>.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ProcessedQuestion {
    #[serde(rename = "Question")]
    pub(crate) question: String,
    #[serde(rename = "Changed Question", default, skip_serializing_if = "Option::is_none")]
    changed: Option<String>,
    #[serde(rename = "Key Phrase", default, skip_serializing_if = "Option::is_none")]
    pub(crate) key_phrase: Option<String>,
    #[serde(rename = "Phrase Type", default, skip_serializing_if = "Option::is_none")]
    phrase_type: Option<String>,
    #[serde(rename = "Rephrased Question", default, skip_serializing_if = "Option::is_none")]
    rephrased: Option<String>,
    #[serde(rename = "Rephrased Question(SD)", default, skip_serializing_if = "Option::is_none")]
    rephrased_sd: Option<String>,
}

impl Benchmark for MmSafetyBench {
    fn about(&self) -> About {
        About {
            name: "mm-safetybench",
            size: "1,680 for each variant (13 scenarios; the paper judges 01-07 and 09)",
            licence: "CC BY-NC 4.0",
            source: "github isXinLiu/MM-SafetyBench",
            scoring: "harmless rate by a judge; 08 and 10-13 by their own criteria",
            layout: "processed_questions/<scenario>.json and \
                     imgs/<scenario>/{SD,TYPO,SD_TYPO}/<id>.jpg; or the export of the hub's \
                     dataset PKU-Alignment/MM-SafetyBench, \
                     data/<scenario>/{SD,TYPO,SD_TYPO,Text_only}.parquet",
            variants: &["sd+ocr", "ocr", "sd", "text"],
            scenarios: &["01", "02", "03", "04", "05", "06", "07", "09"],
        }
    }

    fn items(&self, data: &Path, variant: Option<&str>) -> Result<Items, DataError> {
        let (folder, split) = match variant.unwrap_or("sd+ocr") {
            "sd" => (Some("SD"), "sd"),
            "ocr" => (Some("TYPO"), "typo"),
            "sd+ocr" => (Some("SD_TYPO"), "sd_typo"),
            "text" => (None, "text_only"),
            other => {
                return Err(DataError::new(
                    data,
                    format!("there is no variant {}, only sd+ocr, ocr, sd and text", cut(other)),
                ));
            }
        };
        let original = [data.to_owned(), data.join("data")];
        let original = original.into_iter().find(|root| root.join("processed_questions").is_dir());
        let exports = if original.is_none() { parquet_tables(data) } else { Vec::new() };
        let mut finder = original.as_deref().map(Finder::new);
        let mut items = Vec::new();
        let mut missing = Vec::new();
        for (scenario, field) in SCENARIOS {
            let before = items.len();
            if let (Some(root), Some(finder)) = (&original, &mut finder) {
                let table = root.join("processed_questions").join(format!("{scenario}.json"));
                if table.exists() {
                    add_original(&table, scenario, folder, finder, &mut items);
                }
            }
            let requests = exported_requests(&exports, scenario);
            for table in matching_tables(&exports, scenario, split) {
                add_exported(table, scenario, folder.is_some(), &requests, &mut items);
            }
            if items.len() == before {
                missing.push(scenario);
            }
            for (_, item) in &mut items[before..] {
                item.task = if field.is_empty() {
                    Task::Harmful
                } else {
                    Task::Advice { field: field.into() }
                };
            }
        }
        if items.is_empty() {
            return Err(DataError::new(
                data,
                format!(
                    "it contains neither processed_questions/<scenario>.json nor \
                     <scenario>/{}.parquet; `ecso eval list` says where to get them",
                    folder.unwrap_or("Text_only")
                ),
            ));
        }
        if !missing.is_empty() {
            tracing::warn!(
                "mm-safetybench: {} of 13 scenarios are missing: {}",
                missing.len(),
                missing.join(", ")
            );
        }
        validated(data, items)
    }
}

/// Adds the items of a scenario in the original layout.
fn add_original(
    table: &Path,
    scenario: &str,
    folder: Option<&str>,
    finder: &mut Finder,
    items: &mut Vec<(RowLocation, Item)>,
) {
    let OrderedObject(mut records) = match json(table) {
        Ok(records) => records,
        Err(error) => {
            return items.push(RowLocation::new(table, "the file").item_or_error(
                scenario,
                Task::Harmful,
                Err(error.reason),
            ));
        }
    };
    records.sort_by(|(a, _), (b, _)| a.cmp(b));
    for (id, record) in records {
        let location = RowLocation::new(table, format!("record {}", cut(&id)));
        let item = serde_json::from_value(record).map_err(shortened).and_then(
            |record: ProcessedQuestion| {
                let query = match folder {
                    Some("SD") => record.rephrased_sd,
                    Some(_) => record.rephrased,
                    None => Some(record.question.clone()),
                };
                let item = item(
                    scenario,
                    &id,
                    query.ok_or("it has no query for this variant")?,
                    record.question,
                );
                let image =
                    folder.map(|folder| finder.find(&format!("imgs/{scenario}/{folder}/{id}.jpg")));
                Ok(match image {
                    Some(image) => location.with_image(item, image.map(Picture::File)),
                    None => item,
                })
            },
        );
        items.push(location.item_or_error(scenario, Task::Harmful, item));
    }
}

/// Adds the items of a scenario in the hub's export.
fn add_exported(
    table: &Path,
    scenario: &str,
    images: bool,
    requests: &HashMap<String, String>,
    items: &mut Vec<(RowLocation, Item)>,
) {
    let questions = match parquet::questions(table, images) {
        Ok(questions) => questions,
        Err(reason) => {
            return items.push(RowLocation::new(table, "the file").item_or_error(
                scenario,
                Task::Harmful,
                Err(reason),
            ));
        }
    };
    let shared: Arc<Path> = table.into();
    let mut finder = Finder::new(table.parent().unwrap_or(Path::new("")));
    for (row, question) in questions.into_iter().enumerate() {
        let location = RowLocation::new(table, format!("row {}", row + 1));
        let item = question.map(|ExportedQuestion { id, question, image }| {
            let request = requests.get(&id).cloned().unwrap_or_else(|| question.clone());
            let item = item(scenario, &id, question, request);
            let image = match image {
                _ if !images => return item,
                Some(ExportedImage::Embedded) => Ok(Picture::InParquet(Arc::clone(&shared), row)),
                Some(ExportedImage::Named(name)) => finder.picture(&name),
                None => Err(ItemError::MissingImage("it has no image".into())),
            };
            location.with_image(item, image)
        });
        items.push(location.item_or_error(scenario, Task::Harmful, item));
    }
}

fn item(scenario: &str, id: &str, query: String, request: String) -> Item {
    let item = Item::new(format!("{scenario}#{id}"), query, Task::Harmful);
    Item { scenario: scenario.into(), request, ..item }
}

/// The Parquet files below a folder. Each has a name of scenario and variant in lower case,
/// separated by slashes.
fn parquet_tables(data: &Path) -> Vec<(String, PathBuf)> {
    let mut found = Vec::new();
    let mut folders = vec![(data.to_owned(), 0)];
    while let Some((folder, depth)) = folders.pop() {
        for path in
            std::fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path())
        {
            if path.is_dir() && depth < MAX_DEPTH {
                folders.push((path, depth + 1));
            } else if path.is_file()
                && path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("parquet"))
            {
                let below = path.strip_prefix(data).unwrap_or(&path).with_extension("");
                let name = below.to_string_lossy().to_lowercase().replace('\\', "/");
                found.push((format!("/{}", without_shard(&name)), path));
            }
        }
    }
    found.sort();
    found
}

/// A name without a shard number, as in `sd-00000-of-00002` or `sd/0000`.
fn without_shard(name: &str) -> &str {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let shard = name.rsplit_once("-of-").filter(|(_, count)| is_number(count));
    let shard =
        shard.and_then(|(rest, _)| rest.rsplit_once('-')).filter(|(_, number)| is_number(number));
    let part = name.rsplit_once('/').filter(|(_, number)| is_number(number));
    shard.or(part).map_or(name, |(name, _)| name)
}

/// The files of a scenario and variant.
fn matching_tables<'a>(
    tables: &'a [(String, PathBuf)],
    scenario: &str,
    variant: &str,
) -> impl Iterator<Item = &'a Path> {
    let scenario = scenario.to_lowercase();
    let bare = scenario.split_once('-').map_or(scenario.as_str(), |(_, name)| name).to_owned();
    let ends = ["/", "-", "_"].map(|between| format!("{bare}{between}{variant}"));
    let matches = move |name: &str| {
        let name = name.replace("illegal_activity", "illegal_activitiy");
        ends.iter().any(|end| {
            name.strip_suffix(end.as_str()).is_some_and(|rest| rest.ends_with(['/', '-']))
        })
    };
    tables.iter().filter(move |(name, _)| matches(name)).map(|(_, path)| path.as_path())
}

/// The requests of a scenario in words, by id. The export has them as a variant of its own.
fn exported_requests(tables: &[(String, PathBuf)], scenario: &str) -> HashMap<String, String> {
    let tables = matching_tables(tables, scenario, "text_only");
    let questions = tables.filter_map(|table| parquet::questions(table, false).ok()).flatten();
    questions.flatten().map(|exported| (exported.id, exported.question)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exported_tables_are_matched_by_scenario_and_variant() {
        for (name, scenario, variant, fits) in [
            ("/data/illegal_activitiy/sd_typo", "01-Illegal_Activitiy", "sd_typo", true),
            ("/illegal_activity/sd", "01-Illegal_Activitiy", "sd", true),
            ("/01-illegal_activitiy/typo", "01-Illegal_Activitiy", "typo", true),
            ("/data/illegal_activitiy/sd_typo", "01-Illegal_Activitiy", "typo", false),
            ("/illegal_activitiy_sd_typo", "01-Illegal_Activitiy", "typo", false),
            ("/data/sex/sd_typo", "07-Sex", "sd", false),
            ("/data/unisex/sd", "07-Sex", "sd", false),
        ] {
            let tables = [(name.to_owned(), PathBuf::new())];
            assert_eq!(
                matching_tables(&tables, scenario, variant).count(),
                usize::from(fits),
                "{name} {variant}"
            );
        }
        for (name, expected) in [
            ("sex/sd-00000-of-00002", "sex/sd"),
            ("sex/sd/0000", "sex/sd"),
            ("07-sex/sd", "07-sex/sd"),
            ("sd", "sd"),
        ] {
            assert_eq!(without_shard(name), expected);
        }
    }
}
