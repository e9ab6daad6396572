//! The files of a dataset: every sample in every layout, by split.

use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, File},
    io::{self, BufWriter, Seek, Write},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use serde_json::{Map, Value, json};

use crate::{
    layout::Example,
    pack::{PackError, failed},
    table::{Table, TableRow},
};

/// The file names and bytes of a sample's images.
pub(crate) type NamedImages = Vec<(String, Bytes)>;

/// All files of a dataset.
pub(crate) struct Files {
    root: PathBuf,
    splits: BTreeMap<&'static str, Split>,
    /// Names of the images written so far.
    images: HashSet<String>,
    shard_bytes: usize,
}

/// The files of one split.
struct Split {
    sft: Table,
    dpo: Table,
    messages: JsonLines,
    pairs: JsonLines,
    llava: JsonArray,
    llava_several: JsonArray,
}

impl Files {
    /// Creates files in `root`. A new Parquet file is started after this many bytes.
    pub(crate) fn new(root: &Path, shard_bytes: usize) -> Self {
        Self { root: root.to_owned(), splits: BTreeMap::new(), images: HashSet::new(), shard_bytes }
    }

    /// Writes a sample in every layout.
    pub(crate) fn write(
        &mut self,
        split: &'static str,
        example: &Example<'_>,
        images: &NamedImages,
    ) -> Result<(), PackError> {
        for (name, bytes) in images {
            if self.images.insert(name.clone()) {
                let path = self.root.join(name);
                create(&path)?.write_all(bytes).map_err(|error| failed(&path, error))?;
            }
        }
        let (root, shard_bytes) = (&self.root, self.shard_bytes);
        let files = self.splits.entry(split).or_insert_with(|| Split {
            sft: Table::new(&root.join("sft"), split, &["messages"], shard_bytes),
            dpo: Table::new(
                &root.join("dpo"),
                split,
                &["prompt", "chosen", "rejected"],
                shard_bytes,
            ),
            messages: JsonLines::new(root.join(format!("messages/{split}.jsonl"))),
            pairs: JsonLines::new(root.join(format!("pairs/{split}.jsonl"))),
            llava: JsonArray::new(root.join(format!("llava/{split}.json"))),
            llava_several: JsonArray::new(root.join(format!("llava/{split}-several.json"))),
        });
        let table = |error: parquet::errors::ParquetError| failed(root, error);
        files.sft.push(TableRow { images, columns: example.sft() }).map_err(table)?;
        files.messages.push(&example.messages(), images.len())?;
        if let (Some(columns), Some(pair)) = (example.dpo(), example.pair()) {
            files.dpo.push(TableRow { images, columns }).map_err(table)?;
            files.pairs.push(&pair, images.len())?;
        }
        let llava = if images.len() > 1 { &mut files.llava_several } else { &mut files.llava };
        llava.push(&example.llava())
    }

    /// Finishes all files, and writes LLaMA-Factory's description of them.
    pub(crate) fn finish(self) -> Result<(), PackError> {
        let table = |error: parquet::errors::ParquetError| failed(&self.root, error);
        for split in self.splits.into_values() {
            split.sft.finish().map_err(table)?;
            split.dpo.finish().map_err(table)?;
            split.messages.finish()?;
            split.pairs.finish()?;
            split.llava.finish()?;
            split.llava_several.finish()?;
        }
        let path = self.root.join("dataset_info.json");
        let text = format!("{:#}\n", dataset_info(&self.root));
        fs::write(&path, text).map_err(|error| failed(&path, error))
    }
}

/// LLaMA-Factory's list of datasets: `ecso_sft` and `ecso_dpo`, and their validation splits, as far
/// as they exist.
fn dataset_info(root: &Path) -> Value {
    let tags = json!({
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    });
    let mut datasets = Map::new();
    for (split, suffix) in [("train", ""), ("validation", "_validation")] {
        let mut add = |name: &str, file: String, ranking: bool, columns: Value| {
            if root.join(&file).is_file() {
                let dataset = json!({
                    "file_name": file,
                    "formatting": "sharegpt",
                    "ranking": ranking,
                    "columns": columns,
                    "tags": tags,
                });
                datasets.insert(format!("ecso_{name}{suffix}"), dataset);
            }
        };
        let columns = json!({"messages": "messages", "images": "images"});
        add("sft", format!("messages/{split}.jsonl"), false, columns);
        let columns = json!({
            "messages": "prompt",
            "chosen": "chosen",
            "rejected": "rejected",
            "images": "images",
        });
        add("dpo", format!("pairs/{split}.jsonl"), true, columns);
    }
    Value::Object(datasets)
}

/// Creates a file and its folder.
fn create(path: &Path) -> Result<BufWriter<File>, PackError> {
    let folder = path.parent().unwrap_or(path);
    let created = fs::create_dir_all(folder).and_then(|()| File::create(path));
    created.map(BufWriter::new).map_err(|error| failed(path, error))
}

/// Creates a temporary file in the folder of the file that it will be appended to.
fn create_temporary(path: &Path) -> Result<BufWriter<File>, PackError> {
    let folder = path.parent().unwrap_or(path);
    let created = fs::create_dir_all(folder).and_then(|()| tempfile::tempfile_in(folder));
    created.map(BufWriter::new).map_err(|error| failed(path, error))
}

/// A file of JSON lines. Lines without an image are written last: `datasets` infers the types of
/// columns from the beginning of a file, and an empty list has none. Without a line there is no
/// file.
struct JsonLines {
    path: PathBuf,
    file: Option<BufWriter<File>>,
    without_images: Option<BufWriter<File>>,
}

impl JsonLines {
    fn new(path: PathBuf) -> Self {
        Self { path, file: None, without_images: None }
    }

    fn push(&mut self, line: &Value, images: usize) -> Result<(), PackError> {
        let path = &self.path;
        let file = match if images > 0 { &mut self.file } else { &mut self.without_images } {
            Some(open) => open,
            closed => {
                closed.insert(if images > 0 { create(path)? } else { create_temporary(path)? })
            }
        };
        writeln!(file, "{line}").map_err(|error| failed(path, error))
    }

    fn finish(self) -> Result<(), PackError> {
        let mut file = match self.file {
            Some(open) => open,
            None if self.without_images.is_some() => create(&self.path)?,
            None => return Ok(()),
        };
        let finish = || -> io::Result<()> {
            if let Some(rest) = self.without_images {
                let mut rest = rest.into_inner()?;
                rest.rewind()?;
                io::copy(&mut rest, &mut file)?;
            }
            file.flush()
        };
        finish().map_err(|error| failed(&self.path, error))
    }
}

/// A file with a JSON array, written element by element. Without an element there is no file.
struct JsonArray {
    path: PathBuf,
    file: Option<BufWriter<File>>,
}

impl JsonArray {
    fn new(path: PathBuf) -> Self {
        Self { path, file: None }
    }

    fn push(&mut self, value: &Value) -> Result<(), PackError> {
        let (file, separator) = match &mut self.file {
            Some(open) => (open, ",\n"),
            closed => (closed.insert(create(&self.path)?), "[\n"),
        };
        write!(file, "{separator}{value}").map_err(|error| failed(&self.path, error))
    }

    fn finish(self) -> Result<(), PackError> {
        let Some(mut file) = self.file else { return Ok(()) };
        let finished = file.write_all(b"\n]\n").and_then(|()| file.flush());
        finished.map_err(|error| failed(&self.path, error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_with_images_come_first() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("messages/train.jsonl");
        let mut lines = JsonLines::new(path.clone());
        for (line, images) in [(1, 0), (2, 1), (3, 0), (4, 2)] {
            lines.push(&json!(line), images).unwrap();
        }
        lines.finish().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "2\n4\n1\n3\n");
        let path = folder.path().join("pairs/train.jsonl");
        JsonLines::new(path.clone()).finish().unwrap();
        assert!(!path.exists());
        let mut lines = JsonLines::new(path.clone());
        lines.push(&json!(1), 0).unwrap();
        lines.finish().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\n");
    }
}
