"""Language models, over HTTP (API-087, API-088, API-197)."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from agentvoicebox.bus_bridge.answers import Answers
from agentvoicebox.plugins.chat import Chats
from agentvoicebox.tenancy import secrets

LLM = "/api/v2/llm"
CONFIG = f"{LLM}/config"
CREDENTIALS = f"{LLM}/credentials"
KEY = "sk-our-own-key-1234"


async def test_the_choices_are_read_and_changed(client: Any):
    before = (await client.http.get(CONFIG)).json()
    assert before.pop("temperature_explained").startswith("0 ")
    assert before == {
        "provider": "auto",
        "model": "auto",
        "temperature": 0.7,
        "max_tokens": 1024,
        "url": "",
        "fallbacks": [],
    }
    wanted = {
        "provider": "compatible",
        "model": "acme/large:2",
        "temperature": 2,
        "max_tokens": 4096,
        "url": "https://models.example.com/v1",
        "fallbacks": ["groq/llama-3.1-8b-instant"],
    }
    reply = await client.http.patch(CONFIG, json=wanted)
    assert {name: reply.json()[name] for name in wanted} == wanted
    lines = (await client.http.get("/api/v2/audit?resource_type=voice_config")).json()
    assert lines["total"] == 1


WRONG: list[tuple[str, Any]] = [
    ("provider", "acme"),
    ("model", ""),
    ("model", "x" * 101),
    ("model", "x\n"),
    ("temperature", 2.1),
    ("temperature", -0.1),
    ("max_tokens", 255),
    ("max_tokens", 4097),
    ("max_tokens", 300.5),
    ("url", "http://models.example.com"),
    ("url", "https://localhost/v1"),
    ("url", "https://10.0.0.1/v1"),
    ("url", "https://models.example.com/v1?x=1"),
    ("url", "https://models.example.com/v1#f"),
    ("url", "https://models.example.com:0/v1"),
    ("fallbacks", ["groq"]),
    ("fallbacks", ["acme/x"]),
    ("fallbacks", ["groq/x\n"]),
    ("fallbacks", ["groq/x"] * 6),
    ("temperature_explained", "x"),
]


async def test_what_makes_no_sense_is_refused_by_name(client: Any):
    for field, value in WRONG:
        reply = await client.http.patch(CONFIG, json={field: value})
        assert (reply.status_code, list(reply.json()["details"])) == (400, [field])
        assert "llm_" not in reply.text


async def test_scopes(client: Any, new_client: Any, speaking: Any):
    speaker = await new_client("realtime", tenant=client.tenant)
    nobody = await new_client("billing", tenant=client.tenant)
    for path in (LLM, CONFIG):
        assert (await speaker.http.get(path)).status_code == 200
        assert (await nobody.http.get(path)).status_code == 403
    assert (await speaker.http.post(f"{LLM}/complete", json={"prompt": "Hello"})).status_code == 200
    for method, path, body in (
        ("PATCH", CONFIG, {"temperature": 1}),
        ("POST", f"{LLM}/test", {"prompt": "Hello"}),
        ("GET", CREDENTIALS, None),
        ("PUT", f"{CREDENTIALS}/openai", {"api_key": KEY}),
        ("DELETE", f"{CREDENTIALS}/openai", None),
    ):
        reply = await speaker.http.request(method, path, json=body)
        assert (reply.status_code, reply.json()["error"]) == (403, "insufficient_scope"), path
    assert (await nobody.http.post(f"{LLM}/complete", json={"prompt": "Hello"})).status_code == 403


async def test_llm_04_keys_are_kept_and_not_shown(client: Any, service: Any):
    reply = await client.http.put(f"{CREDENTIALS}/openai", json={"api_key": KEY})
    assert (reply.status_code, reply.content) == (204, b"")
    for provider in ("groq", "deepgram"):
        await client.http.put(f"{CREDENTIALS}/{provider}", json={"api_key": f"{provider}-key-5678"})
    told = await client.http.get(CREDENTIALS)
    assert [(each["provider"], each["kind"], each["last4"]) for each in told.json()["items"]] == [
        ("groq", "llm", "5678"),
        ("openai", "llm", "1234"),
        ("deepgram", "stt", "5678"),
    ]
    assert KEY not in told.text
    assert await secrets.get(service.database, service.secrets, client.tenant, "llm", "openai") == KEY.encode()
    log = await client.http.get("/api/v2/audit/export?format=json")
    assert "llm/openai" in log.text
    assert KEY not in log.text
    assert (await client.http.delete(f"{CREDENTIALS}/openai")).status_code == 204
    reply = await client.http.delete(f"{CREDENTIALS}/openai")
    assert (reply.status_code, reply.json()["error"]) == (404, "secret_not_found")


async def test_a_key_is_kept_without_the_line_s_end_it_was_pasted_with(client: Any, service: Any):
    reply = await client.http.put(f"{CREDENTIALS}/openai", json={"api_key": f" {KEY}\r\n"})
    assert reply.status_code == 204
    assert await secrets.get(service.database, service.secrets, client.tenant, "llm", "openai") == KEY.encode()


@pytest.mark.parametrize("path", ["llm/test", "llm/complete", "personas/{}/test"])
async def test_who_goes_away_ends_the_answer(client: Any, speaking: Any, service: Any, used: Any, path: str):
    """The provider is not read to its end, and what was used is metered."""
    asked, left = asyncio.Event(), asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        while await reader.read(65_536):
            pass
        left.set()
        writer.close()

    persona = (await client.http.post("/api/v2/personas", json={"name": "Anna"})).json()["id"]
    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    chats, parts = Chats(), service.app.state
    settings = replace(speaking.engines.settings, compatible_url=url)
    parts.answers = Answers(service.database, service.secrets, chats, parts.solvers, service.ledger, settings)
    question = {"message": "Hello"} if path.startswith("personas") else {"prompt": "Hello"}
    asking = asyncio.create_task(client.http.post(f"/api/v2/{path.format(persona)}", json=question))
    await asked.wait()
    asking.cancel()
    await asyncio.wait([asking])
    async with asyncio.timeout(30):
        await left.wait()
        while (await used(client)).get("llm_input_tokens", 0) == 0:
            await asyncio.sleep(0.01)
    server.close()
    await parts.answers.close()
    await chats.close()


async def test_how_providers_do_is_told_without_what_others_use(client: Any, operator: Any, speaking: Any):
    await client.http.post(f"{LLM}/test", json={"prompt": "Hello"})
    speaking.model.says(status=401)
    await client.http.post(f"{LLM}/test", json={"prompt": "Hello"})
    told = (await client.http.get(f"{LLM}/metrics")).json()["items"]
    assert [each["provider"] for each in told] == ["openai", "anthropic", "groq", "ollama", "compatible"]
    ours = told[-1]
    assert ours["failure_rate"] == 0.5
    assert ours["average_seconds"] >= ours["average_first_seconds"] > 0
    hidden = ("model", "requests", "failures", "input_tokens", "output_tokens")
    assert {each[name] for each in told for name in hidden} == {None}
    assert told[0]["failure_rate"] is told[0]["average_seconds"] is None
    named = {"X-Tenant-ID": str(client.tenant)}
    (whole,) = (await operator.get(f"{LLM}/metrics", headers=named)).json()["items"]
    assert [whole[name] for name in hidden[1:]] == [2, {"provider_refused": 1}, 7, 3]


async def test_keys_of_solvers_are_kept_by_their_ids(client: Any, speaking: Any):
    solver = (await client.http.get("/api/v2/personas/solvers")).json()["items"][0]["id"]
    assert (await client.http.put(f"{CREDENTIALS}/{solver}", json={"api_key": '{"appid": "x y"}'})).status_code == 204
    (told,) = (await client.http.get(CREDENTIALS)).json()["items"]
    assert (told["provider"], told["kind"]) == (solver, "solver")
    assert (await client.http.delete(f"{CREDENTIALS}/{solver}")).status_code == 204


async def test_keys_of_nobody_are_not_kept(client: Any):
    for provider in ("acme", "auto", "llm", "x" * 200):
        reply = await client.http.put(f"{CREDENTIALS}/{provider}", json={"api_key": KEY})
        assert (reply.status_code, list(reply.json()["details"])) == (404, ["provider"])
    for wrong in ("", "short", "short       \n", " " * 9, "line\nbreak!", "tab\tbreak!", "schlüsselbreak"):
        reply = await client.http.put(f"{CREDENTIALS}/openai", json={"api_key": wrong})
        assert (reply.status_code, list(reply.json()["details"])) == (400, ["api_key"])
        assert "break" not in reply.text
    for body in ({}, {"key": KEY}):
        reply = await client.http.put(f"{CREDENTIALS}/openai", json=body)
        assert reply.status_code == 400
    assert (await client.http.get(CREDENTIALS)).json() == {"items": []}


async def test_keys_of_two_tenants_are_two(client: Any, new_client: Any):
    other = await new_client("admin")
    await client.http.put(f"{CREDENTIALS}/openai", json={"api_key": KEY})
    assert (await other.http.get(CREDENTIALS)).json() == {"items": []}
    assert (await other.http.delete(f"{CREDENTIALS}/openai")).status_code == 404
    mine = {"X-Tenant-ID": str(client.tenant)}
    for method, body in (("PUT", {"api_key": KEY}), ("DELETE", None)):
        reply = await other.http.request(method, f"{CREDENTIALS}/openai", json=body, headers=mine)
        assert (reply.status_code, reply.json()["error"]) == (403, "permission_denied")
    assert len((await client.http.get(CREDENTIALS)).json()["items"]) == 1


async def test_who_can_be_asked(client: Any, speaking: Any):
    await client.http.put(f"{CREDENTIALS}/openai", json={"api_key": KEY})
    await client.http.patch(CONFIG, json={"provider": "openai", "model": "gpt-4o", "fallbacks": ["groq/llama"]})
    listed = {each.pop("id"): each for each in (await client.http.get(LLM)).json()["items"]}
    assert list(listed) == ["openai", "anthropic", "groq", "ollama", "compatible"]
    assert listed["openai"]["tenant_key"] is True
    assert listed["openai"]["platform_key"] is False
    assert "gpt-4o" in listed["openai"]["models"]
    assert "llama" in listed["groq"]["models"]
    assert (listed["compatible"]["platform_key"], listed["compatible"]["tenant_key"]) == (True, False)


@pytest.mark.parametrize("path", ["test", "complete"])
async def test_llm_05_a_prompt_is_answered_and_metered(client: Any, speaking: Any, used: Any, path: str):
    reply = await client.http.post(f"{LLM}/{path}", json={"prompt": "Say hello."})
    assert reply.status_code == 200, reply.text
    told = reply.json()
    assert (told["reply"], told["provider"]) == ("Hello there.", "compatible")
    assert told["tokens"] == {"input": 7, "output": 3}
    assert told["seconds"] > 0
    assert speaking.model.asked[-1]["messages"][-1] == {"role": "user", "content": "Say hello."}
    assert speaking.model.keys == ["ours"]
    assert await used(client) == {"llm_input_tokens": 7, "llm_output_tokens": 3}


async def test_a_conversation_is_answered_as_it_was_asked_to(client: Any, speaking: Any):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "And now?"},
    ]
    wanted = {"messages": messages, "temperature": 0, "max_tokens": 5, "model": "compatible/acme-large"}
    told = (await client.http.post(f"{LLM}/complete", json=wanted)).json()
    assert (told["provider"], told["model"]) == ("compatible", "acme-large")
    asked = speaking.model.asked[-1]
    assert asked["messages"] == messages
    assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("acme-large", 0, 5)


async def test_choices_count_for_the_next_answer(client: Any, speaking: Any):
    for temperature in (0.0, 1.5):
        await client.http.patch(CONFIG, json={"temperature": temperature, "provider": "compatible", "model": "m"})
        await client.http.post(f"{LLM}/test", json={"prompt": "Hello"})
    assert [each["temperature"] for each in speaking.model.asked] == [0.0, 1.5]


WRONG_QUESTIONS: list[tuple[dict[str, Any], str]] = [
    ({}, "messages"),
    ({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "messages"),
    ({"prompt": ""}, "prompt"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.role"),
    ({"messages": [{"role": "user"}]}, "messages.content"),
    ({"prompt": "x", "temperature": 3}, "temperature"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "x", "model": "nobody/nothing"}, "model"),
    ({"prompt": "x", "model": "gpt-4"}, "model"),
    ({"prompt": "x", "stream": True}, "stream"),
]


async def test_answers_are_asked_for_properly(client: Any, speaking: Any):
    for wrong, field in WRONG_QUESTIONS:
        reply = await client.http.post(f"{LLM}/complete", json=wrong)
        assert (reply.status_code, list(reply.json()["details"])) == (400, [field]), reply.text
    assert speaking.model.asked == []


async def test_a_prompt_of_a_megabyte_is_too_large(client: Any, speaking: Any):
    for path in ("test", "complete"):
        reply = await client.http.post(f"{LLM}/{path}", json={"prompt": "x" * 1_000_000})
        assert (reply.status_code, reply.json()["error"]) == (413, "payload_too_large")
    many = [{"role": "user", "content": "x" * 25_000}] * 10
    reply = await client.http.post(f"{LLM}/complete", json={"messages": many})
    assert (reply.status_code, reply.json()["error"]) == (400, "prompt_too_long")


async def test_without_anybody_to_ask_it_says_so(client: Any, speaking: Any, used: Any):
    await client.http.patch(CONFIG, json={"provider": "anthropic"})
    reply = await client.http.post(f"{LLM}/test", json={"prompt": "Hello"})
    assert (reply.status_code, reply.json()["error"]) == (503, "no_language_model")
    reply = await client.http.post(f"{LLM}/complete", json={"prompt": "Hello", "model": "groq/llama"})
    assert (reply.status_code, reply.json()["error"], list(reply.json()["details"])) == (
        400,
        "no_language_model",
        ["model"],
    )
    assert await used(client) == {}


async def test_without_engines_it_says_so(client: Any):
    for path in ("test", "complete"):
        reply = await client.http.post(f"{LLM}/{path}", json={"prompt": "Hello"})
        assert (reply.status_code, reply.json()["error"]) == (503, "no_engines")


async def test_a_provider_that_refuses_is_named(client: Any, speaking: Any, used: Any):
    speaking.model.says(status=401)
    reply = await client.http.post(f"{LLM}/test", json={"prompt": "Hello"})
    assert (reply.status_code, reply.json()["error"]) == (502, "provider_refused")
    assert await used(client) == {}
