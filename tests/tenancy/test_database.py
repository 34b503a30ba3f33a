"""Two tenants in one database: what either can do, and what neither can."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import psycopg
import pytest
from sqlalchemy import bindparam, delete, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from agentvoicebox.config.errors import BadInput, Forbidden, Unavailable
from agentvoicebox.tenancy import database as stores
from agentvoicebox.tenancy import keys, roles, sessions, tenants
from agentvoicebox.tenancy.database import Address, Database, NoTenant, sqlstate
from agentvoicebox.tenancy.models import ApiKey, Project, Session, Tenant, UsageEvent

NOT_ALLOWED = "42501"


@pytest.fixture
async def two(database: Database, tenant: Tenant, other: Tenant) -> tuple[Tenant, Tenant]:
    """Two tenants with three projects each, one of them made with the tenant."""
    for owner in (tenant, other):
        async with database.tenant(owner.id) as session:
            session.add_all([Project(name="second"), Project(name="third")])
    return tenant, other


@asynccontextmanager
async def closing(database: Database) -> AsyncIterator[Database]:
    try:
        yield database
    finally:
        await database.close()


async def seen(session: AsyncSession) -> set[uuid.UUID]:
    return set((await session.execute(text("SELECT tenant_id FROM projects"))).scalars())


async def test_every_way_of_reading_shows_own_rows_only(database: Database, two: tuple[Tenant, Tenant]) -> None:
    mine, theirs = two
    async with database.tenant(mine.id) as session:
        assert {row.tenant_id for row in (await session.execute(select(Project))).scalars()} == {mine.id}
        assert await seen(session) == {mine.id}
        assert (await session.execute(select(Project.__table__.c.tenant_id))).scalars().all() == [mine.id] * 3
        assert (await session.execute(select(Tenant.id))).scalars().all() == [mine.id]
        assert await session.get(Tenant, theirs.id) is None
        assert (await session.execute(text("SELECT count(*) FROM tenants"))).scalar() == 1


async def test_a_filter_for_the_other_tenant_finds_nothing(database: Database, two: tuple[Tenant, Tenant]) -> None:
    mine, theirs = two
    async with database.tenant(theirs.id) as session:
        their_project = (await session.execute(select(Project).where(Project.is_default))).scalar_one()
    async with database.tenant(mine.id) as session:
        assert await session.get(Project, (theirs.id, their_project.id)) is None
        where = Project.__table__.c.tenant_id == theirs.id
        assert (await session.execute(select(Project.__table__).where(where))).all() == []
        raw = text("SELECT 1 FROM projects WHERE tenant_id = :t OR true ORDER BY 1").bindparams(
            bindparam("t", theirs.id)
        )
        assert len((await session.execute(raw)).all()) == 3


async def test_bulk_changes_touch_own_rows_only(
    database: Database, two: tuple[Tenant, Tenant], admin: psycopg.AsyncConnection
) -> None:
    mine, theirs = two
    async with database.tenant(mine.id) as session:
        await session.execute(update(Project).values(name="by the ORM"))
        await session.execute(text("UPDATE projects SET environment = 'staging'"))
        await session.execute(delete(Project).where(~Project.is_default))
        assert (await session.execute(text("DELETE FROM projects WHERE NOT is_default"))).rowcount == 0  # type: ignore[attr-defined]
    cursor = await admin.execute(
        "SELECT tenant_id, count(*), bool_or(name = 'by the ORM' OR environment = 'staging') FROM projects "
        "WHERE tenant_id = ANY(%s) GROUP BY 1",
        ([mine.id, theirs.id],),
    )
    assert set(await cursor.fetchall()) == {(mine.id, 1, True), (theirs.id, 3, False)}


async def test_a_row_for_another_tenant_is_refused(database: Database, two: tuple[Tenant, Tenant]) -> None:
    mine, theirs = two
    row = {"tenant_id": theirs.id, "id": uuid.uuid4(), "name": "planted"}
    for statement in (
        insert(Project).values(row),
        insert(Project.__table__).values(row),
        update(Project.__table__).values(tenant_id=theirs.id),
    ):
        with pytest.raises(DBAPIError) as caught:
            async with database.tenant(mine.id) as session:
                await session.execute(statement)
        assert sqlstate(caught.value) == NOT_ALLOWED
    with pytest.raises(DBAPIError) as caught:
        async with database.tenant(mine.id) as session:
            session.add(Project(tenant_id=theirs.id, name="planted"))
    assert sqlstate(caught.value) == NOT_ALLOWED


async def test_a_foreign_key_cannot_reach_into_another_tenant(database: Database, two: tuple[Tenant, Tenant]) -> None:
    mine, theirs = two
    async with database.tenant(theirs.id) as session:
        their_project = (await session.execute(select(Project.id).where(Project.is_default))).scalar_one()
    with pytest.raises(IntegrityError):
        async with database.tenant(mine.id) as session:
            session.add(Session(project_id=their_project))


async def test_an_id_in_use_elsewhere_tells_nothing(database: Database, two: tuple[Tenant, Tenant]) -> None:
    mine, theirs = two
    async with database.tenant(theirs.id) as session:
        their_project = (await session.execute(select(Project.id).where(Project.is_default))).scalar_one()
    async with database.tenant(mine.id) as session:
        session.add(Project(id=their_project, name="same id, other tenant"))


async def test_a_new_row_belongs_to_the_bound_tenant(database: Database, tenant: Tenant) -> None:
    async with database.tenant(tenant.id) as session:
        session.add(made := Project(name="new"))
    assert made.tenant_id == tenant.id


async def test_no_tenant_is_an_error(database: Database, tenant: Tenant) -> None:
    for nobody in (None, "", str(tenant.id)):
        with pytest.raises(NoTenant) as caught:
            async with database.tenant(nobody):  # type: ignore[arg-type]
                pass
        assert caught.value.code == "tenant_required"


async def test_the_application_role_without_a_tenant_gets_an_error(database: Database, tenant: Tenant) -> None:
    connection = await database.connect(roles.APP)
    for table in ("projects", "api_keys", "sessions", "session_events", "voice_configs", "usage_minutes", "tenants"):
        with pytest.raises(psycopg.Error) as caught:
            await connection.execute(f"SELECT 1 FROM {table}")
        assert caught.value.sqlstate == "AV001", table
    await connection.close()


async def test_clearing_the_tenant_inside_a_transaction_is_an_error(database: Database, tenant: Tenant) -> None:
    async with database.tenant(tenant.id) as session:
        await session.execute(text("SELECT set_config('app.tenant_id', '', true)"))
        with pytest.raises(DBAPIError) as caught:
            await session.execute(text("SELECT 1 FROM projects"))
        assert sqlstate(caught.value) == "AV001"
        await session.rollback()


async def test_a_used_connection_remembers_nobody(tenant: Tenant, database: Database) -> None:
    async with database.tenant(tenant.id) as session:
        used = (await session.execute(text("SELECT pg_backend_pid()"))).scalar()
        assert await seen(session) == {tenant.id}
    async with database._app.connect() as connection:
        left = await connection.execute(text("SELECT pg_backend_pid(), current_setting('app.tenant_id', true)"))
        assert left.one() == (used, "")


async def test_a_second_transaction_of_the_same_session_is_pinned_too(database: Database, tenant: Tenant) -> None:
    async with database.tenant(tenant.id) as session:
        await session.commit()
        assert await seen(session) == {tenant.id}
        await session.rollback()
        assert await seen(session) == {tenant.id}


async def test_a_block_that_fails_changes_nothing(database: Database, tenant: Tenant) -> None:
    async def fail() -> None:
        async with database.tenant(tenant.id) as session:
            session.add(Project(name="never"))
            await session.flush()
            raise LookupError

    with pytest.raises(LookupError):
        await fail()
    async with database.tenant(tenant.id) as session:
        assert (await session.execute(select(Project).where(Project.name == "never"))).all() == []


async def test_interleaved_tasks_keep_apart(database: Database, new_tenant: Callable[[], Awaitable[Tenant]]) -> None:
    """Tasks of eight tenants share ten connections; a third of the tasks are cancelled somewhere in the middle."""
    owners = [(await new_tenant()).id for _ in range(8)]
    chance = random.Random(7)
    wrong: list[object] = []

    async def work(owner: uuid.UUID) -> None:
        async with database.tenant(owner) as session:
            for _ in range(3):
                if (found := await seen(session)) != {owner}:
                    wrong.append((owner, found))
                await asyncio.sleep(chance.random() / 500)
            session.add(Project(name="made in the crowd"))

    tasks = [asyncio.create_task(work(owners[i % len(owners)])) for i in range(120)]
    for task in tasks[::3]:
        asyncio.get_running_loop().call_later(chance.random() / 5, task.cancel)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert not wrong
    assert {type(result) for result in results} <= {type(None), asyncio.CancelledError}
    for owner in owners:
        async with database.tenant(owner) as session:
            assert await seen(session) == {owner}


async def test_what_each_role_may_not_do(database: Database, tenant: Tenant) -> None:
    session = await sessions.create(database, tenant.id)
    issued = await keys.issue(database, tenant.id, "a key")
    app = f"SELECT set_config('app.tenant_id', '{tenant.id}', false)"
    forbidden = {
        roles.APP: [
            "UPDATE tenants SET tier = 'enterprise'",
            "INSERT INTO usage_events VALUES (app_tenant(), 'forged', 'api_calls', 1, now())",
            "UPDATE usage_minutes SET quantity = 0",
            "DELETE FROM api_keys",
            "DELETE FROM session_events",
            "UPDATE session_events SET content = '{}'",
            "SELECT * FROM key_revocations",
            "ALTER TABLE projects DISABLE ROW LEVEL SECURITY",
            "DROP POLICY tenant_isolation ON projects",
            "SET ROLE avb_system",
            "SET ROLE avb_owner",
            "SET ROLE avb_admin",
        ],
        roles.LEDGER: [
            "SELECT * FROM tenants",
            "SELECT * FROM api_keys",
            "SELECT * FROM sessions",
            "SELECT * FROM session_events",
            "UPDATE usage_events SET quantity = 0",
            "DELETE FROM usage_events",
            "DELETE FROM usage_minutes",
            "SET ROLE avb_app",
        ],
        roles.SYSTEM: [
            "UPDATE usage_events SET quantity = 0",
            "DELETE FROM usage_minutes",
            "DELETE FROM tenants",
            "ALTER TABLE projects DISABLE ROW LEVEL SECURITY",
            "SET ROLE avb_owner",
        ],
    }
    for role, statements in forbidden.items():
        connection = await database.connect(role)
        if role == roles.APP:
            await connection.execute(app)
        for statement in statements:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                await connection.execute(statement)
        await connection.close()
    assert (await sessions.get(database, tenant.id, session.id)).id == session.id
    async with database.tenant(tenant.id) as bound:
        assert (await bound.get(ApiKey, (tenant.id, issued.id))) is not None


async def test_the_owner_is_bound_by_the_policies_too(database: Database, tenant: Tenant) -> None:
    connection = await database.connect(roles.ADMIN)
    await connection.execute("SET ROLE avb_owner")
    with pytest.raises(psycopg.Error) as caught:
        await connection.execute("SELECT * FROM projects")
    assert caught.value.sqlstate == "AV001"
    await connection.close()


async def test_the_system_sees_all_tenants(database: Database, two: tuple[Tenant, Tenant]) -> None:
    async with database.system() as session:
        assert {one.id for one in two} <= await seen(session)


async def test_a_value_that_cannot_be_stored_is_the_callers_fault(database: Database, tenant: Tenant) -> None:
    for name in ("a\x00b", "x" * 300, "\ud800"):
        with pytest.raises(BadInput):
            async with database.tenant(tenant.id) as session:
                session.add(Project(name=name))


async def test_errors_do_not_repeat_what_was_written(database: Database, tenant: Tenant) -> None:
    with pytest.raises(DBAPIError) as caught:
        async with database.tenant(tenant.id) as session:
            session.add(UsageEvent(event_id="a secret", metric="api_calls"))
    assert "a secret" not in str(caught.value.args)
    assert "parameters hidden" in str(caught.value)


async def test_more_tasks_than_connections_wait_their_turn(database: Database, tenant: Tenant) -> None:
    async def one() -> object:
        async with database.tenant(tenant.id) as session:
            return (await session.execute(text("SELECT pg_sleep(0.01), 1"))).one()[1]

    assert await asyncio.gather(*(one() for _ in range(60))) == [1] * 60


async def test_a_statement_that_takes_too_long_is_given_up(
    address: Address, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with closing(Database(address)) as database:
        for use in (database.tenant(tenant.id), database.system()):
            async with use as session:
                assert await session.scalar(text("SHOW statement_timeout")) == "30s"
    monkeypatch.setattr(stores, "STATEMENT_TIMEOUT", 4)  # a machine that stalls for two makes no other one too long
    async with closing(Database(address)) as database:

        async def too_long(use: AbstractAsyncContextManager[AsyncSession]) -> None:
            async with use as session:
                await session.execute(text("SELECT pg_sleep(60)"))

        uses = (database.tenant(tenant.id), database.system())
        for error in await asyncio.gather(*map(too_long, uses), return_exceptions=True):
            assert isinstance(error, Unavailable)
            assert (error.code, "ask for less" in error.message) == ("store_unavailable", True)
        async with database.tenant(tenant.id) as session:
            assert await seen(session) == {tenant.id}


async def test_the_operators_own_time_limit_counts(address: Address, tenant: Tenant) -> None:
    def own(role: str) -> str:
        return psycopg.conninfo.make_conninfo(address(role), options="-c statement_timeout=7s")

    async with closing(Database(own)) as database, database.tenant(tenant.id) as session:
        assert await session.scalar(text("SHOW statement_timeout")) == "7s"


async def test_a_row_that_somebody_else_holds_is_a_try_again(database: Database, tenant: Tenant) -> None:
    async with database.tenant(tenant.id) as holder:
        await holder.execute(text("SELECT 1 FROM projects FOR UPDATE"))
        with pytest.raises(Unavailable, match="Try again"):
            async with database.tenant(tenant.id) as session:
                await session.execute(text("SELECT 1 FROM projects FOR UPDATE NOWAIT"))


async def test_a_connection_that_is_cut_is_unavailable_once(database: Database, tenant: Tenant) -> None:
    for use in (lambda: database.tenant(tenant.id), database.system):
        with pytest.raises(Unavailable) as caught:
            async with use() as session:
                await session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
        assert caught.value.code == "store_unavailable"
        async with use() as session:
            assert tenant.id in await seen(session)


async def test_a_limit_that_the_database_holds_is_named(database: Database) -> None:
    small = await tenants.create(database, f"t-{uuid.uuid4().hex[:12]}", "Small", "free")
    with pytest.raises(Forbidden, match="limit of 1 projects") as caught:
        async with database.tenant(small.id) as session:
            session.add(Project(name="one too many"))
    assert (caught.value.code, caught.value.param) == ("tenant_limit_exceeded", "projects")


async def test_no_server_is_unavailable() -> None:
    nowhere = Database(lambda role: f"postgresql://{role}@127.0.0.1:1/none")
    for use in (nowhere.tenant(uuid.uuid4()), nowhere.system()):
        with pytest.raises(Unavailable) as caught:
            async with use as session:
                await session.execute(text("SELECT 1"))
        assert caught.value.code == "store_unavailable"
    with pytest.raises(Unavailable):
        await nowhere.connect(roles.LEDGER)
    await nowhere.close()
