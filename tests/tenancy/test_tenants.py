"""Making tenants, and what is refused."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest
from sqlalchemy import select

from agentvoicebox.config.errors import AvbError, BadInput, Conflict, Forbidden, NotFound
from agentvoicebox.tenancy import (
    domains,
    erasure,
    keys,
    projects,
    sessions,
    settings,
    team,
    tenants,
    users,
    voices,
)
from agentvoicebox.tenancy.changes import Feed
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.keyring import Keyring
from agentvoicebox.tenancy.models import AuditEntry, Environment, Project, Tenant, TenantStatus, Tier
from agentvoicebox.tenancy.settings import Settings
from agentvoicebox.tenancy.voices import VoiceConfig


async def lines(database: Database, tenant_id: uuid.UUID) -> list[AuditEntry]:
    """What the tenant's audit log says, in order."""
    async with database.tenant(tenant_id) as session:
        return list((await session.execute(select(AuditEntry).order_by(AuditEntry.seq))).scalars())


async def test_a_tenant_is_made_whole(database: Database) -> None:
    voice = VoiceConfig(voice="slt", language="de-DE")
    made = await tenants.create(database, "acme-1", "Acme, Inc.", "pro", voice)
    assert (made.slug, made.name, made.tier, made.status) == ("acme-1", "Acme, Inc.", Tier.PRO, TenantStatus.ACTIVE)
    assert made.activated_at is not None
    assert made.created_at == made.updated_at
    assert await voices.get(database, made.id) == voice
    assert await settings.get(database, made.id) == Settings()
    assert [(line.action, line.resource_type) for line in await lines(database, made.id)] == [("create", "tenant")]
    async with database.tenant(made.id) as session:
        (project,) = (await session.execute(select(Project))).scalars()
    assert (project.is_default, project.environment) == (True, Environment.PRODUCTION)


@pytest.mark.parametrize(
    ("tier", "limits"),
    [
        ("free", (3, 1, 5, 100)),
        ("starter", (10, 5, 20, 1000)),
        ("pro", (50, 20, 100, 10000)),
        ("enterprise", (500, 100, 500, 100000)),
    ],
)
async def test_limits_come_from_the_tier(database: Database, tier: str, limits: tuple[int, ...]) -> None:
    made = await tenants.create(database, f"tier-{tier}", "Name", tier)
    assert (made.max_users, made.max_projects, made.max_api_keys, made.max_sessions_per_month) == limits


@pytest.mark.parametrize("slug", ["abc", "a-b", "0x9", "a" * 100, "a--b"])
async def test_slugs_that_are_fine(database: Database, slug: str) -> None:
    assert (await tenants.create(database, slug, "Name")).slug == slug


@pytest.mark.parametrize(
    "slug",
    ["", "ab", "a" * 101, "Acme", "-acme", "acme-", "ac me", "acme\n", "ac_me", "ácme", "a/../b", "ac\x00me", None, 7],
)
async def test_slugs_that_are_not(database: Database, slug: object) -> None:
    with pytest.raises(BadInput) as caught:
        await tenants.create(database, slug, "Name")  # type: ignore[arg-type]
    assert caught.value.param == "slug"


@pytest.mark.parametrize("slug", tenants.RESERVED)
async def test_the_platforms_own_names_are_nobodys(database: Database, slug: str) -> None:
    with pytest.raises(BadInput) as caught:
        await tenants.create(database, slug, "Name")
    assert caught.value.param == "slug"


async def test_more_that_a_tenant_may_say_of_itself(database: Database, tenant: Tenant) -> None:
    made = await tenants.create(
        database, "child", "Child", email="Ops@Example.com", timezone="Europe/Vienna", parent_id=tenant.id
    )
    found = await tenants.get(database, made.id)
    assert (found.email, found.timezone, found.parent_id) == ("ops@example.com", "Europe/Vienna", tenant.id)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("email", "nobody"),
        ("email", "a b@example.com"),
        ("email", "a@example.com\n"),
        ("email", f"{'x' * 65}@example.com"),
        ("timezone", "Mars/Olympus"),
        ("timezone", "../../etc/passwd"),
        ("timezone", "Europe"),
        ("timezone", ""),
        ("timezone", "Europe/Vienna\x00"),
        ("parent_id", uuid.UUID(int=7)),
    ],
)
async def test_what_it_says_must_make_sense(
    database: Database, admin: psycopg.AsyncConnection, field: str, value: Any
) -> None:
    with pytest.raises(BadInput) as caught:
        await tenants.create(database, "senseless", "Name", **{field: value})
    assert caught.value.param == field
    assert await (await admin.execute("SELECT 1 FROM tenants WHERE slug = 'senseless'")).fetchall() == []


@pytest.mark.parametrize("name", ["", "x", " " * 9, "x" * 256, "line\nbreak", "nul\x00", None])
async def test_names_that_are_refused(database: Database, name: object) -> None:
    with pytest.raises(BadInput) as caught:
        await tenants.create(database, "fine", name)  # type: ignore[arg-type]
    assert caught.value.param == "name"


@pytest.mark.parametrize("tier", ["gold", "", "FREE", None])
async def test_an_unknown_tier_is_refused_and_nothing_written(
    database: Database, admin: psycopg.AsyncConnection, tier: object
) -> None:
    with pytest.raises(BadInput) as caught:
        await tenants.create(database, "tierless", "Name", tier)  # type: ignore[arg-type]
    assert caught.value.param == "tier"
    assert await (await admin.execute("SELECT 1 FROM tenants WHERE slug = 'tierless'")).fetchall() == []


async def test_a_slug_is_taken_once(database: Database, tenant: Tenant) -> None:
    with pytest.raises(Conflict) as caught:
        await tenants.create(database, tenant.slug, "Another")
    assert (caught.value.code, caught.value.param) == ("conflict", "slug")


async def test_of_many_at_once_one_gets_the_slug(database: Database, admin: psycopg.AsyncConnection) -> None:
    results = await asyncio.gather(
        *(tenants.create(database, "wanted", "Name") for _ in range(8)), return_exceptions=True
    )
    assert sorted(type(result).__name__ for result in results) == ["Conflict"] * 7 + ["Tenant"]
    cursor = await admin.execute(
        "SELECT count(*) FROM projects JOIN tenants t ON t.id = tenant_id WHERE slug = 'wanted'"
    )
    assert await cursor.fetchone() == (1,)


async def test_finding_one(database: Database, tenant: Tenant) -> None:
    assert (await tenants.by_slug(database, tenant.slug)).id == tenant.id
    assert (await tenants.get(database, tenant.id)).slug == tenant.slug


async def test_finding_none(database: Database) -> None:
    for missing in (tenants.by_slug(database, "nobody"), tenants.get(database, uuid.uuid4())):
        with pytest.raises(NotFound) as caught:
            await missing
        assert caught.value.code == "tenant_not_found"


async def test_a_row_made_any_other_way_waits_for_onboarding(admin: psycopg.AsyncConnection) -> None:
    async with admin.transaction(force_rollback=True):
        cursor = await admin.execute(
            "INSERT INTO tenants (id, name, slug, max_users, max_projects, max_api_keys, max_sessions_per_month) "
            "VALUES (gen_random_uuid(), 'n', 'by-hand', 1, 1, 1, 0) RETURNING status, tier"
        )
        assert await cursor.fetchone() == ("pending", "free")


class TestList:
    """What the operator sees of all tenants."""

    @pytest.fixture
    async def listed(self, database: Database) -> list[Tenant]:
        mark = uuid.uuid4().hex[:8]
        return [
            await tenants.create(database, f"{mark}-a", f"100%_{mark}", "pro", email=f"{mark}@one.example"),
            await tenants.create(database, f"{mark}-b", f"1000_{mark}", "free"),
            await tenants.create(database, f"{mark}-c", f"Third {mark}", "free"),
        ]

    async def found(self, database: Database, **wanted: Any) -> list[str]:
        return [each.tenant.slug for each in (await tenants.list_(database, **wanted)).items]

    async def test_the_newest_comes_first(self, database: Database, listed: list[Tenant]) -> None:
        assert (await self.found(database))[:3] == [each.slug for each in reversed(listed)]

    async def test_pages_are_told_with_their_total(self, database: Database, listed: list[Tenant]) -> None:
        mark = listed[0].slug[:8]
        first = await tenants.list_(database, search=mark, sort="slug", page_size=2)
        second = await tenants.list_(database, search=mark, sort="slug", page=2, page_size=2)
        assert (first.total, second.total) == (3, 3)
        assert [each.tenant.slug[8:] for each in [*first.items, *second.items]] == ["-a", "-b", "-c"]

    async def test_a_search_goes_over_name_slug_email_and_id(self, database: Database, listed: list[Tenant]) -> None:
        a, b, c = listed
        mark = a.slug[:8]
        assert await self.found(database, search=f"third {mark}") == [c.slug]
        assert await self.found(database, search=f"{mark.upper()}-B") == [b.slug]
        assert await self.found(database, search=f"{mark}@ONE") == [a.slug]
        assert await self.found(database, search=str(b.id)) == [b.slug]

    async def test_wildcards_of_a_search_are_letters(self, database: Database, listed: list[Tenant]) -> None:
        mark = listed[0].slug[:8]
        assert await self.found(database, search=f"100%_{mark}") == [listed[0].slug]
        assert await self.found(database, search=f"100_{mark}") == []
        assert await self.found(database, search="\\") == []

    async def test_filters(self, database: Database, listed: list[Tenant]) -> None:
        mark = listed[0].slug[:8]
        await tenants.suspend(database, listed[1].id, "unpaid")
        assert await self.found(database, search=mark, tier="pro") == [listed[0].slug]
        assert await self.found(database, search=mark, status="suspended") == [listed[1].slug]
        assert await self.found(database, search=mark, status="active", tier="free") == [listed[2].slug]
        assert await self.found(database, search=mark, sort="-tier") == [
            each.slug for each in (listed[0], *listed[:0:-1])
        ]

    async def test_each_with_what_it_has(self, database: Database, listed: list[Tenant]) -> None:
        one = listed[0]
        key = await keys.issue(database, one.id, "first")
        await keys.issue(database, one.id, "second")
        await keys.revoke(database, one.id, key.id)
        for _ in range(3):
            await sessions.create(database, one.id)
        (found,) = (await tenants.list_(database, search=one.slug)).items
        assert (found.users, found.projects, found.api_keys, found.sessions) == (0, 1, 1, 3)
        alone = await tenants.summary(database, one.id)
        assert (alone.tenant.slug, alone.users, alone.projects, alone.api_keys, alone.sessions) == (
            one.slug,
            0,
            1,
            1,
            3,
        )
        (empty,) = (await tenants.list_(database, search=listed[1].slug)).items
        assert (empty.users, empty.projects, empty.api_keys, empty.sessions) == (0, 1, 0, 0)

    @pytest.mark.parametrize(
        "wanted",
        [{"status": "gone"}, {"tier": "gold"}, {"sort": "id; DROP TABLE tenants"}, {"search": "a\x00"}, {"page": 0}],
    )
    async def test_what_nobody_can_look_for(self, database: Database, wanted: dict[str, Any]) -> None:
        with pytest.raises(BadInput) as caught:
            await tenants.list_(database, **wanted)
        assert caught.value.param == next(iter(wanted))


class TestUpdate:
    """What the operator changes."""

    async def test_what_is_left_out_stays(self, database: Database, tenant: Tenant) -> None:
        changed = await tenants.update(database, tenant.id, name="New Name", timezone="Asia/Tokyo")
        assert (changed.name, changed.timezone, changed.slug, changed.tier) == (
            "New Name",
            "Asia/Tokyo",
            tenant.slug,
            tenant.tier,
        )
        assert changed.updated_at > tenant.updated_at
        assert (await lines(database, tenant.id))[-1].new_values == {"name": "New Name", "timezone": "Asia/Tokyo"}

    async def test_a_change_of_nothing_writes_nothing(self, database: Database, tenant: Tenant) -> None:
        await tenants.update(database, tenant.id, name=tenant.name, tier=tenant.tier)
        assert [line.action for line in await lines(database, tenant.id)] == ["create"]

    async def test_a_tier_brings_its_limits(self, database: Database, tenant: Tenant) -> None:
        changed = await tenants.update(database, tenant.id, tier="starter")
        assert (changed.max_users, changed.max_projects, changed.max_api_keys, changed.max_sessions_per_month) == (
            10,
            5,
            20,
            1000,
        )

    async def test_limits_of_the_same_call_count_last(self, database: Database, tenant: Tenant) -> None:
        changed = await tenants.update(database, tenant.id, tier="free", limits={"max_users": 4})
        assert (changed.tier, changed.max_users, changed.max_api_keys) == ("free", 4, 5)

    async def test_def_09_a_limit_set_apart_survives_a_change_of_tier(self, database: Database, tenant: Tenant) -> None:
        await tenants.update(database, tenant.id, limits={"max_projects": 7})
        changed = await tenants.update(database, tenant.id, tier="pro")
        assert (changed.max_projects, changed.max_users) == (7, 50)
        back = await tenants.update(database, tenant.id, tier="free", limits={"max_projects": 1})
        assert (back.max_projects, back.max_users) == (1, 3)
        assert (await tenants.update(database, tenant.id, tier="pro")).max_projects == 20

    @pytest.mark.parametrize(
        ("change", "param"),
        [
            ({"tier": "gold"}, "tier"),
            ({"limits": {"max_users": 0}}, "max_users"),
            ({"limits": {"max_sessions_per_month": -1}}, "max_sessions_per_month"),
            ({"limits": {"max_users": True}}, "max_users"),
            ({"limits": {"max_users": 2**31}}, "max_users"),
            ({"limits": {"status": 1}}, "status"),
            ({"settings": {"suspension_reason": "none"}}, "settings.suspension_reason"),
            ({"settings": {"features": {"voice_cloning": "yes"}}}, "settings.features.voice_cloning"),
            ({"settings": {"features": {"Voice Cloning": True}}}, "settings.features"),
            ({"settings": {"features": ["voice_cloning"]}}, "settings.features"),
            ({"name": "x"}, "name"),
        ],
    )
    async def test_flw_46_what_makes_no_sense_is_refused_by_name(
        self, database: Database, tenant: Tenant, change: dict[str, Any], param: str
    ) -> None:
        with pytest.raises(BadInput) as caught:
            await tenants.update(database, tenant.id, **change)
        assert caught.value.param == param
        assert (await tenants.get(database, tenant.id)).updated_at == tenant.updated_at

    async def test_features_are_merged(self, database: Database, tenant: Tenant) -> None:
        await tenants.update(database, tenant.id, settings={"features": {"voice_cloning": True, "themes": True}})
        changed = await tenants.update(database, tenant.id, settings={"features": {"themes": False}})
        assert changed.settings == {"features": {"voice_cloning": True, "themes": False}}
        many = {f"feature_{i}": True for i in range(50)}
        with pytest.raises(BadInput):
            await tenants.update(database, tenant.id, settings={"features": many})

    async def test_of_two_changes_at_once_neither_is_lost(self, database: Database, tenant: Tenant) -> None:
        await asyncio.gather(
            *(
                tenants.update(database, tenant.id, settings={"features": {f"f{i}": True}}, limits={"max_users": 3 + i})
                for i in range(8)
            )
        )
        assert len((await tenants.get(database, tenant.id)).settings["features"]) == 8

    async def test_a_tenant_describes_itself(self, database: Database, tenant: Tenant, other: Tenant) -> None:
        changed = await tenants.describe(database, tenant.id, name="Ours", email="a@b.example", timezone="UTC")
        assert (changed.name, changed.email) == ("Ours", "a@b.example")
        assert (await tenants.get(database, other.id)).name == other.name
        assert (await tenants.describe(database, tenant.id, email="")).email == ""

    async def test_nobody(self, database: Database) -> None:
        for attempt in (
            tenants.update(database, uuid.uuid4(), name="Nobody"),
            tenants.describe(database, uuid.uuid4(), name="Nobody"),
            tenants.suspend(database, uuid.uuid4(), "why"),
            tenants.activate(database, uuid.uuid4()),
            tenants.delete(database, uuid.uuid4()),
            tenants.summary(database, uuid.uuid4()),
        ):
            with pytest.raises(NotFound):
                await attempt


async def test_what_is_erased_gets_no_names_again(database: Database, tenant: Tenant) -> None:
    person = await users.create(database, f"{uuid.uuid4().hex}@example.com")
    await tenants.delete(database, tenant.id)
    await erasure.erase(database, tenant.id)
    for attempt in (
        tenants.describe(database, tenant.id, name="Its name", email="its@own.example"),
        tenants.update(database, tenant.id, name="Its name"),
        projects.create(database, tenant.id, "Its name"),
        domains.add(database, tenant.id, "its-name.example"),
        team.add(database, tenant.id, person.id, "admin"),
        team.invite(database, tenant.id, person.email, "admin"),
    ):
        with pytest.raises(Conflict) as caught:
            await attempt
        assert caught.value.code == "tenant_erased"
    found = await tenants.summary(database, tenant.id)
    assert (found.tenant.name, found.tenant.email, found.projects, found.users) == ("Erased", "", 0, 0)


class TestStates:
    """What follows from a change of state."""

    @pytest.fixture
    async def keyring(self, database: Database) -> AsyncIterator[Keyring]:
        feed = Feed(database)
        await feed.start()
        yield Keyring(database, feed)
        await feed.close()

    async def refusal(self, keyring: Keyring, key: str) -> str:
        """How `key` is refused, once it is: within a second."""
        async with asyncio.timeout(10):
            while True:
                try:
                    await keyring.verify(key)
                except AvbError as error:
                    return error.code
                await asyncio.sleep(0.01)

    async def test_flw_25_a_suspended_tenants_keys_are_refused_and_its_sessions_end(
        self, database: Database, tenant: Tenant, other: Tenant, keyring: Keyring
    ) -> None:
        key, theirs = [await keys.issue(database, each.id, "a key") for each in (tenant, other)]
        waiting, live = [await sessions.create(database, tenant.id) for _ in range(2)]
        await sessions.activate(database, tenant.id, live.id)
        foreign = await sessions.create(database, other.id)
        assert (await keyring.verify(key.key)).tenant_id == tenant.id
        suspended = await tenants.suspend(database, tenant.id, "unpaid since May")
        assert (suspended.status, suspended.suspension_reason) == ("suspended", "unpaid since May")
        assert suspended.suspended_at is not None
        assert await self.refusal(keyring, key.key) == "tenant_suspended"
        ended = await sessions.get(database, tenant.id, waiting.id)
        assert (ended.status, ended.termination_reason) == ("terminated", "tenant_suspended")
        assert ended.ended_at is not None
        assert (await sessions.get(database, tenant.id, live.id)).status == "active", "its node ends it, and counts"
        assert (await sessions.get(database, other.id, foreign.id)).status == "created"
        assert (await keyring.verify(theirs.key)).tenant_id == other.id
        await tenants.activate(database, tenant.id)
        assert (await keyring.verify(key.key)).tenant_id == tenant.id

    async def test_what_was_revoked_stays_so(self, database: Database, tenant: Tenant, keyring: Keyring) -> None:
        key = await keys.issue(database, tenant.id, "a key")
        await tenants.suspend(database, tenant.id, "unpaid")
        await keys.revoke(database, tenant.id, key.id)
        active = await tenants.activate(database, tenant.id)
        assert (active.status, active.suspended_at, active.suspension_reason) == ("active", None, "")
        assert active.activated_at is not None
        assert await self.refusal(keyring, key.key) == "api_key_revoked"

    async def test_a_deleted_tenant_is_closed_but_there(
        self, database: Database, tenant: Tenant, keyring: Keyring
    ) -> None:
        key = await keys.issue(database, tenant.id, "a key")
        await keyring.verify(key.key)
        waiting = await sessions.create(database, tenant.id)
        gone = await tenants.delete(database, tenant.id)
        assert gone.status == "deleted"
        assert gone.deleted_at is not None
        assert await self.refusal(keyring, key.key) == "tenant_not_found"
        assert (await sessions.get(database, tenant.id, waiting.id)).status == "terminated"
        with pytest.raises(Conflict):
            await tenants.create(database, tenant.slug, "In its place")
        with pytest.raises(Conflict):
            await tenants.update(database, tenant.id, name="No more")
        back = await tenants.activate(database, tenant.id)
        assert (back.status, back.deleted_at) == ("active", None)
        assert (await keyring.verify(key.key)).tenant_id == tenant.id

    async def test_flw_61_nothing_is_removed_with_a_tenant(
        self, database: Database, tenant: Tenant, admin: psycopg.AsyncConnection
    ) -> None:
        await sessions.create(database, tenant.id)
        await tenants.delete(database, tenant.id)
        cursor = await admin.execute("SELECT count(*) FROM sessions WHERE tenant_id = %s", (tenant.id,))
        assert await cursor.fetchone() == (1,)
        with pytest.raises(psycopg.errors.ForeignKeyViolation):
            await admin.execute("DELETE FROM tenants WHERE id = %s", (tenant.id,))

    async def test_steps_that_make_no_sense(self, database: Database, tenant: Tenant) -> None:
        with pytest.raises(Conflict):
            await tenants.activate(database, tenant.id)
        await tenants.suspend(database, tenant.id, "once")
        with pytest.raises(Conflict):
            await tenants.suspend(database, tenant.id, "twice")
        await tenants.delete(database, tenant.id)
        for again in (tenants.delete(database, tenant.id), tenants.suspend(database, tenant.id, "why")):
            with pytest.raises(Conflict):
                await again
        assert [line.description for line in await lines(database, tenant.id)][1:] == ["Suspended", "Deleted"]

    @pytest.mark.parametrize("reason", ["", " ", "x" * 501, "two\nlines", None])
    async def test_a_reason_is_needed(self, database: Database, tenant: Tenant, reason: Any) -> None:
        with pytest.raises(BadInput) as caught:
            await tenants.suspend(database, tenant.id, reason)
        assert caught.value.param == "reason"

    async def test_of_many_who_suspend_at_once_one_does(self, database: Database, tenant: Tenant) -> None:
        results = await asyncio.gather(
            *(tenants.suspend(database, tenant.id, "at once") for _ in range(6)), return_exceptions=True
        )
        assert sorted(type(result).__name__ for result in results) == ["Conflict"] * 5 + ["Tenant"]

    async def test_a_pending_tenant_is_let_in_by_activation(
        self, database: Database, tenant: Tenant, admin: psycopg.AsyncConnection, keyring: Keyring
    ) -> None:
        key = await keys.issue(database, tenant.id, "a key")
        await admin.execute("UPDATE tenants SET status = 'pending' WHERE id = %s", (tenant.id,))
        with pytest.raises(Forbidden) as caught:
            await keyring.verify(key.key)
        assert caught.value.code == "tenant_pending"
        await tenants.activate(database, tenant.id)
        assert (await keyring.verify(key.key)).tenant_id == tenant.id
