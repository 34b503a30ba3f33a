"""Dialogues of stock skills over several turns: a skill asks back, and a skill takes over the conversation."""

from __future__ import annotations

from typing import Any

from agentvoicebox.bus_bridge import client
from agentvoicebox.bus_bridge.bus import MOST_ABANDONED


async def test_a_skill_asks_back_and_hears_the_reply(stack: Any, customer: Any):
    async with client.session(stack.url, customer.key, {"modality": "text"}) as session:
        asked = await session.write("what time is it in springfield")
        assert asked.text.startswith("Did you mean")
        again = await session.write("yes")
        assert again.text == asked.text, "the reply reached the skill, which asks a second time"
        last = await session.write("no")
        assert last.error is None
        assert last.text
        assert "Ada" in (await session.write("who am i talking to")).text, "and it does not wait any more"


async def test_dialogues_with_several_questions_leave_nothing_behind(stack: Any, customer: Any):
    """Core ends such a dialogue with its first question: the replies in between are not left over for it to work on."""
    for _ in range(MOST_ABANDONED + 1):
        async with client.session(stack.url, customer.key, {"modality": "text"}) as session:
            for text in ("what time is it in springfield", "yes", "no"):
                assert (await session.write(text)).error is None


async def test_a_spoken_dialogue_waits_for_playback(stack: Any, customer: Any, speech: Any):
    """The skill waits until its question has been played; without word of that it would listen 15 seconds later."""
    async with client.session(stack.url, customer.key, {"input_rate": 16000}) as session:
        asked = await session.write("what time is it in springfield")
        assert asked.text.startswith("Did you mean")
        assert asked.audio_seconds > 1
        heard = await session.say(speech("no"), 16_000)
        assert heard.error is None
        assert heard.text


async def test_a_skill_that_converses_keeps_the_conversation(stack: Any, customer: Any):
    async with client.session(stack.url, customer.key, {"modality": "text"}) as session:
        assert (await session.write("start parrot mode")).text
        assert (await session.write("polly wants a cracker")).text == "polly wants a cracker"
        await session.write("stop parrot")
        assert "cracker" not in (await session.write("who am i talking to")).text


async def test_a_skill_that_cannot_converse_is_not_waited_for(stack: Any, customer: Any, wiretap: Any):
    """Stock core waits half a second, on every further turn, for the word of skills that never give one."""
    async with wiretap() as wire, client.session(stack.url, customer.key, {"modality": "text"}) as session:
        for _ in range(3):
            await session.write("what time is it")
    asked = [message["type"] for message in wire.messages if message["type"].endswith(".converse.ping")]
    assert asked == []
