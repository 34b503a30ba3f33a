"""Sockets of the real node, opened as clients do; and a store without a node."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

REALTIME = "/v1/realtime?model=gpt-realtime"
NATIVE = "/ws/v2/sessions/00000000-0000-4000-8000-000000000000"


class Sockets:
    """Both doors of a node."""

    paths = (REALTIME, NATIVE)

    def __init__(self, url: str) -> None:
        self._url = url
        self._ws = url.replace("http", "ws", 1)

    async def create(self, customer: Any, **config: Any) -> dict[str, str]:
        """A native session, not connected yet."""
        async with httpx.AsyncClient(headers=customer.headers) as http:
            reply = await http.post(f"{self._url}/api/v2/sessions", json=config)
        assert reply.status_code == 201, reply.text
        made: dict[str, str] = reply.json()
        return made

    def connect(self, path: str, customer: Any) -> AbstractAsyncContextManager[ClientConnection]:
        """A socket at `path`."""
        return connect(self._ws + path, additional_headers=customer.headers, compression=None, max_size=None)

    @asynccontextmanager
    async def native(self, customer: Any, **config: Any) -> AsyncIterator[ClientConnection]:
        """A connected native session, past its opening frames."""
        made = await self.create(customer, **config)
        async with self.connect(f"/ws/v2/sessions/{made['session_id']}", customer) as socket:
            assert (await self.read(socket))["type"] == "connection.established"
            assert (await self.read(socket))["type"] == "session.state"
            yield socket

    @asynccontextmanager
    async def realtime(self, customer: Any) -> AsyncIterator[ClientConnection]:
        """A connected Realtime session, past its opening frame."""
        async with self.connect(REALTIME, customer) as socket:
            assert (await self.read(socket))["type"] == "session.created"
            yield socket

    async def read(self, socket: ClientConnection) -> dict[str, Any]:
        """The next event."""
        event: dict[str, Any] = json.loads(await asyncio.wait_for(socket.recv(), 30))
        return event

    async def ping(self, socket: ClientConnection) -> None:
        """See that a native session lives."""
        await socket.send(json.dumps({"type": "ping"}))
        assert (await self.read(socket))["type"] == "pong"

    async def refused(self, path: str, customer: Any) -> tuple[int, str, dict[str, str]]:
        """Status, error code in the door's own format, and headers of the refusal at `path`."""
        with pytest.raises(InvalidStatus) as caught:
            async with self.connect(path, customer):
                pass
        response = caught.value.response
        body = json.loads(response.body)
        code = body["error"]["code"] if path == REALTIME else body["error"]
        return response.status_code, code, dict(response.headers)

    async def closed(self, socket: ClientConnection) -> tuple[int, str]:
        """Read until the node closes; the close code and reason."""
        with suppress(ConnectionClosed):
            async with asyncio.timeout(30):
                async for _ in socket:
                    pass
        assert socket.close_code is not None
        return socket.close_code, socket.close_reason or ""


@pytest.fixture(scope="session")
def sockets(stack: Any) -> Sockets:
    """The doors of the installation."""
    return Sockets(stack.url)


@pytest.fixture
def still(stack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clocks stand still by which the node counts requests and trusts what it remembers of keys.

    So however long a test is kept from running, no rate allows more meanwhile, and no key has to be looked up again.
    """
    now = time.monotonic()
    monkeypatch.setattr(stack.limiter, "_clock", lambda: now)
    # Where the look at the log of changes is new enough that came last, although the machine may have stalled since.
    monkeypatch.setattr(stack.gateway.door.keyring, "_clock", lambda: now - 30)


@pytest.fixture(scope="session")
async def store(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Any]:
    """A real store with our tables, and nothing else of a node."""
    from agentvoicebox.tenancy.database import Database, prepare
    from agentvoicebox.tenancy.embedded import serving

    data: Path = tmp_path_factory.mktemp("store")
    with serving(data) as postgres:
        await prepare(postgres.url)
        database = Database(postgres.url)
        yield database
        await database.close()
