"""What devices report: what makes sense of it counts, the rest harms nobody."""

from __future__ import annotations

import time
import uuid
from typing import Any

import pytest

from agentvoicebox.bus_bridge.device import reports


def event(**changes: Any) -> dict[str, Any]:
    told = {"id": uuid.uuid4().hex, "kind": "wake", "at": time.time(), "outcome": "detected", "confidence": 0.75}
    return told | changes


def test_what_makes_sense_is_taken():
    word = uuid.uuid4()
    wake = event(phrase="okay nabu", wake_word=str(word))
    local = {"id": uuid.uuid4().hex, "kind": "stt", "at": 1_700_000_000, "engine": "x", "seconds": 2, "reason": "away"}
    (first, second), bad = reports.read([wake, local])
    assert bad == 0
    assert (first.id.hex, first.phrase, first.wake_word_id, first.confidence) == (wake["id"], "okay nabu", word, 0.75)
    assert (second.kind, second.engine, second.seconds, second.at.timestamp()) == ("stt", "x", 2.0, 1_700_000_000)


def test_one_that_comes_twice_counts_once():
    told = event()
    events, bad = reports.read([told, dict(told)])
    assert (len(events), bad) == (1, 0)


@pytest.mark.parametrize(
    "told",
    [
        None,
        7,
        [],
        "x",
        {},
        event(id="x"),
        event(id=7),
        event(kind="other"),
        event(kind=["wake"]),
        event(at=None),
        event(at="now"),
        event(at=True),
        event(at=float("nan")),
        event(at=float("inf")),
        event(at=-1),
        event(at=10**400),
        event(outcome="perhaps"),
        event(confidence=2),
        event(confidence="much"),
        event(confidence=float("nan")),
        event(seconds=-1),
        event(seconds=10**400),
        event(phrase="x" * 1000),
        event(phrase="a\0b"),
        event(phrase=["x"]),
        event(wake_word="x"),
        event(wake_word=["x"]),
        {"id": uuid.uuid4().hex, "kind": "stt", "at": 1.0, "outcome": "detected"},
    ],
)
def test_what_makes_none_is_passed_over_and_counted(told: Any):
    events, bad = reports.read([told, event()])
    assert (len(events), bad) == (1, 1)
