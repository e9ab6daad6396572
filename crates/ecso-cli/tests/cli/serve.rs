//! `ecso serve` as a separate process with real sockets.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use futures::{StreamExt, stream};
use serde_json::{Value, json};

use crate::upstream::{LEAK, MILD, SAFE, Upstream};

/// A running `ecso serve`; killed when it is dropped.
pub(crate) struct Served {
    process: Child,
    pub(crate) url: String,
    _home: tempfile::TempDir,
}

impl Served {
    /// `settings` are written as `gateway.limits.queue=0`; names in capitals are variables.
    pub(crate) fn start(upstream: &str, settings: &[&str], arguments: &[&str]) -> Self {
        Self::run(Command::new(assert_cmd::cargo::cargo_bin("ecso")), upstream, settings, arguments)
    }

    /// Starts with a limit of file descriptors.
    pub(crate) fn with_descriptors(count: usize, upstream: &str, settings: &[&str]) -> Self {
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("ulimit -n {count} && exec \"$0\" \"$@\"")]);
        shell.arg(assert_cmd::cargo::cargo_bin("ecso"));
        Self::run(shell, upstream, settings, &[])
    }

    fn run(mut command: Command, upstream: &str, settings: &[&str], arguments: &[&str]) -> Self {
        let home = tempfile::tempdir().unwrap();
        let mut process = command
            .args(["serve", "--upstream", upstream, "--listen", "127.0.0.1:0"])
            .args(arguments)
            .env_clear()
            .env("HOME", home.path())
            // The mock plays the four steps; flags and files override the profile.
            .envs((!arguments.contains(&"--config")).then_some(("ECSO__PROFILE", "paper")))
            .envs(settings.iter().map(|pair| {
                let (key, value) = pair.split_once('=').unwrap();
                if !key.contains(char::is_lowercase) {
                    return (key.to_owned(), value);
                }
                (format!("ECSO__{}", key.to_uppercase().replace('.', "__")), value)
            }))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(process.stderr.take().unwrap());
        let mut greeting = String::new();
        said.read_line(&mut greeting).unwrap();
        let url =
            greeting.split("on ").nth(1).and_then(|rest| rest.split(' ').next()).map(str::to_owned);
        // The log is read, so that the process does not block.
        std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
        Self { process, url: url.unwrap_or_else(|| panic!("no greeting: {greeting}")), _home: home }
    }

    pub(crate) fn chat(&self) -> String {
        format!("{}/chat/completions", self.url)
    }

    /// Peak memory in MB.
    pub(crate) fn peak(&self) -> f64 {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub(crate) fn picture() -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/list.png");
    format!("data:image/png;base64,{}", BASE64_STANDARD.encode(std::fs::read(file).unwrap()))
}

pub(crate) fn ask(model: &str, query: &str, stream: bool) -> Value {
    json!({"model": model, "stream": stream, "messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": picture()}}, {"type": "text", "text": query},
    ]}]})
}

#[derive(Debug)]
pub(crate) struct Got {
    pub(crate) status: u16,
    pub(crate) headers: reqwest::header::HeaderMap,
    pub(crate) body: String,
}

pub(crate) async fn post(url: &str, body: &Value) -> Got {
    let response = client().post(url).json(body).send().await.unwrap();
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    Got { status, headers, body: response.text().await.unwrap_or_default() }
}

pub(crate) fn client() -> reqwest::Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().timeout(Duration::from_mins(1)).build().unwrap()
}

/// The text of all deltas, the `ecso` object, and whether an error ended it.
pub(crate) fn read_stream(body: &str) -> (String, Value, Option<Value>) {
    let (mut text, mut ecso, mut error) = (String::new(), Value::Null, None);
    for line in
        body.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|line| *line != "[DONE]")
    {
        let event: Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"));
        text.push_str(event["choices"][0]["delta"]["content"].as_str().unwrap_or_default());
        if !event["ecso"].is_null() {
            ecso = event["ecso"].clone();
        }
        if !event["error"].is_null() {
            error = Some(event["error"].clone());
        }
    }
    (text, ecso, error)
}

#[tokio::test(flavor = "multi_thread")]
async fn safe_drafts_are_sent_unchanged_and_unsafe_ones_never() {
    let upstream = Upstream::start().await;
    let served = Served::start(&upstream.url, &[], &[]);
    for (query, expected, verdict) in
        [("What is on the list?", MILD, "safe"), ("A bad request", SAFE, "unsafe")]
    {
        let got = post(&served.chat(), &ask("m", query, false)).await;
        let answer: Value = serde_json::from_str(&got.body).unwrap();
        assert_eq!((got.status, &got.headers["x-ecso-verdict"]), (200, &verdict.parse().unwrap()));
        assert_eq!(answer["choices"][0]["message"]["content"], expected);
        // Unknown fields may contain unjudged text and are removed; the id is replaced, so that the
        // original can't be fetched.
        assert!(
            answer.get("kept").is_none()
                && answer["id"].as_str().unwrap().starts_with("chatcmpl-ecso-")
        );
        assert!(
            answer["usage"]["total_tokens"].as_u64().unwrap() >= 15 && !got.body.contains(LEAK)
        );

        let got = post(&served.chat(), &ask("m", query, true)).await;
        let (text, ecso, error) = read_stream(&got.body);
        assert_eq!(
            (text.as_str(), ecso["verdict"].as_str().unwrap(), error),
            (expected, verdict, None)
        );
        assert!(got.body.ends_with("data: [DONE]\n\n") && !got.body.contains(LEAK));
        assert!(got.headers.contains_key("x-ecso-request-id"));
    }
    // Text alone is out of scope and forwarded, streamed or not.
    let text =
        json!({"model": "m", "messages": [{"role": "user", "content": "a bad request in text"}]});
    let got = post(&served.chat(), &text).await;
    assert!(got.body.contains(LEAK) && !got.headers.contains_key("x-ecso-verdict"));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_choice_is_judged_and_the_answer_has_the_clients_format() {
    let upstream = Upstream::start().await;
    let served = Served::start(&upstream.url, &[], &[]);
    let mut body = ask("m", "A bad request", false);
    (body["n"], body["response_format"]) = (json!(3), json!({"type": "json_object"}));
    let got = post(&served.chat(), &body).await;
    let answer: Value = serde_json::from_str(&got.body).unwrap();
    let said: Vec<&str> = answer["choices"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|choice| choice["message"]["content"].as_str())
        .collect();
    assert_eq!(said, [MILD, MILD, "Here is a harmless answer. (json_object)"]);
    assert!(!got.body.contains(LEAK));

    let asked =
        json!({"query": "q", "images": [picture()], "answer": format!("{LEAK}!"), "model": "m"});
    let found: Value =
        serde_json::from_str(&post(&format!("{}/guard", served.url), &asked).await.body).unwrap();
    assert_eq!((&found["verdict"], &found["safe_answer"]), (&json!("unsafe"), &json!(SAFE)));
    assert_eq!(found["captions"], json!(["A list."]));
}

/// Each fault in each step, plain and streamed: a correct answer or a correct error, and no
/// unjudged text.
#[tokio::test(flavor = "multi_thread")]
async fn a_failing_upstream_is_an_error_and_leaks_nothing() {
    let upstream = Upstream::start().await;
    let served = Served::start(
        &upstream.url,
        &["server.retries=0", "server.reply_timeout=2", "gateway.limits.deadline=6"],
        &[],
    );
    let mut cases = Vec::new();
    for fault in [
        "refuse", "hang", "reset", "sse", "cut", "utf8", "429", "500", "json", "endless", "slow",
        "stall",
    ] {
        for step in ["direct", "detect", "caption", "safe"] {
            cases.extend([false, true].map(|streamed| (fault, step, streamed)));
        }
    }
    let asked = stream::iter(cases).map(|(fault, step, streamed)| {
        let url = served.chat();
        async move {
            let body = ask(&format!("{fault}@{step}"), "A bad request", streamed);
            (fault, step, streamed, post(&url, &body).await)
        }
    });
    let mut table = Vec::new();
    for (fault, step, streamed, got) in asked.buffered(16).collect::<Vec<_>>().await {
        let case = format!("{fault}@{step} streamed {streamed}: {} {}", got.status, got.body);
        assert!(!got.body.contains(LEAK), "{case}");
        let outcome = if got.status != 200 {
            let error: Value = serde_json::from_str(&got.body).unwrap_or_else(|_| panic!("{case}"));
            assert!(error["error"]["message"].is_string(), "{case}");
            format!("{}", got.status)
        } else if streamed {
            let (text, ecso, error) = read_stream(&got.body);
            if error.is_none() {
                assert_eq!((text.as_str(), &ecso["verdict"]), (SAFE, &json!("unsafe")), "{case}");
            } else {
                assert!(!got.body.contains("[DONE]"), "{case}");
            }
            error.map_or("safe answer".to_owned(), |error| format!("event {}", error["code"]))
        } else {
            let answer: Value = serde_json::from_str(&got.body).unwrap();
            assert_eq!(answer["choices"][0]["message"]["content"], SAFE, "{case}");
            "safe answer".to_owned()
        };
        table.push((fault, step, streamed, outcome));
    }
    let harmless = |fault: &str, step: &str, streamed: bool| match fault {
        "utf8" | "slow" => true,
        // Faults of streams do not occur elsewhere; steps 2 and 3 are never streamed.
        "sse" | "cut" | "stall" => {
            step == "detect" || step == "caption" || (step == "direct" && !streamed)
        }
        _ => false,
    };
    for (fault, step, streamed, outcome) in &table {
        eprintln!("{fault:8} {step:8} {} {outcome}", if *streamed { "stream" } else { "plain " });
        assert_eq!(
            outcome == "safe answer",
            harmless(fault, step, *streamed),
            "{fault} {step} {streamed}"
        );
    }
}

/// The same for streams that are judged in windows of one token: only judged text is sent.
#[tokio::test(flavor = "multi_thread")]
async fn a_failing_upstream_leaks_nothing_out_of_windows() {
    let upstream = Upstream::start().await;
    let common = [
        "server.retries=0",
        "server.reply_timeout=2",
        "gateway.limits.deadline=6",
        "gateway.windows.held=0",
    ];
    for more in ["gateway.stream=windowed", "gateway.early_stop=true"] {
        let settings = [&common[..], &["gateway.windows.first=1", more]].concat();
        let served = Served::start(&upstream.url, &settings, &[]);
        let faults = [
            "none", "refuse", "hang", "reset", "sse", "cut", "utf8", "429", "500", "json",
            "endless", "slow", "stall",
        ];
        let cases = faults
            .into_iter()
            .flat_map(|fault| ["direct", "detect", "caption", "safe"].map(|step| (fault, step)));
        let all = stream::iter(cases).map(|(fault, step)| {
            let url = served.chat();
            async move {
                (
                    fault,
                    step,
                    post(&url, &ask(&format!("{fault}@{step}"), "A bad request", true)).await,
                )
            }
        });
        let all: Vec<_> = all.buffer_unordered(16).collect().await;
        let mut early = 0;
        for (fault, step, got) in all {
            let case = format!("{more} {fault}@{step}: {} {:.2000}", got.status, got.body);
            assert!(!got.body.contains(LEAK), "{case}");
            if got.status != 200 {
                continue;
            }
            let (text, ecso, error) = read_stream(&got.body);
            let is_stopped = got.body.contains("\"content_filter\"");
            early += usize::from(is_stopped);
            let is_endless = fault == "endless" && error.is_some();
            assert!(SAFE.starts_with(&text) || "Sure: ".starts_with(&text) || is_endless, "{case}");
            assert_eq!(error.is_none(), got.body.contains("[DONE]"), "{case}");
            assert!(
                error.is_some() || (ecso["verdict"] == "unsafe" && (text == SAFE || is_stopped)),
                "{case}"
            );
            assert!(fault != "none" || error.is_none(), "{case}");
        }
        assert_eq!(early > 0, more.ends_with("windowed"), "{more}");
    }
}

/// The same for Responses and Messages, each with its own errors.
#[tokio::test(flavor = "multi_thread")]
async fn a_failing_upstream_is_an_error_in_every_format() {
    let upstream = Upstream::start().await;
    let served =
        Served::start(&upstream.url, &["server.retries=0", "gateway.limits.deadline=20"], &[]);
    let (picture, query) = (picture(), "A bad request");
    let data = picture.split(',').nth(1).unwrap();
    for (path, last) in [("responses", "response.failed"), ("messages", "error")] {
        for fault in ["refuse", "reset", "sse", "cut", "utf8", "429", "500", "json", "endless"] {
            for (step, streamed) in [
                ("direct", false),
                ("direct", true),
                ("detect", false),
                ("detect", true),
                ("safe", true),
            ] {
                let mut body = json!({"model": format!("{fault}@{step}"), "stream": streamed});
                if path == "responses" {
                    body["input"] = json!([{"role": "user", "content": [
                        {"type": "input_image", "image_url": picture}, {"type": "input_text", "text": query}]}]);
                } else {
                    let image = json!({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}});
                    body["max_tokens"] = 50.into();
                    body["messages"] = json!([{"role": "user", "content": [image, {"type": "text", "text": query}]}]);
                }
                let got = post(&format!("{}/{path}", served.url), &body).await;
                let case = format!(
                    "{path} {fault}@{step} streamed {streamed}: {} {}",
                    got.status, got.body
                );
                assert!(!got.body.contains(LEAK), "{case}");
                if got.status != 200 {
                    let error: Value =
                        serde_json::from_str(&got.body).unwrap_or_else(|_| panic!("{case}"));
                    assert!(error["error"]["message"].is_string(), "{case}");
                    assert_eq!(error["type"] == "error", path == "messages", "{case}");
                } else if !got.body.contains(SAFE) {
                    let event = got
                        .body
                        .rsplit("event: ")
                        .next()
                        .and_then(|event| event.split('\n').next());
                    assert_eq!(event, Some(last), "{case}");
                }
                if fault == "utf8" {
                    assert!(got.body.contains(SAFE), "{case}");
                }
            }
        }
    }
}

/// Stored conversations take bounded memory: the oldest are dropped.
#[tokio::test(flavor = "multi_thread")]
async fn kept_conversations_are_bounded() {
    let upstream = Upstream::start().await;
    let served = Served::start(&upstream.url, &["gateway.limits.stored=3000000"], &[]);
    let ask = async |input: String, before: Value| {
        let body = json!({"model": "m", "input": input, "previous_response_id": before});
        let got = post(&format!("{}/responses", served.url), &body).await;
        serde_json::from_str::<Value>(&got.body).unwrap()
    };
    let long = || "flour ".repeat(200_000);
    let first = ask(long(), Value::Null).await["id"].clone();
    assert!(first.is_string());
    let mut last = Value::Null;
    for _ in 0..20 {
        last = ask(long(), Value::Null).await["id"].clone();
    }
    let warm = served.peak();
    for _ in 0..80 {
        last = ask(long(), Value::Null).await["id"].clone();
    }
    assert!(served.peak() < warm + 40.0, "{warm} MB, then {} MB", served.peak());
    assert_eq!(ask("And?".into(), first).await["error"]["code"], "previous_response_not_found");
    assert_eq!(ask("And?".into(), last).await["status"], "completed");
}

/// Fail-open is optional, and is marked in the answer.
#[tokio::test(flavor = "multi_thread")]
async fn failing_open_sends_the_draft_with_a_note() {
    let upstream = Upstream::start().await;
    let served =
        Served::start(&upstream.url, &["server.retries=0", "gateway.on_failure=fail-open"], &[]);
    let got = post(&served.chat(), &ask("500@detect", "What is on the list?", false)).await;
    assert_eq!((got.status, &got.headers["x-ecso-verdict"]), (200, &"unchecked".parse().unwrap()));
    assert!(got.body.contains(MILD) && got.headers.contains_key("x-ecso-failure"));
    let got = post(&served.chat(), &ask("500@detect", "What is on the list?", true)).await;
    let (text, ecso, _) = read_stream(&got.body);
    assert_eq!((text.as_str(), ecso["failure"].is_string()), (MILD, true));
}

/// The work for a client that disconnects is cancelled, in every step.
#[tokio::test(flavor = "multi_thread")]
async fn a_disconnected_client_cancels_the_upstream() {
    let upstream = Upstream::start().await;
    let served = Served::start(&upstream.url, &[], &[]);
    for (place, (step, streamed)) in ["direct", "detect", "caption", "safe"]
        .into_iter()
        .flat_map(|step| [(step, false), (step, true)])
        .enumerate()
    {
        let body = ask(&format!("hang@{step}"), "A bad request", streamed);
        let impatient = client()
            .post(served.chat())
            .json(&body)
            .timeout(Duration::from_millis(700))
            .send()
            .await;
        if let Ok(response) = impatient {
            let text = response.text().await.unwrap_or_default();
            assert!(!text.contains(LEAK));
        }
        let begun = Instant::now();
        while upstream.seen.abandoned.load(Ordering::Relaxed) <= place {
            assert!(
                begun.elapsed() < Duration::from_secs(5),
                "{step} {streamed}: the upstream still works"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// 10,000 requests at 200 connections while a tenth of the upstream's calls fail.
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_requests_on_a_flaky_upstream() {
    let upstream = Upstream::start().await;
    let served =
        Served::start(&upstream.url, &["server.retries=0", "gateway.limits.queue=4096"], &[]);
    let (client, chat) = (client(), served.chat());
    let bodies: Vec<Vec<u8>> = [
        ("What is on the list?", false),
        ("A bad one", false),
        ("A list?", true),
        ("A bad one", true),
    ]
    .into_iter()
    .map(|(query, streamed)| ask("flaky", query, streamed).to_string().into_bytes())
    .collect();
    let round = |count: usize| {
        let (client, chat, bodies) = (&client, &chat, &bodies);
        stream::iter(0..count)
            .map(move |number| async move {
                let request = client.post(chat).header("content-type", "application/json");
                let response = request.body(bodies[number % 4].clone()).send().await.unwrap();
                let (status, kind) = (response.status().as_u16(), number % 4);
                let body = response.text().await.unwrap();
                assert!(!body.contains(LEAK), "{number}: {body}");
                let answered =
                    match (status, kind >= 2) {
                        (200, false) => serde_json::from_str::<Value>(&body).unwrap()["choices"][0]
                            ["message"]["content"]
                            .as_str()
                            .unwrap()
                            .to_owned(),
                        (200, true) => {
                            let (text, _, error) = read_stream(&body);
                            if let Some(error) = error {
                                assert!(error["code"].is_string());
                                return false;
                            }
                            text
                        }
                        _ => {
                            assert!(
                                body.contains("\"error\"") && status >= 500,
                                "{status}: {body}"
                            );
                            return false;
                        }
                    };
                assert_eq!(answered, if kind % 2 == 0 { MILD } else { SAFE });
                true
            })
            .buffer_unordered(200)
            .fold((0, 0), |(good, bad), answered| async move {
                if answered { (good + 1, bad) } else { (good, bad + 1) }
            })
    };
    let first = round(2_000).await;
    let warm = served.peak();
    let second = round(8_000).await;
    let (good, bad) = (first.0 + second.0, first.1 + second.1);
    let calls = upstream.seen.calls.load(Ordering::Relaxed);
    let failed = upstream.seen.failed.load(Ordering::Relaxed);
    eprintln!(
        "{good} answered, {bad} errors; {calls} calls, {failed} of them failed; peak {warm:.0} MB after 2,000, \
         {:.0} MB after 10,000",
        served.peak()
    );
    assert_eq!(good + bad, 10_000);
    // Each failed call costs one request and no other.
    assert!(bad > 500 && bad <= failed, "{bad} {failed}");
    assert!(served.peak() < warm * 1.3 + 10.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_queue_and_sigterm() {
    let upstream = Upstream::start().await;
    let made =
        Command::new(assert_cmd::cargo::cargo_bin("ecso")).args(["key", "app"]).output().unwrap();
    let key = String::from_utf8(made.stdout).unwrap().trim().to_owned();
    let stanza = String::from_utf8(made.stderr).unwrap();
    let home = tempfile::tempdir().unwrap();
    let config = home.path().join("config.toml");
    std::fs::write(&config, stanza.split_once("config.toml:").unwrap().1).unwrap();
    let mut served = Served::start(
        &upstream.url,
        &["profile=paper", "gateway.limits.at_once=1", "gateway.limits.queue=0"],
        &["--config", config.to_str().unwrap()],
    );
    let got = post(&served.chat(), &ask("m", "q", false)).await;
    assert_eq!((got.status, got.body.contains("invalid_api_key")), (401, true));

    let client = client();
    let ask_with_key = |model: &str| {
        client.post(served.chat()).bearer_auth(&key).json(&ask(model, "What?", true)).send()
    };
    let called = async |times: usize| {
        while upstream.seen.calls.load(Ordering::Relaxed) < times {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    // While one request runs there is no room for another.
    let first = tokio::spawn(ask_with_key("stall@direct"));
    called(1).await;
    let second = ask_with_key("m").await.unwrap();
    let (status, waits) = (second.status().as_u16(), second.headers().contains_key("retry-after"));
    assert_eq!((status, waits), (429, true), "{}", second.text().await.unwrap());
    drop(first.await);
    while upstream.seen.abandoned.load(Ordering::Relaxed) == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    let slow = ask_with_key("slow@direct");
    let slow = tokio::spawn(async move { slow.await.unwrap().text().await.unwrap() });
    called(2).await;
    // SIGTERM: no new work, the running request finishes, the process exits with 0.
    let pid = served.process.id().to_string();
    Command::new("kill").args(["-TERM", &pid]).status().unwrap();
    assert_eq!(read_stream(&slow.await.unwrap()).0, MILD);
    assert!(served.process.wait().unwrap().success());
    assert!(
        client
            .post(served.chat())
            .bearer_auth(&key)
            .json(&ask("m", "q", false))
            .send()
            .await
            .is_err()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_audit_log_can_be_replayed_and_is_input_for_data() {
    let upstream = Upstream::start().await;
    let folder = tempfile::tempdir().unwrap();
    let run = |content: bool, name: &str| {
        let log = folder.path().join(name);
        let (path, content) = (
            format!("gateway.audit.path={}", log.display()),
            format!("gateway.audit.content={content}"),
        );
        (Served::start(&upstream.url, &[&path, &content], &[]), log)
    };
    let (plain, log) = run(false, "plain.jsonl");
    post(&plain.chat(), &ask("m", "A bad request", false)).await;
    let text = std::fs::read_to_string(log).unwrap();
    assert!(
        !text.contains(LEAK)
            && !text.contains("bad request")
            && text.contains("\"verdict\":\"unsafe\""),
        "{text}"
    );

    let (served, log) = run(true, "audit.jsonl");
    for (query, stream) in [("What is on the list?", false), ("A bad request", true)] {
        post(&served.chat(), &ask("m", query, stream)).await;
    }
    drop(served);
    let lines: Vec<Value> = std::fs::read_to_string(&log)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(
        (lines.len(), &lines[0]["verdict"], &lines[1]["verdict"]),
        (2, &json!("safe"), &json!("unsafe"))
    );
    assert!(lines[1]["draft"].as_str().unwrap().contains(LEAK));
    assert_eq!(lines[1]["answer"], SAFE);

    let program = |arguments: &[&str]| {
        let output = crate::ecso(folder.path())
            .args(arguments)
            .args(["--model", &upstream.url, "--model-name", "m"])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", crate::text(&output.stderr));
        crate::text(&output.stdout)
    };
    let log = log.to_str().unwrap();
    let replayed: Value =
        serde_json::from_str(&program(&["replay", log, "--json", "--profile", "paper"])).unwrap();
    assert_eq!((&replayed["judged"], &replayed["changed"]), (&json!(2), &json!([])));
    // Unchecked answers have no verdict.
    let unguarded = [
        "replay",
        log,
        "--json",
        "--profile",
        "paper",
        "--set",
        "gate=never",
        "--model",
        &upstream.url,
        "--model-name",
        "m",
    ];
    let silent = crate::ecso(folder.path()).args(unguarded).assert().code(1);
    let silent: Value = serde_json::from_slice(&silent.get_output().stdout).unwrap();
    assert_eq!((&silent["judged"], &silent["unguarded"]), (&json!(0), &json!(2)));
    // The log is not overwritten, whatever path leads to it.
    let before = std::fs::read(log).unwrap();
    let link = folder.path().join("link");
    std::fs::hard_link(log, &link).unwrap();
    for out in [log, link.to_str().unwrap()] {
        let over = [
            "replay",
            log,
            "--profile",
            "paper",
            "--model",
            &upstream.url,
            "--model-name",
            "m",
            "--out",
            out,
        ];
        let output = crate::ecso(folder.path()).args(over).assert().code(2);
        assert!(crate::text(&output.get_output().stderr).contains("this is the audit log"));
        assert_eq!(std::fs::read(log).unwrap(), before);
    }
    let whole =
        ["replay", folder.path().to_str().unwrap(), "--model", &upstream.url, "--model-name", "m"];
    crate::ecso(folder.path()).args(whole).assert().code(2);

    let nobody = [
        "replay",
        log,
        "--profile",
        "paper",
        "--model",
        "http://127.0.0.1:9/v1",
        "--model-name",
        "m",
    ];
    let output = crate::ecso(folder.path()).args(nobody).assert().code(3);
    assert!(crate::text(&output.get_output().stderr).contains("2 lines could not be judged"));

    let out = folder.path().join("made");
    let made = program(&[
        "synth",
        "--input",
        log,
        "--out",
        out.to_str().unwrap(),
        "--profile",
        "paper",
        "--json",
    ]);
    let manifest: Value = serde_json::from_str(&made).unwrap();
    let failed = std::fs::read_to_string(out.join("dataset/failed.jsonl")).unwrap();
    assert_eq!((&manifest["rows"], &manifest["safe"]), (&json!(2), &json!(1)), "{failed}");
    let chosen = std::fs::read_to_string(out.join("dataset/messages/train.jsonl"))
        .unwrap_or_default()
        + &std::fs::read_to_string(out.join("dataset/messages/validation.jsonl"))
            .unwrap_or_default();
    assert!(chosen.contains(SAFE) && !chosen.contains(LEAK), "{chosen}");
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_health_rate_limits_and_reload() {
    let upstream = Upstream::start().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.toml");
    let write = |profile: &str, per_minute: u32| {
        let text = format!(
            "profile = \"{profile}\"\n[gateway]\nmetrics = true\n[gateway.limits]\nper_minute = {per_minute}\n"
        );
        std::fs::write(&file, text).unwrap();
    };
    write("paper", 3);
    let served = Served::start(&upstream.url, &[], &["--config", file.to_str().unwrap()]);
    let root = served.url.trim_end_matches("/v1").to_owned();
    let get = async |path: &str| {
        let response = client().get(format!("{root}{path}")).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    };
    assert_eq!((get("/healthz").await.0, get("/readyz").await.0), (200, 200));
    for (query, status) in
        [("What is on the list?", 200), ("A bad request", 200), ("m", 200), ("one too many", 429)]
    {
        let got = post(&served.chat(), &ask("m", query, false)).await;
        assert_eq!(got.status, status, "{}", got.body);
        assert_eq!(got.headers.contains_key("retry-after"), status == 429);
    }
    let (_, figures) = get("/metrics").await;
    for line in [
        "ecso_requests_total{door=\"http\",route=\"chat\",status=\"200\"} 3",
        "ecso_answers_total{verdict=\"unsafe\",mode=\"enforce\",rewritten=\"yes\"} 1",
        "ecso_failures_total{code=\"rate_limited\"} 1",
        "ecso_step_seconds_count{step=\"detect\"} 3",
        "ecso_running 0",
    ] {
        assert!(figures.contains(line), "{line} is not in {figures}");
    }

    // Reload: new settings apply from the next request; broken ones change nothing.
    let reload = async || {
        let pid = served.process.id().to_string();
        assert!(Command::new("kill").args(["-HUP", &pid]).status().unwrap().success());
        tokio::time::sleep(Duration::from_millis(500)).await;
    };
    write("paper", 0);
    reload().await;
    assert_eq!(post(&served.chat(), &ask("m", "once more", false)).await.status, 200);
    let go_on = async |before: Value| {
        let body = json!({"model": "m", "input": "once more", "previous_response_id": before});
        serde_json::from_str::<Value>(&post(&format!("{}/responses", served.url), &body).await.body)
            .unwrap()
    };
    let kept = go_on(Value::Null).await["id"].clone();
    write("hardened", 0);
    reload().await;
    write("paper", 0);
    reload().await;
    // Stored conversations are still there.
    assert_eq!(go_on(kept).await["status"], "completed");
    write("nonsense", 1);
    reload().await;
    for _ in 0..3 {
        assert_eq!(post(&served.chat(), &ask("m", "once more", false)).await.status, 200);
    }
    drop(upstream);
}

/// Envoy's external processing has its own address; `ecso-gateway/tests/it/ext_proc.rs` tests what
/// it does.
#[cfg(feature = "ext-proc")]
#[test]
fn external_processing_has_its_own_address() {
    let home = tempfile::tempdir().unwrap();
    let mut process = Command::new(assert_cmd::cargo::cargo_bin("ecso"))
        .args([
            "serve",
            "--upstream",
            "http://127.0.0.1:1/v1",
            "--listen",
            "127.0.0.1:0",
            "--ext-proc",
            "0.0.0.0:0",
        ])
        .env_clear()
        .env("HOME", home.path())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let said: Vec<String> = BufReader::new(process.stderr.take().unwrap())
        .lines()
        .take(4)
        .map(Result::unwrap)
        .collect();
    let address = said[1].strip_prefix("ecso: external processing for gateways on ").unwrap();
    std::net::TcpStream::connect(address).unwrap();
    assert!(said.iter().any(|line| line.contains("let only the gateway reach it")), "{said:?}");
    process.kill().unwrap();
    process.wait().unwrap();
}
