//! Parquet, as the hub has it: rows of id, question and image.

use std::{fs::File, path::Path, sync::Arc};

use arrow_array::{Array, ArrayRef, RecordBatch, cast::AsArray};
use arrow_cast::cast;
use arrow_schema::DataType;
use ecso::Cause;
use parquet::arrow::{
    ProjectionMask,
    arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder},
};

use super::files::Finder;
use crate::{
    item::{Picture, Trouble},
    text::{cut, told},
};

/// Rows that are decoded together: images may be large.
const ROWS: usize = 16;

/// A question of an export.
pub(super) struct ExportedQuestion {
    pub(super) id: String,
    pub(super) question: String,
    pub(super) image: Result<Picture, Trouble>,
}

/// The rows of a file, its images where `images` says so. After a row that can't be decoded there is no other.
///
/// # Errors
/// What is wrong with the file as a whole.
pub(super) fn rows(table: &Path, images: bool) -> Result<Vec<Result<ExportedQuestion, Cause>>, Cause> {
    let columns = if images { ["id", "question", "image"].as_slice() } else { &["id", "question"] };
    let builder = open(table)?;
    let names: Vec<String> = builder.schema().fields().iter().map(|field| field.name().clone()).collect();
    if let Some(missing) = columns.iter().find(|column| !names.iter().any(|name| name == *column)) {
        return Err(format!("there is no column `{missing}`; the columns are {}", cut(names.join(", "))).into());
    }
    let mut finder = Finder::new(table.parent().unwrap_or(Path::new("")));
    let shared: Arc<Path> = table.into();
    let mut rows = Vec::new();
    for batch in read(builder, columns)?.map(|batch| batch.map_err(told)) {
        match batch {
            Ok(batch) => {
                for place in 0..batch.num_rows() {
                    let row = row(&batch, place, images, &mut finder, (&shared, rows.len()));
                    rows.push(row);
                }
            }
            Err(error) => {
                rows.push(Err(error));
                break;
            }
        }
    }
    Ok(rows)
}

fn row(
    batch: &RecordBatch,
    place: usize,
    images: bool,
    finder: &mut Finder,
    (table, number): (&Arc<Path>, usize),
) -> Result<ExportedQuestion, Cause> {
    let text = |name: &str| -> Result<String, Cause> {
        let column = batch.column_by_name(name).map(|column| cast(&column.slice(place, 1), &DataType::Utf8));
        let column = column.transpose().map_err(told)?.filter(|column| column.is_valid(0));
        column
            .map(|column| column.as_string::<i32>().value(0).to_owned())
            .ok_or_else(|| format!("it has no {name}").into())
    };
    let image = match batch.column_by_name("image").filter(|_| images) {
        Some(column) => match cell(column, place)? {
            Cell::Bytes(_) => Ok(Picture::InParquet(Arc::clone(table), number)),
            Cell::Text(text) => finder.picture(&text),
            Cell::Nothing => Err(Trouble::MissingImage("it has no image".into())),
        },
        None => Err(Trouble::MissingImage("it has no image".into())),
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

fn read(builder: ParquetRecordBatchReaderBuilder<File>, columns: &[&str]) -> Result<ParquetRecordBatchReader, Cause> {
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
