"""Pairing: a device speaks a code, an administrator of a tenant types it in, and the device's key is the tenant's.

The key is the device's own making and never travels: the device sends its digest, and waits until somebody has typed in
the code that it was given. Codes are good once and for ten minutes.
"""

from __future__ import annotations

import logging
import re
import secrets
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from sqlalchemy import delete as erase
from sqlalchemy import func, select, text, true
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from agentvoicebox.config.errors import Conflict, NotFound, RateLimited, Unavailable
from agentvoicebox.tenancy import devices, keys, tenants
from agentvoicebox.tenancy.checks import shaped, words
from agentvoicebox.tenancy.database import Database, sqlstate
from agentvoicebox.tenancy.limits.limiter import network
from agentvoicebox.tenancy.models import ApiKey, Device, Tenant
from agentvoicebox.tenancy.models import Pairing as Row

LIFETIME = 600
"""Seconds for which a code is good; a device that was paired is told so for as long again."""
DIGITS = 8
MOST_OF_A_NETWORK = 5
MOST = 10_000
"""Devices that wait at the same time: of one address, and in all."""

_BEGINNING = 0x41564208
"""Our advisory lock: one beginning at a time, so that nobody is counted past the limits."""
_DRAWS = 20
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PREFIX = re.compile(re.escape(keys.PREFIX) + r"[A-Za-z0-9_-]{8}")
_CODE = re.compile(rf"[0-9]{{{DIGITS}}}")
_BETWEEN = str.maketrans("", "", " -")
_UNIQUE_VIOLATION = "23505"

_LIFETIME = text(f"interval '{LIFETIME} seconds'")

_log = logging.getLogger(__name__)


class State(StrEnum):
    """How far a pairing has come."""

    WAITING = "waiting"
    PAIRED = "paired"
    EXPIRED = "expired"
    """Too late, or never begun."""


@dataclass(frozen=True, slots=True)
class Pairing:
    """What a device waits with: it speaks `code`, and asks about `id`."""

    id: uuid.UUID
    code: str
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Standing:
    """What a waiting device is told, and no more."""

    state: State
    tenant_name: str = ""
    """Whose it is now."""


async def begin(database: Database, key_digest: str, name: str, ip: str, *, key_prefix: str) -> Pairing:
    """Let a device wait for its tenant. `key_digest` is the SHA-256 of its key, in hex; `key_prefix` its beginning.

    A device that waits already gets a new code for the old one. Raises `BadInput`, `Conflict` (`key_in_use`) for a key
    that is or was somebody's, `RateLimited` (`too_many_pairings`) when too many wait.
    """
    shaped(key_digest, "key_digest", _DIGEST, "the SHA-256 of the device's key, in 64 lower case hex digits")
    shaped(key_prefix, "key_prefix", _PREFIX, f"the first {keys.SHOWN} characters of the device's key")
    words(name, "name", 1, devices.LONGEST_NAME)
    place = network(ip)
    async with database.system() as session:
        await session.execute(select(func.pg_advisory_xact_lock(_BEGINNING)))
        await session.execute(erase(Row).where(Row.expires_at <= func.now()))
        await _check_unused(session, key_digest)
        await session.execute(erase(Row).where(Row.key_hash == key_digest, Row.claimed_by.is_(None)))
        await _check_room(session, place)
        row = Row(
            id=uuid.uuid4(),
            code=await _new_code(session),
            key_hash=key_digest,
            key_prefix=key_prefix,
            name=name,
            network=place,
            expires_at=func.now() + _LIFETIME,
        )
        session.add(row)
        await session.flush()
        await session.refresh(row)
        return Pairing(row.id, row.code, row.expires_at)


async def look(database: Database, pairing_id: uuid.UUID) -> Standing:
    """How far it has come; what nobody knows has expired."""
    query = (
        select(Row.claimed_by, Tenant.name)
        .outerjoin(Tenant, Tenant.id == Row.claimed_by)
        .where(Row.id == pairing_id, Row.expires_at > func.now())
    )
    async with database.system() as session:
        found = (await session.execute(query)).one_or_none()
    if found is None:
        return Standing(State.EXPIRED)
    return Standing(State.WAITING) if found.claimed_by is None else Standing(State.PAIRED, found.name)


async def claim(
    database: Database,
    tenant_id: uuid.UUID,
    code: str,
    *,
    name: str = "",
    project_id: uuid.UUID | None = None,
    created_by: uuid.UUID | None = None,
    granter: Collection[str] | None = None,
) -> Device:
    """Make the device that waits with this code the tenant's, and its key one of the tenant's with the scope realtime.

    Of several who claim it one gets it. `code` may be given with spaces or hyphens; an empty `name` is the device's
    own; `granter` as in `keys.issue`. Raises `BadInput`; `NotFound` (`pairing_not_found`) for a code that nobody waits
    with, whether it is unknown, expired or used; `Conflict` (`key_in_use`, `too_many_devices`); `Forbidden` for a
    granter without the scope, and when the tenant has its fill of keys.
    """
    wanted = shaped(code.translate(_BETWEEN) if isinstance(code, str) else code, "code", _CODE, f"{DIGITS} digits")
    words(name, "name", 0, devices.LONGEST_NAME)
    keys.check_granter((keys.Scope.REALTIME,), granter)
    async with database.system() as session:
        await tenants.lock(session, tenant_id)
        waiting = Row.code == wanted, Row.claimed_by.is_(None), Row.expires_at > func.now()
        row = (await session.execute(select(Row).where(*waiting).with_for_update())).scalar_one_or_none()
        if row is None:
            raise NotFound(
                "No device waits with this code: codes are good once, and for ten minutes. Let the device speak it "
                "again, or give a new one.",
                code="pairing_not_found",
                param="code",
            )
        called = name.strip() or row.name
        key = await _key(session, tenant_id, row, called, project_id, created_by)
        device = await devices.make(session, tenant_id, key.id, key.project_id, called)
        row.claimed_by, row.expires_at = tenant_id, func.now() + _LIFETIME
        row.name, row.network = "", ""  # nobody needs to know any more
    _log.info("device_paired tenant_id=%s device_id=%s key_id=%s", tenant_id, device.id, key.id)
    return device


async def prune(database: Database) -> int:
    """Remove what has expired, which otherwise the next that begins does; returns how many those were."""
    async with database.system() as session:
        gone = await session.execute(erase(Row).where(Row.expires_at <= func.now()).returning(Row.id))
        return len(gone.all())


async def _check_unused(session: AsyncSession, key_digest: str) -> None:
    query = select(ApiKey.id).where(ApiKey.key_hash == key_digest)
    if (await session.execute(query)).first() is not None:
        raise _in_use()


async def _check_room(session: AsyncSession, place: str) -> None:
    """Raise `RateLimited` when too many wait, of this place or in all."""
    waiting = Row.claimed_by.is_(None)
    left = func.extract("epoch", func.min(Row.expires_at) - func.now())
    for most, condition in ((MOST_OF_A_NETWORK, Row.network == place), (MOST, true())):
        count, seconds = (await session.execute(select(func.count(), left).where(waiting, condition))).one()
        if count >= most:
            raise RateLimited(
                "Too many devices wait to be paired; pair one of them, or try again later.",
                retry_after=max(1.0, float(seconds)),
                code="too_many_pairings",
            )


async def _new_code(session: AsyncSession) -> str:
    """One with which nobody waits."""
    for _ in range(_DRAWS):
        code = f"{secrets.randbelow(10**DIGITS):0{DIGITS}}"
        taken = select(Row.id).where(Row.code == code, Row.claimed_by.is_(None))
        if (await session.execute(taken)).first() is None:
            return code
    raise Unavailable("No code is free; try again.", code="service_unavailable")


async def _key(
    session: AsyncSession,
    tenant_id: uuid.UUID,
    row: Row,
    name: str,
    project_id: uuid.UUID | None,
    created_by: uuid.UUID | None,
) -> ApiKey:
    """The device's key, the tenant's from now on."""
    key = ApiKey(
        id=uuid.uuid4(),
        name=name,
        description="Of a paired device",
        key_prefix=row.key_prefix,
        key_hash=row.key_hash,
        scopes=[keys.Scope.REALTIME.value],
        created_by=created_by,
    )
    try:
        await keys.add(session, tenant_id, key, project_id)
    except IntegrityError as error:
        if sqlstate(error) != _UNIQUE_VIOLATION:
            raise
        raise _in_use() from error
    return key


def _in_use() -> Conflict:
    return Conflict(
        "This key is or was another device's; let the device make a new one, then pair it.", code="key_in_use"
    )
