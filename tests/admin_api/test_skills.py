"""What a tenant has set for its skills, over HTTP."""

from __future__ import annotations

import json
from typing import Any

import pytest

SKILL = "/api/v2/skills/skill-account.agentvoicebox/settings"


async def test_settings_are_set_and_read(client: Any, new_client: Any):
    assert (await client.http.get(SKILL)).json() == {"skill_id": "skill-account.agentvoicebox", "settings": {}}
    wanted = {"city": "Wien", "units": {"metric": True}, "days": [1, 2.5, None], "empty": ""}
    reply = await client.http.put(SKILL, json={"settings": wanted})
    assert (reply.status_code, reply.json()["settings"]) == (200, wanted)
    assert (await client.http.get(SKILL)).json() == reply.json()
    other = await new_client("admin")
    assert (await other.http.get(SKILL)).json()["settings"] == {}
    await other.http.put(SKILL, json={"settings": {"city": "Graz"}})
    assert (await client.http.get(SKILL)).json()["settings"] == wanted
    assert (await client.http.get(SKILL.replace("account", "weather"))).json()["settings"] == {}
    await client.http.put(SKILL, json={"settings": {"city": "Linz"}})
    assert (await client.http.get(SKILL)).json()["settings"] == {"city": "Linz"}
    await client.http.put(SKILL, json={"settings": {}})
    assert (await client.http.get(SKILL)).json()["settings"] == {}


async def test_the_log_tells_that_and_not_what(client: Any):
    await client.http.put(SKILL, json={"settings": {"api_key": "a secret of theirs"}})
    lines = await client.http.get("/api/v2/audit?resource_type=skill_settings")
    assert lines.json()["total"] == 1
    (line,) = lines.json()["items"]
    whole = await client.http.get(f"/api/v2/audit/{line['id']}")
    assert "api_key" in whole.text
    assert "a secret of theirs" not in whole.text


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({}, 400, "settings"),
        ({"settings": None}, 400, "settings"),
        ({"settings": []}, 400, "settings"),
        ({"settings": "x"}, 400, "settings"),
        ({"settings": {}, "skill_id": "other"}, 400, "skill_id"),
        ({"settings": {"x": "x" * 17_000}}, 413, "settings"),
    ],
)
async def test_what_makes_no_sense_is_refused(client: Any, body: dict[str, Any], status: int, field: str):
    reply = await client.http.put(SKILL, json=body)
    assert (reply.status_code, list(reply.json()["details"])) == (status, [field])


@pytest.mark.parametrize("name", ["-x", "a%20b", "x" * 101, ".hidden", "a%2Fb"])
async def test_a_skill_is_named_as_skills_are(client: Any, name: str):
    for reply in (
        await client.http.get(f"/api/v2/skills/{name}/settings"),
        await client.http.put(f"/api/v2/skills/{name}/settings", json={"settings": {}}),
    ):
        assert reply.status_code in (400, 404)


async def test_text_that_the_store_cannot_hold_is_refused(client: Any):
    for settings in ({"x": "\x00"}, {"\x00": 1}, {"x": "\ud800"}):
        sent = json.dumps({"settings": settings})
        reply = await client.http.put(SKILL, content=sent, headers={"content-type": "application/json"})
        assert reply.status_code == 400, settings


async def test_scopes(client: Any, new_client: Any):
    speaker = await new_client("realtime", "sessions", "usage", "billing", tenant=client.tenant)
    for reply in (await speaker.http.get(SKILL), await speaker.http.put(SKILL, json={"settings": {}})):
        assert (reply.status_code, reply.json()["error"]) == (403, "insufficient_scope")
