//! `ecso bench`: what protection costs on this machine and with this model, in time and tokens.

use std::{
    fmt,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use ecso::{Chat, Delta, Event, Guard, Image, Limits, Mllm, Profile, Sampling, Verdict, profile::Gate};
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
    let report = runtime.block_on(bench.measured(&settings))?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    Ok(())
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
    prompt_tokens: u32,
    answer_tokens: u32,
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
        let (harmless, harmful) = lists(settings.images)?;
        let harmless = match &args.image {
            Some(path) => {
                let images = Image::open_several(path, settings.images)?;
                vec![Chat::ask(images, args.query.as_deref().unwrap_or("What does this picture show?"))]
            }
            None => harmless,
        };
        if harmless.is_empty() || harmful.is_empty() {
            return Err(UsageError("no font of this system can set the lists that are asked about".into()).into());
        }
        let bar = Bar::new(Unit::Of("answers"), args.quiet);
        Ok(Self { runs: args.runs.get(), tokens, profiles, harmless, harmful, bar })
    }

    async fn measured(&self, settings: &Settings) -> anyhow::Result<Report> {
        let begun = Instant::now();
        let model = open::model(settings).await?;
        model.health().await?;
        let is_here = !open::is_server(settings);
        let load_ms = is_here.then(|| milliseconds(begun.elapsed()));
        let name = model.name().to_owned();
        let total = self.total(settings);
        let mut asked = Asked { bench: self, model, answers: 0, total };
        // What a process asks first takes longer: heads of prompts are read that later ones share.
        let first = asked.answer(Way::Guarded(self.usual()), &self.harmless[0]).await?;
        let (prompt_tokens_per_second, answer_tokens_per_second) = asked.rates().await?;
        let all: Vec<Way<'_>> = [Way::Unguarded].into_iter().chain(self.profiles.iter().map(Way::Guarded)).collect();
        let mut blocks = vec![
            asked.block("harmless requests", &self.harmless, &all).await?,
            asked.block("harmful requests", &self.harmful, &all).await?,
        ];
        let always: Vec<Profile> =
            self.profiles.iter().map(|profile| Profile { gate: Gate::Always, ..profile.clone() }).collect();
        let forced: Vec<Way<'_>> = [Way::Unguarded].into_iter().chain(always.iter().map(Way::Guarded)).collect();
        blocks.push(
            asked
                .block("harmless requests, every answer written anew (gate = always)", &self.harmless, &forced)
                .await?,
        );
        let at_once = asked.at_once(self.usual()).await?;
        if is_here && !settings.engine.no_reuse {
            let mut apart = settings.clone();
            apart.engine.no_reuse = true;
            // One model at a time.
            let answers = asked.answers;
            drop(asked);
            let model = open::model(&apart).await?;
            let mut asked = Asked { bench: self, model, answers, total };
            blocks.push(asked.block("harmless requests, nothing shared between prompts", &self.harmless, &all).await?);
        }
        Ok(Report {
            ecso: env!("CARGO_PKG_VERSION"),
            model: name,
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            runs: self.runs,
            max_new_tokens: self.tokens,
            load_ms,
            first_answer_ms: milliseconds(first.took),
            prompt_tokens_per_second,
            answer_tokens_per_second,
            blocks,
            at_once,
            peak_mib: peak_mib(),
        })
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

/// Lists of the set that `ecso tune` asks: harmless ones, and harmful ones.
fn lists(limits: Limits) -> anyhow::Result<(Vec<Chat>, Vec<Chat>)> {
    let set = benchmarks::named("pairs").context("the set is missing")?;
    let items = set.items(Path::new("-"), Some("seen"))?;
    let (harmful, harmless): (Vec<Item>, Vec<Item>) =
        items.iter.filter(|item| item.scenario == "list").partition(|item| item.task == Task::Harmful);
    let chats = |items: Vec<Item>| items.iter().map(|item| item.chat(limits)).collect::<Result<Vec<_>, _>>();
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
    async fn block(&mut self, name: &'static str, chats: &[Chat], ways: &[Way<'_>]) -> anyhow::Result<Block> {
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

    /// Tokens a second: of a prompt, and of an answer; none where the model does not tell how many there were.
    async fn rates(&mut self) -> anyhow::Result<(Option<f64>, Option<f64>)> {
        let (mut read, mut write) = (Vec::new(), Vec::new());
        for _ in 0..self.bench.runs {
            let long = self.next(&Chat::ask([], "bread and butter ".repeat(LONG / 3)));
            let answer = answered(&self.model, Way::Unguarded, &long, 1).await?;
            read.push(f64::from(answer.prompt_tokens) / answer.first.as_secs_f64());
            let answer = self.answer(Way::Unguarded, &Chat::ask([], "Tell a long story about a baker.")).await?;
            let writing = answer.took.saturating_sub(answer.first).as_secs_f64();
            write.push(f64::from(answer.answer_tokens.saturating_sub(1)) / writing);
        }
        let told = |rates| Some(median(rates)).filter(|rate: &f64| rate.is_finite() && *rate > 0.0);
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
        try_join_all(chats.iter().map(|chat| answered(&self.model, way, chat, self.bench.tokens))).await?;
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
async fn answered(model: &Arc<dyn Mllm>, way: Way<'_>, chat: &Chat, tokens: u32) -> anyhow::Result<Timed> {
    let (begun, mut answer) = (Instant::now(), Timed::default());
    let mut first = None;
    match way {
        Way::Unguarded => {
            let sampling = Sampling { temperature: Some(0.0), max_tokens: Some(tokens), ..Sampling::default() };
            let mut deltas = model.stream(chat, &sampling).await?;
            while let Some(delta) = deltas.try_next().await? {
                match delta {
                    Delta::Text(_) => _ = first.get_or_insert_with(|| begun.elapsed()),
                    Delta::End { usage, .. } => {
                        let usage = usage.unwrap_or_default();
                        (answer.prompt_tokens, answer.answer_tokens) = (usage.prompt_tokens, usage.completion_tokens);
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
                        answer.prompt_tokens = outcome.steps.iter().filter_map(|step| step.prompt_tokens).sum();
                        answer.answer_tokens = outcome.steps.iter().filter_map(|step| step.completion_tokens).sum();
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
    first_answer_ms: f64,
    prompt_tokens_per_second: Option<f64>,
    answer_tokens_per_second: Option<f64>,
    blocks: Vec<Block>,
    at_once: AtOnce,
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
    prompt_tokens: f64,
    answer_tokens: f64,
    /// How many answers were judged unsafe.
    judged_unsafe: usize,
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
        let of = |figure: fn(&Timed) -> f64| median(answers.iter().map(figure).collect());
        Self {
            way: match way {
                Way::Unguarded => "unguarded".to_owned(),
                Way::Guarded(profile) => profile.name.clone(),
            },
            ms: of(|answer| milliseconds(answer.took)),
            first_word_ms: of(|answer| milliseconds(answer.first)),
            #[expect(clippy::cast_precision_loss, reason = "a few calls")]
            calls: of(|answer| answer.calls as f64),
            prompt_tokens: of(|answer| answer.prompt_tokens.into()),
            answer_tokens: of(|answer| answer.answer_tokens.into()),
            judged_unsafe: answers.iter().filter(|answer| answer.is_unsafe).count(),
        }
    }

    fn tokens(&self) -> f64 {
        self.prompt_tokens + self.answer_tokens
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "ecso {}, {}, {} cores", self.ecso, self.model, self.cores)?;
        writeln!(
            f,
            "medians of {}, at most {} new tokens each; no two requests begin alike\n",
            self.runs, self.max_new_tokens
        )?;
        if let Some(load) = self.load_ms {
            writeln!(f, "load                 {:>8.2} s", load / 1e3)?;
        }
        writeln!(f, "first guarded answer {:>8.2} s", self.first_answer_ms / 1e3)?;
        let rates = [("reads", self.prompt_tokens_per_second), ("writes", self.answer_tokens_per_second)];
        for (what, rate) in rates {
            match rate {
                Some(rate) => writeln!(f, "{what:<20} {rate:>8.1} tokens a second")?,
                None => writeln!(f, "{what:<20} {:>8} (the model does not tell how many tokens)", "-")?,
            }
        }
        if let Some(peak) = self.peak_mib {
            writeln!(f, "memory of ecso       {peak:>8} MiB at most")?;
        }
        for Block { name, rows } in &self.blocks {
            writeln!(f, "\n{name}")?;
            let head = ["time", "x", "first word", "calls", "prompt", "answer", "tokens x", "unsafe"];
            writeln!(
                f,
                "  {:<12} {:>9} {:>6} {:>10} {:>6} {:>7} {:>7} {:>9} {:>7}",
                "", head[0], head[1], head[2], head[3], head[4], head[5], head[6], head[7]
            )?;
            let Some(plain) = rows.first() else { continue };
            for row in rows {
                let tokens = Some(row.tokens() / plain.tokens()).filter(|ratio| ratio.is_finite());
                let tokens = tokens.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
                writeln!(
                    f,
                    "  {:<12} {:>7.2} s {:>6.2} {:>8.2} s {:>6.0} {:>7.0} {:>7.0} {tokens:>9} {:>7}",
                    row.way,
                    row.ms / 1e3,
                    row.ms / plain.ms,
                    row.first_word_ms / 1e3,
                    row.calls,
                    row.prompt_tokens,
                    row.answer_tokens,
                    if row.way == plain.way { "-".to_owned() } else { format!("{}/{}", row.judged_unsafe, self.runs) },
                )?;
            }
        }
        let AtOnce { answers, one_by_one_ms, together_ms, ratio } = &self.at_once;
        writeln!(
            f,
            "\n{answers} guarded answers: {:.2} s one by one, {:.2} s at once: {ratio:.2} times as fast",
            one_by_one_ms / 1e3,
            together_ms / 1e3
        )
    }
}

fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

/// Of at least one figure.
fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    let middle = figures.len() / 2;
    if figures.len().is_multiple_of(2) { f64::midpoint(figures[middle - 1], figures[middle]) } else { figures[middle] }
}

/// Most memory that this process held; Linux tells.
fn peak_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches(" kB").parse::<u64>().ok().map(|kib| kib / 1024)
}
