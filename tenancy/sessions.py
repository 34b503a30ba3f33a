"""The record of conversations: their state, and what was said, which never leaves the database for a log."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, case, extract, func, select, text, update
from sqlalchemy.exc import IntegrityError

from agentvoicebox.config.errors import BadInput, Conflict, NotFound
from agentvoicebox.tenancy.database import Database, sqlstate
from agentvoicebox.tenancy.models import EventType, Session, SessionEvent, SessionStatus

OPEN = (SessionStatus.CREATED, SessionStatus.ACTIVE)
FINAL = (SessionStatus.COMPLETED, SessionStatus.TERMINATED, SessionStatus.ERROR)

# One parameter however many events: every session that speaks writes here twice a second.
_APPEND = text("""
INSERT INTO session_events (tenant_id, session_id, sequence, event_type, content, timestamp, duration_ms)
SELECT :tenant, :session, sequence, type, content, at, duration
FROM jsonb_to_recordset(CAST(:events AS jsonb))
    AS event (sequence int, type text, content jsonb, at timestamptz, duration int)
""")

_UNIQUE_VIOLATION = "23505"
_FOREIGN_KEY_VIOLATION = "23503"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in a session. `sequence` orders it, from 0, each number once."""

    sequence: int
    type: EventType
    content: Mapping[str, Any]
    timestamp: datetime = field(default_factory=lambda: datetime.now(UTC))
    duration_ms: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.type, EventType):
            raise BadInput(f"An event is one of {', '.join(EventType)}.", param="event_type")
        if self.sequence < 0:
            raise BadInput("Events are numbered from 0.", param="sequence")


async def create(
    database: Database,
    tenant_id: uuid.UUID,
    *,
    project_id: uuid.UUID | None = None,
    api_key_id: uuid.UUID | None = None,
    config: Mapping[str, Any] | None = None,
    client_ip: str | None = None,
    user_agent: str = "",
) -> Session:
    """A new session in state `created`. Raises `NotFound` when project or key are not this tenant's."""
    made = Session(
        tenant_id=tenant_id,
        project_id=project_id,
        api_key_id=api_key_id,
        config=dict(config or {}),
        client_ip=client_ip,
        user_agent=user_agent[:500],
    )
    try:
        async with database.tenant(tenant_id) as session:
            session.add(made)
            await session.flush()
    except IntegrityError as error:
        if sqlstate(error) != _FOREIGN_KEY_VIOLATION:
            raise
        raise NotFound("There is no such tenant, project or key.") from error
    return made


async def get(database: Database, tenant_id: uuid.UUID, session_id: uuid.UUID) -> Session:
    """The session. Raises `NotFound` when there is none or it is another tenant's."""
    async with database.tenant(tenant_id) as session:
        found = await session.get(Session, (tenant_id, session_id))
    if found is None:
        raise NotFound("There is no such session.", param="session_id")
    return found


async def activate(database: Database, tenant_id: uuid.UUID, session_id: uuid.UUID) -> Session:
    """The client is there: `created` becomes `active`, and active it stays. Raises `NotFound`, `Conflict`."""
    return await _change(
        database,
        tenant_id,
        session_id,
        status=SessionStatus.ACTIVE,
        started_at=func.coalesce(Session.started_at, func.now()),
    )


async def finish(
    database: Database,
    tenant_id: uuid.UUID,
    session_id: uuid.UUID,
    status: SessionStatus,
    *,
    reason: str = "",
    error_code: str = "",
    error_message: str = "",
    audio_seconds: float = 0.0,
) -> Session:
    """End the session for good: `completed` by the client, `terminated` by us, or `error`.

    Its duration is counted from the start; one that never started has none. Raises `NotFound`, `Conflict`.
    """
    if status not in FINAL:
        raise BadInput(f"A session ends as one of {', '.join(FINAL)}.", param="status")
    lasted = extract("epoch", func.now() - Session.started_at)
    return await _change(
        database,
        tenant_id,
        session_id,
        status=status,
        ended_at=func.now(),
        duration_seconds=case((Session.started_at.is_not(None), func.greatest(lasted, 0)), else_=None),
        termination_reason=reason[:50],
        error_code=error_code[:50],
        error_message=error_message[:2000],
        audio_duration_seconds=audio_seconds,
    )


async def close_stale(database: Database, reason: str) -> int:
    """End every session that is active as `terminated`; returns how many those were.

    Only for a store that nobody else serves. When such a session really ended is unknown, and so is its duration.
    """
    async with database.system() as session:
        changed = await session.execute(
            update(Session)
            .where(Session.status == SessionStatus.ACTIVE)
            .values(status=SessionStatus.TERMINATED, ended_at=func.now(), termination_reason=reason[:50])
            .returning(Session.id)
        )
        return len(changed.all())


async def record(database: Database, tenant_id: uuid.UUID, session_id: uuid.UUID, events: Sequence[Event]) -> None:
    """Append to the session's history, all or none. Raises `NotFound`; `Conflict` for a sequence number used before."""
    if not events:
        return
    rows = [
        {
            "sequence": event.sequence,
            "type": event.type,
            "content": dict(event.content),
            "at": event.timestamp.isoformat(),
            "duration": event.duration_ms,
        }
        for event in events
    ]
    try:
        async with database.tenant(tenant_id) as session:
            chosen = {"tenant": tenant_id, "session": session_id, "events": json.dumps(rows)}
            await session.execute(_APPEND, chosen)
    except IntegrityError as error:
        if sqlstate(error) == _UNIQUE_VIOLATION:
            raise Conflict("An event of that number is recorded already.", param="sequence") from error
        if sqlstate(error) != _FOREIGN_KEY_VIOLATION:
            raise
        raise NotFound("There is no such session.", param="session_id") from error


async def history(database: Database, tenant_id: uuid.UUID, session_id: uuid.UUID) -> Sequence[SessionEvent]:
    """What happened in a session, in order; empty when it is not this tenant's."""
    async with database.tenant(tenant_id) as session:
        found = await session.execute(
            select(SessionEvent).where(SessionEvent.session_id == session_id).order_by(SessionEvent.sequence)
        )
        return found.scalars().all()


async def _change(
    database: Database, tenant_id: uuid.UUID, session_id: uuid.UUID, **values: ColumnElement[Any] | object
) -> Session:
    async with database.tenant(tenant_id) as session:
        changed = await session.execute(
            update(Session)
            .where(Session.id == session_id, Session.status.in_(OPEN))
            .values(**values)
            .returning(Session)
        )
        found = changed.scalar_one_or_none()
        if found is not None:
            return found
        ended = await session.get(Session, (tenant_id, session_id))
    if ended is None:
        raise NotFound("There is no such session.", param="session_id")
    raise Conflict(f"The session is {ended.status} already.", param="session_id")
