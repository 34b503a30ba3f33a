"""Who may pass the doors, and what bad input gets, on real sockets against the real node."""

from __future__ import annotations

import asyncio
import base64
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from agentvoicebox.bus_bridge import outbox
from agentvoicebox.config.errors import Unavailable
from agentvoicebox.tenancy import keys, sessions, voices
from agentvoicebox.tenancy.models import SessionStatus

NATIVE_LIMIT = 1024 * 1024


def socket_url(stack: Any, path: str) -> str:
    return stack.url.replace("http", "ws", 1) + path


async def created(stack: Any, customer: Any, **config: Any) -> dict[str, str]:
    async with httpx.AsyncClient(headers=customer.headers) as http:
        reply = await http.post(f"{stack.url}/api/v2/sessions", json=config)
    assert reply.status_code == 201, reply.text
    return reply.json()


@asynccontextmanager
async def native(stack: Any, customer: Any, **config: Any) -> AsyncIterator[ClientConnection]:
    """A connected native session, past its opening frames."""
    made = await created(stack, customer, **config)
    async with connect(made["ws_url"], additional_headers=customer.headers, compression=None, max_size=None) as socket:
        assert (await read(socket))["type"] == "connection.established"
        state = await read(socket)
        assert state["type"] == "session.state"
        assert state["data"]["session_id"] == made["session_id"]
        yield socket


@asynccontextmanager
async def realtime(stack: Any, customer: Any) -> AsyncIterator[ClientConnection]:
    url = socket_url(stack, "/v1/realtime?model=gpt-realtime")
    async with connect(url, additional_headers=customer.headers, compression=None, max_size=None) as socket:
        assert (await read(socket))["type"] == "session.created"
        yield socket


DOORS = {"native": native, "realtime": realtime}


async def read(socket: ClientConnection) -> dict[str, Any]:
    return json.loads(await asyncio.wait_for(socket.recv(), 30))


async def refused(stack: Any, path: str, **options: Any) -> tuple[int, dict[str, Any]]:
    with pytest.raises(InvalidStatus) as caught:
        async with connect(socket_url(stack, path), **options):
            pass
    response = caught.value.response
    return response.status_code, json.loads(response.body)


PATHS = ["/v1/realtime?model=gpt-realtime", "/ws/v2/sessions/00000000-0000-4000-8000-000000000000"]


def code_of(path: str, body: dict[str, Any]) -> str:
    """Either door's error code, in its own format."""
    if path.startswith("/v1"):
        assert set(body["error"]) == {"message", "type", "code", "param"}
        return body["error"]["code"]
    assert set(body) == {"error", "message"}
    return body["error"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "authentication_failed"),
        ({"Authorization": "Basic YTpi"}, "authentication_failed"),
        ({"Authorization": "Bearer "}, "authentication_failed"),
        ({"Authorization": "Bearer avb_" + "x" * 43}, "invalid_api_key"),
        ({"Authorization": "Bearer nonsense"}, "invalid_api_key"),
        ({"api-key": "avb_" + "y" * 43}, "invalid_api_key"),
    ],
)
async def test_without_a_good_key_nothing_is_opened(stack: Any, path: str, headers: dict[str, str], code: str):
    before = {visit.session_id for visit in stack.gateway.live}
    status, body = await refused(stack, path, additional_headers=headers)
    assert status == 401
    assert code_of(path, body) == code
    # Those of other tests may be gone by now.
    assert {visit.session_id for visit in stack.gateway.live} <= before


@pytest.mark.parametrize("name", ["key", "api_key", "token", "access_token"])
async def test_a_key_in_the_query_string_is_refused_even_beside_a_good_one(stack: Any, customer: Any, name: str):
    path = f"/v1/realtime?model=m&{name}={customer.key}"
    status, body = await refused(stack, path, additional_headers=customer.headers)
    assert status == 401
    assert customer.key not in json.dumps(body)


async def test_expired_and_revoked_keys_are_told_apart(stack: Any, new_customer: Any):
    expiring = await new_customer()
    await keys.rotate(stack.database, expiring.id, expiring.key_id, grace=0.05)
    await asyncio.sleep(0.1)
    status, body = await refused(stack, PATHS[0], additional_headers=expiring.headers)
    assert (status, body["error"]["code"]) == (401, "api_key_expired")
    revoked = await new_customer()
    await keys.revoke(stack.database, revoked.id, revoked.key_id)
    status, body = await refused(stack, PATHS[0], additional_headers=revoked.headers)
    assert (status, body["error"]["code"]) == (401, "api_key_revoked")


async def test_a_key_without_the_scope_may_not(stack: Any, new_customer: Any):
    other = await new_customer(scopes=("usage",))
    for path in PATHS:
        status, body = await refused(stack, path, additional_headers=other.headers)
        assert (status, code_of(path, body)) == (403, "insufficient_scope")


async def test_a_persona_that_there_is_not_is_no_model(stack: Any, customer: Any):
    status, body = await refused(stack, "/v1/realtime?model=persona:Nobody", additional_headers=customer.headers)
    assert (status, body["error"]["code"], body["error"]["param"]) == (404, "model_not_found", "model")


async def test_a_foreign_page_may_not_open_a_socket_and_our_own_may(stack: Any, customer: Any):
    status, body = await refused(stack, PATHS[0], additional_headers=customer.headers, origin="https://evil.example")
    assert (status, body["error"]["code"]) == (403, "origin_not_allowed")
    async with connect(socket_url(stack, PATHS[0]), additional_headers=customer.headers, origin=stack.url) as socket:
        assert (await read(socket))["type"] == "session.created"


async def test_browsers_authenticate_by_subprotocol_and_the_key_is_not_repeated(stack: Any, customer: Any):
    offered = ["realtime", f"openai-insecure-api-key.{customer.key}"]
    async with connect(socket_url(stack, PATHS[0]), subprotocols=offered) as socket:
        assert socket.subprotocol == "realtime"
        assert (await read(socket))["type"] == "session.created"


async def test_unknown_sockets_and_shapes_are_refused(stack: Any, customer: Any):
    status, _ = await refused(stack, "/ws/v2/nothing", additional_headers=customer.headers)
    assert status == 404
    beta = customer.headers | {"OpenAI-Beta": "realtime=v1"}
    status, body = await refused(stack, PATHS[0], additional_headers=beta)
    assert (status, body["error"]["code"]) == (400, "beta_api_shape_disabled")
    status, body = await refused(stack, "/v1/realtime?intent=transcription", additional_headers=customer.headers)
    assert (status, body["error"]["param"]) == (400, "intent")


async def closed(stack: Any, path: str, customer: Any) -> tuple[int, str]:
    async with connect(socket_url(stack, path), additional_headers=customer.headers) as socket:
        with pytest.raises(ConnectionClosed):
            await asyncio.wait_for(socket.recv(), 30)
        return socket.close_code or 0, socket.close_reason or ""


async def test_a_session_that_is_not_the_tenants_is_not_there(stack: Any, customer: Any, new_customer: Any):
    made = await created(stack, customer)
    path = f"/ws/v2/sessions/{made['session_id']}"
    stranger = await new_customer()
    unknown = await closed(stack, PATHS[1], stranger)
    assert unknown[0] == 4004
    assert await closed(stack, path, stranger) == unknown, "another tenant's session is not even there"
    assert await closed(stack, "/ws/v2/sessions/" + "-" * 36, stranger) == unknown
    await sessions.finish(stack.database, customer.id, uuid.UUID(made["session_id"]), SessionStatus.TERMINATED)
    assert (await closed(stack, path, customer))[0] == 4004


async def test_a_session_has_one_connection(stack: Any, customer: Any):
    made = await created(stack, customer)
    path = f"/ws/v2/sessions/{made['session_id']}"
    async with connect(socket_url(stack, path + "/"), additional_headers=customer.headers) as socket:
        await read(socket)
        assert (await closed(stack, path, customer))[0] == 4009


@pytest.mark.parametrize("door", DOORS)
async def test_a_key_that_dies_later_closes_the_session(stack: Any, new_customer: Any, door: str):
    customer = await new_customer()
    async with DOORS[door](stack, customer) as socket:
        await keys.revoke(stack.database, customer.id, customer.key_id)
        told = await read(socket)
        assert told["error"]["code"] == "api_key_revoked"
        with pytest.raises(ConnectionClosed):
            await asyncio.wait_for(socket.recv(), 30)
        assert socket.close_code == 4001


async def test_a_key_that_expires_closes_the_session(stack: Any, new_customer: Any):
    customer = await new_customer(expires_at=datetime.now(UTC) + timedelta(hours=1))
    async with realtime(stack, customer) as socket:
        [visit] = [visit for visit in stack.gateway.live if visit.grant.tenant_id == customer.id]
        assert visit.timer.when() - asyncio.get_running_loop().time() <= 3600, "it ends with its key, in an hour"
        # Only from here on it may be soon: a slow machine takes its time to open a session.
        await keys.rotate(stack.database, customer.id, customer.key_id, grace=0.5)
        assert (await read(socket))["error"]["code"] == "api_key_expired"
        with pytest.raises(ConnectionClosed):
            await asyncio.wait_for(socket.recv(), 30)
        assert socket.close_code == 4001


def append(door: str, audio: bytes | str, event_id: str) -> str:
    kind = "audio.chunk" if door == "native" else "input_audio_buffer.append"
    encoded = audio if isinstance(audio, str) else base64.b64encode(audio).decode()
    return json.dumps({"type": kind, "audio": encoded, "event_id": event_id})


@pytest.mark.parametrize("door", DOORS)
async def test_bad_frames_get_an_error_and_the_session_lives_on(stack: Any, customer: Any, door: str):
    limit = NATIVE_LIMIT if door == "native" else 15 * NATIVE_LIMIT
    bad: list[tuple[str | bytes, str, str | None]] = [
        ("{", "invalid_json", None),
        (b"\x00\xff\xfe garbage", "invalid_json", None),
        ("[]", "invalid_value", None),
        (json.dumps({"type": "no.such.event", "event_id": "e1"}), "unknown_message_type", "e1"),
        (json.dumps({"type": 7, "event_id": "e2"}), "invalid_value", "e2"),
        (append(door, b"\0\0\0", "e3"), "invalid_audio", "e3"),
        (append(door, "*not base64*", "e4"), "invalid_value", "e4"),
        (append(door, bytes(limit + 2), "e5"), "invalid_audio", "e5"),
        (json.dumps({"type": "response.cancel", "event_id": "e6"}), "response_cancel_not_active", "e6"),
    ]
    async with DOORS[door](stack, customer) as socket:
        for frame, code, event_id in bad:
            await socket.send(frame)
            told = await read(socket)
            assert told["type"] == "error"
            assert (told["error"]["code"], told["error"]["event_id"]) == (code, event_id)
            assert told["error"]["message"]
            assert "param" in told["error"]
        assert await write(door, socket, "who am i talking to"), "and it still answers"


async def write(door: str, socket: ClientConnection, text: str) -> str:
    """One written turn through either door; returns the answer."""
    if door == "native":
        message = {"type": "response.create", "messages": [{"role": "user", "content": text}]}
        await socket.send(json.dumps(message))
    else:
        content = [{"type": "input_text", "text": text}]
        item = {"type": "message", "role": "user", "content": content}
        await socket.send(json.dumps({"type": "conversation.item.create", "item": item}))
        await socket.send(json.dumps({"type": "response.create", "response": {"output_modalities": ["text"]}}))
    while (told := await read(socket))["type"] != "response.done":
        assert told["type"] != "error", told
    if door == "native":
        return told["data"]["text"]
    return told["response"]["output"][0]["content"][0]["text"]


async def test_audio_at_the_limit_is_heard(stack: Any, customer: Any):
    async with native(stack, customer) as socket:
        await socket.send(append("native", bytes(NATIVE_LIMIT), "e1"))
        await socket.send(json.dumps({"type": "ping"}))
        assert (await read(socket))["type"] == "pong"


async def test_a_session_that_is_ended_is_over(stack: Any, customer: Any):
    made = await created(stack, customer, modality="text")
    async with connect(made["ws_url"], additional_headers=customer.headers) as socket:
        await read(socket)
        await read(socket)
        assert await write("native", socket, "who am i talking to")
        await socket.send(json.dumps({"type": "session.end"}))
        assert (await read(socket))["type"] == "session.ended"
        with pytest.raises(ConnectionClosed):
            await asyncio.wait_for(socket.recv(), 30)
        assert socket.close_code == 1000
    session_id = uuid.UUID(made["session_id"])
    async with asyncio.timeout(30):
        while (await sessions.get(stack.database, customer.id, session_id)).status != "completed":
            await asyncio.sleep(0.05)
    events = await sessions.history(stack.database, customer.id, session_id)
    assert [event.event_type for event in events] == ["transcript", "response"]
    assert events[1].content["timings_ms"]["core"] > 0


async def until_closed(socket: ClientConnection) -> AsyncIterator[str]:
    async with asyncio.timeout(30):
        while True:
            try:
                yield str(await socket.recv())
            except ConnectionClosed:
                return


async def test_a_key_that_is_revoked_while_the_session_is_prepared(
    stack: Any, new_customer: Any, monkeypatch: pytest.MonkeyPatch
):
    customer = await new_customer()
    real = voices.get

    async def slow(*arguments: Any) -> Any:
        await keys.revoke(stack.database, customer.id, customer.key_id)
        async with asyncio.timeout(30):
            while customer.key_id not in revoked:
                await asyncio.sleep(0.01)
        return await real(*arguments)

    revoked: list[uuid.UUID] = []
    stack.gateway.door.keyring.on_revoked(revoked.append)
    monkeypatch.setattr(voices, "get", slow)
    async with connect(socket_url(stack, PATHS[0]), additional_headers=customer.headers) as socket:
        types = [json.loads(frame)["type"] async for frame in until_closed(socket)]
        assert types == ["error"], "not even the session is shown"
        assert socket.close_code == 4001


@pytest.mark.parametrize("origin", ["http://[", "null", "https://{host}", "file://"])
async def test_no_origin_gets_further_than_ours(stack: Any, customer: Any, origin: str):
    origin = origin.replace("{host}", stack.url.removeprefix("http://"))
    status, body = await refused(
        stack, PATHS[0], additional_headers=customer.headers | {"Origin": origin}, user_agent_header=None
    )
    assert (status, body["error"]["code"]) == (403, "origin_not_allowed")


async def test_a_store_that_is_away_refuses_before_the_upgrade(
    stack: Any, customer: Any, monkeypatch: pytest.MonkeyPatch
):
    async def away(*_: Any) -> None:
        raise Unavailable("The store does not answer.", code="store_unavailable")

    monkeypatch.setattr(sessions, "activate", away)
    status, body = await refused(stack, PATHS[0], additional_headers=customer.headers)
    assert (status, body["error"]["code"]) == (503, "store_unavailable")


async def test_a_session_is_not_connected_again_once_it_has_ended(stack: Any, customer: Any):
    made = await created(stack, customer, modality="text")
    path = f"/ws/v2/sessions/{made['session_id']}"
    async with connect(made["ws_url"], additional_headers=customer.headers) as socket:
        await read(socket)
        await read(socket)
        assert await write("native", socket, "who am i talking to")
    codes = set()
    async with asyncio.timeout(30):
        while 4004 not in codes:
            codes.add((await closed(stack, path, customer))[0])
            await asyncio.sleep(0.05)
    assert codes <= {4009, 4004}, "first it is still being closed, then it is over"
    events = await sessions.history(stack.database, customer.id, uuid.UUID(made["session_id"]))
    assert [event.sequence for event in events] == [0, 1]


async def test_a_session_that_ends_while_its_client_comes_is_over(
    stack: Any, customer: Any, monkeypatch: pytest.MonkeyPatch
):
    made = await created(stack, customer)
    session_id = uuid.UUID(made["session_id"])
    real = voices.get

    async def slow(*arguments: Any) -> Any:
        await sessions.finish(stack.database, customer.id, session_id, SessionStatus.COMPLETED)
        return await real(*arguments)

    monkeypatch.setattr(voices, "get", slow)
    assert (await closed(stack, f"/ws/v2/sessions/{session_id}", customer))[0] == 4004


async def test_an_item_cannot_be_larger_than_core_takes(stack: Any, customer: Any):
    async with realtime(stack, customer) as socket:
        for count, code, name in ((600, "event_too_large", None), (20, "invalid_value", "e1")):
            parts = [{"type": "input_text", "text": "x" * 8_000}] * count
            item = {"type": "message", "role": "user", "content": parts}
            await socket.send(json.dumps({"type": "conversation.item.create", "item": item, "event_id": "e1"}))
            told = await read(socket)
            assert (told["error"]["code"], told["error"]["event_id"]) == (code, name)
        assert await write("realtime", socket, "who am i talking to")


async def test_a_client_that_does_not_read_is_let_go(stack: Any, new_customer: Any, monkeypatch: pytest.MonkeyPatch):
    """Closing it waits neither for what it does not take nor for its answer."""
    monkeypatch.setattr(outbox, "FAREWELL", 0.2)
    customer = await new_customer()
    made = await created(stack, customer, modality="audio", output_rate=48_000)

    def visits() -> list[Any]:
        return [visit for visit in stack.gateway.live if visit.grant.tenant_id == customer.id]

    socket = await connect(made["ws_url"], additional_headers=customer.headers, max_queue=1, max_size=None)
    try:
        text = "say " + "one two three four five six seven eight nine ten. " * 60
        await socket.send(json.dumps({"type": "response.create", "messages": [{"content": text}]}))
        socket.transport.pause_reading()
        async with asyncio.timeout(60):
            while not any(visit.connection._outbox.waiting for visit in visits()):
                await asyncio.sleep(0.05)
            await keys.revoke(stack.database, customer.id, customer.key_id)
            while visits():
                await asyncio.sleep(0.05)
    finally:
        socket.transport.abort()


async def test_a_language_that_no_cell_speaks_is_refused(stack: Any, new_customer: Any):
    customer = await new_customer(language="de-DE")
    async with native(stack, customer) as socket:
        update = {"type": "session.update", "config": {"language": "fr-FR"}, "event_id": "e1"}
        await socket.send(json.dumps(update))
        told = await read(socket)
        assert (told["error"]["param"], told["error"]["event_id"]) == ("config.language", "e1")
        await socket.send(json.dumps({"type": "session.update", "config": {"speed": 1.5}}))
        config = (await read(socket))["data"]["config"]
        assert (config["language"], config["speed"]) == ("en-US", 1.5)
