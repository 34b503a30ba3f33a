"""The parts of a tenant's work, the places where they run, and what runs there."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete as erase
from sqlalchemy import func, select, true
from sqlalchemy import update as change
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from agentvoicebox.config.errors import Conflict, NotFound
from agentvoicebox.tenancy import audit, pages, tenants
from agentvoicebox.tenancy.checks import chosen, document, words
from agentvoicebox.tenancy.database import Database, sqlstate
from agentvoicebox.tenancy.models import (
    Action,
    ApiKey,
    Deployment,
    DeploymentStatus,
    Environment,
    Project,
    ProjectEnvironment,
    Session,
)
from agentvoicebox.tenancy.pages import Page

MOST_ENVIRONMENTS = 20
"""Of one project."""

_UNIQUE_VIOLATION = "23505"


@dataclass(frozen=True, slots=True)
class Summary:
    """A project in a list, and how much belongs to it."""

    project: Project
    keys: int
    """Not revoked."""
    sessions: int


async def create(
    database: Database,
    tenant_id: uuid.UUID,
    name: str,
    environment: str = Environment.DEVELOPMENT,
    config: Mapping[str, Any] | None = None,
) -> Project:
    """Make a project.

    Raises `BadInput`, `NotFound`, `Forbidden` when the tenant may have no more, `Conflict` when it is erased.
    """
    project = Project(
        id=uuid.uuid4(),
        name=words(name, "name", 1, 255),
        environment=chosen(environment, "environment", Environment),
        config=document(config or {}, "config"),
    )
    async with database.tenant(tenant_id) as session:
        await tenants.lock(session, tenant_id)
        session.add(project)
        await session.flush()
        await session.refresh(project)
        await audit.append(
            session, Action.CREATE, "project", project.id, f"Made the project {name}", new=_shown(project)
        )
    return project


async def get(database: Database, tenant_id: uuid.UUID, project_id: uuid.UUID) -> Summary:
    """One project and how much belongs to it. Raises `NotFound`."""
    async with database.tenant(tenant_id) as session:
        project = _known(await session.get(Project, (tenant_id, project_id)))
        return (await _summaries(session, [project]))[0]


async def list_(database: Database, tenant_id: uuid.UUID, page: int = 1, page_size: int = 20) -> Page[Summary]:
    """The tenant's projects, the default one first, then the newest. Raises `BadInput`."""
    query = select(Project).order_by(Project.is_default.desc(), Project.created_at.desc(), Project.id)
    async with database.tenant(tenant_id) as session:
        found = await pages.turn_to(session, query, page, page_size)
        items = await _summaries(session, list(found.items))
    return Page(items, found.total, found.page, found.page_size)


async def update(
    database: Database,
    tenant_id: uuid.UUID,
    project_id: uuid.UUID,
    *,
    name: str | None = None,
    environment: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Project:
    """Change a project, at once; what is left out stays. Raises `BadInput`, `NotFound`."""
    values: dict[str, Any] = {}
    if name is not None:
        values["name"] = words(name, "name", 1, 255)
    if environment is not None:
        values["environment"] = chosen(environment, "environment", Environment)
    if config is not None:
        values["config"] = document(config, "config")
    async with database.tenant(tenant_id) as session:
        project = await _locked(session, project_id)
        old = _shown(project)
        changed = [each for each, value in values.items() if old[each] != value]
        if changed:
            await session.execute(change(Project).where(Project.id == project_id).values(values))
            await session.refresh(project)
            new = _shown(project)
            await audit.append(
                session,
                Action.UPDATE,
                "project",
                project_id,
                f"Changed {', '.join(changed)}",
                old={each: old[each] for each in changed},
                new={each: new[each] for each in changed},
            )
    return project


async def delete(database: Database, tenant_id: uuid.UUID, project_id: uuid.UUID, *, revoke_keys: bool = False) -> int:
    """Remove a project with its environments and deployments; returns how many keys were revoked.

    Its sessions and usage stay, of no project. So do its keys, unless `revoke_keys`, which ends them within a second.
    Raises `NotFound`, `Conflict` for the default project.
    """
    async with database.tenant(tenant_id) as session:
        project = await _locked(session, project_id)
        if project.is_default:
            raise Conflict("The default project cannot be removed: keys that name none belong to it.")
        revoked: list[uuid.UUID] = []
        if revoke_keys:
            # The log that tells all nodes is written by a trigger.
            ended = await session.execute(
                change(ApiKey)
                .where(ApiKey.project_id == project_id, ApiKey.revoked_at.is_(None))
                .values(revoked_at=func.now(), revoked_by=audit.actor().id)
                .returning(ApiKey.id)
            )
            revoked = list(ended.scalars())
        await session.execute(erase(Project).where(Project.id == project_id))
        for key_id in revoked:
            await audit.append(session, Action.DELETE, "api_key", key_id, "Revoked together with its project")
        await audit.append(
            session, Action.DELETE, "project", project_id, f"Removed the project {project.name}", old=_shown(project)
        )
    return len(revoked)


async def add_environment(
    database: Database,
    tenant_id: uuid.UUID,
    project_id: uuid.UUID,
    name: str,
    config: Mapping[str, Any] | None = None,
) -> ProjectEnvironment:
    """Add a place where the project runs.

    Raises `BadInput`, `NotFound`, `Conflict` for a name it has already, or when it has 20.
    """
    made = ProjectEnvironment(
        id=uuid.uuid4(),
        project_id=project_id,
        name=words(name, "name", 1, 100),
        config=document(config or {}, "config"),
    )
    try:
        async with database.tenant(tenant_id) as session:
            # One at a time, so that the count holds; what refers to the project can be made meanwhile.
            mine = select(Project).where(Project.id == project_id).with_for_update(key_share=True)
            _known((await session.execute(mine)).scalar_one_or_none())
            count = select(func.count()).where(ProjectEnvironment.project_id == project_id)
            if (await session.execute(count)).scalar_one() >= MOST_ENVIRONMENTS:
                raise Conflict(
                    f"A project has at most {MOST_ENVIRONMENTS} environments; another project can have more.",
                    code="too_many_environments",
                )
            session.add(made)
            await session.flush()
            await session.refresh(made)
            new = {"project_id": project_id, "name": name, "config": made.config}
            await audit.append(session, Action.CREATE, "environment", made.id, f"Added {name}", new=new)
    except IntegrityError as error:
        if sqlstate(error) != _UNIQUE_VIOLATION:
            raise
        raise Conflict(f"The project has an environment {name!r} already.", param="name") from error
    return made


async def environments(
    database: Database, tenant_id: uuid.UUID, project_id: uuid.UUID, page: int = 1, page_size: int = 20
) -> Page[ProjectEnvironment]:
    """Where the project runs, by name. Raises `BadInput`, `NotFound`."""
    query = select(ProjectEnvironment).where(ProjectEnvironment.project_id == project_id)
    async with database.tenant(tenant_id) as session:
        _known(await session.get(Project, (tenant_id, project_id)))
        return await pages.turn_to(session, query.order_by(ProjectEnvironment.name), page, page_size)


async def deploy(
    database: Database, tenant_id: uuid.UUID, environment_id: uuid.UUID, version: str, *, by: uuid.UUID | None = None
) -> Deployment:
    """Make the environment's configuration of now count: it, over the project's, is kept as it stands.

    The deployment before is superseded. Raises `BadInput`, `NotFound`.
    """
    words(version, "version", 1, 100)
    async with database.tenant(tenant_id) as session:
        place = await _place(session, environment_id)
        project = await session.get_one(Project, (tenant_id, place.project_id))
        return await _deploy(session, place, version, {**project.config, **place.config}, by)


async def promote(
    database: Database, tenant_id: uuid.UUID, deployment_id: uuid.UUID, to: uuid.UUID, *, by: uuid.UUID | None = None
) -> Deployment:
    """Make what was deployed in one environment count in another of the project, exactly as it was. Raises `NotFound`.

    To the environment it came from, this goes back to it.
    """
    async with database.tenant(tenant_id) as session:
        given = await session.get(Deployment, (tenant_id, deployment_id))
        place = await _place(session, to)
        if given is None or given.project_id != place.project_id:
            raise NotFound("The project has no such deployment.", param="deployment_id")
        return await _deploy(session, place, given.version, given.config, by)


async def deployments(
    database: Database, tenant_id: uuid.UUID, project_id: uuid.UUID, page: int = 1, page_size: int = 20
) -> Page[Deployment]:
    """What was deployed of the project, the newest first. Raises `BadInput`, `NotFound`."""
    query = select(Deployment).where(Deployment.project_id == project_id)
    async with database.tenant(tenant_id) as session:
        _known(await session.get(Project, (tenant_id, project_id)))
        return await pages.turn_to(
            session, query.order_by(Deployment.created_at.desc(), Deployment.id), page, page_size
        )


async def _place(session: AsyncSession, environment_id: uuid.UUID) -> ProjectEnvironment:
    """The environment, locked: of two deployments at once one comes after the other.

    Whoever removes a project locks it before its environments, and so must this, or each could wait for the other.
    """
    of = select(ProjectEnvironment.project_id).where(ProjectEnvironment.id == environment_id).scalar_subquery()
    await session.execute(select(Project.id).where(Project.id == of).with_for_update(read=True, key_share=True))
    query = select(ProjectEnvironment).where(ProjectEnvironment.id == environment_id).with_for_update(key_share=True)
    found = (await session.execute(query)).scalar_one_or_none()
    if found is None:
        raise NotFound("There is no such environment.", param="environment_id")
    return found


async def _deploy(
    session: AsyncSession, place: ProjectEnvironment, version: str, config: dict[str, Any], by: uuid.UUID | None
) -> Deployment:
    await session.execute(
        change(Deployment)
        .where(Deployment.environment_id == place.id, Deployment.status == DeploymentStatus.ACTIVE)
        .values(status=DeploymentStatus.SUPERSEDED)
    )
    made = Deployment(
        id=uuid.uuid4(),
        project_id=place.project_id,
        environment_id=place.id,
        version=version,
        config=config,
        deployed_by=by or audit.actor().id,
    )
    session.add(made)
    await session.flush()
    await session.refresh(made)
    new = {"project_id": place.project_id, "environment": place.name, "version": version}
    await audit.append(session, Action.CREATE, "deployment", made.id, f"Deployed {version} to {place.name}", new=new)
    return made


async def _locked(session: AsyncSession, project_id: uuid.UUID) -> Project:
    found = await session.execute(select(Project).where(Project.id == project_id).with_for_update())
    return _known(found.scalar_one_or_none())


async def _summaries(session: AsyncSession, projects: list[Project]) -> list[Summary]:
    ids = [project.id for project in projects]
    counted: dict[str, dict[uuid.UUID, int]] = {}
    for name, owned, counts in (
        ("keys", ApiKey.project_id, ApiKey.revoked_at.is_(None)),
        ("sessions", Session.project_id, true()),
    ):
        query = select(owned, func.count()).where(owned.in_(ids), counts).group_by(owned)
        counted[name] = {project: count for project, count in await session.execute(query) if project is not None}
    return [
        Summary(project, counted["keys"].get(project.id, 0), counted["sessions"].get(project.id, 0))
        for project in projects
    ]


def _shown(project: Project) -> dict[str, Any]:
    return {"name": project.name, "environment": project.environment, "config": project.config}


def _known(project: Project | None) -> Project:
    if project is None:
        raise NotFound("There is no such project.", param="project_id")
    return project
