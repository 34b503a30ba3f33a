"""Deny by default: no route without a rule, and no way around the rules (FLW-33, FLW-70, FLW-71, FLW-72; P3)."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from fastapi import APIRouter
from sqlalchemy import text

from agentvoicebox.admin_api import app, auth, openapi
from agentvoicebox.tenancy import devices, domains, personas, projects, sessions, tenants, wake_words
from agentvoicebox.tenancy.personas import Character

UNKNOWN = "11111111-2222-4333-8444-555555555555"
BODIES = {
    "/{persona_id}/test": {"message": "hello"},
    "/default-persona": {"persona_id": None},
    "/devices": {"code": "00000000"},
    "/{device_id}": {"name": "x"},
    "/wake-words": {"phrase": "alexa"},
    "/{wake_word_id}": {"phrase": "okay nabu"},
    "/{skill_id}/settings": {"settings": {}},
    "/environments": {"name": "here"},
    "/deployments": {"environment_id": UNKNOWN, "version": "1"},
    "/settings": {"require_mfa": False},
    "/suspend": {"reason": "x"},
    "/projects": {"name": "x"},
    "/api-keys": {"name": "x"},
    "/tenants": {"name": "Name", "slug": "a-slug"},
    "/domains": {"domain": "voice.example.com"},
}
Route = tuple[str, str]


def every_route() -> list[tuple[str, str, auth.Admission]]:
    """Method, path and admission of each."""
    found = [route for router in app.ROUTERS for route in router.routes]
    return [(method, route.path_format, auth.admission(route)) for route in found for method in sorted(route.methods)]


ROUTES = every_route()
GUARDED = [(method, path) for method, path, admission in ROUTES if not isinstance(admission, auth.Public)]
OPERATORS = [(method, path) for method, path, admission in ROUTES if isinstance(admission, auth.Sysadmin)]
OVERALL = [(method, path) for method, path, admission in ROUTES if isinstance(admission, auth.MayOverall)]
THERE = [(method, path) for method, path, admission in ROUTES if isinstance(admission, auth.MayThere)]
PUBLIC = {"/health", "/health/ready", "/api/v2/openapi.json", "/api/v2/docs"}
PUBLIC |= {"/api/v2/pairings", "/api/v2/pairings/{pairing_id}"}


def body(method: str, path: str) -> Any:
    """Something that the route would take."""
    if method not in ("POST", "PUT", "PATCH"):
        return None
    return next((sent for end, sent in BODIES.items() if path.endswith(end)), {})


def filled(path: str, **ids: object) -> str:
    """The path with ids in it, unknown ones where none is given."""
    return re.sub(r"\{(\w+)\}", lambda found: str(ids.get(found[1], UNKNOWN)), path)


async def ask(http: httpx.AsyncClient, method: str, path: str, headers: Any = None, **ids: object) -> httpx.Response:
    sent = body(method, path)
    return await http.request(method, filled(path, **ids), json=sent, headers=headers)


def test_only_these_routes_are_public():
    assert {path for _, path, admission in ROUTES if isinstance(admission, auth.Public)} == PUBLIC
    assert len(GUARDED) > 50


def test_there_is_no_way_in_beside_the_routers(service: Any):
    served = {(method, route.path_format) for route in openapi.routes(service.app) for method in route.methods}
    assert served == {(method, path) for method, path, _ in ROUTES}


def test_a_route_without_a_rule_does_not_start(service: Any, monkeypatch: pytest.MonkeyPatch):
    open_to_all = APIRouter()

    @open_to_all.get("/api/v2/forgotten")
    async def forgotten() -> None: ...

    monkeypatch.setattr(app, "ROUTERS", (*app.ROUTERS, open_to_all))
    with pytest.raises(AssertionError, match="must say who may use it"):
        app.create(service.database, service.app.state.keyring, service.limiter, service.ledger)


async def test_nobody_is_let_in_without_a_key(http: httpx.AsyncClient, client: Any):
    """FLW-70: naming a tenant is no credential."""
    for method, path in GUARDED:
        for headers in ({}, {"X-Tenant-ID": str(client.tenant)}):
            reply = await ask(http, method, path, headers, tenant_id=client.tenant)
            assert (reply.status_code, reply.json()["error"]) == (401, "authentication_failed"), (method, path)
            assert reply.headers["www-authenticate"] == "Bearer"


async def test_a_key_without_the_scope_is_refused(new_client: Any):
    stranger = await new_client("billing")
    for method, path in GUARDED:
        reply = await ask(stranger.http, method, path, tenant_id=stranger.tenant)
        code = "permission_denied" if (method, path) in OPERATORS else "insufficient_scope"
        assert (reply.status_code, reply.json()["error"]) == (403, code), (method, path)


async def test_what_is_the_operators_is_no_tenants(client: Any):
    for method, path in OPERATORS:
        reply = await ask(client.http, method, path, tenant_id=client.tenant)
        assert (reply.status_code, reply.json()["error"]) == (403, "permission_denied"), (method, path)


async def test_another_tenant_cannot_be_named(client: Any, new_client: Any):
    """CON-18, P19: by header, whatever the route; an unknown tenant gets the same answer as a real one."""
    other = await new_client("admin")
    for method, path in [route for route in GUARDED if route not in OPERATORS]:
        answers = []
        for named in (other.tenant, UNKNOWN):
            reply = await ask(client.http, method, path, {"X-Tenant-ID": str(named)}, tenant_id=client.tenant)
            assert reply.status_code == 403, (method, path)
            answers.append(reply.json())
        assert answers[0] == answers[1]


async def test_another_tenant_cannot_be_named_in_the_path(client: Any, new_client: Any):
    other = await new_client("admin")
    for method, path in THERE:
        real = await ask(client.http, method, path, tenant_id=other.tenant)
        unknown = await ask(client.http, method, path)
        assert (real.status_code, unknown.status_code) == (403, 403), (method, path)
        assert real.json() == unknown.json()


BARE = [(method, path) for method, path in GUARDED if re.search(r"\{(?!tenant_id|name|provider|skill_id)", path)]


async def test_an_id_of_another_tenant_is_as_unknown_as_any(service: Any, client: Any, new_client: Any):
    """CON-18: nothing tells whether the row exists, and nothing happens to it."""
    other = await new_client("admin")
    store = service.database
    project = await projects.create(store, other.tenant, "Theirs")
    session = await sessions.create(store, other.tenant)
    domain = await domains.add(store, other.tenant, f"{other.slug}.example.com")
    persona = await personas.create(store, other.tenant, Character(name="Theirs"))
    device = await devices.arrive(store, other.tenant, other.key_id, None, "Theirs")
    wake_word = await wake_words.create(store, other.tenant, "okay nabu")
    listed = (await other.http.get("/api/v2/audit")).json()["items"]
    ids = {
        "persona_id": persona.id,
        "device_id": device.id,
        "wake_word_id": wake_word.id,
        "key_id": other.key_id,
        "project_id": project.id,
        "session_id": session.id,
        "domain_id": domain.id,
        "entry_id": listed[0]["id"],
    }
    before = (await other.http.get("/api/v2/audit")).json()["total"]
    for method, path in BARE:
        assert set(re.findall(r"\{(\w+)\}", path)) <= set(ids)
        theirs = await ask(client.http, method, path, **ids)
        unknown = await ask(client.http, method, path)
        assert (theirs.status_code, unknown.status_code) == (404, 404), (method, path)
        assert theirs.json() == unknown.json()
    assert (await other.http.get("/api/v2/audit")).json()["total"] == before


async def test_p3_tenant_access_control_at_the_door(service: Any, operator: Any, client: Any, new_client: Any):
    """No tenant: 400. Suspended: 403. Deleted or unknown: 404. Whatever the route that needs one."""
    pending = await new_client("admin")
    async with service.database.system() as session:
        await session.execute(text("UPDATE tenants SET status = 'pending' WHERE id = :id"), {"id": pending.tenant})
    suspended, deleted = await new_client("admin"), await new_client("admin")
    await tenants.suspend(service.database, suspended.tenant, "unpaid")
    await tenants.delete(service.database, deleted.tenant)
    expected = {
        suspended: (403, "tenant_suspended"),
        pending: (403, "tenant_pending"),
        deleted: (404, "tenant_not_found"),
    }
    needing = [route for route in GUARDED if route not in OPERATORS and route not in BARE]
    for method, path in needing:
        if "{tenant_id}" not in path and (method, path) not in OVERALL:
            reply = await ask(operator, method, path)
            assert (reply.status_code, reply.json()["error"]) == (400, "tenant_required"), path
        for whose, answer in expected.items():
            reply = await ask(whose.http, method, path, tenant_id=whose.tenant)
            assert (reply.status_code, reply.json()["error"]) == answer, path
            reply = await ask(operator, method, path, {"X-Tenant-ID": str(whose.tenant)}, tenant_id=whose.tenant)
            assert (reply.status_code, reply.json()["error"]) == answer, path
        reply = await ask(operator, method, path, {"X-Tenant-ID": UNKNOWN})
        assert (reply.status_code, reply.json()["error"]) == (404, "tenant_not_found"), path


@pytest.mark.parametrize(
    "path", ["/healthXYZ", "/health/x", "/metricsfoo", "/api/v2/admin", "/api/v2/adminx", "/api/v2x"]
)
async def test_what_begins_like_a_free_path_is_not_free(http: httpx.AsyncClient, path: str):
    """FLW-33: whole paths count."""
    reply = await http.get(path)
    assert reply.status_code == 404
    assert "x-ratelimit-limit" in reply.headers


async def test_the_operator_acts_for_the_tenant_that_it_names(operator: httpx.AsyncClient, client: Any):
    reply = await operator.get("/api/v2/tenants/me", headers={"X-Tenant-ID": str(client.tenant)})
    assert reply.json()["slug"] == client.slug
    assert (await operator.get(f"/api/v2/tenants/{client.tenant}")).json()["slug"] == client.slug


async def test_header_and_path_must_agree(operator: httpx.AsyncClient, client: Any, new_client: Any):
    other = await new_client("admin")
    reply = await operator.get(f"/api/v2/tenants/{client.tenant}", headers={"X-Tenant-ID": str(other.tenant)})
    assert (reply.status_code, reply.json()["error"]) == (400, "tenant_ambiguous")


@pytest.mark.parametrize("named", ["x", "", "00000000-0000-0000-0000-000000000000", "1' OR '1'='1"])
async def test_a_tenant_that_is_none_is_refused(operator: httpx.AsyncClient, client: Any, named: str):
    for http in (operator, client.http):
        reply = await http.get("/api/v2/tenants/me", headers={"X-Tenant-ID": named})
        assert reply.status_code in (400, 403, 404)
