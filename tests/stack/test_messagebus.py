"""The bus of a cell lets in who knows its route, and nobody from a web page."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import struct
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import websockets
from websockets.exceptions import InvalidStatus


async def _status(url: str, **options: Any) -> int:
    with pytest.raises(InvalidStatus) as refusal:
        async with websockets.connect(url, proxy=None, **options):
            pass
    return int(refusal.value.response.status_code)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost", "https://127.0.0.1", "file://"])
async def test_a_foreign_origin_is_refused(cell, origin: str) -> None:
    assert await _status(cell.url, origin=origin) == 403


async def test_a_name_that_was_made_to_point_here_is_refused(cell) -> None:
    address = urlsplit(cell.url)
    rebound = f"ws://evil.example:{address.port}{address.path}"
    own = {"host": address.hostname, "port": address.port}
    assert await _status(rebound, **own) == 403
    assert await _status(rebound, origin=f"http://evil.example:{address.port}", **own) == 403


@pytest.mark.parametrize("path", ["/core", "/", "/x"])
async def test_a_wrong_route_is_not_found(cell, path: str) -> None:
    assert await _status(f"ws://127.0.0.1:{urlsplit(cell.url).port}{path}") == 404


def test_the_route_is_secret_and_long(cell) -> None:
    assert len(urlsplit(cell.url).path) > 24
    for pid in cell.pids.values():
        for place in ("cmdline", "environ"):
            assert urlsplit(cell.url).path.encode() not in Path(f"/proc/{pid}/{place}").read_bytes()


async def test_it_listens_on_loopback_only(cell) -> None:
    with pytest.raises(OSError, match=r"111|refused"):
        await asyncio.open_connection("127.0.0.2", urlsplit(cell.url).port)


async def test_a_client_that_is_cut_off_harms_nobody(cell, connect) -> None:
    """The stock bus stops at the first client that is just closing, and ends the connection of the one who spoke."""
    address = urlsplit(cell.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(
        f"GET {address.path} HTTP/1.1\r\nHost: {address.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    await reader.readuntil(b"\r\n\r\n")
    async with connect(cell.url) as speaker, connect(cell.url) as listener:
        os.kill(cell.pids["messagebus"], signal.SIGSTOP)  # so that word and loss are there at the same moment
        await speaker.send("test.word", {}, {})
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        await asyncio.sleep(0.05)
        os.kill(cell.pids["messagebus"], signal.SIGCONT)
        for client in (listener, speaker):
            async with asyncio.timeout(60):
                while (await client.receive())["type"] != "test.word":
                    pass


async def test_what_is_no_json_harms_nobody(cell, bus) -> None:
    async with websockets.connect(cell.url, proxy=None) as stranger:
        await stranger.send(json.dumps({"type": "nonsense"}))
    assert (await bus.say("who are you")).spoken
