"""One connection to the platform, from its opening to its end: frames in, frames out, and whether anybody is there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from agentvoicebox.config.errors import BadInput
from agentvoicebox.plugins.device import wire
from agentvoicebox.plugins.device.requests import Away, Failed, Request
from agentvoicebox.plugins.device.section import Section
from agentvoicebox.plugins.device.trouble import SUSPENDED, UNAUTHORISED, Nonsense, Silent, TurnedAway

OPENING, WELCOME = 5.0, 10.0
"""Seconds for the socket to open, and for the answer to `Hello`: after a restart of the platform all devices come at
once. The local engines serve meanwhile."""

SILENT = 0.8
"""Seconds without a single byte, while something is asked of it, after which the platform is not there."""

FORGOTTEN = 3.0
"""Seconds without a word about one request, after which that one is given up."""

STUCK = 60.0
"""Seconds for which a request is still worked on and nothing comes of it, after which it is given up."""

PING, PONG = 20.0, 10.0
"""Seconds between signs of life while nothing is asked, and to wait for each."""

_LAST_ROUNDS = 3
"""Of the loop, in which transports that were aborted close their sockets."""

_CLOSING = 0.5
_PAUSE = 0.02
_STEP = 0.1
"""Seconds between looks whether something has come: of a step that took far longer, no more than two are silence."""

_UNKNOWN = 20
"""Frames of an unknown kind in a row: more than any later platform has reason to send."""

_log = logging.getLogger(__name__)
_log.setLevel(logging.INFO)  # below that, websockets writes all that is sent to the log, and the key is part of it

_KINDS = {kind.type for kind in wire.FROM_PLATFORM}


class Socket(ClientConnection):
    """Knows when something has come, also of a large frame that is not whole yet."""

    heard = 0.0

    def data_received(self, data: bytes) -> None:
        self.heard = self.loop.time()
        super().data_received(data)


class _Connect(connect):
    """Follows no redirection: a network that wants a login sends us to its own page."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


class Loop(asyncio.SelectorEventLoop):
    """Looks names up in threads for which nobody waits at the end of the process: that may take half a minute.

    What was hung up last is let go of before it closes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._asked: dict[tuple[Any, ...], asyncio.Future[Any]] = {}

    async def getaddrinfo(self, host: Any, port: Any, **hints: Any) -> Any:
        asked = (host, port, *sorted(hints.items()))
        if asked not in self._asked:
            self._asked[asked] = look_up = aside(socket.getaddrinfo, host, port, **hints)
            look_up.add_done_callback(lambda _: self._asked.pop(asked))
        # Whoever asks again meanwhile waits for the same thread: there are never many.
        return await asyncio.shield(self._asked[asked])

    def close(self) -> None:
        if not (self.is_closed() or self.is_running()):
            for _ in range(_LAST_ROUNDS):
                self.run_until_complete(asyncio.sleep(0))
        super().close()


def aside(function: Callable[..., Any], *arguments: Any, **named: Any) -> asyncio.Future[Any]:
    """Have a function that may block called in a daemon thread."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[Any] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if outcome.done():
            return
        if error is None:
            outcome.set_result(value)
        else:
            outcome.set_exception(error)
            outcome.exception()  # told also if nobody asks any more

    def work() -> None:
        value, failure = None, None
        try:
            value = function(*arguments, **named)
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            loop.call_soon_threadsafe(settle, value, failure)

    threading.Thread(target=work, name="agentvoicebox-aside", daemon=True).start()
    return outcome


class Connection:
    """An open socket on which the platform has said `Welcome`."""

    def __init__(self, opened: Socket, welcome: wire.Welcome, told: Callable[[wire.Configured], None]) -> None:
        self.welcome = welcome
        self._socket = opened
        self._told = told
        self._open: dict[int, Request] = {}
        self._ready: deque[Request] = deque()
        self._now = asyncio.get_running_loop().time
        self._asked = 0.0
        """When something was asked while nothing else was."""
        self._news = asyncio.Event()
        self._busy = asyncio.Event()
        self._problem: wire.Problem | None = None
        """The last that was said, if that was about the connection."""

    @classmethod
    async def open(
        cls, section: Section, key: str, hello: wire.Hello, told: Callable[[wire.Configured], None]
    ) -> Connection:
        """Connect and be welcomed; `told` is given what the tenant chooses. Raises what `trouble.of` explains."""
        address = section.socket
        headers = {"Authorization": f"Bearer {key}"}
        if section.tenant:
            headers["X-Tenant-ID"] = section.tenant
        opened = await _Connect(
            address,
            additional_headers=headers,
            create_connection=Socket,
            compression=None,
            proxy=None,
            open_timeout=OPENING,
            ping_interval=PING,
            ping_timeout=PONG,
            close_timeout=_CLOSING,
            max_size=wire.LARGEST_FRAME,
            logger=_log,
            ssl=_trust(section) if address.startswith("wss:") else None,
        )
        assert isinstance(opened, Socket)
        try:
            async with asyncio.timeout(WELCOME):
                await opened.send(wire.encode(hello))
                first = _read(await opened.recv())
            if isinstance(first, wire.Problem):
                raise TurnedAway(first.code, first.message)
            if not isinstance(first, wire.Welcome):
                raise Nonsense("no welcome")
        except BaseException:
            opened.transport.abort()
            raise
        return cls(opened, first, told)

    async def run(self) -> NoReturn:
        """Carry requests and answers until the connection ends, which raises what `trouble.of` explains."""
        tasks = [asyncio.create_task(work()) for work in (self._receive, self._send, self._watch)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            failure = next(error for task in done if (error := task.exception()) is not None)
            closed = failure.rcvd if isinstance(failure, ConnectionClosed) else None
            if self._problem is not None and closed is not None and closed.code not in (UNAUTHORISED, SUSPENDED):
                raise TurnedAway(self._problem.code, self._problem.message) from failure
            raise failure
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def drop(self) -> None:
        """Be gone at once: with nobody there, the closing handshake would only keep the callers waiting."""
        self._socket.transport.abort()

    async def close(self) -> None:
        """Take leave; the platform has half a second to answer that."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSING):
                await self._socket.close()

    def post(self, request: Request) -> None:
        """Something of this request is to be sent."""
        if request.number not in self._open:
            if request.over:
                return
            if not self._open:
                self._asked = self._now()
            self._open[request.number] = request
            request.heard = request.moved = self._now()
            self._busy.set()
        self._ready.append(request)
        self._news.set()

    def end_all(self, error: Away) -> None:
        """Nothing that is open will be answered."""
        for request in [*self._open.values(), *self._ready]:
            request.end(error)
        self._open.clear()
        self._ready.clear()

    async def _send(self) -> None:
        while True:
            self._news.clear()
            # One frame of each in turn: a minute of audio does not hold up a question.
            while self._ready:
                request = self._ready.popleft()
                if (frame := request.outgoing()) is not None:
                    request.moved = self._now()
                    self._ready.append(request)
                    await self._socket.send(frame)
                elif request.over:
                    self._open.pop(request.number, None)
            await self._news.wait()

    async def _receive(self) -> None:
        unknown = 0
        while True:
            frame = await self._socket.recv()
            try:
                said = _read(frame)
            except Nonsense:
                unknown += 1
                if unknown > _UNKNOWN or not _later(frame):
                    raise
                continue
            unknown = 0
            self._problem = said if isinstance(said, wire.Problem) and not said.id else None
            if isinstance(said, tuple):
                self._hear(*said)
            elif isinstance(said, wire.Configured):
                self._told(said)
            elif isinstance(said, wire.Welcome):
                raise Nonsense("welcome, again")
            elif not self._problem:
                self._hear(getattr(said, "id", 0), said)

    def _hear(self, number: int, said: wire.Said | bytes) -> None:
        request = self._open.get(number)
        if request is None:
            return  # it has been cancelled, or given up
        request.heard = self._now()
        if isinstance(said, wire.Working):
            return
        request.moved = request.heard
        if isinstance(said, bytes):
            request.hear_audio(said)
        elif isinstance(said, wire.Problem):
            request.end(Failed(said.message, code=said.code))
        else:
            request.hear(said)
        if request.over:
            self._ready.append(request)
            self._news.set()

    async def _watch(self) -> None:
        """Raise `Silent` when the platform is gone while something is asked of it.

        A device that has stood still itself blames nobody: the loop reads what has come before it looks at its timers,
        and only time in which it has run is silence. The platform may have stood still with it, on the same machine.
        """
        while True:
            await self._busy.wait()
            heard, silent = self._heard(), 0.0
            while self._open:
                before = self._now()
                await asyncio.sleep(max(min(SILENT - silent, _STEP), _PAUSE))
                passed, latest = min(self._now() - before, 2 * _STEP), self._heard()
                silent = silent + passed if latest == heard else min(self._now() - latest, passed)
                heard = latest
                if self._open and silent >= SILENT:
                    raise Silent
                self._let_go()
            self._busy.clear()

    def _heard(self) -> float:
        """When there was a sign of life; silence before anything was asked is none of death."""
        return max(self._socket.heard, self._asked)

    def _let_go(self) -> None:
        """Give up requests that are forgotten, or that nothing comes of."""
        now = self._now()
        for request in list(self._open.values()):
            if now - request.heard > FORGOTTEN or now - request.moved > STUCK:
                request.give_up(Away("The platform does not come to an end with this: this device goes on by itself."))


def _trust(section: Section) -> ssl.SSLContext:
    """Whose certificates are good. Raises `BadInput` for a file that has none, and `OSError`."""
    try:
        return ssl.create_default_context(cafile=section.ca_file)
    except ssl.SSLError as error:
        raise BadInput(
            f"There is no certificate in {section.ca_file}: correct ca_file in mycroft.conf.", param="ca_file"
        ) from error


def _read(frame: str | bytes) -> wire.Said | tuple[int, bytes]:
    try:
        return wire.split(frame) if isinstance(frame, bytes) else wire.decode(frame, wire.FROM_PLATFORM)
    except wire.Garbled as error:
        raise Nonsense(str(error)) from error


def _later(frame: str | bytes) -> bool:
    """Whether a frame that is not understood may be what a later platform says: then it is passed over."""
    try:
        kind = json.loads(frame)["type"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return False
    return isinstance(kind, str) and kind not in _KINDS
