//! MME (arXiv 2306.13394): two yes/no questions an image, in 14 subtasks.

use std::path::{Path, PathBuf};

use super::{About, Benchmark, DataError, Items, read};
use crate::item::{Item, Picture, Task};

pub(super) struct Mme;

/// Perception: at most 2,000 points.
pub(crate) const PERCEPTION: [&str; 10] =
    ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"];
/// Cognition: at most 800 points.
pub(crate) const COGNITION: [&str; 4] =
    ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"];

impl Benchmark for Mme {
    fn about(&self) -> About {
        About {
            name: "mme",
            size: "2,374 questions (14 subtasks)",
            licence: "of its authors, for research",
            source: "github BradyFU/Awesome-Multimodal-Large-Language-Models (on request)",
            scoring: "exact: accuracy + accuracy with both questions right, x100, per subtask",
            layout: "one folder a subtask with <image>.txt of question<TAB>Yes|No, or images/ and questions_answers_YN/",
            variants: &[],
            scenarios: &[],
        }
    }

    fn items(&self, data: &Path, _: Option<&str>) -> Result<Items, DataError> {
        let mut items = Vec::new();
        let mut missing = Vec::new();
        for subtask in PERCEPTION.into_iter().chain(COGNITION) {
            let folder = data.join(subtask);
            if folder.is_dir() {
                subtask_items(&folder, subtask, &mut items)?;
            } else {
                missing.push(subtask);
            }
        }
        if items.is_empty() {
            return Err(DataError::new(data, "there is no folder of a subtask (existence, count, position, …)"));
        }
        if !missing.is_empty() {
            tracing::warn!("mme: {} of 14 subtasks are not there: {}", missing.len(), missing.join(", "));
        }
        Ok(Items::all(items))
    }
}

fn subtask_items(folder: &Path, subtask: &str, items: &mut Vec<Item>) -> Result<(), DataError> {
    let apart = folder.join("questions_answers_YN");
    let (texts, images) =
        if apart.is_dir() { (apart, folder.join("images")) } else { (folder.to_owned(), folder.to_owned()) };
    let entries = std::fs::read_dir(&texts).map_err(|error| DataError::new(&texts, error))?;
    let mut tables: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    tables.retain(|path| path.extension().is_some_and(|extension| extension == "txt"));
    tables.sort();
    for table in tables {
        let stem = table.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let found = ["jpg", "png", "jpeg"].map(|extension| images.join(format!("{stem}.{extension}")));
        let image = found.into_iter().find(|path| path.exists());
        let image = image.ok_or_else(|| DataError::new(&table, "its image is missing (.jpg or .png)"))?;
        for (number, line) in (1..).zip(read(&table)?.lines().filter(|line| !line.trim().is_empty())) {
            let (question, answer) = line
                .split_once('\t')
                .ok_or_else(|| DataError::new(&table, format!("line {number}: no tab between question and answer")))?;
            let yes = match answer.trim().to_lowercase().as_str() {
                "yes" => true,
                "no" => false,
                _ => return Err(DataError::new(&table, format!("line {number}: the answer is neither Yes nor No"))),
            };
            items.push(Item {
                id: format!("{subtask}/{stem}/{number}"),
                scenario: subtask.into(),
                cluster: format!("{subtask}/{stem}"),
                query: question.trim().into(),
                request: question.trim().into(),
                images: vec![Picture::File(image.clone())],
                earlier: Vec::new(),
                draft: None,
                task: Task::YesNo { yes },
            });
        }
    }
    Ok(())
}
