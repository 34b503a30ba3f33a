"""Checking keys: from memory and from the database, in this process and in another, whatever the clocks do."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from agentvoicebox.config.errors import AvbError, Forbidden, Refused, Unavailable
from agentvoicebox.tenancy import keyring, keys, roles, tenants, wake_words
from agentvoicebox.tenancy.changes import Feed
from agentvoicebox.tenancy.database import Address, Database
from agentvoicebox.tenancy.keyring import Grant, Keyring
from agentvoicebox.tenancy.keys import Issued, Scope
from agentvoicebox.tenancy.models import ApiKey, Project, RateClass, Tenant, Tier, VoiceProvider

NewRing = Callable[..., Awaitable[Keyring]]


@pytest.fixture
async def new_ring(database: Database, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[NewRing]:
    """Makes what each node has: a cache and a feed of its own. Uses are written when the test says so."""
    monkeypatch.setattr(keyring, "_FLUSH", 600.0)
    made: list[tuple[Keyring, Feed]] = []

    async def make(clock: Callable[[], float] = time.monotonic) -> Keyring:
        feed = Feed(database)
        ring = Keyring(database, feed, clock)
        await feed.start()
        await ring.start()
        made.append((ring, feed))
        return ring

    yield make
    for ring, feed in made:
        await ring.close()
        await feed.close()


@pytest.fixture
async def ring(new_ring: NewRing) -> Keyring:
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


def altered(ring: Keyring, tenant_id: uuid.UUID, key_id: uuid.UUID | None) -> asyncio.Event:
    seen = asyncio.Event()
    ring.on_changed(lambda *what: seen.set() if what == (tenant_id, key_id) else None)
    return seen


async def heard(*events: asyncio.Event) -> None:
    async with asyncio.timeout(20):
        for one in events:
            await one.wait()


async def system(database: Database, statement: str, **values: object) -> None:
    async with database.system() as session:
        await session.execute(text(statement), values)


@contextmanager
def statements(database: Database) -> Iterator[list[str]]:
    """What is sent to the database meanwhile, by the pool of the system's role."""
    sent: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        sent.append(statement)

    event.listen(database._system.sync_engine, "before_cursor_execute", note)
    yield sent
    event.remove(database._system.sync_engine, "before_cursor_execute", note)


# --- what a key opens -------------------------------------------------------------------------------------------------

OTHERS = st.from_regex(r"avb_[A-Za-z0-9_-]{43}", fullmatch=True)


@settings(max_examples=40, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fate=st.sampled_from(["valid", "expired", "revoked", "expired and revoked", "unknown"]),
    scopes=st.sets(st.sampled_from(list(Scope)), min_size=1),
    cached=st.booleans(),
    other=OTHERS,
)
async def test_p6_api_key_authentication(
    database: Database, tenant: Tenant, ring: Keyring, fate: str, scopes: set[Scope], cached: bool, other: str
) -> None:
    """A valid key works, an expired one is refused as expired, a revoked one as revoked, any other as unknown."""
    issued = await keys.issue(database, tenant.id, "a key", scopes)
    if cached:
        assert (await ring.verify(issued.key)).key_id == issued.id
    events = []
    if "expired" in fate:
        events.append(altered(ring, tenant.id, issued.id))
        await system(database, "UPDATE api_keys SET expires_at = now() - interval '1 ms' WHERE id = :id", id=issued.id)
    if "revoked" in fate:
        events.append(reported(ring, issued.id))
        await keys.revoke(database, tenant.id, issued.id)
    await heard(*events)
    for _ in range(2):
        if fate == "valid":
            grant = await ring.verify(issued.key)
            assert (grant.tenant_id, grant.key_id, grant.scopes) == (tenant.id, issued.id, scopes)
            for scope in Scope:
                if scope in scopes:
                    grant.require(scope)
                else:
                    with pytest.raises(Forbidden, match=f"{scope}"):
                        grant.require(scope)
        elif fate == "unknown":
            assert await refusal(ring, other) == "invalid_api_key"
        else:
            assert await refusal(ring, issued.key) == f"api_key_{fate.split()[-1]}"
    if fate != "revoked":
        await keys.revoke(database, tenant.id, issued.id)  # leaves room for the next example


async def test_what_a_key_grants(database: Database, tenant: Tenant, ring: Keyring) -> None:
    expires = datetime.now(UTC) + timedelta(hours=1)
    issued = await keys.issue(
        database, tenant.id, "full", ("usage", "realtime", "usage"), expires, rate_class="elevated"
    )
    async with database.tenant(tenant.id) as session:
        project = (await session.execute(select(Project.id))).scalar_one()
    expected = Grant(
        tenant_id=tenant.id,
        tenant_slug=tenant.slug,
        tenant_name=tenant.name,
        tier=Tier.ENTERPRISE,
        key_id=issued.id,
        project_id=project,
        scopes=frozenset({"usage", "realtime"}),
        rate_class=RateClass.ELEVATED,
        expires_at=expires,
        networks=(),
        session_timeout=3600.0,
        voice_provider=VoiceProvider.LOCAL,
        default_stt_model="base",
        default_tts_voice="am_onyx",
    )
    for _ in range(2):  # from the database, from memory
        assert await ring.verify(issued.key) == expected


async def test_a_key_needs_nobody_behind_it_but_its_scope(database: Database, tenant: Tenant, ring: Keyring) -> None:
    """No person is signed in: what a key may do is what its scopes say, no more and no less."""
    issued = await keys.issue(database, tenant.id, "a device", (Scope.REALTIME,))
    grant = await ring.verify(issued.key)
    grant.require(Scope.REALTIME)
    for scope in set(Scope) - {Scope.REALTIME}:
        with pytest.raises(Forbidden) as caught:
            grant.require(scope)
        assert caught.value.code == "insufficient_scope"


async def test_a_tenant_without_settings_has_the_defaults(
    database: Database, tenant: Tenant, issued: Issued, ring: Keyring, admin: psycopg.AsyncConnection
) -> None:
    """The ones that the table would have given it."""
    await admin.execute("DELETE FROM tenant_settings WHERE tenant_id = %s", (tenant.id,))
    without = await ring.verify(issued.key)
    changed = altered(ring, tenant.id, None)
    await system(database, "INSERT INTO tenant_settings (tenant_id) VALUES (:id)", id=tenant.id)
    await heard(changed)
    assert await ring.verify(issued.key) == without


async def test_what_the_tenant_decides_is_granted_at_once(
    database: Database, tenant: Tenant, issued: Issued, ring: Keyring
) -> None:
    second = await keys.issue(database, tenant.id, "another")
    await system(database, "INSERT INTO tenant_settings (tenant_id) VALUES (:id) ON CONFLICT DO NOTHING", id=tenant.id)
    for one in (issued, second):
        assert (await ring.verify(one.key)).session_timeout == 3600.0
    changed = altered(ring, tenant.id, None)
    await system(
        database,
        "UPDATE tenant_settings SET session_timeout_minutes = 5, default_voice_provider = 'disabled', "
        "allowed_ip_ranges = '{10.0.0.0/8,2001:db8::/32}' WHERE tenant_id = :id",
        id=tenant.id,
    )
    await heard(changed)
    for one in (issued, second):
        grant = await ring.verify(one.key)
        assert (grant.session_timeout, grant.voice_provider) == (300.0, VoiceProvider.DISABLED)
        assert [str(network) for network in grant.networks] == ["10.0.0.0/8", "2001:db8::/32"]


def granted(*ranges: str) -> Grant:
    return Grant(
        tenant_id=uuid.uuid4(),
        tenant_slug="acme",
        tenant_name="Acme",
        tier=Tier.FREE,
        key_id=uuid.uuid4(),
        project_id=None,
        scopes=frozenset({"realtime"}),
        rate_class=RateClass.STANDARD,
        expires_at=None,
        networks=tuple(keyring._network(given) for given in ranges),
        session_timeout=60.0,
        voice_provider=VoiceProvider.LOCAL,
        default_stt_model="base",
        default_tts_voice="am_onyx",
    )


async def test_a_new_wake_word_makes_no_key_forgotten(
    database: Database, tenant: Tenant, ring: Keyring, issued: Issued
) -> None:
    """Keys carry nothing of what devices go by; a busy node would ask the database for all of them again."""
    other = await keys.issue(database, tenant.id, "another")
    grant = await ring.verify(issued.key)
    seen, changed = reported(ring, other.id), altered(ring, tenant.id, None)
    await wake_words.create(database, tenant.id, "alexa")
    await keys.revoke(database, tenant.id, other.id)  # told after it
    async with asyncio.timeout(20):
        await seen.wait()
        while ring.known(issued.key) is not grant:  # on a busy machine the feed may be late for a moment
            await asyncio.sleep(0.01)
    assert not changed.is_set()


def test_where_a_key_may_be_used_from() -> None:
    anywhere, office = granted(), granted("192.0.2.0/24", "2001:db8::/32")
    for ip in ("192.0.2.7", "203.0.113.1", None, "no address"):
        anywhere.admit(ip)
    for ip in ("192.0.2.7", "::ffff:192.0.2.7", "2001:db8::1"):
        office.admit(ip)
    for ip in ("192.0.3.7", "::ffff:192.0.3.7", "2001:db9::1", "::", "", None, "no address", "192.0.2.7, 192.0.3.7"):
        with pytest.raises(Forbidden) as caught:
            office.admit(ip)
        assert caught.value.code == "ip_not_allowed"


def test_a_range_that_cannot_be_read_admits_nobody() -> None:
    """An empty list means everybody, so it must not become one."""
    for ip in ("192.0.2.7", "2001:db8::1", "127.0.0.1"):
        with pytest.raises(Forbidden):
            granted("192.0.2.0/240").admit(ip)


@pytest.mark.parametrize(
    "secret", ["", "avb_", "avb_" + "x" * 43, "avb_" + "x" * 42, "AVB_" + "x" * 43, "x" * 47, "avb_" + "\ud800" * 43]
)
async def test_keys_that_are_none(ring: Keyring, secret: str) -> None:
    assert await refusal(ring, secret) == "invalid_api_key"


async def test_half_a_secret_tells_nothing(database: Database, tenant: Tenant, ring: Keyring, issued: Issued) -> None:
    """Whether a key was revoked or has expired learns only who holds the whole of it."""
    expired = await keys.issue(database, tenant.id, "late")
    await system(database, "UPDATE api_keys SET expires_at = now() - interval '1 s' WHERE id = :id", id=expired.id)
    await keys.revoke(database, tenant.id, issued.id)
    assert await refusal(ring, issued.key) == "api_key_revoked"
    assert await refusal(ring, expired.key) == "api_key_expired"
    for one in (issued, expired):
        for guess in (one.key[:-1] + ("A" if one.key[-1] != "A" else "B"), one.key[:12] + "x" * 35):
            assert await refusal(ring, guess) == "invalid_api_key"


async def test_a_secret_shows_nowhere(
    database: Database, tenant: Tenant, ring: Keyring, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        issued = await keys.issue(database, tenant.id, "quiet")
        grant = await ring.verify(issued.key)
        rotated = await keys.rotate(database, tenant.id, issued.id)
        wrong = "avb_" + "x" * 43
        error = pytest.raises(Refused, match="not known")
        with error as caught:
            await ring.verify(wrong)
    shown = [repr(issued), repr(rotated), repr(grant), repr(ring), str(caught.value), caplog.text]
    assert not any(secret in shown_text for secret in (issued.key, rotated.key, wrong) for shown_text in shown)


async def test_a_key_made_after_it_was_refused_works(database: Database, tenant: Tenant, ring: Keyring) -> None:
    """That a key is unknown is not remembered."""
    issued = await keys.issue(database, tenant.id, "moved")
    change = "UPDATE api_keys SET key_hash = :hash WHERE id = :id"
    await system(database, change, hash="elsewhere", id=issued.id)
    assert await refusal(ring, issued.key) == "invalid_api_key"
    await system(database, change, hash=hashlib.sha256(issued.key.encode()).hexdigest(), id=issued.id)
    assert (await ring.verify(issued.key)).key_id == issued.id


@pytest.mark.parametrize(
    ("status", "code"),
    [("suspended", "tenant_suspended"), ("pending", "tenant_pending"), ("deleted", "tenant_not_found")],
)
async def test_keys_are_good_while_their_tenant_is_active(
    database: Database, tenant: Tenant, issued: Issued, ring: Keyring, status: str, code: str
) -> None:
    await ring.verify(issued.key)
    seen = reported(ring, issued.id)
    await system(database, "UPDATE tenants SET status = :status WHERE id = :id", status=status, id=tenant.id)
    await heard(seen)
    assert await refusal(ring, issued.key) == code
    await system(database, "UPDATE tenants SET status = 'active' WHERE id = :id", id=tenant.id)
    assert (await ring.verify(issued.key)).tenant_id == tenant.id


async def test_revoked_comes_before_expired_and_suspended(database: Database, ring: Keyring) -> None:
    tenant = await tenants.create(database, "order", "Order of checks")
    issued = await keys.issue(database, tenant.id, "all at once", expires_at=datetime.now(UTC) + timedelta(days=1))
    await system(database, "UPDATE tenants SET status = 'suspended' WHERE slug = 'order'")
    assert await refusal(ring, issued.key) == "tenant_suspended"
    changed = altered(ring, tenant.id, issued.id)
    await system(database, "UPDATE api_keys SET expires_at = now() - interval '1 s' WHERE id = :id", id=issued.id)
    await heard(changed)
    for _ in range(2):
        assert await refusal(ring, issued.key) == "api_key_expired"
    seen = reported(ring, issued.id)
    await keys.revoke(database, tenant.id, issued.id)
    await heard(seen)
    assert await refusal(ring, issued.key) == "api_key_revoked"


# --- what ends it -----------------------------------------------------------------------------------------------------


async def test_expiry_is_looked_at_every_time(database: Database, tenant: Tenant, new_ring: NewRing) -> None:
    passed = 0.0
    ring = await new_ring(lambda: time.monotonic() + passed)
    expires = datetime.now(UTC) + timedelta(seconds=600)
    issued = await keys.issue(database, tenant.id, "short", expires_at=expires)
    assert (await ring.verify(issued.key)).expires_at == expires
    passed = 500.0  # and what this machine takes of its own
    assert (await ring.verify(issued.key)).key_id == issued.id
    passed = 601.0
    assert await refusal(ring, issued.key) == "api_key_expired"


async def test_a_clock_set_back_revives_no_key(
    database: Database, tenant: Tenant, new_ring: NewRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = 0.0
    ring = await new_ring(lambda: time.monotonic() + passed)
    expires = datetime.now(UTC) + timedelta(seconds=60)
    issued = await keys.issue(database, tenant.id, "short", expires_at=expires)
    await ring.verify(issued.key)
    passed = 61.0  # and by the clocks of the node and of the database, no time at all
    for _ in range(2):
        assert await refusal(ring, issued.key) == "api_key_expired"
    over = await keys.issue(database, tenant.id, "over")
    await system(database, "UPDATE api_keys SET expires_at = now() - interval '1 s' WHERE id = :id", id=over.id)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert await refusal(await new_ring(), over.key) == "api_key_expired"


async def test_an_expired_key_does_not_keep_asking_the_database(
    database: Database, tenant: Tenant, issued: Issued, ring: Keyring
) -> None:
    seen = altered(ring, tenant.id, issued.id)
    await system(database, "UPDATE api_keys SET expires_at = now() - interval '1 s' WHERE id = :id", id=issued.id)
    await heard(seen)
    assert await refusal(ring, issued.key) == "api_key_expired"
    with statements(database) as sent:
        for _ in range(20):
            assert await refusal(ring, issued.key) == "api_key_expired"
    assert len(sent) < 20  # none, unless the feed is late on a busy machine


async def test_a_grant_is_not_kept_for_ever(
    database: Database, tenant: Tenant, issued: Issued, ring: Keyring, admin: psycopg.AsyncConnection
) -> None:
    """What no line of the log tells of is seen when the key is read again."""
    await ring.verify(issued.key)
    await admin.execute("ALTER TABLE api_keys DISABLE TRIGGER changed")
    await system(database, "UPDATE api_keys SET scopes = '{usage}' WHERE id = :id", id=issued.id)
    await admin.execute("ALTER TABLE api_keys ENABLE TRIGGER changed")
    held = ring._held[hashlib.sha256(issued.key.encode()).digest()]
    assert held.until <= time.monotonic() + 60
    held.until = time.monotonic()
    assert (await ring.verify(issued.key)).scopes == {"usage"}


async def test_a_revoked_key_is_refused_at_once_here_and_there(
    database: Database, tenant: Tenant, issued: Issued, new_ring: NewRing
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


async def test_a_rotation_is_seen_at_once(database: Database, tenant: Tenant, issued: Issued, ring: Keyring) -> None:
    assert (await ring.verify(issued.key)).expires_at is None
    changed = altered(ring, tenant.id, issued.id)
    new = await keys.rotate(database, tenant.id, issued.id, grace=60)
    await heard(changed)
    grant = await ring.verify(issued.key)
    assert grant.expires_at is not None
    assert (await ring.verify(new.key)).key_id == new.id
    revoked = reported(ring, new.id)
    newest = await keys.rotate(database, tenant.id, new.id, grace=0)
    await heard(revoked)
    assert await refusal(ring, new.key) == "api_key_revoked"
    assert (await ring.verify(newest.key)).key_id == newest.id


async def test_revocation_is_seen_with_the_push_channel_cut(
    database: Database, tenant: Tenant, issued: Issued, new_ring: NewRing, admin: psycopg.AsyncConnection
) -> None:
    second = await new_ring()
    await second.verify(issued.key)
    await admin.execute("ALTER TABLE key_revocations DISABLE TRIGGER announced")
    try:
        seen = reported(second, issued.id)
        await keys.revoke(database, tenant.id, issued.id)
        await heard(seen)
        assert await refusal(second, issued.key) == "api_key_revoked"
    finally:
        await admin.execute("ALTER TABLE key_revocations ENABLE TRIGGER announced")


async def test_all_keys_at_once_leave_connections_to_others(
    database: Database, tenant: Tenant, ring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restart every device comes with a key of its own, and nobody is to be sent away for that."""
    issued = [await keys.issue(database, tenant.id, f"key {n}") for n in range(8)]
    system = database.system
    busy: list[int] = [0]

    @asynccontextmanager
    async def counted() -> AsyncIterator[AsyncSession]:
        busy.append(busy[-1] + 1)
        async with system() as session:
            yield session
        busy.append(busy[-1] - 1)

    monkeypatch.setattr(database, "system", counted)
    grants = await asyncio.gather(*(ring.verify(each.key) for each in issued for _ in range(2)))
    assert [grant.key_id for grant in grants] == [each.id for each in issued for _ in range(2)]
    assert max(busy) == keyring._AT_ONCE
    assert busy.count(0) - 1 <= len(issued), "whoever asks for the same key waits with the first"


@pytest.mark.parametrize("push", ["push", "cut"])
async def test_a_second_process_refuses_within_the_second(
    database: Database,
    tenant: Tenant,
    issued: Issued,
    address: Address,
    admin: psycopg.AsyncConnection,
    push: str,
) -> None:
    if push == "cut":
        await admin.execute("ALTER TABLE key_revocations DISABLE TRIGGER announced")
    node = await asyncio.create_subprocess_exec(
        sys.executable, str(Path(__file__)), address(roles.SYSTEM), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert node.stdin is not None
    assert node.stdout is not None
    try:
        async with asyncio.timeout(60):
            node.stdin.write(f"{issued.key}\n".encode())
            assert await node.stdout.readline() == b"good\n"
            await keys.revoke(database, tenant.id, issued.id)
            revoked_at = time.monotonic()
            code, accepted = (await node.stdout.readline()).decode().split()
        assert code == "api_key_revoked"
        # Both are of the one clock that processes share. However late this machine runs anything: no check that began
        # a second after the revocation found the key good.
        assert float(accepted) < revoked_at + 1
    finally:
        node.stdin.close()
        await node.wait()
        await admin.execute("ALTER TABLE key_revocations ENABLE TRIGGER announced")


async def another_node(dsn: str) -> None:
    """What the test above starts: says when the key it is given works, and when it does not any more."""
    database = Database(lambda role: psycopg.conninfo.make_conninfo(dsn, user=role))
    feed = Feed(database)
    await feed.start()
    ring = Keyring(database, feed)
    key = sys.stdin.readline().strip()
    await ring.verify(key)
    print("good", flush=True)
    accepted = 0.0
    while True:
        begun = time.monotonic()
        try:
            await ring.verify(key)
        except AvbError as error:
            print(error.code, accepted, flush=True)
            break
        accepted = begun
        await asyncio.sleep(0.001)
    await feed.close()
    await database.close()


async def test_a_stale_cache_does_not_answer(
    database: Database, tenant: Tenant, issued: Issued, ring: Keyring, admin: psycopg.AsyncConnection
) -> None:
    """The server process that feeds the cache hangs: after the lease the database is asked instead."""
    await ring.verify(issued.key)
    cursor = await admin.execute("SELECT pid FROM pg_stat_activity WHERE query LIKE '%key_revocations%'")
    pids = [pid for (pid,) in await cursor.fetchall() if pid != admin.info.backend_pid]
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        await keys.revoke(database, tenant.id, issued.id)
        await asyncio.sleep(ring._feed.fresh_until - time.monotonic())
        assert await refusal(ring, issued.key) == "api_key_revoked"
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


async def test_what_was_cached_before_a_gap_is_not_used(
    database: Database, tenant: Tenant, issued: Issued, ring: Keyring, admin: psycopg.AsyncConnection
) -> None:
    """After a fail-over the log may lack what another server had told."""
    await ring.verify(issued.key)
    await admin.execute("ALTER TABLE api_keys DISABLE TRIGGER revoked")
    await keys.revoke(database, tenant.id, issued.id)
    await admin.execute("ALTER TABLE api_keys ENABLE TRIGGER revoked")
    forgotten = asyncio.Event()
    ring._feed.on_gap(forgotten.set)
    await admin.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE pid <> pg_backend_pid() AND query LIKE '%key_revocations%'"
    )
    await heard(forgotten)
    assert await refusal(ring, issued.key) == "api_key_revoked"


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
        await system(database, "UPDATE api_keys SET revoked_at = now() WHERE id = :id", id=late.id)
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
    once = reported(ring, issued.id)
    async with admin.transaction():
        await admin.execute("SELECT pg_current_xact_id()")  # an open transaction makes later looks see it again
        await keys.revoke(database, tenant.id, issued.id)
        await heard(once)
        looked = ring._feed.fresh_until
        async with asyncio.timeout(20):
            while ring._feed.fresh_until == looked:
                await asyncio.sleep(0.05)
    assert seen.count(issued.id) == 1


async def test_a_callback_that_fails_harms_nobody(
    database: Database, tenant: Tenant, issued: Issued, ring: Keyring, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: uuid.UUID) -> None:
        raise LookupError("socket gone")

    ring.on_revoked(broken)
    seen = reported(ring, issued.id)
    await keys.revoke(database, tenant.id, issued.id)
    await heard(seen)
    assert "socket gone" in caplog.text
    again = await keys.issue(database, tenant.id, "next")
    assert (await ring.verify(again.key)).key_id == again.id


# --- the cache --------------------------------------------------------------------------------------------------------


async def test_the_cache_stays_small(
    database: Database, tenant: Tenant, ring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "_CACHED", 3)
    made = [await keys.issue(database, tenant.id, f"key {i}") for i in range(5)]
    for one in made:
        await ring.verify(one.key)
    assert len(ring._held) == sum(map(len, ring._tenants.values())) == 3
    assert (await ring.verify(made[0].key)).key_id == made[0].id


async def test_many_who_come_at_once_ask_the_database_once(database: Database, issued: Issued, ring: Keyring) -> None:
    with statements(database) as sent:
        grants = await asyncio.gather(*(ring.verify(issued.key) for _ in range(200)))
    assert {grant.key_id for grant in grants} == {issued.id}
    assert len([one for one in sent if "FROM api_keys" in one]) == 1


class SlowAnswers:
    """A database whose answers are on their way until they are let go."""

    def __init__(self, database: Database) -> None:
        self.asked, self.let_go = asyncio.Event(), asyncio.Event()
        self._database = database

    @asynccontextmanager
    async def system(self) -> AsyncIterator[AsyncSession]:
        async with self._database.system() as session:
            yield session
        self.asked.set()
        await self.let_go.wait()


async def test_an_answer_from_before_a_change_is_for_who_asked_before_it(
    database: Database, tenant: Tenant, issued: Issued, ring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who comes later does not get it, neither while it is on its way nor from memory."""
    slow = SlowAnswers(database)
    monkeypatch.setattr(ring, "_database", slow)
    first = asyncio.create_task(ring.verify(issued.key))
    await heard(slow.asked)
    monkeypatch.undo()
    seen = reported(ring, issued.id)
    await keys.revoke(database, tenant.id, issued.id)
    await heard(seen)
    try:
        async with asyncio.timeout(20):
            assert await refusal(ring, issued.key) == "api_key_revoked"
    finally:
        slow.let_go.set()
        await first
    assert (await first).key_id == issued.id
    assert await refusal(ring, issued.key) == "api_key_revoked"


async def test_a_look_up_outlives_whoever_began_it(issued: Issued, ring: Keyring) -> None:
    first = asyncio.create_task(ring.verify(issued.key))
    second = asyncio.create_task(ring.verify(issued.key))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).key_id == issued.id
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_a_ring_whose_feed_is_closed_still_tells_the_truth(
    database: Database, tenant: Tenant, issued: Issued, ring: Keyring
) -> None:
    await ring.verify(issued.key)
    await ring.close()
    await ring._feed.close()
    await keys.revoke(database, tenant.id, issued.id)
    assert await refusal(ring, issued.key) == "api_key_revoked"


async def test_no_store_opens_no_door(issued: Issued) -> None:
    nowhere = Database(lambda role: f"postgresql://{role}@127.0.0.1:1/none")
    feed = Feed(nowhere)
    ring = Keyring(nowhere, feed)
    with pytest.raises(Unavailable):
        await feed.start()
    with pytest.raises(Unavailable):
        await ring.verify(issued.key)
    await nowhere.close()


# --- uses -------------------------------------------------------------------------------------------------------------


async def used(database: Database, tenant: Tenant, issued: Issued) -> tuple[int, bool, str | None]:
    key = await keys.get(database, tenant.id, issued.id)
    return key.usage_count, key.last_used_at is not None, key.last_used_ip and str(key.last_used_ip)


async def test_uses_are_written_together_and_not_one_by_one(database: Database, tenant: Tenant, ring: Keyring) -> None:
    made = [await keys.issue(database, tenant.id, f"key {number}") for number in range(20)]
    grants = [await ring.verify(one.key) for one in made]
    with statements(database) as sent:
        for number in range(1000):
            ring.used(grants[number % 20], f"192.0.2.{number % 20}")
        assert sent == []
        assert await used(database, tenant, made[3]) == (0, False, None)
        await ring.flush()
        assert len(sent) == 1
    assert await used(database, tenant, made[3]) == (50, True, "192.0.2.3")
    with statements(database) as sent:
        await ring.flush()
    assert sent == []  # nothing new


async def test_two_nodes_lose_no_use(database: Database, tenant: Tenant, new_ring: NewRing) -> None:
    nodes = [await new_ring() for _ in range(4)]
    made = [await keys.issue(database, tenant.id, f"key {number}") for number in range(100)]
    grants = [await nodes[0].verify(one.key) for one in made]
    for _ in range(10):
        for number, node in enumerate(nodes):
            for grant in grants if number % 2 else reversed(grants):
                node.used(grant)
        await asyncio.gather(*(node.flush() for node in nodes))
    assert {(await used(database, tenant, one))[0] for one in made} == {40}


async def test_the_last_use_is_the_latest_whoever_writes_it_first(
    database: Database, tenant: Tenant, issued: Issued, ring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    grant = await ring.verify(issued.key)
    now = time.time()
    for at, ip in ((now, "192.0.2.2"), (now - 60, "192.0.2.1")):
        monkeypatch.setattr(keyring.time, "time", lambda at=at: at)
        ring.used(grant, ip)
        await ring.flush()
    key = await keys.get(database, tenant.id, issued.id)
    assert key.last_used_at is not None
    assert abs(key.last_used_at.timestamp() - now) < 0.001
    assert (key.usage_count, str(key.last_used_ip)) == (2, "192.0.2.2")


@pytest.mark.parametrize(
    ("given", "kept"), [("nonsense", None), (None, None), ("fe80::1%eth0", "fe80::1"), ("a\x00b", None)]
)
async def test_an_address_that_is_none_does_not_lose_the_use(
    database: Database, tenant: Tenant, issued: Issued, ring: Keyring, given: str | None, kept: str | None
) -> None:
    ring.used(await ring.verify(issued.key), given)
    await ring.flush()
    assert await used(database, tenant, issued) == (1, True, kept)


async def test_uses_wait_for_a_store_that_is_away(
    database: Database, tenant: Tenant, issued: Issued, address: Address, ring: Keyring
) -> None:
    away = True
    flaky = Database(lambda role: "postgresql://nobody@127.0.0.1:1/none" if away else address(role))
    node = Keyring(flaky, Feed(flaky))
    grant = await ring.verify(issued.key)
    for count in (1, 2):
        node.used(grant, f"192.0.2.{count}")
        with pytest.raises(Unavailable):
            await node.flush()
    away = False
    node.used(grant)
    await node.flush()
    assert await used(database, tenant, issued) == (3, True, None)
    await flaky.close()


async def test_uses_are_written_by_themselves_and_at_the_end(
    database: Database, tenant: Tenant, issued: Issued, new_ring: NewRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "_FLUSH", 0.01)
    node = await new_ring()
    grant = await node.verify(issued.key)
    node.used(grant)
    async with asyncio.timeout(20):
        while (await used(database, tenant, issued))[0] < 1:
            await asyncio.sleep(0.01)
    monkeypatch.setattr(keyring, "_FLUSH", 600.0)
    last = await new_ring()
    last.used(grant)
    await last.close()
    assert (await used(database, tenant, issued))[0] == 2


async def test_what_is_counted_for_graphs_has_few_names(
    database: Database, tenant: Tenant, other: Tenant, ring: Keyring
) -> None:
    """A time series for each key or tenant would be a hundred thousand of them."""
    for owner in (tenant, other):
        for number in range(5):
            issued = await keys.issue(database, owner.id, f"key {number}", rate_class=list(RateClass)[number % 3])
            ring.used(await ring.verify(issued.key))
    assert ring.used_total == {RateClass.STANDARD: 4, RateClass.ELEVATED: 4, RateClass.UNLIMITED: 2}


async def test_uses_of_a_tenant_are_not_seen_by_another(
    database: Database, tenant: Tenant, other: Tenant, issued: Issued, ring: Keyring
) -> None:
    """A line of the tally names tenant and key, and counts for that pair only."""
    grant = await ring.verify(issued.key)
    ring.used(grant)
    ring._uses[grant.key_id].tenant_id = other.id
    await ring.flush()
    assert await used(database, tenant, issued) == (0, False, None)
    async with database.tenant(other.id) as session:
        assert (await session.execute(select(ApiKey))).scalars().all() == []


if __name__ == "__main__":
    asyncio.run(another_node(sys.argv[1]))


async def test_what_is_known_is_said_without_asking(
    database: Database, tenant: Tenant, issued: Issued, ring: Keyring
) -> None:
    assert ring.known(issued.key) is None
    grant = await ring.verify(issued.key)
    with statements(database) as sent:
        async with asyncio.timeout(20):
            while (known := ring.known(issued.key)) is None:  # a machine that stalls lets the feed fall behind
                await asyncio.sleep(0.01)
        assert known == grant
    assert sent == []
    await ring._feed.close()
    assert ring.known(issued.key) is None, "whoever does not hear of changes knows nothing"
