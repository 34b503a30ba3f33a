"""One real installation for all tests that need one: store, stock OVOS cell, engines, bridge and REST service."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import tempfile
import uuid
import wave
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from websockets.asyncio.client import connect

# OVOS looks for configuration, and writes some, when it is imported: not into the home of whoever runs the tests.
_home = tempfile.TemporaryDirectory(prefix="agentvoicebox-tests-")
for _name in ("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_CONFIG_DIRS"):
    os.environ[_name] = _home.name

# A shell has what it starts in the background ignore SIGINT; so would all that tests start and then break off.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Otherwise an example that takes 0.2 s on a busy machine is taken for a mistake.
hypothesis.settings.register_profile("patient", hypothesis.settings.default, deadline=None)
hypothesis.settings.load_profile("patient")

if TYPE_CHECKING:
    from agentvoicebox.admin_api.stack import Stack


@pytest.fixture(scope="session")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """The installation, on a free port, with the offline engines. It bears with all the bad keys of the tests."""
    from agentvoicebox.admin_api.stack import Stack
    from agentvoicebox.config import settings
    from agentvoicebox.tenancy import limits

    data = tmp_path_factory.mktemp("stack")
    running = Stack(settings.load({"data": data, "port": 0, "engine": "offline"}, environ={"HOME": str(data)}))
    await running.start()
    running.limiter.failures = limits.Rate(1_000_000, 60_000_000)
    yield running
    await running.stop()


@dataclass(frozen=True, slots=True)
class Customer:
    """A tenant of a test, and the key it uses."""

    id: uuid.UUID
    slug: str
    name: str
    key: str
    key_id: uuid.UUID

    @property
    def headers(self) -> dict[str, str]:
        """What its requests carry."""
        return {"Authorization": f"Bearer {self.key}"}


NewCustomer = Callable[..., Awaitable[Customer]]


@pytest.fixture(scope="session")
def new_customer(stack: Stack) -> NewCustomer:
    """Makes tenants with one key; further keyword arguments are those of `VoiceConfig`."""
    from agentvoicebox.tenancy import keys, tenants
    from agentvoicebox.tenancy.voices import VoiceConfig

    async def make(
        *,
        scopes: tuple[str, ...] = ("realtime",),
        expires_at: object = None,
        tier: str = "enterprise",
        rate_class: str = "unlimited",
        **voice: object,
    ) -> Customer:
        slug = f"t-{uuid.uuid4().hex[:12]}"
        tenant = await tenants.create(stack.database, slug, f"Tenant {slug}", tier, voice=VoiceConfig(**voice))
        issued = await keys.issue(stack.database, tenant.id, "test", scopes, expires_at, rate_class=rate_class)
        return Customer(tenant.id, slug, tenant.name, issued.key, issued.id)

    return make


@pytest.fixture(scope="session")
async def customer(new_customer: NewCustomer) -> Customer:
    """A tenant for tests that change nothing about it."""
    return await new_customer(persona_name="Ada")


class Wiretap:
    """Everything that crosses a cell's bus."""

    def __init__(self, url: str) -> None:
        self.messages: list[dict[str, Any]] = []
        self._url = url

    async def __aenter__(self) -> Wiretap:
        self._socket = await connect(self._url, compression=None, max_size=None, proxy=None)
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(0.2)
        await self._socket.close()  # the bus answers that after all that it has sent before, and the reader ends
        await asyncio.gather(self._reader, return_exceptions=True)

    async def _read(self) -> None:
        async for frame in self._socket:
            self.messages.append(json.loads(frame))


@pytest.fixture
def wiretap(stack: Stack) -> Callable[[], Wiretap]:
    """Listens to the bus of the installation's cell, as a context manager."""
    return lambda: Wiretap(stack.cells["cell-1"].url)


@pytest.fixture(scope="session")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    """Somebody saying a sentence: 16 kHz 16-bit mono audio of a real voice."""
    directory: Path = tmp_path_factory.mktemp("speech")

    def say(sentence: str, voice: str = "slt") -> bytes:
        file = directory / f"{voice}-{sentence.replace(' ', '-')}.wav"
        if not file.exists():
            subprocess.run(["flite", "-voice", voice, "-t", sentence, "-o", str(file)], check=True)
        with wave.open(str(file)) as wav:
            assert wav.getframerate() == 16_000
            return wav.readframes(wav.getnframes())

    return say


class LanguageModel:
    """A real HTTP server that speaks OpenAI's streaming protocol and says what it is told to."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        """The bodies of requests."""
        self.keys: list[str] = []
        """The keys that came with them."""
        self.hung_up = asyncio.Event()
        """Set when a client goes away in the middle of an answer."""
        self.url = ""
        self.says()

    def says(
        self,
        *pieces: str | dict[str, Any],
        finish: str = "stop",
        usage: dict[str, int] | None = None,
        status: int = 200,
        breaks_off: bool = False,
        hold_after: int | None = None,
    ) -> None:
        """From now on: the pieces (texts, or whole deltas), then the end, unless it breaks off or holds on before."""
        self._pieces = pieces or ("Hello", " there.")
        self._finish = finish
        self._usage = usage or {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        self._status = status
        self._breaks_off = breaks_off
        self._hold_after = hold_after
        self.go_on = asyncio.Event()
        """Ends the hold."""
        self.hung_up.clear()

    async def start(self) -> None:
        """Listen on a free port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()[:2]
        self.url = f"http://{host}:{port}/v1"

    async def stop(self) -> None:
        """Listen no more."""
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode("latin-1"):
                fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
                body = await reader.readexactly(int(fields["content-length"]))
                self.asked.append(json.loads(body))
                keys = [line[22:].strip() for line in head.split("\r\n") if line.lower().startswith("authorization: ")]
                self.keys += keys or [""]
                await self._answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._status != 200:
            said = b'{"error": {"message": "no", "type": "no", "code": null}}'
            head = (
                f"HTTP/1.1 {self._status} No\r\nContent-Type: application/json\r\nContent-Length: {len(said)}\r\n\r\n"
            )
            writer.write(head.encode() + said)
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number, piece in enumerate(self._pieces):
            if number == self._hold_after:
                await self._hold(reader)
            delta = {"content": piece} if isinstance(piece, str) else piece
            self._event(writer, {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
            await writer.drain()
        if self._breaks_off:
            raise ConnectionResetError
        self._event(writer, {"choices": [{"index": 0, "delta": {}, "finish_reason": self._finish}]})
        self._event(writer, {"choices": [], "usage": self._usage})
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    async def _hold(self, reader: asyncio.StreamReader) -> None:
        end, go_on = (asyncio.ensure_future(coroutine) for coroutine in (reader.read(1), self.go_on.wait()))
        done, waiting = await asyncio.wait((end, go_on), return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        if end in done:
            self.hung_up.set()
            raise ConnectionResetError

    def _event(self, writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
        common = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        data = b"data: " + json.dumps(common | event).encode() + b"\n\n"
        writer.write(b"%x\r\n%s\r\n" % (len(data), data))


@pytest.fixture(scope="session")
def new_language_model() -> Callable[[], LanguageModel]:
    """Makes providers of language models, for whoever needs one for longer than a test; start and stop them."""
    return LanguageModel


@pytest.fixture
async def language_model() -> AsyncIterator[LanguageModel]:
    """A provider of the test's own."""
    model = LanguageModel()
    await model.start()
    yield model
    await model.stop()
