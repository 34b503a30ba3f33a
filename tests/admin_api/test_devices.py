"""Devices over HTTP: paired without anybody typing a key, listed, renamed, and cut off."""

from __future__ import annotations

import asyncio
import hashlib
import queue
import secrets
import threading
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text
from websockets.asyncio.client import connect

from agentvoicebox.admin_api import devices as routes
from agentvoicebox.bus_bridge import live
from agentvoicebox.plugins.device import choices, pairing, wire
from agentvoicebox.plugins.device.section import Section
from agentvoicebox.tenancy import audit, devices, pairings
from agentvoicebox.tenancy.devices import DeviceEvent
from agentvoicebox.tenancy.pairings import State

PAIRINGS = "/api/v2/pairings"
DEVICES = "/api/v2/devices"
CONFIG = "/api/v2/voice/config"
"""What the key of a device may read."""


@dataclass(frozen=True)
class Device:
    """A device that has made its key and asked for a code."""

    key: str
    pairing: dict[str, Any]

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}


def told(key: str, **more: Any) -> dict[str, Any]:
    """What a device sends of its key."""
    return {"key_digest": hashlib.sha256(key.encode()).hexdigest(), "key_prefix": key[:12], "name": "Pi", **more}


def new_key() -> str:
    return "avb_" + secrets.token_urlsafe(32)


@pytest.fixture(autouse=True)
async def nobody_waits(service: Any) -> None:
    """All of the tests come from one address, for which only some may wait."""
    async with service.database.system() as session:
        await session.execute(text("DELETE FROM pairings"))


async def begun(http: httpx.AsyncClient, **more: Any) -> Device:
    key = new_key()
    reply = await http.post(PAIRINGS, json=told(key, **more))
    assert reply.status_code == 201, reply.text
    return Device(key, reply.json())


async def claimed(client: Any, http: httpx.AsyncClient, **more: Any) -> tuple[Device, dict[str, Any]]:
    device = await begun(http)
    reply = await client.http.post(DEVICES, json={"code": device.pairing["code"], **more})
    assert reply.status_code == 201, reply.text
    return device, reply.json()


async def refused(http: httpx.AsyncClient, device: Device) -> str:
    """How the device's key is refused, once it is."""
    async with asyncio.timeout(30):
        while (reply := await http.get(CONFIG, headers=device.headers)).status_code == 200:
            await asyncio.sleep(0.02)
    return str(reply.json()["error"])


# --- pairing ----------------------------------------------------------------------------------------------------------


async def test_a_device_is_paired_without_its_key_travelling(
    client: Any, new_client: Any, http: httpx.AsyncClient, service: Any
):
    """It makes its key, shows a code; who enters that gets a device, and from then on the key is good."""
    device = await begun(http, name="Küche")
    waiting = device.pairing
    assert set(waiting) == {"id", "code", "expires_at", "interval"}
    assert len(waiting["code"]) == 8
    left = datetime.fromisoformat(waiting["expires_at"]) - datetime.now(UTC)
    assert timedelta(minutes=9) < left <= timedelta(minutes=10)
    there = f"{PAIRINGS}/{waiting['id']}"
    assert (await http.get(there)).json() == {"state": "waiting", "tenant": ""}
    assert await refused(http, device) == "invalid_api_key"

    reply = await client.http.post(DEVICES, json={"code": waiting["code"]})
    assert reply.status_code == 201
    made = reply.json()
    assert (made["name"], made["last_seen_at"]) == ("Küche", None)
    assert (await http.get(there)).json() == {"state": "paired", "tenant": "A tenant"}
    assert (await http.get(CONFIG, headers=device.headers)).status_code == 200
    assert (
        await http.get("/api/v2/tenants/me", headers=device.headers)
    ).status_code == 403  # it speaks, and that is all
    assert (await http.get(DEVICES, headers=device.headers)).status_code == 403

    key = (await client.http.get(f"/api/v2/api-keys/{made['key_id']}")).json()
    assert (key["key_prefix"], key["scopes"], key["project_id"]) == (device.key[:12], ["realtime"], made["project_id"])
    assert (key["rate_limit_tier"], key["expires_at"]) == ("standard", None)
    other = await new_client("admin")
    for whose, count in ((client, 1), (other, 0)):
        listed = (await whose.http.get(DEVICES)).json()
        assert (listed["total"], listed["items"]) == (count, [made] * count)

    digest = hashlib.sha256(device.key.encode()).hexdigest()
    seen = [reply, await client.http.get(DEVICES), await http.get(there), await client.http.get("/api/v2/audit")]
    for each in seen:
        assert digest not in each.text
        assert device.key not in each.text
    found = (await audit.search(service.database, client.tenant, resource_type="device")).items
    assert [(line.action, line.actor_id) for line in found] == [("create", client.key_id)]


async def test_a_code_is_good_once(client: Any, new_client: Any, http: httpx.AsyncClient):
    device, _ = await claimed(client, http)
    other = await new_client("admin")
    for whose in (client, other):
        reply = await whose.http.post(DEVICES, json={"code": device.pairing["code"]})
        assert (reply.status_code, reply.json()["error"]) == (404, "pairing_not_found")
        assert list(reply.json()["details"]) == ["code"]
    assert (await other.http.get(DEVICES)).json()["total"] == 0


async def test_of_several_who_enter_a_code_one_gets_the_device(new_client: Any, http: httpx.AsyncClient):
    device = await begun(http)
    clients = [await new_client("admin") for _ in range(4)]
    asked = [each.http.post(DEVICES, json={"code": device.pairing["code"]}) for each in clients]
    assert sorted(reply.status_code for reply in await asyncio.gather(*asked)) == [201, 404, 404, 404]


async def test_a_code_is_good_for_ten_minutes(client: Any, http: httpx.AsyncClient, service: Any):
    device = await begun(http)
    async with service.database.system() as session:
        late = text("UPDATE pairings SET expires_at = now() - interval '1 second' WHERE id = :id")
        await session.execute(late, {"id": device.pairing["id"]})
    assert (await http.get(f"{PAIRINGS}/{device.pairing['id']}")).json() == {"state": "expired", "tenant": ""}
    reply = await client.http.post(DEVICES, json={"code": device.pairing["code"]})
    assert (reply.status_code, reply.json()["error"]) == (404, "pairing_not_found")
    assert await refused(http, device) == "invalid_api_key"


async def test_a_code_is_read_as_people_write_it(client: Any, http: httpx.AsyncClient):
    code = (device := await begun(http)).pairing["code"]
    reply = await client.http.post(DEVICES, json={"code": f"{code[:4]} {code[4:6]}-{code[6:]}", "name": "Hall"})
    assert (reply.status_code, reply.json()["name"]) == (201, "Hall")
    assert (await http.get(CONFIG, headers=device.headers)).status_code == 200


async def test_a_device_is_of_a_project(client: Any, new_client: Any, http: httpx.AsyncClient):
    project = (await client.http.post("/api/v2/projects", json={"name": "Shop"})).json()["id"]
    _, made = await claimed(client, http, project_id=project)
    assert made["project_id"] == project
    await claimed(client, http)
    assert (await client.http.get(DEVICES)).json()["total"] == 2
    found = (await client.http.get(f"{DEVICES}?project_id={project}")).json()["items"]
    assert [each["id"] for each in found] == [made["id"]]
    other, device = await new_client("admin"), await begun(http)
    for unknown in (str(uuid.uuid4()), project):
        reply = await other.http.post(DEVICES, json={"code": device.pairing["code"], "project_id": unknown})
        assert (reply.status_code, list(reply.json()["details"])) == (404, ["project_id"])
    assert (await other.http.post(DEVICES, json={"code": device.pairing["code"]})).status_code == 201


async def test_a_device_that_asks_again_has_a_new_code(client: Any, http: httpx.AsyncClient):
    device = await begun(http)
    again = (await http.post(PAIRINGS, json=told(device.key))).json()
    assert (await http.get(f"{PAIRINGS}/{device.pairing['id']}")).json()["state"] == "expired"
    assert (await client.http.post(DEVICES, json={"code": device.pairing["code"]})).status_code == 404
    assert (await client.http.post(DEVICES, json={"code": again["code"]})).status_code == 201


async def test_a_key_that_is_in_use_is_not_paired(client: Any, http: httpx.AsyncClient):
    """Nor does anybody learn by it whose a key is, who does not have the key."""
    for key in (client.key, (await claimed(client, http))[0].key):
        reply = await http.post(PAIRINGS, json=told(key))
        assert (reply.status_code, reply.json()["error"]) == (409, "key_in_use")


async def test_strangers_take_few_connections_to_the_store(
    service: Any, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
):
    """Keys are looked up over the same few: whoever comes from many addresses keeps nobody with a key waiting."""
    there: list[int] = [0]
    full, go = asyncio.Event(), asyncio.Event()

    async def busy(*_: Any, **__: Any) -> pairings.Standing:
        there.append(there[-1] + 1)
        if there[-1] >= routes.STRANGERS:
            full.set()
        await go.wait()
        there.append(there[-1] - 1)
        return pairings.Standing(State.WAITING)

    monkeypatch.setattr(pairings, "look", busy)
    monkeypatch.setattr(routes, "PATIENCE", 60.0)
    asking = [asyncio.create_task(http.get(f"{PAIRINGS}/{uuid.uuid4()}")) for _ in range(6)]
    await asyncio.wait_for(full.wait(), 30)
    await asyncio.sleep(0.2)
    go.set()
    assert {reply.status_code for reply in await asyncio.gather(*asking)} == {200}
    assert max(there) == routes.STRANGERS
    go.clear()
    monkeypatch.setattr(routes, "PATIENCE", 0.05)
    asking = [asyncio.create_task(http.get(f"{PAIRINGS}/{uuid.uuid4()}")) for _ in range(routes.STRANGERS + 1)]
    done, _ = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
    [late] = done
    assert (late.result().status_code, late.result().json()["error"]) == (503, "busy")
    go.set()
    assert {reply.status_code for reply in await asyncio.gather(*asking)} == {200, 503}


async def test_who_does_not_know_the_id_learns_nothing(http: httpx.AsyncClient):
    reply = await http.get(f"{PAIRINGS}/{uuid.uuid4()}")
    assert (reply.status_code, reply.json()) == (200, {"state": "expired", "tenant": ""})
    assert (await http.get(f"{PAIRINGS}/1")).status_code == 404
    assert (await http.get(PAIRINGS)).status_code == 405


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"key_digest": "x" * 64}, "key_digest"),
        ({"key_digest": "A" * 64}, "key_digest"),
        ({"key_digest": "a" * 63}, "key_digest"),
        ({"key_digest": "a" * 64 + "\n"}, "key_digest"),
        ({"key_prefix": "avb_"}, "key_prefix"),
        ({"key_prefix": "sk-_12345678"}, "key_prefix"),
        ({"key_prefix": "avb_1234567!"}, "key_prefix"),
        ({"name": ""}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "x" * 101}, "name"),
        ({"name": None}, "name"),
        ({"scopes": ["admin"]}, "scopes"),
        ({"tenant_id": str(uuid.uuid4())}, "tenant_id"),
    ],
)
async def test_a_device_that_makes_no_sense_gets_no_code(http: httpx.AsyncClient, change: dict[str, Any], field: str):
    reply = await http.post(PAIRINGS, json=told(new_key()) | change)
    assert (reply.status_code, list(reply.json()["details"])) == (400, [field])


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "code"),
        ({"code": ""}, "code"),
        ({"code": "1234567"}, "code"),
        ({"code": "123456789"}, "code"),
        ({"code": "1234567x"}, "code"),
        ({"code": "--------"}, "code"),
        ({"code": "\u0661" * 8}, "code"),
        ({"code": 12345678}, "code"),
        ({"code": "00000000", "name": "a\nb"}, "name"),
        ({"code": "00000000", "project_id": "x"}, "project_id"),
        ({"code": "00000000", "scopes": ["admin"]}, "scopes"),
    ],
)
async def test_what_is_no_code_is_refused(client: Any, body: dict[str, Any], field: str):
    reply = await client.http.post(DEVICES, json=body)
    assert (reply.status_code, list(reply.json()["details"])) == (400, [field])


async def test_who_may_make_keys_may_pair(client: Any, new_client: Any, operator: httpx.AsyncClient, http: Any):
    device = await begun(http)
    for scope in ("realtime", "sessions", "usage", "billing"):
        weak = await new_client(scope, tenant=client.tenant)
        reply = await weak.http.post(DEVICES, json={"code": device.pairing["code"]})
        assert (reply.status_code, reply.json()["error"]) == (403, "insufficient_scope")
    reply = await http.post(DEVICES, json={"code": device.pairing["code"]})
    assert reply.status_code == 401
    headers = {"X-Tenant-ID": str(client.tenant)}
    reply = await operator.post(DEVICES, json={"code": device.pairing["code"]}, headers=headers)
    assert reply.status_code == 201
    assert (await client.http.get(f"{DEVICES}/{reply.json()['id']}")).json() == reply.json()


async def test_a_tenant_that_has_its_fill_of_keys_pairs_none(
    operator: httpx.AsyncClient, client: Any, http: httpx.AsyncClient
):
    """And the code stays good, for when there is room."""
    reply = await operator.patch(f"/api/v2/admin/tenants/{client.tenant}", json={"max_api_keys": 1})
    assert reply.status_code == 200, reply.text
    device = await begun(http)
    reply = await client.http.post(DEVICES, json={"code": device.pairing["code"]})
    assert (reply.status_code, reply.json()["error"]) == (403, "tenant_limit_exceeded")
    assert (await client.http.get(DEVICES)).json()["total"] == 0
    await operator.patch(f"/api/v2/admin/tenants/{client.tenant}", json={"max_api_keys": 2})
    assert (await client.http.post(DEVICES, json={"code": device.pairing["code"]})).status_code == 201


async def test_a_device_pairs_itself(client: Any, http: httpx.AsyncClient, service: Any, tmp_path: Path):
    """The device's own part, as `avb device pair` does it."""
    section = Section(service.url, key_file=tmp_path / "device.key", state=tmp_path)
    codes: queue.Queue[str] = queue.Queue()
    pausing = threading.Event()
    going = asyncio.create_task(
        asyncio.to_thread(
            pairing.pair, section, "Kitchen", lambda code: codes.put(code.digits), wait=lambda _: pausing.wait(0.05)
        )
    )
    code = await asyncio.to_thread(codes.get, timeout=60)
    assert (await client.http.post(DEVICES, json={"code": code})).json()["name"] == "Kitchen"
    standing = await asyncio.wait_for(going, 60)
    assert (standing.state, standing.tenant) == ("paired", "A tenant")
    key = section.key()
    assert (await http.get(CONFIG, headers={"Authorization": f"Bearer {key}"})).status_code == 200


# --- rates ------------------------------------------------------------------------------------------------------------


async def test_codes_are_not_given_away_by_the_hundred(
    frozen: None, http: httpx.AsyncClient, client: Any, service: Any
):
    """By address, also for those who have a key."""
    for left in (4, 3, 2, 1, 0):
        reply = await http.post(PAIRINGS, json={})
        assert (reply.status_code, reply.headers["x-ratelimit-remaining"]) == (400, str(left))
    for asking in (http, client.http):
        reply = await asking.post(PAIRINGS, json=told(new_key()))
        assert (reply.status_code, reply.json()["error"]) == (429, "rate_limit_exceeded")
        assert reply.headers.get_list("retry-after") == [str(reply.json()["retry_after"])]
        assert (reply.headers["x-ratelimit-limit"], reply.headers["x-ratelimit-remaining"]) == ("5", "0")
    service.clock.now += reply.json()["retry_after"]
    assert (await http.post(PAIRINGS, json=told(new_key()))).status_code == 201


async def test_only_some_wait_at_an_address(http: httpx.AsyncClient, client: Any):
    waiting = [await begun(http) for _ in range(pairings.MOST_OF_A_NETWORK)]
    reply = await http.post(PAIRINGS, json=told(new_key()))
    assert (reply.status_code, reply.json()["error"]) == (429, "too_many_pairings")
    assert 0 < reply.json()["retry_after"] <= pairings.LIFETIME
    assert (await client.http.post(DEVICES, json={"code": waiting[0].pairing["code"]})).status_code == 201
    await begun(http)


async def test_a_device_that_waits_asks_now_and_then(frozen: None, http: httpx.AsyncClient):
    device = await begun(http)
    there = f"{PAIRINGS}/{device.pairing['id']}"
    often = 60 // device.pairing["interval"]
    for _ in range(2 * often):  # two devices behind one address
        assert (await http.get(there)).status_code == 200
    replies = [await http.get(there) for _ in range(30)]
    assert {reply.status_code for reply in replies} == {200, 429}


async def test_nobody_finds_a_code_by_trying(frozen: None, http: httpx.AsyncClient, new_client: Any, service: Any):
    """8 digits, five tries a minute and thirty an hour: whichever key of the tenant tries, and also at once."""
    client = await new_client("admin")
    second = await new_client("admin", tenant=client.tenant)
    device = await begun(http)

    async def attempt(number: int, code: str) -> httpx.Response:
        reply: httpx.Response = await (client, second)[number % 2].http.post(DEVICES, json={"code": code})
        return reply

    replies = await asyncio.gather(*(attempt(number, "00000000") for number in range(20)))
    assert sorted(reply.status_code for reply in replies) == [404] * 5 + [429] * 15
    right = await attempt(0, device.pairing["code"])
    assert (right.status_code, right.headers["x-ratelimit-limit"]) == (429, "5")
    assert (await http.get(f"{PAIRINGS}/{device.pairing['id']}")).json()["state"] == "waiting"
    tried = 5
    while tried < 30:
        service.clock.now += 60
        tried += [(await attempt(0, "00000000")).status_code for _ in range(5)].count(404)
    service.clock.now += 60
    right = await attempt(1, device.pairing["code"])
    assert (right.status_code, right.headers["x-ratelimit-limit"]) == (429, "30")
    # Others do not suffer from it.
    other = await new_client("admin")
    assert (await other.http.post(DEVICES, json={"code": device.pairing["code"]})).status_code == 201


async def test_a_wrong_code_is_in_the_audit_log(client: Any, service: Any):
    reply = await client.http.post(DEVICES, json={"code": "00000000"})
    found = (await audit.search(service.database, client.tenant, resource_type="devices")).items
    assert [(line.request_id, line.details["code"]) for line in found] == [
        (reply.headers["x-request-id"], "pairing_not_found")
    ]


# --- what there is ----------------------------------------------------------------------------------------------------


async def test_a_device_is_renamed_and_removed(client: Any, http: httpx.AsyncClient):
    device, made = await claimed(client, http, name="Hall")
    there = f"{DEVICES}/{made['id']}"
    renamed = (await client.http.patch(there, json={"name": "Kitchen"})).json()
    assert {**renamed, "updated_at": ""} == {**made, "name": "Kitchen", "updated_at": ""}
    for wrong in ({}, {"name": ""}, {"name": "a\nb"}, {"name": "x", "key_id": str(uuid.uuid4())}):
        assert (await client.http.patch(there, json=wrong)).status_code == 400
    assert (await http.get(CONFIG, headers=device.headers)).status_code == 200
    assert (await client.http.delete(there)).status_code == 204
    assert await refused(http, device) == "api_key_revoked"
    for reply in (await client.http.get(there), await client.http.delete(there)):
        assert (reply.status_code, reply.json()["error"]) == (404, "not_found")
    key = (await client.http.get(f"/api/v2/api-keys/{made['key_id']}")).json()
    assert key["status"] == "revoked"
    # A device that was stolen cannot come back with the same key.
    reply = await http.post(PAIRINGS, json=told(device.key))
    assert (reply.status_code, reply.json()["error"]) == (409, "key_in_use")


async def test_devices_are_listed_a_page_at_a_time(client: Any, http: httpx.AsyncClient):
    for name in ("Hall", "attic", "Kitchen"):
        await claimed(client, http, name=name)
    pages = [(await client.http.get(f"{DEVICES}?page_size=2&page={page}")).json() for page in (1, 2)]
    assert [[each["name"] for each in page["items"]] for page in pages] == [["attic", "Hall"], ["Kitchen"]]
    assert pages[0]["total"] == 3


async def test_what_a_device_told_is_shown(client: Any, http: httpx.AsyncClient, service: Any):
    _, made = await claimed(client, http)
    there = f"{DEVICES}/{made['id']}/events"
    assert (await client.http.get(there)).json()["total"] == 0
    now = datetime.now(UTC)
    events = [
        DeviceEvent(uuid.uuid4(), "wake", now, phrase="alexa", outcome="detected", confidence=0.9),
        DeviceEvent(
            uuid.uuid4(),
            "stt",
            now - timedelta(hours=1),
            engine="agentvoicebox-stt-sphinx",
            seconds=1.5,
            reason="platform_away",
        ),
    ]
    for _ in range(2):  # told twice, they count once
        await devices.record(service.database, client.tenant, uuid.UUID(made["id"]), events)
    wake, stt = (await client.http.get(there)).json()["items"]
    assert {**wake, "id": "", "at": ""} == {
        "id": "",
        "kind": "wake",
        "at": "",
        "phrase": "alexa",
        "wake_word_id": None,
        "outcome": "detected",
        "confidence": 0.9,
        "engine": "",
        "seconds": 0,
        "reason": "",
    }
    assert (stt["engine"], stt["seconds"], stt["reason"]) == ("agentvoicebox-stt-sphinx", 1.5, "platform_away")
    assert (await client.http.get(f"{there}?kind=stt")).json()["items"] == [stt]
    assert (await client.http.get(f"{there}?kind=llm")).status_code == 400


# --- all of it together -----------------------------------------------------------------------------------------------


async def test_from_a_code_to_a_device_that_is_cut_off(stack: Any, new_customer: Any):
    """Paired, it connects with its key, is told of each change, and what it tells is counted once."""
    customer = await new_customer(scopes=("admin",), wake_word="hey jarvis")
    async with (
        httpx.AsyncClient(base_url=stack.url, timeout=60) as stranger,
        httpx.AsyncClient(base_url=stack.url, headers=customer.headers, timeout=60) as admin,
    ):
        device = await begun(stranger, name="Kitchen")
        made = (await admin.post(DEVICES, json={"code": device.pairing["code"]})).json()
        address = stack.url.replace("http", "ws", 1) + wire.PATH
        async with connect(address, additional_headers=device.headers, open_timeout=60, proxy=None) as socket:

            async def said(kind: type[wire.Said]) -> Any:
                async with asyncio.timeout(30):
                    while not isinstance(frame := wire.decode(str(await socket.recv()), wire.FROM_PLATFORM), kind):
                        assert not isinstance(frame, wire.Problem)
                return frame

            async def phrases() -> list[tuple[str, float]]:
                told = choices.of((await said(wire.Configured)).choices)
                return [(each.phrase, each.sensitivity) for each in told.wake_words]

            await socket.send(wire.encode(wire.Hello("listener", "pi", "1.0")))
            assert (await said(wire.Welcome)).device_id == made["id"]
            assert await phrases() == [("hey jarvis", 0.5)]
            word = (await admin.post("/api/v2/wake-words", json={"phrase": "alexa"})).json()
            assert await phrases() == [("alexa", 0.5)]
            there = f"/api/v2/wake-words/{word['id']}"
            await admin.patch(there, json={"sensitivity": 0.9})
            assert await phrases() == [("alexa", 0.9)]

            event = {
                "id": uuid.uuid4().hex,
                "kind": "wake",
                "at": time.time(),
                "outcome": "detected",
                "confidence": 0.8,
            }
            event |= {"phrase": "alexa", "wake_word": word["id"]}
            for number in (1, 2):  # nobody knows whether the first arrived
                await socket.send(wire.encode(wire.Report(number, [event])))
                await said(wire.Done)
            counted = (await admin.get(f"{there}/analytics")).json()
            assert (counted["detections"], counted["average_confidence"]) == (1, 0.8)
            assert (await admin.get(f"{DEVICES}/{made['id']}/events")).json()["total"] == 1
            seen = (await admin.get(f"{DEVICES}/{made['id']}")).json()
            assert seen["version"] == "1.0"
            assert seen["last_seen_at"] is not None

            await admin.patch(there, json={"enabled": False})
            assert await phrases() == [("hey jarvis", 0.5)]
            await admin.delete(f"{DEVICES}/{made['id']}")
            async with asyncio.timeout(30):
                await socket.wait_closed()
            assert socket.close_code == live.UNAUTHORISED
