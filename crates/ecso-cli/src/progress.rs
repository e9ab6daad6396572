//! Progress of long work, on standard error: a bar on a terminal, a line now and then elsewhere.

use std::{
    cell::Cell,
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

/// Between two lines, where there is no terminal.
const LINES: Duration = Duration::from_secs(30);

/// What is counted.
pub(crate) enum Unit {
    /// Things by name, such as "rows".
    Of(&'static str),
    /// Bytes of the file of this name.
    Bytes(String),
}

/// Work that counts what is done.
pub(crate) struct Bar {
    drawn: ProgressBar,
    unit: Unit,
    quiet: bool,
    begun: Instant,
    /// What was done before.
    first: Cell<Option<u64>>,
    last_line: Cell<Instant>,
}

impl Bar {
    pub(crate) fn new(unit: Unit, quiet: bool) -> Self {
        let now = Instant::now();
        let drawn = if quiet { ProgressBar::hidden() } else { ProgressBar::new(0) };
        Self { drawn, unit, quiet, begun: now, first: Cell::new(None), last_line: now.into() }
    }

    /// So many are `done`, of `total` where that is known; `note` stands behind.
    pub(crate) fn show(&self, done: u64, total: Option<u64>, note: &str) {
        let first = self.first.get().unwrap_or_else(|| {
            self.drawn.set_style(self.style(total.is_some()));
            self.drawn.set_position(done);
            self.drawn.reset_eta();
            self.first.set(Some(done));
            done
        });
        self.drawn.set_length(total.unwrap_or(done));
        self.drawn.set_position(done);
        self.drawn.set_message(note.to_owned());
        if !self.quiet && self.drawn.is_hidden() && self.last_line.get().elapsed() >= LINES {
            self.last_line.set(Instant::now());
            say!("{}", self.line(done, first, total, note));
        }
    }

    fn style(&self, known: bool) -> ProgressStyle {
        let template = match (&self.unit, known) {
            (Unit::Of(unit), true) => {
                format!("{{wide_bar}} {{pos}}/{{len}} {unit}, {{per_sec}}, {{eta}} left; {{msg}}")
            }
            (Unit::Of(unit), false) => format!("{{spinner}} {{pos}} {unit}, {{per_sec}}; {{msg}}"),
            (Unit::Bytes(name), _) => {
                format!("{name} {{wide_bar}} {{bytes}}/{{total_bytes}} {{bytes_per_sec}} {{eta}}")
            }
        };
        ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar())
    }

    fn line(&self, done: u64, first: u64, total: Option<u64>, note: &str) -> String {
        match &self.unit {
            Unit::Bytes(name) => {
                let total =
                    total.map_or_else(String::new, |total| format!(" of {}", HumanBytes(total)));
                format!("{name}: {}{total}", HumanBytes(done))
            }
            Unit::Of(unit) => {
                #[expect(clippy::cast_precision_loss, reason = "counts of rows")]
                let rate =
                    done.saturating_sub(first) as f64 / self.begun.elapsed().as_secs_f64() * 60.0;
                #[expect(clippy::cast_precision_loss, reason = "counts of rows")]
                let left = total.filter(|_| rate > 0.0).map_or_else(String::new, |total| {
                    format!(", {:.0} min left", total.saturating_sub(done) as f64 / rate)
                });
                let total = total.map_or_else(String::new, |total| format!(" of {total}"));
                let note = if note.is_empty() { String::new() } else { format!("; {note}") };
                format!("{done}{total} {unit}, {rate:.1} a minute{left}{note}")
            }
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.drawn.finish_and_clear();
    }
}

/// Work in steps that have names: a spinner on a terminal, a line each elsewhere.
pub(crate) struct Steps {
    spinner: ProgressBar,
    lines: bool,
}

impl Steps {
    pub(crate) fn new(quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let spinner =
            if quiet || !terminal { ProgressBar::hidden() } else { ProgressBar::new_spinner() };
        Self { spinner, lines: !quiet && !terminal }
    }

    pub(crate) fn show(&self, what: &str) {
        if self.lines {
            say!("ecso: {what}");
        }
        self.spinner.enable_steady_tick(Duration::from_millis(100));
        self.spinner.set_message(what.to_owned());
    }

    /// Prints text that stays.
    pub(crate) fn print(&self, text: &str) {
        self.spinner.suspend(|| say!("{text}"));
    }

    pub(crate) fn clear(&self) {
        self.spinner.finish_and_clear();
    }
}
