"""Wake words as records, and what devices' events say of them."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, date, datetime, time, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import select

from agentvoicebox.config.errors import BadInput, Conflict, NotFound
from agentvoicebox.tenancy import devices, keys, wake_words
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.devices import DeviceEvent
from agentvoicebox.tenancy.models import AuditEntry, Device, Tenant, WakeWord
from agentvoicebox.tenancy.wake_words import Day

TODAY = datetime.combine(datetime.now(UTC).date(), time(), UTC)


async def lines(database: Database, tenant: Tenant) -> list[AuditEntry]:
    async with database.tenant(tenant.id) as session:
        found = await session.execute(select(AuditEntry).order_by(AuditEntry.seq))
        return [line for line in found.scalars() if line.resource_type == "wake_word"]


async def device_of(database: Database, tenant: Tenant) -> Device:
    key = await keys.issue(database, tenant.id, "a device")
    return await devices.arrive(database, tenant.id, key.id, None)


def wake(outcome: str, at: datetime, word: WakeWord | None = None, confidence: float | None = None) -> DeviceEvent:
    return DeviceEvent(
        uuid.uuid4(), "wake", at, outcome=outcome, confidence=confidence, wake_word_id=None if word is None else word.id
    )


class TestRecords:
    """They come, change and go."""

    async def test_wak_01_create_list_change_disable_remove(
        self, database: Database, tenant: Tenant, other: Tenant
    ) -> None:
        await wake_words.create(database, other.id, "hey theirs")
        made = await wake_words.create(
            database, tenant.id, "  Okay\tNabu ", sensitivity=0.75, model_ref="micro/okay_nabu"
        )
        assert (made.phrase, made.sensitivity, made.enabled, made.model_ref) == (
            "okay nabu",
            0.75,
            True,
            "micro/okay_nabu",
        )
        second = await wake_words.create(database, tenant.id, "alexa")
        assert (second.sensitivity, second.model_ref) == (0.5, "")
        page = await wake_words.list_(database, tenant.id)
        assert ([each.phrase for each in page.items], page.total) == (["alexa", "okay nabu"], 2)
        assert [each.phrase for each in await wake_words.active(database, tenant.id)] == ["okay nabu", "alexa"]

        changed = await wake_words.update(database, tenant.id, made.id, {"enabled": False, "sensitivity": 1})
        assert (changed.enabled, changed.sensitivity, changed.phrase) == (False, 1.0, "okay nabu")
        assert [each.phrase for each in await wake_words.active(database, tenant.id)] == ["alexa"]
        kept = await wake_words.get(database, tenant.id, made.id)
        assert (kept.sensitivity, kept.model_ref) == (1.0, "micro/okay_nabu")

        await wake_words.remove(database, tenant.id, made.id)
        with pytest.raises(NotFound):
            await wake_words.get(database, tenant.id, made.id)
        assert [each.phrase for each in await wake_words.active(database, other.id)] == ["hey theirs"]

    async def test_the_audit_log_tells_what_changed(self, database: Database, tenant: Tenant) -> None:
        made = await wake_words.create(database, tenant.id, "alexa")
        await wake_words.update(database, tenant.id, made.id, {"sensitivity": 0.75})
        await wake_words.update(database, tenant.id, made.id, {"sensitivity": 0.75, "phrase": "Alexa"})
        await wake_words.remove(database, tenant.id, made.id)
        create, update, delete = await lines(database, tenant)
        assert (create.action, create.description) == ("create", "Made the wake word alexa")
        assert (update.old_values, update.new_values) == ({"sensitivity": 0.5}, {"sensitivity": 0.75})
        assert (delete.action, delete.old_values) == ("delete", {"phrase": "alexa"})

    async def test_a_phrase_is_there_once(self, database: Database, tenant: Tenant, other: Tenant) -> None:
        await wake_words.create(database, tenant.id, "hey jarvis", enabled=False)
        second = await wake_words.create(database, tenant.id, "alexa")
        for attempt in (
            wake_words.create(database, tenant.id, "Hey  JARVIS"),
            wake_words.update(database, tenant.id, second.id, {"phrase": "HEY jarvis"}),
        ):
            with pytest.raises(Conflict) as caught:
                await attempt
            assert (caught.value.code, caught.value.param) == ("wake_word_exists", "phrase")
        assert await wake_words.create(database, other.id, "hey jarvis")

    async def test_there_are_ten(self, database: Database, tenant: Tenant, other: Tenant) -> None:
        for number in range(10):
            await wake_words.create(database, tenant.id, f"hey number {number}", enabled=number % 2 == 0)
        with pytest.raises(Conflict) as caught:
            await wake_words.create(database, tenant.id, "one more")
        assert caught.value.code == "too_many_wake_words"
        assert await wake_words.create(database, other.id, "one more")

    async def test_at_once(self, database: Database, tenant: Tenant) -> None:
        same = (wake_words.create(database, tenant.id, "alexa") for _ in range(4))
        others = (wake_words.create(database, tenant.id, f"hey number {number}") for number in range(12))
        found = await asyncio.gather(*same, *others, return_exceptions=True)
        assert {type(each) for each in found} == {WakeWord, Conflict}
        page = await wake_words.list_(database, tenant.id)
        assert page.total == sum(isinstance(each, WakeWord) for each in found) == 10
        assert len({each.phrase for each in page.items}) == 10

    async def test_another_tenants_is_nobodys(self, database: Database, tenant: Tenant, other: Tenant) -> None:
        theirs = await wake_words.create(database, other.id, "alexa")
        for attempt in (
            wake_words.get(database, tenant.id, theirs.id),
            wake_words.update(database, tenant.id, theirs.id, {"enabled": False}),
            wake_words.remove(database, tenant.id, theirs.id),
            wake_words.analytics(database, tenant.id, theirs.id, TODAY - timedelta(days=1), TODAY),
        ):
            with pytest.raises(NotFound) as caught:
                await attempt
            assert caught.value.param == "wake_word_id"
        assert (await wake_words.get(database, other.id, theirs.id)).enabled

    async def test_of_a_tenant_that_there_is_not(self, database: Database) -> None:
        with pytest.raises(NotFound) as caught:
            await wake_words.create(database, uuid.uuid4(), "alexa")
        assert caught.value.code == "tenant_not_found"

    @pytest.mark.parametrize(
        ("changes", "param"),
        [
            ({"phrase": "x"}, "phrase"),
            ({"phrase": "x" * 65}, "phrase"),
            ({"phrase": "hey\0you"}, "phrase"),
            ({"phrase": 7}, "phrase"),
            ({"sensitivity": -0.01}, "sensitivity"),
            ({"sensitivity": 1.01}, "sensitivity"),
            ({"sensitivity": float("nan")}, "sensitivity"),
            ({"sensitivity": "0.5"}, "sensitivity"),
            ({"sensitivity": True}, "sensitivity"),
            ({"sensitivity": 10**400}, "sensitivity"),
            ({"enabled": 1}, "enabled"),
            ({"model_ref": "../../etc/passwd"}, "model_ref"),
            ({"model_ref": "x" * 101}, "model_ref"),
            ({"colour": "red"}, "colour"),
        ],
    )
    async def test_wak_02_what_makes_no_sense(
        self, database: Database, tenant: Tenant, changes: dict[str, Any], param: str
    ) -> None:
        made = await wake_words.create(database, tenant.id, "alexa")
        with pytest.raises(BadInput) as caught:
            await wake_words.update(database, tenant.id, made.id, changes)
        assert caught.value.param == param
        if param != "colour":
            with pytest.raises(BadInput) as caught:
                await wake_words.create(database, tenant.id, **{"phrase": "computer", **changes})
            assert caught.value.param == param
        assert (await wake_words.list_(database, tenant.id)).total == 1


class TestAnalytics:
    """WAK-05: how well they do."""

    async def test_wak_05_rates_by_word_and_in_all(self, database: Database, tenant: Tenant, other: Tenant) -> None:
        nabu, alexa = [await wake_words.create(database, tenant.id, phrase) for phrase in ("okay nabu", "alexa")]
        device, theirs = await device_of(database, tenant), await device_of(database, other)
        noon = TODAY - timedelta(days=2, hours=12)
        told = [
            wake("detected", noon, nabu, 0.75),
            wake("detected", noon, nabu, 0.25),
            wake("detected", noon, nabu),
            wake("false_positive", noon, nabu, 0.5),
            wake("missed", noon, nabu, 1.0),
            wake("detected", noon, alexa, 1.0),
            wake("false_positive", noon),
            DeviceEvent(uuid.uuid4(), "stt", noon, confidence=0.125),
        ]
        await devices.record(database, tenant.id, device.id, told)
        await devices.record(database, other.id, theirs.id, [wake("missed", noon, nabu), wake("missed", noon)])
        span = noon - timedelta(hours=1), noon + timedelta(hours=1)
        of_nabu = await wake_words.analytics(database, tenant.id, nabu.id, *span)
        assert (of_nabu.detections, of_nabu.false_positives, of_nabu.missed) == (4, 1, 1)
        assert (of_nabu.detection_rate, of_nabu.average_confidence) == (0.75, 0.5)
        assert of_nabu.days == [Day(noon.date(), 4, 1, 1)]
        of_all = await wake_words.analytics(database, tenant.id, None, *span)
        assert (of_all.detections, of_all.false_positives, of_all.missed) == (6, 2, 1)
        assert of_all.detection_rate == 4 / 5
        assert of_all.average_confidence == 0.625

    async def test_nothing_happened(self, database: Database, tenant: Tenant) -> None:
        word = await wake_words.create(database, tenant.id, "alexa")
        found = await wake_words.analytics(database, tenant.id, word.id, TODAY - timedelta(days=3), TODAY)
        assert (found.detections, found.detection_rate, found.average_confidence) == (0, None, None)
        assert [each.day for each in found.days] == [(TODAY - timedelta(days=number)).date() for number in (3, 2, 1)]

    async def test_only_false_alarms_are_no_rate(self, database: Database, tenant: Tenant) -> None:
        device = await device_of(database, tenant)
        await devices.record(database, tenant.id, device.id, [wake("false_positive", TODAY - timedelta(hours=1))])
        found = await wake_words.analytics(database, tenant.id, None, TODAY - timedelta(days=1), TODAY)
        assert (found.detections, found.false_positives, found.detection_rate) == (1, 1, None)

    async def test_days_are_of_utc_and_the_end_is_left_out(self, database: Database, tenant: Tenant) -> None:
        device = await device_of(database, tenant)
        begin, end = TODAY - timedelta(days=3), TODAY - timedelta(days=1)
        before, after = timedelta(microseconds=-1), timedelta(microseconds=1)
        moments = [begin + before, begin, begin + timedelta(days=1) + before, begin + timedelta(days=1), end + before]
        await devices.record(
            database, tenant.id, device.id, [wake("detected", at) for at in (*moments, end, end + after)]
        )
        vienna = timezone(timedelta(hours=2))
        for zone in (UTC, vienna):
            found = await wake_words.analytics(database, tenant.id, None, begin.astimezone(zone), end.astimezone(zone))
            assert found.days == [Day(begin.date(), 2), Day((begin + timedelta(days=1)).date(), 2)]
        half = await wake_words.analytics(database, tenant.id, None, begin + after, begin + timedelta(days=1) + after)
        assert [each.detections for each in half.days] == [1, 1]

    async def test_devices_and_words_that_are_gone_still_count(self, database: Database, tenant: Tenant) -> None:
        word = await wake_words.create(database, tenant.id, "alexa")
        kept = await wake_words.create(database, tenant.id, "computer")
        device = await device_of(database, tenant)
        at = TODAY - timedelta(hours=5)
        await devices.record(database, tenant.id, device.id, [wake("detected", at, word), wake("missed", at, kept)])
        await devices.remove(database, tenant.id, device.id)
        await wake_words.remove(database, tenant.id, word.id)
        span = at - timedelta(hours=1), at + timedelta(hours=1)
        assert (await wake_words.analytics(database, tenant.id, None, *span)).detection_rate == 0.5
        assert (await wake_words.analytics(database, tenant.id, kept.id, *span)).missed == 1
        with pytest.raises(NotFound):
            await wake_words.analytics(database, tenant.id, word.id, *span)

    @pytest.mark.parametrize(
        ("begin", "end", "param"),
        [
            (TODAY, TODAY, "end"),
            (TODAY, TODAY - timedelta(seconds=1), "end"),
            (TODAY - timedelta(days=367), TODAY, "begin"),
            (TODAY.replace(tzinfo=None), TODAY, "begin"),
            (TODAY - timedelta(days=1), date(2026, 1, 1), "end"),
            (datetime.min.replace(tzinfo=timezone(timedelta(hours=14))), TODAY, "begin"),
        ],
    )
    async def test_what_makes_no_sense(
        self, database: Database, tenant: Tenant, begin: Any, end: Any, param: str
    ) -> None:
        with pytest.raises(BadInput) as caught:
            await wake_words.analytics(database, tenant.id, None, begin, end)
        assert caught.value.param == param
