"""The guard."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Optional, Protocol, TypeVar, Union

from . import results
from ._ecso import Call, Core, Table
from .chats import Images, Query, turns
from .errors import EcsoError
from .results import Event, Outcome


class ArrowArray(Protocol):
    """One batch of Arrow: `pyarrow.RecordBatch` and its like."""

    def __arrow_c_array__(self, requested_schema: Optional[object] = None, /) -> tuple[object, object]: ...


class ArrowStream(Protocol):
    """Batches of Arrow: tables of pyarrow, data frames of polars and pandas, relations of DuckDB."""

    def __arrow_c_stream__(self, requested_schema: Optional[object] = None, /) -> object: ...


T = TypeVar("T")
Path = Union[str, "os.PathLike[str]"]


class _Guard:
    """What both guards have in common: how they are made, shown and pickled."""

    def __init__(
        self,
        model: Optional[str] = None,
        profile: Optional[str] = None,
        *,
        set: Optional[Mapping[str, Any]] = None,
        api_key: Optional[str] = None,
        concurrency: Optional[int] = None,
        cache: Optional[Path] = None,
        **settings: Any,
    ) -> None:
        given = {"model": model, "profile": profile, "set": _texts(set), **settings}
        given = {name: value for name, value in given.items() if value is not None}
        self._made_with = {
            **{"model": model, "profile": profile, "set": set, "api_key": api_key, "concurrency": concurrency, "cache": cache},
            **settings,
        }
        if concurrency is not None and concurrency < 1:
            raise ValueError("concurrency is 1 or more")
        self._core = Core(json.dumps(given, default=os.fspath), api_key, concurrency, None if cache is None else os.fspath(cache))

    @property
    def profile(self) -> str:
        """The profile's name."""
        return self._core.profile

    @property
    def concurrency(self) -> int:
        """How many rows of a table are asked about at once."""
        return self._core.concurrency

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (type(self), self._made_with)

    def __repr__(self) -> str:
        shown = {name: value for name, value in self._made_with.items() if value is not None and name != "api_key"}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def _ask(self, query: Query, images: Images, system: Optional[str], draft: Optional[str], events: bool = False) -> Call:
        return self._core.answer(turns(query, images, system), draft, events)

    def _table(
        self,
        batch: Union[ArrowArray, ArrowStream],
        map: Optional[Mapping[str, str]],
        query: Optional[str],
        prefix: str,
        journal: Optional[Path],
        image_bytes: int,
        max_failures: float,
    ) -> Call:
        if not 0.0 <= max_failures <= 1.0:
            raise ValueError("max_failures is a share in 0..1")
        return self._core.table(
            batch,
            map=list((map or {}).items()),
            query=query,
            prefix=prefix,
            journal=None if journal is None else os.fspath(journal),
            image_bytes=image_bytes,
            max_failures=max_failures,
        )


class Guard(_Guard):
    """A model behind the guard.

    `model`: `mini`, another name from `ecso models list`, a .gguf file, or the URL of an OpenAI-compatible server, as the program's
    `--model`. `profile`: `hardened` (the default), `paper`, or a TOML file. `set`: fields of the profile that are changed, as
    `{"direct.max_tokens": 64}`. `api_key`: sent to the server; without it the environment variable that `api_key_env` names is.
    `concurrency`: rows of a table at once (8 of a server, 1 of a model in this process). `cache`: a folder in which replies are kept while
    tables are answered, as `--cache` of `ecso synth` and `ecso eval run`. Other `settings` are those of `config.toml`, as
    `model_name="NAME"` or `server={"retries": 5}`; where nobody gives one, that file and `ECSO__…` in the environment count.

    Nothing is opened before the first question, and a process that was forked opens its own; a guard can be pickled: it is made again of
    these arguments, the key among them. Threads may share it. While it waits, other threads of Python run.

    Raises `SettingsError`.
    """

    def answer(self, query: Query, images: Images = None, *, system: Optional[str] = None) -> Outcome:
        """A guarded answer to `query`, a text or messages in OpenAI's form, about `images`.

        Ctrl-C ends the work. Raises `InputError`, `ImageError`, `ModelError` and its kinds.
        """
        return _outcome(self._ask(query, images, system, None).next())

    def review(self, query: Query, images: Images = None, *, draft: str, system: Optional[str] = None) -> Outcome:
        """The same where the direct answer is there already: `draft`. Raises as `answer` does."""
        return _outcome(self._ask(query, images, system, draft).next())

    def stream(
        self, query: Query, images: Images = None, *, draft: Optional[str] = None, system: Optional[str] = None
    ) -> Iterator[Event]:
        """The same step by step. Leaving the loop ends the work. Raises as `answer` does."""
        call = self._ask(query, images, system, draft, events=True)
        try:
            while True:
                event = _event(call.next())
                yield event
                if isinstance(event, results.Done):
                    return
        finally:
            call.cancel()

    def process_batch(
        self,
        batch: Union[ArrowArray, ArrowStream],
        *,
        map: Optional[Mapping[str, str]] = None,
        query: Optional[str] = None,
        prefix: str = "",
        journal: Optional[Path] = None,
        image_bytes: int = 1 << 30,
        max_failures: float = 1.0,
    ) -> Table:
        """Guarded answers for a table of Arrow: its rows, in their order, with eight more columns.

        Columns are found by their usual names (`query` or `messages`; `image` or `images`; `draft`) or by `map`, as
        `{"query": "question"}`; rows without a query get `query`. An image is bytes, a struct of bytes and path as Hugging Face has it, a
        path, a data URL, or a URL of a public address; one, or a list.

        New columns, with `prefix` before their names: `answer` (text), `verdict` (`safe`, `unsafe`, `unchecked`), `score` (probability of
        harm, 0..1), `caption` (text of the images, where it was made), `tokens` and `milliseconds` (of all calls), `error` (text, null
        where all is well) and `error_kind` (one word). A row that fails is a row with an error. Rows that are equal are asked about once.

        `concurrency` rows are under way at once, with `image_bytes` bytes of images; fewer while the server says that this is too much. A
        server that is away is waited for (`server={"away_timeout": SECONDS}`). `journal`: a folder in which answers are kept; what is
        there is not asked again, failures are. Any number of processes may share it. `max_failures`: the share of rows that may fail.

        Raises `InputError` (no column can be the query), `SettingsError`, `TooManyFailures`, and `ModelError` where the model stays away;
        never for what is wrong with a row.
        """
        table = self._table(batch, map, query, prefix, journal, image_bytes, max_failures).next()
        return _there(table, Table)


class AsyncGuard(_Guard):
    """`Guard` for asyncio: the same arguments, and every method is awaited. Cancelling a task ends its work."""

    async def answer(self, query: Query, images: Images = None, *, system: Optional[str] = None) -> Outcome:
        """As `Guard.answer`."""
        return _outcome(await _next(self._ask(query, images, system, None)))

    async def review(self, query: Query, images: Images = None, *, draft: str, system: Optional[str] = None) -> Outcome:
        """As `Guard.review`."""
        return _outcome(await _next(self._ask(query, images, system, draft)))

    async def stream(
        self, query: Query, images: Images = None, *, draft: Optional[str] = None, system: Optional[str] = None
    ) -> AsyncIterator[Event]:
        """As `Guard.stream`, for `async for`."""
        call = self._ask(query, images, system, draft, events=True)
        try:
            while True:
                event = _event(await _next(call))
                yield event
                if isinstance(event, results.Done):
                    return
        finally:
            call.cancel()

    async def process_batch(
        self,
        batch: Union[ArrowArray, ArrowStream],
        *,
        map: Optional[Mapping[str, str]] = None,
        query: Optional[str] = None,
        prefix: str = "",
        journal: Optional[Path] = None,
        image_bytes: int = 1 << 30,
        max_failures: float = 1.0,
    ) -> Table:
        """As `Guard.process_batch`."""
        table = await _next(self._table(batch, map, query, prefix, journal, image_bytes, max_failures))
        return _there(table, Table)


async def _next(call: Call) -> Any:
    """What work gives next, for asyncio."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(item: Any, error: Optional[BaseException]) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(item)
        else:
            future.set_exception(error)

    call.ask(lambda item, error: loop.call_soon_threadsafe(settle, item, error))
    try:
        return await future
    except asyncio.CancelledError:
        call.cancel()
        raise


def _made(kind: type[_Guard], arguments: dict[str, Any]) -> _Guard:
    return kind(**arguments)


def _texts(fields: Optional[Mapping[str, Any]]) -> Optional[dict[str, str]]:
    """Fields of a profile, as `--set` takes them."""
    if fields is None:
        return None
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}


def _there(item: object, kind: type[T]) -> T:
    """What work gave; an error where it ended without it."""
    if not isinstance(item, kind):
        raise EcsoError("the work ended before its end")
    return item


def _outcome(item: Any) -> Outcome:
    return results.outcome(json.loads(_there(item, str)))


def _event(item: Any) -> Event:
    return results.event(json.loads(_there(item, str)))
