//! `ecso ask`: one guarded answer.

use std::{
    io::{Read, Write},
    path::Path,
};

use anyhow::Context;
use ecso::{Chat, Event, Guard, Image, Limits, Outcome, Step, Trace, Verdict};
use futures::{StreamExt, pin_mut};

use crate::{UsageError, cli::AskArgs, config, open, progress::Steps};

pub(crate) fn run(args: &AskArgs, file: Option<&Path>) -> anyhow::Result<()> {
    let settings = config::load(file, &args.model, &args.profile)?;
    let (profile, why) = config::chosen_profile(&settings)?;
    let chat = chat(args, settings.images)?;
    let runtime = tokio::runtime::Runtime::new().context("no runtime")?;
    runtime.block_on(async {
        let progress = Steps::new(args.quiet);
        progress.show("loading the model");
        let model = open::model(&settings).await?;
        let guard = Guard::new(model, profile);
        let events = guard.answer_events(&chat);
        pin_mut!(events);
        let mut screen = Screen { args, why, progress, held: Some(Vec::new()) };
        while let Some(event) = events.next().await {
            screen.event(event?)?;
        }
        Ok(())
    })
}

fn chat(args: &AskArgs, limits: Limits) -> anyhow::Result<Chat> {
    let mut query = args.query.clone();
    if query == "-" {
        query.clear();
        std::io::stdin().read_to_string(&mut query).context("standard input")?;
    }
    if query.trim().is_empty() {
        return Err(UsageError("the query is empty".into()).into());
    }
    let images: anyhow::Result<Vec<_>> = args.image.iter().map(|path| read(path, limits)).collect();
    let chat = Chat::ask(images?.into_iter().flatten(), query);
    Ok(match &args.system {
        Some(system) => chat.with_system(system),
        None => chat,
    })
}

/// Reads and decodes the images of a file, so that a broken one is noticed before a model is loaded
/// for it.
fn read(path: &Path, limits: Limits) -> anyhow::Result<Vec<Image>> {
    let images = Image::open_several(path, limits)?;
    for image in &images {
        image.pixels().map_err(|error| UsageError(format!("{}: {error}", path.display())))?;
    }
    Ok(images)
}

/// What a person sees while the pipeline runs.
struct Screen<'a> {
    args: &'a AskArgs,
    /// Why this profile runs, if nobody named it.
    why: Option<&'static str>,
    progress: Steps,
    /// Steps that are shown once the verdict is there.
    held: Option<Vec<Trace>>,
}

impl Screen<'_> {
    fn event(&mut self, event: Event) -> anyhow::Result<()> {
        match event {
            Event::Started { step, images } => self.progress.show(&doing(step, images)),
            Event::Finished(trace) if self.args.show_steps && !self.args.json => self.step(trace),
            Event::Answer(text) => {
                self.progress.clear();
                self.release();
                // With the steps shown, the answer comes whole, after them.
                if !self.args.json && !self.args.show_steps {
                    print!("{text}");
                    std::io::stdout().flush()?;
                }
            }
            Event::Done(outcome) => {
                self.progress.clear();
                if self.args.json {
                    println!("{}", serde_json::to_string_pretty(&outcome)?);
                } else {
                    println!("{}", if self.args.show_steps { outcome.answer.as_str() } else { "" });
                    self.summary(&outcome);
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Steps 1 and 2 wait for the verdict.
    fn step(&mut self, trace: Trace) {
        let judged = trace.verdict.is_some();
        match &mut self.held {
            Some(held) => held.push(trace),
            None => self.progress.print(&shown(&trace)),
        }
        if judged {
            self.release();
        }
    }

    fn release(&mut self) {
        for trace in self.held.take().unwrap_or_default() {
            self.progress.print(&shown(&trace));
        }
    }

    fn summary(&self, outcome: &Outcome) {
        if self.args.quiet {
            return;
        }
        let verdict = match outcome.verdict {
            Verdict::Safe => "the direct answer was judged safe",
            Verdict::Unsafe => "the direct answer was judged unsafe and written anew",
            Verdict::Unchecked => "not checked: the profile doesn't ask for it here",
        };
        let score = outcome.score.map_or_else(String::new, |score| format!(", P(harm) {score:.2}"));
        let why = self.why.map_or_else(String::new, |why| format!(" ({why})"));
        say!("[{verdict}{score}; profile {}{why}, model {}]", outcome.profile, outcome.model);
    }
}

fn doing(step: Step, images: usize) -> String {
    let what = match step {
        Step::RequestCheck => "is harm asked for?",
        Step::Direct => "step 1, direct answer",
        Step::Detect => "step 2, is it harmful?",
        Step::Caption => "step 3, image to text",
        Step::Safe => "step 4, answer with eyes closed",
        Step::ReplyCheck => "is that answer harmful?",
        _ => "another step",
    };
    match images {
        0 => format!("{what} (no image)"),
        1 => format!("{what} (1 image)"),
        n => format!("{what} ({n} images)"),
    }
}

fn shown(trace: &Trace) -> String {
    let indent = |text: &str| {
        let lines: Vec<String> =
            text.lines().map(|line| format!("  | {line}").trim_end().to_owned()).collect();
        lines.join("\n")
    };
    let tokens = match (trace.prompt_tokens, trace.completion_tokens) {
        (Some(prompt), Some(completion)) => format!(", {prompt} + {completion} tokens"),
        _ => String::new(),
    };
    let verdict = match trace.verdict {
        Some(Verdict::Unsafe) => ": unsafe",
        Some(_) => ": safe",
        None => "",
    };
    let score = trace.score.map_or_else(String::new, |score| format!(", P(harm) {score:.2}"));
    let head =
        format!("== {}, {} ms{tokens}{verdict}{score}", doing(trace.step, trace.images), trace.ms);
    format!("{head}\n  prompt\n{}\n  reply\n{}\n", indent(&trace.prompt), indent(&trace.reply))
}
