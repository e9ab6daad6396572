//! Where a model differs from the protocol, and the memory of it.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use serde_json::{Map, Value};

/// A way in which a model differs from the protocol.
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
    /// Makes the fields of a request what the model takes. Its messages are not touched:
    /// [`Quirk::NoSystem`] is done before.
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

    /// Whether it is only about a wish. Whoever refused a wish may grant it later: after a restart
    /// with another setting.
    fn is_about_a_wish(self) -> bool {
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

/// What is known of a server's models. Only what brought an answer comes in here.
#[derive(Debug)]
pub(crate) struct Memory {
    forget_after: Duration,
    /// By model: each quirk, and when it was last found.
    found: Mutex<HashMap<String, HashMap<Quirk, Instant>>>,
    /// By model that is asked for: those that replies say they come from.
    answering: Mutex<HashMap<String, BTreeSet<String>>>,
}

impl Memory {
    /// A memory that forgets refused wishes after a while. Other quirks stay.
    pub(crate) fn new(forget_after: Duration) -> Self {
        Self { forget_after, found: Mutex::default(), answering: Mutex::default() }
    }

    /// What to do for `model`.
    pub(crate) fn of(&self, model: &str) -> Quirks {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let quirks = found.get(model).into_iter().flatten();
        let known = quirks
            .filter(|(quirk, at)| !quirk.is_about_a_wish() || at.elapsed() < self.forget_after);
        known.map(|(quirk, _)| *quirk).collect()
    }

    /// Tells, once for each, that a reply says it comes from another model than the one `asked`
    /// for, or than replies before. A longer name of the same is none: a date, a path.
    pub(crate) fn answers(&self, asked: &str, answering: &str) {
        /// Whoever makes up a name for each reply is not kept count of.
        const MOST: usize = 8;
        let mut all = self.answering.lock().unwrap_or_else(PoisonError::into_inner);
        let known = all.entry(asked.to_owned()).or_default();
        if known.len() >= MOST
            || !known.insert(answering.to_owned())
            || is_same(asked, answering) && known.len() == 1
        {
            return;
        }
        tracing::warn!(%asked, %answering, "replies come from another model than the one that was asked for, or than before");
    }

    /// Keeps what has just brought an answer of `model`, and tells it the first time.
    pub(crate) fn learn(&self, model: &str, quirk: Quirk, reason: &str) {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if found.entry(model.to_owned()).or_default().insert(quirk, Instant::now()).is_none() {
            tracing::warn!(%model, %reason, "the server refused a request of ours; for this model {quirk} from now on");
        }
    }
}

/// Whether one name is the other with a date or a version behind it, or a path before it.
fn is_same(asked: &str, answering: &str) -> bool {
    let plain = |name: &str| name.rsplit('/').next().unwrap_or(name).to_lowercase();
    let (asked, answering) = (plain(asked), plain(answering));
    let (short, long) =
        if asked.len() <= answering.len() { (asked, answering) } else { (answering, asked) };
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
    fn a_name_with_a_date_or_a_path_is_the_same_models() {
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
    fn a_memory_is_by_model_and_cause() {
        let memory = Memory::new(Duration::from_mins(1));
        memory.learn("a", Quirk::Without("logprobs"), "no");
        memory.learn("b", Quirk::NoSystem, "no");
        memory.learn("b", Quirk::Without("seed"), "no");
        assert_eq!(memory.of("a"), Quirks::from([Quirk::Without("logprobs")]));
        assert_eq!(memory.of("b"), Quirks::from([Quirk::NoSystem, Quirk::Without("seed")]));
        assert_eq!(memory.of("c"), Quirks::new());
    }

    #[test]
    fn only_wishes_are_forgotten() {
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
