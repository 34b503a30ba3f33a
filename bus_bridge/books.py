"""What a session leaves behind: usage in the ledger, before anybody is told, and its history, soon after.

What a turn used is committed before the turn is acknowledged. That a session began, the time it takes, and how many
there are at once are metered as it goes: within a second, every minute, and at its end. A crash of the node loses at
most the last minute of each session, which nobody was told of; a store that is away loses nothing, for the seconds
wait in memory until it is back.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import ClassVar, NamedTuple

from agentvoicebox.config.errors import AvbError, BadInput, Conflict, Unavailable
from agentvoicebox.config.tasks import begin
from agentvoicebox.tenancy import sessions
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.keyring import Grant
from agentvoicebox.tenancy.metering import Ledger, Usage
from agentvoicebox.tenancy.models import EventType, Metric, SessionStatus

log = logging.getLogger(__name__)

SOON = 1.0
"""Seconds that a line of history may wait for others, so that many cost one transaction."""

MOST_WAITING = 10_000
"""Lines of history that wait to be written; usage has no such limit, it is refused instead."""

MOST_OF_SESSION = 500
"""Of them of one session, so that none crowds out the others."""

MINUTE = 60.0
"""Seconds after which the time of a running session is metered again."""

PATIENCE = 5.0
"""Seconds that the last writing may take when the node stops."""

_MOST_LINES = 5_000
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
"""What jsonb refuses, and with it all lines of the same writing."""

_Key = tuple[uuid.UUID, uuid.UUID]
"""Tenant and session."""


def _nothing() -> None:
    """Nobody waits for the end of the session."""


class Spent(NamedTuple):
    """What a session has used that its record does not tell of yet."""

    audio_seconds: float = 0.0
    """Of speech, understood and made."""
    input_tokens: int = 0
    output_tokens: int = 0

    def more(self, other: Spent) -> Spent:
        """Both together."""
        return Spent(
            self.audio_seconds + other.audio_seconds,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
        )


NOTHING = Spent()


@dataclass(slots=True, eq=False)
class SessionBooks:
    """The books of one session."""

    books: Books
    tenant_id: uuid.UUID
    project_id: uuid.UUID | None
    session_id: uuid.UUID
    sequence: int = 0
    """Number of the next line. A session is connected once: `Books.end` says when its record is closed."""
    spent: Spent = NOTHING
    due: float = 0.0
    """When its time is to be metered again, in seconds of the node's clock that never goes back."""
    over: bool = False
    _since: float = field(default_factory=time.monotonic)
    _life: str = field(default_factory=lambda: secrets.token_hex(4))
    """Tells this service of the session from one that another node, which died, has given it before."""
    _parts: int = 0

    def take(self, now: float) -> list[Usage]:
        """The time that has passed since the last call, as usage to be recorded."""
        if now <= self._since:
            return []
        used = [self._usage(f"seconds:{self._life}:{self._parts}", Metric.SESSION_SECONDS, now - self._since)]
        self._since = now
        self._parts += 1
        return used

    def begun(self) -> Usage:
        """That the session began."""
        return self._usage("begun", Metric.SESSIONS, 1)

    async def meter(self, key: str, stt_seconds: float, tts_seconds: float) -> None:
        """Record what a turn used, all of it or nothing; returns once that is committed. Raises `Unavailable`.

        `key` names the turn: recording it again changes nothing.
        """
        used = {Metric.STT_AUDIO_SECONDS: stt_seconds, Metric.TTS_AUDIO_SECONDS: tts_seconds}
        await self.books.ledger.record(
            [self._usage(f"{key}:{metric}", metric, quantity) for metric, quantity in used.items() if quantity > 0]
        )
        self.spent = self.spent.more(Spent(stt_seconds + tts_seconds))

    def _usage(self, name: str, metric: Metric, quantity: float) -> Usage:
        return Usage(
            event_id=f"{self.session_id}:{name}",
            tenant_id=self.tenant_id,
            metric=metric,
            quantity=quantity,
            at=datetime.now(UTC),
            session_id=self.session_id,
            project_id=self.project_id,
        )

    def record(self, kind: str, content: dict[str, object]) -> None:
        """Append a line of history."""
        event = sessions.Event(self.sequence, EventType(kind), {name: _clean(value) for name, value in content.items()})
        self.sequence += 1
        self.books.note(self.tenant_id, self.session_id, event)


@dataclass(slots=True, eq=False)
class _Crowd:
    """The sessions that a tenant has open on this node."""

    tenant_id: uuid.UUID
    due: float
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Levels of different nodes, and of later crowds, are different events."""
    over: ClassVar[bool] = False
    open: int = 0
    _peak: int = 0
    _parts: int = 0

    def enter(self) -> None:
        """One more."""
        self.open += 1
        self._peak = max(self._peak, self.open)

    def leave(self) -> None:
        """One less."""
        self.open -= 1

    def take(self, now: float) -> list[Usage]:
        """The most there were at once since the last call, as usage to be recorded."""
        if not self._peak:
            return []
        name = f"{self.name}:peak:{self._parts}"
        used = Usage(name, self.tenant_id, Metric.CONCURRENT_SESSIONS_PEAK, self._peak, datetime.now(UTC))
        self._peak = self.open
        self._parts += 1
        return [used]


class _Meter:
    """Records what takes time: one task for all sessions of the node, one call of the ledger for all that is due.

    Everybody is due a minute after the last time, so those that came first come first; a second's share of them is
    looked at every second, and never all at once. `heard` is told of a session that had audio by then. While the store
    is away nothing new is taken from them: their time goes on, and what waits is no more than what was taken before,
    and what began or ended since.
    """

    def __init__(self, ledger: Ledger, heard: Callable[[SessionBooks], None]) -> None:
        self._ledger = ledger
        self._heard = heard
        self._sessions: dict[_Key, SessionBooks] = {}
        self._crowds: dict[uuid.UUID, _Crowd] = {}
        self._due: deque[SessionBooks | _Crowd] = deque()
        self._owed: list[Usage] = []
        self._task: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    def begin(self, session: SessionBooks) -> None:
        """From now on the session's time is metered."""
        now = time.monotonic()
        self._owed.append(session.begun())
        self._sessions[session.tenant_id, session.session_id] = session
        crowd = self._crowds.get(session.tenant_id)
        if crowd is None:
            crowd = self._crowds[session.tenant_id] = _Crowd(session.tenant_id, now + MINUTE)
            self._due.append(crowd)
        crowd.enter()
        session.due = now + MINUTE
        self._due.append(session)
        if self._task is None:
            self._task = begin(self._run(), "meter")

    def find(self, key: _Key) -> SessionBooks | None:
        """The books of a session whose time runs."""
        return self._sessions.get(key)

    def end(self, key: _Key) -> SessionBooks | None:
        """The session's time is over; returns it, or nothing for one that never began."""
        session = self._sessions.pop(key, None)
        if session is not None:
            session.over = True
            self._owe(session, time.monotonic())
            self._crowds[session.tenant_id].leave()
        return session

    async def close(self) -> None:
        """Record all there is; what the store does not take within `PATIENCE` seconds is lost."""
        for session in self._sessions.values():  # whose end nobody has told us in time
            self._owe(session, time.monotonic())
        self._sessions.clear()
        for crowd in self._crowds.values():
            self._owe(crowd, time.monotonic())
        self._crowds.clear()
        self._due.clear()
        self._closing.set()
        if (task := self._task) is None:
            return
        await asyncio.wait([task], timeout=PATIENCE)
        if not task.done():
            log.error("the store is away: %d lines of usage of sessions are lost", len(self._owed))
            task.cancel()
            await asyncio.wait([task], timeout=1)

    async def _run(self) -> None:
        here = True
        try:
            while self._due or self._owed:
                with suppress(TimeoutError):
                    async with asyncio.timeout(SOON):
                        await self._closing.wait()
                if here:
                    self._collect(time.monotonic())
                here = await self._record()
                if self._closing.is_set():
                    await asyncio.sleep(0.05)  # a store that is away may refuse at once
        finally:
            self._task = None

    def _collect(self, now: float) -> None:
        while self._due and self._due[0].due <= now:
            one = self._due.popleft()
            if one.over:
                continue
            self._owe(one, now)
            if isinstance(one, _Crowd):
                if not one.open:
                    del self._crowds[one.tenant_id]
                    continue
            elif one.spent != NOTHING:
                self._heard(one)
            one.due = now + MINUTE
            self._due.append(one)

    def _owe(self, one: SessionBooks | _Crowd, now: float) -> None:
        try:
            self._owed += one.take(now)
        except BadInput as error:  # the clock was set to nonsense: no reason to keep a session from ending
            log.error("usage of tenant %s cannot be metered: %s", one.tenant_id, error.message)

    async def _record(self) -> bool:
        """Whether nothing is owed any more, or nothing of that can ever be recorded; false while the store is away."""
        while self._owed:
            some = self._owed[:_MOST_LINES]
            try:
                await self._ledger.record(some)
            except Unavailable:
                return False
            except Exception as error:  # only its name: a message may hold what is none of the log's business
                log.error("%d lines of usage could not be recorded: %s", len(some), type(error).__name__)
            del self._owed[: len(some)]
        return True


class _End(NamedTuple):
    """How a session ended, and whom to tell when that is written."""

    status: SessionStatus
    reason: str
    books: SessionBooks | None
    done: Callable[[], None]


class Books:
    """The node's ledger and the history that is still to be written."""

    def __init__(self, database: Database, ledger: Ledger) -> None:
        self.ledger = ledger
        self._database = database
        self._waiting: dict[_Key, list[sessions.Event]] = {}
        self._heard: dict[_Key, SessionBooks] = {}
        self._ended: dict[_Key, _End] = {}
        self._count = 0
        self._lossy: set[_Key] = set()
        """Sessions of which lines were lost."""
        self._meter = _Meter(ledger, self._hear)
        self._writer: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    def of(self, grant: Grant, session_id: uuid.UUID, sequence: int = 0) -> SessionBooks:
        """Open the books of a session of the tenant of `grant`: it has begun, and its time runs until `end`.

        `sequence` is the number of its next line of history.
        """
        session = SessionBooks(self, grant.tenant_id, grant.project_id, session_id, sequence)
        self._meter.begin(session)
        return session

    def count(self, tenant_id: uuid.UUID, session_id: uuid.UUID, input_tokens: int, output_tokens: int) -> None:
        """A language model has read and written for the session; the ledger has that already."""
        if (session := self._meter.find((tenant_id, session_id))) is not None:
            session.spent = session.spent.more(Spent(0.0, input_tokens, output_tokens))

    def note(self, tenant_id: uuid.UUID, session_id: uuid.UUID, event: sessions.Event) -> None:
        """Take a line of history; it is written soon, unless too much of the session or of all waits for that."""
        key = (tenant_id, session_id)
        waiting = self._waiting.get(key, ())
        if self._count >= MOST_WAITING or len(waiting) >= MOST_OF_SESSION:
            if key not in self._lossy:
                self._lossy.add(key)
                lines, whose = (len(waiting), "its") if self._count < MOST_WAITING else (self._count, "the node's")
                log.error("history of session %s is lost: %d of %s lines wait to be written", session_id, lines, whose)
            return
        self._count += 1
        self._waiting.setdefault(key, []).append(event)
        self._hurry()

    def end(
        self,
        tenant_id: uuid.UUID,
        session_id: uuid.UUID,
        status: SessionStatus,
        done: Callable[[], None] = _nothing,
        reason: str = "",
    ) -> None:
        """The session has ended, for `reason` if we ended it; it is closed in the store after the last of its history.

        `done` is called once that is written, or given up.
        """
        session = self._meter.end((tenant_id, session_id))
        self._ended[tenant_id, session_id] = _End(status, reason, session, done)
        self._hurry()

    async def close(self) -> None:
        """Write what is left; what the store does not take within `PATIENCE` seconds is lost."""
        await asyncio.gather(self._meter.close(), self._close_history())

    async def _close_history(self) -> None:
        self._closing.set()
        if self._writer is None:
            return
        writer = self._writer
        await asyncio.wait([writer], timeout=PATIENCE)
        if writer.done():
            return
        log.error("the store is away: %d lines and the ends of %d sessions are lost", self._count, len(self._ended))
        writer.cancel()
        # Not for ever: a store that hangs does not even take back a statement.
        await asyncio.wait([writer], timeout=1)
        for key in list(self._ended):
            self._settle(key)

    def _hear(self, session: SessionBooks) -> None:
        self._heard[session.tenant_id, session.session_id] = session
        self._hurry()

    def _hurry(self) -> None:
        if self._writer is None:
            self._writer = begin(self._write_soon(), "books")

    async def _write_soon(self) -> None:
        try:
            while self._waiting or self._heard or self._ended:
                with suppress(TimeoutError):
                    async with asyncio.timeout(SOON):
                        await self._closing.wait()
                await self._write()
                if self._closing.is_set():
                    await asyncio.sleep(0.05)  # a store that is away may refuse at once
        finally:
            self._writer = None

    async def _write(self) -> None:
        # One after the other on one connection: a thousand clients that leave at once must not push requests aside.
        # What is not written yet stays where it is, in its order, whatever ends this.
        for (tenant_id, session_id), events in list(self._waiting.items()):
            count = len(events)
            if await _tried("history", session_id, sessions.record(self._database, tenant_id, session_id, events[:])):
                self._count -= count
                del events[:count]
                if not events:
                    del self._waiting[tenant_id, session_id]
        for key, session in list(self._heard.items()):
            del self._heard[key]
            spent, session.spent = session.spent, NOTHING
            add = sessions.add_usage(self._database, *key, **spent._asdict())
            if not await _tried("usage", session.session_id, add):
                session.spent = session.spent.more(spent)  # a minute later, or with the end
        for key, end in list(self._ended.items()):
            if key not in self._waiting and await _tried("end", key[1], self._finish(*key, end)):
                self._settle(key)

    async def _finish(self, tenant_id: uuid.UUID, session_id: uuid.UUID, end: _End) -> None:
        spent = end.books.spent if end.books is not None else NOTHING
        # An administrator has ended it in the store already, and then on the node.
        with suppress(Conflict):
            await sessions.finish(
                self._database, tenant_id, session_id, end.status, reason=end.reason, **spent._asdict()
            )

    def _settle(self, key: _Key) -> None:
        self._lossy.discard(key)
        asyncio.get_running_loop().call_soon(self._ended.pop(key).done)  # what goes wrong in there is not ours


async def _tried(what: str, session_id: uuid.UUID, write: Awaitable[object]) -> bool:
    """Whether that is over, well or not; false when it is to be tried again because the store is away."""
    try:
        await write
    except Unavailable:
        return False
    except Exception as error:  # only its name: a message may hold what was said
        reason = error.code if isinstance(error, AvbError) else type(error).__name__
        log.error("%s of session %s could not be written: %s", what, session_id, reason)
    return True


def _clean(value: object) -> object:
    return _NO_TEXT.sub("\ufffd", value) if isinstance(value, str) else value
