//! The guard: an MLLM and a profile, with two doors. What is guarded at all is decided here; how, by the profile's method.

use std::sync::Arc;

use futures::{FutureExt, Stream, StreamExt, pin_mut};
use serde_json::{Map, Value};

use crate::{
    chat::Chat,
    hardened::{self, Looked},
    memory::Memory,
    mllm::{Mllm, Sampling},
    paper,
    pipeline::{self, Considered, Given, Halt, Pipeline},
    profile::{Gate, Method, Profile, Scope},
    prompt::Query,
    trace::{Event, GuardError, Outcome},
    verdict::{Detection, Verdict},
};

/// Protects the answers of one [`Mllm`] under one [`Profile`].
///
/// Two doors lead in: [`Guard::answer`] takes a conversation, [`Guard::review`] a conversation and the answer that
/// somebody already has (a server, an evaluation of several profiles, a data engine). Both are folds over one pipeline
/// of events, which [`Guard::answer_events`] and [`Guard::review_events`] show.
///
/// ```
/// # async fn example(model: impl ecso::Mllm) -> Result<(), Box<dyn std::error::Error>> {
/// use ecso::{Chat, Guard, Image, Limits, Profile};
///
/// let guard = Guard::new(model, Profile::paper());
/// let image = Image::open("list.png", Limits::default())?;
/// let outcome = guard.answer(&Chat::ask([image], "What is on the list?")).await?;
/// println!("{:?}: {}", outcome.verdict, outcome.answer);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Guard<M> {
    model: M,
    profile: Profile,
    options: Options,
}

/// What [`Guard::check`] found about a text. Nobody else makes one: who has it knows that the text was judged.
#[derive(Debug, Clone, PartialEq)]
pub struct Checked {
    draft: String,
    found: Detection,
}

impl Checked {
    /// The text that was judged.
    #[must_use]
    pub fn draft(&self) -> &str {
        &self.draft
    }

    /// What was found about it.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        self.found.verdict
    }

    /// Probability of harm in 0..=1; `None` where the model doesn't tell.
    #[must_use]
    pub fn score(&self) -> Option<f64> {
        self.found.score
    }
}

/// What a caller may say beside the profile.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    /// Of answers (steps 1 and 4), in place of the profile's.
    pub(crate) sampling: Option<Sampling>,
    /// Further request fields of questions and captions.
    pub(crate) extra: Map<String, Value>,
    pub(crate) memory: Arc<Memory>,
    /// Whose findings it knows.
    pub(crate) caller: String,
}

impl<M: Mllm> Guard<M> {
    /// A guard in front of `model`.
    pub fn new(model: M, profile: Profile) -> Self {
        let options =
            Options { sampling: None, extra: Map::new(), memory: Arc::new(Memory::new(0)), caller: String::new() };
        Self { model, profile, options }
    }

    /// The same guard for a caller who says how answers are sampled: steps 1 and 4 are asked with `sampling` in place of the
    /// profile's.
    #[must_use]
    pub fn with_sampling(mut self, sampling: Sampling) -> Self {
        self.options.sampling = Some(sampling);
        self
    }

    /// The same guard, whose own calls (steps 2 and 3, and every check) carry these request fields: what changes how a model sees or
    /// thinks. Backends that have no request pass them over.
    #[must_use]
    pub fn with_extra(mut self, extra: Map<String, Value>) -> Self {
        self.options.extra = extra;
        self
    }

    /// The same guard with a memory that it shares with others; without one it remembers no finding. Findings are those of the same
    /// `caller`: behind one name two callers may reach two models.
    #[must_use]
    pub fn with_memory(mut self, memory: Arc<Memory>, caller: impl Into<String>) -> Self {
        (self.options.memory, self.options.caller) = (memory, caller.into());
        self
    }

    /// The model behind the guard.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// The profile it runs.
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// Steps 1 to 4: answers the last user turn of `chat`.
    pub async fn answer(&self, chat: &Chat) -> Result<Outcome, GuardError> {
        fold(self.answer_events(chat)).await
    }

    /// Steps 2 to 4: takes `draft` for the direct answer to the last user turn of `chat`.
    pub async fn review(&self, chat: &Chat, draft: &str) -> Result<Outcome, GuardError> {
        fold(self.review_events(chat, draft)).await
    }

    /// [`Guard::answer`], step by step. Dropping the stream cancels the work.
    pub fn answer_events<'a>(&'a self, chat: &'a Chat) -> impl Stream<Item = Result<Event, GuardError>> + Send + 'a {
        self.events(chat, Given::default())
    }

    /// [`Guard::review`], step by step. Dropping the stream cancels the work.
    pub fn review_events<'a>(
        &'a self,
        chat: &'a Chat,
        draft: &str,
    ) -> impl Stream<Item = Result<Event, GuardError>> + Send + 'a {
        self.events(chat, Given { draft: Some(draft.to_owned()), considered: Considered::default() })
    }

    /// What can be found about the last user turn of `chat` without an answer to it, while somebody else gets that: under `hardened` its
    /// images as text and whether it asks for harm, under `paper` nothing.
    pub async fn consider(&self, chat: &Chat) -> Result<Considered, GuardError> {
        let Self { model, profile, options } = self;
        let looked = pipeline::ahead(model, profile, options, Given::default(), move |w| consider(w, chat).boxed());
        let (looked, steps) = looked.await?;
        Ok(Considered::of(looked, steps))
    }

    /// Step 2 alone, on the beginning of an answer that somebody is still getting: is there harm in it already? What is found and what it
    /// took is kept in `considered`, for the review of the whole behind it, which does not ask about the same draft again. Where step 2 is
    /// not asked (nothing is guarded, or all is answered anew), the verdict is [`Verdict::Unchecked`].
    pub async fn check(&self, chat: &Chat, considered: &mut Considered, draft: &str) -> Result<Checked, GuardError> {
        let Self { model, profile, options } = self;
        let given = Given { draft: None, considered: considered.again() };
        let found = pipeline::ahead(model, profile, options, given, move |w| check(w, chat, draft).boxed());
        let (found, steps) = found.await?;
        let found = found.unwrap_or(Detection::UNCHECKED);
        considered.checked(draft, found, steps);
        Ok(Checked { draft: draft.to_owned(), found })
    }

    /// [`Guard::review_events`], of a request that was [considered](Guard::consider) by this guard. A draft is not looked at where no answer
    /// could make the request safe.
    pub fn review_considered<'a>(
        &'a self,
        chat: &'a Chat,
        considered: Considered,
        draft: &str,
    ) -> impl Stream<Item = Result<Event, GuardError>> + Send + 'a {
        self.events(chat, Given { draft: Some(draft.to_owned()), considered })
    }

    fn events<'a>(&'a self, chat: &'a Chat, given: Given) -> impl Stream<Item = Result<Event, GuardError>> + Send + 'a {
        pipeline::events(&self.model, &self.profile, &self.options, given, move |w| run(w, chat).boxed())
    }
}

/// Whether a conversation is guarded.
fn is_guarded(profile: &Profile, chat: &Chat) -> bool {
    profile.gate != Gate::Never && (profile.scope == Scope::All || chat.image_count() > 0)
}

async fn consider(w: &mut Pipeline<'_>, chat: &Chat) -> Result<Option<Looked>, Halt> {
    let profile = w.profile;
    let q = Query::of(chat, profile).ok_or(GuardError::NoQuery)?;
    match &profile.method {
        Method::Hardened(p) if is_guarded(profile, chat) => Ok(Some(hardened::look(w, p, &q).await?)),
        _ => Ok(None),
    }
}

async fn check(w: &mut Pipeline<'_>, chat: &Chat, draft: &str) -> Result<Option<Detection>, Halt> {
    let profile = w.profile;
    let q = Query::of(chat, profile).ok_or(GuardError::NoQuery)?;
    if !is_guarded(profile, chat) {
        return Ok(None);
    }
    let y = profile.stripped(draft);
    match &profile.method {
        Method::Paper(p) => paper::detect(w, p, &q, y).await.map(Some),
        Method::Hardened(p) => hardened::detect(w, p, &q, y).await.map(Some),
    }
}

async fn run(w: &mut Pipeline<'_>, chat: &Chat) -> Result<(), Halt> {
    let profile = w.profile;
    let q = Query::of(chat, profile).ok_or(GuardError::NoQuery)?;
    if !is_guarded(profile, chat) {
        return w.pass(&q).await;
    }
    match &profile.method {
        Method::Paper(p) => paper::run(w, p, &q).await,
        Method::Hardened(p) => hardened::run(w, p, &q).await,
    }
}

async fn fold(events: impl Stream<Item = Result<Event, GuardError>>) -> Result<Outcome, GuardError> {
    pin_mut!(events);
    while let Some(event) = events.next().await {
        if let Event::Done(outcome) = event? {
            return Ok(outcome);
        }
    }
    unreachable!("the pipeline ends with `Done` or an error")
}
