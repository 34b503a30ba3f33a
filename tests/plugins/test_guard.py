"""Guard: small services for one cell."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ovos_bus_client import MessageBusClient
from ovos_bus_client.message import Message
from ovos_bus_client.session import SessionManager
from ovos_config.config import Configuration
from ovos_utils.fakebus import FakeBus

from agentvoicebox.config import ovos
from agentvoicebox.plugins.guard import Guard


@pytest.fixture(autouse=True)
def in_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = {"intents": {"pipeline": list(ovos.PIPELINE)}}
    monkeypatch.setattr(Configuration, "load_all_configs", lambda *_: pipeline)


@pytest.fixture
def bus() -> FakeBus:
    return FakeBus()


@pytest.fixture
def guard(bus: FakeBus) -> Iterator[Guard]:
    plugin = Guard(bus)
    yield plugin
    plugin.shutdown()


def _ask(guard: Guard, utterance: str, session: str | None) -> bool:
    context = {"session": {"session_id": session}} if session else {}
    return guard.match([utterance], "en-us", Message("recognizer_loop:utterance", {}, context)) is not None


def test_only_the_canary_is_matched(guard: Guard) -> None:
    assert _ask(guard, ovos.CANARY_UTTERANCE, ovos.CANARY_SESSION)
    assert _ask(guard, ovos.CANARY_UTTERANCE, f"{ovos.CANARY_SESSION}-2")
    assert not _ask(guard, ovos.CANARY_UTTERANCE, "a tenant's session")
    assert not _ask(guard, ovos.CANARY_UTTERANCE, None)
    assert not _ask(guard, "what time is it", ovos.CANARY_SESSION)


def test_core_is_told_at_once_what_is_not_there(bus: FakeBus, guard: Guard) -> None:
    screen = bus.wait_for_response(Message("gui.status.request"), timeout=1)
    network = bus.wait_for_response(Message("ovos.PHAL.internet_check"), timeout=1)
    assert screen.data == {"connected": False}
    assert network.data == {"network_connected": False, "internet_connected": False}


def test_a_session_is_forgotten(bus: FakeBus, guard: Guard) -> None:
    for name in ("stays", "goes"):
        SessionManager.get(Message("", {}, {"session": {"session_id": name}}))
    for name in ("goes", "never was", "default", None):
        bus.emit(Message("avb.session.forget", {"session_id": name}))
    bus.emit(Message("avb.session.forget"))
    assert "goes" not in SessionManager.sessions
    assert {"stays", "default"} <= set(SessionManager.sessions)
    SessionManager.sessions.pop("stays")


def test_the_pool_of_core_is_widened_and_never_narrowed() -> None:
    client = MessageBusClient()
    Guard(client)
    pool = client.emitter._executor
    assert pool._max_workers == 64
    pool._max_workers = 100
    Guard(client)
    assert pool._max_workers == 100


def test_after_shutdown_nobody_answers(bus: FakeBus, guard: Guard) -> None:
    guard.shutdown()
    assert bus.wait_for_response(Message("gui.status.request"), timeout=0.05) is None


def test_on_a_device_it_says_nothing_of_screens_and_networks(bus: FakeBus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Configuration, "load_all_configs", lambda *_: {"intents": {"pipeline": ["adapt_high"]}})
    plugin = Guard(bus)
    for question in ("gui.status.request", "ovos.PHAL.internet_check"):
        assert bus.wait_for_response(Message(question), timeout=0.05) is None
    plugin.shutdown()
