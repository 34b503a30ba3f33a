"""What becomes of open connections, and of those who come, when the tenant, its settings or its keys change."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus

from agentvoicebox.bus_bridge import connection, live
from agentvoicebox.config.errors import Unavailable
from agentvoicebox.tenancy import keys, limits, sessions, settings, tenants, voices
from agentvoicebox.tenancy.models import EventType, SessionStatus, Tier

REASON = "终止" * 25
"""As long as a reason may be, and longer than what a close frame holds."""


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await true():
            await asyncio.sleep(0.05)


async def test_suspension_closes_sessions_and_refuses_keys_and_reactivation_restores(
    stack: Any, sockets: Any, new_customer: Any
):
    customer = await new_customer()
    async with sockets.native(customer) as one, sockets.realtime(customer) as two:
        await tenants.suspend(stack.database, customer.id, "unpaid")
        assert await sockets.closed(one) == (live.SUSPENDED, "tenant_suspended")
        assert await sockets.closed(two) == (live.SUSPENDED, "tenant_suspended")
    for path in sockets.paths:
        assert (await sockets.refused(path, customer))[:2] == (403, "tenant_suspended")
    await tenants.activate(stack.database, customer.id)

    async def opens() -> bool:
        try:
            async with sockets.connect(sockets.paths[0], customer):
                return True
        except InvalidStatus:
            return False

    await until(opens)


async def test_deletion_closes_sessions_too(stack: Any, sockets: Any, new_customer: Any):
    customer = await new_customer()
    async with sockets.native(customer) as socket:
        await tenants.delete(stack.database, customer.id)
        assert (await sockets.closed(socket))[0] == live.SUSPENDED
    assert (await sockets.refused(sockets.paths[0], customer))[0] == 404


async def test_a_rotated_key_lets_its_sessions_live_through_the_grace_and_no_longer(
    stack: Any, sockets: Any, new_customer: Any
):
    patient, hasty = await new_customer(), await new_customer()  # a slow machine does not live through a short one
    async with sockets.native(patient) as socket:
        [visit] = [visit for visit in stack.gateway.live if visit.grant.tenant_id == patient.id]
        await keys.rotate(stack.database, patient.id, patient.key_id, grace=3600.0)

        async def is_told() -> bool:
            return visit.grant.expires_at is not None

        await until(is_told)
        await sockets.ping(socket)
    async with sockets.native(hasty) as socket:
        await keys.rotate(stack.database, hasty.id, hasty.key_id, grace=0.5)
        assert await sockets.closed(socket) == (live.UNAUTHORISED, "api_key_expired")


async def test_a_key_that_loses_the_scope_loses_its_sessions(stack: Any, sockets: Any, new_customer: Any):
    customer = await new_customer()
    async with sockets.native(customer) as socket:
        await keys.update(stack.database, customer.id, customer.key_id, scopes=("usage",))
        assert await sockets.closed(socket) == (live.UNAUTHORISED, "insufficient_scope")


async def test_address_ranges_bite_at_the_door_and_on_open_sessions(stack: Any, sockets: Any, new_customer: Any):
    customer = await new_customer()
    async with sockets.native(customer) as socket:
        await settings.patch(stack.database, customer.id, {"allowed_ip_ranges": ["127.0.0.0/8"]})
        await asyncio.sleep(0.6)
        await socket.send(json.dumps({"type": "ping"}))
        assert (await sockets.read(socket))["type"] == "pong", "an address in range goes on"
        await settings.patch(stack.database, customer.id, {"allowed_ip_ranges": ["10.0.0.0/8", "2001:db8::/32"]})
        assert await sockets.closed(socket) == (live.UNAUTHORISED, "ip_not_allowed")
    for path in sockets.paths:
        assert (await sockets.refused(path, customer))[:2] == (403, "ip_not_allowed")


async def test_a_voice_that_is_switched_off_opens_nothing(stack: Any, sockets: Any, new_customer: Any):
    customer = await new_customer()
    await settings.patch(stack.database, customer.id, {"default_voice_provider": "disabled"})

    async def is_refused() -> bool:
        try:
            async with sockets.connect(sockets.paths[0], customer):
                return False
        except InvalidStatus as error:
            return error.response.status_code == 403

    await until(is_refused)


async def test_a_silent_session_ends_after_the_tenants_time(
    stack: Any, sockets: Any, new_customer: Any, monkeypatch: pytest.MonkeyPatch
):
    customer = await new_customer()
    monkeypatch.setattr(live, "EVERY", 0.05)
    async with sockets.native(customer) as socket, sockets.native(customer) as other:
        visits = [visit for visit in stack.gateway.live if visit.grant.tenant_id == customer.id]
        assert {visit.grant.session_timeout for visit in visits} == {3600.0}
        silent = min(visits, key=lambda visit: visit.connection._began)
        silent.connection._heard_at -= 3601
        assert await sockets.closed(socket) == (live.EXPIRED, "session_idle")
        await other.send(json.dumps({"type": "ping"}))
        assert (await sockets.read(other))["type"] == "pong"


async def test_no_more_sessions_at_once_than_the_plan_has(stack: Any, sockets: Any, new_customer: Any):
    customer = await new_customer(tier=Tier.FREE)
    most = limits.SESSIONS[Tier.FREE]
    assert most == 2
    made = await sockets.create(customer)
    async with sockets.realtime(customer), sockets.realtime(customer):
        assert (await sockets.refused(sockets.paths[0], customer))[:2] == (403, "tenant_limit_exceeded")
        path = f"/ws/v2/sessions/{made['session_id']}"
        assert (await sockets.refused(path, customer))[:2] == (403, "tenant_limit_exceeded")

    async def opens() -> bool:
        try:
            async with sockets.connect(path, customer):
                return True
        except InvalidStatus:
            return False

    await until(opens)


async def test_an_administrator_ends_a_session(stack: Any, sockets: Any, new_customer: Any):
    customer = await new_customer()
    async with sockets.native(customer) as socket:
        [visit] = [visit for visit in stack.gateway.live if visit.grant.tenant_id == customer.id]
        assert stack.gateway.live.terminate(visit.session_id, REASON)
        assert await sockets.closed(socket) == (live.EXPIRED, "session_terminated")

    async def is_recorded() -> bool:
        row = await sessions.get(stack.database, customer.id, visit.session_id)
        return (row.status, row.termination_reason) == (SessionStatus.TERMINATED, REASON)

    await until(is_recorded)
    assert not stack.gateway.live.terminate(visit.session_id, "again")


async def test_an_expiry_that_is_brought_forward_counts_on_open_sessions(stack: Any, sockets: Any, new_customer: Any):
    customer = await new_customer(expires_at=datetime.now(UTC) + timedelta(hours=1))
    async with sockets.native(customer) as socket:
        await keys.rotate(stack.database, customer.id, customer.key_id, grace=0)
        assert (await sockets.closed(socket))[0] == live.UNAUTHORISED


async def test_who_sends_too_much_is_read_more_slowly_and_loses_nothing(
    stack: Any, sockets: Any, new_customer: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(connection, "SOCKET_MESSAGES", (50.0, 10.0))
    rests: list[float] = []
    rest = connection.Connection._rest

    class Still(limits.Budget):
        """Its time passes only while the connection rests, however slow the machine is."""

        def spend(self, now: float, amount: float = 1) -> float:
            return super().spend(sum(rests), amount)

    async def noted(self: connection.Connection, seconds: float) -> None:
        rests.append(seconds)
        await rest(self, seconds)

    monkeypatch.setattr(connection, "Budget", Still)
    monkeypatch.setattr(connection.Connection, "_rest", noted)
    customer = await new_customer()
    async with sockets.native(customer) as socket:
        for _ in range(25):
            await socket.send(json.dumps({"type": "ping"}))
        for _ in range(25):
            assert (await sockets.read(socket))["type"] == "pong"
    assert rests == pytest.approx([0.02] * 15)


async def test_a_connection_that_rests_is_closed_all_the_same(
    stack: Any, sockets: Any, new_customer: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(connection, "SOCKET_MESSAGES", (0.001, 1.0))
    customer = await new_customer()
    async with sockets.native(customer) as socket:
        for _ in range(3):
            await socket.send(json.dumps({"type": "ping"}))
        await sockets.read(socket)
        await keys.revoke(stack.database, customer.id, customer.key_id)
        assert await sockets.closed(socket) == (live.UNAUTHORISED, "api_key_revoked")


@pytest.mark.usefixtures("still")
async def test_a_realtime_client_is_told_what_its_key_may_still_ask_for(stack: Any, sockets: Any, new_customer: Any):
    customer = await new_customer(rate_class="standard")
    content = [{"type": "input_text", "text": "hello world"}]
    item = {"type": "message", "role": "user", "content": content}
    async with sockets.realtime(customer) as socket:
        await socket.send(json.dumps({"type": "conversation.item.create", "item": item}))
        await socket.send(json.dumps({"type": "response.create", "response": {"output_modalities": ["text"]}}))
        told = []
        while not told or told[-1]["type"] != "response.done":
            told.append(await sockets.read(socket))
        [rates] = [event["rate_limits"] for event in told if event["type"] == "rate_limits.updated"]
    assert [(rate["name"], rate["limit"]) for rate in rates] == [("requests", 120)]
    assert 110 <= rates[0]["remaining"] < 120


async def test_a_store_that_is_busy_throws_nobody_out(
    stack: Any, sockets: Any, new_customer: Any, monkeypatch: pytest.MonkeyPatch
):
    """After a fail-over every credential is looked at again; one that cannot be looked at now is not bad for that."""
    monkeypatch.setattr(live, "AGAIN", 0.01)
    customer = await new_customer()
    asked = 0
    real = stack.gateway.door.check_again

    async def busy(credential: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked < 3:
            raise Unavailable("All connections are in use.")
        return await real(credential)

    monkeypatch.setattr(type(stack.gateway.door), "check_again", lambda self, credential: busy(credential))
    async with sockets.native(customer) as socket:
        stack.gateway.door.keyring._feed._report_gap()
        async with asyncio.timeout(30):
            while asked < 3:
                await asyncio.sleep(0.01)
        await sockets.ping(socket)


async def test_a_session_that_another_node_left_behind_goes_on_where_it_was(
    stack: Any, sockets: Any, new_customer: Any
):
    """A node that dies ends no session: its next service is metered beside the first, and its history goes on."""
    customer = await new_customer()
    made = await sockets.create(customer, modality="text")
    session_id = uuid.UUID(made["session_id"])
    await sessions.activate(stack.database, customer.id, session_id)
    before = [sessions.Event(n, EventType.SYSTEM, {"n": n}) for n in range(3)]
    await sessions.record(stack.database, customer.id, session_id, before)
    async with sockets.connect(f"/ws/v2/sessions/{session_id}", customer) as socket:
        message = {"role": "user", "content": "hello world"}
        await socket.send(json.dumps({"type": "response.create", "messages": [message]}))
        while (await sockets.read(socket))["type"] != "response.done":
            pass

    async def is_written() -> bool:
        past = await sessions.history(stack.database, customer.id, session_id)
        return len(past) > 3 and [line.sequence for line in past] == list(range(len(past)))

    await until(is_written)


async def test_who_comes_while_the_node_stops_does_not_stay(
    stack: Any, sockets: Any, new_customer: Any, monkeypatch: pytest.MonkeyPatch
):
    customer = await new_customer()
    real = voices.get

    async def stopping(*arguments: Any) -> Any:
        stack.gateway._closing = True
        return await real(*arguments)

    monkeypatch.setattr(voices, "get", stopping)
    try:
        async with sockets.connect(sockets.paths[0], customer) as socket:
            assert (await sockets.closed(socket))[0] == 1012
    finally:
        stack.gateway._closing = False


async def test_refusals_are_no_errors_of_ours(sockets: Any, customer: Any, caplog: pytest.LogCaptureFixture):
    nobody = type(customer)(customer.id, customer.slug, customer.name, "avb_" + "x" * 43, customer.key_id)
    for path in sockets.paths:
        assert (await sockets.refused(path, nobody))[0] == 401
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_session_that_another_node_serves_is_in_use(stack: Any, sockets: Any, new_customer: Any):
    customer = await new_customer()
    made = await sockets.create(customer)
    session_id = uuid.UUID(made["session_id"])
    path = f"/ws/v2/sessions/{session_id}"
    assert await stack.gateway.state.enter(customer.id, session_id, 10)  # as that node would, in the shared state
    async with sockets.connect(path, customer) as socket:
        assert (await sockets.closed(socket))[0] == 4009
    await stack.gateway.state.leave(customer.id, session_id)
    async with sockets.connect(path, customer) as socket:
        assert (await sockets.read(socket))["type"] == "connection.established"
