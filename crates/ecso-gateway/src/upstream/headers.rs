//! Which headers go to the upstream, and which come back.

use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use ecso_openai::Bodies;

use super::OWN_CALL;

/// The headers of an upstream's answer that are kept for the answer built from it: rate limits,
/// CORS, and request ids. Others might carry a text.
pub(crate) fn answer_head(headers: &HeaderMap) -> HeaderMap {
    const NAMES: [&str; 5] =
        ["vary", "retry-after", "x-request-id", "request-id", "openai-processing-ms"];
    const PREFIXES: [&str; 5] = [
        "access-control-",
        "x-ratelimit-",
        "ratelimit",
        "anthropic-ratelimit-",
        "x-envoy-ratelimit",
    ];
    let is_known = |name: &HeaderName| {
        NAMES.contains(&name.as_str())
            || PREFIXES.iter().any(|start| name.as_str().starts_with(start))
    };
    // A number, a name, or a list of these is not a sentence.
    let is_list =
        |value: &str| value.split(',').all(|entry| !entry.trim().contains(char::is_whitespace));
    let is_short = |value: &HeaderValue| value.len() <= 512 && value.to_str().is_ok_and(is_list);
    // Seconds; a date is dropped.
    let is_time = |value: &HeaderValue| value.as_bytes().iter().all(u8::is_ascii_digit);
    let fits = |name: &HeaderName, value: &HeaderValue| {
        if *name == header::RETRY_AFTER { is_time(value) } else { is_short(value) }
    };
    let head = headers.iter().filter(|(name, value)| is_known(name) && fits(name, value));
    head.map(|(name, value)| (name.clone(), value.clone())).collect()
}

/// The mark of the guard's own calls, if these headers have it.
pub(super) fn own_call_header(
    headers: &HeaderMap,
) -> impl Iterator<Item = (HeaderName, HeaderValue)> {
    headers.get(OWN_CALL).map(|value| (OWN_CALL, value.clone())).into_iter()
}

/// Whether a client's header names an API version. Guarded requests don't carry it, because they
/// are sent as chats.
pub(super) fn is_version(name: &HeaderName) -> bool {
    ["anthropic-version", "anthropic-beta", "openai-beta"].contains(&name.as_str())
}

/// Whether a client's header is known to say only who asks, and in which format.
pub(crate) fn is_known_header(name: &HeaderName) -> bool {
    is_safe_with_operator_key(name)
        || CREDENTIAL_HEADERS.contains(&name.as_str())
        || [header::HOST, header::CONNECTION].contains(name)
}

/// Headers that say who asks, and with which account.
pub(crate) const CREDENTIAL_HEADERS: [&str; 5] =
    ["authorization", "api-key", "x-api-key", "openai-organization", "openai-project"];

/// Whether a client's header may be sent with the operator's key: it does not name an account.
pub(super) fn is_safe_with_operator_key(name: &HeaderName) -> bool {
    const NAMES: [&str; 12] = [
        "accept",
        "accept-encoding",
        "accept-language",
        "content-encoding",
        "content-length",
        "content-type",
        "origin",
        "user-agent",
        "traceparent",
        "tracestate",
        "x-request-id",
        "access-control-request-method",
    ];
    NAMES.contains(&name.as_str())
        || ["x-stainless-", "access-control-"].iter().any(|start| name.as_str().starts_with(start))
}

/// The headers of a request as they are forwarded.
pub(super) fn forwarded_headers(headers: &HeaderMap, bodies: Bodies) -> HeaderMap {
    let mut headers = end_to_end_headers(headers);
    headers.remove(header::HOST);
    if bodies == Bodies::Unpacked {
        // The compression of replies is between the upstream and us.
        headers.remove(header::ACCEPT_ENCODING);
        // The body may differ from the client's by now.
        headers.remove(header::CONTENT_LENGTH);
    }
    headers
}

/// Headers that are neither hop-by-hop nor our own.
pub(super) fn end_to_end_headers(headers: &HeaderMap) -> HeaderMap {
    const OF_ONE_CONNECTION: [HeaderName; 8] = [
        header::CONNECTION,
        HeaderName::from_static("keep-alive"),
        header::PROXY_AUTHENTICATE,
        header::PROXY_AUTHORIZATION,
        header::TE,
        header::TRAILER,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
    ];
    let named: Vec<String> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|name| name.trim().to_ascii_lowercase())
        .collect();
    let is_kept = |name: &HeaderName| {
        !OF_ONE_CONNECTION.contains(name)
            && !name.as_str().starts_with("x-ecso-")
            && !named.iter().any(|other| name == other.as_str())
    };
    headers
        .iter()
        .filter(|(name, _)| is_kept(name))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}
