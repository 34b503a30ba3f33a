"""What row security costs: the twenty latest sessions of a tenant, among 3 million of 100 000 tenants.

Four ways of asking run in turns on connections of their own, and the processor time of each one's server process is
read from the scheduler's clock (/proc/PID/schedstat), per transaction; the ratios are medians over the rounds.

    isolated    the application's role, as `Database.tenant` does it: the tenant is bound, then the query
    forgotten   the same, and the query has no filter at all: the policy alone finds the tenant's rows
    filtered    a role that no policy binds; a statement that does nothing instead of the binding, then the filter
    bare        the same without that statement: one round trip less

A smaller try: `PYTHONPATH=tests/bench .venv/bin/python -m parts.isolation 2000 60000` (tenants, sessions).
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
from parts.reports import percentile, report, store, tell

from agentvoicebox.tenancy import roles
from agentvoicebox.tenancy.database import Address

ROUNDS = 60
TRANSACTIONS = 200
"""Of each way in each round: short rounds, so that what else the machine does falls on all ways alike."""

_ROWS = "SELECT id, project_id, api_key_id, status, started_at, ended_at, duration_seconds, created_at FROM sessions"
_LATEST = "ORDER BY created_at DESC LIMIT 20"
_FILTERED = f"{_ROWS} WHERE tenant_id = %s {_LATEST}"
_FORGOTTEN = f"{_ROWS} {_LATEST}"

# Loaded without triggers and indexes, in the order in which sessions begin, so that a tenant's lie all over the table.
_TENANTS = """
INSERT INTO tenants (id, name, slug, status, max_users, max_projects, max_api_keys, max_sessions_per_month)
SELECT md5(n::text)::uuid, 'Tenant ' || n, 'tenant-' || n, 'active', 3, 1, 5, 100 FROM generate_series(1, %s) n
"""
_SESSIONS = """
INSERT INTO sessions (tenant_id, id, status, started_at, ended_at, duration_seconds, created_at)
SELECT md5((1 + floor(random() * %s))::int::text)::uuid, gen_random_uuid(), 'completed', at, at + interval '1 minute',
       60, at
FROM generate_series(1, %s) n, LATERAL (SELECT now() - n * interval '1 second' AS at) began
"""
_INDEXES = """
SELECT indexname, indexdef FROM pg_indexes
WHERE schemaname = 'public' AND tablename = 'sessions' AND indexname <> 'sessions_pkey'
"""


class Asker:
    """One way of asking, on a connection of its own."""

    def __init__(self, address: str, before: str | None, query: str) -> None:
        self._connection = psycopg.connect(address)
        self._before, self._query = before, query
        self._clock = Path(f"/proc/{self._connection.info.backend_pid}/schedstat")
        self.waited: list[float] = []

    def ask(self, tenant: UUID) -> list[tuple[Any, ...]]:
        """One transaction."""
        if self._before is not None:
            self._connection.execute(self._before, (str(tenant),))
        values = (tenant,) if "%s" in self._query else None
        found = self._connection.execute(self._query, values).fetchall()
        self._connection.commit()
        return found

    def measure(self, tenants: list[UUID]) -> float:
        """Processor time of the server for one transaction, in microseconds."""
        begin = self._used()
        for tenant in tenants:
            asked = time.perf_counter()
            self.ask(tenant)
            self.waited.append(time.perf_counter() - asked)
        return (self._used() - begin) / len(tenants) / 1000

    def close(self) -> None:
        self._connection.close()

    def _used(self) -> int:
        return int(self._clock.read_text().split()[0])


async def measure(tenants: int = 100_000, sessions: int = 3_000_000) -> None:
    """Fill a store, ask, and report."""
    async with store() as (address, _):
        with psycopg.connect(address(roles.ADMIN), autocommit=True) as admin:
            begin = time.monotonic()
            fill(admin, tenants, sessions)
            tell(f"isolation: {sessions} sessions of {tenants} tenants loaded in {time.monotonic() - begin:.0f} s")
            drawn = "SELECT id FROM tenants ORDER BY random() LIMIT %s"
            ids = [row[0] for row in admin.execute(drawn, (ROUNDS * TRANSACTIONS,)).fetchall()]
        compare(address, ids, tenants=tenants, sessions=sessions)


def fill(admin: psycopg.Connection, tenants: int, sessions: int) -> None:
    """Put the rows into the tables."""
    admin.execute("ALTER SYSTEM SET max_wal_size = '8GB'")
    admin.execute("SELECT pg_reload_conf()")
    admin.execute("SET session_replication_role = replica")
    admin.execute("SET synchronous_commit = off")
    admin.execute("SET maintenance_work_mem = '512MB'")
    indexes = admin.execute(_INDEXES).fetchall()
    admin.execute("ALTER TABLE sessions DROP CONSTRAINT sessions_pkey CASCADE")
    for name, _ in indexes:
        admin.execute(psycopg.sql.SQL("DROP INDEX {}").format(psycopg.sql.Identifier(name)))
    admin.execute(_TENANTS, (tenants,))
    admin.execute(_SESSIONS, (tenants, sessions))
    admin.execute("ALTER TABLE sessions ADD PRIMARY KEY (tenant_id, id)")
    for _, definition in indexes:
        admin.execute(definition)
    for table in ("sessions", "tenants"):
        admin.execute(psycopg.sql.SQL("VACUUM ANALYZE {}").format(psycopg.sql.Identifier(table)))
    admin.execute("CHECKPOINT")


def compare(address: Address, ids: list[UUID], **size: int) -> None:
    """Ask in all ways, in turns, and report."""
    bind, nothing = "SELECT set_config('app.tenant_id', %s, true)", "SELECT %s::text"
    askers = {
        "isolated": Asker(address(roles.APP), bind, _FILTERED),
        "forgotten": Asker(address(roles.APP), bind, _FORGOTTEN),
        "filtered": Asker(address(roles.SYSTEM), nothing, _FILTERED),
        "bare": Asker(address(roles.SYSTEM), None, _FILTERED),
    }
    for tenant in ids[:50]:  # statements get prepared, and all ways find the same
        found = [asker.ask(tenant) for asker in askers.values()]
        if not all(rows == found[0] for rows in found):
            raise RuntimeError("The ways of asking do not agree.")
    for asker in askers.values():
        asker.measure(ids[:TRANSACTIONS])
        asker.waited.clear()
    used: dict[str, list[float]] = {name: [] for name in askers}
    for first in range(0, len(ids), TRANSACTIONS):
        for name in random.sample(list(askers), len(askers)):
            used[name].append(askers[name].measure(ids[first : first + TRANSACTIONS]))

    def more(one: str, other: str) -> float:
        return 100 * (statistics.median(a / b for a, b in zip(used[one], used[other], strict=True)) - 1)

    detail = {f"{name}_us": round(statistics.median(values), 1) for name, values in used.items()}
    detail["over_bare_percent"] = round(more("isolated", "bare"), 1)
    detail |= size | {"rounds": len(used["bare"]), "transactions": TRANSACTIONS}
    against = "the same round trips with an explicit filter and no row security"
    report("tenancy.rls_cpu_overhead", more("isolated", "filtered"), "%", 15, against, **detail)
    report("tenancy.rls_cpu_overhead_filter_forgotten", more("forgotten", "filtered"), "%", 15, against)
    waited = askers["isolated"].waited
    report(
        "tenancy.rls_list_p95",
        percentile(waited, 0.95) * 1000,
        "ms",
        5,
        "-",
        p50=round(percentile(waited, 0.5) * 1000, 3),
        bare_p95=round(percentile(askers["bare"].waited, 0.95) * 1000, 3),
    )
    for asker in askers.values():
        asker.close()


if __name__ == "__main__":
    asyncio.run(measure(*map(int, sys.argv[1:])))
