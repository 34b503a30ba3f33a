"""What a session leaves behind: usage in the ledger, before anybody is told, and its history, soon after."""

from __future__ import annotations

import asyncio
import logging
import uuid
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


@dataclass(slots=True)
class SessionBooks:
    """The books of one session."""

    books: Books
    tenant_id: uuid.UUID
    project_id: uuid.UUID | None
    session_id: uuid.UUID
    sequence: int = 0

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
        event = sessions.Event(self.sequence, EventType(kind), content)
        self.sequence += 1
        self.books.note(self.tenant_id, self.session_id, event)


class Books:
    """The node's ledger and the history that is still to be written."""

    def __init__(self, database: Database, ledger: Ledger) -> None:
        self.ledger = ledger
        self._database = database
        self._waiting: dict[tuple[uuid.UUID, uuid.UUID], list[sessions.Event]] = {}
        self._ended: dict[tuple[uuid.UUID, uuid.UUID], SessionStatus] = {}
        self._count = 0
        self._writer: asyncio.Task[None] | None = None

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

    def end(self, tenant_id: uuid.UUID, session_id: uuid.UUID, status: SessionStatus) -> None:
        """The session has ended; it is closed in the store after the last of its history."""
        self._ended[tenant_id, session_id] = status
        self._hurry()

    async def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.gather(self._writer, return_exceptions=True)
            self._writer = None
        await self._write()

    def _hurry(self) -> None:
        if self._writer is None:
            self._writer = asyncio.create_task(self._write_soon())

    async def _write_soon(self) -> None:
        while self._waiting or self._ended:
            await asyncio.sleep(SOON)
            await self._write()
        self._writer = None

    async def _write(self) -> None:
        # One after the other on one connection: a thousand clients that leave at once must not push requests aside.
        waiting, self._waiting = self._waiting, {}
        ended, self._ended = self._ended, {}
        self._count = 0
        for (tenant_id, session_id), events in waiting.items():
            try:
                await sessions.record(self._database, tenant_id, session_id, events)
            except Unavailable:  # the store will be back, and the lines are in order
                later = self._waiting.setdefault((tenant_id, session_id), [])
                later[:0] = events
                self._count += len(events)
            except AvbError as error:
                log.error("history of session %s could not be written: %s", session_id, error.code)
        for (tenant_id, session_id), status in ended.items():
            try:
                await sessions.finish(self._database, tenant_id, session_id, status)
            except Unavailable:
                self._ended.setdefault((tenant_id, session_id), status)
            except AvbError as error:
                log.error("session %s could not be closed: %s", session_id, error.code)
