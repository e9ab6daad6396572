//! What comes in: inputs as people have them, and what was packed here.

use std::{
    error::Error,
    path::{Path, PathBuf},
    sync::Arc,
};

use arrow_array::{
    Array, ArrayRef, BinaryArray, BinaryViewArray, DictionaryArray, FixedSizeListArray, Int32Array, LargeBinaryArray,
    LargeStringArray, RecordBatch, StringArray, StringViewArray, StructArray, UInt8Array, types::Int32Type,
};
use arrow_schema::{DataType, Field, Schema};
use base64::{Engine, prelude::BASE64_STANDARD};
use ecso::{ImageError, chain};
use ecso_data::{
    input::{Input, Mapping},
    make::Made,
    pack::{Packing, pack},
    row::{Picture, Row},
    run::Shard,
};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::data::{OPTIONS, go, input, packing, png, records};

/// Queries with the number of their images; or what the error says.
fn told(input: &Input) -> Vec<Result<(String, usize), String>> {
    let rows = match input.rows() {
        Ok(rows) => rows,
        Err(error) => return vec![Err(error.to_string())],
    };
    rows.map(|row| row.map(|row| (row.query, row.images.len())).map_err(|error| error.to_string())).collect()
}

/// Files of the field: how many rows of each are read, how many aren't, and what an error says.
const FIELD: &[(&str, usize, usize, &str)] = &[
    ("10-data-urls/bare-base64.json", 1, 0, ""),
    ("10-data-urls/plus-as-space.json", 1, 0, ""),
    ("10-data-urls/trailing-newline.json", 1, 0, ""),
    ("10-data-urls/upper-scheme.json", 1, 0, ""),
    ("19-image-marks/llava.json", 5, 0, ""),
    ("19-image-marks/query.jsonl", 2, 0, ""),
    ("19-image-marks/qwen.jsonl", 1, 0, ""),
    ("19-image-marks/sharegpt.json", 2, 0, ""),
    ("20-parquet-types/image-only.parquet", 0, 2, "--query"),
    ("20-parquet-types/large-list-of-struct.parquet", 2, 0, ""),
    ("20-parquet-types/large-string-path.parquet", 2, 0, ""),
    ("20-parquet-types/llava-onevision.parquet", 2, 0, ""),
    ("20-parquet-types/st*.parquet", 4, 0, ""),
    ("20-parquet-types/texts-finevision.parquet", 2, 0, ""),
    ("20-parquet-types/trl-*.parquet", 4, 0, ""),
    ("21-encodings/array.jsonl", 3, 0, ""),
    ("21-encodings/bom.csv", 3, 0, ""),
    ("21-encodings/bom.jsonl", 3, 0, ""),
    ("21-encodings/comma.jsonl", 1, 1, "no comma stands"),
    ("21-encodings/crlf.jsonl", 3, 0, ""),
    ("21-encodings/latin1.csv", 0, 3, "not UTF-8"),
    ("21-encodings/lines.json", 3, 0, ""),
    ("21-encodings/pretty.jsonl", 3, 0, ""),
    ("21-encodings/semicolon.csv", 3, 0, ""),
    ("21-encodings/utf16.csv", 0, 1, "UTF-16"),
    ("26-paths/rows.jsonl", 8, 1, "upper and lower case"),
];

#[test]
fn inputs_of_the_field_are_read_or_say_what_is_wrong() {
    let Some(data) = std::env::var_os("ECSO_TEST_DATA").map(|data| PathBuf::from(data).join("field")) else {
        println!("skipped: ECSO_TEST_DATA doesn't say where inputs are");
        return;
    };
    if !data.is_dir() {
        println!("skipped: no {}", data.display());
        return;
    }
    for (name, read, failed, says) in FIELD {
        let rows = told(&input(data.join(name)));
        let errors: Vec<&String> = rows.iter().filter_map(|row| row.as_ref().err()).collect();
        assert_eq!((rows.len() - errors.len(), errors.len()), (*read, *failed), "{name}: {rows:?}");
        assert!(errors.iter().all(|error| error.contains(says)), "{name}: {errors:?}");
        let marked = rows.iter().flatten().any(|(query, _)| query.contains("<image") || query.contains("<|"));
        assert!(!marked, "{name}: {rows:?}");
    }
    let all = Input { query: Some("What?".into()), ..input(data.join("20-parquet-types/image-only.parquet")) };
    assert_eq!(told(&all), vec![Ok(("What?".to_owned(), 1)); 2]);
}

#[test]
fn errors_keep_what_is_behind_them_and_say_it_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    std::fs::write(
        &path,
        "{\"query\": nothing}\n{\"messages\": [{\"role\": \"user\", \"content\": {\"data\": \"@\"}}]}\n",
    )
    .unwrap();
    let errors: Vec<_> = input(path).rows().unwrap().map(|row| row.unwrap_err()).collect();
    let root = |error: &(dyn Error + 'static)| {
        let mut causes = std::iter::successors(error.source(), |cause| (*cause).source());
        causes.any(|cause| cause.is::<serde_json::Error>() || cause.is::<ImageError>())
    };
    assert!(errors.iter().all(|error| root(error)), "{errors:?}");
    assert!(errors[1].to_string().starts_with("row 1: column `messages`: turn 1: "), "{}", errors[1]);
    let gone = input(folder.path().join("gone.parquet")).rows().err().unwrap();
    assert_eq!([chain(&errors[1]), chain(&gone)], [errors[1].to_string(), gone.to_string()]);
    assert!(gone.source().is_some_and(<dyn Error>::is::<std::io::Error>), "{gone:?}");
}

#[test]
fn a_column_that_was_named_is_there_or_its_row_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let told = |name: &str, text: &str, pairs: &[(&str, &str)]| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        let pairs = pairs.iter().map(|(what, column)| ((*what).to_owned(), (*column).to_owned()));
        told(&Input { mapping: Mapping::new(pairs).unwrap(), ..input(path) })
    };
    let read = |query: &str, images| Ok((query.to_owned(), images));
    let lines = concat!(
        "{\"question\":\"A?\",\"photo\":\"a.png\",\"tag\":\"t\"}\n",
        "{\"question\":\"B?\",\"photo\":null}\n",
        "{\"question\":\"C?\"}\n",
    );
    let array = format!("[{}]", lines.trim().replace('\n', ","));
    for (name, text) in [("rows.jsonl", lines), ("rows.json", &array)] {
        let rows = told(name, text, &[("image", "photo"), ("category", "tag")]);
        assert_eq!(rows[..2], [read("A?", 1), read("B?", 0)], "{name}");
        assert_eq!(rows[2], Err("row 2: --map image=photo: there is no such column; there are question".to_owned()));
        for pair in [("image", "foto"), ("query", "quetsion"), ("draft", "answer"), ("messages", "turns")] {
            let rows = told(name, text, &[pair]);
            let says =
                format!("row 0: --map {}={}: there is no such column; there are photo, question, tag", pair.0, pair.1);
            assert!(rows.len() == 3 && rows.iter().all(Result::is_err) && rows[0] == Err(says), "{rows:?}");
        }
    }
    let table = "question,photo\nA?,a.png\nB?,\n";
    assert_eq!(told("rows.csv", table, &[("image", "photo")]), [read("A?", 1), read("B?", 0)]);
    assert!(
        told("rows.csv", table, &[("image", "foto")])[0].as_ref().unwrap_err().contains("rows.csv: --map image=foto: ")
    );
    // What was named counts, and nothing beside it.
    let both = "{\"messages\":[{\"role\":\"user\",\"content\":\"A?\"}],\"asked\":\"B?\"}\n";
    assert_eq!(told("both.jsonl", both, &[("query", "asked")]), [read("B?", 0)]);
    let empty = both.replace("B?", "");
    assert!(told("both.jsonl", &empty, &[("query", "asked")])[0].as_ref().unwrap_err().contains("no query"));
}

fn parquet(path: &Path, columns: Vec<(&str, ArrayRef)>) {
    let fields: Vec<Field> =
        columns.iter().map(|(name, column)| Field::new(*name, column.data_type().clone(), true)).collect();
    let batch =
        RecordBatch::try_new(Arc::new(Schema::new(fields)), columns.into_iter().map(|(_, column)| column).collect());
    let batch = batch.unwrap();
    let file = std::fs::File::create(path).unwrap();
    let mut writer = parquet::arrow::ArrowWriter::try_new(file, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

#[test]
fn every_type_of_parquet_is_read_or_named() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("a.png"), png(1)).unwrap();
    let bytes = png(1);
    let item = |kind: &DataType| Arc::new(Field::new("item", kind.clone(), true));
    let binary: ArrayRef = Arc::new(BinaryArray::from(vec![bytes.as_slice()]));
    let text: ArrayRef = Arc::new(StringArray::from(vec!["a.png"]));
    let pair = StructArray::from(vec![
        (Arc::new(Field::new("bytes", DataType::Binary, true)), Arc::clone(&binary)),
        (Arc::new(Field::new("path", DataType::Utf8, true)), Arc::clone(&text)),
    ]);
    let fixed: ArrayRef = Arc::new(FixedSizeListArray::new(item(pair.data_type()), 1, Arc::new(pair.clone()), None));
    let list = |kind: DataType| arrow_cast::cast(&fixed, &kind).unwrap();
    let small: ArrayRef = Arc::new(UInt8Array::from(bytes.clone()));
    let length = i32::try_from(bytes.len()).unwrap();
    let encoded = format!("data:image/png;base64,{}", BASE64_STANDARD.encode(&bytes));
    let images: Vec<(&str, ArrayRef)> = vec![
        ("binary", binary.clone()),
        ("large binary", Arc::new(LargeBinaryArray::from(vec![bytes.as_slice()]))),
        ("binary view", Arc::new(BinaryViewArray::from(vec![bytes.as_slice()]))),
        ("text", text.clone()),
        ("large text", Arc::new(LargeStringArray::from(vec!["a.png"]))),
        ("text view", Arc::new(StringViewArray::from(vec!["a.png"]))),
        ("dictionary", Arc::new(DictionaryArray::<Int32Type>::new(Int32Array::from(vec![0]), text.clone()))),
        ("data URL", Arc::new(StringArray::from(vec![encoded.as_str()]))),
        ("base64", Arc::new(LargeStringArray::from(vec![&encoded[22..]]))),
        ("struct", Arc::new(pair.clone())),
        ("list", list(DataType::List(item(pair.data_type())))),
        ("large list", list(DataType::LargeList(item(pair.data_type())))),
        ("fixed list", fixed.clone()),
        ("small numbers", Arc::new(FixedSizeListArray::new(item(&DataType::UInt8), length, small, None))),
    ];
    for (kind, image) in images {
        let path = folder.path().join("rows.parquet");
        let query: ArrayRef = Arc::new(StringViewArray::from(vec!["What?"]));
        parquet(&path, vec![("query", query), ("image", image)]);
        let rows: Vec<Row> = input(path).rows().unwrap().map(|row| row.unwrap()).collect();
        assert_eq!((rows.len(), rows[0].query.as_str()), (1, "What?"), "{kind}");
        let held = match &rows[0].images[..] {
            [Picture::Bytes(held)] => held.to_vec(),
            [Picture::File(path)] => std::fs::read(path).unwrap(),
            other => panic!("{kind}: {other:?}"),
        };
        assert_eq!(held, bytes, "{kind}");
    }
    // What is no text or no image is an error that names column and type.
    let numbers: ArrayRef = Arc::new(Int32Array::from(vec![3]));
    let list: ArrayRef = Arc::new(FixedSizeListArray::new(item(&DataType::Int32), 1, numbers.clone(), None));
    for (query, image, says) in [
        (list.clone(), text.clone(), "column `query` (of type FixedSizeList"),
        (text.clone(), numbers.clone(), "column `image` (of type Int32)"),
    ] {
        let path = folder.path().join("wrong.parquet");
        parquet(&path, vec![("query", query), ("image", image)]);
        let rows = told(&input(path));
        assert!(rows.len() == 1 && rows[0].as_ref().unwrap_err().contains(says), "{rows:?}");
    }
    // An image that nobody named is not dropped.
    let path = folder.path().join("photo.parquet");
    parquet(&path, vec![("query", text.clone()), ("photo", Arc::new(pair))]);
    assert!(told(&input(path.clone()))[0].as_ref().unwrap_err().contains("--map image=photo"));
    let mapping = Mapping::new([("image".to_owned(), "photo".to_owned())]).unwrap();
    assert_eq!(told(&Input { mapping, ..input(path.clone()) }), [Ok(("a.png".to_owned(), 1))]);
    let mapping = Mapping::new([("image".to_owned(), "foto".to_owned())]).unwrap();
    assert!(told(&Input { mapping, ..input(path) })[0].as_ref().unwrap_err().contains("no such column"));
}

#[test]
fn folders_and_patterns_of_tables_are_read_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    std::fs::create_dir_all(root.join("data")).unwrap();
    for (name, query) in [("data/b.jsonl", "B?"), ("data/a.jsonl", "A?")] {
        std::fs::write(root.join(name), json!({"query": query}).to_string()).unwrap();
    }
    std::fs::write(root.join("data/._a.jsonl"), "what a Mac keeps").unwrap();
    let expected = ["A?", "B?"].map(|query| Ok((query.to_owned(), 0)));
    for path in [root.to_owned(), root.join("data"), root.join("data/*.jsonl"), root.join("*/?.jsonl")] {
        assert_eq!(told(&input(path.clone())), expected, "{}", path.display());
        assert_eq!(input(path).count(), Some(2));
    }
    assert!(told(&input(root.join("*.csv")))[0].as_ref().unwrap_err().contains("no file has such a name"));
    // What a folder is must be clear.
    std::fs::write(root.join("a.png"), png(1)).unwrap();
    let error = told(&input(root.to_owned())).remove(0).unwrap_err();
    assert!(error.contains("1 images and 2 tables") && error.contains("data/*.jsonl"), "{error}");
    let asked = Input { query: Some("<image>\nWhat?".into()), ..input(root.to_owned()) };
    assert_eq!(told(&asked), [Ok(("What?".to_owned(), 1))]);
}

/// A turn as the property test makes it: text, images before it, and an image in its midst.
type Said = (String, usize, bool);

fn turns() -> impl Strategy<Value = Vec<Said>> {
    // Spaces, marks and quotes as they are found in texts.
    let text = "(a|B|é|\\.|\\?| |\n|\"|\\\\|\\{|the image|<|>|&lt;image&gt;){0,12}";
    prop::collection::vec((text, 0..3_usize, any::<bool>()), 1..4)
}

/// Rows of conversations whose images are data URLs.
fn lines(rows: &[Vec<Said>]) -> String {
    let mut number = 0;
    let mut image = || {
        number += 1;
        let url = format!("data:image/png;base64,{}", BASE64_STANDARD.encode(png(number)));
        json!({"type": "image_url", "image_url": {"url": url}})
    };
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        let mut messages = vec![json!({"role": "system", "content": "Be kind."})];
        for (said, images, midst) in row {
            let mut parts: Vec<Value> = (0..*images).map(|_| image()).collect();
            parts.push(json!({"type": "text", "text": format!("a rude {said}")}));
            if *midst {
                parts.extend([image(), json!({"type": "text", "text": "and more"})]);
            }
            messages.push(json!({"role": "user", "content": parts}));
            messages.push(json!({"role": "assistant", "content": "An answer."}));
        }
        let mut row = json!({"id": index, "messages": messages});
        if index > 0 {
            row["draft"] = "a plain word about the <image> tag".into();
        }
        text.push_str(&row.to_string());
        text.push('\n');
    }
    text
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn what_is_packed_is_read(rows in prop::collection::vec(turns(), 1..4)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        std::fs::write(&path, lines(&rows)).unwrap();
        let (rows, out) = (input(path), folder.path().join("out"));
        let packing = Packing { utility: 100.0, validation: 0.0, ..packing() };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(go(&rows, &out, Shard::ALL, OPTIONS));
        pack(&out, &rows, &packing).unwrap();

        let made = records(&out);
        prop_assert!(made.values().all(|record| record.error.is_none()), "{made:?}");
        let shown = |row: &Row| (row.query.clone(), row.images.len(), row.before.clone());
        let kept: Vec<_> = rows.rows().unwrap().map(|row| row.unwrap())
            .map(|row| (shown(&row), &made[&row.number.to_string()].made)).collect();
        let of = |wanted: fn(&Made) -> bool| -> Vec<_> {
            kept.iter().filter(|(_, made)| made.as_ref().is_some_and(wanted)).map(|(row, _)| row.clone()).collect()
        };
        let pairs = of(|made| matches!(made, Made::Kept(_)));
        let kept = of(|made| matches!(made, Made::Kept(_) | Made::Safe(_)));
        // What is shown no image is in no profile's scope here.
        prop_assume!(!pairs.is_empty());
        for name in ["messages/train.jsonl", "llava/train.json", "sft", "dpo/*.parquet"] {
            let kept = if name.starts_with("dpo") { &pairs } else { &kept };
            let again = input(out.join("dataset").join(name)).rows().unwrap();
            let again: Vec<_> = again.map(|row| row.map(|row| shown(&row))).collect::<Result<_, _>>().unwrap();
            prop_assert_eq!(&again, kept, "{}", name);
        }
        let samples = std::fs::read_to_string(out.join("dataset/llava/train.json")).unwrap();
        prop_assert_eq!(samples.matches("<image>").count(), kept.iter().map(|row| row.1).sum::<usize>());
    }

    #[test]
    fn no_record_panics(text in "[\\[\\]{},:\"a1]{0,30}", bytes: Vec<u8>) {
        let folder = tempfile::tempdir().unwrap();
        for name in ["rows.jsonl", "rows.csv", "rows.parquet"] {
            let path = folder.path().join(name);
            std::fs::write(&path, &bytes).unwrap();
            let _ = told(&input(path.clone()));
            let field = format!("{{\"messages\":[{{\"role\":\"user\",\"content\":[{text}]}}],\"image\":[{text}]}}");
            std::fs::write(&path, field).unwrap();
            let _ = told(&input(path));
        }
    }
}
