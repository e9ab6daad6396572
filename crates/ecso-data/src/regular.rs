//! Files that end. Rows come from strangers: what they name may be a pipe that nobody writes or a
//! device without an end.

use std::{
    fs::File,
    io::{self, Read, Take},
    path::Path,
};

/// Opens a regular file, to be read no further than it is long. What has no length, as the files
/// that a system makes of itself, is empty.
pub(crate) fn open(path: &Path) -> io::Result<Take<File>> {
    let about = path.metadata()?;
    if about.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    if !about.is_file() {
        return Err(io::Error::other(
            "it is no regular file, but a pipe or a device; those are not opened",
        ));
    }
    Ok(File::open(path)?.take(about.len()))
}

/// The bytes of a regular file; one more than `most` where there are more.
pub(crate) fn read(path: &Path, most: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let most = u64::try_from(most).unwrap_or(u64::MAX).saturating_add(1);
    open(path)?.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_end_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        for path in [&pipe, Path::new("/dev/zero")] {
            assert!(
                read(path, 9).unwrap_err().to_string().contains("no regular file"),
                "{}",
                path.display()
            );
        }
        assert!(read(Path::new("/proc/self/pagemap"), 9).unwrap().is_empty());
        let file = folder.path().join("file");
        std::fs::write(&file, "bread").unwrap();
        assert_eq!(
            (read(&file, 9).unwrap(), read(&file, 2).unwrap()),
            (b"bread".to_vec(), b"bre".to_vec())
        );
    }
}
