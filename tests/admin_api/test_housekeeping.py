"""What a node does now and then goes on, whatever becomes of one run."""

from __future__ import annotations

import asyncio
import logging

import pytest

from agentvoicebox.admin_api.housekeeping import Housekeeping, Task
from agentvoicebox.config.errors import Unavailable


async def test_a_task_that_fails_is_tried_again_and_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    runs = {"well": 0, "ill": 0, "away": 0}
    enough = asyncio.Event()

    async def well() -> None:
        runs["well"] += 1

    async def ill() -> None:
        runs["ill"] += 1
        raise ZeroDivisionError

    async def away() -> None:
        runs["away"] += 1
        if min(runs.values()) >= 3:
            enough.set()
        raise Unavailable("The store is away.")

    keeping = Housekeeping(Task("well", 0.001, well), Task("ill", 0.001, ill), Task("away", 0.001, away))
    with caplog.at_level(logging.WARNING):
        keeping.start()
        await asyncio.wait_for(enough.wait(), 30)
        await keeping.close()
    assert "The store is away." in caplog.text
    assert "ZeroDivisionError" in caplog.text
    seen = dict(runs)
    await asyncio.sleep(0.01)
    assert runs == seen, "closed is closed"
