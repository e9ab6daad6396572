//! The handlers of the API's routes.

use std::sync::{Arc, LazyLock};

use axum::{
    body::Body,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use ecso::profile::Scope;
use serde_json::json;
use tracing::Instrument;

use crate::{
    chat,
    context::{RequestContext, check_content_headers},
    error::{ApiError, ApiErrors, ErrorBody},
    json as strict,
    observe::ObservedRequest,
    openapi::{ChatAnswer, ChatRequest, Models},
    passthrough::passthrough,
    request,
    server::{Gateway, finish_response, request_id, routes},
    settings::Mode,
    telemetry,
    upstream::{CHAT, HTTP, Upstream, door},
    wire::{Format, PREVIOUS_RESPONSE_ID, external_conversation},
};

/// Answers a chat. Answers in scope are judged before they go out.
#[utoipa::path(
    post, path = "/v1/chat/completions", request_body = ChatRequest,
    responses(
        (status = 200, description = "The answer; a stream of server-sent events if the request asks for one", content(
            (ChatAnswer = "application/json"), (Value = "text/event-stream")
        )),
        ApiErrors,
        (status = "default", description = "The response of the server behind the guard"),
    ),
)]
pub(crate) async fn completions(
    State(gateway): State<Arc<Gateway>>,
    request: axum::extract::Request,
) -> Response {
    handle(&gateway, "chat", None, request).await
}

/// Answers a request in Anthropic's Messages format, as a chat.
#[utoipa::path(post, path = "/v1/messages", request_body = Object, responses(
    (status = 200, description = "The message; a stream of its events if the request asks for one", content(
        (Object = "application/json"), (Value = "text/event-stream")
    )),
    ApiErrors,
    (status = "default", description = "The response of the server behind the guard"),
))]
pub(crate) async fn messages(
    State(gateway): State<Arc<Gateway>>,
    request: axum::extract::Request,
) -> Response {
    handle(&gateway, "messages", Some(Format::Messages), request).await
}

/// Answers a request in OpenAI's Responses format, as a chat. Later requests can continue from the
/// answer for a while (`previous_response_id`).
#[utoipa::path(post, path = "/v1/responses", request_body = Object, responses(
    (status = 200, description = "The response; a stream of its events if the request asks for one", content(
        (Object = "application/json"), (Value = "text/event-stream")
    )),
    ApiErrors,
    (status = "default", description = "The response of the server behind the guard"),
))]
pub(crate) async fn responses(
    State(gateway): State<Arc<Gateway>>,
    request: axum::extract::Request,
) -> Response {
    handle(&gateway, "responses", Some(Format::Responses), request).await
}

/// Handles a request in a format; `None` is chat completions.
async fn handle(
    gateway: &Gateway,
    route: &'static str,
    format: Option<Format>,
    request: axum::extract::Request,
) -> Response {
    let (id, state) = (request_id(), gateway.state());
    let (head, body) = request.into_parts();
    let (span, door) = (telemetry::request_span(route, &id, &head.headers), door(&head.extensions));
    let uri = head.uri.clone();
    let response = async {
        let with_format = |error| ApiError { format, ..error };
        let context = gateway.admit(&state, &id, head).map_err(with_format)?;
        let path = match format {
            Some(_) => uri.path_and_query().map_or(uri.path(), |whole| whole.as_str()),
            None => CHAT,
        };
        Box::pin(answer(gateway, context, format, path, body)).await.map_err(with_format)
    };
    finish_response(&id, (door, route), &state.metrics, response.instrument(span)).await
}

/// Answers a request in a format (`None`: chat completions): forwards it to `path`, observes it, or
/// guards it as a chat.
pub(crate) async fn answer(
    gateway: &Gateway,
    mut context: RequestContext,
    format: Option<Format>,
    path: &str,
    body: Body,
) -> Result<Response, ApiError> {
    let state = Arc::clone(&context.state);
    let settings = &state.settings;
    let transport = context.transport();
    if let Some(transport) = &transport
        && context.caller.is_never_guarded(settings)
    {
        return context.forward_post(transport, path, context.stream_body(body)).await;
    }
    let body = context.read(body).await?;
    let value = strict::parse(&body);
    let model = context.model(value.as_ref().ok());
    context.mode = context.caller.mode(settings, model, &context.headers)?;
    let scope = context.scope(model);
    let value =
        check_content_headers(&context.headers).and(value.map_err(ApiError::unreadable_body));
    if context.mode == Mode::Enforce || transport.is_none() {
        context.keep_known_headers();
        context.set_json();
        if format.is_some() {
            context.use_bearer_key();
        }
    }
    // An unreadable request counts as in scope.
    let is_in_scope = |parsed: &Result<request::Body, ApiError>| {
        scope == Scope::All || parsed.as_ref().map_or(true, request::Body::has_images)
    };
    // Without enforcement, the upstream's own route answers. It has the earlier answers.
    if let (Some(transport), Mode::Off | Mode::Observe) = (&transport, context.mode) {
        let mut load = |_: &str| Err(external_conversation(PREVIOUS_RESPONSE_ID));
        let chat = value.and_then(|value| match format {
            Some(format) => format.parse(value, &mut load).map(|(chat, _)| chat),
            None => Ok(value),
        });
        let parsed = chat.and_then(|chat| request::Body::parse(chat, &settings.allow_fields));
        if context.mode == Mode::Off || !is_in_scope(&parsed) || !settings.is_sampled() {
            return context.forward_post(transport, path, body).await;
        }
        let admission = Arc::clone(&gateway.admission);
        return ObservedRequest { context, admission, parsed, format }
            .forward(transport, path, body)
            .await;
    }
    let value = value?;
    let (chat, wire) = match format {
        Some(format) => {
            let remaining = (
                settings.limits.body.saturating_sub(body.len()),
                strict::MAX_VALUES.saturating_sub(strict::count_values(&value)),
            );
            let tenant = context.tenant();
            let mut load = |id: &str| {
                let owned = (tenant.as_str(), id);
                state.store.conversation(owned, remaining, |bytes| context.reserve_more(bytes))
            };
            let (chat, wire) = format.parse(value, &mut load)?;
            (chat, Some(wire))
        }
        None => (value, None),
    };
    let parsed = request::Body::parse(chat, &settings.allow_fields);
    if let (Some(transport), None) = (&transport, format)
        && !is_in_scope(&parsed)
    {
        return context.forward_post(transport, path, body).await;
    }
    drop(body);
    let parsed = parsed?;
    let turn = context.in_time(gateway.admission.enter()).await?;
    let request = context.prepare(parsed).await?;
    chat::enforce(context, request, turn, wire).await
}

/// Estimates how many tokens a request in the Messages format has. The format itself calls this
/// number an estimate.
#[utoipa::path(post, path = "/v1/messages/count_tokens", request_body = Object, responses(
    (status = 200, description = "The number of tokens", body = Object),
    ApiErrors,
    (status = "default", description = "The response of the server behind the guard"),
))]
pub(crate) async fn count_tokens(
    State(gateway): State<Arc<Gateway>>,
    request: axum::extract::Request,
) -> Response {
    let (id, state) = (request_id(), gateway.state());
    let (head, body) = request.into_parts();
    let (span, door) =
        (telemetry::request_span("count_tokens", &id, &head.headers), door(&head.extensions));
    let uri = head.uri.clone();
    let counted = async {
        let context = gateway.admit(&state, &id, head)?;
        let path = uri.path_and_query().map_or(uri.path(), |whole| whole.as_str());
        Box::pin(count_request(context, path, body)).await
    };
    let counted = async {
        counted.await.map_err(|error| ApiError { format: Some(Format::Messages), ..error })
    };
    finish_response(&id, (door, "count_tokens"), &state.metrics, counted.instrument(span)).await
}

/// Counts the tokens of a request. If its answer would not be guarded, the upstream counts.
async fn count_request(
    mut context: RequestContext,
    path: &str,
    body: Body,
) -> Result<Response, ApiError> {
    let state = Arc::clone(&context.state);
    let body = context.read(body).await?;
    let value = strict::parse(&body);
    let model = context.model(value.as_ref().ok());
    context.mode = context.caller.mode(&state.settings, model, &context.headers)?;
    if let (Some(transport), Mode::Off | Mode::Observe) = (context.transport(), context.mode) {
        return context.forward_post(&transport, path, body).await;
    }
    check_content_headers(&context.headers)?;
    let (chat, _) = Format::Messages
        .parse(value.map_err(ApiError::unreadable_body)?, &mut |_| {
            Err(external_conversation(PREVIOUS_RESPONSE_ID))
        })?;
    let counted =
        json!({"input_tokens": request::Body::parse(chat, &state.settings.allow_fields)?.tokens()});
    Ok(([(header::CONTENT_TYPE, "application/json")], counted.to_string()).into_response())
}

/// Whether this process is running.
#[utoipa::path(get, path = "/healthz", responses((status = 200, body = String)))]
pub(crate) async fn health() -> &'static str {
    "ok"
}

/// Whether the upstream responds.
#[utoipa::path(get, path = "/readyz", responses(
    (status = 200, body = String), (status = 503, description = "The upstream does not respond", body = String)
))]
pub(crate) async fn ready(State(gateway): State<Arc<Gateway>>) -> Response {
    if gateway.readiness.check(&gateway.state().upstream).await {
        return "ok".into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, "the upstream does not answer").into_response()
}

/// Metrics for Prometheus, if the operator turned them on.
#[utoipa::path(get, path = "/metrics", responses(
    (status = 200, body = String, content_type = "application/openmetrics-text"), (status = 404, body = ErrorBody)
))]
pub(crate) async fn metrics(State(gateway): State<Arc<Gateway>>) -> Response {
    let state = gateway.state();
    if !state.settings.metrics {
        let message = "metrics are off; set gateway.metrics = true";
        return ApiError::new(StatusCode::NOT_FOUND, "not_found", message).into_response();
    }
    let (running, waiting) = gateway.admission.load();
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], state.metrics.text(running, waiting)).into_response()
}

/// This description of the API.
#[utoipa::path(get, path = "/openapi.json", responses((status = 200, body = Object)))]
pub(crate) async fn description() -> Response {
    static TEXT: LazyLock<String> =
        LazyLock::new(|| routes().into_openapi().to_json().unwrap_or_default());
    ([(header::CONTENT_TYPE, "application/json")], TEXT.as_str()).into_response()
}

/// Lists the models of the server behind the guard, or the model in this process.
#[utoipa::path(get, path = "/v1/models", responses(
    (status = 200, body = Models), ApiErrors, (status = "default", description = "The response of the server behind the guard")
))]
pub(crate) async fn models(
    State(gateway): State<Arc<Gateway>>,
    request: axum::extract::Request,
) -> Response {
    let state = gateway.state();
    let Upstream::Engine(model) = &state.upstream else {
        return passthrough(State(gateway), request).await;
    };
    if door(request.extensions()) != HTTP {
        return passthrough(State(gateway), request).await;
    }
    let id = request_id();
    let response = async {
        gateway.admit(&state, &id, request.into_parts().0)?;
        let list = json!({"object": "list", "data": [
            {"id": model.name(), "object": "model", "created": 0, "owned_by": "ecso"}]});
        Ok(([(header::CONTENT_TYPE, "application/json")], list.to_string()).into_response())
    };
    finish_response(
        &id,
        (HTTP, "models"),
        &state.metrics,
        response.instrument(tracing::Span::none()),
    )
    .await
}
