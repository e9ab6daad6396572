//! The jobs that are computed at the same time, and whose turn it is.
//!
//! Prompts are computed one segment after the other, each by itself: what a verdict is read from
//! never depends on what else runs. Replies are written together, a token of each in one batch: the
//! model's weights are read once for all of them. In between, jobs that no caller waits for are
//! dropped.
//!
//! Checks are short, and the text of a long reply may wait for them. So long replies leave one
//! sequence free, if there are several.

use std::{collections::VecDeque, ops::ControlFlow, sync::mpsc::Receiver};

use ecso::{Chat, Delta, ModelError, Sampling};
use tokio::sync::mpsc::UnboundedSender;

use crate::{
    engine::{Engine, Prompt, Reading},
    reply::{Next, Writing},
};

/// A reply that a caller waits for.
pub(crate) struct Job {
    pub(crate) chat: Chat,
    pub(crate) sampling: Sampling,
    pub(crate) reply: UnboundedSender<Result<Delta, ModelError>>,
}

impl Job {
    /// Whether its verdict is read from its first token. Other replies can be long.
    fn is_check(&self) -> bool {
        self.sampling.top_logprobs > 0
    }

    fn fail(&self, error: ModelError) {
        // Fails if the caller has dropped the stream.
        let _ = self.reply.send(Err(error));
    }
}

/// All jobs of an engine: each waits for a place, then its prompt is read, then its reply is
/// written.
pub(crate) struct Schedule<'m> {
    engine: Engine<'m>,
    waiting: VecDeque<(Job, Prompt)>,
    reading: VecDeque<(Job, Reading)>,
    /// In the order of their sequences.
    writing: Vec<Writing>,
}

impl<'m> Schedule<'m> {
    pub(crate) fn new(engine: Engine<'m>) -> Self {
        Self { engine, waiting: VecDeque::new(), reading: VecDeque::new(), writing: Vec::new() }
    }

    /// Runs all jobs until no more can be sent.
    pub(crate) fn run(mut self, inbox: &Receiver<Job>) {
        loop {
            if self.is_idle() {
                let Ok(job) = inbox.recv() else { return };
                self.take(job);
            }
            for job in inbox.try_iter() {
                self.take(job);
            }
            self.start();
            self.read();
            self.write();
        }
    }

    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.reading.is_empty() && self.writing.is_empty()
    }

    fn take(&mut self, job: Job) {
        match self.engine.prompt(&job.chat) {
            Ok(prompt) => self.waiting.push_back((job, prompt)),
            Err(error) => job.fail(error),
        }
    }

    /// The number of long replies that can begin now.
    fn free_for_long(&self) -> usize {
        let read = self.reading.iter().map(|(job, _)| job);
        let long = read.chain(self.writing.iter().map(Writing::job)).filter(|job| !job.is_check());
        let most = self.engine.slots().saturating_sub(1).max(1);
        most.saturating_sub(long.count())
    }

    /// Gives places to jobs that wait, first come, first served, except that a job may wait longer
    /// for a prompt that begins the same, and a long reply for the end of another one.
    fn start(&mut self) {
        let mut free_for_long = self.free_for_long();
        for _ in 0..self.waiting.len() {
            let Some((job, prompt)) = self.waiting.pop_front() else { return };
            if job.reply.is_closed() {
                continue;
            }
            if !job.is_check() && free_for_long == 0 {
                self.waiting.push_back((job, prompt));
                continue;
            }
            match self.engine.start(&prompt) {
                Ok(Some(reading)) => {
                    free_for_long -= usize::from(!job.is_check());
                    self.reading.push_back((job, reading));
                }
                Ok(None) => self.waiting.push_back((job, prompt)),
                Err(error) => job.fail(error),
            }
        }
    }

    /// Computes one segment of the prompt whose turn it is.
    fn read(&mut self) {
        let Some((job, mut reading)) = self.reading.pop_front() else { return };
        let sequence = reading.sequence;
        if job.reply.is_closed() {
            return self.engine.release(sequence);
        }
        match self.engine.read(&mut reading, &job.chat) {
            Ok(None) => self.reading.push_back((job, reading)),
            Ok(Some(row)) => match Writing::begin(&self.engine, job, sequence, reading.end, row) {
                ControlFlow::Continue(writing) => {
                    let at = self.writing.partition_point(|other| other.sequence() < sequence);
                    self.writing.insert(at, writing);
                }
                ControlFlow::Break(written) => self.engine.release_written(sequence, written),
            },
            Err(error) => {
                self.engine.discard(sequence);
                job.fail(error);
            }
        }
    }

    /// Computes the next token of every reply.
    fn write(&mut self) {
        if self.writing.is_empty() {
            return;
        }
        let next: Vec<Next> = self.writing.iter().map(Writing::next).collect();
        let decoded = self.engine.decode(&next);
        for (row, writing) in (0..).zip(std::mem::take(&mut self.writing)) {
            let sequence = writing.sequence();
            match &decoded {
                Ok(()) => match writing.advance(&self.engine, row) {
                    ControlFlow::Continue(writing) => self.writing.push(writing),
                    ControlFlow::Break(written) => self.engine.release_written(sequence, written),
                },
                Err(error) => {
                    self.engine.discard(sequence);
                    writing.job().fail(error.clone());
                }
            }
        }
    }
}
