"""The record of conversations: their state, and what was said, which never leaves the database for a log."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Select, Text, case, cast, extract, func, select, text, tuple_, update
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from agentvoicebox.config.errors import BadInput, Conflict, NotFound, TooLarge
from agentvoicebox.tenancy import audit, checks, pages
from agentvoicebox.tenancy.audit.lines import address
from agentvoicebox.tenancy.checks import chosen, document, words
from agentvoicebox.tenancy.database import Database, sqlstate
from agentvoicebox.tenancy.models import Action, EventType, Session, SessionEvent, SessionStatus
from agentvoicebox.tenancy.pages import Page

OPEN = (SessionStatus.CREATED, SessionStatus.ACTIVE)
FINAL = (SessionStatus.COMPLETED, SessionStatus.TERMINATED, SessionStatus.ERROR)
CLOSED = "closed"
"""In a filter, any of the final states."""
LIFETIME = timedelta(hours=24)
"""How long a session may be open; `expire` ends those that have been for longer."""
MOST_EVENTS = 1000
"""Lines of history in one answer."""

_AT_ONCE = 500
"""Sessions that `expire` reads of one look, and rows that `export` holds in memory."""
_OURS = ("door",)
"""Parts of a configuration that say by which protocol a session is served; no client changes them."""

# One parameter however many events: every session that speaks writes here twice a second.
_APPEND = text("""
INSERT INTO session_events (tenant_id, session_id, sequence, event_type, content, timestamp, duration_ms)
SELECT :tenant, :session, sequence, type, content, at, duration
FROM jsonb_to_recordset(CAST(:events AS jsonb))
    AS event (sequence int, type text, content jsonb, at timestamptz, duration int)
""")

# From tenant to tenant, each by its index; the whole table may be millions of rows, and few of them are open.
_EXPIRED = text("""
SELECT old.tenant_id, old.id FROM tenants
CROSS JOIN LATERAL (
    SELECT s.tenant_id, s.id FROM sessions s
    WHERE s.tenant_id = tenants.id AND s.status IN ('created', 'active')
      AND coalesce(s.started_at, s.created_at) < now() - CAST(:older_than AS interval)
) AS old
LIMIT :most
""")

# A node that still serves the session may write that number first, and then the line is its own.
_LAST_LINE = text("""
INSERT INTO session_events (tenant_id, session_id, sequence, event_type, content)
SELECT :tenant, :session, coalesce(max(sequence) + 1, 0), 'system', CAST(:content AS jsonb)
FROM session_events WHERE tenant_id = :tenant AND session_id = :session
ON CONFLICT DO NOTHING
""")

_UNIQUE_VIOLATION = "23505"
_FOREIGN_KEY_VIOLATION = "23503"

_log = logging.getLogger(__name__)


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


@dataclass(frozen=True, slots=True)
class Filter:
    """Which sessions are meant; what is left out does not matter. Raises `BadInput`."""

    status: str | None = None
    """One of the states, or `closed` for any of the final ones."""
    project_id: uuid.UUID | None = None
    api_key_id: uuid.UUID | None = None
    since: datetime | None = None
    """Made then or later."""
    until: datetime | None = None
    """Made before then."""

    def __post_init__(self) -> None:
        if self.status is not None and self.status not in (*SessionStatus, CLOSED):
            raise BadInput(f"status must be one of {', '.join(SessionStatus)} or {CLOSED}.", param="status")
        for param in ("since", "until"):
            if getattr(self, param) is not None:
                checks.moment(getattr(self, param), param)

    def query(self) -> Select[Session]:
        """The sessions of the transaction's tenant that are meant, the newest first."""
        found = select(Session)
        if self.status is not None:
            states = FINAL if self.status == CLOSED else (chosen(self.status, "status", SessionStatus),)
            found = found.where(Session.status.in_(states))
        if self.project_id is not None:
            found = found.where(Session.project_id == self.project_id)
        if self.api_key_id is not None:
            found = found.where(Session.api_key_id == self.api_key_id)
        if self.since is not None:
            found = found.where(Session.created_at >= self.since)
        if self.until is not None:
            found = found.where(Session.created_at < self.until)
        return found.order_by(Session.created_at.desc(), Session.id.desc())


async def create(
    database: Database,
    tenant_id: uuid.UUID,
    *,
    session_id: uuid.UUID | None = None,
    project_id: uuid.UUID | None = None,
    api_key_id: uuid.UUID | None = None,
    config: Mapping[str, Any] | None = None,
    client_ip: str | None = None,
    user_agent: str = "",
) -> Session:
    """A new session in state `created`.

    What is no `client_ip` is not kept. Raises `NotFound` when project or key are not this tenant's, `Conflict` when it
    has a session of that id, `Forbidden` when its month has no session left.
    """
    made = Session(
        tenant_id=tenant_id,
        id=session_id or uuid.uuid4(),
        project_id=project_id,
        api_key_id=api_key_id,
        config=dict(config or {}),
        client_ip=address(client_ip),
        user_agent=user_agent[:500],
    )
    try:
        async with database.tenant(tenant_id) as session:
            session.add(made)
            await session.flush()
    except IntegrityError as error:
        if sqlstate(error) == _UNIQUE_VIOLATION:
            raise Conflict("There is a session of that id already; choose another.", param="session_id") from error
        if sqlstate(error) != _FOREIGN_KEY_VIOLATION:
            raise
        raise NotFound("There is no such tenant, project or key.") from error
    return made


async def get(database: Database, tenant_id: uuid.UUID, session_id: uuid.UUID) -> Session:
    """The session. Raises `NotFound` when there is none or it is another tenant's."""
    async with database.tenant(tenant_id) as session:
        found = await session.get(Session, (tenant_id, session_id))
    if found is None:
        raise _unknown()
    return found


async def list_(
    database: Database, tenant_id: uuid.UUID, wanted: Filter | None = None, page: int = 1, page_size: int = 20
) -> Page[Session]:
    """A page of the tenant's sessions, the newest first. Raises `BadInput`."""
    async with database.tenant(tenant_id) as session:
        return await pages.turn_to(session, (wanted or Filter()).query(), page, page_size)


async def export(
    database: Database, tenant_id: uuid.UUID, wanted: Filter | None = None
) -> AsyncGenerator[Session, None]:
    """All sessions of the tenant that are meant, the newest first, as they are read. Raises `BadInput`.

    No connection is held between the pages, so a reader who stalls keeps nobody waiting: sessions stay in their order,
    and each page begins after the last that was read, with the states of its own moment.
    """
    query = (wanted or Filter()).query().limit(_AT_ONCE)
    page = query
    while True:
        async with database.tenant(tenant_id) as session:
            found = (await session.scalars(page)).all()
        for each in found:
            yield each
        if len(found) < _AT_ONCE:
            break
        last = found[-1]
        page = query.where(tuple_(Session.created_at, Session.id) < tuple_(last.created_at, last.id))


async def activate(database: Database, tenant_id: uuid.UUID, session_id: uuid.UUID) -> Session:
    """The client is there: `created` becomes `active`, and active it stays. Raises `NotFound`, `Conflict`."""
    return await _change(
        database,
        tenant_id,
        session_id,
        status=SessionStatus.ACTIVE,
        started_at=func.coalesce(Session.started_at, func.now()),
    )


async def add_usage(
    database: Database,
    tenant_id: uuid.UUID,
    session_id: uuid.UUID,
    *,
    input_tokens: int = 0,
    output_tokens: int = 0,
    audio_seconds: float = 0.0,
) -> Session:
    """Add to what a session has used so far, for those who look at it. Raises `NotFound`, `Conflict`."""
    return await _change(
        database,
        tenant_id,
        session_id,
        input_tokens=Session.input_tokens + input_tokens,
        output_tokens=Session.output_tokens + output_tokens,
        audio_duration_seconds=Session.audio_duration_seconds + audio_seconds,
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
    input_tokens: int = 0,
    output_tokens: int = 0,
) -> Session:
    """End the session for good: `completed` by the client, `terminated` by us, or `error`.

    Its duration is counted from the start; one that never started has none. Raises `NotFound`, `Conflict`.
    """
    if status not in FINAL:
        raise BadInput(f"A session ends as one of {', '.join(FINAL)}.", param="status")
    values = _ending(status, reason)
    values |= {"error_code": error_code[:50], "error_message": error_message[:2000]}
    values["audio_duration_seconds"] = Session.audio_duration_seconds + audio_seconds
    values["input_tokens"] = Session.input_tokens + input_tokens
    values["output_tokens"] = Session.output_tokens + output_tokens
    return await _change(database, tenant_id, session_id, **values)


async def terminate(database: Database, tenant_id: uuid.UUID, session_id: uuid.UUID, reason: str) -> Session:
    """End a session because somebody who may wants it to; a node that serves it has still to be told.

    Raises `BadInput`, `NotFound`, `Conflict` for one that has ended.
    """
    words(reason, "reason", 1, 50)
    async with database.tenant(tenant_id) as session:
        ended = await _end(session, tenant_id, session_id, reason)
        await audit.append(session, Action.UPDATE, "session", session_id, "Terminated", new={"reason": reason})
    return ended


async def expire(database: Database, older_than: timedelta = LIFETIME) -> int:
    """End every session that has been open for longer than that; returns how many those were.

    The time counts from its start, or from its making where nobody ever connected. Each ends on its own, with a line
    in its history and its duration; what has just ended otherwise stays as it is.
    """
    count, tried = 0, set[uuid.UUID]()
    while True:
        async with database.system() as session:
            found = (await session.execute(_EXPIRED, {"older_than": older_than, "most": _AT_ONCE})).all()
        # One that could not be ended is not looked at again.
        fresh = [row for row in found if row.id not in tried]
        for tenant_id, session_id in fresh:
            tried.add(session_id)
            try:
                async with database.tenant(tenant_id) as session:
                    await _end(session, tenant_id, session_id, "expired")
                count += 1
            except (Conflict, NotFound):
                continue
        if not fresh:
            break
    if count:
        _log.info("expired_sessions_cleaned count=%d", count)
    return count


async def patch(
    database: Database,
    tenant_id: uuid.UUID,
    session_id: uuid.UUID,
    *,
    config: Mapping[str, Any] | None = None,
    context: Mapping[str, Any] | None = None,
) -> Session:
    """Merge these into the session's configuration and context; a null takes an entry away.

    Whoever connects from then on has them. Raises `BadInput`, `TooLarge`, `NotFound`, and `Conflict` for a session that
    has ended.
    """
    values: dict[str, Any] = {}
    for param, column, given in (("config", Session.config, config), ("context", Session.context, context)):
        if given is None:
            continue
        made = document(given, param)
        if param == "config" and any(name in made for name in _OURS):
            raise BadInput(f"{' and '.join(_OURS)} of a session cannot be changed.", param=param)
        merged = column.op("||")(cast({name: value for name, value in made.items() if value is not None}, JSONB))
        gone = [name for name, value in made.items() if value is None]
        values[param] = merged.op("-")(cast(gone, ARRAY(Text))) if gone else merged
    if not values:
        return await get(database, tenant_id, session_id)
    async with database.tenant(tenant_id) as session:
        changed = await _update(session, tenant_id, session_id, values)
        for param in values:
            if len(json.dumps(getattr(changed, param), ensure_ascii=False).encode()) > checks.MOST_JSON:
                raise TooLarge(f"{param} of a session holds at most {checks.MOST_JSON} bytes.", param=param)
    return changed


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
        raise _unknown() from error


async def events(
    database: Database,
    tenant_id: uuid.UUID,
    session_id: uuid.UUID,
    *,
    after: int = -1,
    kind: str | None = None,
    most: int = 100,
) -> Sequence[SessionEvent]:
    """Up to `most` (1 to 1000) lines of a session's history that come after number `after`, in order.

    Raises `BadInput`, `NotFound`.
    """
    checks.number(after, "after", -1)
    checks.number(most, "most", 1, MOST_EVENTS)
    query = select(SessionEvent).where(SessionEvent.session_id == session_id, SessionEvent.sequence > after)
    if kind is not None:
        query = query.where(SessionEvent.event_type == chosen(kind, "type", EventType))
    async with database.tenant(tenant_id) as session:
        if await session.get(Session, (tenant_id, session_id)) is None:
            raise _unknown()
        return (await session.execute(query.order_by(SessionEvent.sequence).limit(most))).scalars().all()


async def history(database: Database, tenant_id: uuid.UUID, session_id: uuid.UUID) -> Sequence[SessionEvent]:
    """What happened in a session, in order; empty when it is not this tenant's."""
    async with database.tenant(tenant_id) as session:
        found = await session.execute(
            select(SessionEvent).where(SessionEvent.session_id == session_id).order_by(SessionEvent.sequence)
        )
        return found.scalars().all()


def _ending(status: SessionStatus, reason: str) -> dict[str, Any]:
    lasted = extract("epoch", func.now() - Session.started_at)
    return {
        "status": status,
        "ended_at": func.now(),
        "duration_seconds": case((Session.started_at.is_not(None), func.greatest(lasted, 0)), else_=None),
        "termination_reason": reason[:50],
    }


async def _end(session: AsyncSession, tenant_id: uuid.UUID, session_id: uuid.UUID, reason: str) -> Session:
    """End a session that nobody ends properly, and write it into its history."""
    ended = await _update(session, tenant_id, session_id, _ending(SessionStatus.TERMINATED, reason))
    content = json.dumps({"event": "terminated", "reason": reason})
    await session.execute(_LAST_LINE, {"tenant": tenant_id, "session": session_id, "content": content})
    return ended


async def _change(
    database: Database, tenant_id: uuid.UUID, session_id: uuid.UUID, **values: ColumnElement[Any] | object
) -> Session:
    async with database.tenant(tenant_id) as session:
        return await _update(session, tenant_id, session_id, values)


async def _update(
    session: AsyncSession, tenant_id: uuid.UUID, session_id: uuid.UUID, values: Mapping[str, Any]
) -> Session:
    """Change a session that is open. Raises `NotFound`, `Conflict`."""
    changed = await session.execute(
        update(Session).where(Session.id == session_id, Session.status.in_(OPEN)).values(**values).returning(Session)
    )
    if (found := changed.scalar_one_or_none()) is not None:
        return found
    ended = await session.get(Session, (tenant_id, session_id))
    if ended is None:
        raise _unknown()
    raise Conflict(f"The session is {ended.status} already.", param="session_id")


def _unknown() -> NotFound:
    return NotFound("There is no such session.", param="session_id")
