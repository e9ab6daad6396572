"""Safe answers from multimodal LLMs: *Eyes Closed, Safety On* (arXiv 2403.09572).

    import ecso

    guard = ecso.Guard("http://localhost:8000/v1")
    outcome = guard.answer("What is on the list?", images="list.png")
    print(outcome.verdict, outcome.answer)

`Guard` answers one conversation at a time, `AsyncGuard` does the same with `await`, and `Guard.process_batch` answers an Arrow
table. `guarded` wraps a client of the package openai. `ecso.ray`, `ecso.spark` and `ecso.daft` run the guard on clusters.
"""

from ._ecso import Table, __version__, has_engine
from .client import guarded
from .errors import (
    BadReply,
    EcsoError,
    Filtered,
    ImageError,
    InputError,
    ModelError,
    NoVerdict,
    RateLimited,
    Rejected,
    SettingsError,
    Timeout,
    TooManyFailures,
    Unreachable,
)
from .guard import AsyncGuard, Guard
from .results import Answer, Decided, Done, Event, Finished, Outcome, Started, Step, Verdict

__all__ = [
    "Answer",
    "AsyncGuard",
    "BadReply",
    "Decided",
    "Done",
    "EcsoError",
    "Event",
    "Filtered",
    "Finished",
    "Guard",
    "ImageError",
    "InputError",
    "ModelError",
    "NoVerdict",
    "Outcome",
    "RateLimited",
    "Rejected",
    "SettingsError",
    "Started",
    "Step",
    "Table",
    "Timeout",
    "TooManyFailures",
    "Unreachable",
    "Verdict",
    "__version__",
    "guarded",
    "has_engine",
]
