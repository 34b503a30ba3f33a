"""Everything that is a tenant's: to hand it out, and to make it go away.

Both go by the tables there are, so that a new one cannot be forgotten: what has a `tenant_id` is exported and erased
unless it is named here.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
from psycopg import IsolationLevel, sql
from psycopg.rows import dict_row
from sqlalchemy import String, Table, cast, delete, exists, func, select, text, update

from agentvoicebox.config.errors import Conflict, NotFound
from agentvoicebox.tenancy import audit, roles
from agentvoicebox.tenancy.database import Database, translated
from agentvoicebox.tenancy.models import (
    PLATFORM,
    Action,
    Base,
    Member,
    MemberStatus,
    Pairing,
    Relation,
    Tenant,
    TenantStatus,
    User,
)

EVIDENCE = frozenset({"usage_events", "usage_minutes", "usage_outbox", "audit_log", "audit_heads", "audit_anchors"})
"""What stays: how much was used, and who did what. It holds nothing that was said; the audit log goes month by month
with its own retention, which alone may take from it."""

UNTOLD = frozenset({"key_revocations"})
"""What is not exported: a log of ours for our nodes' memory, of a day."""

SECRET = frozenset(
    {
        ("api_keys", "key_hash"),
        ("invitations", "token_hash"),
        ("tenant_domains", "token"),
        ("data_keys", "nonce"),
        ("data_keys", "wrapped"),
        ("secrets", "nonce"),
        ("secrets", "sealed"),
    }
)
"""Columns that are left out of an export: they would help those only who should not have it."""

_ABOUT_PEOPLE = ("id", "email", "first_name", "last_name", "is_active", "last_login")
"""Of its members a tenant is given what it sees of them."""
_ROWS = 1000

_log = logging.getLogger(__name__)


def owned() -> list[Table]:
    """All tables of tenants' rows, those that others refer to last."""
    return [table for table in reversed(Base.metadata.sorted_tables) if "tenant_id" in table.columns]


async def export(database: Database, tenant_id: uuid.UUID) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
    """Every row that is the tenant's, as the name of its table and its columns, all as of one moment.

    It is read as the tenant itself would read it, by a connection of its own that the generator holds: close it, or
    read it to its end. Raises `NotFound`, `Unavailable`.
    """
    async with _bound(database, roles.APP, tenant_id, IsolationLevel.REPEATABLE_READ) as connection:
        one = await connection.execute("SELECT 1 FROM tenants WHERE id = %s", (tenant_id,))
        if await one.fetchone() is None:
            raise NotFound("There is no such tenant.", code="tenant_not_found")
        for name, query in _queries(tenant_id):
            async with connection.cursor(f"export_{name}", row_factory=dict_row) as cursor:
                cursor.itersize = _ROWS
                with translated():
                    await cursor.execute(query, {"tenant": tenant_id})
                while True:
                    with translated():
                        rows = await cursor.fetchmany(_ROWS)
                    if not rows:
                        break
                    for row in rows:
                        yield name, row


async def erase(database: Database, tenant_id: uuid.UUID) -> dict[str, int]:
    """Erase a deleted tenant's data for good; returns how many rows went of each table.

    Its row stays without its names, and so does the evidence. People who belong to no other tenant, nor to the
    platform, lose their names too. From the first step on the tenant cannot be brought back; after a crash, call it
    again. With the data keys gone, no copy of the secrets that was made without them can be opened; backups of the
    whole database hold both, and end with their own retention. Raises `NotFound`, `Conflict` for a tenant that is
    not deleted.
    """
    await _begin(database, tenant_id)
    gone: dict[str, int] = {}
    async with _bound(database, roles.KEEPER, tenant_id, IsolationLevel.READ_COMMITTED) as connection:
        with translated():
            await connection.execute(
                "UPDATE tenants SET name = 'Erased', slug = %s, email = '', timezone = 'UTC', settings = '{}', "
                "suspension_reason = '', updated_at = now() WHERE id = %s",
                (f"erased-{tenant_id}", tenant_id),
            )
            # Until nothing is left: deleting makes triggers write, into a table that may have had its turn.
            while True:
                counts = {table.name: await _delete(connection, table, tenant_id) for table in _erased()}
                if not any(counts.values()):
                    break
                gone = {name: gone.get(name, 0) + count for name, count in counts.items()}
    async with database.system() as session:
        details = {"rows": {name: count for name, count in gone.items() if count}}
        await audit.append(
            session, Action.DELETE, "tenant", tenant_id, "Erased its data", tenant_id=tenant_id, details=details
        )
    _log.info("tenant_erased tenant_id=%s rows=%d", tenant_id, sum(gone.values()))
    return gone


async def _begin(database: Database, tenant_id: uuid.UUID) -> None:
    """Make it final, and take their names from people who are nobody else's."""
    async with database.system() as session:
        # One at a time: of two that share people, the second sees that the first is nobody's tenant any more.
        await session.execute(text("SELECT pg_advisory_xact_lock(hashtextextended('erasure', 0))"))
        query = select(Tenant).where(Tenant.id == tenant_id).with_for_update(key_share=True)
        tenant = (await session.execute(query)).scalar_one_or_none()
        if tenant is None:
            raise NotFound("There is no such tenant.", code="tenant_not_found")
        if tenant.status != TenantStatus.DELETED:
            raise Conflict("Only a deleted tenant can be erased; delete it first.", param="status")
        await session.execute(
            update(Tenant).where(Tenant.id == tenant_id).values(erased_at=func.coalesce(Tenant.erased_at, func.now()))
        )
        here = exists().where(Member.user_id == User.id, Member.tenant_id == tenant_id)
        elsewhere = exists().where(
            Member.user_id == User.id,
            Member.tenant_id != tenant_id,
            Member.status == MemberStatus.ACTIVE,
            Tenant.id == Member.tenant_id,
            Tenant.erased_at.is_(None),
        )
        of_the_platform = exists().where(
            Relation.tenant_id == PLATFORM,
            Relation.subject_type == "user",
            Relation.subject_id == cast(User.id, String),
        )
        await session.execute(
            update(User)
            .where(here, ~elsewhere, ~of_the_platform, User.is_staff.is_(False))
            .values(
                email=func.concat("erased-", User.id, "@invalid"),
                keycloak_id=None,
                first_name="",
                last_name="",
                avatar_url="",
                preferences={},
                last_login=None,
                is_active=False,
            )
            .execution_options(synchronize_session=False)
        )
        await session.execute(delete(Pairing).where(Pairing.claimed_by == tenant_id))  # else gone in ten minutes
        await audit.append(session, Action.DELETE, "tenant", tenant_id, "Began to erase its data", tenant_id=tenant_id)


def _erased() -> list[Table]:
    return [table for table in owned() if table.name not in EVIDENCE]


async def _delete(connection: psycopg.AsyncConnection[Any], table: Table, tenant_id: uuid.UUID) -> int:
    statement = sql.SQL("DELETE FROM {} WHERE tenant_id = %s").format(sql.Identifier(table.name))
    return (await connection.execute(statement, (tenant_id,))).rowcount


def _queries(tenant_id: uuid.UUID) -> list[tuple[str, sql.Composed]]:
    of_the_tenant = sql.SQL("SELECT * FROM tenants WHERE id = %(tenant)s").format()
    people = sql.SQL(
        "SELECT {} FROM users u WHERE EXISTS "
        "(SELECT FROM members m WHERE m.tenant_id = %(tenant)s AND m.user_id = u.id) ORDER BY id"
    ).format(sql.SQL(", ").join(map(sql.Identifier, _ABOUT_PEOPLE)))
    found = [("tenants", of_the_tenant), ("users", people)]
    for table in reversed(owned()):
        if table.name in UNTOLD:
            continue
        # What is computed from other columns says nothing new.
        columns = [column.name for column in table.columns if column.computed is None]
        shown = [name for name in columns if (table.name, name) not in SECRET]
        query = sql.SQL("SELECT {} FROM {} WHERE tenant_id = %(tenant)s ORDER BY {}").format(
            sql.SQL(", ").join(map(sql.Identifier, shown)),
            sql.Identifier(table.name),
            sql.SQL(", ").join(sql.Identifier(column.name) for column in table.primary_key.columns),
        )
        found.append((table.name, query))
    return found


@asynccontextmanager
async def _bound(
    database: Database, role: str, tenant_id: uuid.UUID, isolation: IsolationLevel
) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """A transaction of that role, bound to the tenant, on a connection of its own."""
    connection = await database.connect(role)
    try:
        await connection.set_isolation_level(isolation)
        async with connection.transaction():
            with translated():
                await connection.execute("SELECT set_config('app.tenant_id', %s, true)", (str(tenant_id),))
            yield connection
    finally:
        await connection.close()
