"""The guard on a Ray cluster: `ecso.ray.map_batches(ds, "http://…")`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Optional

from .guard import Guard

if TYPE_CHECKING:
    import pyarrow
    from ray.data import Dataset


class Answers:
    """What an actor of Ray Data does: opens a guard, and answers tables of pyarrow."""

    def __init__(self, model: Optional[str], profile: Optional[str], settings: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        self._guard, self._options = Guard(model, profile, **settings), options

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        import pyarrow

        return pyarrow.table(self._guard.process_batch(batch, **self._options))


def map_batches(
    dataset: Dataset,
    model: Optional[str] = None,
    profile: Optional[str] = None,
    *,
    settings: Optional[Mapping[str, Any]] = None,
    options: Optional[Mapping[str, Any]] = None,
    batch_size: int = 256,
    actors: int = 1,
    **more: Any,
) -> Dataset:
    """`dataset` with the columns of `Guard.process_batch`, whose keywords are `options`; `settings` are those of `Guard`.

    Each of `actors` has so many rows under way as its guard's `concurrency` says; what the server gets at once is the product.
    With `options={"journal": FOLDER}` on a disk that all nodes share, a batch that Ray does again costs only the rows that are not there.
    Other keywords go to `Dataset.map_batches`.
    """
    from ray.data import ActorPoolStrategy

    return dataset.map_batches(
        Answers,
        fn_constructor_args=(model, profile, dict(settings or {}), dict(options or {})),
        batch_format="pyarrow",
        batch_size=batch_size,
        compute=ActorPoolStrategy(size=actors),
        **more,
    )
