"""The ledger: what was used, counted once, and acknowledged only after it is on disk."""

from __future__ import annotations

import asyncio
import copy
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import psycopg
from psycopg import errors, pq
from sqlalchemy import ColumnElement, case, func, select

from agentvoicebox.config.errors import BadInput, Unavailable
from agentvoicebox.config.tasks import begin
from agentvoicebox.tenancy import roles
from agentvoicebox.tenancy.database import Database, translated
from agentvoicebox.tenancy.models import GAUGES, Metric, UsageMinute

PATIENCE = 2.0
"""Seconds for which a group is tried again while the store does not answer."""

EARLIEST = datetime(2020, 1, 1, tzinfo=UTC)
"""A clock that says less was never set."""

_MOST_ROWS = 5_000
_LONGEST_ID = 200
_MOST = 1e9
_DAY = 86_400
_EARLIEST = EARLIEST.timestamp()
_NO_PROJECT = uuid.UUID(int=0)
_LEVELS = ", ".join(f"'{metric}'" for metric in GAUGES)

# One statement, so that an event and its minute are counted together or not at all. Lines go in as they came, so that
# of two with the same id in one group the first counts. Minutes are sorted: the groups of two nodes lock them in the
# same order.
_APPEND = f"""
PREPARE append (json) AS
WITH added AS (
    INSERT INTO usage_events (tenant_id, event_id, metric, quantity, at, session_id, project_id)
    SELECT tenant_id, event_id, metric, quantity, at, session_id, project_id
    FROM json_to_recordset($1) AS used (
        tenant_id uuid, event_id text, metric text, quantity numeric(18, 6), at timestamptz,
        session_id uuid, project_id uuid
    )
    ON CONFLICT DO NOTHING
    RETURNING tenant_id, metric, at, project_id, quantity
)
INSERT INTO usage_minutes AS total (tenant_id, metric, minute, project_id, quantity, events)
SELECT tenant_id, metric, date_trunc('minute', at, 'UTC'), coalesce(project_id, '{_NO_PROJECT}'),
       CASE WHEN metric IN ({_LEVELS}) THEN max(quantity) ELSE sum(quantity) END, count(*)
FROM added
GROUP BY 1, 2, 3, 4
ORDER BY 1, 2, 3, 4
ON CONFLICT (tenant_id, metric, minute, project_id) DO UPDATE SET
    quantity = CASE WHEN total.metric IN ({_LEVELS}) THEN greatest(total.quantity, excluded.quantity)
                    ELSE total.quantity + excluded.quantity END,
    events = total.events + excluded.events
"""  # noqa: S608 - of our own constants


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something a tenant used. `event_id` names it for good: the same id again is the same thing, counted once.

    Should the same id of a tenant come with something else in it, what came first stands. Two tenants may use one id
    for two things. `quantity` is in the metric's unit, 0 to 10⁹, and kept to the millionth. `at` has a time zone;
    before 2020 or more than a day ahead, it is of a clock that is wrong. Session and project need not exist (any more).
    """

    event_id: str
    tenant_id: uuid.UUID
    metric: Metric
    quantity: float
    at: datetime
    session_id: uuid.UUID | None = None
    project_id: uuid.UUID | None = None

    def __post_init__(self) -> None:
        if not 0 < len(self.event_id) <= _LONGEST_ID or not self.event_id.isprintable():
            raise BadInput(f"event_id must be 1 to {_LONGEST_ID} printable characters.", param="event_id")
        if type(self.metric) is not Metric:
            raise BadInput(f"metric must be one of {', '.join(Metric)}.", param="metric")
        if not 0 <= self.quantity <= _MOST:
            raise BadInput("quantity must be 0 to 1000000000.", param="quantity")
        if self.at.tzinfo is None:
            raise BadInput("at must have a time zone.", param="at")
        if not _EARLIEST <= self.at.timestamp() <= time.time() + _DAY:
            raise BadInput("at must be after 2019 and not more than a day ahead: set the clock.", param="at")


_Waiting = tuple[Sequence[Usage], "asyncio.Future[None]"]
"""One call of `record`: its usages land in one group."""


class Ledger:
    """Appends usage in groups: what arrives while one commit is under way goes into the next."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._queue: list[_Waiting] = []
        self._writer: asyncio.Task[None] | None = None
        self._line: _Line | None = None

    async def record(self, usages: Sequence[Usage]) -> None:
        """Return when all of `usages` are committed, together.

        Raises `Unavailable` when the store does not answer for some seconds. They are then not counted, or, when
        only the answer was lost, counted whole; recording the same ids again is safe either way.
        """
        if not usages:
            return
        # On the path of every request: no more than a future here, what else it takes is shared by the group.
        counted = asyncio.get_running_loop().create_future()
        self._queue.append((usages, counted))
        if self._writer is None:
            self._writer = begin(self._write(), "ledger")
        await counted

    async def close(self) -> None:
        """Wait for what is under way, then give the connection back."""
        if (writer := self._writer) is not None:
            await asyncio.wait([writer], timeout=2 * PATIENCE)
            if not writer.done():
                writer.cancel()
                await asyncio.wait([writer], timeout=1)
        await self._disconnect()

    async def _write(self) -> None:
        group: list[_Waiting] = []
        try:
            while self._queue:
                group = self._take()
                try:
                    await self._commit(group)
                except Exception as error:
                    if isinstance(error, Unavailable):
                        group += self._queue  # they wait for the same store
                        self._queue = []
                    _fail(group, error)
                else:
                    for _, counted in group:
                        if not counted.done():  # else whoever waited was cancelled
                            counted.set_result(None)
        except asyncio.CancelledError:
            _fail(group + self._queue, _away())
            self._queue = []
            raise
        finally:
            self._writer = None

    def _take(self) -> list[_Waiting]:
        """The next group: whole calls, up to a size that keeps one statement short."""
        rows = taken = 0
        for usages, _ in self._queue:
            if taken and rows + len(usages) > _MOST_ROWS:
                break
            rows += len(usages)
            taken += 1
        group, self._queue = self._queue[:taken], self._queue[taken:]
        return group

    async def _commit(self, group: list[_Waiting]) -> None:
        rows = msgspec.json.encode([usage for usages, _ in group for usage in usages])
        deadline = time.monotonic() + PATIENCE
        pause = 0.02
        while True:
            try:
                with translated():
                    async with asyncio.timeout(2 * PATIENCE):  # a store that hangs instead of failing
                        if self._line is None:
                            self._line = await _Line.open(self._database)
                        await self._line.append(rows)
                return
            except TimeoutError as error:
                await self._disconnect()
                raise _away() from error
            except Unavailable:
                await self._disconnect()
                if time.monotonic() + pause > deadline:
                    raise
                await asyncio.sleep(pause)
                pause *= 2
            except asyncio.CancelledError:
                await self._disconnect()
                raise

    async def _disconnect(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            await line.close()


class _Line:
    """A connection that has the append statement prepared, and runs nothing else.

    It speaks to libpq itself: what psycopg does around a statement costs this process as much as a hundred events, and
    when a statement is given up it waits for a server that may be the very one that hangs.
    """

    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        self._connection = connection
        self._libpq = connection.pgconn
        self._socket = connection.pgconn.socket
        self._loop = asyncio.get_running_loop()
        self._result: pq.abc.PGresult | None = None
        self._answer: asyncio.Future[None] | None = None
        self._listening = True
        self._loop.add_reader(self._socket, self._read)

    @classmethod
    async def open(cls, database: Database) -> _Line:
        """Raises `Unavailable`."""
        connection = await database.connect(roles.LEDGER)
        try:
            # The plan does not depend on the lines; making it anew for every group would cost more than a small group.
            await connection.execute("SET plan_cache_mode = force_generic_plan")
            await connection.execute(_APPEND)
        except BaseException:
            await connection.close()
            raise
        return cls(connection)

    async def append(self, rows: bytes) -> None:
        """Return when `rows` are committed; raises what psycopg would raise. One at a time, and none after a failure
        other than the statement's own."""
        self._answer = self._loop.create_future()
        self._result = None
        self._libpq.send_query_prepared(b"append", (rows,))
        if self._libpq.flush():
            self._loop.add_writer(self._socket, self._flush)
        await self._answer
        if self._result is not None and self._result.status != pq.ExecStatus.COMMAND_OK:
            raise errors.error_from_result(self._result)

    async def close(self) -> None:
        """Give the connection back; a statement under way may be committed or not."""
        self._deaf()
        await self._connection.close()

    def _read(self) -> None:
        try:
            self._libpq.consume_input()
            while not self._libpq.is_busy():
                result = self._libpq.get_result()
                if result is None:
                    self._done(None)
                    return
                self._result = self._result or result
        except psycopg.Error as error:
            self._done(error)

    def _flush(self) -> None:
        try:
            if not self._libpq.flush():
                self._loop.remove_writer(self._socket)
        except psycopg.Error as error:
            self._done(error)

    def _done(self, error: psycopg.Error | None) -> None:
        if error is not None:
            self._deaf()  # a lost connection would be readable for ever
        if self._answer is not None and not self._answer.done():
            if error is None:
                self._answer.set_result(None)
            else:
                self._answer.set_exception(error)

    def _deaf(self) -> None:
        if self._listening:  # once: libpq closes a lost socket, and its number may be another's by now
            self._listening = False
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)


def summed() -> ColumnElement[Any]:
    """What the minutes of one metric come to: grouped by metric, their sum, or for a level the greatest."""
    quantity = UsageMinute.quantity
    return case((UsageMinute.metric.in_(GAUGES), func.max(quantity)), else_=func.sum(quantity))


async def totals(database: Database, tenant_id: uuid.UUID) -> dict[Metric, float]:
    """What the tenant used of each metric since its beginning, in the metric's unit. Raises `Unavailable`."""
    async with database.tenant(tenant_id) as session:
        rows = await session.execute(select(UsageMinute.metric, summed()).group_by(UsageMinute.metric))
        return {Metric(metric): float(quantity) for metric, quantity in rows}


def _away() -> Unavailable:
    return Unavailable("The store does not answer in time. Try again.", code="store_unavailable")


def _fail(group: list[_Waiting], error: Exception) -> None:
    for _, counted in group:
        if not counted.done():
            # Each waiter raises its own: an exception collects the traceback of everyone who raises it.
            own = Unavailable(error.message, code=error.code) if isinstance(error, Unavailable) else copy.copy(error)
            own.__cause__ = error
            counted.set_exception(own)
