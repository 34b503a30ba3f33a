"""The bus connection against a bus that does as it is told; the real one is in `tests/stack` and `tests/isolation`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve

from agentvoicebox.bus_bridge import bus as buses
from agentvoicebox.bus_bridge import events as ev
from agentvoicebox.bus_bridge.bus import MAX_TEXT, MOST_ABANDONED, Bus, Line
from agentvoicebox.config.errors import Unavailable


class Core:
    """The other end: keeps what it hears, and says what a test wants said."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.socket: ServerConnection | None = None

    async def serve(self, socket: ServerConnection) -> None:
        self.socket = socket
        async for frame in socket:
            await self.heard.put(json.loads(frame))

    async def next(self, kind: str) -> dict[str, Any]:
        async with asyncio.timeout(30):
            while (message := await self.heard.get())["type"] != kind:
                pass
        return message

    async def say(self, *messages: dict[str, Any]) -> None:
        assert self.socket is not None
        await self.socket.send("\n".join(json.dumps(message) for message in messages))


@pytest.fixture
async def core() -> Core:
    return Core()


@pytest.fixture
async def bus(core: Core, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bus]:
    monkeypatch.setattr(buses, "MATCHING", 3600.0)  # a stall lets nobody in
    async with serve(core.serve, "127.0.0.1", 0) as server:
        bus = Bus()
        await bus.connect(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/route")
        yield bus
        await bus.close()


class Caller:
    """A line and everything it was told."""

    def __init__(self, bus: Bus, name: str = "one", tenant: str = "t-1") -> None:
        self.line = Line(name, tenant, context={"tenant_name": "T", "persona_name": "P"})
        self.told: asyncio.Queue[ev.Event] = asyncio.Queue()
        self.line.tell = self.told.put_nowait
        bus.open(self.line)

    async def next(self) -> ev.Event:
        return await asyncio.wait_for(self.told.get(), 30)


def reply(asked: dict[str, Any], kind: str, data: dict[str, Any] | None = None, **context: Any) -> dict[str, Any]:
    return {"type": kind, "data": data or {}, "context": {**asked["context"], **context}}


async def test_a_turn_there_and_back(bus: Bus, core: Core):
    caller = Caller(bus)
    bus.ask(caller.line, "resp_1", "hello", "en-US")
    asked = await core.next("recognizer_loop:utterance")
    assert asked["data"] == {"utterances": ["hello"], "lang": "en-US"}
    assert asked["context"]["tenant_id"] == "t-1"
    assert asked["context"]["session"]["blacklisted_skills"] == ["-"], "never empty: core would share its own list"
    session = {**asked["context"]["session"], "active_skills": [["x", 1]]}
    await core.say(
        reply(asked, "mycroft.skill.handler.start"),
        reply(asked, "speak", {"utterance": "hi"}),
        reply(asked, "ovos.utterance.handled", session=session),
    )
    assert [await caller.next() for _ in range(3)] == [
        ev.SkillStarted("resp_1"),
        ev.Spoke("resp_1", "hi"),
        ev.Handled("resp_1"),
    ]
    bus.ask(caller.line, "resp_2", "more", "en-US")
    asked = await core.next("recognizer_loop:utterance")
    assert asked["context"]["session"]["active_skills"] == [["x", 1]], "what core keeps in the session comes back to it"


@pytest.mark.parametrize(
    ("meta", "apology"),
    [
        ({"skill": "avb.persona", "avb": "apology"}, True),
        ({"skill": "avb.persona"}, False),
        ({"avb": ["apology"]}, False),
        ('avb: "avb"', False),
        (None, False),
    ],
)
async def test_an_apology_is_known_and_any_skills_meta_borne(bus: Bus, core: Core, meta: Any, apology: bool):
    caller = Caller(bus)
    bus.ask(caller.line, "resp_1", "hello", "en-US")
    asked = await core.next("recognizer_loop:utterance")
    await core.say(reply(asked, "speak", {"utterance": "no", "meta": meta}))
    assert await caller.next() == ev.Spoke("resp_1", "no", apology=apology)


async def test_a_session_that_comes_back_with_less_is_no_trouble(bus: Bus, core: Core):
    caller = Caller(bus)
    bus.ask(caller.line, "resp_1", "hello", "en-US")
    asked = await core.next("recognizer_loop:utterance")
    await core.say(reply(asked, "ovos.utterance.handled", session={"session_id": caller.line.id}))
    assert await caller.next() == ev.Handled("resp_1")
    bus.ask(caller.line, "resp_2", "more", "en-US")
    assert (await core.next("recognizer_loop:utterance"))["context"]["session"]["session_id"] == caller.line.id


async def test_one_sessions_trouble_is_not_the_others(bus: Bus, core: Core):
    broken, good = Caller(bus, "broken"), Caller(bus, "good")

    def fail(event: ev.Event) -> None:
        raise RuntimeError

    broken.line.tell = fail
    bus.ask(broken.line, "resp_1", "hello", "en-US")
    first = await core.next("recognizer_loop:utterance")
    await core.say(reply(first, "speak", {"utterance": "hi"}))
    bus.ask(good.line, "resp_2", "hello", "en-US")
    second = await core.next("recognizer_loop:utterance")
    await core.say(reply(first, "speak", {"utterance": "hi"}), reply(second, "speak", {"utterance": "hi"}))
    assert await good.next() == ev.Spoke("resp_2", "hi")


async def test_a_dropped_turn_is_not_heard_of_any_more(bus: Bus, core: Core):
    caller = Caller(bus)
    bus.ask(caller.line, "resp_1", "count", "en-US")
    asked = await core.next("recognizer_loop:utterance")
    bus.drop("resp_1")
    bus.ask(caller.line, "resp_2", "hello", "en-US")
    other = await core.next("recognizer_loop:utterance")
    await core.say(reply(asked, "speak", {"utterance": "seven"}), reply(other, "speak", {"utterance": "hi"}))
    assert await caller.next() == ev.Spoke("resp_2", "hi")


async def test_a_tenant_that_cancels_what_core_cannot_stop_waits(bus: Bus, core: Core):
    busy, quiet = Caller(bus, "busy", "t-1"), Caller(bus, "quiet", "t-2")
    asked = []
    for number in range(MOST_ABANDONED):
        bus.ask(busy.line, f"resp_{number}", "count to infinity", "en-US")
        asked.append(await core.next("recognizer_loop:utterance"))
        bus.drop(f"resp_{number}")
    bus.ask(busy.line, "resp_x", "hello", "en-US")
    refused = await busy.next()
    assert isinstance(refused, ev.AskFailed)
    assert refused.code == "too_many_turns"
    bus.ask(quiet.line, "resp_y", "hello", "en-US")
    others = await core.next("recognizer_loop:utterance")
    assert others["context"]["tenant_id"] == "t-2"
    await core.say(reply(asked[0], "ovos.utterance.handled"), reply(others, "speak", {"utterance": "hi"}))
    assert await quiet.next() == ev.Spoke("resp_y", "hi"), "and so the bus has heard of the end before it"
    bus.ask(busy.line, "resp_z", "hello", "en-US")
    bus.drop("resp_y")
    assert (await core.next("recognizer_loop:utterance"))["context"]["avb_turn"] == "resp_z"


async def test_dialogues_and_turns_that_core_never_ends_do_not_shut_a_tenant_out(
    bus: Bus, core: Core, monkeypatch: pytest.MonkeyPatch
):
    for number in range(MOST_ABANDONED + 1):
        caller = Caller(bus, f"dialogue-{number}")
        bus.ask(caller.line, f"ask_{number}", "set a reminder", "en-US")
        asked = await core.next("recognizer_loop:utterance")
        await core.say(reply(asked, "speak", {"utterance": "when?", "expect_response": True}))
        assert isinstance(await caller.next(), ev.Spoke)
        bus.ask(caller.line, f"reply_{number}", "tomorrow", "en-US")
        await core.next("recognizer_loop:utterance")
        await core.say(reply(asked, "ovos.utterance.handled"))  # the one end that core gives both turns
        assert await caller.next() == ev.Handled(f"ask_{number}")
        bus.hang_up(caller.line)
    monkeypatch.setattr(buses, "ABANDONED", -1.0)
    for number in range(MOST_ABANDONED + 1):
        caller = Caller(bus, f"lost-{number}")
        bus.ask(caller.line, f"lost_{number}", "hello", "en-US")
        assert (await core.next("recognizer_loop:utterance"))["context"]["avb_turn"] == f"lost_{number}"
        bus.drop(f"lost_{number}")


async def test_too_long_a_text_is_refused_here(bus: Bus, core: Core):
    caller = Caller(bus)
    bus.ask(caller.line, "resp_1", "x" * (MAX_TEXT + 1), "en-US")
    refused = await caller.next()
    assert isinstance(refused, ev.AskFailed)
    assert refused.code == "too_long"
    assert core.heard.empty()


async def test_core_forgets_a_session_that_is_over_and_again_when_its_turn_ends(bus: Bus, core: Core):
    caller = Caller(bus)
    bus.ask(caller.line, "resp_1", "hello", "en-US")
    asked = await core.next("recognizer_loop:utterance")
    bus.hang_up(caller.line)
    assert (await core.next("avb.session.forget"))["data"] == {"session_id": caller.line.id}
    await core.say(reply(asked, "ovos.utterance.handled"))
    assert (await core.next("avb.session.forget"))["context"]["tenant_id"] == "t-1"


async def test_a_lost_bus_fails_the_turns_in_flight_and_refuses_new_ones(bus: Bus, core: Core):
    caller = Caller(bus)
    bus.ask(caller.line, "resp_1", "hello", "en-US")
    await core.next("recognizer_loop:utterance")
    assert core.socket is not None
    core.socket.transport.abort()
    lost = await caller.next()
    assert isinstance(lost, ev.AskFailed)
    assert (lost.turn_id, lost.code) == ("resp_1", "cell_lost")
    bus.ask(caller.line, "resp_2", "hello", "en-US")
    refused = await caller.next()
    assert isinstance(refused, ev.AskFailed)
    assert refused.code == "cell_unavailable"
    assert not bus.connected
    assert await bus.canary() is False


async def test_a_canary_that_is_given_up_as_it_answers_is_given_up(bus: Bus, core: Core):
    """Whoever ends the keeper of a cell waits until it is over."""
    canary = asyncio.create_task(bus.canary())
    await core.next("recognizer_loop:utterance")
    (answered,) = bus._canaries.values()
    answered.set_result(None)
    canary.cancel()
    await asyncio.wait([canary])
    assert canary.cancelled()


async def test_a_turn_that_stays_in_matching_lets_others_in_after_a_while(
    bus: Bus, core: Core, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(buses, "MATCHING", 0.05)
    one, other = Caller(bus, "one", "t-1"), Caller(bus, "other", "t-2")
    bus.ask(one.line, "resp_1", "hello", "en-US")
    bus.ask(other.line, "resp_2", "hello", "en-US")
    assert (await core.next("recognizer_loop:utterance"))["context"]["avb_turn"] == "resp_1"
    assert (await core.next("recognizer_loop:utterance"))["context"]["avb_turn"] == "resp_2"


async def test_nobody_there():
    with pytest.raises(Unavailable):
        await Bus().connect("ws://127.0.0.1:9/route")


async def test_the_persona_is_told_of_a_turn_that_is_not_wanted_any_more(bus: Bus, core: Core):
    caller, other = Caller(bus), Caller(bus, "other", "t-2")
    bus.ask(caller.line, "resp_1", "hello", "en-US")
    bus.ask(other.line, "resp_2", "hello", "en-US")
    await core.next("recognizer_loop:utterance")
    bus.drop("resp_2")  # it waited for its turn: core has never heard of it
    bus.drop("resp_1")
    cancelled = await core.next("avb.persona.cancel")
    assert cancelled["data"] == {"turn": "resp_1"}
    assert cancelled["context"] == {"avb_session": caller.line.id, "tenant_id": "t-1"}, "no session for core to keep"
    bus.drop("resp_1")
    bus.ask(caller.line, "resp_3", "hello", "en-US")
    await core.next("recognizer_loop:utterance")
    bus.hang_up(caller.line)
    assert (await core.heard.get())["data"] == {"turn": "resp_3"}
    assert (await core.heard.get())["type"] == "avb.session.forget"
    assert core.heard.empty()


async def test_a_turn_is_somebodys_while_its_answer_is_wanted(bus: Bus, core: Core):
    caller, waiting = Caller(bus), Caller(bus, "waiting", "t-2")
    caller.line.talk = talk = object()
    assert bus.turn("resp_1") is None
    bus.ask(caller.line, "resp_1", "hello", "en-US")
    bus.ask(waiting.line, "resp_2", "hello", "en-US")
    assert (bus.turn("resp_1"), bus.turn("resp_2")) == (caller.line, waiting.line)
    assert caller.line.talk is talk
    asked = await core.next("recognizer_loop:utterance")
    await core.say(reply(asked, "ovos.utterance.handled"))
    assert await caller.next() == ev.Handled("resp_1")
    bus.drop("resp_2")
    assert (bus.turn("resp_1"), bus.turn("resp_2")) == (None, None)
    bus.ask(caller.line, "resp_3", "hello", "en-US")
    bus.hang_up(caller.line)
    bus.ask(waiting.line, "resp_4", "hello", "en-US")
    await bus.close()
    assert (bus.turn("resp_3"), bus.turn("resp_4")) == (None, None)
