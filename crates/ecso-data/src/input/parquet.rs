//! Reads Parquet, a few rows at a time.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    error::Error,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use ecso::Cause;
use parquet::arrow::{ProjectionMask, arrow_reader::ParquetRecordBatchReaderBuilder};

use super::{InputError, Records, arrow, at, cut_short, mapping::Mapping};
use crate::{regular, row::shorten};

/// Number of rows that are decoded together: images may be large.
const BATCH_ROWS: usize = 16;

/// The number of rows.
pub(super) fn count(path: &Path) -> Option<u64> {
    let file = regular::open(path).ok()?.into_inner();
    let builder = catch_panic(|| ParquetRecordBatchReaderBuilder::try_new(file)).ok()?;
    u64::try_from(builder.metadata().file_metadata().num_rows()).ok()
}

/// The types of columns, by name.
pub(super) type Types = BTreeMap<String, String>;

/// Opens a file and returns its records and the types of its columns.
pub(super) fn records(
    path: &Path,
    mapping: &Mapping,
    has_query: bool,
) -> Result<(Records, Types), InputError> {
    let file =
        regular::open(path).map_err(|error| InputError::from_error(path, error))?.into_inner();
    let builder = catch_panic(|| ParquetRecordBatchReaderBuilder::try_new(file))
        .map_err(|error| InputError::new(path, error))?;
    let fields = builder.schema().fields().clone();
    let columns: Vec<String> = fields.iter().map(|field| field.name().clone()).collect();
    mapping.check_table(&columns, has_query).map_err(|cause| InputError::new(path, cause))?;
    let types =
        fields.iter().map(|field| (field.name().clone(), field.data_type().to_string())).collect();
    let relevant = (0..fields.len()).filter(|index| arrow::is_relevant(&fields[*index], mapping));
    let mask = ProjectionMask::roots(builder.parquet_schema(), relevant);
    let batches = catch_panic(|| builder.with_projection(mask).with_batch_size(BATCH_ROWS).build());
    let mut batches = batches.map_err(|error| InputError::new(path, error))?;
    let mut ended = false;
    // A reader that failed once may fail forever.
    let batches = std::iter::from_fn(move || {
        let batch =
            if ended { None } else { catch_panic(|| batches.next().transpose()).transpose() };
        ended = matches!(batch, None | Some(Err(_)));
        batch
    });
    let records = batches.flat_map(move |batch| match batch {
        Ok(batch) => {
            (0..batch.num_rows()).map(|row| Ok(arrow::record(&batch, row, |_| true))).collect()
        }
        Err(error) => vec![Err(cut_short(at("the file can't be read any further", error)))],
    });
    Ok((Box::new(records), types))
}

/// Turns panics into errors: some broken files make the reader panic.
fn catch_panic<T, E: Error + Send + Sync + 'static>(
    read: impl FnOnce() -> Result<T, E>,
) -> Result<T, Cause> {
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(read) => read.map_err(|error| match shorten(&error.to_string()) {
            Cow::Owned(message) => message.into(),
            Cow::Borrowed(_) => Cause::from_error(error),
        }),
        Err(_) => Err("the Parquet file is broken".into()),
    }
}
