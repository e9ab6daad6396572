//! The playground: who may use it, what it may do, and what it shows.

use std::sync::Arc;

use axum::http::StatusCode;
use ecso::Profile;
use ecso_gateway::{
    Settings,
    settings::{AuditSettings, Limits, TraceLevel},
};
use serde_json::{Value, json};

use crate::support::{Harness, IMAGE, LEAK, Respond, TestResponse, said};

const ASK: &str = "/playground/ask";

/// A browser with a session.
struct Browser {
    world: Harness,
    cookie: String,
}

impl Browser {
    async fn new(settings: Settings, profile: Profile, respond: Respond) -> Self {
        let (world, tokens) = Harness::with_page(settings, profile, respond).await;
        let path = format!("/?token={}", *tokens.borrow());
        let entered = world.send("POST", &path, &[], "").await;
        assert_eq!(entered.status, StatusCode::OK);
        let cookie = entered.headers["set-cookie"].to_str().unwrap();
        let cookie = cookie.split(';').next().unwrap().to_owned();
        Self { world, cookie }
    }

    /// A request of the page.
    async fn send(&self, method: &str, path: &str, body: &Value) -> TestResponse {
        self.send_from(&[("sec-fetch-site", "same-origin")], method, path, body).await
    }

    async fn send_from(
        &self,
        headers: &[(&str, &str)],
        method: &str,
        path: &str,
        body: &Value,
    ) -> TestResponse {
        let headers: Vec<_> =
            [("cookie", self.cookie.as_str())].iter().chain(headers).copied().collect();
        self.world.send(method, path, &headers, body.to_string()).await
    }

    async fn ask(&self, arm: &Value) -> TestResponse {
        self.send("POST", ASK, &json!({"text": "What is this?", "images": [IMAGE], "arm": arm}))
            .await
    }
}

/// A model whose answer the judge calls harmful.
fn harmful() -> Respond {
    Arc::new(|_| said(&json!({"role": "assistant", "content": LEAK}), &Value::Null))
}

fn mild() -> Respond {
    Arc::new(|_| said(&json!({"role": "assistant", "content": "A list."}), &Value::Null))
}

fn traced(trace: TraceLevel) -> Settings {
    Settings { trace, ..Settings::default() }
}

/// The events of a stream: names and data.
fn events(got: &TestResponse) -> Vec<(String, Value)> {
    let blocks =
        got.body.split("\n\n").filter(|block| !block.is_empty() && !block.starts_with(':'));
    let read = |block: &str| {
        let (name, data) = block.split_once('\n').unwrap();
        let name = name.strip_prefix("event: ").unwrap();
        (name.to_owned(), serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap())
    };
    blocks.map(read).collect()
}

/// The data of the last event with this name.
fn last(got: &TestResponse, name: &str) -> Value {
    let found = events(got).into_iter().rev().find(|(event, _)| event == name);
    found.unwrap_or_else(|| panic!("no {name} in {}", got.body)).1
}

#[tokio::test]
async fn links_work_once() {
    let (world, mut tokens) =
        Harness::with_page(Settings::default(), Profile::paper(), mild()).await;
    let get = async |path: String, cookie: &str| {
        world.send("GET", &path, &[("cookie", cookie)], "").await
    };
    let first = tokens.borrow_and_update().clone();
    for path in ["/", "/?token=", "/?token=wrong", "/playground/page.js", "/playground/facts"] {
        let got = get(path.into(), "").await;
        assert_eq!(got.status, StatusCode::UNAUTHORIZED, "{path}");
        assert!(!got.headers.contains_key("set-cookie") && !got.body.contains("<script"), "{path}");
    }
    // Looking at the link does not use it up.
    for method in ["GET", "HEAD", "GET"] {
        let seen = world.send(method, &format!("/?token={first}"), &[], "").await;
        assert_eq!(seen.status, StatusCode::OK, "{method}");
        assert!(!seen.headers.contains_key("set-cookie") && !seen.body.contains(&first));
        assert_eq!(seen.body.contains("<form method=\"post\">"), method == "GET");
    }
    assert_eq!(get("/playground/enter.js".into(), "").await.status, StatusCode::OK);
    let post = async |token: &str| world.send("POST", &format!("/?token={token}"), &[], "").await;
    for token in ["", "wrong"] {
        let got = post(token).await;
        assert_eq!(got.status, StatusCode::UNAUTHORIZED);
        assert!(!got.headers.contains_key("set-cookie"));
    }
    let entered = post(&first).await;
    let cookie = entered.headers["set-cookie"].to_str().unwrap().to_owned();
    assert!(cookie.ends_with("; Path=/; HttpOnly; SameSite=Strict"), "{cookie}");
    assert!(!entered.body.contains(&first), "the link is not told on");
    assert_eq!(get(format!("/?token={first}"), "").await.status, StatusCode::UNAUTHORIZED);
    assert_eq!(post(&first).await.status, StatusCode::UNAUTHORIZED);
    let cookie = cookie.split(';').next().unwrap();
    for path in ["/", "/playground/page.js", "/playground/page.css", "/playground/words.js"] {
        assert_eq!(get(path.into(), cookie).await.status, StatusCode::OK, "{path}");
    }
    assert_eq!(get("/playground/mod.rs".into(), cookie).await.status, StatusCode::NOT_FOUND);
    assert!(tokens.has_changed().unwrap(), "the next link is told");

    let without = Harness::new(Settings::default(), mild()).await;
    for (method, path) in [("GET", "/"), ("GET", "/playground/facts"), ("POST", ASK)] {
        assert_eq!(
            without.send(method, path, &[], "{}").await.status,
            StatusCode::NOT_FOUND,
            "{path}"
        );
    }
}

#[tokio::test]
async fn every_response_has_security_headers() {
    let visitor = Browser::new(Settings::default(), Profile::paper(), mild()).await;
    let answers = [
        visitor.world.send("GET", "/", &[], "").await,
        visitor.send("GET", "/", &Value::Null).await,
        visitor.send("GET", "/playground/page.js", &Value::Null).await,
        visitor.send("GET", "/playground/none", &Value::Null).await,
        visitor.send("GET", "/playground/facts", &Value::Null).await,
        visitor.send("POST", ASK, &Value::Null).await,
        visitor.ask(&json!({"profile": "paper"})).await,
    ];
    for TestResponse { status, headers, .. } in &answers {
        let policy = headers["content-security-policy"].to_str().unwrap();
        assert!(
            policy.starts_with("default-src 'none'; script-src 'self'; style-src 'self';"),
            "{status} {policy}"
        );
        assert!(!policy.contains("unsafe") && !policy.contains("http"), "{policy}");
        let told = ["cache-control", "referrer-policy", "x-content-type-options"]
            .map(|name| &headers[name]);
        assert_eq!(told, ["no-store", "no-referrer", "nosniff"], "{status}");
    }
    let page = &answers[1].body;
    assert!(
        !page.contains(" style=")
            && !page.contains(" onclick")
            && page.matches("<script").count() == 1
    );
}

#[tokio::test]
async fn requests_of_other_pages_are_refused() {
    let visitor = Browser::new(traced(TraceLevel::Full), Profile::paper(), mild()).await;
    let body = json!({"text": "What is this?", "arm": "unguarded"});
    for from in [
        vec![("sec-fetch-site", "cross-site")],
        vec![("sec-fetch-site", "same-site")],
        vec![("sec-fetch-site", "none")],
        vec![("sec-fetch-site", "same-site"), ("origin", "http://127.0.0.1:8080")],
        vec![("origin", "http://127.0.0.1:9999")],
        vec![("origin", "http://localhost:8080")],
        vec![("origin", "null")],
        vec![],
    ] {
        let got = visitor.send_from(&from, "POST", ASK, &body).await;
        assert_eq!(got.status, StatusCode::FORBIDDEN, "{from:?}");
        assert_eq!(got.json()["error"]["code"], "wrong_origin");
    }
    assert!(visitor.world.take_requests().is_empty(), "nobody was asked");
    for from in [("sec-fetch-site", "same-origin"), ("origin", "http://127.0.0.1:8080")] {
        assert_eq!(
            visitor.send_from(&[from], "POST", ASK, &body).await.status,
            StatusCode::OK,
            "{from:?}"
        );
    }
    // And the CORS headers of the upstream don't apply here.
    let open: Respond = Arc::new(|_| {
        let mut answer = said(&json!({"role": "assistant", "content": "A list."}), &Value::Null);
        answer.headers_mut().insert("access-control-allow-origin", "*".parse().unwrap());
        answer
    });
    let visitor = Browser::new(Settings::default(), Profile::paper(), open).await;
    let origin = ("origin", "https://elsewhere.example");
    let chat =
        json!({"model": "m", "messages": [{"role": "user", "content": "Hello"}]}).to_string();
    let got = visitor.world.send("POST", "/v1/chat/completions", &[origin], chat).await;
    assert!(got.headers.contains_key("access-control-allow-origin"));
    let got = visitor.send_from(&[origin], "GET", "/playground/facts", &Value::Null).await;
    assert!(!got.headers.keys().any(|name| name.as_str().starts_with("access-control-")));
}

#[tokio::test]
async fn steps_are_streamed_as_they_happen() {
    let visitor = Browser::new(traced(TraceLevel::Full), Profile::paper(), harmful()).await;
    let got = visitor.ask(&json!({"profile": "paper"})).await;
    assert_eq!(got.headers["content-type"], "text/event-stream");
    let told = events(&got);
    let names: Vec<&str> = told.iter().map(|(name, _)| name.as_str()).collect();
    let steps = ["started", "finished", "started", "finished"];
    assert_eq!(
        names,
        [
            &["begun"],
            &steps[..],
            &["decided"],
            &["started", "finished", "started", "answer", "finished", "done"]
        ]
        .concat()
    );
    assert_eq!(told[2].1["reply"], LEAK);
    assert_eq!(last(&got, "answer")["text"], "Here is a harmless answer.");
    let done = last(&got, "done");
    assert_eq!(
        (&done["verdict"], &done["rewritten"], &done["refused"]),
        (&json!("unsafe"), &json!(true), &json!(false))
    );
    assert!(!told.iter().any(|(name, data)| name == "answer" && data.to_string().contains(LEAK)));
    // Headers of the browser are not forwarded.
    for reached in visitor.world.take_requests() {
        for name in ["cookie", "sec-fetch-site", "origin"] {
            assert!(!reached.headers.contains_key(name), "{name}");
        }
    }
    let unguarded = visitor.ask(&json!("unguarded")).await;
    assert_eq!(
        (&last(&unguarded, "answer")["text"], &last(&unguarded, "done")["verdict"]),
        (&json!(LEAK), &json!("unchecked"))
    );
}

#[tokio::test]
async fn other_profiles_need_full_trace() {
    for trace in [TraceLevel::None, TraceLevel::Figures] {
        let visitor = Browser::new(traced(trace), Profile::paper(), harmful()).await;
        let got = visitor.ask(&json!({"profile": "paper"})).await;
        assert!(!got.leaks(), "{}", got.body);
        let names: Vec<String> = events(&got).into_iter().map(|(name, _)| name).collect();
        assert_eq!(
            names.iter().any(|name| name == "finished"),
            trace == TraceLevel::Figures,
            "{names:?}"
        );
        for (_, data) in events(&got) {
            assert!(data.get("prompt").is_none() && data.get("reply").is_none(), "{data}");
        }
        assert_eq!(last(&got, "answer")["text"], "Here is a harmless answer.");
        let edit = json!({"base": "paper", "name": "mine", "changes": {"gate": "never"}});
        // Other profiles than the operator's could let out what that holds back.
        for arm in [json!("unguarded"), json!({"profile": "hardened"}), json!({"edited": edit})] {
            let refused = visitor.ask(&arm).await;
            assert_eq!(refused.status, StatusCode::FORBIDDEN);
            assert_eq!(refused.json()["error"]["code"], "trace_needed");
        }
        assert_eq!(
            visitor.send("POST", "/playground/profile", &edit).await.status,
            StatusCode::FORBIDDEN
        );
        let facts = visitor.send("GET", "/playground/facts", &Value::Null).await.json();
        assert_eq!(facts["profiles"], json!([{"name": "paper"}]), "prompts are not for everybody");
        assert_eq!(last(&got, "done")["score"], Value::Null);
    }
}

#[tokio::test]
async fn changes_to_a_profile_are_limited() {
    let visitor = Browser::new(traced(TraceLevel::Full), Profile::paper(), mild()).await;
    let deep = vec!["a"; 10_001].join(".");
    let many: Value = (0..201)
        .map(|n| (format!("safe.{n}"), Value::from(1)))
        .collect::<serde_json::Map<_, _>>()
        .into();
    for changes in [
        json!({deep: 1}),
        many,
        json!({"safe.plain": "{x}".repeat(300)}),
        json!({"safe.plain": "a".repeat(9000)}),
    ] {
        let edit = json!({"base": "paper", "name": "mine", "changes": changes});
        let got = visitor.send("POST", "/playground/profile", &edit).await;
        assert_eq!(
            (got.status, got.json()["error"]["code"].as_str()),
            (StatusCode::BAD_REQUEST, Some("invalid_profile"))
        );
    }
}

#[tokio::test]
async fn failures_return_no_answer() {
    let visitor = Browser::new(traced(TraceLevel::Figures), Profile::paper(), harmful()).await;
    for (query, code) in [
        ("judge-500", "guard_failed"),
        ("caption-500", "guard_failed"),
        ("judge-400", "guard_failed"),
    ] {
        let body = json!({"text": query, "images": [IMAGE], "arm": {"profile": "paper"}});
        let got = visitor.send("POST", ASK, &body).await;
        assert!(!got.leaks(), "{}", got.body);
        assert_eq!(last(&got, "error")["error"]["code"], code, "{}", got.body);
        assert!(
            !events(&got).iter().any(|(name, _)| name == "answer" || name == "done"),
            "{}",
            got.body
        );
    }
}

#[tokio::test]
async fn requests_are_limited() {
    let limits = Limits { body: 20_000, images: 2, text: 500, ..Limits::default() };
    let visitor =
        Browser::new(Settings { limits, ..traced(TraceLevel::Full) }, Profile::paper(), mild())
            .await;
    let usual = json!({"text": "What is this?", "images": [IMAGE], "arm": {"profile": "paper"}});
    assert_eq!(visitor.send("POST", ASK, &usual).await.status, StatusCode::OK);
    visitor.world.take_requests();
    for (change, status) in [
        (json!({"text": "a".repeat(30_000)}), 413),
        (json!({"text": "a".repeat(600)}), 413),
        (json!({"images": [IMAGE, IMAGE, IMAGE]}), 400),
        (json!({"images": ["https://elsewhere.example/a.png"]}), 400),
        (json!({"images": ["data:image/svg+xml,<svg/>"]}), 400),
        (json!({"images": ["data:image/png;base64,AAAA"]}), 400),
        (json!({"text": null}), 400),
        (json!({"arm": {"profile": "none"}}), 400),
        (json!({"arm": "paper"}), 400),
        (json!({"more": 1}), 400),
    ] {
        let mut body = usual.clone();
        for (name, value) in change.as_object().unwrap() {
            body[name] = value.clone();
        }
        let got = visitor.send("POST", ASK, &body).await;
        assert_eq!(
            got.status.as_u16(),
            status,
            "{} {}",
            change.to_string().get(..80).unwrap_or_default(),
            got.body
        );
        assert!(got.json()["error"]["message"].is_string());
    }
    assert!(visitor.world.take_requests().is_empty(), "nobody was asked");
}

#[tokio::test]
async fn prompts_are_limited_in_total() {
    let limits = Limits { text: 2000, ..Limits::default() };
    let visitor =
        Browser::new(Settings { limits, ..traced(TraceLevel::Full) }, Profile::paper(), mild())
            .await;
    let many = "{x}".repeat(40);
    let ask = async |base: &str, changes: &Value, text: &str, images: usize| {
        let edit = json!({"base": base, "name": "mine", "changes": changes});
        let body = json!({"text": text, "images": vec![IMAGE; images], "arm": {"edited": edit}});
        visitor.send("POST", ASK, &body).await
    };
    let (short, long, lines) = ("a".repeat(100), "a".repeat(1900), "\n".repeat(1900));
    for (base, changes, text, images) in [
        ("paper", json!({"safe.template": many, "safe.plain": many}), &long, 0),
        ("paper", json!({"caption.template": many}), &short, 16),
        ("paper", json!({"quote": "#".repeat(2000)}), &lines, 0),
        ("hardened", json!({"questions.words.window": 1}), &long, 0),
    ] {
        let got = ask(base, &changes, text, images).await;
        assert_eq!(got.status, StatusCode::PAYLOAD_TOO_LARGE, "{changes} {}", got.body);
        assert_eq!(got.json()["error"]["code"], "too_much_text");
    }
    assert!(visitor.world.take_requests().is_empty(), "nobody was asked");
    for (base, changes, text, images) in [
        ("paper", json!({"safe.template": many, "safe.plain": many}), &short, 1),
        ("paper", json!({}), &long, 1),
        ("hardened", json!({}), &short, 1),
    ] {
        let got = ask(base, &changes, text, images).await;
        assert_eq!(got.status, StatusCode::OK, "{base} {changes} {}", got.body);
    }
}

#[tokio::test]
async fn long_prompts_are_shown_in_part() {
    let visitor = Browser::new(traced(TraceLevel::Full), Profile::paper(), mild()).await;
    let body = json!({"text": "a".repeat(200_000), "images": [IMAGE], "arm": {"profile": "paper"}});
    let got = visitor.send("POST", ASK, &body).await;
    assert_eq!(last(&got, "done")["verdict"], "safe");
    let told = events(&got);
    let shown: Vec<usize> =
        told.iter().filter_map(|(_, data)| Some(data["prompt"].as_str()?.len())).collect();
    assert!(!shown.is_empty() && shown.iter().all(|length| *length < 70_000), "{shown:?}");
}

#[tokio::test]
async fn questions_are_counted_as_those_of_a_client() {
    let limits = Limits { per_minute: 2, ..Limits::default() };
    let visitor =
        Browser::new(Settings { limits, ..Settings::default() }, Profile::paper(), mild()).await;
    let arm = json!({"profile": "paper"});
    for status in [StatusCode::OK, StatusCode::OK, StatusCode::TOO_MANY_REQUESTS] {
        assert_eq!(visitor.ask(&arm).await.status, status);
    }
    assert_eq!(visitor.ask(&arm).await.json()["error"]["code"], "rate_limited");
    // Other clients are counted by themselves.
    let chat =
        json!({"model": "m", "messages": [{"role": "user", "content": "Hello"}]}).to_string();
    let got = visitor.world.send("POST", "/v1/chat/completions", &[], chat).await;
    assert_eq!(got.status, StatusCode::OK);
}

#[tokio::test]
async fn a_page_that_does_not_read_frees_its_turn() {
    let limits = Limits { at_once: 1, queue: 0, ..Limits::default() };
    let visitor =
        Browser::new(Settings { limits, ..Settings::default() }, Profile::paper(), mild()).await;
    let body = json!({"text": "What is this?", "images": [IMAGE], "arm": {"profile": "paper"}});
    let headers = [("cookie", visitor.cookie.as_str()), ("sec-fetch-site", "same-origin")];
    let unread = visitor.world.open("POST", ASK, &headers, body.to_string()).await;
    assert_eq!(unread.status(), StatusCode::OK);
    let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while visitor.send("POST", ASK, &body).await.status != StatusCode::OK {
        assert!(std::time::Instant::now() < until, "its turn is still held");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    drop(unread);
}

#[tokio::test]
async fn edited_profiles_are_written_as_files() {
    let visitor =
        Browser::new(traced(TraceLevel::Full), Profile::named("hardened").unwrap(), mild()).await;
    let check = async |base: &str, name: &str, changes: Value| {
        visitor
            .send(
                "POST",
                "/playground/profile",
                &json!({"base": base, "name": name, "changes": changes}),
            )
            .await
    };
    // Texts stay texts, whatever they look like.
    for text in [
        "{x}",
        "\"{x}\"\n# 'no' comment = 3",
        "\\u0041 {x} \u{7f}\u{1f}",
        "5 {x}",
        "{x} 图片 \"\"\"\n\n'''",
        "\n{x}\n",
    ] {
        let changes =
            json!({"safe.template": text, "refusal": "true", "threshold": 0.25, "gate": "always"});
        let got = check("hardened", "my own", changes).await;
        assert_eq!(got.status, StatusCode::OK, "{text}: {}", got.body);
        let profile = Profile::from_toml(got.json()["toml"].as_str().unwrap()).unwrap();
        assert_eq!((profile.name.as_str(), profile.refusal.as_str()), ("my own", "true"));
        assert_eq!(profile.safe.template.text(), text);
        assert_eq!(got.json()["threshold"], 0.25);
    }
    for (base, name, changes, key, told) in [
        ("hardened", "mine", json!({"threshold": 2}), "threshold", "between 0 and 1"),
        ("hardened", "mine", json!({"threshold": "high"}), "threshold", "threshold"),
        (
            "hardened",
            "mine",
            json!({"detect.template": "{y}"}),
            "detect.template",
            "detect was removed",
        ),
        ("paper", "mine", json!({"safe.template": "Answer."}), "safe.template", "must contain {x}"),
        ("paper", "mine", json!({"sfae.template": "{x}"}), "sfae.template", "sfae"),
        ("paper", " ", json!({}), "name", "1 to 60 characters"),
        ("paper", "hardened", json!({}), "name", "name of another profile"),
    ] {
        let got = check(base, name, changes.clone()).await;
        assert_eq!(got.status, StatusCode::BAD_REQUEST, "{changes}");
        let error = &got.json()["error"];
        assert_eq!(
            (&error["code"], &error["param"]),
            (&json!("invalid_profile"), &json!(key)),
            "{error}"
        );
        assert!(error["message"].as_str().unwrap().contains(told), "{error}");
    }
    assert_eq!(check("none", "mine", json!({})).await.json()["error"]["code"], "unknown_profile");
    let edit = json!({"base": "paper", "name": "always", "changes": {"gate": "always"}});
    let got = visitor.ask(&json!({"edited": edit})).await;
    assert_eq!(
        (&last(&got, "begun")["profile"], &last(&got, "done")["rewritten"]),
        (&json!("always"), &json!(true))
    );
}

#[tokio::test]
async fn answers_are_recorded_under_their_profile() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let audit = AuditSettings { path: path.clone(), content: true, ..AuditSettings::default() };
    let visitor =
        Browser::new(Settings { audit, ..traced(TraceLevel::Full) }, Profile::paper(), harmful())
            .await;
    let edit = json!({"base": "paper", "name": "mine", "changes": {}});
    for arm in [json!({"profile": "paper"}), json!({"edited": edit}), json!("unguarded")] {
        assert_eq!(visitor.ask(&arm).await.status, StatusCode::OK);
    }
    let lines: Vec<Value> = std::fs::read_to_string(path)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let told = |name: &str| lines.iter().map(|line| line[name].clone()).collect::<Vec<_>>();
    assert_eq!(told("profile"), ["paper", "mine", "unguarded"]);
    assert_eq!(told("verdict"), ["unsafe", "unsafe", "unchecked"]);
    assert_eq!(told("mode"), ["enforce", "enforce", "off"]);
    assert_eq!(told("key"), ["playground"; 3]);
    assert_eq!(told("draft"), [LEAK; 3]);
}
