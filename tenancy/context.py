"""Which tenant a request is about: what its credential says, and what header, host and path say beside it.

A request may name a tenant in up to three places, and they only ever narrow what the credential allows: a key is of one
tenant, and naming another is refused. Only the operator, who is of none, chooses by them.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from sqlalchemy import select

from agentvoicebox.config.errors import BadInput, Forbidden, NotFound
from agentvoicebox.tenancy import checks, domains
from agentvoicebox.tenancy.database import Database, NoTenant
from agentvoicebox.tenancy.models import Tenant, TenantStatus
from agentvoicebox.tenancy.tenants import RESERVED

HEADER = "X-Tenant-ID"
OWN = "me"
"""Stands in a path for the caller's own tenant."""

_NAMED = ("api", "v2", "tenants")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_PORT = re.compile(r":[0-9]{1,5}")


class Place(StrEnum):
    """Where a request names a tenant, in the order in which that counts."""

    HEADER = "header"
    SUBDOMAIN = "subdomain"
    DOMAIN = "domain"
    PATH = "path"


class Named(NamedTuple):
    """What stands in one place: an id, a slug, or a host name that may or may not be a tenant's."""

    place: Place
    value: uuid.UUID | str


class Known(NamedTuple):
    """A tenant, as far as it matters here."""

    id: uuid.UUID
    slug: str
    status: TenantStatus


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose credential it is: a tenant's, or the operator's, who has none."""

    tenant: Known | None
    operator: bool = False


def named(*, host: str = "", path: str = "", header: str | None = None, base: str = "") -> tuple[Named, ...]:
    """Where a request names a tenant, most telling first; `base` is the domain whose subdomains are slugs.

    Raises `BadInput` for a header that holds no id, and `NotFound` for a path that does not.
    """
    found: list[Named] = []
    if header is not None:
        found.append(Named(Place.HEADER, checks.identifier(header.strip(), HEADER)))
    if (by_host := _of_host(host, base)) is not None:
        found.append(by_host)
    segments = path.strip("/").split("/")
    if tuple(segments[:3]) == _NAMED and len(segments) > 3 and segments[3] != OWN:
        try:
            found.append(Named(Place.PATH, checks.identifier(segments[3], "tenant_id")))
        except BadInput as error:
            raise _unknown() from error
    return tuple(found)


def resolve(caller: Caller, places: Sequence[Named], known: Mapping[Named, Known | None]) -> uuid.UUID:
    """The tenant that a request is about. `known` says who the tenants are that `places` name.

    Raises `NoTenant` where nothing names one; `Forbidden` for another tenant than the caller's, and for one that is
    suspended or pending; `NotFound` for one that is deleted or that nobody knows; `BadInput` where places disagree.
    """
    # A host name that nobody has proven to be theirs names nobody.
    meant = [(each, known.get(each)) for each in places if not (each.place == Place.DOMAIN and known.get(each) is None)]
    if not caller.operator and caller.tenant is not None:
        if any(found is None or found.id != caller.tenant.id for _, found in meant):
            # Whether there is such a tenant is none of the caller's business.
            raise Forbidden("This credential is of another tenant than the request names.")
        return admit(caller.tenant)
    if not caller.operator:
        raise NoTenant("This credential is of no tenant; use one that is.")
    chosen = next((found for _, found in meant), caller.tenant)
    if not meant and chosen is None:
        raise NoTenant(f"Name the tenant whose request this is, by the header {HEADER} or in the path.")
    if chosen is None or any(found is None for _, found in meant):
        raise _unknown()
    if any(found is not None and found.id != chosen.id for _, found in meant):
        raise BadInput("Header, host and path name different tenants; name one.", code="tenant_ambiguous")
    return admit(chosen)


def admit(tenant: Known) -> uuid.UUID:
    """The id of a tenant that is active. Raises `Forbidden`, and `NotFound` for a deleted one."""
    if tenant.status == TenantStatus.DELETED:
        raise _unknown()
    if tenant.status == TenantStatus.SUSPENDED:
        raise Forbidden("This tenant is suspended; its administrator can ask why.", code="tenant_suspended")
    if tenant.status != TenantStatus.ACTIVE:
        raise Forbidden("This tenant is not active yet; finish its onboarding.", code="tenant_pending")
    return tenant.id


async def look_up(database: Database, caller: Caller, places: Sequence[Named]) -> dict[Named, Known | None]:
    """Who the tenants are that `places` name, without asking the store about those that a tenant's key may not reach.

    Raises `Unavailable`.
    """
    known: dict[Named, Known | None] = {}
    for each in places:
        own = caller.tenant
        if own is not None and not caller.operator and each.place != Place.DOMAIN:
            known[each] = own if each.value in (own.id, own.slug) else None
        else:
            known[each] = await _find(database, each)
    return known


async def _find(database: Database, wanted: Named) -> Known | None:
    query = select(Tenant.id, Tenant.slug, Tenant.status)
    if wanted.place == Place.DOMAIN:
        owner = await domains.by_host(database, str(wanted.value))
        if owner is None:
            return None
        query = query.where(Tenant.id == owner)
    elif wanted.place == Place.SUBDOMAIN:
        query = query.where(Tenant.slug == wanted.value)
    else:
        query = query.where(Tenant.id == wanted.value)
    async with database.system() as session:
        found = (await session.execute(query)).one_or_none()
    return Known(found.id, found.slug, found.status) if found is not None else None


def _of_host(host: str, base: str) -> Named | None:
    """What a Host header says: a slug under `base`, or another name. Addresses and names of one label say nothing."""
    name = host.strip().lower()
    if (port := name.rfind(":")) >= 0 and _PORT.fullmatch(name[port:]):
        name = name[:port]
    try:
        name = checks.host(name.rstrip("."), "host")
    except BadInput:
        return None
    if base and (name == base or name.endswith(f".{base}")):
        label = name.removesuffix(base).removesuffix(".")
        if label in RESERVED or not _LABEL.fullmatch(label):
            return None
        return Named(Place.SUBDOMAIN, label)
    return Named(Place.DOMAIN, name)


def _unknown() -> NotFound:
    return NotFound("There is no such tenant.", code="tenant_not_found")
