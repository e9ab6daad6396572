//! What comes in: inputs as people have them, and what was packed here.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use arrow_array::{
    Array, ArrayRef, BinaryArray, BinaryViewArray, DictionaryArray, FixedSizeListArray, Int32Array, LargeBinaryArray,
    LargeStringArray, RecordBatch, StringArray, StringViewArray, StructArray, UInt8Array, types::Int32Type,
};
use arrow_schema::{DataType, Field, Schema};
use base64::{Engine, prelude::BASE64_STANDARD};
use ecso_data::{
    input::{Input, Mapping},
    row::{Picture, Row},
};
use proptest::prelude::*;
use serde_json::json;

use crate::data::{input, png};

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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
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
