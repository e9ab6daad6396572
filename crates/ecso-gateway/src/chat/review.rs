//! Judging the choices of an answer.

use std::sync::Arc;

use ecso::{Event, Guard, Mllm, Outcome, RequestCheck};
use futures::{FutureExt, Stream, StreamExt, TryStreamExt, pin_mut, stream};

use super::Draft;
use crate::{
    completion::Completion,
    context::{Record, RequestContext},
    error::ApiError,
    report::Finding,
    request::Request,
};

/// How many choices are judged at once. Each one holds its prompts in memory.
const AT_ONCE: usize = 2;

/// Judges every choice of an answer and adds the findings to the record.
pub(super) async fn review_choices(
    guard: &Guard<Arc<dyn Mllm>>,
    request: &Request,
    draft: &Draft,
    record: &Record<'_>,
) -> Result<(), ApiError> {
    let reviews = draft.choices().into_iter().map(|(request_check, choice, text)| {
        async move {
            let events = review_events(guard, request, request_check, &text);
            record_outcome(events, choice, record).await
        }
        .boxed()
    });
    let reviews: Vec<_> = reviews.collect();
    stream::iter(reviews)
        .buffer_unordered(AT_ONCE)
        .try_for_each(|_| std::future::ready(Ok(())))
        .await
}

/// Judges one choice and adds the findings to the record.
pub(crate) async fn judge(
    guard: &Guard<Arc<dyn Mllm>>,
    request: &Request,
    index: u64,
    text: &str,
    record: &Record<'_>,
) -> Result<Outcome, ApiError> {
    let events = guard.review_events(&request.chat, text);
    record_outcome(events.map(|event| event.map_err(ApiError::from)), index, record).await
}

/// Judges an answer that the client already has, and records the findings.
pub(crate) async fn observe(
    context: &RequestContext,
    request: &Request,
    answer: &Completion,
) -> Result<(), ApiError> {
    let guard = context.state.guard(request, context, context.mode);
    let record = context.record(request, answer.texts());
    let draft = Draft::of(answer.clone());
    context.in_time(review_choices(&guard, request, &draft, &record)).await?;
    record.finish();
    Ok(())
}

/// The events of judging one choice of a request that was checked before.
pub(super) fn review_events<'a>(
    guard: &'a Guard<Arc<dyn Mllm>>,
    request: &'a Request,
    request_check: Result<RequestCheck, ApiError>,
    text: &'a str,
) -> impl Stream<Item = Result<Event, ApiError>> + Send + 'a {
    match request_check {
        Err(error) => stream::iter([Err(error)]).left_stream(),
        Ok(request_check) => {
            let events = guard.review_checked(&request.chat, request_check, text);
            events.map(|event| event.map_err(ApiError::from)).right_stream()
        }
    }
}

/// Waits for the outcome of one choice. Each finding is added to the record as soon as it is known.
async fn record_outcome(
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
    Err(ApiError::upstream("the guard's steps ended without an outcome"))
}
