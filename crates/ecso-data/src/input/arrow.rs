//! Tables of Arrow, from Parquet or from memory. Every type becomes a [`Cell`]; bytes stay bytes.

use std::collections::BTreeMap;

use arrow_array::{
    Array, RecordBatch,
    cast::AsArray,
    types::{
        Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type,
        UInt32Type, UInt64Type,
    },
};
use arrow_cast::{
    cast,
    display::{ArrayFormatter, FormatOptions},
};
use arrow_schema::{DataType, Field, Schema};
use ecso::Cause;

use super::{
    RowError,
    cell::{Cell, Fields, number},
    mapping::{self, Mapping},
    paths::Paths,
    record::Reader,
};
use crate::row::Row;

/// Reads rows of tables that somebody holds in memory, as those of a Parquet file are read.
#[derive(Debug, Clone)]
pub struct Columns {
    reader: Reader,
    wanted: Vec<bool>,
}

impl Columns {
    /// Finds out which columns are what. Rows that have no query get `query`. Relative paths of
    /// images begin where the process stands.
    ///
    /// # Errors
    /// No column can be the query, or one that `mapping` names is missing.
    pub fn new(schema: &Schema, mapping: Mapping, query: Option<String>) -> Result<Self, Cause> {
        let columns: Vec<String> =
            schema.fields().iter().map(|field| field.name().clone()).collect();
        if let Some(twice) =
            columns.iter().enumerate().find(|(place, name)| columns[..*place].contains(name))
        {
            return Err(format!(
                "two columns are called `{}`: which one is meant can't be told",
                twice.1
            )
            .into());
        }
        mapping.fits_table(&columns, query.is_some())?;
        let wanted = schema.fields().iter().map(|field| is_wanted(field, &mapping)).collect();
        let types: BTreeMap<_, _> = schema
            .fields()
            .iter()
            .map(|field| (field.name().clone(), field.data_type().to_string()))
            .collect();
        let paths = Paths::new(vec!["".into()]);
        Ok(Self { reader: Reader { mapping, query, paths, types, is_careful: true }, wanted })
    }

    /// The row at `index` of a table with these columns; it is called `number`, from 0.
    ///
    /// # Errors
    /// It has no query, or what it has can't be read.
    pub fn row(&self, batch: &RecordBatch, index: usize, number: u64) -> Result<Row, RowError> {
        let record =
            record(batch, index, |column| self.wanted.get(column).copied().unwrap_or_default());
        self.reader.row(number, record).map_err(|reason| RowError { number, reason })
    }
}

/// Whether a column is read: what no row is made of isn't, but for what may be an image or its
/// name, as such a row isn't one of mere text.
pub(super) fn is_wanted(field: &Field, mapping: &Mapping) -> bool {
    mapping.knows(field.name())
        || mapping::is_about_image(field.name())
        || may_be_image(field.data_type())
}

/// What stands in a row, of the columns that are wanted.
pub(super) fn record(batch: &RecordBatch, row: usize, is_wanted: impl Fn(usize) -> bool) -> Cell {
    let schema = batch.schema_ref();
    let named = schema
        .fields()
        .iter()
        .zip(batch.columns())
        .enumerate()
        .filter(|(column, _)| is_wanted(*column));
    Cell::Fields(
        named
            .map(|(_, (field, column))| (field.name().clone(), cell(column.as_ref(), row)))
            .collect(),
    )
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
            Cell::Fields(
                named
                    .map(|(field, inner)| (field.name().clone(), cell(inner.as_ref(), row)))
                    .collect(),
            )
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
    cast(&column.slice(row, 1), kind)
        .map_or_else(|_| shown(column, row), |plain| cell(plain.as_ref(), 0))
}

/// A date, a decimal, and whatever else has a text.
fn shown(column: &dyn Array, row: usize) -> Cell {
    let formatter = ArrayFormatter::try_new(column, &FormatOptions::default());
    let text = formatter.ok().and_then(|formatter| formatter.value(row).try_to_string().ok());
    Cell::Other(text.unwrap_or_else(|| column.data_type().to_string()))
}
