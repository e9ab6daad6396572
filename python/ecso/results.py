"""Results of a guard."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Union

Verdict = Literal["safe", "unsafe", "unchecked"]
"""The verdict on the direct answer or its request; `unchecked` if the profile requires no check."""


@dataclass(frozen=True)
class Step:
    """One call to the model.

    `step`: `request-check`, `direct`, `detect`, `caption`, `safe` or `reply-check`. `images`: the number of images the model saw.
    `prompt`, `reply`: the full texts, which `repr` leaves out. `score`: probability of harm in 0..1, for questions, if the model returns probabilities.
    `ms`: wall-clock milliseconds. `prompt_tokens`, `completion_tokens`: token counts, if the model reports usage.
    """

    step: str
    images: int
    prompt: str = field(repr=False)
    reply: str = field(repr=False)
    ms: int
    finish: str
    verdict: Optional[Verdict] = None
    score: Optional[float] = None
    question: Optional[str] = None
    template: Optional[str] = None
    prompt_tokens: Optional[int] = None
    completion_tokens: Optional[int] = None


@dataclass(frozen=True)
class Outcome:
    """A guarded answer.

    `answer`: the answer to show. `verdict`: the verdict on the direct answer, or on the request for it. `score`: probability in 0..1 that one is harmful, if the
    model returns probabilities. `rewritten`: whether `answer` replaces the direct answer. `refused`: whether it is the profile's fixed
    refusal. `steps`: all calls, in order.
    """

    answer: str
    verdict: Verdict
    score: Optional[float]
    rewritten: bool
    refused: bool
    profile: str
    model: str
    steps: tuple[Step, ...] = field(repr=False)

    @property
    def tokens(self) -> int:
        """Prompt and reply tokens of all calls, if the model reports usage."""
        return sum((step.prompt_tokens or 0) + (step.completion_tokens or 0) for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as plain values, for JSON."""
        return {**dataclasses.asdict(self), "steps": [dataclasses.asdict(step) for step in self.steps]}


@dataclass(frozen=True)
class Started:
    """A call to the model starts, with this number of `images`."""

    step: str
    images: int


@dataclass(frozen=True)
class Finished:
    """A call to the model finished."""

    step: Step


@dataclass(frozen=True)
class Decided:
    """The verdict is known: the direct answer is returned or, if `rewritten`, another one."""

    verdict: Verdict
    rewritten: bool


@dataclass(frozen=True)
class Answer:
    """A piece of the final answer, sent only after the verdict. All pieces joined are `Outcome.answer`."""

    text: str


@dataclass(frozen=True)
class Done:
    """The last event."""

    outcome: Outcome


Event = Union[Started, Finished, Decided, Answer, Done]
"""An event of a running guard."""


def outcome(value: dict[str, Any]) -> Outcome:
    """Convert an outcome from the Rust part."""
    return Outcome(**{**value, "steps": tuple(Step(**step) for step in value["steps"])})


def event(value: dict[str, Any]) -> Event:
    """Convert an event from the Rust part: an object with its name as the only key."""
    [(name, inner)] = value.items()
    if name == "started":
        return Started(**inner)
    if name == "finished":
        return Finished(Step(**inner))
    if name == "decided":
        return Decided(**inner)
    if name == "answer":
        return Answer(inner)
    return Done(outcome(inner))
