"""Two tenants speak at once to one stock stack; somebody listens to every message on its bus."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
from websockets.asyncio.client import connect

from agentvoicebox.bus_bridge import client
from agentvoicebox.tenancy import metering
from agentvoicebox.tenancy.models import Metric

DATE_TIME = "ovos-skill-date-time.openvoiceos"
HOUR = re.compile(r"\b(one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|noon|midnight)\b")
"""What every time of day has in it, as it is spoken."""


async def converse(stack: Any, customer: Any, pcm: bytes, turns: int) -> list[client.Answer]:
    async with client.session(stack.url, customer.key, {"input_rate": 16000}) as session:
        return [await session.say(pcm, 16_000) for _ in range(turns)]


async def test_each_hears_only_its_own_and_pays_for_it(stack: Any, new_customer: Any, speech: Any, wiretap: Any):
    ada = await new_customer(voice="slt", persona_name="Ada")
    max_ = await new_customer(voice="rms", persona_name="Max", disabled_skills=(DATE_TIME,))
    async with wiretap() as wire:
        mine, theirs = await asyncio.gather(
            converse(stack, ada, speech("who am i talking to"), 3),
            converse(stack, max_, speech("who am i talking to"), 3),
        )
    for answers, name, other in ((mine, ada.name, max_.name), (theirs, max_.name, ada.name)):
        for answer in answers:
            assert answer.transcript == "who am i talking to"
            assert name in answer.text
            assert other not in answer.text
            assert answer.audio_seconds > 0.5
    assert bytes(mine[0].audio) != bytes(theirs[0].audio), "each in its own voice"

    tenants = {str(ada.id): set(), str(max_.id): set()}
    for message in wire.messages:
        context = message.get("context", {})
        session = context.get("session", {}).get("session_id", "default")
        if session.startswith("avb:"):
            assert context["tenant_id"] in tenants, message["type"]
            assert context["avb_session"] == session, message["type"]
            tenants[context["tenant_id"]].add(session)
        else:
            # What has lost its session has lost its way: it must not say anything of anybody's.
            assert message["type"] != "speak"
            assert "tenant_id" not in context
    assert [len(sessions) for sessions in tenants.values()] == [1, 1], "one session each, never each other's"
    assert not set.intersection(*tenants.values())

    for customer, answers in ((ada, mine), (max_, theirs)):
        used = await metering.totals(stack.database, customer.id)
        assert used[Metric.TTS_AUDIO_SECONDS] == pytest.approx(sum(a.audio_seconds for a in answers), abs=0.01)
        heard = [answer.heard_seconds for answer in answers]
        assert all(0.8 < seconds < 4 for seconds in heard)
        assert used[Metric.STT_AUDIO_SECONDS] == pytest.approx(sum(heard), abs=0.01)


async def test_a_skill_that_one_tenant_has_switched_off_answers_the_other(stack: Any, new_customer: Any, speech: Any):
    with_clock = await new_customer()
    without = await new_customer(disabled_skills=(DATE_TIME,))
    pcm = speech("what time is it")
    (told,), (not_told,) = await asyncio.gather(converse(stack, with_clock, pcm, 1), converse(stack, without, pcm, 1))
    assert told.transcript == not_told.transcript == "what time is it"
    assert HOUR.search(told.text), told.text
    assert not_told.text
    assert not HOUR.search(not_told.text), not_told.text
    assert not_told.error is None


async def test_a_forged_message_reaches_nobody(stack: Any, new_customer: Any):
    """A message that names one tenant's session and another tenant, or no turn, goes to nobody."""
    victim, thief = await new_customer(), await new_customer()
    cell = stack.cells["cell-1"]
    async with (
        client.session(stack.url, victim.key, {"modality": "text"}) as session,
        connect(cell.url, compression=None, proxy=None) as bus,
    ):
        await session.write("who am i talking to")
        (line,) = [
            line for line in stack.gateway.cells.of(str(victim.id))._lines.values() if line.tenant_id == str(victim.id)
        ]
        good = {
            "avb_session": line.id,
            "avb_turn": line.turn_id,
            "tenant_id": line.tenant_id,
            "session": {"session_id": line.id},
        }
        forged = [
            good | {"tenant_id": str(thief.id)},
            good | {"session": {"session_id": "default"}},
            good | {"session": {"session_id": "avb:other"}},
            good | {"avb_turn": ""},
            good | {"avb_turn": 5},
            {name: value for name, value in good.items() if name != "tenant_id"},
            {name: value for name, value in good.items() if name != "avb_session"},
        ]
        for context in forged:
            await bus.send(json.dumps({"type": "speak", "data": {"utterance": "leak"}, "context": context}))
        await bus.send(json.dumps({"type": "speak", "data": {"utterance": "a reminder"}, "context": good}))
        await session.socket.recv()  # opening frames, then only the honest one
        heard = ""
        while "response.done" not in heard:
            heard = await asyncio.wait_for(session.socket.recv(), 10)
            assert "leak" not in heard
        assert "a reminder" in heard
