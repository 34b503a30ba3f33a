"""Tasks end when they are told to, also those that did not hear it the first time."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from agentvoicebox.config import tasks


async def test_tasks_are_over_when_it_returns() -> None:
    cleaned: list[int] = []

    async def work(number: int) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.01)
            cleaned.append(number)

    working = [asyncio.create_task(work(number)) for number in range(3)]
    await asyncio.sleep(0)
    await tasks.end(*working)
    assert sorted(cleaned) == [0, 1, 2]
    assert all(task.cancelled() for task in working)


async def test_one_that_has_swallowed_it_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_AGAIN", 0.01)

    async def deaf() -> None:
        for _ in range(2):
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)
        await asyncio.sleep(3600)

    working = asyncio.create_task(deaf())
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await tasks.end(working)
    assert working.cancelled()


async def test_how_it_ended_does_not_matter() -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    async def work() -> None:
        return None

    working = [asyncio.create_task(fail()), asyncio.create_task(work())]
    await asyncio.wait(working)
    await tasks.end(*working)
    await tasks.end()
    assert isinstance(working[0].exception(), ZeroDivisionError)


async def test_whoever_waits_can_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_AGAIN", 3600)
    release = asyncio.Event()

    async def stubborn() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            await release.wait()

    working = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    ending = asyncio.create_task(tasks.end(working))
    await asyncio.sleep(0)
    ending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ending
    release.set()
    await asyncio.wait([working])
