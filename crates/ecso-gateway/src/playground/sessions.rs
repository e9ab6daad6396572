//! Who may use the page: browsers that opened the operator's link. Addresses say nothing, because
//! behind a proxy all requests come from this machine.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
};

use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header, uri::Authority};
use tokio::sync::watch;
use url::Url;
use uuid::Uuid;

use crate::{error::ApiError, settings::hash};

/// Maximum number of sessions. Beyond that, the oldest one ends.
const MAX_SESSIONS: usize = 64;

/// The token for the next browser, and the sessions.
pub(super) struct Sessions {
    token: watch::Sender<String>,
    /// The name of the cookie. Cookies don't depend on the port, so each server on a machine uses a
    /// name of its own.
    cookie: String,
    /// Hashes of the session cookies. Comparing hashes reveals nothing by its timing.
    open: Mutex<VecDeque<String>>,
}

/// 244 random bits.
fn secret() -> String {
    format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple())
}

impl Sessions {
    pub(super) fn new() -> Self {
        let cookie = format!("ecso_{}", &Uuid::new_v4().simple().to_string()[..12]);
        Self { token: watch::Sender::new(secret()), cookie, open: Mutex::default() }
    }

    pub(super) fn tokens(&self) -> watch::Receiver<String> {
        self.token.subscribe()
    }

    /// Whether a token would open a session.
    pub(super) fn accepts(&self, token: &str) -> bool {
        hash(&self.token.borrow()) == hash(token)
    }

    /// Uses up a token, and opens a session. Returns the cookie for the browser that sent it.
    pub(super) fn open(&self, token: &str) -> Option<HeaderValue> {
        let sent = hash(token);
        let is_match = self.token.send_if_modified(|token| {
            let is_match = hash(token) == sent;
            if is_match {
                *token = secret();
            }
            is_match
        });
        if !is_match {
            return None;
        }
        let session = secret();
        let mut sessions = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if sessions.len() == MAX_SESSIONS {
            sessions.pop_front();
        }
        sessions.push_back(hash(&session));
        HeaderValue::try_from(format!(
            "{}={session}; Path=/; HttpOnly; SameSite=Strict",
            self.cookie
        ))
        .ok()
    }

    /// Whether a request has the cookie of a session.
    pub(super) fn knows(&self, headers: &HeaderMap) -> bool {
        let cookies =
            headers.get_all(header::COOKIE).iter().filter_map(|cookies| cookies.to_str().ok());
        let pairs = cookies
            .flat_map(|cookies| cookies.split(';'))
            .filter_map(|pair| pair.trim().split_once('='));
        let sent: Vec<String> =
            pairs.filter(|(name, _)| *name == self.cookie).map(|(_, value)| hash(value)).collect();
        let sessions = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.iter().any(|session| sent.contains(session))
    }

    /// Accepts requests of the page itself, from a browser with a session. Other pages on this
    /// machine share the cookie, so the headers that browsers send about the calling page are
    /// checked too.
    pub(super) fn check(&self, method: &Method, headers: &HeaderMap) -> Result<(), ApiError> {
        if !self.knows(headers) {
            let message =
                "open the playground with the link that the server printed; each link works once";
            return Err(ApiError::new(StatusCode::UNAUTHORIZED, "playground_closed", message));
        }
        let is_own = match headers.get("sec-fetch-site") {
            Some(site) => site == "same-origin",
            None => *method == Method::GET || is_own_origin(headers),
        };
        if !is_own {
            let message = "this request came from another page than the playground";
            return Err(ApiError::new(StatusCode::FORBIDDEN, "wrong_origin", message));
        }
        Ok(())
    }
}

/// Whether the calling page has the origin of the requested host.
fn is_own_origin(headers: &HeaderMap) -> bool {
    let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    let (Some(origin), Some(host)) = (text(header::ORIGIN), text(header::HOST)) else {
        return false;
    };
    let (Ok(origin), Ok(host)) = (origin.parse::<Url>(), host.parse::<Authority>()) else {
        return false;
    };
    let port = host
        .port_u16()
        .or_else(|| Url::parse(&format!("{}://x", origin.scheme())).ok()?.port_or_known_default());
    origin.host_str().is_some_and(|name| name.eq_ignore_ascii_case(host.host()))
        && origin.port_or_known_default() == port
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn a_token_works_once_and_is_replaced() {
        let sessions = Sessions::new();
        let mut tokens = sessions.tokens();
        let token = tokens.borrow_and_update().clone();
        assert!(
            sessions.open("wrong").is_none()
                && sessions.open("").is_none()
                && !tokens.has_changed().unwrap()
        );
        assert!(sessions.accepts(&token) && !sessions.accepts("wrong"));
        let cookie = sessions.open(&token).unwrap();
        let cookie = cookie.to_str().unwrap();
        assert!(cookie.ends_with("; Path=/; HttpOnly; SameSite=Strict"), "{cookie}");
        assert!(sessions.open(&token).is_none() && !sessions.accepts(&token));
        assert!(tokens.has_changed().unwrap());
        let value = cookie.split(';').next().unwrap();
        assert!(sessions.knows(&headers(&[("cookie", &format!("a=b; {value}; c=d"))])));
        let (name, secret) = value.split_once('=').unwrap();
        let (short, hashed) =
            (format!("{name}={}", &secret[1..]), format!("{name}={}", hash(secret)));
        for wrong in ["", name, &format!("other={secret}"), &short, &hashed] {
            assert!(!sessions.knows(&headers(&[("cookie", wrong)])), "{wrong}");
        }
    }

    #[test]
    fn the_oldest_session_ends_when_there_are_too_many() {
        let sessions = Sessions::new();
        let mut cookies = Vec::new();
        for _ in 0..=MAX_SESSIONS {
            let token = sessions.tokens().borrow().clone();
            cookies.push(sessions.open(&token).unwrap().to_str().unwrap().to_owned());
        }
        let is_in = |cookie: &str| {
            sessions.knows(&headers(&[("cookie", cookie.split(';').next().unwrap())]))
        };
        assert!(!is_in(&cookies[0]) && cookies[1..].iter().all(|cookie| is_in(cookie)));
    }

    #[test]
    fn an_origin_is_matchs_host_and_port() {
        let own = |origin: &str, host: &str| {
            is_own_origin(&headers(&[("origin", origin), ("host", host)]))
        };
        for (origin, host) in [
            ("http://127.0.0.1:8080", "127.0.0.1:8080"),
            ("http://[::1]:8080", "[::1]:8080"),
            ("https://guard.example", "guard.example"),
            ("https://guard.example", "guard.example:443"),
            ("http://localhost", "localhost"),
        ] {
            assert!(own(origin, host), "{origin} {host}");
        }
        for (origin, host) in [
            ("http://127.0.0.1:9090", "127.0.0.1:8080"),
            ("http://localhost:8080", "127.0.0.1:8080"),
            ("http://guard.example:8080", "guard.example"),
            ("http://evil.example", "guard.example"),
            ("http://guard.example@evil.example", "guard.example"),
            ("null", "guard.example"),
            ("", ""),
        ] {
            assert!(!own(origin, host), "{origin} {host}");
        }
        assert!(
            !is_own_origin(&headers(&[("host", "a")]))
                && !is_own_origin(&headers(&[("origin", "http://a")]))
        );
    }
}
