"""The log of changes: pushed or not, early or late, every node is told of everything once."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable

import psycopg
import pytest
from sqlalchemy import text

from agentvoicebox.config.errors import Unavailable
from agentvoicebox.tenancy import changes, devices, keys, personas, projects, skills, voices, wake_words
from agentvoicebox.tenancy.changes import Change, Feed
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.models import ChangeKind, Project, Tenant
from agentvoicebox.tenancy.personas import Character
from agentvoicebox.tenancy.voices import VoiceConfig

FEEDS = """
SELECT pid FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND query LIKE '%key_revocations%'
"""


class Told:
    """What a feed has told, and a way to wait for more."""

    def __init__(self, feed: Feed) -> None:
        self.changes: list[Change] = []
        self.gaps = 0
        self._more = asyncio.Event()
        feed.subscribe(self._add)
        feed.on_gap(self._gap)

    def _add(self, change: Change) -> None:
        self.changes.append(change)
        self._more.set()

    def _gap(self) -> None:
        self.gaps += 1
        self._more.set()

    def of(self, tenant_id: uuid.UUID) -> list[tuple[ChangeKind, uuid.UUID | None]]:
        return [(change.kind, change.key_id) for change in self.changes if change.tenant_id == tenant_id]

    async def until(self, enough: Callable[[], bool], seconds: float = 20) -> None:
        async with asyncio.timeout(seconds):
            while not enough():
                self._more.clear()
                await self._more.wait()


@pytest.fixture
async def new_feed(database: Database) -> AsyncIterator[Callable[[], Awaitable[Feed]]]:
    feeds: list[Feed] = []

    async def make() -> Feed:
        feeds.append(Feed(database))
        await feeds[-1].start()
        return feeds[-1]

    yield make
    for feed in feeds:
        await feed.close()


@pytest.fixture
async def feed(new_feed: Callable[[], Awaitable[Feed]]) -> Feed:
    return await new_feed()


@pytest.fixture
def told(feed: Feed) -> Told:
    return Told(feed)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a push can make a feed look before a test gives up."""
    monkeypatch.setattr(changes, "_POLL", 60.0)
    monkeypatch.setattr(changes, "_PATIENCE", 600.0)


async def system(database: Database, statement: str, **values: object) -> None:
    async with database.system() as session:
        await session.execute(text(statement), values)


@pytest.mark.usefixtures("patient")
async def test_a_push_hastens_the_next_look(
    database: Database, tenant: Tenant, new_feed: Callable[[], Awaitable[Feed]]
) -> None:
    told = Told(await new_feed())
    issued = await keys.issue(database, tenant.id, "a key")
    await keys.revoke(database, tenant.id, issued.id)
    await told.until(lambda: told.of(tenant.id) == [(ChangeKind.REVOKED, issued.id)])


@pytest.mark.usefixtures("patient")
async def test_no_push_gets_lost_while_the_log_is_read(
    database: Database, tenant: Tenant, new_feed: Callable[[], Awaitable[Feed]]
) -> None:
    """One that arrives with the answer to a look tells of what the look did not see."""
    told = Told(await new_feed())
    issued = [await keys.issue(database, tenant.id, f"key {number}") for number in range(120)]
    for some in range(0, len(issued), 4):
        await asyncio.gather(*(keys.revoke(database, tenant.id, one.id) for one in issued[some : some + 4]))
        await told.until(lambda seen=some + 4: len(told.of(tenant.id)) == seen)  # type: ignore[misc]
    assert {key_id for _, key_id in told.of(tenant.id)} == {one.id for one in issued}


async def test_without_a_push_it_is_seen_all_the_same(
    database: Database, tenant: Tenant, told: Told, admin: psycopg.AsyncConnection
) -> None:
    issued = await keys.issue(database, tenant.id, "a key")
    await admin.execute("ALTER TABLE key_revocations DISABLE TRIGGER announced")
    try:
        await keys.revoke(database, tenant.id, issued.id)
        await told.until(lambda: told.of(tenant.id) == [(ChangeKind.REVOKED, issued.id)])
    finally:
        await admin.execute("ALTER TABLE key_revocations ENABLE TRIGGER announced")


async def test_what_is_a_change(database: Database, tenant: Tenant, told: Told) -> None:
    issued = await keys.issue(database, tenant.id, "a key")
    of_key, of_tenant = (ChangeKind.CHANGED, issued.id), (ChangeKind.TENANT, None)
    key = "UPDATE api_keys SET {} WHERE id = :id"
    settings = "UPDATE tenant_settings SET session_timeout_minutes = 5 WHERE tenant_id = :id"
    for statement, subject, expected in (
        (key.format("scopes = '{usage}'"), issued.id, of_key),
        (key.format("rate_limit_tier = 'elevated'"), issued.id, of_key),
        (key.format("project_id = NULL"), issued.id, of_key),
        (key.format("expires_at = now() + interval '1 h'"), issued.id, of_key),
        (settings, tenant.id, of_tenant),
        ("UPDATE tenants SET tier = 'pro' WHERE id = :id", tenant.id, of_tenant),
        ("UPDATE tenants SET name = 'Another' WHERE id = :id", tenant.id, of_tenant),
        ("INSERT INTO key_revocations (tenant_id, kind) VALUES (:id, 'relations')", tenant.id, ("relations", None)),
        (key.format("revoked_at = now()"), issued.id, (ChangeKind.REVOKED, issued.id)),
    ):
        if statement is settings:
            await system(
                database, "INSERT INTO tenant_settings (tenant_id) VALUES (:id) ON CONFLICT DO NOTHING", id=tenant.id
            )
        count = len(told.of(tenant.id))
        await system(database, statement, id=subject)
        await told.until(lambda count=count: len(told.of(tenant.id)) > count)  # type: ignore[misc]
        assert told.of(tenant.id)[-1] == expected, statement


async def test_what_is_none(database: Database, tenant: Tenant, told: Told) -> None:
    """Uses, names and descriptions open nothing: nodes need not read the key again."""
    issued = await keys.issue(database, tenant.id, "a key")
    before = told.of(tenant.id)
    await system(database, "UPDATE api_keys SET usage_count = 7, last_used_at = now() WHERE id = :id", id=issued.id)
    await keys.update(database, tenant.id, issued.id, name="another", description="text")
    await system(database, "UPDATE tenants SET updated_at = now(), tier = tier WHERE id = :id", id=tenant.id)
    await keys.revoke(database, tenant.id, issued.id)  # told after all of the above
    await told.until(lambda: (ChangeKind.REVOKED, issued.id) in told.of(tenant.id))
    settings = [(ChangeKind.TENANT, None), (ChangeKind.VOICE, None)]  # of a tenant that was made a moment ago
    assert [change for change in told.of(tenant.id) if change not in [*before, *settings]] == [
        (ChangeKind.REVOKED, issued.id)
    ]


async def test_what_devices_go_by(database: Database, tenant: Tenant, other: Tenant, told: Told) -> None:
    """Every change of how the assistant sounds, listens and answers is told, and to no other tenant's nodes."""
    voice = (ChangeKind.VOICE, None)
    persona = await personas.create(database, tenant.id, Character("Ada"))
    project = await projects.create(database, tenant.id, "Upstairs")
    word = await wake_words.create(database, tenant.id, "alexa")
    await told.until(lambda: told.of(tenant.id).count(voice) >= 2)
    for change in (
        lambda: voices.put(database, tenant.id, VoiceConfig(voice="af_sarah")),
        lambda: voices.put(database, tenant.id, VoiceConfig(voice="af_bella")),
        lambda: personas.update(database, tenant.id, persona.id, {"system_prompt": "Be brief."}),
        lambda: personas.make_default(database, tenant.id, persona.id),
        lambda: personas.unmake_default(database, tenant.id, persona.id),
        lambda: personas.set_project_default(database, tenant.id, project.id, persona.id),
        lambda: personas.delete(database, tenant.id, persona.id),  # and the project's default with it
        lambda: wake_words.update(database, tenant.id, word.id, {"sensitivity": 0.75}),
        lambda: wake_words.remove(database, tenant.id, word.id),
        lambda: skills.set_settings(database, tenant.id, "a-skill", {"x": 1}),
        lambda: skills.set_settings(database, tenant.id, "a-skill", {"x": 2}),
        lambda: skills.set_settings(database, tenant.id, "a-skill", {}),
    ):
        before = told.of(tenant.id).count(voice)
        await change()  # type: ignore[no-untyped-call]
        await told.until(lambda before=before: told.of(tenant.id).count(voice) > before)  # type: ignore[misc]
    assert told.of(other.id).count(voice) <= 1  # of its own beginning


async def test_what_devices_do_not_go_by(database: Database, tenant: Tenant, told: Told) -> None:
    persona = await personas.create(database, tenant.id, Character("Ada"))
    project = await projects.create(database, tenant.id, "Upstairs")
    issued = await keys.issue(database, tenant.id, "a key", project_id=project.id)
    await keys.update(database, tenant.id, issued.id, rate_class="elevated")
    await told.until(lambda: (ChangeKind.CHANGED, issued.id) in told.of(tenant.id))  # and all before it
    before = told.of(tenant.id)
    await personas.count_uses(database, {(tenant.id, persona.id): 7})
    await personas.update(database, tenant.id, persona.id, {"system_prompt": ""})
    await projects.update(database, tenant.id, project.id, name="Downstairs")
    device = await devices.arrive(database, tenant.id, issued.id, project.id)
    await devices.rename(database, tenant.id, device.id, "kitchen")
    await keys.revoke(database, tenant.id, issued.id)  # told after all of the above
    await told.until(lambda: (ChangeKind.REVOKED, issued.id) in told.of(tenant.id))
    assert told.of(tenant.id) == [*before, (ChangeKind.REVOKED, issued.id)]


async def test_what_a_later_release_writes_down(
    database: Database, tenant: Tenant, told: Told, admin: psycopg.AsyncConnection
) -> None:
    """While nodes are replaced one by one, the old ones take a change that they do not know for any change at all."""
    check = "CHECK (kind IN ('revoked', 'changed', 'tenant', 'relations', 'voice'))"
    await admin.execute("ALTER TABLE key_revocations DROP CONSTRAINT key_revocations_kind_check")
    try:
        await admin.execute("INSERT INTO key_revocations (tenant_id, kind) VALUES (%s, 'weather')", (tenant.id,))
        await told.until(lambda: (ChangeKind.TENANT, None) in told.of(tenant.id))
        assert told.gaps == 0
    finally:
        await admin.execute("DELETE FROM key_revocations WHERE kind = 'weather'")
        await admin.execute(f"ALTER TABLE key_revocations ADD CONSTRAINT key_revocations_kind_check {check}")


async def test_a_project_that_goes_changes_its_keys(database: Database, tenant: Tenant, told: Told) -> None:
    async with database.tenant(tenant.id) as session:
        project = Project(name="Passing")
        session.add(project)
    issued = await keys.issue(database, tenant.id, "a key", project_id=project.id)
    async with database.tenant(tenant.id) as session:
        await session.execute(text("DELETE FROM projects WHERE id = :id"), {"id": project.id})
    await told.until(lambda: (ChangeKind.CHANGED, issued.id) in told.of(tenant.id))
    assert (await keys.get(database, tenant.id, issued.id)).project_id is None


async def test_a_suspension_ends_every_good_key(database: Database, tenant: Tenant, told: Told) -> None:
    good, gone = [await keys.issue(database, tenant.id, name) for name in ("good", "gone")]
    await keys.revoke(database, tenant.id, gone.id)
    await told.until(lambda: (ChangeKind.REVOKED, gone.id) in told.of(tenant.id))
    await system(database, "UPDATE tenants SET status = 'suspended' WHERE id = :id", id=tenant.id)
    await told.until(lambda: (ChangeKind.REVOKED, good.id) in told.of(tenant.id))
    revoked = [key_id for kind, key_id in told.of(tenant.id) if kind == ChangeKind.REVOKED]
    assert revoked == [gone.id, good.id]


async def test_what_another_transaction_committed_late_is_not_missed(
    database: Database, tenant: Tenant, told: Told, admin: psycopg.AsyncConnection
) -> None:
    """Its number is the lower one, but a higher one was seen first; and that one is not told again."""
    early, late = [await keys.issue(database, tenant.id, name) for name in ("early", "late")]
    async with admin.transaction():
        await admin.execute("UPDATE api_keys SET revoked_at = now() WHERE id = %s", (early.id,))
        await system(database, "UPDATE api_keys SET revoked_at = now() WHERE id = :id", id=late.id)
        await told.until(lambda: (ChangeKind.REVOKED, late.id) in told.of(tenant.id))
        assert (ChangeKind.REVOKED, early.id) not in told.of(tenant.id)
    await told.until(lambda: (ChangeKind.REVOKED, early.id) in told.of(tenant.id))
    revoked = [key_id for kind, key_id in told.of(tenant.id) if kind == ChangeKind.REVOKED]
    assert revoked == [late.id, early.id]


async def test_history_is_not_told(database: Database, tenant: Tenant, new_feed: Callable[[], Awaitable[Feed]]) -> None:
    """A node that starts has cached nothing."""
    before, after = [await keys.issue(database, tenant.id, name) for name in ("before", "after")]
    await keys.revoke(database, tenant.id, before.id)
    told = Told(await new_feed())
    await keys.revoke(database, tenant.id, after.id)
    await told.until(lambda: bool(told.of(tenant.id)))
    assert told.of(tenant.id) == [(ChangeKind.REVOKED, after.id)]


async def test_history_is_not_told_while_an_older_transaction_goes_on(
    database: Database, tenant: Tenant, new_feed: Callable[[], Awaitable[Feed]], admin: psycopg.AsyncConnection
) -> None:
    """As the server's own one that cleans up: each look then sees again what was written since it began."""
    before, after = [await keys.issue(database, tenant.id, name) for name in ("before", "after")]
    async with admin.transaction():
        await admin.execute("SELECT pg_current_xact_id()")
        await keys.revoke(database, tenant.id, before.id)
        told = Told(await new_feed())
        await keys.revoke(database, tenant.id, after.id)
        await told.until(lambda: bool(told.of(tenant.id)))
        assert told.of(tenant.id) == [(ChangeKind.REVOKED, after.id)]


async def test_a_subscriber_that_fails_harms_nobody(
    database: Database, tenant: Tenant, feed: Feed, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: Change) -> None:
        raise LookupError("cache gone")

    feed.subscribe(broken)
    told = Told(feed)
    for name in ("one", "two"):
        issued = await keys.issue(database, tenant.id, name)
        await keys.revoke(database, tenant.id, issued.id)
        await told.until(lambda key_id=issued.id: (ChangeKind.REVOKED, key_id) in told.of(tenant.id))  # type: ignore[misc]
    assert "cache gone" in caplog.text


async def test_a_connection_that_breaks_is_replaced_and_the_gap_is_told(
    database: Database, tenant: Tenant, feed: Feed, told: Told, admin: psycopg.AsyncConnection
) -> None:
    issued = await keys.issue(database, tenant.id, "a key")
    await admin.execute(f"SELECT pg_terminate_backend(pid) FROM ({FEEDS}) AS feeds")
    await keys.revoke(database, tenant.id, issued.id)
    await told.until(lambda: bool(told.of(tenant.id)) and told.gaps == 1)
    assert told.of(tenant.id) == [(ChangeKind.REVOKED, issued.id)]


async def test_a_connection_that_hangs_is_replaced(
    database: Database,
    tenant: Tenant,
    feed: Feed,
    told: Told,
    admin: psycopg.AsyncConnection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(changes, "_PATIENCE", 0.5)
    issued = await keys.issue(database, tenant.id, "a key")
    pids = [pid for (pid,) in await (await admin.execute(FEEDS)).fetchall()]
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        await told.until(lambda: told.gaps > 0, 60)
        await keys.revoke(database, tenant.id, issued.id)
        await told.until(lambda: (ChangeKind.REVOKED, issued.id) in told.of(tenant.id))
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


async def test_old_lines_are_removed_a_few_at_a_time(
    database: Database,
    tenant: Tenant,
    admin: psycopg.AsyncConnection,
    new_feed: Callable[[], Awaitable[Feed]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(changes, "_PRUNED", 3)
    monkeypatch.setattr(changes, "_POLL", 0.01)
    await admin.execute("DELETE FROM key_revocations")
    line = "INSERT INTO key_revocations (tenant_id, kind, at) SELECT %s, 'tenant', now() - %s::interval FROM {}"
    await admin.execute(line.format("generate_series(1, 10)"), (tenant.id, "25 h"))
    await admin.execute(line.format("generate_series(1, 2)"), (tenant.id, "23 h"))
    await new_feed()
    async with asyncio.timeout(20):
        while await ages(admin) != [False, False]:
            await asyncio.sleep(0.01)


async def ages(admin: psycopg.AsyncConnection) -> list[bool]:
    cursor = await admin.execute("SELECT at < now() - interval '1 day' FROM key_revocations")
    return [old for (old,) in await cursor.fetchall()]


async def test_a_feed_that_is_closed_is_not_fresh(feed: Feed) -> None:
    assert feed.fresh_until > 0
    await feed.close()
    assert feed.fresh_until == 0.0


async def test_a_store_that_is_away_at_the_start() -> None:
    nowhere = Database(lambda role: f"postgresql://{role}@127.0.0.1:1/none")
    with pytest.raises(Unavailable):
        await Feed(nowhere).start()
    await nowhere.close()
