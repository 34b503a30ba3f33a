"""The error vocabulary: what went wrong, in a form every door can translate.

AvbError
├── BadInput        400  the caller sent something we cannot use
├── Refused         401  no usable credential
├── Forbidden       403  a credential without the right
├── NotFound        404  no such thing, or not yours
├── Conflict        409  it exists already, or is in another state
├── TooLarge        413  more bytes than are taken
├── RateLimited     429  too much in too short a time
└── Unavailable     503  something we depend on does not answer
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import ClassVar


class AvbError(Exception):
    """Something went wrong that a person can be told about.

    `code` is for machines and never changes; `message` says what happened and names the remedy.
    """

    status: ClassVar[int] = 500
    default_code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param


class BadInput(AvbError):
    """The caller sent something we cannot use; nothing was changed."""

    status = 400
    default_code = "validation_error"


class Refused(AvbError):
    """There is no credential, or it is unknown, revoked or expired."""

    status = 401
    default_code = "invalid_api_key"


class Forbidden(AvbError):
    """The credential is good, but not for this."""

    status = 403
    default_code = "permission_denied"


class NotFound(AvbError):
    """There is no such thing, or it belongs to somebody else."""

    status = 404
    default_code = "not_found"


class Conflict(AvbError):
    """The thing exists already, or is in a state that does not allow this."""

    status = 409
    default_code = "conflict"


class TooLarge(AvbError):
    """The caller sent more than we take; nothing was changed."""

    status = 413
    default_code = "payload_too_large"


class RateLimited(AvbError):
    """The caller asks too often; `retry_after` is the number of seconds after which it may again."""

    status = 429
    default_code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after: float, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message, code=code, param=param)
        self.retry_after = retry_after


class Unavailable(AvbError):
    """Something we depend on does not answer; the same request may succeed later."""

    status = 503
    default_code = "service_unavailable"


def unexpected(error: BaseException) -> str:
    """What a log may say of an error that nobody expected, as in "KeyError at device/house.py:112": its type and where
    it was raised. Never its text, which may quote what was read or said."""
    places = traceback.extract_tb(error.__traceback__)
    if not places:
        return f"{type(error).__name__} at nowhere"
    file = "/".join(Path(places[-1].filename).parts[-2:])  # there are many __init__.py
    return f"{type(error).__name__} at {file}:{places[-1].lineno}"
