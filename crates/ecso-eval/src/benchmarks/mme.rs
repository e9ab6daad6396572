//! MME (arXiv 2306.13394): two yes/no questions an image, in 14 subtasks.

use std::path::{Path, PathBuf};

use ecso::Cause;

use super::{
    benchmark::{About, Benchmark, DataError, Items},
    check::checked,
    files::Finder,
    place::Place,
    tables::read,
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
            return Err(DataError::new(
                data,
                "there is no folder of a subtask (existence, count, position, …)",
            ));
        }
        if !missing.is_empty() {
            tracing::warn!(
                "mme: {} of 14 subtasks are not there: {}",
                missing.len(),
                missing.join(", ")
            );
        }
        checked(data, items)
    }
}

fn subtask_items(
    folder: &Path,
    subtask: &str,
    items: &mut Vec<(Place, Item)>,
) -> Result<(), DataError> {
    let apart = folder.join("questions_answers_YN");
    let (texts, images) = if apart.is_dir() {
        (apart, folder.join("images"))
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
                let place = Place::new(&table, "the file");
                items.push(place.settled(subtask, Task::YesNo { yes: false }, Err(reason)));
                continue;
            }
        };
        let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
        for (number, (line, text)) in (1_usize..).zip(lines) {
            let place = Place::line(&table, line);
            let item = question(text).map(|(question, yes)| {
                let item = Item {
                    id: format!("{subtask}/{stem}/{number}"),
                    scenario: subtask.into(),
                    cluster: format!("{subtask}/{stem}"),
                    query: question.into(),
                    request: question.into(),
                    images: Vec::new(),
                    earlier: Vec::new(),
                    draft: None,
                    begun: None,
                    task: Task::YesNo { yes },
                    trouble: None,
                };
                place.shown(item, image.clone().map(Picture::File))
            });
            items.push(place.settled(subtask, Task::YesNo { yes: false }, item));
        }
    }
    Ok(())
}

/// A question, and whether yes is right.
fn question(line: &str) -> Result<(&str, bool), Cause> {
    let (question, answer) =
        line.trim().rsplit_once('\t').ok_or("there is no tab between question and answer")?;
    match answer.trim().trim_end_matches('.').to_lowercase().as_str() {
        "yes" => Ok((question.trim(), true)),
        "no" => Ok((question.trim(), false)),
        _ => Err(format!("the answer is neither Yes nor No: {}", cut(answer)).into()),
    }
}
