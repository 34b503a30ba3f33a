"""Keys, people and the operator pass one guard."""

from __future__ import annotations

import uuid

import pytest

from agentvoicebox.config.errors import BadInput, Forbidden, NotFound, Refused
from agentvoicebox.tenancy import keys, principals, sessions, team, users
from agentvoicebox.tenancy.changes import Feed
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.keyring import Grant, Keyring
from agentvoicebox.tenancy.keys import Scope
from agentvoicebox.tenancy.models import PLATFORM, Role, Tenant
from agentvoicebox.tenancy.permissions import ROLE_PERMISSIONS, Relations, Relationship, resource, sysadmin, user
from agentvoicebox.tenancy.permissions.rules import EVALUATOR
from agentvoicebox.tenancy.principals import (
    SCOPE_PERMISSIONS,
    Guard,
    Operator,
    Person,
    Principal,
    Wanted,
    portal_permissions,
)

ALL = sorted(EVALUATOR.permissions)
OF_TENANTS = [(type, permission) for type, permission in ALL if type != "platform"]


@pytest.fixture
def guard(relations: Relations) -> Guard:
    return Guard(relations)


async def key(database: Database, feed: Feed, tenant_id: uuid.UUID, *scopes: str) -> Grant:
    """What a new key of these scopes is a key to."""
    issued = await keys.issue(database, tenant_id, "A key", scopes)
    return await Keyring(database, feed).verify(issued.key)


async def person(database: Database, tenant_id: uuid.UUID, role: Role) -> Person:
    made = await users.create(database, f"{uuid.uuid4().hex}@example.com")
    await team.add(database, tenant_id, made.id, role)
    return Person(made.id, tenant_id)


async def allowed(guard: Guard, principal: Principal | None, tenant_id: uuid.UUID) -> set[str]:
    """Everything that a principal may in general."""
    found = set()
    for type, permission in OF_TENANTS:
        try:
            await guard.may(principal, tenant_id, type, permission)
        except Forbidden:
            continue
        found.add(f"{type}.{permission}")
    return found


@pytest.mark.parametrize("scope", list(Scope))
async def test_flw_22_keys_pass_the_guard_by_their_scopes(
    database: Database, feed: Feed, tenant: Tenant, other: Tenant, guard: Guard, scope: Scope
) -> None:
    grant = await key(database, feed, tenant.id, scope)
    assert await allowed(guard, grant, tenant.id) == SCOPE_PERMISSIONS[scope] != set()
    assert await allowed(guard, grant, other.id) == set()
    with pytest.raises(Forbidden) as caught:
        await guard.may(grant, tenant.id, "tenant", "manage")
    assert caught.value.code == "insufficient_scope"
    with pytest.raises(Forbidden) as caught:
        await guard.may(grant, other.id, "tenant", "manage")
    assert caught.value.code == "permission_denied"


def test_what_scopes_are_for() -> None:
    assert set(SCOPE_PERMISSIONS) == set(Scope)
    known = {f"{type}.{permission}" for type, permission in OF_TENANTS}
    for scope, granted in SCOPE_PERMISSIONS.items():
        assert granted <= known, scope
        # No key may more than an administrator of its tenant.
        assert granted <= ROLE_PERMISSIONS[Role.ADMIN]
    assert SCOPE_PERMISSIONS[Scope.SESSIONS] <= ROLE_PERMISSIONS[Role.OPERATOR]
    assert SCOPE_PERMISSIONS[Scope.REALTIME] <= ROLE_PERMISSIONS[Role.OPERATOR]
    assert SCOPE_PERMISSIONS[Scope.USAGE] <= ROLE_PERMISSIONS[Role.VIEWER]
    assert SCOPE_PERMISSIONS[Scope.BILLING] <= ROLE_PERMISSIONS[Role.BILLING]
    # A client that speaks cannot read what others have said, nor change anything.
    assert not any(one.startswith("session.") for one in SCOPE_PERMISSIONS[Scope.REALTIME])


async def test_scopes_add_up(database: Database, feed: Feed, tenant: Tenant, guard: Guard) -> None:
    grant = await key(database, feed, tenant.id, "usage", "billing")
    assert await allowed(guard, grant, tenant.id) == SCOPE_PERMISSIONS["usage"] | SCOPE_PERMISSIONS["billing"]


async def test_the_refusal_names_a_scope_that_is_enough(database: Database, feed: Feed, tenant: Tenant) -> None:
    grant = await key(database, feed, tenant.id, "realtime")
    with pytest.raises(Forbidden, match="use one with the scope sessions or admin"):
        principals.may(grant, tenant.id, "session", "terminate")
    with pytest.raises(Forbidden, match="no scope of keys is enough"):
        principals.may(grant, tenant.id, "tenant", "manage")


@pytest.mark.parametrize("role", team.ROLES)
async def test_people_pass_it_by_their_roles(
    database: Database, tenant: Tenant, other: Tenant, guard: Guard, role: Role
) -> None:
    somebody = await person(database, tenant.id, role)
    assert await allowed(guard, somebody, tenant.id) == ROLE_PERMISSIONS[role]
    assert await allowed(guard, Person(somebody.user_id), tenant.id) == ROLE_PERMISSIONS[role]
    assert await allowed(guard, somebody, other.id) == set()
    assert await allowed(guard, Person(somebody.user_id), other.id) == set()
    assert await allowed(guard, Person(somebody.user_id, other.id), tenant.id) == set()


async def test_people_have_their_own_things(
    database: Database, tenant: Tenant, relations: Relations, guard: Guard
) -> None:
    somebody = await person(database, tenant.id, Role.BILLING)
    session_id = uuid.uuid4()
    await relations.write(tenant.id, [Relationship(resource("session", session_id), "owner", user(somebody.user_id))])
    await guard.may(somebody, tenant.id, "session", "view", session_id)
    for other_id in (None, uuid.uuid4()):
        with pytest.raises(Forbidden) as caught:
            await guard.may(somebody, tenant.id, "session", "view", other_id)
        assert caught.value.code == "permission_denied"


async def test_the_operator_and_sysadmins_may_everything_everywhere(
    database: Database, tenant: Tenant, other: Tenant, relations: Relations, guard: Guard
) -> None:
    everything = {f"{type}.{permission}" for type, permission in OF_TENANTS}
    assert await allowed(guard, Operator(), tenant.id) == everything
    root = await users.create(database, f"{uuid.uuid4().hex}@example.com")
    await relations.write(PLATFORM, [sysadmin(root.id)])
    for signed_in_for in (None, tenant.id, other.id):
        assert await allowed(guard, Person(root.id, signed_in_for), tenant.id) == everything
    await relations.delete(PLATFORM, [sysadmin(root.id)])
    assert await allowed(guard, Person(root.id, other.id), tenant.id) == set()


async def test_flw_70_and_71_nobody_may_anything(tenant: Tenant, guard: Guard) -> None:
    """Whoever has no credential is refused, whatever they ask for: nothing is open unless it is said to be."""
    for type, permission in ALL:
        with pytest.raises(Refused) as caught:
            await guard.may(None, tenant.id, type, permission)
        assert caught.value.status == 401
    with pytest.raises(Refused):
        await guard.may_any(None, tenant.id, [Wanted("tenant", "view"), Wanted("session", "view")])


async def test_people_are_nobody_to_the_question_about_keys(tenant: Tenant) -> None:
    somebody: Principal = Person(uuid.uuid4())
    with pytest.raises(Forbidden):
        principals.may(somebody, tenant.id, "tenant", "view")  # type: ignore[arg-type]


@pytest.mark.parametrize(("type", "permission"), [("tenant", "admin"), ("tenant", "viewer"), ("robot", "view")])
async def test_con_63_the_guard_knows_permissions_only(
    database: Database, tenant: Tenant, guard: Guard, type: str, permission: str
) -> None:
    for principal in (Operator(), None, await person(database, tenant.id, Role.ADMIN)):
        with pytest.raises(BadInput):
            await guard.may(principal, tenant.id, type, permission)


async def test_flw_72_any_of_several_whatever_their_type(
    database: Database, feed: Feed, tenant: Tenant, guard: Guard
) -> None:
    billing, speaker = await person(database, tenant.id, Role.BILLING), await key(database, feed, tenant.id, "realtime")
    await guard.may_any(billing, tenant.id, [Wanted("session", "view"), Wanted("tenant", "billing_access")])
    await guard.may_any(speaker, tenant.id, [Wanted("tenant", "manage"), Wanted("persona", "use", uuid.uuid4())])
    with pytest.raises(Forbidden) as caught:
        await guard.may_any(billing, tenant.id, [Wanted("session", "view"), Wanted("project", "view")])
    assert caught.value.code == "permission_denied"
    with pytest.raises(Forbidden) as caught:
        await guard.may_any(speaker, tenant.id, [Wanted("session", "view"), Wanted("project", "view")])
    assert caught.value.code == "insufficient_scope"
    # What does not exist is never silently passed over, whoever asks.
    for unknown in (Wanted("robot", "view"), Wanted("project", "viewer")):
        with pytest.raises(BadInput):
            await guard.may_any(Operator(), tenant.id, [Wanted("tenant", "view"), unknown])
    with pytest.raises(BadInput):
        await guard.may_any(Operator(), tenant.id, [])


async def test_key_18_nobody_gives_a_key_more_than_they_have(
    database: Database, feed: Feed, tenant: Tenant, other: Tenant, guard: Guard
) -> None:
    developer, usage = await person(database, tenant.id, Role.DEVELOPER), await key(database, feed, tenant.id, "usage")
    everything = await key(database, feed, tenant.id, "admin")
    for principal, may, may_not in (
        (developer, "realtime sessions usage", "billing admin"),
        (usage, "usage", "realtime sessions billing admin"),
        (everything, "realtime sessions usage billing admin", ""),
        (Operator(), "realtime sessions usage billing admin", ""),
    ):
        await guard.may_grant(principal, tenant.id, may.split())
        for scope in may_not.split():
            with pytest.raises(Forbidden):
                await guard.may_grant(principal, tenant.id, [*may.split(), scope])
    with pytest.raises(Forbidden):
        await guard.may_grant(everything, other.id, ["usage"])
    with pytest.raises(BadInput):
        await guard.may_grant(Operator(), tenant.id, ["everything"])


async def test_flw_60_another_tenants_session_is_not_found_behind_ones_own_permission(
    database: Database, feed: Feed, tenant: Tenant, other: Tenant, guard: Guard
) -> None:
    """The guard decides by the tenant that is named, and so does the row: there is no session by its id alone."""
    theirs = await sessions.create(database, other.id)
    for principal in (await person(database, tenant.id, Role.ADMIN), await key(database, feed, tenant.id, "admin")):
        with pytest.raises(Forbidden):
            await guard.may(principal, other.id, "session", "view", theirs.id)
        await guard.may(principal, tenant.id, "session", "view", theirs.id)
        with pytest.raises(NotFound):
            await sessions.get(database, tenant.id, theirs.id)


async def test_a_tenant_by_another_id_is_not_the_tenant(
    database: Database, feed: Feed, tenant: Tenant, other: Tenant, guard: Guard
) -> None:
    for principal in (await person(database, tenant.id, Role.ADMIN), await key(database, feed, tenant.id, "admin")):
        await guard.may(principal, tenant.id, "tenant", "view", tenant.id)
        with pytest.raises(Forbidden) as caught:
            await guard.may(principal, tenant.id, "tenant", "view", other.id)
        assert caught.value.code == "permission_denied"


@pytest.mark.parametrize(
    ("roles", "words"),
    [
        (["sysadmin"], "sessions:view sessions:manage api_keys:view api_keys:manage billing:view"),
        (["admin"], "sessions:view sessions:manage api_keys:view api_keys:manage billing:view"),
        (["developer"], "sessions:view sessions:manage api_keys:view api_keys:manage"),
        (["operator"], "sessions:view sessions:manage"),
        (["viewer"], "sessions:view"),
        (["billing"], "billing:view"),
        (["viewer", "billing"], "sessions:view billing:view"),
        ([], ""),
        (["offline_access", "king"], ""),
    ],
)
def test_azn_09_what_the_portal_shows(roles: list[str], words: str) -> None:
    assert portal_permissions(roles) == set(words.split())
