"""A client of the package openai whose answers are guarded."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Optional

from .chats import turns
from .errors import InputError
from .guard import AsyncGuard, Guard
from .results import Outcome

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

SENT = frozenset(
    "frequency_penalty max_completion_tokens max_tokens messages model n presence_penalty seed stop stream temperature timeout top_p user".split()
)
"""What may be asked for: what changes an answer's words, and nothing that brings more than words, for only words are judged."""


def guarded(client: Any, profile: Optional[str] = None, **settings: Any) -> Any:
    """`client`, an `openai.OpenAI` or `openai.AsyncOpenAI`, with the guard around its chat completions.

    `create` asks the client as it is, then the same model, at the client's own address and with its key, judges each answer, and writes
    it anew where it is harmful. What comes back is a `ChatCompletion` of words alone, with `completion.ecso`: `verdict`, `score`,
    `rewritten` and `profile` of each choice. With `stream=True` the whole answer is held until it is judged, and comes in one piece.

    Everything that could bring what nobody judged is refused: tools, audio, log-probabilities, `extra_body`, and all of the client but
    `chat.completions.create` and `models`. For these there is `ecso serve`. `profile` and `settings` are those of `Guard`.
    """
    import openai

    if not isinstance(client, (openai.OpenAI, openai.AsyncOpenAI)):
        raise TypeError(f"a client of the package openai is needed, not {type(client).__name__}")
    kind = _AsyncCompletions if isinstance(client, openai.AsyncOpenAI) else _Completions
    return _Client(client, kind(client, profile, settings))


class _Only:
    """Something of which only this much is guarded."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"`{name}` is not guarded; `chat.completions.create` is, and `ecso serve` guards more")


class _Chat(_Only):
    def __init__(self, completions: Any) -> None:
        self.completions = completions


class _Client(_Only):
    def __init__(self, client: Any, completions: Any) -> None:
        self.chat, self.models, self.base_url = _Chat(completions), client.models, client.base_url


class _Completions(_Only):
    kind: Any = Guard

    def __init__(self, client: Any, profile: Optional[str], settings: dict[str, Any]) -> None:
        self._client, self._profile, self._settings = client, profile, settings
        self._guards: dict[str, Any] = {}

    def create(self, **asked: Any) -> Any:
        """As the client's own, but for what `guarded` says."""
        guard, sent = self._prepared(asked)
        completion = self._client.chat.completions.create(**sent)
        outcomes = [guard.review(asked["messages"], draft=draft) for draft in _drafts(completion)]
        judged = _judged(completion, outcomes)
        return iter(_chunks(judged)) if asked.get("stream") else judged

    def _prepared(self, asked: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        other = sorted(name for name, value in asked.items() if name not in SENT and value is not None)
        if other:
            raise InputError(f"what these bring can't be judged here: {', '.join(other)}; `ecso serve` guards more")
        model = asked.get("model")
        if not isinstance(model, str) or not isinstance(asked.get("messages"), (list, tuple)):
            raise InputError("a model and a list of messages are needed")
        _check(asked["messages"])  # What can't be judged is not asked.
        if model not in self._guards:
            settings = {"model_name": model, "api_key": self._client.api_key or None, **self._settings}
            self._guards[model] = self.kind(str(self._client.base_url), self._profile, **settings)
        return self._guards[model], {name: value for name, value in asked.items() if name != "stream"}


def _check(messages: Any) -> None:
    """Refuses what the model would be shown and the judge would not, or would see otherwise."""
    for _, pieces in turns(messages, None, None):
        for kind, value in pieces:
            if kind == "url" and not str(value).startswith("data:"):
                raise InputError("an image behind a URL would be fetched by the model and by the judge, and may differ: send a data URL")
    for message in messages:
        parts = message["content"] if isinstance(message["content"], (list, tuple)) else ()
        other = set(message) - {"role", "content"}
        for part in parts:
            other |= set(part) - {"type", "text" if part["type"] in ("text", "input_text") else "image_url"}
        if other:
            raise InputError(f"a message has what can't be judged here: {', '.join(sorted(map(str, other)))}")


class _AsyncCompletions(_Completions):
    kind = AsyncGuard

    async def create(self, **asked: Any) -> Any:
        """As the client's own, but for what `guarded` says."""
        guard, sent = self._prepared(asked)
        completion = await self._client.chat.completions.create(**sent)
        outcomes = [await guard.review(asked["messages"], draft=draft) for draft in _drafts(completion)]
        judged = _judged(completion, outcomes)
        return _awaited(_chunks(judged)) if asked.get("stream") else judged


def _drafts(completion: ChatCompletion) -> list[str]:
    """The answers of all choices. One that is more than words can't be judged."""
    drafts = []
    for choice in completion.choices:
        message = choice.message
        if message.tool_calls or message.function_call or message.audio:
            raise InputError("the answer holds more than words, which can't be judged here; `ecso serve` guards more")
        drafts.append(message.content if message.content is not None else message.refusal or "")
    return drafts


def _judged(completion: ChatCompletion, outcomes: list[Outcome]) -> ChatCompletion:
    """A completion of known fields alone: what else a server sends (its thoughts, for instance) nobody judged."""
    from openai.types.chat import ChatCompletion, ChatCompletionMessage
    from openai.types.chat.chat_completion import Choice

    choices = [
        Choice(
            index=choice.index,
            message=ChatCompletionMessage(role="assistant", content=outcome.answer),
            finish_reason="stop" if outcome.rewritten else choice.finish_reason,
        )
        for choice, outcome in zip(completion.choices, outcomes)
    ]
    told: list[Mapping[str, Any]] = [
        {"verdict": each.verdict, "score": each.score, "rewritten": each.rewritten, "profile": each.profile} for each in outcomes
    ]
    judged = ChatCompletion(
        id=completion.id,
        object="chat.completion",
        created=completion.created or int(time.time()),
        model=completion.model,
        choices=choices,
        usage=completion.usage,
    )
    return judged.model_copy(update={"ecso": told})


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


async def _awaited(chunks: Iterator[Any]) -> AsyncIterator[Any]:
    for chunk in chunks:
        yield chunk
