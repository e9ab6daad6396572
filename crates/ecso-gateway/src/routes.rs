//! The table of routes that clients may use unguarded. Any other route might return an answer that
//! is not judged.

use axum::http::Method;

/// How a request is handled, by its method and path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Route {
    /// Known to be harmless: it never answers a question.
    Harmless,
    /// Returns embeddings or scores. Harmless if its body holds only texts.
    Vectors,
    /// Listed by the operator.
    Allowed,
    /// Not known, or known to return answers.
    Unknown,
}

/// Routes that are known to be harmless. A path that ends in `*` matches everything below it.
const HARMLESS: &[(&str, &str)] = &[
    ("GET", "/v1/models"),
    ("GET", "/v1/models/*"),
    ("GET", "/v1/health"),
    ("GET", "/v1/version"),
    // If the operator leaves it to the upstream.
    ("POST", "/v1/moderations"),
    ("POST", "/v1/tokenize"),
    ("POST", "/v1/detokenize"),
    // The preflight requests of browsers.
    ("OPTIONS", "/v1/models"),
    ("OPTIONS", "/v1/embeddings"),
    ("OPTIONS", "/v1/chat/completions"),
    ("OPTIONS", "/v1/messages"),
    ("OPTIONS", "/v1/responses"),
];

const VECTORS: &[&str] = &["/v1/embeddings", "/v1/rerank", "/v1/score"];

impl Route {
    /// Classifies a request to a model server or, if `is_server` is false, to a service that may
    /// answer every path as it answers chats. `allowed` are the routes that the operator lists, as
    /// `[METHOD ]PATH`.
    pub(crate) fn classify(
        method: &Method,
        path: &str,
        allowed: &[String],
        is_server: bool,
    ) -> Self {
        if !has_one_spelling(path) {
            return Self::Unknown;
        }
        let is_known = is_server || *method != Method::POST;
        if is_known
            && HARMLESS.iter().any(|(known, pattern)| *known == method && matches(pattern, path))
        {
            Self::Harmless
        } else if is_server && *method == Method::POST && VECTORS.contains(&path) {
            Self::Vectors
        } else if allowed.iter().any(|entry| is_listed(entry, method, path)) {
            Self::Allowed
        } else {
            Self::Unknown
        }
    }
}

fn is_listed(entry: &str, method: &Method, path: &str) -> bool {
    match entry.split_once(' ') {
        Some((listed, pattern)) => {
            method.as_str().eq_ignore_ascii_case(listed) && matches(pattern.trim(), path)
        }
        None => matches(entry, path),
    }
}

fn matches(pattern: &str, path: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => path.strip_prefix(start).is_some_and(|rest| !rest.is_empty()),
        None => pattern == path,
    }
}

/// Whether a path has a single spelling: no escapes, no `.` or `..`, no empty segments.
fn has_one_spelling(path: &str) -> bool {
    let is_allowed_byte = |byte: u8| byte.is_ascii_alphanumeric() || b"/-._~:@".contains(&byte);
    let Some(below) = path.strip_prefix('/') else { return false };
    path.bytes().all(is_allowed_byte)
        && below.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_outside_the_table_are_unknown() {
        for (method, path) in [
            ("GET", "/v1/models"),
            ("GET", "/v1/models/org/name:7b"),
            // If the operator leaves it to the upstream.
            ("POST", "/v1/moderations"),
            ("POST", "/v1/tokenize"),
            ("OPTIONS", "/v1/chat/completions"),
        ] {
            assert_eq!(
                Route::classify(&method.parse().unwrap(), path, &[], true),
                Route::Harmless,
                "{method} {path}"
            );
        }
        assert_eq!(Route::classify(&Method::POST, "/v1/embeddings", &[], true), Route::Vectors);
        for method in ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "TRACE", "PROPFIND"] {
            for path in [
                "/v1/chat/completions",
                "/v1/chat/completions/",
                "/v1/chat/completions/chatcmpl-1",
                "/v1/chat/completions/batch",
                "/v1//chat/completions",
                "/v1/v1/chat/completions",
                "/v1/chat%2Fcompletions",
                "/v1/chat/completions%23",
                "/v1/chat/completions%3f",
                "/v1/models%2F..%2Fchat%2Fcompletions",
                "/v1/models/../chat/completions",
                "/v1/models/./x",
                "/v1/models/",
                "/v1/models//x",
                "/v1/models/x;y",
                "/v1/%63hat/completions",
                "/v1/Chat/Completions",
                "/v1/chat\\completions",
                "/v1/completions",
                "/v1/responses",
                "/v1/responses/resp_1",
                "/v1/messages",
                "/v1/batches",
                "/v1/files",
                "/v1/engines/x/completions",
                "/v1/audio/transcriptions",
                "/v1/images/generations",
                "/chat/completions",
                "/metrics",
                "/v2/models",
                "/",
                "",
            ] {
                assert_eq!(
                    Route::classify(&method.parse().unwrap(), path, &[], true),
                    Route::Unknown,
                    "{method} {path}"
                );
            }
        }
        for method in ["POST", "PUT", "PATCH", "DELETE"] {
            assert_eq!(
                Route::classify(&method.parse().unwrap(), "/v1/models", &[], true),
                Route::Unknown
            );
        }
    }

    #[test]
    fn operators_can_allow_more_routes() {
        let allowed = ["POST /v1/audio/transcriptions".to_owned(), "/v1/files/*".to_owned()];
        let route =
            |method: &str, path| Route::classify(&method.parse().unwrap(), path, &allowed, true);
        assert_eq!(route("POST", "/v1/audio/transcriptions"), Route::Allowed);
        assert_eq!(route("DELETE", "/v1/files/x"), Route::Allowed);
        for (method, path) in
            [("GET", "/v1/audio/transcriptions"), ("GET", "/v1/files"), ("GET", "/v1/files/../x")]
        {
            assert_eq!(route(method, path), Route::Unknown, "{method} {path}");
        }
    }
}
