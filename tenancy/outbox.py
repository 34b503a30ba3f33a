"""What the billing system is to be told: usage of whole windows, each told once under a name of its own.

Lines of the ledger are numbered. `seal` adds up those between the mark and the last number that can have no gap any
more, one row for each tenant, metric and window, and moves the mark, all in one transaction. A line that comes late
falls into a later row of its window, with another name: the rows of a window add up to what the ledger holds, or for a
level their greatest is the ledger's. `claim`, `sent` and `failed` are for the one who tells: who dies with rows in hand
leaves them to the next when the lease is over, and who is told twice knows the name already.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from types import MappingProxyType
from typing import Any, cast

from sqlalchemy import CursorResult, text

from agentvoicebox.config.errors import BadInput
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.models import GAUGES, Metric

WINDOW = 900
"""Seconds that one row tells of."""

LONGEST_PAUSE = 3600
"""Seconds after which at the latest a row that could not be told is tried again."""

_FIRST_PAUSE = 30
_MOST_LINES = 1_000_000
_LEVELS = ", ".join(f"'{metric}'" for metric in GAUGES)

# Waits until every writer that has taken a number has committed or given up; writers that come meanwhile wait behind,
# for as long as the slowest group takes. One that hangs must not stop them all.
_PATIENCE = text("SET LOCAL lock_timeout = '1s'")
_ALONE = text("SELECT pg_advisory_xact_lock(x'41564205'::bigint)")
_LAST = text("SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM usage_events_seq")

_MARK = text("SELECT seq FROM usage_marks WHERE name = 'outbox' FOR UPDATE")
_MOVE = text("UPDATE usage_marks SET seq = :upto WHERE name = 'outbox'")
# With `first`, also the lines of before there were numbers.
_FILL = """
INSERT INTO usage_outbox (tenant_id, id, transaction_id, metric, window_start, window_seconds, quantity, events)
SELECT tenant_id, gen_random_uuid(),
       concat_ws(':', tenant_id, metric, extract(epoch FROM start)::bigint, :after + 1),
       metric, start, :seconds,
       CASE WHEN metric IN ({levels}) THEN max(quantity) ELSE sum(quantity) END, count(*)
FROM (SELECT tenant_id, metric, quantity,
             date_bin(make_interval(secs => :seconds), at, '2000-01-01 00:00+00') AS start
      FROM usage_events WHERE {lines}) AS line
GROUP BY tenant_id, metric, start
"""
_NEW = "seq > :after AND seq <= :upto"
_FILL_FIRST = text(_FILL.format(levels=_LEVELS, lines=f"{_NEW} OR seq IS NULL"))
_FILL_NEXT = text(_FILL.format(levels=_LEVELS, lines=_NEW))

_CLAIM = text("""
WITH due AS MATERIALIZED (
    SELECT tenant_id, id FROM usage_outbox
    WHERE sent_at IS NULL AND available_at <= now()
    ORDER BY available_at LIMIT :most FOR UPDATE SKIP LOCKED
)
UPDATE usage_outbox AS o SET attempts = attempts + 1, available_at = now() + make_interval(secs => :lease)
FROM due
WHERE o.tenant_id = due.tenant_id AND o.id = due.id
RETURNING o.tenant_id, o.id, o.transaction_id, o.metric, o.window_start, o.window_seconds, o.quantity, o.events,
          o.attempts
""")
_SENT = text("""
UPDATE usage_outbox AS o SET sent_at = now(), error = ''
FROM unnest(CAST(:tenants AS uuid[]), CAST(:ids AS uuid[])) AS told (tenant_id, id)
WHERE o.tenant_id = told.tenant_id AND o.id = told.id AND o.sent_at IS NULL
""")
_FAILED = text("""
UPDATE usage_outbox AS o SET error = :error,
    available_at = now() + make_interval(secs => least(:longest, :first * 2 ^ least(greatest(o.attempts - 1, 0), 20)))
FROM unnest(CAST(:tenants AS uuid[]), CAST(:ids AS uuid[])) AS told (tenant_id, id)
WHERE o.tenant_id = told.tenant_id AND o.id = told.id AND o.sent_at IS NULL
""")
_BACKLOG = text("SELECT count(*), min(created_at) FROM usage_outbox WHERE sent_at IS NULL")


@dataclass(frozen=True, slots=True)
class Billable:
    """What the billing system calls a metric, and how many of our units make one of its."""

    code: str
    per: int = 1


BILLED = MappingProxyType(
    {
        Metric.API_CALLS: Billable("api_calls"),
        Metric.SESSIONS: Billable("sessions"),
        Metric.SESSION_SECONDS: Billable("session_minutes", 60),
        Metric.STT_AUDIO_SECONDS: Billable("audio_minutes_input", 60),
        Metric.TTS_AUDIO_SECONDS: Billable("audio_minutes_output", 60),
        Metric.LLM_INPUT_TOKENS: Billable("llm_tokens_input"),
        Metric.LLM_OUTPUT_TOKENS: Billable("llm_tokens_output"),
        Metric.STORAGE_BYTES: Billable("storage_gb", 1_000_000_000),
        Metric.CONCURRENT_SESSIONS_PEAK: Billable("concurrent_sessions_peak"),
    }
)
"""The codes of the billable metrics; levels are to be taken at their greatest there too."""


@dataclass(frozen=True, slots=True)
class Window:
    """Usage to be told. Tell name and start together, always the same: some receivers know an event by both."""

    tenant_id: uuid.UUID
    id: uuid.UUID
    transaction_id: str
    metric: Metric
    start: datetime
    seconds: int
    quantity: Decimal
    """In our unit of the metric; `BILLED` has theirs."""
    events: int
    attempts: int
    """How often it has been claimed, this time included."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """What is not told yet."""

    count: int
    oldest: datetime | None
    """When the oldest of it was sealed."""


async def seal(database: Database, window: int = WINDOW) -> int:
    """Put everything that is in the ledger now into the outbox, and return how many rows that made.

    `window` is in seconds. It may run on several nodes at once, be killed at any moment and run as often as you like:
    each line is told of once. Costs those who write nothing but the moment in which the last number is read. Raises
    `Unavailable`, then with nothing half done.
    """
    if not 1 <= window <= 86_400:
        raise BadInput("A window has 1 to 86400 seconds.", param="window")
    last = await _last(database)
    made, done = 0, False
    while not done:
        rows, done = await _fill(database, last, window)
        made += rows
    return made


async def claim(database: Database, limit: int = 100, lease: float = 60) -> list[Window]:
    """Up to `limit` windows that nobody has in hand, the longest due first; yours for `lease` seconds.

    Raises `Unavailable`.
    """
    if not 1 <= limit <= 10_000 or not 0 < lease <= 86_400:
        raise BadInput("Claim 1 to 10000 windows, for up to a day.", param="limit")
    async with database.system() as session:
        rows = (await session.execute(_CLAIM, {"most": limit, "lease": lease})).all()
    found = [Window(tenant, id_, name, Metric(metric), *rest) for tenant, id_, name, metric, *rest in rows]
    return sorted(found, key=lambda window: (window.start, window.transaction_id))


async def sent(database: Database, windows: Sequence[Window]) -> None:
    """These have been told. Raises `Unavailable`; they are then told again, under the same names."""
    async with database.system() as session:
        await session.execute(_SENT, _names(windows))


async def failed(database: Database, windows: Sequence[Window], error: str) -> None:
    """These could not be told: they come up again after 30 s, twice as long each time, an hour at most.

    `error` says why, for the operator; its first 200 characters are kept. Raises `Unavailable`.
    """
    clean = error.replace("\0", "")[:200]
    pauses = {"longest": LONGEST_PAUSE, "first": _FIRST_PAUSE}
    async with database.system() as session:
        await session.execute(_FAILED, {**_names(windows), **pauses, "error": clean})


async def backlog(database: Database) -> Backlog:
    """What waits to be told, in hand or not. Raises `Unavailable`."""
    async with database.system() as session:
        count, oldest = (await session.execute(_BACKLOG)).one()
    return Backlog(count, oldest)


async def _last(database: Database) -> int:
    """A number of which it is certain that it and all below it are committed, or never will be."""
    async with database.system() as session:
        await session.execute(_PATIENCE)
        await session.execute(_ALONE)
        return int((await session.execute(_LAST)).scalar_one())


async def _fill(database: Database, last: int, window: int) -> tuple[int, bool]:
    """Seal some lines, up to number `last`: how many rows that made, and whether those were all."""
    async with database.system() as session:
        mark = int((await session.execute(_MARK)).scalar_one())  # one sealer at a time, until the commit
        upto = min(last, mark + _MOST_LINES)
        if upto <= mark:
            return 0, True
        chosen = {"after": mark, "upto": upto, "seconds": window}
        made = await session.execute(_FILL_FIRST if mark < 0 else _FILL_NEXT, chosen)
        await session.execute(_MOVE, {"upto": upto})
        return cast("CursorResult[Any]", made).rowcount, upto == last


def _names(windows: Sequence[Window]) -> dict[str, list[uuid.UUID]]:
    return {"tenants": [window.tenant_id for window in windows], "ids": [window.id for window in windows]}
