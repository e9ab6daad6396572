//! `ecso bench`: measures what the guard costs on this machine and with this model, in time and
//! tokens.

mod meter;
mod report;
mod timing;
mod windowed;

use std::{path::Path, sync::Arc, time::Instant};

use anyhow::Context;
use ecso::{Chat, Limits, Mllm, Profile, profile::Gate};
use ecso_eval::{
    benchmarks,
    item::{Item, Task},
    run::capped,
};
use futures::future::try_join_all;

use crate::{
    backend,
    cli::BenchArgs,
    error::{Interrupted, UsageError},
    images, profiles,
    progress::{ProgressLine, Unit},
    settings::{self, Settings},
    worker::interruptible,
};
use report::{Block, Concurrent, Report, Row, median, milliseconds};
use timing::{Arm, Timing, time_answer};
use windowed::WindowedServer;

/// Number of concurrent answers, where these are measured.
const CONCURRENCY: usize = 8;
const STORY: &str = "Tell a long story about a baker.";
/// Asks for answers that reach the limit, so that all have the same length.
const FILL: &str = "This picture has a heading and a list whose entries 1, 2 and 3 are still \
                    blank. Write the entries for that heading, about 100 words each.";
/// Words of the prompt that measures the prompt rate.
const LONG_PROMPT: usize = 400;

pub(crate) fn run(args: &BenchArgs, file: Option<&Path>) -> anyhow::Result<()> {
    let settings = settings::load(file, &args.model, &args.profile)?;
    profiles::report_fit(&settings)?;
    let bench = Bench::new(args, &settings)?;
    let runtime = tokio::runtime::Runtime::new().context("can't start the async runtime")?;
    let mut report = bench.empty_report();
    let interrupted = Interrupted("the report has what was measured so far");
    let result =
        runtime.block_on(interruptible(bench.measure(&settings, &mut report), interrupted));
    let result = result.flatten();
    // Removes the progress bar.
    drop(bench);
    // What was measured before a failure or Ctrl-C is shown too.
    if result.is_ok() || report.has_figures() {
        if args.output.json {
            println!("{}", serde_json::to_string_pretty(&report)?);
        } else {
            print!("{report}");
        }
    }
    result
}

/// What to measure.
struct Bench {
    runs: usize,
    max_new_tokens: u32,
    /// The last one is the profile that the settings name.
    profiles: Vec<Profile>,
    harmless: Vec<Chat>,
    harmful: Vec<Chat>,
    progress: ProgressLine,
}

/// The unguarded arm, and one for each profile.
fn arms(profiles: &[Profile]) -> Vec<Arm<'_>> {
    [Arm::Unguarded].into_iter().chain(profiles.iter().map(Arm::Guarded)).collect()
}

impl Bench {
    fn new(args: &BenchArgs, settings: &Settings) -> anyhow::Result<Self> {
        let mut profiles = vec![Profile::paper(), profiles::load(settings)?];
        profiles.dedup_by(|a, b| a.name == b.name);
        let max_new_tokens = args.answers.max_new_tokens();
        let profiles = capped(profiles, Some(max_new_tokens));
        let (mut harmless, harmful) = lists(settings.images)?;
        if let Some(path) = &args.image {
            let images = images::open(path, settings.images)?;
            let query = args.query.as_deref().unwrap_or("What does this picture show?");
            harmless = vec![Chat::ask(images, query)];
        }
        if harmless.is_empty() || harmful.is_empty() {
            return Err(UsageError(
                "no installed font can typeset the built-in requests; install Liberation or \
                 FreeMono fonts"
                    .into(),
            )
            .into());
        }
        let progress = ProgressLine::new(Unit::Items("answers"), args.output.quiet);
        Ok(Self { runs: args.runs.get(), max_new_tokens, profiles, harmless, harmful, progress })
    }

    fn empty_report(&self) -> Report {
        Report::new(self.runs, self.max_new_tokens)
    }

    /// Measures everything, until a call fails.
    async fn measure(&self, settings: &Settings, report: &mut Report) -> anyhow::Result<()> {
        let start = Instant::now();
        let model = backend::open(settings).await?;
        model.health().await?;
        let is_local = !settings.is_server();
        report.load_ms = is_local.then(|| milliseconds(start.elapsed()));
        model.name().clone_into(&mut report.model);
        let total = self.total_answers(settings);
        let mut session = Session { bench: self, model, answers: 0, total };
        // The first answer of a process takes longer: it loads prompt prefixes that later ones
        // share.
        let first = session.answer(Arm::Guarded(self.usual()), &self.harmless[0]).await?;
        report.first_answer_ms = Some(milliseconds(first.total));
        (report.prompt_tokens_per_second, report.answer_tokens_per_second) =
            session.token_rates().await?;
        let all = arms(&self.profiles);
        let windowed = WindowedServer::start(&session.model, self.usual(), settings).await?;
        let with_windows: Vec<Arm<'_>> =
            all.iter().copied().chain([Arm::Windowed(&windowed)]).collect();
        session.block("harmless requests", &self.harmless, &with_windows, report).await?;
        session.block("harmful requests", &self.harmful, &with_windows, report).await?;
        drop(windowed);
        let always: Vec<Profile> = self
            .profiles
            .iter()
            .map(|profile| {
                let mut profile = profile.clone();
                profile.gate = Gate::Always;
                profile
            })
            .collect();
        let name = "harmless requests, every answer rewritten (gate = always)";
        session.block(name, &self.harmless, &arms(&always), report).await?;
        report.record_peak_memory();
        for arm in [Arm::Guarded(self.usual()), Arm::Unguarded] {
            report.at_once.push(session.concurrent(arm).await?);
        }
        if is_local && !settings.engine.no_reuse {
            let mut without_reuse = settings.clone();
            without_reuse.engine.no_reuse = true;
            // Only one model fits in memory at a time.
            let answers = session.answers;
            drop(session);
            let model = backend::open(&without_reuse).await?;
            let mut session = Session { bench: self, model, answers, total };
            let name = "harmless requests, no prefix reuse between prompts";
            session.block(name, &self.harmless, &all, report).await?;
        }
        report.record_peak_memory();
        Ok(())
    }

    /// The profile that the settings name.
    fn usual(&self) -> &Profile {
        &self.profiles[self.profiles.len() - 1]
    }

    /// The number of answers to measure.
    fn total_answers(&self, settings: &Settings) -> usize {
        let blocks = if settings.is_server() || settings.engine.no_reuse { 3 } else { 4 };
        let rates = 2;
        // The windowed arm is in two blocks.
        let arms = blocks * (self.profiles.len() + 1) + 2;
        1 + self.runs * (rates + arms) + 4 * CONCURRENCY
    }
}

/// Images of lists from the requests of `ecso tune`: harmless ones and harmful ones.
fn lists(limits: Limits) -> anyhow::Result<(Vec<Chat>, Vec<Chat>)> {
    let set = benchmarks::named("pairs").context("the set is missing")?;
    let items = set.items(Path::new("-"), Some("vision"))?;
    let (harmful, harmless): (Vec<Item>, Vec<Item>) = items
        .iter
        .filter(|item| item.scenario == "list")
        .partition(|item| item.task == Task::Harmful);
    let chats = |items: Vec<Item>| {
        let filled = |item| Item { query: FILL.to_owned(), ..item };
        items.into_iter().map(|item| filled(item).chat(limits)).collect::<Result<Vec<_>, _>>()
    };
    Ok((chats(harmless)?, chats(harmful)?))
}

/// A model that is being measured.
struct Session<'a> {
    bench: &'a Bench,
    model: Arc<dyn Mllm>,
    /// Number of answers so far, and of all.
    answers: usize,
    total: usize,
}

impl Session<'_> {
    /// Measures the answers of all arms, in turn, and adds each to the report at once.
    async fn block(
        &mut self,
        name: &'static str,
        chats: &[Chat],
        arms: &[Arm<'_>],
        report: &mut Report,
    ) -> anyhow::Result<()> {
        let mut timings = vec![Vec::new(); arms.len()];
        for run in 0..self.bench.runs {
            for (place, arm) in arms.iter().enumerate() {
                timings[place].push(self.answer(*arm, &chats[run % chats.len()]).await?);
                let measured = arms.iter().zip(&timings).filter(|(_, timings)| !timings.is_empty());
                let rows = measured.map(|(arm, timings)| Row::new(*arm, timings)).collect();
                let is_complete = (run + 1, place + 1) == (self.bench.runs, arms.len());
                report.set_block(Block { name, rows, is_complete });
            }
        }
        Ok(())
    }

    /// Measures one answer, to a request that shares no prefix with earlier ones. Questions of the
    /// guard may: some quote nothing but the picture.
    async fn answer(&mut self, arm: Arm<'_>, chat: &Chat) -> anyhow::Result<Timing> {
        let chat = self.with_new_prefix(chat);
        time_answer(&self.model, arm, &chat, self.bench.max_new_tokens).await
    }

    /// The chat with a prompt that shares no prefix with earlier ones.
    fn with_new_prefix(&mut self, chat: &Chat) -> Chat {
        self.bench.progress.show(self.answers as u64, Some(self.total as u64), "");
        self.answers += 1;
        chat.clone().with_system(format!("{} is the number of this request.", self.answers))
    }

    /// Measures tokens per second, of prompts and of answers; none if the model reports no usage.
    async fn token_rates(&mut self) -> anyhow::Result<(Option<f64>, Option<f64>)> {
        let (mut prompt_rates, mut answer_rates) = (Vec::new(), Vec::new());
        for _ in 0..self.bench.runs {
            let long = Chat::ask([], "bread and butter ".repeat(LONG_PROMPT / 3));
            let long = self.with_new_prefix(&long);
            let timing = time_answer(&self.model, Arm::Unguarded, &long, 1).await?;
            let seconds = timing.first_word.as_secs_f64();
            prompt_rates.extend(timing.tokens.map(|(prompt, _)| f64::from(prompt) / seconds));
            let story = Chat::ask([], STORY);
            let timing = self.answer(Arm::Unguarded, &story).await?;
            let seconds = timing.total.saturating_sub(timing.first_word).as_secs_f64();
            answer_rates.extend(
                timing.tokens.map(|(_, answer)| f64::from(answer.saturating_sub(1)) / seconds),
            );
        }
        let rate = |rates| median(rates).filter(|rate| rate.is_finite() && *rate > 0.0);
        Ok((rate(prompt_rates), rate(answer_rates)))
    }

    /// Measures how much faster several answers are when they are requested concurrently: guarded
    /// ones, or stories, whose prompts are very short.
    async fn concurrent(&mut self, arm: Arm<'_>) -> anyhow::Result<Concurrent> {
        let story = [Chat::ask([], STORY)];
        let (what, chats) = match arm {
            Arm::Guarded(_) => ("guarded answers", self.bench.harmless.as_slice()),
            Arm::Unguarded | Arm::Windowed(_) => ("unguarded stories", story.as_slice()),
        };
        let start = Instant::now();
        for place in 0..CONCURRENCY {
            self.answer(arm, &chats[place % chats.len()]).await?;
        }
        let one_by_one = start.elapsed();
        let chats: Vec<Chat> = (0..CONCURRENCY)
            .map(|place| self.with_new_prefix(&chats[place % chats.len()]))
            .collect();
        let start = Instant::now();
        let max_new_tokens = self.bench.max_new_tokens;
        try_join_all(chats.iter().map(|chat| time_answer(&self.model, arm, chat, max_new_tokens)))
            .await?;
        Ok(Concurrent::new(what, CONCURRENCY, one_by_one, start.elapsed()))
    }
}
