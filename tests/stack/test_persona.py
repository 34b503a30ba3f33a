"""The persona in a real stock core: whose answer it is, that it keeps nobody waiting, and what becomes of a bad node.

The node is a small server here that answers as each test tells it; the real one is met in `tests/isolation`.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Any

import pytest

from agentvoicebox.bus_bridge import bus as bridge
from agentvoicebox.bus_bridge import events as ev
from agentvoicebox.bus_bridge.cells import Cell
from agentvoicebox.config import ovos

CLOCK = "ovos-skill-date-time.openvoiceos"
UNKNOWN = "ovos-skill-fallback-unknown.openvoiceos"
PERSONA = "avb.persona"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"

Reply = Callable[["Asked"], Awaitable[None]]


class Asked:
    """A question of the persona's at the node."""

    def __init__(self, turn: str, text: str, writer: asyncio.StreamWriter) -> None:
        self.turn = turn
        self.text = text
        self.writer = writer
        self.over = asyncio.Event()
        """The persona has hung up, or we have."""

    async def say(self, *texts: str) -> None:
        for text in texts:
            event = {"choices": [{"index": 0, "delta": {"content": text}}]}
            self.writer.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await self.writer.drain()

    async def end(self) -> None:
        self.writer.write(b"data: [DONE]\n\n")

    async def hung_up(self) -> None:
        await asyncio.wait_for(self.over.wait(), 60)


class Desk:
    """The node. `reply` answers each question; by default nobody does."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[Asked] = asyncio.Queue()
        self.open: dict[str, Asked] = {}
        self.reply: Reply = self.hang
        self.url = ""

    async def hang(self, asked: Asked) -> None:
        await asked.over.wait()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        fields = dict(line.split(": ", 1) for line in head.strip().split("\r\n")[1:])
        body = json.loads(await reader.readexactly(int(fields["content-length"])))
        asked = Asked(fields["x-avb-turn"], body["messages"][-1]["content"], writer)
        self.open[asked.turn] = asked
        writer.write(HEAD)
        self.asked.put_nowait(asked)
        replying = asyncio.create_task(self.reply(asked))
        replying.add_done_callback(lambda _: writer.close())
        with suppress(ConnectionError):
            await reader.read()
        del self.open[asked.turn]
        asked.over.set()
        await asyncio.gather(replying, return_exceptions=True)

    async def next(self) -> Asked:
        return await asyncio.wait_for(self.asked.get(), 60)

    def reset(self) -> None:
        self.reply = self.hang
        self.asked = asyncio.Queue()
        for asked in self.open.values():
            asked.writer.transport.abort()


@pytest.fixture(scope="module")
async def front() -> AsyncIterator[Desk]:
    desk = Desk()
    server = await asyncio.start_server(desk.serve, ovos.HOST, 0)
    desk.url = f"http://{ovos.HOST}:{server.sockets[0].getsockname()[1]}/v1"
    yield desk
    desk.reset()
    server.close()
    await server.wait_closed()


@pytest.fixture(scope="module")
async def spoken_cell(front: Desk, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cell]:
    """A cell with a persona."""
    cell = Cell("persona", tmp_path_factory.mktemp("persona"), ["en-us", "de-de"], ovos.Node(front.url, "cell-key"))
    await cell.start()
    yield cell
    await cell.stop()


@pytest.fixture
async def desk(front: Desk) -> AsyncIterator[Desk]:
    yield front
    front.reset()


@pytest.fixture
async def bus(spoken_cell: Cell, desk: Desk, connect: Callable[[str], AbstractAsyncContextManager[Any]]) -> Any:
    async with connect(spoken_cell.url) as bus:
        yield bus


@pytest.fixture
async def line(spoken_cell: Cell, desk: Desk) -> AsyncIterator[bridge.Bus]:
    """The bridge's own connection."""
    line = bridge.Bus()
    await line.connect(spoken_cell.url)
    yield line
    await line.close()


class Caller:
    """A session of the bridge and what it is told."""

    def __init__(self, bus: bridge.Bus, name: str, tenant: str) -> None:
        self.line = bridge.Line(name, tenant, context={"tenant_name": tenant, "persona_name": "P"})
        self.told: asyncio.Queue[ev.Event] = asyncio.Queue()
        self.line.tell = self.told.put_nowait
        bus.open(self.line)

    async def until(self, kind: type[ev.Event]) -> list[ev.Event]:
        heard: list[ev.Event] = []
        async with asyncio.timeout(60):
            while not heard or not isinstance(heard[-1], kind):
                heard.append(await self.told.get())
        return heard


def _said(events: list[ev.Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, ev.Spoke)]


async def _answer(asked: Asked) -> None:
    await asked.say("It is so. ", "Nobody knows why.")
    await asked.end()


async def test_the_story_of_a_turn_that_the_persona_answers(bus: Any, desk: Desk) -> None:
    desk.reply = _answer
    turn = await bus.say("colorless green ideas")
    assert turn.types == [
        "recognizer_loop:utterance",
        f"{PERSONA}.activate",
        "avb.persona.ask",
        "mycroft.skill.handler.start",
        "speak",
        "speak",
        "ovos.utterance.handled",
    ]
    assert turn.skill == PERSONA
    assert [answer["data"]["utterance"] for answer in turn.answers] == ["It is so.", "Nobody knows why."]
    keys = ("tenant_id", "tenant_name", "persona_name", "avb_session", "avb_turn")
    for message in turn.messages:
        assert [message["context"].get(key) for key in keys] == [turn.messages[0]["context"][key] for key in keys]
        session = message["context"]["session"]["session_id"]
        assert session == turn.messages[0]["context"]["avb_session"]
    assert (await desk.next()).text == "colorless green ideas"


async def test_skills_come_first(bus: Any, desk: Desk) -> None:
    desk.reply = _answer
    assert (await bus.say("what time is it")).skill == CLOCK
    assert (await bus.say("thank you")).skill == "ovos-skill-hello-world.openvoiceos"
    assert desk.asked.empty()


@pytest.mark.parametrize("missing", ["tenant_id", "avb_session"])
async def test_what_belongs_to_nobody_is_not_asked(bus: Any, desk: Desk, missing: str) -> None:
    desk.reply = _answer
    assert (await bus.say("colorless green ideas", **{missing: None})).skill == UNKNOWN
    assert (await bus.say("colorless green ideas", {"blacklisted_skills": [PERSONA]})).skill == UNKNOWN
    assert desk.asked.empty()


def test_nothing_of_the_stock_persona_is_loaded(spoken_cell: Cell) -> None:
    """Its one active persona would be that of all tenants (hazards H4 and H5), or a server far away (H19)."""
    configuration = json.loads((spoken_cell.directory / "config/mycroft/mycroft.conf").read_text())
    assert not [stage for stage in configuration["intents"]["pipeline"] if "ovos-persona" in stage]
    assert "persona" not in configuration["intents"]
    environment = Path(f"/proc/{spoken_cell.pids['core']}/environ").read_bytes()
    assert b"cell-key" not in environment, "nor is our key where every process of the user could read it"


async def test_a_hundred_that_wait_keep_nobody_waiting(line: bridge.Bus, desk: Desk, spoken_cell: Cell) -> None:
    """Hazards H2 and H3: core's 64 threads are everybody's, and a hundred answers hold none of them."""
    go = asyncio.Event()

    async def answer(asked: Asked) -> None:
        await go.wait()
        await asked.say(f"For {asked.turn}.", " And more.")
        await asked.end()

    desk.reply = answer
    callers = [Caller(line, f"waits-{number}", f"t-{number % 5}") for number in range(100)]
    for number, caller in enumerate(callers):
        line.ask(caller.line, f"turn-{number}", "colorless green ideas", "en-US")
    for _ in callers:
        await desk.next()
    threads = len(os.listdir(f"/proc/{spoken_cell.pids['core']}/task"))
    other = Caller(line, "quick", "t-quick")
    line.ask(other.line, "turn-quick", "what time is it", "en-US")
    quick = await other.until(ev.Handled)
    assert _said(quick)
    assert len(desk.open) == 100, "all of them still wait"
    assert threads < 100
    go.set()
    for number, caller in enumerate(callers):
        heard = await caller.until(ev.Handled)
        assert _said(heard) == [f"For turn-{number}.", "And more."]
        assert {event.turn_id for event in heard} == {f"turn-{number}"}
        assert caller.told.empty()
        line.hang_up(caller.line)


async def test_sentences_of_two_tenants_arrive_in_order_and_apart(line: bridge.Bus, desk: Desk) -> None:
    """Hazards H4 and H26: the same words at the same moment, in sessions of two tenants."""
    both = asyncio.Barrier(2)

    async def answer(asked: Asked) -> None:
        for number in range(10):
            await both.wait()
            await asked.say(f"Part {number} of {asked.turn}. ")
        await asked.end()

    desk.reply = answer
    ours, theirs = Caller(line, "ours", "t-1"), Caller(line, "theirs", "t-2")
    line.ask(ours.line, "one", "colorless green ideas", "en-US")
    line.ask(theirs.line, "two", "colorless green ideas", "en-US")
    for caller, turn in ((ours, "one"), (theirs, "two")):
        heard = await caller.until(ev.Handled)
        assert _said(heard) == [f"Part {number} of {turn}." for number in range(10)]
        assert caller.told.empty()


async def test_a_dropped_turn_ends_at_the_node_and_is_not_counted_any_more(line: bridge.Bus, desk: Desk) -> None:
    other = Caller(line, "other", "t-2")
    line.ask(other.line, "theirs", "colorless green ideas", "en-US")
    held = await desk.next()
    caller = Caller(line, "hasty", "t-1")
    for number in range(bridge.MOST_ABANDONED + 3):
        line.ask(caller.line, f"hasty-{number}", "colorless green ideas", "en-US")
        asked = await desk.next()
        assert asked.turn == f"hasty-{number}"
        line.drop(f"hasty-{number}")
        await asked.hung_up()
        async with asyncio.timeout(60):
            while f"hasty-{number}" in line._abandoned:
                await asyncio.sleep(0.005)
    line.ask(caller.line, "last", "what time is it", "en-US")
    assert _said(await caller.until(ev.Handled)), "it has not been shut out"
    assert held.turn in desk.open, "and nobody else's answer was touched"
    await held.say("Still here.")
    await held.end()
    assert _said(await other.until(ev.Handled))[0] == "Still here."


async def test_a_session_that_ends_takes_its_answer_along(line: bridge.Bus, desk: Desk) -> None:
    caller = Caller(line, "leaves", "t-1")
    line.ask(caller.line, "leaving", "colorless green ideas", "en-US")
    asked = await desk.next()
    line.hang_up(caller.line)
    await asked.hung_up()


async def test_stop_is_meant_for_one_session(bus: Any, desk: Desk) -> None:
    """Hazards H1 and H12: core tells everybody of a stop; the answers of others go on."""
    mine = await bus.ask("colorless green ideas", {"session_id": "mine"}, tenant_id="t-1")
    others = [
        await bus.ask("colorless green ideas", {"session_id": "yours"}, tenant_id="t-1"),
        await bus.ask("colorless green ideas", {"session_id": "theirs"}, tenant_id="t-2"),
    ]
    waiting = {asked.turn: asked for asked in [await desk.next() for _ in range(3)]}
    turn = await bus.say("stop", {"session_id": "mine"}, tenant_id="t-1")
    await waiting[mine].hung_up()
    assert sorted(desk.open) == sorted(others)
    assert not {other["context"].get("avb_turn") for other in turn.others if other["type"] == "speak"} & set(others)
    for other in others:
        await waiting[other].say("Still here.")
        await waiting[other].end()
    left = set(others)
    async with asyncio.timeout(60):
        while left:
            message = await bus.receive()
            if message["type"] == "speak" and message["context"]["avb_turn"] in left:
                assert message["data"]["utterance"] == "Still here."
                left.discard(message["context"]["avb_turn"])


async def _die(asked: Asked) -> None:
    asked.writer.transport.abort()


async def _die_half_way(asked: Asked) -> None:
    await asked.say("The beginning. ", "And the mid")
    asked.writer.transport.abort()


async def _babble(asked: Asked) -> None:
    asked.writer.write(b"data: {}\n\ndata: nonsense\n\n" + b"\xff" * 10_000)


@pytest.mark.parametrize(
    ("reply", "language", "last"),
    [
        (_die, "en-us", "I cannot reach my language model right now"),
        (_die, "de-de", "Ich erreiche mein Sprachmodell gerade nicht"),
        (_die_half_way, "en-us", "Sorry, I lost the rest"),
        (_babble, "en-us", "Something went wrong"),
    ],
)
async def test_a_bad_node_is_told_politely_and_core_lives_on(
    line: bridge.Bus, desk: Desk, spoken_cell: Cell, reply: Reply, language: str, last: str
) -> None:
    pids = dict(spoken_cell.pids)
    desk.reply = reply
    caller = Caller(line, "bad", "t-1")
    line.ask(caller.line, "bad-1", "colorless green ideas", language)
    said = _said(await caller.until(ev.Handled))
    assert said[-1].startswith(last)
    desk.reply = _answer
    line.ask(caller.line, "bad-2", "colorless green ideas", language)
    assert _said(await caller.until(ev.Handled)) == ["It is so.", "Nobody knows why."]
    assert spoken_cell.pids == pids
    line.hang_up(caller.line)


async def test_the_log_holds_nothing_that_was_asked_or_answered(bus: Any, desk: Desk, spoken_cell: Cell) -> None:
    desk.reply = _die_half_way
    await bus.say("xylophone unicorns")
    logs = "".join(log.read_text() for log in (spoken_cell.directory / "logs").iterdir())
    assert "the persona has no answer" in logs
    assert not [word for word in ("xylophone", "beginning", "cell-key") if word in logs.lower()]
