//! Attempts to bypass the guard with answers: what an upstream could say where nobody looks. Such
//! text contains a marker that no client may ever see.

use std::sync::Arc;

use axum::response::IntoResponse;
use ecso_gateway::Settings;
use serde_json::{Value, json};

use crate::support::{Harness, IMAGE, LEAK, merge, question, said, streamed};

/// Answers with the marker in overlooked places, to be merged into a completion.
#[expect(clippy::too_many_lines, reason = "a table")]
pub(crate) fn hidden_answers() -> Vec<(&'static str, Value)> {
    let message = |more: Value| json!({"choices": [{"message": more}]});
    let choice = |more: Value| json!({"choices": [more]});
    vec![
        ("content", message(json!({"content": LEAK}))),
        ("content in parts", message(json!({"content": [{"type": "text", "text": LEAK}]}))),
        ("parts of another type", message(json!({"content": [{"type": "html", "text": LEAK}]}))),
        (
            "thinking in parts",
            message(
                json!({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": LEAK}]}]}),
            ),
        ),
        ("reasoning", message(json!({"reasoning": LEAK}))),
        ("reasoning_content", message(json!({"reasoning_content": LEAK}))),
        (
            "reasoning_details",
            message(json!({"reasoning_details": [{"type": "reasoning.text", "text": LEAK}]})),
        ),
        (
            "a summary",
            message(json!({"reasoning_details": [{"type": "reasoning.summary", "summary": LEAK}]})),
        ),
        (
            "thinking_blocks",
            message(json!({"thinking_blocks": [{"type": "thinking", "thinking": LEAK}]})),
        ),
        ("refusal", message(json!({"refusal": LEAK}))),
        (
            "a tool's name",
            message(
                json!({"tool_calls": [{"id": "c", "type": "function", "function": {"name": LEAK, "arguments": "{}"}}]}),
            ),
        ),
        (
            "a tool's arguments",
            message(
                json!({"tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": LEAK}}]}),
            ),
        ),
        (
            "arguments that are no text",
            message(
                json!({"tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": {"k": LEAK}}}]}),
            ),
        ),
        (
            "arguments twice",
            message(
                json!({"tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": format!(r#"{{"q": "{LEAK}", "q": "\u0062read"}}"#)}}]}),
            ),
        ),
        (
            "escaped arguments",
            message(
                json!({"tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": r#"{"q": "\u0055NJUDGED"}"#}}]}),
            ),
        ),
        (
            "keys of arguments",
            message(
                json!({"tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": {LEAK: 1}}}]}),
            ),
        ),
        (
            "a tool's id",
            message(
                json!({"tool_calls": [{"id": LEAK, "type": "function", "function": {"name": "f", "arguments": "{}"}}]}),
            ),
        ),
        (
            "an id with words",
            message(
                json!({"tool_calls": [{"id": format!("two {LEAK}"), "type": "function", "function": {"name": "f"}}]}),
            ),
        ),
        (
            "a tool's type",
            message(
                json!({"tool_calls": [{"id": "c", "type": LEAK, "function": {"name": "f", "arguments": "{}"}}]}),
            ),
        ),
        (
            "a custom tool",
            message(
                json!({"tool_calls": [{"id": "c", "type": "custom", "custom": {"name": "f", "input": LEAK}}]}),
            ),
        ),
        (
            "beside a tool",
            message(
                json!({"tool_calls": [{"id": "c", "type": "function", "note": LEAK, "function": {"name": "f", "arguments": "{}"}}]}),
            ),
        ),
        ("function_call", message(json!({"function_call": {"name": "f", "arguments": LEAK}}))),
        ("a role", message(json!({"role": LEAK}))),
        (
            "annotations",
            message(
                json!({"annotations": [{"type": "url_citation", "url_citation": {"title": LEAK, "url": "u"}}]}),
            ),
        ),
        ("an odd annotation", message(json!({"annotations": [{"type": LEAK}]}))),
        (
            "a transcript",
            message(json!({"audio": {"id": "a", "data": "AAAA", "transcript": LEAK}})),
        ),
        (
            "images of an answer",
            message(json!({"images": [{"type": "image_url", "image_url": {"url": LEAK}}]})),
        ),
        ("an unknown field", message(json!({"thoughts": LEAK}))),
        ("a key of a message", message(json!({LEAK: 1}))),
        ("a seal with words", message(json!({"thought_signature": format!("two {LEAK}")}))),
        ("a seal of a word", message(json!({"thought_signature": LEAK}))),
        ("a seal of many words", message(json!({"thought_signature": LEAK.repeat(9)}))),
        ("a seal with dots", message(json!({"thought_signature": format!("{LEAK}.a:b")}))),
        (
            "behind the mark of a signature",
            message(
                json!({"tool_calls": [{"id": format!("c__thought__{LEAK}"), "type": "function", "function": {"name": "f"}}]}),
            ),
        ),
        (
            "words behind the mark of a signature",
            message(
                json!({"tool_calls": [{"id": format!("c__thought__{}.first.mix", LEAK.repeat(9)), "type": "function", "function": {"name": "f"}}]}),
            ),
        ),
        ("executed tools", message(json!({"executed_tools": [{"output": LEAK}]}))),
        ("citations of a message", message(json!({"citations": [LEAK]}))),
        ("provider fields", message(json!({"provider_specific_fields": {"citations": [LEAK]}}))),
        ("text of a choice", choice(json!({"text": LEAK}))),
        ("a reason", choice(json!({"finish_reason": LEAK}))),
        ("stop_reason", choice(json!({"stop_reason": LEAK}))),
        ("native_finish_reason", choice(json!({"native_finish_reason": LEAK}))),
        (
            "logprobs",
            choice(
                json!({"logprobs": {"content": [{"token": LEAK, "logprob": -1, "top_logprobs": []}]}}),
            ),
        ),
        (
            "top_logprobs",
            choice(
                json!({"logprobs": {"content": [{"token": "Bread.", "logprob": -1, "top_logprobs": [{"token": LEAK}]}]}}),
            ),
        ),
        (
            "bytes",
            choice(
                json!({"logprobs": {"content": [{"token": "Bread.", "logprob": -1, "bytes": LEAK}]}}),
            ),
        ),
        (
            "reasoning tokens",
            choice(json!({"logprobs": {"reasoning_content": [{"token": LEAK, "logprob": -1}]}})),
        ),
        ("old logprobs", choice(json!({"logprobs": {"tokens": [LEAK], "token_logprobs": [-1]}}))),
        ("content_filter_results", choice(json!({"content_filter_results": {"detail": LEAK}}))),
        ("an error of a choice", choice(json!({"error": {"message": LEAK}}))),
        ("a delta beside", choice(json!({"delta": {"content": LEAK}}))),
        ("token ids", choice(json!({"token_ids": [LEAK]}))),
        ("a bare choice", json!({"choices": [{}, LEAK]})),
        (
            "a second choice",
            json!({"choices": [{}, {"index": 1, "message": {"content": LEAK}, "finish_reason": "stop"}]}),
        ),
        (
            "a choice with the same index",
            json!({"choices": [{}, {"index": 0, "message": {"content": LEAK}, "finish_reason": "stop"}]}),
        ),
        (
            "a choice without an index",
            json!({"choices": [{}, {"message": {"reasoning": LEAK}, "finish_reason": "stop"}]}),
        ),
        (
            "an index that is a text",
            json!({"choices": [{}, {"index": LEAK, "message": {"content": "a"}}]}),
        ),
        ("citations", json!({"citations": [LEAK]})),
        ("search_results", json!({"search_results": [{"title": LEAK}]})),
        ("__verbose", json!({"__verbose": {"content": LEAK}})),
        ("an id", json!({"id": LEAK})),
        ("a model", json!({"model": LEAK})),
        ("an object", json!({"object": LEAK})),
        ("a fingerprint", json!({"system_fingerprint": LEAK})),
        ("a tier", json!({"service_tier": LEAK})),
        ("created", json!({"created": LEAK})),
        ("usage", json!({"usage": {"note": LEAK}})),
        ("usage that is a text", json!({"usage": LEAK})),
        ("a detail of usage", json!({"usage": {"prompt_tokens_details": {LEAK: 1}}})),
        ("timings", json!({"timings": {LEAK: 1}})),
        ("prompt_logprobs", json!({"prompt_logprobs": [{"1": {"decoded_token": LEAK}}]})),
        ("kv_transfer_params", json!({"kv_transfer_params": LEAK})),
        ("an error beside", json!({"warning": LEAK})),
        ("a key", json!({LEAK: {}})),
        ("moderation", json!({"moderation": {"output": LEAK}})),
    ]
}

#[tokio::test]
async fn guard_can_be_mounted_in_an_application() {
    let respond =
        Arc::new(|_: &Value| said(&json!({"role": "assistant", "content": LEAK}), &Value::Null));
    let world = Harness::new(Settings::default(), respond).await.mounted_at("/guarded");
    let got = world.send("POST", "/guarded/v1/chat/completions", &[], question().to_string()).await;
    assert!(
        got.status == 200 && !got.leaks() && got.headers["x-ecso-verdict"] == "unsafe",
        "{}",
        got.body
    );
    for path in ["/guarded/v1/completions", "/guarded/v1/files", "/v1/chat/completions", "/guarded"]
    {
        let got = world.send("POST", path, &[], question().to_string()).await;
        assert_eq!(got.status, 404, "{path}: {}", got.body);
    }
}

#[tokio::test]
async fn answers_contain_only_judged_text() {
    let rows = hidden_answers();
    assert!(rows.len() > 60);
    let mut leaked = Vec::new();
    for (name, more) in rows {
        let world = Harness::new(
            Settings::default(),
            Arc::new(move |sent| {
                let mut message = json!({"role": "assistant", "content": "Bread."});
                if sent["stream"] != true {
                    let mut more = more.clone();
                    let own = more["choices"][0]["message"].take();
                    merge(&mut message, &own);
                    return said(&message, &more);
                }
                // The same in a stream: once next to the text, and once in an event of its own.
                let mut chunk = json!({"id": "c", "object": "chat.completion.chunk", "choices": [
                    {"index": 0, "delta": message, "finish_reason": "stop"}]});
                let mut more = more.clone();
                for choice in more["choices"].as_array_mut().into_iter().flatten() {
                    if let Some(said) =
                        choice.as_object_mut().and_then(|choice| choice.remove("message"))
                    {
                        choice["delta"] = said;
                    }
                }
                let alone = more.to_string();
                merge(&mut chunk, &more);
                streamed(&[chunk.to_string(), alone])
            }),
        )
        .await;
        for stream in [false, true] {
            let mut body = question();
            (body["stream"], body["logprobs"], body["n"]) = (stream.into(), true.into(), 1.into());
            let got = world.chat(&body).await;
            assert!(
                got.status.is_success() || got.status.is_server_error(),
                "{name}: {}",
                got.body
            );
            if got.leaks() {
                leaked.push(format!("{name}, stream {stream}: {}", got.body));
            }
        }
    }
    assert!(leaked.is_empty(), "{leaked:#?}");
}

/// A signature as servers send them.
const SEAL: &str = "VfGT5kdz6mXb0QhJ7oYw2RsLcE9uNa/4pKtD8vB1xZ+iMfH3gOqUyW5eSjrC6lAPTnIk0dJb7s==";

#[tokio::test]
async fn signatures_are_returned_and_not_judged() {
    let message = json!({"role": "assistant", "content": "Bread.", "thought_signature": SEAL, "tool_calls": [
        {"id": format!("c__thought__{SEAL}"), "type": "function", "function": {"name": "f", "arguments": "{}"}}]});
    let sent = message.clone();
    let world =
        Harness::new(Settings::default(), Arc::new(move |_| said(&sent, &Value::Null))).await;
    let got = world.chat(&question()).await;
    assert_eq!(got.json()["choices"][0]["message"], message);
    let reached = world.take_requests();
    assert!(reached.len() > 1);
    for reached in reached {
        assert!(!String::from_utf8_lossy(&reached.body).contains(SEAL));
    }
}

#[tokio::test]
async fn streams_contain_only_judged_text() {
    let chunk = |delta: Value| {
        json!({"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": null}]})
            .to_string()
    };
    let ended =
        json!({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}).to_string();
    let twice = format!(
        r#"{{"choices": [{{"index": 0, "delta": {{"content": "{LEAK}", "content": "Bread."}}}}]}}"#
    );
    let (start, end) = LEAK.split_at(3);
    for (name, events) in [
        ("a key that stands twice", vec![twice]),
        ("two lines of data", vec![format!("{{\"choices\": []}}\ndata: {{\"x\": \"{LEAK}\"}}")]),
        ("an error beside", vec![chunk(json!({"content": "Bread."})), json!({"error": {"message": LEAK}}).to_string()]),
        ("an error that is a text", vec![json!({"error": LEAK}).to_string()]),
        ("cut in two", vec![chunk(json!({"content": start})), chunk(json!({"content": end}))]),
        (
            "cut in two, in other choices between",
            vec![
                chunk(json!({"content": start})),
                json!({"choices": [{"index": 1, "delta": {"content": "x"}, "finish_reason": "stop"}]}).to_string(),
                chunk(json!({"content": end})),
            ],
        ),
        (
            "a tool's name in pieces",
            vec![
                chunk(json!({"tool_calls": [{"index": 0, "id": "c", "function": {"name": start, "arguments": ""}}]})),
                chunk(json!({"tool_calls": [{"index": 0, "function": {"name": end}}]})),
            ],
        ),
        (
            "ids that change",
            vec![
                chunk(json!({"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f"}}]})),
                chunk(json!({"tool_calls": [{"index": 0, "id": LEAK}]})),
            ],
        ),
    ] {
        let events = [events, vec![ended.clone()]].concat();
        let world = Harness::new(Settings::default(), Arc::new(move |_| streamed(&events))).await;
        let mut body = question();
        body["stream"] = true.into();
        let got = world.chat(&body).await;
        assert!(!got.leaks(), "{name}: {}", got.body);
    }
}

#[tokio::test]
async fn upstream_errors_are_reworded() {
    let fail = |status: u16, body: Value| {
        move |_: &Value| {
            let headers =
                [("content-type", "application/json"), ("x-note", LEAK), ("retry-after", "7")];
            let body = body.to_string();
            (axum::http::StatusCode::from_u16(status).unwrap(), headers, body).into_response()
        }
    };
    for (status, body) in [
        (
            400,
            json!({"error": {"message": LEAK, "code": "json_validate_failed", "failed_generation": LEAK}}),
        ),
        (400, json!({"error": {"message": LEAK, "type": LEAK, "code": LEAK, "param": LEAK}})),
        (400, json!({"error": LEAK})),
        (400, json!({"detail": [{"msg": LEAK, "loc": ["body", LEAK]}]})),
        (404, json!({"message": LEAK})),
        (422, json!(LEAK)),
        (429, json!({"error": {"message": LEAK}})),
        (500, json!({"error": {"message": LEAK}})),
        (302, json!(LEAK)),
        (304, json!(LEAK)),
    ] {
        let world = Harness::new(Settings::default(), Arc::new(fail(status, body.clone()))).await;
        for stream in [false, true] {
            let mut asked = question();
            asked["stream"] = stream.into();
            let got = world.chat(&asked).await;
            assert!(!got.leaks(), "{body}: {} {:?}", got.body, got.headers);
            // A status that is not an error is not passed on: some have no body.
            let (says, code) =
                if status < 400 { (502, "upstream_failed") } else { (status, "upstream_refused") };
            assert_eq!((got.status.as_u16(), &got.json()["error"]["code"]), (says, &json!(code)));
            assert_eq!(got.headers["retry-after"], "7");
        }
        for (path, asked) in [
            ("/v1/guard", json!({"query": "What is this?", "images": [IMAGE]})),
            ("/v1/moderations", json!({"model": "m", "input": "Hi"})),
        ] {
            let got = world.send("POST", path, &[], asked.to_string()).await;
            assert!(!got.leaks() && !got.status.is_success(), "{path}: {}", got.body);
        }
    }
    // Headers that clients act on are kept.
    let body =
        json!({"error": {"message": LEAK, "code": "context_length_exceeded", "param": "messages"}});
    let world = Harness::new(Settings::default(), Arc::new(fail(400, body))).await;
    let error = world.chat(&question()).await.json()["error"].clone();
    assert_eq!(
        (&error["code"], &error["param"]),
        (&json!("context_length_exceeded"), &json!("messages"))
    );
    assert!(error["message"].as_str().unwrap().contains("maximum context length"));
}

#[tokio::test]
async fn upstream_headers_with_sentences_are_dropped() {
    let respond = |_: &Value| {
        let mut answer = said(&json!({"role": "assistant", "content": "Bread."}), &Value::Null);
        let sentence = format!("{LEAK} words here");
        for (name, value) in [
            ("x-request-id", sentence.as_str()),
            ("x-ratelimit-limit", &sentence),
            ("retry-after", &sentence),
            ("request-id", "req_1"),
            ("x-ratelimit-policy", "100, 100;w=60"),
        ] {
            answer.headers_mut().insert(name, value.parse().unwrap());
        }
        answer
    };
    let world = Harness::new(Settings::default(), Arc::new(respond)).await;
    let got = world.chat(&question()).await;
    assert!(got.status.is_success() && !got.leaks(), "{:?}", got.headers);
    assert_eq!(
        (&got.headers["request-id"], &got.headers["x-ratelimit-policy"]),
        (&"req_1".parse().unwrap(), &"100, 100;w=60".parse().unwrap())
    );
}
