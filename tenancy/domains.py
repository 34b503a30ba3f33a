"""Host names of tenants' own. Anybody may claim one; who proves in DNS that it is theirs has it."""

from __future__ import annotations

import logging
import secrets
import uuid
from collections.abc import Sequence
from typing import Protocol

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from agentvoicebox.config.errors import BadInput, Conflict, NotFound
from agentvoicebox.tenancy import audit, checks, pages, tenants
from agentvoicebox.tenancy.database import Database, sqlstate
from agentvoicebox.tenancy.models import Action, TenantDomain
from agentvoicebox.tenancy.pages import Page

LABEL = "_agentvoicebox"
"""Under this name of the domain a TXT record must hold the claim's token."""

MOST = 20
"""Claims of one tenant, proven or not."""

_UNIQUE_VIOLATION = "23505"

_log = logging.getLogger(__name__)


class Resolver(Protocol):
    """What asks DNS."""

    async def txt(self, name: str) -> Sequence[str]:
        """The texts at `name`, none where there is no such name. Raises `Unavailable` when DNS does not answer."""
        ...


def checked(domain: str, platform: str = "") -> str:
    """The host name as it is kept. Raises `BadInput` for none, or one under `platform`."""
    name = checks.host(domain, "domain")
    if platform and (name == platform or name.endswith(f".{platform}")):
        raise BadInput(f"{platform} is the platform's own; name a domain of yours.", param="domain")
    return name


async def add(database: Database, tenant_id: uuid.UUID, domain: str, *, platform: str = "") -> TenantDomain:
    """Claim a host name; its `token` is what the TXT record has to hold.

    `platform` is the domain under which the platform itself gives out names, which nobody can claim. Raises `BadInput`,
    `Conflict` for one that the tenant has claimed already, or when it has 20 claims or is erased, `NotFound`.
    """
    name = checked(domain, platform)
    # Only these columns are ours to give; that it is proven is not.
    new = {"tenant_id": tenant_id, "id": uuid.uuid4(), "domain": name, "token": secrets.token_urlsafe(32)}
    try:
        async with database.tenant(tenant_id) as session:
            await tenants.lock(session, tenant_id)  # one claim at a time, so that the count holds
            claims = select(func.count()).where(TenantDomain.tenant_id == tenant_id)
            if (await session.execute(claims)).scalar_one() >= MOST:
                raise Conflict(f"A tenant has at most {MOST} domains; remove one first.", code="too_many_domains")
            made = await session.execute(insert(TenantDomain).values(new).returning(TenantDomain))
            claim = made.scalar_one()
            await audit.append(session, Action.CREATE, "domain", claim.id, f"Claimed {name}", new={"domain": name})
    except IntegrityError as error:
        if sqlstate(error) != _UNIQUE_VIOLATION:
            raise
        raise Conflict(f"{name} is claimed already; verify that claim, or remove it.", param="domain") from error
    return claim


async def list_(database: Database, tenant_id: uuid.UUID, page: int = 1, page_size: int = 20) -> Page[TenantDomain]:
    """The tenant's claims, proven or not, the primary one first. Raises `BadInput`."""
    query = select(TenantDomain).order_by(TenantDomain.is_primary.desc(), TenantDomain.domain)
    async with database.tenant(tenant_id) as session:
        return await pages.turn_to(session, query, page, page_size)


async def remove(database: Database, tenant_id: uuid.UUID, domain_id: uuid.UUID) -> None:
    """Give up a claim; requests under that name are nobody's from now on. Raises `NotFound`."""
    async with database.tenant(tenant_id) as session:
        removed = await session.execute(
            delete(TenantDomain).where(TenantDomain.id == domain_id).returning(TenantDomain.domain)
        )
        if (name := removed.scalar_one_or_none()) is None:
            raise _unknown()
        await audit.append(session, Action.DELETE, "domain", domain_id, f"Gave up {name}", old={"domain": name})


async def set_primary(database: Database, tenant_id: uuid.UUID, domain_id: uuid.UUID) -> TenantDomain:
    """Make this the name by which the tenant is shown. Raises `NotFound`, `Conflict` for one that is not proven."""
    async with database.tenant(tenant_id) as session:
        await tenants.lock(session, tenant_id)  # two at once come one after the other
        claim = await session.get(TenantDomain, (tenant_id, domain_id), with_for_update=True)
        if claim is None:
            raise _unknown()
        if claim.verified_at is None:
            raise Conflict(f"{claim.domain} is not proven yet; verify it first.", code="domain_not_verified")
        if not claim.is_primary:
            old = (await session.execute(select(TenantDomain).where(TenantDomain.is_primary))).scalar_one_or_none()
            for each, primary in ((old, False), (claim, True)):
                if each is not None:
                    await session.execute(
                        update(TenantDomain).where(TenantDomain.id == each.id).values(is_primary=primary)
                    )
            await session.refresh(claim)
            await audit.append(
                session,
                Action.UPDATE,
                "domain",
                claim.id,
                f"Made {claim.domain} primary",
                old={"domain": old.domain if old else None},
                new={"domain": claim.domain},
            )
    return claim


async def verify(database: Database, tenant_id: uuid.UUID, domain_id: uuid.UUID, resolver: Resolver) -> TenantDomain:
    """Look for the token in DNS; from then on requests under that name are this tenant's.

    Raises `NotFound`; `Conflict` when the record is not there (yet), or when another tenant has proven the same name;
    `Unavailable`.
    """
    async with database.tenant(tenant_id) as session:
        claim = await session.get(TenantDomain, (tenant_id, domain_id))
    if claim is None:
        raise _unknown()
    if claim.verified_at is not None:
        return claim
    name = f"{LABEL}.{claim.domain}"
    texts = await resolver.txt(name)  # outside any transaction: it may take its time
    if claim.token not in (text.strip() for text in texts):
        raise Conflict(
            f"There is no TXT record {name} that holds {claim.token}; make it, and try again in some minutes.",
            code="domain_not_proven",
        )
    mine = (TenantDomain.tenant_id == tenant_id, TenantDomain.id == domain_id, TenantDomain.token == claim.token)
    try:
        async with database.system() as session:
            proven = await session.execute(
                update(TenantDomain).where(*mine).values(verified_at=func.now()).returning(TenantDomain)
            )
            if (claim := proven.scalar_one_or_none()) is None:
                raise _unknown()
            await audit.append(
                session, Action.UPDATE, "domain", domain_id, f"Proved {claim.domain}", tenant_id=tenant_id
            )
    except IntegrityError as error:
        if sqlstate(error) != _UNIQUE_VIOLATION:
            raise
        raise Conflict("Another tenant has proven that name already; the operator can help.", param="domain") from error
    _log.info("domain_verified tenant_id=%s domain_id=%s", tenant_id, domain_id)
    return claim


async def by_host(database: Database, host: str) -> uuid.UUID | None:
    """Whose proven name this is, if anybody's. Raises `Unavailable`."""
    try:
        name = checks.host(host, "host")
    except BadInput:
        return None
    async with database.system() as session:
        query = select(TenantDomain.tenant_id)
        return await session.scalar(query.where(TenantDomain.domain == name, TenantDomain.verified_at.is_not(None)))


def _unknown() -> NotFound:
    return NotFound("There is no such domain.", param="domain_id")
