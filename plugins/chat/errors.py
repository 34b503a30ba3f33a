"""What can go wrong between us and a provider of language models, by name.

The errors of SDKs quote what was sent and what came back (prompts, keys in refusals, answers), so none of them leaves
this package: `named` reads their kind and makes one of ours, which says nothing that a log may not hold.
"""

from __future__ import annotations

import json
import math
from typing import ClassVar

from agentvoicebox.config.errors import AvbError
from agentvoicebox.plugins.chat.tokens import Tokens

MESSAGES = {
    "provider_unreachable": "The language model's server cannot be reached; check its address, or try again.",
    "provider_forbidden_address": "The language model's URL leads to an address that is not public; use a public one.",
    "provider_timeout": "The language model took too long; try again, or choose a faster model.",
    "provider_overloaded": "The language model's provider takes no more requests now; try again later.",
    "provider_refused": "The language model's provider refused the key; check it.",
    "provider_rejected": "The language model's provider did not take the request; check the model's name and the URL.",
    "provider_failed": "The language model's provider failed; try again.",
    "provider_garbage": "What answered is no language model's server that we understand; check the URL and provider.",
    "provider_broke_off": "The language model's provider broke off in the middle; try again.",
}
WORTH_A_RETRY = frozenset({"provider_unreachable", "provider_overloaded", "provider_failed", "provider_broke_off"})
"""Those that the same request may not meet a moment later."""
OUR_OWN_FAULT = frozenset({"provider_rejected", "provider_refused", "provider_forbidden_address"})
"""Those that say nothing about the provider's health."""


class ProviderFailed(AvbError):
    """A provider of language models did not do what it should.

    `tokens` is what was used until then, `retry_after` the seconds that the provider asked us to wait, if it did, and
    `about` the parameter it complained of.
    """

    status: ClassVar[int] = 502
    default_code: ClassVar[str] = "provider_failed"

    def __init__(self, code: str, *, retry_after: float | None = None, about: str | None = None) -> None:
        super().__init__(MESSAGES[code], code=code)
        self.retry_after = retry_after
        self.about = about
        self.tokens = Tokens(0, 0)


def named(error: BaseException) -> ProviderFailed:
    """The error of ours for one of an SDK, of its HTTP client, or of a decoder; it does not refer to the other."""
    reason: BaseException | None = error
    while reason is not None:  # SDKs wrap what their HTTP client and our own hooks raise
        if isinstance(reason, ProviderFailed):
            return ProviderFailed(reason.code)  # a new one: the other holds on to the frames it came through
        status = getattr(reason, "status_code", None)
        if isinstance(status, int) and status >= 300:
            return _of_status(status, reason)
        kinds = {kind.__name__ for kind in type(reason).__mro__}
        if isinstance(reason, TimeoutError) or "TimeoutException" in kinds:
            # An address at which nothing answers is out of reach; too slow is what has begun to talk to us.
            return ProviderFailed("provider_unreachable" if "ConnectTimeout" in kinds else "provider_timeout")
        if "RemoteProtocolError" in kinds:
            # Told apart by words, since HTTP clients have one class for "closed early" and "not HTTP at all".
            closed = "closed" in str(reason) or "disconnected" in str(reason)
            return ProviderFailed("provider_broke_off" if closed else "provider_garbage")
        if kinds & {"ReadError", "WriteError", "CloseError"}:
            return ProviderFailed("provider_broke_off")
        if kinds & {"ConnectError", "UnsupportedProtocol", "OSError"}:
            return ProviderFailed("provider_unreachable")
        if "DecodingError" in kinds or isinstance(reason, ValueError):  # JSON, UTF-8, and what models are built from
            return ProviderFailed("provider_garbage")
        reason = reason.__cause__ or reason.__context__
    return ProviderFailed("provider_failed")


def _of_status(status: int, error: BaseException) -> ProviderFailed:
    if status in (401, 403):
        return ProviderFailed("provider_refused")
    if status in (429, 503, 529):  # 529 is Anthropic's "overloaded"
        return ProviderFailed("provider_overloaded", retry_after=_retry_after(error))
    if status == 408:
        return ProviderFailed("provider_timeout")
    if status >= 500:
        return ProviderFailed("provider_failed", retry_after=_retry_after(error))
    return ProviderFailed("provider_rejected", about="temperature" if _mentions_temperature(error) else None)


def _retry_after(error: BaseException) -> float | None:
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    try:
        seconds = float(headers.get("retry-after", ""))
    except ValueError:  # none, or a date, which nobody who thinks of seconds sends
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _mentions_temperature(error: BaseException) -> bool:
    body = getattr(error, "body", None)
    return "temperature" in json.dumps(body, default=str) if body else "temperature" in str(error)
