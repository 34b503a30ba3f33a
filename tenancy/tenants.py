"""The organizations that use the platform."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import BigInteger, Uuid, cast, column, func, or_, select, table
from sqlalchemy import Text as TextType
from sqlalchemy import update as change
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from agentvoicebox.config.errors import BadInput, Conflict, NotFound
from agentvoicebox.tenancy import audit, checks, pages, voices
from agentvoicebox.tenancy.checks import chosen, number, shaped, words
from agentvoicebox.tenancy.database import Database, sqlstate
from agentvoicebox.tenancy.models import (
    Action,
    Environment,
    Project,
    Session,
    SessionStatus,
    Tenant,
    TenantSettings,
    TenantStatus,
    Tier,
)
from agentvoicebox.tenancy.pages import Page
from agentvoicebox.tenancy.voices import VoiceConfig

RESERVED = ("www", "api", "admin")
"""Host names of the platform itself, which are nobody's slug."""
LONGEST_REASON = 500

_SLUG = re.compile(r"[a-z0-9][a-z0-9-]{1,98}[a-z0-9]")
_FEATURE = re.compile(r"[a-z][a-z0-9_]{0,49}")
_MOST_FEATURES = 50
_SORTED = {
    "created_at": Tenant.created_at,
    "name": Tenant.name,
    "slug": Tenant.slug,
    "tier": Tenant.tier,
    "status": Tenant.status,
}
_UNIQUE_VIOLATION = "23505"
_FOREIGN_KEY_VIOLATION = "23503"

OVERVIEW = table(
    "tenant_overview",
    column("tenant_id", Uuid()),
    *(
        column(name, BigInteger())
        for name in ("members", "users", "projects", "api_keys", "sessions", "sessions_this_month")
    ),
)
"""The view of what each tenant has; `users` are members and invitations, as the limit counts them."""

_log = logging.getLogger(__name__)


class Limits(NamedTuple):
    """What a tenant may have of each."""

    users: int
    projects: int
    api_keys: int
    sessions_per_month: int


LIMITS = {
    Tier.FREE: Limits(3, 1, 5, 100),
    Tier.STARTER: Limits(10, 5, 20, 1_000),
    Tier.PRO: Limits(50, 20, 100, 10_000),
    Tier.ENTERPRISE: Limits(500, 100, 500, 100_000),
}
_LEAST = Limits(users=1, projects=1, api_keys=1, sessions_per_month=0)


@dataclass(frozen=True, slots=True)
class Summary:
    """A tenant in a list, and how much it has."""

    tenant: Tenant
    users: int
    """Members; who is only invited is not among them."""
    projects: int
    api_keys: int
    sessions: int
    """Of all times."""


async def create(
    database: Database,
    slug: str,
    name: str,
    tier: str = Tier.FREE,
    voice: VoiceConfig | None = None,
    *,
    email: str = "",
    timezone: str = "UTC",
    parent_id: uuid.UUID | None = None,
) -> Tenant:
    """Make a tenant with its limits, default project, settings and voice, all at once. Raises `BadInput`, `Conflict`.

    It is active: `pending` is the state of a tenant whose own onboarding has still to be finished, and whoever calls
    this, an operator at the command line, is done with it and wants keys that work. The column's default stays
    `pending`, so a row made any other way opens nothing. From its parent a tenant inherits nothing.
    """
    shaped(slug, "slug", _SLUG, "3 to 100 of a-z, 0-9 and -, beginning and ending with a letter or digit")
    if slug in RESERVED:
        raise BadInput(f"{slug!r} is a name of the platform's own; choose another slug.", param="slug")
    chosen_tier = chosen(tier, "tier", Tier)
    tenant = Tenant(
        id=uuid.uuid4(),
        slug=slug,
        tier=chosen_tier,
        status=TenantStatus.ACTIVE,
        activated_at=func.now(),
        parent_id=parent_id,
        name=words(name, "name", 2, 255),
        **_profile(name=None, email=email, timezone=timezone),
        **_columns(LIMITS[chosen_tier]),
    )
    try:
        async with database.system() as session:
            session.add(tenant)
            await session.flush()
            session.add(
                Project(tenant_id=tenant.id, name="Default", environment=Environment.PRODUCTION, is_default=True)
            )
            session.add(TenantSettings(tenant_id=tenant.id))
            await voices.store(session, tenant.id, voice or VoiceConfig())
            await session.refresh(tenant)
            await audit.append(
                session,
                Action.CREATE,
                "tenant",
                tenant.id,
                f"Made the tenant {slug}",
                tenant_id=tenant.id,
                new={"slug": slug, "name": name, "tier": chosen_tier, **_columns(LIMITS[chosen_tier])},
            )
    except IntegrityError as error:
        if sqlstate(error) == _FOREIGN_KEY_VIOLATION:
            raise BadInput("There is no tenant of that parent_id.", param="parent_id") from error
        if sqlstate(error) != _UNIQUE_VIOLATION:
            raise
        raise Conflict(f"There is a tenant {slug!r} already; choose another slug.", param="slug") from error
    _log.info("tenant_created tenant_id=%s", tenant.id)
    return tenant


async def by_slug(database: Database, slug: str) -> Tenant:
    """The tenant of that slug, whatever its status. Raises `NotFound`."""
    async with database.system() as session:
        found = (await session.execute(select(Tenant).where(Tenant.slug == slug))).scalar_one_or_none()
    return _known(found)


async def get(database: Database, tenant_id: uuid.UUID) -> Tenant:
    """The tenant itself, whatever its status. Raises `NotFound`."""
    async with database.tenant(tenant_id) as session:
        found = await session.get(Tenant, tenant_id)
    return _known(found)


async def list_(
    database: Database,
    *,
    status: str | None = None,
    tier: str | None = None,
    search: str = "",
    sort: str = "-created_at",
    page: int = 1,
    page_size: int = 20,
) -> Page[Summary]:
    """A page of all tenants, the newest first, for the operator.

    `search` is a part of name, slug, e-mail address or id, in any case. `sort` is created_at, name, slug, tier or
    status, with a - before it for the greatest first. Raises `BadInput`.
    """
    query = select(Tenant)
    if status is not None:
        query = query.where(Tenant.status == chosen(status, "status", TenantStatus))
    if tier is not None:
        query = query.where(Tenant.tier == chosen(tier, "tier", Tier))
    if search:
        part = words(search, "search", 1, 200)
        places = (Tenant.name, Tenant.slug, Tenant.email, cast(Tenant.id, TextType))
        query = query.where(or_(*(place.icontains(part, autoescape=True) for place in places)))
    by = _SORTED.get(sort.removeprefix("-"))
    if by is None:
        raise BadInput(f"sort must be one of {', '.join(_SORTED)}, or - and one of them.", param="sort")
    query = query.order_by(by.desc() if sort.startswith("-") else by, Tenant.created_at.desc(), Tenant.id)
    async with database.system() as session:
        found = await pages.turn_to(session, query, page, page_size)
        ids = [tenant.id for tenant in found.items]
        counts = {row.tenant_id: row for row in await session.execute(_counts(ids))} if ids else {}
    items = [_summary(tenant, counts[tenant.id]) for tenant in found.items]
    return Page(items, found.total, found.page, found.page_size)


async def summary(database: Database, tenant_id: uuid.UUID) -> Summary:
    """One tenant and how much it has. Raises `NotFound`."""
    async with database.tenant(tenant_id) as session:
        tenant = _known(await session.get(Tenant, tenant_id))
        counts = (await session.execute(_counts([tenant_id]))).one()
    return _summary(tenant, counts)


async def update(
    database: Database,
    tenant_id: uuid.UUID,
    *,
    name: str | None = None,
    email: str | None = None,
    timezone: str | None = None,
    tier: str | None = None,
    limits: Mapping[str, int] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Tenant:
    """Change a tenant, as the operator may; what is left out stays. Raises `BadInput`, `NotFound`, `Conflict`.

    With the tier the limits become the new tier's, except those that somebody had set apart from the old tier's.
    `limits` (max_users, max_projects, max_api_keys, max_sessions_per_month) count last. Who has more than a limit
    keeps it, and gets no more. `settings` are extras that are merged in: `features`, names with true or false.
    """
    values = _profile(name=name, email=email, timezone=timezone)
    wanted = chosen(tier, "tier", Tier) if tier is not None else None
    apart = _limits(limits or {})
    extras = _extras(settings or {})
    async with database.system() as session:
        tenant = await lock(session, tenant_id)
        if tenant.status == TenantStatus.DELETED:
            raise Conflict("The tenant is deleted; activate it first.", code="tenant_deleted")
        before = _shown(tenant)
        if wanted is not None and wanted != tenant.tier:
            old, new = _columns(LIMITS[tenant.tier]), _columns(LIMITS[wanted])
            values |= {limit: new[limit] for limit in new if getattr(tenant, limit) == old[limit]}
            values["tier"] = wanted
        values |= apart
        if extras:
            features = {**tenant.settings.get("features", {}), **extras}
            if len(features) > _MOST_FEATURES:
                raise BadInput(f"A tenant has at most {_MOST_FEATURES} features.", param="settings.features")
            values["settings"] = {**tenant.settings, "features": features}
        await _changed(session, tenant, values, before)
    _log.info("tenant_updated tenant_id=%s fields=%s", tenant_id, ",".join(sorted(values)))
    return tenant


async def describe(
    database: Database,
    tenant_id: uuid.UUID,
    *,
    name: str | None = None,
    email: str | None = None,
    timezone: str | None = None,
) -> Tenant:
    """Change what a tenant says of itself, as its own administrators may. Raises `BadInput`, `NotFound`, `Conflict`
    for one that is erased."""
    values = _profile(name=name, email=email, timezone=timezone)
    async with database.tenant(tenant_id) as session:
        tenant = await lock(session, tenant_id)
        await _changed(session, tenant, values, _shown(tenant))
    return tenant


async def suspend(database: Database, tenant_id: uuid.UUID, reason: str) -> Tenant:
    """Let nobody in: within a second no key opens anything, and nodes close their sessions of the tenant.

    Sessions that nobody has connected to end here and now. Raises `BadInput`, `NotFound`, `Conflict` for a tenant that
    is not active.
    """
    words(reason, "reason", 1, LONGEST_REASON)
    values = {"status": TenantStatus.SUSPENDED, "suspended_at": func.now(), "suspension_reason": reason}
    return await _turn(database, tenant_id, (TenantStatus.ACTIVE,), values, "tenant_suspended", "Suspended")


async def activate(database: Database, tenant_id: uuid.UUID) -> Tenant:
    """Let the tenant in, for the first time or again; its keys work as before, unless they were revoked.

    A deleted tenant comes back by this for as long as nothing of it has been erased. Raises `NotFound`, `Conflict` for
    a tenant that is active, or that is being erased.
    """
    before = (TenantStatus.PENDING, TenantStatus.SUSPENDED, TenantStatus.DELETED)
    values = {
        "status": TenantStatus.ACTIVE,
        "activated_at": func.now(),
        "suspended_at": None,
        "suspension_reason": "",
        "deleted_at": None,
    }
    return await _turn(database, tenant_id, before, values, "tenant_activated", "Activated")


async def delete(database: Database, tenant_id: uuid.UUID) -> Tenant:
    """Close the tenant, as `suspend` does, for good; its data stay until they are erased.

    Its slug stays taken until then, so that nobody can step into its place by mistake. Raises `NotFound`, `Conflict`.
    """
    before = (TenantStatus.PENDING, TenantStatus.ACTIVE, TenantStatus.SUSPENDED)
    values = {"status": TenantStatus.DELETED, "deleted_at": func.now()}
    return await _turn(database, tenant_id, before, values, "tenant_deleted", "Deleted")


async def lock(session: AsyncSession, tenant_id: uuid.UUID) -> Tenant:
    """The tenant, which nobody else changes, and nobody begins to erase, before the transaction ends.

    Raises `NotFound`, and `Conflict` (`tenant_erased`): what is erased gets no names again.
    """
    # Not the strongest lock: what refers to the tenant can be made meanwhile.
    query = select(Tenant).where(Tenant.id == tenant_id).with_for_update(key_share=True)
    tenant = _known((await session.execute(query)).scalar_one_or_none())
    if tenant.erased_at is not None:
        raise Conflict("The tenant's data are erased, or about to be; make a new one.", code="tenant_erased")
    return tenant


async def _turn(
    database: Database,
    tenant_id: uuid.UUID,
    before: tuple[TenantStatus, ...],
    values: Mapping[str, Any],
    event: str,
    done: str,
) -> Tenant:
    """Bring a tenant from one of the states `before` to another, with everything that follows from it."""
    async with database.system() as session:
        tenant = await lock(session, tenant_id)
        old = tenant.status
        if old not in before:
            raise Conflict(f"The tenant is {old}; it must be {' or '.join(before)} for this.", param="status")
        await session.execute(change(Tenant).where(Tenant.id == tenant_id).values(values))
        await session.refresh(tenant)
        if tenant.status != TenantStatus.ACTIVE:
            # Those that are connected are ended by their nodes, who know how long they lasted.
            await session.execute(
                change(Session)
                .where(Session.tenant_id == tenant_id, Session.status == SessionStatus.CREATED)
                .values(status=SessionStatus.TERMINATED, ended_at=func.now(), termination_reason=event)
            )
        action = Action.DELETE if tenant.status == TenantStatus.DELETED else Action.UPDATE
        new = {"status": tenant.status, **({"reason": tenant.suspension_reason} if tenant.suspension_reason else {})}
        await audit.append(
            session, action, "tenant", tenant_id, done, tenant_id=tenant_id, old={"status": old}, new=new
        )
    _log.info("%s tenant_id=%s", event, tenant_id)
    return tenant


async def _changed(session: AsyncSession, tenant: Tenant, values: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Write `values` and the audit line about those that differ."""
    values = {name: value for name, value in values.items() if getattr(tenant, name) != value}
    if not values:
        return
    await session.execute(change(Tenant).where(Tenant.id == tenant.id).values(**values, updated_at=func.now()))
    await session.refresh(tenant)
    after = _shown(tenant)
    await audit.append(
        session,
        Action.UPDATE,
        "tenant",
        tenant.id,
        f"Changed {', '.join(sorted(values))}",
        tenant_id=tenant.id,
        old={name: before[name] for name in values},
        new={name: after[name] for name in values},
    )


def _shown(tenant: Tenant) -> dict[str, Any]:
    names = ("name", "email", "timezone", "tier", "settings", *_columns(LIMITS[Tier.FREE]))
    return {name: getattr(tenant, name) for name in names}


def _profile(*, name: str | None, email: str | None, timezone: str | None) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if name is not None:
        values["name"] = words(name, "name", 2, 255)
    if email is not None:
        values["email"] = checks.email(email) if email != "" else ""
    if timezone is not None:
        values["timezone"] = checks.timezone(timezone)
    return values


def _columns(limits: Limits) -> dict[str, int]:
    return {f"max_{name}": value for name, value in limits._asdict().items()}


def _limits(given: Mapping[str, int]) -> dict[str, int]:
    least = _columns(_LEAST)
    for name, value in given.items():
        if name not in least:
            raise BadInput(f"limits are {', '.join(least)}.", param=str(name)[:50])
        number(value, name, least[name])
    return dict(given)


def _extras(given: Mapping[str, Any]) -> dict[str, bool]:
    """The features among `given`; anything else is refused, so that nothing of ours can be written over."""
    for name in given:
        if name != "features":
            raise BadInput("settings may hold features only.", param=f"settings.{str(name)[:50]}")
    features = given.get("features", {})
    if not isinstance(features, Mapping):
        raise BadInput("features must be names with true or false.", param="settings.features")
    for name, value in features.items():
        shaped(name, "settings.features", _FEATURE, "names of a-z, 0-9 and _, at most 50 characters")
        checks.yes_or_no(value, f"settings.features.{name}")
    return dict(features)


def _counts(ids: list[uuid.UUID]) -> Any:
    return select(OVERVIEW).where(OVERVIEW.c.tenant_id.in_(ids))


def _summary(tenant: Tenant, counts: Any) -> Summary:
    return Summary(tenant, counts.members, counts.projects, counts.api_keys, counts.sessions)


def _known(tenant: Tenant | None) -> Tenant:
    if tenant is None:
        raise NotFound("There is no such tenant.", code="tenant_not_found")
    return tenant
