"""What one connection may cost: time and bytes, tried with real bytes on real sockets."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import uvicorn

from agentvoicebox.admin_api.http import BoundedProtocol, Bounds
from agentvoicebox.admin_api.node import Node
from agentvoicebox.bus_bridge.websocket import BatchingProtocol

HASTY = Bounds(headers=0.3, body=0.4, answer=0.3, leftover=0.3, head_bytes=4096, head_fields=20)
"""For clients that are too slow."""
PATIENT = Bounds(headers=60, body=60, answer=60, leftover=60, head_bytes=4096, head_fields=20)
"""For all others: they share a process with their server, and it may stand still."""
GET = b"GET / HTTP/1.1\r\nHost: node\r\n\r\n"
UPGRADE = (
    GET[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)

Connect = Callable[..., Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
App = Callable[[dict[str, Any], Any, Any], Awaitable[None]]


class Seen:
    """An application that remembers what came in, and answers with the number of bytes."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.held = 0

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self.requests.append(scope["type"])
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            while (await receive())["type"] != "websocket.disconnect":
                pass
            return
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size += len(message["body"])
            self.held = max(self.held, len(message["body"]))
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
        await send({"type": "http.response.body", "body": b"%9d" % size})


async def refuses(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answers without reading."""
    await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"no"})


@asynccontextmanager
async def served(app: App, bounds: Bounds = PATIENT) -> AsyncIterator[Connect]:
    """A server of `app`; gives a function that connects to it."""
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app,
        http=partial(BoundedProtocol, bounds=bounds),  # type: ignore[arg-type]
        ws=BatchingProtocol,
        lifespan="off",
        log_config=None,
        access_log=False,
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve([listening]))
    while not server.started:
        await asyncio.sleep(0.005)
    try:
        yield partial(connected, listening.getsockname())
    finally:
        server.should_exit = True
        await serving
        listening.close()


async def connected(address: Any, begin: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection. What it begins with is there before the server knows of it: a hasty one cannot miss it."""
    plain = socket.create_connection(address)
    plain.sendall(begin)
    return await asyncio.open_connection(sock=plain)


async def answer(reader: asyncio.StreamReader, line: bytes = b"") -> tuple[int, dict[str, str], bytes]:
    """The next answer, or the rest of that with this first line."""
    status = int((line or await reader.readline()).split()[1])
    headers = {}
    while (line := await reader.readline()).strip():
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    return status, headers, await reader.readexactly(int(headers["content-length"]))


async def answers(reader: asyncio.StreamReader, *, reset: bool = False) -> list[tuple[int, dict[str, str], bytes]]:
    """All answers until the server hangs up; by a reset as well, where bytes may come that it does not read."""
    found = []
    async with asyncio.timeout(30):
        while line := await _line(reader, reset):
            found.append(await answer(reader, line))
    return found


async def _line(reader: asyncio.StreamReader, reset: bool) -> bytes:
    try:
        return await reader.readline()
    except ConnectionResetError:
        if not reset:
            raise
        return b""


async def trickle(writer: asyncio.StreamWriter, data: bytes, pause: float = 0.05) -> None:
    """Send byte by byte until the server has had enough."""
    try:
        for byte in data:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(pause)
    except ConnectionError:
        pass


@pytest.mark.parametrize(
    ("begin", "drip", "expected"),
    [
        (b"", b"", [408]),
        (b"", b"\r\n" * 100, [408]),
        (b"", GET[:-2] + b"X: " + b"a" * 100, [408]),
        (b"GET / HTTP/1.1\r\n", b"X-A: b\r\n" * 100, [408]),
        (b"POST / HTTP/1.1\r\nHost: n\r\nContent-Length: 1000\r\n\r\n", b"a" * 1000, [408]),
        (b"POST / HTTP/1.1\r\nHost: n\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n" * 1000, [408]),
        (GET, b"\r\n" * 100, [200]),
        (GET, GET[:-2] + b"X: " + b"a" * 100, [200, 408]),
    ],
    ids=["silence", "empty-lines", "headers", "more-headers", "body", "chunks", "lines-after", "second-request"],
)
async def test_a_slow_client_is_hung_up_on(begin: bytes, drip: bytes, expected: list[int]):
    app = Seen()
    async with served(app, HASTY) as connect:
        reader, writer = await connect(begin)
        dripping = asyncio.create_task(trickle(writer, drip))
        found = await answers(reader, reset=True)
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)
        writer.close()
    # Whoever never began a request is just left.
    assert [status for status, _, _ in found] in (expected, [s for s in expected if s != 408 or app.requests or begin])
    for status, headers, body in found:
        if status == 408:
            assert json.loads(body)["error"] == "request_timeout"
            assert len(headers["x-request-id"]) == 32
            assert headers["connection"] == "close"


async def test_a_fast_client_keeps_its_connection_longer_than_any_bound():
    async with served(Seen(), HASTY) as connect:
        reader, writer = await connect(GET)
        for number in range(6):
            if number:
                writer.write(GET)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            await reader.readexactly(9)
            await asyncio.sleep(0.1)
        writer.close()


async def test_a_socket_outlives_the_bounds_of_requests():
    app = Seen()
    async with served(app, HASTY) as connect:
        reader, writer = await connect(UPGRADE)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
        await asyncio.sleep(2 * HASTY.body)
        writer.write(b"\x89\x80\x00\x00\x00\x00")  # a masked ping
        assert await reader.readexactly(2) == b"\x8a\x00"
        writer.close()
    assert app.requests == ["websocket"]


async def test_a_socket_that_fails_tells_nothing_of_why(caplog: pytest.LogCaptureFixture):
    """FLW-09: through the node, whatever its gateway raises."""

    async def gateway(scope: dict[str, Any], receive: Any, send: Any) -> None:
        raise RuntimeError("the password is hunter2")

    async with served(Node(gateway, None)) as connect:
        reader, writer = await connect(UPGRADE)
        told = await asyncio.wait_for(reader.read(), 30)
        writer.close()
    assert told.startswith(b"HTTP/1.1 500")
    assert b"hunter2" not in told
    assert "hunter2" in caplog.text


@pytest.mark.parametrize("accepts", [True, False])
async def test_a_socket_has_an_id_too(accepts: bool):
    async def gateway(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await receive()
        if accepts:
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.close"})
        else:
            await send({"type": "websocket.http.response.start", "status": 401, "headers": []})
            await send({"type": "websocket.http.response.body", "body": b""})

    async with served(Node(gateway, None)) as connect:
        reader, writer = await connect(UPGRADE)
        told = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
        writer.close()
    assert told.startswith(b"HTTP/1.1 101" if accepts else b"HTTP/1.1 401")
    assert len(re.findall(rb"x-request-id: [0-9a-f]{32}\r\n", told.lower())) == 1


@pytest.mark.parametrize(
    "head",
    [
        b"X-Long: " + b"a" * 8192,
        b"X-Long: " + b"a" * 2_000_000,
        b"".join(b"X-%d: a\r\n" % number for number in range(30)),
        b"X: " + b"a" * 3000 + b"\r\nY: " + b"a" * 3000 + b"\r\n",
    ],
    ids=["long", "endless", "many", "together"],
)
async def test_too_many_or_too_long_headers_are_refused(head: bytes):
    app = Seen()
    async with served(app) as connect:
        reader, writer = await connect()
        writer.write(b"GET / HTTP/1.1\r\nHost: n\r\n" + head + b"\r\n")
        (status, _, body), *rest = await answers(reader)
        writer.close()
    assert (status, json.loads(body)["error"], rest) == (431, "headers_too_large", [])
    assert app.requests == []


async def test_a_long_address_is_refused():
    app = Seen()
    async with served(app) as connect:
        reader, writer = await connect()
        writer.write(b"GET /" + b"a" * 8192 + b" HTTP/1.1\r\nHost: n\r\n\r\n")
        ((status, _, _),) = await answers(reader)
        writer.close()
    assert (status, app.requests) == (431, [])


@pytest.mark.parametrize(
    "chunks",
    [
        b"1;" + b"x" * 20_000 + b"\r\na\r\n",
        b"1\r\na\r\n" * 4000,
        b"1\r\na\r\n0\r\n" + b"Trailer: a\r\n" * 1000,
        b"1\r\na\r\n0\r\nTrailer: " + b"a" * 20_000,
    ],
    ids=["extension", "tiny-chunks", "trailers", "long-trailer"],
)
async def test_the_packaging_of_chunks_is_bounded(chunks: bytes):
    async with served(Seen()) as connect:
        reader, writer = await connect()
        writer.write(b"POST / HTTP/1.1\r\nHost: n\r\nTransfer-Encoding: chunked\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(chunks)
        ((status, _, _),) = await answers(reader)
        writer.close()
    assert status == 431


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 4 + b"\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: n\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: n\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: n\r\nX: a\x00b\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: n\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: n\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: n\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: n\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"CONNECT n:1 HTTP/1.1\r\nHost: n\r\n\r\n",
    ],
)
async def test_what_is_not_http_gets_one_clear_answer(request_: bytes):
    async with served(Seen()) as connect:
        reader, writer = await connect()
        writer.write(request_)
        (status, _, body), *rest = await answers(reader)
        writer.close()
    assert (status, json.loads(body)["error"], rest) == (400, "bad_request", [])


async def test_a_large_body_is_never_held():
    app = Seen()
    async with served(app) as connect:
        reader, writer = await connect()
        writer.write(b"POST / HTTP/1.1\r\nHost: n\r\nConnection: close\r\nContent-Length: 100000000\r\n\r\n")
        for _ in range(1000):
            writer.write(b"a" * 100_000)
            await writer.drain()
        ((status, _, body),) = await answers(reader)
        writer.close()
    assert (status, int(body)) == (200, 100_000_000)
    assert app.held < 1_000_000


async def test_the_rest_of_a_refused_body_is_thrown_away_for_a_moment_only():
    """Hanging up at once would reset the connection before the client has read why."""
    begin = b"POST / HTTP/1.1\r\nHost: n\r\nContent-Length: 100000000\r\n\r\n"
    async with served(refuses) as connect:
        reader, writer = await connect(begin)
        for _ in range(50):
            writer.write(b"a" * 100_000)
            await writer.drain()
        status, _, body = await answer(reader)
        assert (status, body) == (413, b"no")
        assert not reader.at_eof()
        writer.close()
    async with served(refuses, replace(PATIENT, leftover=0.3)) as connect:
        reader, writer = await connect(begin)
        dripping = asyncio.create_task(trickle(writer, b"a" * 10_000))
        found = await answers(reader, reset=True)
        await asyncio.wait_for(dripping, 30)
        writer.close()
    assert [(status, body) for status, _, body in found] == [(413, b"no")]


async def test_a_client_that_does_not_read_its_answer_is_cut_off():
    gone = asyncio.Event()

    async def endless(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        for _ in range(10_000):
            await send({"type": "http.response.body", "body": b"a" * 65536, "more_body": True})
            if gone.is_set():
                return
        raise AssertionError("nobody reads this")

    async def watched(scope: dict[str, Any], receive: Any, send: Any) -> None:
        watching = asyncio.create_task(disconnected(receive))
        await endless(scope, receive, send)
        await watching

    async def disconnected(receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()

    async with served(watched, HASTY) as connect:
        _, writer = await connect(GET)
        writer.transport.pause_reading()
        await asyncio.wait_for(gone.wait(), 30)
        writer.transport.abort()
