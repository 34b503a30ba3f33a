"""Sessions and their history."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select, text, update
from sqlalchemy.exc import DBAPIError

from agentvoicebox.config.errors import BadInput, Conflict, NotFound, TooLarge
from agentvoicebox.tenancy import keys, projects, sessions, tenants
from agentvoicebox.tenancy.database import Database, sqlstate
from agentvoicebox.tenancy.models import AuditEntry, EventType, Session, SessionStatus, Tenant
from agentvoicebox.tenancy.sessions import Event, Filter


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


@pytest.mark.parametrize(
    ("given", "kept"),
    [("fe80::1%eth0", "fe80::1"), ("testclient", "None"), ("", "None"), ("192.0.2.1:80", "None"), ("\0", "None")],
)
async def test_an_address_that_is_none_is_no_hindrance(
    database: Database, tenant: Tenant, given: str, kept: str
) -> None:
    made = await sessions.create(database, tenant.id, client_ip=given)
    assert str((await sessions.get(database, tenant.id, made.id)).client_ip) == kept


async def test_an_id_that_is_taken(database: Database, tenant: Tenant, other: Tenant, session: Session) -> None:
    with pytest.raises(Conflict) as caught:
        await sessions.create(database, tenant.id, session_id=session.id)
    assert caught.value.param == "session_id"
    assert (await sessions.create(database, other.id, session_id=session.id)).id == session.id


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


async def test_what_a_session_uses_adds_up(database: Database, tenant: Tenant, session: Session) -> None:
    await sessions.activate(database, tenant.id, session.id)
    for _ in range(2):
        await sessions.add_usage(database, tenant.id, session.id, input_tokens=100, output_tokens=20, audio_seconds=1.5)
    done = await sessions.finish(database, tenant.id, session.id, SessionStatus.COMPLETED, audio_seconds=0.5)
    assert (done.input_tokens, done.output_tokens, done.audio_duration_seconds) == (200, 40, 3.5)
    with pytest.raises(Conflict):
        await sessions.add_usage(database, tenant.id, session.id, input_tokens=1)


class TestList:
    """Finding sessions."""

    @pytest.fixture
    async def several(self, database: Database, tenant: Tenant) -> list[Session]:
        """Created, active, completed, terminated, error: in this order, a day apart."""
        made = [await sessions.create(database, tenant.id) for _ in range(5)]
        for each in made[1:]:
            await sessions.activate(database, tenant.id, each.id)
        for each, status in zip(made[2:], sessions.FINAL, strict=True):
            await sessions.finish(database, tenant.id, each.id, status)
        async with database.tenant(tenant.id) as direct:
            for day, each in enumerate(made, 1):
                when = datetime(2026, 11, day, 12, tzinfo=UTC)
                await direct.execute(update(Session).where(Session.id == each.id).values(created_at=when))
        return made

    async def found(self, database: Database, tenant: Tenant, several: list[Session], **wanted: Any) -> list[int]:
        numbers = {each.id: number for number, each in enumerate(several)}
        page = await sessions.list_(database, tenant.id, Filter(**wanted))
        assert page.total == len(page.items)
        return [numbers[each.id] for each in page.items]

    async def test_the_newest_comes_first(self, database: Database, tenant: Tenant, several: list[Session]) -> None:
        assert await self.found(database, tenant, several) == [4, 3, 2, 1, 0]
        second = await sessions.list_(database, tenant.id, page=2, page_size=2)
        assert ([each.id for each in second.items], second.total) == ([several[2].id, several[1].id], 5)

    async def test_con_29_closed_is_every_end(self, database: Database, tenant: Tenant, several: list[Session]) -> None:
        assert await self.found(database, tenant, several, status="closed") == [4, 3, 2]
        for number, status in enumerate(SessionStatus):
            expected = ["created", "active", "completed", "terminated", "error"].index(status)
            assert await self.found(database, tenant, several, status=status) == [expected], number

    async def test_by_dates(self, database: Database, tenant: Tenant, several: list[Session]) -> None:
        since, until = datetime(2026, 11, 2, 12, tzinfo=UTC), datetime(2026, 11, 4, 12, tzinfo=UTC)
        assert await self.found(database, tenant, several, since=since, until=until) == [2, 1]

    async def test_by_project_and_key(self, database: Database, tenant: Tenant, several: list[Session]) -> None:
        project = await projects.create(database, tenant.id, "One")
        key = await keys.issue(database, tenant.id, "k")
        mine = await sessions.create(database, tenant.id, project_id=project.id)
        its = await sessions.create(database, tenant.id, api_key_id=key.id)
        several += [mine, its]
        assert await self.found(database, tenant, several, project_id=project.id) == [5]
        assert await self.found(database, tenant, several, api_key_id=key.id) == [6]
        assert await self.found(database, tenant, several, api_key_id=key.id, project_id=project.id) == []

    async def test_ses_14_all_are_exported_as_they_are_read(
        self, database: Database, tenant: Tenant, other: Tenant, several: list[Session], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sessions, "_AT_ONCE", 2)
        assert [each.id async for each in sessions.export(database, tenant.id)] == [
            each.id for each in reversed(several)
        ]
        wanted = Filter(status="closed")
        assert len([each async for each in sessions.export(database, tenant.id, wanted)]) == 3
        assert [each async for each in sessions.export(database, other.id)] == []
        async with aclosing(sessions.export(database, tenant.id)) as some:
            assert (await anext(some)).id == several[-1].id

    async def test_readers_who_stall_hold_no_connection(
        self, database: Database, tenant: Tenant, other: Tenant, several: list[Session]
    ) -> None:
        stalled = [sessions.export(database, tenant.id) for _ in range(30)]
        async with asyncio.timeout(20):
            for each in stalled:
                assert (await anext(each)).id == several[-1].id
            assert (await sessions.list_(database, other.id)).items == []
        for each in stalled:
            await each.aclose()

    async def test_sessions_of_one_moment_are_all_exported(
        self, database: Database, tenant: Tenant, several: list[Session], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sessions, "_AT_ONCE", 2)
        async with database.tenant(tenant.id) as session:
            await session.execute(update(Session).values(created_at=datetime(2026, 11, 1, tzinfo=UTC)))
        found = [each.id async for each in sessions.export(database, tenant.id)]
        assert found == sorted((each.id for each in several), reverse=True)

    @pytest.mark.parametrize(
        "wanted",
        [{"status": "open"}, {"since": datetime(2026, 11, 1)}, {"until": "yesterday"}],
    )
    def test_what_nobody_can_look_for(self, wanted: dict[str, Any]) -> None:
        with pytest.raises(BadInput) as caught:
            Filter(**wanted)
        assert caught.value.param == next(iter(wanted))

    async def test_flw_60_another_tenants_sessions_are_never_found(
        self, database: Database, other: Tenant, several: list[Session]
    ) -> None:
        assert (await sessions.list_(database, other.id)).items == []
        for each in several:
            for attempt in (
                sessions.get(database, other.id, each.id),
                sessions.events(database, other.id, each.id),
                sessions.terminate(database, other.id, each.id, "not mine"),
                sessions.patch(database, other.id, each.id, context={"a": 1}),
                sessions.add_usage(database, other.id, each.id, input_tokens=1),
            ):
                with pytest.raises(NotFound):
                    await attempt


async def test_history_is_read_on_from_a_number(database: Database, tenant: Tenant, session: Session) -> None:
    kinds = [EventType.TRANSCRIPT, EventType.RESPONSE] * 3
    await sessions.record(database, tenant.id, session.id, [Event(n, kind, {}) for n, kind in enumerate(kinds)])

    async def numbers(**wanted: Any) -> list[int]:
        return [line.sequence for line in await sessions.events(database, tenant.id, session.id, **wanted)]

    assert await numbers() == [0, 1, 2, 3, 4, 5]
    assert await numbers(after=2) == [3, 4, 5]
    assert await numbers(after=2, kind="transcript") == [4]
    assert await numbers(most=2) == [0, 1]
    assert await numbers(after=5) == []
    for wanted in ({"after": -2}, {"most": 0}, {"most": 1001}, {"kind": "gossip"}):
        with pytest.raises(BadInput):
            await numbers(**wanted)
    with pytest.raises(NotFound):
        await sessions.events(database, tenant.id, uuid.uuid4())


async def test_ses_07_whoever_may_ends_a_session_and_it_is_written_down(
    database: Database, tenant: Tenant, session: Session
) -> None:
    await sessions.activate(database, tenant.id, session.id)
    await sessions.record(database, tenant.id, session.id, [Event(0, EventType.TRANSCRIPT, {"text": "hello"})])
    ended = await sessions.terminate(database, tenant.id, session.id, "asked for by support")
    assert (ended.status, ended.termination_reason) == ("terminated", "asked for by support")
    assert ended.duration_seconds is not None
    last = (await sessions.history(database, tenant.id, session.id))[-1]
    assert (last.sequence, last.event_type) == (1, "system")
    assert last.content == {"event": "terminated", "reason": "asked for by support"}
    async with database.tenant(tenant.id) as direct:
        line = (await direct.execute(select(AuditEntry).order_by(AuditEntry.seq.desc()).limit(1))).scalar_one()
    assert (line.resource_type, line.resource_id) == ("session", str(session.id))
    with pytest.raises(Conflict):
        await sessions.terminate(database, tenant.id, session.id, "again")
    for reason in ("", "x" * 51, None):
        with pytest.raises(BadInput):
            await sessions.terminate(database, tenant.id, session.id, reason)  # type: ignore[arg-type]


class TestPatch:
    """What may change about a session while it is open."""

    async def test_entries_are_merged_and_a_null_takes_one_away(
        self, database: Database, tenant: Tenant, session: Session
    ) -> None:
        await sessions.patch(database, tenant.id, session.id, config={"speed": 1.2}, context={"topic": "tea", "n": 1})
        changed = await sessions.patch(
            database, tenant.id, session.id, config={"voice": None}, context={"n": 2, "x'y": [1], "nothing": None}
        )
        assert (changed.config, changed.context) == ({"speed": 1.2}, {"topic": "tea", "n": 2, "x'y": [1]})
        assert (await sessions.patch(database, tenant.id, session.id)).context == changed.context

    async def test_of_many_at_once_none_is_lost(self, database: Database, tenant: Tenant, session: Session) -> None:
        await asyncio.gather(
            *(sessions.patch(database, tenant.id, session.id, context={f"k{n}": n}) for n in range(12))
        )
        assert (await sessions.get(database, tenant.id, session.id)).context == {f"k{n}": n for n in range(12)}

    async def test_what_is_refused(self, database: Database, tenant: Tenant, session: Session) -> None:
        for wrong in ({"config": {"door": "native"}}, {"context": [1]}, {"context": {"x": "a\x00"}}):
            with pytest.raises(BadInput):
                await sessions.patch(database, tenant.id, session.id, **wrong)  # type: ignore[arg-type]
        await sessions.patch(database, tenant.id, session.id, context={"x": "y" * 40_000})
        for large in ({"x": "y" * 70_000}, {"z": "y" * 40_000}):
            with pytest.raises(TooLarge):
                await sessions.patch(database, tenant.id, session.id, context=large)
        assert list((await sessions.get(database, tenant.id, session.id)).context) == ["x"]
        await sessions.finish(database, tenant.id, session.id, SessionStatus.COMPLETED)
        with pytest.raises(Conflict):
            await sessions.patch(database, tenant.id, session.id, context={"late": True})


@pytest.fixture(scope="module")
async def place(database: Database) -> Tenant:
    """One tenant for all examples of a property."""
    return await tenants.create(database, f"p11-{uuid.uuid4().hex[:8]}", "P11", "enterprise")


class TestExpiry:
    """Sessions that nobody ends."""

    @pytest.fixture(autouse=True)
    async def nothing_old(self, database: Database) -> None:
        await sessions.expire(database)

    @pytest.fixture
    def aged(
        self, database: Database, admin: psycopg.AsyncConnection
    ) -> Callable[[Tenant, timedelta, timedelta | None], Awaitable[Session]]:
        """A session that was made and, perhaps, begun some time ago."""

        async def make(tenant: Tenant, made: timedelta, begun: timedelta | None) -> Session:
            session = await sessions.create(database, tenant.id)
            if begun is not None:
                await sessions.activate(database, tenant.id, session.id)
            times = "created_at = now() - %s::interval, started_at = now() - %s::interval"
            await admin.execute(f"UPDATE sessions SET {times} WHERE id = %s", (made, begun, session.id))
            return session

        return make

    async def test_con_33_flw_56_both_open_states_expire_each_with_its_line_and_duration(
        self, database: Database, tenant: Tenant, other: Tenant, aged: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        hour = timedelta(hours=1)
        waiting, begun = await aged(tenant, 25 * hour, None), await aged(other, 26 * hour, 25 * hour)
        late, young = await aged(tenant, 30 * hour, 23 * hour), await aged(other, 23 * hour, None)
        done = await aged(tenant, 40 * hour, 40 * hour)
        await sessions.finish(database, tenant.id, done.id, SessionStatus.COMPLETED)
        await sessions.record(database, other.id, begun.id, [Event(0, EventType.TRANSCRIPT, {"text": "hello"})])
        with caplog.at_level(logging.INFO, "agentvoicebox.tenancy.sessions"):
            assert await sessions.expire(database) == 2
        assert "expired_sessions_cleaned count=2" in caplog.messages
        for owner, session, duration, lines in ((tenant, waiting, None, 1), (other, begun, 25 * 3600, 2)):
            found = await sessions.get(database, owner.id, session.id)
            assert (found.status, found.termination_reason) == ("terminated", "expired")
            assert found.ended_at is not None
            assert found.duration_seconds == (duration and pytest.approx(duration, abs=60))
            history = await sessions.history(database, owner.id, session.id)
            assert len(history) == lines
            assert history[-1].content == {"event": "terminated", "reason": "expired"}
        for owner, session, status in (
            (tenant, late, "active"),
            (other, young, "created"),
            (tenant, done, "completed"),
        ):
            assert (await sessions.get(database, owner.id, session.id)).status == status
        caplog.clear()
        assert await sessions.expire(database) == 0
        assert caplog.messages == []

    async def test_more_than_are_read_at_once(
        self, database: Database, tenant: Tenant, aged: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sessions, "_AT_ONCE", 2)
        for _ in range(5):
            await aged(tenant, timedelta(days=2), None)
        assert await sessions.expire(database) == 5

    async def test_two_cleaners_at_once_count_each_session_once(
        self, database: Database, tenant: Tenant, aged: Any
    ) -> None:
        for _ in range(10):
            await aged(tenant, timedelta(days=2), timedelta(days=2))
        assert sum(await asyncio.gather(*(sessions.expire(database) for _ in range(3)))) == 10

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        ages=st.lists(
            st.tuples(st.floats(0, 72), st.none() | st.floats(0, 1)).filter(
                lambda age: abs(age[0] * (1 if age[1] is None else age[1]) - 24) > 0.1
            ),
            max_size=6,
        )
    )
    async def test_p11_session_auto_termination(
        self, database: Database, place: Tenant, aged: Any, ages: list[tuple[float, float | None]]
    ) -> None:
        """Sessions beyond 24 hours get terminated, counted from start or making; the others do not."""
        expected = {}
        for hours, part in ages:
            begun = None if part is None else timedelta(hours=hours * part)
            session = await aged(place, timedelta(hours=hours), begun)
            open_for = hours if part is None else hours * part
            expected[session.id] = "terminated" if open_for > 24 else "created" if part is None else "active"
        assert await sessions.expire(database) == list(expected.values()).count("terminated")
        for session_id, status in expected.items():
            assert (await sessions.get(database, place.id, session_id)).status == status
