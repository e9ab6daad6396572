//! The server: routes and the way of a chat request.

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
    connections::places,
    context::{self, RequestContext, is_plain},
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
    observe::Observed,
    openapi::{self, ChatAnswer, ChatRequest, Models},
    passthrough::others,
    playground::{self, Playground},
    ready::Readiness,
    request,
    settings::{Mode, Settings},
    state::{AppState, Kept, Profiles},
    store::Store,
    telemetry,
    upstream::{CHAT, HTTP, Key, Upstream, door},
    wire::{BEFORE, Format, elsewhere},
};

/// A guard that can be served. Its settings can be exchanged while it runs.
pub struct Gateway {
    state: ArcSwap<AppState>,
    pub(crate) admission: Arc<Admission>,
    /// Connections that may be open.
    pub(crate) places: Arc<Semaphore>,
    /// Room for the bodies of requests.
    rooms: Arc<Semaphore>,
    cors: Arc<Cors>,
    readiness: Readiness,
    playground: Option<Arc<Playground>>,
}

impl Gateway {
    /// A guard in front of `upstream`, under these profiles; `images` bounds single images.
    ///
    /// # Errors
    /// When no HTTP client can be made, the audit log can't be opened, or the settings name a
    /// profile that is not there.
    pub fn new(
        upstream: Upstream,
        profiles: impl Into<Profiles>,
        settings: Settings,
        images: ecso::Limits,
    ) -> io::Result<Self> {
        let admission = Arc::new(Admission::new(settings.limits.at_once, settings.limits.queue));
        let places = Arc::new(Semaphore::new(places(settings.limits.connections)));
        let rooms = context::rooms(settings.limits.bodies.max(settings.limits.body));
        let kept = Kept {
            metrics: Arc::new(Metrics::new()),
            memory: Arc::new(Memory::new(settings.limits.remembered)),
            store: Arc::new(Store::new(&settings.limits)),
            pending: Arc::new(Pending::new(&settings.limits)),
        };
        let audit = Audit::open(&settings.audit)?;
        let state = AppState::new(upstream, profiles.into(), settings, images, kept, audit)?;
        let state = ArcSwap::from_pointee(state);
        let (cors, readiness) = (Arc::default(), Readiness::default());
        Ok(Self { state, admission, places, rooms, cors, readiness, playground: None })
    }

    /// The same with a page for people at `/`.
    #[must_use]
    pub fn with_playground(self, playground: Playground) -> Self {
        Self { playground: Some(Arc::new(playground)), ..self }
    }

    /// Exchanges profile and settings; requests under way end under the old ones. The upstream
    /// stays, and so do the limits `at_once`, `queue`, `bodies`, `connections`, `remembered`,
    /// `stored`, `stored_for`, `pending` and `pending_for`.
    ///
    /// # Errors
    /// When the audit log can't be opened; then all stays as it was.
    pub fn reload(
        &self,
        profiles: impl Into<Profiles>,
        settings: Settings,
        images: ecso::Limits,
    ) -> io::Result<()> {
        let old = self.state.load();
        let audit = match &old.audit {
            // One file has one writer, or the two would move it away from under each other.
            Some(audit) if old.settings.audit == settings.audit => Some(Arc::clone(audit)),
            _ => Audit::open(&settings.audit)?,
        };
        let kept = Kept {
            metrics: Arc::clone(&old.metrics),
            memory: Arc::clone(&old.memory),
            store: Arc::clone(&old.store),
            pending: Arc::clone(&old.pending),
        };
        let state =
            AppState::new(old.upstream.clone(), profiles.into(), settings, images, kept, audit)?;
        self.state.store(Arc::new(state));
        Ok(())
    }

    /// The routes.
    pub fn router(self: Arc<Self>) -> Router {
        let (router, _) = routes().split_for_parts();
        let cors = Arc::clone(&self.cors);
        let page = self
            .playground
            .clone()
            .map(|playground| playground::routes(Arc::clone(&self), playground));
        let router = router
            .fallback(others)
            .with_state(self)
            .layer(middleware::from_fn_with_state(cors, cors::same_on_all));
        page.into_iter().fold(router, Router::merge)
    }

    /// The routes for requests that somebody carries: those of the model's server. What we tell of
    /// ourselves is not for its clients.
    pub(crate) fn carried(self: Arc<Self>) -> Router {
        let model = OpenApiRouter::<Arc<Self>>::new()
            .routes(routes!(completions).map(|route| route.fallback(others)))
            .routes(routes!(messages).map(|route| route.fallback(others)))
            .routes(routes!(count_tokens).map(|route| route.fallback(others)))
            .routes(routes!(responses).map(|route| route.fallback(others)))
            .routes(routes!(moderations).map(|route| route.fallback(others)));
        let (router, _) = model.split_for_parts();
        let cors = Arc::clone(&self.cors);
        router
            .fallback(others)
            .with_state(self)
            .layer(middleware::from_fn_with_state(cors, cors::same_on_all))
    }

    /// Profile and settings of this moment.
    pub(crate) fn state(&self) -> Arc<AppState> {
        self.state.load_full()
    }

    /// Lets a request in.
    pub(crate) fn begin(
        &self,
        state: &Arc<AppState>,
        id: &str,
        head: Parts,
    ) -> Result<RequestContext, ApiError> {
        RequestContext::begin(state, &self.rooms, id, head)
    }

    /// A request of the page for people, which lets in whom it wants to.
    pub(crate) fn receive(&self, state: &Arc<AppState>, id: &str) -> RequestContext {
        RequestContext::of_page(state, &self.rooms, id)
    }

    /// A request that judges on demand: let in, read, and answered by `work`.
    pub(crate) async fn judge(
        &self,
        route: &'static str,
        request: axum::extract::Request,
        work: impl AsyncFnOnce(&mut RequestContext, Bytes) -> Result<Response, ApiError>,
    ) -> Response {
        let (id, state) = (request_id(), self.state());
        let (head, body) = request.into_parts();
        let (span, door) = (telemetry::span(route, &id, &head.headers), door(&head.extensions));
        let answered = async {
            let mut context = self.begin(&state, &id, head)?;
            context.guarded();
            let body = context.read(body).await?;
            Box::pin(work(&mut context, body)).await
        };
        signed(&id, (door, route), &state.metrics, answered.instrument(span)).await
    }
}

/// The routes with their description; for all others see `passthrough`.
fn routes() -> OpenApiRouter<Arc<Gateway>> {
    OpenApiRouter::with_openapi(openapi::document())
        .routes(routes!(completions).map(|route| route.fallback(others)))
        .routes(routes!(messages).map(|route| route.fallback(others)))
        .routes(routes!(count_tokens).map(|route| route.fallback(others)))
        .routes(routes!(responses).map(|route| route.fallback(others)))
        .routes(routes!(guard))
        .routes(routes!(moderations))
        .routes(routes!(litellm))
        .routes(routes!(portkey))
        .routes(routes!(truefoundry))
        .routes(routes!(models).map(|route| route.fallback(others)))
        .routes(routes!(alive))
        .routes(routes!(ready))
        .routes(routes!(metrics))
        .routes(routes!(description))
}

/// A request's name in answers and logs.
pub(crate) fn request_id() -> String {
    format!("ecso-{}", uuid::Uuid::new_v4().simple())
}

/// Answers a chat. What is in scope is judged before it goes out.
#[utoipa::path(
    post, path = "/v1/chat/completions", request_body = ChatRequest,
    responses(
        (status = 200, description = "The answer; a stream of server-sent events where the request asks for one", content(
            (ChatAnswer = "application/json"), (Value = "text/event-stream")
        )),
        ApiErrors,
        (status = "default", description = "What the server behind the guard says"),
    ),
)]
async fn completions(
    State(gateway): State<Arc<Gateway>>,
    request: axum::extract::Request,
) -> Response {
    let (id, state) = (request_id(), gateway.state());
    let (head, body) = request.into_parts();
    let (span, door) = (telemetry::span("chat", &id, &head.headers), door(&head.extensions));
    let answered = async {
        let context = gateway.begin(&state, &id, head)?;
        Box::pin(completion(&gateway, context, body)).await
    };
    signed(&id, (door, "chat"), &state.metrics, answered.instrument(span)).await
}

/// The response, counted, with the request's name on it.
pub(crate) async fn signed(
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

/// A chat: let through, observed, or guarded.
pub(crate) async fn completion(
    gateway: &Gateway,
    mut context: RequestContext,
    body: Body,
) -> Result<Response, ApiError> {
    let state = Arc::clone(&context.state);
    let settings = &state.settings;
    let way = context.way();
    if let Some(way) = &way
        && context.caller.is_never_guarded(settings)
    {
        return context.pass(way, Key::Own, &Method::POST, CHAT, context.flowing(body)).await;
    }
    let body = context.read(body).await?;
    let value = strict::read(&body);
    let model = request::model(&value);
    context.mode = context.caller.mode(settings, model, &context.headers)?;
    let scope = context.scope(model);
    let read = is_plain(&context.headers).and(
        value
            .map_err(|why| {
                ApiError::bad_request("invalid_request", format!("the body can't be read: {why}"))
            })
            .and_then(|value| request::Body::of(value, &settings.allow_fields)),
    );
    if context.mode == Mode::Enforce {
        context.guarded();
        context.as_json();
    }
    // What can't be read is not out of scope.
    let is_out = read.as_ref().is_ok_and(|read| scope != Scope::All && !read.has_images());
    match (&way, context.mode) {
        (Some(way), mode)
            if mode == Mode::Off || is_out || (mode == Mode::Observe && !settings.draws()) =>
        {
            context.pass(way, Key::Own, &Method::POST, CHAT, body).await
        }
        (Some(way), Mode::Observe) => {
            let admission = Arc::clone(&gateway.admission);
            Observed { context, admission, read, format: None }.forward(way, CHAT, body).await
        }
        _ => {
            drop(body);
            let turn = context.in_time(gateway.admission.enter()).await?;
            let request = context.prepare(read?).await?;
            chat::enforce(context, request, turn, None).await
        }
    }
}

/// Answers a request of Anthropic's Messages, as a chat.
#[utoipa::path(post, path = "/v1/messages", request_body = Object, responses(
    (status = 200, description = "The message; a stream of its events where the request asks for one", content(
        (Object = "application/json"), (Value = "text/event-stream")
    )),
    ApiErrors,
    (status = "default", description = "What the server behind the guard says"),
))]
async fn messages(
    State(gateway): State<Arc<Gateway>>,
    request: axum::extract::Request,
) -> Response {
    translated(&gateway, "messages", Format::Messages, request).await
}

/// Answers a request of OpenAI's Responses, as a chat. An answer can be gone on from for a while
/// (`previous_response_id`).
#[utoipa::path(post, path = "/v1/responses", request_body = Object, responses(
    (status = 200, description = "The response; a stream of its events where the request asks for one", content(
        (Object = "application/json"), (Value = "text/event-stream")
    )),
    ApiErrors,
    (status = "default", description = "What the server behind the guard says"),
))]
async fn responses(
    State(gateway): State<Arc<Gateway>>,
    request: axum::extract::Request,
) -> Response {
    translated(&gateway, "responses", Format::Responses, request).await
}

/// A request of another format than chat completions.
async fn translated(
    gateway: &Gateway,
    route: &'static str,
    format: Format,
    request: axum::extract::Request,
) -> Response {
    let (id, state) = (request_id(), gateway.state());
    let (head, body) = request.into_parts();
    let (span, door) = (telemetry::span(route, &id, &head.headers), door(&head.extensions));
    let uri = head.uri.clone();
    let answered = async {
        let told = |error| ApiError { format: Some(format), ..error };
        let context = gateway.begin(&state, &id, head).map_err(told)?;
        let path = uri.path_and_query().map_or(uri.path(), |whole| whole.as_str());
        Box::pin(translation(gateway, context, format, path, body)).await.map_err(told)
    };
    signed(&id, (door, route), &state.metrics, answered.instrument(span)).await
}

/// A request of another format: let through, observed, or answered as the chat which it asks for.
pub(crate) async fn translation(
    gateway: &Gateway,
    mut context: RequestContext,
    format: Format,
    path: &str,
    body: Body,
) -> Result<Response, ApiError> {
    let state = Arc::clone(&context.state);
    let settings = &state.settings;
    let way = context.way();
    if let Some(way) = &way
        && context.caller.is_never_guarded(settings)
    {
        return context.pass(way, Key::Own, &Method::POST, path, context.flowing(body)).await;
    }
    let body = context.read(body).await?;
    let value = strict::read(&body);
    let model = request::model(&value);
    context.mode = context.caller.mode(settings, model, &context.headers)?;
    let scope = context.scope(model);
    let is_plain = is_plain(&context.headers);
    if context.mode == Mode::Enforce || way.is_none() {
        context.guarded();
        context.as_json();
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
    let value = is_plain.and(value.map_err(unread));
    // Where it is not enforced, the upstream's own route answers.
    if let (Some(way), Mode::Off | Mode::Observe) = (&way, context.mode) {
        // What is kept of earlier answers lies there.
        let chat = value.and_then(|value| format.read(value, &mut |_| Err(elsewhere(BEFORE))));
        let read = chat.and_then(|(chat, _)| request::Body::of(chat, &settings.allow_fields));
        let is_out = read.as_ref().is_ok_and(|read| scope != Scope::All && !read.has_images());
        if context.mode == Mode::Off || is_out || !settings.draws() {
            return context.pass(way, Key::Own, &Method::POST, path, body).await;
        }
        let admission = Arc::clone(&gateway.admission);
        return Observed { context, admission, read, format: Some(format) }
            .forward(way, path, body)
            .await;
    }
    let value = value?;
    let left = (
        settings.limits.body.saturating_sub(body.len()),
        strict::MOST.saturating_sub(strict::values(&value)),
    );
    drop(body);
    let tenant = context.tenant();
    let mut earlier =
        |id: &str| state.store.conversation((&tenant, id), left, |bytes| context.hold_more(bytes));
    let (chat, wire) = format.read(value, &mut earlier)?;
    let chat = request::Body::of(chat, &settings.allow_fields)?;
    let turn = context.in_time(gateway.admission.enter()).await?;
    let request = context.prepare(chat).await?;
    chat::enforce(context, request, turn, Some(wire)).await
}

/// About how many tokens a request of Anthropic's Messages has: an estimate, as the format says
/// that it is one.
#[utoipa::path(post, path = "/v1/messages/count_tokens", request_body = Object, responses(
    (status = 200, description = "The number", body = Object),
    ApiErrors,
    (status = "default", description = "What the server behind the guard says"),
))]
async fn count_tokens(
    State(gateway): State<Arc<Gateway>>,
    request: axum::extract::Request,
) -> Response {
    let (id, state) = (request_id(), gateway.state());
    let (head, body) = request.into_parts();
    let (span, door) =
        (telemetry::span("count_tokens", &id, &head.headers), door(&head.extensions));
    let uri = head.uri.clone();
    let counted = async {
        let context = gateway.begin(&state, &id, head)?;
        let path = uri.path_and_query().map_or(uri.path(), |whole| whole.as_str());
        Box::pin(counting(context, path, body)).await
    };
    let counted = async {
        counted.await.map_err(|error| ApiError { format: Some(Format::Messages), ..error })
    };
    signed(&id, (door, "count_tokens"), &state.metrics, counted.instrument(span)).await
}

/// A request to count: the upstream's where its answer would not be guarded.
async fn counting(
    mut context: RequestContext,
    path: &str,
    body: Body,
) -> Result<Response, ApiError> {
    let state = Arc::clone(&context.state);
    let body = context.read(body).await?;
    let value = strict::read(&body);
    context.mode =
        context.caller.mode(&state.settings, request::model(&value), &context.headers)?;
    if let (Some(way), Mode::Off | Mode::Observe) = (context.way(), context.mode) {
        return context.pass(&way, Key::Own, &Method::POST, path, body).await;
    }
    is_plain(&context.headers)?;
    let unread =
        |why| ApiError::bad_request("invalid_request", format!("the body can't be read: {why}"));
    let (chat, _) =
        Format::Messages.read(value.map_err(unread)?, &mut |_| Err(elsewhere(BEFORE)))?;
    let counted =
        json!({"input_tokens": request::Body::of(chat, &state.settings.allow_fields)?.tokens()});
    Ok(([(header::CONTENT_TYPE, "application/json")], counted.to_string()).into_response())
}

/// Whether this process lives.
#[utoipa::path(get, path = "/healthz", responses((status = 200, body = String)))]
async fn alive() -> &'static str {
    "ok"
}

/// Whether the upstream answers at all.
#[utoipa::path(get, path = "/readyz", responses(
    (status = 200, body = String), (status = 503, description = "The upstream does not answer", body = String)
))]
async fn ready(State(gateway): State<Arc<Gateway>>) -> Response {
    if gateway.readiness.of(&gateway.state().upstream).await {
        return "ok".into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, "the upstream does not answer").into_response()
}

/// Figures for Prometheus, where the operator wants them told.
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

/// This description.
#[utoipa::path(get, path = "/openapi.json", responses((status = 200, body = Object)))]
async fn description() -> Response {
    static TEXT: LazyLock<String> =
        LazyLock::new(|| routes().into_openapi().to_json().unwrap_or_default());
    ([(header::CONTENT_TYPE, "application/json")], TEXT.as_str()).into_response()
}

/// The models: of the server behind the guard, or the one in this process.
#[utoipa::path(get, path = "/v1/models", responses(
    (status = 200, body = Models), ApiErrors, (status = "default", description = "What the server behind the guard says")
))]
async fn models(State(gateway): State<Arc<Gateway>>, request: axum::extract::Request) -> Response {
    let state = gateway.state();
    let Upstream::Engine(model) = &state.upstream else {
        return others(State(gateway), request).await;
    };
    if door(request.extensions()) != HTTP {
        return others(State(gateway), request).await;
    }
    let id = request_id();
    let answered = async {
        gateway.begin(&state, &id, request.into_parts().0)?;
        let list = json!({"object": "list", "data": [
            {"id": model.name(), "object": "model", "created": 0, "owned_by": "ecso"}]});
        Ok(([(header::CONTENT_TYPE, "application/json")], list.to_string()).into_response())
    };
    signed(&id, (HTTP, "models"), &state.metrics, answered.instrument(tracing::Span::none())).await
}
