//! `ecso bench`, with a server whose reply times are known.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};

use crate::{
    ecso,
    mock::{Model, Reply, of},
    text,
};

#[tokio::test(flavor = "multi_thread")]
async fn every_arm_is_measured_with_requests_that_share_no_prefix() {
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
    assert_eq!(blocks.len(), 3, "prefix reuse is not measured on a server");
    let arms = ["unguarded", "paper", "hardened", "hardened, windowed"];
    for (block, count) in blocks.iter().zip([4, 4, 3]) {
        let rows = block["rows"].as_array().unwrap();
        let measured: Vec<&str> = rows.iter().map(|row| row["way"].as_str().unwrap()).collect();
        assert_eq!(measured, arms[..count], "{block}");
        assert_eq!(block["is_complete"], true, "{block}");
        assert!(rows.iter().all(|row| row["ms"].as_f64().unwrap() >= 20.0), "{block}");
        assert!(rows.iter().all(|row| row["answers"] == 1), "{block}");
        assert!(rows[1]["calls"].as_f64() > rows[0]["calls"].as_f64(), "{block}");
    }
    // A draft and then its check.
    assert!(blocks[0]["rows"][1]["ms"].as_f64().unwrap() >= 40.0, "{}", blocks[0]);
    assert_eq!(report["load_ms"], Value::Null);
    // A server that takes several calls answers them concurrently.
    let at_once = report["at_once"].as_array().unwrap();
    let ratios = at_once.iter().filter_map(|measured| measured["ratio"].as_f64());
    assert!(at_once.len() == 2 && ratios.fold(9.0, f64::min) > 2.0, "{report}");
    let taken = server.taken();
    let mut first_messages: Vec<String> =
        of(&taken, "direct").iter().map(|asked| asked.body["messages"][0].to_string()).collect();
    let count = first_messages.len();
    first_messages.sort_unstable();
    first_messages.dedup();
    assert_eq!(first_messages.len(), count);

    let list = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/list.png");
    let output = bench(&["--image", list, "--query", "Which list is it?", "--profile", "paper"]);
    let table = text(&output.stdout);
    assert!(table.contains("harmless requests\n") && !table.contains("hardened"), "{table}");
    assert!(table.contains("no two drafts share a prefix"), "{table}");
    assert!(table.contains("-: not known (the model reports no usage, or a call was stopped)\n"));
    assert!(server.taken().iter().any(|asked| asked.sent().contains("Which list is it?")));
}

/// A draft that was begun beside the request check, and stopped since the request is harmful.
#[tokio::test(flavor = "multi_thread")]
async fn stopped_drafts_are_counted_in_every_arm() {
    let server = Model::start(|asked| match asked.step {
        "request-check" => Reply::judges(asked, 0.99),
        "direct" if asked.prompt().contains("Write the entries") => {
            Reply::usual(asked).after(Duration::from_millis(800))
        }
        _ => Reply::usual(asked),
    });
    let (server, home) = (server.await, tempfile::tempdir().unwrap());
    let mut command = ecso(home.path());
    command.args(["bench", "--model", &server.url, "--runs", "1", "--json"]);
    let output = command.assert().success().get_output().clone();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    for block in &report["blocks"].as_array().unwrap()[..2] {
        let [paper, hardened, windowed] = [1, 2, 3].map(|row| &block["rows"][row]);
        assert_eq!(hardened["calls"], windowed["calls"], "{block}");
        for (row, are_known) in [(paper, true), (hardened, false), (windowed, false)] {
            assert_eq!(row["prompt_tokens"].is_number(), are_known, "{block}");
            assert_eq!(row["answer_tokens"].is_number(), are_known, "{block}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_figures_nothing_is_reported() {
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
async fn figures_before_a_failure_are_reported() {
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
        (3, &json!([])),
        "{report}"
    );
    // The model reports no usage, which is not 0 tokens.
    let row = &report["blocks"][0]["rows"][0];
    assert_eq!(
        (&row["prompt_tokens"], &row["judged_unsafe"]),
        (&Value::Null, &Value::Null),
        "{row}"
    );
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn figures_before_ctrl_c_are_reported() {
    let answers = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&answers);
    // The first block is interrupted, as one of its answers takes a long time.
    let server = Model::start(move |asked| {
        let is_slow = asked.step == "direct" && counter.fetch_add(1, Ordering::Relaxed) >= 10;
        Reply::usual(asked).after(Duration::from_secs(if is_slow { 60 } else { 0 }))
    });
    let (server, home) = (server.await, tempfile::tempdir().unwrap());
    let child = std::process::Command::new(assert_cmd::cargo::cargo_bin("ecso"))
        .args(["bench", "--model", &server.url, "--runs", "3", "--json", "--profile", "paper"])
        .env("HOME", home.path())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    for _ in 0..3000 {
        if answers.load(Ordering::Relaxed) > 10 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let interrupt = ["-INT", &child.id().to_string()];
    assert!(std::process::Command::new("kill").args(interrupt).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("interrupted"), "{stderr}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = report["blocks"][0]["rows"].as_array().unwrap();
    assert!(
        !rows.is_empty() && rows.iter().all(|row| row["answers"].as_u64() < Some(3)),
        "{report}"
    );
    assert_eq!(
        (&report["blocks"][0]["is_complete"], &report["at_once"]),
        (&json!(false), &json!([]))
    );
}
