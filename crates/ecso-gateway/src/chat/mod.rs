//! A guarded chat: the draft, its verdict, and what the client gets. No text of an answer leaves
//! before its verdict.
//!
//! `draft` is the upstream's answer with what is known about the request, `review` judges it, and
//! `stream` writes answers as server-sent events.

mod draft;
mod review;
mod stream;

use std::{
    sync::{Arc, LazyLock},
    time::{SystemTime, UNIX_EPOCH},
};

use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, header},
    response::Response,
};
use ecso::{
    FinishReason, Guard, Mllm, Outcome, Reply, RequestCheck, Step, Verdict, with_background,
};
use futures::{
    FutureExt,
    future::{maybe_done, try_join_all},
    pin_mut,
};
use serde_json::{Map, Value, json};
use tokio::sync::OwnedSemaphorePermit;
use tracing::Instrument;

use crate::{
    completion::{Completion, finish_reason},
    context::{Record, RequestContext},
    error::ApiError,
    report::Report,
    request::Request,
    settings::{OnFailure, TraceLevel},
    telemetry,
    upstream::Answer,
    wire::{self, Wire},
};
pub(crate) use draft::Draft;
pub(crate) use review::{judge, observe};

/// Answers a chat under guard. With a `wire`, the answer is written in that format. `permit` is the
/// request's turn; a stream keeps it until it ends.
pub(crate) async fn enforce(
    context: RequestContext,
    request: Request,
    permit: OwnedSemaphorePermit,
    wire: Option<Box<dyn Wire>>,
) -> Result<Response, ApiError> {
    let chat = GuardedChat { context, request, wire };
    // An unreadable header is reported before the upstream is asked.
    chat.context.stream_mode()?;
    if chat.request.stream {
        chat.respond_stream(permit).boxed().await
    } else {
        chat.respond_whole().boxed().await
    }
}

/// A chat to be guarded.
struct GuardedChat {
    context: RequestContext,
    request: Request,
    wire: Option<Box<dyn Wire>>,
}

impl GuardedChat {
    fn guard(&self) -> Guard<Arc<dyn Mllm>> {
        let Self { context, request, .. } = self;
        context.state.guard(request, context, context.mode)
    }

    async fn respond_whole(self) -> Result<Response, ApiError> {
        let guard = self.guard();
        let answer = async {
            let answer = self.ask().instrument(telemetry::draft_span(&self.request.model));
            match self.context.in_time(answer).await? {
                Answer::Whole(answer, head) => Ok((answer, head)),
                Answer::Stream(_) => {
                    Err(ApiError::upstream("the upstream sent an unrequested stream"))
                }
            }
        };
        let draft = self.draft_with_check(&guard, answer).await?;
        let mut record = self.context.record(&self.request, draft.texts());
        self.review(&guard, &draft, &mut record)
            .await
            .map_err(|error| error.with_head(&draft.head))?;
        Ok(self.whole_response(&record.finish(), &draft.answer, draft.head))
    }

    /// Waits for `answer` and checks the request at the same time. If no answer could make the
    /// request safe, the answer isn't waited for. A model in this process takes longer
    /// over concurrent calls, so it is asked for the answer only after the check.
    async fn draft_with_check(
        &self,
        guard: &Guard<Arc<dyn Mllm>>,
        answer: impl Future<Output = Result<(Completion, HeaderMap), ApiError>> + Send,
    ) -> Result<Draft, ApiError> {
        let Self { context, request, .. } = self;
        let check = async { Ok(guard.check_request(&request.chat).await?) };
        let (check, answer) = (context.in_time(check), maybe_done(answer));
        pin_mut!(check, answer);
        let is_concurrent = context.transport().is_some() || guard.model().is_concurrent();
        let request_check = with_background(check, is_concurrent.then_some(answer.as_mut())).await;
        if request_check.as_ref().is_ok_and(RequestCheck::is_harmful) {
            // An answer that is there already is recorded, and has its choices.
            if let Some(Ok((answer, head))) = answer.as_mut().take_output() {
                return Ok(Draft { head, request_check, ..Draft::of(answer) });
            }
            let empty = vec![Reply::default(); usize::try_from(request.choices).unwrap_or(1)];
            let answer = Completion::from_replies(&empty, now());
            return Ok(Draft { request_check, is_skipped: true, ..Draft::of(answer) });
        }
        // If the upstream refuses the request, that is reported rather than a failure of the guard.
        answer.as_mut().await;
        let (answer, head) =
            answer.take_output().ok_or_else(|| ApiError::upstream("there is no answer"))??;
        Ok(Draft { head, request_check, ..Draft::of(answer) })
    }

    /// Judges all choices of an answer, and adds what was found to the record. An error means that
    /// nothing of the answer may go out.
    async fn review(
        &self,
        guard: &Guard<Arc<dyn Mllm>>,
        draft: &Draft,
        record: &mut Record<'_>,
    ) -> Result<(), ApiError> {
        let Self { context, request, .. } = self;
        record.set_drafts(draft.texts(), draft.early());
        let review = review::review_choices(guard, request, draft, record);
        if let Err(error) = context.in_time(review).await {
            if !self.fails_open(&error, record) {
                return Err(error);
            }
            record.failed_open(None, error.code);
        }
        Ok(())
    }

    /// Whether an unjudged answer goes out because the guard failed. This never happens once a
    /// verdict holds an answer back.
    fn fails_open(&self, error: &ApiError, record: &Record<'_>) -> bool {
        let is_allowed = self.context.state.settings.on_failure == OnFailure::Open;
        let fails_open = is_allowed && error.may_open && !record.is_unsafe();
        if fails_open {
            error.log(&self.context.id);
            tracing::warn!(
                id = self.context.id,
                "the guard failed open: this answer goes out unjudged"
            );
        }
        fails_open
    }

    fn envelope(&self, answer: &Completion, object: &str) -> Value {
        answer.envelope(&self.context.id, &self.request.model, object)
    }

    /// The choices that go out.
    fn choices(&self, report: &Report, answer: &Completion) -> Vec<Value> {
        let choices = report.findings().map(|(index, finding)| match finding.outcome() {
            Some(outcome) if outcome.rewritten => {
                json!({"index": index, "finish_reason": rewritten_finish_reason(outcome),
                "message": rewritten_message(outcome, &self.request), "logprobs": null})
            }
            _ => answer.choice(index),
        });
        choices.collect()
    }

    /// The whole answer in the format of chat completions.
    fn completion(&self, report: &Report, answer: &Completion) -> Value {
        let mut completion = self.envelope(answer, "chat.completion");
        completion["choices"] = self.choices(report, answer).into();
        for (name, value) in answer.metadata() {
            completion[name] = value.clone();
        }
        if self.context.trace() != TraceLevel::None {
            completion["ecso"] = report.object(&self.context.id, self.context.trace());
        }
        completion
    }

    /// An answer for another format, from the message that goes out. Other formats have one choice.
    fn wire_answer<'a>(
        &'a self,
        wire: &dyn Wire,
        report: &Report,
        answer: &'a Completion,
        (message, finish): (&'a Map<String, Value>, &'a str),
        report_object: Option<Value>,
    ) -> wire::Answer<'a> {
        let outcome = report.findings().find_map(|(_, finding)| finding.outcome());
        let mut answer = wire::Answer {
            usage: answer.usage(),
            report: report_object,
            refused: outcome.is_some_and(|outcome| outcome.refused),
            verdict: (report.verdict(), report.score()),
            ..self.unjudged_wire_answer(answer, message, finish)
        };
        // Stored before it goes out: the client may refer to it at once.
        answer.is_stored =
            wire.to_store().is_some_and(|part| self.store(&part, &answer.chat_message()));
        answer
    }

    /// The frame of an answer for another format, without what is known at its end.
    fn unjudged_wire_answer<'a>(
        &'a self,
        answer: &Completion,
        message: &'a Map<String, Value>,
        finish: &'a str,
    ) -> wire::Answer<'a> {
        wire::Answer {
            id: &self.context.id,
            model: &self.request.model,
            created: self.envelope(answer, "")["created"].as_u64().unwrap_or(0),
            message,
            finish,
            refused: false,
            usage: None,
            report: None,
            is_stored: false,
            verdict: (Verdict::Unchecked, None),
        }
    }

    /// Stores the answer and the messages that led to it, so that later requests can continue from
    /// it. Returns whether there was room.
    fn store(&self, part: &wire::StoredPart<'_>, answer: &Value) -> bool {
        let Self { context, request, .. } = self;
        let messages = request.messages().get(part.from..).unwrap_or_default();
        let key = (context.tenant(), &context.id);
        context.state.store.insert((&key.0, key.1), part.previous, messages, answer)
    }

    fn whole_response(&self, report: &Report, answer: &Completion, head: HeaderMap) -> Response {
        let body = match &self.wire {
            None => self.completion(report, answer),
            Some(wire) => {
                let trace = self.context.trace();
                let object =
                    (trace != TraceLevel::None).then(|| report.object(&self.context.id, trace));
                let choice = self.choices(report, answer).into_iter().next().unwrap_or_default();
                let message = message_of(&choice);
                wire.body(&self.wire_answer(wire.as_ref(), report, answer, message, object))
            }
        };
        let mut response = Response::new(Body::from(body.to_string()));
        *response.headers_mut() = head;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        self.add_omitted_tools(headers);
        report.headers(headers);
        response
    }

    /// Names the tools that were left out in a header, up to a fixed number.
    fn add_omitted_tools(&self, headers: &mut HeaderMap) {
        const MOST: usize = 16;
        let omitted =
            self.wire.iter().flat_map(|wire| wire.omitted_tools()).map(String::as_str).take(MOST);
        let omitted = omitted.collect::<Vec<_>>().join(", ");
        if let Some(Ok(kinds)) =
            Some(omitted).filter(|kinds| !kinds.is_empty()).map(HeaderValue::try_from)
        {
            headers.insert("x-ecso-tools-left-out", kinds);
        }
    }

    /// Asks the guarded model for its answer.
    async fn ask(&self) -> Result<Answer, ApiError> {
        let Self { context, request, .. } = self;
        if let Some(transport) = context.transport() {
            return transport
                .answer(&context.headers, request, context.state.settings.limits.answer)
                .await;
        }
        request.check_local_support()?;
        let model = &context.state.upstream.guarded_model(&request.model, &context.headers);
        let sampling = request.local_sampling();
        let replies = (0..request.choices).map(|choice| {
            let seed = sampling.seed.map_or(choice, |seed| seed.wrapping_add(choice));
            let sampling = ecso::Sampling {
                seed: (choice > 0).then_some(seed).or(sampling.seed),
                ..sampling.clone()
            };
            async move { model.generate(&request.chat, &sampling).await }
        });
        let replies = try_join_all(replies)
            .await
            .map_err(|error| ApiError::asking("invalid_request", error))?;
        Ok(Answer::Whole(Completion::from_replies(&replies, now()), HeaderMap::new()))
    }
}

/// The current time in seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The message of a choice, and its finish reason.
fn message_of(choice: &Value) -> (&Map<String, Value>, &str) {
    static NO_MESSAGE: LazyLock<Map<String, Value>> = LazyLock::new(Map::new);
    let message = choice["message"].as_object().unwrap_or(&NO_MESSAGE);
    (message, choice["finish_reason"].as_str().unwrap_or("stop"))
}

/// The message that replaces a draft. The fixed refusal is not JSON: if the client wants JSON, the
/// refusal goes into the protocol's field for refusals.
fn rewritten_message(outcome: &Outcome, request: &Request) -> Value {
    if outcome.refused && request.wants_json() {
        return json!({"role": "assistant", "content": null, "refusal": outcome.answer});
    }
    json!({"role": "assistant", "content": outcome.answer})
}

/// Why the replacement of a draft ended: it was complete, or it reached its token limit.
fn rewritten_finish_reason(outcome: &Outcome) -> &'static str {
    let last = outcome
        .steps
        .iter()
        .rev()
        .find(|step| step.step == Step::Safe)
        .filter(|_| !outcome.refused);
    last.map_or("stop", |step| match step.finish {
        FinishReason::Length => finish_reason(FinishReason::Length),
        _ => "stop",
    })
}
