"""Personas: who answers what no skill answers, and where."""

from __future__ import annotations

import base64
import uuid
from dataclasses import replace
from datetime import datetime
from typing import Annotated

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response
from msgspec import UNSET, Meta, UnsetType

from agentvoicebox.admin_api import auth, llm, schemas, speech
from agentvoicebox.admin_api.auth import Visiting
from agentvoicebox.admin_api.listings import Listing, Paged, View, listing
from agentvoicebox.admin_api.projects import Project
from agentvoicebox.admin_api.schemas import Body
from agentvoicebox.admin_api.stores import Store
from agentvoicebox.admin_api.voice import Speed
from agentvoicebox.bus_bridge.models import SessionSettings
from agentvoicebox.config.errors import BadInput
from agentvoicebox.tenancy import personas, voices
from agentvoicebox.tenancy.models import Persona as Row
from agentvoicebox.tenancy.models import PersonaStatus
from agentvoicebox.tenancy.personas import Character

router = APIRouter(tags=["personas"])

_PATH = "/api/v2/personas"
_ONE = _PATH + "/{persona_id:uuid}"

_BODY = 512 * 1024
"""Bytes of a body: prompt and knowledge at their longest, in any script."""

Name = Annotated[str, Meta(min_length=1, max_length=100)]
Description = Annotated[str, Meta(max_length=personas.LONGEST_DESCRIPTION)]
Prompt = Annotated[str, Meta(max_length=personas.LONGEST_PROMPT)]
Knowledge = Annotated[str, Meta(max_length=personas.LONGEST_KNOWLEDGE)]
VoiceOrNone = Annotated[str, Meta(pattern=f"^({voices.NAME.pattern})?$")]
"""Empty for the tenant's, as are a language that is empty and a speed of null."""
LanguageOrNone = Annotated[str, Meta(pattern=f"^({voices.LANGUAGE.pattern})?$")]
Solvers = Annotated[
    list[Annotated[str, Meta(pattern=f"^{personas.SOLVER.pattern}$")]],
    Meta(min_length=1, max_length=personas.MOST_SOLVERS),
]
"""In this order: `llm` is the language model, the others are names of solver plugins; none twice."""


class NewPersona(Body):
    """What a persona is to be like."""

    name: Name
    description: Description = ""
    status: PersonaStatus = PersonaStatus.ACTIVE
    system_prompt: Prompt = ""
    knowledge: Knowledge = ""
    voice: VoiceOrNone = ""
    speed: Speed | None = None
    language: LanguageOrNone = ""
    solvers: Solvers = msgspec.field(default_factory=lambda: [personas.LLM])


class PersonaChange(Body):
    """What is to be different about a persona."""

    name: Name | UnsetType = UNSET
    description: Description | UnsetType = UNSET
    status: PersonaStatus | UnsetType = UNSET
    system_prompt: Prompt | UnsetType = UNSET
    knowledge: Knowledge | UnsetType = UNSET
    voice: VoiceOrNone | UnsetType = UNSET
    speed: Speed | UnsetType | None = UNSET
    language: LanguageOrNone | UnsetType = UNSET
    solvers: Solvers | UnsetType = UNSET


class Trial(Body):
    """Something said to a persona, and whether its answer is to be spoken too."""

    message: Annotated[str, Meta(min_length=1, max_length=speech.LONGEST_TEXT)]
    audio: bool = False


class ProjectDefault(Body):
    """Who answers in the project's sessions; null for the tenant's default."""

    persona_id: uuid.UUID | None


class PersonaSummary(View):
    """A persona in a list."""

    id: uuid.UUID
    name: str
    description: str
    status: PersonaStatus
    voice: str
    usage_count: int
    """Sessions that it began."""
    is_default: bool


class Persona(PersonaSummary):
    """A persona. Empty voice and language and no speed are the tenant's."""

    system_prompt: str
    knowledge: str
    speed: float | None
    language: str
    solvers: list[str]
    owner_id: uuid.UUID | None
    created_at: datetime
    updated_at: datetime


class Reassigned(View):
    """How many projects and open sessions have the tenant's default instead."""

    reassigned: int


class Reply(llm.Reply):
    """What the persona said; `audio` is a WAV file in base64, where it was asked for."""

    audio: str | None = None


class Solver(View):
    """Somebody whom a persona can ask."""

    id: str
    name: str
    installed: bool


class SolverList(View):
    """Everybody whom a persona can ask, beside the language model."""

    items: list[Solver]


@router.post(
    _PATH,
    status_code=201,
    dependencies=auth.may("tenant.configure_voice", body=_BODY),
    openapi_extra=schemas.document(NewPersona),
)
async def create_persona(request: Request, visit: Visiting, store: Store) -> Persona:
    """Make a persona."""
    wanted = schemas.changes(await schemas.read(request, NewPersona))
    _check_solvers(request, wanted["solvers"])
    made = await personas.create(store, visit.tenant_id, Character(**{**wanted, "solvers": tuple(wanted["solvers"])}))
    speech.forget(request, visit)
    return Persona.model_validate(made)


@router.get(_PATH, dependencies=auth.may("persona.view"))
async def list_personas(visit: Visiting, store: Store, paging: Paged) -> Listing[PersonaSummary]:
    """The tenant's personas, the default one first, then by name."""
    found = await personas.list_(store, visit.tenant_id, paging.page, paging.size)
    return listing(PersonaSummary.model_validate, found)


@router.get(_PATH + "/solvers", dependencies=auth.may("persona.view"))
async def list_solvers(request: Request) -> SolverList:
    """Whom a persona can ask beside the language model, and who of them is installed here."""
    return SolverList(items=[Solver.model_validate(each) for each in speech.solvers(request).installed()])


@router.get(_ONE, dependencies=auth.may("persona.view"))
async def read_persona(visit: Visiting, store: Store, persona_id: uuid.UUID) -> Persona:
    """One persona."""
    return Persona.model_validate(await personas.get(store, visit.tenant_id, persona_id))


@router.patch(_ONE, dependencies=auth.may("persona.edit", body=_BODY), openapi_extra=schemas.document(PersonaChange))
async def change_persona(request: Request, visit: Visiting, store: Store, persona_id: uuid.UUID) -> Persona:
    """Change a persona; answers that begin from now on are as it is then."""
    changes = schemas.changes(await schemas.read(request, PersonaChange))
    if "solvers" in changes:
        _check_solvers(request, changes["solvers"])
        changes["solvers"] = tuple(changes["solvers"])
    changed = await personas.update(store, visit.tenant_id, persona_id, changes)
    speech.forget(request, visit)
    return Persona.model_validate(changed)


@router.delete(_ONE, dependencies=auth.may("persona.delete"))
async def remove_persona(request: Request, visit: Visiting, store: Store, persona_id: uuid.UUID) -> Reassigned:
    """Remove a persona that is not the default; what refers to it has the tenant's default from then on."""
    moved = await personas.delete(store, visit.tenant_id, persona_id)
    speech.forget(request, visit)
    return Reassigned(reassigned=moved)


@router.post(_ONE + "/default", dependencies=auth.may("persona.edit"))
async def make_default(request: Request, visit: Visiting, store: Store, persona_id: uuid.UUID) -> Persona:
    """Let it answer wherever nobody has chosen another."""
    made = await personas.make_default(store, visit.tenant_id, persona_id)
    speech.forget(request, visit)
    return Persona.model_validate(made)


@router.delete(_ONE + "/default", dependencies=auth.may("persona.edit"))
async def unmake_default(request: Request, visit: Visiting, store: Store, persona_id: uuid.UUID) -> Persona:
    """Let the platform's own assistant answer where nobody has chosen one."""
    made = await personas.unmake_default(store, visit.tenant_id, persona_id)
    speech.forget(request, visit)
    return Persona.model_validate(made)


@router.post(
    _ONE + "/test",
    dependencies=auth.may("persona.use"),
    openapi_extra=schemas.document(Trial),
    responses=speech.FAILED,
)
async def try_persona(request: Request, visit: Visiting, store: Store, persona_id: uuid.UUID) -> Reply:
    """What a persona says to something; it remembers nothing of it. Metered as any answer."""
    wanted = await schemas.read(request, Trial)
    persona = await personas.get(store, visit.tenant_id, persona_id)
    begin = await _as(persona, request, visit, store) if wanted.audio else None
    reply = await llm.answer(request, visit, [{"role": "user", "content": wanted.message}], persona=persona)
    if begin is None:
        return Reply(**reply.model_dump())
    audio = await speech.spoken(request, visit, reply.reply, begin)
    return Reply(**reply.model_dump(), audio=base64.b64encode(audio).decode())


@router.get(
    _ONE + "/preview",
    dependencies=auth.may("persona.use"),
    response_class=Response,
    responses=speech.WAV,
)
async def preview_persona(request: Request, visit: Visiting, store: Store, persona_id: uuid.UUID) -> Response:
    """How the persona sounds; metered as speech."""
    persona = await personas.get(store, visit.tenant_id, persona_id)
    return await speech.clip(request, visit, await _as(persona, request, visit, store))


@router.put(
    "/api/v2/projects/{project_id:uuid}/default-persona",
    dependencies=auth.may("project.develop"),
    openapi_extra=schemas.document(ProjectDefault),
)
async def set_project_default(request: Request, visit: Visiting, store: Store, project_id: uuid.UUID) -> Project:
    """Choose who answers in the project's sessions, unless a session says otherwise."""
    wanted = await schemas.read(request, ProjectDefault)
    changed = await personas.set_project_default(store, visit.tenant_id, project_id, wanted.persona_id)
    speech.forget(request, visit)
    return Project.model_validate(changed)


def _check_solvers(request: Request, wanted: list[str]) -> None:
    """Raises `BadInput` for whom nobody knows, here or elsewhere; who is offered may be installed later."""
    if request.app.state.solvers is None:
        return
    known = {personas.LLM, *(each.id for each in request.app.state.solvers.installed())}
    if unknown := [each for each in wanted if each not in known]:
        raise BadInput(
            f"There is no solver {unknown[0]!r}: it is {personas.LLM} or an id of /api/v2/personas/solvers.",
            param="solvers",
        )


async def _as(persona: Row, request: Request, visit: Visiting, store: Store) -> SessionSettings:
    """How the persona speaks. Raises `AvbError`."""
    begin = await speech.begin(request, visit, store)
    return replace(
        begin,
        voice=persona.voice or begin.voice,
        speed=persona.speed or begin.speed,
        language=persona.language or begin.language,
    )
