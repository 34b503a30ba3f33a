"""Kill whom you like, whenever you like: the ledger holds what was acknowledged, once, and nothing else.

Writers count things, each with a number that says what it is, and write down a number when it is acknowledged. The next
writer begins with what its predecessor had not written down, under the same ids, as a client would.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psycopg
import pytest

from agentvoicebox.tenancy import metering, outbox, roles, tenants
from agentvoicebox.tenancy.database import Database, prepare
from agentvoicebox.tenancy.embedded import Postgres, serving
from agentvoicebox.tenancy.models import GAUGES, Metric

KILLS_OF_WRITERS = 20
KILLS_OF_POSTGRES = 5

# Forks a writer for each line it reads, so that a writer is at work within milliseconds of its start.
WRITERS = """
import asyncio, itertools, os, sys, uuid
from datetime import UTC, datetime, timedelta
from agentvoicebox.config.errors import Unavailable
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.metering import Ledger, Usage
from agentvoicebox.tenancy.models import Metric

url, noted, *tenants = sys.argv[1:]
tenants = [uuid.UUID(tenant) for tenant in tenants]
day = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=1)

def things(number):
    # One call of the ledger: a thing of every metric.
    tenant, at = tenants[number % len(tenants)], day + timedelta(seconds=7 * number % 3600)
    return [Usage(f"{number}.{metric}", tenant, metric, 0.25 * number, at) for metric in Metric]

async def write(numbers):
    ledger = Ledger(Database(lambda role: url))
    note = os.open(noted, os.O_WRONLY | os.O_APPEND)
    async def lane():
        for number in numbers:
            while True:
                try:
                    await ledger.record(things(number))
                except Unavailable:
                    continue
                os.write(note, b"%d\\n" % number)
                break
    await asyncio.gather(*(lane() for _ in range(16)))

for line in sys.stdin:
    upto = int(line)
    done = {int(number) for number in open(noted)}
    left = (number for number in (range(upto) if upto else itertools.count()) if number not in done)
    child = os.fork()
    if not child:
        asyncio.run(write(left))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

DIFFERENCES = """
WITH held AS (
    SELECT tenant_id, metric, date_trunc('minute', at, 'UTC') AS minute,
           CASE WHEN metric = ANY (%(levels)s) THEN max(quantity) ELSE sum(quantity) END AS quantity, count(*) AS events
    FROM usage_events GROUP BY 1, 2, 3
)
SELECT * FROM held FULL JOIN usage_minutes AS minutes USING (tenant_id, metric, minute)
WHERE (held.quantity, held.events) IS DISTINCT FROM (minutes.quantity, minutes.events)
"""


class Writers:
    """Starts writers, one after the other."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def start(self, upto: int = 0) -> int:
        """The process of a writer that writes all that is not noted, up to a number or for ever."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"%d\n" % upto)
        return await self._said()

    async def ended(self) -> int:
        """How that one ended."""
        return await self._said()

    async def _said(self) -> int:
        assert self._process.stdout is not None
        return int(await self._process.stdout.readline())


@asynccontextmanager
async def writers(*arguments: str) -> AsyncIterator[Writers]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", WRITERS, *arguments), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    yield Writers(process)
    assert process.stdin is not None
    process.stdin.close()
    await process.wait()


def acknowledged(noted: Path) -> list[int]:
    return [int(number) for number in noted.read_text().split()]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


@pytest.fixture
async def own(data: Path) -> AsyncIterator[Postgres]:
    """A server of this test's own, which is kept alive."""
    with serving(data) as postgres:
        await prepare(postgres.url)
        keeper = asyncio.create_task(postgres.keep(every=0.02))
        yield postgres
        keeper.cancel()


@pytest.fixture
async def database(own: Postgres) -> AsyncIterator[Database]:
    database = Database(own.url)
    yield database
    await database.close()


async def test_the_ledger_holds_what_was_acknowledged_whoever_is_killed(
    own: Postgres, database: Database, tmp_path: Path
) -> None:
    owners = [(await tenants.create(database, f"tenant-{n}", "A tenant")).id for n in range(3)]
    noted = tmp_path / "noted"
    noted.touch()
    chance = random.Random()
    kills = ["writer"] * KILLS_OF_WRITERS + ["postgres"] * KILLS_OF_POSTGRES
    chance.shuffle(kills)
    killed = 0
    async with writers(own.url(roles.LEDGER), str(noted), *map(str, owners)) as crew:
        writer = await crew.start()
        for whom in kills:
            before = noted.stat().st_size
            await until(lambda before=before: noted.stat().st_size > before)  # it is at work
            await asyncio.sleep(chance.uniform(0, 0.2))
            if whom == "writer":
                os.kill(writer, signal.SIGKILL)
                assert await crew.ended() == -signal.SIGKILL
                writer = await crew.start()
            else:
                os.kill(own.pids()[0], signal.SIGKILL)
                await asyncio.sleep(0)
            killed += 1
        before = noted.stat().st_size
        await until(lambda: noted.stat().st_size > before)
        os.kill(writer, signal.SIGKILL)
        await crew.ended()
        count = await highest(own) + 1
        await crew.start(upto=count)
        assert await crew.ended() == 0
    assert killed == KILLS_OF_WRITERS + KILLS_OF_POSTGRES
    truth = acknowledged(noted)
    assert sorted(truth) == list(range(count)), "each was acknowledged, once"
    for n, owner in enumerate(owners):
        quantities = [0.25 * number for number in truth if number % len(owners) == n]
        expected = {metric: max(quantities) if metric in GAUGES else sum(quantities) for metric in Metric}
        assert await metering.totals(database, owner) == expected
    await outbox.seal(database)
    async with await psycopg.AsyncConnection.connect(own.url(roles.ADMIN)) as admin:
        cursor = await admin.execute(DIFFERENCES, {"levels": [str(metric) for metric in GAUGES]})
        assert await cursor.fetchall() == [], "minutes are what their events add up to"
        cursor = await admin.execute(
            "SELECT count(*), count(DISTINCT seq), (SELECT sum(events) FROM usage_outbox) FROM usage_events"
        )
        assert await cursor.fetchone() == (count * len(Metric),) * 3


async def highest(own: Postgres) -> int:
    """The highest number that is in the ledger, acknowledged or not."""
    at_work = "SELECT count(*) FROM pg_stat_activity WHERE usename = %s"
    query = "SELECT max(split_part(event_id, '.', 1)::int) FROM usage_events"
    async with asyncio.timeout(60):
        while True:
            try:
                async with await psycopg.AsyncConnection.connect(own.url(roles.ADMIN), autocommit=True) as admin:
                    # What the server was told by a writer that is dead it still does.
                    while await (await admin.execute(at_work, (roles.LEDGER,))).fetchone() != (0,):
                        await asyncio.sleep(0.01)
                    row = await (await admin.execute(query)).fetchone()
            except psycopg.OperationalError:  # it is on its way back
                await asyncio.sleep(0.05)
                continue
            assert row is not None
            return int(row[0])
