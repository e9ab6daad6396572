"""The guard in Daft: `ecso.daft.answers(df, "http://…")`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Optional

from .guard import Guard

if TYPE_CHECKING:
    import daft


def answers(
    frame: daft.DataFrame,
    columns: Mapping[str, str],
    model: Optional[str] = None,
    profile: Optional[str] = None,
    *,
    settings: Optional[Mapping[str, Any]] = None,
    options: Optional[Mapping[str, Any]] = None,
    batch_size: int = 256,
    name: str = "guarded",
) -> daft.DataFrame:
    """Add a column `name` to `frame`: a struct of the columns of `Guard.process_batch`.

    `columns` names the columns that the guard reads, as `{"query": "question", "image": "photo"}`. `settings` are the arguments of
    `Guard`, and `options` those of `process_batch`.
    """
    import daft
    import pyarrow

    guard_settings, batch_options = dict(settings or {}), dict(options or {})
    prefix = batch_options.get("prefix", "")
    types = {
        "answer": daft.DataType.string(),
        "verdict": daft.DataType.string(),
        "score": daft.DataType.float64(),
        "caption": daft.DataType.string(),
        "tokens": daft.DataType.int64(),
        "milliseconds": daft.DataType.int64(),
        "error": daft.DataType.string(),
        "error_kind": daft.DataType.string(),
    }
    types = {prefix + column: kind for column, kind in types.items()}
    names = list(columns)

    @daft.cls
    class Answers:
        def __init__(self) -> None:
            self.guard = Guard(model, profile, **guard_settings)

        @daft.method.batch(return_dtype=daft.DataType.struct(types), batch_size=batch_size)
        def __call__(self, *series: Any) -> Any:
            table = pyarrow.table(dict(zip(names, (each.to_arrow() for each in series))))
            return pyarrow.table(self.guard.process_batch(table, **batch_options)).select(list(types)).to_struct_array()

    return frame.with_column(name, Answers()(*(frame[column] for column in columns.values())))
