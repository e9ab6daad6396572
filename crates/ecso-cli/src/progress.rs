//! Progress of long-running work on standard error: a progress bar on a terminal, otherwise a line
//! every now and then.

use std::{
    cell::Cell,
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

/// Time between two lines without a terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(30);

/// What is counted.
pub(crate) enum Unit {
    /// Things with this plural, such as "rows".
    Items(&'static str),
    /// Bytes of the file with this name.
    Bytes(String),
}

/// Progress of work whose steps are counted.
pub(crate) struct ProgressLine {
    bar: ProgressBar,
    unit: Unit,
    quiet: bool,
    start: Instant,
    /// The count at the start: an earlier run did that many.
    initial: Cell<Option<u64>>,
    last_line: Cell<Instant>,
}

impl ProgressLine {
    pub(crate) fn new(unit: Unit, quiet: bool) -> Self {
        let now = Instant::now();
        let bar = if quiet { ProgressBar::hidden() } else { ProgressBar::new(0) };
        Self { bar, unit, quiet, start: now, initial: Cell::new(None), last_line: now.into() }
    }

    /// Shows that `done` are done, of `total` if that is known, followed by `note`.
    pub(crate) fn show(&self, done: u64, total: Option<u64>, note: &str) {
        let initial = self.initial.get().unwrap_or_else(|| {
            self.bar.set_style(self.style(total.is_some()));
            self.bar.set_position(done);
            self.bar.reset_eta();
            self.initial.set(Some(done));
            done
        });
        self.bar.set_length(total.unwrap_or(done));
        self.bar.set_position(done);
        self.bar.set_message(note.to_owned());
        if !self.quiet && self.bar.is_hidden() && self.last_line.get().elapsed() >= LINE_INTERVAL {
            self.last_line.set(Instant::now());
            say!("{}", self.line(done, initial, total, note));
        }
    }

    fn style(&self, has_total: bool) -> ProgressStyle {
        let template = match (&self.unit, has_total) {
            (Unit::Items(unit), true) => {
                format!("{{wide_bar}} {{pos}}/{{len}} {unit}, {{per_sec}}, {{eta}} left; {{msg}}")
            }
            (Unit::Items(unit), false) => {
                format!("{{spinner}} {{pos}} {unit}, {{per_sec}}; {{msg}}")
            }
            (Unit::Bytes(name), _) => {
                format!("{name} {{wide_bar}} {{bytes}}/{{total_bytes}} {{bytes_per_sec}} {{eta}}")
            }
        };
        ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar())
    }

    fn line(&self, done: u64, initial: u64, total: Option<u64>, note: &str) -> String {
        match &self.unit {
            Unit::Bytes(name) => {
                let total =
                    total.map_or_else(String::new, |total| format!(" of {}", HumanBytes(total)));
                format!("{name}: {}{total}", HumanBytes(done))
            }
            Unit::Items(unit) => {
                let minutes = self.start.elapsed().as_secs_f64() / 60.0;
                let rate = float(done.saturating_sub(initial)) / minutes;
                let left = total.filter(|_| rate > 0.0).map_or_else(String::new, |total| {
                    format!(", {:.0} min left", float(total.saturating_sub(done)) / rate)
                });
                let total = total.map_or_else(String::new, |total| format!(" of {total}"));
                let note = if note.is_empty() { String::new() } else { format!("; {note}") };
                format!("{done}{total} {unit}, {rate:.1} per minute{left}{note}")
            }
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of rows")]
fn float(count: u64) -> f64 {
    count as f64
}

impl Drop for ProgressLine {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Progress of work with named steps: a spinner on a terminal, otherwise a line for each.
pub(crate) struct Steps {
    spinner: ProgressBar,
    prints_lines: bool,
}

impl Steps {
    pub(crate) fn new(quiet: bool) -> Self {
        let is_terminal = std::io::stderr().is_terminal();
        let spinner =
            if quiet || !is_terminal { ProgressBar::hidden() } else { ProgressBar::new_spinner() };
        Self { spinner, prints_lines: !quiet && !is_terminal }
    }

    pub(crate) fn show(&self, step: &str) {
        if self.prints_lines {
            say!("ecso: {step}");
        }
        self.spinner.enable_steady_tick(Duration::from_millis(100));
        self.spinner.set_message(step.to_owned());
    }

    /// Prints text that stays.
    pub(crate) fn print(&self, text: &str) {
        self.spinner.suspend(|| say!("{text}"));
    }

    pub(crate) fn clear(&self) {
        self.spinner.finish_and_clear();
    }
}
