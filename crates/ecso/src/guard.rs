//! The guard: an MLLM and a profile, with two doors.

use futures::{FutureExt, Stream, StreamExt, pin_mut};

use crate::{
    call,
    chat::Chat,
    mllm::{Mllm, Sampling},
    profile::Profile,
    steps,
    trace::{Event, GuardError, Outcome},
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
    sampling: Option<Sampling>,
}

impl<M: Mllm> Guard<M> {
    /// A guard in front of `model`.
    pub fn new(model: M, profile: Profile) -> Self {
        Self { model, profile, sampling: None }
    }

    /// The same guard for a caller who says how answers are sampled: steps 1 and 4 are asked with `sampling` in place of the
    /// profile's.
    #[must_use]
    pub fn with_sampling(self, sampling: Sampling) -> Self {
        Self { sampling: Some(sampling), ..self }
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
        self.events(chat, None)
    }

    /// [`Guard::review`], step by step. Dropping the stream cancels the work.
    pub fn review_events<'a>(
        &'a self,
        chat: &'a Chat,
        draft: &str,
    ) -> impl Stream<Item = Result<Event, GuardError>> + Send + 'a {
        self.events(chat, Some(draft.to_owned()))
    }

    fn events<'a>(
        &'a self,
        chat: &'a Chat,
        draft: Option<String>,
    ) -> impl Stream<Item = Result<Event, GuardError>> + Send + 'a {
        let sampling = self.sampling.as_ref();
        call::events(&self.model, &self.profile, move |work| steps::run(work, sampling, chat, draft).boxed())
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
