//! Requests that continue from an answer by its id: who may do so, and what of the conversation is
//! judged.

use std::sync::Arc;

use ecso::{Profile, profile::Rewrite};
use ecso_gateway::{Settings, settings::Key};
use serde_json::{Value, json};

use crate::support::{Harness, IMAGE, LEAK, TestResponse, said, streamed};

const RESPONSES: &str = "/v1/responses";

/// Explains bread, and answers harmfully if asked to.
fn upstream() -> crate::support::Respond {
    Arc::new(|sent: &Value| {
        let last = sent["messages"].as_array().unwrap().last().unwrap().to_string();
        let says = if last.contains("do harm") { LEAK } else { "Bread." };
        let message = json!({"role": "assistant", "content": says, "reasoning_content": "Hm."});
        if sent["stream"] == true {
            return streamed(&[
                json!({"choices": [{"delta": message, "finish_reason": "stop"}]}).to_string()
            ]);
        }
        said(&message, &Value::Null)
    })
}

async fn world(settings: Settings) -> Harness {
    Harness::with(settings, Profile::paper(), upstream()).await
}

fn input_image() -> Value {
    json!([{"role": "user", "content": [{"type": "input_image", "image_url": IMAGE, "detail": "low"},
        {"type": "input_text", "text": "What is this?"}]}])
}

async fn ask(world: &Harness, key: &str, body: Value) -> TestResponse {
    world
        .send("POST", RESPONSES, &[("authorization", &format!("Bearer {key}"))], body.to_string())
        .await
}

/// The answer; for a stream, from its last event.
fn answer(got: &TestResponse) -> Value {
    assert_eq!(got.status, 200, "{}", got.body);
    let last = got.body.rsplit("data: ").next().filter(|_| got.body.starts_with(": "));
    last.map_or_else(
        || got.json(),
        |last| serde_json::from_str::<Value>(last).unwrap()["response"].clone(),
    )
}

fn id(got: &TestResponse) -> String {
    answer(got)["id"].as_str().unwrap().to_owned()
}

/// The messages of the last request for an answer.
fn last_messages(world: &Harness) -> Vec<Value> {
    let take_requests = world.take_requests();
    let mut bodies =
        take_requests.iter().map(|reached| serde_json::from_slice::<Value>(&reached.body).unwrap());
    let direct =
        bodies.find(|body| !body.to_string().contains("harmful, unsafe and unethical")).unwrap();
    direct["messages"].as_array().unwrap().clone()
}

#[tokio::test]
async fn the_whole_conversation_is_sent_and_judged_again() {
    let world = world(Settings::default()).await;
    let first =
        ask(&world, "k", json!({"model": "m", "instructions": "Be kind.", "input": input_image()}))
            .await;
    assert_eq!(first.json()["store"], true);
    world.take_requests();
    let body = json!({"model": "m", "instructions": "Be short.", "input": "And that?", "previous_response_id": id(&first)});
    let second = ask(&world, "k", body).await;
    assert_eq!(second.json()["previous_response_id"], id(&first), "{}", second.body);
    // The image in the first turn brings the request into scope.
    assert_eq!(second.headers["x-ecso-verdict"], "safe");
    let sent = last_messages(&world);
    assert_eq!(
        sent.iter().map(|message| &message["role"]).collect::<Vec<_>>(),
        ["system", "user", "assistant", "user"]
    );
    assert_eq!((&sent[0]["content"], &sent[2]["content"]), (&json!("Be short."), &json!("Bread.")));
    assert_eq!(sent[1]["content"][0]["image_url"], json!({"url": IMAGE, "detail": "low"}));
    // Reasoning is not part of the conversation.
    assert!(!json!(sent).to_string().contains("Hm."));
    // A third continues from the second, and another from the first, also as a stream.
    for (before, count, stream) in [(&second, 5, false), (&first, 3, false), (&second, 5, true)] {
        let body = json!({"model": "m", "input": "Which?", "previous_response_id": id(before), "store": false, "stream": stream});
        let got = ask(&world, "k", body.clone()).await;
        assert_eq!(
            (last_messages(&world).len(), &answer(&got)["store"]),
            (count, &json!(false)),
            "{stream} {}",
            got.body
        );
        // Nothing of it was stored.
        let got = ask(
            &world,
            "k",
            json!({"model": "m", "input": "And?", "previous_response_id": id(&got)}),
        )
        .await;
        assert_eq!(got.json()["error"]["code"], "previous_response_not_found", "{}", got.body);
        world.take_requests();
    }
    // A stream is stored too.
    let body = json!({"model": "m", "input": "Which?", "previous_response_id": id(&second), "stream": true});
    let third = ask(&world, "k", body).await;
    assert_eq!(answer(&third)["store"], true);
    world.take_requests();
    ask(&world, "k", json!({"model": "m", "input": "And?", "previous_response_id": id(&third)}))
        .await;
    assert_eq!(last_messages(&world).len(), 7);
    // The judge sees the image if harm is asked for later.
    let harm = ask(
        &world,
        "k",
        json!({"model": "m", "input": "do harm", "previous_response_id": id(&second)}),
    )
    .await;
    assert_eq!(
        (harm.headers["x-ecso-verdict"].as_bytes(), harm.leaks()),
        (b"unsafe".as_slice(), false),
        "{}",
        harm.body
    );
    // What went out is stored.
    world.take_requests();
    ask(&world, "k", json!({"model": "m", "input": "Go on.", "previous_response_id": id(&harm)}))
        .await;
    let sent = json!(last_messages(&world)).to_string();
    assert!(sent.contains("Here is a harmless answer.") && !sent.contains(LEAK), "{sent}");
}

#[tokio::test]
async fn conversations_include_tool_calls_and_images() {
    let calls = Arc::new(|sent: &Value| {
        let call = json!({"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}});
        let is_first = sent["messages"].as_array().unwrap().len() == 1;
        let message = if is_first {
            json!({"role": "assistant", "content": null, "tool_calls": [call]})
        } else {
            json!({"role": "assistant", "content": LEAK})
        };
        said(&message, &Value::Null)
    });
    let mut refusing = Profile::paper();
    refusing.rewrite = Rewrite::Refuse;
    let world = Harness::with(Settings::default(), refusing, calls).await;
    let tools = json!([{"type": "function", "name": "look"}]);
    let first = ask(&world, "k", json!({"model": "m", "input": "Look.", "tools": tools})).await;
    assert_eq!(first.json()["output"][0]["call_id"], "call_1", "{}", first.body);
    let output = json!([{"type": "function_call_output", "call_id": "call_1", "output": [{"type": "input_image", "image_url": IMAGE}]}]);
    let body =
        json!({"model": "m", "input": output, "tools": tools, "previous_response_id": id(&first)});
    world.take_requests();
    let got = ask(&world, "k", body).await;
    assert_eq!(
        (got.headers["x-ecso-verdict"].as_bytes(), got.leaks()),
        (b"unsafe".as_slice(), false),
        "{}",
        got.body
    );
    let sent = last_messages(&world);
    assert_eq!(sent[1]["tool_calls"][0]["id"], "call_1");
    assert_eq!((&sent[2]["role"], &sent[3]["role"]), (&json!("tool"), &json!("user")));
    assert!(got.body.contains(&Profile::paper().refusal));
}

#[tokio::test]
async fn conversations_belong_to_one_client() {
    let not_found = |got: &TestResponse| {
        assert_eq!(
            (got.status.as_u16(), &got.json()["error"]["param"]),
            (400, &json!("previous_response_id")),
            "{}",
            got.body
        );
        assert_eq!(got.json()["error"]["code"], "previous_response_not_found");
    };
    // Clients with keys of the upstream.
    let own = world(Settings::default()).await;
    let first = id(&ask(&own, "one", json!({"model": "m", "input": input_image()})).await);
    let go_on =
        |before: &str| json!({"model": "m", "input": "And?", "previous_response_id": before});
    own.take_requests();
    for (key, before) in [
        ("two", first.as_str()),
        ("", &first),
        ("one", "resp_1"),
        ("one", ""),
        ("one", first.trim_start_matches("resp_")),
    ] {
        not_found(&ask(&own, key, go_on(before)).await);
    }
    let headers = [("authorization", "Bearer one"), ("openai-project", "other")];
    not_found(&own.send("POST", RESPONSES, &headers, go_on(&first).to_string()).await);
    assert!(own.take_requests().is_empty());
    assert_eq!(ask(&own, "one", go_on(&first)).await.status, 200);
    // Whatever is sent to the upstream distinguishes clients.
    let others = [
        vec!["Basic YWxpY2U6eA=="],
        vec!["Basic Ym9iOnk="],
        vec!["raw"],
        vec!["Bearer"],
        vec![],
        vec!["Bearer one", "Basic Ym9iOnk="],
    ];
    for (place, values) in others.iter().enumerate() {
        let send = async |values: &[&str], body: Value| {
            let headers: Vec<(&str, &str)> =
                values.iter().map(|value| ("authorization", *value)).collect();
            own.send("POST", RESPONSES, &headers, body.to_string()).await
        };
        let first = id(&send(values, json!({"model": "m", "input": input_image()})).await);
        assert_eq!(send(values, go_on(&first)).await.status, 200);
        own.take_requests();
        for other in
            others.iter().enumerate().filter(|(other, _)| *other != place).map(|(_, other)| other)
        {
            not_found(&send(other, go_on(&first)).await);
        }
        not_found(&ask(&own, "one", go_on(&first)).await);
    }
    // Clients with keys of the guard, before and after the settings are reloaded.
    let mut settings = Settings::default();
    let [(one, entry), (two, other)] = [Key::generate(), Key::generate()];
    settings.keys.extend([("one".to_owned(), entry), ("two".to_owned(), other)]);
    let ours = world(settings).await;
    let first = id(&ask(&ours, &one, json!({"model": "m", "input": input_image()})).await);
    not_found(&ask(&ours, &two, go_on(&first)).await);
    assert_eq!(ask(&ours, &one, go_on(&first)).await.status, 200);
}

#[tokio::test]
async fn without_a_store_the_field_is_refused() {
    for (stored, stored_for) in [(0, 60), (1 << 20, 0)] {
        let mut settings = Settings::default();
        (settings.limits.stored, settings.limits.stored_for) = (stored, stored_for);
        let world = world(settings).await;
        let first =
            ask(&world, "k", json!({"model": "m", "input": input_image(), "store": true})).await;
        assert_eq!(first.json()["store"], false);
        let got = ask(
            &world,
            "k",
            json!({"model": "m", "input": "And?", "previous_response_id": id(&first)}),
        )
        .await;
        assert_eq!(
            (got.status.as_u16(), &got.json()["error"]["code"]),
            (400, &json!("unsupported_content")),
            "{}",
            got.body
        );
    }
}

#[tokio::test]
async fn limits_apply_to_the_whole_conversation() {
    let mut settings = Settings::default();
    settings.limits.images = 2;
    let world = world(settings).await;
    let mut before = Value::Null;
    for turn in 0..3 {
        let got = ask(
            &world,
            "k",
            json!({"model": "m", "input": input_image(), "previous_response_id": before}),
        )
        .await;
        if turn == 2 {
            assert_eq!(got.json()["error"]["code"], "too_many_images", "{}", got.body);
        } else {
            before = id(&got).into();
        }
    }
    let many = vec![json!({"role": "user", "content": "."}); 30_000];
    let first = ask(&world, "k", json!({"model": "m", "input": many})).await;
    let got =
        ask(&world, "k", json!({"model": "m", "input": many, "previous_response_id": id(&first)}))
            .await;
    assert_eq!(
        (got.status.as_u16(), &got.json()["error"]["code"]),
        (413, &json!("body_too_large")),
        "{}",
        got.body
    );
    let mut settings = Settings::default();
    settings.limits.body = 3000;
    let world = self::world(settings).await;
    let first = id(&ask(&world, "k", json!({"model": "m", "input": "f".repeat(2600)})).await);
    let got =
        ask(&world, "k", json!({"model": "m", "input": "And?", "previous_response_id": first}))
            .await;
    assert_eq!(
        (got.status.as_u16(), &got.json()["error"]["code"]),
        (413, &json!("body_too_large")),
        "{}",
        got.body
    );
}

/// An earlier answer is not part of the new one, whatever is asked after it; and something must be
/// asked.
#[tokio::test]
async fn earlier_answers_do_not_hide_the_new_one() {
    let long = "Bread is good. ".repeat(140);
    let respond = Arc::new(move |sent: &Value| {
        let is_first = sent["messages"].as_array().unwrap().len() == 1;
        said(
            &json!({"role": "assistant", "content": if is_first { &long } else { LEAK }}),
            &Value::Null,
        )
    });
    let world = Harness::with(Settings::default(), Profile::paper(), respond).await;
    let first = id(&ask(&world, "k", json!({"model": "m", "input": input_image()})).await);
    let output =
        |output: Value| json!([{"type": "function_call_output", "call_id": "c", "output": output}]);
    for (input, is_asked) in [
        (json!([]), false),
        (json!([{"type": "reasoning", "summary": []}]), false),
        (json!([{"role": "developer", "content": "Go on."}]), true),
        (output(json!("Go on.")), true),
        (output(json!([{"type": "input_image", "image_url": IMAGE}])), true),
    ] {
        let got =
            ask(&world, "k", json!({"model": "m", "input": input, "previous_response_id": first}))
                .await;
        assert_eq!((got.status == 200, got.leaks()), (is_asked, false), "{input} {}", got.body);
        if is_asked {
            assert_eq!(got.headers["x-ecso-verdict"], "unsafe", "{input}");
        }
    }
}
