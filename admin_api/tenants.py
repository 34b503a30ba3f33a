"""A tenant as it sees itself: what it is, what it has, and what it is called."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Request
from msgspec import UNSET, Meta, UnsetType

from agentvoicebox.admin_api import auth, schemas
from agentvoicebox.admin_api.auth import Visiting
from agentvoicebox.admin_api.listings import View
from agentvoicebox.admin_api.schemas import Body
from agentvoicebox.admin_api.stores import Store
from agentvoicebox.tenancy import quotas, tenants
from agentvoicebox.tenancy.models import TenantStatus, Tier

router = APIRouter(prefix="/api/v2/tenants", tags=["tenants"])

TenantName = Annotated[str, Meta(min_length=2, max_length=255)]
Email = Annotated[str, Meta(max_length=320)]
Zone = Annotated[str, Meta(min_length=1, max_length=50)]
"""The name of a time zone, such as Europe/Vienna."""


class Limits(View):
    """What a tenant may have of each."""

    max_users: int
    max_projects: int
    max_api_keys: int
    max_sessions_per_month: int


class Tenant(Limits):
    """An organization that uses the platform."""

    id: uuid.UUID
    name: str
    slug: str
    tier: Tier
    status: TenantStatus
    created_at: datetime
    updated_at: datetime
    activated_at: datetime | None


class Profile(View):
    """What a tenant says of itself."""

    name: str
    email: str
    timezone: str


class ProfileChange(Body):
    """What a tenant wants to say of itself."""

    name: TenantName | UnsetType = UNSET
    email: Email | UnsetType = UNSET
    """Empty for none."""
    timezone: Zone | UnsetType = UNSET


class Count(View):
    """How much of a limit is taken."""

    current: int
    limit: int


class Month(View):
    """How much of its limits a tenant takes; months begin on day 1 at 00:00 UTC."""

    users: Count
    projects: Count
    api_keys: Count
    sessions_this_month: Count


@router.get("/me", dependencies=auth.may("tenant.view"))
async def read_own_tenant(visit: Visiting, store: Store) -> Tenant:
    """The tenant of the key."""
    return Tenant.model_validate(await tenants.get(store, visit.tenant_id))


@router.get("/me/profile", dependencies=auth.may("tenant.view"))
async def read_profile(visit: Visiting, store: Store) -> Profile:
    """What the tenant says of itself."""
    return Profile.model_validate(await tenants.get(store, visit.tenant_id))


@router.patch(
    "/me/profile", dependencies=auth.may("tenant.administrate"), openapi_extra=schemas.document(ProfileChange)
)
async def change_profile(request: Request, visit: Visiting, store: Store) -> Profile:
    """Change name, e-mail address or time zone."""
    wanted = schemas.changes(await schemas.read(request, ProfileChange))
    return Profile.model_validate(await tenants.describe(store, visit.tenant_id, **wanted))


@router.get("/me/usage", dependencies=auth.may("tenant.view"))
@router.get("/{tenant_id:uuid}/usage", dependencies=auth.may_there("tenant.view"))
async def read_month(visit: Visiting, store: Store) -> Month:
    """How much of its limits the tenant takes."""
    return Month.model_validate(await quotas.usage(store, visit.tenant_id))


@router.get("/me/limits", dependencies=auth.may("tenant.view"))
@router.get("/{tenant_id:uuid}/limits", dependencies=auth.may_there("tenant.view"))
async def read_limits(visit: Visiting, store: Store) -> Limits:
    """What the tenant may have of each."""
    return Limits.model_validate(await tenants.get(store, visit.tenant_id))


@router.get("/{tenant_id:uuid}", dependencies=auth.may_there("tenant.view"))
async def read_tenant(visit: Visiting, store: Store) -> Tenant:
    """The tenant, if it is the key's own; the operator sees any."""
    return Tenant.model_validate(await tenants.get(store, visit.tenant_id))
