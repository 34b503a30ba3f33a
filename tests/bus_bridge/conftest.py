"""Sockets of the real node, opened as clients do; and a store and a language model without a node."""

from __future__ import annotations

import asyncio
import json
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
        event: dict[str, Any] = json.loads(await asyncio.wait_for(socket.recv(), 10))
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
            async with asyncio.timeout(10):
                async for _ in socket:
                    pass
        assert socket.close_code is not None
        return socket.close_code, socket.close_reason or ""


@pytest.fixture(scope="session")
def sockets(stack: Any) -> Sockets:
    """The doors of the installation."""
    return Sockets(stack.url)


class LanguageModel:
    """A real HTTP server that speaks OpenAI's protocol and says what it is told to."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        """The bodies of requests."""
        self.keys: list[str] = []
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
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()[:2]
        self.url = f"http://{host}:{port}/v1"

    async def stop(self) -> None:
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


@pytest.fixture
async def language_model() -> AsyncIterator[LanguageModel]:
    """A provider of the test's own."""
    model = LanguageModel()
    await model.start()
    yield model
    await model.stop()


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
