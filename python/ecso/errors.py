"""What can go wrong. Everything is an `EcsoError`; the column `error_kind` of a table has the same kinds in small letters."""

from __future__ import annotations

from typing import Optional


class EcsoError(Exception):
    """Anything that goes wrong here."""


class SettingsError(EcsoError, ValueError):
    """A setting, a profile or a file that was named is wrong. Nothing was asked of a model."""


class InputError(EcsoError, ValueError):
    """What is asked can't be read, or nothing is asked (`input`)."""


class ImageError(EcsoError, ValueError):
    """An image can't be had, or not be used (`image`)."""


class TooManyFailures(EcsoError):
    """More rows of a table failed than `max_failures` allows."""


class ModelError(EcsoError):
    """The model failed. A failure is never a verdict."""


class Rejected(ModelError):
    """The model rejected the request; asking again won't help (`rejected`)."""


class Filtered(ModelError):
    """A content filter in front of the model refused the request (`filtered`)."""


class RateLimited(ModelError):
    """The model has too much to do (`rate_limited`).

    `retry_after`: seconds that it asks to wait, if it does.
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
    """The model can't be reached (`unreachable`)."""


class BadReply(ModelError):
    """The model's reply can't be read (`bad_reply`)."""


class NoVerdict(ModelError):
    """The model answers neither yes nor no where it is asked for that (`no_verdict`)."""
