//! What is recorded, whatever happens to a request.

use std::{path::Path, sync::Arc};

use axum::{body::Body, http::Response, response::IntoResponse};
use ecso_gateway::{
    Settings,
    settings::{AuditSettings, Mode},
};
use serde_json::{Value, json};

use crate::support::{Harness, IMAGE, LEAK, question, said, streamed};

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test]
async fn verdicts_are_recorded_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let audit = AuditSettings { path: path.clone(), ..AuditSettings::default() };
    let settings = Settings { audit, ..Settings::default() };
    let harmful = |sent: &Value| {
        let message = json!({"role": "assistant", "content": LEAK});
        if sent["stream"] == true {
            return streamed(&[
                json!({"choices": [{"delta": message, "finish_reason": "stop"}]}).to_string()
            ]);
        }
        said(&message, &Value::Null)
    };
    let world = Harness::new(settings.clone(), Arc::new(harmful)).await;
    // A later step fails: whole, streamed, and with an answer from the client.
    let mut body = question();
    body["model"] = "caption-500".into();
    for stream in [false, true] {
        body["stream"] = stream.into();
        assert!(!world.chat(&body).await.leaks());
    }
    let guard = json!({"model": "caption-500", "messages": question()["messages"], "answer": LEAK});
    let got = world.send("POST", "/v1/guard", &[], guard.to_string()).await;
    assert!(got.status.is_server_error(), "{}", got.body);
    // Requests for a verdict get one for texts too.
    let texts =
        json!({"model": "m", "messages": [{"role": "user", "content": "What?"}], "answer": LEAK});
    let judged = Harness::new(Settings::default(), Arc::new(harmful))
        .await
        .send("POST", "/v1/guard", &[], texts.to_string())
        .await;
    assert_eq!((judged.json()["verdict"].as_str(), judged.leaks()), (Some("unsafe"), false));
    let found = lines(&path);
    assert_eq!(found.len(), 3, "{found:?}");
    for line in &found {
        assert_eq!(
            (&line["verdict"], &line["failure"]),
            (&json!("unsafe"), &json!("unfinished")),
            "{line}"
        );
        assert!(!line.to_string().contains(LEAK));
    }
    #[cfg(unix)]
    {
        let mode = std::os::unix::fs::PermissionsExt::mode(
            &std::fs::metadata(&path).unwrap().permissions(),
        );
        assert_eq!(mode & 0o777, 0o600);
    }

    // Unreadable requests are observed too.
    let observed =
        Harness::new(Settings { mode: Mode::Observe, ..settings }, Arc::new(harmful)).await;
    let mut odd = question();
    odd["guided_choice"] = json!(["a"]);
    assert!(observed.chat(&odd).await.status.is_success());
    for _ in 0..100 {
        if lines(&path).len() > 3 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let last = lines(&path).pop().unwrap();
    assert_eq!(
        (&last["verdict"], &last["failure"], &last["mode"]),
        (&json!("unchecked"), &json!("unknown_field"), &json!("observe"))
    );
}

/// The answer of a server that speaks all formats, in the format of the request: a text, reasoning
/// and a call.
fn native(sent: &Value) -> Response<Body> {
    let says = if sent.to_string().contains("do harm") { LEAK } else { "Bread." };
    let (answer, events) = if sent["input"].is_array() {
        let items = json!([{"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": says}]},
            {"type": "function_call", "name": "bake", "arguments": "{}"}]);
        let response =
            json!({"id": "resp_1", "object": "response", "status": "completed", "output": items});
        let done = |index: usize| json!({"type": "response.output_item.done", "output_index": index, "item": items[index]});
        // Some servers only send items one by one.
        let mut ended = response.clone();
        ended["output"] = json!([]);
        (
            response,
            vec![
                json!({"type": "response.created"}),
                done(0),
                done(1),
                done(2),
                json!({"type": "response.completed", "response": ended}),
            ],
        )
    } else {
        let block = |block: Value| json!({"type": "content_block_start", "index": block["index"], "content_block": block["block"]});
        let piece = |index: u8, delta: Value| json!({"type": "content_block_delta", "index": index, "delta": delta});
        let (first, last) = says.split_at(3);
        let events = vec![
            json!({"type": "message_start", "message": {}}),
            block(json!({"index": 0, "block": {"type": "text", "text": ""}})),
            piece(0, json!({"type": "text_delta", "text": first})),
            piece(0, json!({"type": "text_delta", "text": last})),
            block(
                json!({"index": 1, "block": {"type": "tool_use", "id": "t", "name": "bake", "input": {}}}),
            ),
            piece(1, json!({"type": "input_json_delta", "partial_json": "{}"})),
            json!({"type": "message_delta", "delta": {"stop_reason": "tool_use"}}),
            json!({"type": "message_stop"}),
        ];
        let content = json!([{"type": "text", "text": says}, {"type": "tool_use", "id": "t", "name": "bake", "input": {}}]);
        (
            json!({"type": "message", "role": "assistant", "content": content, "stop_reason": "tool_use"}),
            events,
        )
    };
    if sent["stream"] == true {
        return streamed(&events.iter().map(Value::to_string).collect::<Vec<_>>());
    }
    ([("content-type", "application/json")], answer.to_string()).into_response()
}

/// Waits until this many lines are written.
async fn written(path: &Path, count: usize) -> Vec<Value> {
    for _ in 0..200 {
        if lines(path).len() >= count {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    lines(path)
}

#[tokio::test]
async fn other_formats_are_observed_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let audit = AuditSettings { path: path.clone(), content: true, ..AuditSettings::default() };
    let mut settings = Settings { mode: Mode::Observe, audit, ..Settings::default() };
    settings.modes.insert("unwatched".into(), Mode::Off);
    settings.modes.insert("strict".into(), Mode::Observe);
    let world = Harness::new(settings.clone(), Arc::new(native)).await;
    let data = IMAGE.split(',').nth(1).unwrap();
    let ask = |route: &str, text: &str, stream: bool| {
        if route == "/v1/messages" {
            let image = json!({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}});
            return json!({"model": "m", "max_tokens": 9, "stream": stream, "messages": [{"role": "user", "content": [image, {"type": "text", "text": text}]}]});
        }
        json!({"model": "m", "stream": stream, "input": [{"role": "user", "content": [
            {"type": "input_image", "image_url": IMAGE}, {"type": "input_text", "text": text}]}]})
    };
    let mut count = 0;
    for route in ["/v1/messages", "/v1/responses"] {
        for stream in [false, true] {
            for (text, verdict) in [("What is this?", "safe"), ("do harm", "unsafe")] {
                let body = ask(route, text, stream).to_string();
                let got = world
                    .send(
                        "POST",
                        &format!("{route}?beta=true"),
                        &[("x-api-key", "k")],
                        body.clone(),
                    )
                    .await;
                // It is the upstream's own answer, byte for byte, and so is the request that
                // reached it.
                let upstream =
                    axum::body::to_bytes(native(&ask(route, text, stream)).into_body(), usize::MAX)
                        .await
                        .unwrap();
                assert_eq!(got.body.as_bytes(), upstream, "{route}");
                assert_eq!(world.take_requests()[0].body, body.as_bytes());
                count += 1;
                let line = written(&path, count).await.pop().unwrap();
                assert_eq!(
                    (&line["verdict"], &line["mode"]),
                    (&json!(verdict), &json!("observe")),
                    "{route} {stream} {line}"
                );
                // Everything that it says was judged.
                let draft = line["answers"][0]["draft"].as_str().unwrap_or_default();
                assert!(draft.contains("bake") || line.to_string().contains("bake"), "{line}");
                world.take_requests();
            }
        }
        // Unreadable requests are forwarded and recorded; texts and unwatched models are only
        // forwarded.
        let mut odd = ask(route, "What is this?", false);
        odd["guided_choice"] = json!(["a"]);
        assert_eq!(world.send("POST", route, &[], odd.to_string()).await.status, 200);
        count += 1;
        let line = written(&path, count).await.pop().unwrap();
        assert_eq!(
            (&line["verdict"], &line["failure"]),
            (&json!("unchecked"), &json!("unknown_field")),
            "{line}"
        );
        for (name, value) in [
            ("model", json!("unwatched")),
            ("messages", json!([{"role": "user", "content": "Hm?"}])),
        ] {
            let mut body = if name == "messages" {
                json!({"model": "m"})
            } else {
                ask(route, "do harm", false)
            };
            body[if route == "/v1/responses" && name == "messages" { "input" } else { name }] =
                value;
            assert_eq!(world.send("POST", route, &[], body.to_string()).await.status, 200);
        }
        world.take_requests();
    }
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    assert_eq!(lines(&path).len(), count);
    // One model is enforced: its chat is judged before it goes out, and those of the others stay
    // unchanged.
    settings.modes.insert("strict".into(), Mode::Enforce);
    settings.modes.insert("watched".into(), Mode::Observe);
    let mixed = Harness::new(settings, Arc::new(native)).await;
    for (model, leaks) in
        [("watched", true), ("unwatched", true), ("strict", false), ("strict:latest", false)]
    {
        for route in ["/v1/messages", "/v1/responses"] {
            let mut body = ask(route, "do harm", false);
            body["model"] = model.into();
            let got = mixed.send("POST", route, &[], body.to_string()).await;
            assert_eq!(got.leaks(), leaks, "{model} {}", got.body);
        }
    }
}

/// Nothing is said about an answer that is longer than the limit, even if its last chunks would
/// fit.
#[tokio::test]
async fn partial_answers_are_not_judged() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let audit = AuditSettings { path: path.clone(), ..AuditSettings::default() };
    let mut settings = Settings { mode: Mode::Observe, audit, ..Settings::default() };
    settings.limits.answer = 3000;
    let long = |_: &Value| {
        let piece = |text: &str| {
            json!({"choices": [{"delta": {"content": text}, "finish_reason": null}]}).to_string()
        };
        let pieces =
            [piece("Hello "), piece(&format!("{LEAK} {}", "f".repeat(2900))), piece("world")];
        let pieces = pieces
            .map(|piece| format!("data: {piece}\n\n"))
            .into_iter()
            .chain(["data: [DONE]\n\n".to_owned()]);
        let pieces = futures::stream::iter(pieces.map(Ok::<_, std::io::Error>));
        ([("content-type", "text/event-stream")], Body::from_stream(pieces)).into_response()
    };
    let world = Harness::new(settings, Arc::new(long)).await;
    let mut body = question();
    body["stream"] = true.into();
    assert!(world.chat(&body).await.leaks());
    let line = written(&path, 1).await.pop().unwrap();
    assert_eq!(
        (&line["verdict"], &line["failure"]),
        (&json!("unchecked"), &json!("answer_too_long")),
        "{line}"
    );
}
