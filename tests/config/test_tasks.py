"""Tasks end when they are told to, also those that did not hear it the first time; what fails is told of."""

from __future__ import annotations

import asyncio
import re
import time
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
    async with asyncio.timeout(20):
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


async def test_one_that_fails_is_told_of_at_once_without_what_it_has_read(caplog: pytest.LogCaptureFixture) -> None:
    async def read() -> None:
        raise ValueError("my cat is called Schroedinger")

    await asyncio.wait([tasks.begin(read(), "reader")])
    await asyncio.sleep(0)
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    told = r"the background task reader has failed: ValueError at config/test_tasks\.py:\d+"
    assert re.fullmatch(told, record.getMessage())
    assert record.exc_info is None


async def test_one_that_is_ended_or_has_done_its_work_is_not_told_of(caplog: pytest.LogCaptureFixture) -> None:
    working = tasks.begin(asyncio.sleep(3600, "late"), "late")
    assert await tasks.begin(asyncio.sleep(0, "done"), "quick") == "done"
    await tasks.end(working)
    await asyncio.sleep(0)
    assert working.cancelled()
    assert caplog.records == []


async def test_what_is_waited_for_may_answer_fail_or_take_too_long() -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    waiting = asyncio.create_task(asyncio.sleep(3600))
    assert await tasks.within(60, asyncio.sleep(0, "answer")) == "answer"
    with pytest.raises(ZeroDivisionError):
        await tasks.within(60, fail())
    with pytest.raises(TimeoutError):
        await tasks.within(0.01, waiting)
    assert waiting.cancelled()


async def test_whoever_has_stood_still_himself_blames_nobody() -> None:
    """As when a virtual machine is moved: what was to come in the meantime could not, or could not be looked at."""
    answer = asyncio.Event()
    asyncio.get_running_loop().call_later(0.3, answer.set)
    waiting = asyncio.create_task(tasks.within(0.25, answer.wait()))
    await asyncio.sleep(0)
    time.sleep(0.4)  # noqa: ASYNC251  (all of it stands still)
    assert await waiting


async def test_whoever_waits_and_is_cancelled_leaves_nothing_behind() -> None:
    work = asyncio.create_task(asyncio.sleep(3600))
    waiting = asyncio.create_task(tasks.within(60, work))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert work.cancelled()
