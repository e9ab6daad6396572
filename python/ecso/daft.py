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
    """`frame` with one more column, `name`: a struct of the columns of `Guard.process_batch`, whose keywords are `options`; `settings` are
    those of `Guard`. `columns` says which of its columns the guard reads, as `{"query": "question", "image": "photo"}`.
    """
    import daft
    import pyarrow

    kinds = {
        "answer": daft.DataType.string(),
        "verdict": daft.DataType.string(),
        "score": daft.DataType.float64(),
        "caption": daft.DataType.string(),
        "tokens": daft.DataType.int64(),
        "milliseconds": daft.DataType.int64(),
        "error": daft.DataType.string(),
        "error_kind": daft.DataType.string(),
    }
    given, asked = dict(settings or {}), dict(options or {})
    names = list(columns)

    @daft.cls
    class Answers:
        def __init__(self) -> None:
            self.guard = Guard(model, profile, **given)

        @daft.method.batch(return_dtype=daft.DataType.struct(kinds), batch_size=batch_size)
        def __call__(self, *read: Any) -> Any:
            table = pyarrow.table(dict(zip(names, (series.to_arrow() for series in read))))
            return pyarrow.table(self.guard.process_batch(table, **asked)).select(list(kinds)).to_struct_array()

    return frame.with_column(name, Answers()(*(frame[column] for column in columns.values())))
