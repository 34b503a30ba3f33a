"""One conversation a device, which ends when nobody asks for long."""

from __future__ import annotations

import uuid

import pytest

from agentvoicebox.bus_bridge.device import talks
from agentvoicebox.bus_bridge.device.talks import IDLE, Talks

TENANT, OTHER, DEVICE = (uuid.uuid4() for _ in range(3))


def test_a_device_goes_on_where_it_was_and_nobody_else_does():
    kept = Talks()
    talk = kept.of(TENANT, DEVICE, None, 0.0)
    talk.note("hello", "hi")
    assert kept.of(TENANT, DEVICE, None, IDLE) is talk
    assert kept.of(OTHER, DEVICE, None, IDLE).messages() == []


def test_what_rests_for_long_is_forgotten_also_while_the_device_is_connected():
    kept = Talks()
    talk = kept.of(TENANT, DEVICE, None, 0.0)
    talk.note("hello", "hi")
    talk.persona = "Ada"
    kept.keep(TENANT, DEVICE, talk, IDLE + 1)
    assert talk.messages() == []
    assert talk.persona == "Ada"
    assert kept.of(TENANT, DEVICE, None, IDLE + 2) is talk
    kept.forget(2 * IDLE + 3)
    assert len(kept) == 0


def test_there_are_not_too_many(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(talks, "MOST", 2)
    kept = Talks()
    first = kept.of(TENANT, DEVICE, None, 0.0)
    for _ in range(2):
        kept.of(TENANT, uuid.uuid4(), None, 1.0)
    assert len(kept) == 2
    assert kept.of(TENANT, DEVICE, None, 2.0) is not first
