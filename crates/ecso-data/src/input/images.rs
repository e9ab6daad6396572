//! Reads the images of a record, from several kinds of columns and in several encodings.

use std::path::Path;

use ecso::{Cause, decode_base64, decode_data_url, is_data_url};

use super::{
    at,
    cell::{Cell, Fields},
    folder, mapping, marks,
    record::Reader,
    text::MAX_ROW,
    turns::IMAGE_FIELDS,
};
use crate::{
    regular,
    row::{ImageSource, shorten},
};

/// Maximum bytes of a URL.
const MAX_URL: usize = 16 << 10;

impl Reader {
    /// Takes the images of a row from the image column, and from numbered ones: `image_1`,
    /// `image_2`, …
    pub(super) fn images(&self, fields: &mut Fields) -> Result<Vec<ImageSource>, Cause> {
        let mut images = Vec::new();
        let candidates = self.mapping.columns("image", fields, |cell| !cell.is_empty());
        // An image may be in several columns, for instance as a path and as bytes, and also in a
        // column for rows with several images. The column with the most images is read.
        let by_count = candidates.iter().rev().max_by_key(|name| fields.get(*name).map(count));
        if let Some(name) = by_count {
            let read = self.readable_images(name, fields);
            let has_other = |other: &&String| {
                self.readable_images(other, fields).iter().any(|image| is_missing(image, &read))
            };
            if let Some(other) = candidates.iter().find(has_other) {
                return Err(self.ambiguous("image", name, other));
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
            images.extend(others.into_iter().filter(|image| !first.contains(image)));
        }
        Ok(images)
    }

    /// The images of a column, up to the first that can't be read.
    fn readable_images(&self, name: &str, fields: &Fields) -> Vec<ImageSource> {
        let mut images = Vec::new();
        if let Some(cell) = fields.get(name) {
            let _ = self.read_several(cell.clone(), &mut images);
        }
        images
    }

    fn take_images(
        &self,
        name: &str,
        fields: &mut Fields,
        images: &mut Vec<ImageSource>,
    ) -> Result<(), Cause> {
        let Some(cell) = fields.remove(name) else { return Ok(()) };
        self.read_several(cell, images).map_err(|cause| at(&self.column(name), cause))
    }

    /// Reads an image, a list of images, or images by mark, as in `MiniCPM`'s data:
    /// `{"<image_00>": path}`.
    fn read_several(&self, cell: Cell, images: &mut Vec<ImageSource>) -> Result<(), Cause> {
        match cell.parsed() {
            empty if empty.is_empty() => {}
            Cell::List(cells) if !is_bytes(&cells) => {
                for cell in cells {
                    self.read_several(cell, images)?;
                }
            }
            Cell::Fields(named) if named.keys().all(|name| marks::number(name).is_some()) => {
                let mut named: Vec<(String, Cell)> = named.into_iter().collect();
                named.sort_by_key(|(name, _)| marks::number(name));
                for (_, cell) in named {
                    self.read_several(cell, images)?;
                }
            }
            cell => images.push(self.read_one(&cell, true)?),
        }
        Ok(())
    }

    /// Reads an image: bytes, `{bytes, path}`, or a text that is a path, a URL, a data URL or
    /// base64. Paths are an error unless `allows_paths`.
    fn read_one(&self, cell: &Cell, allows_paths: bool) -> Result<ImageSource, Cause> {
        match cell {
            Cell::Bytes(bytes) => Ok(ImageSource::Bytes(bytes.clone())),
            Cell::Text(text) if !cell.is_python() => self.read_text_image(text, allows_paths),
            Cell::List(list) if is_bytes(list) => {
                Ok(ImageSource::Bytes(list.iter().filter_map(byte).collect::<Vec<u8>>().into()))
            }
            Cell::Fields(fields) => {
                let mut names = ["bytes"].into_iter().chain(IMAGE_FIELDS);
                match names.find_map(|name| Some((name, cell.get(name)?))) {
                    Some(("bytes" | "base64" | "data", Cell::Text(text))) if !is_data_url(text) => {
                        base64(text)
                    }
                    Some((_, inner)) => self.read_one(inner, allows_paths),
                    None => {
                        let names: Vec<&str> = fields.keys().map(String::as_str).collect();
                        let names = names.join(", ");
                        let names = shorten(&names);
                        Err(format!("an image has no bytes, url or path, but {names}").into())
                    }
                }
            }
            other => Err(format!(
                "an image must be a path, a URL, a data URL, base64, bytes or {{bytes, path}}, \
                 not {}",
                other.kind()
            )
            .into()),
        }
    }

    /// Reads an image in a text or a conversation.
    pub(super) fn image_in_text(&self, cell: &Cell) -> Result<ImageSource, Cause> {
        self.read_one(cell, !self.forbids_paths_in_text)
    }

    fn read_text_image(&self, text: &str, allows_paths: bool) -> Result<ImageSource, Cause> {
        let trimmed = text.trim();
        if trimmed.is_empty() {
            return Err("the text of an image is empty".into());
        }
        let starts = |scheme: &str| {
            trimmed.get(..scheme.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(scheme))
        };
        if starts("http://") || starts("https://") {
            if trimmed.len() > MAX_URL {
                return Err(format!("a URL is too long: {}", shorten(trimmed)).into());
            }
            return Ok(ImageSource::Url(trimmed.to_owned()));
        }
        if is_data_url(trimmed) {
            let bytes = decode_data_url(trimmed, MAX_ROW).map_err(Cause::from_error)?;
            return Ok(ImageSource::Bytes(bytes.into()));
        }
        if is_base64(trimmed) {
            return base64(trimmed);
        }
        if !allows_paths {
            return Err(
                "a text or a conversation names a file, which only columns of images may".into()
            );
        }
        self.paths.find(trimmed).map(ImageSource::File)
    }

    /// Checks that a row without images has none in an unknown column: it would be read as text
    /// only.
    pub(super) fn check_no_image_is_left(&self, fields: &Fields) -> Result<(), Cause> {
        // If the user named the image column, rows may have none.
        if self.mapping.named("image").is_some() {
            return Ok(());
        }
        if let Some(path) = fields.iter().find_map(|(name, cell)| find_image(name, cell)) {
            return Err(format!(
                "{} has an image or the name of one; pass --map image={} if it is the row's image, \
                 or --map image= if the rows have no image",
                self.column(&path),
                shorten(&path)
            )
            .into());
        }
        let has_image_column = fields.keys().any(|name| mapping::has_common_image_name(name));
        let is_about_image = |(name, cell): &(&String, &Cell)| {
            !has_image_column && mapping::is_about_image(name) && is_truthy(cell)
        };
        match fields.iter().find(is_about_image) {
            Some((name, _)) => Err(format!(
                "{} seems to be about an image; pass --map image=COLUMN for the column with the \
                 image, or --map image= if the rows have no image",
                self.column(name)
            )
            .into()),
            None => Ok(()),
        }
    }

    /// Checks that a row with images has no other image in an unknown column: it would be ignored.
    pub(super) fn check_no_other_image(&self, fields: &Fields) -> Result<(), Cause> {
        if self.mapping.named("image").is_some() {
            return Ok(());
        }
        let other = fields.iter().find_map(|(name, cell)| {
            let is_unknown = mapping::is_about_image(name) && !mapping::has_common_image_name(name);
            is_unknown.then(|| find_image(name, cell)).flatten()
        });
        match other {
            None => Ok(()),
            Some(other) => Err(format!(
                "{} has another image; rename such columns to image_1, image_2, …, or select one \
                 with --map image=COLUMN",
                self.column(&other)
            )
            .into()),
        }
    }
}

/// Whether an image differs from all others of the same kind of source, if there are any. Paths are
/// compared by file name and contents.
fn is_missing(image: &ImageSource, others: &[ImageSource]) -> bool {
    let is_same = |other: &ImageSource| match (image, other) {
        (ImageSource::File(image), ImageSource::File(other)) => {
            Some(image == other || is_same_file(image, other))
        }
        (ImageSource::Url(image), ImageSource::Url(other)) => Some(image == other),
        (ImageSource::Bytes(image), ImageSource::Bytes(other)) => Some(image == other),
        _ => None,
    };
    let comparisons: Vec<bool> = others.iter().filter_map(is_same).collect();
    !comparisons.is_empty() && !comparisons.contains(&true)
}

/// Whether two paths have the same file name and, if both files exist, the same contents.
fn is_same_file(path: &Path, other: &Path) -> bool {
    let digest = |path: &Path| {
        let mut hash = blake3::Hasher::new();
        regular::open(path)
            .ok()
            .and_then(|file| hash.update_reader(file).ok().map(|hash| hash.finalize()))
    };
    path.file_name() == other.file_name()
        && digest(path).zip(digest(other)).is_none_or(|(digest, other)| digest == other)
}

/// The number of images in a cell.
fn count(cell: &Cell) -> usize {
    match cell {
        Cell::List(list) if !is_bytes(list) => list.len(),
        Cell::Text(text) if text.starts_with('[') => match cell.clone().parsed() {
            Cell::Text(_) => 1,
            parsed => count(&parsed),
        },
        _ => 1,
    }
}

/// Finds an image in a column or nested in it, and returns its path.
fn find_image(path: &str, cell: &Cell) -> Option<String> {
    let is_image = match cell {
        Cell::Text(text) if text.starts_with(['[', '{']) => match cell.clone().parsed() {
            Cell::Text(_) => false,
            parsed => return find_image(path, &parsed),
        },
        Cell::Text(text) => is_image_text(text.trim()),
        Cell::List(list) if !is_bytes(list) => {
            list.iter().any(|cell| find_image(path, cell).is_some())
        }
        Cell::Fields(fields) => {
            let mut inner = IMAGE_FIELDS.iter().filter_map(|name| Some((name, fields.get(*name)?)));
            match inner.find(|(_, cell)| find_image(path, cell).is_some()) {
                // `{bytes, path}` is the image itself; other objects are records with an image.
                Some((name @ (&"image" | &"image_url"), _)) => {
                    return Some(format!("{path}.{name}"));
                }
                Some(_) => true,
                None => holds_image(cell),
            }
        }
        cell => holds_image(cell),
    };
    is_image.then(|| path.to_owned())
}

/// Whether the bytes of an image are in a cell, at any depth and under any name.
fn holds_image(cell: &Cell) -> bool {
    match cell {
        Cell::Bytes(bytes) => begins_like_image(bytes),
        Cell::Text(text) => is_encoded_image(text.trim()),
        Cell::List(list) if is_bytes(list) => {
            begins_like_image(&list.iter().take(16).filter_map(byte).collect::<Vec<u8>>())
        }
        Cell::List(list) => list.iter().any(holds_image),
        Cell::Fields(fields) => fields.values().any(holds_image),
        _ => false,
    }
}

fn begins_like_image(bytes: &[u8]) -> bool {
    let is_bitmap = bytes.starts_with(b"BM") && bytes.get(6..10) == Some(&[0; 4]);
    // AVIF and HEIC.
    let is_container = bytes.get(4..8) == Some(b"ftyp");
    is_bitmap || is_container || SIGNATURES.iter().any(|(begin, _)| bytes.starts_with(begin))
}

/// Whether a text is an image, or a path or URL with the extension of an image.
fn is_image_text(text: &str) -> bool {
    let name = text.split(['?', '#']).next().unwrap_or_default();
    is_encoded_image(text)
        || (text.len() < MAX_URL
            && !text.contains(char::is_whitespace)
            && folder::is_image(name.as_ref()))
}

/// Whether a text is a data URL of an image, or an image in base64.
fn is_encoded_image(text: &str) -> bool {
    const DATA: &str = "data:image/";
    text.get(..DATA.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(DATA))
        || (SIGNATURES.iter().any(|(_, begin)| text.starts_with(begin)) && is_base64(text))
}

/// Whether a cell is not empty, false or zero.
fn is_truthy(cell: &Cell) -> bool {
    match cell {
        Cell::Bool(_) => false,
        Cell::Number(number) => number.as_f64().is_some_and(|number| number > 0.0),
        cell => !cell.is_empty(),
    }
}

/// The first bytes of images, and the same in base64.
const SIGNATURES: [(&[u8], &str); 7] = [
    (b"\x89PNG", "iVBORw0KGgo"),
    (b"\xff\xd8\xff", "/9j/"),
    (b"GIF8", "R0lGOD"),
    (b"RIFF", "UklGR"),
    (b"II*\0", "SUkqA"),
    (b"MM\0*", "TU0AK"),
    (b"%PDF-", "JVBERi0"),
];

/// Whether a text is base64 rather than a path: it has only base64 characters, and is long or
/// starts like an image.
fn is_base64(text: &str) -> bool {
    const MIN_WITH_SIGNATURE: usize = 40;
    const MIN_WITHOUT: usize = 300;
    let has_signature = SIGNATURES.iter().any(|(_, start)| text.starts_with(start));
    let is_base64 = |byte: u8| {
        byte.is_ascii_alphanumeric()
            || matches!(byte, b'+' | b'/' | b'=' | b'-' | b'_' | b'\r' | b'\n')
    };
    let min = if has_signature { MIN_WITH_SIGNATURE } else { MIN_WITHOUT };
    text.len() >= min && text.bytes().all(is_base64)
}

/// Whether a list of numbers is bytes, as in JSON.
fn is_bytes(list: &[Cell]) -> bool {
    !list.is_empty() && list.iter().all(|cell| byte(cell).is_some())
}

fn byte(cell: &Cell) -> Option<u8> {
    let Cell::Number(number) = cell else { return None };
    number.as_u64().and_then(|number| u8::try_from(number).ok())
}

fn base64(text: &str) -> Result<ImageSource, Cause> {
    let bytes = decode_base64(text, MAX_ROW).map_err(Cause::from_error)?;
    Ok(ImageSource::Bytes(bytes.into()))
}
