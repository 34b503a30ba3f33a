"""What clients see when a part goes away, and that the next turn works."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest

from agentvoicebox.bus_bridge import client
from agentvoicebox.config.errors import Unavailable
from agentvoicebox.tenancy import metering
from agentvoicebox.tenancy.models import Metric


async def ready_again(stack: Any, customer: Any, question: str = "who am i talking to") -> client.Answer:
    """Ask until it is answered, as a patient user would."""
    async with asyncio.timeout(120):
        while True:
            async with client.session(stack.url, customer.key, {"modality": "text"}) as session:
                answer = await session.write(question)
            if answer.error is None:
                return answer
            await asyncio.sleep(0.1)


@pytest.mark.parametrize(
    ("process", "number"), [("core", signal.SIGKILL), ("messagebus", signal.SIGKILL), ("core", signal.SIGSTOP)]
)
async def test_a_cell_that_dies_in_a_turn_is_told_and_replaced(
    stack: Any, customer: Any, process: str, number: signal.Signals
):
    cell = stack.cells["cell-1"]
    before = dict(cell.pids)
    async with client.session(stack.url, customer.key, {"modality": "text"}) as session:
        os.kill(cell.pids[process], signal.SIGSTOP)  # so that the turn is surely under way
        asking = asyncio.create_task(session.write("who am i talking to"))
        await asyncio.sleep(0.1)
        os.kill(before[process], number)
        async with asyncio.timeout(30):
            answer = await asking
        assert answer.error is not None
        assert answer.error["code"] == "cell_lost"
        assert answer.error["message"]
    answer = await ready_again(stack, customer)
    assert "Ada" in answer.text
    assert cell.pids != before


async def test_a_store_that_stops_refuses_and_meters_nothing_by_half(stack: Any, new_customer: Any, speech: Any):
    customer = await new_customer()
    pcm = speech("who am i talking to")
    async with client.session(stack.url, customer.key, {"input_rate": 16000}) as session:
        first = await session.say(pcm, 16_000)
        assert first.error is None
        before = await metering.totals(stack.database, customer.id)
        pids = stack.postgres.pids()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            answer = await session.say(pcm, 16_000)
            assert answer.error is not None
            assert answer.error["code"] == "store_unavailable"
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        third = await session.say(pcm, 16_000)
        assert third.error is None, "and the next turn works"
    after = await metering.totals(stack.database, customer.id)
    turns = {metric: after[metric] - before[metric] for metric in after}
    # A stopped store may have taken the whole of the unconfirmed turn, or none of it, but never a part.
    spoken = turns[Metric.TTS_AUDIO_SECONDS]
    whole = third.audio_seconds + answer.audio_seconds
    assert spoken == pytest.approx(third.audio_seconds, abs=0.01) or spoken == pytest.approx(whole, abs=0.01)
    heard = before[Metric.STT_AUDIO_SECONDS]
    count = round(spoken / third.audio_seconds)
    assert turns[Metric.STT_AUDIO_SECONDS] == pytest.approx(count * heard, rel=0.2)


async def test_a_store_that_crashes_comes_back(stack: Any, customer: Any):
    os.kill(stack.postgres.pids()[0], signal.SIGKILL)
    async with asyncio.timeout(60):
        while True:
            try:
                await metering.totals(stack.database, customer.id)
                break
            except Unavailable:
                await asyncio.sleep(0.1)
    answer = await ready_again(stack, customer)
    assert answer.text
