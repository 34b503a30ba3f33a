"""How much of its limits a tenant has used. That none is passed is the database's own business: see its triggers."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from sqlalchemy import select

from agentvoicebox.config.errors import NotFound
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.models import Tenant
from agentvoicebox.tenancy.tenants import OVERVIEW


@dataclass(frozen=True, slots=True)
class Quota:
    """How many there are, and how many there may be."""

    current: int
    limit: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What a tenant has of everything that is limited."""

    users: Quota
    """Members, and invitations that can still be accepted."""
    projects: Quota
    api_keys: Quota
    """Keys that open something; one that was replaced and is still good for a while is not counted twice."""
    sessions_this_month: Quota
    """Sessions begun since the first of the month, 00:00 UTC."""


async def usage(database: Database, tenant_id: uuid.UUID) -> Usage:
    """What a tenant has now, counted as its limits count. Raises `NotFound`."""
    async with database.tenant(tenant_id) as session:
        query = select(Tenant, OVERVIEW).join(OVERVIEW, OVERVIEW.c.tenant_id == Tenant.id)
        found = (await session.execute(query.where(Tenant.id == tenant_id))).one_or_none()
    if found is None:
        raise NotFound("There is no such tenant.", code="tenant_not_found")
    tenant = found.Tenant
    return Usage(
        users=Quota(found.users, tenant.max_users),
        projects=Quota(found.projects, tenant.max_projects),
        api_keys=Quota(found.api_keys, tenant.max_api_keys),
        sessions_this_month=Quota(found.sessions_this_month, tenant.max_sessions_per_month),
    )
