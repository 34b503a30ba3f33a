"""Host names of a tenant's own."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import Response
from msgspec import Meta

from agentvoicebox.admin_api import auth, schemas
from agentvoicebox.admin_api.auth import Visiting
from agentvoicebox.admin_api.listings import Listing, Paged, View, listing
from agentvoicebox.admin_api.schemas import Body
from agentvoicebox.admin_api.stores import Store
from agentvoicebox.config.errors import Unavailable
from agentvoicebox.tenancy import domains

router = APIRouter(prefix="/api/v2/tenants/me/domains", tags=["domains"])


class NewDomain(Body):
    """A host name that the tenant says is its own."""

    domain: Annotated[str, Meta(min_length=3, max_length=253)]


class Domain(View):
    """A claim. Until it is verified, a TXT record `_agentvoicebox.<domain>` must be made that holds `token`."""

    id: uuid.UUID
    domain: str
    is_primary: bool
    token: str
    verified_at: datetime | None
    created_at: datetime


class NoResolver:
    """Where no DNS is to be asked."""

    async def txt(self, name: str) -> Sequence[str]:
        """Raises `Unavailable`."""
        raise Unavailable("This node is set up without DNS, and cannot verify domains; ask the operator.")


@router.get("", dependencies=auth.may("tenant.view"))
async def list_domains(visit: Visiting, store: Store, paging: Paged) -> Listing[Domain]:
    """The tenant's claims, proven or not."""
    return listing(Domain.model_validate, await domains.list_(store, visit.tenant_id, paging.page, paging.size))


@router.post(
    "", status_code=201, dependencies=auth.may("tenant.administrate"), openapi_extra=schemas.document(NewDomain)
)
async def claim_domain(request: Request, visit: Visiting, store: Store) -> Domain:
    """Claim a host name."""
    wanted = await schemas.read(request, NewDomain)
    return Domain.model_validate(
        await domains.add(store, visit.tenant_id, wanted.domain, platform=request.app.state.base)
    )


@router.post("/{domain_id:uuid}/verify", dependencies=auth.may("tenant.administrate"))
async def verify_domain(request: Request, visit: Visiting, store: Store, domain_id: uuid.UUID) -> Domain:
    """Look for the token in DNS; from then on requests under that name are the tenant's."""
    resolver: domains.Resolver = request.app.state.resolver
    return Domain.model_validate(await domains.verify(store, visit.tenant_id, domain_id, resolver))


@router.post("/{domain_id:uuid}/primary", dependencies=auth.may("tenant.administrate"))
async def make_domain_primary(visit: Visiting, store: Store, domain_id: uuid.UUID) -> Domain:
    """Make a proven name the one by which the tenant is shown."""
    return Domain.model_validate(await domains.set_primary(store, visit.tenant_id, domain_id))


@router.delete("/{domain_id:uuid}", status_code=204, dependencies=auth.may("tenant.administrate"))
async def remove_domain(visit: Visiting, store: Store, domain_id: uuid.UUID) -> Response:
    """Give up a claim."""
    await domains.remove(store, visit.tenant_id, domain_id)
    return Response(status_code=204)
