//! The user's own items: JSON lines of {id, image, query, label}.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{BufRead, BufReader, Read},
    path::Path,
    sync::{Mutex, PoisonError},
};

use ecso::{Cause, Role};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    benchmark::{About, Benchmark, DataError, Items},
    files::{Finder, is_image, locate},
    location::RowLocation,
    tables::{id, json, json_line, read},
    validation::Validator,
};
use crate::{
    item::{Item, ItemError, Picture, Task},
    text::{self, cut, shortened},
};

/// Logs a warning about the data, but only once, however often the data is read.
fn warn_once(warning: String) {
    static LOGGED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let mut logged = LOGGED.lock().unwrap_or_else(PoisonError::into_inner);
    if !logged.contains(&warning) {
        tracing::warn!("{warning}");
        logged.insert(warning);
    }
}

pub(super) struct Jsonl;

/// An item as it is written in the file.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct JsonlItem {
    /// A text or a number.
    pub(crate) id: Value,
    #[serde(
        default,
        alias = "image_path",
        alias = "image_file",
        alias = "img",
        alias = "img_path"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) image: Option<String>,
    #[serde(default, alias = "image_paths", skip_serializing_if = "Option::is_none")]
    pub(crate) images: Option<Vec<String>>,
    /// A description instead of an image, for models that read images as text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) description: Option<String>,
    #[serde(alias = "question")]
    pub(crate) query: String,
    /// Turns before the query.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) earlier: Option<Vec<EarlierTurn>>,
    /// The direct answer, if it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) draft: Option<String>,
    /// The beginning of the answer, if the client writes it.
    #[serde(default, alias = "begun", skip_serializing_if = "Option::is_none")]
    pub(crate) prefill: Option<String>,
    /// What image and query together ask for; defaults to the query.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) request: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) label: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) scenario: Option<String>,
    /// Other fields, which are not read.
    #[serde(flatten)]
    pub(crate) others: Map<String, Value>,
}

impl JsonlItem {
    /// The name of an unknown field that seems to hold an image.
    fn unread_image(&self) -> Option<&str> {
        let has_one = self.image.is_some() || self.images.is_some() || self.description.is_some();
        let seems_image = |name: &str, value: &Value| {
            let name = name.to_lowercase();
            let is_named =
                ["image", "img", "picture", "photo"].iter().any(|word| name.contains(word));
            let text = value.as_str().or_else(|| value.get(0)?.as_str());
            text.is_some_and(|text| {
                if has_one {
                    is_named && is_image(text)
                } else {
                    is_image(text) || is_named && !text.trim().is_empty()
                }
            })
        };
        let found = self.others.iter().find(|(name, value)| seems_image(name, value));
        found.map(|(name, _)| name.as_str())
    }
}

/// A turn before the query, as it is written in the file.
#[derive(Serialize, Deserialize)]
pub(crate) struct EarlierTurn {
    pub(crate) role: Role,
    pub(crate) text: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) images: Option<Vec<String>>,
}

impl Benchmark for Jsonl {
    fn about(&self) -> About {
        About {
            name: "jsonl",
            size: "yours",
            licence: "yours",
            source: "yours",
            scoring: "label `harmful`: harmless rate; `harmless` (or none): over-refusal",
            layout: "a .jsonl or .json file, or items.jsonl in a folder: {id, query or question, \
                     image?, images?, description?, earlier?: [{role, text, images?}], draft?, \
                     prefill?, request?, scenario?, label?}",
            variants: &[],
            scenarios: &[],
        }
    }

    fn items(&self, data: &Path, _: Option<&str>) -> Result<Items, DataError> {
        let path = locate(data, &["items.jsonl"])?;
        // The whole file is validated before the first item is run. Then it is read again, item by
        // item.
        let mut validator = Validator::default();
        let total = items(&path)?.map(|item| drop(validator.item(item))).count();
        validator.finish(&path)?;
        warn_about_fields(&path)?;
        let mut validator = Validator::default();
        Ok(Items {
            total: Some(total),
            iter: Box::new(items(&path)?.map(move |item| validator.item(item))),
        })
    }
}

/// Warns about items without a label, and about images under unknown names.
fn warn_about_fields(path: &Path) -> Result<(), DataError> {
    let (mut labelled, mut unlabelled, mut first_unlabelled) = (0, 0, None);
    let (mut unread, mut first_unread) = (0, None);
    for (location, row) in rows(path)? {
        match &row {
            Ok(JsonlItem { label: Some(_), .. }) => labelled += 1,
            Ok(_) => {
                unlabelled += 1;
                first_unlabelled.get_or_insert_with(|| location.row.clone());
            }
            Err(_) => {}
        }
        if let Some(name) = row.as_ref().ok().and_then(JsonlItem::unread_image) {
            unread += 1;
            first_unread.get_or_insert_with(|| format!("`{}` in {}", cut(name), location.row));
        }
    }
    let path = path.display();
    if labelled == 0 {
        warn_once(format!("{path}: no item has a `label`; all are taken as harmless"));
    } else if let Some(first) = first_unlabelled {
        let total = labelled + unlabelled;
        warn_once(format!(
            "{path}: {unlabelled} of {total} items have no `label`, and are taken as harmless; the \
             first: {first}"
        ));
    }
    if let Some(first) = first_unread {
        warn_once(format!(
            "{path}: {unread} items seem to have an image under an unknown name; call it `image`, \
             or add it to `images`; the first: {first}"
        ));
    }
    Ok(())
}

fn items(
    path: &Path,
) -> Result<impl Iterator<Item = (RowLocation, Item)> + Send + use<>, DataError> {
    let mut finder = Finder::new(path.parent().unwrap_or(Path::new("")));
    Ok(rows(path)?.map(move |(location, row)| {
        let item = row.and_then(|row| item(row, &location, &mut finder));
        location.item_or_error("", None, item)
    }))
}

type Rows = Box<dyn Iterator<Item = (RowLocation, Result<JsonlItem, Cause>)> + Send>;

/// The rows of the file. Lines are read one by one; an array, or text in UTF-16, is read as a
/// whole.
fn rows(path: &Path) -> Result<Rows, DataError> {
    let failed = |error: std::io::Error| DataError::new(path, Cause::from_error(error));
    let mut start = Vec::new();
    File::open(path).and_then(|file| file.take(4096).read_to_end(&mut start)).map_err(failed)?;
    let is_utf16 = text::is_utf16(&start);
    let begin = if is_utf16 { read(path)? } else { String::from_utf8_lossy(&start).into_owned() };
    if begin.trim_start_matches('\u{feff}').trim_start().starts_with('[') {
        return array_rows(path);
    }
    if is_utf16 {
        let lines: Vec<std::io::Result<String>> =
            begin.lines().map(|line| Ok(line.to_owned())).collect();
        return Ok(line_rows(path, lines.into_iter()));
    }
    Ok(line_rows(path, BufReader::new(File::open(path).map_err(failed)?).lines()))
}

fn array_rows(path: &Path) -> Result<Rows, DataError> {
    let rows: Vec<Value> = json(path)?;
    let path = path.to_owned();
    let row = move |(number, value): (usize, Value)| {
        let row = serde_json::from_value(value).map_err(shortened);
        (RowLocation::new(&path, format!("row {number}")), row)
    };
    Ok(Box::new((1..).zip(rows).map(row)))
}

fn line_rows(
    path: &Path,
    lines: impl Iterator<Item = std::io::Result<String>> + Send + 'static,
) -> Rows {
    let path = path.to_owned();
    let non_empty = (1..)
        .zip(lines)
        .filter(|(_, line)| !line.as_ref().is_ok_and(|line| line.trim().is_empty()));
    Box::new(non_empty.map(move |(number, line)| {
        let row = line.map_err(shortened).and_then(|line| {
            let line = line.trim_start_matches('\u{feff}').trim();
            // This may be a line of an array that lost its brackets.
            let line = line.strip_suffix(',').unwrap_or(line);
            json_line(line)
        });
        (RowLocation::line(&path, number), row)
    }))
}

fn item(own: JsonlItem, location: &RowLocation, finder: &mut Finder) -> Result<Item, Cause> {
    let id = id(&own.id).ok_or("`id` is neither a text nor a number")?;
    let label = own.label.as_deref().map(|label| label.trim().to_lowercase());
    let (task, label_error) = match label.as_deref() {
        Some("harmful" | "unsafe") => (Task::Harmful, None),
        None | Some("harmless" | "safe") => (Task::Harmless, None),
        Some(other) => {
            let reason = format!("label `{}` is neither harmful nor harmless", cut(other));
            (Task::Harmless, Some(ItemError::UnknownKind(reason.into())))
        }
    };
    let has_both = own.description.is_some() && (own.image.is_some() || own.images.is_some());
    let both_error = has_both.then(|| {
        ItemError::Unreadable("it has both an image and a description; remove one of them".into())
    });
    let mut first_error = label_error.or(both_error);
    let mut pictures = |images: Vec<String>| {
        let pictures = images.into_iter().map(|image| finder.picture(&image));
        pictures
            .filter_map(|image| image.map_err(|error| first_error.get_or_insert(error)).ok())
            .collect()
    };
    let mut images: Vec<Picture> =
        pictures(own.image.into_iter().chain(own.images.unwrap_or_default()).collect());
    images.extend(own.description.map(Picture::Described));
    let earlier: Vec<(Role, String, Vec<Picture>)> = own
        .earlier
        .unwrap_or_default()
        .into_iter()
        .map(|turn| (turn.role, turn.text, pictures(turn.images.unwrap_or_default())))
        .collect();
    Ok(Item {
        cluster: id.clone(),
        id,
        scenario: own.scenario.unwrap_or_else(|| "all".into()),
        request: own.request.unwrap_or_else(|| own.query.clone()),
        query: own.query,
        images,
        earlier,
        draft: own.draft,
        prefill: own.prefill,
        task,
        error: first_error.map(|error| location.error(error)),
    })
}
