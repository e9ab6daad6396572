//! Reads Parquet files as the hub exports them, with rows of id, question and image.

use std::{fs::File, path::Path};

use arrow_array::{Array, ArrayRef, RecordBatch, cast::AsArray};
use arrow_cast::cast;
use arrow_schema::DataType;
use ecso::Cause;
use parquet::arrow::{
    ProjectionMask,
    arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder},
};

use crate::text::{cut, shortened};

/// The number of rows that are decoded together; small, since images may be large.
const BATCH_SIZE: usize = 16;

/// A question of an export.
pub(crate) struct ExportedQuestion {
    pub(crate) id: String,
    pub(crate) question: String,
    pub(crate) image: Option<ExportedImage>,
}

/// The image of a row in an export.
pub(crate) enum ExportedImage {
    /// The row has its bytes; [`image`] reads them.
    Embedded,
    /// Its name, or another text that describes it.
    Named(String),
}

/// Reads the questions of a file in order, with their images if `images` is set. It stops after a
/// row that can't be decoded.
///
/// # Errors
/// If the file as a whole can't be read.
pub(crate) fn questions(
    table: &Path,
    images: bool,
) -> Result<Vec<Result<ExportedQuestion, Cause>>, Cause> {
    let columns = if images { ["id", "question", "image"].as_slice() } else { &["id", "question"] };
    let builder = open(table)?;
    let names: Vec<String> =
        builder.schema().fields().iter().map(|field| field.name().clone()).collect();
    if let Some(missing) = columns.iter().find(|column| !names.iter().any(|name| name == *column)) {
        return Err(format!(
            "there is no column `{missing}`; the columns are {}",
            cut(names.join(", "))
        )
        .into());
    }
    let mut questions = Vec::new();
    for batch in read(builder, columns)? {
        match batch {
            Ok(batch) => questions.extend((0..batch.num_rows()).map(|row| question(&batch, row))),
            Err(error) => {
                questions.push(Err(shortened(error)));
                break;
            }
        }
    }
    Ok(questions)
}

fn question(batch: &RecordBatch, row: usize) -> Result<ExportedQuestion, Cause> {
    let text = |name: &str| -> Result<String, Cause> {
        let column =
            batch.column_by_name(name).map(|column| cast(&column.slice(row, 1), &DataType::Utf8));
        let column = column.transpose().map_err(shortened)?.filter(|column| column.is_valid(0));
        let text = column.map(|column| column.as_string::<i32>().value(0).to_owned());
        text.ok_or_else(|| format!("it has no {name}").into())
    };
    let image = match batch.column_by_name("image").map(|column| cell(column, row)).transpose()? {
        Some(Cell::Bytes(_)) => Some(ExportedImage::Embedded),
        Some(Cell::Text(text)) => Some(ExportedImage::Named(text)),
        Some(Cell::Empty) | None => None,
    };
    Ok(ExportedQuestion { id: text("id")?, question: text("question")?, image })
}

/// Reads the encoded image of one row (from 0).
///
/// # Errors
/// If there is no such image.
pub(crate) fn image(table: &Path, row: usize) -> Result<Vec<u8>, Cause> {
    let builder = open(table)?.with_offset(row).with_limit(1);
    let batch =
        read(builder, &["image"])?.next().ok_or("there is no such row")?.map_err(shortened)?;
    match cell(batch.column_by_name("image").ok_or("there is no column `image`")?, 0)? {
        Cell::Bytes(bytes) => Ok(bytes),
        Cell::Text(_) | Cell::Empty => Err("it has no image".into()),
    }
}

fn open(table: &Path) -> Result<ParquetRecordBatchReaderBuilder<File>, Cause> {
    let file = File::open(table).map_err(shortened)?;
    ParquetRecordBatchReaderBuilder::try_new(file).map_err(shortened)
}

fn read(
    builder: ParquetRecordBatchReaderBuilder<File>,
    columns: &[&str],
) -> Result<ParquetRecordBatchReader, Cause> {
    let mask = ProjectionMask::columns(builder.parquet_schema(), columns.iter().copied());
    builder.with_projection(mask).with_batch_size(BATCH_SIZE).build().map_err(shortened)
}

/// The content of an image cell.
enum Cell {
    Bytes(Vec<u8>),
    Text(String),
    Empty,
}

fn cell(column: &ArrayRef, row: usize) -> Result<Cell, Cause> {
    if row >= column.len() || column.is_null(row) {
        return Ok(Cell::Empty);
    }
    let as_type = |kind: &DataType| cast(&column.slice(row, 1), kind).map_err(shortened);
    match column.data_type() {
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => {
            Ok(match as_type(&DataType::LargeBinary)?.as_binary::<i64>().value(0) {
                [] => Cell::Empty,
                bytes => Cell::Bytes(bytes.to_vec()),
            })
        }
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => {
            Ok(match as_type(&DataType::LargeUtf8)?.as_string::<i64>().value(0) {
                "" => Cell::Empty,
                text => Cell::Text(text.to_owned()),
            })
        }
        DataType::Struct(_) => {
            let column = column.as_struct();
            for name in ["bytes", "path"] {
                if let Some(inner) = column.column_by_name(name) {
                    let found = cell(inner, row)?;
                    if !matches!(found, Cell::Empty) {
                        return Ok(found);
                    }
                }
            }
            Ok(Cell::Empty)
        }
        other => Err(format!("an image column of type {} can't be read", cut(other)).into()),
    }
}
