"""The log of what has changed under the caches of nodes, followed by each of them within a second."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psycopg

from agentvoicebox.config.errors import Unavailable
from agentvoicebox.config.tasks import begin, end
from agentvoicebox.tenancy import roles
from agentvoicebox.tenancy.database import Database, translated
from agentvoicebox.tenancy.models import ChangeKind

CHANNEL = "avb_key_revoked"
"""Where the database says that the log has grown."""

_POLL = 0.3
_LEASE = 0.9
"""Seconds for which a look at the log lets caches answer; with one poll that is under a second."""
_PATIENCE = 5.0
"""Seconds after which a connection that does not answer is given up for a new one."""
_PRUNE = 3600.0
_PRUNED = 1_000
_LAST_XID = 2**63 - 1

# What transactions have written that had not ended at the last look. A growing id alone would have gaps: it is given
# out before its transaction commits. The day keeps a restored database, whose numbers restart, from repeating history.
_NEWS = """
SELECT seen.xmin, news.id, news.kind, news.tenant_id, news.key_id
FROM (SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint AS xmin) AS seen
LEFT JOIN key_revocations AS news ON news.xid >= %s AND news.at > now() - interval '1 day'
ORDER BY news.id
"""

# A few at a time, since nobody looks at the log meanwhile, and by one node at a time. Numbers find the oldest lines.
_FORGET = """
DELETE FROM key_revocations
WHERE (SELECT pg_try_advisory_xact_lock(%s)) AND (tenant_id, id) IN (
    SELECT tenant_id, id FROM (SELECT tenant_id, id, at FROM key_revocations ORDER BY xid LIMIT %s) AS oldest
    WHERE at < now() - interval '1 day'
)
"""
_FORGETTING = 0x41564206
"""Our advisory lock for that."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Change:
    """One line of the log; `key_id` is None where it concerns the whole tenant."""

    kind: ChangeKind
    tenant_id: uuid.UUID
    key_id: uuid.UUID | None


class Feed:
    """Tells one node's caches of every change.

    It looks at the log every 0.3 s, and at once when the database notifies; a notification that is lost costs those
    0.3 s and nothing else. Until `fresh_until` everything is told that had been committed 0.9 s before that.
    """

    def __init__(self, database: Database) -> None:
        self.fresh_until = 0.0
        """By `time.monotonic`; whoever caches may answer from memory before it, and asks the database after it."""
        self._database = database
        self._subscribers: list[Callable[[Change], None]] = []
        self._gap_callbacks: list[Callable[[], None]] = []
        self._since = _LAST_XID
        self._told: frozenset[tuple[uuid.UUID, int]] = frozenset()
        self._hint = asyncio.Event()
        self._prune_at = 0.0
        self._task: asyncio.Task[None] | None = None

    def subscribe(self, callback: Callable[[Change], None]) -> None:
        """Call `callback` with every change from now on, once each, in the event loop's thread."""
        self._subscribers.append(callback)

    def on_gap(self, callback: Callable[[], None]) -> None:
        """Call `callback` when changes may have been missed, as in a fail-over: what is cached is to be forgotten."""
        self._gap_callbacks.append(callback)

    async def start(self) -> None:
        """Begin to follow the log. Raises `Unavailable` when the store does not answer."""
        connection = await self._listen()
        try:
            await self._look(connection)
            # While an older transaction goes on, each look sees again what ended before us: that is history.
            await self._look(connection, tell=False)
        except BaseException:
            await connection.close()
            raise
        self._task = begin(self._follow(connection), "changes")

    async def close(self) -> None:
        """Stop following; nothing is fresh any more."""
        if self._task is not None:
            await end(self._task)
            self._task = None
        self.fresh_until = 0.0

    async def _listen(self) -> psycopg.AsyncConnection[Any]:
        connection = await self._database.connect(roles.SYSTEM)
        connection.add_notify_handler(lambda _: self._hint.set())
        try:
            with translated():
                await connection.execute(f"LISTEN {CHANNEL}")
        except BaseException:
            await connection.close()
            raise
        return connection

    async def _follow(self, connection: psycopg.AsyncConnection[Any] | None) -> None:
        """Look again and again; connect again for as long as it takes."""
        try:
            while True:
                try:
                    async with asyncio.timeout(_PATIENCE):
                        if connection is None:
                            connection = await self._listen()
                            self._report_gap()
                        await self._look(connection)
                        await self._prune(connection)
                    await self._wait(connection)
                except Exception as error:
                    if isinstance(error, Unavailable):
                        _log.warning("The log of changes is out of reach: %s", error.message)
                    elif isinstance(error, TimeoutError):
                        _log.warning("The log of changes does not answer; connecting again.")
                    else:
                        _log.exception("The log of changes cannot be followed; trying again.")
                    if connection is not None:
                        await connection.close()
                    connection = None
                    await asyncio.sleep(_POLL)
        finally:
            if connection is not None:
                await connection.close()

    async def _look(self, connection: psycopg.AsyncConnection[Any], *, tell: bool = True) -> None:
        looked_at = time.monotonic()
        self._hint.clear()  # what is notified from here on may be too late for this look
        with translated():
            cursor = await connection.execute(_NEWS, (self._since,))
            rows = await cursor.fetchall()
        self._since = rows[0][0]
        lines = {(row[3], row[1]): Change(_kind(row[2]), row[3], row[4]) for row in rows if row[1] is not None}
        for number, change in lines.items():
            if tell and number not in self._told:
                self._report(change)
        self._told = frozenset(lines)
        self.fresh_until = looked_at + _LEASE

    async def _prune(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Remove lines that no node can need, now and then: what is cached is far younger."""
        if time.monotonic() < self._prune_at:
            return
        with translated():
            cursor = await connection.execute(_FORGET, (_FORGETTING, _PRUNED))
        if cursor.rowcount < _PRUNED:
            self._prune_at = time.monotonic() + _PRUNE

    async def _wait(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Return when the database says something, or after a while. Much cheaper than psycopg's notifies(), which
        wakes up ten times a second."""
        loop, socket = asyncio.get_running_loop(), connection.fileno()
        loop.add_reader(socket, self._hint.set)
        try:
            async with asyncio.timeout(_POLL):
                await self._hint.wait()
        except TimeoutError:
            pass
        finally:
            loop.remove_reader(socket)
        # Taken here, they do not make a second look of the next one.
        with translated():
            connection.pgconn.consume_input()
            while connection.pgconn.notifies():
                pass

    def _report(self, change: Change) -> None:
        for callback in self._subscribers:
            try:
                callback(change)
            except Exception:
                _log.exception("Could not act on a change (%s) of tenant %s.", change.kind, change.tenant_id)

    def _report_gap(self) -> None:
        for callback in self._gap_callbacks:
            try:
                callback()
            except Exception:
                _log.exception("Could not forget what is cached.")


def _kind(told: str) -> ChangeKind:
    """What a line is about; one that only a later release knows means that anything about its tenant may be new."""
    try:
        return ChangeKind(told)
    except ValueError:
        return ChangeKind.TENANT
