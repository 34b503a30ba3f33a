"""What is on its way to a client: in order, at once while the client keeps up, and not for ever when it does not."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from typing import Any

log = logging.getLogger(__name__)

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

Frame = str | bytes
"""A text or a binary one."""

MOST = 16 * 1024 * 1024
"""Bytes of finished frames that may wait for a client."""

STALL = 15.0
"""Seconds for which a client may refuse to take a single frame."""

FAREWELL = 5.0
"""Seconds a client has to take its last frames and the close, before the connection is cut."""

NAP = 0.5
"""Seconds between two looks at whether a connection has ended that is to rest."""

SLOW_CONSUMER = 1013


class Outbox:
    """Frames for one client, and the end of its connection.

    `write` sends frames at once and returns true, or returns false when the client is slow or gone; `abort` cuts the
    connection. Both are the server's; without them everything goes the ASGI way, through `send`.
    """

    __slots__ = ("_abort", "_bytes", "_closing", "_cut", "_flusher", "_items", "_pressing", "_send", "_spawn", "_write")

    def __init__(
        self,
        send: Send,
        write: Callable[[list[Frame]], bool] | None,
        abort: Callable[[], None] | None,
        spawn: Callable[[Awaitable[None]], asyncio.Task[None]],
    ) -> None:
        self._send = send
        self._write = write
        self._abort = abort
        self._spawn = spawn
        self._items: deque[Frame | Iterator[Frame]] | None = None  # None: most sessions are idle
        self._bytes = 0
        self._pressing = False
        self._flusher: asyncio.Task[None] | None = None
        self._closing: tuple[int, str] | None = None
        self._cut: asyncio.TimerHandle | None = None

    @property
    def closing(self) -> bool:
        """Whether nothing more will be sent but what is in already."""
        return self._closing is not None

    @property
    def waiting(self) -> bool:
        """Whether anything has not been sent."""
        return bool(self._items)

    @property
    def size(self) -> int:
        """Bytes (of texts, characters) of finished frames that have not been sent."""
        return self._bytes

    def post(self, frames: Sequence[Frame], *, pressing: bool = True) -> None:
        """Put frames in; those that are not pressing wait for the next one that is."""
        if not frames or self._closing is not None:
            return
        self._put(*frames)
        self._bytes += sum(len(frame) for frame in frames)
        self._pressing = self._pressing or pressing
        if self._bytes > MOST:
            self._give_up()

    def post_lazily(self, frames: Iterator[Frame]) -> None:
        """Put in frames that are made only when the client can take them."""
        if self._closing is None:
            self._put(frames)
            self._pressing = True

    def press(self) -> None:
        """What waits need not wait any longer."""
        self._pressing = self._pressing or self.waiting

    def settle(self) -> None:
        """Send what is pressing, now if that can be."""
        if not self._pressing or self._flusher is not None:
            return
        frames = [item for item in self._items or () if isinstance(item, Frame)]
        ready = bool(frames) and len(frames) == len(self._items or ()) and self._closing is None
        if ready and self._write is not None and self._write(frames):
            self._sent()
            return
        self._flusher = self._spawn(self._flush())

    def close(self, code: int, reason: str) -> None:
        """Send what is in, then end the connection; the first call counts."""
        if self._closing is not None:
            return
        self._closing = (code, reason)
        self._pressing = True
        if self._abort is not None:
            self._cut = asyncio.get_running_loop().call_later(FAREWELL, self._abort)
        self.settle()

    async def drain(self) -> None:
        """Wait until everything has been sent, or cannot be any more."""
        while (flusher := self._flusher) is not None:
            await asyncio.wait([flusher])

    async def rest(self, seconds: float) -> None:
        """Wait for so long, but not for a connection that ends meanwhile."""
        while seconds > 0 and not self.closing:
            nap = min(seconds, NAP)
            await asyncio.sleep(nap)
            seconds -= nap

    def discard(self) -> None:
        """The connection is no more."""
        if self._cut is not None:
            self._cut.cancel()
        self._items = None
        self._closing = self._closing or (1006, "")

    def _put(self, *items: Frame | Iterator[Frame]) -> None:
        if self._items is None:
            self._items = deque()
        self._items.extend(items)

    def _sent(self) -> None:
        self._items = None
        self._bytes = 0
        self._pressing = False

    def _give_up(self) -> None:
        log.warning("a client does not take what it is sent and was disconnected")
        self._items = None
        self.close(SLOW_CONSUMER, "slow consumer")

    async def _flush(self) -> None:
        try:
            while self._items:
                item = self._items[0]
                if isinstance(item, Frame):
                    frame: Frame | None = item
                    self._items.popleft()
                    self._bytes -= len(item)
                elif (frame := next(item, None)) is None:
                    self._items.popleft()
                    continue
                assert frame is not None
                if self._write is None or not self._write([frame]):
                    async with asyncio.timeout(STALL):
                        kind = "text" if isinstance(frame, str) else "bytes"
                        await self._send({"type": "websocket.send", kind: frame})
            self._sent()
            if self._closing is not None:
                code, reason = self._closing
                await self._send({"type": "websocket.close", "code": code, "reason": reason})
        except TimeoutError:
            self._give_up()
        except (OSError, RuntimeError):
            self._items = None  # the client has gone; `Connection.run` hears of it as a disconnect
        finally:
            self._flusher = None
            if self._items and self._pressing:
                self.settle()
