//! Anthropic's Messages and OpenAI's Responses through the gateway: what is asked, what goes out,
//! and where images hide.

use std::sync::Arc;

use axum::{body::Body, http::Response};
use ecso::{Profile, profile::Rewrite};
use ecso_gateway::Settings;
use serde_json::{Value, json};

use crate::support::{Harness, IMAGE, LEAK, TestResponse, merge, said, streamed};

const MESSAGES: &str = "/v1/messages";
const RESPONSES: &str = "/v1/responses";

/// Answers harmfully if asked to, calls a tool if there is one, and explains bread otherwise.
fn respond(sent: &Value) -> Response<Body> {
    let text = sent["messages"].to_string();
    let (message, finish) = if sent["tools"].is_array() {
        let call = json!({"index": 0, "id": "call_1", "type": "function", "function": {"name": "bake", "arguments": "{\"loaves\":2}"}});
        (json!({"role": "assistant", "content": null, "tool_calls": [call]}), "tool_calls")
    } else {
        let says = if text.contains("do harm") { LEAK } else { "Bread." };
        (json!({"role": "assistant", "content": says}), "stop")
    };
    if sent["stream"] == true {
        let usage = json!({"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9});
        // Calls, texts and reasoning come in chunks.
        let deltas = if finish == "tool_calls" {
            let piece = |call: Value| json!({"tool_calls": [call]});
            vec![
                piece(
                    json!({"index": 0, "id": "call_1", "type": "function", "function": {"name": "bake", "arguments": ""}}),
                ),
                piece(json!({"index": 0, "function": {"arguments": "{\"loaves\""}})),
                piece(json!({"index": 0, "id": "", "function": {"arguments": ":2}"}})),
                piece(
                    json!({"index": 1, "id": "call_2", "type": "function", "function": {"name": "rest", "arguments": ""}}),
                ),
            ]
        } else {
            let (first, last) = message["content"].as_str().unwrap().split_at(2);
            vec![
                json!({"reasoning_content": "Hm"}),
                json!({"reasoning_content": "m."}),
                json!({"content": first}),
                json!({"content": last}),
            ]
        };
        let choice = |delta: Value, finish: Value| {
            json!({"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})
                .to_string()
        };
        let mut events: Vec<String> =
            deltas.into_iter().map(|delta| choice(delta, Value::Null)).collect();
        events.push(choice(json!({}), finish.into()));
        events.push(json!({"id": "c", "choices": [], "usage": usage}).to_string());
        return streamed(&events);
    }
    said(&message, &json!({"choices": [{"finish_reason": finish}]}))
}

async fn world(rewrite: Rewrite) -> Harness {
    let mut profile = Profile::paper();
    profile.rewrite = rewrite;
    Harness::with(Settings::default(), profile, Arc::new(respond)).await
}

/// A question about an image, in each format.
fn asked(path: &str, text: &str, stream: bool, more: &Value) -> String {
    let data = IMAGE.split(',').nth(1).unwrap();
    let mut body = if path == MESSAGES {
        json!({"model": "m", "max_tokens": 50, "stream": stream, "system": "Be kind.", "messages": [{"role": "user", "content": [
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}},
            {"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}]}]})
    } else {
        json!({"model": "m", "max_output_tokens": 50, "stream": stream, "instructions": "Be kind.", "input": [{"role": "user",
            "content": [{"type": "input_image", "image_url": IMAGE, "detail": "auto"}, {"type": "input_text", "text": text}]}]})
    };
    merge(&mut body, more);
    body.to_string()
}

async fn send(world: &Harness, path: &str, body: String) -> TestResponse {
    world.send("POST", path, &[("anthropic-version", "2023-06-01")], body).await
}

/// The events of a stream. Each is named by its type, and is complete.
fn events(got: &TestResponse) -> Vec<Value> {
    let events = got.body.split("\n\n").filter(|event| event.starts_with("event: "));
    let read = |event: &str| {
        let (name, data) = event.strip_prefix("event: ").unwrap().split_once("\ndata: ").unwrap();
        let data: Value = serde_json::from_str(data).unwrap();
        assert_eq!(data["type"], name);
        data
    };
    events.map(read).collect()
}

/// The text that the client reads, and how the answer ended; for a stream, from its chunks.
fn text(path: &str, got: &TestResponse) -> (String, String) {
    let is_stream = got.headers["content-type"] == "text/event-stream";
    let join = |texts: Vec<Value>| texts.iter().filter_map(Value::as_str).collect::<String>();
    match (path, is_stream) {
        (MESSAGES, false) => {
            let message = got.json();
            let blocks = message["content"]
                .as_array()
                .unwrap()
                .iter()
                .map(|block| block["text"].clone())
                .collect();
            (join(blocks), message["stop_reason"].as_str().unwrap().to_owned())
        }
        (MESSAGES, true) => {
            let events = events(got);
            let ended = &events[events.len() - 2]["delta"]["stop_reason"];
            let texts = events.iter().map(|event| event["delta"]["text"].clone()).collect();
            (join(texts), ended.as_str().unwrap().to_owned())
        }
        (_, false) => {
            let response = got.json();
            let part = &response["output"][0]["content"][0];
            (
                join(vec![part["text"].clone(), part["refusal"].clone()]),
                part["type"].as_str().unwrap_or("").to_owned(),
            )
        }
        (_, true) => {
            let events = events(got);
            for (number, event) in events.iter().enumerate() {
                assert_eq!(event["sequence_number"], number);
            }
            let parts = || events.iter().filter_map(|event| event["part"]["type"].as_str());
            let kind =
                parts().find(|kind| *kind != "reasoning_text").unwrap_or_default().to_owned();
            let is_said = |event: &&Value| {
                event["type"] == "response.output_text.delta"
                    || event["type"] == "response.refusal.delta"
            };
            (
                join(events.iter().filter(is_said).map(|event| event["delta"].clone()).collect()),
                kind,
            )
        }
    }
}

#[tokio::test]
async fn answers_are_passed_replaced_or_withheld() {
    let (safe, refuse) = (world(Rewrite::Safe).await, world(Rewrite::Refuse).await);
    let refusal = Profile::paper().refusal;
    for (path, done, declined) in
        [(MESSAGES, "end_turn", "refusal"), (RESPONSES, "output_text", "refusal")]
    {
        for stream in [false, true] {
            let ask = |text: &str| asked(path, text, stream, &Value::Null);
            let got = send(&safe, path, ask("What is this?")).await;
            assert_eq!(
                text(path, &got),
                ("Bread.".into(), done.into()),
                "{path} {stream}: {}",
                got.body
            );
            let got = send(&safe, path, ask("do harm")).await;
            assert_eq!(
                text(path, &got),
                ("Here is a harmless answer.".into(), done.into()),
                "{path}: {}",
                got.body
            );
            assert!(!got.leaks());
            let got = send(&refuse, path, ask("do harm")).await;
            assert_eq!(
                text(path, &got),
                (refusal.clone(), declined.into()),
                "{path} {stream}: {}",
                got.body
            );
            assert!(!got.leaks());
            let got = send(&safe, path, ask("judge-500")).await;
            assert!(!got.leaks() && !got.body.contains("Bread"), "{}", got.body);
            if stream {
                let last = if path == MESSAGES { "error" } else { "response.failed" };
                assert_eq!(events(&got).last().unwrap()["type"], last, "{}", got.body);
            } else {
                assert!(got.status.is_server_error(), "{}", got.status);
                assert!(got.json()["error"]["message"].is_string(), "{}", got.body);
                assert_eq!(got.json()["type"] == "error", path == MESSAGES);
            }
        }
        let got = send(&safe, path, asked(path, "do harm", false, &Value::Null)).await;
        assert_eq!(got.headers["x-ecso-verdict"], "unsafe");
    }
}

/// The verdict is in a header, or at the end of a stream, or in the format's own field for it.
#[tokio::test]
async fn verdicts_are_reported() {
    let world = world(Rewrite::Safe).await;
    for (text, verdict) in [("What is this?", "safe"), ("do harm", "unsafe")] {
        for path in [MESSAGES, RESPONSES] {
            let more = if path == RESPONSES {
                json!({"moderation": {"model": "ecso"}})
            } else {
                Value::Null
            };
            let plain = send(&world, path, asked(path, text, false, &more)).await;
            assert_eq!(plain.headers["x-ecso-verdict"], verdict);
            let streamed = send(&world, path, asked(path, text, true, &more)).await;
            assert!(!streamed.headers.contains_key("x-ecso-verdict"));
            let last = events(&streamed).pop().unwrap();
            let (ecso, moderations) = if path == MESSAGES {
                (&last["ecso"], vec![])
            } else {
                (
                    &last["response"]["ecso"],
                    vec![
                        plain.json()["moderation"].clone(),
                        last["response"]["moderation"].clone(),
                    ],
                )
            };
            assert_eq!(ecso["verdict"], verdict, "{last}");
            for moderation in moderations {
                let is_harm = verdict == "unsafe";
                assert_eq!(
                    (
                        &moderation["output"]["flagged"],
                        &moderation["output"]["categories"]["harmful"]
                    ),
                    (&json!(is_harm), &json!(is_harm)),
                    "{moderation}"
                );
                assert_eq!(moderation["output"]["type"], "moderation_result");
            }
        }
    }
}

#[tokio::test]
async fn tokens_are_estimated() {
    let world = world(Rewrite::Safe).await;
    let count = async |more: Value| {
        let body = asked(MESSAGES, "What is this?", false, &more);
        let got = world.send("POST", "/v1/messages/count_tokens?beta=true", &[], body).await;
        (got.status.as_u16(), got.json())
    };
    let (_, few) = count(Value::Null).await;
    let few = few["input_tokens"].as_u64().unwrap();
    assert!((1600..1650).contains(&few), "{few}");
    let tools = json!({"tools": [{"name": "bake", "description": "Bakes. ".repeat(100), "input_schema": {"type": "object"}}]});
    let more = count(tools).await.1["input_tokens"].as_u64().unwrap();
    assert!((170..250).contains(&(more - few)), "{more}");
    // What can't be guarded can't be counted, and nothing of it is forwarded.
    let (status, error) = count(json!({"images": [IMAGE]})).await;
    assert_eq!(
        (status, &error["error"]["type"], &error["error"]["code"]),
        (400, &json!("invalid_request_error"), &json!("unknown_field"))
    );
    assert!(world.take_requests().is_empty());
}

/// A tool choice can only name the tools of the chat.
#[tokio::test]
async fn tool_choice_names_existing_tools() {
    let world = world(Rewrite::Safe).await;
    let ask = async |choice: Value| {
        let tools = json!([{"type": "function", "name": "bake"}, {"type": "custom", "name": "knead"}, {"type": "local_shell"},
            {"type": "namespace", "name": "oven", "tools": [{"type": "function", "name": "bake"}]}, {"type": "web_search"}]);
        let more = json!({"tools": tools, "tool_choice": choice});
        let got = send(&world, RESPONSES, asked(RESPONSES, "Bake it.", false, &more)).await;
        let sent = world
            .take_requests()
            .first()
            .map(|reached| serde_json::from_slice::<Value>(&reached.body).unwrap());
        let names = |sent: &Value| {
            sent["tools"]
                .as_array()
                .unwrap()
                .iter()
                .map(|tool| tool["function"]["name"].as_str().unwrap().to_owned())
                .collect()
        };
        let names: Vec<String> = sent.as_ref().map(names).unwrap_or_default();
        (got.status.as_u16(), names, sent.unwrap_or_default()["tool_choice"].clone())
    };
    let all = ["bake", "knead", "local_shell", "oven__bake"].map(str::to_owned);
    let function = |name: &str| json!({"type": "function", "function": {"name": name}});
    let allowed =
        |mode: &str, tools: Value| json!({"type": "allowed_tools", "mode": mode, "tools": tools});
    for (choice, tools, sent) in [
        (json!("required"), &all[..], json!("required")),
        (json!({"type": "custom", "name": "knead"}), &all[..], function("knead")),
        (json!({"type": "local_shell"}), &all[..], function("local_shell")),
        (
            json!({"type": "function", "name": "bake", "namespace": "oven"}),
            &all[..],
            function("oven__bake"),
        ),
        (
            allowed("auto", json!([{"type": "web_search"}, {"type": "custom", "name": "knead"}])),
            &all[1..2],
            json!("auto"),
        ),
        (
            allowed(
                "required",
                json!([{"type": "local_shell"}, {"type": "function", "name": "bake", "namespace": "oven"}]),
            ),
            &all[2..],
            json!("required"),
        ),
    ] {
        assert_eq!(ask(choice.clone()).await, (200, tools.to_vec(), sent), "{choice}");
    }
    for choice in [
        json!({"type": "function", "name": "rest"}),
        json!({"type": "function", "name": "bake", "namespace": "shop"}),
        json!({"type": "web_search"}),
        json!({"type": "shell"}),
        allowed("none", json!([{"type": "local_shell"}])),
        allowed("auto", json!([{"type": "web_search"}])),
        allowed("auto", json!([{"type": "function", "name": "rest"}])),
        allowed("auto", json!([])),
    ] {
        assert_eq!(ask(choice.clone()).await, (400, Vec::new(), Value::Null), "{choice}");
    }
}

#[tokio::test]
async fn streams_have_all_expected_events() {
    let world = world(Rewrite::Safe).await;
    let kinds = |got: &TestResponse| -> Vec<String> {
        events(got).iter().map(|event| event["type"].as_str().unwrap().to_owned()).collect()
    };
    let got = send(&world, MESSAGES, asked(MESSAGES, "What is this?", true, &Value::Null)).await;
    assert_eq!(
        kinds(&got),
        [
            "message_start",
            "content_block_start",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop"
        ]
    );
    let last = events(&got);
    assert_eq!(last[4]["usage"]["output_tokens"], 2);
    assert_eq!(last[5]["ecso"]["verdict"], "safe");
    let got = send(&world, RESPONSES, asked(RESPONSES, "What is this?", true, &Value::Null)).await;
    assert_eq!(
        kinds(&got),
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.reasoning_text.delta",
            "response.reasoning_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed"
        ]
    );
    let ended = events(&got).pop().unwrap();
    assert_eq!(ended["response"]["usage"]["total_tokens"], 9);
    assert_eq!(ended["response"]["ecso"]["verdict"], "safe");
}

#[tokio::test]
async fn tool_calls_and_results_are_translated() {
    let world = world(Rewrite::Safe).await;
    for stream in [false, true] {
        let tools = json!({"tools": [{"name": "bake", "description": "Bakes.", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "any"}});
        let got = send(&world, MESSAGES, asked(MESSAGES, "Bake it.", stream, &tools)).await;
        assert!(got.body.contains("tool_use") && got.body.contains("bake"), "{}", got.body);
        if !stream {
            assert_eq!(got.json()["content"][0]["input"], json!({"loaves": 2}));
            assert_eq!(got.json()["stop_reason"], "tool_use");
        }
        let sent: Value = serde_json::from_slice(&world.take_requests()[0].body).unwrap();
        assert_eq!(
            (&sent["tool_choice"], &sent["tools"][0]["function"]["name"]),
            (&json!("required"), &json!("bake"))
        );
        let tools = json!({"tools": [{"type": "function", "name": "bake", "parameters": {"type": "object"}},
            {"type": "custom", "name": "knead", "description": "Kneads."}]});
        let got = send(&world, RESPONSES, asked(RESPONSES, "Bake it.", stream, &tools)).await;
        assert!(
            got.body.contains("function_call") && got.body.contains(r#"{\"loaves\":2}"#),
            "{}",
            got.body
        );
        // Two calls in chunks are both complete.
        if stream {
            let output = &events(&got).pop().unwrap()["response"]["output"];
            assert_eq!(
                (&output[0]["arguments"], &output[1]["arguments"]),
                (&json!("{\"loaves\":2}"), &json!("{}")),
                "{output}"
            );
        }
        world.take_requests();
    }
    // An image in a tool result is the user's, and is judged.
    let data = IMAGE.split(',').nth(1).unwrap();
    let image = json!({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}});
    let body = json!({"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "What do you see? do harm"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": "QUJD"},
            {"type": "tool_use", "id": "t1", "name": "look", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [image]}]}]});
    let got = send(&world, MESSAGES, body.to_string()).await;
    assert_eq!((got.status.as_u16(), got.leaks()), (200, false), "{}", got.body);
    assert_eq!(got.headers["x-ecso-verdict"], "unsafe");
    // The judge reads the user's own question.
    let judged = world
        .take_requests()
        .into_iter()
        .map(|reached| String::from_utf8_lossy(&reached.body).into_owned());
    assert!(
        judged
            .filter(|body| body.contains("harmful, unsafe and unethical"))
            .all(|body| body.contains("What do you see?"))
    );
    let body = json!({"model": "m", "input": [{"role": "user", "content": "What do you see? do harm"},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_image", "image_url": IMAGE}]}]});
    let got = send(&world, RESPONSES, body.to_string()).await;
    assert_eq!((got.status.as_u16(), got.leaks()), (200, false), "{}", got.body);
    assert_eq!(got.headers["x-ecso-verdict"], "unsafe");
}

/// The label before the images of a tool does not merge other turns.
#[tokio::test]
async fn the_label_of_tool_images_does_not_merge_turns() {
    let world = world(Rewrite::Safe).await;
    let image = json!({"type": "image_url", "image_url": {"url": IMAGE}});
    let body = json!({"model": "m", "messages": [{"role": "user", "content": "Flour?"}, {"role": "assistant", "content": "Rye."},
        {"role": "user", "content": [{"type": "text", "text": "What the tool shows:"}, image, {"type": "text", "text": "do harm"}]}]});
    let got = world.chat(&body).await;
    assert_eq!(
        (got.headers["x-ecso-verdict"].as_bytes(), got.leaks()),
        (b"unsafe".as_slice(), false),
        "{}",
        got.body
    );
    let judged = world
        .take_requests()
        .into_iter()
        .map(|reached| String::from_utf8_lossy(&reached.body).into_owned());
    assert!(
        judged
            .filter(|body| body.contains("harmful, unsafe and unethical"))
            .all(|body| !body.contains("Rye."))
    );
}

/// What coding agents send, according to their documentation.
#[tokio::test]
async fn requests_of_coding_agents_pass() {
    let world = world(Rewrite::Safe).await;
    let cached = json!({"type": "ephemeral"});
    let agent = json!({"metadata": {"user_id": "user_1"}, "stream": true, "temperature": 1,
        "thinking": {"type": "enabled", "budget_tokens": 1024}, "context_management": {"edits": [{"type": "clear_thinking_20251015"}]},
        "system": [{"type": "text", "text": "You bake.", "cache_control": cached}],
        "tools": [{"name": "Bash", "description": "Runs.", "input_schema": {"type": "object", "properties": {"command": {"type": "string"}}},
            "cache_control": cached}]});
    let got = send(&world, MESSAGES, asked(MESSAGES, "Bake it.", true, &agent)).await;
    assert_eq!(got.status, 200, "{}", got.body);
    assert!(
        events(&got).iter().any(|event| event["content_block"]["type"] == "tool_use"),
        "{}",
        got.body
    );
    let agent = json!({"store": false, "stream": true, "include": ["reasoning.encrypted_content"], "prompt_cache_key": "k",
        "parallel_tool_calls": false, "tool_choice": "auto", "reasoning": {"effort": "medium", "summary": "auto"},
        "text": {"verbosity": "medium"}, "client_metadata": {"a": "b"},
        "tools": [{"type": "function", "name": "shell", "strict": false, "parameters": {"type": "object"}},
            {"type": "custom", "name": "bake", "description": "Bakes.", "format": {"type": "grammar", "syntax": "lark", "definition": "start: /x/"}}],
        "input": [{"type": "message"}, {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "QUJD"},
            {"type": "custom_tool_call", "id": "ctc_1", "call_id": "c1", "name": "bake", "input": "two", "status": "completed"},
            {"type": "custom_tool_call_output", "call_id": "c1", "output": "done"}]});
    let got = send(&world, RESPONSES, asked(RESPONSES, "Bake it.", true, &agent)).await;
    assert_eq!(got.status, 200, "{}", got.body);
    assert_eq!(events(&got).last().unwrap()["type"], "response.completed", "{}", got.body);
}

#[tokio::test]
async fn invisible_content_is_refused() {
    let world = world(Rewrite::Safe).await;
    for (place, (path, body)) in invisible_content() {
        is_refused(&world, path, place, body).await;
    }
}

/// Requests with content that the guard can't see: what it is, the path, and the body.
#[expect(clippy::too_many_lines, reason = "a table")]
fn invisible_content() -> Vec<(&'static str, (&'static str, Value))> {
    let messages = |content: Value| {
        (
            MESSAGES,
            json!({"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": content}]}),
        )
    };
    let message = |more: Value| {
        let mut body = messages(json!("do harm")).1;
        merge(&mut body, &more);
        (MESSAGES, body)
    };
    let input = |items: Value| (RESPONSES, json!({"model": "m", "input": items}));
    let responses = |more: Value| {
        let mut body = input(json!("do harm")).1;
        merge(&mut body, &more);
        (RESPONSES, body)
    };
    let part = |part: Value| {
        input(
            json!([{"role": "user", "content": [part, {"type": "input_text", "text": "do harm"}]}]),
        )
    };
    let data = IMAGE.split(',').nth(1).unwrap();
    vec![
        (
            "a file",
            messages(json!([{"type": "image", "source": {"type": "file", "file_id": "f"}}])),
        ),
        (
            "a PDF",
            messages(
                json!([{"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": data}}]),
            ),
        ),
        (
            "a document elsewhere",
            messages(
                json!([{"type": "document", "source": {"type": "url", "url": "https://a.example/b.pdf"}}]),
            ),
        ),
        ("an upload", messages(json!([{"type": "container_upload", "file_id": "f"}]))),
        (
            "an image of the model",
            message(
                json!({"messages": [{"role": "assistant", "content": [{"type": "image", "source": {"type": "url", "url": "https://a.example/b.png"}}]}]}),
            ),
        ),
        (
            "a tool of the server",
            message(json!({"tools": [{"type": "web_search_20250305", "name": "web_search"}]})),
        ),
        ("a container", message(json!({"container": "c"}))),
        (
            "servers of tools",
            message(json!({"mcp_servers": [{"type": "url", "url": "https://a.example"}]})),
        ),
        (
            "another source",
            messages(
                json!([{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data, "url": "https://a.example/b.png"}}]),
            ),
        ),
        ("an unknown field", message(json!({"images": [IMAGE]}))),
        ("an earlier answer", responses(json!({"previous_response_id": "resp_1"}))),
        ("a conversation", responses(json!({"conversation": "conv_1"}))),
        ("a prompt", responses(json!({"prompt": {"id": "p"}}))),
        ("in the background", responses(json!({"background": true}))),
        (
            "a reference",
            input(
                json!([{"type": "item_reference", "id": "msg_1"}, {"role": "user", "content": "do harm"}]),
            ),
        ),
        ("a file's id", part(json!({"type": "input_image", "file_id": "f"}))),
        (
            "a picture of the model",
            input(
                json!([{"role": "assistant", "content": [{"type": "input_image", "image_url": IMAGE}]}, {"role": "user", "content": "do harm"}]),
            ),
        ),
        ("a file", part(json!({"type": "input_file", "file_data": IMAGE}))),
        (
            "a recording",
            part(json!({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}})),
        ),
        (
            "a screen",
            input(
                json!([{"type": "computer_call_output", "call_id": "c", "output": {"type": "computer_screenshot", "image_url": IMAGE}}]),
            ),
        ),
        (
            "a picture that was made",
            input(
                json!([{"type": "image_generation_call", "id": "i", "result": data, "status": "completed"}]),
            ),
        ),
        (
            "what a server of tools said",
            input(
                json!([{"type": "mcp_call", "id": "i", "output": IMAGE, "name": "n", "arguments": "{}", "server_label": "s"}]),
            ),
        ),
        ("a tool of the server", responses(json!({"tools": [{"type": "image_generation"}]}))),
        (
            "another moderation",
            responses(json!({"moderation": {"model": "omni-moderation-latest"}})),
        ),
        ("an unknown field", responses(json!({"images": [IMAGE]}))),
    ]
}

/// Sends a request, whole and as a stream, that must be refused before anything of it is forwarded.
async fn is_refused(world: &Harness, path: &str, place: &str, mut body: Value) {
    for stream in [false, true] {
        body["stream"] = stream.into();
        let got = send(world, path, body.to_string()).await;
        assert!(
            got.status.is_client_error() && !got.leaks(),
            "{path}, {place}: {} {}",
            got.status,
            got.body
        );
        assert!(got.json()["error"]["code"].is_string(), "{place}: {}", got.body);
        assert!(world.take_requests().is_empty(), "{place}: it went on");
    }
}

#[tokio::test]
async fn images_do_not_hide_among_tools() {
    let world = world(Rewrite::Safe).await;
    let asks = json!({"role": "user", "content": "do harm"});
    let input = |item: Value| (RESPONSES, json!({"model": "m", "input": [item, asks]}));
    let tools =
        |tools: Value| (RESPONSES, json!({"model": "m", "input": "do harm", "tools": tools}));
    let result = |block: Value| {
        let content = json!([{"type": "tool_result", "tool_use_id": "t", "content": [block]}]);
        (
            MESSAGES,
            json!({"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": content}]}),
        )
    };
    for (place, (path, body)) in [
        (
            "a tool that nobody here knows",
            tools(json!([{"type": "function", "name": "bake"}, {"type": "shell"}])),
        ),
        ("beside a tool", tools(json!([{"type": "local_shell", "image_url": IMAGE}]))),
        (
            "beside a tool of a namespace",
            tools(json!([{"type": "namespace", "name": "n",
            "tools": [{"type": "function", "name": "bake", "image_url": IMAGE}]}])),
        ),
        (
            "beside a namespace",
            tools(json!([{"type": "namespace", "name": "n", "image_url": IMAGE,
            "tools": [{"type": "function", "name": "bake"}]}])),
        ),
        (
            "a namespace in a namespace",
            tools(json!([{"type": "namespace", "name": "n",
            "tools": [{"type": "namespace", "name": "m", "tools": [{"type": "function", "name": "bake"}]}]}])),
        ),
        (
            "in what is said of a tool",
            tools(json!([{"type": "local_shell"},
            {"type": "custom", "name": "bake", "description": format!("![]({IMAGE})")}])),
        ),
        (
            "two tools of one name",
            tools(
                json!([{"type": "function", "name": "bake"}, {"type": "custom", "name": "bake"}]),
            ),
        ),
        (
            "beside a command",
            input(
                json!({"type": "local_shell_call", "call_id": "c", "action": {"command": ["ls"]}, "image_url": IMAGE}),
            ),
        ),
        (
            "in a command",
            input(
                json!({"type": "local_shell_call", "call_id": "c", "action": {"command": [format!("![]({IMAGE})")]}}),
            ),
        ),
        (
            "in what a command shows",
            input(json!({"type": "local_shell_call_output", "id": "c",
            "output": [{"type": "computer_screenshot", "image_url": IMAGE}]})),
        ),
        (
            "beside a tool that was found",
            result(
                json!({"type": "tool_reference", "tool_name": "bake", "source": {"type": "url", "url": "https://a.example/b.png"}}),
            ),
        ),
        (
            "in a tool that was found",
            result(json!({"type": "tool_reference", "tool_name": format!("![]({IMAGE})")})),
        ),
        (
            "an answer of another server",
            (
                RESPONSES,
                json!({"model": "m", "input": "do harm", "previous_response_id": "resp_1"}),
            ),
        ),
        (
            "a list of answers",
            (
                RESPONSES,
                json!({"model": "m", "input": "do harm", "previous_response_id": ["resp_1"]}),
            ),
        ),
    ] {
        is_refused(&world, path, place, body).await;
    }
}

#[tokio::test]
async fn keys_and_routes_work_in_every_format() {
    let mut settings = Settings::default();
    let (key, entry) = ecso_gateway::settings::Key::generate();
    settings.keys.insert("app".into(), entry);
    let world = Harness::new(settings, Arc::new(respond)).await;
    let body = asked(MESSAGES, "What is this?", false, &Value::Null);
    for (headers, status) in [
        (vec![], 401),
        (vec![("x-api-key", "wrong")], 401),
        (vec![("x-api-key", key.as_str())], 200),
    ] {
        let got = world.send("POST", MESSAGES, &headers, body.clone()).await;
        assert_eq!(got.status.as_u16(), status, "{}", got.body);
        if status == 401 {
            assert_eq!(got.json()["error"]["type"], "authentication_error");
        }
    }
    let bearer = format!("Bearer {key}");
    for (method, path) in [
        ("GET", "/v1/responses/resp_1"),
        ("POST", "/v1/responses/"),
        ("POST", "/v1/messages/batches"),
        ("GET", "/v1/messages/count_tokens"),
        ("GET", MESSAGES),
    ] {
        let got = world.send(method, path, &[("authorization", &bearer)], body.clone()).await;
        assert_eq!(
            got.json()["error"]["code"],
            "route_not_guarded",
            "{method} {path}: {}",
            got.body
        );
    }
}

/// An earlier answer keeps its place: the judge of `paper` reads the new answer, whatever follows
/// an earlier one.
#[tokio::test]
async fn earlier_answers_are_not_part_of_the_new_one() {
    let world = world(Rewrite::Safe).await;
    let data = IMAGE.split(',').nth(1).unwrap();
    let long = "Bread is good. ".repeat(140);
    let image = json!({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}});
    let messages = |last: Value| {
        let turns = json!([{"role": "user", "content": [image, {"type": "text", "text": "What is this?"}]},
            {"role": "assistant", "content": long}, last]);
        (MESSAGES, json!({"model": "m", "max_tokens": 50, "messages": turns}))
    };
    let result = |more: Value| json!({"type": "tool_result", "tool_use_id": "c", "content": more});
    let chats = |behind: Value| {
        let mut turns = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": IMAGE}},
            {"type": "text", "text": "What is this?"}]}, {"role": "assistant", "content": long}]);
        turns.as_array_mut().unwrap().extend(behind.as_array().unwrap().clone());
        ("/v1/chat/completions", json!({"model": "m", "messages": turns}))
    };
    let tool = json!({"role": "tool", "tool_call_id": "c", "content": "do harm"});
    let shown = json!({"role": "user", "content": [{"type": "text", "text": "What the tool shows:"},
        {"type": "image_url", "image_url": {"url": IMAGE}}, {"type": "text", "text": "do harm"}]});
    for (path, mut body) in [
        messages(
            json!({"role": "user", "content": [result(json!([image])), {"type": "text", "text": "do harm"}]}),
        ),
        messages(json!({"role": "user", "content": [result(json!("do harm"))]})),
        messages(json!({"role": "system", "content": "do harm"})),
        chats(json!([tool])),
        chats(json!([tool, shown])),
        chats(json!([{"role": "system", "content": "do harm"}])),
    ] {
        for stream in [false, true] {
            body["stream"] = stream.into();
            let got = send(&world, path, body.to_string()).await;
            assert!(got.status.is_success() && !got.leaks(), "{path} {}", got.body);
            let judged = world
                .take_requests()
                .into_iter()
                .map(|reached| String::from_utf8_lossy(&reached.body).into_owned());
            let detect = judged
                .filter(|body| body.contains("harmful, unsafe and unethical"))
                .collect::<String>();
            assert!(detect.contains(&format!("RESPONSE:\\n{LEAK}")), "{detect}");
        }
    }
}

/// A call is a call, however the server ends it. Omitted tools are listed briefly, and can't be
/// chosen.
#[tokio::test]
async fn finish_reasons_of_calls_and_omitted_tools() {
    let call =
        json!({"id": "c", "type": "function", "function": {"name": "bake", "arguments": "{}"}});
    let stops = Arc::new(move |_: &Value| {
        said(&json!({"role": "assistant", "content": null, "tool_calls": [call]}), &Value::Null)
    });
    let world = Harness::with(Settings::default(), Profile::paper(), stops).await;
    let bake = json!({"name": "bake", "input_schema": {"type": "object"}});
    let search = json!({"type": "web_search_20250305", "name": "web_search"});
    let ask = async |path: &str, tools: Value, choice: Value| {
        send(
            &world,
            path,
            asked(path, "Bake it.", false, &json!({"tools": tools, "tool_choice": choice})),
        )
        .await
    };
    let tool = |name: &str| json!({"type": "tool", "name": name});
    let got = ask(MESSAGES, json!([bake, search, search]), tool("bake")).await;
    assert_eq!(got.json()["stop_reason"], "tool_use", "{}", got.body);
    assert_eq!(got.headers["x-ecso-tools-left-out"], "web_search_20250305");
    world.take_requests();
    let odd = json!({"type": format!("web_search_{}", "a".repeat(70_000)), "name": "web_search"});
    for (tools, choice) in
        [(json!([bake, search]), tool("web_search")), (json!([bake, odd]), tool("bake"))]
    {
        let got = ask(MESSAGES, tools, choice).await;
        assert_eq!((got.status.as_u16(), world.take_requests().len()), (400, 0), "{}", got.body);
    }
    let mut tools = vec![json!({"type": "function", "name": "bake"})];
    tools.extend((0..3000).map(|_| json!({"type": "mcp"})));
    let got = ask(RESPONSES, tools.into(), Value::Null).await;
    assert_eq!(got.headers["x-ecso-tools-left-out"], "mcp");
    for store in [json!("false"), json!(0), json!([])] {
        let got =
            send(&world, RESPONSES, asked(RESPONSES, "Bake it.", false, &json!({"store": store})))
                .await;
        assert_eq!(
            (got.status.as_u16(), &got.json()["error"]["param"]),
            (400, &json!("store")),
            "{}",
            got.body
        );
    }
}

/// If the upstream answers messages, it also counts their tokens.
#[tokio::test]
async fn the_upstream_counts_tokens_of_its_own_messages() {
    let counts = |_: &Value| said(&json!({}), &json!({"input_tokens": 7}));
    let (key, entry) = ecso_gateway::settings::Key::generate();
    let mut settings = Settings { mode_header: true, ..Settings::default() };
    settings.keys.insert("app".into(), entry);
    settings.modes.insert("watched".into(), ecso_gateway::settings::Mode::Observe);
    let world =
        Harness::with_key(settings, Profile::paper(), Arc::new(counts), Some("operator")).await;
    let body = asked(MESSAGES, "What is this?", false, &Value::Null);
    let count = async |headers: &[(&str, &str)], body: &str| {
        let key = [
            ("x-api-key", key.as_str()),
            ("anthropic-version", "2023-06-01"),
            ("anthropic-beta", "b"),
            ("x-odd", "o"),
        ];
        let headers = [&key[..], headers].concat();
        let got = world.send("POST", "/v1/messages/count_tokens", &headers, body.to_owned()).await;
        (got.json(), world.take_requests().pop().map(|reached| reached.headers))
    };
    for mode in ["observe", "off"] {
        let (counted, sent) = count(&[("x-ecso-mode", mode)], &body).await;
        let sent = sent.unwrap();
        assert_eq!(
            (&counted["input_tokens"], &sent["authorization"]),
            (&json!(7), &"Bearer operator".parse().unwrap())
        );
        assert_eq!(
            (&sent["anthropic-version"], &sent["anthropic-beta"]),
            (&"2023-06-01".parse().unwrap(), &"b".parse().unwrap())
        );
        assert!(!sent.contains_key("x-odd") && !sent.contains_key("x-api-key"));
    }
    for (mode, body, code) in
        [("enforce", body.as_str(), None), ("loud", &body, Some("invalid_mode"))]
    {
        let (counted, sent) = count(&[("x-ecso-mode", mode)], body).await;
        assert!(sent.is_none() && counted["error"]["code"].as_str() == code, "{counted}");
        assert_eq!(counted["type"] == "error", code.is_some());
    }
}
