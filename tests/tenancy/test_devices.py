"""Devices as records: whose key is whose, several processes at once, and what was told once and twice."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import psycopg
import pytest
from sqlalchemy import select

from agentvoicebox.config.errors import AvbError, BadInput, Conflict, Forbidden, NotFound, Refused
from agentvoicebox.tenancy import devices, erasure, keys, projects, tenants
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.devices import DeviceEvent
from agentvoicebox.tenancy.models import AuditEntry, Device, DeviceEventRow, Tenant

Blocked = Callable[[int], Awaitable[None]]


async def arrived(database: Database, tenant: Tenant, name: str = "kitchen", version: str = "1.2.0") -> Device:
    key = await keys.issue(database, tenant.id, f"the key of {name}")
    project = (await keys.get(database, tenant.id, key.id)).project_id
    return await devices.arrive(database, tenant.id, key.id, project, name, version)


async def again(database: Database, tenant: Tenant, device: Device, **more: Any) -> Device:
    told = {"name": "", "version": device.version, "project_id": device.project_id, **more}
    key_id = told.pop("key_id", device.api_key_id)
    return await devices.arrive(database, tenant.id, key_id, **told)


async def lines(database: Database, tenant: Tenant) -> list[AuditEntry]:
    async with database.tenant(tenant.id) as session:
        found = await session.execute(select(AuditEntry).order_by(AuditEntry.seq))
        return [line for line in found.scalars() if line.resource_type == "device"]


async def row_version(admin: psycopg.AsyncConnection, device: Device) -> object:
    """Changes with every write to the device's row."""
    return await (await admin.execute("SELECT xmin::text FROM devices WHERE id = %s", (device.id,))).fetchone()


def event(kind: str = "stt", **more: Any) -> DeviceEvent:
    given = {"id": uuid.uuid4(), "at": datetime.now(UTC), **more}
    return DeviceEvent(kind=kind, **given)


class TestArrive:
    """A device is known by its key."""

    async def test_a_key_that_nobody_knew_is_a_new_device(
        self, database: Database, tenant: Tenant, other: Tenant
    ) -> None:
        device = await arrived(database, tenant)
        assert (device.name, device.version, device.tenant_id) == ("kitchen", "1.2.0", tenant.id)
        assert device.last_seen_at is not None
        assert device.project_id == (await keys.get(database, tenant.id, device.api_key_id)).project_id
        assert (await again(database, tenant, device)).id == device.id
        assert (await devices.list_(database, tenant.id)).total == 1
        assert (await devices.list_(database, other.id)).total == 0

    async def test_one_without_a_name_is_called_as_its_key(self, database: Database, tenant: Tenant) -> None:
        key = await keys.issue(database, tenant.id, "Hall, upstairs")
        assert (await devices.arrive(database, tenant.id, key.id, None)).name == "Hall, upstairs"

    async def test_people_name_it_for_good(self, database: Database, tenant: Tenant) -> None:
        device = await arrived(database, tenant, "raspberrypi")
        await devices.rename(database, tenant.id, device.id, "kitchen")
        assert (await again(database, tenant, device, name="raspberrypi")).name == "kitchen"

    async def test_it_is_written_once_a_minute(
        self, database: Database, tenant: Tenant, admin: psycopg.AsyncConnection
    ) -> None:
        device = await arrived(database, tenant)
        before = await row_version(admin, device)
        await again(database, tenant, device)
        assert await row_version(admin, device) == before
        past = "UPDATE devices SET last_seen_at = now() - interval '61 seconds' WHERE id = %s RETURNING last_seen_at"
        (long_ago,) = await (await admin.execute(past, (device.id,))).fetchone() or (None,)
        seen = await again(database, tenant, device)
        assert seen.last_seen_at is not None
        assert seen.last_seen_at - long_ago > timedelta(seconds=60)
        assert seen.updated_at == device.updated_at  # nothing about it has changed

    async def test_news_are_written_at_once(self, database: Database, tenant: Tenant) -> None:
        device = await arrived(database, tenant)
        project = await projects.create(database, tenant.id, "upstairs")
        assert (await again(database, tenant, device, version="1.3.0")).version == "1.3.0"
        assert (await again(database, tenant, device, project_id=project.id)).project_id == project.id
        assert (await again(database, tenant, device, project_id=None)).project_id is None

    async def test_a_project_that_has_just_gone_keeps_nobody_out(self, database: Database, tenant: Tenant) -> None:
        device = await arrived(database, tenant)
        assert (await again(database, tenant, device, project_id=uuid.uuid4())).project_id is None
        key = await keys.issue(database, tenant.id, "a key")
        assert (await devices.arrive(database, tenant.id, key.id, uuid.uuid4())).project_id is None

    async def test_its_processes_arrive_at_once_and_are_one_device(self, database: Database, tenant: Tenant) -> None:
        key = await keys.issue(database, tenant.id, "a key")
        found = await asyncio.gather(*(devices.arrive(database, tenant.id, key.id, None, "pi", "1") for _ in range(8)))
        assert len({device.id for device in found}) == 1
        assert (await devices.list_(database, tenant.id)).total == 1
        assert [line.action for line in await lines(database, tenant)] == ["create"]

    async def test_whoever_replaced_its_key_replaced_no_device(self, database: Database, tenant: Tenant) -> None:
        """Until the grace is over, processes with the old key and the new one come and go."""
        device = await arrived(database, tenant)
        first = device.api_key_id
        second = (await keys.rotate(database, tenant.id, first)).id
        third = (await keys.rotate(database, tenant.id, second)).id
        for key_id, expected in ((third, third), (first, third), (second, third), (third, third)):
            found = await again(database, tenant, device, key_id=key_id)
            assert (found.id, found.api_key_id) == (device.id, expected)
        assert (await devices.list_(database, tenant.id)).total == 1

    async def test_a_key_of_another_tenant_or_of_nobody(
        self, database: Database, tenant: Tenant, other: Tenant
    ) -> None:
        device = await arrived(database, other)
        for key_id in (device.api_key_id, uuid.uuid4()):
            with pytest.raises(NotFound) as caught:
                await devices.arrive(database, tenant.id, key_id, None, "thief", "1")
            assert caught.value.param == "key_id"
        assert (await devices.list_(database, tenant.id)).total == 0

    async def test_a_key_that_is_revoked_meanwhile_makes_no_device(
        self, database: Database, tenant: Tenant, admin: psycopg.AsyncConnection, blocked: Blocked
    ) -> None:
        """A node may take it for good for a second more."""
        key = await keys.issue(database, tenant.id, "a key")
        async with admin.transaction():
            await admin.execute("SELECT 1 FROM tenants WHERE id = %s FOR UPDATE", (tenant.id,))
            arriving = asyncio.create_task(devices.arrive(database, tenant.id, key.id, None))
            await blocked(1)
            await admin.execute("UPDATE api_keys SET revoked_at = now() WHERE id = %s", (key.id,))
        with pytest.raises(Refused) as caught:
            await arriving
        assert caught.value.code == "api_key_revoked"

    async def test_there_is_an_end(self, database: Database, tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(devices, "MOST", 2)
        for name in ("one", "two"):
            device = await arrived(database, tenant, name)
        with pytest.raises(Conflict) as caught:
            await arrived(database, tenant, "three")
        assert caught.value.code == "too_many_devices"
        assert (await again(database, tenant, device)).id == device.id

    @pytest.mark.parametrize(
        ("given", "param"),
        [
            ({"name": "x" * 101}, "name"),
            ({"name": "two\nlines"}, "name"),
            ({"name": None}, "name"),
            ({"version": "1" * 51}, "version"),
            ({"version": "1\0"}, "version"),
            ({"version": 1}, "version"),
        ],
    )
    async def test_what_makes_no_sense(
        self, database: Database, tenant: Tenant, given: dict[str, Any], param: str
    ) -> None:
        with pytest.raises(BadInput) as caught:
            await devices.arrive(database, tenant.id, uuid.uuid4(), None, **given)
        assert caught.value.param == param


class TestRecords:
    """They are listed, renamed and removed."""

    async def test_they_are_listed_by_name(self, database: Database, tenant: Tenant, other: Tenant) -> None:
        await arrived(database, other, "theirs")
        for name in ("Kitchen", "bath", "Attic"):
            device = await arrived(database, tenant, name)
        page = await devices.list_(database, tenant.id, 1, 2)
        assert ([each.name for each in page.items], page.total) == (["Attic", "bath"], 3)
        assert device.project_id is not None
        own = await devices.list_(database, tenant.id, project_id=device.project_id)
        assert own.total == 3
        assert (await devices.list_(database, tenant.id, project_id=uuid.uuid4())).total == 0
        with pytest.raises(BadInput) as caught:
            await devices.list_(database, tenant.id, 0)
        assert caught.value.param == "page"

    async def test_a_new_name(self, database: Database, tenant: Tenant) -> None:
        device = await arrived(database, tenant, "raspberrypi")
        renamed = await devices.rename(database, tenant.id, device.id, "Küche 🍳")
        await devices.rename(database, tenant.id, device.id, "Küche 🍳")
        assert (await devices.get(database, tenant.id, device.id)).name == renamed.name == "Küche 🍳"
        assert renamed.updated_at > device.updated_at
        _, last = await lines(database, tenant)
        assert (last.action, last.old_values, last.new_values) == (
            "update",
            {"name": "raspberrypi"},
            {"name": "Küche 🍳"},
        )
        for name in ("", "  ", "x" * 101, "a\x00b"):
            with pytest.raises(BadInput) as caught:
                await devices.rename(database, tenant.id, device.id, name)
            assert caught.value.param == "name"

    async def test_another_tenants_is_nobodys(self, database: Database, tenant: Tenant, other: Tenant) -> None:
        device = await arrived(database, other)
        for attempt in (
            devices.get(database, tenant.id, device.id),
            devices.rename(database, tenant.id, device.id, "mine"),
            devices.remove(database, tenant.id, device.id),
            devices.record(database, tenant.id, device.id, [event()]),
            devices.events(database, tenant.id, device.id),
        ):
            with pytest.raises(NotFound) as caught:
                await attempt
            assert caught.value.param == "device_id"
        assert (await devices.get(database, other.id, device.id)).name == "kitchen"
        assert (await keys.get(database, other.id, device.api_key_id)).revoked_at is None

    async def test_removing_it_ends_its_key(self, database: Database, tenant: Tenant, other: Tenant) -> None:
        somebody = uuid.uuid4()
        device, theirs = await arrived(database, tenant), await arrived(database, other)
        await devices.remove(database, tenant.id, device.id, revoked_by=somebody)
        key = await keys.get(database, tenant.id, device.api_key_id)
        assert key.revoked_at is not None
        assert key.revoked_by == somebody
        with pytest.raises(NotFound):
            await devices.get(database, tenant.id, device.id)
        with pytest.raises(NotFound):
            await devices.remove(database, tenant.id, device.id)
        assert (await devices.get(database, other.id, theirs.id)).id == theirs.id
        assert (await keys.get(database, other.id, theirs.api_key_id)).revoked_at is None
        last = (await lines(database, tenant))[-1]
        assert (last.action, last.description) == ("delete", "Removed the device kitchen")

    async def test_removing_it_ends_the_keys_that_its_own_replaced_or_was_replaced_by(
        self, database: Database, tenant: Tenant
    ) -> None:
        """Else what has one of them would be back a moment later, as a new device."""
        device = await arrived(database, tenant)
        first = device.api_key_id
        second = (await keys.rotate(database, tenant.id, first)).id
        await again(database, tenant, device, key_id=second)
        third = (await keys.rotate(database, tenant.id, second)).id
        await devices.remove(database, tenant.id, device.id)
        for key_id in (first, second, third):
            assert (await keys.get(database, tenant.id, key_id)).revoked_at is not None
            with pytest.raises(Refused):
                await again(database, tenant, device, key_id=key_id)
        assert (await devices.list_(database, tenant.id)).total == 0

    async def test_a_key_that_is_replaced_while_its_device_is_removed(
        self, database: Database, tenant: Tenant, admin: psycopg.AsyncConnection, blocked: Blocked
    ) -> None:
        device = await arrived(database, tenant)
        async with admin.transaction():
            await admin.execute("SELECT 1 FROM api_keys WHERE id = %s FOR UPDATE", (device.api_key_id,))
            rotating = asyncio.create_task(keys.rotate(database, tenant.id, device.api_key_id))
            await blocked(1)  # first in the queue for the key
            removing = asyncio.create_task(devices.remove(database, tenant.id, device.id))
            await blocked(2)
        new = await rotating
        await removing
        assert (await keys.get(database, tenant.id, new.id)).revoked_at is not None

    async def test_one_whose_key_is_revoked_already_can_be_removed(self, database: Database, tenant: Tenant) -> None:
        device = await arrived(database, tenant)
        await keys.revoke(database, tenant.id, device.api_key_id)
        await devices.remove(database, tenant.id, device.id)
        assert (await devices.list_(database, tenant.id)).total == 0

    async def test_a_removal_that_fails_revokes_nothing(
        self, database: Database, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        device = await arrived(database, tenant)

        async def fail(*_: object, **__: object) -> None:
            raise Forbidden("no")

        with monkeypatch.context() as patch:
            patch.setattr(devices.audit, "append", fail)
            with pytest.raises(Forbidden):
                await devices.remove(database, tenant.id, device.id)
        assert (await keys.get(database, tenant.id, device.api_key_id)).revoked_at is None
        assert (await devices.get(database, tenant.id, device.id)).id == device.id

    async def test_who_arrives_while_it_is_removed_does_not_bring_it_back(
        self, database: Database, tenant: Tenant
    ) -> None:
        for _ in range(5):
            device = await arrived(database, tenant)
            arrivals = [again(database, tenant, device, version=str(number)) for number in range(6)]
            found = await asyncio.gather(
                *arrivals[:3], devices.remove(database, tenant.id, device.id), *arrivals[3:], return_exceptions=True
            )
            assert {type(each) for each in found} <= {Device, type(None), Refused, NotFound}
            assert (await devices.list_(database, tenant.id)).total == 0
            assert (await keys.get(database, tenant.id, device.api_key_id)).revoked_at is not None

    async def test_a_project_that_goes_leaves_its_devices(self, database: Database, tenant: Tenant) -> None:
        project = await projects.create(database, tenant.id, "short")
        key = await keys.issue(database, tenant.id, "a key", project_id=project.id)
        device = await devices.arrive(database, tenant.id, key.id, project.id)
        assert device.project_id == project.id
        await projects.delete(database, tenant.id, project.id)
        assert (await devices.get(database, tenant.id, device.id)).project_id is None

    async def test_projects_that_go_while_their_devices_arrive(self, database: Database, tenant: Tenant) -> None:
        """Nobody waits for each other for ever: both take the project first."""
        for _ in range(5):
            project = await projects.create(database, tenant.id, "short")
            key = await keys.issue(database, tenant.id, "a key", project_id=project.id)
            device = await arrived(database, tenant)
            found = await asyncio.gather(
                devices.arrive(database, tenant.id, key.id, project.id),
                again(database, tenant, device, project_id=project.id),
                projects.delete(database, tenant.id, project.id),
                devices.arrive(database, tenant.id, key.id, project.id),
                return_exceptions=True,
            )
            assert [each for each in found if isinstance(each, BaseException)] == []
            for each in (await devices.list_(database, tenant.id, page_size=100)).items:
                assert each.project_id != project.id


class TestEvents:
    """What devices tell of."""

    async def test_it_is_told_back(self, database: Database, tenant: Tenant) -> None:
        device, word = await arrived(database, tenant), uuid.uuid4()
        now = datetime.now(UTC)
        told = [
            event(
                "wake",
                at=now,
                phrase="okay nabu",
                wake_word_id=word,
                outcome="detected",
                confidence=0.875,
                engine="micro",
            ),
            event("stt", at=now - timedelta(hours=1), engine="sphinx", seconds=2.5, reason="platform_away"),
        ]
        assert await devices.record(database, tenant.id, device.id, told) == 2
        page = await devices.events(database, tenant.id, device.id)
        first, second = page.items
        assert (page.total, first.id, second.id) == (2, told[0].id, told[1].id)
        assert (first.phrase, first.wake_word_id, first.outcome, first.confidence) == (
            "okay nabu",
            word,
            "detected",
            0.875,
        )
        assert (first.kind, first.engine, first.at) == ("wake", "micro", now)
        assert (second.kind, second.engine, second.seconds, second.reason) == ("stt", "sphinx", 2.5, "platform_away")
        assert (second.outcome, second.confidence, second.wake_word_id) == ("", None, None)
        assert (await devices.events(database, tenant.id, device.id, kind="wake")).total == 1
        with pytest.raises(BadInput) as caught:
            await devices.events(database, tenant.id, device.id, kind="nap")
        assert caught.value.param == "kind"

    async def test_told_again_it_counts_once(self, database: Database, tenant: Tenant, other: Tenant) -> None:
        device, theirs = await arrived(database, tenant), await arrived(database, other)
        told = [event(), event("tts"), event("persona")]
        assert await devices.record(database, tenant.id, device.id, told[:2]) == 2
        assert await devices.record(database, tenant.id, device.id, [*told, told[2]]) == 1
        assert await devices.record(database, tenant.id, device.id, told) == 0
        assert await devices.record(database, tenant.id, device.id, []) == 0
        assert await devices.record(database, other.id, theirs.id, told) == 3  # numbers are the tenant's own

    async def test_a_card_that_was_copied_tells_nothing_twice(self, database: Database, tenant: Tenant) -> None:
        """Two devices, and both have what the first kept while it was offline."""
        told = [event()]
        for name, new in (("one", 1), ("two", 0)):
            device = await arrived(database, tenant, name)
            assert await devices.record(database, tenant.id, device.id, told) == new

    async def test_the_same_from_two_processes_at_once(self, database: Database, tenant: Tenant) -> None:
        """In different orders, in which they would wait for each other's rows."""
        device, chance = await arrived(database, tenant), random.Random(7)
        for _ in range(5):
            told = [event() for _ in range(300)]
            orders = [chance.sample(told, len(told)) for _ in range(4)]
            new = await asyncio.gather(*(devices.record(database, tenant.id, device.id, order) for order in orders))
            assert sum(new) == 300

    @pytest.mark.parametrize(
        ("clock", "within"),
        [
            (datetime(1970, 1, 1, tzinfo=UTC), "month"),
            (datetime(1, 1, 1, tzinfo=UTC), "month"),
            (datetime.now(UTC) - timedelta(days=365), "month"),
            (datetime.now(UTC) + timedelta(days=365), "now"),
            (datetime(9999, 12, 31, 23, tzinfo=timezone(timedelta(hours=-11))), "now"),
        ],
    )
    async def test_a_clock_that_is_wrong(
        self, database: Database, tenant: Tenant, clock: datetime, within: str
    ) -> None:
        device = await arrived(database, tenant)
        await devices.record(database, tenant.id, device.id, [event(at=clock)])
        (row,) = (await devices.events(database, tenant.id, device.id)).items
        expected = row.received_at - (timedelta(days=30) if within == "month" else timedelta())
        assert row.at == expected

    async def test_not_too_many_at_once(
        self, database: Database, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(devices, "MOST_EVENTS", 3)
        device = await arrived(database, tenant)
        with pytest.raises(BadInput) as caught:
            await devices.record(database, tenant.id, device.id, [event() for _ in range(4)])
        assert caught.value.param == "events"
        assert await devices.record(database, tenant.id, device.id, [event() for _ in range(3)]) == 3

    async def test_not_too_many_of_a_day(
        self, database: Database, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(devices, "MOST_OF_A_DAY", 3)
        device, other = await arrived(database, tenant), await arrived(database, tenant)
        today, earlier = datetime.now(UTC), datetime.now(UTC) - timedelta(days=3)
        assert await devices.record(database, tenant.id, device.id, [event(at=today) for _ in range(3)]) == 3
        more = [event(at=today), event(at=earlier)]
        assert await devices.record(database, tenant.id, device.id, more) == 1
        assert await devices.record(database, tenant.id, other.id, [event(at=today)]) == 1
        found = (await devices.events(database, tenant.id, device.id)).items
        assert more[1].id in {row.id for row in found}
        assert len(found) == 4

    async def test_they_outlive_their_device(
        self, database: Database, tenant: Tenant, admin: psycopg.AsyncConnection
    ) -> None:
        device = await arrived(database, tenant)
        await devices.record(database, tenant.id, device.id, [event("wake", outcome="missed")])
        await devices.remove(database, tenant.id, device.id)
        cursor = await admin.execute("SELECT outcome FROM device_events WHERE device_id = %s", (device.id,))
        assert await cursor.fetchall() == [("missed",)]
        with pytest.raises(NotFound):
            await devices.record(database, tenant.id, device.id, [event()])

    async def test_old_ones_go_some_at_a_time(
        self,
        database: Database,
        tenant: Tenant,
        other: Tenant,
        admin: psycopg.AsyncConnection,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(devices, "_PRUNED", 2)
        await devices.prune(database)
        young = {}
        for owner in (tenant, other):
            device = await arrived(database, owner)
            told = [event() for _ in range(4)]
            await devices.record(database, owner.id, device.id, told)
            young[owner.id] = told[3].id
            for each, days in zip(told, (91, 100, 1000, 89), strict=True):
                old = "UPDATE device_events SET at = now() - make_interval(days => %s) WHERE id = %s"
                await admin.execute(old, (days, each.id))
        assert await devices.prune(database) == 6
        assert await devices.prune(database) == 0
        for owner in (tenant, other):
            async with database.tenant(owner.id) as session:
                found = (await session.execute(select(DeviceEventRow.id))).scalars().all()
            assert found == [young[owner.id]]

    @pytest.mark.parametrize(
        ("given", "param"),
        [
            ({"id": "seven"}, "id"),
            ({"id": None}, "id"),
            ({"kind": "nap"}, "kind"),
            ({"at": datetime(2026, 1, 1)}, "at"),
            ({"at": 1_700_000_000.0}, "at"),
            ({"kind": "wake"}, "outcome"),
            ({"kind": "wake", "outcome": "snored"}, "outcome"),
            ({"outcome": "detected"}, "outcome"),
            ({"phrase": "x" * 65}, "phrase"),
            ({"phrase": "a\0b"}, "phrase"),
            ({"phrase": "\ud800"}, "phrase"),
            ({"wake_word_id": "7"}, "wake_word_id"),
            ({"confidence": 1.5}, "confidence"),
            ({"confidence": float("nan")}, "confidence"),
            ({"confidence": True}, "confidence"),
            ({"confidence": "0.5"}, "confidence"),
            ({"engine": "x" * 101}, "engine"),
            ({"seconds": -1}, "seconds"),
            ({"seconds": float("inf")}, "seconds"),
            ({"seconds": 86_401}, "seconds"),
            ({"seconds": 10**400}, "seconds"),
            ({"reason": ["away"]}, "reason"),
        ],
    )
    def test_what_makes_no_sense(self, given: dict[str, Any], param: str) -> None:
        with pytest.raises(BadInput) as caught:
            event(**{"kind": "stt", **given})
        assert caught.value.param == param


async def test_of_a_tenant_that_is_being_erased(database: Database, tenant: Tenant) -> None:
    key = await keys.issue(database, tenant.id, "a key")
    await tenants.delete(database, tenant.id)
    await erasure._begin(database, tenant.id)
    with pytest.raises(AvbError) as caught:
        await devices.arrive(database, tenant.id, key.id, None)
    assert caught.value.code == "tenant_erased"
