"""What the audit log costs.

Appending: 4 clients, each on a connection of its own to a server that syncs every commit to disk, write lines in
transactions of their own on the chains of 1 000 tenants, and of 10, for 3 seconds each; the CPU per line of the server
and of the clients stands beside, and the rate of such transactions on a table without a chain as the floor. Verifying:
100 000 lines of 100 tenants, recomputed in the database; the rate is lines per second of the whole call.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from itertools import count

import psutil
from parts.reports import percentile, report, store, tell
from sqlalchemy import text

from agentvoicebox.tenancy import audit, roles
from agentvoicebox.tenancy.audit import Action, Actor, ActorType
from agentvoicebox.tenancy.database import Address, Database

CLIENTS = 4
SECONDS = 3.0
LINES, CHAINS = 100_000, 100

PLAIN = """
CREATE TABLE plain (LIKE audit_log INCLUDING DEFAULTS);
ALTER TABLE plain ALTER seq SET DEFAULT 0, ALTER prev SET DEFAULT '', ALTER hash SET DEFAULT '';
GRANT INSERT ON plain TO avb_app;
"""
FILL = """
INSERT INTO audit_log (tenant_id, actor_type, actor_id, actor_email, ip_address, user_agent, action, resource_type,
    resource_id, description, old_values, new_values, request_id)
SELECT %s, 'user', gen_random_uuid(), 'someone@example.com', '192.0.2.1', 'Mozilla/5.0 (X11; Linux x86_64)', 'update',
    'project', gen_random_uuid()::text, 'PATCH /api/v2/projects/' || n, '{"name": "old", "config": {"a": 1}}',
    '{"name": "new", "config": {"a": 2}}', gen_random_uuid()::text
FROM generate_series(1, %s) n
"""


async def measure() -> None:
    """Print the measurements."""
    async with store() as (address, database):
        floor = await _plain(address)
        for chains in (1_000, 10):
            tell(f"appending to {chains} chains")
            await _append(database, chains, floor)
        tell("filling the log")
        await _fill(database)
        tell("verifying it")
        begin = time.perf_counter()
        verdict = await audit.verify(database)
        took = time.perf_counter() - begin
        assert not verdict.broken
        report(
            "tenancy.audit.verify", verdict.rows / took, "lines/s", 50_000, "recomputing", "higher", lines=verdict.rows,
            chains=verdict.tenants,
        )  # fmt: skip


async def _append(database: Database, chains: int, floor: float) -> None:
    tenants = [uuid.uuid4() for _ in range(chains)]
    numbers, times = count(), []
    actor = Actor(ActorType.USER, uuid.uuid4(), "someone@example.com", "192.0.2.1", "Mozilla/5.0", "request")

    async def client(until: float) -> None:
        while (begin := time.perf_counter()) < until:
            n = next(numbers)
            async with database.tenant(tenants[n % chains]) as session:
                await audit.append(
                    session, Action.UPDATE, "project", n, f"PATCH /api/v2/projects/{n}", old={"a": 1}, new={"a": 2}
                )
            times.append(time.perf_counter() - begin)

    with audit.acting(actor):
        servers, ours, begin = _server_cpu(), time.process_time(), time.perf_counter()
        await asyncio.gather(*(client(begin + SECONDS) for _ in range(CLIENTS)))
    took = time.perf_counter() - begin
    lines = len(times)
    report(
        "tenancy.audit.append",
        lines / took,
        "lines/s",
        500,
        "an insert without a chain",
        "higher",
        chains=chains,
        clients=CLIENTS,
        plain_inserts_per_s=round(floor),
        ratio=round(lines / took / floor, 2),
        p50_ms=round(percentile(times, 0.5) * 1e3, 2),
        p95_ms=round(percentile(times, 0.95) * 1e3, 2),
        server_cpu_us=round((_server_cpu() - servers) / lines * 1e6),
        client_cpu_us=round((time.process_time() - ours) / lines * 1e6),
    )


async def _plain(address: Address) -> float:
    """Rows per second of the same shape, in transactions of the same kind, into a table that chains nothing."""
    database = Database(address)
    admin = await database.connect(roles.ADMIN)
    await admin.execute(PLAIN)
    await admin.close()
    done = 0
    insert = text(FILL.replace("audit_log", "plain").replace("%s", ":tenant", 1).replace("%s", "1"))

    async def client(until: float) -> None:
        nonlocal done
        while time.perf_counter() < until:
            async with database.tenant(tenant := uuid.uuid4()) as session:
                await session.execute(insert, {"tenant": tenant})
            done += 1

    begin = time.perf_counter()
    await asyncio.gather(*(client(begin + SECONDS) for _ in range(CLIENTS)))
    took = time.perf_counter() - begin
    await database.close()
    return done / took


async def _fill(database: Database) -> None:
    admin = await database.connect(roles.ADMIN)
    for _ in range(CHAINS):
        tenant_id, rest = uuid.uuid4(), LINES // CHAINS
        while rest:
            await admin.execute(FILL, (tenant_id, part := min(rest, 250)))
            rest -= part
    await admin.execute("ANALYZE audit_log")
    await admin.close()


def _server_cpu() -> float:
    """CPU seconds of all PostgreSQL processes below this one."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            spent = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += spent.user + spent.system
    return total


if __name__ == "__main__":
    asyncio.run(measure())
