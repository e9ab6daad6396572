//! The server: its state and its routes.

use std::{io, sync::Arc};

use arc_swap::ArcSwap;
use axum::{
    Router,
    http::{HeaderValue, request::Parts},
    middleware,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use ecso::Memory;
use tokio::sync::Semaphore;
use tracing::{Instrument, instrument::Instrumented};
use utoipa_axum::{
    router::{OpenApiRouter, UtoipaMethodRouterExt},
    routes,
};

use crate::{
    access::Admission,
    audit::Audit,
    connections::max_connections,
    context::{self, RequestContext},
    cors::{self, Cors},
    error::ApiError,
    guard::{__path_guard, guard},
    handlers::{
        __path_completions, __path_count_tokens, __path_description, __path_health,
        __path_messages, __path_metrics, __path_models, __path_ready, __path_responses,
        completions, count_tokens, description, health, messages, metrics, models, ready,
        responses,
    },
    hooks::{
        litellm::{__path_litellm, litellm},
        pending::Pending,
        portkey::{__path_portkey, portkey},
        truefoundry::{__path_truefoundry, truefoundry},
    },
    metrics::Metrics,
    moderation::{__path_moderations, moderations},
    openapi,
    passthrough::passthrough,
    playground::{self, Playground},
    ready::Readiness,
    settings::Settings,
    state::{AppState, Profiles, SharedState},
    store::Store,
    telemetry,
    upstream::{Upstream, door},
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
    pub(crate) readiness: Readiness,
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
    pub(crate) fn admit_page(
        &self,
        state: &Arc<AppState>,
        id: &str,
    ) -> Result<RequestContext, ApiError> {
        RequestContext::admit_page(state, &self.body_budget, id)
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
        let response = async {
            let mut context = self.admit(&state, &id, head)?;
            context.keep_known_headers();
            let body = context.read(body).await?;
            Box::pin(work(&mut context, body)).await
        };
        finish_response(&id, (door, route), &state.metrics, response.instrument(span)).await
    }
}

/// The routes with their description. `passthrough` handles all others.
pub(crate) fn routes() -> OpenApiRouter<Arc<Gateway>> {
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

/// Counts the response and adds the request id to its headers.
pub(crate) async fn finish_response(
    id: &str,
    (door, route): (&'static str, &'static str),
    metrics: &Metrics,
    response: Instrumented<impl Future<Output = Result<Response, ApiError>>>,
) -> Response {
    let span = response.span().clone();
    let mut response = response.await.unwrap_or_else(|failure| {
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
