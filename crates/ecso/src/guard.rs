//! The guard: an MLLM and a profile. This file decides which conversations are guarded; the
//! profile's method decides how.

use std::sync::Arc;

use futures::{FutureExt, Stream, StreamExt, pin_mut};
use serde_json::{Map, Value};

use crate::{
    chat::Chat,
    hardened::{self, RequestFindings},
    memory::Memory,
    mllm::{Mllm, Sampling},
    paper,
    pipeline::{self, Given, Halt, Pipeline, RequestCheck},
    profile::{Gate, Method, Profile, Scope},
    prompt::Query,
    trace::{Event, GuardError, Outcome},
    verdict::{Detection, Verdict},
};

/// Protects the answers of one [`Mllm`] under one [`Profile`].
///
/// [`Guard::answer`] takes a conversation and answers it. [`Guard::review`] takes a conversation
/// and a draft answer that the caller already has (a server, an evaluation of several profiles, a
/// data engine). Both collect the events of one pipeline; [`Guard::answer_events`] and
/// [`Guard::review_events`] stream these events.
///
/// ```
/// # async fn example(model: impl ecso::Mllm) -> Result<(), Box<dyn std::error::Error>> {
/// use ecso::{Chat, Guard, Image, Limits, Profile};
///
/// let guard = Guard::new(model, Profile::hardened());
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

/// The result of [`Guard::check_draft`]. Nothing else creates one, so holding it proves that the
/// text was judged.
#[derive(Debug, Clone, PartialEq)]
pub struct CheckedDraft {
    draft: String,
    found: Detection,
}

impl CheckedDraft {
    /// The text that was judged.
    #[must_use]
    pub fn draft(&self) -> &str {
        &self.draft
    }

    /// The verdict on it.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        self.found.verdict
    }

    /// Probability of harm in 0..=1; `None` if the model reports no probabilities.
    #[must_use]
    pub fn score(&self) -> Option<f64> {
        self.found.score
    }
}

/// Sets up a [`Guard`]; made by [`Guard::builder`].
#[derive(Debug, Clone)]
#[must_use = "call `build` to get the guard"]
pub struct GuardBuilder<M> {
    model: M,
    profile: Option<Profile>,
    options: Options,
}

impl<M: Mllm> GuardBuilder<M> {
    /// How answers are judged and rewritten. The default is [`Profile::hardened`].
    pub fn profile(self, profile: Profile) -> Self {
        Self { profile: Some(profile), ..self }
    }

    /// Samples answers (steps 1 and 4) with `sampling`. The default is the profile's sampling.
    pub fn sampling(mut self, sampling: Sampling) -> Self {
        self.options.sampling = Some(sampling);
        self
    }

    /// Adds request fields to the guard's own calls (steps 2 and 3, and every check), such as those
    /// that change how a model sees or thinks. Backends without an HTTP request ignore them. The
    /// default is none.
    pub fn extra(mut self, extra: Map<String, Value>) -> Self {
        self.options.extra = extra;
        self
    }

    /// Shares a memory of earlier findings with other guards. Findings are kept apart by `caller`,
    /// because two callers may reach two models under one name. By default, findings are not
    /// remembered.
    pub fn memory(mut self, memory: Arc<Memory>, caller: impl Into<String>) -> Self {
        (self.options.memory, self.options.caller) = (memory, caller.into());
        self
    }

    /// The guard.
    pub fn build(self) -> Guard<M> {
        let Self { model, profile, options } = self;
        Guard { model, profile: profile.unwrap_or_else(Profile::hardened), options }
    }
}

/// Settings of the caller, in addition to the profile.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    /// For answers (steps 1 and 4), in place of the profile's.
    pub(crate) sampling: Option<Sampling>,
    /// Extra request fields for questions and captions.
    pub(crate) extra: Map<String, Value>,
    pub(crate) memory: Arc<Memory>,
    /// Whose findings `memory` returns.
    pub(crate) caller: String,
}

impl<M: Mllm> Guard<M> {
    /// A guard in front of `model` with no settings except the profile: short for
    /// [`Guard::builder`] with [`GuardBuilder::profile`].
    pub fn new(model: M, profile: Profile) -> Self {
        Self::builder(model).profile(profile).build()
    }

    /// Starts a guard in front of `model`.
    ///
    /// ```
    /// # fn example(model: impl ecso::Mllm) -> Result<(), ecso::ProfileError> {
    /// use std::sync::Arc;
    ///
    /// use ecso::{Guard, Memory, Profile, Sampling};
    ///
    /// let memory = Arc::new(Memory::new(10_000));
    /// let guard = Guard::builder(model)
    ///     .profile(Profile::paper().with("scope", "all")?)
    ///     .sampling(Sampling { temperature: Some(0.7), ..Sampling::default() })
    ///     .memory(memory, "tenant-1")
    ///     .build();
    /// # Ok(())
    /// # }
    /// ```
    pub fn builder(model: M) -> GuardBuilder<M> {
        let options = Options {
            sampling: None,
            extra: Map::new(),
            memory: Arc::new(Memory::new(0)),
            caller: String::new(),
        };
        GuardBuilder { model, profile: None, options }
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

    /// Steps 2 to 4, with `draft` as the direct answer to the last user turn of `chat`.
    pub async fn review(&self, chat: &Chat, draft: &str) -> Result<Outcome, GuardError> {
        fold(self.review_events(chat, draft)).await
    }

    /// [`Guard::answer`], step by step. Dropping the stream cancels the work.
    pub fn answer_events<'a>(
        &'a self,
        chat: &'a Chat,
    ) -> impl Stream<Item = Result<Event, GuardError>> + Send + 'a {
        self.events(chat, Given::default())
    }

    /// [`Guard::review`], step by step. Dropping the stream cancels the work.
    pub fn review_events<'a>(
        &'a self,
        chat: &'a Chat,
        draft: &str,
    ) -> impl Stream<Item = Result<Event, GuardError>> + Send + 'a {
        self.events(
            chat,
            Given { draft: Some(draft.to_owned()), request_check: RequestCheck::default() },
        )
    }

    /// Checks the last user turn of `chat` before there is an answer to it, so that a caller can
    /// fetch the draft meanwhile. Under `hardened` this turns the images into text and asks whether
    /// the request is harmful; under `paper` it does nothing.
    pub async fn check_request(&self, chat: &Chat) -> Result<RequestCheck, GuardError> {
        let Self { model, profile, options } = self;
        let findings = pipeline::ahead(model, profile, options, Given::default(), move |w| {
            check_request(w, chat).boxed()
        });
        let (findings, steps) = findings.await?;
        Ok(RequestCheck::of(chat, profile).with(findings, steps))
    }

    /// Step 2 alone, on the part of an answer that has been written so far. The finding and its
    /// calls are kept in `request_check`, so that the later review of the whole answer does not ask
    /// about the same draft again. If step 2 does not run (the chat is not guarded, or the profile
    /// rewrites every answer), the verdict is [`Verdict::Unchecked`].
    pub async fn check_draft(
        &self,
        chat: &Chat,
        request_check: &mut RequestCheck,
        draft: &str,
    ) -> Result<CheckedDraft, GuardError> {
        let Self { model, profile, options } = self;
        *request_check = std::mem::take(request_check).about(chat, profile);
        let given = Given { draft: None, request_check: request_check.without_steps() };
        let found = pipeline::ahead(model, profile, options, given, move |w| {
            check_draft(w, chat, draft).boxed()
        });
        let (found, steps) = found.await?;
        let found = found.unwrap_or(Detection::UNCHECKED);
        request_check.keep(draft, found, steps);
        Ok(CheckedDraft { draft: draft.to_owned(), found })
    }

    /// [`Guard::review_events`] for a request that this guard has [checked](Guard::check_request)
    /// already. The draft is not judged if the request itself is harmful. A check of another
    /// conversation, or under another profile, counts as none.
    pub fn review_checked<'a>(
        &'a self,
        chat: &'a Chat,
        request_check: RequestCheck,
        draft: &str,
    ) -> impl Stream<Item = Result<Event, GuardError>> + Send + 'a {
        let request_check = request_check.about(chat, &self.profile);
        self.events(chat, Given { draft: Some(draft.to_owned()), request_check })
    }

    fn events<'a>(
        &'a self,
        chat: &'a Chat,
        given: Given,
    ) -> impl Stream<Item = Result<Event, GuardError>> + Send + 'a {
        pipeline::events(&self.model, &self.profile, &self.options, given, move |w| {
            run(w, chat).boxed()
        })
    }
}

/// Whether a conversation is guarded.
fn is_guarded(profile: &Profile, chat: &Chat) -> bool {
    profile.gate != Gate::Never && (profile.scope == Scope::All || chat.image_count() > 0)
}

async fn check_request(w: &mut Pipeline<'_>, chat: &Chat) -> Result<Option<RequestFindings>, Halt> {
    let profile = w.profile;
    let q = Query::of(chat, profile).ok_or(GuardError::NoQuery)?;
    match &profile.method {
        Method::Hardened(p) if is_guarded(profile, chat) => {
            Ok(Some(hardened::check_request(w, p, &q).await?))
        }
        _ => Ok(None),
    }
}

async fn check_draft(
    w: &mut Pipeline<'_>,
    chat: &Chat,
    draft: &str,
) -> Result<Option<Detection>, Halt> {
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

async fn fold(
    events: impl Stream<Item = Result<Event, GuardError>>,
) -> Result<Outcome, GuardError> {
    pin_mut!(events);
    while let Some(event) = events.next().await {
        if let Event::Done(outcome) = event? {
            return Ok(outcome);
        }
    }
    unreachable!("the pipeline ends with `Done` or an error")
}
