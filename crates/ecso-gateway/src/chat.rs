//! A guarded chat: the draft, its verdict, and what goes to the client. Nothing of an answer leaves before its verdict.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use async_stream::{stream, try_stream};
use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, header},
    response::Response,
};
use bytes::Bytes;
use ecso::{Event, FinishReason, Guard, Mllm, Outcome, Step, Verdict};
use futures::{Stream, StreamExt, future::try_join_all};
use serde_json::{Map, Value, json};
use tokio::sync::OwnedSemaphorePermit;
use tracing::{Instrument, Span};

use crate::{
    audit::Case,
    draft::{Draft, choices, index},
    failure::Failure,
    live::Live,
    request::Request,
    settings::{Mode, OnFailure, TraceLevel},
    telemetry,
    upstream::{Answer, Upstream, answer_head, bounded},
};

/// A chat request that is to be guarded.
pub(crate) struct Guarded {
    pub(crate) live: Arc<Live>,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    pub(crate) id: String,
    pub(crate) begun: Instant,
    pub(crate) mode: Mode,
    /// The name of the client's key.
    pub(crate) key: String,
}

/// What the guard says of all choices of an answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Report {
    /// By choice; none where the guard failed and the answer goes out all the same.
    outcomes: BTreeMap<u64, Option<Outcome>>,
    /// Why the guard failed, where it fails open.
    failure: Option<String>,
}

impl Report {
    /// What the guard says of one answer.
    pub(crate) fn of(outcome: Outcome) -> Self {
        Self { outcomes: BTreeMap::from([(0, Some(outcome))]), failure: None }
    }

    /// What was found, by choice.
    pub(crate) fn outcomes(&self) -> impl Iterator<Item = (u64, Option<&Outcome>)> {
        self.outcomes.iter().map(|(choice, outcome)| (*choice, outcome.as_ref()))
    }

    /// Why the guard failed, where it fails open.
    pub(crate) fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// The verdict on the whole: unsafe if one choice is, unchecked if one could not be judged.
    pub(crate) fn verdict(&self) -> Verdict {
        let verdicts = || self.outcomes.values().map(|outcome| outcome.as_ref().map(|outcome| outcome.verdict));
        if verdicts().any(|verdict| verdict == Some(Verdict::Unsafe)) {
            Verdict::Unsafe
        } else if verdicts().all(|verdict| verdict == Some(Verdict::Safe)) {
            Verdict::Safe
        } else {
            Verdict::Unchecked
        }
    }

    /// The highest score.
    pub(crate) fn score(&self) -> Option<f64> {
        self.outcomes.values().flatten().filter_map(|outcome| outcome.score).reduce(f64::max)
    }

    /// The object `ecso` of an answer.
    fn object(&self, id: &str, trace: TraceLevel) -> Value {
        let mut object = json!({"request_id": id, "verdict": self.verdict(), "score": self.score(),
            "usage": self.usage()});
        if let Some(failure) = &self.failure {
            object["failure"] = failure.as_str().into();
        }
        let choices: Vec<Value> =
            self.outcomes.iter().map(|(index, outcome)| choice(*index, outcome.as_ref(), trace)).collect();
        if trace != TraceLevel::None || choices.len() > 1 {
            object["choices"] = choices.into();
        }
        object
    }

    /// What the guard's own calls took: tokens, where the models tell.
    fn usage(&self) -> Value {
        let steps = || self.outcomes.values().flatten().flat_map(|outcome| &outcome.steps);
        let prompt: u64 = steps().filter_map(|step| step.prompt_tokens).map(u64::from).sum();
        let completion: u64 = steps().filter_map(|step| step.completion_tokens).map(u64::from).sum();
        json!({"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion})
    }
}

fn choice(index: u64, outcome: Option<&Outcome>, trace: TraceLevel) -> Value {
    let Some(outcome) = outcome else { return json!({"index": index, "verdict": Verdict::Unchecked}) };
    let mut object =
        json!({"index": index, "verdict": outcome.verdict, "score": outcome.score, "rewritten": outcome.rewritten});
    if trace != TraceLevel::None {
        object["profile"] = outcome.profile.as_str().into();
        let steps = outcome.steps.iter().map(|step| {
            let mut step = serde_json::to_value(step).unwrap_or_default();
            if let Some(fields) = step.as_object_mut().filter(|_| trace == TraceLevel::Figures) {
                fields.retain(|name, _| !matches!(name.as_str(), "prompt" | "reply"));
            }
            step
        });
        object["steps"] = steps.collect();
    }
    object
}

impl Guarded {
    /// Answers the request. `permit` is its turn; a stream keeps it until its end.
    pub(crate) async fn enforce(self, permit: OwnedSemaphorePermit) -> Result<Response, Failure> {
        let settings = &self.live.settings;
        let mut request = Request::read(&self.body, &settings.limits, self.live.images)?;
        self.live.prepare(&mut request).await?;
        if request.stream { self.held(request, permit).await } else { self.whole(request).await }
    }

    /// What takes until the request's deadline, and no longer.
    async fn in_time<T>(&self, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        self.live.in_time(self.begun, work).await
    }

    /// How much of the steps this client sees.
    fn trace(&self) -> TraceLevel {
        let asked = self.headers.get("x-ecso-trace").is_some_and(|value| value == "true" || value == "1");
        if asked { self.live.settings.trace } else { TraceLevel::None }
    }

    fn record(&self, request: &Request, report: &Report, draft: &Draft) {
        let Self { id, key, body, begun, mode, .. } = self;
        let drafts = draft.said();
        self.live.record(&Case { id, key, mode: *mode, begun: *begun, body, request, report, drafts });
    }

    fn guard(&self, request: &Request) -> Result<Guard<Arc<dyn Mllm>>, Failure> {
        self.live.guard(request, &self.headers, self.mode)
    }

    async fn whole(self, request: Request) -> Result<Response, Failure> {
        let guard = self.guard(&request)?;
        let asked = self.answer(&request).instrument(telemetry::direct(&request.model));
        let (draft, head) = match self.in_time(asked).await? {
            Answer::Draft(draft, head) => (draft, head),
            Answer::Stream(_) => return Err(Failure::upstream("the upstream sent a stream that nobody asked for")),
            Answer::Refused(response) => return Ok(response),
        };
        let report = match self.in_time(review(&guard, &request, &draft)).await {
            Ok(report) => report,
            Err(failure) => self.open(&draft, failure.with_head(&head))?,
        };
        self.record(&request, &report, &draft);
        Ok(self.finished(&request, &report, draft, head))
    }

    /// What the guard's failure means: an error, or an answer that nobody judged.
    fn open(&self, draft: &Draft, failure: Failure) -> Result<Report, Failure> {
        if self.live.settings.on_failure == OnFailure::Closed || !failure.is_ours() {
            return Err(failure);
        }
        failure.log(&self.id);
        tracing::warn!(id = self.id, "the guard failed open");
        let outcomes = draft.said().into_keys().map(|index| (index, None)).collect();
        Ok(Report { outcomes, failure: Some(failure.code.into()) })
    }

    fn finished(&self, request: &Request, report: &Report, draft: Draft, head: HeaderMap) -> Response {
        let Draft::Whole(mut completion) = draft else { unreachable!("a whole answer was asked for") };
        for choice in completion["choices"].as_array_mut().into_iter().flatten() {
            let outcome = report.outcomes.get(&index(choice)).and_then(Option::as_ref);
            if let Some(outcome) = outcome.filter(|outcome| outcome.rewritten) {
                *choice = json!({
                    "index": index(choice),
                    "message": message(outcome, request),
                    "finish_reason": finish(outcome),
                });
            }
        }
        if self.trace() != TraceLevel::None {
            completion["ecso"] = report.object(&self.id, self.trace());
        }
        let mut response = Response::new(Body::from(completion.to_string()));
        *response.headers_mut() = head;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        verdict_headers(headers, report);
        response
    }

    /// The upstream's answer to the client's own question.
    async fn answer(&self, request: &Request) -> Result<Answer, Failure> {
        match &self.live.upstream {
            Upstream::Server(server) => {
                let longest = self.live.settings.limits.answer;
                let body = request.rewritten.clone().map_or_else(|| self.body.clone(), Bytes::from);
                server.answer(&self.headers, body, request, longest).await
            }
            Upstream::Engine(model) => {
                let sampling = request.own_sampling()?;
                let asked = (0..request.choices).map(|choice| {
                    let seed = sampling.seed.map_or(choice, |seed| seed.wrapping_add(choice));
                    let sampling =
                        ecso::Sampling { seed: (choice > 0).then_some(seed).or(sampling.seed), ..sampling.clone() };
                    async move { model.generate(&request.chat, &sampling).await }
                });
                let replies = try_join_all(asked).await.map_err(|error| Failure::asking("invalid_request", error))?;
                let created = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
                let created = created.map_or(0, |since| since.as_secs());
                let draft = Draft::replies(&replies, &self.id, created, model.name(), request.stream);
                Ok(Answer::Draft(draft, HeaderMap::new()))
            }
        }
    }

    /// A stream that is held: signs of life until the verdict, then the draft as it came or the safe answer as it is
    /// written.
    async fn held(self, request: Request, permit: OwnedSemaphorePermit) -> Result<Response, Failure> {
        let guard = self.guard(&request)?;
        let (span, direct) = (Span::current(), telemetry::direct(&request.model));
        // The upstream's own errors still go out as what they are.
        let begun = match &self.live.upstream {
            Upstream::Server(_) => match self.in_time(self.answer(&request).instrument(direct.clone())).await? {
                Answer::Refused(response) => return Ok(response),
                answer => Some(answer),
            },
            Upstream::Engine(_) => None,
        };
        if begun.is_none() {
            request.own_sampling()?;
        }
        let head = match &begun {
            Some(Answer::Stream(response)) => answer_head(response.headers()),
            _ => HeaderMap::new(),
        };
        let every = std::time::Duration::from_secs(self.live.settings.keep_alive.max(1));
        let body = stream! {
            let _permit = permit;
            let events = self.events(&request, &guard, begun, direct);
            futures::pin_mut!(events);
            yield Ok::<_, std::convert::Infallible>(Bytes::from_static(b": the answer is being checked\n\n"));
            loop {
                let next = tokio::select! {
                    event = events.next().instrument(span.clone()) => event,
                    () = tokio::time::sleep(every) => {
                        yield Ok(Bytes::from_static(b": the answer is being checked\n\n"));
                        continue;
                    }
                };
                match next {
                    Some(Ok(text)) => yield Ok(Bytes::from(text)),
                    Some(Err(failure)) => {
                        failure.log(&self.id);
                        self.live.metrics.failure(failure.code);
                        yield Ok(Bytes::from(failure.event()));
                        break;
                    }
                    None => break,
                }
            }
        };
        let mut response = Response::new(Body::from_stream(body));
        *response.headers_mut() = head;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        // Proxies that would wait for the whole must not.
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        Ok(response)
    }

    /// The client's stream, event by event, from the draft's verdict on.
    fn events<'a>(
        &'a self,
        request: &'a Request,
        guard: &'a Guard<Arc<dyn Mllm>>,
        begun: Option<Answer>,
        direct: Span,
    ) -> impl Stream<Item = Result<String, Failure>> + Send + 'a {
        try_stream! {
            let answer = match begun {
                Some(answer) => answer,
                None => self.in_time(self.answer(request).instrument(direct.clone())).await?,
            };
            let draft = match answer {
                Answer::Stream(response) => {
                    let chunks = Draft::chunks(bounded(response, self.live.settings.limits.answer));
                    self.in_time(chunks.instrument(direct.clone())).await?
                }
                Answer::Draft(draft, _) => draft,
                Answer::Refused(_) => Err(Failure::upstream("the upstream refused"))?,
            };
            drop(direct);
            let mut report = Report::default();
            for (choice, said) in draft.said() {
                let events = reviewed(guard, request, &said);
                futures::pin_mut!(events);
                let mut rewritten = false;
                let mut begun = false;
                let mut next = async || {
                    self.in_time(async { Ok(events.next().await) }).await.unwrap_or_else(|late| Some(Err(late)))
                };
                while let Some(event) = next().await {
                    match event {
                        Ok(Event::Decided { rewritten: another, .. }) => {
                            rewritten = another;
                            if !rewritten {
                                for text in replayed(&draft, choice) {
                                    yield text;
                                }
                            }
                        }
                        Ok(Event::Answer(text)) if rewritten => {
                            // Whether it is the fixed refusal, the end tells; where that has another place, the answer
                            // waits for it.
                            if request.wants_json() {
                                continue;
                            }
                            yield delta(&draft, choice, !begun, Some(("content", &text)), None);
                            begun = true;
                        }
                        Ok(Event::Done(outcome)) => {
                            if rewritten {
                                if request.wants_json() {
                                    let place = if outcome.refused { "refusal" } else { "content" };
                                    yield delta(&draft, choice, true, Some((place, &outcome.answer)), None);
                                }
                                yield delta(&draft, choice, false, None, Some(finish(&outcome)));
                            }
                            report.outcomes.insert(choice, Some(outcome));
                        }
                        Ok(_) => {}
                        Err(failure) => {
                            // What has begun can't be taken back.
                            if begun {
                                Err(failure.clone())?;
                            }
                            let open = self.open(&draft, failure)?;
                            report.failure = open.failure;
                            report.outcomes.insert(choice, None);
                            for text in replayed(&draft, choice) {
                                yield text;
                            }
                            break;
                        }
                    }
                }
            }
            let mut last = draft.head();
            last["choices"] = json!([]);
            if request.wants_usage() {
                last["usage"] = draft.usage().unwrap_or(Value::Null);
            }
            last["ecso"] = report.object(&self.id, self.trace());
            self.record(request, &report, &draft);
            yield format!("data: {last}\n\n");
            yield "data: [DONE]\n\n".to_owned();
        }
    }
}

/// Judges every choice of a draft.
pub(crate) async fn review(guard: &Guard<Arc<dyn Mllm>>, request: &Request, draft: &Draft) -> Result<Report, Failure> {
    let said = draft.said();
    let all = said.iter().map(|(index, said)| async move {
        let events = reviewed(guard, request, said);
        futures::pin_mut!(events);
        while let Some(event) = events.next().await {
            if let Event::Done(outcome) = event? {
                return Ok::<_, Failure>((*index, Some(outcome)));
            }
        }
        Err(Failure::upstream("the steps had no end"))
    });
    Ok(Report { outcomes: try_join_all(all).await?.into_iter().collect(), failure: None })
}

/// The steps on one choice.
fn reviewed<'a>(
    guard: &'a Guard<Arc<dyn Mllm>>,
    request: &'a Request,
    said: &'a str,
) -> impl Stream<Item = Result<Event, Failure>> + Send + 'a {
    guard.review_events(&request.chat, said).map(|event| event.map_err(Failure::from))
}

/// The chunks of one choice, as they came where they hold no other.
fn replayed(draft: &Draft, choice: u64) -> Vec<String> {
    let Draft::Chunks(chunks) = draft else { return Vec::new() };
    let of_choice = chunks.iter().filter_map(|chunk| {
        let kept: Vec<&Value> = choices(&chunk.value).filter(|found| index(found) == choice).collect();
        if kept.is_empty() {
            return None;
        }
        if kept.len() == choices(&chunk.value).count() && chunk.value.get("usage").is_none_or(Value::is_null) {
            return Some(format!("data: {}\n\n", chunk.raw));
        }
        let mut only = chunk.value.clone();
        only["choices"] = kept.into_iter().cloned().collect();
        only.as_object_mut().map(|fields| fields.remove("usage"));
        Some(format!("data: {only}\n\n"))
    });
    of_choice.collect()
}

/// What is said in a draft's place. The fixed refusal is no JSON: where the client wants that, it stands where the
/// protocol has refusals.
fn message(outcome: &Outcome, request: &Request) -> Value {
    if outcome.refused && request.wants_json() {
        return json!({"role": "assistant", "content": null, "refusal": outcome.answer});
    }
    json!({"role": "assistant", "content": outcome.answer})
}

/// A chunk of a safe answer: who says it, and more of it.
fn delta(draft: &Draft, choice: u64, begins: bool, said: Option<(&str, &str)>, finish: Option<&str>) -> String {
    let mut delta = Map::new();
    let role = Some(("role", "assistant")).filter(|_| begins);
    delta.extend(role.into_iter().chain(said).map(|(name, text)| (name.to_owned(), text.into())));
    let mut chunk = draft.head();
    chunk["choices"] = json!([{"index": choice, "delta": delta, "finish_reason": finish}]);
    format!("data: {chunk}\n\n")
}

/// Why an answer in a draft's place ended: it was done, or its limit was reached.
fn finish(outcome: &Outcome) -> &'static str {
    let last = outcome.steps.iter().rev().find(|step| step.step == Step::Safe).filter(|_| !outcome.refused);
    if last.is_some_and(|step| step.finish == FinishReason::Length) { "length" } else { "stop" }
}

pub(crate) fn verdict_headers(headers: &mut HeaderMap, report: &Report) {
    headers.insert("x-ecso-verdict", HeaderValue::from_static(report.verdict().as_str()));
    if let Some(score) = report.score().and_then(|score| HeaderValue::try_from(format!("{score:.4}")).ok()) {
        headers.insert("x-ecso-score", score);
    }
    if let Some(failure) = report.failure.as_deref().and_then(|code| HeaderValue::try_from(code).ok()) {
        headers.insert("x-ecso-failure", failure);
    }
}
