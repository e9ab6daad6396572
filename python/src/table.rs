//! Tables of Arrow, in and out by the `PyCapsule` interface.

use std::{ffi::CStr, sync::Arc};

use arrow_array::{
    Array, RecordBatch, RecordBatchIterator, RecordBatchReader, StructArray,
    ffi::{FFI_ArrowArray, FFI_ArrowSchema},
    ffi_stream::{FFI_ArrowArrayStream, RecordBatchStreamReader},
};
use arrow_pyarrow::FromPyArrow;
use arrow_schema::{ArrowError, Schema, SchemaRef};
use pyo3::{
    exceptions::{PyTypeError, PyValueError},
    prelude::*,
    types::PyCapsule,
};

/// A table as it comes in: one batch, or a stream of them.
pub(crate) struct Tables {
    pub(crate) schema: SchemaRef,
    pub(crate) batches: Vec<RecordBatch>,
}

impl<'a, 'py> FromPyObject<'a, 'py> for Tables {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        if object.hasattr("__arrow_c_array__")? {
            let batch = valid(RecordBatch::from_pyarrow_bound(&object)?)?;
            return Ok(Self { schema: batch.schema(), batches: vec![batch] });
        }
        if object.hasattr("__arrow_c_stream__")? {
            let reader = RecordBatchStreamReader::from_pyarrow_bound(&object)?;
            let schema = reader.schema();
            let batches: PyResult<Vec<_>> =
                reader.map(|batch| batch.map_err(raised).and_then(valid)).collect();
            return Ok(Self { schema, batches: batches? });
        }
        let told = "a table is needed that speaks Arrow's PyCapsule interface (__arrow_c_array__ or __arrow_c_stream__): of pyarrow, \
                    polars, pandas, DuckDB, Daft";
        Err(PyTypeError::new_err(told))
    }
}

/// A batch whose offsets and texts are what they should be: who made it may not have looked.
fn valid(batch: RecordBatch) -> PyResult<RecordBatch> {
    for (field, column) in batch.schema_ref().fields().iter().zip(batch.columns()) {
        let told = |error: ArrowError| {
            PyValueError::new_err(format!("the column {:?} is broken: {error}", field.name()))
        };
        column.to_data().validate_full().map_err(told)?;
    }
    Ok(batch)
}

#[expect(clippy::needless_pass_by_value, reason = "for `map_err`")]
fn raised(error: ArrowError) -> PyErr {
    PyValueError::new_err(error.to_string())
}

/// A table with its answers. It speaks Arrow's `PyCapsule` interface, so `pyarrow.table(it)`,
/// `polars.DataFrame(it)` and their like take it without a copy.
#[pyclass(frozen, sequence, module = "ecso._ecso")]
pub(crate) struct Table {
    schema: SchemaRef,
    batches: Vec<RecordBatch>,
}

impl Table {
    /// Of the batches that `columns` and the answers make.
    pub(crate) fn of(columns: &Schema, batches: Vec<RecordBatch>, prefix: &str) -> Self {
        let none = || {
            let fields = columns.fields().iter().cloned();
            let new = ecso_data::answers::schema(prefix).into_iter().map(Arc::new);
            Arc::new(Schema::new_with_metadata(
                fields.chain(new).collect::<Vec<_>>(),
                columns.metadata().clone(),
            ))
        };
        let schema = batches.first().map_or_else(none, RecordBatch::schema);
        Self { schema, batches }
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
    fn __len__(&self) -> usize {
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
        let schema = FFI_ArrowSchema::try_from(self.schema.as_ref()).map_err(raised)?;
        capsule(py, schema, c"arrow_schema")
    }

    /// All rows as one batch. A schema that is asked for is passed over, as the interface allows.
    #[pyo3(signature = (requested_schema = None))]
    fn __arrow_c_array__<'py>(
        &self,
        py: Python<'py>,
        requested_schema: Option<Bound<'py, PyAny>>,
    ) -> PyResult<(Bound<'py, PyCapsule>, Bound<'py, PyCapsule>)> {
        drop(requested_schema);
        let whole =
            arrow_select::concat::concat_batches(&self.schema, &self.batches).map_err(raised)?;
        let array = FFI_ArrowArray::new(&StructArray::from(whole).to_data());
        Ok((self.__arrow_c_schema__(py)?, capsule(py, array, c"arrow_array")?))
    }

    /// The batches in which the rows came. A schema that is asked for is passed over, as the
    /// interface allows.
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
