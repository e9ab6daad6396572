//! Inputs: real-world layouts and files, and datasets packed here.

use std::{
    error::Error,
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

use arrow_array::{
    Array, ArrayRef, BinaryArray, BinaryViewArray, DictionaryArray, FixedSizeBinaryArray,
    FixedSizeListArray, Int32Array, LargeBinaryArray, LargeStringArray, RecordBatch, StringArray,
    StringViewArray, StructArray, UInt8Array, types::Int32Type,
};
use arrow_schema::{DataType, Field, Schema};
use base64::{Engine, prelude::BASE64_STANDARD};
use ecso::{ImageError, error_chain};
use ecso_data::{
    input::{Input, Mapping},
    row::{ImageSource, Row},
};
use proptest::prelude::*;
use serde_json::json;

use crate::data::{input, png};

/// The query and number of images of each row, or its error.
fn read_all(input: &Input) -> Vec<Result<(String, usize), String>> {
    let rows = match input.rows() {
        Ok(rows) => rows,
        Err(error) => return vec![Err(error.to_string())],
    };
    rows.map(|row| row.map(|row| (row.query, row.images.len())).map_err(|error| error.to_string()))
        .collect()
}

/// Real-world files: the number of rows that are read, the number that fail, and part of the errors.
const FILES: &[(&str, usize, usize, &str)] = &[
    ("10-data-urls/bare-base64.json", 1, 0, ""),
    ("10-data-urls/plus-as-space.json", 1, 0, ""),
    ("10-data-urls/trailing-newline.json", 1, 0, ""),
    ("10-data-urls/upper-scheme.json", 1, 0, ""),
    ("19-image-marks/llava.json", 5, 0, ""),
    ("19-image-marks/query.jsonl", 2, 0, ""),
    ("19-image-marks/qwen.jsonl", 1, 0, ""),
    ("19-image-marks/sharegpt.json", 2, 0, ""),
    ("20-parquet-types/image-only.parquet", 0, 1, "--query"),
    ("20-parquet-types/large-list-of-struct.parquet", 2, 0, ""),
    ("20-parquet-types/large-string-path.parquet", 2, 0, ""),
    ("20-parquet-types/llava-onevision.parquet", 2, 0, ""),
    ("20-parquet-types/st*.parquet", 4, 0, ""),
    ("20-parquet-types/texts-finevision.parquet", 2, 0, ""),
    ("20-parquet-types/trl-*.parquet", 4, 0, ""),
    ("21-encodings/array.jsonl", 3, 0, ""),
    ("21-encodings/bom.csv", 3, 0, ""),
    ("21-encodings/bom.jsonl", 3, 0, ""),
    ("21-encodings/comma.jsonl", 1, 1, "no comma after"),
    ("21-encodings/crlf.jsonl", 3, 0, ""),
    ("21-encodings/latin1.csv", 0, 3, "not UTF-8"),
    ("21-encodings/lines.json", 3, 0, ""),
    ("21-encodings/pretty.jsonl", 3, 0, ""),
    ("21-encodings/semicolon.csv", 3, 0, ""),
    ("21-encodings/utf16.csv", 0, 1, "UTF-16"),
    ("26-paths/rows.jsonl", 8, 1, "upper and lower case"),
];

#[test]
fn real_world_files_are_read() {
    let Some(data) =
        std::env::var_os("ECSO_TEST_DATA").map(|data| PathBuf::from(data).join("field"))
    else {
        println!("skipped: ECSO_TEST_DATA doesn't say where inputs are");
        return;
    };
    if !data.is_dir() {
        println!("skipped: no {}", data.display());
        return;
    }
    for (name, read, failed, says) in FILES {
        let rows = read_all(&input(data.join(name)));
        let errors: Vec<&String> = rows.iter().filter_map(|row| row.as_ref().err()).collect();
        assert_eq!((rows.len() - errors.len(), errors.len()), (*read, *failed), "{name}: {rows:?}");
        assert!(errors.iter().all(|error| error.contains(says)), "{name}: {errors:?}");
        let marked = rows
            .iter()
            .flatten()
            .any(|(query, _)| query.contains("<image") || query.contains("<|"));
        assert!(!marked, "{name}: {rows:?}");
    }
    let all = Input {
        query: Some("What?".into()),
        ..input(data.join("20-parquet-types/image-only.parquet"))
    };
    assert_eq!(read_all(&all), vec![Ok(("What?".to_owned(), 1)); 2]);
}

/// Rows of public datasets, the `--map` for them, and the query and number of images that are read, or
/// part of the error.
const LAYOUTS: &[(&str, &str, &str)] = &[
    // LLaVA, ShareGPT4V: a conversation with an image in its first turn; some rows have none.
    (
        r#"{"id":"1","image":"a.png","conversations":[{"from":"human","value":"<image>\nA?"},{"from":"gpt","value":"a"},{"from":"human","value":"B?"}]}"#,
        "",
        "B? 1",
    ),
    (
        r#"{"id":"2","conversations":[{"from":"human","value":"C?"},{"from":"gpt","value":"c"}],"source":"sharegpt"}"#,
        "",
        "C? 0",
    ),
    // The Cauldron, Docmatix.
    (
        r#"{"images":[{"bytes":null,"path":"a.png"}],"texts":[{"user":"A?","assistant":"a","source":"AI2D"},{"user":"B?"}]}"#,
        "",
        "B? 1",
    ),
    // Pairs with other names and a system message; two questions are ambiguous.
    (
        r#"{"conversation":[{"system":"Be kind.","input":"<image>\nA?","output":"a"}],"image":"a.png"}"#,
        "",
        "A? 1",
    ),
    (r#"{"conversations":[{"Human":"A?","GPT":"a"},{"Human":"B?"}]}"#, "", "B? 0"),
    (r#"{"conversations":[{"instruction":"A","input":"B"}]}"#, "", "ambiguous"),
    (r#"{"conversations":[{"q":"A?","a":"a"}]}"#, "", "neither `role` nor `from`, but a, q"),
    // VLGuard.
    (
        r#"{"image":"a.png","instr-resp":[{"instruction":"A?","response":"a"}]}"#,
        "",
        "--map conversations=instr-resp",
    ),
    (
        r#"{"image":"a.png","instr-resp":[{"instruction":"A?","response":"a"}]}"#,
        "conversations=instr-resp",
        "A? 1",
    ),
    (
        r#"{"image":"a.png","instr-resp":[{"safe_instruction":"A?","response":"a"}]}"#,
        "conversations=instr-resp",
        "but response, safe_instruction",
    ),
    // M3IT: the context of the instruction has its own column, the image is base64.
    (
        r#"{"instruction":"Look.","inputs":"A?","image_base64_str":["iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ"]}"#,
        "",
        "Look.\nA? 1",
    ),
    // RLHF-V: JSON in a cell.
    (
        r#"{"image":"a.png","image_path":"b/a.png","text":"{\"question\": \"A?\", \"chosen\": \"a\"}"}"#,
        "",
        "--map query=text.question",
    ),
    (
        r#"{"image":"a.png","image_path":"b/a.png","text":"{\"question\": \"A?\", \"chosen\": \"a\"}"}"#,
        "query=text.question",
        "A? 1",
    ),
    (r#"{"prompt":"{\"prompt\": \"A?\"}"}"#, "query=prompt", "{\"prompt\": \"A?\"} 0"),
    // VQAv2, A-OKVQA, TextVQA, GQA: an image by number, or by a URL in an unknown column.
    (
        r#"{"image_id":262148,"question":"A?","question_id":262148000}"#,
        "",
        "column `image_id` seems to be about an image",
    ),
    (r#"{"image_id":262148,"question":"A?"}"#, "image=", "A? 0"),
    (r#"{"imageId":"n161313","question":"A?"}"#, "", "--map image=COLUMN"),
    (
        r#"{"question":"A?","flickr_original_url":"https://example.com/a_o.jpg"}"#,
        "",
        "--map image=flickr_original_url",
    ),
    (
        r#"{"question":"A?","flickr_original_url":"https://example.com/a_o.jpg"}"#,
        "image=flickr_original_url",
        "A? 1",
    ),
    (r#"{"question":"A?","image":null,"image_source":"none"}"#, "", "A? 0"),
    // Ollama, DeepSeek-VL: images in a field of the turn. MiniCPM-V: images by mark.
    (r#"{"messages":[{"role":"user","content":"A?","images":["a.png"]}]}"#, "", "A? 1"),
    (
        r#"{"messages":[{"role":"User","content":"<image_placeholder>A?","images":["a.png"]}]}"#,
        "",
        "A? 1",
    ),
    (r#"{"messages":[{"role":"user","content":"A?","videos":["a.mp4"]}]}"#, "", "only images"),
    (
        r#"{"image":{"<image_01>":"b.png","<image_00>":"a.png"},"conversations":[{"role":"user","content":"A?\n<image_00>\n<image_01>"}]}"#,
        "",
        "A? 2",
    ),
    // Parts: text under another name, or none; Anthropic's system, Gemini's parts, Responses,
    // batches.
    (
        r#"{"messages":[{"role":"user","content":[{"type":"image","image":"a.png"},{"type":"text","content":"A?"}]}]}"#,
        "",
        "A? 1",
    ),
    (
        r#"{"messages":[{"role":"user","content":[{"type":"text","words":"A?"}]}]}"#,
        "",
        "has no `text`",
    ),
    (
        r#"{"system":[{"type":"text","text":"Be kind."}],"messages":[{"role":"user","content":"A?"}]}"#,
        "",
        "A? 0",
    ),
    (
        r#"{"contents":[{"role":"user","parts":[{"text":"A?"},{"inlineData":{"mimeType":"image/png","data":"AAAA"}}]}]}"#,
        "messages=contents",
        "A? 1",
    ),
    (r#"{"input":[{"role":"user","content":"A?"}]}"#, "", "--map messages=input"),
    (
        r#"{"custom_id":"1","body":{"model":"m","messages":[{"role":"user","content":"A?"}]}}"#,
        "",
        "--map messages=body.messages",
    ),
    (
        r#"{"custom_id":"1","body":{"model":"m","messages":[{"role":"user","content":"A?"}]}}"#,
        "messages=body.messages",
        "A? 0",
    ),
    (
        r#"{"row":{"question":"A?","image":{"src":"https://example.com/a"}}}"#,
        "query=row.question,image=row.image",
        "A? 1",
    ),
    (
        r#"{"row":{"question":"A?","image":{"src":"https://example.com/a.jpg"}}}"#,
        "query=row.question",
        "--map image=row.image",
    ),
    // Arena: each turn is a list. Text and image in one part, text as an object.
    (
        r#"{"conversation":[[{"role":"user","content":"A?"}],[{"role":"assistant","content":"a"}],[{"role":"user","content":"B?"}]],"images":["a.png"]}"#,
        "",
        "B? 1",
    ),
    (r#"{"messages":[{"role":"user","content":{"text":"A?","image":"a.png"}}]}"#, "", "A? 1"),
    (
        r#"{"messages":[{"role":"user","content":[{"type":"image","image":"a.png","text":"A?"}]}]}"#,
        "",
        "A? 1",
    ),
    (
        r#"{"messages":[{"role":"user","content":[{"type":"text","text":{"value":"A?","annotations":[]}}]}]}"#,
        "",
        "A? 0",
    ),
    (
        r#"{"messages":[{"role":"user","content":[{"type":"text","text":["A?"]}]}]}"#,
        "",
        "expected text",
    ),
    // Of several image columns, the one with the most images; empty ones don't count.
    (r#"{"query":"A?","image":"a.png","images":["a.png","b.png"]}"#, "", "A? 2"),
    (r#"{"query":"A?","image":"a.png","image_path":"b/a.png"}"#, "", "A? 1"),
    (r#"{"query":"<image 1><image 2>A?","image":"a.png","image_2":"b.png"}"#, "", "A? 2"),
    (
        r#"{"prompt":"","messages":[],"instruction":"A?","image":{"bytes":null,"path":null}}"#,
        "",
        "A? 0",
    ),
    (r#"{"prompt":{"role":"user","content":"A?"},"id":{"$oid":"5f"}}"#, "", "A? 0"),
    // Files without rows: a list in an object, an object of rows, a column-oriented table.
    (
        r#"{"info":{"year":2017},"questions":[{"image_id":1,"question":"A?"}]}"#,
        "",
        "the rows are in the list `questions`",
    ),
    (
        r#"{"annotations":[{"image_id":"2","caption":"A loaf."}]}"#,
        "",
        "the rows are in the list `annotations`",
    ),
    (r#"{"data":{"train":[{"question":"A?"}]}}"#, "", "the rows are in the list `data.train`"),
    (r#"{"0":{"Question":"A?"},"1":{"Question":"B?"}}"#, "", "each column is a row"),
    (r#"{"question":["A?","B?"],"image":["a.png","b.png"]}"#, "", "column by column"),
    (
        r#"{"question":{"0":"A?","1":"B?"},"image":{"0":"a.png","1":"b.png"}}"#,
        "",
        "column by column",
    ),
    // Other spellings of marks.
    (r#"{"query":"<Image>\nA?","image":"a.png"}"#, "", "A? 1"),
    (r#"{"query":"<Img><ImageHere></Img> A?","image":"a.png"}"#, "", "A? 1"),
    (r#"{"query":"(<image>./</image>)\nA?","image":"a.png"}"#, "", "A? 1"),
    (r#"{"query":"<image>\nA?","images":[]}"#, "", "the text has 1 image placeholders"),
    // Python's notation is not JSON, and half of a surrogate pair is not a character.
    (r#"{"query":"A?","images":"['a.png', 'b.png']"}"#, "", "in Python's notation"),
    (r#"{"conversations":"[{'from': 'human', 'value': 'A?'}]"}"#, "", "in Python's notation"),
    (r#"{"query":"A \ud83c?"}"#, "", "half of a surrogate pair"),
    (r#"{"query":"A?"} // mine"#, "", "no comments"),
];

#[test]
fn layouts_of_public_datasets_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    for (row, named, expected) in LAYOUTS {
        std::fs::write(&path, row).unwrap();
        let pairs = named.split(',').filter_map(|pair| pair.split_once('='));
        let mapping =
            Mapping::new(pairs.map(|(what, column)| (what.to_owned(), column.to_owned()))).unwrap();
        let rows = read_all(&Input { mapping, ..input(path.clone()) });
        match &rows[..] {
            [Ok((query, images))] => assert_eq!(format!("{query} {images}"), *expected, "{row}"),
            [Err(error)] => assert!(error.contains(expected), "{row}: {error}"),
            _ => panic!("{row}: {rows:?}"),
        }
    }
    // A row with nothing but the common query is an error.
    std::fs::write(&path, "{\"annotations\":[{\"caption\":\"A loaf.\"}]}\n{\"image\":\"a.png\"}\n")
        .unwrap();
    let rows = read_all(&Input { query: Some("What?".into()), ..input(path) });
    assert!(rows[0].as_ref().unwrap_err().contains("neither query nor image"), "{rows:?}");
    assert_eq!(rows[1], Ok(("What?".to_owned(), 1)));
}

#[test]
fn image_parts_select_images_by_index() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    let part = |index: usize| json!({"type": "image", "index": index, "text": null});
    let text = |text: &str| json!({"type": "text", "index": null, "text": text});
    let messages = json!([
        {"role": "user", "content": [part(1), text("Rye?")]},
        {"role": "assistant", "content": [text("Yes.")]},
        {"role": "user", "content": [part(0), text("Wheat?")]},
    ]);
    let row = json!({"messages": messages, "images": ["wheat.png", "rye.png"]});
    std::fs::write(&path, row.to_string()).unwrap();
    let row = input(path).rows().unwrap().next().unwrap().unwrap();
    let images: Vec<ImageSource> =
        ["rye.png", "wheat.png"].map(|name| ImageSource::File(folder.path().join(name))).into();
    assert_eq!((row.images, row.earlier[0].images, row.query.as_str()), (images, 1, "Wheat?"));
}

#[test]
fn compressed_files_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let lines = "\u{feff}{\"query\":\"A?\"}\n{\"query\":\"B?\"}\n";
    let gzip = |text: &str| {
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(text.as_bytes()).unwrap();
        packed.finish().unwrap()
    };
    let (begin, end) = lines.split_at(20);
    std::fs::write(root.join("a.jsonl.gz"), gzip(lines)).unwrap();
    std::fs::write(root.join("b.jsonl"), [gzip(begin), gzip(end)].concat()).unwrap();
    std::fs::write(root.join("c.json.zst"), zstd::encode_all(lines.as_bytes(), 3).unwrap())
        .unwrap();
    std::fs::write(root.join("d.csv.gz"), gzip("\u{feff}query;image\n\"A?\";\nB?;\n")).unwrap();
    let expected = ["A?", "B?"].map(|query| Ok((query.to_owned(), 0)));
    for name in ["a.jsonl.gz", "b.jsonl", "c.json.zst", "d.csv.gz"] {
        assert_eq!(read_all(&input(root.join(name))), expected, "{name}");
    }
    assert_eq!(read_all(&input(root.join("*.jsonl*"))).len(), 4);
    let cut = gzip(&lines.repeat(100));
    std::fs::write(root.join("cut.jsonl.gz"), &cut[..cut.len() - 9]).unwrap();
    let last = read_all(&input(root.join("cut.jsonl.gz"))).pop().unwrap();
    assert!(last.unwrap_err().contains("can't be read any further"));
    // Truncated files are marked as such, broken rows are not.
    for (name, text, expected) in [
        ("cut.jsonl.gz", None, true),
        ("half.jsonl", Some("{\"query\":\"A?\"}\n{\"query\":\"B"), true),
        ("half.json", Some("[{\"query\":\"A?\"},{\"query\":\"B?\"}"), true),
        ("half.csv", Some("query,image\nA?,\n\"B?,\n"), true),
        ("broken.jsonl", Some("{\"query\":\"A?\"}\n{\"query\":\"B\n"), false),
        ("broken.csv", Some("query,image\nA?,\nB?\n"), false),
    ] {
        if let Some(text) = text {
            std::fs::write(root.join(name), text).unwrap();
        }
        let last = input(root.join(name)).rows().unwrap().last().unwrap();
        assert_eq!(last.unwrap_err().is_cut_short(), expected, "{name}");
    }
    std::fs::write(root.join("rows.zip"), "PK\u{3}\u{4}").unwrap();
    for (name, says) in [("rows.zip", "unpack it"), ("rows.parquet.gz", "unknown format")] {
        assert!(
            read_all(&input(root.join(name)))[0].as_ref().unwrap_err().contains(says),
            "{name}"
        );
    }
}

#[test]
fn errors_keep_their_causes_and_report_them_once() {
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
    assert!(
        errors[1].to_string().starts_with("row 2: column `messages`: turn 1: "),
        "{}",
        errors[1]
    );
    let gone = input(folder.path().join("gone.parquet")).rows().err().unwrap();
    assert_eq!(
        [error_chain(&errors[1]), error_chain(&gone)],
        [errors[1].to_string(), gone.to_string()]
    );
    assert!(gone.source().is_some_and(<dyn Error>::is::<std::io::Error>), "{gone:?}");
}

#[test]
fn missing_named_columns_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let read_mapped = |name: &str, text: &str, pairs: &[(&str, &str)]| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        let pairs = pairs.iter().map(|(what, column)| ((*what).to_owned(), (*column).to_owned()));
        read_all(&Input { mapping: Mapping::new(pairs).unwrap(), ..input(path) })
    };
    let read = |query: &str, images| Ok((query.to_owned(), images));
    let lines = concat!(
        "{\"question\":\"A?\",\"photo\":\"a.png\",\"tag\":\"t\"}\n",
        "{\"question\":\"B?\",\"photo\":null}\n",
        "{\"question\":\"C?\"}\n",
    );
    let array = format!("[{}]", lines.trim().replace('\n', ","));
    for (name, text) in [("rows.jsonl", lines), ("rows.json", &array)] {
        let rows = read_mapped(name, text, &[("image", "photo"), ("category", "tag")]);
        assert_eq!(rows[..2], [read("A?", 1), read("B?", 0)], "{name}");
        assert_eq!(
            rows[2],
            Err("row 3: --map image=photo: no such column; the columns are question".to_owned())
        );
        for pair in
            [("image", "foto"), ("query", "quetsion"), ("draft", "answer"), ("messages", "turns")]
        {
            let rows = read_mapped(name, text, &[pair]);
            let says = format!(
                "row 1: --map {}={}: no such column; the columns are photo, question, tag",
                pair.0, pair.1
            );
            assert!(
                rows.len() == 3 && rows.iter().all(Result::is_err) && rows[0] == Err(says),
                "{rows:?}"
            );
        }
    }
    let table = "question,photo\nA?,a.png\nB?,\n";
    assert_eq!(
        read_mapped("rows.csv", table, &[("image", "photo")]),
        [read("A?", 1), read("B?", 0)]
    );
    assert!(
        read_mapped("rows.csv", table, &[("image", "foto")])[0]
            .as_ref()
            .unwrap_err()
            .contains("rows.csv: --map image=foto: ")
    );
    // A named column takes precedence over all others.
    let both = "{\"messages\":[{\"role\":\"user\",\"content\":\"A?\"}],\"asked\":\"B?\"}\n";
    assert_eq!(read_mapped("both.jsonl", both, &[("query", "asked")]), [read("B?", 0)]);
    let empty = both.replace("B?", "");
    assert!(
        read_mapped("both.jsonl", &empty, &[("query", "asked")])[0]
            .as_ref()
            .unwrap_err()
            .contains("no query")
    );
}

fn parquet(path: &Path, columns: Vec<(&str, ArrayRef)>) {
    let fields: Vec<Field> = columns
        .iter()
        .map(|(name, column)| Field::new(*name, column.data_type().clone(), true))
        .collect();
    let batch = RecordBatch::try_new(
        Arc::new(Schema::new(fields)),
        columns.into_iter().map(|(_, column)| column).collect(),
    );
    let batch = batch.unwrap();
    let file = std::fs::File::create(path).unwrap();
    let mut writer = parquet::arrow::ArrowWriter::try_new(file, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

#[test]
fn every_type_of_parquet_is_read_or_reported() {
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
    let fixed: ArrayRef =
        Arc::new(FixedSizeListArray::new(item(pair.data_type()), 1, Arc::new(pair.clone()), None));
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
        (
            "dictionary",
            Arc::new(DictionaryArray::<Int32Type>::new(Int32Array::from(vec![0]), text.clone())),
        ),
        ("data URL", Arc::new(StringArray::from(vec![encoded.as_str()]))),
        ("base64", Arc::new(LargeStringArray::from(vec![&encoded[22..]]))),
        ("struct", Arc::new(pair.clone())),
        ("list", list(DataType::List(item(pair.data_type())))),
        ("large list", list(DataType::LargeList(item(pair.data_type())))),
        ("fixed list", fixed.clone()),
        (
            "small numbers",
            Arc::new(FixedSizeListArray::new(item(&DataType::UInt8), length, small, None)),
        ),
    ];
    for (kind, image) in images {
        let path = folder.path().join("rows.parquet");
        let query: ArrayRef = Arc::new(StringViewArray::from(vec!["What?"]));
        parquet(&path, vec![("query", query), ("image", image)]);
        let rows: Vec<Row> = input(path).rows().unwrap().map(|row| row.unwrap()).collect();
        assert_eq!((rows.len(), rows[0].query.as_str()), (1, "What?"), "{kind}");
        let held = match &rows[0].images[..] {
            [ImageSource::Bytes(held)] => held.to_vec(),
            [ImageSource::File(path)] => std::fs::read(path).unwrap(),
            other => panic!("{kind}: {other:?}"),
        };
        assert_eq!(held, bytes, "{kind}");
    }
    // Other types for text and image are errors that name column and type.
    let numbers: ArrayRef = Arc::new(Int32Array::from(vec![3]));
    let list: ArrayRef =
        Arc::new(FixedSizeListArray::new(item(&DataType::Int32), 1, numbers.clone(), None));
    for (query, image, says) in [
        (list.clone(), text.clone(), "column `query` (of type FixedSizeList"),
        (text.clone(), numbers.clone(), "column `image` (of type Int32)"),
    ] {
        let path = folder.path().join("wrong.parquet");
        parquet(&path, vec![("query", query), ("image", image)]);
        let rows = read_all(&input(path));
        assert!(rows.len() == 1 && rows[0].as_ref().unwrap_err().contains(says), "{rows:?}");
    }
    // Nested columns are named with a dot.
    let path = folder.path().join("inside.parquet");
    let meta = StructArray::from(vec![(
        Arc::new(Field::new("asked", DataType::Utf8, true)),
        text.clone(),
    )]);
    let shot: ArrayRef = Arc::new(StringArray::from(vec!["shots/a.PNG"]));
    parquet(&path, vec![("meta", Arc::new(meta)), ("shot", shot)]);
    let mapped = |pairs: &[(&str, &str)]| {
        let pairs = pairs.iter().map(|(what, column)| ((*what).to_owned(), (*column).to_owned()));
        read_all(&Input { mapping: Mapping::new(pairs).unwrap(), ..input(path.clone()) })
    };
    assert_eq!(
        mapped(&[("query", "meta.asked"), ("image", "shot")]),
        [Ok(("a.png".to_owned(), 1))]
    );
    assert!(
        mapped(&[("query", "meta.asked")])[0].as_ref().unwrap_err().contains("--map image=shot")
    );
    assert!(mapped(&[("query", "meta.said")])[0].as_ref().unwrap_err().contains("no such column"));
    // An image in an unknown column is not ignored.
    let path = folder.path().join("photo.parquet");
    parquet(&path, vec![("query", text.clone()), ("photo", Arc::new(pair))]);
    assert!(read_all(&input(path.clone()))[0].as_ref().unwrap_err().contains("--map image=photo"));
    let mapping = Mapping::new([("image".to_owned(), "photo".to_owned())]).unwrap();
    assert_eq!(read_all(&Input { mapping, ..input(path.clone()) }), [Ok(("a.png".to_owned(), 1))]);
    let mapping = Mapping::new([("image".to_owned(), "foto".to_owned())]).unwrap();
    assert!(
        read_all(&Input { mapping, ..input(path) })[0]
            .as_ref()
            .unwrap_err()
            .contains("no such column")
    );
}

#[test]
fn an_image_in_an_unknown_column_is_reported_whatever_its_type() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.parquet");
    let query: ArrayRef = Arc::new(StringArray::from(vec!["What?"]));
    let columns = |bytes: &[u8]| -> [ArrayRef; 4] {
        let item = |data_type| Arc::new(Field::new_list_field(data_type, true));
        let list = |data_type: DataType| -> ArrayRef {
            let values = UInt8Array::from(bytes.to_vec());
            let values = arrow_cast::cast(&values, &data_type).unwrap();
            let size = i32::try_from(bytes.len()).unwrap();
            Arc::new(FixedSizeListArray::new(item(data_type), size, values, None))
        };
        let binary: ArrayRef = Arc::new(BinaryArray::from(vec![bytes]));
        let record = [(Arc::new(Field::new("x", DataType::Binary, false)), binary)];
        [
            Arc::new(FixedSizeBinaryArray::try_from_iter([bytes].into_iter()).unwrap()),
            list(DataType::UInt8),
            list(DataType::Int64),
            Arc::new(StructArray::from(record.to_vec())),
        ]
    };
    for (hidden, other) in columns(&png(1)).into_iter().zip(columns(b"no image")) {
        let data_type = hidden.data_type().clone();
        parquet(&path, vec![("query", query.clone()), ("blob", hidden)]);
        let found = read_all(&input(path.clone())).remove(0);
        assert!(found.is_err_and(|error| error.contains("--map image=blob")), "{data_type}");
        parquet(&path, vec![("query", query.clone()), ("blob", other)]);
        assert_eq!(read_all(&input(path.clone())), [Ok(("What?".to_owned(), 0))], "{data_type}");
    }
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
    for path in
        [root.to_owned(), root.join("data"), root.join("data/*.jsonl"), root.join("*/?.jsonl")]
    {
        assert_eq!(read_all(&input(path.clone())), expected, "{}", path.display());
        assert_eq!(input(path).count(), Some(2));
    }
    assert!(
        read_all(&input(root.join("*.csv")))[0]
            .as_ref()
            .unwrap_err()
            .contains("no file matches this pattern")
    );
    // A folder with images and tables is ambiguous.
    std::fs::write(root.join("a.png"), png(1)).unwrap();
    let error = read_all(&input(root.to_owned())).remove(0).unwrap_err();
    assert!(error.contains("1 images and 2 tables") && error.contains("data/*.jsonl"), "{error}");
    let asked = Input { query: Some("<image>\nWhat?".into()), ..input(root.to_owned()) };
    assert_eq!(read_all(&asked), [Ok(("What?".to_owned(), 1))]);
}

#[test]
fn unread_files_are_counted() {
    let unread = |files: &[&str], query: Option<&str>| {
        let folder = tempfile::tempdir().unwrap();
        for name in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "{\"query\": \"A?\"}").unwrap();
        }
        let input = Input { query: query.map(str::to_owned), ..input(folder.path().to_owned()) };
        input.unread().map_or_else(|error| error.to_string(), |unread| unread.to_string())
    };
    for (files, rows) in [
        (&["a.png", "a.txt", "rows.jsonl", "b.txt"][..], "1 .jsonl, 1 .txt"),
        (&["metadata.jsonl", "train.jsonl", "a.png"], "1 .jsonl"),
        (
            &["a.jsonl", "b.jsonl.xz", "below/c.bz2", "part-0001", "x.0001"],
            "1 .bz2, 1 .xz, 2 without a usual ending",
        ),
        (&["a.jsonl", "b.jsonl.gz", "dataset_infos.json", ".cache/x.bin"], ""),
    ] {
        assert_eq!(unread(files, None), rows, "{files:?}");
    }
    assert_eq!(unread(&["a.png", "rows.csv"], Some("What?")), "1 .csv");
    assert!(
        unread(&["part-0001", "a.xz"], None)
            .ends_with("in it, but 1 .xz, 1 without a usual ending")
    );
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("spark.parquet")).unwrap();
    std::fs::write(folder.path().join("a.parquet"), "").unwrap();
    assert_eq!(
        input(folder.path().join("*.parquet")).unread().unwrap().to_string(),
        "1 folders or links"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn no_record_panics(text in "[\\[\\]{},:\"a1]{0,30}", bytes: Vec<u8>) {
        let folder = tempfile::tempdir().unwrap();
        for name in ["rows.jsonl", "rows.csv", "rows.parquet"] {
            let path = folder.path().join(name);
            std::fs::write(&path, &bytes).unwrap();
            let _ = read_all(&input(path.clone()));
            let field = format!("{{\"messages\":[{{\"role\":\"user\",\"content\":[{text}]}}],\"image\":[{text}]}}");
            std::fs::write(&path, field).unwrap();
            let _ = read_all(&input(path));
        }
    }
}
