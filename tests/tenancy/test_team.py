"""Joining a tenant, working there and leaving it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from agentvoicebox.config.errors import AvbError, BadInput, Conflict, Forbidden, NotFound
from agentvoicebox.tenancy import team, users
from agentvoicebox.tenancy.changes import Feed
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.models import InvitationStatus, MemberStatus, Role, Tenant, User
from agentvoicebox.tenancy.permissions import Relations, Relationship, resource, role, store, user
from agentvoicebox.tenancy.team import Invited

NewPerson = Callable[..., Awaitable[User]]
Blocked = Callable[[int], Awaitable[None]]


@pytest.fixture(scope="module")
async def relations(database: Database) -> AsyncIterator[Relations]:
    feed = Feed(database)
    await feed.start()
    relations = Relations(database, feed)
    yield relations
    await relations.close()
    await feed.close()


@pytest.fixture
def person(database: Database) -> NewPerson:
    async def make(tenant: Tenant | None = None, role: Role = Role.VIEWER, name: str = "") -> User:
        made = await users.create(database, f"{uuid.uuid4().hex}@example.com", name)
        if tenant is not None:
            await team.add(database, tenant.id, made.id, role)
        return made

    return make


@pytest.fixture
async def boss(person: NewPerson, tenant: Tenant) -> User:
    return await person(tenant, Role.ADMIN, "Boss")


async def limit(admin: psycopg.AsyncConnection, tenant: Tenant, most: int) -> None:
    await admin.execute("UPDATE tenants SET max_users = %s WHERE id = %s", (most, tenant.id))


async def hold_audit(admin: psycopg.AsyncConnection, tenant: Tenant) -> None:
    """Let nobody write the tenant's next line of audit before the transaction ends."""
    await admin.execute("SELECT FROM audit_heads WHERE tenant_id = %s FOR UPDATE", (tenant.id,))


async def expire(admin: psycopg.AsyncConnection, invited: Invited) -> None:
    await admin.execute("UPDATE invitations SET expires_at = now() - interval '1 second' WHERE id = %s", (invited.id,))


async def test_usr_10_the_team(database: Database, tenant: Tenant, boss: User, person: NewPerson) -> None:
    nameless = await person(tenant, Role.BILLING)
    await users.patch_profile(database, boss.id, {"last_name": "Baggins"})
    page = await team.list_(database, tenant.id)
    assert (page.total, page.page, page.page_size) == (2, 1, 20)
    first, second = page.items
    assert (first.user_id, first.name, first.email, first.roles) == (boss.id, "Boss Baggins", boss.email, (Role.ADMIN,))
    assert (second.name, second.roles, second.status) == (nameless.email, (Role.BILLING,), MemberStatus.ACTIVE)
    assert [member.user_id for member in (await team.list_(database, tenant.id, page=2, page_size=1)).items] == [
        nameless.id
    ]
    assert await team.get(database, tenant.id, boss.id) == first


async def test_a_team_is_its_tenants(
    database: Database, tenant: Tenant, other: Tenant, boss: User, person: NewPerson
) -> None:
    theirs = await person(other, Role.ADMIN)
    invited = await team.invite(database, other.id, "somebody@example.com", "viewer")
    assert [member.user_id for member in (await team.list_(database, tenant.id)).items] == [boss.id]
    assert (await team.invitations(database, tenant.id)).total == 0
    for attempt in (
        team.get(database, tenant.id, theirs.id),
        team.change_role(database, tenant.id, theirs.id, "viewer"),
        team.remove(database, tenant.id, theirs.id),
        team.resend(database, tenant.id, invited.id),
        team.revoke(database, tenant.id, invited.id),
    ):
        with pytest.raises(NotFound):
            await attempt
    assert await team.roles(database, other.id, theirs.id) == {Role.ADMIN}
    assert await team.roles(database, tenant.id, theirs.id) == frozenset()


async def test_usr_11_inviting_and_accepting(
    database: Database, tenant: Tenant, boss: User, person: NewPerson, relations: Relations
) -> None:
    newcomer = await person()
    invited = await team.invite(database, tenant.id, newcomer.email.upper(), "developer", boss.id)
    assert invited.token not in repr(invited)
    waiting = (await team.invitations(database, tenant.id)).items[0]
    assert (waiting.id, waiting.email, waiting.role) == (invited.id, newcomer.email, Role.DEVELOPER)
    assert (waiting.status, waiting.invited_by) == (InvitationStatus.PENDING, boss.id)
    assert not await relations.check(tenant.id, resource("tenant", tenant.id), "develop", user(newcomer.id))
    assert await team.accept(database, invited.token, newcomer.id, email_verified=True) == tenant.id
    assert await relations.check(tenant.id, resource("tenant", tenant.id), "develop", user(newcomer.id))
    member = await team.get(database, tenant.id, newcomer.id)
    assert (member.roles, member.status) == ((Role.DEVELOPER,), MemberStatus.ACTIVE)
    assert (await team.invitations(database, tenant.id)).total == 0
    with pytest.raises(Conflict) as caught:
        await team.accept(database, invited.token, newcomer.id, email_verified=True)
    assert caught.value.code == "invitation_accepted"


async def test_gap_01_it_lasts_seven_days(database: Database, tenant: Tenant, admin: psycopg.AsyncConnection) -> None:
    before = datetime.now(UTC)
    invited = await team.invite(database, tenant.id, "somebody@example.com", "viewer")
    assert before <= invited.expires_at - timedelta(days=7) <= datetime.now(UTC)
    cursor = await admin.execute("SELECT expires_at FROM invitations WHERE id = %s", (invited.id,))
    assert await cursor.fetchone() == (invited.expires_at,)


async def test_an_expired_one_is_refused_shown_and_sent_again(
    database: Database, tenant: Tenant, person: NewPerson, admin: psycopg.AsyncConnection
) -> None:
    newcomer = await person()
    invited = await team.invite(database, tenant.id, newcomer.email, "viewer")
    await expire(admin, invited)
    with pytest.raises(Conflict) as caught:
        await team.accept(database, invited.token, newcomer.id, email_verified=True)
    assert caught.value.code == "invitation_expired"
    assert [each.status for each in (await team.invitations(database, tenant.id)).items] == [InvitationStatus.EXPIRED]
    again = await team.resend(database, tenant.id, invited.id)
    assert await team.accept(database, again.token, newcomer.id, email_verified=True) == tenant.id


async def test_an_expired_one_is_no_obstacle(
    database: Database, tenant: Tenant, admin: psycopg.AsyncConnection
) -> None:
    invited = await team.invite(database, tenant.id, "somebody@example.com", "viewer")
    with pytest.raises(Conflict) as caught:
        await team.invite(database, tenant.id, "Somebody@Example.com", "admin")
    assert caught.value.code == "invitation_exists"
    await expire(admin, invited)
    await team.invite(database, tenant.id, "somebody@example.com", "admin")


async def test_sending_it_again_ends_the_first_token(database: Database, tenant: Tenant, person: NewPerson) -> None:
    newcomer = await person()
    first = await team.invite(database, tenant.id, newcomer.email, "viewer")
    second = await team.resend(database, tenant.id, first.id)
    assert second.id == first.id
    assert second.expires_at > first.expires_at
    with pytest.raises(NotFound):
        await team.accept(database, first.token, newcomer.id, email_verified=True)
    assert await team.accept(database, second.token, newcomer.id, email_verified=True) == tenant.id
    with pytest.raises(Conflict):
        await team.resend(database, tenant.id, first.id)


async def test_a_revoked_one_is_refused(database: Database, tenant: Tenant, person: NewPerson) -> None:
    newcomer = await person()
    invited = await team.invite(database, tenant.id, newcomer.email, "viewer")
    await team.revoke(database, tenant.id, invited.id)
    await team.revoke(database, tenant.id, invited.id)
    with pytest.raises(Conflict) as caught:
        await team.accept(database, invited.token, newcomer.id, email_verified=True)
    assert caught.value.code == "invitation_revoked"
    with pytest.raises(Conflict):
        await team.resend(database, tenant.id, invited.id)
    assert (await team.invitations(database, tenant.id)).total == 0


async def test_flw_20_an_invitation_is_for_its_address_when_that_is_proven(
    database: Database, tenant: Tenant, person: NewPerson, admin: psycopg.AsyncConnection
) -> None:
    invitee, stranger = await person(), await person()
    invited = await team.invite(database, tenant.id, invitee.email, "admin")
    for who, verified in ((stranger.id, True), (invitee.id, False), (uuid.uuid4(), True)):
        with pytest.raises(Forbidden) as caught:
            await team.accept(database, invited.token, who, email_verified=verified)
        assert caught.value.code == "invitation_not_yours"
    await admin.execute("UPDATE users SET is_active = false WHERE id = %s", (invitee.id,))
    with pytest.raises(Forbidden) as caught:
        await team.accept(database, invited.token, invitee.id, email_verified=True)
    assert caught.value.code == "user_disabled"
    await admin.execute("UPDATE users SET is_active = true WHERE id = %s", (invitee.id,))
    for status, error in (("suspended", Forbidden), ("deleted", NotFound)):
        await admin.execute("UPDATE tenants SET status = %s WHERE id = %s", (status, tenant.id))
        with pytest.raises(error):
            await team.accept(database, invited.token, invitee.id, email_verified=True)
    await admin.execute("UPDATE tenants SET status = 'active' WHERE id = %s", (tenant.id,))
    assert (await team.list_(database, tenant.id)).total == 0
    assert await team.accept(database, invited.token, invitee.id, email_verified=True) == tenant.id


@pytest.mark.parametrize("token", ["", "x", "\0", "\ud800", "x" * 10_000])
async def test_unknown_tokens_are_not_found(database: Database, tenant: Tenant, boss: User, token: str) -> None:
    with pytest.raises(NotFound):
        await team.accept(database, token, boss.id, email_verified=True)


async def test_of_several_who_accept_at_once_one_does(
    database: Database, tenant: Tenant, person: NewPerson, admin: psycopg.AsyncConnection
) -> None:
    newcomer = await person()
    invited = await team.invite(database, tenant.id, newcomer.email, "operator")
    results = await asyncio.gather(
        *(team.accept(database, invited.token, newcomer.id, email_verified=True) for _ in range(8)),
        return_exceptions=True,
    )
    assert results.count(tenant.id) == 1
    assert sum(isinstance(each, Conflict) for each in results) == 7
    cursor = await admin.execute(
        "SELECT count(*) FROM audit_log WHERE tenant_id = %s AND resource_type = 'member'", (tenant.id,)
    )
    assert await cursor.fetchone() == (1,)


async def test_flw_18_nobody_joins_without_their_role(
    database: Database, tenant: Tenant, person: NewPerson, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise ConnectionError

    newcomer = await person()
    invited = await team.invite(database, tenant.id, newcomer.email, "admin")
    monkeypatch.setattr(store, "put", broken)
    with pytest.raises(ConnectionError):
        await team.accept(database, invited.token, newcomer.id, email_verified=True)
    with pytest.raises(ConnectionError):
        await team.add(database, tenant.id, newcomer.id, "admin")
    monkeypatch.undo()
    with pytest.raises(NotFound):
        await team.get(database, tenant.id, newcomer.id)
    # And nothing was lost: the invitation stands.
    assert await team.accept(database, invited.token, newcomer.id, email_verified=True) == tenant.id


@pytest.mark.parametrize("role", ["sysadmin", "king", "", "ADMIN"])
async def test_roles_that_a_tenant_cannot_give(database: Database, tenant: Tenant, boss: User, role: str) -> None:
    for attempt in (
        team.invite(database, tenant.id, "somebody@example.com", role),
        team.change_role(database, tenant.id, boss.id, role),
        team.add(database, tenant.id, boss.id, role),
    ):
        with pytest.raises(BadInput) as caught:
            await attempt
        assert caught.value.param == "role"
    assert (await team.invitations(database, tenant.id)).total == 0


async def test_not_even_the_database_keeps_an_invitation_of_a_sysadmin(
    tenant: Tenant, admin: psycopg.AsyncConnection
) -> None:
    with pytest.raises(psycopg.errors.CheckViolation):
        await admin.execute(
            "INSERT INTO invitations (tenant_id, id, email, role, token_hash, expires_at) "
            "VALUES (%s, gen_random_uuid(), 'a@b.com', 'sysadmin', 'x', now())",
            (tenant.id,),
        )


@pytest.mark.parametrize("email", ["", "anna", "a@b", "a b@example.com", "x" * 320 + "@example.com"])
async def test_addresses_that_cannot_be_invited(database: Database, tenant: Tenant, email: str) -> None:
    with pytest.raises(BadInput):
        await team.invite(database, tenant.id, email, "viewer")


async def test_members_and_unknown_tenants_cannot_be_invited(
    database: Database, tenant: Tenant, boss: User, person: NewPerson
) -> None:
    with pytest.raises(Conflict) as caught:
        await team.invite(database, tenant.id, boss.email.upper(), "viewer")
    assert caught.value.code == "member_exists"
    with pytest.raises(Conflict):
        await team.add(database, tenant.id, boss.id, "viewer")
    newcomer = await person()
    for attempt in (
        team.invite(database, uuid.uuid4(), newcomer.email, "viewer"),
        team.add(database, uuid.uuid4(), newcomer.id, "viewer"),
        team.add(database, tenant.id, uuid.uuid4(), "viewer"),
    ):
        with pytest.raises(NotFound):
            await attempt


async def test_usr_14_members_and_invitations_together_stay_within_the_limit(
    database: Database, tenant: Tenant, boss: User, person: NewPerson, admin: psycopg.AsyncConnection
) -> None:
    await limit(admin, tenant, 3)
    first, second = await person(), await person()
    invitations = [await team.invite(database, tenant.id, each.email, "viewer") for each in (first, second)]

    async def refused(attempt: Awaitable[object]) -> None:
        with pytest.raises(Forbidden) as caught:
            await attempt
        assert caught.value.code == "tenant_limit_exceeded"

    await refused(team.invite(database, tenant.id, "another@example.com", "viewer"))
    await refused(team.add(database, tenant.id, (await person()).id, "viewer"))
    # Those who were asked while there was room are not refused at the door.
    for invited, who in zip(invitations, (first, second), strict=True):
        await team.accept(database, invited.token, who.id, email_verified=True)
    await refused(team.invite(database, tenant.id, "another@example.com", "viewer"))
    # Whoever leaves makes room, for others and for themselves.
    await team.remove(database, tenant.id, first.id)
    again = await team.invite(database, tenant.id, first.email, "billing")
    await team.accept(database, again.token, first.id, email_verified=True)
    assert (await team.list_(database, tenant.id)).total == 3
    assert await team.roles(database, tenant.id, first.id) == {Role.BILLING}


async def test_an_expired_invitation_sent_again_takes_its_place_anew(
    database: Database, tenant: Tenant, boss: User, admin: psycopg.AsyncConnection
) -> None:
    await limit(admin, tenant, 2)
    late = await team.invite(database, tenant.id, "late@example.com", "viewer")
    await expire(admin, late)
    await team.invite(database, tenant.id, "quick@example.com", "viewer")
    with pytest.raises(Forbidden) as caught:
        await team.resend(database, tenant.id, late.id)
    assert caught.value.code == "tenant_limit_exceeded"


async def test_many_invitations_at_once_stay_within_the_limit(
    database: Database, tenant: Tenant, boss: User, admin: psycopg.AsyncConnection
) -> None:
    await limit(admin, tenant, 5)
    results = await asyncio.gather(
        *(team.invite(database, tenant.id, f"p{n}@example.com", "viewer") for n in range(20)), return_exceptions=True
    )
    assert sum(isinstance(each, Invited) for each in results) == 4
    assert all(isinstance(each, Invited | Forbidden) for each in results)


async def test_usr_12_and_con_11_a_role_is_a_relation_and_changes_at_once(
    database: Database,
    tenant: Tenant,
    boss: User,
    person: NewPerson,
    relations: Relations,
    admin: psycopg.AsyncConnection,
) -> None:
    who, mine = await person(tenant, Role.DEVELOPER), resource("tenant", tenant.id)
    assert await relations.check(tenant.id, mine, "develop", user(who.id))
    await team.change_role(database, tenant.id, who.id, "billing")
    await team.change_role(database, tenant.id, who.id, "billing")
    assert not await relations.check(tenant.id, mine, "view", user(who.id))
    assert await relations.check(tenant.id, mine, "billing_access", user(who.id))
    cursor = await admin.execute("SELECT relation FROM relations WHERE subject_id = %s", (str(who.id),))
    assert await cursor.fetchall() == [("billing",)]
    cursor = await admin.execute(
        "SELECT old_values ->> 'relation', new_values ->> 'relation' FROM audit_log "
        "WHERE tenant_id = %s AND action = 'permission_change' AND description LIKE %s ORDER BY seq",
        (tenant.id, f"%{who.id}"),
    )
    assert await cursor.fetchall() == [(None, "developer"), ("developer", None), (None, "billing")]


async def test_the_last_administrator_stays_one(
    database: Database, tenant: Tenant, boss: User, person: NewPerson, admin: psycopg.AsyncConnection
) -> None:
    await person(tenant, Role.DEVELOPER)
    disabled = await person(tenant, Role.ADMIN)
    await admin.execute("UPDATE users SET is_active = false WHERE id = %s", (disabled.id,))
    for attempt in (
        team.change_role(database, tenant.id, boss.id, "developer"),
        team.remove(database, tenant.id, boss.id),
    ):
        with pytest.raises(Conflict) as caught:
            await attempt
        assert caught.value.code == "last_admin"
    await team.change_role(database, tenant.id, boss.id, "admin")
    assert await team.roles(database, tenant.id, boss.id) == {Role.ADMIN}
    second = await person(tenant, Role.ADMIN)
    await team.remove(database, tenant.id, boss.id)
    with pytest.raises(Conflict):
        await team.remove(database, tenant.id, second.id)


async def test_two_administrators_cannot_remove_each_other(
    database: Database, tenant: Tenant, person: NewPerson
) -> None:
    admins = [await person(tenant, Role.ADMIN) for _ in range(4)]
    results = await asyncio.gather(
        *(team.remove(database, tenant.id, each.id) for each in admins[:2]),
        *(team.change_role(database, tenant.id, each.id, "viewer") for each in admins[2:]),
        return_exceptions=True,
    )
    assert results.count(None) == 3
    assert sum(isinstance(each, Conflict) for each in results) == 1
    left = (await team.list_(database, tenant.id)).items
    assert sum(Role.ADMIN in member.roles for member in left) == 1


@pytest.mark.parametrize("removed_first", [False, True])
async def test_whoever_is_removed_is_given_nothing_meanwhile(
    database: Database,
    tenant: Tenant,
    person: NewPerson,
    relations: Relations,
    admin: psycopg.AsyncConnection,
    blocked: Blocked,
    removed_first: bool,
) -> None:
    leaving = await person(tenant)

    def remove() -> Awaitable[None]:
        return team.remove(database, tenant.id, leaving.id)

    def write() -> Awaitable[None]:
        return relations.write(tenant.id, [role(tenant.id, Role.DEVELOPER, leaving.id)])

    async with admin.transaction():
        await hold_audit(admin, tenant)
        first, second = (remove, write) if removed_first else (write, remove)
        both = [asyncio.ensure_future(first())]
        await blocked(1)
        both.append(asyncio.ensure_future(second()))
        await blocked(2)
    results = await asyncio.gather(*both, return_exceptions=True)
    assert [type(each) for each in results] == [type(None), BadInput if removed_first else type(None)]
    assert (await team.get(database, tenant.id, leaving.id)).status is MemberStatus.REMOVED
    assert await team.roles(database, tenant.id, leaving.id) == frozenset()


async def test_a_change_of_role_and_the_same_relation_come_one_after_the_other(
    database: Database,
    tenant: Tenant,
    person: NewPerson,
    relations: Relations,
    admin: psycopg.AsyncConnection,
    blocked: Blocked,
) -> None:
    member = await person(tenant)
    async with admin.transaction():
        await hold_audit(admin, tenant)
        changing = asyncio.create_task(team.change_role(database, tenant.id, member.id, "developer"))
        await blocked(1)
        writing = asyncio.create_task(relations.write(tenant.id, [role(tenant.id, Role.DEVELOPER, member.id)]))
        await blocked(2)
    await asyncio.gather(changing, writing)
    assert await team.roles(database, tenant.id, member.id) == {Role.DEVELOPER}


async def test_the_same_relations_in_another_order_come_one_after_the_other(
    database: Database,
    tenant: Tenant,
    boss: User,
    relations: Relations,
    admin: psycopg.AsyncConnection,
    blocked: Blocked,
) -> None:
    several = [Relationship(resource("project", uuid.uuid4()), "viewer", user(boss.id)) for _ in range(3)]
    async with admin.transaction(force_rollback=True):
        await admin.execute(
            "INSERT INTO relations (tenant_id, resource_type, resource_id, relation, subject_type, subject_id) "
            "VALUES (%s, 'project', %s, 'viewer', 'user', %s)",
            (tenant.id, several[1].resource.id, str(boss.id)),
        )
        writing = [asyncio.create_task(relations.write(tenant.id, order)) for order in (several, several[::-1])]
        await blocked(2)
    await asyncio.gather(*writing)
    for each in several:
        assert await relations.check(tenant.id, each.resource, "view", user(boss.id))


async def test_two_who_join_come_one_after_the_other(
    database: Database, tenant: Tenant, person: NewPerson, admin: psycopg.AsyncConnection, blocked: Blocked
) -> None:
    invitee, added = await person(), await person()
    invited = await team.invite(database, tenant.id, invitee.email, "viewer")
    async with admin.transaction():
        await admin.execute("SELECT quota_lock(%s)", (tenant.id,))
        accepting = asyncio.create_task(team.accept(database, invited.token, invitee.id, email_verified=True))
        await blocked(1)
        adding = asyncio.create_task(team.add(database, tenant.id, added.id, "viewer"))
        await blocked(2)
    await asyncio.gather(accepting, adding)
    assert {each.user_id for each in (await team.list_(database, tenant.id)).items} == {invitee.id, added.id}


async def test_usr_13_whoever_is_removed_may_nothing_and_is_remembered(
    database: Database,
    tenant: Tenant,
    boss: User,
    person: NewPerson,
    relations: Relations,
    admin: psycopg.AsyncConnection,
) -> None:
    who, project = await person(tenant, Role.OPERATOR), resource("project", uuid.uuid4())
    await relations.write(tenant.id, [Relationship(project, "owner", user(who.id))])
    await team.remove(database, tenant.id, who.id)
    await team.remove(database, tenant.id, who.id)
    assert not await relations.check(tenant.id, project, "view", user(who.id))
    assert not await relations.check(tenant.id, resource("tenant", tenant.id), "view", user(who.id))
    assert [each.user_id for each in (await team.list_(database, tenant.id)).items] == [boss.id]
    removed = (await team.list_(database, tenant.id, MemberStatus.REMOVED)).items
    assert [(each.user_id, each.email, each.roles) for each in removed] == [(who.id, who.email, ())]
    assert (await team.list_(database, tenant.id, None)).total == 2
    cursor = await admin.execute(
        "SELECT old_values -> 'roles' FROM audit_log WHERE tenant_id = %s AND resource_type = 'member' "
        "AND action = 'delete' AND resource_id = %s",
        (tenant.id, str(who.id)),
    )
    assert await cursor.fetchall() == [(["operator"],)]
    for attempt in (
        team.change_role(database, tenant.id, who.id, "viewer"),
        team.remove(database, tenant.id, uuid.uuid4()),
    ):
        with pytest.raises(NotFound):
            await attempt
    with pytest.raises(BadInput, match="no member"):
        await relations.write(tenant.id, [Relationship(project, "owner", user(who.id))])


async def test_flw_61_nothing_takes_the_evidence_along(
    database: Database, tenant: Tenant, boss: User, admin: psycopg.AsyncConnection
) -> None:
    """Neither a person nor a tenant can be deleted from under what tells of them."""
    await team.invite(database, tenant.id, "somebody@example.com", "viewer", boss.id)
    for statement, id in (
        ("DELETE FROM users WHERE id = %s", boss.id),
        ("DELETE FROM tenants WHERE id = %s", tenant.id),
    ):
        with pytest.raises(psycopg.errors.ForeignKeyViolation):
            await admin.execute(statement, (id,))
    cursor = await admin.execute(
        "SELECT count(*) FROM pg_constraint WHERE contype = 'f' AND confdeltype = 'c' "
        "AND conrelid IN ('members'::regclass, 'invitations'::regclass, 'relations'::regclass, 'users'::regclass)"
    )
    assert await cursor.fetchone() == (0,)


async def test_flw_55_mail_about_money_goes_to_those_it_is_for(
    database: Database, tenant: Tenant, person: NewPerson, admin: psycopg.AsyncConnection
) -> None:
    await person(tenant, Role.VIEWER)
    with pytest.raises(NotFound):
        await team.billing_contacts(database, tenant.id)
    boss = await person(tenant, Role.ADMIN)
    assert await team.billing_contacts(database, tenant.id) == (boss.email,)
    payer, gone, disabled = [await person(tenant, Role.BILLING) for _ in range(3)]
    await team.remove(database, tenant.id, gone.id)
    await admin.execute("UPDATE users SET is_active = false WHERE id = %s", (disabled.id,))
    assert await team.billing_contacts(database, tenant.id) == (payer.email,)
    await admin.execute("UPDATE tenants SET email = 'money@example.com' WHERE id = %s", (tenant.id,))
    assert await team.billing_contacts(database, tenant.id) == ("money@example.com",)


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO members (tenant_id, user_id) VALUES (%(tenant)s, %(person)s)",
        "UPDATE members SET user_id = %(person)s",
        "UPDATE invitations SET role = 'admin'",
        "UPDATE invitations SET email = 'mine@example.com'",
        "DELETE FROM members",
        "DELETE FROM invitations",
        "UPDATE users SET is_active = true",
        "UPDATE relations SET relation = 'admin'",
    ],
)
async def test_a_tenants_transaction_cannot_make_members(
    database: Database, tenant: Tenant, boss: User, person: NewPerson, statement: str
) -> None:
    stranger = await person()
    async with database.tenant(tenant.id) as session:
        connection = (await (await session.connection()).get_raw_connection()).driver_connection
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await connection.execute(statement, {"tenant": tenant.id, "person": stranger.id})
        await session.rollback()


async def test_pages_are_checked(database: Database, tenant: Tenant) -> None:
    async def refused(attempt: Awaitable[object]) -> None:
        with pytest.raises(AvbError):
            await attempt

    for page, size in ((0, 20), (1, 0), (1, 101)):
        await refused(team.list_(database, tenant.id, page=page, page_size=size))
        await refused(team.invitations(database, tenant.id, page, size))
