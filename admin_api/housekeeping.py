"""What a node does by itself now and then. Every task may run on several nodes at once, and again after any crash."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from agentvoicebox.config.errors import AvbError
from agentvoicebox.config.tasks import begin, end

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to do every so many seconds, first soon after the start."""

    name: str
    every: float
    run: Callable[[], Awaitable[object]]


class Housekeeping:
    """Runs tasks side by side until it is closed; what fails is logged and tried again in its turn."""

    def __init__(self, *tasks: Task) -> None:
        self._tasks = tasks
        self._running: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin."""
        self._running = [begin(_repeat(task), task.name) for task in self._tasks]

    async def close(self) -> None:
        """Stop, in the middle if need be: tasks are transactions."""
        await end(*self._running)
        self._running = []


async def _repeat(task: Task) -> None:
    while True:
        try:
            await task.run()
        except AvbError as error:
            log.warning("%s did not work, and is tried again in %.0f s: %s", task.name, task.every, error.message)
        except Exception:
            log.exception("%s failed, and is tried again in %.0f s", task.name, task.every)
        await asyncio.sleep(task.every)
