"""The guard on a Ray cluster: `ecso.ray.map_batches(ds, "http://…")`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Optional

from .guard import Guard

if TYPE_CHECKING:
    import pyarrow
    from ray.data import Dataset


class Answers:
    """An actor of Ray Data that opens a guard and answers pyarrow tables."""

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
    """Add the columns of `Guard.process_batch` to `dataset`.

    `settings` are the arguments of `Guard`, and `options` those of `process_batch`; other keywords go to `Dataset.map_batches`. The
    `concurrency` of the guard applies to each of the `actors`, so the server gets up to the product of both. If Ray repeats a batch,
    rows in the journal are not asked again: pass `options={"journal": FOLDER}` with a folder that all nodes share.
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
