//! The server: routes, and what every request shares.

use std::{
    collections::BTreeMap,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use axum::{
    Router,
    body::Body,
    extract::State,
    http::{HeaderMap, HeaderValue, Method, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
    routing::{get, post},
    serve::ListenerExt,
};
use bytes::Bytes;
use ecso::{
    Guard, Image, Mllm, Part, Profile,
    profile::{Gate, Scope},
};
use ecso_openai::Fetcher;
use percent_encoding::percent_decode_str;
use serde_json::json;
use tokio::net::TcpListener;

use crate::{
    access::{self, Admission, Rates},
    audit::{Audit, Case},
    chat::{self, Guarded, Report},
    door::{Finding, Question},
    failure::Failure,
    metrics::Metrics,
    observe::Observed,
    probe::Probe,
    request::Request,
    settings::{Mode, Settings},
    upstream::{Upstream, passed},
};

/// A guard that can be served. Its settings can be exchanged while it runs.
pub struct Gateway {
    live: ArcSwap<Live>,
    admission: Arc<Admission>,
}

/// All that a request needs to know.
pub(crate) struct Live {
    pub(crate) upstream: Upstream,
    pub(crate) profile: Profile,
    pub(crate) settings: Settings,
    /// Bounds of an image.
    pub(crate) images: ecso::Limits,
    fetcher: Option<Fetcher>,
    audit: Option<Audit>,
    rates: Rates,
    pub(crate) metrics: Arc<Metrics>,
}

impl Live {
    fn new(
        upstream: Upstream,
        profile: Profile,
        settings: Settings,
        images: ecso::Limits,
        metrics: Arc<Metrics>,
    ) -> io::Result<Self> {
        let fetcher = settings.fetch_images.then(Fetcher::new).transpose().map_err(io::Error::other)?;
        let audit = Audit::open(&settings.audit).map_err(|error| {
            io::Error::new(error.kind(), format!("the audit log {}: {error}", settings.audit.path.display()))
        })?;
        let rates = Rates::new(&settings);
        Ok(Self { upstream, profile, settings, images, fetcher, audit, rates, metrics })
    }

    /// Gets what a request only points to, and looks at its images, as far as the operator wants that.
    pub(crate) async fn prepare(&self, request: &mut Request) -> Result<(), Failure> {
        if let Some(fetcher) = &self.fetcher {
            for part in request.chat.turns.iter_mut().flat_map(|turn| &mut turn.parts) {
                let Some(url) = (if let Part::Image(image) = part { image.url() } else { None }) else { continue };
                let fetched: Result<Image, _> = fetcher.image(url, self.images).await;
                *part = Part::Image(fetched.map_err(|error| Failure::bad_request("invalid_image", error.to_string()))?);
            }
        }
        if self.settings.decode_images {
            let chat = request.chat.clone();
            let looked = tokio::task::spawn_blocking(move || {
                chat.images().filter(|image| image.encoded().is_some()).try_for_each(|image| image.pixels().map(drop))
            });
            let looked = looked.await.map_err(|_| Failure::upstream("an image could not be decoded"))?;
            looked.map_err(|error| Failure::bad_request("invalid_image", error.to_string()))?;
        }
        Ok(())
    }

    /// The guard for one request: its model, its caller's key, its sampling.
    pub(crate) fn guard(
        &self,
        request: &Request,
        headers: &HeaderMap,
        mode: Mode,
    ) -> Result<Guard<Arc<dyn Mllm>>, Failure> {
        let (model, sampling) = match &self.upstream {
            Upstream::Server(server) => (server.model(&request.model, headers), request.sampling()),
            Upstream::Engine(model) => (Arc::clone(model), request.own_sampling()?),
        };
        let mut profile = self.profile.clone();
        if mode == Mode::Off {
            profile.gate = Gate::Never;
        }
        Ok(Guard::new(model, profile).with_sampling(sampling))
    }

    /// Tells what became of a request; in the log no word of the conversation.
    pub(crate) fn record(&self, case: &Case<'_>) {
        tracing::info!(
            id = case.id,
            model = case.request.model,
            profile = self.profile.name,
            mode = ?case.mode,
            verdict = ?case.report.verdict(),
            score = case.report.score(),
            images = case.request.chat.image_count(),
            ms = u64::try_from(case.begun.elapsed().as_millis()).unwrap_or(u64::MAX),
            "guarded"
        );
        self.metrics.judged(case);
        if let Some(audit) = &self.audit {
            audit.write(case, &self.profile.name);
        }
    }
}

impl Gateway {
    /// A guard in front of `upstream`, under `profile`; `images` bounds single images.
    ///
    /// # Errors
    /// When no HTTP client can be made.
    pub fn new(upstream: Upstream, profile: Profile, settings: Settings, images: ecso::Limits) -> io::Result<Self> {
        let admission = Arc::new(Admission::new(settings.limits.at_once, settings.limits.queue));
        let live = Live::new(upstream, profile, settings, images, Arc::new(Metrics::new()))?;
        Ok(Self { live: ArcSwap::from_pointee(live), admission })
    }

    /// Exchanges profile and settings; requests under way end under the old ones. The upstream stays, and so do
    /// `limits.at_once` and `limits.queue`.
    ///
    /// # Errors
    /// When the audit log can't be opened; then all stays as it was.
    pub fn reload(&self, profile: Profile, settings: Settings, images: ecso::Limits) -> io::Result<()> {
        let old = self.live.load();
        let live = Live::new(old.upstream.clone(), profile, settings, images, Arc::clone(&old.metrics))?;
        self.live.store(Arc::new(live));
        Ok(())
    }

    /// The routes.
    pub fn router(self: Arc<Self>) -> Router {
        Router::new()
            .route("/v1/chat/completions", post(completions).fallback(others))
            .route("/v1/guard", post(guard))
            .route("/v1/models", get(models).fallback(others))
            .route("/healthz", get(|| async { "ok" }))
            .route("/readyz", get(ready))
            .route("/metrics", get(metrics))
            .fallback(others)
            .with_state(self)
    }
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

async fn completions(State(gateway): State<Arc<Gateway>>, request: axum::extract::Request) -> Response {
    let (id, live) = (request_id(), gateway.live.load_full());
    let (head, body) = request.into_parts();
    let answered = completion(&gateway, &live, &id, head, body).await;
    signed(&id, "chat", &live.metrics, answered)
}

/// The response, counted, with the request's name on it.
fn signed(id: &str, route: &'static str, metrics: &Metrics, answered: Result<Response, Failure>) -> Response {
    let mut response = answered.unwrap_or_else(|failure| {
        failure.log(id);
        metrics.failure(failure.code);
        failure.into_response()
    });
    metrics.request(route, response.status().as_u16());
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
        return Ok(passed(server.forward(Method::POST, "/v1/chat/completions", &headers, body).await?));
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
            let path = "/v1/chat/completions";
            Ok(passed(server.forward(Method::POST, path, &headers, body.into()).await?))
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

/// With keys of our own, a client's key is ours and never the upstream's business.
fn own_key_removed(settings: &Settings, mut headers: HeaderMap) -> HeaderMap {
    if !settings.keys.is_empty() {
        headers.remove(header::AUTHORIZATION);
    }
    headers
}

async fn read(body: Body, longest: usize, patience: Duration) -> Result<Bytes, Failure> {
    let too_long = || {
        let message = format!("the body has more than {longest} bytes, or it broke off");
        Failure::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
    };
    let read = tokio::time::timeout(patience, axum::body::to_bytes(body, longest)).await;
    let timeout = || Failure::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", "the body did not come in time");
    read.map_err(|_| timeout())?.map_err(|_| too_long())
}

async fn guard(State(gateway): State<Arc<Gateway>>, request: axum::extract::Request) -> Response {
    let (id, live) = (request_id(), gateway.live.load_full());
    let (head, body) = request.into_parts();
    let answered = async {
        let begun = Instant::now();
        let limits = &live.settings.limits;
        let caller = access::caller(&live.settings, &head.headers)?;
        live.rates.check(&caller)?;
        let headers = own_key_removed(&live.settings, head.headers);
        let body = read(body, limits.body, limits.deadline()).await?;
        let question = Question::read(&body)?;
        let work = async {
            let _turn = gateway.admission.enter().await?;
            let body = question.chat()?;
            let mut request = Request::read(&body, limits, live.images)?;
            live.prepare(&mut request).await?;
            let guard = live.guard(&request, &headers, Mode::Enforce)?;
            let outcome = match &question.answer {
                Some(answer) => guard.review(&request.chat, answer).await?,
                None => guard.answer(&request.chat).await?,
            };
            let said = outcome.steps.iter().find(|step| step.step == ecso::Step::Direct).map(|step| step.reply.clone());
            let drafts = BTreeMap::from([(0, question.answer.clone().or(said).unwrap_or_default())]);
            let (request, report) = (&request, &Report::of(outcome.clone()));
            let (id, key, mode) = (&id, &caller.name, Mode::Enforce);
            live.record(&Case { id, key, mode, begun, body: &body, request, report, drafts });
            Ok::<_, Failure>(outcome)
        };
        let outcome = tokio::time::timeout(limits.deadline(), work).await;
        let outcome = outcome.unwrap_or_else(|_| Err(Failure::deadline(limits.deadline)))?;
        let mut response = Response::new(Body::from(json!(Finding::new(&id, &outcome)).to_string()));
        chat::verdict_headers(response.headers_mut(), &Report::of(outcome));
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Ok(response)
    };
    let answered = answered.await;
    signed(&id, "guard", &live.metrics, answered)
}

/// Whether the upstream answers at all.
async fn ready(State(gateway): State<Arc<Gateway>>) -> Response {
    let live = gateway.live.load_full();
    let Upstream::Server(server) = &live.upstream else { return "ok".into_response() };
    let headers = HeaderMap::new();
    let asked = server.forward(Method::GET, "/v1/models", &headers, "".into());
    match tokio::time::timeout(Duration::from_secs(2), asked).await {
        Ok(Ok(response)) if !response.status().is_server_error() => "ok".into_response(),
        _ => (StatusCode::SERVICE_UNAVAILABLE, "the upstream does not answer").into_response(),
    }
}

/// Figures for Prometheus, where the operator wants them told.
async fn metrics(State(gateway): State<Arc<Gateway>>) -> Response {
    let live = gateway.live.load_full();
    if !live.settings.metrics {
        let message = "metrics are off; set gateway.metrics = true";
        return Failure::new(StatusCode::NOT_FOUND, "not_found", message).into_response();
    }
    let (running, waiting) = gateway.admission.load();
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], live.metrics.text(running, waiting)).into_response()
}

async fn models(State(gateway): State<Arc<Gateway>>, request: axum::extract::Request) -> Response {
    let live = gateway.live.load_full();
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
async fn others(State(gateway): State<Arc<Gateway>>, request: axum::extract::Request) -> Response {
    let live = gateway.live.load_full();
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
        Ok(passed(server.forward(head.method.clone(), path, &headers, body).await?))
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
