//! Spans: one for each request, with one for each step below it. The program decides who collects
//! them.

use axum::http::HeaderMap;
use tracing::Span;

/// The span of a request. If the client sent a trace context, it is the parent.
pub(crate) fn request_span(route: &'static str, id: &str, headers: &HeaderMap) -> Span {
    let span = tracing::info_span!(
        "request",
        otel.name = format_args!("POST {route}"),
        otel.kind = "server",
        http.response.status_code = tracing::field::Empty,
        otel.status_code = tracing::field::Empty,
        ecso.route = route,
        ecso.request_id = id,
    );
    set_parent(&span, headers);
    span
}

/// The span of the draft from a server. The guard creates the spans of the other steps.
pub(crate) fn draft_span(model: &str) -> Span {
    tracing::info_span!(
        "step",
        otel.name = "direct",
        otel.kind = "client",
        gen_ai.operation.name = "chat",
        gen_ai.request.model = model
    )
}

#[cfg(feature = "otel")]
fn set_parent(span: &Span, headers: &HeaderMap) {
    use tracing_opentelemetry::OpenTelemetrySpanExt;
    if span.is_disabled() {
        return;
    }
    let carrier = opentelemetry_http::HeaderExtractor(headers);
    let parent =
        opentelemetry::global::get_text_map_propagator(|propagator| propagator.extract(&carrier));
    // If spans are not collected, there is nothing to join.
    let _ = span.set_parent(parent);
}

/// Sends our trace context to the upstream, in place of the client's.
#[cfg(feature = "otel")]
pub(crate) fn inject(headers: &mut HeaderMap) {
    use tracing_opentelemetry::OpenTelemetrySpanExt;
    let span = Span::current();
    if span.is_disabled() {
        return;
    }
    let mut carrier = opentelemetry_http::HeaderInjector(headers);
    opentelemetry::global::get_text_map_propagator(|propagator| {
        propagator.inject_context(&span.context(), &mut carrier);
    });
}

#[cfg(not(feature = "otel"))]
fn set_parent(_: &Span, _: &HeaderMap) {}

#[cfg(not(feature = "otel"))]
pub(crate) fn inject(_: &mut HeaderMap) {}
