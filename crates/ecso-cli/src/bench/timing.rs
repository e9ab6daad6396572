//! Times of single answers.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use ecso::{Chat, Delta, Event, Guard, Mllm, Profile, Sampling, Verdict};
use futures::{TryStreamExt, pin_mut};

use super::{meter::Metered, windowed::WindowedServer};

/// One way of answering.
#[derive(Clone, Copy)]
pub(super) enum Arm<'a> {
    Unguarded,
    Guarded(&'a Profile),
    /// Text goes out as soon as it is judged.
    Windowed(&'a WindowedServer),
}

impl Arm<'_> {
    pub(super) fn name(self) -> String {
        match self {
            Self::Unguarded => "unguarded".into(),
            Self::Guarded(profile) => profile.name.clone(),
            Self::Windowed(server) => format!("{}, windowed", server.profile),
        }
    }
}

/// What one answer took.
#[derive(Debug, Clone, Default)]
pub(super) struct Timing {
    pub(super) total: Duration,
    pub(super) first_word: Duration,
    /// Prompt and answer tokens of all calls; none if the model reports no usage, or a call was
    /// stopped.
    pub(super) tokens: Option<(u32, u32)>,
    /// Includes calls that were stopped.
    pub(super) calls: usize,
    pub(super) is_unsafe: bool,
}

/// Answers a chat and measures what that takes.
pub(super) async fn time_answer(
    model: &Arc<dyn Mllm>,
    arm: Arm<'_>,
    chat: &Chat,
    max_new_tokens: u32,
) -> anyhow::Result<Timing> {
    match arm {
        Arm::Unguarded => time_unguarded(model, chat, max_new_tokens).await,
        Arm::Guarded(profile) => time_guarded(model, profile, chat).await,
        Arm::Windowed(server) => server.time_answer(chat, max_new_tokens).await,
    }
}

/// Measures the answer of a model, or of a server.
pub(super) async fn time_unguarded(
    model: &Arc<dyn Mllm>,
    chat: &Chat,
    max_new_tokens: u32,
) -> anyhow::Result<Timing> {
    let start = Instant::now();
    let (mut first_word, mut tokens) = (None, None);
    let sampling = Sampling {
        temperature: Some(0.0),
        max_tokens: Some(max_new_tokens),
        ..Sampling::default()
    };
    let mut deltas = model.stream(chat, &sampling).await?;
    while let Some(delta) = deltas.try_next().await? {
        match delta {
            Delta::Text(_) => _ = first_word.get_or_insert_with(|| start.elapsed()),
            Delta::End { usage, .. } => {
                tokens = usage.map(|usage| (usage.prompt_tokens, usage.completion_tokens));
            }
            _ => {}
        }
    }
    let total = start.elapsed();
    let first_word = first_word.unwrap_or(total);
    Ok(Timing { total, first_word, tokens, calls: 1, is_unsafe: false })
}

async fn time_guarded(
    model: &Arc<dyn Mllm>,
    profile: &Profile,
    chat: &Chat,
) -> anyhow::Result<Timing> {
    let start = Instant::now();
    let (mut first_word, mut is_unsafe) = (None, false);
    let metered = Metered::new(model);
    let guard = Guard::new(Arc::clone(&metered), profile.clone());
    let events = guard.answer_events(chat);
    pin_mut!(events);
    while let Some(event) = events.try_next().await? {
        match event {
            Event::Answer(_) => _ = first_word.get_or_insert_with(|| start.elapsed()),
            Event::Done(outcome) => is_unsafe = outcome.verdict == Verdict::Unsafe,
            _ => {}
        }
    }
    let total = start.elapsed();
    let first_word = first_word.unwrap_or(total);
    let (calls, tokens) = metered.take();
    Ok(Timing { total, first_word, tokens, calls, is_unsafe })
}
