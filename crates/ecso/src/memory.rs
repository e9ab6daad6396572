//! What a guard remembers from one answer to the next.

use std::{
    collections::HashSet,
    num::NonZeroUsize,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use lru::LruCache;

use crate::{
    chat::{Chat, Part},
    mllm::Sampling,
    profile::Question,
    verdict::Detection,
};

/// How long a finding is kept: a server may change its model.
const KEPT: Duration = Duration::from_hours(1);

/// What repeats from call to call, an agent's long system message or its tools, is judged once:
/// findings about requests, by a digest of the question. And which models think before they say yes
/// or no. Shared by all guards of a process that should know it.
#[derive(Debug)]
pub struct Memory {
    findings: Option<Mutex<LruCache<blake3::Hash, (Detection, Instant)>>>,
    thinking: Mutex<HashSet<String>>,
}

impl Memory {
    /// A memory of at most `findings` findings (about 100 bytes each); 0 keeps none.
    #[must_use]
    pub fn new(findings: usize) -> Self {
        let findings =
            NonZeroUsize::new(findings).map(|findings| Mutex::new(LruCache::new(findings)));
        Self { findings, thinking: Mutex::default() }
    }

    /// What a prompt is known by: the caller, the model, the question's way of reading, and all
    /// that is sent, fields of the client's among it. `None` for what holds an image.
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
        let (found, at) = held(self.findings.as_ref()?).get(&key?).copied()?;
        (at.elapsed() < KEPT).then_some(found)
    }

    /// Keeps what was found by its probability; a word, or a filter's refusal, is asked for again.
    pub(crate) fn keep(&self, key: Option<blake3::Hash>, found: Detection) {
        if let (Some(findings), Some(key), Some(_)) = (&self.findings, key, found.score) {
            held(findings).put(key, (found, Instant::now()));
        }
    }

    /// Whether a model is known to think before it says yes or no.
    pub(crate) fn thinks(&self, model: &str) -> bool {
        held(&self.thinking).contains(model)
    }

    pub(crate) fn learn_that_it_thinks(&self, model: &str) {
        if held(&self.thinking).insert(model.to_owned()) {
            tracing::info!(
                model,
                "the model says more than yes or no; its checks get more room from now on"
            );
        }
    }
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
