"""API keys of a tenant: issued once, listed masked, rotated and revoked."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response
from msgspec import UNSET, Meta, UnsetType

from agentvoicebox.admin_api import auth, schemas
from agentvoicebox.admin_api.auth import Visiting
from agentvoicebox.admin_api.listings import Listing, Paged, View, listing
from agentvoicebox.admin_api.schemas import Body
from agentvoicebox.admin_api.stores import Store
from agentvoicebox.admin_api.visits import Visit
from agentvoicebox.config.errors import Forbidden
from agentvoicebox.tenancy import keys, principals
from agentvoicebox.tenancy.keys import KeyStatus, Scope
from agentvoicebox.tenancy.models import ApiKey, RateClass
from agentvoicebox.tenancy.principals import SCOPE_PERMISSIONS

router = APIRouter(prefix="/api/v2/api-keys", tags=["keys"])

_CLASSES = tuple(RateClass)
"""From the least to the most."""

Name = Annotated[str, Meta(min_length=1, max_length=100)]
Scopes = Annotated[list[Scope], Meta(min_length=1, max_length=len(Scope))]


class NewKey(Body):
    """What a key is to be."""

    name: Name
    description: Annotated[str, Meta(max_length=1000)] = ""
    scopes: Scopes = msgspec.field(default_factory=lambda: [Scope.REALTIME])
    rate_limit_tier: RateClass = RateClass.STANDARD
    expires_at: datetime | None = None
    """With a time zone, in the future."""
    project_id: uuid.UUID | None = None
    """By default the tenant's first one."""


class KeyChange(Body):
    """What is to be different about a key."""

    name: Name | UnsetType = UNSET
    description: Annotated[str, Meta(max_length=1000)] | UnsetType = UNSET
    scopes: Scopes | UnsetType = UNSET
    rate_limit_tier: RateClass | UnsetType = UNSET
    project_id: uuid.UUID | UnsetType = UNSET


class Rotation(Body):
    """How a key is to be replaced."""

    grace_hours: Annotated[float, Meta(ge=0, le=keys.LONGEST_GRACE / 3600)] = keys.GRACE / 3600
    """For which the old one goes on working."""


class Key(View):
    """A key, without its secret."""

    id: uuid.UUID
    name: str
    description: str
    key_prefix: str
    scopes: list[Scope]
    rate_limit_tier: RateClass
    project_id: uuid.UUID | None
    status: KeyStatus
    expires_at: datetime | None
    revoked_at: datetime | None
    rotated_from: uuid.UUID | None
    replaced_by: uuid.UUID | None
    last_used_at: datetime | None
    usage_count: int
    created_at: datetime
    updated_at: datetime


class IssuedKey(Key):
    """A new key with its secret, which is shown this once."""

    key: str


class RotatedKey(IssuedKey):
    """The new key, and until when the old one is good."""

    replaces: uuid.UUID
    old_expires_at: datetime | None
    """None when it was revoked at once."""


class KeyUsage(View):
    """How much a key is used; some seconds behind."""

    id: uuid.UUID
    usage_count: int
    last_used_at: datetime | None
    last_used_ip: str | None


def shown(row: ApiKey) -> Key:
    """What may be seen of a key."""
    return Key.model_validate({**_columns(row), "status": keys.status(row, datetime.now(UTC))})


@router.post(
    "", status_code=201, dependencies=auth.may("tenant.create_api_key"), openapi_extra=schemas.document(NewKey)
)
async def issue_key(request: Request, visit: Visiting, store: Store) -> IssuedKey:
    """Issue a key. Its scopes and rate class may not go beyond those of the key that asks."""
    wanted = await schemas.read(request, NewKey)
    _check_class(visit, wanted.rate_limit_tier)
    check_scopes(visit, wanted.scopes)
    made = await keys.issue(
        store,
        visit.tenant_id,
        wanted.name,
        wanted.scopes,
        wanted.expires_at,
        wanted.project_id,
        description=wanted.description,
        rate_class=wanted.rate_limit_tier,
    )
    return await _issued(visit, store, made)


@router.get("", dependencies=auth.may("api_key.view"))
async def list_keys(
    visit: Visiting, store: Store, paging: Paged, status: KeyStatus | None = None, project_id: uuid.UUID | None = None
) -> Listing[Key]:
    """The tenant's keys, the newest first."""
    found = await keys.list_(
        store, visit.tenant_id, status=status, project_id=project_id, page=paging.page, page_size=paging.size
    )
    return listing(shown, found)


@router.get("/{key_id:uuid}", dependencies=auth.may("api_key.view"))
async def read_key(visit: Visiting, store: Store, key_id: uuid.UUID) -> Key:
    """One key."""
    return shown(await keys.get(store, visit.tenant_id, key_id))


@router.get("/{key_id:uuid}/usage", dependencies=auth.may("api_key.view"))
async def read_key_usage(visit: Visiting, store: Store, key_id: uuid.UUID) -> KeyUsage:
    """How often a key was used, and when and from where last."""
    row = await keys.get(store, visit.tenant_id, key_id)
    ip = None if row.last_used_ip is None else str(row.last_used_ip)
    return KeyUsage(id=row.id, usage_count=row.usage_count, last_used_at=row.last_used_at, last_used_ip=ip)


@router.patch("/{key_id:uuid}", dependencies=auth.may("api_key.rotate"), openapi_extra=schemas.document(KeyChange))
async def change_key(request: Request, visit: Visiting, store: Store, key_id: uuid.UUID) -> Key:
    """Change name, description, scopes, class or project; within a second that counts everywhere."""
    wanted = await schemas.read(request, KeyChange)
    if wanted.rate_limit_tier is not UNSET:
        _check_class(visit, wanted.rate_limit_tier)
    if wanted.scopes is not UNSET:
        check_scopes(visit, wanted.scopes)
    changes = schemas.changes(wanted)
    if "rate_limit_tier" in changes:
        changes["rate_class"] = changes.pop("rate_limit_tier")
    return shown(await keys.update(store, visit.tenant_id, key_id, **changes))


@router.post("/{key_id:uuid}/rotate", dependencies=auth.may("api_key.rotate"), openapi_extra=schemas.document(Rotation))
async def rotate_key(request: Request, visit: Visiting, store: Store, key_id: uuid.UUID) -> RotatedKey:
    """Replace a key. The old one works on for the grace time; at 0 it ends now."""
    wanted = await schemas.read(request, Rotation)
    check_scopes(visit, (await keys.get(store, visit.tenant_id, key_id)).scopes)
    made = await keys.rotate(store, visit.tenant_id, key_id, wanted.grace_hours * 3600)
    old = await keys.get(store, visit.tenant_id, key_id)
    ends = None if old.revoked_at is not None else old.expires_at
    new = await _issued(visit, store, made)
    return RotatedKey(**new.model_dump(), replaces=key_id, old_expires_at=ends)


@router.delete("/{key_id:uuid}", status_code=204, dependencies=auth.may("api_key.revoke"))
async def revoke_key(visit: Visiting, store: Store, key_id: uuid.UUID) -> Response:
    """Revoke a key: everywhere within a second, and its live sessions end."""
    await keys.revoke(store, visit.tenant_id, key_id)
    return Response(status_code=204)


async def _issued(visit: Visit, store: Store, made: keys.Issued) -> IssuedKey:
    row = await keys.get(store, visit.tenant_id, made.id)
    return IssuedKey(**shown(row).model_dump(), key=made.key)


def _columns(row: ApiKey) -> dict[str, object]:
    return {name: getattr(row, name) for name in Key.model_fields if name != "status"}


def check_scopes(visit: Visit, scopes: Iterable[str]) -> None:
    """Nobody gives rights that they do not have, by whatever scope they have them (KEY-18)."""
    for scope in scopes:
        for wanted in sorted(SCOPE_PERMISSIONS[scope]):
            resource, permission = wanted.split(".")
            try:
                principals.may(visit.principal, visit.tenant_id, resource, permission)
            except Forbidden as error:
                raise Forbidden(
                    f"This key cannot give the scope {scope}: {error.message}", code=error.code, param="scopes"
                ) from error


def _check_class(visit: Visit, wanted: RateClass) -> None:
    """Nobody lifts their own limits."""
    if not visit.operator and _CLASSES.index(wanted) > _CLASSES.index(visit.grant.rate_class):
        raise Forbidden(
            f"This key is {visit.grant.rate_class}, and gives no more than that; ask the operator for {wanted}.",
            param="rate_limit_tier",
        )
