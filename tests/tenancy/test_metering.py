"""The ledger counts once, wholly, and only what is on disk."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import psycopg
import pytest

from agentvoicebox.config.errors import BadInput, Unavailable
from agentvoicebox.tenancy import metering, outbox, roles, sessions, tenants, usage
from agentvoicebox.tenancy.database import Database, prepare
from agentvoicebox.tenancy.metering import Ledger, Usage
from agentvoicebox.tenancy.models import Metric, Tenant

NOON = datetime.now(UTC).replace(hour=12, minute=0, second=30, microsecond=0) - timedelta(days=1)
PROJECT = uuid.uuid4()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stalls for seconds is not a store that is away."""
    monkeypatch.setattr(metering, "PATIENCE", 30)


@pytest.fixture
async def ledger(database: Database) -> AsyncIterator[Ledger]:
    ledger = Ledger(database)
    yield ledger
    await ledger.close()


def turn(tenant: Tenant, event_id: str, quantity: float = 1, at: datetime = NOON) -> Usage:
    return Usage(event_id, tenant.id, Metric.API_CALLS, quantity, at)


async def count(admin: psycopg.AsyncConnection, tenant: Tenant) -> int:
    cursor = await admin.execute("SELECT count(*) FROM usage_events WHERE tenant_id = %s", (tenant.id,))
    row = await cursor.fetchone()
    assert row is not None
    return int(row[0])


async def test_what_is_recorded_adds_up(database: Database, ledger: Ledger, tenant: Tenant, other: Tenant) -> None:
    session = uuid.uuid4()
    await ledger.record(
        [
            Usage("t1.stt", tenant.id, Metric.STT_AUDIO_SECONDS, 1.1, NOON, session, PROJECT),
            Usage("t1.tts", tenant.id, Metric.TTS_AUDIO_SECONDS, 2.25, NOON, session, PROJECT),
            Usage("t1.turn", tenant.id, Metric.API_CALLS, 1, NOON, session, PROJECT),
            Usage("t1.turn", other.id, Metric.API_CALLS, 1, NOON),
        ]
    )
    await ledger.record([Usage("t2.stt", tenant.id, Metric.STT_AUDIO_SECONDS, 2.2, NOON, session, PROJECT)])
    await ledger.record([])
    assert await metering.totals(database, tenant.id) == {
        Metric.STT_AUDIO_SECONDS: 3.3,
        Metric.TTS_AUDIO_SECONDS: 2.25,
        Metric.API_CALLS: 1.0,
    }
    assert await metering.totals(database, other.id) == {Metric.API_CALLS: 1.0}
    assert await metering.totals(database, uuid.uuid4()) == {}


async def test_minutes_hold_what_their_events_add_up_to(
    ledger: Ledger, tenant: Tenant, admin: psycopg.AsyncConnection
) -> None:
    """Also for a time zone whose offset is not whole hours, and an event without a project."""
    east = (NOON + timedelta(seconds=29)).astimezone(timezone(timedelta(hours=5, minutes=45)))
    await ledger.record(
        [turn(tenant, "a"), turn(tenant, "b", at=east), turn(tenant, "c", at=NOON + timedelta(minutes=1))]
    )
    await ledger.record([Usage("d", tenant.id, Metric.API_CALLS, 1, NOON, project_id=PROJECT)])
    cursor = await admin.execute(
        "SELECT minute, project_id, quantity, events FROM usage_minutes WHERE tenant_id = %s ORDER BY 1, 2",
        (tenant.id,),
    )
    minute, none = NOON.replace(second=0), uuid.UUID(int=0)
    assert await cursor.fetchall() == [
        (minute, none, 2, 2),
        (minute, PROJECT, 1, 1),
        (minute + timedelta(minutes=1), none, 1, 1),
    ]


async def test_the_same_id_counts_once(
    database: Database, ledger: Ledger, tenant: Tenant, admin: psycopg.AsyncConnection
) -> None:
    once = turn(tenant, "same", 2)
    await ledger.record([once, once])
    await asyncio.gather(*(ledger.record([once, turn(tenant, f"own {i}")]) for i in range(20)))
    second = Ledger(database)
    await second.record([turn(tenant, "same", 99)])
    await second.close()
    assert await metering.totals(database, tenant.id) == {Metric.API_CALLS: 22.0}
    assert await count(admin, tenant) == 21


async def test_of_two_things_with_one_id_the_first_stands(
    database: Database, ledger: Ledger, tenant: Tenant, other: Tenant
) -> None:
    """In one group as in two; and the ids of one tenant are nobody else's."""
    later = NOON + timedelta(minutes=3)
    await ledger.record([turn(tenant, "z", 3), turn(tenant, "z", 5), turn(tenant, "a"), turn(other, "z", 7)])
    await ledger.record([Usage("z", tenant.id, Metric.SESSIONS, 11, later), turn(tenant, "z", 13, later)])
    assert await metering.totals(database, tenant.id) == {Metric.API_CALLS: 4.0}
    assert await metering.totals(database, other.id) == {Metric.API_CALLS: 7.0}


async def test_of_a_level_the_greatest_counts(
    database: Database, ledger: Ledger, tenant: Tenant, admin: psycopg.AsyncConnection
) -> None:
    """In one statement and in several, in a minute and over minutes, and also for a late one."""

    def level(name: str, quantity: float, minutes: int = 0) -> Usage:
        at = NOON + timedelta(minutes=minutes)
        return Usage(name, tenant.id, Metric.CONCURRENT_SESSIONS_PEAK, quantity, at)

    await ledger.record([level("a", 2), level("b", 9), level("c", 4)])
    await ledger.record([level("d", 7), level("e", 1, minutes=1)])
    await ledger.record([level("f", 12)])
    await ledger.record([level("f", 12), level("g", 3, minutes=1)])
    cursor = await admin.execute(
        "SELECT quantity, events FROM usage_minutes WHERE tenant_id = %s ORDER BY minute", (tenant.id,)
    )
    assert await cursor.fetchall() == [(12, 5), (3, 2)]
    assert await metering.totals(database, tenant.id) == {Metric.CONCURRENT_SESSIONS_PEAK: 12.0}


async def test_session_and_project_are_evidence_and_need_not_exist(
    database: Database, ledger: Ledger, tenant: Tenant, other: Tenant
) -> None:
    """A bad id must not refuse a group of many tenants: another tenant's session does not change whose usage it is."""
    theirs = (await sessions.create(database, other.id)).id
    await ledger.record([Usage("mine", tenant.id, Metric.SESSIONS, 1, NOON, theirs, uuid.uuid4())])
    assert await metering.totals(database, tenant.id) == {Metric.SESSIONS: 1.0}
    assert await metering.totals(database, other.id) == {}


async def test_on_the_oldest_postgresql_as_on_the_newest(empty: Any) -> None:
    """Ledger, sums, storage and outbox, as an operator's ordinary login too."""
    await prepare(empty.address)
    database = Database(empty.address)
    ledger = Ledger(database)
    tenant = await tenants.create(database, "acme", "Acme")
    await ledger.record([turn(tenant, "a", 2), turn(tenant, "a", 3)])
    await ledger.record([turn(tenant, "a", 5), turn(tenant, "b", 7)])
    assert await usage.measure_storage(database, ledger, NOON) == 1
    amounts = (await usage.summary(database, tenant.id)).amounts
    assert amounts == usage.Amounts(requests=9, storage_bytes=0)
    assert sum(day.amounts.requests for day in await usage.daily(database, tenant.id)) == 9
    assert [heavy.requests for heavy in await usage.top(database)] == [9]
    assert await outbox.seal(database) == 2
    windows = await outbox.claim(database)
    assert sorted((window.metric, window.quantity, window.events) for window in windows) == [
        (Metric.API_CALLS, 9, 2),
        (Metric.STORAGE_BYTES, 0, 1),
    ]
    await outbox.failed(database, windows[:1], "no")
    await outbox.sent(database, windows)
    assert (await outbox.backlog(database)).count == 0
    await ledger.close()
    await database.close()


async def test_a_group_larger_than_any_buffer(database: Database, ledger: Ledger, tenant: Tenant) -> None:
    await ledger.record([turn(tenant, f"{i}".ljust(200, "x")) for i in range(20_000)])
    assert await metering.totals(database, tenant.id) == {Metric.API_CALLS: 20_000.0}


async def test_calls_that_wait_share_a_commit(ledger: Ledger, tenant: Tenant, admin: psycopg.AsyncConnection) -> None:
    await asyncio.gather(*(ledger.record([turn(tenant, f"{i}"), turn(tenant, f"{i}b")]) for i in range(200)))
    cursor = await admin.execute(
        "SELECT count(*), count(DISTINCT xmin::text) FROM usage_events WHERE tenant_id = %s", (tenant.id,)
    )
    row = await cursor.fetchone()
    assert row is not None
    assert row[0] == 400
    assert row[1] <= 3


async def test_one_call_is_one_commit(
    ledger: Ledger, tenant: Tenant, admin: psycopg.AsyncConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metering, "_MOST_ROWS", 5)
    calls = [[turn(tenant, f"{call}.{i}") for i in range(4 + call)] for call in range(6)]
    await asyncio.gather(*(ledger.record(usages) for usages in calls))
    for call in range(6):
        cursor = await admin.execute(
            "SELECT count(*), count(DISTINCT xmin::text) FROM usage_events WHERE tenant_id = %s AND event_id LIKE %s",
            (tenant.id, f"{call}.%"),
        )
        assert await cursor.fetchone() == (4 + call, 1)


async def test_who_stops_waiting_stops_nobody_else(database: Database, ledger: Ledger, tenant: Tenant) -> None:
    impatient = asyncio.create_task(ledger.record([turn(tenant, "impatient")]))
    patient = asyncio.create_task(ledger.record([turn(tenant, "patient")]))
    await asyncio.sleep(0)
    impatient.cancel()
    await patient
    assert impatient.cancelled() or impatient.done()
    assert (await metering.totals(database, tenant.id))[Metric.API_CALLS] == 2.0


async def test_two_ledgers_write_the_same_minutes(
    database: Database, new_tenant: Callable[[], Awaitable[Tenant]]
) -> None:
    owners = [await new_tenant() for _ in range(5)]
    ledgers = [Ledger(database) for _ in range(3)]
    await asyncio.gather(
        *(
            ledger.record([turn(owner, f"{n}.{i}") for owner in (owners if i % 2 else owners[::-1])])
            for n, ledger in enumerate(ledgers)
            for i in range(20)
        )
    )
    for owner in owners:
        assert await metering.totals(database, owner.id) == {Metric.API_CALLS: 60.0}
    for ledger in ledgers:
        await ledger.close()


async def test_a_lost_connection_is_made_again(
    database: Database, ledger: Ledger, tenant: Tenant, admin: psycopg.AsyncConnection
) -> None:
    await ledger.record([turn(tenant, "before")])
    for i in range(3):
        await admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'avb_ledger'")
        await ledger.record([turn(tenant, f"after {i}")])
    assert await metering.totals(database, tenant.id) == {Metric.API_CALLS: 4.0}


async def test_a_connection_that_is_lost_while_idle_is_left_alone(
    database: Database, ledger: Ledger, tenant: Tenant, admin: psycopg.AsyncConnection
) -> None:
    """A socket at its end is readable for ever: who went on listening would do nothing else."""
    await ledger.record([turn(tenant, "before")])
    line = ledger._line
    assert line is not None
    await admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'avb_ledger'")
    async with asyncio.timeout(20):
        while line._listening:
            await asyncio.sleep(0.01)
    await ledger.record([turn(tenant, "after")])
    assert await metering.totals(database, tenant.id) == {Metric.API_CALLS: 2.0}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("event_id", ""),
        ("event_id", "x" * 201),
        ("event_id", "a\x00b"),
        ("event_id", "\ud800"),
        ("metric", "api_calls"),
        ("quantity", -0.1),
        ("quantity", float("nan")),
        ("quantity", float("inf")),
        ("quantity", 1e10),
        ("at", datetime(2026, 1, 1)),
        ("at", datetime(2019, 12, 31, 23, 59, 59, tzinfo=UTC)),
        ("at", datetime.now(UTC) + timedelta(days=3)),  # which it still is when the run reaches this test
        ("at", datetime.max.replace(tzinfo=UTC)),
    ],
)
def test_usage_that_makes_no_sense(field: str, value: Any) -> None:
    fine = {"event_id": "e", "tenant_id": uuid.uuid4(), "metric": Metric.API_CALLS, "quantity": 1, "at": NOON}
    with pytest.raises(BadInput) as caught:
        Usage(**{**fine, field: value})
    assert caught.value.param == field


async def test_a_clock_that_goes_back_a_little_is_no_matter(database: Database, ledger: Ledger, tenant: Tenant) -> None:
    now = datetime.now(UTC)
    for number, seconds in enumerate((0, 90, -3600, 80_000, -86_400)):
        await ledger.record([turn(tenant, f"{number}", at=now + timedelta(seconds=seconds))])
    assert await metering.totals(database, tenant.id) == {Metric.API_CALLS: 5.0}


async def test_a_deadlock_is_tried_again(
    database: Database,
    tenant: Tenant,
    ledger: Ledger,
    admin: psycopg.AsyncConnection,
    blocked: Callable[[int], Awaitable[None]],
) -> None:
    """Somebody holds the second minute and wants the first, which the group gets before.

    They queue for the first while a third holds it: who looks for a deadlock looks once, and it must be there by then.
    """
    first, second = turn(tenant, "a1"), turn(tenant, "b1", at=NOON + timedelta(minutes=1))
    await ledger.record([first, second])
    lock = "SELECT FROM usage_minutes WHERE tenant_id = %s AND minute = %s FOR UPDATE"
    third = await database.connect(roles.ADMIN)
    async with admin.transaction():
        await admin.execute("SET LOCAL deadlock_timeout = '600s'")  # so that it is the ledger that gives way
        await admin.execute(lock, (tenant.id, NOON.replace(second=0) + timedelta(minutes=1)))
        async with third.transaction():
            await third.execute(lock, (tenant.id, NOON.replace(second=0)))
            group = asyncio.create_task(ledger.record([turn(tenant, "a2"), turn(tenant, "b2", at=second.at)]))
            await blocked(1)
            wanting = asyncio.create_task(admin.execute(lock, (tenant.id, NOON.replace(second=0))))
            await blocked(2)
        await wanting
        assert not group.done()
    await group
    await third.close()
    assert await metering.totals(database, tenant.id) == {Metric.API_CALLS: 4.0}


async def test_closing_leaves_nobody_waiting(
    database: Database, tenant: Tenant, admin: psycopg.AsyncConnection
) -> None:
    """Who waits for a store that hangs is told so, not left."""
    ledger = Ledger(database)
    await ledger.record([turn(tenant, "before")])
    async with admin.transaction():
        await admin.execute("LOCK TABLE usage_minutes IN ACCESS EXCLUSIVE MODE")
        waiting = [asyncio.create_task(ledger.record([turn(tenant, f"{i}")])) for i in range(3)]
        await asyncio.sleep(0.1)
        waiting += [asyncio.create_task(ledger.record([turn(tenant, "later")]))]
        await asyncio.sleep(0)
        assert ledger._writer is not None
        ledger._writer.cancel()
        assert [type(end) for end in await asyncio.gather(*waiting, return_exceptions=True)] == [Unavailable] * 4
    await ledger.record([turn(tenant, f"{i}") for i in range(3)])
    await ledger.close()
    assert await metering.totals(database, tenant.id) == {Metric.API_CALLS: 4.0}
