"""The account skill, on a real stock core."""

from __future__ import annotations

import pytest

ACCOUNT = "skill-account.agentvoicebox"


@pytest.mark.parametrize(
    "utterance",
    ["who am I talking to", "Who are you?", "what's your name", "What is your name?", "which account is this"],
)
async def test_it_names_persona_and_tenant(bus, utterance: str) -> None:
    turn = await bus.say(utterance, tenant_name="Blue Harbour", persona_name="Marina")
    assert turn.skill == ACCOUNT
    assert "Blue Harbour" in turn.spoken
    assert "Marina" in turn.spoken


@pytest.mark.parametrize("missing", ["tenant_id", "tenant_name", "persona_name"])
async def test_without_a_whole_tenant_it_names_nobody(bus, missing: str) -> None:
    turn = await bus.say("who are you", **{missing: None})
    assert turn.spoken == "I do not know this account."


async def test_names_are_said_as_they_are(bus) -> None:
    """OVOS would choose one of "(a|b)" and, with enough of them, be busy for ever."""
    name, persona = "Acme [now] (UK|US) {persona} %s", "(a|b)" * 40
    turn = await bus.say("who are you", tenant_name=name, persona_name=persona)
    assert name in turn.spoken
    assert persona in turn.spoken


@pytest.mark.parametrize(
    ("utterance", "said"),
    [
        ("what plan do I have", "I cannot look that up right now."),
        ("How much of my plan is left?", "I cannot look that up right now."),
        ("how many minutes do we have left", "I cannot look that up right now."),
        ("switch the assistant to Ada", "I cannot look that up right now."),
        ("which personas are there", "There is nobody else to talk to. I am Ada."),
        ("change persona", "There is nobody else to talk to. I am Ada."),
    ],
)
async def test_without_a_node_it_says_so(bus, utterance: str, said: str) -> None:
    turn = await bus.say(utterance)
    assert turn.skill == ACCOUNT
    assert turn.spoken.startswith(said)


@pytest.mark.parametrize(
    "utterance", ["talk to Ada", "switch to Ada", "talk to me about plans", "how much is left of the cake"]
)
async def test_what_may_mean_something_else_is_left_to_others(bus, utterance: str) -> None:
    assert (await bus.say(utterance)).skill != ACCOUNT


async def test_it_can_be_switched_off(bus) -> None:
    assert (await bus.say("who are you", {"blacklisted_skills": [ACCOUNT]})).skill != ACCOUNT
