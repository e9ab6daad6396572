//! Answers a question from the page with a stream of events: those of [`Guard::answer_events`], as
//! far as the operator lets clients see them.

use std::{collections::BTreeMap, sync::Arc};

use axum::{body::Body, extract::State, http::HeaderMap, response::Response};
use bytes::Bytes;
use ecso::{Event, Guard, Profile, Step, Trace, profile::Gate};
use futures::{StreamExt, pin_mut};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    sync::mpsc::error::SendError,
    time::{Duration, timeout},
};
use tracing::Instrument;

use super::{PageState, default_profile, edit::Edit, prompts, require_full_trace, threshold};
use crate::{
    context::RequestContext,
    error::ApiError,
    json,
    report::Finding,
    request::{Body as Chat, Request},
    server::{Gateway, finish_response, request_id},
    settings::{Mode, TraceLevel},
    state::AppState,
    telemetry,
    upstream::HTTP,
    written::{Sender, event_stream},
};

/// The longest prompt that the page shows, in characters.
const MAX_SHOWN: usize = 64 << 10;

/// The request body.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Question {
    text: String,
    /// Data URLs.
    #[serde(default)]
    images: Vec<String>,
    arm: Arm,
}

/// How the answer is guarded.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Arm {
    /// Not at all.
    Unguarded,
    /// Under an existing profile, by name.
    Profile(String),
    /// Under a profile that was edited in the page.
    Edited(Edit),
}

impl Arm {
    /// The profile for this model. Any profile other than the operator's could release what that
    /// one holds back, so it needs the right to see everything.
    fn profile(&self, state: &AppState, model: &str) -> Result<Profile, ApiError> {
        let usual = default_profile(state, Some(model));
        match self {
            Self::Profile(name) if *name == usual.name => return Ok(usual.clone()),
            _ => require_full_trace(state)?,
        }
        match self {
            Self::Unguarded => {
                let mut profile = usual.clone();
                (profile.name, profile.gate) = ("unguarded".into(), Gate::Never);
                Ok(profile)
            }
            Self::Profile(name) => super::profile(state, name),
            Self::Edited(edit) => edit.apply(state),
        }
    }
}

impl Question {
    /// The question as a chat.
    fn chat(&self) -> Result<Value, ApiError> {
        if self.images.iter().any(|image| !image.starts_with("data:")) {
            return Err(ApiError::bad_request("invalid_image", "images must be data URLs"));
        }
        let images =
            self.images.iter().map(|url| json!({"type": "image_url", "image_url": {"url": url}}));
        let parts: Vec<Value> =
            images.chain([json!({"type": "text", "text": self.text})]).collect();
        Ok(json!({"messages": [{"role": "user", "content": parts}]}))
    }
}

/// Answers a question, and sends everything that happens meanwhile.
pub(super) async fn ask(
    State(page): State<PageState>,
    request: axum::extract::Request,
) -> Response {
    let (id, state) = (request_id(), page.gateway.state());
    let span = telemetry::request_span("playground", &id, request.headers());
    let response = Box::pin(respond(&page.gateway, &state, &id, request.into_body()));
    finish_response(&id, (HTTP, "playground"), &state.metrics, response.instrument(span)).await
}

async fn respond(
    gateway: &Gateway,
    state: &Arc<AppState>,
    id: &str,
    body: Body,
) -> Result<Response, ApiError> {
    let mut context = gateway.admit_page(state, id)?;
    let body = context.read(body).await?;
    let question: Question = json::parse_as(&body)?;
    drop(body);
    let model = context.in_time(state.upstream.model_name(&context.headers)).await?;
    let profile = question.arm.profile(state, &model)?;
    if profile.gate == Gate::Never {
        context.mode = Mode::Off;
    }
    context.profile = Some(profile.name.clone());
    let chat = Chat::parse(question.chat()?, &[])?;
    let turn = context.in_time(gateway.admission.enter()).await?;
    let mut request = context.prepare(chat).await?;
    request.model = model;
    prompts::check(&profile, &request.chat, state.settings.limits.text)?;
    let longest = context.longest_stream();
    Ok(event_stream(turn, longest, |out| write_events(context, request, profile, out)))
}

/// Sends the events of an answer as they happen. Dropping this cancels the work.
async fn write_events(
    context: RequestContext,
    request: Request,
    profile: Profile,
    out: Sender,
) -> Result<(), SendError<Bytes>> {
    let settings = &context.state.settings;
    let keep_alive = Duration::from_secs(settings.keep_alive.max(1));
    let threshold = threshold(&profile).filter(|_| settings.trace != TraceLevel::None);
    let begun = json!({
        "profile": profile.name, "model": request.model, "threshold": threshold,
        "images": request.chat.image_count(),
    });
    out.send(to_sse("begun", &begun)).await?;
    // All calls go to the guarded model itself, and nothing is taken from memory, so that the page
    // shows the real cost.
    let model = context.state.upstream.guarded_model(&request.model, &HeaderMap::new());
    let guard = Guard::new(model, profile);
    let mut record = context.record(&request, BTreeMap::new());
    let events = guard.answer_events(&request.chat);
    pin_mut!(events);
    loop {
        let event = match timeout(keep_alive.min(context.time_left()), events.next()).await {
            Ok(Some(event)) => event.map_err(ApiError::from),
            Ok(None) => break,
            Err(_) if context.time_left().is_zero() => {
                Err(ApiError::deadline(settings.limits.deadline))
            }
            Err(_) => {
                out.send(Bytes::from_static(b":\n\n")).await?;
                continue;
            }
        };
        match event {
            Ok(event) => {
                if let Some((name, data)) = visible(&event, settings.trace) {
                    out.send(to_sse(name, &data)).await?;
                }
                match event {
                    Event::Finished(Trace { step: Step::Direct, reply, .. }) => {
                        record.set_drafts(BTreeMap::from([(0, reply)]), None);
                    }
                    Event::Decided { verdict, .. } => record.add(0, Finding::Decided(verdict)),
                    Event::Done(outcome) => record.add(0, Finding::Done(outcome)),
                    _ => {}
                }
            }
            Err(failure) => {
                failure.log(&context.id);
                context.state.metrics.failure(failure.code);
                return out.send(to_sse("error", &failure.object())).await;
            }
        }
    }
    record.finish();
    Ok(())
}

fn to_sse(name: &str, data: &Value) -> Bytes {
    format!("event: {name}\ndata: {data}\n\n").into()
}

/// The page's version of an event. The texts of prompts and replies are only included with
/// [`TraceLevel::Full`]; the answer is sent once it may go out.
fn visible(event: &Event, trace: TraceLevel) -> Option<(&'static str, Value)> {
    Some(match event {
        Event::Started { .. } | Event::Finished(_) if trace == TraceLevel::None => return None,
        Event::Started { step, images } => ("started", json!({"step": step, "images": images})),
        Event::Finished(call) => {
            let prompt = shown(&call.prompt);
            let mut call = json!(call);
            if trace == TraceLevel::Full {
                call["prompt"] = prompt.into();
            } else if let Some(fields) = call.as_object_mut() {
                fields.retain(|name, _| !matches!(name.as_str(), "prompt" | "reply"));
            }
            ("finished", call)
        }
        Event::Decided { verdict, rewritten } => {
            ("decided", json!({"verdict": verdict, "rewritten": rewritten}))
        }
        Event::Answer(text) => ("answer", json!({"text": text})),
        Event::Done(outcome) => (
            "done",
            json!({
                "verdict": outcome.verdict, "rewritten": outcome.rewritten,
                "score": outcome.score.filter(|_| trace != TraceLevel::None),
                "refused": outcome.refused,
            }),
        ),
        _ => return None,
    })
}

/// The beginning of a long prompt, marked as such.
fn shown(prompt: &str) -> String {
    match prompt.char_indices().nth(MAX_SHOWN) {
        Some((end, _)) => format!("{} …", &prompt[..end]),
        None => prompt.to_owned(),
    }
}
