//! `MMBench` (arXiv 2307.06281): multiple-choice questions, each asked in every rotation of its
//! options.

use std::{collections::HashMap, path::Path, sync::Arc};

use csv::StringRecord;
use ecso::Cause;

use super::{
    benchmark::{About, Benchmark, DataError, Items},
    files::{Finder, base64, locate},
    location::RowLocation,
    tables::Table,
    validation::validated,
};
use crate::{
    item::{Item, ItemError, Picture, Task},
    text::cut,
};

pub(super) struct MmBench;

/// Rotations of a question share the index modulo this number.
const ROTATION_STEP: u64 = 1_000_000;

/// A row: a question in one rotation of its options. Missing cells are empty.
struct Rotation {
    index: u64,
    question: String,
    hint: String,
    options: Vec<(char, String)>,
    answer: String,
    category: String,
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
            layout: "a .tsv with index, question, hint, A to D or further, answer, category, image \
                     (base64, or a path)",
            variants: &[],
            scenarios: &[],
        }
    }

    fn items(&self, data: &Path, _: Option<&str>) -> Result<Items, DataError> {
        let path = locate(
            data,
            &[
                "MMBench_DEV_EN.tsv",
                "mmbench_dev_en.tsv",
                "mmbench_dev_20230712.tsv",
                "mmbench.tsv",
            ],
        )?;
        let table = Table::read(&path, '\t')?;
        let letters = letters(&table.columns).map_err(|reason| DataError::new(&path, reason))?;
        // How a missing option is written can only be seen in the table as a whole.
        let readable = table.rows.iter().filter_map(|(_, row)| row.as_ref().ok());
        let leaves_empty = readable
            .flat_map(|row| letters.iter().filter_map(|(_, at)| row.get(*at)))
            .any(str::is_empty);
        let columns = table.columns;
        let rotations: Vec<(RowLocation, Result<Rotation, Cause>)> = table
            .rows
            .into_iter()
            .map(|(location, cells)| {
                let rotation =
                    cells.and_then(|cells| rotation(&columns, &letters, leaves_empty, &cells));
                (location, rotation)
            })
            .collect();
        // A rotation may refer to the row that has the image instead of repeating it.
        let embedded: HashMap<u64, Arc<[u8]>> = rotations
            .iter()
            .filter_map(|(_, rotation)| rotation.as_ref().ok())
            .filter_map(|rotation| Some((rotation.index, base64(&rotation.image)?)))
            .collect();
        let mut finder = Finder::new(path.parent().unwrap_or(data));
        let items = rotations.into_iter().map(|(location, rotation)| {
            let item = rotation.map(|rotation| {
                let image = image(&rotation, &embedded, &mut finder);
                location.with_image(item(&location, rotation), image)
            });
            location.item_or_error("", Task::Choice { answer: ' ', options: Vec::new() }, item)
        });
        validated(data, items)
    }
}

/// The columns of options, called A, B and so on, with their positions.
fn letters(columns: &StringRecord) -> Result<Vec<(char, usize)>, Cause> {
    let place = |letter: char| {
        let mut places = columns
            .iter()
            .zip(0..)
            .filter(|(name, _)| name.chars().eq([letter]))
            .map(|(_, place)| place);
        match (places.next(), places.next()) {
            (Some(_), Some(_)) => Err(format!("there are two columns {letter}").into()),
            (first, _) => Ok(first.map(|place| (letter, place))),
        }
    };
    ('A'..='Z').filter_map(|letter| place(letter).transpose()).collect()
}

fn rotation(
    columns: &StringRecord,
    letters: &[(char, usize)],
    leaves_empty: bool,
    cells: &StringRecord,
) -> Result<Rotation, Cause> {
    let cell = |name: &str| {
        let place = columns.iter().position(|column| column == name);
        place
            .and_then(|place| cells.get(place))
            .filter(|text| !is_nan(text) && *text != "None")
            .unwrap_or_default()
    };
    if !columns.iter().any(|column| column == "index") {
        return Err("there is no column `index`".into());
    }
    let answer = cell("answer").trim().to_uppercase();
    let answer = answer.trim_matches(['(', ')', '.', ':', ' ']).to_owned();
    let texts: Vec<_> = letters
        .iter()
        .map(|(letter, place)| (*letter, cells.get(*place).unwrap_or_default()))
        .collect();
    Ok(Rotation {
        index: index(cell("index"))
            .ok_or_else(|| format!("its index is not a whole number: `{}`", cut(cell("index"))))?,
        question: cell("question").to_owned(),
        hint: cell("hint").to_owned(),
        options: options(&texts, &answer, leaves_empty),
        answer,
        category: cell("category").to_owned(),
        image: ["image", "image_path"]
            .map(cell)
            .into_iter()
            .find(|text| !text.is_empty())
            .unwrap_or_default()
            .to_owned(),
    })
}

/// Parses an index, even if pandas turned it into a float.
fn index(text: &str) -> Option<u64> {
    let text = text.trim();
    let number = || {
        text.parse()
            .ok()
            .filter(|number: &f64| number.fract() == 0.0 && (0.0..9e15).contains(number))
    };
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a whole number, not below 0"
    )]
    text.parse().ok().or_else(|| number().map(|number| number as u64))
}

/// Whether a cell has one of the texts that pandas writes for a missing value.
fn is_nan(text: &str) -> bool {
    text.trim().eq_ignore_ascii_case("nan") || text.trim() == "<NA>"
}

/// The options of a row. A cell with the text `None` may be an option or a missing value. It is an
/// option if it is the answer or is followed by another option, or if missing options are left
/// empty in this table and there is only one such cell.
fn options(texts: &[(char, &str)], answer: &str, leaves_empty: bool) -> Vec<(char, String)> {
    let is_none = |text: &str| text.trim() == "None";
    let is_text = |text: &str| !text.trim().is_empty() && !is_nan(text);
    let last = texts.iter().rposition(|(_, text)| is_text(text) && !is_none(text));
    let nones = texts.iter().filter(|(_, text)| is_none(text)).count();
    let is_option = |place: usize, letter: char| {
        answer == letter.to_string()
            || last.is_some_and(|last| place < last)
            || (leaves_empty && nones == 1)
    };
    let kept = texts.iter().zip(0..).filter(|((letter, text), place)| {
        is_text(text) && (!is_none(text) || is_option(*place, *letter))
    });
    kept.map(|((letter, text), _)| (*letter, (*text).to_owned())).collect()
}

/// The image of a rotation: its own, the one of the row that it refers to, the one of its question,
/// or a file.
fn image(
    rotation: &Rotation,
    embedded: &HashMap<u64, Arc<[u8]>>,
    finder: &mut Finder,
) -> Result<Picture, ItemError> {
    let own = embedded.get(&rotation.index).filter(|_| rotation.image.len() >= 64);
    let at_index = |index: u64| {
        let missing =
            || ItemError::MissingImage(format!("there is no image at index {index}").into());
        embedded.get(&index).map(|bytes| Picture::Bytes(Arc::clone(bytes))).ok_or_else(missing)
    };
    match (own, index(&rotation.image)) {
        (Some(bytes), _) => Ok(Picture::Bytes(Arc::clone(bytes))),
        (None, Some(other)) => at_index(other),
        (None, None) if rotation.image.is_empty() => at_index(rotation.index % ROTATION_STEP),
        (None, None) => finder.picture(&rotation.image),
    }
}

fn item(location: &RowLocation, rotation: Rotation) -> Item {
    let is_option =
        rotation.options.iter().any(|(letter, _)| rotation.answer == letter.to_string());
    let problem = match rotation.answer.as_str() {
        "" => Some("there is no answer (only the authors can score the test split)".to_owned()),
        _ if rotation.question.trim().is_empty() => Some("there is no question".into()),
        answer if !is_option => {
            let letters: Vec<String> =
                rotation.options.iter().map(|(letter, _)| letter.to_string()).collect();
            Some(format!(
                "the answer {} is not one of the options {}",
                cut(answer),
                letters.join(", ")
            ))
        }
        _ => None,
    };
    let lettered: Vec<String> =
        rotation.options.iter().map(|(letter, text)| format!("{letter}. {text}")).collect();
    let hint = if rotation.hint.trim().is_empty() {
        String::new()
    } else {
        format!("{}\n", rotation.hint)
    };
    let query = format!(
        "{hint}{}\n{}\nAnswer with the option's letter from the given choices directly.",
        rotation.question,
        lettered.join("\n")
    );
    let task = Task::Choice {
        answer: rotation.answer.chars().next().unwrap_or_default(),
        options: rotation.options,
    };
    let has_category = !rotation.category.trim().is_empty();
    Item {
        scenario: if has_category { rotation.category } else { "all".into() },
        cluster: (rotation.index % ROTATION_STEP).to_string(),
        request: rotation.question,
        error: problem.map(|reason| location.error(ItemError::Unreadable(reason.into()))),
        ..Item::new(rotation.index.to_string(), query, task)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_options_are_told_from_options_called_none() {
        for (texts, answer, leaves_empty, expected) in [
            (["a", "b", "c", "d", "e"], "E", false, "ABCDE"),
            (["a", "b", "", "", ""], "A", true, "AB"),
            (["a", "b", "nan", "NaN", "<NA>"], "A", false, "AB"),
            (["a", "b", "None", "None", "None"], "A", false, "AB"),
            (["a", "b", "None", "None", ""], "A", true, "AB"),
            (["a", "b", "None", "nan", "nan"], "A", false, "AB"),
            // The word as an option.
            (["None", "One", "Two", "", ""], "B", true, "ABC"),
            (["One", "Two", "None", "", ""], "A", true, "ABC"),
            (["One", "Two", "None", "nan", "nan"], "C", false, "ABC"),
            (["NA", "nan", "C sharp", "D", ""], "A", true, "ACD"),
        ] {
            let letters: Vec<_> = ('A'..).zip(texts).collect();
            let found: String = options(&letters, answer, leaves_empty)
                .into_iter()
                .map(|(letter, _)| letter)
                .collect();
            assert_eq!(found, expected, "{texts:?}");
        }
    }

    #[test]
    fn an_index_may_be_a_float() {
        for (text, expected) in [
            ("0", Some(0)),
            ("0.0", Some(0)),
            (" 1000001.0", Some(1_000_001)),
            ("3e+06", Some(3_000_000)),
            ("0.5", None),
            ("-1", None),
            ("nan", None),
            ("inf", None),
            ("", None),
            ("1e300", None),
        ] {
            assert_eq!(index(text), expected, "{text}");
        }
    }
}
