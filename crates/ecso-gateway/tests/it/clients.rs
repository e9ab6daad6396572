//! Bodies that clients really send: each is known field by field, and reaches the upstream as it
//! was.
//!
//! `clients.jsonl` was recorded from the clients of 2026-11 in front of a server that answers with
//! text, tool calls and thoughts; those with `byhand` in their name are written after the client's
//! source or its docs.

use std::{collections::BTreeSet, sync::Arc};

use ecso_gateway::Settings;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::support::{World, said};

#[derive(Deserialize)]
struct Recorded {
    client: String,
    body: Value,
}

/// Fields with which a client asks for other models, tools of the server or copies of a prompt: an
/// operator may list them.
const REFUSED: [&str; 7] =
    ["provider", "models", "plugins", "route", "transforms", "debug", "web_search_options"];

/// What is left out on the way, everywhere in a body.
const LEFT_OUT: [&str; 2] = ["store", "uuid"];

fn without_what_is_left_out(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|name, _| !LEFT_OUT.contains(&name.as_str()));
            fields.values_mut().for_each(without_what_is_left_out);
        }
        Value::Array(list) => list.iter_mut().for_each(without_what_is_left_out),
        _ => {}
    }
}

#[tokio::test]
async fn bodies_of_clients_pass() {
    let speaks = Arc::new(|_: &Value| {
        said(&json!({"role": "assistant", "content": "Bread."}), &Value::Null)
    });
    let world = World::new(Settings::default(), speaks).await;
    let (mut clients, mut wrong, mut refused) = (BTreeSet::new(), Vec::new(), 0);
    for line in include_str!("clients.jsonl").lines() {
        let Recorded { client, mut body } = serde_json::from_str(line).unwrap();
        // How an answer is sent is no matter here.
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
        let sent: Value = serde_json::from_slice(&world.taken()[0].body).unwrap();
        without_what_is_left_out(&mut body);
        assert_eq!(sent, body, "{client}");
        clients.insert(
            client.rsplit_once('-').map_or(client.clone(), |(client, _)| client.to_owned()),
        );
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(clients.len() > 30 && refused == 6, "{refused} {clients:?}");
}
