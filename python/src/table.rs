//! Arrow tables, exchanged by the `PyCapsule` interface.

use std::{ffi::CStr, sync::Arc};

use arrow_array::{
    Array, RecordBatch, RecordBatchIterator, RecordBatchReader, StructArray,
    cast::AsArray,
    ffi::{FFI_ArrowArray, FFI_ArrowSchema},
    ffi_stream::{FFI_ArrowArrayStream, RecordBatchStreamReader},
};
use arrow_pyarrow::FromPyArrow;
use arrow_schema::{ArrowError, Schema, SchemaRef};
use pyo3::{
    exceptions::{PyKeyboardInterrupt, PyTypeError, PyValueError},
    prelude::*,
    types::PyCapsule,
};

/// A table from Python: one batch, or a stream of batches.
pub(crate) struct Tables {
    pub(crate) schema: SchemaRef,
    pub(crate) batches: Vec<RecordBatch>,
}

impl<'a, 'py> FromPyObject<'a, 'py> for Tables {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        if object.hasattr("__arrow_c_array__")? {
            let batch = RecordBatch::from_pyarrow_bound(&object)?;
            let batch = object.py().detach(|| validated(batch))?;
            return Ok(Self { schema: batch.schema(), batches: vec![batch] });
        }
        if object.hasattr("__arrow_c_stream__")? {
            let reader = RecordBatchStreamReader::from_pyarrow_bound(&object)?;
            let schema = reader.schema();
            // Reading a stream to its end may be the work of a whole query.
            let batches: PyResult<Vec<_>> = object.py().detach(|| {
                reader.map(|batch| batch.map_err(value_error).and_then(validated)).collect()
            });
            return Ok(Self { schema, batches: batches? });
        }
        Err(PyTypeError::new_err(
            "expected a table with Arrow's PyCapsule interface (__arrow_c_array__ or \
             __arrow_c_stream__), for instance of pyarrow, polars, pandas, DuckDB or Daft",
        ))
    }
}

/// Validates the offsets and strings of a batch, which its creator may not have checked.
fn validated(batch: RecordBatch) -> PyResult<RecordBatch> {
    for (field, column) in batch.schema_ref().fields().iter().zip(batch.columns()) {
        let invalid = |error: ArrowError| {
            PyValueError::new_err(format!("column {:?} is invalid: {error}", field.name()))
        };
        column.to_data().validate_full().map_err(invalid)?;
    }
    Ok(batch)
}

#[expect(clippy::needless_pass_by_value, reason = "for `map_err`")]
fn value_error(error: ArrowError) -> PyErr {
    let text = error.to_string();
    // The producer of a stream got Ctrl-C, and could only report a text.
    if text.contains("KeyboardInterrupt") {
        return PyKeyboardInterrupt::new_err(());
    }
    PyValueError::new_err(text)
}

/// A table with answers. It implements Arrow's `PyCapsule` interface, so that `pyarrow.table(it)`,
/// `polars.DataFrame(it)` and others convert it without a copy.
#[pyclass(frozen, sequence, module = "ecso._ecso")]
pub(crate) struct Table {
    schema: SchemaRef,
    batches: Vec<RecordBatch>,
}

impl Table {
    /// Creates a table from answered batches. `original` is the schema without the new columns.
    pub(crate) fn new(original: &Schema, batches: Vec<RecordBatch>, prefix: &str) -> Self {
        let schema_without_batches = || {
            let fields = original.fields().iter().cloned();
            let new = ecso_data::answers::schema(prefix).into_iter().map(Arc::new);
            let fields = fields.chain(new).collect::<Vec<_>>();
            Arc::new(Schema::new_with_metadata(fields, original.metadata().clone()))
        };
        let schema = batches.first().map_or_else(schema_without_batches, RecordBatch::schema);
        Self { schema, batches }
    }

    /// How many rows have this text in the column.
    pub(crate) fn count(&self, column: &str, text: &str) -> usize {
        let columns = self.batches.iter().filter_map(|batch| batch.column_by_name(column));
        let texts = columns.filter_map(|column| column.as_string_opt::<i32>());
        texts.flat_map(|texts| texts.iter().filter(|value| *value == Some(text))).count()
    }
}

fn capsule<'py, T: Send + 'static>(
    py: Python<'py>,
    value: T,
    name: &'static CStr,
) -> PyResult<Bound<'py, PyCapsule>> {
    PyCapsule::new_with_value(py, value, name)
}

#[pymethods]
impl Table {
    pub(crate) fn __len__(&self) -> usize {
        self.batches.iter().map(RecordBatch::num_rows).sum()
    }

    fn __repr__(&self) -> String {
        format!("<ecso.Table of {} rows: {}>", self.__len__(), self.column_names().join(", "))
    }

    /// Names of all columns, in order.
    #[getter]
    fn column_names(&self) -> Vec<&str> {
        self.schema.fields().iter().map(|field| field.name().as_str()).collect()
    }

    fn __arrow_c_schema__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyCapsule>> {
        let schema = FFI_ArrowSchema::try_from(self.schema.as_ref()).map_err(value_error)?;
        capsule(py, schema, c"arrow_schema")
    }

    /// All rows as one batch. A requested schema is ignored, as the interface allows.
    #[pyo3(signature = (requested_schema = None))]
    fn __arrow_c_array__<'py>(
        &self,
        py: Python<'py>,
        requested_schema: Option<Bound<'py, PyAny>>,
    ) -> PyResult<(Bound<'py, PyCapsule>, Bound<'py, PyCapsule>)> {
        drop(requested_schema);
        let whole = arrow_select::concat::concat_batches(&self.schema, &self.batches)
            .map_err(value_error)?;
        let array = FFI_ArrowArray::new(&StructArray::from(whole).to_data());
        Ok((self.__arrow_c_schema__(py)?, capsule(py, array, c"arrow_array")?))
    }

    /// The rows in their original batches. A requested schema is ignored, as the interface allows.
    #[pyo3(signature = (requested_schema = None))]
    fn __arrow_c_stream__<'py>(
        &self,
        py: Python<'py>,
        requested_schema: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyCapsule>> {
        drop(requested_schema);
        let batches: Vec<_> = self.batches.iter().cloned().map(Ok).collect();
        let reader = Box::new(RecordBatchIterator::new(batches, Arc::clone(&self.schema)));
        capsule(py, FFI_ArrowArrayStream::new(reader), c"arrow_array_stream")
    }
}
