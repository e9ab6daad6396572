//! Attempts to bypass the guard with requests. Each was tried against a real server, or is similar
//! to one that was. Unjudged text of the upstream contains a marker that no client may ever see.

use std::{sync::Arc, time::Duration};

use axum::{body::Body, http::Response, response::IntoResponse};
use base64::{Engine, prelude::BASE64_STANDARD};
use ecso_gateway::{
    Settings,
    settings::{ImageUrls, Mode, OnFailure, Streams},
};
use serde_json::{Value, json};

use crate::support::{Harness, IMAGE, LEAK, TestResponse, merge, question, said, streamed};

/// An upstream that parses as leniently as any of vLLM, llama.cpp, Ollama (which ignores case) and
/// `LocalAI` (which finds images in texts). It sees every image, or name of one, anywhere in a
/// body, and answers harmfully in the format of the request.
fn lenient(sent: &Value) -> Response<Body> {
    let text = sent.to_string();
    let sees = ["iVBORw0KGgo", "cat.png", "uuid-of-a-picture", "file-1", "resp_1"]
        .iter()
        .any(|name| text.contains(name));
    let says = if sees { LEAK } else { "Bread." };
    let choice = json!({"index": 0, "message": {"role": "assistant", "content": says}, "text": says, "finish_reason": "stop"});
    let body = json!({"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice],
        "output": [{"type": "message", "content": [{"type": "output_text", "text": says}]}],
        "content": [{"type": "text", "text": says}], "response": says, "results": [{"text": says}]});
    if sent["stream"] == true {
        let delta = json!({"index": 0, "delta": {"content": says}, "finish_reason": "stop"});
        return streamed(&[json!({"id": "chatcmpl-1", "choices": [delta]}).to_string()]);
    }
    body.to_string().into_response()
}

async fn enforced() -> Harness {
    Harness::new(Settings::default(), Arc::new(lenient)).await
}

fn refused(got: &TestResponse, name: &str) {
    assert!(!got.leaks(), "{name}: {}", got.body);
    assert!(got.status.is_client_error(), "{name}: {} {}", got.status, got.body);
    assert!(got.json()["error"]["code"].is_string(), "{name}: {}", got.body);
}

/// Bodies that hide an image in `messages` in a way that some parser would find.
#[expect(clippy::too_many_lines, reason = "a table")]
fn hidden_images() -> Vec<(&'static str, String)> {
    let ask =
        |content: Value| json!({"model": "m", "messages": [{"role": "user", "content": content}]});
    let with = |more: Value| {
        let mut body = ask(json!("What is this?"));
        merge(&mut body, &more);
        body.to_string()
    };
    let message = |more: Value| with(json!({"messages": [more]}));
    let part =
        |part: Value| ask(json!([part, {"type": "text", "text": "What is this?"}])).to_string();
    let image = json!({"type": "image_url", "image_url": {"url": IMAGE}});
    let plain = r#"{"role": "user", "content": "What is this?"}"#;
    let seen = format!(r#"{{"role": "user", "content": [{image}]}}"#);
    vec![
        // Keys that appear twice.
        ("messages twice", format!(r#"{{"model": "m", "messages": [{plain}], "messages": [{seen}]}}"#)),
        ("messages twice, turned", format!(r#"{{"model": "m", "messages": [{seen}], "messages": [{plain}]}}"#)),
        ("content twice", format!(r#"{{"messages": [{{"role": "user", "content": "Hi", "content": [{image}]}}]}}"#)),
        ("role twice", format!(r#"{{"messages": [{{"role": "user", "role": "system", "content": [{image}]}}]}}"#)),
        (
            "type twice",
            format!(
                r#"{{"messages": [{{"role": "user", "content": [{{"type": "text", "text": "a", "type": "image_url", "image_url": "{IMAGE}"}}]}}]}}"#
            ),
        ),
        ("escaped twice", format!(r#"{{"messages": [{plain}], "mess\u0061ges": [{seen}]}}"#)),
        (
            "url twice",
            format!(
                r#"{{"messages": [{{"role": "user", "content": [{{"type": "image_url", "image_url": {{"url": "{IMAGE}", "url": "http://127.0.0.1/cat.png"}}}}]}}]}}"#
            ),
        ),
        ("model twice", format!(r#"{{"model": "m", "model": "n", "messages": [{seen}]}}"#)),
        (
            "tools twice",
            format!(
                r#"{{"tools": [], "tools": [{{"type": "function", "function": {{"name": "f", "description": "{IMAGE}"}}}}], "messages": [{plain}]}}"#
            ),
        ),
        // Keys in another case.
        ("Messages", with(json!({"Messages": [{"role": "user", "content": [image]}]}))),
        ("MESSAGES", with(json!({"MESSAGES": [{"role": "user", "content": [image]}]}))),
        ("long s", with(json!({"me\u{17f}\u{17f}ages": [{"role": "user", "content": [image]}]}))),
        ("Content", message(json!({"Content": [image]}))),
        ("Images", message(json!({"Images": ["iVBORw0KGgo"]}))),
        ("Type", part(json!({"Type": "image_url", "type": "text", "text": "a", "image_url": {"url": IMAGE}}))),
        ("Image_URL", part(json!({"type": "text", "text": "a", "Image_URL": {"url": IMAGE}}))),
        ("Stream", with(json!({"Stream": true, "messages": [{"content": [image]}]}))),
        // Fields that servers add to the protocol.
        ("images at the top", with(json!({"images": ["iVBORw0KGgo"]}))),
        ("images of a message", message(json!({"images": ["iVBORw0KGgo"]}))),
        ("string_images", message(json!({"string_images": ["iVBORw0KGgo"]}))),
        ("image_data", with(json!({"image_data": [{"data": "iVBORw0KGgo", "id": 10}]}))),
        ("multimodal_data", with(json!({"multimodal_data": ["iVBORw0KGgo"]}))),
        ("multi_modal_data", with(json!({"multi_modal_data": {"image": "iVBORw0KGgo"}}))),
        ("prompt", with(json!({"prompt": {"prompt_string": "x", "multimodal_data": ["iVBORw0KGgo"]}}))),
        ("input", with(json!({"input": [{"type": "input_image", "image_url": IMAGE}]}))),
        ("attachments", message(json!({"attachments": [{"image": IMAGE}]}))),
        ("experimental_attachments", message(json!({"experimental_attachments": [{"url": IMAGE}]}))),
        ("files", with(json!({"files": ["file-1"]}))),
        ("media", message(json!({"media": IMAGE}))),
        ("parts", message(json!({"parts": [{"inline_data": {"data": "iVBORw0KGgo"}}]}))),
        ("extra_body", with(json!({"extra_body": {"images": [IMAGE]}}))),
        ("plugins", with(json!({"plugins": [{"id": "file-parser", "file": "file-1"}]}))),
        ("previous_response_id", with(json!({"previous_response_id": "resp_1"}))),
        ("conversation", with(json!({"conversation": "resp_1"}))),
        (
            "audio of an earlier answer",
            with(json!({"messages": [{}, {"role": "assistant", "audio": {"id": "resp_1"}}]})),
        ),
        // Parts whose type is inferred from their fields.
        ("text part with image_url", part(json!({"type": "text", "text": "a", "image_url": {"url": IMAGE}}))),
        (
            "text part with uuid and image_url",
            part(json!({"type": "text", "text": "a", "uuid": "u", "image_url": IMAGE})),
        ),
        ("text part with image", part(json!({"type": "text", "text": "a", "image": IMAGE}))),
        ("untyped with both", part(json!({"text": "a", "image_url": IMAGE}))),
        ("untyped image", part(json!({"image": IMAGE}))),
        ("image", part(json!({"type": "image", "image": IMAGE}))),
        ("image of a source", part(json!({"type": "image", "source": {"type": "base64", "data": "iVBORw0KGgo"}}))),
        ("image_pil", part(json!({"type": "image_pil", "image_pil": IMAGE}))),
        ("image_embeds", part(json!({"type": "image_embeds", "image_embeds": "iVBORw0KGgo"}))),
        ("input_file", part(json!({"type": "input_file", "file_data": IMAGE}))),
        ("file", part(json!({"type": "file", "file": {"file_id": "file-1"}}))),
        ("video_url", part(json!({"type": "video_url", "video_url": {"url": IMAGE}}))),
        ("cached by uuid", part(json!({"type": "image_url", "image_url": null, "uuid": "uuid-of-a-picture"}))),
        ("cached by uuid alone", part(json!({"type": "image_url", "uuid": "uuid-of-a-picture"}))),
        ("by file_id", part(json!({"type": "input_image", "file_id": "file-1"}))),
        ("no type at all", part(json!({"data": "iVBORw0KGgo"}))),
        ("a type that is a list", part(json!({"type": ["image_url"], "image_url": IMAGE}))),
        ("a list in a list", part(json!([image]))),
        ("content that is an object", ask(image.clone()).to_string()),
        ("text that is an object", part(json!({"type": "text", "text": image}))),
        ("text that is a list", part(json!({"type": "text", "text": [image]}))),
        ("thinking with an image", part(json!({"type": "thinking", "thinking": [image]}))),
        ("refusal with an image", part(json!({"type": "refusal", "refusal": "a", "image_url": IMAGE}))),
        ("url of a file", part(json!({"type": "image_url", "image_url": {"url": "file:///cat.png"}}))),
        ("url of a bucket", part(json!({"type": "image_url", "image_url": {"url": "gs://b/cat.png"}}))),
        ("bare base64", part(json!({"type": "image_url", "image_url": {"url": "iVBORw0KGgo"}}))),
        ("a path", part(json!({"type": "image_url", "image_url": {"url": "/tmp/cat.png"}}))),
        ("a recording with an image", part(json!({"type": "input_audio", "image_url": IMAGE}))),
        (
            "a recording that is an image",
            part(json!({"type": "input_audio", "Type": "image_url", "image_url": {"url": IMAGE}})),
        ),
        (
            "in the recording",
            part(
                json!({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav", "image_url": IMAGE}}),
            ),
        ),
        ("Markdown", ask(json!(format!("![]({IMAGE}) What is this?"))).to_string()),
        ("Markdown with words", ask(json!(format!("See ![a list]( {IMAGE})."))).to_string()),
        (
            "Markdown in two parts",
            ask(json!([{"type": "text", "text": "![]("}, {"type": "text", "text": format!("{IMAGE})")}])).to_string(),
        ),
        ("Markdown in a name", message(json!({"name": format!("![]({IMAGE})")}))),
        ("Markdown in thoughts", message(json!({"role": "assistant", "reasoning_content": format!("![]({IMAGE})")}))),
        (
            "Markdown in a tool",
            with(
                json!({"tools": [{"type": "function", "function": {"name": "f", "description": format!("![]({IMAGE})")}}]}),
            ),
        ),
        ("HTML", ask(json!(format!("What is this? <img src=\"{IMAGE}\" />"))).to_string()),
        ("HTML of another make", ask(json!(format!("<img>{IMAGE}</img>"))).to_string()),
        (
            "a fallback with messages",
            with(json!({"fallbacks": [{"model": "m", "messages": [{"role": "user", "content": [image]}]}]})),
        ),
        ("Markdown in a part", part(json!({"type": "text", "text": format!("![]({IMAGE})")}))),
        ("Markdown in a bare part", part(json!(format!("![]({IMAGE})")))),
        // Bodies that not every parser accepts.
        ("a comment", format!("{{\"messages\": [{seen}]}} // end")),
        ("two values", format!("{{\"messages\": [{plain}]}} {{\"messages\": [{seen}]}}")),
        ("a list", format!("[{{\"messages\": [{seen}]}}]")),
        ("single quotes", format!("{{'messages': [{seen}]}}")),
        ("a byte order mark", format!("\u{feff}{{\"messages\": [{seen}]}}")),
        ("NaN", format!("{{\"temperature\": NaN, \"messages\": [{seen}]}}")),
        ("a form", format!("messages={IMAGE}")),
        ("unknown role", format!(r#"{{"messages": [{{"role": "User", "content": [{image}]}}]}}"#)),
        ("no role", format!(r#"{{"messages": [{{"content": [{image}]}}]}}"#)),
        ("no messages", json!({"model": "m", "query": IMAGE}).to_string()),
    ]
}

#[tokio::test]
async fn images_that_only_some_parsers_see_are_refused() {
    let world = enforced().await;
    let rows = hidden_images();
    assert!(rows.len() > 70);
    for (name, body) in rows {
        for stream in [false, true] {
            let body = if stream && body.starts_with('{') {
                body.replacen('{', "{\"stream\": true, ", 1)
            } else {
                body.clone()
            };
            let got = world.send("POST", "/v1/chat/completions", &[], body).await;
            refused(&got, name);
            assert!(world.take_requests().is_empty(), "{name}: the upstream was asked");
        }
    }
    // Compressed, or in another encoding, a body may mean something else to the upstream.
    let text =
        json!({"model": "m", "messages": [{"role": "user", "content": "uuid-of-a-picture"}]})
            .to_string();
    for headers in [
        [("content-encoding", "gzip")].as_slice(),
        &[("content-encoding", "br")],
        &[("content-encoding", "identity"), ("content-encoding", "gzip")],
        &[("content-type", "application/json; charset=utf-7")],
        &[("content-type", "application/json; charset=utf-16")],
        &[
            ("content-type", "application/json"),
            ("content-type", "application/json; charset=utf-7"),
        ],
        &[("content-type", "application/json; version=1; charset = latin-1")],
    ] {
        for body in [question().to_string(), text.clone()] {
            refused(
                &world.send("POST", "/v1/chat/completions", headers, body).await,
                &format!("{headers:?}"),
            );
        }
    }
    assert!(world.take_requests().is_empty());
    // A body that was read as JSON is sent as JSON, without headers that could stand for another
    // body or answer.
    for kind in
        ["application/x-www-form-urlencoded", "application/json;charset=UTF-8", "text/plain"]
    {
        let headers = [
            ("content-type", kind),
            ("cf-aig-cache-key", "k"),
            ("x-portkey-config", "{}"),
            ("idempotency-key", "i"),
        ];
        for body in [question().to_string(), text.replace("uuid-of-a-picture", "Hi")] {
            world.send("POST", "/v1/chat/completions", &headers, body).await;
        }
        for reached in world.take_requests() {
            assert_eq!(reached.headers["content-type"], "application/json");
            assert!(headers[1..].iter().all(|(name, _)| !reached.headers.contains_key(*name)));
        }
    }
    // An image in a text that no server reads stays a text, and so do links and recordings.
    for content in [
        json!("[a list](https://example.org/list) and ![](https://example.org/badge.png)"),
        json!("def process[T](data: RDD[T]): a.background = url(data:image/png;base64,AAAA)"),
        json!([{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}]),
    ] {
        let body = json!({"model": "m", "messages": [{"role": "user", "content": content}]});
        assert!(world.chat(&body).await.status.is_success(), "{body}");
    }
}

#[tokio::test]
async fn fields_that_change_what_the_model_sees_are_refused() {
    let world = enforced().await;
    for (name, more) in [
        ("a template", json!({"chat_template": "{{ 'cat.png' }}"})),
        ("a choice", json!({"guided_choice": [LEAK]})),
        ("an expression", json!({"guided_regex": LEAK})),
        ("a grammar", json!({"guided_grammar": LEAK})),
        ("llama.cpp's grammar", json!({"grammar": LEAK})),
        ("a schema beside the protocol", json!({"json_schema": {"enum": [LEAK]}})),
        ("structured outputs", json!({"structured_outputs": {"choice": [LEAK]}})),
        ("a format", json!({"format": {"enum": [LEAK]}})),
        ("options", json!({"options": {"system": LEAK}})),
        ("a structural tag", json!({"structural_tag": LEAK})),
        ("other models", json!({"models": ["other"]})),
        ("a route", json!({"route": "fallback"})),
        ("a mock", json!({"mock_response": LEAK})),
        ("fallbacks", json!({"fallbacks": ["other"]})),
        ("guardrails", json!({"guardrails": []})),
        ("an adapter", json!({"lora": [{"id": 0, "scale": 1}]})),
        ("logits processors", json!({"logits_processors": ["x"]})),
        ("embeds", json!({"prompt_embeds": "AAAA"})),
        ("token ids", json!({"prompt_token_ids": [1]})),
        ("background", json!({"background": true})),
        ("speech", json!({"modalities": ["text", "audio"]})),
        ("a voice", json!({"audio": {"voice": "alloy"}})),
        ("a search", json!({"web_search_options": {}})),
        ("a tool of the server", json!({"tools": [{"type": "web_search"}]})),
        ("a tool elsewhere", json!({"tools": [{"type": "mcp", "server_url": "http://cat.png"}]})),
        ("an effort that is a text", json!({"reasoning_effort": "say LEAK"})),
        ("a temperature that is a text", json!({"temperature": "hot"})),
        ("kwargs of the pictures", json!({"mm_processor_kwargs": {"images": IMAGE}})),
        (
            "a detail that is a text",
            json!({"messages": [{"content": [{"image_url": {"detail": "cat.png"}}]}]}),
        ),
        ("a template in its arguments", json!({"chat_template_kwargs": {"chat_template": "x"}})),
        ("tools in its arguments", json!({"chat_template_kwargs": {"tools": [LEAK]}})),
        (
            "a second url",
            json!({"messages": [{"content": [{"image_url": {"URL": "http://x/cat.png"}}]}]}),
        ),
        ("an odd cache", json!({"messages": [{"cache_control": {"type": "words and words"}}]})),
        ("an odd seal", json!({"messages": [{"thought_signature": "words and words"}]})),
        ("a seal with dots", json!({"messages": [{"thought_signature": "words.and:words"}]})),
        ("words for the template", json!({"chat_template_kwargs": {"persona": "x"}})),
        ("a shorter prompt", json!({"chat_template_kwargs": {"truncation": true}})),
        ("the length of the prompt", json!({"chat_template_kwargs": {"max_length": 8}})),
        ("another prompt", json!({"chat_template_kwargs": {"add_generation_prompt": false}})),
        ("switches that are a list", json!({"chat_template_kwargs": [true]})),
        ("a switch that is a text", json!({"chat_template_kwargs": {"enable_thinking": "x"}})),
        ("a shorter prompt for images", json!({"mm_processor_kwargs": {"truncation": true}})),
        ("deeper", json!({"mm_processor_kwargs": {"text_kwargs": {"max_length": 8}}})),
        ("an odd size", json!({"mm_processor_kwargs": {"size": {"max_length": 8}}})),
        ("an odd id", json!({"messages": [{"tool_call_id": "words and words"}]})),
    ] {
        for stream in [false, true] {
            let mut body = question();
            body["stream"] = stream.into();
            merge(&mut body, &more);
            let got = world.chat(&body).await;
            refused(&got, name);
            let code = got.json()["error"]["code"].clone();
            assert!(code == "unknown_field" || code == "invalid_value", "{name}");
            assert_eq!(
                got.body.contains("gateway.allow_fields"),
                code == "unknown_field",
                "{name}: {}",
                got.body
            );
            assert!(world.take_requests().is_empty(), "{name}: the upstream was asked");
        }
    }
    // An operator can allow a field, and then it is judged.
    let settings = Settings { allow_fields: vec!["chat_template".into()], ..Settings::default() };
    let world = Harness::new(settings, Arc::new(lenient)).await;
    let mut body = question();
    body["chat_template"] = "x".into();
    let got = world.chat(&body).await;
    assert!(got.status.is_success() && !got.leaks(), "{}", got.body);
    assert!(String::from_utf8_lossy(&world.take_requests()[0].body).contains("chat_template"));
}

#[tokio::test]
async fn guard_calls_carry_only_known_switches() {
    let settings = Settings { allow_fields: vec!["truncation".into()], ..Settings::default() };
    let world = Harness::new(settings, Arc::new(lenient)).await;
    let mut body = question();
    body["chat_template_kwargs"] =
        json!({"enable_thinking": false, "reasoning_effort": "low", "truncation": true});
    body["mm_processor_kwargs"] = json!({"max_pixels": 3136, "size": {"longest_edge": 3}});
    let got = world.chat(&body).await;
    assert!(got.status.is_success() && !got.leaks(), "{}", got.body);
    let reached = world.take_requests();
    let sent = |reached: &crate::support::SentRequest| -> Value {
        serde_json::from_slice(&reached.body).unwrap()
    };
    assert_eq!(sent(&reached[0])["chat_template_kwargs"], body["chat_template_kwargs"]);
    let questions: Vec<Value> =
        reached.iter().map(sent).filter(|sent| sent.to_string().contains("unethical")).collect();
    assert!(!questions.is_empty());
    for question in questions {
        let switches = json!({"enable_thinking": false, "reasoning_effort": "low"});
        assert_eq!(question["chat_template_kwargs"], switches);
        assert_eq!(question["mm_processor_kwargs"], body["mm_processor_kwargs"]);
    }
    body["chat_template_kwargs"]["max_length"] = 8.into();
    let got = world.chat(&body).await;
    assert_eq!(got.json()["error"]["param"], "chat_template_kwargs.max_length");
}

#[tokio::test]
async fn unknown_routes_are_refused() {
    let world = enforced().await;
    let body = question().to_string();
    let mut count = 0;
    for path in [
        "/v1/responses/resp_1",
        "/v1/messages/batches",
        "/v1/completions",
        "/v1/chat/completions/batch",
        "/v1/chat/completions/render",
        "/v1/batches",
        "/v1/files",
        "/v1/uploads",
        "/v1/engines/m/completions",
        "/v1/engines/m/chat/completions",
        "/v1/v1/chat/completions",
        "/v1/v1/v1/chat/completions",
        "/v1//chat/completions",
        "//v1/chat/completions",
        "/v1/chat//completions",
        "/v1/chat/completions/",
        "/v1/chat/completions%23",
        "/v1/chat/completions%3f",
        "/v1/chat/completions%00",
        "/v1/chat/completions%20",
        "/v1/chat%2Fcompletions",
        "/v1/chat%252Fcompletions",
        "/v1/%63hat/completions",
        "/v1/chat/completions;x",
        "/v1/chat/./completions",
        "/v1/models/../chat/completions",
        "/v1/models/%2e%2e/chat/completions",
        "/v1/models/..;/chat/completions",
        "/v1/Chat/Completions",
        "/V1/chat/completions",
        "/chat/completions",
        "/api/chat",
        "/api/generate",
        "/completion",
        "/infill",
        "/generate",
        "/v2/chat/completions",
        "/openai/deployments/m/chat/completions",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/v1/images/generations",
        "/v1/images/edits",
        "/v1/threads",
        "/v1/assistants",
        "/v1/realtime",
        "/v1/conversations",
        "/v1/evals",
        "/v1/fine_tuning/jobs",
        "/v1/load_lora_adapter",
        "/v1/vector_stores",
        "/v1/organization/api_keys",
    ] {
        for method in ["POST", "PUT", "PATCH", "GET", "DELETE", "OPTIONS", "PROPFIND"] {
            let got = world.send(method, path, &[], body.clone()).await;
            refused(&got, &format!("{method} {path}"));
            count += 1;
        }
    }
    for method in ["PUT", "PATCH", "GET", "DELETE", "PROPFIND"] {
        let got = world.send(method, "/v1/chat/completions", &[], body.clone()).await;
        refused(&got, method);
        count += 1;
    }
    // An answer that the upstream stores can't be fetched by its name.
    for path in [
        "/v1/chat/completions/chatcmpl-1",
        "/v1/chat/completions/chatcmpl-1/messages",
        "/v1/responses/resp_1",
    ] {
        refused(&world.send("GET", path, &[], "").await, path);
    }
    assert!(count > 300);
    assert!(world.take_requests().is_empty(), "the upstream was asked");
    // Another kind of body can't hide in a harmless route.
    for (name, body) in [
        ("a conversation", question()),
        ("a picture", json!({"input": [{"image": IMAGE}]})),
        ("a picture in words", json!({"input": "Hi", "images": [IMAGE]})),
        ("in another case", json!({"input": "Hi", "Messages": []})),
        ("deeper", json!({"input": [[{"type": "image_url", "image_url": IMAGE}]]})),
    ] {
        refused(&world.send("POST", "/v1/embeddings", &[], body.to_string()).await, name);
    }
    assert!(world.take_requests().is_empty());
    let got = world
        .send("POST", "/v1/embeddings", &[], json!({"model": "m", "input": ["a", "b"]}).to_string())
        .await;
    assert!(got.status.is_success());
    // A body's length is not forwarded without the body: the next request on that connection would
    // be taken for it.
    let length = body.len().to_string();
    let got = world.send("GET", "/v1/models/org/m", &[("content-length", &length)], body).await;
    let reached = world.take_requests();
    assert!(got.status.is_success() && reached[1].body.is_empty(), "a body went along");
    assert!(!reached[1].headers.contains_key("content-length"));
}

#[tokio::test]
async fn routes_pass_when_off_or_allowed() {
    for (mode, allowed, passes) in [
        (Mode::Off, vec![], true),
        (Mode::Observe, vec![], true),
        (Mode::Enforce, vec!["POST /v1/audio/transcriptions".to_owned()], true),
        (Mode::Enforce, vec!["GET /v1/audio/transcriptions".to_owned()], false),
    ] {
        let settings = Settings { mode, allow_routes: allowed, ..Settings::default() };
        let world = Harness::new(settings, Arc::new(lenient)).await;
        let got = world.send("POST", "/v1/audio/transcriptions", &[], "{}").await;
        assert_eq!(got.status.is_success(), passes, "{mode:?}");
    }
}

#[tokio::test]
async fn the_upstream_is_told_to_store_nothing() {
    let world = enforced().await;
    let mut body = question();
    merge(&mut body, &json!({"store": true, "metadata": {"a": "b"}, "user": "u"}));
    let got = world.chat(&body).await.json();
    let sent: Value = serde_json::from_slice(&world.take_requests()[0].body).unwrap();
    assert!(sent.get("store").is_none() && sent["user"] == "u", "{sent}");
    let id = got["id"].as_str().unwrap();
    assert!(id.starts_with("chatcmpl-ecso-"), "{id}");
}

#[tokio::test]
async fn requests_cannot_make_the_guard_fail_open() {
    let settings = Settings { on_failure: OnFailure::Open, ..Settings::default() };
    let world = Harness::new(settings, Arc::new(lenient)).await;
    for stream in [false, true] {
        let mut body = question();
        (body["stream"], body["model"]) = (stream.into(), "judge-400".into());
        let got = world.chat(&body).await;
        assert!(!got.leaks() && got.body.contains("guard_failed"), "{}", got.body);
        // If the guard itself fails, the draft goes out, as the operator wants it.
        body["model"] = "judge-500".into();
        assert!(world.chat(&body).await.leaks());
        // But not once there is a verdict.
        body["model"] = "caption-500".into();
        let got = world.chat(&body).await;
        assert!(!got.leaks() && got.body.contains("guard_failed"), "{}", got.body);
    }
}

/// A client that asks for a long answer makes the judge slow.
#[tokio::test]
async fn a_judge_that_runs_out_of_time_does_not_open_the_guard() {
    for streams in [Streams::Hold, Streams::Windowed] {
        let settings =
            Settings { on_failure: OnFailure::Open, stream: streams, ..Settings::default() };
        let waits = Duration::from_millis(500);
        let world = Harness::with_reply_timeout(settings, Arc::new(lenient), waits).await;
        for stream in [false, true] {
            let mut body = question();
            (body["stream"], body["model"]) = (stream.into(), "judge-hangs".into());
            let got = world.chat(&body).await;
            assert!(!got.leaks() && got.body.contains("guard_timeout"), "{}", got.body);
        }
    }
}

#[tokio::test]
async fn remote_images_are_fetched_here_or_refused() {
    let mut body = question();
    body["messages"][0]["content"][0]["image_url"]["url"] = "http://127.0.0.1:9/cat.png".into();
    for (image_urls, code) in
        [(ImageUrls::Fetch, "invalid_image"), (ImageUrls::Refuse, "image_url_refused")]
    {
        let world =
            Harness::new(Settings { image_urls, ..Settings::default() }, Arc::new(lenient)).await;
        let got = world.chat(&body).await;
        refused(&got, code);
        assert_eq!(got.json()["error"]["code"], code);
        assert!(world.take_requests().is_empty());
    }
}

#[tokio::test]
async fn truncated_images_are_refused() {
    let world = enforced().await;
    let mut body = question();
    let url = body["messages"][0]["content"][0]["image_url"]["url"].as_str().unwrap();
    body["messages"][0]["content"][0]["image_url"]["url"] = url[..url.len() - 16].into();
    let got = world.chat(&body).await;
    refused(&got, "invalid_image");
    assert!(got.body.contains("its end is missing"), "{}", got.body);
    assert!(world.take_requests().is_empty());
}

#[tokio::test]
async fn documents_are_judged_and_forwarded_page_by_page() {
    let pdf = BASE64_STANDARD.encode(ecso::testing::pdf(&["", "0 0 9 9 re f", "0 0 5 5 re f"]));
    // The media type does not matter, even if it is that of the pages.
    for head in ["data:application/pdf", "data:image/png"] {
        let world = enforced().await;
        let mut body = question();
        body["messages"][0]["content"][0]["image_url"] =
            json!({"url": format!("{head};base64,{pdf}"), "detail": "low"});
        let got = world.chat(&body).await;
        if got.body.contains("ecso built with --features pdf reads it") {
            return refused(&got, "invalid_image");
        }
        let asked = world.take_requests();
        let asked: Vec<_> =
            asked.iter().map(|asked| String::from_utf8_lossy(&asked.body)).collect();
        assert_eq!(asked[0].matches("\"data:image/png;base64,iVBOR").count(), 3, "{}", asked[0]);
        assert_eq!(asked[0].matches("\"detail\":\"low\"").count(), 3, "{}", asked[0]);
        assert!(!asked.iter().any(|asked| asked.contains(&pdf[..40])), "{asked:?}");
        // As many as a chat may have, but no more.
        let parts = (0..6).map(|_| body["messages"][0]["content"][0].clone());
        body["messages"][0]["content"] = parts.collect();
        refused(&world.chat(&body).await, "too_many_images");
    }
}

#[tokio::test]
async fn without_keys_only_local_callers_are_answered() {
    let world = enforced().await;
    let text = json!({"model": "m", "messages": [{"role": "user", "content": "Hi"}]}).to_string();
    for host in [
        "evil.example",
        "evil.example:8080",
        "127.0.0.1.evil.example",
        "10.0.0.1",
        "[2001:db8::1]:80",
        "",
    ] {
        let got = world.send("POST", "/v1/chat/completions", &[("host", host)], text.clone()).await;
        assert!(got.status.is_client_error(), "{host}: {}", got.status);
    }
    let origin = ("origin", "http://evil.example");
    for kinds in [["text/plain"].as_slice(), &[""], &["application/json", "text/plain"]] {
        let kinds = kinds.iter().map(|kind| ("content-type", *kind));
        let headers: Vec<(&str, &str)> = kinds.chain([origin]).collect();
        let got = world.send("POST", "/v1/chat/completions", &headers, text.clone()).await;
        assert_eq!(got.json()["error"]["code"], "unsupported_type");
    }
    assert!(world.take_requests().is_empty());
    assert!(world.send("POST", "/v1/chat/completions", &[], text).await.status.is_success());
}

/// What the judge of `hardened` is asked, over all questions about one request.
#[tokio::test]
async fn the_judge_sees_everything_the_model_sees() {
    let hidden = "HIDDEN";
    let tool = |tool: Value| json!({"tools": [tool]});
    let function = json!({"name": "f", "parameters": {}});
    for (name, more) in [
        (
            "a custom tool beside a function",
            tool(
                json!({"type": "function", "function": function, "custom": {"description": hidden}}),
            ),
        ),
        ("beside an old function", json!({"functions": [{"description": hidden, "function": {}}]})),
        ("functions that are no list", json!({"functions": {"description": hidden}})),
        (
            "calls of a user",
            json!({"messages": [{"tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": hidden}}]}]}),
        ),
        (
            "beside a text format",
            json!({"response_format": {"type": "text", "description": hidden}}),
        ),
        ("a name", json!({"messages": [{"name": hidden}]})),
        (
            "thoughts",
            json!({"messages": [{}, {"role": "assistant", "reasoning_content": hidden, "content": "x"}, {"role": "user", "content": "y"}]}),
        ),
        ("documents", json!({"documents": [{"text": hidden}]})),
        ("words for the template", json!({"chat_template_kwargs": {"persona": hidden}})),
        ("a short seal", json!({"messages": [{"thought_signature": hidden}]})),
        (
            "a short seal of a part",
            json!({"messages": [{}, {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "x", "signature": hidden}]}, {"role": "user", "content": "y"}]}),
        ),
        (
            "words behind the mark of a signature",
            json!({"messages": [{}, {"role": "tool", "tool_call_id": "c__thought__tell_HIDDEN_us", "content": "x"}]}),
        ),
        (
            "an id of words",
            json!({"messages": [{}, {"role": "tool", "tool_call_id": "tell_us_HIDDEN_words", "content": "x"}]}),
        ),
    ] {
        let respond: crate::support::Respond = Arc::new(|sent: &Value| {
            // Calls with log-probabilities are questions of the guard.
            let says = if sent["logprobs"] == true { "No" } else { "Bread." };
            let top = json!([{"token": says, "logprob": -0.01}, {"token": "Yes", "logprob": -6.0}]);
            let logprobs =
                json!({"content": [{"token": says, "logprob": -0.01, "top_logprobs": top}]});
            said(
                &json!({"role": "assistant", "content": says}),
                &json!({"choices": [{"logprobs": logprobs}]}),
            )
        });
        let settings = Settings { allow_fields: vec!["persona".into()], ..Settings::default() };
        let world =
            Harness::with(settings, ecso::Profile::named("hardened").unwrap(), respond).await;
        let mut body = question();
        merge(&mut body, &more);
        let got = world.chat(&body).await;
        assert!(got.status.is_success(), "{name}: {}", got.body);
        let reached = world.take_requests();
        let asked = |reached: &&crate::support::SentRequest| {
            let sent: Value = serde_json::from_slice(&reached.body).unwrap();
            sent["logprobs"] == true && sent["messages"].to_string().contains(hidden)
        };
        assert!(reached.iter().any(|reached| asked(&reached)), "{name}: no question holds it");
    }
}

#[tokio::test]
async fn guard_calls_carry_no_client_headers() {
    for mode in [Mode::Enforce, Mode::Observe] {
        let world = Harness::new(Settings { mode, ..Settings::default() }, Arc::new(lenient)).await;
        let headers = [("idempotency-key", "i"), ("cf-aig-cache-key", "k"), ("x-api-key", "mine")];
        world.send("POST", "/v1/chat/completions", &headers, question().to_string()).await;
        let guard = json!({"messages": question()["messages"], "model": "m"}).to_string();
        world.send("POST", "/v1/guard", &headers, guard).await;
        // An observed answer is judged after it went out.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let reached = world.take_requests();
        let questions: Vec<_> = reached
            .iter()
            .filter(|reached| String::from_utf8_lossy(&reached.body).contains("unethical"))
            .collect();
        assert!(questions.len() >= 2, "{mode:?}: {}", reached.len());
        for question in questions {
            assert!(!question.headers.contains_key("idempotency-key"), "{mode:?}");
            assert!(!question.headers.contains_key("cf-aig-cache-key"), "{mode:?}");
            assert_eq!(question.headers["x-api-key"], "mine", "{mode:?}");
        }
    }
}
