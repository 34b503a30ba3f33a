"""Projects, the places where they run and what runs there (API-060..064)."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

PROJECTS = "/api/v2/projects"


async def test_a_project_comes_changes_and_goes(client: Any):
    made = (await client.http.post(PROJECTS, json={"name": "App", "environment": "staging", "config": {"a": 1}})).json()
    there = f"{PROJECTS}/{made['id']}"
    assert (made["environment"], made["config"], made["is_default"]) == ("staging", {"a": 1}, False)
    assert (await client.http.patch(there, json={"name": "Other", "config": {"b": 2}})).json()["config"] == {"b": 2}
    told = (await client.http.get(there)).json()
    assert (told["name"], told["environment"], told["key_count"], told["session_count"]) == ("Other", "staging", 0, 0)
    listed = (await client.http.get(PROJECTS)).json()
    assert [(each["name"], each["is_default"]) for each in listed["items"]] == [("Default", True), ("Other", False)]
    assert (await client.http.delete(there)).status_code == 204
    assert (await client.http.get(there)).status_code == 404


async def test_the_first_project_stays(client: Any):
    default = (await client.http.get(PROJECTS)).json()["items"][0]["id"]
    assert (await client.http.delete(f"{PROJECTS}/{default}")).status_code == 409


@pytest.mark.parametrize("revoked", [True, False])
async def test_the_keys_of_a_project_go_only_if_they_are_to(client: Any, revoked: bool):
    project = (await client.http.post(PROJECTS, json={"name": "App"})).json()["id"]
    key = (await client.http.post("/api/v2/api-keys", json={"name": "Its", "project_id": project})).json()["id"]
    await client.http.delete(f"{PROJECTS}/{project}?revoke_keys={str(revoked).lower()}")
    told = (await client.http.get(f"/api/v2/api-keys/{key}")).json()
    assert (told["status"], told["project_id"]) == ("revoked" if revoked else "active", None)


async def test_a_project_is_deployed_and_gone_back(client: Any):
    project = (await client.http.post(PROJECTS, json={"name": "App", "config": {"voice": "slt"}})).json()["id"]
    there = f"{PROJECTS}/{project}"
    place = (await client.http.post(f"{there}/environments", json={"name": "live", "config": {"a": 1}})).json()["id"]
    assert [each["name"] for each in (await client.http.get(f"{there}/environments")).json()["items"]] == ["live"]
    first = await client.http.post(f"{there}/deployments", json={"environment_id": place, "version": "1"})
    assert (first.status_code, first.json()["config"], first.json()["status"]) == (
        201,
        {"voice": "slt", "a": 1},
        "active",
    )
    await client.http.post(f"{there}/deployments", json={"environment_id": place, "version": "2"})
    back = {"environment_id": place, "deployment_id": first.json()["id"]}
    assert (await client.http.post(f"{there}/deployments", json=back)).json()["version"] == "1"
    listed = (await client.http.get(f"{there}/deployments")).json()["items"]
    assert [(each["version"], each["status"]) for each in listed] == [
        ("1", "active"),
        ("2", "superseded"),
        ("1", "superseded"),
    ]
    reply = await client.http.post(f"{there}/deployments", json={"environment_id": place})
    assert (reply.status_code, list(reply.json()["details"])) == (400, ["version"])
    other = (await client.http.post(PROJECTS, json={"name": "Other"})).json()["id"]
    reply = await client.http.post(f"{PROJECTS}/{other}/deployments", json={"environment_id": place, "version": "1"})
    assert (reply.status_code, list(reply.json()["details"])) == (404, ["environment_id"])


async def test_a_limit_is_a_limit(operator: Any, client: Any):
    await operator.patch(f"/api/v2/admin/tenants/{client.tenant}", json={"max_projects": 1})
    reply = await client.http.post(PROJECTS, json={"name": "One too many"})
    assert (reply.status_code, reply.json()["error"]) == (403, "tenant_limit_exceeded")


async def test_usage_is_counted_to_the_project_of_the_key(client: Any):
    default = (await client.http.get(PROJECTS)).json()["items"][0]["id"]
    told = (await client.http.get(f"{PROJECTS}/{default}/usage?period=7d")).json()
    assert (told["period"], told["amounts"]["requests"] >= 1) == ("7d", True)
    assert (await client.http.get(f"{PROJECTS}/{uuid.uuid4()}/usage")).status_code == 404
    assert (await client.http.get(f"{PROJECTS}/{default}/usage?period=1d")).status_code == 400
