//! The server: its routes, and how a chat request is handled.

use std::{
    io,
    sync::{Arc, LazyLock},
};

use arc_swap::ArcSwap;
use axum::{
    Router,
    body::Body,
    extract::State,
    http::{HeaderValue, Method, StatusCode, header, request::Parts},
    middleware,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use ecso::{Memory, profile::Scope};
use serde_json::json;
use tokio::sync::Semaphore;
use tracing::{Instrument, instrument::Instrumented};
use utoipa_axum::{
    router::{OpenApiRouter, UtoipaMethodRouterExt},
    routes,
};

use crate::{
    access::{API_KEY, Admission},
    audit::Audit,
    chat,
    connections::max_connections,
    context::{self, RequestContext, check_content_headers},
    cors::{self, Cors},
    error::{ApiError, ApiErrors, ErrorBody},
    guard::{__path_guard, guard},
    hooks::{
        litellm::{__path_litellm, litellm},
        pending::Pending,
        portkey::{__path_portkey, portkey},
        truefoundry::{__path_truefoundry, truefoundry},
    },
    json as strict,
    metrics::Metrics,
    moderation::{__path_moderations, moderations},
    observe::ObservedRequest,
    openapi::{self, ChatAnswer, ChatRequest, Models},
    passthrough::passthrough,
    playground::{self, Playground},
    ready::Readiness,
    request,
    settings::{Mode, Settings},
    state::{AppState, Profiles, SharedState},
    store::Store,
    telemetry,
    upstream::{CHAT, Credentials, HTTP, Upstream, door},
    wire::{Format, PREVIOUS_RESPONSE_ID, external_conversation},
};

/// A guard that can be served. Its settings can be replaced while it runs.
pub struct Gateway {
    state: ArcSwap<AppState>,
    pub(crate) admission: Arc<Admission>,
    /// Permits for open connections.
    pub(crate) connection_permits: Arc<Semaphore>,
    /// Memory budget for the bodies of requests.
    body_budget: Arc<Semaphore>,
    cors: Arc<Cors>,
    readiness: Readiness,
    playground: Option<Arc<Playground>>,
}

impl Gateway {
    /// Creates a guard in front of `upstream` with these profiles. `images` limits the bytes and
    /// pixels of each image.
    ///
    /// # Errors
    /// If no HTTP client can be created, the audit log can't be opened, or the settings name a
    /// profile that does not exist.
    pub fn new(
        upstream: Upstream,
        profiles: impl Into<Profiles>,
        settings: Settings,
        images: ecso::Limits,
    ) -> io::Result<Self> {
        let admission = Arc::new(Admission::new(settings.limits.at_once, settings.limits.queue));
        let connection_permits =
            Arc::new(Semaphore::new(max_connections(settings.limits.connections)));
        let body_budget = context::body_budget(settings.limits.bodies.max(settings.limits.body));
        let shared = SharedState {
            metrics: Arc::new(Metrics::new()),
            memory: Arc::new(Memory::new(settings.limits.remembered)),
            store: Arc::new(Store::new(&settings.limits)),
            pending: Arc::new(Pending::new(&settings.limits)),
        };
        let audit = Audit::open(&settings.audit)?;
        let state = AppState::new(upstream, profiles.into(), settings, images, shared, audit)?;
        let state = ArcSwap::from_pointee(state);
        let (cors, readiness) = (Arc::default(), Readiness::default());
        Ok(Self {
            state,
            admission,
            connection_permits,
            body_budget,
            cors,
            readiness,
            playground: None,
        })
    }

    /// Adds the playground page at `/`.
    #[must_use]
    pub fn with_playground(self, playground: Playground) -> Self {
        Self { playground: Some(Arc::new(playground)), ..self }
    }

    /// Replaces profiles and settings; running requests finish under the old ones. The upstream
    /// stays the same, and so do the limits `at_once`, `queue`, `bodies`, `connections`,
    /// `remembered`, `stored`, `stored_for`, `pending` and `pending_for`.
    ///
    /// # Errors
    /// If the audit log can't be opened or the settings name a profile that does not exist. The old
    /// settings then stay in force.
    pub fn reload(
        &self,
        profiles: impl Into<Profiles>,
        settings: Settings,
        images: ecso::Limits,
    ) -> io::Result<()> {
        let old = self.state.load();
        let audit = match &old.audit {
            // Two writers of one file would rotate it at the same time.
            Some(audit) if old.settings.audit == settings.audit => Some(Arc::clone(audit)),
            _ => Audit::open(&settings.audit)?,
        };
        let shared = SharedState {
            metrics: Arc::clone(&old.metrics),
            memory: Arc::clone(&old.memory),
            store: Arc::clone(&old.store),
            pending: Arc::clone(&old.pending),
        };
        let state =
            AppState::new(old.upstream.clone(), profiles.into(), settings, images, shared, audit)?;
        self.state.store(Arc::new(state));
        Ok(())
    }

    /// All routes.
    pub fn router(self: Arc<Self>) -> Router {
        let (router, _) = routes().split_for_parts();
        let cors = Arc::clone(&self.cors);
        let page = self
            .playground
            .clone()
            .map(|playground| playground::routes(Arc::clone(&self), playground));
        let router = router
            .fallback(passthrough)
            .with_state(self)
            .layer(middleware::from_fn_with_state(cors, cors::share_cors));
        page.into_iter().fold(router, Router::merge)
    }

    /// The routes for requests with a [`Carrier`](crate::upstream::Carrier): only those of the
    /// model's server. What the guard reports about itself is not for these clients.
    pub(crate) fn carrier_router(self: Arc<Self>) -> Router {
        let model = OpenApiRouter::<Arc<Self>>::new()
            .routes(routes!(completions).map(|route| route.fallback(passthrough)))
            .routes(routes!(messages).map(|route| route.fallback(passthrough)))
            .routes(routes!(count_tokens).map(|route| route.fallback(passthrough)))
            .routes(routes!(responses).map(|route| route.fallback(passthrough)))
            .routes(routes!(moderations).map(|route| route.fallback(passthrough)));
        let (router, _) = model.split_for_parts();
        let cors = Arc::clone(&self.cors);
        router
            .fallback(passthrough)
            .with_state(self)
            .layer(middleware::from_fn_with_state(cors, cors::share_cors))
    }

    /// The current profiles and settings.
    pub(crate) fn state(&self) -> Arc<AppState> {
        self.state.load_full()
    }

    /// Admits a request.
    pub(crate) fn admit(
        &self,
        state: &Arc<AppState>,
        id: &str,
        head: Parts,
    ) -> Result<RequestContext, ApiError> {
        RequestContext::admit(state, &self.body_budget, id, head)
    }

    /// Admits a request of the playground, which checks access itself.
    pub(crate) fn admit_page(&self, state: &Arc<AppState>, id: &str) -> RequestContext {
        RequestContext::for_page(state, &self.body_budget, id)
    }

    /// Handles a request for a judgement: admits it, reads it, and answers it with `work`.
    pub(crate) async fn judge_on_demand(
        &self,
        route: &'static str,
        request: axum::extract::Request,
        work: impl AsyncFnOnce(&mut RequestContext, Bytes) -> Result<Response, ApiError>,
    ) -> Response {
        let (id, state) = (request_id(), self.state());
        let (head, body) = request.into_parts();
        let (span, door) =
            (telemetry::request_span(route, &id, &head.headers), door(&head.extensions));
        let answered = async {
            let mut context = self.admit(&state, &id, head)?;
            context.keep_known_headers();
            let body = context.read(body).await?;
            Box::pin(work(&mut context, body)).await
        };
        finish_response(&id, (door, route), &state.metrics, answered.instrument(span)).await
    }
}

/// The routes with their OpenAPI description. `passthrough` handles all others.
fn routes() -> OpenApiRouter<Arc<Gateway>> {
    OpenApiRouter::with_openapi(openapi::document())
        .routes(routes!(completions).map(|route| route.fallback(passthrough)))
        .routes(routes!(messages).map(|route| route.fallback(passthrough)))
        .routes(routes!(count_tokens).map(|route| route.fallback(passthrough)))
        .routes(routes!(responses).map(|route| route.fallback(passthrough)))
        .routes(routes!(guard))
        .routes(routes!(moderations))
        .routes(routes!(litellm))
        .routes(routes!(portkey))
        .routes(routes!(truefoundry))
        .routes(routes!(models).map(|route| route.fallback(passthrough)))
        .routes(routes!(health))
        .routes(routes!(ready))
        .routes(routes!(metrics))
        .routes(routes!(description))
}

/// A new request id, for answers and logs.
pub(crate) fn request_id() -> String {
    format!("ecso-{}", uuid::Uuid::new_v4().simple())
}

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
async fn completions(
    State(gateway): State<Arc<Gateway>>,
    request: axum::extract::Request,
) -> Response {
    let (id, state) = (request_id(), gateway.state());
    let (head, body) = request.into_parts();
    let (span, door) =
        (telemetry::request_span("chat", &id, &head.headers), door(&head.extensions));
    let answered = async {
        let context = gateway.admit(&state, &id, head)?;
        Box::pin(answer_chat(&gateway, context, body)).await
    };
    finish_response(&id, (door, "chat"), &state.metrics, answered.instrument(span)).await
}

/// Counts the response and adds the request id to its headers.
pub(crate) async fn finish_response(
    id: &str,
    (door, route): (&'static str, &'static str),
    metrics: &Metrics,
    answered: Instrumented<impl Future<Output = Result<Response, ApiError>>>,
) -> Response {
    let span = answered.span().clone();
    let mut response = answered.await.unwrap_or_else(|failure| {
        failure.log(id);
        metrics.failure(failure.code);
        failure.into_response()
    });
    metrics.request(door, route, response.status().as_u16());
    span.record("http.response.status_code", response.status().as_u16());
    if response.status().is_server_error() {
        span.record("otel.status_code", "error");
    }
    if let Ok(id) = HeaderValue::try_from(id) {
        response.headers_mut().insert("x-ecso-request-id", id);
    }
    response
}

/// Answers a chat: forwards it, observes it, or guards it.
pub(crate) async fn answer_chat(
    gateway: &Gateway,
    mut context: RequestContext,
    body: Body,
) -> Result<Response, ApiError> {
    let state = Arc::clone(&context.state);
    let settings = &state.settings;
    let transport = context.transport();
    if let Some(transport) = &transport
        && context.caller.is_never_guarded(settings)
    {
        return context
            .forward(
                transport,
                Credentials::Operator,
                &Method::POST,
                CHAT,
                context.stream_body(body),
            )
            .await;
    }
    let body = context.read(body).await?;
    let value = strict::parse(&body);
    let model = request::model(&value);
    context.mode = context.caller.mode(settings, model, &context.headers)?;
    let scope = context.scope(model);
    let parsed = check_content_headers(&context.headers).and(
        value
            .map_err(|why| {
                ApiError::bad_request("invalid_request", format!("the body can't be read: {why}"))
            })
            .and_then(|value| request::Body::parse(value, &settings.allow_fields)),
    );
    if context.mode == Mode::Enforce {
        context.keep_known_headers();
        context.set_json();
    }
    // An unreadable request counts as in scope.
    let is_out = parsed.as_ref().is_ok_and(|parsed| scope != Scope::All && !parsed.has_images());
    match (&transport, context.mode) {
        (Some(transport), mode)
            if mode == Mode::Off || is_out || (mode == Mode::Observe && !settings.is_sampled()) =>
        {
            context.forward(transport, Credentials::Operator, &Method::POST, CHAT, body).await
        }
        (Some(transport), Mode::Observe) => {
            let admission = Arc::clone(&gateway.admission);
            ObservedRequest { context, admission, parsed, format: None }
                .forward(transport, CHAT, body)
                .await
        }
        _ => {
            drop(body);
            let turn = context.in_time(gateway.admission.enter()).await?;
            let request = context.prepare(parsed?).await?;
            chat::enforce(context, request, turn, None).await
        }
    }
}

/// Answers a request in Anthropic's Messages format, as a chat.
#[utoipa::path(post, path = "/v1/messages", request_body = Object, responses(
    (status = 200, description = "The message; a stream of its events if the request asks for one", content(
        (Object = "application/json"), (Value = "text/event-stream")
    )),
    ApiErrors,
    (status = "default", description = "The response of the server behind the guard"),
))]
async fn messages(
    State(gateway): State<Arc<Gateway>>,
    request: axum::extract::Request,
) -> Response {
    handle_translated(&gateway, "messages", Format::Messages, request).await
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
async fn responses(
    State(gateway): State<Arc<Gateway>>,
    request: axum::extract::Request,
) -> Response {
    handle_translated(&gateway, "responses", Format::Responses, request).await
}

/// A request of another format than chat completions.
async fn handle_translated(
    gateway: &Gateway,
    route: &'static str,
    format: Format,
    request: axum::extract::Request,
) -> Response {
    let (id, state) = (request_id(), gateway.state());
    let (head, body) = request.into_parts();
    let (span, door) = (telemetry::request_span(route, &id, &head.headers), door(&head.extensions));
    let uri = head.uri.clone();
    let answered = async {
        let told = |error| ApiError { format: Some(format), ..error };
        let context = gateway.admit(&state, &id, head).map_err(told)?;
        let path = uri.path_and_query().map_or(uri.path(), |whole| whole.as_str());
        Box::pin(answer_translated(gateway, context, format, path, body)).await.map_err(told)
    };
    finish_response(&id, (door, route), &state.metrics, answered.instrument(span)).await
}

/// A request of another format: let through, observed, or answered as the chat which it asks for.
pub(crate) async fn answer_translated(
    gateway: &Gateway,
    mut context: RequestContext,
    format: Format,
    path: &str,
    body: Body,
) -> Result<Response, ApiError> {
    let state = Arc::clone(&context.state);
    let settings = &state.settings;
    let transport = context.transport();
    if let Some(transport) = &transport
        && context.caller.is_never_guarded(settings)
    {
        return context
            .forward(
                transport,
                Credentials::Operator,
                &Method::POST,
                path,
                context.stream_body(body),
            )
            .await;
    }
    let body = context.read(body).await?;
    let value = strict::parse(&body);
    let model = request::model(&value);
    context.mode = context.caller.mode(settings, model, &context.headers)?;
    let scope = context.scope(model);
    let headers_checked = check_content_headers(&context.headers);
    if context.mode == Mode::Enforce || transport.is_none() {
        context.keep_known_headers();
        context.set_json();
        // Where Messages have their key, chats have none.
        if let Some(key) = context.headers.remove(API_KEY)
            && !context.headers.contains_key(header::AUTHORIZATION)
            && let Ok(key) = HeaderValue::try_from([b"Bearer ", key.as_bytes()].concat())
        {
            context.headers.insert(header::AUTHORIZATION, key);
        }
    }
    let unread =
        |why| ApiError::bad_request("invalid_request", format!("the body can't be read: {why}"));
    let value = headers_checked.and(value.map_err(unread));
    // Where it is not enforced, the upstream's own route answers.
    if let (Some(transport), Mode::Off | Mode::Observe) = (&transport, context.mode) {
        // What is kept of earlier answers lies there.
        let chat = value.and_then(|value| {
            format.parse(value, &mut |_| Err(external_conversation(PREVIOUS_RESPONSE_ID)))
        });
        let parsed = chat.and_then(|(chat, _)| request::Body::parse(chat, &settings.allow_fields));
        let is_out =
            parsed.as_ref().is_ok_and(|parsed| scope != Scope::All && !parsed.has_images());
        if context.mode == Mode::Off || is_out || !settings.is_sampled() {
            return context
                .forward(transport, Credentials::Operator, &Method::POST, path, body)
                .await;
        }
        let admission = Arc::clone(&gateway.admission);
        return ObservedRequest { context, admission, parsed, format: Some(format) }
            .forward(transport, path, body)
            .await;
    }
    let value = value?;
    let left = (
        settings.limits.body.saturating_sub(body.len()),
        strict::MAX_VALUES.saturating_sub(strict::count_values(&value)),
    );
    drop(body);
    let tenant = context.tenant();
    let mut earlier = |id: &str| {
        state.store.conversation((&tenant, id), left, |bytes| context.reserve_more(bytes))
    };
    let (chat, wire) = format.parse(value, &mut earlier)?;
    let chat = request::Body::parse(chat, &settings.allow_fields)?;
    let turn = context.in_time(gateway.admission.enter()).await?;
    let request = context.prepare(chat).await?;
    chat::enforce(context, request, turn, Some(wire)).await
}

/// Estimates how many tokens a request in the Messages format has. The format itself calls this
/// number an estimate.
#[utoipa::path(post, path = "/v1/messages/count_tokens", request_body = Object, responses(
    (status = 200, description = "The number of tokens", body = Object),
    ApiErrors,
    (status = "default", description = "The response of the server behind the guard"),
))]
async fn count_tokens(
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
    context.mode =
        context.caller.mode(&state.settings, request::model(&value), &context.headers)?;
    if let (Some(transport), Mode::Off | Mode::Observe) = (context.transport(), context.mode) {
        return context.forward(&transport, Credentials::Operator, &Method::POST, path, body).await;
    }
    check_content_headers(&context.headers)?;
    let unread =
        |why| ApiError::bad_request("invalid_request", format!("the body can't be read: {why}"));
    let (chat, _) = Format::Messages
        .parse(value.map_err(unread)?, &mut |_| Err(external_conversation(PREVIOUS_RESPONSE_ID)))?;
    let counted =
        json!({"input_tokens": request::Body::parse(chat, &state.settings.allow_fields)?.tokens()});
    Ok(([(header::CONTENT_TYPE, "application/json")], counted.to_string()).into_response())
}

/// Whether this process is running.
#[utoipa::path(get, path = "/healthz", responses((status = 200, body = String)))]
async fn health() -> &'static str {
    "ok"
}

/// Whether the upstream responds.
#[utoipa::path(get, path = "/readyz", responses(
    (status = 200, body = String), (status = 503, description = "The upstream does not respond", body = String)
))]
async fn ready(State(gateway): State<Arc<Gateway>>) -> Response {
    if gateway.readiness.check(&gateway.state().upstream).await {
        return "ok".into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, "the upstream does not answer").into_response()
}

/// Metrics for Prometheus, if the operator turned them on.
#[utoipa::path(get, path = "/metrics", responses(
    (status = 200, body = String, content_type = "application/openmetrics-text"), (status = 404, body = ErrorBody)
))]
async fn metrics(State(gateway): State<Arc<Gateway>>) -> Response {
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
async fn description() -> Response {
    static TEXT: LazyLock<String> =
        LazyLock::new(|| routes().into_openapi().to_json().unwrap_or_default());
    ([(header::CONTENT_TYPE, "application/json")], TEXT.as_str()).into_response()
}

/// Lists the models of the server behind the guard, or the model in this process.
#[utoipa::path(get, path = "/v1/models", responses(
    (status = 200, body = Models), ApiErrors, (status = "default", description = "The response of the server behind the guard")
))]
async fn models(State(gateway): State<Arc<Gateway>>, request: axum::extract::Request) -> Response {
    let state = gateway.state();
    let Upstream::Engine(model) = &state.upstream else {
        return passthrough(State(gateway), request).await;
    };
    if door(request.extensions()) != HTTP {
        return passthrough(State(gateway), request).await;
    }
    let id = request_id();
    let answered = async {
        gateway.admit(&state, &id, request.into_parts().0)?;
        let list = json!({"object": "list", "data": [
            {"id": model.name(), "object": "model", "created": 0, "owned_by": "ecso"}]});
        Ok(([(header::CONTENT_TYPE, "application/json")], list.to_string()).into_response())
    };
    finish_response(
        &id,
        (HTTP, "models"),
        &state.metrics,
        answered.instrument(tracing::Span::none()),
    )
    .await
}
