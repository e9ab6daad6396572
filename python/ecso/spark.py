"""The guard in Spark: `ecso.spark.map_in_arrow(df, "http://…")`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Optional

from .guard import Guard

if TYPE_CHECKING:
    import pyarrow
    from pyspark.sql import DataFrame

NEW_COLUMNS = "answer string, verdict string, score double, caption string, tokens bigint, milliseconds bigint, error string, error_kind string"
"""The new columns, in Spark's notation."""


def map_in_arrow(
    frame: DataFrame,
    model: Optional[str] = None,
    profile: Optional[str] = None,
    *,
    settings: Optional[Mapping[str, Any]] = None,
    options: Optional[Mapping[str, Any]] = None,
) -> DataFrame:
    """Add the columns of `Guard.process_batch` to `frame`.

    `settings` are the arguments of `Guard`, and `options` those of `process_batch`. The `concurrency` of the guard applies to each
    task. Rows with images make large batches: keep `spark.sql.execution.arrow.maxRecordsPerBatch` at a few hundred.
    """
    from pyspark.sql.types import StructField, StructType, _parse_datatype_string

    guard_settings, batch_options = dict(settings or {}), dict(options or {})
    prefix = batch_options.get("prefix", "")
    new = [StructField(prefix + field.name, field.dataType) for field in _parse_datatype_string(NEW_COLUMNS).fields]

    def answer(batches: Iterator[pyarrow.RecordBatch]) -> Iterator[pyarrow.RecordBatch]:
        import pyarrow

        guard = Guard(model, profile, **guard_settings)
        for batch in batches:
            yield pyarrow.record_batch(guard.process_batch(batch, **batch_options))

    return frame.mapInArrow(answer, StructType([*frame.schema.fields, *new]))
