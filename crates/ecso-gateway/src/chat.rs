//! A guarded chat: the draft, its verdict, and what goes to the client. Nothing of an answer leaves
//! before its verdict.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    mem,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use async_stream::{stream as streamed, try_stream};
use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, header},
    response::Response,
};
use bytes::Bytes;
use ecso::{Event, FinishReason, Guard, Mllm, Outcome, Reply, RequestCheck, Step};
use futures::{
    FutureExt, Stream, StreamExt, TryStreamExt,
    future::{maybe_done, poll_fn, try_join_all},
    pin_mut, stream,
};
use serde_json::{Map, Value, json};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tracing::{Instrument, Span};

use crate::{
    completion::{Completion, Events, finish},
    context::{Record, RequestContext},
    error::ApiError,
    report::{Early, Finding, Report},
    request::Request,
    settings::{OnFailure, Streams, TraceLevel},
    telemetry,
    upstream::{Answer, Way, answer_head, bounded},
    windowed::{self, How, Writing},
    wire::{self, Wire},
};

/// Answers a chat, in another format than its own where there is a `wire`. `permit` is its turn; a
/// stream keeps it until its end.
pub(crate) async fn enforce(
    context: RequestContext,
    request: Request,
    permit: OwnedSemaphorePermit,
    wire: Option<Box<dyn Wire>>,
) -> Result<Response, ApiError> {
    let guarded = Guarded { context, request, wire };
    // A wish that can't be read is told before anything is asked.
    guarded.context.streams()?;
    if guarded.request.stream {
        guarded.held(permit).boxed().await
    } else {
        guarded.whole().boxed().await
    }
}

/// A chat that is to be guarded.
struct Guarded {
    context: RequestContext,
    request: Request,
    wire: Option<Box<dyn Wire>>,
}

impl Guarded {
    fn guard(&self) -> Guard<Arc<dyn Mllm>> {
        let Self { context, request, .. } = self;
        context.state.guard(request, context, context.mode)
    }

    async fn whole(self) -> Result<Response, ApiError> {
        let guard = self.guard();
        let asked = async {
            let asked = self.answer().instrument(telemetry::direct(&self.request.model));
            match self.context.in_time(asked).await? {
                Answer::Whole(answer, head) => Ok((answer, head)),
                Answer::Stream(_) => {
                    Err(ApiError::upstream("the upstream sent a stream that nobody asked for"))
                }
            }
        };
        let drafted = self.beside(&guard, asked).await?;
        let report =
            self.judged(&guard, &drafted).await.map_err(|error| error.with_head(&drafted.head))?;
        Ok(self.finished(&report, &drafted.answer, drafted.head))
    }

    /// The answer that is `asked` for, and beside it what there is to find about the request. Where
    /// no answer could make that safe, none is waited for; a model in this process, which does one
    /// thing after the other, isn't even asked.
    async fn beside(
        &self,
        guard: &Guard<Arc<dyn Mllm>>,
        asked: impl Future<Output = Result<(Completion, HeaderMap), ApiError>> + Send,
    ) -> Result<Drafted, ApiError> {
        let Self { context, request, .. } = self;
        let considering = async { Ok(guard.check_request(&request.chat).await?) };
        let (considering, asked) = (context.in_time(considering), maybe_done(asked));
        pin_mut!(considering, asked);
        let side_by_side = context.way().is_some() || guard.model().is_concurrent();
        let request_check = poll_fn(|task| {
            if side_by_side {
                // What it comes to is looked at below.
                let _ = asked.as_mut().poll(task);
            }
            considering.as_mut().poll(task)
        });
        let request_check = request_check.await;
        if request_check.as_ref().is_ok_and(RequestCheck::is_harm) {
            // One that is there already is written down, and has its choices.
            if let Some(Ok((answer, head))) = asked.as_mut().take_output() {
                return Ok(Drafted { answer, head, request_check, is_spared: false, early: None });
            }
            let nothing = vec![Reply::default(); usize::try_from(request.choices).unwrap_or(1)];
            let answer = Completion::replies(&nothing, now());
            return Ok(Drafted {
                answer,
                head: HeaderMap::new(),
                request_check,
                is_spared: true,
                early: None,
            });
        }
        // What the upstream refuses is told before a failure of ours.
        asked.as_mut().await;
        let (answer, head) =
            asked.take_output().ok_or_else(|| ApiError::upstream("there is no answer"))??;
        Ok(Drafted { answer, head, request_check, is_spared: false, early: None })
    }

    /// What is found about an answer, all choices of it; an error if nothing of it may go out.
    async fn judged(
        &self,
        guard: &Guard<Arc<dyn Mllm>>,
        drafted: &Drafted,
    ) -> Result<Report, ApiError> {
        let Self { context, request, .. } = self;
        let mut record = context.record(request, drafted.drafts());
        record.drafted(drafted.drafts(), drafted.early());
        if let Err(error) = context.in_time(review(guard, request, drafted, &record)).await {
            if !self.opens(&error, &record) {
                return Err(error);
            }
            record.opened(None, error.code);
        }
        Ok(record.written())
    }

    /// Whether an answer goes out that nobody judged, because the guard failed: never once a
    /// verdict holds one back.
    fn opens(&self, error: &ApiError, record: &Record<'_>) -> bool {
        let is_wanted = self.context.state.settings.on_failure == OnFailure::Open;
        let opens = is_wanted && error.may_open && !record.is_unsafe();
        if opens {
            error.log(&self.context.id);
            tracing::warn!(id = self.context.id, "the guard failed open");
        }
        opens
    }

    fn head(&self, answer: &Completion, object: &str) -> Value {
        answer.head(&self.context.id, &self.request.model, object)
    }

    /// The choices that go out.
    fn choices(&self, report: &Report, answer: &Completion) -> Vec<Value> {
        let choices = report.findings().map(|(index, finding)| match finding.outcome() {
            Some(outcome) if outcome.rewritten => {
                json!({"index": index, "finish_reason": ended(outcome),
                "message": message(outcome, &self.request), "logprobs": null})
            }
            _ => answer.choice(index),
        });
        choices.collect()
    }

    /// The whole answer, as chat completions have it.
    fn completion(&self, report: &Report, answer: &Completion) -> Value {
        let mut completion = self.head(answer, "chat.completion");
        completion["choices"] = self.choices(report, answer).into();
        for (name, value) in answer.figures() {
            completion[name] = value.clone();
        }
        if self.context.trace() != TraceLevel::None {
            completion["ecso"] = report.object(&self.context.id, self.context.trace());
        }
        completion
    }

    /// The answer, for another format to `write`. Other formats have one choice.
    fn translated<T>(
        &self,
        wire: &dyn Wire,
        report: &Report,
        answer: &Completion,
        found: Option<Value>,
        write: impl FnOnce(&wire::Answer<'_>) -> T,
    ) -> T {
        let choice = self.choices(report, answer).into_iter().next().unwrap_or_default();
        let outcome = report.findings().find_map(|(_, finding)| finding.outcome());
        let nothing = Map::new();
        let mut answer = wire::Answer {
            id: &self.context.id,
            model: &self.request.model,
            created: self.head(answer, "")["created"].as_u64().unwrap_or(0),
            message: choice["message"].as_object().unwrap_or(&nothing),
            finish: choice["finish_reason"].as_str().unwrap_or("stop"),
            refused: outcome.is_some_and(|outcome| outcome.refused),
            usage: answer.usage(),
            found,
            is_kept: false,
            verdict: (report.verdict(), report.score()),
        };
        // Before it goes out: who has it may go on at once.
        answer.is_kept = wire.part().is_some_and(|part| self.keep(&part, &answer.said()));
        write(&answer)
    }

    /// Keeps what goes out, and what led to it, for requests that go on from there. Whether it
    /// could.
    fn keep(&self, part: &wire::Part<'_>, said: &Value) -> bool {
        let Self { context, request, .. } = self;
        let asked = request.messages().get(part.from..).unwrap_or_default();
        context.state.store.keep((&context.tenant(), &context.id), part.before, asked, said)
    }

    fn finished(&self, report: &Report, answer: &Completion, head: HeaderMap) -> Response {
        let written = match &self.wire {
            None => self.completion(report, answer),
            Some(wire) => {
                let trace = self.context.trace();
                let found =
                    (trace != TraceLevel::None).then(|| report.object(&self.context.id, trace));
                self.translated(wire.as_ref(), report, answer, found, |answer| wire.whole(answer))
            }
        };
        let mut response = Response::new(Body::from(written.to_string()));
        *response.headers_mut() = head;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        self.tell_left_out(headers);
        report.headers(headers);
        response
    }

    /// Tells which tools were left out, as many as a header has room for.
    fn tell_left_out(&self, headers: &mut HeaderMap) {
        const MOST: usize = 16;
        let left_out =
            self.wire.iter().flat_map(|wire| wire.left_out()).map(String::as_str).take(MOST);
        let left_out = left_out.collect::<Vec<_>>().join(", ");
        if let Some(Ok(kinds)) =
            Some(left_out).filter(|kinds| !kinds.is_empty()).map(HeaderValue::try_from)
        {
            headers.insert("x-ecso-tools-left-out", kinds);
        }
    }

    /// The model's answer to the client's question.
    async fn answer(&self) -> Result<Answer, ApiError> {
        let Self { context, request, .. } = self;
        if let Some(way) = context.way() {
            return way
                .answer(&context.headers, request, context.state.settings.limits.answer)
                .await;
        }
        request.for_own_model()?;
        let model = &context.state.upstream.answering(&request.model, &context.headers);
        let sampling = request.own_sampling();
        let asked = (0..request.choices).map(|choice| {
            let seed = sampling.seed.map_or(choice, |seed| seed.wrapping_add(choice));
            let sampling = ecso::Sampling {
                seed: (choice > 0).then_some(seed).or(sampling.seed),
                ..sampling.clone()
            };
            async move { model.generate(&request.chat, &sampling).await }
        });
        let replies = try_join_all(asked)
            .await
            .map_err(|error| ApiError::asking("invalid_request", error))?;
        Ok(Answer::Whole(Completion::replies(&replies, now()), HeaderMap::new()))
    }

    /// A stream that is held: signs of life until the verdict, then the draft as it came or the
    /// safe answer as it is written.
    async fn held(self, permit: OwnedSemaphorePermit) -> Result<Response, ApiError> {
        let guard = self.guard();
        let (span, direct) = (Span::current(), telemetry::direct(&self.request.model));
        // What the upstream refuses still goes out with its status.
        let begun = if self.context.way().is_some() {
            Some(self.context.in_time(self.answer().instrument(direct.clone())).await?)
        } else {
            self.request.for_own_model()?;
            None
        };
        let head = match &begun {
            Some(Answer::Stream(response)) => answer_head(response.headers()),
            _ => HeaderMap::new(),
        };
        let mut left_out = HeaderMap::new();
        self.tell_left_out(&mut left_out);
        let (out, mut taken) = mpsc::channel(16);
        // A client that does not read holds nothing longer than that.
        let most = self.context.left() + self.context.state.settings.limits.patience();
        let writing = async move {
            let _permit = permit;
            let written = tokio::time::timeout(most, self.write(&guard, begun, direct, &out));
            tokio::select! {
                _ = written => {}
                () = out.closed() => {}
            }
        };
        tokio::spawn(writing.instrument(span));
        let body = streamed! {
            while let Some(text) = taken.recv().await {
                yield Ok::<Bytes, Infallible>(text);
            }
        };
        let mut response = Response::new(Body::from_stream(body));
        *response.headers_mut() = head;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        headers.extend(left_out);
        // Proxies that would wait for the whole must not.
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        Ok(response)
    }

    /// Writes the client's stream: signs of life, and its events; until somebody leaves.
    async fn write(
        &self,
        guard: &Guard<Arc<dyn Mllm>>,
        begun: Option<Answer>,
        direct: Span,
        out: &mpsc::Sender<Bytes>,
    ) -> Result<(), mpsc::error::SendError<Bytes>> {
        const SIGN: &[u8] = b": the answer is being checked\n\n";
        let every = Duration::from_secs(self.context.state.settings.keep_alive.max(1));
        let mut events = match &self.wire {
            None => self.events(guard, begun, direct).boxed(),
            Some(wire) => self.replayed(wire.as_ref(), guard, begun, direct).boxed(),
        };
        out.send(Bytes::from_static(SIGN)).await?;
        loop {
            let next = tokio::select! {
                event = events.next() => event,
                () = tokio::time::sleep(every) => {
                    out.send(Bytes::from_static(SIGN)).await?;
                    continue;
                }
            };
            match next {
                Some(Ok(text)) => out.send(Bytes::from(text)).await?,
                Some(Err(error)) => {
                    error.log(&self.context.id);
                    self.context.state.metrics.failure(error.code);
                    let event = match &self.wire {
                        None => error.event(),
                        Some(wire) => {
                            let failed =
                                wire.failed((&self.context.id, &self.request.model), &error);
                            failed.iter().map(event).collect()
                        }
                    };
                    return out.send(Bytes::from(event)).await;
                }
                None => return Ok(()),
            }
        }
    }

    /// A stream that has `begun`, taken to be judged while it is written: where text of it may go
    /// out early, or the settings want the model stopped at the first harm.
    fn judged_early<'a>(
        &'a self,
        guard: &'a Guard<Arc<dyn Mllm>>,
        begun: &mut Option<Answer>,
        direct: &Span,
    ) -> Option<Writing<'a>> {
        let Self { context, request, wire } = self;
        let settings = &context.state.settings;
        let is_wanted = context.streams().is_ok_and(|streams| streams == Streams::Windowed);
        let releases = is_wanted && wire.is_none() && request.wants_plain_text();
        let is_own = matches!(context.way(), Some(Way::Own(_))) && guard.model().is_concurrent();
        let is_judged = is_own && request.choices == 1 && (releases || settings.early_stop);
        match begun.take() {
            Some(Answer::Stream(response)) if is_judged => {
                let gives_up = releases && settings.on_failure == OnFailure::Closed;
                let how = How { sizes: settings.windows, releases, gives_up };
                let events = Events::of(bounded(response, settings.limits.answer));
                let considering = context
                    .in_time(async { Ok(guard.check_request(&request.chat).await?) })
                    .boxed();
                Some(Writing::new(guard, &request.chat, how, (events, direct.clone()), considering))
            }
            other => {
                *begun = other;
                None
            }
        }
    }

    /// The whole of an answer that has `begun`, and what is found about the request meanwhile.
    async fn drafted(
        &self,
        guard: &Guard<Arc<dyn Mllm>>,
        mut begun: Option<Answer>,
        direct: &Span,
    ) -> Result<Drafted, ApiError> {
        let context = &self.context;
        if let Some(mut writing) = self.judged_early(guard, &mut begun, direct) {
            // Nothing of it goes out.
            while context.in_time(writing.next()).await?.is_some() {}
            return writing.end();
        }
        let asked = async {
            let answer = match begun {
                Some(answer) => answer,
                None => context.in_time(self.answer().instrument(direct.clone())).await?,
            };
            let answer = match answer {
                Answer::Stream(response) => {
                    let chunks =
                        Completion::chunks(bounded(response, context.state.settings.limits.answer));
                    context.in_time(chunks.instrument(direct.clone())).await?
                }
                Answer::Whole(answer, _) => answer,
            };
            Ok((answer, HeaderMap::new()))
        };
        self.beside(guard, asked).await
    }

    /// The client's stream in another format: when all of the answer is judged, all of its events.
    fn replayed<'a>(
        &'a self,
        wire: &'a dyn Wire,
        guard: &'a Guard<Arc<dyn Mllm>>,
        begun: Option<Answer>,
        direct: Span,
    ) -> impl Stream<Item = Result<String, ApiError>> + Send + 'a {
        try_stream! {
            let drafted = self.drafted(guard, begun, &direct).await?;
            drop(direct);
            let report = self.judged(guard, &drafted).await?;
            let answer = drafted.answer;
            let found = Some(report.object(&self.context.id, self.context.trace()));
            for written in self.translated(wire, &report, &answer, found, |answer| wire.events(answer)) {
                yield event(&written);
            }
        }
    }

    /// The client's stream, event by event, from the draft's verdict on.
    fn events<'a>(
        &'a self,
        guard: &'a Guard<Arc<dyn Mllm>>,
        begun: Option<Answer>,
        direct: Span,
    ) -> impl Stream<Item = Result<String, ApiError>> + Send + 'a {
        let Self { context, request, .. } = self;
        try_stream! {
            let mut record = context.record(request, BTreeMap::new());
            let mut begun = begun;
            let drafted = match self.judged_early(guard, &mut begun, &direct) {
                Some(mut writing) => {
                    while let Some(pieces) = context.in_time(writing.next()).await? {
                        let (said, early, answer) = writing.so_far();
                        record.drafted(BTreeMap::from([(windowed::CHOICE, said)]), Some(early));
                        for piece in pieces {
                            yield self.chunk(answer, &piece);
                        }
                    }
                    writing.end()?
                }
                None => self.drafted(guard, begun, &direct).await?,
            };
            drop(direct);
            record.drafted(drafted.drafts(), drafted.early());
            let (answer, mut safe_answer) = (&drafted.answer, None);
            for (request_check, choice, said) in drafted.choices() {
                let events = considered_review(guard, request, request_check, &said);
                pin_mut!(events);
                // What is out stays out: harm behind it ends the stream, and the safe answer has a
                // place of its own.
                let is_late = choice == windowed::CHOICE && drafted.early().is_some_and(|early| early.characters > 0);
                let (mut rewritten, mut begun) = (false, false);
                let mut next = async || {
                    context.in_time(async { Ok(events.next().await) }).await.unwrap_or_else(|late| Some(Err(late)))
                };
                while let Some(event) = next().await {
                    match event {
                        Ok(Event::Decided { verdict, rewritten: another }) => {
                            record.add(choice, Finding::Decided(verdict));
                            rewritten = another;
                            if !rewritten {
                                for piece in drafted.pieces(choice) {
                                    yield self.chunk(answer, &piece);
                                }
                            } else if is_late {
                                let refusal = Some(("refusal", guard.profile().refusal.as_str()));
                                yield self.delta(answer, choice, false, refusal, None);
                                yield self.delta(answer, choice, false, None, Some("content_filter"));
                            }
                        }
                        // Whether it is the fixed refusal, the end tells; where that has another
                        // place, the answer waits for it.
                        Ok(Event::Answer(text)) if rewritten && !is_late && !request.wants_json() => {
                            yield self.delta(answer, choice, !begun, Some(("content", &text)), None);
                            begun = true;
                        }
                        Ok(Event::Done(outcome)) => {
                            if rewritten && is_late {
                                safe_answer = Some(outcome.answer.clone()).filter(|_| !outcome.refused);
                            } else if rewritten {
                                if request.wants_json() {
                                    let place = if outcome.refused { "refusal" } else { "content" };
                                    yield self.delta(answer, choice, true, Some((place, &outcome.answer)), None);
                                }
                                yield self.delta(answer, choice, false, None, Some(ended(&outcome)));
                            }
                            record.add(choice, Finding::Done(outcome));
                        }
                        Ok(_) => {}
                        Err(error) if rewritten && is_late => {
                            error.log(&context.id);
                            context.state.metrics.failure(error.code);
                            record.failed(error.code);
                            break;
                        }
                        Err(error) => {
                            // What has begun can't be taken back.
                            if begun || !self.opens(&error, &record) {
                                Err(error.clone())?;
                            }
                            record.opened(Some(choice), error.code);
                            for piece in drafted.pieces(choice) {
                                yield self.chunk(answer, &piece);
                            }
                            break;
                        }
                    }
                }
            }
            let report = record.written();
            let mut last = self.head(answer, "chat.completion.chunk");
            // Without usage clients expect a choice in each event.
            let nothing = json!([{"index": 0, "delta": {}, "finish_reason": null}]);
            last["choices"] = if request.wants_usage() { json!([]) } else { nothing };
            for (name, value) in answer.figures().filter(|(name, _)| *name != "usage") {
                last[name] = value.clone();
            }
            if request.wants_usage() {
                last["usage"] = answer.usage().cloned().unwrap_or(Value::Null);
            }
            last["ecso"] = report.object(&context.id, context.trace());
            if let Some(answer) = safe_answer {
                last["ecso"]["safe_answer"] = answer.into();
            }
            yield format!("data: {last}\n\n");
            yield "data: [DONE]\n\n".to_owned();
        }
    }

    /// An event of the client's stream: a piece of a choice.
    fn chunk(&self, answer: &Completion, choice: &Value) -> String {
        let mut chunk = self.head(answer, "chat.completion.chunk");
        chunk["choices"] = json!([choice]);
        format!("data: {chunk}\n\n")
    }

    /// An event with a piece of a safe answer: who says it, and more of it.
    fn delta(
        &self,
        answer: &Completion,
        choice: u64,
        begins: bool,
        said: Option<(&str, &str)>,
        finish: Option<&str>,
    ) -> String {
        let role = Some(("role", "assistant")).filter(|_| begins);
        let delta = role.into_iter().chain(said).map(|(name, text)| (name.to_owned(), text.into()));
        let delta: Map<String, Value> = delta.collect();
        self.chunk(answer, &json!({"index": choice, "delta": delta, "finish_reason": finish}))
    }
}

/// An event of a stream, by its type.
fn event(written: &Value) -> String {
    format!("event: {}\ndata: {written}\n\n", written["type"].as_str().unwrap_or("message"))
}

/// A draft, and what was found about the request before it was judged.
pub(crate) struct Drafted {
    /// Says nothing where none was waited for.
    pub(crate) answer: Completion,
    pub(crate) head: HeaderMap,
    /// An error is one of every choice: what goes out without a verdict, the settings say.
    pub(crate) request_check: Result<RequestCheck, ApiError>,
    /// Whether nobody waited for an answer.
    pub(crate) is_spared: bool,
    /// Of one that was judged while it was written, what went out then, and the pieces that did
    /// not.
    pub(crate) early: Option<(Early, Vec<Value>)>,
}

impl Drafted {
    /// A draft of which nothing is known.
    fn alone(answer: Completion) -> Self {
        let request_check = Ok(RequestCheck::default());
        Self { answer, head: HeaderMap::new(), request_check, is_spared: false, early: None }
    }

    /// What went out before it was whole.
    fn early(&self) -> Option<Early> {
        self.early.as_ref().map(|(early, _)| *early)
    }

    /// The pieces of a choice that are not out.
    fn pieces(&self, choice: u64) -> Vec<Value> {
        match &self.early {
            Some((_, rest)) if choice == windowed::CHOICE => rest.clone(),
            _ => self.answer.pieces(choice).collect(),
        }
    }

    /// What was said, by choice.
    fn drafts(&self) -> BTreeMap<u64, String> {
        if self.is_spared { BTreeMap::new() } else { self.answer.said() }
    }

    /// What is to be judged: the choices, each with what is known of the request; the first with
    /// what that took.
    fn choices(&self) -> Vec<(Result<RequestCheck, ApiError>, u64, String)> {
        let mut request_check = self.request_check.clone();
        let each = self.answer.said().into_iter().map(|(choice, said)| {
            let again =
                request_check.as_ref().map(RequestCheck::without_steps).map_err(ApiError::clone);
            (mem::replace(&mut request_check, again), choice, said)
        });
        each.collect()
    }
}

/// This second, since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Choices that are judged at one time: each holds what is asked about it.
const AT_ONCE: usize = 2;

/// Judges every choice of an answer, and tells the record what is found.
async fn review(
    guard: &Guard<Arc<dyn Mllm>>,
    request: &Request,
    drafted: &Drafted,
    record: &Record<'_>,
) -> Result<(), ApiError> {
    let all = drafted.choices().into_iter().map(|(request_check, choice, said)| {
        async move {
            found(considered_review(guard, request, request_check, &said), choice, record).await
        }
        .boxed()
    });
    let all: Vec<_> = all.collect();
    stream::iter(all).buffer_unordered(AT_ONCE).try_for_each(|_| std::future::ready(Ok(()))).await
}

/// Judges one choice, and tells the record what is found when it is.
pub(crate) async fn judge(
    guard: &Guard<Arc<dyn Mllm>>,
    request: &Request,
    index: u64,
    said: &str,
    record: &Record<'_>,
) -> Result<Outcome, ApiError> {
    found(reviewed(guard, request, said), index, record).await
}

/// The outcome of the steps on one choice; the record is told what is found when it is.
async fn found(
    events: impl Stream<Item = Result<Event, ApiError>> + Send,
    index: u64,
    record: &Record<'_>,
) -> Result<Outcome, ApiError> {
    pin_mut!(events);
    while let Some(event) = events.next().await {
        match event? {
            Event::Decided { verdict, .. } => record.add(index, Finding::Decided(verdict)),
            Event::Done(outcome) => {
                record.add(index, Finding::Done(outcome.clone()));
                return Ok(outcome);
            }
            _ => {}
        }
    }
    Err(ApiError::upstream("the steps had no end"))
}

/// Judges an answer that the client has already, and writes down what is found.
pub(crate) async fn observe(
    context: &RequestContext,
    request: &Request,
    answer: &Completion,
) -> Result<(), ApiError> {
    let guard = context.state.guard(request, context, context.mode);
    let record = context.record(request, answer.said());
    context.in_time(review(&guard, request, &Drafted::alone(answer.clone()), &record)).await?;
    record.written();
    Ok(())
}

/// The steps on one choice.
fn reviewed<'a>(
    guard: &'a Guard<Arc<dyn Mllm>>,
    request: &'a Request,
    said: &'a str,
) -> impl Stream<Item = Result<Event, ApiError>> + Send + 'a {
    guard.review_events(&request.chat, said).map(|event| event.map_err(ApiError::from))
}

/// The steps on one choice, of a request that was request_check.
fn considered_review<'a>(
    guard: &'a Guard<Arc<dyn Mllm>>,
    request: &'a Request,
    request_check: Result<RequestCheck, ApiError>,
    said: &'a str,
) -> impl Stream<Item = Result<Event, ApiError>> + Send + 'a {
    match request_check {
        Err(error) => stream::iter([Err(error)]).left_stream(),
        Ok(request_check) => {
            let events = guard.review_checked(&request.chat, request_check, said);
            events.map(|event| event.map_err(ApiError::from)).right_stream()
        }
    }
}

/// What is said in a draft's place. The fixed refusal is no JSON: where the client wants that, it
/// stands where the protocol has refusals.
fn message(outcome: &Outcome, request: &Request) -> Value {
    if outcome.refused && request.wants_json() {
        return json!({"role": "assistant", "content": null, "refusal": outcome.answer});
    }
    json!({"role": "assistant", "content": outcome.answer})
}

/// Why an answer in a draft's place ended: it was done, or its limit was reached.
fn ended(outcome: &Outcome) -> &'static str {
    let last = outcome
        .steps
        .iter()
        .rev()
        .find(|step| step.step == Step::Safe)
        .filter(|_| !outcome.refused);
    last.map_or("stop", |step| match step.finish {
        FinishReason::Length => finish(FinishReason::Length),
        _ => "stop",
    })
}
