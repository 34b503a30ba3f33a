"""Voice sessions over HTTP (API-070..076)."""

from __future__ import annotations

import csv
import io
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from agentvoicebox.tenancy import audit, sessions
from agentvoicebox.tenancy.models import EventType
from agentvoicebox.tenancy.sessions import Event

SESSIONS = "/api/v2/sessions"


@pytest.fixture
async def client(new_client: Any) -> Any:
    """A key that works with sessions and may export them."""
    return await new_client("realtime", "sessions", "admin")


@pytest.mark.parametrize("path", [SESSIONS, "/api/v2/voice/sessions"])
async def test_a_session_is_created_for_the_tenant_of_the_key(service: Any, client: Any, path: str):
    config = {"voice": "rms", "modality": "text", "turn_detection": {"silence_duration_ms": 400}}
    reply = await client.http.post(path, json=config, headers={"User-Agent": "a phone"})
    assert reply.status_code == 201
    told = reply.json()
    assert set(told) == {"session_id", "ws_url", "status"}
    assert told["ws_url"] == f"{service.url.replace('http', 'ws', 1)}/ws/v2/sessions/{told['session_id']}"
    row = await sessions.get(service.database, client.tenant, uuid.UUID(told["session_id"]))
    assert (row.status, row.config, row.api_key_id) == ("created", config, client.key_id)
    assert (str(row.client_ip), row.user_agent) == ("127.0.0.1", "a phone")


@pytest.mark.parametrize("scope", ["realtime", "sessions"])
async def test_either_scope_creates(new_client: Any, scope: str):
    client = await new_client(scope)
    assert (await client.http.post(SESSIONS)).status_code == 201


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"speed": 9}', "speed"),
        (b'{"speed": "fast"}', "speed"),
        (b'{"tenant_id": "x"}', "tenant_id"),
        (b'{"user_id": "x"}', "user_id"),
        (b'{"turn_detection": {"silence_duration_ms": 1}}', "turn_detection.silence_duration_ms"),
    ],
)
async def test_a_configuration_without_sense_names_its_field(client: Any, body: bytes, field: str):
    """FLW-23: whose session it is, the key says."""
    reply = await client.http.post(SESSIONS, content=body)
    assert (reply.status_code, list(reply.json()["details"])) == (400, [field])
    assert (await client.http.get(SESSIONS)).json()["total"] == 0


async def test_where_voice_is_off_there_is_no_session(client: Any, new_client: Any):
    reply = await client.http.patch("/api/v2/tenants/me/settings", json={"default_voice_provider": "disabled"})
    assert reply.status_code == 200
    other_key = await new_client("realtime", tenant=client.tenant)
    reply = await other_key.http.post(SESSIONS)
    assert (reply.status_code, reply.json()["error"]) == (403, "voice_disabled")


async def test_sessions_are_found_by_what_they_are(service: Any, client: Any):
    made = [(await client.http.post(SESSIONS)).json()["session_id"] for _ in range(3)]
    await client.http.delete(f"{SESSIONS}/{made[0]}")
    project = (await client.http.get("/api/v2/projects")).json()["items"][0]["id"]
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).isoformat()

    async def found(**query: Any) -> set[str]:
        reply = await client.http.get(SESSIONS, params=query)
        assert reply.status_code == 200, reply.text
        return {each["id"] for each in reply.json()["items"]}

    assert await found() == set(made)
    assert await found(status="closed") == await found(status="terminated") == {made[0]}
    assert await found(status="created") == set(made[1:])
    assert await found(project=project, api_key=str(client.key_id)) == set(made)
    assert await found(**{"from": tomorrow}) == await found(project=str(uuid.uuid4())) == set()
    assert await found(to=tomorrow) == set(made)


@pytest.mark.parametrize(
    "query", ["status=open", "from=yesterday", "from=2026-01-01T00:00:00", "project=x", "api_key=x"]
)
async def test_a_filter_without_sense_is_refused(client: Any, query: str):
    reply = await client.http.get(f"{SESSIONS}?{query}")
    assert (reply.status_code, reply.json()["error"]) == (400, "validation_error")


async def test_a_session_tells_what_was_said(service: Any, client: Any):
    made = uuid.UUID((await client.http.post(SESSIONS)).json()["session_id"])
    said = [(EventType.TRANSCRIPT, "hello"), (EventType.RESPONSE, "good day"), (EventType.SYSTEM, "x")]
    lines = [Event(number, kind, {"text": text}) for number, (kind, text) in enumerate(said)]
    await sessions.record(service.database, client.tenant, made, lines)
    told = (await client.http.get(f"{SESSIONS}/{made}/")).json()
    assert [each["content"]["text"] for each in told["transcript"]] == ["hello", "good day"]
    assert (told["status"], told["metrics"]["input_tokens"], told["context"]) == ("created", 0, {})
    assert (await client.http.get(f"/api/v2/voice/sessions/{made}")).json() == told
    events = f"{SESSIONS}/{made}/events"
    assert [each["sequence"] for each in (await client.http.get(events)).json()["items"]] == [0, 1, 2]
    assert [
        each["sequence"] for each in (await client.http.get(f"{events}?after_sequence=0&limit=1")).json()["items"]
    ] == [1]
    assert [each["sequence"] for each in (await client.http.get(f"{events}?type=system")).json()["items"]] == [2]
    assert (await client.http.get(f"{events}?type=gossip")).status_code == 400


async def test_a_session_takes_context_until_it_ends(client: Any):
    there = f"{SESSIONS}/{(await client.http.post(SESSIONS)).json()['session_id']}"
    reply = await client.http.patch(there, json={"context": {"topic": "weather"}, "config": {"voice": "slt"}})
    assert (reply.json()["context"], reply.json()["config"]) == ({"topic": "weather"}, {"voice": "slt"})
    assert (await client.http.patch(there, json={"context": {"topic": None}})).json()["context"] == {}
    for wrong in ({"config": {"door": "realtime"}}, {"config": {"speed": 100}}, {"config": []}, {"status": "active"}):
        assert (await client.http.patch(there, json=wrong)).status_code == 400
    await client.http.post(f"{there}/terminate")
    assert (await client.http.patch(there, json={"context": {"a": 1}})).status_code == 409


@pytest.mark.parametrize("how", ["POST", "DELETE"])
async def test_a_session_is_ended_with_its_connection(service: Any, client: Any, how: str):
    """CON-28."""
    made = (await client.http.post(SESSIONS)).json()["session_id"]
    there = f"{SESSIONS}/{made}"
    if how == "POST":
        reply, reason = await client.http.post(f"{there}/terminate", json={"reason": "spam"}), "spam"
    else:
        reply, reason = await client.http.delete(there), "terminated by request"
    assert (reply.status_code, reply.json()["status"], reply.json()["termination_reason"]) == (
        200,
        "terminated",
        reason,
    )
    assert (uuid.UUID(made), reason) in service.gateway.ended
    assert (await client.http.request(how, there + "/terminate" * (how == "POST"))).status_code == 409
    found = (await audit.search(service.database, client.tenant, resource_type="session")).items
    assert any(row.resource_id == made and row.actor_id == client.key_id for row in found)


async def test_sessions_are_exported_as_a_table(service: Any, client: Any):
    made = [(await client.http.post(SESSIONS)).json()["session_id"] for _ in range(3)]
    await client.http.post(f"{SESSIONS}/{made[0]}/terminate", json={"reason": "=1+1"})
    reply = await client.http.get(f"{SESSIONS}/export")
    assert reply.headers["content-type"].startswith("text/csv")
    assert "attachment" in reply.headers["content-disposition"]
    rows = {row["id"]: row for row in csv.DictReader(io.StringIO(reply.text))}
    assert set(rows) == set(made)
    assert rows[made[0]]["termination_reason"] == "'=1+1"
    reply = await client.http.get(f"{SESSIONS}/export?status=closed")
    assert [row["id"] for row in csv.DictReader(io.StringIO(reply.text))] == [made[0]]


async def test_who_may_not_export_may_still_look(new_client: Any):
    client = await new_client("sessions")
    assert (await client.http.get(SESSIONS)).status_code == 200
    assert (await client.http.get(f"{SESSIONS}/export")).status_code == 403


async def test_a_key_that_only_speaks_sees_nothing(new_client: Any):
    client = await new_client("realtime")
    made = (await client.http.post(SESSIONS)).json()["session_id"]
    for path in ("", f"/{made}", f"/{made}/events"):
        assert (await client.http.get(SESSIONS + path)).status_code == 403


@pytest.mark.parametrize("name", ["x", "-" * 36, "g" * 36, "11111111-2222-4333-8444-55555555555g"])
async def test_an_id_that_is_none_is_refused_before_it_is_looked_up(client: Any, name: str):
    """FLW-74."""
    reply = await client.http.get(f"{SESSIONS}/{name}")
    assert (reply.status_code, reply.json()["error"]) == (404, "not_found")


async def test_the_monthly_limit_is_a_limit(operator: httpx.AsyncClient, client: Any):
    await operator.patch(f"/api/v2/admin/tenants/{client.tenant}", json={"max_sessions_per_month": 1})
    assert (await client.http.post(SESSIONS)).status_code == 201
    reply = await client.http.post(SESSIONS)
    assert (reply.status_code, reply.json()["error"]) == (403, "tenant_limit_exceeded")
