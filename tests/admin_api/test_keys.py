"""API keys over HTTP (API-050..055)."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

KEYS = "/api/v2/api-keys"
ME = "/api/v2/tenants/me"


async def test_a_key_is_shown_once(client: Any, http: httpx.AsyncClient):
    wanted = {"name": "App", "description": "For the app", "scopes": ["usage", "sessions"]}
    reply = await client.http.post(KEYS, json=wanted)
    assert reply.status_code == 201
    made = reply.json()
    assert {name: made[name] for name in wanted} == wanted
    assert (len(made["key"]), made["key"][:12]) == (47, made["key_prefix"])
    assert (made["status"], made["rate_limit_tier"], made["usage_count"]) == ("active", "standard", 0)
    assert (await http.get(ME, headers={"X-API-Key": made["key"]})).status_code == 200
    for told in (await client.http.get(KEYS), await client.http.get(f"{KEYS}/{made['id']}")):
        assert made["key"] not in told.text
        assert "key_hash" not in told.text


async def listed(client: Any, **query: str) -> list[tuple[str, str]]:
    reply = await client.http.get(KEYS, params=query)
    return [(each["id"], each["status"]) for each in reply.json()["items"]]


async def test_keys_are_listed_by_status_and_project(client: Any):
    project = (await client.http.post("/api/v2/projects", json={"name": "Part"})).json()["id"]
    made = (await client.http.post(KEYS, json={"name": "In it", "project_id": project})).json()
    assert [each["id"] for each in (await client.http.get(f"{KEYS}?project_id={project}")).json()["items"]] == [
        made["id"]
    ]
    assert (await client.http.delete(f"{KEYS}/{made['id']}")).status_code == 204
    revoked = (await client.http.get(f"{KEYS}?status=revoked")).json()["items"]
    assert [(each["id"], each["status"]) for each in revoked] == [(made["id"], "revoked")]
    assert [each["id"] for each in (await client.http.get(f"{KEYS}?status=active")).json()["items"]] == [
        str(client.key_id)
    ]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"scopes": []}, "scopes"),
        ({"scopes": ["root"]}, "scopes"),
        ({"scopes": "admin"}, "scopes"),
        ({"rate_limit_tier": "infinite"}, "rate_limit_tier"),
        ({"expires_at": "2001-01-01T00:00:00Z"}, "expires_at"),
        ({"expires_at": "2099-01-01T00:00:00"}, "expires_at"),
        ({"expires_at": "soon"}, "expires_at"),
        ({"project_id": "x"}, "project_id"),
        ({"name": "a\nb"}, "name"),
        ({"name": "a" * 101}, "name"),
        ({"tenant_id": "11111111-2222-4333-8444-555555555555"}, "tenant_id"),
    ],
)
async def test_a_key_without_sense_is_not_made(client: Any, change: dict[str, Any], field: str):
    """FLW-23: also for another tenant."""
    reply = await client.http.post(KEYS, json={"name": "App"} | change)
    assert (reply.status_code, list(reply.json()["details"])) == (400, [field])
    assert (await client.http.get(KEYS)).json()["total"] == 1


async def test_nobody_gives_more_than_they_have(new_client: Any, operator: httpx.AsyncClient):
    """KEY-18: neither scopes nor a higher rate."""
    client = await new_client("admin", rate_class="standard")
    everything = ["realtime", "sessions", "usage", "billing", "admin"]
    assert (await client.http.post(KEYS, json={"name": "All", "scopes": everything})).status_code == 201
    for tier in ("elevated", "unlimited"):
        reply = await client.http.post(KEYS, json={"name": "More", "rate_limit_tier": tier})
        assert (reply.status_code, list(reply.json()["details"])) == (403, ["rate_limit_tier"])
        reply = await client.http.patch(f"{KEYS}/{client.key_id}", json={"rate_limit_tier": tier})
        assert reply.status_code == 403
    headers = {"X-Tenant-ID": str(client.tenant)}
    reply = await operator.post(KEYS, json={"name": "More", "rate_limit_tier": "unlimited"}, headers=headers)
    assert reply.json()["rate_limit_tier"] == "unlimited"


async def test_a_key_is_changed(client: Any):
    made = (await client.http.post(KEYS, json={"name": "Before", "scopes": ["admin"]})).json()
    reply = await client.http.patch(f"{KEYS}/{made['id']}", json={"name": "After", "description": "x"})
    assert (reply.json()["name"], reply.json()["description"], reply.json()["scopes"]) == ("After", "x", ["admin"])
    assert (await client.http.patch(f"{KEYS}/{made['id']}", json={"name": None})).status_code == 400
    assert (await client.http.patch(f"{KEYS}/{made['id']}", json={})).json()["name"] == "After"


async def test_a_key_is_rotated_with_grace(client: Any, http: httpx.AsyncClient):
    old = (await client.http.post(KEYS, json={"name": "App", "scopes": ["admin"]})).json()
    reply = await client.http.post(f"{KEYS}/{old['id']}/rotate")
    new = reply.json()
    assert (new["replaces"], new["rotated_from"], new["scopes"]) == (old["id"], old["id"], ["admin"])
    left = datetime.fromisoformat(new["old_expires_at"]) - datetime.now(UTC)
    assert timedelta(hours=23.9) < left <= timedelta(hours=24)
    for key in (old["key"], new["key"]):
        assert (await http.get(ME, headers={"X-API-Key": key})).status_code == 200
    assert (await client.http.post(f"{KEYS}/{old['id']}/rotate")).status_code == 409


async def test_a_leaked_key_is_rotated_without(client: Any, http: httpx.AsyncClient):
    old = (await client.http.post(KEYS, json={"name": "App", "scopes": ["admin"]})).json()
    new = (await client.http.post(f"{KEYS}/{old['id']}/rotate", json={"grace_hours": 0})).json()
    assert new["old_expires_at"] is None
    async with asyncio.timeout(30):
        while (await http.get(ME, headers={"X-API-Key": old["key"]})).status_code == 200:
            await asyncio.sleep(0.02)
    assert (await http.get(ME, headers={"X-API-Key": new["key"]})).status_code == 200
    for hours in (-1, 169, "a day", None):
        assert (await client.http.post(f"{KEYS}/{new['id']}/rotate", json={"grace_hours": hours})).status_code == 400


async def test_the_use_of_a_key_is_told(client: Any):
    told = (await client.http.get(f"{KEYS}/{client.key_id}/usage")).json()
    assert set(told) == {"id", "usage_count", "last_used_at", "last_used_ip"}
