"""What devices tell of themselves, as far as it makes sense. Pure."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from agentvoicebox.config.errors import BadInput
from agentvoicebox.tenancy.devices import DeviceEvent

_LAST = 4e9
"""Seconds since 1970, in the year 2096: no clock is that wrong."""


def read(events: Sequence[object]) -> tuple[list[DeviceEvent], int]:
    """The events that make sense, each once; and how many others there are."""
    found: dict[uuid.UUID, DeviceEvent] = {}
    bad = 0
    for told in events:
        try:
            event = _event(told)
        except (BadInput, ValueError, TypeError, OverflowError):
            bad += 1
        else:
            found.setdefault(event.id, event)
    return list(found.values()), bad


def _event(told: object) -> DeviceEvent:
    if not isinstance(told, Mapping):
        raise TypeError("an event is an object")
    at, named, confidence = told.get("at"), told.get("wake_word"), told.get("confidence")
    if isinstance(at, bool) or not isinstance(at, int | float) or not 0 <= at <= _LAST:
        raise ValueError("at")
    return DeviceEvent(
        id=uuid.UUID(_text(told, "id")),
        kind=_text(told, "kind"),
        at=datetime.fromtimestamp(at, UTC),
        phrase=_text(told, "phrase"),
        wake_word_id=uuid.UUID(_text(told, "wake_word")) if named else None,
        outcome=_text(told, "outcome"),
        confidence=confidence if confidence is None else _number(confidence),
        engine=_text(told, "engine"),
        seconds=_number(told.get("seconds", 0.0)),
        reason=_text(told, "reason"),
    )


def _text(told: Mapping[str, object], name: str) -> str:
    value = told.get(name, "")
    if not isinstance(value, str):
        raise TypeError(name)
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("number")
    return value
