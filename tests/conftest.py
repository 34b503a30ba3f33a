"""One real installation for all tests that need one: store, stock OVOS cell, engines, bridge and REST service."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import tempfile
import uuid
import wave
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from websockets.asyncio.client import connect

# OVOS looks for configuration, and writes some, when it is imported: not into the home of whoever runs the tests.
_home = tempfile.TemporaryDirectory(prefix="agentvoicebox-tests-")
for _name in ("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_CONFIG_DIRS"):
    os.environ[_name] = _home.name

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
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._socket.close()

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
