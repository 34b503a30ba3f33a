"""How background tasks begin and end, and how others are waited for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

from agentvoicebox.config.errors import unexpected

log = logging.getLogger(__name__)
Result = TypeVar("Result")

_STEP = 0.1
"""Seconds between looks whether something is there: of a step that took far longer, no more than two count."""

_AGAIN = 5.0
"""Seconds that a task has for its cleaning up, before it is taken not to have noticed."""


def begin(work: Coroutine[Any, Any, Result], name: str) -> asyncio.Task[Result]:
    """Start a task that nobody awaits before it is ended. If it fails by then, that is logged at once."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_ended)
    return task


def _ended(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("the background task %s has failed: %s", task.get_name(), unexpected(error))


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel the tasks and return when they are over, however they ended.

    One `cancel` is not always enough: where a wait ends in the same moment, the task may never hear of it, and goes on.
    So they are told every 5 s; what may take longer to clean up is not to be ended with this.
    """
    left = [task for task in tasks if not task.done()]
    while left:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=_AGAIN)
        left = [task for task in left if not task.done()]
    await asyncio.gather(*tasks, return_exceptions=True)


async def within(seconds: float, work: Awaitable[Result]) -> Result:
    """What `work` returns or raises, or `TimeoutError` after so many seconds, when it is cancelled.

    Only time in which this process has run counts: whoever has stood still himself blames nobody.
    """
    task, loop = asyncio.ensure_future(work), asyncio.get_running_loop()
    try:
        while not task.done():
            if seconds <= 0:
                raise TimeoutError
            before = loop.time()
            await asyncio.wait([task], timeout=min(seconds, _STEP))
            seconds -= min(loop.time() - before, 2 * _STEP)
        return task.result()
    finally:
        if not task.done():
            await end(task)
