//! The guard as a layer around a service in the same program.

use std::{
    convert::Infallible,
    future::ready,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Extension, Router,
    body::{Body, to_bytes},
    extract::Request,
    http::{Response, StatusCode},
    response::IntoResponse,
};
use ecso::Profile;
use ecso_gateway::{Settings, settings::Limits};
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use tower::{Layer, ServiceExt, service_fn, util::MapRequestLayer};

use crate::support::{Harness, IMAGE, LEAK, question, said, streamed};

const CHAT: &str = "/v1/chat/completions";

/// A model that answers everything with `text`, and reports what it received in a header.
fn model(text: &'static str) -> Router {
    Router::new().fallback(async move |request: Request| {
        let (head, body) = request.into_parts();
        let body = to_bytes(body, usize::MAX).await.unwrap();
        let host = head.headers.get("host").map_or("", |host| host.to_str().unwrap());
        let user = head.extensions.get::<&str>().unwrap_or(&"");
        let got = format!("{},{host},{user},{}", head.uri.path(), head.headers.contains_key("x-other"));
        let message = json!({"role": "assistant", "content": text});
        let asked: Value = serde_json::from_slice(&body).unwrap_or_default();
        let mut response = if asked["stream"] == true {
            streamed(&[
                json!({"id": "c", "choices": [{"index": 0, "delta": message, "finish_reason": "stop"}]}).to_string()
            ])
        } else {
            said(&message, &Value::Null)
        };
        response.headers_mut().insert("x-request-id", got.parse().unwrap());
        response
    })
}

#[tokio::test]
async fn harmful_answers_are_rewritten_and_safe_ones_pass() {
    let (harmful, safe) = (Harness::around(Settings::default(), model(LEAK)).await, model("Rye."));
    let got = harmful.chat(&question()).await;
    assert_eq!((got.status, got.leaks()), (StatusCode::OK, false));
    assert_eq!(got.json()["choices"][0]["message"]["content"], "Here is a harmless answer.");
    let mut streams = question();
    streams["stream"] = true.into();
    let got = harmful.chat(&streams).await;
    assert!(
        !got.leaks()
            && got.body.contains("Here is a harmless answer.")
            && got.body.ends_with("[DONE]\n\n")
    );
    let safe = Harness::around(Settings::default(), safe).await;
    let got = safe.chat(&question()).await;
    assert_eq!((got.json()["choices"][0]["message"]["content"].as_str()), Some("Rye."));
    assert_eq!(got.headers["x-ecso-verdict"], "safe");
    // Headers of the service are kept.
    assert_eq!(got.headers["x-request-id"], "/v1/chat/completions,127.0.0.1:8080,,false");
}

#[tokio::test]
async fn other_formats_reach_the_service_as_chats() {
    let harmful = Harness::around(Settings::default(), model(LEAK)).await;
    let asked = json!({"model": "m", "input": [{"role": "user", "content": [
        {"type": "input_image", "image_url": IMAGE}, {"type": "input_text", "text": "What is this?"}]}]});
    let got = harmful.send("POST", "/v1/responses", &[], asked.to_string()).await;
    assert_eq!((got.status, got.leaks()), (StatusCode::OK, false));
    assert_eq!(got.json()["output"][0]["content"][0]["text"], "Here is a harmless answer.");
    assert!(got.headers["x-request-id"].to_str().unwrap().starts_with(CHAT));
}

#[tokio::test]
async fn request_extensions_reach_the_service() {
    let service = model("Rye.");
    let world =
        Harness::around(Settings::default(), service).await.with_extension(Extension("ada"));
    let got = world.send("POST", CHAT, &[("x-other", "1")], question().to_string()).await;
    // An unknown header does not.
    assert_eq!(got.headers["x-request-id"], "/v1/chat/completions,127.0.0.1:8080,ada,false");
}

#[tokio::test]
async fn unknown_routes_do_not_reach_the_service() {
    let world = Harness::around(Settings::default(), model(LEAK)).await;
    for path in [
        "/",
        "/v1/images/generations",
        "/v1/tokenize",
        "/v1/detokenize",
        "/v1/embeddings",
        "/v1/rerank",
        "/v1/chat/completions/",
        "/metrics",
        "/v1/guard",
        "/healthz",
    ] {
        let got = world.send("POST", path, &[], question().to_string()).await;
        assert_eq!((got.status, got.leaks()), (StatusCode::NOT_FOUND, false), "{path}");
    }
    let got =
        world.send("POST", CHAT, &[("x-ecso-own-call", "true")], question().to_string()).await;
    assert_eq!(
        (got.status, got.json()["error"]["code"].as_str()),
        (StatusCode::MISDIRECTED_REQUEST, Some("guard_loop"))
    );
}

/// The guard calls the service it guards, which calls the guard.
#[tokio::test]
async fn a_guard_that_calls_itself_is_refused() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    let gateway = Arc::new(Harness::gateway(Settings::default(), Profile::paper(), &url).unwrap());
    let asked = Arc::<AtomicUsize>::default();
    let counted = Arc::clone(&asked);
    let service = model("Rye.").layer(MapRequestLayer::new(move |request: Request| {
        counted.fetch_add(1, Ordering::Relaxed);
        request
    }));
    let service = service.layer(gateway.layer());
    tokio::spawn(async move { axum::serve(listener, service).await });
    let got = reqwest::Client::new()
        .post(format!("{url}/chat/completions"))
        .json(&question())
        .send()
        .await
        .unwrap();
    assert_eq!((got.status().as_u16(), asked.load(Ordering::Relaxed)), (502, 1));
}

#[tokio::test]
async fn silent_answers_are_cut_off() {
    let limits = Limits { deadline: 1, patience: 1, ..Limits::default() };
    let silent = || {
        Body::from_stream(stream::once(ready(Ok::<_, Infallible>("rye"))).chain(stream::pending()))
    };
    let service = Router::new().fallback(async move |request: Request| {
        let sent = to_bytes(request.into_body(), usize::MAX).await;
        if sent.is_ok() {
            silent().into_response()
        } else {
            StatusCode::BAD_REQUEST.into_response()
        }
    });
    let allow_routes = vec!["POST /v1/tokenize".to_owned()];
    let world =
        Harness::around(Settings { limits, allow_routes, ..Settings::default() }, service).await;
    let within = async |body: Body| {
        tokio::time::timeout(Duration::from_secs(4), world.send("POST", "/v1/tokenize", &[], body))
            .await
            .unwrap()
    };
    let got = within(Body::from("{}")).await;
    assert_eq!((got.status, got.body.as_str()), (StatusCode::OK, ""), "it breaks off");
    let got = within(silent()).await;
    assert!(!got.status.is_success(), "{got:?}");
}

#[tokio::test]
async fn a_failing_service_is_a_failed_upstream() {
    let world = Harness::new(Settings::default(), Arc::new(|_| panic!("nobody asks"))).await;
    let layer = Arc::clone(&world.gateway).layer();
    let refused = service_fn(async |_: Request<Body>| {
        Err::<Response<Body>, _>(format!("{LEAK} in the service's words"))
    });
    let asked = || {
        Request::post(CHAT)
            .header("content-type", "application/json")
            .body(Body::from(question().to_string()))
    };
    let Ok(got) = layer.layer(refused).oneshot(asked().unwrap()).await;
    assert_eq!(got.status(), StatusCode::BAD_GATEWAY);
    let told = to_bytes(got.into_body(), usize::MAX).await.unwrap();
    assert!(!String::from_utf8_lossy(&told).contains(LEAK), "{told:?}");
    let status = service_fn(async |_: Request<Body>| {
        Ok::<_, Infallible>(
            (StatusCode::TOO_MANY_REQUESTS, [("retry-after", "7")], LEAK).into_response(),
        )
    });
    let Ok(got) = layer.layer(status).oneshot(asked().unwrap()).await;
    assert_eq!(
        (got.status(), got.headers()["retry-after"].as_bytes()),
        (StatusCode::TOO_MANY_REQUESTS, b"7".as_ref())
    );
    let told = to_bytes(got.into_body(), usize::MAX).await.unwrap();
    assert!(!String::from_utf8_lossy(&told).contains(LEAK), "{told:?}");
}
