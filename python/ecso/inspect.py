"""The guard in Inspect AI: `solver=ecso.inspect.guard()`."""

from __future__ import annotations

from typing import Any, Optional

from inspect_ai.model import ChatMessageAssistant, ModelOutput
from inspect_ai.solver import Generate, Solver, TaskState, solver

from .guard import AsyncGuard


@solver
def guard(model: Optional[str] = None, profile: Optional[str] = None, **settings: Any) -> Solver:
    """Create a solver that answers with the guard.

    The arguments are those of `AsyncGuard`: `model` is the guarded model, not Inspect's. The outcome, with verdict and score, is in
    the sample's store as `ecso`.
    """
    guarded = AsyncGuard(model, profile, **settings)

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        messages = [
            {"role": message.role, "content": _content(message.content), "tool_calls": getattr(message, "tool_calls", None)}
            for message in state.messages
        ]
        outcome = await guarded.answer(messages)
        state.messages.append(ChatMessageAssistant(content=outcome.answer, model=outcome.model))
        state.output = ModelOutput.from_content(outcome.model, outcome.answer)
        state.store.set("ecso", outcome.to_dict())
        return state

    return solve


def _content(content: Any) -> Any:
    """Convert the content of a message to OpenAI's format. Images are data URLs or files of the dataset."""
    from pathlib import Path

    if isinstance(content, str):
        return content
    parts: list[dict[str, Any]] = []
    for part in content:
        if part.type == "text":
            parts.append({"type": "text", "text": part.text})
        elif part.type == "image" and part.image.startswith(("data:", "http://", "https://")):
            parts.append({"type": "image_url", "image_url": {"url": part.image}})
        elif part.type == "image":
            parts.append({"type": "image", "image": Path(part.image).read_bytes()})
        else:
            parts.append({"type": part.type})
    return parts
