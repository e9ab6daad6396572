//! The CORS headers of our own answers. The upstream decides which pages may read answers; what it
//! says about a page also applies to our answers to that page, errors included.

use std::{
    num::NonZeroUsize,
    sync::{Arc, Mutex, PoisonError},
};

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, header},
    middleware::Next,
    response::Response,
};
use lru::LruCache;

/// How many pages are remembered.
const PAGES: NonZeroUsize = NonZeroUsize::new(256).unwrap();

/// The upstream's CORS headers for pages, by their origin.
#[derive(Debug)]
pub(crate) struct Cors(Mutex<LruCache<HeaderValue, HeaderMap>>);

impl Default for Cors {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(PAGES)))
    }
}

fn is_cors(name: &HeaderName) -> bool {
    name.as_str().starts_with("access-control-") || *name == header::VARY
}

/// Remembers the CORS headers of an answer, or adds them to an answer that has none.
pub(crate) async fn share_cors(
    State(cors): State<Arc<Cors>>,
    request: Request,
    next: Next,
) -> Response {
    let Some(origin) = request.headers().get(header::ORIGIN).cloned() else {
        return next.run(request).await;
    };
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    let mut known = cors.0.lock().unwrap_or_else(PoisonError::into_inner);
    if headers.contains_key(header::ACCESS_CONTROL_ALLOW_ORIGIN) {
        let learned = headers
            .iter()
            .filter(|(name, _)| is_cors(name))
            .map(|(name, value)| (name.clone(), value.clone()));
        known.put(origin, learned.collect());
    } else if let Some(learned) = known.get(&origin) {
        headers.extend(learned.clone());
    }
    drop(known);
    response
}
