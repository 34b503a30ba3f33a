"""Who may put an utterance to core next. Pure.

Core matches fastest with one utterance at a time (106 a second against 71 with eight in flight), so a cell takes one,
and tenants take turns: one tenant's hundred utterances delay another's first by at most one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class Turnstile:
    """Lets `width` turns in at a time. `enter` calls `go` at once or when its turn has come."""

    __slots__ = ("_inside", "_queues", "_width")

    def __init__(self, width: int = 1) -> None:
        self._width = width
        self._inside: set[str] = set()
        self._queues: dict[str, deque[tuple[str, Callable[[], None]]]] = {}

    @property
    def inside(self) -> frozenset[str]:
        """The turns that are in."""
        return frozenset(self._inside)

    @property
    def waiting(self) -> bool:
        """Whether anybody has to wait."""
        return bool(self._queues)

    def enter(self, tenant_id: str, turn_id: str, go: Callable[[], None]) -> None:
        """Queue a turn of a tenant."""
        if len(self._inside) < self._width:
            self._inside.add(turn_id)
            go()
            return
        self._queues.setdefault(tenant_id, deque()).append((turn_id, go))

    def leave(self, turn_id: str) -> bool:
        """The turn is through, or does not want to go in any more; returns whether it was still waiting."""
        if turn_id in self._inside:
            self._inside.discard(turn_id)
            self._admit()
            return False
        for tenant_id, queue in self._queues.items():
            kept = deque(entry for entry in queue if entry[0] != turn_id)
            if len(kept) != len(queue):
                if kept:
                    self._queues[tenant_id] = kept
                else:
                    del self._queues[tenant_id]
                return True
        return False

    def clear(self) -> None:
        """Forget everybody: there is nothing behind the turnstile any more."""
        self._inside.clear()
        self._queues.clear()

    def _admit(self) -> None:
        while self._queues and len(self._inside) < self._width:
            # The tenant at the front gives one turn and goes to the back.
            tenant_id = next(iter(self._queues))
            queue = self._queues.pop(tenant_id)
            turn_id, go = queue.popleft()
            if queue:
                self._queues[tenant_id] = queue
            self._inside.add(turn_id)
            go()
