"""The store goes away, fills up, comes back: one clear error each time, nothing half done, and then it works again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import subprocess
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import psycopg
import pytest

from agentvoicebox.config.errors import Unavailable
from agentvoicebox.tenancy import keys, metering, roles, sessions, tenants, voices
from agentvoicebox.tenancy.changes import Feed
from agentvoicebox.tenancy.database import Database, prepare
from agentvoicebox.tenancy.embedded import Postgres, serving
from agentvoicebox.tenancy.keyring import Keyring
from agentvoicebox.tenancy.metering import Ledger, Usage
from agentvoicebox.tenancy.models import EventType, Metric
from agentvoicebox.tenancy.sessions import Event

NOW = datetime.now(UTC)
PATIENCE = metering.PATIENCE


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets for how long the ledger tries: for long, unless a store is away that does not come back."""

    def choose(seconds: float) -> None:
        monkeypatch.setattr(metering, "PATIENCE", seconds)

    choose(30)
    return choose


@pytest.fixture
async def own(data: Path) -> AsyncIterator[Postgres]:
    """A server of this test's own, which it may mistreat."""
    with serving(data) as postgres:
        await prepare(postgres.url)
        yield postgres


@pytest.fixture
async def database(own: Postgres) -> AsyncIterator[Database]:
    database = Database(own.url)
    yield database
    await database.close()


def turn(tenant_id: uuid.UUID, event_id: str) -> Usage:
    return Usage(event_id, tenant_id, Metric.API_CALLS, 1, NOW)


async def test_a_stopped_store_is_unavailable_and_then_works_again(
    own: Postgres, database: Database, patience: Callable[[float], None]
) -> None:
    tenant = await tenants.create(database, "acme", "Acme")
    issued = await keys.issue(database, tenant.id, "a key")
    session = await sessions.create(database, tenant.id)
    feed = Feed(database)
    ledger, ring = Ledger(database), Keyring(database, feed)
    await feed.start()
    await ring.start()
    await ring.verify(issued.key)
    await ledger.record([turn(tenant.id, "before")])

    own.stop()
    patience(PATIENCE)
    await asyncio.sleep(1)  # the time for which the ring may still answer
    for use in (
        tenants.get(database, tenant.id),
        tenants.by_slug(database, "acme"),
        voices.get(database, tenant.id),
        sessions.record(database, tenant.id, session.id, [Event(0, EventType.SYSTEM, {})]),
        keys.revoke(database, tenant.id, issued.id),
        ring.verify(issued.key),
        ledger.record([turn(tenant.id, "during")]),
    ):
        with pytest.raises(Unavailable) as caught:
            await use
        assert caught.value.code == "store_unavailable"

    patience(30)
    own.start()
    assert (await ring.verify(issued.key)).tenant_id == tenant.id
    assert (await tenants.get(database, tenant.id)).slug == "acme"
    await ledger.record([turn(tenant.id, "during"), turn(tenant.id, "after")])
    assert await metering.totals(database, tenant.id) == {Metric.API_CALLS: 3.0}
    assert await sessions.history(database, tenant.id, session.id) == []
    seen = asyncio.Event()
    ring.on_revoked(lambda _: seen.set())
    await keys.revoke(database, tenant.id, issued.id)
    async with asyncio.timeout(20):
        await seen.wait()  # the feed came back by itself
    await ledger.close()
    await ring.close()
    await feed.close()


async def test_a_short_outage_is_only_a_pause(own: Postgres, database: Database) -> None:
    tenant = await tenants.create(database, "acme", "Acme")
    ledger = Ledger(database)
    await ledger.record([turn(tenant.id, "before")])
    own.stop()
    waiting = [asyncio.create_task(ledger.record([turn(tenant.id, f"{i}")])) for i in range(10)]
    await asyncio.sleep(0.1)
    own.start()
    await asyncio.gather(*waiting)
    await asyncio.gather(*(tenants.get(database, tenant.id) for _ in range(5)))
    assert await metering.totals(database, tenant.id) == {Metric.API_CALLS: 11.0}
    await ledger.close()


async def test_kill_9_of_the_server_under_load_counts_what_was_acknowledged(own: Postgres, database: Database) -> None:
    tenant = await tenants.create(database, "acme", "Acme")
    ledger = Ledger(database)
    keeper = asyncio.create_task(own.keep(every=0.05))
    acknowledged: set[str] = set()

    async def lane(number: int) -> None:
        for i in range(40):
            event_id = f"{number}.{i}"
            for _ in range(10):
                try:
                    await ledger.record([turn(tenant.id, event_id)])
                except Unavailable:
                    continue
                acknowledged.add(event_id)
                break

    work = asyncio.gather(*(lane(number) for number in range(10)))
    for enough in (60, 200):
        while len(acknowledged) < enough:
            await asyncio.sleep(0)
        os.kill(own.pids()[0], signal.SIGKILL)
    await work
    keeper.cancel()
    assert len(acknowledged) == 400
    assert await metering.totals(database, tenant.id) == {Metric.API_CALLS: 400.0}
    await ledger.close()


async def test_a_store_that_hangs_is_unavailable(
    own: Postgres, database: Database, patience: Callable[[float], None]
) -> None:
    tenant = await tenants.create(database, "acme", "Acme")
    ledger = Ledger(database)
    await ledger.record([turn(tenant.id, "before")])
    patience(0.2)
    pids = own.pids()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(Unavailable):
            await ledger.record([turn(tenant.id, "during")])
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    patience(30)
    await ledger.record([turn(tenant.id, "during")])
    assert await metering.totals(database, tenant.id) == {Metric.API_CALLS: 2.0}
    await ledger.close()


@pytest.fixture(params=["disk", "limit"])
def filling(request: pytest.FixtureRequest, made: Path, tmp_path: Path) -> Iterator[tuple[Path, Path | None]]:
    """A store with little room: on a small disk where we may mount one, else with a limit on the size of files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96m", "none", str(disk)]
    mounted = request.param == "disk" and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    subprocess.run(["cp", "-a", made, disk / "data"], check=True)
    yield disk / "data", disk / "ballast" if mounted else None
    if mounted:
        subprocess.run(["umount", disk], check=True)


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """What is started here may make no file larger than 20 MB, four more than a segment of the log."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 << 20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_full_disk_is_one_clear_error_and_then_works_again(
    filling: tuple[Path, Path | None], patience: Callable[[float], None]
) -> None:
    data, ballast = filling
    with contextlib.ExitStack() as stack:
        with limited() if ballast is None else contextlib.nullcontext():
            postgres = stack.enter_context(serving(data))
        await prepare(postgres.url)
        database = Database(postgres.url)
        tenant = await tenants.create(database, "acme", "Acme")
        session = await sessions.create(database, tenant.id)
        ledger = Ledger(database)
        written = 0

        async def talk() -> None:
            nonlocal written
            for number in range(2000):
                event = Event(number, EventType.RESPONSE, {"text": os.urandom(20_000).hex()})
                await sessions.record(database, tenant.id, session.id, [event])
                written = number + 1

        async def meter() -> None:
            for number in range(200):
                await ledger.record([turn(tenant.id, f"{number}.{i}".ljust(190, "x")) for i in range(3000)])

        if ballast is not None:
            ballast.write_bytes(b"\0" * (shutil.disk_usage(data).free - 3_000_000))
        patience(PATIENCE)
        for fill in (talk, meter):
            with pytest.raises(Unavailable) as caught:
                await fill()
            assert caught.value.code == "store_unavailable"

        if ballast is not None:
            ballast.unlink()
        else:
            postgres.stop()
        patience(30)
        history = await again(postgres, lambda: sessions.history(database, tenant.id, session.id))
        assert len(history) == written
        with psycopg.connect(postgres.url(roles.ADMIN)) as connection:
            (events,) = connection.execute("SELECT count(*) FROM usage_events").fetchone() or ()
            (counted,) = connection.execute("SELECT coalesce(sum(events), 0) FROM usage_minutes").fetchone() or ()
        assert events == counted
        assert events % 3000 == 0
        await ledger.record([turn(tenant.id, "room again")])
        await ledger.close()
        await database.close()


async def again(postgres: Postgres, ask: Callable[[], Awaitable[Sequence[object]]]) -> Sequence[object]:
    """Ask until there is an answer: a server that crashed on its full disk recovers first, or ends and is started."""
    for _ in range(300):
        if not postgres.alive():
            postgres.start()
        try:
            return await ask()
        except Unavailable:
            await asyncio.sleep(0.1)
    return await ask()
