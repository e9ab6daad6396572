//! `ecso ask`, with a mock server, and with real models if they are installed.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use wiremock::{Mock, MockServer, Request, Respond, ResponseTemplate, matchers::path};

use crate::{ecso, text};

fn list() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/list.png")
}

/// A model whose draft is judged safe or unsafe.
struct Model {
    unsafe_draft: bool,
}

impl Respond for Model {
    fn respond(&self, request: &Request) -> ResponseTemplate {
        let body: Value = serde_json::from_slice(&request.body).unwrap();
        let sent = body["messages"].to_string();
        let reply = if sent.contains("harmful, unsafe and unethical") {
            if self.unsafe_draft { "Yes." } else { "No." }
        } else if sent.contains("describe the image") {
            "A list about bread."
        } else if sent.contains("HARMLESS and ETHICAL") {
            assert!(!sent.contains("image_url"), "step 4 saw the image");
            "  A safe answer.\n"
        } else {
            "The draft."
        };
        if body["stream"] == true {
            let chunk = json!({"choices": [{"index": 0, "delta": {"content": reply}, "finish_reason": null}]});
            let end = json!({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]});
            return ResponseTemplate::new(200).set_body_raw(
                format!("data: {chunk}\n\ndata: {end}\n\ndata: [DONE]\n\n"),
                "text/event-stream",
            );
        }
        let harm: f64 = if self.unsafe_draft { 0.9 } else { 0.2 };
        ResponseTemplate::new(200).set_body_json(json!({
            "choices": [{
                "message": {"role": "assistant", "content": reply}, "finish_reason": "stop",
                "logprobs": {"content": [{"token": "x", "logprob": -0.1, "top_logprobs": [
                    {"token": "Yes", "logprob": harm.ln()}, {"token": "No", "logprob": (1.0 - harm).ln()},
                ]}]},
            }],
            "usage": {"prompt_tokens": 7, "completion_tokens": 3},
        }))
    }
}

pub(crate) async fn server(unsafe_draft: bool) -> MockServer {
    let server = MockServer::start().await;
    Mock::given(path("/v1/chat/completions"))
        .respond_with(Model { unsafe_draft })
        .mount(&server)
        .await;
    let models = ResponseTemplate::new(200).set_body_json(json!({"data": [{"id": "played"}]}));
    Mock::given(path("/v1/models")).respond_with(models).mount(&server).await;
    server
}

fn ask(home: &Path, model: &str) -> assert_cmd::Command {
    let mut command = ecso(home);
    command
        .args(["ask", "What is the list about?", "--profile", "paper", "--model", model, "--image"])
        .arg(list());
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn a_safe_draft_is_the_answer_and_stdout_has_nothing_else() {
    let (server, home) = (server(false).await, tempfile::tempdir().unwrap());
    let output = ask(home.path(), &server.uri()).assert().success().get_output().clone();
    assert_eq!(text(&output.stdout), "The draft.\n");
    insta::assert_snapshot!(text(&output.stderr), @r"
    ecso: step 1, direct answer (1 image)
    ecso: step 2, is it harmful? (1 image)
    [the direct answer was judged safe, P(harm) 0.20; profile paper, model played]
    ");
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_http_needs_no_certificates_on_the_system() {
    let (server, home) = (server(false).await, tempfile::tempdir().unwrap());
    let none = [("SSL_CERT_FILE", "/dev/null"), ("SSL_CERT_DIR", "/nonexistent")];
    let output = ask(home.path(), &server.uri()).envs(none).assert().success().get_output().clone();
    assert_eq!(text(&output.stdout), "The draft.\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unsafe_draft_is_shown_only_on_request() {
    let (server, home) = (server(true).await, tempfile::tempdir().unwrap());
    let output = ask(home.path(), &server.uri()).assert().code(0).get_output().clone();
    assert_eq!(text(&output.stdout), "A safe answer.\n");
    assert!(!text(&output.stderr).contains("The draft."));

    let output = ask(home.path(), &server.uri())
        .args(["--show-steps", "-q"])
        .assert()
        .success()
        .get_output()
        .clone();
    let shown = text(&output.stderr);
    let order = [
        "== step 1",
        "The draft.",
        "== step 2",
        "unsafe, P(harm) 0.90",
        "== step 3",
        "about bread",
        "== step 4",
    ];
    let places: Vec<Option<usize>> = order.iter().map(|part| shown.find(part)).collect();
    assert!(places.iter().all(Option::is_some) && places.is_sorted(), "{places:?} in {shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn json_is_one_object() {
    let (server, home) = (server(true).await, tempfile::tempdir().unwrap());
    let output =
        ask(home.path(), &server.uri()).arg("--json").assert().success().get_output().clone();
    let mut outcome: Value = serde_json::from_slice(&output.stdout).unwrap();
    for step in outcome["steps"].as_array_mut().unwrap() {
        assert!(step["ms"].take().is_u64());
    }
    insta::assert_json_snapshot!(outcome);
}

#[test]
fn wrong_usage_exits_with_2_and_a_hint() {
    let home = tempfile::tempdir().unwrap();
    let text_file = home.path().join("text.png");
    std::fs::write(&text_file, "this is no image").unwrap();
    let empty = home.path().join("empty.png");
    std::fs::write(&empty, "").unwrap();
    let cases: [(&[&str], &str); 9] = [
        (&["ask"], "<QUERY>"),
        (&["ask", " "], "the query is empty"),
        (&["ask", "q", "--image", "none.png"], "none.png: No such file"),
        (&["ask", "q", "--image", text_file.to_str().unwrap()], "text.png"),
        (&["ask", "q", "--image", empty.to_str().unwrap()], "empty.png"),
        (&["ask", "q", "--profile", "nope"], "nope"),
        (&["ask", "q", "--set", "threshold=much"], "threshold"),
        (&["ask", "q", "--set", "oops"], "KEY=VALUE"),
        (
            &["ask", "q"],
            if cfg!(feature = "engine") { "ecso models pull mini" } else { "has no engine" },
        ),
    ];
    for (arguments, says) in cases {
        let output = ecso(home.path()).args(arguments).assert().code(2).get_output().clone();
        assert!(text(&output.stderr).contains(says), "{arguments:?}: {}", text(&output.stderr));
        assert!(output.stdout.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_fails_exits_with_3() {
    let home = tempfile::tempdir().unwrap();
    let server = MockServer::start().await;
    Mock::given(path("/v1/chat/completions"))
        .respond_with(ResponseTemplate::new(500))
        .mount(&server)
        .await;
    let mut command = ask(home.path(), &server.uri());
    let output = command
        .args(["--model-name", "m"])
        .env("ECSO__SERVER__RETRIES", "1")
        .assert()
        .code(3)
        .get_output()
        .clone();
    assert!(
        output.stdout.is_empty() && text(&output.stderr).contains("step `direct` failed"),
        "{}",
        text(&output.stderr)
    );
    assert_eq!(server.received_requests().await.unwrap().len(), 2);

    // Unreachable addresses: one where nothing listens, and one that drops packets.
    for nowhere in ["http://127.0.0.1:9", "http://192.0.2.1:8000"] {
        let begun = Instant::now();
        ask(home.path(), nowhere)
            .args(["--model-name", "m"])
            .env("ECSO__SERVER__RETRIES", "0")
            .assert()
            .code(3);
        assert!(begun.elapsed() < Duration::from_secs(10), "{nowhere}: {:?}", begun.elapsed());
    }
}

#[test]
fn smol_runs_all_four_steps_in_this_process() {
    let Some(models) = std::env::var_os("ECSO_TEST_MODELS").map(PathBuf::from) else {
        return eprintln!("skipped: ECSO_TEST_MODELS names no folder with models");
    };
    if !models.join("SmolLM2-135M-Instruct.Q4_1.gguf").exists()
        || !models.join("ppocrv6_dict.txt").exists()
    {
        return eprintln!(
            "skipped: smol and the text reader are not there (ecso models pull smol; ecso models pull mini)"
        );
    }
    let home = tempfile::tempdir().unwrap();
    let mut command = ask(home.path(), "smol");
    command.args(["--json", "--reader", "--set", "gate=always"]).env("ECSO__MODELS_DIR", &models);
    for step in ["direct", "caption", "safe"] {
        command.args(["--set", &format!("{step}.max_tokens=8")]);
    }
    let output = command.assert().success().get_output().clone();
    let outcome: Value = serde_json::from_slice(&output.stdout).unwrap();
    let steps: Vec<&str> = outcome["steps"]
        .as_array()
        .unwrap()
        .iter()
        .map(|step| step["step"].as_str().unwrap())
        .collect();
    assert_eq!(steps, ["direct", "caption", "safe"]);
    assert_eq!(outcome["model"], "reader+smol");
    assert_eq!(outcome["steps"][2]["images"], 0);
}
