//! Samples as Parquet, in the layout that Hugging Face `datasets` and TRL read for vision: images
//! embedded as {bytes, path}, conversations as lists of messages with parts.

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
};

use arrow_array::{
    Array, ArrayRef, RecordBatch,
    builder::{BinaryBuilder, ListBuilder, StringBuilder, StructBuilder},
};
use arrow_schema::{DataType, Field, Fields, Schema};
use parquet::{
    arrow::ArrowWriter, basic::Compression, errors::ParquetError,
    file::properties::WriterProperties,
};
use serde_json::json;

/// Bytes of images that are held before they are written as a row group.
const GROUP: usize = 16 << 20;

/// One row of a table: columns of messages by name, and what is the same for all tables.
pub(crate) struct Line<'a> {
    pub(crate) images: &'a [(String, bytes::Bytes)],
    /// Serialises to an object: the columns of messages, and the provenance.
    pub(crate) columns: serde_json::Value,
}

/// A table that is written in shards.
pub(crate) struct Table {
    folder: PathBuf,
    split: &'static str,
    schema: Arc<Schema>,
    shard_bytes: usize,
    writer: Option<(ArrowWriter<File>, usize)>,
    shards: usize,
    held: Vec<serde_json::Value>,
    images: ListBuilder<StructBuilder>,
    bytes: usize,
}

fn image_fields() -> Fields {
    vec![Field::new("bytes", DataType::Binary, true), Field::new("path", DataType::Utf8, true)]
        .into()
}

fn messages() -> DataType {
    let part: Fields =
        vec![Field::new("type", DataType::Utf8, true), Field::new("text", DataType::Utf8, true)]
            .into();
    let parts = DataType::List(Arc::new(Field::new("item", DataType::Struct(part), true)));
    let message: Fields =
        vec![Field::new("role", DataType::Utf8, true), Field::new("content", parts, true)].into();
    DataType::List(Arc::new(Field::new("item", DataType::Struct(message), true)))
}

fn image_list() -> Field {
    Field::new(
        "images",
        DataType::List(Arc::new(Field::new("item", DataType::Struct(image_fields()), true))),
        true,
    )
}

impl Table {
    /// A table below `folder` with these columns of messages.
    pub(crate) fn new(
        folder: &Path,
        split: &'static str,
        columns: &[&str],
        shard_bytes: usize,
    ) -> Self {
        let text = |name: &str| Field::new(name, DataType::Utf8, true);
        let number = |name: &str| Field::new(name, DataType::Float64, true);
        let hashes = DataType::List(Arc::new(Field::new("item", DataType::Utf8, true)));
        let provenance: Fields = vec![
            Field::new("row", DataType::UInt64, true),
            text("source"),
            text("model"),
            text("model_digest"),
            text("profile"),
            text("profile_hash"),
            Field::new("templates", hashes, true),
            number("score"),
            number("second_score"),
            text("made_at"),
        ]
        .into();
        let mut fields = vec![image_list()];
        fields.extend(columns.iter().map(|name| Field::new(*name, messages(), true)));
        fields.extend([
            text("kind"),
            text("category"),
            Field::new("provenance", DataType::Struct(provenance), true),
        ]);
        // What `datasets` needs to be told: that these structs are images.
        let told = json!({"info": {"features": {"images": [{"_type": "Image"}]}}});
        let schema =
            Schema::new(fields).with_metadata([("huggingface".to_owned(), told.to_string())]);
        Self {
            folder: folder.to_owned(),
            split,
            schema: Arc::new(schema),
            shard_bytes,
            writer: None,
            shards: 0,
            held: Vec::new(),
            images: image_builder(),
            bytes: 0,
        }
    }

    pub(crate) fn push(&mut self, line: Line<'_>) -> Result<(), ParquetError> {
        for (path, bytes) in line.images {
            let image = self.images.values();
            if let Some(builder) = image.field_builder::<BinaryBuilder>(0) {
                builder.append_value(bytes);
            }
            if let Some(builder) = image.field_builder::<StringBuilder>(1) {
                builder.append_value(path);
            }
            image.append(true);
            self.bytes += bytes.len();
        }
        self.images.append(true);
        self.held.push(line.columns);
        if self.bytes >= GROUP || self.held.len() >= 1000 { self.flush() } else { Ok(()) }
    }

    /// Writes what is held as a row group of the shard at hand.
    fn flush(&mut self) -> Result<(), ParquetError> {
        if self.held.is_empty() {
            return Ok(());
        }
        let fields: Vec<_> = self.schema.fields().iter().skip(1).cloned().collect();
        let mut decoder =
            arrow_json::ReaderBuilder::new(Arc::new(Schema::new(fields))).build_decoder()?;
        decoder.serialize(&self.held)?;
        let others = decoder
            .flush()?
            .ok_or_else(|| ParquetError::General("no row could be written".into()))?;
        let images: ArrayRef = Arc::new(self.images.finish());
        let columns: Vec<ArrayRef> =
            [images].into_iter().chain(others.columns().iter().cloned()).collect();
        let batch = RecordBatch::try_new(Arc::clone(&self.schema), columns)?;
        let (writer, written) = match &mut self.writer {
            Some(open) => open,
            closed => {
                closed.insert((shard(&self.folder, self.split, self.shards, &self.schema)?, 0))
            }
        };
        writer.write(&batch)?;
        writer.flush()?;
        *written +=
            self.bytes + batch.get_array_memory_size() - batch.column(0).get_array_memory_size();
        let full = *written >= self.shard_bytes;
        (self.bytes, self.images) = (0, image_builder());
        self.held.clear();
        if full { self.close() } else { Ok(()) }
    }

    fn close(&mut self) -> Result<(), ParquetError> {
        if let Some((writer, _)) = self.writer.take() {
            writer.close()?;
            self.shards += 1;
        }
        Ok(())
    }

    /// Writes what is left. A table without rows leaves no file.
    pub(crate) fn finish(mut self) -> Result<(), ParquetError> {
        self.flush()?;
        self.close()
    }
}

fn image_builder() -> ListBuilder<StructBuilder> {
    let field = Field::new("item", DataType::Struct(image_fields()), true);
    ListBuilder::new(StructBuilder::from_fields(image_fields(), 0)).with_field(field)
}

fn shard(
    folder: &Path,
    split: &str,
    number: usize,
    schema: &Arc<Schema>,
) -> Result<ArrowWriter<File>, ParquetError> {
    std::fs::create_dir_all(folder)?;
    let file = File::create(folder.join(format!("{split}-{number:05}.parquet")))?;
    let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
    ArrowWriter::try_new(file, Arc::clone(schema), Some(properties))
}
