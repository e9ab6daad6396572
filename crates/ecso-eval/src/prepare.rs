//! Prepares benchmark items: renders the images for requests that are given as text.

use std::{
    collections::BTreeMap,
    error::Error,
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use ecso::Cause;
use image::{ImageReader, RgbImage};
use serde::Deserialize;

use crate::{
    benchmarks::{
        self, DataError,
        jsonl::JsonlItem,
        mm_safetybench::{ProcessedQuestion, SCENARIOS},
    },
    evasions,
    text::{cut, shortened},
    typographic::{FILL_THE_LIST, Typesetter, stacked},
};

/// A file that can't be read or written, and why.
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

/// Turns an error of a library into one about a file.
fn error_at<E: Error + Send + Sync + 'static>(path: &Path) -> impl Fn(E) -> PrepareError {
    |error| PrepareError::new(path, shortened(error))
}

fn create_folder(path: &Path) -> Result<(), PrepareError> {
    std::fs::create_dir_all(path).map_err(error_at(path))
}

/// Writes `FigStep`'s layout to `out`, from its table: the table itself, and every image by the
/// published recipe. Returns the number of images.
///
/// # Errors
/// [`PrepareError`] if the table can't be read or a file can't be written.
pub fn figstep(table: &Path, typesetter: &Typesetter, out: &Path) -> Result<usize, PrepareError> {
    let questions = benchmarks::figstep::questions(table)?;
    let (tables, images) = (out.join("question"), out.join("images/SafeBench"));
    create_folder(&tables)?;
    create_folder(&images)?;
    for question in &questions {
        let path = images.join(question.image());
        save_list(typesetter, &question.instruction, &path)?;
    }
    let copy = tables.join("safebench.csv");
    std::fs::copy(table, &copy).map_err(error_at(&copy))?;
    Ok(questions.len())
}

/// Writes MM-SafetyBench's layout to `out`, from its questions: these, and the TYPO image of every
/// record that has a key phrase; also the `SD_TYPO` image if `out` already has the SD image.
/// `questions` is the folder `processed_questions`, or one file of {"scenario#id": record}. Returns
/// the number of TYPO images.
///
/// # Errors
/// [`PrepareError`] if the questions can't be read or a file can't be written.
pub fn mm_safetybench(
    questions: &Path,
    typesetter: &Typesetter,
    out: &Path,
) -> Result<usize, PrepareError> {
    let mut count = 0;
    for (scenario, records) in &read_questions(questions)? {
        let images = out.join("imgs").join(scenario);
        create_folder(&images.join("TYPO"))?;
        for (id, record) in records {
            let Some(phrase) = &record.key_phrase else { continue };
            let [photo, typo, both] = ["SD", "TYPO", "SD_TYPO"]
                .map(|folder| images.join(folder).join(format!("{id}.jpg")));
            let strip = typesetter.strip(phrase);
            strip.save(&typo).map_err(error_at(&typo))?;
            count += 1;
            if photo.exists() {
                let photo = decode(&photo)?;
                create_folder(&images.join("SD_TYPO"))?;
                stacked(&photo, &strip).save(&both).map_err(error_at(&both))?;
            }
        }
        let table = out.join("processed_questions").join(format!("{scenario}.json"));
        create_folder(&out.join("processed_questions"))?;
        let text = serde_json::to_string_pretty(records).map_err(error_at(&table))?;
        std::fs::write(&table, text).map_err(error_at(&table))?;
    }
    if count == 0 {
        return Err(PrepareError::new(questions, "no record has a key phrase"));
    }
    Ok(count)
}

/// The questions by scenario and id.
fn read_questions(
    path: &Path,
) -> Result<BTreeMap<String, BTreeMap<String, ProcessedQuestion>>, PrepareError> {
    let mut scenarios: BTreeMap<String, BTreeMap<String, ProcessedQuestion>> = BTreeMap::new();
    if path.is_file() {
        for (key, record) in benchmarks::json::<BTreeMap<String, ProcessedQuestion>>(path)? {
            let (scenario, id) = key.split_once('#').ok_or_else(|| {
                PrepareError::new(path, format!("`{}` is not <scenario>#<id>", cut(&key)))
            })?;
            scenarios.entry(scenario.to_owned()).or_default().insert(id.to_owned(), record);
        }
    } else {
        for (scenario, _) in SCENARIOS {
            let file = path.join(format!("{scenario}.json"));
            if file.exists() {
                scenarios.insert(scenario.to_owned(), benchmarks::json(&file)?);
            }
        }
    }
    let is_known = |scenario: &String| SCENARIOS.iter().any(|(name, _)| name == scenario);
    match scenarios.keys().find(|scenario| !is_known(scenario)) {
        Some(unknown) => {
            Err(PrepareError::new(path, format!("there is no scenario {}", cut(unknown))))
        }
        None => Ok(scenarios),
    }
}

/// Decodes an image by its bytes, whatever its file is called.
fn decode(path: &Path) -> Result<RgbImage, PrepareError> {
    let reader = ImageReader::open(path).and_then(ImageReader::with_guessed_format);
    Ok(reader.map_err(error_at(path))?.decode().map_err(error_at(path))?.into_rgb8())
}

/// A request to be rendered as an image.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct PlainRequest {
    /// Its id; if empty, its number is used.
    #[serde(default)]
    pub id: String,
    /// The text of the image.
    #[serde(alias = "instruction")]
    pub prompt: String,
    /// `safe`, `unsafe`, `harmless` or `harmful`, if it is known.
    #[serde(default)]
    pub label: Option<String>,
    /// Its scenario, if it has one.
    #[serde(default, alias = "type", alias = "topic")]
    pub scenario: Option<String>,
}

/// Reads requests: one per line, or from the columns `prompt` (or `instruction`), id, label and
/// type of a CSV file.
///
/// # Errors
/// [`PrepareError`] if the file can't be read.
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

/// Renders each request as an image of text (`001.png`, `002.png`, …), and writes `items.jsonl`
/// next to them: {id, image, query, request, label, scenario}, the layout of the benchmark `jsonl`.
/// Returns the path of that file, which is written last.
///
/// # Errors
/// [`PrepareError`] if a file can't be written.
pub fn typographic(
    requests: &[PlainRequest],
    typesetter: &Typesetter,
    out: &Path,
) -> Result<PathBuf, PrepareError> {
    create_folder(out)?;
    let mut items = Vec::new();
    for (number, request) in (1..).zip(requests) {
        let number = format!("{number:03}");
        let image = format!("{number}.png");
        save_list(typesetter, &request.prompt, &out.join(&image))?;
        items.push(JsonlItem {
            id: if request.id.is_empty() { number } else { request.id.clone() }.into(),
            image: Some(image),
            query: FILL_THE_LIST.into(),
            request: Some(request.prompt.clone()),
            label: request.label.clone(),
            scenario: request.scenario.clone(),
            ..JsonlItem::default()
        });
    }
    write_items(items, out)
}

/// An item whose picture has yet to be rendered.
#[derive(Deserialize)]
struct PageItem {
    /// The text of the picture.
    page: String,
    #[serde(flatten)]
    item: JsonlItem,
}

/// Writes items for the benchmark `jsonl` to `out`, from JSON lines of such items: an item that has
/// `page` gets a picture of that text. Returns the number of pictures.
///
/// # Errors
/// [`PrepareError`] if a row can't be read or a file can't be written.
pub fn pages(items: &Path, typesetter: &Typesetter, out: &Path) -> Result<usize, PrepareError> {
    create_folder(out)?;
    let mut count = 0;
    let mut prepared = Vec::new();
    for (number, line) in
        (1..).zip(benchmarks::read(items)?.lines()).filter(|(_, line)| !line.trim().is_empty())
    {
        let line_error =
            |error| PrepareError::new(items, format!("line {number}: {}", shortened(error)));
        let row: serde_json::Value = serde_json::from_str(line).map_err(line_error)?;
        if row.get("page").is_none() {
            prepared.push(serde_json::from_value(row).map_err(line_error)?);
            continue;
        }
        let PageItem { page, item } = serde_json::from_value(row).map_err(line_error)?;
        count += 1;
        let image = format!("{count:04}.png");
        let path = out.join(&image);
        typesetter.sheet(&page).save(&path).map_err(error_at(&path))?;
        prepared.push(JsonlItem { image: Some(image), ..item });
    }
    write_items(prepared, out)?;
    Ok(count)
}

/// Renders words as the heading of an empty list.
fn save_list(typesetter: &Typesetter, words: &str, path: &Path) -> Result<(), PrepareError> {
    typesetter.list(words).save(path).map_err(error_at(path))
}

/// Writes `items.jsonl` for the benchmark `jsonl`, and returns its path.
fn write_items(
    items: impl IntoIterator<Item = JsonlItem>,
    out: &Path,
) -> Result<PathBuf, PrepareError> {
    let path = out.join("items.jsonl");
    let mut file = BufWriter::new(File::create(&path).map_err(error_at(&path))?);
    for item in items {
        serde_json::to_writer(&mut file, &item).map_err(error_at(&path))?;
        writeln!(file).map_err(error_at(&path))?;
    }
    file.flush().map_err(error_at(&path))?;
    Ok(path)
}

/// Writes the families of evasions ([`evasions::FAMILIES`]) to `out`, from the harmful rows of
/// `FigStep`'s table, and as many decoys ([`evasions::DECOY`]). Returns the number of items.
///
/// # Errors
/// [`PrepareError`] if the table can't be read or a file can't be written.
pub fn evasions(
    table: &Path,
    per_family: usize,
    typesetter: &Typesetter,
    out: &Path,
) -> Result<usize, PrepareError> {
    let mut questions = benchmarks::figstep::questions(table)?;
    questions.retain(|question| question.advice().is_none());
    if questions.is_empty() || per_family == 0 {
        return Err(PrepareError::new(table, "it has no harmful row, or none is wanted"));
    }
    create_folder(out)?;
    let harmless = benchmarks::twins::twins().map_err(error_at(table))?;
    let evasions = evasions::evasions(&questions, &harmless, per_family);
    let count = evasions.len();
    for (name, image) in evasions.iter().flat_map(|evasion| &evasion.images) {
        let path = out.join(name);
        image.render(typesetter).save(&path).map_err(error_at(&path))?;
    }
    write_items(evasions.into_iter().map(|evasion| evasion.item), out)?;
    Ok(count)
}
