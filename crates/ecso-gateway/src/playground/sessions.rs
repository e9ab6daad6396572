//! Who may use the page: a browser that was opened with a link of the operator's. Addresses tell
//! nothing, as behind a proxy everybody comes from this machine.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
};

use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header, uri::Authority};
use tokio::sync::watch;
use url::Url;
use uuid::Uuid;

use crate::{error::ApiError, settings::hash};

/// Browsers that may be in at one time; beyond, the first has to come in again.
const MAX_SESSIONS: usize = 64;

/// The link that lets the next browser in, and the browsers that are in.
pub(super) struct Sessions {
    token: watch::Sender<String>,
    /// The cookie's name. Cookies know no ports: each server on a machine has a name of its own.
    cookie: String,
    /// Hashes of what stands in the cookies of those that are in: how long it takes to compare
    /// these tells nothing about them.
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

    /// Takes a token, which then opens nothing more: the cookie of the browser that brought it, to
    /// be set.
    pub(super) fn open(&self, token: &str) -> Option<HeaderValue> {
        let brought = hash(token);
        let is_it = self.token.send_if_modified(|token| {
            let is_it = hash(token) == brought;
            if is_it {
                *token = secret();
            }
            is_it
        });
        if !is_it {
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

    /// Whether a request's cookie is that of a browser that is in.
    pub(super) fn knows(&self, headers: &HeaderMap) -> bool {
        let cookies =
            headers.get_all(header::COOKIE).iter().filter_map(|cookies| cookies.to_str().ok());
        let pairs = cookies
            .flat_map(|cookies| cookies.split(';'))
            .filter_map(|pair| pair.trim().split_once('='));
        let brought: Vec<String> =
            pairs.filter(|(name, _)| *name == self.cookie).map(|(_, value)| hash(value)).collect();
        let sessions = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.iter().any(|session| brought.contains(session))
    }

    /// Lets in what the page itself asks for, from a browser that is in. Another page in that
    /// browser has the cookie too, where it is of this machine: what browsers say of the page that
    /// asks tells it from ours.
    pub(super) fn check(&self, method: &Method, headers: &HeaderMap) -> Result<(), ApiError> {
        if !self.knows(headers) {
            let message = "the playground opens by the link that is printed where the server runs; each link works once";
            return Err(ApiError::new(StatusCode::UNAUTHORIZED, "playground_closed", message));
        }
        let is_own = match headers.get("sec-fetch-site") {
            Some(site) => site == "same-origin",
            None => *method == Method::GET || is_own_origin(headers),
        };
        if !is_own {
            let message = "this was asked by another page than the playground";
            return Err(ApiError::new(StatusCode::FORBIDDEN, "wrong_origin", message));
        }
        Ok(())
    }
}

/// Whether the page that asks is of the host that is asked.
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
    fn a_link_works_once_and_the_next_is_told() {
        let sessions = Sessions::new();
        let mut tokens = sessions.tokens();
        let token = tokens.borrow_and_update().clone();
        assert!(
            sessions.open("wrong").is_none()
                && sessions.open("").is_none()
                && !tokens.has_changed().unwrap()
        );
        let cookie = sessions.open(&token).unwrap();
        let cookie = cookie.to_str().unwrap();
        assert!(cookie.ends_with("; Path=/; HttpOnly; SameSite=Strict"), "{cookie}");
        assert!(sessions.open(&token).is_none());
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
    fn those_who_came_first_make_room() {
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
    fn an_origin_is_its_host_and_port() {
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
