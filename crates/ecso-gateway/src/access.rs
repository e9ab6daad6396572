//! Who calls, and how many at once.

use std::{
    collections::HashMap,
    fmt::Write as _,
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use axum::http::{HeaderMap, StatusCode, header};
use governor::{
    DefaultDirectRateLimiter, Quota, RateLimiter,
    clock::{Clock, DefaultClock},
};
use sha2::{Digest, Sha256};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{
    failure::Failure,
    settings::{Mode, Settings},
};

/// A client that was let in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Caller {
    /// The name of its key; empty where nobody needs one.
    pub(crate) name: String,
    mode: Option<Mode>,
}

/// The bearer token of a request.
pub(crate) fn token(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// Checks the key of a request. Keys are compared by their hashes: how long that takes tells nothing about the key.
pub(crate) fn caller(settings: &Settings, headers: &HeaderMap) -> Result<Caller, Failure> {
    if settings.keys.is_empty() {
        return Ok(Caller { name: String::new(), mode: None });
    }
    let refused = |message| Failure::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message);
    let token = token(headers).ok_or_else(|| refused("this server takes a key: Authorization: Bearer KEY"))?;
    let digest = hash(token);
    let known = settings.keys.iter().find(|(_, key)| key.sha256.eq_ignore_ascii_case(&digest));
    let (name, key) = known.ok_or_else(|| refused("this key is not known here"))?;
    Ok(Caller { name: name.clone(), mode: key.mode })
}

/// A key as it stands in settings.
pub(crate) fn hash(key: &str) -> String {
    Sha256::digest(key).iter().fold(String::new(), |mut digits, byte| {
        let _ = write!(digits, "{byte:02x}");
        digits
    })
}

impl Caller {
    /// What is done with a request: by its header if that is allowed, by key, by model, in general.
    pub(crate) fn mode(&self, settings: &Settings, model: &str, headers: &HeaderMap) -> Result<Mode, Failure> {
        if let Some(wish) = headers.get("x-ecso-mode").filter(|_| settings.mode_header) {
            return match wish.as_bytes() {
                b"enforce" => Ok(Mode::Enforce),
                b"observe" => Ok(Mode::Observe),
                b"off" => Ok(Mode::Off),
                _ => Err(Failure::bad_request("invalid_mode", "x-ecso-mode is enforce, observe or off")),
            };
        }
        Ok(self.mode.or_else(|| settings.modes.get(model).copied()).unwrap_or(settings.mode))
    }

    /// Whether nothing that this caller sends needs to be looked at.
    pub(crate) fn is_never_guarded(&self, settings: &Settings) -> bool {
        let general = self.mode.map_or_else(
            || settings.mode == Mode::Off && settings.modes.values().all(|mode| *mode == Mode::Off),
            |mode| mode == Mode::Off,
        );
        general && !settings.mode_header
    }
}

/// How often each client may ask.
#[derive(Debug, Default)]
pub(crate) struct Rates(HashMap<String, DefaultDirectRateLimiter>);

impl Rates {
    /// One limiter for each key that has a bound; without keys, one for all.
    pub(crate) fn new(settings: &Settings) -> Self {
        let nobody = settings.keys.is_empty().then(|| (String::new(), None));
        let keys = settings.keys.iter().map(|(name, key)| (name.clone(), key.per_minute));
        let bounds = keys.chain(nobody).filter_map(|(name, own)| {
            let bound = NonZeroU32::new(own.unwrap_or(settings.limits.per_minute))?;
            Some((name, RateLimiter::direct(Quota::per_minute(bound))))
        });
        Self(bounds.collect())
    }

    /// Counts a request.
    pub(crate) fn check(&self, caller: &Caller) -> Result<(), Failure> {
        let Some(limiter) = self.0.get(&caller.name) else { return Ok(()) };
        limiter.check().map_err(|early| {
            let wait = early.wait_time_from(DefaultClock::default().now());
            let failure = Failure::new(StatusCode::TOO_MANY_REQUESTS, "rate_limited", "this key asks too often");
            Failure { retry_after: Some(wait), ..failure }
        })
    }
}

/// Lets so many guarded requests run, so many wait, and no more.
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
        (self.at_once.saturating_sub(self.permits.available_permits()), self.waiting.load(Ordering::Relaxed))
    }

    /// Waits for a turn; whoever goes away while waiting loses the place.
    pub(crate) async fn enter(&self) -> Result<OwnedSemaphorePermit, Failure> {
        if let Ok(permit) = Arc::clone(&self.permits).try_acquire_owned() {
            return Ok(permit);
        }
        let place = Place::take(self)?;
        let permit = Arc::clone(&self.permits).acquire_owned().await;
        drop(place);
        permit.map_err(|_| Failure::busy())
    }
}

/// A place in the queue.
struct Place<'a>(&'a AtomicUsize);

impl<'a> Place<'a> {
    fn take(admission: &'a Admission) -> Result<Self, Failure> {
        let before = admission.waiting.fetch_add(1, Ordering::AcqRel);
        let place = Self(&admission.waiting);
        if before < admission.queue { Ok(place) } else { Err(Failure::busy()) }
    }
}

impl Drop for Place<'_> {
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
    fn keys_are_known_by_their_hash_and_choose_a_mode() {
        let mut settings = Settings::default();
        assert_eq!(caller(&settings, &HeaderMap::new()).unwrap().name, "");
        let key = |text: &str, mode| Key { sha256: hash(text), mode, per_minute: None };
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
        assert_eq!(app.mode(&settings, "m", &wish).unwrap(), Mode::Enforce);
        assert_eq!(app.mode(&settings, "watched", &wish).unwrap(), Mode::Observe);
        assert_eq!(research.mode(&settings, "watched", &wish).unwrap(), Mode::Off);
        assert!(research.is_never_guarded(&settings) && !app.is_never_guarded(&settings));
        settings.mode_header = true;
        assert_eq!(app.mode(&settings, "m", &wish).unwrap(), Mode::Off);
        assert!(!research.is_never_guarded(&settings));
    }

    #[tokio::test]
    async fn what_does_not_fit_the_queue_is_sent_away() {
        let admission = Arc::new(Admission::new(1, 1));
        let first = admission.enter().await.unwrap();
        let waiting = Arc::clone(&admission);
        let second = tokio::spawn(async move { waiting.enter().await.map(drop) });
        tokio::task::yield_now().await;
        assert_eq!(admission.enter().await.unwrap_err(), Failure::busy());
        drop(first);
        second.await.unwrap().unwrap();
        assert!(admission.enter().await.is_ok());
    }
}
