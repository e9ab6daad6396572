//! `ecso bench`, on a server whose times are known.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use serde_json::Value;

use crate::{
    ecso,
    mock::{Model, Reply, of},
    text,
};

#[tokio::test(flavor = "multi_thread")]
async fn every_way_is_measured_on_requests_that_begin_like_no_other() {
    let server = Model::start(|asked| Reply::usual(asked).after(Duration::from_millis(20))).await;
    let home = tempfile::tempdir().unwrap();
    let bench = |more: &[&str]| {
        let mut command = ecso(home.path());
        command
            .args(["bench", "--model", &server.url, "--runs", "1", "--max-new-tokens", "8"])
            .args(more);
        command.assert().success().get_output().clone()
    };
    let report: Value = serde_json::from_slice(&bench(&["--json"]).stdout).unwrap();
    let blocks = report["blocks"].as_array().unwrap();
    assert_eq!(blocks.len(), 3, "nothing is left out of a server's prompts");
    for block in blocks {
        let rows = block["rows"].as_array().unwrap();
        let ways: Vec<&str> = rows.iter().map(|row| row["way"].as_str().unwrap()).collect();
        assert_eq!(ways, ["unguarded", "paper", "hardened"], "{block}");
        assert!(rows.iter().all(|row| row["ms"].as_f64().unwrap() >= 20.0), "{block}");
        assert!(rows[1]["calls"].as_f64() > rows[0]["calls"].as_f64(), "{block}");
    }
    // A draft and its check, one after the other.
    assert!(blocks[0]["rows"][1]["ms"].as_f64().unwrap() >= 40.0, "{}", blocks[0]);
    assert_eq!(report["load_ms"], Value::Null);
    // A server that takes several calls answers them at once.
    assert!(report["at_once"]["ratio"].as_f64().unwrap() > 2.0, "{report}");
    let taken = server.taken();
    let mut begins: Vec<String> =
        of(&taken, "direct").iter().map(|asked| asked.body["messages"][0].to_string()).collect();
    let all = begins.len();
    begins.sort_unstable();
    begins.dedup();
    assert_eq!(begins.len(), all);

    let list = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/list.png");
    let output = bench(&["--image", list, "--query", "Which list is it?", "--profile", "paper"]);
    let table = text(&output.stdout);
    assert!(table.contains("harmless requests\n") && !table.contains("hardened"), "{table}");
    assert!(server.taken().iter().any(|asked| asked.sent().contains("Which list is it?")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_fails_is_no_figure() {
    let server = Model::start(|_| Reply::refused(500, "broken", None, "server_error")).await;
    let home = tempfile::tempdir().unwrap();
    let mut command = ecso(home.path());
    command
        .args(["bench", "--model", &server.url, "--runs", "1"])
        .env("ECSO__SERVER__RETRIES", "0");
    let output = command.assert().code(3).get_output().clone();
    assert_eq!(text(&output.stdout), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_measured_before_a_failure_is_told() {
    let calls = AtomicUsize::new(0);
    let server = Model::start(move |asked| match calls.fetch_add(1, Ordering::Relaxed) {
        0..40 => Reply::usual(asked),
        _ => Reply::refused(500, "broken", None, "server_error"),
    });
    let (server, home) = (server.await, tempfile::tempdir().unwrap());
    let mut command = ecso(home.path());
    command.args(["bench", "--model", &server.url, "--runs", "1", "--json", "--profile", "paper"]);
    let output = command.env("ECSO__SERVER__RETRIES", "0").assert().code(3).get_output().clone();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (report["blocks"].as_array().unwrap().len(), &report["at_once"]),
        (3, &Value::Null),
        "{report}"
    );
    // The model does not tell how many tokens: that is no 0.
    let row = &report["blocks"][0]["rows"][0];
    assert_eq!(
        (&row["prompt_tokens"], &row["judged_unsafe"]),
        (&Value::Null, &Value::Null),
        "{row}"
    );
}
