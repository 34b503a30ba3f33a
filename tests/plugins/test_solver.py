"""The solver as the stock ovos-persona loads and asks it, by its name."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from ovos_persona import Persona

from agentvoicebox.plugins import solver
from agentvoicebox.plugins.device import link, wire
from agentvoicebox.plugins.device.link import Asking, Away, Failed, State

CONVERSATION = [
    {"role": "user", "content": "knock knock"},
    {"role": "assistant", "content": "Who is there?"},
    {"role": "user", "content": "Orange."},
]


class Platform:
    """The link of a device. `answer` is called with each question, on the thread that asks."""

    def __init__(self) -> None:
        self.state = State.UP
        self.asked: list[tuple[str, str, Any]] = []
        self.frames: list[str | bytes] = []
        self.answer: Callable[[Asking], None] = lambda asking: tell(asking, "Orange ", "who? Tell", " me.")

    def ask(self, text: str = "", language: str = "", messages: list[Any] | None = None) -> Asking:
        if self.state is not State.UP:
            raise Away("away")
        self.asked.append((text, language, messages))
        asking = Asking(wire.Ask(1, text, language, messages), 1, self._post)
        self.answer(asking)
        return asking

    def _post(self, request: Any) -> None:
        while frame := request.outgoing():
            self.frames.append(frame)


def tell(asking: Asking, *texts: str) -> None:
    for text in texts:
        asking.hear(wire.Text(1, text))
    asking.hear(wire.Done(1))


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Platform:
    platform = Platform()
    monkeypatch.setattr(link, "shared", lambda process: platform)
    return platform


@pytest.fixture
def persona() -> Persona:
    """As the file of a persona has it: our solver, then one that always says something."""
    return Persona("Ada", {"name": "Ada", "solvers": ["agentvoicebox-solver", "ovos-solver-failure-plugin"]})


def test_the_conversation_goes_to_the_platform(platform: Platform, persona: Persona) -> None:
    assert persona.chat(CONVERSATION, lang="en-us") == "Orange who? Tell me."
    assert list(persona.stream(CONVERSATION, lang="en-US")) == ["Orange who?", "Tell me."]
    assert [asked[1:] for asked in platform.asked] == [("en-US", CONVERSATION)] * 2
    assert {asked[0] for asked in platform.asked} == {""}


def test_sentences_come_as_they_are_complete(platform: Platform, persona: Persona) -> None:
    open_: list[Asking] = []

    def begin(asking: Asking) -> None:
        open_.append(asking)
        asking.hear(wire.Text(1, "The first. The sec"))

    platform.answer = begin
    sentences = iter(persona.stream(CONVERSATION, lang="en-us"))
    assert next(sentences) == "The first."
    tell(open_[0], "ond.")
    assert list(sentences) == ["The second."]


@pytest.mark.parametrize("state", [State.CONNECTING, State.AWAY, State.REFUSED])
def test_without_the_platform_the_next_solver_answers(platform: Platform, persona: Persona, state: State) -> None:
    platform.state = state
    chat, stream = persona.chat(CONVERSATION, lang="en-us"), list(persona.stream(CONVERSATION, lang="en-us"))
    assert chat
    assert stream
    assert platform.asked == []
    platform.state = State.UP
    assert persona.chat(CONVERSATION, lang="en-us") == "Orange who? Tell me.", "and back, by itself"


@pytest.mark.parametrize("error", [Away("away"), Failed("no", code="no_language_model")])
def test_what_fails_before_a_word_is_the_next_solvers(platform: Platform, persona: Persona, error: Exception) -> None:
    platform.answer = lambda asking: asking.end(error)
    assert solver.TenantSolver().continue_chat(CONVERSATION) is None
    assert persona.chat(CONVERSATION, lang="en-us")
    assert list(persona.stream(CONVERSATION, lang="en-us"))
    assert list(solver.TenantSolver().stream_chat_utterances(CONVERSATION)) == []


def test_half_an_answer_says_so(platform: Platform, persona: Persona) -> None:
    def break_off(asking: Asking) -> None:
        asking.hear(wire.Text(1, "The beginning. And the mid"))
        asking.end(Away("away"))

    platform.answer = break_off
    said = list(persona.stream(CONVERSATION, lang="de-de"))
    assert said[:-1] == ["The beginning.", "And the mid"]
    assert said[-1].startswith("Entschuldigung, der Rest")
    assert solver.TenantSolver().continue_chat(CONVERSATION) is None, "who wants it whole gets the next solver's"


def test_an_answer_without_words_is_the_next_solvers(platform: Platform, persona: Persona) -> None:
    platform.answer = lambda asking: tell(asking, "  \n")
    assert solver.TenantSolver().continue_chat(CONVERSATION) is None
    assert list(solver.TenantSolver().stream_chat_utterances(CONVERSATION)) == []


def test_a_single_question(platform: Platform) -> None:
    asked = solver.TenantSolver()
    assert asked.spoken_answer("knock knock", lang="en-us") == "Orange who? Tell me."
    assert list(asked.stream_utterances("knock knock", lang="en-us")) == ["Orange who?", "Tell me."]
    assert platform.asked[0][2] == [{"role": "user", "content": "knock knock"}]


def test_who_does_not_want_the_rest_ends_it_there(platform: Platform, persona: Persona) -> None:
    platform.answer = lambda asking: asking.hear(wire.Text(1, "One. Two. Three"))
    sentences = persona.stream(CONVERSATION, lang="en-us")
    next(iter(sentences))
    sentences.close()
    assert '"cancel"' in str(platform.frames[-1])


def test_a_platform_that_hangs_is_not_waited_for_for_ever(
    platform: Platform, until: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solver, "LIMIT", 0.05)
    platform.answer = lambda asking: None
    assert solver.TenantSolver().continue_chat(CONVERSATION) is None
    # The timer that has ended the wait may be at its last step still.
    until(lambda: not [each for each in threading.enumerate() if isinstance(each, threading.Timer)])


def test_without_a_platform_it_knows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cell as well, where the node answers by itself."""
    monkeypatch.setattr(link, "shared", lambda process: None)
    assert solver.TenantSolver().get_chat_completion(messages=CONVERSATION, lang="en-us") is None
    assert list(solver.TenantSolver().stream_chat_utterances(CONVERSATION)) == []
