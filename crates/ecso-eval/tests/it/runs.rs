//! Reproduces published labels, reads benchmarks, and resumes interrupted runs.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use ecso::{Limits, ModelError, Profile, Reply, testing::Scripted};
use ecso_batch::{
    Bounds, Cached,
    journal::{self, Journal, JournalError},
};
use ecso_eval::{
    benchmarks::{Items, named},
    item::Task,
    judge::{AdvBench, Case as ArmAnswer, Judge, Judgement, Ruling, XsTest, published_judge},
    prepare,
    record::{RunHeader, Selection},
    run::{self, Options},
    summary::summarise,
    typographic::Typesetter,
};
use serde_json::Value;

use crate::{data, header, records};

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn string_rules_reproduce_the_published_labels() {
    let Some(harmbench) = data("harmbench") else { return };
    for (file, label, expected) in [
        ("text_behaviors_val_set.json", "advbench", 602),
        ("multimodal_behaviors_val_set.json", "advbench_label", 220),
    ] {
        let table = json(&harmbench.join(file));
        let rows: Vec<&Value> =
            table.as_object().unwrap().values().flat_map(|rows| rows.as_array().unwrap()).collect();
        let right = rows.iter().filter(|row| {
            let published =
                row[label].as_str().map_or_else(|| row[label].to_string(), str::to_owned);
            AdvBench::is_refusal(row["generation"].as_str().unwrap()) == (published == "0")
        });
        assert_eq!((right.count(), rows.len()), (expected, expected), "{file}");
    }
    let completions = std::fs::read_to_string(
        data("xstest").unwrap().join("xstest_v2_completions_labelled.jsonl"),
    )
    .unwrap();
    let rows: Vec<Value> =
        completions.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let right = rows.iter().filter(|row| {
        XsTest::is_refusal(row["completion"].as_str().unwrap())
            == (row["strmatch_label"] == "2_full_refusal")
    });
    assert_eq!((right.count(), rows.len()), (2250, 2250));
}

#[tokio::test]
async fn published_prompts_are_sent_unchanged_and_read_as_published() {
    let Some(ecso) = data("ecso") else { return };
    let file = ecso.join("vlsafe_judge.jsonl");
    let prompts: Vec<Value> = std::fs::read_to_string(&file)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let advice = |field: &str| Task::Advice { field: field.into() };
    for (scenario, task, name, safe, not_safe) in [
        ("01-Illegal_Activitiy", Task::Harmful, "query_safety", "Safe", "It is safe."),
        ("08-Political_Lobbying", advice("political"), "query_political", " safe\n", "unsafe"),
        ("10-Legal_Opinion", advice("legal"), "query_safety_legal", "SAFE", "-"),
        ("11-Financial_Advice", advice("financial"), "query_safety_financial", "safe", "safe."),
        ("12-Health_Consultation", advice("health"), "query_safety_health", "safe", "yes"),
        ("13-Gov_Decision", advice("gov"), "query_safety_gov", "safe", "no"),
        ("VLSafe", Task::Harmful, "llm_binary_strict", "Fine. Rating: [[1]]", "Rating: [[0]]"),
        ("VLSafe", Task::Harmful, "llm_binary_strict", "[1]", "I can't rate this."),
    ] {
        let prompt = prompts.iter().find(|prompt| prompt["name"] == name).unwrap();
        let sent = prompt["prompt_template"].as_str().unwrap();
        let sent = sent.replace("{question}", "Q {answer}").replace("{answer}", "A {question}");
        // The placeholders are filled in one pass: braces in the question stay as they are.
        let sent = sent.replace("Q A {question}", "Q {answer}");
        for (reply, ruling) in [(safe, Ruling::Safe), (not_safe, Ruling::Unsafe)] {
            let model = Arc::new(Scripted::texts([reply]));
            let judge = published_judge(&file, model.clone()).unwrap();
            let case = ArmAnswer {
                id: "1".into(),
                scenario: scenario.into(),
                request: "Q {answer}".into(),
                response: "A {question}".into(),
                task: task.clone(),
            };
            assert_eq!(judge.judge(&case, "").await.verdict, ruling, "{name}: {reply:?}");
            let (chat, sampling) = model.requests().remove(0);
            assert_eq!(chat.turns.last().unwrap().joined_text(), sent, "{name}");
            assert_eq!(chat.turns[0].joined_text(), prompt["system_prompt"].as_str().unwrap());
            assert_eq!(sampling.temperature, Some(0.0));
        }
    }
}

#[test]
fn benchmarks_are_read_in_their_official_layout() {
    let Some(figstep) = data("figstep") else { return };
    let items: Vec<_> = named("figstep").unwrap().items(&figstep, None).unwrap().iter.collect();
    assert_eq!(items.len(), 50);
    assert_eq!(items.iter().filter(|item| item.task == Task::Harmful).count(), 35);
    assert_eq!(items[0].query, std::fs::read_to_string(figstep.join("query.txt")).unwrap().trim());
    let xstest = named("xstest").unwrap().items(&data("xstest").unwrap(), None).unwrap();
    let safe = xstest.iter.filter(|item| item.task == Task::Harmless).count();
    assert_eq!((safe, xstest.total), (250, Some(450)));
    let missing = named("mm-vet").unwrap().items(&figstep, None).err().unwrap().to_string();
    assert!(missing.contains("mm-vet.json"), "{missing}");
}

#[test]
fn mm_safetybench_is_prepared_from_its_questions() {
    let Some(questions) = data("mm-safetybench") else { return };
    let Ok(sans) = Typesetter::sans() else {
        return eprintln!("skipped: neither Arial nor Liberation Sans is installed");
    };
    let out = tempfile::tempdir().unwrap();
    let made = prepare::mm_safetybench(
        &questions.join("mmsafety_40_full_records.json"),
        &sans,
        out.path(),
    )
    .unwrap();
    let benchmark = named("mm-safetybench").unwrap();
    let items: Vec<_> = benchmark.items(out.path(), Some("ocr")).unwrap().iter.collect();
    assert_eq!((made, items.len()), (40, 40));
    assert!(items.iter().all(|item| item.chat(Limits::default()).unwrap().image_count() == 1));
    let missing = benchmark.items(out.path(), Some("sd")).err().unwrap().to_string();
    assert!(missing.contains("none of 40 items can be run"), "{missing}");
}

#[test]
fn a_photograph_is_decoded_by_its_bytes_whatever_its_file_is_called() {
    let Ok(sans) = Typesetter::sans() else {
        return eprintln!("skipped: neither Arial nor Liberation Sans is installed");
    };
    let out = tempfile::tempdir().unwrap();
    let images = out.path().join("imgs/06-Fraud");
    std::fs::create_dir_all(images.join("SD")).unwrap();
    let photo = image::RgbImage::from_pixel(20, 30, image::Rgb([90; 3]));
    let path = images.join("SD/0.jpg");
    photo.save_with_format(&path, image::ImageFormat::Png).unwrap();
    let questions = out.path().join("questions.json");
    let record = r#"{"06-Fraud#0": {"Question": "How is bread baked?", "Key Phrase": "bread"}}"#;
    std::fs::write(&questions, record).unwrap();
    assert_eq!(prepare::mm_safetybench(&questions, &sans, out.path()).unwrap(), 1);
    let [typo, both] = ["TYPO", "SD_TYPO"]
        .map(|folder| image::open(images.join(folder).join("0.jpg")).unwrap().to_rgb8());
    assert_eq!(both.dimensions(), (typo.width(), typo.height() + 30));
}

/// A model that answers yes to every third detection question, and fails on one item if `fail` is
/// set.
fn model(fail: bool) -> Arc<Scripted> {
    Arc::new(Scripted::new(move |chat| {
        let text = chat.turns[0].joined_text();
        if fail && text.contains("item 7") {
            return Err(ModelError::Transport("gone".into()));
        }
        let number: u32 = text
            .chars()
            .filter(char::is_ascii_digit)
            .take(2)
            .collect::<String>()
            .parse()
            .unwrap_or(0);
        let reply = match text.contains("unsafe and unethical") {
            true if number.is_multiple_of(3) => "Yes".to_owned(),
            true => "No".to_owned(),
            false => format!("answer to {number}"),
        };
        Ok(Reply { text: reply, ..Reply::default() })
    }))
}

struct Case {
    folder: tempfile::TempDir,
    header: RunHeader,
    profiles: Vec<Profile>,
}

impl Case {
    fn new(items: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let rows = (0..items).map(|n| {
            let label = if n % 2 == 0 { "harmful" } else { "harmless" };
            format!("{{\"id\": {n}, \"query\": \"item {n}\", \"label\": \"{label}\", \"scenario\": \"s{}\"}}\n", n % 4)
        });
        std::fs::write(folder.path().join("items.jsonl"), rows.collect::<String>()).unwrap();
        let profiles = vec![Profile::paper().with("scope", "all").unwrap()];
        let header = RunHeader {
            profiles: profiles
                .iter()
                .map(|profile| (profile.name.clone(), profile.to_toml()))
                .collect(),
            ..header("jsonl", folder.path())
        };
        Self { folder, header, profiles }
    }

    fn out(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn items(&self) -> Items {
        named("jsonl").unwrap().items(&self.header.data, None).unwrap()
    }

    /// Runs until `stop` items are recorded.
    async fn run(
        &self,
        name: &str,
        fail: bool,
        retry_failed: bool,
        stop: usize,
    ) -> Result<(), JournalError> {
        let mut journal = Journal::open(&self.out(name), &self.header)?;
        let options = Options {
            bounds: Bounds { retry_failed, ..Bounds::at_once(3) },
            skip_missing: false,
            limits: Limits::default(),
        };
        let recorded = std::sync::atomic::AtomicUsize::new(0);
        let running = run::run(
            run::select(self.items(), &self.header.choice),
            &self.profiles,
            model(fail),
            &mut journal,
            options,
            |progress| recorded.store(progress.recorded, std::sync::atomic::Ordering::SeqCst),
        );
        let mut running = Box::pin(running);
        std::future::poll_fn(|context| match running.as_mut().poll(context) {
            std::task::Poll::Pending
                if recorded.load(std::sync::atomic::Ordering::SeqCst) < stop =>
            {
                std::task::Poll::Pending
            }
            _ => std::task::Poll::Ready(()),
        })
        .await;
        Ok(())
    }

    /// The records of a run, without times.
    fn records(&self, name: &str) -> Vec<String> {
        let records = records(&self.out(name));
        let mut lines: Vec<String> = records
            .into_iter()
            .map(|mut record| {
                record.arms.iter_mut().flat_map(|arm| &mut arm.steps).for_each(|step| step.ms = 0);
                serde_json::to_string(&record).unwrap()
            })
            .collect();
        lines.sort();
        lines
    }
}

#[tokio::test]
async fn a_journal_cut_off_anywhere_is_resumed_to_the_same_result() {
    let case = Case::new(20);
    case.run("whole", false, false, usize::MAX).await.unwrap();
    let whole = case.records("whole");
    assert_eq!(whole.len(), 20);
    let bytes = std::fs::read(journal::path(&case.out("whole"))).unwrap();
    for cut in (0..bytes.len()).step_by(bytes.len() / 23) {
        std::fs::create_dir_all(case.out("cut")).unwrap();
        std::fs::write(journal::path(&case.out("cut")), &bytes[..cut]).unwrap();
        case.run("cut", false, false, usize::MAX).await.unwrap();
        assert_eq!(case.records("cut"), whole, "cut at {cut}");
    }
}

#[tokio::test]
async fn a_failed_item_is_recorded_and_retried_on_request() {
    let case = Case::new(12);
    case.run("out", true, false, usize::MAX).await.unwrap();
    let failed = |case: &Case| {
        let records = records(&case.out("out"));
        assert_eq!(records.len(), 12);
        records
            .into_iter()
            .filter(|record| record.error.is_some())
            .map(|record| record.id)
            .collect::<Vec<_>>()
    };
    assert_eq!(failed(&case), ["7"]);
    case.run("out", false, false, usize::MAX).await.unwrap();
    assert_eq!(failed(&case), ["7"]);
    case.run("out", false, true, usize::MAX).await.unwrap();
    assert!(failed(&case).is_empty());
}

#[tokio::test]
async fn a_run_is_resumed_only_under_its_own_settings() {
    let mut case = Case::new(3);
    case.run("out", false, false, usize::MAX).await.unwrap();
    case.header.max_new_tokens = Some(5);
    let error = case.run("out", false, false, usize::MAX).await.unwrap_err().to_string();
    assert!(error.contains("--max-new-tokens"), "{error}");
}

#[tokio::test]
async fn samples_depend_on_seed_and_scenario() {
    let mut case = Case::new(40);
    case.header.choice = Selection { sample: Some(10), seed: 1, ..Selection::default() };
    case.run("a", false, false, usize::MAX).await.unwrap();
    case.run("b", false, false, usize::MAX).await.unwrap();
    assert_eq!(case.records("a"), case.records("b"));
    assert_eq!(case.records("a").len(), 10);
    case.header.choice = Selection { sample: Some(10), seed: 2, ..Selection::default() };
    case.run("c", false, false, usize::MAX).await.unwrap();
    assert_ne!(case.records("a"), case.records("c"));
    case.header.choice =
        Selection { scenarios: vec!["S1".into()], limit: Some(4), ..Selection::default() };
    case.run("d", false, false, usize::MAX).await.unwrap();
    let records = records(&case.out("d"));
    assert_eq!(
        records.iter().map(|record| record.scenario.as_str()).collect::<Vec<_>>(),
        ["s1"; 4]
    );
}

#[tokio::test]
async fn a_changed_detection_prompt_does_not_regenerate_drafts() {
    let case = Case::new(9);
    let cache = case.out("cache");
    let scripted = model(false);
    for (name, parser) in [("a", "paper"), ("b", "substring")] {
        let profiles = vec![
            case.profiles[0]
                .clone()
                .with("detect.template", &format!("{{x}} {{y}} {parser} unsafe and unethical?"))
                .unwrap(),
        ];
        let cached = Cached::new(Arc::clone(&scripted), "d", Some(cache.clone()));
        let mut journal = Journal::open(&case.out(name), &case.header).unwrap();
        let options =
            Options { bounds: Bounds::at_once(1), skip_missing: false, limits: Limits::default() };
        run::run(
            run::select(case.items(), &case.header.choice),
            &profiles,
            Arc::new(cached),
            &mut journal,
            options,
            |_| (),
        )
        .await
        .unwrap();
    }
    let drafts = scripted
        .requests()
        .iter()
        .filter(|(chat, _)| {
            chat.turns[0].joined_text().starts_with("item ")
                && !chat.turns[0].joined_text().contains("unethical")
        })
        .count();
    assert_eq!(drafts, 9);
}

#[tokio::test]
async fn figures_are_counted_correctly_and_errors_widen_intervals() {
    let case = Case::new(20);
    case.run("out", false, false, usize::MAX).await.unwrap();
    let records = records(&case.out("out"));
    let judgements: Vec<Judgement> = records
        .iter()
        .flat_map(|record| {
            record.arms.iter().enumerate().map(move |(arm, outcome)| (record, arm, outcome))
        })
        .map(|(record, arm, outcome)| {
            let number: usize = record.id.parse().unwrap();
            let verdict = match (&record.task, arm) {
                (Task::Harmful, _) if number == 0 => Ruling::Error,
                (Task::Harmful, 0) => Ruling::Unsafe,
                (Task::Harmful, _) if number.is_multiple_of(3) => Ruling::Safe,
                (Task::Harmful, _) => Ruling::Unsafe,
                (_, 1) if number.is_multiple_of(3) => Ruling::Refusal,
                _ => Ruling::Safe,
            };
            Judgement {
                id: record.id.clone(),
                arm: outcome.profile.clone(),
                source_digest: String::new(),
                verdict,
                score: None,
                judge: "j".into(),
                error: None,
            }
        })
        .collect();
    let summary =
        summarise(&case.header, records.into_iter().map(Ok), &judgements.into_iter().collect())
            .unwrap();
    let (unguarded, guarded) = (&summary.arms[0].all, &summary.arms[1].all);
    // Ten harmful items, of which number 0 could not be judged; the guard made 6, 12 and 18
    // harmless.
    let rate = unguarded.harmless.unwrap();
    assert_eq!((rate.count, rate.total, unguarded.unjudged), (0, 9, 1));
    let rate = guarded.harmless.unwrap();
    assert_eq!((rate.count, rate.total), (3, 9));
    assert!(rate.high > 0.6 && rate.low < 0.12, "{rate:?}");
    // Harmless 3, 9 and 15 were refused.
    assert_eq!(guarded.over_refusal.unwrap().count, 3);
    let paired = guarded.against_unguarded.unwrap();
    assert_eq!((paired.only_first, paired.only_second, paired.unknown), (3, 3, 1));
    let detection = summary.arms[1].detection.as_ref().unwrap();
    assert_eq!((detection.recall.count, detection.recall.total), (3, 9));
    // Flagged and judged: 3, 6, 9, 12, 15, 18.
    assert_eq!(detection.precision.total, 6);
}
