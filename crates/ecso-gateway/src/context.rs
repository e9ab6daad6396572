//! One request, from its head to its record.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::http::{
    HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, header, request::Parts,
};
use bytes::{Bytes, BytesMut};
use ecso::profile::Scope;
use ecso_openai::Bodies;
use futures::StreamExt;
use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use url::form_urlencoded;

use crate::{
    access::{self, API_KEY, Caller},
    audit::JudgedRequest,
    error::ApiError,
    report::{Early, Finding, Report, UNFINISHED},
    request::{self, Body, Request, is_remote, may_choose_model},
    settings::{ImageUrls, Mode, Settings, Streams, TraceLevel},
    state::AppState,
    upstream::{
        CREDENTIAL_HEADERS, Carrier, Credentials, HTTP, Outgoing, Transport, Upstream,
        is_known_header, relay, with_idle_timeout,
    },
};

/// A request that was admitted.
pub(crate) struct RequestContext {
    pub(crate) state: Arc<AppState>,
    /// The request id in answers and logs.
    pub(crate) id: String,
    pub(crate) started: Instant,
    /// When its deadline began to count.
    deadline_start: Instant,
    pub(crate) caller: Caller,
    /// Its mode; known once its model is.
    pub(crate) mode: Mode,
    /// The headers for the upstream.
    pub(crate) headers: HeaderMap,
    /// Carries it to the upstream instead of our own client.
    carrier: Option<Arc<dyn Carrier>>,
    /// Whether its answer came with it, so that the model has already seen the request as it is.
    has_answer: bool,
    /// Whether its query string may choose a model.
    is_model_in_query: bool,
    /// Whether it is judged regardless of the profile's scope.
    pub(crate) is_in_scope: bool,
    /// The name of its profile, if the request chose one.
    pub(crate) profile: Option<String>,
    /// The share of the body budget that it holds.
    reserved: Option<OwnedSemaphorePermit>,
    body_budget: Arc<Semaphore>,
}

/// Checks that a body is UTF-8 and not compressed. Its content type is set anew for the upstream.
pub(crate) fn check_content_headers(headers: &HeaderMap) -> Result<(), ApiError> {
    let unsupported =
        |code, message: &str| Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, code, message));
    if headers.get_all(header::CONTENT_ENCODING).iter().any(|coding| coding != "identity") {
        return unsupported(
            "unsupported_encoding",
            "a compressed body can't be guarded: send it without Content-Encoding",
        );
    }
    let is_utf8 = |kind: &HeaderValue| {
        let kind = kind.to_str().unwrap_or("charset=?").to_ascii_lowercase();
        let mut charsets = kind
            .split(';')
            .filter_map(|part| part.split_once('='))
            .filter(|(name, _)| name.trim() == "charset");
        charsets.all(|(_, charset)| {
            matches!(charset.trim().trim_matches('"'), "utf-8" | "utf8" | "us-ascii")
        })
    };
    if headers.get_all(header::CONTENT_TYPE).iter().all(is_utf8) {
        return Ok(());
    }
    unsupported(
        "unsupported_type",
        "the body must be JSON in UTF-8: Content-Type: application/json",
    )
}

/// Bytes per permit of the body budget.
pub(crate) const PERMIT_BYTES: usize = 1024;

impl RequestContext {
    /// Admits a request: checks its key, its rate, and where it seems to come from.
    pub(crate) fn admit(
        state: &Arc<AppState>,
        body_budget: &Arc<Semaphore>,
        id: &str,
        head: Parts,
    ) -> Result<Self, ApiError> {
        let Parts { method, uri, headers, mut extensions, .. } = head;
        let carrier = extensions.remove::<Arc<dyn Carrier>>();
        let caller = access::caller(&state.settings, &headers)?;
        // A carrier has an entrance of its own, and its requests name the upstream's host.
        if state.settings.keys.is_empty() && carrier.is_none() {
            access::check_local(&method, &uri, &headers)?;
        }
        let headers = without_guard_key(&state.settings, headers);
        let mode = caller.strictest(&state.settings);
        let query = uri.query().unwrap_or_default().as_bytes();
        let is_model_in_query = form_urlencoded::parse(query)
            .any(|(name, value)| may_choose_model(&name) || may_choose_model(&value));
        let admitted = Self::of_caller(state, body_budget, id, caller)?;
        Ok(Self { mode, headers, carrier, is_model_in_query, ..admitted })
    }

    /// Admits a request of the playground, which has checked where it comes from. None of its headers
    /// are passed on, and it is always guarded.
    pub(crate) fn admit_page(
        state: &Arc<AppState>,
        body_budget: &Arc<Semaphore>,
        id: &str,
    ) -> Result<Self, ApiError> {
        Self::of_caller(state, body_budget, id, Caller::playground())
    }

    /// A request of a known caller, if that is within its rate.
    fn of_caller(
        state: &Arc<AppState>,
        body_budget: &Arc<Semaphore>,
        id: &str,
        caller: Caller,
    ) -> Result<Self, ApiError> {
        state.rates.check(&caller)?;
        Ok(Self {
            state: Arc::clone(state),
            id: id.to_owned(),
            started: Instant::now(),
            deadline_start: Instant::now(),
            caller,
            mode: Mode::Enforce,
            headers: HeaderMap::new(),
            carrier: None,
            has_answer: false,
            is_model_in_query: false,
            is_in_scope: false,
            profile: None,
            reserved: None,
            body_budget: Arc::clone(body_budget),
        })
    }

    /// The model that a request names, unless some server might find another one in it.
    pub(crate) fn model<'v>(&self, body: Option<&'v Value>) -> Option<&'v str> {
        body.filter(|_| !self.is_model_in_query).and_then(request::model)
    }

    /// Adds the answer that came with the request. It is used wherever the model would be asked.
    pub(crate) fn with_answer(self, carrier: Arc<dyn Carrier>) -> Self {
        Self { carrier: Some(carrier), has_answer: true, ..self }
    }

    /// Which requests to this model are guarded.
    pub(crate) fn scope(&self, model: Option<&str>) -> Scope {
        if self.is_in_scope { Scope::All } else { self.state.profile(&self.caller, model).scope }
    }

    /// How the client's own request reaches the model. `None` if the model runs in this process.
    pub(crate) fn transport(&self) -> Option<Transport> {
        match (&self.carrier, &self.state.upstream) {
            (Some(carrier), _) => Some(Transport::Carrier(Arc::clone(carrier))),
            (None, Upstream::Server(server)) => Some(Transport::Server(Arc::clone(server))),
            (None, Upstream::Engine(_)) => None,
        }
    }

    /// Makes sure that the request holds budget for at least `bytes`.
    fn reserve(&mut self, bytes: usize) -> Result<(), ApiError> {
        let permits = self.reserved.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let more = u32::try_from(bytes.div_ceil(PERMIT_BYTES).saturating_sub(permits)).ok();
        let more =
            more.and_then(|more| Arc::clone(&self.body_budget).try_acquire_many_owned(more).ok());
        let more = more.ok_or_else(ApiError::full)?;
        match &mut self.reserved {
            Some(reserved) => reserved.merge(more),
            None => self.reserved = Some(more),
        }
        Ok(())
    }

    /// Reserves `bytes` in addition to what is held.
    pub(crate) fn reserve_more(&mut self, bytes: usize) -> Result<(), ApiError> {
        self.reserve(self.reserved_bytes() + bytes)
    }

    /// The bytes that are reserved.
    fn reserved_bytes(&self) -> usize {
        self.reserved.as_ref().map_or(0, OwnedSemaphorePermit::num_permits) * PERMIT_BYTES
    }

    /// The owner of the conversations that this request may continue: its client key, and its
    /// account at the upstream.
    pub(crate) fn tenant(&self) -> String {
        format!("{} {}", self.state.account(&self.headers), self.caller.name)
    }

    /// Turns a body into a request: fetches and reads its images, within the body budget and the
    /// deadline.
    pub(crate) async fn prepare(&mut self, mut body: Body) -> Result<Request, ApiError> {
        let settings = &self.state.settings;
        let is_fetched = self.mode == Mode::Enforce && settings.image_urls == ImageUrls::Fetch;
        if self.has_answer && is_fetched && body.remote_images().iter().any(|url| is_remote(url)) {
            let message = "an image is named by its URL, and the guard can't know what the model \
                           saw there. Call the hook before the model, send data URLs, or set \
                           gateway.image_urls = \"pass\"";
            return Err(ApiError::bad_request("image_url_refused", message));
        }
        let (state, started, reserved_bytes) =
            (Arc::clone(&self.state), self.deadline_start, self.reserved_bytes());
        let prepared = state.prepare(body, |fetched| self.reserve(reserved_bytes + fetched));
        in_time(&state, started, prepared).await
    }

    /// Drops all headers but the known ones and those that the operator lists. Others can make
    /// servers take bodies, caches or models from elsewhere.
    pub(crate) fn keep_known_headers(&mut self) {
        let listed = &self.state.settings.pass_headers;
        let is_kept = |name: &HeaderName| {
            is_known_header(name)
                || name.as_str().starts_with("x-ecso-")
                || listed.iter().any(|listed| listed.eq_ignore_ascii_case(name.as_str()))
        };
        let headers = std::mem::take(&mut self.headers).into_iter();
        // Only the first of several values comes with its name.
        let mut last = None;
        for (name, value) in headers {
            let name = name.or_else(|| last.clone());
            last.clone_from(&name);
            if let Some(name) = name.filter(is_kept) {
                self.headers.append(name, value);
            }
        }
    }

    /// Drops the headers that say who asks, and with which account.
    pub(crate) fn remove_credentials(&mut self) {
        for name in CREDENTIAL_HEADERS {
            self.headers.remove(name);
        }
    }

    /// Moves the client's key to the header in which chats have it; Messages have another one.
    pub(crate) fn use_bearer_key(&mut self) {
        if let Some(key) = self.headers.remove(API_KEY)
            && !self.headers.contains_key(header::AUTHORIZATION)
            && let Ok(key) = HeaderValue::try_from([b"Bearer ", key.as_bytes()].concat())
        {
            self.headers.insert(header::AUTHORIZATION, key);
        }
    }

    /// Declares the body to be JSON.
    pub(crate) fn set_json(&mut self) {
        self.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }

    /// Reads a body of up to `limits.body` bytes, within the body budget.
    pub(crate) async fn read(&mut self, body: axum::body::Body) -> Result<Bytes, ApiError> {
        let limits = self.state.settings.limits;
        let too_long = || {
            let message = format!("the body has more than {} bytes", limits.body);
            ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
        };
        let declared = self
            .headers
            .get(header::CONTENT_LENGTH)
            .and_then(|length| length.to_str().ok()?.parse().ok());
        if declared.is_some_and(|length: usize| length > limits.body) {
            return Err(too_long());
        }
        let (mut whole, mut chunks) = (BytesMut::new(), body.into_data_stream());
        loop {
            let time_left = limits.deadline().saturating_sub(self.deadline_start.elapsed());
            let next = tokio::time::timeout(limits.patience().min(time_left), chunks.next())
                .await
                .map_err(|_| body_timeout())?;
            let Some(chunk) = next else { break };
            let chunk = chunk
                .map_err(|_| ApiError::bad_request("invalid_request", "the body broke off"))?;
            if whole.len() + chunk.len() > limits.body {
                return Err(too_long());
            }
            self.reserve(whole.len() + chunk.len())?;
            whole.extend_from_slice(&chunk);
        }
        Ok(whole.freeze())
    }

    /// The request's body for the upstream, chunk by chunk. It isn't read here.
    pub(crate) fn stream_body(&self, body: axum::body::Body) -> reqwest::Body {
        reqwest::Body::wrap_stream(with_idle_timeout(
            body.into_data_stream(),
            self.state.settings.limits.patience(),
        ))
    }

    /// Forwards the request with this body, and its answer, unguarded. The answer must begin before
    /// the deadline, and must not pause for longer than that.
    pub(crate) async fn forward(
        &self,
        transport: &Transport,
        credentials: Credentials,
        method: &Method,
        path: &str,
        body: impl Into<reqwest::Body>,
    ) -> Result<Response<axum::body::Body>, ApiError> {
        let sent = transport.forward(Outgoing {
            credentials,
            method: method.clone(),
            path_and_query: path,
            headers: &self.headers,
            body: body.into(),
            bodies: Bodies::AsSent,
        });
        Ok(relay(self.in_time(sent).await?, self.state.settings.limits.deadline()))
    }

    /// Forwards a POST request with the operator's credentials, unguarded.
    pub(crate) async fn forward_post(
        &self,
        transport: &Transport,
        path: &str,
        body: impl Into<reqwest::Body>,
    ) -> Result<Response<axum::body::Body>, ApiError> {
        self.forward(transport, Credentials::Operator, &Method::POST, path, body).await
    }

    /// How long a stream may take to write. A client that stops reading holds its turn no longer.
    pub(crate) fn longest_stream(&self) -> Duration {
        self.time_left() + self.state.settings.limits.patience()
    }

    /// Runs `work` until the request's deadline.
    pub(crate) async fn in_time<T>(
        &self,
        work: impl Future<Output = Result<T, ApiError>>,
    ) -> Result<T, ApiError> {
        in_time(&self.state, self.deadline_start, work).await
    }

    /// Restarts the deadline: from here on no client waits.
    pub(crate) fn restart_deadline(&mut self) {
        self.deadline_start = Instant::now();
    }

    /// The time until the deadline.
    pub(crate) fn time_left(&self) -> Duration {
        self.state.settings.limits.deadline().saturating_sub(self.deadline_start.elapsed())
    }

    /// How the stream of this request goes out. A client may always have it held; it may choose
    /// less only if `mode_header` allows that.
    pub(crate) fn stream_mode(&self) -> Result<Streams, ApiError> {
        let settings = &self.state.settings;
        let mut stream_mode = settings.stream;
        for value in self.headers.get_all("x-ecso-stream") {
            match value.as_bytes() {
                b"hold" => return Ok(Streams::Hold),
                b"windowed" if settings.mode_header => stream_mode = Streams::Windowed,
                b"windowed" => {}
                _ => {
                    return Err(ApiError::bad_request(
                        "invalid_mode",
                        "x-ecso-stream must be `hold` or `windowed`",
                    ));
                }
            }
        }
        Ok(stream_mode)
    }

    /// How much of the steps this client sees.
    pub(crate) fn trace(&self) -> TraceLevel {
        let asked =
            self.headers.get("x-ecso-trace").is_some_and(|value| value == "true" || value == "1");
        if asked { self.state.settings.trace } else { TraceLevel::None }
    }

    /// Starts a record of the findings about `drafts`, by choice.
    pub(crate) fn record<'a>(
        &'a self,
        request: &'a Request,
        drafts: BTreeMap<u64, String>,
    ) -> Record<'a> {
        Record { context: self, request, drafts, report: Mutex::default(), is_finished: false }
    }

    /// Records that a request could not be judged, and why.
    pub(crate) fn record_failure(&self, error: &ApiError) {
        let (report, drafts) = (Report::failed([0], error.code), &BTreeMap::new());
        self.state.metrics.failure(error.code);
        self.write(None, &report, drafts);
    }

    fn write(&self, request: Option<&Request>, report: &Report, drafts: &BTreeMap<u64, String>) {
        let (id, key, mode, started) = (&self.id, &self.caller.name, self.mode, self.started);
        let door = self.carrier.as_ref().map_or(HTTP, |carrier| carrier.door());
        let profile = self.profile.as_deref();
        self.state.record(
            &JudgedRequest { id, door, key, mode, profile, started, request, report, drafts },
            &self.caller,
        );
    }
}

/// The findings about a request. They are written to the log at the end, or when the record is
/// dropped after a verdict.
pub(crate) struct Record<'a> {
    context: &'a RequestContext,
    request: &'a Request,
    drafts: BTreeMap<u64, String>,
    report: Mutex<Report>,
    is_finished: bool,
}

impl Record<'_> {
    /// Adds a finding about a choice.
    pub(crate) fn add(&self, choice: u64, finding: Finding) {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).add(choice, finding);
    }

    /// Records that the guard failed, for one choice or for all, and that the answer goes out
    /// anyway.
    pub(crate) fn failed_open(&self, choice: Option<u64>, why: &'static str) {
        let mut report = self.report.lock().unwrap_or_else(PoisonError::into_inner);
        let failed =
            choice.map_or_else(|| self.drafts.keys().copied().collect(), |choice| vec![choice]);
        for choice in failed {
            report.add(choice, Finding::Failed);
        }
        report.failure = Some(why);
    }

    /// Sets the drafts as far as they are known, and what went out before they were whole.
    pub(crate) fn set_drafts(&mut self, drafts: BTreeMap<u64, String>, early: Option<Early>) {
        self.drafts = drafts;
        self.report.lock().unwrap_or_else(PoisonError::into_inner).early = early;
    }

    /// Records that the guard failed after a verdict.
    pub(crate) fn set_failure(&self, why: &'static str) {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).failure = Some(why);
    }

    /// Whether a verdict holds an answer back.
    pub(crate) fn is_unsafe(&self) -> bool {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).is_unsafe()
    }

    /// Writes everything that was found, and returns it.
    pub(crate) fn finish(mut self) -> Report {
        let report = self.report.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.context.write(Some(self.request), &report, &self.drafts);
        self.is_finished = true;
        report
    }
}

impl Drop for Record<'_> {
    fn drop(&mut self) {
        let mut report = self.report.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if report.early.is_some_and(|early| early.characters > 0)
            && report.findings().next().is_none()
        {
            // What went out was judged; the whole was not.
            report.add(0, Finding::Failed);
        }
        if !self.is_finished && report.findings().next().is_some() {
            report.failure = Some(UNFINISHED);
            self.context.write(Some(self.request), &report, &self.drafts);
        }
    }
}

/// The next chunk of a body did not come in time.
pub(crate) fn body_timeout() -> ApiError {
    ApiError::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", "the body did not come in time")
}

/// Runs `work` until the deadline of a request that `started` then.
async fn in_time<T>(
    state: &AppState,
    started: Instant,
    work: impl Future<Output = Result<T, ApiError>>,
) -> Result<T, ApiError> {
    let limits = &state.settings.limits;
    let time_left = limits.deadline().saturating_sub(started.elapsed());
    tokio::time::timeout(time_left, work)
        .await
        .unwrap_or_else(|_| Err(ApiError::deadline(limits.deadline)))
}

/// If the guard has client keys, the client's key is for the guard and never for the upstream.
fn without_guard_key(settings: &Settings, mut headers: HeaderMap) -> HeaderMap {
    if !settings.keys.is_empty() {
        headers.remove(header::AUTHORIZATION);
        headers.remove(access::API_KEY);
    }
    headers
}

/// A budget for `bytes` of bodies.
pub(crate) fn body_budget(bytes: usize) -> Arc<Semaphore> {
    Arc::new(Semaphore::new(bytes.div_ceil(PERMIT_BYTES).clamp(1, Semaphore::MAX_PERMITS)))
}

/// How long a probe of the upstream may take.
pub(crate) const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
