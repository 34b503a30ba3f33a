"""Sessions and their history."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

import pytest
from sqlalchemy import text, update
from sqlalchemy.exc import DBAPIError

from agentvoicebox.config.errors import BadInput, Conflict, NotFound
from agentvoicebox.tenancy import keys, sessions
from agentvoicebox.tenancy.database import Database, sqlstate
from agentvoicebox.tenancy.models import EventType, Session, SessionStatus, Tenant
from agentvoicebox.tenancy.sessions import Event


@pytest.fixture
async def session(database: Database, tenant: Tenant) -> Session:
    return await sessions.create(database, tenant.id, config={"voice": "slt"})


async def test_a_new_session(database: Database, tenant: Tenant) -> None:
    key = await keys.issue(database, tenant.id, "a key")
    made = await sessions.create(
        database,
        tenant.id,
        api_key_id=key.id,
        config={"voice": "slt", "turn_detection": {"type": "server_vad"}},
        client_ip="2001:db8::1",
        user_agent="curl" * 500,
    )
    assert made.status == SessionStatus.CREATED
    assert (made.started_at, made.ended_at, made.duration_seconds) == (None, None, None)
    found = await sessions.get(database, tenant.id, made.id)
    assert found.config == {"voice": "slt", "turn_detection": {"type": "server_vad"}}
    assert (found.api_key_id, str(found.client_ip), len(found.user_agent)) == (key.id, "2001:db8::1", 500)


async def test_the_way_of_a_session(database: Database, tenant: Tenant, session: Session) -> None:
    active = await sessions.activate(database, tenant.id, session.id)
    assert active.status == SessionStatus.ACTIVE
    assert active.started_at is not None
    again = await sessions.activate(database, tenant.id, session.id)
    assert again.started_at == active.started_at
    done = await sessions.finish(
        database, tenant.id, session.id, SessionStatus.COMPLETED, reason="client", audio_seconds=2.5
    )
    assert (done.status, done.termination_reason, done.audio_duration_seconds) == ("completed", "client", 2.5)
    assert done.ended_at is not None
    assert done.duration_seconds == pytest.approx((done.ended_at - active.started_at).total_seconds(), abs=1e-5)


async def test_a_session_that_never_started_has_no_duration(
    database: Database, tenant: Tenant, session: Session
) -> None:
    ended = await sessions.finish(
        database, tenant.id, session.id, SessionStatus.ERROR, error_code="core_gone", error_message="Core is gone."
    )
    assert (ended.status, ended.error_code, ended.duration_seconds) == ("error", "core_gone", None)


@pytest.mark.parametrize("final", sessions.FINAL)
async def test_an_end_is_final(database: Database, tenant: Tenant, session: Session, final: SessionStatus) -> None:
    await sessions.finish(database, tenant.id, session.id, final)
    with pytest.raises(Conflict, match=final):
        await sessions.activate(database, tenant.id, session.id)
    for another in sessions.FINAL:
        with pytest.raises(Conflict):
            await sessions.finish(database, tenant.id, session.id, another)
    with pytest.raises(DBAPIError) as caught:
        async with database.tenant(tenant.id) as direct:
            await direct.execute(update(Session).where(Session.id == session.id).values(status=SessionStatus.ACTIVE))
    assert sqlstate(caught.value) == "AV002"
    assert (await sessions.get(database, tenant.id, session.id)).status == final


async def test_what_a_node_left_active_is_closed_when_it_comes_back(
    database: Database, tenant: Tenant, other: Tenant, session: Session
) -> None:
    theirs = await sessions.create(database, other.id)
    new = await sessions.create(database, tenant.id)
    done = await sessions.create(database, tenant.id)
    for tenant_id, made in ((tenant.id, session), (other.id, theirs)):
        await sessions.activate(database, tenant_id, made.id)
    await sessions.finish(database, tenant.id, done.id, SessionStatus.COMPLETED)
    assert await sessions.close_stale(database, "node_restarted") >= 2
    for tenant_id, made in ((tenant.id, session), (other.id, theirs)):
        found = await sessions.get(database, tenant_id, made.id)
        assert (found.status, found.termination_reason) == ("terminated", "node_restarted")
        assert found.ended_at is not None
        assert found.duration_seconds is None, "nobody knows when it ended"
    assert (await sessions.get(database, tenant.id, new.id)).status == "created"
    assert (await sessions.get(database, tenant.id, done.id)).status == "completed"
    assert await sessions.close_stale(database, "node_restarted") == 0


async def test_a_session_does_not_end_as_active(database: Database, tenant: Tenant, session: Session) -> None:
    with pytest.raises(BadInput):
        await sessions.finish(database, tenant.id, session.id, SessionStatus.ACTIVE)


async def test_another_tenants_session_is_not_there(
    database: Database, tenant: Tenant, other: Tenant, session: Session
) -> None:
    event = Event(0, EventType.TRANSCRIPT, {"text": "hello"})
    for attempt in (
        sessions.get(database, other.id, session.id),
        sessions.activate(database, other.id, session.id),
        sessions.finish(database, other.id, session.id, SessionStatus.TERMINATED),
        sessions.record(database, other.id, session.id, [event]),
        sessions.get(database, other.id, uuid.uuid4()),
    ):
        with pytest.raises(NotFound):
            await attempt
    assert await sessions.history(database, other.id, session.id) == []
    assert (await sessions.get(database, tenant.id, session.id)).status == SessionStatus.CREATED


async def test_project_and_key_must_be_the_tenants_own(database: Database, tenant: Tenant, other: Tenant) -> None:
    theirs = await keys.issue(database, other.id, "theirs")
    with pytest.raises(NotFound):
        await sessions.create(database, tenant.id, api_key_id=theirs.id)
    with pytest.raises(NotFound):
        await sessions.create(database, tenant.id, project_id=uuid.uuid4())
    with pytest.raises(NotFound):
        await sessions.create(database, uuid.uuid4())


async def test_history_is_kept_in_order(database: Database, tenant: Tenant, session: Session) -> None:
    when = datetime(2026, 11, 21, 12, tzinfo=UTC)
    first = Event(0, EventType.TRANSCRIPT, {"text": "what time is it"}, when, duration_ms=900)
    await sessions.record(database, tenant.id, session.id, [Event(1, EventType.RESPONSE, {"text": "Noon."}), first])
    await sessions.record(database, tenant.id, session.id, [Event(2, EventType.SYSTEM, {})])
    await sessions.record(database, tenant.id, session.id, [])
    lines = await sessions.history(database, tenant.id, session.id)
    assert [(line.sequence, line.event_type) for line in lines] == [(0, "transcript"), (1, "response"), (2, "system")]
    assert (lines[0].content, lines[0].timestamp, lines[0].duration_ms) == ({"text": "what time is it"}, when, 900)


async def test_a_number_is_used_once_and_all_or_nothing_is_kept(
    database: Database, tenant: Tenant, session: Session
) -> None:
    await sessions.record(database, tenant.id, session.id, [Event(1, EventType.SYSTEM, {})])
    with pytest.raises(Conflict):
        await sessions.record(
            database, tenant.id, session.id, [Event(0, EventType.SYSTEM, {}), Event(1, EventType.ERROR, {})]
        )
    assert [line.event_type for line in await sessions.history(database, tenant.id, session.id)] == ["system"]


async def test_what_cannot_be_recorded(database: Database, tenant: Tenant, session: Session) -> None:
    with pytest.raises(BadInput):
        Event(0, "gossip", {})  # type: ignore[arg-type]
    with pytest.raises(BadInput):
        Event(-1, EventType.SYSTEM, {})
    with pytest.raises(BadInput):
        await sessions.record(database, tenant.id, session.id, [Event(0, EventType.TRANSCRIPT, {"text": "a\x00b"})])
    with pytest.raises(BadInput):
        await sessions.create(database, tenant.id, client_ip="not an address")


async def test_a_deleted_project_leaves_its_finished_sessions(
    database: Database, tenant: Tenant, session: Session
) -> None:
    async with database.tenant(tenant.id) as direct:
        await direct.execute(text("UPDATE sessions SET project_id = (SELECT id FROM projects)"))
    await sessions.finish(database, tenant.id, session.id, SessionStatus.COMPLETED)
    async with database.tenant(tenant.id) as direct:
        await direct.execute(text("DELETE FROM projects"))
    kept = await sessions.get(database, tenant.id, session.id)
    assert (kept.project_id, kept.status) == (None, "completed")
