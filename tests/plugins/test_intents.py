"""Intents: sentences in, the right intent out, for this session and no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ovos_bus_client.message import Message
from ovos_config.config import Configuration
from ovos_utils.fakebus import FakeBus

from agentvoicebox.config import ovos
from agentvoicebox.plugins.intents import Intents

SKILL = "clock.test"
ASK = f"{SKILL}:ask.intent"


PIPELINE = {"intents": {"pipeline": list(ovos.PIPELINE)}}


@pytest.fixture(autouse=True)
def in_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Configuration, "load_all_configs", lambda *_: PIPELINE)


@pytest.fixture
def bus() -> FakeBus:
    return FakeBus()


@pytest.fixture
def intents(bus: FakeBus) -> Iterator[Intents]:
    plugin = Intents(bus)
    yield plugin
    plugin.shutdown()


@pytest.fixture
def register(bus: FakeBus) -> Callable[..., None]:
    def register(*samples: str, name: str = ASK, kind: str = "intent", **more: Any) -> None:
        bus.emit(
            Message(f"padatious:register_{kind}", {"name": name, "samples": list(samples), "lang": "en-us"} | more)
        )

    return register


@pytest.fixture
def understand(intents: Intents) -> Callable[..., Any]:
    def understand(*utterances: str, stage: str = "high", lang: str = "en-us", **session: Any) -> Any:
        message = Message("recognizer_loop:utterance", {}, {"session": {"session_id": "s", **session}})
        return getattr(intents, f"match_{stage}")(list(utterances), lang, message)

    return understand


@pytest.mark.parametrize(
    "utterance",
    ["what time is it", "What time is it?", "  what  time is it ", "What, time is it", "please tell me the time"],
)
def test_a_sentence_is_understood_however_it_is_written(register, understand, utterance: str) -> None:
    register("what time is it?", "[please] (tell|give) me the  time")
    match = understand(utterance)
    assert (match.match_type, match.skill_id, match.utterance) == (ASK, SKILL, utterance)


def test_other_sentences_are_not_understood(register, understand) -> None:
    register("what time is it", "what time is it in {place}")
    assert understand("what time") is None
    assert understand("do you know what time is it") is None
    assert understand("") is None


def test_an_entity_keeps_its_capitals(register, understand) -> None:
    register("what time is it in {place}")
    assert understand("What time is it in New York?").match_data == {"place": "New York"}


def test_a_digit_sign_stands_for_a_digit(register, understand) -> None:
    register("count to ##")
    assert understand("count to 42")
    assert understand("count to 420") is None
    assert understand("count to xx") is None


def test_numbered_words_are_entities(register, understand) -> None:
    register("call :0 now")
    assert understand("call Ada now").match_data == {"word0": "Ada"}


def test_the_best_of_several_utterances_counts(register, understand) -> None:
    register("what is the time")
    assert understand("what's the time", "what is the time").utterance == "what is the time"


def test_confidence_decides_the_stage(register, understand) -> None:
    register("play * by {artist}")
    for stage, expected in (("high", False), ("medium", True), ("low", True)):
        assert bool(understand("play something by Bach", stage=stage)) is expected


def test_known_values_of_an_entity_are_surer(register, understand) -> None:
    register("paint it {color}")
    register("red", "(dark|light) blue", name=f"{SKILL}:color_{'0' * 32}", kind="entity")
    assert understand("paint it light blue")
    assert understand("paint it loudly") is None
    assert understand("paint it loudly", stage="medium")


def test_of_two_skills_the_more_exact_one_wins(register, understand) -> None:
    register("open {thing}", name="doors.test:open.intent")
    register("open {thing} slowly", name="slow.test:open.intent")
    register("open the gate", name="gate.test:open.intent")
    assert understand("open the gate").skill_id == "gate.test"
    assert understand("open the window").skill_id == "doors.test"
    assert understand("open the window slowly").skill_id == "slow.test"


def test_a_blacklist_holds_for_its_session_only(register, understand) -> None:
    register("open the gate", name="gate.test:open.intent")
    register("open {thing}", name="doors.test:open.intent")
    for _ in range(3):  # nothing may be remembered from one session to the next
        assert understand("open the gate").skill_id == "gate.test"
        assert understand("open the gate", blacklisted_skills=["gate.test"]).skill_id == "doors.test"
        assert understand("open the gate", blacklisted_intents=["gate.test:open.intent"]).skill_id == "doors.test"
        assert understand("open the gate", blacklisted_skills=["gate.test", "doors.test"]) is None


def test_excluded_words_rule_an_intent_out(register, understand) -> None:
    register("turn {what} on", blacklisted_words=["Radio"])
    assert understand("turn the light on")
    assert understand("turn the radio on") is None
    assert understand("turn the radiology on")


def test_fifty_words_are_too_many(register, understand) -> None:
    register("say {anything}")
    assert understand("say " + "x " * 48)
    assert understand("say " + "x " * 49) is None
    assert understand("say " + "x" * 2000) is None


def test_training_is_answered_with_all_that_was_registered(bus, register, understand) -> None:
    register("what time is it")
    assert bus.wait_for_response(Message("mycroft.skills.train"), "mycroft.skills.trained", timeout=1)
    assert understand("what time is it")


def test_detached_intents_and_skills_are_gone(bus, register, understand) -> None:
    register("one")
    register("two", name=f"{SKILL}:two.intent")
    bus.emit(Message("detach_intent", {"intent_name": ASK}))
    assert understand("one") is None
    assert understand("two")
    bus.emit(Message("detach_skill", {"skill_id": SKILL}))
    assert understand("two") is None
    register("one")
    assert understand("one")


@pytest.mark.parametrize(
    "broken",
    [{}, {"name": ASK}, {"name": ASK, "samples": None}, {"name": None, "samples": []}, {"name": ASK, "samples": [1]}],
)
def test_a_broken_registration_harms_no_other(bus, register, understand, broken: dict[str, Any]) -> None:
    bus.emit(Message("padatious:register_intent", broken))
    register("{twice} and {twice}", name=f"{SKILL}:twice.intent")
    bus.emit(Message("detach_intent", {}))
    register("still here")
    assert understand("still here")


def test_languages_are_kept_apart(bus: FakeBus, monkeypatch: pytest.MonkeyPatch) -> None:
    languages = {"lang": "en-us", "secondary_langs": ["de-de"]}
    monkeypatch.setattr(Configuration, "load_all_configs", lambda *_: PIPELINE | languages)
    plugin = Intents(bus)
    for lang, sample in (("en-us", "hello"), ("de-de", "hallo"), ("fr-fr", "bonjour")):
        bus.emit(Message("padatious:register_intent", {"name": ASK, "samples": [sample], "lang": lang}))
    message = Message("", {}, {"session": {"session_id": "s"}})

    def understood(utterance: str, lang: str) -> bool:
        return plugin.match_high([utterance], lang, message) is not None

    assert understood("hello", "en-GB")
    assert understood("hallo", "de-AT")
    assert not understood("hello", "de-DE")
    assert not understood("bonjour", "fr-FR")
    plugin.shutdown()


def test_nothing_is_heard_after_shutdown(bus, intents: Intents, register, understand) -> None:
    intents.shutdown()
    register("what time is it")
    assert understand("what time is it") is None


def test_where_padatious_is_in_the_pipeline_it_trains_by_itself(bus: FakeBus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Configuration, "load_all_configs", lambda *_: {"intents": {"pipeline": ["padatious_high"]}})
    plugin = Intents(bus)
    answers: list[Message] = []
    bus.on("mycroft.skills.trained", answers.append)
    bus.emit(Message("mycroft.skills.train"))
    plugin.shutdown()
    assert answers == []
