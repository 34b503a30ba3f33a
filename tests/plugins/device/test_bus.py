"""A command at the device's messagebus: the stock one, and none."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from websockets.sync.client import connect

from agentvoicebox.plugins.device import bus

PATIENCE = 30.0
"""Seconds for what comes at some time."""


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bus opens at some time, also on a machine that stands still for seconds."""
    monkeypatch.setattr(bus, "TIMEOUT", PATIENCE)


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What a device with a running messagebus has configured."""
    home = tmp_path_factory.mktemp("bus")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    told = {"websocket": {"host": "0.0.0.0", "port": port, "route": "/core"}}
    file = home / "mycroft" / "mycroft.conf"
    file.parent.mkdir()
    file.write_text(json.dumps(told))
    names = ("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_CONFIG_DIRS")
    environment = {**os.environ, **dict.fromkeys(names, str(home))}
    process = subprocess.Popen(
        [Path(sys.executable).with_name("ovos-messagebus")],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
    yield told
    process.kill()
    process.wait()


class Service:
    """A service on the bus: it says that it is ready, and keeps what it was told to say."""

    def __init__(self, configuration: dict[str, Any], name: str, status: bool = True) -> None:
        self.spoken: list[dict[str, Any]] = []
        self._name, self._status = name, status
        self._socket = connect(bus.address(configuration), compression=None, proxy=None)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        for frame in self._socket:
            told = json.loads(frame)
            if told["type"] == "speak":
                self.spoken.append(told["data"])
            if told["type"] == f"mycroft.{self._name}.is_ready":
                answer = {"type": told["type"] + ".response", "data": {"status": self._status}, "context": {}}
                self._socket.send(json.dumps(answer))

    def close(self) -> None:
        self._socket.close()
        self._thread.join(5)


def test_a_sentence_reaches_whoever_speaks(configuration: dict[str, Any]) -> None:
    audio = Service(configuration, "audio")
    assert bus.say(configuration, "Vier, zwei.", "de-de")
    until = time.monotonic() + PATIENCE
    while not audio.spoken and time.monotonic() < until:
        time.sleep(0.01)
    audio.close()
    assert audio.spoken == [{"utterance": "Vier, zwei.", "lang": "de-de"}]


def test_services_that_are_ready_say_so_and_others_are_not_waited_for(
    configuration: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bus.ready(configuration, ("skills",), timeout=0.05) == {"skills": False}
    services = [Service(configuration, "audio"), Service(configuration, "voice", status=False)]
    come: set[str] = set()

    def loads(frame: str) -> Any:
        told = json.loads(frame)
        come.add(told["type"])
        return told

    # The time is up when both answers have come, however long that takes here.
    answers = {f"mycroft.{name}.is_ready.response" for name in ("audio", "voice")}
    monkeypatch.setattr(bus, "json", SimpleNamespace(dumps=json.dumps, loads=loads))
    monkeypatch.setattr(bus, "time", SimpleNamespace(monotonic=lambda: 1.0 if answers <= come else 0.0))
    found = bus.ready(configuration, ("skills", "audio", "voice"), timeout=0.5)
    for service in services:
        service.close()
    assert found == {"skills": False, "audio": True, "voice": False}


def test_without_a_bus_nothing_is_said_and_nobody_is_ready() -> None:
    nowhere = {"websocket": {"port": 9}}
    assert not bus.say(nowhere, "One, two.", "en-US")
    with pytest.raises(ConnectionError):
        bus.ready(nowhere, ("audio",))


def test_something_else_at_its_port_is_no_bus() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")

        threading.Thread(target=answer, daemon=True).start()
        assert not bus.say({"websocket": {"port": server.getsockname()[1]}}, "One.", "en-US")


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (None, "ws://127.0.0.1:8181/core"),
        ({"host": "0.0.0.0", "port": 9181}, "ws://127.0.0.1:9181/core"),
        ({"host": "kitchen.lan", "ssl": True, "route": "/bus"}, "wss://kitchen.lan:8181/bus"),
    ],
)
def test_the_bus_is_where_ovos_is_told_that_it_is(section: dict[str, Any] | None, expected: str) -> None:
    assert bus.address({"websocket": section}) == expected
