//! MME (arXiv 2306.13394): two yes/no questions per image, in 14 subtasks.

use std::path::{Path, PathBuf};

use ecso::Cause;

use super::{
    benchmark::{About, Benchmark, DataError, Items},
    files::Finder,
    location::RowLocation,
    tables::read,
    validation::validated,
};
use crate::{
    item::{Item, Picture, Task},
    text::cut,
};

pub(super) struct Mme;

/// Perception: at most 2,000 points.
pub(crate) const PERCEPTION: [&str; 10] = [
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
];
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
            layout: "one folder a subtask with <image>.txt of question<TAB>Yes|No, or images/ and \
                     questions_answers_YN/",
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
            return Err(DataError::new(
                data,
                "there is no folder for any subtask (existence, count, position, …)",
            ));
        }
        if !missing.is_empty() {
            tracing::warn!(
                "mme: {} of 14 subtasks are missing: {}",
                missing.len(),
                missing.join(", ")
            );
        }
        validated(data, items)
    }
}

fn subtask_items(
    folder: &Path,
    subtask: &str,
    items: &mut Vec<(RowLocation, Item)>,
) -> Result<(), DataError> {
    let separate = folder.join("questions_answers_YN");
    let (texts, images) = if separate.is_dir() {
        (separate, folder.join("images"))
    } else {
        (folder.to_owned(), folder.to_owned())
    };
    let entries = std::fs::read_dir(&texts)
        .map_err(|error| DataError::new(&texts, Cause::from_error(error)))?;
    let mut tables: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    tables.retain(|path| {
        path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("txt"))
    });
    tables.sort();
    let mut finder = Finder::new(&images);
    for table in tables {
        let stem = table.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let image = finder.find(&format!("{stem}.jpg"));
        let text = match read(&table) {
            Ok(text) if text.trim().is_empty() => Err("there is no question in it".into()),
            text => text.map_err(|error| error.reason),
        };
        let text = match text {
            Ok(text) => text,
            Err(reason) => {
                let location = RowLocation::new(&table, "the file");
                items.push(location.item_or_error(
                    subtask,
                    Task::YesNo { yes: false },
                    Err(reason),
                ));
                continue;
            }
        };
        let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
        for (number, (line, text)) in (1_usize..).zip(lines) {
            let location = RowLocation::line(&table, line);
            let item = question(text).map(|(question, yes)| {
                let id = format!("{subtask}/{stem}/{number}");
                let item = Item {
                    scenario: subtask.into(),
                    cluster: format!("{subtask}/{stem}"),
                    ..Item::new(id, question.into(), Task::YesNo { yes })
                };
                location.with_image(item, image.clone().map(Picture::File))
            });
            items.push(location.item_or_error(subtask, Task::YesNo { yes: false }, item));
        }
    }
    Ok(())
}

/// A question, and whether yes is the right answer.
fn question(line: &str) -> Result<(&str, bool), Cause> {
    let (question, answer) =
        line.trim().rsplit_once('\t').ok_or("there is no tab between question and answer")?;
    match answer.trim().trim_end_matches('.').to_lowercase().as_str() {
        "yes" => Ok((question.trim(), true)),
        "no" => Ok((question.trim(), false)),
        _ => Err(format!("the answer is neither Yes nor No: {}", cut(answer)).into()),
    }
}
