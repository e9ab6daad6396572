//! The playground: a page on which people ask about images, and watch the steps as they run.
//!
//! It shares with the API how a request is read and limited. `sessions` decides who may use it: the
//! browser that opened the operator's link. `files` has the files of the page, `ask` answers a
//! question, and `edit` handles profiles that are edited in the page. `gateway.trace` decides how
//! much of the steps it shows.

mod ask;
mod edit;
mod files;
mod prompts;
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

/// The playground, for [`Gateway::with_playground`].
pub struct Playground {
    sessions: Sessions,
    calibration: Option<Calibration>,
}

/// What a threshold does on requests that it was not fitted to, according to a calibration.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Calibration {
    /// The threshold that the calibration chose.
    pub threshold: f64,
    /// How many requests it was measured on.
    pub requests: usize,
    /// Points: (threshold, share of harmful requests flagged, share of harmless requests flagged).
    pub curve: Vec<(f64, f64, f64)>,
}

impl Playground {
    /// A playground without sessions, with the calibration of the default profile, if there is one.
    #[must_use]
    pub fn new(calibration: Option<Calibration>) -> Self {
        Self { sessions: Sessions::new(), calibration }
    }

    /// The token for the next browser, as in `/?token=TOKEN`. Each works once, and is then replaced
    /// by the next.
    #[must_use]
    pub fn tokens(&self) -> watch::Receiver<String> {
        self.sessions.tokens()
    }
}

/// The state of the routes.
#[derive(Clone)]
struct PageState {
    gateway: Arc<Gateway>,
    playground: Arc<Playground>,
}

/// The routes of the page. Only its own scripts use them, so no CORS headers are sent.
pub(crate) fn routes(gateway: Arc<Gateway>, playground: Arc<Playground>) -> Router {
    let page = PageState { gateway, playground };
    Router::new()
        .route("/playground/{file}", get(file))
        .route("/playground/facts", get(facts))
        .route("/playground/profile", post(edit::profile))
        .route("/playground/ask", post(ask::ask))
        .route_layer(middleware::from_fn_with_state(page.clone(), require_session))
        .route("/", get(index).post(enter))
        .route("/playground/enter.js", get(files::ENTER_SCRIPT))
        .route("/favicon.ico", get(StatusCode::NO_CONTENT))
        .layer(middleware::map_response(add_security_headers))
        .with_state(page)
}

/// Only passes requests of the page itself, from a browser with a session.
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

/// Adds security headers: nothing of another origin is loaded, run or contacted, there are no
/// inline scripts, and nothing is cached.
async fn add_security_headers(mut response: Response) -> Response {
    const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' \
                          data: blob:; connect-src 'self'; base-uri 'none'; form-action 'self'; \
                          frame-ancestors 'none'; require-trusted-types-for 'script'; \
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

/// The page, for browsers with a session. With a token in the URL, a form that opens one: programs
/// that only look at links (previews, prefetching) don't use them up.
async fn index(State(page): State<PageState>, uri: Uri, headers: HeaderMap) -> Response {
    let sessions = &page.playground.sessions;
    if token(&uri).is_some_and(|token| sessions.accepts(&token)) {
        return files::ENTER.into_response();
    }
    if sessions.knows(&headers) {
        return files::PAGE.into_response();
    }
    (StatusCode::UNAUTHORIZED, files::CLOSED).into_response()
}

/// Opens a session with the token in the URL.
async fn enter(State(page): State<PageState>, uri: Uri) -> Response {
    match token(&uri).and_then(|token| page.playground.sessions.open(&token)) {
        // This page leads to the page without the token.
        Some(cookie) => ([(header::SET_COOKIE, cookie)], files::OPENED).into_response(),
        None => (StatusCode::UNAUTHORIZED, files::CLOSED).into_response(),
    }
}

/// The token in a URL.
fn token(uri: &Uri) -> Option<String> {
    let mut pairs = form_urlencoded::parse(uri.query()?.as_bytes());
    pairs.find(|(name, _)| name == "token").map(|(_, token)| token.into_owned())
}

/// A file of the page.
async fn file(axum::extract::Path(name): axum::extract::Path<String>) -> Response {
    match files::named(&name) {
        Some(file) => file.into_response(),
        None => {
            ApiError::new(StatusCode::NOT_FOUND, "not_found", "the playground has no such file")
                .into_response()
        }
    }
}

/// What the page needs to know: model, profiles, limits, calibration.
async fn facts(State(page): State<PageState>) -> Response {
    let state = page.gateway.state();
    let no_headers = HeaderMap::new();
    let probe = tokio::time::timeout(PROBE_TIMEOUT, state.upstream.model_name(&no_headers));
    let model = probe.await.ok().and_then(Result::ok);
    let is_concurrent = state
        .upstream
        .guarded_model(model.as_deref().unwrap_or_default(), &no_headers)
        .is_concurrent();
    let limits = &state.settings.limits;
    let profiles = profiles(&state).into_iter();
    // Not everyone may see the prompts, and the operator chooses the profile.
    let default = default_profile(&state, model.as_deref());
    let visible: Vec<Value> = match state.settings.trace {
        TraceLevel::Full => profiles.map(|profile| json!(profile)).collect(),
        TraceLevel::Figures | TraceLevel::None => vec![json!({"name": default.name})],
    };
    let shows_figures = state.settings.trace != TraceLevel::None;
    let calibration = page.playground.calibration.as_ref().filter(|_| shows_figures);
    let facts = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model": model,
        "several": is_concurrent,
        "trace": state.settings.trace,
        "usual": default.name,
        "profiles": visible,
        "limits": {"images": limits.images, "body": limits.body, "image": state.images.bytes},
        "calibration": calibration,
    });
    ([(header::CONTENT_TYPE, "application/json")], facts.to_string()).into_response()
}

/// The profiles to choose from: the operator's, and those built-in ones whose name is not taken.
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

/// The profile for requests to this model if none is chosen.
fn default_profile<'a>(state: &'a AppState, model: Option<&str>) -> &'a Profile {
    state.profile(&Caller::playground(), model)
}

/// One of these [`profiles`].
fn profile(state: &AppState, name: &str) -> Result<Profile, ApiError> {
    let known = profiles(state).into_iter().find(|profile| profile.name == name);
    known.ok_or_else(|| ApiError::bad_request("unknown_profile", "this server has no such profile"))
}

/// Returns an error unless everything may be shown. A changed profile can release everything, and
/// shows prompts.
fn require_full_trace(state: &AppState) -> Result<(), ApiError> {
    if state.settings.trace == TraceLevel::Full {
        return Ok(());
    }
    let message = "this could show what the server's own profile holds back: it needs \
                   gateway.trace = \"full\"";
    Err(ApiError::new(StatusCode::FORBIDDEN, "trace_needed", message))
}

/// The probability of harm from which the profile calls an answer unsafe. `None` if words decide.
fn threshold(profile: &Profile) -> Option<f64> {
    match &profile.method {
        Method::Hardened(method) => Some(method.threshold),
        Method::Paper(method) => {
            Some(method.detect.threshold).filter(|_| method.detect.parser == Parser::Score)
        }
        _ => None,
    }
}
