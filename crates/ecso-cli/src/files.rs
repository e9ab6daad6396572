//! Files that are replaced in one step, so that readers see the old text or the new one.

use std::{
    io::{self, BufWriter, Write},
    path::Path,
};

use tempfile::NamedTempFile;

/// Creates a temporary file that can be moved to `path`.
pub(crate) fn create_for(path: &Path) -> io::Result<BufWriter<NamedTempFile>> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let mut builder = tempfile::Builder::new();
    // Like any new file, unlike temporary ones: other users may read it if the umask lets them.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(folder.unwrap_or(Path::new("."))).map(BufWriter::new)
}

/// Moves a finished file to `path`.
pub(crate) fn persist(file: BufWriter<NamedTempFile>, path: &Path) -> io::Result<()> {
    file.into_inner().map_err(io::IntoInnerError::into_error)?.persist(path)?;
    Ok(())
}

/// Writes a text file in one step.
pub(crate) fn write(path: &Path, text: &str) -> io::Result<()> {
    let mut file = create_for(path)?;
    file.write_all(text.as_bytes())?;
    persist(file, path)
}
