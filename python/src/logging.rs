//! Warnings of the Rust part, passed on to Python's `logging` as those of the logger `ecso`.

use std::{
    fmt::{self, Write},
    sync::Once,
};

use pyo3::prelude::*;
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    Layer, filter::Targets, layer::Context, layer::SubscriberExt, util::SubscriberInitExt,
};

static STARTED: Once = Once::new();

/// Starts to pass warnings on, unless something else in this process handles them already.
pub(crate) fn start() {
    STARTED.call_once(|| {
        let ours = Targets::new().with_targets(["ecso", "_ecso"].map(|name| (name, Level::WARN)));
        let _ = tracing_subscriber::registry().with(ToPython.with_filter(ours)).try_init();
    });
}

struct ToPython;

impl<S: Subscriber> Layer<S> for ToPython {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut text = Text::default();
        event.record(&mut text);
        let method = if *event.metadata().level() == Level::ERROR { "error" } else { "warning" };
        // If Python is shutting down, nobody reads warnings.
        let _ = Python::try_attach(|py| {
            let log = || {
                let logger = py.import("logging")?.call_method1("getLogger", ("ecso",))?;
                logger.call_method1(method, ("%s", &text.0))
            };
            if let Err(error) = log() {
                error.write_unraisable(py, None);
            }
        });
    }
}

/// An event as text: its message, then its other fields.
#[derive(Default)]
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a text can't fail.
        let _ = match field.name() {
            "message" => write!(self.0, "{value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}
