//! What goes wrong, and which exception of `ecso.errors` it is.

use std::time::Duration;

use ecso::{GuardError, ImageError, ModelError, error_chain};
use ecso_data::answers::{AnswersError, Kind};
use pyo3::{prelude::*, types::PyDict};

/// A failure, before there is a Python to raise it in.
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

    pub(crate) fn input(message: impl Into<String>) -> Self {
        Self::new("InputError", message)
    }

    pub(crate) fn image(message: impl Into<String>) -> Self {
        Self::new("ImageError", message)
    }

    fn of_kind(kind: Kind, message: String, source: Option<&ModelError>) -> Self {
        let retry_after = match source {
            Some(ModelError::Overloaded { retry_after }) => *retry_after,
            _ => None,
        };
        let exception = match kind {
            Kind::Input => "InputError",
            Kind::Image => "ImageError",
            Kind::Rejected => "Rejected",
            Kind::Filtered => "Filtered",
            Kind::RateLimited => "RateLimited",
            Kind::Timeout => "Timeout",
            Kind::Unreachable => "Unreachable",
            Kind::NoVerdict => "NoVerdict",
            _ => "BadReply",
        };
        Self { exception, message, retry_after }
    }

    /// The exception.
    pub(crate) fn raised(self, py: Python<'_>) -> PyErr {
        let raised = || {
            let fields = PyDict::new(py);
            if let Some(wait) = self.retry_after {
                fields.set_item("retry_after", wait.as_secs_f64())?;
            }
            py.import("ecso.errors")?.getattr(self.exception)?.call((self.message,), Some(&fields))
        };
        raised().map_or_else(|error| error, PyErr::from_value)
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
        Self::of_kind(Kind::of(&error), error_chain(&error), source)
    }
}

impl From<AnswersError> for Failure {
    fn from(error: AnswersError) -> Self {
        let exception = match &error {
            AnswersError::Columns(_) => "InputError",
            AnswersError::Taken(_) => "SettingsError",
            AnswersError::TooMany { .. } => "TooManyFailures",
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
            Some(source) => Self::of_kind(Kind::of_model(source), message, Some(source)),
            None if ecso_cli::library::is_misuse(&error) => Self::settings(message),
            None => Self::new("ModelError", message),
        }
    }
}
