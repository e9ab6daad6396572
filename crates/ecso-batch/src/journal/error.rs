//! Errors of journals.

use std::{
    io,
    path::{Path, PathBuf},
};

/// Errors of reading and writing journals.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// The file can't be read or written.
    #[error("{}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A line can't be parsed.
    #[error("{}: line {line} can't be parsed", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line number, from 1.
        line: usize,
        /// The cause.
        source: serde_json::Error,
    },
    /// Another process is writing the file.
    #[error(
        "{}: another process is writing this file; wait until it ends, or use another --out",
        path.display()
    )]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The path is a device, a pipe or a folder.
    #[error("{} is not a regular file; use another path", path.display())]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// The file has no lines, not even a header.
    #[error("{} is empty", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The file does not begin with a header of this kind.
    #[error("{} has no header, so it can't be resumed; use another --out", path.display())]
    NoHeader {
        /// The file.
        path: PathBuf,
    },
    /// An entry can't be serialized as JSON.
    #[error("an entry can't be serialized as JSON")]
    Entry(#[source] serde_json::Error),
    /// The work was started under other settings.
    #[error("{} was started with another {what}; use another --out, or delete it", path.display())]
    OtherSettings {
        /// The file.
        path: PathBuf,
        /// The setting that differs.
        what: &'static str,
    },
}

impl JournalError {
    /// Whether the user can fix the error by choosing another file or by waiting.
    #[must_use]
    pub fn is_misuse(&self) -> bool {
        match self {
            Self::Line { .. }
            | Self::InUse { .. }
            | Self::NotAFile { .. }
            | Self::Empty { .. }
            | Self::NoHeader { .. }
            | Self::OtherSettings { .. } => true,
            Self::File { .. } | Self::Entry(_) => false,
        }
    }
}

pub(super) fn file_error(path: &Path, source: io::Error) -> JournalError {
    JournalError::File { path: path.to_owned(), source }
}
