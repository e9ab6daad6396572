//! Samples as Parquet, in the layout that Hugging Face `datasets` and TRL read for vision models:
//! images embedded as {bytes, path}, conversations as lists of messages with parts.

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

/// Bytes of images per row group.
const GROUP_BYTES: usize = 16 << 20;
/// Maximum number of rows per row group.
const GROUP_ROWS: usize = 1000;

/// One row of a table.
pub(crate) struct TableRow<'a> {
    /// Names and bytes.
    pub(crate) images: &'a [(String, bytes::Bytes)],
    /// An object with all other columns.
    pub(crate) columns: serde_json::Value,
}

/// A table that is written in several files.
pub(crate) struct Table {
    folder: PathBuf,
    split: &'static str,
    schema: Arc<Schema>,
    shard_bytes: usize,
    /// The current file, and the bytes written to it.
    writer: Option<(ArrowWriter<File>, usize)>,
    shards: usize,
    /// The other columns of buffered rows.
    rows: Vec<serde_json::Value>,
    /// The images of buffered rows.
    images: ListBuilder<StructBuilder>,
    /// The size of these images.
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
    /// Creates a table in `folder` with these columns of messages.
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
        // Tells `datasets` that these structs are images.
        let features = json!({"info": {"features": {"images": [{"_type": "Image"}]}}});
        let schema =
            Schema::new(fields).with_metadata([("huggingface".to_owned(), features.to_string())]);
        Self {
            folder: folder.to_owned(),
            split,
            schema: Arc::new(schema),
            shard_bytes,
            writer: None,
            shards: 0,
            rows: Vec::new(),
            images: image_builder(),
            bytes: 0,
        }
    }

    /// Adds a row.
    pub(crate) fn push(&mut self, row: TableRow<'_>) -> Result<(), ParquetError> {
        for (path, bytes) in row.images {
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
        self.rows.push(row.columns);
        let is_full = self.bytes >= GROUP_BYTES || self.rows.len() >= GROUP_ROWS;
        if is_full { self.flush() } else { Ok(()) }
    }

    /// Writes the buffered rows as a row group of the current file.
    fn flush(&mut self) -> Result<(), ParquetError> {
        if self.rows.is_empty() {
            return Ok(());
        }
        let fields: Vec<_> = self.schema.fields().iter().skip(1).cloned().collect();
        let mut decoder =
            arrow_json::ReaderBuilder::new(Arc::new(Schema::new(fields))).build_decoder()?;
        decoder.serialize(&self.rows)?;
        let others =
            decoder.flush()?.ok_or_else(|| ParquetError::General("no row was decoded".into()))?;
        let images: ArrayRef = Arc::new(self.images.finish());
        let columns: Vec<ArrayRef> =
            [images].into_iter().chain(others.columns().iter().cloned()).collect();
        let batch = RecordBatch::try_new(Arc::clone(&self.schema), columns)?;
        let (writer, written) = match &mut self.writer {
            Some(open) => open,
            closed => closed
                .insert((create_shard(&self.folder, self.split, self.shards, &self.schema)?, 0)),
        };
        writer.write(&batch)?;
        writer.flush()?;
        *written +=
            self.bytes + batch.get_array_memory_size() - batch.column(0).get_array_memory_size();
        let is_full = *written >= self.shard_bytes;
        (self.bytes, self.images) = (0, image_builder());
        self.rows.clear();
        if is_full { self.close() } else { Ok(()) }
    }

    fn close(&mut self) -> Result<(), ParquetError> {
        if let Some((writer, _)) = self.writer.take() {
            writer.close()?;
            self.shards += 1;
        }
        Ok(())
    }

    /// Writes the remaining rows. A table without rows has no file.
    pub(crate) fn finish(mut self) -> Result<(), ParquetError> {
        self.flush()?;
        self.close()
    }
}

fn image_builder() -> ListBuilder<StructBuilder> {
    let field = Field::new("item", DataType::Struct(image_fields()), true);
    ListBuilder::new(StructBuilder::from_fields(image_fields(), 0)).with_field(field)
}

fn create_shard(
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
