"""What tenants set for skills: theirs alone, small, and never in the audit log."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import psycopg
import pytest
from sqlalchemy import select

from agentvoicebox.config.errors import BadInput, Conflict, NotFound, TooLarge
from agentvoicebox.tenancy import skills
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.models import AuditEntry, Tenant

SKILL = "skill-weather.somebody"


async def lines(database: Database, tenant: Tenant) -> list[AuditEntry]:
    async with database.tenant(tenant.id) as session:
        found = await session.execute(select(AuditEntry).order_by(AuditEntry.seq))
        return [line for line in found.scalars() if line.resource_type == "skill_settings"]


async def test_what_is_set_is_got_by_this_tenant_for_this_skill(
    database: Database, tenant: Tenant, other: Tenant
) -> None:
    chosen = {"city": "Zürich 🏔", "units": {"wind": ["m/s", None]}, "days": 3, "detail": False, "": 0.5}
    assert await skills.settings(database, tenant.id, SKILL) == {}
    assert await skills.set_settings(database, tenant.id, SKILL, chosen) == chosen
    assert await skills.settings(database, tenant.id, SKILL) == chosen
    assert await skills.settings(database, tenant.id, "skill-weather.another") == {}
    assert await skills.settings(database, other.id, SKILL) == {}
    await skills.set_settings(database, other.id, SKILL, {"city": "Bern"})
    assert (await skills.settings(database, tenant.id, SKILL))["city"] == "Zürich 🏔"


async def test_it_is_replaced_as_a_whole_and_an_empty_one_forgets_it(
    database: Database, tenant: Tenant, admin: psycopg.AsyncConnection
) -> None:
    await skills.set_settings(database, tenant.id, SKILL, {"city": "Bern", "days": 1})
    await skills.set_settings(database, tenant.id, SKILL, {"days": True})
    assert (await skills.settings(database, tenant.id, SKILL))["days"] is True
    assert await skills.settings(database, tenant.id, SKILL) == {"days": True}
    assert await skills.set_settings(database, tenant.id, SKILL, {}) == {}
    cursor = await admin.execute("SELECT count(*) FROM skill_settings WHERE tenant_id = %s", (tenant.id,))
    assert await cursor.fetchone() == (0,)


async def test_the_audit_log_tells_names_and_no_values(database: Database, tenant: Tenant) -> None:
    await skills.set_settings(database, tenant.id, SKILL, {"city": "a-value-1", "api_key": "a-value-2", "days": 1})
    await skills.set_settings(database, tenant.id, SKILL, {"city": "a-value-3", "api_key": "a-value-2", "days": True})
    await skills.set_settings(database, tenant.id, SKILL, {"days": True, "city": "a-value-3", "api_key": "a-value-2"})
    await skills.set_settings(database, tenant.id, SKILL, {f"field {number:03}": "a-value" for number in range(60)})
    first, second, third = await lines(database, tenant)
    assert (first.details["fields"], second.details["fields"]) == (["api_key", "city", "days"], ["city", "days"])
    assert (len(third.details["fields"]), third.details["fields"][-1]) == (51, "and 13 more")
    for line in (first, second, third):
        assert "a-value" not in str([line.description, line.old_values, line.new_values, line.details])


@pytest.mark.parametrize(
    "settings", [None, [], "text", {"x": float("nan")}, {"x": object()}, {1: "x"}, {"x": "\ud800"}]
)
async def test_what_is_no_object(database: Database, tenant: Tenant, settings: Any) -> None:
    with pytest.raises(BadInput) as caught:
        await skills.set_settings(database, tenant.id, SKILL, settings)
    assert caught.value.param == "settings"


async def test_what_cannot_be_stored(database: Database, tenant: Tenant) -> None:
    deep: dict[str, Any] = {}
    for _ in range(5_000):
        deep = {"x": deep}
    for settings in ({"x": "a\0b"}, {"a\0b": 1}, deep):
        with pytest.raises(BadInput):
            await skills.set_settings(database, tenant.id, SKILL, settings)
    assert await skills.settings(database, tenant.id, SKILL) == {}


async def test_sixteen_kilobytes_and_no_more(database: Database, tenant: Tenant) -> None:
    largest = {"x": "ä" * ((skills.MOST_BYTES - len('{"x": ""}')) // 2)}
    await skills.set_settings(database, tenant.id, SKILL, largest)
    with pytest.raises(TooLarge) as caught:
        await skills.set_settings(database, tenant.id, SKILL, {"x": largest["x"] + "ä"})
    assert caught.value.param == "settings"
    assert await skills.settings(database, tenant.id, SKILL) == largest


async def test_so_many_skills(
    database: Database, tenant: Tenant, other: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skills, "MOST", 3)
    found = await asyncio.gather(
        *(skills.set_settings(database, tenant.id, f"skill-{number}", {"x": 1}) for number in range(6)),
        return_exceptions=True,
    )
    assert sorted(type(each).__name__ for each in found) == ["Conflict"] * 3 + ["dict"] * 3
    (code,) = {each.code for each in found if isinstance(each, Conflict)}
    assert code == "too_many_skills"
    there = next(f"skill-{number}" for number, each in enumerate(found) if isinstance(each, dict))
    assert await skills.set_settings(database, tenant.id, there, {"x": 2})
    await skills.set_settings(database, tenant.id, there, {})
    assert await skills.set_settings(database, tenant.id, "skill-new", {"x": 1})
    assert await skills.set_settings(database, other.id, "skill-new", {"x": 1})


@pytest.mark.parametrize("skill", ["", "a b", "../x", "x" * 101, "a\0", None, 7])
async def test_what_is_no_skill(database: Database, tenant: Tenant, skill: Any) -> None:
    for attempt in (
        skills.settings(database, tenant.id, skill),
        skills.set_settings(database, tenant.id, skill, {"x": 1}),
    ):
        with pytest.raises(BadInput) as caught:
            await attempt
        assert caught.value.param == "skill_id"


async def test_of_a_tenant_that_there_is_not(database: Database) -> None:
    with pytest.raises(NotFound) as caught:
        await skills.set_settings(database, uuid.uuid4(), SKILL, {"x": 1})
    assert caught.value.code == "tenant_not_found"
