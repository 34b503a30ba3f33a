"""What every request passes before its route: credentials, networks, rates; and what is written down about it."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from agentvoicebox.config.errors import Unavailable
from agentvoicebox.tenancy import audit, keys, metering, tenants
from agentvoicebox.tenancy.models import PLATFORM, Metric

ME = "/api/v2/tenants/me"


# --- credentials ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Authorization": "Bearer avb_" + "x" * 43}, "invalid_api_key"),
        ({"Authorization": "Bearer avb_operator_" + "x" * 43}, "invalid_api_key"),
        ({"X-API-Key": "avb_" + "x" * 43}, "invalid_api_key"),
        ({"X-API-Key": ""}, "invalid_api_key"),
        ({"Authorization": "Bearer"}, "authentication_failed"),
        ({"Authorization": ""}, "authentication_failed"),
        ({"Authorization": "Basic dXNlcjpwYXNz"}, "authentication_failed"),
        ({"Authorization": "Bearer \xff\xfe"}, "invalid_api_key"),
    ],
)
@pytest.mark.parametrize("path", [ME, "/api/v2/openapi.json", "/api/v2/nothing"])
async def test_a_bad_credential_never_becomes_an_anonymous_request(
    http: httpx.AsyncClient, headers: dict[str, str], code: str, path: str
):
    """FLW-07: not even where anybody may come in."""
    sent = {name: value.encode("latin-1") for name, value in headers.items()}
    reply = await http.get(path, headers=sent)  # type: ignore[arg-type]
    assert (reply.status_code, reply.json()["error"]) == (401, code)
    assert reply.headers["www-authenticate"] == "Bearer"


async def test_both_headers_work_and_bearer_comes_first(http: httpx.AsyncClient, client: Any):
    assert (await http.get(ME, headers={"X-API-Key": client.key})).status_code == 200
    both = {"X-API-Key": client.key, "Authorization": "Bearer avb_" + "x" * 43}
    assert (await http.get(ME, headers=both)).status_code == 401
    both = {"X-API-Key": "avb_" + "x" * 43, "Authorization": f"bearer {client.key}"}
    assert (await http.get(ME, headers=both)).status_code == 200
    twice = [("X-API-Key", client.key), ("X-API-Key", client.key)]
    assert (await http.get(ME, headers=twice)).status_code == 401


@pytest.mark.parametrize("query", ["key={}", "api-key={}", "token={}", "access_token={}", "x={}", "api_key={}"])
async def test_a_key_in_the_address_is_refused(client: Any, query: str):
    reply = await client.http.get(f"{ME}?{query.format(client.key)}")
    assert (reply.status_code, reply.json()["error"]) == (401, "invalid_api_key")
    assert client.key not in reply.text


async def test_keys_that_are_no_longer_good_say_why(service: Any, http: httpx.AsyncClient, client: Any):
    soon = datetime.now(UTC) + timedelta(hours=1)
    expired = await keys.issue(service.database, client.tenant, "short", ("admin",), soon)
    async with service.database.system() as session:
        past = text("UPDATE api_keys SET expires_at = now() - interval '1 second' WHERE id = :id")
        await session.execute(past, {"id": expired.id})
    revoked = await keys.issue(service.database, client.tenant, "gone", ("admin",))
    await keys.revoke(service.database, client.tenant, revoked.id)
    for issued, code in ((expired, "api_key_expired"), (revoked, "api_key_revoked")):
        reply = await http.get(ME, headers={"X-API-Key": issued.key})
        assert (reply.status_code, reply.json()["error"]) == (401, code)


async def test_only_from_the_networks_of_the_tenant(client: Any, operator: httpx.AsyncClient):
    """TEN-20."""
    assert (await client.http.get(ME)).status_code == 200
    settings = f"/api/v2/tenants/{client.tenant}/settings"
    assert (await operator.patch(settings, json={"allowed_ip_ranges": ["203.0.113.0/24"]})).status_code == 200
    async with asyncio.timeout(30):
        while (reply := await client.http.get(ME)).status_code == 200:
            await asyncio.sleep(0.02)
    assert (reply.status_code, reply.json()["error"]) == (403, "ip_not_allowed")
    forwarded = await client.http.get(ME, headers={"X-Forwarded-For": "203.0.113.9", "Forwarded": "for=203.0.113.9"})
    assert forwarded.status_code == 403  # FLW-21: nobody declared a proxy
    assert (await operator.patch(settings, json={"allowed_ip_ranges": ["127.0.0.0/8"]})).status_code == 200
    async with asyncio.timeout(30):
        while (await client.http.get(ME)).status_code != 200:
            await asyncio.sleep(0.02)


# --- rates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [ME, "/api/v2/nothing", "/api/v2/projects?page=0", "/api/v2/openapi.json"])
async def test_every_answer_tells_the_rate(http: httpx.AsyncClient, client: Any, path: str):
    """RAT-04: also those of errors."""
    for asking in (http, client.http):
        reply = await asking.get(path)
        for name in ("limit", "remaining", "reset"):
            (value,) = reply.headers.get_list(f"x-ratelimit-{name}")
            assert int(value) >= 0


@pytest.mark.parametrize("path", ["/health", "/health/", "/health/ready", "/metrics"])
async def test_machines_of_the_operator_are_not_limited(http: httpx.AsyncClient, frozen: None, path: str):
    """RAT-06."""
    for _ in range(70):
        reply = await http.get(path)
        assert reply.status_code != 429
    assert "x-ratelimit-limit" not in reply.headers


async def test_a_rate_that_is_met_says_when_to_come_again(frozen: None, service: Any, new_client: Any):
    """RAT-05, P14."""
    client = await new_client("admin", rate_class="standard")
    left = []
    for _ in range(120):
        reply = await client.http.get(ME)
        assert (reply.status_code, reply.headers["x-ratelimit-limit"]) == (200, "120")
        left.append(int(reply.headers["x-ratelimit-remaining"]))
    assert left == list(range(119, -1, -1))
    reply = await client.http.get(ME)
    assert reply.status_code == 429
    assert set(reply.json()) == {"error", "message", "retry_after"}
    assert reply.json()["error"] == "rate_limit_exceeded"
    assert reply.headers.get_list("retry-after") == [str(reply.json()["retry_after"])]
    assert reply.json()["retry_after"] >= 1
    assert reply.headers["x-ratelimit-remaining"] == "0"
    service.clock.now += reply.json()["retry_after"]
    assert (await client.http.get(ME)).status_code == 200


async def test_guessing_keys_is_slowed_down_before_they_are_looked_at(
    frozen: None, http: httpx.AsyncClient, client: Any
):
    """FLW-69: not even whether the next one is good is found out."""
    for _ in range(10):
        assert (await http.get(ME, headers={"X-API-Key": "avb_" + "x" * 43})).status_code == 401
    reply = await http.get(ME, headers={"X-API-Key": client.key})
    assert (reply.status_code, reply.json()["error"]) == (429, "rate_limit_exceeded")
    assert int(reply.headers["retry-after"]) >= 1


async def test_who_is_known_does_not_suffer_from_neighbours_who_guess(
    frozen: None, http: httpx.AsyncClient, client: Any, operator: httpx.AsyncClient
):
    """Whole companies share one address, and so do all clients of a proxy that was not declared."""
    assert (await http.get(ME, headers={"X-API-Key": client.key})).status_code == 200
    for _ in range(12):
        reply = await http.get(ME, headers={"X-API-Key": "avb_" + "x" * 43})
    assert reply.status_code == 429
    # A node that has stood still knows nobody until it has seen what has changed meanwhile.
    async with asyncio.timeout(30):
        while (reply := await http.get(ME, headers={"X-API-Key": client.key})).status_code == 429:
            await asyncio.sleep(0.02)
    assert reply.status_code == 200
    assert (await operator.get("/api/v2/admin/tenants")).status_code == 200


async def test_an_address_without_a_key_has_its_own_rate(frozen: None, http: httpx.AsyncClient, client: Any):
    for _ in range(60):
        assert (await http.get("/api/v2/openapi.json")).status_code == 200
    assert (await http.get("/api/v2/openapi.json")).status_code == 429
    assert (await client.http.get(ME)).status_code == 200


# --- metering ---------------------------------------------------------------------------------------------------------


async def calls(service: Any, tenant: uuid.UUID) -> float:
    return (await metering.totals(service.database, tenant)).get(Metric.API_CALLS, 0)


async def test_a_request_is_in_the_ledger_before_its_answer(service: Any, client: Any):
    for expected, path in enumerate([ME, "/api/v2/nothing", "/api/v2/projects?page=0", "/api/v2/admin/tenants"], 1):
        await client.http.get(path)
        assert await calls(service, client.tenant) == expected
    await client.http.get("/health")
    assert await calls(service, client.tenant) == 4


async def test_the_operator_and_refused_credentials_cost_the_tenant_nothing(
    service: Any, http: httpx.AsyncClient, operator: httpx.AsyncClient, client: Any
):
    await operator.get(ME, headers={"X-Tenant-ID": str(client.tenant)})
    await tenants.suspend(service.database, client.tenant, "unpaid")
    async with asyncio.timeout(30):
        while (await client.http.get(ME)).status_code != 403:
            await asyncio.sleep(0.02)
    before = await calls(service, client.tenant)
    assert (await client.http.get(ME)).status_code == 403
    assert await calls(service, client.tenant) == before


async def test_what_cannot_be_metered_is_not_answered(service: Any, client: Any, monkeypatch: pytest.MonkeyPatch):
    async def away(usages: Any) -> None:
        raise Unavailable("The store does not answer in time. Try again.", code="store_unavailable")

    monkeypatch.setattr(service.ledger, "record", away)
    reply = await client.http.get(ME)
    assert (reply.status_code, reply.json()["error"]) == (503, "store_unavailable")
    assert "slug" not in reply.text
    assert len(reply.headers["x-request-id"]) == 32


async def test_a_use_of_a_key_is_noted(service: Any, client: Any, monkeypatch: pytest.MonkeyPatch):
    used = []
    monkeypatch.setattr(service.app.state.keyring, "used", lambda grant, ip: used.append((grant.key_id, ip)))
    await client.http.get(ME)
    assert used == [(client.key_id, "127.0.0.1")]


# --- audit ------------------------------------------------------------------------------------------------------------


async def denials(service: Any, tenant: uuid.UUID) -> list[Any]:
    found = await audit.search(service.database, tenant, page_size=100)
    return [row for row in found.items if row.details.get("denied")]


@pytest.mark.parametrize(
    ("method", "path", "sent", "status", "code"),
    [
        ("GET", "/api/v2/admin/tenants", None, 403, "permission_denied"),
        ("DELETE", "/api/v2/api-keys/11111111-2222-4333-8444-555555555555", None, 404, "not_found"),
        ("POST", "/api/v2/projects", {"name": ""}, 400, "validation_error"),
        ("PATCH", "/api/v2/tenants/me/settings", {"x": 1}, 400, "validation_error"),
        ("PUT", "/api/v2/projects", {}, 405, "method_not_allowed"),
    ],
)
async def test_a_refusal_is_in_the_audit_log(
    service: Any, client: Any, method: str, path: str, sent: Any, status: int, code: str
):
    """FLW-28: with who, from where and the id of the request."""
    reply = await client.http.request(method, path, json=sent)
    assert reply.status_code == status
    (row,) = await denials(service, client.tenant)
    assert (row.details["status"], row.details["code"]) == (status, code)
    assert (row.actor_type, row.actor_id) == ("api_key", client.key_id)
    assert str(row.ip_address) == "127.0.0.1"
    assert row.request_id == reply.headers["x-request-id"]
    assert row.description == f"{method} {path}"


async def test_what_was_only_not_found_by_a_reader_is_not_in_the_log(service: Any, client: Any):
    assert (await client.http.get("/api/v2/nothing")).status_code == 404
    assert await denials(service, client.tenant) == []


async def test_a_refused_credential_is_in_the_log_of_the_platform(service: Any, http: httpx.AsyncClient):
    reply = await http.get(ME, headers={"X-API-Key": "avb_" + "y" * 43, "User-Agent": f"probe-{uuid.uuid4()}"})
    assert reply.status_code == 401
    found = await denials(service, PLATFORM)
    assert any(row.details["status"] == 401 for row in found)
    assert "y" * 43 not in str([row.details for row in found])


async def test_a_refusal_stands_even_if_it_cannot_be_logged(
    service: Any, client: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    async def full(*_: Any) -> None:
        raise Unavailable("No room.")

    monkeypatch.setattr(audit, "denied", full)
    reply = await client.http.get("/api/v2/admin/tenants")
    assert reply.status_code == 403
    assert f"audit_lost {reply.headers['x-request-id']}" in caplog.text


async def test_what_succeeds_is_in_the_log_once(service: Any, client: Any):
    reply = await client.http.post("/api/v2/projects", json={"name": "New"})
    assert reply.status_code == 201
    found = (await audit.search(service.database, client.tenant, resource_type="project")).items
    (row,) = [row for row in found if row.resource_id == reply.json()["id"]]
    assert (row.actor_id, row.request_id) == (client.key_id, reply.headers["x-request-id"])


async def test_a_client_cannot_choose_the_id_in_the_log(service: Any, client: Any):
    """FLW-30."""
    reply = await client.http.post("/api/v2/projects", json={"name": "New"}, headers={"X-Request-ID": "mine"})
    found = (await audit.search(service.database, client.tenant, resource_type="project")).items
    assert {row.request_id for row in found} >= {reply.headers["x-request-id"]}
    assert "mine" not in {row.request_id for row in found}


async def test_two_requests_do_not_share_an_actor(service: Any, new_client: Any):
    first, second = await new_client("admin"), await new_client("admin")
    requests = [each.http.post("/api/v2/projects", json={"name": "New"}) for each in (first, second) * 5]
    assert {reply.status_code for reply in await asyncio.gather(*requests)} == {201}
    for each in (first, second):
        found = (await audit.search(service.database, each.tenant, resource_type="project")).items
        assert {row.actor_id for row in found} == {each.key_id}
