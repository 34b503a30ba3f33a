"""What a device asks of its platform: a request, its way there, and its answer, for any thread and any event loop.

The link calls what is under "the link's side", on its one thread; everything else is for whoever asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from ovos_utils.log import LOG

from agentvoicebox.config.errors import AvbError, Unavailable
from agentvoicebox.plugins.device import wire

BACKLOG = 60 * wire.LISTENING_RATE * 2
"""Bytes of audio that may wait for a network slower than the microphone: a minute."""

UNREAD = 16 * 1024 * 1024
"""Bytes of an answer that may wait for whoever reads it: almost six minutes of speech at 24 kHz."""

LONGEST = 600.0
"""Seconds that anybody waits for anything, whatever goes wrong."""

_FRAME = 32 * 1024
"""Bytes of audio in one frame, at most: a second."""

_WORTH = 3200
"""Bytes for which a frame is sent while more is coming: a tenth of a second. It costs as much as one of a second."""

_RATES = range(8_000, 192_001)

_T = TypeVar("_T")


class Away(Unavailable):
    """The platform cannot be asked now.

    Codes: `platform_away`; `platform_late`, it has not answered in time; `key_refused`, it refuses this device's key.
    """

    default_code = "platform_away"


class Failed(AvbError):
    """The platform answered this request with a problem, or with nothing that makes sense (`platform_garbled`)."""

    default_code = "failed"


class Mailbox(Generic[_T]):
    """An answer on its way from the link's thread to a reader: pieces, then the end, or an error."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._pieces: deque[_T] = deque()
        self._over = False
        self._error: AvbError | None = None
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self._over

    def put(self, piece: _T) -> None:
        """Add a piece; after the end it is passed over."""
        with self._changed:
            if not self._over:
                self._pieces.append(piece)
                self._wake()

    def close(self, error: AvbError | None = None) -> None:
        """Nothing more will come. The first call counts."""
        with self._changed:
            if not self._over:
                self._over, self._error = True, error
                self._wake()

    def get(self, timeout: float | None = None) -> _T | None:
        """The next piece, or None at the end. Raises the error after what came, and `TimeoutError`."""
        until = time.monotonic() + (LONGEST if timeout is None else timeout)
        with self._changed:
            while not (self._pieces or self._over):
                left = until - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                self._changed.wait(left)
            return self._take()

    async def arrive(self, patience: float = LONGEST) -> _T | None:
        """The same for an event loop, whichever it is."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(patience):
            while True:
                with self._changed:
                    if self._pieces or self._over:
                        return self._take()
                    news: asyncio.Future[None] = loop.create_future()
                    self._waiting.append((loop, news))
                await news

    def _take(self) -> _T | None:
        if self._pieces:
            return self._pieces.popleft()
        if self._error is not None:
            raise self._error
        return None

    def _wake(self) -> None:
        self._changed.notify_all()
        for loop, news in self._waiting:
            with contextlib.suppress(RuntimeError):  # that loop is closed: nobody waits on it any more
                loop.call_soon_threadsafe(_resolve, news)
        self._waiting.clear()


def _frame(said: wire.Said) -> str:
    """A text frame, with a question mark for each half of a character that somebody has cut in two."""
    return wire.encode(said).encode("utf-8", "replace").decode()


def _resolve(news: asyncio.Future[None]) -> None:
    if not news.done():
        news.set_result(None)


class Request:
    """One request. As a context manager it is cancelled at the end of the block, unless it has been answered."""

    def __init__(self, opening: wire.Said, number: int, post: Callable[[Request], None]) -> None:
        self.number = number
        self.heard = self.moved = 0.0
        """When the platform last said anything about it, and when it last came closer to its end: for the link."""
        self._mail: Mailbox[Any] = Mailbox()
        frame = _frame(opening)
        self.size = len(frame.encode())
        """Bytes of its first frame."""
        self._outgoing: deque[str | bytes] = deque([frame])
        self._lock = threading.Lock()
        self._post = post

    @property
    def over(self) -> bool:
        """Whether it has been answered, or never will be."""
        return self._mail.over

    def cancel(self) -> None:
        """Nobody wants the answer any more; whoever waits for it gets `Away`."""
        self.give_up(Away("Nobody wants the answer to this request any more.", code="cancelled"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def give_up(self, error: AvbError) -> None:
        """End it on this side, and tell the platform."""
        if self.over:
            return
        with self._lock:
            self._outgoing.append(_frame(wire.Cancel(self.number)))
        self._mail.close(error)
        self._post(self)

    def _whole(self, timeout: float | None) -> Any:
        """The one piece of the answer."""
        try:
            answer = self._mail.get(timeout)
        except TimeoutError:
            raise self._late() from None
        if answer is None:
            raise Away("The answer of the platform has been read already.")
        return answer

    def _late(self) -> Away:
        """Wait no longer."""
        self.cancel()
        return Away("The platform has not answered in time: this device goes on by itself.", code="platform_late")

    # --- the link's side ----------------------------------------------------------------------------------------------

    def outgoing(self) -> str | bytes | None:
        """The next frame of this request; None when all has been sent."""
        with self._lock:
            return self._outgoing.popleft() if self._outgoing else None

    def hear(self, said: wire.Said) -> None:
        """Take a part of the answer that is neither `Working` nor `Problem`."""
        self.garbled()

    def hear_audio(self, pcm: bytes) -> None:
        """Take audio."""
        self.garbled()

    def end(self, error: AvbError | None = None) -> None:
        """Nothing more will come."""
        self._mail.close(error)

    def garbled(self) -> None:
        """Give up on an answer that makes no sense."""
        self.give_up(
            Failed(
                "The platform's answer makes no sense: update agentvoicebox there, and on this device.",
                code="platform_garbled",
            )
        )


class Answer(Request):
    """A request with an answer of one piece: `Told`, or `Done`."""

    def result(self, timeout: float | None = None) -> wire.Said:
        """The answer. Raises `Away`, `Failed`."""
        said: wire.Said = self._whole(timeout)
        return said

    async def arrive(self) -> wire.Said:
        """The same for an event loop."""
        said: wire.Said | None = await self._mail.arrive()
        assert said is not None
        return said

    def hear(self, said: wire.Said) -> None:
        if not isinstance(said, wire.Told | wire.Done):
            return self.garbled()
        self._mail.put(said)
        self._mail.close()


class Listening(Request):
    """Speech on its way to the platform, and what is understood of it."""

    def __init__(
        self,
        opening: wire.Listen,
        number: int,
        post: Callable[[Request], None],
        partials: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(opening, number, post)
        self._partials = partials
        self._audio = bytearray()
        self._finished = self._told = False

    def send(self, pcm: bytes) -> None:
        """Add 16-bit little-endian mono audio at 16 kHz, cut anywhere. Never blocks, never raises.

        When more than a minute of it waits for the network, the request is given up.
        """
        if self._finished or self.over:
            return
        with self._lock:
            self._audio += pcm
            waiting = len(self._audio)
            if waiting > BACKLOG:
                self._audio.clear()
        if waiting > BACKLOG:
            self.give_up(Away("The network is too slow for speech: this device goes on by itself."))
        elif waiting >= _WORTH:
            self._post(self)

    def finish(self) -> None:
        """All audio has been sent."""
        with self._lock:
            if self._finished:
                return
            self._finished = True
        self._post(self)

    def result(self, timeout: float | None = None) -> wire.Transcript:
        """What was understood; its text is empty when nothing was. Raises `Away`, `Failed`."""
        said: wire.Transcript = self._whole(timeout)
        return said

    def outgoing(self) -> str | bytes | None:
        if (frame := super().outgoing()) is not None:
            return frame
        with self._lock:
            if self.over:
                return None
            if whole := min(len(self._audio), _FRAME) & ~1:
                pcm = bytes(self._audio[:whole])
                del self._audio[:whole]
                return wire.audio(self.number, pcm)
            if self._finished and not self._told:
                self._told = True
                return _frame(wire.Finish(self.number))
            return None

    def hear(self, said: wire.Said) -> None:
        if isinstance(said, wire.Transcript):
            self._mail.put(said)
            self._mail.close()
        elif not isinstance(said, wire.Partial):
            self.garbled()
        elif self._partials is not None:
            try:
                self._partials(said.text)
            except Exception as error:
                LOG.error(f"a partial transcript could not be shown: {type(error).__name__}")
                self._partials = None


class _Stream(Request, Generic[_T]):
    """A request whose answer comes in pieces, to be iterated over once."""

    patience = LONGEST
    """Seconds that whoever iterates waits for each piece, before `Away` (`platform_late`)."""
    _size = 0

    def __iter__(self) -> Iterator[_T]:
        return self

    def __next__(self) -> _T:
        try:
            piece: _T | None = self._mail.get(self.patience)
        except TimeoutError:
            raise self._late() from None
        if piece is None:
            raise StopIteration
        self._read(piece)
        return piece

    def __aiter__(self) -> AsyncIterator[_T]:
        return self

    async def __anext__(self) -> _T:
        try:
            piece: _T | None = await self._mail.arrive(self.patience)
        except TimeoutError:
            raise self._late() from None
        if piece is None:
            raise StopAsyncIteration
        self._read(piece)
        return piece

    def _put(self, piece: _T, size: int) -> None:
        with self._lock:
            self._size += size
            full = self._size > UNREAD
        if full:
            self.give_up(Failed("Nobody takes the platform's answer: it was given up.", code="not_read"))
        else:
            self._mail.put(piece)

    def _read(self, piece: _T) -> None:
        with self._lock:
            self._size -= self._measure(piece)

    def _measure(self, piece: Any) -> int:
        return len(piece)


class Speaking(_Stream[tuple[bytes, int]]):
    """Speech from the platform, piece by piece: 16-bit little-endian mono audio, and its rate in Hz.

    Iterating, in either way, raises `Away` and `Failed`; a stream that breaks off does so after what came.
    """

    _rate = 0

    def hear(self, said: wire.Said) -> None:
        if isinstance(said, wire.Done):
            self.end()
        elif isinstance(said, wire.Sound) and said.rate in _RATES:
            self._rate = said.rate
        else:
            self.garbled()

    def hear_audio(self, pcm: bytes) -> None:
        if not self._rate:
            self.garbled()
        elif pcm:
            self._put((pcm, self._rate), len(pcm))

    def _measure(self, piece: tuple[bytes, int]) -> int:
        return len(piece[0])


class Asking(_Stream[str]):
    """What the persona answers, piece by piece. Iterating, in either way, raises `Away` and `Failed`."""

    def hear(self, said: wire.Said) -> None:
        if isinstance(said, wire.Done):
            self.end()
        elif isinstance(said, wire.Text):
            if said.text:
                self._put(said.text, len(said.text))
        else:
            self.garbled()
