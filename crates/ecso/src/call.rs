//! One call of the model, timed and traced.

use std::time::Instant;

use async_stream::try_stream;
use futures::{StreamExt, stream::BoxStream};

use crate::{
    chat::Chat,
    mllm::{Mllm, ModelError, Piece, Reply, Sampling},
    profile::Profile,
    prompt::Query,
    template::Template,
    trace::{Event, GuardError, Outcome, Step, Trace},
    verdict::Verdict,
};

pub(crate) struct Call<'a> {
    step: Step,
    chat: Chat,
    template: Option<&'a Template>,
    begun: Instant,
}

/// What a streamed call yields.
pub(crate) enum Written {
    /// More of the reply.
    Text(String),
    /// The end.
    Done(Trace),
}

impl<'a> Call<'a> {
    pub(crate) fn new(step: Step, chat: Chat, template: Option<&'a Template>) -> Self {
        Self { step, chat, template, begun: Instant::now() }
    }

    pub(crate) fn started(&self) -> Event {
        Event::Started { step: self.step, images: self.chat.image_count() }
    }

    pub(crate) async fn generate(&self, model: &dyn Mllm, sampling: &Sampling) -> Result<(Reply, Trace), GuardError> {
        let reply = model.generate(&self.chat, sampling).await;
        let reply = reply.map_err(|error| self.failed(error))?;
        let trace = self.trace(&reply);
        Ok((reply, trace))
    }

    /// The reply as it is written; with `strip`, without the white space around it.
    pub(crate) fn stream<'s>(
        &'s self,
        model: &'s dyn Mllm,
        sampling: Sampling,
        strip: bool,
    ) -> BoxStream<'s, Result<Written, GuardError>> {
        try_stream! {
            let mut pieces = model.stream(&self.chat, &sampling).await.map_err(|error| self.failed(error))?;
            let mut reply = Reply::default();
            let mut trim = Trim::default();
            loop {
                let cut_off = || ModelError::Protocol("the stream broke off before its end".into());
                let piece = pieces.next().await.unwrap_or_else(|| Err(cut_off()));
                match piece.map_err(|error| self.failed(error))? {
                    Piece::FirstToken(_) => {}
                    Piece::Text(text) => {
                        reply.text.push_str(&text);
                        let text = if strip { trim.push(&text) } else { text };
                        if !text.is_empty() {
                            yield Written::Text(text);
                        }
                    }
                    Piece::End { finish, usage, took } => {
                        (reply.finish, reply.usage, reply.took) = (finish, usage, took);
                        yield Written::Done(self.trace(&reply));
                        return;
                    }
                }
            }
        }
        .boxed()
    }

    fn failed(&self, error: ModelError) -> GuardError {
        GuardError::Model { step: self.step, error }
    }

    fn trace(&self, reply: &Reply) -> Trace {
        Trace {
            step: self.step,
            images: self.chat.image_count(),
            prompt: Query::of(&self.chat).map_or_else(String::new, |query| query.text),
            reply: reply.text.clone(),
            verdict: None,
            score: None,
            template: self.template.map(Template::hash),
            finish: reply.finish,
            ms: u64::try_from(reply.took.unwrap_or_else(|| self.begun.elapsed()).as_millis()).unwrap_or(u64::MAX),
            prompt_tokens: reply.usage.map(|usage| usage.prompt_tokens),
            completion_tokens: reply.usage.map(|usage| usage.completion_tokens),
        }
    }
}

impl Outcome {
    pub(crate) fn unchecked(profile: &Profile, model: &dyn Mllm) -> Self {
        Self {
            answer: String::new(),
            verdict: Verdict::Unchecked,
            score: None,
            rewritten: false,
            profile: profile.name.clone(),
            model: model.name().to_owned(),
            steps: Vec::new(),
        }
    }

    /// Keeps the trace of a call and tells of it.
    pub(crate) fn record(&mut self, trace: Trace) -> Event {
        self.steps.push(trace.clone());
        Event::Finished(trace)
    }

    /// Decides about the draft and tells of it.
    pub(crate) fn decide(&mut self, rewritten: bool) -> Event {
        self.rewritten = rewritten;
        Event::Decided { verdict: self.verdict, rewritten }
    }

    /// Adds text to the answer and tells of it.
    pub(crate) fn answer(&mut self, text: String) -> Event {
        self.answer.push_str(&text);
        Event::Answer(text)
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
