"""The ledger: how much one connection takes, and what a metered event costs the process that serves the request.

Capacity is wall-clock time of calls of `Ledger.record` with 500 events each, eight at once, over 100 tenants and five
metrics; making the events and everything of the server are in it. The cost on the request path is processor time of
this process for callers that each make one event, `await` its being committed, and do it again: 256 in flight, as on a
busy node, and fewer beside it, where fewer share a commit. What the server's process for the connection spends is
given with both. Medians of five rounds.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
import uuid
from collections.abc import Awaitable
from datetime import UTC, datetime

import psutil
from parts.reports import report, store

from agentvoicebox.tenancy import roles
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.metering import Ledger, Usage
from agentvoicebox.tenancy.models import Metric

TENANTS = [uuid.uuid4() for _ in range(100)]
METRICS = list(Metric)[:5]
ROUNDS = 5
EVENTS = 80_000
CALL = 500
numbers = itertools.count()


async def measure() -> None:
    """Print the measurements."""
    async with store() as (_, database):
        ledger = Ledger(database)
        await ledger.record([event()])
        backend = await backend_of_ledger(database)
        await capacity(ledger, backend)
        await request_path(ledger, backend)
        await ledger.close()


def event() -> Usage:
    """One of many things of many tenants."""
    n = next(numbers)
    return Usage(f"0123456789abcdef:{n}", TENANTS[n % 100], METRICS[n % 5], 1.5, datetime.now(UTC))


async def backend_of_ledger(database: Database) -> psutil.Process:
    """The server's process behind the ledger's connection."""
    admin = await database.connect(roles.ADMIN)
    cursor = await admin.execute("SELECT pid FROM pg_stat_activity WHERE usename = %s", (roles.LEDGER,))
    row = await cursor.fetchone()
    await admin.close()
    assert row is not None
    return psutil.Process(row[0])


async def capacity(ledger: Ledger, backend: psutil.Process) -> None:
    """Events per second through one connection."""

    async def lane() -> None:
        for _ in range(EVENTS // CALL // 8):
            await ledger.record([event() for _ in range(CALL)])

    found = []
    for _ in range(ROUNDS):
        wall, own, servers = await spent(asyncio.gather(*(lane() for _ in range(8))), backend)
        found.append((EVENTS / wall, own / EVENTS * 1e6, servers / EVENTS * 1e6))
    rate, own, servers = (statistics.median(values) for values in zip(*found, strict=True))
    report(
        "tenancy.ledger.capacity",
        rate,
        "events/s",
        50_000,
        "wall clock",
        "higher",
        own_cpu_us=round(own, 2),
        server_cpu_us=round(servers, 2),
        rounds=[round(one[0]) for one in found],
    )


async def request_path(ledger: Ledger, backend: psutil.Process) -> None:
    """Processor time of a metered, acknowledged event."""
    costs: dict[int, tuple[float, float]] = {}
    for callers, events in ((256, 30_000), (64, 15_000), (16, 6_000), (1, 500)):

        async def lane(turns: int) -> None:
            for _ in range(turns):
                await ledger.record([event()])

        found = []
        for _ in range(ROUNDS):
            lanes = asyncio.gather(*(lane(events // callers) for _ in range(callers)))
            _, own, servers = await spent(lanes, backend)
            done = events // callers * callers
            found.append((own / done * 1e6, servers / done * 1e6))
        own, servers = (statistics.median(values) for values in zip(*found, strict=True))
        costs[callers] = own, servers
    fewer = {f"own_cpu_us_{callers}_in_flight": round(own, 1) for callers, (own, _) in costs.items() if callers < 256}
    report(
        "tenancy.ledger.event_cpu",
        costs[256][0],
        "us",
        20,
        "CPU of this process, 256 in flight",
        server_cpu_us=round(costs[256][1], 2),
        **fewer,
    )


async def spent(work: Awaitable[object], backend: psutil.Process) -> tuple[float, float, float]:
    """Seconds of the clock, of this process and of the server's that `work` takes."""
    before = backend.cpu_times()
    wall, own = time.perf_counter(), time.process_time()
    await work
    wall, own = time.perf_counter() - wall, time.process_time() - own
    after = backend.cpu_times()
    return wall, own, after.user + after.system - before.user - before.system
