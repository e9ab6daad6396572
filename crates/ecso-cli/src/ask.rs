//! `ecso ask`: one guarded answer.

use std::{
    borrow::Cow,
    io::{IsTerminal, Read, Write},
    path::Path,
};

use anyhow::Context;
use ecso::{Chat, Event, Guard, Limits, Outcome, Step, Trace, Verdict, profile::Scope};
use futures::{StreamExt, pin_mut};

use crate::{
    backend, cli::AskArgs, error::UsageError, images, profiles, progress::Steps, settings,
};

pub(crate) fn run(args: &AskArgs, file: Option<&Path>) -> anyhow::Result<()> {
    let settings = settings::load(file, &args.model, &args.profile)?;
    let (profile, profile_reason) = profiles::load_with_reason(&settings)?;
    let chat = chat(args, settings.images)?;
    let runtime = tokio::runtime::Runtime::new().context("can't start the async runtime")?;
    runtime.block_on(async {
        let progress = Steps::new(args.output.quiet);
        if !settings.is_server() {
            progress.show("loading the model");
        }
        let model = backend::open(&settings).await?;
        let scope = profile.scope;
        let guard = Guard::new(model, profile);
        let events = guard.answer_events(&chat);
        pin_mut!(events);
        let mut printer = Printer { args, scope, profile_reason, progress, held: Some(Vec::new()) };
        while let Some(event) = events.next().await {
            printer.print(event?)?;
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
    let images: anyhow::Result<Vec<_>> =
        args.image.iter().map(|path| images::open(path, limits)).collect();
    let chat = Chat::ask(images?.into_iter().flatten(), query);
    Ok(match &args.system {
        Some(system) => chat.with_system(system),
        None => chat,
    })
}

/// Prints the events of the pipeline.
struct Printer<'a> {
    args: &'a AskArgs,
    /// The profile's.
    scope: Scope,
    /// Why this profile is used, if the user named none.
    profile_reason: Option<&'static str>,
    progress: Steps,
    /// Steps to show after the verdict; none once that is known.
    held: Option<Vec<Trace>>,
}

impl Printer<'_> {
    fn print(&mut self, event: Event) -> anyhow::Result<()> {
        let is_json = self.args.output.json;
        match event {
            Event::Started { step, images } => self.progress.show(&describe_step(step, images)),
            Event::Finished(trace) if self.args.show_steps && !is_json => self.print_step(trace),
            Event::Answer(text) => {
                self.progress.clear();
                self.release_held();
                // With --show-steps, the whole answer is printed after the steps.
                if !is_json && !self.args.show_steps {
                    print!("{}", for_output(&text));
                    std::io::stdout().flush()?;
                }
            }
            Event::Done(outcome) => {
                self.progress.clear();
                if is_json {
                    println!("{}", serde_json::to_string_pretty(&outcome)?);
                } else {
                    let answer = if self.args.show_steps { outcome.answer.as_str() } else { "" };
                    println!("{}", for_output(answer));
                    self.print_summary(&outcome);
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Prints a step. Steps before the verdict are held until it is known.
    fn print_step(&mut self, trace: Trace) {
        let has_verdict = trace.verdict.is_some();
        match &mut self.held {
            Some(held) => held.push(trace),
            None => self.progress.print(&format_step(&trace)),
        }
        if has_verdict {
            self.release_held();
        }
    }

    fn release_held(&mut self) {
        for trace in self.held.take().unwrap_or_default() {
            self.progress.print(&format_step(&trace));
        }
    }

    fn print_summary(&self, outcome: &Outcome) {
        if self.args.output.quiet {
            return;
        }
        let verdict = match outcome.verdict {
            Verdict::Safe => "the direct answer was judged safe",
            Verdict::Unsafe => "the direct answer was judged unsafe and was replaced",
            Verdict::Unchecked if self.scope == Scope::Images => {
                "not checked: the profile guards chats with an image; `--set scope=all` guards all"
            }
            Verdict::Unchecked => "not checked: the profile requires no check here",
        };
        let score = outcome.score.map_or_else(String::new, |score| format!(", P(harm) {score:.2}"));
        let reason = self.profile_reason.map_or_else(String::new, |reason| format!(" ({reason})"));
        say!("[{verdict}{score}; profile {}{reason}, model {}]", outcome.profile, outcome.model);
    }
}

/// A model's text for standard output. A terminal shows control characters, which could drive it,
/// as pictures of them.
fn for_output(text: &str) -> Cow<'_, str> {
    if std::io::stdout().is_terminal() { harmless(text) } else { text.into() }
}

/// The text with visible control characters, except line breaks and tabs.
fn harmless(text: &str) -> Cow<'_, str> {
    let is_control = |letter: char| letter.is_control() && !matches!(letter, '\n' | '\t');
    if !text.contains(is_control) {
        return text.into();
    }
    let shown = |letter: char| match u32::from(letter) {
        _ if !is_control(letter) => letter,
        code @ 0..0x20 => char::from_u32(0x2400 + code).unwrap_or(char::REPLACEMENT_CHARACTER),
        _ => char::REPLACEMENT_CHARACTER,
    };
    text.chars().map(shown).collect::<String>().into()
}

fn describe_step(step: Step, images: usize) -> String {
    let description = match step {
        Step::RequestCheck => "request check",
        Step::Direct => "step 1, direct answer",
        Step::Detect => "step 2, is it harmful?",
        Step::Caption => "step 3, image to text",
        Step::Safe => "step 4, answer with eyes closed",
        Step::ReplyCheck => "reply check",
        _ => "another step",
    };
    match images {
        0 => format!("{description} (no image)"),
        1 => format!("{description} (1 image)"),
        count => format!("{description} ({count} images)"),
    }
}

fn format_step(trace: &Trace) -> String {
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
    format!(
        "== {}, {} ms{tokens}{verdict}{score}\n  prompt\n{}\n  reply\n{}\n",
        describe_step(trace.step, trace.images),
        trace.ms,
        indent(&harmless(&trace.prompt)),
        indent(&harmless(&trace.reply))
    )
}
