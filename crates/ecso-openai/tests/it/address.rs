//! Where a server is, and whether it lives.

use std::time::Duration;

use ecso::{Chat, Mllm, ModelError, Sampling};
use ecso_openai::{OpenAi, Options};
use secrecy::SecretString;
use wiremock::{
    Mock, MockServer, ResponseTemplate,
    matchers::{header, method, path, query_param},
};

use super::{answer, client, options};

#[tokio::test]
async fn the_url_of_an_endpoint_is_a_base_url_too() {
    let server = MockServer::start().await;
    Mock::given(path("/v1/chat/completions")).respond_with(answer("hi")).mount(&server).await;
    for end in [
        "",
        "/",
        "/v1",
        "/v1/",
        "/v1/chat/completions",
        "/v1/chat/completions/",
        "/v1/models",
        "/v1/completions",
    ] {
        let client = OpenAi::new(&format!("{}{end}", server.uri()), options()).unwrap();
        assert_eq!(client.base().path(), "/v1", "{end}");
        assert_eq!(
            client.generate(&Chat::ask([], "q"), &Sampling::default()).await.unwrap().text,
            "hi",
            "{end}"
        );
    }
}

#[tokio::test]
async fn a_url_without_a_scheme_is_told_as_it_should_be() {
    let error = OpenAi::new("127.0.0.1:8000/v1", options()).unwrap_err();
    assert!(
        matches!(&error, ModelError::Rejected(cause) if cause.message().contains("write http://127.0.0.1:8000/v1"))
    );
    let error = OpenAi::new("host:8000/v1", options()).unwrap_err().to_string();
    assert!(error.ends_with("write http://host:8000/v1"), "{error}");
}

#[tokio::test]
async fn a_wrong_base_is_told_with_the_url_that_was_asked() {
    let server = MockServer::start().await;
    let base = format!("http://me:sesame@{}/api?key=hidden", server.address());
    let error = OpenAi::new(&base, options())
        .unwrap()
        .generate(&Chat::ask([], "q"), &Sampling::default())
        .await;
    let error = error.unwrap_err().to_string();
    let asked = format!("http://{}/api/chat/completions was asked", server.address());
    assert!(error.contains(&asked) && error.contains("ends in /v1"), "{error}");
    assert!(!error.contains("sesame") && !error.contains("hidden"), "{error}");
}

#[tokio::test]
async fn a_password_in_the_base_is_sent_as_basic_auth_and_never_shown() {
    let server = MockServer::start().await;
    Mock::given(header("authorization", "Basic bWU6c2VzYW1l"))
        .and(query_param("version", "2"))
        .respond_with(answer("by password"))
        .mount(&server)
        .await;
    Mock::given(header("authorization", "Bearer key"))
        .respond_with(answer("by key"))
        .mount(&server)
        .await;
    let base = format!("http://me:sesame@{}/v1?version=2", server.address());
    let client = OpenAi::new(&base, options()).unwrap();
    let ask = async |client: &OpenAi| {
        client.generate(&Chat::ask([], "q"), &Sampling::default()).await.unwrap().text
    };
    assert_eq!(ask(&client).await, "by password");
    assert_eq!(
        ask(&client.with_model_and_key("m", Some(SecretString::from("key")))).await,
        "by key"
    );
    let header = client.authorization().unwrap().unwrap();
    assert!(header.is_sensitive() && !client.base().as_str().contains("sesame"));
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let gone = OpenAi::new(&format!("http://me:sesame@{free}?key=hidden"), options()).unwrap();
    let error = gone.generate(&Chat::ask([], "q"), &Sampling::default()).await.unwrap_err();
    for shown in [
        format!("{client:?}"),
        error.to_string(),
        format!("{error:?}"),
        ecso::error_chain(&error),
        format!("{gone:?}"),
    ] {
        assert!(!shown.contains("sesame") && !shown.contains("hidden"), "{shown}");
    }
}

#[tokio::test]
async fn a_key_that_no_header_can_hold_is_told_and_not_sent() {
    let options = Options { api_key: Some(SecretString::from("se\nsame")), ..options() };
    let client = OpenAi::new("http://127.0.0.1:9", options).unwrap();
    let error = client.generate(&Chat::ask([], "q"), &Sampling::default()).await.unwrap_err();
    assert!(
        matches!(&error, ModelError::Rejected(cause) if !cause.message().contains("same")),
        "{error}"
    );
}

#[tokio::test]
async fn whatever_answers_lives() {
    for (status, lives) in
        [(200, true), (401, true), (404, true), (429, true), (500, false), (503, false)]
    {
        let server = MockServer::start().await;
        let models = Mock::given(method("GET"))
            .and(path("/v1/models"))
            .respond_with(ResponseTemplate::new(status));
        models.expect(1).mount(&server).await;
        let health = client(&server).await.health().await;
        assert_eq!(health.is_ok(), lives, "{status}: {health:?}");
    }
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let gone = OpenAi::new(&format!("http://{free}"), options()).unwrap();
    assert!(matches!(gone.health().await, Err(ModelError::Transport(_))));
}

#[tokio::test]
async fn a_server_that_says_nothing_is_given_up_after_five_seconds() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client =
        OpenAi::new(&format!("http://{}", silent.local_addr().unwrap()), options()).unwrap();
    let health = tokio::time::timeout(Duration::from_secs(20), client.health()).await;
    assert_eq!(health, Ok(Err(ModelError::Timeout(Duration::from_secs(5)))));
}
