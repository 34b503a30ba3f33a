"""How errors look over HTTP: one format, made in one place for every door that answers in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from agentvoicebox.config.errors import AvbError, RateLimited

Headers = list[tuple[bytes, bytes]]

UNEXPECTED = "Something went wrong on our side; tell us the X-Request-ID of this answer."


class Error(msgspec.Struct, omit_defaults=True):
    """What went wrong. `error` is for machines and never changes; `message` names the remedy."""

    error: str
    message: str
    details: Mapping[str, Any] | None = None
    """By field."""
    retry_after: int | None = None
    """Seconds."""


class Answer(msgspec.Struct):
    """A whole answer, ready to be sent."""

    status: int
    headers: Headers
    body: bytes


def known(error: AvbError) -> Answer:
    """The answer that tells of an error of ours."""
    details = {error.param: error.message} if error.param else None
    wait = max(1, math.ceil(error.retry_after)) if isinstance(error, RateLimited) else None
    return answer(error.status, error.code, error.message, details, wait)


def unexpected() -> Answer:
    """The answer to what nobody thought of: it tells nothing about our insides."""
    return answer(500, "internal_error", UNEXPECTED)


def answer(
    status: int, code: str, message: str, details: Mapping[str, Any] | None = None, retry_after: int | None = None
) -> Answer:
    """An error's answer."""
    body = msgspec.json.encode(Error(code, message, details or None, retry_after))
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if retry_after is not None:
        headers.append((b"retry-after", b"%d" % retry_after))
    return Answer(status, headers, body)
