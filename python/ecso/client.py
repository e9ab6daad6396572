"""Guarded clients of the package openai."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Optional

from .chats import checked_text, turns
from .errors import BadReply, InputError
from .guard import AsyncGuard, Guard, following
from .results import Outcome

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

ALLOWED = frozenset(
    "frequency_penalty max_completion_tokens max_tokens messages model n presence_penalty seed stop stream temperature timeout top_p user".split()
)
"""The allowed arguments: those that change the text of an answer, and none that adds other contents, as only text is judged."""

CUT = ("length", "content_filter")
"""The finish reasons of answers that did not end by themselves."""


def guarded(client: Any, profile: Optional[str] = None, **settings: Any) -> Any:
    """Wrap `client`, an `openai.OpenAI` or `openai.AsyncOpenAI`, so that its chat completions are guarded.

    `create` sends the request as it is. Then the same model, at the client's address and with its key, judges each answer and
    rewrites it if it is harmful. The result is a `ChatCompletion` with text only, and `completion.ecso` has `verdict`, `score`,
    `rewritten` and `profile` of each choice. With `stream=True` the whole answer is held back until it is judged, and sent at once.

    Everything that could return unjudged contents is refused: tools, audio, log-probabilities, `extra_body`, and all of the client
    except `chat.completions.create`, `models` and `close`. Use `ecso serve` for these. `profile` and `settings` are those of `Guard`.
    """
    import openai

    if not isinstance(client, (openai.OpenAI, openai.AsyncOpenAI)):
        raise TypeError(f"expected an openai.OpenAI or openai.AsyncOpenAI, not {type(client).__name__}")
    if isinstance(client, (openai.AzureOpenAI, openai.AsyncAzureOpenAI)):
        raise TypeError("clients of Azure have addresses and signatures of their own: use `ecso serve` for them")
    for name in ("model", "model_name"):
        if name in settings:
            raise TypeError("the model is the one that each call of `create` names")
    Guard(str(client.base_url), profile, **settings)  # Wrong settings are told now.
    kind = _AsyncCompletions if isinstance(client, openai.AsyncOpenAI) else _Completions
    return _Client(client, kind(client, profile, settings))


class _GuardedOnly:
    """An object that has guarded attributes only."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"`{name}` is not guarded; use `chat.completions.create`, or `ecso serve` to guard more")


class _Chat(_GuardedOnly):
    def __init__(self, completions: Any) -> None:
        self.completions = completions


class _Client(_GuardedOnly):
    def __init__(self, client: Any, completions: Any) -> None:
        self.chat, self.models, self.base_url, self.close = _Chat(completions), client.models, client.base_url, client.close

    def __repr__(self) -> str:
        return f"<a guarded client of {self.base_url}>"


class _Completions(_GuardedOnly):
    kind: Any = Guard

    def __init__(self, client: Any, profile: Optional[str], settings: dict[str, Any]) -> None:
        self._client, self._profile, self._settings = client, profile, settings
        self._guards: dict[tuple[str, str], Any] = {}

    def create(self, **arguments: Any) -> Any:
        """Like the client's own method, with the restrictions of `guarded`."""
        guard, request, stream = self._prepare(arguments)
        guard._check(request["messages"]).next()
        completion = self._client.chat.completions.create(**request)
        outcomes = [guard.review(request["messages"], draft=draft) for draft in _drafts(completion)]
        judged = _judged(completion, outcomes)
        return _Stream(judged) if stream else judged

    def _prepare(self, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any], bool]:
        """Return the guard for the model, the arguments to send, and whether to stream."""
        request = {name: value for name, value in arguments.items() if not _is_absent(value)}
        other = sorted(request.keys() - ALLOWED)
        if other:
            raise InputError(f"these arguments can't be guarded: {', '.join(other)}; use `ecso serve`, which guards more")
        model, messages = request.get("model"), request.get("messages")
        if not isinstance(model, str) or not isinstance(messages, (list, tuple)):
            raise InputError("pass `model` and a list of `messages`")
        stream = bool(request.pop("stream", False))
        request["messages"] = _plain(messages)
        _check(request["messages"])
        key = self._settings.get("api_key") or self._client.api_key
        if not key:
            # Without one, the guard would send this server the key of the environment.
            raise InputError("the client has no fixed key for the judge: pass `api_key` to `guarded`, or use `ecso serve`")
        if (model, key) not in self._guards:
            settings = {**self._settings, "api_key": key}
            self._guards[model, key] = self.kind(str(self._client.base_url), self._profile, **{"model_name": model, **settings})
        return self._guards[model, key], request, stream


def _plain(messages: Any) -> Any:
    """Copy messages to plain lists, dictionaries and texts, so that what is judged is what is sent."""

    def fields(value: Any) -> Any:
        dump = getattr(value, "model_dump", None)
        if not callable(dump):
            raise TypeError(f"a {type(value).__name__} has no place in a message")
        return dump(exclude_none=True)

    try:
        return json.loads(json.dumps(messages, default=fields))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the messages can't be sent as JSON: {error}") from error


def _check(messages: Any) -> None:
    """Refuse contents that the guard would not see, or would see differently than the model."""
    for _, pieces in turns(messages, None, None):
        for kind, value in pieces:
            if kind == "url" and not str(value).startswith("data:"):
                raise InputError("pass a data URL: the image at a URL may differ between the model's fetch and the guard's")
    for message in messages:
        parts = message["content"] if isinstance(message["content"], list) else ()
        other = _fields(message) - {"role", "content"}
        for part in parts:
            name = "text" if part["type"] in ("text", "input_text") else "image_url"
            other |= _fields(part) - {"type", name}
            if isinstance(part.get("image_url"), dict):
                other |= _fields(part["image_url"]) - {"url", "detail"}
        if other:
            raise InputError(f"these fields of a message can't be judged: {', '.join(sorted(other))}")


def _is_absent(value: Any) -> bool:
    """Whether an argument is None, or the package's mark for one that was not given."""
    return value is None or type(value).__name__ in ("NotGiven", "Omit")


def _fields(value: dict[str, Any]) -> set[str]:
    return {name for name, field in value.items() if field is not None}


class _AsyncCompletions(_Completions):
    kind = AsyncGuard

    async def create(self, **arguments: Any) -> Any:
        """Like the client's own method, with the restrictions of `guarded`."""
        guard, request, stream = self._prepare(arguments)
        await following(guard._check(request["messages"]))
        completion = await self._client.chat.completions.create(**request)
        outcomes = [await guard.review(request["messages"], draft=draft) for draft in _drafts(completion)]
        judged = _judged(completion, outcomes)
        return _AsyncStream(judged) if stream else judged


def _drafts(completion: ChatCompletion) -> list[str]:
    """Return the texts of all choices. Other contents are an error."""
    choices = getattr(completion, "choices", None)
    if not isinstance(choices, list) or not choices:
        error = getattr(completion, "error", None)
        raise BadReply(f"the reply has no choices{f', but an error: {error}' if error else ''}")
    return [_draft(choice) for choice in choices]


def _draft(choice: Any) -> str:
    message = getattr(choice, "message", None)
    if message is None:
        raise BadReply("a choice of the reply has no message")
    if any(getattr(message, name, None) for name in ("tool_calls", "function_call", "audio")):
        raise InputError("the answer has more than text, which can't be judged; use `ecso serve`, which guards more")
    text = getattr(message, "content", None) or getattr(message, "refusal", None) or ""
    try:
        return checked_text(text)
    except InputError as error:
        raise BadReply(f"the answer is not a text: {error}") from error


def _judged(completion: ChatCompletion, outcomes: list[Outcome]) -> ChatCompletion:
    """Return a completion with known fields only: others, such as a server's reasoning, were not judged."""
    from openai.types import CompletionUsage
    from openai.types.chat import ChatCompletion, ChatCompletionMessage
    from openai.types.chat.chat_completion import Choice

    choices = [
        Choice(
            index=index,
            message=ChatCompletionMessage(role="assistant", content=outcome.answer),
            finish_reason=choice.finish_reason if choice.finish_reason in CUT and not outcome.rewritten else "stop",
        )
        for index, (choice, outcome) in enumerate(zip(completion.choices, outcomes))
    ]
    reports: list[Mapping[str, Any]] = [
        {"verdict": outcome.verdict, "score": outcome.score, "rewritten": outcome.rewritten, "profile": outcome.profile}
        for outcome in outcomes
    ]
    counts = {name: getattr(completion.usage, name, None) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    has_counts = all(isinstance(count, int) for count in counts.values())
    created = completion.created
    judged = ChatCompletion(
        id=str(completion.id or ""),
        object="chat.completion",
        created=created if isinstance(created, int) else int(time.time()),
        model=str(completion.model or ""),
        choices=choices,
        usage=CompletionUsage.model_validate(counts) if has_counts else None,
    )
    return judged.model_copy(update={"ecso": reports})


def _chunks(judged: ChatCompletion) -> Iterator[ChatCompletionChunk]:
    from openai.types.chat import ChatCompletionChunk
    from openai.types.chat.chat_completion_chunk import Choice, ChoiceDelta

    for choice in judged.choices:
        delta = ChoiceDelta(role="assistant", content=choice.message.content)
        pieces = [
            Choice(index=choice.index, delta=delta, finish_reason=None),
            Choice(index=choice.index, delta=ChoiceDelta(), finish_reason=choice.finish_reason),
        ]
        for piece in pieces:
            yield ChatCompletionChunk(
                id=judged.id, object="chat.completion.chunk", created=judged.created, model=judged.model, choices=[piece]
            )


class _Stream:
    """The chunks of a judged completion, with its `ecso`."""

    def __init__(self, judged: ChatCompletion) -> None:
        self._chunks = _chunks(judged)
        self.ecso: Any = getattr(judged, "ecso")  # noqa: B009

    def __iter__(self) -> _Stream:
        return self

    def __next__(self) -> ChatCompletionChunk:
        return next(self._chunks)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the stream."""
        self._chunks = iter(())


class _AsyncStream:
    """`_Stream` for asyncio."""

    def __init__(self, judged: ChatCompletion) -> None:
        self._stream = _Stream(judged)
        self.ecso = self._stream.ecso

    def __aiter__(self) -> _AsyncStream:
        return self

    async def __anext__(self) -> ChatCompletionChunk:
        try:
            return next(self._stream)
        except StopIteration:
            raise StopAsyncIteration from None

    async def __aenter__(self) -> _AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the stream."""
        self._stream.close()
