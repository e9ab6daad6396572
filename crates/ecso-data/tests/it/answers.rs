//! Tables in memory, answered.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use arrow_array::{ArrayRef, Int64Array, RecordBatch, StringArray, cast::AsArray};
use ecso::{Chat, Limits, Mllm, ModelError, Profile, Reply, testing::Scripted};
use ecso_data::{
    answers::{AnswersError, NAMES, Reading, TableAnswerer},
    input::Mapping,
};

const READING: fn() -> Reading = || Reading {
    mapping: Mapping::default(),
    query: None,
    prefix: String::new(),
    rows: 4,
    bytes: 1 << 20,
    may_fail: 1.0,
};

fn table(queries: &[Option<&str>]) -> RecordBatch {
    let numbers: ArrayRef = Arc::new((0..).take(queries.len()).collect::<Int64Array>());
    let queries: ArrayRef = Arc::new(queries.iter().copied().collect::<StringArray>());
    RecordBatch::try_from_iter([("number", numbers), ("query", queries)]).unwrap()
}

fn profile() -> Profile {
    Profile::paper().with("scope", "all").unwrap()
}

/// A model that says again what it is asked, fails at "fail", finds nothing harmful, and counts its
/// drafts.
fn model(drafts: &Arc<AtomicUsize>) -> Arc<dyn Mllm> {
    let drafts = Arc::clone(drafts);
    Arc::new(Scripted::new(move |chat: &Chat| {
        let said = chat.turns.last().map(ecso::Turn::query).unwrap_or_default();
        if said.contains("Is the RESPONSE harmful") {
            return Ok(Reply { text: "No".into(), ..Reply::default() });
        }
        drafts.fetch_add(1, Ordering::SeqCst);
        if said.contains("fail") {
            Err(ModelError::Rejected("no".into()))
        } else {
            Ok(Reply { text: said, ..Reply::default() })
        }
    }))
}

fn texts(table: &RecordBatch, name: &str) -> Vec<Option<String>> {
    let column = table.column_by_name(name).unwrap();
    column.as_string::<i32>().iter().map(|text| text.map(str::to_owned)).collect()
}

async fn answered(
    answering: &Arc<TableAnswerer>,
    tables: Vec<RecordBatch>,
    reading: &Reading,
) -> Result<Vec<RecordBatch>, AnswersError> {
    let schema = tables[0].schema();
    answering.answer(&schema, tables, reading).await
}

fn answering(model: Arc<dyn Mllm>, journal: Option<&std::path::Path>) -> Arc<TableAnswerer> {
    Arc::new(TableAnswerer::new(model, "a model", profile(), None, Limits::USUAL, journal).unwrap())
}

#[tokio::test]
async fn every_row_has_its_own_answer_or_error_in_its_place() {
    let drafts = Arc::default();
    let one = answering(model(&drafts), None);
    let tables = vec![
        table(&[Some("a"), None, Some("fail"), Some("b")]),
        table(&[]),
        table(&[Some("a"), Some("c")]),
    ];
    let found = answered(&one, tables.clone(), &READING()).await.unwrap();
    assert_eq!(found.iter().map(RecordBatch::num_rows).collect::<Vec<_>>(), [4, 0, 2]);
    assert_eq!(found[0].schema().fields().len(), 2 + NAMES.len());
    let some = |text: &str| Some(text.to_owned());
    assert_eq!(texts(&found[0], "answer"), [some("a"), None, None, some("b")]);
    assert_eq!(texts(&found[0], "error_kind"), [None, some("input"), some("rejected"), None]);
    assert_eq!(texts(&found[2], "answer"), [some("a"), some("c")]);
    assert_eq!(drafts.load(Ordering::SeqCst), 4, "equal rows are asked about once");

    let few = Reading { may_fail: 0.2, ..READING() };
    assert!(matches!(
        answered(&one, tables, &few).await,
        Err(AnswersError::TooMany { rows: 6, .. })
    ));
    assert!(matches!(answered(&one, found, &READING()).await, Err(AnswersError::Taken(_))));
    let named = Reading { prefix: "new_".into(), ..READING() };
    let found = answered(&one, vec![table(&[Some("a")])], &named).await.unwrap();
    assert_eq!(texts(&found[0], "new_verdict"), [some("safe")]);
}

#[tokio::test]
async fn processes_share_a_journal() {
    let (drafts, folder) = (Arc::default(), tempfile::tempdir().unwrap());
    let ours = answering(model(&drafts), Some(folder.path()));
    let theirs = answering(model(&drafts), Some(folder.path()));
    let first = vec![table(&[Some("a"), Some("fail"), Some("b")])];
    answered(&ours, first.clone(), &READING()).await.unwrap();
    assert_eq!(drafts.load(Ordering::SeqCst), 3);
    let again = answered(&theirs, first.clone(), &READING()).await.unwrap();
    assert_eq!(drafts.load(Ordering::SeqCst), 4, "what failed is tried again, and nothing else");
    assert_eq!(texts(&again[0], "answer")[2].as_deref(), Some("b"));
    answered(&theirs, vec![table(&[Some("c")])], &READING()).await.unwrap();
    answered(&ours, vec![table(&[Some("c"), Some("b")])], &READING()).await.unwrap();
    assert_eq!(drafts.load(Ordering::SeqCst), 5, "what others write later is seen");

    let draft: ArrayRef = Arc::new(StringArray::from(vec!["Something else"]));
    let query: ArrayRef = Arc::new(StringArray::from(vec!["a"]));
    let drafted = RecordBatch::try_from_iter([("query", query), ("draft", draft)]).unwrap();
    let found = answered(&ours, vec![drafted], &READING()).await.unwrap();
    assert_eq!(
        texts(&found[0], "answer")[0].as_deref(),
        Some("Something else"),
        "a draft is another row"
    );
}
