//! Request bodies of real clients: every field is known, and reaches the upstream unchanged.
//!
//! `clients.jsonl` was recorded from clients of November 2026 in front of a server that answers
//! with text, tool calls and reasoning. Those with `byhand` in their name follow the client's
//! source or documentation.

use std::{collections::BTreeSet, sync::Arc};

use ecso_gateway::Settings;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::support::{Harness, said};

#[derive(Deserialize)]
struct Recorded {
    client: String,
    body: Value,
}

/// Fields with which a client asks for other models, server tools or copies of a prompt. An
/// operator may allow them.
const REFUSED: [&str; 7] =
    ["provider", "models", "plugins", "route", "transforms", "debug", "web_search_options"];

/// Fields that are dropped anywhere in a body.
const DROPPED: [&str; 2] = ["store", "uuid"];

fn remove_dropped_fields(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|name, _| !DROPPED.contains(&name.as_str()));
            fields.values_mut().for_each(remove_dropped_fields);
        }
        Value::Array(list) => list.iter_mut().for_each(remove_dropped_fields),
        _ => {}
    }
}

#[tokio::test]
async fn bodies_of_real_clients_pass() {
    let respond = Arc::new(|_: &Value| {
        said(&json!({"role": "assistant", "content": "Bread."}), &Value::Null)
    });
    let world = Harness::new(Settings::default(), respond).await;
    let (mut clients, mut wrong, mut refused) = (BTreeSet::new(), Vec::new(), 0);
    for line in include_str!("clients.jsonl").lines() {
        let Recorded { client, mut body } = serde_json::from_str(line).unwrap();
        // Whether the answer is streamed does not matter here.
        if body["stream"] == true {
            body["stream"] = false.into();
        }
        let mut got = world.chat(&body).await;
        let param = got.json()["error"]["param"].as_str().map(str::to_owned);
        if param.is_some_and(|param| REFUSED.contains(&param.as_str())) {
            refused += 1;
            body.as_object_mut().unwrap().retain(|name, _| !REFUSED.contains(&name.as_str()));
            got = world.chat(&body).await;
        }
        if !got.status.is_success() {
            wrong.push(format!("{client}: {}", got.body));
            continue;
        }
        let sent: Value = serde_json::from_slice(&world.take_requests()[0].body).unwrap();
        remove_dropped_fields(&mut body);
        assert_eq!(sent, body, "{client}");
        clients.insert(
            client.rsplit_once('-').map_or(client.clone(), |(client, _)| client.to_owned()),
        );
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(clients.len() > 30 && refused == 6, "{refused} {clients:?}");
}
