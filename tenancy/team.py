"""Who works for a tenant: members, their roles, and those who are asked to join.

Roles are relationships (CON-11); the row of a member says only that somebody belongs, or once did.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Select, String, cast, exists, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from agentvoicebox.config.errors import BadInput, Conflict, Forbidden, NotFound
from agentvoicebox.tenancy import audit, checks, pages, permissions, tenants
from agentvoicebox.tenancy.database import Database, sqlstate
from agentvoicebox.tenancy.models import (
    Action,
    Invitation,
    InvitationStatus,
    Member,
    MemberStatus,
    Relation,
    Role,
    Tenant,
    TenantStatus,
    User,
)
from agentvoicebox.tenancy.pages import Page
from agentvoicebox.tenancy.permissions import store

LASTS = timedelta(days=7)
"""How long an invitation may be accepted (GAP-01)."""

ROLES = tuple(role for role in Role if role is not Role.SYSADMIN)
"""What a tenant may give; sysadmins are the platform's."""

_UNIQUE_VIOLATION = "23505"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TeamMember:
    """Somebody who works for the tenant, or did."""

    user_id: uuid.UUID
    name: str
    """First and last name, else the address."""
    email: str
    roles: tuple[Role, ...]
    status: MemberStatus
    is_active: bool
    """Whether the platform lets them in at all."""
    since: datetime


@dataclass(frozen=True, slots=True)
class Invited:
    """A new invitation; the only time its token is seen."""

    id: uuid.UUID
    token: str = field(repr=False)
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Invitee:
    """Somebody who was asked to join."""

    id: uuid.UUID
    email: str
    role: Role
    status: InvitationStatus
    expires_at: datetime
    invited_by: uuid.UUID | None
    created_at: datetime


async def list_(
    database: Database,
    tenant_id: uuid.UUID,
    status: MemberStatus | None = MemberStatus.ACTIVE,
    page: int = 1,
    page_size: int = 20,
) -> Page[TeamMember]:
    """The tenant's people, longest there first; None is for those of any status. Raises `BadInput`."""
    pages.check(page, page_size)
    async with database.tenant(tenant_id) as session:
        which = [] if status is None else [Member.status == status]
        total = await session.scalar(select(func.count()).select_from(Member).where(*which))
        query = _people(tenant_id).where(*which).order_by(Member.created_at, Member.user_id)
        found = await _read(session, tenant_id, query.limit(page_size).offset((page - 1) * page_size))
    return Page(found, total or 0, page, page_size)


async def get(database: Database, tenant_id: uuid.UUID, user_id: uuid.UUID) -> TeamMember:
    """One of them, whatever their status. Raises `NotFound`."""
    async with database.tenant(tenant_id) as session:
        found = await _read(session, tenant_id, _people(tenant_id).where(Member.user_id == user_id))
    if not found:
        raise _no_member()
    return found[0]


async def roles(database: Database, tenant_id: uuid.UUID, user_id: uuid.UUID) -> frozenset[Role]:
    """Somebody's roles in the tenant; none for whoever is no member."""
    async with database.tenant(tenant_id) as session:
        return (await _roles(session, tenant_id, [user_id])).get(user_id, frozenset())


async def add(
    database: Database, tenant_id: uuid.UUID, user_id: uuid.UUID, role: str, invited_by: uuid.UUID | None = None
) -> None:
    """Make somebody a member without asking them, as a new tenant's first administrator.

    Raises `BadInput`, `NotFound`, `Forbidden` (`tenant_limit_exceeded`), and `Conflict` when they are one already or
    the tenant is erased.
    """
    given = _given(role)
    async with database.system() as session:
        await store.lock(session, tenant_id)
        await tenants.lock(session, tenant_id)
        if await session.get(User, user_id) is None:
            raise NotFound("There is no such person.", code="user_not_found")
        if not await _join(session, tenant_id, user_id, given, invited_by):
            raise Conflict("They are a member already; change their role instead.", code="member_exists")
    _log.info("member_added tenant_id=%s user_id=%s", tenant_id, user_id)


async def invite(
    database: Database, tenant_id: uuid.UUID, email: str, role: str, invited_by: uuid.UUID | None = None
) -> Invited:
    """Ask somebody to join; whoever calls this sends them the token.

    Raises `BadInput`, `NotFound`, `Conflict` for a member or somebody asked already or an erased tenant, `Forbidden`
    (`tenant_limit_exceeded`) when members and those asked are as many as the plan allows.
    """
    address, given = checks.email(email), _given(role)
    token, digest = _token()
    invitation = Invitation(
        id=uuid.uuid4(),
        tenant_id=tenant_id,
        email=address,
        role=given,
        token_hash=digest,
        expires_at=datetime.now(UTC) + LASTS,
        invited_by=invited_by,
    )
    try:
        async with database.tenant(tenant_id) as session:
            await tenants.lock(session, tenant_id)
            # Only one that may still be accepted stands in the way of another.
            await session.execute(
                update(Invitation)
                .where(Invitation.status == InvitationStatus.PENDING, Invitation.expires_at <= func.now())
                .values(status=InvitationStatus.EXPIRED)
            )
            member = exists().where(
                Member.user_id == User.id, Member.tenant_id == tenant_id, Member.status == MemberStatus.ACTIVE
            )
            if await session.scalar(select(User.id).where(func.lower(User.email) == address, member)):
                raise Conflict("They are a member already; change their role instead.", code="member_exists")
            session.add(invitation)
            await session.flush()
            await audit.append(
                session,
                Action.CREATE,
                "invitation",
                invitation.id,
                f"invited as {given}",
                new={"email": address, "role": given.value},
            )
    except IntegrityError as error:
        if sqlstate(error) != _UNIQUE_VIOLATION:
            raise
        raise Conflict("They have been asked already; send it again instead.", code="invitation_exists") from error
    _log.info("invitation_made tenant_id=%s invitation_id=%s", tenant_id, invitation.id)
    return Invited(invitation.id, token, invitation.expires_at)


async def resend(database: Database, tenant_id: uuid.UUID, invitation_id: uuid.UUID) -> Invited:
    """A new token and another seven days; the old token opens nothing any more.

    One that has expired takes a place again, by a new invitation with an id of its own. Raises `NotFound`, `Conflict`
    for one that is accepted or revoked, `Forbidden` (`tenant_limit_exceeded`).
    """
    token, digest = _token()
    expires_at = datetime.now(UTC) + LASTS
    async with database.tenant(tenant_id) as session:
        found = await _locked(session, tenant_id, invitation_id)
        if _state(found.status, found.expires_at) is InvitationStatus.PENDING:
            found.token_hash, found.expires_at = digest, expires_at
            await session.flush()
            await audit.append(session, Action.UPDATE, "invitation", found.id, "invitation sent again")
            return Invited(found.id, token, expires_at)
        if found.status not in (InvitationStatus.PENDING, InvitationStatus.EXPIRED):
            raise Conflict(f"This invitation has been {found.status} already.", code=f"invitation_{found.status}")
        address, role, invited_by = found.email, found.role, found.invited_by
    return await invite(database, tenant_id, address, role, invited_by)


async def revoke(database: Database, tenant_id: uuid.UUID, invitation_id: uuid.UUID) -> None:
    """Take an invitation back; doing so again changes nothing. Raises `NotFound`, `Conflict` for an accepted one."""
    async with database.tenant(tenant_id) as session:
        found = await _locked(session, tenant_id, invitation_id)
        if found.status is InvitationStatus.ACCEPTED:
            raise Conflict(
                "This invitation has been accepted already; remove the member instead.", code="invitation_accepted"
            )
        if found.status is InvitationStatus.REVOKED:
            return
        found.status = InvitationStatus.REVOKED
        await session.flush()
        await audit.append(session, Action.DELETE, "invitation", found.id, "invitation revoked")
    _log.info("invitation_revoked tenant_id=%s invitation_id=%s", tenant_id, invitation_id)


async def invitations(database: Database, tenant_id: uuid.UUID, page: int = 1, page_size: int = 20) -> Page[Invitee]:
    """Those who were asked and have not come: pending and expired ones, the newest first. Raises `BadInput`."""
    waiting = (InvitationStatus.PENDING, InvitationStatus.EXPIRED)
    query = select(Invitation).where(Invitation.status.in_(waiting))
    async with database.tenant(tenant_id) as session:
        found = await pages.turn_to(
            session, query.order_by(Invitation.created_at.desc(), Invitation.id), page, page_size
        )
    return Page([_invitee(each) for each in found.items], found.total, page, page_size)


async def accept(database: Database, token: str, user_id: uuid.UUID, *, email_verified: bool) -> uuid.UUID:
    """Join the tenant that the token is of; its id. Membership, role and the token's end are one transaction.

    Raises `NotFound` for an unknown token, `Conflict` for one that is used, expired or revoked, and `Forbidden` unless
    the invited address is the person's own, proven one.
    """
    digest = hashlib.sha256(token.encode(errors="replace")).hexdigest()
    async with database.system() as session:
        # The row is locked from here on: of several at once, one finds it pending.
        found = (
            await session.execute(select(Invitation).where(Invitation.token_hash == digest).with_for_update())
        ).scalar_one_or_none()
        if found is None:
            raise NotFound("There is no such invitation; ask for a new one.", code="invitation_not_found")
        state = _state(found.status, found.expires_at)
        if state is not InvitationStatus.PENDING:
            raise Conflict(f"This invitation is {state}; ask for a new one.", code=f"invitation_{state}")
        person = await session.get(User, user_id)
        if person is None or not email_verified or person.email.lower() != found.email.lower():
            raise Forbidden(
                "This invitation is for another address, or yours is not verified yet; sign in with the one it was "
                "sent to.",
                code="invitation_not_yours",
            )
        if not person.is_active:
            raise Forbidden("This account is disabled; ask the operator of the platform.", code="user_disabled")
        tenant = await session.get(Tenant, found.tenant_id)
        if tenant is None or tenant.status is TenantStatus.DELETED:
            raise NotFound("There is no such tenant.", code="tenant_not_found")
        if tenant.status is TenantStatus.SUSPENDED:
            raise Forbidden("This tenant is suspended; its administrator can ask why.", code="tenant_suspended")
        # Before the member is there, so that nobody counts twice towards the tenant's limit.
        found.status = InvitationStatus.ACCEPTED
        await session.flush()
        await _join(session, found.tenant_id, user_id, found.role, found.invited_by)
        tenant_id = found.tenant_id
    _log.info("invitation_accepted tenant_id=%s user_id=%s", tenant_id, user_id)
    return tenant_id


async def change_role(database: Database, tenant_id: uuid.UUID, user_id: uuid.UUID, role: str) -> None:
    """Give a member this role of the tenant in place of those they have.

    Raises `BadInput`, `NotFound`, and `Conflict` (`last_admin`) when the tenant would be without an administrator.
    """
    given = _given(role)
    async with database.tenant(tenant_id) as session:
        await store.lock(session, tenant_id)
        await _member(session, tenant_id, user_id)
        before = (await _roles(session, tenant_id, [user_id])).get(user_id, frozenset()) - {Role.SYSADMIN}
        if before == {given}:
            return
        if given is not Role.ADMIN:
            await _check_not_last(session, tenant_id, user_id)
        await store.remove(session, tenant_id, [permissions.role(tenant_id, old, user_id) for old in before - {given}])
        await store.put(session, tenant_id, [permissions.role(tenant_id, given, user_id)])
    _log.info("role_changed tenant_id=%s user_id=%s role=%s", tenant_id, user_id, given)


async def remove(database: Database, tenant_id: uuid.UUID, user_id: uuid.UUID) -> None:
    """End somebody's belonging to the tenant, with everything they may there; doing so again changes nothing.

    The row stays, as evidence of who it was. Raises `NotFound`, and `Conflict` (`last_admin`).
    """
    async with database.tenant(tenant_id) as session:
        await store.lock(session, tenant_id)
        found = await session.get(Member, (tenant_id, user_id))
        if found is None:
            raise _no_member()
        if found.status is MemberStatus.REMOVED:
            return
        await _check_not_last(session, tenant_id, user_id)
        had = (await _roles(session, tenant_id, [user_id])).get(user_id, frozenset())
        found.status = MemberStatus.REMOVED
        await session.flush()
        await store.remove_subject(session, tenant_id, permissions.user(user_id))
        await audit.append(
            session,
            Action.DELETE,
            "member",
            user_id,
            "member removed",
            old={"status": MemberStatus.ACTIVE.value, "roles": sorted(had)},
            new={"status": MemberStatus.REMOVED.value},
        )
    _log.info("member_removed tenant_id=%s user_id=%s", tenant_id, user_id)


async def billing_contacts(database: Database, tenant_id: uuid.UUID) -> tuple[str, ...]:
    """The addresses that mail about money goes to (FLW-55): the tenant's own, else those of its members with the role
    `billing`, else of its administrators; never anybody else's. Raises `NotFound` when there is none."""
    async with database.tenant(tenant_id) as session:
        tenant = await session.get(Tenant, tenant_id)
        if tenant is not None and tenant.email:
            return (tenant.email,)
        for role in (Role.BILLING, Role.ADMIN):
            holders = select(User.email).where(User.is_active, User.id.in_(_holders(tenant_id, role)))
            if found := tuple((await session.execute(holders.order_by(User.email))).scalars()):
                return found
    raise NotFound("Nobody is named for mail about billing; set the tenant's e-mail.", code="no_billing_contact")


async def _join(
    session: AsyncSession, tenant_id: uuid.UUID, user_id: uuid.UUID, role: Role, invited_by: uuid.UUID | None
) -> bool:
    """Make somebody a member with that role; False when they were one, and then they have the role as well."""
    await store.lock(session, tenant_id)
    before = await session.get(Member, (tenant_id, user_id))
    new = before is None or before.status is not MemberStatus.ACTIVE
    if new:
        # An insert also for somebody who comes back: it is what the tenant's limit is held at.
        await session.execute(
            insert(Member)
            .values(tenant_id=tenant_id, user_id=user_id, invited_by=invited_by)
            .on_conflict_do_update(
                index_elements=["tenant_id", "user_id"],
                set_={"status": MemberStatus.ACTIVE, "invited_by": invited_by, "updated_at": func.now()},
            )
        )
    await store.put(session, tenant_id, [permissions.role(tenant_id, role, user_id)])
    if new:
        await audit.append(
            session,
            Action.CREATE,
            "member",
            user_id,
            f"member joined as {role}",
            tenant_id=tenant_id,
            new={"status": MemberStatus.ACTIVE.value, "roles": [role.value]},
        )
    return new


async def _check_not_last(session: AsyncSession, tenant_id: uuid.UUID, user_id: uuid.UUID) -> None:
    """Raise `Conflict` if they are the only administrator who can still sign in. The team must be locked."""
    admins = set((await session.execute(_holders(tenant_id, Role.ADMIN))).scalars())
    if user_id not in admins:
        return
    others = select(User.id).where(User.is_active, User.id.in_(admins - {user_id}))
    if (await session.execute(others.limit(1))).first() is None:
        raise Conflict("They are the last administrator; make somebody else one first.", code="last_admin")


def _holders(tenant_id: uuid.UUID, role: Role) -> Select[*tuple[Any, ...]]:
    """Members of the tenant with that role."""
    has = exists().where(
        Relation.tenant_id == tenant_id,
        Relation.resource_type == "tenant",
        Relation.resource_id == str(tenant_id),
        Relation.relation == role.value,
        Relation.subject_type == "user",
        Relation.subject_id == cast(Member.user_id, String),
    )
    return select(Member.user_id).where(Member.tenant_id == tenant_id, Member.status == MemberStatus.ACTIVE, has)


def _people(tenant_id: uuid.UUID) -> Select[*tuple[Any, ...]]:
    return (
        select(
            Member.user_id,
            Member.status,
            Member.created_at,
            User.email,
            User.first_name,
            User.last_name,
            User.is_active,
        )
        .join(User, User.id == Member.user_id)
        .where(Member.tenant_id == tenant_id)
    )


async def _read(session: AsyncSession, tenant_id: uuid.UUID, query: Select[*tuple[Any, ...]]) -> list[TeamMember]:
    rows = (await session.execute(query)).all()
    roles = await _roles(session, tenant_id, [row.user_id for row in rows])
    return [
        TeamMember(
            user_id=row.user_id,
            name=" ".join(part for part in (row.first_name, row.last_name) if part) or row.email,
            email=row.email,
            roles=tuple(role for role in Role if role in roles.get(row.user_id, ())),
            status=row.status,
            is_active=row.is_active,
            since=row.created_at,
        )
        for row in rows
    ]


async def _roles(
    session: AsyncSession, tenant_id: uuid.UUID, people: Sequence[uuid.UUID]
) -> dict[uuid.UUID, frozenset[Role]]:
    query = select(Relation.subject_id, Relation.relation).where(
        Relation.tenant_id == tenant_id,
        Relation.resource_type == "tenant",
        Relation.resource_id == str(tenant_id),
        Relation.subject_type == "user",
        Relation.subject_id.in_([str(each) for each in people]),
    )
    found: dict[uuid.UUID, frozenset[Role]] = {}
    for subject, relation in await session.execute(query):
        found[uuid.UUID(subject)] = found.get(uuid.UUID(subject), frozenset()) | {Role(relation)}
    return found


async def _member(session: AsyncSession, tenant_id: uuid.UUID, user_id: uuid.UUID) -> Member:
    found = await session.get(Member, (tenant_id, user_id))
    if found is None or found.status is not MemberStatus.ACTIVE:
        raise _no_member()
    return found


async def _locked(session: AsyncSession, tenant_id: uuid.UUID, invitation_id: uuid.UUID) -> Invitation:
    found = await session.get(Invitation, (tenant_id, invitation_id), with_for_update=True)
    if found is None:
        raise NotFound("There is no such invitation.", code="invitation_not_found")
    return found


def _given(role: str) -> Role:
    if role == Role.SYSADMIN or role not in tuple(Role):
        raise BadInput(f"role must be one of {', '.join(ROLES)}.", param="role")
    return Role(role)


def _token() -> tuple[str, str]:
    """A new token, and its digest."""
    token = secrets.token_urlsafe(32)
    return token, hashlib.sha256(token.encode()).hexdigest()


def _state(status: InvitationStatus, expires_at: datetime) -> InvitationStatus:
    if status is InvitationStatus.PENDING and expires_at <= datetime.now(UTC):
        return InvitationStatus.EXPIRED
    return status


def _invitee(found: Invitation) -> Invitee:
    return Invitee(
        id=found.id,
        email=found.email,
        role=found.role,
        status=_state(found.status, found.expires_at),
        expires_at=found.expires_at,
        invited_by=found.invited_by,
        created_at=found.created_at,
    )


def _no_member() -> NotFound:
    return NotFound("There is no such member of this tenant.", code="member_not_found")
