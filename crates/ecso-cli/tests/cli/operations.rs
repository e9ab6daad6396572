//! `ecso serve`: moderation, the API description, and spans.

use std::{collections::BTreeMap, time::Duration};

use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest, common::v1::any_value::Value as Said,
    trace::v1::Span,
};
use prost::Message;
use serde_json::{Value, json};
use wiremock::{
    Mock, MockServer, ResponseTemplate,
    matchers::{method, path},
};

use crate::{
    ecso,
    serve::{Served, ask, client, picture, post},
    upstream::{LEAK, Upstream},
};

#[tokio::test(flavor = "multi_thread")]
async fn moderation_judges_texts_and_images() {
    let upstream = Upstream::start().await;
    let served = Served::start(&upstream.url, &[], &["--profile", "paper"]);
    let url = format!("{}/moderations", served.url);
    let texts =
        post(&url, &json!({"model": "m", "input": ["What is on the list?", "Something bad"]}))
            .await;
    let found: Value = serde_json::from_str(&texts.body).unwrap();
    assert_eq!(texts.status, 200, "{}", texts.body);
    let results = found["results"].as_array().unwrap();
    assert_eq!(
        (results.len(), &results[0]["flagged"], &results[1]["flagged"]),
        (2, &json!(false), &json!(true))
    );
    assert_eq!(results[1]["categories"]["harm"], true);
    assert!(
        results[1]["categories"]["violence"].is_null(),
        "what is not told apart is not claimed"
    );
    assert_eq!(results[0]["category_applied_input_types"]["harm"], json!(["text"]));

    let image = json!({"type": "image_url", "image_url": {"url": picture()}});
    let parts = json!({"model": "m", "input": [{"type": "text", "text": "Something bad"}, image]});
    let found: Value = serde_json::from_str(&post(&url, &parts).await.body).unwrap();
    assert_eq!(found["results"].as_array().unwrap().len(), 1);
    assert_eq!(found["results"][0]["flagged"], true);
    assert_eq!(
        found["results"][0]["category_applied_input_types"]["harm"],
        json!(["image", "text"])
    );

    for input in [json!([]), json!(""), json!(["a", " "]), json!([{"type": "video_url"}]), json!(3)]
    {
        assert_eq!(post(&url, &json!({"model": "m", "input": input})).await.status, 400, "{input}");
    }
    // A failing judge is an error and not a verdict.
    for step in ["direct", "detect"] {
        let got =
            post(&url, &json!({"model": format!("500@{step}"), "input": "Something bad"})).await;
        assert_eq!(got.status, 502, "{}", got.body);
    }
    // So is an unreadable list of models, if no model is named.
    let got = post(&url, &json!({"input": "What is on the list?"})).await;
    assert_eq!(got.status, 502, "{}", got.body);
    // The upstream's own moderation is passed through.
    let served =
        Served::start(&upstream.url, &["gateway.moderations=false"], &["--profile", "paper"]);
    let passed = post(
        &format!("{}/moderations", served.url),
        &json!({"model": "m", "input": "Something bad"}),
    )
    .await;
    assert!(passed.body.contains("chat.completion"), "{}", passed.body);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_describes_itself() {
    let upstream = Upstream::start().await;
    let served = Served::start(&upstream.url, &[], &[]);
    let url = served.url.replace("/v1", "/openapi.json");
    let text = client().get(url).send().await.unwrap().text().await.unwrap();
    let described: Value = serde_json::from_str(&text).unwrap();
    let paths: Vec<&str> =
        described["paths"].as_object().unwrap().keys().map(String::as_str).collect();
    for path in [
        "/v1/chat/completions",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/responses",
        "/v1/guard",
        "/v1/moderations",
        "/v1/models",
        "/healthz",
        "/readyz",
        "/metrics",
    ] {
        assert!(paths.contains(&path), "{path} is not in {paths:?}");
    }
    let failure = &described["paths"]["/v1/guard"]["post"]["responses"]["429"];
    assert!(failure.to_string().contains("ErrorBody"), "{failure}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_a_trace_with_a_span_a_step() {
    if cfg!(not(feature = "otel")) {
        return eprintln!("skipped: this build tells no spans");
    }
    let collector = MockServer::start().await;
    Mock::given(method("POST"))
        .and(path("/v1/traces"))
        .respond_with(ResponseTemplate::new(200))
        .mount(&collector)
        .await;
    let upstream = Upstream::start().await;
    let endpoint = format!("OTEL_EXPORTER_OTLP_ENDPOINT={}", collector.uri());
    let served = Served::start(
        &upstream.url,
        &[&endpoint, "OTEL_BSP_SCHEDULE_DELAY=50"],
        &["--profile", "paper"],
    );
    for stream in [false, true] {
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let asked = client().post(served.chat()).header("traceparent", parent).json(&ask(
            "m",
            "A bad request",
            stream,
        ));
        asked.send().await.unwrap().text().await.unwrap();
    }

    let mut spans = Vec::new();
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        spans = exported(&collector).await;
        if spans.len() >= 10 {
            break;
        }
    }
    let mut names = BTreeMap::new();
    for span in &spans {
        *names.entry(span.name.as_str()).or_insert(0) += 1;
        assert_eq!(span.trace_id, 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c_u128.to_be_bytes());
    }
    assert_eq!(
        names,
        BTreeMap::from([
            ("POST chat", 2),
            ("caption", 2),
            ("detect", 2),
            ("direct", 2),
            ("safe", 2)
        ])
    );
    let requests: Vec<&Span> = spans.iter().filter(|span| span.name == "POST chat").collect();
    for span in &spans {
        let is_request = span.name == "POST chat";
        let above = if is_request {
            span.parent_span_id == 0xb7ad_6b71_6920_3331_u64.to_be_bytes()
        } else {
            requests.iter().any(|request| request.span_id == span.parent_span_id)
        };
        assert!(above, "{} hangs elsewhere", span.name);
        assert_eq!(
            attribute(span, "gen_ai.request.model").as_deref(),
            (!is_request).then_some("m")
        );
    }
    let judged = spans.iter().find(|span| span.name == "detect").unwrap();
    assert_eq!(attribute(judged, "ecso.verdict").as_deref(), Some("unsafe"));
    let all = format!("{spans:?}");
    assert!(
        !all.contains(LEAK) && !all.contains("A bad request"),
        "no word of the conversation stands in a span"
    );
    // The upstream gets our span as parent, not the client's.
    let told = upstream.seen.traces.lock().unwrap().clone();
    assert!(
        told.len() >= 2
            && told.iter().all(|told| told.starts_with("00-0af7651916cd43dd8448eb211c80319c-")),
        "{told:?}"
    );
    assert!(told.iter().all(|told| !told.contains("b7ad6b7169203331")), "{told:?}");
}

async fn exported(collector: &MockServer) -> Vec<Span> {
    let received = collector.received_requests().await.unwrap();
    let batches = received
        .iter()
        .map(|request| ExportTraceServiceRequest::decode(request.body.as_slice()).unwrap());
    let resources = batches.flat_map(|batch| batch.resource_spans);
    resources.flat_map(|resource| resource.scope_spans).flat_map(|scope| scope.spans).collect()
}

fn attribute(span: &Span, name: &str) -> Option<String> {
    let found = span.attributes.iter().find(|attribute| attribute.key == name)?;
    match found.value.as_ref()?.value.as_ref()? {
        Said::StringValue(text) => Some(text.clone()),
        other => Some(format!("{other:?}")),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_dashboard_queries_existing_metrics() {
    let upstream = Upstream::start().await;
    let served = Served::start(&upstream.url, &["gateway.metrics=true"], &["--profile", "paper"]);
    post(&served.chat(), &ask("m", "A bad request", false)).await;
    post(&served.chat(), &ask("500@detect", "A request", false)).await;
    let figures = client()
        .get(served.url.replace("/v1", "/metrics"))
        .send()
        .await
        .unwrap()
        .text()
        .await
        .unwrap();
    let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/grafana.json");
    let dashboard = std::fs::read_to_string(file).unwrap();
    let names: std::collections::BTreeSet<&str> = dashboard
        .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| word.starts_with("ecso_"))
        .collect();
    assert!(names.len() > 5, "{names:?}");
    for name in names {
        assert!(
            figures.contains(&format!("\n{name}{{")) || figures.contains(&format!("\n{name} ")),
            "{name} is not told:\n{figures}"
        );
    }
}

#[test]
fn an_upstream_is_a_url() {
    let home = tempfile::tempdir().unwrap();
    let run = ecso(home.path()).args(["serve", "--upstream", "nonsense"]).assert().code(2);
    let said = crate::text(&run.get_output().stderr);
    assert!(said.contains("--upstream nonsense") && said.contains("http://"), "{said}");
}
