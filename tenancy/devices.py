"""Devices: which key is which device's, when each was seen, and what they tell of.

A device is known by its key. Whatever process of it connects first makes its row; one that was paired has it already.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import CursorResult, func, or_, select, text
from sqlalchemy import delete as erase
from sqlalchemy import update as change
from sqlalchemy.ext.asyncio import AsyncSession

from agentvoicebox.config.errors import BadInput, Conflict, NotFound, Refused
from agentvoicebox.tenancy import audit, keys, pages, tenants
from agentvoicebox.tenancy.checks import chosen, identifier, moment, number, real, words
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.models import (
    Action,
    ApiKey,
    Device,
    DeviceEventKind,
    DeviceEventRow,
    Outcome,
    Project,
)
from agentvoicebox.tenancy.pages import Page

MOST = 10_000
"""Devices of one tenant; its limit of keys is reached long before, unless it revokes them and keeps the devices."""
MOST_EVENTS = 1_000
"""Events that are recorded at once."""
MOST_OF_A_DAY = 20_000
"""Events of one device that are kept of one day, in UTC; a report that goes beyond is recorded, and then no more."""
KEPT_DAYS = 90
"""Days for which an event is kept."""
LONGEST_NAME = 100
LONGEST_VERSION = 50

_LONGEST_AUDIO = 86_400.0
"""Seconds of one event."""
_PRUNED = 10_000

_SEEN = text("now() - interval '1 minute'")
"""Since when a device counts as seen just now."""

# Sorted, so that two who record the same events never wait for each other. A device's clock may be wrong by a year;
# what it kept while it was offline is younger than a month, or as good as that.
_RECORD = text("""
WITH told AS (
    SELECT *, least(greatest(told_at, now() - interval '30 days'), now()) AS at
    FROM jsonb_to_recordset(CAST(:events AS jsonb)) AS event (
        id uuid, told_at timestamptz, kind text, phrase text, wake_word_id uuid, outcome text,
        confidence double precision, engine text, seconds double precision, reason text)
), days AS (
    SELECT day FROM (SELECT DISTINCT date_trunc('day', at, 'UTC') AS day FROM told) AS each
    WHERE (SELECT count(*) FROM device_events AS known WHERE known.tenant_id = :tenant AND known.device_id = :device
        AND known.at >= day AND known.at < day + interval '1 day') < :most
)
INSERT INTO device_events
    (tenant_id, device_id, id, at, kind, phrase, wake_word_id, outcome, confidence, engine, seconds, reason)
SELECT :tenant, :device, id, at, kind, phrase, wake_word_id, outcome, confidence, engine, seconds, reason
FROM told WHERE date_trunc('day', at, 'UTC') IN (SELECT day FROM days)
ORDER BY id
ON CONFLICT (tenant_id, id) DO NOTHING
""")

# By their places: whatever else the planner could think of reads the whole table for each few. Nobody moves a row.
_PRUNE = text("""
DELETE FROM device_events WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM device_events WHERE at < now() - make_interval(days => :days) LIMIT :most
))
""")

# The keys that one replaced, and those that it was replaced by, one after the other.
_RELATIVES = text("""
WITH RECURSIVE earlier (id, n) AS (
    SELECT k.rotated_from, 1 FROM api_keys k WHERE k.tenant_id = :tenant AND k.id = :key
    UNION ALL
    SELECT k.rotated_from, n + 1 FROM api_keys k JOIN earlier ON k.id = earlier.id
    WHERE k.tenant_id = :tenant AND n < 1000
), later (id, n) AS (
    SELECT k.replaced_by, 1 FROM api_keys k WHERE k.tenant_id = :tenant AND k.id = :key
    UNION ALL
    SELECT k.replaced_by, n + 1 FROM api_keys k JOIN later ON k.id = later.id
    WHERE k.tenant_id = :tenant AND n < 1000
)
SELECT id, false AS is_later FROM earlier WHERE id IS NOT NULL
UNION SELECT id, true FROM later WHERE id IS NOT NULL
""")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeviceEvent:
    """One thing that a device tells of; a value that makes no sense raises `BadInput` naming its field."""

    id: uuid.UUID
    """The device's own number of it: recorded twice, it counts once."""
    kind: str
    """`wake`, or which of the platform's engines its own stood in for: `stt`, `tts`, `persona`."""
    at: datetime
    """By the device's clock; recorded as between 30 days ago and now."""
    phrase: str = ""
    wake_word_id: uuid.UUID | None = None
    """Of a wake word there is or was."""
    outcome: str = ""
    """Of a wake word: `detected`, `false_positive` (then nobody said anything), `missed`. One wake-up is one event."""
    confidence: float | None = None
    """0 to 1."""
    engine: str = ""
    seconds: float = 0.0
    """Of audio."""
    reason: str = ""
    """Why the platform was not asked, as `platform_away`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", identifier(self.id, "id"))
        object.__setattr__(self, "kind", chosen(self.kind, "kind", DeviceEventKind))
        moment(self.at, "at")
        if self.wake_word_id is not None:
            object.__setattr__(self, "wake_word_id", identifier(self.wake_word_id, "wake_word_id"))
        if self.kind == DeviceEventKind.WAKE:
            object.__setattr__(self, "outcome", chosen(self.outcome, "outcome", Outcome))
        elif self.outcome != "":
            raise BadInput("outcome is of wake words only; leave it empty.", param="outcome")
        words(self.phrase, "phrase", 0, 64)
        words(self.engine, "engine", 0, 100)
        words(self.reason, "reason", 0, 100)
        if self.confidence is not None:
            real(self.confidence, "confidence", 0, 1)
        real(self.seconds, "seconds", 0, _LONGEST_AUDIO)

    def _columns(self) -> dict[str, Any]:
        return {
            "id": str(self.id),
            "told_at": self.at.isoformat(),
            "kind": str(self.kind),
            "phrase": self.phrase,
            "wake_word_id": None if self.wake_word_id is None else str(self.wake_word_id),
            "outcome": str(self.outcome),
            "confidence": self.confidence,
            "engine": self.engine,
            "seconds": self.seconds,
            "reason": self.reason,
        }


async def arrive(
    database: Database,
    tenant_id: uuid.UUID,
    key_id: uuid.UUID,
    project_id: uuid.UUID | None,
    name: str = "",
    version: str = "",
) -> Device:
    """The device of this key, which has just connected; made now if it was not known.

    `name` is what it calls itself, and only a new device is called so: an existing one keeps the name that people gave
    it. `project_id` is its key's, and becomes the device's. A key that replaced another has that one's device. Several
    processes of one device may arrive at once; `last_seen_at` is written once a minute. Raises `BadInput`, `NotFound`
    for an unknown key, `Refused` for a new device with a revoked one, `Conflict` (`too_many_devices`).
    """
    words(name, "name", 0, LONGEST_NAME)
    words(version, "version", 0, LONGEST_VERSION)
    async with database.tenant(tenant_id) as session:
        found = await _of_key(session, key_id)
        if found is not None and found.project_id == project_id and found.version == version and found.is_fresh:
            return _known(found.Device)
        if found is None or found.project_id != project_id:
            project_id = await _held(session, project_id)  # before the device: see keys.hold_project
        device_id = found.id if found is not None else await _introduce(session, tenant_id, key_id, project_id, name)
        return await _note(session, device_id, project_id, version)


async def make(
    session: AsyncSession, tenant_id: uuid.UUID, key_id: uuid.UUID, project_id: uuid.UUID | None, name: str
) -> Device:
    """A new device of this key, in a transaction of the caller's, who holds the tenant (`tenants.lock`).

    Raises `Conflict` (`too_many_devices`).
    """
    count = select(func.count()).select_from(Device).where(Device.tenant_id == tenant_id)
    if (await session.scalar(count) or 0) >= MOST:
        raise Conflict(f"A tenant has at most {MOST} devices; remove one first.", code="too_many_devices")
    device = Device(tenant_id=tenant_id, id=uuid.uuid4(), name=name, project_id=project_id, api_key_id=key_id)
    session.add(device)
    await session.flush()
    await session.refresh(device)
    told = {"name": name, "project_id": project_id, "api_key_id": key_id}
    await audit.append(
        session, Action.CREATE, "device", device.id, f"Added the device {name}", tenant_id=tenant_id, new=told
    )
    _log.info("device_added tenant_id=%s device_id=%s key_id=%s", tenant_id, device.id, key_id)
    return device


async def get(database: Database, tenant_id: uuid.UUID, device_id: uuid.UUID) -> Device:
    """One device. Raises `NotFound`."""
    async with database.tenant(tenant_id) as session:
        return _known(await session.get(Device, (tenant_id, device_id)))


async def list_(
    database: Database,
    tenant_id: uuid.UUID,
    page: int = 1,
    page_size: int = 20,
    *,
    project_id: uuid.UUID | None = None,
) -> Page[Device]:
    """The tenant's devices, or those of one project, by name. Raises `BadInput`."""
    query = select(Device).order_by(func.lower(Device.name), Device.id)
    if project_id is not None:
        query = query.where(Device.project_id == project_id)
    async with database.tenant(tenant_id) as session:
        return await pages.turn_to(session, query, page, page_size)


async def rename(database: Database, tenant_id: uuid.UUID, device_id: uuid.UUID, name: str) -> Device:
    """Call it by another name. Raises `BadInput`, `NotFound`."""
    words(name, "name", 1, LONGEST_NAME)
    async with database.tenant(tenant_id) as session:
        query = select(Device).where(Device.id == device_id).with_for_update(key_share=True)
        device = _known((await session.execute(query)).scalar_one_or_none())
        if device.name != name:
            old, device.name = device.name, name
            await session.flush()
            await session.refresh(device)
            told = f"Renamed the device {old} to {name}"
            await audit.append(session, Action.UPDATE, "device", device_id, told, old={"name": old}, new={"name": name})
    return device


async def remove(
    database: Database, tenant_id: uuid.UUID, device_id: uuid.UUID, revoked_by: uuid.UUID | None = None
) -> None:
    """Forget a device and revoke its key, with those that it replaced or was replaced by, all or none.

    Its connections end within a second. What it told of stays until it is 90 days old, so that wake words are judged by
    all that happened. Raises `NotFound`.
    """
    async with database.tenant(tenant_id) as session:
        await tenants.lock(session, tenant_id)  # nobody lets it have another key meanwhile
        key_id = _known(await session.get(Device, (tenant_id, device_id))).api_key_id
        for each in (key_id, *await _relatives(session, tenant_id, key_id)):
            await keys.hold_project(session, each)
        # Read again, for update: its name may have changed.
        query = select(Device).where(Device.id == device_id).with_for_update().execution_options(populate_existing=True)
        device = (await session.execute(query)).scalar_one()
        ended: set[uuid.UUID] = set()
        # Whoever replaces one of them was before us, and then the new one is seen now, or finds it revoked.
        while left := {key_id, *await _relatives(session, tenant_id, key_id)} - ended:
            for each in sorted(left):
                await keys.end(session, tenant_id, each, revoked_by)
            ended |= left
        await session.execute(erase(Device).where(Device.id == device_id))
        told = f"Removed the device {device.name}"
        await audit.append(
            session, Action.DELETE, "device", device_id, told, old={"name": device.name, "api_key_id": key_id}
        )
    _log.info("device_removed tenant_id=%s device_id=%s", tenant_id, device_id)


async def record(database: Database, tenant_id: uuid.UUID, device_id: uuid.UUID, events: Sequence[DeviceEvent]) -> int:
    """Write down what a device tells of, at most 1000 events, all or none; returns how many were new.

    Of a day of which it has told some 20,000 already nothing more is kept: no device wakes that often.
    Raises `BadInput` for more, `NotFound`.
    """
    if len(events) > MOST_EVENTS:
        raise BadInput(f"At most {MOST_EVENTS} events are recorded at once.", param="events")
    if not events:
        return 0
    told = json.dumps([event._columns() for event in events])
    async with database.tenant(tenant_id) as session:
        _known(await session.get(Device, (tenant_id, device_id)))
        given = {"tenant": tenant_id, "device": device_id, "events": told, "most": MOST_OF_A_DAY}
        return _count(await session.execute(_RECORD, given))


async def events(
    database: Database,
    tenant_id: uuid.UUID,
    device_id: uuid.UUID,
    page: int = 1,
    page_size: int = 20,
    *,
    kind: str | None = None,
) -> Page[DeviceEventRow]:
    """What a device has told of, or of one kind, the latest first. Raises `BadInput`, `NotFound`."""
    query = select(DeviceEventRow).where(DeviceEventRow.device_id == device_id)
    if kind is not None:
        query = query.where(DeviceEventRow.kind == chosen(kind, "kind", DeviceEventKind))
    async with database.tenant(tenant_id) as session:
        _known(await session.get(Device, (tenant_id, device_id)))
        query = query.order_by(DeviceEventRow.at.desc(), DeviceEventRow.id)
        return await pages.turn_to(session, query, page, page_size)


async def prune(database: Database, days: int = KEPT_DAYS) -> int:
    """Remove the events of all tenants that are older, some thousands at a time; returns how many those were.

    Raises `BadInput` for less than a day.
    """
    number(days, "days", 1)
    gone = 0
    while True:
        async with database.system() as session:
            some = _count(await session.execute(_PRUNE, {"days": days, "most": _PRUNED}))
        gone += some
        if some < _PRUNED:
            return gone


async def _of_key(session: AsyncSession, key_id: uuid.UUID) -> Any:
    """The key's device as a row of it, its id, project and version, and whether it was seen within a minute."""
    fresh = func.coalesce(Device.last_seen_at > _SEEN, False).label("is_fresh")
    query = select(Device, Device.id, Device.project_id, Device.version, fresh).where(Device.api_key_id == key_id)
    return (await session.execute(query)).one_or_none()


async def _held(session: AsyncSession, project_id: uuid.UUID | None) -> uuid.UUID | None:
    """The project, which nobody deletes before the transaction ends; None when it is gone already."""
    if project_id is None:
        return None
    query = select(Project.id).where(Project.id == project_id).with_for_update(read=True, key_share=True)
    return (await session.execute(query)).scalar_one_or_none()


async def _introduce(
    session: AsyncSession, tenant_id: uuid.UUID, key_id: uuid.UUID, project_id: uuid.UUID | None, name: str
) -> uuid.UUID:
    """The id of the device of a key that has none, by a key that this one replaced or was replaced by, or a new one."""
    await tenants.lock(session, tenant_id)
    query = select(ApiKey).where(ApiKey.id == key_id).with_for_update(read=True)  # nobody revokes it meanwhile
    key = (await session.execute(query)).scalar_one_or_none()
    if key is None:
        raise NotFound("There is no such key.", param="key_id")
    if key.revoked_at is not None:
        raise Refused("This key has been revoked; pair the device again.", code="api_key_revoked")
    if (found := await _of_key(session, key_id)) is not None:
        return _known(found.Device).id  # another process of it was faster
    relatives = await _relatives(session, tenant_id, key_id)
    device = (await session.execute(select(Device).where(Device.api_key_id.in_(relatives)).limit(1))).scalar()
    if device is None:
        return (await make(session, tenant_id, key_id, project_id, name.strip() or key.name)).id
    if not relatives[device.api_key_id]:
        await session.execute(change(Device).where(Device.id == device.id).values(api_key_id=key_id))
    return device.id


async def _relatives(session: AsyncSession, tenant_id: uuid.UUID, key_id: uuid.UUID) -> dict[uuid.UUID, bool]:
    """The keys that replaced this one (true) and those that it replaced (false), near and far."""
    found = await session.execute(_RELATIVES, {"tenant": tenant_id, "key": key_id})
    return {id_: is_later for id_, is_later in found}


async def _note(session: AsyncSession, device_id: uuid.UUID, project_id: uuid.UUID | None, version: str) -> Device:
    """Write down that the device is here, unless somebody has done so within a minute."""
    news = or_(
        Device.last_seen_at.is_(None),
        Device.last_seen_at <= _SEEN,
        Device.version != version,
        Device.project_id.is_distinct_from(project_id),
    )
    told = {"last_seen_at": func.now(), "version": version, "project_id": project_id, "updated_at": Device.updated_at}
    await session.execute(change(Device).where(Device.id == device_id, news).values(**told))
    query = select(Device).where(Device.id == device_id).execution_options(populate_existing=True)
    return _known((await session.execute(query)).scalar_one_or_none())


def _count(result: Any) -> int:
    assert isinstance(result, CursorResult)
    return result.rowcount


def _known(device: Device | None) -> Device:
    if device is None:
        raise NotFound("There is no such device.", param="device_id")
    return device
