//! Arrow tables, from Parquet or from memory. Values of every type become [`Cell`]s.

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

/// Reads the rows of an in-memory table as those of a Parquet file are read.
#[derive(Debug, Clone)]
pub struct Columns {
    reader: Reader,
    /// Whether each column is read.
    is_read: Vec<bool>,
}

impl Columns {
    /// Finds the columns of each field. `query` is for rows without one. Relative paths of images
    /// start from the working directory.
    ///
    /// # Errors
    /// No column can be the query, a column that `mapping` names is missing, or two columns have
    /// the same name.
    pub fn new(schema: &Schema, mapping: Mapping, query: Option<String>) -> Result<Self, Cause> {
        let columns: Vec<String> =
            schema.fields().iter().map(|field| field.name().clone()).collect();
        let mut numbered = columns.iter().enumerate();
        if let Some((_, name)) = numbered.find(|(index, name)| columns[..*index].contains(name)) {
            return Err(format!("two columns are named `{name}`; rename one").into());
        }
        mapping.check_table(&columns, query.is_some())?;
        let is_read = schema.fields().iter().map(|field| is_relevant(field, &mapping)).collect();
        let types: BTreeMap<_, _> = schema
            .fields()
            .iter()
            .map(|field| (field.name().clone(), field.data_type().to_string()))
            .collect();
        let paths = Paths::new(vec!["".into()]);
        Ok(Self {
            reader: Reader { mapping, query, paths, types, forbids_paths_in_text: true },
            is_read,
        })
    }

    /// Reads the row at `index` of a table with these columns. `number` is the number of the row,
    /// from 0.
    ///
    /// # Errors
    /// The row has no query, or can't be read.
    pub fn row(&self, batch: &RecordBatch, index: usize, number: u64) -> Result<Row, RowError> {
        let record =
            record(batch, index, |column| self.is_read.get(column).copied().unwrap_or_default());
        self.reader.row(number, record).map_err(|reason| RowError { number, reason })
    }
}

/// Whether a column is read: it holds a field, or may hold an image. A row whose image is in an
/// unknown column must not be taken for a row of text.
pub(super) fn is_relevant(field: &Field, mapping: &Mapping) -> bool {
    mapping.is_known(field.name())
        || mapping::is_about_image(field.name())
        || may_be_image(field.data_type())
}

/// The record of a row, with the columns that are read.
pub(super) fn record(batch: &RecordBatch, row: usize, is_read: impl Fn(usize) -> bool) -> Cell {
    let schema = batch.schema_ref();
    let named = schema
        .fields()
        .iter()
        .zip(batch.columns())
        .enumerate()
        .filter(|(column, _)| is_read(*column));
    Cell::Fields(
        named
            .map(|(_, (field, column))| (field.name().clone(), cell(column.as_ref(), row)))
            .collect(),
    )
}

/// Whether values of a type may hold an image, or name one. All do but numbers, times and the like;
/// whole numbers in a list may be bytes.
fn may_be_image(data_type: &DataType) -> bool {
    match data_type {
        DataType::Null | DataType::Boolean => false,
        data_type if data_type.is_numeric() || data_type.is_temporal() => false,
        DataType::Dictionary(_, value) => may_be_image(value),
        DataType::RunEndEncoded(_, value) | DataType::Map(value, _) => {
            may_be_image(value.data_type())
        }
        DataType::Struct(fields) => fields.iter().any(|field| may_be_image(field.data_type())),
        DataType::List(item)
        | DataType::LargeList(item)
        | DataType::FixedSizeList(item, _)
        | DataType::ListView(item)
        | DataType::LargeListView(item) => {
            item.data_type().is_integer() || may_be_image(item.data_type())
        }
        _ => true,
    }
}

/// The value of a column in a row.
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
                key => (entry.to_string(), Cell::List(vec![key, cell(values.as_ref(), entry)])),
            });
            Cell::Fields(named.collect::<Fields>())
        }
        DataType::Union(..) => cell(column.as_union().value(row).as_ref(), 0),
        DataType::Dictionary(_, value) => decoded(column, row, value),
        DataType::RunEndEncoded(_, value) => decoded(column, row, value.data_type()),
        _ => formatted(column, row),
    }
}

fn bytes(bytes: &[u8]) -> Cell {
    Cell::Bytes(bytes.to_vec().into())
}

fn list(values: &dyn Array) -> Cell {
    // Bytes may be stored as a list of numbers.
    if values.data_type() == &DataType::UInt8 && values.null_count() == 0 && !values.is_empty() {
        return bytes(values.as_primitive::<UInt8Type>().values());
    }
    Cell::List((0..values.len()).map(|place| cell(values, place)).collect())
}

/// A value in an encoding that stores equal values once.
fn decoded(column: &dyn Array, row: usize, data_type: &DataType) -> Cell {
    cast(&column.slice(row, 1), data_type)
        .map_or_else(|_| formatted(column, row), |plain| cell(plain.as_ref(), 0))
}

/// A value of another type, such as a date or a decimal, as text.
fn formatted(column: &dyn Array, row: usize) -> Cell {
    let formatter = ArrayFormatter::try_new(column, &FormatOptions::default());
    let text = formatter.ok().and_then(|formatter| formatter.value(row).try_to_string().ok());
    Cell::Other(text.unwrap_or_else(|| column.data_type().to_string()))
}
