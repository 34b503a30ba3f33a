"""The persona's stage on a device: the platform is asked over the device's link, and somebody nearer without it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ovos_bus_client.message import Message
from ovos_plugin_manager.templates.solvers import QuestionSolver
from ovos_utils.fakebus import FakeBus

from agentvoicebox.plugins import askers, persona
from agentvoicebox.plugins.device import link, wire
from agentvoicebox.plugins.device.link import Asking, Away, Failed, State
from agentvoicebox.plugins.persona import Persona

HANDLED, SPEAK = "ovos.utterance.handled", "speak"


class Platform:
    """The link of a device; the test answers what is asked over it."""

    def __init__(self) -> None:
        self.state = State.UP
        self.asked: list[wire.Ask] = []
        self.askings: asyncio.Queue[Asking] = asyncio.Queue()
        self.cancelled: asyncio.Queue[int] = asyncio.Queue()
        self.reports: list[tuple[str, dict[str, Any]]] = []
        self._test = asyncio.get_running_loop()

    def ask(self, text: str = "", language: str = "", messages: list[Any] | None = None) -> Asking:
        if self.state is not State.UP:
            raise Away("away", code="key_refused" if self.state is State.REFUSED else "platform_away")
        opening = wire.Ask(len(self.asked) + 1, text, language, messages)
        self.asked.append(opening)
        asking = Asking(opening, opening.id, self._post)
        self._test.call_soon_threadsafe(self.askings.put_nowait, asking)
        return asking

    def report(self, kind: str, **facts: Any) -> None:
        self.reports.append((kind, facts))

    def _post(self, request: Any) -> None:
        while frame := request.outgoing():
            if json.loads(frame)["type"] == "cancel":
                self._test.call_soon_threadsafe(self.cancelled.put_nowait, request.number)

    async def next(self) -> Asking:
        return await asyncio.wait_for(self.askings.get(), 30)

    async def hung_up(self, asking: Asking) -> None:
        assert await asyncio.wait_for(self.cancelled.get(), 30) == asking.number


class Bus(FakeBus):  # type: ignore[misc]
    """What is said on the bus, in order, as the test's loop sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.said: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self.on("message", lambda text: loop.call_soon_threadsafe(self.said.put_nowait, json.loads(text)))

    async def until(self, kind: str) -> list[dict[str, Any]]:
        messages = [await asyncio.wait_for(self.said.get(), 30)]
        while messages[-1]["type"] != kind:
            messages.append(await asyncio.wait_for(self.said.get(), 30))
        return messages

    async def answer(self) -> list[str]:
        """All that is said up to the end of a question."""
        return [message["data"]["utterance"] for message in await self.until(HANDLED) if message["type"] == SPEAK]


class Near(QuestionSolver):  # type: ignore[misc]
    """A local solver that knows one thing."""

    answers: Callable[[str], str | None] = staticmethod(lambda query: "It is local. Really.")

    def get_spoken_answer(self, query: str, lang: str | None = None, units: str | None = None) -> str | None:
        return type(self).answers(query)


@pytest.fixture
async def bus() -> Bus:
    return Bus()


@pytest.fixture
async def platform(monkeypatch: pytest.MonkeyPatch) -> Platform:
    platform = Platform()
    monkeypatch.setattr(persona, "Configuration", lambda: {"agentvoicebox": {"url": "https://voice.example.com"}})
    monkeypatch.setattr(link, "shared", lambda process: platform if process == "core" else None)
    return platform


@pytest.fixture
def plugin(bus: Bus, platform: Platform) -> Iterator[Persona]:
    plugin = Persona(bus)
    yield plugin
    plugin.shutdown()


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> type[Near]:
    """The solver `near` is installed."""
    monkeypatch.setattr(askers, "load_question_solver_plugin", {"near": Near}.get)
    monkeypatch.setattr(askers, "load_chat_solver_plugin", {}.get)
    monkeypatch.setattr(Near, "answers", Near.answers)
    return Near


@pytest.fixture
def with_near(bus: Bus, platform: Platform, near: type[Near]) -> Iterator[Persona]:
    plugin = Persona(bus, {"fallback": "near"})
    yield plugin
    plugin.shutdown()


def _context(session: str | None) -> dict[str, Any]:
    return {"session": {"session_id": session}} if session else {}


def _ask(bus: Bus, utterance: str = "why is the sky blue", session: str | None = "default") -> None:
    bus.emit(Message("avb.persona.ask", {"utterance": utterance, "lang": "en-us"}, _context(session)))


def _tell(asking: Asking, *texts: str, end: bool = True) -> None:
    for text in texts:
        asking.hear(wire.Text(asking.number, text))
    if end:
        asking.hear(wire.Done(asking.number))


# --- the platform -----------------------------------------------------------------------------------------------------


async def test_the_platform_answers_sentence_by_sentence(bus: Bus, platform: Platform, plugin: Persona) -> None:
    found = plugin.match(["why is the sky blue"], "en-us", Message("", {}, _context("default")))
    assert found is not None
    assert (found.match_type, found.skill_id) == ("avb.persona.ask", persona.SKILL)
    _ask(bus)
    asking = await platform.next()
    assert (platform.asked[0].text, platform.asked[0].language) == ("why is the sky blue", "en-us")
    assert platform.asked[0].messages is None, "the conversation is the platform's"
    _tell(asking, "Blue light is scattered ", "most. It comes", end=False)
    first = (await bus.until(SPEAK))[-1]
    assert first["data"]["utterance"] == "Blue light is scattered most."
    assert first["context"]["session"]["session_id"] == "default"
    _tell(asking, " from every side.")
    assert await bus.answer() == ["It comes from every side."]
    assert platform.reports == []


@pytest.mark.parametrize("state", [State.CONNECTING, State.AWAY, State.REFUSED])
async def test_without_the_platform_later_stages_answer(platform: Platform, plugin: Persona, state: State) -> None:
    platform.state = state
    assert plugin.match(["hello"], "en-us", Message("")) is None
    platform.state = State.UP
    assert plugin.match(["hello"], "en-us", Message("")) is not None, "and back, by itself"


async def test_without_a_link_there_is_no_persona(
    bus: Bus, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "shared", lambda process: None)
    plugin = Persona(bus)
    assert plugin.match(["hello"], "en-us", Message("")) is None
    bus.emit(Message("mycroft.stop"))
    plugin.shutdown()


async def test_what_the_platform_refuses_is_told_politely(bus: Bus, platform: Platform, plugin: Persona) -> None:
    for code, begins in (
        ("no_language_model", "No language model"),
        ("quota_exceeded", "The limit"),
        ("Not a code: secret", "Something went wrong"),
    ):
        _ask(bus)
        (await platform.next()).end(Failed("secret details", code=code))
        (said,) = await bus.answer()
        assert said.startswith(begins)


async def test_a_link_that_breaks_before_a_word_is_told_politely(bus: Bus, platform: Platform, plugin: Persona) -> None:
    _ask(bus)
    (await platform.next()).end(Away("away"))
    (said,) = await bus.answer()
    assert said.startswith("I cannot reach my service")
    platform.state = State.REFUSED  # between the match and the question
    _ask(bus)
    assert (await bus.answer())[0].startswith("I cannot reach my service")


async def test_a_link_that_breaks_in_the_middle_leaves_half_an_answer(
    bus: Bus, platform: Platform, with_near: Persona
) -> None:
    _ask(bus)
    asking = await platform.next()
    _tell(asking, "One sentence. And ha", end=False)
    asking.end(Away("away"))
    assert await bus.answer() == ["One sentence.", "And ha", "Sorry, I lost the rest of my answer."]
    assert platform.reports == [], "nobody nearer goes on with another's answer"


# --- quiet ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mycroft.stop", "avb.persona.stop", "recognizer_loop:utterance"])
async def test_stop_and_what_is_said_next_end_the_answers_of_their_session(
    bus: Bus, platform: Platform, plugin: Persona, kind: str
) -> None:
    _ask(bus, "mine")
    mine = await platform.next()
    _ask(bus, "theirs", "kitchen")
    theirs = await platform.next()
    bus.emit(Message(kind, {}, _context("default")))
    await platform.hung_up(mine)
    for _ in range(2 if kind == "avb.persona.stop" else 1):  # the answer's end, and that of the stop
        await bus.until(HANDLED)
    _tell(theirs, "Still here.")
    assert await bus.answer() == ["Still here."]


async def test_a_button_means_whoever_stands_before_the_device(bus: Bus, platform: Platform, plugin: Persona) -> None:
    _ask(bus, session=None)
    asking = await platform.next()
    bus.emit(Message("mycroft.stop"))
    await platform.hung_up(asking)
    assert await bus.answer() == []


async def test_core_need_not_wait_to_learn_who_can_stop(bus: Bus, platform: Platform, plugin: Persona) -> None:
    ping = Message("avb.persona.stop.ping", {"skill_id": persona.SKILL}, _context("default"))
    bus.emit(ping)
    assert (await bus.until("skill.stop.pong"))[-1]["data"] == {"skill_id": persona.SKILL, "can_handle": False}
    _ask(bus)
    asking = await platform.next()
    bus.emit(ping)
    assert (await bus.until("skill.stop.pong"))[-1]["data"]["can_handle"] is True
    bus.emit(Message("avb.persona.stop", {}, _context("default")))
    assert (await bus.until("avb.persona.stop.response"))[-1]["data"] == {"skill_id": persona.SKILL, "result": True}
    await platform.hung_up(asking)


async def test_nor_that_what_is_said_next_is_not_for_the_persona_alone(
    bus: Bus, platform: Platform, plugin: Persona
) -> None:
    _ask(bus)
    asking = await platform.next()
    bus.emit(Message("avb.persona.converse.ping", {"skill_id": persona.SKILL}, _context("default")))
    assert (await bus.until("skill.converse.pong"))[-1]["data"] == {"skill_id": persona.SKILL, "can_handle": False}
    _tell(asking, "Done.")
    await bus.until(HANDLED)


# --- somebody nearer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "reason"),
    [(State.CONNECTING, "platform_away"), (State.AWAY, "platform_away"), (State.REFUSED, "key_refused")],
)
async def test_without_the_platform_somebody_nearer_answers(
    bus: Bus, platform: Platform, with_near: Persona, state: State, reason: str
) -> None:
    platform.state = state
    assert with_near.match(["hello"], "en-us", Message("")) is not None
    _ask(bus)
    assert await bus.answer() == ["It is local.", "Really."]
    assert platform.reports == [("persona", {"engine": "near", "reason": reason})]
    assert platform.asked == []


@pytest.mark.parametrize("error", [Away("away"), Failed("failed", code="provider_unreachable")])
async def test_when_the_platform_goes_before_a_word_was_said_somebody_nearer_takes_over(
    bus: Bus, platform: Platform, with_near: Persona, error: Exception
) -> None:
    _ask(bus)
    asking = await platform.next()
    _tell(asking, "Half a sent", end=False)
    asking.end(error)
    assert await bus.answer() == ["It is local.", "Really."]
    reason = "platform_away" if isinstance(error, Away) else "failed"
    assert platform.reports == [("persona", {"engine": "near", "reason": reason})]


@pytest.mark.parametrize("answers", [lambda query: None, lambda query: "", lambda query: 1 / 0])
async def test_when_nobody_knows_that_is_said(
    bus: Bus, platform: Platform, near: type[Near], with_near: Persona, answers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform.state = State.AWAY
    monkeypatch.setattr(near, "answers", staticmethod(answers))
    _ask(bus)
    (said,) = await bus.answer()
    assert said.startswith("I cannot reach my service")
    assert platform.reports == []


async def test_a_solver_that_hangs_is_given_up_and_fills_no_threads(
    near: type[Near], monkeypatch: pytest.MonkeyPatch
) -> None:
    go, begun = threading.Event(), threading.Semaphore(0)

    def hang(query: str) -> str:
        begun.release()
        go.wait(60)
        return "late"

    monkeypatch.setattr(near, "answers", staticmethod(hang))
    monkeypatch.setattr(askers, "NEAR", 0.05)
    solver = askers.Near("near", {})
    assert await asyncio.gather(*(solver.ask("why", "en-us") for _ in range(askers.MOST_NEAR + 3))) == [""] * (
        askers.MOST_NEAR + 3
    )
    assert [begun.acquire(blocking=False) for _ in range(askers.MOST_NEAR + 1)].count(True) <= askers.MOST_NEAR
    monkeypatch.setattr(near, "answers", staticmethod(lambda query: "It works again."))
    monkeypatch.setattr(askers, "NEAR", 30.0)
    go.set()
    async with asyncio.timeout(30):
        while not (said := await solver.ask("why", "en-us")):  # until a thread has come back
            await asyncio.sleep(0.01)
    assert said == "It works again."


async def test_a_solver_that_is_not_installed_knows_nothing(bus: Bus, platform: Platform, near: type[Near]) -> None:
    plugin = Persona(bus, {"fallback": "missing"})
    platform.state = State.AWAY
    _ask(bus)
    assert (await bus.answer())[0].startswith("I cannot reach my service")
    plugin.shutdown()


async def test_a_solver_has_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Solver:
        def __init__(self, config: Any) -> None:
            made.append(config)

        def spoken_answer(self, query: str, lang: str) -> str:
            return f"{query} in {lang}"

    monkeypatch.setattr(askers, "load_question_solver_plugin", lambda name: None)
    monkeypatch.setattr(askers, "load_chat_solver_plugin", {"near": Solver}.get)
    monkeypatch.setattr(link, "shared", lambda process: SimpleNamespace(state=State.AWAY, report=lambda *_, **__: None))
    asker = askers.configured({"url": "x"}, {"fallback": "near", "near": {"model": "small"}})
    assert asker is not None
    assert await asker.instead("what", "en-us", "platform_away") == "what in en-us"
    assert made == [{"model": "small"}]
