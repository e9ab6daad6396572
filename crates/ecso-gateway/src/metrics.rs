//! Metrics for Prometheus: counts and times, but no text of conversations.

use std::time::Duration;

use ecso::{Step, Verdict};
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

use crate::{audit::JudgedRequest, settings::Mode};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    door: &'static str,
    route: &'static str,
    status: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AnswerLabels {
    verdict: &'static str,
    mode: &'static str,
    rewritten: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailureLabels {
    code: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StepLabels {
    step: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TokenLabels {
    step: String,
    kind: &'static str,
}

/// All metrics. They continue when the settings are replaced.
pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    answers: Family<AnswerLabels, Counter>,
    failures: Family<FailureLabels, Counter>,
    seconds: Family<StepLabels, Histogram, fn() -> Histogram>,
    tokens: Family<TokenLabels, Counter>,
    guarded: Histogram,
    harm_out: Histogram,
    running: Gauge,
    waiting: Gauge,
}

/// From 10 ms to about 5 minutes.
fn duration_histogram() -> Histogram {
    Histogram::new(exponential_buckets(0.01, 2.0, 16))
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("ecso");
        let requests = Family::<RequestLabels, Counter>::default();
        let answers = Family::<AnswerLabels, Counter>::default();
        let failures = Family::<FailureLabels, Counter>::default();
        let seconds: Family<StepLabels, Histogram, fn() -> Histogram> =
            Family::new_with_constructor(duration_histogram);
        let tokens = Family::<TokenLabels, Counter>::default();
        let (guarded, running, waiting) =
            (duration_histogram(), Gauge::default(), Gauge::default());
        registry.register("requests", "Requests, by door, route and status", requests.clone());
        registry.register("answers", "Judged answers", answers.clone());
        registry.register("failures", "Requests that failed, by error code", failures.clone());
        registry.register_with_unit(
            "step",
            "Duration of model calls, by step",
            Unit::Seconds,
            seconds.clone(),
        );
        registry.register(
            "step_tokens",
            "Tokens of the steps, as reported by the model",
            tokens.clone(),
        );
        registry.register_with_unit(
            "guarded",
            "Duration of guarded requests",
            Unit::Seconds,
            guarded.clone(),
        );
        // Words, from none to 1,024.
        let harm_out = Histogram::new([0.0].into_iter().chain(exponential_buckets(4.0, 2.0, 9)));
        let words =
            "Words of an unsafe answer that had gone out before its verdict (windowed streams)";
        registry.register("harm_out_words", words, harm_out.clone());
        registry.register("running", "Guarded requests that are running", running.clone());
        registry.register("waiting", "Guarded requests in the queue", waiting.clone());
        Self {
            registry,
            requests,
            answers,
            failures,
            seconds,
            tokens,
            guarded,
            harm_out,
            running,
            waiting,
        }
    }

    pub(crate) fn request(&self, door: &'static str, route: &'static str, status: u16) {
        self.requests.get_or_create(&RequestLabels { door, route, status: status.into() }).inc();
    }

    pub(crate) fn failure(&self, code: &'static str) {
        self.failures.get_or_create(&FailureLabels { code }).inc();
    }

    pub(crate) fn record_judged(&self, judged: &JudgedRequest<'_>) {
        let mode = match judged.mode {
            Mode::Enforce => "enforce",
            Mode::Observe => "observe",
            Mode::Off => "off",
        };
        self.guarded.observe(judged.started.elapsed().as_secs_f64());
        for (choice, finding) in judged.report.findings() {
            if let Some(early) =
                judged.report.early_of(choice).filter(|_| finding.verdict() == Verdict::Unsafe)
            {
                self.harm_out.observe(f64::from(u32::try_from(early.words).unwrap_or(u32::MAX)));
            }
            let (verdict, outcome) = (finding.verdict().as_str(), finding.outcome());
            let rewritten =
                if outcome.is_some_and(|outcome| outcome.rewritten) { "yes" } else { "no" };
            self.answers.get_or_create(&AnswerLabels { verdict, mode, rewritten }).inc();
            for step in outcome.map(|outcome| outcome.steps.as_slice()).unwrap_or_default() {
                self.step(
                    step.step,
                    Duration::from_millis(step.ms),
                    step.prompt_tokens,
                    step.completion_tokens,
                );
            }
        }
    }

    fn step(&self, step: Step, took: Duration, prompt: Option<u32>, completion: Option<u32>) {
        let step = step.to_string();
        self.seconds.get_or_create(&StepLabels { step: step.clone() }).observe(took.as_secs_f64());
        for (kind, tokens) in [("prompt", prompt), ("completion", completion)] {
            if let Some(tokens) = tokens {
                self.tokens
                    .get_or_create(&TokenLabels { step: step.clone(), kind })
                    .inc_by(tokens.into());
            }
        }
    }

    /// The metrics in the text format of Prometheus.
    pub(crate) fn text(&self, running: usize, waiting: usize) -> String {
        self.running.set(i64::try_from(running).unwrap_or(i64::MAX));
        self.waiting.set(i64::try_from(waiting).unwrap_or(i64::MAX));
        let mut text = String::new();
        // Writing to a String can't fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}
