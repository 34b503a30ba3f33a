"""The schema goes up, down and up again."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from agentvoicebox.config.errors import BadInput, Unavailable
from agentvoicebox.tenancy import migrations, roles, tenants
from agentvoicebox.tenancy.database import Address, Database, external, prepare
from agentvoicebox.tenancy.embedded import Postgres
from agentvoicebox.tenancy.models import Base

TABLES_OF_TENANTS = """
SELECT c.relname, c.relrowsecurity, c.relforcerowsecurity,
       (SELECT count(*) FROM pg_policy p WHERE p.polrelid = c.oid AND p.polname = 'tenant_isolation'),
       pg_get_userbyid(c.relowner)
FROM pg_class c
WHERE c.relkind IN ('r', 'p') AND c.relnamespace = 'public'::regnamespace
  AND (c.relname = 'tenants' OR EXISTS (
      SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attname = 'tenant_id' AND NOT a.attisdropped))
"""
KEYS_NOT_BEGINNING_WITH_THE_TENANT = """
SELECT conrelid::regclass::text, conname FROM pg_constraint
WHERE connamespace = 'public'::regnamespace AND contype IN ('p', 'f')
  AND conrelid::regclass::text NOT IN ('tenants', 'alembic_version')
  AND (SELECT attname FROM pg_attribute WHERE attrelid = conrelid AND attnum = conkey[1]) <> 'tenant_id'
"""


@pytest.fixture
def empty(server: Postgres, template: str) -> Iterator[Address]:
    """A database of nothing, on a server that knows the roles."""
    name = f"empty_{uuid.uuid4().hex}"
    with psycopg.connect(server.url(roles.ADMIN, "postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        yield lambda role: server.url(role, name)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def engine_of(address: Address) -> AsyncEngine:
    return create_async_engine(address(roles.ADMIN).replace("postgresql:", "postgresql+psycopg:", 1))


async def tables(address: Address) -> set[str]:
    async with await psycopg.AsyncConnection.connect(address(roles.ADMIN)) as connection:
        cursor = await connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        return {name for (name,) in await cursor.fetchall()}


async def test_every_table_with_a_tenant_is_protected(admin: psycopg.AsyncConnection) -> None:
    found = await (await admin.execute(TABLES_OF_TENANTS)).fetchall()
    assert {name for name, *_ in found} == set(Base.metadata.tables)
    for name, *protection in found:
        assert protection == [True, True, 1, "avb_owner"], name


async def test_an_unprotected_table_would_be_noticed(admin: psycopg.AsyncConnection) -> None:
    async with admin.transaction(force_rollback=True):
        await admin.execute("CREATE TABLE forgotten (tenant_id uuid)")
        found = {name: forced for name, _, forced, *_ in await (await admin.execute(TABLES_OF_TENANTS)).fetchall()}
        assert found["forgotten"] is False


async def test_keys_begin_with_the_tenant(admin: psycopg.AsyncConnection) -> None:
    assert await (await admin.execute(KEYS_NOT_BEGINNING_WITH_THE_TENANT)).fetchall() == []


async def test_the_roles_are_what_they_should_be(admin: psycopg.AsyncConnection) -> None:
    cursor = await admin.execute(
        "SELECT rolname, rolsuper, rolbypassrls, rolcreaterole, rolcanlogin FROM pg_roles "
        "WHERE rolname IN ('avb_owner', 'avb_app', 'avb_system', 'avb_ledger')"
    )
    assert {name: attributes for name, *attributes in await cursor.fetchall()} == {
        "avb_owner": [False, False, False, False],
        "avb_app": [False, False, False, True],
        "avb_system": [False, True, False, True],
        "avb_ledger": [False, False, False, True],
    }


async def test_models_and_tables_agree(address: Address) -> None:
    def differences(connection: Connection) -> list[object]:
        return compare_metadata(MigrationContext.configure(connection), Base.metadata)

    engine = engine_of(address)
    async with engine.connect() as connection:
        assert await connection.run_sync(differences) == []
    await engine.dispose()


async def test_up_down_up(empty: Address) -> None:
    await prepare(empty)
    whole = await tables(empty)
    assert set(Base.metadata.tables) < whole
    engine = engine_of(empty)
    async with engine.begin() as connection:
        await connection.run_sync(lambda sync: command.downgrade(migrations.config(sync), "base"))
    assert await tables(empty) == {"alembic_version"}
    await engine.dispose()
    await prepare(empty)
    assert await tables(empty) == whole
    database = Database(empty)
    assert (await tenants.create(database, "after", "After all that")).slug == "after"
    await database.close()


async def test_several_at_once_migrate_once(empty: Address) -> None:
    await asyncio.gather(*(prepare(empty) for _ in range(4)))
    assert set(Base.metadata.tables) < await tables(empty)


async def test_a_store_of_a_newer_release_is_left_alone(empty: Address) -> None:
    await prepare(empty)
    async with await psycopg.AsyncConnection.connect(empty(roles.ADMIN)) as connection:
        await connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(Unavailable, match="newer"):
        await prepare(empty)


async def test_a_migration_that_fails_leaves_nothing(empty: Address) -> None:
    async with await psycopg.AsyncConnection.connect(empty(roles.ADMIN)) as connection:
        await connection.execute("CREATE TABLE session_events (mine int)")
    with pytest.raises(Exception, match="session_events"):
        await prepare(empty)
    assert await tables(empty) == {"session_events"}


def test_the_end_of_the_history_is_known() -> None:
    connection: Connection = None  # type: ignore[assignment]
    assert ScriptDirectory.from_config(migrations.config(connection)).get_heads() == [migrations.HEAD]


@pytest.fixture
def login(server: Postgres, empty: Address) -> Iterator[str]:
    """A login of the operator's own, which owns the empty database and is nothing special."""
    name = f"operator_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(empty(roles.ADMIN), autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {name} LOGIN")
        connection.execute(f"ALTER DATABASE {connection.info.dbname} OWNER TO {name}")
        yield empty(name)
        connection.execute(f"ALTER DATABASE {connection.info.dbname} OWNER TO {roles.ADMIN}")
        connection.execute(f"DROP OWNED BY {name}")
        connection.execute(f"DROP ROLE {name}")


async def test_an_external_server_with_an_ordinary_login(login: str, empty: Address) -> None:
    with pytest.raises(Unavailable, match=r"roles\.CREATE"):
        await prepare(external(login))
    assert await tables(empty) == set()
    name = psycopg.conninfo.conninfo_to_dict(login)["user"]
    async with await psycopg.AsyncConnection.connect(empty(roles.ADMIN)) as connection:
        await connection.execute(f"GRANT avb_owner, avb_app, avb_system, avb_ledger TO {name}")
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


def test_an_address_that_is_none() -> None:
    with pytest.raises(BadInput) as caught:
        external("mysql://somewhere")
    assert caught.value.param == "database"


async def test_a_server_that_refuses_is_named_with_its_reason() -> None:
    with pytest.raises(Unavailable, match="port 1"):
        await prepare(external("postgresql://who:secret@127.0.0.1:1/name"))
