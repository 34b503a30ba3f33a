"""The persona's stage and its talk with a node, which here is a small server that does as a test tells it."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ovos_bus_client.message import Message
from ovos_utils.fakebus import FakeBus

from agentvoicebox.plugins import node, persona
from agentvoicebox.plugins.persona import Persona

KEYS = {"tenant_id": "t-1", "avb_session": "avb:one", "avb_turn": "resp_1"}
EVENT = b'HTTP/1.1 200 OK\r\n\r\ndata: {"choices": [{"delta": {"content": '
HANDLED, SPEAK = "ovos.utterance.handled", "speak"


class Request:
    """One question that has come to the node, and how it is answered."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.head: dict[str, str] = {}
        self.body: dict[str, Any] = {}
        self.path = ""

    async def read(self) -> None:
        first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        self.path = first.split()[1]
        self.head = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        self.body = json.loads(await self.reader.readexactly(int(self.head["content-length"])))

    def begin(self, status: str = "200 OK", kind: str = "text/event-stream") -> None:
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n"
        self.writer.write(head.encode())

    def chunk(self, data: bytes) -> None:
        self.writer.write(b"%x\r\n%s\r\n" % (len(data), data))

    def event(self, **event: Any) -> None:
        self.chunk(b"data: " + json.dumps(event).encode() + b"\n\n")

    def say(self, text: str | None) -> None:
        self.event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": None}])

    def end(self) -> None:
        self.chunk(b"data: [DONE]\n\n")
        self.writer.write(b"0\r\n\r\n")

    def refuse(self, status: str, code: str) -> None:
        self.begin(status, "application/json")
        self.chunk(json.dumps({"error": {"code": code, "message": "secret details"}}).encode())
        self.writer.write(b"0\r\n\r\n")

    async def hung_up(self) -> None:
        """Wait until the other side has left."""
        async with asyncio.timeout(30):
            assert await self.reader.read() == b""


Script = Callable[[Request], Awaitable[None]]


class Desk:
    """The node: a script answers, in as many requests at once as there are."""

    def __init__(self) -> None:
        self.requests: asyncio.Queue[Request] = asyncio.Queue()
        self.script: Script = self.hang
        self.url = ""
        self._closing = asyncio.Event()

    async def hang(self, request: Request) -> None:
        await self._closing.wait()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = Request(reader, writer)
        try:
            await request.read()
            self.requests.put_nowait(request)
            await self.script(request)
        finally:
            writer.close()

    async def next(self) -> Request:
        return await asyncio.wait_for(self.requests.get(), 30)

    def close(self) -> None:
        self._closing.set()


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    desk = Desk()
    server = await asyncio.start_server(desk.serve, "127.0.0.1", 0)
    desk.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    yield desk
    desk.close()
    server.close()
    await server.wait_closed()


class Bus(FakeBus):  # type: ignore[misc]
    """What is said on the bus, in order, as the test's loop sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.said: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self.on("message", lambda text: loop.call_soon_threadsafe(self.said.put_nowait, json.loads(text)))

    async def next(self) -> dict[str, Any]:
        return await asyncio.wait_for(self.said.get(), 30)

    async def turn(self, key: str = "resp_1") -> list[dict[str, Any]]:
        """All that is said of a turn, to its end; what is said of others is lost."""
        messages: list[dict[str, Any]] = []
        while not messages or messages[-1]["type"] != HANDLED:
            message = await self.next()
            if message["context"].get("avb_turn") == key and message["type"] != "avb.persona.ask":
                messages.append(message)
        return messages


@pytest.fixture
async def bus() -> Bus:
    return Bus()


def _configure(patch: pytest.MonkeyPatch, directory: Path, url: str) -> None:
    """The node is at `url`. A machine that stalls makes nobody give it up or give signs of life: tests do that."""
    patch.setattr(node, "CONNECT", 30.0)
    patch.setattr(persona, "SIGN", 60.0)
    key = directory / "node.key"
    key.write_text("cell-key\n")
    section = {"agentvoicebox": {"place": "cell", "url": url, "key_file": str(key)}}
    patch.setattr(persona, "Configuration", lambda: section)


@pytest.fixture
def plugin(bus: Bus, desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Persona]:
    _configure(monkeypatch, tmp_path, desk.url)
    plugin = Persona(bus)
    yield plugin
    plugin.shutdown()


def _ask(bus: Bus, utterance: str = "why is the sky blue", language: str = "en-us", **keys: str) -> None:
    context = {**KEYS, "session": {"session_id": "avb:one"}, "further": "kept", **keys}
    bus.emit(Message("avb.persona.ask", {"utterance": utterance, "lang": language}, context))


def _cancel(bus: Bus, turn: str = "resp_1", session: str = "avb:one", tenant: str = "t-1") -> None:
    bus.emit(Message("avb.persona.cancel", {"turn": turn}, {"avb_session": session, "tenant_id": tenant}))


def _spoken(messages: list[dict[str, Any]]) -> list[str]:
    return [message["data"]["utterance"] for message in messages if message["type"] == SPEAK]


# --- matching ---------------------------------------------------------------------------------------------------------


async def test_every_utterance_of_a_turn_is_matched(plugin: Persona) -> None:
    found = plugin.match(["what is that", "what's that"], "en-us", Message("", {}, dict(KEYS)))
    assert found is not None
    assert (found.match_type, found.skill_id, found.utterance) == ("avb.persona.ask", persona.SKILL, "what is that")


@pytest.mark.parametrize("missing", list(KEYS))
async def test_what_belongs_to_nobody_is_not_matched(plugin: Persona, missing: str) -> None:
    for context in ({**KEYS, missing: ""}, {**KEYS, missing: 5}, {k: v for k, v in KEYS.items() if k != missing}):
        assert plugin.match(["hello"], "en-us", Message("", {}, context)) is None


async def test_nothing_said_is_not_matched(plugin: Persona) -> None:
    assert plugin.match([], "en-us", Message("", {}, dict(KEYS))) is None
    assert plugin.match([""], "en-us", Message("", {}, dict(KEYS))) is None


@pytest.mark.parametrize(
    "section", [None, {}, {"place": "cell", "url": "http://127.0.0.1:9/v1"}, {"place": "cell", "key_file": "/nowhere"}]
)
async def test_without_a_node_there_is_no_persona(bus: Bus, monkeypatch: pytest.MonkeyPatch, section: Any) -> None:
    monkeypatch.setattr(persona, "Configuration", lambda: {"agentvoicebox": section} if section else {})
    plugin = Persona(bus)
    assert plugin.match(["hello"], "en-us", Message("", {}, dict(KEYS))) is None
    plugin.shutdown()


async def test_without_its_key_there_is_no_persona(bus: Bus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    section = {"place": "cell", "url": "http://127.0.0.1:9/v1", "key_file": str(tmp_path / "absent")}
    monkeypatch.setattr(persona, "Configuration", lambda: {"agentvoicebox": section})
    plugin = Persona(bus)
    assert plugin.match(["hello"], "en-us", Message("", {}, dict(KEYS))) is None
    plugin.shutdown()


# --- answering --------------------------------------------------------------------------------------------------------


async def test_the_story_of_an_answer(bus: Bus, desk: Desk, plugin: Persona) -> None:
    heard = asyncio.Event()

    async def answer(request: Request) -> None:
        request.begin()
        request.chunk(b": still here\n\n")
        request.event(choices=[{"index": 0, "delta": {"role": "assistant", "content": None}}])
        for text in ("Blue light ", "is scattered most. It ", "comes from every"):
            request.say(text)
        await heard.wait()  # the first sentence is said while the rest of the answer is still to come
        request.say(" side.")
        request.event(choices=[], usage={"total_tokens": 12})
        request.end()

    desk.script = answer
    _ask(bus)
    request = await desk.next()
    assert (request.path, request.head["authorization"]) == ("/v1/chat/completions", "Bearer cell-key")
    assert request.head["x-avb-turn"] == "resp_1"
    assert request.body == {
        "model": "persona",
        "stream": True,
        "messages": [{"role": "user", "content": "why is the sky blue"}],
        "language": "en-us",
    }
    messages = []
    while (message := await bus.next())["type"] != SPEAK:
        messages.append(message["type"])
    assert messages == ["avb.persona.ask", "mycroft.skill.handler.start"]
    assert message["data"]["utterance"] == "Blue light is scattered most."
    assert (message["data"]["lang"], message["data"]["meta"]) == ("en-us", {"skill": persona.SKILL})
    heard.set()
    rest = await bus.turn()
    assert _spoken(rest) == ["It comes from every side."]
    assert [m["type"] for m in rest] == [SPEAK, HANDLED]
    for message in rest:
        assert {name: message["context"][name] for name in KEYS} == KEYS
        assert message["context"]["session"]["session_id"] == "avb:one"
        assert message["context"]["further"] == "kept"


async def test_what_comes_in_pieces_is_put_together(bus: Bus, desk: Desk, plugin: Persona) -> None:
    async def answer(request: Request) -> None:
        request.begin()
        data = b'data: {"choices": [{"delta": {"content": "\xc3\x84rger. "}}]}\r\n\r\ndata:[DONE]\r\n\r\n'
        for i in range(len(data)):
            request.chunk(data[i : i + 1])
            await request.writer.drain()
            await asyncio.sleep(0)

    desk.script = answer
    _ask(bus, language="de-de")
    assert _spoken(await bus.turn()) == ["Ärger."]


async def test_a_hundred_answers_are_waited_for_at_once_and_each_finds_its_way(bus: Bus, desk: Desk, plugin: Persona):
    waiting = asyncio.Event()

    async def answer(request: Request) -> None:
        if request.body["messages"][0]["content"] == "99":
            waiting.set()
        await waiting.wait()
        request.begin()
        request.say(f"For {request.head['x-avb-turn']}.")
        request.end()

    desk.script = answer
    for number in range(100):
        _ask(bus, str(number), avb_turn=f"resp_{number}", avb_session=f"avb:{number}", tenant_id=f"t-{number % 7}")
    said, ended = {}, set()
    while len(ended) < 100:
        message = await bus.next()
        turn = message["context"]["avb_turn"]
        if message["type"] == SPEAK:
            said[turn] = message["data"]["utterance"]
            assert message["context"]["avb_session"] == f"avb:{turn.removeprefix('resp_')}"
        elif message["type"] == HANDLED:
            assert turn not in ended
            ended.add(turn)
    assert said == {f"resp_{number}": f"For resp_{number}." for number in range(100)}


async def test_a_slow_answer_gives_signs_of_life(
    bus: Bus, desk: Desk, plugin: Persona, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(persona, "SIGN", 0.02)
    signs = asyncio.Event()

    async def answer(request: Request) -> None:
        await signs.wait()
        request.begin()
        request.say("At last.")
        request.end()

    desk.script = answer
    _ask(bus)
    for _ in range(3):
        while (await bus.next())["type"] != "avb.persona.waiting":
            pass
    signs.set()
    assert _spoken(await bus.turn()) == ["At last."]
    desk.script = desk.hang
    _ask(bus, avb_turn="resp_2")
    signs_of = [(await bus.next())["context"]["avb_turn"] for _ in range(6)]
    assert set(signs_of) == {"resp_2"}, "the first turn gives no more signs once it has ended"


async def test_the_same_turn_is_answered_once(bus: Bus, desk: Desk, plugin: Persona) -> None:
    _ask(bus)
    await desk.next()
    _ask(bus)
    _cancel(bus)
    assert [m["type"] for m in await bus.turn()].count(HANDLED) == 1
    assert desk.requests.empty()


# --- cancelling -------------------------------------------------------------------------------------------------------


async def test_a_cancelled_answer_is_ended_there_and_here(bus: Bus, desk: Desk, plugin: Persona) -> None:
    async def answer(request: Request) -> None:
        request.begin()
        request.say("One. Two. ")
        await request.hung_up()

    desk.script = answer
    _ask(bus)
    while (message := await bus.next())["type"] != SPEAK:
        pass
    assert message["data"]["utterance"].startswith("One.")
    _cancel(bus)
    rest = [m["type"] for m in await bus.turn()]
    assert rest[-1] == HANDLED
    assert set(rest) <= {SPEAK, HANDLED}
    request = await desk.next()
    await request.hung_up()


async def test_an_answer_that_has_not_begun_can_be_cancelled(bus: Bus, desk: Desk, plugin: Persona) -> None:
    """Both words come to the plugin before its loop does anything."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    plugin._loop.call_soon_threadsafe(lambda: asyncio.run_coroutine_threadsafe(stopped.wait(), loop).result())
    _ask(bus)
    _cancel(bus)
    stopped.set()
    messages = await bus.turn()
    assert [m["type"] for m in messages] == [HANDLED]
    assert desk.requests.empty()


@pytest.mark.parametrize(
    "wrong", [{"turn": "resp_2"}, {"session": "avb:other"}, {"tenant": "t-2"}, {"turn": ""}, {"session": ""}]
)
async def test_nobody_cancels_anothers_turn(bus: Bus, desk: Desk, plugin: Persona, wrong: dict[str, str]) -> None:
    go = asyncio.Event()

    async def answer(request: Request) -> None:
        await go.wait()
        request.begin()
        request.say("Still here.")
        request.end()

    desk.script = answer
    _ask(bus)
    await desk.next()
    _cancel(bus, **wrong)
    bus.emit(Message("avb.persona.cancel", {"turn": ["resp_1"]}, dict(KEYS)))
    bus.emit(Message("avb.persona.cancel"))
    go.set()
    assert _spoken(await bus.turn()) == ["Still here."]


async def test_stop_ends_the_answers_of_the_session_that_says_it(bus: Bus, desk: Desk, plugin: Persona) -> None:
    """Core tells everybody (hazard H12); only the session that wants quiet gets it."""
    go = asyncio.Event()

    async def answer(request: Request) -> None:
        await go.wait()
        request.begin()
        request.say("Still here.")
        request.end()

    desk.script = answer
    _ask(bus)
    _ask(bus, avb_turn="resp_2", avb_session="avb:two")
    _ask(bus, avb_turn="resp_3", tenant_id="t-2")  # the same name in another tenant's mouth
    for _ in range(3):
        await desk.next()
    bus.emit(Message("mycroft.stop"))
    bus.emit(Message("mycroft.stop", {}, {**KEYS, "avb_turn": "resp_9"}))
    assert _spoken(await bus.turn("resp_1")) == []
    go.set()
    left = {"resp_2", "resp_3"}
    said = []
    while left:
        message = await bus.next()
        said += [message["context"]["avb_turn"]] if message["type"] == SPEAK else []
        if message["type"] == HANDLED:
            left.discard(message["context"]["avb_turn"])
    assert sorted(said) == ["resp_2", "resp_3"]


async def test_shutting_down_ends_what_is_open(bus: Bus, desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _configure(monkeypatch, tmp_path, desk.url)
    plugin = Persona(bus)
    _ask(bus)
    await desk.next()
    await asyncio.to_thread(plugin.shutdown)
    assert (await bus.turn())[-1]["type"] == HANDLED
    _ask(bus, avb_turn="resp_2")
    assert (await bus.next())["type"] == "avb.persona.ask"
    assert bus.said.empty()


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "begins"),
    [
        ("no_language_model", "No language model"),
        ("provider_unreachable", "I cannot reach my language model"),
        ("provider_overloaded", "I cannot reach my language model"),
        ("circuit_open", "I cannot reach my language model"),
        ("prompt_too_long", "That is more than"),
        ("tenant_limit_exceeded", "The limit"),
        ("rate_limit_exceeded", "The limit"),
        ("store_unavailable", "I cannot reach my service"),
        ("no_answer", "I have no answer"),
        ("something_new", "Something went wrong"),
        ("Not a code: secret", "Something went wrong"),
    ],
)
@pytest.mark.parametrize("late", [False, True])
async def test_an_error_is_one_polite_sentence(
    bus: Bus, desk: Desk, plugin: Persona, code: str, begins: str, late: bool, caplog: pytest.LogCaptureFixture
):
    async def answer(request: Request) -> None:
        if late:
            request.begin()
            request.event(error={"code": code, "message": "secret details"})
            request.end()
        else:
            request.refuse("503 Service Unavailable", code)

    desk.script = answer
    with caplog.at_level(logging.DEBUG):
        _ask(bus)
        messages = await bus.turn()
    (said,) = _spoken(messages)
    assert said.startswith(begins)
    assert "secret" not in said + caplog.text
    (meta,) = [message["data"]["meta"] for message in messages if message["type"] == SPEAK]
    assert meta == {"skill": persona.SKILL, "avb": "apology"}, "the bridge does not take it for an answer"


@pytest.mark.parametrize(
    ("language", "begins"),
    [("en-GB", "No language"), ("de-DE", "Hier ist"), ("fr-fr", "Aucun"), ("es", "Aquí"), ("da-dk", "No language")],
)
async def test_in_the_language_of_the_session(bus: Bus, desk: Desk, plugin: Persona, language: str, begins: str):
    async def answer(request: Request) -> None:
        request.refuse("503 Service Unavailable", "no_language_model")

    desk.script = answer
    _ask(bus, language=language)
    (said,) = _spoken(await bus.turn())
    assert said.startswith(begins)


def test_every_language_has_every_sentence() -> None:
    told = persona._told()
    assert set(told) == {"en", "de", "fr", "es"}
    assert all(set(sentences) == set(told["en"]) for sentences in told.values())
    assert set(persona._SENTENCES.values()) < set(told["en"])


async def test_an_answer_that_breaks_off_is_said_as_far_as_it_came(bus: Bus, desk: Desk, plugin: Persona) -> None:
    async def answer(request: Request) -> None:
        request.begin()
        request.say("The first sentence. And the beginning of")
        await request.writer.drain()

    desk.script = answer
    _ask(bus)
    said = _spoken(await bus.turn())
    assert " ".join(said[:-1]) == "The first sentence. And the beginning of"
    assert said[-1] == "Sorry, I lost the rest of my answer."


async def test_an_answer_without_its_end_is_half_of_one(bus: Bus, desk: Desk, plugin: Persona) -> None:
    async def answer(request: Request) -> None:
        request.writer.write(EVENT + b'"One sentence."}}]}\n\n')

    desk.script = answer
    _ask(bus)
    assert _spoken(await bus.turn()) == ["One sentence.", "Sorry, I lost the rest of my answer."]


async def test_an_error_in_the_middle_is_a_break(bus: Bus, desk: Desk, plugin: Persona) -> None:
    async def answer(request: Request) -> None:
        request.begin()
        request.say("One sentence. ")
        request.event(error={"code": "provider_broke_off", "message": "secret details"})

    desk.script = answer
    _ask(bus)
    assert _spoken(await bus.turn()) == ["One sentence.", "Sorry, I lost the rest of my answer."]


async def test_an_answer_without_words_is_said_to_be_none(bus: Bus, desk: Desk, plugin: Persona) -> None:
    async def answer(request: Request) -> None:
        request.begin()
        request.say("  \n ")
        request.end()

    desk.script = answer
    _ask(bus)
    assert _spoken(await bus.turn()) == ["I have no answer to that."]


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"x" * 100_000,
        b"HTTP/1.1 200 OK\r\n\r\ndata: not JSON\n\n",
        b"HTTP/1.1 200 OK\r\n\r\ndata: []\n\n",
        b'HTTP/1.1 200 OK\r\n\r\ndata: {"choices": 5}\n\n',
        b'HTTP/1.1 200 OK\r\n\r\ndata: {"choices": [{"delta": null}]}\n\n',
        b'HTTP/1.1 200 OK\r\n\r\ndata: {"error": "text"}\n\n',
        EVENT + b"5}}]}\n\ndata: [DONE]\n\n",
        EVENT + b'""}}]}\n\n',
        EVENT + b'"\xff"}}]}\n\ndata: [DONE]\n\n',
        EVENT + b'"' + b"x" * (node.MOST + 1),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffff\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 100_000,
        b"HTTP/1.1 500 No\r\n\r\n<html>secret</html>",
        b"HTTP/1.1 500 No\r\n\r\n[1]",
        b"HTTP/1.1 500 No\r\n\r\n" + b"x" * (node.MOST + 100_000),
    ],
)
async def test_garbage_is_one_polite_sentence(bus: Bus, desk: Desk, plugin: Persona, sent: bytes) -> None:
    async def answer(request: Request) -> None:
        request.writer.write(sent)

    desk.script = answer
    _ask(bus)
    (said,) = _spoken(await bus.turn())
    assert said in persona._told()["en"].values()
    desk.script = _good
    _ask(bus, avb_turn="resp_2")
    assert _spoken(await bus.turn("resp_2")) == ["All is well."], "and the next one works"


async def _good(request: Request) -> None:
    request.begin()
    request.say("All is well.")
    request.end()


async def test_too_many_requests_without_a_word_are_a_limit(bus: Bus, desk: Desk, plugin: Persona) -> None:
    async def answer(request: Request) -> None:
        request.writer.write(b"HTTP/1.1 429 Too Many Requests\r\n\r\n")

    desk.script = answer
    _ask(bus)
    (said,) = _spoken(await bus.turn())
    assert said.startswith("The limit")


@pytest.mark.parametrize("what", ["SILENCE", "LIMIT"])
async def test_a_node_that_hangs_is_not_waited_for_for_ever(
    bus: Bus, desk: Desk, plugin: Persona, monkeypatch: pytest.MonkeyPatch, what: str
):
    monkeypatch.setattr(node if what == "SILENCE" else persona, what, 0.1)
    turns = 0
    while desk.requests.empty():  # on a machine that stalls all of the time may be over before the node is asked
        assert turns < 10
        turns += 1
        _ask(bus, avb_turn=f"resp_{turns}")
        (said,) = _spoken(await bus.turn(f"resp_{turns}"))
        assert said.startswith("I cannot reach my language model")
    await (await desk.next()).hung_up()


async def test_a_node_that_is_away(bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        _configure(monkeypatch, tmp_path, f"http://127.0.0.1:{taken.getsockname()[1]}/v1")
    plugin = Persona(bus)
    _ask(bus)
    (said,) = _spoken(await bus.turn())
    plugin.shutdown()
    assert said.startswith("I cannot reach my service")


async def test_a_node_that_takes_no_calls(bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: Any, **__: Any) -> Any:
        await asyncio.sleep(60)

    _configure(monkeypatch, tmp_path, "http://127.0.0.1:9/v1")
    monkeypatch.setattr(node, "CONNECT", 0.05)
    plugin = Persona(bus)
    monkeypatch.setattr(node.asyncio, "open_connection", never)
    _ask(bus)
    (said,) = _spoken(await bus.turn())
    plugin.shutdown()
    assert said.startswith("I cannot reach my service")


@pytest.mark.parametrize("turn", ["a\r\nX-Evil: 1", "ü", "a\n"])
async def test_a_turn_that_no_header_can_hold_goes_nowhere(bus: Bus, desk: Desk, plugin: Persona, turn: str) -> None:
    _ask(bus, avb_turn=turn)
    (said,) = _spoken(await bus.turn(turn))
    assert said.startswith("Something went wrong")
    assert desk.requests.empty()


async def test_what_the_plugin_itself_gets_wrong_is_said_politely_too(
    bus: Bus, desk: Desk, plugin: Persona, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(*_: Any) -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr(node, "_text", fail)
    desk.script = _good
    _ask(bus)
    (said,) = _spoken(await bus.turn())
    assert said.startswith("Something went wrong")
    assert "secret" not in caplog.text


async def test_no_proxy_of_the_environment_is_asked(
    bus: Bus, desk: Desk, plugin: Persona, monkeypatch: pytest.MonkeyPatch
):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    desk.script = _good
    _ask(bus)
    assert _spoken(await bus.turn()) == ["All is well."]


def test_the_key_shows_nowhere() -> None:
    assert "secret" not in repr(node.Node("http://127.0.0.1:9/v1", "secret"))
