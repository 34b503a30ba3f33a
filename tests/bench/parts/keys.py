"""Keys: what a check costs, and how soon a second process refuses a key that was revoked.

A check is `Keyring.verify` of one of a thousand cached keys, in processor time of the process; so is noting a use. A
revocation is timed from its acknowledgement, when `keys.revoke` returns, to the first refusal in another process, which
has a database pool, a feed and a ring of its own and checks the key about once a millisecond; processes share the
monotonic clock. The detail has the times from before the call too, with the disk's part in them. To cut the push
channel, the trigger that notifies is disabled.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psycopg
from parts.reports import percentile, report, store, tell

from agentvoicebox.config.errors import Refused
from agentvoicebox.tenancy import keys, roles, tenants
from agentvoicebox.tenancy.changes import Feed
from agentvoicebox.tenancy.database import Address, Database
from agentvoicebox.tenancy.keyring import Grant, Keyring
from agentvoicebox.tenancy.keys import Issued
from agentvoicebox.tenancy.models import Tenant

CACHED = 1_000
CHECKS = 100_000
ROUNDS = 7
PUSHED = 200
CUT = 30


async def measure() -> None:
    """Print a line for each."""
    async with store() as (address, database):
        made = await _tenants(database, (CACHED + PUSHED + CUT) // 400 + 1)
        feed = Feed(database)
        await feed.start()
        ring = Keyring(database, feed)
        await _checks(database, made, feed, ring)
        await feed.close()
        for cut, count, bar in ((False, PUSHED, 50.0), (True, CUT, 1000.0)):
            await _revocations(address, database, made, cut=cut, count=count, bar=bar)


async def _tenants(database: Database, count: int) -> list[Tenant]:
    return [await tenants.create(database, f"bench-{number}", "Bench", "enterprise") for number in range(count)]


async def _checks(database: Database, made: list[Tenant], feed: Feed, ring: Keyring) -> None:
    tell(f"making {CACHED} keys")
    issued = [await keys.issue(database, made[i % len(made)].id, f"key {i}") for i in range(CACHED)]
    secrets = [one.key for one in issued]
    grants = [await ring.verify(secret) for secret in secrets]

    async def check() -> None:
        for number in range(CHECKS):
            await ring.verify(secrets[number % CACHED])

    async def use() -> None:
        for number in range(CHECKS):
            ring.used(grants[number % CACHED], "192.0.2.1")

    async def nothing() -> None:
        for number in range(CHECKS):
            secrets[number % CACHED]

    spent = {work: await _cpu(feed, work) for work in (check, use, nothing)}
    loop = spent[nothing]
    report(
        "tenancy.key_check",
        spent[check] - loop,
        "us",
        2.0,
        "bar",
        keys=CACHED,
        checks=CHECKS,
        empty_loop=round(loop, 3),
    )
    report("tenancy.key_use", spent[use] - loop, "us", 1.0, "bar", keys=CACHED)
    begin = time.process_time()
    await ring.flush()
    report("tenancy.key_uses_written", (time.process_time() - begin) / CACHED * 1e6, "us", 50.0, "per key", keys=CACHED)


async def _cpu(feed: Feed, work: Callable[[], Awaitable[None]]) -> float:
    """Microseconds of processor time per call, the median of some rounds, each with a fresh look at the log."""
    found = []
    for _ in range(ROUNDS):
        looked = feed.fresh_until
        while feed.fresh_until == looked:
            await asyncio.sleep(0.01)
        begin = time.process_time()
        await work()
        found.append((time.process_time() - begin) / CHECKS * 1e6)
        assert time.monotonic() < feed.fresh_until, "The cache was stale: this machine is too slow for so many checks."
    return statistics.median(found)


async def _revocations(
    address: Address, database: Database, made: list[Tenant], *, cut: bool, count: int, bar: float
) -> None:
    tell(f"revoking {count} keys {'without' if cut else 'with'} push")
    with psycopg.connect(address(roles.ADMIN), autocommit=True) as admin:
        if cut:
            admin.execute("ALTER TABLE key_revocations DISABLE TRIGGER announced")
    took, whole = [], []
    async with _another_node(address) as ask:
        for number in range(count):
            tenant = made[number % len(made)]
            issued = await keys.issue(database, tenant.id, f"revoked {cut} {number}")
            refused = await ask(issued)
            await asyncio.sleep(random.uniform(0.01, 0.35))  # at any moment between two looks
            begin = time.monotonic()
            await keys.revoke(database, tenant.id, issued.id)
            acknowledged = time.monotonic()
            seen = await refused
            took.append(max(seen - acknowledged, 0.0) * 1e3)  # the other process may hear of the commit before we do
            whole.append((seen - begin) * 1e3)
    report(
        "tenancy.revocation_push_cut" if cut else "tenancy.revocation",
        percentile(took, 0.99),
        "ms",
        bar,
        "bar",
        p50=round(statistics.median(took), 2),
        max=round(max(took), 2),
        from_call_p50=round(statistics.median(whole), 2),
        from_call_p99=round(percentile(whole, 0.99), 2),
        count=count,
    )


@asynccontextmanager
async def _another_node(address: Address) -> AsyncIterator[Callable[[Issued], Awaitable[Awaitable[float]]]]:
    """A process that checks the key it is given until it is refused; the time of that comes later."""
    node = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "parts.keys",
        address(roles.SYSTEM),
        stdin=PIPE,
        stdout=PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert node.stdin is not None
    assert node.stdout is not None
    given, told = node.stdin, node.stdout

    async def refused() -> float:
        return float(await told.readline())

    async def ask(issued: Issued) -> Awaitable[float]:
        given.write(f"{issued.key}\n".encode())
        assert await told.readline() == b"good\n"
        return refused()

    try:
        yield ask
    finally:
        given.close()
        await node.wait()


async def _node(dsn: str) -> None:
    """The other process."""
    database = Database(lambda role: psycopg.conninfo.make_conninfo(dsn, user=role))
    feed = Feed(database)
    await feed.start()
    ring = Keyring(database, feed)
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while line := await lines.readline():
        key = line.decode().strip()
        grant: Grant | None = await ring.verify(key)
        print("good", flush=True)
        while grant is not None:
            await asyncio.sleep(0.001)
            try:
                grant = await ring.verify(key)
            except Refused:
                print(time.monotonic(), flush=True)
                grant = None
    await feed.close()
    await database.close()


if __name__ == "__main__":
    asyncio.run(_node(sys.argv[1]))
