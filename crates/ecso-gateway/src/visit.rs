//! A request that was let in, with its body: what the doors that judge on demand begin with.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    body::Body,
    http::{HeaderMap, StatusCode, header},
};
use bytes::Bytes;

use crate::{
    access::{self, Caller},
    failure::Failure,
    live::Live,
    settings::Settings,
};

/// A request that was let in.
pub(crate) struct Visit {
    pub(crate) live: Arc<Live>,
    /// The request's name.
    pub(crate) id: String,
    pub(crate) begun: Instant,
    pub(crate) caller: Caller,
    /// For the upstream.
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Visit {
    /// Checks key and rate, and reads the body.
    pub(crate) async fn begin(live: Arc<Live>, id: String, request: axum::extract::Request) -> Result<Self, Failure> {
        let begun = Instant::now();
        let (head, body) = request.into_parts();
        let caller = access::caller(&live.settings, &head.headers)?;
        live.rates.check(&caller)?;
        let headers = own_key_removed(&live.settings, head.headers);
        let limits = &live.settings.limits;
        let body = read(body, limits.body, limits.deadline()).await?;
        Ok(Self { live, id, begun, caller, headers, body })
    }
}

/// With keys of our own, a client's key is ours and never the upstream's business.
pub(crate) fn own_key_removed(settings: &Settings, mut headers: HeaderMap) -> HeaderMap {
    if !settings.keys.is_empty() {
        headers.remove(header::AUTHORIZATION);
    }
    headers
}

/// A body, up to `longest` bytes.
pub(crate) async fn read(body: Body, longest: usize, patience: Duration) -> Result<Bytes, Failure> {
    let too_long = || {
        let message = format!("the body has more than {longest} bytes, or it broke off");
        Failure::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
    };
    let read = tokio::time::timeout(patience, axum::body::to_bytes(body, longest)).await;
    let timeout = || Failure::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", "the body did not come in time");
    read.map_err(|_| timeout())?.map_err(|_| too_long())
}
