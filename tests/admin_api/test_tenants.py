"""A tenant as it sees itself, and all of them as the operator does (API-020..036)."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import httpx
import pytest

from agentvoicebox.admin_api.domains import NoResolver

ME = "/api/v2/tenants/me"
ALL = "/api/v2/admin/tenants"
TENANT = {
    "id", "name", "slug", "tier", "status", "max_users", "max_projects", "max_api_keys", "max_sessions_per_month",
    "created_at", "updated_at", "activated_at",
}  # fmt: skip


def slug() -> str:
    return f"t-{uuid.uuid4().hex[:12]}"


async def test_a_tenant_reads_itself(client: Any):
    told = (await client.http.get(ME)).json()
    assert set(told) == TENANT
    assert (told["id"], told["slug"], told["status"]) == (str(client.tenant), client.slug, "active")
    assert (await client.http.get(f"/api/v2/tenants/{client.tenant}")).json() == told
    limits = (await client.http.get(f"{ME}/limits")).json()
    assert limits == {name: told[name] for name in told if name.startswith("max_")}


async def test_a_tenant_sees_how_much_of_its_limits_it_takes(client: Any):
    told = (await client.http.get(f"{ME}/usage")).json()
    assert set(told) == {"users", "projects", "api_keys", "sessions_this_month"}
    assert told["api_keys"] == {"current": 1, "limit": 500}
    assert told["projects"] == {"current": 1, "limit": 100}
    assert (await client.http.get(f"/api/v2/tenants/{client.tenant}/usage")).json() == told


async def test_a_tenant_changes_what_it_says_of_itself(client: Any):
    changes = {"name": "Renamed", "email": "Office@Example.com", "timezone": "Europe/Vienna"}
    reply = await client.http.patch(f"{ME}/profile", json=changes)
    assert reply.json() == {**changes, "email": "office@example.com"}
    assert (await client.http.get(f"{ME}/profile")).json() == reply.json()


@pytest.mark.parametrize(
    "change", [{"timezone": "Mars/Base"}, {"email": "x"}, {"name": "x"}, {"name": None}, {"tier": "pro"}]
)
async def test_a_profile_without_sense_is_refused(client: Any, change: dict[str, Any]):
    before = (await client.http.get(f"{ME}/profile")).json()
    reply = await client.http.patch(f"{ME}/profile", json=change)
    assert (reply.status_code, list(reply.json()["details"])) == (400, list(change))
    assert (await client.http.get(f"{ME}/profile")).json() == before


async def test_settings_are_changed_in_part_or_replaced(client: Any):
    """CON-08: by `me` and by id."""
    settings = f"{ME}/settings"
    start = (await client.http.get(settings)).json()
    assert len(start) == 12
    changed = (await client.http.patch(settings, json={"session_timeout_minutes": 5, "require_mfa": True})).json()
    assert changed == {**start, "session_timeout_minutes": 5, "require_mfa": True}
    there = f"/api/v2/tenants/{client.tenant}/settings"
    assert (await client.http.get(there)).json() == changed
    replaced = (await client.http.put(there, json={"primary_color": "#000000"})).json()
    assert replaced == {**start, "primary_color": "#000000"}


async def test_nobody_locks_themselves_out(client: Any, operator: httpx.AsyncClient):
    reply = await client.http.patch(f"{ME}/settings", json={"allowed_ip_ranges": ["203.0.113.0/24"]})
    assert (reply.status_code, reply.json()["error"]) == (409, "would_lock_out")
    assert (await client.http.get(ME)).status_code == 200


async def test_a_domain_is_claimed_proven_and_given_up(service: Any, client: Any):
    resolver = service.resolver
    name = f"{client.slug}.example.com"
    claim = (await client.http.post(f"{ME}/domains", json={"domain": name.upper()})).json()
    assert (claim["domain"], claim["verified_at"]) == (name, None)
    assert (await client.http.post(f"{ME}/domains", json={"domain": name})).status_code == 409
    assert (await client.http.post(f"{ME}/domains/{claim['id']}/verify")).json()["error"] == "domain_not_proven"
    assert (await client.http.post(f"{ME}/domains/{claim['id']}/primary")).status_code == 409
    resolver.texts[f"_agentvoicebox.{name}"] = [claim["token"]]
    assert (await client.http.post(f"{ME}/domains/{claim['id']}/verify")).json()["verified_at"] is not None
    assert (await client.http.post(f"{ME}/domains/{claim['id']}/primary")).json()["is_primary"] is True
    listed = (await client.http.get(f"{ME}/domains")).json()
    assert (listed["total"], listed["items"][0]["domain"]) == (1, name)
    assert (await client.http.delete(f"{ME}/domains/{claim['id']}")).status_code == 204
    assert (await client.http.get(f"{ME}/domains")).json()["items"] == []


async def test_without_dns_a_domain_waits(service: Any, client: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(service.app.state._state, "resolver", NoResolver())
    claim = (await client.http.post(f"{ME}/domains", json={"domain": f"{client.slug}.example.com"})).json()
    assert (await client.http.post(f"{ME}/domains/{claim['id']}/verify")).status_code == 503


async def test_the_host_name_of_another_tenant_is_refused(service: Any, client: Any, new_client: Any):
    """CTX-01, CTX-03: a proven host name names its tenant."""
    resolver = service.resolver
    other = await new_client("admin")
    name = f"{other.slug}.example.com"
    claim = (await other.http.post(f"{ME}/domains", json={"domain": name})).json()
    resolver.texts[f"_agentvoicebox.{name}"] = [claim["token"]]
    await other.http.post(f"{ME}/domains/{claim['id']}/verify")
    assert (await other.http.get(ME, headers={"Host": name})).status_code == 200
    assert (await client.http.get(ME, headers={"Host": name})).status_code == 403


# --- the operator -----------------------------------------------------------------------------------------------------


async def test_the_operator_makes_a_tenant(operator: httpx.AsyncClient):
    wanted = {"name": "A company", "slug": slug(), "tier": "pro", "email": "it@example.com", "timezone": "UTC"}
    reply = await operator.post(ALL, json=wanted)
    assert reply.status_code == 201
    made = reply.json()
    assert {name: made[name] for name in wanted} == wanted
    assert made["max_projects"] == 20
    listed = (await operator.get(ALL, params={"search": wanted["slug"]})).json()
    assert [(each["id"], each["project_count"], each["api_key_count"]) for each in listed["items"]] == [
        (made["id"], 1, 0)
    ]
    assert (await operator.get(f"{ALL}/{made['id']}")).json()["session_count"] == 0


async def test_the_shorter_address_does_the_same(operator: httpx.AsyncClient):
    """CON-07."""
    name = slug()
    made = (
        await operator.post("/api/v2/tenants", json={"name": "Name", "slug": name, "domain": f"{name}.example.com"})
    ).json()
    assert {"id", "name", "slug", "created_at"} <= set(made)
    domains = await operator.get(f"{ME}/domains", headers={"X-Tenant-ID": made["id"]})
    assert [each["domain"] for each in domains.json()["items"]] == [f"{name}.example.com"]
    listed = (await operator.get("/api/v2/tenants", params={"page": 1, "limit": 1})).json()
    assert set(listed) == {"items", "total", "page", "page_size"}
    assert (len(listed["items"]), listed["page_size"]) == (1, 1)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"slug": "Upper"}, "slug"),
        ({"slug": "a_b"}, "slug"),
        ({"slug": "-ab"}, "slug"),
        ({"slug": "ab"}, "slug"),
        ({"slug": "a" * 101}, "slug"),
        ({"slug": "slug\n"}, "slug"),
        ({"slug": "www"}, "slug"),
        ({"tier": "gold"}, "tier"),
        ({"tier": "PRO"}, "tier"),
        ({"timezone": "Nowhere"}, "timezone"),
        ({"email": "nobody"}, "email"),
        ({"name": "x"}, "name"),
        ({"parent_id": "11111111-2222-4333-8444-555555555555"}, "parent_id"),
        ({"status": "active"}, "status"),
    ],
)
async def test_a_tenant_without_sense_is_not_made(operator: httpx.AsyncClient, change: dict[str, str], field: str):
    before = (await operator.get(ALL)).json()["total"]
    reply = await operator.post(ALL, json={"name": "A company", "slug": slug()} | change)
    assert (reply.status_code, list(reply.json()["details"])) == (400, [field])
    assert (await operator.get(ALL)).json()["total"] == before


async def test_a_slug_is_taken_once(operator: httpx.AsyncClient, client: Any):
    """CON-57."""
    reply = await operator.post(ALL, json={"name": "Another", "slug": client.slug})
    assert (reply.status_code, reply.json()["error"], list(reply.json()["details"])) == (409, "conflict", ["slug"])


async def test_a_tier_brings_its_limits_and_some_may_be_set_apart(operator: httpx.AsyncClient, client: Any):
    reply = await operator.patch(f"{ALL}/{client.tenant}", json={"tier": "starter", "max_users": 7})
    told = reply.json()
    assert (told["tier"], told["max_projects"], told["max_users"]) == ("starter", 5, 7)
    assert (await operator.patch(f"/api/v2/tenants/{client.tenant}", json={"name": "Other"})).json()["name"] == "Other"
    for wrong in ({"max_users": 0}, {"max_sessions_per_month": -1}, {"max_projects": 10**12}, {"name": None}):
        reply = await operator.patch(f"{ALL}/{client.tenant}", json=wrong)
        assert (reply.status_code, list(reply.json()["details"])) == (400, list(wrong))


async def test_a_suspended_tenant_is_shut_out_and_comes_back(operator: httpx.AsyncClient, client: Any):
    """FLW-59: the reason is in the body, and goes with the tenant."""
    there = f"{ALL}/{client.tenant}"
    assert (await operator.post(f"{there}/suspend?reason=unpaid")).status_code == 400
    reply = await operator.post(f"{there}/suspend", json={"reason": "unpaid"})
    assert reply.json() == {"status": "suspended", "tenant_id": str(client.tenant)}
    async with asyncio.timeout(30):
        while (await client.http.get(ME)).status_code == 200:
            await asyncio.sleep(0.02)
    assert (await client.http.get(ME)).json()["error"] == "tenant_suspended"
    assert (await operator.get(there)).json()["suspension_reason"] == "unpaid"
    assert (await operator.post(f"{there}/suspend", json={"reason": "again"})).status_code == 409
    reply = await operator.post(f"{there}/activate")
    assert reply.json() == {"status": "active", "tenant_id": str(client.tenant)}
    async with asyncio.timeout(30):
        while (await client.http.get(ME)).status_code != 200:
            await asyncio.sleep(0.02)


async def test_a_tenant_is_deleted_softly(operator: httpx.AsyncClient, client: Any):
    """CON-58."""
    reply = await operator.delete(f"/api/v2/tenants/{client.tenant}")
    assert reply.json() == {"success": True, "status": "deleted", "tenant_id": str(client.tenant)}
    assert (await operator.get(f"{ALL}/{client.tenant}")).json()["status"] == "deleted"
    assert (await operator.get(f"/api/v2/tenants/{client.tenant}")).json()["error"] == "tenant_not_found"


async def test_the_operator_looks_into_a_tenant(operator: httpx.AsyncClient, client: Any):
    there = f"{ALL}/{client.tenant}"
    assert (await operator.get(f"{there}/usage")).json()["api_keys"]["current"] == 1
    keys = (await operator.get(f"{there}/api-keys")).json()
    assert [each["id"] for each in keys["items"]] == [str(client.key_id)]
    assert client.key not in str(keys)
    assert (await operator.get(f"{there}/members")).json()["items"] == []
    for path in ("", "/usage", "/api-keys", "/members"):
        reply = await operator.get(f"{ALL}/{uuid.uuid4()}{path}")
        assert (reply.status_code, reply.json()["error"]) == (404, "tenant_not_found")


@pytest.mark.parametrize(
    "query",
    [
        "page=0",
        "page=x",
        "page=99999999999999",
        "page_size=0",
        "page_size=101",
        "limit=101",
        "sort=x",
        "sort=name;drop",
        "status=gone",
        "tier=gold",
        "search=" + "x" * 201,
    ],
)
async def test_a_list_is_asked_for_properly(operator: httpx.AsyncClient, query: str):
    reply = await operator.get(f"{ALL}?{query}")
    assert (reply.status_code, list(reply.json()["details"])) == (400, [query.partition("=")[0]])


@pytest.mark.parametrize("sort", ["name", "-name", "created_at", "-created_at", "slug", "tier", "status"])
async def test_a_list_is_sorted_and_paged(operator: httpx.AsyncClient, sort: str):
    mark = uuid.uuid4().hex[:8]
    for number in range(3):
        await operator.post(ALL, json={"name": f"{mark} {number}", "slug": f"s{number}-{mark}"})
    found = []
    for page in (1, 2, 3):
        told = (await operator.get(ALL, params={"search": mark, "sort": sort, "page": page, "page_size": 1})).json()
        assert (told["total"], told["page"], len(told["items"])) == (3, page, 1)
        found.append(told["items"][0]["name"][-1])
    assert sorted(found) == ["0", "1", "2"]
    if sort.lstrip("-") in ("name", "slug", "created_at"):
        assert found == sorted(found, reverse=sort.startswith("-"))
