"""On whose behalf a plugin works: the message of the bus that it was called for, and whose that is.

On the microphone's path there is no message: what is said there is for the tenant of the process.
"""

from __future__ import annotations

import sys
from typing import Protocol

from ovos_bus_client.message import Message

TENANT = "tenant_id"
"""The key of a message's context that names its tenant; what lies inside of the session is dropped on the way."""

_DEPTH = 12
"""Callers that are looked at."""


class _Welcomed(Protocol):
    @property
    def tenant_id(self) -> str: ...


def message() -> Message | None:
    """The message that the calling code handles, if it handles one.

    As `dig_for_message` of ovos-bus-client finds it: the nearest caller with a `Message` among its arguments. That
    one reads the source file of every caller, which takes milliseconds; this takes microseconds.
    """
    frame = sys._getframe(1)
    for _ in range(_DEPTH):
        code, known = frame.f_code, frame.f_locals
        for name in code.co_varnames[: code.co_argcount]:
            if isinstance(known.get(name), Message):
                return known[name]
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return None


def is_foreign(asked: Message | None, welcome: _Welcomed | None) -> bool:
    """Whether a message is of another tenant than the platform has welcomed this process for.

    One that names a tenant while nobody knows whose this device is counts as foreign too.
    """
    named = (asked.context or {}).get(TENANT) if asked is not None else None
    return bool(named) and (welcome is None or named != welcome.tenant_id)
