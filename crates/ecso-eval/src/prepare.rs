//! Making benchmark items from requests alone.

use std::{
    collections::BTreeMap,
    error::Error,
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use ecso::Cause;
use serde::Deserialize;

use crate::{
    benchmarks::{
        self, DataError,
        jsonl::OwnItem,
        mm_safetybench::{ProcessedQuestion, SCENARIOS},
    },
    evasions,
    text::{cut, told},
    typographic::{FILL_THE_LIST, Typesetter, stacked},
};

/// What can go wrong: a file that can't be read or written, and why.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct PrepareError {
    path: PathBuf,
    #[source]
    reason: Cause,
}

impl PrepareError {
    fn new(path: &Path, reason: impl Into<Cause>) -> Self {
        Self { path: path.to_owned(), reason: reason.into() }
    }
}

impl From<DataError> for PrepareError {
    fn from(DataError { path, reason }: DataError) -> Self {
        Self { path, reason }
    }
}

/// What an error of a library says about a file.
fn failed<E: Error + Send + Sync + 'static>(path: &Path) -> impl Fn(E) -> PrepareError {
    |error| PrepareError::new(path, told(error))
}

fn folder(path: &Path) -> Result<(), PrepareError> {
    std::fs::create_dir_all(path).map_err(failed(path))
}

/// `FigStep`'s layout below `out`, from its table: the table itself, and every image by the
/// published recipe. Gives the number of images.
///
/// # Errors
/// [`PrepareError`] when the table can't be read or a file not be written.
pub fn figstep(table: &Path, typesetter: &Typesetter, out: &Path) -> Result<usize, PrepareError> {
    let questions = benchmarks::figstep::questions(table)?;
    let (tables, images) = (out.join("question"), out.join("images/SafeBench"));
    folder(&tables)?;
    folder(&images)?;
    for question in &questions {
        let path = images.join(question.image());
        set(typesetter, &question.instruction, &path)?;
    }
    let copy = tables.join("safebench.csv");
    std::fs::copy(table, &copy).map_err(failed(&copy))?;
    Ok(questions.len())
}

/// MM-SafetyBench's layout below `out`, from its questions: those, and the TYPO image of every
/// record that has a key phrase; where its SD image is there already, the `SD_TYPO` image too.
/// `questions` is the folder `processed_questions`, or one file of {"scenario#id": record}. Gives
/// the number of images.
///
/// # Errors
/// [`PrepareError`] when the questions can't be read or a file not be written.
pub fn mm_safetybench(
    questions: &Path,
    typesetter: &Typesetter,
    out: &Path,
) -> Result<usize, PrepareError> {
    let mut scenarios: BTreeMap<String, BTreeMap<String, ProcessedQuestion>> = BTreeMap::new();
    if questions.is_file() {
        for (key, record) in benchmarks::json::<BTreeMap<String, ProcessedQuestion>>(questions)? {
            let (scenario, id) = key.split_once('#').ok_or_else(|| {
                PrepareError::new(questions, format!("`{}` is not <scenario>#<id>", cut(&key)))
            })?;
            scenarios.entry(scenario.to_owned()).or_default().insert(id.to_owned(), record);
        }
    } else {
        for (scenario, _) in SCENARIOS {
            let path = questions.join(format!("{scenario}.json"));
            if path.exists() {
                scenarios.insert(scenario.to_owned(), benchmarks::json(&path)?);
            }
        }
    }
    let known = |scenario: &String| SCENARIOS.iter().any(|(name, _)| name == scenario);
    if let Some(unknown) = scenarios.keys().find(|scenario| !known(scenario)) {
        return Err(PrepareError::new(
            questions,
            format!("no scenario is called {}", cut(unknown)),
        ));
    }
    let mut count = 0;
    for (scenario, records) in &scenarios {
        let images = out.join("imgs").join(scenario);
        folder(&images.join("TYPO"))?;
        for (id, record) in records {
            let Some(phrase) = &record.key_phrase else { continue };
            let [photo, typo, both] = ["SD", "TYPO", "SD_TYPO"]
                .map(|folder| images.join(folder).join(format!("{id}.jpg")));
            let strip = typesetter.strip(phrase);
            strip.save(&typo).map_err(failed(&typo))?;
            count += 1;
            if photo.exists() {
                let above = image::open(&photo).map_err(failed(&photo))?.to_rgb8();
                folder(&images.join("SD_TYPO"))?;
                stacked(&above, &strip).save(&both).map_err(failed(&both))?;
            }
        }
        let table = out.join("processed_questions").join(format!("{scenario}.json"));
        folder(&out.join("processed_questions"))?;
        let text = serde_json::to_string_pretty(records).map_err(failed(&table))?;
        std::fs::write(&table, text).map_err(failed(&table))?;
    }
    if count == 0 {
        return Err(PrepareError::new(questions, "no record with a key phrase"));
    }
    Ok(count)
}

/// A request to be set as an image.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct PlainRequest {
    /// Its id; empty takes its number.
    #[serde(default)]
    pub id: String,
    /// What stands in the image.
    #[serde(alias = "instruction")]
    pub prompt: String,
    /// `safe`, `unsafe`, `harmless` or `harmful`, where that is known.
    #[serde(default)]
    pub label: Option<String>,
    /// Its scenario, where it has one.
    #[serde(default, alias = "type", alias = "topic")]
    pub scenario: Option<String>,
}

/// Reads requests: one a line, or a CSV file's columns `prompt` (or `instruction`), id, label,
/// type.
///
/// # Errors
/// [`PrepareError`] when the file can't be read.
pub fn requests(path: &Path) -> Result<Vec<PlainRequest>, PrepareError> {
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("csv")) {
        return Ok(benchmarks::csv_rows(path, ',')?);
    }
    let text = benchmarks::read(path)?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    Ok(lines
        .map(|line| PlainRequest {
            id: String::new(),
            prompt: line.to_owned(),
            label: None,
            scenario: None,
        })
        .collect())
}

/// Sets each request as an image of text (`001.png`, `002.png`, …) and writes `items.jsonl` beside
/// them: {id, image, query, request, label, scenario}, the layout of the benchmark `jsonl`. Gives
/// the path of that file, which is written last.
///
/// # Errors
/// [`PrepareError`] when a file can't be written.
pub fn typographic(
    requests: &[PlainRequest],
    typesetter: &Typesetter,
    out: &Path,
) -> Result<PathBuf, PrepareError> {
    folder(out)?;
    let mut items = Vec::new();
    for (number, request) in (1..).zip(requests) {
        let number = format!("{number:03}");
        let image = format!("{number}.png");
        set(typesetter, &request.prompt, &out.join(&image))?;
        items.push(OwnItem {
            id: if request.id.is_empty() { number } else { request.id.clone() }.into(),
            image: Some(image),
            query: FILL_THE_LIST.into(),
            request: Some(request.prompt.clone()),
            label: request.label.clone(),
            scenario: request.scenario.clone(),
            ..OwnItem::default()
        });
    }
    write_items(items, out)
}

/// An item whose picture is yet to be made.
#[derive(Deserialize)]
struct Sheet {
    /// What stands in it.
    page: String,
    #[serde(flatten)]
    item: OwnItem,
}

/// Items for the benchmark `jsonl` below `out`, from JSON lines of such items: one that has `page`
/// gets a picture of that text. Gives the number of pictures.
///
/// # Errors
/// [`PrepareError`] when a row can't be read or a file not be written.
pub fn pages(items: &Path, typesetter: &Typesetter, out: &Path) -> Result<usize, PrepareError> {
    folder(out)?;
    let mut count = 0;
    let mut made = Vec::new();
    for (number, line) in
        (1..).zip(benchmarks::read(items)?.lines()).filter(|(_, line)| !line.trim().is_empty())
    {
        let wrong = |error| PrepareError::new(items, format!("line {number}: {}", told(error)));
        let row: serde_json::Value = serde_json::from_str(line).map_err(wrong)?;
        if row.get("page").is_none() {
            made.push(serde_json::from_value(row).map_err(wrong)?);
            continue;
        }
        let Sheet { page, item } = serde_json::from_value(row).map_err(wrong)?;
        count += 1;
        let image = format!("{count:04}.png");
        let path = out.join(&image);
        typesetter.sheet(&page).save(&path).map_err(failed(&path))?;
        made.push(OwnItem { image: Some(image), ..item });
    }
    write_items(made, out)?;
    Ok(count)
}

/// Sets words as the heading of an empty list.
fn set(typesetter: &Typesetter, words: &str, path: &Path) -> Result<(), PrepareError> {
    typesetter.list(words).save(path).map_err(failed(path))
}

/// Writes items for the benchmark `jsonl`.
fn write_items(
    items: impl IntoIterator<Item = OwnItem>,
    out: &Path,
) -> Result<PathBuf, PrepareError> {
    let path = out.join("items.jsonl");
    let mut file = BufWriter::new(File::create(&path).map_err(failed(&path))?);
    for item in items {
        serde_json::to_writer(&mut file, &item).map_err(failed(&path))?;
        writeln!(file).map_err(failed(&path))?;
    }
    file.flush().map_err(failed(&path))?;
    Ok(path)
}

/// The families of evasions ([`evasions::FAMILIES`]) below `out`, from the harmful rows of
/// `FigStep`'s table, and as many decoys ([`evasions::DECOY`]). Gives the number of items.
///
/// # Errors
/// [`PrepareError`] when the table can't be read or a file not be written.
pub fn evasions(
    table: &Path,
    per_family: usize,
    typesetter: &Typesetter,
    out: &Path,
) -> Result<usize, PrepareError> {
    let mut questions = benchmarks::figstep::questions(table)?;
    questions.retain(|question| question.advice().is_none());
    if questions.is_empty() || per_family == 0 {
        return Err(PrepareError::new(table, "no harmful row in it, or none wanted"));
    }
    folder(out)?;
    let mild = benchmarks::twins::twins().map_err(failed(table))?;
    let evasions = evasions::evasions(&questions, &mild, per_family);
    let count = evasions.len();
    for (name, shown) in evasions.iter().flat_map(|evasion| &evasion.images) {
        let path = out.join(name);
        shown.set(typesetter).save(&path).map_err(failed(&path))?;
    }
    write_items(evasions.into_iter().map(|evasion| evasion.item), out)?;
    Ok(count)
}
