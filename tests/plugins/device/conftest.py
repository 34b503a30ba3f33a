"""A platform small enough to misbehave in every way, and devices that bear with it."""

from __future__ import annotations

import asyncio
import contextlib
import http
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from agentvoicebox.plugins.device import connection, wire
from agentvoicebox.plugins.device.choices import Choices
from agentvoicebox.plugins.device.link import Link, State
from agentvoicebox.plugins.device.section import Section

KEY = "avb_" + "k" * 43
SPEECH = b"\1\2" * 100
PATIENCE = 30.0
"""Seconds that a test waits for what must happen at some time."""
SILENT = connection.SILENT

Part = Any
"""Of an answer: something said, a frame as it is, seconds to wait, or a function that is given the socket."""


def until(condition: Callable[[], Any]) -> Any:
    """Wait until something is so."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.005)
    return value


class Platform:
    """Speaks `wire` on a port of this machine, from a thread of its own."""

    def __init__(self) -> None:
        self.port = 0
        self.choices: Choices | None = None
        self.time = 1_800_000_000.0
        self.beats = True
        self.refusal: tuple[int, str, str] | None = None
        """Status, type and body in place of a socket."""
        self.elsewhere = "http://127.0.0.1:9/login"
        self.greet: Callable[[wire.Hello], Iterable[Part]] = self._greet
        self.answers: dict[type[wire.Said], Callable[[Any], Iterable[Part]]] = {
            wire.Finish: lambda said: [wire.Transcript(said.id, f"{len(self.audio[said.id])} bytes", engine="test")],
            wire.Speak: lambda said: [wire.Sound(said.id, 24_000), wire.audio(said.id, SPEECH), wire.Done(said.id)],
            wire.Ask: lambda said: [*(wire.Text(said.id, word) for word in ("It is ", "ten.")), wire.Done(said.id)],
            wire.About: lambda said: [wire.Told(said.id, {"skill": said.skill})],
            wire.Choose: lambda said: [wire.Told(said.id, {"persona": said.persona or "Ada"})],
            wire.Report: self._take,
        }
        self.said: list[wire.Said] = []
        self.audio: dict[int, bytes] = defaultdict(bytes)
        self.events: dict[str, dict[str, Any]] = {}
        self.requests: list[Request] = []
        self._sockets: set[ServerConnection] = set()
        self._thawed = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server: Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, trust: ssl.SSLContext | None = None) -> Platform:
        """Listen, on the same port as before."""

        async def listen() -> None:
            self._server = await serve(
                self._serve,
                "127.0.0.1",
                self.port,
                process_request=self._check,
                compression=None,
                ping_interval=None,
                close_timeout=0.1,
                ssl=trust,
            )
            self.port = self._server.sockets[0].getsockname()[1]

        self._call(listen()).result(PATIENCE)
        return self

    def stop(self) -> None:
        """Be gone, as after a crash."""

        async def leave() -> None:
            for socket in self._sockets:
                socket.transport.abort()
            if self._server is not None:
                self._server.close()
                await self._server.wait_closed()

        self._call(leave()).result(PATIENCE)

    def freeze(self) -> None:
        """Keep the port and all connections, and do nothing: a process that has been stopped."""
        self._thawed.clear()
        frozen = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (frozen.set(), self._thawed.wait()))
        assert frozen.wait(PATIENCE)

    def thaw(self) -> None:
        self._thawed.set()

    def push(self, *parts: Part) -> None:
        """Say this to everybody who is connected."""

        async def say() -> None:
            for socket in list(self._sockets):
                for part in parts:
                    await self._say(socket, part)

        self._call(say()).result(PATIENCE)

    def end(self) -> None:
        async def quiet() -> None:
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE):
                    while len(self._loop._selector.get_map()) > 1:  # handshakes that fail close their sockets later
                        await asyncio.sleep(0.005)

        self.thaw()
        self.stop()
        self._call(quiet()).result(PATIENCE)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()

    def told(self, kind: type[Any]) -> list[Any]:
        """What devices have said of this kind."""
        return [said for said in self.said if isinstance(said, kind)]

    def configured(self) -> wire.Configured:
        assert self.choices is not None
        return wire.Configured(self.choices.etag, self.choices.as_dict())

    def _call(self, work: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _check(self, socket: ServerConnection, request: Request) -> Response | None:
        self.requests.append(request)
        if self.refusal is None:
            return None
        status, kind, body = self.refusal
        headers = Headers({"Content-Type": kind, "Content-Length": str(len(body.encode())), "Connection": "close"})
        if 300 <= status < 400:
            headers["Location"] = self.elsewhere
        return Response(status, http.HTTPStatus(status).phrase, headers, body.encode())

    def _greet(self, hello: wire.Hello) -> Iterable[Part]:
        yield wire.Welcome("tenant", "Acme", "device", self.time)
        if self.choices is not None and hello.have != self.choices.etag:
            yield self.configured()

    def _take(self, said: wire.Report) -> Iterable[Part]:
        self.events |= {event["id"]: event for event in said.events}
        return [wire.Done(said.id)]

    async def _serve(self, socket: ServerConnection) -> None:
        busy: dict[int, asyncio.Task[None]] = {}
        try:
            hello = wire.decode(str(await socket.recv()), wire.FROM_DEVICE)
            assert isinstance(hello, wire.Hello)
            self.said.append(hello)
            self._sockets.add(socket)
            for part in self.greet(hello):
                await self._say(socket, part)
            async for frame in socket:
                if isinstance(frame, bytes):
                    number, pcm = wire.split(frame)
                    self.audio[number] += pcm
                    continue
                said = wire.decode(frame, wire.FROM_DEVICE)
                self.said.append(said)
                number = getattr(said, "id", 0)
                if number not in busy:
                    busy[number] = asyncio.create_task(self._beat(socket, number))
                if isinstance(said, wire.Cancel):
                    busy[number].cancel()
                for part in self.answers.get(type(said), lambda _: ())(said):
                    await self._say(socket, part)
                    if isinstance(part, wire.Done | wire.Transcript | wire.Told | wire.Problem):
                        busy[number].cancel()
        except ConnectionClosed:
            pass
        finally:
            self._sockets.discard(socket)
            for task in busy.values():
                task.cancel()

    async def _beat(self, socket: ServerConnection, number: int) -> None:
        with contextlib.suppress(ConnectionClosed):
            while self.beats:
                await socket.send(wire.encode(wire.Working(number)))
                await asyncio.sleep(wire.BEAT)

    async def _say(self, socket: ServerConnection, part: Part) -> None:
        if isinstance(part, wire.Said):
            await socket.send(wire.encode(part))
        elif isinstance(part, str | bytes):
            await socket.send(part)
        elif isinstance(part, float):
            await asyncio.sleep(part)
        else:
            await part(socket)


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Links wait for long unless a test is about that: what answers them may stand still for seconds."""
    for name in ("OPENING", "WELCOME", "SILENT", "FORGOTTEN"):
        monkeypatch.setattr(connection, name, PATIENCE)


@pytest.fixture
def silence(_patience: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links wait for no platform that says nothing for longer than everywhere."""
    monkeypatch.setattr(connection, "SILENT", SILENT)


@pytest.fixture
def platform() -> Iterator[Platform]:
    """A platform that runs."""
    running = Platform().start()
    yield running
    running.end()


@pytest.fixture
def place(tmp_path: Path) -> Section:
    """A section without a url, and the key in its file."""
    (tmp_path / "device.key").write_text(KEY + "\n")
    return Section("", tmp_path / "device.key", state=tmp_path / "state")


NewLink = Callable[..., Link]


@pytest.fixture
def new_link(platform: Platform, place: Section) -> Iterator[NewLink]:
    """Makes links to the platform, or with other fields of the section, which are closed after the test."""
    links: list[Link] = []

    def make(process: str = "listener", **fields: Any) -> Link:
        told = {name: getattr(place, name) for name in ("key_file", "tenant", "ca_file", "state")}
        links.append(Link(Section(**{"url": platform.url, **told, **fields}), process, name="kitchen"))
        return links[-1]

    yield make
    for link in links:
        link.close()


@pytest.fixture
def link(new_link: NewLink) -> Link:
    """A link that is up."""
    made = new_link()
    until(lambda: made.state is State.UP)
    return made


@pytest.fixture(name="until")
def _until() -> Callable[[Callable[[], Any]], Any]:
    """Waits until something is so, and gives it."""
    return until
