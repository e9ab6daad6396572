"""What a guard gives."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Optional, Union

Verdict = Literal["safe", "unsafe", "unchecked"]
"""What was found about the direct answer, or the request for it; `unchecked` where the profile doesn't ask."""


@dataclass(frozen=True)
class Step:
    """One call of the model.

    `step`: which one (`request-check`, `direct`, `detect`, `caption`, `safe`, `reply-check`). `images`: how many the model saw.
    `prompt`, `reply`: the texts as they were. `score`: probability of harm in 0..1, of questions, where the model tells. `ms`: wall-clock
    milliseconds. `prompt_tokens`, `completion_tokens`: counts, where the model tells.
    """

    step: str
    images: int
    prompt: str
    reply: str
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

    `answer`: what may go out. `verdict`: what was found about the direct answer. `score`: probability in 0..1 that it is harmful, where the
    model tells. `rewritten`: whether `answer` is another one. `refused`: whether it is the profile's fixed refusal. `steps`: every call,
    in order.
    """

    answer: str
    verdict: Verdict
    score: Optional[float]
    rewritten: bool
    refused: bool
    profile: str
    model: str
    steps: tuple[Step, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all calls, prompts and replies, where the model tells."""
        return sum((step.prompt_tokens or 0) + (step.completion_tokens or 0) for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return {**dataclasses.asdict(self), "steps": [dataclasses.asdict(step) for step in self.steps]}


@dataclass(frozen=True)
class Started:
    """A call begins; the model sees so many `images`."""

    step: str
    images: int


@dataclass(frozen=True)
class Finished:
    """A call is over."""

    step: Step


@dataclass(frozen=True)
class Decided:
    """It is decided whether the direct answer goes out or, if `rewritten`, another one."""

    verdict: Verdict
    rewritten: bool


@dataclass(frozen=True)
class Answer:
    """Text of the final answer, after the verdict and never before. The pieces joined are `Outcome.answer`."""

    text: str


@dataclass(frozen=True)
class Done:
    """The end; comes once, last."""

    outcome: Outcome


Event = Union[Started, Finished, Decided, Answer, Done]
"""What is seen of a guard at work."""


def outcome(value: dict[str, Any]) -> Outcome:
    """An outcome as Rust writes it."""
    return Outcome(**{**value, "steps": tuple(Step(**step) for step in value["steps"])})


def event(value: dict[str, Any]) -> Event:
    """An event as Rust writes it: one name, and what belongs to it."""
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
