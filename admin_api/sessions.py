"""Voice sessions: a client creates one and connects to its socket; others look at it, and may end it."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import datetime
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse
from msgspec import UNSET, Meta, UnsetType

from agentvoicebox.admin_api import auth, schemas
from agentvoicebox.admin_api.auth import Visiting
from agentvoicebox.admin_api.listings import CSV, Listing, Paged, View, csv_stream, listing
from agentvoicebox.admin_api.schemas import Body
from agentvoicebox.admin_api.stores import Store
from agentvoicebox.bus_bridge.native import SessionConfig
from agentvoicebox.config.errors import Forbidden
from agentvoicebox.tenancy import sessions
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.keyring import Grant
from agentvoicebox.tenancy.models import EventType, SessionStatus, VoiceProvider
from agentvoicebox.tenancy.models import Session as Row
from agentvoicebox.tenancy.sessions import Filter

router = APIRouter(tags=["sessions"])

_PATH = "/api/v2/sessions"
_OLD = "/api/v2/voice/sessions"

_SPOKEN = (EventType.TRANSCRIPT, EventType.RESPONSE)


class SessionChange(Body):
    """What is merged into a session's configuration and context; a null takes an entry away."""

    config: dict[str, Any] | UnsetType = UNSET
    context: dict[str, Any] | UnsetType = UNSET


class Termination(Body):
    """Why a session is ended."""

    reason: Annotated[str, Meta(min_length=1, max_length=50)] = "terminated by request"


class CreatedSession(View):
    """Where to go on."""

    session_id: str
    ws_url: str
    status: SessionStatus


class Metrics(View):
    """What a session has used."""

    duration_seconds: float | None
    audio_duration_seconds: float
    input_tokens: int
    output_tokens: int


class Session(View):
    """A conversation of one client."""

    id: uuid.UUID
    status: SessionStatus
    project_id: uuid.UUID | None
    api_key_id: uuid.UUID | None
    config: dict[str, Any]
    context: dict[str, Any]
    metrics: Metrics
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    termination_reason: str
    error_code: str


class Event(View):
    """One line of a session's history."""

    sequence: int
    event_type: EventType
    content: dict[str, Any]
    timestamp: datetime
    duration_ms: int | None


class Events(View):
    """Some lines of a session's history, in order; the next ones come after the last `sequence`."""

    items: list[Event]


class SessionDetail(Session):
    """A conversation, and the beginning of what was said."""

    transcript: list[Event]


_COLUMNS = (
    "id",
    "status",
    "project_id",
    "api_key_id",
    "created_at",
    "started_at",
    "ended_at",
    "termination_reason",
    "error_code",
    "duration_seconds",
    "audio_duration_seconds",
    "input_tokens",
    "output_tokens",
)


async def _wanted(
    status: Annotated[str | None, Query(pattern="^(created|active|completed|terminated|error|closed)$")] = None,
    project: uuid.UUID | None = None,
    api_key: Annotated[uuid.UUID | None, Query(description="The id of a key.")] = None,
    since: Annotated[datetime | None, Query(alias="from", description="Made then or later; with a time zone.")] = None,
    until: Annotated[datetime | None, Query(alias="to", description="Made before then; with a time zone.")] = None,
) -> Filter:
    return Filter(status=status, project_id=project, api_key_id=api_key, since=since, until=until)


Filtered = Annotated[Filter, Depends(_wanted)]


@router.post(
    _PATH,
    status_code=201,
    dependencies=auth.may("tenant.create_session", "session.terminate"),
    openapi_extra=schemas.document(SessionConfig),
)
@router.post(
    _OLD,
    status_code=201,
    dependencies=auth.may("tenant.create_session", "session.terminate"),
    openapi_extra=schemas.document(SessionConfig),
)
async def create_session(request: Request, visit: Visiting, store: Store) -> CreatedSession:
    """Create a session of the key's tenant. The body chooses voice, model, modality, audio rates and turn detection."""
    config = await schemas.read(request, SessionConfig)
    grant = visit.principal if isinstance(visit.principal, Grant) else None
    if grant is not None and grant.voice_provider == VoiceProvider.DISABLED:
        raise Forbidden("Voice is turned off in the tenant's settings.", code="voice_disabled")
    made = await sessions.create(
        store,
        visit.tenant_id,
        project_id=grant.project_id if grant is not None else None,
        api_key_id=grant.key_id if grant is not None else None,
        config=msgspec.to_builtins(config),
        client_ip=visit.ip,
        user_agent=visit.user_agent,
    )
    address = request.url_for("create_session").replace(scheme="wss" if request.url.scheme == "https" else "ws")
    return CreatedSession(
        session_id=str(made.id),
        ws_url=str(address.replace(path=f"/ws/v2/sessions/{made.id}")),
        status=SessionStatus.CREATED,
    )


@router.get(_PATH, dependencies=auth.may("session.view"))
async def list_sessions(visit: Visiting, store: Store, paging: Paged, wanted: Filtered) -> Listing[Session]:
    """The tenant's sessions, the newest first. The status `closed` stands for all that have ended."""
    return listing(_shown, await sessions.list_(store, visit.tenant_id, wanted, paging.page, paging.size))


@router.get(_PATH + "/export", dependencies=auth.may("session.export"), response_class=StreamingResponse, responses=CSV)
async def export_sessions(visit: Visiting, store: Store, wanted: Filtered) -> StreamingResponse:
    """What is known of the sessions, but not what was said, as a table."""
    return await csv_stream("sessions", _COLUMNS, _rows(store, visit.tenant_id, wanted))


@router.get(_PATH + "/{session_id:uuid}", dependencies=auth.may("session.view"))
@router.get(_OLD + "/{session_id:uuid}", dependencies=auth.may("session.view"))
async def read_session(visit: Visiting, store: Store, session_id: uuid.UUID) -> SessionDetail:
    """One session, and the beginning of what was said in it."""
    row = await sessions.get(store, visit.tenant_id, session_id)
    lines = await sessions.events(store, visit.tenant_id, session_id, most=200)
    spoken = [Event.model_validate(line) for line in lines if line.event_type in _SPOKEN]
    return SessionDetail(**_shown(row).model_dump(), transcript=spoken)


@router.patch(
    _PATH + "/{session_id:uuid}",
    dependencies=auth.may("session.terminate"),
    openapi_extra=schemas.document(SessionChange),
)
async def change_session(request: Request, visit: Visiting, store: Store, session_id: uuid.UUID) -> Session:
    """Change configuration or context of a session that has not ended; who connects from then on has them."""
    changes = schemas.changes(await schemas.read(request, SessionChange))
    if (config := changes.get("config")) is not None:
        # What no client could have asked for at the beginning, it cannot ask for later.
        chosen = {name: value for name, value in config.items() if value is not None}
        schemas.decode(msgspec.json.encode(chosen), SessionConfig)
    return _shown(await sessions.patch(store, visit.tenant_id, session_id, **changes))


@router.get(_PATH + "/{session_id:uuid}/events", dependencies=auth.may("session.view_transcript"))
async def list_events(
    visit: Visiting,
    store: Store,
    session_id: uuid.UUID,
    type: EventType | None = None,
    after_sequence: Annotated[int, Query(ge=-1, le=2**31 - 1)] = -1,
    limit: Annotated[int, Query(ge=1, le=sessions.MOST_EVENTS)] = 100,
) -> Events:
    """What happened in a session, in order."""
    lines = await sessions.events(store, visit.tenant_id, session_id, after=after_sequence, kind=type, most=limit)
    return Events(items=[Event.model_validate(line) for line in lines])


@router.post(
    _PATH + "/{session_id:uuid}/terminate",
    dependencies=auth.may("session.terminate"),
    openapi_extra=schemas.document(Termination),
)
@router.delete(_PATH + "/{session_id:uuid}", dependencies=auth.may("session.terminate"))
async def terminate_session(request: Request, visit: Visiting, store: Store, session_id: uuid.UUID) -> Session:
    """End a session, and the connection of its client."""
    given = await schemas.read(request, Termination) if request.method == "POST" else Termination()
    ended = await sessions.terminate(store, visit.tenant_id, session_id, given.reason)
    if request.app.state.gateway is not None:
        request.app.state.gateway.terminate(session_id, given.reason)
    return _shown(ended)


async def _rows(store: Database, tenant_id: uuid.UUID, wanted: Filter) -> AsyncGenerator[dict[str, Any], None]:
    async with aclosing(sessions.export(store, tenant_id, wanted)) as found:
        async for row in found:
            yield {column: getattr(row, column) for column in _COLUMNS}


def _shown(row: Row) -> Session:
    return Session(
        id=row.id,
        status=row.status,
        project_id=row.project_id,
        api_key_id=row.api_key_id,
        config=row.config,
        context=row.context,
        metrics=Metrics.model_validate(row),
        created_at=row.created_at,
        started_at=row.started_at,
        ended_at=row.ended_at,
        termination_reason=row.termination_reason,
        error_code=row.error_code,
    )
