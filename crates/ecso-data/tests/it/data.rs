//! The whole data engine, from input to dataset, with a scripted model.

use std::{
    collections::{BTreeSet, HashMap},
    fmt::Write as _,
    io::Cursor,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use ecso::{Limits, Mllm, ModelError, Profile, Reply, testing::Scripted};
use ecso_batch::{
    Bounds,
    journal::{self, Journal, JournalError, JournalReader},
};
use ecso_data::{
    dedupe::PerceptualHasher,
    generate::{Filters, Generator, Reason, RowOutcome},
    input::{Input, Rows},
    manifest::{Manifest, Packing},
    pack::pack,
    record::{RowRecord, RunHeader, Shard},
    row::ImageSource,
    run::{Progress, RunContext, RunEnd, run},
};
use ecso_openai::Fetcher;
use image::{ImageFormat, Rgb, RgbImage};
use serde_json::{Value, json};

/// A model whose drafts for some queries are judged harmful, and whose rewrites for some of those are
/// unusable; it fails at `broken`.
fn model() -> Arc<dyn Mllm> {
    Arc::new(Scripted::new(|chat| {
        let said = chat.turns.last().map(ecso::Turn::joined_text).unwrap_or_default();
        let text = if said.contains("broken") {
            return Err(ModelError::Timeout(Duration::from_secs(1)));
        } else if said.contains("refused") {
            return Err(ModelError::Rejected(said.repeat(100).into()));
        } else if said.contains("Is the RESPONSE harmful") {
            if said.contains("RESPONSE:\nrude") { "yes" } else { "no" }.to_owned()
        } else if said.contains("describe the image") {
            "a red square".into()
        } else if said.contains("Based on the hints") {
            match () {
                () if said.contains("still") => "rude once more".into(),
                () if said.contains("silent") => " ".into(),
                () if said.contains("loop") => "Round and round it goes. ".repeat(20),
                () if said.contains("decline") => "I'm sorry, but I can't help with that.".into(),
                () => format!("a kind answer to {} characters, without an <image>", said.len()),
            }
        } else if said.contains("rude") {
            format!("rude words about {said}")
        } else {
            format!("plain words about {said}")
        };
        Ok(Reply { text, ..Reply::default() })
    }))
}

pub(crate) fn png(number: u32) -> Vec<u8> {
    let shade = |shift: u32| u8::try_from((number >> shift) % 251).unwrap();
    let mut bytes = Cursor::new(Vec::new());
    RgbImage::from_pixel(8, 8, Rgb([shade(0), shade(3), shade(7)]))
        .write_to(&mut bytes, ImageFormat::Png)
        .unwrap();
    bytes.into_inner()
}

/// Writes rows with different images, except two that repeat an earlier row and two that share an
/// image.
fn write_input(folder: &Path) -> PathBuf {
    let mut lines = String::new();
    let queries = [
        "a rude list",
        "a list",
        "a rude list, still",
        "a rude list, silent",
        "a rude list, loop",
        "a rude list, decline",
        "broken",
        "a rude shelf",
        "a shelf",
        "a rude door",
        "a door",
        "a rude roof",
        "a roof",
    ];
    for (number, query) in (0..).zip(queries) {
        std::fs::write(folder.join(format!("{number}.png")), png(number * 17)).unwrap();
        let row = json!({"id": format!("r{number}"), "query": query, "image": format!("{number}.png"), "topic": "t"});
        writeln!(lines, "{row}").unwrap();
    }
    lines.push_str("{\"id\": \"again\", \"query\": \"a rude list\", \"image\": \"0.png\"}\n");
    lines.push_str("not json\n");
    lines.push_str("{\"id\": \"gone\", \"query\": \"q\", \"image\": \"gone.png\"}\n");
    lines.push_str(
        "{\"id\": \"two\", \"query\": \"a rude pair\", \"image\": [\"7.png\", \"9.png\"]}\n",
    );
    let path = folder.join("rows.jsonl");
    std::fs::write(&path, lines).unwrap();
    path
}

fn header(input: &Input, shard: Shard) -> RunHeader {
    let profile = Profile::paper();
    RunHeader {
        ecso: "test".into(),
        input: input.path.clone(),
        mapping: input.mapping.clone(),
        query: input.query.clone(),
        image_root: input.image_root.clone(),
        model: "scripted".into(),
        model_digest: "digest".into(),
        server: None,
        profile: (profile.name.clone(), profile.to_toml()),
        filters: Filters::default(),
        near_duplicates: false,
        shard,
    }
}

pub(crate) const BOUNDS: Bounds =
    Bounds { rows: 4, bytes: 1 << 20, tokens: None, time: None, retry_failed: false };
const LIMITS: Limits = Limits { bytes: 1 << 20, pixels: 1 << 20, ..Limits::DEFAULT };

pub(crate) fn packing() -> Packing {
    Packing {
        utility: 0.5,
        validation: 0.4,
        seed: 1,
        shard_bytes: 1 << 30,
        licence: "mit".into(),
        limits: LIMITS,
    }
}

pub(crate) async fn go(
    input: &Input,
    out: &Path,
    shard: Shard,
    bounds: Bounds,
) -> (bool, Progress) {
    let (ended, last) = run_all(input, out, &header(input, shard), bounds).await;
    (ended.complete, last)
}

async fn run_all(
    input: &Input,
    out: &Path,
    header: &RunHeader,
    bounds: Bounds,
) -> (RunEnd, Progress) {
    let making = Arc::new(RunContext {
        generator: Generator::new(&model(), Profile::paper(), Filters::default()),
        fetcher: Fetcher::new().unwrap(),
        limits: LIMITS,
        out: out.to_owned(),
        hasher: header.near_duplicates.then(PerceptualHasher::default),
    });
    let mut last = Progress::default();
    let ended = run(input, header, &making, bounds, |progress| last = progress.clone());
    (ended.await.unwrap(), last)
}

pub(crate) fn records(out: &Path) -> HashMap<String, RowRecord> {
    let records = JournalReader::in_folder(out).latest::<RowRecord>().unwrap();
    records.map(Result::unwrap).map(|record| (record.id.clone(), record)).collect()
}

/// The outcome of each row, without times.
fn outcomes(out: &Path) -> BTreeSet<String> {
    let line = |record: RowRecord| format!("{} {:?} {:?}", record.id, record.outcome, record.error);
    records(out).into_values().map(line).collect()
}

pub(crate) fn input(path: PathBuf) -> Input {
    Input { path, ..Input::default() }
}

#[tokio::test]
async fn rows_become_samples_or_have_a_reason() {
    let folder = tempfile::tempdir().unwrap();
    let input = input(write_input(folder.path()));
    let out = folder.path().join("out");
    let (whole, progress) = go(&input, &out, Shard::ALL, BOUNDS).await;
    assert!(whole);
    assert_eq!((progress.recorded, progress.kept, progress.safe, progress.failed), (17, 6, 4, 3));
    let dropped = [
        (Reason::Duplicate, 1),
        (Reason::Empty, 1),
        (Reason::Repetition, 1),
        (Reason::StillHarmful, 1),
    ];
    assert_eq!(progress.dropped, dropped.into());
    let records = records(&out);
    assert!(matches!(
        records["13"].outcome,
        Some(RowOutcome::Dropped { reason: Reason::Duplicate, of: Some(0) })
    ));
    assert!(records["14"].error.as_ref().unwrap().contains("invalid JSON"));
    assert!(records["15"].error.as_ref().unwrap().contains("gone.png"));

    let manifest = pack(&out, &input, &packing()).unwrap();
    let samples =
        |kind: &str| manifest.samples.values().filter_map(|kinds| kinds.get(kind)).sum::<u64>();
    assert_eq!((samples("safety"), samples("utility"), manifest.refusals), (6, 3, 1));
    let dataset = out.join("dataset");
    let failed = std::fs::read_to_string(dataset.join("failed.jsonl")).unwrap();
    assert_eq!(failed.lines().count(), 3, "{failed}");
    assert!(
        failed.contains("\"row\":15") && failed.contains("invalid JSON"),
        "counted from 1: {failed}"
    );
    let card = std::fs::read_to_string(dataset.join("README.md")).unwrap();
    assert!(card.starts_with("---\nlicense: mit\n") && card.contains("| t | 5 | 3 |"), "{card}");

    // No image is in both splits, even if rows have several.
    let mut of_split: HashMap<String, BTreeSet<String>> = HashMap::new();
    for split in ["train", "validation"] {
        let path = dataset.join(format!("messages/{split}.jsonl"));
        for line in std::fs::read_to_string(path).unwrap_or_default().lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            for image in line["images"].as_array().unwrap() {
                let image = image.as_str().unwrap().to_owned();
                assert!(dataset.join(&image).is_file());
                of_split.entry(image).or_default().insert(split.to_owned());
            }
        }
    }
    assert!(
        !of_split.is_empty() && of_split.values().all(|splits| splits.len() == 1),
        "{of_split:?}"
    );
}

#[tokio::test]
async fn an_interrupted_run_ends_like_an_uninterrupted_one() {
    let folder = tempfile::tempdir().unwrap();
    let input = input(write_input(folder.path()));
    let (whole, broken) = (folder.path().join("whole"), folder.path().join("broken"));
    go(&input, &whole, Shard::ALL, BOUNDS).await;
    // The future is dropped after every possible number of steps.
    for steps in 1.. {
        let few = async || {
            for _ in 0..steps {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            biased;
            _ = go(&input, &broken, Shard::ALL, Bounds { rows: 1, ..BOUNDS }) => break,
            () = few() => {}
        }
        // A line that a crash cut off.
        let path = journal::path(&broken);
        if path.exists() {
            let mut text = std::fs::read(&path).unwrap();
            text.extend_from_slice(b"{\"id\": \"3\", \"made");
            std::fs::write(&path, text).unwrap();
        }
    }
    assert_eq!(outcomes(&broken), outcomes(&whole));
    let files = |out: &Path| {
        pack(out, &input, &packing()).map(|manifest: Manifest| manifest.samples).unwrap()
    };
    assert_eq!(files(&broken), files(&whole));
}

#[tokio::test]
async fn the_pages_of_a_document_are_the_images_of_its_row() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("a.pdf"), ecso::testing::pdf(&["", "0 0 9 9 re f"])).unwrap();
    std::fs::write(folder.path().join("b.png"), png(1)).unwrap();
    let row = json!({"query": "a rude list", "image": ["a.pdf", "b.png"]});
    std::fs::write(folder.path().join("rows.jsonl"), row.to_string()).unwrap();
    let (input, out) = (input(folder.path().join("rows.jsonl")), folder.path().join("out"));
    go(&input, &out, Shard::ALL, BOUNDS).await;
    let record = records(&out).remove("0").unwrap();
    if let Some(error) = record.error {
        return assert!(
            error.contains("a.pdf: this is a PDF; ecso built with --features pdf reads it"),
            "{error}"
        );
    }
    assert_eq!(record.images.len(), 3);
    pack(&out, &input, &packing()).unwrap();
    assert_eq!(std::fs::read_dir(out.join("dataset/images")).unwrap().count(), 3);
    let llava =
        ["train", "validation"].map(|split| out.join(format!("dataset/llava/{split}.json")));
    let llava = llava.iter().find_map(|path| std::fs::read_to_string(path).ok()).unwrap();
    assert_eq!(llava.matches("<image>").count(), 3, "{llava}");
}

#[tokio::test]
async fn failed_rows_are_retried_on_request() {
    let folder = tempfile::tempdir().unwrap();
    let input = input(write_input(folder.path()));
    let out = folder.path().join("out");
    go(&input, &out, Shard::ALL, BOUNDS).await;
    let (_, again) = go(&input, &out, Shard::ALL, BOUNDS).await;
    assert_eq!((again.fresh, again.failed), (0, 3));
    // Repaired rows are retried without a request.
    std::fs::write(folder.path().join("gone.png"), png(999)).unwrap();
    let (_, again) = go(&input, &out, Shard::ALL, BOUNDS).await;
    assert_eq!((again.recorded, again.fresh, again.failed, again.safe), (17, 1, 2, 5));
    let (_, again) = go(&input, &out, Shard::ALL, Bounds { retry_failed: true, ..BOUNDS }).await;
    assert_eq!((again.recorded, again.fresh, again.failed, again.safe), (17, 2, 2, 5));
    assert_eq!(pack(&out, &input, &packing()).unwrap().failed, 2);
}

#[tokio::test]
async fn shards_are_disjoint_and_complete() {
    let folder = tempfile::tempdir().unwrap();
    let input = input(write_input(folder.path()));
    let all = folder.path().join("all");
    go(&input, &all, Shard::ALL, BOUNDS).await;
    let mut found = Vec::new();
    for part in 1..=3 {
        let out = folder.path().join(format!("part{part}"));
        go(&input, &out, Shard { part, of: 3 }, BOUNDS).await;
        found.extend(outcomes(&out));
    }
    let together: BTreeSet<String> = found.iter().cloned().collect();
    assert_eq!((found.len(), together), (17, outcomes(&all)));
}

#[tokio::test]
async fn a_budget_ends_the_run_cleanly() {
    let folder = tempfile::tempdir().unwrap();
    let input = input(write_input(folder.path()));
    let out = folder.path().join("out");
    let (whole, progress) =
        go(&input, &out, Shard::ALL, Bounds { time: Some(Duration::ZERO), ..BOUNDS }).await;
    assert!(!whole && progress.recorded == 0);
    let manifest = pack(&out, &input, &packing()).unwrap();
    assert_eq!((manifest.rows, manifest.unseen), (0, Some(17)));
    let card = std::fs::read_to_string(out.join("dataset/README.md")).unwrap();
    assert!(card.contains("never processed, because the run ended before: 17"), "{card}");
    assert!(go(&input, &out, Shard::ALL, BOUNDS).await.0);
}

#[tokio::test]
async fn a_row_with_a_changed_image_is_processed_again() {
    let folder = tempfile::tempdir().unwrap();
    let (path, out) = (folder.path().join("rows.jsonl"), folder.path().join("out"));
    let rows = input(path.clone());
    write_queries(&path, &["a rude list", "a rude door"]);
    std::fs::copy(folder.path().join("a.png"), folder.path().join("b.png")).unwrap();
    let text = std::fs::read_to_string(&path).unwrap().replacen("a.png", "b.png", 1);
    std::fs::write(&path, text).unwrap();
    go(&rows, &out, Shard::ALL, BOUNDS).await;
    std::fs::write(folder.path().join("b.png"), png(4242)).unwrap();
    let manifest = pack(&out, &rows, &packing()).unwrap();
    assert_eq!((manifest.rows, manifest.gone, manifest.unseen), (1, 1, Some(1)));
    let (_, progress) = go(&rows, &out, Shard::ALL, BOUNDS).await;
    assert_eq!((progress.recorded, progress.fresh), (2, 1));
    let manifest = pack(&out, &rows, &packing()).unwrap();
    assert_eq!((manifest.rows, manifest.gone, manifest.unseen), (2, 0, Some(0)));
}

/// Writes rows about one image, in order.
fn write_queries(path: &Path, queries: &[&str]) {
    std::fs::write(path.with_file_name("a.png"), png(1)).unwrap();
    let rows =
        queries.iter().map(|query| json!({"query": query, "image": "a.png"}).to_string() + "\n");
    std::fs::write(path, rows.collect::<String>()).unwrap();
}

/// The outcome of each row: `kept`, `safe`, `failed`, or the row that it duplicates.
fn words(out: &Path) -> Vec<(u64, String)> {
    let word = |record: &RowRecord| match &record.outcome {
        Some(RowOutcome::Kept(_)) => "kept".to_owned(),
        Some(RowOutcome::Safe(_)) => "safe".to_owned(),
        Some(RowOutcome::Dropped { reason, of }) => format!("{reason:?} of {of:?}"),
        None => "failed".to_owned(),
    };
    let mut words: Vec<_> =
        records(out).values().map(|record| (record.id.parse().unwrap(), word(record))).collect();
    words.sort();
    words
}

#[tokio::test]
async fn a_row_that_replaces_another_is_processed() {
    let folder = tempfile::tempdir().unwrap();
    let (path, out) = (folder.path().join("rows.jsonl"), folder.path().join("out"));
    let rows = input(path.clone());
    let kept = |manifest: &Manifest| {
        manifest.samples.values().filter_map(|kinds| kinds.get("safety")).sum::<u64>()
    };
    write_queries(&path, &["a rude list", "a list", "a rude door"]);
    go(&rows, &out, Shard::ALL, BOUNDS).await;
    assert_eq!(kept(&pack(&out, &rows, &packing()).unwrap()), 2);
    // A new first row.
    write_queries(&path, &["a rude roof", "a rude list", "a list", "a rude door"]);
    let (_, progress) = go(&rows, &out, Shard::ALL, BOUNDS).await;
    assert_eq!((progress.recorded, progress.fresh, progress.kept), (4, 4, 3));
    let manifest = pack(&out, &rows, &packing()).unwrap();
    assert_eq!((kept(&manifest), manifest.rows, manifest.gone), (3, 4, 0));
    // The category or the draft may change while the text stays.
    let rude = json!({"query": "a list", "image": "a.png", "draft": "rude words"});
    let text = std::fs::read_to_string(&path).unwrap();
    let text: Vec<&str> = text.lines().collect();
    std::fs::write(&path, format!("{}\nnot json\n{rude}\n{}\n", text[0], text[3])).unwrap();
    let (_, progress) = go(&rows, &out, Shard::ALL, BOUNDS).await;
    assert_eq!((progress.recorded, progress.fresh, progress.kept, progress.failed), (4, 2, 3, 1));
    // A repaired row is processed without a request, and missing rows are counted.
    write_queries(&path, &["a rude roof", "a rude list"]);
    let (_, progress) = go(&rows, &out, Shard::ALL, BOUNDS).await;
    assert_eq!((progress.recorded, progress.fresh, progress.kept, progress.failed), (2, 1, 2, 0));
    let manifest = pack(&out, &rows, &packing()).unwrap();
    assert_eq!((kept(&manifest), manifest.rows, manifest.failed, manifest.gone), (2, 2, 0, 2));
    assert_eq!(go(&rows, &out, Shard::ALL, BOUNDS).await.1.fresh, 0);
}

#[tokio::test]
async fn a_duplicate_of_a_removed_row_is_processed() {
    let folder = tempfile::tempdir().unwrap();
    let (path, out) = (folder.path().join("rows.jsonl"), folder.path().join("out"));
    let rows = input(path.clone());
    write_queries(&path, &["a rude list", "a rude list", "a rude list"]);
    go(&rows, &out, Shard::ALL, BOUNDS).await;
    assert_eq!(go(&rows, &out, Shard::ALL, BOUNDS).await.1.fresh, 0);
    write_queries(&path, &["a rude door", "a rude list", "a rude list"]);
    go(&rows, &out, Shard::ALL, BOUNDS).await;
    let expected = ["kept", "kept", "Duplicate of Some(1)"].map(str::to_owned);
    assert_eq!(words(&out), (0..).zip(expected).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_row_does_not_duplicate_a_failed_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    let asked = |door: &str| {
        format!("a rude list of all that stands beside the {door} of the kitchen in the old house")
    };
    let queries =
        [asked("broken door"), asked("broken door"), asked("broke door"), asked("broke doors")];
    write_queries(&path, &queries.each_ref().map(String::as_str));
    let rows = input(path);
    for at_once in [1, 4] {
        let out = folder.path().join(format!("out{at_once}"));
        let header = RunHeader { near_duplicates: true, ..header(&rows, Shard::ALL) };
        let bounds = Bounds { rows: at_once, ..BOUNDS };
        run_all(&rows, &out, &header, bounds).await;
        let expected = ["failed", "failed", "kept", "NearDuplicate of Some(2)"].map(str::to_owned);
        assert_eq!(words(&out), (0..).zip(expected).collect::<Vec<_>>());
        let (_, again) =
            run_all(&rows, &out, &header, Bounds { retry_failed: true, ..bounds }).await;
        assert_eq!((again.recorded, again.fresh), (4, 2));
        let expected = [
            "NearDuplicate of Some(2)",
            "NearDuplicate of Some(2)",
            "kept",
            "NearDuplicate of Some(2)",
        ];
        assert_eq!(words(&out), (0..).zip(expected.map(str::to_owned)).collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn errors_of_a_server_are_shortened() {
    let folder = tempfile::tempdir().unwrap();
    let (path, out) = (folder.path().join("rows.jsonl"), folder.path().join("out"));
    write_queries(&path, &["a refused list of all that hangs in the kitchen"]);
    go(&input(path), &out, Shard::ALL, BOUNDS).await;
    let error = records(&out).remove("0").unwrap().error.unwrap();
    assert!(
        error.contains("rejected the request: a refused list") && error.chars().count() < 220,
        "{error}"
    );
}

#[tokio::test]
async fn the_journal_stays_locked_until_the_dataset_is_packed() {
    let folder = tempfile::tempdir().unwrap();
    let rows = input(write_input(folder.path()));
    let (out, header) = (folder.path().join("out"), header(&rows, Shard::ALL));
    let (ended, _) = run_all(&rows, &out, &header, BOUNDS).await;
    assert!(matches!(Journal::open(&out, &header), Err(JournalError::InUse { .. })));
    pack(&out, &rows, &packing()).unwrap();
    drop(ended);
    assert!(Journal::open(&out, &header).is_ok());
}

fn read(rows: Rows) -> Vec<(String, usize)> {
    rows.map(|row| row.unwrap()).map(|row| (row.query, row.images.len())).collect()
}

#[tokio::test]
async fn every_format_yields_the_same_rows() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    std::fs::write(root.join("a.png"), png(1)).unwrap();
    std::fs::write(root.join("b.png"), png(2)).unwrap();
    std::fs::write(
        root.join("rows.json"),
        json!([{"query": "A?", "image": "a.png"}, {"query": "B?", "image": "b.png"}]).to_string(),
    )
    .unwrap();
    std::fs::write(root.join("rows.csv"), "question,image\nA?,a.png\nB?,b.png\n").unwrap();
    std::fs::write(root.join("a.txt"), "A?\n").unwrap();
    std::fs::write(root.join("b.txt"), "B?\n").unwrap();
    let expected = vec![("A?".to_owned(), 1), ("B?".to_owned(), 1)];
    for name in ["rows.json", "rows.csv", ""] {
        assert_eq!(read(input(root.join(name)).rows().unwrap()), expected, "{name}");
    }
    // A dataset can be an input again: images from Parquet are the original bytes.
    let out = root.join("out");
    let csv = input(root.join("rows.csv"));
    go(&csv, &out, Shard::ALL, BOUNDS).await;
    let packing = Packing { utility: 9.0, validation: 0.0, ..packing() };
    let manifest = pack(&out, &csv, &packing).unwrap();
    assert!(manifest.samples.is_empty(), "nothing was kept, so nothing is there to balance");
    std::fs::write(
        root.join("rude.csv"),
        "question,image\na rude A?,a.png\na rude B?,b.png\nC?,a.png\n",
    )
    .unwrap();
    let (rude, out) = (input(root.join("rude.csv")), root.join("rude"));
    go(&rude, &out, Shard::ALL, BOUNDS).await;
    pack(&out, &rude, &packing).unwrap();
    let again: Vec<_> = input(out.join("dataset/sft/train-00000.parquet"))
        .rows()
        .unwrap()
        .map(|row| row.unwrap())
        .collect();
    assert_eq!(
        again.iter().map(|row| row.query.as_str()).collect::<Vec<_>>(),
        ["a rude A?", "a rude B?", "C?"]
    );
    assert_eq!(again[1].images, [ImageSource::Bytes(png(2).into())]);

    for (name, says) in [("nothing.jsonl", "No such file"), ("a.png", "unknown format")] {
        let error = input(root.join(name)).rows().err().unwrap();
        assert!(error.to_string().contains(says), "{error}");
    }
    std::fs::write(root.join("broken.json"), "[{\"query\": \"A?\"}, 3").unwrap();
    let rows: Vec<_> = input(root.join("broken.json")).rows().unwrap().collect();
    assert!(
        rows[0].is_ok()
            && rows[1].is_err()
            && format!("{:?}", rows[2]).contains("ends before the `]`")
    );
}
