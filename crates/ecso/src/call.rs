//! The calls that the steps make: timed, traced, and told to whoever listens.

use std::time::Instant;

use futures::{
    SinkExt, Stream, StreamExt,
    channel::mpsc,
    future::{self, BoxFuture},
    stream,
};
use tracing::{Instrument, Span, field};

use crate::{
    chat::Chat,
    mllm::{Mllm, ModelError, Piece, Reply, Sampling},
    profile::{Profile, Question, Turns},
    prompt::Query,
    template::Template,
    trace::{Event, GuardError, Outcome, Step, Trace},
    verdict::{Finding, Verdict},
};

/// The steps under way.
pub(crate) struct Work<'a> {
    model: &'a dyn Mllm,
    pub(crate) profile: &'a Profile,
    /// What happened so far.
    pub(crate) outcome: Outcome,
    listener: mpsc::Sender<Result<Event, GuardError>>,
}

/// The events of some work, as they happen. The work goes on only while somebody listens; its last event is the outcome, or
/// why there is none.
pub(crate) fn events<'a>(
    model: &'a dyn Mllm,
    profile: &'a Profile,
    work: impl for<'w> FnOnce(&'w mut Work<'a>) -> BoxFuture<'w, Result<(), GuardError>> + Send + 'a,
) -> impl Stream<Item = Result<Event, GuardError>> + Send + 'a {
    let (listener, told) = mpsc::channel(0);
    let outcome = Outcome {
        answer: String::new(),
        verdict: Verdict::Unchecked,
        score: None,
        rewritten: false,
        profile: profile.name.clone(),
        model: model.name().to_owned(),
        steps: Vec::new(),
    };
    let worked = async move {
        let mut under_way = Work { model, profile, outcome, listener };
        let ended = work(&mut under_way).await;
        let Work { outcome, mut listener, .. } = under_way;
        let _ = listener.send(ended.map(|()| Event::Done(outcome))).await;
    };
    stream::select(told, stream::once(worked).filter_map(|()| future::ready(None)))
}

impl Work<'_> {
    async fn tell(&mut self, event: Event) {
        // Whoever stopped listening has dropped this work as well.
        let _ = self.listener.send(Ok(event)).await;
    }

    /// A whole reply, stripped if the profile says so.
    pub(crate) async fn reply(
        &mut self,
        step: Step,
        chat: Chat,
        sampling: &Sampling,
        template: Option<&Template>,
    ) -> Result<String, GuardError> {
        let call = Call::new(step, self.model, chat, template);
        let reply = self.generate(&call, sampling).await?;
        self.record(call.end(&reply, None)).await;
        Ok(self.profile.stripped(&reply.text))
    }

    /// What a question finds in any of its wordings, up to the first that finds harm; joined with an earlier finding.
    pub(crate) async fn ask(
        &mut self,
        step: Step,
        question: &Question,
        asked: Vec<(Chat, &Template)>,
        with: Option<Finding>,
    ) -> Result<Finding, GuardError> {
        let mut worst = Finding::of(Verdict::Safe, None);
        for (chat, template) in asked {
            let call = Call::new(step, self.model, chat, Some(template));
            let reply = self.generate(&call, &question.sampling()).await?;
            let found = question.read(&reply, with);
            self.record(call.end(&reply, Some(found))).await;
            worst = worst.or(found);
            if worst.verdict == Verdict::Unsafe {
                break;
            }
        }
        Ok(worst)
    }

    /// Answers with a reply as it is written.
    pub(crate) async fn write(
        &mut self,
        step: Step,
        chat: Chat,
        sampling: Sampling,
        template: &Template,
    ) -> Result<(), GuardError> {
        let call = Call::new(step, self.model, chat, Some(template));
        self.tell(call.started()).await;
        let begun = self.model.stream(&call.chat, &sampling).instrument(call.span.clone());
        let mut pieces = begun.await.map_err(|error| call.failed(error))?;
        let mut reply = Reply::default();
        let mut trim = Trim::default();
        loop {
            let cut_off = || ModelError::Protocol("the stream broke off before its end".into());
            let piece = pieces.next().instrument(call.span.clone()).await.unwrap_or_else(|| Err(cut_off()));
            match piece.map_err(|error| call.failed(error))? {
                Piece::FirstToken(_) => {}
                Piece::Text(text) => {
                    reply.text.push_str(&text);
                    let text = if self.profile.strip { trim.push(&text) } else { text };
                    if !text.is_empty() {
                        self.answer(text).await?;
                    }
                }
                Piece::End { finish, usage, took } => {
                    (reply.finish, reply.usage, reply.took) = (finish, usage, took);
                    self.record(call.end(&reply, None)).await;
                    return Ok(());
                }
            }
        }
    }

    /// Decides about the draft.
    pub(crate) async fn decide(&mut self, rewritten: bool) {
        self.outcome.rewritten = rewritten;
        self.tell(Event::Decided { verdict: self.outcome.verdict, rewritten }).await;
    }

    /// Adds text to the answer.
    pub(crate) async fn answer(&mut self, text: String) -> Result<(), GuardError> {
        self.outcome.answer.push_str(&text);
        self.tell(Event::Answer(text)).await;
        Ok(())
    }

    async fn generate(&mut self, call: &Call<'_>, sampling: &Sampling) -> Result<Reply, GuardError> {
        self.tell(call.started()).await;
        let reply = self.model.generate(&call.chat, sampling).instrument(call.span.clone());
        reply.await.map_err(|error| call.failed(error))
    }

    async fn record(&mut self, trace: Trace) {
        self.outcome.steps.push(trace.clone());
        self.tell(Event::Finished(trace)).await;
    }
}

/// One call of the model, with a span of its own; no text of the conversation stands in it.
struct Call<'a> {
    step: Step,
    chat: Chat,
    template: Option<&'a Template>,
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
        Self { step, chat, template, begun: Instant::now(), span }
    }

    fn started(&self) -> Event {
        Event::Started { step: self.step, images: self.chat.image_count() }
    }

    fn failed(&self, error: ModelError) -> GuardError {
        self.span.record("otel.status_code", "error");
        self.span.record("otel.status_description", field::display(&error));
        GuardError::Model { step: self.step, error }
    }

    /// What is left of the call: its trace, and the same figures in its span.
    fn end(self, reply: &Reply, found: Option<Finding>) -> Trace {
        let trace = self.trace(reply, found);
        self.span.record("gen_ai.usage.input_tokens", trace.prompt_tokens);
        self.span.record("gen_ai.usage.output_tokens", trace.completion_tokens);
        self.span.record("ecso.verdict", trace.verdict.map(Verdict::as_str));
        self.span.record("ecso.score", trace.score);
        trace
    }

    fn trace(&self, reply: &Reply, found: Option<Finding>) -> Trace {
        Trace {
            step: self.step,
            images: self.chat.image_count(),
            prompt: Query::of(&self.chat, Turns::Last).map_or_else(String::new, |query| query.text),
            reply: reply.text.clone(),
            verdict: found.map(|found| found.verdict),
            score: found.and_then(|found| found.score),
            template: self.template.map(Template::hash),
            finish: reply.finish,
            ms: u64::try_from(reply.took.unwrap_or_else(|| self.begun.elapsed()).as_millis()).unwrap_or(u64::MAX),
            prompt_tokens: reply.usage.map(|usage| usage.prompt_tokens),
            completion_tokens: reply.usage.map(|usage| usage.completion_tokens),
        }
    }
}

/// `str::trim` for text that comes in pieces: white space at the start goes, white space at the end is held back until
/// more text shows that it was not the end.
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
