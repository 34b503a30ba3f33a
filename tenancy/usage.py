"""What was used, as people want to see it: sums, days, months, the heaviest. What nobody metered is zero."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, date, datetime, time, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import Date, cast, func, literal_column, select, text

from agentvoicebox.config.errors import BadInput
from agentvoicebox.tenancy import tables
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.metering import Ledger, Usage, summed, totals
from agentvoicebox.tenancy.models import Metric, UsageMinute

__all__ = [
    "Amounts",
    "Day",
    "Heavy",
    "Period",
    "Summary",
    "csv_rows",
    "daily",
    "measure_storage",
    "period",
    "summary",
    "top",
    "totals",
]

_MOST_AT_ONCE = 1_000
"""Levels in one call of the ledger: others wait for its group."""

_HEAVIEST = text("""
SELECT t.id, t.name, t.slug,
    coalesce(sum(m.quantity) FILTER (WHERE m.metric = 'api_calls'), 0),
    coalesce(sum(m.quantity) FILTER (WHERE m.metric <> 'api_calls'), 0) AS audio
FROM usage_minutes m JOIN tenants t ON t.id = m.tenant_id
WHERE m.minute >= :since AND m.minute < :until
  AND m.metric IN ('api_calls', 'stt_audio_seconds', 'tts_audio_seconds')
GROUP BY t.id
ORDER BY 5 DESC, 4 DESC, t.id
LIMIT :most
""")

_STORAGE = text("""
SELECT t.id, coalesce(sum(pg_column_size(e.content)), 0)
FROM tenants t LEFT JOIN session_events e ON e.tenant_id = t.id
WHERE t.status <> 'deleted'
GROUP BY t.id
""")


class Period(StrEnum):
    """So many days in UTC, today the last of them."""

    WEEK = "7d"
    MONTH = "30d"
    QUARTER = "90d"

    @property
    def days(self) -> int:
        """How many."""
        return int(self.removesuffix("d"))


@dataclass(frozen=True, slots=True)
class Amounts:
    """What was used of everything; levels with their greatest value."""

    requests: int = 0
    sessions: int = 0
    session_seconds: float = 0.0
    stt_audio_seconds: float = 0.0
    tts_audio_seconds: float = 0.0
    llm_input_tokens: int = 0
    llm_output_tokens: int = 0
    storage_bytes: int = 0
    concurrent_sessions_peak: int = 0

    @property
    def audio_minutes(self) -> float:
        """Minutes of speech, understood and made."""
        return (self.stt_audio_seconds + self.tts_audio_seconds) / 60


@dataclass(frozen=True, slots=True)
class Day:
    """What was used on a day in UTC."""

    date: date
    amounts: Amounts


@dataclass(frozen=True, slots=True)
class Summary:
    """What was used from `since` up to, and without, `until`."""

    period: Period
    since: datetime
    until: datetime
    amounts: Amounts


@dataclass(frozen=True, slots=True)
class Heavy:
    """A tenant in the ranking."""

    tenant_id: uuid.UUID
    name: str
    slug: str
    requests: int
    audio_minutes: float


def period(name: str) -> Period:
    """The period of that name. Raises `BadInput` for one that is not offered."""
    try:
        return Period(name)
    except ValueError as error:
        raise BadInput(f"period must be one of {', '.join(Period)}.", param="period") from error


async def summary(
    database: Database,
    tenant_id: uuid.UUID,
    period: Period = Period.MONTH,
    project_id: uuid.UUID | None = None,
    now: datetime | None = None,
) -> Summary:
    """What the tenant used in the period, of one project or in all. Raises `Unavailable`."""
    since, until = _span(period, now)
    query = select(UsageMinute.metric, summed()).where(UsageMinute.minute >= since, UsageMinute.minute < until)
    if project_id is not None:
        query = query.where(UsageMinute.project_id == project_id)
    async with database.tenant(tenant_id) as session:
        rows = await session.execute(query.group_by(UsageMinute.metric))
        found = {metric: quantity for metric, quantity in rows}
    return Summary(period, since, until, _amounts(found))


async def daily(
    database: Database,
    tenant_id: uuid.UUID,
    period: Period = Period.MONTH,
    project_id: uuid.UUID | None = None,
    now: datetime | None = None,
) -> list[Day]:
    """What the tenant used on each day of the period, also of nothing, the oldest first. Raises `Unavailable`."""
    since, until = _span(period, now)
    day = cast(func.timezone(literal_column("'UTC'"), UsageMinute.minute), Date)
    query = select(day, UsageMinute.metric, summed()).where(UsageMinute.minute >= since, UsageMinute.minute < until)
    if project_id is not None:
        query = query.where(UsageMinute.project_id == project_id)
    found: dict[date, dict[str, Any]] = {since.date() + timedelta(n): {} for n in range(period.days)}
    async with database.tenant(tenant_id) as session:
        for on, metric, quantity in await session.execute(query.group_by(day, UsageMinute.metric)):
            found[on][metric] = quantity
    return [Day(on, _amounts(quantities)) for on, quantities in found.items()]


def csv_rows(days: Iterable[Day]) -> Iterator[str]:
    """A table of the days in CSV (RFC 4180), line by line, the names of the columns first."""
    names = [field.name for field in fields(Amounts)]
    yield tables.row(["date", *names])
    for day in days:
        yield tables.row([day.date.isoformat(), *(getattr(day.amounts, name) for name in names)])


async def top(
    database: Database, most: int = 10, period: Period = Period.MONTH, now: datetime | None = None
) -> list[Heavy]:
    """The heaviest tenants of all, by minutes of audio, then by requests; for the operator. Raises `Unavailable`."""
    if not 1 <= most <= 100:
        raise BadInput("A ranking has 1 to 100 places.", param="most")
    since, until = _span(period, now)
    async with database.system() as session:
        rows = await session.execute(_HEAVIEST, {"since": since, "until": until, "most": most})
        return [Heavy(id_, name, slug, int(calls), float(audio) / 60) for id_, name, slug, calls, audio in rows]


async def measure_storage(database: Database, ledger: Ledger, now: datetime | None = None) -> int:
    """Meter how many bytes of session history each tenant holds, and return how many tenants there are.

    The first measurement of a day in UTC counts: again, or on several nodes, it changes nothing. Raises `Unavailable`.
    """
    at = now or datetime.now(UTC)
    async with database.system() as session:
        rows = (await session.execute(_STORAGE)).all()
    name = f"storage:{at.astimezone(UTC).date()}"
    levels = [Usage(name, tenant_id, Metric.STORAGE_BYTES, float(held), at) for tenant_id, held in rows]
    for some in range(0, len(levels), _MOST_AT_ONCE):
        await ledger.record(levels[some : some + _MOST_AT_ONCE])
    return len(levels)


def _span(period: Period, now: datetime | None) -> tuple[datetime, datetime]:
    today = (now or datetime.now(UTC)).astimezone(UTC).date()
    midnight = datetime.combine(today, time(), UTC)
    return midnight - timedelta(days=period.days - 1), midnight + timedelta(days=1)


def _amounts(found: Mapping[str, Any]) -> Amounts:
    def of(metric: Metric) -> float:
        return float(found.get(metric, 0))

    return Amounts(
        requests=int(of(Metric.API_CALLS)),
        sessions=int(of(Metric.SESSIONS)),
        session_seconds=of(Metric.SESSION_SECONDS),
        stt_audio_seconds=of(Metric.STT_AUDIO_SECONDS),
        tts_audio_seconds=of(Metric.TTS_AUDIO_SECONDS),
        llm_input_tokens=int(of(Metric.LLM_INPUT_TOKENS)),
        llm_output_tokens=int(of(Metric.LLM_OUTPUT_TOKENS)),
        storage_bytes=int(of(Metric.STORAGE_BYTES)),
        concurrent_sessions_peak=int(of(Metric.CONCURRENT_SESSIONS_PEAK)),
    )
