"""The schema goes up, down and up again, from nothing and from the release before, while nodes are at work on it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from agentvoicebox.config.errors import BadInput, Unavailable
from agentvoicebox.tenancy import database as stores
from agentvoicebox.tenancy import migrations, roles, tenants
from agentvoicebox.tenancy.database import Address, Database, external, prepare
from agentvoicebox.tenancy.models import Base

RELEASED = "0001"
"""The schema of the release before."""

TABLES_OF_TENANTS = """
SELECT c.relname, c.relrowsecurity, c.relforcerowsecurity,
       (SELECT count(*) FROM pg_policy p WHERE p.polrelid = c.oid AND p.polname = 'tenant_isolation'),
       pg_get_userbyid(c.relowner)
FROM pg_class c
WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relnamespace = 'public'::regnamespace
  AND (c.relname = 'tenants' OR EXISTS (
      SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attname = 'tenant_id' AND NOT a.attisdropped))
"""
WITHOUT_A_TENANT = {"users", "usage_marks", "pairings"}
"""People work for several tenants, and see to it that a tenant sees its members only (test_attacks); the marks of the
outbox, and devices that nobody has claimed yet, are the system's own."""

PARTITIONS = """
SELECT c.relname, c.relrowsecurity, c.relforcerowsecurity, pg_get_userbyid(c.relowner),
       EXISTS (SELECT FROM aclexplode(c.relacl) WHERE grantee <> c.relowner)
FROM pg_class c WHERE c.relispartition AND c.relkind = 'r' AND c.relnamespace = 'public'::regnamespace
"""
VIEWS = """
SELECT relname, relkind, coalesce('security_invoker=true' = ANY(reloptions), false)
FROM pg_class WHERE relkind IN ('v', 'm') AND relnamespace = 'public'::regnamespace
"""
KEYS_NOT_BEGINNING_WITH_THE_TENANT = """
SELECT conrelid::regclass::text, conname FROM pg_constraint
WHERE connamespace = 'public'::regnamespace AND contype IN ('p', 'f')
  AND conrelid::regclass::text NOT IN ('tenants', 'users', 'usage_marks', 'pairings', 'alembic_version')
  AND (SELECT attname FROM pg_attribute WHERE attrelid = conrelid AND attnum = conkey[1]) <> 'tenant_id'
"""
FILES = """
SELECT relname, relfilenode, oid FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace
  AND relname <> 'alembic_version'
"""
INDEXES = """
SELECT indexname FROM pg_indexes WHERE schemaname = 'public' AND tablename = ANY(%s)
"""
MADE_UNDER_A_LOCK = {
    "usage_events_seq_idx": "only where the ledger is small",
    "usage_minutes_minute_idx": "only where the ledger is small",
}

A, B = uuid.uuid4(), uuid.uuid4()
ROWS_OF_A_TENANT = """
INSERT INTO tenants (id, name, slug, tier, status, max_users, max_projects, max_api_keys, max_sessions_per_month)
    VALUES (%(tenant)s, 'A tenant', %(tenant)s::text, 'free', 'active', 3, 1, 5, 100);
INSERT INTO projects (tenant_id, id, name, is_default) VALUES (%(tenant)s, %(id)s, 'Default', true);
INSERT INTO api_keys (tenant_id, id, project_id, name, key_prefix, key_hash, scopes)
    VALUES (%(tenant)s, %(id)s, %(id)s, 'a key', 'avb_12345678', md5(%(tenant)s::text) || md5('x'), '{realtime}');
INSERT INTO key_revocations (tenant_id, key_id) VALUES (%(tenant)s, %(id)s);
INSERT INTO sessions (tenant_id, id, project_id, api_key_id, status, client_ip)
    VALUES (%(tenant)s, %(id)s, %(id)s, %(id)s, 'active', '192.0.2.1');
INSERT INTO session_events (tenant_id, session_id, sequence, event_type, content)
    VALUES (%(tenant)s, %(id)s, 0, 'transcript', '{"text": "hello"}');
INSERT INTO voice_configs (tenant_id, voice, speed, language, wake_word, persona_name, disabled_skills, stt, tts)
    VALUES (%(tenant)s, 'a', 1, 'en-US', 'hey', 'P', '{}', 'auto', 'auto');
INSERT INTO usage_events (tenant_id, event_id, metric, quantity, at) VALUES (%(tenant)s, 'e', 'api_calls', 1, now());
INSERT INTO usage_minutes (tenant_id, metric, minute, project_id, quantity, events)
    VALUES (%(tenant)s, 'api_calls', date_trunc('minute', now()), %(id)s, 1, 1);
"""
RELEASED_TABLES = (
    "tenants",
    "projects",
    "api_keys",
    "key_revocations",
    "sessions",
    "session_events",
    "voice_configs",
    "usage_events",
    "usage_minutes",
)
# What a node of the release before says while others have the new schema already.
STATEMENTS_OF_THE_RELEASE = (
    (roles.APP, "SELECT id, name, slug, tier, status, settings, max_users, created_at FROM tenants WHERE id = %(a)s"),
    (roles.APP, "SELECT id FROM projects WHERE is_default AND tenant_id = %(a)s"),
    (
        roles.APP,
        "INSERT INTO api_keys (tenant_id, id, project_id, name, key_prefix, key_hash, scopes) VALUES "
        "(%(a)s, %(new)s, %(id)s, 'new', 'avb_12345678', %(digest)s, '{realtime}') RETURNING created_at, usage_count",
    ),
    (roles.APP, "UPDATE api_keys SET revoked_at = now(), updated_at = now() WHERE id = %(new)s RETURNING id"),
    (
        roles.APP,
        "INSERT INTO sessions (tenant_id, id, project_id, api_key_id, config, client_ip, user_agent) VALUES "
        "(%(a)s, %(new)s, %(id)s, %(id)s, '{}', '192.0.2.2', 'agent') RETURNING status, created_at",
    ),
    (roles.APP, "UPDATE sessions SET status = 'active', started_at = now() WHERE id = %(new)s RETURNING *"),
    (
        roles.APP,
        "INSERT INTO session_events (tenant_id, session_id, sequence, event_type, content, timestamp, duration_ms) "
        "VALUES (%(a)s, %(new)s, 0, 'response', '{}', now(), NULL) RETURNING 1",
    ),
    (
        roles.APP,
        "INSERT INTO voice_configs (tenant_id, voice, speed, language, wake_word, persona_name, disabled_skills, stt, "
        "tts) VALUES (%(a)s, 'b', 1, 'en-US', 'hey', 'P', '{}', 'auto', 'auto') ON CONFLICT (tenant_id) DO UPDATE SET "
        "voice = 'b', updated_at = now() RETURNING voice",
    ),
    (roles.APP, "SELECT metric, sum(quantity) FROM usage_minutes GROUP BY metric"),
    (
        roles.LEDGER,
        "WITH added AS (INSERT INTO usage_events (tenant_id, event_id, metric, quantity, at, session_id, project_id) "
        "VALUES (%(a)s, 'new', 'api_calls', 1, now(), %(new)s, NULL) ON CONFLICT DO NOTHING RETURNING *) "
        "INSERT INTO usage_minutes AS m (tenant_id, metric, minute, project_id, quantity, events) SELECT tenant_id, "
        "metric, date_trunc('minute', at), coalesce(project_id, %(id)s), sum(quantity), count(*) FROM added "
        "GROUP BY 1, 2, 3, 4 ON CONFLICT (tenant_id, metric, minute, project_id) DO UPDATE SET "
        "quantity = m.quantity + excluded.quantity, events = m.events + excluded.events RETURNING 1",
    ),
    (
        roles.SYSTEM,
        "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint, array(SELECT key_id FROM key_revocations "
        "WHERE xid >= 0 AND at > now() - interval '1 day')",
    ),
    (
        roles.SYSTEM,
        "SELECT api_keys.*, tenants.* FROM api_keys JOIN tenants ON tenants.id = api_keys.tenant_id "
        "WHERE key_hash = %(digest)s",
    ),
    (
        roles.SYSTEM,
        "INSERT INTO tenants (id, name, slug, tier, status, activated_at, max_users, max_projects, max_api_keys, "
        "max_sessions_per_month) VALUES (%(new)s, 'New', 'new', 'free', 'active', now(), 3, 1, 5, 100) RETURNING id",
    ),
    (
        roles.SYSTEM,
        "INSERT INTO projects (tenant_id, id, name, environment, is_default) VALUES "
        "(%(new)s, %(new)s, 'Default', 'production', true) RETURNING id",
    ),
    (roles.SYSTEM, "UPDATE sessions SET status = 'terminated', ended_at = now() WHERE status = 'active' RETURNING id"),
    (roles.SYSTEM, "UPDATE tenants SET status = 'suspended', suspended_at = now() WHERE id = %(a)s RETURNING id"),
)


class Site(Protocol):
    """See the conftest, which makes it."""

    address: Address
    superuser: str


@asynccontextmanager
async def superuser(site: Site) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    connection = await psycopg.AsyncConnection.connect(site.superuser, autocommit=True)
    try:
        yield connection
    finally:
        await connection.close()


async def migrate(site: Site, change: Callable[[Connection], None]) -> None:
    """Change the schema as `prepare` does, but to wherever `change` likes."""
    engine = engine_of(site.address)
    try:
        async with engine.begin() as connection:
            await connection.exec_driver_sql(roles.CREATE, execution_options={"no_parameters": True})
            await connection.exec_driver_sql(f"SET LOCAL ROLE {roles.OWNER}")
            await connection.run_sync(change)
    finally:
        await engine.dispose()


async def up_to(site: Site, revision: str) -> None:
    await migrate(site, lambda connection: command.upgrade(migrations.config(connection), revision))


async def down_to(site: Site, revision: str) -> None:
    await migrate(site, lambda connection: command.downgrade(migrations.config(connection), revision))


def engine_of(address: Address) -> AsyncEngine:
    async def connect() -> psycopg.AsyncConnection[Any]:
        return await psycopg.AsyncConnection.connect(address(roles.ADMIN))

    return create_async_engine("postgresql+psycopg://", async_creator=connect)


@pytest.fixture
async def released(empty: Site) -> Site:
    """A database of the release before, with rows of two tenants in every table."""
    await up_to(empty, RELEASED)
    async with superuser(empty) as connection:
        for tenant in (A, B):
            cursor = psycopg.AsyncClientCursor(connection)
            await cursor.execute(ROWS_OF_A_TENANT, {"tenant": tenant, "id": uuid.uuid4()})
    return empty


async def tables(site: Site) -> set[str]:
    async with superuser(site) as connection:
        cursor = await connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        return {name for (name,) in await cursor.fetchall()}


async def indexes(connection: psycopg.AsyncConnection[Any]) -> set[str]:
    """Those of the tables of the release before."""
    found = await connection.execute(INDEXES, (list(RELEASED_TABLES),))
    return {name for (name,) in await found.fetchall()}


async def contents(site: Site) -> dict[str, list[dict[str, Any]]]:
    """All rows of the tables of the release before."""
    found = {}
    async with superuser(site) as connection:
        for table in RELEASED_TABLES:
            rows = await connection.execute(f"SELECT to_jsonb(t) FROM {table} t ORDER BY to_jsonb(t)::text")
            found[table] = [row for (row,) in await rows.fetchall()]
    return found


async def test_every_table_with_a_tenant_is_protected(admin: psycopg.AsyncConnection) -> None:
    found = await (await admin.execute(TABLES_OF_TENANTS)).fetchall()
    assert {name for name, *_ in found} == set(Base.metadata.tables) - WITHOUT_A_TENANT
    for name, *protection in found:
        assert protection == [True, True, 1, "avb_owner"], name


async def test_an_unprotected_table_would_be_noticed(admin: psycopg.AsyncConnection) -> None:
    async with admin.transaction(force_rollback=True):
        await admin.execute("CREATE TABLE forgotten (tenant_id uuid)")
        found = {name: forced for name, _, forced, *_ in await (await admin.execute(TABLES_OF_TENANTS)).fetchall()}
        assert found["forgotten"] is False


async def test_nobody_reaches_a_partition_but_through_its_table(admin: psycopg.AsyncConnection) -> None:
    found = await (await admin.execute(PARTITIONS)).fetchall()
    assert len(found) >= 13
    for name, *protection in found:
        assert protection == [True, True, "avb_owner", False], name


async def test_views_look_with_the_eyes_of_who_asks(admin: psycopg.AsyncConnection) -> None:
    """Any other view shows what its owner may see; a materialized one shows everything to everybody."""
    async with admin.transaction(force_rollback=True):
        await admin.execute("CREATE VIEW careless AS SELECT * FROM projects")
        found = {name: (kind, invoker) for name, kind, invoker in await (await admin.execute(VIEWS)).fetchall()}
    assert found.pop("careless") == ("v", False)
    assert found == dict.fromkeys(found, ("v", True))


async def test_keys_begin_with_the_tenant(admin: psycopg.AsyncConnection) -> None:
    found = await (await admin.execute(KEYS_NOT_BEGINNING_WITH_THE_TENANT)).fetchall()
    assert found == [("members", "members_user_id_fkey")]  # people are the platform's


async def test_the_roles_are_what_they_should_be(admin: psycopg.AsyncConnection) -> None:
    cursor = await admin.execute(
        "SELECT rolname, rolsuper, rolbypassrls, rolcreaterole, rolcanlogin FROM pg_roles WHERE rolname = ANY(%s)",
        (list(roles.ALL),),
    )
    assert {name: attributes for name, *attributes in await cursor.fetchall()} == {
        "avb_owner": [False, False, False, False],
        "avb_app": [False, False, False, True],
        "avb_system": [False, True, False, True],
        "avb_ledger": [False, False, False, True],
        "avb_keeper": [False, False, False, True],
        "avb_cell": [False, False, False, True],
    }


async def test_models_and_tables_agree(address: Address) -> None:
    def is_ours(name: str | None, kind: str, _: object) -> bool:
        return kind != "table" or not (name or "").startswith("audit_log_")  # partitions have no model

    def differences(connection: Connection) -> list[object]:
        return compare_metadata(MigrationContext.configure(connection, opts={"include_name": is_ours}), Base.metadata)

    engine = engine_of(address)
    async with engine.connect() as connection:
        found = await connection.run_sync(differences)
    await engine.dispose()
    assert found == []


async def test_up_down_up(empty: Site) -> None:
    await prepare(empty.address)
    whole = await tables(empty)
    assert set(Base.metadata.tables) < whole
    await down_to(empty, "base")
    assert await tables(empty) == {"alembic_version"}
    async with superuser(empty) as connection:
        left = "SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
        assert await (await connection.execute(left)).fetchall() == []
    await prepare(empty.address)
    assert await tables(empty) == whole
    database = Database(empty.address)
    assert (await tenants.create(database, "after", "After all that")).slug == "after"
    await database.close()


async def test_several_at_once_migrate_once(empty: Site) -> None:
    await asyncio.gather(*(prepare(empty.address) for _ in range(4)))
    assert set(Base.metadata.tables) < await tables(empty)


async def test_a_start_makes_the_audit_months_that_are_missing(empty: Site) -> None:
    await prepare(empty.address)
    whole = await tables(empty)
    last = max(name for name in whole if name.startswith("audit_log_"))
    async with superuser(empty) as connection:
        await connection.execute(f"DROP TABLE {last}")
    await prepare(empty.address)
    assert await tables(empty) == whole


async def test_a_store_of_a_newer_release_is_left_alone(empty: Site) -> None:
    await prepare(empty.address)
    async with superuser(empty) as connection:
        await connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(Unavailable, match="newer"):
        await prepare(empty.address)


async def test_a_migration_that_fails_leaves_nothing(empty: Site) -> None:
    async with superuser(empty) as connection:
        await connection.execute("CREATE TABLE session_events (mine int)")
    with pytest.raises(Exception, match="session_events"):
        await prepare(empty.address)
    assert await tables(empty) == {"session_events"}


async def test_the_release_before_is_brought_up_with_all_its_rows(released: Site) -> None:
    before = await contents(released)
    assert {table: len(rows) for table, rows in before.items()} == dict.fromkeys(RELEASED_TABLES, 2)
    await prepare(released.address)
    after = await contents(released)
    for table, rows in before.items():
        assert [{name: now[name] for name in was} for was, now in zip(rows, after[table], strict=True)] == rows
    database = Database(released.address)
    assert (await tenants.get(database, A)).slug == str(A)
    await database.close()


async def test_a_node_of_the_release_before_goes_on_working(released: Site) -> None:
    await prepare(released.address)
    async with superuser(released) as connection:
        cursor = await connection.execute("SELECT id FROM projects WHERE tenant_id = %s", (A,))
        project = (await cursor.fetchall())[0][0]
    values = {"a": A, "id": project, "new": uuid.uuid4(), "digest": uuid.uuid4().hex * 2}
    for role, statement in STATEMENTS_OF_THE_RELEASE:
        async with await psycopg.AsyncConnection.connect(released.address(role)) as connection:
            if role == roles.APP:
                await connection.execute("SELECT set_config('app.tenant_id', %s, true)", (str(A),))
            cursor = await connection.execute(statement, {name: values[name] for name in values})
            assert await cursor.fetchall(), statement


async def test_what_stood_there_is_not_rewritten_nor_indexed_under_a_lock(released: Site) -> None:
    """Either would hold the table for as long as it has rows."""
    async with superuser(released) as connection:
        files = await (await connection.execute(FILES)).fetchall()
        assert {name for name, *_ in files} == set(RELEASED_TABLES)
        before = await indexes(connection)
        await up_to(released, migrations.HEAD)
        assert set(files) <= set(await (await connection.execute(FILES)).fetchall())
        assert await indexes(connection) - before <= set(MADE_UNDER_A_LOCK)
        await prepare(released.address)
        assert await indexes(connection) - before == set(migrations.INDEXES)


async def test_an_index_that_was_left_unfinished_is_made_again(empty: Site) -> None:
    await prepare(empty.address)
    valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'usage_events_seq_idx'::regclass"
    async with superuser(empty) as connection:
        await connection.execute(
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'usage_events_seq_idx'::regclass"
        )
        await prepare(empty.address)
        assert await (await connection.execute(valid)).fetchone() == (True,)


async def test_down_to_the_release_before_keeps_its_rows(released: Site) -> None:
    before, schema = await contents(released), await tables(released)
    await prepare(released.address)
    database = Database(released.address)
    made = await tenants.create(database, "new", "Made by the new release", "pro")
    await database.close()
    async with superuser(released) as connection:  # lines of kinds that the release before does not know
        for kind in ("changed", "tenant", "relations", "voice"):
            await connection.execute("INSERT INTO key_revocations (tenant_id, kind) VALUES (%s, %s)", (A, kind))
    await down_to(released, RELEASED)
    assert await tables(released) == schema
    after = await contents(released)
    assert [row for row in after["tenants"] if row["id"] != str(made.id)] == before["tenants"]
    for table in RELEASED_TABLES[1:]:
        assert [row for row in after[table] if row["tenant_id"] != str(made.id)] == before[table], table
    await prepare(released.address)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Migrations that wait only shortly for a table."""
    monkeypatch.setattr(stores, "LOCK_TIMEOUT", 0.1)
    monkeypatch.setattr(stores, "LOCK_PAUSE", 0.1)
    monkeypatch.setattr(stores, "LOCK_TRIES", 1000)
    return monkeypatch


async def test_a_migration_that_waits_for_a_table_lets_others_write(
    released: Site, impatient: pytest.MonkeyPatch
) -> None:
    """Whoever wants a table after somebody who waits for it alone waits too: it must not wait for long."""
    new_session = "INSERT INTO sessions (tenant_id, id) VALUES (%s, %s)"
    async with asyncio.timeout(60), superuser(released) as long, superuser(released) as writer:
        async with long.transaction():
            await long.execute("SELECT count(*) FROM sessions")
            migration = asyncio.create_task(prepare(released.address))
            async with superuser(released) as watcher:
                waits = "SELECT 1 FROM pg_locks WHERE relation = 'sessions'::regclass AND NOT granted"
                while not await (await watcher.execute(waits)).fetchone():
                    assert not migration.done()
            for _ in range(20):
                await writer.execute(new_session, (A, uuid.uuid4()))
            assert not migration.done()
        await migration
        cursor = await writer.execute("SELECT version_num FROM alembic_version")
        assert await cursor.fetchone() == (migrations.HEAD,)


async def test_a_transaction_that_never_ends_is_named(released: Site, impatient: pytest.MonkeyPatch) -> None:
    impatient.setattr(stores, "LOCK_TRIES", 2)
    before = await tables(released)
    async with superuser(released) as long, long.transaction():
        await long.execute("SELECT count(*) FROM sessions")
        with pytest.raises(Unavailable, match="long transaction"):
            await prepare(released.address)
        assert await tables(released) == before


def test_the_end_of_the_history_is_known() -> None:
    connection: Connection = None  # type: ignore[assignment]
    assert ScriptDirectory.from_config(migrations.config(connection)).get_heads() == [migrations.HEAD]


@pytest.fixture
def login(empty: Site) -> Iterator[str]:
    """A login of the operator's own, which owns the empty database and is nothing special."""
    name = f"operator_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(empty.superuser, autocommit=True) as connection:
        owner = connection.execute("SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = current_database()")
        (before,) = owner.fetchone() or ("",)
        connection.execute(roles.CREATE)  # of this server, where no other test may have run
        connection.execute(f"CREATE ROLE {name} LOGIN")
        connection.execute(f"ALTER DATABASE {connection.info.dbname} OWNER TO {name}")
        yield psycopg.conninfo.make_conninfo(empty.superuser, user=name)
        connection.execute(f"ALTER DATABASE {connection.info.dbname} OWNER TO {before}")
        connection.execute(f"DROP OWNED BY {name}")
        connection.execute(f"DROP ROLE {name}")


async def test_an_external_server_with_an_ordinary_login(login: str, empty: Site) -> None:
    with pytest.raises(Unavailable, match=r"roles\.CREATE.*GRANT avb_owner, .*avb_cell"):
        await prepare(external(login))
    assert await tables(empty) == set()
    name = psycopg.conninfo.conninfo_to_dict(login)["user"]
    async with superuser(empty) as connection:
        await connection.execute(f"GRANT {', '.join(roles.ALL)} TO {name}")
    await prepare(external(login))
    database = Database(external(login))
    mine = await tenants.create(database, "mine", "Mine")
    theirs = await tenants.create(database, "theirs", "Theirs")
    assert (await tenants.get(database, mine.id)).slug == "mine"
    connection = await database.connect(roles.LEDGER)
    assert await (await connection.execute("SELECT current_user, session_user")).fetchone() == (roles.LEDGER, name)
    await connection.close()
    app = await database.connect(roles.APP)
    await app.execute("SELECT set_config('app.tenant_id', %s, false)", (str(theirs.id),))
    assert await (await app.execute("SELECT slug FROM tenants")).fetchall() == [("theirs",)]
    await app.close()
    await database.close()


def test_addresses_keep_the_operators_own_options() -> None:
    address = external("postgresql://who:secret@db/name?sslmode=require&options=-c%20statement_timeout%3D5s")
    parts = psycopg.conninfo.conninfo_to_dict(address(roles.APP))
    assert parts["options"] == "-c statement_timeout=5s -c role=avb_app"
    assert (parts["sslmode"], parts["password"]) == ("require", "secret")


def test_every_role_may_have_a_login_of_its_own() -> None:
    address = external("postgresql://{role}@db/name")
    assert [psycopg.conninfo.conninfo_to_dict(address(role))["user"] for role in roles.ALL] == list(roles.ALL)
    assert "options" not in psycopg.conninfo.conninfo_to_dict(address(roles.APP))


def test_an_address_that_is_none() -> None:
    with pytest.raises(BadInput) as caught:
        external("mysql://somewhere")
    assert caught.value.param == "database"


async def test_a_server_that_refuses_is_named_with_its_reason() -> None:
    with pytest.raises(Unavailable, match="port 1"):
        await prepare(external("postgresql://who:secret@127.0.0.1:1/name"))
