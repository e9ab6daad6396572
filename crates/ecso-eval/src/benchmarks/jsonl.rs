//! Your own items: JSON lines of {id, image, query, label}.

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
    check::Check,
    files::{Finder, is_image, locate},
    place::Place,
    tables::{id, json, json_line, read},
};
use crate::{
    item::{Item, Picture, Task, Trouble},
    text::{self, cut, told},
};

/// Tells something of the data; once, however often that is read.
fn tell_once(told: String) {
    static TOLD: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let mut all = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
    if !all.contains(&told) {
        tracing::warn!("{told}");
        all.insert(told);
    }
}

pub(super) struct Jsonl;

/// An item as it is written.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct OwnItem {
    /// Text or a number.
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
    /// What a picture shows, in the picture's place: for models that read pictures as text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) description: Option<String>,
    #[serde(alias = "question")]
    pub(crate) query: String,
    /// Turns before the query.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) earlier: Option<Vec<EarlierTurn>>,
    /// The direct answer, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) draft: Option<String>,
    /// How the answer begins, where the client writes that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) begun: Option<String>,
    /// What the image and the query ask for together; the query, if missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) request: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) label: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) scenario: Option<String>,
    /// What else is there, and is not read.
    #[serde(flatten)]
    pub(crate) others: Map<String, Value>,
}

impl OwnItem {
    /// What looks like an image, or like another one, under a name that nobody reads.
    fn unread_image(&self) -> Option<&str> {
        let has_one = self.image.is_some() || self.images.is_some() || self.description.is_some();
        let looks = |name: &str, value: &Value| {
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
        let found = self.others.iter().find(|(name, value)| looks(name, value));
        found.map(|(name, _)| name.as_str())
    }
}

/// A turn before the query, as it is written.
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
            layout: "a .jsonl or .json file, or items.jsonl in a folder: {id, query or question, image?, images?, description?, earlier?: [{role, text, images?}], \
                draft?, begun?, request?, scenario?, label?}",
            variants: &[],
            scenarios: &[],
        }
    }

    fn items(&self, data: &Path, _: Option<&str>) -> Result<Items, DataError> {
        let path = locate(data, &["items.jsonl"])?;
        // What is wrong is told before the first item is run; then the file is read again, item by
        // item.
        let mut check = Check::default();
        let total = items(&path)?.map(|item| drop(check.item(item))).count();
        check.done(&path)?;
        let (mut labels, mut unread, mut first) = (0, 0, None);
        let (mut unlabelled, mut first_unlabelled) = (0, None);
        for (place, row) in rows(&path)? {
            match &row {
                Ok(OwnItem { label: Some(_), .. }) => labels += 1,
                Ok(_) => {
                    unlabelled += 1;
                    first_unlabelled.get_or_insert_with(|| place.row.clone());
                }
                Err(_) => {}
            }
            if let Some(name) = row.as_ref().ok().and_then(OwnItem::unread_image) {
                unread += 1;
                first.get_or_insert_with(|| format!("`{}` in {}", cut(name), place.row));
            }
        }
        if labels == 0 {
            tell_once(format!(
                "{}: no item has a `label`; all are taken as harmless",
                path.display()
            ));
        } else if let Some(first) = first_unlabelled {
            tell_once(format!(
                "{}: {unlabelled} of {} items have no `label`, and are taken as harmless; the first: {first}",
                path.display(),
                labels + unlabelled
            ));
        }
        if let Some(first) = first {
            tell_once(format!(
                "{}: {unread} items seem to have an image under a name that is not read; call it `image`, or add it to `images`; the first: \
                 {first}",
                path.display()
            ));
        }
        let mut check = Check::default();
        Ok(Items {
            total: Some(total),
            iter: Box::new(items(&path)?.map(move |item| check.item(item))),
        })
    }
}

fn items(path: &Path) -> Result<impl Iterator<Item = (Place, Item)> + Send + use<>, DataError> {
    let mut finder = Finder::new(path.parent().unwrap_or(Path::new("")));
    Ok(rows(path)?.map(move |(place, row)| {
        let item = row.and_then(|row| item(row, &place, &mut finder));
        place.settled("", None, item)
    }))
}

type Rows = Box<dyn Iterator<Item = (Place, Result<OwnItem, Cause>)> + Send>;

/// The rows: lines are read one by one; an array, and text in UTF-16, as a whole.
fn rows(path: &Path) -> Result<Rows, DataError> {
    let failed = |error: std::io::Error| DataError::new(path, Cause::from_error(error));
    let mut start = Vec::new();
    File::open(path).and_then(|file| file.take(4096).read_to_end(&mut start)).map_err(failed)?;
    let is_utf16 = text::is_utf16(&start);
    let begin = if is_utf16 { read(path)? } else { String::from_utf8_lossy(&start).into_owned() };
    if begin.trim_start_matches('\u{feff}').trim_start().starts_with('[') {
        return array(path);
    }
    if is_utf16 {
        let lines: Vec<std::io::Result<String>> =
            begin.lines().map(|line| Ok(line.to_owned())).collect();
        return Ok(lined(path, lines.into_iter()));
    }
    Ok(lined(path, BufReader::new(File::open(path).map_err(failed)?).lines()))
}

fn array(path: &Path) -> Result<Rows, DataError> {
    let rows: Vec<Value> = json(path)?;
    let path = path.to_owned();
    let row = move |(number, value): (usize, Value)| {
        let row = serde_json::from_value(value).map_err(told);
        (Place::new(&path, format!("row {number}")), row)
    };
    Ok(Box::new((1..).zip(rows).map(row)))
}

fn lined(
    path: &Path,
    lines: impl Iterator<Item = std::io::Result<String>> + Send + 'static,
) -> Rows {
    let path = path.to_owned();
    let filled = (1..)
        .zip(lines)
        .filter(|(_, line)| !line.as_ref().is_ok_and(|line| line.trim().is_empty()));
    Box::new(filled.map(move |(number, line)| {
        let row = line.map_err(told).and_then(|line| {
            let line = line.trim_start_matches('\u{feff}').trim();
            // A line of an array that lost its brackets.
            let line = line.strip_suffix(',').unwrap_or(line);
            json_line(line)
        });
        (Place::line(&path, number), row)
    }))
}

fn item(own: OwnItem, place: &Place, finder: &mut Finder) -> Result<Item, Cause> {
    let id = id(&own.id).ok_or("`id` is neither a text nor a number")?;
    let label = own.label.as_deref().map(|label| label.trim().to_lowercase());
    let (task, wrong) = match label.as_deref() {
        Some("harmful" | "unsafe") => (Task::Harmful, None),
        None | Some("harmless" | "safe") => (Task::Harmless, None),
        Some(other) => {
            let wrong = format!("label `{}` is neither harmful nor harmless", cut(other));
            (Task::Harmless, Some(Trouble::UnknownKind(wrong.into())))
        }
    };
    let is_double = own.description.is_some() && (own.image.is_some() || own.images.is_some());
    let double = is_double.then(|| {
        Trouble::Unreadable("it has an image and a description; one of them can stand".into())
    });
    let mut trouble = wrong.or(double);
    let mut pictures = |images: Vec<String>| {
        let found = images.into_iter().map(|image| finder.picture(&image));
        found.filter_map(|image| image.map_err(|error| trouble.get_or_insert(error)).ok()).collect()
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
        begun: own.begun,
        task,
        trouble: trouble.map(|trouble| place.trouble(trouble)),
    })
}
