//! Snapshots of whole requests and answers of other formats: what a request becomes, and what an
//! answer becomes.

use std::sync::Arc;

use axum::{body::Body, http::Response};
use ecso::{Profile, profile::Rewrite};
use ecso_gateway::Settings;
use serde_json::{Map, Value, json};

use crate::support::{Harness, IMAGE, LEAK, TestResponse, said, streamed};

/// A snapshot without what differs from run to run, and without images.
fn pinned(name: &str, value: &Value) {
    let filters =
        [(r"ecso-[0-9a-f]{32}", "ID"), (r"data:image/png;base64,[A-Za-z0-9+/=]+", "PICTURE")];
    insta::with_settings!({filters => filters}, { insta::assert_json_snapshot!(name, value) });
}

fn request(name: &str) -> Value {
    let text = match name {
        "codex" => include_str!("requests/codex.json"),
        "responses" => include_str!("requests/responses.json"),
        "claude-code" => include_str!("requests/claude-code.json"),
        _ => include_str!("requests/messages.json"),
    };
    let data = IMAGE.split(',').nth(1).unwrap();
    serde_json::from_str(
        &text
            .replace("\"PICTURE\"", &format!("{IMAGE:?}"))
            .replace("\"DATA\"", &format!("{data:?}")),
    )
    .unwrap()
}

fn path(name: &str) -> &'static str {
    if matches!(name, "codex" | "responses") { "/v1/responses" } else { "/v1/messages?beta=true" }
}

/// Calls each tool that it has, or answers a question, with reasoning before it.
fn respond(sent: &Value) -> Response<Body> {
    let asked = sent["messages"].to_string();
    let tools = sent["tools"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|tool| tool["function"]["name"].as_str().unwrap());
    let calls = tools.enumerate().map(|(index, name)| {
        let arguments = match name {
            "local_shell" => r#"{"command":["ls"],"timeout_ms":10}"#,
            "apply_patch" | "taste" => r#"{"input":"*** Begin Patch"}"#,
            _ => r#"{"n":1}"#,
        };
        json!({"index": index, "id": format!("call_{index}"), "type": "function", "function": {"name": name, "arguments": arguments}})
    });
    let calls: Vec<Value> = calls.collect();
    let mut message =
        json!({"role": "assistant", "content": "It is bread.", "reasoning_content": "Hm."});
    let mut finish = "stop";
    if asked.contains("do harm") {
        message["content"] = LEAK.into();
    } else if asked.contains("be long") {
        finish = "length";
    } else if !calls.is_empty() {
        (message["tool_calls"], finish) = (calls.into(), "tool_calls");
    }
    let usage = json!({"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 4}});
    if sent["stream"] == true {
        let choice = json!({"index": 0, "delta": message, "finish_reason": finish});
        return streamed(&[
            json!({"id": "c", "created": 1, "choices": [choice]}).to_string(),
            json!({"id": "c", "choices": [], "usage": usage}).to_string(),
        ]);
    }
    said(&message, &json!({"choices": [{"finish_reason": finish}], "usage": usage}))
}

async fn world(rewrite: Rewrite) -> Harness {
    let mut profile = Profile::paper();
    profile.rewrite = rewrite;
    Harness::with(Settings::default(), profile, Arc::new(respond)).await
}

fn answer(got: &TestResponse) -> Value {
    assert!(!got.leaks(), "{}", got.body);
    if got.headers["content-type"] != "text/event-stream" {
        return got.json();
    }
    let events = got.body.split("\n\n").filter_map(|event| event.strip_prefix("event: "));
    let read = events.map(|event| {
        let (name, data) = event.split_once("\ndata: ").unwrap();
        let data: Value = serde_json::from_str(data).unwrap();
        assert_eq!(data["type"], name);
        data
    });
    read.collect()
}

#[tokio::test]
async fn requests_become_chats() {
    let world = world(Rewrite::Safe).await;
    for name in ["codex", "responses", "claude-code", "messages"] {
        let headers = [
            ("anthropic-version", "2023-06-01"),
            ("anthropic-beta", "claude-code-20250219,interleaved-thinking-2025-05-14"),
            ("x-app", "cli"),
        ];
        let got = world.send("POST", path(name), &headers, request(name).to_string()).await;
        assert_eq!(got.status, 200, "{name}: {}", got.body);
        let reached = world.take_requests().remove(0);
        assert!(!reached.headers.contains_key("anthropic-beta"));
        let chat: Value = serde_json::from_slice(&reached.body).unwrap();
        let left_out =
            got.headers.get("x-ecso-tools-left-out").map(|kinds| kinds.to_str().unwrap());
        pinned(name, &json!({"chat": chat, "left out": left_out, "answer": answer(&got)}));
    }
}

#[tokio::test]
async fn verdicts_become_answers() {
    let (safe, refuse) = (world(Rewrite::Safe).await, world(Rewrite::Refuse).await);
    let ask = |name: &str, text: &str, stream: bool| {
        let data = IMAGE.split(',').nth(1).unwrap();
        if name == "messages" {
            let image = json!({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}});
            return json!({"model": "m", "max_tokens": 9, "stream": stream, "thinking": {"type": "enabled", "budget_tokens": 1024},
                "messages": [{"role": "user", "content": [image, {"type": "text", "text": text}]}]});
        }
        json!({"model": "m", "stream": stream, "moderation": {"model": "ecso"}, "input": [{"role": "user", "content": [
            {"type": "input_image", "image_url": IMAGE}, {"type": "input_text", "text": text}]}]})
    };
    for name in ["responses", "messages"] {
        for stream in [false, true] {
            let mut answers = Map::new();
            for (case, world, text) in [
                ("safe", &safe, "What is it?"),
                ("cut", &safe, "be long"),
                ("rewritten", &safe, "do harm"),
                ("declined", &refuse, "do harm"),
                ("failed", &safe, "judge-500"),
            ] {
                let got =
                    world.send("POST", path(name), &[], ask(name, text, stream).to_string()).await;
                answers.insert(
                    case.to_owned(),
                    json!({"status": got.status.as_u16(), "answer": answer(&got)}),
                );
            }
            pinned(
                &format!("{name}-{}", if stream { "streamed" } else { "whole" }),
                &answers.into(),
            );
        }
    }
}
