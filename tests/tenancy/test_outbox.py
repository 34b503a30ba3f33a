"""What the billing system is told is what the ledger holds: all of it, and nothing twice."""

from __future__ import annotations

import asyncio
import random
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import psycopg
import pytest
from sqlalchemy import text

from agentvoicebox.config.errors import BadInput, Unavailable
from agentvoicebox.tenancy import metering, outbox, roles
from agentvoicebox.tenancy.database import Address, Database
from agentvoicebox.tenancy.metering import Ledger, Usage
from agentvoicebox.tenancy.models import GAUGES, Metric, Tenant
from agentvoicebox.tenancy.outbox import Window

NOON = datetime.now(UTC).replace(hour=12, minute=0, second=0, microsecond=0) - timedelta(days=2)

DIFFERENCES = """
WITH held AS (
    SELECT tenant_id, metric, date_bin('900 s', at, '2000-01-01 00:00+00') AS start,
           CASE WHEN metric = ANY (%s) THEN max(quantity) ELSE sum(quantity) END AS quantity, count(*) AS events
    FROM usage_events GROUP BY 1, 2, 3
), told AS (
    SELECT tenant_id, metric, window_start AS start,
           CASE WHEN metric = ANY (%s) THEN max(quantity) ELSE sum(quantity) END AS quantity, sum(events) AS events
    FROM usage_outbox GROUP BY 1, 2, 3
)
SELECT * FROM held FULL JOIN told USING (tenant_id, metric, start)
WHERE (held.quantity, held.events) IS DISTINCT FROM (told.quantity, told.events)
"""


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stalls for seconds is not a store that is away."""
    monkeypatch.setattr(metering, "PATIENCE", 30)


@pytest.fixture
async def ledger(database: Database) -> AsyncIterator[Ledger]:
    ledger = Ledger(database)
    yield ledger
    await ledger.close()


@pytest.fixture
async def empty(database: Database) -> None:
    """Nothing waits of what other tests have left, or have in hand."""
    await outbox.seal(database)
    async with database.system() as session:
        await session.execute(text("UPDATE usage_outbox SET sent_at = now() WHERE sent_at IS NULL"))


def used(tenant: Tenant, name: str, quantity: float = 1, minutes: float = 0, metric: Metric = Metric.SESSIONS) -> Usage:
    return Usage(name, tenant.id, metric, quantity, NOON + timedelta(minutes=minutes))


def some(chance: random.Random, tenants: list[Tenant]) -> Usage:
    metric = chance.choice(list(Metric))
    quantity = chance.randrange(10**9) / 10**6
    return used(chance.choice(tenants), uuid.uuid4().hex, quantity, chance.uniform(0, 60), metric)


async def differences(admin: psycopg.AsyncConnection) -> list[object]:
    """The windows of which ledger and outbox do not tell the same."""
    levels = [str(metric) for metric in GAUGES]
    return list(await (await admin.execute(DIFFERENCES, (levels, levels))).fetchall())


def due(window: Window) -> tuple[uuid.UUID, Metric, datetime, Decimal, int]:
    return window.tenant_id, window.metric, window.start, window.quantity, window.events


async def test_windows_are_sealed_by_tenant_metric_and_quarter_of_an_hour(
    database: Database, ledger: Ledger, empty: None, tenant: Tenant, other: Tenant
) -> None:
    await ledger.record(
        [
            used(tenant, "a", 1.5),
            used(tenant, "b", 2, minutes=14.9),
            used(tenant, "c", 4, minutes=15),
            used(tenant, "d", 8, metric=Metric.API_CALLS),
            used(tenant, "e", 3, metric=Metric.STORAGE_BYTES),
            used(tenant, "f", 5, metric=Metric.STORAGE_BYTES),
            used(other, "a", 16),
        ]
    )
    assert await outbox.seal(database) == 5
    assert await outbox.seal(database) == 0
    windows = await outbox.claim(database)
    assert {due(window) for window in windows} == {
        (tenant.id, Metric.SESSIONS, NOON, Decimal("3.5"), 2),
        (tenant.id, Metric.SESSIONS, NOON + timedelta(minutes=15), Decimal(4), 1),
        (tenant.id, Metric.API_CALLS, NOON, Decimal(8), 1),
        (tenant.id, Metric.STORAGE_BYTES, NOON, Decimal(5), 2),
        (other.id, Metric.SESSIONS, NOON, Decimal(16), 1),
    }
    await ledger.record([used(tenant, "late", 0.25)])
    assert await outbox.seal(database) == 1
    (late,) = await outbox.claim(database)
    assert due(late) == (tenant.id, Metric.SESSIONS, NOON, Decimal("0.25"), 1)
    names = [window.transaction_id for window in (*windows, late)]
    assert len(set(names)) == len(names)
    assert all(
        name.startswith(f"{window.tenant_id}:{window.metric}:") for name, window in zip(names, windows, strict=False)
    )


async def test_lines_of_before_there_were_numbers_are_told_once(
    database: Database, ledger: Ledger, empty: None, tenant: Tenant, admin: psycopg.AsyncConnection
) -> None:
    """A store that comes from the release before: its lines have no number, and nothing was ever sealed."""
    await admin.execute("TRUNCATE usage_events, usage_minutes, usage_outbox RESTART IDENTITY")
    await ledger.record([used(tenant, "old 1"), used(tenant, "old 2")])
    await admin.execute("UPDATE usage_events SET seq = NULL")
    await admin.execute("UPDATE usage_marks SET seq = -1")
    await admin.execute("ALTER SEQUENCE usage_events_seq RESTART")
    assert await outbox.seal(database) == 1
    await ledger.record([used(tenant, "new")])
    assert await outbox.seal(database) == 1
    assert await outbox.seal(database) == 0
    assert [window.events for window in await outbox.claim(database)] == [2, 1]
    assert await differences(admin) == []


async def test_a_line_that_is_not_committed_yet_is_waited_for(
    database: Database,
    ledger: Ledger,
    empty: None,
    tenant: Tenant,
    admin: psycopg.AsyncConnection,
    address: Address,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its number is below those of lines that are there already: a mark that passed it would never come back."""
    insert = (
        "INSERT INTO usage_events (tenant_id, event_id, metric, quantity, at) VALUES (%s, %s, 'sessions', 1, now())"
    )
    async with await psycopg.AsyncConnection.connect(address(roles.LEDGER)) as slow:
        await slow.execute(insert, (tenant.id, "slow"))
        await ledger.record([used(tenant, "fast")])
        patience = outbox._PATIENCE
        monkeypatch.setattr(outbox, "_PATIENCE", text("SET LOCAL lock_timeout = '30s'"))
        sealing = asyncio.create_task(outbox.seal(database))
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        while (await (await admin.execute(waiting)).fetchone()) == (0,):
            assert not sealing.done()
            await asyncio.sleep(0.01)
        await slow.commit()
        assert await sealing == 2
        monkeypatch.setattr(outbox, "_PATIENCE", patience)
        await slow.execute(insert, (tenant.id, "hangs"))
        with pytest.raises(Unavailable):
            await outbox.seal(database)
        await ledger.record([used(tenant, "not held up")])
        await slow.rollback()
    assert await outbox.seal(database) == 1
    assert await differences(admin) == []


async def test_a_long_ledger_is_sealed_in_parts(
    database: Database,
    ledger: Ledger,
    empty: None,
    tenant: Tenant,
    admin: psycopg.AsyncConnection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbox, "_MOST_LINES", 7)
    await ledger.record([used(tenant, f"{i}", i) for i in range(30)])
    assert 5 <= await outbox.seal(database) <= 6
    assert await outbox.seal(database) == 0
    assert await differences(admin) == []


async def test_who_has_a_window_in_hand_has_it_alone_until_the_lease_is_over(
    database: Database, ledger: Ledger, empty: None, tenant: Tenant
) -> None:
    await ledger.record([used(tenant, f"{i}", minutes=15 * i) for i in range(40)])
    assert await outbox.seal(database) == 40
    hands = await asyncio.gather(*(outbox.claim(database, 10, lease=600) for _ in range(6)))
    hands.append(await outbox.claim(database, 40, lease=600))  # what they kept from each other
    ids = [window.id for hand in hands for window in hand]
    assert len(ids) == len(set(ids)) == 40
    assert await outbox.claim(database) == []
    async with database.system() as session:  # ten minutes later
        await session.execute(text("UPDATE usage_outbox SET available_at = available_at - interval '601 s'"))
    again = await outbox.claim(database)
    assert {window.id for window in again} == set(ids)
    assert {window.attempts for window in again} == {2}


async def test_what_was_told_is_done_and_what_failed_comes_again_later_and_later(
    database: Database, ledger: Ledger, empty: None, tenant: Tenant, admin: psycopg.AsyncConnection
) -> None:
    await ledger.record([used(tenant, "a"), used(tenant, "b", minutes=15)])
    await outbox.seal(database)
    waiting = await outbox.backlog(database)
    assert waiting.count == 2
    assert waiting.oldest is not None
    assert timedelta() <= datetime.now(UTC) - waiting.oldest < timedelta(minutes=5)
    told, refused = await outbox.claim(database)
    await outbox.sent(database, [told])
    pauses = []
    for attempt in range(1, 10):
        await outbox.failed(database, [refused], "429 too many\0 requests " + "x" * 500)
        cursor = await admin.execute(
            "SELECT extract(epoch FROM available_at - now()), error FROM usage_outbox WHERE id = %s", (refused.id,)
        )
        row = await cursor.fetchone()
        assert row is not None
        pauses.append(round(row[0], -1))
        assert row[1].startswith("429 too many requests x")
        assert len(row[1]) == 200
        assert await outbox.claim(database) == []
        await admin.execute("UPDATE usage_outbox SET available_at = now() WHERE id = %s", (refused.id,))
        (refused,) = await outbox.claim(database)
        assert refused.attempts == attempt + 1
    assert pauses == [30, 60, 120, 240, 480, 960, 1920, 3600, 3600]
    await outbox.failed(database, [told], "no: it is done")
    assert (await outbox.backlog(database)).count == 1
    await outbox.sent(database, [refused])
    await outbox.sent(database, [])
    assert await outbox.backlog(database) == outbox.Backlog(0, None)


@pytest.mark.parametrize(
    "wrong", [{"limit": 0}, {"limit": 10_001}, {"lease": 0}, {"lease": 90_000}, {"lease": float("nan")}]
)
async def test_claims_that_make_no_sense(database: Database, wrong: dict[str, float]) -> None:
    with pytest.raises(BadInput):
        await outbox.claim(database, **wrong)  # type: ignore[arg-type]


async def test_windows_that_make_no_sense(database: Database) -> None:
    for seconds in (0, -900, 86_401):
        with pytest.raises(BadInput):
            await outbox.seal(database, seconds)


async def sealed(database: Database) -> None:
    """Seal as housekeeping does: again when a writer has held the ledger for longer than a sealer may wait for it."""
    async with asyncio.timeout(60):
        while True:
            try:
                await outbox.seal(database)
                return
            except Unavailable:
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("seed", range(3))
async def test_outbox_and_ledger_agree_whatever_happens_at_once(
    database: Database,
    empty: None,
    new_tenant: Callable[[], Awaitable[Tenant]],
    admin: psycopg.AsyncConnection,
    seed: int,
) -> None:
    """Writers with late and repeated events, several sealers, and tellers of whom some vanish with what they have."""
    chance = random.Random(seed)
    tenants = [await new_tenant() for _ in range(3)]
    ledgers = [Ledger(database) for _ in range(2)]
    known: list[Usage] = []
    writing = True
    told: dict[str, tuple[uuid.UUID, Metric, datetime, Decimal, int]] = {}

    async def write(ledger: Ledger) -> None:
        for _ in range(60):
            group = [some(chance, tenants) for _ in range(chance.randrange(1, 30))]
            group += chance.sample(known, min(len(known), 5))
            known.extend(group)
            await ledger.record(group)

    async def seal() -> None:
        while writing:
            await sealed(database)
            await asyncio.sleep(chance.uniform(0, 0.02))

    async def tell(limit: int) -> int:
        windows = await outbox.claim(database, limit, lease=0.05)
        for window in windows:  # the same name is the same thing, however often it is told
            assert told.setdefault(window.transaction_id, due(window)) == due(window)
        end = chance.random()
        if end < 0.7:
            await outbox.sent(database, windows)
        return len(windows)

    async def teller() -> None:
        while writing:
            await tell(chance.randrange(1, 50))
            await asyncio.sleep(chance.uniform(0, 0.02))

    async with asyncio.TaskGroup() as group:
        for work in (seal(), seal(), teller(), teller()):
            group.create_task(work)
        await asyncio.gather(*(write(ledger) for ledger in (*ledgers, *ledgers)))
        writing = False
    await sealed(database)
    while (await outbox.backlog(database)).count:
        await tell(1000)
        await asyncio.sleep(0.01)
    for ledger in ledgers:
        await ledger.close()
    assert await differences(admin) == []
    unique = {(usage.tenant_id, usage.event_id): usage for usage in known}.values()
    for metric in Metric:
        held = [round(Decimal(usage.quantity), 6) for usage in unique if usage.metric is metric]
        sums = [quantity for tenant_id, kind, _, quantity, _ in told.values() if kind is metric]
        assert sum(held) == sum(sums) or metric in GAUGES
        assert max(held) == max(sums) or metric not in GAUGES


SEALER = """
import asyncio, sys
from agentvoicebox.config.errors import Unavailable
from agentvoicebox.tenancy import outbox
from agentvoicebox.tenancy.database import Database

async def main(url):
    database = Database(lambda role: url)
    print("ready", flush=True)
    while True:
        try:
            await outbox.seal(database)
        except Unavailable:  # a writer has held the ledger for longer than a sealer may wait
            pass

asyncio.run(main(sys.argv[1]))
"""


async def test_kill_9_of_sealers_loses_and_doubles_nothing(
    database: Database,
    ledger: Ledger,
    tenant: Tenant,
    other: Tenant,
    address: Address,
    admin: psycopg.AsyncConnection,
) -> None:
    chance = random.Random(9)
    killing = True

    async def write() -> None:
        while killing:
            await ledger.record([some(chance, [tenant, other]) for _ in range(50)])

    async def sealer() -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", SEALER, address(roles.SYSTEM)), stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
        await asyncio.sleep(chance.uniform(0, 0.2))
        process.kill()
        await process.communicate()

    writers = asyncio.gather(write(), write())
    for _ in range(4):
        await asyncio.gather(sealer(), sealer())
    killing = False
    await writers
    await sealed(database)
    assert await differences(admin) == []


def test_every_metric_has_a_name_in_the_bill() -> None:
    assert {metric: (billable.code, billable.per) for metric, billable in outbox.BILLED.items()} == {
        Metric.API_CALLS: ("api_calls", 1),
        Metric.SESSIONS: ("sessions", 1),
        Metric.SESSION_SECONDS: ("session_minutes", 60),
        Metric.STT_AUDIO_SECONDS: ("audio_minutes_input", 60),
        Metric.TTS_AUDIO_SECONDS: ("audio_minutes_output", 60),
        Metric.LLM_INPUT_TOKENS: ("llm_tokens_input", 1),
        Metric.LLM_OUTPUT_TOKENS: ("llm_tokens_output", 1),
        Metric.STORAGE_BYTES: ("storage_gb", 10**9),
        Metric.CONCURRENT_SESSIONS_PEAK: ("concurrent_sessions_peak", 1),
    }
    assert set(outbox.BILLED) == set(Metric)
