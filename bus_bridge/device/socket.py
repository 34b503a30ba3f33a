"""One socket of a device: the shell that carries frames and time to and from its requests."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from agentvoicebox.bus_bridge import events as ev
from agentvoicebox.bus_bridge.connection import INTERNAL, NORMAL, Receive
from agentvoicebox.bus_bridge.device.protocol import POLICY, Audio, Over, Protocol, Request
from agentvoicebox.bus_bridge.device.requests import Listening, Station, Work, problem
from agentvoicebox.bus_bridge.outbox import Outbox
from agentvoicebox.config.errors import AvbError, Unavailable
from agentvoicebox.plugins.device import wire
from agentvoicebox.tenancy.keyring import Grant
from agentvoicebox.tenancy.limits import SOCKET_AUDIO, SOCKET_MESSAGES, Budget

if TYPE_CHECKING:
    from agentvoicebox.bus_bridge.device.devices import Devices

log = logging.getLogger(__name__)

GREETING = 5.0
"""Seconds in which a device must have said who it is."""

WELCOME = 10.0
"""Seconds in which the node must know. After a restart all devices come at once, and none waits longer: it comes again
later, and whoever is found for one that has gone keeps those waiting that have not.
"""

AGAIN = 1013
"""The close code for those who are to come again later."""

_LARGE = 8_192
"""Characters of a text frame that count as one more message: reading one takes the node as long as it is."""

_LEAST = 640
"""Bytes that a frame of audio counts for at least: 20 ms."""

Spawn = Callable[[Awaitable[None]], asyncio.Task[None]]


class _Answer:
    """One request that is being worked on. What it tells when it is over already is told to nobody."""

    __slots__ = ("listening", "number", "socket", "task")

    def __init__(self, socket: Socket, number: int) -> None:
        self.socket = socket
        self.number = number
        self.listening: Listening | None = None
        self.task: asyncio.Task[None] | None = None

    def tell(self, *said: wire.Said) -> None:
        if not self.socket.answers(self):
            return
        if isinstance(said[-1], wire.Transcript | wire.Told | wire.Done | wire.Problem):
            self.socket.end(self.number)
        self.socket.post([wire.encode(each) for each in said])

    def play(self, frames: Sequence[bytes]) -> None:
        if self.socket.answers(self):
            self.socket.post(frames)

    async def room(self, most: int) -> None:
        await self.socket.room(most)


class Socket:
    """Serves one socket until the device leaves or `close` is called. Small while nothing is asked: there are many."""

    __slots__ = (
        "_audio",
        "_beat",
        "_began",
        "_devices",
        "_heard_at",
        "_loop",
        "_messages",
        "_name",
        "_outbox",
        "_protocol",
        "_receive",
        "_spawn",
        "_too_late",
        "_work",
        "etag",
        "grant",
        "process",
        "station",
    )

    def __init__(self, devices: Devices, grant: Grant, receive: Receive, outbox: Outbox, spawn: Spawn) -> None:
        self.grant = grant
        self.process = ""
        """What the device calls the process behind it."""
        self.etag = ""
        """Of what the device knows of its tenant's choices."""
        self.station: Station | None = None
        """The device, once it has said who it is."""
        self._devices = devices
        self._receive = receive
        self._outbox = outbox
        self._spawn = spawn
        self._loop = asyncio.get_running_loop()
        self._began = self._heard_at = self._loop.time()
        self._messages = Budget(*SOCKET_MESSAGES)
        self._audio = Budget(*SOCKET_AUDIO)
        self._protocol = Protocol()
        self._name = uuid.uuid4().hex
        self._work: dict[int, _Answer] | None = None  # None: most are idle
        self._beat: asyncio.TimerHandle | None = None
        self._too_late: asyncio.TimerHandle | None = None

    @property
    def age(self) -> float:
        """Seconds since the device came."""
        return self._loop.time() - self._began

    @property
    def idle(self) -> float:
        """Seconds since the device sent something."""
        return self._loop.time() - self._heard_at

    async def run(self) -> int:
        """Serve the device; returns the close code that was used."""
        self._too_late = self._loop.call_later(GREETING, self._give_up)
        code = NORMAL
        try:
            while True:
                message = await self._receive()
                if message["type"] == "websocket.disconnect":
                    code = int(message.get("code") or NORMAL)
                    break
                self._heard_at = self._loop.time()
                text = message.get("text")
                frame = text if text is not None else message.get("bytes") or b""
                await self._take(frame)
                if rest := self._cost(frame):
                    # A device that sends too much has to wait too; nothing is lost.
                    await self._outbox.rest(rest)
        finally:
            self._leave()
        return code

    def close(self, code: int, reason: str, problem: ev.Problem | None = None) -> None:
        """End the connection from our side, after telling the device why."""
        if problem is not None:
            self._outbox.post([wire.encode(wire.Problem(0, problem.code, problem.message))])
        self._outbox.close(code, reason)
        self._stop_work()

    def post(self, frames: Sequence[str | bytes]) -> None:
        """Send frames, now if that can be."""
        self._outbox.post(frames)
        self._outbox.settle()

    async def room(self, most: int) -> None:
        """Wait until no more than `most` bytes wait for the device, or it is gone."""
        while self._outbox.size > most and not self._outbox.closing:
            await self._outbox.drain()

    def configure(self, etag: str, frame: str) -> None:
        """Tell the device what its tenant has chosen, unless it knows."""
        if etag != self.etag:
            self.etag = etag
            self.post([frame])

    # --- what the device says -----------------------------------------------------------------------------------------

    def _cost(self, frame: str | bytes) -> float:
        """Seconds to rest after that frame."""
        if isinstance(frame, bytes):
            return self._audio.spend(self._heard_at, max(len(frame), _LEAST))
        return self._messages.spend(self._heard_at, 1 + len(frame) // _LARGE)

    async def _take(self, frame: str | bytes) -> None:
        if self._outbox.closing:
            return
        for meaning in self._protocol.receive(frame):
            match meaning:
                case wire.Hello():
                    await self._arrive(meaning)
                case Audio(number, pcm):
                    if (answer := (self._work or {}).get(number)) is not None and answer.listening is not None:
                        answer.listening.hear(pcm)
                case wire.Finish(number):
                    if (answer := (self._work or {}).get(number)) is not None and answer.listening is not None:
                        answer.listening.finish()
                case wire.Cancel(number):
                    self._cancel(number)
                case wire.Problem():
                    self.post([wire.encode(meaning)])
                case Over(code, reason):
                    self.close(code, reason)
                case _:
                    self._begin(meaning)

    async def _arrive(self, hello: wire.Hello) -> None:
        """Find out which device this is, and tell it what it has to know."""
        if self._too_late is not None:
            self._too_late.cancel()
            self._too_late = None
        self.process = _plain(hello.process, 20)
        self.etag = _plain(hello.have, 64)
        try:
            async with asyncio.timeout(WELCOME):
                manner = await self._devices.arrive(self, _plain(hello.name, 100), _plain(hello.version, 40))
        except (AvbError, TimeoutError) as error:
            told = error if isinstance(error, AvbError) else Unavailable("The store does not answer; try again soon.")
            code = AGAIN if isinstance(told, Unavailable) else POLICY
            self.close(code, told.code, ev.Problem(told.code, told.message))
            return
        except Exception as error:
            log.error("a device could not be welcomed: %s", problem(0, error).code)
            self.close(INTERNAL, "internal_error")
            return
        assert self.station is not None
        house = manner.choices.tenant
        welcome = wire.Welcome(str(self.station.tenant_id), house, str(self.station.device_id), time.time())
        self._outbox.post([wire.encode(welcome)])
        self.configure(manner.etag, manner.frame)
        self._outbox.settle()

    def _give_up(self) -> None:
        message = f"There was no hello within {GREETING:.0f} s."
        self.close(POLICY, "hello_expected", ev.Problem("hello_expected", message))

    # --- requests -----------------------------------------------------------------------------------------------------

    def answers(self, answer: _Answer) -> bool:
        """Whether somebody still wants this answer."""
        return self._work is not None and self._work.get(answer.number) is answer

    def end(self, number: int) -> None:
        """The request is answered."""
        self._protocol.answered(number)
        if self._work is not None:
            self._work.pop(number, None)
            self._work = self._work or None

    def _begin(self, asked: Request) -> None:
        station = self.station
        if station is None:
            return  # which is being closed
        answer = _Answer(self, asked.id)
        if self._work is None:
            self._work = {}
        self._work[asked.id] = answer
        answer.tell(wire.Working(asked.id))
        if self._beat is None:
            self._beat = self._loop.call_later(wire.BEAT, self._tell_working)
        work = Work(self._devices.desk, station, answer, f"device:{self._name}:{asked.id}")
        if isinstance(asked, wire.Listen):
            answer.listening = Listening(work, asked)
            answer.task = self._spawn(answer.listening.do())
            return
        if isinstance(asked, wire.Ask):
            self._devices.keep(station)
        answer.task = self._spawn(work.do(asked))

    def _cancel(self, number: int) -> None:
        answer = (self._work or {}).get(number)
        self.end(number)
        if answer is not None and answer.task is not None:
            answer.task.cancel()

    def _tell_working(self) -> None:
        """Say that we are at it: who hears nothing takes us for dead."""
        self._beat = None
        if not self._work:
            return
        self.post([wire.encode(wire.Working(number)) for number in self._work])
        self._beat = self._loop.call_later(wire.BEAT, self._tell_working)

    def _stop_work(self) -> None:
        for number in list(self._work or ()):
            self._cancel(number)

    def _leave(self) -> None:
        if self._too_late is not None:
            self._too_late.cancel()
        if self._beat is not None:
            self._beat.cancel()
            self._beat = None
        self._stop_work()
        self._outbox.discard()
        self._devices.leave(self)


def _plain(text: str, most: int) -> str:
    """What can be written down of it."""
    return "".join(each for each in text if each.isprintable())[:most]
