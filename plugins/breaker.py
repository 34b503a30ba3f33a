"""A circuit breaker: what keeps failing is left alone for a while, and then tried by one before all come back."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

from agentvoicebox.config.errors import Unavailable

FAILURES, WINDOW = 5, 30.0
"""So many failures within so many seconds open it."""

REST = 30.0
"""Seconds that it stays open, and that a probe may take before another one is let through."""


class Breaker:
    """Closed, open, then half-open, where one probe decides. A success forgives the latest failure: of an engine that
    serves the many, one caller whose every call fails does not lock out the others. Has no lock: for one thread.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: deque[float] = deque(maxlen=FAILURES)
        self._opened: float | None = None
        self._probe = -math.inf

    @property
    def state(self) -> Literal["closed", "open", "half_open"]:
        """Whether all, none or one is let through."""
        if self._opened is None:
            return "closed"
        return "open" if self._clock() - self._opened < REST else "half_open"

    def admit(self) -> None:
        """Let a call through, or raise `Unavailable` with the code `circuit_open` and the seconds left.

        In the half-open state one call at a time is admitted; it has to say how it ended.
        """
        if self._opened is None:
            return
        now = self._clock()
        left = max(self._opened, self._probe) + REST - now
        if left > 0:
            raise Unavailable(
                f"This service failed {FAILURES} times and is left alone for {math.ceil(left)} s: try again then.",
                code="circuit_open",
            )
        self._probe = now

    def succeeded(self) -> None:
        """A call that was admitted was answered."""
        if self.state == "half_open":
            self._opened, self._probe = None, -math.inf
            self._failures.clear()
        elif self._opened is None and self._failures:
            self._failures.pop()

    def failed(self) -> None:
        """A call that was admitted was not answered."""
        now = self._clock()
        self._failures.append(now)
        full = len(self._failures) == FAILURES and now - self._failures[0] <= WINDOW
        if self.state == "half_open" or (self._opened is None and full):
            self._opened, self._probe = now, -math.inf

    def undecided(self) -> None:
        """A call that was admitted ended in a way that says nothing of the service: the next one may probe."""
        self._probe = -math.inf
