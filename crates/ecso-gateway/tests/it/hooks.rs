//! Hooks for other gateways: what they reply, and that nothing unjudged goes out.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use ecso::{
    Profile,
    profile::{Rewrite, Scope},
};
use ecso_gateway::{
    Settings,
    settings::{AuditSettings, ImageUrls, Key, Limits, Mode, OnFailure, Unseen},
};
use serde_json::{Value, json};

use crate::{
    answers::hidden_answers,
    support::{Harness, IMAGE, LEAK, TestResponse, merge, question, said},
};

const LITELLM: &str = "/beta/litellm_basic_guardrail_api";
const PORTKEY: &str = "/hooks/portkey";
const TRUEFOUNDRY: &str = "/hooks/truefoundry";
const SAFE: &str = "Here is a harmless answer.";

async fn world(settings: Settings) -> Harness {
    profiled(settings, Profile::paper()).await
}

/// A gateway whose model is only asked by others.
async fn profiled(settings: Settings, profile: Profile) -> Harness {
    let asked = |sent: &Value| {
        said(&json!({"content": format!("{LEAK}: a hook asked the model {sent}")}), &Value::Null)
    };
    Harness::with(settings, profile, Arc::new(asked)).await
}

async fn send(world: &Harness, path: &str, call: &Value) -> TestResponse {
    world.send("POST", path, &[], call.to_string()).await
}

/// A call of LiteLLM with this call id.
fn litellm(kind: &str, id: &str, more: &Value) -> Value {
    let mut call = json!({"input_type": kind, "litellm_call_id": id, "litellm_trace_id": "t", "structured_messages": null, "images": null,
        "tools": null, "texts": [], "tool_calls": null, "model": "m", "litellm_version": "1.106.12",
        "request_data": {"user_api_key_hash": "key-a"}, "request_headers": {"host": "127.0.0.1"},
        "additional_provider_specific_params": {}});
    merge(&mut call, more);
    call
}

/// The call with a question about an image.
fn asked(id: &str) -> Value {
    let messages = question()["messages"].clone();
    litellm(
        "request",
        id,
        &json!({"structured_messages": messages, "images": [IMAGE], "texts": ["What is this?"]}),
    )
}

fn answered(id: &str, texts: &[&str]) -> Value {
    litellm("response", id, &json!({"texts": texts}))
}

/// What the proxy is to do: pass, block, or replace the texts.
fn action(got: &TestResponse) -> (String, Value) {
    assert_eq!(got.status, 200, "{}", got.body);
    let verdict = got.json();
    (verdict["action"].as_str().unwrap().to_owned(), verdict["texts"].clone())
}

async fn litellm_says(world: &Harness, call: &Value) -> (String, Value) {
    let got = send(world, LITELLM, call).await;
    assert!(!got.leaks(), "{}", got.body);
    action(&got)
}

fn passes() -> (String, Value) {
    ("NONE".into(), Value::Null)
}

fn blocked() -> (String, Value) {
    ("BLOCKED".into(), Value::Null)
}

fn rewritten(texts: &[&str]) -> (String, Value) {
    ("GUARDRAIL_INTERVENED".into(), json!(texts))
}

#[tokio::test]
async fn litellm_answers_pass_or_are_replaced() {
    let world = world(Settings::default()).await;
    for (number, (texts, says)) in [
        (vec!["Bread."], passes()),
        (vec![LEAK], rewritten(&[SAFE])),
        (vec!["Bread.", "Rye."], passes()),
        (vec!["Bread.", LEAK], rewritten(&["Bread.", SAFE])),
        (vec![LEAK, LEAK], rewritten(&[SAFE, SAFE])),
        (vec![], passes()),
        // More texts than a chat may have choices.
        (vec!["Bread."; 8], passes()),
        (vec!["Bread."; 9], blocked()),
        ([vec!["Bread."; 8], vec![LEAK]].concat(), blocked()),
    ]
    .into_iter()
    .enumerate()
    {
        let id = number.to_string();
        assert_eq!(litellm_says(&world, &asked(&id)).await, passes());
        assert_eq!(litellm_says(&world, &answered(&id, &texts)).await, says, "{texts:?}");
    }
    // A harmful whole of parts that are harmless alone.
    let (start, end) = LEAK.split_at(4);
    litellm_says(&world, &asked("parts")).await;
    assert_eq!(litellm_says(&world, &answered("parts", &[start, end])).await, passes());
    let mut profile = Profile::paper();
    profile.rewrite = Rewrite::Refuse;
    let refusing = profiled(Settings::default(), profile).await;
    litellm_says(&refusing, &asked("1")).await;
    let refusal = Profile::paper().refusal;
    assert_eq!(litellm_says(&refusing, &answered("1", &[LEAK])).await, rewritten(&[&refusal]));
    // Every question was asked with the image, and none was asked to the model itself.
    let asked = world.take_requests();
    assert!(
        asked.len() > 10
            && asked
                .iter()
                .all(|asked| !String::from_utf8_lossy(&asked.body).contains("a hook asked"))
    );
}

#[tokio::test]
async fn tool_calls_are_judged_and_can_only_be_blocked() {
    let world = world(Settings::default()).await;
    let calls = |arguments: &str| json!({"tool_calls": [{"id": "c", "type": "function", "function": {"name": "bake", "arguments": arguments}}]});
    for (id, texts, more, says) in [
        ("1", json!([]), calls("{\"loaves\": 2}"), passes()),
        ("2", json!([]), calls(&format!("{{\"loaves\": \"{LEAK}\"}}")), blocked()),
        ("3", json!(["Bread."]), calls(&format!("{{\"loaves\": \"{LEAK}\"}}")), blocked()),
        ("4", json!([LEAK]), calls("{}"), blocked()),
        ("5", json!(["Bread.", LEAK]), calls("{}"), blocked()),
        ("6", json!(["Bread.", "Rye."]), calls("{}"), passes()),
        ("7", json!([]), json!({"tool_calls": [{"id": LEAK}]}), blocked()),
        (
            "8",
            json!([]),
            json!({"tool_calls": [{"function": {"name": "bake", "note": LEAK}}]}),
            blocked(),
        ),
        ("9", json!(["Bread."]), json!({"images": [IMAGE]}), blocked()),
    ] {
        litellm_says(&world, &asked(id)).await;
        let mut call = litellm("response", id, &more);
        call["texts"] = texts;
        assert_eq!(litellm_says(&world, &call).await, says, "{id}");
    }
}

#[tokio::test]
async fn answers_belong_to_one_seen_request() {
    let world = world(Settings::default()).await;
    let reason = async |call: &Value| {
        let got = send(&world, LITELLM, call).await;
        assert_eq!(action(&got).0, "BLOCKED", "{}", got.body);
        got.json()["blocked_reason"].as_str().unwrap().to_owned()
    };
    assert!(reason(&answered("nobody", &["Bread."])).await.contains("has not seen this request"));
    // Once only.
    litellm_says(&world, &asked("1")).await;
    assert_eq!(litellm_says(&world, &answered("1", &["Bread."])).await, passes());
    assert!(reason(&answered("1", &["Bread."])).await.contains("arrives in parts"));
    // Two requests with one id.
    let mut other = asked("2");
    other["structured_messages"][0]["content"] = "What is a list?".into();
    litellm_says(&world, &asked("2")).await;
    litellm_says(&world, &other).await;
    assert!(reason(&answered("2", &["Bread."])).await.contains("two requests"));
    // Another key.
    litellm_says(&world, &asked("3")).await;
    let mut call = answered("3", &["Bread."]);
    call["request_data"]["user_api_key_hash"] = "key-b".into();
    assert!(reason(&call).await.contains("has not seen"));
    assert_eq!(litellm_says(&world, &answered("3", &["Bread."])).await, passes());
    // An id that the client chose, with the request or the answer.
    for mut call in [asked("4"), answered("4", &["Bread."])] {
        call["request_headers"]["X-LiteLLM-Call-Id"] = "4".into();
        assert!(reason(&call).await.contains("x-litellm-call-id is not accepted"));
        call["request_headers"] = Value::Null;
        assert!(reason(&call).await.contains("request_headers are missing"));
        call["litellm_call_id"] = Value::Null;
        assert!(reason(&call).await.contains("litellm_call_id is missing"));
    }
}

#[tokio::test]
async fn answers_without_a_request_are_blocked_or_judged_alone() {
    let judging = world(Settings { unseen: Unseen::Judge, ..Settings::default() }).await;
    assert_eq!(litellm_says(&judging, &answered("1", &["Bread."])).await, passes());
    assert_eq!(litellm_says(&judging, &answered("1", &[LEAK])).await, rewritten(&[SAFE]));
    // What is known to be ambiguous is blocked anyway.
    litellm_says(&judging, &asked("2")).await;
    litellm_says(&judging, &answered("2", &["Bread."])).await;
    assert_eq!(litellm_says(&judging, &answered("2", &["Bread."])).await, blocked());
}

#[tokio::test]
async fn pending_requests_are_limited() {
    let limits = Limits { pending: 4000, ..Limits::default() };
    let world = world(Settings { limits, ..Settings::default() }).await;
    for id in 0..20 {
        litellm_says(&world, &asked(&id.to_string())).await;
    }
    assert_eq!(litellm_says(&world, &answered("0", &["Bread."])).await, blocked());
    assert_eq!(litellm_says(&world, &answered("19", &["Bread."])).await, passes());
    let mut long = asked("long");
    merge(
        &mut long,
        &json!({"structured_messages": [{"content": [null, {"text": "f".repeat(5000)}]}]}),
    );
    assert_eq!(litellm_says(&world, &long).await, blocked());
    let limits = Limits { pending_for: 1, ..Limits::default() };
    let forgetting = self::world(Settings { limits, ..Settings::default() }).await;
    litellm_says(&forgetting, &asked("late")).await;
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(litellm_says(&forgetting, &answered("late", &["Bread."])).await, blocked());
}

#[tokio::test]
async fn litellm_requests_are_read_like_chats() {
    let world = world(Settings::default()).await;
    // Out of scope, with any number of calls about its answer.
    let text = litellm(
        "request",
        "text",
        &json!({"structured_messages": [{"role": "user", "content": "Hi"}], "texts": ["Hi"]}),
    );
    assert_eq!(litellm_says(&world, &text).await, passes());
    for _ in 0..2 {
        let got = send(&world, LITELLM, &answered("text", &[LEAK])).await;
        assert_eq!(action(&got), passes());
    }
    assert!(world.take_requests().is_empty());
    // What can't be read, judged or found.
    let broken = &IMAGE[..IMAGE.len() - 16];
    let remote = "http://127.0.0.1:9/cat.png";
    for (messages, why) in [
        (json!([{"content": [{"image_url": {"url": broken}}]}]), "its end is missing"),
        (json!([{"content": [{"image_url": {"url": remote}}]}]), "an image URL can't be fetched"),
        (json!([{"odd_field": "x"}]), "odd_field"),
        (json!([{"content": [{"type": "video_url"}]}]), "video_url"),
        // The proxy sends an image by its id, a screenshot, and a part that its types don't have in
        // this way.
        (json!([{"content": [{"image_url": {"url": ""}}]}]), "image"),
        (
            json!([null, {"role": "tool", "content": format!("{{\"type\": \"x\", \"image_url\": \"{IMAGE}\"}}")}]),
            "in its text",
        ),
        (
            json!([null, {"role": "tool", "content": "{\"type\": \"computer_screenshot\", \"image_url\": \"https://x\"}"}]),
            "in its text",
        ),
        (json!([null, {"role": "user", "content": []}]), "did not send"),
    ] {
        let mut call = asked("bad");
        merge(&mut call, &json!({"structured_messages": messages}));
        call["images"] = Value::Null;
        let got = send(&world, LITELLM, &call).await;
        assert_eq!(action(&got).0, "BLOCKED");
        assert!(got.body.contains(why), "{}", got.body);
    }
    // An image next to the messages is seen too, with its media type or without; and so are other
    // texts.
    let bare = IMAGE.split(',').nth(1).unwrap();
    for (id, image) in [("url", IMAGE), ("bare", bare)] {
        let messages = json!([{"role": "user", "content": "What is this?"}]);
        let call = litellm(
            "request",
            id,
            &json!({"structured_messages": messages, "images": [image], "texts": ["What is this?", "Is it bread?"],
                "tool_calls": [{"id": "call-9", "function": {"name": "bake"}}]}),
        );
        assert_eq!(litellm_says(&world, &call).await, passes());
        assert_eq!(litellm_says(&world, &answered(id, &["Bread."])).await, passes());
        let judged = String::from_utf8_lossy(&world.take_requests()[0].body).into_owned();
        assert!(judged.matches("data:").count() == 1 && judged.contains(bare), "{judged}");
        assert!(judged.contains("Is it bread?") && judged.contains("call-9"), "{judged}");
    }
}

#[tokio::test]
async fn guard_failures_are_not_verdicts() {
    let world = world(Settings::default()).await;
    let mut call = asked("1");
    call["model"] = "judge-500".into();
    litellm_says(&world, &call).await;
    let got = send(&world, LITELLM, &answered("1", &["Bread."])).await;
    assert_eq!((got.status.as_u16(), &got.json()["error"]["code"]), (500, &json!("guard_failed")));
    for (path, mut call) in both(&completion(&json!({"content": "Bread."}))) {
        match path {
            PORTKEY => call["request"]["json"]["model"] = "judge-500".into(),
            _ => call["requestBody"]["model"] = "judge-500".into(),
        }
        let got = send(&world, path, &call).await;
        assert_eq!(
            (got.status.as_u16(), &got.json()["verdict"]),
            (200, &json!(false)),
            "{}",
            got.body
        );
        assert!(got.body.contains("guard_failed"), "{}", got.body);
    }
    let opening =
        self::world(Settings { on_failure: OnFailure::Open, ..Settings::default() }).await;
    let mut call = asked("1");
    call["model"] = "judge-500".into();
    litellm_says(&opening, &call).await;
    assert_eq!(litellm_says(&opening, &answered("1", &["Bread."])).await, passes());
}

/// The key of a gateway is not the model's.
#[tokio::test]
async fn the_gateways_key_is_not_forwarded() {
    let world = world(Settings::default()).await;
    let keys = [("authorization", "Bearer of-the-gateway"), ("x-api-key", "of-the-gateway")];
    for (path, call) in both(&completion(&json!({"content": "Rye."}))) {
        let got = world.send("POST", path, &keys, call.to_string()).await;
        assert!(verdict(path, &got).0, "{}", got.body);
    }
    for call in [asked("1"), answered("1", &["Rye."])] {
        world.send("POST", LITELLM, &keys, call.to_string()).await;
    }
    let take_requests = world.take_requests();
    assert_eq!(take_requests.len(), 3);
    for reached in take_requests {
        assert!(
            !format!("{:?}", reached.headers).contains("of-the-gateway"),
            "{:?}",
            reached.headers
        );
    }
}

fn completion(message: &Value) -> Value {
    json!({"id": "c1", "object": "chat.completion", "created": 1, "model": "m", "usage": {"total_tokens": 3},
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
}

fn portkey(event: &str, kind: &str, request: &Value, response: &Value) -> Value {
    json!({"request": {"json": request, "text": "", "isStreamingRequest": false, "isTransformed": false},
        "response": {"json": response, "text": "", "statusCode": 200, "isTransformed": false},
        "provider": "openai", "requestType": kind, "metadata": {}, "eventType": event})
}

fn truefoundry(request: &Value, response: &Value, config: &Value) -> Value {
    let mut call = json!({"requestBody": request, "config": config,
        "context": {"user": {"subjectId": "u", "subjectType": "user"}, "metadata": {"team": "bakery"}}});
    // The hook before the model has no such key.
    if !response.is_null() {
        call["responseBody"] = response.clone();
    }
    call
}

/// The calls of both hooks with request and answer.
fn both(answer: &Value) -> [(&'static str, Value); 2] {
    [
        (PORTKEY, portkey("afterRequestHook", "chatComplete", &question(), answer)),
        (TRUEFOUNDRY, truefoundry(&question(), answer, &json!({"rewrite": true}))),
    ]
}

/// Whether a request or an answer may continue, and what replaces it.
fn verdict(path: &str, got: &TestResponse) -> (bool, Option<Value>) {
    assert_eq!(got.status, 200, "{}", got.body);
    let said = got.json();
    let another = match path {
        PORTKEY => ["request", "response"]
            .iter()
            .find_map(|side| said["transformedData"][side].get("json"))
            .cloned(),
        _ if said["transformed"] == true => Some(said["result"].clone()),
        _ => {
            assert_eq!(said["result"], said["verdict"]);
            None
        }
    };
    (said["verdict"].as_bool().unwrap(), another)
}

#[tokio::test]
async fn portkey_and_truefoundry_answers_pass_or_are_replaced() {
    let world = world(Settings::default()).await;
    for (path, call) in
        both(&completion(&json!({"role": "assistant", "content": "Bread.", "refusal": null})))
    {
        let got = send(&world, path, &call).await;
        assert_eq!(verdict(path, &got), (true, None), "{}", got.body);
        assert!(got.body.contains("\"verdict\":\"safe\""), "{}", got.body);
    }
    for (path, call) in both(&completion(&json!({"role": "assistant", "content": LEAK}))) {
        let got = send(&world, path, &call).await;
        let (may, another) = verdict(path, &got);
        let another = another.unwrap();
        assert!(may && !got.leaks(), "{}", got.body);
        assert_eq!(another["choices"][0]["message"]["content"], SAFE);
        assert_eq!(another["usage"]["total_tokens"], 3);
    }
    let mut two = completion(&json!({"content": "Bread."}));
    merge(
        &mut two,
        &json!({"choices": [null, {"index": 1, "message": {"content": LEAK}, "finish_reason": "stop"}]}),
    );
    for (path, call) in both(&two) {
        let got = send(&world, path, &call).await;
        let choices = verdict(path, &got).1.unwrap()["choices"].clone();
        assert_eq!(
            (&choices[0]["message"]["content"], &choices[1]["message"]["content"]),
            (&"Bread.".into(), &SAFE.into())
        );
    }
    // If it can't be replaced, a harmful answer is denied.
    let denied = truefoundry(&question(), &completion(&json!({"content": LEAK})), &Value::Null);
    let got = send(&world, TRUEFOUNDRY, &denied).await;
    assert_eq!(verdict(TRUEFOUNDRY, &got), (false, None));
    assert!(!got.leaks());
    // Out of scope.
    let text = json!({"model": "m", "messages": [{"role": "user", "content": "Hi"}]});
    for (path, mut call) in both(&completion(&json!({"content": LEAK}))) {
        call[if path == PORTKEY { "request" } else { "requestBody" }] =
            if path == PORTKEY { json!({"json": text}) } else { text.clone() };
        assert_eq!(verdict(path, &send(&world, path, &call).await), (true, None));
    }
    let asked = world.take_requests();
    assert!(
        asked.iter().all(|asked| !String::from_utf8_lossy(&asked.body).contains("a hook asked"))
    );
}

#[tokio::test]
async fn unjudged_content_is_removed_or_denied() {
    let world = world(Settings::default()).await;
    for (name, more) in hidden_answers() {
        let mut answer = completion(&json!({"role": "assistant", "content": "Bread."}));
        merge(&mut answer, &more);
        let calls = both(&answer).into_iter();
        for (path, call) in
            calls.chain([(TRUEFOUNDRY, truefoundry(&question(), &answer, &Value::Null))])
        {
            let got = send(&world, path, &call).await;
            let (may, another) = verdict(path, &got);
            let mut goes_on = if may { another.unwrap_or(answer.clone()) } else { Value::Null };
            // What the upstream calls the answer and itself, in one word.
            if let Value::Object(fields) = &mut goes_on {
                let is_name = |value: &Value| !value.to_string().contains(' ');
                fields.retain(|name, value| {
                    !(["id", "object", "created", "model", "system_fingerprint"]
                        .contains(&name.as_str())
                        && is_name(value))
                });
            }
            assert!(
                !got.leaks() && !goes_on.to_string().contains(LEAK),
                "{path} {name}: {goes_on}"
            );
        }
    }
    // A malformed answer is not harmless.
    for answer in [
        json!("Bread."),
        json!([]),
        json!({}),
        json!({"error": {"message": "no"}}),
        json!({"choices": []}),
    ] {
        for (path, call) in both(&answer) {
            let got = send(&world, path, &call).await;
            assert!(!verdict(path, &got).0, "{path} {answer}: {}", got.body);
        }
    }
}

#[tokio::test]
async fn requests_are_checked_before_the_model_is_asked() {
    let world = world(Settings::default()).await;
    let text =
        json!({"model": "m", "stream": true, "messages": [{"role": "user", "content": "Hi"}]});
    let mut broken = question();
    broken["messages"][0]["content"][0]["image_url"]["url"] = IMAGE[..IMAGE.len() - 16].into();
    let mut odd = question();
    odd["guided_choice"] = json!(["a"]);
    for (request, may) in
        [(question(), true), (text, true), (broken, false), (odd, false), (json!("Hi"), false)]
    {
        for (path, call) in [
            (PORTKEY, portkey("beforeRequestHook", "chatComplete", &request, &json!({}))),
            (TRUEFOUNDRY, truefoundry(&request, &Value::Null, &Value::Null)),
        ] {
            let got = send(&world, path, &call).await;
            assert_eq!(verdict(path, &got), (may, None), "{path} {request}: {}", got.body);
        }
    }
    // A stream can't be held back there: neither before nor after it has begun.
    let mut streamed = question();
    streamed["stream"] = true.into();
    for (event, answer) in [("beforeRequestHook", json!({})), ("afterRequestHook", Value::Null)] {
        let got = send(&world, PORTKEY, &portkey(event, "chatComplete", &streamed, &answer)).await;
        assert_eq!(verdict(PORTKEY, &got), (false, None));
        assert!(got.body.contains("stream_not_guarded"), "{}", got.body);
    }
    let got = send(&world, TRUEFOUNDRY, &truefoundry(&streamed, &Value::Null, &Value::Null)).await;
    assert!(
        !verdict(TRUEFOUNDRY, &got).0 && got.body.contains("stream_not_guarded"),
        "{}",
        got.body
    );
    assert!(world.take_requests().is_empty());
    let embed = json!({"model": "m", "input": "Hi"});
    let got =
        send(&world, PORTKEY, &portkey("beforeRequestHook", "embed", &embed, &json!({}))).await;
    assert_eq!(verdict(PORTKEY, &got), (true, None));
}

/// An image on a server of this machine.
async fn local_image_server() -> String {
    use base64::{Engine, prelude::BASE64_STANDARD};
    let png = BASE64_STANDARD.decode(IMAGE.split(',').nth(1).unwrap()).unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/bread.png", listener.local_addr().unwrap());
    let serves = axum::Router::new().fallback(move || std::future::ready(png.clone()));
    tokio::spawn(async move { axum::serve(listener, serves).await });
    url
}

#[tokio::test]
async fn the_model_sees_the_judged_image() {
    let url = local_image_server().await;
    let mut request = question();
    request["messages"][0]["content"][0]["image_url"]["url"] = url.as_str().into();
    let settings = Settings { image_hosts: vec!["127.0.0.1".into()], ..Settings::default() };
    let world = world(settings.clone()).await;
    // Before the model is asked, the image replaces its URL.
    let mut call = asked("1");
    (call["structured_messages"], call["images"]) = (request["messages"].clone(), json!([url]));
    let got = send(&world, LITELLM, &call).await.json();
    assert_eq!(got["action"], "GUARDRAIL_INTERVENED");
    assert_eq!(got["structured_messages"], question()["messages"]);
    assert_eq!(litellm_says(&world, &answered("1", &["Bread."])).await, passes());
    for (path, call) in [
        (PORTKEY, portkey("beforeRequestHook", "chatComplete", &request, &json!({}))),
        (TRUEFOUNDRY, truefoundry(&request, &Value::Null, &Value::Null)),
    ] {
        assert_eq!(verdict(path, &send(&world, path, &call).await), (true, Some(question())));
    }
    // If the model has already seen what was there, nobody knows what that was.
    let after = |request: &Value| {
        let answer = completion(&json!({"content": "Bread."}));
        [
            (PORTKEY, portkey("afterRequestHook", "chatComplete", request, &answer)),
            (TRUEFOUNDRY, truefoundry(request, &answer, &Value::Null)),
        ]
    };
    for (path, call) in after(&request) {
        let got = send(&world, path, &call).await;
        assert!(!verdict(path, &got).0 && got.body.contains("image_url_refused"), "{}", got.body);
    }
    // Unless the operator wants that.
    let passing = self::world(Settings { image_urls: ImageUrls::Pass, ..settings.clone() }).await;
    for (path, call) in after(&request) {
        assert_eq!(verdict(path, &send(&passing, path, &call).await), (true, None));
    }
    let refusing = self::world(Settings { image_urls: ImageUrls::Refuse, ..settings }).await;
    let mut call = asked("1");
    call["structured_messages"] = request["messages"].clone();
    assert_eq!(litellm_says(&refusing, &call).await, blocked());
}

#[tokio::test]
async fn portkey_sends_other_formats_too() {
    let world = world(Settings::default()).await;
    let data = IMAGE.split(',').nth(1).unwrap();
    let request = json!({"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}, {"type": "text", "text": "What is it?"}]}]});
    let message = |text: &str| {
        json!({"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "stop_reason": "end_turn",
            "content": [{"type": "text", "text": text}], "usage": {"input_tokens": 1, "output_tokens": 1}})
    };
    let call = |text: &str| portkey("afterRequestHook", "messages", &request, &message(text));
    assert_eq!(verdict(PORTKEY, &send(&world, PORTKEY, &call("Bread.")).await), (true, None));
    let got = send(&world, PORTKEY, &call(LEAK)).await;
    let (may, another) = verdict(PORTKEY, &got);
    assert!(may && !got.leaks());
    assert_eq!(another.unwrap()["content"][0]["text"], SAFE);
    let before = portkey("beforeRequestHook", "messages", &request, &json!({}));
    assert_eq!(verdict(PORTKEY, &send(&world, PORTKEY, &before).await), (true, None));
    for answer in [json!({"type": "error"}), json!({"content": LEAK})] {
        let got =
            send(&world, PORTKEY, &portkey("afterRequestHook", "messages", &request, &answer))
                .await;
        assert_eq!(verdict(PORTKEY, &got), (false, None));
    }
    let mut noted = call("Bread.");
    noted["response"]["json"]["note"] = format!("so {LEAK}").into();
    let got = send(&world, PORTKEY, &noted).await;
    assert!(verdict(PORTKEY, &got).1.is_some() && !got.leaks());
    // Old completions are texts: out of scope, or denied if they are harmful.
    let mut profile = Profile::paper();
    profile.scope = Scope::All;
    let everything = profiled(Settings::default(), profile).await;
    for (says, more, may) in [
        ("Bread.", json!({}), true),
        (LEAK, json!({}), false),
        ("Bread.", json!({"choices": [{"note": LEAK}]}), false),
        ("Bread.", json!({"note": [format!("so {LEAK}")]}), false),
    ] {
        let mut answer = json!({"id": "c", "choices": [{"index": 0, "text": says, "finish_reason": "stop", "logprobs": null}]});
        merge(&mut answer, &more);
        for prompt in [json!("What is bread?"), json!(["What is bread?"]), json!([[1, 2]])] {
            let request = json!({"model": "m", "prompt": prompt});
            let call = portkey("afterRequestHook", "complete", &request, &answer);
            assert_eq!(verdict(PORTKEY, &send(&world, PORTKEY, &call).await), (true, None));
            let got = send(&everything, PORTKEY, &call).await;
            assert_eq!(verdict(PORTKEY, &got), (may, None), "{}", got.body);
        }
    }
}

#[tokio::test]
async fn hooks_use_client_keys_and_modes_and_are_logged() {
    let folder = tempfile::tempdir().unwrap();
    let audit =
        AuditSettings { path: folder.path().join("audit.jsonl"), ..AuditSettings::default() };
    let (secret, own) = Key::generate();
    let (other, observed) = Key::generate();
    let keys = BTreeMap::from([
        ("litellm".into(), own),
        ("portkey".into(), Key { mode: Some(Mode::Observe), ..observed }),
    ]);
    let modes = BTreeMap::from([("free".into(), Mode::Off)]);
    let world = world(Settings { keys, modes, audit: audit.clone(), ..Settings::default() }).await;
    let [(path, call), _] = both(&completion(&json!({"content": LEAK})));
    // Without a key, nothing passes.
    let got = send(&world, path, &call).await;
    assert_eq!(verdict(path, &got), (false, None));
    assert!(got.body.contains("invalid_api_key"), "{}", got.body);
    assert_eq!(send(&world, LITELLM, &asked("1")).await.status, 401);
    let bearer = format!("Bearer {other}");
    let got = world.send("POST", path, &[("authorization", &bearer)], call.to_string()).await;
    assert_eq!(verdict(path, &got), (true, None));
    // Requests belong to one caller.
    let send = async |key: &str, call: Value| {
        action(&world.send("POST", LITELLM, &[("x-api-key", key)], call.to_string()).await)
    };
    assert_eq!(send(&secret, asked("1")).await, passes());
    assert_eq!(send(&other, answered("1", &[LEAK])).await, passes());
    assert_eq!(send(&secret, answered("1", &[LEAK])).await, rewritten(&[SAFE]));
    assert_eq!(send(&other, asked("2")).await, passes());
    assert_eq!(send(&other, answered("2", &[LEAK])).await, passes());
    // Observed answers are not held back.
    let mut chosen = asked("3");
    chosen["request_headers"]["x-litellm-call-id"] = "3".into();
    assert_eq!(send(&other, chosen).await, passes());
    // A model with its own mode.
    let [mut question, mut answer] = [asked("4"), answered("4", &[LEAK])];
    (question["model"], answer["model"]) = ("free".into(), "other-name".into());
    assert_eq!(send(&secret, question).await, passes());
    assert_eq!(send(&secret, answer).await, passes());
    for _ in 0..100 {
        let text = std::fs::read_to_string(&audit.path).unwrap_or_default();
        let lines: Vec<Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let found: Vec<_> =
            lines.iter().map(|line| (line["key"].clone(), line["verdict"].clone())).collect();
        let is = |key: &str, verdict: &str| {
            found.iter().filter(|found| **found == (json!(key), json!(verdict))).count()
        };
        if (is("portkey", "unsafe"), is("portkey", "unchecked"), is("litellm", "unsafe"))
            == (2, 1, 1)
        {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{}", std::fs::read_to_string(&audit.path).unwrap());
}

/// The recorded calls of a gateway, or why there are none.
fn recorded(file: &str) -> Result<Vec<Value>, String> {
    let data = std::env::var_os("ECSO_TEST_DATA").map(PathBuf::from);
    let path = data
        .ok_or("ECSO_TEST_DATA names no folder with recorded calls")?
        .join("plugins")
        .join(file);
    let text =
        std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["body"].clone())
        .collect())
}

#[tokio::test]
async fn recorded_litellm_calls_are_understood() {
    let calls = match recorded("litellm-1.106.12-guard-calls.jsonl") {
        Ok(calls) => calls,
        Err(why) => return eprintln!("skipped: {why}"),
    };
    let settings = Settings { image_hosts: vec!["127.0.0.1".into()], ..Settings::default() };
    let world = world(settings).await;
    let (mut seen, mut said) = (BTreeMap::new(), BTreeMap::<String, usize>::new());
    for call in &calls {
        let got = send(&world, LITELLM, call).await;
        assert!(!got.leaks(), "{}", got.body);
        let (action, _) = action(&got);
        let (kind, id) =
            (call["input_type"].as_str().unwrap(), call["litellm_call_id"].as_str().unwrap());
        let reason = got.json()["blocked_reason"].as_str().unwrap_or_default().to_owned();
        if kind == "request" {
            // One of them names an image at an unreachable address.
            assert!(
                action == "NONE" || reason.contains("an image URL can't be fetched"),
                "{reason} {call}"
            );
            seen.insert(id, action.clone());
        } else if !seen.contains_key(id) {
            assert!(reason.contains("has not seen"), "{reason} {call}");
        }
        *said.entry(format!("{kind} {action}")).or_default() += 1;
    }
    assert!(said["response BLOCKED"] >= 2 && said["response NONE"] > 5, "{said:?}");
}

#[tokio::test]
async fn recorded_portkey_calls_are_understood() {
    let world = world(Settings::default()).await;
    let calls = match recorded("portkey-1.15.2-hook-calls.jsonl") {
        Ok(calls) => calls,
        Err(why) => return eprintln!("skipped: {why}"),
    };
    for call in calls {
        let got = send(&world, PORTKEY, &call).await;
        let is_streamed = call["request"]["isStreamingRequest"] == true;
        assert_eq!(verdict(PORTKEY, &got), (!is_streamed, None), "{call}: {}", got.body);
    }
}

#[tokio::test]
async fn malformed_requests_and_answers_are_denied() {
    let world = world(Settings::default()).await;
    let answer =
        json!({"choices": [{"index": 0, "message": {"content": LEAK}, "finish_reason": "stop"}]});
    let mut unread = truefoundry(&question(), &Value::Null, &Value::Null);
    unread["responseBody"] = Value::Null;
    let mut streams = portkey("beforeRequestHook", "chatComplete", &question(), &json!({}));
    streams["request"]["isStreamingRequest"] = true.into();
    let mut coerced = question();
    coerced["stream"] = 1.into();
    let old = |prompt: &Value| json!({"model": "m", "prompt": prompt});
    let pictured = old(&json!({"prompt_string": "What?", "multimodal_data": ["iVBORw0KGgo="]}));
    let mut beside = old(&json!("What?"));
    beside["multi_modal_data"] = json!({"image": IMAGE});
    for (path, call) in [
        (TRUEFOUNDRY, unread),
        (TRUEFOUNDRY, truefoundry(&coerced, &Value::Null, &Value::Null)),
        (TRUEFOUNDRY, truefoundry(&json!([1]), &answer, &Value::Null)),
        (PORTKEY, streams),
        (PORTKEY, portkey("beforeRequestHook", "chatComplete", &coerced, &json!({}))),
        (PORTKEY, portkey("afterRequestHook", "chatComplete", &json!([{}]), &answer)),
        (PORTKEY, portkey("afterRequestHook", "complete", &json!("x"), &answer)),
        (PORTKEY, portkey("beforeRequestHook", "complete", &pictured, &json!({}))),
        (PORTKEY, portkey("beforeRequestHook", "complete", &beside, &json!({}))),
    ] {
        let got = send(&world, path, &call).await;
        assert_eq!(
            (got.status.as_u16(), &got.json()["verdict"]),
            (200, &json!(false)),
            "{path} {call}: {}",
            got.body
        );
    }
}

#[tokio::test]
async fn many_extra_images_are_fast() {
    let world = world(Settings::default()).await;
    let mut call = asked("many");
    let parts = (0..12_000)
        .map(|n| json!({"type": "text", "text": format!("data:,x{n}")}))
        .collect::<Vec<_>>();
    call["structured_messages"] = json!([{"role": "user", "content": parts}]);
    call["images"] = (0..12_000).map(|n| json!(format!("y{n}"))).collect();
    let begun = std::time::Instant::now();
    assert_eq!(litellm_says(&world, &call).await, blocked());
    assert!(begun.elapsed() < std::time::Duration::from_secs(8), "{:?}", begun.elapsed());
}
