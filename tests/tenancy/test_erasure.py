"""Handing out all that is a tenant's, and making it go away."""

from __future__ import annotations

import asyncio
import json
import uuid
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import LargeBinary

from agentvoicebox.config.errors import Conflict, NotFound
from agentvoicebox.tenancy import (
    audit,
    devices,
    domains,
    erasure,
    keys,
    pairings,
    personas,
    projects,
    sessions,
    settings,
    skills,
    tenants,
    wake_words,
)
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.devices import DeviceEvent
from agentvoicebox.tenancy.models import PLATFORM, Base, EventType, Tenant
from agentvoicebox.tenancy.personas import Character
from agentvoicebox.tenancy.sessions import Event

MARK = "a7f3-what-was-said"
"""Stands in everything that is somebody's."""

TABLES_WITH_A_TENANT = """
SELECT DISTINCT c.relname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
WHERE a.attname = 'tenant_id' AND NOT a.attisdropped AND c.relkind IN ('r', 'p') AND NOT c.relispartition
  AND c.relnamespace = 'public'::regnamespace
"""


async def tables(admin: psycopg.AsyncConnection) -> set[str]:
    return {name for (name,) in await (await admin.execute(TABLES_WITH_A_TENANT)).fetchall()}


async def rows(admin: psycopg.AsyncConnection, tenant: Tenant) -> dict[str, int]:
    """How many rows each table has of the tenant, as the superuser sees it."""
    found = {}
    for name in sorted(await tables(admin)):
        query = sql.SQL("SELECT count(*) FROM {} WHERE tenant_id = %s").format(sql.Identifier(name))
        row = await (await admin.execute(query, (tenant.id,))).fetchone()
        found[name] = row[0] if row else 0
    return found


async def person(admin: psycopg.AsyncConnection, *of: Tenant, staff: bool = False) -> uuid.UUID:
    user = uuid.uuid4()
    await admin.execute(
        "INSERT INTO users (id, email, first_name, last_name, keycloak_id, is_staff) VALUES (%s, %s, %s, %s, %s, %s)",
        (user, f"{MARK}-{user}@example.com", MARK, MARK, f"{MARK}-{user}", staff),
    )
    for tenant in of:
        await admin.execute("INSERT INTO members (tenant_id, user_id) VALUES (%s, %s)", (tenant.id, user))
        await admin.execute(
            "INSERT INTO relations (tenant_id, resource_type, resource_id, relation, subject_type, subject_id) "
            "VALUES (%s, 'tenant', %s, 'admin', 'user', %s)",
            (tenant.id, str(tenant.id), str(user)),
        )
    return user


async def fill(database: Database, admin: psycopg.AsyncConnection, tenant: Tenant) -> None:
    """A row of the tenant's in every table there is."""
    await tenants.describe(database, tenant.id, name=MARK, email=f"{MARK}@example.com")
    await settings.patch(database, tenant.id, {"webhook_url": f"https://{MARK}.example.com/"})
    await domains.add(database, tenant.id, f"{MARK}.example.com")
    project = await projects.create(database, tenant.id, MARK, config={"x": MARK})
    persona = await personas.create(database, tenant.id, Character(MARK, system_prompt=MARK, knowledge=MARK))
    await personas.set_project_default(database, tenant.id, project.id, persona.id)
    place = await projects.add_environment(database, tenant.id, project.id, MARK)
    await projects.deploy(database, tenant.id, place.id, MARK)
    key = await keys.issue(database, tenant.id, MARK, project_id=project.id)
    made = await sessions.create(
        database, tenant.id, project_id=project.id, api_key_id=key.id, config={"x": MARK}, user_agent=MARK
    )
    await sessions.record(database, tenant.id, made.id, [Event(0, EventType.TRANSCRIPT, {"text": MARK})])
    device = await devices.arrive(database, tenant.id, key.id, project.id, MARK, MARK)
    event = DeviceEvent(uuid.uuid4(), "stt", datetime.now(UTC), engine=MARK, reason=MARK)
    await devices.record(database, tenant.id, device.id, [event])
    await wake_words.create(database, tenant.id, f"hey {MARK}")
    await skills.set_settings(database, tenant.id, f"skill-{MARK}", {MARK: MARK})
    await keys.revoke(database, tenant.id, key.id)
    of_the_tenant = {"tenant": tenant.id, "mark": MARK, "nonce": bytes(12), "sealed": bytes(48)}
    for statement in (
        "INSERT INTO invitations (tenant_id, id, email, role, token_hash, expires_at) "
        "VALUES (%(tenant)s, gen_random_uuid(), %(mark)s || '@example.com', 'viewer', %(mark)s || %(tenant)s, now())",
        "INSERT INTO data_keys (tenant_id, version, master_id, nonce, wrapped) "
        "VALUES (%(tenant)s, 1, 'master', %(nonce)s, %(sealed)s)",
        "INSERT INTO secrets (tenant_id, kind, name, version, data_key, nonce, sealed) "
        "VALUES (%(tenant)s, 'byok', %(mark)s, 1, 1, %(nonce)s, %(sealed)s)",
        "INSERT INTO secret_versions (tenant_id, kind, name, version) VALUES (%(tenant)s, 'byok', %(mark)s, 1)",
        "INSERT INTO usage_events (tenant_id, event_id, metric, quantity, at) "
        "VALUES (%(tenant)s, 'one', 'api_calls', 1, now())",
        "INSERT INTO usage_minutes (tenant_id, metric, minute, project_id, quantity, events) "
        "VALUES (%(tenant)s, 'api_calls', now(), gen_random_uuid(), 1, 1)",
        "INSERT INTO usage_outbox"
        " (tenant_id, id, transaction_id, metric, window_start, window_seconds, quantity, events)"
        " VALUES (%(tenant)s, gen_random_uuid(), 'one', 'api_calls', now(), 60, 1, 1)",
    ):
        await admin.execute(statement, of_the_tenant)


@pytest.fixture
async def full(database: Database, admin: psycopg.AsyncConnection, tenant: Tenant) -> Tenant:
    await fill(database, admin, tenant)
    await person(admin, tenant)
    return tenant


async def exported(database: Database, tenant: Tenant) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    async for name, row in erasure.export(database, tenant.id):
        found.setdefault(name, []).append(row)
    return found


async def test_this_module_knows_every_table(admin: psycopg.AsyncConnection, full: Tenant) -> None:
    """A new table needs a row in `fill`, so that what follows is shown of it too."""
    empty = {name for name, count in (await rows(admin, full)).items() if count == 0}
    assert empty <= {"audit_anchors"}, "fill them above"
    assert {table.name for table in erasure.owned()} == await tables(admin)
    named = erasure.EVIDENCE | erasure.UNTOLD
    assert named < await tables(admin)


def test_no_secret_is_told_unless_somebody_says_so() -> None:
    suspicious = {
        (table.name, column.name)
        for table in erasure.owned()
        for column in table.columns
        if isinstance(column.type, LargeBinary) or column.name.endswith(("token", "hash", "secret", "password"))
    }
    chained = {
        (name, each) for name in ("audit_log", "audit_heads", "audit_anchors") for each in ("prev", "hash", "digest")
    }
    assert suspicious - chained == erasure.SECRET


class TestExport:
    """All that is the tenant's, and nothing else."""

    async def test_cmp_01_every_row_is_in_it(
        self, database: Database, admin: psycopg.AsyncConnection, full: Tenant, other: Tenant
    ) -> None:
        await fill(database, admin, other)
        await person(admin, other)
        found = await exported(database, full)
        counts = {name: len(each) for name, each in found.items()}
        expected = {name: count for name, count in (await rows(admin, full)).items() if count}
        for name in erasure.UNTOLD:
            del expected[name]
        assert counts == {"tenants": 1, "users": 1, **expected}
        for name, each in found.items():
            owners = {row["tenant_id"] for row in each} if "tenant_id" in each[0] else set()
            assert owners <= {full.id}, name
        assert found["tenants"][0]["name"] == MARK
        assert found["session_events"][0]["content"] == {"text": MARK}
        assert str(other.id) not in json.dumps(found, default=str)

    async def test_no_secret_is_in_it(self, database: Database, full: Tenant) -> None:
        found = await exported(database, full)
        for name, column in erasure.SECRET:
            assert column not in found[name][0], name
        assert found["api_keys"][0]["key_prefix"].startswith("avb_")
        assert set(found["users"][0]) == {"id", "email", "first_name", "last_name", "is_active", "last_login"}

    async def test_it_is_of_one_moment(self, database: Database, full: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(erasure, "_ROWS", 1)
        before = (await rows_of(database, full))["sessions"]
        seen = 0
        async with aclosing(erasure.export(database, full.id)) as found:
            async for name, _ in found:
                if name == "tenants":
                    await sessions.create(database, full.id)
                seen += name == "sessions"
        assert seen == before

    async def test_who_stops_reading_leaves_nothing_open(
        self, database: Database, admin: psycopg.AsyncConnection, full: Tenant
    ) -> None:
        async with aclosing(erasure.export(database, full.id)) as found:
            await anext(found)
        await (await admin.execute("SELECT 1")).fetchone()
        cursor = await admin.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND usename = 'avb_app' "
            "AND state = 'idle in transaction'"
        )
        assert await cursor.fetchone() == (0,)

    async def test_of_nobody(self, database: Database) -> None:
        with pytest.raises(NotFound):
            async for _ in erasure.export(database, uuid.uuid4()):
                pass


async def rows_of(database: Database, tenant: Tenant) -> dict[str, int]:
    return {name: len(each) for name, each in (await exported(database, tenant)).items()}


class TestErase:
    """What stays of a tenant when its data are gone."""

    async def test_cmp_05_only_evidence_stays(
        self, database: Database, admin: psycopg.AsyncConnection, full: Tenant, other: Tenant
    ) -> None:
        await fill(database, admin, other)
        theirs = await rows(admin, other)
        await tenants.delete(database, full.id)
        gone = await erasure.erase(database, full.id)
        left = {name for name, count in (await rows(admin, full)).items() if count}
        assert left <= erasure.EVIDENCE
        assert {name for name, count in gone.items() if count} == await tables(admin) - erasure.EVIDENCE
        assert await rows(admin, other) == theirs
        row = await tenants.get(database, full.id)
        assert (row.name, row.slug, row.email, row.settings) == ("Erased", f"erased-{full.id}", "", {})
        assert (row.status, row.suspension_reason) == ("deleted", "")
        assert row.erased_at is not None

    async def test_nothing_that_was_said_or_given_stays(
        self, database: Database, admin: psycopg.AsyncConnection, full: Tenant
    ) -> None:
        """Only the audit log knows names, until its own retention takes it."""
        await tenants.delete(database, full.id)
        await erasure.erase(database, full.id)
        for name in sorted(set(Base.metadata.tables) - {"audit_log"}):
            query = sql.SQL("SELECT count(*) FROM {} t WHERE t::text LIKE %s AND t::text LIKE %s")
            cursor = await admin.execute(query.format(sql.Identifier(name)), (f"%{MARK}%", f"%{full.id}%"))
            assert await cursor.fetchone() == (0,), name

    async def test_the_audit_log_tells_of_it(
        self, database: Database, admin: psycopg.AsyncConnection, full: Tenant
    ) -> None:
        await tenants.delete(database, full.id)
        await erasure.erase(database, full.id)
        cursor = await admin.execute(
            "SELECT description, metadata FROM audit_log WHERE tenant_id = %s ORDER BY seq DESC LIMIT 2", (full.id,)
        )
        (last, details), (before, _) = await cursor.fetchall()
        assert (before, last) == ("Began to erase its data", "Erased its data")
        assert details["rows"]["session_events"] == 1

    async def test_devices_that_were_just_paired_are_forgotten(
        self, database: Database, admin: psycopg.AsyncConnection, tenant: Tenant, other: Tenant
    ) -> None:
        """Their pairings are of no tenant while they wait, and of one for ten minutes more."""
        for each in (tenant, other):
            digest = uuid.uuid4().hex * 2
            waiting = await pairings.begin(database, digest, MARK, "192.0.2.1", key_prefix="avb_12345678")
            await pairings.claim(database, each.id, waiting.code)
        await tenants.delete(database, tenant.id)
        await erasure.erase(database, tenant.id)
        cursor = await admin.execute(
            "SELECT claimed_by FROM pairings WHERE claimed_by = ANY(%s)", ([tenant.id, other.id],)
        )
        assert await cursor.fetchall() == [(other.id,)]

    async def test_only_what_is_deleted_can_be_erased(
        self, database: Database, admin: psycopg.AsyncConnection, full: Tenant
    ) -> None:
        before = await rows(admin, full)
        with pytest.raises(Conflict):
            await erasure.erase(database, full.id)
        await tenants.suspend(database, full.id, "unpaid")
        with pytest.raises(Conflict):
            await erasure.erase(database, full.id)
        assert (await rows(admin, full))["session_events"] == before["session_events"]
        with pytest.raises(NotFound):
            await erasure.erase(database, uuid.uuid4())

    async def test_there_is_no_way_back(self, database: Database, full: Tenant) -> None:
        slug = full.slug
        await tenants.delete(database, full.id)
        await erasure.erase(database, full.id)
        with pytest.raises(Conflict) as caught:
            await tenants.activate(database, full.id)
        assert caught.value.code == "tenant_erased"
        assert (await tenants.create(database, slug, "Somebody else")).slug == slug

    async def test_people_of_no_other_tenant_lose_their_names(
        self, database: Database, admin: psycopg.AsyncConnection, tenant: Tenant, other: Tenant
    ) -> None:
        only_here, in_both = await person(admin, tenant), await person(admin, tenant, other)
        left_there, of_ours = await person(admin, tenant, other), await person(admin, tenant, staff=True)
        leave = "UPDATE members SET status = 'removed' WHERE tenant_id = %s AND user_id = %s"
        await admin.execute(leave, (other.id, left_there))
        await tenants.delete(database, tenant.id)
        await erasure.erase(database, tenant.id)
        cursor = await admin.execute(
            "SELECT id, email, first_name || last_name || coalesce(keycloak_id, ''), is_active "
            "FROM users WHERE id = ANY(%s)",
            ([only_here, in_both, left_there, of_ours],),
        )
        found = {user: (email, names, active) for user, email, names, active in await cursor.fetchall()}
        for user in (only_here, left_there):
            assert found[user] == (f"erased-{user}@invalid", "", False)
        for user in (in_both, of_ours):
            assert found[user] == (f"{MARK}-{user}@example.com", f"{MARK}{MARK}{MARK}-{user}", True)

    async def test_who_belongs_to_the_platform_keeps_their_names(
        self, database: Database, admin: psycopg.AsyncConnection, tenant: Tenant
    ) -> None:
        user = await person(admin, tenant)
        await admin.execute(
            "INSERT INTO relations (tenant_id, resource_type, resource_id, relation, subject_type, subject_id) "
            "VALUES (%s, 'platform', 'platform', 'sysadmin', 'user', %s)",
            (PLATFORM, str(user)),
        )
        await tenants.delete(database, tenant.id)
        await erasure.erase(database, tenant.id)
        cursor = await admin.execute("SELECT email, is_active FROM users WHERE id = %s", (user,))
        assert await cursor.fetchone() == (f"{MARK}-{user}@example.com", True)

    async def test_people_of_two_that_are_erased_at_once_lose_their_names(
        self,
        database: Database,
        admin: psycopg.AsyncConnection,
        tenant: Tenant,
        other: Tenant,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        user = await person(admin, tenant, other)
        for each in (tenant, other):
            await tenants.delete(database, each.id)
        real, reached, go_on = audit.append, asyncio.Event(), asyncio.Event()

        async def slow(*arguments: Any, **more: Any) -> None:
            await real(*arguments, **more)
            if arguments[3] == tenant.id and not reached.is_set():
                reached.set()
                await go_on.wait()

        monkeypatch.setattr(audit, "append", slow)
        first = asyncio.create_task(erasure.erase(database, tenant.id))
        await reached.wait()
        second = asyncio.create_task(erasure.erase(database, other.id))
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        while not second.done() and await (await admin.execute(waiting)).fetchone() == (0,):
            await asyncio.sleep(0.01)
        go_on.set()
        await asyncio.gather(first, second)
        cursor = await admin.execute("SELECT email FROM users WHERE id = %s", (user,))
        assert await cursor.fetchone() == (f"erased-{user}@invalid",)

    async def test_after_a_crash_it_is_finished_by_calling_it_again(
        self, database: Database, admin: psycopg.AsyncConnection, full: Tenant, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await tenants.delete(database, full.id)
        real, left = erasure._delete, [5]

        async def crash(*arguments: Any) -> int:
            left[0] -= 1
            if left[0] < 0:
                raise asyncio.CancelledError
            return await real(*arguments)

        before = await rows(admin, full)
        with monkeypatch.context() as patch:
            patch.setattr(erasure, "_delete", crash)
            with pytest.raises(asyncio.CancelledError):
                await erasure.erase(database, full.id)
        after = await rows(admin, full)
        assert {name: after[name] for name in after if name not in erasure.EVIDENCE} == {
            name: before[name] for name in before if name not in erasure.EVIDENCE
        }
        with pytest.raises(Conflict):
            await tenants.activate(database, full.id)
        for _ in range(2):
            await erasure.erase(database, full.id)
        assert {name for name, count in (await rows(admin, full)).items() if count} <= erasure.EVIDENCE

    async def test_the_keeper_reaches_the_bound_tenant_only(
        self, database: Database, admin: psycopg.AsyncConnection, full: Tenant, other: Tenant
    ) -> None:
        await fill(database, admin, other)
        keeper = await database.connect("avb_keeper")
        async with keeper.transaction(force_rollback=True):
            await keeper.execute("SELECT set_config('app.tenant_id', %s, true)", (str(full.id),))
            cursor = await keeper.execute("DELETE FROM session_events")
            assert cursor.rowcount == 1
        for forbidden in (
            "UPDATE tenants SET max_users = 1",
            "UPDATE tenants SET status = 'active'",
            "DELETE FROM audit_log",
            "DELETE FROM usage_events",
            "DELETE FROM tenants",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                await keeper.execute(forbidden)
        with pytest.raises(psycopg.Error) as caught:
            await keeper.execute("DELETE FROM session_events")
        assert caught.value.sqlstate == "AV001"
        await keeper.close()
