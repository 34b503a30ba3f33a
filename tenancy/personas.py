"""Who answers: a tenant's personas, which of them is meant, and how often each was.

A session's own persona comes before its project's, and that before the tenant's default; with none of them there is no
persona, and the platform's own answers. A disabled one is passed over.
"""

from __future__ import annotations

import re
import unicodedata
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from sqlalchemy import CursorResult, case, func, or_, select, text
from sqlalchemy import delete as erase
from sqlalchemy import update as change
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import load_only

from agentvoicebox.config.errors import BadInput, Conflict, NotFound
from agentvoicebox.tenancy import audit, pages, tenants
from agentvoicebox.tenancy.checks import chosen, identifier, shaped, words
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.models import Action, ActorType, Persona, PersonaStatus, Project, Session
from agentvoicebox.tenancy.pages import Page
from agentvoicebox.tenancy.sessions import OPEN
from agentvoicebox.tenancy.voices import LANGUAGE, NAME, check_speed

MOST = 100
"""Personas of one tenant."""
MOST_SOLVERS = 10
LONGEST_DESCRIPTION = 1_000
LONGEST_PROMPT = 16_000
LONGEST_KNOWLEDGE = 64_000
"""Characters, all three."""

LLM = "llm"
"""Stands among the solvers for the language model."""

SESSION_FIELD = "persona_id"
"""Where the configuration of a session names its persona, by id or name."""

_LONG = ("system_prompt", "knowledge")
"""Of these the audit log tells the length alone."""
_LISTED = ("id", "name", "description", "status", "voice", "usage_count", "is_default")
SOLVER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")

# Locked in one order, so that two nodes that count the same never wait for each other.
_COUNT = text("""
WITH counted AS (
    SELECT p.tenant_id, p.id, used.n
    FROM unnest(CAST(:tenants AS uuid[]), CAST(:ids AS uuid[]), CAST(:counts AS bigint[])) AS used (tenant_id, id, n)
    JOIN personas p ON p.tenant_id = used.tenant_id AND p.id = used.id
    ORDER BY p.tenant_id, p.id
    FOR NO KEY UPDATE OF p
)
UPDATE personas SET usage_count = usage_count + counted.n
FROM counted WHERE personas.tenant_id = counted.tenant_id AND personas.id = counted.id
""")


@dataclass(frozen=True, slots=True)
class Character:
    """What a persona is like; a value that makes no sense raises `BadInput` naming its field."""

    name: str
    description: str = ""
    status: str = PersonaStatus.ACTIVE
    system_prompt: str = ""
    knowledge: str = ""
    """What it knows beyond its model."""
    voice: str = ""
    """Empty for the tenant's, as are speed (None) and language."""
    speed: float | None = None
    """0.5 to 2.0 times the voice's own."""
    language: str = ""
    """A BCP 47 tag."""
    solvers: tuple[str, ...] = (LLM,)
    """Who is asked, in this order: `llm` is the language model, the others are solver plugins."""

    def __post_init__(self) -> None:
        words(self.name, "name", 1, 100)
        _prose(self.description, "description", LONGEST_DESCRIPTION)
        object.__setattr__(self, "status", chosen(self.status, "status", PersonaStatus))
        _prose(self.system_prompt, "system_prompt", LONGEST_PROMPT)
        _prose(self.knowledge, "knowledge", LONGEST_KNOWLEDGE)
        if self.voice != "":
            shaped(self.voice, "voice", NAME, "a name of letters, digits and . _ + -, at most 64 characters, or empty")
        if self.speed is not None:
            check_speed(self.speed)
        if self.language != "":
            shaped(self.language, "language", LANGUAGE, "a language tag such as en-US, or empty")
        _check_solvers(self.solvers)


async def create(database: Database, tenant_id: uuid.UUID, character: Character) -> Persona:
    """Make a persona.

    Raises `NotFound` for an unknown tenant, `Conflict` for a name that is taken (`persona_exists`) and when the tenant
    has 100 (`too_many_personas`).
    """
    who = audit.actor()
    persona = Persona(id=uuid.uuid4(), owner_id=who.id if who.type == ActorType.USER else None, **_columns(character))
    async with database.tenant(tenant_id) as session:
        await tenants.lock(session, tenant_id)
        taken = await _names(session)
        if len(taken) >= MOST:
            raise Conflict(f"A tenant has at most {MOST} personas; remove one first.", code="too_many_personas")
        _check_free(character.name, taken)
        session.add(persona)
        await session.flush()
        await session.refresh(persona)
        told = f"Made the persona {character.name}"
        await audit.append(session, Action.CREATE, "persona", persona.id, told, new=_shown(character))
    return persona


async def get(database: Database, tenant_id: uuid.UUID, persona_id: uuid.UUID) -> Persona:
    """One persona. Raises `NotFound`."""
    async with database.tenant(tenant_id) as session:
        return _known(await session.get(Persona, (tenant_id, persona_id)))


async def list_(database: Database, tenant_id: uuid.UUID, page: int = 1, page_size: int = 20) -> Page[Persona]:
    """The tenant's personas, without prompts and knowledge, the default one first, then by name. Raises `BadInput`."""
    columns = load_only(*(getattr(Persona, name) for name in _LISTED), raiseload=True)
    query = select(Persona).options(columns).order_by(Persona.is_default.desc(), Persona.name, Persona.id)
    async with database.tenant(tenant_id) as session:
        return await pages.turn_to(session, query, page, page_size)


async def update(
    database: Database, tenant_id: uuid.UUID, persona_id: uuid.UUID, changes: Mapping[str, Any]
) -> Persona:
    """Change these fields of `Character`, at once; the others stay.

    Raises `BadInput`, `NotFound`, and `Conflict` for a name that is taken (`persona_exists`) or a default one that is
    to be disabled (`persona_is_default`).
    """
    for name in changes:
        if name not in Character.__dataclass_fields__:
            raise BadInput(f"A persona has no field {str(name)[:50]!r}.", param=str(name)[:50])
    async with database.tenant(tenant_id) as session:
        persona = await _locked(session, tenant_id, persona_id)
        before = _character(persona)
        after = replace(before, **changes)
        if persona.is_default and after.status != PersonaStatus.ACTIVE:
            raise _is_default()
        taken = await _names(session)
        taken.pop(persona_id)
        _check_free(after.name, taken)
        old, new = asdict(before), asdict(after)
        if changed := [name for name in new if old[name] != new[name]]:
            await session.execute(change(Persona).where(Persona.id == persona_id).values(_columns(after)))
            await session.refresh(persona)
            shown_before, shown = _shown(before), _shown(after)
            await audit.append(
                session,
                Action.UPDATE,
                "persona",
                persona_id,
                f"Changed {', '.join(changed)}",
                old={name: shown_before[name] for name in changed},
                new={name: shown[name] for name in changed},
            )
    return persona


async def delete(database: Database, tenant_id: uuid.UUID, persona_id: uuid.UUID) -> int:
    """Remove a persona; returns how many references to it are gone.

    Projects whose default it was, and open sessions that name it, have the tenant's default from then on. Raises
    `NotFound`, `Conflict` (`persona_is_default`) while it is that itself.
    """
    async with database.tenant(tenant_id) as session:
        persona = await _locked(session, tenant_id, persona_id)
        if persona.is_default:
            raise _is_default()
        projects = await session.execute(
            change(Project).where(Project.default_persona_id == persona_id).values(default_persona_id=None)
        )
        moved = _count(projects) + await _leave_sessions(session, persona)
        await session.execute(erase(Persona).where(Persona.id == persona_id))
        await audit.append(
            session,
            Action.DELETE,
            "persona",
            persona_id,
            f"Removed the persona {persona.name}",
            old=_shown(_character(persona)),
            details={"reassigned": moved},
        )
    return moved


async def make_default(database: Database, tenant_id: uuid.UUID, persona_id: uuid.UUID) -> Persona:
    """Let it answer wherever nobody has chosen another. Raises `NotFound`, `Conflict` (`persona_disabled`)."""
    async with database.tenant(tenant_id) as session:
        persona = _active(await _locked(session, tenant_id, persona_id))
        if not persona.is_default:
            # In this order: the index takes no two of them, not even for a moment.
            await session.execute(change(Persona).where(Persona.is_default).values(is_default=False))
            await session.execute(change(Persona).where(Persona.id == persona_id).values(is_default=True))
            await session.refresh(persona)
            told = f"Made {persona.name} the default"
            await audit.append(session, Action.UPDATE, "persona", persona_id, told, new={"is_default": True})
    return persona


async def unmake_default(database: Database, tenant_id: uuid.UUID, persona_id: uuid.UUID) -> Persona:
    """Let the platform's own answer where nobody has chosen one. Raises `NotFound`."""
    async with database.tenant(tenant_id) as session:
        persona = await _locked(session, tenant_id, persona_id)
        if persona.is_default:
            await session.execute(change(Persona).where(Persona.id == persona_id).values(is_default=False))
            await session.refresh(persona)
            told = f"{persona.name} is not the default any more"
            await audit.append(session, Action.UPDATE, "persona", persona_id, told, new={"is_default": False})
    return persona


async def set_project_default(
    database: Database, tenant_id: uuid.UUID, project_id: uuid.UUID, persona_id: uuid.UUID | None
) -> Project:
    """Let it answer in the project's sessions; None for the tenant's default.

    Raises `NotFound`, `Conflict` (`persona_disabled`).
    """
    async with database.tenant(tenant_id) as session:
        # In this order everywhere: who removes the persona holds the same lock before it comes to the project.
        await tenants.lock(session, tenant_id)
        if persona_id is not None:
            _active(_known(await session.get(Persona, (tenant_id, persona_id))))
        query = select(Project).where(Project.id == project_id).with_for_update(key_share=True)
        project = (await session.execute(query)).scalar_one_or_none()
        if project is None:
            raise NotFound("There is no such project.", param="project_id")
        if project.default_persona_id != persona_id:
            old = project.default_persona_id
            await session.execute(change(Project).where(Project.id == project_id).values(default_persona_id=persona_id))
            await session.refresh(project)
            await audit.append(
                session,
                Action.UPDATE,
                "project",
                project_id,
                "Changed default_persona_id",
                old={"default_persona_id": old},
                new={"default_persona_id": persona_id},
            )
    return project


async def resolve(
    database: Database,
    tenant_id: uuid.UUID,
    project_id: uuid.UUID | None = None,
    session_persona: uuid.UUID | str | None = None,
) -> Persona | None:
    """Who answers: the session's persona (by id or name), else the project's, else the tenant's default, else nobody.

    What is disabled, unknown or another tenant's is passed over. Raises `Unavailable`.
    """
    async with database.tenant(tenant_id) as session:
        own = await _named(session, session_persona) if session_persona else None
        of_project = select(Project.default_persona_id).where(Project.id == project_id).scalar_subquery()
        query = (
            select(Persona)
            .where(
                Persona.status == PersonaStatus.ACTIVE,
                or_(Persona.id == own, Persona.id == of_project, Persona.is_default),
            )
            .order_by(case((Persona.id == own, 0), (Persona.id == of_project, 1), else_=2))
            .limit(1)
        )
        return (await session.execute(query)).scalar_one_or_none()


async def names(database: Database, tenant_id: uuid.UUID) -> list[tuple[uuid.UUID, str]]:
    """Who can be asked for: ids and names of the personas that are not disabled, by name."""
    query = select(Persona.id, Persona.name).where(Persona.status == PersonaStatus.ACTIVE).order_by(Persona.name)
    async with database.tenant(tenant_id) as session:
        return [(id_, name) for id_, name in await session.execute(query)]


async def count_uses(database: Database, uses: Mapping[tuple[uuid.UUID, uuid.UUID], int]) -> None:
    """Add to how many sessions each persona, by tenant and id, began; one that is gone is passed over."""
    if not uses:
        return
    given = {
        "tenants": [tenant_id for tenant_id, _ in uses],
        "ids": [persona_id for _, persona_id in uses],
        "counts": list(uses.values()),
    }
    async with database.system() as session:
        await session.execute(_COUNT, given)


def alike(one: str, other: str) -> bool:
    """Whether two names are the same to somebody who says or types them."""
    return _folded(one) == _folded(other)


def _folded(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


async def _named(session: AsyncSession, wanted: uuid.UUID | str) -> uuid.UUID | None:
    try:
        return identifier(wanted, SESSION_FIELD)
    except BadInput:
        return next((id_ for id_, name in (await _names(session)).items() if alike(name, str(wanted))), None)


async def _names(session: AsyncSession) -> dict[uuid.UUID, str]:
    """All names of the transaction's tenant; they are few, and databases differ in what letters are alike."""
    return {id_: name for id_, name in await session.execute(select(Persona.id, Persona.name))}


def _check_free(name: str, taken: Mapping[uuid.UUID, str]) -> None:
    if any(alike(name, each) for each in taken.values()):
        raise Conflict(f"There is a persona {name!r} already.", code="persona_exists", param="name")


async def _locked(session: AsyncSession, tenant_id: uuid.UUID, persona_id: uuid.UUID) -> Persona:
    """The persona, while nobody else changes any of the tenant's."""
    await tenants.lock(session, tenant_id)
    query = select(Persona).where(Persona.id == persona_id).with_for_update()
    return _known((await session.execute(query)).scalar_one_or_none())


async def _leave_sessions(session: AsyncSession, persona: Persona) -> int:
    """Take the persona out of the open sessions that name it; how many those were."""
    told = Session.config[SESSION_FIELD].astext
    still_open = Session.status.in_(OPEN), Session.config.has_key(SESSION_FIELD)
    found = (await session.execute(select(told).where(*still_open).distinct())).scalars()
    meant = [each for each in found if each and (each.lower() == str(persona.id) or alike(each, persona.name))]
    if not meant:
        return 0
    without = func.jsonb_delete(Session.config, SESSION_FIELD, type_=JSONB)
    return _count(await session.execute(change(Session).where(*still_open, told.in_(meant)).values(config=without)))


def _count(result: Any) -> int:
    assert isinstance(result, CursorResult)
    return result.rowcount


def _character(persona: Persona) -> Character:
    stored = {field.name: getattr(persona, field.name) for field in fields(Character)}
    return Character(**{**stored, "solvers": tuple(persona.solvers)})


def _columns(character: Character) -> dict[str, Any]:
    return {**asdict(character), "solvers": list(character.solvers)}


def _shown(character: Character) -> dict[str, Any]:
    """What the audit log may hold of it."""
    return {name: f"{len(value)} characters" if name in _LONG else value for name, value in asdict(character).items()}


def _prose(value: object, param: str, longest: int) -> None:
    """Text of several lines."""
    if not isinstance(value, str) or len(value) > longest:
        raise BadInput(f"{param} must be text of at most {longest} characters.", param=param)
    if _CONTROLS.search(value):
        raise BadInput(f"{param} must not hold control characters other than line breaks and tabs.", param=param)


def _check_solvers(given: object) -> None:
    if not isinstance(given, tuple) or not 1 <= len(given) <= MOST_SOLVERS:
        raise BadInput(f"solvers must be a list of 1 to {MOST_SOLVERS}.", param="solvers")
    for solver in given:
        shaped(solver, "solvers", SOLVER, f"{LLM} or names of solver plugins")
    if len(set(given)) < len(given):
        raise BadInput("solvers must not name one twice.", param="solvers")


def _active(persona: Persona) -> Persona:
    if persona.status != PersonaStatus.ACTIVE:
        raise Conflict("The persona is disabled; make it active first.", code="persona_disabled", param="status")
    return persona


def _is_default() -> Conflict:
    return Conflict("The persona is the tenant's default; make another one that first.", code="persona_is_default")


def _known(persona: Persona | None) -> Persona:
    if persona is None:
        raise NotFound("There is no such persona.", param="persona_id")
    return persona
