//! `ecso tune`: fits the guard to a model and advises whether to enable it.

use std::{collections::BTreeMap, fmt, path::Path};

use anyhow::Context;
use ecso::{
    Calibration, Image, Mllm, Profile,
    profile::{Hardened, Method, Question},
};
use ecso_batch::{
    Bounds,
    journal::{Journal, JournalError, JournalReader},
};
use ecso_eval::{
    benchmarks::{self, Items},
    item::Item,
    record::{ItemRecord, RunHeader, Selection},
    run::{self, Options, Progress},
    tune::{self, Advice, Fitted, TuningItems},
};
use serde::Serialize;

use crate::{
    calibration::{self, Kept},
    cli::{ProfileArgs, TuneArgs},
    files,
    progress::{ProgressLine, Unit},
    settings::{self, Settings},
    worker::Worker,
};

/// The set of requests to ask.
const SET: &str = "pairs";

pub(crate) fn run(args: &TuneArgs, file: Option<&Path>) -> anyhow::Result<()> {
    let settings = settings::load(file, &args.model, &ProfileArgs::default())?;
    let profile = Profile::hardened();
    let Method::Hardened(method) = profile.method.clone() else {
        anyhow::bail!("`hardened` has no detectors")
    };
    let max_new_tokens = args.answers.max_new_tokens();
    // Asks every question and flags nothing.
    let open_profile =
        profile.with("threshold", "1")?.with("early_exit", "false")?.with("name", "hardened")?;
    let open_profiles = run::capped(vec![open_profile], Some(max_new_tokens));
    let set = benchmarks::named(SET).context("the set is missing")?;
    let items = set.items(Path::new("-"), None)?;
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let concurrency = args.concurrency.or(settings.default_concurrency());
        let worker = Worker::open(&settings, concurrency, args.cache.cache.clone()).await?;
        let model = worker.model();
        let items = select(items, args.pairs.get(), reads_images(&*model).await?);
        let total = items.total.unwrap_or_default();
        let estimate = Estimate::new(&method, total, max_new_tokens);
        if args.dry_run && args.json {
            println!("{}", serde_json::to_string_pretty(&estimate)?);
            return Ok(());
        }
        say!("{estimate}");
        if total < 2 * args.pairs.get() {
            say!("--pairs {}: only {} pairs are available for this model", args.pairs, total / 2);
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
            profiles: open_profiles
                .iter()
                .map(|profile| (profile.name.clone(), profile.to_toml()))
                .collect(),
            max_new_tokens: Some(max_new_tokens),
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
        let progress = ProgressLine::new(Unit::Items("requests"), false);
        let show = |Progress { recorded, failed, .. }| {
            let note = if failed > 0 { format!("{failed} failed") } else { String::new() };
            progress.show(recorded as u64, Some(total as u64), &note);
        };
        let options = Options {
            bounds: Bounds { retry_failed: true, ..Bounds::at_once(concurrency) },
            skip_missing: false,
            limits: settings.images,
        };
        let run = run::run(items, &open_profiles, model, &mut journal, options, show);
        worker.run_interruptible(run).await??;
        drop((progress, journal));
        finish(args, &settings, &header, &method)
    })
}

/// Fits the detectors to the recorded findings, writes the report and stores the calibration.
fn finish(
    args: &TuneArgs,
    settings: &Settings,
    header: &RunHeader,
    method: &Hardened,
) -> anyhow::Result<()> {
    let records: Vec<ItemRecord> =
        JournalReader::in_folder(&args.out).latest()?.collect::<Result<_, _>>()?;
    let all = TuningItems::of(&records, "hardened");
    let TuningItems { failed, empty, .. } = all;
    anyhow::ensure!(
        2 * failed <= records.len(),
        "{failed} of {} requests failed; the journal in {} has the reasons; run the same command \
         again to retry them",
        records.len(),
        args.out.display()
    );
    anyhow::ensure!(
        2 * empty <= records.len(),
        "the model's answers to {empty} of {} requests are empty: a model that reasons needs more \
         tokens; run it again with --max-new-tokens 1024 and another --out",
        records.len()
    );
    if empty > 0 {
        say!(
            "the answers to {empty} requests are empty, which widens the intervals; a model that \
             reasons needs more tokens (--max-new-tokens)"
        );
    }
    if failed > 0 {
        say!(
            "{failed} requests failed, which widens the intervals; run the same command again to \
             retry them"
        );
    }
    if all.unjudged > 0 {
        say!(
            "{} requests were not judged, because `hardened` does not guard them; they are left \
             out",
            all.unjudged
        );
    }
    let false_alarms = args.target.false_alarms;
    let mut fitted = tune::fit(method, &all.items, false_alarms)?;
    let fault = calibration::fault(&calibration_of(header, &fitted));
    if fault.is_some() {
        fitted = tune::own(method, &all.items, false_alarms)?;
    }
    let (advice, page) =
        tune::report(&header.model, method, &all, &fitted, false_alarms, fault.as_deref());
    let path = args.out.join("tune.md");
    files::write(&path, &page).with_context(|| path.display().to_string())?;
    let calibration = calibration_of(header, &fitted);
    // Stored before anything is printed: a reader that has enough of the output ends the program.
    let kept = calibration::keep(settings, &calibration, fault)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&Advised { advice, kept: &kept })?);
    } else {
        println!("{page}");
    }
    say!("{}; {kept}", path.display());
    Ok(())
}

/// What `--json` prints.
#[derive(Serialize)]
struct Advised<'a> {
    advice: Advice,
    #[serde(flatten)]
    kept: &'a Kept<'a>,
}

fn calibration_of(header: &RunHeader, fitted: &Fitted) -> Calibration {
    let (model, digest) = (&header.model, &header.model_digest);
    let (biases, fit) = (fitted.biases.clone(), fitted.fit.clone());
    let mut calibration =
        Calibration::new(&Profile::hardened(), model, digest, fitted.items, biases, fit);
    calibration.ecso.clone_from(&header.ecso);
    calibration
}

/// Whether the model turns images into text itself, so that a description can replace an image.
async fn reads_images(model: &dyn Mllm) -> anyhow::Result<bool> {
    Ok(model.image_text(&Image::described("a loaf of bread")).await?.is_some())
}

/// Selects this many pairs, evenly from every scenario. Requests without a picture are left out:
/// `hardened` does not guard them. Described photographs are only for models that read images.
fn select(items: Items, pairs: usize, reads_images: bool) -> Items {
    let mut scenarios: BTreeMap<String, Vec<_>> = BTreeMap::new();
    let is_for_model =
        |item: &Item| !item.images.is_empty() && (reads_images || item.scenario != "photo");
    for item in items.iter.filter(is_for_model) {
        scenarios.entry(item.scenario.clone()).or_default().push(item);
    }
    // Round-robin over the scenarios, with the twins of a pair together.
    let mut selected = Vec::new();
    let longest = scenarios.values().map(Vec::len).max().unwrap_or_default();
    for first in (0..longest).step_by(2) {
        let pairs = scenarios.values().flat_map(|items| items.iter().skip(first).take(2).cloned());
        selected.extend(pairs);
    }
    selected.truncate(2 * pairs);
    Items::all(selected)
}

/// An estimate of the work, before anything is asked.
#[derive(Debug, Serialize)]
struct Estimate {
    requests: usize,
    /// Approximate number of calls to the model, not counting those that turn images into text.
    calls: usize,
    /// Approximate number of prompt tokens, not counting images and their words; fewer with a
    /// prefix cache.
    prompt_tokens: usize,
    /// Maximum number of tokens of the drafts, not counting thoughts before a yes or no.
    answer_tokens: usize,
}

impl Estimate {
    fn new(method: &Hardened, requests: usize, max_new_tokens: u32) -> Self {
        // About four characters per token, and 60 tokens for what templates are filled with.
        let tokens = |question: &Question| {
            let examples = question.no.iter().chain(&question.yes).map(String::len).sum::<usize>();
            60 + (question.template.text().len() + question.system.len() + examples) / 4
        };
        let question_tokens: usize = method.questions.values().map(tokens).sum();
        Self {
            requests,
            calls: requests * (method.questions.len() + 1),
            prompt_tokens: requests * (question_tokens + 100),
            answer_tokens: requests * usize::try_from(max_new_tokens).unwrap_or(usize::MAX),
        }
    }
}

impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { requests, calls, prompt_tokens, answer_tokens } = self;
        write!(
            f,
            "{requests} requests, about {calls} calls, {prompt_tokens} prompt tokens (fewer with a \
             prefix cache) and {answer_tokens} answer tokens, not counting the images, what they \
             are turned into, and a reasoning model's thoughts; if interrupted, run the same \
             command again to resume"
        )
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use ecso_eval::item::{Picture, Task};

    use super::*;

    #[test]
    fn only_requests_that_hardened_guards_are_asked() {
        let pair = |scenario: &str, picture: Option<&Picture>| {
            [Task::Harmful, Task::Harmless].map(|task| Item {
                scenario: scenario.to_owned(),
                images: picture.cloned().into_iter().collect(),
                ..Item::new(format!("{scenario}-{task:?}"), "Do it.".into(), task)
            })
        };
        let (page, photo) = (Picture::File("page.png".into()), Picture::Described("a dog".into()));
        let items = [pair("list", Some(&page)), pair("photo", Some(&photo)), pair("text", None)];
        for (reads_images, asked) in [(true, vec!["list", "photo"]), (false, vec!["list"])] {
            let selected = select(Items::all(items.concat()), 100, reads_images);
            assert_eq!(selected.total, Some(2 * asked.len()));
            let scenarios: BTreeSet<String> = selected.iter.map(|item| item.scenario).collect();
            assert_eq!(scenarios.iter().collect::<Vec<_>>(), asked);
        }
    }
}
