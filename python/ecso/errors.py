"""Exceptions. All are an `EcsoError`. The column `error_kind` of a table has the names in parentheses."""

from __future__ import annotations

from typing import Optional


class EcsoError(Exception):
    """Base class of all errors."""


class SettingsError(EcsoError, ValueError):
    """A setting, a profile or a named file is wrong. The model was not called."""


class InputError(EcsoError, ValueError):
    """The input is invalid or has no query (`input`)."""


class ImageError(EcsoError, ValueError):
    """An image can't be read or used (`image`)."""


class TooManyFailures(EcsoError):
    """More rows of a table failed than `max_failures` allows."""


class ModelError(EcsoError):
    """The model failed. A failure is never a verdict."""


class Rejected(ModelError):
    """The model rejected the request; asking again won't help (`rejected`)."""


class Filtered(ModelError):
    """A content filter in front of the model blocked the request (`filtered`)."""


class RateLimited(ModelError):
    """The model is overloaded (`rate_limited`).

    `retry_after`: seconds to wait before a retry, if the server names them.
    """

    retry_after: Optional[float]

    def __init__(self, message: str, retry_after: Optional[float] = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type[RateLimited], tuple[str, Optional[float]]]:
        return type(self), (str(self), self.retry_after)


class Timeout(ModelError, TimeoutError):
    """The model did not answer in time (`timeout`)."""


class Unreachable(ModelError, ConnectionError):
    """The model is unreachable (`unreachable`)."""


class BadReply(ModelError):
    """The model's reply is invalid (`bad_reply`)."""


class NoVerdict(ModelError):
    """The model answered a yes-or-no question with neither (`no_verdict`)."""
