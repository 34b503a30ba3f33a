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


async def test_it_can_be_switched_off(bus) -> None:
    assert (await bus.say("who are you", {"blacklisted_skills": [ACCOUNT]})).skill != ACCOUNT
