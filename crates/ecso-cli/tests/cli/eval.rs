//! `ecso eval`, from items to advice, with a mock server; also killed and resumed.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use serde_json::{Value, json};
use wiremock::{
    Mock, MockServer, Request, Respond, ResponseTemplate,
    matchers::{body_string_contains, path},
};

use crate::{ecso, text};

/// Answers each item differently and judges every third answer harmful; some of its replies as a
/// judge are unclear.
struct Model;

impl Respond for Model {
    fn respond(&self, request: &Request) -> ResponseTemplate {
        let body: Value = serde_json::from_slice(&request.body).unwrap();
        let sent = body["messages"].to_string();
        let number: u32 = sent
            .chars()
            .filter(char::is_ascii_digit)
            .take(3)
            .collect::<String>()
            .parse()
            .unwrap_or(0);
        let reply = if sent.contains("harmful, unsafe and unethical") {
            if number.is_multiple_of(3) { "Yes".to_owned() } else { "No".to_owned() }
        } else if sent.contains("HARMLESS and ETHICAL") {
            format!("I'm sorry, I can't help with {number}.")
        } else if sent.contains("REPLY:") {
            "Well.".to_owned()
        } else {
            format!("Here is number {number}.")
        };
        ResponseTemplate::new(200).set_delay(Duration::from_millis(5)).set_body_json(json!({
            "choices": [{"message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 3},
        }))
    }
}

async fn server() -> MockServer {
    // Not pooled: a pooled server outlives the test.
    let server = MockServer::builder().start().await;
    Mock::given(path("/v1/chat/completions")).respond_with(Model).mount(&server).await;
    let models = ResponseTemplate::new(200).set_body_json(json!({"data": [{"id": "played"}]}));
    Mock::given(path("/v1/models")).respond_with(models).mount(&server).await;
    server
}

fn items(folder: &Path, count: usize) {
    let label = |n: usize| if n.is_multiple_of(2) { "harmful" } else { "harmless" };
    let rows = (100..100 + count)
        .map(|n| json!({"id": n, "query": format!("item {n}"), "label": label(n)}).to_string());
    fs::write(folder.join("items.jsonl"), rows.collect::<Vec<_>>().join("\n")).unwrap();
}

fn run_args(home: &Path, model: &str, out: &str) -> Vec<String> {
    let path = |name: &str| home.join(name).to_string_lossy().into_owned();
    [
        "eval",
        "run",
        "jsonl",
        "--data",
        &path("items.jsonl"),
        "--out",
        &path(out),
        "--model",
        model,
        "--profile",
        "paper",
        "--set",
        "scope=all",
    ]
    .map(str::to_owned)
    .into()
}

/// The records of a run, without order and times.
fn said(run: &Path) -> Vec<String> {
    let journal = fs::read_to_string(run.join("journal.jsonl")).unwrap();
    let mut lines: Vec<String> = journal
        .lines()
        .skip(1)
        .map(|line| {
            let mut record: Value = serde_json::from_str(line).unwrap();
            for arm in record["arms"].as_array_mut().unwrap() {
                for step in arm["steps"].as_array_mut().unwrap() {
                    step["ms"] = Value::Null;
                }
            }
            record.to_string()
        })
        .collect();
    lines.sort();
    lines
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_run_resumes() {
    let (server, home) = (server().await, tempfile::tempdir().unwrap());
    items(home.path(), 60);
    ecso(home.path()).args(run_args(home.path(), &server.uri(), "whole")).assert().success();
    let whole = said(&home.path().join("whole"));
    assert_eq!(whole.len(), 60);

    let mut lengths = Vec::new();
    for round in 1..=40_u64 {
        let mut child = Command::new(env!("CARGO_BIN_EXE_ecso"))
            .args(run_args(home.path(), &server.uri(), "cut"))
            .args(["--concurrency", "3"])
            .env("HOME", home.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        tokio::time::sleep(Duration::from_millis(20 + round * 37 % 101)).await;
        child.kill().unwrap();
        let done = child.wait().unwrap().success();
        lengths.push(
            fs::read_to_string(home.path().join("cut/journal.jsonl"))
                .map_or(0, |text| text.lines().count()),
        );
        if done {
            break;
        }
    }
    eprintln!("lines after each kill -9: {lengths:?}");
    ecso(home.path()).args(run_args(home.path(), &server.uri(), "cut")).assert().success();
    assert!(lengths.iter().any(|length| (2..61).contains(length)), "no kill met a run under way");
    assert_eq!(said(&home.path().join("cut")), whole);
}

#[tokio::test(flavor = "multi_thread")]
async fn from_items_to_advice() {
    let (server, home) = (server().await, tempfile::tempdir().unwrap());
    items(home.path(), 60);
    let run = home.path().join("run");
    let output =
        ecso(home.path()).args(run_args(home.path(), &server.uri(), "run")).assert().success();
    let told = text(&output.get_output().stderr);
    assert!(told.contains("60 items recorded, 0 failed"), "{told}");
    // A run does not resume with other settings.
    let other = ecso(home.path())
        .args(run_args(home.path(), &server.uri(), "run"))
        .args(["--max-new-tokens", "9"])
        .assert()
        .failure();
    assert!(text(&other.get_output().stderr).contains("was started with another"));

    // It is not judged yet.
    let unjudged = ecso(home.path()).args(["eval", "report"]).arg(&run).assert().code(2);
    assert!(text(&unjudged.get_output().stderr).contains("ecso eval judge"));
    let judged = ecso(home.path())
        .args(["eval", "judge", "--judge", "advbench"])
        .arg(&run)
        .assert()
        .success();
    insta::with_settings!({filters => vec![(r"; /\S+", "; FILE")]}, {
        insta::assert_snapshot!(text(&judged.get_output().stdout), @"120 answers: 50 safe, 50 unsafe, 20 refusals, 0 errors; coverage 100.0%; FILE");
    });
    ecso(home.path()).args(["eval", "report"]).arg(&run).assert().success();
    insta::with_settings!({filters => vec![(r"(\| [\d.]+ \([\d.]+ to [\d.]+\) ){2}\| (10|23)", "| MS | TIMES | $2")]}, {
        insta::assert_snapshot!("report", fs::read_to_string(run.join("report.md")).unwrap());
    });
    let html = fs::read_to_string(run.join("report.html")).unwrap();
    // The page has the items as data, and shows them on request.
    let items = html.split_once("class=\"items\">").unwrap().1.split_once("</script>").unwrap().0;
    let items: Value = serde_json::from_str(items).unwrap();
    assert_eq!(items.as_array().unwrap().len(), 60);
    assert!(
        items[0]["arms"][0]["rulings"][0].is_string()
            && items[0]["arms"][1]["steps"][0]["prompt"].is_string(),
        "{}",
        items[0]
    );
    let figures: Value =
        serde_json::from_str(&fs::read_to_string(run.join("report.json")).unwrap()).unwrap();
    assert_eq!(figures[0]["arms"][1]["all"]["harmless"]["count"], 10);
    assert!(fs::read_to_string(run.join("report.csv")).unwrap().lines().count() > 4);

    let compared =
        ecso(home.path()).args(["eval", "compare"]).args([&run, &run]).assert().success();
    assert!(text(&compared.get_output().stdout).contains("| paper+ | paper+ | 60 |"));
    let advised = ecso(home.path()).args(["eval", "advise"]).arg(&run).assert().success();
    let advice = text(&advised.get_output().stdout);
    assert!(advice.contains("**Only where a refusal costs little**"), "{advice}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unclear_reply_of_the_judge_is_no_verdict() {
    let (server, home) = (server().await, tempfile::tempdir().unwrap());
    let file = home.path().join("responses.jsonl");
    let rows = [
        "{\"id\": 1, \"query\": \"q1\", \"response\": \"Sure.\"}",
        "{\"id\": 2, \"query\": \"q2\", \"response\": \"I'm sorry, no.\"}",
    ];
    fs::write(&file, rows.join("\n")).unwrap();
    let out = home.path().join("verdicts.jsonl");
    let judge = |extra: &[&str]| {
        let mut command = ecso(home.path());
        command
            .args(["eval", "judge", "--model", &server.uri(), "--responses"])
            .arg(&file)
            .arg("--out")
            .arg(&out);
        command.args(extra);
        command
    };
    let output = judge(&[]).assert().success();
    assert!(text(&output.get_output().stdout).contains("1 refusals, 1 errors; coverage 50.0%"));
    let output = judge(&["--min-coverage", "0.9"]).assert().code(1);
    let told = text(&output.get_output().stderr);
    assert!(
        told.contains("neither yes nor no") && told.contains("coverage 0.500 is below 0.9"),
        "{told}"
    );

    // Only judged answers are compared with labels.
    let labels = home.path().join("labels.jsonl");
    fs::write(&labels, "{\"id\": 1, \"label\": \"harmful\"}\n{\"id\": 2, \"label\": \"safe\"}\n")
        .unwrap();
    let output = ecso(home.path())
        .args(["eval", "agreement"])
        .arg(&out)
        .arg("--labels")
        .arg(&labels)
        .arg("--json")
        .assert();
    let figures: Value = serde_json::from_slice(&output.success().get_output().stdout).unwrap();
    assert_eq!((&figures["errors"], &figures["counts"]["neither"]), (&json!(1), &json!(1)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_complete_failure_is_an_error() {
    let home = tempfile::tempdir().unwrap();
    items(home.path(), 3);
    let broken = server().await;
    let refusal = ResponseTemplate::new(400);
    let is_item = body_string_contains("item 10");
    Mock::given(path("/v1/chat/completions"))
        .and(is_item)
        .respond_with(refusal)
        .with_priority(1)
        .mount(&broken)
        .await;
    let run = |server: &str| {
        let mut command = ecso(home.path());
        command.args(run_args(home.path(), server, "run")).args(["--model-name", "m"]).assert()
    };
    let nobody = "http://127.0.0.1:9/v1";
    let output = run(nobody).code(3);
    assert!(text(&output.get_output().stderr).contains("can't be reached"));
    let output = run(&broken.uri()).code(1);
    let told = text(&output.get_output().stderr);
    assert!(told.contains("no item was answered"), "{told}");
    let folder = home.path().join("run");
    let output = ecso(home.path())
        .args(["eval", "judge", "--judge", "xstest"])
        .arg(&folder)
        .assert()
        .code(1);
    assert!(text(&output.get_output().stderr).contains("no answer could be judged"));

    let answers = home.path().join("theirs.csv");
    fs::write(
        &answers,
        "\u{feff}case,model,prompt,generation,verdict\r\n1,a,Hi,Sure.,1 - safe\r\n1,b,Hi,I cannot.,2 - unsafe\r\n",
    )
    .unwrap();
    let out = home.path().join("verdicts.jsonl");
    let judge = |more: &[&str]| {
        let mut command = ecso(home.path());
        command
            .args(["eval", "judge", "--responses"])
            .arg(&answers)
            .arg("--out")
            .arg(&out)
            .args(more);
        command.assert()
    };
    let map = ["--map", "id=case,model", "--map", "query=prompt", "--map", "response=generation"];
    judge(&[&["--judge", "xstest"], map.as_slice()].concat()).success();
    let output = judge(&["--judge", "xstest", "--map", "query=question"]).code(2);
    assert!(text(&output.get_output().stderr).contains("row 1 has no column \"question\""));
    judge(&["--judge", "llm", "--model", &broken.uri(), "--model-name", "m"]).code(2);
    // A truncated last line is reported, and its answer is judged again.
    let whole = fs::read_to_string(&out).unwrap();
    fs::write(&out, &whole[..whole.len() - 9]).unwrap();
    let output = judge(&[&["--judge", "xstest"], map.as_slice()].concat()).success();
    assert!(text(&output.get_output().stderr).contains("a crash cut off"));
    assert_eq!(fs::read_to_string(&out).unwrap(), whole);
    // Other broken lines are errors that name the line.
    fs::write(&out, whole.replacen('{', "[", 1)).unwrap();
    let output = judge(&[&["--judge", "xstest"], map.as_slice()].concat()).code(2);
    assert!(text(&output.get_output().stderr).contains("line 1"));
    fs::write(&out, &whole).unwrap();
    let agreement = |label: &str| {
        let map = ["--map", "id=case,model", "--map", label, "--json"];
        ecso(home.path())
            .args(["eval", "agreement"])
            .arg(&out)
            .arg("--labels")
            .arg(&answers)
            .args(map)
            .assert()
    };
    let figures: Value =
        serde_json::from_slice(&agreement("label=verdict").success().get_output().stdout).unwrap();
    assert_eq!(figures["unlabelled"], 0);
    let output = agreement("label=prompt").code(2);
    assert!(
        text(&output.get_output().stderr).contains("a label is \"Hi\""),
        "{}",
        text(&output.get_output().stderr)
    );
    ecso(home.path()).args(["eval", "report", "nowhere"]).assert().code(2);
}

#[test]
fn answers_from_tables_are_neither_lost_nor_guessed() {
    let home = tempfile::tempdir().unwrap();
    let judge = |name: &str, rows: &str| {
        let (file, out) = (home.path().join(name), home.path().join("verdicts.jsonl"));
        fs::write(&file, rows).unwrap();
        _ = fs::remove_file(&out);
        let mut command = ecso(home.path());
        command
            .args(["eval", "judge", "--judge", "xstest", "--responses"])
            .arg(&file)
            .arg("--out")
            .arg(&out)
            .assert()
    };
    let row = r#"{"query": "Bread?", "response": "Sure."}"#;
    let with = |more: &str| row.replacen('{', &format!("{{{more}, "), 1);
    for (name, rows, says) in [
        (
            "a.jsonl",
            row.replace("\"Sure.\"", "{\"text\": \"Sure.\"}"),
            "row 1: {\"text\":\"Sure.\"} is not a text",
        ),
        ("b.jsonl", row.replace("\"Bread?\"", "null"), "row 1: its query is null"),
        ("c.jsonl", format!("{0}\n{0}", with("\"id\": 7")), "row 2 has the id \"7\" of row 1"),
        ("d.jsonl", format!("{}\n{row}", with("\"id\": \"2\"")), "row 2 has the id \"2\" of row 1"),
        ("e.jsonl", with("\"harmless\": \"maybe\""), "row 1: harmless is \"maybe\""),
        ("f.jsonl", with("\"query\": \"Rolls?\""), "line 1: \"query\" occurs twice"),
        ("g.json", format!("{{\"bread\": [{row}], \"bread\": [{row}]}}"), "\"bread\" occurs twice"),
        (
            "p.csv",
            "id,query,response\n1,Bread?,\"Knead it.\n2,Cake?,Sorry\n3,Soup?,Boil it.\n".into(),
            "p.csv: line 2: a quotation mark is not closed",
        ),
        (
            "q.jsonl",
            row.replace("\"Bread?\"", "[\"shots/loaf.png\", \"What is this?\"]"),
            "row 1: shots/loaf.png is an image, but judges of answers see only text",
        ),
        (
            "h.csv",
            "query,response,response\nBread?,Sure.,No.\n".into(),
            "there are two columns \"response\"",
        ),
    ] {
        let told = text(&judge(name, &rows).code(2).get_output().stderr);
        assert!(told.contains(says), "{says}: {told}");
    }
    for none in
        ["null", "\"NaN\"", "\"nan\"", "\"null\"", "\"None\"", "\"NULL\"", "\"N/A\"", "\"[]\""]
    {
        let none = row.replace("\"Sure.\"", none);
        let told = text(&judge("i.jsonl", &format!("{row}\n{none}")).success().get_output().stdout);
        let says = "2 answers: 0 safe, 1 unsafe, 0 refusals, 0 errors, 1 missing; coverage 50.0%";
        assert!(told.contains(says), "{none}: {told}");
    }
    for (name, delimiter) in [("l.csv", ","), ("m.csv", ";"), ("n.tsv", "\t"), ("o.TSV", "\t")] {
        let rows = ["id|query|response", "1|Bread?|\"Knead it. \n Bake it.\"", "2|Cake?|Sorry."];
        let told = judge(name, &rows.join("\n").replace('|', delimiter)).success();
        let told = text(&told.get_output().stdout);
        assert!(told.contains("2 answers: 0 safe, 1 unsafe, 1 refusals"), "{name}: {told}");
    }
    let told = text(&judge("j.jsonl", &row.replace("Sure.", "")).code(1).get_output().stdout);
    assert!(told.contains("1 answers: 0 safe, 0 unsafe, 0 refusals, 1 errors"), "{told}");
    let switches = [
        "\"y\"",
        "\"True \"",
        "1.0",
        "\"harmless\"",
        "true",
        "\"no\"",
        "0",
        "\"harmful\"",
        "\"\"",
        "null",
    ]
    .map(|harmless| with(&format!("\"harmless\": {harmless}")));
    let told = text(&judge("k.jsonl", &switches.join("\n")).success().get_output().stdout);
    assert!(told.contains("10 answers: 5 safe, 5 unsafe"), "{told}");
}

#[test]
fn unclear_labels_are_refused_and_labels_without_a_verdict_count() {
    let home = tempfile::tempdir().unwrap();
    let path = |name: &str| home.path().join(name);
    let verdict = |id: usize, verdict: &str| {
        json!({"id": id.to_string(), "verdict": verdict, "judge": "j"}).to_string()
    };
    fs::write(
        path("verdicts.jsonl"),
        [verdict(0, "unsafe"), verdict(1, "safe"), verdict(2, "safe"), String::new()].join("\n"),
    )
    .unwrap();
    let agreement = |labels: &[Value]| {
        let rows: Vec<String> = (0..)
            .zip(labels)
            .map(|(id, label): (usize, _)| json!({"id": id, "label": label}).to_string())
            .collect();
        fs::write(path("labels.jsonl"), rows.join("\n")).unwrap();
        let mut command = ecso(home.path());
        command.args(["eval", "agreement", "verdicts.jsonl", "--labels", "labels.jsonl", "--json"]);
        command.current_dir(home.path()).assert()
    };
    for (harmful, harmless) in [
        ("harmful", "not harmful"),
        ("2 - unsafe", "non-harmful"),
        ("not safe", "not unsafe"),
        ("True ", "3_partial_refusal"),
    ] {
        let output =
            agreement(&[json!(harmful), json!(harmless), json!(["0", "0.0", "yes"])]).success();
        let figures: Value = serde_json::from_slice(&output.get_output().stdout).unwrap();
        assert_eq!(
            (&figures["counts"]["both"], &figures["counts"]["neither"]),
            (&json!(1), &json!(2)),
            "{harmful}, {harmless}"
        );
    }
    let told = text(&agreement(&[json!("safe"), json!([])]).code(2).get_output().stderr);
    assert!(told.contains("row 2: a label is []"), "{told}");
    for label in [
        "isn't harmful",
        "harmful: no",
        "harmful or harmless",
        "not a refusal",
        "unsafe=0",
        "",
        "7",
    ] {
        let told = text(&agreement(&[json!("safe"), json!(label)]).code(2).get_output().stderr);
        assert!(told.contains("row 2: a label is "), "{label}: {told}");
    }
    // A tie, and two labels without a verdict.
    let output = agreement(&[
        json!("harmful"),
        json!(["safe", "harmful"]),
        json!("safe"),
        json!("safe"),
        json!("harmful"),
    ])
    .success();
    let figures: Value = serde_json::from_slice(&output.get_output().stdout).unwrap();
    assert_eq!(
        (&figures["ties"], &figures["unjudged"], &figures["errors"]),
        (&json!(1), &json!(2), &json!(0))
    );
    assert_eq!(
        (&figures["counts"]["harmful_unknown"], &figures["counts"]["harmless_unknown"]),
        (&json!(1), &json!(1))
    );
    assert!(figures["accuracy"]["low"].as_f64().unwrap() < 0.16, "{figures}");
}

#[tokio::test(flavor = "multi_thread")]
async fn coverage_counts_missing_answers_and_filtered_ones_need_no_judge() {
    let (server, home) = (server().await, tempfile::tempdir().unwrap());
    items(home.path(), 6);
    ecso(home.path()).args(run_args(home.path(), &server.uri(), "run")).assert().success();
    let judge = |run: &str, more: &[&str]| {
        let mut command = ecso(home.path());
        command
            .args(["eval", "judge", "--judge", "xstest"])
            .arg(home.path().join(run))
            .args(more)
            .assert()
    };
    let journal = home.path().join("run/journal.jsonl");
    let whole = fs::read_to_string(&journal).unwrap();
    fs::write(&journal, whole.split_inclusive('\n').take(1 + 3).collect::<String>()).unwrap();
    let told = text(&judge("run", &["--min-coverage", "0.6"]).code(1).get_output().stdout);
    assert!(told.contains("12 answers") && told.contains("6 missing; coverage 50.0%"), "{told}");

    let filter = MockServer::start().await;
    let refused = json!({"error": {"code": "content_filter", "message": "no"}});
    let refusing = ResponseTemplate::new(400).set_body_json(refused);
    Mock::given(path("/v1/chat/completions")).respond_with(refusing).mount(&filter).await;
    let filtered = run_args(home.path(), &filter.uri(), "filtered");
    ecso(home.path()).args(filtered).args(["--model-name", "m"]).assert().success();
    let told = text(&judge("filtered", &["--min-coverage", "0.6"]).success().get_output().stdout);
    assert!(
        told.contains("0 answers") && told.contains("12 more blocked by a content filter"),
        "{told}"
    );
    let run = home.path().join("filtered");
    ecso(home.path()).args(["eval", "report"]).arg(&run).assert().success();
    let told = text(
        &ecso(home.path())
            .args(["eval", "report", "--out"])
            .arg(&journal)
            .arg(&run)
            .assert()
            .code(2)
            .get_output()
            .stderr,
    );
    assert!(told.contains("journal.jsonl is a file; name a folder"), "{told}");
    // A run can be named only once.
    let told = text(
        &ecso(home.path())
            .args(["eval", "advise"])
            .args([&run, &run])
            .assert()
            .code(2)
            .get_output()
            .stderr,
    );
    assert!(told.contains("name each run once"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn verdicts_belong_to_the_judged_answer() {
    let (server, home) = (server().await, tempfile::tempdir().unwrap());
    let (file, out) = (home.path().join("responses.jsonl"), home.path().join("verdicts.jsonl"));
    let judge = |answers: &[&str], more: &[&str]| {
        let row = |(id, answer): (usize, &&str)| {
            json!({"id": id, "query": "q", "response": answer}).to_string() + "\n"
        };
        fs::write(&file, answers.iter().enumerate().map(row).collect::<String>()).unwrap();
        let mut command = ecso(home.path());
        command
            .args(["eval", "judge", "--responses"])
            .arg(&file)
            .arg("--out")
            .arg(&out)
            .args(more)
            .assert()
    };
    let rule = ["--judge", "xstest"];
    judge(&["Sure.", "Sorry, no.", "Sure."], &rule).success();
    // A new answer with an old id is judged; verdicts on removed answers do not count.
    let output = judge(&["Sorry, no.", "Sorry, no."], &rule).success();
    let told = text(&output.get_output().stdout);
    assert!(
        told.contains("2 answers: 0 safe, 0 unsafe, 2 refusals, 0 errors; coverage 100.0%"),
        "{told}"
    );
    assert_eq!(
        fs::read_to_string(&out).unwrap().lines().count(),
        1 + 3 + 1,
        "nothing is judged twice"
    );
    // Another judge or threshold does not write to the same file.
    let told =
        |output: assert_cmd::assert::Assert| text(&output.code(2).get_output().stderr).clone();
    assert!(told(judge(&["Sure."], &["--judge", "advbench"])).contains("another judge"));
    assert!(
        told(judge(&["Sure."], &["--judge", "xstest", "--threshold", "0.7"]))
            .contains("--judge llm")
    );
    fs::remove_file(&out).unwrap();
    let model = ["--model", &server.uri()];
    judge(&["Sure."], &model).code(1);
    assert!(
        told(judge(&["Sure."], &[model[0], model[1], "--threshold", "0.7"]))
            .contains("another --threshold")
    );
    // Nor does a judge append to a run.
    items(home.path(), 2);
    ecso(home.path()).args(run_args(home.path(), &server.uri(), "run")).assert().success();
    let journal = home.path().join("run/journal.jsonl");
    let before = fs::read_to_string(&journal).unwrap();
    ecso(home.path())
        .args(["eval", "judge", "run", "--judge", "xstest", "--out"])
        .arg(&journal)
        .assert()
        .code(2);
    assert_eq!(fs::read_to_string(&journal).unwrap(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_server_ends_the_run_without_failed_items() {
    let home = tempfile::tempdir().unwrap();
    items(home.path(), 40);
    let first = server().await;
    let address = *first.address();
    let mut child = Command::new(env!("CARGO_BIN_EXE_ecso"))
        .args(run_args(home.path(), &first.uri(), "run"))
        .args(["--concurrency", "1", "--model-name", "played"])
        .envs([("ECSO__SERVER__AWAY_TIMEOUT", "1"), ("ECSO__SERVER__RETRIES", "0")])
        .env("HOME", home.path())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let journal = home.path().join("run/journal.jsonl");
    while fs::read_to_string(&journal).map_or(0, |text| text.lines().count()) < 5 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(first);
    let ended = tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap();
    assert_eq!(ended.code(), Some(3));
    let recorded = said(&home.path().join("run"));
    assert!(
        recorded.len() < 40 && recorded.iter().all(|line| !line.contains("\"error\"")),
        "{recorded:?}"
    );

    let listener = std::net::TcpListener::bind(address).unwrap();
    let second = MockServer::builder().listener(listener).start().await;
    Mock::given(path("/v1/chat/completions")).respond_with(Model).mount(&second).await;
    let again = ecso(home.path())
        .args(run_args(home.path(), &second.uri(), "run"))
        .args(["--model-name", "played"])
        .assert()
        .success();
    assert!(text(&again.get_output().stderr).contains("40 items recorded, 0 failed"));
}

#[test]
fn the_list_names_the_sources() {
    let home = tempfile::tempdir().unwrap();
    let output = ecso(home.path()).args(["eval", "list", "--json"]).assert().success();
    let list: Value = serde_json::from_slice(&output.get_output().stdout).unwrap();
    let names: Vec<&str> =
        list.as_array().unwrap().iter().map(|about| about["name"].as_str().unwrap()).collect();
    for name in [
        "figstep",
        "mm-safetybench",
        "vlsafe",
        "xstest",
        "mossbench",
        "mme",
        "mmbench",
        "mm-vet",
        "twins",
    ] {
        assert!(names.contains(&name), "{name}");
    }
    let output = ecso(home.path()).args(["eval", "run", "mme", "--out", "x"]).assert().code(2);
    assert!(text(&output.get_output().stderr).contains("--data is missing"));
    let empty = home.path().to_str().unwrap();
    let out = format!("{empty}/out");
    for (data, says) in
        [("nowhere.jsonl", "no such file or folder"), (empty, "it contains none of items.jsonl")]
    {
        let output = ecso(home.path())
            .args(["eval", "run", "jsonl", "--data", data, "--out", &out])
            .assert()
            .failure();
        let told = text(&output.get_output().stderr);
        assert!(told.contains(data) && told.contains(says), "{told}");
    }
    assert!(!home.path().join("out").exists(), "a mistake leaves nothing behind");
}

#[test]
fn unknown_fields_of_map_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let answers = home.path().join("theirs.csv");
    fs::write(&answers, "case,query,response,verdict\n1,Bread?,Sure.,safe\n").unwrap();
    let told = |args: &[&str]| {
        let mut command = ecso(home.path());
        let output = command.arg("eval").args(args).current_dir(home.path()).assert().code(2);
        text(&output.get_output().stderr)
    };
    let judge = [
        "judge",
        "--judge",
        "xstest",
        "--responses",
        "theirs.csv",
        "--out",
        "verdicts.jsonl",
        "--map",
    ];
    let said = told(&[judge.as_slice(), &["respones=response"]].concat());
    assert!(
        said.contains("unknown field `respones`, expected one of id, query, response, harmless"),
        "{said}"
    );
    assert!(said.contains("theirs.csv has the columns case, query, response, verdict"), "{said}");
    assert!(!home.path().join("verdicts.jsonl").exists());
    let said = told(&["judge", "run", "--judge", "xstest", "--map", "response=generation"]);
    assert!(said.contains("--map") && said.contains("cannot be used with"), "{said}");
    let labels = ["agreement", "verdicts.jsonl", "--labels", "theirs.csv", "--map"];
    let said = told(&[labels.as_slice(), &["lable=verdict"]].concat());
    assert!(
        said.contains(
            "unknown field `lable`, expected one of id, label, query, response, harmless"
        ),
        "{said}"
    );
}

#[test]
fn agreement_counts_verdicts_of_one_arm_on_current_answers() {
    let home = tempfile::tempdir().unwrap();
    let write = |name: &str, rows: &[Value]| {
        let rows: Vec<String> = rows.iter().map(Value::to_string).collect();
        fs::write(home.path().join(name), rows.join("\n") + "\n").unwrap();
    };
    let eval = |args: &[&str]| {
        let mut command = ecso(home.path());
        command.arg("eval").args(args).current_dir(home.path()).assert()
    };
    let agreement = |more: &[&str]| {
        eval(
            &[&["agreement", "verdicts.jsonl", "--labels", "labels.jsonl", "--json"], more]
                .concat(),
        )
    };
    // The name of the judge is optional.
    let verdict =
        |id: &str, arm: &str, verdict: &str| json!({"id": id, "arm": arm, "verdict": verdict});
    write("verdicts.jsonl", &[verdict("1", "unguarded", "unsafe"), verdict("1", "paper", "safe")]);
    write("labels.jsonl", &[json!({"id": 1, "label": "Harmful"})]);
    let told = text(&agreement(&[]).code(2).get_output().stderr);
    assert!(told.contains("name one arm with --arm: paper, unguarded"), "{told}");
    let told = text(&agreement(&["--arm", "hardened"]).code(2).get_output().stderr);
    assert!(told.contains("--arm: paper, unguarded"), "{told}");
    let figures: Value =
        serde_json::from_slice(&agreement(&["--arm", "paper"]).success().get_output().stdout)
            .unwrap();
    assert_eq!((&figures["counts"]["only_label"], &figures["unlabelled"]), (&json!(1), &json!(0)));

    // An answer that changed after it was judged.
    fs::remove_file(home.path().join("verdicts.jsonl")).unwrap();
    let row = |id: u8, response: &str| json!({"id": id, "query": "Bread?", "response": response, "label": "unsafe"});
    write("labels.jsonl", &[row(1, "Sure."), row(2, "Sure.")]);
    let output = eval(&[
        "judge",
        "--judge",
        "xstest",
        "--responses",
        "labels.jsonl",
        "--out",
        "verdicts.jsonl",
    ]);
    let told = text(&output.success().get_output().stderr);
    assert!(
        told.contains("no row has the field `harmless`, so every request counts as harmful"),
        "{told}"
    );
    write("labels.jsonl", &[row(1, "Sure."), row(2, "Sorry, no.")]);
    let figures: Value =
        serde_json::from_slice(&agreement(&[]).success().get_output().stdout).unwrap();
    assert_eq!((&figures["outdated"], &figures["unjudged"]), (&json!(1), &json!(1)));
    assert_eq!(
        (&figures["counts"]["both"], &figures["counts"]["harmful_unknown"]),
        (&json!(1), &json!(1))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn agreement_with_a_run_is_about_its_current_answers() {
    let (server, home) = (server().await, tempfile::tempdir().unwrap());
    let eval = |args: &[&str]| {
        let mut command = ecso(home.path());
        command.arg("eval").args(args).current_dir(home.path()).assert().success()
    };
    items(home.path(), 2);
    ecso(home.path()).args(run_args(home.path(), &server.uri(), "run")).assert().success();
    eval(&["judge", "run", "--judge", "advbench", "--out", "run/mine.jsonl"]);
    // The name of the file of verdicts does not matter.
    eval(&["report", "run", "--judge", "mine"]);
    let labels: Vec<String> =
        (100..102).map(|id| json!({"id": id, "label": "harmful"}).to_string()).collect();
    fs::write(home.path().join("labels.jsonl"), labels.join("\n")).unwrap();
    let agreement = || {
        let args = [
            "agreement",
            "run/mine.jsonl",
            "--labels",
            "labels.jsonl",
            "--arm",
            "unguarded",
            "--json",
        ];
        let figures: Value = serde_json::from_slice(&eval(&args).get_output().stdout).unwrap();
        (figures["outdated"].clone(), figures["unjudged"].clone())
    };
    assert_eq!(agreement(), (json!(0), json!(0)));
    let rows = fs::read_to_string(home.path().join("items.jsonl")).unwrap();
    fs::write(home.path().join("items.jsonl"), rows.replace("item 100", "item 900")).unwrap();
    ecso(home.path()).args(run_args(home.path(), &server.uri(), "run")).assert().success();
    assert_eq!(agreement(), (json!(1), json!(1)));
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_standard_output_is_an_error() {
    let home = tempfile::tempdir().unwrap();
    let mut list = Command::new(env!("CARGO_BIN_EXE_ecso"));
    list.args(["eval", "list"])
        .env("HOME", home.path())
        .stdout(fs::File::create("/dev/full").unwrap());
    let output = list.output().unwrap();
    let told = text(&output.stderr);
    assert!(output.status.code() == Some(1) && told.contains("ecso: standard output: "), "{told}");
    assert!(!told.contains("panicked"), "{told}");
}

#[test]
fn agreement_warns_about_repeated_verdicts_and_several_judges() {
    let home = tempfile::tempdir().unwrap();
    let said = |verdict: &str, judge: &str| {
        json!({"id": "1", "verdict": verdict, "judge": judge}).to_string()
    };
    fs::write(
        home.path().join("verdicts.jsonl"),
        [said("safe", "ann"), said("unsafe", "bob")].join("\n"),
    )
    .unwrap();
    fs::write(home.path().join("labels.jsonl"), json!({"id": 1, "label": "harmful"}).to_string())
        .unwrap();
    let mut command = ecso(home.path());
    command
        .args(["eval", "agreement", "verdicts.jsonl", "--labels", "labels.jsonl"])
        .current_dir(home.path());
    let output = command.assert().success();
    let told = text(&output.get_output().stderr);
    assert!(told.contains("1 verdicts replace an earlier one on the same answer"), "{told}");
    assert!(told.contains("several judges: ann, bob"), "{told}");
    assert!(text(&output.get_output().stdout).contains("1 of 1"), "the last line counts");
}
