"""The organizations that use the platform."""

from __future__ import annotations

import logging
import re
import uuid
from typing import NamedTuple

from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError

from agentvoicebox.config.errors import BadInput, Conflict, NotFound
from agentvoicebox.tenancy import voices
from agentvoicebox.tenancy.checks import shaped, words
from agentvoicebox.tenancy.database import Database, sqlstate
from agentvoicebox.tenancy.models import Environment, Project, Tenant, TenantStatus, Tier
from agentvoicebox.tenancy.voices import VoiceConfig

_SLUG = re.compile(r"[a-z0-9][a-z0-9-]{1,98}[a-z0-9]")
_UNIQUE_VIOLATION = "23505"

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


async def create(
    database: Database, slug: str, name: str, tier: str = Tier.FREE, voice: VoiceConfig | None = None
) -> Tenant:
    """Make a tenant with its limits, its default project and its voice, all at once. Raises `BadInput`, `Conflict`.

    It is active: `pending` is the state of a tenant whose own onboarding has still to be finished, and whoever calls
    this, an operator at the command line, is done with it and wants keys that work. The column's default stays
    `pending`, so a row made any other way opens nothing.
    """
    shaped(slug, "slug", _SLUG, "3 to 100 of a-z, 0-9 and -, beginning and ending with a letter or digit")
    words(name, "name", 2, 255)
    if tier not in tuple(Tier):
        raise BadInput(f"tier must be one of {', '.join(Tier)}.", param="tier")
    limits = LIMITS[Tier(tier)]
    tenant = Tenant(
        id=uuid.uuid4(),
        slug=slug,
        name=name,
        tier=Tier(tier),
        status=TenantStatus.ACTIVE,
        activated_at=func.now(),
        max_users=limits.users,
        max_projects=limits.projects,
        max_api_keys=limits.api_keys,
        max_sessions_per_month=limits.sessions_per_month,
    )
    try:
        async with database.system() as session:
            session.add(tenant)
            await session.flush()
            session.add(
                Project(tenant_id=tenant.id, name="Default", environment=Environment.PRODUCTION, is_default=True)
            )
            await voices.store(session, tenant.id, voice or VoiceConfig())
            await session.refresh(tenant)
    except IntegrityError as error:
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


def _known(tenant: Tenant | None) -> Tenant:
    if tenant is None:
        raise NotFound("There is no such tenant.", code="tenant_not_found")
    return tenant
