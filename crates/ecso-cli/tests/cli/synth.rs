//! `ecso synth`: inputs, interruptions and concurrent processes.

use std::{
    path::Path,
    process::{Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    ecso,
    mock::{Model, Reply},
    text,
};

fn synth(home: &Path, url: &str, input: &str, stdin: &str) -> Output {
    let mut command = ecso(home);
    command
        .args(["synth", "--model", url, "--model-name", "m", "--profile", "paper", "--out"])
        .arg(home.join("out"));
    command.args(["--input", input, "--json", "--quiet"]);
    command.timeout(Duration::from_mins(1)).write_stdin(stdin).output().unwrap()
}

fn row(query: &str) -> String {
    json!({"query": query, "image": null}).to_string() + "\n"
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_standard_input_is_an_error_with_a_hint() {
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
    assert!(
        said.contains("name another --out")
            && said.contains(&format!("--input {}", kept.display())),
        "{said}"
    );
    assert_eq!(std::fs::read_to_string(&kept).unwrap(), row("What is bread?"));
    // The stored input can be named, and removed rows are counted.
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
async fn a_run_does_not_resume_with_other_settings() {
    let model = Model::start(Reply::usual).await;
    let folder = tempfile::tempdir().unwrap();
    let rows = folder.path().join("rows.jsonl");
    std::fs::write(&rows, row("What is bread?")).unwrap();
    let go = |more: &[&str]| {
        let mut command = ecso(folder.path());
        command.args([
            "synth",
            "--model",
            &model.url,
            "--model-name",
            "m",
            "--profile",
            "paper",
            "--quiet",
            "--input",
        ]);
        command.arg(&rows).arg("--out").arg(folder.path().join("out")).args(more).assert()
    };
    go(&[]).success();
    for (more, what) in [
        (&["--shard", "1/2"][..], "--shard"),
        (&["--no-refusals"], "filter"),
        (&["--near-duplicates"], "filter"),
        (&["--set", "scope=all"], "profile"),
        (&["--map", "query=query"], "--map"),
        (&["--query", "What?"], "--query"),
        (&["--image-root", "."], "--image-root"),
    ] {
        let said = text(&go(more).code(2).get_output().stderr);
        assert!(said.contains(&format!("was started with another {what}")), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unread_files_of_a_folder_are_reported() {
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
    // Files written there would be read as rows.
    let refused = |input: &Path| {
        let output = synth(folder.path(), &model.url, input.to_str().unwrap(), "");
        let said = text(&output.stderr);
        assert!(output.status.code() == Some(2) && said.contains("is part of the input"), "{said}");
    };
    refused(folder.path());
    #[cfg(unix)]
    {
        let link = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(folder.path(), link.path().join("rows")).unwrap();
        refused(&link.path().join("rows"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_input_is_an_error() {
    let model = Model::start(Reply::usual).await;
    let folder = tempfile::tempdir().unwrap();
    let rows = folder.path().join("rows.jsonl");
    let whole = row("What is bread?") + &row("What is rye?");
    std::fs::write(&rows, &whole[..whole.len() - 5]).unwrap();
    let output = synth(folder.path(), &model.url, rows.to_str().unwrap(), "");
    let said = text(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains("is truncated"), "{said}");
    let manifest: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&manifest["rows"], &manifest["failed"], &manifest["cut_short"]),
        (&json!(2), &json!(1), &json!(1))
    );
    std::fs::write(&rows, &whole).unwrap();
    assert!(synth(folder.path(), &model.url, rows.to_str().unwrap(), "").status.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_input_that_changes_during_the_run_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let (rows, other) = (folder.path().join("rows.jsonl"), folder.path().join("other"));
    std::fs::write(&rows, row("What is bread?")).unwrap();
    std::fs::write(&other, row("What is rye?") + &row("What is wheat?")).unwrap();
    let place = rows.clone();
    let model = Model::start(move |asked| {
        if asked.step == "direct" {
            let _ = std::fs::rename(&other, &place);
        }
        Reply::usual(asked)
    })
    .await;
    let go = || synth(folder.path(), &model.url, rows.to_str().unwrap(), "");
    let output = go();
    let said = text(&output.stderr);
    assert!(
        output.status.code() == Some(1) && said.contains("changed during the run: 2 of its rows"),
        "{said}"
    );
    assert!(go().status.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn incomplete_answers_are_left_out_and_counted() {
    let model = Model::start(|asked| {
        let begun = json!({"role": "assistant", "content": "Mix the flour and"});
        if asked.step == "direct" {
            Reply::choice(asked, &begun, "length", None)
        } else {
            Reply::usual(asked)
        }
    })
    .await;
    let folder = tempfile::tempdir().unwrap();
    let rows = folder.path().join("rows.jsonl");
    std::fs::write(&rows, row("What is bread?")).unwrap();
    let mut command = ecso(folder.path());
    command.args([
        "synth",
        "--model",
        &model.url,
        "--model-name",
        "m",
        "--profile",
        "paper",
        "--set",
        "scope=all",
    ]);
    let output = command
        .arg("--input")
        .arg(&rows)
        .arg("--out")
        .arg(folder.path().join("out"))
        .output()
        .unwrap();
    let (told, said) = (text(&output.stdout), text(&output.stderr));
    assert!(
        output.status.success() && told.contains("1 left out") && told.contains("left out, cut: 1"),
        "{told}{said}"
    );
}

/// Starts `ecso synth` on these rows in the background.
fn begin(home: &Path, url: &str, rows: &Path, more: &[&str]) -> std::process::Child {
    let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin("ecso"));
    command.env_clear().env("HOME", home).args([
        "synth",
        "--model",
        url,
        "--model-name",
        "m",
        "--profile",
        "paper",
    ]);
    command
        .args(["--json", "--quiet", "--out"])
        .arg(home.join("out"))
        .arg("--input")
        .arg(rows)
        .args(more);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_stays_locked_until_its_dataset_is_packed() {
    let model = Model::start(Reply::usual).await;
    let folder = tempfile::tempdir().unwrap();
    let rows = folder.path().join("rows.jsonl");
    std::fs::write(&rows, row("What is bread?")).unwrap();
    // More than a pipe buffers: the process blocks on its output, with the dataset packed.
    let licence = "mit".repeat(40_000);
    let first = begin(folder.path(), &model.url, &rows, &["--license", &licence]);
    let until = Instant::now() + Duration::from_mins(1);
    while !folder.path().join("out/dataset").exists() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(50));
    }
    let said = text(&synth(folder.path(), &model.url, rows.to_str().unwrap(), "").stderr);
    assert!(said.contains("another process is writing this file"), "{said}");
    let output = first.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_works_while_files_are_read() {
    let model = Model::start(Reply::usual).await;
    let folder = tempfile::tempdir().unwrap();
    let rows = folder.path().join("rows.jsonl");
    std::fs::write(&rows, row("What is bread?")).unwrap();
    assert!(synth(folder.path(), &model.url, rows.to_str().unwrap(), "").status.success());
    // A resumed run first reads all rows with their images.
    std::fs::File::create(folder.path().join("a.png")).unwrap().set_len(1 << 30).unwrap();
    let large = json!({"query": "What?", "image": "a.png"}).to_string() + "\n";
    std::fs::write(&rows, row("What is bread?") + &large.repeat(500)).unwrap();
    let child = begin(folder.path(), &model.url, &rows, &[]);
    std::thread::sleep(Duration::from_secs(2));
    let stopped = Instant::now();
    let killed = std::process::Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status()
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let said = text(&output.stderr);
    assert!(
        killed.success()
            && output.status.code() == Some(130)
            && said.contains("interrupted; recorded work"),
        "{said}"
    );
    assert!(stopped.elapsed() < Duration::from_secs(20), "{:?}", stopped.elapsed());
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn an_endless_file_is_an_error_of_its_row() {
    let model = Model::start(Reply::usual).await;
    let folder = tempfile::tempdir().unwrap();
    let (rows, pipe) = (folder.path().join("rows.jsonl"), folder.path().join("a.png"));
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let one = |image: &str| json!({"query": "What?", "image": image}).to_string() + "\n";
    std::fs::write(
        &rows,
        row("What is bread?") + &one("a.png") + &one("/dev/zero") + &one("/proc/kmsg"),
    )
    .unwrap();
    let output = synth(folder.path(), &model.url, rows.to_str().unwrap(), "");
    let manifest: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&manifest["rows"], &manifest["failed"]), (&json!(4), &json!(3)));
    let output =
        synth(folder.path(), &model.url, pipe.with_extension("jsonl").to_str().unwrap(), "");
    assert_eq!(output.status.code(), Some(2), "there is no such file");
    std::fs::rename(&pipe, pipe.with_extension("jsonl")).unwrap();
    let output =
        synth(folder.path(), &model.url, pipe.with_extension("jsonl").to_str().unwrap(), "");
    let said = text(&output.stderr);
    assert!(output.status.code() == Some(2) && said.contains("not a regular file"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_dataset_has_a_reason() {
    let model = Model::start(Reply::usual).await;
    let folder = tempfile::tempdir().unwrap();
    let go = |name: &str, rows: &str, more: &[&str]| {
        let (path, out) = (folder.path().join(format!("{name}.jsonl")), folder.path().join(name));
        std::fs::write(&path, rows).unwrap();
        let mut command = ecso(folder.path());
        command.args([
            "synth",
            "--model",
            &model.url,
            "--model-name",
            "m",
            "--profile",
            "paper",
            "--quiet",
            "--input",
        ]);
        command.arg(&path).arg("--out").arg(&out).args(more).assert()
    };
    let said = text(&go("empty", "", &[]).code(2).get_output().stderr);
    assert!(said.contains("empty.jsonl has no rows"), "{said}");
    let output = go("spent", &row("What is bread?"), &["--max-tokens", "0"]).code(1);
    let said = text(&output.get_output().stderr);
    assert!(said.contains("the budget was spent before the first of 1"), "{said}");
    assert!(text(&output.get_output().stdout).contains("never processed: 1"));
    let said = text(
        &go("mild", &row("What is bread?"), &["--set", "scope=all"]).success().get_output().stderr,
    );
    assert!(said.contains("the dataset is empty"), "{said}");
    let said = text(
        &go("twice", &row("q"), &["--map", "query=a", "--map", "query=b"])
            .code(2)
            .get_output()
            .stderr,
    );
    assert!(said.contains("--map names `query` twice"), "{said}");
    let said = text(&go("broken", "{\n", &[]).code(1).get_output().stderr);
    let (_, first) = said.split_once("every row failed; see ").expect(&said);
    assert!(first.contains("failed.jsonl; the first: "), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_output_of_a_run_is_not_its_input() {
    let model = Model::start(Reply::usual).await;
    let folder = tempfile::tempdir().unwrap();
    let rows = folder.path().join("rows");
    std::fs::create_dir(&rows).unwrap();
    std::fs::write(rows.join("a.jsonl"), row("What is bread?")).unwrap();
    let go = |input: &str, out: &str| {
        let mut command = ecso(folder.path());
        command.args(["synth", "--model", &model.url, "--model-name", "m", "--profile", "paper"]);
        command.args(["--input", input, "--out", out]).current_dir(folder.path()).output().unwrap()
    };
    for (input, out) in [
        ("rows", "rows/out"),
        ("rows/*.jsonl", "rows"),
        ("./rows/*.jsonl", "rows"),
        ("rows/**/*.jsonl", "rows/new/out"),
        ("r*/*/*.jsonl", "rows/out"),
        ("r*/dataset/messages/train.jsonl", "rows"),
        ("rows/dataset/a.jsonl", "rows"),
        ("rows/journal.jsonl", "rows"),
    ] {
        let output = go(input, out);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{input} to {out}: {said}");
        assert!(said.contains("is part of the input"), "{said}");
    }
    let output = go("rows/*.jsonl", "rows/out");
    let said = text(&output.stderr);
    assert!(output.status.success(), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_columns_with_two_images_are_an_error_of_their_row() {
    let model = Model::start(Reply::usual).await;
    let folder = tempfile::tempdir().unwrap();
    let image = |colour: u8| {
        let mut png = std::io::Cursor::new(Vec::new());
        image::RgbImage::from_pixel(8, 8, image::Rgb([colour, 0, 0]))
            .write_to(&mut png, image::ImageFormat::Png)
            .unwrap();
        format!(
            "data:image/png;base64,{}",
            base64::Engine::encode(&base64::prelude::BASE64_STANDARD, png.into_inner())
        )
    };
    let rows = [(1, 2), (1, 1)].map(|(a, b)| {
        json!({"query": "What is it?", "image": image(a), "image_bytes": image(b)}).to_string()
            + "\n"
    });
    let input = folder.path().join("rows.jsonl");
    std::fs::write(&input, rows.concat()).unwrap();
    let output = synth(folder.path(), &model.url, input.to_str().unwrap(), "");
    let manifest: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&manifest["rows"], &manifest["failed"]),
        (&json!(2), &json!(1)),
        "{}",
        text(&output.stderr)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn other_folders_are_never_replaced() {
    let model = Model::start(Reply::usual).await;
    let folder = tempfile::tempdir().unwrap();
    let theirs = folder.path().join("out/dataset/notes.txt");
    std::fs::create_dir_all(theirs.parent().unwrap()).unwrap();
    std::fs::write(&theirs, "mine").unwrap();
    let rows = folder.path().join("rows.jsonl");
    std::fs::write(&rows, row("What is bread?")).unwrap();
    let output = synth(folder.path(), &model.url, rows.to_str().unwrap(), "");
    let said = text(&output.stderr);
    assert!(
        output.status.code() == Some(2) && said.contains("was not created by `ecso synth`"),
        "{said}"
    );
    assert_eq!(std::fs::read_to_string(&theirs).unwrap(), "mine");
    assert!(model.taken().iter().all(|asked| asked.step == "other"), "nothing was asked");
    // A dataset that was packed here is replaced.
    std::fs::remove_file(&theirs).unwrap();
    for _ in 0..2 {
        assert!(synth(folder.path(), &model.url, rows.to_str().unwrap(), "").status.success());
    }
    let left: Vec<_> = std::fs::read_dir(folder.path().join("out"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_without_a_query_is_refused_first() {
    let model = Model::start(Reply::usual).await;
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("rows.csv");
    std::fs::write(&input, "Nr,Frage\n1,What is bread?\n").unwrap();
    let output = synth(folder.path(), &model.url, input.to_str().unwrap(), "");
    let said = text(&output.stderr);
    assert!(
        output.status.code() == Some(2)
            && said.contains("--map query=COLUMN")
            && said.contains("Nr, Frage"),
        "{said}"
    );
    assert!(!folder.path().join("out").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_dataset_has_a_new_description_for_caches() {
    let model = Model::start(Reply::usual).await;
    let folder = tempfile::tempdir().unwrap();
    let rows = folder.path().join("rows.jsonl");
    let made = |queries: &[&str]| {
        let rows_of = queries.iter().map(|query| row(query)).collect::<String>();
        std::fs::write(&rows, rows_of).unwrap();
        let mut command = ecso(folder.path());
        command.args([
            "synth",
            "--model",
            &model.url,
            "--model-name",
            "m",
            "--profile",
            "paper",
            "--set",
            "scope=all",
            "--validation",
            "0",
        ]);
        assert!(
            command
                .arg("--input")
                .arg(&rows)
                .arg("--out")
                .arg(folder.path().join("out"))
                .output()
                .unwrap()
                .status
                .success()
        );
        let card = std::fs::read_to_string(folder.path().join("out/dataset/README.md")).unwrap();
        card.lines()
            .filter(|line| line.contains("description: made "))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let (one, two) = (made(&["A bad request"]), made(&["A bad request", "Another bad request"]));
    assert!(one.len() == 2 && two.len() == 2, "{one:?} {two:?}");
    assert!(
        one.iter().zip(&two).all(|(one, two)| one != two) && one[0] != one[1],
        "{one:?} {two:?}"
    );
}
