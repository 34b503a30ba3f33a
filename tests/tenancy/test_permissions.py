"""Permissions over the real table: shared by processes, denied when in doubt, and never another tenant's."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from agentvoicebox.config.errors import BadInput, Forbidden, Unavailable
from agentvoicebox.tenancy import audit, team, tenants, users
from agentvoicebox.tenancy.changes import Feed
from agentvoicebox.tenancy.database import Database, external, sqlstate
from agentvoicebox.tenancy.models import PLATFORM, ActorType, Role, Tenant
from agentvoicebox.tenancy.permissions import (
    PLATFORM_ITSELF,
    Permissions,
    Relations,
    Relationship,
    Resource,
    Subject,
    resource,
    role,
    store,
    sysadmin,
    user,
)
from agentvoicebox.tenancy.principals import Guard, Person

NewTenant = Callable[[], Awaitable[Tenant]]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that stalls, an answer may take longer than people wait for one."""
    monkeypatch.setattr("agentvoicebox.tenancy.permissions.relations._PATIENCE", 30)


@pytest.fixture
def deaf(database: Database) -> Feed:
    """A feed that is told nothing, and believes to know everything: it is fresh however long this process stalls."""
    feed = Feed(database)
    feed.fresh_until = float("inf")
    return feed


async def somebody(database: Database, *tenant_ids: uuid.UUID, role: Role = Role.BILLING) -> uuid.UUID:
    """A person, who is a member of these tenants."""
    person = await users.create(database, f"{uuid.uuid4().hex}@example.com")
    for tenant_id in tenant_ids:
        await team.add(database, tenant_id, person.id, role)
    return person.id


async def eventually(question: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while not await question():
            await asyncio.sleep(0.01)


async def test_azn_01_check_write_delete_and_lookup(database: Database, tenant: Tenant, relations: Relations) -> None:
    engine: Permissions = relations
    anna, ben = await somebody(database, tenant.id), await somebody(database, tenant.id)
    project = resource("project", uuid.uuid4())
    assert not await engine.check(tenant.id, project, "develop", user(anna))
    given = [Relationship(project, "developer", user(anna)), role(tenant.id, Role.DEVELOPER, ben)]
    await engine.write(tenant.id, given)
    await engine.write(tenant.id, given)  # once or twice, it is the same
    assert await engine.check(tenant.id, project, "develop", user(anna))
    assert await engine.check(tenant.id, project, "develop", user(ben))
    assert await engine.lookup_subjects(tenant.id, project, "develop") == {user(anna), user(ben)}
    assert await engine.lookup_subjects(tenant.id, project, "delete") == set()
    assert await relations.explain(tenant.id, project, "develop", user(ben)) == [
        f"{project} develop",
        f"tenant:{tenant.id} develop",
        f"tenant:{tenant.id}#developer@{user(ben)}",
    ]
    await engine.delete(tenant.id, given)
    await engine.delete(tenant.id, given)
    assert not await engine.check(tenant.id, project, "develop", user(anna))
    assert not await engine.check(tenant.id, project, "develop", user(ben))


async def test_a_public_theme_is_everybodys(database: Database, tenant: Tenant, relations: Relations) -> None:
    theme, stranger = resource("theme", uuid.uuid4()), user(uuid.uuid4())
    await relations.write(tenant.id, [Relationship(theme, "public", Subject("user", "*"))])
    assert await relations.check(tenant.id, theme, "view", stranger)
    assert not await relations.check(tenant.id, theme, "edit", stranger)
    assert Subject("user", "*") in await relations.lookup_subjects(tenant.id, theme, "view")


async def test_a_tenants_relationships_count_there_only(
    database: Database, tenant: Tenant, other: Tenant, relations: Relations
) -> None:
    anna = await somebody(database, tenant.id, role=Role.ADMIN)
    project = resource("project", uuid.uuid4())
    await relations.write(tenant.id, [Relationship(project, "owner", user(anna))])
    assert await relations.check(tenant.id, project, "delete", user(anna))
    # The same ids, asked of the other tenant.
    assert not await relations.check(other.id, project, "view", user(anna))
    assert not await relations.check(other.id, resource("tenant", other.id), "view", user(anna))
    assert not await relations.check(other.id, resource("tenant", tenant.id), "view", user(anna))
    assert not await relations.check(tenant.id, resource("tenant", other.id), "view", user(anna))
    assert await relations.lookup_subjects(tenant.id, resource("tenant", other.id), "view") == set()
    assert await relations.explain(tenant.id, resource("tenant", other.id), "view", user(anna)) == []


async def test_con_64_sysadmins_are_the_platforms(database: Database, tenant: Tenant, relations: Relations) -> None:
    root = await somebody(database)
    assert not await relations.check(tenant.id, resource("session", uuid.uuid4()), "terminate", user(root))
    await relations.write(PLATFORM, [sysadmin(root)])
    assert await relations.check(tenant.id, resource("session", uuid.uuid4()), "terminate", user(root))
    assert await relations.check(tenant.id, resource("tenant", tenant.id), "manage", user(root))
    assert await relations.check(PLATFORM, PLATFORM_ITSELF, "manage", user(root))
    assert user(root) in await relations.lookup_subjects(tenant.id, resource("tenant", tenant.id), "view")
    # Not even they have what is found nowhere: another tenant's row under this tenant's name.
    assert not await relations.check(tenant.id, resource("tenant", uuid.uuid4()), "manage", user(root))
    assert not await relations.check(PLATFORM, resource("project", uuid.uuid4()), "view", user(root))
    await relations.delete(PLATFORM, [sysadmin(root)])
    assert not await relations.check(tenant.id, resource("tenant", tenant.id), "manage", user(root))


@pytest.mark.parametrize("platform", [False, True])
async def test_no_transaction_of_a_tenant_makes_a_sysadmin(database: Database, tenant: Tenant, platform: bool) -> None:
    anna = await somebody(database, tenant.id)
    wanted = sysadmin(anna) if platform else role(tenant.id, Role.SYSADMIN, anna)
    with pytest.raises(DBAPIError) as caught:
        async with database.tenant(tenant.id) as session:
            await store.put(session, PLATFORM if platform else tenant.id, [wanted])
    assert sqlstate(caught.value) == "42501"


async def test_flw_17_people_have_one_id(database: Database, tenant: Tenant, relations: Relations) -> None:
    """Roles are written and checked by our own id of somebody; the identity provider's is refused, not stored."""
    keycloak = uuid.uuid4()
    person = await users.create(database, f"{uuid.uuid4().hex}@example.com", keycloak_id=str(keycloak))
    await team.add(database, tenant.id, person.id, Role.VIEWER)
    with pytest.raises(BadInput, match="no member"):
        await relations.write(tenant.id, [role(tenant.id, Role.ADMIN, keycloak)])
    with pytest.raises(BadInput, match="no member"):
        await relations.write(PLATFORM, [sysadmin(keycloak)])
    assert not await relations.check(tenant.id, resource("tenant", tenant.id), "view", user(keycloak))
    assert await relations.check(tenant.id, resource("tenant", tenant.id), "view", user(person.id))


async def test_flw_18_what_goes_wrong_denies_and_is_told(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    away = Database(external("postgresql://nobody@127.0.0.1:1/nothing"))
    relations = Relations(away, Feed(away))
    tenant_id, anna = uuid.uuid4(), uuid.uuid4()
    with caplog.at_level(logging.WARNING):
        assert not await relations.check(tenant_id, resource("tenant", tenant_id), "view", user(anna))
    assert "denied" in caplog.text
    with pytest.raises(Unavailable):
        await relations.write(tenant_id, [role(tenant_id, Role.ADMIN, anna)])
    with pytest.raises(Unavailable):
        await relations.delete(tenant_id, [role(tenant_id, Role.ADMIN, anna)])
    with pytest.raises(Unavailable):
        await relations.lookup_subjects(tenant_id, resource("tenant", tenant_id), "view")
    # A mistake of ours is not a denial, though.
    with pytest.raises(BadInput):
        await relations.check(tenant_id, resource("tenant", tenant_id), "admin", user(anna))
    await relations.close()
    await away.close()


async def test_azn_02_what_breaks_unexpectedly_denies(
    database: Database, tenant: Tenant, deaf: Feed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(_: AsyncSession, __: uuid.UUID) -> AsyncIterator[list[Relationship]]:
        raise RuntimeError("broken")
        yield []

    read = store.read
    anna = await somebody(database, tenant.id, role=Role.ADMIN)
    relations = Relations(database, deaf)
    monkeypatch.setattr(store, "read", broken)
    assert not await relations.check(tenant.id, resource("tenant", tenant.id), "view", user(anna))
    assert "broken" in caplog.text
    monkeypatch.setattr(store, "read", read)
    assert await relations.check(tenant.id, resource("tenant", tenant.id), "view", user(anna))


async def test_azn_02_waiting_has_an_end(
    database: Database, tenant: Tenant, deaf: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(_: AsyncSession, __: uuid.UUID) -> AsyncIterator[list[Relationship]]:
        await asyncio.Event().wait()
        yield []

    anna = await somebody(database, tenant.id, role=Role.ADMIN)
    relations = Relations(database, deaf)
    monkeypatch.setattr(store, "read", slow)
    monkeypatch.setattr("agentvoicebox.tenancy.permissions.relations._PATIENCE", 0.01)
    assert not await relations.check(tenant.id, resource("tenant", tenant.id), "view", user(anna))
    with pytest.raises(Unavailable):
        await relations.lookup_subjects(tenant.id, resource("tenant", tenant.id), "view")
    await relations.close()


async def test_all_or_nothing(database: Database, tenant: Tenant, relations: Relations) -> None:
    anna = await somebody(database, tenant.id)
    good = role(tenant.id, Role.ADMIN, anna)
    for bad in (role(tenant.id, Role.ADMIN, uuid.uuid4()), Relationship(good.resource, "king", good.subject)):
        with pytest.raises(BadInput):
            await relations.write(tenant.id, [good, bad])
    assert not await relations.check(tenant.id, good.resource, "administrate", user(anna))


async def test_azn_15_another_processs_change_is_seen(
    database: Database, tenant: Tenant, relations: Relations, admin: psycopg.AsyncConnection
) -> None:
    anna = await somebody(database, tenant.id, role=Role.ADMIN)
    mine = resource("tenant", tenant.id)
    assert await relations.check(tenant.id, mine, "administrate", user(anna))
    await admin.execute("DELETE FROM relations WHERE tenant_id = %s", (tenant.id,))

    async def denied() -> bool:
        return not await relations.check(tenant.id, mine, "administrate", user(anna))

    await eventually(denied)
    await admin.execute(
        "INSERT INTO relations VALUES (%s, 'tenant', %s, 'viewer', 'user', %s)",
        (tenant.id, str(tenant.id), str(anna)),
    )

    async def granted() -> bool:
        return await relations.check(tenant.id, mine, "view", user(anna))

    await eventually(granted)
    await admin.execute("UPDATE relations SET relation = 'billing' WHERE tenant_id = %s", (tenant.id,))

    async def gone() -> bool:
        return not await relations.check(tenant.id, mine, "view", user(anna))

    await eventually(gone)


async def test_without_a_fresh_feed_every_answer_comes_from_the_database(
    database: Database, tenant: Tenant, admin: psycopg.AsyncConnection
) -> None:
    anna = await somebody(database, tenant.id, role=Role.ADMIN)
    mine = resource("tenant", tenant.id)
    feed = Feed(database)
    await feed.start()
    relations = Relations(database, feed)
    theme, root = resource("theme", uuid.uuid4()), await somebody(database)
    await relations.write(tenant.id, [Relationship(theme, "public", Subject("user", "*"))])
    assert await relations.check(tenant.id, mine, "administrate", user(anna))
    await feed.close()
    await admin.execute("DELETE FROM relations WHERE tenant_id = %s AND resource_type = 'tenant'", (tenant.id,))
    assert not await relations.check(tenant.id, mine, "administrate", user(anna))
    assert await relations.lookup_subjects(tenant.id, mine, "administrate") == set()
    assert await relations.check(tenant.id, theme, "view", user(anna))
    assert not await relations.check(tenant.id, theme, "edit", user(root))
    await relations.write(PLATFORM, [sysadmin(root)])
    assert await relations.check(tenant.id, theme, "edit", user(root))
    await relations.delete(PLATFORM, [sysadmin(root)])


async def test_ones_own_change_counts_at_once(database: Database, tenant: Tenant, deaf: Feed) -> None:
    """Without waiting for the log of changes, also when it is not `Relations` that makes it."""
    anna, ben = await somebody(database, tenant.id, role=Role.ADMIN), await somebody(database, tenant.id)
    relations = Relations(database, deaf)
    mine = resource("tenant", tenant.id)
    assert await relations.check(tenant.id, mine, "administrate", user(anna))
    await team.change_role(database, tenant.id, ben, Role.ADMIN)
    assert await relations.check(tenant.id, mine, "administrate", user(ben))
    await team.remove(database, tenant.id, anna)
    assert not await relations.check(tenant.id, mine, "view", user(anna))


async def test_flw_40_a_role_counts_when_its_transaction_does(
    database: Database, tenant: Tenant, relations: Relations
) -> None:
    anna = await somebody(database, tenant.id)
    mine = resource("tenant", tenant.id)
    with contextlib.suppress(ZeroDivisionError):
        async with database.tenant(tenant.id) as session:
            await store.put(session, tenant.id, [role(tenant.id, Role.ADMIN, anna)])
            assert not await relations.check(tenant.id, mine, "administrate", user(anna))
            raise ZeroDivisionError
    assert not await relations.check(tenant.id, mine, "administrate", user(anna))
    async with database.tenant(tenant.id) as session:
        await store.put(session, tenant.id, [role(tenant.id, Role.ADMIN, anna)])
        assert not await relations.check(tenant.id, mine, "administrate", user(anna))
    assert await relations.check(tenant.id, mine, "administrate", user(anna))


async def test_what_was_read_before_a_change_is_not_kept(
    database: Database, tenant: Tenant, deaf: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    anna = await somebody(database, tenant.id, role=Role.ADMIN)
    ben = await somebody(database, tenant.id, role=Role.ADMIN)
    mine, relations = resource("tenant", tenant.id), Relations(database, deaf)
    read, has_read, go_on = store.read, asyncio.Event(), asyncio.Event()

    async def slowly(session: AsyncSession, tenant_id: uuid.UUID) -> AsyncIterator[list[Relationship]]:
        found = [some async for some in read(session, tenant_id)]
        if tenant_id == tenant.id:
            has_read.set()
            await go_on.wait()
        for some in found:
            yield some

    monkeypatch.setattr(store, "read", slowly)
    asked = asyncio.create_task(relations.check(tenant.id, mine, "administrate", user(anna)))
    await has_read.wait()
    await team.remove(database, tenant.id, anna)
    go_on.set()
    assert await asked  # it was asked before
    assert not await relations.check(tenant.id, mine, "administrate", user(anna))
    assert await relations.check(tenant.id, mine, "administrate", user(ben))


async def test_it_is_read_once_for_all_who_ask_and_kept_within_bounds(
    database: Database, new_tenant: NewTenant, deaf: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [await new_tenant() for _ in range(3)]
    anna = await somebody(database, *(each.id for each in made), role=Role.VIEWER)
    reads: list[uuid.UUID] = []
    read = store.read

    async def counted(session: AsyncSession, tenant_id: uuid.UUID) -> AsyncIterator[list[Relationship]]:
        reads.append(tenant_id)
        async for some in read(session, tenant_id):
            yield some

    async def ask(tenant: Tenant) -> None:
        assert await relations.check(tenant.id, resource("tenant", tenant.id), "view", user(anna))

    monkeypatch.setattr(store, "read", counted)
    relations = Relations(database, deaf, capacity=12)  # of two tenants
    await asyncio.gather(*(ask(made[0]) for _ in range(20)))
    assert reads.count(made[0].id) == reads.count(PLATFORM) == 1
    for each in (made[1], made[0], made[2], made[0]):
        await ask(each)
    assert [reads.count(each.id) for each in made] == [1, 1, 1]
    await ask(made[1])  # which was asked for longest ago
    assert [reads.count(each.id) for each in made] == [1, 2, 1]
    assert reads.count(PLATFORM) == 1


async def test_whoever_asks_may_give_up(database: Database, tenant: Tenant, feed: Feed) -> None:
    anna = await somebody(database, tenant.id, role=Role.ADMIN)
    relations, mine = Relations(database, feed), resource("tenant", tenant.id)
    first = asyncio.create_task(relations.check(tenant.id, mine, "view", user(anna)))
    second = asyncio.create_task(relations.check(tenant.id, mine, "view", user(anna)))
    await asyncio.sleep(0)
    first.cancel()
    assert await second
    await asyncio.gather(first, return_exceptions=True)
    assert first.cancelled()


async def test_changes_of_permissions_are_audited(
    database: Database, tenant: Tenant, relations: Relations, admin: psycopg.AsyncConnection
) -> None:
    anna, boss = await somebody(database, tenant.id), uuid.uuid4()
    given = role(tenant.id, Role.OPERATOR, anna)
    with audit.acting(audit.Actor(ActorType.USER, boss)):
        await relations.write(tenant.id, [given])
        await relations.write(tenant.id, [given])  # changes nothing, and says nothing
        await relations.delete(tenant.id, [given])
    cursor = await admin.execute(
        "SELECT resource_type, resource_id, old_values, new_values FROM audit_log "
        "WHERE tenant_id = %s AND action = 'permission_change' AND actor_id = %s ORDER BY seq",
        (tenant.id, boss),
    )
    value = {"relation": "operator", "subject": f"user:{anna}"}
    about = ("tenant", str(tenant.id))
    assert await cursor.fetchall() == [(*about, None, value), (*about, value, None)]


async def test_usr_19_ten_thousand_people(
    database: Database, tenant: Tenant, relations: Relations, admin: psycopg.AsyncConnection
) -> None:
    """More than are read in one go."""
    people = "SELECT md5(%(tenant)s || n)::uuid AS id FROM generate_series(1, 10000) AS n"
    names = {"tenant": str(tenant.id)}
    await admin.execute(
        "SELECT set_config('session_replication_role', 'replica', false)"
    )  # else each is counted against the limit
    await admin.execute(f"INSERT INTO users (id, email) SELECT id, id || '@example.com' FROM ({people}) AS p", names)
    await admin.execute(
        f"INSERT INTO members (tenant_id, user_id) SELECT %(tenant)s::uuid, id FROM ({people}) AS p", names
    )
    await admin.execute(
        "INSERT INTO relations SELECT %(tenant)s::uuid, 'tenant', %(tenant)s, 'operator', 'user', id "
        f"FROM ({people}) AS p",
        names,
    )
    everybody = await relations.lookup_subjects(tenant.id, resource("tenant", tenant.id), "operate")
    assert len({subject for subject in everybody}) == 10_000
    assert await relations.check(tenant.id, resource("session", "any"), "terminate", min(everybody))
    page = await team.list_(database, tenant.id, page=100, page_size=100)
    assert (page.total, len(page.items)) == (10_000, 100)
    assert all(member.roles == (Role.OPERATOR,) for member in page.items)


# P8, against a table of its own: which roles have a permission of the tenant, and which relations of a project do.
ROLES_WITH = {
    "manage": "sysadmin",
    "administrate": "sysadmin admin",
    "develop": "sysadmin admin developer",
    "operate": "sysadmin admin developer operator",
    "view": "sysadmin admin developer operator viewer",
    "billing_access": "sysadmin admin billing",
}
OF_A_PROJECT = {
    "admin": ("", "administrate"),
    "develop": ("owner developer", "develop"),
    "view": ("owner developer viewer", "view"),
    "delete": ("owner", "administrate"),
}
PEOPLE, PROJECTS = range(3), ("p0", "p1")
held = st.sets(
    st.tuples(st.sampled_from(PEOPLE), st.just("tenant"), st.sampled_from(["admin", "developer", "operator", "viewer"]))
    | st.tuples(st.sampled_from(PEOPLE), st.sampled_from(PROJECTS), st.sampled_from(["owner", "developer", "viewer"])),
    max_size=5,
)
asked = st.tuples(st.just("tenant"), st.sampled_from(sorted(ROLES_WITH))) | st.tuples(
    st.sampled_from(PROJECTS), st.sampled_from(sorted(OF_A_PROJECT))
)


@pytest.fixture(scope="module")
async def staff(database: Database) -> tuple[uuid.UUID, uuid.UUID, Sequence[uuid.UUID]]:
    """A tenant, another one, and people who are members of both, and may nothing but see bills there."""
    mine, other = [await tenants.create(database, f"p8-{uuid.uuid4().hex[:12]}", "P8", "enterprise") for _ in "ab"]
    return mine.id, other.id, [await somebody(database, mine.id, other.id) for _ in PEOPLE]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(held=held, asked=asked, who=st.sampled_from(PEOPLE))
async def test_p8_permission_enforcement(
    relations: Relations,
    staff: tuple[uuid.UUID, uuid.UUID, Sequence[uuid.UUID]],
    held: set[tuple[int, str, str]],
    asked: tuple[str, str],
    who: int,
) -> None:
    """Checks are accurate, and a denial is a 403 `permission_denied`."""
    tenant_id, other_id, people = staff
    of = {"tenant": resource("tenant", tenant_id), **{each: Resource("project", each) for each in PROJECTS}}
    given = [Relationship(of[on], relation, user(people[number])) for number, on, relation in held]
    on, permission = asked
    mine = {(where, relation) for number, where, relation in held if number == who} | {("tenant", "billing")}
    own, of_tenant = ("", permission) if on == "tenant" else OF_A_PROJECT[permission]
    expected = any(("tenant", each) in mine for each in ROLES_WITH[of_tenant].split())
    expected = expected or any((on, each) in mine for each in own.split())

    await relations.write(tenant_id, given)
    try:
        assert await relations.check(tenant_id, of[on], permission, user(people[who])) is expected
        guard, person = Guard(relations), Person(people[who], tenant_id)
        if expected:
            await guard.may(person, tenant_id, of[on].type, permission, of[on].id)
        else:
            with pytest.raises(Forbidden) as caught:
                await guard.may(person, tenant_id, of[on].type, permission, of[on].id)
            assert (caught.value.status, caught.value.code) == (403, "permission_denied")
        if permission != "billing_access":
            with pytest.raises(Forbidden):
                await guard.may(person, other_id, of[on].type, permission, None if on == "tenant" else of[on].id)
    finally:
        await relations.delete(tenant_id, given)
