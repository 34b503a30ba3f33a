"""Who did what: a tenant's own log; the operator reads all of them."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from fastapi.responses import StreamingResponse

from agentvoicebox.admin_api import auth
from agentvoicebox.admin_api.auth import Visiting
from agentvoicebox.admin_api.listings import Listing, Paged, View, attachment, listing
from agentvoicebox.admin_api.stores import Store
from agentvoicebox.config.errors import Forbidden
from agentvoicebox.tenancy import audit
from agentvoicebox.tenancy.audit.reading import Filter
from agentvoicebox.tenancy.models import Action, ActorType, AuditEntry

router = APIRouter(prefix="/api/v2/audit", tags=["audit"])

_VIEW = auth.may_overall("tenant.view_audit")
_FILE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A file.",
        "content": {"text/csv": {"schema": {"type": "string"}}, "application/json": {"schema": {"type": "array"}}},
    }
}


class Entry(View):
    """One line of the log."""

    id: uuid.UUID
    tenant_id: uuid.UUID
    seq: int
    at: datetime
    actor_type: ActorType
    actor_id: uuid.UUID | None
    actor_email: str
    ip_address: str | None
    user_agent: str
    action: Action
    resource_type: str
    resource_id: str
    description: str
    request_id: str


class EntryDetail(Entry):
    """One line of the log with all that it holds; secrets are redacted."""

    old_values: dict[str, Any] | None
    new_values: dict[str, Any] | None
    details: dict[str, Any]
    hash: str


class Retention(View):
    """How long the log is kept at hand."""

    retention_days: int
    archive_status: str


async def _wanted(
    actor: Annotated[uuid.UUID | None, Query(description="The id of a key or user.")] = None,
    action: Action | None = None,
    resource_type: Annotated[str | None, Query(max_length=50)] = None,
    resource_id: Annotated[str | None, Query(max_length=255)] = None,
    since: Annotated[datetime | None, Query(alias="from", description="Then or later; with a time zone.")] = None,
    until: Annotated[datetime | None, Query(alias="to", description="Before then; with a time zone.")] = None,
    q: Annotated[str | None, Query(max_length=200, description="Beginnings of words to be found.")] = None,
) -> Filter:
    return Filter(
        actor_id=actor,
        action=action,
        resource_type=resource_type,
        resource_id=resource_id,
        since=since,
        until=until,
        q=q,
    )


async def _chain(visit: Visiting, tenant: uuid.UUID | None = None) -> uuid.UUID | None:
    """Whose log; None, which only the operator gets, is everybody's."""
    if tenant is not None and visit.tenant not in (None, tenant):
        raise Forbidden("This credential is of another tenant than the request names.", param="tenant")
    return visit.tenant or tenant


Filtered = Annotated[Filter, Depends(_wanted)]
Chain = Annotated[uuid.UUID | None, Depends(_chain)]


@router.get("", dependencies=_VIEW)
@router.get("/logs", dependencies=_VIEW)
async def list_entries(store: Store, chain: Chain, wanted: Filtered, paging: Paged) -> Listing[Entry]:
    """The log, the newest first."""
    found = await audit.search(
        store,
        chain,
        actor_id=wanted.actor_id,
        action=wanted.action,
        resource_type=wanted.resource_type,
        resource_id=wanted.resource_id,
        since=wanted.since,
        until=wanted.until,
        q=wanted.q,
        page=paging.page,
        page_size=paging.size,
    )
    return listing(_shown, found)


@router.get("/export", dependencies=_VIEW, response_class=StreamingResponse, responses=_FILE)
async def export_entries(
    store: Store, chain: Chain, wanted: Filtered, format: Literal["csv", "json"] = "csv"
) -> StreamingResponse:
    """The log as a file, in order; that it was exported is a line of it."""
    return await attachment("audit", format, audit.export(store, chain, wanted, format))


@router.get("/retention", dependencies=_VIEW)
async def read_retention(store: Store, chain: Chain) -> Retention:
    """How long the log is kept at hand, and whether older months are archived."""
    return Retention.model_validate(await audit.retention(store, tenant_id=chain))


@router.get("/{entry_id:uuid}", dependencies=_VIEW)
async def read_entry(store: Store, chain: Chain, entry_id: uuid.UUID) -> EntryDetail:
    """One line with all that it holds."""
    row = await audit.entry(store, chain, entry_id)
    return EntryDetail(
        **_shown(row).model_dump(),
        old_values=row.old_values,
        new_values=row.new_values,
        details=row.details,
        hash=row.hash.hex(),
    )


def _shown(row: AuditEntry) -> Entry:
    columns = {name: getattr(row, name) for name in Entry.model_fields}
    columns["ip_address"] = None if row.ip_address is None else str(row.ip_address)
    return Entry.model_validate(columns)
