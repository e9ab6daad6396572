//! Guarded chats that are answered as a stream of server-sent events.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_stream::try_stream;
use axum::{http::HeaderMap, response::Response};
use bytes::Bytes;
use ecso::{Event, Guard, Mllm, Verdict};
use futures::{FutureExt, Stream, StreamExt, pin_mut};
use serde_json::{Map, Value, json};
use tokio::sync::{OwnedSemaphorePermit, mpsc::error::SendError};
use tracing::{Instrument, Span};

use super::{Draft, GuardedChat, message_of, now, review::review_events, rewritten_finish_reason};
use crate::{
    completion::{Completion, Events},
    context::Record,
    error::ApiError,
    report::{Finding, Report},
    settings::Streams,
    telemetry,
    upstream::{Answer, Transport, answer_head, limited_body},
    windowed::{self, WindowOptions, WindowedDraft},
    wire::{Begun, Wire},
    written::{Sender, event_stream},
};

impl GuardedChat {
    /// Answers with a stream: keep-alive comments until the verdict, then the draft as it came, or
    /// the safe answer as it is written.
    pub(super) async fn respond_stream(
        self,
        permit: OwnedSemaphorePermit,
    ) -> Result<Response, ApiError> {
        let guard = self.guard();
        let draft_span = telemetry::draft_span(&self.request.model);
        // The upstream is asked first, so that its refusal can still set the status.
        let started = if self.context.transport().is_some() {
            Some(self.context.in_time(self.ask().instrument(draft_span.clone())).await?)
        } else {
            self.request.check_local_support()?;
            None
        };
        let head = match &started {
            Some(Answer::Stream(response)) => answer_head(response.headers()),
            _ => HeaderMap::new(),
        };
        let mut omitted_tools = HeaderMap::new();
        self.add_omitted_tools(&mut omitted_tools);
        let longest = self.context.longest_stream();
        let mut response = event_stream(permit, longest, |out| async move {
            self.write(&guard, started, draft_span, &out).await
        });
        let own = std::mem::replace(response.headers_mut(), head);
        response.headers_mut().extend(own);
        response.headers_mut().extend(omitted_tools);
        Ok(response)
    }

    /// Writes the client's events, and keep-alive comments between them, until the stream ends or
    /// the client leaves.
    async fn write(
        &self,
        guard: &Guard<Arc<dyn Mllm>>,
        started: Option<Answer>,
        draft_span: Span,
        out: &Sender,
    ) -> Result<(), SendError<Bytes>> {
        const KEEP_ALIVE: &[u8] = b": the answer is being checked\n\n";
        let interval = Duration::from_secs(self.context.state.settings.keep_alive.max(1));
        let mut begun = Begun::default();
        let mut events = match &self.wire {
            None => self.chat_events(guard, started, draft_span).boxed(),
            Some(wire) => {
                self.wire_events(wire.as_ref(), &mut begun, guard, started, draft_span).boxed()
            }
        };
        out.send(Bytes::from_static(KEEP_ALIVE)).await?;
        loop {
            let next = tokio::select! {
                event = events.next() => event,
                () = tokio::time::sleep(interval) => {
                    out.send(Bytes::from_static(KEEP_ALIVE)).await?;
                    continue;
                }
            };
            match next {
                Some(Ok(text)) => out.send(Bytes::from(text)).await?,
                Some(Err(error)) => {
                    error.log(&self.context.id);
                    self.context.state.metrics.failure(error.code);
                    drop(events);
                    return out.send(Bytes::from(self.failure_event(begun, &error))).await;
                }
                None => return Ok(()),
            }
        }
    }

    /// A failure as the end of a stream.
    fn failure_event(&self, mut begun: Begun, error: &ApiError) -> String {
        match &self.wire {
            None => error.event(),
            Some(wire) => {
                let request = (self.context.id.as_str(), self.request.model.as_str());
                begun.fail(wire.as_ref(), request, error).iter().map(wire_event).collect()
            }
        }
    }

    /// Takes what has `started` if it is to be judged while it is written: when text of it may go
    /// out early, or when the model is to be stopped at the first harm.
    fn judge_while_written<'a>(
        &'a self,
        guard: &'a Guard<Arc<dyn Mllm>>,
        started: &mut Option<Answer>,
        draft_span: &Span,
    ) -> Option<WindowedDraft<'a>> {
        let Self { context, request, .. } = self;
        let settings = &context.state.settings;
        let is_windowed = context.stream_mode().is_ok_and(|streams| streams == Streams::Windowed);
        let releases = is_windowed && request.wants_plain_text();
        let is_concurrent = guard.model().is_concurrent();
        let can_judge = match context.transport() {
            Some(Transport::Server(_)) => is_concurrent,
            Some(Transport::Carrier(_)) => false,
            None => true,
        };
        if !can_judge || request.choices != 1 || !(releases || settings.early_stop) {
            return None;
        }
        let events = match started.take() {
            Some(Answer::Stream(response)) => {
                Events::new(limited_body(response, settings.limits.answer))
            }
            None => {
                let model = context.state.upstream.guarded_model(&request.model, &context.headers);
                Events::of_model(model, request.chat.clone(), request.local_sampling(), now())
            }
            other => {
                *started = other;
                return None;
            }
        };
        let options = WindowOptions {
            sizes: settings.windows,
            releases,
            checks_request_first: context.transport().is_none() && !is_concurrent,
            with_reasoning: self.wire.is_none(),
            on_failure: settings.on_failure,
        };
        let check = context.in_time(async { Ok(guard.check_request(&request.chat).await?) });
        let events = (events, draft_span.clone());
        Some(WindowedDraft::new(guard, &request.chat, options, events, check.boxed()))
    }

    /// Waits for the whole answer, and checks the request meanwhile.
    async fn draft(
        &self,
        guard: &Guard<Arc<dyn Mllm>>,
        started: Option<Answer>,
        draft_span: &Span,
    ) -> Result<Draft, ApiError> {
        let context = &self.context;
        let answer = async {
            let answer = match started {
                Some(answer) => answer,
                None => context.in_time(self.ask().instrument(draft_span.clone())).await?,
            };
            let answer = match answer {
                Answer::Stream(response) => {
                    let body = limited_body(response, context.state.settings.limits.answer);
                    let answer = Completion::from_stream(body);
                    context.in_time(answer.instrument(draft_span.clone())).await?
                }
                Answer::Whole(answer, _) => answer,
            };
            Ok((answer, HeaderMap::new()))
        };
        self.draft_with_check(guard, answer).await
    }

    /// The client's stream in another format: all events, once the whole answer is judged. In a
    /// windowed stream, text goes out before.
    fn wire_events<'a>(
        &'a self,
        wire: &'a dyn Wire,
        begun: &'a mut Begun,
        guard: &'a Guard<Arc<dyn Mllm>>,
        started: Option<Answer>,
        draft_span: Span,
    ) -> impl Stream<Item = Result<String, ApiError>> + Send + 'a {
        let Self { context, request, .. } = self;
        try_stream! {
            let mut record = context.record(request, BTreeMap::new());
            let mut started = started;
            let draft = match self.judge_while_written(guard, &mut started, &draft_span) {
                Some(mut windowed) => {
                    while let Some(chunks) = context.in_time(windowed.next()).await? {
                        let (text, early, answer) = windowed.so_far();
                        record.set_drafts(BTreeMap::from([(windowed::CHOICE, text)]), Some(early));
                        for piece in chunks.iter().filter_map(|chunk| chunk["delta"]["content"].as_str()) {
                            let message = Map::from_iter([("content".to_owned(), piece.into())]);
                            let answer = self.unjudged_wire_answer(answer, &message, "stop");
                            for event in begun.add(wire, &answer, piece) {
                                yield wire_event(&event);
                            }
                        }
                    }
                    windowed.finish()?
                }
                None => self.draft(guard, started, &draft_span).await?,
            };
            drop(draft_span);
            if let Err(error) = self.review(guard, &draft, &mut record).await {
                if begun.text().is_empty() || !record.is_unsafe() {
                    Err(error.clone())?;
                }
                // The verdict is known, and the answer ends in a refusal.
                error.log(&context.id);
                context.state.metrics.failure(error.code);
                record.set_failure(error.code);
            }
            let report = record.finish();
            let mut object = report.object(&context.id, context.trace());
            let mut choice =
                self.choices(&report, &draft.answer).into_iter().next().unwrap_or_default();
            if !begun.text().is_empty() {
                let refusal = &guard.profile().refusal;
                let safe_answer = continue_choice(&mut choice, &report, begun.text(), refusal);
                if let Some(safe_answer) = safe_answer {
                    object["safe_answer"] = safe_answer.into();
                }
            }
            let message = message_of(&choice);
            let mut answer = self.wire_answer(wire, &report, &draft.answer, message, Some(object));
            answer.refused &= begun.text().is_empty();
            for event in begun.finish(wire, &answer)? {
                yield wire_event(&event);
            }
        }
    }

    /// The client's stream in the format of chat completions. Text goes out once it is judged.
    fn chat_events<'a>(
        &'a self,
        guard: &'a Guard<Arc<dyn Mllm>>,
        started: Option<Answer>,
        draft_span: Span,
    ) -> impl Stream<Item = Result<String, ApiError>> + Send + 'a {
        let Self { context, request, .. } = self;
        try_stream! {
            let mut record = context.record(request, BTreeMap::new());
            let mut started = started;
            let draft = match self.judge_while_written(guard, &mut started, &draft_span) {
                Some(mut windowed) => {
                    while let Some(chunks) = context.in_time(windowed.next()).await? {
                        let (text, early, answer) = windowed.so_far();
                        let drafts = BTreeMap::from([(windowed::CHOICE, text)]);
                        record.set_drafts(drafts, Some(early));
                        for chunk in chunks {
                            yield self.chunk(answer, &chunk);
                        }
                    }
                    windowed.finish()?
                }
                None => self.draft(guard, started, &draft_span).await?,
            };
            drop(draft_span);
            record.set_drafts(draft.texts(), draft.early());
            let mut safe_answer = None;
            for (request_check, choice, text) in draft.choices() {
                let refusal = &guard.profile().refusal;
                let mut writer = ChoiceWriter::new(self, &draft, &record, choice, refusal);
                let events = review_events(guard, request, request_check, &text);
                pin_mut!(events);
                while !writer.is_done {
                    let next = context.in_time(async { Ok(events.next().await) }).await;
                    let Some(event) = next.unwrap_or_else(|late| Some(Err(late))) else { break };
                    for written in writer.write(event)? {
                        yield written;
                    }
                }
                safe_answer = writer.safe_answer.or(safe_answer);
            }
            yield self.last_chunk(&draft.answer, &record.finish(), safe_answer);
            yield "data: [DONE]\n\n".to_owned();
        }
    }

    /// The event that ends a stream: usage, and what the guard found.
    fn last_chunk(
        &self,
        answer: &Completion,
        report: &Report,
        safe_answer: Option<String>,
    ) -> String {
        let Self { context, request, .. } = self;
        let mut last = self.envelope(answer, "chat.completion.chunk");
        // Unless they asked for usage, clients expect a choice in each event.
        let empty_choice = json!([{"index": 0, "delta": {}, "finish_reason": null}]);
        last["choices"] = if request.wants_usage() { json!([]) } else { empty_choice };
        for (name, value) in answer.metadata().filter(|(name, _)| *name != "usage") {
            last[name] = value.clone();
        }
        if request.wants_usage() {
            last["usage"] = answer.usage().cloned().unwrap_or(Value::Null);
        }
        last["ecso"] = report.object(&context.id, context.trace());
        if let Some(answer) = safe_answer {
            last["ecso"]["safe_answer"] = answer.into();
        }
        format!("data: {last}\n\n")
    }

    /// An event with one chunk of a choice.
    fn chunk(&self, answer: &Completion, choice: &Value) -> String {
        let mut chunk = self.envelope(answer, "chat.completion.chunk");
        chunk["choices"] = json!([choice]);
        format!("data: {chunk}\n\n")
    }
}

/// Writes the client's events for one choice, as the guard's events come in.
struct ChoiceWriter<'a> {
    chat: &'a GuardedChat,
    draft: &'a Draft,
    record: &'a Record<'a>,
    index: u64,
    /// The profile's fixed refusal.
    refusal: &'a str,
    is_rewritten: bool,
    /// Whether some of the safe answer is out.
    has_begun: bool,
    /// The safe answer, if it can't take the place of the draft.
    safe_answer: Option<String>,
    /// Whether there is nothing more to write.
    is_done: bool,
}

impl<'a> ChoiceWriter<'a> {
    fn new(
        chat: &'a GuardedChat,
        draft: &'a Draft,
        record: &'a Record<'a>,
        index: u64,
        refusal: &'a str,
    ) -> Self {
        Self {
            chat,
            draft,
            record,
            index,
            refusal,
            is_rewritten: false,
            has_begun: false,
            safe_answer: None,
            is_done: false,
        }
    }

    /// Whether text of this choice is out already and can't be taken back. If the rest turns out
    /// harmful, the stream ends with the refusal, and the safe answer goes into a field of its own.
    fn is_partly_sent(&self) -> bool {
        self.draft.is_partly_sent(self.index)
    }

    /// The client's events for an event of the guard.
    fn write(&mut self, event: Result<Event, ApiError>) -> Result<Vec<String>, ApiError> {
        let wants_json = self.chat.request.wants_json();
        match event {
            Ok(Event::Decided { verdict, rewritten }) => Ok(self.decided(verdict, rewritten)),
            // Only the end says whether this is the fixed refusal. If that has a field of its own,
            // the answer waits for the end.
            Ok(Event::Answer(text))
                if self.is_rewritten && !self.is_partly_sent() && !wants_json =>
            {
                let role = !std::mem::replace(&mut self.has_begun, true);
                Ok(vec![self.delta(role, Some(("content", &text)), None)])
            }
            Ok(Event::Done(outcome)) => {
                let mut written = Vec::new();
                if self.is_rewritten && self.is_partly_sent() {
                    self.safe_answer = Some(outcome.answer.clone()).filter(|_| !outcome.refused);
                } else if self.is_rewritten {
                    if wants_json {
                        let field = if outcome.refused { "refusal" } else { "content" };
                        written.push(self.delta(true, Some((field, &outcome.answer)), None));
                    }
                    written.push(self.delta(false, None, Some(rewritten_finish_reason(&outcome))));
                }
                self.record.add(self.index, Finding::Done(outcome));
                Ok(written)
            }
            Ok(_) => Ok(Vec::new()),
            Err(error) => self.failed(error),
        }
    }

    /// Sends the draft, if it may go out.
    fn decided(&mut self, verdict: Verdict, is_rewritten: bool) -> Vec<String> {
        self.record.add(self.index, Finding::Decided(verdict));
        self.is_rewritten = is_rewritten;
        if !is_rewritten {
            self.rest_of_draft()
        } else if self.is_partly_sent() {
            let refusal = self.delta(false, Some(("refusal", self.refusal)), None);
            vec![refusal, self.delta(false, None, Some("content_filter"))]
        } else {
            Vec::new()
        }
    }

    /// The guard failed: the draft goes out only if the operator allows it and no safe answer has
    /// begun.
    fn failed(&mut self, error: ApiError) -> Result<Vec<String>, ApiError> {
        let context = &self.chat.context;
        self.is_done = true;
        if self.is_rewritten && self.is_partly_sent() {
            error.log(&context.id);
            context.state.metrics.failure(error.code);
            self.record.set_failure(error.code);
            return Ok(Vec::new());
        }
        if self.has_begun || !self.chat.fails_open(&error, self.record) {
            return Err(error);
        }
        self.record.failed_open(Some(self.index), error.code);
        Ok(self.rest_of_draft())
    }

    fn rest_of_draft(&self) -> Vec<String> {
        let chunks = self.draft.unsent_chunks(self.index);
        chunks.iter().map(|chunk| self.chat.chunk(&self.draft.answer, chunk)).collect()
    }

    /// An event with a part of a safe answer: the role if `begins`, a text in its field, and why it
    /// ended.
    fn delta(&self, begins: bool, text: Option<(&str, &str)>, finish: Option<&str>) -> String {
        let role = Some(("role", "assistant")).filter(|_| begins);
        let delta = role.into_iter().chain(text).map(|(name, text)| (name.to_owned(), text.into()));
        let delta: Map<String, Value> = delta.collect();
        let choice = json!({"index": self.index, "delta": delta, "finish_reason": finish});
        self.chat.chunk(&self.draft.answer, &choice)
    }
}

/// Makes a choice begin with the text that is out and can't be taken back. If the rest turned out
/// harmful, it ends with the refusal, and the safe answer is returned.
fn continue_choice(
    choice: &mut Value,
    report: &Report,
    out: &str,
    refusal: &str,
) -> Option<String> {
    let outcome = report.findings().find_map(|(_, finding)| finding.outcome());
    if outcome.map_or(report.verdict() == Verdict::Unsafe, |outcome| outcome.rewritten) {
        let message = json!({"content": out, "refusal": refusal});
        *choice = json!({"finish_reason": "content_filter", "message": message});
        return outcome.filter(|outcome| !outcome.refused).map(|outcome| outcome.answer.clone());
    }
    if let Some(message) = choice["message"].as_object_mut() {
        message.retain(|name, _| !name.starts_with("reasoning"));
    }
    None
}

/// An event of another format, named by its type.
fn wire_event(event: &Value) -> String {
    format!("event: {}\ndata: {event}\n\n", event["type"].as_str().unwrap_or("message"))
}
