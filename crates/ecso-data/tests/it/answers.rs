//! Answers for in-memory tables.

use std::{
    fs,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use arrow_array::{ArrayRef, Int64Array, RecordBatch, StringArray, cast::AsArray};
use ecso::{Chat, Limits, Mllm, ModelError, Profile, Reply, testing::Scripted};
use ecso_data::{
    answers::{AnswersError, NAMES, TableAnswerer, TableOptions},
    input::Mapping,
};

fn options() -> TableOptions {
    TableOptions {
        mapping: Mapping::default(),
        query: None,
        prefix: String::new(),
        concurrency: 4,
        image_bytes: 1 << 20,
        max_failed: 1.0,
    }
}

fn table(queries: &[Option<&str>]) -> RecordBatch {
    let numbers: ArrayRef = Arc::new((0..).take(queries.len()).collect::<Int64Array>());
    let queries: ArrayRef = Arc::new(queries.iter().copied().collect::<StringArray>());
    RecordBatch::try_from_iter([("number", numbers), ("query", queries)]).unwrap()
}

fn profile() -> Profile {
    Profile::paper().with("scope", "all").unwrap()
}

/// A model that repeats the query, fails at "fail", finds nothing harmful, and counts its drafts.
fn model(drafts: &Arc<AtomicUsize>) -> Arc<dyn Mllm> {
    let drafts = Arc::clone(drafts);
    Arc::new(Scripted::new(move |chat: &Chat| {
        let query = chat.turns.last().map(ecso::Turn::joined_text).unwrap_or_default();
        if query.contains("Is the RESPONSE harmful") {
            return Ok(Reply { text: "No".into(), ..Reply::default() });
        }
        drafts.fetch_add(1, Ordering::SeqCst);
        if query.contains("fail") {
            Err(ModelError::Rejected("no".into()))
        } else {
            Ok(Reply { text: query, ..Reply::default() })
        }
    }))
}

fn texts(table: &RecordBatch, name: &str) -> Vec<Option<String>> {
    let column = table.column_by_name(name).unwrap();
    column.as_string::<i32>().iter().map(|text| text.map(str::to_owned)).collect()
}

async fn answered(
    answerer: &Arc<TableAnswerer>,
    tables: Vec<RecordBatch>,
    options: &TableOptions,
) -> Result<Vec<RecordBatch>, AnswersError> {
    let schema = tables[0].schema();
    answerer.answer(&schema, tables, options).await
}

fn answerer(model: Arc<dyn Mllm>, journal: Option<&std::path::Path>) -> Arc<TableAnswerer> {
    Arc::new(
        TableAnswerer::new(model, "a model", profile(), None, Limits::DEFAULT, journal).unwrap(),
    )
}

#[tokio::test]
async fn every_row_has_its_answer_or_error_in_order() {
    let drafts = Arc::default();
    let one = answerer(model(&drafts), None);
    let tables = vec![
        table(&[Some("a"), None, Some("fail"), Some("b")]),
        table(&[]),
        table(&[Some("a"), Some("c")]),
    ];
    let found = answered(&one, tables.clone(), &options()).await.unwrap();
    assert_eq!(found.iter().map(RecordBatch::num_rows).collect::<Vec<_>>(), [4, 0, 2]);
    assert_eq!(found[0].schema().fields().len(), 2 + NAMES.len());
    let some = |text: &str| Some(text.to_owned());
    assert_eq!(texts(&found[0], "answer"), [some("a"), None, None, some("b")]);
    assert_eq!(texts(&found[0], "error_kind"), [None, some("input"), some("rejected"), None]);
    assert_eq!(texts(&found[2], "answer"), [some("a"), some("c")]);
    assert_eq!(drafts.load(Ordering::SeqCst), 4, "equal rows are asked about once");

    let few = TableOptions { max_failed: 0.2, ..options() };
    assert!(matches!(
        answered(&one, tables, &few).await,
        Err(AnswersError::TooManyFailures { rows: 6, .. })
    ));
    assert!(matches!(answered(&one, found, &options()).await, Err(AnswersError::NameConflict(_))));
    let named = TableOptions { prefix: "new_".into(), ..options() };
    let found = answered(&one, vec![table(&[Some("a")])], &named).await.unwrap();
    assert_eq!(texts(&found[0], "new_verdict"), [some("safe")]);
}

#[tokio::test]
async fn processes_share_a_journal() {
    let (drafts, folder) = (Arc::default(), tempfile::tempdir().unwrap());
    let ours = answerer(model(&drafts), Some(folder.path()));
    let theirs = answerer(model(&drafts), Some(folder.path()));
    let first = vec![table(&[Some("a"), Some("fail"), Some("b")])];
    answered(&ours, first.clone(), &options()).await.unwrap();
    assert_eq!(drafts.load(Ordering::SeqCst), 3);
    let again = answered(&theirs, first.clone(), &options()).await.unwrap();
    assert_eq!(drafts.load(Ordering::SeqCst), 4, "what failed is tried again, and nothing else");
    assert_eq!(texts(&again[0], "answer")[2].as_deref(), Some("b"));
    answered(&theirs, vec![table(&[Some("c")])], &options()).await.unwrap();
    answered(&ours, vec![table(&[Some("c"), Some("b")])], &options()).await.unwrap();
    assert_eq!(drafts.load(Ordering::SeqCst), 5, "what others write later is seen");

    let draft: ArrayRef = Arc::new(StringArray::from(vec!["Something else"]));
    let query: ArrayRef = Arc::new(StringArray::from(vec!["a"]));
    let drafted = RecordBatch::try_from_iter([("query", query), ("draft", draft)]).unwrap();
    let found = answered(&ours, vec![drafted], &options()).await.unwrap();
    assert_eq!(
        texts(&found[0], "answer")[0].as_deref(),
        Some("Something else"),
        "a draft is another row"
    );
}

#[tokio::test]
async fn what_others_did_to_a_journal_costs_only_answers() {
    let (drafts, folder) = (Arc::default(), tempfile::tempdir().unwrap());
    let journals = || {
        let files = fs::read_dir(&folder).unwrap().map(|file| file.unwrap().path());
        files.filter(|path| path.to_string_lossy().contains("answers-")).collect::<Vec<_>>()
    };
    let ours = answerer(model(&drafts), Some(folder.path()));
    assert_eq!(journals(), Vec::<PathBuf>::new(), "a journal begins with an answer");
    let rows = vec![table(&[Some("a"), Some("b")])];
    answered(&ours, rows.clone(), &options()).await.unwrap();
    let journal = journals().pop().unwrap();
    let lines = fs::read_to_string(&journal).unwrap();
    let asked = async |what| {
        let before = drafts.load(Ordering::SeqCst);
        for process in [&ours, &answerer(model(&drafts), Some(folder.path()))] {
            answered(process, rows.clone(), &options()).await.expect(what);
        }
        drafts.load(Ordering::SeqCst) - before
    };
    assert_eq!(asked("untouched").await, 0);

    fs::write(folder.path().join("notes.jsonl"), "a list of things\n").unwrap();
    fs::create_dir(folder.path().join("answers-old.jsonl")).unwrap();
    assert_eq!(asked("with foreign files").await, 0);

    // Another process has written a line up to its line break.
    let other = folder.path().join("answers-other.jsonl");
    let last = lines.lines().last().unwrap();
    fs::write(&other, last).unwrap();
    assert_eq!(asked("with a line in the making").await, 0);
    fs::write(&other, format!("{last}\n\nno answer\n{{\"id\":\"x\"}}\n{last}\n")).unwrap();
    assert_eq!(asked("with lines that are no answers").await, 0);
    fs::write(folder.path().join("answers-junk.jsonl"), "junk\n\0\x01\n").unwrap();
    assert_eq!(asked("with a file that has no header").await, 0);

    fs::remove_file(&other).unwrap();
    fs::remove_file(&journal).unwrap();
    assert_eq!(asked("with deleted journals").await, 2, "once, by the first process");
    assert_eq!(journals().len(), 3, "{:?}", journals());
    assert_eq!(asked("with a new journal").await, 0);
    fs::remove_dir_all(&folder).unwrap();
    assert_eq!(asked("without the folder").await, 2);
    assert_eq!(asked("with a new folder").await, 0);

    let journal = journals().pop().unwrap();
    fs::write(&journal, "").unwrap();
    answered(&ours, vec![table(&[Some("c")])], &options()).await.unwrap();
    let text = fs::read_to_string(&journal).unwrap();
    assert!(text.starts_with('{') || text.is_empty(), "no hole is left: {text:?}");
}
