"""One turn on a real stock core, as the bridge will see it."""

from __future__ import annotations

import asyncio
import re

import pytest

CLOCK = "ovos-skill-date-time.openvoiceos"
UNKNOWN = "ovos-skill-fallback-unknown.openvoiceos"
KEYS = ("tenant_id", "tenant_name", "persona_name", "avb_session", "avb_turn")


@pytest.mark.parametrize(
    ("utterance", "skill"),
    [
        ("what time is it", CLOCK),
        ("What's the time?", CLOCK),
        ("what time is it in Paris", CLOCK),
        ("thank you", "ovos-skill-hello-world.openvoiceos"),
        ("How are you?", "ovos-skill-hello-world.openvoiceos"),
        ("count to one", "ovos-skill-count.openvoiceos"),
        ("Did you hear me?", "ovos-skill-parrot.openvoiceos"),
        ("who are you", "skill-account.agentvoicebox"),
        ("colorless green ideas", UNKNOWN),
    ],
)
async def test_every_skill_answers_offline(bus, utterance: str, skill: str) -> None:
    turn = await bus.say(utterance)
    assert turn.skill == skill
    assert turn.spoken


async def test_the_story_of_a_turn_that_a_skill_answers(bus) -> None:
    turn = await bus.say("who are you")
    assert turn.types == [
        "recognizer_loop:utterance",
        "skill-account.agentvoicebox.activate",
        "skill-account.agentvoicebox:who.intent",
        "mycroft.skill.handler.start",
        "speak",
        "mycroft.skill.handler.complete",
        "ovos.utterance.handled",
    ]


async def test_the_story_of_a_turn_that_falls_back(bus) -> None:
    turn = await bus.say("colorless green ideas")
    assert turn.types == [
        "recognizer_loop:utterance",
        "ovos.skills.fallback.ping",
        "ovos.skills.fallback.pong",
        f"ovos.skills.fallback.{UNKNOWN}.request",
        f"ovos.skills.fallback.{UNKNOWN}.start",
        "speak",
        f"ovos.skills.fallback.{UNKNOWN}.response",
        "ovos.utterance.handled",
    ]


async def test_the_story_of_a_turn_that_nobody_answers(bus) -> None:
    turn = await bus.say("colorless green ideas", {"blacklisted_skills": [UNKNOWN]})
    assert turn.types == [
        "recognizer_loop:utterance",
        "mycroft.audio.play_sound",
        "complete_intent_failure",
        "ovos.utterance.handled",
    ]


@pytest.mark.parametrize("utterance", ["what time is it", "who are you", "colorless green ideas", "count to one"])
async def test_every_message_of_a_turn_carries_its_keys(bus, utterance: str) -> None:
    turn = await bus.say(utterance, {"session_id": "keys"}, tenant_id="acme", tenant_name="Acme", persona_name="Ada")
    first = turn.messages[0]["context"]
    for message in turn.messages:
        assert [message["context"].get(key) for key in KEYS] == [first[key] for key in KEYS], message["type"]
        assert message["context"]["session"]["session_id"] == "keys", message["type"]
    # What a skill emits without the message at hand has lost both and belongs to nobody.
    assert {other["context"]["session"]["session_id"] for other in turn.others} <= {"default"}
    assert not any(key in other["context"] for other in turn.others for key in KEYS)


async def test_a_blacklisted_skill_does_not_answer(bus) -> None:
    assert (await bus.say("what time is it")).skill == CLOCK
    turn = await bus.say("what time is it", {"blacklisted_skills": [CLOCK]})
    assert turn.skill == UNKNOWN
    assert not any(CLOCK in kind for kind in turn.types)


async def test_a_blacklisted_intent_is_not_taken(bus) -> None:
    turn = await bus.say("what time is it", {"blacklisted_intents": [f"{CLOCK}:what.time.is.it.intent"]})
    assert turn.skill == UNKNOWN


async def test_blacklists_of_interleaved_sessions_do_not_mix(cell, connect) -> None:
    async def talk(name: str, refused: list[str], expected: str) -> None:
        async with connect(cell.url) as bus:
            for _ in range(8):
                turn = await bus.say("what time is it", {"session_id": name, "blacklisted_skills": refused})
                assert turn.skill == expected

    await asyncio.gather(talk("free", [], CLOCK), talk("bound", [CLOCK], UNKNOWN), talk("other", [UNKNOWN], CLOCK))


async def test_handlers_that_wait_stop_nobody_else(bus) -> None:
    """Stock core has a pool of cpu + 4 threads for everything; twelve sessions that wait for playback would fill it."""
    waiting = {await bus.ask("say hello", {"session_id": f"waits-{number}"}) for number in range(12)}

    async def until(kind: str) -> None:
        seen: set[str] = set()
        async with asyncio.timeout(60):
            while seen != waiting:
                message = await bus.receive()
                if message["type"] == kind:
                    seen.add(message["context"]["avb_turn"])

    await until("speak")
    turn = await bus.say("who are you")
    assert "ovos.utterance.handled" not in [other["type"] for other in turn.others]
    for number in range(12):
        session = {"session_id": f"waits-{number}"}
        await bus.send("recognizer_loop:audio_output_end", {}, {"session": session})
    await until("ovos.utterance.handled")


@pytest.mark.parametrize("utterance", ["in a " * 16, "(a|b) " * 100, "x" * 100_000, "when what who " * 100])
async def test_no_utterance_keeps_core_busy(bus, utterance: str) -> None:
    """Stock Adapt needs hours for the first, with a regular expression that the date-time skill brings along."""
    assert (await bus.say(utterance)).skill == UNKNOWN


async def test_brackets_in_what_is_said_keep_nobody_busy(bus) -> None:
    """Stock core expands them, when a skill repeats them, into two to the power of their number sentences."""
    said, session = "(a|b) " * 40, {"session_id": "brackets"}
    await bus.say(said, session)
    turn = await bus.say("what did i say", session)
    assert turn.skill == "ovos-skill-parrot.openvoiceos"
    assert re.findall(r"\b[ab]\b", turn.spoken) == ["a", "b"] * 40


async def test_a_forgotten_session_can_come_back(bus) -> None:
    session = {"session_id": "forgotten", "blacklisted_skills": [CLOCK]}
    assert (await bus.say("what time is it", session)).skill == UNKNOWN
    await bus.send("avb.session.forget", {"session_id": "forgotten"}, {})
    assert (await bus.say("what time is it", session | {"blacklisted_skills": []})).skill == CLOCK


async def test_the_log_holds_nothing_that_was_said(bus, cell) -> None:
    await bus.say("what time is it in Ouagadougou")
    await bus.say("xylophone unicorns")
    logs = "".join(log.read_text() for log in (cell.directory / "logs").iterdir())
    assert "ouagadougou" not in logs.lower()
    assert "xylophone" not in logs
