"""The messagebus of a device, for a command that has a sentence to say or asks which services are there.

Each call has a connection of its own: whoever stays without reading makes the bus keep everything for them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect

TIMEOUT = 2.0
"""Seconds in which the bus must open; it is on this machine."""

_LARGEST = 32 * 1024 * 1024
"""Bytes of one message of others: OVOS allows 25 MB."""


def address(configuration: Mapping[str, Any]) -> str:
    """Where the bus is, by the section `websocket` of what OVOS reads."""
    told = configuration.get("websocket")
    section = told if isinstance(told, Mapping) else {}
    host = str(section.get("host") or "127.0.0.1")
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 - where it listens, not where we do
    scheme = "wss" if section.get("ssl") else "ws"
    return f"{scheme}://{host}:{section.get('port') or 8181}{section.get('route') or '/core'}"


def say(configuration: Mapping[str, Any], text: str, language: str) -> bool:
    """Have the device say something; false where there is no bus. Whether anybody speaks there is not known."""
    with suppress(OSError, WebSocketException, ValueError), _open(configuration) as bus:
        _send(bus, "speak", {"utterance": text, "lang": language})
        return True
    return False


def ready(configuration: Mapping[str, Any], services: Iterable[str], timeout: float = TIMEOUT) -> dict[str, bool]:
    """Which of these services (`skills`, `audio`, `voice`) say within `timeout` seconds that they are ready.

    Raises `ConnectionError` where there is no bus.
    """
    found = dict.fromkeys(services, False)
    asked = {f"mycroft.{name}.is_ready.response": name for name in found}
    try:
        with _open(configuration) as bus:
            for name in found:
                _send(bus, f"mycroft.{name}.is_ready", {})
            until = time.monotonic() + timeout
            waiting = set(asked)
            while waiting and (left := until - time.monotonic()) > 0:
                with suppress(TimeoutError):
                    told = json.loads(bus.recv(timeout=left))
                    kind = told.get("type") if isinstance(told, dict) else None
                    if kind in waiting:
                        waiting.discard(kind)
                        found[asked[kind]] = bool((told.get("data") or {}).get("status"))
    except (OSError, WebSocketException, ValueError) as error:
        raise ConnectionError("the messagebus does not answer") from error
    return found


def _open(configuration: Mapping[str, Any]) -> ClientConnection:
    return connect(
        address(configuration),
        open_timeout=TIMEOUT,
        close_timeout=TIMEOUT,
        compression=None,
        max_size=_LARGEST,
        proxy=None,
    )


def _send(bus: ClientConnection, kind: str, data: dict[str, Any]) -> None:
    bus.send(json.dumps({"type": kind, "data": data, "context": {"source": "avb"}}))
