//! `ecso tune`: should the guard be turned on for this model, and how?

use std::{collections::BTreeMap, fmt, num::NonZero, path::Path};

use anyhow::Context;
use ecso::{
    Image, Mllm, Profile,
    profile::{Method, Question},
};
use ecso_batch::{
    Bounds,
    journal::{Journal, JournalError, JournalReader},
};
use ecso_eval::{
    benchmarks::{self, Items},
    record::{ItemRecord, RunHeader, Selection},
    run::{self, Options, Progress},
    tune::{self, FailedRequests, TuningItem},
};
use serde::Serialize;

use crate::{
    calibration::{self, Stored},
    cli::{ProfileArgs, TuneArgs},
    config,
    eval::write_whole,
    open,
    progress::{Bar, Unit},
    work::Worker,
};

/// The set that is asked.
const SET: &str = "pairs";

pub(crate) fn run(args: &TuneArgs, file: Option<&Path>) -> anyhow::Result<()> {
    let settings = config::load(file, &args.model, &ProfileArgs::default())?;
    let profile = Profile::named("hardened")?;
    let Method::Hardened(method) = profile.method.clone() else {
        anyhow::bail!("`hardened` has no ways")
    };
    // Everything is asked, and nothing is held back.
    let open =
        profile.with("threshold", "1")?.with("early_exit", "false")?.with("name", "hardened")?;
    let open = run::capped(vec![open], Some(args.max_new_tokens.get()));
    let set = benchmarks::named(SET).context("the set is missing")?;
    let items = set.items(Path::new("-"), None)?;
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let at_once = args.concurrency.map_or_else(|| open::at_once(&settings), NonZero::get);
        let worker = Worker::open(&settings, at_once, args.cache.clone()).await?;
        let model = worker.model();
        let items = chosen(items, args.pairs.get(), reads_pictures(&*model).await?);
        let total = items.total.unwrap_or_default();
        let extent = Extent::of(&profile, total, args.max_new_tokens.get());
        if args.dry_run && args.json {
            println!("{}", serde_json::to_string_pretty(&extent)?);
            return Ok(());
        }
        say!("{extent}");
        if total < 2 * args.pairs.get() {
            say!(
                "there are {} pairs for this model, of {} that were asked for",
                total / 2,
                args.pairs
            );
        }
        if args.dry_run {
            return Ok(());
        }
        let header = RunHeader {
            ecso: env!("CARGO_PKG_VERSION").into(),
            benchmark: SET.into(),
            variant: None,
            data: "-".into(),
            model: model.name().to_owned(),
            model_digest: worker.digest.clone(),
            server: worker.server.clone(),
            profiles: open
                .iter()
                .map(|profile| (profile.name.clone(), profile.to_toml()))
                .collect(),
            max_new_tokens: Some(args.max_new_tokens.get()),
            choice: Selection { limit: Some(2 * args.pairs.get()), ..Selection::default() },
            items: Some(total),
        };
        let mut journal = Journal::open(&args.out, &header).map_err(|error| match error {
            JournalError::OtherSettings {
                path,
                what: "--limit" | "number of items in its data",
            } => JournalError::OtherSettings { path, what: "--pairs" },
            error => error,
        })?;
        let bar = Bar::new(Unit::Of("requests"), false);
        let show = |Progress { recorded, failed, .. }| {
            let note = if failed > 0 { format!("{failed} failed") } else { String::new() };
            bar.show(recorded as u64, Some(total as u64), &note);
        };
        let options = Options {
            bounds: Bounds { retry_failed: true, ..Bounds::at_once(at_once) },
            skip_missing: false,
            limits: settings.images,
        };
        worker.done(run::run(items, &open, model, &mut journal, options, show)).await??;
        drop((bar, journal));
        finish(args, &settings, &header, &method)
    })
}

/// Fits what was recorded, keeps it, and writes the page.
fn finish(
    args: &TuneArgs,
    settings: &config::Settings,
    header: &RunHeader,
    method: &ecso::profile::Hardened,
) -> anyhow::Result<()> {
    let records: Vec<ItemRecord> =
        JournalReader::in_folder(&args.out).latest()?.collect::<Result<_, _>>()?;
    let heard: Vec<TuningItem> =
        records.iter().filter_map(|record| TuningItem::of(record, "hardened")).collect();
    if 2 * heard.len() < records.len() {
        anyhow::bail!(
            "{} of {} requests failed; the journal says why: {}; the same command tries them again",
            records.len() - heard.len(),
            records.len(),
            args.out.display()
        );
    }
    if heard.len() < records.len() {
        say!(
            "{} requests failed, and widen the figures; the same command tries them again",
            records.len() - heard.len()
        );
    }
    let fitted = tune::fit(method, &heard, args.false_alarms)?;
    let lost = FailedRequests::of(&records, "hardened");
    let page = tune::report(&header.model, method, &heard, lost, &fitted, args.false_alarms);
    let path = args.out.join("tune.md");
    write_whole(&path, &page).with_context(|| path.display().to_string())?;
    let stored = Stored {
        ecso: header.ecso.clone(),
        model: header.model.clone(),
        model_digest: header.model_digest.clone(),
        profile: "hardened".into(),
        profile_hash: calibration::hash(&Profile::named("hardened")?),
        items: heard.len(),
        biases: fitted.biases,
        found: fitted.calibration,
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&stored)?);
    } else {
        println!("{page}");
    }
    if let Some(fault) = stored.fault() {
        say!("{}; {fault}", path.display());
        return Ok(());
    }
    let kept = calibration::store(settings, &stored)?;
    say!(
        "{}; kept in {}: `hardened` takes it for {} from now on",
        path.display(),
        kept.display(),
        stored.model
    );
    Ok(())
}

/// Whether the model turns pictures into text by itself, so that a description can stand in a
/// picture's place.
async fn reads_pictures(model: &dyn Mllm) -> anyhow::Result<bool> {
    Ok(model.image_text(&Image::described("a loaf of bread")).await?.is_some())
}

/// So many pairs, of every form alike; described photographs only for a model that reads them.
fn chosen(items: Items, pairs: usize, reads_pictures: bool) -> Items {
    let mut forms: BTreeMap<String, Vec<_>> = BTreeMap::new();
    for item in items.iter.filter(|item| reads_pictures || item.scenario != "photo") {
        forms.entry(item.scenario.clone()).or_default().push(item);
    }
    // Dealt in turn, both twins of a pair together.
    let mut dealt = Vec::new();
    let longest = forms.values().map(Vec::len).max().unwrap_or_default();
    for place in (0..longest).step_by(2) {
        dealt.extend(forms.values().flat_map(|form| form.iter().skip(place).take(2).cloned()));
    }
    dealt.truncate(2 * pairs);
    Items::all(dealt)
}

/// What is ahead, before any of it is recorded.
#[derive(Debug, Serialize)]
struct Extent {
    requests: usize,
    /// Calls of the model, about.
    calls: usize,
    /// Tokens of prompts, at most; less with a prefix cache.
    prompt_tokens: usize,
    /// Tokens of answers, at most.
    answer_tokens: usize,
}

impl Extent {
    fn of(profile: &Profile, requests: usize, max_new_tokens: u32) -> Self {
        let Method::Hardened(method) = &profile.method else {
            return Self { requests, calls: 0, prompt_tokens: 0, answer_tokens: 0 };
        };
        // About four characters a token; 60 tokens for what is filled in.
        let tokens = |question: &Question| {
            let examples = question.no.iter().chain(&question.yes).map(String::len).sum::<usize>();
            60 + (question.template.text().len() + question.system.len() + examples) / 4
        };
        let asked: usize = method.questions.values().map(tokens).sum();
        Self {
            requests,
            calls: requests * (method.questions.len() + 1),
            prompt_tokens: requests * (asked + 100),
            answer_tokens: requests * usize::try_from(max_new_tokens).unwrap_or(usize::MAX),
        }
    }
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { requests, calls, prompt_tokens, answer_tokens } = self;
        write!(
            f,
            "{requests} requests, about {calls} calls; at most {prompt_tokens} tokens of prompts (less with a prefix cache) and \
             {answer_tokens} of answers; what is recorded stays, and the same command goes on"
        )
    }
}
