//! Regular files. Rows come from strangers, and may name a pipe that blocks or an endless device.

use std::{
    fs::File,
    io::{self, Read, Take},
    path::Path,
};

/// Opens a regular file for reading up to its length. Files without a length, such as those in
/// `/proc`, are empty.
pub(crate) fn open(path: &Path) -> io::Result<Take<File>> {
    let metadata = path.metadata()?;
    if metadata.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    if !metadata.is_file() {
        return Err(io::Error::other("this is not a regular file but a pipe or a device"));
    }
    Ok(File::open(path)?.take(metadata.len()))
}

/// Reads a regular file. For a file longer than `limit`, it returns `limit + 1` bytes.
pub(crate) fn read(path: &Path, limit: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let limit = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
    open(path)?.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn endless_files_are_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        for path in [&pipe, Path::new("/dev/zero")] {
            assert!(
                read(path, 9).unwrap_err().to_string().contains("not a regular file"),
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
