"""Personas over HTTP (API-089, API-090, API-150..156)."""

from __future__ import annotations

import base64
import io
import re
import uuid
import wave
from typing import Any

import pytest

from agentvoicebox.tenancy import sessions

PERSONAS = "/api/v2/personas"
PROJECTS = "/api/v2/projects"


async def made(client: Any, name: str = "Anna", **more: Any) -> dict[str, Any]:
    reply = await client.http.post(PERSONAS, json={"name": name, **more})
    assert reply.status_code == 201, reply.text
    persona: dict[str, Any] = reply.json()
    return persona


async def test_a_persona_comes_changes_and_goes(client: Any):
    whole = {
        "name": "Zoë",
        "description": "At the desk.\nFriendly.",
        "status": "active",
        "system_prompt": "Be brief.",
        "knowledge": "We open at nine.",
        "voice": "slt",
        "speed": 1.5,
        "language": "de-AT",
        "solvers": ["ovos-solver-wikipedia", "llm"],
    }
    persona = (await client.http.post(PERSONAS, json=whole)).json()
    there = f"{PERSONAS}/{persona['id']}"
    assert {name: persona[name] for name in whole} == whole
    assert (persona["is_default"], persona["usage_count"], persona["owner_id"]) == (False, 0, None)
    assert (await client.http.get(there)).json() == persona
    changed = await client.http.patch(there, json={"speed": None, "solvers": ["llm"], "language": ""})
    assert {**changed.json(), "updated_at": ""} == {
        **persona,
        "speed": None,
        "solvers": ["llm"],
        "language": "",
        "updated_at": "",
    }
    gone = await client.http.delete(there)
    assert (gone.status_code, gone.json()) == (200, {"reassigned": 0})
    assert (await client.http.get(there)).status_code == 404


async def test_per_02_the_list_has_what_it_should(client: Any):
    for name in ("Carl", "Anna", "Ben"):
        last = await made(client, name, voice="slt", description="Kind.", system_prompt="secret")
    await client.http.post(f"{PERSONAS}/{last['id']}/default")
    listed = (await client.http.get(f"{PERSONAS}?page_size=2")).json()
    assert ([each["name"] for each in listed["items"]], listed["total"]) == (["Ben", "Anna"], 3)
    assert listed["items"][0] == {
        "id": last["id"],
        "name": "Ben",
        "description": "Kind.",
        "status": "active",
        "voice": "slt",
        "usage_count": 0,
        "is_default": True,
    }


async def test_a_new_one_has_defaults(client: Any):
    persona = await made(client)
    assert (persona["solvers"], persona["speed"], persona["voice"], persona["status"]) == (["llm"], None, "", "active")
    longest = {"system_prompt": "ß" * 16_000, "knowledge": "字" * 64_000, "description": "x" * 1_000}
    big = await made(client, "Big", **longest)
    assert {name: big[name] for name in longest} == longest


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "name"),
    ({"name": ""}, "name"),
    ({"name": " "}, "name"),
    ({"name": "x" * 101}, "name"),
    ({"name": "A", "speed": 2.5}, "speed"),
    ({"name": "A", "speed": "fast"}, "speed"),
    ({"name": "A", "voice": "a b"}, "voice"),
    ({"name": "A", "language": "en_US"}, "language"),
    ({"name": "A", "solvers": []}, "solvers"),
    ({"name": "A", "solvers": ["llm", "llm"]}, "solvers"),
    ({"name": "A", "solvers": ["llm"] * 11}, "solvers"),
    ({"name": "A", "system_prompt": "x" * 16_001}, "system_prompt"),
    ({"name": "A", "system_prompt": "\u0000"}, "system_prompt"),
    ({"name": "A", "knowledge": "x" * 64_001}, "knowledge"),
    ({"name": "A", "is_default": True}, "is_default"),
    ({"name": "A", "usage_count": 7}, "usage_count"),
]


async def test_what_makes_no_sense_is_refused_by_name(client: Any):
    for wrong, field in WRONG:
        reply = await client.http.post(PERSONAS, json=wrong)
        assert (reply.status_code, reply.json()["error"]) == (400, "validation_error"), wrong
        assert list(reply.json()["details"]) == [field], wrong


async def test_a_prompt_of_a_megabyte_is_too_large(client: Any):
    persona = await made(client)
    for method, path in (("POST", PERSONAS), ("PATCH", f"{PERSONAS}/{persona['id']}")):
        reply = await client.http.request(method, path, json={"name": "A", "system_prompt": "x" * 1_000_000})
        assert (reply.status_code, reply.json()["error"]) == (413, "payload_too_large")


async def test_one_name_one_persona(client: Any):
    await made(client, "Anna")
    reply = await client.http.post(PERSONAS, json={"name": "ANNA"})
    assert (reply.status_code, reply.json()["error"]) == (409, "persona_exists")


async def test_per_06_the_default_stays_until_there_is_another(client: Any):
    anna, ben = await made(client, "Anna"), await made(client, "Ben")
    there = f"{PERSONAS}/{anna['id']}"
    assert (await client.http.post(f"{there}/default")).json()["is_default"] is True
    for reply in (await client.http.delete(there), await client.http.patch(there, json={"status": "disabled"})):
        assert (reply.status_code, reply.json()["error"]) == (409, "persona_is_default")
    await client.http.post(f"{PERSONAS}/{ben['id']}/default")
    assert (await client.http.patch(there, json={"status": "disabled"})).status_code == 200
    reply = await client.http.post(f"{there}/default")
    assert (reply.status_code, reply.json()["error"]) == (409, "persona_disabled")
    assert (await client.http.delete(f"{PERSONAS}/{ben['id']}/default")).json()["is_default"] is False
    assert (await client.http.delete(f"{PERSONAS}/{ben['id']}")).status_code == 200


async def test_per_07_a_project_has_a_default_of_its_own(client: Any, service: Any):
    anna = await made(client)
    project = (await client.http.get(PROJECTS)).json()["items"][0]["id"]
    there = f"{PROJECTS}/{project}/default-persona"
    reply = await client.http.put(there, json={"persona_id": anna["id"]})
    assert (reply.json()["id"], reply.json()["default_persona_id"]) == (project, anna["id"])
    assert (await client.http.get(f"{PROJECTS}/{project}")).json()["default_persona_id"] == anna["id"]
    assert (await client.http.put(there, json={"persona_id": None})).json()["default_persona_id"] is None
    assert (await client.http.put(there, json={})).status_code == 400
    unknown = await client.http.put(there, json={"persona_id": str(uuid.uuid4())})
    assert (unknown.status_code, list(unknown.json()["details"])) == (404, ["persona_id"])
    unknown = await client.http.put(f"{PROJECTS}/{uuid.uuid4()}/default-persona", json={"persona_id": anna["id"]})
    assert (unknown.status_code, list(unknown.json()["details"])) == (404, ["project_id"])
    await client.http.put(there, json={"persona_id": anna["id"]})
    await sessions.create(service.database, client.tenant, config={"persona_id": "anna"})
    assert (await client.http.delete(f"{PERSONAS}/{anna['id']}")).json() == {"reassigned": 2}


async def test_of_another_tenant_there_is_nobody(client: Any, new_client: Any):
    theirs = await new_client("admin")
    persona, project = await made(theirs), (await theirs.http.get(PROJECTS)).json()["items"][0]["id"]
    there = f"{PERSONAS}/{persona['id']}"
    for method, path, body in (
        ("GET", there, None),
        ("PATCH", there, {"name": "Mine"}),
        ("DELETE", there, None),
        ("POST", f"{there}/default", None),
        ("DELETE", f"{there}/default", None),
        ("POST", f"{there}/test", {"message": "Hello"}),
        ("GET", f"{there}/preview", None),
        ("PUT", f"{PROJECTS}/{project}/default-persona", {"persona_id": None}),
    ):
        reply = await client.http.request(method, path, json=body)
        assert (reply.status_code, reply.json()["error"]) == (404, "not_found"), (method, path)
    named = {"X-Tenant-ID": str(theirs.tenant)}
    assert (await client.http.get(there, headers=named)).status_code == 403
    assert (await client.http.get(PERSONAS)).json()["total"] == 0
    assert (await theirs.http.get(there)).json() == persona


OURS = ("personas", "voice", "stt", "llm", "projects/{project_id}/default-persona")


async def test_no_route_serves_a_stranger(client: Any, new_client: Any, http: Any, service: Any, speaking: Any):
    """Each of them: nobody, and a key of another tenant that names this one."""
    stranger = await new_client("admin")
    named = {"X-Tenant-ID": str(client.tenant)}
    asked = 0
    for path, item in service.app.state.document["paths"].items():
        if not path.startswith(tuple(f"/api/v2/{each}" for each in OURS)):
            continue
        there = re.sub(r"{\w+_id}", str(uuid.uuid4()), path).replace("{name}", "slt").replace("{provider}", "openai")
        for method in item:
            reply = await http.request(method.upper(), there)
            assert (reply.status_code, reply.json()["error"]) == (401, "authentication_failed"), (method, path)
            reply = await stranger.http.request(method.upper(), there, headers=named)
            assert (reply.status_code, reply.json()["error"]) == (403, "permission_denied"), (method, path)
            asked += 1
    assert asked >= 30


async def test_scopes(client: Any, new_client: Any):
    """PER-09: a key of a client sees and uses personas, an administrator's changes them."""
    persona = await made(client)
    speaker = await new_client("realtime", tenant=client.tenant)
    nobody = await new_client("billing", tenant=client.tenant)
    there = f"{PERSONAS}/{persona['id']}"
    for path in (PERSONAS, there):
        assert (await speaker.http.get(path)).status_code == 200
        assert (await nobody.http.get(path)).status_code == 403
    project = (await client.http.get(PROJECTS)).json()["items"][0]["id"]
    for method, path, body in (
        ("POST", PERSONAS, {"name": "B"}),
        ("PATCH", there, {"name": "B"}),
        ("DELETE", there, None),
        ("POST", f"{there}/default", None),
        ("DELETE", f"{there}/default", None),
        ("PUT", f"{PROJECTS}/{project}/default-persona", {"persona_id": None}),
    ):
        reply = await speaker.http.request(method, path, json=body)
        assert (reply.status_code, reply.json()["error"]) == (403, "insufficient_scope"), (method, path)


async def test_changes_are_in_the_audit_log_and_prompts_are_not(client: Any):
    persona = await made(client, system_prompt="the secret recipe", knowledge="a rare herb")
    await client.http.patch(f"{PERSONAS}/{persona['id']}", json={"system_prompt": "another recipe"})
    await client.http.post(PERSONAS, json={"name": "Anna", "system_prompt": "recipe"})  # refused, which is noted too
    lines = (await client.http.get("/api/v2/audit?resource_type=persona")).json()["items"]
    assert [line["action"] for line in lines] == ["update", "create"]
    assert lines[0]["actor_id"] == str(client.key_id)
    wholes = [(await client.http.get(f"/api/v2/audit/{line['id']}")).text for line in lines]
    wholes.append((await client.http.get("/api/v2/audit/export?format=json")).text)
    assert "17 characters" in wholes[2]
    for whole in wholes:
        assert "recipe" not in whole
        assert "herb" not in whole


async def test_without_engines_it_says_so(client: Any):
    persona = await made(client)
    there = f"{PERSONAS}/{persona['id']}"
    for reply in (
        await client.http.post(f"{there}/test", json={"message": "Hello"}),
        await client.http.post(f"{there}/test", json={"message": "Hello", "audio": True}),
        await client.http.get(f"{there}/preview"),
        await client.http.get(f"{PERSONAS}/solvers"),
    ):
        assert (reply.status_code, reply.json()["error"]) == (503, "no_engines")


async def test_per_03_solvers_are_offered(client: Any, speaking: Any):
    listed = (await client.http.get(f"{PERSONAS}/solvers")).json()["items"]
    assert {"Wikipedia", "DuckDuckGo", "Wolfram Alpha", "WordNet"} <= {each["name"] for each in listed}
    assert all(set(each) == {"id", "name", "installed"} for each in listed)


async def test_per_03_solvers_that_nobody_knows_are_refused(client: Any, speaking: Any):
    offered = [each["id"] for each in (await client.http.get(f"{PERSONAS}/solvers")).json()["items"]]
    persona = await made(client, solvers=["llm", *offered[:4]])
    for solvers in (["nope-solver"], ["llm", "nope-solver"], ["ovos-solver-bus-plugin"]):
        for method, path in (("POST", PERSONAS), ("PATCH", f"{PERSONAS}/{persona['id']}")):
            reply = await client.http.request(method, path, json={"name": "Ben", "solvers": solvers})
            assert (reply.status_code, list(reply.json()["details"])) == (400, ["solvers"])
            assert solvers[-1] in reply.text
    assert (await client.http.get(PERSONAS)).json()["total"] == 1


async def test_per_05_a_persona_is_tried(client: Any, speaking: Any, used: Any):
    persona = await made(client, system_prompt="Be a pirate.", voice="slt", speed=2.0)
    there = f"{PERSONAS}/{persona['id']}/test"
    reply = await client.http.post(there, json={"message": "Who are you?"})
    assert reply.status_code == 200, reply.text
    told = reply.json()
    assert (told["reply"], told["audio"]) == ("Hello there.", None)
    assert told["tokens"] == {"input": 7, "output": 3}
    asked = speaking.model.asked[-1]["messages"]
    assert "Be a pirate." in asked[0]["content"]
    assert asked[-1] == {"role": "user", "content": "Who are you?"}
    assert await used(client) == {"llm_input_tokens": 7, "llm_output_tokens": 3}
    spoken = (await client.http.post(there, json={"message": "Who are you?", "audio": True})).json()
    with wave.open(io.BytesIO(base64.b64decode(spoken["audio"]))) as file:
        seconds = file.getnframes() / file.getframerate()
    assert seconds > 0.1
    assert await used(client) == {
        "llm_input_tokens": 14,
        "llm_output_tokens": 6,
        "tts_audio_seconds": pytest.approx(seconds, abs=1e-5),
    }
    assert (await client.http.get(f"{PERSONAS}/{persona['id']}")).json()["usage_count"] == 0


async def test_per_05_a_persona_is_heard_with_its_own_speed(client: Any, speaking: Any, used: Any):
    lengths = {}
    for name, speed in (("Slow", 0.5), ("Fast", 2.0)):
        persona = await made(client, name, voice="slt", speed=speed)
        reply = await client.http.get(f"{PERSONAS}/{persona['id']}/preview")
        assert (reply.status_code, reply.headers["content-type"]) == (200, "audio/wav")
        with wave.open(io.BytesIO(reply.content)) as file:
            lengths[name] = file.getnframes() / file.getframerate()
    assert lengths["Slow"] > 2 * lengths["Fast"] > 1
    assert await used(client) == {"tts_audio_seconds": pytest.approx(sum(lengths.values()), abs=1e-5)}


async def test_a_provider_that_fails_is_named(client: Any, speaking: Any, used: Any):
    persona = await made(client)
    speaking.model.says(status=401)
    reply = await client.http.post(f"{PERSONAS}/{persona['id']}/test", json={"message": "Hello"})
    assert (reply.status_code, reply.json()["error"]) == (502, "provider_refused")
    assert await used(client) == {}
