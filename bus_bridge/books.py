"""What a session leaves behind: usage in the ledger, before anybody is told, and its history, soon after."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from agentvoicebox.config.errors import AvbError, Unavailable
from agentvoicebox.tenancy import sessions
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.keys import Grant
from agentvoicebox.tenancy.metering import Ledger, Usage
from agentvoicebox.tenancy.models import EventType, Metric, SessionStatus

log = logging.getLogger(__name__)

SOON = 1.0
"""Seconds that a line of history may wait for others, so that many cost one transaction."""

MOST_WAITING = 10_000
"""Lines of history kept while the store is away; usage has no such limit, it is refused instead."""

PATIENCE = 5.0
"""Seconds that the last writing may take when the node stops."""

_NO_TEXT = re.compile("[\0\ud800-\udfff]")
"""What jsonb refuses, and with it all lines of the same writing."""

_Key = tuple[uuid.UUID, uuid.UUID]
"""Tenant and session."""


def _nothing() -> None:
    """Nobody waits for the end of the session."""


@dataclass(slots=True)
class SessionBooks:
    """The books of one session."""

    books: Books
    tenant_id: uuid.UUID
    project_id: uuid.UUID | None
    session_id: uuid.UUID
    sequence: int = 0
    """Number of the next line. A session is connected once: `Books.end` says when its record is closed."""

    async def meter(self, key: str, stt_seconds: float, tts_seconds: float) -> None:
        """Record what a turn used, all of it or nothing; returns once that is committed. Raises `Unavailable`.

        `key` names the turn: recording it again changes nothing.
        """
        used = {Metric.STT_AUDIO_SECONDS: stt_seconds, Metric.TTS_AUDIO_SECONDS: tts_seconds}
        now = datetime.now(UTC)
        await self.books.ledger.record(
            [
                Usage(
                    event_id=f"{self.session_id}:{key}:{metric}",
                    tenant_id=self.tenant_id,
                    metric=metric,
                    quantity=quantity,
                    at=now,
                    session_id=self.session_id,
                    project_id=self.project_id,
                )
                for metric, quantity in used.items()
                if quantity > 0
            ]
        )

    def record(self, kind: str, content: dict[str, object]) -> None:
        """Append a line of history."""
        event = sessions.Event(self.sequence, EventType(kind), {name: _clean(value) for name, value in content.items()})
        self.sequence += 1
        self.books.note(self.tenant_id, self.session_id, event)


class Books:
    """The node's ledger and the history that is still to be written."""

    def __init__(self, database: Database, ledger: Ledger) -> None:
        self.ledger = ledger
        self._database = database
        self._waiting: dict[_Key, list[sessions.Event]] = {}
        self._ended: dict[_Key, tuple[SessionStatus, Callable[[], None]]] = {}
        self._count = 0
        self._writer: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    def of(self, grant: Grant, session_id: uuid.UUID) -> SessionBooks:
        """The books of one session of the tenant of `grant`."""
        return SessionBooks(self, grant.tenant_id, grant.project_id, session_id)

    def note(self, tenant_id: uuid.UUID, session_id: uuid.UUID, event: sessions.Event) -> None:
        """Take a line of history; it is written soon."""
        if self._count >= MOST_WAITING:
            log.error("the store has been away for long: history of session %s is lost", session_id)
            return
        self._count += 1
        self._waiting.setdefault((tenant_id, session_id), []).append(event)
        self._hurry()

    def end(
        self,
        tenant_id: uuid.UUID,
        session_id: uuid.UUID,
        status: SessionStatus,
        done: Callable[[], None] = _nothing,
    ) -> None:
        """The session has ended; it is closed in the store after the last of its history.

        `done` is called once that is written, or given up.
        """
        self._ended[tenant_id, session_id] = (status, done)
        self._hurry()

    async def close(self) -> None:
        """Write what is left; what the store does not take within `PATIENCE` seconds is lost."""
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

    def _hurry(self) -> None:
        if self._writer is None:
            self._writer = asyncio.create_task(self._write_soon())

    async def _write_soon(self) -> None:
        try:
            while self._waiting or self._ended:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), SOON)
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
        for (tenant_id, session_id), (status, _) in list(self._ended.items()):
            if (tenant_id, session_id) in self._waiting:
                continue
            if await _tried("end", session_id, sessions.finish(self._database, tenant_id, session_id, status)):
                self._settle((tenant_id, session_id))

    def _settle(self, key: _Key) -> None:
        _, done = self._ended.pop(key)
        asyncio.get_running_loop().call_soon(done)  # what goes wrong in there is not ours


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
