"""The ledger: what was used, counted once, and acknowledged only after it is on disk."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec
import psycopg
from sqlalchemy import func, select

from agentvoicebox.config.errors import BadInput, Unavailable
from agentvoicebox.tenancy import roles
from agentvoicebox.tenancy.database import Database, translated
from agentvoicebox.tenancy.models import Metric, UsageMinute

PATIENCE = 2.0
"""Seconds for which a group is tried again while the store does not answer."""

_MOST_ROWS = 5_000
_LONGEST_ID = 200
_MOST = 1e9
_NO_PROJECT = uuid.UUID(int=0)

# One statement, so that an event and its minute are counted together or not at all. Sorted, so that the groups of two
# nodes lock minutes in the same order.
_APPEND = """
WITH added AS (
    INSERT INTO usage_events (tenant_id, event_id, metric, quantity, at, session_id, project_id)
    SELECT DISTINCT ON (tenant_id, event_id) tenant_id, event_id, metric, quantity, at, session_id, project_id
    FROM json_to_recordset(%s) AS used (
        tenant_id uuid, event_id text, metric text, quantity numeric(18, 6), at timestamptz,
        session_id uuid, project_id uuid
    )
    ORDER BY tenant_id, event_id
    ON CONFLICT DO NOTHING
    RETURNING tenant_id, metric, at, project_id, quantity
)
INSERT INTO usage_minutes AS total (tenant_id, metric, minute, project_id, quantity, events)
SELECT tenant_id, metric, date_trunc('minute', at, 'UTC'), coalesce(project_id, %s), sum(quantity), count(*)
FROM added
GROUP BY 1, 2, 3, 4
ORDER BY 1, 2, 3, 4
ON CONFLICT (tenant_id, metric, minute, project_id)
DO UPDATE SET quantity = total.quantity + excluded.quantity, events = total.events + excluded.events
"""


@dataclass(frozen=True, slots=True)
class Usage:
    """Something a tenant used. `event_id` names it for good: the same id again is the same thing, counted once."""

    event_id: str
    tenant_id: uuid.UUID
    metric: Metric
    quantity: float
    """In the metric's unit, 0 to 10⁹; kept to the millionth."""
    at: datetime
    """With a time zone."""
    session_id: uuid.UUID | None = None
    project_id: uuid.UUID | None = None

    def __post_init__(self) -> None:
        if not 0 < len(self.event_id) <= _LONGEST_ID or not self.event_id.isprintable():
            raise BadInput(f"event_id must be 1 to {_LONGEST_ID} printable characters.", param="event_id")
        if not isinstance(self.metric, Metric):
            raise BadInput(f"metric must be one of {', '.join(Metric)}.", param="metric")
        if not math.isfinite(self.quantity) or not 0 <= self.quantity <= _MOST:
            raise BadInput("quantity must be 0 to 1000000000.", param="quantity")
        if self.at.tzinfo is None:
            raise BadInput("at must have a time zone.", param="at")


@dataclass(slots=True)
class _Waiting:
    """One call of `record`: its usages land in one group."""

    usages: Sequence[Usage]
    counted: asyncio.Future[None]


class Ledger:
    """Appends usage in groups: what arrives while one commit is under way goes into the next."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._queue: list[_Waiting] = []
        self._writer: asyncio.Task[None] | None = None
        self._connection: psycopg.AsyncConnection[Any] | None = None

    async def record(self, usages: Sequence[Usage]) -> None:
        """Return when all of `usages` are committed, together.

        Raises `Unavailable` when the store does not answer for about two seconds. They are then not counted, or, when
        only the answer was lost, counted whole; recording the same ids again is safe either way.
        """
        if not usages:
            return
        waiting = _Waiting(usages, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        if self._writer is None:
            self._writer = asyncio.create_task(self._write(), name="ledger")
        try:
            async with asyncio.timeout(2 * PATIENCE):  # a store that hangs instead of failing
                await waiting.counted
        except TimeoutError as error:
            raise Unavailable("The store does not answer in time. Try again.", code="store_unavailable") from error

    async def close(self) -> None:
        """Wait for the group under way, then give the connection back."""
        if self._writer is not None:
            await asyncio.wait([self._writer], timeout=2 * PATIENCE)
            if self._writer is not None:
                self._writer.cancel()
        await self._disconnect()

    async def _write(self) -> None:
        try:
            while self._queue:
                group = self._take()
                try:
                    await self._commit([usage for waiting in group for usage in waiting.usages])
                except Exception as error:
                    if isinstance(error, Unavailable):
                        group += self._queue  # they wait for the same store
                        self._queue = []
                    _settle(group, error)
                else:
                    _settle(group, None)
        finally:
            self._writer = None

    def _take(self) -> list[_Waiting]:
        """The next group: whole calls, up to a size that keeps one statement short."""
        rows = taken = 0
        for waiting in self._queue:
            if taken and rows + len(waiting.usages) > _MOST_ROWS:
                break
            rows += len(waiting.usages)
            taken += 1
        group, self._queue = self._queue[:taken], self._queue[taken:]
        return group

    async def _commit(self, usages: list[Usage]) -> None:
        rows = msgspec.json.encode(usages).decode()  # arrays, one per column, cost ten times the CPU
        deadline = time.monotonic() + PATIENCE
        pause = 0.02
        while True:
            try:
                with translated():
                    if self._connection is None:
                        self._connection = await self._database.connect(roles.LEDGER)
                    await self._connection.execute(_APPEND, (rows, _NO_PROJECT), prepare=True)
                return
            except Unavailable:
                await self._disconnect()
                if time.monotonic() + pause > deadline:
                    raise
                await asyncio.sleep(pause)
                pause *= 2

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(psycopg.Error):
                await connection.close()


async def totals(database: Database, tenant_id: uuid.UUID) -> dict[Metric, float]:
    """What the tenant used of each metric since its beginning."""
    async with database.tenant(tenant_id) as session:
        rows = await session.execute(
            select(UsageMinute.metric, func.sum(UsageMinute.quantity)).group_by(UsageMinute.metric)
        )
        return {Metric(metric): float(quantity) for metric, quantity in rows}


def _settle(group: list[_Waiting], error: Exception | None) -> None:
    for waiting in group:
        if waiting.counted.done():
            continue  # whoever waited was cancelled
        if error is None:
            waiting.counted.set_result(None)
        else:
            # Each waiter raises its own: an exception collects the traceback of everyone who raises it.
            own = Unavailable(error.message, code=error.code) if isinstance(error, Unavailable) else copy.copy(error)
            own.__cause__ = error
            waiting.counted.set_exception(own)
