//! Requests that are not guarded. They are forwarded unchanged if they are known to be harmless, or
//! if the operator wants no guard.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::State,
    http::{StatusCode, header},
    response::Response,
};
use serde_json::Value;
use tracing::Instrument;

use crate::{
    context::{RequestContext, check_content_headers},
    error::ApiError,
    json,
    routes::Route,
    server::{Gateway, finish_response, request_id},
    settings::Mode,
    telemetry,
    upstream::{Credentials, door},
};

/// Handles every path without a handler of its own.
pub(crate) async fn passthrough(
    State(gateway): State<Arc<Gateway>>,
    request: axum::extract::Request,
) -> Response {
    let (id, state) = (request_id(), gateway.state());
    let (head, body) = request.into_parts();
    let (span, door) =
        (telemetry::request_span("other", &id, &head.headers), door(&head.extensions));
    let response = async {
        let (method, uri) = (head.method.clone(), head.uri.clone());
        let context = gateway.admit(&state, &id, head)?;
        Box::pin(forward(context, &method, &uri, body)).await
    };
    finish_response(&id, (door, "other"), &state.metrics, response.instrument(span)).await
}

/// Forwards a request, depending on its route.
async fn forward(
    mut context: RequestContext,
    method: &axum::http::Method,
    uri: &axum::http::Uri,
    body: Body,
) -> Result<Response, ApiError> {
    let (path, state) = (uri.path(), Arc::clone(&context.state));
    let Some(transport) = context.transport() else {
        return Err(ApiError::new(
            StatusCode::NOT_FOUND,
            "not_found",
            "this server has no such route",
        ));
    };
    if context.mode == Mode::Enforce {
        context.keep_known_headers();
    }
    let route =
        Route::classify(method, path, &state.settings.allow_routes, transport.knows_routes());
    let (credentials, body) = match route {
        Route::Allowed => (Credentials::Operator, context.stream_body(body)),
        Route::Harmless if *method == axum::http::Method::POST => {
            (Credentials::Operator, context.stream_body(body))
        }
        // A request without a body here has none for the upstream either. A carrier must not wait
        // until it is read.
        Route::Harmless => {
            drop(body);
            context.headers.remove(header::CONTENT_LENGTH);
            (Credentials::Operator, reqwest::Body::default())
        }
        Route::Vectors => {
            check_content_headers(&context.headers)?;
            context.set_json();
            let body = context.read(body).await?;
            only_texts(&json::parse(&body).map_err(ApiError::unreadable_body)?)?;
            (Credentials::Operator, body.into())
        }
        Route::Unknown => {
            let is_refused = context.mode == Mode::Enforce || state.settings.mode_header;
            if is_refused || !path.starts_with("/v1/") {
                return Err(not_guarded(method, path));
            }
            // This request is not checked, so the operator's key is not sent with it.
            (Credentials::Client, context.stream_body(body))
        }
    };
    let path = uri.path_and_query().map_or(path, |whole| whole.as_str());
    context.forward(&transport, credentials, method, path, body).await
}

/// Why a route is not passed on, and what to do about it.
fn not_guarded(method: &axum::http::Method, path: &str) -> ApiError {
    let message = if path.trim_end_matches('/').ends_with("/chat/completions") {
        "send chats to POST /v1/chat/completions".to_owned()
    } else if path.starts_with("/v1/v1/") {
        "this client adds /v1 to its base URL itself: configure the address without /v1".to_owned()
    } else {
        format!(
            "{method} {} is not passed on, because its answer would not be judged. An operator \
             can list it in `gateway.allow_routes`",
            json::printable(path)
        )
    };
    ApiError::new(StatusCode::NOT_FOUND, "route_not_guarded", message)
}

/// Texts may become embeddings. A server might accept more here, such as conversations with images,
/// so anything else is refused.
fn only_texts(body: &Value) -> Result<(), ApiError> {
    const KNOWN: [&str; 19] = [
        "model",
        "input",
        "dimensions",
        "encoding_format",
        "user",
        "input_type",
        "truncate",
        "truncation",
        "truncate_prompt_tokens",
        "priority",
        "query",
        "documents",
        "top_n",
        "return_documents",
        "max_chunks_per_doc",
        "max_tokens_per_doc",
        "text_1",
        "text_2",
        "normalize",
    ];
    fn is_text(value: &Value) -> bool {
        value.as_array().map_or(!value.is_object(), |list| list.iter().all(is_text))
    }
    let unknown = |name: &str| {
        let message = format!("`{}` can't be passed on: only texts can", json::printable(name));
        ApiError {
            param: Some(json::printable(name)),
            ..ApiError::bad_request("unknown_field", message)
        }
    };
    let fields = body
        .as_object()
        .ok_or_else(|| ApiError::bad_request("invalid_request", "the body must be an object"))?;
    for (name, value) in fields {
        if !KNOWN.contains(&name.as_str()) || !is_text(value) {
            return Err(unknown(name));
        }
    }
    Ok(())
}
