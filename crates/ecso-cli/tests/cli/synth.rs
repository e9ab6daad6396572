//! `ecso synth`: what goes in, and who else is at it.

use std::{path::Path, process::Output, time::Duration};

use serde_json::{Value, json};

use crate::{
    ecso,
    mock::{Model, Reply},
    text,
};

fn synth(home: &Path, url: &str, input: &str, stdin: &str) -> Output {
    let mut command = ecso(home);
    command.args(["synth", "--model", url, "--model-name", "m", "--profile", "paper", "--out"]).arg(home.join("out"));
    command.args(["--input", input, "--json", "--quiet"]);
    command.timeout(Duration::from_mins(1)).write_stdin(stdin).output().unwrap()
}

fn row(query: &str) -> String {
    json!({"query": query, "image": null}).to_string() + "\n"
}

#[tokio::test(flavor = "multi_thread")]
async fn standard_input_is_what_it_was_or_the_error_says_what_to_do() {
    let model = Model::start(Reply::usual).await;
    let folder = tempfile::tempdir().unwrap();
    let go = |input: &str, stdin: &str| synth(folder.path(), &model.url, input, stdin);
    for _ in 0..2 {
        let output = go("-", &row("What is bread?"));
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
    let output = go("-", &row("What is rye?"));
    let (said, kept) = (text(&output.stderr), folder.path().join("out/input.jsonl"));
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("name another --out") && said.contains(&format!("--input {}", kept.display())), "{said}");
    assert_eq!(std::fs::read_to_string(&kept).unwrap(), row("What is bread?"));
    // What is kept goes on by its name, and what is gone is told.
    std::fs::write(&kept, row("What is rye?") + &row("What is wheat?")).unwrap();
    let output = go(kept.to_str().unwrap(), "");
    let manifest: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&manifest["rows"], &manifest["gone"]), (&json!(2), &json!(0)));
    std::fs::write(&kept, row("What is rye?")).unwrap();
    let output = go(kept.to_str().unwrap(), "");
    let manifest: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&manifest["rows"], &manifest["gone"]), (&json!(1), &json!(1)));
}

#[tokio::test(flavor = "multi_thread")]
async fn under_other_settings_it_does_not_go_on() {
    let model = Model::start(Reply::usual).await;
    let folder = tempfile::tempdir().unwrap();
    let rows = folder.path().join("rows.jsonl");
    std::fs::write(&rows, row("What is bread?")).unwrap();
    let go = |more: &[&str]| {
        let mut command = ecso(folder.path());
        command.args(["synth", "--model", &model.url, "--model-name", "m", "--profile", "paper", "--quiet", "--input"]);
        command.arg(&rows).arg("--out").arg(folder.path().join("out")).args(more).assert()
    };
    go(&[]).success();
    for (more, what) in [
        (&["--shard", "1/2"][..], "--shard"),
        (&["--no-refusals"], "filter"),
        (&["--near-duplicates"], "filter"),
        (&["--set", "scope=all"], "profile"),
    ] {
        let said = text(&go(more).code(2).get_output().stderr);
        assert!(said.contains(&format!("was begun with another {what}")), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_a_folder_that_are_not_read_are_told() {
    let model = Model::start(Reply::usual).await;
    let folder = tempfile::tempdir().unwrap();
    let rows = folder.path().join("rows");
    std::fs::create_dir(&rows).unwrap();
    std::fs::write(rows.join("a.jsonl"), row("What is bread?")).unwrap();
    std::fs::write(rows.join("b.jsonl.xz"), "xz").unwrap();
    let output = synth(folder.path(), &model.url, rows.to_str().unwrap(), "");
    assert!(text(&output.stderr).contains("rows: not read: 1 .xz"), "{}", text(&output.stderr));
    let manifest: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(manifest["unread"], json!({".xz": 1}));
    // What is written there would be read as rows.
    let output = synth(folder.path(), &model.url, folder.path().to_str().unwrap(), "");
    let said = text(&output.stderr);
    assert!(output.status.code() == Some(2) && said.contains("lies in the folder that is read"), "{said}");
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn nobody_else_works_in_a_folder_until_its_dataset_is_packed() {
    let model = Model::start(Reply::usual).await;
    let folder = tempfile::tempdir().unwrap();
    let list = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/list.png")).unwrap();
    let (rows, image) = (folder.path().join("rows.jsonl"), folder.path().join("a.png"));
    std::fs::write(&rows, json!({"query": "A bad request", "image": "a.png"}).to_string()).unwrap();
    std::fs::write(&image, &list).unwrap();
    let go = || synth(folder.path(), &model.url, rows.to_str().unwrap(), "");
    assert!(go().status.success());
    // Whoever reads the image waits for it, as it comes through a pipe: before the rows are made, and when they are packed.
    std::fs::remove_file(&image).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&image).status().unwrap().success());
    let is_packing = || {
        let names = std::fs::read_dir(folder.path().join("out")).unwrap().map(|entry| entry.unwrap().file_name());
        names.into_iter().any(|name| name.to_string_lossy().starts_with(".dataset-"))
    };
    std::thread::scope(|scope| {
        let first = scope.spawn(go);
        while !is_packing() && !first.is_finished() {
            std::fs::write(&image, &list).unwrap();
            std::thread::sleep(Duration::from_millis(300));
        }
        let said = text(&go().stderr);
        assert!(said.contains("another process writes it"), "{said}");
        std::fs::write(&image, &list).unwrap();
        let output = first.join().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_made_is_told_as_what_it_is() {
    let model = Model::start(Reply::usual).await;
    let folder = tempfile::tempdir().unwrap();
    let go = |name: &str, rows: &str, more: &[&str]| {
        let (path, out) = (folder.path().join(format!("{name}.jsonl")), folder.path().join(name));
        std::fs::write(&path, rows).unwrap();
        let mut command = ecso(folder.path());
        command.args(["synth", "--model", &model.url, "--model-name", "m", "--profile", "paper", "--quiet", "--input"]);
        command.arg(&path).arg("--out").arg(&out).args(more).assert()
    };
    let said = text(&go("empty", "", &[]).code(2).get_output().stderr);
    assert!(said.contains("empty.jsonl: there is no row in it"), "{said}");
    let output = go("spent", &row("What is bread?"), &["--max-tokens", "0"]).code(1);
    let said = text(&output.get_output().stderr);
    assert!(said.contains("the budget was spent before the first of 1"), "{said}");
    assert!(text(&output.get_output().stdout).contains("never looked at: 1"));
    let said = text(&go("mild", &row("What is bread?"), &["--set", "scope=all"]).success().get_output().stderr);
    assert!(said.contains("the dataset is empty"), "{said}");
    let said = text(&go("broken", "{\n", &[]).code(1).get_output().stderr);
    assert!(said.contains("failed.jsonl says why"), "{said}");
}
