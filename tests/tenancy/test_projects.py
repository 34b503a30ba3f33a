"""The parts of a tenant's work."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
import pytest
from sqlalchemy import select, text

from agentvoicebox.config.errors import BadInput, Conflict, NotFound, TooLarge
from agentvoicebox.tenancy import keys, projects, sessions
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.models import ApiKey, AuditEntry, DeploymentStatus, KeyRevocation, Project, Tenant


@pytest.fixture
async def project(database: Database, tenant: Tenant) -> Project:
    return await projects.create(database, tenant.id, "Kiosk", "staging", {"persona": "Ada"})


async def lines(database: Database, tenant: Tenant) -> list[tuple[str, str]]:
    async with database.tenant(tenant.id) as session:
        found = await session.execute(select(AuditEntry.action, AuditEntry.resource_type).order_by(AuditEntry.seq))
        return [(row.action, row.resource_type) for row in found][1:]


async def test_a_new_project(database: Database, tenant: Tenant, project: Project) -> None:
    found = await projects.get(database, tenant.id, project.id)
    assert (found.project.name, found.project.environment, found.project.config) == (
        "Kiosk",
        "staging",
        {"persona": "Ada"},
    )
    assert (found.project.is_default, found.keys, found.sessions) == (False, 0, 0)
    assert await lines(database, tenant) == [("create", "project")]


async def test_the_list_counts_keys_and_sessions(database: Database, tenant: Tenant, project: Project) -> None:
    first, second = [await keys.issue(database, tenant.id, "k", project_id=project.id) for _ in range(2)]
    await keys.revoke(database, tenant.id, second.id)
    for _ in range(3):
        await sessions.create(database, tenant.id, project_id=project.id, api_key_id=first.id)
    await sessions.create(database, tenant.id)
    listed = await projects.list_(database, tenant.id)
    assert [(each.project.name, each.keys, each.sessions) for each in listed.items] == [
        ("Default", 0, 0),
        ("Kiosk", 1, 3),
    ]
    assert listed.total == 2
    assert (await projects.list_(database, tenant.id, page=2)).items == []


async def test_a_change_counts_at_once(database: Database, tenant: Tenant, project: Project) -> None:
    changed = await projects.update(database, tenant.id, project.id, name="Shop", config={})
    assert (changed.name, changed.environment, changed.config) == ("Shop", "staging", {})
    await projects.update(database, tenant.id, project.id, name="Shop")
    assert await lines(database, tenant) == [("create", "project"), ("update", "project")]


async def test_the_default_project_stays(database: Database, tenant: Tenant) -> None:
    (only,) = (await projects.list_(database, tenant.id)).items
    with pytest.raises(Conflict):
        await projects.delete(database, tenant.id, only.project.id)


async def test_prj_05_a_removed_project_leaves_sessions_and_keys(
    database: Database, tenant: Tenant, project: Project
) -> None:
    key = await keys.issue(database, tenant.id, "k", project_id=project.id)
    made = await sessions.create(database, tenant.id, project_id=project.id, api_key_id=key.id)
    assert await projects.delete(database, tenant.id, project.id) == 0
    kept = await sessions.get(database, tenant.id, made.id)
    assert (kept.project_id, kept.api_key_id) == (None, key.id)
    async with database.tenant(tenant.id) as session:
        left = await session.get_one(ApiKey, (tenant.id, key.id))
    assert (left.project_id, left.revoked_at) == (None, None)
    with pytest.raises(NotFound):
        await projects.get(database, tenant.id, project.id)


async def test_prj_05_or_ends_its_keys_where_every_node_sees_it(
    database: Database, tenant: Tenant, project: Project
) -> None:
    mine = [await keys.issue(database, tenant.id, "k", project_id=project.id) for _ in range(2)]
    other_one = await keys.issue(database, tenant.id, "of the default project")
    assert await projects.delete(database, tenant.id, project.id, revoke_keys=True) == 2
    async with database.system() as session:
        told = await session.execute(
            select(KeyRevocation.key_id).where(KeyRevocation.tenant_id == tenant.id, KeyRevocation.kind == "revoked")
        )
        assert set(told.scalars()) == {key.id for key in mine}
        assert (await session.get_one(ApiKey, (tenant.id, other_one.id))).revoked_at is None


async def test_another_tenants_project_is_not_there(
    database: Database, tenant: Tenant, other: Tenant, project: Project
) -> None:
    place = await projects.add_environment(database, tenant.id, project.id, "live")
    done = await projects.deploy(database, tenant.id, place.id, "1")
    for attempt in (
        projects.get(database, other.id, project.id),
        projects.update(database, other.id, project.id, name="Mine"),
        projects.delete(database, other.id, project.id),
        projects.environments(database, other.id, project.id),
        projects.deployments(database, other.id, project.id),
        projects.add_environment(database, other.id, project.id, "x"),
        projects.deploy(database, other.id, place.id, "1"),
        projects.promote(database, other.id, done.id, place.id),
        projects.create(database, uuid.uuid4(), "Nobody's"),
    ):
        with pytest.raises(NotFound):
            await attempt
    assert (await projects.list_(database, other.id)).total == 1


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"name": ""}, "name"),
        ({"name": "x" * 256}, "name"),
        ({"name": "a\x00b"}, "name"),
        ({"name": "fine", "environment": "prod"}, "environment"),
        ({"name": "fine", "config": ["a list"]}, "config"),
        ({"name": "fine", "config": {"x": float("nan")}}, "config"),
        ({"name": "fine", "config": {"x": object()}}, "config"),
    ],
)
async def test_what_is_refused_by_name(database: Database, tenant: Tenant, given: dict[str, Any], param: str) -> None:
    with pytest.raises(BadInput) as caught:
        await projects.create(database, tenant.id, **given)
    assert caught.value.param == param
    assert (await projects.list_(database, tenant.id)).total == 1


async def test_a_configuration_has_its_bound(database: Database, tenant: Tenant) -> None:
    with pytest.raises(TooLarge):
        await projects.create(database, tenant.id, "Large", config={"x": "y" * 70_000})
    with pytest.raises(BadInput):
        await projects.create(database, tenant.id, "Nul", config={"x": "a\x00b"})


class TestDeployments:
    """Snapshots of configurations, one of which counts in each environment."""

    async def test_environments_are_named_once(self, database: Database, tenant: Tenant, project: Project) -> None:
        for name in ("staging", "live"):
            await projects.add_environment(database, tenant.id, project.id, name, {"name": name})
        with pytest.raises(Conflict):
            await projects.add_environment(database, tenant.id, project.id, "live")
        listed = await projects.environments(database, tenant.id, project.id)
        assert [(each.name, each.config) for each in listed.items] == [
            ("live", {"name": "live"}),
            ("staging", {"name": "staging"}),
        ]

    async def test_gap_15_a_deployment_keeps_what_it_was_made_of(
        self, database: Database, tenant: Tenant, project: Project
    ) -> None:
        place = await projects.add_environment(database, tenant.id, project.id, "live", {"voice": "slt"})
        first = await projects.deploy(database, tenant.id, place.id, "1.0")
        assert (first.status, first.config) == ("active", {"persona": "Ada", "voice": "slt"})
        await projects.update(database, tenant.id, project.id, config={"persona": "Bob"})
        second = await projects.deploy(database, tenant.id, place.id, "1.1")
        assert second.config == {"persona": "Bob", "voice": "slt"}
        listed = await projects.deployments(database, tenant.id, project.id)
        assert [(each.version, each.status, each.config["persona"]) for each in listed.items] == [
            ("1.1", "active", "Bob"),
            ("1.0", "superseded", "Ada"),
        ]

    async def test_gap_15_what_was_tried_in_one_is_promoted_to_another_as_it_is(
        self, database: Database, tenant: Tenant, project: Project
    ) -> None:
        staging = await projects.add_environment(database, tenant.id, project.id, "staging", {"voice": "slt"})
        live = await projects.add_environment(database, tenant.id, project.id, "live", {"voice": "awb"})
        tried = await projects.deploy(database, tenant.id, staging.id, "2.0")
        await projects.deploy(database, tenant.id, live.id, "1.0")
        promoted = await projects.promote(database, tenant.id, tried.id, live.id)
        assert (promoted.environment_id, promoted.version, promoted.config) == (live.id, "2.0", tried.config)
        listed = await projects.deployments(database, tenant.id, project.id)
        assert [each.status for each in listed.items] == ["active", "superseded", "active"]

    async def test_not_from_project_to_project(self, database: Database, tenant: Tenant, project: Project) -> None:
        here = await projects.add_environment(database, tenant.id, project.id, "live")
        another = await projects.create(database, tenant.id, "Another")
        there = await projects.add_environment(database, tenant.id, another.id, "live")
        done = await projects.deploy(database, tenant.id, here.id, "1")
        with pytest.raises(NotFound):
            await projects.promote(database, tenant.id, done.id, there.id)

    @pytest.mark.parametrize("again", [False, True])
    async def test_a_deployment_and_the_projects_end_come_one_after_the_other(
        self,
        database: Database,
        tenant: Tenant,
        project: Project,
        admin: psycopg.AsyncConnection,
        blocked: Callable[[int], Awaitable[None]],
        again: bool,
    ) -> None:
        place = await projects.add_environment(database, tenant.id, project.id, "live")
        first = await projects.deploy(database, tenant.id, place.id, "1")
        async with admin.transaction():
            await admin.execute("SELECT FROM environments WHERE id = %s FOR UPDATE", (place.id,))
            deploying = asyncio.create_task(
                projects.promote(database, tenant.id, first.id, place.id)
                if again
                else projects.deploy(database, tenant.id, place.id, "2")
            )
            await blocked(1)
            deleting = asyncio.create_task(projects.delete(database, tenant.id, project.id))
            await blocked(2)
        assert (await deploying).environment_id == place.id
        assert await deleting == 0
        async with database.tenant(tenant.id) as session:
            assert await session.scalar(text("SELECT count(*) FROM deployments")) == 0

    async def test_a_project_has_twenty_at_most(self, database: Database, tenant: Tenant, project: Project) -> None:
        results = await asyncio.gather(
            *(projects.add_environment(database, tenant.id, project.id, str(number)) for number in range(25)),
            return_exceptions=True,
        )
        refused = [each for each in results if isinstance(each, Conflict)]
        assert [each.code for each in refused] == ["too_many_environments"] * 5
        assert (await projects.environments(database, tenant.id, project.id)).total == projects.MOST_ENVIRONMENTS == 20
        another = await projects.create(database, tenant.id, "Another")
        assert (await projects.add_environment(database, tenant.id, another.id, "live")).name == "live"

    async def test_of_many_at_once_one_counts(self, database: Database, tenant: Tenant, project: Project) -> None:
        place = await projects.add_environment(database, tenant.id, project.id, "live")
        await asyncio.gather(*(projects.deploy(database, tenant.id, place.id, str(i)) for i in range(10)))
        async with database.tenant(tenant.id) as session:
            found = await session.execute(text("SELECT status, count(*) FROM deployments GROUP BY status"))
            assert {status: count for status, count in found} == {
                DeploymentStatus.ACTIVE: 1,
                DeploymentStatus.SUPERSEDED: 9,
            }
