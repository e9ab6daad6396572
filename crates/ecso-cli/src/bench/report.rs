//! The report of `ecso bench`.

use std::{fmt, time::Duration};

use serde::Serialize;

use super::timing::{Arm, Timing};

/// The columns of a block and their widths.
const COLUMNS: [(&str, usize); 9] = [
    ("", 18),
    ("time", 9),
    ("x", 6),
    ("first word", 10),
    ("calls", 5),
    ("prompt tokens", 13),
    ("answer tokens", 13),
    ("x", 6),
    ("unsafe", 6),
];

/// What was measured. Times are medians in milliseconds.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    ecso: &'static str,
    pub(super) model: String,
    cores: usize,
    runs: usize,
    max_new_tokens: u32,
    /// None for a server.
    pub(super) load_ms: Option<f64>,
    /// The first answer of this process, under the profile that the settings name.
    pub(super) first_answer_ms: Option<f64>,
    pub(super) prompt_tokens_per_second: Option<f64>,
    pub(super) answer_tokens_per_second: Option<f64>,
    blocks: Vec<Block>,
    /// Guarded answers, and unguarded stories: nearly all of their time goes into writing.
    pub(super) at_once: Vec<Concurrent>,
    /// Peak memory of this process, if the system reports it.
    peak_mib: Option<u64>,
}

/// The same requests, answered by several arms.
#[derive(Debug, Serialize)]
pub(super) struct Block {
    pub(super) name: &'static str,
    pub(super) rows: Vec<Row>,
    /// Whether all answers were measured.
    pub(super) is_complete: bool,
}

/// The medians of one arm.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    #[serde(rename = "way")]
    arm: String,
    /// Number of answers measured.
    answers: usize,
    ms: f64,
    first_word_ms: f64,
    calls: f64,
    /// None if not known: the model reports no usage, or a call was stopped.
    prompt_tokens: Option<f64>,
    answer_tokens: Option<f64>,
    /// Number of answers judged unsafe; none if the client doesn't see that.
    judged_unsafe: Option<usize>,
}

/// Answers requested concurrently, compared with one by one.
#[derive(Debug, Serialize)]
pub(super) struct Concurrent {
    what: &'static str,
    answers: usize,
    one_by_one_ms: f64,
    together_ms: f64,
    /// Speedup.
    ratio: f64,
}

impl Report {
    pub(super) fn new(runs: usize, max_new_tokens: u32) -> Self {
        Self {
            ecso: env!("CARGO_PKG_VERSION"),
            model: String::new(),
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            runs,
            max_new_tokens,
            load_ms: None,
            first_answer_ms: None,
            prompt_tokens_per_second: None,
            answer_tokens_per_second: None,
            blocks: Vec::new(),
            at_once: Vec::new(),
            peak_mib: None,
        }
    }

    /// Whether any answer was measured.
    pub(super) fn has_figures(&self) -> bool {
        self.first_answer_ms.is_some()
    }

    /// Adds a block, or replaces its incomplete version.
    pub(super) fn set_block(&mut self, block: Block) {
        self.blocks.pop_if(|last| last.name == block.name);
        self.blocks.push(block);
    }

    pub(super) fn record_peak_memory(&mut self) {
        self.peak_mib = peak_mib();
    }
}

impl Row {
    pub(super) fn new(arm: Arm<'_>, timings: &[Timing]) -> Self {
        let median_of = |figure: fn(&Timing) -> f64| {
            median(timings.iter().map(figure).collect()).unwrap_or(f64::NAN)
        };
        let tokens = |figure: fn((u32, u32)) -> u32| {
            let counts: Option<Vec<f64>> =
                timings.iter().map(|timing| Some(figure(timing.tokens?).into())).collect();
            counts.and_then(median)
        };
        let judged_unsafe = timings.iter().filter(|timing| timing.is_unsafe).count();
        Self {
            arm: arm.name(),
            answers: timings.len(),
            ms: median_of(|timing| milliseconds(timing.total)),
            first_word_ms: median_of(|timing| milliseconds(timing.first_word)),
            #[expect(clippy::cast_precision_loss, reason = "a few calls")]
            calls: median_of(|timing| timing.calls as f64),
            prompt_tokens: tokens(|(prompt, _)| prompt),
            answer_tokens: tokens(|(_, answer)| answer),
            judged_unsafe: matches!(arm, Arm::Guarded(_)).then_some(judged_unsafe),
        }
    }

    fn tokens(&self) -> Option<f64> {
        Some(self.prompt_tokens? + self.answer_tokens?)
    }

    /// The cells of the row; `unguarded` is the row to compare with.
    fn cells(&self, unguarded: &Self) -> [String; 9] {
        let tokens = self.tokens().zip(unguarded.tokens());
        let judged_unsafe = self.judged_unsafe.map(|count| format!("{count}/{}", self.answers));
        [
            self.arm.clone(),
            seconds(self.ms),
            format!("{:.2}", self.ms / unguarded.ms),
            seconds(self.first_word_ms),
            format!("{:.0}", self.calls),
            or_dash(self.prompt_tokens),
            or_dash(self.answer_tokens),
            tokens.map_or_else(|| "-".into(), |(own, unguarded)| format!("{:.2}", own / unguarded)),
            judged_unsafe.unwrap_or_default(),
        ]
    }
}

impl Concurrent {
    pub(super) fn new(
        what: &'static str,
        answers: usize,
        one_by_one: Duration,
        together: Duration,
    ) -> Self {
        Self {
            what,
            answers,
            one_by_one_ms: milliseconds(one_by_one),
            together_ms: milliseconds(together),
            ratio: one_by_one.as_secs_f64() / together.as_secs_f64(),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "ecso {}, {}, {} cores", self.ecso, self.model, self.cores)?;
        writeln!(
            f,
            "medians of {}, at most {} new tokens each; no two drafts share a prefix",
            self.runs, self.max_new_tokens
        )?;
        writeln!(
            f,
            "x: times the unguarded answer; -: not known (the model reports no usage, or a call was \
             stopped)\n"
        )?;
        for (name, ms) in [("load", self.load_ms), ("first guarded answer", self.first_answer_ms)] {
            if let Some(ms) = ms {
                writeln!(f, "{name:<22} {:>9}", seconds(ms))?;
            }
        }
        let rates = [
            ("prompt rate", self.prompt_tokens_per_second),
            ("answer rate", self.answer_tokens_per_second),
        ];
        for (name, rate) in rates {
            writeln!(f, "{name:<22} {:>9} tokens/s", or_dash(rate))?;
        }
        if let Some(peak) = self.peak_mib {
            writeln!(f, "{:<22} {peak:>9} MiB", "peak memory of ecso")?;
        }
        self.blocks.iter().try_for_each(|block| write!(f, "{block}"))?;
        self.at_once.iter().try_for_each(|concurrent| write!(f, "{concurrent}"))
    }
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let incomplete = if self.is_complete { "" } else { " (incomplete)" };
        writeln!(f, "\n{}{incomplete}", self.name)?;
        write_line(f, &COLUMNS.map(|(title, _)| title.to_owned()))?;
        let Some(unguarded) = self.rows.first() else { return Ok(()) };
        self.rows.iter().try_for_each(|row| write_line(f, &row.cells(unguarded)))
    }
}

impl fmt::Display for Concurrent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\n{} {}: {} one by one, {} at once, {:.2} times as fast",
            self.answers,
            self.what,
            seconds(self.one_by_one_ms),
            seconds(self.together_ms),
            self.ratio
        )
    }
}

/// Writes a line of a block: the first cell is aligned left, the others right.
fn write_line(f: &mut fmt::Formatter<'_>, cells: &[String; 9]) -> fmt::Result {
    let [(_, width), numbers @ ..] = COLUMNS;
    write!(f, "  {:<width$}", cells[0])?;
    for (cell, (_, width)) in cells[1..].iter().zip(numbers) {
        write!(f, "  {cell:>width$}")?;
    }
    writeln!(f)
}

fn seconds(ms: f64) -> String {
    format!("{:.2} s", ms / 1e3)
}

fn or_dash(figure: Option<f64>) -> String {
    figure.map_or_else(|| "-".to_owned(), |figure| format!("{figure:.0}"))
}

pub(super) fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

/// The median; none if there are no values.
pub(super) fn median(mut figures: Vec<f64>) -> Option<f64> {
    figures.sort_by(f64::total_cmp);
    let middle = figures.len() / 2;
    let upper = *figures.get(middle)?;
    Some(if figures.len().is_multiple_of(2) {
        f64::midpoint(figures[middle - 1], upper)
    } else {
        upper
    })
}

/// Peak memory of this process in MiB, on Linux.
fn peak_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches(" kB").parse::<u64>().ok().map(|kib| kib / 1024)
}
