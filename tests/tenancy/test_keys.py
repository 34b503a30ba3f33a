"""Keys from issue to revocation, also when nobody tells a node."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import os
import re
import signal
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import select, text

from agentvoicebox.config.errors import AvbError, BadInput, Forbidden, NotFound, Refused, Unavailable
from agentvoicebox.tenancy import keys, tenants
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.keys import Grant, Issued, Keyring, Scope
from agentvoicebox.tenancy.models import ApiKey, Project, Tenant


@pytest.fixture
async def new_ring(database: Database) -> AsyncIterator[Callable[..., Awaitable[Keyring]]]:
    """Makes what each node has: a cache and a feed of its own."""
    rings: list[Keyring] = []

    async def make(clock: Callable[[], float] = time.time) -> Keyring:
        rings.append(Keyring(database, clock))
        await rings[-1].start()
        return rings[-1]

    yield make
    for ring in rings:
        await ring.close()


@pytest.fixture
async def ring(new_ring: Callable[..., Awaitable[Keyring]]) -> Keyring:
    return await new_ring()


@pytest.fixture
async def issued(database: Database, tenant: Tenant) -> Issued:
    return await keys.issue(database, tenant.id, "a key")


async def refusal(ring: Keyring, secret: str) -> str:
    with pytest.raises(AvbError) as caught:
        await ring.verify(secret)
    return caught.value.code


def reported(ring: Keyring, key_id: uuid.UUID) -> asyncio.Event:
    seen = asyncio.Event()
    ring.on_revoked(lambda revoked: seen.set() if revoked == key_id else None)
    return seen


async def heard(*events: asyncio.Event) -> None:
    async with asyncio.timeout(20):
        for event in events:
            await event.wait()


async def test_the_form_of_a_key(database: Database, tenant: Tenant, issued: Issued) -> None:
    assert re.fullmatch(r"avb_[A-Za-z0-9_-]{43}", issued.key)
    assert len(base64.urlsafe_b64decode(issued.key[4:] + "=")) == 32
    assert issued.prefix == issued.key[:12]
    async with database.tenant(tenant.id) as session:
        row = await session.get(ApiKey, (tenant.id, issued.id))
        assert row is not None
        assert row.key_hash == hashlib.sha256(issued.key.encode()).hexdigest()
        stored = (await session.execute(text("SELECT to_jsonb(api_keys)::text FROM api_keys"))).scalar_one()
    assert issued.key[12:] not in stored


async def test_a_secret_shows_nowhere(
    database: Database, tenant: Tenant, ring: Keyring, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        issued = await keys.issue(database, tenant.id, "quiet")
        grant = await ring.verify(issued.key)
        wrong = "avb_" + "x" * 43
        error = pytest.raises(Refused, match="not known")
        with error as caught:
            await ring.verify(wrong)
    shown = [repr(issued), repr(grant), repr(ring), str(caught.value), caplog.text]
    assert not any(issued.key in text or wrong in text for text in shown)


async def test_what_a_key_grants(database: Database, tenant: Tenant, ring: Keyring) -> None:
    expires = datetime.now(UTC) + timedelta(hours=1)
    issued = await keys.issue(database, tenant.id, "full", ("usage", "realtime", "usage"), expires)
    async with database.tenant(tenant.id) as session:
        project = (await session.execute(select(Project.id))).scalar_one()
    expected = Grant(
        tenant_id=tenant.id,
        tenant_slug=tenant.slug,
        tenant_name=tenant.name,
        key_id=issued.id,
        project_id=project,
        scopes=frozenset({"usage", "realtime"}),
        expires_at=expires,
    )
    for _ in range(2):  # from the database, from memory
        assert await ring.verify(issued.key) == expected
    expected.require(Scope.USAGE)
    with pytest.raises(Forbidden) as caught:
        expected.require("admin")
    assert caught.value.code == "insufficient_scope"


@pytest.mark.parametrize(
    "secret", ["", "avb_", "avb_" + "x" * 43, "avb_" + "x" * 42, "AVB_" + "x" * 43, "x" * 47, "avb_" + "\ud800" * 43]
)
async def test_keys_that_are_none(ring: Keyring, secret: str) -> None:
    assert await refusal(ring, secret) == "invalid_api_key"


async def test_a_key_made_after_it_was_refused_works(database: Database, tenant: Tenant, ring: Keyring) -> None:
    """Refusals are not remembered."""
    issued = await keys.issue(database, tenant.id, "moved")
    async with database.tenant(tenant.id) as session:
        await session.execute(text("UPDATE api_keys SET key_hash = 'elsewhere'"))
    assert await refusal(ring, issued.key) == "invalid_api_key"
    async with database.tenant(tenant.id) as session:
        digest = hashlib.sha256(issued.key.encode()).hexdigest()
        await session.execute(text("UPDATE api_keys SET key_hash = :digest").bindparams(digest=digest))
    assert (await ring.verify(issued.key)).key_id == issued.id


@pytest.mark.parametrize("scopes", [(), ("root",), ("realtime", ""), "realtime"])
async def test_scopes_that_are_none(database: Database, tenant: Tenant, scopes: tuple[str, ...]) -> None:
    with pytest.raises(BadInput) as caught:
        await keys.issue(database, tenant.id, "bad", scopes)
    assert caught.value.param == "scopes"


async def test_names_and_times_that_make_no_sense(database: Database, tenant: Tenant) -> None:
    for name in ("", "x" * 101, "a\nb", "a\x00"):
        with pytest.raises(BadInput):
            await keys.issue(database, tenant.id, name)
    for moment in (datetime.now(UTC) - timedelta(seconds=1), datetime(2999, 1, 1)):
        with pytest.raises(BadInput):
            await keys.issue(database, tenant.id, "late", expires_at=moment)


async def test_a_key_is_of_an_existing_tenant_and_its_project(
    database: Database, tenant: Tenant, other: Tenant
) -> None:
    with pytest.raises(NotFound):
        await keys.issue(database, uuid.uuid4(), "nobody's")
    async with database.tenant(other.id) as session:
        theirs = (await session.execute(select(Project.id))).scalar_one()
    with pytest.raises(NotFound):
        await keys.issue(database, tenant.id, "stray", project_id=theirs)


async def test_expiry_is_looked_at_every_time(
    database: Database, tenant: Tenant, new_ring: Callable[..., Awaitable[Keyring]]
) -> None:
    now = time.time()
    ring = await new_ring(clock=lambda: now)
    expires = datetime.fromtimestamp(now + 60, UTC)
    issued = await keys.issue(database, tenant.id, "short", expires_at=expires)
    assert (await ring.verify(issued.key)).expires_at == expires
    now += 61
    assert await refusal(ring, issued.key) == "api_key_expired"
    fresh = await new_ring(clock=lambda: now)
    assert await refusal(fresh, issued.key) == "api_key_expired"
    now -= 61  # a clock set back does not bring back what is over, nor lose what is not
    assert (await ring.verify(issued.key)).key_id == issued.id


async def test_a_revoked_key_is_refused_at_once_here_and_there(
    database: Database, tenant: Tenant, issued: Issued, new_ring: Callable[..., Awaitable[Keyring]]
) -> None:
    nodes = [await new_ring(), await new_ring()]
    for node in nodes:
        await node.verify(issued.key)
    events = [reported(node, issued.id) for node in nodes]
    await keys.revoke(database, tenant.id, issued.id)
    await heard(*events)
    for node in nodes:
        assert await refusal(node, issued.key) == "api_key_revoked"
    await keys.revoke(database, tenant.id, issued.id)  # again: nothing changes


async def test_revocation_is_seen_with_the_push_channel_cut(
    database: Database,
    tenant: Tenant,
    issued: Issued,
    ring: Keyring,
    new_ring: Callable[..., Awaitable[Keyring]],
    admin: psycopg.AsyncConnection,
) -> None:
    second = await new_ring()
    await second.verify(issued.key)
    await admin.execute("ALTER TABLE key_revocations DISABLE TRIGGER announced")
    try:
        event = reported(second, issued.id)
        await keys.revoke(database, tenant.id, issued.id)
        await heard(event)
        assert await refusal(second, issued.key) == "api_key_revoked"
    finally:
        await admin.execute("ALTER TABLE key_revocations ENABLE TRIGGER announced")


async def test_a_stale_cache_does_not_answer(
    database: Database, tenant: Tenant, issued: Issued, ring: Keyring, admin: psycopg.AsyncConnection
) -> None:
    """The server process that feeds the cache hangs: after the lease the database is asked instead."""
    await ring.verify(issued.key)
    cursor = await admin.execute("SELECT pid FROM pg_stat_activity WHERE query LIKE '%key_revocations WHERE xid%'")
    pids = [pid for (pid,) in await cursor.fetchall() if pid != admin.info.backend_pid]
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        await keys.revoke(database, tenant.id, issued.id)
        await asyncio.sleep(ring._fresh_until - time.monotonic())
        assert await refusal(ring, issued.key) == "api_key_revoked"
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


async def test_a_revocation_whose_transaction_ended_late_is_not_missed(
    database: Database, tenant: Tenant, ring: Keyring, admin: psycopg.AsyncConnection
) -> None:
    """Its id is the lower one, but a higher one was seen first."""
    early, late = [await keys.issue(database, tenant.id, name) for name in ("early", "late")]
    for one in (early, late):
        await ring.verify(one.key)
    events = {one.id: reported(ring, one.id) for one in (early, late)}
    async with admin.transaction():
        await admin.execute("UPDATE api_keys SET revoked_at = now() WHERE id = %s", (early.id,))
        await keys.revoke(database, tenant.id, late.id)
        await heard(events[late.id])
        assert not events[early.id].is_set()
        assert (await ring.verify(early.key)).key_id == early.id
    await heard(events[early.id])
    assert await refusal(ring, early.key) == "api_key_revoked"


async def test_a_revocation_is_reported_once(
    database: Database, tenant: Tenant, issued: Issued, ring: Keyring, admin: psycopg.AsyncConnection
) -> None:
    seen: list[uuid.UUID] = []
    ring.on_revoked(seen.append)
    event = reported(ring, issued.id)
    async with admin.transaction():
        await admin.execute("SELECT pg_current_xact_id()")  # an open transaction makes later looks see it again
        await keys.revoke(database, tenant.id, issued.id)
        await heard(event)
        looked = ring._fresh_until
        for _ in range(400):
            await asyncio.sleep(0.05)
            if ring._fresh_until != looked:
                break
    assert seen.count(issued.id) == 1


async def test_a_callback_that_fails_harms_nobody(
    database: Database, tenant: Tenant, issued: Issued, ring: Keyring, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: uuid.UUID) -> None:
        raise LookupError("socket gone")

    ring.on_revoked(broken)
    event = reported(ring, issued.id)
    await keys.revoke(database, tenant.id, issued.id)
    await heard(event)
    assert "socket gone" in caplog.text
    again = await keys.issue(database, tenant.id, "next")
    assert (await ring.verify(again.key)).key_id == again.id


async def test_revoking_what_is_not_there(database: Database, tenant: Tenant, other: Tenant, issued: Issued) -> None:
    for owner, key_id in ((tenant.id, uuid.uuid4()), (other.id, issued.id)):
        with pytest.raises(NotFound):
            await keys.revoke(database, owner, key_id)


@pytest.mark.parametrize(
    ("status", "code"),
    [("suspended", "tenant_suspended"), ("pending", "tenant_pending"), ("deleted", "tenant_not_found")],
)
async def test_keys_are_good_while_their_tenant_is_active(
    database: Database, tenant: Tenant, issued: Issued, ring: Keyring, status: str, code: str
) -> None:
    await ring.verify(issued.key)
    event = reported(ring, issued.id)
    change = text("UPDATE tenants SET status = :status WHERE id = :id")
    async with database.system() as session:
        await session.execute(change.bindparams(status=status, id=tenant.id))
    await heard(event)
    assert await refusal(ring, issued.key) == code
    async with database.system() as session:
        await session.execute(change.bindparams(status="active", id=tenant.id))
    assert (await ring.verify(issued.key)).tenant_id == tenant.id


async def test_revoked_comes_before_expired_and_suspended(database: Database, ring: Keyring) -> None:
    tenant = await tenants.create(database, "order", "Order of checks")
    issued = await keys.issue(database, tenant.id, "all at once", expires_at=datetime.now(UTC) + timedelta(days=1))
    async with database.system() as session:
        await session.execute(text("UPDATE tenants SET status = 'suspended' WHERE slug = 'order'"))
    assert await refusal(ring, issued.key) == "tenant_suspended"
    async with database.system() as session:
        await session.execute(
            text("UPDATE api_keys SET expires_at = now() - interval '1 s' WHERE id = :id").bindparams(id=issued.id)
        )
    assert await refusal(ring, issued.key) == "api_key_expired"
    await keys.revoke(database, tenant.id, issued.id)
    assert await refusal(ring, issued.key) == "api_key_revoked"


async def test_the_cache_stays_small(
    database: Database, tenant: Tenant, ring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "_CACHED", 3)
    made = [await keys.issue(database, tenant.id, f"key {i}") for i in range(5)]
    for one in made:
        await ring.verify(one.key)
    assert len(ring._grants) == len(ring._digests) == 3
    assert (await ring.verify(made[0].key)).key_id == made[0].id


async def test_a_ring_that_is_closed_still_tells_the_truth(
    database: Database, tenant: Tenant, issued: Issued, ring: Keyring
) -> None:
    await ring.verify(issued.key)
    await ring.close()
    await keys.revoke(database, tenant.id, issued.id)
    assert await refusal(ring, issued.key) == "api_key_revoked"


async def test_no_store_opens_no_door(issued: Issued) -> None:
    nowhere = Database(lambda role: f"postgresql://{role}@127.0.0.1:1/none")
    ring = Keyring(nowhere)
    with pytest.raises(Unavailable):
        await ring.start()
    with pytest.raises(Unavailable):
        await ring.verify(issued.key)
    await nowhere.close()


def test_the_operator_key_is_made_once(tmp_path: Path) -> None:
    key, made = keys.operator_key(tmp_path / "data")
    assert made
    assert key.startswith("avb_operator_")
    assert keys.operator_key(tmp_path / "data") == (key, False)
    file = tmp_path / "data" / "operator.key"
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["operator.key"]
    assert keys.same_key(key, key)
    assert not keys.same_key(key[:-1] + "\ud800", key)


def test_a_damaged_operator_key_is_not_accepted(tmp_path: Path) -> None:
    for content in (b"", b"avb_operator_short", b"\xff\xfe"):
        (tmp_path / "operator.key").write_bytes(content)
        with pytest.raises(Unavailable, match="remove it"):
            keys.operator_key(tmp_path)


def test_no_room_for_an_operator_key(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(Unavailable):
        keys.operator_key(tmp_path / "data")
