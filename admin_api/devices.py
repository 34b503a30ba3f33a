"""Devices of a tenant: how a new one gets its key without anybody typing it, what is known of each, and its end.

A device makes its key itself and sends the digest of it. Whoever reads the code from the device enters it here, and the
key is good from then on: its secret has never left the device.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import Response
from msgspec import Meta
from pydantic import Field

from agentvoicebox.admin_api import auth, schemas
from agentvoicebox.admin_api.auth import Visiting
from agentvoicebox.admin_api.keys import check_scopes
from agentvoicebox.admin_api.listings import Listing, Paged, View, listing
from agentvoicebox.admin_api.schemas import Body
from agentvoicebox.admin_api.stores import Store
from agentvoicebox.config.errors import Unavailable
from agentvoicebox.tenancy import devices, pairings
from agentvoicebox.tenancy.keys import Scope
from agentvoicebox.tenancy.limits import CLAIMS, LOOKS, PAIRINGS
from agentvoicebox.tenancy.models import DeviceEventKind
from agentvoicebox.tenancy.pairings import State

router = APIRouter(tags=["devices"])

_PAIRINGS = "/api/v2/pairings"
_PATH = "/api/v2/devices"
_ONE = _PATH + "/{device_id:uuid}"

INTERVAL = 5
"""Seconds after which a device asks again whether its code was entered."""

STRANGERS = 2
"""Devices without a key that are at the store at once: those with one are looked up over the same few connections."""
PATIENCE = 5.0
"""Seconds for which the others wait."""

Name = Annotated[str, Meta(min_length=1, max_length=100)]


class NewPairing(Body):
    """What a device tells that has no key yet."""

    key_digest: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    """SHA-256 of the key that it has made: `avb_` and 32 random bytes as URL-safe base64."""
    key_prefix: Annotated[str, Meta(pattern="^avb_[A-Za-z0-9_-]{8}$")]
    """The first 12 characters of it, by which people recognize it."""
    name: Name
    """What the device calls itself."""


class Claim(Body):
    """The code that a device shows or speaks, and what the device is to be."""

    code: Annotated[str, Meta(pattern="^[0-9 -]{8,20}$")]
    """8 digits, however they are grouped."""
    name: Annotated[str, Meta(max_length=100)] = ""
    """Empty for what it calls itself."""
    project_id: uuid.UUID | None = None
    """By default the tenant's first one."""


class DeviceChange(Body):
    """What is to be different about a device."""

    name: Name


class Pairing(View):
    """A device that waits for its code to be entered."""

    id: uuid.UUID
    """For the device alone: with it, it asks what has become of the code."""
    code: str
    expires_at: datetime
    interval: int
    """Seconds to wait between two such questions."""


class Standing(View):
    """What has become of a code; `tenant` is the name of whose the device is now."""

    state: State
    tenant: str


class Device(View):
    """A device, without its key."""

    id: uuid.UUID
    name: str
    version: str
    key_id: Annotated[uuid.UUID, Field(validation_alias="api_key_id")]
    project_id: uuid.UUID | None
    last_seen_at: datetime | None
    """A minute late at most; None for one that has not connected yet."""
    created_at: datetime
    updated_at: datetime


class Event(View):
    """What a device told: a wake word, or what it did by itself while the platform was out of reach."""

    id: uuid.UUID
    kind: DeviceEventKind
    at: datetime
    phrase: str
    wake_word_id: uuid.UUID | None
    outcome: str
    """Of a wake word `detected`, `false_positive` or `missed`; empty for the rest."""
    confidence: float | None
    engine: str
    seconds: float
    """Of audio."""
    reason: str
    """Why the platform was not asked."""


@router.post(
    _PAIRINGS,
    status_code=201,
    dependencies=auth.public("pairings", PAIRINGS),
    openapi_extra=schemas.document(NewPairing),
)
async def begin_pairing(request: Request, visit: Visiting, store: Store) -> Pairing:
    """Get a code for a device that has made its key; good for ten minutes, once."""
    wanted = await schemas.read(request, NewPairing)
    async with _turn(request):
        made = await pairings.begin(store, wanted.key_digest, wanted.name, visit.ip or "", key_prefix=wanted.key_prefix)
    return Pairing(id=made.id, code=made.code, expires_at=made.expires_at, interval=INTERVAL)


@router.get(_PAIRINGS + "/{pairing_id:uuid}", dependencies=auth.public("looks", LOOKS))
async def read_pairing(request: Request, store: Store, pairing_id: uuid.UUID) -> Standing:
    """What has become of a code, for the device that shows it."""
    async with _turn(request):
        found = await pairings.look(store, pairing_id)
    return Standing(state=found.state, tenant=found.tenant_name)


@router.post(
    _PATH, status_code=201, dependencies=auth.may("tenant.create_api_key"), openapi_extra=schemas.document(Claim)
)
async def claim_device(request: Request, visit: Visiting, store: Store) -> Device:
    """Make the device that shows this code one of the tenant's: its key may speak from now on, and nothing else."""
    wanted = await schemas.read(request, Claim)
    check_scopes(visit, (Scope.REALTIME,))
    # Before anybody looks whether it is right, and those that are count too: guessing in parallel gains nothing.
    visit.held(request.app.state.limiter.admit(("claims", visit.tenant_id), CLAIMS, visit.ip or ""))
    made = await pairings.claim(store, visit.tenant_id, wanted.code, name=wanted.name, project_id=wanted.project_id)
    return Device.model_validate(made)


@router.get(_PATH, dependencies=auth.may("api_key.view"))
async def list_devices(
    visit: Visiting, store: Store, paging: Paged, project_id: uuid.UUID | None = None
) -> Listing[Device]:
    """The tenant's devices, or those of one project, by name."""
    found = await devices.list_(store, visit.tenant_id, paging.page, paging.size, project_id=project_id)
    return listing(Device.model_validate, found)


@router.get(_ONE, dependencies=auth.may("api_key.view"))
async def read_device(visit: Visiting, store: Store, device_id: uuid.UUID) -> Device:
    """One device."""
    return Device.model_validate(await devices.get(store, visit.tenant_id, device_id))


@router.patch(_ONE, dependencies=auth.may("api_key.rotate"), openapi_extra=schemas.document(DeviceChange))
async def rename_device(request: Request, visit: Visiting, store: Store, device_id: uuid.UUID) -> Device:
    """Call a device something else."""
    wanted = await schemas.read(request, DeviceChange)
    return Device.model_validate(await devices.rename(store, visit.tenant_id, device_id, wanted.name))


@router.delete(_ONE, status_code=204, dependencies=auth.may("api_key.revoke"))
async def remove_device(visit: Visiting, store: Store, device_id: uuid.UUID) -> Response:
    """Remove a device: its key is revoked, everywhere within a second, and the device is cut off."""
    await devices.remove(store, visit.tenant_id, device_id)
    return Response(status_code=204)


@router.get(_ONE + "/events", dependencies=auth.may("api_key.view"))
async def list_device_events(
    visit: Visiting, store: Store, device_id: uuid.UUID, paging: Paged, kind: DeviceEventKind | None = None
) -> Listing[Event]:
    """What a device told in the last 90 days, the latest first; nothing of what was said to it."""
    found = await devices.events(store, visit.tenant_id, device_id, paging.page, paging.size, kind=kind)
    return listing(Event.model_validate, found)


@asynccontextmanager
async def _turn(request: Request) -> AsyncIterator[None]:
    """While a device without a key is served. Raises `Unavailable` (`busy`) where too many wait."""
    few: asyncio.Semaphore = request.app.state.strangers
    try:
        async with asyncio.timeout(PATIENCE):
            await few.acquire()
    except TimeoutError as error:
        raise Unavailable("Too many devices wait to be paired here: try again in some seconds.", code="busy") from error
    try:
        yield
    finally:
        few.release()
