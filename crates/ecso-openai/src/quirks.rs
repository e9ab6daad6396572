//! Deviations of models from the protocol, and the memory of them.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use serde_json::{Map, Value};

/// A deviation of a model from the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Quirk {
    /// `max_tokens` is called `max_completion_tokens`.
    CompletionTokens,
    /// It has no system role.
    NoSystem,
    /// A temperature of 0 is refused; others are not.
    NoZero,
    /// A field is refused. `logprobs` stands for `top_logprobs` too.
    Without(&'static str),
}

/// The quirks of one model.
pub(crate) type Quirks = BTreeSet<Quirk>;

impl Quirk {
    /// Changes the fields of a request so that the model accepts it. Messages are not changed here:
    /// [`Quirk::NoSystem`] is applied before.
    pub(crate) fn apply(self, request: &mut Map<String, Value>) {
        match self {
            Self::CompletionTokens => {
                if let Some(limit) = request.remove("max_tokens") {
                    request.entry("max_completion_tokens").or_insert(limit);
                }
            }
            Self::NoSystem => {}
            Self::NoZero => {
                if request.get("temperature").and_then(Value::as_f64) == Some(0.0) {
                    request.remove("temperature");
                }
            }
            Self::Without(field) => {
                request.remove(field);
                if field == "logprobs" {
                    request.remove("top_logprobs");
                }
            }
        }
    }

    /// Whether it concerns an optional field. The server may accept such a field later, after a
    /// restart with other settings.
    fn is_optional(self) -> bool {
        matches!(self, Self::Without("logprobs" | "stream_options"))
    }
}

impl fmt::Display for Quirk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CompletionTokens => f.write_str("max_tokens is sent as max_completion_tokens"),
            Self::NoSystem => {
                f.write_str("system messages are put before the first user turn's text")
            }
            Self::NoZero => f.write_str("a temperature of 0 is left out"),
            Self::Without(field) => write!(f, "{field} is left out"),
        }
    }
}

/// What is known about a server's models. Only quirks with which a request succeeded are kept.
#[derive(Debug)]
pub(crate) struct Memory {
    forget_after: Duration,
    /// By model: each quirk, and when it was last seen.
    found: Mutex<HashMap<String, HashMap<Quirk, Instant>>>,
    /// By requested model: the models that replies name.
    answering: Mutex<HashMap<String, BTreeSet<String>>>,
}

impl Memory {
    /// A memory that forgets refused optional fields after a while. Other quirks stay.
    pub(crate) fn new(forget_after: Duration) -> Self {
        Self { forget_after, found: Mutex::default(), answering: Mutex::default() }
    }

    /// The known quirks of `model`.
    pub(crate) fn of(&self, model: &str) -> Quirks {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let quirks = found.get(model).into_iter().flatten();
        let known =
            quirks.filter(|(quirk, at)| !quirk.is_optional() || at.elapsed() < self.forget_after);
        known.map(|(quirk, _)| *quirk).collect()
    }

    /// Warns, once for each model, if a reply names another model than the `requested` one or than
    /// earlier replies. A longer form of the same name does not count: a date, a path.
    pub(crate) fn note_answering_model(&self, requested: &str, answering: &str) {
        /// Some servers make up a name for each reply, so no more names are kept.
        const MAX_NAMES: usize = 8;
        let mut all = self.answering.lock().unwrap_or_else(PoisonError::into_inner);
        let known = all.entry(requested.to_owned()).or_default();
        if known.len() >= MAX_NAMES
            || !known.insert(answering.to_owned())
            || is_same(requested, answering) && known.len() == 1
        {
            return;
        }
        tracing::warn!(
            asked = %requested,
            %answering,
            "replies come from another model than the requested one, or than before"
        );
    }

    /// Keeps a quirk with which `model` has just answered, and warns the first time.
    pub(crate) fn learn(&self, model: &str, quirk: Quirk, reason: &str) {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if found.entry(model.to_owned()).or_default().insert(quirk, Instant::now()).is_none() {
            tracing::warn!(
                %model,
                %reason,
                "the server refused a request; for this model {quirk} from now on"
            );
        }
    }
}

/// Whether one name is the other with a date or a version after it, or a path before it.
fn is_same(requested: &str, answering: &str) -> bool {
    let plain = |name: &str| name.rsplit('/').next().unwrap_or(name).to_lowercase();
    let (requested, answering) = (plain(requested), plain(answering));
    let (short, long) = if requested.len() <= answering.len() {
        (requested, answering)
    } else {
        (answering, requested)
    };
    let Some(rest) = long.strip_prefix(&short) else { return false };
    rest.is_empty()
        || rest == ".gguf"
        || rest.starts_with(['-', '@', ':', '.'])
            && rest.chars().all(|c| c.is_ascii_digit() || "-@:._v".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_a_date_or_a_path_are_the_same() {
        for (asked, answering, same) in [
            ("gpt-4o", "gpt-4o-2024-08-06", true),
            ("qwen2.5-7b", "org/Qwen2.5-7B", true),
            ("m", "models/m.gguf", true),
            ("m:latest", "m", false),
            ("gpt-4", "gpt-4o-mini", false),
            ("m", "gemma-uncensored", false),
            ("qwen2.5-7b", "qwen2.5-7b-abliterated", false),
        ] {
            assert_eq!(is_same(asked, answering), same, "{asked} {answering}");
        }
    }

    #[test]
    fn quirks_are_kept_by_model() {
        let memory = Memory::new(Duration::from_mins(1));
        memory.learn("a", Quirk::Without("logprobs"), "no");
        memory.learn("b", Quirk::NoSystem, "no");
        memory.learn("b", Quirk::Without("seed"), "no");
        assert_eq!(memory.of("a"), Quirks::from([Quirk::Without("logprobs")]));
        assert_eq!(memory.of("b"), Quirks::from([Quirk::NoSystem, Quirk::Without("seed")]));
        assert_eq!(memory.of("c"), Quirks::new());
    }

    #[test]
    fn only_optional_fields_are_forgotten() {
        let memory = Memory::new(Duration::ZERO);
        for quirk in [
            Quirk::Without("logprobs"),
            Quirk::Without("stream_options"),
            Quirk::Without("temperature"),
        ] {
            memory.learn("a", quirk, "no");
        }
        assert_eq!(memory.of("a"), Quirks::from([Quirk::Without("temperature")]));
    }
}
