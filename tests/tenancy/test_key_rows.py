"""What a tenant's own SQL cannot do to keys, to their limit, and to the log of their changes."""

from __future__ import annotations

import asyncio
import uuid

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from agentvoicebox.config.errors import AvbError, Forbidden
from agentvoicebox.tenancy import keys, quotas, tenants
from agentvoicebox.tenancy.changes import Feed
from agentvoicebox.tenancy.database import Database, sqlstate
from agentvoicebox.tenancy.keyring import Keyring
from agentvoicebox.tenancy.models import Tenant

NOT_ALLOWED = "42501"


async def refused(database: Database, tenant: Tenant, statement: str, **values: object) -> str:
    with pytest.raises((DBAPIError, AvbError)) as caught:
        async with database.tenant(tenant.id) as session:
            await session.execute(text(statement), values)
    return sqlstate(caught.value.__cause__ or caught.value)


@pytest.mark.parametrize(
    "forged",
    [
        "INSERT INTO key_revocations (tenant_id, id, kind) OVERRIDING SYSTEM VALUE VALUES (app_tenant(), 7, 'tenant')",
        "INSERT INTO key_revocations (tenant_id, kind, xid) VALUES (app_tenant(), 'tenant', 9223372036854775807)",
        "INSERT INTO key_revocations (tenant_id, kind, at) VALUES (app_tenant(), 'tenant', 'infinity')",
    ],
)
async def test_a_line_of_the_log_cannot_be_given_a_number_or_a_time(
    database: Database, tenant: Tenant, forged: str
) -> None:
    assert await refused(database, tenant, forged) == NOT_ALLOWED


async def test_a_number_that_two_tenants_share_hides_neither(
    database: Database, tenant: Tenant, other: Tenant, admin: psycopg.AsyncConnection
) -> None:
    """Numbers are the log's own; should two ever be equal, the lines are still two."""
    feed = Feed(database)
    told: list[uuid.UUID] = []
    feed.subscribe(lambda change: told.append(change.tenant_id))
    await feed.start()
    insert = "INSERT INTO key_revocations (tenant_id, id, kind) OVERRIDING SYSTEM VALUE VALUES (%s, 1000000, 'tenant')"
    for owner in (tenant, other):
        await admin.execute(insert, (owner.id,))
        async with asyncio.timeout(20):
            while owner.id not in told:
                await asyncio.sleep(0.01)
    await feed.close()


@pytest.mark.parametrize("column", ["key_hash", "key_prefix", "usage_count", "created_by", "rotated_from", "id"])
async def test_what_makes_a_key_cannot_be_changed(database: Database, tenant: Tenant, column: str) -> None:
    await keys.issue(database, tenant.id, "a key")
    assert await refused(database, tenant, f"UPDATE api_keys SET {column} = {column}") == NOT_ALLOWED


async def test_a_revoked_key_stays_revoked(database: Database, tenant: Tenant) -> None:
    issued = await keys.issue(database, tenant.id, "a key")
    await keys.revoke(database, tenant.id, issued.id)
    assert await refused(database, tenant, "UPDATE api_keys SET revoked_at = NULL") == "AV002"


async def test_a_key_that_says_it_replaces_another_takes_a_place_all_the_same(
    database: Database, tenant: Tenant
) -> None:
    issued = await keys.issue(database, tenant.id, "a key")
    row = (
        "INSERT INTO api_keys (tenant_id, id, name, key_prefix, key_hash, rotated_from) "
        "VALUES (app_tenant(), :id, 'forged', 'avb_forged', :hash, :of)"
    )
    own = uuid.uuid4()
    assert await refused(database, tenant, row, id=own, hash="0" * 64, of=own) == "23514"
    async with database.tenant(tenant.id) as session:
        await session.execute(text(row), {"id": own, "hash": "0" * 64, "of": issued.id})
    assert (await quotas.usage(database, tenant.id)).api_keys.current == 2
    rotated = await keys.rotate(database, tenant.id, own)
    assert rotated.id != own
    assert (await quotas.usage(database, tenant.id)).api_keys.current == 2


async def test_a_key_issued_during_the_suspension_does_not_escape_it(
    database: Database, tenant: Tenant, admin: psycopg.AsyncConnection
) -> None:
    feed = Feed(database)
    await feed.start()
    ring = Keyring(database, feed)
    async with admin.transaction():
        await admin.execute("UPDATE tenants SET status = 'suspended' WHERE id = %s", (tenant.id,))
        issued = await keys.issue(database, tenant.id, "just in time")
        await ring.verify(issued.key)
    async with asyncio.timeout(20):
        while ring.known(issued.key) is not None:
            await asyncio.sleep(0.01)
    with pytest.raises(Forbidden) as caught:
        await ring.verify(issued.key)
    assert caught.value.code == "tenant_suspended"
    await feed.close()
    await tenants.activate(database, tenant.id)


async def test_the_system_may_delete_a_project_that_has_keys(database: Database, tenant: Tenant) -> None:
    """What a foreign key changes, PostgreSQL 18 writes down as the owner, with no tenant bound."""
    issued = await keys.issue(database, tenant.id, "a key")
    async with database.system() as session:
        await session.execute(text("DELETE FROM projects WHERE tenant_id = :t"), {"t": tenant.id})
    assert (await keys.get(database, tenant.id, issued.id)).project_id is None
