//! The operations that the methods are made of: draft, ask, describe, write, release. Each call of
//! the model is timed and traced, and its events go to the listener.

use std::{sync::Arc, time::Instant};

use futures::{
    SinkExt, Stream, StreamExt,
    channel::mpsc,
    future::{self, BoxFuture},
    pin_mut, stream,
};
use tracing::{Instrument, Span, field};

use crate::{
    chat::{Chat, Role, Turn},
    concurrent::with_background,
    guard::Options,
    hardened::RequestFindings,
    mllm::{Delta, FinishReason, ImageText, Mllm, ModelError, Reply, Sampling, Usage},
    profile::{ContentFilter, EmptyCaption, Gate, Method, Profile, Question, Rewrite},
    prompt::{Asked, Prompt, Query},
    reasoning::{caption_behind_reasoning, without_reasoning},
    template::Template,
    trace::{Event, GuardError, Outcome, Step, Trace},
    verdict::{Detection, Verdict},
    yes_or_no::ended_before_answer,
};

/// Token limit for a check by a model that thinks before it answers.
const ROOM_TO_THINK: u32 = 2048;
/// Most tokens of a caption whose words are judged, if its own limit is less.
const CAPTION_ROOM: u32 = 4096;

/// A question with this weight stops at the first harmful finding.
pub(crate) const ANY_HARM: f64 = 0.0;

/// Why a method ends early.
pub(crate) enum Halt {
    /// The answer is the fixed refusal.
    Refuse,
    /// There is no answer.
    Failed(GuardError),
}

impl From<GuardError> for Halt {
    fn from(error: GuardError) -> Self {
        Self::Failed(error)
    }
}

/// What the caller already has.
#[derive(Debug, Default)]
pub(crate) struct Given {
    /// The direct answer.
    pub(crate) draft: Option<String>,
    pub(crate) request_check: RequestCheck,
}

/// The findings about a request before there is an answer to it.
/// [`Guard::check_request`](crate::Guard::check_request) makes it,
/// [`Guard::review_checked`](crate::Guard::review_checked) takes it.
#[derive(Debug, Clone, Default)]
pub struct RequestCheck {
    /// The conversation and the profile that the findings are about. They don't hold for others.
    subject: Option<Arc<(Chat, Profile)>>,
    findings: Option<RequestFindings>,
    /// The draft that step 2 has judged, and its finding.
    found: Option<(String, Detection)>,
    steps: Vec<Trace>,
}

impl RequestCheck {
    /// Whether the request itself is harmful. The caller need not wait for a draft then.
    #[must_use]
    pub fn is_harmful(&self) -> bool {
        self.findings.as_ref().is_some_and(RequestFindings::is_harmful)
    }

    /// The same findings without the calls behind them: for the second and later choices of one
    /// request, whose calls are counted with the first.
    #[must_use]
    pub fn without_steps(&self) -> Self {
        let Self { subject, findings, .. } = self.clone();
        Self { subject, findings, ..Self::default() }
    }

    /// Empty findings about `chat` under `profile`.
    pub(crate) fn of(chat: &Chat, profile: &Profile) -> Self {
        Self { subject: Some(Arc::new((chat.clone(), profile.clone()))), ..Self::default() }
    }

    /// This check with its findings.
    pub(crate) fn with(self, findings: Option<RequestFindings>, steps: Vec<Trace>) -> Self {
        Self { findings, steps, ..self }
    }

    /// What this check says about `chat` under `profile`: nothing if it is about another one.
    pub(crate) fn about(self, chat: &Chat, profile: &Profile) -> Self {
        let is_same = |subject: &Arc<(Chat, Profile)>| subject.0 == *chat && subject.1 == *profile;
        if self.subject.as_ref().is_some_and(is_same) { self } else { Self::of(chat, profile) }
    }

    /// Keeps the finding about a draft, and the calls behind it.
    pub(crate) fn keep(&mut self, draft: &str, found: Detection, steps: Vec<Trace>) {
        self.found = Some((draft.to_owned(), found));
        self.steps.extend(steps);
    }
}

/// An answer in progress.
pub(crate) struct Pipeline<'a> {
    model: &'a dyn Mllm,
    pub(crate) profile: &'a Profile,
    options: &'a Options,
    /// The direct answer, if the caller already has it.
    draft: Option<String>,
    /// The findings about the request, if it was checked before.
    pub(crate) findings: Option<RequestFindings>,
    /// The finding about the draft, if it was checked before.
    found: Option<Detection>,
    is_filtered: bool,
    /// What happened so far.
    outcome: Outcome,
    listener: mpsc::Sender<Result<Event, GuardError>>,
}

/// The events of an answer, as they happen. The work continues only while the stream is polled. The
/// last event is the outcome or an error.
pub(crate) fn events<'a>(
    model: &'a dyn Mllm,
    profile: &'a Profile,
    options: &'a Options,
    given: Given,
    work: impl for<'w> FnOnce(&'w mut Pipeline<'a>) -> BoxFuture<'w, Result<(), Halt>> + Send + 'a,
) -> impl Stream<Item = Result<Event, GuardError>> + Send + 'a {
    let (listener, told) = mpsc::channel(0);
    let worked = async move {
        let mut under_way = Pipeline::new(model, profile, options, given, listener);
        let ended = match work(&mut under_way).await {
            Err(Halt::Refuse) => under_way.refuse().await,
            ended => ended,
        };
        let Pipeline { outcome, mut listener, .. } = under_way;
        let last = match ended {
            Ok(()) | Err(Halt::Refuse) => Ok(Event::Done(outcome)),
            Err(Halt::Failed(error)) => Err(error),
        };
        let _ = listener.send(last).await;
    };
    stream::select(told, stream::once(worked).filter_map(|()| future::ready(None)))
}

/// Runs a check before there is a whole answer, on the request or on the beginning of an answer.
/// Returns the finding and the calls behind it.
pub(crate) async fn ahead<'a, T>(
    model: &'a dyn Mllm,
    profile: &'a Profile,
    options: &'a Options,
    given: Given,
    work: impl for<'w> FnOnce(&'w mut Pipeline<'a>) -> BoxFuture<'w, Result<Option<T>, Halt>>
    + Send
    + 'a,
) -> Result<(Option<T>, Vec<Trace>), GuardError> {
    // These events go nowhere.
    let mut under_way = Pipeline::new(model, profile, options, given, mpsc::channel(0).0);
    match work(&mut under_way).await {
        Ok(found) => Ok((found, under_way.outcome.steps)),
        Err(Halt::Failed(error)) => Err(error),
        // A check that ends with a refusal has no finding.
        Err(Halt::Refuse) => Ok((None, under_way.outcome.steps)),
    }
}

impl<'a> Pipeline<'a> {
    fn new(
        model: &'a dyn Mllm,
        profile: &'a Profile,
        options: &'a Options,
        Given { draft, request_check: RequestCheck { findings, found, steps, .. } }: Given,
        listener: mpsc::Sender<Result<Event, GuardError>>,
    ) -> Self {
        let mut outcome = Outcome::unchecked("", &profile.name, model.name());
        outcome.steps = steps;
        let found =
            found.filter(|(about, _)| draft.as_ref() == Some(about)).map(|(_, found)| found);
        Self {
            model,
            profile,
            options,
            draft,
            findings,
            found,
            is_filtered: false,
            outcome,
            listener,
        }
    }

    /// A second pipeline for concurrent work, with the same listener.
    pub(crate) fn fork(&self) -> Self {
        Self::new(self.model, self.profile, self.options, Given::default(), self.listener.clone())
    }

    /// Puts the steps of concurrent work before this pipeline's own.
    pub(crate) fn prepend_steps(&mut self, other: Self) {
        self.outcome.steps.splice(0..0, other.outcome.steps);
    }
}

impl Pipeline<'_> {
    /// Runs `check`, and gets the draft unless the finding is `enough` without it. If the model
    /// takes concurrent calls, both run at the same time, and the draft is cancelled as soon as it
    /// is not needed.
    pub(crate) async fn draft_while<T>(
        &mut self,
        q: &Query<'_>,
        check: impl Future<Output = Result<T, Halt>> + Send,
        enough: fn(&T) -> bool,
    ) -> Result<(T, Option<String>), Halt> {
        let side_by_side = self.draft.is_none() && self.model.is_concurrent();
        let draft = future::maybe_done(self.draft(q));
        pin_mut!(draft);
        let background = side_by_side.then_some(draft.as_mut());
        let found = with_background(check, background).await?;
        if enough(&found) {
            return Ok((found, None));
        }
        draft.as_mut().await;
        let draft = draft.take_output().transpose()?;
        Ok((found, draft))
    }

    /// Step 1: the direct answer, with the images; the caller's draft, if there is one.
    pub(crate) async fn draft(&mut self, q: &Query<'_>) -> Result<String, Halt> {
        if let Some(draft) = self.draft.take() {
            return Ok(self.profile.stripped(&draft).to_owned());
        }
        let sampling =
            self.options.sampling.clone().unwrap_or_else(|| self.profile.direct.sampling());
        let reply = self.reply(Step::Direct, q.chat.clone(), &sampling, None).await?;
        Ok(self.profile.stripped(&reply.text).to_owned())
    }

    /// A finding about the draft that needs no question: one about this very draft from before, or
    /// none at all under `gate = "always"`.
    pub(crate) fn found_already(&mut self, step: Step) -> Option<Detection> {
        match step {
            Step::Detect if self.profile.gate == Gate::Always => Some(Detection::UNCHECKED),
            Step::Detect => self.found.take(),
            _ => None,
        }
    }

    /// Asks a question in all its wordings and windows; the most harmful finding counts. A harmful
    /// finding of at least `enough` weight ends it early.
    pub(crate) async fn ask(
        &mut self,
        step: Step,
        question: &Question,
        prompts: Vec<Asked<'_>>,
        enough: f64,
    ) -> Result<Detection, Halt> {
        if let Some(found) = self.found_already(step) {
            return Ok(found);
        }
        let mut worst: Option<Detection> = None;
        for ((chat, template), prior) in prompts {
            let key = match step {
                Step::RequestCheck => {
                    let options = self.options;
                    let sampling = Sampling { extra: options.extra.clone(), ..question.sampling() };
                    let (caller, model) = (&options.caller, self.model.name());
                    options.memory.key(caller, model, question, prior, &sampling, &chat)
                }
                _ => None,
            };
            let found = if let Some(known) = self.options.memory.finding(key) {
                known
            } else {
                let found = self.ask_once(step, question, prior, (chat, template)).await?;
                self.options.memory.keep(key, found);
                found
            };
            worst = Some(worst.map_or(found, |worst| worst.or(found)));
            if found.is_harmful() && found.weight >= enough {
                break;
            }
        }
        Ok(worst.unwrap_or(Detection::SAFE))
    }

    async fn ask_once(
        &mut self,
        step: Step,
        question: &Question,
        prior: f64,
        (chat, template): Prompt<'_>,
    ) -> Result<Detection, Halt> {
        let roomy = question.max_tokens.max(ROOM_TO_THINK);
        let limits = if self.thinks() {
            [None, Some(roomy)]
        } else {
            [Some(question.max_tokens), Some(roomy)]
        };
        for max_tokens in limits.into_iter().flatten() {
            let extra = self.options.extra.clone();
            let sampling = Sampling { extra, max_tokens: Some(max_tokens), ..question.sampling() };
            let call = Call::new(step, self.model, chat.clone(), Some(template)).of(question);
            let reply = match self.generate(&call, &sampling).await {
                Err(ModelError::Filtered(_))
                    if self.profile.content_filter == ContentFilter::Harm =>
                {
                    Reply { finish: FinishReason::ContentFilter, ..Reply::default() }
                }
                reply => reply.map_err(|error| call.failed(error))?,
            };
            let is_filtered = reply.finish == FinishReason::ContentFilter
                && self.profile.content_filter == ContentFilter::Harm;
            let found = if is_filtered {
                Some(Detection::FILTERED)
            } else {
                Detection::read(question, prior, &reply)
            };
            self.record(call.end(&reply, found)).await;
            if let Some(found) = found {
                if max_tokens > question.max_tokens {
                    self.options
                        .memory
                        .remember_that_it_thinks(self.model.name(), &self.options.extra);
                }
                return Ok(found);
            }
            if !ended_before_answer(&reply) {
                break;
            }
        }
        Err(Halt::Failed(GuardError::NoVerdict { step }))
    }

    /// Step 3: each image of the conversation as text.
    pub(crate) async fn describe(&mut self, q: &Query<'_>) -> Result<Vec<String>, Halt> {
        let mut captions = Vec::new();
        for (_, prompt) in q.captions() {
            captions.push(self.caption(prompt).await?);
        }
        Ok(captions)
    }

    /// Step 3 in two parts: the words printed in each image, and what it shows. A model that turns
    /// images into text by itself returns this text without a call.
    pub(crate) async fn image_texts(&mut self, q: &Query<'_>) -> Result<Vec<ImageText>, Halt> {
        let mut texts = Vec::new();
        for (image, prompt) in q.captions() {
            let call = Call::new(Step::Caption, self.model, prompt.0.clone(), None);
            match self
                .model
                .image_text(image)
                .instrument(call.span.clone())
                .await
                .map_err(|error| call.failed(error))?
            {
                Some(read) => {
                    let usage = Some(Usage { prompt_tokens: 0, completion_tokens: 0 });
                    let reply = Reply { text: read.to_string(), usage, ..Reply::default() };
                    self.record(call.end(&reply, None)).await;
                    texts.push(read);
                }
                None => texts.push(ImageText::parse(&self.caption(prompt).await?)),
            }
        }
        Ok(texts)
    }

    /// One image as text.
    async fn caption(&mut self, (chat, template): Prompt<'_>) -> Result<String, Halt> {
        let sampling =
            Sampling { extra: self.options.extra.clone(), ..self.profile.caption.sampling() };
        let is_judged = matches!(self.profile.method, Method::Hardened(_));
        let is_cut = |reply: &Reply| is_judged && reply.finish == FinishReason::Length;
        let mut reply =
            self.unless_filtered(Step::Caption, chat.clone(), &sampling, template).await?;
        if reply.as_ref().is_some_and(|reply| is_unsaid(reply) || is_cut(reply)) {
            // The model reasons first, or the image has much text, and the token limit was too low.
            let room = if is_judged { CAPTION_ROOM } else { ROOM_TO_THINK };
            let roomy = Sampling { max_tokens: sampling.max_tokens.max(Some(room)), ..sampling };
            reply = self.unless_filtered(Step::Caption, chat, &roomy, template).await?;
        }
        let fault = match &reply {
            Some(reply) if is_unsaid(reply) => Some("it was cut off before its first word"),
            // The model would see words that were not judged.
            Some(reply) if is_cut(reply) => {
                Some("the image has more text than `caption.max_tokens` allows")
            }
            _ => None,
        };
        if let Some(fault) = fault {
            let source = ModelError::Protocol(fault.into());
            return Err(Halt::Failed(GuardError::Model { step: Step::Caption, source }));
        }
        self.is_filtered |= reply.is_none();
        let caption = reply.map(|reply| reply.text).unwrap_or_default();
        // An image can contain reasoning marks. So if the model is not known to reason, nothing in
        // its reply is taken for reasoning.
        let said = match self.thinks() {
            false => caption.as_str(),
            true if is_judged => caption_behind_reasoning(&caption),
            true => without_reasoning(&caption).unwrap_or_default(),
        };
        Ok(self.profile.stripped(said).to_owned())
    }

    /// Whether the model is known to think before it answers.
    fn thinks(&self) -> bool {
        self.options.memory.thinks(self.model.name(), &self.options.extra)
    }

    /// Whether a content filter refused to describe an image and the profile counts that as harm.
    pub(crate) fn was_filtered(&self) -> bool {
        self.is_filtered
    }

    /// Decides about the draft by the finding, and returns whether it may go out. If not, and the
    /// profile never rewrites, the answer is the fixed refusal.
    pub(crate) async fn decide(&mut self, found: Detection) -> Result<bool, Halt> {
        (self.outcome.verdict, self.outcome.score) = (found.verdict, found.score);
        let rewritten = self.profile.gate == Gate::Always || found.is_harmful();
        self.outcome.rewritten = rewritten;
        self.tell(Event::Decided { verdict: found.verdict, rewritten }).await;
        if rewritten && self.profile.rewrite == Rewrite::Refuse {
            return Err(Halt::Refuse);
        }
        Ok(!rewritten)
    }

    /// Releases the draft of a conversation that is not guarded.
    pub(crate) async fn pass(&mut self, q: &Query<'_>) -> Result<(), Halt> {
        let y = self.draft(q).await?;
        self.tell(Event::Decided { verdict: Verdict::Unchecked, rewritten: false }).await;
        self.release(y).await
    }

    /// Step 4, streamed: the answer with eyes closed.
    pub(crate) async fn write(&mut self, q: &Query<'_>, captions: &[String]) -> Result<(), Halt> {
        let has_hints = q.has_hints(captions);
        let is_blank = captions.iter().all(|caption| caption.trim().is_empty());
        if is_blank && !captions.is_empty() && self.profile.empty_caption == EmptyCaption::Refuse {
            return Err(Halt::Refuse);
        }
        let (chat, template) = q.safe(captions, self.profile.safe.chosen(has_hints));
        let sampling =
            self.options.sampling.clone().unwrap_or_else(|| self.profile.safe.sampling());
        let call = Call::new(Step::Safe, self.model, chat, Some(template));
        self.tell(call.started()).await;
        let begun = self.model.stream(&call.chat, &sampling).instrument(call.span.clone());
        let mut deltas = begun.await.map_err(|error| call.failed(error))?;
        let mut reply = Reply::default();
        let mut trim = Trim::default();
        loop {
            let cut_off = || ModelError::Protocol("the stream broke off before its end".into());
            let delta =
                deltas.next().instrument(call.span.clone()).await.unwrap_or_else(|| Err(cut_off()));
            match delta.map_err(|error| call.failed(error))? {
                Delta::FirstToken(_) => {}
                Delta::Reasoning(text) => reply.reasoning.push_str(&text),
                Delta::Text(text) => {
                    reply.text.push_str(&text);
                    let text = if self.profile.strip { trim.push(&text) } else { text };
                    if !text.is_empty() {
                        self.release(text).await?;
                    }
                }
                Delta::End { finish, usage, took } => {
                    (reply.finish, reply.usage, reply.took) = (finish, usage, took);
                    self.record(call.end(&reply, None)).await;
                    return Ok(());
                }
            }
        }
    }

    /// Step 4, whole: an answer with eyes closed that will be judged. If a content filter refuses
    /// it, the answer is the fixed refusal.
    pub(crate) async fn compose(&mut self, (chat, template): Prompt<'_>) -> Result<String, Halt> {
        let sampling =
            self.options.sampling.clone().unwrap_or_else(|| self.profile.safe.sampling());
        let reply = self
            .unless_filtered(Step::Safe, chat, &sampling, template)
            .await?
            .ok_or(Halt::Refuse)?;
        Ok(self.profile.stripped(&reply.text).to_owned())
    }

    /// Sends text of the answer to the listener.
    pub(crate) async fn release(&mut self, text: String) -> Result<(), Halt> {
        self.outcome.answer.push_str(&text);
        self.tell(Event::Answer(text)).await;
        Ok(())
    }

    /// Releases the fixed refusal.
    async fn refuse(&mut self) -> Result<(), Halt> {
        self.outcome.refused = true;
        self.release(self.profile.refusal.clone()).await
    }

    /// A whole reply; `None` if a content filter refused it and the profile counts that as harm.
    async fn unless_filtered(
        &mut self,
        step: Step,
        chat: Chat,
        sampling: &Sampling,
        template: &Template,
    ) -> Result<Option<Reply>, Halt> {
        let is_sign = self.profile.content_filter == ContentFilter::Harm;
        match self.reply(step, chat, sampling, Some(template)).await {
            Ok(reply) => {
                Ok(Some(reply)
                    .filter(|reply| !is_sign || reply.finish != FinishReason::ContentFilter))
            }
            Err(GuardError::Model { source: ModelError::Filtered(_), .. }) if is_sign => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// A whole reply.
    async fn reply(
        &mut self,
        step: Step,
        chat: Chat,
        sampling: &Sampling,
        template: Option<&Template>,
    ) -> Result<Reply, GuardError> {
        let call = Call::new(step, self.model, chat, template);
        let reply = self.generate(&call, sampling).await.map_err(|error| call.failed(error))?;
        self.record(call.end(&reply, None)).await;
        Ok(reply)
    }

    async fn generate(
        &mut self,
        call: &Call<'_>,
        sampling: &Sampling,
    ) -> Result<Reply, ModelError> {
        self.tell(call.started()).await;
        self.model.generate(&call.chat, sampling).instrument(call.span.clone()).await
    }

    async fn tell(&mut self, event: Event) {
        // A listener that is gone has dropped this work as well.
        let _ = self.listener.send(Ok(event)).await;
    }

    async fn record(&mut self, trace: Trace) {
        self.outcome.steps.push(trace.clone());
        self.tell(Event::Finished(trace)).await;
    }
}

/// Whether a description was cut off before its first word.
fn is_unsaid(reply: &Reply) -> bool {
    ended_before_answer(reply)
        && without_reasoning(&reply.text).unwrap_or_default().trim().is_empty()
}

/// One call of the model, with a span of its own that contains no text of the conversation.
struct Call<'a> {
    step: Step,
    chat: Chat,
    template: Option<&'a Template>,
    question: Option<&'a str>,
    begun: Instant,
    span: Span,
}

impl<'a> Call<'a> {
    fn new(step: Step, model: &dyn Mllm, chat: Chat, template: Option<&'a Template>) -> Self {
        let span = tracing::info_span!(
            "step",
            otel.name = %step,
            otel.kind = "client",
            gen_ai.operation.name = "chat",
            gen_ai.request.model = model.name(),
            gen_ai.usage.input_tokens = field::Empty,
            gen_ai.usage.output_tokens = field::Empty,
            ecso.images = chat.image_count(),
            ecso.verdict = field::Empty,
            ecso.score = field::Empty,
            otel.status_code = field::Empty,
            otel.status_description = field::Empty,
        );
        Self { step, chat, template, question: None, begun: Instant::now(), span }
    }

    /// A call that asks a question.
    fn of(self, question: &'a Question) -> Self {
        Self { question: Some(question.name.as_str()).filter(|name| !name.is_empty()), ..self }
    }

    fn started(&self) -> Event {
        Event::Started { step: self.step, images: self.chat.image_count() }
    }

    fn failed(&self, error: ModelError) -> GuardError {
        self.span.record("otel.status_code", "error");
        self.span.record("otel.status_description", field::display(&error));
        GuardError::Model { step: self.step, source: error }
    }

    /// Ends the call: returns its trace, and records the same numbers in its span.
    fn end(self, reply: &Reply, found: Option<Detection>) -> Trace {
        let trace = self.trace(reply, found);
        self.span.record("gen_ai.usage.input_tokens", trace.prompt_tokens);
        self.span.record("gen_ai.usage.output_tokens", trace.completion_tokens);
        self.span.record("ecso.verdict", trace.verdict.map(Verdict::as_str));
        self.span.record("ecso.score", trace.score);
        trace
    }

    fn trace(&self, reply: &Reply, found: Option<Detection>) -> Trace {
        Trace {
            step: self.step,
            images: self.chat.image_count(),
            prompt: self
                .chat
                .turns
                .iter()
                .rev()
                .find(|turn| turn.role == Role::User)
                .map_or_else(String::new, Turn::joined_text),
            reply: reply.text.clone(),
            verdict: found.map(|found| found.verdict),
            score: found.and_then(|found| found.score),
            question: self.question.map(str::to_owned),
            template: self.template.map(Template::hash),
            finish: reply.finish,
            ms: u64::try_from(reply.took.unwrap_or_else(|| self.begun.elapsed()).as_millis())
                .unwrap_or(u64::MAX),
            prompt_tokens: reply.usage.map(|usage| usage.prompt_tokens),
            completion_tokens: reply.usage.map(|usage| usage.completion_tokens),
        }
    }
}

/// `str::trim` for text that comes in pieces: white space at the start goes, white space at the end
/// is held back until more text shows that it was not the end.
#[derive(Default)]
struct Trim {
    begun: bool,
    held: String,
}

impl Trim {
    fn push(&mut self, text: &str) -> String {
        let text = if self.begun { text } else { text.trim_start() };
        let solid = text.trim_end();
        if solid.is_empty() {
            if self.begun {
                self.held.push_str(text);
            }
            return String::new();
        }
        self.begun = true;
        let mut shown = std::mem::take(&mut self.held);
        shown.push_str(solid);
        self.held.push_str(&text[solid.len()..]);
        shown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn trimming_in_pieces_is_trimming(pieces: Vec<String>, spaces in proptest::collection::vec("[ \n]{0,2}[a-z]?", 0..9)) {
            for pieces in [pieces, spaces] {
                let mut trim = Trim::default();
                let shown: String = pieces.iter().map(|piece| trim.push(piece)).collect();
                let whole = pieces.concat();
                proptest::prop_assert_eq!(shown, whole.trim());
            }
        }
    }
}
