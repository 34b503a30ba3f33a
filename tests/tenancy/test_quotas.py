"""Limits that nobody passes, however many try at once."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from alembic import command
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from agentvoicebox.config.errors import Forbidden, NotFound, Unavailable
from agentvoicebox.tenancy import keys, migrations, projects, quotas, sessions, tenants
from agentvoicebox.tenancy.database import Address, Database, prepare
from agentvoicebox.tenancy.models import PLATFORM, Tenant
from agentvoicebox.tenancy.quotas import Quota, Usage

MANY = 200
MOST = 7

Make = Callable[[Database, uuid.UUID, int], Awaitable[object]]


async def invite(database: Database, tenant_id: uuid.UUID, number: int) -> None:
    async with database.tenant(tenant_id) as session:
        await session.execute(
            text(
                "INSERT INTO invitations (tenant_id, id, email, role, token_hash, expires_at) "
                "VALUES (:tenant, :id, :email, 'viewer', :hash, now() + interval '1 day')"
            ),
            {"tenant": tenant_id, "id": uuid.uuid4(), "email": f"p{number}@example.com", "hash": uuid.uuid4().hex},
        )


MAKERS: dict[str, Make] = {
    "projects": lambda database, tenant, number: projects.create(database, tenant, f"Project {number}"),
    "api_keys": lambda database, tenant, number: keys.issue(database, tenant, f"Key {number}"),
    "users": invite,
    "sessions_this_month": lambda database, tenant, number: sessions.create(database, tenant),
}
LIMITS = {
    "projects": "max_projects",
    "api_keys": "max_api_keys",
    "users": "max_users",
    "sessions_this_month": "max_sessions_per_month",
}


async def limited(database: Database, tenant: Tenant, kind: str, most: int) -> None:
    await tenants.update(database, tenant.id, limits={LIMITS[kind]: most})


async def of(database: Database, tenant: Tenant, kind: str) -> Quota:
    found: Quota = getattr(await quotas.usage(database, tenant.id), kind)
    return found


@pytest.fixture
async def another_node(address: Address) -> Any:
    """A second process's view of the same store: pools of its own."""
    database = Database(address)
    yield database
    await database.close()


@pytest.mark.parametrize("kind", MAKERS)
async def test_flw_27_of_200_creators_at_once_exactly_as_many_succeed_as_may(
    database: Database, another_node: Database, tenant: Tenant, kind: str
) -> None:
    await limited(database, tenant, kind, MOST)
    free = MOST - (await of(database, tenant, kind)).current

    async def attempt(number: int) -> str:
        while True:
            try:
                await MAKERS[kind](another_node if number % 2 else database, tenant.id, number)
            except Forbidden as error:
                return error.code
            except Unavailable:  # all connections were taken for seconds: as a client would, ask again
                continue
            return "made"

    outcomes = await asyncio.gather(*(attempt(number) for number in range(MANY)))
    assert outcomes.count("made") == free
    assert outcomes.count("tenant_limit_exceeded") == MANY - free
    assert await of(database, tenant, kind) == Quota(MOST, MOST)


async def test_creators_of_all_kinds_at_once_do_not_wait_for_each_other_for_ever(
    database: Database, another_node: Database, tenant: Tenant, other: Tenant
) -> None:
    async def attempt(number: int) -> None:
        make = list(MAKERS.values())[number % len(MAKERS)]
        node, whose = (database, another_node)[number // 4 % 2], (tenant, other)[number // 8 % 2]
        await make(node, whose.id, number)

    await asyncio.gather(*(attempt(number) for number in range(48)))
    for whose in (tenant, other):
        found = await quotas.usage(database, whose.id)
        assert [found.users.current, found.api_keys.current, found.sessions_this_month.current] == [6, 6, 6]
        assert found.projects.current == 7


@pytest.mark.parametrize("kind", MAKERS)
async def test_a_limit_lowered_below_what_there_is_stops_new_ones_only(
    database: Database, tenant: Tenant, kind: str
) -> None:
    for number in range(3):
        await MAKERS[kind](database, tenant.id, number)
    before = await of(database, tenant, kind)
    await limited(database, tenant, kind, 1)
    assert await of(database, tenant, kind) == Quota(before.current, 1)
    with pytest.raises(Forbidden) as caught:
        await MAKERS[kind](database, tenant.id, 9)
    assert caught.value.code == "tenant_limit_exceeded"
    assert "1" in caught.value.message
    await limited(database, tenant, kind, before.current + 1)
    await MAKERS[kind](database, tenant.id, 10)


async def test_no_session_may_be_allowed_at_all(database: Database, tenant: Tenant) -> None:
    await limited(database, tenant, "sessions_this_month", 0)
    with pytest.raises(Forbidden):
        await sessions.create(database, tenant.id)
    assert await of(database, tenant, "sessions_this_month") == Quota(0, 0)


async def test_what_began_under_the_release_before_is_counted(empty: Any) -> None:
    await prepare(empty.address)
    database = Database(empty.address)
    tenant = await tenants.create(database, "long-there", "Long there")
    for _ in range(3):
        await sessions.create(database, tenant.id)
    await database.close()

    async def connect() -> psycopg.AsyncConnection[Any]:
        return await psycopg.AsyncConnection.connect(empty.superuser)

    engine = create_async_engine("postgresql+psycopg://", async_creator=connect)
    async with engine.begin() as connection:
        await connection.execute(text("SET LOCAL ROLE avb_owner"))
        await connection.run_sync(lambda sync: command.downgrade(migrations.config(sync), "0007"))
    await engine.dispose()
    await prepare(empty.address)
    database = Database(empty.address)
    assert await of(database, tenant, "sessions_this_month") == Quota(3, 100)
    await database.close()


async def test_what_did_not_come_to_be_is_not_counted(database: Database, tenant: Tenant) -> None:
    with pytest.raises(NotFound):
        await sessions.create(database, tenant.id, project_id=uuid.uuid4())
    assert (await of(database, tenant, "sessions_this_month")).current == 0


async def test_a_month_does_not_count_the_one_before(
    database: Database, tenant: Tenant, admin: psycopg.AsyncConnection
) -> None:
    await limited(database, tenant, "sessions_this_month", 2)
    await admin.execute(
        "INSERT INTO session_months SELECT %s, "
        "(date_trunc('month', now() AT TIME ZONE 'UTC') - interval '1 month')::date, 5",
        (tenant.id,),
    )
    for _ in range(2):
        await sessions.create(database, tenant.id)
    assert await of(database, tenant, "sessions_this_month") == Quota(2, 2)
    assert (await tenants.summary(database, tenant.id)).sessions == 7


async def test_a_month_begins_at_its_first_moment_in_utc(
    database: Database, tenant: Tenant, admin: psycopg.AsyncConnection
) -> None:
    async with admin.transaction():
        await admin.execute("SET LOCAL timezone = 'Pacific/Kiritimati'")  # where the next month has begun for 14 hours
        await admin.execute("INSERT INTO sessions (tenant_id, id) VALUES (%s, gen_random_uuid())", (tenant.id,))
    cursor = await admin.execute(
        "SELECT month = date_trunc('month', now() AT TIME ZONE 'UTC')::date FROM session_months WHERE tenant_id = %s",
        (tenant.id,),
    )
    assert await cursor.fetchall() == [(True,)]


async def test_what_is_over_gives_its_place_back(database: Database, tenant: Tenant) -> None:
    await limited(database, tenant, "api_keys", 1)
    await limited(database, tenant, "projects", 2)
    first = await keys.issue(database, tenant.id, "first")
    with pytest.raises(Forbidden):
        await keys.issue(database, tenant.id, "second")
    await keys.revoke(database, tenant.id, first.id)
    await keys.issue(database, tenant.id, "second")
    made = await projects.create(database, tenant.id, "One")
    await projects.delete(database, tenant.id, made.id)
    await projects.create(database, tenant.id, "Two")


class TestKeys:
    """Which keys take a place."""

    async def insert(self, admin: psycopg.AsyncConnection, tenant: Tenant, **values: Any) -> uuid.UUID:
        row = {"tenant_id": tenant.id, "id": uuid.uuid4(), "name": "k", "key_prefix": "avb_", **values}
        row["key_hash"] = uuid.uuid4().hex
        names = ", ".join(row)
        marks = ", ".join(f"%({name})s" for name in row)
        await admin.execute(f"INSERT INTO api_keys ({names}) VALUES ({marks})", row)
        return row["id"]

    async def test_one_that_replaces_another_takes_its_place(
        self, database: Database, tenant: Tenant, admin: psycopg.AsyncConnection
    ) -> None:
        await limited(database, tenant, "api_keys", 1)
        old = await self.insert(admin, tenant)
        new = await self.insert(admin, tenant, rotated_from=old)
        assert (await of(database, tenant, "api_keys")).current == 2, "not before the old one says so too"
        replaced = "UPDATE api_keys SET replaced_by = %s WHERE tenant_id = %s AND id = %s"
        await admin.execute(replaced, (new, tenant.id, old))
        assert await of(database, tenant, "api_keys") == Quota(1, 1)
        newest = await self.insert(admin, tenant, rotated_from=new)
        await admin.execute(replaced, (newest, tenant.id, new))
        assert await of(database, tenant, "api_keys") == Quota(1, 1)

    async def test_one_place_is_taken_over_once(
        self, database: Database, tenant: Tenant, admin: psycopg.AsyncConnection
    ) -> None:
        await limited(database, tenant, "api_keys", 1)
        old = await self.insert(admin, tenant)
        await self.insert(admin, tenant, rotated_from=old)
        for replaced in (old, uuid.uuid4()):
            with pytest.raises(psycopg.Error) as caught:
                await self.insert(admin, tenant, rotated_from=replaced)
            assert caught.value.sqlstate == "AV003"

    async def test_one_that_ended_takes_none_and_does_not_come_back_over_the_limit(
        self, database: Database, tenant: Tenant, admin: psycopg.AsyncConnection
    ) -> None:
        await limited(database, tenant, "api_keys", 1)
        past, future = [datetime.now(UTC) + timedelta(days=days) for days in (-1, 1)]
        expired = await self.insert(admin, tenant, expires_at=past)
        revoked = await self.insert(admin, tenant, revoked_at=past)
        assert (await of(database, tenant, "api_keys")).current == 0
        await self.insert(admin, tenant)
        for change, value, key in (
            ("expires_at = %s", future, expired),
            ("expires_at = %s", None, expired),
            ("revoked_at = %s", None, revoked),
        ):
            with pytest.raises(psycopg.Error) as caught:
                await admin.execute(f"UPDATE api_keys SET {change} WHERE id = %s", (value, key))
            assert caught.value.sqlstate == "AV003"
        await limited(database, tenant, "api_keys", 2)
        await admin.execute("UPDATE api_keys SET expires_at = %s WHERE id = %s", (future, expired))
        assert await of(database, tenant, "api_keys") == Quota(2, 2)


class TestPeople:
    """Members and invitations share a limit."""

    async def member(self, admin: psycopg.AsyncConnection, tenant: Tenant, status: str = "active") -> uuid.UUID:
        user = uuid.uuid4()
        await admin.execute("INSERT INTO users (id, email) VALUES (%s, %s)", (user, f"{user}@example.com"))
        await admin.execute(
            "INSERT INTO members (tenant_id, user_id, status) VALUES (%s, %s, %s)", (tenant.id, user, status)
        )
        return user

    async def test_both_take_places(self, database: Database, tenant: Tenant, admin: psycopg.AsyncConnection) -> None:
        await limited(database, tenant, "users", 2)
        await self.member(admin, tenant)
        await invite(database, tenant.id, 1)
        assert await of(database, tenant, "users") == Quota(2, 2)
        with pytest.raises(Forbidden):
            await invite(database, tenant.id, 2)
        with pytest.raises(psycopg.Error):
            await self.member(admin, tenant)
        assert (await tenants.summary(database, tenant.id)).users == 1

    async def test_who_left_takes_none_and_does_not_come_back_over_the_limit(
        self, database: Database, tenant: Tenant, admin: psycopg.AsyncConnection
    ) -> None:
        await limited(database, tenant, "users", 1)
        gone = await self.member(admin, tenant, "removed")
        await invite(database, tenant.id, 1)
        back = "UPDATE members SET status = 'active' WHERE tenant_id = %s AND user_id = %s"
        with pytest.raises(psycopg.Error) as caught:
            await admin.execute(back, (tenant.id, gone))
        assert caught.value.sqlstate == "AV003"
        await admin.execute("UPDATE invitations SET status = 'revoked' WHERE tenant_id = %s", (tenant.id,))
        await admin.execute(back, (tenant.id, gone))
        for revived in ("status = 'pending'", "status = 'pending', expires_at = now() + interval '9 days'"):
            with pytest.raises(psycopg.Error):
                await admin.execute(f"UPDATE invitations SET {revived} WHERE tenant_id = %s", (tenant.id,))

    async def test_an_invitation_that_lapsed_takes_none(
        self, database: Database, tenant: Tenant, admin: psycopg.AsyncConnection
    ) -> None:
        await limited(database, tenant, "users", 1)
        await invite(database, tenant.id, 1)
        await admin.execute(
            "UPDATE invitations SET expires_at = now() - interval '1 minute' WHERE tenant_id = %s", (tenant.id,)
        )
        await invite(database, tenant.id, 2)
        with pytest.raises(psycopg.Error):
            await admin.execute(
                "UPDATE invitations SET expires_at = now() + interval '1 day' "
                "WHERE tenant_id = %s AND email = 'p1@example.com'",
                (tenant.id,),
            )


async def test_requests_cannot_count_down(database: Database, tenant: Tenant) -> None:
    await sessions.create(database, tenant.id)
    for statement in (
        "UPDATE session_months SET sessions = 1",
        "UPDATE session_months SET month = '2000-01-01'",
        "DELETE FROM session_months",
        "INSERT INTO session_months SELECT tenant_id, '2000-01-01', -5 FROM session_months",
        "UPDATE tenants SET max_sessions_per_month = 9",
    ):
        with pytest.raises(Exception, match=r"only grows|permission denied|session_months_sessions_check"):
            async with database.tenant(tenant.id) as session:
                await session.execute(text(statement))


async def test_usage_of_a_new_tenant(database: Database, tenant: Tenant) -> None:
    assert await quotas.usage(database, tenant.id) == Usage(
        users=Quota(0, 500), projects=Quota(1, 100), api_keys=Quota(0, 500), sessions_this_month=Quota(0, 100_000)
    )
    with pytest.raises(NotFound):
        await quotas.usage(database, uuid.uuid4())


async def test_a_tenant_sees_its_own_overview_only(database: Database, tenant: Tenant, other: Tenant) -> None:
    query = text("SELECT tenant_id FROM tenant_overview")
    async with database.tenant(tenant.id) as session:
        assert (await session.execute(query)).scalars().all() == [tenant.id]
    async with database.system() as session:
        found = set((await session.execute(query)).scalars())
    assert {tenant.id, other.id} <= found
    assert PLATFORM not in found
