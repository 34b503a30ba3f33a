"""The REST service: who may, what comes back, and how errors look."""

from __future__ import annotations

import uuid
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from agentvoicebox.admin_api import app, auth
from agentvoicebox.tenancy import sessions


@pytest.fixture
async def http(stack: Any):
    async with httpx.AsyncClient(base_url=stack.url) as client:
        yield client


async def test_a_session_is_created_for_the_tenant_of_the_key(stack: Any, http: httpx.AsyncClient, customer: Any):
    config = {"voice": "rms", "modality": "text", "turn_detection": {"silence_duration_ms": 400}}
    reply = await http.post("/api/v2/sessions", json=config, headers=customer.headers)
    assert reply.status_code == 201
    assert len(reply.headers["x-request-id"]) == 32
    body = reply.json()
    assert body["ws_url"] == f"{stack.url.replace('http', 'ws', 1)}/ws/v2/sessions/{body['session_id']}"
    row = await sessions.get(stack.database, customer.id, uuid.UUID(body["session_id"]))
    assert row.status == "created"
    assert row.config == config
    assert row.api_key_id == customer.key_id


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer avb_" + "x" * 43}, {"Authorization": "Bearer"}])
async def test_without_a_good_key_there_is_no_session(http: httpx.AsyncClient, headers: dict[str, str]):
    reply = await http.post("/api/v2/sessions", headers=headers)
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert set(reply.json()) == {"error", "message"}


async def test_a_scope_is_needed(http: httpx.AsyncClient, new_customer: Any):
    customer = await new_customer(scopes=("billing",))
    reply = await http.post("/api/v2/sessions", headers=customer.headers)
    assert (reply.status_code, reply.json()["error"]) == (403, "insufficient_scope")


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"{", 400, None),
        (b"[]", 400, None),
        (b"\xff\xfe", 400, None),
        (b'{"speed": 9}', 400, "speed"),
        (b'{"speed": "fast"}', 400, "speed"),
        (b'{"tenant_id": "x"}', 400, None),
        (b'{"turn_detection": {"silence_duration_ms": 1}}', 400, "turn_detection.silence_duration_ms"),
        (b" " * 70_000, 413, None),
    ],
)
async def test_a_bad_body_gets_one_clear_error(
    http: httpx.AsyncClient, customer: Any, body: bytes, status: int, param: str | None
):
    reply = await http.post("/api/v2/sessions", content=body, headers=customer.headers)
    assert reply.status_code == status
    error = reply.json()
    assert error["message"]
    if param is not None:
        assert list(error["details"]) == [param]


async def test_health_is_public_and_everything_else_is_not_there(http: httpx.AsyncClient):
    assert (await http.get("/health")).json() == {"status": "ok"}
    reply = await http.get("/nothing")
    assert (reply.status_code, reply.json()["error"]) == (404, "not_found")
    reply = await http.get("/api/v2/sessions")
    assert (reply.status_code, reply.json()["error"]) == (405, "method_not_allowed")


async def test_the_document_describes_the_body(http: httpx.AsyncClient):
    document = (await http.get("/api/v2/openapi.json")).json()
    body = document["paths"]["/api/v2/sessions"]["post"]["requestBody"]
    properties = body["content"]["application/json"]["schema"]["properties"]
    assert {"voice", "speed", "language", "turn_detection"} <= set(properties)


async def test_every_route_says_who_may(http: httpx.AsyncClient):
    """Deny by default: a route without a declared admission is a mistake."""
    seen = set()
    for router in app.ROUTERS:
        for route in router.routes:
            assert isinstance(route, APIRoute)
            seen.add(route.path)
            calls = [dependency.call for dependency in route.dependant.dependencies]
            admissions = [call for call in calls if getattr(call, "__module__", "") == auth.__name__]
            assert admissions, f"{route.path} does not say who may pass"
    document = (await http.get("/api/v2/openapi.json")).json()
    assert seen == set(document["paths"]), "there is no other way in"
