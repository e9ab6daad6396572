"""The guard in Spark: `ecso.spark.map_in_arrow(df, "http://…")`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Optional

from .guard import Guard

if TYPE_CHECKING:
    import pyarrow
    from pyspark.sql import DataFrame

NEW = "answer string, verdict string, score double, caption string, tokens bigint, milliseconds bigint, error string, error_kind string"
"""The new columns, as Spark writes types."""


def map_in_arrow(
    frame: DataFrame,
    model: Optional[str] = None,
    profile: Optional[str] = None,
    *,
    settings: Optional[Mapping[str, Any]] = None,
    options: Optional[Mapping[str, Any]] = None,
) -> DataFrame:
    """`frame` with the columns of `Guard.process_batch`, whose keywords are `options`; `settings` are those of `Guard`.

    Each task has so many rows under way as its guard's `concurrency` says. Rows with images make large batches: keep
    `spark.sql.execution.arrow.maxRecordsPerBatch` at a few hundred.
    """
    from pyspark.sql.types import StructField, StructType, _parse_datatype_string

    given, asked = dict(settings or {}), dict(options or {})
    prefix = asked.get("prefix", "")
    new = [StructField(prefix + field.name, field.dataType) for field in _parse_datatype_string(NEW).fields]

    def answered(batches: Iterator[pyarrow.RecordBatch]) -> Iterator[pyarrow.RecordBatch]:
        import pyarrow

        guard = Guard(model, profile, **given)
        for batch in batches:
            yield pyarrow.record_batch(guard.process_batch(batch, **asked))

    return frame.mapInArrow(answered, StructType([*frame.schema.fields, *new]))
