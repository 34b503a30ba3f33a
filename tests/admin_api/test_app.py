"""The document of the service, and whether it says what is served."""

from __future__ import annotations

import asyncio
import re
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from agentvoicebox.admin_api import app, auth, health


@pytest.fixture
async def document(http: httpx.AsyncClient) -> Any:
    """The OpenAPI document."""
    return (await http.get("/api/v2/openapi.json")).json()


def operations(document: Any) -> list[tuple[str, str, Any]]:
    return [(path, method, told) for path, item in document["paths"].items() for method, told in item.items()]


async def test_the_document_names_itself(document: Any):
    assert (document["info"]["title"], document["info"]["version"]) == ("AgentVoiceBox API", "2.0.0")
    assert {"bearer", "header"} == set(document["components"]["securitySchemes"])


async def test_every_error_has_the_one_format(document: Any):
    error = document["components"]["schemas"]["Error"]
    assert set(error["required"]) == {"error", "message"}
    for path, method, told in operations(document):
        for status, answer in told["responses"].items():
            if int(status) >= 400 and (path, status) != ("/health/ready", "503"):
                schema = answer["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/Error"}, (path, method, status)
        assert "422" not in told["responses"]


async def test_every_operation_says_what_it_does_and_who_may(document: Any):
    names = [told["operationId"] for _, _, told in operations(document)]
    assert len(set(names)) == len(names)
    for path, method, told in operations(document):
        assert told["description"], (path, method)
        assert told["x-admission"]
        public = told["x-admission"] == "anybody"
        assert public == ("security" not in told)
        assert public or {"401", "403", "429"} <= set(told["responses"])
        assert set(re.findall(r"\{(\w+)\}", path)) == {
            each["name"] for each in told.get("parameters", []) if each["in"] == "path"
        }


async def test_the_document_describes_bodies(document: Any):
    body = document["paths"]["/api/v2/sessions"]["post"]["requestBody"]
    properties = body["content"]["application/json"]["schema"]["properties"]
    assert {"voice", "speed", "language", "turn_detection"} <= set(properties)
    new = document["paths"]["/api/v2/admin/tenants"]["post"]["requestBody"]
    assert new["required"] is True
    assert new["content"]["application/json"]["schema"]["required"] == ["name", "slug"]


async def test_the_page_lists_everything_and_fetches_nothing(http: httpx.AsyncClient, document: Any):
    reply = await http.get("/api/v2/docs")
    assert reply.headers["content-type"].startswith("text/html")
    for path, _, _ in operations(document):
        assert f"<code>{path}</code>" in reply.text
    assert re.findall(r"(?:src|href)=\"(.*?)\"", reply.text) == ["openapi.json"]
    assert "<script" not in reply.text
    assert "default-src 'none'" in reply.headers["content-security-policy"]


async def test_health_is_there_for_anybody(http: httpx.AsyncClient):
    assert (await http.get("/health")).json() == {"status": "ok"}


async def test_readiness_names_what_is_missing(service: Any, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(health, "FRESH", 0.0)
    monkeypatch.setattr(health, "PATIENCE", 60.0)
    reply = await http.get("/health/ready")
    assert (reply.status_code, reply.json()) == (200, {"status": "ok", "checks": {"db": "ok"}})

    async def alone() -> str:
        return "degraded"

    monkeypatch.setitem(service.app.state.readiness._checks, "state", alone)
    reply = await http.get("/health/ready")
    assert (reply.status_code, reply.json()["status"], reply.json()["checks"]["state"]) == (200, "degraded", "degraded")

    async def away() -> None:
        raise OSError("secret-host:6379 refused")

    monkeypatch.setitem(service.app.state.readiness._checks, "redis", away)
    reply = await http.get("/health/ready")
    assert reply.status_code == 503
    assert reply.json() == {"status": "down", "checks": {"db": "ok", "state": "degraded", "redis": "down"}}


async def test_however_many_ask_each_part_is_asked_once_a_second(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(health, "time", SimpleNamespace(monotonic=lambda: now[0]))
    asked = 0

    async def part() -> None:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.01)

    readiness = health.Readiness({"db": part})
    answers = await asyncio.gather(*(readiness.read() for _ in range(50)))
    answers.append(await readiness.read())
    assert {answer.status for answer in answers} == {"ok"}
    assert asked == 1
    now[0] += health.FRESH
    assert (await readiness.read()).status == "ok"
    assert asked == 2


async def test_what_is_not_there_is_not_found(http: httpx.AsyncClient):
    for path in ("/", "/nothing", "/api", "/api/v2", "/docs", "/openapi.json", "/redoc", "/api/v3/tenants/me"):
        reply = await http.get(path)
        assert (reply.status_code, reply.json()["error"]) == (404, "not_found")


def test_an_admission_names_permissions_of_the_schema():
    """FLW-72: a permission that does not exist would let nobody in, or, asked wrongly, everybody."""
    from agentvoicebox.tenancy.permissions.rules import EVALUATOR

    found = [route for router in app.ROUTERS for route in router.routes]
    named = [auth.admission(route) for route in found]  # type: ignore[arg-type]
    assert any(isinstance(each, auth.May) for each in named)
    for each in named:
        if isinstance(each, auth.May):
            for resource, permission in each._wanted:
                EVALUATOR.require(resource, permission)
