//! `ecso bench`: what protection costs on this machine and with this model, in time and tokens.

use std::{
    fmt,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use ecso::{
    Chat, Delta, Event, Guard, Image, Limits, Mllm, Profile, Sampling, Verdict, profile::Gate,
};
use ecso_eval::{
    benchmarks,
    item::{Item, Task},
    run::capped,
};
use futures::{TryStreamExt, future::try_join_all, pin_mut};
use serde::Serialize;

use crate::{
    UsageError,
    cli::BenchArgs,
    config::{self, Settings},
    open,
    progress::{Bar, Unit},
};

/// Answers that run at one time, where that is measured.
const AT_ONCE: usize = 8;
/// Words of the prompt by which the rate of reading is measured.
const LONG: usize = 400;

pub(crate) fn run(args: &BenchArgs, file: Option<&Path>) -> anyhow::Result<()> {
    let settings = config::load(file, &args.model, &args.profile)?;
    let bench = Bench::new(args, &settings)?;
    let runtime = tokio::runtime::Runtime::new().context("no runtime")?;
    let mut report = bench.report();
    let measured = runtime.block_on(bench.measure(&settings, &mut report));
    // What was measured before a call failed stays.
    if measured.is_ok() || !report.blocks.is_empty() {
        if args.json {
            println!("{}", serde_json::to_string_pretty(&report)?);
        } else {
            print!("{report}");
        }
    }
    measured
}

/// What is measured.
struct Bench {
    runs: usize,
    tokens: u32,
    profiles: Vec<Profile>,
    harmless: Vec<Chat>,
    harmful: Vec<Chat>,
    bar: Bar,
}

/// A way to answer.
#[derive(Clone, Copy)]
enum Way<'a> {
    Unguarded,
    Guarded(&'a Profile),
}

/// One answer.
#[derive(Debug, Clone, Default)]
struct Timed {
    took: Duration,
    /// Until its first word could be read.
    first: Duration,
    /// Prompt and answer of all calls; none where the model does not tell.
    tokens: Option<(u32, u32)>,
    calls: usize,
    is_unsafe: bool,
}

impl Bench {
    fn new(args: &BenchArgs, settings: &Settings) -> anyhow::Result<Self> {
        let own = config::profile(settings)?;
        let mut profiles = vec![Profile::paper(), own];
        profiles.dedup_by(|one, other| one.name == other.name);
        let tokens = args.max_new_tokens.get();
        let profiles = capped(profiles, Some(tokens));
        let own = args
            .image
            .as_deref()
            .map(|path| own_request(path, args.query.as_deref(), settings.images))
            .transpose()?;
        let (harmless, harmful) = lists(settings.images)?;
        let harmless = own.map_or(harmless, |own| vec![own]);
        if harmless.is_empty() || harmful.is_empty() {
            return Err(UsageError(
                "no font of this system can set the lists that are asked about".into(),
            )
            .into());
        }
        let bar = Bar::new(Unit::Of("answers"), args.quiet);
        Ok(Self { runs: args.runs.get(), tokens, profiles, harmless, harmful, bar })
    }

    /// A report of nothing.
    fn report(&self) -> Report {
        Report {
            ecso: env!("CARGO_PKG_VERSION"),
            model: String::new(),
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            runs: self.runs,
            max_new_tokens: self.tokens,
            load_ms: None,
            first_answer_ms: None,
            prompt_tokens_per_second: None,
            answer_tokens_per_second: None,
            blocks: Vec::new(),
            at_once: None,
            peak_mib: None,
        }
    }

    /// Measures, as far as no call fails.
    async fn measure(&self, settings: &Settings, report: &mut Report) -> anyhow::Result<()> {
        let begun = Instant::now();
        let model = open::model(settings).await?;
        model.health().await?;
        let is_here = !open::is_server(settings);
        report.load_ms = is_here.then(|| milliseconds(begun.elapsed()));
        model.name().clone_into(&mut report.model);
        let total = self.total(settings);
        let mut asked = Asked { bench: self, model, answers: 0, total };
        // What a process asks first takes longer: heads of prompts are read that later ones share.
        let first = asked.answer(Way::Guarded(self.usual()), &self.harmless[0]).await?;
        report.first_answer_ms = Some(milliseconds(first.took));
        (report.prompt_tokens_per_second, report.answer_tokens_per_second) = asked.rates().await?;
        let all: Vec<Way<'_>> =
            [Way::Unguarded].into_iter().chain(self.profiles.iter().map(Way::Guarded)).collect();
        report.blocks.push(asked.block("harmless requests", &self.harmless, &all).await?);
        report.blocks.push(asked.block("harmful requests", &self.harmful, &all).await?);
        let always: Vec<Profile> = self
            .profiles
            .iter()
            .map(|profile| {
                let mut profile = profile.clone();
                profile.gate = Gate::Always;
                profile
            })
            .collect();
        let forced: Vec<Way<'_>> =
            [Way::Unguarded].into_iter().chain(always.iter().map(Way::Guarded)).collect();
        let name = "harmless requests, every answer written anew (gate = always)";
        report.blocks.push(asked.block(name, &self.harmless, &forced).await?);
        report.peak_mib = peak_mib();
        report.at_once = Some(asked.at_once(self.usual()).await?);
        if is_here && !settings.engine.no_reuse {
            let mut apart = settings.clone();
            apart.engine.no_reuse = true;
            // One model at a time.
            let answers = asked.answers;
            drop(asked);
            let model = open::model(&apart).await?;
            let mut asked = Asked { bench: self, model, answers, total };
            let name = "harmless requests, nothing shared between prompts";
            report.blocks.push(asked.block(name, &self.harmless, &all).await?);
        }
        report.peak_mib = peak_mib();
        Ok(())
    }

    /// The profile that the settings name.
    fn usual(&self) -> &Profile {
        &self.profiles[self.profiles.len() - 1]
    }

    /// How many answers are ahead.
    fn total(&self, settings: &Settings) -> usize {
        let blocks = if open::is_server(settings) || settings.engine.no_reuse { 3 } else { 4 };
        1 + self.runs * (2 + blocks * (self.profiles.len() + 1)) + 2 * AT_ONCE
    }
}

/// A question about an image of the user's.
fn own_request(path: &Path, query: Option<&str>, limits: Limits) -> anyhow::Result<Chat> {
    let images = Image::open_several(path, limits)?;
    for image in &images {
        image.pixels().map_err(|error| UsageError(format!("{}: {error}", path.display())))?;
    }
    Ok(Chat::ask(images, query.unwrap_or("What does this picture show?")))
}

/// Lists of the set that `ecso tune` asks: harmless ones, and harmful ones.
fn lists(limits: Limits) -> anyhow::Result<(Vec<Chat>, Vec<Chat>)> {
    let set = benchmarks::named("pairs").context("the set is missing")?;
    let items = set.items(Path::new("-"), Some("seen"))?;
    let (harmful, harmless): (Vec<Item>, Vec<Item>) = items
        .iter
        .filter(|item| item.scenario == "list")
        .partition(|item| item.task == Task::Harmful);
    let chats = |items: Vec<Item>| {
        items.iter().map(|item| item.chat(limits)).collect::<Result<Vec<_>, _>>()
    };
    Ok((chats(harmless)?, chats(harmful)?))
}

/// A model that is measured.
struct Asked<'a> {
    bench: &'a Bench,
    model: Arc<dyn Mllm>,
    /// Answers so far, and in all.
    answers: usize,
    total: usize,
}

impl Asked<'_> {
    /// Answers `chats` in all ways, in turn; each request is like no other.
    async fn block(
        &mut self,
        name: &'static str,
        chats: &[Chat],
        ways: &[Way<'_>],
    ) -> anyhow::Result<Block> {
        let mut answers = vec![Vec::new(); ways.len()];
        for run in 0..self.bench.runs {
            for (way, answers) in ways.iter().zip(&mut answers) {
                answers.push(self.answer(*way, &chats[run % chats.len()]).await?);
            }
        }
        let rows = ways.iter().zip(answers).map(|(way, answers)| Row::of(*way, &answers));
        Ok(Block { name, rows: rows.collect() })
    }

    /// One answer to a request that begins as none did before.
    async fn answer(&mut self, way: Way<'_>, chat: &Chat) -> anyhow::Result<Timed> {
        let chat = self.next(chat);
        answered(&self.model, way, &chat, self.bench.tokens).await
    }

    /// The chat, so that its prompt shares nothing with earlier ones.
    fn next(&mut self, chat: &Chat) -> Chat {
        self.bench.bar.show(self.answers as u64, Some(self.total as u64), "");
        self.answers += 1;
        chat.clone().with_system(format!("{} is the number of this request.", self.answers))
    }

    /// Tokens a second: of a prompt, and of an answer; none where the model does not tell how many
    /// there were.
    async fn rates(&mut self) -> anyhow::Result<(Option<f64>, Option<f64>)> {
        let (mut read, mut write) = (Vec::new(), Vec::new());
        for _ in 0..self.bench.runs {
            let long = self.next(&Chat::ask([], "bread and butter ".repeat(LONG / 3)));
            let answer = answered(&self.model, Way::Unguarded, &long, 1).await?;
            read.extend(
                answer.tokens.map(|(prompt, _)| f64::from(prompt) / answer.first.as_secs_f64()),
            );
            let answer = self
                .answer(Way::Unguarded, &Chat::ask([], "Tell a long story about a baker."))
                .await?;
            let writing = answer.took.saturating_sub(answer.first).as_secs_f64();
            write.extend(
                answer.tokens.map(|(_, written)| f64::from(written.saturating_sub(1)) / writing),
            );
        }
        let told = |rates| median(rates).filter(|rate| rate.is_finite() && *rate > 0.0);
        Ok((told(read), told(write)))
    }

    /// How much sooner several answers are there when they are asked for at once.
    async fn at_once(&mut self, profile: &Profile) -> anyhow::Result<AtOnce> {
        let way = Way::Guarded(profile);
        let chat = |place: usize| &self.bench.harmless[place % self.bench.harmless.len()];
        let begun = Instant::now();
        for place in 0..AT_ONCE {
            self.answer(way, chat(place)).await?;
        }
        let one_by_one = begun.elapsed();
        let chats: Vec<Chat> = (0..AT_ONCE).map(|place| self.next(chat(place))).collect();
        let begun = Instant::now();
        try_join_all(chats.iter().map(|chat| answered(&self.model, way, chat, self.bench.tokens)))
            .await?;
        let together = begun.elapsed();
        Ok(AtOnce {
            answers: AT_ONCE,
            one_by_one_ms: milliseconds(one_by_one),
            together_ms: milliseconds(together),
            ratio: one_by_one.as_secs_f64() / together.as_secs_f64(),
        })
    }
}

/// One answer.
async fn answered(
    model: &Arc<dyn Mllm>,
    way: Way<'_>,
    chat: &Chat,
    tokens: u32,
) -> anyhow::Result<Timed> {
    let (begun, mut answer) = (Instant::now(), Timed::default());
    let mut first = None;
    match way {
        Way::Unguarded => {
            let sampling = Sampling {
                temperature: Some(0.0),
                max_tokens: Some(tokens),
                ..Sampling::default()
            };
            let mut deltas = model.stream(chat, &sampling).await?;
            while let Some(delta) = deltas.try_next().await? {
                match delta {
                    Delta::Text(_) => _ = first.get_or_insert_with(|| begun.elapsed()),
                    Delta::End { usage, .. } => {
                        answer.tokens =
                            usage.map(|usage| (usage.prompt_tokens, usage.completion_tokens));
                    }
                    _ => {}
                }
            }
            answer.calls = 1;
        }
        Way::Guarded(profile) => {
            let guard = Guard::new(Arc::clone(model), profile.clone());
            let events = guard.answer_events(chat);
            pin_mut!(events);
            while let Some(event) = events.try_next().await? {
                match event {
                    Event::Answer(_) => _ = first.get_or_insert_with(|| begun.elapsed()),
                    Event::Done(outcome) => {
                        answer.calls = outcome.steps.len();
                        let told: Option<Vec<(u32, u32)>> = outcome
                            .steps
                            .iter()
                            .map(|step| step.prompt_tokens.zip(step.completion_tokens))
                            .collect();
                        let sum =
                            |(prompt, answer), (more, written)| (prompt + more, answer + written);
                        answer.tokens = told.map(|told| told.into_iter().fold((0, 0), sum));
                        answer.is_unsafe = outcome.verdict == Verdict::Unsafe;
                    }
                    _ => {}
                }
            }
        }
    }
    answer.took = begun.elapsed();
    answer.first = first.unwrap_or(answer.took);
    Ok(answer)
}

/// What was measured. Times are medians.
#[derive(Debug, Serialize)]
struct Report {
    ecso: &'static str,
    model: String,
    cores: usize,
    runs: usize,
    max_new_tokens: u32,
    /// None of a server's.
    load_ms: Option<f64>,
    /// Of this process, under the profile that the settings name.
    first_answer_ms: Option<f64>,
    prompt_tokens_per_second: Option<f64>,
    answer_tokens_per_second: Option<f64>,
    blocks: Vec<Block>,
    at_once: Option<AtOnce>,
    /// Most memory that this process held, where the system tells.
    peak_mib: Option<u64>,
}

/// The same requests, answered in several ways.
#[derive(Debug, Serialize)]
struct Block {
    name: &'static str,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    /// `unguarded`, or the profile.
    way: String,
    ms: f64,
    first_word_ms: f64,
    calls: f64,
    /// None where the model does not tell.
    prompt_tokens: Option<f64>,
    answer_tokens: Option<f64>,
    /// How many answers were judged unsafe; none where nobody judges.
    judged_unsafe: Option<usize>,
}

#[derive(Debug, Serialize)]
struct AtOnce {
    answers: usize,
    one_by_one_ms: f64,
    together_ms: f64,
    /// How many times as fast.
    ratio: f64,
}

impl Row {
    fn of(way: Way<'_>, answers: &[Timed]) -> Self {
        let of = |figure: fn(&Timed) -> f64| {
            median(answers.iter().map(figure).collect()).unwrap_or(f64::NAN)
        };
        let tokens = |figure: fn((u32, u32)) -> u32| {
            let told: Option<Vec<f64>> =
                answers.iter().map(|answer| Some(figure(answer.tokens?).into())).collect();
            told.and_then(median)
        };
        Self {
            way: match way {
                Way::Unguarded => "unguarded".to_owned(),
                Way::Guarded(profile) => profile.name.clone(),
            },
            ms: of(|answer| milliseconds(answer.took)),
            first_word_ms: of(|answer| milliseconds(answer.first)),
            #[expect(clippy::cast_precision_loss, reason = "a few calls")]
            calls: of(|answer| answer.calls as f64),
            prompt_tokens: tokens(|(prompt, _)| prompt),
            answer_tokens: tokens(|(_, answer)| answer),
            judged_unsafe: match way {
                Way::Unguarded => None,
                Way::Guarded(_) => Some(answers.iter().filter(|answer| answer.is_unsafe).count()),
            },
        }
    }

    fn tokens(&self) -> Option<f64> {
        Some(self.prompt_tokens? + self.answer_tokens?)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |ms: f64| format!("{:.2} s", ms / 1e3);
        let known = |figure: Option<f64>| {
            figure.map_or_else(|| "-".to_owned(), |figure| format!("{figure:.0}"))
        };
        writeln!(f, "ecso {}, {}, {} cores", self.ecso, self.model, self.cores)?;
        writeln!(
            f,
            "medians of {}, at most {} new tokens each; no two requests begin alike",
            self.runs, self.max_new_tokens
        )?;
        writeln!(f, "x: times the unguarded answer; - : the model does not tell\n")?;
        for (what, ms) in [("load", self.load_ms), ("first guarded answer", self.first_answer_ms)] {
            if let Some(ms) = ms {
                writeln!(f, "{what:<22} {:>9}", seconds(ms))?;
            }
        }
        for (what, rate) in
            [("reads", self.prompt_tokens_per_second), ("writes", self.answer_tokens_per_second)]
        {
            writeln!(f, "{what:<22} {:>9} tokens a second", known(rate))?;
        }
        if let Some(peak) = self.peak_mib {
            writeln!(f, "memory of ecso         {peak:>9} MiB at most")?;
        }
        for Block { name, rows } in &self.blocks {
            writeln!(f, "\n{name}")?;
            let head = [
                ("", 12),
                ("time", 9),
                ("x", 6),
                ("first word", 10),
                ("calls", 5),
                ("prompt tokens", 13),
                ("answer tokens", 13),
                ("x", 6),
                ("unsafe", 6),
            ];
            let line = |cells: [String; 9]| {
                let cells = cells.into_iter().zip(head).enumerate();
                let cells = cells.map(|(place, (cell, (_, width)))| {
                    if place == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
                });
                format!("  {}", cells.collect::<Vec<_>>().join("  "))
            };
            writeln!(f, "{}", line(head.map(|(name, _)| name.to_owned())))?;
            let Some(plain) = rows.first() else { continue };
            for row in rows {
                let tokens = row.tokens().zip(plain.tokens()).map(|(tokens, plain)| tokens / plain);
                let judged = row.judged_unsafe.map(|judged| format!("{judged}/{}", self.runs));
                let cells = [
                    row.way.clone(),
                    seconds(row.ms),
                    format!("{:.2}", row.ms / plain.ms),
                    seconds(row.first_word_ms),
                    format!("{:.0}", row.calls),
                    known(row.prompt_tokens),
                    known(row.answer_tokens),
                    tokens.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}")),
                    judged.unwrap_or_default(),
                ];
                writeln!(f, "{}", line(cells))?;
            }
        }
        let Some(AtOnce { answers, one_by_one_ms, together_ms, ratio }) = &self.at_once else {
            return Ok(());
        };
        let (one_by_one, together) = (seconds(*one_by_one_ms), seconds(*together_ms));
        writeln!(
            f,
            "\n{answers} guarded answers: {one_by_one} one by one, {together} at once, {ratio:.2} times as fast"
        )
    }
}

fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

/// None of nothing.
fn median(mut figures: Vec<f64>) -> Option<f64> {
    figures.sort_by(f64::total_cmp);
    let middle = figures.len() / 2;
    let upper = *figures.get(middle)?;
    Some(if figures.len().is_multiple_of(2) {
        f64::midpoint(figures[middle - 1], upper)
    } else {
        upper
    })
}

/// Most memory that this process held; Linux tells.
fn peak_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches(" kB").parse::<u64>().ok().map(|kib| kib / 1024)
}
