"""A device's end of the socket, as plain as can be: it speaks `wire` and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect

from agentvoicebox.plugins.device import choices, wire
from agentvoicebox.plugins.device.choices import Choices

ENDS = (wire.Transcript, wire.Told, wire.Done, wire.Problem)


class Device:
    """One socket of a device."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.welcome: wire.Welcome | None = None
        self.problems: list[wire.Problem] = []
        """Those of the number 0."""
        self.choices: asyncio.Queue[Choices] = asyncio.Queue()
        self.working = 0
        self._story: dict[int, asyncio.Queue[wire.Said | bytes]] = {}

    async def say(self, *said: wire.Said | str | bytes) -> None:
        for each in said:
            await self.socket.send(wire.encode(each) if isinstance(each, wire.Said) else each)

    async def read(self) -> None:
        """Take what comes, until the node closes."""
        async for frame in self.socket:
            if isinstance(frame, bytes):
                number, pcm = wire.split(frame)
                self.of(number).put_nowait(pcm)
                continue
            said: Any = wire.decode(frame, wire.FROM_PLATFORM)
            match said:
                case wire.Welcome():
                    self.welcome = said
                case wire.Configured():
                    found = choices.of(said.choices)
                    assert found.etag == said.etag
                    self.choices.put_nowait(found)
                case wire.Working():
                    self.working += 1
                case wire.Problem(0):
                    self.problems.append(said)
                case _:
                    self.of(said.id).put_nowait(said)

    def of(self, number: int) -> asyncio.Queue[wire.Said | bytes]:
        """What came for a request."""
        return self._story.setdefault(number, asyncio.Queue())

    async def next(self, number: int) -> Any:
        """The next thing that comes for a request."""
        return await asyncio.wait_for(self.of(number).get(), 60)

    async def answer(self, number: int) -> list[Any]:
        """All that comes for a request until its end."""
        story = [await self.next(number)]
        while not isinstance(story[-1], ENDS):
            story.append(await self.next(number))
        return story

    async def configured(self) -> Choices:
        return await asyncio.wait_for(self.choices.get(), 30)

    async def listen(self, number: int, pcm: bytes, language: str = "", *, partials: bool = False) -> list[Any]:
        """What is understood of audio that is sent as fast as it goes."""
        await self.say(wire.Listen(number, language, partials))
        for i in range(0, len(pcm), 3_200):
            await self.say(wire.audio(number, pcm[i : i + 3_200]))
        await self.say(wire.Finish(number))
        return await self.answer(number)

    async def closed(self) -> tuple[int | None, str]:
        """Wait until the node closes; code and reason."""
        await asyncio.wait_for(self.socket.wait_closed(), 30)
        return self.socket.close_code, self.socket.close_reason or ""


class Devices:
    """Opens sockets of devices."""

    def __init__(self, url: str) -> None:
        self.url = url.replace("http", "ws", 1) + wire.PATH

    @asynccontextmanager
    async def socket(self, customer: Any, **headers: str) -> AsyncIterator[Device]:
        """An open socket, before hello."""
        async with connect(
            self.url, additional_headers=customer.headers | headers, compression=None, max_size=None
        ) as socket:
            device = Device(socket)
            reading = asyncio.create_task(device.read())
            try:
                yield device
            finally:
                await socket.close()
                await asyncio.gather(reading, return_exceptions=True)

    @asynccontextmanager
    async def device(self, customer: Any, process: str = "listener", have: str = "") -> AsyncIterator[Device]:
        """A socket past its welcome; what it was told of choices waits to be read."""
        async with self.socket(customer) as device:
            await device.say(wire.Hello(process, "kitchen", "1.0", have))
            async with asyncio.timeout(30):
                while device.welcome is None:
                    await asyncio.sleep(0.005)
            yield device


@pytest.fixture(scope="session")
def devices(stack: Any) -> Devices:
    """The door for devices of the installation."""
    return Devices(stack.url)
