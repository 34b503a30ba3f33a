"""The parts of a tenant's work, the places where they run, and what runs there."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response
from msgspec import UNSET, Meta, UnsetType

from agentvoicebox.admin_api import auth, schemas
from agentvoicebox.admin_api.auth import Visiting
from agentvoicebox.admin_api.listings import Listing, Paged, View, listing
from agentvoicebox.admin_api.schemas import Body
from agentvoicebox.admin_api.stores import Store
from agentvoicebox.admin_api.usage import Summary as UsageSummary
from agentvoicebox.config.errors import BadInput, NotFound
from agentvoicebox.tenancy import projects, usage
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.models import DeploymentStatus, Environment, ProjectEnvironment
from agentvoicebox.tenancy.models import Project as Row
from agentvoicebox.tenancy.usage import Period

router = APIRouter(prefix="/api/v2/projects", tags=["projects"])

ProjectName = Annotated[str, Meta(min_length=1, max_length=255)]
PlaceName = Annotated[str, Meta(min_length=1, max_length=100)]


class NewProject(Body):
    """What a project is to be."""

    name: ProjectName
    environment: Environment = Environment.DEVELOPMENT
    config: dict[str, Any] = msgspec.field(default_factory=dict)


class ProjectChange(Body):
    """What is to be different about a project."""

    name: ProjectName | UnsetType = UNSET
    environment: Environment | UnsetType = UNSET
    config: dict[str, Any] | UnsetType = UNSET


class NewEnvironment(Body):
    """A place where the project is to run."""

    name: PlaceName
    config: dict[str, Any] = msgspec.field(default_factory=dict)


class NewDeployment(Body):
    """What is to run: the environment's configuration of now as `version`, or exactly what `deployment_id` was."""

    environment_id: uuid.UUID
    version: Annotated[str, Meta(min_length=1, max_length=100)] | UnsetType = UNSET
    deployment_id: uuid.UUID | UnsetType = UNSET


class Project(View):
    """A project."""

    id: uuid.UUID
    name: str
    environment: Environment
    config: dict[str, Any]
    is_default: bool
    default_persona_id: uuid.UUID | None
    """Who answers in its sessions, unless a session says otherwise; none for the tenant's default."""
    created_at: datetime
    updated_at: datetime


class ProjectSummary(Project):
    """A project, and how much belongs to it."""

    key_count: int
    session_count: int


class Place(View):
    """Where a project runs."""

    id: uuid.UUID
    project_id: uuid.UUID
    name: str
    config: dict[str, Any]
    created_at: datetime
    updated_at: datetime


class Deployment(View):
    """What was made to run, as it stood."""

    id: uuid.UUID
    project_id: uuid.UUID
    environment_id: uuid.UUID
    version: str
    status: DeploymentStatus
    config: dict[str, Any]
    deployed_by: uuid.UUID | None
    created_at: datetime


@router.post(
    "", status_code=201, dependencies=auth.may("tenant.create_project"), openapi_extra=schemas.document(NewProject)
)
async def create_project(request: Request, visit: Visiting, store: Store) -> Project:
    """Make a project."""
    wanted = await schemas.read(request, NewProject)
    return _shown(await projects.create(store, visit.tenant_id, wanted.name, wanted.environment, wanted.config))


@router.get("", dependencies=auth.may("project.view"))
async def list_projects(visit: Visiting, store: Store, paging: Paged) -> Listing[ProjectSummary]:
    """The tenant's projects, the default one first, then the newest."""
    return listing(_summed, await projects.list_(store, visit.tenant_id, paging.page, paging.size))


@router.get("/{project_id:uuid}", dependencies=auth.may("project.view"))
async def read_project(visit: Visiting, store: Store, project_id: uuid.UUID) -> ProjectSummary:
    """One project."""
    return _summed(await projects.get(store, visit.tenant_id, project_id))


@router.patch(
    "/{project_id:uuid}", dependencies=auth.may("project.develop"), openapi_extra=schemas.document(ProjectChange)
)
async def change_project(request: Request, visit: Visiting, store: Store, project_id: uuid.UUID) -> Project:
    """Change a project, at once."""
    changes = schemas.changes(await schemas.read(request, ProjectChange))
    return _shown(await projects.update(store, visit.tenant_id, project_id, **changes))


@router.delete("/{project_id:uuid}", status_code=204, dependencies=auth.may("project.delete"))
async def remove_project(visit: Visiting, store: Store, project_id: uuid.UUID, revoke_keys: bool = False) -> Response:
    """Remove a project; its sessions and usage stay, and so do its keys unless they are to be revoked."""
    await projects.delete(store, visit.tenant_id, project_id, revoke_keys=revoke_keys)
    return Response(status_code=204)


@router.get("/{project_id:uuid}/usage", dependencies=auth.may("project.view"))
async def read_project_usage(
    visit: Visiting, store: Store, project_id: uuid.UUID, period: Period = Period.MONTH
) -> UsageSummary:
    """What the project used."""
    await projects.get(store, visit.tenant_id, project_id)
    return UsageSummary.model_validate(await usage.summary(store, visit.tenant_id, period, project_id))


@router.post(
    "/{project_id:uuid}/environments",
    status_code=201,
    dependencies=auth.may("project.develop"),
    openapi_extra=schemas.document(NewEnvironment),
)
async def add_environment(request: Request, visit: Visiting, store: Store, project_id: uuid.UUID) -> Place:
    """Add a place where the project runs."""
    wanted = await schemas.read(request, NewEnvironment)
    made = await projects.add_environment(store, visit.tenant_id, project_id, wanted.name, wanted.config)
    return Place.model_validate(made)


@router.get("/{project_id:uuid}/environments", dependencies=auth.may("project.view"))
async def list_environments(visit: Visiting, store: Store, paging: Paged, project_id: uuid.UUID) -> Listing[Place]:
    """Where the project runs."""
    found = await projects.environments(store, visit.tenant_id, project_id, paging.page, paging.size)
    return listing(Place.model_validate, found)


@router.post(
    "/{project_id:uuid}/deployments",
    status_code=201,
    dependencies=auth.may("project.develop"),
    openapi_extra=schemas.document(NewDeployment),
)
async def deploy(request: Request, visit: Visiting, store: Store, project_id: uuid.UUID) -> Deployment:
    """Make a configuration count; the one before is superseded."""
    wanted = await schemas.read(request, NewDeployment)
    place = wanted.environment_id
    await _check_place(store, visit.tenant_id, project_id, place)
    if wanted.deployment_id is not UNSET:
        made = await projects.promote(store, visit.tenant_id, wanted.deployment_id, place)
    elif wanted.version is not UNSET:
        made = await projects.deploy(store, visit.tenant_id, place, wanted.version)
    else:
        raise BadInput("Name the version to deploy, or the deployment_id of an earlier one.", param="version")
    return Deployment.model_validate(made)


@router.get("/{project_id:uuid}/deployments", dependencies=auth.may("project.view"))
async def list_deployments(visit: Visiting, store: Store, paging: Paged, project_id: uuid.UUID) -> Listing[Deployment]:
    """What was deployed, the newest first."""
    found = await projects.deployments(store, visit.tenant_id, project_id, paging.page, paging.size)
    return listing(Deployment.model_validate, found)


async def _check_place(store: Database, tenant_id: uuid.UUID, project_id: uuid.UUID, place: uuid.UUID) -> None:
    """Raise `NotFound` unless the environment is one of the project that the path names."""
    async with store.tenant(tenant_id) as session:
        found = await session.get(ProjectEnvironment, (tenant_id, place))
    if found is None or found.project_id != project_id:
        raise NotFound("The project has no such environment.", param="environment_id")


def _shown(row: Row) -> Project:
    return Project.model_validate(row)


def _summed(found: projects.Summary) -> ProjectSummary:
    return ProjectSummary(**_shown(found.project).model_dump(), key_count=found.keys, session_count=found.sessions)
