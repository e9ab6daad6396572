"""The guard, plain and for asyncio."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Optional, Protocol, TypeVar, Union

from . import results
from ._ecso import Call, Core, Table
from .chats import Images, Query, checked_text, turns
from .errors import EcsoError, SettingsError
from .results import Event, Outcome


class ArrowArray(Protocol):
    """An Arrow batch, such as `pyarrow.RecordBatch`."""

    def __arrow_c_array__(self, requested_schema: Optional[object] = None, /) -> tuple[object, object]: ...


class ArrowStream(Protocol):
    """Arrow batches: pyarrow tables, polars and pandas data frames, DuckDB relations."""

    def __arrow_c_stream__(self, requested_schema: Optional[object] = None, /) -> object: ...


LARGEST = 1 << 40
"""The largest number that an argument may be."""

T = TypeVar("T")
Path = Union[str, "os.PathLike[str]"]


class _Guard:
    """The common part of both guards: construction, representation and pickling."""

    def __init__(
        self,
        model: Optional[Path] = None,
        profile: Optional[Path] = None,
        *,
        set: Optional[Mapping[str, Any]] = None,
        api_key: Optional[str] = None,
        concurrency: Optional[int] = None,
        cache: Optional[Path] = None,
        **settings: Any,
    ) -> None:
        settings_given = {"model": model, "profile": profile, "set": _texts(set), **settings}
        settings_given = {name: value for name, value in settings_given.items() if value is not None}
        cache = _absolute(cache)
        # A copy, so that a pickle or a fork creates the same guard.
        self._arguments: dict[str, Any] = copy.deepcopy(
            {
                **{"model": model, "profile": profile, "set": set, "api_key": api_key, "concurrency": concurrency, "cache": cache},
                **settings,
            }
        )
        if concurrency is not None and not 1 <= concurrency <= LARGEST:
            raise ValueError(f"concurrency must be in 1..{LARGEST}")
        if api_key is not None and not isinstance(api_key, str):
            raise TypeError(f"api_key must be a str, not {type(api_key).__name__}")
        if api_key is not None and not api_key.isprintable():
            raise SettingsError("api_key has a line break or another character that no key has")
        self._core = Core(json.dumps(settings_given, default=_path), api_key, concurrency, cache)

    @property
    def profile(self) -> str:
        """The name of the profile."""
        return self._core.profile

    @property
    def concurrency(self) -> int:
        """The maximum number of rows of a table in flight."""
        return self._core.concurrency

    def __reduce__(self) -> tuple[Any, ...]:
        return _create, (type(self), self._arguments)

    def __repr__(self) -> str:
        shown = {name: value for name, value in self._arguments.items() if value is not None and name != "api_key"}
        return f"{type(self).__name__}({', '.join(f'{name}={_public(value)!r}' for name, value in shown.items())})"

    def _check(self, query: Query, images: Images = None) -> Call:
        """Check that a conversation can be judged. For `guarded`."""
        return self._core.check(turns(query, images, None))

    def _start(self, query: Query, images: Images, system: Optional[str], draft: Optional[str], events: bool = False) -> Call:
        return self._core.answer(turns(query, images, system), None if draft is None else checked_text(draft), events)

    def _start_table(
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
            raise ValueError("max_failures must be in 0..1")
        if not 0 <= image_bytes <= LARGEST:
            raise ValueError(f"image_bytes must be in 0..{LARGEST}")
        if map is not None and not isinstance(map, Mapping):
            raise TypeError(f"map must be a dictionary of fields and columns, not {type(map).__name__}")
        return self._core.table(
            batch,
            map=list((map or {}).items()),
            query=query,
            prefix=prefix,
            journal=_absolute(journal),
            image_bytes=image_bytes,
            max_failures=max_failures,
        )


class Guard(_Guard):
    """A model behind the guard.

    `model`: `mini`, another name from `ecso models list`, a .gguf file, or the URL of an OpenAI-compatible server, as for the
    program's `--model`. `profile`: `hardened` (the default), `paper`, or a TOML file. `set`: overrides of profile fields, as
    `{"direct.max_tokens": 64}` or `{"direct": {"max_tokens": 64}}`. `api_key`: the key that the server is sent; by default that in
    `OPENAI_API_KEY`, or in the environment variable that the setting `api_key_env` names. `concurrency`: the maximum number of rows of
    a table in flight (by default 8 for a server, 1 for a model in this process).
    `cache`: a folder for cached replies while tables are answered, as `--cache` of `ecso synth` and `ecso eval run`. Other `settings`
    are those of `config.toml`, as `model_name="NAME"` or `server={"retries": 5}`; they override that file and `ECSO__…` variables.

    The model is opened on the first question, and again in a forked process. A guard can be pickled with its arguments, including the
    key. Threads may share it, and other Python threads run while it waits.

    Raises `SettingsError`.
    """

    def answer(self, query: Query, images: Images = None, *, system: Optional[str] = None) -> Outcome:
        """Answer `query`, a text or messages in OpenAI's format, about `images`.

        Ctrl-C cancels the work. Raises `InputError`, `ImageError`, `ModelError` and its subclasses.
        """
        return _outcome(self._start(query, images, system, None).next())

    def review(self, query: Query, images: Images = None, *, draft: str, system: Optional[str] = None) -> Outcome:
        """Like `answer`, with the direct answer given as `draft`. Raises the same."""
        return _outcome(self._start(query, images, system, _given(draft)).next())

    def stream(
        self, query: Query, images: Images = None, *, draft: Optional[str] = None, system: Optional[str] = None
    ) -> Iterator[Event]:
        """Like `answer`, step by step. Leaving the loop cancels the work. Raises the same."""
        call = self._start(query, images, system, draft, events=True)
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
        """Answer all rows of an Arrow table. Return the rows in their order, with eight new columns.

        Columns are found by common names (`query` or `messages`; `image` or `images`; `draft`) or by `map`, as
        `{"query": "question"}`; `query` is for rows without one. An image is bytes, a struct of bytes and path as in Hugging Face
        datasets, a path, a data URL, or a URL of a public address; a list has several.

        The new columns, with `prefix` before their names, are `answer` (text), `verdict` (`safe`, `unsafe`, `unchecked`), `score`
        (probability of harm, 0..1), `caption` (the images as text, if step 3 ran), `tokens` and `milliseconds` (of all calls), `error`
        (text, null without an error) and `error_kind`. A row that fails has an error. Equal rows are asked once.

        Up to `concurrency` rows with `image_bytes` bytes of images are in flight, and fewer while the server is overloaded. An
        unreachable server is waited for (`server={"away_timeout": SECONDS}`). `journal`: a folder where answers are stored for reuse;
        failures are retried. Any number of processes may share it. `max_failures`: the share of rows that may fail.

        Raises `InputError` (no column can be the query), `SettingsError`, `TooManyFailures`, and `ModelError` if the model stays
        unreachable; never because of a single row.
        """
        table = self._start_table(batch, map, query, prefix, journal, image_bytes, max_failures).next()
        return _expect(table, Table)


class AsyncGuard(_Guard):
    """`Guard` for asyncio, with the same arguments and methods. Cancelling a task cancels its work."""

    async def answer(self, query: Query, images: Images = None, *, system: Optional[str] = None) -> Outcome:
        """See `Guard.answer`."""
        return _outcome(await following(self._start(query, images, system, None)))

    async def review(self, query: Query, images: Images = None, *, draft: str, system: Optional[str] = None) -> Outcome:
        """See `Guard.review`."""
        return _outcome(await following(self._start(query, images, system, _given(draft))))

    async def stream(
        self, query: Query, images: Images = None, *, draft: Optional[str] = None, system: Optional[str] = None
    ) -> AsyncIterator[Event]:
        """See `Guard.stream`; for `async for`."""
        call = self._start(query, images, system, draft, events=True)
        try:
            while True:
                event = _event(await following(call))
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
        """See `Guard.process_batch`."""
        # In a thread, as the table may be the result of a query that runs only now.
        call = await asyncio.to_thread(self._start_table, batch, map, query, prefix, journal, image_bytes, max_failures)
        return _expect(await following(call), Table)


async def following(call: Call) -> Any:
    """Await the next item of a call."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(item: Any, error: Optional[BaseException]) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(item)
        else:
            future.set_exception(error)

    call.on_next(lambda item, error: loop.call_soon_threadsafe(settle, item, error))
    try:
        return await future
    except asyncio.CancelledError:
        call.cancel()
        raise


def _absolute(path: Optional[Path]) -> Optional[str]:
    if path is None:
        return None
    if not os.fspath(path):
        raise ValueError("the path of a folder is empty")
    return os.path.abspath(os.fsdecode(path))


def _create(guard_type: type[_Guard], arguments: dict[str, Any]) -> _Guard:
    """Create a guard again, from its pickle."""
    return guard_type(**arguments)


def _texts(fields: Optional[Mapping[str, Any]]) -> Optional[dict[str, str]]:
    """Convert fields of a profile to texts, as for `--set`."""
    if fields is None:
        return None
    if not isinstance(fields, Mapping):
        raise TypeError(f"set must be a dictionary of profile fields, not {type(fields).__name__}")
    return {name: value if isinstance(value, str) else _toml(value) for name, value in fields.items()}


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml(str(name))} = {_toml(field)}" for name, field in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(entry) for entry in value) + "]"
    if value is None:
        raise TypeError("None is not the value of a field: leave the field out")
    return json.dumps(value, ensure_ascii=False)


def _given(draft: Any) -> str:
    """Check that there is a draft. Without one the model would be asked for another."""
    if not isinstance(draft, str):
        raise TypeError(f"draft must be a str, not {type(draft).__name__}")
    return draft


def _path(value: Any) -> str:
    """Convert a setting that is no value of JSON."""
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    raise TypeError(f"a setting can't be a {type(value).__name__}")


def _public(value: Any) -> Any:
    """A setting without the logins and queries of its URLs."""
    if isinstance(value, str) and "://" in value:
        return re.sub(r"\?.*", "?***", re.sub(r"//.*@", "//***@", value, flags=re.DOTALL), flags=re.DOTALL)
    if isinstance(value, Mapping):
        return {name: _public(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_public(inner) for inner in value]
    return value


def _expect(item: object, item_type: type[T]) -> T:
    """Return the item of a call. A call that ended without one is an error."""
    if not isinstance(item, item_type):
        raise EcsoError("the call was cancelled before it finished")
    return item


def _outcome(item: Any) -> Outcome:
    return results.outcome(json.loads(_expect(item, str)))


def _event(item: Any) -> Event:
    return results.event(json.loads(_expect(item, str)))
