//! Parquet, a few rows at a time. Every type of Arrow becomes a [`Cell`]; bytes stay bytes.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    error::Error,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use arrow_array::{
    Array,
    cast::AsArray,
    types::{
        Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type, UInt32Type,
        UInt64Type,
    },
};
use arrow_cast::{
    cast,
    display::{ArrayFormatter, FormatOptions},
};
use arrow_schema::DataType;
use ecso::Cause;
use parquet::arrow::{ProjectionMask, arrow_reader::ParquetRecordBatchReaderBuilder};

use super::{
    InputError, Records, at,
    cell::{Cell, Fields, number},
    cut_short,
    mapping::{self, Mapping},
};
use crate::{regular, row::cut};

/// Rows that are decoded together: images may be large.
const ROWS: usize = 16;

pub(super) fn count(path: &Path) -> Option<u64> {
    let file = regular::open(path).ok()?.into_inner();
    let builder = safely(|| ParquetRecordBatchReaderBuilder::try_new(file)).ok()?;
    u64::try_from(builder.metadata().file_metadata().num_rows()).ok()
}

/// Columns' types by name.
pub(super) type Types = BTreeMap<String, String>;

pub(super) fn records(path: &Path, mapping: &Mapping, has_query: bool) -> Result<(Records, Types), InputError> {
    let file = regular::open(path).map_err(|error| InputError::of(path, error))?.into_inner();
    let builder =
        safely(|| ParquetRecordBatchReaderBuilder::try_new(file)).map_err(|error| InputError::new(path, error))?;
    let fields = builder.schema().fields().clone();
    let columns: Vec<String> = fields.iter().map(|field| field.name().clone()).collect();
    mapping.fits_table(&columns, has_query).map_err(|cause| InputError::new(path, cause))?;
    let types = fields.iter().map(|field| (field.name().clone(), field.data_type().to_string())).collect();
    // What no row is made of isn't read, but for what may be an image or its name, as such a row isn't one of mere text.
    let wanted = (0..fields.len()).filter(|index| {
        let (name, kind) = (fields[*index].name(), fields[*index].data_type());
        mapping.knows(name) || mapping::is_about_image(name) || may_be_image(kind)
    });
    let mask = ProjectionMask::roots(builder.parquet_schema(), wanted);
    let batches = safely(|| builder.with_projection(mask).with_batch_size(ROWS).build());
    let mut batches = batches.map_err(|error| InputError::new(path, error))?;
    let mut ended = false;
    // A reader that failed once may fail for ever.
    let batches = std::iter::from_fn(move || {
        let batch = if ended { None } else { safely(|| batches.next().transpose()).transpose() };
        ended = matches!(batch, None | Some(Err(_)));
        batch
    });
    let records = batches.flat_map(move |batch| match batch {
        Ok(batch) => {
            let schema = batch.schema();
            let row = |row: usize| {
                let named = schema.fields().iter().zip(batch.columns());
                let cells = named.map(|(field, column)| (field.name().clone(), cell(column.as_ref(), row)));
                Ok(Cell::Fields(cells.collect()))
            };
            (0..batch.num_rows()).map(row).collect()
        }
        Err(error) => vec![Err(cut_short(at("the file can't be read from here on", error)))],
    });
    Ok((Box::new(records), types))
}

/// What a reader gives. Of broken files some make it panic; that is an error like others.
fn safely<T, E: Error + Send + Sync + 'static>(read: impl FnOnce() -> Result<T, E>) -> Result<T, Cause> {
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(read) => read.map_err(|error| match cut(&error.to_string()) {
            Cow::Owned(told) => told.into(),
            Cow::Borrowed(_) => Cause::of(error),
        }),
        Err(_) => Err("the Parquet file is broken".into()),
    }
}

fn may_be_image(kind: &DataType) -> bool {
    match kind {
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => true,
        kind if kind.is_string() => true,
        DataType::Dictionary(_, value) => may_be_image(value),
        DataType::Struct(fields) => fields.iter().any(|field| may_be_image(field.data_type())),
        DataType::List(item)
        | DataType::LargeList(item)
        | DataType::FixedSizeList(item, _)
        | DataType::ListView(item)
        | DataType::LargeListView(item) => may_be_image(item.data_type()),
        _ => false,
    }
}

/// What stands in a row of a column.
fn cell(column: &dyn Array, row: usize) -> Cell {
    if column.is_null(row) {
        return Cell::Null;
    }
    macro_rules! integer {
        ($kind:ty) => {
            Cell::Number(column.as_primitive::<$kind>().value(row).into())
        };
    }
    match column.data_type() {
        DataType::Null => Cell::Null,
        DataType::Boolean => Cell::Bool(column.as_boolean().value(row)),
        DataType::Int8 => integer!(Int8Type),
        DataType::Int16 => integer!(Int16Type),
        DataType::Int32 => integer!(Int32Type),
        DataType::Int64 => integer!(Int64Type),
        DataType::UInt8 => integer!(UInt8Type),
        DataType::UInt16 => integer!(UInt16Type),
        DataType::UInt32 => integer!(UInt32Type),
        DataType::UInt64 => integer!(UInt64Type),
        DataType::Float32 => number(column.as_primitive::<Float32Type>().value(row).into()),
        DataType::Float64 => number(column.as_primitive::<Float64Type>().value(row)),
        DataType::Utf8 => Cell::Text(column.as_string::<i32>().value(row).to_owned()),
        DataType::LargeUtf8 => Cell::Text(column.as_string::<i64>().value(row).to_owned()),
        DataType::Utf8View => Cell::Text(column.as_string_view().value(row).to_owned()),
        DataType::Binary => bytes(column.as_binary::<i32>().value(row)),
        DataType::LargeBinary => bytes(column.as_binary::<i64>().value(row)),
        DataType::BinaryView => bytes(column.as_binary_view().value(row)),
        DataType::FixedSizeBinary(_) => bytes(column.as_fixed_size_binary().value(row)),
        DataType::List(_) => list(column.as_list::<i32>().value(row).as_ref()),
        DataType::LargeList(_) => list(column.as_list::<i64>().value(row).as_ref()),
        DataType::FixedSizeList(..) => list(column.as_fixed_size_list().value(row).as_ref()),
        DataType::ListView(_) => list(column.as_list_view::<i32>().value(row).as_ref()),
        DataType::LargeListView(_) => list(column.as_list_view::<i64>().value(row).as_ref()),
        DataType::Struct(_) => {
            let column = column.as_struct();
            let named = column.fields().iter().zip(column.columns());
            Cell::Fields(named.map(|(field, inner)| (field.name().clone(), cell(inner.as_ref(), row))).collect())
        }
        DataType::Map(..) => {
            let entries = column.as_map().value(row);
            let (keys, values) = (entries.column(0), entries.column(1));
            let named = (0..entries.len()).map(|entry| match cell(keys.as_ref(), entry) {
                Cell::Text(name) => (name, cell(values.as_ref(), entry)),
                _ => (entry.to_string(), cell(values.as_ref(), entry)),
            });
            Cell::Fields(named.collect::<Fields>())
        }
        DataType::Dictionary(_, value) => as_type(column, row, value),
        DataType::RunEndEncoded(_, value) => as_type(column, row, value.data_type()),
        _ => shown(column, row),
    }
}

fn bytes(bytes: &[u8]) -> Cell {
    Cell::Bytes(bytes.to_vec().into())
}

fn list(values: &dyn Array) -> Cell {
    // Bytes may be written as a list of small numbers.
    if values.data_type() == &DataType::UInt8 && values.null_count() == 0 && !values.is_empty() {
        return bytes(values.as_primitive::<UInt8Type>().values());
    }
    Cell::List((0..values.len()).map(|place| cell(values, place)).collect())
}

/// A value that is stored once for many rows.
fn as_type(column: &dyn Array, row: usize, kind: &DataType) -> Cell {
    cast(&column.slice(row, 1), kind).map_or_else(|_| shown(column, row), |plain| cell(plain.as_ref(), 0))
}

/// A date, a decimal, and whatever else has a text.
fn shown(column: &dyn Array, row: usize) -> Cell {
    let formatter = ArrayFormatter::try_new(column, &FormatOptions::default());
    let text = formatter.ok().and_then(|formatter| formatter.value(row).try_to_string().ok());
    Cell::Other(text.unwrap_or_else(|| column.data_type().to_string()))
}
