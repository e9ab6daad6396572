//! Where logs and spans go: logs to standard error, as `ECSO_LOG` says; spans to the collector that
//! OpenTelemetry's own variables name, if they do.

use tracing_subscriber::{Layer, filter::Targets, layer::SubscriberExt, util::SubscriberInitExt};

/// What is logged where `ECSO_LOG` says nothing: warnings of our own, errors of others but the
/// engine's, which come back as errors.
const USUAL: &str = "error,ecso=warn,llama_cpp_2=off,llama-cpp-2=off";

/// Telemetry under way. Dropping it sends what is still held.
pub(crate) struct Telemetry {
    #[cfg(feature = "otel")]
    spans: Option<opentelemetry_sdk::trace::SdkTracerProvider>,
}

/// Begins to write logs, and to send spans where there is a collector.
pub(crate) fn start() -> Telemetry {
    let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let logs = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .log_internal_errors(false)
        .with_ansi(colours)
        .with_filter(filter());
    #[cfg(feature = "otel")]
    if let Some(spans) = otel::collector() {
        tracing_subscriber::registry().with(logs).with(otel::layer(&spans)).init();
        return Telemetry { spans: Some(spans) };
    }
    tracing_subscriber::registry().with(logs).init();
    Telemetry {
        #[cfg(feature = "otel")]
        spans: None,
    }
}

/// Targets and levels as in `info,ecso=debug`; what can't be read is told, and the usual is logged.
fn filter() -> Targets {
    let wish = std::env::var("ECSO_LOG").unwrap_or_else(|_| USUAL.into());
    wish.parse().unwrap_or_else(|error| {
        say!("ecso: ECSO_LOG={wish}: {error}; write for instance info,ecso=debug");
        USUAL.parse().unwrap_or_default()
    })
}

#[cfg(feature = "otel")]
mod otel {
    use opentelemetry::{global, trace::TracerProvider};
    use opentelemetry_otlp::SpanExporter;
    use opentelemetry_sdk::{
        Resource, propagation::TraceContextPropagator, trace::SdkTracerProvider,
    };
    use tracing::{Level, Subscriber};
    use tracing_subscriber::{Layer, filter::Targets, registry::LookupSpan};

    impl Drop for super::Telemetry {
        fn drop(&mut self) {
            if let Some(Err(error)) = self.spans.as_ref().map(SdkTracerProvider::shutdown) {
                say!("ecso: the last spans could not be sent: {error}");
            }
        }
    }

    /// The way to the collector; none where none is named.
    pub(super) fn collector() -> Option<SdkTracerProvider> {
        let named = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"];
        if !named.iter().any(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty())) {
            return None;
        }
        ecso_openai::install_provider();
        let exporter = match SpanExporter::builder().with_http().build() {
            Ok(exporter) => exporter,
            Err(error) => {
                say!("ecso: no spans are sent: {error}");
                return None;
            }
        };
        global::set_text_map_propagator(TraceContextPropagator::new());
        let name = std::env::var("OTEL_SERVICE_NAME").unwrap_or_else(|_| "ecso".into());
        let resource = Resource::builder().with_service_name(name).build();
        Some(
            SdkTracerProvider::builder()
                .with_batch_exporter(exporter)
                .with_resource(resource)
                .build(),
        )
    }

    /// Our own spans, with what is logged below them.
    pub(super) fn layer<S: Subscriber + for<'a> LookupSpan<'a>>(
        collector: &SdkTracerProvider,
    ) -> impl Layer<S> + use<S> {
        let ours = Targets::new().with_target("ecso", Level::INFO);
        tracing_opentelemetry::layer().with_tracer(collector.tracer("ecso")).with_filter(ours)
    }
}
