//! The images of a record: where they stand, and in what form.

use std::path::Path;

use ecso::{Cause, decode_base64, decode_data_url, is_data_url};

use super::{
    at,
    cell::{Cell, Fields},
    folder, mapping, marks,
    record::Reader,
    text::LONGEST,
    turns::IMAGES,
};
use crate::{
    regular,
    row::{Picture, cut},
};

/// Characters of a URL.
const LONGEST_URL: usize = 16 << 10;

impl Reader {
    /// The images of a row that stand in a column of their own, or in several: `image_1`,
    /// `image_2`, …
    pub(super) fn images(&self, fields: &mut Fields) -> Result<Vec<Picture>, Cause> {
        let mut images = Vec::new();
        let usual = self.mapping.columns("image", fields, |cell| !cell.is_empty());
        // One image may stand in several columns, as a path and as bytes; a column of more may be
        // there for rows that have more.
        if let Some(name) = usual.iter().rev().max_by_key(|name| fields.get(*name).map(several)) {
            let found = self.found(name, fields);
            if let Some(other) = usual
                .iter()
                .find(|other| self.found(other, fields).iter().any(|one| is_missing(one, &found)))
            {
                return Err(self.either("image", name, other));
            }
            self.take_images(name, fields, &mut images)?;
        }
        if self.mapping.named("image").is_none() {
            let mut numbered: Vec<String> = fields
                .keys()
                .filter(|name| mapping::numbered_image(name).is_some())
                .cloned()
                .collect();
            numbered.sort_by_key(|name| mapping::numbered_image(name));
            let (first, mut others) = (images.clone(), Vec::new());
            for name in numbered {
                self.take_images(&name, fields, &mut others)?;
            }
            images.extend(others.into_iter().filter(|picture| !first.contains(picture)));
        }
        Ok(images)
    }

    /// The images of a column, as far as they can be read.
    fn found(&self, name: &str, fields: &Fields) -> Vec<Picture> {
        let mut images = Vec::new();
        if let Some(cell) = fields.get(name) {
            let _ = self.several(cell.clone(), &mut images);
        }
        images
    }

    fn take_images(
        &self,
        name: &str,
        fields: &mut Fields,
        images: &mut Vec<Picture>,
    ) -> Result<(), Cause> {
        let Some(cell) = fields.remove(name) else { return Ok(()) };
        self.several(cell, images).map_err(|cause| at(&self.column(name), cause))
    }

    /// An image, or a list of images, or images by their marks, as `MiniCPM` has them:
    /// `{"<image_00>": path}`.
    fn several(&self, cell: Cell, images: &mut Vec<Picture>) -> Result<(), Cause> {
        match cell.opened() {
            empty if empty.is_empty() => {}
            Cell::List(several) if !is_bytes(&several) => {
                for one in several {
                    self.several(one, images)?;
                }
            }
            Cell::Fields(named) if named.keys().all(|name| marks::number(name).is_some()) => {
                let mut named: Vec<(String, Cell)> = named.into_iter().collect();
                named.sort_by_key(|(name, _)| marks::number(name));
                for (_, one) in named {
                    self.several(one, images)?;
                }
            }
            one => images.push(self.one(&one)?),
        }
        Ok(())
    }

    /// An image: bytes, `{bytes, path}`, or a text that is a path, a URL, a data URL or base64.
    pub(super) fn one(&self, cell: &Cell) -> Result<Picture, Cause> {
        self.one_of(cell, true)
    }

    /// The same; a text that is a path is an error where none may be.
    fn one_of(&self, cell: &Cell, paths: bool) -> Result<Picture, Cause> {
        match cell {
            Cell::Bytes(bytes) => Ok(Picture::Bytes(bytes.clone())),
            Cell::Text(text) if !cell.is_python() => self.picture(text, paths),
            Cell::List(list) if is_bytes(list) => {
                Ok(Picture::Bytes(list.iter().filter_map(byte).collect::<Vec<u8>>().into()))
            }
            Cell::Fields(fields) => {
                let held = ["bytes"].into_iter().chain(IMAGES).find_map(|name| cell.get(name).map(|held| (name, held)));
                match held {
                    Some(("bytes" | "base64" | "data", Cell::Text(text))) if !is_data_url(text) => base64(text),
                    Some((_, held)) => self.one_of(held, paths),
                    None => {
                        let names: Vec<&str> = fields.keys().map(String::as_str).collect();
                        Err(format!("an image has neither bytes, url nor path, but {}", cut(&names.join(", "))).into())
                    }
                }
            }
            other => Err(format!(
                "an image must be a path, a URL, a data URL, base64, bytes or {{bytes, path}}, and this is {}",
                other.kind()
            )
            .into()),
        }
    }

    /// An image that a text or a conversation names.
    pub(super) fn told(&self, cell: &Cell) -> Result<Picture, Cause> {
        self.one_of(cell, !self.is_careful)
    }

    fn picture(&self, text: &str, paths: bool) -> Result<Picture, Cause> {
        let trimmed = text.trim();
        if trimmed.is_empty() {
            return Err("an image is an empty text".into());
        }
        let starts = |scheme: &str| {
            trimmed.get(..scheme.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(scheme))
        };
        if starts("http://") || starts("https://") {
            if trimmed.len() > LONGEST_URL {
                return Err(format!("a URL is too long: {}", cut(trimmed)).into());
            }
            return Ok(Picture::Url(trimmed.to_owned()));
        }
        if is_data_url(trimmed) {
            let bytes = decode_data_url(trimmed, LONGEST).map_err(Cause::from_error)?;
            return Ok(Picture::Bytes(bytes.into()));
        }
        if is_base64(trimmed) {
            return base64(trimmed);
        }
        if !paths {
            return Err(
                "a text or a conversation names a file; here only columns of images may".into()
            );
        }
        self.paths.find(trimmed).map(Picture::File)
    }

    /// A row without images whose record has one in a column that nobody named would be read as
    /// mere text.
    pub(super) fn no_image_is_left(&self, fields: &Fields) -> Result<(), Cause> {
        // Whoever says where images are says as well which rows have none.
        if self.mapping.named("image").is_some() {
            return Ok(());
        }
        if let Some(path) = fields.iter().find_map(|(name, cell)| image_in(name, cell)) {
            return Err(format!(
                "{} holds an image, or the name of one, but nothing says that it is the row's: --map image={}; if it isn't, --map image=",
                self.column(&path),
                cut(&path)
            )
            .into());
        }
        let says_none = fields.keys().any(|name| mapping::is_usual_image(name));
        match fields.iter().find(|(name, cell)| !says_none && mapping::is_about_image(name) && says_something(cell)) {
            Some((name, _)) => Err(format!(
                "{} is about an image, and no column is known to hold one: --map image=COLUMN; if there is none, --map image=",
                self.column(name)
            )
            .into()),
            None => Ok(()),
        }
    }
}

impl Reader {
    /// A row that has images, and one more in a column that is about an image, would lose that one.
    pub(super) fn no_other_image(&self, fields: &Fields) -> Result<(), Cause> {
        if self.mapping.named("image").is_some() {
            return Ok(());
        }
        let other = fields.iter().find_map(|(name, cell)| {
            let is_one = mapping::is_about_image(name) && !mapping::is_usual_image(name);
            is_one.then(|| image_in(name, cell)).flatten()
        });
        match other {
            None => Ok(()),
            Some(other) => Err(format!(
                "{} holds an image too, and nothing says that it is the row's: call such columns image_1, image_2, …, or name the one that counts by \
                 --map image=COLUMN",
                self.column(&other)
            )
            .into()),
        }
    }
}

/// Whether an image is another than all of these that are given as it is: by a path, of which the
/// last part counts, by a URL, or whole.
fn is_missing(one: &Picture, others: &[Picture]) -> bool {
    let is_same = |other: &Picture| match (one, other) {
        (Picture::File(one), Picture::File(other)) => {
            Some(one == other || is_same_file(one, other))
        }
        (Picture::Url(one), Picture::Url(other)) => Some(one == other),
        (Picture::Bytes(one), Picture::Bytes(other)) => Some(one == other),
        _ => None,
    };
    let told: Vec<bool> = others.iter().filter_map(is_same).collect();
    !told.is_empty() && !told.contains(&true)
}

/// Whether two paths are of one name and, where both are there, of one content.
fn is_same_file(one: &Path, other: &Path) -> bool {
    let digest = |path: &Path| {
        let mut hash = blake3::Hasher::new();
        regular::open(path)
            .ok()
            .and_then(|file| hash.update_reader(file).ok().map(|hash| hash.finalize()))
    };
    one.file_name() == other.file_name()
        && digest(one).zip(digest(other)).is_none_or(|(one, other)| one == other)
}

/// How many images a cell holds.
fn several(cell: &Cell) -> usize {
    match cell {
        Cell::List(list) if !is_bytes(list) => list.len(),
        Cell::Text(text) if text.starts_with('[') => match cell.clone().opened() {
            Cell::Text(_) => 1,
            opened => several(&opened),
        },
        _ => 1,
    }
}

/// Where an image stands in a column: in itself, or inside of it.
fn image_in(path: &str, cell: &Cell) -> Option<String> {
    let is_one = match cell {
        Cell::Bytes(bytes) => BEGINNINGS.iter().any(|(begin, _)| bytes.starts_with(begin)),
        Cell::Text(text) if text.starts_with(['[', '{']) => match cell.clone().opened() {
            Cell::Text(_) => false,
            opened => return image_in(path, &opened),
        },
        Cell::Text(text) => is_image(text.trim()),
        Cell::List(list) if is_bytes(list) => {
            let begin: Vec<u8> = list.iter().take(8).filter_map(byte).collect();
            BEGINNINGS.iter().any(|(begins, _)| begin.starts_with(begins))
        }
        Cell::List(list) => list.iter().any(|cell| image_in(path, cell).is_some()),
        Cell::Fields(fields) => {
            let mut held = IMAGES.iter().filter_map(|name| Some((name, fields.get(*name)?)));
            let (name, _) = held.find(|(_, cell)| image_in(path, cell).is_some())?;
            // What stands in bytes or under a path is the image; else it is some record's.
            return Some(if matches!(*name, "image" | "image_url") {
                format!("{path}.{name}")
            } else {
                path.to_owned()
            });
        }
        _ => false,
    };
    is_one.then(|| path.to_owned())
}

/// Whether a text is an image, or a path or URL that ends as those of images do.
fn is_image(text: &str) -> bool {
    let begins =
        |begin: &str| text.get(..begin.len()).is_some_and(|text| text.eq_ignore_ascii_case(begin));
    let encoded = || BEGINNINGS.iter().any(|(_, begin)| text.starts_with(begin)) && is_base64(text);
    let name = text.split(['?', '#']).next().unwrap_or_default();
    begins("data:image/")
        || encoded()
        || (text.len() < LONGEST_URL
            && !text.contains(char::is_whitespace)
            && folder::is_image(name.as_ref()))
}

/// Whether a cell holds more than a no.
fn says_something(cell: &Cell) -> bool {
    match cell {
        Cell::Bool(_) => false,
        Cell::Number(number) => number.as_f64().is_some_and(|number| number > 0.0),
        cell => !cell.is_empty(),
    }
}

/// How images begin, and how they do in base64.
const BEGINNINGS: [(&[u8], &str); 4] = [
    (b"\x89PNG", "iVBORw0KGgo"),
    (b"\xff\xd8\xff", "/9j/"),
    (b"GIF8", "R0lGOD"),
    (b"RIFF", "UklGR"),
];

/// Whether a text is base64 and no path: it is long and has nothing else, or begins as an image
/// does.
fn is_base64(text: &str) -> bool {
    const SHORT: usize = 40;
    const LONG: usize = 300;
    let begins = BEGINNINGS.iter().any(|(_, begin)| text.starts_with(begin));
    let is_it = |byte: u8| {
        byte.is_ascii_alphanumeric()
            || matches!(byte, b'+' | b'/' | b'=' | b'-' | b'_' | b'\r' | b'\n')
    };
    (text.len() >= LONG || (begins && text.len() >= SHORT)) && text.bytes().all(is_it)
}

/// Bytes as a list of numbers: how JSON shows them.
fn is_bytes(list: &[Cell]) -> bool {
    !list.is_empty() && list.iter().all(|cell| byte(cell).is_some())
}

fn byte(cell: &Cell) -> Option<u8> {
    let Cell::Number(number) = cell else { return None };
    number.as_u64().and_then(|number| u8::try_from(number).ok())
}

fn base64(text: &str) -> Result<Picture, Cause> {
    let bytes = decode_base64(text, LONGEST).map_err(Cause::from_error)?;
    Ok(Picture::Bytes(bytes.into()))
}
