//! Files that the settings name.

use std::{io::Read, path::Path};

use crate::{error::UsageError, settings::Settings};

/// Checks that the model's files are GGUF files, by their first bytes.
pub(super) fn check_gguf(settings: &Settings) -> Result<(), UsageError> {
    let weights = Some(Path::new(&settings.model)).filter(|_| is_file(&settings.model));
    for path in weights.into_iter().chain(non_empty(&settings.mmproj)) {
        let mut magic = Vec::new();
        let read = std::fs::File::open(path).and_then(|file| file.take(4).read_to_end(&mut magic));
        read.map_err(|error| UsageError::at(path, error))?;
        if magic != b"GGUF" {
            return Err(UsageError::at(path, "this is not a GGUF file"));
        }
    }
    Ok(())
}

/// Whether the name of a model is a file's.
pub(super) fn is_file(name: &str) -> bool {
    let path = Path::new(name);
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
        || path.components().count() > 1
}

/// A path setting; none if it is empty.
pub(super) fn non_empty(path: &Path) -> Option<&Path> {
    Some(path).filter(|path| !path.as_os_str().is_empty())
}
