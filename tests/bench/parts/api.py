"""A list through all of the REST service, with row-level security, on a store of many tenants.

The node is a process of its own, with uvloop as in `avb up`. Requests leave this one at fixed times, whether earlier
ones are answered or not, each with the key of another tenant: a delay anywhere counts for all that come after it. A
latency is from the time when a request was due to its last byte. Some of the keys are new to the node, so that a share
of the requests also pays for looking one up. Processor time is the node's, without PostgreSQL's. Other work on the
machine shows in everything here: see `load_average`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
import socket
import statistics
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import psutil
import psycopg
import uvicorn
import uvloop

from agentvoicebox.admin_api import app
from agentvoicebox.admin_api.http import BoundedProtocol
from agentvoicebox.admin_api.node import Node
from agentvoicebox.tenancy import roles
from agentvoicebox.tenancy.changes import Feed
from agentvoicebox.tenancy.database import Address, Database
from agentvoicebox.tenancy.keyring import Keyring
from agentvoicebox.tenancy.limits import Limiter
from agentvoicebox.tenancy.metering import Ledger

sys.path.insert(0, str(Path(__file__).parents[1]))

from parts.reports import percentile, report, store, tell

TENANTS = 100_000
SESSIONS = 20
"""Of each tenant whose key is used, and a tenth of that of the others."""
KEYS = 500
RATE = 100.0
SECONDS = 20.0
WARM_UP = 3.0
CONNECTIONS = 16
PATH = "/api/v2/sessions?page_size=20"
BAR = 50.0

_FILL = f"""
SET session_replication_role = replica;
INSERT INTO tenants (id, name, slug, tier, status, max_users, max_projects, max_api_keys, max_sessions_per_month)
    SELECT md5('t' || n)::uuid, 'Tenant ' || n, 'tenant-' || n, 'enterprise', 'active', 500, 100, 500, 100000
    FROM generate_series(1, %(tenants)s) n;
INSERT INTO projects (tenant_id, id, name, environment, is_default)
    SELECT md5('t' || n)::uuid, md5('p' || n)::uuid, 'Default', 'production', true
    FROM generate_series(1, %(tenants)s) n;
INSERT INTO sessions (tenant_id, id, project_id, status, config, created_at, user_agent)
    SELECT md5('t' || n)::uuid, gen_random_uuid(), md5('p' || n)::uuid, 'completed', '{{"voice": "slt"}}',
           now() - s * interval '1 hour', 'bench'
    FROM generate_series(1, %(tenants)s) n, generate_series(1, CASE WHEN n <= {KEYS} THEN {SESSIONS} * 10
                                                                    ELSE {SESSIONS} / 10 END) s;
"""


async def measure() -> None:
    """The list endpoint under a steady load of many tenants."""
    async with store() as (address, _):
        begin = time.monotonic()
        keys = _fill(address)
        tell(f"api: filled the store in {time.monotonic() - begin:.0f} s")
        given = json.dumps({role: address(role) for role in roles.ALL}).encode() + b"\n"
        node = await asyncio.create_subprocess_exec(
            sys.executable, __file__, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert node.stdin is not None
        assert node.stdout is not None
        try:
            node.stdin.write(given)
            port = int(await node.stdout.readline())
            await _load(port, keys, WARM_UP)
            process = psutil.Process(node.pid)
            before = process.cpu_times()
            times, failed = await _load(port, keys, SECONDS)
            after = process.cpu_times()
        finally:
            node.stdin.close()
            await node.wait()
    cpu = after.user + after.system - before.user - before.system
    report(
        "tenancy.list_endpoint_p95",
        percentile(times, 0.95),
        "ms",
        BAR,
        "the bar; open loop",
        rate=RATE,
        requests=len(times),
        failed=failed,
        p50_ms=round(statistics.median(times), 2),
        p99_ms=round(percentile(times, 0.99), 2),
        cpu_ms_per_request=round(cpu / len(times) * 1000, 3),
        tenants=TENANTS,
        rows_per_answer=20,
        load_average=round(os.getloadavg()[0], 1),
    )


async def serve(addresses: dict[str, str]) -> None:
    """The node, until standard input ends."""
    database = Database(addresses.__getitem__)
    feed = Feed(database)
    await feed.start()
    keyring, limiter, ledger = Keyring(database, feed), Limiter(), Ledger(database)
    await keyring.start()
    listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    config = uvicorn.Config(
        Node(None, app.create(database, keyring, limiter, ledger)),
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve([listening]))
    print(listening.getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.should_exit = True
    await serving
    listening.close()
    await ledger.close()
    await keyring.close()
    await feed.close()
    await database.close()


def _fill(address: Address) -> list[str]:
    """Make tenants, sessions and keys; returns the keys."""
    keys = ["avb_" + secrets.token_urlsafe(32) for _ in range(KEYS)]
    rows = [
        (hashlib.md5(f"t{n}".encode(), usedforsecurity=False).hexdigest(), uuid.uuid4(), key[:12], key)
        for n, key in enumerate(keys, 1)
    ]
    with psycopg.connect(address(roles.ADMIN), autocommit=True) as connection:
        for statement in _FILL.split(";"):
            if statement.strip():
                connection.execute(statement.replace("%(tenants)s", str(TENANTS)).replace("{{", "{").replace("}}", "}"))
        with connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO api_keys (tenant_id, id, name, key_prefix, key_hash, scopes, rate_limit_tier) "
                "VALUES (%s::uuid, %s, 'bench', %s, encode(sha256(%s::bytea), 'hex'), '{sessions}', 'unlimited')",
                [(tenant, id_, prefix, key.encode()) for tenant, id_, prefix, key in rows],
            )
        connection.execute("VACUUM ANALYZE")
        connection.execute("CHECKPOINT")  # or its writes fall into the measurement
    return keys


async def _load(port: int, keys: list[str], seconds: float) -> tuple[list[float], int]:
    """Send requests at fixed times; their latencies in milliseconds, and how many answers were wrong."""
    loop = asyncio.get_running_loop()
    idle: asyncio.Queue[Any] = asyncio.Queue()
    for _ in range(CONNECTIONS):
        idle.put_nowait(await asyncio.open_connection("127.0.0.1", port))
    times: list[float] = []
    failed = 0
    begin = loop.time() + 0.1

    async def ask(number: int) -> None:
        nonlocal failed
        due = begin + number / RATE
        await asyncio.sleep(max(0.0, due - loop.time()))
        connection = await idle.get()
        reader, writer = connection
        key = keys[number * 7919 % len(keys)]
        writer.write(f"GET {PATH} HTTP/1.1\r\nHost: node\r\nAuthorization: Bearer {key}\r\n\r\n".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        body = await reader.readexactly(length)
        times.append((loop.time() - due) * 1000)
        failed += not head.startswith(b"http/1.1 200") or len(json.loads(body)["items"]) != 20
        idle.put_nowait(connection)

    await asyncio.gather(*(ask(number) for number in range(int(seconds * RATE))))
    while not idle.empty():
        idle.get_nowait()[1].close()
    return times, failed


if __name__ == "__main__":
    uvloop.run(serve(json.loads(sys.stdin.readline())))
