"""Frames keep their order, wait only when they must, and never hold the node up."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from agentvoicebox.bus_bridge import outbox
from agentvoicebox.bus_bridge.outbox import Outbox


class Client:
    """A server's end of a connection whose client can be slow."""

    def __init__(self) -> None:
        self.got: list[str] = []
        self.closed: tuple[int, str] | None = None
        self.cut = asyncio.Event()
        self.takes = asyncio.Event()
        self.takes.set()

    def write(self, frames: list[str]) -> bool:
        if not self.takes.is_set() or self.cut.is_set():
            return False
        self.got += frames
        return True

    async def send(self, message: Any) -> None:
        await self.takes.wait()
        if self.cut.is_set():
            raise ConnectionResetError
        if message["type"] == "websocket.close":
            self.closed = (message["code"], message["reason"])
        else:
            self.got.append(message["text"])

    def abort(self) -> None:
        self.cut.set()
        self.takes.set()


@pytest.fixture
def client() -> Client:
    return Client()


@pytest.fixture
def box(client: Client) -> Outbox:
    return Outbox(client.send, client.write, client.abort, asyncio.ensure_future)


async def test_at_once_while_the_client_keeps_up(client: Client, box: Outbox):
    box.post(["a", "b"])
    box.settle()
    assert client.got == ["a", "b"]
    assert not box.waiting


async def test_what_does_not_press_waits_for_company(client: Client, box: Outbox):
    box.post(["a"], pressing=False)
    box.settle()
    assert client.got == []
    box.post(["b"])
    box.settle()
    assert client.got == ["a", "b"]
    box.post(["c"], pressing=False)
    box.press()
    box.settle()
    assert client.got == ["a", "b", "c"]


async def test_order_survives_a_slow_client(client: Client, box: Outbox):
    client.takes.clear()
    box.post(["a", "b"])
    box.settle()
    await asyncio.sleep(0)
    client.takes.set()
    box.post(["c"])  # in the same moment in which the client can take frames again
    box.settle()
    assert client.got == []
    await box.drain()
    assert client.got == ["a", "b", "c"]


async def test_lazy_frames_are_made_when_they_can_be_taken(client: Client, box: Outbox):
    made: list[str] = []

    def frames() -> Iterator[str]:
        for number in range(5):
            made.append(str(number))
            yield str(number)

    client.takes.clear()
    box.post_lazily(frames())
    box.post(["end"])
    box.settle()
    await asyncio.sleep(0.01)
    assert len(made) == 1
    client.takes.set()
    await box.drain()
    assert client.got == ["0", "1", "2", "3", "4", "end"]


async def test_closing_sends_what_is_in_and_takes_no_more(client: Client, box: Outbox):
    box.post(["last"])
    box.close(4001, "revoked")
    box.post(["too late"])
    box.close(1000, "another reason")
    await box.drain()
    assert client.got == ["last"]
    assert client.closed == (4001, "revoked")
    box.discard()


async def test_a_client_that_does_not_read_is_cut_off(client: Client, box: Outbox, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(outbox, "FAREWELL", 0.02)
    client.takes.clear()
    box.post(["a"])
    box.settle()
    box.close(4001, "revoked")
    async with asyncio.timeout(30):
        await client.cut.wait()
        await box.drain()
    assert client.closed is None


async def test_a_client_that_stalls_or_lets_too_much_pile_up_is_cut_off(
    client: Client, box: Outbox, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(outbox, "FAREWELL", 0.02)
    monkeypatch.setattr(outbox, "STALL", 0.02)
    client.takes.clear()
    box.post(["a"])
    box.settle()
    async with asyncio.timeout(30):
        await client.cut.wait()
    other = Client()
    other.takes.clear()
    full = Outbox(other.send, other.write, other.abort, asyncio.ensure_future)
    monkeypatch.setattr(outbox, "MOST", 100)
    full.post(["x" * 101])
    async with asyncio.timeout(30):
        await other.cut.wait()
    assert not full.waiting


async def test_without_the_servers_extensions_it_goes_the_plain_way(client: Client):
    box = Outbox(client.send, None, None, asyncio.ensure_future)
    box.post(["a", "b"])
    box.settle()
    box.close(1000, "")
    await box.drain()
    assert client.got == ["a", "b"]
    assert client.closed == (1000, "")
