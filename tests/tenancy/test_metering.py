"""The ledger counts once, wholly, and only what is on disk."""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import psycopg
import pytest

from agentvoicebox.config.errors import BadInput
from agentvoicebox.tenancy import metering, roles
from agentvoicebox.tenancy.database import Address, Database
from agentvoicebox.tenancy.metering import Ledger, Usage
from agentvoicebox.tenancy.models import Metric, Tenant

NOON = datetime(2026, 11, 21, 12, 0, 30, tzinfo=UTC)
PROJECT = uuid.uuid4()


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
    ],
)
def test_usage_that_makes_no_sense(field: str, value: Any) -> None:
    fine = {"event_id": "e", "tenant_id": uuid.uuid4(), "metric": Metric.API_CALLS, "quantity": 1, "at": NOON}
    with pytest.raises(BadInput) as caught:
        Usage(**{**fine, field: value})
    assert caught.value.param == field


WRITER = """
import asyncio, json, sys, uuid
from datetime import UTC, datetime
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.metering import Ledger, Usage
from agentvoicebox.tenancy.models import Metric

async def main(url, tenant, numbers):
    ledger = Ledger(Database(lambda role: url))
    async def turns(mine):
        for number in mine:
            at = datetime(2026, 11, 21, 12, number % 60, tzinfo=UTC)
            await ledger.record([Usage(f"{number}.{kind}", tenant, kind, 0.25 * number, at) for kind in Metric])
            print(number, flush=True)
    await asyncio.gather(*(turns(numbers[lane::20]) for lane in range(20)))

asyncio.run(main(sys.argv[1], uuid.UUID(sys.argv[2]), json.loads(sys.stdin.readline())))
"""


async def test_kill_9_of_the_writer_loses_and_doubles_nothing(
    database: Database, address: Address, tenant: Tenant, admin: psycopg.AsyncConnection
) -> None:
    """Writers are killed in the middle; the next one writes again all that was not acknowledged."""
    left = set(range(1500))
    for round_ in range(5):
        writer = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", WRITER, address(roles.LEDGER), str(tenant.id)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdin.write(json.dumps(sorted(left)).encode() + b"\n")
        acknowledged: set[int] = set()
        async for line in writer.stdout:
            if line.endswith(b"\n"):
                acknowledged.add(int(line))
            if len(acknowledged) >= 100 and round_ < 4 and writer.returncode is None:
                writer.kill()
        await writer.wait()
        left -= acknowledged
        cursor = await admin.execute("SELECT event_id FROM usage_events WHERE tenant_id = %s", (tenant.id,))
        written = {event_id for (event_id,) in await cursor.fetchall()}
        assert {f"{number}.{kind}" for number in acknowledged for kind in Metric} <= written
        assert {number.split(".")[0] for number in written} == {
            n.split(".")[0] for n in written if n.endswith("api_calls")
        }
    assert left == set()
    truth = 0.25 * sum(range(1500))
    assert await metering.totals(database, tenant.id) == dict.fromkeys(Metric, truth)
    assert await count(admin, tenant) == 1500 * len(Metric)
