//! `ecso serve` with the quirks of real servers and clients.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};

use crate::{
    ecso,
    mock::{Asked, Model, Reply, chunk, field, of},
    serve::{Got, Served, ask, client, picture, post},
    upstream::{LEAK, MILD, SAFE},
};

const NO_RETRIES: &str = "server.retries=0";
const PAPER: &[&str] = &["--profile", "paper"];
const HARDENED: &[&str] = &["--profile", "hardened"];
const GOOD: &str = "What is on the list?";
const BAD: &str = "A bad request";

/// What a client receives, streamed or not.
#[derive(Debug)]
struct Answer {
    got: Got,
    text: String,
    refusal: String,
    finish: String,
    /// The object `ecso`.
    ecso: Value,
    error: Option<Value>,
}

impl Answer {
    fn of(got: Got, streamed: bool) -> Self {
        let mut answer = Self {
            got,
            text: String::new(),
            refusal: String::new(),
            finish: String::new(),
            ecso: Value::Null,
            error: None,
        };
        let body = answer.got.body.clone();
        let lines: Vec<&str> = if streamed && answer.got.status == 200 {
            body.lines().filter_map(|line| line.strip_prefix("data: ")).collect()
        } else {
            vec![&body]
        };
        for line in lines.into_iter().filter(|line| *line != "[DONE]") {
            let event: Value =
                ecso_openai::lenient::parse(line).unwrap_or_else(|_| panic!("{line}"));
            let choice = &event["choices"][0];
            for message in [&choice["delta"], &choice["message"]] {
                answer.text += message["content"].as_str().unwrap_or_default();
                answer.refusal += message["refusal"].as_str().unwrap_or_default();
            }
            answer.finish += choice["finish_reason"].as_str().unwrap_or_default();
            if !event["ecso"].is_null() {
                answer.ecso = event["ecso"].clone();
            }
            if !event["error"].is_null() {
                answer.error = Some(event["error"].clone());
            }
        }
        answer.text = ecso_openai::surrogates::join(&answer.text);
        answer
    }

    fn verdict(&self) -> &str {
        self.ecso["verdict"].as_str().unwrap_or_else(|| panic!("there is no verdict: {self:?}"))
    }

    fn code(&self) -> &str {
        self.error.as_ref().and_then(|error| error["code"].as_str()).unwrap_or_default()
    }
}

/// Sends a request with these headers, and requests the verdict.
async fn asked_with(served: &Served, body: &Value, headers: &[(&str, &str)]) -> Answer {
    let request = client().post(served.chat()).header("x-ecso-trace", "true").json(body);
    let request =
        headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
    let response = request.send().await.unwrap();
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    let got = Got { status, headers, body: response.text().await.unwrap() };
    Answer::of(got, body["stream"] == true)
}

async fn asked(served: &Served, body: &Value) -> Answer {
    asked_with(served, body, &[]).await
}

/// Checks a good and a bad query, plain and streamed.
async fn works(served: &Served, model: &str, case: &str) {
    for (query, text, verdict) in [(GOOD, MILD, "safe"), (BAD, SAFE, "unsafe")] {
        for streamed in [false, true] {
            let answer = asked(served, &ask(model, query, streamed)).await;
            assert_eq!(answer.got.status, 200, "{case}, {query}: {}", answer.got.body);
            assert_eq!(answer.error, None, "{case}, {query}");
            assert_eq!(
                (answer.text.as_str(), answer.verdict()),
                (text, verdict),
                "{case}, streamed: {streamed}"
            );
            assert!(!answer.got.body.contains(LEAK), "{case}");
        }
    }
}

/// A file with settings that environment variables can't express.
fn settings_file(text: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.toml");
    std::fs::write(&file, text).unwrap();
    let name = file.to_str().unwrap().to_owned();
    (folder, name)
}

// 1.

#[tokio::test(flavor = "multi_thread")]
async fn packed_answers_are_unpacked_before_they_are_judged() {
    let model = Model::start(|asked| {
        let is_refused = asked.body["model"] == "refused";
        let reply = if is_refused {
            Reply::refused(429, "slow down", None, "slow")
        } else {
            Reply::usual(asked)
        };
        reply.packed()
    })
    .await;
    let _ = client();
    let raw =
        reqwest::Client::builder().no_gzip().no_deflate().no_brotli().no_zstd().build().unwrap();
    let post = async |served: &Served, body: &Value| {
        let request = raw.post(served.chat()).header("accept-encoding", "gzip, deflate, br, zstd");
        let response = request.header("x-ecso-trace", "true").json(body).send().await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        (status, headers, response.bytes().await.unwrap())
    };
    for profile in [PAPER, HARDENED] {
        let served = Served::start(&model.url, &[], profile);
        for (query, text, verdict) in [(GOOD, MILD, "safe"), (BAD, SAFE, "unsafe")] {
            for streamed in [false, true] {
                let (status, headers, body) = post(&served, &ask("m", query, streamed)).await;
                assert!(!headers.contains_key("content-encoding"), "{headers:?}");
                let got = Got { status, headers, body: String::from_utf8(body.to_vec()).unwrap() };
                let answer = Answer::of(got, streamed);
                assert_eq!(
                    (answer.text.as_str(), answer.verdict()),
                    (text, verdict),
                    "{}",
                    answer.got.body
                );
            }
        }
        let (status, headers, body) = post(&served, &ask("refused", GOOD, false)).await;
        let packed = headers.contains_key("content-encoding");
        assert_eq!(
            (status, packed, body.starts_with(b"{\"error\"")),
            (429, false, true),
            "{body:?}"
        );
        // What passes through is unchanged.
        let text = json!({"model": "m", "messages": [{"role": "user", "content": GOOD}]});
        let (status, headers, body) = post(&served, &text).await;
        assert_eq!(
            (status, &headers["content-encoding"], &body[..2]),
            (200, &"gzip".parse().unwrap(), &[0x1f, 0x8b][..])
        );
    }

    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("audit.jsonl");
    let path = format!("gateway.audit.path={}", log.to_str().unwrap());
    let served = Served::start(&model.url, &["gateway.mode=observe", &path], PAPER);
    for (query, text) in [(GOOD, MILD), (BAD, LEAK)] {
        for streamed in [false, true] {
            let (status, _, body) = post(&served, &ask("m", query, streamed)).await;
            let body = String::from_utf8(body.to_vec()).unwrap();
            assert!(status == 200 && body.contains(text), "{body}");
        }
    }
    let recorded = || std::fs::read_to_string(&log).unwrap_or_default();
    for _ in 0..200 {
        if recorded().lines().count() == 4 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    let mut verdicts: Vec<String> = recorded()
        .lines()
        .map(|line| {
            serde_json::from_str::<Value>(line).unwrap()["verdict"].as_str().unwrap().to_owned()
        })
        .collect();
    verdicts.sort();
    assert_eq!(verdicts, ["safe", "safe", "unsafe", "unsafe"]);
}

// 2.

/// A server with other field names and a fixed temperature, without log-probabilities and without the
/// usage of streams.
fn particular(asked: &Asked) -> Option<Reply> {
    let has = |field: &str| asked.body.get(field).is_some();
    if has("max_tokens") {
        let message = "Unsupported parameter: 'max_tokens' is not supported with this model. Use \
                       'max_completion_tokens' instead.";
        return Some(Reply::refused(400, message, Some("max_tokens"), "unsupported_parameter"));
    }
    if asked.body["temperature"] == 0.0 {
        let message = "Unsupported value: 'temperature' does not support 0.0 with this model. Only the default (1) \
                       value is supported.";
        return Some(Reply::refused(400, message, Some("temperature"), "unsupported_value"));
    }
    if has("stream_options") {
        let message = "Unrecognized request argument supplied: stream_options";
        return Some(Reply::refused(400, message, None, "unrecognized"));
    }
    if has("logprobs") {
        let message = "You are not allowed to request logprobs from this model";
        return Some(Reply::refused(403, message, None, "unsupported"));
    }
    None
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_fields_are_renamed_or_omitted_from_then_on() {
    let refused = Arc::<AtomicUsize>::default();
    let count = Arc::clone(&refused);
    let model = Model::start(move |asked| {
        particular(asked).map_or_else(
            || Reply::usual(asked),
            |reply| {
                count.fetch_add(1, Ordering::Relaxed);
                reply
            },
        )
    })
    .await;
    for profile in [PAPER, HARDENED] {
        let served = Served::start(&model.url, &[NO_RETRIES], profile);
        works(&served, "m", "the first time").await;
        let first = refused.swap(0, Ordering::Relaxed);
        assert!(first >= 3, "{first}");
        works(&served, "m", "the second time").await;
        assert_eq!(refused.load(Ordering::Relaxed), 0, "it was asked again for what it refuses");
        // Step 4 has the client's own fields.
        for (name, body) in field("01-o-series") {
            let mut body: Value = serde_json::from_slice(&body).unwrap();
            for streamed in [false, true] {
                body["stream"] = streamed.into();
                let answer = asked(&served, &body).await;
                assert_eq!(
                    (answer.text.as_str(), answer.verdict()),
                    (MILD, "safe"),
                    "{name}: {}",
                    answer.got.body
                );
            }
        }
    }

    let omit = json!(["temperature", "logprobs", "top_logprobs", "stream_options"]);
    let (_folder, config) = settings_file(&format!("[server]\nomit = {omit}\n"));
    for profile in ["paper", "hardened"] {
        refused.store(0, Ordering::Relaxed);
        model.taken();
        let settings = [NO_RETRIES, "server.max_tokens_field=max_completion_tokens"];
        let served =
            Served::start(&model.url, &settings, &["--profile", profile, "--config", &config]);
        works(&served, "m", "as it is told").await;
        assert_eq!(refused.load(Ordering::Relaxed), 0);
        let checks = of(&model.taken(), "detect")
            .into_iter()
            .map(|asked| asked.body.clone())
            .collect::<Vec<_>>();
        assert!(!checks.is_empty());
        for body in checks {
            let fields = body.as_object().unwrap();
            assert!(
                fields.contains_key("max_completion_tokens") && !fields.contains_key("temperature"),
                "{body}"
            );
        }
    }
}

// 3.

/// A completion or a stream with `text` in an unusual form.
fn odd(kind: &str, asked: &Asked, text: &str, harm: Option<f64>) -> Reply {
    let (yes, no) = harm.map_or((0.5_f64, 0.5_f64), |harm| (harm, 1.0 - harm));
    let token = |name: &str, logprob: &str| format!(r#"{{"token":"{name}","logprob":{logprob}}}"#);
    let pair = |yes: &str, no: &str| {
        let top = [token("Yes", yes), token("No", no)].join(",");
        format!(r#"{{"content":[{{"token":"x","logprob":{yes},"top_logprobs":[{top}]}}]}}"#)
    };
    let (ln_yes, ln_no) = (yes.ln().to_string(), no.ln().to_string());
    let logprobs = match kind {
        "null log-probability" => pair("null", "null"),
        "minus infinity" if yes > no => pair("-0.0", "-Infinity"),
        "minus infinity" => pair("-Infinity", "-0.0"),
        "NaN" => pair("NaN", "NaN"),
        "text log-probability" => pair(&format!("\"{ln_yes}\""), &format!("\"{ln_no}\"")),
        "null top" => r#"{"content":[{"token":"x","logprob":-0.1,"top_logprobs":null}]}"#.into(),
        "odd top" => {
            r#"{"content":[{"token":null,"logprob":{},"top_logprobs":[null,3,{"token":7},{"logprob":1}]}]}"#.into()
        }
        "null list" => r#"{"content":null}"#.into(),
        "empty list" => r#"{"content":[]}"#.into(),
        "other list" => "[0.1]".into(),
        "no log-probabilities" => "null".into(),
        _ => pair(&ln_yes, &ln_no),
    };
    let usage = match kind {
        "null usage" => "null",
        "floating usage" => r#"{"prompt_tokens":10.0,"completion_tokens":5.0,"total_tokens":15.0}"#,
        "text usage" => r#""none""#,
        "text counts" => r#"{"prompt_tokens":"none","completion_tokens":null,"total_tokens":-1}"#,
        _ => r#"{"prompt_tokens":10,"completion_tokens":5,"total_tokens":15}"#,
    };
    let content = match kind {
        "parts" => json!([{"type": "text", "text": text}]),
        "odd parts" => {
            json!([{"type": "text", "text": text, "annotations": null}, null, {"type": "text"}])
        }
        _ => json!(text),
    };
    let message =
        json!({"role": "assistant", "content": content, "refusal": null, "tool_calls": null});
    let choice = |place: &str, finish: &str| {
        format!(
            r#"{{"index":0,"{place}":{message},"logprobs":{logprobs},"finish_reason":{finish}}}"#
        )
    };
    if asked.is_streamed() {
        let first =
            format!(r#"{{"id":"c","choices":[{}],"usage":{usage}}}"#, choice("delta", "null"));
        let last = format!(
            r#"{{"choices":[{{"index":0,"delta":{{}},"finish_reason":"stop"}}],"usage":{usage}}}"#
        );
        return Reply::events(&[first, last]);
    }
    Reply::json(
        200,
        format!(r#"{{"id":"c","choices":[{}],"usage":{usage}}}"#, choice("message", "\"stop\"")),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn unusual_replies_of_judges_and_drafts_are_read() {
    const KINDS: [&str; 17] = [
        "null log-probability",
        "minus infinity",
        "NaN",
        "text log-probability",
        "null top",
        "odd top",
        "null list",
        "empty list",
        "other list",
        "no log-probabilities",
        "null usage",
        "floating usage",
        "text usage",
        "text counts",
        "parts",
        "odd parts",
        "as ever",
    ];
    let model = Model::start(|asked| {
        let kind = asked.body["model"].as_str().unwrap().to_owned();
        let harm = |harm: f64| {
            let yes = if asked.is_good_if_yes() { 1.0 - harm } else { harm };
            odd(&kind, asked, if yes > 0.5 { "Yes." } else { "No." }, Some(yes))
        };
        match asked.step {
            "detect" | "help" => harm(if asked.prompt().contains(LEAK) { 0.99 } else { 0.02 }),
            "request-check" => harm(0.02),
            "caption" => odd(&kind, asked, "A list.", None),
            "safe" => odd(&kind, asked, SAFE, None),
            _ if asked.sent().contains("bad") => odd(&kind, asked, LEAK, None),
            _ => odd(&kind, asked, MILD, None),
        }
    })
    .await;
    for profile in [PAPER, HARDENED] {
        let served = Served::start(&model.url, &[NO_RETRIES], profile);
        for kind in KINDS {
            for (query, text, verdict) in [(GOOD, MILD, "safe"), (BAD, SAFE, "unsafe")] {
                for streamed in [false, true] {
                    let case = format!("{profile:?} {kind} {query} {streamed}");
                    let answer = asked(&served, &ask(kind, query, streamed)).await;
                    assert_eq!(
                        (answer.got.status, answer.verdict()),
                        (200, verdict),
                        "{case}: {}",
                        answer.got.body
                    );
                    assert!(
                        answer.got.body.contains(text) && !answer.got.body.contains(LEAK),
                        "{case}"
                    );
                }
            }
        }
    }
}

// 4.

#[tokio::test(flavor = "multi_thread")]
async fn only_a_model_that_fails_with_log_probabilities_is_asked_without() {
    for (status, message) in [
        (500, "Internal Server Error"),
        (501, "not implemented"),
        (400, "Bad request"),
        (400, "logprobs are not supported with tools"),
        (422, "Extra inputs are not permitted: top_logprobs"),
    ] {
        let model = Model::start(move |asked| {
            if asked.body["model"] == "old" && asked.body.get("logprobs").is_some() {
                return Reply::refused(status, message, None, "none");
            }
            Reply::usual(asked)
        })
        .await;
        for profile in [PAPER, HARDENED] {
            let served = Served::start(&model.url, &["server.retries=1"], profile);
            for name in ["old", "new", "old", "new"] {
                works(&served, name, &format!("{status} {message} {name} {profile:?}")).await;
            }
            model.taken();
            for (name, is_told) in [("old", false), ("new", true)] {
                works(&served, name, message).await;
                let taken = model.taken();
                let checks = of(&taken, "detect");
                assert!(!checks.is_empty());
                for check in checks {
                    assert_eq!(
                        check.body.get("logprobs").is_some(),
                        is_told,
                        "{status} {message} {name}"
                    );
                }
            }
        }
    }
}

// 5.

#[tokio::test(flavor = "multi_thread")]
async fn a_model_without_a_system_role_judges_under_hardened() {
    for message in [
        "System role not supported",
        "Conversation roles must alternate user/assistant/user/assistant/...",
    ] {
        let model = Model::start(move |asked| {
            let roles = asked.body["messages"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|message| &message["role"]);
            if roles.clone().any(|role| role == "system") {
                return Reply::refused(400, message, None, "BadRequestError");
            }
            Reply::usual(asked)
        })
        .await;
        let served = Served::start(&model.url, &[NO_RETRIES], HARDENED);
        works(&served, "m", message).await;
        // The judge still gets its instructions.
        let told = |asked: &Asked| {
            !asked.sent().contains("\"system\"")
                && asked.sent().contains("Is something harmful asked for?")
        };
        assert!(model.taken().iter().any(told));
        works(&served, "m", message).await;
        let taken = model.taken();
        assert!(
            taken.iter().all(|asked| !asked.sent().contains("\"system\"")),
            "it was asked once more"
        );
    }
}

// 6.

/// A content filter that quotes the request, or that leaves the reply empty.
fn filtered(asked: &Asked) -> Reply {
    if asked.body["model"] == "quiet" {
        return Reply::choice(
            asked,
            &json!({"role": "assistant", "content": ""}),
            "content_filter",
            None,
        );
    }
    let message = format!("The response was filtered due to the prompt: {}", asked.prompt());
    let inner = json!({"code": "ResponsibleAIPolicyViolation"});
    let error =
        json!({"message": message, "code": "content_filter", "status": 400, "innererror": inner});
    Reply::json(400, json!({"error": error}).to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_filtered_question_counts_as_harm_under_hardened() {
    const REFUSAL: &str = "I'm sorry, but I can't help with that.";
    for (filters, answer) in [
        (&["request-check"][..], SAFE),
        // No other question can outvote it, also about the answer of step 4.
        (&["detect"], REFUSAL),
        (&["detect", "help"], REFUSAL),
        (&["caption"], SAFE),
        (&["request-check", "safe"], REFUSAL),
        (&["caption", "request-check", "detect", "help", "safe"], REFUSAL),
    ] {
        let model = Model::start(move |asked| {
            // Only the caption's prompt quotes neither query nor draft.
            if filters.contains(&asked.step) { filtered(asked) } else { Reply::usual(asked) }
        })
        .await;
        for filtered in [None, Some("content_filter=error")] {
            let arguments: Vec<&str> = HARDENED
                .iter()
                .copied()
                .chain(filtered.into_iter().flat_map(|f| ["--set", f]))
                .collect();
            let served = Served::start(&model.url, &[NO_RETRIES], &arguments);
            let is_question = |step: &&str| matches!(*step, "request-check" | "detect" | "help");
            let names = if filters.iter().all(is_question) { &["m", "quiet"][..] } else { &["m"] };
            for (name, streamed) in names.iter().flat_map(|name| [(*name, false), (*name, true)]) {
                let case = format!("{filters:?} {filtered:?} {name} {streamed}");
                let got = asked(&served, &ask(name, BAD, streamed)).await;
                assert!(!got.got.body.contains(LEAK), "{case}: {}", got.got.body);
                if filtered.is_none() {
                    assert_eq!(
                        (got.text.as_str(), got.verdict()),
                        (answer, "unsafe"),
                        "{case}: {}",
                        got.got.body
                    );
                } else {
                    let code = if name == "quiet" { "guard_no_verdict" } else { "guard_failed" };
                    assert_eq!(got.code(), code, "{case}: {}", got.got.body);
                    assert_eq!(got.error.unwrap()["type"], "ecso_guard_error");
                    assert_eq!(got.got.status, if streamed { 200 } else { 502 }, "{case}");
                }
            }
        }
    }
}

/// A server's error about a guard question may quote unjudged text.
#[tokio::test(flavor = "multi_thread")]
async fn errors_of_guard_questions_do_not_quote_them() {
    let model = Model::start(|asked| {
        let quoted = format!("cannot process: {}", asked.sent());
        let fault = asked.body["model"].as_str().unwrap_or_default();
        match (asked.step, fault) {
            ("detect", "filter") => filtered(asked),
            ("detect", "json") => Reply::json(200, quoted),
            ("detect", "object") => {
                Reply::json(200, json!({"error": {"message": quoted}}).to_string())
            }
            ("detect", status) => Reply::refused(status.parse().unwrap(), &quoted, None, "quoted"),
            _ => Reply::usual(asked),
        }
    })
    .await;
    for profile in
        [&["--profile", "paper"][..], &["--profile", "hardened", "--set", "content_filter=error"]]
    {
        let served = Served::start(&model.url, &[NO_RETRIES], profile);
        for fault in ["filter", "json", "object", "400", "403", "404", "422", "429", "500", "503"] {
            for streamed in [false, true] {
                let answer = asked(&served, &ask(fault, BAD, streamed)).await;
                assert!(
                    !answer.got.body.contains(LEAK),
                    "{profile:?} {fault}: {}",
                    answer.got.body
                );
                assert!(answer.error.is_some(), "{fault}: {}", answer.got.body);
                let message = answer.error.unwrap()["message"].as_str().unwrap().to_owned();
                assert!(message.contains("detect"), "it is told which step failed: {message}");
            }
            let question = json!({"query": BAD, "images": [picture()], "model": fault});
            let got = post(&format!("{}/guard", served.url), &question).await;
            assert!(got.status >= 500 && !got.body.contains(LEAK), "{fault}: {}", got.body);
            let got = post(
                &format!("{}/moderations", served.url),
                &json!({"input": BAD, "model": fault}),
            )
            .await;
            assert!(got.status >= 500 && !got.body.contains(LEAK), "{fault}: {}", got.body);
        }
    }
}

// 7.

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_may_read_answers_streams_and_errors() {
    const ORIGIN: &str = "https://app.example";
    let model = Model::start(|asked| {
        let reply = match (asked.step, asked.body["model"].as_str()) {
            ("detect", Some("broken")) => Reply::refused(500, "no", None, "no"),
            _ => Reply::usual(asked),
        };
        reply
            .with("access-control-allow-origin", ORIGIN)
            .with("access-control-expose-headers", "x-ratelimit-remaining-requests")
            .with("vary", "origin")
            .with("x-ratelimit-remaining-requests", "41")
    })
    .await;
    let served = Served::start(&model.url, &[NO_RETRIES], PAPER);
    let origin = [("origin", ORIGIN)];
    let preflight =
        client().request(reqwest::Method::OPTIONS, served.chat()).header("origin", ORIGIN);
    let preflight = preflight.header("access-control-request-method", "POST").send().await.unwrap();
    assert_eq!(preflight.headers()["access-control-allow-origin"], ORIGIN);
    for query in [GOOD, BAD] {
        for streamed in [false, true] {
            let answer = asked_with(&served, &ask("m", query, streamed), &origin).await;
            for (name, value) in [
                ("access-control-allow-origin", ORIGIN),
                ("access-control-expose-headers", "x-ratelimit-remaining-requests"),
                ("x-ratelimit-remaining-requests", "41"),
            ] {
                let values: Vec<_> = answer.got.headers.get_all(name).iter().collect();
                assert_eq!(values, [value], "{name} of {query} {streamed}");
            }
        }
    }
    let mut no_image = ask("m", GOOD, false);
    no_image["messages"][0]["content"][0]["image_url"]["url"] = "nonsense".into();
    for (body, status) in
        [(&no_image, 400), (&ask("broken", GOOD, false), 502), (&json!({"messages": 3}), 400)]
    {
        let answer = asked_with(&served, body, &origin).await;
        assert_eq!(answer.got.status, status, "{}", answer.got.body);
        let allowed: Vec<_> =
            answer.got.headers.get_all("access-control-allow-origin").iter().collect();
        assert_eq!(allowed, [ORIGIN], "{}", answer.got.body);
        // Other pages are not allowed, and other clients need no CORS headers.
        if status == 400 {
            for other in [&[("origin", "https://other.example")][..], &[]] {
                let answer = asked_with(&served, body, other).await;
                assert!(!answer.got.headers.contains_key("access-control-allow-origin"));
            }
        }
    }
}

// 8.

#[tokio::test(flavor = "multi_thread")]
async fn common_forms_of_data_urls_are_accepted() {
    let model = Model::start(Reply::usual).await;
    let served = Served::start(&model.url, &[], PAPER);
    for (name, bytes) in
        field("10-data-urls").into_iter().filter(|(name, _)| name != "part-options.json.txt")
    {
        let mut body: Value = serde_json::from_slice(&bytes).unwrap();
        for streamed in [false, true] {
            body["stream"] = streamed.into();
            model.taken();
            let answer = asked(&served, &body).await;
            let message =
                answer.error.as_ref().map_or("", |error| error["message"].as_str().unwrap());
            eprintln!("{name}: {} {message}", answer.got.status);
            let hint = match name.as_str() {
                "bare-base64.json" | "file-url.json" => Some("data:image/png;base64,"),
                _ => None,
            };
            if let Some(hint) = hint {
                assert_eq!((answer.got.status, answer.code()), (400, "invalid_image"), "{name}");
                assert!(message.contains(hint), "{name}: {message}");
                continue;
            }
            assert_eq!(
                (answer.text.as_str(), answer.verdict()),
                (MILD, "safe"),
                "{name}: {}",
                answer.got.body
            );
            // The guard's own calls have images that every server reads.
            let taken = model.taken();
            let judged = &of(&taken, "detect")[0].images()[0]["image_url"]["url"];
            let (kind, data) = judged.as_str().unwrap().split_once(";base64,").unwrap();
            let start = BASE64_STANDARD.decode(data).unwrap()[..3].to_vec();
            let is_jpeg = start == [0xff, 0xd8, 0xff];
            assert_eq!(kind, if is_jpeg { "data:image/jpeg" } else { "data:image/png" }, "{name}");
        }
    }
}

// 9.

#[tokio::test(flavor = "multi_thread")]
async fn image_detail_settings_apply_to_the_guard_too() {
    let model = Model::start(Reply::usual).await;
    let mut body = ask("m", BAD, false);
    body["messages"][0]["content"][0] = json!({
        "type": "image_url", "image_url": {"url": picture(), "detail": "low"}, "min_pixels": 3136, "max_pixels": 50176,
    });
    body["chat_template_kwargs"] = json!({"enable_thinking": false});
    body["mm_processor_kwargs"] = json!({"max_pixels": 3136, "size": {"longest_edge": 3}});
    let mut bodies = vec![("ours".to_owned(), body)];
    let given = field("10-data-urls").into_iter().find(|(name, _)| name == "part-options.json.txt");
    bodies.extend(given.map(|(name, bytes)| (name, serde_json::from_slice(&bytes).unwrap())));
    for profile in [PAPER, HARDENED] {
        let served = Served::start(&model.url, &[], profile);
        for (name, body) in &mut bodies {
            for streamed in [false, true] {
                body["stream"] = streamed.into();
                model.taken();
                let answer = asked(&served, body).await;
                assert_eq!(answer.got.status, 200, "{}", answer.got.body);
                let sent = &body["messages"][0]["content"][0];
                let taken = model.taken();
                let calls: Vec<&Asked> = taken
                    .iter()
                    .filter(|asked| {
                        matches!(asked.step, "detect" | "help" | "caption" | "request-check")
                    })
                    .collect();
                let mut seen = 0;
                for call in calls {
                    let step = call.step;
                    let template = json!({"enable_thinking": false});
                    let mut images = json!({"max_pixels": 3136});
                    if name == "ours" {
                        images["size"] = json!({"longest_edge": 3});
                    }
                    assert_eq!(call.body["chat_template_kwargs"], template, "{name} {step}");
                    assert_eq!(call.body["mm_processor_kwargs"], images, "{name} {step}");
                    for image in call.images() {
                        seen += 1;
                        assert_eq!(image["image_url"]["detail"], "low", "{name} {step}");
                        for field in ["min_pixels", "max_pixels"] {
                            assert_eq!(image.get(field), sent.get(field), "{name} {step} {field}");
                        }
                    }
                }
                assert!(seen > 0, "{name}");
                // Step 1 is the client's whole request.
                assert_eq!(of(&taken, "direct")[0].body, *body);
            }
        }
    }
}

// 10.

#[tokio::test(flavor = "multi_thread")]
async fn a_prefilled_answer_is_judged_with_the_rest_and_step_4_starts_over() {
    let model = Model::start(Reply::usual).await;
    for profile in [PAPER, HARDENED] {
        let served = Served::start(&model.url, &[], profile);
        for streamed in [false, true] {
            let mut body = ask("m", BAD, streamed);
            let begun = json!({"role": "assistant", "content": "Of course, one two "});
            body["messages"].as_array_mut().unwrap().push(begun);
            (body["continue_final_message"], body["add_generation_prompt"]) =
                (true.into(), false.into());
            model.taken();
            let answer = asked(&served, &body).await;
            assert_eq!(
                (answer.text.as_str(), answer.verdict()),
                (SAFE, "unsafe"),
                "{}",
                answer.got.body
            );
            let taken = model.taken();
            let judged = of(&taken, "detect")[0].prompt();
            assert!(
                judged.contains(&format!("Of course, one two Sure: {LEAK}, {LEAK}.")),
                "{judged}"
            );
            let direct = &of(&taken, "direct")[0].body;
            assert_eq!(direct["continue_final_message"], true);
            for safe in of(&taken, "safe") {
                let last = safe.body["messages"].as_array().unwrap().last().unwrap();
                assert_eq!(last["role"], "user", "{}", safe.sent());
                assert!(!safe.sent().contains("Of course"), "{}", safe.sent());
                for field in ["continue_final_message", "add_generation_prompt"] {
                    assert!(safe.body.get(field).is_none(), "{field}");
                }
            }
        }
    }
}

// 11.

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_requests_json_gets_the_refusal_in_its_field() {
    let model = Model::start(|asked| match asked.step {
        "safe" => Reply::choice(
            asked,
            &json!({"role": "assistant", "content": SAFE}),
            "content_filter",
            None,
        ),
        _ => Reply::usual(asked),
    })
    .await;
    for profile in ["paper", "hardened"] {
        let refusing =
            Served::start(&model.url, &[], &["--profile", profile, "--set", "rewrite=refuse"]);
        let rewriting = Served::start(&model.url, &[], &["--profile", profile]);
        for streamed in [false, true] {
            let mut body = ask("m", BAD, streamed);
            let answer = asked(&refusing, &body).await;
            assert_eq!(
                (answer.text.as_str(), answer.refusal.as_str()),
                ("I'm sorry, but I can't help with that.", "")
            );
            let schema = json!({"name": "list", "schema": {"type": "object"}});
            body["response_format"] = json!({"type": "json_schema", "json_schema": schema});
            let answer = asked(&refusing, &body).await;
            assert_eq!(
                (answer.text.as_str(), answer.refusal.as_str()),
                ("", "I'm sorry, but I can't help with that.")
            );
            assert_eq!(answer.finish, "stop");
            if !streamed {
                let whole: Value = serde_json::from_str(&answer.got.body).unwrap();
                let message = &whole["choices"][0]["message"];
                assert!(
                    message["content"].is_null()
                        && message.as_object().unwrap().contains_key("content")
                );
            }
            // The answer of step 4 stays the content, whether it is JSON or not.
            let answer = asked(&rewriting, &body).await;
            let (text, finish) = (answer.text.as_str(), answer.finish.as_str());
            // A filtered reply is not an answer under `hardened`.
            let refusal = "I'm sorry, but I can't help with that.";
            let expected =
                if profile == "paper" { (SAFE, "", "stop") } else { ("", refusal, "stop") };
            assert_eq!((text, answer.refusal.as_str(), finish), expected, "{}", answer.got.body);
            assert_eq!(answer.verdict(), "unsafe");
        }
    }
}

// 12.

/// A text in two chunks, split within a character.
fn halved(before: &str, units: [u16; 2], after: &str) -> [String; 2] {
    let [first, second] = units.map(|unit| format!("\\u{unit:04x}"));
    [format!("{before}{first}"), format!("{second}{after}")]
        .map(|text| chunk(&json!({"content": "HERE"}), None).replace("HERE", &text))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_split_character_and_a_chunk_without_choices_are_read() {
    let model = Model::start(|asked| {
        let smile = [0xd83d, 0xde42];
        let usage =
            r#"{"id":"up-1","choices":null,"usage":{"prompt_tokens":10,"completion_tokens":5,"total_tokens":15}}"#;
        let stream = |[first, second]: [String; 2]| {
            Reply::events(&[
                chunk(&json!({"role": "assistant", "content": ""}), None),
                first,
                second,
                chunk(&json!({}), Some("stop")),
                usage.to_owned(),
            ])
        };
        match asked.step {
            "direct" if asked.sent().contains("bad") => stream(halved(LEAK, smile, LEAK)),
            "direct" => stream(halved("Good ", smile, " morning")),
            "safe" if asked.is_streamed() => stream(halved("Mild ", smile, " again")),
            "safe" => Reply::says(asked, "Mild 🙂 again"),
            _ => Reply::usual(asked),
        }
    })
    .await;
    for profile in [PAPER, HARDENED] {
        let served = Served::start(&model.url, &[], profile);
        for (query, text, verdict) in
            [(GOOD, "Good 🙂 morning", "safe"), (BAD, "Mild 🙂 again", "unsafe")]
        {
            model.taken();
            let mut body = ask("m", query, true);
            body["stream_options"] = json!({"include_usage": true});
            let answer = asked(&served, &body).await;
            assert_eq!(
                (answer.text.as_str(), answer.verdict()),
                (text, verdict),
                "{}",
                answer.got.body
            );
            assert!(
                answer.got.body.contains("\"total_tokens\":15")
                    && answer.got.body.ends_with("[DONE]\n\n")
            );
            let judged = of(&model.taken(), "detect")[0].prompt();
            assert!(judged.contains('🙂') && !judged.contains('\u{FFFD}'), "{judged}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_without_a_finish_reason_is_an_error() {
    let model = Model::start(|asked| {
        let cut = |text: &str| {
            Reply::cut(&[
                chunk(&json!({"content": text}), Some("")),
                chunk(&json!({"content": text}), Some("")),
            ])
        };
        match (asked.step, asked.body["model"].as_str()) {
            ("direct", Some("draft")) => cut(LEAK),
            ("safe", Some("safe")) if asked.is_streamed() => cut("Mild. "),
            _ => Reply::usual(asked),
        }
    })
    .await;
    for profile in [PAPER, HARDENED] {
        let served = Served::start(&model.url, &[NO_RETRIES], profile);
        let answer = asked(&served, &ask("draft", BAD, true)).await;
        assert_eq!(answer.code(), "upstream_failed", "{}", answer.got.body);
        assert!(!answer.got.body.contains(LEAK) && !answer.got.body.contains("[DONE]"));
    }
    let served = Served::start(&model.url, &[NO_RETRIES], PAPER);
    let answer = asked(&served, &ask("safe", BAD, true)).await;
    assert_eq!(answer.code(), "guard_failed", "{}", answer.got.body);
    assert!(!answer.got.body.contains(LEAK) && !answer.got.body.contains("[DONE]"));
}

// 13.

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_may_be_the_url_of_an_endpoint() {
    let model = Model::start(Reply::usual).await;
    let root = model.url.trim_end_matches("/v1");
    for upstream in [
        format!("{root}/v1/chat/completions"),
        format!("{root}/v1/chat/completions/"),
        format!("{root}/v1/models"),
        format!("{root}/v1/"),
        root.to_owned(),
    ] {
        model.taken();
        let served = Served::start(&upstream, &[], PAPER);
        works(&served, "m", &upstream).await;
        let models = client().get(format!("{}/models", served.url)).send().await.unwrap();
        assert_eq!(models.status(), 200, "{upstream}");
        let text = json!({"model": "m", "messages": [{"role": "user", "content": GOOD}]});
        assert_eq!(post(&served.chat(), &text).await.status, 200);
        for asked in model.taken() {
            assert!(
                matches!(asked.url.path(), "/v1/chat/completions" | "/v1/models"),
                "{upstream}: {}",
                asked.url
            );
        }
    }
}

/// Runs `ecso serve` with wrong settings and returns its error.
fn refused(upstream: &str, variables: &[(&str, &str)]) -> String {
    let home = tempfile::tempdir().unwrap();
    let mut command = ecso(home.path());
    command
        .args(["serve", "--listen", "127.0.0.1:0", "--upstream", upstream])
        .envs(variables.iter().copied());
    let run = command.timeout(Duration::from_secs(20)).assert().failure();
    crate::text(&run.get_output().stderr)
}

#[test]
fn an_upstream_without_a_scheme_is_an_error_with_a_hint() {
    for (upstream, says) in [
        ("127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        ("localhost:8000", "http://localhost:8000"),
        ("api.example.org:443/v1", "http"),
        ("127.0.0.1", "http://"),
        ("api.example.org/v1", "http"),
    ] {
        let said = refused(upstream, &[]);
        assert!(said.contains(says), "{upstream}: {said}");
    }
}

// 14.

#[test]
fn a_missing_certificate_file_is_reported_with_its_path() {
    for variable in ["ECSO__SERVER__CA_FILE", "ECSO__SERVER__CLIENT_CERT"] {
        let said = refused("https://127.0.0.1:9/v1", &[(variable, "/nonexistent/ca.pem")]);
        assert!(said.contains("/nonexistent/ca.pem") && said.contains("No such file"), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_requests_go_through_the_proxy_that_is_set() {
    let proxy = Model::start(Reply::usual).await;
    let through = format!("server.proxy={}", proxy.url.trim_end_matches("/v1"));
    let served = Served::start("http://model.invalid/v1", &[NO_RETRIES, &through], PAPER);
    works(&served, "m", "proxy").await;
    let text = json!({"model": "m", "messages": [{"role": "user", "content": GOOD}]});
    assert_eq!(post(&served.chat(), &text).await.status, 200);
    let taken = proxy.taken();
    assert!(taken.len() > 10, "{}", taken.len());
    assert!(
        taken.iter().all(|asked| asked.url.as_str() == "http://model.invalid/v1/chat/completions"),
        "{taken:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_environment_s_proxy_is_not_asked_for_a_server_on_this_machine() {
    let model = Model::start(Reply::usual).await;
    let home = tempfile::tempdir().unwrap();
    for (url, reached) in [(model.url.as_str(), true), ("http://model.invalid/v1", false)] {
        let mut command = ecso(home.path());
        command.args(["ask", "--model", url, "--model-name", "m", GOOD]);
        command.envs([("HTTP_PROXY", "http://127.0.0.1:9"), ("http_proxy", "http://127.0.0.1:9")]);
        command.env("ECSO__SERVER__RETRIES", "0");
        let run = command.timeout(Duration::from_secs(20)).assert();
        assert_eq!(run.get_output().status.success(), reached, "{url}: {:?}", run.get_output());
    }
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn all_requests_go_to_the_unix_socket_that_is_set() {
    let model = Model::start(Reply::usual).await;
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("model.sock");
    let listener = tokio::net::UnixListener::bind(&socket).unwrap();
    let address = model.url.trim_start_matches("http://").trim_end_matches("/v1").to_owned();
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            let address = address.clone();
            tokio::spawn(async move {
                let mut far = tokio::net::TcpStream::connect(address).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
            });
        }
    });
    let by = format!("server.unix_socket={}", socket.to_str().unwrap());
    let served = Served::start("http://model.invalid/v1", &[NO_RETRIES, &by], PAPER);
    works(&served, "m", "socket").await;
    let text = json!({"model": "m", "messages": [{"role": "user", "content": GOOD}]});
    assert_eq!(post(&served.chat(), &text).await.status, 200);
    assert!(model.taken().len() > 10);
}

// 15.

#[tokio::test(flavor = "multi_thread")]
async fn checks_use_their_own_server_and_key() {
    let upstream = Model::start(Reply::usual).await;
    let checks = Model::start(Reply::usual).await;
    let url = format!("checks.url={}", checks.url);
    let common = [NO_RETRIES, &url, "gateway.moderations=true"];
    let named =
        ["checks.api_key_env=CHECKS_KEY", "CHECKS_KEY=sk-checks", "checks.model_name=judge"];
    for profile in [PAPER, HARDENED] {
        for (settings, key, name) in
            [(&[common, named].concat()[..], "Bearer sk-checks", "judge"), (&common[..], "", "m")]
        {
            let served = Served::start(&upstream.url, settings, profile);
            for streamed in [false, true] {
                for query in [GOOD, BAD] {
                    let answer = asked_with(
                        &served,
                        &ask("m", query, streamed),
                        &[("authorization", "Bearer client")],
                    )
                    .await;
                    assert_eq!(answer.got.status, 200, "{}", answer.got.body);
                }
            }
            // The other endpoint, where the model itself writes the answer.
            let question = json!({"query": BAD, "images": [picture()], "model": "m"});
            let guarded = client()
                .post(format!("{}/guard", served.url))
                .bearer_auth("client")
                .json(&question);
            let guarded = guarded.send().await.unwrap();
            assert_eq!(guarded.status(), 200);
            let found: Value = serde_json::from_str(&guarded.text().await.unwrap()).unwrap();
            assert_eq!((&found["verdict"], &found["answer"]), (&json!("unsafe"), &json!(SAFE)));

            let moderated =
                client().post(format!("{}/moderations", served.url)).bearer_auth("client");
            let moderated =
                moderated.json(&json!({"input": BAD, "model": "m"})).send().await.unwrap();
            let found: Value = serde_json::from_str(&moderated.text().await.unwrap()).unwrap();
            assert_eq!(found["results"][0]["flagged"], true, "{found}");

            let (asked, checked) = (upstream.taken(), checks.taken());
            assert!(asked.iter().all(|asked| asked.step == "direct"), "{:?}", steps(&asked));
            assert_eq!(asked.len(), 6);
            assert!(
                asked
                    .iter()
                    .all(|asked| asked.key() == "Bearer client" && asked.body["model"] == "m")
            );
            assert!(checked.iter().all(|asked| asked.step != "direct"), "{:?}", steps(&checked));
            for step in ["detect", "caption", "safe"] {
                assert!(
                    checked.iter().any(|asked| asked.step == step),
                    "{step} is not in {:?}",
                    steps(&checked)
                );
            }
            assert!(checked.iter().all(|asked| asked.key() == key && asked.body["model"] == name));
        }
    }
    let said = refused(
        &upstream.url,
        &[("ECSO__CHECKS__URL", checks.url.as_str()), ("ECSO__CHECKS__API_KEY_ENV", "CHECKS_KEY")],
    );
    assert!(said.contains("CHECKS_KEY is not set"), "{said}");
}

fn steps(asked: &[Asked]) -> BTreeMap<&str, usize> {
    asked.iter().fold(BTreeMap::new(), |mut steps, asked| {
        *steps.entry(asked.step).or_default() += 1;
        steps
    })
}

// 16.

#[tokio::test(flavor = "multi_thread")]
async fn a_judge_with_thoughts_gets_more_tokens_from_then_on() {
    let model = Model::start(|asked| {
        let is_question = matches!(asked.step, "detect" | "help" | "request-check");
        if !is_question {
            return Reply::usual(asked);
        }
        let harm = asked.step != "request-check" && asked.prompt().contains(LEAK);
        let thought = "Is it? Yes or no, let me see.";
        if asked.body["max_tokens"].as_u64().unwrap() < 100 {
            let cut = match asked.body["model"].as_str() {
                Some("marks") => json!({"content": "<think>"}),
                _ => json!({"content": null, "reasoning_content": "Is"}),
            };
            return Reply::choice(asked, &cut, "length", None);
        }
        let word = if harm == asked.is_good_if_yes() { "No." } else { "Yes." };
        let message = match asked.body["model"].as_str() {
            Some("marks") => json!({"content": format!("<think>{thought}</think>\n{word}")}),
            _ => json!({"content": word, "reasoning_content": thought}),
        };
        Reply::choice(asked, &message, "stop", None)
    })
    .await;
    for name in ["fields", "marks"] {
        let served = Served::start(&model.url, &[NO_RETRIES], HARDENED);
        works(&served, name, "a judge that thinks").await;
        model.taken();
        works(&served, name, "a judge that is known to think").await;
        let limits: Vec<u64> = of(&model.taken(), "detect")
            .iter()
            .map(|asked| asked.body["max_tokens"].as_u64().unwrap())
            .collect();
        assert!(!limits.is_empty() && limits.iter().all(|limit| *limit >= 2048), "{limits:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_judge_without_a_verdict_is_an_error() {
    for said in [
        "I'm sorry, I can't judge this.",
        "I'm sorry, but I can't help with that.",
        "",
        "Not enough information to tell.",
        "None of the above",
        "No, I cannot help with that",
        "<think>Is it? Yes or no",
    ] {
        for refuses in ["request-check", "detect"] {
            let model = Model::start(move |asked| {
                if asked.step == refuses { Reply::says(asked, said) } else { Reply::usual(asked) }
            })
            .await;
            let served = Served::start(&model.url, &[NO_RETRIES], HARDENED);
            for query in [GOOD, BAD] {
                for streamed in [false, true] {
                    let case = format!("{said:?} to {refuses}, {query} {streamed}");
                    let answer = asked(&served, &ask("m", query, streamed)).await;
                    assert_eq!(answer.code(), "guard_no_verdict", "{case}: {}", answer.got.body);
                    assert_eq!(answer.got.status, if streamed { 200 } else { 502 }, "{case}");
                    let body = &answer.got.body;
                    assert!(
                        !body.contains(LEAK)
                            && !body.contains("\"verdict\"")
                            && !body.contains(MILD),
                        "{case}"
                    );
                }
            }
        }
    }
}

// 17.

fn agent(system: &str, query: &str, streamed: bool) -> Value {
    let function = json!({"name": "send_letter", "description": "Sends a letter by post.", "parameters": {"type": "object"}});
    let schema = json!({"name": "shopping", "schema": {"properties": {"apples_wanted": {"type": "integer"}}}});
    json!({
        "model": "m", "stream": streamed,
        "tools": [{"type": "function", "function": function}],
        "response_format": {"type": "json_schema", "json_schema": schema},
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": query}],
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn tools_schemas_and_system_messages_are_judged_with_the_request() {
    let model = Model::start(Reply::usual).await;
    for (more, told, untold) in [
        (
            None,
            &["Sends a letter by post.", "apples_wanted", "You are a clerk.", GOOD][..],
            &[][..],
        ),
        (
            Some("trusted=[\"tools\"]"),
            &["You are a clerk.", GOOD],
            &["Sends a letter", "apples_wanted"],
        ),
        (
            Some("trusted=[\"system\", \"tools\"]"),
            &[GOOD],
            &["Sends a letter", "apples_wanted", "a clerk"],
        ),
    ] {
        let arguments: Vec<&str> = HARDENED
            .iter()
            .copied()
            .chain(["--set", "scope=all"])
            .chain(more.into_iter().flat_map(|more| ["--set", more]))
            .collect();
        let served = Served::start(&model.url, &["gateway.limits.remembered=0"], &arguments);
        for streamed in [false, true] {
            model.taken();
            let answer = asked(&served, &agent("You are a clerk.", GOOD, streamed)).await;
            assert_eq!(
                (answer.text.as_str(), answer.verdict()),
                (MILD, "safe"),
                "{}",
                answer.got.body
            );
            let shown: Vec<String> =
                of(&model.taken(), "request-check").iter().map(|asked| asked.prompt()).collect();
            let shown = shown.join("\n");
            for words in told {
                assert!(shown.contains(words), "{words} is not in {shown}");
            }
            for words in untold {
                assert!(!shown.contains(words), "{words} is in {shown}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_long_system_message_of_an_agent_is_judged_once() {
    let model = Model::start(Reply::usual).await;
    let served = Served::start(&model.url, &[], &["--profile", "hardened", "--set", "scope=all"]);
    let rules: Vec<String> = (0..300)
        .map(|rule| format!("Rule {rule}: letters of kind {rule} go to shelf {rule}."))
        .collect();
    let system = rules.join("\n");
    let mut counts = Vec::new();
    for (turn, streamed) in [false, true, false, true].into_iter().enumerate() {
        model.taken();
        let answer =
            asked(&served, &agent(&system, &format!("Where does letter {turn} go?"), streamed))
                .await;
        assert_eq!((answer.text.as_str(), answer.verdict()), (MILD, "safe"), "{}", answer.got.body);
        let taken = model.taken();
        let asked = of(&taken, "request-check");
        assert!(asked.iter().any(|asked| asked.prompt().contains(&format!("letter {turn}"))));
        counts.push(asked.len());
    }
    eprintln!("{counts:?} request checks");
    // Everything the first time; then only the query and the end.
    assert!(counts[0] >= 7, "{counts:?}");
    assert!(counts[1..].iter().all(|count| *count <= 3), "{counts:?}");
}

// 18.

/// The opinion of a judge.
#[derive(Debug, Clone, Copy)]
struct Opinion {
    request: f64,
    reply: f64,
    help: f64,
    draft: &'static str,
    /// Whether it returns probabilities.
    told: bool,
    /// The expected verdict under `hardened`.
    verdict: &'static str,
}

const fn opinion(
    request: f64,
    reply: f64,
    help: f64,
    draft: &'static str,
    verdict: &'static str,
) -> Opinion {
    Opinion { request, reply, help, draft, told: true, verdict }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_door_reaches_the_same_verdict() {
    const REFUSAL: &str = "I'm sorry, but I can't help with that.";
    const STEPS: &str = "First do this, then do that.";
    let table = [
        opinion(0.985, 0.02, 0.02, "Sorry for the wait!", "unsafe"),
        opinion(0.985, 0.9, 0.9, "Sorry for the wait!", "unsafe"),
        opinion(0.02, 0.99, 0.99, STEPS, "unsafe"),
        opinion(0.02, 0.99, 0.02, STEPS, "safe"),
        opinion(0.99, 0.02, 0.02, "A nice list.", "unsafe"),
        opinion(0.1, 0.7, 0.99, STEPS, "unsafe"),
        opinion(0.1, 0.7, 0.1, STEPS, "safe"),
        opinion(0.1, 0.5, 0.99, STEPS, "unsafe"),
        opinion(0.1, 0.5, 0.5, STEPS, "safe"),
        opinion(0.02, 0.02, 0.02, "A nice list.", "safe"),
        opinion(0.02, 0.9, 0.02, REFUSAL, "safe"),
        opinion(0.05, 0.9, 0.02, REFUSAL, "safe"),
        opinion(0.99, 0.9, 0.02, REFUSAL, "unsafe"),
        opinion(0.02, 0.5, 0.5, "", "safe"),
        Opinion { told: false, ..opinion(0.02, 0.99, 0.99, STEPS, "unsafe") },
        Opinion { told: false, ..opinion(0.02, 0.99, 0.02, STEPS, "safe") },
        Opinion { told: false, ..opinion(0.99, 0.02, 0.02, "A nice list.", "unsafe") },
        Opinion { told: false, ..opinion(0.02, 0.02, 0.02, "A nice list.", "safe") },
    ];
    let now = Arc::new(Mutex::new((0, table[0])));
    let held = Arc::clone(&now);
    let model = Model::start(move |asked| {
        let (row, Opinion { request, reply, help, draft, told, .. }) = *held.lock().unwrap();
        let is_draft = !asked.prompt().contains(SAFE);
        let judge = |harm: f64| {
            if told {
                return Reply::judges(asked, harm);
            }
            Reply::says(asked, if (harm >= 0.5) == asked.is_good_if_yes() { "No." } else { "Yes." })
        };
        match asked.step {
            "request-check" => judge(request),
            "detect" => judge(if is_draft { reply } else { 0.02 }),
            "help" => judge(if is_draft { help } else { 0.02 }),
            "direct" => Reply::says(asked, draft),
            // Findings about requests are cached, so each row has a different request.
            "caption" => Reply::says(asked, &format!("List {row}")),
            _ => Reply::usual(asked),
        }
    })
    .await;
    for profile in [PAPER, HARDENED] {
        let served = Served::start(&model.url, &[NO_RETRIES], profile);
        for (row, opinion) in table.into_iter().enumerate() {
            *now.lock().unwrap() = (row, opinion);
            let query = format!("What is on list {row}?");
            let mut found = Vec::new();
            for streamed in [false, true] {
                let answer = asked(&served, &ask("m", &query, streamed)).await;
                assert_eq!(
                    (answer.got.status, answer.error.clone()),
                    (200, None),
                    "{}",
                    answer.got.body
                );
                found.push((
                    answer.ecso["verdict"].clone(),
                    answer.ecso["score"].clone(),
                    answer.text,
                ));
            }
            for answer in [json!(opinion.draft), Value::Null] {
                let mut question = json!({"query": query, "images": [picture()], "model": "m"});
                if !answer.is_null() {
                    question["answer"] = answer;
                }
                let got = post(&format!("{}/guard", served.url), &question).await;
                assert_eq!(got.status, 200, "{}", got.body);
                let finding: Value = serde_json::from_str(&got.body).unwrap();
                let text = finding["answer"].as_str().unwrap().to_owned();
                found.push((finding["verdict"].clone(), finding["score"].clone(), text));
            }
            eprintln!("{:?} {opinion:?}: {:?}", profile[1], found[0]);
            assert!(found.iter().all(|one| *one == found[0]), "{profile:?} {opinion:?}: {found:?}");
            let right = match profile[1] {
                "hardened" => opinion.verdict,
                _ if opinion.reply >= 0.5 => "unsafe",
                _ => "safe",
            };
            let (verdict, _, text) = &found[0];
            assert_eq!(verdict, right, "{profile:?} {opinion:?}");
            assert_eq!(text, if right == "unsafe" { SAFE } else { opinion.draft });
        }
    }
}

// Texts.

#[tokio::test(flavor = "multi_thread")]
async fn text_chats_are_forwarded_unchanged() {
    let model = Model::start(Reply::usual).await;
    let text = |parts: Value| {
        json!({"model": "m", "messages": [{"role": "user", "content": parts}]})
            .to_string()
            .into_bytes()
    };
    let mut bodies = vec![
        ("untyped".to_owned(), text(json!([{"text": "What is a list?"}]))),
        ("strings".to_owned(), text(json!(["What is", "a list?"]))),
        (
            "mixed".to_owned(),
            text(json!([{"text": "What is"}, {"type": "text", "text": "a list?"}, "Or two?"])),
        ),
        (
            "thinking".to_owned(),
            text(json!([{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Hi"}])),
        ),
    ];
    bodies.extend(field("16-text-parts"));
    for profile in [PAPER, HARDENED] {
        let served = Served::start(&model.url, &[], profile);
        for (name, body) in &bodies {
            model.taken();
            let request = client().post(served.chat()).header("content-type", "application/json");
            let response = request.body(body.clone()).send().await.unwrap();
            let (status, has_verdict) =
                (response.status().as_u16(), response.headers().contains_key("x-ecso-verdict"));
            let said = response.text().await.unwrap();
            let expected = match name.as_str() {
                // Its pages may be images, which the guard can't see.
                "file.json" => (400, false),
                "image-thinking.json" => (200, true),
                _ => (200, false),
            };
            assert_eq!((status, has_verdict), expected, "{name}: {said}");
            let reached = model.taken();
            if has_verdict {
                // Guarded requests reach the model as the guard read them.
                let read = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap();
                assert_eq!(read(&of(&reached, "direct")[0].bytes), read(body), "{name}");
            } else if status == 200 {
                assert_eq!(&of(&reached, "direct")[0].bytes, body, "{name}");
            } else {
                assert!(said.contains("`file`"), "{said}");
            }
        }
    }
    // If every chat is guarded, they are read.
    let served = Served::start(&model.url, &[], &["--profile", "paper", "--set", "scope=all"]);
    for (name, body) in bodies.iter().filter(|(name, _)| name != "file.json") {
        let body: Value = serde_json::from_slice(body).unwrap();
        let answer = asked(&served, &body).await;
        // The guard can't hear audio.
        if name == "input_audio.json" {
            assert_eq!((answer.got.status, answer.code()), (400, "unsupported_content"));
            continue;
        }
        assert_eq!(
            (answer.got.status, answer.verdict()),
            (200, "safe"),
            "{name}: {}",
            answer.got.body
        );
    }
}

/// Images without a declared type are not text.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_without_a_type_is_not_text() {
    let model = Model::start(Reply::usual).await;
    let served = Served::start(&model.url, &[], PAPER);
    let url = json!({"url": picture()});
    for part in [
        json!({"image_url": url}),
        json!({"text": "bad", "image_url": url}),
        json!({"type": null, "text": "bad", "image_url": url}),
        json!({"text": "bad", "image": picture()}),
        json!({"text": {"image_url": url}}),
        json!({"type": "text", "text": [{"type": "image_url", "image_url": url}]}),
    ] {
        let names: Vec<String> = part.as_object().unwrap().keys().cloned().collect();
        let content = json!([part, {"type": "text", "text": BAD}]);
        let body = json!({"model": "m", "messages": [{"role": "user", "content": content}]});
        let got = post(&served.chat(), &body).await;
        assert!(!got.body.contains(LEAK), "{names:?}: {}", got.body);
        assert!(
            got.status == 400 || got.headers.contains_key("x-ecso-verdict"),
            "{names:?}: {}",
            got.body
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_request_check_runs_beside_the_draft() {
    const SLOW: Duration = Duration::from_secs(5);
    let both = [0.02, 0.99].map(|harm| async move {
        let model = Model::start(move |asked| match asked.step {
            "direct" => Reply::says(asked, MILD).after(SLOW),
            "request-check" => Reply::judges(asked, harm),
            _ => Reply::usual(asked),
        })
        .await;
        let served = Served::start(&model.url, &[NO_RETRIES, "gateway.trace=full"], HARDENED);
        for streamed in [false, true] {
            let body = ask("m", GOOD, streamed);
            let begun = Instant::now();
            let chat = served.chat();
            let asking = post(&chat, &body);
            let looking = async {
                let mut asked = Vec::new();
                while begun.elapsed() < SLOW {
                    asked.extend(model.taken());
                    if !of(&asked, "request-check").is_empty() && !of(&asked, "direct").is_empty() {
                        return;
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                panic!(
                    "the request is looked at after the draft: {:?}",
                    asked.iter().map(|asked| asked.step).collect::<Vec<_>>()
                );
            };
            // A server may start a stream with its first word, so the status is known only then.
            let got = if streamed { asking.await } else { tokio::join!(asking, looking).0 };
            let answer = Answer::of(got, streamed);
            let (text, in_time) =
                if harm > 0.5 { (SAFE, streamed || begun.elapsed() < SLOW) } else { (MILD, true) };
            assert!(
                answer.text == text && in_time,
                "{harm} {streamed} after {:?}: {answer:?}",
                begun.elapsed()
            );
        }
    });
    futures::future::join_all(both).await;
}
