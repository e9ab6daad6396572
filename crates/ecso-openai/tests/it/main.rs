//! The client against a server that misbehaves.
#![allow(clippy::unwrap_used, missing_docs)]

mod address;
mod connections;
mod quirks;
mod replies;

use std::time::{Duration, Instant};

use ecso::{Chat, FinishReason, Image, Limits, Mllm, ModelError, Sampling};
use ecso_openai::{OpenAi, Options};
use secrecy::SecretString;
use serde_json::{Value, json};
use wiremock::{
    Mock, MockServer, ResponseTemplate,
    matchers::{body_partial_json, header, method, path},
};

fn options() -> Options {
    Options { model: Some("m".into()), backoff: Duration::from_millis(1), ..Options::default() }
}

async fn client(server: &MockServer) -> OpenAi {
    OpenAi::connect(&server.uri(), options()).await.unwrap()
}

fn sampling() -> Sampling {
    Sampling {
        temperature: Some(0.2),
        max_tokens: Some(5),
        top_logprobs: 30,
        ..Sampling::default()
    }
}

fn answer(text: &str) -> ResponseTemplate {
    ResponseTemplate::new(200).set_body_json(json!({
        "choices": [{
            "message": {"role": "assistant", "content": text},
            "finish_reason": "length",
            "logprobs": {"content": [{"token": "no", "logprob": -0.1, "top_logprobs": [{"token": "no", "logprob": -0.1}]}]},
        }],
        "usage": {"prompt_tokens": 11, "completion_tokens": 5},
    }))
}

async fn bodies(server: &MockServer) -> Vec<Value> {
    let requests = server.received_requests().await.unwrap();
    requests.iter().map(|request| request.body_json().unwrap()).collect()
}

#[tokio::test]
async fn the_request_is_what_the_protocol_asks_for() {
    let server = MockServer::start().await;
    Mock::given(method("POST"))
        .and(path("/v1/chat/completions"))
        .and(header("authorization", "Bearer sesame"))
        .respond_with(answer(" hello "))
        .mount(&server)
        .await;
    let options = Options { api_key: Some(SecretString::from("sesame")), ..options() };
    let client = OpenAi::connect(&server.uri(), options).await.unwrap();
    let gif = b"GIF89a\x01\0\x01\0\x80\0\0\0\0\0\xff\xff\xff\x2c\0\0\0\0\x01\0\x01\0\0\x02\x02\x44\x01\0\x3b";
    let image = Image::from_bytes(&gif[..], Limits::default()).unwrap();
    let chat = Chat::ask([image], "What is this?").with_system("Be brief.");
    let mut sampling = sampling();
    sampling.extra.insert("top_k".into(), 1.into());
    let reply = client.generate(&chat, &sampling).await.unwrap();
    assert_eq!(reply.text, " hello ");
    assert_eq!(reply.finish, FinishReason::Length);
    assert_eq!(reply.first_token[0].token, "no");
    assert_eq!(reply.usage.unwrap().prompt_tokens, 11);
    insta::assert_json_snapshot!(bodies(&server).await);
}

#[tokio::test]
async fn a_server_without_logprobs_is_asked_once_more_and_remembered() {
    let server = MockServer::start().await;
    Mock::given(body_partial_json(json!({"logprobs": true})))
        .respond_with(
            ResponseTemplate::new(400)
                .set_body_json(json!({"error": {"message": "no logprobs here"}})),
        )
        .mount(&server)
        .await;
    Mock::given(method("POST")).respond_with(answer("hi")).mount(&server).await;
    let client = client(&server).await;
    for _ in 0..2 {
        assert_eq!(client.generate(&Chat::ask([], "q"), &sampling()).await.unwrap().text, "hi");
    }
    let asked: Vec<bool> =
        bodies(&server).await.iter().map(|body| body.get("logprobs").is_some()).collect();
    assert_eq!(asked, [true, false, false]);
}

#[tokio::test]
async fn what_may_pass_is_tried_again() {
    for fault in [
        ResponseTemplate::new(429).insert_header("retry-after", "0"),
        ResponseTemplate::new(500),
        ResponseTemplate::new(503),
        ResponseTemplate::new(504),
    ] {
        let server = MockServer::start().await;
        Mock::given(method("POST")).respond_with(fault).up_to_n_times(2).mount(&server).await;
        Mock::given(method("POST")).respond_with(answer("at last")).mount(&server).await;
        let reply = client(&server).await.generate(&Chat::ask([], "q"), &Sampling::default()).await;
        assert_eq!(reply.unwrap().text, "at last");
    }
}

#[tokio::test]
async fn a_proxy_that_lost_patience_is_a_timeout() {
    let server = MockServer::start().await;
    Mock::given(method("POST")).respond_with(ResponseTemplate::new(504)).mount(&server).await;
    let reply = client(&server).await.generate(&Chat::ask([], "q"), &Sampling::default()).await;
    assert!(matches!(reply, Err(ModelError::Timeout(_))), "{reply:?}");
}

#[tokio::test]
async fn what_will_not_pass_is_not_tried_again() {
    for status in [400, 401, 404, 422] {
        let server = MockServer::start().await;
        Mock::given(method("POST"))
            .respond_with(
                ResponseTemplate::new(status)
                    .set_body_string("{\"error\": {\"message\": \"not so\"}}"),
            )
            .expect(1)
            .mount(&server)
            .await;
        let error = client(&server)
            .await
            .generate(&Chat::ask([], "q"), &Sampling::default())
            .await
            .unwrap_err();
        assert!(
            matches!(&error, ModelError::Rejected(cause) if cause.message().contains("not so")),
            "{error}"
        );
    }
    let server = MockServer::start().await;
    Mock::given(method("POST"))
        .respond_with(ResponseTemplate::new(429).insert_header("retry-after", "3600"))
        .expect(1)
        .mount(&server)
        .await;
    let error = client(&server)
        .await
        .generate(&Chat::ask([], "q"), &Sampling::default())
        .await
        .unwrap_err();
    assert_eq!(error, ModelError::Overloaded { retry_after: Some(Duration::from_hours(1)) });
}

#[tokio::test]
async fn what_can_not_be_read_is_said() {
    for body in ["", "<html>", "{}", r#"{"choices": []}"#] {
        let server = MockServer::start().await;
        Mock::given(method("POST"))
            .respond_with(ResponseTemplate::new(200).set_body_string(body))
            .mount(&server)
            .await;
        let error = client(&server)
            .await
            .generate(&Chat::ask([], "q"), &Sampling::default())
            .await
            .unwrap_err();
        assert!(matches!(error, ModelError::Protocol(_)), "{body}: {error}");
    }
}

#[tokio::test]
async fn a_slow_server_runs_into_the_time_limit() {
    let server = MockServer::start().await;
    Mock::given(method("POST"))
        .respond_with(answer("late").set_delay(Duration::from_secs(20)))
        .mount(&server)
        .await;
    let options = Options { reply_timeout: Duration::from_millis(200), ..options() };
    let client = OpenAi::connect(&server.uri(), options).await.unwrap();
    let error = client.generate(&Chat::ask([], "q"), &Sampling::default()).await.unwrap_err();
    assert_eq!(error, ModelError::Timeout(Duration::from_millis(200)));
    let Err(error) = client.stream(&Chat::ask([], "q"), &Sampling::default()).await else {
        panic!("no time limit")
    };
    assert_eq!(error, ModelError::Timeout(Duration::from_millis(200)));
}

#[tokio::test]
async fn nobody_there_is_noticed_within_ten_seconds() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", free.local_addr().unwrap());
    drop(free);
    let begun = Instant::now();
    let refused = OpenAi::connect(&url, Options::default()).await.unwrap_err();
    assert!(
        ecso::error_chain(&refused).ends_with("connection failed: nothing is listening there"),
        "{}",
        ecso::error_chain(&refused)
    );
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn a_connection_that_is_lost_is_tried_again() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let server = tokio::spawn(async move {
        for _ in 0..4 {
            drop(listener.accept().await.unwrap());
        }
    });
    let client = OpenAi::connect(&url, options()).await.unwrap();
    let error = client.generate(&Chat::ask([], "q"), &Sampling::default()).await.unwrap_err();
    assert!(matches!(error, ModelError::Transport(_)));
    server.await.unwrap();
}

#[tokio::test]
async fn the_only_model_needs_no_name() {
    let server = MockServer::start().await;
    let list = |names: &[&str]| {
        let models: Vec<Value> =
            names.iter().map(|name| json!({"id": name, "object": "model"})).collect();
        ResponseTemplate::new(200).set_body_json(json!({"object": "list", "data": models}))
    };
    Mock::given(path("/v1/models"))
        .respond_with(list(&["llava"]))
        .up_to_n_times(1)
        .mount(&server)
        .await;
    Mock::given(path("/v1/models")).respond_with(list(&["llava", "qwen"])).mount(&server).await;
    let one = OpenAi::connect(&server.uri(), Options::default()).await.unwrap();
    assert_eq!(one.name(), "llava");
    let several = OpenAi::connect(&server.uri(), Options::default()).await.unwrap_err();
    assert!(several.to_string().contains("llava, qwen"), "{several}");
}
