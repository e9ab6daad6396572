//! A folder of images; the query of `a.png` stands in `a.txt`, or is the same for all.

use std::path::{Path, PathBuf};

use super::{InputError, RowError, Rows};
use crate::row::{Picture, Row};

pub(super) fn rows(folder: &Path, query: Option<String>) -> Result<Rows, InputError> {
    let mut files = Vec::new();
    collect(folder, &mut files)?;
    files.sort();
    if files.is_empty() {
        return Err(InputError::new(folder, "no image (.jpg, .jpeg, .png, .webp, .gif) and no metadata.jsonl in it"));
    }
    let folder = folder.to_owned();
    Ok(Box::new((0..).zip(files).map(move |(number, path)| {
        let text = path.with_extension("txt");
        let asked = match (std::fs::read_to_string(&text), &query) {
            (Ok(asked), _) => asked.trim().to_owned(),
            (Err(_), Some(query)) => query.clone(),
            (Err(error), None) => {
                let reason =
                    format!("{}: {error}; write the query there, or give one for all with --query", text.display());
                return Err(RowError { number, reason });
            }
        };
        let below = path.strip_prefix(&folder).unwrap_or(&path);
        let category = below.parent().map(|parent| parent.display().to_string()).unwrap_or_default();
        Ok(Row {
            number,
            id: below.display().to_string(),
            before: Vec::new(),
            query: asked,
            images: vec![Picture::File(path)],
            category,
            draft: None,
        })
    })))
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), InputError> {
    let entries = std::fs::read_dir(folder).map_err(|error| InputError::new(folder, error))?;
    for entry in entries {
        let entry = entry.map_err(|error| InputError::new(folder, error))?;
        let kind = entry.file_type().map_err(|error| InputError::new(folder, error))?;
        let path = entry.path();
        // Links are not followed: they could lead round in circles.
        if kind.is_dir() {
            collect(&path, files)?;
        } else if kind.is_file() && is_image(&path) {
            files.push(path);
        }
    }
    Ok(())
}

fn is_image(path: &Path) -> bool {
    let ending = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    matches!(ending.as_str(), "jpg" | "jpeg" | "png" | "webp" | "gif")
}
