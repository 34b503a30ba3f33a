"""Which engines may stay in memory: those used last, as many as the budget holds. Arithmetic over their sizes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from agentvoicebox.config.errors import Unavailable

Key = TypeVar("Key", bound=Hashable)

LEAST = 8 * 1024 * 1024
"""Bytes that any engine counts for: its threads and connections, also when its model is elsewhere."""


class Memory(Generic[Key]):
    """What is held, the one used longest ago first. `most` is the budget in bytes."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._held: OrderedDict[Key, int] = OrderedDict()
        self._pinned: set[Key] = set()

    @property
    def held(self) -> int:
        """Bytes of all that is held."""
        return sum(self._held.values())

    def size(self, key: Key) -> int:
        """Bytes that it is held with; 0 when it is not."""
        return self._held.get(key, 0)

    def hold(self, key: Key, size: int) -> None:
        """It is, or is about to be, in memory; again to correct its size, or because it is used."""
        self._held[key] = max(size, LEAST)
        self._held.move_to_end(key)

    def touch(self, key: Key) -> None:
        """It is used."""
        if key in self._held:
            self._held.move_to_end(key)

    def pin(self, key: Key) -> None:
        """It stays, once it is here, whatever comes."""
        self._pinned.add(key)

    def forget(self, key: Key) -> None:
        """It is no longer in memory."""
        self._held.pop(key, None)

    def check(self, key: Key, size: int) -> None:
        """Raise `Unavailable` if `size` bytes for `key` would not fit beside those that stay, whoever else left."""
        staying = sum(held for other, held in self._held.items() if other in self._pinned and other != key)
        if staying + max(size, LEAST) > self.most:
            raise Unavailable(
                f"No room for this speech engine: it needs {_mib(size)} MiB, of {_mib(self.most)} others keep "
                f"{_mib(staying)}. Raise AVB_SPEECH_MEMORY (in MiB), or choose a smaller model.",
                code="engines_full",
            )

    def leaving(self, size: int, busy: Callable[[Key], bool]) -> list[Key] | None:
        """Who has to leave, the one used longest ago first, so that `size` more bytes fit: nobody, some, or None when
        one that is busy has to come to rest first.
        """
        excess = self.held + size - self.most
        found: list[Key] = []
        for key, held in self._held.items():
            if excess <= 0:
                break
            if key not in self._pinned and not busy(key):
                found.append(key)
                excess -= held
        return found if excess <= 0 else None


def _mib(size: int) -> int:
    return -(-size // 1024**2)
