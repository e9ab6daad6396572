//! Findings that a guard remembers from one answer to the next.

use std::{
    num::NonZeroUsize,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use lru::LruCache;
use serde_json::{Map, Value};

use crate::{
    chat::{Chat, Part},
    mllm::Sampling,
    profile::Question,
    verdict::Detection,
};

/// How long a finding is kept. Not for ever: a server may change its model.
const LIFETIME: Duration = Duration::from_hours(1);

/// Findings about requests, by a digest of the question, so that a text that repeats from call to
/// call (an agent's long system message, its tools) is judged once. It also remembers which models
/// think before they say yes or no. Guards share it through [`GuardBuilder::memory`].
///
/// [`GuardBuilder::memory`]: crate::GuardBuilder::memory
#[derive(Debug)]
pub struct Memory {
    findings: Option<Mutex<LruCache<blake3::Hash, (Detection, Instant)>>>,
    thinking: Mutex<LruCache<blake3::Hash, ()>>,
}

/// How many models that think are remembered.
const THINKERS: NonZeroUsize = NonZeroUsize::new(64).unwrap();

impl Memory {
    /// A memory of at most `findings` findings (about 100 bytes each), each kept for an hour. 0
    /// keeps none.
    #[must_use]
    pub fn new(findings: usize) -> Self {
        let findings =
            NonZeroUsize::new(findings).map(|findings| Mutex::new(LruCache::new(findings)));
        Self { findings, thinking: Mutex::new(LruCache::new(THINKERS)) }
    }

    /// The key of a prompt: a digest of the caller, the model, how the question is read, and
    /// everything that is sent, including the client's request fields. `None` for a prompt with an
    /// image.
    pub(crate) fn key(
        &self,
        caller: &str,
        model: &str,
        question: &Question,
        prior: f64,
        sampling: &Sampling,
        prompt: &Chat,
    ) -> Option<blake3::Hash> {
        self.findings.as_ref()?;
        let mut hasher = blake3::Hasher::new();
        let mut add = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        };
        add(caller);
        add(model);
        add(&format!("{:?} {:?} {} {}", question.parser, question.harm, prior, question.threshold));
        add(&serde_json::to_string(sampling).ok()?);
        for turn in &prompt.turns {
            add(turn.role.as_str());
            for part in &turn.parts {
                match part {
                    Part::Text(text) => add(text),
                    Part::Image(_) => return None,
                }
            }
        }
        Some(hasher.finalize())
    }

    pub(crate) fn finding(&self, key: Option<blake3::Hash>) -> Option<Detection> {
        let (found, at) = lock(self.findings.as_ref()?).get(&key?).copied()?;
        (at.elapsed() < LIFETIME).then_some(found)
    }

    /// Keeps a finding that has a probability. A plain yes or no, or a filter's refusal, is not
    /// kept.
    pub(crate) fn keep(&self, key: Option<blake3::Hash>, found: Detection) {
        if let (Some(findings), Some(key), Some(_)) = (&self.findings, key, found.score) {
            lock(findings).put(key, (found, Instant::now()));
        }
    }

    /// Whether a model is known to think before it says yes or no, if it gets these `extra` fields:
    /// one of them may switch that on.
    pub(crate) fn thinks(&self, model: &str, extra: &Map<String, Value>) -> bool {
        lock(&self.thinking).contains(&thinker(model, extra))
    }

    pub(crate) fn remember_that_it_thinks(&self, model: &str, extra: &Map<String, Value>) {
        if lock(&self.thinking).put(thinker(model, extra), ()).is_none() {
            tracing::info!(
                model,
                "the model reasons before it says yes or no; its checks get more tokens from now on"
            );
        }
    }
}

/// Identifies a model that gets these fields.
fn thinker(model: &str, extra: &Map<String, Value>) -> blake3::Hash {
    blake3::hash(&serde_json::to_vec(&(model, extra)).unwrap_or_default())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
