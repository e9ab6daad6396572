//! Datasets: every layout has one placeholder per image, and can be read as an input again.

use std::{collections::BTreeMap, path::Path};

use base64::{Engine, prelude::BASE64_STANDARD};
use ecso_data::{
    generate::RowOutcome,
    input::{Input, Mapping},
    manifest::Packing,
    pack::pack,
    record::Shard,
    row::{ImageSource, Row},
};
use parquet::file::reader::{FileReader, SerializedFileReader};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::data::{BOUNDS, go, input, packing, png, records};

/// A turn: role, text, number of images before it, and whether one is within the text.
type EarlierTurn = (&'static str, String, usize, bool);

fn turns() -> impl Strategy<Value = Vec<EarlierTurn>> {
    // Texts with spaces, placeholders and quotes.
    let text = "(a|B|é|\\.|\\?| |\n|\"|\\\\|\\{|the image|<|>|&lt;image&gt;|</video>){0,12}";
    let who = prop::sample::select(vec!["user", "user", "user", "assistant", "system"]);
    prop::collection::vec((who, text, 0..3_usize, any::<bool>()), 0..5)
}

/// Answers that contain placeholders.
const SPELLED: &str =
    "words about <image>, <video>, <|image_pad|>, <audio>, <img>a.png</img> and <image></image>";

/// Rows of conversations with images as data URLs. Every second draft is rude.
fn lines(rows: &[Vec<EarlierTurn>]) -> String {
    let mut number = 0;
    let mut image = || {
        number += 1;
        let url = format!("data:image/png;base64,{}", BASE64_STANDARD.encode(png(number)));
        json!({"type": "image_url", "image_url": {"url": url}})
    };
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        let mut messages = Vec::new();
        let query = ("user", "query".to_owned(), 1, false);
        for (who, said, images, is_midst) in row.iter().chain([&query]) {
            let images = if *who == "user" { *images } else { 0 };
            let mut parts: Vec<Value> = (0..images).map(|_| image()).collect();
            parts.push(json!({"type": "text", "text": format!("a rude {said}")}));
            if *is_midst && *who == "user" {
                parts.extend([image(), json!({"type": "text", "text": "and more"})]);
            }
            messages.push(json!({"role": who, "content": parts}));
        }
        let mut row = json!({"id": index, "messages": messages});
        if index > 0 {
            row["draft"] =
                format!("{} {SPELLED}", if index.is_multiple_of(2) { "rude" } else { "plain" })
                    .into();
        }
        text.push_str(&row.to_string());
        text.push('\n');
    }
    text
}

fn bytes(picture: &ImageSource) -> Vec<u8> {
    match picture {
        ImageSource::Bytes(bytes) => bytes.to_vec(),
        ImageSource::File(path) => std::fs::read(path).unwrap(),
        ImageSource::Url(url) => panic!("{url}"),
    }
}

/// The texts and images of a row, without roles.
fn content(row: &Row) -> (String, Vec<Vec<u8>>) {
    let texts = row.earlier.iter().map(|said| said.text.as_str()).chain([row.query.as_str()]);
    let texts: Vec<&str> = texts.filter(|text| !text.is_empty()).collect();
    (texts.join("\n"), row.images.iter().map(bytes).collect())
}

fn read(input: &Input) -> Vec<Row> {
    input.rows().unwrap().map(|row| row.unwrap()).collect()
}

/// The samples in a file of JSON lines or in an array.
fn samples(path: &Path) -> Vec<Value> {
    let Ok(text) = std::fs::read_to_string(path) else { return Vec::new() };
    if text.starts_with('[') {
        return serde_json::from_str(&text).unwrap();
    }
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn marks(of: &Value) -> usize {
    of.to_string().matches("<image>").count()
}

/// The roles of the turns, in order.
fn speakers<'a>(turns: &'a Value, key: &str) -> Vec<&'a str> {
    turns.as_array().unwrap().iter().map(|turn| turn[key].as_str().unwrap()).collect()
}

/// Whether user and model alternate, the user first.
fn alternate(speakers: &[&str], user: &str) -> bool {
    speakers
        .iter()
        .enumerate()
        .all(|(place, speaker)| (*speaker == user) == place.is_multiple_of(2))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn packed_datasets_are_read(rows in prop::collection::vec(turns(), 1..5)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        std::fs::write(&path, lines(&rows)).unwrap();
        let (rows, out) = (input(path), folder.path().join("out"));
        let dataset = out.join("dataset");
        let packing = Packing { utility: 100.0, validation: 0.0, ..packing() };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(go(&rows, &out, Shard::ALL, BOUNDS));
        pack(&out, &rows, &packing).unwrap();

        let made = records(&out);
        prop_assert!(made.values().all(|record| record.error.is_none()), "{made:?}");
        let of = |wanted: fn(&RowOutcome) -> bool| -> Vec<Row> {
            let is_wanted = |row: &Row| made[&row.number.to_string()].outcome.as_ref().is_some_and(wanted);
            read(&rows).into_iter().filter(is_wanted).collect()
        };
        let pairs = of(|made| matches!(made, RowOutcome::Kept(_)));
        let kept = of(|made| matches!(made, RowOutcome::Kept(_) | RowOutcome::Safe(_)));
        prop_assert!(!pairs.is_empty());

        // Parquet has the turns as they were.
        let shown = |row: &Row| (row.earlier.clone(), content(row));
        for (name, kept) in [("sft", &kept), ("dpo/*.parquet", &pairs)] {
            let again: Vec<_> = read(&input(dataset.join(name))).iter().map(shown).collect();
            prop_assert_eq!(again, kept.iter().map(shown).collect::<Vec<_>>(), "{}", name);
        }
        for name in ["sft/train-00000.parquet", "dpo/train-00000.parquet"] {
            let file = SerializedFileReader::new(std::fs::File::open(dataset.join(name)).unwrap()).unwrap();
            for row in file.get_row_iter(None).unwrap() {
                prop_assert!(!row.unwrap().to_string().contains("<image>"), "{}", name);
            }
        }

        // The other layouts have the same texts and images, in turns as their trainers expect.
        for (name, kept) in [("messages/train.jsonl", &kept), ("pairs/train.jsonl", &pairs)] {
            let again: Vec<_> = read(&input(dataset.join(name))).iter().map(content).collect();
            prop_assert_eq!(again, kept.iter().map(content).collect::<Vec<_>>(), "{}", name);
            for sample in samples(&dataset.join(name)) {
                let images = sample["images"].as_array().unwrap().len();
                let speakers = speakers(&sample["messages"], "role");
                let talk = speakers.strip_prefix(&["system"]).unwrap_or(&speakers);
                prop_assert!(alternate(talk, "user") && talk.len().is_multiple_of(2), "{:?}", speakers);
                prop_assert_eq!(marks(&sample["messages"]), images);
                if name.starts_with("pairs") {
                    let mut whole = sample["prompt"].as_array().unwrap().clone();
                    prop_assert_eq!(marks(&sample["prompt"]), images);
                    whole.push(sample["chosen"].clone());
                    prop_assert_eq!(&sample["messages"], &Value::Array(whole));
                    prop_assert_eq!(&sample["rejected"]["content"], &sample["rejected_response"]);
                    prop_assert_eq!(marks(&sample["chosen"]) + marks(&sample["rejected"]), 0);
                }
            }
        }
        // LLaVA's trainer takes at most one image; files with several are for LLaVA-NeXT.
        let mut again: Vec<_> = read(&input(dataset.join("llava/*.json"))).iter().map(content).collect();
        let mut content: Vec<_> = kept.iter().map(content).collect();
        again.sort();
        content.sort();
        prop_assert_eq!(again, content);
        for (name, is_several) in [("llava/train.json", false), ("llava/train-several.json", true)] {
            for sample in samples(&dataset.join(name)) {
                let images = sample["image"].as_array().map_or(usize::from(sample["image"].is_string()), Vec::len);
                prop_assert!(sample["image"].is_array() == is_several && (images > 1) == is_several);
                prop_assert_eq!(marks(&sample["conversations"]), images);
                let speakers = speakers(&sample["conversations"], "from");
                // The trainer drops a first turn of the model.
                prop_assert!(alternate(speakers.strip_prefix(&["gpt"]).unwrap_or(&speakers), "human"), "{:?}", speakers);
            }
        }
    }
}

#[tokio::test]
async fn dataset_info_matches_the_files() {
    let folder = tempfile::tempdir().unwrap();
    let row = |number: u32, query: &str| {
        json!({"query": query, "image": BASE64_STANDARD.encode(png(number * 17))}).to_string()
    };
    let rows: Vec<String> = (0..6)
        .flat_map(|pair| [row(2 * pair, "a rude list"), row(2 * pair + 1, "a list")])
        .collect();
    let path = folder.path().join("rows.jsonl");
    std::fs::write(&path, rows.join("\n")).unwrap();
    let (rows, out) = (input(path), folder.path().join("out"));
    go(&rows, &out, Shard::ALL, BOUNDS).await;
    let manifest = pack(&out, &rows, &Packing { utility: 1.0, ..packing() }).unwrap();
    let dataset = out.join("dataset");
    let info = std::fs::read_to_string(dataset.join("dataset_info.json")).unwrap();
    let info: BTreeMap<String, Value> = serde_json::from_str(&info).unwrap();
    let names: Vec<&str> = info.keys().map(String::as_str).collect();
    assert_eq!(names, ["ecso_dpo", "ecso_dpo_validation", "ecso_sft", "ecso_sft_validation"]);
    for (name, told) in &info {
        let kinds =
            &manifest.samples[if name.ends_with("validation") { "validation" } else { "train" }];
        let expected = if name.contains("dpo") { kinds["safety"] } else { kinds.values().sum() };
        let samples = samples(&dataset.join(told["file_name"].as_str().unwrap()));
        assert_eq!(samples.len() as u64, expected, "{name}");
        let columns =
            told["columns"].as_object().unwrap().values().map(|column| column.as_str().unwrap());
        assert!(columns.into_iter().all(|column| !samples[0][column].is_null()), "{told}");
    }
    assert!(
        manifest.files.contains_key("dataset_info.json")
            && manifest.files.contains_key("pairs/train.jsonl")
    );
    // The answer to unlearn can be read as a draft, by the name of its column.
    let mapping = Mapping::new([("draft".to_owned(), "rejected_response".to_owned())]).unwrap();
    let drafts = read(&Input { mapping, ..input(dataset.join("pairs/train.jsonl")) });
    assert!(
        drafts.iter().all(|row| row.draft.as_ref().unwrap().starts_with("rude words")),
        "{drafts:?}"
    );
}
