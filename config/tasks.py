"""How background tasks are ended."""

from __future__ import annotations

import asyncio
from typing import Any

_AGAIN = 5.0
"""Seconds that a task has for its cleaning up, before it is taken not to have noticed."""


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
