//! What servers refuse, and what is made of it.

use std::{
    io::Write,
    sync::{Arc, Mutex},
    time::Duration,
};

use ecso::{Chat, Mllm, ModelError, Sampling};
use ecso_openai::{MaxTokensField, OpenAi, Options};
use serde_json::{Value, json};
use wiremock::{Mock, MockServer, Request, ResponseTemplate, matchers::method};

use super::{answer, bodies, client, options, sampling};

fn refusal(status: u16, message: &str, code: &str, param: &Value) -> ResponseTemplate {
    let error =
        json!({"message": message, "type": "invalid_request_error", "param": param, "code": code});
    ResponseTemplate::new(status).set_body_json(json!({"error": error}))
}

fn says(status: u16, message: &str) -> ResponseTemplate {
    refusal(status, message, "", &Value::Null)
}

/// What is refused, and how.
type Refusal = (fn(&Value) -> bool, ResponseTemplate);

/// A server that answers only requests without what `is_refused` finds in them.
async fn picky(refusals: Vec<Refusal>) -> MockServer {
    let server = MockServer::start().await;
    for (is_refused, refusal) in refusals {
        let matches = move |request: &Request| is_refused(&request.body_json().unwrap());
        Mock::given(matches).respond_with(refusal).mount(&server).await;
    }
    Mock::given(method("POST")).respond_with(answer("hi")).mount(&server).await;
    server
}

fn has(field: &'static str) -> impl Fn(&Value) -> bool {
    move |body| body.get(field).is_some()
}

async fn asks(client: &OpenAi, times: usize) {
    for _ in 0..times {
        assert_eq!(client.generate(&Chat::ask([], "q"), &sampling()).await.unwrap().text, "hi");
    }
}

/// Which requests had the field.
async fn had(server: &MockServer, field: &'static str) -> Vec<bool> {
    bodies(server).await.iter().map(has(field)).collect()
}

fn no_max_tokens() -> ResponseTemplate {
    let says = "Unsupported parameter: 'max_tokens' is not supported with this model. \
                Use 'max_completion_tokens' instead.";
    refusal(400, says, "unsupported_parameter", &json!("max_tokens"))
}

fn no_temperature() -> ResponseTemplate {
    let says = "Unsupported value: 'temperature' does not support 0 with this model. \
                Only the default (1) value is supported.";
    refusal(400, says, "unsupported_value", &json!("temperature"))
}

#[tokio::test]
async fn a_refused_max_tokens_goes_by_its_other_name_from_then_on() {
    let server = picky(vec![(|body| body.get("max_tokens").is_some(), no_max_tokens())]).await;
    asks(&client(&server).await, 2).await;
    assert_eq!(had(&server, "max_tokens").await, [true, false, false]);
    let named: Vec<Value> =
        bodies(&server).await.iter().map(|body| body["max_completion_tokens"].clone()).collect();
    assert_eq!(named, [Value::Null, json!(5), json!(5)]);
    assert_eq!(had(&server, "logprobs").await, [true; 3], "what is not refused stays");
}

#[tokio::test]
async fn a_named_field_is_sent_as_the_options_say_and_never_otherwise() {
    let server = picky(vec![(|body| body.get("max_tokens").is_some(), no_max_tokens())]).await;
    let fixed = |field| Options { max_tokens_field: field, ..options() };
    let client = OpenAi::connect(&server.uri(), fixed(MaxTokensField::MaxTokens)).await.unwrap();
    let error = client.generate(&Chat::ask([], "q"), &sampling()).await.unwrap_err();
    assert!(
        matches!(&error, ModelError::Rejected(cause) if cause.message().contains("max_tokens")),
        "{error}"
    );
    let client =
        OpenAi::connect(&server.uri(), fixed(MaxTokensField::MaxCompletionTokens)).await.unwrap();
    asks(&client, 1).await;
    assert_eq!(had(&server, "max_tokens").await, [true, false]);
}

#[tokio::test]
async fn a_model_that_refuses_one_field_after_the_other_is_answered_to_all() {
    let server = picky(vec![
        (|body| body.get("max_tokens").is_some(), no_max_tokens()),
        (|body| body.get("temperature").is_some(), no_temperature()),
        (
            |body| body.get("logprobs").is_some(),
            says(403, "You are not allowed to request logprobs from this model."),
        ),
    ])
    .await;
    asks(&client(&server).await, 2).await;
    assert_eq!(had(&server, "temperature").await, [true, true, false, false, false]);
    assert_eq!(had(&server, "logprobs").await, [true, true, true, false, false]);
}

#[tokio::test]
async fn fields_that_are_refused_by_name_are_left_out() {
    for (field, status) in [("temperature", 400), ("top_p", 422), ("seed", 400)] {
        let refused = has(field);
        let server = MockServer::start().await;
        let matches = move |request: &Request| refused(&request.body_json().unwrap());
        let refusal = says(status, &format!("{field} is not supported"));
        Mock::given(matches).respond_with(refusal).mount(&server).await;
        Mock::given(method("POST")).respond_with(answer("hi")).mount(&server).await;
        let client = client(&server).await;
        let sampling =
            Sampling { temperature: Some(0.2), top_p: Some(0.9), seed: Some(1), ..sampling() };
        for _ in 0..2 {
            assert_eq!(client.generate(&Chat::ask([], "q"), &sampling).await.unwrap().text, "hi");
        }
        for other in ["temperature", "top_p", "seed", "logprobs", "max_tokens"] {
            let expected = if other == field { [true, false, false] } else { [true; 3] };
            assert_eq!(had(&server, other).await, expected, "{field}: {other}");
        }
    }
}

#[tokio::test]
async fn a_refused_system_message_goes_into_the_first_user_turn() {
    for (status, message) in [
        (400, "System role not supported"),
        (400, "This model does not support system messages"),
        (400, "Conversation roles must alternate user/assistant/user/assistant/..."),
        (500, "Jinja Exception: System role not supported"),
    ] {
        let is_refused: fn(&Value) -> bool = |body| body["messages"][0]["role"] == "system";
        let server = picky(vec![(is_refused, says(status, message))]).await;
        let client = client(&server).await;
        for _ in 0..2 {
            let chat = Chat::ask([], "What is this?").with_system("Be brief.");
            assert_eq!(client.generate(&chat, &sampling()).await.unwrap().text, "hi");
        }
        let messages: Vec<Value> =
            bodies(&server).await.into_iter().map(|mut body| body["messages"].take()).collect();
        let folded = json!([{"role": "user", "content": "Be brief.\n\nWhat is this?"}]);
        assert_eq!(messages.len(), 3, "{message}");
        assert_eq!(messages[1..], [folded.clone(), folded], "{message}");
    }
}

#[tokio::test]
async fn a_server_that_breaks_over_log_probabilities_is_asked_without() {
    let server =
        picky(vec![(|body| body.get("logprobs").is_some(), ResponseTemplate::new(500))]).await;
    let options = Options { retries: 1, ..options() };
    asks(&OpenAi::connect(&server.uri(), options).await.unwrap(), 2).await;
    // With them once more: it was not only unwell.
    assert_eq!(had(&server, "logprobs").await, [true, true, false, true, false]);
}

#[tokio::test]
async fn a_server_that_is_broken_anyway_is_asked_once_more_without_log_probabilities() {
    let server = MockServer::start().await;
    Mock::given(method("POST")).respond_with(ResponseTemplate::new(500)).mount(&server).await;
    let options = Options { retries: 2, ..options() };
    let client = OpenAi::connect(&server.uri(), options).await.unwrap();
    assert!(matches!(
        client.generate(&Chat::ask([], "q"), &sampling()).await,
        Err(ModelError::Transport(_))
    ));
    assert_eq!(had(&server, "logprobs").await, [true, true, true, false]);
}

#[tokio::test]
async fn a_failure_that_passes_costs_no_log_probabilities() {
    let server = MockServer::start().await;
    Mock::given(method("POST"))
        .respond_with(ResponseTemplate::new(500))
        .up_to_n_times(1)
        .mount(&server)
        .await;
    Mock::given(method("POST")).respond_with(answer("hi")).mount(&server).await;
    asks(&client(&server).await, 2).await;
    assert_eq!(had(&server, "logprobs").await, [true; 3]);
}

#[tokio::test]
async fn a_server_that_was_unwell_for_a_while_teaches_nothing() {
    let server = MockServer::start().await;
    // As often as it is tried, and no more.
    let tries = u64::try_from(options().retries).unwrap() + 1;
    Mock::given(method("POST"))
        .respond_with(ResponseTemplate::new(500))
        .up_to_n_times(tries)
        .mount(&server)
        .await;
    Mock::given(method("POST")).respond_with(answer("hi")).mount(&server).await;
    let client = client(&server).await;
    asks(&client, 2).await;
    let had = had(&server, "logprobs").await;
    // Without them it answers, and then with them too: they are kept.
    assert_eq!(had[usize::try_from(tries).unwrap()..], [false, true, true]);
}

#[tokio::test]
async fn other_models_keep_their_log_probabilities() {
    let is_refused: fn(&Value) -> bool =
        |body| body["model"] == "m" && body.get("logprobs").is_some();
    let server = picky(vec![(is_refused, says(400, "no logprobs here"))]).await;
    let client = client(&server).await;
    asks(&client, 2).await;
    asks(&client.with_model_and_key("other", None), 1).await;
    asks(&client.with_model_and_key("m", None), 1).await;
    assert_eq!(had(&server, "logprobs").await, [true, false, false, true, false]);
}

#[tokio::test]
async fn missing_log_probabilities_are_tried_again_after_a_while() {
    let server =
        picky(vec![(|body| body.get("logprobs").is_some(), says(400, "Bad request"))]).await;
    let options = Options { forget_after: Duration::from_millis(300), ..options() };
    let client = OpenAi::connect(&server.uri(), options).await.unwrap();
    asks(&client, 2).await;
    tokio::time::sleep(Duration::from_millis(400)).await;
    asks(&client, 2).await;
    assert_eq!(had(&server, "logprobs").await, [true, false, false, true, false, false]);
}

#[tokio::test]
async fn a_guess_that_did_not_help_is_not_remembered() {
    let server = MockServer::start().await;
    Mock::given(method("POST")).respond_with(says(400, "Bad request")).mount(&server).await;
    let client = client(&server).await;
    for _ in 0..2 {
        let error = client.generate(&Chat::ask([], "q"), &sampling()).await.unwrap_err();
        assert!(matches!(error, ModelError::Rejected(_)), "{error}");
    }
    assert_eq!(had(&server, "logprobs").await, [true, false, true, false]);
}

#[tokio::test]
async fn a_guess_is_not_remembered_where_something_else_was_the_matter_too() {
    let server = picky(vec![
        (|body| body.get("logprobs").is_some(), says(400, "Bad request")),
        (|body| body.get("max_tokens").is_some(), no_max_tokens()),
    ])
    .await;
    asks(&client(&server).await, 3).await;
    assert_eq!(had(&server, "logprobs").await, [true, false, false, true, false, false]);
    assert_eq!(had(&server, "max_tokens").await, [true, true, false, false, false, false]);
}

#[tokio::test]
async fn an_error_about_another_field_takes_no_log_probabilities() {
    for message in
        ["top_p must be in (0, 1]", "'max_tokens' is too large: the context has 5 tokens"]
    {
        let server = MockServer::start().await;
        Mock::given(method("POST")).respond_with(says(400, message)).expect(1).mount(&server).await;
        let sampling = Sampling { top_p: Some(2.0), ..sampling() };
        let error =
            client(&server).await.generate(&Chat::ask([], "q"), &sampling).await.unwrap_err();
        assert!(matches!(error, ModelError::Rejected(_)), "{error}");
    }
    let stream_options: fn(&Value) -> bool = |body| body.get("stream_options").is_some();
    let server = MockServer::start().await;
    Mock::given(move |request: &Request| stream_options(&request.body_json().unwrap()))
        .respond_with(says(400, "Unknown field: stream_options"))
        .mount(&server)
        .await;
    let end = "data: {\"choices\": [{\"delta\": {\"content\": \"hi\"}, \"finish_reason\": \"stop\"}]}\n\n";
    Mock::given(method("POST"))
        .respond_with(ResponseTemplate::new(200).set_body_string(end))
        .mount(&server)
        .await;
    let client = client(&server).await;
    for _ in 0..2 {
        let stream = client.stream(&Chat::ask([], "q"), &sampling()).await.unwrap();
        assert_eq!(ecso::collect(stream).await.unwrap().text, "hi");
    }
    assert_eq!(had(&server, "stream_options").await, [true, false, false]);
    assert_eq!(had(&server, "logprobs").await, [true; 3]);
}

#[tokio::test]
async fn omitted_fields_are_never_sent() {
    let server = picky(vec![]).await;
    let options = Options { omit: vec!["temperature".into(), "logprobs".into()], ..options() };
    asks(&OpenAi::connect(&server.uri(), options).await.unwrap(), 1).await;
    assert_eq!(had(&server, "temperature").await, [false]);
    assert_eq!(had(&server, "logprobs").await, [false]);
    assert_eq!(had(&server, "max_tokens").await, [true]);
}

#[tokio::test]
async fn each_finding_is_told_once() {
    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);
    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::WARN)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    let _guard = tracing_subscriber::util::SubscriberInitExt::set_default(subscriber);
    let server = picky(vec![
        (|body| body.get("temperature").is_some(), no_temperature()),
        (|body| body.get("logprobs").is_some(), says(400, "no logprobs here")),
    ])
    .await;
    // Other tests may have said meanwhile that nobody listens.
    tracing::callsite::rebuild_interest_cache();
    let options = Options { forget_after: Duration::ZERO, ..options() };
    asks(&OpenAi::connect(&server.uri(), options).await.unwrap(), 3).await;
    let told = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    let ours: Vec<&str> = told.lines().filter(|line| line.contains("ecso_openai")).collect();
    assert_eq!(ours.len(), 2, "{told}");
    assert!(
        told.contains("temperature is left out") && told.contains("logprobs is left out"),
        "{told}"
    );
}

#[tokio::test]
async fn a_filter_in_front_of_a_model_is_told_as_one() {
    for (status, error) in [
        (
            400,
            json!({"code": "content_filter", "innererror": {"code": "ResponsibleAIPolicyViolation"}}),
        ),
        (400, json!({"code": "content_policy_violation", "message": "no"})),
        (403, json!({"code": "moderation_blocked", "message": "no"})),
        (400, json!({"code": "data_inspection_failed", "message": "no"})),
    ] {
        let server = MockServer::start().await;
        let refusal = ResponseTemplate::new(status).set_body_json(json!({"error": error}));
        Mock::given(method("POST")).respond_with(refusal).expect(1).mount(&server).await;
        let found =
            client(&server).await.generate(&Chat::ask([], "q"), &sampling()).await.unwrap_err();
        assert!(matches!(found, ModelError::Filtered(_)), "{error}: {found}");
    }
}
