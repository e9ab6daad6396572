//! One request, from its head to what is written down about it.

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
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{
    access::{self, Caller},
    audit::Case,
    error::ApiError,
    report::{Early, Finding, Report, UNFINISHED},
    request::{Body, Request, is_remote},
    settings::{ImageUrls, Mode, Settings, Streams, TraceLevel},
    state::AppState,
    upstream::{ACCOUNT, Carrier, HTTP, Key, Upstream, Way, is_known_header, passed, unbroken},
};

/// A request that was let in.
pub(crate) struct RequestContext {
    pub(crate) state: Arc<AppState>,
    /// The request's name in answers and logs.
    pub(crate) id: String,
    pub(crate) begun: Instant,
    /// From when on its deadline counts.
    since: Instant,
    pub(crate) caller: Caller,
    /// What is done with it; known once its model is.
    pub(crate) mode: Mode,
    /// For the upstream.
    pub(crate) headers: HeaderMap,
    /// Who carries it to the upstream, where our own client does not.
    carrier: Option<Arc<dyn Carrier>>,
    /// Its answer came with it: the model has seen what it was sent.
    is_answered: bool,
    /// It is judged whatever the profile's scope is.
    pub(crate) is_in_scope: bool,
    /// The name of the profile that it is judged under, where it brings one.
    pub(crate) profile: Option<String>,
    /// The room that its body takes.
    room: Option<OwnedSemaphorePermit>,
    rooms: Arc<Semaphore>,
}

/// Whether a body is UTF-8 for every reader, and not compressed. What kind it is, the upstream is
/// told anew.
pub(crate) fn is_plain(headers: &HeaderMap) -> Result<(), ApiError> {
    let unsupported =
        |code, message: &str| Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, code, message));
    if headers.get_all(header::CONTENT_ENCODING).iter().any(|coding| coding != "identity") {
        return unsupported("unsupported_encoding", "a compressed body can't be guarded");
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

/// Bytes that one permit of `rooms` stands for.
pub(crate) const ROOM: usize = 1024;

impl RequestContext {
    /// Lets a request in: its key, its rate, and where it seems to come from.
    pub(crate) fn begin(
        state: &Arc<AppState>,
        rooms: &Arc<Semaphore>,
        id: &str,
        head: Parts,
    ) -> Result<Self, ApiError> {
        let begun = Instant::now();
        let Parts { method, uri, headers, mut extensions, .. } = head;
        let carrier = extensions.remove::<Arc<dyn Carrier>>();
        let caller = access::caller(&state.settings, &headers)?;
        // Who carries a request has come by a door of its own, and names the upstream's host.
        if state.settings.keys.is_empty() && carrier.is_none() {
            access::is_of_this_machine(&method, &uri, &headers)?;
        }
        state.rates.check(&caller)?;
        let headers = own_key_removed(&state.settings, headers);
        let mode = caller.strictest(&state.settings);
        Ok(Self {
            begun,
            since: begun,
            caller,
            mode,
            headers,
            carrier,
            ..Self::of_page(state, rooms, id)
        })
    }

    /// A request of the page for people: nothing of its head goes on, and it is always guarded.
    pub(crate) fn of_page(state: &Arc<AppState>, rooms: &Arc<Semaphore>, id: &str) -> Self {
        Self {
            state: Arc::clone(state),
            id: id.to_owned(),
            begun: Instant::now(),
            since: Instant::now(),
            caller: Caller::playground(),
            mode: Mode::Enforce,
            headers: HeaderMap::new(),
            carrier: None,
            is_answered: false,
            is_in_scope: false,
            profile: None,
            room: None,
            rooms: Arc::clone(rooms),
        }
    }

    /// The same with the answer, which whoever asks the model is given.
    pub(crate) fn answered(self, carrier: Arc<dyn Carrier>) -> Self {
        Self { carrier: Some(carrier), is_answered: true, ..self }
    }

    /// Which requests are guarded, of those that go to this model.
    pub(crate) fn scope(&self, model: Option<&str>) -> Scope {
        if self.is_in_scope { Scope::All } else { self.state.profile(&self.caller, model).scope }
    }

    /// The way of the client's own request to the model; none where the model in this process
    /// answers it.
    pub(crate) fn way(&self) -> Option<Way> {
        match (&self.carrier, &self.state.upstream) {
            (Some(carrier), _) => Some(Way::Carried(Arc::clone(carrier))),
            (None, Upstream::Server(server)) => Some(Way::Own(Arc::clone(server))),
            (None, Upstream::Engine(_)) => None,
        }
    }

    /// Takes room for `bytes` more, or as much as is there already.
    fn hold(&mut self, bytes: usize) -> Result<(), ApiError> {
        let held = self.room.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let more = u32::try_from(bytes.div_ceil(ROOM).saturating_sub(held)).ok();
        let more = more.and_then(|more| Arc::clone(&self.rooms).try_acquire_many_owned(more).ok());
        let more = more.ok_or_else(ApiError::full)?;
        match &mut self.room {
            Some(room) => room.merge(more),
            None => self.room = Some(more),
        }
        Ok(())
    }

    /// Takes room for `bytes` beside what is held.
    pub(crate) fn hold_more(&mut self, bytes: usize) -> Result<(), ApiError> {
        self.hold(self.held() + bytes)
    }

    /// Bytes for which room is taken.
    fn held(&self) -> usize {
        self.room.as_ref().map_or(0, OwnedSemaphorePermit::num_permits) * ROOM
    }

    /// Whose conversations this request may go on from: those of its key, and of its account at the
    /// upstream.
    pub(crate) fn tenant(&self) -> String {
        format!("{} {}", self.state.account(&self.headers), self.caller.name)
    }

    /// The request of a body: its images got and read, as far as there is room for them, before the
    /// deadline.
    pub(crate) async fn prepare(&mut self, mut body: Body) -> Result<Request, ApiError> {
        let settings = &self.state.settings;
        let is_fetched = self.mode == Mode::Enforce && settings.image_urls == ImageUrls::Fetch;
        if self.is_answered && is_fetched && body.remote_images().iter().any(|url| is_remote(url)) {
            let message = "an image is named by its URL: what the model saw there is not known here. Have the hook see the request \
                           before the model does, send data URLs, or set gateway.image_urls = \"pass\"";
            return Err(ApiError::bad_request("image_url_refused", message));
        }
        let (state, begun, held) = (Arc::clone(&self.state), self.since, self.held());
        let prepared = state.prepare(body, |fetched| self.hold(held + fetched));
        in_time(&state, begun, prepared).await
    }

    /// From here on the request has only headers that are known or that the operator lists. By
    /// others some servers take bodies, caches or models from elsewhere.
    pub(crate) fn guarded(&mut self) {
        let listed = &self.state.settings.pass_headers;
        let is_kept = |name: &HeaderName| {
            is_known_header(name)
                || name.as_str().starts_with("x-ecso-")
                || listed.iter().any(|listed| listed.eq_ignore_ascii_case(name.as_str()))
        };
        let headers = std::mem::take(&mut self.headers).into_iter();
        // Of several values of one name only the first comes with it.
        let mut last = None;
        for (name, value) in headers {
            let name = name.or_else(|| last.clone());
            last.clone_from(&name);
            if let Some(name) = name.filter(is_kept) {
                self.headers.append(name, value);
            }
        }
    }

    /// From here on nothing goes with the request that says who asks, or by which account.
    pub(crate) fn without_keys(&mut self) {
        for name in ACCOUNT {
            self.headers.remove(name);
        }
    }

    /// What was read as JSON goes on as JSON.
    pub(crate) fn as_json(&mut self) {
        self.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }

    /// A body, up to `limits.body` bytes, while there is room for it.
    pub(crate) async fn read(&mut self, body: axum::body::Body) -> Result<Bytes, ApiError> {
        let limits = self.state.settings.limits;
        let too_long = || {
            let message = format!("the body has more than {} bytes", limits.body);
            ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
        };
        let told = self
            .headers
            .get(header::CONTENT_LENGTH)
            .and_then(|length| length.to_str().ok()?.parse().ok());
        if told.is_some_and(|told: usize| told > limits.body) {
            return Err(too_long());
        }
        let (mut whole, mut pieces) = (BytesMut::new(), body.into_data_stream());
        loop {
            let left = limits.deadline().saturating_sub(self.since.elapsed());
            let next = tokio::time::timeout(limits.patience().min(left), pieces.next())
                .await
                .map_err(|_| late())?;
            let Some(piece) = next else { break };
            let piece = piece
                .map_err(|_| ApiError::bad_request("invalid_request", "the body broke off"))?;
            if whole.len() + piece.len() > limits.body {
                return Err(too_long());
            }
            self.hold(whole.len() + piece.len())?;
            whole.extend_from_slice(&piece);
        }
        Ok(whole.freeze())
    }

    /// The request's body for the upstream, piece by piece: nobody reads it here.
    pub(crate) fn flowing(&self, body: axum::body::Body) -> reqwest::Body {
        reqwest::Body::wrap_stream(unbroken(
            body.into_data_stream(),
            self.state.settings.limits.patience(),
        ))
    }

    /// Sends the request on with this body, and its answer back, unguarded. The answer begins
    /// before the deadline, and is never silent for as long as that.
    pub(crate) async fn pass(
        &self,
        way: &Way,
        key: Key,
        method: &Method,
        path: &str,
        body: impl Into<reqwest::Body>,
    ) -> Result<Response<axum::body::Body>, ApiError> {
        let sent =
            way.forward(key, method.clone(), path, &self.headers, body.into(), Bodies::AsSent);
        Ok(passed(self.in_time(sent).await?, self.state.settings.limits.deadline()))
    }

    /// What takes until the request's deadline, and no longer.
    pub(crate) async fn in_time<T>(
        &self,
        work: impl Future<Output = Result<T, ApiError>>,
    ) -> Result<T, ApiError> {
        in_time(&self.state, self.since, work).await
    }

    /// Its deadline counts anew: nobody waits for what is done from here on.
    pub(crate) fn unhurried(&mut self) {
        self.since = Instant::now();
    }

    /// How long the request has until its deadline.
    pub(crate) fn left(&self) -> Duration {
        self.state.settings.limits.deadline().saturating_sub(self.since.elapsed())
    }

    /// How the stream of this request goes out. A client may always have it held, and have less
    /// only where its wishes are obeyed.
    pub(crate) fn streams(&self) -> Result<Streams, ApiError> {
        let settings = &self.state.settings;
        let mut streams = settings.stream;
        for wish in self.headers.get_all("x-ecso-stream") {
            match wish.as_bytes() {
                b"hold" => return Ok(Streams::Hold),
                b"windowed" if settings.mode_header => streams = Streams::Windowed,
                b"windowed" => {}
                _ => {
                    return Err(ApiError::bad_request(
                        "invalid_mode",
                        "x-ecso-stream is hold or windowed",
                    ));
                }
            }
        }
        Ok(streams)
    }

    /// How much of the steps this client sees.
    pub(crate) fn trace(&self) -> TraceLevel {
        let asked =
            self.headers.get("x-ecso-trace").is_some_and(|value| value == "true" || value == "1");
        if asked { self.state.settings.trace } else { TraceLevel::None }
    }

    /// Begins to write down what is found about `drafts`, by choice.
    pub(crate) fn record<'a>(
        &'a self,
        request: &'a Request,
        drafts: BTreeMap<u64, String>,
    ) -> Record<'a> {
        Record { context: self, request, drafts, report: Mutex::default(), is_written: false }
    }

    /// Writes down that a request could not be judged, and why.
    pub(crate) fn unjudged(&self, why: &ApiError) {
        let (report, drafts) = (Report::failed([0], why.code), &BTreeMap::new());
        self.state.metrics.failure(why.code);
        self.write(None, &report, drafts);
    }

    fn write(&self, request: Option<&Request>, report: &Report, drafts: &BTreeMap<u64, String>) {
        let (id, key, mode, begun) = (&self.id, &self.caller.name, self.mode, self.begun);
        let door = self.carrier.as_ref().map_or(HTTP, |carrier| carrier.door());
        let profile = self.profile.as_deref();
        self.state.record(
            &Case { id, door, key, mode, profile, begun, request, report, drafts },
            &self.caller,
        );
    }
}

/// What is found about a request: written down at its end, or wherever it breaks off once a verdict
/// has fallen.
pub(crate) struct Record<'a> {
    context: &'a RequestContext,
    request: &'a Request,
    drafts: BTreeMap<u64, String>,
    report: Mutex<Report>,
    is_written: bool,
}

impl Record<'_> {
    /// Adds what is known of a choice.
    pub(crate) fn add(&self, choice: u64, finding: Finding) {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).add(choice, finding);
    }

    /// That the guard failed, on all choices or on one, and the answer goes out all the same.
    pub(crate) fn opened(&self, choice: Option<u64>, why: &'static str) {
        let mut report = self.report.lock().unwrap_or_else(PoisonError::into_inner);
        let failed =
            choice.map_or_else(|| self.drafts.keys().copied().collect(), |choice| vec![choice]);
        for choice in failed {
            report.add(choice, Finding::Failed);
        }
        report.failure = Some(why);
    }

    /// The drafts, as far as they are known, and what of them went out before they were whole.
    pub(crate) fn drafted(&mut self, drafts: BTreeMap<u64, String>, early: Option<Early>) {
        self.drafts = drafts;
        self.report.lock().unwrap_or_else(PoisonError::into_inner).early = early;
    }

    /// That the guard failed behind a verdict.
    pub(crate) fn failed(&self, why: &'static str) {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).failure = Some(why);
    }

    /// Whether a verdict has fallen that holds an answer back.
    pub(crate) fn is_unsafe(&self) -> bool {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).is_unsafe()
    }

    /// The end: all that was found, written down.
    pub(crate) fn written(mut self) -> Report {
        let report = self.report.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.context.write(Some(self.request), &report, &self.drafts);
        self.is_written = true;
        report
    }
}

impl Drop for Record<'_> {
    fn drop(&mut self) {
        let mut report = self.report.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if report.early.is_some_and(|early| early.characters > 0)
            && report.findings().next().is_none()
        {
            // What is out was judged; the whole was not.
            report.add(0, Finding::Failed);
        }
        if !self.is_written && report.findings().next().is_some() {
            report.failure = Some(UNFINISHED);
            self.context.write(Some(self.request), &report, &self.drafts);
        }
    }
}

/// A body whose next piece did not come.
pub(crate) fn late() -> ApiError {
    ApiError::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", "the body did not come in time")
}

/// What takes until the deadline of a request that has `begun`, and no longer.
async fn in_time<T>(
    state: &AppState,
    begun: Instant,
    work: impl Future<Output = Result<T, ApiError>>,
) -> Result<T, ApiError> {
    let limits = &state.settings.limits;
    let left = limits.deadline().saturating_sub(begun.elapsed());
    tokio::time::timeout(left, work)
        .await
        .unwrap_or_else(|_| Err(ApiError::deadline(limits.deadline)))
}

/// With keys of our own, a client's key is ours and never the upstream's business.
fn own_key_removed(settings: &Settings, mut headers: HeaderMap) -> HeaderMap {
    if !settings.keys.is_empty() {
        headers.remove(header::AUTHORIZATION);
        headers.remove(access::API_KEY);
    }
    headers
}

/// Room for `bytes` of bodies.
pub(crate) fn rooms(bytes: usize) -> Arc<Semaphore> {
    Arc::new(Semaphore::new(bytes.div_ceil(ROOM).clamp(1, Semaphore::MAX_PERMITS)))
}

/// How long a quick question may take.
pub(crate) const QUICK: Duration = Duration::from_secs(2);
