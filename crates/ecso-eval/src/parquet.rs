//! Parquet, as the hub exports questions: rows of id, question and image.

use std::{fs::File, path::Path};

use arrow_array::{Array, ArrayRef, RecordBatch, cast::AsArray};
use arrow_cast::cast;
use arrow_schema::DataType;
use ecso::Cause;
use parquet::arrow::{
    ProjectionMask,
    arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder},
};

use crate::text::{cut, told};

/// Rows that are decoded together: images may be large.
const ROWS: usize = 16;

/// A question of an export.
pub(crate) struct ExportedQuestion {
    pub(crate) id: String,
    pub(crate) question: String,
    pub(crate) image: Option<ExportedImage>,
}

/// What an export has of an image.
pub(crate) enum ExportedImage {
    /// Its bytes stand in the row; [`image`] reads them.
    Here,
    /// Its name, or another text that says what it is.
    Named(String),
}

/// The questions of a file, in its order, with their images where `images` says so. After a row
/// that can't be decoded there is no other.
///
/// # Errors
/// What is wrong with the file as a whole.
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
                questions.push(Err(told(error)));
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
        let column = column.transpose().map_err(told)?.filter(|column| column.is_valid(0));
        let text = column.map(|column| column.as_string::<i32>().value(0).to_owned());
        text.ok_or_else(|| format!("it has no {name}").into())
    };
    let image = match batch.column_by_name("image").map(|column| cell(column, row)).transpose()? {
        Some(Cell::Bytes(_)) => Some(ExportedImage::Here),
        Some(Cell::Text(text)) => Some(ExportedImage::Named(text)),
        Some(Cell::Nothing) | None => None,
    };
    Ok(ExportedQuestion { id: text("id")?, question: text("question")?, image })
}

/// The encoded image of one row, from 0.
///
/// # Errors
/// Why it can't be had.
pub(crate) fn image(table: &Path, row: usize) -> Result<Vec<u8>, Cause> {
    let builder = open(table)?.with_offset(row).with_limit(1);
    let batch = read(builder, &["image"])?.next().ok_or("there is no such row")?.map_err(told)?;
    match cell(batch.column_by_name("image").ok_or("there is no column `image`")?, 0)? {
        Cell::Bytes(bytes) => Ok(bytes),
        Cell::Text(_) | Cell::Nothing => Err("it has no image".into()),
    }
}

fn open(table: &Path) -> Result<ParquetRecordBatchReaderBuilder<File>, Cause> {
    let file = File::open(table).map_err(told)?;
    ParquetRecordBatchReaderBuilder::try_new(file).map_err(told)
}

fn read(
    builder: ParquetRecordBatchReaderBuilder<File>,
    columns: &[&str],
) -> Result<ParquetRecordBatchReader, Cause> {
    let mask = ProjectionMask::columns(builder.parquet_schema(), columns.iter().copied());
    builder.with_projection(mask).with_batch_size(ROWS).build().map_err(told)
}

/// What stands in the cell of an image.
enum Cell {
    Bytes(Vec<u8>),
    Text(String),
    Nothing,
}

fn cell(column: &ArrayRef, row: usize) -> Result<Cell, Cause> {
    if row >= column.len() || column.is_null(row) {
        return Ok(Cell::Nothing);
    }
    let as_type = |kind: &DataType| cast(&column.slice(row, 1), kind).map_err(told);
    match column.data_type() {
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => {
            Ok(match as_type(&DataType::LargeBinary)?.as_binary::<i64>().value(0) {
                [] => Cell::Nothing,
                bytes => Cell::Bytes(bytes.to_vec()),
            })
        }
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => {
            Ok(match as_type(&DataType::LargeUtf8)?.as_string::<i64>().value(0) {
                "" => Cell::Nothing,
                text => Cell::Text(text.to_owned()),
            })
        }
        DataType::Struct(_) => {
            let column = column.as_struct();
            for name in ["bytes", "path"] {
                if let Some(inner) = column.column_by_name(name) {
                    let found = cell(inner, row)?;
                    if !matches!(found, Cell::Nothing) {
                        return Ok(found);
                    }
                }
            }
            Ok(Cell::Nothing)
        }
        other => Err(format!("an image column of type {} can't be read", cut(other)).into()),
    }
}
