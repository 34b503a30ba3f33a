"""What one socket may send: who sends more is read more slowly, and loses nothing."""

from __future__ import annotations


class Budget:
    """`burst` at once, then `rate` a second. Beyond that the reader rests, and so the client has to."""

    __slots__ = ("_empty", "_interval", "_window")

    def __init__(self, rate: float, burst: float) -> None:
        self._interval = 1 / rate
        self._window = burst / rate
        self._empty = 0.0

    def spend(self, now: float, amount: float = 1) -> float:
        """Count what was read at `now` (seconds, monotonic); the seconds to rest before the next read, or 0."""
        self._empty = max(self._empty, now) + amount * self._interval
        return max(0.0, self._empty - now - self._window)
