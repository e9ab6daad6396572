//! Parquet, a few rows at a time. Image columns are taken as they lie (bytes, {bytes, path}, text, or lists of these), all others
//! by way of JSON.

use std::{fs::File, path::Path};

use arrow_array::{
    Array, ArrayRef, RecordBatch,
    cast::{AsArray, as_list_array},
};
use arrow_cast::cast;
use arrow_json::LineDelimitedWriter;
use arrow_schema::DataType;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::Value;

use super::{InputError, RowError, Rows, record::Reader};
use crate::row::Picture;

/// Rows that are decoded together: images may be large.
const ROWS: usize = 16;

pub(super) fn count(path: &Path) -> Option<u64> {
    let builder = ParquetRecordBatchReaderBuilder::try_new(File::open(path).ok()?).ok()?;
    u64::try_from(builder.metadata().file_metadata().num_rows()).ok()
}

pub(super) fn rows(path: &Path, reader: Reader) -> Result<Rows, InputError> {
    let file = File::open(path).map_err(|error| InputError::new(path, error))?;
    let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|error| InputError::new(path, error))?;
    let names: Vec<String> = builder.schema().fields().iter().map(|field| field.name().clone()).collect();
    let image = reader.mapping.column("image", |name| names.iter().any(|known| known == name)).map(str::to_owned);
    let batches = builder.with_batch_size(ROWS).build().map_err(|error| InputError::new(path, error))?;
    let records = batches.flat_map(move |batch| {
        let read = batch.map_err(|error| error.to_string()).and_then(|batch| records(&batch, image.as_deref()));
        match read {
            Ok(records) => records.into_iter().map(Ok).collect(),
            Err(error) => vec![Err(error)],
        }
    });
    Ok(Box::new((0..).zip(records).map(move |(number, record)| {
        let row = record.and_then(|(fields, pictures)| {
            let mut row = reader.row(number, fields)?;
            for picture in pictures? {
                row.images.push(match picture {
                    Picture::File(path) => Picture::File(reader.root.join(path)),
                    other => other,
                });
            }
            Ok(row)
        });
        row.map_err(|reason| RowError { number, reason })
    })))
}

type Pictures = Result<Vec<Picture>, String>;

fn records(batch: &RecordBatch, image: Option<&str>) -> Result<Vec<(Value, Pictures)>, String> {
    let failed = |error: arrow_schema::ArrowError| error.to_string();
    let others: Vec<usize> =
        (0..batch.num_columns()).filter(|index| Some(batch.schema().field(*index).name().as_str()) != image).collect();
    let mut lines = LineDelimitedWriter::new(Vec::new());
    if others.is_empty() {
        return Err("no column beside the image".into());
    }
    lines.write(&batch.project(&others).map_err(failed)?).map_err(failed)?;
    lines.finish().map_err(failed)?;
    let column = image.and_then(|image| batch.column_by_name(image));
    let lines = lines.into_inner();
    let fields = serde_json::Deserializer::from_slice(&lines).into_iter::<Value>();
    let mut records = Vec::with_capacity(batch.num_rows());
    for (row, fields) in fields.enumerate() {
        let mut pictures = Vec::new();
        let found = column.map_or(Ok(()), |column| take(column, row, &mut pictures));
        records.push((fields.map_err(|error| error.to_string())?, found.map(|()| pictures)));
    }
    Ok(records)
}

/// The pictures that stand in one cell.
fn take(column: &ArrayRef, row: usize, pictures: &mut Vec<Picture>) -> Result<(), String> {
    if column.is_null(row) {
        return Ok(());
    }
    match column.data_type() {
        DataType::Binary => pictures.push(Picture::Bytes(column.as_binary::<i32>().value(row).to_vec().into())),
        DataType::LargeBinary => pictures.push(Picture::Bytes(column.as_binary::<i64>().value(row).to_vec().into())),
        DataType::Utf8 => pictures.push(named(column.as_string::<i32>().value(row))),
        DataType::LargeUtf8 => pictures.push(named(column.as_string::<i64>().value(row))),
        DataType::BinaryView | DataType::Utf8View => {
            let plain = if *column.data_type() == DataType::Utf8View { DataType::Utf8 } else { DataType::Binary };
            let column = cast(&column.slice(row, 1), &plain).map_err(|error| error.to_string())?;
            return take(&column, 0, pictures);
        }
        DataType::Struct(_) => {
            let column = column.as_struct();
            let filled = |name: &str| column.column_by_name(name).filter(|inner| !inner.is_null(row));
            let inner = filled("bytes").or_else(|| filled("path"));
            return take(inner.ok_or("an image has neither bytes nor path")?, row, pictures);
        }
        DataType::List(_) => {
            let values = as_list_array(column).value(row);
            return (0..values.len()).try_for_each(|place| take(&values, place, pictures));
        }
        other => return Err(format!("an image column of type {other} can't be read")),
    }
    Ok(())
}

fn named(text: &str) -> Picture {
    if text.starts_with("http://") || text.starts_with("https://") {
        Picture::Url(text.to_owned())
    } else {
        Picture::File(text.into())
    }
}
