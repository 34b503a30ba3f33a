"""Making tenants, and what is refused."""

from __future__ import annotations

import asyncio
import uuid

import psycopg
import pytest
from sqlalchemy import select

from agentvoicebox.config.errors import BadInput, Conflict, NotFound
from agentvoicebox.tenancy import tenants, voices
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.models import Environment, Project, Tenant, TenantStatus, Tier
from agentvoicebox.tenancy.voices import VoiceConfig


async def test_a_tenant_is_made_whole(database: Database) -> None:
    voice = VoiceConfig(voice="slt", language="de-DE")
    made = await tenants.create(database, "acme-1", "Acme, Inc.", "pro", voice)
    assert (made.slug, made.name, made.tier, made.status) == ("acme-1", "Acme, Inc.", Tier.PRO, TenantStatus.ACTIVE)
    assert made.activated_at is not None
    assert made.created_at == made.updated_at
    assert await voices.get(database, made.id) == voice
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
