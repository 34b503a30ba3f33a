"""Personas as records: their checks, who is meant, what becomes of references, and what the audit log may know."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
import pytest
from sqlalchemy import select

from agentvoicebox.config.errors import BadInput, Conflict, NotFound
from agentvoicebox.tenancy import audit, erasure, personas, projects, sessions, tenants
from agentvoicebox.tenancy.audit import Actor, ActorType
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.models import AuditEntry, Persona, PersonaStatus, SessionStatus, Tenant
from agentvoicebox.tenancy.personas import Character

Blocked = Callable[[int], Awaitable[None]]

PROMPT = "Speak like a pirate.\n\tNever say why."


async def made(database: Database, tenant: Tenant, name: str = "Anna", **more: Any) -> Persona:
    return await personas.create(database, tenant.id, Character(name, **more))


async def lines(database: Database, tenant: Tenant) -> list[AuditEntry]:
    async with database.tenant(tenant.id) as session:
        found = await session.execute(select(AuditEntry).order_by(AuditEntry.seq))
        return [line for line in found.scalars() if line.resource_type in ("persona", "project")]


class TestRecords:
    """They come, change and go."""

    async def test_what_is_made_is_got(self, database: Database, tenant: Tenant) -> None:
        chosen: dict[str, Any] = {
            "description": "At the front desk.\nFriendly.",
            "system_prompt": PROMPT,
            "knowledge": "We open at nine. 👩‍🔧",
            "voice": "af_sarah",
            "speed": 1.25,
            "language": "de-AT",
            "solvers": ("ovos-solver-plugin-wikipedia", "llm"),
        }
        there = (await made(database, tenant, "Zoë O'Neill", **chosen)).id
        found = await personas.get(database, tenant.id, there)
        assert {name: getattr(found, name) for name in chosen} == {**chosen, "solvers": list(chosen["solvers"])}
        assert (found.name, found.status, found.is_default, found.usage_count) == ("Zoë O'Neill", "active", False, 0)
        assert found.owner_id is None

    async def test_whoever_makes_one_owns_it(self, database: Database, tenant: Tenant) -> None:
        somebody = uuid.uuid4()
        with audit.acting(Actor(ActorType.USER, somebody)):
            assert (await made(database, tenant)).owner_id == somebody

    async def test_they_are_listed_the_default_first(self, database: Database, tenant: Tenant, other: Tenant) -> None:
        await made(database, other, "Theirs")
        for name in ("Carl", "Anna", "Ben"):
            persona = await made(database, tenant, name, voice="slt", knowledge="long")
        await personas.make_default(database, tenant.id, persona.id)
        page = await personas.list_(database, tenant.id, 1, 2)
        assert ([each.name for each in page.items], page.total) == (["Ben", "Anna"], 3)
        assert [(each.voice, each.usage_count, each.is_default) for each in page.items] == [
            ("slt", 0, True),
            ("slt", 0, False),
        ]
        assert [each.name for each in (await personas.list_(database, tenant.id, 2, 2)).items] == ["Carl"]

    async def test_only_what_is_given_changes(self, database: Database, tenant: Tenant) -> None:
        persona = await made(database, tenant, speed=1.5, system_prompt=PROMPT)
        changed = await personas.update(database, tenant.id, persona.id, {"speed": None, "name": "ANNA"})
        assert (changed.speed, changed.name, changed.system_prompt) == (None, "ANNA", PROMPT)
        assert changed.updated_at > persona.created_at
        with pytest.raises(BadInput) as caught:
            await personas.update(database, tenant.id, persona.id, {"is_default": True})
        assert caught.value.param == "is_default"
        with pytest.raises(BadInput):
            await personas.update(database, tenant.id, persona.id, {"speed": 3.0})
        assert (await personas.get(database, tenant.id, persona.id)).speed is None

    @pytest.mark.parametrize("name", ["anna MÜLLER", "Anna Müller", "  Anna   Müller ", "Anna Mu\u0308ller"])
    async def test_names_that_sound_the_same_are_one(self, database: Database, tenant: Tenant, name: str) -> None:
        await made(database, tenant, "Anna Müller")
        with pytest.raises(Conflict) as caught:
            await made(database, tenant, name)
        assert (caught.value.code, caught.value.param) == ("persona_exists", "name")
        second = await made(database, tenant, "Ben")
        with pytest.raises(Conflict):
            await personas.update(database, tenant.id, second.id, {"name": name})
        assert len(await personas.names(database, tenant.id)) == 2

    async def test_two_of_one_name_at_once_are_one(self, database: Database, tenant: Tenant) -> None:
        results = await asyncio.gather(
            *(made(database, tenant, name) for name in ("Änna", "änna", "ÄNNA")), return_exceptions=True
        )
        assert sorted(type(each).__name__ for each in results) == ["Conflict", "Conflict", "Persona"]

    async def test_there_are_so_many_and_no_more(
        self, database: Database, tenant: Tenant, other: Tenant, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(personas, "MOST", 2)
        for name in ("Anna", "Ben"):
            await made(database, tenant, name)
        with pytest.raises(Conflict) as caught:
            await made(database, tenant, "Carl")
        assert caught.value.code == "too_many_personas"
        await made(database, other, "Carl")

    async def test_of_another_tenant_there_is_none(self, database: Database, tenant: Tenant, other: Tenant) -> None:
        theirs = (await made(database, other)).id
        project = await projects.create(database, tenant.id, "App")
        for attempt in (
            personas.get(database, tenant.id, theirs),
            personas.update(database, tenant.id, theirs, {"name": "Mine"}),
            personas.delete(database, tenant.id, theirs),
            personas.make_default(database, tenant.id, theirs),
            personas.unmake_default(database, tenant.id, theirs),
            personas.set_project_default(database, tenant.id, project.id, theirs),
        ):
            with pytest.raises(NotFound) as caught:
                await attempt
            assert caught.value.param == "persona_id"
        assert (await personas.get(database, other.id, theirs)).name == "Anna"

    async def test_an_unknown_tenant_and_an_erased_one(self, database: Database) -> None:
        with pytest.raises(NotFound):
            await personas.create(database, uuid.uuid4(), Character("Anna"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", " "),
        ("name", "x" * 101),
        ("name", "two\nlines"),
        ("description", "x" * 1_001),
        ("description", None),
        ("status", "deleted"),
        ("system_prompt", "x" * 16_001),
        ("system_prompt", "\0"),
        ("system_prompt", "\x1b[31m"),
        ("knowledge", "x" * 64_001),
        ("knowledge", 7),
        ("voice", "../voice"),
        ("voice", "x" * 65),
        ("speed", 0.49),
        ("speed", 2.01),
        ("speed", float("nan")),
        ("speed", True),
        ("speed", "1"),
        ("language", "english"),
        ("language", "en_US"),
        ("solvers", ()),
        ("solvers", ("",)),
        ("solvers", ("../x",)),
        ("solvers", ("llm", "llm")),
        ("solvers", ["llm"]),
        ("solvers", tuple(f"solver-{n}" for n in range(11))),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(BadInput) as caught:
        Character(**{"name": "Anna", field: value})
    assert caught.value.param == field


def test_the_longest_there_may_be() -> None:
    longest = Character(
        "x" * 100, "x" * 1_000, system_prompt="x" * 16_000, knowledge="x" * 64_000, voice="x" * 64, speed=2
    )
    assert longest.status is PersonaStatus.ACTIVE


async def test_what_is_no_text_is_refused(database: Database, tenant: Tenant) -> None:
    with pytest.raises(BadInput):
        await made(database, tenant, system_prompt="half a \ud83d character")


class TestDefaults:
    """Who answers where nobody was asked for."""

    async def test_per_06_there_is_one_default(self, database: Database, tenant: Tenant, other: Tenant) -> None:
        first, second = await made(database, tenant, "Anna"), await made(database, tenant, "Ben")
        theirs = await made(database, other)
        await personas.make_default(database, other.id, theirs.id)
        assert (await personas.make_default(database, tenant.id, first.id)).is_default
        assert (await personas.make_default(database, tenant.id, second.id)).is_default
        assert not (await personas.get(database, tenant.id, first.id)).is_default
        assert (await personas.get(database, other.id, theirs.id)).is_default
        assert not (await personas.unmake_default(database, tenant.id, second.id)).is_default
        assert await personas.resolve(database, tenant.id) is None

    async def test_a_default_can_not_go_nor_be_disabled(self, database: Database, tenant: Tenant) -> None:
        persona = await made(database, tenant)
        await personas.make_default(database, tenant.id, persona.id)
        for attempt in (
            personas.delete(database, tenant.id, persona.id),
            personas.update(database, tenant.id, persona.id, {"status": "disabled"}),
        ):
            with pytest.raises(Conflict) as caught:
                await attempt
            assert caught.value.code == "persona_is_default"

    async def test_a_disabled_one_becomes_no_default(self, database: Database, tenant: Tenant) -> None:
        persona = await made(database, tenant, status="disabled")
        project = await projects.create(database, tenant.id, "App")
        for attempt in (
            personas.make_default(database, tenant.id, persona.id),
            personas.set_project_default(database, tenant.id, project.id, persona.id),
        ):
            with pytest.raises(Conflict) as caught:
                await attempt
            assert caught.value.code == "persona_disabled"

    async def test_two_defaults_at_once_are_one(self, database: Database, tenant: Tenant) -> None:
        both = [await made(database, tenant, name) for name in ("Anna", "Ben")]
        await asyncio.gather(*(personas.make_default(database, tenant.id, each.id) for each in both))
        listed = (await personas.list_(database, tenant.id)).items
        assert sorted(each.is_default for each in listed) == [False, True]

    async def test_per_07_a_project_has_its_own(self, database: Database, tenant: Tenant, other: Tenant) -> None:
        persona = await made(database, tenant)
        project = await projects.create(database, tenant.id, "App")
        changed = await personas.set_project_default(database, tenant.id, project.id, persona.id)
        assert changed.default_persona_id == persona.id
        assert (await personas.set_project_default(database, tenant.id, project.id, None)).default_persona_id is None
        theirs = await projects.create(database, other.id, "Theirs")
        with pytest.raises(NotFound) as caught:
            await personas.set_project_default(database, tenant.id, theirs.id, persona.id)
        assert caught.value.param == "project_id"


class TestResolve:
    """Session, project, tenant, nobody (PER-10)."""

    async def test_per_10_the_nearest_counts(self, database: Database, tenant: Tenant) -> None:
        anna, ben, carl = [await made(database, tenant, name) for name in ("Anna", "Ben", "Carl")]
        project = await projects.create(database, tenant.id, "App")

        async def who(project_id: uuid.UUID | None = None, own: uuid.UUID | str | None = None) -> str | None:
            found = await personas.resolve(database, tenant.id, project_id, own)
            return None if found is None else found.name

        assert await who(project.id) is None
        assert await who(own="anna") == "Anna"
        await personas.make_default(database, tenant.id, carl.id)
        assert await who() == await who(project.id) == "Carl"
        await personas.set_project_default(database, tenant.id, project.id, ben.id)
        assert (await who(), await who(project.id)) == ("Carl", "Ben")
        for own in (anna.id, str(anna.id), anna.id.hex, "Anna", "ANNA "):
            assert await who(project.id, own) == "Anna"
        for unknown in ("", "Nobody", uuid.uuid4(), str(uuid.uuid4())):
            assert await who(project.id, unknown) == "Ben"
        assert await who(uuid.uuid4()) == "Carl"

    async def test_who_is_disabled_or_gone_is_passed_over(self, database: Database, tenant: Tenant) -> None:
        anna, ben = [await made(database, tenant, name) for name in ("Anna", "Ben")]
        await personas.make_default(database, tenant.id, ben.id)
        project = await projects.create(database, tenant.id, "App")
        await personas.set_project_default(database, tenant.id, project.id, anna.id)
        await personas.update(database, tenant.id, anna.id, {"status": "disabled"})
        for own in (anna.id, "Anna", None):
            found = await personas.resolve(database, tenant.id, project.id, own)
            assert found is not None
            assert found.name == "Ben"
        assert await personas.names(database, tenant.id) == [(ben.id, "Ben")]
        await personas.delete(database, tenant.id, anna.id)
        found = await personas.resolve(database, tenant.id, project.id, anna.id)
        assert found is not None
        assert found.id == ben.id

    async def test_another_tenants_is_nobody(self, database: Database, tenant: Tenant, other: Tenant) -> None:
        theirs = await made(database, other)
        await personas.make_default(database, other.id, theirs.id)
        project = await projects.create(database, other.id, "Theirs")
        await personas.set_project_default(database, other.id, project.id, theirs.id)
        for own in (theirs.id, "Anna"):
            assert await personas.resolve(database, tenant.id, project.id, own) is None
        assert await personas.names(database, tenant.id) == []


class TestDelete:
    """Nothing is left that refers to who is gone (PER-08)."""

    async def test_per_08_references_move_and_are_counted(
        self, database: Database, tenant: Tenant, other: Tenant
    ) -> None:
        anna, ben = [await made(database, tenant, name) for name in ("Anna", "Ben")]
        await made(database, other, "Anna")
        for name in ("One", "Two"):
            project = await projects.create(database, tenant.id, name)
            await personas.set_project_default(database, tenant.id, project.id, anna.id)
        config = {"voice": "slt"}
        opened = [
            (await sessions.create(database, tenant.id, config={**config, "persona_id": own})).id
            for own in (str(anna.id), "anna")
        ]
        elsewhere = await sessions.create(database, other.id, config={"persona_id": "Anna"})
        of_ben = await sessions.create(database, tenant.id, config={"persona_id": str(ben.id)})
        ended = await sessions.create(database, tenant.id, config={"persona_id": "Anna"})
        await sessions.finish(database, tenant.id, ended.id, SessionStatus.COMPLETED)
        assert await personas.delete(database, tenant.id, anna.id) == 4
        with pytest.raises(NotFound):
            await personas.get(database, tenant.id, anna.id)
        for session_id in opened:
            assert (await sessions.get(database, tenant.id, session_id)).config == config
        assert (await sessions.get(database, tenant.id, of_ben.id)).config == {"persona_id": str(ben.id)}
        assert (await sessions.get(database, tenant.id, ended.id)).config == {"persona_id": "Anna"}
        assert (await sessions.get(database, other.id, elsewhere.id)).config == {"persona_id": "Anna"}
        for summary in (await projects.list_(database, tenant.id)).items:
            assert summary.project.default_persona_id is None
        assert await personas.delete(database, tenant.id, ben.id) == 1

    async def test_who_is_removed_and_chosen_at_once_is_gone_or_chosen_before(
        self, database: Database, tenant: Tenant
    ) -> None:
        """Neither waits for the other for ever, and no project refers to nobody."""
        for n in range(5):
            persona = await made(database, tenant, f"Anna {n}")
            project = await projects.create(database, tenant.id, f"App {n}")
            removed, chosen = await asyncio.gather(
                personas.delete(database, tenant.id, persona.id),
                personas.set_project_default(database, tenant.id, project.id, persona.id),
                return_exceptions=True,
            )
            assert removed == 0 or removed == 1
            assert removed == 1 or isinstance(chosen, NotFound)
            left = await projects.get(database, tenant.id, project.id)
            assert left.project.default_persona_id is None


class TestCounting:
    """How many sessions each began."""

    async def test_uses_of_all_tenants_are_counted_at_once(
        self, database: Database, tenant: Tenant, other: Tenant
    ) -> None:
        anna, ben, theirs = (
            await made(database, tenant, "Anna"),
            await made(database, tenant, "Ben"),
            await made(database, other, "Anna"),
        )
        await personas.count_uses(database, {})
        uses = {(tenant.id, anna.id): 2, (other.id, theirs.id): 3, (tenant.id, uuid.uuid4()): 7}
        await personas.count_uses(database, uses)
        await personas.count_uses(database, {(tenant.id, anna.id): 1, (tenant.id, theirs.id): 9})
        counts = [
            (await personas.get(database, owner.id, each.id)).usage_count
            for owner, each in ((tenant, anna), (tenant, ben), (other, theirs))
        ]
        assert counts == [3, 0, 3]

    async def test_nodes_that_count_in_any_order_do_not_block_each_other(
        self, database: Database, tenant: Tenant, admin: psycopg.AsyncConnection, blocked: Blocked
    ) -> None:
        """Each holds what it came to first, were they not to go in one order."""
        anna, middle, carl = [(tenant.id, (await made(database, tenant, name)).id) for name in ("A", "B", "C")]
        async with admin.transaction():
            await admin.execute("SELECT 1 FROM personas WHERE id = %s FOR UPDATE", (middle[1],))
            orders = [(anna, middle, carl), (carl, middle, anna)]
            counting = [asyncio.create_task(personas.count_uses(database, dict.fromkeys(one, 1))) for one in orders]
            await blocked(2)
        await asyncio.gather(*counting)
        for tenant_id, persona_id in (anna, middle, carl):
            assert (await personas.get(database, tenant_id, persona_id)).usage_count == 2


class TestAudit:
    """Every change is written down, and no prompt is."""

    async def test_every_change_is_in_the_log(self, database: Database, tenant: Tenant) -> None:
        persona = await made(database, tenant)
        project = await projects.create(database, tenant.id, "App")
        for _ in range(2):  # what changes nothing is not written
            await personas.update(database, tenant.id, persona.id, {"voice": "slt"})
            await personas.make_default(database, tenant.id, persona.id)
        for _ in range(2):
            await personas.unmake_default(database, tenant.id, persona.id)
            await personas.set_project_default(database, tenant.id, project.id, persona.id)
        await personas.delete(database, tenant.id, persona.id)
        told = [(line.action, line.resource_type, line.description) for line in await lines(database, tenant)]
        assert [each for each in told if each[2] != "Made the project App"][-6:] == [
            ("create", "persona", "Made the persona Anna"),
            ("update", "persona", "Changed voice"),
            ("update", "persona", "Made Anna the default"),
            ("update", "persona", "Anna is not the default any more"),
            ("update", "project", "Changed default_persona_id"),
            ("delete", "persona", "Removed the persona Anna"),
        ]
        last = (await lines(database, tenant))[-1]
        assert last.details == {"reassigned": 1}

    async def test_prompts_are_told_by_their_lengths(
        self, database: Database, tenant: Tenant, admin: psycopg.AsyncConnection
    ) -> None:
        persona = await made(database, tenant, system_prompt="the secret recipe", knowledge="a rare herb")
        await personas.update(database, tenant.id, persona.id, {"system_prompt": "another recipe!!!"})
        await personas.delete(database, tenant.id, persona.id)
        found = [line for line in await lines(database, tenant) if line.resource_type == "persona"]
        assert found[0].new_values["system_prompt"] == "17 characters"
        assert found[0].new_values["knowledge"] == "11 characters"
        assert found[1].new_values == {"system_prompt": "17 characters"}
        cursor = await admin.execute("SELECT audit_log::text FROM audit_log WHERE tenant_id = %s", (tenant.id,))
        whole = json.dumps(await cursor.fetchall())
        assert "recipe" not in whole
        assert "herb" not in whole

    async def test_a_change_that_fails_is_not_written(self, database: Database, tenant: Tenant) -> None:
        await made(database, tenant)
        before = len(await lines(database, tenant))
        with pytest.raises(Conflict):
            await made(database, tenant)
        assert len(await lines(database, tenant)) == before


async def test_an_erased_tenant_gets_none(database: Database, tenant: Tenant) -> None:
    await tenants.delete(database, tenant.id)
    await erasure.erase(database, tenant.id)
    with pytest.raises(Conflict) as caught:
        await made(database, tenant)
    assert caught.value.code == "tenant_erased"
