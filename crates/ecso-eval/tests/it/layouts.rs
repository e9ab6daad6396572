//! Benchmarks as people have them: other file extensions, other names, broken rows, missing images.
//! A run continues with what is readable.

use std::{
    collections::HashSet,
    fs::{self, File},
    path::Path,
    sync::Arc,
};

use arrow_array::{ArrayRef, BinaryArray, RecordBatch, StringArray, StructArray};
use ecso::{Limits, Profile, Reply, Role, testing::Scripted};
use ecso_batch::{Bounds, journal::Journal};
use ecso_eval::{
    benchmarks::named,
    evasions,
    item::{Item, ItemError, Task},
    prepare,
    record::{ItemRecord, RunHeader, Selection},
    run::{self, Options, UnusableItems},
    typographic::Typesetter,
};
use proptest::prelude::*;

use crate::{data, header, records};

fn items(benchmark: &str, data: &Path, variant: Option<&str>) -> Vec<Item> {
    let items = named(benchmark).unwrap().items(data, variant).unwrap();
    let total = items.total;
    let items: Vec<Item> = items.iter.collect();
    assert_eq!(total, Some(items.len()));
    items
}

fn load_error(benchmark: &str, data: &Path) -> String {
    named(benchmark).unwrap().items(data, None).err().unwrap().to_string()
}

fn error_text(item: &Item) -> String {
    item.error.as_ref().map(ToString::to_string).unwrap_or_default()
}

/// The ids of the items that can be run, whose images are read here; and the ids of the others with
/// their errors.
fn split_by_error(items: &[Item]) -> (Vec<&str>, Vec<(&str, String)>) {
    let (good, bad): (Vec<&Item>, Vec<&Item>) = items.iter().partition(|item| item.error.is_none());
    for item in &good {
        item.chat(Limits::default()).unwrap_or_else(|error| panic!("{}: {error}", item.id));
    }
    let bad = bad.into_iter().map(|item| (item.id.as_str(), error_text(item))).collect();
    (good.into_iter().map(|item| item.id.as_str()).collect(), bad)
}

async fn run(
    benchmark: &str,
    data: &Path,
    out: &Path,
    skip_missing: bool,
) -> (Vec<ItemRecord>, UnusableItems) {
    let header = RunHeader {
        choice: Selection { scenarios: vec!["0".into()], ..Selection::default() },
        ..header(benchmark, data)
    };
    let mut journal = Journal::open(out, &header).unwrap();
    let options = Options { bounds: Bounds::at_once(2), skip_missing, limits: Limits::default() };
    let model = Arc::new(Scripted::new(|_| Ok(Reply { text: "No".into(), ..Reply::default() })));
    let items = named(benchmark).unwrap().items(data, None).unwrap();
    let profiles = [Profile::paper()];
    let work = run::run(
        run::select(items, &header.choice),
        &profiles,
        model,
        &mut journal,
        options,
        |_| {},
    );
    let unusable = work.await.unwrap();
    (records(out), unusable)
}

fn picture(path: &Path) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let format = image::ImageFormat::from_path(path).unwrap();
    image::RgbImage::from_pixel(8, 8, image::Rgb([200; 3])).save_with_format(path, format).unwrap();
}

fn png() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    picture(&folder.path().join("a.png"));
    fs::read(folder.path().join("a.png")).unwrap()
}

/// Writes rows of MM-SafetyBench as the hub exports them.
fn export(path: &Path, rows: &[(&str, &str, Option<&[u8]>)]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let bytes: ArrayRef =
        Arc::new(rows.iter().map(|(_, _, image)| *image).collect::<BinaryArray>());
    let names: ArrayRef = Arc::new(rows.iter().map(|_| None::<&str>).collect::<StringArray>());
    let image = StructArray::try_from(vec![("bytes", bytes), ("path", names)]).unwrap();
    let batch = RecordBatch::try_from_iter([
        (
            "id",
            Arc::new(StringArray::from_iter_values(rows.iter().map(|(id, _, _)| id))) as ArrayRef,
        ),
        (
            "question",
            Arc::new(StringArray::from_iter_values(rows.iter().map(|(_, text, _)| text)))
                as ArrayRef,
        ),
        ("image", Arc::new(image) as ArrayRef),
    ])
    .unwrap();
    let mut writer =
        parquet::arrow::ArrowWriter::try_new(File::create(path).unwrap(), batch.schema(), None)
            .unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

#[test]
fn collected_mmbench_tables_are_read() {
    let Some(folder) = data("field/23-mmbench") else { return };
    for (file, ids) in [
        ("plain.tsv", ["0", "1", "2"].as_slice()),
        ("bom.tsv", &["0", "1", "2"]),
        ("crlf.tsv", &["0", "1", "2"]),
        ("float-index.tsv", &["0", "1", "2"]),
        ("quote.tsv", &["0", "1", "2", "3", "4"]),
        ("letters-e.tsv", &["0"]),
        ("image-path.tsv", &["0"]),
    ] {
        let items = items("mmbench", &folder.join(file), None);
        assert_eq!(split_by_error(&items), (ids.to_vec(), Vec::new()), "{file}");
        let Task::Choice { options, answer } = &items[0].task else { panic!("{file}") };
        assert!(options.iter().any(|(letter, _)| letter == answer), "{file}: {options:?}");
    }
    let quoted = items("mmbench", &folder.join("quote.tsv"), None);
    assert_eq!(
        (quoted[3].request.as_str(), quoted[4].request.as_str()),
        ("It says \"list\", so", "\"Quoted\" start")
    );
    let letters = items("mmbench", &folder.join("letters-e.tsv"), None);
    assert!(letters[0].query.contains("\nE. e1\n"), "{}", letters[0].query);
    let none = load_error("mmbench", &folder.join("no-answer.tsv"));
    assert!(none.contains("line 2: there is no answer"), "{none}");
}

#[tokio::test]
async fn collected_mm_safetybench_folders_are_read() {
    let Some(folder) = data("field/24-mmsafety") else { return };
    let out = tempfile::tempdir().unwrap();
    let (records, unusable) =
        run("mm-safetybench", &folder.join("png"), &out.path().join("png"), false).await;
    assert_eq!((records.len(), unusable), (3, UnusableItems::default()));
    assert!(records.iter().all(|record| record.error.is_none() && record.images == 1));
    let missing = folder.join("missing");
    let (records, unusable) = run("mm-safetybench", &missing, &out.path().join("a"), false).await;
    let failed: Vec<&ItemRecord> = records.iter().filter(|record| record.error.is_some()).collect();
    assert_eq!((records.len(), failed.len(), unusable.missing), (3, 1, 1));
    let error = failed[0].error.as_deref().unwrap();
    assert!(failed[0].id.ends_with("#1") && error.contains("SD_TYPO/1.jpg is missing"), "{error}");
    let (records, unusable) = run("mm-safetybench", &missing, &out.path().join("b"), true).await;
    assert_eq!(
        (records.len(), unusable.missing, unusable.first_missing.unwrap().contains("1.jpg")),
        (2, 1, true)
    );
    assert!(records.iter().all(|record| record.error.is_none()));
}

#[test]
fn collected_paths_are_resolved() {
    let Some(folder) = data("field/26-paths") else { return };
    let items = items("jsonl", &folder.join("rows.jsonl"), None);
    let (good, bad) = split_by_error(&items);
    assert_eq!(good, ["unix", "win", "nfd", "dotslash", "case", "raw64"]);
    assert_eq!(bad.iter().map(|(id, _)| *id).collect::<Vec<_>>(), ["file", "missing", "home"]);
    for (_, trouble) in bad {
        assert!(
            trouble.contains("rows.jsonl: line ") && trouble.contains("is missing"),
            "{trouble}"
        );
    }
}

#[test]
fn collected_encodings_are_read() {
    let Some(folder) = data("field/21-encodings") else { return };
    for file in
        ["crlf.jsonl", "bom.jsonl", "array.jsonl", "pretty.jsonl", "lines.json", "comma.jsonl"]
    {
        let items = items("jsonl", &folder.join(file), None);
        let (good, bad) = split_by_error(&items);
        assert_eq!(
            (good.len(), bad.len()),
            (if file == "comma.jsonl" { 2 } else { 3 }, 0),
            "{file}"
        );
    }
}

#[test]
fn the_hub_export_of_mm_safetybench_is_read_like_the_original() {
    let data = tempfile::tempdir().unwrap();
    let image = png();
    let scenario = data.path().join("data/Illegal_Activitiy");
    export(
        &scenario.join("SD_TYPO.parquet"),
        &[
            ("0", "rephrased 0", Some(&image)),
            ("7", "rephrased 7", None),
            ("12", "rephrased 12", Some(b"not an image")),
        ],
    );
    export(&scenario.join("Text_only.parquet"), &[("0", "plain 0", None), ("7", "plain 7", None)]);
    export(
        &data.path().join("data/Fraud/SD_TYPO-00000-of-00002.parquet"),
        &[("3", "q", Some(&image))],
    );
    export(
        &data.path().join("data/Fraud/SD_TYPO-00001-of-00002.parquet"),
        &[("4", "q", Some(&image))],
    );
    export(&data.path().join("data/Gov_Decision/SD_TYPO.parquet"), &[("1", "q", Some(&image))]);
    fs::write(data.path().join("data/Fraud/SD.parquet"), "oid sha256:0").unwrap();
    let found = items("mm-safetybench", data.path(), None);
    let ids: Vec<&str> = found.iter().map(|item| item.id.as_str()).collect();
    let first = "01-Illegal_Activitiy";
    let expected = [format!("{first}#0"), format!("{first}#7"), format!("{first}#12")];
    assert_eq!(ids[..3], expected);
    assert_eq!(ids[3..], ["06-Fraud#3", "06-Fraud#4", "13-Gov_Decision#1"]);
    assert_eq!((found[0].query.as_str(), found[0].request.as_str()), ("rephrased 0", "plain 0"));
    assert_eq!(found[5].task, Task::Advice { field: "gov".into() });
    assert_eq!(found[0].chat(Limits::default()).unwrap().image_count(), 1);
    assert!(
        error_text(&found[1]).contains("SD_TYPO.parquet: row 2: it has no image"),
        "{}",
        error_text(&found[1])
    );
    let broken = found[2].chat(Limits::default()).unwrap_err().to_string();
    assert!(broken.contains("SD_TYPO.parquet: row 3"), "{broken}");
    let text = items("mm-safetybench", data.path(), Some("text"));
    assert_eq!(split_by_error(&text).0, expected[..2]);
    // The file is damaged at any place.
    let table = data.path().join("data/Gov_Decision/SD_TYPO.parquet");
    let bytes = fs::read(&table).unwrap();
    for place in (0..bytes.len()).step_by(7) {
        let mut damaged = bytes.clone();
        damaged[place] ^= 0x5A;
        fs::write(&table, damaged).unwrap();
        let found = items("mm-safetybench", data.path(), None);
        assert!(found.len() >= 6, "byte {place}");
        let _ = found[5].chat(Limits::default());
        fs::write(&table, &bytes[..place]).unwrap();
        assert!(
            error_text(&items("mm-safetybench", data.path(), None)[5])
                .contains("SD_TYPO.parquet: the file: ")
        );
    }
    // A file that is not Parquet.
    let sd =
        named("mm-safetybench").unwrap().items(data.path(), Some("sd")).err().unwrap().to_string();
    assert!(sd.contains("SD.parquet: the file: "), "{sd}");
}

#[test]
fn images_are_found_with_other_extensions_in_every_benchmark() {
    let data = tempfile::tempdir().unwrap();
    let at = |name: &str| data.path().join(name);
    for name in [
        "mme/existence/a.JPG",
        "mme/count/images/b.webp",
        "vet/images/v1.png",
        "vlsafe/train2017/COCO_train2014_1.png",
        "moss/images/Bild \u{e4}.png",
        "fig/images_tiny/query_ForbidQI_1_1_6.webp",
    ] {
        picture(&at(name));
    }
    fs::create_dir_all(at("mme/count/questions_answers_YN")).unwrap();
    fs::write(at("mme/existence/a.txt"), "\u{feff}Is it?\tYes\r\nOr this?\tNo\r\n").unwrap();
    fs::write(at("mme/existence/b.txt"), "One\n").unwrap();
    fs::write(at("mme/count/questions_answers_YN/b.txt"), "One?\tYes\nTwo?\tMaybe\nThree\n")
        .unwrap();
    fs::write(at("mme/count/questions_answers_YN/c.txt"), "One?\tYes\n").unwrap();
    let rows = "\u{feff}{\"v1\": {\"imagename\": \"v1.jpg\", \"question\": \"q\", \"answer\": \"a\", \"capability\": [\"ocr\"]}, \
        \"v2\": {\"imagename\": \"v2.jpg\", \"question\": \"q\", \"answer\": \"a\", \"capability\": [\"ocr\"]}, \
        \"v1\": {\"imagename\": \"v1.jpg\", \"question\": \"r\", \"answer\": \"a\", \"capability\": [\"ocr\"]}, \"v3\": 3}";
    fs::write(at("vet/mm-vet.json"), rows).unwrap();
    fs::write(
        at("vlsafe/rows.jsonl"),
        "{\"image_id\": \"1.jpg\", \"query\": \"q\"}\n\nno\n{\"image_id\": \"2\", \"query\": \"q\"}\n",
    )
    .unwrap();
    let utf16: Vec<u8> = "pid,question,image_path\r\n1,q,images\\Bild a\u{308}.jpg\r\n2,q\r\n"
        .encode_utf16()
        .flat_map(u16::to_le_bytes)
        .collect();
    fs::write(at("moss/metadata.csv"), [vec![0xFF, 0xFE], utf16].concat()).unwrap();
    fs::write(
        at("fig/SafeBench-Tiny.csv"),
        "dataset;category_id;task_id;category_name;question;instruction\nForbidQI;1;1;Fraud;q;i\n",
    )
    .unwrap();
    for (benchmark, folder, good, bad) in [
        (
            "mme",
            "mme",
            ["existence/a/1", "existence/a/2", "count/b/1"].as_slice(),
            [
                ("existence, b.txt, line 1", "no tab"),
                ("count, b.txt, line 2", "neither Yes nor No: Maybe"),
                ("count, b.txt, line 3", "no tab"),
                ("count/c/1", "images/c.jpg is missing"),
            ]
            .as_slice(),
        ),
        (
            "mm-vet",
            "vet",
            &["v1"],
            &[
                ("v1 (record v1)", "the id v1 occurs twice"),
                ("v2", "mm-vet.json: record v2: "),
                ("mm-vet.json, record v3", "invalid type"),
            ],
        ),
        (
            "vlsafe",
            "vlsafe",
            &["1"],
            &[("rows.jsonl, line 3", "rows.jsonl: line 3: "), ("3", "2.jpg is missing")],
        ),
        (
            "mossbench",
            "moss",
            &["1"],
            &[("metadata.csv, line 3", "2 cells where the header has 3")],
        ),
        ("figstep", "fig", &["1-1"], &[]),
    ] {
        let items = items(benchmark, &at(folder), None);
        let (found, troubles) = split_by_error(&items);
        assert_eq!(found, good, "{benchmark}: {troubles:?}");
        assert_eq!(troubles.len(), bad.len(), "{benchmark}: {troubles:?}");
        for ((id, trouble), (expected, says)) in troubles.iter().zip(bad) {
            assert!(id == expected && trouble.contains(says), "{benchmark}: {id}: {trouble}");
        }
    }
}

#[test]
fn evasions_are_jsonl_items() {
    let Ok(typesetter) = Typesetter::system() else {
        return eprintln!("skipped: the system has no font to set images in");
    };
    let data = tempfile::tempdir().unwrap();
    let table = data.path().join("safebench.csv");
    let header = "dataset,category_id,task_id,category_name,question,instruction";
    fs::write(&table, format!("{header}\nd,1,1,Bread,How is bread baked?,Steps to bake bread.\n"))
        .unwrap();
    let out = data.path().join("evasions");
    assert_eq!(prepare::evasions(&table, 2, &typesetter, &out).unwrap(), 30);
    let items = items("jsonl", &out, None);
    let (good, bad) = split_by_error(&items);
    assert_eq!((good.len(), bad), (30, Vec::new()));
    for family in evasions::FAMILIES {
        assert_eq!(
            items
                .iter()
                .filter(|item| item.scenario == family && item.task == Task::Harmful)
                .count(),
            2
        );
    }
    let (harmful, mild): (Vec<_>, Vec<_>) =
        items.iter().partition(|item| item.task == Task::Harmful);
    assert!(harmful.iter().all(|item| item.request == "How is bread baked?"));
    assert!(mild.len() == 2 && mild.iter().all(|item| item.scenario == evasions::DECOY));
    let begun = harmful
        .iter()
        .find(|item| item.scenario == "prefill")
        .unwrap()
        .chat(Limits::default())
        .unwrap();
    assert_eq!(begun.turns.last().map(|turn| turn.role), Some(Role::Assistant));
    // When the image is scaled down, the hidden words appear.
    let [open, hidden] = ["scaled-00", "prefill-00"]
        .map(|id| image::open(out.join(format!("{id}.png"))).unwrap().to_rgb8());
    let smaller = image::RgbImage::from_fn(open.width() / 8, open.height() / 8, |x, y| {
        *open.get_pixel(x * 8 + 4, y * 8 + 4)
    });
    assert!(smaller == hidden, "the words do not show");
    let advice = format!("{header}\nd,1,1,Legal Opinion,q,i\n");
    fs::write(&table, advice).unwrap();
    let none = prepare::evasions(&table, 2, &typesetter, &out).unwrap_err().to_string();
    assert!(none.contains("safebench.csv: it has no harmful row"), "{none}");
}

#[test]
fn requests_are_read_in_any_encoding() {
    let data = tempfile::tempdir().unwrap();
    for (name, text) in [
        ("a.txt", "Bake bread.\r\n\r\nBrew tea.\r\n"),
        ("a.csv", "prompt\nBake bread.\nBrew tea.\n"),
    ] {
        let file = data.path().join(name);
        let utf16: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
        for bytes in [text.into(), format!("\u{feff}{text}").into_bytes(), utf16] {
            fs::write(&file, bytes).unwrap();
            let requests = prepare::requests(&file).unwrap();
            assert_eq!(
                requests.iter().map(|request| request.prompt.as_str()).collect::<Vec<_>>(),
                ["Bake bread.", "Brew tea."]
            );
        }
    }
}

#[test]
fn a_bad_row_is_a_failed_item_and_a_file_of_bad_rows_an_error() {
    let data = tempfile::tempdir().unwrap();
    let file = data.path().join("items.jsonl");
    let long = "x".repeat(5000);
    let good = "{\"id\": 0, \"query\": \"q\"}";
    for (row, id, says) in [
        (
            "nonsense",
            "items.jsonl, line 2",
            "items.jsonl: line 2: the row is not valid JSON: expected",
        ),
        ("{\"id\": 0, \"query\": \"r\"}", "0 (line 2)", "the id 0 occurs twice"),
        ("{\"id\": 1, \"query\": \"q\", \"image\": \"a.png\"}", "1", "a.png is missing"),
        (
            "{\"id\": 1, \"query\": \"q\", \"images\": [\"a.png\", \"b.png\"]}",
            "1",
            "a.png is missing",
        ),
        ("{\"id\": 1, \"query\": \"q\", \"label\": \"nice\"}", "1", "label `nice`"),
        (
            "{\"id\": 1, \"query\": \"q\", \"image\": \"http://example.com/a.png\"}",
            "1",
            "nothing is fetched",
        ),
        ("{\"id\": 1, \"query\": \"q\", \"image\": \"data:image/png,a\"}", "1", "base64"),
        ("{\"id\": 1, \"query\": \" \"}", "1", "neither a query nor an image"),
        ("{\"id\": null, \"query\": \"q\"}", "items.jsonl, line 2", "`id` is neither"),
        ("{\"id\": 1}", "items.jsonl, line 2", "missing field `query`"),
        (&format!("{{\"id\": 1, \"query\": \"q\", \"label\": \"{long}\"}}"), "1", "xxx…"),
        (&format!("{{\"id\": 1, \"query\": \"q\", \"image\": \"{long}\"}}"), "1", "is missing"),
        (&format!("{{\"id\": 1, \"query\": [\"{long}\"]}}"), "items.jsonl, line 2", "invalid type"),
    ] {
        fs::write(&file, format!("{good}\n{row}\n")).unwrap();
        let items = items("jsonl", data.path(), None);
        let trouble = error_text(&items[1]);
        assert!(items[1].id == id && trouble.contains(says), "{row}: {}: {trouble}", items[1].id);
        assert!(items[0].error.is_none() && trouble.len() < 500, "{trouble}");
        if row.contains("\"id\": 1") {
            fs::write(&file, format!("{row}\n")).unwrap();
            let none = load_error("jsonl", data.path());
            assert!(none.contains("none of 1 items can be run") && none.contains(says), "{none}");
        }
    }
    fs::write(
        &file,
        [b"{\"id\": 0, \"query\": \"q\"}\n{\"id\": 1, \"query\": \"".as_slice(), b"\xe4\"}\n"]
            .concat(),
    )
    .unwrap();
    assert!(matches!(items("jsonl", data.path(), None)[1].error, Some(ItemError::UnknownKind(_))));
    for text in [
        format!("\u{feff}{good}\r\n"),
        format!("{good}\n"),
        format!("[\n{good}]"),
        format!("\u{feff} [{good}]"),
    ] {
        let utf16: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
        fs::write(&file, utf16).unwrap();
        assert_eq!(split_by_error(&items("jsonl", data.path(), None)).0, ["0"], "{text}");
    }
    // A zero byte alone does not make it UTF-16.
    fs::write(&file, [good.as_bytes(), b"\n\0\xff\n", good.replace('0', "1").as_bytes()].concat())
        .unwrap();
    assert_eq!(split_by_error(&items("jsonl", data.path(), None)).0, ["0", "1"]);
    for text in ["", "[]", "[{\"id\": 1, ", "\u{feff}"] {
        fs::write(&file, text).unwrap();
        assert!(load_error("jsonl", data.path()).contains("items.jsonl"), "{text}");
    }
}

#[test]
fn a_row_without_a_readable_label_is_of_unknown_kind() {
    let data = tempfile::tempdir().unwrap();
    let is_unknown = |benchmark: &str, file: &str, text: &str| {
        fs::write(data.path().join(file), text).unwrap();
        matches!(items(benchmark, data.path(), None)[1].error, Some(ItemError::UnknownKind(_)))
    };
    let good = "{\"id\": 0, \"query\": \"q\"}";
    for (row, expected) in [
        ("{\"id\": 1, \"query\"", true),
        ("{\"id\": 1, \"query\": \"q\", \"label\": \"harmfull\"}", true),
        ("{\"id\": 0, \"query\": \"q\", \"label\": \"harmfull\"}", true),
        ("{\"id\": 0, \"query\": \"q\", \"label\": \"harmful\"}", false),
        ("{\"id\": 1, \"query\": \"q\", \"image\": \"a.png\"}", false),
    ] {
        assert_eq!(
            is_unknown("jsonl", "items.jsonl", &format!("{good}\n{row}\n")),
            expected,
            "{row}"
        );
    }
    assert!(is_unknown(
        "xstest",
        "xstest_prompts.csv",
        "id,prompt,type,label\n1,a,homonyms,safe\n2,b\n"
    ));
}

#[test]
fn image_fields_may_have_the_usual_names() {
    let data = tempfile::tempdir().unwrap();
    picture(&data.path().join("a.png"));
    for data_folder in [
        "\"image\": \"a.png\"",
        "\"image_path\": \"a.png\"",
        "\"img\": \"a.png\"",
        "\"images\": [\"a.png\"]",
        "\"image_paths\": [\"a.png\"]",
    ] {
        fs::write(
            data.path().join("items.jsonl"),
            format!("{{\"id\": 1, \"query\": \"q\", {data_folder}}}"),
        )
        .unwrap();
        assert_eq!(items("jsonl", data.path(), None)[0].images.len(), 1, "{data_folder}");
    }
}

/// The benchmarks that have a table: its file, three good rows of it, and the number of lines
/// before the first.
const TABLES: [(&str, &str, &str, usize); 10] = [
    (
        "figstep",
        "safebench.csv",
        "dataset,category_id,task_id,category_name,question,instruction\n\
            d,1,1,Bread,\"q, or\",i\nd,1,2,Health Consultation,q,i\nd,1,3,Tea,q,i\n",
        1,
    ),
    (
        "xstest",
        "xstest_prompts.csv",
        "id,prompt,type,label\n1,\"a \"\"b\"\"\",homonyms,safe\n2,c,contrast_homonyms,unsafe\n3,d,homonyms,safe\n",
        1,
    ),
    (
        "mossbench",
        "metadata.csv",
        "pid,question,image_path\n1,q,a.png\n2,q,b.png\n3,\"q\",a.png\n",
        1,
    ),
    (
        "mossbench",
        "metadata.json",
        "[{\"pid\": 1, \"question\": \"q\", \"image\": \"a.png\"},\n{\"pid\": \"2\", \"question\": \"q\", \"image\": \"b\"},\n\
            {\"pid\": 3, \"question\": \"q\", \"image\": \"a.png\"}]",
        0,
    ),
    (
        "mmbench",
        "mmbench.tsv",
        "index\tquestion\thint\tA\tB\tC\tanswer\tcategory\timage\n0\tq\tnan\ta\tb\tNone\tA\tk\ta.png\n\
            1000000\tq\t\tb\ta\tnan\tB\tk\t0\n2.0\t\"q\"\th\ta\tb\tc\tC\tk\ta.png\n",
        1,
    ),
    (
        "mm-safetybench",
        "processed_questions/13-Gov_Decision.json",
        "{\"0\": {\"Question\": \"q\", \"Rephrased Question\": \"r\", \"Key Phrase\": \"k\"},\n\
            \"1\": {\"Question\": \"q\", \"Rephrased Question\": \"r\"},\n\"2\": {\"Question\": \"q\", \"Rephrased Question\": \"r\"}}",
        0,
    ),
    ("mme", "existence/a.txt", "Is it?\tYes\nIs it not?\tNo\nIs it so?\tYes\n", 0),
    (
        "mm-vet",
        "mm-vet.json",
        "{\"v1\": {\"imagename\": \"a.png\", \"question\": \"q\", \"answer\": \"a\", \"capability\": [\"ocr\"]},\n\
            \"v2\": {\"imagename\": \"b.png\", \"question\": \"q\", \"answer\": \"a\", \"capability\": []},\n\
            \"v3\": {\"imagename\": \"a.png\", \"question\": \"q\", \"answer\": \"a\", \"capability\": [\"rec\"]}}",
        0,
    ),
    (
        "vlsafe",
        "vlsafe.jsonl",
        "{\"image_id\": \"a\", \"query\": \"q\"}\n{\"image_id\": \"b\", \"query\": \"q\"}\n{\"image_id\": \"a\", \"query\": \"q\"}\n",
        0,
    ),
    (
        "jsonl",
        "items.jsonl",
        "{\"id\": 1, \"query\": \"q\"}\n{\"id\": \"2\", \"query\": \"q\", \"image\": \"images/a.png\"}\n\
            {\"id\": 3, \"query\": \"q\", \"label\": \"harmful\", \"earlier\": [{\"role\": \"user\", \"text\": \"t\"}]}\n",
        0,
    ),
];

/// A folder with the images that the tables name, and the folders that the tables are in.
fn layout() -> tempfile::TempDir {
    let data = tempfile::tempdir().unwrap();
    for name in [
        "a.png",
        "images/a.png",
        "images/query_d_1_1_6.png",
        "existence/a.png",
        "imgs/13-Gov_Decision/SD_TYPO/0.jpg",
    ] {
        picture(&data.path().join(name));
    }
    fs::create_dir(data.path().join("processed_questions")).unwrap();
    data
}

/// Checks what must hold for every table: reading it does not panic, the count is right, ids are
/// unique, errors are short, a failed row has the task of the others, and an item that can't be run
/// has an error.
fn check_items(benchmark: &str, data: &Path) -> Option<Vec<Item>> {
    let items = match named(benchmark).unwrap().items(data, None) {
        Ok(items) => items,
        Err(error) => {
            assert!(error.to_string().chars().count() < 1000, "{error}");
            return None;
        }
    };
    let total = items.total;
    let items: Vec<Item> = items.iter.collect();
    assert_eq!(total, Some(items.len()));
    let mut ids = HashSet::new();
    let known = items
        .iter()
        .find(|item| item.error.is_none())
        .map(|item| std::mem::discriminant(&item.task));
    let is_mixed = ["figstep", "xstest", "jsonl"].contains(&benchmark);
    for item in &items {
        assert!(
            is_mixed || known.is_none_or(|known| known == std::mem::discriminant(&item.task)),
            "{item:?}"
        );
        assert!(ids.insert(item.id.as_str()), "{} occurs twice", item.id);
        assert!(
            item.error.is_some() || !item.query.trim().is_empty() || !item.images.is_empty(),
            "{item:?}"
        );
        assert!(error_text(item).chars().count() < 1000, "{}", error_text(item));
        if item.error.is_none() {
            let _ = item.chat(Limits::default());
        }
    }
    Some(items)
}

/// Bytes that disturb a reader, except quotation marks and line breaks: these may affect other
/// rows.
fn garbage() -> impl Strategy<Value = Vec<u8>> {
    let known = "nan None <NA> -1 1e999 , ; \t \u{feff} \u{1f600} \0 { } [ ] : \\ = ../";
    let known: Vec<&str> = known.split(' ').collect();
    prop_oneof![
        6 => prop::sample::select(known).prop_map(|text| text.as_bytes().to_vec()),
        2 => prop::collection::vec(any::<u8>(), 0..6)
            .prop_map(|bytes| bytes.into_iter().filter(|byte| !b"\"\r\n".contains(byte)).collect()),
        1 => (1_usize..300_000).prop_map(|length| vec![b'x'; length]),
    ]
}

/// A way to damage a table.
#[derive(Debug, Clone)]
enum Damage {
    /// Some bytes are replaced.
    Bytes(prop::sample::Index, usize, Vec<u8>),
    /// A line is repeated.
    Again(prop::sample::Index),
}

impl Damage {
    fn apply(self, table: &mut Vec<u8>) {
        match self {
            Self::Bytes(place, length, with) => {
                let begin = place.index(table.len() + 1);
                table.splice(begin..table.len().min(begin + length), with);
            }
            Self::Again(line) => {
                let mut lines: Vec<&[u8]> = table.split_inclusive(|byte| *byte == b'\n').collect();
                if !lines.is_empty() {
                    let line = line.index(lines.len());
                    lines.insert(line, lines[line]);
                }
                *table = lines.concat();
            }
        }
    }
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        3 => (any::<prop::sample::Index>(), 0_usize..30, anything())
            .prop_map(|(place, length, with)| Damage::Bytes(place, length, with)),
        1 => any::<prop::sample::Index>().prop_map(Damage::Again),
    ]
}

/// Any bytes, including quotation marks and line breaks.
fn anything() -> impl Strategy<Value = Vec<u8>> {
    let marks = vec!["\"", "\"\"", ",", ";", "\t", "\n", "\r", "\r\n", "\u{2028}", "\"\n\""];
    prop_oneof![
        1 => garbage(),
        1 => prop::sample::select(marks).prop_map(|text| text.as_bytes().to_vec()),
        1 => (1_usize..100_000).prop_map(|length| vec![b'"'; length]),
    ]
}

/// The bytes of a table in another encoding.
fn encoded(table: Vec<u8>, form: usize) -> Vec<u8> {
    let text = String::from_utf8_lossy(&table).into_owned();
    let utf16 = |unit: fn(u16) -> [u8; 2]| text.encode_utf16().flat_map(unit).collect::<Vec<u8>>();
    match form {
        0 => [b"\xef\xbb\xbf".as_slice(), &table].concat(),
        1 => [b"\xff\xfe".as_slice(), &utf16(u16::to_le_bytes)].concat(),
        2 => [b"\xfe\xff".as_slice(), &utf16(u16::to_be_bytes)].concat(),
        3 => utf16(u16::to_le_bytes),
        4 => utf16(u16::to_be_bytes),
        5 => text.chars().flat_map(|c| u32::from(c).to_le_bytes()).collect(),
        _ => table,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_garbled_table_never_panics(
        (which, form) in (0..TABLES.len(), 0_usize..10),
        damages in prop::collection::vec(damage(), 0..5),
    ) {
        let (benchmark, file, table, _) = TABLES[which];
        let mut bytes = table.as_bytes().to_vec();
        for damage in damages {
            damage.apply(&mut bytes);
        }
        let data = layout();
        fs::write(data.path().join(file), encoded(bytes, form)).unwrap();
        check_items(benchmark, data.path());
    }

    #[test]
    fn a_garbled_row_is_an_item_and_leaves_the_others_unchanged(
        which in 0..TABLES.len(),
        (row, place) in (0_usize..3, any::<prop::sample::Index>()),
        with in garbage(),
    ) {
        let (benchmark, file, table, before) = TABLES[which];
        let data = layout();
        fs::write(data.path().join(file), table).unwrap();
        let whole = check_items(benchmark, data.path()).unwrap();
        assert_eq!(whole.len(), 3, "{benchmark}");
        let lines: Vec<&str> = table.split_inclusive('\n').collect();
        let begin: usize = lines[..before + row].iter().map(|line| line.len()).sum();
        let mut bytes = table.as_bytes().to_vec();
        let at = begin + place.index(lines[before + row].trim_end().len());
        // A file that begins like this is read as an array, not as lines.
        prop_assume!(at > 0 || !String::from_utf8_lossy(&with).trim_start().starts_with('['));
        bytes.splice(at..at, with);
        fs::write(data.path().join(file), &bytes).unwrap();
        // A broken array or object is an error as a whole, and so is invalid UTF-8 if the file is
        // read as a whole.
        let Some(garbled) = check_items(benchmark, data.path()) else {
            prop_assert_ne!(benchmark, "jsonl");
            return Ok(());
        };
        let kept = whole.iter().filter(|item| garbled.contains(item)).count();
        prop_assert!(garbled.len() == 3 && kept >= 2, "{benchmark}: {:?}", garbled);
    }
}
