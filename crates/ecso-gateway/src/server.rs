//! The server: routes and the way of a chat request.

use std::{
    io,
    sync::{Arc, LazyLock},
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use axum::{
    Router,
    body::Body,
    extract::State,
    http::{HeaderValue, Method, StatusCode, header, request::Parts},
    middleware,
    response::{IntoResponse, Response},
    serve::ListenerExt,
};
use ecso::{Memory, Profile, profile::Scope};
use ecso_openai::Bodies;
use percent_encoding::percent_decode_str;
use serde_json::json;
use tokio::net::TcpListener;
use tracing::{Instrument, instrument::Instrumented};
use utoipa_axum::{
    router::{OpenApiRouter, UtoipaMethodRouterExt},
    routes,
};

use crate::{
    access::{self, Admission},
    chat::Guarded,
    cors::{self, Cors},
    door::{__path_guard, guard},
    failure::{ErrorBody, Failure, Failures},
    live::Live,
    metrics::Metrics,
    moderation::{__path_moderations, moderations},
    observe::Observed,
    openapi::{self, ChatAnswer, ChatRequest, Models},
    probe::Probe,
    settings::{Mode, Settings},
    telemetry,
    upstream::{CHAT, Upstream, passed},
    visit::{Visit, own_key_removed, read},
};

/// A guard that can be served. Its settings can be exchanged while it runs.
pub struct Gateway {
    live: ArcSwap<Live>,
    admission: Arc<Admission>,
    cors: Arc<Cors>,
}

impl Gateway {
    /// A guard in front of `upstream`, under `profile`; `images` bounds single images.
    ///
    /// # Errors
    /// When no HTTP client can be made.
    pub fn new(upstream: Upstream, profile: Profile, settings: Settings, images: ecso::Limits) -> io::Result<Self> {
        let admission = Arc::new(Admission::new(settings.limits.at_once, settings.limits.queue));
        let memory = Arc::new(Memory::new(settings.limits.remembered));
        let live = Live::new(upstream, profile, settings, images, Arc::new(Metrics::new()), memory)?;
        Ok(Self { live: ArcSwap::from_pointee(live), admission, cors: Arc::default() })
    }

    /// Exchanges profile and settings; requests under way end under the old ones. The upstream stays, and so do
    /// `limits.at_once`, `limits.queue` and `limits.remembered`.
    ///
    /// # Errors
    /// When the audit log can't be opened; then all stays as it was.
    pub fn reload(&self, profile: Profile, settings: Settings, images: ecso::Limits) -> io::Result<()> {
        let old = self.live.load();
        let live = Live::new(
            old.upstream.clone(),
            profile,
            settings,
            images,
            Arc::clone(&old.metrics),
            Arc::clone(&old.memory),
        )?;
        self.live.store(Arc::new(live));
        Ok(())
    }

    /// The routes.
    pub fn router(self: Arc<Self>) -> Router {
        let (router, _) = routes().split_for_parts();
        let cors = Arc::clone(&self.cors);
        router.fallback(others).with_state(self).layer(middleware::from_fn_with_state(cors, cors::same_on_all))
    }

    /// Profile and settings of this moment.
    pub(crate) fn live(&self) -> Arc<Live> {
        self.live.load_full()
    }

    /// A request that judges on demand: let in, read, and answered by `work`.
    pub(crate) async fn visit<F: Future<Output = Result<Response, Failure>>>(
        &self,
        route: &'static str,
        request: axum::extract::Request,
        work: impl FnOnce(Visit, Arc<Admission>) -> F,
    ) -> Response {
        let (id, live) = (request_id(), self.live());
        let span = telemetry::span(route, &id, request.headers());
        let answered = async {
            let visit = Visit::begin(Arc::clone(&live), id.clone(), request).await?;
            Box::pin(work(visit, Arc::clone(&self.admission))).await
        };
        signed(&id, route, &live.metrics, answered.instrument(span)).await
    }
}

/// The routes with their description; everything else passes through.
fn routes() -> OpenApiRouter<Arc<Gateway>> {
    OpenApiRouter::with_openapi(openapi::document())
        .routes(routes!(completions).map(|route| route.fallback(others)))
        .routes(routes!(guard))
        .routes(routes!(moderations))
        .routes(routes!(models).map(|route| route.fallback(others)))
        .routes(routes!(alive))
        .routes(routes!(ready))
        .routes(routes!(metrics))
        .routes(routes!(description))
}

/// Serves until `stop`; then takes no new work and finishes what runs.
///
/// # Errors
/// When the listener fails.
pub async fn serve(
    gateway: Arc<Gateway>,
    listener: TcpListener,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let listener = listener.tap_io(|stream| {
        // Small pieces of a stream are not to wait for more.
        let _ = stream.set_nodelay(true);
    });
    axum::serve(listener, gateway.router()).with_graceful_shutdown(stop).await
}

/// A request's name in answers and logs.
fn request_id() -> String {
    format!("ecso-{}", uuid::Uuid::new_v4().simple())
}

/// Answers a chat. What is in scope is judged before it goes out.
#[utoipa::path(
    post, path = "/v1/chat/completions", request_body = ChatRequest,
    responses(
        (status = 200, description = "The answer; a stream of server-sent events where the request asks for one", content(
            (ChatAnswer = "application/json"), (Value = "text/event-stream")
        )),
        Failures,
        (status = "default", description = "What the server behind the guard says"),
    ),
)]
async fn completions(State(gateway): State<Arc<Gateway>>, request: axum::extract::Request) -> Response {
    let (id, live) = (request_id(), gateway.live());
    let (head, body) = request.into_parts();
    let span = telemetry::span("chat", &id, &head.headers);
    let answered = completion(&gateway, &live, &id, head, body).instrument(span);
    signed(&id, "chat", &live.metrics, answered).await
}

/// The response, counted, with the request's name on it.
async fn signed(
    id: &str,
    route: &'static str,
    metrics: &Metrics,
    answered: Instrumented<impl Future<Output = Result<Response, Failure>>>,
) -> Response {
    let span = answered.span().clone();
    let mut response = answered.await.unwrap_or_else(|failure| {
        failure.log(id);
        metrics.failure(failure.code);
        failure.into_response()
    });
    metrics.request(route, response.status().as_u16());
    span.record("http.response.status_code", response.status().as_u16());
    if response.status().is_server_error() {
        span.record("otel.status_code", "error");
    }
    if let Ok(id) = HeaderValue::try_from(id) {
        response.headers_mut().insert("x-ecso-request-id", id);
    }
    response
}

async fn completion(
    gateway: &Gateway,
    live: &Arc<Live>,
    id: &str,
    head: Parts,
    body: Body,
) -> Result<Response, Failure> {
    let begun = Instant::now();
    let settings = &live.settings;
    let caller = access::caller(settings, &head.headers)?;
    live.rates.check(&caller)?;
    let headers = own_key_removed(settings, head.headers);
    if let Upstream::Server(server) = &live.upstream
        && caller.is_never_guarded(settings)
    {
        let body = reqwest::Body::wrap_stream(body.into_data_stream());
        return Ok(passed(server.forward(Method::POST, CHAT, &headers, body, Bodies::AsSent).await?));
    }
    let body = read(body, settings.limits.body, settings.limits.deadline()).await?;
    let probe = Probe::read(&body);
    let model = probe.as_ref().map_or("", |probe| &probe.model);
    let mode = caller.mode(settings, model, &headers)?;
    if mode == Mode::Enforce && headers.get(header::CONTENT_ENCODING).is_some_and(|coding| coding != "identity") {
        let message = "a compressed body can't be guarded";
        return Err(Failure::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_encoding", message));
    }
    let in_scope = match &probe {
        Ok(probe) => live.profile.scope == Scope::All || probe.has_images(),
        Err(error) if mode == Mode::Enforce => {
            return Err(Failure::bad_request("invalid_request", format!("the body can't be read: {error}")));
        }
        Err(_) => false,
    };
    drop(probe);
    let guarded = |mode| Guarded {
        live: Arc::clone(live),
        headers: headers.clone(),
        body: body.clone(),
        id: id.to_owned(),
        begun,
        mode,
        key: caller.name.clone(),
    };
    match (&live.upstream, mode) {
        (Upstream::Server(server), _) if mode == Mode::Off || !in_scope => {
            Ok(passed(server.forward(Method::POST, CHAT, &headers, body.into(), Bodies::AsSent).await?))
        }
        (Upstream::Server(server), Mode::Observe) => {
            let admission = Arc::clone(&gateway.admission);
            let id = id.to_owned();
            let key = caller.name.clone();
            Observed { live: Arc::clone(live), admission, headers, body, id, begun, key }.forward(server).await
        }
        (_, mode) => {
            let turn = tokio::time::timeout(settings.limits.deadline(), gateway.admission.enter());
            let turn = turn.await.unwrap_or_else(|_| Err(Failure::deadline(settings.limits.deadline)))?;
            guarded(mode).enforce(turn).await
        }
    }
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
    let live = gateway.live();
    match tokio::time::timeout(Duration::from_secs(2), live.upstream.health()).await {
        Ok(Ok(())) => "ok".into_response(),
        _ => (StatusCode::SERVICE_UNAVAILABLE, "the upstream does not answer").into_response(),
    }
}

/// Figures for Prometheus, where the operator wants them told.
#[utoipa::path(get, path = "/metrics", responses(
    (status = 200, body = String, content_type = "application/openmetrics-text"), (status = 404, body = ErrorBody)
))]
async fn metrics(State(gateway): State<Arc<Gateway>>) -> Response {
    let live = gateway.live();
    if !live.settings.metrics {
        let message = "metrics are off; set gateway.metrics = true";
        return Failure::new(StatusCode::NOT_FOUND, "not_found", message).into_response();
    }
    let (running, waiting) = gateway.admission.load();
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], live.metrics.text(running, waiting)).into_response()
}

/// This description.
#[utoipa::path(get, path = "/openapi.json", responses((status = 200, body = Object)))]
async fn description() -> Response {
    static TEXT: LazyLock<String> = LazyLock::new(|| routes().into_openapi().to_json().unwrap_or_default());
    ([(header::CONTENT_TYPE, "application/json")], TEXT.as_str()).into_response()
}

/// The models: of the server behind the guard, or the one in this process.
#[utoipa::path(get, path = "/v1/models", responses(
    (status = 200, body = Models), Failures, (status = "default", description = "What the server behind the guard says")
))]
async fn models(State(gateway): State<Arc<Gateway>>, request: axum::extract::Request) -> Response {
    let live = gateway.live();
    let Upstream::Engine(model) = &live.upstream else {
        return others(State(gateway), request).await;
    };
    if let Err(failure) = access::caller(&live.settings, request.headers()) {
        return failure.into_response();
    }
    let list =
        json!({"object": "list", "data": [{"id": model.name(), "object": "model", "created": 0, "owned_by": "ecso"}]});
    ([(header::CONTENT_TYPE, "application/json")], list.to_string()).into_response()
}

/// Every other path passes through.
pub(crate) async fn others(State(gateway): State<Arc<Gateway>>, request: axum::extract::Request) -> Response {
    let live = gateway.live();
    let (head, body) = request.into_parts();
    let answered = async {
        access::caller(&live.settings, &head.headers)?;
        let path = head.uri.path();
        let Upstream::Server(server) = &live.upstream else {
            return Err(Failure::new(StatusCode::NOT_FOUND, "not_found", format!("there is no {path} here")));
        };
        if !passes(&head.method, path) {
            return Err(Failure::new(StatusCode::NOT_FOUND, "not_found", format!("{path} is not passed on")));
        }
        let path = head.uri.path_and_query().map_or(path, |whole| whole.as_str());
        let headers = own_key_removed(&live.settings, head.headers.clone());
        let body = reqwest::Body::wrap_stream(body.into_data_stream());
        Ok(passed(server.forward(head.method.clone(), path, &headers, body, Bodies::AsSent).await?))
    };
    answered.await.unwrap_or_else(Failure::into_response)
}

/// Whether a path is passed on: below /v1, without detours, and not the guarded one by another spelling that a server
/// might take for it.
fn passes(method: &Method, path: &str) -> bool {
    let Ok(decoded) = percent_decode_str(path).decode_utf8() else { return false };
    let mut parts: Vec<&str> = decoded.split(['/', '\\']).collect();
    if decoded.contains(['%', ';', '\0']) || parts.iter().any(|part| matches!(*part, "." | "..")) {
        return false;
    }
    parts.retain(|part| !part.is_empty());
    let guarded = ["v1", "chat", "completions"];
    let is_guarded = parts.len() == guarded.len()
        && parts.iter().zip(guarded).all(|(part, name)| part.trim().eq_ignore_ascii_case(name));
    parts.first() == Some(&"v1") && !(is_guarded && *method == Method::POST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guarded_path_has_one_spelling() {
        for path in [
            "/v1/chat/completions/",
            "/v1//chat/completions",
            "/v1/chat%2Fcompletions",
            "/v1/chat/./completions",
            "/v1/models/../chat/completions",
            "/v1/%63hat/completions",
            "/v1/Chat/Completions",
            "/v1/chat\\completions",
            "/v1/chat/completions;x",
            "/v1/chat/completions%20",
            "/v1/chat%252Fcompletions",
            "/metrics",
            "/v2/models",
            "/",
        ] {
            assert!(!passes(&Method::POST, path), "{path}");
        }
        for path in ["/v1/embeddings", "/v1/models/a%20b", "/v1/files/x/content", "/v1/chat/completions/chatcmpl-1"] {
            assert!(passes(&Method::POST, path), "{path}");
        }
        assert!(passes(&Method::GET, "/v1/chat/completions"));
    }
}
