"""Relationships in the database.

What changes them does so in its caller's transaction, with a line of audit in it: a tenant never stands without the
administrator it was made with (FLW-18), and nobody is told of a role before it counts (FLW-40).
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Protocol

from sqlalchemy import Row, delete, event, select, text, tuple_
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from agentvoicebox.config.errors import BadInput
from agentvoicebox.tenancy import audit
from agentvoicebox.tenancy.models import PLATFORM, Action, Member, MemberStatus, Relation, User
from agentvoicebox.tenancy.permissions import rules
from agentvoicebox.tenancy.permissions.evaluator import EVERYBODY, Relationship, Resource, Subject

_COLUMNS = (
    Relation.resource_type,
    Relation.resource_id,
    Relation.relation,
    Relation.subject_type,
    Relation.subject_id,
    Relation.subject_relation,
)
_AT_ONCE = 2_000
"""Rows: few enough that nobody waits long for the event loop meanwhile."""
_TEAM_LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended(:tenant || 'team', 0))")


class Cache(Protocol):
    """What holds relationships in memory."""

    def forget(self, tenant_id: uuid.UUID) -> None:
        """Read this tenant's relationships again before the next answer."""


_caches: weakref.WeakSet[Cache] = weakref.WeakSet()


def tell(cache: Cache) -> None:
    """Let a cache know of every change that this process commits, without waiting for the log of changes."""
    _caches.add(cache)


async def read(session: AsyncSession, tenant_id: uuid.UUID) -> AsyncIterator[list[Relationship]]:
    """All relationships of a tenant, or of the platform, some at a time."""
    query = select(*_COLUMNS).where(Relation.tenant_id == tenant_id)
    rows = await session.stream(query, execution_options={"yield_per": _AT_ONCE})
    async for some in rows.partitions():
        yield [_relationship(row) for row in some]


async def about(session: AsyncSession, tenant_id: uuid.UUID, subject: Subject) -> list[Relationship]:
    """The tenant's relationships that name this subject, or everybody of its type."""
    query = select(*_COLUMNS).where(
        Relation.tenant_id == tenant_id,
        Relation.subject_type == subject.type,
        Relation.subject_id.in_((subject.id, EVERYBODY)),
    )
    return [_relationship(row) for row in await session.execute(query)]


async def lock(session: AsyncSession, tenant_id: uuid.UUID) -> None:
    """One change of a team and of what it may at a time, until its transaction ends.

    Else two administrators could remove each other, or somebody be given a role while they are removed. It comes before
    the lock of the tenant's limits and that of its audit log, so that no two wait for each other.
    """
    await session.execute(_TEAM_LOCK, {"tenant": str(tenant_id)})


async def put(session: AsyncSession, tenant_id: uuid.UUID, relationships: Iterable[Relationship]) -> None:
    """Make these stand; those that do already are left as they are. Raises `BadInput`, and then nothing may be kept."""
    wanted = list(dict.fromkeys(relationships))
    for each in wanted:
        rules.check(tenant_id, each)
    await lock(session, tenant_id)
    await _known(session, tenant_id, wanted)
    new: list[Relationship] = []
    for start in range(0, len(wanted), _AT_ONCE):
        rows = [_row(tenant_id, each) for each in wanted[start : start + _AT_ONCE]]
        made = await session.execute(insert(Relation).values(rows).on_conflict_do_nothing().returning(*_COLUMNS))
        new += [_relationship(row) for row in made]
    for each in new:
        await _note(session, tenant_id, each, given=True)
    _announce(session, tenant_id)


async def remove(session: AsyncSession, tenant_id: uuid.UUID, relationships: Iterable[Relationship]) -> None:
    """Make these not stand."""
    await lock(session, tenant_id)
    unwanted = [tuple(_row(tenant_id, each).values())[1:] for each in relationships]
    for start in range(0, len(unwanted), _AT_ONCE):
        some = unwanted[start : start + _AT_ONCE]
        await _delete(session, tenant_id, [tuple_(*_COLUMNS).in_(some)])


async def remove_subject(session: AsyncSession, tenant_id: uuid.UUID, subject: Subject) -> None:
    """Take everything from this subject that the tenant's relationships give it."""
    await lock(session, tenant_id)
    await _delete(session, tenant_id, _naming(tenant_id, subject))


async def _delete(session: AsyncSession, tenant_id: uuid.UUID, which: Sequence[Any]) -> None:
    statement = delete(Relation).where(Relation.tenant_id == tenant_id, *which).returning(*_COLUMNS)
    gone = await session.execute(statement, execution_options={"synchronize_session": False})
    for each in [_relationship(row) for row in gone]:
        await _note(session, tenant_id, each, given=False)
    _announce(session, tenant_id)


async def _known(session: AsyncSession, tenant_id: uuid.UUID, relationships: Sequence[Relationship]) -> None:
    """People are members of the tenant, whose team is locked: nobody leaves it before the transaction ends.

    That also refuses an identity provider's name for somebody (FLW-17).
    """
    subjects = {each.subject for each in relationships if each.subject.type == "user"}
    people = {rules.person(subject) for subject in subjects if subject.id != EVERYBODY}
    if not people:
        return
    if tenant_id == PLATFORM:
        known = select(User.id).where(User.id.in_(people))
    else:
        known = select(Member.user_id).where(
            Member.tenant_id == tenant_id, Member.user_id.in_(people), Member.status == MemberStatus.ACTIVE
        )
    if missing := people.difference((await session.execute(known)).scalars()):
        raise BadInput(f"{min(missing)} is no member here; invite them first.", param="subject")


async def _note(session: AsyncSession, tenant_id: uuid.UUID, what: Relationship, *, given: bool) -> None:
    value = {"relation": what.relation, "subject": str(what.subject)}
    await audit.append(
        session,
        Action.PERMISSION_CHANGE,
        what.resource.type,
        what.resource.id,
        f"{what.relation} {'given to' if given else 'taken from'} {what.subject}",
        tenant_id=tenant_id,
        old=None if given else value,
        new=value if given else None,
    )


def _announce(session: AsyncSession, tenant_id: uuid.UUID) -> None:
    def committed(_: object) -> None:
        for cache in tuple(_caches):
            cache.forget(tenant_id)

    event.listen(session.sync_session, "after_commit", committed)


def _naming(tenant_id: uuid.UUID, subject: Subject) -> Sequence[Any]:
    return (
        Relation.tenant_id == tenant_id,
        Relation.subject_type == subject.type,
        Relation.subject_id == subject.id,
        Relation.subject_relation == subject.relation,
    )


def _row(tenant_id: uuid.UUID, each: Relationship) -> dict[str, object]:
    return {
        "tenant_id": tenant_id,
        "resource_type": each.resource.type,
        "resource_id": each.resource.id,
        "relation": each.relation,
        "subject_type": each.subject.type,
        "subject_id": each.subject.id,
        "subject_relation": each.subject.relation,
    }


def _relationship(row: Row[str, str, str, str, str, str]) -> Relationship:
    type, id, relation, subject_type, subject_id, subject_relation = row
    return Relationship(Resource(type, id), relation, Subject(subject_type, subject_id, subject_relation))
