//! Who calls, and how many requests run at once.

use std::{
    collections::HashMap,
    net::IpAddr,
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use axum::http::{HeaderMap, Method, StatusCode, Uri, header, uri::Authority};
use governor::{
    DefaultDirectRateLimiter, Quota, RateLimiter,
    clock::{Clock, DefaultClock},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{
    error::ApiError,
    settings::{Mode, Settings, hash},
};

/// A client that was admitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Caller {
    /// The name of its key; empty if no keys are needed.
    pub(crate) name: String,
    mode: Option<Mode>,
    /// The name of its profile.
    pub(crate) profile: Option<String>,
}

/// Anthropic's header for keys.
pub(crate) const API_KEY: &str = "x-api-key";

/// The key of a request: its bearer token, or else the value of Anthropic's header.
pub(crate) fn token(headers: &HeaderMap) -> Option<&str> {
    let Some(value) = headers.get(header::AUTHORIZATION) else {
        return headers.get(API_KEY)?.to_str().ok();
    };
    let value = value.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// Checks the key of a request. Keys are compared by their hashes, so the time it takes reveals
/// nothing about a key.
pub(crate) fn caller(settings: &Settings, headers: &HeaderMap) -> Result<Caller, ApiError> {
    if settings.keys.is_empty() {
        return Ok(Caller { name: String::new(), mode: None, profile: None });
    }
    let refused = |message| ApiError::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message);
    let token = token(headers)
        .ok_or_else(|| refused("this server needs a key: Authorization: Bearer KEY"))?;
    let digest = hash(token);
    let known = settings.keys.iter().find(|(_, key)| key.sha256.eq_ignore_ascii_case(&digest));
    let (name, key) = known.ok_or_else(|| refused("this key is not known to this server"))?;
    Ok(Caller { name: name.clone(), mode: key.mode, profile: key.profile.clone() })
}

/// Without client keys, only this machine may call. A page in a local browser could do so too,
/// through a host name that resolves to this address or through a form; both show in the headers
/// that browsers send.
pub(crate) fn check_local(method: &Method, uri: &Uri, headers: &HeaderMap) -> Result<(), ApiError> {
    let host = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok())
        .or_else(|| uri.authority().map(Authority::as_str));
    let host = host.and_then(|host| host.parse::<Authority>().ok());
    let is_local = host.is_some_and(|host| {
        let name = host.host().trim_matches(['[', ']']);
        name.eq_ignore_ascii_case("localhost")
            || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    });
    if !is_local {
        let message = "without client keys, only requests to 127.0.0.1 and localhost are \
                       answered; make a key with `ecso key NAME`";
        return Err(ApiError::new(StatusCode::FORBIDDEN, "wrong_host", message));
    }
    let mut kinds =
        headers.get_all(header::CONTENT_TYPE).iter().map(|kind| kind.to_str().unwrap_or_default());
    let is_json =
        |kind: &str| kind.trim_start().to_ascii_lowercase().starts_with("application/json");
    let is_json_only = kinds.next().is_some_and(is_json) && kinds.next().is_none();
    let is_read = matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS);
    if headers.contains_key(header::ORIGIN) && !is_read && !is_json_only {
        let message = "pages may only send JSON: set Content-Type: application/json";
        return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_type", message));
    }
    Ok(())
}

impl Caller {
    /// The user of the playground.
    pub(crate) fn playground() -> Self {
        Self { name: "playground".into(), mode: None, profile: None }
    }

    /// The mode of a request: by its header if that is allowed, by key, by model, or the default.
    /// If `modes` does not name the model, it may be another spelling of one that is named
    /// (`vlm:latest`), so the strictest mode applies. That also holds if the model can't be read.
    pub(crate) fn mode(
        &self,
        settings: &Settings,
        model: Option<&str>,
        headers: &HeaderMap,
    ) -> Result<Mode, ApiError> {
        if let Some(header) = headers.get("x-ecso-mode").filter(|_| settings.mode_header) {
            return match header.as_bytes() {
                b"enforce" => Ok(Mode::Enforce),
                b"observe" => Ok(Mode::Observe),
                b"off" => Ok(Mode::Off),
                _ => Err(ApiError::bad_request(
                    "invalid_mode",
                    "x-ecso-mode must be `enforce`, `observe` or `off`",
                )),
            };
        }
        let by_model = model.and_then(|model| settings.modes.get(model).copied());
        Ok(self.mode.or(by_model).unwrap_or_else(|| self.strictest(settings)))
    }

    /// The strictest mode that a request of this caller may have.
    pub(crate) fn strictest(&self, settings: &Settings) -> Mode {
        let of_models = settings.modes.values().copied().fold(settings.mode, Mode::max);
        self.mode.unwrap_or(of_models)
    }

    /// Whether no request of this caller needs to be inspected.
    pub(crate) fn is_never_guarded(&self, settings: &Settings) -> bool {
        self.strictest(settings) == Mode::Off && !settings.mode_header
    }
}

/// Rate limits, by client.
#[derive(Debug, Default)]
pub(crate) struct Rates(HashMap<String, DefaultDirectRateLimiter>);

impl Rates {
    /// One limiter for each key that has a limit, and one for the playground. Without keys, one for
    /// all others.
    pub(crate) fn new(settings: &Settings) -> Self {
        let everyone = settings.keys.is_empty().then(|| (String::new(), None));
        let keys = settings.keys.iter().map(|(name, key)| (name.clone(), key.per_minute));
        // A key of this name, with a limit of its own, comes after it.
        let playground = [(Caller::playground().name, None)];
        let bounds =
            playground.into_iter().chain(keys).chain(everyone).filter_map(|(name, own)| {
                let bound = NonZeroU32::new(own.unwrap_or(settings.limits.per_minute))?;
                Some((name, RateLimiter::direct(Quota::per_minute(bound))))
            });
        Self(bounds.collect())
    }

    /// Counts a request.
    pub(crate) fn check(&self, caller: &Caller) -> Result<(), ApiError> {
        let Some(limiter) = self.0.get(&caller.name) else { return Ok(()) };
        limiter.check().map_err(|early| {
            let wait = early.wait_time_from(DefaultClock::default().now());
            let failure = ApiError::new(
                StatusCode::TOO_MANY_REQUESTS,
                "rate_limited",
                "this key is over its rate limit",
            );
            ApiError { retry_after: Some(wait), ..failure }
        })
    }
}

/// Limits how many guarded requests run, and how many wait.
#[derive(Debug)]
pub(crate) struct Admission {
    permits: Arc<Semaphore>,
    at_once: usize,
    waiting: AtomicUsize,
    queue: usize,
}

impl Admission {
    pub(crate) fn new(at_once: usize, queue: usize) -> Self {
        let at_once = at_once.max(1);
        Self { permits: Arc::new(Semaphore::new(at_once)), at_once, waiting: 0.into(), queue }
    }

    /// How many run, and how many wait.
    pub(crate) fn load(&self) -> (usize, usize) {
        (
            self.at_once.saturating_sub(self.permits.available_permits()),
            self.waiting.load(Ordering::Relaxed),
        )
    }

    /// Waits for a turn. A client that leaves gives up its slot in the queue.
    pub(crate) async fn enter(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        if let Ok(permit) = Arc::clone(&self.permits).try_acquire_owned() {
            return Ok(permit);
        }
        let slot = QueueSlot::take(self)?;
        let permit = Arc::clone(&self.permits).acquire_owned().await;
        drop(slot);
        permit.map_err(|_| ApiError::busy())
    }
}

/// A slot in the queue.
struct QueueSlot<'a>(&'a AtomicUsize);

impl<'a> QueueSlot<'a> {
    fn take(admission: &'a Admission) -> Result<Self, ApiError> {
        let before = admission.waiting.fetch_add(1, Ordering::AcqRel);
        let slot = Self(&admission.waiting);
        if before < admission.queue { Ok(slot) } else { Err(ApiError::busy()) }
    }
}

impl Drop for QueueSlot<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::Key;

    fn bearer(token: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::AUTHORIZATION, format!("Bearer {token}").parse().unwrap())])
    }

    #[test]
    fn keys_are_found_by_their_hash_and_choose_a_mode() {
        let mut settings = Settings::default();
        assert_eq!(caller(&settings, &HeaderMap::new()).unwrap().name, "");
        let key =
            |text: &str, mode| Key { sha256: hash(text), mode, per_minute: None, profile: None };
        settings.keys.insert("app".into(), key("secret", None));
        settings.keys.insert("research".into(), key("other", Some(Mode::Off)));
        settings.modes.insert("watched".into(), Mode::Observe);
        let app = caller(&settings, &bearer("secret")).unwrap();
        let research = caller(&settings, &bearer("other")).unwrap();
        assert_eq!((app.name.as_str(), research.name.as_str()), ("app", "research"));
        for headers in [HeaderMap::new(), bearer("wrong"), bearer(&hash("secret"))] {
            assert_eq!(caller(&settings, &headers).unwrap_err().status, StatusCode::UNAUTHORIZED);
        }
        let wish = HeaderMap::from_iter([("x-ecso-mode".parse().unwrap(), "off".parse().unwrap())]);
        assert_eq!(app.mode(&settings, Some("m"), &wish).unwrap(), Mode::Enforce);
        assert_eq!(app.mode(&settings, Some("watched"), &wish).unwrap(), Mode::Observe);
        assert_eq!(research.mode(&settings, Some("watched"), &wish).unwrap(), Mode::Off);
        assert!(research.is_never_guarded(&settings) && !app.is_never_guarded(&settings));
        (settings.mode, settings.mode_header) = (Mode::Off, false);
        for model in [Some("watched:latest"), Some(""), None] {
            assert_eq!(app.mode(&settings, model, &HeaderMap::new()).unwrap(), Mode::Observe);
        }
        settings.mode_header = true;
        assert_eq!(app.mode(&settings, Some("m"), &wish).unwrap(), Mode::Off);
        assert!(!research.is_never_guarded(&settings));
    }

    #[tokio::test]
    async fn a_full_queue_refuses_requests() {
        let admission = Arc::new(Admission::new(1, 1));
        let first = admission.enter().await.unwrap();
        let waiting = Arc::clone(&admission);
        let second = tokio::spawn(async move { waiting.enter().await.map(drop) });
        tokio::task::yield_now().await;
        assert_eq!(admission.enter().await.unwrap_err(), ApiError::busy());
        drop(first);
        second.await.unwrap().unwrap();
        assert!(admission.enter().await.is_ok());
    }
}
