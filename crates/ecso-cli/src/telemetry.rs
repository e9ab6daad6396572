//! Logs and spans. Logs go to standard error, filtered by `ECSO_LOG`. Spans go to the OpenTelemetry
//! collector that the environment names, if it names one.

use tracing_subscriber::{Layer, filter::Targets, layer::SubscriberExt, util::SubscriberInitExt};

/// The filter if `ECSO_LOG` is not set: our own warnings, and errors of dependencies except the
/// engine, whose errors are returned.
const DEFAULT_FILTER: &str = "error,ecso=warn,llama_cpp_2=off,llama-cpp-2=off";

/// Running telemetry. Dropping it sends the remaining spans.
pub(crate) struct Telemetry {
    #[cfg(feature = "otel")]
    spans: Option<opentelemetry_sdk::trace::SdkTracerProvider>,
}

/// Starts to write logs, and to send spans if there is a collector.
pub(crate) fn start() -> Telemetry {
    let is_terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let logs = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .log_internal_errors(false)
        .with_ansi(is_terminal)
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

/// Targets and levels, such as `info,ecso=debug`. A wrong filter is reported, and the default used.
fn filter() -> Targets {
    let filter = std::env::var("ECSO_LOG").unwrap_or_else(|_| DEFAULT_FILTER.into());
    filter.parse().unwrap_or_else(|error| {
        say!("ecso: ECSO_LOG={filter}: {error}; write for instance info,ecso=debug");
        DEFAULT_FILTER.parse().unwrap_or_default()
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
                say!("ecso: can't send the last spans: {error}");
            }
        }
    }

    /// The exporter of spans; none if no collector is named.
    pub(super) fn collector() -> Option<SdkTracerProvider> {
        let variables = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"];
        if !variables
            .iter()
            .any(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()))
        {
            return None;
        }
        ecso_openai::install_provider();
        let exporter = match SpanExporter::builder().with_http().build() {
            Ok(exporter) => exporter,
            Err(error) => {
                say!("ecso: can't send spans: {error}");
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

    /// A layer that exports our own spans and the logs in them.
    pub(super) fn layer<S: Subscriber + for<'a> LookupSpan<'a>>(
        collector: &SdkTracerProvider,
    ) -> impl Layer<S> + use<S> {
        let ours = Targets::new().with_target("ecso", Level::INFO);
        tracing_opentelemetry::layer().with_tracer(collector.tracer("ecso")).with_filter(ours)
    }
}
