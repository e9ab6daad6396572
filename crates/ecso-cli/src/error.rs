//! Errors that decide the exit code.

use std::{fmt::Display, path::Path};

use ecso_batch::journal::JournalError;
use ecso_data::run::RunError;

/// The command can't be carried out as given: a wrong flag, setting, profile or input file.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct UsageError(pub(crate) String);

impl UsageError {
    /// The message of `error` and of all its causes.
    pub(crate) fn from_error(error: impl std::error::Error + 'static) -> Self {
        Self(ecso::error_chain(&error))
    }

    /// A problem with the file or folder at `path`.
    pub(crate) fn at(path: &Path, problem: impl Display) -> Self {
        Self(format!("{}: {problem}", path.display()))
    }
}

/// The user pressed Ctrl-C; the message says what is left of the work.
#[derive(Debug, thiserror::Error)]
#[error("interrupted; {0}")]
pub(crate) struct Interrupted(pub(crate) &'static str);

impl Interrupted {
    pub(crate) const RESUMABLE: Self =
        Self("recorded work is kept, run the same command again to resume");
}

/// The exit code for an error, as documented in `ecso --help`.
pub(crate) fn exit_code(error: &anyhow::Error) -> u8 {
    if error.is::<ecso::GuardError>() || error.is::<ecso::ModelError>() {
        3
    } else if error.is::<Interrupted>() {
        130
    } else if is_usage_error(error) {
        2
    } else {
        1
    }
}

fn is_usage_error(error: &anyhow::Error) -> bool {
    let journal = match error.downcast_ref() {
        Some(RunError::Journal(error)) => Some(error),
        _ => error.downcast_ref::<JournalError>(),
    };
    error.is::<UsageError>()
        || error.is::<ecso::ProfileError>()
        || error.is::<ecso::ImageError>()
        || journal.is_some_and(JournalError::is_misuse)
}
