"""Whoever can run SQL for one tenant tries to reach another: on both servers, on every table, by every way we know.

The tables come from the models, so that one that is added is attacked too. The superuser puts a row for each of two
tenants into every table; the attacker has the application's role (or the keeper's) with the first tenant bound.
"""

from __future__ import annotations

import ast
import asyncio
import itertools
import random
import re
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Protocol

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg import sql
from psycopg.types.json import Jsonb
from sqlalchemy import Column, ForeignKeyConstraint, Index, Table, UniqueConstraint, delete, func, select, text, update
from sqlalchemy import types as kinds
from sqlalchemy.dialects.postgresql import ARRAY, INET, JSONB
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import aliased
from sqlalchemy.orm.exc import StaleDataError

from agentvoicebox.tenancy import roles
from agentvoicebox.tenancy.database import Address, Database, NoTenant, prepare, sqlstate
from agentvoicebox.tenancy.models import PLATFORM, Base, Project

ROOT = Path(__file__).parents[2]
NOT_ALLOWED = "42501"
NO_TENANT = "AV001"
MINE, THEIRS, NOBODYS = uuid.uuid4(), uuid.uuid4(), uuid.uuid4()
TABLES = {table.name: table for table in Base.metadata.sorted_tables}
OWNED = {name: table for name, table in TABLES.items() if "tenant_id" in table.c or name == "tenants"}
BOUND = (roles.APP, roles.KEEPER)
"""The roles that row security binds to a tenant."""
UNBOUND = {(roles.KEEPER, "audit_log")}
"""Who archives months sees old lines of all tenants, and no others; test_audit has more about it."""
LIKE_NO_OTHER = {"tenants": {"status": "active"}, "deployments": {"status": "failed"}}
"""What rows need beside what they must have: a tenant that is at work, a deployment that another one may replace."""

BYTES = {"nonce": 12, "wrapped": 48}
"""How long envelopes' parts must be."""

_months = itertools.count()

Row = dict[str, Any]
Rows = dict[str, dict[uuid.UUID, Row]]


class Site(Protocol):
    """See the conftest, which makes it."""

    address: Address
    superuser: str
    own_logins: Address


# --- two tenants with a row in every table ---


def value(column: Column[Any]) -> Any:
    """Something that no other row has, as far as the type has room for it."""
    kind = column.type
    if isinstance(kind, kinds.Enum):
        return kind.enums[-1]
    if isinstance(kind, kinds.String):
        return (uuid.uuid4().hex * 2)[: kind.length or 64]
    for types, make in (
        (kinds.Uuid, uuid.uuid4),
        (JSONB, lambda: Jsonb({})),
        (ARRAY, list),
        (INET, lambda: "192.0.2.1"),
        (kinds.Boolean, lambda: False),
        (kinds.Double, lambda: 1.0),
        (kinds.DateTime, lambda: datetime.now(UTC)),
        (kinds.Date, lambda: date(2100 + next(_months), 1, 1)),
        (kinds.LargeBinary, lambda: (uuid.uuid4().bytes * 3)[: BYTES.get(column.name, 32)]),
        ((kinds.Integer, kinds.Numeric), lambda: 1000),
    ):
        if isinstance(kind, types):  # type: ignore[arg-type]
            return make()
    raise AssertionError(f"No value is known for {column}: {kind!r}.")


def new_row(table: Table, tenant: uuid.UUID, rows: Rows) -> Row:
    """A row that the tenant might write: it refers to what the tenant has."""
    made = {
        column.name: value(column)
        for column in table.columns
        if not (column.nullable or column.server_default is not None or column.computed or column.identity)
    }
    for key in table.foreign_key_constraints:
        target = rows.get(key.referred_table.name, {}).get(tenant)
        for column, element in zip(key.columns, key.elements, strict=True):
            if target is not None and key.referred_table is not table:
                made[column.name] = target[element.column.name]
    return {**made, tenant_column(table): tenant, **LIKE_NO_OTHER.get(table.name, {})}


def tenant_column(table: Table) -> str:
    return "tenant_id" if "tenant_id" in table.c else "id"


def insertion(table: str, row: Mapping[str, Any]) -> sql.Composed:
    names = sql.SQL(", ").join(map(sql.Identifier, row))
    values = sql.SQL(", ").join(sql.Placeholder(name) for name in row)
    return sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(sql.Identifier(table), names, values)


@pytest.fixture(scope="module")
async def site(new_either: Site) -> Site:
    await prepare(new_either.address)
    return new_either


@pytest.fixture(scope="module")
async def rows(site: Site) -> Rows:
    """What the two have. Triggers and foreign keys are off, so that no rule of one table keeps another empty."""
    made: Rows = {}
    async with await psycopg.AsyncConnection.connect(site.superuser) as connection:
        await connection.execute("SET session_replication_role = replica")
        for name, table in TABLES.items():
            for tenant in (MINE, THEIRS):
                row = new_row(table, tenant, made)
                if "tenant_id" in row or name in ("tenants", "users"):
                    if name == "users":
                        row["id"] = uuid.uuid4()
                    if name == "devices":  # a key has one device: the attacker's own is kept for what is tried
                        row["api_key_id"] = uuid.uuid4()
                    await connection.execute(insertion(name, row), row)
                    made.setdefault(name, {})[tenant] = row
    assert set(made) == {*OWNED, "users"}
    async with await psycopg.AsyncConnection.connect(site.superuser, autocommit=True) as connection:
        await connection.execute("ANALYZE")
    return made


@pytest.fixture(scope="module")
async def database(site: Site) -> AsyncIterator[Database]:
    database = Database(site.address)
    yield database
    await database.close()


@pytest.fixture
async def admin(site: Site) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """The superuser, who sees through everything."""
    async with await psycopg.AsyncConnection.connect(site.superuser, autocommit=True) as connection:
        yield connection


@asynccontextmanager
async def attacker(
    site: Site, role: str = roles.APP, tenant: uuid.UUID | None = MINE
) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """A connection of a role with a tenant bound, as a request has one; each statement stands alone."""
    connection = await psycopg.AsyncConnection.connect(site.address(role), autocommit=True)
    try:
        if tenant is not None:
            await connection.execute("SELECT set_config('app.tenant_id', %s, false)", (str(tenant),))
        yield connection
    finally:
        await connection.close()


async def may(
    admin: psycopg.AsyncConnection[Any], role: str, table: str, right: str, columns: Iterator[str] | None = None
) -> bool:
    """Whether a role has a right on a table, or on all of some columns of it."""
    if columns is None:
        found = await admin.execute("SELECT has_table_privilege(%s, %s, %s)", (role, table, right))
        return bool((await found.fetchone() or (False,))[0])
    asked = "SELECT bool_and(has_column_privilege(%s, %s, name, %s)) FROM unnest(%s::text[]) name"
    found = await admin.execute(asked, (role, table, right, list(columns)))
    return bool((await found.fetchone() or (False,))[0])


async def outcome(
    connection: psycopg.AsyncConnection[Any], statement: Any, values: Any = None, *, undo: bool = True
) -> tuple[str, str, int, str]:
    """What a statement comes to: SQLSTATE, the constraint, how many rows, and what was seen."""
    try:
        async with connection.transaction(force_rollback=undo):
            cursor = await connection.execute(statement, values)
            seen = str(await cursor.fetchall()) if cursor.description else ""
            return "00000", "", cursor.rowcount, seen
    except psycopg.Error as error:
        return error.sqlstate or "", error.diag.constraint_name or "", 0, str(error)


async def standing(admin: psycopg.AsyncConnection[Any]) -> dict[str, list[Any]]:
    """The other tenant's rows, with the transaction that wrote each."""
    found = {}
    for name, table in OWNED.items():
        query = sql.SQL("SELECT xmin::text, to_jsonb(t) FROM {} t WHERE {} = %s").format(
            sql.Identifier(name), sql.Identifier(tenant_column(table))
        )
        found[name] = await (await admin.execute(query, (THEIRS,))).fetchall()
        assert found[name], name
    return found


# --- forgotten filters ---

READS = {
    "no filter": "SELECT t::text FROM {table} t",
    "the TABLE command": "TABLE {table}",
    "a filter for the other": "SELECT t::text FROM {table} t WHERE {tenant} = '{theirs}' OR {tenant} <> '{theirs}'",
    "a condition that is always true": "SELECT t::text FROM {table} t WHERE {tenant} = {tenant} OR true",
    "a subselect": "SELECT (SELECT string_agg(t::text, ' ') FROM {table} t)",
    "a common table expression": "WITH a AS MATERIALIZED (SELECT * FROM {table}) SELECT a::text FROM a",
    "a recursive one": (
        "WITH RECURSIVE a AS (SELECT t::text AS x, 1 AS n FROM {table} t UNION SELECT x, n + 1 FROM a WHERE n < 3) "
        "SELECT * FROM a"
    ),
    "a join with itself": "SELECT a::text, b::text FROM {table} a CROSS JOIN {table} b",
    "a lateral join": "SELECT l.* FROM (VALUES (1)) v (n), LATERAL (SELECT t::text FROM {table} t) l",
    "an outer join": "SELECT t::text FROM {table} t FULL JOIN (VALUES (NULL::uuid)) v (id) ON t.{tenant} = v.id",
    "a union": "SELECT t::text FROM {table} t UNION ALL SELECT t::text FROM {table} t",
    "a window": "SELECT string_agg(t::text, ' ') OVER () FROM {table} t",
    "a sample": "SELECT t::text FROM {table} t TABLESAMPLE SYSTEM (100)",
    "rows as JSON": "SELECT jsonb_agg(to_jsonb(t)) FROM {table} t",
    "an error that shows what it stumbled over": (
        "SELECT t::text FROM {table} t WHERE "
        "1 / (length({tenant}::text) - CASE WHEN {tenant} = '{theirs}' THEN 36 ELSE 35 END) = 1"
    ),
    "EXPLAIN": "EXPLAIN (ANALYZE, VERBOSE, COSTS) SELECT * FROM {table}",
}


@pytest.mark.parametrize("role", BOUND)
@pytest.mark.parametrize("way", READS)
async def test_reading_without_a_filter(
    site: Site, rows: Rows, admin: psycopg.AsyncConnection[Any], way: str, role: str
) -> None:
    tried = 0
    async with attacker(site, role) as connection:
        for name, table in OWNED.items():
            tenant = tenant_column(table)
            statement = READS[way].format(table=name, tenant=tenant, theirs=THEIRS)
            state, _, _, seen = await outcome(connection, statement.encode())
            if not await may(admin, role, name, "SELECT"):
                assert state == NOT_ALLOWED, name
                continue
            tried += 1
            assert state == "00000", (name, seen)
            assert str(THEIRS) not in seen, name
            assert way == "EXPLAIN" or (str(MINE) in seen) == ((role, name) not in UNBOUND), name
    assert tried >= 8


@pytest.mark.parametrize("role", BOUND)
async def test_reading_by_copy_cursor_and_prepared_statement(
    site: Site, rows: Rows, admin: psycopg.AsyncConnection[Any], role: str
) -> None:
    async with attacker(site, role) as connection:
        for name in OWNED:
            if (role, name) in UNBOUND or not await may(admin, role, name, "SELECT"):
                continue
            table = sql.Identifier(name)
            seen = []
            for copied in ("COPY {} TO STDOUT", "COPY (SELECT * FROM {}) TO STDOUT (FORMAT csv)"):
                async with connection.cursor() as cursor, cursor.copy(sql.SQL(copied).format(table)) as lines:
                    seen.append(b"".join([bytes(line) async for line in lines]).decode())
            async with connection.transaction(), connection.cursor("reader", scrollable=True) as cursor:
                await cursor.execute(sql.SQL("SELECT t::text FROM {} t").format(table))
                seen.append(str(await cursor.fetchall()))
            await connection.execute(sql.SQL("PREPARE p AS SELECT t::text FROM {} t").format(table))
            # Planned while one tenant was bound, and kept: what is shown is decided at each execution.
            for _ in range(7):
                seen.append(str(await (await connection.execute("EXECUTE p")).fetchall()))
            if name == "audit_log":
                assert seen.pop(0) == ""  # with row security COPY reads the table itself, not its partitions
            assert {(str(MINE) in each, str(THEIRS) in each) for each in seen} == {(True, False)}, name
            await connection.execute("SELECT set_config('app.tenant_id', %s, false)", (str(THEIRS),))
            assert str(MINE) not in str(await (await connection.execute("EXECUTE p")).fetchall()), name
            await connection.execute("SELECT set_config('app.tenant_id', %s, false)", (str(MINE),))
            await connection.execute("DEALLOCATE p")


async def test_reading_through_the_orm_and_core(
    database: Database, rows: Rows, admin: psycopg.AsyncConnection[Any]
) -> None:
    for mapper in Base.registry.mappers:
        entity, table = mapper.class_, mapper.local_table
        assert isinstance(table, Table)
        if table.name not in OWNED or not await may(admin, roles.APP, table.name, "SELECT"):
            continue
        tenant = table.c[tenant_column(table)]
        async with database.tenant(MINE) as session:
            found = (await session.execute(select(entity))).scalars().all()
            assert {getattr(row, tenant.name) for row in found} == {MINE}, table.name
            for query in (select(tenant), select(aliased(entity).tenant_id if tenant.name != "id" else tenant)):
                assert set((await session.execute(query)).scalars()) == {MINE}, table.name
            assert (await session.execute(select(tenant).where(tenant == THEIRS))).all() == []
            assert await session.scalar(select(func.count()).select_from(table)) == len(found)
            theirs = rows[table.name][THEIRS]
            if all(column.name in theirs for column in table.primary_key):
                key = tuple(theirs[column.name] for column in table.primary_key)
                assert await session.get(entity, key) is None, table.name


async def test_reading_through_a_view(site: Site, rows: Rows, admin: psycopg.AsyncConnection[Any]) -> None:
    views = "SELECT viewname FROM pg_views WHERE schemaname = 'public'"
    found = [name for (name,) in await (await admin.execute(views)).fetchall()]
    assert "tenant_overview" in found
    for name in found:
        query = sql.SQL("SELECT v::text FROM {} v").format(sql.Identifier(name))
        async with attacker(site) as connection:
            state, _, _, seen = await outcome(connection, query)
            assert (state, str(MINE) in seen, str(THEIRS) in seen) == ("00000", True, False), name
        for role, expected in ((roles.APP, NO_TENANT), (roles.CELL, NOT_ALLOWED), (roles.LEDGER, NOT_ALLOWED)):
            async with attacker(site, role, tenant=None) as connection:
                assert (await outcome(connection, query))[0] == expected, (name, role)


async def test_a_tenant_sees_those_people_only_who_are_its_members(site: Site, rows: Rows) -> None:
    async with attacker(site) as connection:
        found = await (await connection.execute("SELECT id, email FROM users")).fetchall()
        mine = rows["users"][MINE]
        assert found == [(mine["id"], mine["email"])]
        for hidden in ("*", "keycloak_id", "is_staff", "preferences"):
            state, *_ = await outcome(connection, sql.SQL("SELECT {} FROM users").format(sql.SQL(hidden)))
            assert state == NOT_ALLOWED, hidden


@pytest.mark.parametrize("role", BOUND)
async def test_reading_with_no_tenant_bound_is_an_error(
    site: Site, rows: Rows, admin: psycopg.AsyncConnection[Any], role: str
) -> None:
    async with attacker(site, role, tenant=None) as connection:
        for name in (*OWNED, "users"):
            state, *_ = await outcome(connection, sql.SQL("SELECT 1 FROM {}").format(sql.Identifier(name)))
            readable = await may(admin, role, name, "SELECT") or (name, role) == ("users", roles.APP)
            expected = NO_TENANT if readable else NOT_ALLOWED
            assert state == ("00000" if (role, name) in UNBOUND else expected), name


async def test_row_security_cannot_be_turned_off(site: Site, rows: Rows) -> None:
    async with attacker(site) as connection:
        await connection.execute("SET row_security = off")
        for name in ("projects", "sessions", "api_keys"):
            state, *_ = await outcome(connection, sql.SQL("SELECT 1 FROM {}").format(sql.Identifier(name)))
            assert state == NOT_ALLOWED, name  # instead of a result that leaves something out
        for name in OWNED:
            for change in ("DISABLE ROW LEVEL SECURITY", "NO FORCE ROW LEVEL SECURITY", "DISABLE TRIGGER ALL"):
                state, *_ = await outcome(
                    connection, sql.SQL("ALTER TABLE {} {}").format(sql.Identifier(name), sql.SQL(change))
                )
                assert state == NOT_ALLOWED, name
        assert (await outcome(connection, "SET session_replication_role = replica"))[0] == NOT_ALLOWED


async def test_what_the_planner_knows_of_the_values_is_not_shown(site: Site, rows: Rows) -> None:
    async with attacker(site) as connection:
        shown = "SELECT tablename FROM pg_stats WHERE schemaname = 'public' AND tablename = ANY(%s)"
        assert await (await connection.execute(shown, (list(OWNED),))).fetchall() == []
        for table in ("pg_statistic", "pg_authid", "pg_largeobject"):
            state, *_ = await outcome(connection, sql.SQL("SELECT 1 FROM {}").format(sql.Identifier(table)))
            assert state == NOT_ALLOWED, table


# --- changes ---

WRITES = {
    "a bulk update": "UPDATE {table} SET {column} = {column}",
    "a bulk update of the other's": "UPDATE {table} SET {column} = {column} WHERE {tenant} = '{theirs}'",
    "an update from a join": "UPDATE {table} t SET {column} = s.{column} FROM {table} s WHERE s.{tenant} = '{theirs}'",
    "an update of what a subselect finds": (
        "UPDATE {table} SET {column} = {column} WHERE ctid IN (SELECT ctid FROM {table} WHERE {tenant} <> '{mine}')"
    ),
    "a bulk delete": "DELETE FROM {table}",
    "a bulk delete of the other's": "DELETE FROM {table} WHERE {tenant} = '{theirs}'",
    "a delete by a join": "DELETE FROM {table} USING tenants t WHERE {table}.{tenant} = '{theirs}'",
    "a merge": (
        "MERGE INTO {table} t USING (VALUES ('{theirs}'::uuid)) v (id) ON t.{tenant} = v.id WHEN MATCHED THEN DELETE"
    ),
    "a merge that updates": (
        "MERGE INTO {table} t USING (VALUES ('{theirs}'::uuid)) v (id) ON t.{tenant} = v.id "
        "WHEN MATCHED THEN UPDATE SET {column} = t.{column}"
    ),
    "a deletion in a common table expression": "WITH gone AS (DELETE FROM {table} RETURNING *) SELECT * FROM gone",
    "taking rows over": "UPDATE {table} SET {tenant} = '{mine}' WHERE {tenant} = '{theirs}'",
    "TRUNCATE": "TRUNCATE {table} CASCADE",
    "a lock on the other's rows": "SELECT 1 FROM {table} WHERE {tenant} = '{theirs}' FOR UPDATE",
}
HARMLESS = {NOT_ALLOWED, "23503", "23514", "AV004"}
"""Not allowed; something still refers to it; counts only grow; the audit log is for ever."""


@pytest.mark.parametrize("role", BOUND)
@pytest.mark.parametrize("way", WRITES)
async def test_changing_without_a_filter(
    site: Site, rows: Rows, admin: psycopg.AsyncConnection[Any], way: str, role: str
) -> None:
    before = await standing(admin)
    only_theirs = "{theirs}" in WRITES[way] or "{mine}" in WRITES[way]
    async with attacker(site, role) as connection:
        for name, table in OWNED.items():
            columns = [c.name for c in table.c if not (c.primary_key or c.computed or c.foreign_keys or c.identity)]
            free = [c for c in columns if await may(admin, role, name, "UPDATE", iter([c]))]
            names = {
                "table": name,
                "tenant": tenant_column(table),
                "column": (free or columns or list(table.c.keys()))[0],
            }
            statement = WRITES[way].format(**names, mine=MINE, theirs=THEIRS)
            state, _, changed, seen = await outcome(connection, statement.encode(), undo=not only_theirs)
            assert state in HARMLESS or (state == "00000" and changed <= (0 if only_theirs else 1)), (name, state, seen)
            assert str(THEIRS) not in seen, name
    assert await standing(admin) == before


async def test_bulk_changes_through_the_orm_touch_own_rows_only(
    database: Database, rows: Rows, admin: psycopg.AsyncConnection[Any]
) -> None:
    before = await standing(admin)
    for statement in (
        update(Project).values(name="mine now"),
        update(Project.__table__).values(name="mine now"),
        update(Project).where(Project.tenant_id == THEIRS).values(name="mine now"),
        delete(Project).where(Project.tenant_id == THEIRS),
        delete(Project.__table__).where(Project.__table__.c.tenant_id == THEIRS),
        text("UPDATE projects SET name = 'mine now'"),
    ):
        async with database.tenant(MINE) as session:
            assert (await session.execute(statement)).rowcount <= 1  # type: ignore[attr-defined]
    assert await standing(admin) == before


async def insertable(admin: psycopg.AsyncConnection[Any], role: str, table: Table, row: Row) -> Row:
    """As much of a row as the role may write."""
    return {name: row[name] for name in row if await may(admin, role, table.name, "INSERT", iter([name]))}


async def test_inserting_for_another_tenant(site: Site, rows: Rows, admin: psycopg.AsyncConnection[Any]) -> None:
    """Refused, and in the same words whether there is such a tenant or not."""
    tried = 0
    async with attacker(site) as connection:
        for name, table in OWNED.items():
            tenant = tenant_column(table)
            answers = []
            for target in (THEIRS, NOBODYS):
                row = new_row(table, THEIRS, rows) | {tenant: target}
                row = await insertable(admin, roles.APP, table, row)
                if tenant not in row:
                    row = {tenant: target}
                for end in ("", " ON CONFLICT DO NOTHING"):
                    state, constraint, _, said = await outcome(connection, insertion(name, row) + sql.SQL(end), row)
                    assert state == NOT_ALLOWED, (name, end, said)
                    answers.append((state, constraint, said.replace(str(target), "")))
            assert len(set(answers[::2])) == 1, name
            assert len(set(answers[1::2])) == 1, name
            tried += "row-level security" in str(answers)
        assert tried >= 10


async def test_giving_ones_own_rows_away(site: Site, rows: Rows, admin: psycopg.AsyncConnection[Any]) -> None:
    async with attacker(site) as connection:
        for name, table in OWNED.items():
            moved = sql.SQL("UPDATE {} SET {} = %s").format(sql.Identifier(name), sql.Identifier(tenant_column(table)))
            assert (await outcome(connection, moved, (THEIRS,)))[0] in (NOT_ALLOWED, "23514"), name


async def test_upserting_onto_another_tenants_row(site: Site, rows: Rows, admin: psycopg.AsyncConnection[Any]) -> None:
    before = await standing(admin)
    async with attacker(site) as connection:
        for name, table in OWNED.items():
            row = await insertable(admin, roles.APP, table, rows[name][THEIRS])
            if not row:
                continue
            key = sql.SQL(", ").join(sql.Identifier(column.name) for column in table.primary_key)
            column = sql.Identifier(next(iter(row)))
            statement = insertion(name, row) + sql.SQL(" ON CONFLICT ({}) DO UPDATE SET {} = excluded.{}").format(
                key, column, column
            )
            assert (await outcome(connection, statement, row))[0] == NOT_ALLOWED, name
    assert await standing(admin) == before


async def test_copying_from_another_tenant(site: Site, rows: Rows, admin: psycopg.AsyncConnection[Any]) -> None:
    async with attacker(site) as connection:
        for name, table in OWNED.items():
            columns = [column.name for column in table.c if not (column.computed or column.identity)]
            free = [c for c in columns if await may(admin, roles.APP, name, "INSERT", iter([c]))]
            if not free or not await may(admin, roles.APP, name, "SELECT"):
                continue
            statement = sql.SQL("INSERT INTO {} ({}) SELECT {} FROM {} WHERE {} <> %s RETURNING 1").format(
                sql.Identifier(name),
                sql.SQL(", ").join(map(sql.Identifier, free)),
                sql.SQL(", ").join(map(sql.Identifier, free)),
                sql.Identifier(name),
                sql.Identifier(tenant_column(table)),
            )
            state, _, copied, said = await outcome(connection, statement, (MINE,))
            assert (state, copied) == ("00000", 0), (name, said)
            copying = sql.SQL("COPY {} FROM STDIN").format(sql.Identifier(name))
            with pytest.raises((psycopg.errors.FeatureNotSupported, psycopg.errors.InsufficientPrivilege)):
                async with connection.cursor() as cursor, cursor.copy(copying):
                    pass


# --- oracles: what an error tells of others ---

FOREIGN_KEYS = [
    (table.name, key)
    for table in OWNED.values()
    for key in sorted(table.foreign_key_constraints, key=lambda key: [c.name for c in key.columns])
    if len(key.columns) > 1
]


@pytest.mark.parametrize(("name", "key"), FOREIGN_KEYS, ids=lambda part: part if isinstance(part, str) else "")
async def test_referring_to_another_tenants_row(
    site: Site, rows: Rows, admin: psycopg.AsyncConnection[Any], name: str, key: ForeignKeyConstraint
) -> None:
    """An id of theirs is as unknown as one that nobody has."""
    table = OWNED[name]
    theirs = rows[key.referred_table.name][THEIRS]
    assert next(column.name for column in key.columns) == "tenant_id"
    answers = []
    async with attacker(site) as connection:
        for existing in (True, False):
            row = new_row(table, MINE, rows)
            for column, element in list(zip(key.columns, key.elements, strict=True))[1:]:
                strange = 999 if isinstance(element.column.type, kinds.Integer) else value(element.column)
                row[column.name] = theirs[element.column.name] if existing else strange
                if existing and isinstance(element.column.type, kinds.Integer):
                    row[column.name] = strange  # numbers are small: both have the same
            row = await insertable(admin, roles.APP, table, row)
            state, constraint, *_ = await outcome(connection, insertion(name, row), row)
            answers.append((state, constraint))
    assert answers[0] == answers[1]
    assert answers[0][0] in ("23503", NOT_ALLOWED)


def uniques(table: Table) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The names and columns of all that must be unique in a table."""
    yield f"{table.name}_pkey", tuple(column.name for column in table.primary_key)
    for constraint in table.constraints:
        if isinstance(constraint, UniqueConstraint):
            yield str(constraint.name), tuple(column.name for column in constraint.columns)
    for index in table.indexes:
        if isinstance(index, Index) and index.unique:
            yield str(index.name), tuple(column.name for column in index.columns) or ("an expression",)


UNIQUE_FOR_ALL = {
    "api_keys_key_hash_key": "digests of 32 random bytes: nobody meets another's by chance or by trying",
    "invitations_token_hash_key": "digests of 32 random bytes",
    "tenant_domains_verified_key": "only what is proven excludes others, and the system alone says what is",
    "tenants_pkey": "tenants are made by the system",
    "tenants_slug_key": "tenants are made by the system; addresses are public",
    "users_pkey": "people are the system's",
    "users_email_key": "people are the system's",
    "users_keycloak_id_key": "people are the system's",
}
"""What no two rows of whatever tenants may share, and why that tells the application's role nothing."""
RANDOM = {"api_keys_key_hash_key", "invitations_token_hash_key"}
DECIDES = {"tenant_domains_verified_key": "verified_at", "users_email_key": "email"}
"""The column by which a row comes under a partial index, or that an expression is of."""


async def test_what_is_unique_among_all_tenants_is_known_and_out_of_reach(
    admin: psycopg.AsyncConnection[Any], rows: Rows
) -> None:
    found = {
        unique: (table.name, columns)
        for table in (*OWNED.values(), TABLES["users"])
        for unique, columns in uniques(table)
        if columns[0] != "tenant_id"
    }
    assert set(found) == set(UNIQUE_FOR_ALL)
    for unique, (table_name, columns) in found.items():
        if unique in RANDOM:
            assert columns[0] in ("key_hash", "token_hash")
            continue
        column = DECIDES.get(unique, columns[0])
        for right in ("INSERT", "UPDATE"):
            assert not await may(admin, roles.APP, table_name, right, iter([column])), (unique, right)


async def test_every_unique_index_of_the_database_is_in_the_models(admin: psycopg.AsyncConnection[Any]) -> None:
    """Or the tests here would not know it."""
    query = (
        "SELECT indexrelid::regclass::text FROM pg_index JOIN pg_class c ON c.oid = indrelid "
        "WHERE indisunique AND c.relnamespace = 'public'::regnamespace AND NOT c.relispartition"
    )
    found = {name for (name,) in await (await admin.execute(query)).fetchall()}
    assert found - {"alembic_version_pkc"} == {name for table in TABLES.values() for name, _ in uniques(table)}


async def test_using_what_another_tenant_uses_already(
    site: Site, rows: Rows, admin: psycopg.AsyncConnection[Any]
) -> None:
    """Ids, names and numbers that must be unique are so for one tenant: another's are free, and so tell nothing."""
    tried = set()
    async with attacker(site) as connection:
        for name, table in OWNED.items():
            for unique, columns in uniques(table):
                refers = {column.name for key in table.foreign_key_constraints for column in key.columns}
                same = [column for column in columns if column not in refers and column != "tenant_id"]
                if columns[0] != "tenant_id" or not same:
                    continue  # known above, or no more than the tenant itself
                row = new_row(table, MINE, rows)
                row |= {column: rows[name][THEIRS][column] for column in same if column in rows[name][THEIRS]}
                if any(row.get(column) == rows[name][MINE].get(column) for column in same):
                    # Numbers, which both have: free the attacker's own.
                    row |= {column: 7 for column in same if isinstance(table.c[column].type, kinds.Integer)}
                row = {column: row[column] for column in row if not table.c[column].identity}
                row = await insertable(admin, roles.APP, table, row)
                if "tenant_id" not in row:
                    continue  # not the application's to write
                state, _, made, said = await outcome(connection, insertion(name, row), row)
                assert (state, made) in (("00000", 1), (NOT_ALLOWED, 0)), (unique, said)
                tried |= {unique} if made else set()
    assert {"projects_pkey", "api_keys_pkey", "sessions_pkey", "tenant_domains_tenant_id_domain_key"} <= tried


async def test_nobody_changes_which_row_something_is_about(admin: psycopg.AsyncConnection[Any]) -> None:
    """A membership turned over to somebody else would show whoever that is."""
    for table, column in (
        ("members", "user_id"),
        ("members", "tenant_id"),
        ("tenants", "id"),
        ("tenants", "parent_id"),
        ("devices", "id"),
        ("devices", "tenant_id"),
        ("device_events", "device_id"),
        ("device_events", "outcome"),
    ):
        assert not await may(admin, roles.APP, table, "UPDATE", iter([column])), (table, column)


# --- connections, tasks and sessions that are used again ---


async def test_a_pooled_connection_that_was_tampered_with_serves_the_next_tenant_only(
    database: Database, rows: Rows
) -> None:
    for poison in (
        f"SELECT set_config('app.tenant_id', '{MINE}', false)",
        f"SET app.tenant_id = '{MINE}'",
        "PREPARE projects AS SELECT * FROM projects",
        "SET search_path = pg_temp, pg_catalog, public",
    ):
        async with database.tenant(MINE) as session:
            used = await session.scalar(text("SELECT pg_backend_pid()"))
            await session.execute(text(poison))
        async with database.tenant(THEIRS) as session:
            assert await session.scalar(text("SELECT pg_backend_pid()")) == used
            assert set((await session.execute(text("SELECT tenant_id FROM public.projects"))).scalars()) == {THEIRS}


async def test_400_interleaved_tasks_some_of_them_cancelled(database: Database, rows: Rows) -> None:
    """They share fifteen connections, and are cancelled while they wait for one, while they ask and in between."""
    chance = random.Random(11)
    wrong: list[object] = []
    answered = 0

    async def work(owner: uuid.UUID) -> None:
        nonlocal answered
        async with database.tenant(owner) as session:
            for query in ("SELECT tenant_id, pg_sleep(0.001) FROM projects", "SELECT tenant_id, 1 FROM sessions"):
                found = {row[0] for row in await session.execute(text(query))}
                if found != {owner}:
                    wrong.append((owner, found))
                answered += 1
                await asyncio.sleep(chance.random() / 1000)

    tasks = [asyncio.create_task(work((MINE, THEIRS)[number % 2])) for number in range(400)]
    cancelled = chance.sample(tasks, 120)
    for task in cancelled:
        asyncio.get_running_loop().call_later(chance.random() / 2, task.cancel)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert wrong == []
    assert {type(result) for result in results} <= {type(None), asyncio.CancelledError}
    assert answered >= 2 * 280
    for owner in (MINE, THEIRS):
        await work(owner)
    assert wrong == []


async def test_a_session_is_one_tenants_for_good(database: Database, rows: Rows) -> None:
    """Its identity map still holds what it has read."""
    async with database.tenant(MINE) as session:
        mine = (await session.execute(select(Project))).scalars().first()
        assert mine is not None
        await session.commit()
        session.info["tenant"] = THEIRS
        with pytest.raises(NoTenant, match="another tenant"):
            await session.execute(select(Project))
        await session.rollback()


async def test_the_same_id_in_two_tenants_is_two_things(
    database: Database, rows: Rows, admin: psycopg.AsyncConnection[Any]
) -> None:
    same = uuid.uuid4()
    for owner, name in ((MINE, "mine"), (THEIRS, "theirs")):
        await admin.execute("INSERT INTO projects (tenant_id, id, name) VALUES (%s, %s, %s)", (owner, same, name))
    kept = {}
    for owner, name in ((MINE, "mine"), (THEIRS, "theirs"), (MINE, "mine")):
        async with database.tenant(owner) as session:
            found = (await session.execute(select(Project).where(Project.id == same))).scalar_one()
            assert (found.name, await session.get(Project, (owner, same))) == (name, found)
            kept[owner] = found
    await admin.execute("DELETE FROM projects WHERE id = %s", (same,))


async def test_an_object_of_another_tenants_session_is_refused(
    database: Database, rows: Rows, admin: psycopg.AsyncConnection[Any]
) -> None:
    taken = []
    for _ in range(2):
        async with database.tenant(THEIRS) as session:
            taken.append((await session.execute(select(Project))).scalars().one())
        session.expunge_all()
        taken[-1].name = "mine now"
    before = await standing(admin)
    with pytest.raises(StaleDataError):
        async with database.tenant(MINE) as session:
            session.add(taken[0])
    with pytest.raises(DBAPIError) as caught:
        async with database.tenant(MINE) as session:
            await session.merge(taken[1])
    assert sqlstate(caught.value) == NOT_ALLOWED
    assert await standing(admin) == before


async def test_the_platform_is_no_tenant(database: Database) -> None:
    with pytest.raises(NoTenant):
        async with database.tenant(PLATFORM):
            pass


# --- roles ---


@pytest.mark.parametrize("role", [roles.APP, roles.SYSTEM, roles.LEDGER, roles.KEEPER, roles.CELL])
async def test_no_role_becomes_another(site: Site, rows: Rows, role: str) -> None:
    async with await psycopg.AsyncConnection.connect(site.own_logins(role), autocommit=True) as connection:
        others = await (
            await connection.execute("SELECT rolname FROM pg_roles WHERE rolname <> current_user")
        ).fetchall()
        assert {name for (name,) in others} > set(roles.ALL) - {role}
        for (name,) in others:
            for way in ("SET ROLE {}", "SET SESSION AUTHORIZATION {}", "GRANT {} TO CURRENT_USER"):
                state, *_ = await outcome(connection, sql.SQL(way).format(sql.Identifier(name)))
                assert state in (NOT_ALLOWED, "0A000", "0LP01"), (name, way)
            state, *_ = await outcome(connection, "SELECT set_config('role', %s, false)", (name,))
            assert state == NOT_ALLOWED, name
        await connection.execute("RESET ROLE")
        assert await (await connection.execute("SELECT current_user")).fetchone() == (role,)


async def test_a_cell_reaches_nothing(site: Site, rows: Rows) -> None:
    async with attacker(site, roles.CELL) as connection:
        for name, table in TABLES.items():
            column = next(iter(table.c)).name
            for way in (
                "SELECT 1 FROM {}",
                "DELETE FROM {}",
                "TRUNCATE {}",
                "COPY {} TO STDOUT",
                "LOCK TABLE {} IN ACCESS SHARE MODE",
                "INSERT INTO {} DEFAULT VALUES",
            ):
                assert (await outcome(connection, sql.SQL(way).format(sql.Identifier(name))))[0] == NOT_ALLOWED, name
            changed = sql.SQL("UPDATE {} SET {} = NULL").format(sql.Identifier(name), sql.Identifier(column))
            assert (await outcome(connection, changed))[0] == NOT_ALLOWED, name
        query = (
            "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = ANY('{r,p,v,m}') "
            "AND (has_table_privilege(oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER') "
            "OR has_any_column_privilege(oid, 'SELECT, INSERT, UPDATE, REFERENCES'))"
        )
        assert await (await connection.execute(query)).fetchall() == []


@pytest.mark.parametrize("role", [roles.APP, roles.LEDGER, roles.KEEPER, roles.CELL])
async def test_devices_that_wait_for_their_tenant_are_the_systems_alone(site: Site, rows: Rows, role: str) -> None:
    """Whoever could read a code would have the device, and whoever could write one another's."""
    async with attacker(site, role) as connection:
        for statement in (
            "SELECT code FROM pairings",
            "SELECT count(*) FROM pairings",
            "INSERT INTO pairings (id) VALUES (gen_random_uuid())",
            "UPDATE pairings SET claimed_by = NULL",
            "DELETE FROM pairings",
            "TRUNCATE pairings",
            "COPY pairings TO STDOUT",
        ):
            assert (await outcome(connection, statement.encode()))[0] == NOT_ALLOWED, statement


async def test_nobody_makes_anything_of_their_own(site: Site, rows: Rows) -> None:
    """A table, function or operator of the attacker's could stand in for one of ours, or leak what it is given."""
    for role in (roles.APP, roles.SYSTEM, roles.LEDGER, roles.KEEPER, roles.CELL):
        async with attacker(site, role) as connection:
            for statement in (
                "CREATE TEMP TABLE tenants AS SELECT 1000000 AS max_projects",
                "CREATE TABLE mine (tenant_id uuid)",
                "CREATE VIEW mine AS SELECT 1",
                "CREATE FUNCTION mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
                "CREATE FUNCTION pg_temp.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
                "CREATE SCHEMA mine",
                "CREATE TRIGGER mine AFTER INSERT ON projects FOR EACH ROW EXECUTE FUNCTION note_revocation()",
                "CREATE POLICY mine ON projects USING (true)",
                "CREATE EXTENSION plpgsql VERSION '1.0'",
                "ALTER FUNCTION app_tenant() OWNER TO CURRENT_USER",
            ):
                state, *_ = await outcome(connection, statement.encode())
                assert state in (NOT_ALLOWED, "42710"), (role, statement, state)


async def test_files_and_programs_of_the_server_are_out_of_reach(site: Site, rows: Rows) -> None:
    for role in (roles.APP, roles.SYSTEM, roles.KEEPER):
        async with attacker(site, role) as connection:
            for statement in (
                "COPY projects TO PROGRAM 'cat'",
                "COPY projects TO '/dev/null'",
                "SELECT pg_read_file('PG_VERSION')",
                "SELECT pg_ls_dir('.')",
                "SELECT lo_import('/dev/null')",
                "SELECT lo_export(1, '/dev/null')",
                "SELECT pg_reload_conf()",
            ):
                assert (await outcome(connection, statement.encode()))[0] == NOT_ALLOWED, (role, statement)
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                await connection.execute("ALTER SYSTEM SET log_statement = 'all'")


async def test_a_lock_shuts_nobody_out_of_tables_that_one_may_only_read(
    site: Site, rows: Rows, admin: psycopg.AsyncConnection[Any]
) -> None:
    async with attacker(site) as connection:
        for name in OWNED:
            rights = [await may(admin, roles.APP, name, right) for right in ("UPDATE", "DELETE", "TRUNCATE")]
            lock = sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(sql.Identifier(name))
            state, *_ = await outcome(connection, lock)
            assert state == ("00000" if any(rights) else NOT_ALLOWED), name


async def test_functions_that_lend_their_owners_rights_cannot_be_misled_nor_called_by_anybody(
    admin: psycopg.AsyncConnection[Any],
) -> None:
    query = (
        "SELECT proname, coalesce(proconfig::text, ''), pg_get_userbyid(proowner), "
        "EXISTS (SELECT FROM aclexplode(coalesce(proacl, acldefault('f', proowner))) WHERE grantee = 0), "
        "prorettype = 'trigger'::regtype FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND prosecdef"
    )
    found = await (await admin.execute(query)).fetchall()
    assert {"audit_chain", "audit_months"} <= {name for name, *_ in found}
    for name, settings_, owner, for_all, is_trigger in found:
        assert re.search(r"search_path=(pg_catalog|(pg_catalog, )?public), pg_temp", settings_), name
        assert owner == roles.OWNER, name
        assert is_trigger or not for_all, name  # nobody can call a trigger's; making one is refused above


async def test_what_row_security_does_not_stop(site: Site, rows: Rows) -> None:
    """Whoever may run any SQL at all may bind another tenant, or put off a role that a login has taken on.

    That is why no SQL is ever built from input; the next test sees to it.
    """
    async with attacker(site) as connection:
        await connection.execute("SELECT set_config('app.tenant_id', %s, false)", (str(THEIRS),))
        assert await (await connection.execute("SELECT id FROM tenants")).fetchall() == [(THEIRS,)]
        one_login = site.address(roles.APP) != site.own_logins(roles.APP)
        assert (await outcome(connection, "SET ROLE avb_system"))[0] == ("00000" if one_login else NOT_ALLOWED)


SQL = re.compile(
    r"\b(SELECT|INSERT INTO|DELETE FROM|UPDATE \w+ SET|WHERE|RETURNING|VALUES \(|SET (LOCAL|ROLE)|ALTER (TABLE|ROLE)|"
    r"CREATE (TABLE|ROLE|INDEX|DATABASE)|DROP (TABLE|INDEX|ROLE|DATABASE)|COPY|TRUNCATE|LISTEN|NOTIFY)\b"
)


def built_sql(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Where a module puts SQL together from what is no constant of its own: line, and the first of the text."""
    for node in ast.walk(tree):
        parts: list[ast.expr] = []
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.FormattedValue) else part for part in node.values]
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod | ast.Add):
            parts = [node.left, node.right]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
            parts = [node.func.value, *node.args]
        words = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        others = [part for part in parts if not isinstance(part, ast.Constant)]
        constants = [part for part in others if isinstance(part, ast.Name) and part.id.isupper()]
        if len(constants) < len(others) and any(SQL.search(each) for each in words):
            yield getattr(node, "lineno", 0), words[0]


def test_no_sql_is_built_from_strings() -> None:
    wrong = []
    for folder in ("admin_api", "bus_bridge", "config", "plugins", "skills", "tenancy"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if name.startswith("tenancy/migrations/"):
                continue
            for line, before in built_sql(ast.parse(path.read_text(encoding="utf-8"))):
                wrong.append(f"{name}:{line}: {before[:60]!r}")
    assert wrong == []


@pytest.mark.parametrize(
    "code",
    [
        "f\"SELECT * FROM t WHERE id = '{x}'\"",
        "'DELETE FROM t WHERE id = %s' % x",
        "'SELECT 1 FROM {}'.format(x)",
        "'SELECT 1 FROM ' + x",
    ],
)
def test_sql_that_is_built_from_strings_would_be_noticed(code: str) -> None:
    assert list(built_sql(ast.parse(code)))
    for fine in (
        "f'choose {x}, or select another'",
        "f'LISTEN {CHANNEL}'",
        "SQL('DROP TABLE {}').format(Identifier(x))",
    ):
        assert not list(built_sql(ast.parse(fine)))


# --- P4 ---

_counted = itertools.count()


@settings(max_examples=40, deadline=None)
@given(
    saves=st.lists(
        st.tuples(st.booleans(), st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=50))
    ),
    form=st.sampled_from(("orm", "core", "raw", "for the other")),
)
async def test_p4_tenant_scoped_isolation(
    database: Database, rows: Rows, saves: list[tuple[bool, str]], form: str
) -> None:
    """Queries return a tenant's own rows only, and what is saved gets the tenant."""
    run = next(_counted)
    names: dict[uuid.UUID, list[str]] = {MINE: [], THEIRS: []}
    for is_mine, name in saves:
        owner = MINE if is_mine else THEIRS
        async with database.tenant(owner) as session:
            session.add(made := Project(name=f"{name} {run}", config={"run": run}))
        assert made.tenant_id == owner
        names[owner].append(made.name)
    for owner, other in ((MINE, THEIRS), (THEIRS, MINE)):
        async with database.tenant(owner) as session:
            if form == "orm":
                projects = (await session.execute(select(Project))).scalars().all()
                found = [(project.tenant_id, project.name, project.config) for project in projects]
            elif form == "core":
                table = Project.__table__.c
                found = [tuple(row) for row in await session.execute(select(table.tenant_id, table.name, table.config))]
            else:
                query = "SELECT tenant_id, name, config FROM projects"
                where = f" WHERE tenant_id = '{other}' OR true" if form == "for the other" else ""
                found = [tuple(row) for row in await session.execute(text(query + where))]
            assert {tenant for tenant, *_ in found} == {owner}
            assert sorted(name for _, name, config in found if config.get("run") == run) == sorted(names[owner])
    for owner in names:
        async with database.tenant(owner) as session:
            await session.execute(text("DELETE FROM projects WHERE config ? 'run'"))
