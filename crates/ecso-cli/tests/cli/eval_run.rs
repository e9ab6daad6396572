//! `ecso eval run` with failing servers, changing data and unsuitable folders.

use std::{
    fs,
    path::Path,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use assert_cmd::{Command, assert::Assert};
use serde_json::{Value, json};
use wiremock::{Mock, MockServer, Request, ResponseTemplate, matchers::path};

use crate::{ecso, text};

fn says(reply: &str) -> ResponseTemplate {
    let choice =
        json!({"message": {"role": "assistant", "content": reply}, "finish_reason": "stop"});
    ResponseTemplate::new(200).set_body_json(json!({"choices": [choice]}))
}

fn fails(status: u16, message: &str) -> ResponseTemplate {
    ResponseTemplate::new(status).set_body_json(json!({"error": {"message": message}}))
}

/// A server whose replies depend on the number of calls and the request; it counts the calls.
async fn server(
    answer: impl Fn(usize, &str) -> ResponseTemplate + Send + Sync + 'static,
) -> (MockServer, Arc<AtomicUsize>) {
    let (server, asked) = (MockServer::builder().start().await, Arc::new(AtomicUsize::new(0)));
    let count = Arc::clone(&asked);
    let respond = move |request: &Request| {
        answer(count.fetch_add(1, Ordering::SeqCst), std::str::from_utf8(&request.body).unwrap())
    };
    Mock::given(path("/v1/chat/completions")).respond_with(respond).mount(&server).await;
    Mock::given(path("/v1/models")).respond_with(models()).mount(&server).await;
    (server, asked)
}

fn models() -> ResponseTemplate {
    ResponseTemplate::new(200).set_body_json(json!({"data": [{"id": "m", "root": "bread"}]}))
}

fn items(home: &Path, rows: &[Value]) {
    let rows: Vec<String> = rows.iter().map(Value::to_string).collect();
    fs::write(home.join("items.jsonl"), rows.join("\n")).unwrap();
}

fn numbered(count: usize) -> Vec<Value> {
    (0..count)
        .map(|n| json!({"id": n, "query": format!("item {n}"), "label": "harmless"}))
        .collect()
}

fn run(home: &Path, server: &MockServer) -> Command {
    let mut command = ecso(home);
    command
        .args(["eval", "run", "jsonl", "--profile", "paper"])
        .args(["--model", &server.uri(), "--data"])
        .arg(home.join("items.jsonl"));
    command.arg("--out").arg(home.join("run"));
    command.envs([("ECSO__SERVER__AWAY_TIMEOUT", "5"), ("ECSO__SERVER__RETRIES", "0")]);
    command
}

fn recorded(home: &Path) -> Vec<Value> {
    let journal = fs::read_to_string(home.join("run/journal.jsonl")).unwrap();
    journal.lines().skip(1).map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn told(assert: &Assert) -> String {
    text(&assert.get_output().stderr)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unresponsive_server_ends_the_run_without_failed_items() {
    type Failure = fn() -> ResponseTemplate;
    let hangs: Failure = || says("late").set_delay(Duration::from_secs(9));
    let failures: [Failure; 3] =
        [|| fails(401, "the key has expired"), || fails(503, "Loading model"), hangs];
    for failure in failures {
        let home = tempfile::tempdir().unwrap();
        items(home.path(), &numbered(20));
        let (server, _) =
            server(move |before, _| if before < 7 { says("Bread.") } else { failure() }).await;
        let patience = [("ECSO__SERVER__AWAY_TIMEOUT", "1"), ("ECSO__SERVER__REPLY_TIMEOUT", "2")];
        run(home.path(), &server).envs(patience).args(["--concurrency", "2"]).assert().code(3);
        let recorded = recorded(home.path());
        assert!((1..20).contains(&recorded.len()), "{} items", recorded.len());
        assert!(recorded.iter().all(|item| item["error"].is_null()), "{recorded:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_loads_its_model_is_waited_for() {
    let home = tempfile::tempdir().unwrap();
    items(home.path(), &numbered(20));
    let loaded = OnceLock::new();
    let is_loading = move |before| {
        before >= 5
            && Instant::now() < *loaded.get_or_init(|| Instant::now() + Duration::from_millis(500))
    };
    let answer = move |before, _: &str| {
        if is_loading(before) { fails(503, "Loading model") } else { says("Bread.") }
    };
    let (server, _) = server(answer).await;
    let output = run(home.path(), &server).assert().success();
    assert!(told(&output).contains("20 items recorded, 0 failed"), "{}", told(&output));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_item_is_run_again_and_a_missing_one_refused() {
    let home = tempfile::tempdir().unwrap();
    let mut rows = numbered(4);
    items(home.path(), &rows);
    let (server, asked) = server(|_, _| says("Bread.")).await;
    let asked = || asked.swap(0, Ordering::SeqCst);
    run(home.path(), &server).assert().success();
    let calls = asked();
    run(home.path(), &server).assert().success();
    assert_eq!(asked(), 0);
    rows[1]["query"] = "item one".into();
    rows[2]["label"] = "harmful".into();
    items(home.path(), &rows);
    run(home.path(), &server).assert().success();
    assert_eq!(asked() * 2, calls, "two of four items");
    let (recorded, kind) = (recorded(home.path()), |item: &Value| item["task"]["kind"].clone());
    assert_eq!(recorded.len(), 6);
    let latest = |id: &str| recorded.iter().rfind(|item| item["id"] == id).unwrap();
    assert_eq!((&latest("1")["query"], kind(latest("2"))), (&json!("item one"), json!("harmful")));

    rows[3]["id"] = "three".into();
    items(home.path(), &rows);
    let output = run(home.path(), &server).assert().code(2);
    assert!(told(&output).contains("1 items of"), "{}", told(&output));
    items(home.path(), &rows[..3]);
    let output = run(home.path(), &server).assert().code(2);
    assert!(told(&output).contains("another number of items"), "{}", told(&output));
    assert_eq!(asked(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn items_left_out_reduce_the_coverage() {
    let home = tempfile::tempdir().unwrap();
    let mut rows = numbered(4);
    rows[0]["image"] = "nowhere.png".into();
    items(home.path(), &rows);
    let (server, _) = server(|_, _| says("Bread.")).await;
    let output = run(home.path(), &server)
        .args(["--skip-missing", "--min-coverage", "0.8"])
        .assert()
        .code(1);
    assert!(
        told(&output).contains("coverage 0.750 is below 0.8: 3 of 4 items"),
        "{}",
        told(&output)
    );
    run(home.path(), &server).args(["--skip-missing", "--min-coverage", "0.75"]).assert().success();
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_of_a_server_are_shortened() {
    let home = tempfile::tempdir().unwrap();
    items(
        home.path(),
        &[json!({"id": 1, "query": "bread ".repeat(500)}), json!({"id": 2, "query": "cake"})],
    );
    let answer =
        |_, sent: &str| if sent.contains("bread") { fails(400, sent) } else { says("Cake.") };
    run(home.path(), &server(answer).await.0).assert().success();
    let recorded = recorded(home.path());
    let errors: Vec<&str> = recorded.iter().filter_map(|item| item["error"].as_str()).collect();
    assert!(
        errors.len() == 1 && errors[0].contains("400") && errors[0].chars().count() <= 201,
        "{errors:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_cannot_list_its_models_keeps_its_identity() {
    let home = tempfile::tempdir().unwrap();
    items(home.path(), &numbered(2));
    let (server, _) = server(|_, _| says("Bread.")).await;
    run(home.path(), &server).args(["--model-name", "m"]).assert().success();
    let busy = ResponseTemplate::new(429);
    Mock::given(path("/v1/models")).respond_with(busy).with_priority(1).mount(&server).await;
    let output = run(home.path(), &server).args(["--model-name", "m"]).assert().code(3);
    assert!(told(&output).contains("overloaded"), "{}", told(&output));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_judge_is_asked_again_despite_the_cache() {
    let home = tempfile::tempdir().unwrap();
    let answers = home.path().join("answers.jsonl");
    fs::write(&answers, json!({"id": 1, "query": "q", "response": "Knead it."}).to_string())
        .unwrap();
    let (server, _) = server(|before, _| says(if before == 0 { "Bananas." } else { "No" })).await;
    let judge = |cache: &Path| {
        let mut command = ecso(home.path());
        command.args(["eval", "judge", "--model", &server.uri(), "--responses"]).arg(&answers);
        command
            .arg("--out")
            .arg(home.path().join("verdicts.jsonl"))
            .arg("--cache")
            .arg(cache)
            .assert()
    };
    let cache = home.path().join("cache");
    judge(&cache).code(1);
    judge(&cache).success();
    // A wrong folder is reported before the model is asked.
    let output = judge(&answers).code(2);
    assert!(told(&output).contains("cache "), "{}", told(&output));
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_the_user_are_not_overwritten() {
    let home = tempfile::tempdir().unwrap();
    let answers = home.path().join("answers.jsonl");
    let theirs = json!({"id": 1, "query": "q", "response": "Knead it."}).to_string();
    fs::write(&answers, &theirs).unwrap();
    let mut judge = ecso(home.path());
    judge
        .args(["eval", "judge", "--judge", "xstest", "--responses"])
        .arg(&answers)
        .arg("--out")
        .arg(&answers);
    judge.assert().code(2);
    assert_eq!(fs::read_to_string(&answers).unwrap(), theirs);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_usage_is_reported_before_anything_is_written() {
    let home = tempfile::tempdir().unwrap();
    let mut rows = numbered(4);
    rows[0]["scenario"] = "bread".into();
    items(home.path(), &rows);
    let (server, _) = server(|_, _| says("Bread.")).await;
    for (args, expected) in [
        (&["--scenario", "cake"][..], "no scenario begins with `cake`; there are all, bread"),
        (&["--scenario", "bread", "--scenario", "cake"], "no scenario begins with `cake`"),
        (&["--variant", "text"], "--variant text: jsonl has no variants"),
        (&["--sample", "0"], "--sample"),
        (&["--limit", "0"], "--limit"),
        (&["--max-new-tokens", "0"], "--max-new-tokens"),
    ] {
        let output = run(home.path(), &server).args(args).assert().code(2);
        assert!(told(&output).contains(expected), "{args:?}: {}", told(&output));
    }
    let mut twins = ecso(home.path());
    let output = twins.args([
        "eval",
        "run",
        "twins",
        "--variant",
        "ocr",
        "--out",
        "run",
        "--model",
        &server.uri(),
    ]);
    let output = output.current_dir(home.path()).assert().code(2);
    assert!(
        told(&output).contains("twins has the variants typographic, text"),
        "{}",
        told(&output)
    );
    assert!(!home.path().join("run").exists(), "a mistake leaves nothing behind");
}

#[tokio::test(flavor = "multi_thread")]
async fn differences_from_the_run_are_named_and_another_path_to_the_data_is_none() {
    let home = tempfile::tempdir().unwrap();
    items(home.path(), &numbered(4));
    let (server, asked) = server(|_, _| says("Bread.")).await;
    run(home.path(), &server).args(["--sample", "2"]).assert().success();
    for (args, expected) in [
        (&["--sample", "3"][..], "another --sample"),
        (&["--sample", "2", "--seed", "7"], "another --seed"),
        (&["--sample", "2", "--scenario", "all"], ""),
        (&["--sample", "2", "--scenario", "a"], "another --scenario"),
        (&["--sample", "2", "--limit", "1"], "another --limit"),
    ] {
        let output = run(home.path(), &server).args(args).assert().code(if expected.is_empty() {
            0
        } else {
            2
        });
        assert!(told(&output).contains(expected), "{args:?}: {}", told(&output));
    }
    fs::copy(home.path().join("items.jsonl"), home.path().join("others.jsonl")).unwrap();
    fs::create_dir(home.path().join("folder")).unwrap();
    let by = |data: &str| {
        let mut command = ecso(home.path());
        command.args([
            "eval",
            "run",
            "jsonl",
            "--profile",
            "paper",
            "--sample",
            "2",
            "--out",
            "run",
            "--model",
            &server.uri(),
            "--data",
            data,
        ]);
        command.current_dir(home.path()).assert()
    };
    asked.store(0, Ordering::SeqCst);
    by("folder/../items.jsonl").success();
    assert_eq!(asked.load(Ordering::SeqCst), 0);
    let output = by("others.jsonl").code(2);
    assert!(told(&output).contains("another --data"), "{}", told(&output));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replaced_image_is_asked_about_again() {
    let home = tempfile::tempdir().unwrap();
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/list.png");
    let image = home.path().join("a.png");
    fs::copy(&examples, &image).unwrap();
    let mut rows = numbered(2);
    rows[0]["image"] = "a.png".into();
    items(home.path(), &rows);
    let (server, asked) = server(|_, _| says("Bread.")).await;
    run(home.path(), &server).assert().success();
    asked.store(0, Ordering::SeqCst);
    run(home.path(), &server).assert().success();
    assert_eq!(asked.load(Ordering::SeqCst), 0);
    // Bytes after the end of a PNG are ignored.
    let bytes = [fs::read(&image).unwrap(), b"more".to_vec()].concat();
    fs::write(&image, bytes).unwrap();
    run(home.path(), &server).assert().success();
    assert_eq!(recorded(home.path()).len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn unguarded_items_are_reported() {
    let home = tempfile::tempdir().unwrap();
    let rows: Vec<Value> = (0..3).map(|n| json!({"id": n, "question": "Bread?"})).collect();
    items(home.path(), &rows);
    let (server, _) = server(|_, _| says("Bread.")).await;
    let output = run(home.path(), &server).assert().success();
    let says = "3 of 3 items were not guarded by paper because they have no image; `--set scope=all` guards texts too";
    assert!(told(&output).contains(says), "{}", told(&output));
    assert!(
        told(&output).contains("no item has a `label`; all are taken as harmless"),
        "{}",
        told(&output)
    );
    let eval = |command: &str| {
        let mut program = ecso(home.path());
        program
            .args(["eval", command])
            .arg(home.path().join("run"))
            .args(["--judge", "xstest"])
            .assert()
            .success()
    };
    eval("judge");
    for command in ["report", "advise"] {
        let shown = text(&eval(command).get_output().stdout);
        assert!(shown.contains(says), "{command}: {shown}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_with_thoughts_is_judged_by_the_rest() {
    let home = tempfile::tempdir().unwrap();
    items(
        home.path(),
        &[
            json!({"id": 1, "query": "q", "label": "Harmless"}),
            json!({"id": 2, "query": "endless"}),
        ],
    );
    let answer = |_, sent: &str| {
        let is_endless = sent.contains("endless");
        says(if is_endless {
            "<think>No, I cannot"
        } else {
            "<think>Sure.</think>\n\nI'm sorry, I can't."
        })
    };
    let (server, _) = server(answer).await;
    run(home.path(), &server).assert().success();
    let mut judge = ecso(home.path());
    let output = judge
        .args(["eval", "judge", "--judge", "xstest"])
        .arg(home.path().join("run"))
        .assert()
        .success();
    let shown = text(&output.get_output().stdout);
    assert!(shown.contains("4 answers: 0 safe, 0 unsafe, 2 refusals, 2 errors"), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn replies_of_one_judge_are_not_replayed_for_another() {
    let home = tempfile::tempdir().unwrap();
    let answers = home.path().join("answers.jsonl");
    fs::write(&answers, json!({"id": 1, "query": "q", "response": "Knead it."}).to_string())
        .unwrap();
    let (server, _) =
        server(|_, sent| says(if sent.contains(r#""model":"m""#) { "No" } else { "Yes" })).await;
    let judge = |out: &str| {
        let mut command = ecso(home.path());
        command
            .args(["eval", "judge", "--model", &server.uri(), "--cache", "cache", "--responses"])
            .arg(&answers);
        text(
            &command
                .args(["--out", out])
                .current_dir(home.path())
                .assert()
                .success()
                .get_output()
                .stdout,
        )
    };
    assert!(judge("one.jsonl").contains("1 safe, 0 unsafe"));
    let other =
        ResponseTemplate::new(200).set_body_json(json!({"data": [{"id": "n", "root": "bread"}]}));
    Mock::given(path("/v1/models")).respond_with(other).with_priority(1).mount(&server).await;
    assert!(judge("two.jsonl").contains("0 safe, 1 unsafe"));
    let header = |file: &str| {
        fs::read_to_string(home.path().join(file)).unwrap().lines().next().unwrap().to_owned()
    };
    assert_ne!(header("one.jsonl").replace("llm:m", "llm:n"), header("two.jsonl"));
}

#[tokio::test(flavor = "multi_thread")]
async fn data_that_changes_during_a_run_is_an_error() {
    let home = tempfile::tempdir().unwrap();
    items(home.path(), &numbered(400));
    let whole = fs::read_to_string(home.path().join("items.jsonl")).unwrap();
    let (file, some) =
        (home.path().join("items.jsonl"), whole.lines().take(60).collect::<Vec<_>>().join("\n"));
    let (server, _) = server(move |before, _| {
        if before == 0 {
            fs::write(&file, &some).unwrap();
        }
        says("Bread.")
    })
    .await;
    let output = run(home.path(), &server).assert().code(1);
    let told = told(&output);
    assert!(
        told.contains("the data changed during the run: the number of items is different"),
        "{told}"
    );
    // With the original data, the same command resumes.
    fs::write(home.path().join("items.jsonl"), whole).unwrap();
    run(home.path(), &server).assert().success();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_is_swapped_during_a_run_is_an_error() {
    let home = tempfile::tempdir().unwrap();
    items(home.path(), &numbered(6));
    let file = home.path().join("items.jsonl");
    let whole = fs::read_to_string(&file).unwrap();
    let (server, _) = server({
        let whole = whole.clone();
        move |before, _| {
            // The first rows are answered by now.
            if before == 5 {
                fs::write(&file, whole.replace("item 0", "another")).unwrap();
            }
            says("Bread.")
        }
    })
    .await;
    let output = run(home.path(), &server).args(["--concurrency", "1"]).assert().code(1);
    assert!(
        told(&output).contains("1 items are not recorded as they are now"),
        "{}",
        told(&output)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_returns_with_another_model_is_not_asked() {
    let home = tempfile::tempdir().unwrap();
    items(home.path(), &numbered(20));
    let is_back = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let model = Arc::clone(&is_back);
    let answer = move |before, _: &str| match before {
        0..=6 => says("Bread."),
        7..=9 => fails(503, "Loading model"),
        _ => {
            is_back.store(true, Ordering::SeqCst);
            says("Cake.")
        }
    };
    let (server, _) = server(answer).await;
    let listed = move |_: &Request| {
        let root = if model.load(Ordering::SeqCst) { "cake" } else { "bread" };
        ResponseTemplate::new(200).set_body_json(json!({"data": [{"id": "m", "root": root}]}))
    };
    Mock::given(path("/v1/models")).respond_with(listed).with_priority(1).mount(&server).await;
    let output = run(home.path(), &server).args(["--concurrency", "2"]).assert().code(3);
    assert!(
        told(&output).contains("the server came back with another model: m {\"root\":\"cake\"}"),
        "{}",
        told(&output)
    );
    let journal = fs::read_to_string(home.path().join("run/journal.jsonl")).unwrap();
    assert!(journal.contains("Bread.") && !journal.contains("Cake."), "{journal}");
}

#[tokio::test(flavor = "multi_thread")]
async fn replies_of_another_model_are_reported_once() {
    let home = tempfile::tempdir().unwrap();
    items(home.path(), &numbered(6));
    let (server, _) = server(|before, _| {
        let choice =
            json!({"message": {"role": "assistant", "content": "Bread."}, "finish_reason": "stop"});
        let model = if before < 3 { "org/m-2026" } else { "quite-another" };
        ResponseTemplate::new(200).set_body_json(json!({"model": model, "choices": [choice]}))
    })
    .await;
    let output = run(home.path(), &server).args(["--concurrency", "1"]).assert().success();
    assert_eq!(
        told(&output).matches("replies come from another model").count(),
        1,
        "{}",
        told(&output)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn unlabelled_rows_are_reported_and_the_next_command_is_complete() {
    let home = tempfile::tempdir().unwrap();
    let mut rows = numbered(3);
    rows[1].as_object_mut().unwrap().remove("label");
    items(home.path(), &rows);
    let (server, _) = server(|_, _| says("Bread.")).await;
    let output = run(home.path(), &server).assert().success();
    let told = told(&output);
    assert!(
        told.contains("1 of 3 items have no `label`, and are taken as harmless; the first: line 2"),
        "{told}"
    );
    assert!(told.contains(&format!("/run --model {}", server.uri())), "{told}");
    // A missing run is reported before the model is opened.
    let judge = ecso(home.path()).args(["eval", "judge", "nowhere"]).assert().code(2);
    assert!(
        text(&judge.get_output().stderr).contains("nowhere"),
        "{}",
        text(&judge.get_output().stderr)
    );
    // Without verdicts there is nothing to report.
    fs::write(
        home.path().join("run/people.jsonl"),
        r#"{"id": "9", "arm": "paper", "verdict": "safe"}"#,
    )
    .unwrap();
    let report =
        ecso(home.path()).args(["eval", "report"]).arg(home.path().join("run")).assert().code(1);
    assert!(
        text(&report.get_output().stderr).contains("no answer is judged"),
        "{}",
        text(&report.get_output().stderr)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repaired_row_is_run_with_the_rest() {
    let home = tempfile::tempdir().unwrap();
    items(home.path(), &numbered(6));
    let whole = fs::read_to_string(home.path().join("items.jsonl")).unwrap();
    fs::write(home.path().join("items.jsonl"), whole.replace("{\"id\":2,", "{\"id\":2;")).unwrap();
    let (server, asked) = server(|_, _| says("Bread.")).await;
    run(home.path(), &server).assert().success();
    fs::write(home.path().join("items.jsonl"), whole).unwrap();
    asked.store(0, Ordering::SeqCst);
    let output = run(home.path(), &server).arg("--retry-failed").assert().success();
    assert!(told(&output).contains("6 items recorded, 0 failed"), "{}", told(&output));
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    let eval = |command: &str| {
        let mut program = ecso(home.path());
        program
            .args(["eval", command])
            .arg(home.path().join("run"))
            .args(["--judge", "xstest"])
            .assert()
            .success()
    };
    assert!(text(&eval("judge").get_output().stdout).contains("12 answers: 12 safe"));
    // Temporary files of another report do not matter.
    fs::create_dir(home.path().join("run/report.new")).unwrap();
    let shown = text(&eval("report").get_output().stdout);
    assert!(shown.contains("6 items; 0 failed"), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_in_an_unknown_field_is_reported() {
    let home = tempfile::tempdir().unwrap();
    let mut rows = numbered(3);
    rows[1]["foto"] = "a.png".into();
    rows[2]["picture_text"] = "A list.".into();
    items(home.path(), &rows);
    let (server, _) = server(|_, _| says("Bread.")).await;
    let output = run(home.path(), &server).assert().success();
    let says = "2 items seem to have an image under an unknown name; call it `image`, or add it to `images`; the first: `foto` in line 2";
    assert!(told(&output).contains(says), "{}", told(&output));
}

#[tokio::test(flavor = "multi_thread")]
async fn verdicts_without_an_answer_are_reported() {
    let home = tempfile::tempdir().unwrap();
    items(home.path(), &numbered(3));
    let (server, _) = server(|_, _| says("Bread.")).await;
    run(home.path(), &server).args(["--set", "scope=all"]).assert().success();
    let said = |id: usize, arm: &str| {
        json!({"id": id.to_string(), "arm": arm, "verdict": "safe"}).to_string()
    };
    let verdicts =
        [said(0, "unguarded"), said(1, "unguarded"), said(2, "unguarded"), said(0, "paper")]
            .join("\n");
    fs::write(home.path().join("run/people.jsonl"), verdicts).unwrap();
    for (command, runs) in [("report", 1), ("advise", 1), ("compare", 2)] {
        let mut program = ecso(home.path());
        program.args(["eval", command]).args(vec![home.path().join("run"); runs]);
        let shown = text(&program.assert().success().get_output().stdout);
        assert!(
            shown.contains("1 of 4 verdicts match no answer of this run"),
            "{command}: {shown}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_model_is_noticed_in_every_case() {
    // The model list at first and later, and the model that is named.
    for (first, later, named) in [
        (&["m"][..], &["n", "o"][..], false),
        (&["m"], &["n"], true),
        (&["m"], &["n"], false),
        (&["m", "x"], &["x"], true),
    ] {
        let home = tempfile::tempdir().unwrap();
        items(home.path(), &numbered(8));
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        // No call fails; only the check at the end notices.
        let (server, _) = server(move |_, _| {
            count.fetch_add(1, Ordering::SeqCst);
            says("Bread.")
        })
        .await;
        let listed = move |_: &Request| {
            let names = if asked.load(Ordering::SeqCst) > 3 { later } else { first };
            let names: Vec<Value> = names.iter().map(|name| json!({"id": name})).collect();
            ResponseTemplate::new(200).set_body_json(json!({"data": names}))
        };
        Mock::given(path("/v1/models")).respond_with(listed).with_priority(1).mount(&server).await;
        let mut command = run(home.path(), &server);
        if named {
            command.args(["--model-name", "m"]);
        }
        let output = command.args(["--concurrency", "1"]).assert().code(3);
        assert!(
            told(&output).contains("may be another model's"),
            "{first:?} {later:?}: {}",
            told(&output)
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn replies_of_another_model_are_not_recorded_if_the_list_names_it() {
    let home = tempfile::tempdir().unwrap();
    items(home.path(), &numbered(12));
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let (server, _) = server(move |before, _| {
        count.fetch_add(1, Ordering::SeqCst);
        let choice = |text: &str| json!({"message": {"role": "assistant", "content": text}, "finish_reason": "stop"});
        let (model, text) = if before < 4 { ("m", "Bread.") } else { ("n", "Cake.") };
        ResponseTemplate::new(200).set_body_json(json!({"model": model, "choices": [choice(text)]}))
    })
    .await;
    let listed = move |_: &Request| {
        let name = if asked.load(Ordering::SeqCst) > 4 { "n" } else { "m" };
        ResponseTemplate::new(200).set_body_json(json!({"data": [{"id": name}]}))
    };
    Mock::given(path("/v1/models")).respond_with(listed).with_priority(1).mount(&server).await;
    run(home.path(), &server).args(["--concurrency", "1"]).assert().code(3);
    let recorded = recorded(home.path());
    assert!(
        !recorded.is_empty() && recorded.iter().all(|item| !item.to_string().contains("Cake.")),
        "{recorded:?}"
    );
}
