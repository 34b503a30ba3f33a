"""The chat door as clients meet it: the unmodified `openai` package over HTTP, a real store, a real provider."""

from __future__ import annotations

import asyncio
import json
import socket
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from openai import AsyncOpenAI

from agentvoicebox.bus_bridge.answers import Answers
from agentvoicebox.bus_bridge.bus import Line
from agentvoicebox.bus_bridge.chat import MAX_BODY, CellDoor, ChatDoor
from agentvoicebox.bus_bridge.door import Door
from agentvoicebox.bus_bridge.talk import Talk
from agentvoicebox.config import settings
from agentvoicebox.config.errors import Unavailable
from agentvoicebox.plugins.chat import Chats, Patience
from agentvoicebox.plugins.chat.solvers import Solvers
from agentvoicebox.tenancy import keys, limits, metering, personas, tenants, voices
from agentvoicebox.tenancy.changes import Feed
from agentvoicebox.tenancy.keyring import Keyring
from agentvoicebox.tenancy.limits import Limiter
from agentvoicebox.tenancy.masterkeys import FileKeys
from agentvoicebox.tenancy.metering import Ledger
from agentvoicebox.tenancy.models import Metric, RateClass
from agentvoicebox.tenancy.personas import Character
from agentvoicebox.tenancy.voices import VoiceConfig

CELL = "cell-key"
OTHER_CELL = "other-cell-key"
QUESTION = [{"role": "user", "content": "what is a quasar"}]
ASKED = {"messages": QUESTION}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALLED = [
    {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "weather", "arguments": ""}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '{"city":'}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '"Rome"}'}}]},
    {"tool_calls": [{"index": 1, "id": "c2", "type": "function", "function": {"name": "time", "arguments": "{}"}}]},
]


@dataclass
class Site:
    """Both doors of a node, each on a port of its own, and a tenant with a key."""

    store: Any
    tenant_id: uuid.UUID
    key: str
    answers: Answers
    ledger: Ledger
    limiter: Limiter
    url: str = ""
    cells: str = ""
    lines: dict[str, Line] = field(default_factory=dict)

    def client(self, key: str | None = None) -> AsyncOpenAI:
        return AsyncOpenAI(api_key=key or self.key, base_url=f"{self.url}/v1", max_retries=0)

    def http(self, key: str | None = None, **headers: str) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {key or self.key}", **headers}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=60)

    def cell(self, turn_id: str, key: str = CELL) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {key}", "X-AVB-Turn": turn_id}
        return httpx.AsyncClient(base_url=self.cells, headers=headers, timeout=60)

    async def used(self) -> dict[Metric, float]:
        return await metering.totals(self.store, self.tenant_id)


class Server(uvicorn.Server):
    """On a free port of this machine, until the test is over."""

    def __init__(self, app: Any) -> None:
        super().__init__(uvicorn.Config(app, ws="none", lifespan="off", log_config=None, access_log=False))
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    async def __aenter__(self) -> Server:
        self._serving = asyncio.create_task(self._serve([self._listening]))
        while not self.started:
            await asyncio.sleep(0.01)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.should_exit = True
        self.force_exit = True
        await self._serving
        self._listening.close()


@pytest.fixture
async def site(store: Any, language_model: Any, tmp_path: Path) -> AsyncIterator[Site]:
    tenant = await tenants.create(store, f"t-{uuid.uuid4().hex[:12]}", "A tenant", "enterprise")
    issued = await keys.issue(store, tenant.id, "test", rate_class="unlimited")
    feed = Feed(store)
    await feed.start()
    # The limiter's clock stands still: no rate allows more because a test is slow.
    keyring, limiter, ledger = Keyring(store, feed), Limiter(clock=lambda: 1_000.0), Ledger(store)
    chats, solvers = Chats(Patience(attempts=1)), Solvers()
    chosen = settings.load(
        {"data": tmp_path, "openai_key": "sk-platform", "openai_url": language_model.url},
        environ={"HOME": str(tmp_path)},
    )
    answers = Answers(store, FileKeys(tmp_path / "master.keys"), chats, solvers, ledger, chosen)
    site = Site(store, tenant.id, issued.key, answers, ledger, limiter)
    door = ChatDoor(Door(chosen, keyring, limiter), answers, ledger)
    cells = CellDoor(answers, {CELL: site.lines.get, OTHER_CELL: {}.get}, store)
    async with Server(door) as outside, Server(cells) as inside:
        site.url, site.cells = outside.url, inside.url
        yield site
    await chats.close()
    solvers.close()
    await ledger.close()
    await feed.close()


@pytest.fixture
async def client(site: Site) -> AsyncIterator[AsyncOpenAI]:
    async with site.client() as client:
        yield client


# --- the openai package -----------------------------------------------------------------------------------------------


async def test_an_answer_streams(client: AsyncOpenAI, site: Site):
    stream = await client.chat.completions.create(
        model="default", messages=QUESTION, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello there."
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, "stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (7, 3)
    assert {chunk.model for chunk in chunks} == {"default"}
    assert len({chunk.id for chunk in chunks}) == 1
    used = await site.used()
    assert used == {Metric.API_CALLS: 1, Metric.LLM_INPUT_TOKENS: 7, Metric.LLM_OUTPUT_TOKENS: 3}


async def test_an_answer_comes_whole(client: AsyncOpenAI, language_model: Any):
    language_model.says("All ", "at once.", finish="length")
    whole = await client.chat.completions.create(
        model="openai/gpt-4o", messages=QUESTION, temperature=0, max_tokens=9, max_completion_tokens=8
    )
    assert whole.choices[0].message.content == "All at once."
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.total_tokens == 10
    asked = language_model.asked[0]
    assert (asked["model"], asked["temperature"], asked["max_completion_tokens"]) == ("gpt-4o", 0, 8)
    assert asked["messages"] == QUESTION


async def test_tools_are_called(client: AsyncOpenAI, language_model: Any):
    language_model.says(*CALLED, finish="tool_calls")
    stream = await client.chat.completions.create(
        model="default", messages=QUESTION, tools=[TOOL], tool_choice="auto", stream=True
    )
    arguments = ""
    async for chunk in stream:
        for call in chunk.choices[0].delta.tool_calls or []:
            if call.index == 0 and call.function is not None:
                arguments += call.function.arguments or ""
        finish = chunk.choices[0].finish_reason
    assert (arguments, finish) == ('{"city":"Rome"}', "tool_calls")
    assert language_model.asked[0]["tools"] == [TOOL]

    whole = await client.chat.completions.create(model="default", messages=QUESTION, tools=[TOOL])
    message = whole.choices[0].message
    assert message.content is None
    assert message.tool_calls is not None
    assert [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls] == [  # type: ignore[union-attr]
        ("c1", "weather", '{"city":"Rome"}'),
        ("c2", "time", "{}"),
    ]
    language_model.says("It is sunny.")
    again = await client.chat.completions.create(
        model="default",
        messages=[*QUESTION, message, {"role": "tool", "tool_call_id": "c1", "content": "sun"}],
        tools=[TOOL],
    )
    assert again.choices[0].message.content == "It is sunny."
    assert [each["role"] for each in language_model.asked[-1]["messages"]] == ["system", "user", "assistant", "tool"]


async def test_a_provider_writes_nothing_into_our_format(site: Site, language_model: Any):
    language_model.says("Hello \ud83d", finish='stop"}],"error":[{"code":"')
    async with site.http() as http:
        whole = (await http.post("/v1/chat/completions", json=ASKED)).json()
        streamed = await http.post("/v1/chat/completions", json={**ASKED, "stream": True})
    chunks = [json.loads(line[6:]) for line in streamed.text.split("\n\n") if line and line != "data: [DONE]"]
    assert whole["choices"][0]["finish_reason"] == chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert whole["choices"][0]["message"]["content"] == chunks[0]["choices"][0]["delta"]["content"] == "Hello ?"
    assert not any("error" in chunk for chunk in chunks)


async def test_models_are_listed_and_can_be_asked(client: AsyncOpenAI, site: Site, language_model: Any):
    ada = await personas.create(site.store, site.tenant_id, Character(name="Ada Lovelace", system_prompt="You count."))
    names = [model.id async for model in client.models.list()]
    assert names == ["default", "persona:Ada Lovelace", "openai/gpt-5.4-mini"]
    assert (await client.models.retrieve("default")).id == "default"
    for name in (names[1], f"persona:{ada.id}", "persona:ada lovelace"):
        await client.chat.completions.create(model=name, messages=QUESTION)
        assert "You count." in language_model.asked[-1]["messages"][0]["content"]
    for name in ("gpt-4o", "persona:Nobody", "nobody/model", "openai/", "a b"):
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(model=name, messages=QUESTION)
        assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("nothing")


async def test_what_fails_before_the_answer_has_a_status(client: AsyncOpenAI, site: Site, language_model: Any):
    language_model.says(status=500)
    with pytest.raises(openai.APIStatusError) as caught:
        await client.chat.completions.create(model="default", messages=QUESTION, stream=True)
    assert (caught.value.status_code, caught.value.code, caught.value.type) == (502, "provider_failed", "server_error")
    await voices.put(site.store, site.tenant_id, VoiceConfig(llm_provider="groq"))
    site.answers.forget(site.tenant_id)
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(model="default", messages=QUESTION, stream=True)
    assert (caught.value.status_code, caught.value.code) == (503, "no_language_model")


async def test_what_fails_in_the_middle_is_told_there(client: AsyncOpenAI, site: Site, language_model: Any):
    language_model.says("Once upon ", "a time", breaks_off=True)
    heard: list[str] = []

    async def hear() -> None:
        async for chunk in await client.chat.completions.create(model="default", messages=QUESTION, stream=True):
            heard.append(chunk.choices[0].delta.content or "")

    with pytest.raises(openai.APIError) as caught:
        await hear()
    assert heard == ["Once upon ", "a time"]
    assert caught.value.code == "provider_broke_off"
    assert (await site.used())[Metric.LLM_OUTPUT_TOKENS] > 0


async def test_who_goes_away_ends_the_work_at_once(site: Site, language_model: Any):
    language_model.says("Once upon ", "a time", hold_after=1)
    for streams in (True, False):
        language_model.hung_up.clear()
        async with site.http() as http:
            body = {**ASKED, "stream": streams}
            if streams:
                async with http.stream("POST", "/v1/chat/completions", json=body) as response:
                    assert "Once upon" in await anext(response.aiter_lines())
            else:
                with suppress(TimeoutError):
                    asking = asyncio.create_task(http.post("/v1/chat/completions", json=body))
                    while len(language_model.asked) < 2:
                        await asyncio.sleep(0.01)
                    asking.cancel()
                    await asyncio.wait([asking])
        await asyncio.wait_for(language_model.hung_up.wait(), 30)
    async with asyncio.timeout(30):
        while (used := await site.used()).get(Metric.API_CALLS, 0) < 2 or Metric.LLM_INPUT_TOKENS not in used:
            await asyncio.sleep(0.01)
    assert used[Metric.API_CALLS] == 2


# --- who may ask ------------------------------------------------------------------------------------------------------


async def test_only_a_good_key_with_the_right_scope_opens(site: Site, language_model: Any):
    async def refusal(key: str) -> tuple[int, str]:
        async with site.http(key) as http:
            response = await http.post("/v1/chat/completions", json=ASKED)
        return response.status_code, response.json()["error"]["code"]

    issue = [await keys.issue(site.store, site.tenant_id, scope, [scope]) for scope in ("usage", "admin")]
    assert await refusal("avb_wrong") == (401, "invalid_api_key")
    assert await refusal(CELL) == (401, "invalid_api_key")
    assert await refusal(issue[0].key) == (403, "insufficient_scope")
    assert language_model.asked == []
    async with site.http(issue[1].key) as http:
        assert (await http.post("/v1/chat/completions", json=ASKED)).status_code == 200
    async with httpx.AsyncClient(base_url=site.url) as http:
        nothing = await http.get("/v1/models")
        assert (nothing.status_code, nothing.headers["www-authenticate"]) == (401, "Bearer")
        assert (await http.get(f"/v1/models?api_key={site.key}")).status_code == 401


async def test_a_key_is_held_to_its_rates(site: Site):
    issued = await keys.issue(site.store, site.tenant_id, "slow", rate_class="standard")
    async with site.http(issued.key) as http:
        first = await http.get("/v1/models")
        assert int(first.headers["x-ratelimit-remaining"]) == int(first.headers["x-ratelimit-limit"]) - 1
        most = limits.KEYS[RateClass.STANDARD]
        assert most is not None
        site.limiter.decide(("key", issued.id), most, cost=most.per_minute - 1)
        refused = await http.get("/v1/models")
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert int(refused.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"[]", None),
        (b"{", None),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', None),
        (b'{"messages": [{"role": "user"}], "tools": [{"a": ' + b"[" * 100_000, None),
        (b'{"messages": [{"role": "user"}], "x": ' + b"[" * 100_000, None),
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user", "content": "a"}] * 1_001}, "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"content": "a"}]}, "messages[0]"),
        ({**ASKED, "model": 5}, "model"),
        ({**ASKED, "stream": "yes"}, "stream"),
        ({**ASKED, "temperature": 2.1}, "temperature"),
        ({**ASKED, "temperature": "warm"}, "temperature"),
        ({**ASKED, "max_tokens": 0}, "max_tokens"),
        ({**ASKED, "max_completion_tokens": 4_097}, "max_completion_tokens"),
        ({**ASKED, "n": 2}, "n"),
        ({**ASKED, "tools": {}}, "tools"),
        ({**ASKED, "tools": [{"type": "function"}]}, "tools"),
        ({**ASKED, "tools": [TOOL], "tool_choice": {"function": "x"}}, "tool_choice"),
        ({"messages": [{"role": "user", "content": "word " * 60_000}]}, "messages"),
    ],
)
async def test_bad_input_is_refused_by_name(site: Site, language_model: Any, body: Any, param: str | None):
    async with site.http() as http:
        sent = {"content": body} if isinstance(body, bytes) else {"json": body}
        response = await http.post("/v1/chat/completions", **sent)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert error["message"]
    assert language_model.asked == []


async def test_what_nobody_knows_is_ignored(site: Site, language_model: Any):
    body = {**ASKED, "seed": 1, "frequency_penalty": "?", "stream": None, "metadata": {"a": 1}, "temperature": None}
    async with site.http() as http:
        response = await http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200
    assert set(language_model.asked[0]) & {"seed", "frequency_penalty", "metadata"} == set()


async def test_too_much_is_refused_whether_it_says_so_or_not(site: Site, language_model: Any):
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(MAX_BODY // 65_536 + 1):
            yield b" " * 65_536

    async with site.http() as http:
        for content in (b" " * (MAX_BODY + 1), pieces()):
            response = await http.post("/v1/chat/completions", content=content)
            assert (response.status_code, response.json()["error"]["code"]) == (413, "payload_too_large")
    assert language_model.asked == []


async def test_paths_and_methods_that_are_not_there_are_named(site: Site):
    async with site.http() as http:
        for method, path in (("GET", "/v1/chat/completions"), ("POST", "/v1/models")):
            response = await http.request(method, path)
            assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")
    assert ChatDoor.serves("/v1/chat/completions")
    assert ChatDoor.serves("/v1/models/persona:Ada")
    assert not ChatDoor.serves("/v1/realtime")


async def test_nothing_is_answered_that_cannot_be_metered(site: Site, monkeypatch: pytest.MonkeyPatch):
    async def away(usages: Any) -> None:
        raise Unavailable("The store does not answer.", code="store_unavailable")

    monkeypatch.setattr(site.ledger, "record", away)
    async with site.http() as http:
        for path in ("/v1/models", "/v1/models/nothing"):
            response = await http.get(path)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "store_unavailable")
        response = await http.post("/v1/chat/completions", json={**ASKED, "stream": True})
        assert response.status_code == 503


async def test_our_own_mistakes_are_not_shown(site: Site, caplog: Any, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the secret question")

    monkeypatch.setattr(site.answers, "stream", broken)
    async with site.http() as http:
        response = await http.post("/v1/chat/completions", json=ASKED)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert "RuntimeError" in caplog.text
    assert "secret question" not in caplog.text + response.text


# --- how it is sent ---------------------------------------------------------------------------------------------------


async def test_pieces_that_are_there_at_once_leave_in_one(site: Site, language_model: Any):
    language_model.says(*(f"{number} " for number in range(50)))
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await asked_directly(site, send)
    bodies = [message for message in sent if message["type"] == "http.response.body"]
    text = b"".join(message["body"] for message in bodies)
    assert text.count(b"data: ") == 52
    assert text.endswith(b"data: [DONE]\n\n")
    assert len(bodies) < 50
    assert [message["more_body"] for message in bodies] == [True] * (len(bodies) - 1) + [False]


async def test_an_answer_waits_for_a_client_that_reads_slowly(site: Site, language_model: Any):
    language_model.says(*("word " for _ in range(500)))
    may_go_on = asyncio.Event()
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)
        if message["type"] == "http.response.body":
            await may_go_on.wait()

    serving = asyncio.create_task(asked_directly(site, send))
    while len(sent) < 2:
        await asyncio.sleep(0.01)
    for _ in range(50):  # all that it could do meanwhile
        await asyncio.sleep(0.001)
    assert Metric.LLM_OUTPUT_TOKENS not in await site.used(), "the provider was read to its end"
    assert len(sent) == 2
    may_go_on.set()
    await serving
    assert b"".join(message["body"] for message in sent[1:]).count(b"word ") == 500
    assert max(message["body"].count(b"data: ") for message in sent[1:]) <= 64


async def asked_directly(site: Site, send: Any) -> None:
    """Ask as a cell does, without a server between."""
    site.lines["turn_1"] = line(site)
    body = b'{"messages": [{"role": "user", "content": "count"}], "stream": true}'
    headers = [(b"authorization", b"Bearer " + CELL.encode()), (b"x-avb-turn", b"turn_1")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}
    received = iter([{"type": "http.request", "body": body}])

    async def receive() -> Any:
        for message in received:
            return message
        await asyncio.Event().wait()

    await CellDoor(site.answers, {CELL: site.lines.get}, site.store)(scope, receive, send)


def line(site: Site, tenant_id: uuid.UUID | None = None) -> Line:
    """A session's line to core, in the middle of a turn."""
    made = Line(str(uuid.uuid4()), str(tenant_id or site.tenant_id), context={})
    made.talk = Talk(instructions="Speak like a sailor.")
    return made


# --- cells ------------------------------------------------------------------------------------------------------------


async def test_a_cell_asks_in_the_name_of_a_turn(site: Site, language_model: Any):
    mine = site.lines["turn_1"] = line(site)
    assert isinstance(mine.talk, Talk)
    mine.talk.note("my name is Jim", "Ahoy.")
    body = {"model": "persona", "stream": True, "messages": [{"role": "user", "content": "who am i"}]}
    async with site.cell("turn_1") as http:
        response = await http.post("/v1/chat/completions", json={**body, "language": "de-DE"})
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream"
        assert response.text.endswith("data: [DONE]\n\n")
        whole = await http.post("/v1/chat/completions", json={**body, "stream": False})
    assert whole.json()["choices"][0]["message"]["content"] == "Hello there."
    system, *rest = language_model.asked[0]["messages"]
    assert "Speak like a sailor." in system["content"]
    assert "de-DE" in system["content"]
    assert [message["content"] for message in rest] == ["my name is Jim", "Ahoy.", "who am i"]
    assert await site.used() == {Metric.LLM_INPUT_TOKENS: 14, Metric.LLM_OUTPUT_TOKENS: 6}


async def test_a_cells_key_opens_turns_in_flight_and_nothing_else(site: Site, language_model: Any):
    site.lines["turn_1"] = line(site)
    site.lines["deaf"] = Line(str(uuid.uuid4()), str(site.tenant_id), context={})

    async def refusal(turn_id: str, key: str = CELL, path: str = "/v1/chat/completions", body: Any = ASKED) -> Any:
        async with site.cell(turn_id, key) as http:
            response = await http.post(path, json=body)
        return response.status_code, response.json()["error"]["code"]

    for key in (site.key, "cell-ke", f"{CELL}x"):
        assert await refusal("turn_1", key) == (401, "invalid_api_key")
    for turn_id in ("turn_2", "", "deaf", "x" * 100):
        assert await refusal(turn_id) == (404, "turn_not_found")
    assert await refusal("turn_1", OTHER_CELL) == (404, "turn_not_found"), "it is in flight, but in another cell"
    assert await refusal("turn_1", path="/v1/models") == (404, "not_found")
    for content in (None, 5, "a" * 10_001):
        body = {"messages": [{"role": "user", "content": content}]}
        assert (await refusal("turn_1", body=body))[0] == 400
    assert (await refusal("turn_1", body={"messages": [{"role": "system", "content": "obey"}]}))[0] == 400
    async with site.cell("turn_1") as http:
        assert (await http.get("/v1/chat/completions")).status_code == 405
    assert language_model.asked == []
    assert await site.used() == {}
