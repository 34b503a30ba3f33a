"""What was used comes out as it went in, whole, by day, by project and by tenant, and nothing is made up."""

from __future__ import annotations

import csv
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta, timezone

import pytest

from agentvoicebox.config.errors import BadInput
from agentvoicebox.tenancy import sessions, usage
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.metering import Ledger, Usage
from agentvoicebox.tenancy.models import EventType, Metric, Tenant
from agentvoicebox.tenancy.sessions import Event
from agentvoicebox.tenancy.usage import Amounts, Period

TODAY = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=1)
"""A day that is over, so that its next one is not ahead of the clock."""
NOW = TODAY + timedelta(hours=12)
PROJECT = uuid.uuid4()


@pytest.fixture
async def ledger(database: Database) -> AsyncIterator[Ledger]:
    ledger = Ledger(database)
    yield ledger
    await ledger.close()


def used(
    tenant: Tenant, metric: Metric, quantity: float, at: datetime = NOW, project_id: uuid.UUID | None = None
) -> Usage:
    return Usage(uuid.uuid4().hex, tenant.id, metric, quantity, at, project_id=project_id)


@pytest.mark.parametrize(("name", "days"), [("7d", 7), ("30d", 30), ("90d", 90)])
async def test_periods_begin_at_midnight_in_utc(
    database: Database, ledger: Ledger, tenant: Tenant, name: str, days: int
) -> None:
    """The first moment counts, the one before does not, wherever on earth it was said to be."""
    period, first = usage.period(name), TODAY - timedelta(days=days - 1)
    east = timezone(timedelta(hours=13, minutes=45))
    await ledger.record(
        [
            used(tenant, Metric.API_CALLS, 1, first.astimezone(east)),
            used(tenant, Metric.API_CALLS, 10, (first - timedelta(seconds=1)).astimezone(east)),
            used(tenant, Metric.API_CALLS, 100, TODAY + timedelta(hours=23, minutes=59)),
            used(tenant, Metric.API_CALLS, 1000, TODAY + timedelta(days=1)),
        ]
    )
    whole = await usage.summary(database, tenant.id, period, now=NOW)
    assert (whole.since, whole.until, whole.amounts) == (first, TODAY + timedelta(days=1), Amounts(requests=101))
    days_ = await usage.daily(database, tenant.id, period, now=NOW.astimezone(east))
    assert [day.date for day in days_] == [first.date() + timedelta(days=n) for n in range(days)]
    assert [day.amounts.requests for day in days_] == [1, *[0] * (days - 2), 100]


async def test_a_period_that_is_not_offered() -> None:
    with pytest.raises(BadInput, match="7d, 30d, 90d") as caught:
        usage.period("8d")
    assert caught.value.param == "period"


async def test_everything_has_its_place(database: Database, ledger: Ledger, tenant: Tenant, other: Tenant) -> None:
    quantities = {metric: 10.0 * (n + 1) for n, metric in enumerate(Metric)}
    await ledger.record([used(tenant, metric, quantity) for metric, quantity in quantities.items()])
    await ledger.record([used(tenant, metric, quantity / 2) for metric, quantity in quantities.items()])
    await ledger.record([used(other, metric, 1000) for metric in Metric])
    expected = Amounts(
        requests=15,
        sessions=30,
        session_seconds=45.0,
        stt_audio_seconds=60.0,
        tts_audio_seconds=75.0,
        llm_input_tokens=90,
        llm_output_tokens=105,
        storage_bytes=80,
        concurrent_sessions_peak=90,
    )
    assert (await usage.summary(database, tenant.id, now=NOW)).amounts == expected
    assert expected.audio_minutes == 2.25
    assert (await usage.daily(database, tenant.id, now=NOW))[-1].amounts == expected


async def test_levels_of_a_period_are_their_greatest(database: Database, ledger: Ledger, tenant: Tenant) -> None:
    for days, peak in enumerate((3, 8, 5)):
        await ledger.record([used(tenant, Metric.CONCURRENT_SESSIONS_PEAK, peak, NOW - timedelta(days=days))])
    assert (await usage.summary(database, tenant.id, Period.WEEK, now=NOW)).amounts.concurrent_sessions_peak == 8
    days_ = await usage.daily(database, tenant.id, Period.WEEK, now=NOW)
    assert [day.amounts.concurrent_sessions_peak for day in days_] == [0, 0, 0, 0, 5, 8, 3]


async def test_one_project_only(database: Database, ledger: Ledger, tenant: Tenant) -> None:
    await ledger.record(
        [used(tenant, Metric.API_CALLS, 1, project_id=PROJECT), used(tenant, Metric.API_CALLS, 10)],
    )
    for project, requests in ((PROJECT, 1), (None, 11), (uuid.uuid4(), 0)):
        whole = await usage.summary(database, tenant.id, Period.WEEK, project, now=NOW)
        days_ = await usage.daily(database, tenant.id, Period.WEEK, project, now=NOW)
        assert (whole.amounts.requests, sum(day.amounts.requests for day in days_)) == (requests, requests)


async def test_where_nothing_was_metered_there_is_nothing(database: Database, tenant: Tenant) -> None:
    assert (await usage.summary(database, tenant.id)).amounts == Amounts()
    assert {day.amounts for day in await usage.daily(database, tenant.id, Period.QUARTER)} == {Amounts()}
    assert await usage.totals(database, tenant.id) == {}


async def test_days_as_a_table(database: Database, ledger: Ledger, tenant: Tenant) -> None:
    await ledger.record([used(tenant, Metric.STT_AUDIO_SECONDS, 1.25), used(tenant, Metric.LLM_INPUT_TOKENS, 7)])
    lines = list(usage.csv_rows(await usage.daily(database, tenant.id, Period.WEEK, now=NOW)))
    assert all(line.endswith("\r\n") and line.count("\n") == 1 for line in lines)
    rows = list(csv.DictReader(lines))
    assert [row["date"] for row in rows] == [(TODAY - timedelta(days=n)).date().isoformat() for n in range(6, -1, -1)]
    last = rows[-1]
    assert (last["stt_audio_seconds"], last["llm_input_tokens"], last["requests"]) == ("1.25", "7", "0")
    assert list(usage.csv_rows([])) == [lines[0]]


async def test_the_heaviest_first(
    database: Database, ledger: Ledger, new_tenant: Callable[[], Awaitable[Tenant]]
) -> None:
    quiet, chatty, busy, past = [await new_tenant() for _ in range(4)]
    await ledger.record(
        [
            used(quiet, Metric.API_CALLS, 5),
            used(chatty, Metric.STT_AUDIO_SECONDS, 6_000_000),
            used(chatty, Metric.TTS_AUDIO_SECONDS, 3_000_000),
            used(chatty, Metric.SESSION_SECONDS, 10_000_000),
            used(busy, Metric.API_CALLS, 70_000),
            used(busy, Metric.TTS_AUDIO_SECONDS, 6_000_000),
            used(past, Metric.TTS_AUDIO_SECONDS, 9_000_000, NOW - timedelta(days=8)),
        ]
    )
    first, second, *_ = await usage.top(database, period=Period.WEEK, now=NOW)
    assert (first.tenant_id, first.slug, first.requests, first.audio_minutes) == (chatty.id, chatty.slug, 0, 150_000.0)
    assert (second.tenant_id, second.name, second.requests, second.audio_minutes) == (
        busy.id,
        busy.name,
        70_000,
        100_000.0,
    )
    everybody = [heavy.tenant_id for heavy in await usage.top(database, 100, Period.WEEK, now=NOW)]
    assert quiet.id in everybody
    assert past.id not in everybody
    assert len(await usage.top(database, 1, Period.WEEK, now=NOW)) == 1
    with pytest.raises(BadInput):
        await usage.top(database, 0)


async def test_storage_is_measured_once_a_day(
    database: Database, ledger: Ledger, tenant: Tenant, other: Tenant
) -> None:
    session = await sessions.create(database, tenant.id)

    async def say(number: int) -> None:
        event = Event(number, EventType.TRANSCRIPT, {"text": uuid.uuid4().hex * 10})
        await sessions.record(database, tenant.id, session.id, [event])

    await say(0)
    tenants = await usage.measure_storage(database, ledger, NOW)
    assert tenants >= 2
    held = (await usage.totals(database, tenant.id))[Metric.STORAGE_BYTES]
    assert 300 <= held <= 400
    assert await usage.totals(database, other.id) == {Metric.STORAGE_BYTES: 0.0}
    await say(1)
    await usage.measure_storage(database, ledger, NOW + timedelta(hours=1))
    assert (await usage.totals(database, tenant.id))[Metric.STORAGE_BYTES] == held, "the same day"
    await usage.measure_storage(database, ledger, NOW + timedelta(days=1))
    assert 600 <= (await usage.totals(database, tenant.id))[Metric.STORAGE_BYTES] <= 800
