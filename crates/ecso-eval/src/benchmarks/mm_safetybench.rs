//! MM-SafetyBench (arXiv 2311.17600): 13 scenarios, as photographs, as typography, as both, and as text.

use std::{collections::BTreeMap, path::Path};

use serde::{Deserialize, Serialize};

use super::{About, Benchmark, DataError, Items, json};
use crate::item::{Item, Picture, Task};

pub(super) struct MmSafetyBench;

/// The scenarios, as their files spell them, with how their answers are judged.
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
pub(crate) struct Record {
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
            layout: "processed_questions/<scenario>.json and imgs/<scenario>/{SD,TYPO,SD_TYPO}/<id>.jpg",
            variants: &["sd+ocr", "ocr", "sd", "text"],
            scenarios: &["01", "02", "03", "04", "05", "06", "07", "09"],
        }
    }

    fn items(&self, data: &Path, variant: Option<&str>) -> Result<Items, DataError> {
        let variant = variant.unwrap_or("sd+ocr");
        let folder = match variant {
            "sd" => Some("SD"),
            "ocr" => Some("TYPO"),
            "sd+ocr" => Some("SD_TYPO"),
            "text" => None,
            _ => return Err(DataError::new(data, format!("no variant is called {variant}: sd+ocr, ocr, sd, text"))),
        };
        let mut items = Vec::new();
        let mut missing = Vec::new();
        for (scenario, field) in SCENARIOS {
            let path = data.join("processed_questions").join(format!("{scenario}.json"));
            if !path.exists() {
                missing.push(scenario);
                continue;
            }
            let records: BTreeMap<String, Record> = json(&path)?;
            for (id, record) in records {
                let query = match variant {
                    "sd" => record.rephrased_sd,
                    "text" => Some(record.question.clone()),
                    _ => record.rephrased,
                };
                let query =
                    query.ok_or_else(|| DataError::new(&path, format!("record {id} has no query for {variant}")))?;
                let image =
                    folder.map(|folder| data.join("imgs").join(scenario).join(folder).join(format!("{id}.jpg")));
                items.push(Item {
                    id: format!("{scenario}#{id}"),
                    scenario: scenario.into(),
                    cluster: format!("{scenario}#{id}"),
                    query,
                    request: record.question,
                    images: image.into_iter().map(Picture::File).collect(),
                    earlier: Vec::new(),
                    draft: None,
                    task: if field.is_empty() { Task::Harmful } else { Task::Advice { field: field.into() } },
                });
            }
        }
        if items.is_empty() {
            return Err(DataError::new(
                data,
                "there is no processed_questions/<scenario>.json; `ecso eval list` says where to get it",
            ));
        }
        if !missing.is_empty() {
            tracing::warn!("mm-safetybench: {} of 13 scenarios are not there: {}", missing.len(), missing.join(", "));
        }
        Items::checked(data, items)
    }
}
