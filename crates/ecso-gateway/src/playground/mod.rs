//! The playground: a page on which people ask about images and watch the steps as they run.
//!
//! It is served beside the routes for programs, and shares with them how a question is read and
//! bounded. Who may use it, `entrance` decides: whoever opens the link that the operator has.
//! `files` is the page itself, `ask` runs a question, `edit` a profile that is changed in the page.
//! What it shows of the steps is what `gateway.trace` lets clients see.

mod ask;
mod edit;
mod files;
mod sessions;

use std::sync::Arc;

use axum::{
    Router,
    extract::State,
    http::{HeaderMap, HeaderValue, StatusCode, Uri, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use ecso::{Parser, Profile, profile::Method};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::watch;
use url::form_urlencoded;

use crate::{
    access::Caller, context::PROBE_TIMEOUT, error::ApiError, server::Gateway, settings::TraceLevel,
    state::AppState,
};
use sessions::Sessions;

/// A page for people, for [`Gateway::with_playground`].
pub struct Playground {
    sessions: Sessions,
    calibration: Option<Calibration>,
}

/// What a threshold does on requests that it was not chosen on, as a calibration has found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Calibration {
    /// The threshold that it chose.
    pub threshold: f64,
    /// How many requests it was made of.
    pub requests: usize,
    /// (threshold, share of harmful requests flagged, share of harmless ones flagged).
    pub curve: Vec<(f64, f64, f64)>,
}

impl Playground {
    /// A page that nobody has opened; with the calibration of the usual profile, where there is
    /// one.
    #[must_use]
    pub fn new(calibration: Option<Calibration>) -> Self {
        Self { sessions: Sessions::new(), calibration }
    }

    /// What lets the next browser in, as `/?token=TOKEN`. Each works once; then the next one stands
    /// here.
    #[must_use]
    pub fn tokens(&self) -> watch::Receiver<String> {
        self.sessions.tokens()
    }
}

/// What the routes share.
#[derive(Clone)]
struct PageState {
    gateway: Arc<Gateway>,
    playground: Arc<Playground>,
}

/// The routes of the page. They are for its own scripts alone, so no other page is told that it may
/// read them.
pub(crate) fn routes(gateway: Arc<Gateway>, playground: Arc<Playground>) -> Router {
    let page = PageState { gateway, playground };
    Router::new()
        .route("/playground/{file}", get(file))
        .route("/playground/facts", get(facts))
        .route("/playground/profile", post(edit::profile))
        .route("/playground/ask", post(ask::ask))
        .route_layer(middleware::from_fn_with_state(page.clone(), require_session))
        .route("/", get(index))
        .route("/favicon.ico", get(StatusCode::NO_CONTENT))
        .layer(middleware::map_response(add_security_headers))
        .with_state(page)
}

/// Only the page's own requests pass, from a browser that came in by a link.
async fn require_session(
    State(page): State<PageState>,
    request: axum::extract::Request,
    next: Next,
) -> Response {
    match page.playground.sessions.check(request.method(), request.headers()) {
        Ok(()) => next.run(request).await,
        Err(refused) => refused.into_response(),
    }
}

/// Nothing of another origin is loaded, run or told, no script stands in the page, and nothing is
/// kept.
async fn add_security_headers(mut response: Response) -> Response {
    const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; \
                          base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; \
                          trusted-types 'none'";
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::CACHE_CONTROL, "no-store"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        (header::HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

/// The page, for whoever came in; the way in, for whoever has a link.
async fn index(State(page): State<PageState>, uri: Uri, headers: HeaderMap) -> Response {
    let sessions = &page.playground.sessions;
    let mut pairs = form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes());
    let token = pairs.find(|(name, _)| name == "token");
    if let Some(cookie) = token.and_then(|(_, token)| sessions.open(&token)) {
        // A page that goes on by itself: were it a redirect, a browser that came from elsewhere
        // would leave the cookie out.
        return ([(header::SET_COOKIE, cookie)], files::OPENED).into_response();
    }
    if sessions.knows(&headers) {
        return files::PAGE.into_response();
    }
    (StatusCode::UNAUTHORIZED, files::CLOSED).into_response()
}

/// A file of the page.
async fn file(axum::extract::Path(name): axum::extract::Path<String>) -> Response {
    match files::named(&name) {
        Some(file) => file.into_response(),
        None => ApiError::new(StatusCode::NOT_FOUND, "not_found", "the page has no such file")
            .into_response(),
    }
}

/// What the page has to know: model, profiles, bounds, calibration.
async fn facts(State(page): State<PageState>) -> Response {
    let state = page.gateway.state();
    let no_headers = HeaderMap::new();
    let asked = tokio::time::timeout(PROBE_TIMEOUT, state.upstream.model_name(&no_headers));
    let model = asked.await.ok().and_then(Result::ok);
    let is_concurrent = state
        .upstream
        .guarded_model(model.as_deref().unwrap_or_default(), &no_headers)
        .is_concurrent();
    let limits = &state.settings.limits;
    let profiles = profiles(&state).into_iter();
    // The prompts are what the model is told, which not everybody may see; and the choice is the
    // operator's.
    let default = default_profile(&state, model.as_deref());
    let visible: Vec<Value> = match state.settings.trace {
        TraceLevel::Full => profiles.map(|profile| json!(profile)).collect(),
        TraceLevel::Figures | TraceLevel::None => vec![json!({"name": default.name})],
    };
    let facts = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model": model,
        "several": is_concurrent,
        "trace": state.settings.trace,
        "usual": default.name,
        "profiles": visible,
        "limits": {"images": limits.images, "body": limits.body, "image": state.images.bytes},
        "calibration": page.playground.calibration,
    });
    ([(header::CONTENT_TYPE, "application/json")], facts.to_string()).into_response()
}

/// The profiles to choose from: the operator's, and those built in, without one whose name an
/// operator's has.
fn profiles(state: &AppState) -> Vec<Profile> {
    let built_in = Profile::NAMES.into_iter().filter_map(|name| Profile::named(name).ok());
    let mut profiles: Vec<Profile> = Vec::new();
    for profile in state.all_profiles().cloned().chain(built_in) {
        if profiles.iter().all(|known| known.name != profile.name) {
            profiles.push(profile);
        }
    }
    profiles.sort_by_key(|profile| {
        Profile::NAMES.iter().position(|name| *name == profile.name).unwrap_or(usize::MAX)
    });
    profiles
}

/// The profile that requests to this model run under, where nobody chooses.
fn default_profile<'a>(state: &'a AppState, model: Option<&str>) -> &'a Profile {
    state.profile(&Caller::playground(), model)
}

/// A profile of [`profiles`].
fn profile(state: &AppState, name: &str) -> Result<Profile, ApiError> {
    let known = profiles(state).into_iter().find(|profile| profile.name == name);
    known.ok_or_else(|| ApiError::bad_request("unknown_profile", "there is no such profile here"))
}

/// Whoever changes a profile can have everything let out, and is told what the model is told.
fn require_full_trace(state: &AppState) -> Result<(), ApiError> {
    if state.settings.trace == TraceLevel::Full {
        return Ok(());
    }
    let message = "this could show what the server's own profile holds back: it takes gateway.trace = \"full\"";
    Err(ApiError::new(StatusCode::FORBIDDEN, "trace_needed", message))
}

/// From which probability of harm on a profile calls an answer unsafe; none where words decide.
fn threshold(profile: &Profile) -> Option<f64> {
    match &profile.method {
        Method::Hardened(method) => Some(method.threshold),
        Method::Paper(method) => {
            Some(method.detect.threshold).filter(|_| method.detect.parser == Parser::Score)
        }
    }
}
