"""Language models are asked through their real SDKs, at real servers that behave well and badly."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
import sys
import traceback
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agentvoicebox.config.errors import AvbError, BadInput, Unavailable
from agentvoicebox.plugins.chat import (
    Chats,
    Delta,
    Endpoint,
    Patience,
    ProviderFailed,
    Reach,
    Request,
    Tokens,
    chats,
    connections,
)

PROVIDERS = ("openai", "compatible", "groq", "anthropic", "ollama")
KEY = "sk-a-key-that-nobody-may-see"
SECRET = "my cat is called Schroedinger"
PATIENT = Patience(first=60.0, between=90.0, begin=200.0, pause=0.001)
"""For all that comes at some time; a test that wants a wait to end ends it, see `Waits`."""
REACH = Reach(connect=60.0, tls=ssl.create_default_context())
"""Reading the world's certificates takes time, and nobody here has one."""
LIGHT = {"type": "function", "function": {"name": "light", "description": "A lamp.", "parameters": {"type": "object"}}}


def ask(**more: Any) -> Request:
    """A question with a secret in it."""
    return Request([{"role": "user", "content": SECRET}], **more)


@pytest.fixture
async def chat() -> AsyncIterator[Chats]:
    """With much patience, but short pauses."""
    made = Chats(PATIENT, REACH)
    yield made
    await made.close()


def endpoint(server: Any, provider: str = "compatible") -> Endpoint:
    """`server` as a provider of this kind."""
    return Endpoint(provider, KEY, server.url(provider))


async def failing(answer: Any) -> tuple[str, AvbError]:
    """The text that came, and the error after it."""
    text = ""

    async def listen() -> None:
        nonlocal text
        async for delta in answer:
            text += delta.text

    with pytest.raises(AvbError) as caught:
        await listen()
    return text, caught.value


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_an_answer_comes_in_pieces_with_the_tokens_that_the_provider_counted(
    providers: Any, chat: Chats, provider: str
) -> None:
    server = await providers(text="It is nice out.", tokens=(21, 5))
    answer = chat.stream([(endpoint(server, provider), "small")], ask())
    deltas = [delta async for delta in answer]
    assert [each.text for each in deltas] == ["It", " is", " nice", " out.", ""]
    assert deltas[-1] == Delta(finish="stop", tokens=Tokens(21, 5))
    assert [each.finish for each in deltas[:-1]] == [None] * 4
    assert answer.tokens == Tokens(21, 5)
    assert server.asked[0].headers["authorization"] == f"Bearer {KEY}"
    [metrics] = chat.metrics()
    assert (metrics.provider, metrics.model, metrics.requests) == (provider, "small", 1)
    assert (metrics.input_tokens, metrics.output_tokens, metrics.first.count, metrics.whole.count) == (21, 5, 1, 1)


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_the_first_piece_is_there_before_the_last_one_is_made(providers: Any, chat: Chats, provider: str) -> None:
    hold = asyncio.Event()
    server = await providers(text="one two three", hold=hold, after=1)
    async with aclosing(chat.stream([(endpoint(server, provider), "small")], ask())) as answer:
        assert (await anext(answer)).text == "one"
        hold.set()
        assert [delta.text async for delta in answer] == [" two", " three", ""]


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_tools_are_called_in_openai_s_form(providers: Any, chat: Chats, provider: str) -> None:
    server = await providers(text="Well.", tools=[("light", {"on": True}), ("light", {"on": False})])
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Light, please."}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "light", "arguments": '{"on": true}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "it burnt out"},
        {"role": "user", "content": "Again."},
    ]
    request = Request(messages, temperature=1.5, max_tokens=300, tools=[LIGHT], tool_choice="required")
    calls: dict[int, dict[str, str]] = {}
    async for delta in chat.stream([(endpoint(server, provider), "small")], request):
        for call in delta.tool_calls or ():
            made = calls.setdefault(call["index"], {"name": "", "arguments": ""})
            for name in made:
                made[name] += call["function"].get(name) or ""
            made["id"] = call.get("id") or made["id"]
    assert delta.finish == "tool_calls"
    assert [(each["name"], json.loads(each["arguments"])) for each in calls.values()] == [
        ("light", {"on": True}),
        ("light", {"on": False}),
    ]
    assert len({each["id"] for each in calls.values()}) == 2
    body = server.asked[0].body
    if provider == "anthropic":
        assert body["system"] == "Be brief."
        assert [each["role"] for each in body["messages"]] == ["user", "assistant", "user"]
        assert body["messages"][1]["content"] == [
            {"type": "tool_use", "id": "c1", "name": "light", "input": {"on": True}}
        ]
        assert body["messages"][2]["content"] == [
            {"type": "tool_result", "tool_use_id": "c1", "content": "it burnt out"},
            {"type": "text", "text": "Again."},
        ]
        assert body["tools"] == [{"name": "light", "description": "A lamp.", "input_schema": {"type": "object"}}]
        assert (body["tool_choice"], body["temperature"], body["max_tokens"]) == ({"type": "any"}, 1.0, 300)
    elif provider == "ollama":
        assert [each["role"] for each in body["messages"]] == ["system", "user", "assistant", "tool", "user"]
        assert body["messages"][2]["tool_calls"] == [{"function": {"name": "light", "arguments": {"on": True}}}]
        assert body["messages"][3]["tool_name"] == "light"
        assert body["options"] == {"temperature": 1.5, "num_predict": 300}
        assert body["tools"][0]["function"]["name"] == "light"
    else:
        assert (body["messages"], body["tools"], body["tool_choice"]) == (messages, [LIGHT], "required")
        limit = "max_tokens" if provider == "compatible" else "max_completion_tokens"
        assert (body["temperature"], body[limit]) == (1.5, 300)


FAILURES = [
    ("refuse", "provider_refused"),
    ("overload", "provider_overloaded"),
    ("error", "provider_failed"),
    ("reject", "provider_rejected"),
    ("redirect", "provider_rejected"),
    ("html", "provider_garbage"),
    ("garbage", "provider_garbage"),
    ("scribble", "provider_garbage"),
    ("noise", "provider_garbage"),
    ("endless", "provider_garbage"),
    ("zip", "provider_garbage"),
    ("close", "provider_broke_off"),
    ("hang", "provider_timeout"),
    ("drip", "provider_timeout"),
]


@pytest.mark.parametrize("provider", ["openai", "groq", "anthropic", "ollama"])
@pytest.mark.parametrize(("fail", "code"), FAILURES)
async def test_what_a_provider_does_wrong_has_a_name_and_leaks_nothing(
    providers: Any, chat: Chats, waits: Any, caplog: pytest.LogCaptureFixture, provider: str, fail: str, code: str
) -> None:
    if (provider, fail) == ("ollama", "drip"):
        code = "provider_garbage"  # its protocol knows no comments
    ours = waits(chats)
    caplog.set_level(logging.DEBUG)
    server = await providers(fail=fail)
    answer = chat.stream([(endpoint(server, provider), "small")], ask())
    listening = asyncio.create_task(failing(answer))
    if code == "provider_timeout":
        async with asyncio.timeout(PATIENT.first):
            await server.said.wait()
        await ours.end_all(listening)
        [granted] = ours.granted  # signs of life do not prolong it
        assert granted == pytest.approx(PATIENT.first, abs=10)
    text, error = await listening
    assert (text, error.code, error.status) == ("", code, 502)
    assert isinstance(error, ProviderFailed)
    assert error.tokens == answer.tokens == Tokens(0, 0)
    assert chat.metrics()[0].input_tokens == 0
    again = code in ("provider_overloaded", "provider_failed", "provider_broke_off")
    assert len(server.asked) == (3 if again else 1)
    assert not any(each.path.startswith("/elsewhere") for each in server.asked)
    assert chat.metrics()[0].failures == {code: len(server.asked)}
    told = [repr(endpoint(server, provider)), repr(error), *traceback.format_exception(error)]
    told += [record.getMessage() + str(record.exc_info) for record in caplog.records]
    assert error.__cause__ is None
    assert error.__context__ is None
    assert [each for each in told if KEY in each or SECRET in each] == []


@pytest.mark.parametrize("provider", ["openai", "groq", "anthropic", "ollama"])
@pytest.mark.parametrize(
    ("fail", "code"),
    [
        ("break_off", "provider_broke_off"),
        ("end_early", "provider_broke_off"),
        ("later", "provider_failed"),
        ("hang_later", "provider_timeout"),
    ],
)
async def test_half_a_sentence_is_handed_on_once_and_paid_for(
    providers: Any, chat: Chats, waits: Any, provider: str, fail: str, code: str
) -> None:
    ours = waits(chats)
    server = await providers(text="Once upon a time there was", fail=fail, after=3)
    other = await providers()
    choices = [(endpoint(server, provider), "small"), (endpoint(other), "small")]
    answer = chat.stream(choices, ask())
    listening = asyncio.create_task(failing(answer))
    if code == "provider_timeout":
        while answer.tokens.output < 3 and not listening.done():  # until all three words have come
            await asyncio.sleep(0.001)
        await ours.end_all(listening)
        assert ours.granted[-1] == pytest.approx(PATIENT.between, abs=10)
    text, error = await listening
    assert (text, error.code) == ("Once upon a", code)
    assert isinstance(error, ProviderFailed)
    if provider == "anthropic":  # has counted the prompt by then
        assert error.tokens == Tokens(12, 3, estimated=True)
    else:
        assert error.tokens == Tokens(17, 3, estimated=True)
    assert (error.__cause__, error.__context__) == (None, None)
    assert (len(server.asked), other.asked) == (1, [])


async def test_a_provider_that_says_nothing_is_not_waited_for(providers: Any) -> None:
    server = await providers(fail="hang")
    chat = Chats(Patience(first=0.1), REACH)
    _, error = await failing(chat.stream([(endpoint(server), "small")], ask()))
    assert error.code == "provider_timeout"
    await chat.close()


async def test_an_unreachable_provider_gives_way_to_the_next_choice(providers: Any, chat: Chats) -> None:
    server = await providers(text="Here.")
    with socket.socket() as held:  # a port at which nobody listens, and nobody else will
        held.bind(("127.0.0.1", 0))
        dead = Endpoint("openai", KEY, f"http://127.0.0.1:{held.getsockname()[1]}/v1")
        answer = chat.stream([(dead, "large"), (endpoint(server), "small")], ask())
        assert answer.endpoint is None
        assert "".join([delta.text async for delta in answer]) == "Here."
    assert (answer.endpoint, answer.model) == (endpoint(server), "small")


async def test_a_provider_that_recovers_is_asked_again(providers: Any, chat: Chats) -> None:
    server = await providers(text="Here.", fail="overload", times=2, retry_after="0")
    assert "".join([delta.text async for delta in chat.stream([(endpoint(server), "small")], ask())]) == "Here."
    assert len(server.asked) == 3


async def test_a_provider_that_wants_a_long_pause_gives_way_at_once(providers: Any, chat: Chats) -> None:
    busy = await providers(fail="overload", retry_after="3600")
    server = await providers(text="Here.")
    answer = chat.stream([(endpoint(busy), "small"), (endpoint(server), "small")], ask())
    assert "".join([delta.text async for delta in answer]) == "Here."
    assert len(busy.asked) == 1


async def test_nobody_waits_longer_than_our_patience(providers: Any) -> None:
    busy = await providers(fail="error")
    server = await providers(text="Here.")
    chat = Chats(Patience(begin=25.0, pause=60.0, longest_pause=60.0), REACH)  # it pauses for 30 s at least
    answer = chat.stream([(endpoint(busy), "small"), (endpoint(server), "small")], ask())
    assert "".join([delta.text async for delta in answer]) == "Here."
    assert len(busy.asked) == 1
    await chat.close()


async def test_a_provider_that_keeps_failing_is_left_alone(providers: Any, chat: Chats) -> None:
    server = await providers(fail="error")
    choice = [(endpoint(server), "small")]
    for _ in range(5):
        assert (await failing(chat.stream(choice, ask(), "acme")))[1].code == "provider_failed"
    assert len(server.asked) == 15  # a request counts once, however often it is tried
    _, error = await failing(chat.stream(choice, ask(), "acme"))
    assert isinstance(error, Unavailable)
    assert (error.code, error.tokens, len(server.asked)) == ("circuit_open", Tokens(0, 0), 15)  # type: ignore[attr-defined]
    for other, tenant in (
        ((endpoint(server), "small"), "beta"),
        ((endpoint(server), "large"), "acme"),
        ((Endpoint("compatible", "another key", server.url()), "small"), "acme"),
    ):
        assert (await failing(chat.stream([other], ask(), tenant)))[1].code == "provider_failed"


async def test_a_provider_that_nobody_reaches_is_left_alone_by_all(chat: Chats) -> None:
    choice = [(Endpoint("compatible", KEY, "http://127.0.0.1:1/v1"), "small")]
    for number in range(5):
        assert (await failing(chat.stream(choice, ask(), f"tenant {number}")))[1].code == "provider_unreachable"
    assert (await failing(chat.stream(choice, ask(), "acme")))[1].code == "circuit_open"


async def test_what_an_sdk_cannot_make_a_request_of_is_the_asker_s_fault(
    providers: Any, chat: Chats, caplog: pytest.LogCaptureFixture
) -> None:
    server = await providers()
    choice = [(endpoint(server, "ollama"), "small")]
    tool = {"type": "function", "function": {"name": "x", "parameters": {"type": "object", "properties": SECRET}}}
    for _ in range(6):
        answer = chat.stream(choice, ask(tools=[tool]))
        _, error = await failing(answer)
        assert (type(error), error.code, answer.tokens) == (BadInput, "messages_invalid", Tokens(0, 0))
    assert (server.asked, chat.metrics()[0].requests) == ([], 0)
    assert [delta.finish async for delta in chat.stream(choice, ask())][-1] == "stop"
    assert not any(SECRET in record.getMessage() for record in caplog.records)


async def test_more_calls_than_anybody_means_are_garbage(providers: Any, chat: Chats) -> None:
    server = await providers(text="Well.", tools=[("light", {})] * 65)
    for provider in ("openai", "anthropic", "ollama"):
        _, error = await failing(chat.stream([(endpoint(server, provider), "small")], ask(tools=[LIGHT])))
        assert error.code == "provider_garbage"
    server.script.tools.pop()
    for provider in ("openai", "anthropic", "ollama"):
        request = ask(tools=[LIGHT], max_tokens=4096)
        deltas = [delta async for delta in chat.stream([(endpoint(server, provider), "small")], request)]
        assert deltas[-1].finish == "tool_calls"


def sending(server: Any, *deltas: dict[str, Any]) -> None:
    """Let a server that speaks like OpenAI send these and end."""

    async def openai(script: Any, body: Any) -> AsyncIterator[str]:
        for delta in deltas:
            yield server._chunk(delta)
        yield server._chunk({}, "stop")
        yield "data: [DONE]\n\n"

    server.openai = openai


@pytest.mark.parametrize("calls", [[{"index": 64}], [{"index": -1}], [{"index": 0}] * 65, [{"index": 10**30}]])
async def test_calls_that_cannot_be_are_garbage(providers: Any, chat: Chats, calls: list[Any]) -> None:
    server = await providers()
    sending(server, {"tool_calls": calls})
    assert (await failing(chat.stream([(endpoint(server), "small")], ask())))[1].code == "provider_garbage"


async def test_pieces_of_calls_without_anything_in_them_have_an_end(providers: Any, chat: Chats) -> None:
    server = await providers()
    sending(server, *[{"tool_calls": [{"index": 0}] * 64}] * 100)
    deltas = [delta async for delta in chat.stream([(endpoint(server), "small")], ask(max_tokens=10))]
    assert deltas[-1].finish == "length"
    assert len(deltas) < 10


@pytest.mark.parametrize("provider", ["openai", "groq", "anthropic", "ollama"])
async def test_what_utf_8_cannot_hold_is_replaced(providers: Any, chat: Chats, provider: str) -> None:
    half = "half \ud83d"
    server = await providers(text=half, tools=[(half, {"a": half})])
    if provider in ("openai", "groq"):
        call = {"index": 0, "id": half, "function": {"name": half, "arguments": half}}
        sending(server, {"content": half}, {"tool_calls": [call]})
    deltas = [delta async for delta in chat.stream([(endpoint(server, provider), "small")], ask(tools=[LIGHT]))]
    assert "".join(delta.text for delta in deltas) == "half ?"
    [name] = [
        call["function"]["name"] for each in deltas for call in each.tool_calls or () if call["function"].get("name")
    ]
    assert name == "half ?"
    assert json.dumps([each.tool_calls for each in deltas], ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("length", "length"),
        ("tool_calls", "tool_calls"),
        ("content_filter", "content_filter"),
        ('stop"}],"error":{"code":"', "stop"),
        ("eos", "stop"),
    ],
)
async def test_an_answer_ends_in_one_of_four_ways(providers: Any, chat: Chats, said: str, told: str) -> None:
    server = await providers(finish=said)
    deltas = [delta async for delta in chat.stream([(endpoint(server), "small")], ask())]
    assert deltas[-1].finish == told


async def test_wrong_requests_do_not_shut_a_provider_off(providers: Any, chat: Chats) -> None:
    server = await providers()
    server.scripts["none"] = type(server.script)(fail="reject")
    for _ in range(6):
        assert (await failing(chat.stream([(endpoint(server), "none")], ask())))[1].code == "provider_rejected"
    assert [delta.finish async for delta in chat.stream([(endpoint(server), "small")], ask())][-1] == "stop"


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
async def test_a_model_that_takes_no_temperature_is_asked_without(providers: Any, chat: Chats, provider: str) -> None:
    server = await providers(fail="temperature")
    for _ in range(2):
        answer = chat.stream([(endpoint(server, provider), "small")], ask())
        assert [delta.finish async for delta in answer][-1] == "stop"
    assert ["temperature" in each.body for each in server.asked] == [True, False, False]


LIES = [-7, 0, 1_000_000, 10**30, "null", "NaN", "1e999", '"many"', "[1]", "true", 1.5]


@pytest.mark.parametrize(
    ("provider", "lie"),
    [
        *((each, lie) for each in ("openai", "groq", "anthropic") for lie in LIES),
        *(("ollama", lie) for lie in LIES[:5]),
    ],
)
async def test_lies_about_tokens_are_replaced_by_estimates(
    providers: Any, chat: Chats, provider: str, lie: object
) -> None:
    server = await providers(text="I do not know", tokens=(lie, lie))
    async with aclosing(chat.stream([(endpoint(server, provider), "small")], ask())) as answer:
        assert [delta async for delta in answer][-1].tokens == Tokens(17, 4, estimated=True)


@pytest.mark.parametrize("lie", ["NaN", '"many"'])
async def test_what_an_sdk_cannot_read_is_garbage_after_what_was_said(providers: Any, chat: Chats, lie: str) -> None:
    server = await providers(text="I do not know", tokens=(lie, lie))
    text, error = await failing(chat.stream([(endpoint(server, "ollama"), "small")], ask()))
    assert (text, error.code) == ("I do not know", "provider_garbage")
    assert isinstance(error, ProviderFailed)
    assert error.tokens == Tokens(17, 4, estimated=True)


async def test_a_provider_that_does_not_count_is_estimated(providers: Any, chat: Chats) -> None:
    server = await providers(text="I do not know", tokens=None)
    deltas = [delta async for delta in chat.stream([(endpoint(server), "small")], ask())]
    assert deltas[-1].tokens == Tokens(17, 4, estimated=True)


@pytest.mark.parametrize("provider", ["openai", "ollama"])
async def test_a_model_that_talks_on_and_on_is_cut_short(providers: Any, chat: Chats, provider: str) -> None:
    server = await providers(fail="babble", after=1)
    deltas = [delta async for delta in chat.stream([(endpoint(server, provider), "small")], ask(max_tokens=10))]
    assert deltas[-1].finish == "length"
    assert deltas[-1].tokens == Tokens(17, 10, estimated=True)
    assert sum(len(each.text) for each in deltas) < 2_000
    await server.left.wait()


@pytest.mark.parametrize("provider", ["openai", "groq", "anthropic", "ollama"])
async def test_who_leaves_early_closes_the_connection_and_learns_what_it_cost(
    providers: Any, chat: Chats, provider: str
) -> None:
    server = await providers(text="Once upon a time", hold=asyncio.Event(), after=2)
    answer = chat.stream([(endpoint(server, provider), "small")], ask())
    assert (await anext(answer)).text == "Once"
    await answer.aclose()
    await server.left.wait()
    assert answer.tokens == Tokens(12 if provider == "anthropic" else 17, 1, estimated=True)
    assert chat.metrics()[0].output_tokens == 1


@pytest.mark.parametrize("provider", ["openai", "groq", "anthropic", "ollama"])
async def test_who_is_cancelled_closes_the_connection_and_learns_what_it_cost(
    providers: Any, chat: Chats, provider: str
) -> None:
    server = await providers(text="Once upon a time", hold=asyncio.Event(), after=2)
    answer = chat.stream([(endpoint(server, provider), "small")], ask())
    told: list[Any] = []

    async def listen() -> None:
        try:
            async for _ in answer:
                pass
        except asyncio.CancelledError as error:
            told.append(error.tokens)  # type: ignore[attr-defined]
            raise

    task = asyncio.create_task(listen())
    await server.said.wait()
    while answer.tokens.output < 3:  # both words have come
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    await server.left.wait()
    assert told == [answer.tokens] == [Tokens(12 if provider == "anthropic" else 17, 3, estimated=True)]


async def test_before_the_first_word_a_prompt_that_is_being_read_costs_something(providers: Any, chat: Chats) -> None:
    server = await providers(fail="hang")
    answer = chat.stream([(endpoint(server), "small")], ask())
    task = asyncio.create_task(anext(answer))  # type: ignore[arg-type]
    while not server.asked:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    await server.left.wait()
    assert answer.tokens == Tokens(17, 0, estimated=True)


async def test_connections_are_used_again(providers: Any, chat: Chats, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "DRAINING", 60.0)
    server = await providers()
    for provider in ("openai", "groq", "anthropic", "ollama"):
        for _ in range(3):
            answer = chat.stream([(endpoint(server, provider), "small")], ask())
            assert [delta.finish async for delta in answer][-1] == "stop"
    assert [each.connection for each in server.asked] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]


async def test_clients_that_nobody_uses_are_closed_when_there_are_many(
    providers: Any, chat: Chats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chats, "CLIENTS_KEPT", 1)
    hold = asyncio.Event()
    busy = await providers(text="one two", hold=hold, after=1)
    async with aclosing(chat.stream([(endpoint(busy), "small")], ask())) as answer:
        await anext(answer)
        servers = [await providers() for _ in range(3)]
        for server in servers:
            async for _ in chat.stream([(endpoint(server), "small")], ask()):
                pass
        while servers[0].open:
            await asyncio.sleep(0)
        hold.set()
        assert [delta.text async for delta in answer] == [" two", ""]


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_what_the_environment_says_is_not_for_tenants_servers(
    providers: Any, chat: Chats, monkeypatch: pytest.MonkeyPatch, provider: str
) -> None:
    for name in ("OPENAI", "ANTHROPIC", "GROQ", "OLLAMA"):
        monkeypatch.setenv(f"{name}_API_KEY", "the operator's")
        monkeypatch.setenv(f"{name}_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("ANTHROPIC_AUTH_TOKEN", "the operator's")
    monkeypatch.setenv("OPENAI_ORG_ID", "the operator's")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "the operator's")
    server = await providers()
    async for _ in chat.stream([(Endpoint(provider, "", server.url(provider)), "small")], ask()):
        pass
    [asked] = server.asked
    assert not {"authorization", "x-api-key"} & asked.headers.keys()
    assert "the operator's" not in asked.headers.values()


async def test_what_cannot_be_translated_is_not_sent_and_costs_nothing(providers: Any, chat: Chats) -> None:
    server = await providers()
    call = {"id": "c1", "type": "function", "function": {"name": "light", "arguments": "{"}}
    request = Request([{"role": "user", "content": "Light."}, {"role": "assistant", "tool_calls": [call]}])
    answer = chat.stream([(endpoint(server, "anthropic"), "small")], request)
    assert (await failing(answer))[1].code == "messages_invalid"
    assert (server.asked, answer.tokens) == ([], Tokens(0, 0))


async def test_without_choices_there_is_no_provider(chat: Chats) -> None:
    assert (await failing(chat.stream([], ask())))[1].code == "no_provider"


async def test_a_prompt_that_is_too_long_is_not_sent(providers: Any, chat: Chats) -> None:
    server = await providers()
    for request in (Request([{"role": "user", "content": "a" * 199_990}] * 2), ask(tools=[_tool("b" * 200_000)])):
        with pytest.raises(BadInput, match="200000") as caught:
            chat.stream([(endpoint(server), "small")], request)
        assert caught.value.code == "prompt_too_long"
    assert server.asked == []
    long = Request([{"role": "user", "content": "é" * 199_900}])
    assert [delta.finish async for delta in chat.stream([(endpoint(server), "small")], long)][-1] == "stop"


def _tool(description: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "x", "description": description}}


async def test_after_the_end_nothing_is_wrong(providers: Any, chat: Chats) -> None:
    server = await providers()
    answer = chat.stream([(endpoint(server), "small")], ask())
    assert len([delta async for delta in answer]) == 8
    assert [delta async for delta in answer] == []
    await answer.aclose()


# A tenant's own URL


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "10.1.2.3", "169.254.169.254", "[::ffff:7f00:1]"])
@pytest.mark.parametrize("provider", ["openai", "groq", "anthropic", "ollama"])
async def test_a_tenant_s_url_reaches_no_address_that_is_not_public(
    providers: Any, chat: Chats, provider: str, host: str
) -> None:
    server = await providers()
    there = Endpoint(provider, KEY, f"https://{host}:{server.port}/v1", trusted=False)
    _, error = await failing(chat.stream([(there, "small")], ask()))
    assert (error.code, server.connections) == ("provider_forbidden_address", 0)


@pytest.mark.parametrize("provider", ["openai", "groq", "anthropic", "ollama"])
async def test_a_tenant_s_url_is_connected_to_the_address_that_was_looked_at(
    providers: Any, tmp_path: Path, provider: str
) -> None:
    names: list[str | None] = []
    believed, tls = _certificate(tmp_path, "models.example")
    tls.sni_callback = lambda _, name, __: names.append(name)
    server = await providers(tls=tls)
    asked: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.1", "127.0.0.2"]

    chat = Chats(PATIENT, Reach(resolve, lambda address: address == "127.0.0.1", REACH.connect, believed))
    url = f"https://models.example:{server.port}" + ("/v1" if provider == "openai" else "")
    there = Endpoint(provider, KEY, url, trusted=False)
    assert [delta.finish async for delta in chat.stream([(there, "small")], ask())][-1] == "stop"
    assert server.asked[0].headers["host"] == f"models.example:{server.port}"
    # The name has got another address since: what was good once is looked at again.
    _, error = await failing(chat.stream([(there, "small")], ask()))
    assert (error.code, len(server.asked)) == ("provider_forbidden_address", 1)
    assert (names, asked) == (["models.example"], ["models.example"] * 2)
    await chat.close()


async def test_a_tenant_s_server_must_have_the_certificate_of_its_name(providers: Any, tmp_path: Path) -> None:
    believed, tls = _certificate(tmp_path, "other.example")
    server = await providers(tls=tls)

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    chat = Chats(PATIENT, Reach(resolve, lambda _: True, REACH.connect, believed))
    there = Endpoint("openai", KEY, f"https://models.example:{server.port}/v1", trusted=False)
    _, error = await failing(chat.stream([(there, "small")], ask()))
    assert (error.code, server.asked) == ("provider_unreachable", [])
    await chat.close()


async def test_a_tenant_s_name_that_nobody_knows_is_unreachable(providers: Any) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        raise OSError

    chat = Chats(PATIENT, Reach(resolve))
    there = Endpoint("compatible", KEY, "https://models.example/v1", trusted=False)
    assert (await failing(chat.stream([(there, "small")], ask())))[1].code == "provider_unreachable"
    await chat.close()


def _certificate(folder: Path, host: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A context that believes a new certificate of `host`, and one that has it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = made.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "host.pem").write_bytes(pem + private)
    has = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    has.load_cert_chain(folder / "host.pem")
    return ssl.create_default_context(cadata=pem.decode()), has


FIRST = """
import asyncio, sys
from contextlib import aclosing
from agentvoicebox.plugins.chat import Chats, Endpoint, Request

async def ask():
    provider, url = sys.argv[1:]
    chats = Chats()
    await chats.load([provider])
    before = set(sys.modules)
    answer = chats.stream([(Endpoint(provider, "a-key", url), "small")], Request([{"role": "user", "content": "hi"}]))
    async with aclosing(answer):
        print("".join([delta.text async for delta in answer]))
    print(sorted(name for name in set(sys.modules) - before if name.startswith(("agentvoicebox", provider))))

asyncio.run(ask())
"""


@pytest.mark.parametrize("provider", ["openai", "groq", "anthropic", "ollama"])
async def test_what_was_loaded_is_not_loaded_by_the_first_question(providers: Any, provider: str) -> None:
    """Nobody else in the node waits for the imports of an SDK."""
    server = await providers(text="Hello there.")
    command = [sys.executable, "-c", FIRST, provider, server.url(provider)]
    asking = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    said, _ = await asking.communicate()
    assert said.decode().splitlines() == ["Hello there.", "[]"]
