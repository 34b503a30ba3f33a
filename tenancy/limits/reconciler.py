"""Tells nodes of one another's decisions, a few times a second and in one call."""

from __future__ import annotations

import asyncio
import itertools
import logging

from agentvoicebox.config.errors import Unavailable
from agentvoicebox.config.tasks import begin, end
from agentvoicebox.tenancy.limits.limiter import Limiter
from agentvoicebox.tenancy.state import SharedState

INTERVAL = 0.1
"""Seconds between two calls."""

_log = logging.getLogger(__name__)


class Reconciler:
    """Keeps one limiter in step with those of other nodes. Without the state the limiter decides on by itself."""

    def __init__(self, limiter: Limiter, state: SharedState, interval: float = INTERVAL) -> None:
        self._limiter = limiter
        self._state = state
        self._interval = interval
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin."""
        self._task = begin(self._run(), "rates")

    async def close(self) -> None:
        """Tell the last, and end."""
        if self._task is not None:
            await end(self._task)
            self._task = None
            await self.once()

    async def once(self) -> None:
        """Tell and learn, if there is something to tell."""
        if self._state.degraded:
            self._note(True)
            return
        collected = self._limiter.collect()
        if not collected:
            self._note(False)
            return
        try:
            standings = await self._state.reconcile([use for told in collected for use in told.uses])
        except BaseException as error:
            self._limiter.give_back(collected)
            if not isinstance(error, Unavailable):
                raise
            self._note(True)
            return
        self._note(False)
        ends = itertools.accumulate(len(told.uses) for told in collected)
        self._limiter.learn([(told, standings[end - 1]) for told, end in zip(collected, ends, strict=True)])

    def _note(self, degraded: bool) -> None:
        if degraded and not self._limiter.degraded:
            _log.warning("rates_local: the shared state is away; this node holds everybody to the whole rate by itself")
        elif self._limiter.degraded and not degraded:
            _log.info("rates_shared: the shared state is back")
        self._limiter.degraded = degraded

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            try:
                await self.once()
            except Exception:
                _log.exception("rates_not_reconciled")
                self._limiter.degraded = True
