//! A reply that is being written: one token after the other, as text.

use std::ops::ControlFlow;

use ecso::{Delta, FinishReason, Sampling, Usage};
use llama_cpp_2::{sampling::LlamaSampler, token::LlamaToken};

use crate::{engine::Engine, layout::End, schedule::Job};

/// The reply to a job.
pub(crate) struct Writing {
    job: Job,
    sequence: usize,
    /// The token that was sampled last, and where it goes; the next batch computes it.
    token: LlamaToken,
    at: End,
    sampler: LlamaSampler,
    text: Utf8,
    usage: Usage,
    /// The tokens that were computed: all but the last.
    computed: Vec<LlamaToken>,
}

/// A reply that has ended.
#[derive(Debug, Default)]
pub(crate) struct Written {
    /// Its tokens that were computed after its prompt.
    pub(crate) computed: Vec<LlamaToken>,
    /// Its last token, if that was not computed because there was no room for another one.
    pub(crate) last: Option<Next>,
}

/// A reply that continues, or has ended.
pub(crate) type Progress = ControlFlow<Written, Writing>;

impl Writing {
    /// Begins the reply to a prompt that was computed in `sequence` up to `end`; `row` of the last
    /// batch has the logits for its first token.
    pub(crate) fn begin(
        engine: &Engine<'_>,
        job: Job,
        sequence: usize,
        end: End,
        row: i32,
    ) -> Progress {
        if job.sampling.top_logprobs > 0 {
            let likeliest = engine.likeliest(row, job.sampling.top_logprobs.into());
            let _ = job.reply.send(Ok(Delta::FirstToken(likeliest)));
        }
        let prompt_tokens = u32::try_from(end.cells).unwrap_or(u32::MAX);
        let mut begun = Self {
            sequence,
            token: LlamaToken(0),
            at: end,
            sampler: sampler(&job.sampling),
            text: Utf8::default(),
            usage: Usage { prompt_tokens, completion_tokens: 0 },
            computed: Vec::new(),
            job,
        };
        if begun.is_full() {
            return begun.end(FinishReason::Length);
        }
        begun.token = engine.sample(&mut begun.sampler, row);
        begun.take(engine)
    }

    /// Takes the next token from a row of the last batch, which computed the one before it. The
    /// reply ends if it is complete, or if the caller has dropped the stream.
    pub(crate) fn advance(mut self, engine: &Engine<'_>, row: i32) -> Progress {
        self.computed.push(self.token);
        self.at = self.at.after_text(1);
        self.token = engine.sample(&mut self.sampler, row);
        self.take(engine)
    }

    /// Sends the token that was sampled.
    fn take(mut self, engine: &Engine<'_>) -> Progress {
        let Some(bytes) = engine.spelled(self.token) else {
            return self.end(FinishReason::Stop);
        };
        self.usage.completion_tokens += 1;
        let fresh = self.text.push(&bytes);
        let sent = fresh.is_empty() || self.job.reply.send(Ok(Delta::Text(fresh))).is_ok();
        if !sent || self.job.reply.is_closed() {
            return ControlFlow::Break(Written { computed: self.computed, last: None });
        }
        if self.is_full() || !engine.has_room(self.at) {
            return self.end(FinishReason::Length);
        }
        ControlFlow::Continue(self)
    }

    /// Whether it has as many tokens as the caller allows.
    fn is_full(&self) -> bool {
        self.job.sampling.max_tokens.is_some_and(|limit| self.usage.completion_tokens >= limit)
    }

    fn end(mut self, finish: FinishReason) -> Progress {
        let rest = std::mem::take(&mut self.text).rest();
        if !rest.is_empty() {
            let _ = self.job.reply.send(Ok(Delta::Text(rest)));
        }
        let end = Delta::End { finish, usage: Some(self.usage), took: None };
        let _ = self.job.reply.send(Ok(end));
        let last = (finish == FinishReason::Length).then(|| self.next());
        ControlFlow::Break(Written { computed: self.computed, last })
    }

    pub(crate) fn sequence(&self) -> usize {
        self.sequence
    }

    /// What the next batch computes for it.
    pub(crate) fn next(&self) -> Next {
        Next { token: self.token, at: self.at, sequence: self.sequence }
    }

    pub(crate) fn job(&self) -> &Job {
        &self.job
    }
}

/// A token of a batch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Next {
    pub(crate) token: LlamaToken,
    pub(crate) at: End,
    pub(crate) sequence: usize,
}

fn sampler(sampling: &Sampling) -> LlamaSampler {
    let Some(temperature) = sampling.temperature.filter(|temperature| *temperature > 0.0) else {
        return LlamaSampler::greedy();
    };
    let top_p = LlamaSampler::top_p(sampling.top_p.unwrap_or(1.0), 1);
    LlamaSampler::chain_simple([
        top_p,
        LlamaSampler::temp(temperature),
        LlamaSampler::dist(sampling.seed.unwrap_or(0)),
    ])
}

/// Joins the bytes of tokens, which may end within a character, to text.
#[derive(Default)]
struct Utf8 {
    held: Vec<u8>,
}

impl Utf8 {
    fn push(&mut self, bytes: &[u8]) -> String {
        self.held.extend_from_slice(bytes);
        let mut text = String::new();
        let mut done = 0;
        for chunk in self.held.utf8_chunks() {
            text.push_str(chunk.valid());
            done += chunk.valid().len();
            let at_end = done + chunk.invalid().len() == self.held.len();
            if chunk.invalid().is_empty() || (at_end && chunk.invalid().len() < 4) {
                break;
            }
            text.push(char::REPLACEMENT_CHARACTER);
            done += chunk.invalid().len();
        }
        self.held.drain(..done);
        text
    }

    fn rest(self) -> String {
        String::from_utf8_lossy(&self.held).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn characters_split_over_tokens_are_joined(text: String, size in 1..5_usize) {
            let mut utf8 = Utf8::default();
            let mut read: String = text.as_bytes().chunks(size).map(|token| utf8.push(token)).collect();
            read.push_str(&utf8.rest());
            proptest::prop_assert_eq!(read, text);
        }

        #[test]
        fn invalid_bytes_neither_panic_nor_accumulate(tokens: Vec<Vec<u8>>) {
            let mut utf8 = Utf8::default();
            for token in tokens {
                utf8.push(&token);
                proptest::prop_assert!(utf8.held.len() < 4);
            }
        }
    }
}
