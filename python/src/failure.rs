//! Failures, and the exceptions of `ecso.errors` that they become.

use std::time::Duration;

use ecso::{GuardError, ImageError, ModelError, error_chain};
use ecso_data::answers::{AnswersError, ErrorKind};
use pyo3::{prelude::*, types::PyDict};

/// A failure that has not been raised in Python yet.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    exception: &'static str,
    message: String,
    retry_after: Option<Duration>,
}

impl Failure {
    fn new(exception: &'static str, message: impl Into<String>) -> Self {
        Self { exception, message: message.into(), retry_after: None }
    }

    pub(crate) fn settings(message: impl Into<String>) -> Self {
        Self::new("SettingsError", message)
    }

    /// An error of this package.
    pub(crate) fn internal(cause: &str) -> Self {
        Self::new("EcsoError", format!("internal error, please report it: {cause}"))
    }

    pub(crate) fn input(message: impl Into<String>) -> Self {
        Self::new("InputError", message)
    }

    pub(crate) fn image(message: impl Into<String>) -> Self {
        Self::new("ImageError", message)
    }

    /// This failure, with the number of the image if there are several.
    pub(crate) fn in_image(mut self, number: usize, count: usize) -> Self {
        if count > 1 {
            self.message.insert_str(0, &format!("image {number} of {count}: "));
        }
        self
    }

    fn from_kind(kind: ErrorKind, message: String, source: Option<&ModelError>) -> Self {
        let retry_after = match source {
            Some(ModelError::Overloaded { retry_after }) => *retry_after,
            _ => None,
        };
        let exception = match kind {
            ErrorKind::Input => "InputError",
            ErrorKind::Image => "ImageError",
            ErrorKind::Rejected => "Rejected",
            ErrorKind::Filtered => "Filtered",
            ErrorKind::RateLimited => "RateLimited",
            ErrorKind::Timeout => "Timeout",
            ErrorKind::Unreachable => "Unreachable",
            ErrorKind::NoVerdict => "NoVerdict",
            _ => "BadReply",
        };
        Self { exception, message, retry_after }
    }

    /// The exception to raise.
    pub(crate) fn into_exception(self, py: Python<'_>) -> PyErr {
        let exception = || {
            let fields = PyDict::new(py);
            if let Some(wait) = self.retry_after {
                fields.set_item("retry_after", wait.as_secs_f64())?;
            }
            py.import("ecso.errors")?.getattr(self.exception)?.call((self.message,), Some(&fields))
        };
        exception().map_or_else(|error| error, PyErr::from_value)
    }
}

impl From<ImageError> for Failure {
    fn from(error: ImageError) -> Self {
        Self::image(error_chain(&error))
    }
}

impl From<GuardError> for Failure {
    fn from(error: GuardError) -> Self {
        let source = match &error {
            GuardError::Model { source, .. } => Some(source),
            _ => None,
        };
        Self::from_kind(ErrorKind::from_guard(&error), error_chain(&error), source)
    }
}

impl From<AnswersError> for Failure {
    fn from(error: AnswersError) -> Self {
        let exception = match &error {
            AnswersError::Columns(_) => "InputError",
            AnswersError::NameConflict(_) => "SettingsError",
            AnswersError::TooManyFailures { .. } => "TooManyFailures",
            AnswersError::Journal(error) if error.is_misuse() => "SettingsError",
            _ => "EcsoError",
        };
        Self::new(exception, error_chain(&error))
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        let message = error_chain(error.as_ref());
        match error.downcast_ref::<ModelError>() {
            Some(source) => Self::from_kind(ErrorKind::from_model(source), message, Some(source)),
            None if ecso_cli::library::is_usage_error(&error) => Self::settings(message),
            None => Self::new("ModelError", message),
        }
    }
}
