"""What the JSON doors share: reading a frame strictly, with an error that names the field and the client's event."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec

MAX_FRAME = 32 * 1024 * 1024
"""Bytes of one WebSocket message beyond which the connection is closed (1009); every door's own limits are lower."""

T = TypeVar("T")


class WireError(Exception):
    """A frame that means nothing to us. The session lives on; the client is told `code`, `message` and `param`."""

    def __init__(self, code: str, message: str, param: str | None = None, event_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.event_id = event_id


class _Envelope(msgspec.Struct):
    type: Any = None
    event_id: Any = None


_ENVELOPE = msgspec.json.Decoder(_Envelope)
_PLACE = re.compile(r" - at `\$\.?(.*)`$")
_MISSING = re.compile(r"missing required field `(.+)`")


def decode(frame: str | bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """One client event out of a text frame. Raises `WireError`, and nothing else, whatever the frame holds."""
    if not isinstance(frame, str):
        raise WireError("invalid_json", "Send events as JSON text frames; binary frames are not understood here.")
    try:
        return decoder.decode(frame)
    except msgspec.ValidationError as error:
        raise _explain(frame, str(error)) from error
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise WireError("invalid_json", f"The frame is not valid JSON: {error}.") from error


def check_pcm(pcm: bytes, limit: int, event_id: str | None, param: str = "audio") -> None:
    """Refuse audio that cannot be 16-bit samples or exceeds `limit` bytes."""
    if len(pcm) > limit:
        raise WireError(
            "invalid_audio", f"At most {limit} bytes of audio fit into one event, this has {len(pcm)}.", param, event_id
        )
    if len(pcm) % 2:
        raise WireError(
            "invalid_audio", "16-bit audio has an even number of bytes; send whole samples.", param, event_id
        )


def encode(message: dict[str, Any]) -> str:
    """A frame for the client."""
    return msgspec.json.encode(message).decode()


class Clock:
    """The time of day as ISO 8601 in UTC with milliseconds; made anew once a second, since every frame carries it."""

    def __init__(self, seconds: Callable[[], float] = time.time) -> None:
        self._seconds = seconds
        self._second = -1
        self._prefix = ""

    def __call__(self) -> str:
        """Now, as in `2026-01-02T03:04:05.678+00:00`."""
        second, thousandths = divmod(round(self._seconds() * 1000), 1000)
        if second != self._second:
            self._second = second
            self._prefix = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        return f"{self._prefix}.{thousandths:03d}+00:00"


def _explain(frame: str, reason: str) -> WireError:
    event_id, kind = _envelope(frame)
    found = _PLACE.search(reason)
    place = found.group(1) if found else ""
    text = reason[: found.start()] if found else reason
    if missing := _MISSING.search(text):
        param = f"{place}.{missing.group(1)}" if place else missing.group(1)
        return WireError("missing_required_parameter", f"Parameter {param} is required.", param, event_id)
    if place == "type" or ("`object`, got" in text and not place):
        if isinstance(kind, str):
            return WireError("unknown_message_type", f"There is no client event {kind[:80]!r} here.", "type", event_id)
        return WireError("invalid_value", "An event is a JSON object with a string `type`.", "type", event_id)
    return WireError("invalid_value", f"{text}.", place or None, event_id)


def _envelope(frame: str) -> tuple[str | None, Any]:
    try:
        envelope = _ENVELOPE.decode(frame)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None, None
    return (envelope.event_id if isinstance(envelope.event_id, str) else None), envelope.type
