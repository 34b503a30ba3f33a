"""All tenants, for the operator."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from msgspec import UNSET, Meta, UnsetType

from agentvoicebox.admin_api import auth, schemas
from agentvoicebox.admin_api.keys import Key, shown
from agentvoicebox.admin_api.listings import Listing, Paged, View, listing
from agentvoicebox.admin_api.schemas import Body
from agentvoicebox.admin_api.stores import Store
from agentvoicebox.admin_api.tenants import Email, Month, Tenant, TenantName, Zone
from agentvoicebox.tenancy import domains, keys, quotas, team, tenants
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.models import MemberStatus, Role, TenantStatus, Tier

router = APIRouter(tags=["platform"])

_ADMIN = "/api/v2/admin/tenants"
_SHORT = "/api/v2/tenants"

Slug = Annotated[str, Meta(min_length=3, max_length=100, pattern="^[a-z0-9][a-z0-9-]*[a-z0-9]$")]
Least1 = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Least0 = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class NewTenant(Body):
    """What a tenant is to be."""

    name: TenantName
    slug: Slug
    tier: Tier = Tier.FREE
    email: Email = ""
    timezone: Zone = "UTC"
    parent_id: uuid.UUID | None = None
    domain: Annotated[str, Meta(min_length=3, max_length=253)] | None = None
    """A host name of its own, to be verified."""


class TenantChange(Body):
    """What is to be different about a tenant. A tier brings its limits; limits given here count last."""

    name: TenantName | UnsetType = UNSET
    email: Email | UnsetType = UNSET
    timezone: Zone | UnsetType = UNSET
    tier: Tier | UnsetType = UNSET
    max_users: Least1 | UnsetType = UNSET
    max_projects: Least1 | UnsetType = UNSET
    max_api_keys: Least1 | UnsetType = UNSET
    max_sessions_per_month: Least0 | UnsetType = UNSET
    settings: dict[str, Any] | UnsetType = UNSET
    """`features`, names with true or false, which are merged in."""


class Suspension(Body):
    """Why a tenant is suspended."""

    reason: Annotated[str, Meta(min_length=1, max_length=tenants.LONGEST_REASON)]


class Turned(View):
    """What has become of a tenant."""

    status: TenantStatus
    tenant_id: uuid.UUID


class Deleted(Turned):
    """The tenant is closed."""

    success: Literal[True] = True


class TenantDetail(Tenant):
    """A tenant, as the operator sees it."""

    email: str
    timezone: str
    parent_id: uuid.UUID | None
    settings: dict[str, Any]
    suspended_at: datetime | None
    suspension_reason: str
    deleted_at: datetime | None


class TenantSummary(TenantDetail):
    """A tenant in a list, and how much it has."""

    user_count: int
    project_count: int
    api_key_count: int
    session_count: int


@router.get(_ADMIN, dependencies=auth.sysadmin())
@router.get(_SHORT, dependencies=auth.sysadmin())
async def list_tenants(
    store: Store,
    paging: Paged,
    status: TenantStatus | None = None,
    tier: Tier | None = None,
    search: Annotated[str, Query(max_length=200, description="A part of name, slug, e-mail address or id.")] = "",
    sort: Annotated[str, Query(pattern="^-?(created_at|name|slug|tier|status)$")] = "-created_at",
) -> Listing[TenantSummary]:
    """All tenants, the newest first."""
    found = await tenants.list_(
        store, status=status, tier=tier, search=search, sort=sort, page=paging.page, page_size=paging.size
    )
    return listing(_summed, found)


@router.post(_ADMIN, status_code=201, dependencies=auth.sysadmin(), openapi_extra=schemas.document(NewTenant))
@router.post(_SHORT, status_code=201, dependencies=auth.sysadmin(), openapi_extra=schemas.document(NewTenant))
async def create_tenant(request: Request, store: Store) -> TenantDetail:
    """Make a tenant with the limits of its tier, its first project, its settings and its voice."""
    wanted = await schemas.read(request, NewTenant)
    platform = request.app.state.base
    if wanted.domain is not None:
        domains.checked(wanted.domain, platform)  # nothing is made of half a request
    made = await tenants.create(
        store,
        wanted.slug,
        wanted.name,
        wanted.tier,
        email=wanted.email,
        timezone=wanted.timezone,
        parent_id=wanted.parent_id,
    )
    if wanted.domain is not None:
        await domains.add(store, made.id, wanted.domain, platform=platform)
    return TenantDetail.model_validate(made)


@router.get(_ADMIN + "/{tenant_id:uuid}", dependencies=auth.sysadmin())
async def read_any_tenant(store: Store, tenant_id: uuid.UUID) -> TenantSummary:
    """A tenant, whatever its state, and how much it has."""
    return _summed(await tenants.summary(store, tenant_id))


@router.patch(_ADMIN + "/{tenant_id:uuid}", dependencies=auth.sysadmin(), openapi_extra=schemas.document(TenantChange))
@router.patch(_SHORT + "/{tenant_id:uuid}", dependencies=auth.sysadmin(), openapi_extra=schemas.document(TenantChange))
async def change_tenant(request: Request, store: Store, tenant_id: uuid.UUID) -> TenantDetail:
    """Change a tenant, its tier or its limits."""
    changes = schemas.changes(await schemas.read(request, TenantChange))
    limits = {name: changes.pop(name) for name in list(changes) if name.startswith("max_")}
    return TenantDetail.model_validate(await tenants.update(store, tenant_id, **changes, limits=limits))


@router.delete(_ADMIN + "/{tenant_id:uuid}", dependencies=auth.sysadmin())
@router.delete(_SHORT + "/{tenant_id:uuid}", dependencies=auth.sysadmin())
async def delete_tenant(store: Store, tenant_id: uuid.UUID) -> Deleted:
    """Close a tenant; its data stay until they are erased."""
    return Deleted(status=(await tenants.delete(store, tenant_id)).status, tenant_id=tenant_id)


@router.post(
    _ADMIN + "/{tenant_id:uuid}/suspend", dependencies=auth.sysadmin(), openapi_extra=schemas.document(Suspension)
)
async def suspend_tenant(request: Request, store: Store, tenant_id: uuid.UUID) -> Turned:
    """Let nobody in: within a second its keys open nothing, and its live sessions end."""
    wanted = await schemas.read(request, Suspension)
    return Turned(status=(await tenants.suspend(store, tenant_id, wanted.reason)).status, tenant_id=tenant_id)


@router.post(_ADMIN + "/{tenant_id:uuid}/activate", dependencies=auth.sysadmin())
async def activate_tenant(store: Store, tenant_id: uuid.UUID) -> Turned:
    """Let the tenant in again."""
    return Turned(status=(await tenants.activate(store, tenant_id)).status, tenant_id=tenant_id)


@router.get(_ADMIN + "/{tenant_id:uuid}/usage", dependencies=auth.sysadmin())
async def read_month_of_any(store: Store, tenant_id: uuid.UUID) -> Month:
    """How much of its limits a tenant takes."""
    await known(store, tenant_id)
    return Month.model_validate(await quotas.usage(store, tenant_id))


@router.get(_ADMIN + "/{tenant_id:uuid}/api-keys", dependencies=auth.sysadmin())
async def list_keys_of_any(store: Store, paging: Paged, tenant_id: uuid.UUID) -> Listing[Key]:
    """The keys of a tenant."""
    await known(store, tenant_id)
    return listing(shown, await keys.list_(store, tenant_id, page=paging.page, page_size=paging.size))


class Member(View):
    """Somebody who works for a tenant."""

    user_id: uuid.UUID
    name: str
    email: str
    roles: list[Role]
    status: MemberStatus
    is_active: bool
    since: datetime


@router.get(_ADMIN + "/{tenant_id:uuid}/members", dependencies=auth.sysadmin())
async def list_members_of_any(store: Store, paging: Paged, tenant_id: uuid.UUID) -> Listing[Member]:
    """Who works for a tenant."""
    await known(store, tenant_id)
    found = await team.list_(store, tenant_id, page=paging.page, page_size=paging.size)
    return listing(Member.model_validate, found)


async def known(store: Database, tenant_id: uuid.UUID) -> None:
    """Raise `NotFound` for a tenant that does not exist: a list of nothing would say that it does."""
    await tenants.get(store, tenant_id)


def _summed(found: tenants.Summary) -> TenantSummary:
    detail = TenantDetail.model_validate(found.tenant)
    return TenantSummary(
        **detail.model_dump(),
        user_count=found.users,
        project_count=found.projects,
        api_key_count=found.api_keys,
        session_count=found.sessions,
    )
